package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
	"time"

	"countersign/client"
	"countersign/transcript"

	"github.com/spf13/cobra"
)

func (t *tool) line() *cobra.Command {
	return group("line", "Pin a version of a key, and follow the key to later versions", t.pin(), t.follow())
}

func (t *tool) pin() *cobra.Command {
	var s server
	do := func(cmd *cobra.Command, args []string) error {
		return s.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
			k, err := c.Key(ctx, args[0])
			if err != nil {
				return err
			}
			doc, err := client.LineOf(k).Encode()
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(t.stdout, "%s\n", doc)
			return err
		})
	}
	c := command("pin KEY", "Print the active version of a key as JSON, for a file to trust from now on",
		cobra.ExactArgs(1), do)
	details(c, "Later versions follow from the pinned one by signed steps, without trust in the appliance. The\n"+
		"pinned version itself is trusted on first use: the appliance names the version, over a\n"+
		"connection to the holder of --server-key. Compare its public key with the one that the operator\n"+
		"names.")
	c.Example = "  countersign line pin payments >payments.line"
	s.flags(c)
	return c
}

func (t *tool) follow() *cobra.Command {
	var s server
	var write bool
	do := func(cmd *cobra.Command, args []string) error {
		at, err := readLine(args[0])
		if err != nil {
			return err
		}
		return s.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
			shown, err := c.Line(ctx, at.Key, at.Version)
			if err != nil {
				return err
			}
			followed, step := []client.KeyLine{}, at
			for _, s := range shown.Steps {
				if step, err = step.Follow(s); err != nil {
					return err
				}
				followed = append(followed, step)
			}
			before := at
			if at, err = before.Advance(shown); err != nil {
				return err
			}
			written := write && at != before
			if written {
				if err := client.WriteKeyLine(args[0], at); err != nil {
					return err
				}
			}
			for _, v := range shown.Compromised {
				if !write {
					break // the file may still have the version
				}
				if err := c.AcknowledgeCompromise(ctx, at.Key, v); err != nil {
					return fmt.Errorf("the compromise of version %d is not acknowledged: %w", v, err)
				}
			}
			return t.printFollowed(before, at, followed, shown.Compromised, written)
		})
	}
	c := command("follow FILE", "Check the signed steps from a pinned version to the newest one",
		cobra.ExactArgs(1), do)
	details(c, "FILE is from countersign line pin.\n\n"+
		"A valid step has the signature of the version before, and leads to the key that this version has\n"+
		"committed to. After the loss of a device, a step leads to the recovery successor that the line\n"+
		"has committed to, with the signature of that key. The file gets the active version and, where\n"+
		"there is one, the announced version: signatures of both are good. With an invalid step, the file\n"+
		"stays as it is, and the error code is broken_line.\n\n"+
		"Compromised versions of the key are named: believe none of their signatures, also of earlier\n"+
		"documents. With --write, the appliance is told that you know.")
	c.Example = "  countersign line follow payments.line --write"
	s.flags(c)
	c.Flags().BoolVar(&write, "write", false, "replace the version in FILE by the active one")
	return c
}

// printFollowed prints the steps of a line from the version before to the line at.
func (t *tool) printFollowed(
	before, at client.KeyLine, steps []client.KeyLine, compromised []uint32, written bool,
) error {
	type version struct {
		Version   uint32 `json:"version"`
		PublicKey string `json:"public_key"`
	}
	taken := []version{}
	for _, l := range steps {
		taken = append(taken, version{l.Version, hex.EncodeToString(l.PublicKey[:])})
	}
	line, err := at.Encode()
	if err != nil {
		return err
	}
	out := map[string]any{
		"key": at.Key, "from": before.Version, "steps": taken, "line": json.RawMessage(line), "written": written,
		"compromised": append([]uint32{}, compromised...),
	}
	return t.print(out, func(w io.Writer) {
		for _, v := range compromised {
			fmt.Fprintf(w, "COMPROMISED\tversion %d of %s\tbelieve none of its signatures\n", v, at.Key)
		}
		for _, l := range steps {
			fmt.Fprintf(w, "step\tto version %d\t%x\n", l.Version, l.PublicKey)
		}
		fmt.Fprintf(w, "line\tversion %d of %s\t%x\n", at.Version, at.Key, at.PublicKey)
		if next := at.Newest(); next.Version != at.Version {
			fmt.Fprintf(w, "announced\tversion %d of %s\t%x\n", next.Version, next.Key, next.PublicKey)
		}
	})
}

func readLine(path string) (client.KeyLine, error) {
	l, err := client.ReadKeyLine(path)
	if err != nil && !errors.As(err, new(*fs.PathError)) {
		err = fmt.Errorf("%w: %w", transcript.ErrMalformed, err)
	}
	return l, err
}

func (t *tool) watch() *cobra.Command {
	var s server
	var files []string
	var until int
	do := func(cmd *cobra.Command, _ []string) error {
		if until < 0 {
			return usageError{fmt.Errorf("--until-rotations %d is negative: write 1 or higher, or 0 for no end", until)}
		}
		for _, file := range files {
			l, err := readLine(file)
			if err != nil {
				return err
			}
			s.lines = append(s.lines, l)
		}
		config, err := s.config()
		if err != nil {
			return err
		}
		ctx, stop := context.WithCancel(cmd.Context())
		defer stop()
		var out sync.Mutex // of stdout and stderr: the client calls OnRotation on a goroutine of its own
		defer out.Lock()   // nothing is printed after the return
		var c *client.Client
		seen := 0
		config.RetryFor, config.Unacknowledged = time.Minute, true
		config.OnRotation = func(r client.Rotation) {
			out.Lock()
			defer out.Unlock()
			if ctx.Err() != nil {
				return
			}
			if err := t.printRotation(r); err != nil {
				fmt.Fprintf(t.stderr, "countersign: %v\n", err)
				return
			}
			if r.Err != nil {
				return
			}
			if err := c.Acknowledge(ctx, r.Event); ctx.Err() != nil {
				return
			} else if err != nil { // the appliance sends the event again
				fmt.Fprintf(t.stderr, "countersign: not acknowledged: %s\n", message(err))
				return
			}
			if seen++; seen == until {
				stop()
			}
		}
		config.OnCompromise = func(_ context.Context, v client.Compromise) {
			out.Lock()
			defer out.Unlock()
			if ctx.Err() != nil {
				return
			}
			err := t.printCompromise(v)
			if err == nil {
				err = c.AcknowledgeCompromise(ctx, v.Key, v.Version)
			}
			if err != nil && ctx.Err() == nil { // the appliance sends the event again
				fmt.Fprintf(t.stderr, "countersign: not acknowledged: %s\n", message(err))
			}
		}
		if c, err = client.New(config); err != nil {
			return usageError{err}
		}
		defer c.Close()
		first, cancel := context.WithTimeout(ctx, s.timeout)
		_, err = c.Ping(first)
		cancel()
		if err != nil && ctx.Err() == nil {
			return err
		}
		for backoff := time.Second; ; {
			began := time.Now()
			err := c.Stay(ctx)
			if ctx.Err() != nil {
				return nil
			}
			if time.Since(began) > time.Minute {
				backoff = time.Second
			}
			out.Lock()
			fmt.Fprintf(t.stderr, "countersign: %s; trying again in %v\n", message(err), backoff)
			out.Unlock()
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(backoff):
			}
			backoff = min(2*backoff, 30*time.Second)
		}
	}
	c := command("watch", "Stay connected, and print and acknowledge rotations and compromises", cobra.NoArgs, do)
	details(c, "Each rotation and each compromised version is one line (with --json: one JSON object on a line,\n"+
		"with the event's name). The command ends at SIGINT or SIGTERM, or after --until-rotations.\n\n"+
		"With --line, watch follows a pinned key. A rotation that does not follow from the pinned version\n"+
		"is printed as an error and not acknowledged. The files stay as they are; countersign line follow\n"+
		"FILE --write updates a file. A new key of the listener is printed on stderr too, to be\n"+
		"configured.")
	c.Example = "  countersign watch --line payments.line --until-rotations 1"
	s.flags(c)
	c.Flags().StringArrayVar(&files, "line", nil,
		"a `file` with a pinned version, from countersign line pin; may be given several times (default: none)")
	c.Flags().IntVar(&until, "until-rotations", 0, "end after this `number` of rotations; 0: never")
	return c
}

// printCompromise prints a compromise on one line.
func (t *tool) printCompromise(v client.Compromise) error {
	if t.json {
		return json.NewEncoder(t.stdout).Encode(map[string]any{
			"event": "compromise", "key": v.Key, "version": v.Version, "public_key": hex.EncodeToString(v.PublicKey[:]),
		})
	}
	_, err := fmt.Fprintf(t.stdout, "%q version %d is COMPROMISED, public key %x: believe none of its signatures\n",
		v.Key, v.Version, v.PublicKey)
	return err
}

// printRotation prints a rotation on one line.
func (t *tool) printRotation(r client.Rotation) error {
	if r.Err == nil && r.Key == client.NoiseKey {
		warnServerKey(t.stderr, r)
	}
	if t.json {
		type doc struct {
			Event       string `json:"event"`
			Key         string `json:"key"`
			Version     uint32 `json:"version"`
			PublicKey   string `json:"public_key"`
			ActivatesAt int64  `json:"activates_at"`
			RetiresAt   int64  `json:"retires_at"`
			Cancelled   uint32 `json:"cancelled,omitempty"`
			Error       string `json:"error,omitempty"`
		}
		d := doc{
			"rotation", r.Key, r.Event.Version, hex.EncodeToString(r.Event.PublicKey[:]),
			r.Event.ActivatesAt, r.Event.RetiresAt, r.Cancelled, "",
		}
		if r.Err != nil {
			d.Error = message(r.Err)
		}
		return json.NewEncoder(t.stdout).Encode(d)
	}
	if r.Err != nil {
		_, err := fmt.Fprintf(t.stdout, "%q version %d is NOT believed: %s\n", r.Key, r.Event.Version, message(r.Err))
		return err
	}
	if r.Cancelled != 0 {
		_, err := fmt.Fprintf(t.stdout, "%q version %d is called off: version %d stays, public key %x\n",
			r.Key, r.Cancelled, r.Event.Version, r.Event.PublicKey)
		return err
	}
	_, err := fmt.Fprintf(t.stdout,
		"%q version %d from %s on, public key %x; the old one is good until %s at the most\n",
		r.Key, r.Event.Version, date(r.Event.ActivatesAt), r.New.PublicKey, date(r.Event.RetiresAt))
	return err
}
