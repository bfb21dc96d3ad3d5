package peers

import (
	"fmt"
	"io"
	"net/netip"
	"time"
)

// ErrTooMany refuses a connection of a peer that has as many as it may.
var ErrTooMany = fmt.Errorf("%w: too many connections", ErrBusy)

// Enter opens a session of a peer on a connection. It returns ErrGone for a public key that is not
// let in, and ErrTooMany with the member.
func (r *Registry) Enter(publicKey [32]byte, conn io.Closer, from netip.Addr) (*Session, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.members[publicKey]
	if m == nil || !m.in() {
		return nil, ErrGone
	}
	s := &Session{Member: m, News: make(chan struct{}, 1), conn: conn, ended: make(chan struct{})}
	if m.sessions >= r.limits.Connections {
		return s, ErrTooMany
	}
	m.seen = time.Now()
	if from.IsValid() {
		m.from = from.String()
	}
	m.sessions++
	r.sessions[s] = struct{}{}
	return s, nil
}

// Leave ends a session, on which nothing is being served any more.
func (r *Registry) Leave(s *Session) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s.Member.seen = time.Now()
	s.Member.sessions--
	delete(r.sessions, s)
	close(s.ended)
}

// Serving is how many requests of a member, and of all members, are being served.
func (r *Registry) Serving(m *Member) (ofMember, all int) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return m.requests, r.requests
}

// Wake has all sessions look for news.
func (r *Registry) Wake() {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for s := range r.sessions {
		select {
		case s.News <- struct{}{}:
		default: // the session will look anyway
		}
	}
}

// Begin lets n requests of a peer be served, unless there are too many: ErrBusy or ErrRate. It returns
// ErrGone for a peer that is not let in any more.
func (r *Registry) Begin(m *Member, n int) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case !m.in():
		return ErrGone
	case m.requests+n > r.limits.RequestsOfPeer:
		return fmt.Errorf("%w for this peer", ErrBusy)
	case r.requests+n > r.limits.Requests && m.requests > 0: // a peer that has none gets in, or a few peers could keep all others out
		return ErrBusy
	case !m.pace.AllowN(time.Now(), n):
		return ErrRate
	}
	m.seen = time.Now()
	m.requests += n
	r.requests += n
	return nil
}

// End says that n requests have been served.
func (r *Registry) End(m *Member, n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m.requests -= n
	r.requests -= n
}
