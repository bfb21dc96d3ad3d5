package keyring

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"countersign/audit"
	"countersign/internal/ijson"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/peers"
	"countersign/internal/schedule"
)

// Settings are the schedule of a key's rotations, and the confirmations that its use needs. A key
// without a record has the zero value.
type Settings struct {
	Plan schedule.Plan // of rotations without an operator
	// Announce is the time between the announcement of a scheduled rotation and the activation.
	// Grace is the time for which the old version is accepted after the activation; 0: the maximal
	// lifetime of a document.
	Announce, Grace time.Duration
	// Acknowledge names peers, or AllPeers. When all of them have acknowledged a rotation, the old
	// version is archived before the end of its grace time. Empty: no version is archived early.
	// The name of a removed peer leaves the list with the removal.
	Acknowledge []string
	// Presence is the time for which an operator's confirmation lets the key sign; 0: the key needs
	// no confirmation.
	Presence time.Duration
}

// AllPeers in Settings.Acknowledge stands for all peers that are let in.
const AllPeers = "all"

// settingsRecord is the ledger's record of settings, under the key's name. Times are seconds.
type settingsRecord struct {
	Every       int64    `json:"every,omitempty"`
	Window      string   `json:"window,omitempty"`
	Uses        uint64   `json:"uses,omitempty"`
	Announce    int64    `json:"announce,omitempty"`
	Grace       int64    `json:"grace,omitempty"`
	Acknowledge []string `json:"acknowledge,omitempty"`
	Presence    int64    `json:"presence,omitempty"`
}

func (s Settings) record() settingsRecord {
	return settingsRecord{
		manage.Seconds(s.Plan.Every), s.Plan.Window, s.Plan.Uses, manage.Seconds(s.Announce), manage.Seconds(s.Grace),
		s.Acknowledge, manage.Seconds(s.Presence),
	}
}

// takeSettings updates memory from the record of a key's settings. mu is held.
func (r *Ring) takeSettings(name string, value []byte) error {
	var rec settingsRecord
	if value != nil {
		if err := json.Unmarshal(value, &rec); err != nil {
			return fmt.Errorf("line %q in the ledger: %w", name, err)
		}
	}
	before := r.settings[name]
	now := Settings{
		Plan:     schedule.Plan{Every: manage.Duration(rec.Every), Window: rec.Window, Uses: rec.Uses},
		Announce: manage.Duration(rec.Announce), Grace: manage.Duration(rec.Grace), Acknowledge: rec.Acknowledge,
		Presence: manage.Duration(rec.Presence),
	}
	if now.Presence != before.Presence {
		delete(r.confirmed, name) // the confirmation was for another time of presence
	}
	r.settings[name], r.announced = now, nil
	return nil
}

// grace is the time for which a version is accepted after the activation of its successor.
func (r *Ring) grace(s Settings) time.Duration {
	if s.Grace == 0 {
		return r.MaxLifetime
	}
	return s.Grace
}

func (r *Ring) settingsOf(name string) Settings {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.settings[name]
}

// Settings returns the settings of a key, or manage.ErrNotFound.
func (r *Ring) Settings(name string) (Settings, error) {
	_, err := r.Versions(name)
	return r.settingsOf(name), err
}

// maxSettings bounds the record of settings, in bytes: an event keeps a text of this length uncut.
const maxSettings = 2000

func (s Settings) check() error {
	const year = 366 * 24 * time.Hour
	switch {
	case s.Announce < 0 || s.Announce > 30*24*time.Hour:
		return errors.New("announce must be 0 to 30 days")
	case s.Grace < 0 || s.Grace > 10*year:
		return errors.New("grace must be 0, for as long as a document may live, to 10 years")
	case s.Presence < 0 || s.Presence > 24*time.Hour:
		return errors.New("presence must be 0 to 24 hours")
	case len(s.Acknowledge) > 100:
		return errors.New("acknowledge has more than 100 names")
	}
	for _, d := range []time.Duration{s.Plan.Every, s.Announce, s.Grace, s.Presence} {
		if d%time.Second != 0 { // the record has whole seconds
			return fmt.Errorf("%v is not a number of whole seconds", d)
		}
	}
	if n := len(manage.Encode(s.record())); n > maxSettings {
		return fmt.Errorf("the settings have %d bytes, and the event that records them has room for %d: "+
			"name fewer peers, or all", n, maxSettings)
	}
	for _, name := range s.Acknowledge {
		if err := keystore.CheckName(name); err != nil {
			return fmt.Errorf("acknowledge: %w", err)
		}
	}
	return s.Plan.Check()
}

// weaker names the settings that need approval: with them, the key may sign on fewer confirmations
// than before, or the version before is accepted for a shorter time. Documents that are valid would
// become invalid for ever.
func (r *Ring) weaker(now, before Settings) (names []string) {
	if r.grace(now) < r.grace(before) {
		names = append(names, "grace")
	}
	if archivedSooner(now.Acknowledge, before.Acknowledge) {
		names = append(names, "acknowledge")
	}
	if before.Presence > 0 && (now.Presence == 0 || now.Presence > before.Presence) {
		names = append(names, "presence")
	}
	return names
}

// write writes the settings of a key, with the event.
func (s Settings) write(tx *ledger.Tx, who audit.Actor, name string, weaker []string) error {
	record := manage.Encode(s.record())
	if err := tx.Put(ledger.Lines, name, record); err != nil {
		return err
	}
	return tx.Append(ledger.EventOf(audit.NewLineChanged(who, name, record, s.Presence, weaker)))
}

// Unlist takes a peer out of the settings of all keys, in the transaction that removes the peer:
// nobody waits for a removed peer, nor for a later peer of the same name.
func (r *Ring) Unlist(tx *ledger.Tx, who audit.Actor, peer string) error {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for _, name := range slices.Sorted(maps.Keys(r.settings)) {
		s := r.settings[name]
		if peer == AllPeers || !slices.Contains(s.Acknowledge, peer) {
			continue
		}
		s.Acknowledge = slices.DeleteFunc(slices.Clone(s.Acknowledge), func(each string) bool { return each == peer })
		if err := s.write(tx, who, name, nil); err != nil {
			return err
		}
	}
	return nil
}

// archivedSooner reports that fewer acknowledgements than before archive a version.
func archivedSooner(now, before []string) bool {
	if len(now) == 0 || slices.Contains(now, AllPeers) && len(before) > 0 {
		return false
	}
	missing := func(peer string) bool { return !slices.Contains(now, peer) }
	return len(before) == 0 || slices.ContainsFunc(before, missing)
}

// CheckSet returns the settings that Set would put in force now, or the error that an approved Set
// would return.
func (r *Ring) CheckSet(name string, set func(*Settings) error) (s, before Settings, err error) {
	if before, err = r.Settings(name); err != nil {
		return s, before, err
	}
	s = before
	s.Acknowledge = slices.Clone(s.Acknowledge) // set may change the elements
	if set != nil {
		err = set(&s)
	}
	if err == nil {
		err = s.check()
	}
	if err != nil {
		return s, before, fmt.Errorf("key %q: %w: %w", name, manage.ErrInvalid, err)
	}
	for _, peer := range s.Acknowledge {
		if peer != AllPeers && !slices.Contains(before.Acknowledge, peer) && !r.Peers.Enrolled(peer) {
			return s, before, fmt.Errorf("key %q: %w: acknowledge names %q, and no such peer is enrolled",
				name, manage.ErrInvalid, peer)
		}
	}
	if own(name) && (s.Presence != 0 || name != NoiseName) {
		return s, before, fmt.Errorf("key %q: %w: it is the appliance's own", name, manage.ErrInvalid)
	}
	return s, before, nil
}

// Set changes the settings of a key from now on. A change to weaker settings needs approval. All is
// read inside the transaction, since the removal of a peer changes settings too: see Unlist.
func (r *Ring) Set(
	ctx context.Context, who audit.Actor, name string, set func(*Settings) error,
) (s Settings, err error) {
	err = r.run(ctx, who, fmt.Sprintf("the settings of key %q", ijson.Clip(name)), func(ctx context.Context) error {
		if err := r.Ledger.Update(ctx, func(tx *ledger.Tx) (err error) {
			var before Settings
			if s, before, err = r.CheckSet(name, set); err != nil {
				return err
			}
			weaker := r.weaker(s, before)
			if len(weaker) > 0 && who.Proposal == 0 {
				return fmt.Errorf("key %q: %w: these settings would be weaker: %s",
					name, manage.ErrNotApproved, strings.Join(weaker, ", "))
			}
			edits, again := r.graceChanged(name, r.grace(before) != r.grace(s))
			if err := peers.Forget(tx, name, again); err != nil {
				return err
			}
			if err := r.changeIn(tx, who, edits); err != nil {
				return err
			}
			return s.write(tx, who, name, weaker)
		}); err != nil {
			return err
		}
		r.notify()
		return nil
	})
	return s, err
}

// graceChanged returns the edits of an announced version whose end of the version before has
// changed, and the version whose acknowledgements are taken back: peers were told of another end.
func (r *Ring) graceChanged(name string, changed bool) (edits []edit, again uint32) {
	active, err := r.Active(name)
	if !changed || err != nil {
		return nil, 0
	}
	next := r.Version(name, active.Version+1)
	if next == nil || !next.Announced() {
		return nil, 0
	}
	return []edit{{next.Ref(), func(rec *record) { rec.Change++ }}}, next.Version
}

// Confirm lets a key sign for its time of presence: an operator has just proven to be there. The
// confirmation is in memory only. CredentialsChanged takes all confirmations back: an operator who
// can enrol a credential could confirm with the new credential.
func (r *Ring) Confirm(ctx context.Context, who audit.Actor, name string) (until time.Time, err error) {
	if _, err := r.Versions(name); err != nil {
		return until, err
	}
	r.mu.RLock()
	credentials := r.credentials
	r.mu.RUnlock()
	var presence time.Duration
	var end time.Time
	if err := r.Ledger.Update(ctx, func(tx *ledger.Tx) error {
		r.mu.RLock()
		defer r.mu.RUnlock()
		presence = r.settings[name].Presence
		switch {
		case presence == 0:
			return fmt.Errorf("key %q: %w: it needs no confirmation", name, manage.ErrConflict)
		case r.credentials != credentials:
			return fmt.Errorf("key %q: %w: credentials have changed: confirm again", name, manage.ErrConflict)
		}
		end = time.Now().Add(presence)
		return tx.Append(ledger.EventOf(audit.NewPresenceConfirmed(who, name, end)))
	}); err != nil {
		return until, err // the ledger's writer may still run the function, which writes end
	}
	// The event is on disk before the key may be used. The confirmation counts only if credentials
	// and presence are still the same.
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.credentials != credentials:
		return time.Time{}, fmt.Errorf("key %q: %w: credentials have changed: confirm again", name, manage.ErrConflict)
	case r.settings[name].Presence != presence:
		return time.Time{}, fmt.Errorf("key %q: %w: its settings have changed: confirm again", name, manage.ErrConflict)
	}
	r.confirmed[name] = end
	return end, nil
}

// CredentialsChanged takes all confirmations back.
func (r *Ring) CredentialsChanged() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.credentials++
	clear(r.confirmed)
}

// Confirmed returns the end of a key's confirmation, or zero without a confirmation.
func (r *Ring) Confirmed(name string) time.Time {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.confirmed[name]
}
