// Package keystore is the contract of a private key outside this program's memory: in a PKCS#11
// token, sealed by a TPM, or behind a process boundary. Backends implement Store and Key. Package
// keystoretest has the conformance suite. Begin reading at Store.
package keystore

import (
	"bytes"
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
	"time"

	"countersign/internal/secret"
)

// Algorithm names a key's algorithm and, by it, the operation of the key: Sign or Exchange.
type Algorithm string

const (
	Ed25519 Algorithm = "ed25519" // Sign, RFC 8032, pure
	X25519  Algorithm = "x25519"  // Exchange, RFC 7748
	P256    Algorithm = "p256"    // Sign, ECDSA on NIST P-256 with SHA-256, FIPS 186-5; for TLS
)

// Algorithms lists every Algorithm.
var Algorithms = []Algorithm{Ed25519, X25519, P256}

// Custody says where a private key is, at rest and in use. Listings of keys show the custody.
type Custody string

const (
	// HSMResident keys never leave the token.
	HSMResident Custody = "hsm-resident"
	// TPMResident keys never leave the TPM.
	TPMResident Custody = "tpm-resident"
	// TPMSealed keys are at rest encrypted by the TPM. The TPM unseals a key only on this machine,
	// and only in the machine state of the key's policy (PCR values). In use the key is in the
	// protected memory of a key worker.
	TPMSealed Custody = "tpm-sealed"
	// HSMRecoverable and TPMRecoverable keys were made by a key worker, which has sealed them for M
	// of N recovery holders (package escrow). In the token and in use such a key is as one of
	// HSMResident or TPMSealed.
	HSMRecoverable Custody = "hsm-recoverable"
	TPMRecoverable Custody = "tpm-recoverable"
)

// Recoverable reports that holders have a sealed copy of the key.
func (c Custody) Recoverable() bool { return c == HSMRecoverable || c == TPMRecoverable }

// WithCopy returns the custody of a key of which holders have a sealed copy.
func (c Custody) WithCopy() Custody {
	return map[Custody]Custody{HSMResident: HSMRecoverable, TPMSealed: TPMRecoverable}[c]
}

// Errors of a Store or Key wrap one of these sentinels. An error without a sentinel means an
// impossible request of the caller, for example an unknown algorithm.
var (
	ErrNotFound    = errors.New("no such key in the keystore")
	ErrExists      = errors.New("the keystore has objects under this name already")
	ErrAmbiguous   = errors.New("the keystore has more than one object under this name")
	ErrUnfit       = errors.New("the key does not have the protection that is asked of it")
	ErrForm        = errors.New("the key does not sign bytes of this form")
	ErrJournal     = errors.New("the key worker's journal can't be written, so no signature leaves it")
	ErrRefused     = errors.New("the keystore refuses to do this with the key")
	ErrUnavailable = errors.New("the keystore does not answer") // a retry may succeed
	ErrAuth        = errors.New("the keystore refuses the PIN") // retries are forbidden: the PIN would lock
	ErrSealed      = errors.New("the machine is not in the state that the key was sealed to")
	ErrPeerKey     = errors.New("the peer's public key is of low order") // from Exchange
)

// The names of the appliance's own keys. Package form says what each of them signs in place of
// documents.
const (
	NoiseName = "noise"     // the static key of Noise, X25519
	LogName   = "audit-log" // signs checkpoints and webhooks, Ed25519
	AdminName = "admin-tls" // signs TLS handshakes of the admin API, P-256
	CAName    = "admin-ca"  // signs certificates of the admin API, P-256
)

// Ref names a key: one version of a named line of versions, for example payments/1.
type Ref struct {
	Name    string // [a-z0-9] then up to 63 of [a-z0-9-]
	Version uint32 // from 1
}

// String gives name/version. Labels on the device have the same form.
func (r Ref) String() string { return fmt.Sprintf("%s/%d", r.Name, r.Version) }

// ParseRef is the inverse of String.
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

// Tag is a random identifier of one key creation. Every object of the creation carries the tag, so
// cleaning up after a crash removes no other object.
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

// CheckName refuses a name outside [a-z0-9][a-z0-9-]{0,63}.
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

// Info describes a key. A key can be used with its Info alone: see Store.Bind.
type Info struct {
	Ref        Ref        `json:"ref"`
	Algorithm  Algorithm  `json:"algorithm"`
	PublicKey  []byte     `json:"public_key"` // 32 bytes; P-256: 65, an uncompressed point (SEC 1, section 2.3.3)
	Custody    Custody    `json:"custody"`
	Provenance Provenance `json:"provenance"`
	Tag        Tag        `json:"tag"` // of its creation
}

// Provenance is the device's statement about a key's past, at the key's creation. A resident key is
// not extractable now, whatever its provenance.
type Provenance struct {
	Local            bool `json:"local"`             // made inside the device (CKA_LOCAL)
	AlwaysSensitive  bool `json:"always_sensitive"`  // was never readable (CKA_ALWAYS_SENSITIVE)
	NeverExtractable bool `json:"never_extractable"` // could never be wrapped and taken out (CKA_NEVER_EXTRACTABLE)
	// Unreported marks a key that the device has made for Generate and does not call its own: the
	// attributes are missing or false for every key of such a device.
	Unreported bool `json:"unreported,omitempty"`
}

// Generated reports a private key that has never been outside its device, by the device's word.
func (p Provenance) Generated() bool { return p.Local && p.AlwaysSensitive && p.NeverExtractable }

// String gives generated, imported, or unreported. A key keeps its provenance for ever.
func (p Provenance) String() string {
	switch {
	case p.Generated():
		return "generated"
	case p.Unreported:
		return "unreported"
	}
	return "imported"
}

// Verify checks a signature from a device: Ed25519 over message, or ECDSA over the message's
// SHA-256. The appliance's own keys are known to be sound, so Verify does without the strict rules
// for a stranger's public key (package eddsa has those).
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

// Store holds keys on a device. A Store is safe for concurrent use. ctx bounds the wait for the
// device. A backend can't always keep to ctx, since a call into C may hang: package worker makes a
// Store with a deadline for every call.
type Store interface {
	// Key finds one key. Errors are ErrNotFound, ErrAmbiguous and ErrUnfit.
	Key(ctx context.Context, ref Ref) (Key, error)
	// Bind returns the key of a description without a call to the device, so the device may be
	// away. The comparison with the device comes with the first use of the key: a device with
	// another key under the name gives an error then.
	Bind(info Info) Key
	// Keys lists the keys of this appliance, in any order. Half-made and ambiguous keys are left
	// out.
	Keys(ctx context.Context) ([]Ref, error)
	// Compare compares keys with their descriptions, by one listing of the device where it has one.
	// faults has an error for each of the first descriptions, at least one, in the same order: nil
	// for a key that is there, or ErrNotFound, ErrAmbiguous, ErrUnfit, or ErrSealed for a key that
	// the device does not show now. The caller compares the other descriptions by further calls.
	// err is about the device as a whole.
	Compare(ctx context.Context, infos []Info) (faults []error, err error)
	// Generate makes a key, reads back its protection, and proves the key by one use. A name with
	// objects on the device is refused (ErrExists). A crash can leave half a key behind, marked by
	// the tag: see Destroy.
	Generate(ctx context.Context, ref Ref, alg Algorithm, tag Tag) (Key, error)
	// Import makes an Ed25519 key from a seed file and is as Generate otherwise. The process with
	// the device reads the file once. ParseSeed has the formats of the file. The key can't be
	// exported again.
	Import(ctx context.Context, ref Ref, path string, tag Tag) (Key, error)
	// Destroy removes the objects of one creation, by name and tag, whole or half made, and no
	// other objects. Destroy is for keys never used, or with an approved destruction. A call
	// without anything to remove succeeds.
	Destroy(ctx context.Context, ref Ref, tag Tag) error
	// Inspect lists what the device says of itself. With prove, Inspect also makes a key of each
	// algorithm in the way of Generate, uses the key, and destroys the key: only such a key shows
	// what Generate can do, and the device is written to. All other keys stay as before.
	Inspect(ctx context.Context, prove bool) ([]Finding, error)
	// Status gives the last known state, without a call to the device.
	Status() Status
	// Retry permits logins again after ErrAuth. An operator calls Retry after correcting the PIN.
	Retry()
	Close() error
}

// SeedImporter is a Store in the process with the device. A key worker makes seeds, see package
// escrow.
type SeedImporter interface {
	// ImportSeed is Store.Import with a private key in memory, of the form that package escrow has.
	// The private key belongs to the caller.
	ImportSeed(ctx context.Context, ref Ref, alg Algorithm, seed secret.Bytes, tag Tag) (Key, error)
}

// CompareEach is Store.Compare for a device that finds each key by itself. CompareEach begins no
// further search after a second, so that a call has an end however many keys there are.
func CompareEach(ctx context.Context, find func(context.Context, Ref) (Key, error), infos []Info) ([]error, error) {
	var faults []error
	for began := time.Now(); len(faults) < len(infos) && (len(faults) == 0 || time.Since(began) < time.Second); {
		info := infos[len(faults)]
		key, err := find(ctx, info.Ref)
		switch {
		case errors.Is(err, ErrUnavailable), errors.Is(err, ErrAuth):
			return nil, err
		case err == nil:
			if got := key.Info(); !bytes.Equal(got.PublicKey, info.PublicKey) || got.Algorithm != info.Algorithm ||
				got.Tag != info.Tag {
				err = fmt.Errorf("%v: %w: the device has %s %x, the ledger has %s %x",
					info.Ref, ErrUnfit, got.Algorithm, got.PublicKey, info.Algorithm, info.PublicKey)
			}
		}
		faults = append(faults, err)
	}
	return faults, nil
}

// Status is the state of a device for its operator.
type Status struct {
	Up      bool     `json:"up"`
	Cause   string   `json:"cause,omitempty"` // of an outage
	Workers []Worker `json:"workers"`         // the processes with the device, where the store has some
	Faults  []Fault  `json:"faults,omitempty"`

	JournalBytes    uint64 `json:"journal_bytes,omitempty"`    // of all files; 0: there is no journal
	JournalFailures uint64 `json:"journal_failures,omitempty"` // signatures that ErrJournal has held back
}

// Fault is a reason for an operator to look at a device that may still serve. A fault is computed
// from the present state of the store, so that it ends with its reason.
type Fault struct {
	Kind FaultKind `json:"kind"`
	Key  Ref       `json:"key,omitzero"` // the key concerned; zero for the device as a whole
	Text string    `json:"text"`         // without a secret
}

// FaultKind is a kind of fault: the code of a cause in the state of the appliance (internal/cause).
type FaultKind string

const (
	FaultUnavailable FaultKind = "token-unavailable"  // no worker can use the device
	FaultPINRefused  FaultKind = "token-pin-refused"  // ErrAuth: no login before a change of the PIN file, or Retry
	FaultLocked      FaultKind = "token-locked"       // ErrLastTry or ErrLockedOut
	FaultReplaced    FaultKind = "token-replaced"     // ErrReplaced, or none of the keys is on the device any more
	FaultSealed      FaultKind = "token-sealed"       // ErrSealed: the machine is in another state
	FaultRedundancy  FaultKind = "token-redundancy"   // fewer workers than configured
	FaultRestarts    FaultKind = "token-restarts"     // workers end again and again
	FaultJournal     FaultKind = "journal-unwritable" // ErrJournal
	FaultKeyMissing  FaultKind = "key-missing"        // the use of a key has found it missing, or another in its place
)

// FaultOf gives the kind of the error of an outage.
func FaultOf(err error) FaultKind {
	switch {
	case errors.Is(err, ErrLastTry), errors.Is(err, ErrLockedOut):
		return FaultLocked
	case errors.Is(err, ErrAuth):
		return FaultPINRefused
	case errors.Is(err, ErrReplaced):
		return FaultReplaced
	case errors.Is(err, ErrSealed):
		return FaultSealed
	}
	return FaultUnavailable
}

// Worker is the state of one key worker.
type Worker struct {
	PID      int    `json:"pid"`      // 0: no process now
	Served   uint64 `json:"served"`   // calls answered by this process
	Restarts int    `json:"restarts"` // processes replaced so far
	Calls    uint64 `json:"calls"`    // calls answered by all processes so far
	Errors   uint64 `json:"errors"`   // calls that failed at a process, or were lost with it
	Memory   int    `json:"memory"`   // private bytes of this process; 0: not known

	Succeeded time.Time `json:"succeeded,omitzero"` // last success of this process
}

// Finding is one line of Store.Inspect.
type Finding struct {
	What string    `json:"what"`          // module, token, quirks, mechanism, measured, proof, and others
	For  Algorithm `json:"for,omitempty"` // the algorithm concerned, if any
	OK   bool      `json:"ok"`            // false: missing or not working
	Text string    `json:"text"`
}

// Judge reports whether a signature from a device is valid.
type Judge func(signature []byte) bool

// Accepts reports the judge's verdict. A nil judge accepts every signature.
func (j Judge) Accepts(signature []byte) bool { return j == nil || j(signature) }

// ErrWrong is a store's error for a wrong answer of the device, for example a signature that the
// judge has rejected.
var ErrWrong = fmt.Errorf("%w: the device has answered wrongly", ErrUnavailable)

// ErrReplaced is a store's error for another device, or an emptied one, in the place of the device
// with the keys. The store works again when the right device is back.
var ErrReplaced = fmt.Errorf("%w: the device with its keys is not there", ErrUnavailable)

// ErrLastTry is a store's error for a PIN that the device would lock with one more wrong try, or
// has locked. The PIN was not tried: only an operator's Retry permits a login on the last try.
var ErrLastTry = fmt.Errorf("%w: it has one try left, or none", ErrAuth)

// ErrLockedOut is a store's error for a device that uses no PIN for a while, after wrong ones (the
// dictionary attack lockout of a TPM). As with ErrSealed, of which ErrLockedOut is a kind, neither
// another worker nor a new one can help, and a later use of the key may succeed.
var ErrLockedOut error = lockedOut{}

type lockedOut struct{}

func (lockedOut) Error() string        { return "the device is locked for a time after wrong PINs" }
func (lockedOut) Is(target error) bool { return target == ErrSealed }

// Key is one key pair. The private half can be used and not read. A Key is safe for concurrent use
// and stays valid until its store is closed, through reconnections of the device.
type Key interface {
	Info() Info
	// Sign makes an Ed25519 signature of 64 bytes, or an ECDSA signature over the message's SHA-256
	// in ASN.1 DER (RFC 3279). Sign returns no signature that judge rejects: a store with a second
	// way to the device tries the second way, and then gives ErrUnavailable. A nil judge accepts
	// every signature.
	Sign(ctx context.Context, message []byte, judge Judge) ([]byte, error)
	// Exchange makes the X25519 shared secret. A point of low order is refused with ErrPeerKey
	// before the device sees the point.
	Exchange(ctx context.Context, peer [32]byte) ([32]byte, error)
}

// Recorder is a Store that keeps the keys of its device in files, encrypted by the device. A token
// that keeps its keys itself has none.
type Recorder interface {
	// Records returns some files of the keys by their names: those after a name, in the order of
	// the names. No file is the end.
	Records(ctx context.Context, after string) (map[string][]byte, error)
}

// Counter is a Store with a monotonic counter in its device. No caller, and no restore of a backup,
// can set the counter back. Each counter has an owner: two appliances never share one. In place of
// the owner's counter, the device may have something else (ErrUnfit).
type Counter interface {
	// DefineCounter makes the owner's counter. DefineCounter is idempotent.
	DefineCounter(ctx context.Context, owner Owner) error
	// ReadCounter returns the counter's value, or ErrNotFound for a counter never defined or lost.
	ReadCounter(ctx context.Context, owner Owner) (uint64, error)
	// IncrementCounter adds one and returns the new value. After an error the counter may have the
	// old value or the new one.
	IncrementCounter(ctx context.Context, owner Owner) (uint64, error)
	// UndefineCounter gives the owner's counter back to the device. Without such a counter there is
	// nothing to do. A later counter of the device begins above the value of this one.
	UndefineCounter(ctx context.Context, owner Owner) error
}

// Rooted is a Store whose keys hang on a storage root key in its device.
type Rooted interface {
	// EvictStorageRoot gives the handle of the storage root key back. No key of the store can be
	// used afterwards, and neither can those of other programs below the same key, until somebody
	// makes the same key again.
	EvictStorageRoot(ctx context.Context) error
}

// Owner is the random identifier of a counter's owner. The zero Owner has a counter without a mark:
// counters were defined without marks before 2026-11-29.
type Owner [32]byte

// MarshalText and UnmarshalText make an Owner 64 hex digits in JSON.
func (o Owner) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, o[:]), nil }

func (o *Owner) UnmarshalText(b []byte) error {
	if len(b) != hex.EncodedLen(len(o)) {
		return errors.New("an owner has 64 hex digits")
	}
	_, err := hex.Decode(o[:], b)
	return err
}

// BatchSigner is a Store with cheaper signatures in a batch than one by one.
type BatchSigner interface {
	// SignBatch sets Signature or Err of each element, as Key.Sign without a judge would. All keys
	// of the batch belong to this store.
	SignBatch(ctx context.Context, batch []*Signing)
}

// Signing is one element of a batch: a request for a signature, and then its result.
type Signing struct {
	Key       Key
	Message   []byte
	Signature []byte
	Err       error
}
