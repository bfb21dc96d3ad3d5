// Package clienttest is a fake appliance for the tests of peers. The fake speaks the wire protocol
// and has its keys in memory. The fake signs and verifies by the rules of documents and nonces,
// without a policy, a log, or receipts. Tests have it send events, and prescribe answers, invalid
// ones included. Begin reading at Start.
package clienttest

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"countersign/noise"
	"countersign/transcript"
	"countersign/wire"
)

// Server is the fake appliance. Tests change its fields with Do.
type Server struct {
	Address string
	Peer    *noise.Identity // the enrolled peer
	Line    *KeyLine        // of the key "payments"

	// Statics are the keys that answer handshakes.
	Statics []noise.Static
	// Active is the version that signs. Shown is the newest version that ops keys and line show: a
	// client with a pinned line believes no rotation to a later one.
	// Page is the maximum number of steps in an answer to op line.
	Active, Shown uint32
	Page          int
	// Compromised are the compromised versions that op line names.
	Compromised []uint32
	// Answer may answer a request in place of the server. A nil answer leaves the request to the
	// server, an empty answer closes the connection.
	Answer func(id string, request any) []byte
	// Greeting is sent on each new connection, before any answer.
	Greeting [][]byte

	mu       sync.Mutex
	changed  *sync.Cond
	listener net.Listener
	conns    map[*noise.Conn]bool
	acks     []wire.Ack
	asked    map[string]int // requests by op
	spent    map[nonce]*spending
	events   uint64
	accepted int // handshakes
	refused  int
	ended    sync.WaitGroup
}

// nonce is a nonce in its scope: "" for signatures, else the public key that has signed.
type nonce struct {
	scope string
	value wire.Bytes32
}

// spending is the request that has spent a nonce.
type spending struct {
	digest  [32]byte
	version uint32
	event   uint64
}

// Start serves on a loopback port. The key "payments" has a line of five versions: version 1 signs,
// and its successors are not shown yet.
func Start() (*Server, error) {
	static, err := noise.NewIdentity()
	if err != nil {
		return nil, err
	}
	s := &Server{
		Line: NewKeyLine("payments", 5), Statics: []noise.Static{static}, Active: 1, Shown: 1, Page: 2,
		conns: map[*noise.Conn]bool{}, asked: map[string]int{}, spent: map[nonce]*spending{},
	}
	s.changed = sync.NewCond(&s.mu)
	if s.Peer, err = noise.NewIdentity(); err != nil {
		return nil, err
	}
	if s.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return nil, err
	}
	s.Address = s.listener.Addr().String()
	s.ended.Go(func() {
		for {
			raw, err := s.listener.Accept()
			if err != nil {
				return
			}
			s.ended.Go(func() { defer raw.Close(); s.serve(raw) })
		}
	})
	return s, nil
}

// Close stops the server, ends all connections and waits for their goroutines.
func (s *Server) Close() {
	s.listener.Close()
	s.Drop()
	s.ended.Wait()
}

// Drop ends the present connections. Seen counts them no more when Drop returns.
func (s *Server) Drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.Close()
		delete(s.conns, c)
	}
	s.changed.Broadcast()
}

// Do changes the server under its lock.
func (s *Server) Do(change func(*Server)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
	s.changed.Broadcast()
}

// Send sends messages on all connections whose first message has come.
func (s *Server) Send(messages ...[]byte) {
	s.mu.Lock()
	conns := make([]*noise.Conn, 0, len(s.conns))
	for c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	for _, c := range conns {
		for _, m := range messages {
			c.WriteMessage(m)
		}
	}
}

// Seen is a snapshot of the traffic so far.
type Seen struct {
	Acks              []wire.Ack
	Asked             map[string]int // requests by op
	Accepted, Refused int            // handshakes
	Connections       int            // open connections whose first message has come
}

// Await waits until the traffic is enough, and returns a snapshot. When ctx ends first, Await
// returns the traffic so far.
func (s *Server) Await(ctx context.Context, enough func(Seen) bool) Seen {
	defer context.AfterFunc(ctx, s.changed.Broadcast)()
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		seen := Seen{slices.Clone(s.acks), map[string]int{}, s.accepted, s.refused, len(s.conns)}
		for op, n := range s.asked {
			seen.Asked[op] = n
		}
		if enough == nil || enough(seen) || ctx.Err() != nil {
			return seen
		}
		s.changed.Wait()
	}
}

// Seen returns a snapshot of the traffic so far.
func (s *Server) Seen() Seen { return s.Await(context.Background(), nil) }

// count changes the counters of traffic.
func (s *Server) count(change func()) { s.Do(func(*Server) { change() }) }

func (s *Server) serve(raw net.Conn) {
	s.mu.Lock()
	statics := slices.Clone(s.Statics)
	s.mu.Unlock()
	enrolled := func(p [32]byte) bool { return p == s.Peer.Public() }
	conn, err := noise.Accept(context.Background(), raw, statics, noise.CountersignV1, nil, enrolled)
	if err != nil {
		s.count(func() { s.refused++ })
		return
	}
	s.count(func() { s.accepted++ })
	first, err := conn.ReadMessage()
	if err != nil {
		return
	}
	var greeting [][]byte
	s.count(func() { s.conns[conn] = true; greeting = s.Greeting })
	defer s.count(func() { delete(s.conns, conn) })
	for _, m := range greeting {
		conn.WriteMessage(m)
	}
	for message := first; err == nil; message, err = conn.ReadMessage() {
		answer := s.answer(message)
		if len(answer) == 0 || conn.WriteMessage(answer) != nil {
			return
		}
	}
}

func (s *Server) answer(message []byte) []byte {
	id, request, err := wire.Parse(message, 100)
	if err != nil {
		return wire.EncodeAnswer(id, "", nil, err.(*wire.Error))
	}
	if id == "0" { // the first message, which proves possession of the peer's key
		return wire.EncodeAnswer(id, "", wire.Pong{Service: "countersign"}, nil)
	}
	s.mu.Lock()
	answer := s.Answer
	s.mu.Unlock()
	if answer != nil {
		if b := answer(id, request); b != nil {
			return b
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	defer s.changed.Broadcast()
	var result any
	switch r := request.(type) {
	case *wire.Ping:
		s.asked[r.Op]++
		result = wire.Pong{Service: "countersign"}
	case *wire.Keys:
		s.asked[r.Op]++
		var list wire.KeyList
		for v := uint32(1); v <= s.Shown; v++ {
			state := wire.StateVerifyOnly
			if v == s.Active {
				state = wire.StateActive
			} else if v > s.Active {
				state = wire.StatePending
			}
			next := s.Line.Next(v)
			list.Keys = append(list.Keys, wire.Key{
				Name: s.Line.Key, Version: v, Algorithm: wire.Ed25519, State: state, Custody: "memory",
				Provenance: wire.Generated, PublicKey: s.Line.Public(v), Next: &next,
			})
		}
		result = list
	case *wire.Line:
		s.asked[r.Op]++
		steps := wire.Steps{Key: r.Key, Active: s.Active, Compromised: s.Compromised}
		for v := r.From + 1; v <= s.Shown; v++ {
			if len(steps.Steps) == s.Page {
				steps.More = true
				break
			}
			steps.Steps = append(steps.Steps, s.Line.Step(v))
		}
		result = steps
	case *wire.Ack:
		s.asked[r.Op]++
		s.acks = append(s.acks, *r)
		result = wire.Acknowledged{Key: r.Key, Version: r.Version}
	case *wire.Batch:
		s.asked[r.Op]++
		var answers wire.Answers
		for _, item := range r.Items {
			answers.Answers = append(answers.Answers, wire.NewItemAnswer(s.perform(item)))
		}
		result = answers
	default:
		result, refusal := s.perform(request)
		return wire.EncodeAnswer(id, "", result, refusal)
	}
	return wire.EncodeAnswer(id, "", result, nil)
}

// perform performs a request of its own, or an item of a batch. The caller holds the lock.
func (s *Server) perform(request any) (result any, refusal *wire.Error) {
	switch r := request.(type) {
	case *wire.Sign:
		s.asked[r.Op]++
		return s.sign(r)
	case *wire.Verify:
		s.asked[r.Op]++
		return s.verify(r)
	case *wire.Error:
		return nil, r
	}
	return nil, refuse(wire.CodeUnsupported, "the fake appliance can't do this: prescribe an Answer")
}

func (s *Server) sign(r *wire.Sign) (any, *wire.Error) {
	if r.Key != s.Line.Key {
		return nil, refuse(wire.CodeUnknownKey, fmt.Sprintf("no signing key has the name %q", r.Key))
	}
	if s.Active == 0 {
		return nil, refuse(wire.CodeKeyNotActive, "no version of the key is active")
	}
	doc, refusal := parse(r.Document)
	if refusal != nil {
		return nil, refusal
	}
	at := nonce{"", r.Nonce}
	before := s.spent[at]
	version := s.Active
	if before != nil {
		version = before.version
	}
	switch public := s.Line.Public(version); {
	case doc.CheckSigner(public[:]) != nil:
		return nil, refuse(wire.CodeWrongSigner, "the document does not name the key as one of its signers")
	case before != nil && before.digest != doc.Digest():
		return nil, refuse(wire.CodeReplay, "the nonce is spent")
	case r.Version != 0 && r.Version != version:
		return nil, refuse(wire.CodeKeyRotated, "another version signs")
	case before == nil:
		s.events++
		s.spent[at] = &spending{doc.Digest(), version, s.events}
	}
	signed := s.Line.Signed(version, r)
	signed.Event, signed.Repeated = s.spent[at].event, before != nil
	return signed, nil
}

func (s *Server) verify(r *wire.Verify) (any, *wire.Error) {
	doc, refusal := parse(r.Document)
	if refusal != nil {
		return nil, refusal
	}
	own := func(v uint32) bool { return s.Line.Public(v) == r.PublicKey }
	at := nonce{string(r.PublicKey[:]), r.Nonce}
	switch {
	case !ed25519.Verify(r.PublicKey[:], doc.Message, r.Signature):
		return nil, refuse(wire.CodeInvalidSignature, "the signature does not verify")
	case doc.CheckSigner(r.PublicKey[:]) != nil, slices.ContainsFunc(s.Compromised, own):
		return nil, refuse(wire.CodeWrongSigner, "the document does not name the key as one of its signers")
	case r.Key != nil && *r.Key != s.Line.Key:
		return nil, refuse(wire.CodeUnknownKey, fmt.Sprintf("no signing key has the name %q", *r.Key))
	case r.Key != nil && !slices.ContainsFunc(versions(s.Active), own):
		return nil, refuse(wire.CodeWrongSigner, "the public key is no version of the key")
	case s.spent[at] != nil:
		return nil, refuse(wire.CodeReplay, "the nonce is spent")
	}
	s.events++
	s.spent[at] = &spending{event: s.events}
	return wire.Verified{Valid: true, Event: s.events}, nil
}

// versions lists the versions from 1 to the last one.
func versions(last uint32) (all []uint32) {
	for v := uint32(1); v <= last; v++ {
		all = append(all, v)
	}
	return all
}

// parse reads a document, and checks its times as an appliance with default limits does.
func parse(d wire.Document) (*transcript.Document, *wire.Error) {
	doc, err := transcript.Parse(transcript.Request{
		Type: d.Type, Payload: d.Payload, Nonce: d.Nonce, Timestamp: d.Timestamp, ExpiresAt: d.ExpiresAt,
	})
	if err == nil {
		err = doc.CheckTime(time.Now(), 30*time.Second, 7*24*time.Hour)
	}
	for code, is := range map[string]error{
		wire.CodeMalformed: transcript.ErrMalformed, wire.CodeUnsupported: transcript.ErrUnsupported,
		wire.CodeExpired: transcript.ErrExpired, wire.CodeNotYetValid: transcript.ErrNotYetValid,
		wire.CodeLifetimeTooLong: transcript.ErrLifetimeTooLong,
	} {
		if errors.Is(err, is) {
			return nil, refuse(code, err.Error())
		}
	}
	return doc, nil
}

func refuse(code, message string) *wire.Error { return &wire.Error{Code: code, Message: message} }

// KeyLine is a line of versions with all private keys. Each version commits to the next one.
type KeyLine struct {
	Key     string
	Private []ed25519.PrivateKey // of version 1 and on; of the last one there is only the commitment
}

// NewKeyLine makes a line of n versions. The private keys are derived from the name of the key, so
// two lines of one name are identical.
func NewKeyLine(key string, n int) *KeyLine {
	l := &KeyLine{Key: key}
	for v := range n + 1 {
		seed := sha256.Sum256(fmt.Appendf(nil, "clienttest %s %d", key, v+1))
		l.Private = append(l.Private, ed25519.NewKeyFromSeed(seed[:]))
	}
	return l
}

// Public is the public key of a version.
func (l *KeyLine) Public(version uint32) wire.Bytes32 {
	return wire.Bytes32(l.Private[version-1].Public().(ed25519.PublicKey))
}

// Next is the commitment of a version: SHA-256 of the next version's public key.
func (l *KeyLine) Next(version uint32) wire.Bytes32 {
	next := l.Public(version + 1)
	return sha256.Sum256(next[:])
}

// Step is the step to a version.
func (l *KeyLine) Step(version uint32) wire.Succession {
	next := l.Next(version)
	return Step(l.Private[version-2], l.Key, version, l.Public(version), &next)
}

// Step makes any step, valid or not.
func Step(
	old ed25519.PrivateKey, key string, version uint32, public wire.Bytes32, next *wire.Bytes32,
) wire.Succession {
	payload := fmt.Sprintf(`{"key":%q,"version":%d,"old_public_key":"%x","new_public_key":"%x","time":1704067200`,
		key, version, old.Public(), public)
	if next != nil {
		text, _ := next.MarshalText()
		payload += fmt.Sprintf(`,"next":%q`, text)
	}
	return Sign(old, wire.Succession{
		Payload: json.RawMessage(payload + "}"), Nonce: wire.Bytes32{byte(version)},
		Timestamp: 1704067200, ExpiresAt: 1704070800,
	})
}

// Sign replaces the signature of a step.
func Sign(old ed25519.PrivateKey, s wire.Succession) wire.Succession {
	doc, err := transcript.Parse(transcript.Request{
		Type: "key-succession-v1", Payload: s.Payload,
		Nonce: s.Nonce, Timestamp: s.Timestamp, ExpiresAt: s.ExpiresAt,
	})
	if err != nil {
		panic(err)
	}
	s.Signature = ed25519.Sign(old, doc.Message)
	return s
}

// Rotation is the event of a version, with its step.
func (l *KeyLine) Rotation(version uint32) wire.Rotation {
	step := l.Step(version)
	return wire.Rotation{
		Key: l.Key, Version: version, PublicKey: l.Public(version), Succession: &step,
		ActivatesAt: 1704067200, RetiresAt: 1704153600,
	}
}

// Compromise is the event that a version is compromised.
func (l *KeyLine) Compromise(version uint32) wire.Compromise {
	return wire.Compromise{Key: l.Key, Version: version, PublicKey: l.Public(version)}
}

// Signed answers a sign request by a version.
func (l *KeyLine) Signed(version uint32, r *wire.Sign) wire.Signed {
	doc, err := transcript.Parse(transcript.Request{
		Type: r.Type, Payload: r.Payload, Nonce: r.Nonce, Timestamp: r.Timestamp, ExpiresAt: r.ExpiresAt,
	})
	if err != nil {
		panic(err)
	}
	return wire.Signed{
		Signature: ed25519.Sign(l.Private[version-1], doc.Message), PublicKey: l.Public(version),
		Key: r.Key, Version: version, Nonce: r.Nonce, Timestamp: r.Timestamp, ExpiresAt: r.ExpiresAt,
	}
}

// Authorization is a paykit-noise-key-authorization-v1 for an X25519 key, or without one for nil.
func Authorization(owner ed25519.PrivateKey, static *[32]byte, generation uint64) wire.Authorization {
	payload := fmt.Sprintf(`{"owner":"%x","noise_public_key":"%x","key_generation":%d`,
		owner.Public(), owner.Public(), generation)
	if static != nil {
		payload += fmt.Sprintf(`,"noise_static_public_key":"%x"`, *static)
	}
	payload += "}"
	doc, err := transcript.Parse(transcript.Request{
		Type: "paykit-noise-key-authorization-v1", Payload: []byte(payload), ExpiresAt: 1,
	})
	if err != nil {
		panic(err)
	}
	return wire.Authorization{Payload: json.RawMessage(payload), Signature: ed25519.Sign(owner, doc.Message)}
}
