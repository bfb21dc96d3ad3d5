package keyring

import (
	"context"
	"errors"
	"fmt"
	"time"

	"countersign/audit"
	"countersign/internal/ijson"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/peers"
	"countersign/wire"
)

// A rotation replaces the active version of a key by the next version. The invariant on disk, at
// any moment and for each key:
//
//   - At most one version is active. The successor of a version has the next number, and the digest
//     that the log has committed to (KeyCommitted) since the version came into use or was
//     announced. The successor exists already, as pending, and is never made anew.
//   - Each announced version has its step: signed by the version before, admitted before the
//     signature, and naming the digest of the version after.
//
// A rotation therefore has three parts, each with one transaction at its end:
//
//	announce: the device makes the version after the next, still in the state making; the active
//	          version signs the step to the next version. Then the next version gets its step and
//	          its time, and the version after is pending. Peers are told.
//	activate: at that time the next version becomes active, and the old version verify-only.
//	archive:  at the end of the grace time, or when all peers that must acknowledge have done so,
//	          the old version goes out of use.
//
// A failure before the end of announce has changed nothing.

const (
	// maxAhead bounds the time between announcement and activation: the key can't be rotated
	// meanwhile.
	maxAhead = 366 * 24 * time.Hour
	// maxAnswering bounds the versions of the Noise key that answer: a stranger's handshake costs
	// the device an exchange with each of them.
	maxAnswering = 4
)

// Rotate announces the next version of a key. The version becomes active at the time at; a time in
// the past means at once. When ctx ends first, the rotation goes on. A rotation that has failed
// because of the device or the disk is retried.
func (r *Ring) Rotate(ctx context.Context, who audit.Actor, name string, at time.Time) (*Key, error) {
	if err := r.Gate.Err(); err != nil {
		return nil, fmt.Errorf("key %q: %w", ijson.Clip(name), err)
	}
	var next *Key
	err := r.run(ctx, fmt.Sprintf("rotating key %q", ijson.Clip(name)), func(ctx context.Context) (err error) {
		if next, err = r.rotate(ctx, who, name, at); err != nil && !errors.Is(err, manage.ErrConflict) &&
			!errors.Is(err, manage.ErrInvalid) && !errors.Is(err, manage.ErrNotFound) {
			r.retryLater(name, err, true)
		}
		return err
	})
	return next, err
}

func (r *Ring) rotate(ctx context.Context, who audit.Actor, name string, at time.Time) (next *Key, err error) {
	if !rotates(name) {
		return nil, fmt.Errorf("key %q: %w: this line of the appliance's own is not rotated", name, manage.ErrInvalid)
	}
	if at.After(time.Now().Add(maxAhead)) {
		return nil, fmt.Errorf("key %q: %w: a version is announced at most %d days before it is active",
			name, manage.ErrInvalid, maxAhead/(24*time.Hour))
	}
	versions, err := r.Versions(name)
	if err != nil {
		return nil, err
	}
	if k := withoutSuccessor(versions); k != nil { // a rotation is overdue
		if err := r.activateSuccessor(ctx, who, k); err != nil {
			return nil, err
		}
		return r.Active(name)
	}
	old, err := r.Active(name)
	if err != nil {
		return nil, err
	}
	if next := r.Version(name, old.Version+1); next != nil && next.Announced() {
		return nil, fmt.Errorf("key %q: %w: version %d is announced and will be active at %s",
			name, manage.ErrConflict, next.Version, next.Activates.UTC().Format(time.RFC3339))
	}
	if name == NoiseName && len(r.Answering()) >= maxAnswering {
		return nil, fmt.Errorf("key %q: %w: %d versions answer handshakes: archive one, "+
			"or wait for the end of its grace time", name, manage.ErrConflict, maxAnswering)
	}
	if next, err = r.announce(ctx, who, old, at); err != nil {
		return nil, r.notRotated(ctx, who, old, err)
	}
	if at.After(time.Now()) {
		return next, nil
	}
	if err := r.activate(ctx, who, next); err != nil {
		return nil, fmt.Errorf("version %d of key %q is announced, and not active yet; it is tried again: %w",
			next.Version, name, err)
	}
	return r.Version(next.Name, next.Version), nil
}

// notRotated records the failure of a rotation with its cause.
func (r *Ring) notRotated(ctx context.Context, who audit.Actor, old *Key, why error) error {
	r.Log.Error("a key is not rotated; nothing was changed", "key", old.Name, "err", why)
	return errors.Join(why, r.record(ctx, audit.NewKeyRotationFailed(who, old.Ref().String(), why)))
}

// announce announces the version after old, which is active or compromised.
func (r *Ring) announce(ctx context.Context, who audit.Actor, old *Key, at time.Time) (*Key, error) {
	if now := time.Now(); at.Before(now) {
		at = now
	}
	ref := keystore.Ref{Name: old.Name, Version: old.Version + 1}
	if !old.Signs() {
		return r.announceOwn(ctx, who, old, ref, at)
	}
	next := r.Version(ref.Name, ref.Version)
	if next == nil {
		return nil, fmt.Errorf("key %q: %w: version %d has no successor: make another key",
			old.Name, manage.ErrConflict, old.Version)
	}
	if err := r.Prove(ctx, next); err != nil { // the creation may be long ago
		return nil, err
	}
	after, err := r.makeNext(ctx, who, ref, next.Token)
	if err != nil {
		return nil, err
	}
	succession, err := r.endorse(ctx, who, old, next, after, at)
	if err != nil {
		return nil, errors.Join(err, r.clearAway(ctx, after.info.Ref, after.record, "failed"))
	}
	announced := edit{ref, func(rec *record) { rec.Activates, rec.Succession = at.Unix(), succession }}
	if err := r.change(ctx, who, []edit{announced, after.as(Pending)},
		announcementOf(who, old, next.Info(), at), after.commitment(who)); err != nil {
		return nil, err
	}
	r.notify()
	return r.Version(ref.Name, ref.Version), nil
}

// announceOwn announces a version of a key without steps: the Noise key, or a P-256 key.
func (r *Ring) announceOwn(
	ctx context.Context, who audit.Actor, old *Key, ref keystore.Ref, at time.Time,
) (*Key, error) {
	next, err := r.make(ctx, who, ref, NewKey{Name: old.Name, Algorithm: old.Info().Algorithm, Token: old.Token})
	if err != nil {
		return nil, err
	}
	var authorization *wire.Authorization
	if old.Name == NoiseName && r.Identity != "" {
		if authorization, err = r.authorize(ctx, who, next.info); err != nil {
			return nil, errors.Join(err, r.clearAway(ctx, ref, next.record, "failed"))
		}
	}
	pending := next.as(Pending)
	announced := edit{ref, func(rec *record) {
		pending.change(rec)
		rec.Activates, rec.Authorization = at.Unix(), authorization
	}}
	if err := r.change(ctx, who, []edit{announced}, announcementOf(who, old, next.info, at)); err != nil {
		return nil, err
	}
	r.notify()
	return r.Version(ref.Name, ref.Version), nil
}

func announcementOf(who audit.Actor, old *Key, next keystore.Info, at time.Time) audit.Event {
	return audit.NewRotationAnnounced(who, old.Ref().String(), next.Ref.Version, at, factsOf(next, ""))
}

// activate makes an announced version the active version.
func (r *Ring) activate(ctx context.Context, who audit.Actor, next *Key) error {
	if err := r.Prove(ctx, next); err != nil { // with a lost version nothing of the key would sign any more
		return err
	}
	now := time.Now()
	edits := []edit{{next.Ref(), func(rec *record) { rec.State, rec.Activates = Active, now.Unix() }}}
	var retires time.Time
	if old := r.Version(next.Name, next.Version-1); old != nil && old.State == Active {
		retires = now.Add(r.grace(r.settingsOf(next.Name)))
		replaced := func(rec *record) { rec.State, rec.Retires = VerifyOnly, retires.Unix() }
		edits = append(edits, edit{old.Ref(), replaced})
	}
	e := audit.NewKeyRotated(who, next.Ref().String(), next.Info().PublicKey, retires)
	if err := r.change(ctx, who, edits, e); err != nil {
		return err
	}
	r.Log.Info("a key was rotated", "key", next.Name, "version", next.Version)
	r.clearRetry(next.Name)
	r.notify()
	return nil
}

// Archive takes a verify-only version out of use before the end of its grace time: signatures of
// the version are never accepted again.
func (r *Ring) Archive(ctx context.Context, who audit.Actor, name string, version uint32) error {
	return r.run(ctx, fmt.Sprintf("archiving key %q", ijson.Clip(name)), func(ctx context.Context) error {
		k, err := r.mayBecome(name, version, Archived, who)
		if err != nil {
			return err
		}
		return r.setState(ctx, who, k, Archived, "")
	})
}

// CheckState returns the error that Archive, Destroy or Compromise would return now for an approved
// proposal: the device is not asked.
func (r *Ring) CheckState(name string, version uint32, to State) error {
	_, err := r.mayBecome(name, version, to, audit.Actor{Kind: "operator", Proposal: 1})
	return err
}

// mayBecome returns a version, if Transitions lets the actor change its state, and the key and its
// successor allow the change.
func (r *Ring) mayBecome(name string, version uint32, to State, who audit.Actor) (*Key, error) {
	if to == Compromised && !rotates(name) {
		return nil, fmt.Errorf("key %q: %w: this line of the appliance's own has no successor: make a new appliance",
			name, manage.ErrInvalid)
	}
	k := r.Version(name, version)
	if k == nil {
		return nil, fmt.Errorf("key %q, version %d: %w", ijson.Clip(name), version, manage.ErrNotFound)
	}
	if _, err := transition(k.State, to, who); err != nil {
		return nil, fmt.Errorf("key %v: %w", k.Ref(), err)
	}
	next := r.Version(k.Name, k.Version+1)
	if to == Destroyed && k.State == Compromised && (next == nil || next.State == Pending) {
		// The version may have to sign the step.
		return nil, fmt.Errorf("key %v: %w: its successor is not active yet", k.Ref(), manage.ErrConflict)
	}
	return k, nil
}

func (r *Ring) setState(ctx context.Context, who audit.Actor, k *Key, to State, reason string) error {
	change := edit{k.Ref(), func(rec *record) { rec.State = to }}
	return r.change(ctx, who, []edit{change}, stateChanged(who, k, to, reason))
}

func stateChanged(who audit.Actor, k *Key, to State, reason string) audit.Event {
	return audit.NewKeyStateChanged(who, k.Ref().String(), string(k.State), string(to), reason)
}

// Destroy destroys the private key of a version that is out of use: first in the device, then in
// the ledger. After a crash in between, the ledger still has the version, and an operator destroys
// the version once more. The ledger never calls a private key destroyed that still exists.
func (r *Ring) Destroy(ctx context.Context, who audit.Actor, name string, version uint32) error {
	if err := approved(Destroyed, who); err != nil {
		return fmt.Errorf("key %q: %w", ijson.Clip(name), err)
	}
	return r.run(ctx, fmt.Sprintf("destroying key %q", ijson.Clip(name)), func(ctx context.Context) error {
		k, err := r.mayBecome(name, version, Destroyed, who)
		if err != nil {
			return err
		}
		store, err := r.Tokens.Get(k.Token)
		if err != nil {
			return err
		}
		if err := store.Destroy(ctx, k.Ref(), k.Info().Tag); err != nil {
			return fmt.Errorf("key %v: %w", k.Ref(), err)
		}
		defer r.Gate.Enforce() // an archived version's earlier signatures were given out until now
		return r.setState(ctx, who, k, Destroyed, "")
	})
}

// Compromise marks a version whose private key may be in other hands. From the commit on, the
// version signs nothing, and none of its signatures is believed. The successor of an active version
// becomes active at once. If the device fails, Keep retries until the successor is active;
// meanwhile nothing of the key signs.
//
// The compromise is of the public key: a version of another name with the same public key, from a
// ledger of before this was refused, signs nothing either, and is a cause in the state. The version
// itself becomes compromised, and gets its successor, by a proposal of its own.
func (r *Ring) Compromise(ctx context.Context, who audit.Actor, name string, version uint32, reason string) error {
	if err := approved(Compromised, who); err != nil {
		return fmt.Errorf("key %q: %w", ijson.Clip(name), err)
	}
	if err := manage.CheckReason(reason); err != nil {
		return fmt.Errorf("key %q: %w", ijson.Clip(name), err)
	}
	return r.run(ctx, fmt.Sprintf("key %q", ijson.Clip(name)), func(ctx context.Context) error {
		k, err := r.mayBecome(name, version, Compromised, who)
		if err != nil {
			return err
		}
		if err := r.markCompromised(ctx, who, k, reason); err != nil {
			return err
		}
		r.Gate.Enforce()
		r.notify()
		r.Log.Warn("a key is compromised", "key", k.Ref().String(), "operator", who.Name, "reason", reason)
		if k.State != Active || r.Gate.Err() != nil {
			return nil // Keep rotates once the gate is open
		}
		if err := r.activateSuccessor(ctx, who, k); err != nil {
			r.retryLater(name, err, false)
		}
		return nil
	})
}

// markCompromised records that a version is compromised, from then on as news for each peer: see
// announce.go. Acknowledgements of an announced successor are taken back in the same transaction:
// the successor becomes active at another time than the peers know.
func (r *Ring) markCompromised(ctx context.Context, who audit.Actor, k *Key, reason string) error {
	compromised := edit{k.Ref(), func(rec *record) { rec.State, rec.Compromised = Compromised, true }}
	return r.Ledger.Update(ctx, func(tx *ledger.Tx) error {
		if k.State == Active {
			if err := peers.Forget(tx, k.Name, k.Version+1); err != nil {
				return err
			}
		}
		return r.changeIn(tx, who, []edit{compromised}, stateChanged(who, k, Compromised, reason))
	})
}

// activateSuccessor makes the successor of a compromised version active.
func (r *Ring) activateSuccessor(ctx context.Context, who audit.Actor, k *Key) error {
	next := r.Version(k.Name, k.Version+1)
	if next == nil || !next.Announced() {
		var err error
		if next, err = r.announce(ctx, who, k, time.Now()); err != nil {
			return r.notRotated(ctx, who, k, err)
		}
	}
	return r.activate(ctx, who, next)
}
