package keyring

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"countersign/audit"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/wire"
)

// The states that have no exported name.
const (
	Absent = absent
	Making = making
)

// The times and bounds of the schedule.
const (
	FirstRetry   = firstRetry
	LastRetry    = lastRetry
	KeepEvery    = keepEvery
	MaxAhead     = maxAhead
	MaxAnswering = maxAnswering
	UsesBehind   = usesBehind
)

// Title is the state as error texts and docs/SPEC.md call the state.
func (s State) Title() string { return s.name() }

// Signs reports that a key of an algorithm makes signatures for peers.
func Signs(name string, alg keystore.Algorithm) bool { return signs(name, alg) }

// KeepKey does now what is due of a key.
func (r *Ring) KeepKey(ctx context.Context, name string) { r.keepKey(ctx, name) }

// Due reports that something is due now for a key with these versions.
func (r *Ring) Due(versions []*Key) bool { return r.due(versions) != nil }

// Activate makes an announced version the active one, as the schedule does.
func (r *Ring) Activate(ctx context.Context, who audit.Actor, next *Key) error {
	return r.activate(ctx, who, next)
}

// Change gives a version another state, with these events in the same transaction.
func (r *Ring) Change(ctx context.Context, who audit.Actor, ref keystore.Ref, to State, events ...audit.Event) error {
	return r.change(ctx, who, []edit{{ref, func(rec *record) { rec.State = to }}}, events...)
}

// FirstUncounted is the first event that the record of uses does not count.
func (r *Ring) FirstUncounted() uint64 {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.written.Next
}

// Lose notes that a key is missing on its token, as a start does.
func (r *Ring) Lose(ref keystore.Ref, problem string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lost[ref] = errors.New(problem)
}

// KeepCompared compares the keys with tokens that come, until ctx ends.
func (r *Ring) KeepCompared(ctx context.Context) { r.keepCompared(ctx) }

// Digest is the digest that the version before commits to.
func (k *Key) Digest() [32]byte { return k.digest() }

// On returns the key on another device, which replace makes from the key's own.
func (k *Key) On(replace func(keystore.Key) keystore.Key) *Key {
	other := *k
	other.device = replace(k.device)
	return &other
}

// Generation is the generation of an authorization of a Noise key.
func Generation(a *wire.Authorization) int64 {
	_, generation := authorizationOf(&Key{Authorization: a})
	return generation
}

// Encoded is the ledger's record of the settings.
func (s Settings) Encoded() []byte { return manage.Encode(s.record()) }

// StateOf decodes the state in a version's record.
func StateOf(name string, value []byte) (State, error) {
	_, rec, err := decode(name, value)
	return rec.State, err
}

// PutUnfinished writes the record of a version that a crash has cut off while it was being made.
func PutUnfinished(tx *ledger.Tx, ref keystore.Ref, token string) error {
	return record{Token: token, Algorithm: keystore.Ed25519, State: making}.write(tx, ref.String())
}

// Rewrite changes the token and the state of a version's record past the table, as no act does.
func Rewrite(tx *ledger.Tx, ref keystore.Ref, token string, state State) error {
	name := ref.String()
	_, rec, err := decode(name, tx.Get(ledger.Keys, name))
	if err != nil {
		return err
	}
	rec.Token, rec.State = token, state
	return rec.write(tx, name)
}

// Memory describes everything in memory that follows the ledger: one line for each version, each
// active version, each public key, each key's settings, each request and each announcement, by its
// subject.
func (r *Ring) Memory() map[string]string {
	all := map[string]string{}
	for _, a := range r.Announcements() {
		all["announcement "+a.Name] = fmt.Sprint(a.Version, " ", a.Event)
	}
	for _, a := range r.Compromises() {
		all[fmt.Sprint("compromise ", a.Name, "/", a.Version)] = a.Event
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	for ref, k := range r.keys {
		all[fmt.Sprint("key ", ref)] = fmt.Sprintf(
			"%v is %s on %s; created %v, activates %v, retires %v; compromised %t, retired %t; "+
				"change %d, by %s, called off %v after %d uses; "+
				"info %+v, verifies %t, has the turns of its token %t; succession %s; authorization %s",
			k.Ref(), k.State, k.Token, k.Created, k.Activates, k.Retires, k.Compromised, k.usage.retired.Load(),
			k.Change, manage.Encode(k.By), k.CalledOff, k.UsesBefore,
			k.Info(), k.public != nil, k.turns == r.turns[k.Token],
			manage.Encode(k.Succession), manage.Encode(k.Authorization))
	}
	for name, k := range r.active {
		all["active "+name] = fmt.Sprint(k.Ref(), ", the one in keys: ", r.keys[k.Ref()] == k)
	}
	for public, refs := range r.byPublic {
		var names []string
		for _, ref := range refs {
			names = append(names, ref.String())
		}
		if slices.Sort(names); len(names) > 0 {
			all[fmt.Sprintf("public key %x", public)] = fmt.Sprint(names)
		}
	}
	for name, s := range r.settings {
		all["settings "+name] = fmt.Sprintf("%+v", s)
	}
	for name, q := range r.requests {
		all["request "+name] = fmt.Sprintf("%+v", q)
	}
	all["uses"] = fmt.Sprintf("%+v", r.written)
	return all
}

// Announcements lists the newest rotations.
func (r *Ring) Announcements() []Announcement { return r.news().rotations }

// Compromises lists the compromised versions.
func (r *Ring) Compromises() []Announcement { return r.news().compromises }
