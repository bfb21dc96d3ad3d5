// Package keyring keeps the keys: their versions and states, who may use which, creation, rotation and
// compromise, and the use of private keys that live in tokens. The records are in the ledger; memory
// follows them. Begin reading at Transitions in states.go, then at rotate.go.
package keyring

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"countersign/audit"
	"countersign/internal/eddsa"
	"countersign/internal/gate"
	"countersign/internal/ijson"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/limit"
	"countersign/internal/manage"
	"countersign/internal/peers"
	"countersign/transcript"
)

// The refusals of a request by the state of its key.
var (
	ErrUnknown      = errors.New("unknown key")
	ErrNotActive    = errors.New("the key is not active")
	ErrNotConfirmed = errors.New("an operator must be there")
)

// The appliance's own keys. Peers can't use them.
const (
	// NoiseName is the key whose versions answer handshakes.
	NoiseName = "noise"
	// LogName is the key whose active version signs the checkpoints of the audit log, and the appliance's
	// own statements: webhooks and canaries.
	LogName = "audit-log"
	// AdminName and CAName are the keys of the admin API's certificate and of its issuer.
	AdminName = "admin-tls"
	CAName    = "admin-ca"
)

// own reports that a key is the appliance's own.
func own(name string) bool {
	return slices.Contains([]string{NoiseName, LogName, AdminName, CAName}, name)
}

// rotates reports that a key can have a second version.
func rotates(name string) bool { return !own(name) || name == NoiseName }

// signs reports that a key makes peers' signatures. Each of its versions has a successor, made before
// the version comes into use, and the digest of its public key is written down and given out: a thief
// with the version's private key can't name another successor.
func signs(name string, alg keystore.Algorithm) bool { return alg == keystore.Ed25519 && !own(name) }

// Public reports that others may hear of a key: the Noise key, and keys that sign.
func (k *Key) Public() bool { return k.Name == NoiseName || k.Signs() }

// Signs reports that peers may ask for signatures of the key.
func (k *Key) Signs() bool { return signs(k.Name, k.Info().Algorithm) }

// Config is what a ring needs.
type Config struct {
	Ledger *ledger.Ledger
	Tokens manage.Tokens
	Calls  map[string]int // of each token at once
	Gate   *gate.Gate     // while it is blocked, nothing new is made
	Peers  *peers.Registry
	Log    *slog.Logger

	Identity       string        // the signing key that authorises the Noise key; "": none
	MaxLifetime    time.Duration // of a document: the grace time of a key that has no other
	RequestTimeout time.Duration // for one use of a device
}

// Ring is safe for concurrent use.
type Ring struct {
	Config
	turns map[string]*limit.Fair // by token

	// changing is held while keys change, however long the device takes: two acts on keys never run at
	// once.
	changing manage.Lock
	written  usesRecord // as it is on disk; under mu

	// mu guards all of memory below. It is held for look-ups and changes of memory only, never while a
	// device or the disk is waited for: admissions ask for the state of a key, and the ledger's writer
	// takes mu to let memory follow.
	mu            sync.RWMutex
	keys          map[keystore.Ref]*Key       // all versions that exist
	byPublic      map[[32]byte][]keystore.Ref // the Ed25519 keys, by public key
	active        map[string]*Key             // the version that signs, by name
	settings      map[string]Settings         // by name
	confirmed     map[string]time.Time        // until when an operator's confirmation lets a key sign
	credentials   uint64                      // how often operators' credentials have changed
	retries       map[string]retry            // rotations that have failed, by name
	lost          map[keystore.Ref]string     // keys that are to be used and are not on their token
	announcements []Announcement              // what peers are told; nil: to be made anew
	watchers      []func()                    // called when there may be news for peers
}

// Open reads the keys and holds each against its token: a key that is missing, ambiguous or another is
// an error, since serving without it would be a silent loss. A token that does not answer costs its
// own keys only, for now, unless the listener's key is on it. Open changes nothing.
func Open(ctx context.Context, c Config) (*Ring, error) {
	r := &Ring{
		Config: c, turns: map[string]*limit.Fair{}, changing: manage.NewLock(),
		keys: map[keystore.Ref]*Key{}, byPublic: map[[32]byte][]keystore.Ref{}, active: map[string]*Key{},
		settings: map[string]Settings{}, confirmed: map[string]time.Time{},
		retries: map[string]retry{}, lost: map[keystore.Ref]string{},
	}
	for name := range c.Tokens { // how many callers may wait is bounded by how many requests are let in
		r.turns[name] = limit.NewFair(max(1, c.Calls[name]))
	}
	if err := c.Ledger.Follow(ctx, &r.mu,
		ledger.Followed{Table: ledger.Lines, Take: r.takeSettings},
		ledger.Followed{Table: ledger.Keys, Take: r.takeKey},
		ledger.Followed{Table: ledger.Meta, Take: r.takeUses}); err != nil {
		return nil, err
	}
	for _, k := range r.All() {
		if active, _ := r.Active(k.Name); k.State == Active && active != k {
			return nil, fmt.Errorf("the ledger has two active versions of key %q: restore it from a backup", k.Name)
		}
		if err := r.checkToken(ctx, k); err != nil {
			return nil, err
		}
	}
	return r, r.countUses()
}

// takeKey lets memory say what a record says. mu is held.
func (r *Ring) takeKey(name string, value []byte) error {
	ref, err := keystore.ParseRef(name)
	if err != nil {
		return err
	}
	if value == nil {
		r.remove(ref)
		return nil
	}
	_, rec, err := decode(name, value)
	if err != nil || rec.State == making {
		return err
	}
	info, err := rec.info(ref)
	if err != nil {
		return err
	}
	k := &Key{
		Name: ref.Name, Version: ref.Version, Token: rec.Token, State: rec.State, Created: time.Unix(rec.Created, 0),
		Compromised: rec.Compromised, Succession: rec.Succession, Authorization: rec.Authorization,
		device: gone{info}, turns: r.turns[rec.Token], usage: new(usage),
	}
	if store := r.Tokens[rec.Token]; store != nil {
		k.device = store.Bind(info)
	} else {
		k.turns = limit.NewFair(1)
	}
	if rec.Activates != 0 {
		k.Activates = time.Unix(rec.Activates, 0)
	}
	if rec.Retires != 0 {
		k.Retires = time.Unix(rec.Retires, 0)
	}
	if rec.Algorithm == keystore.Ed25519 {
		k.public, _ = eddsa.ParsePublicKey(info.PublicKey) // one that is unusable verifies nothing
	}
	if before := r.keys[ref]; before != nil {
		k.usage = before.usage
	} else if k.public != nil {
		public := [32]byte(info.PublicKey)
		r.byPublic[public] = append(r.byPublic[public], ref) // a seed that was imported twice has two names
	}
	k.usage.retired.Store(k.State.outOfUse())
	r.keys[ref], r.announcements = k, nil
	if k.State == Active {
		r.active[k.Name] = k
	} else {
		r.deactivate(ref)
	}
	return nil
}

// deactivate notes that a version is not the active one. mu is held.
func (r *Ring) deactivate(ref keystore.Ref) {
	if was := r.active[ref.Name]; was != nil && was.Version == ref.Version {
		delete(r.active, ref.Name)
	}
}

// remove forgets a version. mu is held.
func (r *Ring) remove(ref keystore.Ref) {
	k := r.keys[ref]
	if k == nil {
		return // it was being made
	}
	delete(r.keys, ref)
	if k.public != nil {
		public := [32]byte(k.Info().PublicKey)
		r.byPublic[public] = slices.DeleteFunc(r.byPublic[public], func(other keystore.Ref) bool { return other == ref })
	}
	r.announcements = nil
	r.deactivate(ref)
}

// checkToken holds a key against its token at the start. An active version that is missing is an
// error: it is the wrong token, or a loss that must not go unseen. A pending or verify-only version
// signs nothing now, and must not keep all other keys from signing: Problems names it, and it can't
// become active, see Prove.
func (r *Ring) checkToken(ctx context.Context, k *Key) error {
	info, ref := k.Info(), k.Ref()
	store, err := r.Tokens.Get(k.Token)
	if err != nil && k.State.outOfUse() {
		return nil // its token may be gone with it
	} else if err != nil {
		return fmt.Errorf("key %v: %w", ref, err)
	}
	if k.State == Destroyed {
		return nil
	}
	there, err := store.Key(ctx, ref)
	switch {
	case errors.Is(err, keystore.ErrUnavailable) && (ref.Name != NoiseName || k.State != Active), errors.Is(err, keystore.ErrSealed):
		r.Log.Warn("a key is not held against its token, which does not give it out now", "key", ref.String(), "token", k.Token, "err", err)
		return nil
	case errors.Is(err, keystore.ErrNotFound) && k.State.outOfUse():
		r.Log.Warn("a key that is out of use is not on its token any more", "key", ref.String(), "token", k.Token)
		return nil
	case errors.Is(err, keystore.ErrNotFound) && k.State != Active:
		r.Log.Error("a key is not on its token", "key", ref.String(), "state", string(k.State), "token", k.Token)
		r.mu.Lock()
		defer r.mu.Unlock()
		r.lost[ref] = fmt.Sprintf("key %v, which is %s, is not on token %s: restore the token", ref, k.State, k.Token)
		return nil
	case errors.Is(err, keystore.ErrNotFound):
		return fmt.Errorf("the ledger has key %v and the token does not: is it the right token? %w", ref, err)
	case err != nil:
		return err
	}
	if got := there.Info(); !bytes.Equal(got.PublicKey, info.PublicKey) || got.Algorithm != info.Algorithm || got.Tag != info.Tag {
		return fmt.Errorf("key %v on the token is %s %x, the ledger has %s %x: is it the right token?",
			ref, got.Algorithm, got.PublicKey, info.Algorithm, info.PublicKey)
	}
	return nil
}

// edit changes one version's record.
type edit struct {
	ref    keystore.Ref
	change func(*record)
}

// change carries out edits in one transaction with their events. Each change of a state is held
// against Transitions: what the table does not have, or not for this actor, is not written.
func (r *Ring) change(ctx context.Context, who audit.Actor, edits []edit, events ...audit.Event) error {
	return r.Ledger.Update(ctx, func(tx *ledger.Tx) error { return changeIn(tx, who, edits, events...) })
}

func changeIn(tx *ledger.Tx, who audit.Actor, edits []edit, events ...audit.Event) error {
	for _, e := range edits {
		name := e.ref.String()
		_, rec, err := decode(name, tx.Get(ledger.Keys, name))
		if err != nil {
			return err
		}
		from := rec.State
		e.change(&rec)
		if rec.State != from {
			t, err := transition(from, rec.State, who)
			if err == nil && !t.writtenBy(events) {
				err = fmt.Errorf("%w: from %s to %s without its event", manage.ErrInvalid, from, rec.State)
			}
			if err != nil {
				return fmt.Errorf("key %v: %w", e.ref, err)
			}
		}
		if err := tx.Put(ledger.Keys, name, manage.Encode(rec)); err != nil {
			return err
		}
	}
	for _, e := range events {
		if err := tx.Append(ledger.EventOf(e)); err != nil {
			return err
		}
	}
	return nil
}

// record writes an event down.
func (r *Ring) record(ctx context.Context, e audit.Event) error {
	_, err := r.Ledger.Append(ctx, ledger.EventOf(e))
	return err
}

// All lists all versions of all keys, the appliance's own included, by name and version.
func (r *Ring) All() []*Key {
	r.mu.RLock()
	all := slices.Collect(maps.Values(r.keys))
	r.mu.RUnlock()
	slices.SortFunc(all, inOrder)
	return all
}

// inOrder is by name and version.
func inOrder(x, y *Key) int {
	return cmp.Or(strings.Compare(x.Name, y.Name), cmp.Compare(x.Version, y.Version))
}

// Versions returns all versions of a key in order, or manage.ErrNotFound.
func (r *Ring) Versions(name string) ([]*Key, error) {
	var all []*Key
	r.mu.RLock()
	for ref, k := range r.keys {
		if ref.Name == name {
			all = append(all, k)
		}
	}
	r.mu.RUnlock()
	if len(all) == 0 {
		return nil, fmt.Errorf("key %q: %w", ijson.Clip(name), manage.ErrNotFound)
	}
	slices.SortFunc(all, inOrder)
	return all, nil
}

// Version returns one version, or nil.
func (r *Ring) Version(name string, version uint32) *Key {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.keys[keystore.Ref{Name: name, Version: version}]
}

// Next returns SHA-256 of the public key of a version's successor, where that has been made.
func (r *Ring) Next(k *Key) (digest [32]byte, ok bool) {
	if next := r.Version(k.Name, k.Version+1); next != nil {
		return next.digest(), true
	}
	return digest, false
}

// Active returns the active version of a key, one of the appliance's own included.
func (r *Ring) Active(name string) (*Key, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if k := r.active[name]; k != nil {
		return k, nil
	}
	return nil, fmt.Errorf("an active version of the key %q: %w", ijson.Clip(name), manage.ErrNotFound)
}

// Noise returns the key that new clients are to be told.
func (r *Ring) Noise() (*Key, error) { return r.Active(NoiseName) }

// LogKey returns the key that signs the audit log's checkpoints.
func (r *Ring) LogKey() (*Key, error) { return r.Active(LogName) }

// Answering are the Noise keys that answer handshakes: the active one first, then the announced one and
// the one before.
func (r *Ring) Answering() (keys []*Key) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, k := range r.keys {
		if k.Name == NoiseName && (k.State.accepted() || k.State == Pending && k.Announced()) {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, func(x, y *Key) int {
		if (x.State == Active) != (y.State == Active) {
			return map[bool]int{true: -1, false: 1}[x.State == Active]
		}
		return cmp.Compare(y.Version, x.Version)
	})
	return keys
}

// Signing returns the active version of a key that peers may ask signatures of, or ErrUnknown or
// ErrNotActive.
func (r *Ring) Signing(name string) (*Key, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if k := r.active[name]; k != nil && k.Signs() {
		return k, nil
	}
	for ref, k := range r.keys {
		if ref.Name == name && k.Signs() {
			return nil, fmt.Errorf("%w: no version of %q signs now", ErrNotActive, ijson.Clip(name))
		}
	}
	return nil, fmt.Errorf("%w: there is no signing key %q", ErrUnknown, ijson.Clip(name))
}

// Admitted returns a version that an earlier admission names. Of an archived version, signatures of
// that time can still be had.
func (r *Ring) Admitted(name string, version uint32) (*Key, error) {
	k := r.Version(name, version)
	if k == nil || k.State == Compromised || k.State == Destroyed {
		return nil, fmt.Errorf("%w: version %d of %q is out of use", ErrNotActive, version, ijson.Clip(name))
	}
	return k, nil
}

// MayUse is asked inside an admission: whether the version may sign at this moment, whatever it was
// when the request came. A version that has just been followed may finish what it has begun.
func (r *Ring) MayUse(k *Key) error {
	r.mu.RLock()
	defer r.mu.RUnlock()
	now := r.keys[k.Ref()]
	switch {
	case now == nil || !now.State.accepted():
		return fmt.Errorf("%w: version %d of %q is out of use", ErrNotActive, k.Version, k.Name)
	case r.settings[k.Name].Presence > 0 && !time.Now().Before(r.confirmed[k.Name]):
		return fmt.Errorf("%w: an operator must confirm that %q may sign", ErrNotConfirmed, k.Name)
	}
	return nil
}

// CheckSigner refuses a public key that is known to be compromised, and holds it against the key that
// a request names; nil: none.
func (r *Ring) CheckSigner(name *string, publicKey [32]byte) error {
	if name != nil {
		if _, err := r.Signing(*name); err != nil && !errors.Is(err, ErrNotActive) {
			return err
		}
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	known := false
	for _, ref := range r.byPublic[publicKey] {
		switch k := r.keys[ref]; {
		case k.Compromised:
			return fmt.Errorf("%w: the public key is that of a compromised version of %q", transcript.ErrWrongSigner, ref.Name)
		case name != nil && ref.Name == *name:
			known = known || k.State.accepted()
		}
	}
	if name != nil && !known {
		return fmt.Errorf("%w: the public key is no version of %q that is in use", transcript.ErrWrongSigner, ijson.Clip(*name))
	}
	return nil
}

// Problems names the rotations that are not done, and the keys that are missing on their tokens.
func (r *Ring) Problems() (all []string) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for name, try := range r.retries {
		all = append(all, fmt.Sprintf("the rotation of %s is not done: %v", name, try.cause))
	}
	for _, what := range r.lost {
		all = append(all, what)
	}
	return all
}

// Stop waits until no act on keys is under way, and lets no other one begin.
func (r *Ring) Stop(ctx context.Context) error { return r.changing.Acquire(ctx) }
