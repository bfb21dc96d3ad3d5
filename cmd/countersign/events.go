package main

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
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
		if q.Since, q.Until, err = eventTimes(ctx, client, since, until); err != nil {
			return err
		}
		if follow && tail == 0 && q.From == 0 && q.Since == 0 {
			tail = 10
		}
		q.Newest = newest || tail > 0 || !flags.Changed("newest") && q.From == 0 && !follow && terminal(t.stdout) != nil
		found, next, err := pages(ctx, client, q, cmp.Or(tail, limit), follow && tail == 0)
		if err != nil {
			return err
		}
		if tail > 0 {
			slices.Reverse(found)
		} else if next != "" {
			t.more(next)
		}
		if !follow {
			return t.printEvents(found, true)
		}
		return t.followEvents(c.Context(), client, q, found) // ctx has a timeout
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
		"only events about the document with this `nonce`, hex or base64url (default: all)")
	f.StringVar(&q.Digest, "digest", "", "only events with this `digest`, hex or base64url (default: all)")
	f.BoolVar(&newest, "newest", false, "the newest event first (default: on a terminal)")
	f.IntVar(&tail, "tail", 0, "only the last `number` of events, the oldest of them first (default: all)")
	f.BoolVar(&follow, "follow", false, "go on with new events until Ctrl-C")
	f.IntVar(&limit, "limit", 100, "list at most this `number` of events")
	return c
}

// pages gets at most limit events, or all of them. next is the cursor behind the last one, or "" at
// the end.
func pages(
	ctx context.Context, c *api.Client, q api.EventQuery, limit int, all bool,
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
	}
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
		if found, _, err = pages(ctx, c, q, 0, true); err != nil && ctx.Err() == nil {
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

// eventTimes parses the bounds of a search. A duration counts back from the appliance's clock,
// which stamps the events: the clock of this machine may be another one.
func eventTimes(ctx context.Context, c *api.Client, since, until string) (from, to int64, err error) {
	var now time.Time
	for _, each := range []struct {
		flag, text string
		ms         *int64
	}{{"since", since, &from}, {"until", until, &to}} {
		if each.text == "" {
			continue
		}
		at, err := parseTime(each.text)
		if err != nil {
			age, notAge := parseAge(each.text)
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

// hexOf returns 32 bytes in the form of the audit log: hex. The text may also be base64url, as
// documents have it, or "".
func hexOf(text string) (string, error) {
	b, err := hex.DecodeString(text)
	if err != nil || text != "" && len(b) != 32 {
		if b, err = base64.RawURLEncoding.Strict().DecodeString(text); err != nil || len(b) != 32 {
			return "", fmt.Errorf("%q is not 32 bytes: write 64 hex digits, or 43 characters of base64url", text)
		}
	}
	return hex.EncodeToString(b), nil
}

// story shows one event with all events of the same request.
func (t *tool) story(act maker) *cobra.Command {
	do := func(ctx context.Context, c *api.Client, args []string) error {
		number, err := strconv.ParseUint(args[0], 10, 64)
		if err != nil {
			return usageError{fmt.Errorf("%q is not the number of an event: countersign admin audit list shows them",
				args[0])}
		}
		all, err := storyOf(ctx, c, number)
		if err != nil {
			return err
		}
		return t.print(all, func(w io.Writer) {
			for i, e := range all {
				if i > 0 {
					fmt.Fprintln(w)
				}
				fmt.Fprintf(w, "event\t%d %s at %s\n", e.Index, e.Type, eventTime(e))
				fmt.Fprintf(w, "actor\t%s %s\n", e.Actor.Kind, e.Actor.Name)
				fmt.Fprintf(w, "action\t%s\n", strings.TrimSpace(e.Action+" "+e.Resource))
				fmt.Fprintf(w, "outcome\t%s\n", e.Outcome)
				for _, name := range slices.Sorted(maps.Keys(e.Metadata)) {
					fmt.Fprintf(w, "  %s\t%s\n", name, strings.ReplaceAll(e.Metadata[name], "\n", " "))
				}
			}
		})
	}
	c := act("show EVENT", "Show an event with all events of the same request", cobra.ExactArgs(1), do)
	details(c, "The events of a document are its admission, its outcome, and each request with the same nonce,\n"+
		"for example a replay. The events of a proposal are its approvals and its end. policy explain\n"+
		"shows why an admission was allowed.")
	c.Example = "  countersign admin audit show 4711"
	return c
}

// storyOf returns the events of the request to which an event belongs, the oldest first.
func storyOf(ctx context.Context, c *api.Client, number uint64) ([]api.Event, error) {
	first, err := c.Events(ctx, number, 1)
	if err != nil {
		return nil, err
	}
	if len(first) != 1 || first[0].Index != number {
		return nil, fmt.Errorf("there is no event %d (any more): countersign admin audit list shows the present ones",
			number)
	}
	found := map[uint64]api.Event{number: first[0]}
	e := first[0]
	if text := e.Metadata["admission"]; text != "" {
		admission, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("event %d names the admission %q, which is not a number", number, text)
		}
		if some, err := c.Events(ctx, admission, 1); err != nil {
			return nil, err
		} else if len(some) == 1 && some[0].Index == admission { // else dropped by retention
			e = some[0]
			found[admission] = e
		}
	}
	queries := []api.EventQuery{{Admission: strconv.FormatUint(e.Index, 10)}}
	if nonce := e.Metadata["nonce"]; nonce != "" {
		queries = append(queries, api.EventQuery{Nonce: nonce})
	}
	if strings.HasPrefix(e.Resource, "proposal/") {
		queries = append(queries, api.EventQuery{Resource: e.Resource})
	}
	for _, q := range queries {
		some, _, err := pages(ctx, c, q, 0, true)
		if err != nil {
			return nil, err
		}
		for _, each := range some {
			found[each.Index] = each
		}
	}
	return slices.SortedFunc(maps.Values(found), func(x, y api.Event) int { return cmp.Compare(x.Index, y.Index) }), nil
}
