package keystore_test

import (
	"crypto/ecdh"
	"crypto/rand"
	"strings"
	"testing"

	"countersign/internal/keystore"
	"countersign/internal/keystore/keystoretest"
)

// TestLowOrderAgreesWithECDH compares LowOrder with crypto/ecdh, whose ECDH refuses a shared secret
// of zero and therefore exactly the points of low order.
func TestLowOrderAgreesWithECDH(t *testing.T) {
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	points := keystoretest.LowOrderPoints()
	for _, p := range points {
		pub, _ := ecdh.X25519().NewPublicKey(p[:])
		if _, err := key.ECDH(pub); err == nil {
			t.Errorf("%x is not of low order", p)
		}
		if !keystore.LowOrder(p) {
			t.Errorf("%x is accepted", p)
		}
	}
	if len(points) != 14 {
		t.Errorf("%d points, want 7 with and without the top bit", len(points))
	}
	for u := range byte(100) {
		pub, _ := ecdh.X25519().NewPublicKey(append([]byte{u}, make([]byte, 31)...))
		_, err := key.ECDH(pub)
		if keystore.LowOrder([32]byte{u}) != (err != nil) {
			t.Errorf("u = %d: %v", u, err)
		}
	}
}

func TestRef(t *testing.T) {
	for _, r := range []keystore.Ref{{Name: "payments", Version: 1}, {Name: "a-1", Version: 4294967295}} {
		if got, err := keystore.ParseRef(r.String()); err != nil || got != r {
			t.Errorf("%v: %v, %v", r, got, err)
		}
	}
	for _, s := range []string{
		"", "a", "a/", "/1", "a/0", "a/01", "a/-1", "a/1/2", "A/1", "-a/1", "a b/1", "a/4294967296",
		strings.Repeat("a", 65) + "/1",
	} {
		if r, err := keystore.ParseRef(s); err == nil {
			t.Errorf("%q is read as %v", s, r)
		}
	}
}

// TestMemory runs the conformance suite on its own in-memory store.
func TestMemory(t *testing.T) {
	keystoretest.Run(t, func(*testing.T) keystore.Store { return keystoretest.NewMemory() })
}
