package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"countersign/admin/api"
	"countersign/audit"
	"countersign/policy"

	"github.com/spf13/cobra"
)

// story shows one event with all events of the same request.
func (t *tool) story(act maker) *cobra.Command {
	do := func(ctx context.Context, c *api.Client, args []string) error {
		number, err := eventNumber(args[0])
		if err != nil {
			return err
		}
		all, err := storyOf(ctx, c, number)
		if err != nil {
			return err
		}
		told, err := t.tell(ctx, c, all)
		if err != nil {
			return err
		}
		return t.print(told, func(w io.Writer) {
			for i, e := range told {
				if i > 0 {
					fmt.Fprintln(w)
				}
				fmt.Fprintf(w, "event\t%d %s at %s\n", e.Index, e.Type, eventTime(e.Event))
				fmt.Fprintf(w, "actor\t%s %s\n", e.Actor.Kind, e.Actor.Name)
				fmt.Fprintf(w, "action\t%s\n", strings.TrimSpace(e.Action+" "+e.Resource))
				fmt.Fprintf(w, "outcome\t%s\n", e.Outcome)
				for _, name := range slices.Sorted(maps.Keys(e.Metadata)) {
					fmt.Fprintf(w, "  %s\t%s\n", name, oneLine(e.Metadata[name]))
				}
				e.show(w)
			}
		})
	}
	c := act("show EVENT", "Show an event with all events of the same request", cobra.ExactArgs(1), do)
	details(c, "The events of a document are its admission, its outcome, and each request with the same nonce,\n"+
		"for example a replay, with the decisions of policy and the receipt of a payment. The events of a\n"+
		"proposal are its approvals, the acts that carried it out, and its end. policy explain shows all\n"+
		"inputs of a decision.")
	c.Example = "  countersign admin audit show 4711"
	return c
}

// storyOf returns the events of the request to which an event belongs, the oldest first.
func storyOf(ctx context.Context, c *api.Client, number uint64) ([]api.Event, error) {
	e, err := findEvent(ctx, c, number)
	if err != nil {
		return nil, err
	}
	if e == nil {
		return nil, noEvent(number)
	}
	found := map[uint64]api.Event{number: *e}
	if text := e.Metadata["admission"]; text != "" {
		admission, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("event %d names the admission %q, which is not a number", number, text)
		}
		if admitted, err := findEvent(ctx, c, admission); err != nil {
			return nil, err
		} else if admitted != nil { // else dropped by retention
			e = admitted
			found[admission] = *e
		}
	}
	queries := []api.EventQuery{{Admission: strconv.FormatUint(e.Index, 10)}}
	if nonce := e.Metadata["nonce"]; nonce != "" {
		queries = append(queries, api.EventQuery{Nonce: nonce})
	}
	if proposal := proposalOf(*e); proposal != "" {
		queries = append(queries, api.EventQuery{Resource: proposal})
	}
	for _, q := range queries {
		some, _, err := pages(ctx, c, q, 0, true, nil)
		if err != nil {
			return nil, err
		}
		for _, each := range some {
			found[each.Index] = each
		}
	}
	if err := addActs(ctx, c, found); err != nil {
		return nil, err
	}
	return slices.SortedFunc(maps.Values(found), func(x, y api.Event) int { return cmp.Compare(x.Index, y.Index) }), nil
}

// proposalOf returns the proposal that an event is about, or that the event carries out, or "".
func proposalOf(e api.Event) string {
	switch {
	case strings.HasPrefix(e.Resource, "proposal/"):
		return e.Resource
	case e.Actor.Proposal != 0:
		return fmt.Sprintf("proposal/%d", e.Actor.Proposal)
	}
	return ""
}

// addActs adds the events that carry out the proposal of a story. They are between the event that
// its execution begins and the one that its execution has ended, and have the proposer as actor.
func addActs(ctx context.Context, c *api.Client, found map[uint64]api.Event) error {
	var run, done api.Event
	for _, e := range found {
		switch e.Type {
		case audit.ProposalRun:
			run = e
		case audit.ProposalDone:
			done = e
		}
	}
	if run.Type == "" {
		return nil
	}
	q := api.EventQuery{From: run.Index, Before: done.Index, Actor: run.Actor.Name} // before 0: not ended yet
	acts, _, err := pages(ctx, c, q, 0, true, nil)
	for _, e := range acts {
		if proposalOf(e) == run.Resource {
			found[e.Index] = e
		}
	}
	return err
}

// told is an event of a story, with what the appliance keeps of the event beside the log.
type told struct {
	api.Event
	Decision *policy.Record `json:"decision,omitempty"`
	Rules    []string       `json:"rules,omitempty"`   // the deciding rules, by lines of the policy
	Receipt  *api.Receipt   `json:"receipt,omitempty"` // of the signature
	Lacks    []string       `json:"lacks,omitempty"`   // decision or receipt that is not shown, and why
}

// show prints what is beside the log.
func (e told) show(w io.Writer) {
	if d := e.Decision; d != nil {
		why := cmp.Or(d.Fault, strings.Join(e.Rules, ", "), "no rule permits it")
		fmt.Fprintf(w, "decision\t%s, by version %d of the policy: %s\n", outcome(d.Allowed), d.Version, why)
	}
	if r := e.Receipt; r != nil {
		fmt.Fprintf(w, "receipt\t%s, %s, %s\n", r.ID, r.Method, r.Status)
	}
	for _, each := range e.Lacks {
		fmt.Fprintf(w, "not shown\t%s\n", each)
	}
}

// tell adds decisions and receipts to events of one request.
func (t *tool) tell(ctx context.Context, c *api.Client, all []api.Event) (story []told, err error) {
	byIndex := map[string]api.Event{}
	for _, e := range all {
		byIndex[strconv.FormatUint(e.Index, 10)] = e
		each := told{Event: e}
		if e.Metadata["inputs"] != "" {
			err = each.lacks("decision", each.decide(ctx, records{tool: t, client: c}))
		}
		if admitted, found := byIndex[e.Metadata["admission"]]; err == nil && found && e.Type.Kind() == audit.Outcome {
			err = each.lacks("receipt", each.receive(ctx, c, admitted))
		}
		if err != nil {
			return nil, err
		}
		story = append(story, each)
	}
	return story, nil
}

// lacks notes why the appliance does not give something: the caller lacks a role for it, or
// retention has dropped it. Another error is returned.
func (e *told) lacks(what string, err error) error {
	refusal, is := errors.AsType[*api.Error](err)
	switch {
	case is && refusal.Code == "not_found":
		e.Lacks = append(e.Lacks, what+": dropped by retention")
	case is && refusal.Code == "not_allowed":
		e.Lacks = append(e.Lacks, what+": "+message(err))
	default:
		return err
	}
	return nil
}

// decide gets the decision of an event.
func (e *told) decide(ctx context.Context, from records) error {
	return from.get(ctx, e.Index, func(_ uint64, raw string, rec policy.Record, by *policy.Policy) error {
		if policy.Digest([]byte(raw)) != e.Metadata["inputs"] {
			return changed(e.Index)
		}
		e.Decision, e.Rules = &rec, where(by.Rules(), rec.Rules)
		return nil
	})
}

// receiptSlack is added to the times of a signature's events in the search for the receipt, whose
// time was read between them: the clock may have been corrected meanwhile.
const receiptSlack = time.Second

// receive gets the receipt of a signature. A document that is no payment has none.
func (e *told) receive(ctx context.Context, c *api.Client, admitted api.Event) error {
	slack := receiptSlack.Milliseconds()
	for after := ""; ; {
		some, next, err := c.Receipts(ctx, max(0, admitted.TimeMS-slack), e.TimeMS+slack, after, maxPage)
		if err != nil {
			return err
		}
		for _, r := range some {
			if r.Event == admitted.Index {
				e.Receipt = &r
				return nil
			}
		}
		if after = next; after == "" {
			return nil
		}
	}
}
