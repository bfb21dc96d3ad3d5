package eddsa

import (
	"crypto/ed25519"
	"crypto/sha512"

	"filippo.io/edwards25519"
)

// ExpandedSize is the size of an expanded private key: the SHA-512 of the seed (RFC 8032 section 5.1.5, step 1).
const ExpandedSize = sha512.Size

// Expand writes the expanded key of a 32-byte seed to expanded, which has ExpandedSize bytes.
func Expand(expanded, seed []byte) {
	h := sha512.Sum512(seed)
	copy(expanded, h[:])
	clear(h[:])
}

// Public writes the public key of an expanded key to public, which has 32 bytes.
func Public(public, expanded []byte) {
	var s edwards25519.Scalar
	s.SetBytesWithClamping(expanded[:32]) // the error is for other lengths
	var a edwards25519.Point
	copy(public, a.ScalarBaseMult(&s).Bytes())
}

// Sign writes the signature of a message to signature, which has 64 bytes (RFC 8032 section 5.1.6). Nothing of the private
// key is kept, and nothing of it goes to the heap: crypto/ed25519 keeps what it makes of a key for later, and takes keys on
// Go's heap only.
func Sign(signature, expanded, public, message []byte) {
	var s, r, k edwards25519.Scalar
	s.SetBytesWithClamping(expanded[:32])
	var digest [sha512.Size]byte

	h := sha512.New()
	h.Write(expanded[32:ExpandedSize])
	h.Write(message)
	r.SetUniformBytes(h.Sum(digest[:0]))
	var point edwards25519.Point
	copy(signature, point.ScalarBaseMult(&r).Bytes())

	h.Reset()
	h.Write(signature[:32])
	h.Write(public[:ed25519.PublicKeySize])
	h.Write(message)
	k.SetUniformBytes(h.Sum(digest[:0]))
	copy(signature[32:], k.MultiplyAdd(&k, &s, &r).Bytes())
	clear(digest[:])
}
