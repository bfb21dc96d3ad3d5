// Package peers keeps the enrolled peers with their keys, their open sessions, and their rate
// limits. The ledger has the enrolments, under the names of the peers. Memory follows the ledger.
// Begin reading at Registry, then at keys.go.
package peers

import (
	"bytes"
	"cmp"
	"context"
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
	"countersign/internal/gate"
	"countersign/internal/ijson"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/pubkey"
	"countersign/internal/requestid"

	"golang.org/x/time/rate"
)

// The errors of requests that are refused before any work.
var (
	ErrBusy = errors.New("too many requests are being served")
	ErrRate = errors.New("too many requests a second")
	// ErrGone refuses a peer that is removed or suspended.
	ErrGone = errors.New("the peer is enrolled no more")
)

// Limits are the limits of one peer, and of all peers together. An item of a batch counts as one
// request.
type Limits struct {
	Connections       int // open connections of one peer
	Requests          int // requests of all peers being served
	RequestsOfPeer    int // requests of one peer being served
	RequestsPerSecond int // of one peer
	BytesPerSecond    int // of one peer's messages
	RefusalsPerMinute int // of one peer with an event each; further refusals are counted
	BatchItems        int // items of one batch

	BytesPerDay        int64 // bytes that served requests of one peer make the ledger keep
	RefusalBytesPerDay int64 // bytes of the records of refusals; further refusals are counted
}

// Peer is an enrolled client of the listener, known by one of its keys.
type Peer struct {
	Name      string
	PublicKey [32]byte  // the Noise static key of the session
	Added     time.Time // when the peer was enrolled
}

// Member is an enrolment in memory, with its sessions and rate limiters. A peer that is removed and
// enrolled again is a new Member.
type Member struct {
	Name  string
	Added time.Time
	// Refusals limits the refusals with an event each.
	Refusals *rate.Limiter

	requestRate *rate.Limiter
	messageRate *rate.Limiter // of Pace
	byteRate    *rate.Limiter // of Pace
	activity    activity

	// The fields below are guarded by Registry.mu.
	keys       map[[32]byte]*memberKey
	suspended  bool              // in the ledger
	suspending bool              // Suspend has begun, and the ledger may not have the suspension
	removed    bool              // Remove has begun, or the ledger has the removal
	seen       time.Time         // last session or request; zero for never
	from       string            // address of the last session; "" for none
	written    time.Time         // the ledger's value of seen
	requests   int               // requests being served; an item of a batch counts as one
	sessions   int               // open sessions
	known      map[string]uint32 // last acknowledged version of each key
	quotas     quotas
}

// active reports whether the peer may open sessions and send requests.
func (m *Member) active() bool { return !m.suspended && !m.suspending && !m.removed }

// compromises has compromised versions, by the name of the key.
type compromises map[string][]uint32

func (c compromises) has(key string, version uint32) bool { return slices.Contains(c[key], version) }

// Session is an open connection of a member.
type Session struct {
	Member *Member
	Peer   Peer // with the key of the session
	// News receives a value when the peer may have to be told of a rotation or a compromise.
	News chan struct{}
	conn io.Closer
	key  *memberKey
}

// Status is the status of a peer for operators.
type Status struct {
	Name        string
	Added       time.Time
	Keys        []Key // in the order of their enrolment
	Suspended   bool
	Seen        time.Time // last session or request; zero for never
	Connections int       // open connections
	Used        Bytes     // of its quotas, not refilled yet
}

// Registry is safe for concurrent use.
type Registry struct {
	ledger *ledger.Ledger
	gate   *gate.Gate
	limits Limits
	log    *slog.Logger
	// removal changes further records in the transaction that removes a peer: see OnRemoval.
	removal func(tx *ledger.Tx, who audit.Actor, name string) error

	enrolling manage.Lock // held by an act on an enrolment, so that acts have an order

	// mu guards the memory. The ledger's writer holds mu while memory follows the ledger. A holder
	// of mu must not wait for the ledger, or for other I/O.
	mu       sync.RWMutex
	members  map[[32]byte]*Member // by each of their public keys
	names    map[string]*Member   // the same members, by name
	requests int                  // requests being served
	sessions map[*Session]struct{}
}

// record is the ledger's record of a peer, under its name.
type record struct {
	Keys      []keyRecord       `json:"keys"`
	Added     int64             `json:"added"` // Unix seconds
	Suspended bool              `json:"suspended,omitempty"`
	Seen      int64             `json:"seen,omitempty"`  // Unix seconds; at most about a minute old
	From      string            `json:"from,omitempty"`  // address of the last session
	Known     map[string]uint32 `json:"known,omitempty"` // last acknowledged version of each key
	Used      *used             `json:"used,omitempty"`  // of the quotas, see WriteGreedy
}

// decode decodes the ledger's record of a peer.
func decode(name string, value []byte) (r record, err error) {
	if err := json.Unmarshal(value, &r); err != nil {
		return r, fmt.Errorf("peer %q in the ledger: %w", name, err)
	}
	if len(r.Keys) == 0 {
		return r, fmt.Errorf("peer %q in the ledger has no public key", name)
	}
	return r, nil
}

// Open reads the enrolments from the ledger. The registry's memory follows the ledger from then on.
func Open(
	ctx context.Context, l *ledger.Ledger, g *gate.Gate, limits Limits, log *slog.Logger,
) (*Registry, error) {
	r := &Registry{
		ledger: l, gate: g, limits: limits, log: log, enrolling: manage.NewLock(),
		members: map[[32]byte]*Member{}, names: map[string]*Member{}, sessions: map[*Session]struct{}{},
	}
	return r, l.Follow(ctx, &r.mu, ledger.Followed{Table: ledger.Peers, Take: r.take})
}

// take updates memory from the record of a peer. A nil value means that the record was deleted. The
// ledger's writer holds mu.
func (r *Registry) take(name string, value []byte) error {
	m := r.names[name]
	if value == nil {
		r.forget(m)
		return nil
	}
	rec, err := decode(name, value)
	if err != nil {
		return err
	}
	for _, k := range rec.Keys {
		if other := r.members[k.PublicKey]; other != nil && other != m {
			return fmt.Errorf("peers %q and %q in the ledger have the same public key", other.Name, name)
		}
	}
	if m == nil {
		m = r.newMember(name, time.Unix(rec.Added, 0), rec.Used)
		r.names[name] = m
	}
	r.takeKeys(m, rec.Keys)
	if m.suspended = rec.Suspended; m.suspended {
		m.suspending = false
	}
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

func (r *Registry) newMember(name string, added time.Time, written *used) *Member {
	perSecond, perMinute := r.limits.RequestsPerSecond, r.limits.RefusalsPerMinute
	return &Member{
		Name:        name,
		Added:       added,
		keys:        map[[32]byte]*memberKey{},
		quotas:      newQuotas(r.limits, written),
		requestRate: rate.NewLimiter(rate.Limit(perSecond), max(perSecond, r.limits.BatchItems)),
		messageRate: rate.NewLimiter(rate.Limit(messagesPerRequest*perSecond), messagesPerRequest*perSecond),
		byteRate:    rate.NewLimiter(rate.Limit(r.limits.BytesPerSecond), max(r.limits.BytesPerSecond, longest)),
		Refusals:    rate.NewLimiter(rate.Limit(float64(perMinute)/60), perMinute),
	}
}

// forget removes a member from memory; nil is no member. The caller holds mu.
func (r *Registry) forget(m *Member) {
	if m == nil {
		return
	}
	m.removed = true
	r.takeKeys(m, nil)
	delete(r.names, m.Name)
}

// Remember calls visit for each active peer, with the address of its last session and the time
// since then. After a restart, a flood of strangers can't keep peers at these addresses out.
func (r *Registry) Remember(visit func(from netip.Addr, ago time.Duration)) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, m := range r.names {
		if from, err := netip.ParseAddr(m.from); err == nil && m.active() {
			visit(from, time.Since(m.seen))
		}
	}
}

// active returns the active member with a key that is not being removed, or nil. The caller holds
// mu.
func (r *Registry) active(publicKey [32]byte) *Member {
	m := r.members[publicKey]
	if m == nil || !m.active() || m.keys[publicKey].removed {
		return nil
	}
	return m
}

// In reports whether a public key belongs to an enrolled peer that is not suspended.
func (r *Registry) In(publicKey [32]byte) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.active(publicKey) != nil
}

// Find returns the enrolled peer with a public key, and whether the peer is suspended.
func (r *Registry) Find(publicKey [32]byte) (p Peer, suspended, ok bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	m := r.members[publicKey]
	if m == nil || m.removed || m.keys[publicKey].removed {
		return p, false, false
	}
	return Peer{m.Name, publicKey, m.Added}, !m.active(), true
}

// LastFrom returns the names of the peers whose last session came from an address.
func (r *Registry) LastFrom(from netip.Addr) (names []string) {
	address := from.String()
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, m := range r.names {
		if m.from == address && !m.removed {
			names = append(names, m.Name)
		}
	}
	slices.Sort(names)
	return names
}

// Serves refuses a use for a peer at this moment: with the error of the gate if the gate is
// blocked, and with ErrGone for a peer that is removed or suspended, or whose key is removed.
func (r *Registry) Serves(p Peer) error {
	if err := r.gate.Err(); err != nil {
		return err
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	if m := r.active(p.PublicKey); m == nil || m.Name != p.Name {
		return ErrGone
	}
	return nil
}

// Enrolled reports whether a peer with a name is enrolled.
func (r *Registry) Enrolled(name string) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	m := r.names[name]
	return m != nil && !m.removed
}

// All returns the enrolled peers in the order of their names.
func (r *Registry) All() (all []Status) {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range r.names {
		if !m.removed { // otherwise the ledger does not have the removal yet
			all = append(all, m.status(now))
		}
	}
	slices.SortFunc(all, func(x, y Status) int { return strings.Compare(x.Name, y.Name) })
	return all
}

// Status returns the status of one peer, or manage.ErrNotFound.
func (r *Registry) Status(name string) (Status, error) {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	m := r.names[name]
	if m == nil || m.removed {
		return Status{}, unknown(name)
	}
	return m.status(now), nil
}

// status returns the status of a member. The caller holds Registry.mu.
func (m *Member) status(now time.Time) Status {
	s := Status{
		Name: m.Name, Added: m.Added, Suspended: m.suspended || m.suspending, Seen: m.seen, Connections: m.sessions,
		Used: m.quotas.usedAt(now),
	}
	for _, k := range m.keys {
		if !k.removed {
			s.Keys = append(s.Keys, k.Key)
		}
	}
	slices.SortFunc(s.Keys, func(x, y Key) int {
		return cmp.Or(x.Added.Compare(y.Added), bytes.Compare(x.PublicKey[:], y.PublicKey[:]))
	})
	return s
}

// Check refuses what can't be enrolled: a name against the rule for names, or bytes that are no
// canonical X25519 public key. The error wraps manage.ErrInvalid.
func Check(name string, publicKey []byte) error {
	err := keystore.CheckName(name)
	if err == nil {
		err = pubkey.CheckX25519(publicKey)
	}
	if err != nil {
		return fmt.Errorf("peer %q: %w: %w", ijson.Clip(name), manage.ErrInvalid, err)
	}
	return nil
}

// Add enrols a client with a name and a Noise static public key. Neither may be enrolled already.
func (r *Registry) Add(ctx context.Context, who audit.Actor, name string, publicKey []byte) (Peer, error) {
	if err := Check(name, publicKey); err != nil {
		return Peer{}, err
	}
	p := Peer{Name: name, PublicKey: [32]byte(publicKey), Added: time.Now()}
	if err := r.run(ctx, who, name, func(ctx context.Context) error { return r.enrol(ctx, who, p) }); err != nil {
		return Peer{}, err
	}
	return p, nil
}

// run runs an act on an enrolment.
func (r *Registry) run(
	ctx context.Context, who audit.Actor, name string, do func(context.Context) error,
) error {
	return r.enrolling.Run(ctx, r.log.With(requestid.Attr(who.Request)), fmt.Sprintf("peer %q", ijson.Clip(name)), do)
}

// enrol writes the record of a new peer. The check for an existing enrolment reads the ledger:
// memory hides a peer whose removal has failed.
func (r *Registry) enrol(ctx context.Context, who audit.Actor, p Peer) error {
	return r.ledger.Update(ctx, func(tx *ledger.Tx) error {
		if tx.Get(ledger.Peers, p.Name) != nil {
			return fmt.Errorf("peer %q: %w", p.Name, manage.ErrExists)
		}
		if err := free(tx, p.Name, p.PublicKey); err != nil {
			return err
		}
		rec := record{Keys: []keyRecord{{PublicKey: p.PublicKey, Added: p.Added.Unix()}}, Added: p.Added.Unix()}
		if err := tx.Put(ledger.Peers, p.Name, manage.Encode(rec)); err != nil {
			return err
		}
		return tx.Append(ledger.EventOf(audit.NewPeerAdded(who, p.Name, p.PublicKey)))
	})
}

// OnRemoval sets the function that takes the name of a peer out of further records, in the
// transaction that removes the peer. OnRemoval must be called before the first Remove.
func (r *Registry) OnRemoval(change func(tx *ledger.Tx, who audit.Actor, name string) error) {
	r.removal = change
}

// Remove ends a client's enrolment. Remove first disconnects the peer, without waiting for the
// disk, a device or another act: the peer is refused from then on, its connections are closed, and
// no key is used for its requests. After an error the ledger may still have the peer, and the next
// start would enrol the peer again: the caller must repeat Remove.
func (r *Registry) Remove(ctx context.Context, who audit.Actor, name string) error {
	return r.exclude(ctx, exclusion{who: who, name: name, mark: func(m *Member) error {
		m.removed = true
		return nil
	}, write: func(tx *ledger.Tx, _ record) error {
		if err := tx.Delete(ledger.Peers, name); err != nil {
			return err
		}
		if r.removal != nil {
			if err := r.removal(tx, who, name); err != nil {
				return err
			}
		}
		return tx.Append(ledger.EventOf(audit.NewPeerRemoved(who, name)))
	}})
}

// Suspend refuses a peer until Resume. The steps are the steps of Remove, and after an error the
// caller must repeat Suspend.
func (r *Registry) Suspend(ctx context.Context, who audit.Actor, name string) error {
	return r.exclude(ctx, exclusion{who: who, name: name, mark: func(m *Member) error {
		m.suspending = true
		return nil
	}, write: func(tx *ledger.Tx, rec record) error { return setSuspended(tx, who, name, rec, true) }})
}

// Resume ends a suspension.
func (r *Registry) Resume(ctx context.Context, who audit.Actor, name string) error {
	return r.run(ctx, who, name, func(ctx context.Context) error {
		if err := r.ledger.Update(ctx, func(tx *ledger.Tx) error {
			rec, err := enrolled(tx, name)
			if err != nil {
				return err
			}
			return setSuspended(tx, who, name, rec, false)
		}); err != nil {
			return err
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		if m := r.names[name]; m != nil {
			m.suspending = false // of a Suspend that has failed
		}
		return nil
	})
}

// setSuspended writes whether a peer is suspended. An unchanged record has no event, but is written
// all the same, so that memory follows.
func setSuspended(tx *ledger.Tx, who audit.Actor, name string, rec record, suspended bool) error {
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

// exclusion is an act that takes the right to be served from a peer, or from one of its keys.
type exclusion struct {
	who  audit.Actor
	name string
	key  *[32]byte // of the peer; nil: all of its keys
	// mark marks the member in memory, under mu. An error refuses the act, and nothing has changed.
	mark func(*Member) error
	// write writes the act. The record is that of the peer.
	write func(*ledger.Tx, record) error
}

// exclude marks a peer in memory before the ledger has the act, because an emergency must not wait
// for the disk. Then exclude closes the peer's connections, writes the act, and enforces the act on
// the uses of keys under way. Requests of the peer may still be under way: the ledger admits none
// of them, and records the failure of the ones that were admitted before.
func (r *Registry) exclude(ctx context.Context, x exclusion) error {
	defer r.gate.Enforce()
	if err := r.disconnect(x); err != nil {
		return err
	}
	return r.run(ctx, x.who, x.name, func(ctx context.Context) error {
		// Again, because an act before this one may have enrolled or resumed the peer, or added the
		// key.
		if err := r.disconnect(x); err != nil {
			return err
		}
		return r.ledger.Update(ctx, func(tx *ledger.Tx) error {
			rec, err := enrolled(tx, x.name)
			if err != nil {
				return err
			}
			return x.write(tx, rec)
		})
	})
}

// enrolled returns the record of a peer, or manage.ErrNotFound for a name without a record.
func enrolled(tx *ledger.Tx, name string) (record, error) {
	value := tx.Get(ledger.Peers, name)
	if value == nil {
		return record{}, unknown(name)
	}
	return decode(name, value)
}

func unknown(name string) error {
	return fmt.Errorf("peer %q: %w", ijson.Clip(name), manage.ErrNotFound)
}

// disconnect marks a peer and closes its connections, or those of one key.
func (r *Registry) disconnect(x exclusion) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if m := r.names[x.name]; m != nil {
		if err := x.mark(m); err != nil {
			return err
		}
	}
	for s := range r.sessions {
		if s.Member.Name == x.name && (x.key == nil || s.Peer.PublicKey == *x.key) {
			s.conn.Close()
		}
	}
	return nil
}

// Acknowledge writes that a peer has acknowledged the rotation of a key to a version. Acknowledge
// is idempotent. The error is ErrGone for a peer that is not enrolled. announced refuses inside the
// transaction what is announced no longer.
func (r *Registry) Acknowledge(
	ctx context.Context, p Peer, who audit.Actor, key string, version uint32, announced func(*ledger.Tx) error,
) error {
	return r.acknowledge(ctx, p, audit.NewRotationKnown(who, key, version),
		func(m *Member) bool { return m.keys[p.PublicKey].known[key] >= version },
		func(tx *ledger.Tx, rec *record) (bool, error) {
			k := &rec.Keys[rec.index(p.PublicKey)]
			if err := announced(tx); err != nil || k.Known[key] >= version {
				return false, err
			}
			if rec.Known == nil {
				rec.Known = map[string]uint32{}
			}
			if k.Known == nil {
				k.Known = map[string]uint32{}
			}
			k.Known[key], rec.Known[key] = version, max(rec.Known[key], version)
			return true, nil
		})
}

// AcknowledgeCompromise writes that a peer has acknowledged the compromise of a version with its
// key, in the way of Acknowledge.
func (r *Registry) AcknowledgeCompromise(
	ctx context.Context, p Peer, who audit.Actor, key string, version uint32,
) error {
	return r.acknowledge(ctx, p, audit.NewCompromiseKnown(who, key, version),
		func(m *Member) bool { return m.keys[p.PublicKey].warned.has(key, version) },
		func(_ *ledger.Tx, rec *record) (bool, error) {
			k := &rec.Keys[rec.index(p.PublicKey)]
			if k.Warned.has(key, version) {
				return false, nil
			}
			if k.Warned == nil {
				k.Warned = compromises{}
			}
			k.Warned[key] = append(k.Warned[key], version)
			return true, nil
		})
}

// acknowledge writes a change of a peer's record with its event, unless the member has acknowledged
// already. The change returns false where the record has the acknowledgement.
func (r *Registry) acknowledge(
	ctx context.Context, p Peer, e audit.Event,
	known func(*Member) bool, change func(*ledger.Tx, *record) (bool, error),
) error {
	r.mu.RLock()
	m := r.members[p.PublicKey]
	done := m != nil && known(m)
	r.mu.RUnlock()
	if m == nil {
		return ErrGone
	}
	if done {
		return nil
	}
	return r.ledger.Update(ctx, func(tx *ledger.Tx) error {
		rec, err := enrolled(tx, p.Name)
		if err != nil || !rec.has(p.PublicKey) || !r.In(p.PublicKey) {
			return ErrGone
		}
		if changed, err := change(tx, &rec); err != nil || !changed {
			return err
		}
		if err := tx.Put(ledger.Peers, p.Name, manage.Encode(rec)); err != nil {
			return err
		}
		return tx.Append(ledger.EventOf(e))
	})
}

// Forget removes all acknowledgements of a version of a key and of later versions, in the caller's
// transaction: a rotation with other times must be acknowledged again. Version 0 means none.
func Forget(tx *ledger.Tx, key string, version uint32) error {
	if version == 0 {
		return nil
	}
	forget := func(known map[string]uint32) (some bool) {
		if some = known[key] >= version; some {
			known[key] = version - 1
		}
		return some
	}
	again := map[string]record{}
	if err := tx.All(ledger.Peers, func(name string, value []byte) error {
		rec, err := decode(name, value)
		some := forget(rec.Known)
		for _, k := range rec.Keys {
			some = forget(k.Known) || some
		}
		if some {
			again[name] = rec
		}
		return err
	}); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(again)) {
		if err := tx.Put(ledger.Peers, name, manage.Encode(again[name])); err != nil {
			return err
		}
	}
	return nil
}

// Known returns the last version of a key that a peer has acknowledged with the key of a session,
// or 0.
func (r *Registry) Known(s *Session, key string) uint32 {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return s.key.known[key]
}

// Warned reports whether a peer has acknowledged the compromise of a version with the key of a
// session.
func (r *Registry) Warned(s *Session, key string, version uint32) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return s.key.warned.has(key, version)
}

// Unacknowledged returns the names of the active peers that have not acknowledged a version of a
// key.
func (r *Registry) Unacknowledged(key string, version uint32) []string {
	return r.those(func(m *Member) bool { return m.known[key] < version })
}

// AcknowledgedBy returns the names of the active peers that have acknowledged a version of a key.
func (r *Registry) AcknowledgedBy(key string, version uint32) []string {
	return r.those(func(m *Member) bool { return m.known[key] >= version })
}

// Unwarned returns the names of the active peers that have not acknowledged the compromise of a
// version with each key that they use. Of several keys, one that was never seen is a spare: nobody
// is behind it.
func (r *Registry) Unwarned(key string, version uint32) []string {
	return r.those(func(m *Member) bool {
		some := false
		for _, k := range m.keys {
			warned := k.warned.has(key, version)
			if !warned && !k.removed && !k.Seen.IsZero() {
				return true
			}
			some = some || warned
		}
		return !some
	})
}

// those returns the names of the active peers that are chosen.
func (r *Registry) those(chosen func(*Member) bool) (names []string) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, m := range r.names {
		if m.active() && chosen(m) {
			names = append(names, m.Name)
		}
	}
	slices.Sort(names)
	return names
}

// Acknowledged reports whether every active peer of a list has acknowledged a version of a key. The
// list must have at least one active peer. If all is set, the list has every peer.
func (r *Registry) Acknowledged(key string, version uint32, list []string, all bool) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	asked := 0
	for _, m := range r.names {
		if !m.active() || !all && !slices.Contains(list, m.Name) {
			continue
		}
		if m.known[key] < version {
			return false
		}
		asked++
	}
	return asked > 0
}

// Stop waits for the end of the act under way. Later acts are refused.
func (r *Registry) Stop(ctx context.Context) error { return r.enrolling.Acquire(ctx) }
