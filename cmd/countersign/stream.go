package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"countersign/admin/api"

	"github.com/spf13/cobra"
)

// Pauses before a stream that has ended is asked for again.
const (
	minAgain = time.Second
	maxAgain = 30 * time.Second
)

// stream prints the stream of an appliance until Ctrl-C.
func (t *tool) stream(act maker) *cobra.Command {
	var topics []string
	var after uint64
	var lasts time.Duration
	var c *cobra.Command
	c = act("stream", "Follow state, figures and events as they happen", cobra.NoArgs,
		func(_ context.Context, client *api.Client, _ []string) error {
			ctx := c.Context() // the call's context has a timeout
			if c.Flags().Changed("for") {
				if lasts <= 0 {
					return usageError{fmt.Errorf("--for %v: write 1s or longer", lasts)}
				}
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, lasts)
				defer cancel()
			}
			from := ""
			if c.Flags().Changed("after") {
				from = strconv.FormatUint(after, 10)
			}
			return t.followStream(ctx, client, topics, from)
		})
	details(c, "Prints a line for each change of the state, and for each event of the audit log but those of peers'\n"+
		"requests: alerts, rotations, acknowledgements, proposals, and all other changes. The topic tick has\n"+
		"the main figures each second. With --json, each line is a document with id, topic and data.\n\n"+
		"After a lost connection or a restart of the appliance, the stream goes on with the next event.")
	c.Example = "  countersign admin stream\n" +
		"  countersign admin stream --topics alert,state --json\n" +
		"  countersign admin stream --topics tick --for 10s"
	c.Annotations = map[string]string{"long": "true"}
	f := c.Flags()
	f.StringSliceVar(&topics, "topics", nil,
		"only these `topics`: "+strings.Join(api.Topics, ", ")+" (default: all, without --json not tick)")
	f.Uint64Var(&after, "after", 0, "begin behind the event of this `index` (default: now)")
	f.DurationVar(&lasts, "for", 0, "end after this `time` (default: at Ctrl-C)")
	return c
}

// followStream prints the stream, and asks for it again behind the last event when it ends.
func (t *tool) followStream(ctx context.Context, c *api.Client, topics []string, after string) error {
	pause, began := minAgain, false
	for {
		again := time.Duration(0)
		last, err := c.Stream(ctx, topics, after, func(e api.Streamed) error {
			pause, began = minAgain, true
			if e.Topic == api.TopicTick && len(topics) == 0 && !t.json {
				return nil // a person does not want a line each second
			}
			return t.printStreamed(e)
		})
		after = last
		if ctx.Err() != nil {
			return nil // Ctrl-C, or the time is over
		}
		if refusal, refused := errors.AsType[*api.Error](err); refused {
			if refusal.Code != "rate_limited" && refusal.Code != "unavailable" {
				return err
			}
			again = time.Duration(refusal.RetryAfter) * time.Second
		} else if errors.As(err, new(unprinted)) || err != nil && !began {
			return err
		}
		again = max(again, pause)
		pause = min(2*pause, maxAgain)
		why := "the appliance has ended it"
		if err != nil {
			why = message(err)
		}
		fmt.Fprintf(t.stderr, "countersign: the stream has ended, and goes on in %v: %s\n", again, why)
		timer := time.NewTimer(again)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
	}
}

// unprinted is an error of stdout.
type unprinted struct{ error }

func (t *tool) printStreamed(e api.Streamed) error {
	if t.json {
		if err := json.NewEncoder(t.stdout).Encode(e); err != nil {
			return unprinted{err}
		}
		return nil
	}
	line, err := streamedLine(e)
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintf(visible{t.stdout}, "%-15s  %s\n", e.Topic, line); err != nil {
		return unprinted{err}
	}
	return nil
}

// streamedLine is an event of the stream for a person.
func streamedLine(e api.Streamed) (string, error) {
	var err error
	read := func(doc any) { err = json.Unmarshal(e.Data, doc) }
	switch e.Topic {
	case api.TopicState:
		var h api.Health
		read(&h)
		line := h.State
		for _, c := range h.Causes {
			line += "; " + c.Code + either(c.Subject != "", " "+c.Subject, "") + ": " + c.Text
		}
		return line, err
	case api.TopicTick:
		var tick api.Tick
		read(&tick)
		var line strings.Builder
		line.WriteString(time.UnixMilli(tick.TimeMS).UTC().Format("15:04:05"))
		for _, name := range slices.Sorted(maps.Keys(tick.Figures)) {
			if v := tick.Figures[name]; v != nil {
				fmt.Fprintf(&line, "  %s %s", name, strconv.FormatFloat(float64(*v), 'g', 4, 32))
			}
		}
		return line.String(), err
	case api.TopicGap:
		var gap api.StreamGap
		read(&gap)
		return fmt.Sprintf("the events from %d to %d are not in the log (%s)", gap.From, gap.Before-1, gap.Why), err
	case api.TopicEnd:
		var end api.StreamEnd
		read(&end)
		return end.Code, err
	}
	var event api.Event
	read(&event)
	return fmt.Sprintf("%d  %s  %s  %s %s  %s  %s  %s", event.Index, eventTime(event), event.Type,
		event.Actor.Kind, event.Actor.Name, event.Action, event.Resource, event.Outcome), err
}
