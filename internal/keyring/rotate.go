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

// A rotation. The invariant on disk, at any moment and for each key:
//
//   - At most one version is active. A version is followed by the next number, and by no other key than
//     the one whose digest was written down (KeyCommitted) when the version came into use or was
//     announced: that key is there, as pending, and is never made anew.
//   - A version that peers have been told of has its step: signed by the version before it, admitted
//     before it was signed, and naming the digest of the version that will follow.
//
// So a rotation goes like this, and each line is one transaction:
//
//	announce: the version after the next is made (until the end of this it counts for nothing); the
//	          active version signs the step to the next one; then, at once, the next one has its step
//	          and its time, and the one after it is pending. Peers are told.
//	activate: at that time the next one is active and the one before is verify-only.
//	archive:  when its grace time is over, or all peers have acknowledged that must.
//
// A failure before the end of announce has changed nothing.

const (
	maxAhead     = 366 * 24 * time.Hour // that a version is announced: nothing else can be until it is active
	maxAnswering = 4                    // Noise keys, before another one is made
)

// Rotate announces the next version of a key, to be active at a time; a time before now means at once.
// When ctx ends first, the rotation goes on. A rotation that the device or the disk has prevented is
// tried again.
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
	if k := withoutSuccessor(versions); k != nil { // it is overdue
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
	if name == NoiseName && len(r.Answering()) >= maxAnswering { // a stranger's handshake costs the device an exchange with each
		return nil, fmt.Errorf("key %q: %w: %d versions answer handshakes: archive one, or wait for the end of its grace time",
			name, manage.ErrConflict, maxAnswering)
	}
	if next, err = r.announce(ctx, who, old, at); err != nil {
		return nil, r.notRotated(ctx, who, old, err)
	}
	if at.After(time.Now()) {
		return next, nil
	}
	if err := r.activate(ctx, who, next); err != nil {
		return nil, fmt.Errorf("version %d of key %q is announced, and not active yet; it is tried again: %w", next.Version, name, err)
	}
	return r.Version(next.Name, next.Version), nil
}

// notRotated writes down that a rotation has failed, and why.
func (r *Ring) notRotated(ctx context.Context, who audit.Actor, old *Key, why error) error {
	r.Log.Error("a key is not rotated; nothing was changed", "key", old.Name, "err", why)
	return errors.Join(why, r.record(ctx, audit.NewKeyRotationFailed(who, old.Ref().String(), why)))
}

// announce prepares the step from a version, which is active or compromised, to the next one.
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
		return nil, fmt.Errorf("key %q: %w: version %d has no successor: make another key", old.Name, manage.ErrConflict, old.Version)
	}
	if err := r.Prove(ctx, next); err != nil { // it was made long ago
		return nil, err
	}
	after, err := r.makeNext(ctx, ref, next.Token)
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

// announceOwn announces a version of the Noise key, which nobody follows by its steps.
func (r *Ring) announceOwn(ctx context.Context, who audit.Actor, old *Key, ref keystore.Ref, at time.Time) (*Key, error) {
	next, err := r.make(ctx, ref, NewKey{Name: old.Name, Algorithm: old.Info().Algorithm, Token: old.Token})
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

// activate makes an announced version the one that signs.
func (r *Ring) activate(ctx context.Context, who audit.Actor, next *Key) error {
	if err := r.Prove(ctx, next); err != nil { // or nothing of the key would sign any more
		return err
	}
	now := time.Now()
	edits := []edit{{next.Ref(), func(rec *record) { rec.State, rec.Activates = Active, now.Unix() }}}
	var retires time.Time
	if old := r.Version(next.Name, next.Version-1); old != nil && old.State == Active {
		retires = now.Add(r.grace(r.settingsOf(next.Name)))
		edits = append(edits, edit{old.Ref(), func(rec *record) { rec.State, rec.Retires = VerifyOnly, retires.Unix() }})
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

// Archive takes a verify-only version out of use before its grace time is over: its signatures are not
// accepted any more.
func (r *Ring) Archive(ctx context.Context, who audit.Actor, name string, version uint32) error {
	return r.run(ctx, fmt.Sprintf("archiving key %q", ijson.Clip(name)), func(ctx context.Context) error {
		k, err := r.mayBecome(name, version, Archived, who)
		if err != nil {
			return err
		}
		return r.setState(ctx, who, k, Archived, "")
	})
}

// mayBecome returns a version that the table lets become of another state, by an actor.
func (r *Ring) mayBecome(name string, version uint32, to State, who audit.Actor) (*Key, error) {
	k := r.Version(name, version)
	if k == nil {
		return nil, fmt.Errorf("key %q, version %d: %w", ijson.Clip(name), version, manage.ErrNotFound)
	}
	if _, err := transition(k.State, to, who); err != nil {
		return nil, fmt.Errorf("key %v: %w", k.Ref(), err)
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

// Destroy destroys the private key of a version that is out of use. The device goes first: after a
// crash the ledger may have a key that is gone, which can be destroyed once more, and never says of a
// key that it is gone while it is there.
func (r *Ring) Destroy(ctx context.Context, who audit.Actor, name string, version uint32) error {
	if err := approved(Destroyed, who); err != nil {
		return fmt.Errorf("key %q: %w", ijson.Clip(name), err)
	}
	return r.run(ctx, fmt.Sprintf("destroying key %q", ijson.Clip(name)), func(ctx context.Context) error {
		k, err := r.mayBecome(name, version, Destroyed, who)
		if err != nil {
			return err
		}
		next := r.Version(k.Name, k.Version+1)
		if k.State == Compromised && (next == nil || next.State == Pending) { // its step may still be needed
			return fmt.Errorf("key %v: %w: its successor is not active yet", k.Ref(), manage.ErrConflict)
		}
		store, err := r.Tokens.Get(k.Token)
		if err != nil {
			return err
		}
		if err := store.Destroy(ctx, k.Ref(), k.Info().Tag); err != nil {
			return fmt.Errorf("key %v: %w", k.Ref(), err)
		}
		return r.setState(ctx, who, k, Destroyed, "")
	})
}

// Compromise says that the private key of a version may be in other hands. From the moment that this
// is written down the version signs nothing, and nothing that it has signed is believed. Where it was
// the active one, its successor follows at once; where that can't be done now, it is tried until it
// can, and meanwhile nothing of the key signs.
func (r *Ring) Compromise(ctx context.Context, who audit.Actor, name string, version uint32, reason string) error {
	if err := approved(Compromised, who); err != nil {
		return fmt.Errorf("key %q: %w", ijson.Clip(name), err)
	}
	if !rotates(name) {
		return fmt.Errorf("key %q: %w: this line of the appliance's own has no successor: make a new appliance", name, manage.ErrInvalid)
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
		r.notify()
		r.Log.Warn("a key is compromised", "key", k.Ref().String(), "operator", who.Name, "reason", reason)
		if k.State != Active || r.Gate.Err() != nil {
			return nil // in the latter case Keep comes back to it
		}
		if err := r.activateSuccessor(ctx, who, k); err != nil {
			r.retryLater(name, err, false) // Keep tries it again
		}
		return nil
	})
}

// markCompromised writes down that a version is compromised. A peer that has acknowledged its
// successor has not heard of that yet, so the acknowledgement is taken back.
func (r *Ring) markCompromised(ctx context.Context, who audit.Actor, k *Key, reason string) error {
	compromised := edit{k.Ref(), func(rec *record) { rec.State, rec.Compromised = Compromised, true }}
	return r.Ledger.Update(ctx, func(tx *ledger.Tx) error {
		if err := peers.Forget(tx, k.Name, k.Version+1); err != nil {
			return err
		}
		return changeIn(tx, who, []edit{compromised}, stateChanged(who, k, Compromised, reason))
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
