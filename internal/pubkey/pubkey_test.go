package pubkey_test

import (
	"bytes"
	"crypto/ecdh"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"math/big"
	"os"
	"os/exec"
	"slices"
	"testing"

	"countersign/internal/keystore/keystoretest"
	"countersign/internal/pubkey"
)

// encode is the little-endian encoding of a number in 32 bytes.
func encode(n *big.Int) []byte {
	b := n.FillBytes(make([]byte, 32))
	slices.Reverse(b)
	return b
}

// TestX25519KeyHasOneEncoding checks numbers around the prime p = 2^255 - 19, where two encodings
// of a key begin, and the top bit, which X25519 ignores.
func TestX25519KeyHasOneEncoding(t *testing.T) {
	p := new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 255), big.NewInt(19))
	for n := int64(-40); n < 19; n++ {
		err := pubkey.CheckX25519(encode(new(big.Int).Add(p, big.NewInt(n))))
		want := error(nil)
		if n >= 0 {
			want = pubkey.ErrX25519Encoding
		} else if n == -1 {
			want = pubkey.ErrX25519LowOrder
		}
		if !errors.Is(err, want) {
			t.Errorf("p%+d: %v, want %v", n, err, want)
		}
	}
	for range 200 {
		key, err := ecdh.X25519().GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		public := key.PublicKey().Bytes()
		if err := pubkey.CheckX25519(public); err != nil {
			t.Errorf("%x: %v", public, err)
		}
		public[31] |= 0x80
		if err := pubkey.CheckX25519(public); !errors.Is(err, pubkey.ErrX25519Encoding) {
			t.Errorf("%x: %v", public, err)
		}
	}
	for _, n := range []int{0, 31, 33} {
		if err := pubkey.CheckX25519(make([]byte, n)); !errors.Is(err, pubkey.ErrX25519Size) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

// TestLowOrderAgreesWithECDH compares LowOrder with crypto/ecdh, whose ECDH refuses a shared secret
// of zero and therefore exactly the points of low order. CheckX25519 refuses all their encodings.
func TestLowOrderAgreesWithECDH(t *testing.T) {
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	low := keystoretest.LowOrderPoints()
	if len(low) != 14 {
		t.Errorf("%d points, want 7 with and without the top bit", len(low))
	}
	points := slices.Clone(low)
	for u := range byte(100) {
		points = append(points, [32]byte{u})
	}
	for i, point := range points {
		public, err := ecdh.X25519().NewPublicKey(point[:])
		if err != nil {
			t.Fatal(err)
		}
		_, err = key.ECDH(public)
		if pubkey.LowOrder(point) != (err != nil) || i < len(low) && err == nil {
			t.Errorf("%x: %v", point, err)
		}
		if refused := pubkey.CheckX25519(point[:]); (refused != nil) != (err != nil) {
			t.Errorf("%x is checked: %v", point, refused)
		}
	}
}

// TestX25519AgainstOpenSSL asks openssl whether a secret is shared with a key.
func TestX25519AgainstOpenSSL(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		if os.Getenv("REQUIRE_DEVICES") == "1" {
			t.Fatal("openssl is required and missing")
		}
		t.Skip("openssl is missing: install openssl")
	}
	dir := t.TempDir()
	own := dir + "/own.pem"
	make := exec.Command("openssl", "genpkey", "-algorithm", "X25519", "-out", own)
	if out, err := make.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	good, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, point := range append(keystoretest.LowOrderPoints(), [32]byte(good.PublicKey().Bytes())) {
		key := point[:]
		der, _ := hex.DecodeString("302a300506032b656e032100" + hex.EncodeToString(key)) // RFC 8410
		derive := exec.Command("openssl", "pkeyutl", "-derive", "-inkey", own,
			"-peerkey", "/dev/stdin", "-peerform", "DER")
		derive.Stdin = bytes.NewReader(der)
		if foreign, ours := derive.Run(), pubkey.CheckX25519(key); (foreign == nil) != (ours == nil) {
			t.Errorf("%x: openssl %v, ours %v", key, foreign, ours)
		}
	}
}

// TestP256KeyIsOnTheCurve changes a coordinate, the form and the length of a good key.
func TestP256KeyIsOnTheCurve(t *testing.T) {
	key, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := key.PublicKey().Bytes()
	if err := pubkey.CheckP256(good); err != nil {
		t.Fatal(err)
	}
	off := bytes.Clone(good)
	off[64] ^= 1
	prime := elliptic.P256().Params().P
	unreduced := bytes.Clone(good) // (0, y) with p in the place of 0
	y := new(big.Int).ModSqrt(elliptic.P256().Params().B, prime)
	prime.FillBytes(unreduced[1:33])
	y.FillBytes(unreduced[33:])
	for what, bad := range map[string][]byte{
		"no point": off, "unreduced": unreduced, "compressed": append([]byte{2}, good[1:33]...),
		"hybrid": append([]byte{6}, good[1:]...), "infinity": {0}, "zero": append([]byte{4}, make([]byte, 64)...),
		"short": good[:64], "long": append(bytes.Clone(good), 0), "empty": nil,
	} {
		if err := pubkey.CheckP256(bad); !errors.Is(err, pubkey.ErrP256) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
