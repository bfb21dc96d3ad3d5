package keyring

import (
	"fmt"
	"maps"
	"slices"

	"countersign/internal/ijson"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/wire"
)

// The appliance tells peers two kinds of news:
//
//   - the newest rotation of each key, at the announcement, and again at each connection until the
//     peer has acknowledged the rotation or a later one;
//   - each compromise of a version that peers may know, in the same way until the peer has
//     acknowledged this very compromise. No later rotation takes its place.
//
// Compromised stays set in the record of a version for ever, and the peer's record has the
// acknowledgement. So the ledger has the news of a compromise from the transaction of the
// compromise on, for each enrolled peer, whether the device of the key answers or not.

// Announcement is a piece of news about a version, ready for peers.
type Announcement struct {
	keystore.Ref
	Change uint32 // of the event rotation
	Event  string // the event rotation or compromise in JSON
}

// announced has all present news.
type announced struct{ rotations, compromises []Announcement }

// newest returns the newest version of a key of which peers are told, or nil without one. The
// caller holds mu.
func (r *Ring) newest(name string) *Key {
	var last *Key
	for ref, k := range r.keys {
		if ref.Name == name && k.newerThan(last) {
			last = k
		}
	}
	return last
}

// newerThan reports that k is announced and newer than last. Version 1 of a key is no rotation: a
// peer hears of it only when the announcement of version 2 was called off.
func (k *Key) newerThan(last *Key) bool {
	return (k.Version > 1 || !k.CalledOff.IsZero()) && k.Announced() && (last == nil || k.Version > last.Version)
}

// News lists the compromised versions and the newest rotations, by the name of the key and the
// version, as of one moment: a rotation that follows from a compromise never comes without the
// compromise.
func (r *Ring) News() (compromises, rotations []Announcement) {
	all := r.news()
	return all.compromises, all.rotations
}

// news is cached, since all sessions ask at the same time after each change.
func (r *Ring) news() *announced {
	r.mu.RLock()
	all := r.announced
	r.mu.RUnlock()
	if all != nil {
		return all
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	newest := map[string]*Key{}
	var compromised []*Key
	for ref, k := range r.keys {
		if k.Public() && k.newerThan(newest[ref.Name]) {
			newest[ref.Name] = k
		}
		if k.Public() && k.Compromised {
			compromised = append(compromised, k)
		}
	}
	all = new(announced)
	for _, name := range slices.Sorted(maps.Keys(newest)) {
		k := newest[name]
		if k.Compromised { // no peer is led to such a version; its successor will be news
			continue
		}
		event := wire.EncodeRotation(r.rotationOf(k))
		all.rotations = append(all.rotations, Announcement{k.Ref(), k.Change, string(event)})
	}
	slices.SortFunc(compromised, inOrder)
	for _, k := range compromised {
		event := wire.EncodeCompromise(wire.Compromise{
			Key: k.Name, Version: k.Version, PublicKey: wire.Bytes32(k.Info().PublicKey),
		})
		all.compromises = append(all.compromises, Announcement{k.Ref(), 0, string(event)})
	}
	r.announced = all
	return all
}

// rotationOf makes the event rotation of a version. The caller holds mu.
func (r *Ring) rotationOf(k *Key) wire.Rotation {
	doc := wire.Rotation{
		Key: k.Name, Version: k.Version, PublicKey: wire.Bytes32(k.Info().PublicKey),
		ActivatesAt: k.Activates.Unix(), Succession: k.Succession, Authorization: k.Authorization, Change: k.Change,
	}
	if !k.CalledOff.IsZero() {
		doc.Cancelled = k.Version + 1
	}
	doc.RetiresAt = k.Activates.Add(r.grace(r.settings[k.Name])).Unix()
	if k.Version == 1 {
		doc.RetiresAt = doc.ActivatesAt // there is no version before
	}
	if old := r.before(k); old != nil {
		if !old.Retires.IsZero() {
			// A rotation by this second's clock may come before the ledger has this second.
			doc.RetiresAt = max(old.Retires.Unix(), doc.ActivatesAt)
		}
		if old.Compromised {
			doc.RetiresAt = doc.ActivatesAt
		}
	}
	return doc
}

// Rotation returns the newest rotation of a key of which peers are told, or nil without one.
func (r *Ring) Rotation(name string) *wire.Rotation {
	r.mu.RLock()
	defer r.mu.RUnlock()
	k := r.newest(name)
	if k == nil || k.Compromised {
		return nil
	}
	doc := r.rotationOf(k)
	doc.Event = wire.EventRotation
	return &doc
}

// CheckAnnounced refuses what peers are not told of a version: a version that was never announced,
// or whose announcement was called off, and an announcement that another has replaced.
func (r *Ring) CheckAnnounced(name string, version, change uint32) error {
	r.mu.RLock()
	defer r.mu.RUnlock()
	k := r.keys[keystore.Ref{Name: name, Version: version}]
	if k == nil || !k.newerThan(nil) || !k.Public() || k.Change != change {
		return notAnnounced(name, version, change)
	}
	return nil
}

func notAnnounced(name string, version, change uint32) error {
	return fmt.Errorf("%w: no rotation of %q to version %d, change %d, is announced",
		ErrUnknown, ijson.Clip(name), version, change)
}

// StillAnnounced is CheckAnnounced inside a transaction. The answer may have changed since the
// request arrived: an acknowledgement of what is no longer true must not count.
func (r *Ring) StillAnnounced(tx *ledger.Tx, name string, version, change uint32) error {
	ref := keystore.Ref{Name: name, Version: version}.String()
	_, rec, err := decode(ref, tx.Get(ledger.Keys, ref))
	if err != nil {
		return err
	}
	if rec.Change != change || (rec.State == Pending || rec.State.outOfUse()) && rec.Activates == 0 {
		return notAnnounced(name, version, change)
	}
	return nil
}

// CheckCompromised refuses a version of a key whose compromise was not announced to peers.
func (r *Ring) CheckCompromised(name string, version uint32) error {
	if k := r.Version(name, version); k == nil || !k.Public() || !k.Compromised {
		return fmt.Errorf("%w: no compromise of %q, version %d, was announced", ErrUnknown, ijson.Clip(name), version)
	}
	return nil
}

// Watch has changed called after each change that peers may have to be told. changed must not
// block.
func (r *Ring) Watch(changed func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.watchers = append(r.watchers, changed)
}

// notify calls the watchers.
func (r *Ring) notify() {
	r.mu.RLock()
	watchers := r.watchers
	r.mu.RUnlock()
	for _, changed := range watchers {
		changed()
	}
}

// maxSteps bounds the steps in one answer, so that the answer fits into a message.
const maxSteps = 50

// Steps answers the operation line: the steps of a key after a version, the active version, and all
// compromised versions. So a peer learns of a compromise in the same answer that leads past the
// version.
func (r *Ring) Steps(request *wire.Line) (*wire.Steps, error) {
	versions, err := r.Versions(request.Key)
	if err != nil || !versions[0].Signs() {
		return nil, fmt.Errorf("%w: there is no signing key %q", ErrUnknown, ijson.Clip(request.Key))
	}
	answer := &wire.Steps{Key: request.Key, Steps: []wire.Succession{}, Compromised: []uint32{}}
	for _, k := range versions {
		if k.State == Active {
			answer.Active = k.Version
		}
		if k.Compromised {
			answer.Compromised = append(answer.Compromised, k.Version)
		}
	}
	for _, k := range versions {
		switch {
		case k.Version <= request.From || !k.Announced():
		case k.Succession == nil: // the old version could not sign the step, so no peer can follow
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

// Listed answers the operation keys: the announced versions of signing keys, without the archived
// and destroyed versions, which Steps leads past. Compromised versions stay in the list. Every
// enrolled peer sees every key; policy decides about the use of the keys.
func (r *Ring) Listed() wire.KeyList {
	list := wire.KeyList{Keys: []wire.Key{}}
	for _, k := range r.All() {
		info := k.Info()
		gone := (k.State == Archived || k.State == Destroyed) && !k.Compromised
		if !k.Signs() || !k.Announced() || gone {
			continue
		}
		doc := wire.Key{
			Name: k.Name, Version: k.Version, Algorithm: string(info.Algorithm), State: string(k.State),
			Custody: string(info.Custody), Provenance: info.Provenance.String(), PublicKey: [32]byte(info.PublicKey),
			Compromised: k.Compromised,
		}
		if digest, ok := r.Next(k); ok {
			doc.Next = (*wire.Bytes32)(&digest)
		}
		if recovery, ok := r.RecoveryCommitment(k.Name); ok && (k.State == Active || k.State == Pending) {
			doc.Recovery = (*wire.Bytes32)(&recovery)
		}
		list.Keys = append(list.Keys, doc)
	}
	return list
}
