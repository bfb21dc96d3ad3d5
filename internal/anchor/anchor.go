// Package anchor binds the ledger to a monotonic counter, so that an older copy of the ledger in its
// place is noticed: such a copy would have forgotten nonces.
//
// The invariant, on disk and in the device, at any moment: counter <= recorded <= counter + 1. For an
// increment the ledger records the new value first, durably, and then the counter is incremented. So a
// ledger that records less than the counter says is older than the last increment, and a ledger that
// records more than one above it was written with another counter. A copy of the ledger can hide what
// was admitted since the last increment before the copy was made.
package anchor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"countersign/audit"
	"countersign/internal/gate"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/resource"
)

// Config says which counter the ledger is bound to, and how often it is incremented.
type Config struct {
	Token      string        // that has the counter; empty: the ledger is bound to nothing
	Interval   time.Duration // after which the counter is incremented, if there were admissions
	Admissions uint64        // after which it is incremented sooner, but not within leastInterval
}

// leastInterval bounds how much admissions wear the counter's memory: 105,120 increments a year at the
// most.
const leastInterval = 5 * time.Minute

// due reports whether the counter is to be incremented, so many admissions and so long after the last
// time.
func (c Config) due(admitted uint64, since time.Duration) bool {
	return admitted > 0 && (since >= c.Interval || admitted >= c.Admissions && since >= leastInterval)
}

var (
	// ErrRolledBack refuses everything that a ledger which has forgotten something must not do.
	ErrRolledBack = errors.New("the ledger is older than the counter that it is bound to")
	errUnchecked  = fmt.Errorf("%w: the ledger has not been held against its counter yet", keystore.ErrUnavailable)
)

// record is what the ledger knows of its counter.
type record struct {
	Token string `json:"token"`
	Value uint64 `json:"value"`
}

// Rollback says that the ledger is not the one that it should be. It stays until an operator accepts it.
type Rollback struct {
	Ledger  uint64    `json:"ledger"`  // the value that the ledger records
	Counter uint64    `json:"counter"` // the value of the counter
	Reason  string    `json:"reason"`
	At      time.Time `json:"at"`
}

const (
	anchorKey   = "anchor"
	rollbackKey = "rollback"
)

// Anchor holds a ledger against its counter. Its methods are called by one goroutine at a time, except
// Rollback and Accept.
type Anchor struct {
	Config
	ledger    *ledger.Ledger
	tokens    manage.Tokens
	gate      *gate.Gate
	monitor   *resource.Monitor
	log       *slog.Logger
	accepting manage.Lock
	checked   bool // the ledger has been held against its counter; of Start, then of Keep, then of Stop
}

// New returns the anchor of a ledger.
func New(c Config, l *ledger.Ledger, tokens manage.Tokens, g *gate.Gate, m *resource.Monitor, log *slog.Logger) *Anchor {
	return &Anchor{Config: c, ledger: l, tokens: tokens, gate: g, monitor: m, log: log, accepting: manage.NewLock()}
}

func (a *Anchor) counter() (keystore.Counter, error) {
	store, err := a.tokens.Get(a.Token)
	if err != nil {
		return nil, err
	}
	counter, ok := store.(keystore.Counter)
	if !ok {
		return nil, fmt.Errorf("token %q has no counter", a.Token)
	}
	return counter, nil
}

// read reads a record of the table Meta; nil: there is none.
func read[T any](l *ledger.Ledger, key string) (*T, error) {
	value, err := l.Get(ledger.Meta, key)
	if err != nil || value == nil {
		return nil, err
	}
	rec := new(T)
	return rec, json.Unmarshal(value, rec)
}

// Bind binds a ledger to its counter that is bound to none yet. Only init does so, since a ledger that
// says nothing of its counter may be any.
func (a *Anchor) Bind(ctx context.Context, who audit.Actor) error {
	if a.Token == "" {
		return nil
	}
	bound, err := read[record](a.ledger, anchorKey)
	if err != nil || bound != nil {
		return err
	}
	counter, err := a.counter()
	if err != nil {
		return err
	}
	value, err := define(ctx, counter)
	if err != nil {
		return err
	}
	return a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		if err := a.put(tx, value); err != nil {
			return err
		}
		return tx.Append(ledger.EventOf(audit.NewLedgerBound(who, a.Token, value)))
	})
}

// define makes a counter, unless there is one, and reads it.
func define(ctx context.Context, counter keystore.Counter) (uint64, error) {
	if err := counter.DefineCounter(ctx); err != nil {
		return 0, err
	}
	return counter.ReadCounter(ctx)
}

func (a *Anchor) put(tx *ledger.Tx, value uint64) error {
	return tx.Put(ledger.Meta, anchorKey, manage.Encode(record{a.Token, value}))
}

// check holds the ledger against its counter, and lets the ledger admit when it is the newest. The
// error is ErrRolledBack where it is not.
func (a *Anchor) check(ctx context.Context) error {
	bound, err := read[record](a.ledger, anchorKey)
	if err != nil {
		return err
	}
	rolled, err := a.Rollback()
	switch {
	case err != nil:
		return err
	case rolled != nil: // found before, and not accepted: whatever the counter says now
		a.gate.Block(gate.Rollback, ErrRolledBack)
		return ErrRolledBack
	case a.Token == "" && bound == nil:
		a.sound()
		return nil
	case a.Token == "":
		return a.rolledBack(ctx, bound, 0,
			fmt.Sprintf("the ledger is bound to the counter of token %q, and the configuration has no rollback_token", bound.Token))
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
		return a.rolledBack(ctx, bound, value,
			"the ledger is bound to no counter, so it may be any; one that was never bound is bound by countersignd init")
	case bound.Token != a.Token:
		return a.rolledBack(ctx, bound, value, fmt.Sprintf("the ledger is bound to the counter of token %q", bound.Token))
	case bound.Value < value:
		return a.rolledBack(ctx, bound, value, "the ledger is an older copy: what was admitted since it was made is forgotten")
	case bound.Value > value+1:
		return a.rolledBack(ctx, bound, value, "the counter is behind the ledger: its device was set back, or is another")
	}
	if err := a.increment(ctx, counter, value); err != nil {
		return err
	}
	a.sound()
	return nil
}

func (a *Anchor) sound() {
	a.gate.Unblock(gate.Rollback)
	a.gate.Unblock(gate.Counter)
}

// rolledBack writes the finding down, and lets nothing be admitted.
func (a *Anchor) rolledBack(ctx context.Context, bound *record, value uint64, reason string) error {
	found := Rollback{Counter: value, Reason: reason, At: time.Now().UTC().Truncate(time.Second)}
	if bound != nil {
		found.Ledger = bound.Value
	}
	a.gate.Block(gate.Rollback, ErrRolledBack)
	a.log.Error("rollback detected: nothing is signed or verified until an operator accepts it (countersign admin rollback)",
		"reason", reason, "ledger", found.Ledger, "counter", found.Counter)
	err := a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		if err := tx.Put(ledger.Meta, rollbackKey, manage.Encode(found)); err != nil {
			return err
		}
		return tx.Append(ledger.EventOf(audit.NewRollbackDetected(reason, found.Ledger, found.Counter)))
	})
	return errors.Join(ErrRolledBack, err)
}

// Start checks the ledger. While the counter's device does not answer, admissions wait until it does.
func (a *Anchor) Start(ctx context.Context) error {
	err := a.check(ctx)
	switch {
	case err == nil:
		a.checked = true
		return nil
	case errors.Is(err, ErrRolledBack):
		return nil
	case errors.Is(err, keystore.ErrUnavailable), errors.Is(err, keystore.ErrSealed), errors.Is(err, keystore.ErrAuth):
		a.gate.Block(gate.Counter, errUnchecked)
		a.log.Error("the ledger can't be held against its counter; nothing is admitted until that is done", "token", a.Token, "err", err)
		return nil
	}
	return err
}

// increment increments the counter from value. It happens twice where a first try got lost; then the
// ledger records that.
func (a *Anchor) increment(ctx context.Context, counter keystore.Counter, value uint64) error {
	recorded := func(value uint64) error {
		return a.ledger.Update(ctx, func(tx *ledger.Tx) error { return a.put(tx, value) })
	}
	if err := recorded(value + 1); err != nil {
		return err
	}
	now, err := counter.IncrementCounter(ctx)
	if err == nil && now > value+1 {
		err = recorded(now)
	}
	return err
}

// counterResource is what the monitor tells of the counter. The audit log has no events of it.
var counterResource = resource.Resource{
	Name: "counter", FailedText: "the counter that the ledger is bound to can't be used; it is tried again",
	RecoveredText: "the counter that the ledger is bound to can be used again",
}

// Keep checks the ledger until that has been possible, and increments the counter from time to time,
// until ctx ends.
func (a *Anchor) Keep(ctx context.Context) {
	if a.Token == "" {
		return
	}
	incremented, admitted := time.Now(), a.ledger.Admitted()
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		var err error
		switch {
		case !a.checked:
			if err = a.check(ctx); err == nil {
				a.checked, incremented = true, time.Now()
			} else if errors.Is(err, ErrRolledBack) {
				err = nil // an operator must act
			}
		case a.due(a.ledger.Admitted()-admitted, time.Since(incremented)):
			if err = a.advance(ctx); err == nil {
				incremented, admitted = time.Now(), a.ledger.Admitted()
			}
		default:
			continue // nothing was tried
		}
		if ctx.Err() == nil {
			a.monitor.Check(ctx, counterResource, err)
		}
	}
}

// advance increments the counter of a ledger that is the newest.
func (a *Anchor) advance(ctx context.Context) error {
	counter, err := a.counter()
	if err != nil {
		return err
	}
	value, err := counter.ReadCounter(ctx)
	if err != nil {
		return err
	}
	return a.increment(ctx, counter, value)
}

// Stop increments the counter of a sound ledger at the end, so that a copy made later is noticed.
func (a *Anchor) Stop(ctx context.Context) error {
	if rolled, err := a.Rollback(); err != nil || rolled != nil || a.Token == "" || !a.checked {
		return err
	}
	if err := a.advance(ctx); err != nil { // the next start finds a sound ledger all the same
		a.log.Error("the ledger's counter is not incremented at the end", "err", err)
	}
	return nil
}

// Rollback returns what was found, or nil.
func (a *Anchor) Rollback() (*Rollback, error) { return read[Rollback](a.ledger, rollbackKey) }

// Accept lets the ledger admit again, as it is. The operator knows which nonces it may have forgotten.
func (a *Anchor) Accept(ctx context.Context, who audit.Actor, reason string) error {
	if err := manage.CheckReason(reason); err != nil {
		return fmt.Errorf("rollback: %w", err)
	}
	return a.accepting.Run(ctx, a.log, "accept a rollback", func(ctx context.Context) error {
		rolled, err := a.Rollback()
		if err != nil {
			return err
		}
		if rolled == nil {
			return fmt.Errorf("rollback: %w: none was found", manage.ErrNotFound)
		}
		var value uint64
		if a.Token != "" {
			counter, err := a.counter()
			if err != nil {
				return err
			}
			if value, err = define(ctx, counter); err != nil {
				return err
			}
		}
		if err := a.ledger.Update(ctx, func(tx *ledger.Tx) error {
			bind := func() error { return tx.Delete(ledger.Meta, anchorKey) }
			if a.Token != "" {
				bind = func() error { return a.put(tx, value) }
			}
			if err := errors.Join(bind(), tx.Delete(ledger.Meta, rollbackKey)); err != nil {
				return err
			}
			return tx.Append(ledger.EventOf(audit.NewRollbackAccepted(who, reason, rolled.Ledger, value)))
		}); err != nil {
			return err
		}
		a.log.Warn("a rollback was accepted", "operator", who.Name, "reason", reason)
		return a.check(ctx) // which lets the ledger admit
	})
}

// StopAccepting waits until no act is under way, and lets no other one begin.
func (a *Anchor) StopAccepting(ctx context.Context) error { return a.accepting.Acquire(ctx) }
