package appliance

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"countersign/audit"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
)

// Why nothing is admitted, the gravest first.
const (
	byRollback = iota
	byCounter  // the ledger has not been held against it yet
	byOperator
	closings
)

// close closes the appliance for all requests, or with nil takes that reason away. Other reasons keep it closed.
func (a *Appliance) close(why int, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed[why] = err
	for _, err := range a.closed {
		if err != nil {
			a.ledger.Suspend(err)
			return
		}
	}
	a.ledger.Suspend(nil)
}

// shut says that a reason closes the appliance.
func (a *Appliance) shut(why int) bool {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.closed[why] != nil
}

// operable says why nothing new may be made now: nil, or what closes the appliance.
func (a *Appliance) operable() error {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return errors.Join(a.closed[:]...)
}

// Lock is that an operator has stopped all signing and verifying. It outlives restarts.
type Lock struct {
	By     string    `json:"by"`
	Reason string    `json:"reason"`
	At     time.Time `json:"at"`
}

const lockKey = "lock"

func (l Lock) err() error { return fmt.Errorf("%w by %s: %s", ErrLocked, l.By, l.Reason) }

// loadLock finds out whether the appliance is locked.
func (a *Appliance) loadLock() error {
	var found *Lock
	err := a.ledger.All(ledger.Meta, func(name string, value []byte) error {
		if name != lockKey {
			return nil
		}
		found = new(Lock)
		return json.Unmarshal(value, found)
	})
	if found == nil && a.attended {
		found = &Lock{By: "countersignd", Reason: "it was started, and an operator must unlock it (unattended_start = false)", At: time.Now().UTC()}
	}
	if found != nil {
		a.locked.Store(found)
		a.close(byOperator, found.err())
	}
	return err
}

// Lock stops all signing and verifying until Unlock: when it returns, nothing is admitted any more.
func (a *Appliance) Lock(ctx context.Context, who audit.Actor, reason string) error {
	if err := checkReason(reason); err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	l := Lock{By: who.Name, Reason: reason, At: time.Now().UTC().Truncate(time.Second)}
	lock := func() { a.locked.Store(&l); a.close(byOperator, l.err()) }
	lock() // first: an emergency does not wait for the disk
	return a.act(ctx, a.locking, "locking", func(ctx context.Context) error {
		lock() // again: it may have been unlocked in between
		if err := a.ledger.Update(ctx, func(tx *ledger.Tx) error {
			if err := tx.Put(ledger.Meta, lockKey, encode(l)); err != nil {
				return err
			}
			return tx.Append(entry(audit.Event{Type: audit.Locked, Actor: who, Action: "lock", Outcome: "ok", Metadata: map[string]string{"reason": reason}}))
		}); err != nil {
			return fmt.Errorf("it is locked, but that is not written down, and a restart would unlock it: lock it again: %w", err)
		}
		a.log.Warn("locked: nothing is signed or verified until an operator unlocks it", "operator", who.Name, "reason", reason)
		return nil
	})
}

func (a *Appliance) Unlock(ctx context.Context, who audit.Actor) error {
	return a.act(ctx, a.locking, "unlocking", func(ctx context.Context) error {
		if a.locked.Load() == nil {
			return fmt.Errorf("unlock: %w: it is not locked", ErrConflict)
		}
		if err := a.ledger.Update(ctx, func(tx *ledger.Tx) error {
			if err := tx.Delete(ledger.Meta, lockKey); err != nil {
				return err
			}
			return tx.Append(entry(audit.Event{Type: audit.Unlocked, Actor: who, Action: "unlock", Outcome: "ok"}))
		}); err != nil {
			return err
		}
		a.locked.Store(nil)
		a.close(byOperator, nil)
		a.log.Info("unlocked", "operator", who.Name)
		return nil
	})
}

func checkReason(reason string) error {
	if reason == "" || len(reason) > 500 {
		return fmt.Errorf("%w: a reason of 1 to 500 bytes must be given; it is written down", ErrInvalid)
	}
	return nil
}

// Condition is how the appliance is, as operators know it.
type Condition string

const (
	Operational Condition = "operational"
	Degraded    Condition = "degraded" // it serves, or some of it does, and somebody should look
	LockedUp    Condition = "locked"
	RolledBack  Condition = "rolled-back"
)

// Health says how the appliance is, and why.
type Health struct {
	Condition Condition
	Causes    []string
	Lock      *Lock // nil: not locked
	Attended  bool  // each start waits for an operator
}

// Health says how the appliance is, without asking a device.
func (a *Appliance) Health() Health {
	h := Health{Condition: Operational, Lock: a.locked.Load(), Attended: a.attended}
	add := func(format string, args ...any) { h.Causes = append(h.Causes, fmt.Sprintf(format, args...)) }
	for name, status := range a.Tokens() {
		if !status.Up {
			add("token %s does not serve: %s", name, status.Cause)
		}
	}
	if err := a.ledger.Trouble(); err != nil {
		add("%v", err)
	}
	if _, _, behind := a.ledger.Clock(); behind != nil {
		add("%v", behind)
	}
	a.mu.RLock()
	for name, r := range a.retries {
		add("the rotation of %s is not done: %v", name, r.cause)
	}
	for _, what := range a.lost {
		add("%s", what)
	}
	for _, waits := range []string{a.policyWaits, a.policyBroken, a.retentionWaits} {
		if waits != "" {
			add("%s", waits)
		}
	}
	closed := a.closed
	a.mu.RUnlock()
	slices.Sort(h.Causes)
	if len(h.Causes) > 0 {
		h.Condition = Degraded
	}
	for why, c := range []Condition{RolledBack, Degraded, LockedUp} {
		if closed[why] != nil {
			h.Condition, h.Causes = c, slices.Insert(h.Causes, 0, closed[why].Error())
			break
		}
	}
	return h
}

// canaryDomain keeps what a canary signs from meaning anything: it is no checkpoint, and no transcript.
const canaryDomain = "countersign-canary-v1\x00"

// Canary has the log's key sign something that means nothing: the whole way to the device and back.
func (a *Appliance) Canary(ctx context.Context) error {
	if err := a.operable(); err != nil {
		return err
	}
	k, err := a.LogKey()
	if err != nil {
		return err
	}
	return a.prove(ctx, k)
}

// prove has the device show that it has a private key, which must not come into use without.
func (a *Appliance) prove(ctx context.Context, k *Key) (err error) {
	ctx, cancel := context.WithTimeout(inLane(ctx, ownLane), a.limits.RequestTimeout)
	defer cancel()
	if k.Info().Algorithm == keystore.X25519 {
		err = proveExchange(ctx, k)
	} else {
		message := append([]byte(canaryDomain), make([]byte, 32)...)
		rand.Read(message[len(canaryDomain):])
		_, err = k.sign(ctx, message, func(signature []byte) bool { return k.Info().Verify(message, signature) }, k.inUse)
	}
	if err != nil {
		return fmt.Errorf("prove key %v: %w", k.Info().Ref, err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.lost, k.Info().Ref)
	return nil
}

func proveExchange(ctx context.Context, k *Key) error {
	other, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	public, err := ecdh.X25519().NewPublicKey(k.Info().PublicKey)
	if err != nil {
		return err
	}
	want, err := other.ECDH(public)
	if err != nil {
		return err
	}
	got, err := k.Exchange(ctx, [32]byte(other.PublicKey().Bytes()))
	if err == nil && !bytes.Equal(got[:], want) {
		err = keystore.ErrWrong
	}
	return err
}
