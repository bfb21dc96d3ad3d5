package keyring_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"countersign/appliance"
	"countersign/audit"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/manage"
	"countersign/transcript"
)

// TestCompromise: from that moment the version signs nothing and is not believed, and its successor
// follows, at once or when the device can.
func TestCompromise(t *testing.T) {
	r := newRig(t)
	first := r.sign(t, r.shop, message(1, "m"))
	refused(t, manage.ErrNotApproved, r.Keys.Compromise(t.Context(), operator, "payments", 1, "stolen"))
	// A request has chosen version 1, and is in front of its admission when the compromise is
	// written.
	k, err := r.Keys.Signing("payments")
	if err != nil {
		t.Fatal(err)
	}
	r.store.BeforeGenerate = func(keystore.Ref) error { return keystore.ErrUnavailable }
	r.compromise(t, "payments", 1)
	r.store.BeforeGenerate = nil
	refused(t, keyring.ErrNotActive, r.Keys.MayUse(k))
	r.wantStates(t, "payments", "compromised pending")
	_, err = r.Sign(t.Context(), r.shop, message(2, "m"))
	refused(t, keyring.ErrNotActive, err)
	_, err = r.Sign(t.Context(), r.shop, message(1, "m"))
	refused(t, keyring.ErrNotActive, err)
	_, err = r.Verify(t.Context(), r.shop, verifyOf(message(1, "m"), first))
	refused(t, transcript.ErrWrongSigner, err)
	r.condition(t, appliance.Degraded, "payments")
	r.reopen(t)
	r.keep(t, "payments")
	r.wantStates(t, "payments", "compromised active pending")
	r.checkKey(t, "payments")
	if s := r.sign(t, r.shop, message(3, "m")); s.Version != 2 {
		t.Errorf("version %d signs", s.Version)
	}
	if told := r.Keys.Rotation("payments"); told == nil || !told.Compromised || told.Version != 2 {
		t.Errorf("peers are told %+v", told)
	}
}

// TestCompromisedForEver: a version that is destroyed here may still be in other hands.
func TestCompromisedForEver(t *testing.T) {
	r := newRig(t)
	m := message(1, "m")
	first := r.sign(t, r.shop, m)
	r.compromise(t, "payments", 1)
	r.destroy(t, "payments", 1)
	for range 2 {
		_, err := r.Verify(t.Context(), r.shop, verifyOf(m, first))
		refused(t, transcript.ErrWrongSigner, err)
		if told := r.Keys.Rotation("payments"); !told.Compromised || told.RetiresAt != told.ActivatesAt {
			t.Errorf("others are told %+v", told)
		}
		r.reopen(t)
	}
}

// TestNoiseKeyIsCompromisedAndTheDeviceFails: the appliance starts without a Noise key that
// answers, and makes one when the device can.
func TestNoiseKeyIsCompromisedAndTheDeviceFails(t *testing.T) {
	r := newRig(t)
	if err := r.Ready(); err == nil {
		t.Error("ready without a Noise key")
	}
	r.createOwn(t, keyring.NoiseName, keyring.LogName)
	r.store.BeforeGenerate = func(keystore.Ref) error { return keystore.ErrUnavailable }
	r.compromise(t, keyring.NoiseName, 1)
	if r.count(t, audit.KeyRotationFailed) == 0 {
		t.Error("the failure is no event")
	}
	r.store.BeforeGenerate = nil
	r.reopen(t)
	if err := r.Start(t.Context()); err != nil {
		t.Fatalf("it does not start: %v", err)
	}
	r.keep(t, keyring.NoiseName)
	r.wantStates(t, keyring.NoiseName, "compromised active")
}

// TestEmergencyByHand: an operator who does not want to wait for the next retry rotates.
func TestEmergencyByHand(t *testing.T) {
	r := newRig(t)
	fails := func(keystore.Ref) error { return keystore.ErrUnavailable }
	r.store.BeforeGenerate = fails
	r.compromise(t, "payments", 1)
	r.store.BeforeGenerate = nil
	r.keep(t, "payments")
	r.wantStates(t, "payments", "compromised pending") // not at once again
	r.createOwn(t, keyring.NoiseName)
	r.store.BeforeGenerate = fails
	r.compromise(t, keyring.NoiseName, 1)
	if k, err := r.Keys.Rotate(t.Context(), operator, keyring.NoiseName, time.Now()); err == nil || k != nil {
		t.Errorf("without the device: %v, %v", k, err)
	}
	r.store.BeforeGenerate = nil
	for _, name := range []string{"payments", keyring.NoiseName} {
		if k := r.rotate(t, name, time.Now().Add(time.Hour)); k.Version != 2 || k.State != keyring.Active {
			t.Errorf("%v is %s", k.Ref(), k.State)
		}
	}
	r.wantStates(t, "payments", "compromised active pending")
	r.condition(t, appliance.Operational, "")
	r.checkKey(t, "payments")
}

func TestCompromiseIsRefused(t *testing.T) {
	r := newRig(t)
	for _, name := range []string{keyring.LogName, keyring.AdminName, keyring.CAName} {
		if err := r.Keys.Compromise(t.Context(), approved, name, 1, "stolen"); !errors.Is(err, manage.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, reason := range []string{"", strings.Repeat("x", 501)} {
		if err := r.Keys.Compromise(t.Context(), approved, "payments", 1, reason); !errors.Is(err, manage.ErrInvalid) {
			t.Errorf("%d bytes of a reason: %v", len(reason), err)
		}
	}
	for version, want := range map[uint32]error{
		2: manage.ErrConflict, // the successor is settled
		3: manage.ErrNotFound,
	} {
		if err := r.Keys.Compromise(t.Context(), approved, "payments", version, "stolen"); !errors.Is(err, want) {
			t.Errorf("version %d: %v", version, err)
		}
	}
	r.compromise(t, "payments", 1)
	refused(t, manage.ErrConflict, r.Keys.Compromise(t.Context(), approved, "payments", 1, "stolen")) // twice
	r.wantStates(t, "payments", "compromised active pending")
}

// TestOneKeyTwoNames: a private key under two names is compromised under both.
func TestOneKeyTwoNames(t *testing.T) {
	r := newRig(t)
	seed := filepath.Join(t.TempDir(), "seed")
	if err := os.WriteFile(seed, []byte(strings.Repeat("07", 32)), 0o600); err != nil {
		t.Fatal(err)
	}
	var public [32]byte
	for _, name := range []string{"one", "two"} {
		k, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: name, Seed: seed})
		if err != nil {
			t.Fatal(err)
		}
		public = [32]byte(k.Info().PublicKey)
		if err := r.Keys.CheckSigner(&name, public); err != nil {
			t.Error(err)
		}
	}
	r.compromise(t, "one", 1)
	two := "two"
	refused(t, transcript.ErrWrongSigner, r.Keys.CheckSigner(&two, public))
	refused(t, transcript.ErrWrongSigner, r.Keys.CheckSigner(nil, public))
	if err := r.Keys.CheckSigner(nil, [32]byte{1}); err != nil {
		t.Errorf("a stranger's key: %v", err)
	}
}
