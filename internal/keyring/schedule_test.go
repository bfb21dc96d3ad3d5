package keyring_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"countersign/appliance"
	"countersign/audit"
	"countersign/internal/anchor"
	"countersign/internal/cause"
	"countersign/internal/gate"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/meter"
)

// TestScheduledRotation: a key is rotated by age and by use count, and again after a failure.
func TestScheduledRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.set(t, "payments", func(s *keyring.Settings) { s.Plan.Every = 24 * time.Hour })
		time.Sleep(24*time.Hour - time.Second)
		r.keep(t, "payments")
		r.wantStates(t, "payments", "active pending")
		time.Sleep(time.Second)
		r.store.BeforeSign = func(keystore.Ref, []byte) error { return keystore.ErrUnavailable }
		r.keep(t, "payments")
		r.condition(t, appliance.Degraded, "payments")
		if h := r.Health(); len(h.Causes) != 1 {
			t.Errorf("after a failure: %+v", h)
		}
		r.store.BeforeSign = nil
		r.keep(t, "payments")
		r.wantStates(t, "payments", "active pending") // not tried again at once
		time.Sleep(keyring.FirstRetry)
		r.keep(t, "payments")
		r.wantStates(t, "payments", "verify-only active pending")
		r.condition(t, appliance.Operational, "")
		r.set(t, "payments", func(s *keyring.Settings) { s.Plan.Every, s.Plan.Uses = 0, 3 })
		for n := range byte(3) {
			r.keep(t, "payments")
			r.wantStates(t, "payments", "verify-only active pending")
			r.sign(t, r.shop, message(10+n, "m"))
			if n == 1 {
				r.reopen(t) // the count outlives a crash
			}
		}
		r.keep(t, "payments")
		r.wantStates(t, "payments", "verify-only verify-only active pending")
		r.checkKey(t, "payments")
	})
}

// TestAnnounced: a scheduled rotation is announced as long before as the settings say, and the
// announced end of the old version stays.
func TestAnnounced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.set(t, "payments", func(s *keyring.Settings) {
			s.Plan.Every, s.Announce, s.Grace = 24*time.Hour, time.Hour, 2*time.Hour
		})
		next := func(in time.Duration, because string) {
			t.Helper()
			at, why := r.Keys.NextRotation("payments")
			if why != because || time.Until(at).Round(time.Minute) != in {
				t.Errorf("the next rotation is at %v because of %q, want in %v because of %q", at, why, in, because)
			}
		}
		next(24*time.Hour, "age")
		time.Sleep(24 * time.Hour)
		r.keep(t, "payments")
		next(time.Hour, "announced")
		if told := r.Keys.Rotation("payments"); told == nil || told.RetiresAt-told.ActivatesAt != 2*3600 {
			t.Errorf("%+v", told)
		}
		time.Sleep(time.Hour)
		r.keep(t, "payments")
		said := r.Keys.Rotation("payments")
		r.set(t, "payments", func(s *keyring.Settings) { s.Grace = 20 * time.Hour })
		told := r.Keys.Rotation("payments")
		if told.RetiresAt != said.RetiresAt || said.RetiresAt != r.Keys.Version("payments", 1).Retires.Unix() {
			t.Errorf("%+v, before %+v", told, said)
		}
		if at, why := r.Keys.NextRotation("nothing"); why != "" || !at.IsZero() {
			t.Errorf("%v, %s", at, why)
		}
	})
}

// TestRetries: a rotation that fails is tried again, less and less often, and never given up.
func TestRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.set(t, "payments", func(s *keyring.Settings) { s.Plan.Every = time.Hour })
		time.Sleep(time.Hour)
		tries := 0
		r.store.BeforeGenerate = func(keystore.Ref) error { tries++; return keystore.ErrUnavailable }
		begin := time.Now()
		var at []time.Duration
		for time.Since(begin) < 8*time.Hour {
			before := tries
			if r.keep(t, "payments"); tries > before {
				at = append(at, time.Since(begin))
			}
			time.Sleep(10 * time.Second)
		}
		if len(at) < 4 || at[1] != keyring.FirstRetry || at[2]-at[1] != 2*keyring.FirstRetry ||
			at[len(at)-1]-at[len(at)-2] != keyring.LastRetry {
			t.Errorf("tried at %v", at)
		}
		m := meter.New("test")
		m.Source(r.Keys.Measure)
		_, body, err := m.Expose("")
		if want := fmt.Sprintf("\ncountersign_rotations_failed_total %d\n", tries); err != nil ||
			!strings.Contains(string(body), want) {
			t.Errorf("the metrics have no line %q: %v", want, err)
		}
	})
}

// TestOverdue sees that an announced time which has passed is a cause, until the version is active.
func TestOverdue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.rotate(t, "payments", time.Now().Add(time.Hour))
		time.Sleep(time.Hour + 30*time.Second)
		r.condition(t, appliance.Operational, "")
		time.Sleep(time.Minute)
		r.hasCause(t, cause.RotationOverdue, "payments", "version 2 was announced for")
		r.keep(t, "payments")
		r.condition(t, appliance.Operational, "")
	})
}

// TestFailureIsForgotten: when nothing is left to do, by whatever act, Health does not say any more
// that a rotation has failed.
func TestFailureIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.set(t, "payments", func(s *keyring.Settings) { s.Plan.Every = time.Hour })
		time.Sleep(time.Hour)
		r.store.BeforeGenerate = func(keystore.Ref) error { return keystore.ErrUnavailable }
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); r.Keys.Keep(ctx) }()
		synctest.Wait()
		r.condition(t, appliance.Degraded, "payments")
		r.store.BeforeGenerate = nil
		r.rotate(t, "payments", time.Now())
		time.Sleep(2 * keyring.KeepEvery)
		synctest.Wait()
		r.condition(t, appliance.Operational, "")
		cancel()
		<-done
	})
}

// TestTokenIsBack: a failed rotation is tried at once when a token serves again, or when an
// operator has the token retried.
func TestTokenIsBack(t *testing.T) {
	for _, how := range []string{"changed", "retried"} {
		r := newRig(t)
		r.createOwn(t, keyring.NoiseName, keyring.LogName)
		if err := r.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		r.store.BeforeGenerate = func(keystore.Ref) error { return keystore.ErrUnavailable }
		r.compromise(t, "payments", 1)
		r.store.BeforeGenerate = nil
		memory := appliance.TokenResource("memory")
		if how == "changed" {
			r.monitor.Report(t.Context(), memory, false, nil)
			r.keep(t, "payments")
			r.wantStates(t, "payments", "compromised pending")
			r.monitor.Report(t.Context(), memory, true, nil)
		} else if err := r.RetryToken(t.Context(), operator, "memory"); err != nil {
			t.Fatal(err)
		}
		r.keep(t, "payments")
		r.wantStates(t, "payments", "compromised active pending")
	}
}

// TestNothingMovesWhileClosed: nothing is due while the ledger may be an older copy. While the
// appliance is locked, grace times end and nothing new begins.
func TestNothingMovesWhileClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.set(t, "payments", func(s *keyring.Settings) { s.Plan.Every = time.Hour })
		r.rotate(t, "payments", time.Now())
		kept := func(want string) {
			t.Helper()
			r.keep(t, "payments")
			r.wantStates(t, "payments", want)
		}
		time.Sleep(r.limits.MaxLifetime)
		for _, why := range []gate.Reason{gate.Rollback, gate.Counter} {
			r.Keys.Gate.Block(why, anchor.ErrRolledBack)
			kept("verify-only active pending")
			r.Keys.Gate.Unblock(why)
		}
		if err := r.Lock(t.Context(), operator, "incident"); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			kept("archived active pending")
		}
		r.compromise(t, "payments", 2)
		kept("archived compromised pending")
		if err := r.Unlock(t.Context(), operator); err != nil {
			t.Fatal(err)
		}
		kept("archived compromised active pending")
		r.rotate(t, "payments", time.Now().Add(time.Minute))
		if err := r.Lock(t.Context(), operator, "incident"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		kept("archived compromised active pending pending")
	})
}

// TestClockThatJumps: a clock that is set ahead ends no grace time.
func TestClockThatJumps(t *testing.T) {
	jump := time.Duration(0)
	r := newRig(t, func(r *rig) {
		r.options = ledger.Options{Wall: func() time.Time { return time.Now().Add(jump) }}
	})
	r.rotate(t, "payments", time.Now())
	k := r.Keys.Version("payments", 1)
	r.reopen(t)
	jump = 30 * 24 * time.Hour
	early := *k
	early.Retires = time.Now().Add(-time.Hour) // as far as the system's clock can tell, it is long over
	if !r.Keys.Due([]*keyring.Key{&early, r.Keys.Version("payments", 2)}) {
		t.Error("at its time nothing is done")
	}
	early.Retires = time.Now().Add(time.Hour)
	if r.Keys.Due([]*keyring.Key{&early, r.Keys.Version("payments", 2)}) {
		t.Error("the ledger's time is not asked")
	}
}

// TestUses: the uses of a key are counted through stops, crashes and dropped epochs, and a start
// reads few events.
func TestUses(t *testing.T) {
	r := newRig(t)
	n := byte(0)
	sign := func() { n++; r.sign(t, r.shop, message(n, "m")) }
	uses := func(want uint64) {
		t.Helper()
		if got := r.Keys.Version("payments", 1).Uses(); got != want {
			t.Errorf("%d uses, want %d", got, want)
		}
	}
	write := func() (next uint64) {
		t.Helper()
		if err := r.Keys.WriteUses(t.Context()); err != nil {
			t.Fatal(err)
		}
		return r.Keys.FirstUncounted()
	}
	for range 3 {
		sign()
	}
	r.sign(t, r.shop, message(1, "m")) // a repetition does not count
	uses(3)
	r.reopen(t)
	uses(3)
	write()
	_, first, tree := r.ledger.Head()
	sign()
	r.reopen(t)
	if next := r.Keys.FirstUncounted(); next != first+tree.Size {
		t.Errorf("the start reads from event %d on, of %d", next, first+tree.Size)
	}
	uses(4)
	written := write()
	if again := write(); again != written {
		t.Error("the uses are written again, and nothing was used")
	}
	for range keyring.UsesBehind / 64 {
		if err := r.ledger.Update(t.Context(), func(tx *ledger.Tx) error {
			for range 64 {
				e := audit.Event{Type: audit.SignatureVerified, Actor: audit.Daemon(), Action: "verify", Outcome: "ok"}
				if err := tx.Append(ledger.EventOf(e)); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	if next := write(); next < written+keyring.UsesBehind {
		t.Errorf("a start would read %d events and more", keyring.UsesBehind)
	}
	// The epoch with the last count is dropped.
	sign()
	write()
	sign() // and not written down
	r.createOwn(t, keyring.LogName)
	if _, err := r.EndEpoch(t.Context(), operator); err != nil {
		t.Fatal(err)
	}
	dropped := audit.Event{Type: audit.RetentionApplied, Actor: audit.Daemon(), Action: "retention", Outcome: "ok"}
	if err := r.ledger.Drop(t.Context(), 0, ledger.EventOf(dropped)); err != nil {
		t.Fatal(err)
	}
	sign()
	r.reopen(t)
	uses(6) // of 7: the event of one is gone
}
