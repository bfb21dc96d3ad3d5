package keyring

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"countersign/audit"
	"countersign/internal/gate"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/requestid"
)

// retry is a failed rotation that is retried with exponential backoff.
type retry struct {
	cause error
	after time.Time     // earliest time of the next try
	wait  time.Duration // the present backoff
}

const (
	firstRetry = 10 * time.Second
	lastRetry  = time.Hour
)

// retryLater notes a failed rotation: Causes reports the failure, and Keep retries after the
// backoff, or at the time until, if that is sooner. Zero means no such time.
func (r *Ring) retryLater(who audit.Actor, name string, err error, until time.Time) {
	r.mu.Lock()
	try := r.retries[name]
	try.wait = min(max(2*try.wait, firstRetry), lastRetry)
	try.cause, try.after = err, time.Now().Add(try.wait)
	if until.After(time.Now()) && until.Before(try.after) {
		try.after = until
	}
	r.retries[name] = try
	r.failed++
	r.mu.Unlock()
	r.Log.Error("a rotation is not done; it is tried again", "key", name, "in", try.wait,
		requestid.Attr(who.Request), "err", err)
}

// clearRetry notes that no rotation of a key is due any more.
func (r *Ring) clearRetry(name string) {
	r.mu.RLock()
	_, failed := r.retries[name]
	r.mu.RUnlock()
	if failed {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.retries, name)
	}
}

// RetryNow ends the backoff of all failed rotations, and has lost keys looked for again: a token
// may be back.
func (r *Ring) RetryNow() {
	r.compareAgain()
	r.mu.Lock()
	defer r.mu.Unlock()
	for name, try := range r.retries {
		try.after, try.wait = time.Time{}, 0
		r.retries[name] = try
	}
}

// keepEvery is the interval between two looks for keys that are due.
const keepEvery = time.Second

// Keep rotates, activates and archives what is due, and compares keys with tokens that come, until
// ctx ends.
func (r *Ring) Keep(ctx context.Context) {
	var comparing sync.WaitGroup // a token that hangs must not delay what is due on others
	comparing.Go(func() { r.keepCompared(ctx) })
	defer comparing.Wait()
	ticker := time.NewTicker(keepEvery)
	defer ticker.Stop()
	for {
		for all := r.All(); len(all) > 0 && ctx.Err() == nil; {
			n := 1
			for n < len(all) && all[n].Name == all[0].Name {
				n++
			}
			if name := all[0].Name; r.due(all[:n]) != nil {
				r.keepKey(ctx, name)
			} else {
				r.clearRetry(name)
			}
			all = all[n:]
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// keepKey does what is due of a key, by the state of the key under the lock.
func (r *Ring) keepKey(ctx context.Context, name string) {
	r.mu.RLock()
	later := time.Now().Before(r.retries[name].after)
	r.mu.RUnlock()
	if later {
		return
	}
	wait, cancel := context.WithTimeout(ctx, r.RequestTimeout)
	defer cancel()
	err := r.run(wait, audit.Daemon(), fmt.Sprintf("what is due of key %q", name), func(ctx context.Context) error {
		versions, err := r.Versions(name)
		if errors.Is(err, manage.ErrNotFound) {
			return nil
		}
		if do := r.due(versions); do != nil {
			return do(ctx)
		}
		return nil
	})
	switch {
	case err == nil, errors.Is(err, errGivenUp):
		r.clearRetry(name)
	case ctx.Err() == nil:
		q, _ := r.Requested(name)
		r.retryLater(audit.Daemon(), name, err, q.Until)
	}
}

// due returns the act that is due now for a key with these versions, or nil. While the ledger may
// be an older copy, no act is due: the present state of the key is unknown.
func (r *Ring) due(versions []*Key) func(context.Context) error {
	if r.Gate.Blocked(gate.Rollback) || r.Gate.Blocked(gate.Counter) {
		return nil
	}
	name := versions[0].Name
	now, s, daemon := time.Now(), r.settingsOf(name), audit.Daemon()
	var active, next *Key
	for _, k := range versions {
		switch {
		// The ledger's time decides, since a clock that jumps ahead must end no grace time:
		// archiving can't be taken back.
		case k.State == VerifyOnly && (!r.Ledger.Time().Before(k.Retires) || r.acknowledged(s, k)):
			reason := "its grace time is over"
			if now.Before(k.Retires) {
				reason = "its successor is acknowledged"
			}
			return func(ctx context.Context) error { return r.setState(ctx, daemon, k, Archived, reason) }
		case k.State == Active:
			active = k
		case k.State == Pending && k.Announced():
			next = k
		}
	}
	if r.Gate.Err() != nil {
		return nil
	}
	if k := withoutSuccessor(versions); k != nil {
		return func(ctx context.Context) error { return r.activateSuccessor(ctx, daemon, k) }
	}
	if q, ok := r.Requested(name); ok && q.Ended == "" {
		return func(ctx context.Context) error { _, err := r.carryOut(ctx, name, q); return err }
	}
	if next != nil {
		if now.Before(next.Activates) {
			return nil
		}
		by := daemon
		if next.By != nil {
			by = *next.By
		}
		return func(ctx context.Context) error { return r.activate(ctx, by, next) }
	}
	if active == nil {
		return nil
	}
	if name == NoiseName && r.unauthorized(active) {
		return func(ctx context.Context) error { return r.authorizeActive(ctx, daemon) }
	}
	if due, _, _ := active.due(s.Plan, now); due {
		return func(ctx context.Context) error {
			_, err := r.renew(ctx, daemon, name, time.Now().Add(s.Announce))
			return err
		}
	}
	return nil
}

// acknowledged reports that all peers that must acknowledge the version after k have done so, at
// least one peer. Without any such peer, the grace time counts.
func (r *Ring) acknowledged(s Settings, k *Key) bool {
	return r.Peers.Acknowledged(k.Name, k.Version+1, s.Acknowledge, slices.Contains(s.Acknowledge, AllPeers))
}

// withoutSuccessor returns the last active version of a key, if the version is compromised and its
// successor is not active yet; otherwise nil.
func withoutSuccessor(versions []*Key) (last *Key) {
	for _, k := range versions {
		if k.State == Active {
			return nil
		}
		if k.State != Pending && !k.neverUsed() {
			last = k
		}
	}
	if last != nil && last.State == Compromised {
		return last
	}
	return nil
}

// NextRotation returns the time of the next scheduled rotation with its reason, or the time at
// which the requested or announced version becomes active. Zero: no rotation is due by time.
func (r *Ring) NextRotation(name string) (time.Time, string) {
	active, err := r.Active(name)
	if err != nil {
		return time.Time{}, ""
	}
	if q, ok := r.Requested(name); ok && q.Ended == "" {
		return q.Activates, "requested"
	}
	if next := r.Version(name, active.Version+1); next != nil && next.Announced() {
		return next.Activates, "announced"
	}
	_, next, why := active.due(r.settingsOf(name).Plan, time.Now())
	return next, string(why)
}

// usesKey is the key of the usesRecord in the table Meta.
const usesKey = "key-uses"

// usesBehind bounds the events that a start must read if no key was used.
const usesBehind = 4096

// usesRecord has the number of uses of each version up to an event. A start counts the admissions
// after the event.
type usesRecord struct {
	Next uint64            `json:"next"` // the first event that is not counted
	Uses map[string]uint64 `json:"uses"` // by name/version
}

// takeUses updates memory from the record of the uses. mu is held.
func (r *Ring) takeUses(name string, value []byte) error {
	if name != usesKey || value == nil {
		return nil
	}
	r.written = usesRecord{}
	return json.Unmarshal(value, &r.written)
}

// countUses sets the uses of each version: those of the record, and the admissions after the
// record.
func (r *Ring) countUses() error {
	for _, k := range r.All() {
		k.usage.count.Store(r.written.Uses[k.Ref().String()])
	}
	var broken error
	err := r.Ledger.Events(r.written.Next, func(index uint64, b []byte) bool {
		e, err := audit.Decode(b)
		if err != nil {
			broken = fmt.Errorf("event %d: %w", index, err)
			return false
		}
		if ref, err := keystore.ParseRef(e.Resource); err == nil && e.Type.Kind() == audit.Admission {
			if k := r.Version(ref.Name, ref.Version); k != nil {
				k.usage.count.Add(1)
			}
		}
		return true
	})
	return errors.Join(err, broken)
}

// WriteUses writes the record of the uses. A crash can have the uses of the last minute counted
// twice; then a key is rotated a little early.
func (r *Ring) WriteUses(ctx context.Context) error {
	_, first, tree := r.Ledger.Head()
	now := usesRecord{Next: first + tree.Size, Uses: map[string]uint64{}}
	for _, k := range r.All() {
		if n := k.Uses(); n > 0 {
			now.Uses[k.Ref().String()] = n
		}
	}
	r.mu.RLock()
	written := r.written
	r.mu.RUnlock()
	if maps.Equal(now.Uses, written.Uses) && now.Next < written.Next+usesBehind {
		return nil
	}
	return r.Ledger.Update(ctx, func(tx *ledger.Tx) error { return tx.Put(ledger.Meta, usesKey, manage.Encode(now)) })
}
