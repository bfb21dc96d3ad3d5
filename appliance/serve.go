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
	"countersign/internal/peers"
	"countersign/noise"
	"countersign/wire"
)

// Listener is an address where peers connect, and the profile of handshakes there.
type Listener struct {
	net.Listener
	Profile noise.Profile
}

// session is one connection of an enrolled peer.
type session struct {
	*peers.Session
	conn   *noise.Conn
	caller Caller // the member, with what this connection has proven
}

// Caller is the peer that a request comes from.
type Caller struct {
	peers.Peer
	Identity string // hex of the Ed25519 key that the session has proven to be bound to; "" in countersign-v1

	quiet  bool           // refusals are counted, not written down one by one, nor is a repetition that fails again
	member *ledger.Member // of the batch that the request is an item of; nil: of none
}

func (c Caller) actor() audit.Actor {
	actor := audit.Peer(c.Name, c.PublicKey)
	actor.Identity = c.Identity
	return actor
}

// Serve answers peers on the listeners until ctx ends; then it takes no new requests, finishes those
// that it has begun, and returns nil. When the ledger's state becomes unknown, Serve stops too, answers
// nothing that would need the ledger, and returns that error. The listeners are closed in any case.
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

// accept serves the connections of one listener, each in serving.
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

// addressOf is the address that a connection comes from. All connections without one are one source.
func addressOf(conn interface{ RemoteAddr() net.Addr }) netip.Addr {
	at, _ := netip.ParseAddrPort(conn.RemoteAddr().String())
	return at.Addr()
}

// accepting waits out an error of Accept that passes (out of file descriptors, a connection that was reset already).
func (a *Appliance) accepting(ctx context.Context, err error) bool {
	if errors.Is(err, net.ErrClosed) {
		return false
	}
	a.log.Error("accept", "err", err)
	pause(ctx, 100*time.Millisecond)
	return true
}

// refusalTime is a tick: a handshake that was begun is refused at the next tick after its message, so
// that the time does not tell the reason. It is longer than an exchange of a device takes.
const refusalTime = 100 * time.Millisecond

// serveConn shakes hands and serves one connection. A peer whose handshake is refused sees a closed
// connection, whatever the reason, at a tick after its message.
func (a *Appliance) serveConn(stop context.Context, raw net.Conn, profile noise.Profile, place *limit.Place) {
	from := raw.RemoteAddr().String()
	hctx, cancel := context.WithTimeout(stop, a.limits.HandshakeTimeout)
	defer cancel()
	var statics []noise.Static
	for _, k := range a.Keys.Answering() {
		statics = append(statics, static{k})
	}
	if len(statics) == 0 {
		return // until a compromised key has its successor
	}
	var attempt *limit.Attempt
	var begun time.Time
	admit := func(ctx context.Context) (err error) {
		attempt, err = a.handshakes.Begin(ctx, addressOf(raw))
		begun = time.Now()
		return err
	}
	conn, err := noise.Accept(hctx, raw, statics, profile, admit, a.Peers.In)
	if attempt != nil {
		defer attempt.End() // after Good it does nothing
	}
	switch {
	case errors.Is(err, limit.ErrLimited):
		a.refusals.count(audit.RateLimitTriggered, "handshake", "", wire.CodeRateLimited)
		return
	case err != nil && attempt == nil: // no handshake: nothing was computed for it
		a.log.Debug("no handshake", "from", from, "err", err)
		return
	case failedHere(err) && (hctx.Err() == nil || time.Since(begun) > a.limits.HandshakeTimeout/2):
		// A device that is away or busy must not lock the peers out. A client that sends message 1 at the
		// last moment, so that its time ends while the device works, does not get that work for nothing.
		a.failing.Do(func() { a.log.Error("handshakes fail", "from", from, "err", err) })
		attempt.Forget()
	case err != nil:
		a.log.Info("handshake refused", "from", from, "err", err)
		a.refusals.count(audit.HandshakeRefused, "handshake", "", wire.CodeDenied)
	}
	if err != nil {
		attempt.End() // other connections that wait for its end need not wait for the tick
		pause(stop, refusalTime-time.Since(begun)%refusalTime)
		return
	}
	// A recorded message 1 can be replayed without the private key. Only a message that decrypts proves
	// that the client has it; until then the connection is a handshake, with a handshake's time.
	stopReading := context.AfterFunc(stop, func() { conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stopReading()
	proof, err := a.read(stop, conn, a.limits.HandshakeTimeout)
	if err != nil {
		a.log.Info("handshake not used", "from", from, "err", err)
		return
	}
	attempt.Good()
	place.Proven()
	entered, err := a.Peers.Enter(conn.Peer(), conn, addressOf(conn))
	if errors.Is(err, peers.ErrTooMany) {
		a.refusals.count(audit.RateLimitTriggered, "connect", entered.Member.Name, wire.CodeBusy)
	}
	if err != nil {
		return // or the peer was removed while it was shaking hands
	}
	defer a.Peers.Leave(entered)
	s := &session{Session: entered, conn: conn, caller: Caller{Peer: entered.Member.Peer}}
	if identity, ok := conn.Identity(); ok {
		s.caller.Identity = hex.EncodeToString(identity[:])
	}
	a.log.Info("connected", "from", from, "peer", s.caller.Name, "profile", string(profile))
	a.serveSession(stop, s, proof)
	a.log.Info("disconnected", "from", from, "peer", s.caller.Name)
}

// failedHere reports that a handshake failed because of the device, or because its time was over while
// it waited for the device: the deadline of the network is another error.
func failedHere(err error) bool {
	for _, ours := range []error{keystore.ErrUnavailable, keystore.ErrAuth, keystore.ErrSealed, context.DeadlineExceeded} {
		if errors.Is(err, ours) {
			return true
		}
	}
	return false
}

// pause waits, unless stop ends.
func pause(stop context.Context, d time.Duration) {
	select {
	case <-stop.Done():
	case <-time.After(d):
	}
}

// read waits for a message as long as it may take to begin, then as long as it may take to come, and no
// longer than until stop ends.
func (a *Appliance) read(stop context.Context, conn *noise.Conn, within time.Duration) ([]byte, error) {
	for _, limit := range []time.Duration{within, min(within, a.limits.ReadTimeout)} {
		conn.SetReadDeadline(time.Now().Add(limit))
		if stop.Err() != nil { // after the deadline was set, which may have replaced the one that stop has set
			return nil, stop.Err()
		}
		if err := conn.Await(); err != nil {
			return nil, err
		}
	}
	return conn.ReadMessage()
}

// serveSession answers requests, the first of which has been read, until the peer goes, is removed, or
// stop ends. At most InFlight requests are being served at once, and one more is read; beyond that TCP
// slows the peer down.
func (a *Appliance) serveSession(stop context.Context, s *session, message []byte) {
	s.conn.SetWriteLimit(a.limits.WriteTimeout)
	var serving sync.WaitGroup
	defer serving.Wait()
	informing, done := context.WithCancel(stop)
	defer done()
	serving.Go(func() { a.inform(informing, s) })
	requests := make(chan []byte) // to goroutines that stay: one for each request would grow its stack anew each time
	defer close(requests)
	serve := func(request []byte) {
		answer := a.handle(s, request)
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
		if message, err = a.read(stop, s.conn, a.limits.IdleTimeout); err != nil {
			if !errors.Is(err, io.EOF) && stop.Err() == nil {
				a.log.Info("connection ended", "peer", s.caller.Name, "err", err)
			}
			return
		}
	}
}
