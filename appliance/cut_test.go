package appliance

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/ledger/disktest"
)

// cuttable are the acts that change keys, each on a rig where it can be done, and the line that it is about.
var cuttable = map[string]struct {
	line  string
	ready func(*testing.T, *rig)
	act   func(*testing.T, *rig) error
	// what the line can be afterwards, before it is kept; and once it was
	may, ends []string
}{
	"create": {line: "other", act: func(t *testing.T, r *rig) error {
		_, err := r.CreateKey(t.Context(), operator, NewKey{Name: "other"})
		return err
	}, may: []string{"", "active pending"}, ends: []string{"", "active pending"}},
	"rotate": {line: "payments", act: func(t *testing.T, r *rig) error {
		_, err := r.Rotate(t.Context(), operator, "payments", time.Now())
		return err
	}, may: []string{"active pending", "active pending pending", "verify-only active pending"}, ends: []string{"active pending", "verify-only active pending"}},
	"compromise": {line: "payments", act: func(t *testing.T, r *rig) error {
		return r.Compromise(t.Context(), approved, "payments", 1, "stolen")
	}, may: []string{"active pending", "compromised pending", "compromised pending pending", "compromised active pending"},
		ends: []string{"active pending", "compromised active pending"}},
	"compromise the announced": {line: "payments", ready: func(t *testing.T, r *rig) { r.rotate(t, "payments", time.Now().Add(time.Hour)) }, act: func(t *testing.T, r *rig) error {
		return r.Compromise(t.Context(), approved, "payments", 1, "stolen")
	}, may: []string{"active pending pending", "compromised pending pending", "compromised active pending"},
		ends: []string{"active pending pending", "compromised active pending"}},
	"destroy": {line: "payments", ready: func(t *testing.T, r *rig) {
		r.rotate(t, "payments", time.Now())
		if err := r.Archive(t.Context(), operator, "payments", 1); err != nil {
			t.Fatal(err)
		}
	}, act: func(t *testing.T, r *rig) error { return r.Destroy(t.Context(), approved, "payments", 1) },
		may: []string{"archived active pending", "destroyed active pending"}, ends: []string{"archived active pending", "destroyed active pending"}},
	"rotate the Noise key": {line: NoiseName, ready: func(t *testing.T, r *rig) {
		if _, err := r.CreateOwnKey(t.Context(), operator, NoiseName, "memory"); err != nil {
			t.Fatal(err)
		}
	}, act: func(t *testing.T, r *rig) error {
		r.identity = "payments"
		_, err := r.Rotate(t.Context(), operator, NoiseName, time.Now())
		return err
	}, may: []string{"active", "active pending", "verify-only active"}, ends: []string{"active", "verify-only active"}},
	"compromise the Noise key": {line: NoiseName, ready: func(t *testing.T, r *rig) {
		if _, err := r.CreateOwnKey(t.Context(), operator, NoiseName, "memory"); err != nil {
			t.Fatal(err)
		}
	}, act: func(t *testing.T, r *rig) error {
		return r.Compromise(t.Context(), approved, NoiseName, 1, "stolen")
	}, may: []string{"active", "compromised", "compromised pending", "compromised active"}, ends: []string{"active", "compromised active"}},
}

// found lists the states of a line that may not be there.
func (r *rig) found(t *testing.T, name string) string {
	if _, err := r.Key(name); errors.Is(err, ErrNotFound) {
		return ""
	}
	return r.states(t, name)
}

// holds says what is promised of a line at any moment, and then lets the appliance go on with it.
func (r *rig) holds(t *testing.T, line string, may, ends []string) {
	t.Helper()
	contains := func(all []string, s string) bool { return strings.Contains("|"+strings.Join(all, "|")+"|", "|"+s+"|") }
	if got := r.found(t, line); !contains(may, got) {
		t.Errorf("it is %q", got)
	}
	check := func() {
		t.Helper()
		if signs(line, keystore.Ed25519) && r.found(t, line) != "" {
			r.checkLine(t, line)
		}
	}
	check()
	for range 3 {
		r.hasten()
		r.keepLine(t.Context(), line)
	}
	if got := r.found(t, line); !contains(ends, got) {
		t.Errorf("in the end it is %q", got)
	}
	check()
	if err := r.ledger.All(ledger.Keys, func(name string, value []byte) error {
		if _, k, err := decodeKey(name, value); err != nil || k.State == making {
			t.Errorf("%s is still being made, %v", name, err)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	infos, err := r.store.Keys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, info := range infos {
		if k := r.version(info.Ref.Name, info.Ref.Version); k == nil || k.State == Destroyed || string(k.Info().PublicKey) != string(info.PublicKey) {
			t.Errorf("the token has %v, and the ledger has not", info.Ref)
		}
	}
	for _, k := range r.Keys() {
		if _, err := r.store.Key(t.Context(), k.Info().Ref); err != nil && k.State != Destroyed && k.State != Archived {
			t.Errorf("the ledger has %v, and the token has not", k.Info().Ref)
		}
	}
	if line == "other" && r.found(t, line) == "" {
		if _, err := r.CreateKey(t.Context(), operator, NewKey{Name: line}); err != nil {
			t.Errorf("made again: %v", err)
		}
	}
	if k, err := r.ActiveKey(line); err != nil {
		t.Error(err)
	} else if next := r.version(line, k.Version+1); next == nil || !next.announced() {
		r.rotate(t, line, time.Now())
		check()
	}
}

// TestPowerCutInTheDevice cuts the power at each use of the device of each act, or has the device fail there.
func TestPowerCutInTheDevice(t *testing.T) {
	for name, c := range cuttable {
		for _, cut := range []bool{true, false} {
			for at, happened := 1, true; happened && !t.Failed(); at++ {
				t.Run(fmt.Sprintf("%s, cut %v, at %d", name, cut, at), func(t *testing.T) {
					r := newRig(t)
					if c.ready != nil {
						c.ready(t, r)
					}
					uses := 0
					fails := func() error {
						if uses++; uses != at {
							return nil
						}
						if cut {
							r.ledger.Close() // as a crash does: nothing more is written
							return nil
						}
						return keystore.ErrUnavailable
					}
					r.store.BeforeSign = func(keystore.Ref, []byte) error { return fails() }
					r.store.BeforeGenerate = func(keystore.Ref) error { return fails() }
					r.store.BeforeExchange = func(keystore.Ref) { fails() }
					err := c.act(t, r)
					r.store.BeforeSign, r.store.BeforeGenerate, r.store.BeforeExchange = nil, nil, nil
					if happened = uses >= at; !happened && err != nil {
						t.Fatalf("all went well, and it failed: %v", err)
					}
					if cut {
						r.reopen(t)
					}
					r.holds(t, c.line, c.may, c.ends)
					r.reopen(t)
					r.holds(t, c.line, []string{r.found(t, c.line)}, []string{r.found(t, c.line)})
				})
			}
		}
	}
}

// TestDiskFailsInAnAct has each sync of each act fail. Where nothing was written, memory says what the disk says, at once; where
// that is not known, it does after the restart.
func TestDiskFailsInAnAct(t *testing.T) {
	disk := disktest.New(t)
	n := 0
	for name, c := range cuttable {
		for at, happened := int32(1), true; happened && !t.Failed(); at++ {
			t.Run(fmt.Sprintf("%s, at %d", name, at), func(t *testing.T) {
				n++
				r := newRigAt(t, filepath.Join(disk.Dir(), fmt.Sprintf("%d.db", n)))
				if c.ready != nil {
					c.ready(t, r)
				}
				if err := r.ledger.Alive(t.Context()); err != nil {
					t.Fatal(err)
				}
				var syncs atomic.Int32
				disk.Fail(func(op disktest.Op) syscall.Errno {
					if op.Kind == disktest.Datasync && syncs.Add(1) == at {
						return syscall.EIO
					}
					return 0
				})
				err := c.act(t, r)
				disk.Fail(nil)
				if happened = syncs.Load() >= at; !happened && err != nil {
					t.Fatalf("all went well, and it failed: %v", err)
				}
				memory := r.found(t, c.line)
				unknown := errors.Is(r.ledger.Alive(t.Context()), ledger.ErrUnknownState)
				r.reopen(t)
				if got := r.found(t, c.line); !unknown && got != memory {
					t.Errorf("memory said %q, the disk says %q", memory, got)
				}
				r.holds(t, c.line, c.may, c.ends)
			})
		}
	}
}

// TestMemoryIsNotAheadOfTheDisk: an admission that is decided after a change that could not be written is by the old state.
func TestMemoryIsNotAheadOfTheDisk(t *testing.T) {
	disk := disktest.New(t)
	r := newRigAt(t, filepath.Join(disk.Dir(), "ledger.db"))
	k := r.rotate(t, "payments", time.Now().Add(time.Hour))
	disk.Fail(func(op disktest.Op) syscall.Errno {
		if op.Kind == disktest.Datasync && r.version("payments", 2).State != Pending {
			t.Error("memory says it before the disk does")
		}
		if op.Kind == disktest.Write {
			return syscall.EIO
		}
		return 0
	})
	if err := r.activate(t.Context(), audit.Daemon(), k); !errors.Is(err, ledger.ErrDisk) {
		t.Errorf("%v", err)
	}
	if got := r.states(t, "payments"); got != "active pending pending" {
		t.Error(got)
	}
	disk.Fail(func(op disktest.Op) syscall.Errno {
		if op.Kind == disktest.Datasync && r.version("payments", 2).State != Pending {
			t.Error("memory says it before the disk does")
		}
		return 0
	})
	if err := r.activate(t.Context(), audit.Daemon(), k); err != nil {
		t.Error(err)
	}
	disk.Fail(nil)
	if got := r.states(t, "payments"); got != "verify-only active pending" {
		t.Error(got)
	}
}

// TestAgainAfterTheDisk: a rotation that a disk has cut off can be done without a restart, whatever it has left behind.
func TestAgainAfterTheDisk(t *testing.T) {
	disk := disktest.New(t)
	tried := 0
	for at, happened := int32(1), true; happened; at += 2 { // the first sync of each commit: nothing of it counts
		r := newRigAt(t, filepath.Join(disk.Dir(), fmt.Sprintf("again-%d.db", at)))
		var syncs atomic.Int32
		disk.Fail(func(op disktest.Op) syscall.Errno {
			if op.Kind == disktest.Datasync && syncs.Add(1) == at {
				return syscall.EIO
			}
			return 0
		})
		_, err := r.Rotate(t.Context(), operator, "payments", time.Now())
		disk.Fail(nil)
		if happened = syncs.Load() >= at; happened && err != nil {
			if err := r.ledger.Alive(t.Context()); err != nil {
				break // which sync was whose has changed: its state is unknown
			}
			tried++
			if r.hasten(); r.version("payments", 2).announced() {
				r.keepLine(t.Context(), "payments")
			} else {
				r.rotate(t, "payments", time.Now())
			}
		}
		if got := r.states(t, "payments"); got != "verify-only active pending" {
			t.Errorf("at %d: %s", at, got)
		}
		r.checkLine(t, "payments")
	}
	if tried < 3 {
		t.Errorf("it was cut off %d times", tried)
	}
}

// TestCredentialsChangeInTheCommit: a confirmation that is on its way to the disk then is one of before.
func TestCredentialsChangeInTheCommit(t *testing.T) {
	disk := disktest.New(t)
	r := newRigAt(t, filepath.Join(disk.Dir(), "ledger.db"))
	r.set(t, "payments", func(l *Line) { l.Presence = time.Hour })
	disk.Fail(func(op disktest.Op) syscall.Errno {
		if op.Kind == disktest.Datasync {
			r.CredentialsChanged()
		}
		return 0
	})
	_, err := r.Confirm(t.Context(), operator, "payments")
	disk.Fail(nil)
	if !errors.Is(err, ErrConflict) || !r.Confirmed("payments").IsZero() {
		t.Errorf("%v, confirmed until %v", err, r.Confirmed("payments"))
	}
}
