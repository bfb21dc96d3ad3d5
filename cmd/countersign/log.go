package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"countersign/admin/api"
	"countersign/audit"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// bar shows on a terminal how far something is.
type bar struct {
	to    io.Writer
	what  string
	mu    sync.Mutex
	shown time.Time
	open  bool
}

func (t *tool) bar(what string) *bar {
	b := &bar{what: what}
	if f, ok := t.stderr.(*os.File); ok {
		if st, err := f.Stat(); err == nil && st.Mode()&os.ModeCharDevice != 0 {
			b.to = f
		}
	}
	return b
}

func (b *bar) progress(done, all uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.to == nil || all == 0 || done < all && time.Since(b.shown) < 100*time.Millisecond {
		return
	}
	const width = 40
	filled := int(min(done, all) * width / all)
	fmt.Fprintf(b.to, "\r%s [%-*s] %3d%% %d of %d events", b.what, width, bars[:filled], done*100/all, done, all)
	b.shown, b.open = time.Now(), true
}

const bars = "########################################"

func (b *bar) end() {
	if b.open {
		fmt.Fprintln(b.to)
	}
}

// export writes the log's static form.
func (t *tool) export(socket *string) *cobra.Command {
	c := command("export DIR", "Write the audit log as static files (C2SP tlog-tiles)", cobra.ExactArgs(1), func(cmd *cobra.Command, args []string) error {
		ctx, cancel := context.WithTimeout(cmd.Context(), longTime)
		defer cancel()
		c, err := t.dialAdmin(*socket)
		if err != nil {
			return err
		}
		l, err := c.Log(ctx)
		if err != nil {
			return err
		}
		log, err := audit.ParseVerifierKey(l.VerifierKey)
		if err != nil {
			return err
		}
		b := t.bar("exporting")
		defer b.end()
		head, err := audit.Mirror(ctx, c, log, args[0], b.progress)
		if err != nil {
			return err
		}
		return t.print(map[string]any{"dir": args[0], "epoch": head.Epoch, "size": head.Size, "verifier_key": log.VerifierKey(head.Epoch)}, func(w io.Writer) {
			fmt.Fprintf(w, "exported\tepoch %d with %d events, and those before it, to %s\nverifier key\t%s\n", head.Epoch, head.Size, args[0], log.VerifierKey(head.Epoch))
		})
	})
	c.Long = "Each epoch of the log is a tree of its own in DIR/epochs/N; DIR/checkpoint and DIR/tile are links to those of the present\n" +
		"epoch. A folder that was exported to before is brought up to date: what is there and can't change is not written again.\n" +
		"Anyone can check it: countersign audit verify DIR --key VKEY."
	return c
}

// pageOfEvents is how many the API gives at once.
const pageOfEvents = 1000

func (t *tool) events(act maker) *cobra.Command {
	var from uint64
	var limit int
	var kind, actor, resource, since string
	list := act("list", "List events", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
		if limit < 1 {
			return usageError{errors.New("--limit must be at least 1")}
		}
		if since != "" {
			age, err := parseAge(since)
			if err != nil {
				return usageError{fmt.Errorf("--since: %w", err)}
			}
			first, err := firstSince(time.Now().Add(-age).UnixMilli(), func(index uint64) ([]api.Event, error) { return c.Events(ctx, index, 1) })
			if err != nil {
				return err
			}
			from = max(from, first)
		}
		all := kind == "" && actor == "" && resource == ""
		found := []api.Event{}
		for len(found) <= limit { // one more, to say that there are more
			n := pageOfEvents
			if all {
				n = min(n, limit+1-len(found))
			}
			page, err := c.Events(ctx, from, n)
			if err != nil {
				return err
			}
			for _, e := range page {
				from = e.Index + 1
				if len(found) <= limit && (kind == "" || string(e.Type) == kind) && (actor == "" || e.Actor.Name == actor) && (resource == "" || e.Resource == resource) {
					found = append(found, e)
				}
			}
			if len(page) < n {
				break
			}
		}
		if len(found) > limit {
			fmt.Fprintf(t.stderr, "countersign: there are more, from event %d on: --from, or a higher --limit\n", found[limit].Index)
			found = found[:limit]
		}
		return t.print(found, func(w io.Writer) {
			fmt.Fprintln(w, "INDEX\tTIME\tTYPE\tACTOR\tACTION\tRESOURCE\tOUTCOME")
			for _, e := range found {
				fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\t%s\n", e.Index, time.UnixMilli(e.TimeMS).UTC().Format("2006-01-02T15:04:05.000Z"),
					e.Type, e.Actor.Kind+" "+e.Actor.Name, e.Action, e.Resource, e.Outcome)
			}
		})
	})
	list.Annotations = map[string]string{"long": "true"}
	f := list.Flags()
	f.Uint64Var(&from, "from", 0, "the first index")
	f.StringVar(&since, "since", "", "only those of so long ago and later, such as 24h or 7d")
	f.StringVar(&kind, "type", "", "only those of a type, such as ReplayRefused (docs/SPEC.md has them)")
	f.StringVar(&actor, "actor", "", "only those of a peer or an operator")
	f.StringVar(&resource, "resource", "", "only those about something, such as payments/2 or proposal/7")
	f.IntVar(&limit, "limit", 100, "how many at the most")
	return list
}

// firstSince is the index of the first event of a time or later; at returns the event of an index or the first one after it, if there is one.
func firstSince(ms int64, at func(uint64) ([]api.Event, error)) (uint64, error) {
	var failed error
	before := func(index uint64) bool { // whether to look further on
		found, err := at(index)
		failed = errors.Join(failed, err)
		return err == nil && len(found) > 0 && found[0].TimeMS < ms
	}
	low, high := uint64(0), uint64(1) // what is below low is before
	for before(high - 1) {
		low, high = high, 2*high
	}
	for low < high && failed == nil {
		if middle := low + (high-low)/2; before(middle) {
			low = middle + 1
		} else {
			high = middle
		}
	}
	return low, failed
}

// logFlags say which log is checked, and with what.
type logFlags struct{ socket, vkey, since string }

func (l *logFlags) add(t *tool, f *pflag.FlagSet) {
	t.operatorFlag(f)
	f.StringVar(&l.socket, "socket", "", "check the log of a running appliance over its admin socket")
	f.StringVar(&l.vkey, "key", os.Getenv("COUNTERSIGN_LOG_KEY"), "the log's verifier key, of any epoch (or COUNTERSIGN_LOG_KEY)")
	f.StringVar(&l.since, "since", "", "the file of an older checkpoint")
}

// check verifies the log. follow may look at its events meanwhile.
func (t *tool) check(ctx context.Context, l *logFlags, args []string, follow func(log audit.Log) func() func(uint64, audit.Event) error) (audit.Report, error) {
	var none audit.Report
	if (len(args) == 1) == (l.socket != "") {
		return none, usageError{errors.New("name the folder of an export, or --socket")}
	}
	if l.vkey == "" {
		return none, usageError{errors.New("--key is missing: countersign admin audit key prints it, and you should have it from when you trusted the appliance")}
	}
	log, err := audit.ParseVerifierKey(l.vkey)
	if err != nil {
		return none, err
	}
	var from audit.Source
	if l.socket == "" {
		if _, err := os.Stat(filepath.Join(args[0], "checkpoint")); err != nil {
			return none, fmt.Errorf("this is not the folder of an export (countersign admin audit export): %w", err)
		}
		from = audit.Folder(args[0])
	} else if from, err = t.dialAdmin(l.socket); err != nil {
		return none, err
	}
	var o audit.VerifyOptions
	if l.since != "" {
		if o.Since, err = os.ReadFile(l.since); err != nil {
			return none, err
		}
	}
	if follow != nil {
		o.Follow = follow(log)
	}
	b := t.bar("verifying")
	defer b.end()
	o.Progress = b.progress
	return log.Verify(ctx, from, o)
}

// audit is for those who check a log and need no appliance for that.
func (t *tool) audit() *cobra.Command {
	var of logFlags
	verify := command("verify [DIR]", "Check an audit log: tree, signatures, form of the events, rules of the ledger", cobra.MaximumNArgs(1), func(cmd *cobra.Command, args []string) error {
		r, err := t.check(cmd.Context(), &of, args, nil)
		if err != nil {
			return err
		}
		out := struct {
			Valid bool `json:"valid"`
			audit.Report
			Epoch uint32 `json:"epoch"`
			Size  uint64 `json:"size"`
			Root  string `json:"root"`
		}{true, r, r.Checkpoint.Epoch, r.Checkpoint.Size, r.Checkpoint.Root.String()}
		return t.print(out, func(w io.Writer) {
			fmt.Fprintf(w, "valid\t%d events from %d on, in %d epochs\n", r.Events, r.First, r.Epochs)
			if r.Dropped > 0 {
				fmt.Fprintf(w, "dropped\t%d epochs, as the log says\n", r.Dropped)
			}
			fmt.Fprintf(w, "signatures\t%d, each with its admission\n", r.Signatures)
			fmt.Fprintf(w, "unsettled\t%d admissions of which the log does not say how they ended\n", r.Unsettled)
			if r.SinceDropped {
				fmt.Fprintln(w, "since\tthe older checkpoint's epoch was dropped, so nothing shows any more that the log went on from it")
			}
			fmt.Fprintf(w, "checkpoint\tepoch %d, %d events, root %s\n", r.Checkpoint.Epoch, r.Checkpoint.Size, r.Checkpoint.Root)
		})
	})
	verify.Long = "Checks with nothing but the log's key that every event is in the tree that the appliance has signed, that no epoch is missing\n" +
		"but by retention, that the events have their form, that no nonce was spent twice while it lived, and that each signature has\n" +
		"its admission. With --since, also that the log is a continuation of what an older checkpoint says. Names the first event\n" +
		"that is wrong."
	of.add(t, verify.Flags())
	return group("audit", "Check an audit log without trusting the appliance", verify, t.approvals())
}

func (t *tool) retention(act maker) *cobra.Command {
	var reason string
	epochOf := func(args []string) (uint32, error) {
		n, err := strconv.ParseUint(args[0], 10, 32)
		if err != nil {
			return 0, usageError{fmt.Errorf("%q is not the number of an epoch", args[0])}
		}
		return uint32(n), nil
	}
	hold := act("hold EPOCH", "Keep an epoch of the audit log from being dropped (legal hold)", cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
		n, err := epochOf(args)
		if err == nil {
			err = c.Hold(ctx, n, reason)
		}
		if err != nil {
			return err
		}
		return t.print(map[string]any{"held": n}, func(w io.Writer) { fmt.Fprintf(w, "held\tepoch %d and those after it\n", n) })
	})
	release := act("release EPOCH", "Release a legal hold, under approval", cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
		n, err := epochOf(args)
		if err != nil {
			return err
		}
		return t.propose(ctx, c, "hold release", "", "epoch", strconv.FormatUint(uint64(n), 10), "reason", reason)
	})
	for _, c := range []*cobra.Command{hold, release} {
		c.Flags().StringVar(&reason, "reason", "", "why; it goes into the audit log")
	}
	preview := act("preview", "Say what retention has dropped and will drop, and when", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
		r, err := c.Retention(ctx)
		if err != nil {
			return err
		}
		return t.print(r, func(w io.Writer) {
			fmt.Fprintln(w, "EPOCH\tEVENTS\tFROM\tTO\tSTATE")
			for _, e := range r.Epochs {
				to, state := "", "present"
				if e.Ended != 0 {
					to, state = date(e.Ended), "is dropped after "+date(e.Due)
				}
				if e.Hold != "" {
					state = "held: " + e.Hold
				}
				if e.Dropped != 0 {
					state = "dropped on " + date(e.Dropped)
				}
				fmt.Fprintf(w, "%d\t%d\t%s\t%s\t%s\n", e.Epoch, e.Size, date(e.Begun), to, state)
			}
			fmt.Fprintf(w, "\nreceipts\tof before %s are dropped\n", date(r.ReceiptsBefore))
		})
	})
	times := map[string]*string{}
	shorten := act("shorten", "Keep something for a shorter time from now on, under approval", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
		var parameters []string
		for _, name := range []string{"audit", "receipts", "decisions", "nonces"} {
			if *times[name] != "" {
				parameters = append(parameters, name, *times[name])
			}
		}
		return t.propose(ctx, c, "retention shorten", "", parameters...)
	})
	for name, what := range map[string]string{"audit": "epochs of the audit log, after their end", "receipts": "receipts", "decisions": "what policy decided, with its inputs", "nonces": "spent nonces, after their documents have expired (from the next start on)"} {
		times[name] = shorten.Flags().String(name, "", "how long to keep "+what+", such as 36h or 90d")
	}
	shorten.Long = "To keep something longer, write so in [retention] of the configuration and start the daemon anew. What the configuration says that is\n" +
		"shorter than what is in force does nothing: it takes approval."
	return group("retention", "Look after what is kept how long", preview, hold, release, shorten)
}

func (t *tool) receipts(act maker) *cobra.Command {
	show := func(w io.Writer, found ...api.Receipt) {
		fmt.Fprintln(w, "ID\tTIME\tMETHOD\tSTATUS\tEVENT\tCOMMITMENT")
		for _, r := range found {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\n", r.ID, time.UnixMilli(r.TimeMS).UTC().Format(time.RFC3339), r.Method, r.Status, r.Event, r.Commitment)
		}
	}
	var from, to, after string
	var limit int
	list := act("list", "List receipts by time", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
		var ms [2]int64
		for i, text := range []string{from, to} {
			if text == "" {
				continue
			}
			at, err := time.Parse(time.RFC3339, text)
			if err != nil {
				if at, err = time.Parse(time.DateOnly, text); err != nil {
					return usageError{fmt.Errorf("%q is no time: write 2026-11-24 or 2026-11-24T08:00:00Z", text)}
				}
			}
			ms[i] = at.UnixMilli()
		}
		found, err := c.Receipts(ctx, ms[0], ms[1], after, limit)
		if err != nil {
			return err
		}
		return t.print(found, func(w io.Writer) { show(w, found...) })
	})
	f := list.Flags()
	f.StringVar(&from, "from", "", "the first time, like 2026-11-24 or 2026-11-24T08:00:00Z")
	f.StringVar(&to, "to", "", "the time before which the list ends")
	f.StringVar(&after, "after", "", "the id of the last receipt of the list before, with --from its time")
	f.IntVar(&limit, "limit", 100, "how many at the most, up to 1000")
	return group("receipt", "Look receipts up", list,
		act("show ID", "Show a receipt", cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
			r, err := c.Receipt(ctx, args[0])
			if err != nil {
				return err
			}
			return t.print(r, func(w io.Writer) { show(w, r) })
		}))
}

func (t *tool) ledger(act maker) *cobra.Command {
	compact := act("compact", "Give the free space of the ledger's file back; nothing is admitted meanwhile", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
		done, err := c.Compact(ctx)
		if err != nil {
			return err
		}
		return t.print(done, func(w io.Writer) {
			fmt.Fprintf(w, "size\t%s before, %s now\npause\t%v\n", bytesText(done.Before), bytesText(done.After), time.Duration(done.TookMS)*time.Millisecond)
		})
	})
	compact.Annotations = map[string]string{"long": "true"}
	compact.Long = "Copies the ledger without its free pages and puts the copy in its place. What comes meanwhile waits, and what waits for\n" +
		"longer than request_timeout is answered with unavailable: a GiB takes some 5 to 20 s. It needs room for the copy beside the\n" +
		"old file. After a crash one of the two is there, whole. Free pages are used again without it: it is for giving space back\n" +
		"to the disk after much was dropped."
	return group("ledger", "Look after the ledger's file",
		act("stats", "Say how large the ledger is and how its clock is", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
			l, err := c.Ledger(ctx)
			if err != nil {
				return err
			}
			return t.print(l, func(w io.Writer) {
				fmt.Fprintf(w, "file\t%s, of which %s is free to be used again\n", bytesText(l.FileSize), bytesText(l.FreeBytes))
				fmt.Fprintf(w, "events\t%d to %d, in %d epochs\n", l.FirstEvent, l.Events-1, l.Epochs)
				fmt.Fprintf(w, "nonces\t%d alive, at most %d\n", l.Nonces, l.MaxNonces)
				fmt.Fprintf(w, "time\t%s, %d s behind the system's clock\n", date(l.Time), l.BehindClock)
				fmt.Fprintf(w, "disk\t%s\n", either(l.Trouble == "", "ok", l.Trouble))
			})
		}),
		compact,
		act("accept-time", "Bring the ledger's time forward to the system's clock, under approval, when you have seen that the clock is right", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
			return t.propose(ctx, c, "clock accept", "")
		}),
	)
}

func bytesText(n int64) string {
	const k = 1024
	switch {
	case n < 10*k:
		return fmt.Sprintf("%d bytes", n)
	case n < 10*k*k:
		return fmt.Sprintf("%d KiB", n/k)
	}
	return fmt.Sprintf("%d MiB", n/k/k)
}
