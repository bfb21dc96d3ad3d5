package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"countersign/admin/api"

	"github.com/spf13/cobra"
)

// alerts shows, acknowledges and tests alerts.
func (t *tool) alerts(act maker) *cobra.Command {
	kinds := false
	list := act("list", "List the firing alerts, the gravest first", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			all, err := c.Alerts(ctx)
			if err != nil {
				return err
			}
			if kinds {
				return t.print(all.Kinds, func(w io.Writer) {
					fmt.Fprintln(w, "CODE\tFIRES\tMEANS")
					for _, k := range all.Kinds {
						fmt.Fprintf(w, "%s\t%s\t%s\n", k.Code, k.Fires, k.Means)
					}
				})
			}
			return t.print(all.Firing, func(w io.Writer) {
				for i, a := range all.Firing {
					if i > 0 {
						fmt.Fprintln(w)
					}
					showAlert(w, a)
					fmt.Fprintf(w, "do\t%s\nsee\t%s\n", a.Do, a.See)
				}
			})
		})
	list.Flags().BoolVar(&kinds, "kinds", false, "list all kinds instead, with their thresholds")
	details(list, "Prints nothing while no alert fires.")
	list.Example = "  countersign admin alert list\n  countersign admin alert list --kinds"

	var lasts time.Duration
	var reason string
	ack := act("ack CODE [SUBJECT]", "Take note of a firing alert, so that it is not sent again for a time",
		cobra.RangeArgs(1, 2), func(ctx context.Context, c *api.Client, args []string) error {
			if lasts < time.Minute || lasts > 7*24*time.Hour {
				return usageError{fmt.Errorf("--for %v: an acknowledgement lasts from 1m to 168h", lasts)}
			}
			a := api.AckAlert{Code: args[0], Seconds: int(lasts / time.Second), Reason: reason}
			if len(args) > 1 {
				a.Subject = args[1]
			}
			if err := c.AckAlert(ctx, a); err != nil {
				return err
			}
			return t.said("acknowledged", args[0])
		})
	ack.Flags().DurationVar(&lasts, "for", 24*time.Hour, "the `time` of the acknowledgement, at most 168h")
	ack.Flags().StringVar(&reason, "reason", "", "a `text` of at most 500 bytes for the audit log")
	details(ack, "CODE and SUBJECT are those of countersign admin alert list. The acknowledgement ends after its\n"+
		"time, with the alert, and when the level rises.")
	ack.Example = "  countersign admin alert ack replays --for 4h --reason \"the shop is being asked\""

	test := act("test", "Send a test message to each receiver of alerts, and show the answers", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			all, err := c.TestAlerts(ctx)
			if err != nil {
				return err
			}
			if len(all) == 0 {
				return errors.New("no receiver of alerts is configured: " +
					"add [[webhooks]] or [mail], and restart the daemon")
			}
			failed := 0
			if err := t.print(all, func(w io.Writer) {
				fmt.Fprintln(w, "RECEIVER\tRESULT\tANSWER")
				for _, r := range all {
					result := either(r.Error == "", "sent", "failed")
					fmt.Fprintf(w, "%s\t%s\t%s\n", r.Receiver, result, r.Answer+r.Error)
				}
			}); err != nil {
				return err
			}
			for _, r := range all {
				if r.Error != "" {
					failed++
				}
			}
			if failed > 0 {
				return fmt.Errorf("%d of %d receivers have not taken the test message", failed, len(all))
			}
			return nil
		})
	test.Example = "  countersign admin alert test"
	return group("alert", "Show and acknowledge alerts, and test their receivers", list, ack, test)
}

// showAlert prints an alert on one line, with a second one for an acknowledgement.
func showAlert(w io.Writer, a api.Alert) {
	of := a.Code
	if a.Subject != "" {
		of += " " + a.Subject
	}
	fmt.Fprintf(w, "alert\t%s, %s since %s: %s\n", of, a.Level, date(a.Since), a.Text)
	if ack := a.Acknowledged; ack != nil {
		why := ""
		if ack.Reason != "" {
			why = ": " + ack.Reason
		}
		fmt.Fprintf(w, "\tacknowledged by %s until %s%s\n", ack.By, date(ack.Until), why)
	}
}
