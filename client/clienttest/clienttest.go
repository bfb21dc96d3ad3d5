// Package clienttest is an appliance for the tests of peers: it speaks the wire, has keys in memory, says what a test makes it say,
// also what is wrong, and sends events. Begin reading at Start.
package clienttest

import (
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"fmt"
	"net"
	"slices"
	"sync"

	"countersign/noise"
	"countersign/transcript"
	"countersign/wire"
)

// Server is the appliance. Its fields are changed with Do.
type Server struct {
	Address string
	Peer    *noise.Identity // the one that is enrolled
	Line    *Line           // of the key "payments"

	// Statics are the keys that answer handshakes.
	Statics []noise.Static
	// Active is the version that signs; Shown the newest one whose step op line shows; Page how many steps an answer has.
	Active, Shown uint32
	Page          int
	// Answer may answer a request in place of the server: nil leaves it to the server, an empty one closes the connection.
	Answer func(id string, request any) []byte
	// Greeting is sent on each new connection, before any answer.
	Greeting [][]byte

	mu       sync.Mutex
	changed  *sync.Cond
	listener net.Listener
	conns    map[*noise.Conn]bool
	acks     []wire.Ack
	asked    map[string]int // requests by op
	accepted int            // handshakes
	refused  int
	ended    sync.WaitGroup
}

// Start serves on a loopback port: the first version of a line of five signs, and its successors are not shown yet.
func Start() (*Server, error) {
	static, err := noise.NewIdentity()
	if err != nil {
		return nil, err
	}
	s := &Server{Line: NewLine("payments", 5), Statics: []noise.Static{static}, Active: 1, Shown: 1, Page: 2, conns: map[*noise.Conn]bool{}, asked: map[string]int{}}
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

// Close ends all connections and waits for them.
func (s *Server) Close() {
	s.listener.Close()
	s.Drop()
	s.ended.Wait()
}

// Drop ends the connections that there are.
func (s *Server) Drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.Close()
	}
}

// Do changes the server.
func (s *Server) Do(change func(*Server)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
	s.changed.Broadcast()
}

// Send sends messages on all connections.
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

// Seen is what has come to the server so far.
type Seen struct {
	Acks              []wire.Ack
	Asked             map[string]int
	Accepted, Refused int // handshakes
	Connections       int // open ones whose first message has come
}

// Await waits until what has come is enough, and returns it. Where ctx ends first it returns what there is.
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

// Seen returns what has come so far.
func (s *Server) Seen() Seen { return s.Await(context.Background(), nil) }

// count changes what has come.
func (s *Server) count(change func()) { s.Do(func(*Server) { change() }) }

func (s *Server) serve(raw net.Conn) {
	s.mu.Lock()
	statics := slices.Clone(s.Statics)
	s.mu.Unlock()
	conn, err := noise.Accept(context.Background(), raw, statics, noise.CountersignV1, nil, func(p [32]byte) bool { return p == s.Peer.Public() })
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
		return wire.EncodeAnswer(id, nil, err.(*wire.Error))
	}
	if id == "0" { // the client's proof of who it is
		return wire.EncodeAnswer(id, wire.Pong{Service: "countersign"}, nil)
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
			state := "verify-only"
			if v == s.Active {
				state = "active"
			} else if v > s.Active {
				state = "pending"
			}
			next := s.Line.Next(v)
			list.Keys = append(list.Keys, wire.Key{Name: s.Line.Key, Version: v, Algorithm: "ed25519", State: state, Custody: "memory", Provenance: "generated", PublicKey: s.Line.Public(v), Next: &next})
		}
		result = list
	case *wire.Line:
		s.asked[r.Op]++
		steps := wire.Steps{Key: r.Key}
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
	case *wire.Sign:
		s.asked[r.Op]++
		result = s.Line.Signed(s.Active, r)
	default:
		return wire.EncodeAnswer(id, nil, &wire.Error{Code: wire.CodeUnsupported, Message: "not in this test"})
	}
	return wire.EncodeAnswer(id, result, nil)
}

// Line is a line of versions with all its private keys. Each version commits to the next one.
type Line struct {
	Key     string
	Private []ed25519.PrivateKey // of version 1 and on; the last one is only committed to
}

// NewLine makes a line of n versions. It is always the same for a name.
func NewLine(key string, n int) *Line {
	l := &Line{Key: key}
	for v := range n + 1 {
		seed := sha256.Sum256(fmt.Appendf(nil, "clienttest %s %d", key, v+1))
		l.Private = append(l.Private, ed25519.NewKeyFromSeed(seed[:]))
	}
	return l
}

// Public is the public key of a version.
func (l *Line) Public(version uint32) wire.Bytes32 {
	return wire.Bytes32(l.Private[version-1].Public().(ed25519.PublicKey))
}

// Next is what a version commits to.
func (l *Line) Next(version uint32) wire.Bytes32 {
	next := l.Public(version + 1)
	return sha256.Sum256(next[:])
}

// Step is the step to a version.
func (l *Line) Step(version uint32) wire.Succession {
	next := l.Next(version)
	return Step(l.Private[version-2], l.Key, version, l.Public(version), &next)
}

// Step makes any step.
func Step(old ed25519.PrivateKey, key string, version uint32, public wire.Bytes32, next *wire.Bytes32) wire.Succession {
	payload := fmt.Sprintf(`{"key":%q,"version":%d,"old_public_key":"%x","new_public_key":"%x","time":1704067200`, key, version, old.Public(), public)
	if next != nil {
		text, _ := next.MarshalText()
		payload += fmt.Sprintf(`,"next":%q`, text)
	}
	s := wire.Succession{Payload: []byte(payload + "}"), Nonce: wire.Bytes32{byte(version)}, Timestamp: 1704067200, ExpiresAt: 1704070800}
	return Sign(old, s)
}

// Sign signs a step again.
func Sign(old ed25519.PrivateKey, s wire.Succession) wire.Succession {
	doc, err := transcript.Parse(transcript.Request{Type: "key-succession-v1", Payload: s.Payload, Nonce: s.Nonce, Timestamp: s.Timestamp, ExpiresAt: s.ExpiresAt})
	if err != nil {
		panic(err)
	}
	s.Signature = ed25519.Sign(old, doc.Message)
	return s
}

// Rotation is the event of a version, with its step.
func (l *Line) Rotation(version uint32) wire.Rotation {
	step := l.Step(version)
	return wire.Rotation{Key: l.Key, Version: version, PublicKey: l.Public(version), ActivatesAt: 1704067200, RetiresAt: 1704153600, Succession: &step}
}

// Signed signs what a peer asks for with a version.
func (l *Line) Signed(version uint32, r *wire.Sign) wire.Signed {
	doc, err := transcript.Parse(transcript.Request{Type: r.Type, Payload: r.Payload, Nonce: r.Nonce, Timestamp: r.Timestamp, ExpiresAt: r.ExpiresAt})
	if err != nil {
		panic(err)
	}
	return wire.Signed{Signature: ed25519.Sign(l.Private[version-1], doc.Message), PublicKey: l.Public(version), Key: r.Key, Version: version, Nonce: r.Nonce, Timestamp: r.Timestamp, ExpiresAt: r.ExpiresAt}
}

// Authorization is a paykit-noise-key-authorization-v1 for an X25519 key; for none where it is nil.
func Authorization(owner ed25519.PrivateKey, static *[32]byte, generation uint64) wire.Authorization {
	payload := fmt.Sprintf(`{"owner":"%x","noise_public_key":"%x","key_generation":%d`, owner.Public(), owner.Public(), generation)
	if static != nil {
		payload += fmt.Sprintf(`,"noise_static_public_key":"%x"`, *static)
	}
	payload += "}"
	doc, err := transcript.Parse(transcript.Request{Type: "paykit-noise-key-authorization-v1", Payload: []byte(payload), ExpiresAt: 1})
	if err != nil {
		panic(err)
	}
	return wire.Authorization{Payload: []byte(payload), Signature: ed25519.Sign(owner, doc.Message)}
}
