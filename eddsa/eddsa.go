// Package eddsa verifies Ed25519 signatures by the strictest rules in use, and judges public keys by them.
//
// The rules are those of RFC 8032 section 5.1.7 with what ed25519-dalek calls verify_strict on top:
//
//   - the public key A and the commitment R are canonical encodings of points on the curve (y < 2^255-19, and no
//     sign bit where x is 0);
//   - neither A nor R has small order, so that no signature is valid for two messages or under no secret at all;
//   - S is reduced (S < L);
//   - the equation is checked without the cofactor: [S]B = R + [k]A.
//
// Two verifiers that follow these rules never disagree about a signature.
package eddsa

import (
	"crypto/ed25519"
	"errors"

	"filippo.io/edwards25519"
)

// Why a key or a signature is refused.
var (
	ErrKeySize       = errors.New("an Ed25519 public key has 32 bytes")
	ErrKeyEncoding   = errors.New("the public key is not the canonical encoding of a point on edwards25519")
	ErrKeySmallOrder = errors.New("the public key is a point of small order")
	ErrSignature     = errors.New("the signature does not verify")
)

// CheckPublicKey refuses what is not a usable public key: a wrong length, a non-canonical encoding, no point on the
// curve, or a point of small order.
func CheckPublicKey(key []byte) error {
	if len(key) != ed25519.PublicKeySize {
		return ErrKeySize
	}
	p, ok := decode(key)
	if !ok {
		return ErrKeyEncoding
	}
	if smallOrder(p) {
		return ErrKeySmallOrder
	}
	return nil
}

// Verify checks a 64-byte signature (R || S) over message by the rules of the package. The error is one of the
// sentinels above.
func Verify(key, message, signature []byte) error {
	if err := CheckPublicKey(key); err != nil {
		return err
	}
	if len(signature) != ed25519.SignatureSize {
		return ErrSignature
	}
	// crypto/ed25519 refuses an S that is not reduced and compares the encoding of R, so a non-canonical R can't pass;
	// what it lets pass is an R of small order.
	r, ok := decode(signature[:32])
	if !ok || smallOrder(r) {
		return ErrSignature
	}
	if !ed25519.Verify(key, message, signature) {
		return ErrSignature
	}
	return nil
}

// decode accepts just the one encoding that the point has. SetBytes alone takes y >= p and a sign bit on x = 0.
func decode(b []byte) (*edwards25519.Point, bool) {
	p, err := new(edwards25519.Point).SetBytes(b)
	if err != nil {
		return nil, false
	}
	return p, string(p.Bytes()) == string(b)
}

func smallOrder(p *edwards25519.Point) bool {
	return new(edwards25519.Point).MultByCofactor(p).Equal(edwards25519.NewIdentityPoint()) == 1
}
