// Package transcript defines the types of documents that Countersign signs and verifies: one file a
// type, with the fields, the rules and the canonical bytes of the type. Begin reading at Parse.
//
// A transcript type says what a signature means. Each type binds its bytes to a domain of its
// own, so that a signature made for one type is never valid for another; raw is the exception
// (see raw.go). Each type refuses documents that a careful signer would not sign.
package transcript

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"countersign/internal/ijson"

	"github.com/go-json-experiment/json/jsontext"
)

// MaxTime is the latest time in a document: the last second of the year 9999, in Unix seconds.
const MaxTime = 253402300799

// The classes of refusals. Each error of this package wraps one of these, with a text that names
// the field.
var (
	ErrUnsupported     = errors.New("unsupported transcript type")
	ErrMalformed       = errors.New("malformed document")
	ErrExpired         = errors.New("expired")
	ErrNotYetValid     = errors.New("not yet valid")
	ErrLifetimeTooLong = errors.New("lifetime too long")
	ErrWrongSigner     = errors.New("wrong signer")
)

// Request is a document as a peer sends it: the JSON payload and the envelope. The envelope (Nonce,
// Timestamp, ExpiresAt) makes a signature single use and short-lived.
type Request struct {
	Type      string
	Payload   []byte   // JSON
	Nonce     [32]byte // single use in its scope
	Timestamp int64    // Unix seconds: valid from
	ExpiresAt int64    // Unix seconds: valid up to and including
}

// Document is a request that obeys the rules of its type.
type Document struct {
	Request
	// Canonical is the only byte form of the document, envelope included.
	Canonical []byte
	// Message is the input of Ed25519: Canonical, or the SHA-256 of Canonical for some types.
	Message []byte
	// Signers are the public keys whose signature the document allows. nil allows any key.
	Signers [][]byte
	// Fields has the values that policy rules see: strings and int64.
	Fields map[string]any
	// Payment is set for a document that moves money; the appliance makes a receipt of Payment.
	Payment *Payment
	// Unbound marks a type whose signed bytes do not contain the envelope. A verifier can't tell
	// a replay of such a signature from a second signature, so the appliance signs the document
	// but does not verify it.
	Unbound bool
	// Reserved marks a type that only the appliance makes. A peer's request to sign such a
	// document is refused.
	Reserved bool
	// Generation is a monotonic counter: each signature of a signer must have a greater
	// generation than the one before, and the ledger keeps the greatest. nil for a type without
	// generations.
	Generation *uint64
	// Succession is set for a key-succession-v1 only.
	Succession *Succession
	// NoiseStatic is the X25519 key in a paykit-noise-key-authorization-v1; nil without the key
	// and in other types.
	NoiseStatic *[32]byte

	fields []Field // of the payload
}

// Payment has an amount, in the document's own spelling, its currency and the method of payment.
type Payment struct{ Amount, Currency, Method string }

// Type describes a transcript type for people.
type Type struct {
	Name   string  `json:"type"`
	About  string  `json:"about"`
	Fields []Field `json:"fields"` // all fields of the payload
	build  func(*Document) error
	// read refuses canonical bytes that build makes of no payload, as far as the bytes show it, and
	// sets Message and Signers.
	read func(d *Document, canonical []byte) error
}

// Field describes a field of a payload. A field of an inner object has a name with a dot, such as
// terms.amount.
type Field struct {
	Name     string `json:"name"`
	Required bool   `json:"required"`
	Form     string `json:"form"`
}

// formTime is the form of times in every payload.
const formTime = "Unix seconds, 0 to 253402300799"

// types lists all transcript types by name. A new type needs a file and a line here.
var types = []Type{
	keySuccessionType,
	messageType,
	paykitHTTPSignatureType,
	paykitNoiseKeyAuthorizationType,
	paykitSubscriptionType,
	paymentRequestType,
	rawType,
	receiptType,
}

// Types lists all transcript types in alphabetical order.
func Types() []Type { return slices.Clone(types) }

// Parse checks a request by the rules of its type and makes the canonical bytes. Parse uses
// neither a clock nor a key: see CheckTime and CheckSigner. Errors wrap ErrUnsupported or
// ErrMalformed.
func Parse(r Request) (*Document, error) {
	i := slices.IndexFunc(types, func(t Type) bool { return t.Name == r.Type })
	if i < 0 {
		return nil, fmt.Errorf("%w %q", ErrUnsupported, ijson.Clip(r.Type))
	}
	if err := r.checkEnvelope(); err != nil {
		return nil, err
	}
	d := &Document{Request: r, fields: types[i].Fields}
	if err := types[i].build(d); err != nil {
		return nil, err
	}
	return d, nil
}

// checkEnvelope checks the times by themselves, without a clock.
func (r Request) checkEnvelope() error {
	if err := checkTime("timestamp", r.Timestamp); err != nil {
		return err
	}
	if err := checkTime("expires_at", r.ExpiresAt); err != nil {
		return err
	}
	if r.ExpiresAt <= r.Timestamp {
		return malformed("expires_at", "must be later than timestamp")
	}
	return nil
}

// Digest identifies the whole request: SHA-256 of type, canonical bytes and envelope. Two requests
// with the same digest ask for the same signature.
func (d *Document) Digest() [32]byte {
	b := appendString(nil, d.Type)
	b = binary.AppendUvarint(b, uint64(len(d.Canonical)))
	b = append(b, d.Canonical...)
	return sha256.Sum256(appendEnvelope(b, d.Request))
}

// CheckTime compares the document's times with the clock. A sender's clock may be ahead of now by
// skew. maxLifetime bounds expires_at - timestamp. Errors wrap ErrExpired, ErrNotYetValid or
// ErrLifetimeTooLong.
func (d *Document) CheckTime(now time.Time, skew, maxLifetime time.Duration) error {
	if t := now.Unix(); t > d.ExpiresAt {
		return fmt.Errorf("%w: expires_at is %d, now is %d", ErrExpired, d.ExpiresAt, t)
	} else if d.Timestamp > t+int64(skew/time.Second) {
		return fmt.Errorf("%w: timestamp is %d, now is %d", ErrNotYetValid, d.Timestamp, t)
	}
	longest := int64(maxLifetime / time.Second)
	if life := d.ExpiresAt - d.Timestamp; life > longest {
		return fmt.Errorf("%w: %d s, at most %d s are allowed", ErrLifetimeTooLong, life, longest)
	}
	return nil
}

// CheckSigner refuses a public key that is not among Signers. The error wraps ErrWrongSigner.
func (d *Document) CheckSigner(publicKey []byte) error {
	equal := func(k []byte) bool { return string(k) == string(publicKey) }
	if d.Signers == nil || slices.ContainsFunc(d.Signers, equal) {
		return nil
	}
	return fmt.Errorf("%w: the document names other keys as its parties", ErrWrongSigner)
}

// Counterparty returns the other of two Signers, if signer is one of them. Otherwise, and for a
// document with more or fewer signers, the result is nil.
func (d *Document) Counterparty(signer []byte) []byte {
	if len(d.Signers) != 2 {
		return nil
	}
	switch string(signer) {
	case string(d.Signers[0]):
		return d.Signers[1]
	case string(d.Signers[1]):
		return d.Signers[0]
	}
	return nil
}

// decode reads the payload into v strictly. A payload with an unknown or duplicate field, a wrong
// type or invalid UTF-8 is refused, and so is a payload without a required field of the type.
func (d *Document) decode(v any) error {
	var required []string
	for _, f := range d.fields {
		if outer, _, _ := strings.Cut(f.Name, "."); f.Required {
			required = append(required, outer)
		}
	}
	if err := ijson.Decode(d.Payload, v, required...); err != nil {
		return fmt.Errorf("%w: payload: %w", ErrMalformed, err)
	}
	return nil
}

func malformed(field, format string, args ...any) error {
	return fmt.Errorf("%w: %s %s", ErrMalformed, field, fmt.Sprintf(format, args...))
}

func checkTime(field string, t int64) error {
	if t < 0 || t > MaxTime {
		return malformed(field, "must be Unix seconds between 0 and %d", int64(MaxTime))
	}
	return nil
}

// checkText accepts 1 to limit bytes without control characters.
func checkText(field, s string, limit int) error {
	if s == "" || len(s) > limit {
		return malformed(field, "must have 1 to %d bytes", limit)
	}
	if hasControl(s) {
		return malformed(field, "must not contain control characters")
	}
	return nil
}

// hasControl finds the control characters of ASCII and of Latin-1 (C0, DEL, C1).
func hasControl(s string) bool {
	for _, r := range s {
		if r < 0x20 || r >= 0x7f && r < 0xa0 {
			return true
		}
	}
	return false
}

// checkToken accepts 1 to limit bytes of ASCII letters, digits and the extra characters.
func checkToken(field, s string, limit int, extra string) error {
	if s == "" || len(s) > limit {
		return malformed(field, "must have 1 to %d characters", limit)
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && !slices.Contains([]byte(extra), c) {
			return malformed(field, "may contain letters, digits and %q only", extra)
		}
	}
	return nil
}

// decodeBase64 reads base64url without padding. Any bytes have one accepted text only: spare bits
// must be zero.
func decodeBase64(field, s string) ([]byte, error) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil || strings.ContainsAny(s, "\r\n") { // encoding/base64 skips line ends
		return nil, malformed(field, "must be base64url without padding")
	}
	return b, nil
}

// decodeBytes reads exactly size bytes as decodeBase64 does.
func decodeBytes(field, s string, size int) ([]byte, error) {
	b, err := decodeBase64(field, s)
	if err == nil && len(b) != size {
		return nil, malformed(field, "must have %d bytes, not %d", size, len(b))
	}
	return b, err
}

// bindJSON sets the bytes of the types that Countersign has defined on JSON:
//
//	canonical = domain 00 || SHA-256(RFC 8785 form of the payload as it was sent)
//	            || nonce (32) || timestamp (u64, big-endian) || expires_at (u64, big-endian)
//	signed    = canonical
//
// RFC 8785 rounds numbers to float64, so two payloads with different long numbers could have the
// same form. A payload has passed decode before, and its only numbers are integers below 2^53,
// which float64 holds exactly.
func (d *Document) bindJSON(domain string) error {
	form := slices.Clone(jsontext.Value(d.Payload))
	if err := form.Canonicalize(); err != nil {
		return malformed("payload", "has no RFC 8785 form")
	}
	sum := sha256.Sum256(form)
	d.Canonical = appendEnvelope(append([]byte(domain+"\x00"), sum[:]...), d.Request)
	d.Message = d.Canonical
	return nil
}

// appendString appends the length as a varint, then the bytes.
func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// appendEnvelope appends nonce, timestamp and expires_at in the form of Countersign's own types: 32
// bytes, then two big-endian 64-bit numbers.
func appendEnvelope(b []byte, r Request) []byte {
	b = append(b, r.Nonce[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(r.Timestamp))
	return binary.BigEndian.AppendUint64(b, uint64(r.ExpiresAt))
}
