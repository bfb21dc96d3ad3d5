package keystore_test

import (
	"strings"
	"testing"

	"countersign/internal/keystore"
	"countersign/internal/keystore/keystoretest"
)

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

// TestSeedOfZeros reads the seed that everybody has, in each format.
func TestSeedOfZeros(t *testing.T) {
	zeros := strings.Repeat("\x00", 32)
	for _, text := range []string{
		zeros, strings.Repeat("00", 32), strings.Repeat("00", 32) + "\n", "keypair-seed:" + strings.Repeat("A", 43),
	} {
		if _, err := keystore.ParseSeed([]byte(text)); err == nil || !strings.Contains(err.Error(), "all zero") {
			t.Errorf("%q: %v", text, err)
		}
	}
	if _, err := keystore.ParseSeed([]byte(zeros[1:] + "\x01")); err != nil {
		t.Error(err)
	}
}
