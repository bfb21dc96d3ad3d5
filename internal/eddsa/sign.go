package eddsa

import (
	"crypto/ed25519"
	"crypto/sha512"

	"filippo.io/edwards25519"
)

// ExpandedSize is the size of an expanded private key in bytes. The expanded key is the SHA-512 of
// the seed (RFC 8032 section 5.1.5, step 1).
const ExpandedSize = sha512.Size

// Expand writes the expanded key of a seed to expanded. The seed has 32 bytes, and expanded has
// ExpandedSize.
func Expand(expanded, seed []byte) {
	h := sha512.Sum512(seed)
	copy(expanded, h[:])
	clear(h[:])
}

// Public writes the public key of an expanded key to public. The slice public has 32 bytes.
func Public(public, expanded []byte) {
	var s edwards25519.Scalar
	s.SetBytesWithClamping(expanded[:32]) // fails only for another length
	var a edwards25519.Point
	copy(public, a.ScalarBaseMult(&s).Bytes())
}

// Sign writes the signature of a message to signature (RFC 8032 section 5.1.6). The slice signature
// has 64 bytes. Sign makes no copy of the private key on the heap and caches none. crypto/ed25519
// is no alternative: it caches expanded keys, and accepts only keys on Go's heap.
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
