package appliance

import (
	"errors"
	"strings"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/backup"
	"countersign/internal/manage"
)

// wantDrills has a rig want a drill every 7 days, as a start does.
func (r *rig) wantDrills(t *testing.T) {
	t.Helper()
	r.backups.Folder, r.backups.ProvenWithin = t.TempDir(), 7*24*time.Hour
	if err := r.startDrills(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// goodDrill is the report of a good drill of a backup that was made now.
func (r *rig) goodDrill(t *testing.T) Drill {
	t.Helper()
	log, _, err := r.Log()
	if err != nil {
		t.Fatal(err)
	}
	epoch, _, tree := r.ledger.Head()
	root, err := tree.Root()
	if err != nil {
		t.Fatal(err)
	}
	return Drill{
		Backup: backup.Whole.Name(log.ID(), time.Now()), Digest: "ab", Epoch: epoch, Size: tree.Size,
		Root: root.String(), Proven: []string{"all"},
	}
}

// unproven is the text of the cause after a time, or "".
func (r *rig) unproven(in time.Duration) string {
	for _, c := range r.drillCauses(time.Now().Add(in)) {
		return c.Text
	}
	return ""
}

// TestDrillsAreWanted: without a good drill for 7 days, the state has a cause, also over restarts,
// and after a drill that has failed at once.
func TestDrillsAreWanted(t *testing.T) {
	const day = 24 * time.Hour
	r := newRig(t)
	r.backedUp(t)
	r.wantDrills(t)
	expect := func(when string, in time.Duration, want string) {
		t.Helper()
		if text := r.unproven(in); text != want && (want == "" || !strings.Contains(text, want)) {
			t.Errorf("%s, in %v: %q, want %q", when, in, text, want)
		}
	}
	report := func(d Drill) {
		t.Helper()
		if _, err := r.Drilled(t.Context(), operator, d); err != nil {
			t.Fatal(err)
		}
	}
	expect("at first", 6*day, "")
	expect("at first", 8*day, "no drill has ever")
	since := r.backups.drill.Load().Since
	r.reopen(t)
	r.wantDrills(t)
	if got := r.backups.drill.Load().Since; got != since {
		t.Errorf("a restart has begun a new week: %d, %d", got, since)
	}
	report(r.goodDrill(t))
	expect("after a good drill", 6*day, "")
	expect("after a good drill", 8*day, "the last good drill")
	report(Drill{Failure: "it burnt"})
	expect("after a failed drill", 0, "it burnt")
	r.reopen(t)
	r.wantDrills(t)
	expect("after a restart", 0, "it burnt")
	if last, at, proven := r.LastDrill(); last == nil || last.Failure == "" || at.IsZero() || proven.IsZero() {
		t.Errorf("%+v, %v, %v", last, at, proven)
	}
	report(r.goodDrill(t))
	expect("after another good one", 0, "")
	r.backups.ProvenWithin = 0
	expect("where none are wanted", 30*day, "")
}

// TestDrillOfAnotherLog: a backup whose log is not the beginning of today's is not proven, and
// reports that make no sense are refused.
func TestDrillOfAnotherLog(t *testing.T) {
	r := newRig(t)
	r.backedUp(t)
	r.wantDrills(t)
	good := r.goodDrill(t)
	for what, change := range map[string]func(*Drill){
		"another root":         func(d *Drill) { d.Root = "AAAA" },
		"a tree of the future": func(d *Drill) { d.Size += 1000 },
		"an epoch to come":     func(d *Drill) { d.Epoch += 7 },
	} {
		d := good
		change(&d)
		got, err := r.Drilled(t.Context(), operator, d)
		if err != nil || !strings.Contains(got.Failure, "is not the beginning of today's log") {
			t.Errorf("%s: %+v, %v", what, got, err)
		}
	}
	if n := countOf(logOf(t, r.Appliance, 0), audit.BackupProven); n != 0 {
		t.Errorf("%d events BackupProven", n)
	}
	if n := countOf(logOf(t, r.Appliance, 0), audit.DrillFailed); n != 3 {
		t.Errorf("%d events DrillFailed", n)
	}
	for what, change := range map[string]func(*Drill){
		"another appliance's": func(d *Drill) { d.Backup = "countersign-0000000000000000-20261130T021700Z.backup" },
		"no name":             func(d *Drill) { d.Backup = "" },
		"nothing proven":      func(d *Drill) { d.Proven = nil },
		"a forged line":       func(d *Drill) { d.Proven = []string{"all\nproven more"} },
		"31 texts":            func(d *Drill) { d.Unproven = strings.Split(strings.Repeat("x ", 30)+"x", " ") },
	} {
		d := good
		change(&d)
		if _, err := r.Drilled(t.Context(), operator, d); !errors.Is(err, manage.ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	d := good
	d.Unproven = strings.Split(strings.Repeat("x ", 28)+"x", " ")
	if got, err := r.Drilled(t.Context(), operator, d); err != nil || got.Failure != "" || len(got.Proven) != 2 {
		t.Errorf("30 texts: %+v, %v", got, err)
	}
}
