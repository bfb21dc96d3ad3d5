package eddsa_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"countersign/internal/eddsa"
)

// strictCase is a case of testdata/strict.json. An independent implementation made the file, with
// integers and the formulas of RFC 8032 section 6. Lax marks a case invalid in this package and
// valid in crypto/ed25519.
type strictCase struct {
	Comment   string `json:"comment"`
	PublicKey string `json:"public_key"`
	Message   string `json:"message"`
	Signature string `json:"signature"`
	Valid     bool   `json:"valid"`
	Reason    string `json:"reason"`
	Lax       bool   `json:"lax"`
}

// reasons has the error of each reason. lax marks a rule without a counterpart in crypto/ed25519.
// crypto/ed25519 accepts points of small order, like RFC 8032, and keys in any encoding, unlike RFC
// 8032 section 5.1.3. All other rules are the same in both: R compared by its bytes, S reduced, no
// cofactor.
var reasons = map[string]struct {
	err error
	lax bool
}{
	"key length":       {eddsa.ErrKeySize, false},
	"key encoding":     {eddsa.ErrKeyEncoding, true},
	"key small order":  {eddsa.ErrKeySmallOrder, true},
	"key mixed order":  {eddsa.ErrKeyMixedOrder, true},
	"signature length": {eddsa.ErrSignature, false},
	"S not reduced":    {eddsa.ErrSignature, false},
	"R encoding":       {eddsa.ErrSignature, false},
	"R small order":    {eddsa.ErrSignature, true},
	"equation":         {eddsa.ErrSignature, false},
}

// TestStrictCases verifies the cases of testdata/strict.json, and compares the results with
// crypto/ed25519.
func TestStrictCases(t *testing.T) {
	b, err := os.ReadFile("testdata/strict.json")
	if err != nil {
		t.Fatal(err)
	}
	var cases []strictCase
	if err := json.Unmarshal(b, &cases); err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	for _, c := range cases {
		key, message, signature := unhex(t, c.PublicKey), unhex(t, c.Message), unhex(t, c.Signature)
		want, known := reasons[c.Reason]
		if known == c.Valid {
			t.Errorf("%s: valid is %v, the reason is %q", c.Comment, c.Valid, c.Reason)
		}
		if err := eddsa.Verify(key, message, signature); !errors.Is(err, want.err) {
			t.Errorf("%s: %v, want %v", c.Comment, err, want.err)
		}
		if k, err := eddsa.ParsePublicKey(key); err == nil { // the same by tables
			k.MakeTable()
			if err := k.Verify(message, signature); !errors.Is(err, want.err) {
				t.Errorf("%s, by tables: %v, want %v", c.Comment, err, want.err)
			}
		}
		if !strings.HasPrefix(c.Reason, "key ") {
			want.err = nil
		}
		if err := eddsa.CheckPublicKey(key); !errors.Is(err, want.err) {
			t.Errorf("%s: the key: %v, want %v", c.Comment, err, want.err)
		}
		if c.Lax && !want.lax {
			t.Errorf("%s: crypto/ed25519 has the rule %q too", c.Comment, c.Reason)
		}
		// crypto/ed25519 panics with a key of a wrong length.
		if len(key) == ed25519.PublicKeySize && ed25519.Verify(key, message, signature) != (c.Valid || c.Lax) {
			t.Errorf("%s: crypto/ed25519 does not say %v", c.Comment, c.Valid || c.Lax)
		}
		seen[c.Reason]++
		if c.Lax {
			seen["lax "+c.Reason]++
		}
	}
	for reason, rule := range reasons {
		if seen[reason] == 0 || rule.lax && seen["lax "+reason] == 0 {
			t.Errorf("no case of %q, or none that shows what the rule is for", reason)
		}
	}
	if seen[""] < 6 {
		t.Errorf("%d valid signatures", seen[""])
	}
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestEveryFlippedBitIsRefused flips each bit of key, message and signature in turn.
func TestEveryFlippedBitIsRefused(t *testing.T) {
	key := ed25519.NewKeyFromSeed(make([]byte, 32))
	good := [][]byte{key.Public().(ed25519.PublicKey), []byte("a message"), nil}
	good[2] = ed25519.Sign(key, good[1])
	if err := eddsa.Verify(good[0], good[1], good[2]); err != nil {
		t.Fatal(err)
	}
	for part, name := range []string{"key", "message", "signature"} {
		for i := range len(good[part]) * 8 {
			bad := slices.Clone(good)
			bad[part] = slices.Clone(good[part])
			bad[part][i/8] ^= 1 << (i % 8)
			if eddsa.Verify(bad[0], bad[1], bad[2]) == nil {
				t.Fatalf("accepted with bit %d of the %s flipped", i, name)
			}
		}
	}
}

// TestSignAsTheStandardLibrary compares signatures with those of crypto/ed25519. Ed25519 is
// deterministic, so every bit must be equal.
func TestSignAsTheStandardLibrary(t *testing.T) {
	seed := make([]byte, 32)
	for n := range 300 {
		rand.Read(seed)
		message := make([]byte, n*n%4099)
		rand.Read(message)
		standard := ed25519.NewKeyFromSeed(seed)
		expanded, public, signature := make([]byte, eddsa.ExpandedSize), make([]byte, 32), make([]byte, 64)
		eddsa.Expand(expanded, seed)
		eddsa.Public(public, expanded)
		eddsa.Sign(signature, expanded, public, message)
		if !slices.Equal(public, standard.Public().(ed25519.PublicKey)) ||
			!slices.Equal(signature, ed25519.Sign(standard, message)) {
			t.Fatalf("another signature with seed %x of %x", seed, message)
		}
	}
}

// TestSignLeavesNothingOnTheHeap checks that no function allocates. A secret on the heap would stay
// in memory until other data overwrites the secret.
func TestSignLeavesNothingOnTheHeap(t *testing.T) {
	seed, message := make([]byte, 32), make([]byte, 200)
	expanded, public, signature := make([]byte, eddsa.ExpandedSize), make([]byte, 32), make([]byte, 64)
	for what, f := range map[string]func(){
		"Expand": func() { eddsa.Expand(expanded, seed) },
		"Public": func() { eddsa.Public(public, expanded) },
		"Sign":   func() { eddsa.Sign(signature, expanded, public, message) },
	} {
		if n := testing.AllocsPerRun(100, f); n != 0 {
			t.Errorf("%s makes %v allocations", what, n)
		}
	}
}

// TestRecentKeysAreToldApart parses keys whose first bits are equal, good ones and bad ones, again
// and again: a key that was parsed before changes no later result.
func TestRecentKeysAreToldApart(t *testing.T) {
	private := ed25519.NewKeyFromSeed(make([]byte, 32))
	good, signature := private.Public().(ed25519.PublicKey), ed25519.Sign(private, nil)
	keys := [][]byte{good}
	for i := 2; i < 32; i++ {
		other := slices.Clone(good)
		other[i] ^= 1
		keys = append(keys, other)
	}
	var first []error
	for round := range 3 {
		for i, key := range keys {
			parsed, err := eddsa.ParsePublicKey(key)
			if round == 0 {
				first = append(first, err)
			} else if !errors.Is(err, first[i]) || (err == nil) != (first[i] == nil) {
				t.Errorf("%x: %v, and before %v", key, err, first[i])
			}
			if err == nil && (i == 0) != (parsed.Verify(nil, signature) == nil) {
				t.Errorf("%x is taken for another key", key)
			}
		}
	}
}
