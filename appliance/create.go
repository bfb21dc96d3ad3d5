package appliance

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"countersign/audit"
	"countersign/internal/ijson"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
)

// Making a key writes the intent down first. It comes into use only when it has been proven and one transaction says so, together
// with all that has to be true then: a signing key has a successor from its first moment. A crash in between leaves what is
// marked as being made, and is cleared away.

// Recover clears away what creations that were cut off have left behind. Those keys have never been in use, and what
// carries another tag than theirs is not touched.
func (a *Appliance) Recover(ctx context.Context) error {
	unfinished, err := a.keyRecords(func(s State) bool { return s == making })
	if err != nil {
		return err
	}
	for ref, r := range unfinished {
		err := a.clearAway(ctx, ref, r, "interrupted")
		switch {
		case errors.Is(err, keystore.ErrUnavailable), errors.Is(err, keystore.ErrSealed), errors.Is(err, keystore.ErrAuth), errors.Is(err, ErrNotFound):
			// It can wait: who makes the key again clears it away first.
			a.log.Warn("an unfinished key is not cleared away, since its token does not answer", "key", ref.String(), "err", err)
		case err != nil:
			return err
		}
	}
	return nil
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

// CreateKey makes or imports version 1 of a signing key, and makes its successor. When ctx ends first, the creation goes on: Keys has the key when
// it has come into use, and the audit log how it ended.
func (a *Appliance) CreateKey(ctx context.Context, who audit.Actor, n NewKey) (*Key, error) {
	if n.Algorithm == "" {
		n.Algorithm = keystore.Ed25519
	}
	switch {
	case own(n.Name):
		return nil, fmt.Errorf("key %q: %w: the name belongs to the appliance's own key", n.Name, ErrInvalid)
	case n.Algorithm != keystore.Ed25519 && n.Algorithm != keystore.P256:
		return nil, fmt.Errorf("key %q: %w: a signing key is %s or %s", ijson.Clip(n.Name), ErrInvalid, keystore.Ed25519, keystore.P256)
	case n.Seed != "" && (n.Algorithm != keystore.Ed25519 || !filepath.IsAbs(n.Seed)):
		return nil, fmt.Errorf("key %q: %w: what can be imported is an ed25519 seed, in a file that is named by an absolute path", ijson.Clip(n.Name), ErrInvalid)
	}
	if err := a.operable(); err != nil {
		return nil, fmt.Errorf("key %q: %w", ijson.Clip(n.Name), err)
	}
	return a.createKey(ctx, who, n)
}

// CreateOwnKey makes one of the appliance's own keys on a token; countersignd init calls it.
func (a *Appliance) CreateOwnKey(ctx context.Context, who audit.Actor, name, token string) (*Key, error) {
	alg, ok := map[string]keystore.Algorithm{NoiseName: keystore.X25519, LogName: keystore.Ed25519, AdminName: keystore.P256, CAName: keystore.P256}[name]
	if !ok {
		return nil, fmt.Errorf("key %q: %w: the appliance has no such key of its own", ijson.Clip(name), ErrInvalid)
	}
	return a.createKey(ctx, who, NewKey{Name: name, Algorithm: alg, Token: token})
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
	ref := keystore.Ref{Name: n.Name, Version: 1}
	err := a.act(ctx, a.creating, fmt.Sprintf("key %q", n.Name), func(ctx context.Context) error { return a.create(ctx, who, ref, n) })
	if err != nil {
		return nil, err
	}
	return a.version(n.Name, 1), nil
}

func (a *Appliance) create(ctx context.Context, who audit.Actor, ref keystore.Ref, n NewKey) error {
	if versions, _ := a.Key(n.Name); len(versions) > 0 {
		return fmt.Errorf("key %q: %w", n.Name, ErrExists)
	}
	first, err := a.make(ctx, ref, n)
	if err != nil {
		return err
	}
	event, action := audit.KeyCreated, "key create"
	if n.Seed != "" {
		event, action = audit.KeyImported, "key import"
	}
	info := first.key.Info()
	made := audit.Event{Type: event, Actor: who, Action: action, Resource: ref.String(), Outcome: "ok",
		Metadata: map[string]string{"algorithm": string(n.Algorithm), "public_key": hex.EncodeToString(info.PublicKey), "custody": string(info.Custody),
			"provenance": info.Provenance.String(), "token": n.Token}}
	if !signs(n.Name, n.Algorithm) {
		return a.change(ctx, []step{first.as(Active)}, made)
	}
	next, err := a.makeNext(ctx, ref, n.Token)
	if err != nil {
		return errors.Join(err, a.clearAway(ctx, ref, first.record, "failed"))
	}
	// After an error here it may be written all the same: nothing is cleared away before the ledger has been looked at again.
	return a.change(ctx, []step{first.as(Active), next.as(Pending)}, made, next.commitment(who))
}

func (a *Appliance) unfinished(ref keystore.Ref) (keyRecord, bool) {
	records, err := a.keyRecords(func(s State) bool { return s == making })
	r, ok := records[ref]
	return r, ok && err == nil
}

// fresh is a key that was made and proven, and is in use for nothing yet.
type fresh struct {
	key    keystore.Key
	record keyRecord
}

// as is the step by which it comes into use.
func (f fresh) as(s State) step {
	return step{ref: f.key.Info().Ref, key: f.key, change: func(r *keyRecord) {
		*r = r.made(f.key.Info())
		if r.State = s; s == Active {
			r.Activates = time.Now().Unix()
		}
	}}
}

// commitment is the event by which a version commits to this successor.
func (f fresh) commitment(who audit.Actor) audit.Event {
	info := f.key.Info()
	digest := (&Key{Key: f.key}).digest()
	return audit.Event{Type: audit.KeyCommitted, Actor: who, Action: "key create", Resource: keystore.Ref{Name: info.Ref.Name, Version: info.Ref.Version - 1}.String(), Outcome: "ok",
		Metadata: map[string]string{"next": hex.EncodeToString(digest[:]), "custody": string(info.Custody), "provenance": info.Provenance.String(), "token": f.record.Token}}
}

// makeNext makes the successor of a signing key's version.
func (a *Appliance) makeNext(ctx context.Context, of keystore.Ref, token string) (fresh, error) {
	return a.make(ctx, keystore.Ref{Name: of.Name, Version: of.Version + 1}, NewKey{Name: of.Name, Algorithm: keystore.Ed25519, Token: token})
}

// make makes a key on its token and leaves the ledger saying that it is being made.
func (a *Appliance) make(ctx context.Context, ref keystore.Ref, n NewKey) (fresh, error) {
	store, err := a.token(n.Token)
	if err != nil {
		return fresh{}, fmt.Errorf("key %q: %w", ref.Name, err)
	}
	if r, ok := a.unfinished(ref); ok { // an earlier one could not be cleared away then
		if err := a.clearAway(ctx, ref, r, "failed"); err != nil {
			return fresh{}, fmt.Errorf("key %q: %w", ref.Name, err)
		}
	}
	if _, err := store.Key(ctx, ref); err == nil {
		return fresh{}, fmt.Errorf("key %v: %w on the token, but not in the ledger: does the token belong to another appliance, or is the ledger an older copy? Take it from the token, or use that ledger", ref, ErrExists)
	} else if !errors.Is(err, keystore.ErrNotFound) {
		return fresh{}, fmt.Errorf("key %v: %w", ref, err)
	}
	r := keyRecord{Token: n.Token, Algorithm: n.Algorithm, State: making, Created: time.Now().Unix()}
	rand.Read(r.Tag[:])
	if err := a.ledger.Update(ctx, func(tx *ledger.Tx) error { return tx.Put(ledger.Keys, ref.String(), encode(r)) }); err != nil {
		return fresh{}, err
	}
	var made keystore.Key
	if n.Seed == "" {
		made, err = store.Generate(ctx, ref, n.Algorithm, r.Tag)
	} else {
		made, err = store.Import(ctx, ref, n.Seed, r.Tag)
	}
	if err != nil {
		return fresh{}, errors.Join(fmt.Errorf("key %q: %w", ref.Name, err), a.clearAway(ctx, ref, r, "failed"))
	}
	return fresh{made, r}, nil
}
