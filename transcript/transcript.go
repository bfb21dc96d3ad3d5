// Package transcript holds the typed documents that Countersign signs and verifies: one file a type, with its fields,
// its rules and its canonical bytes. Begin reading at Parse.
//
// A transcript says what a signature means. Each type binds its bytes to a domain of its own, so that a signature made
// for one type is never valid as another; each refuses what a careful signer would not put its name to.
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

// MaxTime is the latest time that a document may name: the last second of the year 9999, in Unix seconds.
const MaxTime = 253402300799

// Why a document is refused. Each error of this package wraps one of them; the text after it names the field.
var (
	ErrUnsupported     = errors.New("unsupported transcript type")
	ErrMalformed       = errors.New("malformed document")
	ErrExpired         = errors.New("expired")
	ErrNotYetValid     = errors.New("not yet valid")
	ErrLifetimeTooLong = errors.New("lifetime too long")
	ErrWrongSigner     = errors.New("wrong signer")
)

// Request is a document as a peer hands it in: the JSON payload and the envelope that makes a signature of it single
// use and short-lived.
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
	// Canonical is the one byte form of the document, envelope included.
	Canonical []byte
	// Message is what Ed25519 signs: Canonical, or its hash where the type says so.
	Message []byte
	// Signers are the public keys whose signature the document allows; nil allows any.
	Signers [][]byte
	// Fields is what policy may look at: strings and whole numbers.
	Fields map[string]any
	// Payment is what a receipt is about, where the document moves money.
	Payment *Payment
	// Unbound marks a type whose signed bytes do not contain the envelope: a verifier can't tell a replay from a second
	// signature, so such a document can be signed but not verified here.
	Unbound bool
	// Reserved marks a type that only the appliance itself makes: Sign refuses it for peers.
	Reserved bool
	// Generation is a number that must rise with each signature of its signer; the ledger holds it. nil where the type has
	// none.
	Generation *uint64
	// Succession is what a key-succession-v1 says, and NoiseStatic the X25519 key that an authorization names; nil in other
	// documents.
	Succession  *Succession
	NoiseStatic *[32]byte

	fields []Field // of the payload
}

// Payment is an amount as the document writes it, and how it is paid.
type Payment struct{ Amount, Currency, Method string }

// Type describes a transcript type for people.
type Type struct {
	Name   string  `json:"type"`
	About  string  `json:"about"`
	Fields []Field `json:"fields"` // of the payload; there are no others
	build  func(*Document) error
}

// Field is a field of a payload. One of an object in the payload has a name with a dot.
type Field struct {
	Name     string `json:"name"`
	Required bool   `json:"required"`
	Form     string `json:"form"`
}

// formTime is the form of times in every payload.
const formTime = "Unix seconds, 0 to 253402300799"

// types is the table of all transcripts, by name. Adding one is a new file and a line here.
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

// Parse checks a request by its own rules and makes its canonical bytes. It looks at no clock and no key: see
// CheckTime and CheckSigner. Errors wrap ErrUnsupported or ErrMalformed.
func Parse(r Request) (*Document, error) {
	i := slices.IndexFunc(types, func(t Type) bool { return t.Name == r.Type })
	if i < 0 {
		return nil, fmt.Errorf("%w %q", ErrUnsupported, ijson.Clip(r.Type))
	}
	if err := checkTime("timestamp", r.Timestamp); err != nil {
		return nil, err
	}
	if err := checkTime("expires_at", r.ExpiresAt); err != nil {
		return nil, err
	}
	if r.ExpiresAt <= r.Timestamp {
		return nil, malformed("expires_at", "must be later than timestamp")
	}
	d := &Document{Request: r, fields: types[i].Fields}
	if err := types[i].build(d); err != nil {
		return nil, err
	}
	return d, nil
}

// Digest identifies the whole request: type, canonical bytes and envelope. Two requests with one digest ask for the
// same signature.
func (d *Document) Digest() [32]byte {
	b := appendString(nil, d.Type)
	b = binary.AppendUvarint(b, uint64(len(d.Canonical)))
	b = append(b, d.Canonical...)
	return sha256.Sum256(appendEnvelope(b, d.Request))
}

// CheckTime holds the document against the clock. skew is how far a sender's clock may be ahead of ours; maxLifetime
// bounds expires_at - timestamp. Errors wrap ErrExpired, ErrNotYetValid or ErrLifetimeTooLong.
func (d *Document) CheckTime(now time.Time, skew, maxLifetime time.Duration) error {
	if t := now.Unix(); t > d.ExpiresAt {
		return fmt.Errorf("%w: expires_at is %d, now is %d", ErrExpired, d.ExpiresAt, t)
	} else if d.Timestamp > t+int64(skew/time.Second) {
		return fmt.Errorf("%w: timestamp is %d, now is %d", ErrNotYetValid, d.Timestamp, t)
	}
	if life := d.ExpiresAt - d.Timestamp; life > int64(maxLifetime/time.Second) {
		return fmt.Errorf("%w: %d s, at most %d s are allowed", ErrLifetimeTooLong, life, int64(maxLifetime/time.Second))
	}
	return nil
}

// CheckSigner refuses a public key that the document does not allow to sign it. The error wraps ErrWrongSigner.
func (d *Document) CheckSigner(publicKey []byte) error {
	if d.Signers == nil || slices.ContainsFunc(d.Signers, func(k []byte) bool { return string(k) == string(publicKey) }) {
		return nil
	}
	return fmt.Errorf("%w: the document names other keys as its parties", ErrWrongSigner)
}

// Counterparty returns the other party of a document that exactly two may sign, where signer is one of them; else nil.
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

// decode reads the payload into v: unknown and duplicate fields, wrong types and invalid UTF-8 are refused, and so is a
// payload without one of the type's required fields.
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

// checkText accepts 1 to most bytes without control characters.
func checkText(field, s string, most int) error {
	if s == "" || len(s) > most {
		return malformed(field, "must have 1 to %d bytes", most)
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

// checkToken accepts 1 to most bytes of letters, digits and the given extra characters.
func checkToken(field, s string, most int, extra string) error {
	if s == "" || len(s) > most {
		return malformed(field, "must have 1 to %d characters", most)
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && !slices.Contains([]byte(extra), c) {
			return malformed(field, "may contain letters, digits and %q only", extra)
		}
	}
	return nil
}

// decodeBase64 reads base64url without padding, in the one form that the bytes have.
func decodeBase64(field, s string) ([]byte, error) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil || strings.ContainsAny(s, "\r\n") { // the decoder skips line ends
		return nil, malformed(field, "must be base64url without padding")
	}
	return b, nil
}

// decodeBytes is decodeBase64 for size bytes.
func decodeBytes(field, s string, size int) ([]byte, error) {
	b, err := decodeBase64(field, s)
	if err == nil && len(b) != size {
		return nil, malformed(field, "must have %d bytes, not %d", size, len(b))
	}
	return b, err
}

// bindJSON gives a document the bytes of our own transcripts:
//
//	canonical = domain 00 || SHA-256(RFC 8785 form of the payload as it was sent)
//	            || nonce (32) || timestamp (u64, big-endian) || expires_at (u64, big-endian)
//	signed    = canonical
//
// RFC 8785 has no numbers but those of float64, so two payloads could have one form if they differed in a longer one. The
// payloads that come here have passed decode, with integers below 2^53 as their only numbers.
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

// appendString appends a varint length and the bytes.
func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// appendEnvelope appends nonce, timestamp and expires_at in the fixed form that our own transcripts use:
// 32 bytes, then two big-endian 64-bit numbers.
func appendEnvelope(b []byte, r Request) []byte {
	b = append(b, r.Nonce[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(r.Timestamp))
	return binary.BigEndian.AppendUint64(b, uint64(r.ExpiresAt))
}
