package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"countersign/approval"
	"countersign/audit"
	"countersign/internal/cli"

	"github.com/spf13/cobra"
)

// approvals checks the operators and approvals that a log records.
func (t *tool) approvals() *cobra.Command {
	var of logFlags
	var trusted string
	do := func(cmd *cobra.Command, args []string) error {
		var o approval.ReplayOptions
		if trusted != "" {
			b, err := os.ReadFile(trusted)
			if err != nil {
				return err
			}
			if o.Trusted, err = approval.Trusted(b); err != nil {
				return fmt.Errorf("%s: %w", trusted, err)
			}
		}
		var chain *approval.Chain
		follow := func(log audit.Log) func() func(uint64, audit.Event) error {
			o.Appliance = log.Name()
			return func() func(uint64, audit.Event) error {
				chain = approval.NewChain(o)
				return chain.Follow
			}
		}
		verified, err := t.check(cmd.Context(), &of, args, follow)
		if err != nil {
			return err
		}
		r, c := chain.Report(), verified.Checkpoint
		out := struct {
			Valid  bool   `json:"valid"`
			Events uint64 `json:"events"`
			Epoch  uint32 `json:"epoch"`
			Size   uint64 `json:"size"`
			Root   string `json:"root"`
			// Trusted: the first administrator has only credentials of --operators.
			Trusted bool `json:"trusted"`
			*approval.Report
		}{true, verified.Events, c.Epoch, c.Size, c.Root.String(), o.Trusted != nil && r.First != nil, r}
		return t.print(out, func(w io.Writer) { showApprovals(w, verified, r, o.Trusted != nil) })
	}
	c := command("approvals [DIR]", "Check an audit log, and that each act in it had the approvals that it needed",
		cobra.MaximumNArgs(1), do)
	details(c, "Names the first event that is wrong. DIR is from countersign admin audit export.\n\n"+
		"The log is checked as by countersign audit verify. From the first event on, the operators and\n"+
		"their signatures are replayed. An act that needs approval must have been carried out once,\n"+
		"by a proposal for this very act, with enough approvals of operators who were approvers at that\n"+
		"moment. Only the signatures are trusted, not the appliance. The first administrator has no\n"+
		"approval in the log: with --operators, give the ids of the credentials by which you know this\n"+
		"administrator.")
	c.Example = "  countersign audit approvals log --key \"$(cat log.vkey)\" --operators trusted.json"
	of.add(t, c.Flags())
	c.Flags().StringVar(&trusted, "operators", "",
		"a `file` with a JSON list of ids of credentials: refuse a first administrator with other ones "+
			"(default: accept any)")
	return c
}

func showApprovals(w io.Writer, verified audit.Report, r *approval.Report, trusted bool) {
	c := verified.Checkpoint
	fmt.Fprintf(w, "valid\t%s; what needed approval in them had it\n", cli.Count(verified.Events, "event"))
	fmt.Fprintf(w, "checkpoint\tepoch %d, %s, root %s\n", c.Epoch, cli.Count(c.Size, "event"), c.Root)
	if r.First == nil {
		fmt.Fprintf(w, "first\tthere are no operators in this log, and nothing that needed approval\n")
		return
	}
	first := r.First.Operator
	var ids []string
	for _, c := range first.Credentials {
		ids = append(ids, c.ID)
	}
	fmt.Fprintf(w, "first\t%s, enrolled by event %d at %s with credential %s\n",
		first.Name, r.First.Event, date(r.First.Time.Unix()), strings.Join(ids, ", "))
	if trusted {
		fmt.Fprintln(w, "\tthat is who you trust")
	} else {
		fmt.Fprintln(w, "\teverything below hangs on this first administrator: make sure that it is the right person "+
			"(--operators)")
	}
	fmt.Fprintf(w, "needed\t%d%s\n", r.Needed, either(r.Hardware, ", by hardware keys", ""))
	for _, o := range r.Operators {
		var roles []string
		for _, role := range o.Roles {
			roles = append(roles, string(role))
		}
		fmt.Fprintf(w, "operator\t%s: %s; %s\n", o.Name, strings.Join(roles, ", "),
			cli.Count(len(o.Credentials), "credential"))
	}
	for _, g := range r.Groups {
		fmt.Fprintf(w, "group\t%s: %d %s, by event %d\n", g.Name, len(g.Members), g.Of, g.Event)
	}
	for _, p := range r.Proposals {
		fmt.Fprintf(w, "\nproposal %d\t%s\n", p.ID, p.Act)
		for _, each := range p.Parameters {
			fmt.Fprintf(w, "  %s\t%s\n", each.Name, each.Value)
		}
		fmt.Fprintf(w, "proposed\tby %s at %s, event %d\n", p.Proposer, date(p.Proposed.Unix()), p.Event)
		for _, each := range p.Approvals {
			fmt.Fprintf(w, "approved\tby %s at %s, event %d, credential %s\n",
				each.Operator, date(each.Time.Unix()), each.Event, each.Credential)
		}
		for _, each := range p.Did {
			fmt.Fprintf(w, "did\t%s %q, event %d\n", each.Type, each.Resource, each.Event)
		}
		outcome := p.State
		if p.Cause != "" {
			outcome += fmt.Sprintf(": %q", p.Cause)
		}
		if !p.Ended.IsZero() {
			outcome += " at " + date(p.Ended.Unix())
		}
		fmt.Fprintf(w, "outcome\t%s\n", outcome)
	}
	if len(r.Others) > 0 {
		fmt.Fprintf(w, "\nunknown\tproposals %v are of acts that this program does not know\n", r.Others)
	}
}
