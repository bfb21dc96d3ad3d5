package appliance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"countersign/audit"
	"countersign/internal/gate"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/requestid"
)

// ErrLocked refuses requests to a locked appliance.
var ErrLocked = errors.New("the appliance is locked")

// Lock is an operator's stop of all signing and verifying. A lock outlives restarts.
type Lock struct {
	By     string    `json:"by"`
	Reason string    `json:"reason"`
	At     time.Time `json:"at"`
}

const lockKey = "lock"

// setLock sets the lock in memory. nil is no lock.
func (a *Appliance) setLock(l *Lock) {
	a.locked.Store(l)
	if l == nil {
		a.gate.Unblock(gate.Operator)
		return
	}
	a.gate.Block(gate.Operator, fmt.Errorf("%w by %s: %s", ErrLocked, l.By, l.Reason))
}

// takeLock updates memory from the record of the lock.
func (a *Appliance) takeLock(value []byte) error {
	if value == nil {
		a.setLock(nil)
		return nil
	}
	l := new(Lock)
	if err := json.Unmarshal(value, l); err != nil {
		return err
	}
	a.setLock(l)
	return nil
}

// Lock stops all signing and verifying until Unlock. The ledger admits nothing from the moment of
// the call: an emergency does not wait for the disk. When Lock has returned, also with an error, no
// key is used for a peer, and no signature and no confirmation is released. Lock does not wait for
// a device, and waits at most Limits.WriteTimeout for a peer that does not read its answer. After
// an error a restart may unlock the appliance.
func (a *Appliance) Lock(ctx context.Context, who audit.Actor, reason string) error {
	if err := manage.CheckReason(reason); err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	l := &Lock{By: who.Name, Reason: reason, At: time.Now().UTC().Truncate(time.Second)}
	a.setLock(l)
	defer a.gate.Enforce()
	return a.locking.Run(ctx, a.log.With(requestid.Attr(who.Request)), "locking", func(ctx context.Context) error {
		a.setLock(l) // again, because an act before this one may have unlocked the appliance
		if err := a.ledger.Update(ctx, func(tx *ledger.Tx) error {
			if err := tx.Put(ledger.Meta, lockKey, manage.Encode(l)); err != nil {
				return err
			}
			return tx.Append(ledger.EventOf(audit.NewLocked(who, reason)))
		}); err != nil {
			return fmt.Errorf("the appliance is locked, but the ledger does not have the lock, "+
				"and a restart would unlock it: lock again: %w", err)
		}
		a.log.Warn("locked: nothing is signed or verified until an operator unlocks the appliance",
			"operator", who.Name, requestid.Attr(who.Request),
			"reason", reason)
		return nil
	})
}

// Unlock ends a lock. The error is manage.ErrConflict for an unlocked appliance.
func (a *Appliance) Unlock(ctx context.Context, who audit.Actor) error {
	return a.locking.Run(ctx, a.log.With(requestid.Attr(who.Request)), "unlocking", func(ctx context.Context) error {
		if a.locked.Load() == nil {
			return fmt.Errorf("unlock: %w: it is not locked", manage.ErrConflict)
		}
		if err := a.ledger.Update(ctx, func(tx *ledger.Tx) error {
			if err := tx.Delete(ledger.Meta, lockKey); err != nil {
				return err
			}
			return tx.Append(ledger.EventOf(audit.NewUnlocked(who)))
		}); err != nil {
			return err
		}
		a.log.Info("unlocked", "operator", who.Name, requestid.Attr(who.Request))
		return nil
	})
}
