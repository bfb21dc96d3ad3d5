package appliance

import (
	"errors"
	"strings"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/backup"
	"countersign/internal/escrow/escrowtest"
	"countersign/internal/keyring"
	"countersign/internal/ledger"
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
	name := backup.Whole.Name(log.ID(), time.Now())
	made, err := r.ledger.Append(t.Context(), ledger.EventOf(audit.NewBackupMade(operator, name, "ab", 1, 1)))
	if err != nil {
		t.Fatal(err)
	}
	return Drill{
		Backup: name, SHA256: "ab", Event: made, Epoch: epoch, Size: tree.Size, Root: root.String(),
		Began: time.Now().Unix(), End: made + 1, Proven: []string{"all"},
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

// TestDrillsWithHolders: as soon as a key is recoverable, a drill with holders is wanted within a
// time, and a drill must bring back all recoverable keys.
func TestDrillsWithHolders(t *testing.T) {
	const day = 24 * time.Hour
	r := newRig(t)
	r.backedUp(t)
	r.wantDrills(t)
	r.backups.HoldersWithin = 100 * day
	expect := func(when string, in time.Duration, want string) {
		t.Helper()
		text := ""
		for _, c := range r.holderCauses(time.Now().Add(in)) {
			text = c.Text
		}
		if text != want && (want == "" || !strings.Contains(text, want)) {
			t.Errorf("%s, in %v: %q, want %q", when, in, text, want)
		}
	}
	expect("without a recoverable key", 1000*day, "")
	set := escrowtest.New(t, 2, "ann", "bob").Set
	if err := r.Keys.SetHolders(t.Context(), approved, set); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: "vault", Recoverable: true}); err != nil {
		t.Fatal(err)
	}
	expect("at first", 99*day, "")
	expect("at first", 101*day, "no holders have ever")
	report := func(change func(*Drill)) Drill {
		t.Helper()
		d := r.goodDrill(t)
		d.Reached = time.Now().Add(2 * makingTakes).Unix() // long after the creation
		change(&d)
		d, err := r.Drilled(t.Context(), operator, d)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	if d := report(func(*Drill) {}); d.Failure != "" {
		t.Errorf("without holders: %s", d.Failure)
	}
	expect("after a drill without holders", 101*day, "no holders have ever")
	d := report(func(d *Drill) { d.Holders, d.Keys = []string{"ann", "bob"}, []string{"vault/1"} })
	if !strings.Contains(d.Failure, "have not brought back vault/2") || !r.HoldersProven().IsZero() {
		t.Errorf("one key is missing: %q", d.Failure)
	}
	both := func(d *Drill) { d.Holders, d.Keys = []string{"ann", "bob"}, []string{"vault/1", "vault/2"} }
	if d := report(both); d.Failure != "" {
		t.Errorf("all keys: %s", d.Failure)
	}
	expect("after one", 99*day, "")
	expect("after one", 101*day, "the last drill with holders was at")
	r.reopen(t)
	r.backups.HoldersWithin = 100 * day
	r.wantDrills(t)
	expect("after a restart", 99*day, "")
	r.backups.HoldersWithin = 0
	expect("where none are wanted", 1000*day, "")
	bad := r.goodDrill(t)
	bad.Holders = []string{"ann\x1b"}
	if _, err := r.Drilled(t.Context(), operator, bad); !errors.Is(err, manage.ErrInvalid) {
		t.Errorf("a holder's name: %v", err)
	}
}

// TestDrillIsCompared: a backup that the log does not name, whose log is not the beginning of
// today's, that is old, or whose lists of writes are missing is not proven. Reports that make no
// sense are refused.
func TestDrillIsCompared(t *testing.T) {
	r := newRig(t)
	r.backedUp(t)
	r.wantDrills(t)
	good := r.goodDrill(t)
	other := backup.Whole.Name(strings.Split(good.Backup, "-")[1], time.Now().Add(time.Hour))
	empty, err := (&audit.Tree{}).Root()
	if err != nil {
		t.Fatal(err)
	}
	faults := 0
	for what, c := range map[string]struct {
		change func(*Drill)
		says   string
	}{
		"another root":         {func(d *Drill) { d.Root = "AAAA" }, "is not its beginning"},
		"a tree of nothing":    {func(d *Drill) { d.Size, d.Root = 0, empty.String() }, "is not its beginning"},
		"a tree of the future": {func(d *Drill) { d.Size += 1000 }, "is not its beginning"},
		"an epoch to come":     {func(d *Drill) { d.Epoch += 7 }, "is not its beginning"},
		"another event":        {func(d *Drill) { d.Event = 0 }, "did not make a backup"},
		"an event to come":     {func(d *Drill) { d.Event += 1000 }, "did not make a backup"},
		"another manifest":     {func(d *Drill) { d.SHA256 = "cd" }, "made another backup"},
		"another name":         {func(d *Drill) { d.Backup = other }, "under another name"},
		"lists are missing": {func(d *Drill) {
			d.End, d.Began = good.Event, time.Now().Add(4*time.Minute).Unix()
		}, "lists of writes are missing"},
	} {
		d := good
		c.change(&d)
		got, err := r.Drilled(t.Context(), operator, d)
		if faults++; err != nil || !strings.Contains(got.Failure, c.says) {
			t.Errorf("%s: %+v, %v", what, got, err)
		}
	}
	r.backups.ProvenWithin = time.Nanosecond
	got, err := r.Drilled(t.Context(), operator, good)
	if faults++; err != nil || !strings.Contains(got.Failure, "and a drill is wanted of") {
		t.Errorf("an old one: %+v, %v", got, err)
	}
	r.backups.ProvenWithin = time.Hour
	if n := countOf(logOf(t, r.Appliance, 0), audit.BackupProven); n != 0 {
		t.Errorf("%d events BackupProven", n)
	}
	if n := countOf(logOf(t, r.Appliance, 0), audit.DrillFailed); n != faults {
		t.Errorf("%d events DrillFailed, want %d", n, faults)
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
