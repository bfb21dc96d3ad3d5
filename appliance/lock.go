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
)

// ErrLocked refuses what a locked appliance does not do.
var ErrLocked = errors.New("the appliance is locked")

// Lock is an operator's stop of all signing and verifying. It outlives restarts.
type Lock struct {
	By     string    `json:"by"`
	Reason string    `json:"reason"`
	At     time.Time `json:"at"`
}

const lockKey = "lock"

// setLock lets memory say that the appliance is locked; nil: that it is not.
func (a *Appliance) setLock(l *Lock) {
	a.locked.Store(l)
	if l == nil {
		a.gate.Unblock(gate.Operator)
		return
	}
	a.gate.Block(gate.Operator, fmt.Errorf("%w by %s: %s", ErrLocked, l.By, l.Reason))
}

// takeLock lets memory say what the record says.
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

// Lock stops all signing and verifying until Unlock: when it returns, nothing is admitted any more.
func (a *Appliance) Lock(ctx context.Context, who audit.Actor, reason string) error {
	if err := manage.CheckReason(reason); err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	l := &Lock{By: who.Name, Reason: reason, At: time.Now().UTC().Truncate(time.Second)}
	a.setLock(l) // before the disk says so: an emergency does not wait for it
	return a.locking.Run(ctx, a.log, "locking", func(ctx context.Context) error {
		a.setLock(l) // again: an operator may have unlocked it in between
		if err := a.ledger.Update(ctx, func(tx *ledger.Tx) error {
			if err := tx.Put(ledger.Meta, lockKey, manage.Encode(l)); err != nil {
				return err
			}
			return tx.Append(ledger.EventOf(audit.NewLocked(who, reason)))
		}); err != nil {
			return fmt.Errorf("it is locked, but that is not written down, and a restart would unlock it: lock it again: %w", err)
		}
		a.log.Warn("locked: nothing is signed or verified until an operator unlocks it", "operator", who.Name, "reason", reason)
		return nil
	})
}

// Unlock ends a lock.
func (a *Appliance) Unlock(ctx context.Context, who audit.Actor) error {
	return a.locking.Run(ctx, a.log, "unlocking", func(ctx context.Context) error {
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
		a.log.Info("unlocked", "operator", who.Name)
		return nil
	})
}
