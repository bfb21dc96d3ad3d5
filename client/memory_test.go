package client_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"countersign/audit"
	"countersign/client"
)

// restart stops the appliance, lets change replace the ledger, and starts the appliance again.
func (a *testAppliance) restart(t *testing.T, change func(ledger string)) {
	t.Helper()
	if err := errors.Join(a.stop(), a.ledger.Close()); err != nil {
		t.Fatal(err)
	}
	change(filepath.Join(a.dir, "ledger.db"))
	if err := errors.Join(a.open(), a.serve()); err != nil {
		t.Fatal(err)
	}
}

// remembering returns a configuration that demands proofs and remembers the log in a file.
func (a *testAppliance) remembering(file string) client.Config {
	c := a.config()
	c.LogKey, c.LogCheckpoint, c.RetryFor = a.logKey(), file, 20*time.Second
	return c
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestForkedLog sets the log back, and lets the appliance sign another document under a nonce that
// it has spent. Such a log proves both documents. A client that has seen the first one refuses the
// second, whether it is still running or remembers by its file, and wherever the new log ends:
// before the checkpoint that was seen, behind it, or in another epoch.
func TestForkedLog(t *testing.T) {
	for name, c := range map[string]struct {
		seen  int  // documents between the copy of the ledger and the one that is forged
		epoch bool // the log ends an epoch after the copy
		after int  // documents after the restoration, before the forged one
		again bool // the restored log ends an epoch as well
	}{
		"a shorter log":                      {seen: 5},
		"a longer log":                       {after: 9},
		"an earlier epoch":                   {epoch: true},
		"the same epoch, with another begin": {epoch: true, after: 2, again: true},
		"a later epoch":                      {after: 2, again: true},
	} {
		t.Run(name, func(t *testing.T) {
			a := start(t)
			file := filepath.Join(t.TempDir(), "log.checkpoint")
			seen := dial(t, a.remembering(file))
			sign := func(c *client.Client, d client.Document) error {
				_, err := c.Sign(t.Context(), "payments", d)
				return err
			}
			must := func(err error) {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
			}
			many := func(c *client.Client, n int) {
				for i := range n {
					must(sign(c, message(fmt.Sprintf("AA%02d", i))))
				}
			}
			nonce := func(text string) client.Document {
				d := message(text)
				d.Nonce = [32]byte{7}
				return d
			}
			must(sign(seen, message("AAAA")))
			copied := filepath.Join(t.TempDir(), "ledger.db")
			a.restart(t, func(ledger string) { copyFile(t, ledger, copied) })
			many(seen, c.seen)
			if c.epoch {
				_, err := a.app.EndEpoch(t.Context(), operator)
				must(err)
			}
			must(sign(seen, nonce("BBBB")))

			a.restart(t, func(ledger string) { copyFile(t, copied, ledger) })
			trusting := dial(t, a.config())
			many(trusting, c.after)
			if c.again {
				_, err := a.app.EndEpoch(t.Context(), operator)
				must(err)
			}
			forged := nonce("CCCC").Fill(time.Hour)
			must(sign(trusting, forged)) // the second document under the nonce has a signature
			for what, c := range map[string]*client.Client{
				"running": seen, "started again": dial(t, a.remembering(file)),
			} {
				if err := sign(c, forged); !errors.Is(err, client.ErrForkedLog) || !errors.Is(err, client.ErrUnproven) {
					t.Errorf("%s: %v", what, err)
				}
			}
			must(sign(dial(t, a.remembering("")), forged)) // a new client has seen nothing
		})
	}
}

// TestContinuedLog goes through what a log that only grows does: many callers at once, ends of
// epochs, an old event again, restarts of both sides.
func TestContinuedLog(t *testing.T) {
	a := start(t)
	file := filepath.Join(t.TempDir(), "log.checkpoint")
	config := a.remembering(file)
	c := dial(t, config)
	first := message("AAAA").Fill(time.Hour)
	sign := func(c *client.Client, d client.Document) {
		t.Helper()
		if _, err := c.Sign(t.Context(), "payments", d); err != nil {
			t.Error(err)
		}
	}
	sign(c, first)
	for range 3 {
		var wg sync.WaitGroup
		for i := range 32 {
			wg.Go(func() { sign(c, message(fmt.Sprintf("AA%02d", i))) })
		}
		wg.Wait()
		for range 2 { // the second epoch has no event of this peer
			if _, err := a.app.EndEpoch(t.Context(), operator); err != nil {
				t.Fatal(err)
			}
		}
		sign(c, first) // an event of the first epoch
		a.restart(t, func(string) {})
		c = dial(t, config)
		sign(c, first)
		sign(c, message("BBBB"))
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	log, err := audit.ParseVerifierKey(config.LogKey)
	if err != nil {
		t.Fatal(err)
	}
	if at, err := log.Open(text); err != nil || at.Epoch != 6 {
		t.Errorf("the file has %+v, %v", at, err)
	}
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := client.New(config); err == nil {
		t.Error("a file that has no checkpoint was taken")
	}
	config.LogCheckpoint = filepath.Join(t.TempDir(), "no", "folder")
	if _, err := dial(t, config).Sign(t.Context(), "payments", message("CCCC")); !errors.Is(err, client.ErrUnproven) {
		t.Errorf("a signature by a checkpoint that nobody remembers: %v", err)
	}
	config.LogKey = ""
	if _, err := client.New(config); err == nil {
		t.Error("a file without the log's key was taken")
	}
}
