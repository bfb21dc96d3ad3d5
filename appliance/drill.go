package appliance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"countersign/audit"
	"countersign/internal/backup"
	"countersign/internal/cause"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/manage"
)

// A drill restores a backup where nobody can reach the result, and says what it has proven. The
// drill is a program of its own with a recipient's private key, which this daemon must not have, so
// the daemon takes the drill's word. Three things the daemon proves itself: that its log names this
// backup by the file's name and the manifest, that its log continues the log of the backup, and
// that the lists of writes reach the begin of the drill.

// Drill is the report of a drill.
type Drill struct { // has the fields of api.Drill
	Backup   string   `json:"backup"`  // name of the file, or "" where none could be found
	SHA256   string   `json:"sha256"`  // of the manifest, hexadecimal
	Event    uint64   `json:"event"`   // number of the event BackupMade
	Epoch    uint32   `json:"epoch"`   // of the tree that the drill has verified, as the manifest has it
	Size     uint64   `json:"size"`    // of that tree
	Root     string   `json:"root"`    // of that tree, base64
	Began    int64    `json:"began"`   // when the drill began, Unix seconds
	End      uint64   `json:"end"`     // events in the ledger with the lists of writes
	Reached  int64    `json:"reached"` // time of the last one, Unix seconds
	Proven   []string `json:"proven"`
	Unproven []string `json:"unproven"` // texts of things not shown, and why
	Failure  string   `json:"failure,omitempty"`

	// Of a drill with holders: who gave shares, and the versions of keys that came back and signed.
	Holders []string `json:"holders,omitempty"`
	Keys    []string `json:"keys,omitempty"`
}

// drillRecord is the record of drills, in the table Meta under drillKey.
type drillRecord struct {
	Since  int64  `json:"since"`            // a drill was first wanted, Unix seconds
	Proven int64  `json:"proven,omitempty"` // of the last good drill
	Last   *Drill `json:"last,omitempty"`
	At     int64  `json:"at,omitempty"` // of the last drill

	Holders int64 `json:"holders,omitempty"` // time of the last good drill with holders
}

const drillKey = "backup-drill"

// takeDrill updates memory from the record of drills. mu is held.
func (a *Appliance) takeDrill(value []byte) error {
	rec := new(drillRecord)
	if err := json.Unmarshal(value, rec); err != nil {
		return fmt.Errorf("the record of drills: %w", err)
	}
	a.backups.drill.Store(rec)
	return nil
}

// startDrills notes when a drill is wanted for the first time.
func (a *Appliance) startDrills(ctx context.Context) error {
	if !a.backups.wantsDrills() || a.backups.drill.Load() != nil {
		return nil
	}
	return a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		return tx.Put(ledger.Meta, drillKey, manage.Encode(drillRecord{Since: time.Now().Unix()}))
	})
}

func (b *backups) wantsDrills() bool { return b.Folder != "" && b.ProvenWithin > 0 }

// LastDrill returns the last drill, with its time and the time of the last good one, zero for none.
func (a *Appliance) LastDrill() (last *Drill, at, proven time.Time) {
	rec := a.backups.drill.Load()
	if rec == nil {
		return nil, at, proven
	}
	if rec.Proven != 0 {
		proven = time.Unix(rec.Proven, 0)
	}
	if rec.At != 0 {
		at = time.Unix(rec.At, 0)
	}
	return rec.Last, at, proven
}

// HoldersProven returns the time of the last good drill with holders, or zero.
func (a *Appliance) HoldersProven() (at time.Time) {
	if rec := a.backups.drill.Load(); rec != nil && rec.Holders != 0 {
		at = time.Unix(rec.Holders, 0)
	}
	return at
}

// maxDrillTexts bounds the texts of a report.
const maxDrillTexts = 30

func (d Drill) check() error {
	if len(d.Proven)+len(d.Unproven) > maxDrillTexts {
		return fmt.Errorf("%w: a drill has at most %d texts", manage.ErrInvalid, maxDrillTexts)
	}
	all := append(append([]string{}, d.Proven...), d.Unproven...)
	if d.Failure != "" {
		all = append(all, d.Failure)
	}
	for _, text := range all {
		if err := manage.CheckReason(text); err != nil {
			return err
		}
	}
	for _, name := range d.Holders {
		if err := keystore.CheckName(name); err != nil {
			return fmt.Errorf("%w: a holder: %w", manage.ErrInvalid, err)
		}
	}
	if d.Failure == "" && len(d.Proven) == 0 {
		return fmt.Errorf("%w: a drill has proven something, or has failed", manage.ErrInvalid)
	}
	return nil
}

// Drilled takes the report of a drill, compares the tree that it has verified with the log, and
// records the result. The answer has the result: a Failure where the log does not continue the
// tree.
func (a *Appliance) Drilled(ctx context.Context, who audit.Actor, d Drill) (Drill, error) {
	if a.backups.Folder == "" {
		return d, fmt.Errorf("%w: the configuration has no folder for backups", manage.ErrConflict)
	}
	if err := d.check(); err != nil {
		return d, err
	}
	d.Proven, d.Unproven = append([]string{}, d.Proven...), append([]string{}, d.Unproven...) // never null
	log, _, err := a.Log()
	if err != nil {
		return d, err
	}
	if _, ours := backup.Whole.Begun(d.Backup, log.ID()); !ours && d.Failure == "" {
		return d, fmt.Errorf("%w: the file is no backup of this appliance by its name", manage.ErrInvalid)
	} else if !ours {
		d.Backup = ""
	}
	if d.Failure == "" {
		err := a.proves(d, time.Now())
		switch {
		case errors.Is(err, errDrill):
			d.Failure = err.Error()
		case err != nil:
			return d, err
		default:
			d.Proven = append(d.Proven, "the log of today names the backup, and continues its log")
		}
	}
	e := audit.NewBackupProven(who, d.Backup, d.SHA256, d.Size, time.Unix(d.Reached, 0), d.Proven, d.Unproven,
		d.Holders)
	if d.Failure != "" {
		e = audit.NewDrillFailed(who, d.Backup, errors.New(d.Failure))
	}
	kept := d
	kept.Keys = nil
	return d, a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		var rec drillRecord
		if value := tx.Get(ledger.Meta, drillKey); value != nil {
			if err := json.Unmarshal(value, &rec); err != nil {
				return err
			}
		}
		rec.At, rec.Last = time.Now().Unix(), &kept
		if rec.Since == 0 {
			rec.Since = rec.At
		}
		if d.Failure == "" {
			rec.Proven = rec.At
			if len(d.Holders) > 0 {
				rec.Holders = rec.At
			}
		}
		if err := tx.Put(ledger.Meta, drillKey, manage.Encode(rec)); err != nil {
			return err
		}
		return tx.Append(ledger.EventOf(e))
	})
}

// errDrill is the class of what makes a drill fail in the eyes of the daemon.
var errDrill = errors.New("by the log of today")

// proves compares the report of a good drill with the log. The error wraps errDrill if the backup
// is not good.
func (a *Appliance) proves(d Drill, now time.Time) error {
	fails := func(format string, args ...any) error {
		return fmt.Errorf("%w, %s", errDrill, fmt.Sprintf(format, args...))
	}
	made, err := a.eventAt(d.Event)
	switch {
	case errors.Is(err, ledger.ErrNotFound), err == nil && made.Type != audit.BackupMade:
		return fails("event %d did not make a backup: it is another appliance's", d.Event)
	case errors.Is(err, ledger.ErrDropped):
		return fails("the backup is older than the log is kept")
	case err != nil:
		return err
	case made.Metadata["sha256"] != d.SHA256:
		return fails("event %d made another backup", d.Event)
	case made.Resource != d.Backup:
		return fails("this backup is the file %s, under another name", made.Resource)
	}
	age, within := now.Sub(time.UnixMilli(made.TimeMS)), a.backups.ProvenWithin
	if within > 0 && age > within {
		return fails("the backup is of %s, and a drill is wanted of one of the last %v",
			time.UnixMilli(made.TimeMS).UTC().Format(time.RFC3339), within)
	}
	if err := a.continues(d); errors.Is(err, ledger.ErrDropped) {
		return fails("the backup is older than the log is kept")
	} else if err != nil {
		return err
	}
	if len(d.Holders) > 0 {
		if missing := a.notReturned(d); len(missing) > 0 {
			return fails("the holders have not brought back %s", missing[0])
		}
	}
	if a.backups.Ship == nil {
		return nil
	}
	// The first event that a restore would not have must be younger than what lists may be late.
	lost, err := a.eventAt(d.End)
	if err != nil {
		if errors.Is(err, ledger.ErrNotFound) {
			err = nil
		}
		return err
	}
	if late := time.Unix(d.Began, 0).Sub(time.UnixMilli(lost.TimeMS)); late > listsLate {
		return fails("a restore would lose all from event %d on, of %v before the drill: lists of writes are missing",
			d.End, late.Round(time.Second))
	}
	return nil
}

// makingTakes is more than the time from the intent to make a version to its record.
const makingTakes = 10 * time.Minute

// notReturned lists the recoverable versions of the time that a drill reaches which have not come
// back in the drill.
func (a *Appliance) notReturned(d Drill) (missing []string) {
	for _, k := range keyring.Recoverable(a.Keys.All()) {
		if k.Created.Add(makingTakes).Unix() < d.Reached && !slices.Contains(d.Keys, k.Ref().String()) {
			missing = append(missing, k.Ref().String())
		}
	}
	return missing
}

// holderCauses is a drill with holders that is due for too long. Without a recoverable key none is.
func (a *Appliance) holderCauses(now time.Time) []cause.Cause {
	within := a.backups.HoldersWithin
	some := keyring.Recoverable(a.Keys.All())
	if a.backups.Folder == "" || within == 0 || len(some) == 0 {
		return nil
	}
	since, text := a.HoldersProven(), ""
	if since.IsZero() {
		since, text = now, "no holders have ever brought the recoverable keys back in a drill"
		for _, k := range some {
			if k.Created.Before(since) {
				since = k.Created
			}
		}
	} else {
		text = "the last drill with holders was at " + since.UTC().Format(time.RFC3339)
	}
	if now.Sub(since) <= within {
		return nil
	}
	return cause.HoldersUnproven.Err("", errors.New(text))
}

// eventAt returns an event by its number, or an error that wraps ledger.ErrNotFound or ErrDropped.
func (a *Appliance) eventAt(number uint64) (e audit.Event, err error) {
	err = fmt.Errorf("event %d: %w", number, ledger.ErrNotFound)
	if failed := a.ledger.Events(number, func(index uint64, b []byte) bool {
		if e, err = audit.Decode(b); index > number {
			err = fmt.Errorf("event %d: %w", number, ledger.ErrDropped)
		}
		return false
	}); failed != nil {
		return e, failed
	}
	return e, err
}

// continues reports whether the log continues the tree of a drill.
func (a *Appliance) continues(d Drill) error {
	forked := fmt.Errorf("%w, the log of the backup is not its beginning", errDrill)
	root := ""
	err := a.ledger.Hashes(d.Epoch, func(r audit.Reader) error {
		tree, err := audit.LoadTree(d.Size, r)
		if err != nil {
			return fmt.Errorf("%w: %w", forked, err)
		}
		hash, err := tree.Root()
		root = hash.String()
		return err
	})
	if err == nil && (root != d.Root || d.Size == 0) || errors.Is(err, ledger.ErrNotFound) {
		return forked
	}
	return err
}

// drillCauses is a drill that has failed, or that is due for too long.
func (a *Appliance) drillCauses(now time.Time) []cause.Cause {
	rec := a.backups.drill.Load()
	if !a.backups.wantsDrills() || rec == nil {
		return nil
	}
	if rec.Last != nil && rec.Last.Failure != "" {
		return cause.Unproven.Err("", fmt.Errorf("the drill of %s has failed: %s",
			time.Unix(rec.At, 0).UTC().Format(time.RFC3339), rec.Last.Failure))
	}
	since, text := time.Unix(max(rec.Since, rec.Proven), 0), "no drill has ever proven one"
	if rec.Proven != 0 {
		text = "the last good drill was at " + since.UTC().Format(time.RFC3339)
	}
	if now.Sub(since) <= a.backups.ProvenWithin {
		return nil
	}
	return cause.Unproven.Err("", errors.New(text))
}
