package keyring

import (
	"context"
	"fmt"
	"time"

	"countersign/audit"
	"countersign/internal/ijson"
	"countersign/internal/keystore"
	"countersign/internal/manage"
	"countersign/internal/requestid"
	"countersign/transcript"
)

// A line of versions whose keys are in one token ends with the token. A recovery successor lets the
// line go on: a pending version, with its own successor, on another token, which may lie in a safe
// and be absent from the configuration. The invariant:
//
//   - The line commits to the recovery successor before the loss: in the log (KeyCommitted), to
//     peers that pin the line, and in each step. A peer takes a commitment that a step changes only
//     when the next step repeats it, see client.KeyLine. So a thief of one private key can't name a
//     recovery successor of his own.
//   - A line has one recovery successor at the most. Another one takes its place in one
//     transaction.
//   - The recovery successor comes into use by an approved act only, and only while the line can't
//     go on by itself. The same transaction ends the active version as a rotation does, and takes
//     what was pending on the lost token out of use: should the token come back, the line has one
//     active version.

// recoveryBlock is the distance between the numbers of recovery successors: the number is the next
// multiple. So it is above all versions that rotations may make until the loss, and the versions of
// a line are in order.
const recoveryBlock = 1_000_000

// Recovery returns the recovery successor of a key, or nil.
func (r *Ring) Recovery(name string) *Key {
	r.mu.RLock()
	defer r.mu.RUnlock()
	var first *Key
	for ref, k := range r.keys {
		if ref.Name == name && k.forRecovery() && (first == nil || ref.Version < first.Version) {
			first = k
		}
	}
	return first
}

// forRecovery reports that a version is a recovery successor, or the version after it.
func (k *Key) forRecovery() bool { return k.Recovery && k.State == Pending }

// RecoveryCommitment returns the commitment of a key to its recovery successor, if it has one.
func (r *Ring) RecoveryCommitment(name string) (commitment [32]byte, ok bool) {
	k := r.Recovery(name)
	if k == nil {
		return commitment, false
	}
	next, ok := r.Next(k)
	return transcript.RecoveryCommitment(k.Version, [32]byte(k.Info().PublicKey), next), ok
}

// CheckRecovery returns the error that MakeRecovery would return now: the device is not asked.
func (r *Ring) CheckRecovery(name, token string) error {
	active, err := r.Active(name)
	if err != nil {
		return err
	}
	if !active.Signs() {
		return fmt.Errorf("key %q: %w: recovery successors are for signing keys of ed25519", name, manage.ErrInvalid)
	}
	if _, err := r.Tokens.Get(token); err != nil {
		return fmt.Errorf("key %q: %w", name, err)
	}
	next := r.Version(name, active.Version+1)
	if token == active.Token || next != nil && token == next.Token {
		return fmt.Errorf("key %q: %w: token %s has the key itself: a recovery successor outlives the loss of a token "+
			"on another one", name, manage.ErrInvalid, token)
	}
	return nil
}

// MakeRecovery makes the recovery successor of a key and its successor on another token. The
// versions of an earlier one are archived.
func (r *Ring) MakeRecovery(ctx context.Context, who audit.Actor, name, token string) error {
	if who.Proposal == 0 {
		return fmt.Errorf("key %q: %w", ijson.Clip(name), manage.ErrNotApproved)
	}
	if err := r.Gate.Err(); err != nil {
		return fmt.Errorf("key %q: %w", ijson.Clip(name), err)
	}
	what := fmt.Sprintf("a recovery successor of key %q", ijson.Clip(name))
	return r.run(ctx, who, what, func(ctx context.Context) error { return r.makeRecovery(ctx, who, name, token) })
}

func (r *Ring) makeRecovery(ctx context.Context, who audit.Actor, name, token string) error {
	if err := r.CheckRecovery(name, token); err != nil {
		return err
	}
	active, err := r.Active(name)
	if err != nil {
		return err
	}
	versions, err := r.Versions(name)
	if err != nil {
		return err
	}
	var edits []edit
	var replaced string
	last := versions[len(versions)-1].Version
	for _, k := range versions {
		if k.forRecovery() {
			if replaced == "" {
				replaced = k.Ref().String()
			}
			edits = append(edits, edit{k.Ref(), func(rec *record) { rec.State, rec.Recovery = Archived, false }})
		}
	}
	unfinished, err := r.unfinished()
	if err != nil {
		return err
	}
	for ref := range unfinished { // on a token that may never answer again
		if ref.Name == name {
			last = max(last, ref.Version)
		}
	}
	number := (last/recoveryBlock + 1) * recoveryBlock
	ref := keystore.Ref{Name: name, Version: number}
	first, next, err := r.makePair(ctx, who, ref, NewKey{
		Name: name, Algorithm: keystore.Ed25519, Token: token, Recoverable: active.Info().Custody.Recoverable(),
	})
	if err != nil {
		return err
	}
	commitment := transcript.RecoveryCommitment(number, [32]byte(first.info.PublicKey), next.digest())
	for _, n := range []newVersion{first, next} {
		pending := n.as(Pending)
		edits = append(edits, edit{pending.ref, func(rec *record) {
			pending.change(rec)
			rec.Recovery = true
		}})
	}
	e := audit.NewRecoveryCommitted(who, active.Ref().String(), number, replaced, commitment, first.facts())
	return r.change(ctx, who, edits, e, next.commitment(who))
}

// CheckRecover returns the error that RecoverLine would return now: the devices are not asked.
func (r *Ring) CheckRecover(name string) error {
	_, _, err := r.mayRecover(name)
	return err
}

// mayRecover returns the version that was the last to sign, and the recovery successor.
func (r *Ring) mayRecover(name string) (last, successor *Key, err error) {
	versions, err := r.Versions(name)
	if err != nil {
		return nil, nil, err
	}
	for _, k := range versions {
		if k.State == Active {
			last = k
		}
	}
	if last == nil {
		last = withoutSuccessor(versions)
	}
	successor = r.Recovery(name)
	switch {
	case successor == nil:
		return nil, nil, fmt.Errorf("key %q: %w: it has no recovery successor, and its line ends with its token",
			name, manage.ErrConflict)
	case last == nil:
		return nil, nil, fmt.Errorf("key %q: %w: it has no version that signs, and none that is compromised",
			name, manage.ErrConflict)
	}
	if _, err := r.Tokens.Get(successor.Token); err != nil {
		return nil, nil, fmt.Errorf("key %q: its recovery successor %v: %w: put the token into the configuration, "+
			"and start the daemon anew", name, successor.Ref(), err)
	}
	return last, successor, nil
}

// RecoverLine makes the recovery successor of a key the active version, after the loss of the token
// of the active version. A line that can go on by itself is refused.
func (r *Ring) RecoverLine(ctx context.Context, who audit.Actor, name, reason string) error {
	if who.Proposal == 0 {
		return fmt.Errorf("key %q: %w", ijson.Clip(name), manage.ErrNotApproved)
	}
	if err := manage.CheckReason(reason); err != nil {
		return fmt.Errorf("key %q: %w", ijson.Clip(name), err)
	}
	if err := r.Gate.Err(); err != nil {
		return fmt.Errorf("key %q: %w", ijson.Clip(name), err)
	}
	return r.run(ctx, who, fmt.Sprintf("recovering key %q", ijson.Clip(name)), func(ctx context.Context) error {
		return r.recoverLine(ctx, who, name, reason)
	})
}

func (r *Ring) recoverLine(ctx context.Context, who audit.Actor, name, reason string) error {
	last, successor, err := r.mayRecover(name)
	if err != nil {
		return err
	}
	if r.goesOn(ctx, last) {
		return fmt.Errorf("key %q: %w: version %d and its successor are on token %s, which answers: rotate the key",
			name, manage.ErrConflict, last.Version, last.Token)
	}
	after := r.Version(name, successor.Version+1)
	if after == nil {
		return fmt.Errorf("key %v in the ledger has no successor: restore the ledger from a backup", successor.Ref())
	}
	for _, k := range []*Key{successor, after} {
		if err := r.Prove(ctx, k); err != nil {
			return err
		}
	}
	now := time.Now()
	step, err := r.endorse(ctx, who, last, successor, after.digest(), now)
	if err != nil {
		return err
	}
	change, again, retires := last.Change, uint32(0), time.Time{}
	edits := []edit{{after.Ref(), func(rec *record) { rec.Recovery = false }}}
	var ended string
	if last.State == Active {
		retires = now.Add(r.grace(r.settingsOf(name)))
		replaced := func(rec *record) { rec.State, rec.Retires = VerifyOnly, retires.Unix() }
		edits = append(edits, edit{last.Ref(), replaced})
	}
	// The versions that were to follow go out of use. An announcement is void, so that no late
	// acknowledgement counts.
	void := func(rec *record) { rec.State, rec.Activates, rec.By = Archived, 0, nil }
	for version := last.Version + 1; ; version++ {
		next := r.Version(name, version)
		if next == nil || next.State != Pending || next.Recovery {
			break
		}
		if ended == "" {
			again, ended = next.Version, next.Ref().String()
		}
		change = max(change, next.Change)
		edits = append(edits, edit{next.Ref(), void})
	}
	edits = append(edits, edit{successor.Ref(), func(rec *record) {
		rec.State, rec.Activates, rec.Change, rec.Succession, rec.Recovery = Active, now.Unix(), change, step, false
	}})
	e := audit.NewKeyRecovered(who, successor.Ref().String(), last.Ref().String(), ended, reason,
		successor.Info().PublicKey, retires)
	if err := r.changeLine(ctx, who, name, edits, again, e); err != nil {
		return err
	}
	r.Log.Warn("a key goes on with its recovery successor", "key", name, "version", successor.Version,
		"operator", who.Name, requestid.Attr(who.Request), "reason", reason)
	r.Gate.Enforce()
	r.clearRetry(name)
	r.notify()
	return nil
}

// goesOn reports that a version can still sign the step to its successor, which answers too. The
// states do not matter: also a compromised version signs this step.
func (r *Ring) goesOn(ctx context.Context, last *Key) bool {
	next := r.Version(last.Name, last.Version+1)
	if next == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, r.RequestTimeout)
	defer cancel()
	always := func() error { return nil }
	return last.signCanary(ctx, always) == nil && next.signCanary(ctx, always) == nil
}

// before returns the version that a version follows in its line, or nil. The caller holds mu.
func (r *Ring) before(k *Key) (last *Key) {
	if k.Version%recoveryBlock != 0 {
		return r.keys[keystore.Ref{Name: k.Name, Version: k.Version - 1}]
	}
	for ref, other := range r.keys {
		signed := other.Compromised && !other.neverUsed() || !other.Retires.IsZero()
		if ref.Name == k.Name && ref.Version < k.Version && signed && (last == nil || ref.Version > last.Version) {
			last = other
		}
	}
	return last
}
