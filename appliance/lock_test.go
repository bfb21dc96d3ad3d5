package appliance

import (
	"context"
	"errors"
	"runtime"
	"testing"
	"time"

	"countersign/internal/anchor"
	"countersign/internal/gate"
	"countersign/internal/keyring"
	"countersign/internal/manage"
)

// reopen closes the ledger and opens the appliance anew, as after a crash.
func (r *rig) reopen(t *testing.T) {
	t.Helper()
	r.ledger.Close()
	r.open(t)
	if err := r.Keys.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestLock: when Lock returns, nothing is admitted any more, through restarts, until an operator
// unlocks the appliance.
func TestLock(t *testing.T) {
	r := newRig(t)
	first := r.sign(t, r.shop, message(1, "m"))
	if err := r.Lock(t.Context(), operator, "incident 7"); err != nil {
		t.Fatal(err)
	}
	closed := func() {
		t.Helper()
		_, err := r.Sign(t.Context(), r.shop, message(2, "m"))
		r.refuses(t, "unavailable", err)
		_, err = r.Verify(t.Context(), r.shop, verifyOf(message(1, "m"), first))
		r.refuses(t, "unavailable", err)
		if _, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: "other"}); !errors.Is(err, ErrLocked) {
			t.Errorf("a key is made: %v", err)
		}
		if _, err := r.Keys.Rotate(t.Context(), operator, "payments", time.Now()); !errors.Is(err, ErrLocked) {
			t.Errorf("a key is rotated: %v", err)
		}
		if h := r.Health(); h.Condition != LockedUp || h.Lock == nil || h.Lock.Reason != "incident 7" {
			t.Errorf("%+v", h)
		}
	}
	closed()
	r.reopen(t)
	closed()
	r.gate.Block(gate.Rollback, anchor.ErrRolledBack)
	if err := r.Unlock(t.Context(), operator); err != nil {
		t.Fatal(err)
	}
	_, err := r.Sign(t.Context(), r.shop, message(2, "m"))
	r.refuses(t, "unavailable", err) // the other reason is there still
	r.gate.Unblock(gate.Rollback)
	r.sign(t, r.shop, message(2, "m"))
	if err := r.Unlock(t.Context(), operator); !errors.Is(err, manage.ErrConflict) {
		t.Errorf("unlocked twice: %v", err)
	}
}

// TestLockThatIsNotWritten: an operator who gave up waiting for the disk has locked the appliance
// all the same, and can unlock the appliance.
func TestLockThatIsNotWritten(t *testing.T) {
	r := newRig(t)
	if err := r.locking.Acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Lock(ctx, operator, "incident"); err == nil {
		t.Error("it says that it is written down")
	}
	r.locking.Release()
	if h := r.Health(); h.Condition != LockedUp || h.Lock == nil {
		t.Errorf("%+v", h)
	}
	_, err := r.Sign(t.Context(), r.shop, message(1, "m"))
	r.refuses(t, "unavailable", err)
	if err := r.Unlock(t.Context(), operator); err != nil {
		t.Fatal(err)
	}
	r.sign(t, r.shop, message(1, "m"))
}

// TestLockedAgain: a lock that was waiting for an unlocking counts, a lock that is written down
// outlives a start, and an attended start is locked.
func TestLockedAgain(t *testing.T) {
	r := newRig(t)
	for _, name := range []string{keyring.NoiseName, keyring.LogName} {
		if _, err := r.Keys.CreateOwn(t.Context(), operator, name, "memory"); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.locking.Acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- r.Lock(t.Context(), operator, "incident") }()
	for r.locked.Load() == nil {
		runtime.Gosched()
	}
	r.setLock(nil) // as an unlocking does at its end
	r.locking.Release()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	locked := func(want bool) {
		t.Helper()
		_, err := r.Sign(t.Context(), r.shop, message(1, "m"))
		if h := r.Health(); (h.Lock != nil) != want || (err != nil) != want {
			t.Errorf("%+v, %v", h, err)
		}
	}
	start := func(attended bool) {
		t.Helper()
		r.reopen(t)
		r.attended = attended
		if err := r.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	unlock := func() {
		t.Helper()
		if err := r.Unlock(t.Context(), operator); err != nil {
			t.Fatal(err)
		}
		locked(false)
	}
	locked(true)
	start(false)
	locked(true)
	unlock()
	start(false)
	locked(false)
	start(true)
	locked(true)
	unlock()
	if err := r.Lock(t.Context(), operator, ""); !errors.Is(err, manage.ErrInvalid) {
		t.Errorf("without a reason: %v", err)
	}
}
