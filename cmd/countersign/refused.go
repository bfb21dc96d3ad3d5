package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"strings"

	"countersign/admin/api"
	"countersign/internal/cli"

	"github.com/spf13/cobra"
)

func (t *tool) refusedHandshakes(act maker) *cobra.Command {
	c := act("refused", "Show the handshakes that were refused: which key came, from where, and why", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			all, err := c.RefusedHandshakes(ctx)
			if err != nil {
				return err
			}
			return t.print(all, func(w io.Writer) {
				for i, r := range all {
					if i > 0 {
						fmt.Fprintln(w)
					}
					showRefused(w, r)
				}
			})
		})
	details(c, "A refused client gets no answer at all, whatever the reason. The list begins with the newest one,\n"+
		"and is in the daemon's memory: it begins anew at each start, and has some 400 entries.")
	return c
}

func showRefused(w io.Writer, r api.RefusedHandshake) {
	fmt.Fprintf(w, "refused\t%s, at %s\n", cli.Count(r.Count, "handshake"), date(r.Last))
	fmt.Fprintf(w, "from\t%s%s\n", r.From, either(len(r.Seen) == 0, "", ", the last address of "+
		strings.Join(r.Seen, ", ")))
	if r.Key != "" {
		fmt.Fprintf(w, "key\t%s, %s%s\n", r.Key, cmp.Or(r.Peer, "not enrolled"),
			either(r.Unproven, " (claimed, without a proof)", ""))
	}
	fmt.Fprintf(w, "reason\t%s\n\t%s\n", r.Reason, r.Do)
	if r.Reason == "identity" || r.Reason == "rate_limited" {
		fmt.Fprintf(w, "\t%s\n", r.Text)
	}
}
