package appliance

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"countersign/audit"
	"countersign/internal/eddsa"
	"countersign/internal/ijson"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/limit"
	"countersign/transcript"
	"countersign/wire"
)

// State is where a version of a key is in its life. What each may still do is in mayUse and checkSigner.
type State string

const (
	// making: written down, being made. After a crash nothing of it is in use, and it is cleared away.
	making State = "making"
	// Pending: made and proven, and the next of its line. It is announced when it has a time from which it will be active.
	Pending State = "pending"
	// Active: the version that signs. A line has one at the most.
	Active State = "active"
	// VerifyOnly: it has been followed; for its grace time what it has signed is good.
	VerifyOnly State = "verify-only"
	// Archived: out of use, and still there.
	Archived State = "archived"
	// Compromised: somebody else may have it. Nothing that it has signed is believed any more.
	Compromised State = "compromised"
	// Destroyed: the private key is gone.
	Destroyed State = "destroyed"
)

// outOfUse says that the private key of such a version is not used any more.
func (s State) outOfUse() bool { return s == Archived || s == Compromised || s == Destroyed }

// The appliance's own lines. Peers can't use them.
const (
	// NoiseName is the line whose versions answer handshakes.
	NoiseName = "noise"
	// LogName is the line whose active version signs the checkpoints of the audit log, and what the appliance itself says.
	LogName = "audit-log"
	// AdminName and CAName have the keys of the admin API's certificate and of who issues it.
	AdminName = "admin-tls"
	CAName    = "admin-ca"
)

// own says that a line is the appliance's own.
func own(name string) bool {
	return slices.Contains([]string{NoiseName, LogName, AdminName, CAName}, name)
}

// signs says that a line is for peers' signatures. Each of its versions has a successor, made before it comes into use, whose
// public key's digest is written down and given out: a thief with the version's private key can't name another successor.
func signs(name string, alg keystore.Algorithm) bool { return alg == keystore.Ed25519 && !own(name) }

// keyRecord is the ledger's record of a key, under "name/version".
type keyRecord struct {
	Token      string              `json:"token"`
	Algorithm  keystore.Algorithm  `json:"algorithm"`
	PublicKey  string              `json:"public_key,omitempty"` // hex; none while it is being made, as the two below
	Custody    keystore.Custody    `json:"custody,omitempty"`
	Provenance keystore.Provenance `json:"provenance"` // as it was when the key was made: imported stays imported
	State      State               `json:"state"`
	Created    int64               `json:"created"`             // Unix seconds, as the two below
	Activates  int64               `json:"activates,omitempty"` // when it becomes active or has; 0: not announced
	Retires    int64               `json:"retires,omitempty"`   // of what is verify-only: when it is archived at the latest
	Tag        keystore.Tag        `json:"tag"`                 // of the creation
	// Compromised stays, whatever becomes of the version after that: its private key may be somewhere else for ever.
	Compromised bool `json:"compromised,omitempty"`
	// Succession is the step of the line to this version, Authorization what lets a Noise key speak for the identity.
	Succession    *wire.Succession    `json:"succession,omitempty"`
	Authorization *wire.Authorization `json:"authorization,omitempty"`
}

// info describes the key of a record that is not being made.
func (r keyRecord) info(ref keystore.Ref) (keystore.Info, error) {
	public, err := hex.DecodeString(r.PublicKey)
	if err != nil || len(public) == 0 {
		return keystore.Info{}, fmt.Errorf("key %v in the ledger has no public key", ref)
	}
	return keystore.Info{Ref: ref, Algorithm: r.Algorithm, PublicKey: public, Custody: r.Custody, Provenance: r.Provenance, Tag: r.Tag}, nil
}

// made completes a record with what the device says of the key.
func (r keyRecord) made(info keystore.Info) keyRecord {
	r.PublicKey, r.Custody, r.Provenance = hex.EncodeToString(info.PublicKey), info.Custody, info.Provenance
	return r
}

func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic("appliance: a record that is not JSON: " + err.Error())
	}
	return b
}

func decodeKey(name string, value []byte) (ref keystore.Ref, r keyRecord, err error) {
	if err := json.Unmarshal(value, &r); err != nil {
		return ref, r, fmt.Errorf("key %q in the ledger: %w", name, err)
	}
	ref, err = keystore.ParseRef(name)
	return ref, r, err
}

// Key is one version of a key as ledger and keystore agree on it. It does not change: another state is another Key.
type Key struct {
	keystore.Key
	Name    string
	Version uint32
	Token   string // the name of the one that it is on
	State   State
	Created time.Time
	// Activates is when it becomes active, or has; zero where it is pending and not announced. Retires is when one that is
	// verify-only is archived at the latest.
	Activates, Retires time.Time
	Compromised        bool // that it was found to be, whatever its state is now
	Succession         *wire.Succession
	Authorization      *wire.Authorization

	public *eddsa.PublicKey // of an Ed25519 key
	turns  *limit.Fair      // of its token
	life   *life
}

// life is what all Keys of one version have in common.
type life struct {
	uses atomic.Uint64 // of the private key
	over atomic.Bool   // the private key is not used any more
}

// announced says that peers may know of it.
func (k *Key) announced() bool { return k.State != Pending || !k.Activates.IsZero() }

// Uses says how many signatures it has made.
func (k *Key) Uses() uint64 { return k.life.uses.Load() }

// inUse refuses what a version is asked for that is out of use by now, whatever it was when the request chose it.
func (k *Key) inUse() error {
	if k.life.over.Load() {
		return fmt.Errorf("%w: version %d of %q is out of use", errKeyNotActive, k.Version, k.Name)
	}
	return nil
}

// digest is what the version before commits to.
func (k *Key) digest() [32]byte { return sha256.Sum256(k.Info().PublicKey) }

// verify judges a signature by the rules that a stranger will judge by.
func (k *Key) verify(message, signature []byte) error {
	if k.public == nil {
		return fmt.Errorf("%v is not an Ed25519 key", k.Info().Ref)
	}
	return k.public.Verify(message, signature)
}

// keyRecords reads the ledger's keys in a state that wanted accepts.
func (a *Appliance) keyRecords(wanted func(State) bool) (map[keystore.Ref]keyRecord, error) {
	records := map[keystore.Ref]keyRecord{}
	err := a.ledger.All(ledger.Keys, func(name string, value []byte) error {
		ref, r, err := decodeKey(name, value)
		if wanted(r.State) {
			records[ref] = r
		}
		return err
	})
	return records, err
}

func (a *Appliance) loadKeys(ctx context.Context) error {
	records, err := a.keyRecords(func(s State) bool { return s != making })
	if err != nil {
		return err
	}
	refs := slices.SortedFunc(maps.Keys(records), func(x, y keystore.Ref) int { return strings.Compare(x.String(), y.String()) })
	for _, ref := range refs {
		if a.active[ref.Name] != nil && records[ref].State == Active {
			return fmt.Errorf("the ledger has two active versions of key %q: restore it from a backup", ref.Name)
		}
		k, err := a.loadKey(ctx, ref, records[ref])
		if err != nil {
			return err
		}
		a.mu.Lock()
		a.put(ref, records[ref], k)
		a.mu.Unlock()
	}
	return a.loadUses()
}

// loadKey holds a key against its token. An active version that is missing is an error: it is the wrong token, or a loss that must not go
// unseen. One that is pending or verify-only signs nothing now, and must not keep all the others from it: Health says that it is missing,
// and it can't become active: see prove.
func (a *Appliance) loadKey(ctx context.Context, ref keystore.Ref, r keyRecord) (keystore.Key, error) {
	info, err := r.info(ref)
	if err != nil {
		return nil, err
	}
	store, err := a.token(r.Token)
	if err != nil && r.State.outOfUse() {
		return gone{info}, nil // its token may be gone with it
	} else if err != nil {
		return nil, fmt.Errorf("key %v: %w", ref, err)
	}
	if r.State == Destroyed {
		return store.Bind(info), nil
	}
	there, err := store.Key(ctx, ref)
	switch {
	case errors.Is(err, keystore.ErrUnavailable) && (ref.Name != NoiseName || r.State != Active), errors.Is(err, keystore.ErrSealed):
		a.log.Warn("a key is not held against its token, which does not give it out now", "key", ref.String(), "token", r.Token, "err", err)
		return store.Bind(info), nil
	case errors.Is(err, keystore.ErrNotFound) && r.State.outOfUse():
		a.log.Warn("a key that is out of use is not on its token any more", "key", ref.String(), "token", r.Token)
		return store.Bind(info), nil
	case errors.Is(err, keystore.ErrNotFound) && r.State != Active:
		a.log.Error("a key is not on its token", "key", ref.String(), "state", string(r.State), "token", r.Token)
		a.mu.Lock()
		defer a.mu.Unlock()
		a.lost[ref] = fmt.Sprintf("key %v, which is %s, is not on token %s: restore the token", ref, r.State, r.Token)
		return store.Bind(info), nil
	case errors.Is(err, keystore.ErrNotFound):
		return nil, fmt.Errorf("the ledger has key %v and the token does not: is it the right token? %w", ref, err)
	case err != nil:
		return nil, err
	}
	if got := there.Info(); !bytes.Equal(got.PublicKey, info.PublicKey) || got.Algorithm != info.Algorithm || got.Tag != info.Tag {
		return nil, fmt.Errorf("key %v on the token is %s %x, the ledger has %s %x: is it the right token?", ref, got.Algorithm, got.PublicKey, info.Algorithm, info.PublicKey)
	}
	return store.Bind(info), nil
}

// gone stands for a key whose token the configuration does not have.
type gone struct{ info keystore.Info }

func (g gone) Info() keystore.Info { return g.info }

func (g gone) Sign(context.Context, []byte, keystore.Judge) ([]byte, error) {
	return nil, fmt.Errorf("%v: %w", g.info.Ref, keystore.ErrNotFound)
}

func (g gone) Exchange(context.Context, [32]byte) (shared [32]byte, err error) {
	return shared, fmt.Errorf("%v: %w", g.info.Ref, keystore.ErrNotFound)
}

// put makes memory say what a record says. The caller holds mu.
func (a *Appliance) put(ref keystore.Ref, r keyRecord, k keystore.Key) {
	n := &Key{Key: k, Name: ref.Name, Version: ref.Version, Token: r.Token, State: r.State, Created: time.Unix(r.Created, 0),
		Compromised: r.Compromised, Succession: r.Succession, Authorization: r.Authorization, turns: a.turns[r.Token], life: new(life)}
	if r.Activates != 0 {
		n.Activates = time.Unix(r.Activates, 0)
	}
	if r.Retires != 0 {
		n.Retires = time.Unix(r.Retires, 0)
	}
	if r.Algorithm == keystore.Ed25519 {
		n.public, _ = eddsa.ParsePublicKey(k.Info().PublicKey) // one that is unusable verifies nothing
	}
	if before := a.keys[ref]; before != nil {
		n.life = before.life
	} else if n.public != nil {
		public := [32]byte(k.Info().PublicKey)
		a.byPublic[public] = append(a.byPublic[public], ref) // one that was imported twice has two names
	}
	if n.turns == nil { // its token is gone
		n.turns = limit.NewFair(1)
	}
	n.life.over.Store(n.State.outOfUse())
	a.keys[ref] = n
	a.news = nil
	if n.State == Active {
		a.active[n.Name] = n
	} else if was := a.active[n.Name]; was != nil && was.Version == n.Version {
		delete(a.active, n.Name)
	}
}

// step changes one version, in a transaction with others.
type step struct {
	ref    keystore.Ref
	key    keystore.Key // of one that was just made; nil for one that is known
	change func(*keyRecord)
}

// change carries out steps in one transaction with their events. Memory changes when that is on disk, before anything else is decided: an
// admission that comes after the events is by the new states, and what could not be written did not happen.
func (a *Appliance) change(ctx context.Context, steps []step, events ...audit.Event) error {
	return a.ledger.Update(ctx, func(tx *ledger.Tx) error { return a.changeIn(tx, steps, events...) })
}

func (a *Appliance) changeIn(tx *ledger.Tx, steps []step, events ...audit.Event) error {
	var records []keyRecord
	var keys []keystore.Key
	for _, s := range steps {
		_, r, err := decodeKey(s.ref.String(), tx.Get(ledger.Keys, s.ref.String()))
		if err != nil {
			return err
		}
		s.change(&r)
		if err := tx.Put(ledger.Keys, s.ref.String(), encode(r)); err != nil {
			return err
		}
		k := s.key
		if known := a.version(s.ref.Name, s.ref.Version); k == nil && known != nil {
			k = known.Key
		} else if k == nil {
			return fmt.Errorf("key %v: %w", s.ref, ErrNotFound)
		}
		records, keys = append(records, r), append(keys, k)
	}
	tx.OnCommit(func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		for i, s := range steps {
			a.put(s.ref, records[i], keys[i])
		}
	})
	return appendAll(tx, events...)
}

func appendAll(tx *ledger.Tx, events ...audit.Event) error {
	for _, e := range events {
		if err := tx.Append(entry(e)); err != nil {
			return err
		}
	}
	return nil
}

// token returns the token of a name; without one, the only one.
func (a *Appliance) token(name string) (keystore.Store, error) {
	if store := a.tokens[name]; store != nil {
		return store, nil
	}
	return nil, fmt.Errorf("token %q: %w: the configuration has %s", ijson.Clip(name), ErrNotFound, strings.Join(a.tokenNames(), ", "))
}

func (a *Appliance) tokenNames() []string { return slices.Sorted(maps.Keys(a.tokens)) }

// Keys lists all versions of all keys, the appliance's own included, by name and version.
func (a *Appliance) Keys() []*Key {
	a.mu.RLock()
	all := slices.Collect(maps.Values(a.keys))
	a.mu.RUnlock()
	slices.SortFunc(all, inOrder)
	return all
}

// inOrder is by name and version.
func inOrder(x, y *Key) int {
	return cmp.Or(strings.Compare(x.Name, y.Name), cmp.Compare(x.Version, y.Version))
}

// Key returns all versions of a key, or ErrNotFound.
func (a *Appliance) Key(name string) ([]*Key, error) {
	var all []*Key
	a.mu.RLock()
	for ref, k := range a.keys {
		if ref.Name == name {
			all = append(all, k)
		}
	}
	a.mu.RUnlock()
	if len(all) == 0 {
		return nil, fmt.Errorf("key %q: %w", ijson.Clip(name), ErrNotFound)
	}
	slices.SortFunc(all, inOrder)
	return all, nil
}

// version returns one, or nil.
func (a *Appliance) version(name string, version uint32) *Key {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.keys[keystore.Ref{Name: name, Version: version}]
}

// Next returns SHA-256 of the public key of a version's successor, where that has been made.
func (a *Appliance) Next(k *Key) (digest [32]byte, ok bool) {
	if next := a.version(k.Name, k.Version+1); next != nil {
		return next.digest(), true
	}
	return digest, false
}

// ActiveKey returns the active version of a line, one of the appliance's own included.
func (a *Appliance) ActiveKey(name string) (*Key, error) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	if k := a.active[name]; k != nil {
		return k, nil
	}
	return nil, fmt.Errorf("an active version of the key %q: %w", ijson.Clip(name), ErrNotFound)
}

// NoiseKey returns the key that new clients are to be told.
func (a *Appliance) NoiseKey() (*Key, error) { return a.ActiveKey(NoiseName) }

// LogKey returns the key that signs the audit log's checkpoints.
func (a *Appliance) LogKey() (*Key, error) { return a.ActiveKey(LogName) }

// noiseKeys are those that answer handshakes: the active one first, then the one that was announced and the one before.
func (a *Appliance) noiseKeys() (keys []*Key) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	for _, k := range a.keys {
		if k.Name == NoiseName && (k.State == Active || k.State == VerifyOnly || k.State == Pending && k.announced()) {
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

// signingKey returns the active version of a key that peers may ask signatures of.
func (a *Appliance) signingKey(name string) (*Key, error) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	if k := a.active[name]; k != nil && signs(name, k.Info().Algorithm) {
		return k, nil
	}
	for ref, k := range a.keys {
		if ref.Name == name && signs(name, k.Info().Algorithm) {
			return nil, fmt.Errorf("%w: no version of %q signs now", errKeyNotActive, ijson.Clip(name))
		}
	}
	return nil, fmt.Errorf("%w: there is no signing key %q", errUnknownKey, ijson.Clip(name))
}

// keyVersion returns a version of a key that an earlier admission names. Of one that is archived, what it has signed then can still be had.
func (a *Appliance) keyVersion(name string, version uint32) (*Key, error) {
	k := a.version(name, version)
	if k == nil || k.State == Compromised || k.State == Destroyed {
		return nil, fmt.Errorf("%w: version %d of %q is out of use", errKeyNotActive, version, ijson.Clip(name))
	}
	return k, nil
}

// mayUse is asked inside an admission: whether the version may sign at this moment, whatever it was when the request came. One that has
// just been followed may finish what it has begun.
func (a *Appliance) mayUse(k *Key) error {
	a.mu.RLock()
	defer a.mu.RUnlock()
	now := a.keys[k.Info().Ref]
	switch {
	case now == nil || now.State != Active && now.State != VerifyOnly:
		return fmt.Errorf("%w: version %d of %q is out of use", errKeyNotActive, k.Version, k.Name)
	case a.lines[k.Name].Presence > 0 && !time.Now().Before(a.confirmed[k.Name]):
		return fmt.Errorf("%w: an operator must confirm that %q may sign", errNotConfirmed, k.Name)
	}
	return nil
}

// checkSigner refuses a public key that is known to be compromised, and holds it against the key that the request names.
func (a *Appliance) checkSigner(name *string, publicKey [32]byte) error {
	if name != nil {
		if _, err := a.signingKey(*name); err != nil && !errors.Is(err, errKeyNotActive) {
			return err
		}
	}
	a.mu.RLock()
	defer a.mu.RUnlock()
	known := false
	for _, ref := range a.byPublic[publicKey] {
		switch k := a.keys[ref]; {
		case k.Compromised:
			return fmt.Errorf("%w: the public key is that of a compromised version of %q", transcript.ErrWrongSigner, ref.Name)
		case name != nil && ref.Name == *name:
			known = known || k.State == Active || k.State == VerifyOnly
		}
	}
	if name != nil && !known {
		return fmt.Errorf("%w: the public key is no version of %q that is in use", transcript.ErrWrongSigner, ijson.Clip(*name))
	}
	return nil
}
