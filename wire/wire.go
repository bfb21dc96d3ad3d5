// Package wire defines the messages that a peer and the appliance exchange inside a Noise
// connection: one JSON document a message, requests from the peer, answers and events from the
// appliance. The package knows fields and their forms, and no cryptography. docs/SPEC.md is the
// specification. Begin reading at Parse.
//
// Documents are I-JSON (RFC 7493): UTF-8, no duplicate names, no surrogates or noncharacters. Both
// sides refuse unknown fields. Bytes are base64url without padding, times are Unix seconds.
package wire

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"countersign/internal/ijson"

	strict "github.com/go-json-experiment/json"
)

// MaxDocument is the longest JSON document, in bytes: a Noise message of 65,535 bytes less its
// 16-byte authentication tag.
const MaxDocument = 65535 - 16

const (
	maxID   = 64           // bytes of a request's id
	maxKey  = 64           // bytes of a key's name
	maxTime = 253402300799 // Unix seconds: the last second of the year 9999
)

// The operations that a request names in its field op.
const (
	OpPing        = "ping"
	OpKeys        = "keys"
	OpSign        = "sign"
	OpVerify      = "verify"
	OpProof       = "proof"
	OpEpoch       = "epoch"
	OpConsistency = "consistency"
	OpBatch       = "batch"
	OpLine        = "line"
	OpAck         = "rotation.ack"

	OpCompromiseAck = "compromise.ack"
)

// The codes of an error answer. Programs decide by the codes, so a code never changes.
const (
	CodeMalformed        = "malformed"         // the request does not have the specified form
	CodeUnsupported      = "unsupported"       // unknown operation or transcript type
	CodeTooLarge         = "too_large"         // the request or its answer does not fit into a message
	CodeUnknownKey       = "unknown_key"       // no key has this name
	CodeKeyNotActive     = "key_not_active"    // the key exists, but may not sign now
	CodeKeyRotated       = "key_rotated"       // another version than the requested one signs; nothing was signed
	CodeDenied           = "denied"            // policy does not allow the request
	CodeNotConfirmed     = "not_confirmed"     // an operator must confirm that the key may sign now
	CodeReplay           = "replay"            // the nonce is spent
	CodeRestored         = "restored"          // the appliance was restored, and can't know a document of before
	CodeExpired          = "expired"           // expires_at has passed
	CodeNotYetValid      = "not_yet_valid"     // timestamp lies in the future
	CodeLifetimeTooLong  = "lifetime_too_long" // expires_at - timestamp is over the maximum
	CodeInvalidSignature = "invalid_signature" // the signature does not verify, or its key is unusable
	CodeWrongSigner      = "wrong_signer"      // the document does not name the key as one of its signers
	CodeRateLimited      = "rate_limited"      // too many requests of this peer in a second
	CodeBusy             = "busy"              // too many requests are being served, for this peer or in all
	CodeUnavailable      = "unavailable"       // the appliance can't answer now; the same request may be sent again
)

// The values of Key.State.
const (
	StatePending     = "pending"     // announced, not active yet
	StateActive      = "active"      // the version that signs; a key has at most one
	StateVerifyOnly  = "verify-only" // replaced, and accepted until the version retires
	StateCompromised = "compromised" // no signature of the version is believed
	StateArchived    = "archived"    // after a compromise: out of use
	StateDestroyed   = "destroyed"   // after a compromise: the private key is gone
)

// The values of Key.Custody.
const (
	CustodyHSM = "hsm-resident" // the private key never leaves the token
	CustodyTPM = "tpm-sealed"   // encrypted by a TPM; in protected memory while in use

	// As the two above, with a copy that only M of N recovery holders together can open.
	CustodyHSMRecoverable = "hsm-recoverable"
	CustodyTPMRecoverable = "tpm-recoverable"
)

// The values of Key.Provenance.
const (
	Generated  = "generated"  // by the device, and never given out
	Imported   = "imported"   // has been outside the device
	Unreported = "unreported" // made by the device, which does not say so of its keys
)

// Ed25519 is the only value of Key.Algorithm.
const Ed25519 = "ed25519"

// Bytes is base64url without padding in JSON.
type Bytes []byte

// Bytes32 is 32 bytes, base64url without padding (43 characters) in JSON.
type Bytes32 [32]byte

// Document is a payload to be signed, with its envelope. The envelope (nonce, timestamp,
// expires_at) makes the signature single use and short-lived.
type Document struct {
	Type      string          `json:"type"`
	Payload   json.RawMessage `json:"payload"`
	Nonce     Bytes32         `json:"nonce"`
	Timestamp int64           `json:"timestamp"`
	ExpiresAt int64           `json:"expires_at"`
}

// Ping asks whether the appliance answers.
type Ping struct {
	ID string `json:"id"`
	Op string `json:"op"`
	Traced
}

// Keys asks for the list of signing keys.
type Keys struct {
	ID string `json:"id"`
	Op string `json:"op"`
	Traced
}

// Sign asks for a signature with the active version of a key. With a Version other than 0, a
// signature by any other version is refused before the admission.
type Sign struct {
	ID      string `json:"id"`
	Op      string `json:"op"`
	Key     string `json:"key"`
	Version uint32 `json:"version,omitzero"`
	Document
	Traced
}

// Verify asks whether a signature is valid, and spends the document's nonce. Key is optional:
// with a Key, PublicKey must be one of that key's versions.
type Verify struct {
	ID        string  `json:"id"`
	Op        string  `json:"op"`
	Key       *string `json:"key,omitempty"`
	PublicKey Bytes32 `json:"public_key"`
	Signature Bytes   `json:"signature"`
	Document
	Traced
}

// Proof asks for the inclusion proof of an event in the audit log. A peer gets proofs of its own
// events only.
type Proof struct {
	ID    string `json:"id"`
	Op    string `json:"op"`
	Event uint64 `json:"event"`
	Traced
}

// Epoch asks for the first event of an epoch of the audit log, with its inclusion proof. The event
// names the size and root of the epoch before.
type Epoch struct {
	ID    string `json:"id"`
	Op    string `json:"op"`
	Epoch uint32 `json:"epoch"`
	Traced
}

// Consistency asks for the proof that the tree of To leaves of an epoch continues the tree of From
// leaves.
type Consistency struct {
	ID    string `json:"id"`
	Op    string `json:"op"`
	Epoch uint32 `json:"epoch"`
	From  uint64 `json:"from"`
	To    uint64 `json:"to"`
	Traced
}

// Batch has several requests in one message. An item is a *Sign or a *Verify without an id, or an
// *Error in place of an item that is neither.
type Batch struct {
	ID    string
	Op    string
	Items []any
	Traced
}

// Answers answers Batch, with one answer for each item in the order of the items.
type Answers struct {
	Answers []ItemAnswer `json:"answers"`
}

// ItemAnswer has either Result or Error.
type ItemAnswer struct {
	Result json.RawMessage `json:"result,omitzero"`
	Error  *Error          `json:"error,omitempty"`
}

// maxItemMessage bounds an item's Error.Message in bytes, so that the answers to a batch fit into
// one Noise message.
const maxItemMessage = 256

// NewItemAnswer makes the answer to an item of a batch: the result, or the refusal if not nil.
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
		panic("wire: a result that is not JSON: " + err.Error()) // the types of this package always marshal
	}
	return ItemAnswer{Result: b}
}

// Line asks for the succession steps of a key: those to version From+1 and later ones.
type Line struct {
	ID   string `json:"id"`
	Op   string `json:"op"`
	Key  string `json:"key"`
	From uint32 `json:"from"` // the version that the peer trusts; versions are counted from 1
	Traced
}

// Ack acknowledges the Rotation to a version of a key (OpAck), or the Compromise of a version
// (OpCompromiseAck).
type Ack struct {
	ID      string `json:"id"`
	Op      string `json:"op"`
	Key     string `json:"key"`
	Version uint32 `json:"version"`
	Change  uint32 `json:"change,omitzero"` // of the Rotation
	Traced
}

// Steps answers Line. With More, further steps exist: ask again from the last step's version.
type Steps struct {
	Key   string       `json:"key"`
	Steps []Succession `json:"steps"`
	More  bool         `json:"more"`
	// Active is the version that signs now; 0 for none. The version after Active is announced.
	Active uint32 `json:"active"`
	// Compromised lists all compromised versions of the key.
	Compromised []uint32 `json:"compromised"`
}

// Acknowledged answers Ack.
type Acknowledged struct {
	Key     string `json:"key"`
	Version uint32 `json:"version"`
}

// Succession is one step from a version of a key to a later one: a key-succession-v1 document and
// its signature by the old version, or by the new one if that is the recovery successor. A step
// stays valid for ever: Timestamp and ExpiresAt are those of the signing, and ExpiresAt does not
// end the step.
type Succession struct {
	Payload   json.RawMessage `json:"payload"`
	Nonce     Bytes32         `json:"nonce"`
	Timestamp int64           `json:"timestamp"`
	ExpiresAt int64           `json:"expires_at"`
	Signature Bytes           `json:"signature"`
}

// Authorization is a paykit-noise-key-authorization-v1 document and the signature of its owner.
type Authorization struct {
	Payload   json.RawMessage `json:"payload"`
	Signature Bytes           `json:"signature"`
}

// The values of Rotation.Event and Compromise.Event.
const (
	EventRotation   = "rotation"
	EventCompromise = "compromise"
)

// NoiseKey is the value of Rotation.Key for the listener's Noise key.
const NoiseKey = "noise"

// Rotation announces a new version of a key. The appliance sends a Rotation without a request,
// and a peer acknowledges with Ack.
type Rotation struct {
	Event       string  `json:"event"`
	Key         string  `json:"key"`
	Version     uint32  `json:"version"` // the new version
	PublicKey   Bytes32 `json:"public_key"`
	ActivatesAt int64   `json:"activates_at"` // when the new version begins to sign, or to answer handshakes
	RetiresAt   int64   `json:"retires_at"`   // when the old version ceases to be accepted, at the latest
	// Change orders what the appliance says of one key: the event with the higher Change is newer,
	// and of two with the same Change that of the higher version. Change rises when an announcement
	// is replaced or called off.
	Change uint32 `json:"change,omitzero"`
	// Cancelled is the version whose announcement was called off; 0: none. The event is then of the
	// version that stays active. The version called off stays its successor.
	Cancelled uint32 `json:"cancelled,omitzero"`
	// Succession is the step to this version: for a signing key whose old version could sign the
	// step.
	Succession *Succession `json:"succession,omitempty"`
	// Authorization is set for the Noise key of an appliance with an identity.
	Authorization *Authorization `json:"authorization,omitempty"`
}

// Compromise announces that the private key of a version may be in other hands: signatures of the
// version must not be trusted any more. The appliance sends a Compromise before all Rotations, on
// each connection until the peer has acknowledged with Ack and OpCompromiseAck.
type Compromise struct {
	Event     string  `json:"event"`
	Key       string  `json:"key"`
	Version   uint32  `json:"version"`
	PublicKey Bytes32 `json:"public_key"`
}

// KeyName returns Key, or "" without a Key.
func (v *Verify) KeyName() string {
	if v.Key == nil {
		return ""
	}
	return *v.Key
}

// Pong answers Ping.
type Pong struct {
	Service string `json:"service"`
	Time    int64  `json:"time"` // of the appliance's clock, in Unix seconds
}

// KeyList answers Keys.
type KeyList struct {
	Keys []Key `json:"keys"`
}

// Key describes one version of a key.
type Key struct {
	Name       string  `json:"name"`
	Version    uint32  `json:"version"`
	Algorithm  string  `json:"algorithm"`  // Ed25519
	State      string  `json:"state"`      // StateActive and so on
	Custody    string  `json:"custody"`    // one of the Custody constants
	Provenance string  `json:"provenance"` // Generated, Imported or Unreported
	PublicKey  Bytes32 `json:"public_key"`
	// Compromised stays set for ever, also when the version is destroyed.
	Compromised bool `json:"compromised,omitzero"`
	// Next is the SHA-256 of the public key of the next version, which exists already. A peer needs
	// Next to check the succession step from this version to the next.
	Next *Bytes32 `json:"next,omitempty"`
	// Recovery is the commitment of the line to its recovery successor, which is on another device
	// (transcript.RecoveryCommitment). Only the active version and an announced one have it.
	Recovery *Bytes32 `json:"recovery,omitempty"`
}

// Signed answers Sign.
type Signed struct {
	Signature Bytes   `json:"signature"`
	PublicKey Bytes32 `json:"public_key"`
	Key       string  `json:"key"`
	Version   uint32  `json:"version"`
	Nonce     Bytes32 `json:"nonce"`
	Timestamp int64   `json:"timestamp"`
	ExpiresAt int64   `json:"expires_at"`
	// Event is the index of the admission in the audit log.
	Event uint64 `json:"event"`
	// Repeated says that an earlier identical request was admitted: Event and the signature
	// belong to that admission.
	Repeated bool `json:"repeated"`
	// Receipt is set for a document that is a payment.
	Receipt *Receipt `json:"receipt,omitempty"`
}

// Receipt names the record that the appliance keeps of a payment. The record has a commitment in
// place of the amount: the SHA-256 of "countersign-receipt-v1", a zero byte, the salt, the
// amount, a space and the currency. Only the peer keeps the salt. `countersign admin receipt list`
// shows an operator the ID and the commitment.
type Receipt struct {
	ID   Bytes `json:"id"`
	Salt Bytes `json:"salt"`
}

// Commitment is the commitment in the record of a payment of this amount and currency, in the form
// that the signed document has.
func (r Receipt) Commitment(amount, currency string) [32]byte {
	b := append([]byte("countersign-receipt-v1\x00"), r.Salt...)
	return sha256.Sum256(append(b, amount+" "+currency...))
}

// Proven answers Proof with an inclusion proof (RFC 6962, section 2.1.1).
type Proven struct {
	Event      uint64    `json:"event"`
	Epoch      uint32    `json:"epoch"`      // of the log; each epoch has a Merkle tree
	Index      uint64    `json:"index"`      // of the leaf in that tree
	Leaf       Bytes     `json:"leaf"`       // the event as the log has it
	Path       []Bytes32 `json:"path"`       // hashes from the leaf to the root
	Checkpoint string    `json:"checkpoint"` // signed tree head (C2SP tlog-checkpoint)
}

// Consistent answers Consistency with a consistency proof (RFC 6962, section 2.1.2).
type Consistent struct {
	Path []Bytes32 `json:"path"`
}

// Verified answers Verify. Valid is always true: every other outcome is an error with a code.
type Verified struct {
	Valid bool   `json:"valid"`
	Event uint64 `json:"event"`
}

// Answer is the envelope of every answer. An Answer has either Result or Error.
type Answer struct {
	ID string `json:"id"`
	// Request is the appliance's id of the request, in the audit log and in the daemon's log.
	Request string          `json:"request,omitzero"`
	Result  json.RawMessage `json:"result,omitzero"`
	Error   *Error          `json:"error,omitempty"`
}

// Error is a refusal.
type Error struct {
	Code    string `json:"code"`    // for programs: CodeMalformed and so on
	Message string `json:"message"` // for people
	// RetryAfter is set with busy and rate_limited: the same request may be sent again after so
	// many seconds.
	RetryAfter int `json:"retry_after,omitzero"`
	// TimestampAfter is set with restored: a new document needs a timestamp after it, Unix seconds.
	TimestampAfter int64 `json:"timestamp_after,omitzero"`
	// Request is the id of the refused request, which an operator can search for. The field is set
	// by Answer.Into, and is no part of the message.
	Request string `json:"-"`
}

func (e *Error) Error() string {
	text := e.Code
	if e.Message != "" {
		text += ": " + e.Message
	}
	if e.Request != "" {
		text += " (request " + e.Request + ")"
	}
	return text
}

// Is makes an Error that has nothing but a Code stand for all refusals with this code: errors.Is
// finds such an Error in each of them.
func (e *Error) Is(target error) bool {
	t, is := target.(*Error)
	return is && *t == Error{Code: e.Code}
}

// required names the fields that each operation must have. Parse refuses a request in which one of
// the fields is absent or null.
var required = map[string][]string{
	OpPing:        {},
	OpKeys:        {},
	OpSign:        {"key", "type", "payload", "nonce", "timestamp", "expires_at"},
	OpVerify:      {"type", "payload", "nonce", "timestamp", "expires_at", "signature", "public_key"},
	OpProof:       {"event"},
	OpEpoch:       {"epoch"},
	OpConsistency: {"epoch", "from", "to"},
	OpLine:        {"key", "from"},
	OpAck:         {"key", "version"},

	OpCompromiseAck: {"key", "version"},
}

// Parse reads a request strictly. The request is a *Ping, *Keys, *Sign, *Verify, *Proof, *Line,
// *Ack, or a *Batch of at most maxItems items. The error is an *Error. An error comes with the id
// if the document is I-JSON and has a valid id, so that the answer can name the request.
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
	op, refusal := parseOp(document)
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
	case OpEpoch:
		request = new(Epoch)
	case OpConsistency:
		request = new(Consistency)
	case OpLine:
		request = new(Line)
	case OpAck, OpCompromiseAck:
		request = new(Ack)
	case OpBatch:
		return parseBatch(id, document, maxItems)
	default:
		return id, nil, refuse(CodeUnsupported,
			"unknown op: this appliance knows ping, keys, sign, verify, proof, epoch, consistency, "+
				"batch, line, rotation.ack, compromise.ack")
	}
	if err := document.Into(request, required[op]...); err != nil {
		return id, nil, refuse(CodeMalformed, "%v", err)
	}
	if c, is := request.(*Consistency); is && (c.From == 0 || c.From > c.To) {
		return id, nil, refuse(CodeMalformed, "from must be at least 1, and to at least from: both count events")
	}
	if line, is := request.(*Line); is && line.From == 0 {
		return id, nil, refuse(CodeMalformed, "from must be at least 1: versions are counted from 1")
	}
	if ack, is := request.(*Ack); is && ack.Version == 0 {
		return id, nil, refuse(CodeMalformed, "version must be at least 1: versions are counted from 1")
	} else if is && op == OpCompromiseAck && ack.Change != 0 {
		return id, nil, refuse(CodeMalformed, "a compromise has no change: leave the field out")
	}
	return id, request, nil
}

func parseOp(document ijson.Object) (op string, refusal *Error) {
	if v := document.Members["op"]; len(v) == 0 || v.Kind() != '"' || strict.Unmarshal(v, &op) != nil {
		return "", refuse(CodeMalformed, "op must be a string")
	}
	return op, nil
}

// parseBatch reads a batch. A malformed item becomes an *Error in its place and does not refuse the
// other items.
func parseBatch(id string, document ijson.Object, maxItems int) (string, any, error) {
	var b struct {
		ID    string          `json:"id"`
		Op    string          `json:"op"`
		Items json.RawMessage `json:"items"`
		Traced
	}
	if err := document.Into(&b, "items"); err != nil {
		return id, nil, refuse(CodeMalformed, "%v", err)
	}
	items, err := ijson.Elements(document.Members["items"], maxItems)
	if err != nil && !errors.Is(err, ijson.ErrTooMany) {
		return id, nil, refuse(CodeMalformed, "items: %v", err)
	}
	if err != nil || len(items) == 0 {
		return id, nil, refuse(CodeTooLarge, "a batch has 1 to %d items", maxItems)
	}
	batch := &Batch{ID: id, Op: b.Op, Traced: b.Traced}
	for _, item := range items {
		batch.Items = append(batch.Items, parseItem(item))
	}
	return id, batch, nil
}

func parseItem(b []byte) any {
	document, err := ijson.Inner(b)
	if err != nil {
		return refuse(CodeMalformed, "%v", err)
	}
	op, refusal := parseOp(document)
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
		return refuse(CodeMalformed, "an item must not have an id: answers come in the order of the items")
	}
	if _, has := document.Members["traceparent"]; has {
		return refuse(CodeMalformed, "an item must not have a traceparent: the batch has one for all items")
	}
	if err := document.Into(request, required[op]...); err != nil {
		return refuse(CodeMalformed, "%v", err)
	}
	return request
}

func refuse(code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// Encode writes a request, or the result of an answer.
func Encode(v any) ([]byte, error) { return strict.Marshal(v) }

// mustEncode writes what the appliance sends: the types of this package always marshal.
func mustEncode(v any) []byte {
	b, err := Encode(v)
	if err != nil {
		panic(fmt.Sprintf("wire: a %T that is not JSON: %v", v, err))
	}
	return b
}

// EncodeAnswer writes the answer to the request with the peer's id and the appliance's id: the
// result, or the refusal if not nil. An answer of more than MaxDocument bytes becomes the error
// too_large.
func EncodeAnswer(id, request string, result any, refusal *Error) []byte {
	a := Answer{ID: id, Request: request, Error: refusal}
	if refusal == nil {
		a.Result = mustEncode(result)
	}
	b := mustEncode(a)
	if len(b) > MaxDocument {
		refusal := refuse(CodeTooLarge, "the answer does not fit into %d bytes", MaxDocument)
		return EncodeAnswer(id, request, nil, refusal)
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

// EncodeRotation writes a rotation event, with Event set.
func EncodeRotation(r Rotation) []byte {
	r.Event = EventRotation
	return mustEncode(r)
}

// EncodeCompromise writes a compromise event, with Event set.
func EncodeCompromise(c Compromise) []byte {
	c.Event = EventCompromise
	return mustEncode(c)
}

// ErrUnknownEvent reports an event of a kind that this version does not know, sent by a newer
// appliance. A peer ignores such an event.
var ErrUnknownEvent = errors.New("wire: unknown event")

// DecodeMessage reads a message of an appliance strictly: an event if event is not nil, otherwise
// an answer. The event is a *Rotation or a *Compromise. An event with another name is
// ErrUnknownEvent with any other fields, so that later appliances can send new events.
func DecodeMessage(b []byte) (answer Answer, event any, err error) {
	document, err := ijson.Parse(b)
	if err != nil {
		return Answer{}, nil, fmt.Errorf("wire: %w", err)
	}
	value, is := document.Members["event"]
	if !is {
		answer, err = DecodeAnswer(b)
		return answer, nil, err
	}
	var name string
	if value.Kind() != '"' || strict.Unmarshal(value, &name) != nil || name == "" {
		return Answer{}, nil, errors.New("wire: event must be text")
	}
	switch name {
	case EventRotation:
		event, err = parseRotation(document)
	case EventCompromise:
		event, err = parseCompromise(document)
	default:
		return Answer{}, nil, fmt.Errorf("%w %q", ErrUnknownEvent, ijson.Clip(name))
	}
	if err != nil {
		return Answer{}, nil, fmt.Errorf("wire: %s: %w", name, err)
	}
	return Answer{}, event, nil
}

// checkEvent checks the fields that all events have.
func checkEvent(key string, version uint32) error {
	switch {
	case key == "" || len(key) > maxKey:
		return fmt.Errorf("key must have 1 to %d bytes", maxKey)
	case version == 0:
		return errors.New("version must be at least 1: versions are counted from 1")
	}
	return nil
}

func parseCompromise(document ijson.Object) (*Compromise, error) {
	c := new(Compromise)
	if err := document.Into(c, "event", "key", "version", "public_key"); err != nil {
		return nil, err
	}
	return c, checkEvent(c.Key, c.Version)
}

func parseRotation(document ijson.Object) (*Rotation, error) {
	r := new(Rotation)
	if err := document.Into(r, "event", "key", "version", "public_key", "activates_at", "retires_at"); err != nil {
		return nil, err
	}
	if err := checkEvent(r.Key, r.Version); err != nil {
		return nil, err
	}
	if r.ActivatesAt < 0 || r.ActivatesAt > maxTime || r.RetiresAt < 0 || r.RetiresAt > maxTime {
		return nil, fmt.Errorf("activates_at and retires_at must be Unix seconds between 0 and %d", int64(maxTime))
	}
	if r.Cancelled != 0 && r.Cancelled != r.Version+1 {
		return nil, errors.New("cancelled must be the version after version")
	}
	if r.Succession != nil {
		err := ijson.Decode(document.Members["succession"], new(Succession),
			"payload", "nonce", "timestamp", "expires_at", "signature")
		if err != nil {
			return nil, fmt.Errorf("succession: %w", err)
		}
	}
	if r.Authorization != nil {
		err := ijson.Decode(document.Members["authorization"], new(Authorization), "payload", "signature")
		if err != nil {
			return nil, fmt.Errorf("authorization: %w", err)
		}
	}
	return r, nil
}

// Into decodes the result into v strictly. The error is a.Error if the answer has one, with the id
// of the request.
func (a Answer) Into(v any) error {
	if a.Error != nil {
		refusal := *a.Error
		refusal.Request = a.Request
		return &refusal
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
	if err != nil || bytes.ContainsAny(text, "\r\n") { // encoding/base64 skips line ends
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
