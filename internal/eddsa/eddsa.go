// Package eddsa verifies Ed25519 signatures by the strictest rules in use, and judges public keys by them.
//
// The rules are those of RFC 8032 section 5.1.7 with what ed25519-dalek calls verify_strict on top:
//
//   - the public key A and the commitment R are canonical encodings of points on the curve (y < 2^255-19, and no
//     sign bit where x is 0);
//   - neither A nor R has small order, so that no signature is valid for two messages or under no secret at all;
//   - S is reduced (S < L);
//   - the equation is checked without the cofactor, and with k reduced mod L: [S]B = R + [k]A.
//
// Two verifiers that follow these rules never disagree about a signature.
package eddsa

import (
	"crypto/ed25519"
	"crypto/sha512"
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

// PublicKey is a usable public key, read once for many signatures. It is safe for concurrent use.
type PublicKey struct {
	encoded [ed25519.PublicKeySize]byte
	minus   edwards25519.Point // -A
}

// ParsePublicKey refuses what is not a usable public key: a wrong length, a non-canonical encoding, no point on the
// curve, or a point of small order.
func ParsePublicKey(key []byte) (*PublicKey, error) {
	if len(key) != ed25519.PublicKeySize {
		return nil, ErrKeySize
	}
	// SetBytes alone takes y >= p and a sign bit on x = 0: only the one encoding that the point has comes back.
	a, err := new(edwards25519.Point).SetBytes(key)
	if err != nil || string(a.Bytes()) != string(key) {
		return nil, ErrKeyEncoding
	}
	if smallOrder(a) {
		return nil, ErrKeySmallOrder
	}
	k := &PublicKey{encoded: [ed25519.PublicKeySize]byte(key)}
	k.minus.Negate(a)
	return k, nil
}

// Verify checks a 64-byte signature (R || S) over message by the rules of the package.
func (k *PublicKey) Verify(message, signature []byte) error {
	if len(signature) != ed25519.SignatureSize {
		return ErrSignature
	}
	s, err := new(edwards25519.Scalar).SetCanonicalBytes(signature[32:])
	if err != nil {
		return ErrSignature
	}
	hash := sha512.New()
	hash.Write(signature[:32])
	hash.Write(k.encoded[:])
	hash.Write(message)
	challenge, err := new(edwards25519.Scalar).SetUniformBytes(hash.Sum(nil))
	if err != nil {
		return ErrSignature
	}
	// R = [S]B - [k]A. The comparison is of encodings: an R that is not canonical, or no point, has no equal.
	r := new(edwards25519.Point).VarTimeDoubleScalarBaseMult(challenge, &k.minus, s)
	if string(r.Bytes()) != string(signature[:32]) || smallOrder(r) {
		return ErrSignature
	}
	return nil
}

// CheckPublicKey is ParsePublicKey for its error.
func CheckPublicKey(key []byte) error {
	_, err := ParsePublicKey(key)
	return err
}

// Verify checks a signature by the rules of the package. The error is one of the sentinels above.
func Verify(key, message, signature []byte) error {
	k, err := ParsePublicKey(key)
	if err != nil {
		return err
	}
	return k.Verify(message, signature)
}

func smallOrder(p *edwards25519.Point) bool {
	return new(edwards25519.Point).MultByCofactor(p).Equal(edwards25519.NewIdentityPoint()) == 1
}
