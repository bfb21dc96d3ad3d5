package appliance

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"countersign/audit"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/limit"
	"countersign/internal/meter"
	"countersign/internal/peers"
	"countersign/noise"
	"countersign/wire"
)

// Listener is a listener for peers, with the profile of its handshakes.
type Listener struct {
	net.Listener
	Profile noise.Profile
}

// session is one connection of an enrolled peer.
type session struct {
	*peers.Session
	conn   hangUp
	caller Caller
}

// hangUp is a connection whose end also ends the waits of its session.
type hangUp struct {
	*noise.Conn
	end context.CancelFunc
}

func (h hangUp) Close() error {
	h.end()
	return h.Conn.Close()
}

// Caller is the peer of a request.
type Caller struct {
	peers.Peer
	Identity string // hex of the Ed25519 key bound to the session; "" in countersign-v1
	Request  string // id of the request; see package requestid

	quiet  bool           // a refusal is counted without an event, and so is a repeated failure
	member *ledger.Member // place in a batch; nil for a single request
	walk   *meter.Walk    // clock of the request; nil: not measured
	bill   *bill          // bytes that the request has made the ledger keep; nil: not counted
}

// actor returns the caller as the actor of events.
func (c Caller) actor() audit.Actor {
	actor := audit.Peer(c.Name, c.PublicKey)
	actor.Identity = c.Identity
	return actor.In(c.Request)
}

// Serve answers peers on the listeners until ctx ends. Then Serve accepts no new requests, finishes
// the requests under way, and returns nil. If the ledger's state becomes unknown, Serve stops at
// once, gives no answer that needs the ledger, and returns ledger.ErrUnknownState. Serve closes the
// listeners.
func (a *Appliance) Serve(ctx context.Context, listeners ...Listener) error {
	stop, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-a.ledger.Failed():
			cancel(ledger.ErrUnknownState)
		case <-stop.Done():
		}
	}()
	var working sync.WaitGroup
	working.Go(func() { a.keepLog(stop) })
	working.Go(func() { a.Keys.Keep(stop) })
	working.Go(func() { a.keepHooks(stop) })
	working.Go(func() { a.keepSinks(stop) })
	a.shipLists()
	a.mirrorBackups()
	working.Go(func() { a.keepBackups(stop) })
	working.Go(func() { a.watchBackups(stop) })
	working.Go(func() { a.watchMirror(stop) })
	working.Go(func() { a.traces.Run(stop) })
	working.Go(func() { a.Anchor.Keep(stop) })
	var serving sync.WaitGroup
	for _, l := range listeners {
		context.AfterFunc(stop, func() { l.Close() })
		serving.Go(func() {
			if err := a.accept(stop, l, &serving); err != nil {
				cancel(fmt.Errorf("accept: %w", err))
			}
		})
	}
	serving.Wait()
	cause := context.Cause(stop)
	cancel(nil)
	working.Wait()
	if ctx.Err() == nil && cause != nil {
		return cause
	}
	return nil
}

// accept serves the connections of one listener, each in a goroutine of serving.
func (a *Appliance) accept(stop context.Context, l Listener, serving *sync.WaitGroup) error {
	for stop.Err() == nil {
		conn, err := l.Accept()
		if err != nil {
			if stop.Err() == nil && !a.accepting(stop, err) {
				return err
			}
			continue
		}
		from := addressOf(conn)
		place, err := a.places.Open(from, a.handshakes.IsGood(from))
		if err != nil {
			a.refusals.count(audit.RateLimitTriggered, "connect", "", wire.CodeBusy)
			a.refused(from, nil, RefusedConnections, time.Time{}, err)
			conn.Close()
			continue
		}
		serving.Go(func() {
			defer place.Close()
			defer conn.Close()
			a.serveConn(stop, conn, l.Profile, place)
		})
	}
	return nil
}

// addressOf returns the remote address of a connection. All connections without an address are one
// source.
func addressOf(conn interface{ RemoteAddr() net.Addr }) netip.Addr {
	at, _ := netip.ParseAddrPort(conn.RemoteAddr().String())
	return at.Addr()
}

// accepting waits after a temporary error of Accept, such as a lack of file descriptors or a
// connection that is reset already. The result is false for a closed listener.
func (a *Appliance) accepting(ctx context.Context, err error) bool {
	if errors.Is(err, net.ErrClosed) {
		return false
	}
	a.log.Error("accept", "err", err)
	pause(ctx, 100*time.Millisecond)
	return true
}

// refusalTime is the interval of ticks for refusals. A handshake is refused at the next tick after
// its first message, so that the time does not reveal the reason. The interval is longer than an
// exchange of a device.
const refusalTime = 100 * time.Millisecond

// serveConn performs the handshake and serves one connection. A refusal of the handshake is a
// closed connection at a tick, for every reason.
func (a *Appliance) serveConn(stop context.Context, raw net.Conn, profile noise.Profile, place *limit.Place) {
	from, source, begun := raw.RemoteAddr().String(), addressOf(raw), time.Now()
	hctx, cancel := context.WithTimeout(stop, a.limits.HandshakeTimeout)
	defer cancel()
	var statics []noise.Static
	for _, k := range a.Keys.Answering() {
		statics = append(statics, static{k})
	}
	if len(statics) == 0 { // a compromised key has no active successor yet
		a.refused(source, nil, RefusedNoKey, begun, errors.New("the listener has no Noise key in use"))
		return
	}
	var attempt *limit.Attempt
	admit := func(ctx context.Context) (err error) {
		attempt, err = a.handshakes.Begin(ctx, source)
		begun = time.Now()
		return err
	}
	var proven *[32]byte // the client's key, once message 1 has proven it
	enrolled := func(key [32]byte) bool {
		proven = &key
		return a.Peers.In(key)
	}
	conn, err := noise.Accept(hctx, raw, statics, profile, admit, enrolled)
	if attempt != nil {
		defer attempt.End() // does nothing after Good
	}
	switch {
	case errors.Is(err, limit.ErrLimited):
		a.refusals.count(audit.RateLimitTriggered, "handshake", "", wire.CodeRateLimited)
		a.refused(source, nil, RefusedRate, begun, err)
		return
	case err != nil && attempt == nil: // no handshake began, so the device was not used
		if errors.As(err, new(*noise.ProfileError)) {
			a.refused(source, nil, RefusedProfile, begun, err)
		} else {
			a.ended(silenceOr(meter.HandshakeClosed, err), begun)
		}
		a.log.Debug("no handshake", "from", from, "err", err)
		return
	case failedHere(err) && (hctx.Err() == nil || time.Since(begun) > a.limits.HandshakeTimeout/2):
		// An unavailable or busy device must not lock the peers out: the attempt does not count.
		// But a client that sends message 1 just before the timeout gets no exchange for free.
		a.failing.Do(func() { a.log.Error("handshakes fail", "from", from, "err", err) })
		a.ended(meter.HandshakeDevice, begun)
		attempt.Forget()
	case err != nil:
		a.refused(source, proven, a.reasonOf(err, proven), begun, err)
		a.refusals.count(audit.HandshakeRefused, "handshake", "", wire.CodeDenied)
	}
	if err != nil {
		attempt.End() // connections in the queue need not wait for the tick
		pause(stop, refusalTime-time.Since(begun)%refusalTime)
		return
	}
	// A recorded message 1 can be replayed without the private key. Only a decrypted transport
	// message proves that the client has the private key. Until then, the handshake's timeout
	// applies.
	stopReading := context.AfterFunc(stop, func() { conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stopReading()
	proof, err := a.read(stop, conn, a.limits.HandshakeTimeout, nil)
	if err != nil {
		a.log.Info("handshake not used", "from", from, "err", err)
		a.ended(silenceOr(meter.HandshakeUnused, err), begun)
		return
	}
	attempt.Good()
	place.Proven()
	here, end := context.WithCancel(stop)
	defer end()
	closing := hangUp{conn, end}
	entered, err := a.Peers.Enter(conn.Peer(), closing, source)
	if errors.Is(err, peers.ErrTooMany) {
		a.refusals.count(audit.RateLimitTriggered, "connect", entered.Member.Name, wire.CodeBusy)
	}
	if err != nil { // too many connections, or the peer was excluded during the handshake
		a.refused(source, proven, a.reasonOf(err, proven), begun, err)
		return
	}
	defer a.Peers.Leave(entered)
	a.ended(meter.HandshakeDone, begun)
	s := &session{Session: entered, conn: closing, caller: Caller{Peer: entered.Peer}}
	if identity, ok := conn.Identity(); ok {
		s.caller.Identity = hex.EncodeToString(identity[:])
	}
	public := hex.EncodeToString(s.caller.PublicKey[:])
	a.log.Info("connected", "from", from, "peer", s.caller.Name, "public_key", public, "profile", string(profile))
	a.serveSession(here, s, proof)
	a.log.Info("disconnected", "from", from, "peer", s.caller.Name, "public_key", public)
}

// failedHere reports whether a handshake failed because of the device, including a timeout while
// the handshake waited for the device. A timeout of the network is another error.
func failedHere(err error) bool {
	for _, ours := range []error{
		keystore.ErrUnavailable, keystore.ErrAuth, keystore.ErrSealed, context.DeadlineExceeded,
	} {
		if errors.Is(err, ours) {
			return true
		}
	}
	return false
}

// pause waits for a time, or until stop ends.
func pause(stop context.Context, d time.Duration) {
	select {
	case <-stop.Done():
	case <-time.After(d):
	}
}

// serveSession answers the requests of a session, beginning with message, until the peer leaves or
// is excluded, or stop ends. At most InFlight requests are served at once. Further requests stay
// unread, so TCP slows the peer down.
func (a *Appliance) serveSession(stop context.Context, s *session, message []byte) {
	s.conn.SetWriteLimit(a.limits.WriteTimeout)
	var serving sync.WaitGroup
	defer serving.Wait()
	informing, done := context.WithCancel(stop)
	defer done()
	serving.Go(func() { a.inform(informing, s) })
	// The goroutines serve many requests each, because a new goroutine would have to grow its
	// stack.
	requests := make(chan taken)
	defer close(requests)
	// inFlight has a value for each request that is served, and for the one that is read.
	inFlight := make(chan struct{}, a.limits.InFlight)
	serve := func(t taken) {
		r := a.handle(s, t)
		if r == nil || a.release(s, r, s.conn.WriteMessage) != nil {
			s.conn.Close() // there is no answer, or the peer does not read
		}
		<-inFlight
	}
	inFlight <- struct{}{}
	err := a.pace(stop, s, len(message))
	for begun := 0; err == nil; {
		var r taken
		if r, err = a.take(stop, s, message); err != nil {
			break
		}
		select {
		case requests <- r:
		default:
			if begun == a.limits.InFlight {
				requests <- r // one of the goroutines has just served a request
				break
			}
			begun++
			serving.Go(func() {
				serve(r)
				for r := range requests {
					serve(r)
				}
			})
		}
		message = nil // not kept while the connection waits
		select {
		case inFlight <- struct{}{}:
			message, err = a.read(stop, s.conn.Conn, a.limits.IdleTimeout, func(length int) error {
				return a.pace(stop, s, length)
			})
		case <-stop.Done():
			return
		}
	}
	if !errors.Is(err, io.EOF) && stop.Err() == nil {
		a.log.Info("connection ended", "peer", s.caller.Name, "err", err)
	}
}
