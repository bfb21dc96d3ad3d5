package keyring_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/form"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/ledger/disktest"
)

// cut is an act that changes keys.
type cut struct {
	key       string
	rig       func(*rig)
	ready     func(*testing.T, *rig)
	act       func(*testing.T, *rig) error
	may, ends []string
}

// changes are those of the act's rig.
func (c cut) changes() []func(*rig) {
	if c.rig == nil {
		return nil
	}
	return []func(*rig){c.rig}
}

// cuttable are the acts that change keys, each with the rig on which the act can be done. The
// versions of the key may be as in may right after the act was cut off, and as in ends once the
// appliance has done what is due of the key.
var cuttable = map[string]cut{
	"create": {
		key: "other",
		act: func(t *testing.T, r *rig) error {
			_, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: "other"})
			return err
		},
		may:  []string{"", "active pending"},
		ends: []string{"", "active pending"},
	},
	"create a recoverable key": {
		key:   "other",
		ready: func(t *testing.T, r *rig) { r.setHolders(t, 2, "ann", "bob", "cy") },
		act: func(t *testing.T, r *rig) error {
			_, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: "other", Recoverable: true})
			return err
		},
		may:  []string{"", "active pending"},
		ends: []string{"", "active pending"},
	},
	"rotate a recoverable key": {
		key: "vault",
		ready: func(t *testing.T, r *rig) {
			r.setHolders(t, 2, "ann", "bob", "cy")
			r.createRecoverable(t, "vault")
		},
		act: func(t *testing.T, r *rig) error {
			_, err := r.Keys.Rotate(t.Context(), operator, "vault", time.Now())
			return err
		},
		may:  []string{"active pending", "active pending pending", "verify-only active pending"},
		ends: []string{"active pending", "verify-only active pending"},
	},
	"rotate": {
		key: "payments",
		act: func(t *testing.T, r *rig) error {
			_, err := r.Keys.Rotate(t.Context(), operator, "payments", time.Now())
			return err
		},
		may:  []string{"active pending", "active pending pending", "verify-only active pending"},
		ends: []string{"active pending", "verify-only active pending"},
	},
	"move a rotation": {
		key:   "payments",
		ready: func(t *testing.T, r *rig) { r.rotate(t, "payments", time.Now().Add(time.Hour)) },
		act: func(t *testing.T, r *rig) error {
			_, err := r.Keys.Rotate(t.Context(), operator, "payments", time.Now())
			return err
		},
		may:  []string{"active pending pending", "verify-only active pending"},
		ends: []string{"active pending pending", "verify-only active pending"},
	},
	"call off a rotation": {
		key:   "payments",
		ready: func(t *testing.T, r *rig) { r.rotate(t, "payments", time.Now().Add(time.Hour)) },
		act:   func(t *testing.T, r *rig) error { return r.Keys.Cancel(t.Context(), operator, "payments") },
		may:   []string{"active pending pending"},
		ends:  []string{"active pending pending"},
	},
	"rotate after a rotation was called off": {
		key: "payments",
		ready: func(t *testing.T, r *rig) {
			r.rotate(t, "payments", time.Now().Add(time.Hour))
			if err := r.Keys.Cancel(t.Context(), operator, "payments"); err != nil {
				t.Fatal(err)
			}
		},
		act: func(t *testing.T, r *rig) error {
			_, err := r.Keys.Rotate(t.Context(), operator, "payments", time.Now())
			return err
		},
		may:  []string{"active pending pending", "verify-only active pending"},
		ends: []string{"active pending pending", "verify-only active pending"},
	},
	"move a rotation of the Noise key": {
		key: keyring.NoiseName,
		ready: func(t *testing.T, r *rig) {
			r.createOwn(t, keyring.NoiseName)
			r.rotate(t, keyring.NoiseName, time.Now().Add(time.Hour))
		},
		act: func(t *testing.T, r *rig) error {
			r.Keys.Identity = "payments"
			_, err := r.Keys.Rotate(t.Context(), operator, keyring.NoiseName, time.Now())
			return err
		},
		may:  []string{"active pending", "verify-only active"},
		ends: []string{"active pending", "verify-only active"},
	},
	"call off a rotation of the Noise key": {
		key: keyring.NoiseName,
		ready: func(t *testing.T, r *rig) {
			r.createOwn(t, keyring.NoiseName)
			r.Keys.Identity = "payments"
			r.rotate(t, keyring.NoiseName, time.Now().Add(time.Hour))
		},
		act:  func(t *testing.T, r *rig) error { return r.Keys.Cancel(t.Context(), operator, keyring.NoiseName) },
		may:  []string{"active pending"},
		ends: []string{"active pending"},
	},
	"compromise": {
		key: "payments",
		act: func(t *testing.T, r *rig) error {
			return r.Keys.Compromise(t.Context(), approved, "payments", 1, "stolen")
		},
		may: []string{
			"active pending", "compromised pending", "compromised pending pending", "compromised active pending",
		},
		ends: []string{"active pending", "compromised active pending"},
	},
	"compromise the announced": {
		key:   "payments",
		ready: func(t *testing.T, r *rig) { r.rotate(t, "payments", time.Now().Add(time.Hour)) },
		act: func(t *testing.T, r *rig) error {
			return r.Keys.Compromise(t.Context(), approved, "payments", 1, "stolen")
		},
		may:  []string{"active pending pending", "compromised pending pending", "compromised active pending"},
		ends: []string{"active pending pending", "compromised active pending"},
	},
	"make a recovery successor": {
		key: "payments",
		rig: withSafe,
		act: func(t *testing.T, r *rig) error {
			return r.Keys.MakeRecovery(t.Context(), approved, "payments", "safe")
		},
		may:  []string{"active pending", "active pending pending pending"},
		ends: []string{"active pending", "active pending pending pending"},
	},
	"replace a recovery successor": {
		key:   "payments",
		rig:   withSafe,
		ready: func(t *testing.T, r *rig) { r.makeRecovery(t, "safe") },
		act: func(t *testing.T, r *rig) error {
			return r.Keys.MakeRecovery(t.Context(), approved, "payments", "safe")
		},
		may: []string{"active pending pending pending", "active pending archived archived pending pending"},
		ends: []string{
			"active pending pending pending", "active pending archived archived pending pending",
		},
	},
	"recover": {
		key: "payments",
		rig: withSafe,
		ready: func(t *testing.T, r *rig) {
			r.makeRecovery(t, "safe")
			r.lose(1, 2)
		},
		act: func(t *testing.T, r *rig) error {
			return r.Keys.RecoverLine(t.Context(), approved, "payments", "it burnt")
		},
		may:  []string{"active pending pending pending", "verify-only archived active pending"},
		ends: []string{"active pending pending pending", "verify-only archived active pending"},
	},
	"destroy": {
		key: "payments",
		ready: func(t *testing.T, r *rig) {
			r.rotate(t, "payments", time.Now())
			r.archive(t, "payments", 1)
		},
		act:  func(t *testing.T, r *rig) error { return r.Keys.Destroy(t.Context(), approved, "payments", 1) },
		may:  []string{"archived active pending", "destroyed active pending"},
		ends: []string{"archived active pending", "destroyed active pending"},
	},
	"rotate the Noise key": {
		key:   keyring.NoiseName,
		ready: func(t *testing.T, r *rig) { r.createOwn(t, keyring.NoiseName) },
		act: func(t *testing.T, r *rig) error {
			r.Keys.Identity = "payments"
			_, err := r.Keys.Rotate(t.Context(), operator, keyring.NoiseName, time.Now())
			return err
		},
		may:  []string{"active", "active pending", "verify-only active"},
		ends: []string{"active", "verify-only active"},
	},
	"compromise the Noise key": {
		key:   keyring.NoiseName,
		ready: func(t *testing.T, r *rig) { r.createOwn(t, keyring.NoiseName) },
		act: func(t *testing.T, r *rig) error {
			return r.Keys.Compromise(t.Context(), approved, keyring.NoiseName, 1, "stolen")
		},
		may:  []string{"active", "compromised", "compromised pending", "compromised active"},
		ends: []string{"active", "compromised active"},
	},
}

// withSafe makes the rig's store a second token, too, so that the cuts are in its operations.
func withSafe(r *rig) { r.more = map[string]keystore.Store{"safe": form.Guard(r.store, nil)} }

// holds checks the promises that hold of a key at any moment, lets the appliance go on with the
// key, and checks them again.
func (r *rig) holds(t *testing.T, key string, may, ends []string) {
	t.Helper()
	if got := r.states(t, key); !slices.Contains(may, got) {
		t.Errorf("it is %q", got)
	}
	check := func() {
		t.Helper()
		if keyring.Signs(key, keystore.Ed25519) && r.states(t, key) != "" {
			r.checkKey(t, key)
		}
	}
	check()
	for range 3 {
		r.Keys.RetryNow()
		r.keep(t, key)
	}
	if got := r.states(t, key); !slices.Contains(ends, got) {
		t.Errorf("in the end it is %q", got)
	}
	check()
	r.matches(t)
	if key == "other" && r.states(t, key) == "" {
		if _, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: key}); err != nil {
			t.Errorf("made again: %v", err)
		}
	}
	if k, err := r.Keys.Active(key); err != nil {
		t.Error(err)
	} else if slices.Contains(r.lost, k.Ref()) {
		r.recover(t)
		check()
	} else if next := r.Keys.Version(key, k.Version+1); next == nil || !next.Announced() {
		r.rotate(t, key, time.Now())
		check()
	}
}

// matches compares the ledger with the token, while no act is under way: no version is still being
// made, and both have the same keys.
func (r *rig) matches(t *testing.T) {
	t.Helper()
	if err := r.ledger.All(ledger.Keys, func(name string, value []byte) error {
		if state, err := keyring.StateOf(name, value); err != nil || state == keyring.Making {
			t.Errorf("%s is still being made, %v", name, err)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	refs, err := r.store.Keys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, ref := range refs {
		k := r.Keys.Version(ref.Name, ref.Version)
		if k == nil || k.State == keyring.Destroyed {
			t.Errorf("the token has %v, and the ledger has not", ref)
			continue
		}
		if faults, err := r.store.Compare(t.Context(), []keystore.Info{k.Info()}); err != nil || faults[0] != nil {
			t.Errorf("%v, %v", faults, err)
		}
	}
	for _, k := range r.Keys.All() {
		gone := k.State == keyring.Destroyed || k.State == keyring.Archived
		if _, err := r.store.Key(t.Context(), k.Ref()); err != nil && !gone && !slices.Contains(r.lost, k.Ref()) {
			t.Errorf("the ledger has %v, and the token has not", k.Ref())
		}
	}
}

// TestPowerCutInTheDevice cuts the power at each use of the device of each act, or has the device
// fail there.
func TestPowerCutInTheDevice(t *testing.T) {
	for name, c := range cuttable {
		for _, cut := range []bool{true, false} {
			for at, happened := 1, true; happened && !t.Failed(); at++ {
				t.Run(fmt.Sprintf("%s, cut %v, at %d", name, cut, at), func(t *testing.T) {
					r := newRig(t, c.changes()...)
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
					r.holds(t, c.key, c.may, c.ends)
					r.reopen(t)
					as := []string{r.states(t, c.key)}
					r.holds(t, c.key, as, as)
				})
			}
		}
	}
}

// TestDiskFailsInAnAct has each sync of each act fail. Where nothing was written, memory says what
// the disk says, at once. Where the state of the disk is unknown, memory does so after the restart.
func TestDiskFailsInAnAct(t *testing.T) {
	disk := disktest.New(t)
	n := 0
	for name, c := range cuttable {
		for at, happened := int32(1), true; happened && !t.Failed(); at++ {
			t.Run(fmt.Sprintf("%s, at %d", name, at), func(t *testing.T) {
				n++
				r := newRigAt(t, filepath.Join(disk.Dir(), fmt.Sprintf("%d.db", n)), c.changes()...)
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
				memory := r.states(t, c.key)
				unknown := errors.Is(r.ledger.Alive(t.Context()), ledger.ErrUnknownState)
				r.reopen(t)
				if got := r.states(t, c.key); !unknown && got != memory {
					t.Errorf("memory said %q, the disk says %q", memory, got)
				}
				r.holds(t, c.key, c.may, c.ends)
			})
		}
	}
}

// TestMemoryIsNotAheadOfTheDisk: an admission that is decided after a change that could not be
// written is decided by the old state.
func TestMemoryIsNotAheadOfTheDisk(t *testing.T) {
	disk := disktest.New(t)
	r := newRigAt(t, filepath.Join(disk.Dir(), "ledger.db"))
	k := r.rotate(t, "payments", time.Now().Add(time.Hour))
	during := func(writes syscall.Errno) func(disktest.Op) syscall.Errno {
		return func(op disktest.Op) syscall.Errno {
			if op.Kind == disktest.Datasync && r.Keys.Version("payments", 2).State != keyring.Pending {
				t.Error("memory says it before the disk does")
			}
			if op.Kind == disktest.Write {
				return writes
			}
			return 0
		}
	}
	disk.Fail(during(syscall.EIO))
	refused(t, ledger.ErrDisk, r.Keys.Activate(t.Context(), audit.Daemon(), k))
	r.wantStates(t, "payments", "active pending pending")
	disk.Fail(during(0))
	if err := r.Keys.Activate(t.Context(), audit.Daemon(), k); err != nil {
		t.Error(err)
	}
	disk.Fail(nil)
	r.wantStates(t, "payments", "verify-only active pending")
}

// TestAgainAfterTheDisk: a rotation that a disk has cut off can be done without a restart, whatever
// the rotation has left behind.
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
		_, err := r.Keys.Rotate(t.Context(), operator, "payments", time.Now())
		disk.Fail(nil)
		if happened = syncs.Load() >= at; happened && err != nil {
			if err := r.ledger.Alive(t.Context()); err != nil {
				break // the order of the syncs is another now: the ledger's state is unknown
			}
			tried++
			if r.Keys.RetryNow(); r.Keys.Version("payments", 2).Announced() {
				r.keep(t, "payments")
			} else {
				r.rotate(t, "payments", time.Now())
			}
		}
		r.wantStates(t, "payments", "verify-only active pending")
		r.checkKey(t, "payments")
	}
	if tried < 3 {
		t.Errorf("it was cut off %d times", tried)
	}
}
