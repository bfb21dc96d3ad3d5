// Package keystore is the contract of a private key that lives elsewhere: in a PKCS#11 token, sealed by a TPM, behind a
// process boundary. Backends implement Store and Key; keystoretest holds them to it.
package keystore

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/sha256"
	"encoding/hex"
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
	P256    Algorithm = "p256"    // Sign, ECDSA on NIST P-256 with SHA-256, FIPS 186-5; for TLS
)

// Algorithms lists all of them.
var Algorithms = []Algorithm{Ed25519, X25519, P256}

// Custody says where a private key is while it rests and while it is used. It is shown wherever a key is shown.
type Custody string

const (
	// HSMResident keys never leave the token.
	HSMResident Custody = "hsm-resident"
	// TPMResident keys never leave the TPM.
	TPMResident Custody = "tpm-resident"
	// TPMSealed keys rest encrypted by the TPM, which gives them out to this machine in the state that they were sealed to;
	// in use they are in protected memory of a key worker.
	TPMSealed Custody = "tpm-sealed"
)

// How a Store fails. Each error of a Store or Key wraps one of them, or says that the caller asked for something
// impossible.
var (
	ErrNotFound    = errors.New("no such key in the keystore")
	ErrExists      = errors.New("the keystore has objects under this name already")
	ErrAmbiguous   = errors.New("the keystore has more than one object under this name")
	ErrUnfit       = errors.New("the key does not have the protection that is asked of it")
	ErrRefused     = errors.New("the keystore refuses to do this with the key")
	ErrUnavailable = errors.New("the keystore does not answer") // may be tried again later
	ErrAuth        = errors.New("the keystore refuses the PIN") // must not be tried again: the PIN would lock
	ErrSealed      = errors.New("the machine is not in the state that the key was sealed to")
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

// MarshalText and UnmarshalText make a Ref name/version in JSON.
func (r Ref) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

func (r *Ref) UnmarshalText(b []byte) (err error) {
	*r, err = ParseRef(string(b))
	return err
}

// Tag marks what one creation makes, so that clearing away what it left behind can't touch anything else. It is random.
type Tag [16]byte

// MarshalText and UnmarshalText make a Tag 32 hex digits in JSON.
func (t Tag) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, t[:]), nil }

func (t *Tag) UnmarshalText(b []byte) error {
	if len(b) != hex.EncodedLen(len(t)) {
		return errors.New("a tag has 32 hex digits")
	}
	_, err := hex.Decode(t[:], b)
	return err
}

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

// Info describes a key. It is all that is needed to use one: see Store.Bind.
type Info struct {
	Ref        Ref        `json:"ref"`
	Algorithm  Algorithm  `json:"algorithm"`
	PublicKey  []byte     `json:"public_key"` // 32 bytes; for P-256 65, an uncompressed point (SEC 1, section 2.3.3)
	Custody    Custody    `json:"custody"`
	Provenance Provenance `json:"provenance"`
	Tag        Tag        `json:"tag"` // of its creation
}

// Provenance is what the device says of a key's life. A resident key is not extractable now in any case.
type Provenance struct {
	Local            bool `json:"local"`             // made inside the device (CKA_LOCAL)
	AlwaysSensitive  bool `json:"always_sensitive"`  // was never readable (CKA_ALWAYS_SENSITIVE)
	NeverExtractable bool `json:"never_extractable"` // could never be wrapped and taken out (CKA_NEVER_EXTRACTABLE)
}

// Generated reports that the private key has never been anywhere else. Any other key is imported, for ever.
func (p Provenance) Generated() bool { return p.Local && p.AlwaysSensitive && p.NeverExtractable }

// String gives generated or imported.
func (p Provenance) String() string {
	if p.Generated() {
		return "generated"
	}
	return "imported"
}

// Verify judges a signature that a device returned: Ed25519 over message, or ECDSA over its SHA-256. The key is ours and
// known to be sound, so that this is not the place for the strict rules that a stranger's key needs.
func (i Info) Verify(message, signature []byte) bool {
	switch i.Algorithm {
	case Ed25519:
		return len(i.PublicKey) == ed25519.PublicKeySize && ed25519.Verify(i.PublicKey, message, signature)
	case P256:
		key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), i.PublicKey)
		digest := sha256.Sum256(message)
		return err == nil && ecdsa.VerifyASN1(key, digest[:], signature)
	}
	return false
}

// Store is where keys are. It is safe for concurrent use. ctx bounds the wait for the device. A backend whose device may
// not come back from a call can't always keep to that; package worker makes a Store that does.
type Store interface {
	// Key returns exactly one key, or an error: ErrNotFound, ErrAmbiguous, ErrUnfit.
	Key(ctx context.Context, ref Ref) (Key, error)
	// Bind returns the key that info describes without asking the device, which may be away. The device is held against
	// info when the key is used: one that has another key there gives an error.
	Bind(info Info) Key
	// Keys lists the keys of this appliance. What is half made or ambiguous is left out.
	Keys(ctx context.Context) ([]Info, error)
	// Generate makes a key, reads back its protection, and proves it by using it once. It refuses a name under which
	// there are objects already (ErrExists). A crash can leave half a key behind, marked by the tag: see Destroy.
	Generate(ctx context.Context, ref Ref, alg Algorithm, tag Tag) (Key, error)
	// Import makes an Ed25519 key of the seed in the file at path, which is read once by the process that holds the
	// device, and is as Generate otherwise. ParseSeed says what the file may hold. The key can't be taken out again.
	Import(ctx context.Context, ref Ref, path string, tag Tag) (Key, error)
	// Destroy removes what Generate or Import made under this name with this tag, whole or half made, and nothing else.
	// It is for keys that never came into use, or whose destruction has been approved. Nothing to remove is no error.
	Destroy(ctx context.Context, ref Ref, tag Tag) error
	// Inspect says what the device can do and proves it with throw-away keys. It changes nothing that lasts.
	Inspect(ctx context.Context) ([]Finding, error)
	// Status says how the device is, without asking it.
	Status() Status
	// Retry lets the device be asked for a login again after ErrAuth: an operator has seen to the PIN.
	Retry()
	Close() error
}

// Status is what an operator wants to know of a device.
type Status struct {
	Up      bool     `json:"up"`
	Cause   string   `json:"cause,omitempty"` // why not
	Workers []Worker `json:"workers"`         // the processes that use it, where it has some
}

// Worker is the state of one key worker.
type Worker struct {
	PID      int    `json:"pid"`      // 0: there is none now
	Served   uint64 `json:"served"`   // calls, by this process
	Restarts int    `json:"restarts"` // how often it was replaced
}

// Finding is one line of Store.Inspect.
type Finding struct {
	What string    `json:"what"`          // module, token, quirks, mechanism, proof
	For  Algorithm `json:"for,omitempty"` // what keys it is about, if it is about some
	OK   bool      `json:"ok"`            // false: it is missing or does not work
	Text string    `json:"text"`
}

// Judge reports whether a signature that a device has made can be believed.
type Judge func(signature []byte) bool

// Accepts is true for what a judge accepts; none accepts everything.
func (j Judge) Accepts(signature []byte) bool { return j == nil || j(signature) }

// ErrWrong is what a store says of an answer that was judged to be wrong.
var ErrWrong = fmt.Errorf("%w: the device has answered wrongly", ErrUnavailable)

// Key is one key pair whose private half can be used and not read. It is safe for concurrent use and stays valid until
// its store is closed, through reconnections of the device.
type Key interface {
	Info() Info
	// Sign makes an Ed25519 signature of 64 bytes, or an ECDSA signature over the message's SHA-256 in ASN.1 DER (RFC
	// 3279). What judge does not accept is not returned: a store that has another way to the device tries that, and then
	// gives ErrUnavailable. judge may be nil, for those who don't need to be sure.
	Sign(ctx context.Context, message []byte, judge Judge) ([]byte, error)
	// Exchange makes the X25519 shared secret. A point of low order is refused with ErrPeerKey before the device sees it.
	Exchange(ctx context.Context, peer [32]byte) ([32]byte, error)
}

// Counter is a Store whose device has a counter that only rises, whoever asks and whatever is restored from a copy.
type Counter interface {
	// DefineCounter makes the counter, unless it is there.
	DefineCounter(ctx context.Context) error
	// ReadCounter returns its value; ErrNotFound where it has not been defined, or is gone.
	ReadCounter(ctx context.Context) (uint64, error)
	// IncrementCounter makes it rise by one and returns the value after that. After an error it may have risen.
	IncrementCounter(ctx context.Context) (uint64, error)
}

// BatchSigner is a Store that makes several signatures at less cost together than one by one.
type BatchSigner interface {
	// SignBatch sets Signature or Err of each element, as Key.Sign without a judge would give it. The keys are all of
	// this store.
	SignBatch(ctx context.Context, batch []*Signing)
}

// Signing is a signature that is asked for.
type Signing struct {
	Key       Key
	Message   []byte
	Signature []byte
	Err       error
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
