// Package eddsa verifies Ed25519 signatures by the strictest rules in use, and checks public keys
// by the same rules. Sign makes signatures with keys outside Go's heap.
//
// The rules are those of RFC 8032 section 5.1.7, of verify_strict in ed25519-dalek, and one more:
//
//   - the public key A and the commitment R are canonical encodings of points on the curve
//     (y < 2^255-19, and no sign bit for x = 0);
//   - A has prime order L, as every key that is made by RFC 8032: no signature is valid without a
//     secret, and no secret has a second public key, which would be A and a point of small order;
//   - R does not have small order;
//   - S is reduced (S < L);
//   - the equation is checked without the cofactor, and with k reduced mod L: [S]B = R + [k]A.
//
// Two verifiers with these rules never disagree about a signature.
package eddsa

import (
	"crypto/ed25519"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"sync/atomic"

	"filippo.io/edwards25519"
)

// Errors of a refused key or signature.
var (
	ErrKeySize       = errors.New("an Ed25519 public key has 32 bytes")
	ErrKeyEncoding   = errors.New("the public key is not the canonical encoding of a point on edwards25519")
	ErrKeySmallOrder = errors.New("the public key is a point of small order")
	ErrKeyMixedOrder = errors.New("the public key is a point of mixed order, which RFC 8032 makes of no private key")
	ErrSignature     = errors.New("the signature does not verify")
)

// PublicKey is a parsed public key for the verification of many signatures. A PublicKey is safe for
// concurrent use.
type PublicKey struct {
	encoded [ed25519.PublicKeySize]byte
	minus   edwards25519.Point // -A

	uses  atomic.Uint64         // verifications
	table atomic.Pointer[table] // of -A; nil: none yet
}

// ParsePublicKey parses a public key of 32 bytes. Errors are a wrong length (ErrKeySize), a
// non-canonical encoding or no point on the curve (ErrKeyEncoding), a point of small order
// (ErrKeySmallOrder), and the sum of such a point and one of prime order (ErrKeyMixedOrder).
func ParsePublicKey(key []byte) (*PublicKey, error) {
	if len(key) != ed25519.PublicKeySize {
		return nil, ErrKeySize
	}
	slot := &recent[binary.LittleEndian.Uint16(key)%uint16(len(recent))]
	if k := slot.Load(); k != nil && string(k.encoded[:]) == string(key) {
		return k, nil
	}
	// SetBytes accepts y >= p and a sign bit for x = 0. Bytes returns the canonical encoding, so
	// the comparison refuses any other.
	a, err := new(edwards25519.Point).SetBytes(key)
	if err != nil || string(a.Bytes()) != string(key) {
		return nil, ErrKeyEncoding
	}
	if smallOrder(a) {
		return nil, ErrKeySmallOrder
	}
	k := &PublicKey{encoded: [ed25519.PublicKeySize]byte(key)}
	k.minus.Negate(a)
	// [L]A is the identity if and only if [L-1]A = -A.
	if new(edwards25519.Point).VarTimeDoubleScalarBaseMult(minusOne, a, zero).Equal(&k.minus) != 1 {
		return nil, ErrKeyMixedOrder
	}
	slot.Store(k)
	return k, nil
}

// recent has keys that were parsed lately, at most one for each value of their first bits. The
// check of the order costs as much as the verification of a signature, and a document names the
// same parties again and again. Public keys are no secret.
var recent [1024]atomic.Pointer[PublicKey]

// zero and minusOne are scalars mod L.
var (
	zero     = edwards25519.NewScalar()
	minusOne = edwards25519.NewScalar().Subtract(zero, one())
)

func one() *edwards25519.Scalar {
	s, err := edwards25519.NewScalar().SetCanonicalBytes(append([]byte{1}, make([]byte, 31)...))
	if err != nil {
		panic("eddsa: " + err.Error()) // unreachable: 1 is canonical
	}
	return s
}

// Verify checks a signature of 64 bytes (R || S) over message by the rules of the package. The
// error is ErrSignature.
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
	// R = [S]B - [k]A. The comparison of encodings refuses a non-canonical R and an R without a
	// point.
	if r := k.commitment(s, challenge); r != [32]byte(signature) || smallOrders[r] {
		return ErrSignature
	}
	return nil
}

// commitment returns the encoding of [s]B - [challenge]A.
func (k *PublicKey) commitment(s, challenge *edwards25519.Scalar) [32]byte {
	k.used()
	if t := k.table.Load(); t != nil {
		return t.combination(s, challenge)
	}
	return [32]byte(new(edwards25519.Point).VarTimeDoubleScalarBaseMult(challenge, &k.minus, s).Bytes())
}

// CheckPublicKey returns the error of ParsePublicKey.
func CheckPublicKey(key []byte) error {
	_, err := ParsePublicKey(key)
	return err
}

// Verify checks a signature by the rules of the package. Errors are those of ParsePublicKey and
// ErrSignature.
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
