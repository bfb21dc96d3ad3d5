package appliance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"countersign/audit"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
)

// Anchor binds the ledger to a counter that only rises, so that an older copy of it in its place is noticed: it would have
// forgotten nonces.
//
// What holds, on disk and in the device, at any moment: counter <= recorded <= counter + 1. To rise, the ledger records the
// new value first, durably, and then the counter rises. So a ledger that records less than the counter says is older than
// the last rise, and one that records more than one above it was written with another counter. What the copy of a ledger
// can hide is what was admitted since the last rise before it was made.
type Anchor struct {
	Token      string        // the counter's; empty: the ledger is bound to nothing
	Interval   time.Duration // after which the counter rises, if there were admissions
	Admissions uint64        // after which it rises sooner, but not within leastInterval
}

// leastInterval bounds what admissions wear the counter's memory: 105,120 rises a year at the most.
const leastInterval = 5 * time.Minute

// due says whether the counter is to rise, so many admissions and so long after the last time.
func (a Anchor) due(admitted uint64, since time.Duration) bool {
	return admitted > 0 && (since >= a.Interval || admitted >= a.Admissions && since >= leastInterval)
}

var (
	// ErrRolledBack refuses everything that a ledger which has forgotten something must not do.
	ErrRolledBack = errors.New("the ledger is older than the counter that it is bound to")
	errUnchecked  = fmt.Errorf("%w: the ledger has not been held against its counter yet", keystore.ErrUnavailable)
)

// anchorRecord is what the ledger knows of its counter.
type anchorRecord struct {
	Token string `json:"token"`
	Value uint64 `json:"value"`
}

// Rollback says that the ledger is not the one that it should be. It stays until an operator accepts that.
type Rollback struct {
	Ledger  uint64    `json:"ledger"`  // the value that it records
	Counter uint64    `json:"counter"` // the value that the counter has
	Reason  string    `json:"reason"`
	At      time.Time `json:"at"`
}

const (
	anchorKey   = "anchor"
	rollbackKey = "rollback"
)

func (a *Appliance) counter() (keystore.Counter, error) {
	store, err := a.token(a.anchor.Token)
	if err != nil {
		return nil, err
	}
	counter, ok := store.(keystore.Counter)
	if !ok {
		return nil, fmt.Errorf("token %q has no counter", a.anchor.Token)
	}
	return counter, nil
}

// anchorRecords returns what the ledger knows of its counter and of a rollback; nil where there is nothing.
func (a *Appliance) anchorRecords() (bound *anchorRecord, rolled *Rollback, err error) {
	err = a.ledger.All(ledger.Meta, func(name string, value []byte) error {
		switch name {
		case anchorKey:
			bound = new(anchorRecord)
			return json.Unmarshal(value, bound)
		case rollbackKey:
			rolled = new(Rollback)
			return json.Unmarshal(value, rolled)
		}
		return nil
	})
	return bound, rolled, err
}

// BindLedger binds a ledger to its counter that is bound to none yet: an act of init, since a ledger that says nothing of
// its counter may be any.
func (a *Appliance) BindLedger(ctx context.Context, who audit.Actor) error {
	if a.anchor.Token == "" {
		return nil
	}
	bound, _, err := a.anchorRecords()
	if err != nil || bound != nil {
		return err
	}
	counter, err := a.counter()
	if err != nil {
		return err
	}
	if err := counter.DefineCounter(ctx); err != nil {
		return err
	}
	value, err := counter.ReadCounter(ctx)
	if err != nil {
		return err
	}
	return a.setAnchor(ctx, value, func(tx *ledger.Tx) error {
		return tx.Append(entry(audit.Event{Type: audit.LedgerBound, Actor: who, Action: "bind", Resource: a.anchor.Token, Outcome: "ok",
			Metadata: map[string]string{"counter": strconv.FormatUint(value, 10)}}))
	})
}

// setAnchor records the counter's value, with whatever else belongs into that transaction.
func (a *Appliance) setAnchor(ctx context.Context, value uint64, also func(*ledger.Tx) error) error {
	return a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		if err := tx.Put(ledger.Meta, anchorKey, encode(anchorRecord{a.anchor.Token, value})); err != nil || also == nil {
			return err
		}
		return also(tx)
	})
}

// checkAnchor holds the ledger against its counter, and lets it admit when it is the newest. The error is ErrRolledBack
// where it is not.
func (a *Appliance) checkAnchor(ctx context.Context) error {
	bound, rolled, err := a.anchorRecords()
	switch {
	case err != nil:
		return err
	case rolled != nil: // found before, and not accepted: whatever the counter says now
		a.close(byRollback, ErrRolledBack)
		return ErrRolledBack
	case a.anchor.Token == "" && bound == nil:
		a.anchorIsSound()
		return nil
	case a.anchor.Token == "":
		return a.rolledBack(ctx, bound, 0, fmt.Sprintf("the ledger is bound to the counter of token %q, and the configuration has no rollback_token", bound.Token))
	}
	counter, err := a.counter()
	if err != nil {
		return err
	}
	value, err := counter.ReadCounter(ctx)
	switch {
	case errors.Is(err, keystore.ErrNotFound):
		return a.rolledBack(ctx, bound, value, "the counter is gone: the TPM was cleared, or is another")
	case err != nil:
		return err
	case bound == nil:
		return a.rolledBack(ctx, bound, value, "the ledger is bound to no counter, so it may be any; one that was never bound is bound by countersignd init")
	case bound.Token != a.anchor.Token:
		return a.rolledBack(ctx, bound, value, fmt.Sprintf("the ledger is bound to the counter of token %q", bound.Token))
	case bound.Value < value:
		return a.rolledBack(ctx, bound, value, "the ledger is an older copy: what was admitted since it was made is forgotten")
	case bound.Value > value+1:
		return a.rolledBack(ctx, bound, value, "the counter is behind the ledger: its device was set back, or is another")
	}
	if err := a.rise(ctx, counter, value); err != nil {
		return err
	}
	a.anchorIsSound()
	return nil
}

func (a *Appliance) anchorIsSound() {
	a.close(byRollback, nil)
	a.close(byCounter, nil)
}

// rolledBack writes down what was found, and lets nothing be admitted.
func (a *Appliance) rolledBack(ctx context.Context, bound *anchorRecord, value uint64, reason string) error {
	r := Rollback{Counter: value, Reason: reason, At: time.Now().UTC().Truncate(time.Second)}
	if bound != nil {
		r.Ledger = bound.Value
	}
	a.close(byRollback, ErrRolledBack)
	a.log.Error("rollback detected: nothing is signed or verified until an operator accepts it (countersign admin rollback)", "reason", reason, "ledger", r.Ledger, "counter", r.Counter)
	err := a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		if err := tx.Put(ledger.Meta, rollbackKey, encode(r)); err != nil {
			return err
		}
		return tx.Append(entry(audit.Event{Type: audit.RollbackDetected, Actor: audit.Daemon(), Action: "start", Outcome: "refused", Metadata: map[string]string{
			"reason": reason, "ledger": strconv.FormatUint(r.Ledger, 10), "counter": strconv.FormatUint(r.Counter, 10)}}))
	})
	return errors.Join(ErrRolledBack, err)
}

// startAnchor checks the anchor at start. Where its device does not answer, admissions wait until it does.
func (a *Appliance) startAnchor(ctx context.Context) (checked bool, err error) {
	err = a.checkAnchor(ctx)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, ErrRolledBack):
		return false, nil
	case errors.Is(err, keystore.ErrUnavailable), errors.Is(err, keystore.ErrSealed), errors.Is(err, keystore.ErrAuth):
		a.close(byCounter, errUnchecked)
		a.log.Error("the ledger can't be held against its counter; nothing is admitted until that is done", "token", a.anchor.Token, "err", err)
		return false, nil
	}
	return false, err
}

// rise makes the counter rise from value. It rises twice where a first try got lost; then the ledger records that.
func (a *Appliance) rise(ctx context.Context, counter keystore.Counter, value uint64) error {
	if err := a.setAnchor(ctx, value+1, nil); err != nil {
		return err
	}
	now, err := counter.IncrementCounter(ctx)
	if err == nil && now > value+1 {
		err = a.setAnchor(ctx, now, nil)
	}
	return err
}

// keepAnchored checks the anchor until that has been possible, and makes the counter rise from time to time, until ctx ends.
func (a *Appliance) keepAnchored(ctx context.Context) {
	said := false
	failed := func(err error) {
		if !said && ctx.Err() == nil {
			a.log.Error("the counter that the ledger is bound to can't be used; it is tried again", "token", a.anchor.Token, "err", err)
		}
		said = true
	}
	risen, admitted := time.Now(), a.ledger.Admitted()
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if !a.anchored {
			switch err := a.checkAnchor(ctx); {
			case err == nil:
				a.anchored, said, risen = true, false, time.Now()
			case !errors.Is(err, ErrRolledBack): // else it waits for an operator
				failed(err)
			}
			continue
		}
		if !a.anchor.due(a.ledger.Admitted()-admitted, time.Since(risen)) {
			continue
		}
		if err := a.advance(ctx); err != nil {
			failed(err)
			continue
		}
		said, risen, admitted = false, time.Now(), a.ledger.Admitted()
	}
}

// advance makes the counter of a ledger that is the newest rise by one.
func (a *Appliance) advance(ctx context.Context) error {
	counter, err := a.counter()
	if err != nil {
		return err
	}
	value, err := counter.ReadCounter(ctx)
	if err != nil {
		return err
	}
	return a.rise(ctx, counter, value)
}

// Rollback returns what was found, or nil.
func (a *Appliance) Rollback() (*Rollback, error) {
	_, rolled, err := a.anchorRecords()
	return rolled, err
}

// AcceptRollback lets the ledger admit again, as it is. The operator knows which nonces it may have forgotten.
func (a *Appliance) AcceptRollback(ctx context.Context, who audit.Actor, reason string) error {
	if err := checkReason(reason); err != nil {
		return fmt.Errorf("rollback: %w", err)
	}
	return a.act(ctx, a.enrolling, "accept a rollback", func(ctx context.Context) error {
		rolled, err := a.Rollback()
		if err != nil {
			return err
		}
		if rolled == nil {
			return fmt.Errorf("rollback: %w: none was found", ErrNotFound)
		}
		var value uint64
		record := func(tx *ledger.Tx) error { return tx.Delete(ledger.Meta, anchorKey) }
		if a.anchor.Token != "" {
			counter, err := a.counter()
			if err != nil {
				return err
			}
			if err := counter.DefineCounter(ctx); err != nil {
				return err
			}
			if value, err = counter.ReadCounter(ctx); err != nil {
				return err
			}
			record = func(tx *ledger.Tx) error {
				return tx.Put(ledger.Meta, anchorKey, encode(anchorRecord{a.anchor.Token, value}))
			}
		}
		err = a.ledger.Update(ctx, func(tx *ledger.Tx) error {
			if err := errors.Join(record(tx), tx.Delete(ledger.Meta, rollbackKey)); err != nil {
				return err
			}
			return tx.Append(entry(audit.Event{Type: audit.RollbackAccepted, Actor: who, Action: "rollback accept", Outcome: "ok", Metadata: map[string]string{
				"reason": reason, "ledger": strconv.FormatUint(rolled.Ledger, 10), "counter": strconv.FormatUint(value, 10)}}))
		})
		if err != nil {
			return err
		}
		a.log.Warn("a rollback was accepted", "operator", who.Name, "reason", reason)
		return a.checkAnchor(ctx) // which lets it admit
	})
}
