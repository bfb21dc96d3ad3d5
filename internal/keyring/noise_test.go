package keyring_test

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"math"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"countersign/internal/eddsa"
	"countersign/internal/keyring"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/transcript"
)

// TestNoiseRotation: the Noise key is rotated as other keys are, without steps; the identity
// authorises each version, and a rotated identity authorises anew.
func TestNoiseRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.createOwn(t, keyring.NoiseName)
		authorizedBy := func(want string) {
			t.Helper()
			r.keep(t, keyring.NoiseName)
			k, err := r.Keys.Noise()
			if err != nil {
				t.Fatal(err)
			}
			var said struct{ Owner string }
			if k.Authorization != nil {
				if err := json.Unmarshal(k.Authorization.Payload, &said); err != nil {
					t.Fatal(err)
				}
			}
			if said.Owner != want {
				t.Errorf("authorised by %q, want %q", said.Owner, want)
			}
		}
		authorizedBy("") // there is no identity
		r.Keys.Identity = "other"
		authorizedBy("") // the identity is not there yet
		r.Keys.Identity = "payments"
		authorizedBy(base64.RawURLEncoding.EncodeToString(r.public))
		answer := func(want ...uint32) {
			t.Helper()
			var all []uint32
			for _, k := range r.Keys.Answering() {
				all = append(all, k.Version)
			}
			if !slices.Equal(all, want) {
				t.Errorf("the versions %v answer, want %v", all, want)
			}
		}
		r.rotate(t, keyring.NoiseName, time.Now().Add(time.Minute))
		answer(1, 2) // version 2 is announced
		told := r.Keys.Rotation(keyring.NoiseName)
		if told == nil || told.Authorization == nil {
			t.Fatalf("peers are told %+v", told)
		}
		doc, err := transcript.Parse(transcript.Request{
			Type: "paykit-noise-key-authorization-v1", Payload: told.Authorization.Payload, ExpiresAt: 1,
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := eddsa.Verify(r.public, doc.Message, told.Authorization.Signature); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Minute)
		r.keep(t, keyring.NoiseName)
		answer(2, 1) // in the grace time of version 1
		time.Sleep(r.limits.MaxLifetime)
		r.keep(t, keyring.NoiseName)
		answer(2)
		// After the identity's own rotation, the Noise key speaks for the new version.
		got := r.rotate(t, "payments", time.Now())
		authorizedBy(base64.RawURLEncoding.EncodeToString(got.Info().PublicKey))
		for _, name := range []string{keyring.LogName, keyring.AdminName} {
			if _, err := r.Keys.Rotate(t.Context(), operator, name, time.Now()); err == nil {
				t.Errorf("%s was rotated", name)
			}
		}
	})
}

// TestManyNoiseKeys: the cost of a stranger's handshake is bounded, an exchange with each version
// that answers, and the bound does not hold up a compromise.
func TestManyNoiseKeys(t *testing.T) {
	r := newRig(t)
	r.createOwn(t, keyring.NoiseName)
	for range keyring.MaxAnswering - 1 {
		r.rotate(t, keyring.NoiseName, time.Now())
	}
	_, err := r.Keys.Rotate(t.Context(), operator, keyring.NoiseName, time.Now())
	refused(t, manage.ErrConflict, err)
	r.compromise(t, keyring.NoiseName, keyring.MaxAnswering)
	r.wantStates(t, keyring.NoiseName, "verify-only verify-only verify-only compromised active")
}

// TestGenerationRises: the generation of an authorization is higher than all before, whatever the
// clock does and whatever others have had signed.
func TestGenerationRises(t *testing.T) {
	r := newRig(t)
	r.Keys.Identity = "payments"
	r.createOwn(t, keyring.NoiseName)
	series := keyring.GenerationSeries("paykit-noise-key-authorization-v1", "payments")
	raise := func(to uint64) {
		t.Helper()
		var nonce [32]byte
		binary.BigEndian.PutUint64(nonce[:], to)
		got, err := r.ledger.Admit(t.Context(), ledger.Admission{
			Scope: "x", Nonce: nonce, ExpiresAt: time.Now().Unix() + 60,
			Monotonic: &ledger.Monotonic{Series: series, Value: to},
			Decide:    func([]ledger.Used) ([]byte, error) { return nil, nil },
		}, func(ledger.Verdict) []byte { return []byte("{}") })
		if err != nil || got.Verdict != ledger.Fresh {
			t.Fatal(got.Verdict, err)
		}
	}
	ahead := uint64(time.Now().Add(1000 * time.Hour).Unix())
	raise(ahead)
	for n := range uint64(3) {
		if err := r.Keys.AuthorizeNoise(t.Context(), operator); err != nil {
			t.Fatal(err)
		}
		if got, err := r.ledger.LastNumber(series); got != ahead+n+1 || err != nil {
			t.Errorf("%d, %v", got, err)
		}
	}
	raise(math.MaxInt64)
	if err := r.Keys.AuthorizeNoise(t.Context(), operator); !errors.Is(err, ledger.ErrNotHigher) {
		t.Errorf("%v", err)
	}
}
