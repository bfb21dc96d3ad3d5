// Package wire is the language that peers and the appliance speak inside a Noise connection: one JSON document a
// message, requests from the peer, answers from the appliance. It knows fields and their forms and nothing of
// cryptography. docs/SPEC.md is the full text.
//
// Documents are I-JSON (RFC 7493): UTF-8, no duplicate names, no surrogates or noncharacters. Unknown fields are refused
// on both sides. Bytes are base64url without padding, times are Unix seconds.
package wire

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"countersign/internal/ijson"

	strict "github.com/go-json-experiment/json"
)

// MaxDocument is the longest JSON document in bytes: a Noise message of 65,535 bytes less its 16-byte tag.
const MaxDocument = 65535 - 16

// maxID and maxKey bound a request's id and the name of a key, in bytes; maxTime is the last second of the year 9999.
const (
	maxID   = 64
	maxKey  = 64
	maxTime = 253402300799
)

// The operations.
const (
	OpPing   = "ping"
	OpKeys   = "keys"
	OpSign   = "sign"
	OpVerify = "verify"
	OpProof  = "proof"
	OpBatch  = "batch"
	OpLine   = "line"
	OpAck    = "rotation.ack"
)

// The codes of an error answer. They are stable: programs decide by them.
const (
	CodeMalformed        = "malformed"         // the request does not have the form that the specification gives it
	CodeUnsupported      = "unsupported"       // unknown operation or transcript type
	CodeTooLarge         = "too_large"         // the request or its answer does not fit into a message
	CodeUnknownKey       = "unknown_key"       // no such key
	CodeKeyNotActive     = "key_not_active"    // the key exists, but may not sign now
	CodeDenied           = "denied"            // policy does not allow it
	CodeNotConfirmed     = "not_confirmed"     // an operator must confirm that the key may sign now
	CodeReplay           = "replay"            // the nonce is spent
	CodeExpired          = "expired"           // expires_at has passed
	CodeNotYetValid      = "not_yet_valid"     // timestamp lies in the future
	CodeLifetimeTooLong  = "lifetime_too_long" // expires_at - timestamp is over the maximum
	CodeInvalidSignature = "invalid_signature" // the signature does not verify, or its key is unusable
	CodeWrongSigner      = "wrong_signer"      // the key is not one that the document allows to sign it
	CodeRateLimited      = "rate_limited"      // too many requests of this peer in a second
	CodeBusy             = "busy"              // too many requests are being served, of this peer or in all
	CodeUnavailable      = "unavailable"       // the appliance can't answer now; the same request may be sent again
)

// Bytes is base64url without padding in JSON.
type Bytes []byte

// Bytes32 is 32 bytes, base64url without padding (43 characters) in JSON.
type Bytes32 [32]byte

// Document is what gets signed, with the envelope that makes its signature single use and short-lived.
type Document struct {
	Type      string          `json:"type"`
	Payload   json.RawMessage `json:"payload"`
	Nonce     Bytes32         `json:"nonce"`
	Timestamp int64           `json:"timestamp"`
	ExpiresAt int64           `json:"expires_at"`
}

// Ping asks for a sign of life.
type Ping struct {
	ID string `json:"id"`
	Op string `json:"op"`
}

// Keys asks which keys can sign.
type Keys struct {
	ID string `json:"id"`
	Op string `json:"op"`
}

// Sign asks for a signature with the active version of a key.
type Sign struct {
	ID  string `json:"id"`
	Op  string `json:"op"`
	Key string `json:"key"`
	Document
}

// Verify asks whether a signature is good, and spends its nonce. Key is optional: where it is given, the public key must
// be one of that key's versions.
type Verify struct {
	ID        string  `json:"id"`
	Op        string  `json:"op"`
	Key       *string `json:"key,omitempty"`
	PublicKey Bytes32 `json:"public_key"`
	Signature Bytes   `json:"signature"`
	Document
}

// Proof asks for the proof that an event is in the audit log. A peer can have that of its own events.
type Proof struct {
	ID    string `json:"id"`
	Op    string `json:"op"`
	Event uint64 `json:"event"`
}

// Batch asks for several things at once. An item is a *Sign or a *Verify without an id, or a *Error where it is neither.
type Batch struct {
	ID    string
	Op    string
	Items []any
}

// Answers answers Batch: one for each item, in their order.
type Answers struct {
	Answers []ItemAnswer `json:"answers"`
}

// ItemAnswer has one of Result and Error.
type ItemAnswer struct {
	Result json.RawMessage `json:"result,omitzero"`
	Error  *Error          `json:"error,omitempty"`
}

// maxItemMessage bounds the message of an item's error, so that all answers of a batch fit into one message.
const maxItemMessage = 256

// NewItemAnswer makes the answer to an item of a batch.
func NewItemAnswer(result any, refusal *Error) ItemAnswer {
	if refusal != nil {
		short := *refusal
		if len(short.Message) > maxItemMessage {
			short.Message = strings.ToValidUTF8(short.Message[:maxItemMessage], "") + "…"
		}
		return ItemAnswer{Error: &short}
	}
	b, err := strict.Marshal(result)
	if err != nil {
		panic("wire: a result that is not JSON: " + err.Error()) // our own types always are
	}
	return ItemAnswer{Result: b}
}

// Line asks for the steps of a key's line of versions: those that lead to From+1 and on.
type Line struct {
	ID   string `json:"id"`
	Op   string `json:"op"`
	Key  string `json:"key"`
	From uint32 `json:"from"` // the version that the peer trusts, from 1
}

// Ack says that the peer has taken notice of a rotation.
type Ack struct {
	ID      string `json:"id"`
	Op      string `json:"op"`
	Key     string `json:"key"`
	Version uint32 `json:"version"`
}

// Steps answers Line. More says that there are further ones: ask again from the last one's version.
type Steps struct {
	Key   string       `json:"key"`
	Steps []Succession `json:"steps"`
	More  bool         `json:"more"`
}

// Acknowledged answers Ack.
type Acknowledged struct {
	Key     string `json:"key"`
	Version uint32 `json:"version"`
}

// Succession is one step of a line: a key-succession-v1 document and its signature by the old version. It is kept for ever: its
// times are those of its signing and end nothing.
type Succession struct {
	Payload   json.RawMessage `json:"payload"`
	Nonce     Bytes32         `json:"nonce"`
	Timestamp int64           `json:"timestamp"`
	ExpiresAt int64           `json:"expires_at"`
	Signature Bytes           `json:"signature"`
}

// Authorization is a paykit-noise-key-authorization-v1 document and its signature by its owner.
type Authorization struct {
	Payload   json.RawMessage `json:"payload"`
	Signature Bytes           `json:"signature"`
}

// EventRotation is the event of a Rotation.
const EventRotation = "rotation"

// NoiseKey is the key of a Rotation that is about the listener's Noise key.
const NoiseKey = "noise"

// Rotation is sent by the appliance without being asked: a key gets a new version. A peer acknowledges it with Ack.
type Rotation struct {
	Event       string  `json:"event"`
	Key         string  `json:"key"`
	Version     uint32  `json:"version"` // the new one
	PublicKey   Bytes32 `json:"public_key"`
	ActivatesAt int64   `json:"activates_at"` // from then on the new version signs, or answers handshakes
	RetiresAt   int64   `json:"retires_at"`   // until then the old one is accepted, at the most
	// Compromised: the old version must not be believed any more.
	Compromised bool `json:"compromised,omitzero"`
	// Succession is the step to this version, where the key is a signing key that could sign it.
	Succession *Succession `json:"succession,omitempty"`
	// Authorization is there for the Noise key of an appliance with an identity.
	Authorization *Authorization `json:"authorization,omitempty"`
}

// KeyName returns Key, or "" where it is not given.
func (v *Verify) KeyName() string {
	if v.Key == nil {
		return ""
	}
	return *v.Key
}

// Pong answers Ping. Time is the appliance's clock in Unix seconds.
type Pong struct {
	Service string `json:"service"`
	Time    int64  `json:"time"`
}

// KeyList answers Keys.
type KeyList struct {
	Keys []Key `json:"keys"`
}

// Key describes one version of a key.
type Key struct {
	Name       string  `json:"name"`
	Version    uint32  `json:"version"`
	Algorithm  string  `json:"algorithm"`
	State      string  `json:"state"`
	Custody    string  `json:"custody"`
	Provenance string  `json:"provenance"` // generated in the device, or imported
	PublicKey  Bytes32 `json:"public_key"`
	// Next is SHA-256 of the public key of the next version, which exists already. Whoever follows the line from this version on
	// must know it.
	Next *Bytes32 `json:"next,omitempty"`
}

// Signed answers Sign. Event is the index of the admission in the audit log. Repeated says that this request had been
// admitted before: the signature is the one that belongs to that admission.
type Signed struct {
	Signature Bytes   `json:"signature"`
	PublicKey Bytes32 `json:"public_key"`
	Key       string  `json:"key"`
	Version   uint32  `json:"version"`
	Nonce     Bytes32 `json:"nonce"`
	Timestamp int64   `json:"timestamp"`
	ExpiresAt int64   `json:"expires_at"`
	Event     uint64  `json:"event"`
	Repeated  bool    `json:"repeated"`
	// Receipt is there where the document is a payment.
	Receipt *Receipt `json:"receipt,omitempty"`
}

// Receipt names the record that the appliance keeps of a payment. It has the amount as a commitment only: SHA-256 of
// "countersign-receipt-v1", a zero byte, the salt, the amount, a space, and the currency. The salt is with the peer alone.
type Receipt struct {
	ID   Bytes `json:"id"`
	Salt Bytes `json:"salt"`
}

// Proven answers Proof: the event as it is in the log, its place in its epoch's tree, the path to the root (RFC 6962 section
// 2.1.1), and a signed checkpoint (C2SP tlog-checkpoint) of that tree.
type Proven struct {
	Event      uint64    `json:"event"`
	Epoch      uint32    `json:"epoch"`
	Index      uint64    `json:"index"`
	Leaf       Bytes     `json:"leaf"`
	Path       []Bytes32 `json:"path"`
	Checkpoint string    `json:"checkpoint"`
}

// Verified answers Verify; Valid is always true, since every other outcome is an error with its code.
type Verified struct {
	Valid bool   `json:"valid"`
	Event uint64 `json:"event"`
}

// Answer is the envelope of every answer: one of Result and Error is set.
type Answer struct {
	ID     string          `json:"id"`
	Result json.RawMessage `json:"result,omitzero"`
	Error  *Error          `json:"error,omitempty"`
}

// Error is a refusal. Programs read Code, people read Message. RetryAfter is there with busy and rate_limited: seconds after which
// the same request may be sent again.
type Error struct {
	Code       string `json:"code"`
	Message    string `json:"message"`
	RetryAfter int    `json:"retry_after,omitzero"`
}

func (e *Error) Error() string { return e.Code + ": " + e.Message }

// required names the fields that each operation must have; Parse refuses a request without one, or with null for one.
var required = map[string][]string{
	OpPing:   {},
	OpKeys:   {},
	OpSign:   {"key", "type", "payload", "nonce", "timestamp", "expires_at"},
	OpVerify: {"type", "payload", "nonce", "timestamp", "expires_at", "signature", "public_key"},
	OpProof:  {"event"},
	OpLine:   {"key", "from"},
	OpAck:    {"key", "version"},
}

// Parse reads a request strictly. It returns a *Ping, *Keys, *Sign, *Verify, *Proof, *Line, *Ack or *Batch, the last with at most so many items.
// The error is an *Error; the id is given back with it whenever the document was sound enough to have one.
func Parse(b []byte, maxItems int) (id string, request any, err error) {
	if len(b) > MaxDocument {
		return "", nil, refuse(CodeMalformed, "the document has more than %d bytes", MaxDocument)
	}
	document, err := ijson.Parse(b)
	if err != nil {
		return "", nil, refuse(CodeMalformed, "%v", err)
	}
	if strict.Unmarshal(document.Members["id"], &id) != nil || id == "" || len(id) > maxID {
		return "", nil, refuse(CodeMalformed, "id must be a string of 1 to %d bytes", maxID)
	}
	op, refusal := opOf(document)
	if refusal != nil {
		return id, nil, refusal
	}
	switch op {
	case OpPing:
		request = new(Ping)
	case OpKeys:
		request = new(Keys)
	case OpSign:
		request = new(Sign)
	case OpVerify:
		request = new(Verify)
	case OpProof:
		request = new(Proof)
	case OpLine:
		request = new(Line)
	case OpAck:
		request = new(Ack)
	case OpBatch:
		return parseBatch(id, document, maxItems)
	default:
		return id, nil, refuse(CodeUnsupported, "unknown op: this appliance knows ping, keys, sign, verify, proof, batch, line, rotation.ack")
	}
	if err := document.Into(request, required[op]...); err != nil {
		return id, nil, refuse(CodeMalformed, "%v", err)
	}
	if line, is := request.(*Line); is && line.From == 0 {
		return id, nil, refuse(CodeMalformed, "from: versions are counted from 1")
	}
	if ack, is := request.(*Ack); is && ack.Version == 0 {
		return id, nil, refuse(CodeMalformed, "version: versions are counted from 1")
	}
	return id, request, nil
}

func opOf(document ijson.Object) (op string, refusal *Error) {
	if v := document.Members["op"]; len(v) == 0 || v.Kind() != '"' || strict.Unmarshal(v, &op) != nil {
		return "", refuse(CodeMalformed, "op must be a string")
	}
	return op, nil
}

// parseBatch reads a batch. An item that has no sound form is answered by itself.
func parseBatch(id string, document ijson.Object, maxItems int) (string, any, error) {
	var b struct {
		ID    string            `json:"id"`
		Op    string            `json:"op"`
		Items []json.RawMessage `json:"items"`
	}
	if err := document.Into(&b, "items"); err != nil {
		return id, nil, refuse(CodeMalformed, "%v", err)
	}
	if len(b.Items) == 0 || len(b.Items) > maxItems {
		return id, nil, refuse(CodeTooLarge, "a batch has 1 to %d items, not %d", maxItems, len(b.Items))
	}
	batch := &Batch{ID: id, Op: b.Op}
	for _, item := range b.Items {
		batch.Items = append(batch.Items, parseItem(item))
	}
	return id, batch, nil
}

func parseItem(b []byte) any {
	document, err := ijson.Parse(b)
	if err != nil {
		return refuse(CodeMalformed, "%v", err)
	}
	op, refusal := opOf(document)
	if refusal != nil {
		return refusal
	}
	var request any
	switch op {
	case OpSign:
		request = new(Sign)
	case OpVerify:
		request = new(Verify)
	default:
		return refuse(CodeUnsupported, "an item's op is sign or verify")
	}
	if _, has := document.Members["id"]; has {
		return refuse(CodeMalformed, "an item has no id: its answer has the item's place")
	}
	if err := document.Into(request, required[op]...); err != nil {
		return refuse(CodeMalformed, "%v", err)
	}
	return request
}

func refuse(code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// Encode writes a request, or an answer's result.
func Encode(v any) ([]byte, error) { return strict.Marshal(v) }

// EncodeAnswer writes the answer to the request with the given id: the result, or where err is not nil the error.
// An answer that does not fit into a message becomes the error too_large.
func EncodeAnswer(id string, result any, refusal *Error) []byte {
	a := Answer{ID: id, Error: refusal}
	if refusal == nil {
		b, err := strict.Marshal(result)
		if err != nil {
			panic("wire: a result that is not JSON: " + err.Error()) // our own types always are
		}
		a.Result = b
	}
	b, err := strict.Marshal(a)
	if err != nil {
		panic("wire: an answer that is not JSON: " + err.Error())
	}
	if len(b) > MaxDocument {
		return EncodeAnswer(id, nil, refuse(CodeTooLarge, "the answer does not fit into %d bytes", MaxDocument))
	}
	return b
}

// DecodeAnswer reads an answer strictly.
func DecodeAnswer(b []byte) (Answer, error) {
	var a Answer
	if err := ijson.Decode(b, &a); err != nil {
		return Answer{}, fmt.Errorf("wire: answer: %w", err)
	}
	if (a.Error == nil) == (len(a.Result) == 0) {
		return Answer{}, errors.New("wire: answer: must have one of result and error")
	}
	return a, nil
}

// EncodeRotation writes a rotation event.
func EncodeRotation(r Rotation) []byte {
	r.Event = EventRotation
	b, err := strict.Marshal(r)
	if err != nil {
		panic("wire: a rotation that is not JSON: " + err.Error())
	}
	return b
}

// ErrUnknownEvent: the appliance tells something that this version has no word for. Nothing has to be done about it.
var ErrUnknownEvent = errors.New("wire: unknown event")

// DecodeMessage reads what an appliance sends, strictly: an answer, or where rotation is not nil an event. An event of another
// name is ErrUnknownEvent, whatever it has, so that a later appliance can tell more.
func DecodeMessage(b []byte) (answer Answer, rotation *Rotation, err error) {
	document, err := ijson.Parse(b)
	if err != nil {
		return Answer{}, nil, fmt.Errorf("wire: %w", err)
	}
	value, is := document.Members["event"]
	if !is {
		answer, err = DecodeAnswer(b)
		return answer, nil, err
	}
	var event string
	if value.Kind() != '"' || strict.Unmarshal(value, &event) != nil || event == "" {
		return Answer{}, nil, errors.New("wire: event must be text")
	}
	if event != EventRotation {
		return Answer{}, nil, fmt.Errorf("%w %q", ErrUnknownEvent, ijson.Clip(event))
	}
	if rotation, err = parseRotation(document); err != nil {
		return Answer{}, nil, fmt.Errorf("wire: rotation: %w", err)
	}
	return Answer{}, rotation, nil
}

func parseRotation(document ijson.Object) (*Rotation, error) {
	r := new(Rotation)
	if err := document.Into(r, "event", "key", "version", "public_key", "activates_at", "retires_at"); err != nil {
		return nil, err
	}
	switch {
	case r.Key == "" || len(r.Key) > maxKey:
		return nil, fmt.Errorf("key must have 1 to %d bytes", maxKey)
	case r.Version == 0:
		return nil, errors.New("version: versions are counted from 1")
	case r.ActivatesAt < 0 || r.ActivatesAt > maxTime || r.RetiresAt < 0 || r.RetiresAt > maxTime:
		return nil, fmt.Errorf("activates_at and retires_at must be Unix seconds between 0 and %d", int64(maxTime))
	}
	if r.Succession != nil {
		if err := ijson.Decode(document.Members["succession"], new(Succession), "payload", "nonce", "timestamp", "expires_at", "signature"); err != nil {
			return nil, fmt.Errorf("succession: %w", err)
		}
	}
	if r.Authorization != nil {
		if err := ijson.Decode(document.Members["authorization"], new(Authorization), "payload", "signature"); err != nil {
			return nil, fmt.Errorf("authorization: %w", err)
		}
	}
	return r, nil
}

// Into decodes the result into v strictly.
func (a Answer) Into(v any) error {
	if a.Error != nil {
		return a.Error
	}
	if err := ijson.Decode(a.Result, v); err != nil {
		return fmt.Errorf("wire: result: %w", err)
	}
	return nil
}

func (b Bytes) MarshalText() ([]byte, error) {
	return base64.RawURLEncoding.AppendEncode(nil, b), nil
}

func (b *Bytes) UnmarshalText(text []byte) error {
	v, err := base64.RawURLEncoding.Strict().DecodeString(string(text))
	if err != nil || bytes.ContainsAny(text, "\r\n") { // the decoder skips line ends
		return errors.New("must be base64url without padding")
	}
	*b = v
	return nil
}

func (b Bytes32) MarshalText() ([]byte, error) { return Bytes(b[:]).MarshalText() }

func (b *Bytes32) UnmarshalText(text []byte) error {
	var v Bytes
	if err := v.UnmarshalText(text); err != nil || len(v) != len(b) {
		return errors.New("must be 32 bytes: 43 characters of base64url without padding")
	}
	copy(b[:], v)
	return nil
}
