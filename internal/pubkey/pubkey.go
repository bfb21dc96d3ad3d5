// Package pubkey checks a public key at the door through which the key enters: before the key is
// enrolled, proposed, imported, pinned or believed. Each key has one encoding then, and no key
// without a private key gets in. Package eddsa has the check of Ed25519 keys.
package pubkey

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"errors"
)

// Errors of a refused key.
var (
	ErrX25519Size     = errors.New("an X25519 public key has 32 bytes")
	ErrX25519Encoding = errors.New("the X25519 public key is not canonical: its number must be less than 2^255 - 19")
	ErrX25519LowOrder = errors.New("the X25519 public key is a point of low order, with which no secret is shared")
	ErrP256           = errors.New("the public key is not an uncompressed point of 65 bytes on P-256")
)

// CheckX25519 refuses a key of another length than 32 bytes, an encoding that is not canonical
// (RFC 7748 section 5: the top bit is set, or the number is 2^255 - 19 or more), and a point of low
// order (section 6.1: the shared secret is zero). X25519 itself takes two encodings for one key, so
// a second enrolment of the key would outlive the first one's suspension.
func CheckX25519(key []byte) error {
	switch {
	case len(key) != 32:
		return ErrX25519Size
	// The number is p or more if all bits from 8 to 254 are set, and the low byte is 0xed or more.
	case key[31]&0x80 != 0,
		key[31] == 0x7f && key[0] >= 0xed && bytes.Count(key[1:31], []byte{0xff}) == 30:
		return ErrX25519Encoding
	case LowOrder([32]byte(key)):
		return ErrX25519LowOrder
	}
	return nil
}

// lowOrder has the points with an all-zero X25519 shared secret for every private key: the
// u-coordinates of order 1, 2, 4 and 8 on the curve and its twist, and the non-canonical encodings
// p and p+1 (RFC 7748, sections 6.1 and 7).
var lowOrder = map[[32]byte]bool{
	{}:  true,
	{1}: true,
	{0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a,
		0xda, 0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00}: true,
	{0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef, 0x5b,
		0x04, 0x44, 0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f, 0x11, 0x57}: true,
	nearP(0xec): true, // p - 1
	nearP(0xed): true, // p
	nearP(0xee): true, // p + 1
}

// nearP is the little-endian encoding of 2^255 - 256 + low, for values close to p = 2^255 - 19.
func nearP(low byte) (u [32]byte) {
	for i := range u {
		u[i] = 0xff
	}
	u[0], u[31] = low, 0x7f
	return u
}

// LowOrder reports an X25519 point of low order, in any encoding: the top bit is ignored (RFC 7748
// section 5). A static key has the stricter CheckX25519; LowOrder is for ephemeral keys, which may
// have any encoding.
func LowOrder(point [32]byte) bool {
	point[31] &= 0x7f
	return lowOrder[point]
}

// CheckP256 refuses everything but an uncompressed point on the curve (SEC 1 section 2.3.3). Each
// such point but infinity, which has another encoding, has the prime order of the curve.
func CheckP256(key []byte) error {
	if _, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), key); err != nil {
		return ErrP256
	}
	return nil
}
