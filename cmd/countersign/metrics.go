package main

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"

	"countersign/admin/api"

	"github.com/spf13/cobra"
)

// metric is one time series of the text format of Prometheus.
type metric struct {
	Name   string  `json:"name"`
	Labels string  `json:"labels,omitempty"` // as in the text: op="sign"
	Value  float64 `json:"value"`
}

// parseMetrics parses Prometheus' text format, without the buckets of histograms. The tool needs no
// more of the format, and no library for it.
func parseMetrics(text string) (all []metric, err error) {
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		at := strings.LastIndexByte(line, ' ')
		if at < 0 {
			return nil, fmt.Errorf("the appliance has sent metrics that are not Prometheus' text: %.80q", line)
		}
		m := metric{Name: line[:at]}
		if m.Value, err = strconv.ParseFloat(line[at+1:], 64); err != nil {
			return nil, fmt.Errorf("the appliance has sent metrics that are not Prometheus' text: %.80q", line)
		}
		if name, labels, ok := strings.Cut(m.Name, "{"); ok {
			m.Name, m.Labels = name, strings.TrimSuffix(labels, "}")
		}
		if !strings.HasSuffix(m.Name, "_bucket") {
			all = append(all, m)
		}
	}
	return all, nil
}

func (t *tool) metrics(act maker) *cobra.Command {
	var raw, zeros bool
	c := act("metrics [PREFIX]", "Print the metrics of the appliance", cobra.MaximumNArgs(1),
		func(ctx context.Context, c *api.Client, args []string) error {
			text, err := c.Metrics(ctx)
			if err != nil {
				return err
			}
			if raw {
				_, err := t.stdout.Write(text)
				return err
			}
			all, err := parseMetrics(string(text))
			if err != nil {
				return err
			}
			shown := []metric{}
			for _, m := range all {
				short := strings.TrimPrefix(m.Name, "countersign_")
				if len(args) > 0 && !strings.HasPrefix(m.Name, args[0]) && !strings.HasPrefix(short, args[0]) ||
					len(args) == 0 && short == m.Name { // of the Go runtime and the process
					continue
				}
				if zeros || t.json || m.Value != 0 {
					shown = append(shown, m)
				}
			}
			return t.print(shown, func(w io.Writer) {
				for _, m := range shown {
					fmt.Fprintf(w, "%s\t%s\t%s\n", strings.TrimPrefix(m.Name, "countersign_"), m.Labels,
						strconv.FormatFloat(m.Value, 'f', -1, 64))
				}
			})
		})
	c.Flags().BoolVar(&raw, "raw", false, "print the text format of Prometheus, as a scraper gets it")
	c.Flags().BoolVar(&zeros, "zeros", false, "print the metrics that are zero too")
	details(c, "Prints name, labels and value of each metric that is not zero, without the prefix countersign_\n"+
		"and without the buckets of histograms. PREFIX shows only the metrics whose names begin with it;\n"+
		"go_ and process_ show those of the process. docs/OPERATIONS.md has the meaning of each metric.")
	c.Example = "  countersign admin metrics requests\n  countersign admin metrics --raw >metrics.prom"
	return c
}
