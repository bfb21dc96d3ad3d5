// Package peers keeps the enrolled peers: who they are, whether they are let in, which sessions they
// have open, and what they may cost. The enrolment is in the ledger, under the peer's name; memory
// follows it. Begin reading at Registry.
package peers

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"countersign/audit"
	"countersign/internal/ijson"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/manage"

	"golang.org/x/time/rate"
)

// ErrBusy and ErrRate refuse a request before anything is done for it.
var (
	ErrBusy = errors.New("too many requests are being served")
	ErrRate = errors.New("too many requests a second")
)

// Limits bound what one peer, and all peers together, can cost.
type Limits struct {
	Connections       int // open at once, of one peer
	Requests          int // being served at once, of all peers, the items of a batch one by one
	RequestsOfPeer    int // being served at once, of one peer
	RequestsPerSecond int // of one peer
	RefusalsPerMinute int // of one peer that are written down one by one; the others are counted
	BatchItems        int // in one request
}

// Peer is an enrolled client of the listener.
type Peer struct {
	Name      string
	PublicKey [32]byte  // its Noise static key
	Added     time.Time // when it was enrolled
}

// Member is an enrolment with what it costs now. Another enrolment of the same peer is another member.
type Member struct {
	Peer
	// Refusals says how many refusals of the peer are written down one by one.
	Refusals *rate.Limiter

	pace *rate.Limiter // of its requests

	// Under Registry.mu.
	suspended bool
	removed   bool
	seen      time.Time         // when it last proved to be there
	from      string            // the address from which it last connected; "" if never
	written   time.Time         // seen, as the ledger has it
	requests  int               // being served, the items of a batch one by one
	sessions  int               // open connections
	known     map[string]uint32 // by key: the version whose rotation the peer has acknowledged
}

// in reports that the peer may be served.
func (m *Member) in() bool { return !m.suspended && !m.removed }

// Session is an open connection of a member.
type Session struct {
	Member *Member
	// News gets a value when there may be something to tell the peer.
	News  chan struct{}
	conn  io.Closer
	ended chan struct{} // closed when nothing is being served on it any more
}

// Status is a peer as an operator sees it.
type Status struct {
	Peer
	Suspended   bool
	Seen        time.Time // zero: never
	Connections int       // open now
}

// Registry is safe for concurrent use.
type Registry struct {
	ledger *ledger.Ledger
	limits Limits
	log    *slog.Logger

	enrolling manage.Lock // held while an enrolment changes, so that the last act counts

	// mu guards all of memory: it is held for map look-ups and counters only, never for I/O. The
	// ledger's writer takes it to let memory follow.
	mu       sync.RWMutex
	members  map[[32]byte]*Member // by public key
	requests int                  // being served
	sessions map[*Session]struct{}
}

// record is the ledger's record of a peer, under its name.
type record struct {
	PublicKey string            `json:"public_key"` // hex
	Added     int64             `json:"added"`      // Unix seconds
	Suspended bool              `json:"suspended,omitempty"`
	Seen      int64             `json:"seen,omitempty"`  // Unix seconds; up to a minute late
	From      string            `json:"from,omitempty"`  // the address from which it last connected
	Known     map[string]uint32 `json:"known,omitempty"` // by key: the version whose rotation the peer has acknowledged
}

func decode(name string, value []byte) (r record, p Peer, err error) {
	if err := json.Unmarshal(value, &r); err != nil {
		return r, p, fmt.Errorf("peer %q in the ledger: %w", name, err)
	}
	key, err := hex.DecodeString(r.PublicKey)
	if err != nil || len(key) != 32 {
		return r, p, fmt.Errorf("peer %q in the ledger has no public key", name)
	}
	return r, Peer{Name: name, PublicKey: [32]byte(key), Added: time.Unix(r.Added, 0)}, nil
}

// Open reads the enrolments, and follows them from then on.
func Open(ctx context.Context, l *ledger.Ledger, limits Limits, log *slog.Logger) (*Registry, error) {
	r := &Registry{
		ledger: l, limits: limits, log: log, enrolling: manage.NewLock(),
		members: map[[32]byte]*Member{}, sessions: map[*Session]struct{}{},
	}
	return r, l.Follow(ctx, &r.mu, ledger.Followed{Table: ledger.Peers, Take: r.take})
}

// take lets memory say what a record says. mu is held.
func (r *Registry) take(name string, value []byte) error {
	m := r.named(name)
	if value == nil {
		if m != nil {
			m.removed = true
			delete(r.members, m.PublicKey)
		}
		return nil
	}
	rec, p, err := decode(name, value)
	if err != nil {
		return err
	}
	if other := r.members[p.PublicKey]; other != nil && other != m {
		return fmt.Errorf("peers %q and %q in the ledger have the same public key", other.Name, name)
	}
	if m == nil || m.PublicKey != p.PublicKey {
		if m != nil {
			m.removed = true
			delete(r.members, m.PublicKey)
		}
		m = r.newMember(p)
		r.members[p.PublicKey] = m
	}
	m.suspended = rec.Suspended
	if m.known = rec.Known; m.known == nil {
		m.known = map[string]uint32{}
	}
	if rec.Seen == 0 {
		return nil
	}
	if m.written = time.Unix(rec.Seen, 0); m.seen.Before(m.written) {
		m.seen, m.from = m.written, rec.From
	}
	return nil
}

func (r *Registry) newMember(p Peer) *Member {
	perMinute := r.limits.RefusalsPerMinute
	return &Member{
		Peer:     p,
		pace:     rate.NewLimiter(rate.Limit(r.limits.RequestsPerSecond), max(r.limits.RequestsPerSecond, r.limits.BatchItems)),
		Refusals: rate.NewLimiter(rate.Limit(float64(perMinute)/60), perMinute),
	}
}

// named returns the member of a name, or nil. The caller holds mu.
func (r *Registry) named(name string) *Member {
	for _, m := range r.members {
		if m.Name == name {
			return m
		}
	}
	return nil
}

// Remember calls visit for each peer that is let in with the address from which it last connected and
// the time since then: so that a flood can't keep those peers out after a restart.
func (r *Registry) Remember(visit func(from netip.Addr, ago time.Duration)) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, m := range r.members {
		if from, err := netip.ParseAddr(m.from); err == nil && m.in() {
			visit(from, time.Since(m.seen))
		}
	}
}

// In reports whether a public key is that of a peer that is let in.
func (r *Registry) In(publicKey [32]byte) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	m := r.members[publicKey]
	return m != nil && m.in()
}

// Enrolled reports whether there is a peer of a name.
func (r *Registry) Enrolled(name string) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	m := r.named(name)
	return m != nil && !m.removed
}

// All lists the enrolled peers by name.
func (r *Registry) All() (all []Status) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, m := range r.members {
		if m.removed {
			continue // and the ledger has not taken that yet
		}
		all = append(all, Status{Peer: m.Peer, Suspended: m.suspended, Seen: m.seen, Connections: m.sessions})
	}
	slices.SortFunc(all, func(x, y Status) int { return strings.Compare(x.Name, y.Name) })
	return all
}

// Add enrols a client under a name, by its Noise static public key. Neither may be enrolled already.
func (r *Registry) Add(ctx context.Context, who audit.Actor, name string, publicKey []byte) (Peer, error) {
	if err := keystore.CheckName(name); err != nil {
		return Peer{}, fmt.Errorf("peer %q: %w: %w", ijson.Clip(name), manage.ErrInvalid, err)
	}
	if len(publicKey) != 32 || keystore.LowOrder([32]byte(publicKey)) {
		return Peer{}, fmt.Errorf("peer %q: %w: its public key must be 32 bytes of an X25519 key", name, manage.ErrInvalid)
	}
	p := Peer{Name: name, PublicKey: [32]byte(publicKey), Added: time.Now()}
	if err := r.run(ctx, name, func(ctx context.Context) error { return r.enrol(ctx, who, p) }); err != nil {
		return Peer{}, err
	}
	return p, nil
}

func (r *Registry) run(ctx context.Context, name string, do func(context.Context) error) error {
	return r.enrolling.Run(ctx, r.log, fmt.Sprintf("peer %q", ijson.Clip(name)), do)
}

// enrol writes a peer down. The ledger decides what is enrolled already, not memory.
func (r *Registry) enrol(ctx context.Context, who audit.Actor, p Peer) error {
	rec := record{PublicKey: hex.EncodeToString(p.PublicKey[:]), Added: p.Added.Unix()}
	return r.ledger.Update(ctx, func(tx *ledger.Tx) error {
		if tx.Get(ledger.Peers, p.Name) != nil {
			return fmt.Errorf("peer %q: %w", p.Name, manage.ErrExists)
		}
		if err := tx.All(ledger.Peers, func(other string, value []byte) error {
			known, _, err := decode(other, value)
			if err == nil && known.PublicKey == rec.PublicKey {
				err = fmt.Errorf("peer %q: %w: the public key is enrolled as %q", p.Name, manage.ErrExists, other)
			}
			return err
		}); err != nil {
			return err
		}
		if err := tx.Put(ledger.Peers, p.Name, manage.Encode(rec)); err != nil {
			return err
		}
		return tx.Append(ledger.EventOf(audit.NewPeerAdded(who, p.Name, p.PublicKey)))
	})
}

// Remove takes a client's enrolment back, Suspend keeps the client out until Resume. The peer is cut
// off first, without the disk and without waiting for anybody: its connections are closed, and its
// requests have ended, before the act is written down. After an error the ledger may still have the
// peer, and would let it in again at the next start: ask again.
func (r *Registry) Remove(ctx context.Context, who audit.Actor, name string) error {
	return r.keepOut(ctx, name, func(m *Member) { m.removed = true }, func(tx *ledger.Tx) error {
		if err := tx.Delete(ledger.Peers, name); err != nil {
			return err
		}
		return tx.Append(ledger.EventOf(audit.NewPeerRemoved(who, name)))
	})
}

func (r *Registry) Suspend(ctx context.Context, who audit.Actor, name string) error {
	return r.keepOut(ctx, name, func(m *Member) { m.suspended = true }, func(tx *ledger.Tx) error {
		return setSuspended(tx, who, name, true)
	})
}

func (r *Registry) Resume(ctx context.Context, who audit.Actor, name string) error {
	return r.run(ctx, name, func(ctx context.Context) error {
		return r.ledger.Update(ctx, func(tx *ledger.Tx) error {
			if err := enrolled(tx, name); err != nil {
				return err
			}
			return setSuspended(tx, who, name, false)
		})
	})
}

// setSuspended writes down whether a peer is kept out. A peer that is so already is no event; its
// record is written all the same, so that memory says what it says.
func setSuspended(tx *ledger.Tx, who audit.Actor, name string, suspended bool) error {
	rec, _, err := decode(name, tx.Get(ledger.Peers, name))
	if err != nil {
		return err
	}
	before := rec.Suspended
	rec.Suspended = suspended
	if err := tx.Put(ledger.Peers, name, manage.Encode(rec)); err != nil || before == suspended {
		return err
	}
	e := audit.NewPeerSuspended(who, name)
	if !suspended {
		e = audit.NewPeerResumed(who, name)
	}
	return tx.Append(ledger.EventOf(e))
}

// keepOut marks a peer in memory before the disk says the same: an emergency does not wait for the
// disk. Then it closes the peer's connections, and writes the act down when nothing is served for the
// peer any more.
func (r *Registry) keepOut(ctx context.Context, name string, mark func(*Member), write func(*ledger.Tx) error) error {
	r.cutOff(name, mark)
	return r.run(ctx, name, func(ctx context.Context) error {
		for _, end := range r.cutOff(name, mark) { // again: the peer may have been enrolled or resumed in between
			<-end // the time of one request at the most
		}
		return r.ledger.Update(ctx, func(tx *ledger.Tx) error {
			if err := enrolled(tx, name); err != nil {
				return err
			}
			return write(tx)
		})
	})
}

func enrolled(tx *ledger.Tx, name string) error {
	if tx.Get(ledger.Peers, name) == nil {
		return fmt.Errorf("peer %q: %w", ijson.Clip(name), manage.ErrNotFound)
	}
	return nil
}

// cutOff marks a peer and closes its connections. ended has a channel for each, which is closed when
// nothing is being served on the connection any more.
func (r *Registry) cutOff(name string, mark func(*Member)) (ended []<-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if m := r.named(name); m != nil {
		mark(m)
	}
	for s := range r.sessions {
		if s.Member.Name == name {
			s.conn.Close()
			ended = append(ended, s.ended)
		}
	}
	return ended
}

// ErrGone refuses a peer that is enrolled no more.
var ErrGone = errors.New("the peer is enrolled no more")

// Acknowledge notes that a peer has taken notice of the rotation of a key to a version. A repetition
// changes nothing.
func (r *Registry) Acknowledge(ctx context.Context, p Peer, who audit.Actor, key string, version uint32) error {
	r.mu.RLock()
	m := r.members[p.PublicKey]
	known := m != nil && m.known[key] >= version
	r.mu.RUnlock()
	if m == nil {
		return ErrGone
	}
	if known {
		return nil
	}
	return r.ledger.Update(ctx, func(tx *ledger.Tx) error {
		rec, enrolled, err := decode(p.Name, tx.Get(ledger.Peers, p.Name))
		if err != nil || enrolled.PublicKey != p.PublicKey {
			return ErrGone
		}
		if rec.Known[key] >= version {
			return nil
		}
		if rec.Known == nil {
			rec.Known = map[string]uint32{}
		}
		rec.Known[key] = version
		if err := tx.Put(ledger.Peers, p.Name, manage.Encode(rec)); err != nil {
			return err
		}
		return tx.Append(ledger.EventOf(audit.NewRotationKnown(who, key, version)))
	})
}

// Forget writes down, in a transaction of the caller, that nobody has acknowledged a version of a key:
// what is to be known of it has changed.
func Forget(tx *ledger.Tx, key string, version uint32) error {
	again := map[string]record{}
	if err := tx.All(ledger.Peers, func(name string, value []byte) error {
		rec, _, err := decode(name, value)
		if rec.Known[key] == version {
			again[name] = rec
		}
		return err
	}); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(again)) {
		rec := again[name]
		rec.Known[key] = version - 1
		if err := tx.Put(ledger.Peers, name, manage.Encode(rec)); err != nil {
			return err
		}
	}
	return nil
}

// Known is the version of a key whose rotation a member has acknowledged; 0: none.
func (r *Registry) Known(m *Member, key string) uint32 {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return m.known[key]
}

// Unacknowledged lists the peers, of those that are let in, that have not acknowledged a version.
func (r *Registry) Unacknowledged(key string, version uint32) (names []string) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, m := range r.members {
		if m.in() && m.known[key] < version {
			names = append(names, m.Name)
		}
	}
	slices.Sort(names)
	return names
}

// Acknowledged reports that all peers of a list have acknowledged a version of a key, and that there
// is one of them that is let in. all takes every peer for one of the list.
func (r *Registry) Acknowledged(key string, version uint32, list []string, all bool) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	asked := 0
	for _, m := range r.members {
		if !m.in() || !all && !slices.Contains(list, m.Name) {
			continue
		}
		if m.known[key] < version {
			return false
		}
		asked++
	}
	return asked > 0
}

// WriteSeen writes down when peers were last seen, as far as that has changed.
func (r *Registry) WriteSeen(ctx context.Context) error {
	type sight struct {
		at   time.Time
		from string
	}
	r.mu.RLock()
	changed := map[*Member]sight{}
	for _, m := range r.members {
		if m.seen.Unix() > m.written.Unix() { // a record has whole seconds
			changed[m] = sight{m.seen, m.from}
		}
	}
	r.mu.RUnlock()
	if len(changed) == 0 {
		return nil
	}
	return r.ledger.Update(ctx, func(tx *ledger.Tx) error {
		for m, last := range changed {
			rec, p, err := decode(m.Name, tx.Get(ledger.Peers, m.Name))
			if err != nil || p.PublicKey != m.PublicKey {
				continue // removed meanwhile
			}
			rec.Seen, rec.From = last.at.Unix(), last.from
			if err := tx.Put(ledger.Peers, m.Name, manage.Encode(rec)); err != nil {
				return err
			}
		}
		return nil
	})
}

// Stop waits until no act is under way, and lets no other one begin.
func (r *Registry) Stop(ctx context.Context) error { return r.enrolling.Acquire(ctx) }
