package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"time"

	"countersign/admin/api"
	"countersign/audit"
	"countersign/internal/cli"

	"github.com/spf13/cobra"
)

// maxPage is the maximum number of events in an answer of the API.
const maxPage = 1000

// followEvery is the time between two questions for new events.
const followEvery = time.Second

// more says how the next page of a list is shown.
func (t *tool) more(cursor string) {
	fmt.Fprintf(t.stderr, "countersign: there are more: add --after %s, or raise --limit\n", cursor)
}

func (t *tool) events(act maker) *cobra.Command {
	var q api.EventQuery
	var limit, tail int
	var follow, newest bool
	var kind, since, until string
	var c *cobra.Command
	do := func(ctx context.Context, client *api.Client, _ []string) error {
		flags := c.Flags()
		switch {
		case limit < 1:
			return usageError{fmt.Errorf("--limit %d is too low: write 1 or higher", limit)}
		case flags.Changed("tail") && tail < 1:
			return usageError{fmt.Errorf("--tail %d is too low: write 1 or higher", tail)}
		case (flags.Changed("tail") || follow) && (flags.Changed("newest") || q.After != ""):
			return usageError{errors.New("--tail and --follow end with the newest event: omit --newest and --after")}
		}
		if q.Type = audit.Type(kind); kind != "" && !q.Type.Known() {
			return usageError{fmt.Errorf("--type: %q is not a type of events, for example KeyCreated: "+
				"docs/SPEC.md has the list", kind)}
		}
		var err error
		if q.Nonce, err = hexOf(q.Nonce); err != nil {
			return usageError{fmt.Errorf("--nonce: %w", err)}
		}
		if q.Digest, err = hexOf(q.Digest); err != nil {
			return usageError{fmt.Errorf("--digest: %w", err)}
		}
		if q.Since, q.Until, err = times(ctx, client, "since", since, "until", until); err != nil {
			return err
		}
		if follow && tail == 0 && q.From == 0 && q.Since == 0 {
			tail = 10
		}
		q.Newest = newest || tail > 0 || !flags.Changed("newest") && q.From == 0 && !follow && terminal(t.stdout) != nil
		b := t.bar("listed")
		found, next, err := pages(ctx, client, q, cmp.Or(tail, limit), follow && tail == 0, b)
		b.end()
		if err != nil {
			return err
		}
		if tail > 0 {
			slices.Reverse(found)
		}
		if follow {
			return t.followEvents(c.Context(), client, q, found) // ctx has a timeout
		}
		if err := t.printEvents(found, true); err != nil {
			return err
		}
		if tail == 0 && next != "" {
			t.more(next)
		}
		return nil
	}
	c = act("list", "List events of the audit log", cobra.NoArgs, do)
	c.Example = "  countersign admin audit list --since 7d --type KeyCreated\n" +
		"  countersign admin audit list --actor shop --limit 1000000 --json\n" +
		"  countersign admin audit list --resource payments --tail 5\n" +
		"  countersign admin audit list --follow"
	details(c, "The newest event is first on a terminal, and the oldest first elsewhere. Events have the times of\n"+
		"the appliance's clock, and durations count back from there.")
	c.Annotations = map[string]string{"long": "true"}
	f := c.Flags()
	f.Uint64Var(&q.From, "from", 0, "begin with the event of this `index` (default: 0)")
	f.StringVar(&q.After, "after", "", "the next page: the `cursor` that the page before has shown")
	f.StringVar(&since, "since", "", "only events since a `time`, for example 24h, 7d or 2026-11-24 (default: all)")
	f.StringVar(&until, "until", "", "only events before a `time`, for example 1h or 2026-11-24 (default: all)")
	f.StringVar(&kind, "type", "",
		"only events of this `type`, for example ReplayRefused; docs/SPEC.md has the list (default: all)")
	f.StringVar(&q.Actor, "actor", "", "only events of the peer or operator of this `name` (default: all)")
	f.StringVar(&q.Resource, "resource", "",
		"only events about this `resource`, for example payments/2, or payments for all versions (default: all)")
	f.StringVar(&q.Nonce, "nonce", "",
		"only events about the document with this `nonce`, hex or another form of 32 bytes (default: all)")
	f.StringVar(&q.Digest, "digest", "",
		"only events with this `digest`, hex or another form of 32 bytes (default: all)")
	f.StringVar(&q.Request, "request", "",
		"only events of the request with this `id`, which is in its answer (default: all)")
	f.BoolVar(&newest, "newest", false, "the newest event first (default: on a terminal)")
	f.IntVar(&tail, "tail", 0, "only the last `number` of events, the oldest of them first (default: all)")
	f.BoolVar(&follow, "follow", false, "go on with new events until Ctrl-C")
	f.IntVar(&limit, "limit", 100, "list at most this `number` of events")
	return c
}

// pages gets at most limit events, or all of them. next is the cursor behind the last one, or "" at
// the end. The bar shows the progress towards the limit; nil for none.
func pages(
	ctx context.Context, c *api.Client, q api.EventQuery, limit int, all bool, b *bar,
) (found []api.Event, next string, err error) {
	found = []api.Event{}
	for {
		q.Limit = maxPage
		if !all {
			q.Limit = min(maxPage, limit-len(found))
		}
		some, next, err := c.FindEvents(ctx, q)
		if err != nil {
			return nil, "", err
		}
		found = append(found, some...)
		if q.After = next; next == "" || !all && len(found) >= limit {
			return found, next, nil
		}
		if !all {
			b.progress(uint64(len(found)), uint64(limit))
		}
	}
}

// eventNumber reads the number of an event.
func eventNumber(text string) (uint64, error) {
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		err = usageError{fmt.Errorf("%q is not the number of an event: countersign admin audit list shows them", text)}
	}
	return n, err
}

// findEvent returns the event with a number, or nil if the log does not have it (any more).
func findEvent(ctx context.Context, c *api.Client, number uint64) (*api.Event, error) {
	found, err := c.Events(ctx, number, 1) // this one, or the next one that the log has
	if err != nil || len(found) != 1 || found[0].Index != number {
		return nil, err
	}
	return &found[0], nil
}

func noEvent(number uint64) error {
	return fmt.Errorf("there is no event %d (any more): countersign admin audit list shows the present ones", number)
}

// followEvents prints events, and then new ones as they come.
func (t *tool) followEvents(ctx context.Context, c *api.Client, q api.EventQuery, found []api.Event) error {
	heading := !t.json
	q.Newest, q.After, q.Limit = false, "", maxPage
	ticker := time.NewTicker(followEvery)
	defer ticker.Stop()
	for {
		if len(found) > 0 {
			if err := t.printEvents(found, heading); err != nil {
				return err
			}
			q.From, heading = found[len(found)-1].Index+1, false
		}
		select {
		case <-ctx.Done(): // Ctrl-C
			return nil
		case <-ticker.C:
		}
		var err error
		if found, _, err = pages(ctx, c, q, 0, true, nil); err != nil && ctx.Err() == nil {
			return err
		}
	}
}

// printEvents prints a list of events: a part of a longer list without the heading.
func (t *tool) printEvents(found []api.Event, heading bool) error {
	if !heading && t.json {
		for _, e := range found {
			if err := json.NewEncoder(t.stdout).Encode(e); err != nil {
				return err
			}
		}
		return nil
	}
	return t.print(found, func(w io.Writer) {
		if heading {
			fmt.Fprintln(w, "INDEX\tTIME\tTYPE\tACTOR\tACTION\tRESOURCE\tOUTCOME")
		}
		for _, e := range found {
			fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\t%s\n", e.Index, eventTime(e), e.Type,
				e.Actor.Kind+" "+e.Actor.Name, e.Action, e.Resource, e.Outcome)
		}
	})
}

func eventTime(e api.Event) string {
	return time.UnixMilli(e.TimeMS).UTC().Format("2006-01-02T15:04:05.000Z")
}

// times parses the bounds of a search for events or receipts, given by two flags, in Unix
// milliseconds. A duration counts back from the appliance's clock, which stamps both: the clock of
// this machine may be another one.
func times(
	ctx context.Context, c *api.Client, fromFlag, since, toFlag, until string,
) (from, to int64, err error) {
	var now time.Time
	for _, each := range []struct {
		flag, text string
		ms         *int64
	}{{fromFlag, since, &from}, {toFlag, until, &to}} {
		if each.text == "" {
			continue
		}
		at, err := parseTime(each.text)
		if err != nil {
			age, notAge := cli.ParseDuration(each.text)
			if notAge != nil {
				return 0, 0, usageError{fmt.Errorf("--%s: %w; or a duration: 30d, 2w or 12h", each.flag, err)}
			}
			if now.IsZero() {
				l, err := c.Ledger(ctx)
				if err != nil {
					return 0, 0, err
				}
				now = time.Unix(l.Time+l.BehindClock, 0)
			}
			at = now.Add(-age)
		}
		*each.ms = max(1, at.UnixMilli()) // 0 is no bound
	}
	return from, to, nil
}

// parseTime parses a time of the command line, in UTC.
func parseTime(text string) (time.Time, error) {
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		at, err = time.Parse(time.DateOnly, text)
	}
	if err != nil {
		return at, fmt.Errorf("%q is not a time: write 2026-11-24 or 2026-11-24T08:00:00Z, for example", text)
	}
	return at, nil
}
