package keystore

import (
	"bytes"
	"crypto/ecdh"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"

	"countersign/internal/secret"
)

// seedPrefix marks the seed format of Paykit's Locks server.
const seedPrefix = "keypair-seed:"

// ParseSeed reads a seed in one of three formats: 32 raw bytes, one line with 64 hex digits, or one
// line with keypair-seed: and base64url. A seed of zeros is refused: it comes from an empty disk or
// a failed generator, and everybody has it. The error has no part of the seed.
func ParseSeed(b []byte) (secret.Bytes, error) {
	seed, err := decodeSeed(b)
	if err == nil && seed == [32]byte{} {
		err = errors.New("the seed is all zero, so everybody has it: make another")
	}
	if err != nil {
		return secret.Bytes{}, err
	}
	return secret.New(seed[:]), nil
}

func decodeSeed(b []byte) (seed [32]byte, err error) {
	if len(b) == len(seed) {
		return [32]byte(b), nil
	}
	text := bytes.TrimRight(b, "\r\n")
	buf := make([]byte, 64)
	defer clear(buf)
	n := 0
	if coded, ok := bytes.CutPrefix(text, []byte(seedPrefix)); ok && len(coded) <= 44 {
		n, err = base64.RawURLEncoding.Strict().Decode(buf, bytes.TrimRight(coded, "="))
	} else if len(text) == hex.EncodedLen(len(seed)) {
		n, err = hex.Decode(buf, text)
	}
	if err != nil || n != len(seed) {
		return seed, errors.New("a seed must be 32 bytes, or their 64 hex digits, or keypair-seed: and their base64url")
	}
	return [32]byte(buf[:n]), nil
}

// PublicOf returns the public key of a private key of 32 bytes, in the form of Info: of the seed of
// Ed25519, of the scalar of X25519, or of that of P-256, whose highest byte is the first.
func PublicOf(alg Algorithm, private secret.Bytes) ([]byte, error) {
	curve := ecdh.X25519()
	switch alg {
	case Ed25519:
		expanded := ed25519.NewKeyFromSeed(private.Expose())
		defer clear(expanded)
		return bytes.Clone(expanded[32:]), nil
	case P256:
		curve = ecdh.P256()
	case X25519:
	default:
		return nil, fmt.Errorf("%w: unknown algorithm %q", ErrRefused, alg)
	}
	key, err := curve.NewPrivateKey(private.Expose())
	if err != nil { // without the text, which may have the key
		return nil, fmt.Errorf("%w: this is no private key of %s", ErrRefused, alg)
	}
	return key.PublicKey().Bytes(), nil
}
