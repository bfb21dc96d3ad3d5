package transcript

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
	"unicode/utf8"
)

// A key worker signs no bytes of which it does not know the type. The daemon sends a document, not
// the message: the worker reads the canonical bytes by the rules of the type, and computes the
// message and the digest itself. Otherwise a daemon in other hands could pass 32 bytes as the hash
// of a subscription, or bytes of one type as another.

// inputPrefix begins the input of a document. No other input of a key worker begins with it.
const inputPrefix = "countersign-document-v1\x00"

// Input returns the document as a key worker takes it:
//
//	"countersign-document-v1" 00 || u8 length of type || type
//	|| nonce (32) || timestamp (u64, big-endian) || expires_at (u64, big-endian) || canonical
func (d *Document) Input() []byte {
	b := append([]byte(inputPrefix), byte(len(d.Type)))
	b = append(b, d.Type...)
	b = appendEnvelope(b, d.Request)
	return append(b, d.Canonical...)
}

// IsInput reports bytes that are to be read by ParseInput.
func IsInput(b []byte) bool { return bytes.HasPrefix(b, []byte(inputPrefix)) }

// ParseInput is the inverse of Document.Input, for a signer with a public key. The result has Type,
// the envelope, Canonical and Message; Payload and what follows from it are empty. ParseInput
// refuses whatever Parse and Document.CheckSigner refuse, as far as the canonical bytes show it:
// where a type signs the hash of its payload, the payload itself is not seen. Errors wrap
// ErrUnsupported, ErrMalformed or ErrWrongSigner.
func ParseInput(b, signer []byte) (*Document, error) {
	rest, ok := bytes.CutPrefix(b, []byte(inputPrefix))
	if !ok || len(rest) < 1 || len(rest) < 1+int(rest[0])+envelopeSize {
		return nil, malformed("input", "is not a document")
	}
	d := new(Document)
	d.Type, rest = string(rest[1:1+rest[0]]), rest[1+rest[0]:]
	d.Nonce = [32]byte(rest)
	d.Timestamp = int64(binary.BigEndian.Uint64(rest[32:]))
	d.ExpiresAt = int64(binary.BigEndian.Uint64(rest[40:]))
	d.Canonical = rest[envelopeSize:]
	d.Message = d.Canonical
	i := slices.IndexFunc(types, func(t Type) bool { return t.Name == d.Type })
	if i < 0 {
		return nil, fmt.Errorf("%w %q", ErrUnsupported, d.Type)
	}
	if err := d.checkEnvelope(); err != nil {
		return nil, err
	}
	if err := types[i].read(d, d.Canonical); err != nil {
		return nil, err
	}
	return d, d.CheckSigner(signer)
}

// envelopeSize is the length of appendEnvelope's bytes.
const envelopeSize = 32 + 8 + 8

// errCanonical refuses bytes that no document of a type has.
func errCanonical(typ string) error { return malformed("canonical", "is not of the type %s", typ) }

// readJSON makes the reader of a type that bindJSON has bound to a domain.
func readJSON(domain string) func(*Document, []byte) error {
	return func(d *Document, b []byte) error {
		rest, ok := bytes.CutPrefix(b, []byte(domain+"\x00"))
		if !ok || len(rest) != sha256.Size+envelopeSize ||
			!bytes.Equal(rest[sha256.Size:], appendEnvelope(nil, d.Request)) {
			return errCanonical(d.Type)
		}
		return nil
	}
}

func readMessage(d *Document, b []byte) error {
	rest, ok := bytes.CutPrefix(b, []byte(messageDomain))
	if !ok || len(rest) < 1 || len(rest) != 1+int(rest[0])+sha256.Size+envelopeSize ||
		!bytes.HasSuffix(rest, appendEnvelope(nil, d.Request)) {
		return errCanonical(d.Type)
	}
	context := string(rest[1 : 1+rest[0]])
	if !utf8.ValidString(context) || checkText("canonical", context, MaxContext) != nil {
		return errCanonical(d.Type)
	}
	return nil
}

func readPaykitHTTPSignature(d *Document, b []byte) error {
	parts := bytes.SplitN(b, []byte{0}, 4)
	if len(parts) != 4 || string(parts[0]) != d.Type {
		return errCanonical(d.Type)
	}
	return checkHTTP(string(parts[1]), string(parts[2]), string(parts[3]))
}

func readPaykitNoiseKeyAuthorization(d *Document, b []byte) error {
	rest, ok := bytes.CutPrefix(b, []byte(paykitNoiseKeyAuthorizationDomain))
	if !ok || len(rest) != 32+32+8 && len(rest) != 32+32+32+8 {
		return errCanonical(d.Type)
	}
	a := authorization{Owner: publicKey(rest), NoisePublicKey: publicKey(rest[32:])}
	if len(rest) == 32+32+32+8 {
		a.NoiseStaticPublicKey = new(publicKey(rest[64:]))
	}
	a.KeyGeneration = int64(binary.BigEndian.Uint64(rest[len(rest)-8:]))
	d.Signers = [][]byte{a.Owner[:]}
	return a.check()
}

func readRaw(*Document, []byte) error { return nil }

// readPaykitSubscription reads the postcard form. The values are encoded again and compared, so
// that the reader is strict: a varint has one length, and object keys are sorted and unique.
func readPaykitSubscription(d *Document, b []byte) error {
	r := postcard{rest: b}
	var s subscription
	domain := r.text()
	s.SubscriptionID = r.text()
	s.Subscriber, s.Provider = publicKey(r.bytes(32)), publicKey(r.bytes(32))
	s.Terms.Amount, s.Terms.Currency = r.text(), r.text()
	s.Terms.Frequency = r.frequency()
	s.Terms.Method = r.text()
	if r.option() {
		s.Terms.MaxAmountPerPeriod = new(r.text())
	}
	s.Terms.Description = new(r.text())
	s.Metadata = r.metadata()
	s.CreatedAt, s.StartsAt = r.varint(), r.varint()
	if r.option() {
		s.EndsAt = new(r.varint())
	}
	r.bytes(32)
	r.varint()
	r.varint()
	if r.failed || len(r.rest) != 0 || domain != paykitSubscriptionDomain || !bytes.Equal(s.canonical(d.Request), b) {
		return errCanonical(d.Type)
	}
	sum := sha256.Sum256(b)
	d.Message = sum[:]
	d.Signers = [][]byte{s.Subscriber[:], s.Provider[:]}
	return s.check()
}

// postcard reads values one after another. After a failure every value is empty.
type postcard struct {
	rest   []byte
	failed bool
}

func (r *postcard) bytes(n int) []byte {
	if r.failed = r.failed || n < 0 || n > len(r.rest); r.failed {
		return make([]byte, 32) // enough for a key
	}
	b := r.rest[:n]
	r.rest = r.rest[n:]
	return b
}

func (r *postcard) uvarint() uint64 {
	v, n := binary.Uvarint(r.rest)
	if n <= 0 {
		r.failed, n = true, 0
	}
	r.bytes(n)
	return v
}

func (r *postcard) varint() int64 {
	v := r.uvarint()
	return int64(v>>1) ^ -int64(v&1)
}

func (r *postcard) text() string {
	n := r.uvarint()
	if n > uint64(len(r.rest)) || r.failed {
		r.failed = true
		return ""
	}
	s := string(r.bytes(int(n)))
	r.failed = r.failed || !utf8.ValidString(s)
	return s
}

func (r *postcard) option() bool { return r.bytes(1)[0] != 0 }

func (r *postcard) frequency() frequency {
	switch kind := r.bytes(1)[0]; kind {
	case 0, 1:
		return frequency{[]byte{kind}}
	case 2:
		if day := r.bytes(1)[0]; day >= 1 && day <= 31 {
			return frequency{[]byte{kind, day}}
		}
	case 3:
		b := r.bytes(2)
		if b[0] >= 1 && b[0] <= 12 && b[1] >= 1 && b[1] <= daysIn[b[0]-1] {
			return frequency{[]byte{kind, b[0], b[1]}}
		}
	case 4:
		if seconds := r.uvarint(); seconds >= 1 && seconds <= MaxTime {
			return frequency{binary.AppendUvarint([]byte{kind}, seconds)}
		}
	}
	r.failed = true
	return frequency{[]byte{0}}
}

// metadata reads the outer object. checkMetadata has the reason why a value can be read in one way
// only: after the varint, the first byte is below 0x20 for an object and above for text.
func (r *postcard) metadata() map[string]any {
	return r.object(maxMetadataEntries, func() any {
		v, n := binary.Uvarint(r.rest)
		if v > 0 && n > 0 && len(r.rest) > n && r.rest[n] < 0x20 {
			return r.object(maxMetadataEntries, func() any { return r.text() })
		}
		return r.text()
	})
}

func (r *postcard) object(limit uint64, value func() any) map[string]any {
	n := r.uvarint()
	r.failed = r.failed || n > limit
	all := map[string]any{}
	for ; n > 0 && !r.failed; n-- {
		key := r.text()
		all[key] = value()
	}
	return all
}
