package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"countersign/admin/api"
	"countersign/audit"
	"countersign/internal/cli"
	"countersign/internal/durable"
	"countersign/internal/ownfile"

	"github.com/spf13/cobra"
)

// report writes the report of a period. The statement gets its name last: a folder with a statement
// has a whole report.
func (t *tool) report() *cobra.Command {
	var from, to, form string
	do := func(cmd *cobra.Command, args []string) error {
		if args[0] == "" {
			return usageError{errNoDir}
		}
		forms := audit.Forms()
		if form != "" {
			if forms = []audit.Form{audit.Form(form)}; !slices.Contains(audit.Forms(), forms[0]) {
				return usageError{fmt.Errorf("--form: %q is none of csv, jsonl", form)}
			}
		}
		if isReport(args[0]) {
			return usageError{fmt.Errorf("%s has a report: use another folder", args[0])}
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), longTimeout)
		defer cancel()
		c, err := t.dialAdmin()
		if err != nil {
			return err
		}
		since, until, err := times(ctx, c, "from", from, "to", to)
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
		text, statement, err := c.Statement(ctx, since, until)
		if err != nil {
			return err
		}
		if err := writeReport(ctx, c, args[0], text, statement, forms); err != nil {
			return err
		}
		return t.checkReport(log, args[0])
	}
	c := command("report DIR", "Write the events and receipts of a period, with the proof that none is missing",
		cobra.ExactArgs(1), do)
	details(c, "DIR gets events.csv and receipts.csv, events.jsonl and receipts.jsonl, and statement.json.\n"+
		"The statement has the period, the first and the last event, the signed checkpoints, and what\n"+
		"retention has dropped. Anyone can check the folder with countersign audit verify, with the log's\n"+
		"verifier key alone. Of the two forms, one is enough for the check.")
	c.Example = "  countersign admin audit report report-2026-11 --from 2026-11-01 --to 2026-12-01\n" +
		"  countersign audit verify report-2026-11 --key \"$(cat log.vkey)\""
	f := c.Flags()
	f.StringVar(&from, "from", "",
		"begin at this `time`, for example 7d, 2026-11-24 or 2026-11-24T08:00:00Z, in UTC (default: the first event)")
	f.StringVar(&to, "to", "", "end before this `time` (default: now)")
	f.StringVar(&form, "form", "", "write only this `form`: csv or jsonl (default: both)")
	return c
}

func isReport(dir string) bool {
	_, err := os.Lstat(filepath.Join(dir, audit.StatementFile))
	return err == nil
}

func writeReport(
	ctx context.Context, c *api.Client, dir string, text []byte, s audit.Statement, forms []audit.Form,
) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for _, form := range forms {
		err := writeRows(filepath.Join(dir, form.EventsFile()), func(w io.Writer) error {
			return c.EventRows(ctx, s, form, w)
		})
		if err == nil {
			err = writeRows(filepath.Join(dir, form.ReceiptsFile()), func(w io.Writer) error {
				return c.ReceiptRows(ctx, s, form, w)
			})
		}
		if err != nil {
			return err
		}
	}
	if err := durable.Write(filepath.Join(dir, audit.StatementFile), text, 0o600); err != nil {
		return err
	}
	return durable.Sync(dir)
}

// writeRows writes a new file. A file of a report that was cut off is replaced.
func writeRows(path string, rows func(io.Writer) error) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := ownfile.Create(path)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(f)
	err = rows(w)
	return errors.Join(err, w.Flush(), f.Sync(), f.Close())
}

// verifyReport checks a report with the flags of audit verify.
func (t *tool) verifyReport(l *logFlags, dir string) error {
	if l.live() || l.since != "" {
		return usageError{fmt.Errorf("%s has the report of a period: omit --since, --context, --socket and --url", dir)}
	}
	log, err := l.log()
	if err != nil {
		return err
	}
	return t.checkReport(log, dir)
}

func (t *tool) checkReport(log audit.Log, dir string) error {
	r, err := log.VerifyReport(os.DirFS(dir))
	if err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	out := struct {
		Valid bool   `json:"valid"`
		Dir   string `json:"dir"`
		audit.ReportChecked
		SinceMS int64  `json:"since_ms"`
		UntilMS int64  `json:"until_ms"`
		First   uint64 `json:"first"`
		End     uint64 `json:"end"`
	}{true, dir, r, r.SinceMS, r.UntilMS, r.First, r.End}
	return t.print(out, func(w io.Writer) {
		fmt.Fprintf(w, "valid\t%s from %d on, none is missing between\n", cli.Count(r.Events, "event"), r.First)
		fmt.Fprintf(w, "period\tfrom %s to before %s\n", date(r.SinceMS/1000), date(r.UntilMS/1000))
		fmt.Fprintf(w, "receipts\t%d of %s\n", r.Receipts, cli.Count(r.Payments, "signed payment"))
		if r.ReceiptsDropped > 0 {
			fmt.Fprintf(w, "\t%s dropped by retention, as the statement says\n",
				cli.Count(r.ReceiptsDropped, "receipt"))
		}
		if r.Dropped > 0 {
			fmt.Fprintf(w, "dropped\t%s\n", cli.Count(r.Dropped, "epoch"))
			if r.Before == "" {
				fmt.Fprintf(w, "\tevents of the period before event %d, if any, were among them\n", r.First)
			}
		}
		if r.After == "" {
			fmt.Fprintf(w, "end\tthe newest checkpoint: nothing later was in the log\n")
		}
		fmt.Fprintf(w, "checkpoint\tepoch %d, %s\n", r.Checkpoint.Epoch, cli.Count(r.Checkpoint.Size, "event"))
	})
}

// sinks shows where the events of the log go.
func (t *tool) sinks(act maker) *cobra.Command {
	c := act("sinks", "Show the sinks of events, with their positions and gaps", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			all, err := c.Sinks(ctx)
			if err != nil {
				return err
			}
			return t.print(all, func(w io.Writer) {
				fmt.Fprintln(w, "NAME\tKIND\tNEXT\tWAITING\tSENT\tDROPPED\tSTATE")
				for _, s := range all {
					fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%d\t%d\t%s\n", s.Name, s.Kind, s.Next, s.Behind, s.Sent, s.Dropped,
						either(s.Failing == "", "ok", oneLine(s.Failing)))
				}
				for _, s := range all {
					for _, g := range s.Gaps {
						fmt.Fprintf(w, "gap of %s\tevents %d to %d, %s\n", s.Name, g.From, g.Before-1, g.Why)
					}
				}
			})
		})
	c.Example = "  countersign admin audit sinks"
	details(c, "Events of a gap were not sent. countersign admin audit list --from NUMBER shows them until\n"+
		"retention drops them.")
	return c
}
