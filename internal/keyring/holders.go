package keyring

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"countersign/audit"
	"countersign/internal/escrow"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/manage"
)

// A recoverable key has an envelope: its seed, sealed for M of N recovery holders (package escrow).
// The invariant:
//
//   - A line is recoverable from its first version on or never, and so is each later version.
//   - The transaction that brings a version of such a line out of the state making also writes its
//     envelope, and the event has the envelope's SHA-256. The key worker that made the seed has
//     opened the envelope before the token got the key. So no version is in use without a copy that
//     opens.
//   - An envelope never changes. A new set of holders is for versions that are made later: nobody
//     can read the old seeds, this program neither.

// holdersKey is the record of the present set of holders, in the table Meta.
const holdersKey = "holders"

// takeHolders updates memory from the record of holders. mu is held.
func (r *Ring) takeHolders(value []byte) error {
	r.holders = escrow.Set{}
	if value == nil {
		return nil
	}
	if err := json.Unmarshal(value, &r.holders); err != nil {
		return fmt.Errorf("the recovery holders in the ledger: %w", err)
	}
	return nil
}

// Holders returns the present set of recovery holders; its number is 0 where there is none.
func (r *Ring) Holders() escrow.Set {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.holders
}

// CheckHolders returns the error that SetHolders would return now.
func (r *Ring) CheckHolders(s escrow.Set) error {
	if err := s.Check(); err != nil {
		return fmt.Errorf("%w: %w", manage.ErrInvalid, err)
	}
	before := r.Holders()
	switch {
	case s.Number != before.Number+1:
		return fmt.Errorf("%w: the present set of recovery holders is number %d: propose again",
			manage.ErrConflict, before.Number)
	case s.SameHolders(before):
		return fmt.Errorf("%w: these are the present recovery holders", manage.ErrConflict)
	}
	return nil
}

// SetHolders replaces the set of recovery holders, for keys that are made from now on.
func (r *Ring) SetHolders(ctx context.Context, who audit.Actor, s escrow.Set) error {
	if who.Proposal == 0 {
		return fmt.Errorf("recovery holders: %w", manage.ErrNotApproved)
	}
	return r.setHolders(ctx, who, s)
}

// FirstHolders names the recovery holders of an appliance without keys, for countersignd init:
// nobody is there yet who could approve.
func (r *Ring) FirstHolders(ctx context.Context, who audit.Actor, s escrow.Set) error {
	if len(r.All()) > 0 {
		return fmt.Errorf("recovery holders: %w: the appliance has keys", manage.ErrConflict)
	}
	return r.setHolders(ctx, who, s)
}

func (r *Ring) setHolders(ctx context.Context, who audit.Actor, s escrow.Set) error {
	return r.run(ctx, who, "recovery holders", func(ctx context.Context) error {
		if err := r.CheckHolders(s); err != nil {
			return err
		}
		return r.Ledger.Update(ctx, func(tx *ledger.Tx) error {
			if err := tx.Put(ledger.Meta, holdersKey, manage.Encode(s)); err != nil {
				return err
			}
			return tx.Append(ledger.EventOf(audit.NewHoldersChanged(who, s.Number, s.Needed, s.Texts())))
		})
	})
}

// mayMakeRecoverable refuses a recoverable key without holders, and an imported one.
func (r *Ring) mayMakeRecoverable(n NewKey) error {
	switch {
	case n.Seed != "":
		return fmt.Errorf("%w: an imported seed has a copy elsewhere already: a recoverable key is made by the "+
			"appliance", manage.ErrInvalid)
	case r.Holders().Number == 0:
		return fmt.Errorf("%w: there are no recovery holders yet: countersign admin holders set", manage.ErrConflict)
	}
	return nil
}

// seal has a token make a recoverable key.
func (r *Ring) seal(
	ctx context.Context, store keystore.Store, ref keystore.Ref, alg keystore.Algorithm, tag keystore.Tag,
) (keystore.Key, []byte, error) {
	able, ok := store.(escrow.Store)
	if !ok {
		return nil, nil, fmt.Errorf("%w: this token takes no seed", keystore.ErrRefused)
	}
	holders := r.Holders()
	if holders.Number == 0 {
		return nil, nil, errors.New("there are no recovery holders in the ledger")
	}
	return able.Seal(ctx, ref, alg, tag, holders)
}

// Recoverable lists the versions whose private keys holders could bring back and that are still of
// use: those that sign or will sign, and those whose signatures are accepted.
func Recoverable(all []*Key) (some []*Key) {
	for _, k := range all {
		if len(k.Envelope) > 0 && !k.Compromised && !k.State.outOfUse() {
			some = append(some, k)
		}
	}
	return some
}
