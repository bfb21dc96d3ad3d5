package appliance

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"

	"countersign/audit"
	"countersign/internal/ijson"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/wire"
)

// Peers are told of the newest rotation of each line: when it is announced, and at each connection, until they have acknowledged it.

// newest returns the version of a line that peers are to know of: the one that was announced last, unless it is the first one. The caller holds mu.
func (a *Appliance) newest(name string) *Key {
	var last *Key
	for ref, k := range a.keys {
		if ref.Name == name && k.follows(last) {
			last = k
		}
	}
	return last
}

// follows says that peers are to know of k, and not of last any more.
func (k *Key) follows(last *Key) bool {
	return k.Version > 1 && k.announced() && (last == nil || k.Version > last.Version)
}

// announcement is what peers are told of a line.
type announcement struct {
	name    string
	version uint32
	event   string
}

// announcements lists them by name. All sessions ask at once when there is one: they are made once.
func (a *Appliance) announcements() []announcement {
	a.mu.RLock()
	all := a.news
	a.mu.RUnlock()
	if all != nil {
		return all
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	newest := map[string]*Key{}
	for ref, k := range a.keys {
		if told(ref.Name, k) && k.follows(newest[ref.Name]) {
			newest[ref.Name] = k
		}
	}
	a.news = []announcement{}
	for _, name := range slices.Sorted(maps.Keys(newest)) {
		k := newest[name]
		a.news = append(a.news, announcement{name, k.Version, string(wire.EncodeRotation(a.rotationOf(k)))})
	}
	return a.news
}

// told says that others may hear of a key's line.
func told(name string, k *Key) bool { return name == NoiseName || signs(name, k.Info().Algorithm) }

// rotations lists what a peer has not acknowledged, but for what it was told; it notes there what it lists.
func (a *Appliance) rotations(m *member, heard map[string]string) (all []string) {
	announced := a.announcements()
	a.mu.RLock()
	defer a.mu.RUnlock()
	for _, n := range announced {
		if m.known[n.name] < n.version && heard[n.name] != n.event {
			heard[n.name] = n.event
			all = append(all, n.event)
		}
	}
	return all
}

// rotationOf says what peers are told. The caller holds mu.
func (a *Appliance) rotationOf(k *Key) wire.Rotation {
	r := wire.Rotation{Key: k.Name, Version: k.Version, PublicKey: wire.Bytes32(k.Info().PublicKey), ActivatesAt: k.Activates.Unix(),
		Succession: k.Succession, Authorization: k.Authorization}
	l := a.lines[k.Name]
	l.life = a.limits.MaxLifetime
	r.RetiresAt = k.Activates.Add(l.grace()).Unix()
	if old := a.keys[keystore.Ref{Name: k.Name, Version: k.Version - 1}]; old != nil {
		if !old.Retires.IsZero() {
			r.RetiresAt = old.Retires.Unix()
		}
		if r.Compromised = old.Compromised; r.Compromised {
			r.RetiresAt = r.ActivatesAt
		}
	}
	return r
}

// wake has all sessions look for news.
func (a *Appliance) wake() {
	a.mu.RLock()
	defer a.mu.RUnlock()
	for s := range a.sessions {
		select {
		case s.news <- struct{}{}:
		default: // it will look anyway
		}
	}
	for _, hook := range a.hooks {
		hook()
	}
}

// inform tells a peer of rotations until ctx ends.
func (a *Appliance) inform(ctx context.Context, s *session) {
	heard := map[string]string{}
	for {
		for _, event := range a.rotations(s.member, heard) {
			if s.conn.WriteMessage([]byte(event)) != nil {
				s.conn.Close() // it does not read
				return
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-s.news:
		}
	}
}

// Acknowledge notes that a peer has taken notice of a rotation.
func (a *Appliance) Acknowledge(ctx context.Context, who Peer, r *wire.Ack) (*wire.Acknowledged, error) {
	a.mu.RLock()
	m, k := a.peers[who.PublicKey], a.keys[keystore.Ref{Name: r.Key, Version: r.Version}]
	newest := a.newest(r.Key)
	known := m != nil && m.known[r.Key] >= r.Version
	a.mu.RUnlock()
	if m == nil {
		return nil, fmt.Errorf("%w: the peer is enrolled no more", errNotYours)
	}
	if k == nil || newest == nil || r.Version > newest.Version || r.Version < 2 || !told(r.Key, k) {
		return nil, fmt.Errorf("%w: no rotation of %q to version %d was announced", errUnknownKey, ijson.Clip(r.Key), r.Version)
	}
	done := &wire.Acknowledged{Key: r.Key, Version: r.Version}
	if known {
		return done, nil
	}
	err := a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		record, p, err := decodePeer(who.Name, tx.Get(ledger.Peers, who.Name))
		if err != nil || p.PublicKey != who.PublicKey {
			return fmt.Errorf("%w: the peer is enrolled no more", errNotYours)
		}
		if record.Known[r.Key] >= r.Version {
			return nil
		}
		if record.Known = maps.Clone(record.Known); record.Known == nil {
			record.Known = map[string]uint32{}
		}
		record.Known[r.Key] = r.Version
		if err := tx.Put(ledger.Peers, who.Name, encode(record)); err != nil {
			return err
		}
		return tx.Append(entry(audit.Event{Type: audit.RotationKnown, Actor: who.actor(), Action: wire.OpAck, Resource: r.Key, Outcome: "ok",
			Metadata: map[string]string{"version": strconv.FormatUint(uint64(r.Version), 10)}}))
	})
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if m == a.peers[who.PublicKey] && m.known[r.Key] < r.Version { // another enrolment is another member
		m.known[r.Key] = r.Version
	}
	return done, nil
}

// Unacknowledged lists the peers, of those that are not kept out, that have not acknowledged a version.
func (a *Appliance) Unacknowledged(name string, version uint32) (peers []string) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	for _, m := range a.peers {
		if m.in() && m.known[name] < version {
			peers = append(peers, m.Name)
		}
	}
	slices.Sort(peers)
	return peers
}

// Rotation says what the newest rotation of a line that was announced is, for who asks outside of a connection; nil: there was none.
func (a *Appliance) Rotation(name string) *wire.Rotation {
	a.mu.RLock()
	defer a.mu.RUnlock()
	k := a.newest(name)
	if k == nil {
		return nil
	}
	r := a.rotationOf(k)
	r.Event = wire.EventRotation
	return &r
}

// maxSteps bounds the steps in one answer, so that it fits into a message.
const maxSteps = 50

// Steps answers how a line went on from a version.
func (a *Appliance) Steps(r *wire.Line) (*wire.Steps, error) {
	versions, err := a.Key(r.Key)
	if err != nil || !signs(r.Key, versions[0].Info().Algorithm) {
		return nil, fmt.Errorf("%w: there is no signing key %q", errUnknownKey, ijson.Clip(r.Key))
	}
	answer := &wire.Steps{Key: r.Key, Steps: []wire.Succession{}}
	for _, k := range versions {
		switch {
		case k.Version <= r.From || !k.announced():
		case k.Succession == nil: // it could not be signed: nobody can follow
			return answer, nil
		case len(answer.Steps) == maxSteps:
			answer.More = true
			return answer, nil
		default:
			answer.Steps = append(answer.Steps, *k.Succession)
		}
	}
	return answer, nil
}

// announcedNext is what a peer may know of a version's successor.
func (a *Appliance) announcedNext(k *Key) *wire.Bytes32 {
	digest, ok := a.Next(k)
	if !ok {
		return nil
	}
	return (*wire.Bytes32)(&digest)
}
