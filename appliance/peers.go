package appliance

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"countersign/audit"
	"countersign/internal/ijson"
	"countersign/internal/keystore"
	"countersign/internal/ledger"

	"golang.org/x/time/rate"
)

// member is an enrolled peer and what it costs now. All of it is under Appliance.mu; another enrolment is another member.
type member struct {
	Peer
	suspended bool
	seen      time.Time         // when it last proved to be there
	from      string            // the address from which it last connected; "" if never
	written   time.Time         // seen, as the ledger has it
	sessions  int               // open connections
	requests  int               // being served, the items of a batch one by one
	pace      *rate.Limiter     // how often it may ask
	refusals  *rate.Limiter     // how many refusals are written down one by one
	ended     bool              // removed
	known     map[string]uint32 // of each line, the version whose rotation it has acknowledged
}

// in says that the peer may be served.
func (m *member) in() bool { return !m.suspended && !m.ended }

// PeerStatus is a peer as an operator sees it.
type PeerStatus struct {
	Peer
	Suspended   bool
	Seen        time.Time // zero: never
	Connections int       // open now
}

// peerRecord is the ledger's record of a peer, under its name.
type peerRecord struct {
	PublicKey string            `json:"public_key"` // hex
	Added     int64             `json:"added"`      // Unix seconds
	Suspended bool              `json:"suspended,omitempty"`
	Seen      int64             `json:"seen,omitempty"`  // Unix seconds; a minute late
	From      string            `json:"from,omitempty"`  // the address from which it last connected
	Known     map[string]uint32 `json:"known,omitempty"` // of each line, the version whose rotation it has acknowledged
}

func decodePeer(name string, value []byte) (r peerRecord, p Peer, err error) {
	if err := json.Unmarshal(value, &r); err != nil {
		return r, p, fmt.Errorf("peer %q in the ledger: %w", name, err)
	}
	key, err := hex.DecodeString(r.PublicKey)
	if err != nil || len(key) != 32 {
		return r, p, fmt.Errorf("peer %q in the ledger has no public key", name)
	}
	return r, Peer{Name: name, PublicKey: [32]byte(key), Added: time.Unix(r.Added, 0)}, nil
}

func (a *Appliance) newMember(p Peer, r peerRecord) *member {
	m := &member{
		Peer: p, suspended: r.Suspended,
		pace:     rate.NewLimiter(rate.Limit(a.limits.RequestsPerSecond), max(a.limits.RequestsPerSecond, a.limits.BatchItems)),
		refusals: rate.NewLimiter(rate.Limit(float64(a.limits.RefusalsPerMinute)/60), a.limits.RefusalsPerMinute),
	}
	if m.known = maps.Clone(r.Known); m.known == nil {
		m.known = map[string]uint32{}
	}
	if r.Seen != 0 {
		m.seen = time.Unix(r.Seen, 0)
		m.written, m.from = m.seen, r.From
	}
	return m
}

func (a *Appliance) loadPeers() error {
	return a.ledger.All(ledger.Peers, func(name string, value []byte) error {
		r, p, err := decodePeer(name, value)
		if err != nil {
			return err
		}
		if other, ok := a.peers[p.PublicKey]; ok {
			return fmt.Errorf("peers %q and %q in the ledger have the same public key", other.Name, name)
		}
		m := a.newMember(p, r)
		a.peers[p.PublicKey] = m
		if from, err := netip.ParseAddr(m.from); err == nil && m.in() {
			a.handshakes.Remember(from, time.Since(m.seen)) // so that a flood can't keep it out after a restart
		}
		return nil
	})
}

// AddPeer enrols a client under a name, by its Noise static public key. Neither may be enrolled already.
func (a *Appliance) AddPeer(ctx context.Context, who audit.Actor, name string, publicKey []byte) (Peer, error) {
	if err := keystore.CheckName(name); err != nil {
		return Peer{}, fmt.Errorf("peer %q: %w: %w", ijson.Clip(name), ErrInvalid, err)
	}
	if len(publicKey) != 32 || keystore.LowOrder([32]byte(publicKey)) {
		return Peer{}, fmt.Errorf("peer %q: %w: its public key must be 32 bytes of an X25519 key", name, ErrInvalid)
	}
	p := Peer{Name: name, PublicKey: [32]byte(publicKey), Added: time.Now()}
	err := a.act(ctx, a.enrolling, fmt.Sprintf("peer %q", name), func(ctx context.Context) error { return a.enrol(ctx, who, p) })
	if err != nil {
		return Peer{}, err
	}
	return p, nil
}

// enrol writes a peer down and lets it in. The ledger decides what is enrolled already, not memory.
func (a *Appliance) enrol(ctx context.Context, who audit.Actor, p Peer) error {
	r := peerRecord{PublicKey: hex.EncodeToString(p.PublicKey[:]), Added: p.Added.Unix()}
	err := a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		if len(tx.Get(ledger.Peers, p.Name)) > 0 {
			return fmt.Errorf("peer %q: %w", p.Name, ErrExists)
		}
		if err := tx.All(ledger.Peers, func(other string, value []byte) error {
			known, _, err := decodePeer(other, value)
			if err == nil && known.PublicKey == r.PublicKey {
				err = fmt.Errorf("peer %q: %w: the public key is enrolled as %q", p.Name, ErrExists, other)
			}
			return err
		}); err != nil {
			return err
		}
		if err := tx.Put(ledger.Peers, p.Name, encode(r)); err != nil {
			return err
		}
		return tx.Append(entry(audit.Event{
			Type: audit.PeerAdded, Actor: who, Action: "peer add", Resource: p.Name, Outcome: "ok", Metadata: map[string]string{"public_key": r.PublicKey},
		}))
	})
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.peers[p.PublicKey] = a.newMember(p, r)
	return nil
}

// RemovePeer takes a client's enrolment back, SuspendPeer keeps it out until ResumePeer. It is cut off first, without the disk and
// without waiting for anybody: its connections are closed, and what was being served for it has ended, before it is written down.
// After an error the ledger may still have the peer, and would let it in again at the next start: ask again.
func (a *Appliance) RemovePeer(ctx context.Context, who audit.Actor, name string) error {
	return a.keepOut(ctx, name, func(m *member) { m.ended = true; delete(a.peers, m.PublicKey) }, func(tx *ledger.Tx) error {
		if err := tx.Delete(ledger.Peers, name); err != nil {
			return err
		}
		return tx.Append(entry(audit.Event{Type: audit.PeerRemoved, Actor: who, Action: "peer remove", Resource: name, Outcome: "ok"}))
	})
}

func (a *Appliance) SuspendPeer(ctx context.Context, who audit.Actor, name string) error {
	return a.keepOut(ctx, name, func(m *member) { m.suspended = true }, func(tx *ledger.Tx) error {
		return setSuspended(tx, who, name, true)
	})
}

func (a *Appliance) ResumePeer(ctx context.Context, who audit.Actor, name string) error {
	return a.act(ctx, a.enrolling, fmt.Sprintf("peer %q", ijson.Clip(name)), func(ctx context.Context) error {
		if err := a.ledger.Update(ctx, func(tx *ledger.Tx) error {
			if err := enrolled(tx, name); err != nil {
				return err
			}
			return setSuspended(tx, who, name, false)
		}); err != nil {
			return err
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		for _, m := range a.peers {
			if m.Name == name {
				m.suspended = false
			}
		}
		return nil
	})
}

// setSuspended writes down that a peer is kept out, or not any more. What is so already is no event.
func setSuspended(tx *ledger.Tx, who audit.Actor, name string, suspended bool) error {
	r, _, err := decodePeer(name, tx.Get(ledger.Peers, name))
	if err != nil || r.Suspended == suspended {
		return err
	}
	r.Suspended = suspended
	if err := tx.Put(ledger.Peers, name, encode(r)); err != nil {
		return err
	}
	e := audit.Event{Type: audit.PeerSuspended, Actor: who, Action: "peer suspend", Resource: name, Outcome: "ok"}
	if !suspended {
		e.Type, e.Action = audit.PeerResumed, "peer resume"
	}
	return tx.Append(entry(e))
}

// keepOut marks a peer in memory, which closes the door, closes its connections, and writes it down when nothing is served for it.
func (a *Appliance) keepOut(ctx context.Context, name string, mark func(*member), write func(*ledger.Tx) error) error {
	a.cutOff(name, mark)
	return a.act(ctx, a.enrolling, fmt.Sprintf("peer %q", ijson.Clip(name)), func(ctx context.Context) error {
		for _, end := range a.cutOff(name, mark) { // again: it may have been enrolled or resumed in between
			<-end // a request's time at the most
		}
		return a.ledger.Update(ctx, func(tx *ledger.Tx) error {
			if err := enrolled(tx, name); err != nil {
				return err
			}
			return write(tx)
		})
	})
}

func enrolled(tx *ledger.Tx, name string) error {
	if len(tx.Get(ledger.Peers, name)) == 0 {
		return fmt.Errorf("peer %q: %w", ijson.Clip(name), ErrNotFound)
	}
	return nil
}

// cutOff marks a peer and closes its connections. ended has a channel for each, which is closed when nothing is being
// served on it any more.
func (a *Appliance) cutOff(name string, mark func(*member)) (ended []<-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, m := range a.peers {
		if m.Name == name {
			mark(m)
		}
	}
	for s := range a.sessions {
		if s.member.Name == name {
			s.conn.Close()
			ended = append(ended, s.ended)
		}
	}
	return ended
}

// enrolled says that there is a peer of a name.
func (a *Appliance) enrolled(name string) bool {
	a.mu.RLock()
	defer a.mu.RUnlock()
	for _, m := range a.peers {
		if m.Name == name {
			return true
		}
	}
	return false
}

// Peers lists the enrolled clients by name.
func (a *Appliance) Peers() []PeerStatus {
	a.mu.RLock()
	defer a.mu.RUnlock()
	var all []PeerStatus
	for _, m := range a.peers {
		all = append(all, PeerStatus{Peer: m.Peer, Suspended: m.suspended, Seen: m.seen, Connections: m.sessions})
	}
	slices.SortFunc(all, func(x, y PeerStatus) int { return strings.Compare(x.Name, y.Name) })
	return all
}

// writeSeen writes down when peers were last seen, as far as it has changed.
func (a *Appliance) writeSeen(ctx context.Context) error {
	a.mu.RLock()
	type sight struct {
		at   time.Time
		from string
	}
	changed := map[*member]sight{}
	for _, m := range a.peers {
		if m.seen.After(m.written) {
			changed[m] = sight{m.seen, m.from}
		}
	}
	a.mu.RUnlock()
	if len(changed) == 0 {
		return nil
	}
	err := a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		for m, last := range changed {
			r, p, err := decodePeer(m.Name, tx.Get(ledger.Peers, m.Name))
			if err != nil || p.PublicKey != m.PublicKey {
				continue // it was removed
			}
			r.Seen, r.From = last.at.Unix(), last.from
			if err := tx.Put(ledger.Peers, m.Name, encode(r)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for m, last := range changed {
		m.written = last.at
	}
	return nil
}
