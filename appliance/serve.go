package appliance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"countersign/audit"
	"countersign/ijson"
	"countersign/keystore"
	"countersign/ledger"
	"countersign/noise"
	"countersign/wire"
)

// session is one connection of an enrolled peer.
type session struct {
	conn  *noise.Conn
	peer  Peer
	ended chan struct{} // closed when nothing is being served on it any more
}

// Serve answers peers on listener until ctx ends; then it takes no new requests, finishes those that it has begun, and
// returns nil. When the ledger's state becomes unknown, it stops too, answers nothing that would need the ledger, and
// returns that error. The listener is closed in any case.
func (a *Appliance) Serve(ctx context.Context, listener net.Listener) error {
	stop, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	context.AfterFunc(stop, func() { listener.Close() })
	go func() {
		select {
		case <-a.ledger.Failed():
			cancel(ledger.ErrUnknownState)
		case <-stop.Done():
		}
	}()

	keeping := make(chan struct{})
	defer func() { <-keeping }()
	defer cancel(nil)
	go func() {
		defer close(keeping)
		a.keepLog(stop)
	}()
	if a.anchor.Token != "" {
		anchoring := make(chan struct{})
		defer func() { <-anchoring }()
		defer cancel(nil)
		go func() {
			defer close(anchoring)
			a.keepAnchored(stop)
		}()
	}
	var serving sync.WaitGroup
	places := make(chan struct{}, a.limits.Connections)
	for stop.Err() == nil {
		conn, err := listener.Accept()
		if err != nil {
			if stop.Err() == nil && !a.accepting(stop, err) {
				cancel(fmt.Errorf("accept: %w", err))
			}
			continue
		}
		select {
		case places <- struct{}{}:
		default:
			a.log.Warn("too many connections", "limit", a.limits.Connections)
			a.refusals.count(audit.RateLimitTriggered, "connect", "")
			conn.Close()
			continue
		}
		serving.Go(func() {
			defer func() { <-places }()
			defer conn.Close()
			a.serveConn(stop, conn)
		})
	}
	serving.Wait()
	if cause := context.Cause(stop); ctx.Err() == nil && cause != nil {
		return cause
	}
	return nil
}

// Start clears away what was cut off, says whether serving can begin, and writes down that it does. Stop writes down that
// it has ended, after everything that was admitted has been settled.
func (a *Appliance) Start(ctx context.Context) error {
	if err := a.Recover(ctx); err != nil {
		return err
	}
	if err := a.Ready(); err != nil {
		return err
	}
	var err error
	if a.anchored, err = a.startAnchor(ctx); err != nil {
		return err
	}
	if _, _, err := a.Activate(ctx, audit.Daemon(), a.rules.Load().Policy); err != nil {
		return err
	}
	return a.recordDaemon(audit.Started)
}

func (a *Appliance) Stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), a.limits.RequestTimeout)
	defer cancel()
	for _, l := range []lock{a.creating, a.enrolling, a.activating} { // no act of management begins any more
		if err := l.acquire(ctx); err != nil {
			a.log.Error("stopping during an act of management; the next start clears away what is left of it", "err", err)
		}
	}
	a.refusals.flush(ctx, a)
	if err := a.recordDaemon(audit.Stopped); err != nil {
		return err
	}
	a.lastCheckpoint(ctx)
	if rolled, err := a.Rollback(); err != nil || rolled != nil || a.anchor.Token == "" || !a.anchored {
		return err
	}
	if err := a.advance(ctx); err != nil { // what the start finds is sound all the same
		a.log.Error("the ledger's counter has not risen at the end", "err", err)
	}
	return nil
}

// recordDaemon writes down a step of the daemon's own life, even if it is being stopped.
func (a *Appliance) recordDaemon(t audit.Type) error {
	ctx, cancel := context.WithTimeout(context.Background(), a.limits.RequestTimeout)
	defer cancel()
	return a.record(ctx, audit.Event{Type: t, Actor: audit.Daemon(), Action: "serve", Outcome: "ok"})
}

// accepting waits out an error of Accept that passes (out of file descriptors, a connection that was reset already).
func (a *Appliance) accepting(ctx context.Context, err error) bool {
	if errors.Is(err, net.ErrClosed) {
		return false
	}
	a.log.Error("accept", "err", err)
	select {
	case <-ctx.Done():
	case <-time.After(100 * time.Millisecond):
	}
	return true
}

// serveConn shakes hands and serves one connection.
func (a *Appliance) serveConn(stop context.Context, raw net.Conn) {
	from := raw.RemoteAddr().String()
	hctx, cancel := context.WithTimeout(stop, a.limits.HandshakeTimeout)
	defer cancel()
	key, err := a.NoiseKey()
	if err != nil {
		return // Serve does not begin without it
	}
	conn, err := noise.Accept(hctx, raw, static{key}, noise.CountersignV1, nil, func(peer [32]byte) bool { _, ok := a.peer(peer); return ok })
	if err != nil {
		// The peer sees a closed connection, whatever the reason.
		if errors.Is(err, keystore.ErrUnavailable) || errors.Is(err, keystore.ErrAuth) || errors.Is(err, keystore.ErrSealed) {
			a.log.Error("handshake failed", "from", from, "err", err)
		} else {
			a.log.Info("handshake refused", "from", from, "err", err)
			a.refusals.count(audit.HandshakeRefused, "handshake", "")
		}
		return
	}
	// A recorded message 1 can be replayed without the private key. Only a message that decrypts proves that somebody
	// has it; until then the connection is a handshake, with a handshake's time.
	s := &session{conn: conn, ended: make(chan struct{})}
	defer close(s.ended)
	stopReading := context.AfterFunc(stop, func() { conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stopReading()
	proof, err := a.read(stop, s, a.limits.HandshakeTimeout)
	if err != nil {
		a.log.Info("handshake not used", "from", from, "err", err)
		return
	}
	if !a.enter(s) {
		return // removed while it was shaking hands
	}
	defer a.leave(s)
	a.log.Info("connected", "from", from, "peer", s.peer.Name)
	a.serveSession(stop, s, proof)
	a.log.Info("disconnected", "from", from, "peer", s.peer.Name)
}

func (a *Appliance) enter(s *session) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	var ok bool
	s.peer, ok = a.peers[s.conn.Peer()]
	if ok {
		a.sessions[s] = struct{}{}
	}
	return ok
}

func (a *Appliance) leave(s *session) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.sessions, s)
}

// read waits for a message as long as it may take, and no longer than until stop ends.
func (a *Appliance) read(stop context.Context, s *session, within time.Duration) ([]byte, error) {
	s.conn.SetReadDeadline(time.Now().Add(within))
	if stop.Err() != nil { // looked at after the deadline was set, which may have replaced the one that stop has set
		return nil, stop.Err()
	}
	return s.conn.ReadMessage()
}

// serveSession answers requests, the first of which has been read, until the peer goes, is removed, or stop ends. At most
// InFlight are being served at once, and one more is read; beyond that TCP slows the peer down.
func (a *Appliance) serveSession(stop context.Context, s *session, message []byte) {
	s.conn.SetWriteLimit(a.limits.WriteTimeout)
	var serving sync.WaitGroup
	defer serving.Wait()
	requests := make(chan []byte) // to goroutines that stay: one for each request would grow its stack anew each time
	defer close(requests)
	serve := func(request []byte) {
		if p, ok := a.peer(s.peer.PublicKey); !ok || p != s.peer {
			return // removed, with messages still in the buffer
		}
		answer := a.handle(s.peer, request)
		if answer == nil || s.conn.WriteMessage(answer) != nil {
			s.conn.Close() // no answer can be given, or the peer does not read it
		}
	}
	for begun := 0; ; {
		select {
		case requests <- message:
		default:
			if begun < a.limits.InFlight {
				begun++
				request := message
				serving.Go(func() {
					serve(request)
					for request := range requests {
						serve(request)
					}
				})
				break
			}
			select {
			case requests <- message:
			case <-stop.Done():
				return
			}
		}
		var err error
		if message, err = a.read(stop, s, a.limits.IdleTimeout); err != nil {
			if !errors.Is(err, io.EOF) && stop.Err() == nil {
				a.log.Info("connection ended", "peer", s.peer.Name, "err", err)
			}
			return
		}
	}
}

// handle answers one request. After a fatal error there is no answer: nil.
func (a *Appliance) handle(who Peer, message []byte) []byte {
	began := time.Now()
	// Not the connection's context: what has been admitted is finished, even if the peer has gone or the daemon stops.
	ctx, cancel := context.WithTimeout(context.Background(), a.limits.RequestTimeout)
	defer cancel()
	id, request, err := wire.Parse(message)
	if err != nil {
		refusal := err.(*wire.Error)
		a.log.Info("refused", "peer", who.Name, "code", refusal.Code, "err", refusal.Message)
		return wire.EncodeAnswer(id, nil, refusal)
	}
	var op, key string
	var result any
	switch r := request.(type) {
	case *wire.Ping:
		op, result = wire.OpPing, wire.Pong{Service: "countersign", Time: began.Unix()}
	case *wire.Keys:
		op, result = wire.OpKeys, a.signingKeys()
	case *wire.Sign:
		op, key = wire.OpSign, r.Key
		result, err = a.Sign(ctx, who, r)
	case *wire.Verify:
		op, key = wire.OpVerify, r.KeyName()
		result, err = a.Verify(ctx, who, r)
	case *wire.Proof:
		op = wire.OpProof
		result, err = a.Proof(ctx, who, r.Event)
	}
	if err == nil {
		a.log.Debug("served", "peer", who.Name, "op", op, "key", key, "took", time.Since(began))
		return wire.EncodeAnswer(id, result, nil)
	}
	c, refusal := refuse(err)
	if c == refused {
		a.log.Info("refused", "peer", who.Name, "op", op, "key", ijson.Clip(key), "code", refusal.Code, "err", err)
		if err := a.recordRefusal(ctx, who, op, key, refusal.Code, err); err != nil {
			c, refusal = refuse(err)
		}
	} else {
		a.log.Error("not served", "peer", who.Name, "op", op, "key", ijson.Clip(key), "code", refusal.Code, "err", err)
	}
	if c == fatal {
		return nil
	}
	return wire.EncodeAnswer(id, nil, refusal)
}

// recordRefusal writes a refusal down, unless the ledger has done so with its verdict. What has no sound form says nothing that
// is worth keeping.
func (a *Appliance) recordRefusal(ctx context.Context, who Peer, op, key, code string, err error) error {
	if errors.As(err, new(writtenDown)) || code == wire.CodeMalformed || code == wire.CodeUnsupported || code == wire.CodeTooLarge {
		return nil
	}
	return a.record(ctx, audit.Event{
		Type: audit.SignatureRejected, Actor: who.actor(), Action: op, Resource: ijson.Clip(key), Outcome: code,
	})
}

// signingKeys lists what peers may see: the keys that sign. All enrolled peers see all of them; policy decides about use.
func (a *Appliance) signingKeys() wire.KeyList {
	list := wire.KeyList{Keys: []wire.Key{}}
	for _, k := range a.Keys() {
		if info := k.Info(); info.Algorithm == keystore.Ed25519 && k.Name != LogName {
			list.Keys = append(list.Keys, wire.Key{
				Name: k.Name, Version: k.Version, Algorithm: string(info.Algorithm), State: string(k.State),
				Custody: string(info.Custody), Provenance: info.Provenance.String(), PublicKey: [32]byte(info.PublicKey),
			})
		}
	}
	return list
}

// static is the listener's key as package noise wants it.
type static struct{ key *Key }

func (s static) Public() [32]byte { return [32]byte(s.key.Info().PublicKey) }

func (s static) Exchange(ctx context.Context, peer [32]byte) ([32]byte, error) {
	return s.key.Exchange(ctx, peer)
}
