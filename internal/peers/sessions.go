package peers

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"time"
)

// ErrTooMany refuses a connection of a peer with Limits.Connections open connections.
var ErrTooMany = fmt.Errorf("%w: too many connections", ErrBusy)

// Enter opens a session of the peer with a public key. The error is ErrGone for a key without an
// active peer, or ErrTooMany together with a session that names the member and must not be used.
func (r *Registry) Enter(publicKey [32]byte, conn io.Closer, from netip.Addr) (*Session, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.active(publicKey)
	if m == nil {
		return nil, ErrGone
	}
	s := &Session{
		Member: m, Peer: Peer{Name: m.Name, PublicKey: publicKey, Added: m.Added},
		News: make(chan struct{}, 1), conn: conn, key: m.keys[publicKey],
	}
	if m.sessions >= r.limits.Connections {
		return s, ErrTooMany
	}
	s.saw()
	if from.IsValid() {
		m.from = from.String()
	}
	m.sessions++
	s.key.Connections++
	r.sessions[s] = struct{}{}
	return s, nil
}

// Leave ends a session. The session's last request must have ended.
func (r *Registry) Leave(s *Session) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s.saw()
	s.Member.sessions--
	s.key.Connections--
	delete(r.sessions, s)
}

// saw notes the use of the session's key. The caller holds Registry.mu.
func (s *Session) saw() {
	s.Member.seen = time.Now()
	s.key.Seen = s.Member.seen
}

// Serving returns the number of requests being served: of a member, and of all members.
func (r *Registry) Serving(m *Member) (ofMember, all int) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return m.requests, r.requests
}

// Requests returns the number of requests being served, of all members.
func (r *Registry) Requests() int {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.requests
}

// Wake signals all sessions that there may be news.
func (r *Registry) Wake() {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for s := range r.sessions {
		select {
		case s.News <- struct{}{}:
		default: // the session has not read the last signal yet
		}
	}
}

const (
	// messagesPerRequest times RequestsPerSecond messages of a peer are read in a second. The
	// messages beyond RequestsPerSecond are read for their ids, to be answered as ErrRate.
	messagesPerRequest = 2

	// longest is the longest message, in bytes.
	longest = 1 << 16
)

// Pace waits until a message of n bytes may be read from a member, until ctx ends. held reports
// whether the message had to wait. Messages of a member that wait at the same time, on several
// connections, are read one after the other. Memory is not bounded here: a caller must have one
// message wait for each connection, and leave the message unread.
func (m *Member) Pace(ctx context.Context, n int) (held bool, err error) {
	now := time.Now()
	message, bytes := m.messageRate.ReserveN(now, 1), m.byteRate.ReserveN(now, min(n, longest))
	wait := max(message.DelayFrom(now), bytes.DelayFrom(now))
	if wait == 0 {
		return false, ctx.Err()
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true, nil
	case <-ctx.Done():
		message.Cancel()
		bytes.Cancel()
		return true, ctx.Err()
	}
}

// Begin counts n requests of a session as being served, until End. The error is ErrBusy for too
// many requests of the peer at once, ErrRate for too many a second, and ErrGone for a peer that is
// not active or a key that is removed.
//
// The limit of all peers together applies only to a member with requests under way. A member
// without any gets in, because otherwise a few peers could keep all others out.
func (r *Registry) Begin(s *Session, n int) error { return r.begin(s, n, 0) }

// More counts n further requests of a message that Begin has counted as one request: the number of
// items of a batch is known only after the message has been read.
func (r *Registry) More(s *Session, n int) error { return r.begin(s, n, 1) }

// begin counts n requests of a message that has counted some already.
func (r *Registry) begin(s *Session, n, counted int) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := s.Member
	switch {
	case !m.active() || s.key.removed:
		return ErrGone
	case m.requests+n > r.limits.RequestsOfPeer:
		return fmt.Errorf("%w for this peer", ErrBusy)
	case r.requests+n > r.limits.Requests && m.requests > counted:
		return ErrBusy
	case !m.requestRate.AllowN(time.Now(), n):
		return ErrRate
	}
	s.saw()
	m.requests += n
	r.requests += n
	return nil
}

// End ends the count of n requests that have been served.
func (r *Registry) End(m *Member, n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m.requests -= n
	r.requests -= n
}
