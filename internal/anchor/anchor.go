// Package anchor binds the ledger to a monotonic counter, to detect a rollback: an older copy of
// the ledger in place of the newest. An older copy lacks spent nonces, so old requests could be
// signed again.
//
// The invariant is: counter <= recorded <= counter + 1. The recorded value is in the ledger, the
// counter in the device. For an increment, the ledger first records the new value durably. Then the
// counter is incremented. A ledger that records less than the counter is therefore older than the
// last increment. A ledger that records more than counter + 1 was written with another counter.
//
// A copy made after the last increment is not detected. Such a copy lacks at most the admissions of
// one Config.Interval.
//
// A ledger whose counter is gone may be any copy, and is treated as a rollback. The comparison at
// the start shows that the ledger is the newest, so a counter that fails later stops nothing.
package anchor

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"countersign/audit"
	"countersign/internal/cause"
	"countersign/internal/gate"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/requestid"
	"countersign/internal/resource"
)

// Config is the configuration of an Anchor.
type Config struct {
	Token      string        // token with the counter; "" for a ledger without a counter
	Interval   time.Duration // time between increments, if there are admissions
	Admissions uint64        // admissions before an earlier increment, at least leastInterval after the last
}

// leastInterval limits the wear of the counter's memory to 105,120 increments a year.
const leastInterval = 5 * time.Minute

// due reports whether an increment is due. The arguments count from the last increment.
func (c Config) due(admitted uint64, since time.Duration) bool {
	return admitted > 0 && (since >= c.Interval || admitted >= c.Admissions && since >= leastInterval)
}

var (
	// ErrRolledBack refuses admissions by a ledger that lacks spent nonces.
	ErrRolledBack = errors.New("the ledger is older than the counter that it is bound to")
	errUnchecked  = fmt.Errorf("%w: the ledger has not been compared with its counter yet", keystore.ErrUnavailable)
)

// lost is the ErrRolledBack of a ledger without its counter. The text is the reason.
type lost string

func (l lost) Error() string        { return string(l) }
func (l lost) Is(target error) bool { return target == ErrRolledBack }

// record is the ledger's record of its counter.
type record struct {
	Token string `json:"token"`
	Value uint64 `json:"value"`
}

// Rollback is the ledger's record of a detected rollback. The record stays until an operator
// accepts the rollback.
type Rollback struct {
	Ledger  uint64    `json:"ledger"`         // recorded value
	Counter uint64    `json:"counter"`        // value of the counter
	Lost    bool      `json:"lost,omitempty"` // the counter is gone, or another than the recorded one
	Reason  string    `json:"reason"`
	At      time.Time `json:"at"`
}

// err returns the error of the gate.
func (r Rollback) err() error {
	if r.Lost {
		return lost(r.Reason)
	}
	return ErrRolledBack
}

// The keys of the records in the table Meta.
const (
	anchorKey   = "anchor"
	rollbackKey = "rollback"
	ownerKey    = "counter-owner"
)

// Anchor compares a ledger with its counter and increments the counter. Rollback and Accept are
// safe for concurrent use. The other methods must be called by one goroutine at a time.
type Anchor struct {
	Config
	ledger    *ledger.Ledger
	tokens    manage.Tokens
	gate      *gate.Gate
	monitor   *resource.Monitor
	log       *slog.Logger
	accepting manage.Lock
	comparing manage.Lock // held while the recorded value or the counter changes, or both are compared
	checked   bool        // the ledger has been compared with its counter; used by Start, Keep and Stop in turn

	failing atomic.Pointer[error] // of the last increment that was due, after the comparison
}

// New returns the anchor of a ledger.
func New(
	c Config, l *ledger.Ledger, tokens manage.Tokens, g *gate.Gate, m *resource.Monitor, log *slog.Logger,
) *Anchor {
	return &Anchor{
		Config: c, ledger: l, tokens: tokens, gate: g, monitor: m, log: log,
		accepting: manage.NewLock(), comparing: manage.NewLock(),
	}
}

// counter is the ledger's own counter in a device.
type counter struct {
	device keystore.Counter
	owner  keystore.Owner
}

func (c counter) define(ctx context.Context) error         { return c.device.DefineCounter(ctx, c.owner) }
func (c counter) read(ctx context.Context) (uint64, error) { return c.device.ReadCounter(ctx, c.owner) }
func (c counter) increment(ctx context.Context) (uint64, error) {
	return c.device.IncrementCounter(ctx, c.owner)
}

// counter returns the ledger's counter in the configured token. A ledger without an owner's
// identifier was bound to a counter without a mark.
func (a *Anchor) counter() (c counter, err error) {
	store, err := a.tokens.Get(a.Token)
	if err != nil {
		return c, err
	}
	var ok bool
	if c.device, ok = store.(keystore.Counter); !ok {
		return c, fmt.Errorf("token %q has no counter", a.Token)
	}
	owner, err := read[keystore.Owner](a.ledger, ownerKey)
	if owner != nil {
		c.owner = *owner
	}
	return c, err
}

// newCounter is counter for a ledger that is about to be bound. The identifier is written down
// before the device defines a counter with its mark, so a crash in between loses no counter.
func (a *Anchor) newCounter(ctx context.Context) (counter, error) {
	c, err := a.counter()
	if err != nil || c.owner != (keystore.Owner{}) {
		return c, err
	}
	rand.Read(c.owner[:])
	return c, a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		return tx.Put(ledger.Meta, ownerKey, manage.Encode(c.owner))
	})
}

// isDevice reports an error of the device with the counter. The ledger's other keys are in other
// devices, so the daemon goes on.
func isDevice(err error) bool {
	for _, class := range []error{
		keystore.ErrUnavailable, keystore.ErrSealed, keystore.ErrAuth, keystore.ErrRefused,
	} {
		if errors.Is(err, class) {
			return true
		}
	}
	return false
}

// read reads a record of the table Meta, or returns nil if there is none.
func read[T any](l *ledger.Ledger, key string) (*T, error) {
	value, err := l.Get(ledger.Meta, key)
	if err != nil || value == nil {
		return nil, err
	}
	rec := new(T)
	return rec, json.Unmarshal(value, rec)
}

// Bind binds a ledger without a counter to the configured counter. Only countersignd init calls
// Bind, because a running daemon can't tell a new ledger from an old copy without a record of its
// counter.
func (a *Anchor) Bind(ctx context.Context, who audit.Actor) error {
	if a.Token == "" {
		return nil
	}
	bound, err := read[record](a.ledger, anchorKey)
	if err != nil || bound != nil {
		return err
	}
	counter, err := a.newCounter(ctx)
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

// define makes the counter, unless the counter exists, and returns its value.
func define(ctx context.Context, counter counter) (uint64, error) {
	if err := counter.define(ctx); err != nil {
		return 0, err
	}
	return counter.read(ctx)
}

// put writes the recorded value.
func (a *Anchor) put(tx *ledger.Tx, value uint64) error {
	return tx.Put(ledger.Meta, anchorKey, manage.Encode(record{a.Token, value}))
}

// check compares the ledger with its counter. For the newest ledger check increments the counter
// and unblocks the gate. For another ledger the error is ErrRolledBack.
func (a *Anchor) check(ctx context.Context) error {
	if err := a.comparing.Acquire(ctx); err != nil {
		return err
	}
	defer a.comparing.Release()
	return a.compare(ctx)
}

// compare is check for the holder of comparing.
func (a *Anchor) compare(ctx context.Context) error {
	bound, err := read[record](a.ledger, anchorKey)
	if err != nil {
		return err
	}
	rolled, err := a.Rollback()
	switch {
	case err != nil:
		return err
	case rolled != nil: // detected before and not accepted, so the counter's value does not matter
		a.gate.Block(gate.Rollback, rolled.err())
		return ErrRolledBack
	case a.Token == "" && bound == nil:
		a.unblock()
		return nil
	case a.Token == "":
		return a.detect(ctx, Rollback{Ledger: bound.Value, Lost: true, Reason: fmt.Sprintf("the ledger is bound to "+
			"the counter of token %q, and the configuration has no rollback_token", bound.Token)})
	}
	counter, err := a.counter()
	if err != nil {
		return err
	}
	value, err := counter.read(ctx)
	found := Rollback{Counter: value, Lost: true}
	if bound != nil {
		found.Ledger = bound.Value
	}
	switch {
	case errors.Is(err, keystore.ErrNotFound):
		found.Reason = "the counter is gone: the TPM was cleared, or is another"
	case errors.Is(err, keystore.ErrUnfit):
		found.Reason = fmt.Sprintf("the counter is gone: %v", err)
	case isDevice(err):
		a.gate.Block(gate.Counter, fmt.Errorf("%w: token %s: %w; if that device is lost for good, "+
			"bind the ledger to another one (docs/INCIDENTS.md, a rollback alert)", errUnchecked, a.Token, err))
		return err
	case err != nil:
		return err
	case bound == nil:
		found.Reason = "the ledger is bound to no counter, so it may be any; " +
			"one that was never bound is bound by countersignd init"
	case bound.Token != a.Token:
		found.Reason = fmt.Sprintf("the ledger is bound to the counter of token %q", bound.Token)
	case bound.Value < value:
		found.Reason = "the ledger is an older copy: what was admitted since it was made is forgotten"
		found.Lost = false
	case bound.Value > value+1:
		found.Reason = "the counter is behind the ledger: its device was set back, or is another"
		found.Lost = false
	}
	if found.Reason != "" {
		return a.detect(ctx, found)
	}
	if err := a.increment(ctx, counter, value); err != nil {
		return err
	}
	a.unblock()
	return nil
}

// unblock opens the gate for the newest ledger.
func (a *Anchor) unblock() {
	a.gate.Unblock(gate.Rollback)
	a.gate.Unblock(gate.Counter)
}

// detect blocks the gate and records a rollback. The error is ErrRolledBack. The record has an
// audit event with the reason.
func (a *Anchor) detect(ctx context.Context, found Rollback) error {
	found.At = time.Now().UTC().Truncate(time.Second)
	a.gate.Block(gate.Rollback, found.err())
	defer a.gate.Enforce()
	a.log.Error("rollback detected: nothing is signed or verified until an operator accepts the rollback "+
		"(countersign admin rollback)", "reason", found.Reason, "ledger", found.Ledger, "counter", found.Counter)
	err := a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		if err := tx.Put(ledger.Meta, rollbackKey, manage.Encode(found)); err != nil {
			return err
		}
		return tx.Append(ledger.EventOf(audit.NewRollbackDetected(found.Reason, found.Ledger, found.Counter)))
	})
	return errors.Join(ErrRolledBack, err)
}

// Start compares the ledger with its counter. A rollback, or a device that does not answer, is no
// error: the gate then stays blocked. Keep repeats the comparison until the device answers.
func (a *Anchor) Start(ctx context.Context) error {
	err := a.check(ctx)
	switch {
	case err == nil:
		a.checked = true
		return nil
	case errors.Is(err, ErrRolledBack):
		return nil
	case isDevice(err):
		a.log.Error("the ledger can't be compared with its counter; nothing is admitted until then",
			"token", a.Token, "err", err)
		return nil
	}
	return err
}

// increment records value+1, and then increments the counter from value. An earlier increment
// without an answer may take effect late, so the counter may reach value+2. The ledger then records
// value+2. A crash before that record is later detected as a rollback, although there was none.
func (a *Anchor) increment(ctx context.Context, counter counter, value uint64) error {
	record := func(value uint64) error {
		return a.ledger.Update(ctx, func(tx *ledger.Tx) error { return a.put(tx, value) })
	}
	if err := record(value + 1); err != nil {
		return err
	}
	now, err := counter.increment(ctx)
	if err == nil && now > value+1 {
		err = record(now)
	}
	return err
}

// counterResource is the counter as a resource of the monitor, without events in the audit log.
var counterResource = resource.Resource{
	Name: "counter", FailedText: "the counter that the ledger is bound to can't be used; a retry follows",
	RecoveredText: "the counter that the ledger is bound to can be used again",
}

// Keep increments the counter when an increment is due, until ctx ends. If Start could not compare
// the ledger with its counter, Keep first retries once a second.
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
				err = nil // the counter works, and an operator must act
			}
		case a.due(a.ledger.Admitted()-admitted, time.Since(incremented)):
			if err = a.advance(ctx); err == nil {
				incremented, admitted = time.Now(), a.ledger.Admitted()
				a.failing.Store(nil)
			} else if ctx.Err() == nil {
				a.failing.Store(&err)
			}
		default:
			continue // the counter has not been used
		}
		if ctx.Err() == nil {
			a.monitor.Check(ctx, counterResource, err)
		}
	}
}

// advance increments the counter of a ledger that has been compared with the counter.
func (a *Anchor) advance(ctx context.Context) error {
	if err := a.comparing.Acquire(ctx); err != nil {
		return err
	}
	defer a.comparing.Release()
	counter, err := a.counter()
	if err != nil {
		return err
	}
	value, err := counter.read(ctx)
	if err != nil {
		return err
	}
	return a.increment(ctx, counter, value)
}

// Stop increments the counter once more, so that a copy made before Stop is detected later.
func (a *Anchor) Stop(ctx context.Context) error {
	if rolled, err := a.Rollback(); err != nil || rolled != nil || a.Token == "" || !a.checked {
		return err
	}
	if err := a.advance(ctx); err != nil { // the invariant holds, and the next start succeeds
		a.log.Error("the ledger's counter is not incremented at the end", "err", err)
	}
	return nil
}

// Causes returns the causes of the state of the appliance that are about the counter.
func (a *Anchor) Causes() []cause.Cause {
	rolled, unread := a.gate.Cause(gate.Rollback), a.gate.Cause(gate.Counter)
	kind := cause.RolledBack
	if _, ok := rolled.(lost); ok {
		kind = cause.AnchorLost
	}
	all := slices.Concat(kind.Err("", rolled), cause.Counter.Err("", unread))
	if err := a.failing.Load(); err != nil {
		all = append(all, cause.CounterFailing.Of("", "token %s: %v", a.Token, *err))
	}
	return all
}

// Rollback returns the detected rollback that no operator has accepted, or nil.
func (a *Anchor) Rollback() (*Rollback, error) { return read[Rollback](a.ledger, rollbackKey) }

// Bound returns the token with the counter that the ledger is bound to, or "" for none.
func (a *Anchor) Bound() (token string, err error) {
	bound, err := read[record](a.ledger, anchorKey)
	if err != nil || bound == nil {
		return "", err
	}
	return bound.Token, nil
}

// Unread returns why the ledger has not been compared with its counter, or nil.
func (a *Anchor) Unread() error { return a.gate.Cause(gate.Counter) }

// Acceptable returns the rollback that Accept would accept. Without one the error is
// manage.ErrNotFound.
func (a *Anchor) Acceptable() (*Rollback, error) {
	rolled, err := a.Rollback()
	if err != nil || rolled != nil {
		return rolled, err
	}
	if unread := a.Unread(); unread != nil {
		return nil, fmt.Errorf("rollback: %w: none was found, since %v", manage.ErrNotFound, unread)
	}
	return nil, fmt.Errorf("rollback: %w: none was found", manage.ErrNotFound)
}

// Accept binds the ledger as it is to the counter, and ends the rollback. The nonces that the
// ledger lacks are fresh again. The operator has judged that danger.
func (a *Anchor) Accept(ctx context.Context, who audit.Actor, reason string) error {
	if err := manage.CheckReason(reason); err != nil {
		return fmt.Errorf("rollback: %w", err)
	}
	log := a.log.With(requestid.Attr(who.Request))
	return a.accepting.Run(ctx, log, "accept a rollback", func(ctx context.Context) error {
		if err := a.comparing.Acquire(ctx); err != nil {
			return err
		}
		defer a.comparing.Release()
		rolled, err := a.Acceptable()
		if err != nil {
			return err
		}
		rebind, value, err := a.Rebind(ctx)
		if err != nil {
			return err
		}
		if err := a.ledger.Update(ctx, func(tx *ledger.Tx) error {
			if err := rebind(tx); err != nil {
				return err
			}
			return tx.Append(ledger.EventOf(audit.NewRollbackAccepted(who, reason, rolled.Ledger, value)))
		}); err != nil {
			return err
		}
		a.log.Warn("a rollback was accepted", "operator", who.Name, requestid.Attr(who.Request),
			"reason", reason)
		return a.compare(ctx) // opens the gate
	})
}

// Rebind returns the change that binds the ledger as it is to the configured counter, or to none,
// and ends a rollback. value is the counter's.
func (a *Anchor) Rebind(ctx context.Context) (rebind func(*ledger.Tx) error, value uint64, err error) {
	if a.Token != "" {
		counter, err := a.counter()
		if err != nil {
			return nil, 0, err
		}
		if counter.owner == (keystore.Owner{}) { // a counter without a mark stays while it is there
			_, err = counter.read(ctx)
			if errors.Is(err, keystore.ErrNotFound) || errors.Is(err, keystore.ErrUnfit) {
				counter, err = a.newCounter(ctx)
			}
		}
		if err != nil {
			return nil, 0, err
		}
		if value, err = define(ctx, counter); err != nil {
			return nil, 0, err
		}
	}
	return func(tx *ledger.Tx) error {
		bind := func() error { return tx.Delete(ledger.Meta, anchorKey) }
		if a.Token != "" {
			bind = func() error { return a.put(tx, value) }
		}
		return errors.Join(bind(), tx.Delete(ledger.Meta, rollbackKey))
	}, value, nil
}

// StopAccepting waits for the end of an Accept under way. Later calls are refused.
func (a *Anchor) StopAccepting(ctx context.Context) error { return a.accepting.Acquire(ctx) }
