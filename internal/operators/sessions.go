package operators

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"slices"
	"time"

	"countersign/approval"
	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/secret"
)

// Limits of sessions.
const (
	sessionLife = time.Hour
	sessionIdle = 15 * time.Minute
	maxSessions = 16 // of an operator; the next sign-in ends the session with the longest idle time
)

// Session is a signed-in operator. A session ends after its lifetime or idle time, by a sign-out or
// a revocation, and with any change of its operator.
type Session struct {
	ID         string
	Operator   string
	Roles      []approval.Role
	Credential string // id of the credential of the sign-in
	Channel    Channel
	Begun      time.Time
	Expires    time.Time // end of the lifetime
	LastUsed   time.Time
}

// actor returns the operator as the actor of the present request.
func (s Session) actor() audit.Actor { return audit.Operator(s.Operator).In(s.Channel.Request) }

func (s *Session) expired(now time.Time) bool {
	return !now.Before(s.Expires) || now.Sub(s.LastUsed) >= sessionIdle
}

// newSession returns a new session and its bearer token: 32 random bytes, base64url.
func newSession(ch Channel, credential string) (Session, secret.Bytes) {
	b := make([]byte, 32)
	rand.Read(b)
	now := time.Now()
	s := Session{
		ID: randomHex(), Credential: credential, Channel: ch,
		Begun: now, Expires: now.Add(sessionLife), LastUsed: now,
	}
	return s, secret.New(base64.RawURLEncoding.AppendEncode(nil, b))
}

// addSession adds a session. Memory has only SHA-256 of the token.
func (r *Registry) addSession(s Session, token secret.Bytes) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dropExpired()
	n, oldest := 0, [32]byte{}
	for key, other := range r.sessions {
		if other.Operator == s.Operator {
			if n++; n == 1 || other.LastUsed.Before(r.sessions[oldest].LastUsed) {
				oldest = key
			}
		}
	}
	if n >= maxSessions {
		delete(r.sessions, oldest)
	}
	r.sessions[sha256.Sum256(token.Expose())] = &s
}

// dropExpired removes the expired sessions. The caller holds mu.
func (r *Registry) dropExpired() {
	now := time.Now()
	for key, s := range r.sessions {
		if s.expired(now) {
			delete(r.sessions, key)
		}
	}
}

// endSessions ends all sessions of an operator. The caller holds mu.
func (r *Registry) endSessions(operator string) {
	for key, s := range r.sessions {
		if s.Operator == operator {
			delete(r.sessions, key)
		}
	}
}

// Session returns the session of a token, and resets its idle time. The error is ErrSignedOut for
// an unknown token, and for a token from another kind of channel or another user of this machine.
func (r *Registry) Session(token secret.Bytes, ch Channel) (Session, error) {
	key := sha256.Sum256(token.Expose())
	r.mu.Lock()
	defer r.mu.Unlock()
	s, exists := r.sessions[key]
	if !exists || !s.Channel.sameCaller(ch) {
		return Session{}, ErrSignedOut
	}
	now := time.Now()
	if s.expired(now) {
		delete(r.sessions, key)
		return Session{}, ErrSignedOut
	}
	s.LastUsed = now
	c := s.copy()
	c.Channel.Request = ch.Request
	return c, nil
}

func (s *Session) copy() Session {
	c := *s
	c.Roles = slices.Clone(s.Roles)
	return c
}

// Sessions lists the live sessions, the oldest first.
func (r *Registry) Sessions() (all []Session) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dropExpired()
	for _, s := range r.sessions {
		all = append(all, s.copy())
	}
	slices.SortFunc(all, func(x, y Session) int { return x.Begun.Compare(y.Begun) })
	return all
}

// requireSession returns the operator of a session, or ErrSignedOut if the session has ended since
// the caller got it.
func (r *Registry) requireSession(s Session) (person, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dropExpired()
	for _, each := range r.sessions {
		if each.ID == s.ID && each.Operator == s.Operator {
			return r.roster.people[s.Operator], nil
		}
	}
	return person{}, ErrSignedOut
}

// SignOut ends a session. See Revoke.
func (r *Registry) SignOut(ctx context.Context, s Session) error { return r.Revoke(ctx, s, s.ID) }

// Revoke ends another session: a session of the same operator, or as an administrator any session.
// The session ends in memory before the event is written, so a broken disk does not keep a session
// alive.
func (r *Registry) Revoke(ctx context.Context, s Session, id string) error {
	who, err := r.requireSession(s)
	if err != nil {
		return err
	}
	ended, err := r.endSession(who, id)
	if err != nil {
		return err
	}
	e := audit.NewOperatorSignedOut(s.actor(), ended.ID, ended.Operator, ended.Channel.String())
	if _, err = r.ledger.Append(ctx, ledger.EventOf(e)); err != nil {
		return fmt.Errorf("sign out: it has ended, and that was not written down: %w", err)
	}
	return nil
}

func (r *Registry) endSession(who person, id string) (Session, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for key, s := range r.sessions {
		if s.ID == id && (s.Operator == who.Name || who.Has(approval.Administrator)) {
			delete(r.sessions, key)
			return *s, nil
		}
	}
	// The error does not reveal whether another operator has such a session.
	return Session{}, fmt.Errorf("session: %w", ErrNotFound)
}

// Live reports whether a session has not ended. Live is no use of the session: the idle time goes
// on.
func (r *Registry) Live(s Session) bool {
	_, err := r.requireSession(s)
	return err == nil
}
