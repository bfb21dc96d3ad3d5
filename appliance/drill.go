package appliance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"countersign/audit"
	"countersign/internal/backup"
	"countersign/internal/cause"
	"countersign/internal/ledger"
	"countersign/internal/manage"
)

// A drill restores a backup where nobody can reach the result, and says what it has proven. The
// drill is a program of its own with a recipient's private key, which this daemon must not have, so
// the daemon takes the drill's word. One thing the daemon proves itself: that its log continues the
// log of the backup.

// Drill is the report of a drill.
type Drill struct {
	Backup string // name of the file, or "" where none could be found
	Digest string // SHA-256 of the manifest, hexadecimal
	Epoch  uint32 // of the tree that the drill has verified, as the manifest has it
	Size   uint64 // of that tree
	Root   string // of that tree, base64

	// Reached is the time up to which the ledger goes with the lists of writes, Unix seconds.
	Reached int64
	// Proven and Unproven have what the drill has shown and what it could not show, as texts.
	Proven, Unproven []string
	// Failure is the reason why the backup is not good; "" for a good one.
	Failure string
}

// drillRecord is the record of drills, in the table Meta under drillKey.
type drillRecord struct {
	Since  int64  `json:"since"`            // a drill was first wanted, Unix seconds
	Proven int64  `json:"proven,omitempty"` // of the last good drill
	Last   *Drill `json:"last,omitempty"`
	At     int64  `json:"at,omitempty"` // of the last drill
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
	log, _, err := a.Log()
	if err != nil {
		return d, err
	}
	if d.Backup != "" || d.Failure == "" {
		if _, ours := backup.Whole.Begun(d.Backup, log.ID()); !ours {
			return d, fmt.Errorf("%w: the file is no backup of this appliance by its name", manage.ErrInvalid)
		}
	}
	if d.Failure == "" {
		switch err := a.continues(d); {
		case errors.Is(err, ledger.ErrDropped):
			d.Unproven = append(d.Unproven, "that the log of today continues it: retention has dropped its epoch")
		case errors.Is(err, errForked):
			d.Failure = err.Error()
		case err != nil:
			return d, err
		default:
			d.Proven = append(d.Proven, "the log of today continues the log of the backup")
		}
	}
	e := audit.NewBackupProven(who, d.Backup, d.Digest, d.Size, time.Unix(d.Reached, 0), d.Proven, d.Unproven)
	if d.Failure != "" {
		e = audit.NewDrillFailed(who, d.Backup, errors.New(d.Failure))
	}
	return d, a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		var rec drillRecord
		if value := tx.Get(ledger.Meta, drillKey); value != nil {
			if err := json.Unmarshal(value, &rec); err != nil {
				return err
			}
		}
		rec.At, rec.Last = time.Now().Unix(), &d
		if rec.Since == 0 {
			rec.Since = rec.At
		}
		if d.Failure == "" {
			rec.Proven = rec.At
		}
		if err := tx.Put(ledger.Meta, drillKey, manage.Encode(rec)); err != nil {
			return err
		}
		return tx.Append(ledger.EventOf(e))
	})
}

var errForked = errors.New("the log of the backup is not the beginning of today's log")

// continues reports whether the log continues the tree of a drill. The error is errForked if the
// log does not.
func (a *Appliance) continues(d Drill) error {
	root := ""
	err := a.ledger.Hashes(d.Epoch, func(r audit.Reader) error {
		tree, err := audit.LoadTree(d.Size, r)
		if err != nil {
			return fmt.Errorf("%w: %w", errForked, err)
		}
		hash, err := tree.Root()
		root = hash.String()
		return err
	})
	if err == nil && root != d.Root {
		return errForked
	}
	if errors.Is(err, ledger.ErrNotFound) {
		return fmt.Errorf("%w: it has no epoch %d", errForked, d.Epoch)
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
