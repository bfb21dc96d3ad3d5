package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"countersign/client"
	"countersign/internal/durable"
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
			keys, err := c.Keys(ctx)
			if err != nil {
				return err
			}
			for _, k := range keys {
				if k.Name != args[0] || k.State != "active" {
					continue
				}
				l := client.KeyLine{Key: k.Name, Version: k.Version, PublicKey: k.PublicKey}
				if k.Next != nil {
					l.Next = *k.Next
				}
				doc, err := l.Encode()
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(t.stdout, "%s\n", doc)
				return err
			}
			none := fmt.Sprintf("there is no active signing key %q: countersign keys lists them", args[0])
			return &client.Error{Code: "unknown_key", Message: none}
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
			steps, err := c.Line(ctx, at.Key, at.Version)
			if err != nil {
				return err
			}
			first, followed := at, []client.KeyLine{}
			for _, step := range steps {
				if at, err = at.Follow(step); err != nil {
					return err
				}
				followed = append(followed, at)
			}
			written := write && len(steps) > 0
			if written {
				if err := writeLine(args[0], at); err != nil {
					return err
				}
			}
			type version struct {
				Version   uint32 `json:"version"`
				PublicKey string `json:"public_key"`
			}
			taken := []version{}
			for _, l := range followed {
				taken = append(taken, version{l.Version, hex.EncodeToString(l.PublicKey[:])})
			}
			newest, err := at.Encode()
			if err != nil {
				return err
			}
			out := map[string]any{
				"key": at.Key, "from": first.Version, "steps": taken, "line": json.RawMessage(newest),
				"written": written,
			}
			return t.print(out, func(w io.Writer) {
				for _, l := range followed {
					fmt.Fprintf(w, "step\tto version %d\t%x\n", l.Version, l.PublicKey)
				}
				fmt.Fprintf(w, "newest\tversion %d of %s\t%x\n", at.Version, at.Key, at.PublicKey)
			})
		})
	}
	c := command("follow FILE", "Check the signed steps from a pinned version to the newest one",
		cobra.ExactArgs(1), do)
	details(c, "FILE is from countersign line pin.\n\n"+
		"A valid step has the signature of the version before, and leads to the key that this version has\n"+
		"committed to. The newest version may be announced and not active yet. With an invalid step, the\n"+
		"file stays as it is, and the error code is broken_line.")
	c.Example = "  countersign line follow payments.line --write"
	s.flags(c)
	c.Flags().BoolVar(&write, "write", false, "replace the version in FILE by the newest one")
	return c
}

func readLine(path string) (client.KeyLine, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return client.KeyLine{}, err
	}
	l, err := client.DecodeKeyLine(b)
	if err != nil {
		return l, fmt.Errorf("%w: %s: %w", transcript.ErrMalformed, path, err)
	}
	return l, nil
}

// writeLine replaces a file atomically: after a crash, the file has the old version or the new one.
func writeLine(path string, l client.KeyLine) error {
	doc, err := l.Encode()
	if err != nil {
		return err
	}
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if err := durable.Write(path, append(doc, '\n'), st.Mode().Perm()); err != nil {
		return err
	}
	return durable.Sync(filepath.Dir(path))
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
			if err := c.Acknowledge(ctx, r.Key, r.Event.Version); ctx.Err() != nil {
				return
			} else if err != nil { // the appliance sends the event again
				fmt.Fprintf(t.stderr, "countersign: not acknowledged: %s\n", message(err))
				return
			}
			if seen++; seen == until {
				stop()
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
	c := command("watch", "Stay connected, and print and acknowledge rotations", cobra.NoArgs, do)
	details(c, "Each rotation is one line (with --json: one JSON object on a line). The command ends at SIGINT\n"+
		"or SIGTERM, or after --until-rotations.\n\n"+
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

// printRotation prints a rotation on one line.
func (t *tool) printRotation(r client.Rotation) error {
	if r.Err == nil && r.Key == client.NoiseKey {
		warnServerKey(t.stderr, r)
	}
	if t.json {
		type doc struct {
			Key         string `json:"key"`
			Version     uint32 `json:"version"`
			PublicKey   string `json:"public_key"`
			ActivatesAt int64  `json:"activates_at"`
			RetiresAt   int64  `json:"retires_at"`
			Compromised bool   `json:"compromised"`
			Error       string `json:"error,omitempty"`
		}
		d := doc{
			r.Key, r.Event.Version, hex.EncodeToString(r.Event.PublicKey[:]),
			r.Event.ActivatesAt, r.Event.RetiresAt, r.Compromised, "",
		}
		if r.Err != nil {
			d.Error = message(r.Err)
		}
		return json.NewEncoder(t.stdout).Encode(d)
	}
	at := func(t time.Time) string { return t.UTC().Format(time.RFC3339) }
	if r.Err != nil {
		_, err := fmt.Fprintf(t.stdout, "%q version %d is NOT believed: %s\n", r.Key, r.Event.Version, message(r.Err))
		return err
	}
	end := "the old one is good until " + at(r.RetiresAt) + " at the most"
	if r.Compromised {
		end = "the old one is COMPROMISED"
	}
	_, err := fmt.Fprintf(t.stdout, "%q version %d from %s on, public key %x; %s\n",
		r.Key, r.Event.Version, at(r.ActivatesAt), r.New.PublicKey, end)
	return err
}
