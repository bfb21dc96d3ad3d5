// Package client is the SDK for peers of a Countersign appliance: payment servers and tools that sign and verify over
// Noise. It needs no cgo. Begin reading at New.
//
// A Client keeps one connection and shares it: requests are pipelined, and a connection that breaks is replaced. What
// can be asked again safely is asked again by itself: an identical sign request gets the signature of the first time,
// marked as repeated. A verify request is not: its nonce may be spent by the try whose answer was lost, and only the
// caller can judge what that means (see ErrUnknownOutcome).
package client

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"countersign/audit"
	"countersign/internal/eddsa"
	"countersign/internal/ijson"
	"countersign/noise"
	"countersign/transcript"
	"countersign/wire"
)

// How a call fails. A refusal of the appliance is an *Error, whose Code says why.
var (
	// ErrUnreachable: no connection could be made. Nothing has happened.
	ErrUnreachable = errors.New("the appliance can't be reached")
	// ErrHandshake: the appliance closed the connection during the handshake: it does not know this identity, or
	// ServerKey is not its key, or not any more. It also does so when it has too many connections, is stopping, or can't reach its token,
	// and does not say which: with RetryFor, the call tries again. Nothing has happened.
	ErrHandshake = errors.New("the appliance refused the handshake")
	// ErrUnknownOutcome: a verify request was sent, and whether it was served is not known: the connection broke, or the
	// appliance could not say in time. The nonce may be spent.
	ErrUnknownOutcome = errors.New("no answer: the nonce may be spent")
	// ErrWrongAnswer: the appliance, or who poses as it, answered something that can't be right.
	ErrWrongAnswer = errors.New("the appliance's answer can't be right")
	// ErrUnproven: the appliance did not prove that what it has signed or verified is in its audit log; see Config.LogKey. The
	// signature may be good, and is not given out.
	ErrUnproven = errors.New("the appliance did not prove that this is in its audit log")
	// ErrClosed: Close was called.
	ErrClosed = errors.New("the client is closed")
)

// MaxRequest is how long a request may be, in bytes of JSON.
const MaxRequest = wire.MaxDocument

// Error is a refusal of the appliance; see the codes in package wire.
type Error = wire.Error

// Config says whom to talk to, and as whom.
type Config struct {
	// Address is host:port of the listener.
	Address string
	// ServerKey is the listener's Noise static public key (countersign admin noise-key, or the file noise.pub).
	ServerKey [32]byte
	// LogKey is the verifier key of the appliance's audit log (countersign admin audit key), of any epoch. Where it is set, Sign
	// and Verify ask for the proof that their event is in the log, check it, and fail with ErrUnproven otherwise. That costs one
	// more exchange, and an appliance that can't sign a checkpoint can't serve. Default: none.
	LogKey string
	// Identity is this peer's static key; the appliance must have its public half enrolled (countersign admin peer add).
	Identity *noise.Identity
	// ConnectTimeout bounds one attempt to connect and shake hands. Default: 10 s.
	ConnectTimeout time.Duration
	// Lifetime is what a document gets that names no expiry of its own. Default: 1 h.
	Lifetime time.Duration
	// RetryFor is how long a call tries to reach the appliance anew when the connection can't be made or breaks; the
	// call's context may end it earlier. It is also how long a call is made again that the appliance was too busy for. Default 0: a
	// broken connection is replaced once, without waiting.
	RetryFor time.Duration

	// Lines are versions of keys that are trusted. Where a key is pinned, Sign gives out a signature only of that version or of one that
	// follows from it by the rules of Line.Follow; all else is ErrBrokenLine. The client asks the appliance for the steps itself and
	// remembers how far it came: see Pinned. Default: none; a signature is by whatever key the appliance says.
	Lines []Line
	// OnRotation is told of rotations, one after the other, by a goroutine that has nothing else to do: it may take its time and use the
	// client. Of a burst it gets the newest one of each key. An event comes once; one that was not acknowledged, because Err was set or the
	// connection broke, comes again, for instance after a restart.
	OnRotation func(Rotation)
	// OnServerKey is told the listener's new Noise key, to be kept for the next start, before OnRotation is. Both keys answer until the
	// old one retires. An application that starts with the new one while it may not answer everywhere gives the old one as
	// FormerServerKey. A running client changes over by itself.
	OnServerKey func(key [32]byte)
	// FormerServerKey is tried where ServerKey is refused. Take it away when it has retired: who has its private key can pose as the
	// appliance. Default: none.
	FormerServerKey [32]byte
	// ServerIdentity is the Ed25519 key of an appliance that has one. Where it is set, a new Noise key counts only with this identity's
	// signature, and with a generation that is at least ServerGeneration and that of the last one: a thief of the present Noise key
	// can't lead the client to a key of his own. Default: none; the channel is trusted.
	ServerIdentity   [32]byte
	ServerGeneration uint64
	// Unacknowledged leaves it to the application to call Acknowledge; until it has, OnRotation is told again whenever the event comes
	// again. By default a rotation is acknowledged when OnRotation (of the Noise key: OnServerKey) has returned, and also without
	// OnRotation where the line is pinned. What nobody was told is not acknowledged: the appliance may retire the old version when all
	// peers have. A version that is configured, as ServerKey or in Lines, is known: it is acknowledged and not told.
	Unacknowledged bool
}

// Client is safe for concurrent use.
type Client struct {
	config Config
	log    *audit.Log // of Config.LogKey

	base   context.Context // ended by Close
	cancel context.CancelFunc
	lock   chan struct{} // a mutex that a context can give up waiting for
	conn   *conn         // under lock; nil while there is none
	closed bool          // under lock

	pins       map[string]*pin
	hearing    hearing
	serverKeys serverKeys
}

// New makes a client. It connects at the first call.
func New(c Config) (*Client, error) {
	switch {
	case c.Address == "":
		return nil, errors.New("client: no address")
	case c.ServerKey == [32]byte{}:
		return nil, errors.New("client: no server key")
	case c.Identity == nil:
		return nil, errors.New("client: no identity")
	}
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = 10 * time.Second
	}
	if c.Lifetime == 0 {
		c.Lifetime = time.Hour
	}
	var log *audit.Log
	if c.LogKey != "" {
		l, err := audit.ParseVerifierKey(c.LogKey)
		if err != nil {
			return nil, fmt.Errorf("client: LogKey: %w", err)
		}
		log = &l
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
	client := &Client{config: c, log: log, base: base, cancel: cancel, lock: make(chan struct{}, 1), pins: pins}
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

// Close ends the connection; calls under way fail. No callback begins after it; one that is under way goes on.
func (c *Client) Close() error {
	c.cancel() // whoever is connecting
	c.lock <- struct{}{}
	defer func() { <-c.lock }()
	c.closed = true
	if c.conn != nil {
		c.conn.fail(ErrClosed)
		c.conn = nil
	}
	return nil
}

// Ping asks for a sign of life and returns the appliance's clock.
func (c *Client) Ping(ctx context.Context) (time.Time, error) {
	var pong wire.Pong
	err := c.call(ctx, true, func(id string) any { return wire.Ping{ID: id, Op: wire.OpPing} }, &pong)
	return time.Unix(pong.Time, 0), err
}

// Keys lists the signing keys.
func (c *Client) Keys(ctx context.Context) ([]wire.Key, error) {
	var list wire.KeyList
	err := c.call(ctx, true, func(id string) any { return wire.Keys{ID: id, Op: wire.OpKeys} }, &list)
	return list.Keys, err
}

// Document is what gets signed.
type Document struct {
	// Type is the transcript type, such as "paykit-subscription-v2" or "message-v1".
	Type string
	// Payload is the JSON of the type's payload.
	Payload []byte
	// Nonce is single use. Sign fills in a random one where it is zero.
	Nonce [32]byte
	// Timestamp and ExpiresAt are Unix seconds. Sign fills in now, and Timestamp plus the client's Lifetime.
	Timestamp, ExpiresAt int64
}

// Fill returns the document with the envelope that Sign would give it: a random nonce where it is zero, now, and now plus
// lifetime. A caller that wants to repeat a request after an error fills it first: only an identical request is one.
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
	return wire.Document{Type: d.Type, Payload: d.Payload, Nonce: d.Nonce, Timestamp: d.Timestamp, ExpiresAt: d.ExpiresAt}
}

// Signed is a document with its signature: all that a verifier needs. Its JSON form is what countersign sign --json
// writes and countersign verify reads.
type Signed struct {
	Document
	Signature []byte // 64 bytes
	PublicKey [32]byte
	Key       string // its name at the appliance that signed
	Version   uint32
	Event     uint64 // index of the admission in the appliance's audit log
	Repeated  bool   // the appliance had admitted this same request before
	// Receipt is there where the document is a payment. Keep its salt: the appliance does not.
	Receipt *wire.Receipt
}

// signedDoc is the JSON form of Signed, and of a Document where there is no signature yet. A sign request as it is on the
// wire has this form too.
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
		Document: s.wire(), Key: s.Key, Version: s.Version, PublicKey: s.PublicKey, Signature: s.Signature, Event: s.Event, Repeated: s.Repeated, Receipt: s.Receipt,
	})
}

// DecodeSigned reads the JSON form strictly. Whether a type and a signature are there is for the caller to see.
func DecodeSigned(b []byte) (*Signed, error) {
	var d signedDoc
	if err := ijson.Decode(b, &d, "payload", "nonce", "timestamp", "expires_at"); err != nil {
		return nil, err
	}
	return &Signed{
		Document:  Document{Type: d.Type, Payload: d.Payload, Nonce: d.Nonce, Timestamp: d.Timestamp, ExpiresAt: d.ExpiresAt},
		Signature: d.Signature, PublicKey: d.PublicKey, Key: d.Key, Version: d.Version, Event: d.Event, Repeated: d.Repeated, Receipt: d.Receipt,
	}, nil
}

// Sign has a document signed with the active version of a key. Missing envelope fields of the document are filled in.
// The signature that comes back has been verified over the bytes that this package itself makes of the document.
func (c *Client) Sign(ctx context.Context, key string, d Document) (*Signed, error) {
	d = d.Fill(c.config.Lifetime)
	var s wire.Signed
	err := c.call(ctx, true, func(id string) any {
		return wire.Sign{ID: id, Op: wire.OpSign, Key: key, Document: d.wire()}
	}, &s)
	if err != nil {
		return nil, err
	}
	return c.checked(ctx, key, d, s)
}

// checked holds what came back for a document against what was asked for.
func (c *Client) checked(ctx context.Context, key string, d Document, s wire.Signed) (*Signed, error) {
	doc, err := transcript.Parse(transcript.Request(d))
	if err != nil {
		return nil, fmt.Errorf("%w: it signs what is refused here: %w", ErrWrongAnswer, err)
	}
	if s.Key != key || s.Nonce != d.Nonce || s.Timestamp != d.Timestamp || s.ExpiresAt != d.ExpiresAt {
		return nil, fmt.Errorf("%w: it is for another request", ErrWrongAnswer)
	}
	if err := eddsa.Verify(s.PublicKey[:], doc.Message, s.Signature); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrWrongAnswer, err)
	}
	if err := c.believe(ctx, key, s.Version, s.PublicKey, nil); err != nil {
		return nil, err
	}
	if c.log != nil {
		resource := s.Key + "/" + strconv.FormatUint(uint64(s.Version), 10)
		if err := c.demand(ctx, s.Event, audit.Admission, func(e audit.Event) bool { return e.Resource == resource && about(e, doc) }); err != nil {
			return nil, err
		}
	}
	return &Signed{Document: d, Signature: s.Signature, PublicKey: s.PublicKey, Key: s.Key, Version: s.Version, Event: s.Event, Repeated: s.Repeated, Receipt: s.Receipt}, nil
}

// Verify has a signature judged and its nonce spent. It returns the index of the event that records it. Every outcome
// but a good and fresh signature is an error; an *Error's Code says why. key may be empty; where it is not, the public
// key must be a version of that key of the appliance. Of s, what the appliance said about the signature is not used.
func (c *Client) Verify(ctx context.Context, key string, s *Signed) (event uint64, err error) {
	var v wire.Verified
	err = c.call(ctx, false, func(id string) any {
		v := wire.Verify{ID: id, Op: wire.OpVerify, PublicKey: s.PublicKey, Signature: s.Signature, Document: s.wire()}
		if key != "" {
			v.Key = &key
		}
		return v
	}, &v)
	var refusal *Error
	if errors.As(err, &refusal) && refusal.Code == wire.CodeUnavailable {
		err = fmt.Errorf("%w: %w", ErrUnknownOutcome, err)
	}
	if err != nil {
		return v.Event, err
	}
	return v.Event, c.confirmed(ctx, s, v)
}

// confirmed holds what came back for a signature against what was asked for.
func (c *Client) confirmed(ctx context.Context, s *Signed, v wire.Verified) error {
	if !v.Valid {
		return ErrWrongAnswer
	}
	if c.log == nil {
		return nil
	}
	doc, err := transcript.Parse(transcript.Request(s.Document))
	if err != nil {
		return fmt.Errorf("%w: it judged what is refused here: %w", ErrWrongAnswer, err)
	}
	return c.demand(ctx, v.Event, audit.Spent, func(e audit.Event) bool {
		return e.Metadata["signer"] == hex.EncodeToString(s.PublicKey[:]) && about(e, doc)
	})
}

// call sends a request and decodes the answer. repeatable says that asking again after a lost answer is safe.
func (c *Client) call(ctx context.Context, repeatable bool, request func(id string) any, result any) error {
	begin := time.Now()
	for try := 0; ; try++ {
		conn, err := c.connection(ctx)
		if err == nil {
			var answer wire.Answer
			var sent bool
			if answer, sent, err = conn.roundTrip(ctx, request); err == nil {
				if later := answer.Error; later != nil && later.RetryAfter > 0 && time.Since(begin) < c.config.RetryFor {
					if wait(ctx, time.Duration(later.RetryAfter)*time.Second) == nil { // nothing was done
						continue
					}
				}
				return decode(answer, result)
			}
			if sent && !repeatable {
				return fmt.Errorf("%w: %w", ErrUnknownOutcome, err)
			}
		}
		unreachable := errors.Is(err, ErrUnreachable) || errors.Is(err, ErrHandshake)
		if !unreachable && !errors.Is(err, errConnection) || ctx.Err() != nil {
			return err
		}
		// A connection that was there and broke is replaced at once; all else waits, as long as the configuration says.
		if try == 0 && !unreachable {
			continue
		}
		if time.Since(begin) >= c.config.RetryFor || pause(ctx, try) != nil {
			return err
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

// pause waits 50 ms, doubling up to 1 s, half of it by chance, so that many clients don't come back at once.
func pause(ctx context.Context, try int) error {
	most := min(50*time.Millisecond<<min(try, 5), time.Second)
	n, err := rand.Int(rand.Reader, big.NewInt(int64(most/2)))
	if err != nil {
		return err
	}
	return wait(ctx, most/2+time.Duration(n.Int64()))
}

func wait(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// connection returns the connection, and makes one where there is none.
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
	var err error
	for _, key := range c.serverKeys.order(time.Now()) { // two while one replaces the other
		if n, err = c.connect(ctx, key); err == nil {
			c.serverKeys.worked(key)
			c.conn = newConn(n, c.heard)
			return c.conn, nil
		} else if !errors.Is(err, ErrHandshake) {
			break
		}
	}
	return nil, err
}

// connect shakes hands with the listener, if it has this key.
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
		return nil, fmt.Errorf("%w: %s; %s", ErrHandshake, strings.TrimPrefix(err.Error(), noise.ErrHandshake.Error()+": "), c.wayBack())
	} else if err != nil {
		raw.Close()
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	// The first message proves who this is: until it comes, the appliance takes the handshake for one that may be a recording, and
	// counts it. Nobody waits for its answer.
	if first, err := wire.Encode(wire.Ping{ID: "0", Op: wire.OpPing}); err != nil {
		return nil, err
	} else if err := n.WriteMessage(first); err != nil {
		raw.Close()
		return nil, fmt.Errorf("%w: %w", ErrUnreachable, err)
	}
	return n, nil
}

// wayBack is for a peer that has missed a rotation of the Noise key.
func (c *Client) wayBack() string {
	s := "if its key was rotated and the old one has retired, get the new one from its operator (countersign admin noise-key)"
	if c.config.ServerIdentity != [32]byte{} {
		s += ", or from anywhere with an authorization that AuthorizedServerKey takes"
	}
	return s
}

// errConnection marks the end of a connection, as opposed to an answer.
var errConnection = errors.New("connection lost")

// conn is one connection: many callers, one reader.
type conn struct {
	noise *noise.Conn
	heard func(*wire.Rotation) // takes events, and does not wait
	turn  chan struct{}        // held by who writes

	mu      sync.Mutex
	next    uint64
	waiting map[string]chan wire.Answer
	err     error         // why it ended
	ended   chan struct{} // closed when err is set
}

func newConn(n *noise.Conn, heard func(*wire.Rotation)) *conn {
	c := &conn{noise: n, heard: heard, turn: make(chan struct{}, 1), waiting: map[string]chan wire.Answer{}, ended: make(chan struct{})}
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
		answer, rotation, err := wire.DecodeMessage(message)
		if errors.Is(err, wire.ErrUnknownEvent) {
			continue
		} else if err != nil {
			c.fail(fmt.Errorf("%w: %w", ErrWrongAnswer, err))
			return
		}
		if rotation != nil {
			c.heard(rotation)
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
		if ch != nil { // else its caller has left
			ch <- answer
		}
	}
}

func (c *conn) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = fmt.Errorf("%w: %w", errConnection, err)
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

// roundTrip sends one request and waits for its answer. sent says that the appliance may have got it.
func (c *conn) roundTrip(ctx context.Context, request func(id string) any) (answer wire.Answer, sent bool, err error) {
	ch := make(chan wire.Answer, 1)
	id, err := c.expect(ch)
	if err != nil {
		return answer, false, err
	}
	defer c.forget(id)
	message, err := wire.Encode(request(id))
	if err != nil {
		return answer, false, fmt.Errorf("client: the request can't be written as JSON: %w", err)
	}
	if len(message) > wire.MaxDocument {
		return answer, false, &Error{Code: wire.CodeTooLarge, Message: fmt.Sprintf("the request has %d bytes, at most %d fit", len(message), wire.MaxDocument)}
	}
	if _, err := ijson.Parse(message); err != nil { // the appliance could not say which request it refuses
		return answer, false, &Error{Code: wire.CodeMalformed, Message: err.Error()}
	}
	if ctx.Err() != nil {
		return answer, false, ctx.Err()
	}
	// One request is written at a time. An appliance that does not read holds the next ones here, no longer than their
	// contexts; the one that is being written goes on behind its caller.
	select {
	case c.turn <- struct{}{}:
	case <-c.ended:
		return answer, false, c.err
	case <-ctx.Done():
		return answer, false, ctx.Err()
	}
	go func() {
		defer func() { <-c.turn }()
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

// expect gives a request its id and says where its answer goes.
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

// ParseKey reads a 32-byte public key in hex, as noise.pub and countersign admin noise-key have it.
func ParseKey(s string) (key [32]byte, err error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(key) {
		return key, errors.New("a public key has 64 hex digits")
	}
	return [32]byte(b), nil
}
