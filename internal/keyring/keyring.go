// Package keyring keeps the keys: their versions and states, the right to use a version, creation,
// rotation and compromise, and the use of private keys that live in tokens. The ledger has the
// records, and memory follows the ledger. Begin reading at Transitions in states.go, then at
// rotate.go.
package keyring

import (
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
	"countersign/internal/cause"
	"countersign/internal/eddsa"
	"countersign/internal/escrow"
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
	ErrRotated      = errors.New("another version of the key signs")
	ErrNotConfirmed = errors.New("an operator must be there")
)

// The appliance's own keys. Peers can't use them.
const (
	// NoiseName is the key whose versions answer handshakes.
	NoiseName = keystore.NoiseName
	// LogName is the key whose active version signs the checkpoints of the audit log, webhooks and
	// canaries.
	LogName = keystore.LogName
	// AdminName and CAName are the keys of the admin API's certificate and of its issuer.
	AdminName = keystore.AdminName
	CAName    = keystore.CAName
)

// own reports that a key is the appliance's own.
func own(name string) bool {
	return slices.Contains([]string{NoiseName, LogName, AdminName, CAName}, name)
}

// rotates reports that a key can have a second version.
func rotates(name string) bool { return !own(name) || name == NoiseName }

// signs reports that a key makes signatures for peers. Each version of such a key has a successor,
// made before the version comes into use. The digest of the successor's public key is in the log
// and given out: a thief with the version's private key can't name another successor.
func signs(name string, alg keystore.Algorithm) bool { return alg == keystore.Ed25519 && !own(name) }

// Public reports that rotations of the key are announced: of the Noise key, and of signing keys.
func (k *Key) Public() bool { return k.Name == NoiseName || k.Signs() }

// Signs reports that peers may ask for signatures of the key.
func (k *Key) Signs() bool { return signs(k.Name, k.Info().Algorithm) }

// Config has the parts of the appliance that a ring uses.
type Config struct {
	Ledger *ledger.Ledger
	Tokens manage.Tokens
	Calls  map[string]int // at most so many calls of a token at once, by the token's name
	Gate   *gate.Gate     // a blocked gate stops creations and rotations
	Peers  *peers.Registry
	Log    *slog.Logger

	SigningToken   string        // the token of a new signing key without a token's name; "": the only token
	Identity       string        // the signing key that authorises the Noise key; "": none
	MaxLifetime    time.Duration // of a document; the default of a key's grace time
	RequestTimeout time.Duration // for one use of a device
}

// Ring is safe for concurrent use.
type Ring struct {
	Config
	turns map[string]*limit.Fair // by token

	// changing serializes the acts on keys: an act holds the lock to its end, however long the
	// device takes.
	changing manage.Lock

	// mu guards all fields below. No holder waits for a device or the disk: admissions read the
	// state of a key under mu, and the ledger's writer takes mu to let memory follow.
	mu          sync.RWMutex
	keys        map[keystore.Ref]*Key     // all versions, apart from those in the state making
	byPublic    map[string][]keystore.Ref // versions of any state, by public key: one each, see checkNew
	active      map[string]*Key           // active versions, by name
	settings    map[string]Settings       // by name
	written     usesRecord                // the last record of the uses
	confirmed   map[string]time.Time      // ends of the operators' confirmations, by name
	credentials uint64                    // number of changes of operators' credentials
	retries     map[string]retry          // failed rotations, by name
	failed      uint64                    // attempts at rotations that have failed
	requests    map[string]Request        // rotations that are not announced yet, by name
	holders     escrow.Set                // the present recovery holders
	lost        map[keystore.Ref]error    // faults of versions that are missing on their token, or different
	uncompared  map[part]error            // keys not compared with their tokens yet, see compare.go
	announced   *announced                // cache; nil: empty
	watchers    []func()                  // called after a change that peers may have to be told
}

// Open reads the keys, and compares them with the tokens that answer. Keep compares the keys of a
// token that comes later. A key without its token in the configuration is an error, unless the key
// is out of use. Open changes nothing.
func Open(ctx context.Context, c Config) (*Ring, error) {
	r := &Ring{
		Config: c, turns: map[string]*limit.Fair{}, changing: manage.NewLock(),
		keys: map[keystore.Ref]*Key{}, byPublic: map[string][]keystore.Ref{}, active: map[string]*Key{},
		settings: map[string]Settings{}, confirmed: map[string]time.Time{},
		retries: map[string]retry{}, requests: map[string]Request{},
		lost: map[keystore.Ref]error{}, uncompared: map[part]error{},
	}
	for name := range c.Tokens { // limit.Fair bounds no waiting callers: the limits of requests do
		r.turns[name] = limit.NewFair(max(1, c.Calls[name]))
		r.uncompared[part{name, true}] = errNotCompared
		r.uncompared[part{name, false}] = errNotCompared
	}
	if err := c.Ledger.Follow(ctx, &r.mu,
		ledger.Followed{Table: ledger.Lines, Take: r.takeSettings},
		ledger.Followed{Table: ledger.Keys, Take: r.takeKey},
		ledger.Followed{Table: ledger.Meta, Take: r.takeMeta}); err != nil {
		return nil, err
	}
	for _, k := range r.All() {
		if active, _ := r.Active(k.Name); k.State == Active && active != k {
			return nil, fmt.Errorf("the ledger has two active versions of key %q: restore it from a backup", k.Name)
		}
		// The token of a key that is out of use may be gone with the key, and that of a recovery
		// successor lie in a safe.
		if _, err := r.Tokens.Get(k.Token); err != nil && !k.State.outOfUse() && !k.forRecovery() {
			return nil, fmt.Errorf("key %v: %w", k.Ref(), err)
		}
	}
	r.compareAll(ctx)
	return r, r.countUses()
}

// takeKey updates memory from the record of a version. mu is held.
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
		Change: rec.Change, By: rec.By, UsesBefore: rec.UsesBefore, Recovery: rec.Recovery, Envelope: rec.Envelope,
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
	if rec.CalledOff != 0 {
		k.CalledOff = time.Unix(rec.CalledOff, 0)
	}
	if rec.Retires != 0 {
		k.Retires = time.Unix(rec.Retires, 0)
	}
	if rec.Algorithm == keystore.Ed25519 {
		k.public, _ = eddsa.ParsePublicKey(info.PublicKey) // an unusable key verifies nothing
	}
	if before := r.keys[ref]; before != nil {
		k.usage = before.usage
		if k.State != before.State && k.State != Active && k.State != Pending {
			delete(r.lost, ref) // nobody asks for signatures of the version any more
		}
	} else {
		r.byPublic[string(info.PublicKey)] = append(r.byPublic[string(info.PublicKey)], ref)
	}
	r.keys[ref], r.announced = k, nil
	r.retire(info.PublicKey)
	if k.State == Active {
		r.active[k.Name] = k
	} else {
		r.deactivate(ref)
	}
	return nil
}

// retire ends the use of the versions with a public key that are out of use, and of all of them
// after a compromise of one. A ledger of an earlier version can have a public key under two names.
// mu is held.
func (r *Ring) retire(publicKey []byte) {
	compromised := r.compromised(publicKey) != nil
	for _, ref := range r.byPublic[string(publicKey)] {
		k := r.keys[ref]
		k.usage.retired.Store(compromised || k.State.outOfUse())
	}
}

// compromised returns a compromised version with a public key, or nil. mu is held.
func (r *Ring) compromised(publicKey []byte) *Key {
	for _, ref := range r.byPublic[string(publicKey)] {
		if k := r.keys[ref]; k.Compromised {
			return k
		}
	}
	return nil
}

// deactivate notes that a version is not the active version. mu is held.
func (r *Ring) deactivate(ref keystore.Ref) {
	if was := r.active[ref.Name]; was != nil && was.Version == ref.Version {
		delete(r.active, ref.Name)
	}
}

// remove removes a version from memory. mu is held.
func (r *Ring) remove(ref keystore.Ref) {
	k := r.keys[ref]
	if k == nil {
		return // the version was in the state making
	}
	delete(r.keys, ref)
	public := string(k.Info().PublicKey)
	r.byPublic[public] = slices.DeleteFunc(r.byPublic[public], func(other keystore.Ref) bool { return other == ref })
	r.announced = nil
	r.deactivate(ref)
}

// edit is a change of one version's record.
type edit struct {
	ref    keystore.Ref
	change func(*record)
}

// change carries out edits in one transaction with their events. Each change of a state must be in
// Transitions, for this actor and with one of these events; otherwise nothing is written. A version
// without a record is absent, and the record of a version that becomes absent is deleted. While the
// gate is blocked, no version comes into use, also if the gate was open when the act began.
func (r *Ring) change(ctx context.Context, who audit.Actor, edits []edit, events ...audit.Event) error {
	return r.Ledger.Update(ctx, func(tx *ledger.Tx) error { return r.changeIn(tx, who, edits, events...) })
}

func (r *Ring) changeIn(tx *ledger.Tx, who audit.Actor, edits []edit, events ...audit.Event) error {
	var types []audit.Type
	for _, e := range events {
		types = append(types, e.Type)
	}
	for _, e := range edits {
		name := e.ref.String()
		var rec record // of an absent version
		if value := tx.Get(ledger.Keys, name); value != nil {
			var err error
			if _, rec, err = decode(name, value); err != nil {
				return err
			}
		}
		from := rec.State
		e.change(&rec)
		if rec.State != from {
			if err := r.Gate.Err(); err != nil && (rec.State == Pending || rec.State == Active) {
				return fmt.Errorf("key %v: %w", e.ref, err)
			}
			if err := transition(from, rec.State, who, types...); err != nil {
				return fmt.Errorf("key %v: %w", e.ref, err)
			}
		}
		if err := rec.write(tx, name); err != nil {
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

// record appends an event to the audit log.
func (r *Ring) record(ctx context.Context, e audit.Event) error {
	_, err := r.Ledger.Append(ctx, ledger.EventOf(e))
	return err
}

// Own reports whether the key is one of the appliance's own: no peer can have a document signed
// with the key.
func (k *Key) Own() bool {
	return slices.Contains([]string{NoiseName, LogName, AdminName, CAName}, k.Name)
}

// All lists all versions of all keys, in the order of names and versions.
func (r *Ring) All() []*Key {
	r.mu.RLock()
	all := slices.Collect(maps.Values(r.keys))
	r.mu.RUnlock()
	slices.SortFunc(all, inOrder)
	return all
}

// inOrder compares names, then versions.
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

// Next returns the digest of a version's successor, if the successor has been made.
func (r *Ring) Next(k *Key) (digest [32]byte, ok bool) {
	if next := r.Version(k.Name, k.Version+1); next != nil {
		return next.digest(), true
	}
	return digest, false
}

// Active returns the active version of a key, or manage.ErrNotFound.
func (r *Ring) Active(name string) (*Key, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if k := r.active[name]; k != nil {
		return k, nil
	}
	return nil, fmt.Errorf("an active version of the key %q: %w", ijson.Clip(name), manage.ErrNotFound)
}

// Noise returns the active version of the Noise key, for new clients.
func (r *Ring) Noise() (*Key, error) { return r.Active(NoiseName) }

// LogKey returns the active version of the audit log's key.
func (r *Ring) LogKey() (*Key, error) { return r.Active(LogName) }

// Answering lists the versions of the Noise key that answer handshakes: the active version first,
// then the pending and the verify-only versions, the newest first. A pending version was announced.
// Also when the announcement was called off, the version answers: a peer that has not heard of this
// may try no other key after the announced time.
func (r *Ring) Answering() (keys []*Key) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, k := range r.keys {
		if k.Name == NoiseName && (k.State.accepted() || k.State == Pending) {
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

// Signing returns the active version of a signing key, or ErrUnknown or ErrNotActive.
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

// Admitted returns a version that an earlier admission names. The earlier signatures of an archived
// version are still given out.
func (r *Ring) Admitted(name string, version uint32) (*Key, error) {
	k := r.Version(name, version)
	if k == nil || k.State == Compromised || k.State == Destroyed {
		return nil, fmt.Errorf("%w: version %d of %q is out of use", ErrNotActive, version, ijson.Clip(name))
	}
	return k, nil
}

// MayUse decides inside an admission whether a version may sign at this moment: the state may have
// changed since the request arrived. A verify-only version may still finish its requests.
func (r *Ring) MayUse(k *Key) error {
	r.mu.RLock()
	defer r.mu.RUnlock()
	now := r.keys[k.Ref()]
	switch {
	case now == nil || !now.State.accepted() || r.compromised(k.Info().PublicKey) != nil:
		return fmt.Errorf("%w: version %d of %q is out of use", ErrNotActive, k.Version, k.Name)
	case r.settings[k.Name].Presence > 0 && !time.Now().Before(r.confirmed[k.Name]):
		return fmt.Errorf("%w: an operator must confirm that %q may sign", ErrNotConfirmed, k.Name)
	}
	return nil
}

// CheckSigner refuses the public key of a compromised version. If the request names a key, the
// public key must be one of the key's active and verify-only versions.
func (r *Ring) CheckSigner(name *string, publicKey [32]byte) error {
	if name != nil {
		if _, err := r.Signing(*name); err != nil && !errors.Is(err, ErrNotActive) {
			return err
		}
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	if k := r.compromised(publicKey[:]); k != nil {
		return fmt.Errorf("%w: the public key is that of a compromised version of %q",
			transcript.ErrWrongSigner, k.Name)
	}
	known := false
	for _, ref := range r.byPublic[string(publicKey[:])] {
		known = known || name != nil && ref.Name == *name && r.keys[ref].State.accepted()
	}
	if name != nil && !known {
		return fmt.Errorf("%w: the public key is no version of %q that is in use",
			transcript.ErrWrongSigner, ijson.Clip(*name))
	}
	return nil
}

// NameOf returns the name of the key with a public key, in a version whose signatures are accepted,
// or "". The name of the request is the result where it is given: see CheckSigner.
func (r *Ring) NameOf(name *string, publicKey [32]byte) string {
	if name != nil {
		return *name
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, ref := range r.byPublic[string(publicKey[:])] {
		if r.keys[ref].State.accepted() {
			return ref.Name
		}
	}
	return ""
}

// overdueAfter is the time after which an announced version that is not active is a cause. The
// daemon looks every few seconds, and tells failures by themselves.
const overdueAfter = time.Minute

// Causes returns the failed rotations, the versions that are missing on their tokens, and the
// versions with the public key of another version.
func (r *Ring) Causes() (all []cause.Cause) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for name, try := range r.retries {
		all = append(all, cause.Rotation.Of(name, "%v", try.cause))
	}
	for name, q := range r.requests {
		if q.Ended != "" {
			all = append(all, cause.RotationGivenUp.Of(name, "%s has asked for version changes at %s, in vain: %s",
				q.By.Name, q.Activates.UTC().Format(time.RFC3339), q.Ended))
		}
	}
	now := time.Now()
	for ref, k := range r.keys {
		if _, failed := r.retries[ref.Name]; k.State == Pending && k.Announced() && !failed &&
			now.Sub(k.Activates) > overdueAfter {
			all = append(all, cause.RotationOverdue.Of(ref.Name, "version %d was announced for %s, and is not active",
				ref.Version, k.Activates.UTC().Format(time.RFC3339)))
		}
	}
	for ref, fault := range r.lost {
		all = append(all, cause.KeyMissing.Of(ref.String(), "%v", fault))
	}
	for public, refs := range r.byPublic {
		for _, ref := range refs {
			i := slices.IndexFunc(refs, func(other keystore.Ref) bool { return other != ref })
			if i < 0 || r.keys[ref].State.outOfUse() {
				continue
			}
			text := fmt.Sprintf("key %v has the public key of %v too", ref, refs[i])
			if k := r.compromised([]byte(public)); k != nil {
				text = fmt.Sprintf("key %v has the public key of %v, which is compromised, and signs nothing",
					ref, k.Ref())
			}
			all = append(all, cause.KeyTwice.Of(ref.String(), "%s", text))
		}
	}
	return all
}

// Stop waits for the end of the act on keys in progress, and lets no other act begin.
func (r *Ring) Stop(ctx context.Context) error { return r.changing.Acquire(ctx) }
