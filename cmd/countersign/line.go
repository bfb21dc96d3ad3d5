package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"countersign/client"
	"countersign/transcript"

	"github.com/spf13/cobra"
)

func (t *tool) line() *cobra.Command {
	var s server
	pin := command("pin KEY", "Print the active version of a key, to be trusted from now on", cobra.ExactArgs(1), func(cmd *cobra.Command, args []string) error {
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
			return &client.Error{Code: "unknown_key", Message: fmt.Sprintf("there is no active signing key %q", args[0])}
		})
	})
	pin.Long = "Prints the active version of a key as JSON, for a file: countersign line pin KEY >FILE. From then on the versions after it\n" +
		"can be followed without trusting anybody. This first one is trusted on first use: it is what the appliance says now, over a\n" +
		"connection that only the holder of --server-key can have. Compare the public key with what its operator says."
	s.flags(pin)
	return group("line", "Follow a key from version to version", pin, t.follow())
}

func (t *tool) follow() *cobra.Command {
	var s server
	var write bool
	c := command("follow FILE", "Check the steps from a pinned version to the newest one", cobra.ExactArgs(1), func(cmd *cobra.Command, args []string) error {
		at, err := readLine(args[0])
		if err != nil {
			return err
		}
		return s.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
			steps, err := c.Line(ctx, at.Key, at.Version)
			if err != nil {
				return err
			}
			lines := []client.KeyLine{at}
			for _, step := range steps {
				if at, err = at.Follow(step); err != nil {
					return err
				}
				lines = append(lines, at)
			}
			if write && len(steps) > 0 {
				if err := writeLine(args[0], at); err != nil {
					return err
				}
			}
			type version struct {
				Version   uint32 `json:"version"`
				PublicKey string `json:"public_key"`
			}
			taken := []version{}
			for _, l := range lines[1:] {
				taken = append(taken, version{l.Version, hex.EncodeToString(l.PublicKey[:])})
			}
			newest, err := at.Encode()
			if err != nil {
				return err
			}
			return t.print(map[string]any{"key": at.Key, "from": lines[0].Version, "steps": taken, "line": json.RawMessage(newest), "written": write && len(steps) > 0}, func(w io.Writer) {
				for _, l := range lines[1:] {
					fmt.Fprintf(w, "step\tto version %d\t%x\n", l.Version, l.PublicKey)
				}
				fmt.Fprintf(w, "newest\tversion %d of %s\t%x\n", at.Version, at.Key, at.PublicKey)
			})
		})
	})
	c.Long = "Asks the appliance for the steps that lead on from the version in FILE (countersign line pin), and checks each one: it is\n" +
		"signed by the version before, and leads to the key that this one has committed to. The newest version may be announced and\n" +
		"not active yet. If one step is wrong nothing is written, and the code is broken_line."
	s.flags(c)
	c.Flags().BoolVar(&write, "write", false, "replace FILE by the newest version")
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

// writeLine replaces a file in one step: after a crash there is the old or the new one.
func writeLine(path string, l client.KeyLine) error {
	doc, err := l.Encode()
	if err != nil {
		return err
	}
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // after the renaming there is none
	_, err = fmt.Fprintf(f, "%s\n", doc)
	if err = errors.Join(err, f.Chmod(st.Mode().Perm()), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

func (t *tool) watch() *cobra.Command {
	var s server
	var files []string
	var until int
	c := command("watch", "Stay connected, and print and acknowledge rotations", cobra.NoArgs, func(cmd *cobra.Command, _ []string) error {
		if until < 0 {
			return usageError{errors.New("--until-rotations must not be negative")}
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
		var out sync.Mutex // of stdout and stderr: rotations are told on a goroutine of the client
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
			} else if err != nil { // it comes again
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
		for wait := time.Second; ; {
			began := time.Now()
			err := c.Stay(ctx)
			if ctx.Err() != nil {
				return nil
			}
			if time.Since(began) > time.Minute {
				wait = time.Second
			}
			out.Lock()
			fmt.Fprintf(t.stderr, "countersign: %s; trying again in %v\n", message(err), wait)
			out.Unlock()
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(wait):
			}
			wait = min(2*wait, 30*time.Second)
		}
	})
	c.Long = "Stays connected until it is told to end, or until so many rotations have come. Each rotation is printed on a line, with\n" +
		"--json as a JSON object on a line, and acknowledged. The line of a key with a --line FILE is followed; a rotation that does not\n" +
		"follow from the pinned version is printed as an error and not acknowledged. The files are not changed: countersign line follow\n" +
		"FILE --write does that. When the listener's own key is replaced, the new one to configure is printed on stderr too."
	s.flags(c)
	c.Flags().StringArrayVar(&files, "line", nil, "the file of a pinned line (countersign line pin); may be given several times")
	c.Flags().IntVar(&until, "until-rotations", 0, "end after so many rotations (default: never)")
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
		d := doc{r.Key, r.Event.Version, hex.EncodeToString(r.Event.PublicKey[:]), r.Event.ActivatesAt, r.Event.RetiresAt, r.Compromised, ""}
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
	_, err := fmt.Fprintf(t.stdout, "%q version %d from %s on, public key %x; %s\n", r.Key, r.Event.Version, at(r.ActivatesAt), r.New.PublicKey, end)
	return err
}
