// Package keystore is the contract of a private key that lives elsewhere: in a PKCS#11 token, sealed by a TPM, behind a
// process boundary. Backends implement Store and Key; keystoretest holds them to it.
package keystore

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Algorithm says what a key can do.
type Algorithm string

const (
	Ed25519 Algorithm = "ed25519" // Sign, RFC 8032, pure
	X25519  Algorithm = "x25519"  // Exchange, RFC 7748
)

// Custody says where a private key is while it rests and while it is used. It is shown wherever a key is shown.
type Custody string

// HSMResident keys never leave the token.
const HSMResident Custody = "hsm-resident"

// How a Store fails. Each error of a Store or Key wraps one of them, or says that the caller asked for something
// impossible.
var (
	ErrNotFound    = errors.New("no such key in the keystore")
	ErrExists      = errors.New("the keystore has objects under this name already")
	ErrAmbiguous   = errors.New("the keystore has more than one object under this name")
	ErrUnfit       = errors.New("the key does not have the protection that is asked of it")
	ErrUnavailable = errors.New("the keystore does not answer")          // may be tried again later
	ErrAuth        = errors.New("the keystore refuses the PIN")          // must not be tried again: the PIN would lock
	ErrPeerKey     = errors.New("the peer's public key is of low order") // from Exchange
)

// Ref names a key: one version of a named line.
type Ref struct {
	Name    string // [a-z0-9] then up to 63 of [a-z0-9-]
	Version uint32 // from 1
}

// String gives name/version, as labels and people use it.
func (r Ref) String() string { return fmt.Sprintf("%s/%d", r.Name, r.Version) }

// ParseRef reads what String wrote.
func ParseRef(s string) (Ref, error) {
	name, version, _ := strings.Cut(s, "/")
	v, err := strconv.ParseUint(version, 10, 32)
	if err != nil || v == 0 || strconv.FormatUint(v, 10) != version {
		return Ref{}, fmt.Errorf("%q is not of the form name/version", s)
	}
	return Ref{name, uint32(v)}, CheckName(name)
}

// Tag marks what one creation makes, so that clearing away what it left behind can't touch anything else. It is random.
type Tag [16]byte

// CheckName refuses what can't be a key's name.
func CheckName(name string) error {
	ok := name != "" && len(name) <= 64 && name[0] != '-'
	for i := range len(name) {
		c := name[i]
		ok = ok && (c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-')
	}
	if !ok {
		return errors.New("a name has 1 to 64 lower-case letters, digits and hyphens, and does not begin with a hyphen")
	}
	return nil
}

// Info describes a key.
type Info struct {
	Ref       Ref
	Algorithm Algorithm
	PublicKey []byte // 32 bytes
	Custody   Custody
	// Provenance is what the device says of the key's life. Generated: made inside; NeverLeft: it was never readable or
	// extractable. A resident key is not extractable now in any case.
	Generated bool
	NeverLeft bool
}

// Store is where keys are. It is safe for concurrent use. ctx bounds the wait for the device: when it ends, the call
// returns ErrUnavailable, even if the device never comes back to it.
type Store interface {
	// Key returns exactly one key, or an error: ErrNotFound, ErrAmbiguous, ErrUnfit.
	Key(ctx context.Context, ref Ref) (Key, error)
	// Keys lists the keys of this appliance. What is half made or ambiguous is left out.
	Keys(ctx context.Context) ([]Info, error)
	// Generate makes a key, reads back its protection, and proves it by using it once. It refuses a name under which
	// there are objects already (ErrExists). A crash can leave half a key behind, marked by the tag: see Destroy.
	Generate(ctx context.Context, ref Ref, alg Algorithm, tag Tag) (Key, error)
	// Destroy removes what Generate made under this name with this tag, whole or half made, and nothing else. It is for
	// keys that never came into use, or whose destruction has been approved. Nothing to remove is no error.
	Destroy(ctx context.Context, ref Ref, tag Tag) error
	Close() error
}

// Key is one key pair whose private half can be used and not read. It is safe for concurrent use and stays valid until
// its store is closed, through reconnections of the device.
type Key interface {
	Info() Info
	// Sign makes an Ed25519 signature of 64 bytes. The caller verifies it before it believes it.
	Sign(ctx context.Context, message []byte) ([]byte, error)
	// Exchange makes the X25519 shared secret. A point of low order is refused with ErrPeerKey before the device sees it.
	Exchange(ctx context.Context, peer [32]byte) ([32]byte, error)
}

// lowOrder has the points whose X25519 shared secret is zero whatever the private key: the u-coordinates of order 1, 2,
// 4 and 8 on the curve and its twist, and their representations p and p+1 (RFC 7748 section 6.1 and 7).
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

func nearP(low byte) (u [32]byte) {
	for i := range u {
		u[i] = 0xff
	}
	u[0], u[31] = low, 0x7f
	return u
}

// LowOrder reports a point that Exchange must refuse. The top bit does not count (RFC 7748 section 5).
func LowOrder(point [32]byte) bool {
	point[31] &= 0x7f
	return lowOrder[point]
}
