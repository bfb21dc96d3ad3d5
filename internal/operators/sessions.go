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
)

// Bounds of sessions.
const (
	sessionLife = time.Hour
	sessionIdle = 15 * time.Minute
	maxSessions = 16 // of an operator; one more ends that which was not used for the longest time
)

// Session is a person at work. It ends with time, when it is signed out or revoked, and with any change of its operator.
type Session struct {
	ID         string
	Operator   string
	Roles      []approval.Role
	Credential string // the id of that with which it was begun
	Channel    Channel
	Begun      time.Time
	Expires    time.Time // in any case
	LastUsed   time.Time
}

func (s *Session) over(now time.Time) bool {
	return !now.Before(s.Expires) || now.Sub(s.LastUsed) >= sessionIdle
}

// newSession makes one, with the token that is the only way to it.
func newSession(ch Channel, credential string) (Session, string) {
	b := make([]byte, 32)
	rand.Read(b)
	now := time.Now()
	return Session{ID: random(), Credential: credential, Channel: ch, Begun: now, Expires: now.Add(sessionLife), LastUsed: now},
		base64.RawURLEncoding.EncodeToString(b)
}

// admit lets a session in. Only the hash of its token is kept.
func (d *Registry) admit(s Session, token string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sweep()
	n, oldest := 0, [32]byte{}
	for key, other := range d.sessions {
		if other.Operator == s.Operator {
			if n++; n == 1 || other.LastUsed.Before(d.sessions[oldest].LastUsed) {
				oldest = key
			}
		}
	}
	if n >= maxSessions {
		delete(d.sessions, oldest)
	}
	d.sessions[sha256.Sum256([]byte(token))] = &s
}

// sweep drops what time has ended. mu is held.
func (d *Registry) sweep() {
	now := time.Now()
	for key, s := range d.sessions {
		if s.over(now) {
			delete(d.sessions, key)
		}
	}
}

// endSessions ends those of an operator. mu is held.
func (d *Registry) endSessions(operator string) {
	for key, s := range d.sessions {
		if s.Operator == operator {
			delete(d.sessions, key)
		}
	}
}

// Session returns that of a token, and counts as a use of it: ErrSignedOut where there is none, or where it was begun on another channel
// or by another user of this machine.
func (d *Registry) Session(token string, ch Channel) (Session, error) {
	key := sha256.Sum256([]byte(token))
	d.mu.Lock()
	defer d.mu.Unlock()
	s, there := d.sessions[key]
	if !there || !s.Channel.same(ch) {
		return Session{}, ErrSignedOut
	}
	now := time.Now()
	if s.over(now) {
		delete(d.sessions, key)
		return Session{}, ErrSignedOut
	}
	s.LastUsed = now
	return s.copy(), nil
}

func (s *Session) copy() Session {
	c := *s
	c.Roles = slices.Clone(s.Roles)
	return c
}

// Sessions lists those that are alive, the oldest first.
func (d *Registry) Sessions() (all []Session) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sweep()
	for _, s := range d.sessions {
		all = append(all, s.copy())
	}
	slices.SortFunc(all, func(x, y Session) int { return x.Begun.Compare(y.Begun) })
	return all
}

// alive returns the operator of a session that has not ended since the caller got it.
func (d *Registry) alive(s Session) (person, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sweep()
	for _, each := range d.sessions {
		if each.ID == s.ID && each.Operator == s.Operator {
			return d.roster.people[s.Operator], nil
		}
	}
	return person{}, ErrSignedOut
}

// SignOut ends a session, Revoke another one: its operator's own, or for an administrator anybody's. It has ended before that is written
// down, whatever the disk says.
func (d *Registry) SignOut(ctx context.Context, s Session) error { return d.Revoke(ctx, s, s.ID) }

func (d *Registry) Revoke(ctx context.Context, s Session, id string) error {
	who, err := d.alive(s)
	if err != nil {
		return err
	}
	ended, err := d.end(who, id)
	if err != nil {
		return err
	}
	e := audit.NewOperatorSignedOut(who.Name, ended.ID, ended.Operator, ended.Channel.String())
	if _, err = d.ledger.Append(ctx, ledger.EventOf(e)); err != nil {
		return fmt.Errorf("sign out: it has ended, and that was not written down: %w", err)
	}
	return nil
}

func (d *Registry) end(who person, id string) (Session, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for key, s := range d.sessions {
		if s.ID == id && (s.Operator == who.Name || who.Has(approval.Administrator)) {
			delete(d.sessions, key)
			return *s, nil
		}
	}
	return Session{}, fmt.Errorf("session: %w", ErrNotFound) // nor whether another operator has it
}
