package eddsa_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"math/big"
	"slices"
	"testing"

	"countersign/eddsa"

	"filippo.io/edwards25519"
)

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// torsion returns the canonical encodings of the eight points whose order divides 8.
func torsion(t *testing.T) [][]byte {
	t.Helper()
	// A generator of the torsion group: L times any point outside the prime-order group.
	l, _ := new(big.Int).SetString("7237005577332262213973186563042994240857116359379907606001950938285454250989", 10)
	for y := byte(2); ; y++ {
		p, err := new(edwards25519.Point).SetBytes(append([]byte{y}, make([]byte, 31)...))
		if err != nil {
			continue
		}
		g := edwards25519.NewIdentityPoint()
		for i := l.BitLen() - 1; i >= 0; i-- {
			g.Add(g, g)
			if l.Bit(i) == 1 {
				g.Add(g, p)
			}
		}
		var all [][]byte
		q := edwards25519.NewIdentityPoint()
		for range 8 {
			all = append(all, q.Bytes())
			q = new(edwards25519.Point).Add(q, g)
		}
		if distinct := slices.CompactFunc(slices.SortedFunc(slices.Values(all), slices.Compare), slices.Equal); len(distinct) == 8 {
			return all
		}
	}
}

func TestRFC8032Vectors(t *testing.T) {
	// RFC 8032 section 7.1, tests 1 to 3.
	for _, v := range []struct{ key, msg, sig string }{
		{"d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a", "",
			"e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"},
		{"3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c", "72",
			"92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"},
		{"fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025", "af82",
			"6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"},
	} {
		if err := eddsa.Verify(unhex(t, v.key), unhex(t, v.msg), unhex(t, v.sig)); err != nil {
			t.Errorf("%s: %v", v.key[:8], err)
		}
	}
}

func TestEveryFlippedBitIsRefused(t *testing.T) {
	seed := make([]byte, 32)
	key := ed25519.NewKeyFromSeed(seed)
	pub, msg := []byte(key.Public().(ed25519.PublicKey)), []byte("a message")
	sig := ed25519.Sign(key, msg)
	if err := eddsa.Verify(pub, msg, sig); err != nil {
		t.Fatal(err)
	}
	for i := range len(sig) * 8 {
		bad := slices.Clone(sig)
		bad[i/8] ^= 1 << (i % 8)
		if eddsa.Verify(pub, msg, bad) == nil {
			t.Fatalf("accepted with bit %d of the signature flipped", i)
		}
	}
	for i := range len(pub) * 8 {
		bad := slices.Clone(pub)
		bad[i/8] ^= 1 << (i % 8)
		if eddsa.Verify(bad, msg, sig) == nil {
			t.Fatalf("accepted with bit %d of the key flipped", i)
		}
	}
}

func TestSmallOrderKeysAreRefused(t *testing.T) {
	// With a key of small order, S = 0 and R = -[k]A verifies in crypto/ed25519 for one message in eight or for all.
	for _, a := range torsion(t) {
		if err := eddsa.CheckPublicKey(a); !errors.Is(err, eddsa.ErrKeySmallOrder) {
			t.Errorf("key %x: %v, want %v", a, err, eddsa.ErrKeySmallOrder)
		}
	}
	identity := append([]byte{1}, make([]byte, 31)...)
	forged := append(slices.Clone(identity), make([]byte, 32)...)
	if !ed25519.Verify(identity, []byte("anything"), forged) {
		t.Fatal("the forgery that this test is about does not work: the test has lost its point")
	}
	if err := eddsa.Verify(identity, []byte("anything"), forged); !errors.Is(err, eddsa.ErrKeySmallOrder) {
		t.Errorf("forged signature: %v", err)
	}
}

func TestSmallOrderCommitmentIsRefused(t *testing.T) {
	// A signer with a known secret s can make R the identity (r = 0): S = k*s. crypto/ed25519 accepts that.
	seed := unhex(t, "0707070707070707070707070707070707070707070707070707070707070707")
	priv := ed25519.NewKeyFromSeed(seed)
	pub := []byte(priv.Public().(ed25519.PublicKey))
	msg := []byte("a message")
	sig := signWithZeroNonce(t, seed, pub, msg)
	if !ed25519.Verify(pub, msg, sig) {
		t.Fatal("the signature that this test is about does not verify loosely: the test has lost its point")
	}
	if err := eddsa.Verify(pub, msg, sig); !errors.Is(err, eddsa.ErrSignature) {
		t.Errorf("R of small order: %v, want %v", err, eddsa.ErrSignature)
	}
}

func TestNonCanonicalEncodingsAreRefused(t *testing.T) {
	p := new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 255), big.NewInt(19))
	for _, c := range []struct {
		name string
		y    *big.Int
		sign byte
	}{
		{"y = p + 1, the identity again", new(big.Int).Add(p, big.NewInt(1)), 0},
		{"y = p + 3", new(big.Int).Add(p, big.NewInt(3)), 0},
		{"y = 2^255 - 1", new(big.Int).Add(p, big.NewInt(18)), 0},
		{"x = 0 with the sign bit", big.NewInt(1), 0x80},
	} {
		enc := c.y.FillBytes(make([]byte, 32))
		slices.Reverse(enc)
		enc[31] |= c.sign
		if err := eddsa.CheckPublicKey(enc); !errors.Is(err, eddsa.ErrKeyEncoding) {
			t.Errorf("%s: %v, want %v", c.name, err, eddsa.ErrKeyEncoding)
		}
	}
	for _, n := range []int{0, 31, 33} {
		if err := eddsa.CheckPublicKey(make([]byte, n)); !errors.Is(err, eddsa.ErrKeySize) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

func TestUnreducedScalarIsRefused(t *testing.T) {
	l, _ := new(big.Int).SetString("7237005577332262213973186563042994240857116359379907606001950938285454250989", 10)
	key := ed25519.NewKeyFromSeed(make([]byte, 32))
	sig := ed25519.Sign(key, []byte("m"))
	s := slices.Clone(sig[32:])
	slices.Reverse(s)
	le := new(big.Int).Add(new(big.Int).SetBytes(s), l).FillBytes(make([]byte, 32))
	slices.Reverse(le)
	bad := append(slices.Clone(sig[:32]), le...)
	if err := eddsa.Verify(key.Public().(ed25519.PublicKey), []byte("m"), bad); !errors.Is(err, eddsa.ErrSignature) {
		t.Errorf("S + L: %v", err)
	}
}

func signWithZeroNonce(t *testing.T, seed, pub, msg []byte) []byte {
	t.Helper()
	h := sha512.Sum512(seed)
	s, err := new(edwards25519.Scalar).SetBytesWithClamping(h[:32])
	if err != nil {
		t.Fatal(err)
	}
	r := edwards25519.NewIdentityPoint().Bytes()
	kh := sha512.Sum512(slices.Concat(r, pub, msg))
	k, err := new(edwards25519.Scalar).SetUniformBytes(kh[:])
	if err != nil {
		t.Fatal(err)
	}
	return append(r, new(edwards25519.Scalar).Multiply(k, s).Bytes()...)
}

// TestSignAsTheStandardLibrary: signing is deterministic, so two right programs agree in every bit.
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
		if !slices.Equal(public, standard.Public().(ed25519.PublicKey)) || !slices.Equal(signature, ed25519.Sign(standard, message)) {
			t.Fatalf("another signature with seed %x of %x", seed, message)
		}
	}
}

// TestSignLeavesNothingOnTheHeap: what is there stays until it is overwritten.
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
