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
	"countersign/noise"
	"countersign/wire"
)

// Listener is where peers connect, and what handshakes there carry.
type Listener struct {
	net.Listener
	Profile noise.Profile
}

// session is one connection of an enrolled peer.
type session struct {
	conn   *noise.Conn
	member *member
	peer   Peer          // the member's, with what this connection has proven
	ended  chan struct{} // closed when nothing is being served on it any more
	news   chan struct{} // there may be something to tell the peer
}

// Serve answers peers on the listeners until ctx ends; then it takes no new requests, finishes those that it has begun, and
// returns nil. When the ledger's state becomes unknown, it stops too, answers nothing that would need the ledger, and
// returns that error. The listeners are closed in any case.
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
	working.Go(func() { a.keepKeys(stop) })
	working.Go(func() { a.keepHooks(stop) })
	if a.anchor.Token != "" {
		working.Go(func() { a.keepAnchored(stop) })
	}
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

// addressOf is where a connection comes from. What is no address is one source.
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

// refusalTime is a tick: a handshake that was begun is refused at the next one, so that how long it took does not say why. More
// than an exchange of a device takes.
const refusalTime = 100 * time.Millisecond

// serveConn shakes hands and serves one connection. A peer whose handshake is refused sees a closed connection, whatever the
// reason, and sees it at a tick after its message.
func (a *Appliance) serveConn(stop context.Context, raw net.Conn, profile noise.Profile, place *limit.Place) {
	from := raw.RemoteAddr().String()
	hctx, cancel := context.WithTimeout(inLane(stop, handshakeLane), a.limits.HandshakeTimeout)
	defer cancel()
	var statics []noise.Static
	for _, k := range a.noiseKeys() {
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
	conn, err := noise.Accept(hctx, raw, statics, profile, admit, func(peer [32]byte) bool { _, ok := a.member(peer); return ok })
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
		// A device that is away or has too much to do must not lock the peers out. Who sends message 1 at the last moment, so
		// that its time ends while the device works, does not get that work for nothing.
		a.failing.Do(func() { a.log.Error("handshakes fail", "from", from, "err", err) })
		attempt.Forget()
	case err != nil:
		a.log.Info("handshake refused", "from", from, "err", err)
		a.refusals.count(audit.HandshakeRefused, "handshake", "", wire.CodeDenied)
	}
	if err != nil {
		attempt.End() // those who wait for its end need not wait for the tick
		pause(stop, refusalTime-time.Since(begun)%refusalTime)
		return
	}
	// A recorded message 1 can be replayed without the private key. Only a message that decrypts proves that somebody
	// has it; until then the connection is a handshake, with a handshake's time.
	s := &session{conn: conn, ended: make(chan struct{}), news: make(chan struct{}, 1)}
	defer close(s.ended)
	stopReading := context.AfterFunc(stop, func() { conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stopReading()
	proof, err := a.read(stop, s, a.limits.HandshakeTimeout)
	if err != nil {
		a.log.Info("handshake not used", "from", from, "err", err)
		return
	}
	attempt.Good()
	place.Proven()
	if !a.enter(s) {
		return // removed while it was shaking hands, or it has too many connections
	}
	defer a.leave(s)
	a.log.Info("connected", "from", from, "peer", s.peer.Name, "profile", string(profile))
	a.serveSession(stop, s, proof)
	a.log.Info("disconnected", "from", from, "peer", s.peer.Name)
}

// failedHere says that a handshake failed because of the device, or because its time was over while it waited for that: the deadline of
// the network is another error.
func failedHere(err error) bool {
	return errors.Is(err, keystore.ErrUnavailable) || errors.Is(err, keystore.ErrAuth) || errors.Is(err, keystore.ErrSealed) || errors.Is(err, context.DeadlineExceeded)
}

// pause waits, unless stop ends.
func pause(stop context.Context, d time.Duration) {
	select {
	case <-stop.Done():
	case <-time.After(d):
	}
}

func (a *Appliance) enter(s *session) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	m := a.peers[s.conn.Peer()]
	if m == nil || !m.in() {
		return false
	}
	if m.sessions >= a.limits.ConnectionsPerPeer {
		a.refusals.count(audit.RateLimitTriggered, "connect", m.Name, wire.CodeBusy)
		return false
	}
	s.member, s.peer = m, m.Peer
	if identity, ok := s.conn.Identity(); ok {
		s.peer.Identity = hex.EncodeToString(identity[:])
	}
	m.seen = time.Now()
	if from := addressOf(s.conn); from.IsValid() {
		m.from = from.String()
	}
	m.sessions++
	a.sessions[s] = struct{}{}
	return true
}

func (a *Appliance) leave(s *session) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s.member.seen = time.Now()
	s.member.sessions--
	delete(a.sessions, s)
}

// read waits for a message as long as it may take to begin, then as long as it may take to come, and no longer than until stop ends.
func (a *Appliance) read(stop context.Context, s *session, within time.Duration) ([]byte, error) {
	for _, step := range []time.Duration{within, min(within, a.limits.ReadTimeout)} {
		s.conn.SetReadDeadline(time.Now().Add(step))
		if stop.Err() != nil { // looked at after the deadline was set, which may have replaced the one that stop has set
			return nil, stop.Err()
		}
		if err := s.conn.Await(); err != nil {
			return nil, err
		}
	}
	return s.conn.ReadMessage()
}

// serveSession answers requests, the first of which has been read, until the peer goes, is removed, or stop ends. At most
// InFlight are being served at once, and one more is read; beyond that TCP slows the peer down.
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
		if message, err = a.read(stop, s, a.limits.IdleTimeout); err != nil {
			if !errors.Is(err, io.EOF) && stop.Err() == nil {
				a.log.Info("connection ended", "peer", s.peer.Name, "err", err)
			}
			return
		}
	}
}

// static is the listener's key as package noise wants it.
type static struct{ key *Key }

func (s static) Public() [32]byte { return [32]byte(s.key.Info().PublicKey) }

func (s static) Exchange(ctx context.Context, peer [32]byte) ([32]byte, error) {
	return s.key.Exchange(ctx, peer)
}
