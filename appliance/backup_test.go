package appliance

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/backup"
	"countersign/internal/keyring"
	"countersign/internal/ledger"
	"countersign/internal/ledger/ledgertest"
	"countersign/internal/manage"

	"filippo.io/age"
)

// backedUp gives a rig a folder for backups, and returns who can read them.
func (r *rig) backedUp(t *testing.T) *age.X25519Identity {
	t.Helper()
	if _, err := r.Keys.CreateOwn(t.Context(), operator, keyring.LogName, "memory"); err != nil {
		t.Fatal(err)
	}
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(t.TempDir(), "countersign.toml")
	if err := os.WriteFile(config, []byte("a configuration"), 0o600); err != nil {
		t.Fatal(err)
	}
	folder, to := t.TempDir(), []age.Recipient{id.Recipient()}
	ship, err := backup.NewShipper(folder, to, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ship.Close)
	r.backups.BackupConfig = BackupConfig{
		Folder: folder, To: to, Keep: BackupKeep{Daily: 7}, Ship: ship, Files: []backup.File{
			{Kind: backup.Ledger, Path: r.path}, {Kind: backup.Configuration, Path: config},
		},
	}
	return id
}

func (r *rig) extract(t *testing.T, name string, id age.Identity) backup.Contents {
	t.Helper()
	f, err := os.Open(filepath.Join(r.backups.Folder, name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c, err := backup.Extract(f, []age.Identity{id}, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestBackup: a backup has the ledger and the files of the configuration, is named by the log, and
// its ledger is whole. Admissions go on while the backup is made.
func TestBackup(t *testing.T) {
	r := newRig(t)
	id := r.backedUp(t)
	r.sign(t, r.shop, message(1, "before"))
	stop, done := make(chan struct{}), make(chan struct{})
	signed := 0
	go func() {
		defer close(done)
		for n := byte(2); ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := r.Sign(t.Context(), r.shop, numbered(int(n), "meanwhile")); err != nil {
				t.Errorf("during a backup: %v", err)
				return
			}
			signed++
		}
	}()
	made, err := r.Backup(t.Context(), operator)
	close(stop)
	<-done
	if err != nil {
		t.Fatal(err)
	}
	c := r.extract(t, made.Name, id)
	if c.Event != made.Event || len(c.Manifest.Files) != 2 || c.Manifest.Files[1].Kind != backup.Configuration {
		t.Errorf("%+v", c)
	}
	active := func(k backup.Key) bool { return k.Ref.Name == "payments" && k.State == "active" }
	if !slices.ContainsFunc(c.Keys, active) {
		t.Errorf("%+v", c.Keys)
	}
	if err := ledger.Check(c.Files[0], ledger.Options{}, nil); err != nil {
		t.Error(err)
	}
	l, err := ledgertest.Open(t, c.Files[0], ledger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	epoch, first, tree := l.Head()
	if root, err := tree.Root(); err != nil || epoch != c.Epoch || first != c.First || tree.Size != c.Size ||
		root.String() != c.Root {
		t.Errorf("the manifest says epoch %d, %d events, root %s", c.Epoch, c.Size, c.Root)
	}
	if !slices.Contains(r.events(t), audit.BackupMade) {
		t.Error("there is no event of the backup")
	}
	all, err := r.Backups()
	if err != nil || len(all) != 1 || all[0].Name != made.Name || all[0].Size != made.Size {
		t.Errorf("%+v, %v", all, err)
	}
	part := filepath.Join(r.backups.Folder, made.Name+backup.PartSuffix)
	if _, err := os.Stat(part); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a part is left: %v", err)
	}
	if info, err := os.Stat(filepath.Join(r.backups.Folder, made.Name)); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
}

// TestFailedBackup: a backup that can't be made leaves no file, is an event, and is a cause of the
// state until one is made.
func TestFailedBackup(t *testing.T) {
	r := newRig(t)
	if _, err := r.Backup(t.Context(), operator); !errors.Is(err, manage.ErrConflict) {
		t.Errorf("without a configuration: %v", err)
	}
	r.backedUp(t)
	folder := r.backups.Folder
	r.backups.Files = append(r.backups.Files, backup.File{Kind: backup.Policy, Path: filepath.Join(folder, "none")})
	if _, err := r.Backup(t.Context(), operator); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("a file is missing: %v", err)
	}
	if entries, err := os.ReadDir(folder); err != nil || len(entries) != 0 {
		t.Errorf("a failed backup leaves %v (%v)", entries, err)
	}
	if causes := r.backupCauses(); len(causes) != 1 || !strings.Contains(causes[0].Text, "none") {
		t.Errorf("%v", causes)
	}
	if !slices.Contains(r.events(t), audit.BackupFailed) {
		t.Error("there is no event of the failure")
	}
	r.backups.Files = r.backups.Files[:2]
	if _, err := r.Backup(t.Context(), operator); err != nil {
		t.Fatal(err)
	}
	if causes := r.backupCauses(); len(causes) != 0 {
		t.Errorf("after a good backup: %v", causes)
	}
	if _, err := r.Backup(t.Context(), operator); err != nil {
		t.Errorf("another in the same second: %v", err)
	}
	r.backups.Folder = filepath.Join(folder, "away")
	r.lookAtBackups()
	if causes := r.backupCauses(); len(causes) != 1 {
		t.Errorf("a folder that is away: %v", causes)
	}
	r.backups.Folder = folder
	r.lookAtBackups()
	if causes := r.backupCauses(); len(causes) != 0 {
		t.Errorf("the folder is back: %v", causes)
	}
	if err := r.backups.making.Acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Backup(t.Context(), operator); !errors.Is(err, manage.ErrConflict) {
		t.Errorf("during a backup: %v", err)
	}
	r.backups.making.Release()
	r.backups.halted.Store(true)
	if _, err := r.Backup(t.Context(), operator); err == nil {
		t.Error("a backup is made while the daemon stops")
	}
}

// slow is a recipient that waits before anything is encrypted to it.
type slow struct {
	age.Recipient
	begun, on chan struct{}
}

func (s slow) Wrap(key []byte) ([]*age.Stanza, error) {
	close(s.begun)
	<-s.on
	return s.Recipient.Wrap(key)
}

// TestCopying sees a backup while it is made, and not before and afterwards.
func TestCopying(t *testing.T) {
	r := newRig(t)
	r.backedUp(t)
	s := slow{r.backups.To[0], make(chan struct{}), make(chan struct{})}
	r.backups.To = []backup.Recipient{s}
	if now, ok := r.Copying(); ok {
		t.Errorf("before: %+v", now)
	}
	done := make(chan BackupMade)
	go func() {
		made, err := r.Backup(t.Context(), operator)
		if err != nil {
			t.Error(err)
		}
		done <- made
	}()
	<-s.begun
	now, ok := r.Copying()
	close(s.on)
	made := <-done
	if !ok || now.Name != made.Name || now.Size != 0 || now.Total < 4096 || now.Total > made.Size {
		t.Errorf("%v %+v, and then %+v", ok, now, made.BackupInfo)
	}
	if now, ok := r.Copying(); ok {
		t.Errorf("afterwards: %+v", now)
	}
}

// TestSpareBackups keeps the newest backup of each of the last days, weeks and months.
func TestSpareBackups(t *testing.T) {
	var all []BackupInfo // three a day for 100 days, the newest first
	for at := time.Date(2026, 11, 29, 18, 0, 0, 0, time.UTC); len(all) < 300; at = at.Add(-8 * time.Hour) {
		all = append(all, BackupInfo{Name: at.Format("20060102T150405Z"), Made: at})
	}
	kept := func(k BackupKeep) (days []string) {
		spare := map[string]bool{}
		for _, b := range k.spare(all, "") {
			spare[b.Name] = true
		}
		for _, b := range all {
			if !spare[b.Name] {
				days = append(days, b.Made.Format("01-02 15"))
			}
		}
		return days
	}
	for _, c := range []struct {
		keep BackupKeep
		want string
	}{
		{BackupKeep{}, "11-29 18 11-29 10"},
		{BackupKeep{Daily: 3}, "11-29 18 11-29 10 11-28 18 11-27 18"},
		{BackupKeep{Weekly: 3}, "11-29 18 11-29 10 11-22 18 11-15 18"},
		{BackupKeep{Monthly: 3}, "11-29 18 11-29 10 10-31 18 09-30 18"},
		{BackupKeep{Daily: 2, Weekly: 2, Monthly: 2}, "11-29 18 11-29 10 11-28 18 11-22 18 10-31 18"},
	} {
		if got := strings.Join(kept(c.keep), " "); got != c.want {
			t.Errorf("%+v keeps %s, want %s", c.keep, got, c.want)
		}
	}
	if spare := (BackupKeep{Daily: 1}).spare(nil, ""); len(spare) != 0 {
		t.Errorf("of none: %v", spare)
	}
	// The backup that lists follow has an older name, where the clock was set back.
	spare := (BackupKeep{Daily: 1}).spare(all[:9], all[4].Name)
	if slices.Contains(spare, all[4]) || len(spare) != 6 {
		t.Errorf("beside %v, %v is spare", all[4], spare)
	}
}

// TestPruneBackups removes what is spare, of this appliance alone, and writes it down before.
func TestPruneBackups(t *testing.T) {
	r := newRig(t)
	r.backedUp(t)
	log, _, err := r.Log()
	if err != nil {
		t.Fatal(err)
	}
	r.backups.Keep = BackupKeep{Daily: 1}
	now := time.Now()
	var mine []string
	for _, ago := range []time.Duration{0, time.Hour, 2 * time.Hour, 72 * time.Hour} {
		mine = append(mine, backup.Whole.Name(log.ID(), now.Add(-ago)))
	}
	others := []string{"countersign-0123456789abcdef-20200101T000000Z.backup", "notes.txt", mine[0] + backup.PartSuffix}
	for _, name := range append(slices.Clone(mine), others...) {
		if err := os.WriteFile(filepath.Join(r.backups.Folder, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	dry, err := r.PruneBackups(t.Context(), operator, true)
	if err != nil || len(dry) != 2 {
		t.Fatalf("%v, %v", dry, err)
	}
	if all, err := r.Backups(); err != nil || len(all) != 4 {
		t.Errorf("a dry run has removed: %v, %v", all, err)
	}
	removed, err := r.PruneBackups(t.Context(), operator, false)
	if err != nil || len(removed) != len(dry) {
		t.Errorf("%v, %v", removed, err)
	}
	all, err := r.Backups()
	if err != nil || all[0].Name != mine[0] || all[1].Name != mine[1] || len(all) != 2 {
		t.Errorf("%v, %v", all, err)
	}
	for _, name := range others {
		if _, err := os.Stat(filepath.Join(r.backups.Folder, name)); err != nil {
			t.Error(err)
		}
	}
	if !slices.Contains(r.events(t), audit.BackupsPruned) {
		t.Error("there is no event")
	}
}

func mustLog(t *testing.T, r *rig) audit.Log {
	t.Helper()
	log, _, err := r.Log()
	if err != nil {
		t.Fatal(err)
	}
	return log
}

// TestNextBase: lists of writes get a backup at once, and not soon after another one, also of a
// daemon that has ended, and whatever the names say of the time.
func TestNextBase(t *testing.T) {
	r := newRig(t)
	r.backedUp(t)
	ship, log := r.backups.Ship, mustLog(t, r)
	now := time.Now()
	next := func(when string, want time.Duration) {
		t.Helper()
		at, err := r.nextBackup(now)
		if got := at.Sub(now); err != nil || got.Round(time.Second) != want {
			t.Errorf("%s, the next backup is in %v (%v), want %v", when, got, err, want)
		}
	}
	next("without a list", never)
	ship.Take(1, []byte("list"))
	next("without a backup", 0)
	file := func(name string, ago time.Duration) {
		t.Helper()
		path := filepath.Join(r.backups.Folder, name)
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chtimes(path, now, now.Add(-ago))); err != nil {
			t.Fatal(err)
		}
	}
	file("countersign-0123456789abcdef-20200101T000000Z.backup", time.Second)
	file(backup.Whole.Name(log.ID(), now.Add(-time.Hour)), time.Hour)
	file(backup.Whole.Name(log.ID(), now.Add(time.Hour)), -time.Hour) // of a clock that was ahead
	next("after an hour", 0)
	file(backup.Whole.Name(log.ID(), now.Add(-time.Minute)), time.Minute)
	next("after a minute", time.Minute)
	file(backup.Whole.Name(log.ID(), now.Add(-3*time.Minute))+backup.PartSuffix, 20*time.Second)
	next("after a backup that was cut off", 100*time.Second)
	tried := now.Add(-5 * time.Second)
	r.backups.tried.Store(&tried)
	next("after an attempt of this daemon", 10*time.Second)
	tried = now.Add(-time.Hour)
	next("an hour after it", 0)
	ship.Expect()
	ship.Base(1, 1)
	next("with a backup", never)

	r.backups.Schedule = "17 2 * * *"
	r.backups.Keep = BackupKeep{Daily: 1}
	base := backup.Whole.Name(log.ID(), now.Add(-3*time.Minute))
	file(base, 0)
	r.backups.base.Store(&base)
	if removed, err := r.PruneBackups(t.Context(), operator, false); err != nil || len(removed) == 0 {
		t.Errorf("%v, %v", removed, err)
	}
	if _, err := os.Stat(filepath.Join(r.backups.Folder, base)); err != nil {
		t.Errorf("the backup that lists follow is removed: %v", err)
	}
}

// TestNextBackup: a missed tick is due at once, and otherwise the next tick is.
func TestNextBackup(t *testing.T) {
	r := newRig(t)
	r.backedUp(t)
	r.backups.Schedule = "17 2 * * *"
	now := time.Date(2026, 11, 30, 12, 0, 0, 0, time.UTC)
	next := func() time.Time {
		t.Helper()
		at, err := r.nextBackup(now)
		if err != nil {
			t.Fatal(err)
		}
		return at
	}
	if at := next(); !at.Equal(now) {
		t.Errorf("without a backup, the next is at %v", at)
	}
	ahead := filepath.Join(r.backups.Folder, "countersign-"+mustLog(t, r).ID()+"-20270101T000000Z.backup")
	if err := os.WriteFile(ahead, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if at := next(); !at.Equal(now) {
		t.Errorf("with a backup of a clock that was ahead, the next is at %v", at)
	}
	log := mustLog(t, r)
	name := func(at time.Time) string { return filepath.Join(r.backups.Folder, backup.Whole.Name(log.ID(), at)) }
	old := time.Date(2026, 11, 30, 2, 16, 59, 0, time.UTC)
	if err := os.WriteFile(name(old), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if at := next(); !at.Equal(now) {
		t.Errorf("after a missed tick, the next is at %v", at)
	}
	if err := os.WriteFile(name(old.Add(time.Second)), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if at, want := next(), time.Date(2026, 12, 1, 2, 17, 0, 0, time.UTC); !at.Equal(want) {
		t.Errorf("the next is at %v, want %v", at, want)
	}
}
