package main

import (
	"cmp"
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"countersign/admin/api"
	"countersign/internal/cli"

	"github.com/spf13/cobra"
)

// history shows the series of the history as sparklines, JSON or CSV.
func (t *tool) history(act maker) *cobra.Command {
	var since, until, step string
	var list, asCSV bool
	c := act("history [SERIES...]", "Show the figures of the last hours, days or months", cobra.ArbitraryArgs,
		func(ctx context.Context, c *api.Client, args []string) error {
			if list {
				return t.seriesList(ctx, c)
			}
			if asCSV && t.json {
				return usageError{errors.New("--csv and --json exclude each other")}
			}
			q := api.HistoryQuery{Series: args}
			if step != "" {
				d, err := cli.ParseDuration(step)
				if err != nil || d != 10*time.Second && d != time.Minute && d != 15*time.Minute {
					return usageError{fmt.Errorf("--step: %q is none of 10s, 1m and 15m", step)}
				}
				q.Step = int64(d / time.Second)
			}
			from, to, err := times(ctx, c, "since", cmp.Or(since, "2h"), "until", until)
			if err != nil {
				return err
			}
			q.Since, q.Until = from/1000, to/1000
			h, err := c.History(ctx, q)
			if err != nil {
				return err
			}
			if h.Failing != "" {
				fmt.Fprintf(t.stderr, "countersign: the history is not written at present: %s\n", h.Failing)
			}
			if asCSV {
				return writeCSV(t.stdout, h)
			}
			return t.print(h, func(w io.Writer) { showHistory(w, h) })
		})
	details(c, "Without a series, the main ones are shown; --list names all of them. Rates are for each second. The\n"+
		"appliance keeps steps of 10 seconds for 2 hours, of a minute for 2 days, and of 15 minutes for 90\n"+
		"days. A line goes from zero to the largest value; a dot is a time that is not known.")
	c.Example = "  countersign admin history\n" +
		"  countersign admin history signatures sign_p99 --since 1d\n" +
		"  countersign admin history --since 90d --csv >history.csv"
	f := c.Flags()
	f.StringVar(&since, "since", "", "since a `time`, for example 30m, 7d or 2026-11-24 (default: 2h)")
	f.StringVar(&until, "until", "", "before a `time` (default: now)")
	f.StringVar(&step, "step", "", "the length of a `step`: 10s, 1m or 15m (default: the shortest that reaches back)")
	f.BoolVar(&list, "list", false, "list the series")
	f.BoolVar(&asCSV, "csv", false, "print CSV: time, measured seconds, and the series; an unknown value is empty")
	return c
}

func (t *tool) seriesList(ctx context.Context, c *api.Client) error {
	all, err := c.HistorySeries(ctx)
	if err != nil {
		return err
	}
	return t.print(all, func(w io.Writer) {
		fmt.Fprintln(w, "SERIES\tUNIT\tLONGER STEPS\tMEANING")
		for _, s := range all {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", s.Name, s.Unit, s.Fold, s.Help)
		}
	})
}

// writeCSV writes a line for each step, in the form of RFC 4180.
func writeCSV(to io.Writer, h api.History) error {
	w := csv.NewWriter(to)
	row := []string{"time", "measured"}
	for _, s := range h.Series {
		row = append(row, s.Name)
	}
	w.Write(row)
	for i := range h.Measured {
		row = append(row[:0], date(h.Since+int64(i)*h.Step), strconv.FormatInt(h.Measured[i], 10))
		for _, s := range h.Series {
			row = append(row, figure(s.Values[i]))
		}
		w.Write(row)
	}
	w.Flush()
	return w.Error()
}

// figure is a value as text; "" is unknown.
func figure(v *float32) string {
	if v == nil {
		return ""
	}
	return strconv.FormatFloat(float64(*v), 'f', -1, 32)
}

// sparkWidth is the number of characters of a sparkline.
const sparkWidth = 60

func showHistory(w io.Writer, h api.History) {
	fmt.Fprintf(w, "SERIES\tLAST\tLEAST\tMOST\t%s to %s, steps of %s\n", date(h.Since), date(h.Until),
		cli.FormatDuration(time.Duration(h.Step)*time.Second))
	for _, s := range h.Series {
		var last, least, most *float32
		for _, v := range s.Values {
			if v == nil {
				continue
			}
			if last = v; least == nil || *v < *least {
				least = v
			}
			if most == nil || *v > *most {
				most = v
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", s.Name, short(last, s.Unit), short(least, s.Unit), short(most, s.Unit),
			sparkline(s.Values))
	}
}

// short is a value for a person, with 3 digits; "-" is unknown.
func short(v *float32, unit string) string {
	if v == nil {
		return "-"
	}
	x := float64(*v)
	switch unit {
	case "1/s":
		return strconv.FormatFloat(x, 'g', 3, 64) + "/s"
	case "s":
		if x > -1 && x < 1 {
			return strconv.FormatFloat(1000*x, 'g', 3, 64) + "ms"
		}
		return strconv.FormatFloat(x, 'f', 1, 64) + "s"
	case "bytes":
		for _, u := range []string{"B", "KiB", "MiB", "GiB"} {
			if x < 1024 {
				return strconv.FormatFloat(x, 'f', 1, 64) + u
			}
			x /= 1024
		}
		return strconv.FormatFloat(x, 'f', 1, 64) + "TiB"
	}
	return strconv.FormatFloat(x, 'f', -1, 32)
}

// sparkline draws values from zero to the largest one. A character stands for the largest value of
// its steps, so that no peak is lost; a dot stands for steps without a value.
func sparkline(values []*float32) string {
	bars := []rune("▁▂▃▄▅▆▇█")
	n := min(sparkWidth, len(values))
	highest := float32(0)
	for _, v := range values {
		if v != nil {
			highest = max(highest, *v)
		}
	}
	var line strings.Builder
	for i := range n {
		var top *float32
		for _, v := range values[i*len(values)/n : (i+1)*len(values)/n] {
			if v != nil && (top == nil || *v > *top) {
				top = v
			}
		}
		switch {
		case top == nil:
			line.WriteRune('·')
		case highest <= 0 || *top <= 0:
			line.WriteRune(bars[0])
		default:
			line.WriteRune(bars[min(int(*top/highest*float32(len(bars))), len(bars)-1)])
		}
	}
	return line.String()
}
