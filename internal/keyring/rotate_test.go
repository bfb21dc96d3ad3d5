package keyring_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"countersign/appliance"
	"countersign/audit"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/transcript"
)

// TestRotation: a version is announced and active at its time. The version before verifies for its
// grace time, is then archived, and can be destroyed.
func TestRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		before := r.sign(t, r.shop, message(1, "before"))
		k := r.rotate(t, "payments", time.Now().Add(time.Minute))
		if r.wantStates(t, "payments", "active pending pending"); k.Version != 2 {
			t.Errorf("version %d is announced", k.Version)
		}
		r.checkKey(t, "payments")
		if s := r.sign(t, r.shop, message(2, "announced")); s.Version != 1 {
			t.Errorf("before its time version %d signs", s.Version)
		}
		r.keep(t, "payments")
		r.wantStates(t, "payments", "active pending pending")
		r.reopen(t) // the power fails
		time.Sleep(time.Minute)
		r.keep(t, "payments")
		r.wantStates(t, "payments", "verify-only active pending")
		r.checkKey(t, "payments")
		after := r.sign(t, r.shop, message(3, "after"))
		if after.Version != 2 || after.PublicKey == before.PublicKey {
			t.Errorf("after it: version %d", after.Version)
		}
		first := message(1, "before")
		first.Timestamp, first.ExpiresAt = before.Timestamp, before.ExpiresAt
		again := r.sign(t, r.shop, first)
		if !bytes.Equal(again.Signature, before.Signature) || again.Version != 1 {
			t.Errorf("a repetition of what version 1 has signed: version %d", again.Version)
		}
		payments := "payments"
		if err := r.Keys.CheckSigner(&payments, before.PublicKey); err != nil {
			t.Errorf("within the grace time: %v", err)
		}
		for _, early := range []uint32{1, 2, 3} { // all of them are in use
			refused(t, manage.ErrConflict, r.Keys.Destroy(t.Context(), approved, "payments", early))
		}
		time.Sleep(r.limits.MaxLifetime - time.Second)
		r.keep(t, "payments")
		r.wantStates(t, "payments", "verify-only active pending")
		time.Sleep(time.Second)
		r.keep(t, "payments")
		r.wantStates(t, "payments", "archived active pending")
		refused(t, transcript.ErrWrongSigner, r.Keys.CheckSigner(&payments, before.PublicKey))
		refused(t, manage.ErrNotApproved, r.Keys.Destroy(t.Context(), operator, "payments", 1))
		r.destroy(t, "payments", 1)
		_, err := r.store.Key(t.Context(), keystore.Ref{Name: "payments", Version: 1})
		refused(t, keystore.ErrNotFound, err) // on the token
		r.reopen(t)
		r.wantStates(t, "payments", "destroyed active pending")
		r.checkKey(t, "payments")
	})
}

// TestFailedRotationChangesNothing: whatever of the device fails, the key is as it was, the failure
// is an event, and the rotation can be done afterwards.
func TestFailedRotationChangesNothing(t *testing.T) {
	unavailable := func(keystore.Ref) error { return keystore.ErrUnavailable }
	for name, breaks := range map[string]func(*rig){
		"no successor is made": func(r *rig) { r.store.BeforeGenerate = unavailable },
		"the step is not signed": func(r *rig) {
			r.store.BeforeSign = func(ref keystore.Ref, _ []byte) error { return unavailable(ref) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			breaks(r)
			if _, err := r.Keys.Rotate(t.Context(), operator, "payments", time.Now()); err == nil {
				t.Fatal("it was rotated")
			}
			r.store.BeforeGenerate, r.store.BeforeSign = nil, nil
			r.wantStates(t, "payments", "active pending")
			if r.count(t, audit.KeyRotationFailed) == 0 {
				t.Error("the failure is no event")
			}
			if s := r.sign(t, r.shop, message(1, "m")); s.Version != 1 {
				t.Errorf("version %d signs", s.Version)
			}
			r.condition(t, appliance.Degraded, "payments")
			for range 2 { // the second time there is nothing left to do
				r.Keys.RetryNow()
				r.keep(t, "payments")
				r.wantStates(t, "payments", "verify-only active pending")
				r.condition(t, appliance.Operational, "")
			}
			r.checkKey(t, "payments")
		})
	}
}

// TestRotationIsCutOff: the power fails while a rotation is in the device; afterwards nothing of
// the rotation counts.
func TestRotationIsCutOff(t *testing.T) {
	for _, where := range []string{"generate", "sign"} {
		t.Run(where, func(t *testing.T) {
			r := newRig(t)
			inDevice, release := make(chan struct{}), make(chan struct{})
			hang := func() error {
				close(inDevice)
				<-release
				return keystore.ErrUnavailable
			}
			if where == "generate" {
				r.store.BeforeGenerate = func(keystore.Ref) error { return hang() }
			} else {
				r.store.BeforeSign = func(keystore.Ref, []byte) error { return hang() }
			}
			done := make(chan struct{})
			cut := r.Keys
			go func() {
				defer close(done)
				cut.Rotate(context.Background(), operator, "payments", time.Now())
			}()
			<-inDevice
			r.ledger.Close() // as a crash does: nothing more is written
			close(release)
			<-done
			r.store.BeforeGenerate, r.store.BeforeSign = nil, nil
			r.reopen(t)
			r.wantStates(t, "payments", "active pending")
			r.rotate(t, "payments", time.Now())
			r.checkKey(t, "payments")
		})
	}
}

// TestTooFarAhead: a rotation is announced at most a year ahead, a time in the past means now, and
// the appliance's own keys apart from the Noise key are not rotated.
func TestTooFarAhead(t *testing.T) {
	r := newRig(t)
	_, err := r.Keys.Rotate(t.Context(), operator, "payments", time.Now().Add(10*keyring.MaxAhead))
	refused(t, manage.ErrInvalid, err)
	_, err = r.Keys.Rotate(t.Context(), operator, "nothing", time.Now())
	refused(t, manage.ErrNotFound, err)
	for _, name := range []string{keyring.LogName, keyring.AdminName, keyring.CAName} {
		r.createOwn(t, name)
		_, err := r.Keys.Rotate(t.Context(), operator, name, time.Now())
		refused(t, manage.ErrInvalid, err)
	}
	k := r.rotate(t, "payments", time.Unix(1, 0)) // long ago is now
	if strings.Contains(string(k.Succession.Payload), `"time":1,`) {
		t.Errorf("the step says %s", k.Succession.Payload)
	}
	if d := time.Since(k.Activates); d < 0 || d > time.Minute || k.State != keyring.Active {
		t.Errorf("active since %v", k.Activates)
	}
}

func TestArchiveIsRefused(t *testing.T) {
	r := newRig(t)
	refused(t, manage.ErrNotApproved, r.Keys.Archive(t.Context(), operator, "payments", 1))
	for version, want := range map[uint32]error{1: manage.ErrConflict, 2: manage.ErrConflict, 3: manage.ErrNotFound} {
		if err := r.Keys.Archive(t.Context(), approved, "payments", version); !errors.Is(err, want) {
			t.Errorf("version %d: %v", version, err)
		}
	}
	r.sign(t, r.shop, message(1, "m"))
}

// logFiles makes the appliance an audit.Source.
type logFiles struct{ *appliance.Appliance }

func (l logFiles) ReadFile(ctx context.Context, name string) ([]byte, error) {
	return l.LogFile(ctx, name)
}

// TestRotatedLogIsSound: an auditor, and a check of the ledger, accept a log with rotations, a
// failed one, a compromise and a destruction.
func TestRotatedLogIsSound(t *testing.T) {
	r := newRig(t)
	r.createOwn(t, keyring.NoiseName, keyring.LogName)
	r.Keys.Identity = "payments"
	r.sign(t, r.shop, message(1, "m"))
	r.rotate(t, "payments", time.Now())
	r.rotate(t, keyring.NoiseName, time.Now())
	if err := r.ack(t, r.shop, "payments", 2); err != nil {
		t.Fatal(err)
	}
	r.store.BeforeSign = func(keystore.Ref, []byte) error { return keystore.ErrUnavailable }
	if _, err := r.Keys.Rotate(t.Context(), audit.Daemon(), "payments", time.Now()); err == nil {
		t.Fatal("rotated")
	}
	r.store.BeforeSign = nil
	r.compromise(t, "payments", 2)
	r.archive(t, "payments", 1)
	r.destroy(t, "payments", 1)
	if err := r.Lock(t.Context(), operator, "incident"); err != nil {
		t.Fatal(err)
	}
	if err := r.Unlock(t.Context(), operator); err != nil {
		t.Fatal(err)
	}
	r.log(t, 0) // all of it is on disk after that
	log, _, err := r.Log()
	if err != nil {
		t.Fatal(err)
	}
	report, err := log.Verify(t.Context(), logFiles{r.Appliance}, audit.VerifyOptions{})
	if err != nil || report.Unsettled != 0 {
		t.Errorf("%+v, %v", report, err)
	}
	r.agrees(t)
	r.ledger.Close()
	if err := ledger.Check(r.path, ledger.Options{}, nil); err != nil {
		t.Error(err)
	}
}
