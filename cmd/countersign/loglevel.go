package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"countersign/admin/api"

	"github.com/spf13/cobra"
)

// logLevel shows and sets the level of the daemon's log.
func (t *tool) logLevel(act maker) *cobra.Command {
	var lasts time.Duration
	level := act("level [LEVEL]", "Show the level of the daemon's log, or set it for a time", cobra.MaximumNArgs(1),
		func(ctx context.Context, c *api.Client, args []string) (err error) {
			var is api.LogLevel
			switch {
			case len(args) == 0:
				is, err = c.LogLevel(ctx)
			case lasts < time.Second:
				return usageError{fmt.Errorf("--for %v: a level lasts from 1s to 168h", lasts)}
			default:
				is, err = c.SetLogLevel(ctx, api.SetLogLevel{Level: args[0], Seconds: secondsOf(args[0], lasts)})
			}
			if err != nil {
				return err
			}
			return t.print(is, func(w io.Writer) {
				fmt.Fprintf(w, "level\t%s\n", is.Level)
				if is.Until > 0 {
					fmt.Fprintf(w, "until\t%s, then %s again\n", date(is.Until), is.Configured)
				}
			})
		})
	details(level, "LEVEL is debug, info, warn or error, and goes back to log_level of the configuration by\n"+
		"itself, or configured, which goes back at once. A restart goes back too. At debug, each served\n"+
		"request has a line.")
	level.Example = "  countersign admin log level debug --for 15m\n" +
		"  countersign admin log level configured"
	level.Flags().DurationVar(&lasts, "for", time.Hour, "the `time` until the level goes back, at most 168h")
	return group("log", "Change the daemon's log", level)
}

// secondsOf returns the time of a level, in seconds. The level of the configuration has none.
func secondsOf(level string, lasts time.Duration) int {
	if level == api.LevelConfigured {
		return 0
	}
	return int(lasts / time.Second)
}
