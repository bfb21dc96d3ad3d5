package appliance

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"time"

	"countersign/audit"
	"countersign/internal/ijson"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/transcript"
	"countersign/wire"
)

// A rotation. What holds on disk at any moment, for each line of versions:
//
//   - At most one version is active. A version is followed by the next number, and by no other key than the one whose digest was
//     written down (KeyCommitted) when it came into use or was announced: that key is there, as pending, and is never made anew.
//   - A version that peers have been told of has its step: signed by the version before it, admitted before it was signed, and naming the
//     digest of the one that will follow.
//
// So it goes like this, and each line of it is one transaction:
//
//	announce: the version after the next is made (until the end of this it counts for nothing); the active version signs the step
//	          to the next one; then, at once, the next one has its step and its time, the one after it is pending. Peers are told.
//	activate: at that time the next one is active and the one before is verify-only.
//	archive:  when its grace time is over, or all have acknowledged who must.
//
// What fails before the end of announce has changed nothing.

// Rotate announces the next version of a line, to be active at a time; before now is at once. When ctx ends first, it goes on. What the device
// or the disk has kept from being done is tried again.
func (a *Appliance) Rotate(ctx context.Context, who audit.Actor, name string, at time.Time) (*Key, error) {
	if err := a.operable(); err != nil {
		return nil, fmt.Errorf("key %q: %w", ijson.Clip(name), err)
	}
	var next *Key
	err := a.act(ctx, a.creating, fmt.Sprintf("rotating key %q", ijson.Clip(name)), func(ctx context.Context) (err error) {
		if next, err = a.rotate(ctx, who, name, at); err != nil && !errors.Is(err, ErrConflict) && !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrNotFound) {
			a.wants(name, err)
		}
		return err
	})
	return next, err
}

func (a *Appliance) rotate(ctx context.Context, who audit.Actor, name string, at time.Time) (next *Key, err error) {
	if name == LogName || name == AdminName || name == CAName {
		return nil, fmt.Errorf("key %q: %w: this line of the appliance's own is not rotated", name, ErrInvalid)
	}
	if at.After(time.Now().Add(maxAhead)) {
		return nil, fmt.Errorf("key %q: %w: a version is announced at most %d days before it is active", name, ErrInvalid, maxAhead/(24*time.Hour))
	}
	versions, err := a.Key(name)
	if err != nil {
		return nil, err
	}
	if k := unfollowed(versions); k != nil { // it is overdue
		if err := a.succeed(ctx, who, k); err != nil {
			return nil, err
		}
		return a.ActiveKey(name)
	}
	old, err := a.ActiveKey(name)
	if err != nil {
		return nil, err
	}
	if next := a.version(name, old.Version+1); next != nil && next.announced() {
		return nil, fmt.Errorf("key %q: %w: version %d is announced and will be active at %s", name, ErrConflict, next.Version, next.Activates.UTC().Format(time.RFC3339))
	}
	if name == NoiseName && len(a.noiseKeys()) >= maxAnswering { // a stranger's handshake costs the device an exchange with each
		return nil, fmt.Errorf("key %q: %w: %d versions answer handshakes: archive one, or wait for the end of its grace time", name, ErrConflict, maxAnswering)
	}
	if next, err = a.announce(ctx, who, old, at); err != nil {
		return nil, a.notRotated(ctx, who, old, err)
	}
	if at.After(time.Now()) {
		return next, nil
	}
	if err := a.activate(ctx, who, next); err != nil {
		return nil, fmt.Errorf("version %d of key %q is announced, and not active yet; it is tried again: %w", next.Version, name, err)
	}
	return a.version(next.Name, next.Version), nil
}

const (
	maxAhead     = 366 * 24 * time.Hour // that a version is announced: nothing else can be until it is active
	maxAnswering = 4                    // Noise keys, before another one is made
)

// notRotated writes down that a rotation has failed, and why.
func (a *Appliance) notRotated(ctx context.Context, who audit.Actor, old *Key, why error) error {
	a.log.Error("a key is not rotated; nothing was changed", "key", old.Name, "err", why)
	return errors.Join(why, a.record(ctx, audit.Event{Type: audit.KeyRotationFailed, Actor: who, Action: "key rotate", Resource: old.Info().Ref.String(), Outcome: "failed",
		Metadata: map[string]string{"cause": why.Error()}}))
}

// announce prepares the step from a version, which is active or was found to be compromised, to the next one.
func (a *Appliance) announce(ctx context.Context, who audit.Actor, old *Key, at time.Time) (*Key, error) {
	if now := time.Now(); at.Before(now) {
		at = now
	}
	ref := keystore.Ref{Name: old.Name, Version: old.Version + 1}
	if !signs(old.Name, old.Info().Algorithm) {
		return a.announceOwn(ctx, who, old, ref, at)
	}
	next := a.version(ref.Name, ref.Version)
	if next == nil {
		return nil, fmt.Errorf("key %q: %w: version %d has no successor: make another key", old.Name, ErrConflict, old.Version)
	}
	if err := a.prove(ctx, next); err != nil { // it was made long ago
		return nil, err
	}
	after, err := a.makeNext(ctx, ref, next.Token)
	if err != nil {
		return nil, err
	}
	succession, err := a.endorse(ctx, who, old, next, after, at)
	if err != nil {
		return nil, errors.Join(err, a.clearAway(ctx, after.key.Info().Ref, after.record, "failed"))
	}
	announced := step{ref: ref, change: func(r *keyRecord) { r.Activates, r.Succession = at.Unix(), succession }}
	if err := a.change(ctx, []step{announced, after.as(Pending)}, a.announcement(who, old, next.Info(), at), after.commitment(who)); err != nil {
		return nil, err
	}
	a.wake()
	return a.version(ref.Name, ref.Version), nil
}

// announceOwn does it for a line that nobody follows by its steps.
func (a *Appliance) announceOwn(ctx context.Context, who audit.Actor, old *Key, ref keystore.Ref, at time.Time) (*Key, error) {
	next, err := a.make(ctx, ref, NewKey{Name: old.Name, Algorithm: old.Info().Algorithm, Token: old.Token})
	if err != nil {
		return nil, err
	}
	var authorization *wire.Authorization
	if old.Name == NoiseName && a.identity != "" {
		if authorization, err = a.authorize(ctx, who, next.key.Info()); err != nil {
			return nil, errors.Join(err, a.clearAway(ctx, ref, next.record, "failed"))
		}
	}
	announced := next.as(Pending)
	pending := announced.change
	announced.change = func(r *keyRecord) { pending(r); r.Activates, r.Authorization = at.Unix(), authorization }
	if err := a.change(ctx, []step{announced}, a.announcement(who, old, next.key.Info(), at)); err != nil {
		return nil, err
	}
	a.wake()
	return a.version(ref.Name, ref.Version), nil
}

func (a *Appliance) announcement(who audit.Actor, old *Key, next keystore.Info, at time.Time) audit.Event {
	return audit.Event{Type: audit.RotationAnnounced, Actor: who, Action: "key rotate", Resource: old.Info().Ref.String(), Outcome: "ok", Metadata: map[string]string{
		"version": strconv.FormatUint(uint64(next.Ref.Version), 10), "public_key": hex.EncodeToString(next.PublicKey), "activates_at": strconv.FormatInt(at.Unix(), 10),
		"custody": string(next.Custody), "provenance": next.Provenance.String()}}
}

// activate makes a version that was announced the one that signs.
func (a *Appliance) activate(ctx context.Context, who audit.Actor, next *Key) error {
	if err := a.prove(ctx, next); err != nil { // or nothing of the line would sign any more
		return err
	}
	now := time.Now()
	steps := []step{{ref: next.Info().Ref, change: func(r *keyRecord) { r.State, r.Activates = Active, now.Unix() }}}
	e := audit.Event{Type: audit.KeyRotated, Actor: who, Action: "key rotate", Resource: next.Info().Ref.String(), Outcome: "ok",
		Metadata: map[string]string{"public_key": hex.EncodeToString(next.Info().PublicKey)}}
	if old := a.version(next.Name, next.Version-1); old != nil && old.State == Active {
		retires := now.Add(a.line(next.Name).grace())
		steps = append(steps, step{ref: old.Info().Ref, change: func(r *keyRecord) { r.State, r.Retires = VerifyOnly, retires.Unix() }})
		e.Metadata["retires_at"] = strconv.FormatInt(retires.Unix(), 10)
	}
	if err := a.change(ctx, steps, e); err != nil {
		return err
	}
	a.log.Info("a key was rotated", "key", next.Name, "version", next.Version)
	a.done(next.Name)
	a.wake()
	return nil
}

// Archive takes a version out of use that has been followed: before its grace time is over, nothing that it has signed is accepted any more.
func (a *Appliance) Archive(ctx context.Context, who audit.Actor, name string, version uint32) error {
	return a.act(ctx, a.creating, fmt.Sprintf("archiving key %q", ijson.Clip(name)), func(ctx context.Context) error {
		k, err := a.inState(name, version, VerifyOnly)
		if err != nil {
			return err
		}
		return a.setState(ctx, who, k, Archived, "")
	})
}

// inState returns a version that is in one of the states.
func (a *Appliance) inState(name string, version uint32, states ...State) (*Key, error) {
	k := a.version(name, version)
	if k == nil {
		return nil, fmt.Errorf("key %q, version %d: %w", ijson.Clip(name), version, ErrNotFound)
	}
	for _, s := range states {
		if k.State == s {
			return k, nil
		}
	}
	return nil, fmt.Errorf("key %v: %w: it is %s, and must be %s", k.Info().Ref, ErrConflict, k.State, oneOf(states))
}

func oneOf(states []State) (text string) {
	for i, s := range states {
		if i > 0 {
			text += " or "
		}
		text += string(s)
	}
	return text
}

func (a *Appliance) setState(ctx context.Context, who audit.Actor, k *Key, to State, reason string) error {
	return a.change(ctx, []step{{ref: k.Info().Ref, change: func(r *keyRecord) { r.State = to }}}, stateChanged(who, k, to, reason))
}

func stateChanged(who audit.Actor, k *Key, to State, reason string) audit.Event {
	e := audit.Event{Type: audit.KeyStateChanged, Actor: who, Action: "key state", Resource: k.Info().Ref.String(), Outcome: "ok",
		Metadata: map[string]string{"from": string(k.State), "to": string(to)}}
	if reason != "" {
		e.Metadata["reason"] = reason
	}
	return e
}

// Destroy destroys the private key of a version that is out of use. The device goes first: after a crash the ledger may have a key that is
// gone, which can be destroyed once more, and never says of one that it is gone while it is there.
func (a *Appliance) Destroy(ctx context.Context, who audit.Actor, name string, version uint32) error {
	if who.Proposal == 0 {
		return fmt.Errorf("key %q: %w", ijson.Clip(name), ErrNotApproved)
	}
	return a.act(ctx, a.creating, fmt.Sprintf("destroying key %q", ijson.Clip(name)), func(ctx context.Context) error {
		k, err := a.inState(name, version, Archived, Compromised)
		if err != nil {
			return err
		}
		if err := a.successionDone(k); err != nil {
			return err
		}
		store, err := a.token(k.Token)
		if err != nil {
			return err
		}
		if err := store.Destroy(ctx, k.Info().Ref, k.Info().Tag); err != nil {
			return fmt.Errorf("key %v: %w", k.Info().Ref, err)
		}
		return a.setState(ctx, who, k, Destroyed, "")
	})
}

// successionDone refuses to destroy what its line still needs.
func (a *Appliance) successionDone(k *Key) error {
	if next := a.version(k.Name, k.Version+1); k.State == Compromised && (next == nil || next.State == Pending) {
		return fmt.Errorf("key %v: %w: its successor is not active yet", k.Info().Ref, ErrConflict)
	}
	return nil
}

// Compromise says that somebody else may have the private key of a version. It signs nothing from the moment that this is written down, and nothing
// that it has signed is believed. Where it was the active one, its successor follows it at once; where that can't be done now, it is
// tried until it can, and meanwhile nothing of the line signs.
func (a *Appliance) Compromise(ctx context.Context, who audit.Actor, name string, version uint32, reason string) error {
	if who.Proposal == 0 {
		return fmt.Errorf("key %q: %w", ijson.Clip(name), ErrNotApproved)
	}
	if name == LogName || name == AdminName || name == CAName {
		return fmt.Errorf("key %q: %w: this line of the appliance's own has no successor: make a new appliance", name, ErrInvalid)
	}
	if err := checkReason(reason); err != nil {
		return fmt.Errorf("key %q: %w", ijson.Clip(name), err)
	}
	return a.act(ctx, a.creating, fmt.Sprintf("key %q", ijson.Clip(name)), func(ctx context.Context) error {
		k, err := a.inState(name, version, Active, VerifyOnly, Archived)
		if err != nil {
			return err
		}
		if err := a.condemn(ctx, who, k, reason); err != nil {
			return err
		}
		a.wake()
		a.log.Warn("a key is compromised", "key", k.Info().Ref.String(), "operator", who.Name, "reason", reason)
		if k.State != Active || a.operable() != nil {
			return nil // for the latter keepKeys comes back to it
		}
		if err := a.succeed(ctx, who, k); err != nil {
			a.failed(name, err) // and it is tried again: see keepKeys
		}
		return nil
	})
}

// condemn writes down that a version is compromised. Who has acknowledged its successor has not heard of that yet.
func (a *Appliance) condemn(ctx context.Context, who audit.Actor, k *Key, reason string) error {
	next := k.Version + 1
	return a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		again := map[string]peerRecord{}
		if err := tx.All(ledger.Peers, func(name string, value []byte) error {
			r, _, err := decodePeer(name, value)
			if r.Known[k.Name] == next {
				again[name] = r
			}
			return err
		}); err != nil {
			return err
		}
		for name, r := range again {
			r.Known[k.Name] = k.Version
			if err := tx.Put(ledger.Peers, name, encode(r)); err != nil {
				return err
			}
		}
		tx.OnCommit(func() {
			a.mu.Lock()
			defer a.mu.Unlock()
			for _, m := range a.peers {
				if m.known[k.Name] == next {
					m.known[k.Name] = k.Version
				}
			}
		})
		compromised := func(r *keyRecord) { r.State, r.Compromised = Compromised, true }
		return a.changeIn(tx, []step{{ref: k.Info().Ref, change: compromised}}, stateChanged(who, k, Compromised, reason))
	})
}

// succeed makes the successor of a compromised version active.
func (a *Appliance) succeed(ctx context.Context, who audit.Actor, k *Key) error {
	next := a.version(k.Name, k.Version+1)
	if next == nil || !next.announced() {
		var err error
		if next, err = a.announce(ctx, who, k, time.Now()); err != nil {
			return a.notRotated(ctx, who, k, err)
		}
	}
	return a.activate(ctx, who, next)
}

// endorse has a version sign the step to the next one.
func (a *Appliance) endorse(ctx context.Context, who audit.Actor, old, next *Key, after fresh, at time.Time) (*wire.Succession, error) {
	text := base64.RawURLEncoding.EncodeToString
	digest := (&Key{Key: after.key}).digest()
	payload, err := json.Marshal(map[string]any{"key": old.Name, "version": next.Version, "old_public_key": text(old.Info().PublicKey), "new_public_key": text(next.Info().PublicKey),
		"time": at.Unix(), "next": text(digest[:])})
	if err != nil {
		return nil, err
	}
	doc, signature, err := a.signOwn(ctx, who, old, "key-succession-v1", payload)
	if err != nil {
		return nil, err
	}
	return &wire.Succession{Payload: doc.Payload, Nonce: doc.Nonce, Timestamp: doc.Timestamp, ExpiresAt: doc.ExpiresAt, Signature: signature}, nil
}

// authorize has the identity's key say that a Noise key speaks for it.
func (a *Appliance) authorize(ctx context.Context, who audit.Actor, noise keystore.Info) (*wire.Authorization, error) {
	identity, err := a.signingKey(a.identity)
	if err != nil {
		return nil, fmt.Errorf("the identity that authorises the Noise key: %w: make it, or take noise_identity out of the configuration", err)
	}
	text := base64.RawURLEncoding.EncodeToString
	owner := text(identity.Info().PublicKey)
	last, err := a.ledger.LastNumber(generations("paykit-noise-key-authorization-v1", a.identity))
	if err != nil {
		return nil, err
	}
	generation := max(time.Now().Unix(), int64(min(last, math.MaxInt64-1))+1) // it must rise, whatever the clock does
	payload, err := json.Marshal(map[string]any{"owner": owner, "noise_public_key": owner, "noise_static_public_key": text(noise.PublicKey), "key_generation": generation})
	if err != nil {
		return nil, err
	}
	_, signature, err := a.signOwn(ctx, who, identity, "paykit-noise-key-authorization-v1", payload)
	if err != nil {
		return nil, err
	}
	return &wire.Authorization{Payload: payload, Signature: signature}, nil
}

// signOwn has a document signed that the appliance itself makes. It is admitted before, as any other is; policy is about peers.
func (a *Appliance) signOwn(ctx context.Context, who audit.Actor, k *Key, kind string, payload []byte) (*transcript.Document, []byte, error) {
	now := time.Now().Unix()
	request := transcript.Request{Type: kind, Payload: payload, Timestamp: now, ExpiresAt: now + 3600}
	rand.Read(request.Nonce[:])
	doc, err := transcript.Parse(request)
	if err != nil {
		return nil, nil, err
	}
	if err := doc.CheckSigner(k.Info().PublicKey); err != nil {
		return nil, nil, err
	}
	marks := audit.Event{Actor: who, Action: "sign", Resource: k.Info().Ref.String(), Outcome: "ok", Metadata: metadataOf(doc)}
	admitted, created, failed := audit.OfDocument(kind)
	marks.Type = admitted
	ctx = inLane(ctx, ownLane)
	wait, cancel := context.WithTimeout(ctx, a.limits.RequestTimeout)
	defer cancel()
	admission := ledger.Admission{Scope: ledger.KeyScope(k.Name), Nonce: doc.Nonce, Digest: doc.Digest(), KeyVersion: k.Version, ExpiresAt: doc.ExpiresAt}
	if doc.Generation != nil {
		admission.Monotonic = &ledger.Monotonic{Series: generations(doc.Type, k.Name), Value: *doc.Generation}
		admission.Decide = func([]ledger.Used) ([]byte, error) { return nil, nil } // or the number is not looked at
	}
	got, err := a.ledger.Admit(wait, admission, func(v ledger.Verdict) []byte {
		e := marks
		if v == ledger.Denied {
			e.Type, e.Outcome = audit.SignatureRejected, wire.CodeDenied
		}
		return verdictEvent(e, v)
	})
	if err == nil {
		err = refusal(got)
	}
	if err != nil {
		return nil, nil, err
	}
	// A version that is compromised can still do this one thing: its successor was settled long before.
	anyway := func() error { return nil }
	signature, err := k.sign(wait, doc.Message, func(signature []byte) bool { return k.verify(doc.Message, signature) == nil }, anyway)
	end := audit.Event{Type: created, Actor: who, Action: "sign", Resource: marks.Resource, Outcome: "ok", Metadata: map[string]string{"admission": strconv.FormatUint(got.Event, 10)}}
	k.life.uses.Add(1)
	if err != nil {
		end.Type, end.Outcome, signature = failed, wire.CodeUnavailable, nil
	}
	return doc, signature, errors.Join(err, a.ledger.Settle(context.WithoutCancel(ctx), got, signature, entry(end), nil))
}

// AuthorizeNoise has the identity sign for the Noise key that is in use, anew. The first time, and where the identity has been rotated, keepKeys does.
func (a *Appliance) AuthorizeNoise(ctx context.Context, who audit.Actor) error {
	if a.identity == "" {
		return fmt.Errorf("noise key: %w: the configuration has no noise_identity", ErrConflict)
	}
	return a.act(ctx, a.creating, "authorising the Noise key", func(ctx context.Context) error { return a.authorizeActive(ctx, who) })
}

func (a *Appliance) authorizeActive(ctx context.Context, who audit.Actor) error {
	k, err := a.NoiseKey()
	if err != nil {
		return err
	}
	authorization, err := a.authorize(ctx, who, k.Info())
	if err != nil {
		return err
	}
	return a.change(ctx, []step{{ref: k.Info().Ref, change: func(r *keyRecord) { r.Authorization = authorization }}},
		audit.Event{Type: audit.NoiseKeyAuthorized, Actor: who, Action: "noise authorize", Resource: k.Info().Ref.String(), Outcome: "ok", Metadata: map[string]string{"identity": a.identity}})
}

// unauthorized says that the identity that is configured has not signed for a Noise key, or with a version that is not the present one.
func (a *Appliance) unauthorized(noise *Key) bool {
	identity, err := a.signingKey(a.identity)
	if a.identity == "" || err != nil {
		return false // it is to be made still
	}
	var said struct {
		Owner string `json:"owner"`
	}
	return noise.Authorization == nil || json.Unmarshal(noise.Authorization.Payload, &said) != nil || said.Owner != base64.RawURLEncoding.EncodeToString(identity.Info().PublicKey)
}
