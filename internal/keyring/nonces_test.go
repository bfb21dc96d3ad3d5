package keyring_test

import (
	"crypto/ed25519"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"
	"time"

	"countersign/appliance"
	"countersign/internal/keyring"
	"countersign/internal/ledger"
	"countersign/transcript"
	"countersign/wire"
)

// foreign returns the request to verify a document that a foreign key has signed.
func foreign(t *testing.T, n int) *wire.Verify {
	t.Helper()
	key := ed25519.NewKeyFromSeed(make([]byte, 32))
	d := message(0, "m").Document
	binary.BigEndian.PutUint32(d.Nonce[:], uint32(n))
	doc, err := transcript.Parse(transcript.Request{
		Type: d.Type, Payload: d.Payload, Nonce: d.Nonce, Timestamp: d.Timestamp, ExpiresAt: d.ExpiresAt,
	})
	if err != nil {
		t.Fatal(err)
	}
	return &wire.Verify{
		ID: "2", Op: wire.OpVerify, PublicKey: [32]byte(key.Public().(ed25519.PublicKey)),
		Signature: ed25519.Sign(key, doc.Message), Document: d,
	}
}

// flood verifies documents of a foreign key for a peer until the peer is refused, and returns the
// number of verified documents. The numbers of the documents begin at first.
func (r *rig) flood(t *testing.T, who appliance.Caller, first int) (n int) {
	t.Helper()
	for ; n < r.options.MaxNonces; n++ {
		if _, err := r.Verify(t.Context(), who, foreign(t, first+n)); err != nil {
			refused(t, ledger.ErrTooMany, err)
			return n
		}
	}
	t.Errorf("%d documents were verified for one peer", n)
	return n
}

// TestVerifierTakesNobodysRoom: a peer that policy names nowhere verifies documents of a key of its
// own until it is refused. Others sign and verify as before, and a rotation and the succession
// after a compromise are done: before and after a restart, and after the peer's removal.
func TestVerifierTakesNobodysRoom(t *testing.T) {
	r := newRig(t, func(r *rig) { r.options.MaxNonces = 400 })
	hostile := r.enrol(t, "hostile", 9)
	r.createOwn(t, keyring.NoiseName)
	flooded := r.flood(t, hostile, 0)
	version, nonce := uint32(1), byte(0)
	serves := func(when string) {
		t.Helper()
		nonce++
		s := r.sign(t, r.shop, message(nonce, "m"))
		if _, err := r.Verify(t.Context(), r.cafe, verifyOf(message(nonce, "m"), s)); err != nil {
			t.Errorf("%s: another peer verifies: %v", when, err)
		}
		if k := r.rotate(t, "payments", time.Now()); k.Version != version+1 {
			t.Errorf("%s: version %d", when, k.Version)
		}
		r.keep(t, "payments")
		r.compromise(t, "payments", version+1)
		r.keep(t, "payments")
		version += 2
		nonce++
		if s := r.sign(t, r.shop, message(nonce, "m")); s.Version != version {
			t.Errorf("%s: version %d signs after a compromise, want %d", when, s.Version, version)
		}
		r.checkKey(t, "payments")
	}
	serves("flooded")
	r.reopen(t)
	if n := r.flood(t, hostile, 1000); n != 0 {
		t.Errorf("after a restart %d more documents were verified", n)
	}
	serves("after a restart")
	if err := r.Peers.Remove(t.Context(), operator, "hostile"); err != nil {
		t.Fatal(err)
	}
	if got := r.ledger.Nonces(); got.Verifying != flooded+2 {
		t.Errorf("%+v after the removal, want %d for verifications", got, flooded+2)
	}
	r.condition(t, appliance.Degraded, "removed peer")
	serves("after the peer's removal")
	hostile = r.enrol(t, "hostile", 19) // the share is that of the name, whatever the key
	if n := r.flood(t, hostile, 2000); n != 0 {
		t.Errorf("after another enrolment %d more documents were verified", n)
	}
	r.condition(t, appliance.Degraded, "hostile")
}

// TestOwnSignaturesHaveARoom: where all peers together have as many nonces as they may, the
// appliance is not ready, rotates and replaces a compromised key nevertheless, and serves again
// when nonces have expired.
func TestOwnSignaturesHaveARoom(t *testing.T) {
	ahead := time.Duration(0)
	r := newRig(t, func(r *rig) {
		r.options.MaxNonces, r.options.Bounds = 12, ledger.Bounds{Peer: 8, Verifying: 4, Own: 3}
		r.options.Wall = func() time.Time { return time.Now().Add(ahead) }
		r.options.Elapsed = func() time.Duration { return time.Duration(time.Now().UnixNano()) + ahead }
	})
	r.createOwn(t, keyring.NoiseName, keyring.LogName)
	ready := func(want string) {
		t.Helper()
		if err := r.Canary(t.Context()); !strings.Contains(fmt.Sprint(err), want) {
			t.Errorf("ready: %v, want %q", err, want)
		}
	}
	ready("<nil>")
	if n := r.flood(t, r.cafe, 0); n != 4 {
		t.Errorf("%d were verified", n)
	}
	ready("<nil>") // signatures have room
	for n := range byte(5) {
		r.sign(t, r.shop, message(n+1, "m"))
	}
	_, err := r.Sign(t.Context(), r.shop, message(6, "m"))
	refused(t, ledger.ErrTooMany, err)
	ready("nonces-full")
	r.condition(t, appliance.Degraded, "9 of 9 nonces of all peers")
	r.rotate(t, "payments", time.Now())
	r.keep(t, "payments")
	r.compromise(t, "payments", 2)
	r.keep(t, "payments")
	r.wantStates(t, "payments", "verify-only compromised active pending")
	ahead = 27 * time.Hour // the hours expire, without a request
	ready("<nil>")
	r.condition(t, appliance.Operational, "")
}
