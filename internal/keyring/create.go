package keyring

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"countersign/audit"
	"countersign/internal/eddsa"
	"countersign/internal/escrow"
	"countersign/internal/ijson"
	"countersign/internal/keystore"
	"countersign/internal/manage"
	"countersign/internal/pubkey"
	"countersign/internal/requestid"
)

// The creation of a key first writes a record in the state making: the intent. One later
// transaction brings the key into use, after the device has made the key, together with all that
// must be true from then on: a signing key has a successor from the first moment. A crash in
// between leaves records in the state making, which Recover clears away.

// Recover clears away the remains of creations that a crash has cut off. Such versions have never
// been in use. An object on the token with another tag than the record has is not touched.
func (r *Ring) Recover(ctx context.Context) error {
	unfinished, err := r.unfinished()
	if err != nil {
		return err
	}
	for ref, rec := range unfinished {
		if err := r.destroyRemains(ctx, ref, rec); err != nil {
			// Clearing away can wait: the next creation of the version begins with the same.
			r.Log.Warn("an unfinished key is not cleared away, since its token does not do it",
				"key", ref.String(), "err", err)
		} else if err := r.forgetUnfinished(ctx, ref, "interrupted"); err != nil {
			return err
		}
	}
	return nil
}

// clearAway removes the remains of a failed creation from the token, then from the ledger.
func (r *Ring) clearAway(ctx context.Context, ref keystore.Ref, rec record, outcome string) error {
	if err := r.destroyRemains(ctx, ref, rec); err != nil {
		return err
	}
	return r.forgetUnfinished(ctx, ref, outcome)
}

// destroyRemains removes the remains of a failed creation from the token.
func (r *Ring) destroyRemains(ctx context.Context, ref keystore.Ref, rec record) error {
	store, err := r.Tokens.Get(rec.Token)
	if err == nil {
		err = store.Destroy(ctx, ref, rec.Tag)
	}
	if err != nil {
		return fmt.Errorf("clear away the unfinished key %v: %w", ref, err)
	}
	return nil
}

// forgetUnfinished deletes the record of a failed creation.
func (r *Ring) forgetUnfinished(ctx context.Context, ref keystore.Ref, outcome string) error {
	cleared := edit{ref, func(rec *record) { *rec = record{} }} // absent again
	return r.change(ctx, audit.Daemon(), []edit{cleared}, audit.NewKeyCreationFailed(ref.String(), outcome))
}

// NewKey describes a key to make or to import.
type NewKey struct {
	Name      string
	Algorithm keystore.Algorithm // default: Ed25519
	Token     string             // name of the token; default: Config.SigningToken, or the only token
	Seed      string             // path of the file with the seed to import; the key worker reads the file
	// Recoverable has the seed sealed for the recovery holders: of this version and all after it.
	Recoverable bool
}

// Create makes or imports version 1 of a signing key, and makes version 2. When ctx ends first, the
// creation goes on: All lists the key once the key is in use, and the audit log has the outcome.
func (r *Ring) Create(ctx context.Context, who audit.Actor, n NewKey) (*Key, error) {
	if n.Algorithm == "" {
		n.Algorithm = keystore.Ed25519
	}
	name := ijson.Clip(n.Name)
	switch {
	case own(n.Name):
		return nil, fmt.Errorf("key %q: %w: the name belongs to the appliance's own key", n.Name, manage.ErrInvalid)
	case n.Algorithm != keystore.Ed25519 && n.Algorithm != keystore.P256:
		return nil, fmt.Errorf("key %q: %w: a signing key is %s or %s",
			name, manage.ErrInvalid, keystore.Ed25519, keystore.P256)
	case n.Seed != "" && (n.Algorithm != keystore.Ed25519 || !filepath.IsAbs(n.Seed)):
		return nil, fmt.Errorf("key %q: %w: what can be imported is an ed25519 seed, "+
			"in a file that is named by an absolute path", name, manage.ErrInvalid)
	}
	if n.Recoverable {
		if err := r.mayMakeRecoverable(n); err != nil {
			return nil, fmt.Errorf("key %q: %w", name, err)
		}
	}
	if err := r.Gate.Err(); err != nil {
		return nil, fmt.Errorf("key %q: %w", name, err)
	}
	return r.createFirst(ctx, who, n)
}

// CreateOwn makes one of the appliance's own keys on a token, for countersignd init.
func (r *Ring) CreateOwn(ctx context.Context, who audit.Actor, name, token string) (*Key, error) {
	return r.createOwn(ctx, who, name, token, false)
}

// CreateOwnRecoverable is CreateOwn for a recoverable key: see FirstHolders.
func (r *Ring) CreateOwnRecoverable(ctx context.Context, who audit.Actor, name, token string) (*Key, error) {
	return r.createOwn(ctx, who, name, token, true)
}

// ReplaceLost makes the next version of a key of the HTTPS listener whose active version is not on
// its token any more and can't come back: holders can't return a P-256 key of a TPM. nil is no new
// version: the token has the active one, or holders can return that.
func (r *Ring) ReplaceLost(ctx context.Context, who audit.Actor, name string) (made *Key, err error) {
	if name != AdminName && name != CAName {
		return nil, fmt.Errorf("key %q: %w: it is no key of the HTTPS listener", ijson.Clip(name), manage.ErrInvalid)
	}
	lost, err := r.Active(name)
	if err != nil || len(lost.Envelope) > 0 {
		return nil, err
	}
	store, err := r.Tokens.Get(lost.Token)
	if err != nil {
		return nil, fmt.Errorf("key %q: %w", name, err)
	}
	if _, err := store.Key(ctx, lost.Ref()); !errors.Is(err, keystore.ErrNotFound) {
		return nil, err
	}
	ref := keystore.Ref{Name: name, Version: lost.Version + 1}
	n := NewKey{Name: name, Algorithm: keystore.P256, Token: lost.Token}
	err = r.run(ctx, who, fmt.Sprintf("key %q", name), func(ctx context.Context) error {
		next, err := r.make(ctx, who, ref, n)
		if err != nil {
			return err
		}
		now := time.Now()
		replaced := edit{lost.Ref(), func(rec *record) { rec.State, rec.Retires = VerifyOnly, now.Unix() }}
		return r.change(ctx, who, []edit{next.as(Active), replaced},
			audit.NewKeyCreated(who, ref.String(), next.facts(), false),
			audit.NewKeyRotated(who, ref.String(), next.info.PublicKey, now))
	})
	if err != nil {
		return nil, err
	}
	return r.Version(name, ref.Version), nil
}

func (r *Ring) createOwn(
	ctx context.Context, who audit.Actor, name, token string, recoverable bool,
) (*Key, error) {
	alg, ok := map[string]keystore.Algorithm{
		NoiseName: keystore.X25519, LogName: keystore.Ed25519, AdminName: keystore.P256, CAName: keystore.P256,
	}[name]
	if !ok {
		return nil, fmt.Errorf("key %q: %w: the appliance has no such key of its own",
			ijson.Clip(name), manage.ErrInvalid)
	}
	n := NewKey{Name: name, Algorithm: alg, Token: token, Recoverable: recoverable}
	return r.createFirst(ctx, who, n)
}

func (r *Ring) createFirst(ctx context.Context, who audit.Actor, n NewKey) (*Key, error) {
	if err := keystore.CheckName(n.Name); err != nil {
		return nil, fmt.Errorf("key %q: %w: %w", ijson.Clip(n.Name), manage.ErrInvalid, err)
	}
	if n.Token == "" && r.SigningToken != "" {
		n.Token = r.SigningToken
	} else if n.Token == "" && len(r.Tokens) == 1 {
		n.Token = r.Tokens.Names()
	} else if n.Token == "" {
		return nil, fmt.Errorf("key %q: %w: say on which token: %s", n.Name, manage.ErrInvalid, r.Tokens.Names())
	}
	ref := keystore.Ref{Name: n.Name, Version: 1}
	if err := r.run(ctx, who, fmt.Sprintf("key %q", n.Name), func(ctx context.Context) error {
		return r.create(ctx, who, ref, n)
	}); err != nil {
		return nil, err
	}
	return r.Version(n.Name, 1), nil
}

// run runs an act on keys to its end, one act at a time.
func (r *Ring) run(
	ctx context.Context, who audit.Actor, what string, do func(context.Context) error,
) error {
	return r.changing.Run(ctx, r.Log.With(requestid.Attr(who.Request)), what, do)
}

func (r *Ring) create(ctx context.Context, who audit.Actor, ref keystore.Ref, n NewKey) error {
	if versions, _ := r.Versions(n.Name); len(versions) > 0 {
		return fmt.Errorf("key %q: %w", n.Name, manage.ErrExists)
	}
	created := func(first newVersion) audit.Event {
		return audit.NewKeyCreated(who, ref.String(), first.facts(), n.Seed != "")
	}
	if !signs(n.Name, n.Algorithm) {
		first, err := r.make(ctx, who, ref, n)
		if err != nil {
			return err
		}
		return r.change(ctx, who, []edit{first.as(Active)}, created(first))
	}
	first, next, err := r.makePair(ctx, who, ref, n)
	if err != nil {
		return err
	}
	// An error here may come after the commit. So nothing is cleared away before the next start or
	// creation has read the ledger again.
	return r.change(ctx, who, []edit{first.as(Active), next.as(Pending)}, created(first), next.commitment(who))
}

// makePair makes a version of a signing key and its successor. After an error neither is there.
func (r *Ring) makePair(
	ctx context.Context, who audit.Actor, ref keystore.Ref, n NewKey,
) (first, next newVersion, err error) {
	if first, err = r.make(ctx, who, ref, n); err != nil {
		return first, next, err
	}
	next, err = r.makeNext(ctx, who, ref, n.Token, n.Recoverable)
	if err == nil && next.digest() == first.digest() { // neither is in the ledger's memory yet
		err = errors.Join(fmt.Errorf("key %v: %w: it has the public key of %v: the token's generator repeats itself",
			next.info.Ref, keystore.ErrWrong, ref), r.clearAway(ctx, next.info.Ref, next.record, "failed"))
	}
	if err != nil {
		err = errors.Join(err, r.clearAway(ctx, ref, first.record, "failed"))
	}
	return first, next, err
}

// newVersion is a version that the device has made and proven. No transaction has brought the
// version into use yet.
type newVersion struct {
	info     keystore.Info
	record   record // in the state making
	envelope []byte // of a recoverable version
}

// as is the edit that brings the version into use in a state.
func (n newVersion) as(s State) edit {
	return edit{n.info.Ref, func(rec *record) {
		rec.made(n.info)
		rec.Envelope = n.envelope
		if rec.State = s; s == Active {
			rec.Activates = time.Now().Unix()
		}
	}}
}

func (n newVersion) facts() audit.KeyFacts {
	facts := factsOf(n.info, n.record.Token)
	if n.envelope != nil {
		facts.Envelope = escrow.Digest(n.envelope)
	}
	return facts
}

func factsOf(info keystore.Info, token string) audit.KeyFacts {
	return audit.KeyFacts{
		PublicKey: info.PublicKey, Algorithm: string(info.Algorithm), Custody: string(info.Custody),
		Provenance: info.Provenance.String(), Token: token,
	}
}

// commitment is the event KeyCommitted: the version before commits to the digest of this version.
func (n newVersion) commitment(who audit.Actor) audit.Event {
	before := keystore.Ref{Name: n.info.Ref.Name, Version: n.info.Ref.Version - 1}
	return audit.NewKeyCommitted(who, before.String(), n.digest(), n.facts())
}

// makeNext makes the successor of a version of a signing key.
func (r *Ring) makeNext(
	ctx context.Context, who audit.Actor, of keystore.Ref, token string, recoverable bool,
) (newVersion, error) {
	ref := keystore.Ref{Name: of.Name, Version: of.Version + 1}
	n := NewKey{Name: of.Name, Algorithm: keystore.Ed25519, Token: token, Recoverable: recoverable}
	return r.make(ctx, who, ref, n)
}

// make makes a version on its token. The ledger has the version in the state making then.
func (r *Ring) make(ctx context.Context, who audit.Actor, ref keystore.Ref, n NewKey) (newVersion, error) {
	store, err := r.Tokens.Get(n.Token)
	if err != nil {
		return newVersion{}, fmt.Errorf("key %q: %w", ref.Name, err)
	}
	unfinished, err := r.unfinished()
	if err != nil {
		return newVersion{}, err
	}
	if rec, ok := unfinished[ref]; ok { // of an earlier creation, whose token did not answer
		if err := r.clearAway(ctx, ref, rec, "failed"); err != nil {
			return newVersion{}, fmt.Errorf("key %q: %w", ref.Name, err)
		}
	}
	if k := r.Version(ref.Name, ref.Version); k != nil {
		return newVersion{}, fmt.Errorf("key %v: %w: it is %s", ref, manage.ErrExists, k.State)
	}
	if _, err := store.Key(ctx, ref); err == nil {
		return newVersion{}, fmt.Errorf("key %v: %w on the token, but not in the ledger: does the token belong "+
			"to another appliance, or is the ledger an older copy? Take it from the token, or use that ledger",
			ref, manage.ErrExists)
	} else if !errors.Is(err, keystore.ErrNotFound) {
		return newVersion{}, fmt.Errorf("key %v: %w", ref, err)
	}
	rec := record{Token: n.Token, Algorithm: n.Algorithm, State: making, Created: time.Now().Unix()}
	rand.Read(rec.Tag[:])
	if err := r.change(ctx, who, []edit{{ref, func(written *record) { *written = rec }}}); err != nil {
		return newVersion{}, err
	}
	var made keystore.Key
	var envelope []byte
	switch {
	case n.Recoverable:
		made, envelope, err = r.seal(ctx, store, ref, n.Algorithm, rec.Tag)
	case n.Seed == "":
		made, err = store.Generate(ctx, ref, n.Algorithm, rec.Tag)
	default:
		made, err = store.Import(ctx, ref, n.Seed, rec.Tag)
	}
	if err == nil {
		err = r.checkNew(made.Info())
	}
	if err != nil {
		return newVersion{}, errors.Join(fmt.Errorf("key %q: %w", ref.Name, err), r.clearAway(ctx, ref, rec, "failed"))
	}
	return newVersion{made.Info(), rec, envelope}, nil
}

// checkNew refuses a public key that is none by the strict rules of its algorithm, and one that the
// ledger has already: on any token, under any name, and also archived or destroyed. The same
// private key under two names would sign two documents under one nonce, and would go on after the
// compromise of one name. No act is under way meanwhile, so the key stays the only one.
func (r *Ring) checkNew(info keystore.Info) error {
	check, known := map[keystore.Algorithm]func([]byte) error{
		keystore.Ed25519: eddsa.CheckPublicKey, keystore.X25519: pubkey.CheckX25519, keystore.P256: pubkey.CheckP256,
	}[info.Algorithm]
	if !known {
		return fmt.Errorf("%w: its algorithm %q is unknown", manage.ErrInvalid, info.Algorithm)
	}
	if err := check(info.PublicKey); err != nil {
		return fmt.Errorf("%w: %w", keystore.ErrWrong, err)
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	if refs := r.byPublic[string(info.PublicKey)]; len(refs) > 0 {
		return fmt.Errorf("%w: its public key is that of %v, which is %s: one key has one name",
			manage.ErrExists, refs[0], r.keys[refs[0]].State)
	}
	return nil
}
