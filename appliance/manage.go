package appliance

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"countersign/audit"
	"countersign/eddsa"
	"countersign/ijson"
	"countersign/keystore"
	"countersign/ledger"
)

// State is where a version of a key is in its life.
type State string

const (
	// Pending: written down, being made. After a crash nothing of it is in use, and it is cleared away.
	Pending State = "pending"
	// Active: the version that signs.
	Active State = "active"
)

// NoiseName is the key line whose active version answers handshakes. It is not a signing key.
const NoiseName = "noise"

// LogName is the key line whose active version signs the checkpoints of the audit log. Peers can't use it.
const LogName = "audit-log"

// What a management act is refused for.
var (
	ErrExists   = errors.New("it exists already")
	ErrNotFound = errors.New("it does not exist")
	ErrInvalid  = errors.New("it is not valid")
)

// keyRecord is the ledger's record of a key, under "name/version".
type keyRecord struct {
	Token      string              `json:"token"`
	Algorithm  keystore.Algorithm  `json:"algorithm"`
	PublicKey  string              `json:"public_key,omitempty"` // hex; none while pending, as the two below
	Custody    keystore.Custody    `json:"custody,omitempty"`
	Provenance keystore.Provenance `json:"provenance"` // as it was when the key was made: imported stays imported
	State      State               `json:"state"`
	Created    int64               `json:"created"` // Unix seconds
	Tag        keystore.Tag        `json:"tag"`     // of the creation
}

// info describes the key of a record that is not pending.
func (r keyRecord) info(ref keystore.Ref) (keystore.Info, error) {
	public, err := hex.DecodeString(r.PublicKey)
	if err != nil || len(public) == 0 {
		return keystore.Info{}, fmt.Errorf("key %v in the ledger has no public key", ref)
	}
	return keystore.Info{Ref: ref, Algorithm: r.Algorithm, PublicKey: public, Custody: r.Custody, Provenance: r.Provenance, Tag: r.Tag}, nil
}

func encode(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic("appliance: a record that is not JSON: " + err.Error())
	}
	return b
}

// keyRecords reads the ledger's keys in a state that wanted accepts.
func (a *Appliance) keyRecords(wanted func(State) bool) (map[keystore.Ref]keyRecord, error) {
	records := map[keystore.Ref]keyRecord{}
	err := a.ledger.All(ledger.Keys, func(name string, value []byte) error {
		var r keyRecord
		if err := json.Unmarshal(value, &r); err != nil {
			return fmt.Errorf("key %q in the ledger: %w", name, err)
		}
		ref, err := keystore.ParseRef(name)
		if wanted(r.State) {
			records[ref] = r
		}
		return err
	})
	return records, err
}

func (a *Appliance) loadKeys(ctx context.Context) error {
	records, err := a.keyRecords(func(s State) bool { return s != Pending })
	if err != nil {
		return err
	}
	refs := slices.SortedFunc(maps.Keys(records), func(x, y keystore.Ref) int { return strings.Compare(x.String(), y.String()) })
	for _, ref := range refs {
		r := records[ref]
		k, err := a.loadKey(ctx, ref, r)
		if err != nil {
			return err
		}
		a.install(&Key{Key: k, Name: ref.Name, Version: ref.Version, Token: r.Token, State: r.State, Created: time.Unix(r.Created, 0)})
	}
	return nil
}

// loadKey holds a key against its token.
func (a *Appliance) loadKey(ctx context.Context, ref keystore.Ref, r keyRecord) (keystore.Key, error) {
	store, err := a.token(r.Token)
	if err != nil {
		return nil, fmt.Errorf("key %v: %w", ref, err)
	}
	info, err := r.info(ref)
	if err != nil {
		return nil, err
	}
	there, err := store.Key(ctx, ref)
	switch {
	case errors.Is(err, keystore.ErrUnavailable) && ref.Name != NoiseName, errors.Is(err, keystore.ErrSealed):
		a.log.Warn("a key is not held against its token, which does not give it out now", "key", ref.String(), "token", r.Token, "err", err)
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

// token returns the token of a name; without one, the only one.
func (a *Appliance) token(name string) (keystore.Store, error) {
	if store := a.tokens[name]; store != nil {
		return store, nil
	}
	return nil, fmt.Errorf("token %q: %w: the configuration has %s", ijson.Clip(name), ErrNotFound, strings.Join(a.tokenNames(), ", "))
}

func (a *Appliance) tokenNames() []string { return slices.Sorted(maps.Keys(a.tokens)) }

// Recover clears away what creations that were cut off have left behind. Those keys have never been in use, and what
// carries another tag than theirs is not touched.
func (a *Appliance) Recover(ctx context.Context) error {
	pending, err := a.keyRecords(func(s State) bool { return s == Pending })
	if err != nil {
		return err
	}
	for ref, r := range pending {
		err := a.clearAway(ctx, ref, r, "interrupted")
		if errors.Is(err, keystore.ErrUnavailable) { // it can wait: who makes the key again clears it away first
			a.log.Warn("an unfinished key is not cleared away, since its token does not answer", "key", ref.String(), "err", err)
		} else if err != nil {
			return err
		}
	}
	return nil
}

func (a *Appliance) install(k *Key) {
	if k.Info().Algorithm == keystore.Ed25519 {
		k.public, _ = eddsa.ParsePublicKey(k.Info().PublicKey) // one that is unusable verifies nothing
	}
	k.turns = a.turns[k.Token]
	a.mu.Lock()
	defer a.mu.Unlock()
	a.keys[k.Info().Ref] = k
	if k.State == Active {
		a.active[k.Name] = k
	}
}

// clearAway removes what a creation that did not end well has left behind.
func (a *Appliance) clearAway(ctx context.Context, ref keystore.Ref, r keyRecord, outcome string) error {
	store, err := a.token(r.Token)
	if err == nil {
		err = store.Destroy(ctx, ref, r.Tag)
	}
	if err != nil {
		return fmt.Errorf("clear away the unfinished key %v: %w", ref, err)
	}
	return a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		if err := tx.Delete(ledger.Keys, ref.String()); err != nil {
			return err
		}
		return tx.Append(entry(audit.Event{
			Type: audit.KeyCreationFailed, Actor: audit.Daemon(), Action: "key create", Resource: ref.String(), Outcome: outcome,
		}))
	})
}

// NewKey says what key to make.
type NewKey struct {
	Name      string
	Algorithm keystore.Algorithm // default: Ed25519
	Token     string             // where; may be left out where there is only one
	Seed      string             // for an import: the path of the file with the seed, which the key worker reads
}

// CreateKey makes or imports version 1 of a signing key. When ctx ends first, the creation goes on: Keys has the key when
// it has come into use, and the audit log how it ended.
func (a *Appliance) CreateKey(ctx context.Context, who audit.Actor, n NewKey) (*Key, error) {
	if n.Algorithm == "" {
		n.Algorithm = keystore.Ed25519
	}
	switch {
	case n.Name == NoiseName || n.Name == LogName:
		return nil, fmt.Errorf("key %q: %w: the name belongs to the appliance's own key", n.Name, ErrInvalid)
	case n.Algorithm != keystore.Ed25519 && n.Algorithm != keystore.P256:
		return nil, fmt.Errorf("key %q: %w: a signing key is %s or %s", ijson.Clip(n.Name), ErrInvalid, keystore.Ed25519, keystore.P256)
	case n.Seed != "" && (n.Algorithm != keystore.Ed25519 || !filepath.IsAbs(n.Seed)):
		return nil, fmt.Errorf("key %q: %w: what can be imported is an ed25519 seed, in a file that is named by an absolute path", ijson.Clip(n.Name), ErrInvalid)
	}
	return a.createKey(ctx, who, n)
}

// CreateNoiseKey makes the listener's static key; countersignd init calls it.
func (a *Appliance) CreateNoiseKey(ctx context.Context, who audit.Actor, token string) (*Key, error) {
	return a.createKey(ctx, who, NewKey{Name: NoiseName, Algorithm: keystore.X25519, Token: token})
}

// CreateLogKey makes the key that signs the audit log's checkpoints; countersignd init calls it.
func (a *Appliance) CreateLogKey(ctx context.Context, who audit.Actor, token string) (*Key, error) {
	return a.createKey(ctx, who, NewKey{Name: LogName, Algorithm: keystore.Ed25519, Token: token})
}

func (a *Appliance) createKey(ctx context.Context, who audit.Actor, n NewKey) (*Key, error) {
	if err := keystore.CheckName(n.Name); err != nil {
		return nil, fmt.Errorf("key %q: %w: %w", ijson.Clip(n.Name), ErrInvalid, err)
	}
	if n.Token == "" && len(a.tokens) == 1 {
		n.Token = a.tokenNames()[0]
	} else if n.Token == "" {
		return nil, fmt.Errorf("key %q: %w: say on which token: %s", n.Name, ErrInvalid, strings.Join(a.tokenNames(), ", "))
	}
	var made *Key
	err := a.act(ctx, a.creating, fmt.Sprintf("key %q", n.Name), func(ctx context.Context) (err error) {
		made, err = a.create(ctx, who, keystore.Ref{Name: n.Name, Version: 1}, n)
		return err
	})
	if err != nil {
		return nil, err
	}
	return made, nil
}

// create writes the intent down first; the key comes into use only when it has been proven and written down. A crash in
// between leaves nothing that counts.
func (a *Appliance) create(ctx context.Context, who audit.Actor, ref keystore.Ref, n NewKey) (*Key, error) {
	store, err := a.token(n.Token)
	if err != nil {
		return nil, fmt.Errorf("key %q: %w", ref.Name, err)
	}
	a.mu.RLock()
	_, exists := a.keys[ref]
	a.mu.RUnlock()
	if exists {
		return nil, fmt.Errorf("key %q: %w", ref.Name, ErrExists)
	}
	pending, err := a.keyRecords(func(s State) bool { return s == Pending })
	if err != nil {
		return nil, err
	}
	if r, ok := pending[ref]; ok { // an earlier one could not be cleared away then
		if err := a.clearAway(ctx, ref, r, "failed"); err != nil {
			return nil, fmt.Errorf("key %q: %w", ref.Name, err)
		}
	}
	if _, err := store.Key(ctx, ref); err == nil {
		return nil, fmt.Errorf("key %q: %w on the token, but not in the ledger: does the token belong to another appliance?", ref.Name, ErrExists)
	} else if !errors.Is(err, keystore.ErrNotFound) {
		return nil, fmt.Errorf("key %q: %w", ref.Name, err)
	}
	r := keyRecord{Token: n.Token, Algorithm: n.Algorithm, State: Pending, Created: time.Now().Unix()}
	rand.Read(r.Tag[:])
	if err := a.ledger.Update(ctx, func(tx *ledger.Tx) error { return tx.Put(ledger.Keys, ref.String(), encode(r)) }); err != nil {
		return nil, err
	}
	event, action := audit.KeyCreated, "key create"
	var made keystore.Key
	if n.Seed == "" {
		made, err = store.Generate(ctx, ref, n.Algorithm, r.Tag)
	} else {
		event, action = audit.KeyImported, "key import"
		made, err = store.Import(ctx, ref, n.Seed, r.Tag)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("key %q: %w", ref.Name, err), a.clearAway(ctx, ref, r, "failed"))
	}
	info := made.Info()
	r.State, r.PublicKey, r.Custody, r.Provenance = Active, hex.EncodeToString(info.PublicKey), info.Custody, info.Provenance
	err = a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		if err := tx.Put(ledger.Keys, ref.String(), encode(r)); err != nil {
			return err
		}
		return tx.Append(entry(audit.Event{
			Type: event, Actor: who, Action: action, Resource: ref.String(), Outcome: "ok",
			Metadata: map[string]string{"algorithm": string(r.Algorithm), "public_key": r.PublicKey, "custody": string(r.Custody),
				"provenance": r.Provenance.String(), "token": r.Token},
		}))
	})
	if err != nil {
		return nil, err
	}
	k := &Key{Key: made, Name: ref.Name, Version: ref.Version, Token: r.Token, State: Active, Created: time.Unix(r.Created, 0)}
	a.install(k)
	return k, nil
}

// Tokens says how each token is, by name.
func (a *Appliance) Tokens() map[string]keystore.Status {
	all := map[string]keystore.Status{}
	for name, store := range a.tokens {
		all[name] = store.Status()
	}
	return all
}

// RetryToken lets a token be asked for a login again after its PIN was refused.
func (a *Appliance) RetryToken(ctx context.Context, who audit.Actor, name string) error {
	store, err := a.token(name)
	if err != nil {
		return err
	}
	if err := a.record(ctx, audit.Event{Type: audit.TokenRetried, Actor: who, Action: "token retry", Resource: name, Outcome: "ok"}); err != nil {
		return err
	}
	store.Retry()
	return nil
}

// TokenChanged writes down that a token does not serve any more, or serves again.
func (a *Appliance) TokenChanged(name string, up bool, cause error) {
	e := audit.Event{Type: audit.DeviceRecovered, Actor: audit.Daemon(), Action: "serve", Resource: name, Outcome: "ok"}
	if !up {
		e.Type, e.Outcome = audit.DeviceUnavailable, "unavailable"
		if cause != nil {
			e.Metadata = map[string]string{"cause": cause.Error()}
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), a.limits.RequestTimeout)
	defer cancel()
	if err := a.record(ctx, e); err != nil {
		a.log.Error("the event of a token's change is not written down", "token", name, "up", up, "err", err)
	}
}

// Keys lists all versions of all keys, the listener's Noise key included, by name and version.
func (a *Appliance) Keys() []*Key {
	a.mu.RLock()
	defer a.mu.RUnlock()
	var all []*Key
	for _, k := range a.keys {
		all = append(all, k)
	}
	slices.SortFunc(all, func(x, y *Key) int {
		if x.Name != y.Name {
			return strings.Compare(x.Name, y.Name)
		}
		return int(x.Version) - int(y.Version)
	})
	return all
}

// Key returns all versions of a key, or ErrNotFound.
func (a *Appliance) Key(name string) ([]*Key, error) {
	all := slices.DeleteFunc(a.Keys(), func(k *Key) bool { return k.Name != name })
	if len(all) == 0 {
		return nil, fmt.Errorf("key %q: %w", ijson.Clip(name), ErrNotFound)
	}
	return all, nil
}

// NoiseKey returns the key that the listener answers handshakes with.
func (a *Appliance) NoiseKey() (*Key, error) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	if k := a.active[NoiseName]; k != nil {
		return k, nil
	}
	return nil, fmt.Errorf("the Noise key: %w", ErrNotFound)
}

// LogKey returns the key that signs the audit log's checkpoints.
func (a *Appliance) LogKey() (*Key, error) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	if k := a.active[LogName]; k != nil {
		return k, nil
	}
	return nil, fmt.Errorf("the audit log's key: %w", ErrNotFound)
}

// Events calls visit for each event of the audit log from index from on, until visit returns false.
func (a *Appliance) Events(from uint64, visit func(index uint64, e audit.Event) bool) error {
	var broken error
	err := a.ledger.Events(from, func(index uint64, b []byte) bool {
		e, err := audit.Decode(b)
		if err != nil {
			broken = fmt.Errorf("event %d: %w", index, err)
			return false
		}
		return visit(index, e)
	})
	return errors.Join(err, broken)
}
