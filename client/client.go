// Package client is the SDK for peers of a Countersign appliance: payment servers and tools that
// have documents signed and verified over Noise. The package needs no cgo. Begin reading at Config
// and New, or with the examples.
//
// A program makes one Client for each appliance. Client.Sign has a document signed, and
// Client.SignAs one that names its signer; Client.Verify has a document verified, once for each
// nonce; Client.Batch does many of both; Client.Signer is a crypto.Signer. docs/PEERS.md says which
// keys and files the program keeps, and where.
//
// A Client keeps one connection and shares it among its callers. Requests are pipelined, and a
// broken connection is replaced. After a lost answer, the client sends an idempotent request again
// by itself: an identical sign request gets the first signature, marked as repeated. A verify
// request is not idempotent, because the lost one may have spent the nonce. Its caller gets
// ErrUnknownOutcome and has to decide.
package client

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"countersign/audit"
	"countersign/internal/durable"
	"countersign/internal/eddsa"
	"countersign/internal/ijson"
	"countersign/internal/pubkey"
	"countersign/noise"
	"countersign/transcript"
	"countersign/wire"
)

// MaxRequest is the maximum length of a request in bytes of JSON.
const MaxRequest = wire.MaxDocument

// Config names the appliance, the identity of the peer, and the keys to trust.
type Config struct {
	// Address is host:port of the listener.
	Address string
	// ServerKey is the listener's Noise static public key, which `countersign admin noise-key`
	// prints; see ParseKey and ReadKey.
	ServerKey [32]byte
	// LogKey is the verifier key of the appliance's audit log, of any epoch, as `countersign admin
	// audit key` prints it. Where LogKey is set, Sign and Verify also get and check the proof that
	// their event is in the log, and fail with ErrUnproven without a valid one. The proof costs one
	// more round trip, and needs an appliance that can sign a checkpoint. Default: none.
	//
	// The client remembers the newest checkpoint of the log, and each later one must continue it:
	// a log that was set back, or that is not the same for all, is ErrForkedLog. A new checkpoint
	// costs a further round trip.
	LogKey string
	// LogCheckpoint is the path of a file in which the client keeps the newest checkpoint, so that
	// a restart does not forget the log. The client makes the file. Each new checkpoint is on the
	// disk before the signature is returned. The file has the form of the log's own checkpoints
	// (countersign audit verify --since). Each process needs a file of its own. Default: none,
	// which remembers until Close.
	LogCheckpoint string
	// Identity is this peer's static key; see ReadIdentity. The appliance must have its public half
	// enrolled, by `countersign admin peer add`.
	Identity *noise.Identity
	// FormerKeys are public keys that this peer had before. A request that was admitted by a former
	// key may be repeated with the present one, and its event names the former key: with LogKey, a
	// proof of such an event is accepted. Default: none.
	FormerKeys [][32]byte
	// ConnectTimeout is the timeout of one attempt to connect and shake hands. Default: 10 s.
	ConnectTimeout time.Duration
	// Lifetime is the lifetime of a document without an ExpiresAt of its own. Default: 1 h.
	Lifetime time.Duration
	// RetryFor is how long a call retries when the connection can't be made or breaks, and when the
	// appliance is busy. The call's context may end the retries earlier. Default: 0, which replaces
	// a broken connection once, without backoff.
	RetryFor time.Duration

	// Traceparent returns the trace context for a request (the header traceparent of W3C Trace
	// Context), or "". The argument is the context of the call, from which OpenTelemetry's
	// propagation.TraceContext makes the header. An appliance that sends traces continues this
	// trace. A text that is no traceparent of version 00 is left out: no request fails for its
	// trace. Default: none.
	Traceparent func(context.Context) string

	// Lines are the pinned versions of keys; see ReadKeyLine. Of a pinned key, Sign returns a
	// signature only by the pinned version, or by one that follows by the rules of KeyLine.Follow;
	// any other fails with ErrBrokenLine, and a compromised one with ErrCompromised. The client
	// gets the steps from the appliance and remembers the newest version; see Pinned. Default:
	// none, which accepts whatever public key the appliance names.
	Lines []KeyLine
	// OnRotation is called with rotations, one after the other, by a goroutine of its own:
	// OnRotation may block and may use the client, which New makes before it connects. Of a burst,
	// only the newest event of each key is delivered. An event is delivered once. The appliance
	// sends an event again, for example after a restart, until the client has acknowledged. An
	// event with an Err is not acknowledged, and a broken connection may lose an acknowledgement.
	// While the appliance does not show a pinned line, as to a peer at its limit of requests, the
	// client delivers the event every few seconds, with an Err, until the line is there.
	OnRotation func(Rotation)
	// OnCompromise is called with each compromise of a key's version, once for each version while
	// the client lives: also of versions older than a pinned one, whose documents the application
	// may still have. Of a version that the client had trusted, OnCompromise has returned before
	// any call returns a signature of a version that is used for the first time after that. The
	// caller is the goroutine of such a call, or that of the events, so OnCompromise may be called
	// several times at once. Other calls that use the pinned line wait for it. OnCompromise may use
	// the client, in its context, which ends with the client: a call in another context waits for
	// OnCompromise too, and ends with ErrCompromised after 10 s. The appliance repeats the event at
	// each connection until the client has acknowledged, which the client does when OnCompromise
	// has returned. Default: none. Then a compromise is not acknowledged, and calls that use a
	// pinned line end with ErrCompromised where the client had trusted the version.
	OnCompromise func(context.Context, Compromise)
	// OnServerKey is called with the listener's new Noise key before OnRotation. The application
	// stores the new key for its next start (WriteKey), and the generation of its authorization,
	// which is 0 without a ServerIdentity. Both keys answer until the old one retires. While the
	// new key may not answer everywhere, an application that starts with the new key gives the old
	// one as FormerServerKey. A running client changes over by itself. When OnServerKey returns,
	// the client acknowledges, so OnServerKey returns only after the new key is stored.
	OnServerKey func(key [32]byte, generation uint64)
	// FormerServerKey is tried when the appliance refuses ServerKey. Remove FormerServerKey when
	// the old key has retired: a thief of its private key can pose as the appliance. Default: none.
	FormerServerKey [32]byte
	// ServerIdentity is the Ed25519 key of an appliance with an identity: the active version of the
	// key that noise_identity in the appliance's configuration names. Where ServerIdentity is set,
	// a new Noise key needs a signature of the identity, with a generation of at least
	// ServerGeneration and of at least the last one seen. A thief of the present Noise key then
	// can't lead the client to a key of his own. Default: none, which trusts the channel.
	ServerIdentity [32]byte
	// ServerGeneration is the highest generation that OnServerKey has reported.
	ServerGeneration uint64
	// Unacknowledged leaves acknowledgements to the application; see Client.Acknowledge. Until
	// then, OnRotation is called whenever the event comes again.
	//
	// By default, the client acknowledges a rotation when OnRotation (of the Noise key:
	// OnServerKey) has returned, and without OnRotation where the line is pinned. A rotation
	// without a recipient is not acknowledged, because the appliance may retire the old version as
	// soon as all peers have acknowledged. A version from the configuration (ServerKey, Lines) is
	// acknowledged and not delivered, because the application knows of the version already.
	Unacknowledged bool
}

// Client is safe for concurrent use.
type Client struct {
	config Config
	memory *logMemory // of the log of Config.LogKey; nil without one

	base   context.Context // ended by Close
	cancel context.CancelFunc
	lock   chan struct{} // a mutex whose waiters a context can end
	conn   *conn         // under lock; nil without a connection
	closed bool          // under lock

	pins       map[string]*pin
	events     eventQueue
	serverKeys serverKeys
}

// New makes a client. The client connects at its first call.
func New(c Config) (*Client, error) {
	switch {
	case c.Address == "":
		return nil, errors.New("client: no Address: set host:port of the listener")
	case c.ServerKey == [32]byte{}:
		return nil, errors.New("client: no ServerKey: set the listener's public key")
	case c.Identity == nil:
		return nil, errors.New("client: no Identity: set this peer's static key")
	}
	if err := pubkey.CheckX25519(c.ServerKey[:]); err != nil {
		return nil, fmt.Errorf("client: ServerKey: %w", err)
	}
	if c.FormerServerKey != [32]byte{} {
		if err := pubkey.CheckX25519(c.FormerServerKey[:]); err != nil {
			return nil, fmt.Errorf("client: FormerServerKey: %w", err)
		}
	}
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = 10 * time.Second
	}
	if c.Lifetime == 0 {
		c.Lifetime = time.Hour
	}
	var memory *logMemory
	if c.LogKey != "" {
		log, err := audit.ParseVerifierKey(strings.TrimSuffix(c.LogKey, "\n"))
		if err != nil {
			return nil, fmt.Errorf("client: LogKey: %w", err)
		}
		if memory, err = openMemory(log, c.LogCheckpoint); err != nil {
			return nil, fmt.Errorf("client: LogCheckpoint: %w", err)
		}
	} else if c.LogCheckpoint != "" {
		return nil, errors.New("client: LogCheckpoint: without LogKey, no checkpoint can be checked: set both")
	}
	pins := map[string]*pin{}
	for _, l := range c.Lines {
		if err := l.check(); err != nil {
			return nil, fmt.Errorf("client: Lines: %w", err)
		}
		if pins[l.Key] != nil {
			return nil, fmt.Errorf("client: Lines: %q is pinned twice", l.Key)
		}
		pins[l.Key] = newPin(l)
	}
	if c.ServerIdentity != [32]byte{} {
		if _, err := eddsa.ParsePublicKey(c.ServerIdentity[:]); err != nil {
			return nil, fmt.Errorf("client: ServerIdentity: %w", err)
		}
	}
	base, cancel := context.WithCancel(context.Background())
	client := &Client{config: c, memory: memory, base: base, cancel: cancel, lock: make(chan struct{}, 1), pins: pins}
	k := &client.serverKeys
	k.used, k.old, k.generation = c.ServerKey, c.ServerKey, c.ServerGeneration
	if former := c.FormerServerKey; former != [32]byte{} && former != c.ServerKey {
		k.old, k.young, k.until = former, c.ServerKey, time.Unix(transcript.MaxTime, 0)
	}
	return client, nil
}

// Dial makes a client and connects.
func Dial(ctx context.Context, c Config) (*Client, error) {
	client, err := New(c)
	if err != nil {
		return nil, err
	}
	if _, err := client.connection(ctx); err != nil {
		return nil, err
	}
	return client, nil
}

// Close ends the connection and fails the calls under way. No callback begins after Close; a
// running one goes on.
func (c *Client) Close() error {
	c.cancel() // ends an attempt to connect
	c.lock <- struct{}{}
	defer func() { <-c.lock }()
	c.closed = true
	if c.conn != nil {
		c.conn.fail(ErrClosed)
		c.conn = nil
	}
	return nil
}

// Ping checks that the appliance answers, and returns the appliance's clock.
func (c *Client) Ping(ctx context.Context) (time.Time, error) {
	var pong wire.Pong
	err := c.call(ctx, true, func(id string) any { return wire.Ping{ID: id, Op: wire.OpPing} }, &pong)
	return time.Unix(pong.Time, 0), err
}

// Keys lists the signing keys, whichever of them policy lets this peer use. Package wire has the
// states: wire.StateActive and so on.
func (c *Client) Keys(ctx context.Context) ([]wire.Key, error) {
	var list wire.KeyList
	err := c.call(ctx, true, func(id string) any { return wire.Keys{ID: id, Op: wire.OpKeys} }, &list)
	return list.Keys, err
}

// Key returns the active version of a signing key: the one that Sign would use now.
func (c *Client) Key(ctx context.Context, name string) (wire.Key, error) {
	keys, err := c.Keys(ctx)
	if err != nil {
		return wire.Key{}, err
	}
	none := &Error{Code: wire.CodeUnknownKey, Message: fmt.Sprintf("no signing key has the name %q", ijson.Clip(name))}
	for _, k := range keys {
		switch {
		case k.Name != name:
		case k.State == wire.StateActive:
			return k, nil
		default:
			none.Code, none.Message = wire.CodeKeyNotActive, fmt.Sprintf("no version of the key %q is active", name)
		}
	}
	return wire.Key{}, none
}

// Document is the content of a signature.
type Document struct {
	// Type is the transcript type, for example "paykit-subscription-v2" or "message-v1". SPEC,
	// section 4, has all types with their payloads; `countersign transcript list` lists them.
	Type string
	// Payload is the JSON of the type's payload.
	Payload []byte
	// Nonce is for single use. Sign replaces a zero nonce with a random one.
	Nonce [32]byte
	// Timestamp and ExpiresAt are Unix seconds. For a zero, Sign takes the present time, and
	// Timestamp plus the client's Lifetime.
	Timestamp, ExpiresAt int64
}

// Fill returns the document with the envelope of Sign: a random nonce for a zero one, the present
// time, and the present time plus lifetime. Only an identical request repeats the first one, so a
// caller who may want to retry fills the document before the first request, and stores it:
// Signed.Encode writes a document without a signature too, and DecodeSigned reads it.
func (d Document) Fill(lifetime time.Duration) Document {
	if d.Nonce == [32]byte{} {
		rand.Read(d.Nonce[:])
	}
	if d.Timestamp == 0 {
		d.Timestamp = time.Now().Unix()
	}
	if d.ExpiresAt == 0 {
		d.ExpiresAt = d.Timestamp + int64(lifetime/time.Second)
	}
	return d
}

func (d *Document) wire() wire.Document {
	return wire.Document{
		Type: d.Type, Payload: d.Payload,
		Nonce: d.Nonce, Timestamp: d.Timestamp, ExpiresAt: d.ExpiresAt,
	}
}

// Signed is a document with its signature: all data that a verifier needs. `countersign sign
// --json` writes the JSON form of Signed, and `countersign verify` reads the form.
type Signed struct {
	Document
	Signature []byte // 64 bytes
	PublicKey [32]byte
	Key       string // the key's name at the appliance that signed
	Version   uint32
	Event     uint64 // index of the admission in the appliance's audit log
	Repeated  bool   // an identical request had been admitted before
	// Receipt is present for a payment. Keep the salt of the receipt: the appliance does not.
	Receipt *wire.Receipt
}

// signedDoc is the JSON form of Signed. The form has room for an unsigned Document and for a sign
// request as on the wire.
type signedDoc struct {
	ID string `json:"id,omitempty"`
	Op string `json:"op,omitempty"`
	wire.Document
	Key       string        `json:"key,omitempty"`
	Version   uint32        `json:"version,omitzero"`
	PublicKey wire.Bytes32  `json:"public_key,omitzero"`
	Signature wire.Bytes    `json:"signature,omitempty"`
	Event     uint64        `json:"event"`
	Repeated  bool          `json:"repeated"`
	Receipt   *wire.Receipt `json:"receipt,omitempty"`
}

// Encode writes the JSON form.
func (s *Signed) Encode() ([]byte, error) {
	return wire.Encode(signedDoc{
		Document: s.wire(), Key: s.Key, Version: s.Version, PublicKey: s.PublicKey, Signature: s.Signature,
		Event: s.Event, Repeated: s.Repeated, Receipt: s.Receipt,
	})
}

// DecodeSigned reads the JSON form strictly. The type and the signature may be absent; the caller
// has to check.
func DecodeSigned(b []byte) (*Signed, error) {
	var d signedDoc
	if err := ijson.Decode(b, &d, "payload", "nonce", "timestamp", "expires_at"); err != nil {
		return nil, err
	}
	return &Signed{
		Document: Document{
			Type: d.Type, Payload: d.Payload, Nonce: d.Nonce, Timestamp: d.Timestamp, ExpiresAt: d.ExpiresAt,
		},
		Signature: d.Signature, PublicKey: d.PublicKey, Key: d.Key, Version: d.Version,
		Event: d.Event, Repeated: d.Repeated, Receipt: d.Receipt,
	}, nil
}

// Sign has a document signed by the active version of a key. Sign fills zero envelope fields of the
// document as Fill does. The client has verified the returned signature over the bytes that this
// package itself encodes from the document.
func (c *Client) Sign(ctx context.Context, key string, d Document) (*Signed, error) {
	return c.sign(ctx, key, 0, d)
}

// SignAs is Sign for a document that names its parties by their public keys. SignAs puts the public
// key of the version that signs into the field party of the payload, for example "subscriber", as
// `countersign sign --as` does. The result has the completed payload. Where the key is rotated
// meanwhile, nothing is signed with the other version, and SignAs begins again.
//
// A program that stores documents before they are signed calls FillAs and Sign: the version is part
// of what is signed, so SignAs can't repeat a request after a rotation (ErrReplay).
func (c *Client) SignAs(ctx context.Context, key, party string, d Document) (*Signed, error) {
	d = d.Fill(c.config.Lifetime)
	before, refused := uint32(0), error(nil)
	for {
		k, d, err := c.fillAs(ctx, key, party, d)
		if err != nil {
			return nil, err
		}
		if k.Version <= before { // no rotation is the reason
			return nil, refused
		}
		signed, err := c.signBy(ctx, k, d)
		if !errors.Is(err, ErrWrongSigner) && !errors.Is(err, ErrKeyRotated) {
			return signed, err
		}
		before, refused = k.Version, err
	}
}

// FillAs returns the document with the envelope of Sign, and with the public key of the key's
// active version in the field party of the payload. Sign or Batch then signs the document, and
// repeats the signature also after a rotation. When the key was rotated before, they refuse with
// ErrWrongSigner: the nonce is not spent, so call FillAs again.
func (c *Client) FillAs(ctx context.Context, key, party string, d Document) (Document, error) {
	_, d, err := c.fillAs(ctx, key, party, d.Fill(c.config.Lifetime))
	return d, err
}

func (c *Client) fillAs(ctx context.Context, key, party string, d Document) (wire.Key, Document, error) {
	payload, err := ijson.Parse(d.Payload)
	if err != nil {
		return wire.Key{}, d, &Error{Code: wire.CodeMalformed, Message: "payload: " + err.Error()}
	}
	k, err := c.Key(ctx, key)
	if err != nil {
		return k, d, err
	}
	payload.Members[party] = fmt.Appendf(nil, `"%x"`, k.PublicKey)
	d.Payload, err = json.Marshal(payload.Members)
	return k, d, err
}

// signBy has a document signed by this version of a key and no other.
func (c *Client) signBy(ctx context.Context, k wire.Key, d Document) (*Signed, error) {
	signed, err := c.sign(ctx, k.Name, k.Version, d)
	if err == nil && signed.PublicKey != k.PublicKey {
		return nil, fmt.Errorf("%w: version %d of %q has another public key",
			ErrWrongAnswer, k.Version, ijson.Clip(k.Name))
	}
	return signed, err
}

// sign asks for a signature of a version; 0 is any version.
func (c *Client) sign(ctx context.Context, key string, version uint32, d Document) (*Signed, error) {
	d = d.Fill(c.config.Lifetime)
	var s wire.Signed
	err := c.call(ctx, true, func(id string) any {
		return wire.Sign{ID: id, Op: wire.OpSign, Key: key, Version: version, Document: d.wire()}
	}, &s)
	if err != nil {
		return nil, err
	}
	if version != 0 && s.Version != version {
		return nil, fmt.Errorf("%w: version %d signs, version %d was asked for", ErrWrongAnswer, s.Version, version)
	}
	return c.checkSigned(ctx, key, d, s)
}

// checkSigned checks the answer to a sign request for document d.
func (c *Client) checkSigned(ctx context.Context, key string, d Document, s wire.Signed) (*Signed, error) {
	doc, err := transcript.Parse(transcript.Request(d))
	if err != nil {
		return nil, fmt.Errorf("%w: it signs a document that the client refuses: %w", ErrWrongAnswer, err)
	}
	if s.Key != key || s.Nonce != d.Nonce || s.Timestamp != d.Timestamp || s.ExpiresAt != d.ExpiresAt {
		return nil, fmt.Errorf("%w: it is for another request", ErrWrongAnswer)
	}
	if err := eddsa.Verify(s.PublicKey[:], doc.Message, s.Signature); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrWrongAnswer, err)
	}
	if err := c.checkVersion(ctx, key, s.Version, s.PublicKey); err != nil {
		if !errors.Is(err, ErrBrokenLine) && !errors.Is(err, ErrCompromised) {
			err = fmt.Errorf("%w: %w", ErrUnproven, err)
		}
		return nil, err
	}
	if p := c.pins[key]; p != nil {
		p.use(s.Version)
	}
	if c.memory != nil {
		resource := s.Key + "/" + strconv.FormatUint(uint64(s.Version), 10)
		says := func(e audit.Event) bool { return e.Resource == resource && isAbout(e, doc) }
		if err := c.checkProof(ctx, s.Event, audit.Admission, says); err != nil {
			return nil, err
		}
	}
	return &Signed{
		Document: d, Signature: s.Signature, PublicKey: s.PublicKey, Key: s.Key, Version: s.Version,
		Event: s.Event, Repeated: s.Repeated, Receipt: s.Receipt,
	}, nil
}

// Verify has the appliance check a signature and spend its nonce, and returns the index of the
// audit event. Only a valid signature with a fresh nonce returns without an error. The Code of an
// *Error gives the reason. Of s, Verify uses the document, the signature and the public key.
//
// Where key is not empty, the public key must be a version of this key of the appliance. With an
// empty key, the signature may be by anybody whom the document allows as its signer, so the caller
// compares s.PublicKey with the party that he expects.
func (c *Client) Verify(ctx context.Context, key string, s *Signed) (event uint64, err error) {
	var v wire.Verified
	err = c.call(ctx, false, func(id string) any {
		v := wire.Verify{
			ID: id, Op: wire.OpVerify, PublicKey: s.PublicKey, Signature: s.Signature, Document: s.wire(),
		}
		if key != "" {
			v.Key = &key
		}
		return v
	}, &v)
	if errors.Is(err, ErrUnavailable) {
		err = fmt.Errorf("%w: %w", ErrUnknownOutcome, err)
	}
	if err != nil {
		return v.Event, err
	}
	return v.Event, c.checkVerified(ctx, s, v)
}

// checkVerified checks the answer to a verify request for s.
func (c *Client) checkVerified(ctx context.Context, s *Signed, v wire.Verified) error {
	if !v.Valid {
		return ErrWrongAnswer
	}
	if c.memory == nil {
		return nil
	}
	doc, err := transcript.Parse(transcript.Request(s.Document))
	if err != nil {
		return fmt.Errorf("%w: it verifies a document that the client refuses: %w", ErrWrongAnswer, err)
	}
	return c.checkProof(ctx, v.Event, audit.Spent, func(e audit.Event) bool {
		return e.Metadata["signer"] == hex.EncodeToString(s.PublicKey[:]) && isAbout(e, doc)
	})
}

// call sends a request and decodes the answer: see ask.
func (c *Client) call(ctx context.Context, idempotent bool, request func(id string) any, result any) error {
	answer, err := c.ask(ctx, idempotent, request)
	if err != nil {
		return err
	}
	return decode(answer, result)
}

// ask sends a request and returns the answer. An idempotent request is sent again after a lost
// answer.
func (c *Client) ask(
	ctx context.Context, idempotent bool, request func(id string) any,
) (answer wire.Answer, err error) {
	begin := time.Now()
	var trace wire.Trace
	if c.config.Traceparent != nil {
		trace.UnmarshalText([]byte(c.config.Traceparent(ctx))) // none after an error
	}
	for try := 0; ; try++ {
		conn, err := c.connection(ctx)
		if err == nil {
			var sent bool
			if answer, sent, err = conn.roundTrip(ctx, trace, request); err == nil {
				if busy := answer.Error; busy != nil && busy.RetryAfter > 0 && time.Since(begin) < c.config.RetryFor {
					// The appliance has not admitted the request, so another try is safe.
					if wait(ctx, time.Duration(busy.RetryAfter)*time.Second) == nil {
						continue
					}
				}
				return answer, nil
			}
			if sent && !idempotent {
				return answer, fmt.Errorf("%w: %w", ErrUnknownOutcome, err)
			}
		}
		unreachable := errors.Is(err, ErrUnreachable) || errors.Is(err, ErrHandshake)
		if !unreachable && !errors.Is(err, ErrConnectionLost) || ctx.Err() != nil {
			return answer, err
		}
		// The first broken connection is replaced at once. Other failures wait for the backoff, and
		// end with RetryFor.
		if try == 0 && !unreachable {
			continue
		}
		if time.Since(begin) >= c.config.RetryFor || backoff(ctx, try) != nil {
			return answer, err
		}
	}
}

func decode(answer wire.Answer, result any) error {
	err := answer.Into(result)
	if err != nil && answer.Error == nil {
		return fmt.Errorf("%w: %w", ErrWrongAnswer, err)
	}
	return err
}

// backoff waits exponentially longer: 50 ms, doubled with each try up to 1 s. Half of the wait is
// random jitter, so that many clients don't come back at once.
func backoff(ctx context.Context, try int) error {
	most := min(50*time.Millisecond<<min(try, 5), time.Second)
	jitter, err := rand.Int(rand.Reader, big.NewInt(int64(most/2)))
	if err != nil {
		return err
	}
	return wait(ctx, most/2+time.Duration(jitter.Int64()))
}

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// connection returns the shared connection, or makes a new one.
func (c *Client) connection(ctx context.Context) (*conn, error) {
	select {
	case c.lock <- struct{}{}:
		defer func() { <-c.lock }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if c.closed {
		return nil, ErrClosed
	}
	if c.conn != nil && !c.conn.broken() {
		return c.conn, nil
	}
	var n *noise.Conn
	err := fmt.Errorf("%w: all known keys of the listener are compromised: %s", ErrHandshake, c.rotationHint())
	for _, key := range c.serverKeys.order(time.Now()) { // two keys during a rotation
		if n, err = c.connect(ctx, key); err == nil {
			c.serverKeys.worked(key)
			c.conn = newConn(n, c.enqueue)
			return c.conn, nil
		} else if !errors.Is(err, ErrHandshake) {
			break
		}
	}
	return nil, err
}

// connect connects and shakes hands with a listener of this key.
func (c *Client) connect(ctx context.Context, key [32]byte) (*noise.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, c.config.ConnectTimeout)
	defer cancel()
	defer context.AfterFunc(c.base, cancel)()
	raw, err := new(net.Dialer).DialContext(ctx, "tcp", c.config.Address)
	if c.base.Err() != nil {
		err = ErrClosed
	}
	if errors.Is(err, ErrClosed) {
		if raw != nil {
			raw.Close()
		}
		return nil, err
	} else if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	n, err := noise.Connect(ctx, raw, c.config.Identity, noise.CountersignV1, key, nil)
	if errors.Is(err, noise.ErrHandshake) {
		raw.Close()
		reason := strings.TrimPrefix(err.Error(), noise.ErrHandshake.Error()+": ")
		return nil, fmt.Errorf("%w: %s%s", ErrHandshake, reason, c.rotationHint())
	} else if err != nil {
		raw.Close()
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	// The first message proves possession of the static key. Until then the handshake may be a
	// replayed recording, and the appliance counts the connection as unproven. The client does not
	// wait for the answer.
	if first, err := wire.Encode(wire.Ping{ID: "0", Op: wire.OpPing}); err != nil {
		return nil, err
	} else if err := n.WriteMessage(first); err != nil {
		raw.Close()
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	return n, nil
}

// rotationHint tells a peer who has missed a rotation of the Noise key how to get the new key.
func (c *Client) rotationHint() string {
	if c.config.ServerIdentity != [32]byte{} {
		return "; take a new server's key with an authorization that AuthorizedServerKey accepts"
	}
	return "; an operator prints the server's key: countersign admin noise-key"
}

// conn is one connection with many callers and one reader.
type conn struct {
	noise   *noise.Conn
	onEvent func(event any) // called by the reader; must not block
	writing chan struct{}   // held by the goroutine that writes

	mu      sync.Mutex
	next    uint64
	waiting map[string]chan wire.Answer // by request id
	err     error                       // the cause of the end
	ended   chan struct{}               // closed when err is set
}

func newConn(n *noise.Conn, onEvent func(event any)) *conn {
	c := &conn{
		noise: n, onEvent: onEvent, writing: make(chan struct{}, 1),
		waiting: map[string]chan wire.Answer{}, ended: make(chan struct{}),
	}
	n.SetWriteLimit(30 * time.Second)
	go c.read()
	return c
}

func (c *conn) read() {
	for {
		message, err := c.noise.ReadMessage()
		if err != nil {
			c.fail(err)
			return
		}
		answer, event, err := wire.DecodeMessage(message)
		if errors.Is(err, wire.ErrUnknownEvent) {
			continue
		} else if err != nil {
			c.fail(fmt.Errorf("%w: %w", ErrWrongAnswer, err))
			return
		}
		if event != nil {
			c.onEvent(event)
			continue
		}
		if answer.ID == "" {
			c.fail(fmt.Errorf("%w: it could not read a request", ErrWrongAnswer))
			return
		}
		c.mu.Lock()
		ch := c.waiting[answer.ID]
		delete(c.waiting, answer.ID)
		c.mu.Unlock()
		if ch != nil { // nil: the caller has left
			ch <- answer
		}
	}
}

func (c *conn) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = fmt.Errorf("%w: %w", ErrConnectionLost, err)
		close(c.ended)
		c.noise.Close()
	}
}

func (c *conn) broken() bool {
	select {
	case <-c.ended:
		return true
	default:
		return false
	}
}

// roundTrip sends one request and waits for its answer. Where sent is true, the appliance may have
// received the request.
func (c *conn) roundTrip(
	ctx context.Context, trace wire.Trace, request func(id string) any,
) (answer wire.Answer, sent bool, err error) {
	ch := make(chan wire.Answer, 1)
	id, err := c.expect(ch)
	if err != nil {
		return answer, false, err
	}
	defer c.forget(id)
	message, err := wire.Encode(request(id))
	if err != nil {
		return answer, false, fmt.Errorf("client: the request can't be encoded as JSON: %w", err)
	}
	if len(message) > wire.MaxDocument {
		tooLarge := fmt.Sprintf("the request has %d bytes, at most %d fit", len(message), wire.MaxDocument)
		return answer, false, &Error{Code: wire.CodeTooLarge, Message: tooLarge}
	}
	// The appliance refuses malformed I-JSON without the id of the request, so the client checks.
	if _, err := ijson.Parse(message); err != nil {
		return answer, false, &Error{Code: wire.CodeMalformed, Message: err.Error()}
	}
	if traced := wire.WithTrace(message, trace); len(traced) <= wire.MaxDocument {
		message = traced
	}
	if ctx.Err() != nil {
		return answer, false, ctx.Err()
	}
	// One request is written at a time. While the appliance does not read, the next requests wait
	// here, until their contexts end. The write under way goes on when its caller leaves.
	select {
	case c.writing <- struct{}{}:
	case <-c.ended:
		return answer, false, c.err
	case <-ctx.Done():
		return answer, false, ctx.Err()
	}
	go func() {
		defer func() { <-c.writing }()
		if err := c.noise.WriteMessage(message); err != nil {
			c.fail(err)
		}
	}()
	select {
	case answer = <-ch:
		return answer, true, nil
	case <-c.ended:
		err = c.err // set before ended was closed
	case <-ctx.Done():
		err = ctx.Err()
	}
	select { // the answer may have come at the same time
	case answer = <-ch:
		return answer, true, nil
	default:
		return answer, true, err
	}
}

// expect allocates a request id, and registers the channel for the answer.
func (c *conn) expect(ch chan wire.Answer) (id string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return "", c.err
	}
	c.next++
	id = strconv.FormatUint(c.next, 10)
	c.waiting[id] = ch
	return id, nil
}

func (c *conn) forget(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.waiting, id)
}

// ParseKey reads an X25519 public key in hex: the output of `countersign admin noise-key`, with or
// without its line feed.
func ParseKey(s string) (key [32]byte, err error) {
	s = strings.TrimSuffix(s, "\n")
	if len(s) != hex.EncodedLen(len(key)) {
		return key, fmt.Errorf("a public key has 64 hex digits, not %d characters", len(s))
	}
	if _, err := hex.Decode(key[:], []byte(s)); err != nil {
		return [32]byte{}, fmt.Errorf("a public key has 64 hex digits: %w", err)
	}
	if err := pubkey.CheckX25519(key[:]); err != nil {
		return [32]byte{}, err
	}
	return key, nil
}

// ReadKey reads a file with the form of ParseKey.
func ReadKey(path string) (key [32]byte, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return key, err
	}
	if key, err = ParseKey(string(b)); err != nil {
		err = fmt.Errorf("%s: %w", path, err)
	}
	return key, err
}

// WriteKey replaces a file with the form of ParseKey, or makes the file with mode 0600. A crash
// leaves the key of before or this one.
func WriteKey(path string, key [32]byte) error {
	return replace(path, fmt.Appendf(nil, "%x\n", key))
}

// replace replaces a file that the application keeps. The content is on the disk when replace
// returns. A file keeps its mode.
func replace(path string, content []byte) error {
	mode := fs.FileMode(0o600)
	if st, err := os.Stat(path); err == nil {
		mode = st.Mode().Perm()
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return durable.Replace(path, content, mode)
}
