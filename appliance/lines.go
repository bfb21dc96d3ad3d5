package appliance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"countersign/audit"
	"countersign/internal/ijson"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/schedule"
)

// Line says how a key is rotated, and whether an operator must confirm its use. The zero value is that of a key that nothing was said of.
type Line struct {
	Plan schedule.Plan // when it is rotated by itself
	// Announce is how long before it is active a version is announced, unless a time is said; Grace how long the one before is accepted after
	// that, 0 being as long as a document may live.
	Announce, Grace time.Duration
	// Acknowledge says who must have acknowledged a rotation so that the version before is archived ahead of its grace time: peers' names, or "all".
	// None: it is kept for its grace time.
	Acknowledge []string
	// Presence is for how long an operator's confirmation lets the key sign; 0: none is needed.
	Presence time.Duration

	life time.Duration // of a document, at the most
}

// AllPeers stands for all peers that are not kept out.
const AllPeers = "all"

func (l Line) grace() time.Duration {
	if l.Grace == 0 {
		return l.life
	}
	return l.Grace
}

// lineRecord is the ledger's record of a line, under its name. Times are seconds.
type lineRecord struct {
	Every       int64    `json:"every,omitempty"`
	Window      string   `json:"window,omitempty"`
	Uses        uint64   `json:"uses,omitempty"`
	Announce    int64    `json:"announce,omitempty"`
	Grace       int64    `json:"grace,omitempty"`
	Acknowledge []string `json:"acknowledge,omitempty"`
	Presence    int64    `json:"presence,omitempty"`
}

func (l Line) record() lineRecord {
	s := func(d time.Duration) int64 { return int64(d / time.Second) }
	return lineRecord{s(l.Plan.Every), l.Plan.Window, l.Plan.Uses, s(l.Announce), s(l.Grace), l.Acknowledge, s(l.Presence)}
}

func (a *Appliance) loadLines() error {
	return a.ledger.All(ledger.Lines, func(name string, value []byte) error {
		var r lineRecord
		if err := json.Unmarshal(value, &r); err != nil {
			return fmt.Errorf("line %q in the ledger: %w", name, err)
		}
		d := func(s int64) time.Duration { return time.Duration(s) * time.Second }
		a.lines[name] = Line{schedule.Plan{Every: d(r.Every), Window: r.Window, Uses: r.Uses}, d(r.Announce), d(r.Grace), r.Acknowledge, d(r.Presence), 0}
		return nil
	})
}

// line returns the settings of a line.
func (a *Appliance) line(name string) Line {
	a.mu.RLock()
	defer a.mu.RUnlock()
	l := a.lines[name]
	l.life = a.limits.MaxLifetime
	return l
}

// Line returns the settings of a key, or ErrNotFound.
func (a *Appliance) Line(name string) (Line, error) {
	_, err := a.Key(name)
	return a.line(name), err
}

// maxSettings is what an event takes of a text without cutting it.
const maxSettings = 2000

func (l Line) check() error {
	const year = 366 * 24 * time.Hour
	switch {
	case l.Announce < 0 || l.Announce > 30*24*time.Hour:
		return errors.New("announce must be 0 to 30 days")
	case l.Grace < 0 || l.Grace > 10*year:
		return errors.New("grace must be 0, for as long as a document may live, to 10 years")
	case l.Presence < 0 || l.Presence > 24*time.Hour:
		return errors.New("presence must be 0 to 24 hours")
	case len(l.Acknowledge) > 100:
		return errors.New("acknowledge has more than 100 names")
	}
	for _, d := range []time.Duration{l.Plan.Every, l.Announce, l.Grace, l.Presence} {
		if d%time.Second != 0 { // on disk it would be another
			return fmt.Errorf("%v is not a number of whole seconds", d)
		}
	}
	if n := len(encode(l.record())); n > maxSettings {
		return fmt.Errorf("the settings have %d bytes, and the event that records them has room for %d: name fewer peers, or all", n, maxSettings)
	}
	for _, name := range l.Acknowledge {
		if err := keystore.CheckName(name); err != nil {
			return fmt.Errorf("acknowledge: %w", err)
		}
	}
	return l.Plan.Check()
}

// weaker says that a key may be used after fewer confirmations than before.
func weaker(presence, before time.Duration) bool {
	return before > 0 && (presence == 0 || presence > before)
}

// SetLine says how a key is rotated from now on. To let it sign on fewer confirmations needs approval.
func (a *Appliance) SetLine(ctx context.Context, who audit.Actor, name string, set func(*Line) error) (l Line, err error) {
	err = a.act(ctx, a.creating, fmt.Sprintf("the settings of key %q", ijson.Clip(name)), func(ctx context.Context) error {
		before, err := a.Line(name)
		if err != nil {
			return err
		}
		l = before
		l.Acknowledge = slices.Clone(l.Acknowledge) // it is set's to change
		if set != nil {
			if err := set(&l); err != nil {
				return fmt.Errorf("key %q: %w: %w", name, ErrInvalid, err)
			}
		}
		if err := l.check(); err != nil {
			return fmt.Errorf("key %q: %w: %w", name, ErrInvalid, err)
		}
		for _, peer := range l.Acknowledge {
			if !slices.Contains(before.Acknowledge, peer) && peer != AllPeers && !a.enrolled(peer) {
				return fmt.Errorf("key %q: %w: acknowledge names %q, and no such peer is enrolled", name, ErrInvalid, peer)
			}
		}
		if own(name) && (l.Presence != 0 || name != NoiseName) {
			return fmt.Errorf("key %q: %w: it is the appliance's own", name, ErrInvalid)
		}
		e := audit.Event{Type: audit.LineChanged, Actor: who, Action: "key set", Resource: name, Outcome: "ok", Metadata: map[string]string{}}
		if weaker(l.Presence, before.Presence) {
			if who.Proposal == 0 {
				return fmt.Errorf("key %q: %w: that it may sign on fewer confirmations", name, ErrNotApproved)
			}
			e.Metadata["presence_lowered"] = "yes"
		}
		record := encode(l.record())
		e.Metadata["settings"], e.Metadata["presence"] = string(record), strconv.FormatInt(int64(l.Presence/time.Second), 10)
		return a.ledger.Update(ctx, func(tx *ledger.Tx) error {
			if err := tx.Put(ledger.Lines, name, record); err != nil {
				return err
			}
			tx.OnCommit(func() { // so that the admission after the event is by it
				a.mu.Lock()
				defer a.mu.Unlock()
				a.lines[name], a.news = l, nil
				if l.Presence != before.Presence {
					delete(a.confirmed, name) // it was for another time
				}
			})
			return tx.Append(entry(e))
		})
	})
	return l, err
}

// Confirm lets a key sign for its time of presence: an operator has just proven to be there. CredentialsChanged takes all confirmations back, since
// who can enrol a credential could confirm with it.
func (a *Appliance) Confirm(ctx context.Context, who audit.Actor, name string) (until time.Time, err error) {
	if _, err := a.Key(name); err != nil {
		return until, err
	}
	a.mu.RLock()
	credentials := a.credentials
	a.mu.RUnlock()
	var end time.Time
	var late error
	err = a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		a.mu.RLock()
		defer a.mu.RUnlock()
		presence := a.lines[name].Presence
		switch {
		case presence == 0:
			return fmt.Errorf("key %q: %w: it needs no confirmation", name, ErrConflict)
		case a.credentials != credentials:
			return fmt.Errorf("key %q: %w: credentials have changed: confirm again", name, ErrConflict)
		}
		end = time.Now().Add(presence)
		tx.OnCommit(func() {
			a.mu.Lock()
			defer a.mu.Unlock()
			if a.credentials != credentials {
				late = fmt.Errorf("key %q: %w: credentials have changed: confirm again", name, ErrConflict)
				return
			}
			a.confirmed[name] = end
		})
		return tx.Append(entry(audit.Event{Type: audit.PresenceConfirmed, Actor: who, Action: "key confirm", Resource: name, Outcome: "ok",
			Metadata: map[string]string{"until": strconv.FormatInt(end.Unix(), 10)}}))
	})
	if err != nil {
		return time.Time{}, err // the writer may still be at it: end is not ours to read
	}
	if late != nil {
		return time.Time{}, late
	}
	return end, nil
}

func (a *Appliance) CredentialsChanged() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.credentials++
	clear(a.confirmed)
}

// Confirmed says until when a key may sign on a confirmation; zero where there is none.
func (a *Appliance) Confirmed(name string) time.Time {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.confirmed[name]
}

// usesKey is the record of how often keys were used, up to an event.
const usesKey = "key-uses"

// usesBehind bounds the events that a start has to read where no key was used.
const usesBehind = 4096

type usesRecord struct {
	Next uint64            `json:"next"` // the first event that is not counted
	Uses map[string]uint64 `json:"uses"` // by name/version
}

// loadUses reads how often each key was used, and counts what came after that was written.
func (a *Appliance) loadUses() error {
	var r usesRecord
	if err := a.ledger.All(ledger.Meta, func(name string, value []byte) error {
		if name != usesKey {
			return nil
		}
		return json.Unmarshal(value, &r)
	}); err != nil {
		return err
	}
	a.written = r
	for _, k := range a.Keys() {
		k.life.uses.Store(r.Uses[k.Info().Ref.String()])
	}
	return a.Events(r.Next, func(_ uint64, e audit.Event) bool {
		if ref, err := keystore.ParseRef(e.Resource); err == nil && e.Type.Kind() == audit.Admission {
			if k := a.version(ref.Name, ref.Version); k != nil {
				k.life.uses.Add(1)
			}
		}
		return true
	})
}

// writeUses writes it down. A crash can make the count of the last minute come twice: then a key is rotated a little early.
func (a *Appliance) writeUses(ctx context.Context) error {
	_, first, tree := a.ledger.Head()
	r := usesRecord{Next: first + tree.Size, Uses: map[string]uint64{}}
	for _, k := range a.Keys() {
		if n := k.Uses(); n > 0 {
			r.Uses[k.Info().Ref.String()] = n
		}
	}
	if maps.Equal(r.Uses, a.written.Uses) && r.Next < a.written.Next+usesBehind {
		return nil
	}
	if err := a.ledger.Update(ctx, func(tx *ledger.Tx) error { return tx.Put(ledger.Meta, usesKey, encode(r)) }); err != nil {
		return err
	}
	a.written = r
	return nil
}

// retry is when something that failed is tried again.
type retry struct {
	cause  error
	after  time.Time
	wait   time.Duration
	wanted bool // by an operator: the line itself is not due
}

const (
	firstRetry = 10 * time.Second
	lastRetry  = time.Hour
)

// failed notes that the rotation of a line did not succeed; Health says so, and it is tried again after a while.
func (a *Appliance) failed(name string, err error) {
	a.mu.Lock()
	r := a.retries[name]
	r.wait = min(max(2*r.wait, firstRetry), lastRetry)
	r.cause, r.after = err, time.Now().Add(r.wait)
	a.retries[name] = r
	a.mu.Unlock()
	a.log.Error("a rotation is not done; it is tried again", "key", name, "in", r.wait, "err", err)
}

// wants has the rotation that an operator has asked for, and that has failed, tried again until it is done or a restart.
func (a *Appliance) wants(name string, err error) {
	a.mu.Lock()
	r := a.retries[name]
	r.wanted = true
	a.retries[name] = r
	a.mu.Unlock()
	a.failed(name, err)
}

// done notes that nothing is left to do for a line, whoever has done it.
func (a *Appliance) done(name string) {
	a.mu.RLock()
	_, failed := a.retries[name]
	a.mu.RUnlock()
	if failed {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.retries, name)
	}
}

// hasten has what failed tried again now.
func (a *Appliance) hasten() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for name, r := range a.retries {
		r.after, r.wait = time.Time{}, 0
		a.retries[name] = r
	}
}

// keepKeysEvery is how often is looked at what keys are due.
const keepKeysEvery = time.Second

// keepKeys rotates, activates and archives what is due, until ctx ends.
func (a *Appliance) keepKeys(ctx context.Context) {
	ticker := time.NewTicker(keepKeysEvery)
	defer ticker.Stop()
	for {
		for all := a.Keys(); len(all) > 0 && ctx.Err() == nil; {
			n := 1
			for n < len(all) && all[n].Name == all[0].Name {
				n++
			}
			if name := all[0].Name; a.work(all[:n]) != nil {
				a.keepLine(ctx, name)
			} else {
				a.done(name)
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

// keepLine does what is due of a line. It is looked at again under the lock.
func (a *Appliance) keepLine(ctx context.Context, name string) {
	a.mu.RLock()
	later := time.Now().Before(a.retries[name].after)
	a.mu.RUnlock()
	if later {
		return
	}
	wait, cancel := context.WithTimeout(ctx, a.limits.RequestTimeout)
	defer cancel()
	err := a.act(wait, a.creating, fmt.Sprintf("what is due of key %q", name), func(ctx context.Context) error {
		if do := a.workOf(name); do != nil {
			return do(ctx)
		}
		return nil
	})
	if err == nil {
		a.done(name)
	} else if ctx.Err() == nil {
		a.failed(name, err)
	}
}

func (a *Appliance) workOf(name string) func(context.Context) error {
	versions, err := a.Key(name)
	if err != nil {
		return nil
	}
	return a.work(versions)
}

// work says what is to be done now for a line with these versions; nil: nothing. While it is not known that the ledger is the newest, that is
// nothing: what it says of the line may be long past.
func (a *Appliance) work(versions []*Key) func(context.Context) error {
	if a.shut(byRollback) || a.shut(byCounter) {
		return nil
	}
	name := versions[0].Name
	now, l, daemon := time.Now(), a.line(name), audit.Daemon()
	var active, next *Key
	for _, k := range versions {
		switch {
		// By the ledger's time, since this can't be taken back: a clock that jumps ahead ends no grace time.
		case k.State == VerifyOnly && (!a.ledger.Time().Before(k.Retires) || a.acknowledged(l, k)):
			reason := "its grace time is over"
			if now.Before(k.Retires) {
				reason = "its successor is acknowledged"
			}
			return func(ctx context.Context) error { return a.setState(ctx, daemon, k, Archived, reason) }
		case k.State == Active:
			active = k
		case k.State == Pending && k.announced():
			next = k
		}
	}
	if a.operable() != nil {
		return nil
	}
	if k := unfollowed(versions); k != nil {
		return func(ctx context.Context) error { return a.succeed(ctx, daemon, k) }
	}
	if next != nil {
		if now.Before(next.Activates) {
			return nil
		}
		return func(ctx context.Context) error { return a.activate(ctx, daemon, next) }
	}
	if active == nil {
		return nil
	}
	if name == NoiseName && a.unauthorized(active) {
		return func(ctx context.Context) error { return a.authorizeActive(ctx, daemon) }
	}
	a.mu.RLock()
	wanted := a.retries[name].wanted
	a.mu.RUnlock()
	if due, _, _ := l.Plan.Due(active.Activates, active.Uses(), time.Time{}, now); due || wanted {
		return func(ctx context.Context) error {
			_, err := a.rotate(ctx, daemon, name, time.Now().Add(l.Announce))
			return err
		}
	}
	return nil
}

// unfollowed returns the version of a line that was active and is compromised, where its successor is not active yet.
func unfollowed(versions []*Key) (last *Key) {
	for _, k := range versions {
		if k.State == Active {
			return nil
		}
		if k.State != Pending {
			last = k
		}
	}
	if last != nil && last.State == Compromised {
		return last
	}
	return nil
}

// NextRotation says when a line is rotated by itself and why, or when the version that is announced will be active; zero: not by time.
func (a *Appliance) NextRotation(name string) (time.Time, string) {
	active, err := a.ActiveKey(name)
	if err != nil {
		return time.Time{}, ""
	}
	if next := a.version(name, active.Version+1); next != nil && next.announced() {
		return next.Activates, "announced"
	}
	_, next, why := a.line(name).Plan.Due(active.Activates, active.Uses(), time.Time{}, time.Now())
	return next, string(why)
}

// acknowledged says that those who must have acknowledged the version after k, and that there is one of them: where all of them are gone, the
// grace time counts.
func (a *Appliance) acknowledged(l Line, k *Key) bool {
	a.mu.RLock()
	defer a.mu.RUnlock()
	asked := 0
	for _, m := range a.peers {
		if !m.in() || !slices.Contains(l.Acknowledge, m.Name) && !slices.Contains(l.Acknowledge, AllPeers) {
			continue
		}
		if m.known[k.Name] <= k.Version {
			return false
		}
		asked++
	}
	return asked > 0
}
