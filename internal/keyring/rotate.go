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
	"countersign/internal/requestid"
	"countersign/wire"
)

// A rotation replaces the active version of a key by the next version. The invariant on disk, at
// any moment and for each key:
//
//   - At most one version is active. The successor of a version has the next number, and the digest
//     that the log has committed to (KeyCommitted) since the version came into use or was
//     announced. The successor exists already, as pending, and is never made anew.
//   - At most one version is announced: the successor of the active one. Each announced version has
//     its step: signed by the version before, admitted before the signature, and naming the digest
//     of the version after.
//   - What peers were told of a line has a rising order, see record.Change. An acknowledgement of
//     what is no longer true does not count: acknowledgements are taken back in the transaction of
//     the change, and Appliance.news tells the news until the peer acknowledges the news.
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
// Until the activation, a second announcement replaces the first, and Cancel takes it back. Both
// leave the next version and the version after, since peers have their digests: a step that a peer
// has followed stays a step of the line. The second announcement has another time only.
//
// A failure before the end of announce has changed nothing. See request.go for what was asked.

const (
	// maxAhead bounds the time between announcement and activation: the key can't be rotated
	// meanwhile.
	maxAhead = 366 * 24 * time.Hour
	// maxAnswering bounds the versions of the Noise key that answer: a stranger's handshake costs
	// the device an exchange with each of them.
	maxAnswering = 4
)

// Rotate announces the next version of a key. The version becomes active at the time at; a time in
// the past means at once. An announcement of before is replaced. When ctx ends first, the rotation
// goes on. A rotation that has failed because of the device is tried again for DefaultWithin.
func (r *Ring) Rotate(ctx context.Context, who audit.Actor, name string, at time.Time) (*Key, error) {
	return r.RotateWithin(ctx, who, name, at, DefaultWithin)
}

// RotateWithin is Rotate with the time after at for which the rotation still makes sense: a failed
// rotation is tried again until then.
func (r *Ring) RotateWithin(
	ctx context.Context, who audit.Actor, name string, at time.Time, within time.Duration,
) (*Key, error) {
	if err := r.Gate.Err(); err != nil {
		return nil, fmt.Errorf("key %q: %w", ijson.Clip(name), err)
	}
	var next *Key
	err := r.run(ctx, who, fmt.Sprintf("rotating key %q", ijson.Clip(name)), func(ctx context.Context) (err error) {
		next, err = r.rotate(ctx, who, name, at, within)
		return err
	})
	return next, err
}

func (r *Ring) rotate(
	ctx context.Context, who audit.Actor, name string, at time.Time, within time.Duration,
) (next *Key, err error) {
	now := time.Now()
	switch {
	case !rotates(name):
		return nil, fmt.Errorf("key %q: %w: this line of the appliance's own is not rotated", name, manage.ErrInvalid)
	case at.After(now.Add(maxAhead)):
		return nil, fmt.Errorf("key %q: %w: a version is announced at most %d days before it is active",
			name, manage.ErrInvalid, maxAhead/(24*time.Hour))
	case within < time.Second || within > maxWithin:
		return nil, fmt.Errorf("key %q: %w: within must be 1 second to %d days, not %v",
			name, manage.ErrInvalid, maxWithin/(24*time.Hour), within)
	}
	versions, err := r.Versions(name)
	if err != nil {
		return nil, err
	}
	if k := withoutSuccessor(versions); k != nil { // a rotation is overdue
		if err := r.activateSuccessor(ctx, who, k); err != nil {
			r.retryLater(who, name, err, time.Time{})
			return nil, err
		}
		return r.Active(name)
	}
	if err := r.mayRenew(name); err != nil {
		return nil, err
	}
	if at.Before(now) {
		at = now
	}
	q := Request{By: who, Asked: now, Activates: at, Until: at.Add(within)}
	if err := r.request(ctx, name, q); err != nil {
		return nil, err // nothing is tried again: the request is not on disk
	}
	if next, err = r.carryOut(ctx, name, q); err == nil {
		return next, nil
	}
	if q, open := r.Requested(name); open && q.Ended == "" {
		r.retryLater(who, name, err, q.Until)
		err = fmt.Errorf("it is tried again until %s: %w", q.Until.UTC().Format(time.RFC3339), err)
	} else if !open {
		r.retryLater(who, name, err, time.Time{}) // announced, and not active yet
	}
	return nil, err
}

// mayRenew refuses a rotation that can't be carried out by the state of the key.
func (r *Ring) mayRenew(name string) error {
	old, err := r.Active(name)
	if err != nil {
		return err
	}
	next := r.Version(name, old.Version+1)
	if next == nil && old.Signs() {
		return fmt.Errorf("key %q: %w: version %d has no successor: make another key",
			name, manage.ErrConflict, old.Version)
	}
	if name == NoiseName && next == nil && len(r.Answering()) >= maxAnswering {
		return fmt.Errorf("key %q: %w: %d versions answer handshakes: archive one, "+
			"or wait for the end of its grace time", name, manage.ErrConflict, maxAnswering)
	}
	return nil
}

// renew announces the next version of a key, and activates the version if its time has come.
func (r *Ring) renew(ctx context.Context, who audit.Actor, name string, at time.Time) (*Key, error) {
	if err := r.mayRenew(name); err != nil {
		return nil, err
	}
	old, err := r.Active(name)
	if err != nil {
		return nil, err
	}
	next, err := r.announce(ctx, who, old, at)
	if err != nil {
		return nil, r.notRotated(ctx, who, old, err)
	}
	if next.Activates.After(time.Now()) {
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
	r.Log.Error("a key is not rotated; nothing was changed", "key", old.Name,
		requestid.Attr(who.Request), "err", why)
	return errors.Join(why, r.record(ctx, audit.NewKeyRotationFailed(who, old.Ref().String(), why)))
}

// announce announces the version after old, which is active or compromised. The announcement takes
// the place of an earlier one.
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
	var edits []edit
	var events []audit.Event
	digest, made := r.Next(next) // made by an announcement before: peers may have the digest
	clear := func() error { return nil }
	if !made {
		after, err := r.makeNext(ctx, who, ref, next.Token, next.Info().Custody.Recoverable())
		if err != nil {
			return nil, err
		}
		digest, edits, events = after.digest(), []edit{after.as(Pending)}, []audit.Event{after.commitment(who)}
		clear = func() error { return r.clearAway(ctx, after.info.Ref, after.record, "failed") }
	}
	succession, err := r.endorse(ctx, who, old, next, digest, at)
	if err != nil {
		return nil, errors.Join(err, clear())
	}
	announced := func(rec *record) {
		rec.announce(who, old, at)
		rec.Succession = succession
	}
	return r.writeAnnouncement(ctx, who, old, next.Info(), "", at, append(edits, edit{ref, announced}), events...)
}

// announceOwn announces a version of a key without steps: the Noise key, or a P-256 key. Such a
// version is made by its first announcement.
func (r *Ring) announceOwn(
	ctx context.Context, who audit.Actor, old *Key, ref keystore.Ref, at time.Time,
) (*Key, error) {
	begin, clear := func(*record) {}, func() error { return nil }
	var info keystore.Info
	var envelope string // of a version that is made now
	if next := r.Version(ref.Name, ref.Version); next != nil {
		if err := r.Prove(ctx, next); err != nil {
			return nil, err
		}
		info = next.Info()
	} else {
		made, err := r.make(ctx, who, ref, NewKey{
			Name: old.Name, Algorithm: old.Info().Algorithm, Token: old.Token,
			Recoverable: old.Info().Custody.Recoverable(),
		})
		if err != nil {
			return nil, err
		}
		info, begin, envelope = made.info, made.as(Pending).change, made.facts().Envelope
		clear = func() error { return r.clearAway(ctx, ref, made.record, "failed") }
	}
	var authorization *wire.Authorization
	if old.Name == NoiseName && r.Identity != "" {
		var err error
		if authorization, err = r.authorize(ctx, who, info); err != nil {
			return nil, errors.Join(err, clear())
		}
	}
	announced := func(rec *record) {
		begin(rec)
		rec.announce(who, old, at)
		rec.Authorization = authorization
	}
	return r.writeAnnouncement(ctx, who, old, info, envelope, at, []edit{{ref, announced}})
}

// announce notes the announcement of a version after old.
func (rec *record) announce(who audit.Actor, old *Key, at time.Time) {
	if rec.Activates != 0 {
		rec.Change++
	} else {
		rec.Change = old.Change
	}
	rec.Activates, rec.By = at.Unix(), &who
}

// writeAnnouncement writes an announcement of the version after old, and tells peers. envelope is
// SHA-256 of the envelope of a version that is made by its announcement, hexadecimal, or "".
// Acknowledgements of an announcement that is replaced are taken back.
func (r *Ring) writeAnnouncement(
	ctx context.Context, who audit.Actor, old *Key, next keystore.Info, envelope string, at time.Time,
	edits []edit, events ...audit.Event,
) (*Key, error) {
	var instead time.Time
	var again uint32
	if before := r.Version(next.Ref.Name, next.Ref.Version); before != nil && before.Announced() {
		instead, again = before.Activates, before.Version
	}
	facts := factsOf(next, "")
	facts.Envelope = envelope
	e := audit.NewRotationAnnounced(who, old.Ref().String(), next.Ref.Version, at, instead, facts)
	if err := r.changeLine(ctx, who, old.Name, edits, again, append([]audit.Event{e}, events...)...); err != nil {
		return nil, err
	}
	r.notify()
	return r.Version(next.Ref.Name, next.Ref.Version), nil
}

// changeLine carries out edits that end the request for a rotation of a key. Peers must acknowledge
// the version again and later ones anew, see peers.Forget.
func (r *Ring) changeLine(
	ctx context.Context, who audit.Actor, name string, edits []edit, again uint32, events ...audit.Event,
) error {
	return r.Ledger.Update(ctx, func(tx *ledger.Tx) error {
		if err := peers.Forget(tx, name, again); err != nil {
			return err
		}
		if err := tx.Delete(ledger.Meta, requestKeys+name); err != nil {
			return err
		}
		return r.changeIn(tx, who, edits, events...)
	})
}

// activate makes an announced version the active version.
func (r *Ring) activate(ctx context.Context, who audit.Actor, next *Key) error {
	if err := r.Prove(ctx, next); err != nil { // with a lost version nothing of the key would sign any more
		return err
	}
	now := time.Now()
	edits := []edit{{next.Ref(), func(rec *record) { rec.State, rec.Activates, rec.By = Active, now.Unix(), nil }}}
	var retires time.Time
	if old := r.Version(next.Name, next.Version-1); old != nil && old.State == Active {
		retires = now.Add(r.grace(r.settingsOf(next.Name)))
		replaced := func(rec *record) { rec.State, rec.Retires = VerifyOnly, retires.Unix() }
		edits = append(edits, edit{old.Ref(), replaced})
	}
	e := audit.NewKeyRotated(who, next.Ref().String(), next.Info().PublicKey, retires)
	if err := r.changeLine(ctx, who, next.Name, edits, 0, e); err != nil {
		return err
	}
	r.Log.Info("a key was rotated", "key", next.Name, "version", next.Version, requestid.Attr(who.Request))
	r.clearRetry(next.Name)
	r.notify()
	return nil
}

// Archive takes a verify-only version out of use before the end of its grace time: signatures of
// the version are never accepted again.
func (r *Ring) Archive(ctx context.Context, who audit.Actor, name string, version uint32) error {
	return r.run(ctx, who, fmt.Sprintf("archiving key %q", ijson.Clip(name)), func(ctx context.Context) error {
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
	if k.State == Pending { // a pending version goes out of use by the acts on recovery only
		return nil, fmt.Errorf("key %v: %w: it is pending: its turn has not come", k.Ref(), manage.ErrConflict)
	}
	if err := transition(k.State, to, who, audit.KeyStateChanged); err != nil {
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
	now := r.Ledger.Time().Unix()
	change := edit{k.Ref(), func(rec *record) {
		if rec.State = to; to == Archived {
			rec.Retires = min(rec.Retires, now) // peers and operators are told of no later end
		} else if to == Destroyed {
			rec.Envelope = nil
		}
	}}
	return r.change(ctx, who, []edit{change}, stateChanged(who, k, to, reason))
}

func stateChanged(who audit.Actor, k *Key, to State, reason string) audit.Event {
	return audit.NewKeyStateChanged(who, k.Ref().String(), string(k.State), string(to), reason)
}

// Destroy destroys the private key of a version that is out of use: first in the device, then in
// the ledger. After a crash in between, the ledger still has the version, and an operator destroys
// the version once more. The ledger never calls a private key destroyed that still exists.
func (r *Ring) Destroy(ctx context.Context, who audit.Actor, name string, version uint32) error {
	if err := approved(Destroyed, who, audit.KeyStateChanged); err != nil {
		return fmt.Errorf("key %q: %w", ijson.Clip(name), err)
	}
	return r.run(ctx, who, fmt.Sprintf("destroying key %q", ijson.Clip(name)), func(ctx context.Context) error {
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
	if err := approved(Compromised, who, audit.KeyStateChanged); err != nil {
		return fmt.Errorf("key %q: %w", ijson.Clip(name), err)
	}
	if err := manage.CheckReason(reason); err != nil {
		return fmt.Errorf("key %q: %w", ijson.Clip(name), err)
	}
	return r.run(ctx, who, fmt.Sprintf("key %q", ijson.Clip(name)), func(ctx context.Context) error {
		k, err := r.mayBecome(name, version, Compromised, who)
		if err != nil {
			return err
		}
		if err := r.markCompromised(ctx, who, k, reason); err != nil {
			return err
		}
		r.Gate.Enforce()
		r.notify()
		r.Log.Warn("a key is compromised", "key", k.Ref().String(), "operator", who.Name, requestid.Attr(who.Request),
			"reason", reason)
		if k.State != Active || r.Gate.Err() != nil {
			return nil // Keep rotates once the gate is open
		}
		if err := r.activateSuccessor(ctx, who, k); err != nil {
			r.retryLater(who, name, err, time.Time{})
		}
		return nil
	})
}

// markCompromised records that a version is compromised, from then on as news for each peer: see
// announce.go. The same transaction hastens the announced successor of an active version, as any
// change of an announcement, and ends a request for another time.
func (r *Ring) markCompromised(ctx context.Context, who audit.Actor, k *Key, reason string) error {
	edits := []edit{{k.Ref(), func(rec *record) { rec.State, rec.Compromised = Compromised, true }}}
	events := []audit.Event{stateChanged(who, k, Compromised, reason)}
	if k.State != Active {
		return r.change(ctx, who, edits, events...)
	}
	var again uint32
	if next := r.Version(k.Name, k.Version+1); next != nil && next.State == Pending && next.Announced() {
		now := time.Now().Unix()
		edits = append(edits, edit{next.Ref(), func(rec *record) { rec.Activates, rec.Change = now, rec.Change+1 }})
		again = next.Version
	}
	if q, ok := r.Requested(k.Name); ok && q.Ended == "" {
		events = append(events, audit.NewRotationGivenUp(q.By, k.Name, q.Activates, errOvertaken))
	}
	return r.changeLine(ctx, who, k.Name, edits, again, events...)
}

var errOvertaken = errors.New("the active version is compromised: its successor becomes active at once")

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
