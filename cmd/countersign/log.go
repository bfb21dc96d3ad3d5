package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"countersign/admin/api"
	"countersign/audit"
	"countersign/internal/cli"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// bar is a progress bar on a terminal, shown after barDelay. Without a terminal, and for a nil bar,
// nothing is shown.
type bar struct {
	to    io.Writer
	label string
	noun  string // of the things counted
	mu    sync.Mutex
	shown time.Time // the last time, at first that of the bar's making
	open  bool      // the line needs a line end
}

func (t *tool) bar(label string) *bar {
	b := &bar{label: label, noun: "events", shown: time.Now()}
	if f := terminal(t.stderr); f != nil {
		b.to = f
	}
	return b
}

func (b *bar) progress(done, all uint64) {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.to == nil || all == 0 || (done < all || !b.open) && time.Since(b.shown) < barDelay {
		return
	}
	const width = 40
	filled := int(min(done, all) * width / all)
	fmt.Fprintf(b.to, "\r%s [%-*s] %3d%% %d of %d %s", b.label, width, bars[:filled], done*100/all, done, all, b.noun)
	b.shown, b.open = time.Now(), true
}

// barDelay is the time from one picture of a bar to the next.
const barDelay = 100 * time.Millisecond

const bars = "########################################"

func (b *bar) end() {
	if b.open {
		fmt.Fprintln(b.to)
	}
}

var errNoDir = errors.New("DIR is empty: write the path of a folder, for example log")

// export writes the log's static form.
func (t *tool) export() *cobra.Command {
	do := func(cmd *cobra.Command, args []string) error {
		if args[0] == "" {
			return usageError{errNoDir}
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), longTimeout)
		defer cancel()
		c, err := t.dialAdmin()
		if err != nil {
			return err
		}
		l, err := c.Log(ctx)
		if err != nil {
			return err
		}
		log, err := t.pinLog(l.VerifierKey)
		if err != nil {
			return err
		}
		b := t.bar("exporting")
		defer b.end()
		head, err := audit.Mirror(ctx, c, log, args[0], b.progress)
		if err != nil {
			return err
		}
		vkey := log.VerifierKey(head.Epoch)
		out := map[string]any{"dir": args[0], "epoch": head.Epoch, "size": head.Size, "verifier_key": vkey}
		return t.print(out, func(w io.Writer) {
			fmt.Fprintf(w, "exported\tepoch %d with %s, and those before it, to %s\n",
				head.Epoch, cli.Count(head.Size, "event"), args[0])
			fmt.Fprintf(w, "verifier key\t%s\n", vkey)
		})
	}
	c := command("export DIR", "Write the audit log as static files (C2SP tlog-tiles)", cobra.ExactArgs(1), do)
	details(c, "Anyone can check them with countersign audit verify.\n\n"+
		"Each epoch of the log is a tree of its own in DIR/epochs/N. DIR/checkpoint and DIR/tile are\n"+
		"links to the present epoch. An earlier export in DIR is brought up to date: each file is checked,\n"+
		"and files that are as the checkpoint proves are not written again.")
	c.Example = "  countersign admin audit export log\n" +
		"  countersign audit verify log --key \"$(countersign admin audit key)\""
	return c
}

// logFlags name the log to check, and the keys and checkpoints to trust.
type logFlags struct {
	live        func() bool // a running appliance was named
	vkey, since string
}

func (l *logFlags) add(t *tool, f *pflag.FlagSet) {
	t.addressFlags(f)
	l.live = func() bool { return t.at != address{} }
	f.StringVar(&l.vkey, "key", os.Getenv("COUNTERSIGN_LOG_KEY"),
		"the log's `verifier key`, of any epoch, from countersign admin audit key (or COUNTERSIGN_LOG_KEY)")
	f.StringVar(&l.since, "since", "", "a `file` with an older checkpoint that the log must continue (default: none)")
}

// log returns the log of --key.
func (l *logFlags) log() (audit.Log, error) {
	if l.vkey == "" {
		return audit.Log{}, usageError{errors.New("--key is missing: give the verifier key that you noted when you " +
			"trusted the appliance (countersign admin audit key)")}
	}
	return audit.ParseVerifierKey(l.vkey)
}

// follower makes a function that sees the events of a log during its verification.
type follower func(log audit.Log) func() func(uint64, audit.Event) error

// check verifies the log. A follow of nil sees no events.
func (t *tool) check(ctx context.Context, l *logFlags, args []string, follow follower) (audit.Report, error) {
	return t.checkWith(ctx, l, args, func(log audit.Log, o *audit.VerifyOptions) {
		if follow != nil {
			o.Follow = follow(log)
		}
	})
}

// checkWith verifies the log with options that set makes for it.
func (t *tool) checkWith(
	ctx context.Context, l *logFlags, args []string, set func(audit.Log, *audit.VerifyOptions),
) (audit.Report, error) {
	var none audit.Report
	if (len(args) == 1) == l.live() {
		return none, usageError{errors.New("name one log: the folder of an export, or a running appliance by " +
			"--context, --socket or --url")}
	}
	log, err := l.log()
	if err != nil {
		return none, err
	}
	var from audit.Source
	if !l.live() {
		if args[0] == "" {
			return none, usageError{errNoDir}
		}
		if _, err := os.Stat(filepath.Join(args[0], "checkpoint")); err != nil {
			return none, fmt.Errorf("%s is not the folder of an export (countersign admin audit export): %w",
				args[0], err)
		}
		from = audit.Folder(args[0])
	} else if from, err = t.dialAdmin(); err != nil {
		return none, err
	}
	var o audit.VerifyOptions
	if l.since != "" {
		if o.Since, err = os.ReadFile(l.since); err != nil {
			return none, err
		}
	}
	set(log, &o)
	b := t.bar("verifying")
	defer b.end()
	o.Progress = b.progress
	return log.Verify(ctx, from, o)
}

// audit are the commands that check a log without trust in the appliance.
func (t *tool) audit() *cobra.Command {
	var of logFlags
	do := func(cmd *cobra.Command, args []string) error {
		if len(args) == 1 && isReport(args[0]) {
			return t.verifyReport(&of, args[0])
		}
		r, err := t.check(cmd.Context(), &of, args, nil)
		if err != nil {
			return err
		}
		head := r.Checkpoint
		out := struct {
			Valid bool `json:"valid"`
			audit.Report
			Epoch uint32 `json:"epoch"`
			Size  uint64 `json:"size"`
			Root  string `json:"root"`
		}{true, r, head.Epoch, head.Size, head.Root.String()}
		return t.print(out, func(w io.Writer) {
			fmt.Fprintf(w, "valid\t%s from %d on, in %s\n",
				cli.Count(r.Events, "event"), r.First, cli.Count(r.Epochs, "epoch"))
			fmt.Fprintf(w, "times\tfrom %s to %s\n", date(r.FromMS/1000), date(r.ToMS/1000))
			if r.Dropped > 0 {
				fmt.Fprintf(w, "dropped\t%s, as the log says\n", cli.Count(r.Dropped, "epoch"))
			}
			fmt.Fprintf(w, "signatures\t%d, each with its admission\n", r.Signatures)
			fmt.Fprintf(w, "unsettled\t%s without an end in the log\n", cli.Count(r.Unsettled, "admission"))
			if r.SinceDropped {
				fmt.Fprintln(w, "since\tthe older checkpoint's epoch was dropped, "+
					"so nothing shows any more that the log went on from it")
			}
			fmt.Fprintf(w, "checkpoint\tepoch %d, %s, root %s\n", head.Epoch, cli.Count(head.Size, "event"), head.Root)
		})
	}
	verify := command("verify [DIR]", "Check an audit log with its verifier key alone", cobra.MaximumNArgs(1), do)
	details(verify, "Names the first event that is wrong. Checked: each event is in the tree that the appliance has\n"+
		"signed; no epoch is missing except by retention; each event has its form; no nonce was spent\n"+
		"twice within its lifetime; each signature has its admission. With --since, the log must also\n"+
		"continue the tree of an older checkpoint. DIR is from countersign admin audit export, or from\n"+
		"countersign admin audit report: then checked are the events of the report, that none is missing\n"+
		"between the first and the last one, and that each signed payment has its receipt.")
	verify.Example = "  countersign audit verify log --key \"$(cat log.vkey)\" --since checkpoint.old\n" +
		"  countersign audit verify --socket admin.sock --key \"$(cat log.vkey)\""
	of.add(t, verify.Flags())
	return group("audit", "Check an audit log without trusting the appliance", verify, t.approvals(), t.reconcile())
}

func (t *tool) retention(act maker) *cobra.Command {
	var reason string
	epochOf := func(args []string) (uint32, error) {
		n, err := strconv.ParseUint(args[0], 10, 32)
		if err != nil {
			return 0, usageError{fmt.Errorf("%q is not the number of an epoch: "+
				"countersign admin retention preview shows them", args[0])}
		}
		return uint32(n), nil
	}
	hold := act("hold EPOCH NAME", "Keep an epoch of the audit log, and all later ones, by a legal hold with a name",
		cobra.ExactArgs(2), func(ctx context.Context, c *api.Client, args []string) error {
			n, err := epochOf(args)
			if err == nil {
				err = c.Hold(ctx, n, args[1], reason)
			}
			if err != nil {
				return err
			}
			return t.print(map[string]any{"held": n, "name": args[1]}, func(w io.Writer) {
				fmt.Fprintf(w, "held\tepoch %d and those after it, by %s\n", n, args[1])
			})
		})
	hold.Example = "  countersign admin retention hold 0 case-4711 --reason \"order of the court\""
	release := act("release EPOCH NAME", "Release a legal hold, under approval", cobra.ExactArgs(2),
		func(ctx context.Context, c *api.Client, args []string) error {
			n, err := epochOf(args)
			if err != nil {
				return err
			}
			epoch := strconv.FormatUint(uint64(n), 10)
			return t.propose(ctx, c, "hold release", "", "epoch", epoch, "name", args[1], "reason", reason)
		})
	release.Example = "  countersign admin retention release 0 case-4711 --reason \"the case is closed\""
	reasonFlag(hold, &reason)
	reasonFlag(release, &reason)
	preview := act("preview", "Show what retention has dropped and will drop, and when", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
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
					if len(e.Holds) > 0 {
						var names []string
						for _, h := range e.Holds {
							names = append(names, h.Name)
						}
						state = "held by " + strings.Join(names, ", ")
					}
					if e.Dropped != 0 {
						state = "dropped on " + date(e.Dropped)
					}
					fmt.Fprintf(w, "%d\t%d\t%s\t%s\t%s\n", e.Epoch, e.Size, date(e.Begun), to, state)
				}
				for _, e := range r.Epochs {
					for _, h := range e.Holds {
						fmt.Fprintf(w, "\nhold\t%s on epoch %d: %s", h.Name, e.Epoch, h.Reason)
					}
				}
				fmt.Fprintf(w, "\nreceipts\tof before %s are dropped\n", date(r.ReceiptsBefore))
			})
		})
	kept := []struct{ flag, what string }{
		{"audit", "epochs of the audit log, after their end"},
		{"receipts", "receipts"},
		{"decisions", "policy decisions with their inputs"},
		{"nonces", "spent nonces, after their documents have expired (from the next start on)"},
	}
	times := map[string]*string{}
	shorten := act("shorten", "Shorten a retention time, under approval", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			var parameters []string
			for _, each := range kept {
				if keep := *times[each.flag]; keep != "" {
					parameters = append(parameters, each.flag, keep)
				}
			}
			return t.propose(ctx, c, "retention shorten", "", parameters...)
		})
	for _, each := range kept {
		times[each.flag] = shorten.Flags().String(each.flag, "",
			"keep "+each.what+", for this `duration`, for example 36h or 90d (default: unchanged)")
	}
	details(shorten, "To lengthen a time, raise it in [retention] of the configuration and restart the daemon. A\n"+
		"shorter time in the configuration has no effect, because shortening needs approval.")
	shorten.Example = "  countersign admin retention shorten --decisions 14d"
	return group("retention", "Show and change how long records are kept", preview, hold, release, shorten)
}

func (t *tool) receipts(act maker) *cobra.Command {
	show := func(w io.Writer, found ...api.Receipt) {
		fmt.Fprintln(w, "ID\tTIME\tMETHOD\tSTATUS\tEVENT\tCOMMITMENT")
		for _, r := range found {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\n",
				r.ID, date(r.TimeMS/1000), r.Method, r.Status, r.Event, r.Commitment)
		}
	}
	var from, to, after string
	var limit int
	do := func(ctx context.Context, c *api.Client, _ []string) error {
		since, until, err := times(ctx, c, "from", from, "to", to)
		if err != nil {
			return err
		}
		found, next, err := c.Receipts(ctx, since, until, after, limit)
		if err == nil {
			err = t.print(found, func(w io.Writer) { show(w, found...) })
		}
		if err == nil && next != "" {
			t.more(next)
		}
		return err
	}
	list := act("list", "List receipts by time, the oldest first", cobra.NoArgs, do)
	list.Example = "  countersign admin receipt list --from 2026-11-24 --to 2026-11-25T12:00:00Z"
	f := list.Flags()
	f.StringVar(&from, "from", "",
		"begin at this `time`, for example 7d, 2026-11-24 or 2026-11-24T08:00:00Z, in UTC (default: the first receipt)")
	f.StringVar(&to, "to", "", "end before this `time` (default: the last receipt)")
	f.StringVar(&after, "after", "", "the next page: the `cursor` that the page before has shown")
	f.IntVar(&limit, "limit", 100, "list at most this `number` of receipts, 1 to 1000")
	one := act("show ID", "Show a receipt", cobra.ExactArgs(1),
		func(ctx context.Context, c *api.Client, args []string) error {
			r, err := c.Receipt(ctx, args[0])
			if err != nil {
				return err
			}
			return t.print(r, func(w io.Writer) { show(w, r) })
		})
	return group("receipt", "List and show receipts of payments", list, one)
}

func (t *tool) ledger(act maker) *cobra.Command {
	stats := act("stats", "Show the size of the ledger, and its clock", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			l, err := c.Ledger(ctx)
			if err != nil {
				return err
			}
			return t.print(l, func(w io.Writer) {
				free := bytesText(l.FreeBytes)
				fmt.Fprintf(w, "file\t%s, of which %s is free to be used again\n", bytesText(l.FileSize), free)
				fmt.Fprintf(w, "events\t%d to %d, in %s\n", l.FirstEvent, l.Events-1, cli.Count(l.Epochs, "epoch"))
				fmt.Fprintf(w, "nonces\t%d alive, at most %d\n", l.Nonces, l.MaxNonces)
				fmt.Fprintf(w, "time\t%s, %d s behind the system's clock\n", date(l.Time), l.BehindClock)
				fmt.Fprintf(w, "disk\t%s\n", either(l.Trouble == "", "ok", l.Trouble))
			})
		})
	compact := act("compact", "Compact the ledger's file, while requests wait", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			done, err := c.Compact(ctx)
			if err != nil {
				return err
			}
			return t.print(done, func(w io.Writer) {
				fmt.Fprintf(w, "size\t%s before, %s now\n", bytesText(done.Before), bytesText(done.After))
				fmt.Fprintf(w, "pause\t%v\n", time.Duration(done.TookMS)*time.Millisecond)
			})
		})
	compact.Annotations = map[string]string{"long": "true"}
	details(compact, "The ledger is copied without its free pages, and the copy replaces the file. A GiB takes 5 to\n"+
		"20 s. A request that waits for longer than request_timeout is answered with unavailable. The\n"+
		"disk needs room for both files. After a crash, one of the two is there, whole. The ledger uses\n"+
		"free pages again by itself, so compact only to give space back to the disk, for example after\n"+
		"much was dropped.")
	acceptTime := act("accept-time", "Advance the ledger's time to the system's clock, under approval", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			return t.propose(ctx, c, "clock accept", "")
		})
	details(acceptTime, "Check first that the clock is right. Nonces expire by the ledger's time, so a clock that is\n"+
		"ahead would let spent nonces be used again.")
	return group("ledger", "Show and maintain the ledger's file", stats, compact, acceptTime)
}

// bytesText is a size for people.
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
