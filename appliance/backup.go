package appliance

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"countersign/audit"
	"countersign/internal/backup"
	"countersign/internal/cause"
	"countersign/internal/durable"
	"countersign/internal/escrow"
	"countersign/internal/ijson"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/mirror"
	"countersign/internal/requestid"
	"countersign/internal/resource"
	"countersign/internal/schedule"
)

// BackupConfig says what is backed up, where to, when, and for how long.
type BackupConfig struct {
	Folder   string // ""; no backups are made
	To       []backup.Recipient
	Schedule string        // cron expression of five fields, UTC; "": only when an operator asks
	Keep     BackupKeep    // of the backups in Folder
	Files    []backup.File // beside the ledger: kinds and paths
	Left     []backup.Left // files that the configuration names and no backup has
	States   map[string]string
	Version  string          // of the program
	Ship     *backup.Shipper // of the ledger's lists of writes to Folder; nil: none are shipped
	Mirror   *mirror.Mirror  // of Folder to a server; nil: there is no server

	// ProvenWithin is the longest time between two good drills without a cause; 0: none is wanted.
	ProvenWithin time.Duration
	// HoldersWithin is the same for drills with holders.
	HoldersWithin time.Duration
}

// BackupKeep is how many backups are kept: the newest of each of the last days, weeks and months
// that have one (UTC; weeks begin on Mondays). The newest two backups are always kept.
type BackupKeep struct{ Daily, Weekly, Monthly int }

// BackupInfo is a backup in the folder.
type BackupInfo struct {
	Name  string
	Size  int64
	Made  time.Time
	Total int64 // bytes to copy, of a backup that is being made, with the copied ones in Size; or 0

	Mirrored string // whether the SFTP server has it, as Mirror.Has says; "": there is no server
}

// BackupMade is a backup that was just made.
type BackupMade struct {
	BackupInfo
	Manifest backup.Manifest
	Event    uint64        // number of the event BackupMade
	Took     time.Duration // from the reading of the ledger to the name of the file
}

// backups is the state of backups.
type backups struct {
	BackupConfig
	making  manage.Lock
	failure atomic.Pointer[error]     // of the last backup; nil after a good one
	away    atomic.Pointer[error]     // of the last look at the folder
	newest  atomic.Int64              // time of the newest backup, Unix seconds; 0: none is known
	tried   atomic.Pointer[time.Time] // begin or end of the newest attempt of this daemon, or nil
	base    atomic.Pointer[string]    // name of the backup that the shipped lists follow, or nil
	halted  atomic.Bool               // the daemon stops, and must not wait for a backup
	copying atomic.Pointer[halting]   // the backup that is being made, or nil

	drill atomic.Pointer[drillRecord] // as in the ledger; nil: no drill was ever wanted
}

var errHalted = errors.New("the daemon stops")

// halting is the file of a backup, which ends with an error when the daemon stops.
type halting struct {
	*bufio.Writer
	halted *atomic.Bool
	info   BackupInfo
	copied atomic.Int64
}

func (h *halting) Write(b []byte) (int, error) {
	if h.halted.Load() {
		return 0, errHalted
	}
	h.copied.Add(int64(len(b)))
	return h.Writer.Write(b)
}

// Copying returns the backup that is being made.
func (a *Appliance) Copying() (info BackupInfo, ok bool) {
	h := a.backups.copying.Load()
	if h == nil {
		return info, false
	}
	info = h.info
	info.Size = min(h.copied.Load(), info.Total)
	return info, true
}

// Backup makes a backup in the folder of the configuration. Admissions go on meanwhile. A file of
// the final name is whole. A failure is an event, and a cause of the state until a backup is made.
func (a *Appliance) Backup(ctx context.Context, who audit.Actor) (made BackupMade, err error) {
	b := &a.backups
	if b.Folder == "" {
		return made, fmt.Errorf("%w: the configuration has no folder and recipients for backups: "+
			"set folder and recipients of [backup]", manage.ErrConflict)
	}
	// The backup of the daemon's start is short. Callers do not stand in line for longer.
	waiting, cancel := context.WithTimeout(ctx, backupWait)
	defer cancel()
	if err := b.making.Acquire(waiting); err != nil {
		return made, fmt.Errorf("%w: a backup is being made: see countersign admin backup list", manage.ErrConflict)
	}
	defer b.making.Release()
	return a.makeBackup(context.WithoutCancel(ctx), who)
}

// backupWait is the longest wait for another backup.
const backupWait = 3 * time.Second

func (a *Appliance) makeBackup(ctx context.Context, who audit.Actor) (made BackupMade, err error) {
	b := &a.backups
	log, _, err := a.Log()
	if err != nil {
		return made, err
	}
	began := time.Now()
	b.tried.Store(&began)
	defer func() { b.tried.Store(new(time.Now())) }()
	for { // a name has one second
		made.Name = backup.Whole.Name(log.ID(), began)
		if _, err := os.Lstat(filepath.Join(b.Folder, made.Name)); err != nil {
			break
		}
		sleepUntil(ctx, began.Truncate(time.Second).Add(time.Second), nil)
		began = time.Now()
	}
	made.Made = began.UTC().Truncate(time.Second)
	if b.Ship != nil {
		b.Ship.Expect()
	}
	defer func() {
		if err != nil && b.Ship != nil {
			b.Ship.NoBase()
		}
		if err == nil {
			b.failure.Store(nil)
			b.newest.Store(made.Made.Unix())
			a.log.Info("a backup was made", "name", made.Name, "bytes", made.Size, "took", made.Took,
				requestid.Attr(who.Request))
			return
		}
		err = fmt.Errorf("backup %s: %w", made.Name, err)
		b.failure.Store(&err)
		recorded := a.record(context.WithoutCancel(ctx), audit.NewBackupFailed(who, made.Name, err))
		err = errors.Join(err, recorded)
	}()
	path := filepath.Join(b.Folder, made.Name)
	part := path + backup.PartSuffix
	if err := b.removeParts(log); err != nil {
		return made, err
	}
	f, err := os.OpenFile(part, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return made, err
	}
	defer os.Remove(part) // after the rename, the name does not exist
	defer f.Close()
	buffered := bufio.NewWriterSize(&durable.Paced{File: f}, 256<<10) // admissions wait for the same disk
	err = a.ledger.Copy(func(c ledger.Copy) error {
		manifest, parts, err := a.backupParts(ctx, c, log, began)
		if err != nil {
			return err
		}
		prove := func(digest string) (backup.Proof, error) {
			e := audit.NewBackupMade(who, made.Name, digest, parts[0].Size, len(b.To))
			p, err := a.appendProven(ctx, e, c.Epoch, c.Tree.Size)
			made.Event = p.Event
			return p, err
		}
		to := &halting{Writer: buffered, halted: &b.halted, info: made.BackupInfo}
		for _, p := range parts {
			to.info.Total += p.Size
		}
		b.copying.Store(to)
		defer b.copying.Store(nil)
		made.Manifest, err = backup.Write(to, b.To, manifest, parts, prove)
		return err
	})
	if err := errors.Join(err, buffered.Flush()); err != nil {
		return made, err
	}
	if err := f.Sync(); err != nil {
		return made, err
	}
	info, err := f.Stat()
	if err != nil {
		return made, err
	}
	if err := os.Rename(part, path); err != nil {
		return made, err
	}
	made.Size, made.Took = info.Size(), time.Since(began)
	if err := durable.Sync(b.Folder); err != nil || b.Ship == nil {
		return made, err
	}
	b.Ship.Base(made.Manifest.Lists, made.Size)
	b.base.Store(&made.Name)
	if err := a.pruneLists(); err != nil {
		a.log.Error("lists of writes that no backup needs are still there", "err", err)
	}
	return made, nil
}

// pruneLists removes the lists of writes of before the newest backup but one: if the newest can't
// be read, the one before leads on.
func (a *Appliance) pruneLists() error {
	all, err := a.Backups()
	if err != nil || len(all) == 0 {
		return err
	}
	return a.backups.Ship.Prune(all[min(1, len(all)-1)].Made)
}

// removeParts removes what a daemon that was killed has left of its backups.
func (b *backups) removeParts(log audit.Log) error {
	entries, err := os.ReadDir(b.Folder)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if _, ok := (backup.Whole + backup.PartSuffix).Begun(e.Name(), log.ID()); !ok {
			continue
		}
		if err := os.Remove(filepath.Join(b.Folder, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// appendProven writes an event, and proves it under a checkpoint that continues the tree of an
// epoch with so many events.
func (a *Appliance) appendProven(
	ctx context.Context, e audit.Event, epoch uint32, size uint64,
) (p backup.Proof, err error) {
	index, err := a.ledger.Append(ctx, ledger.EventOf(e))
	if err != nil {
		return p, err
	}
	proven, continued, err := a.EventProof(ctx, index, size)
	if err != nil {
		return p, err
	}
	if proven.Epoch != epoch {
		return p, fmt.Errorf("%w: epoch %d of the audit log has just ended: make the backup again",
			manage.ErrConflict, epoch)
	}
	p.Proof = audit.Proof{
		Event: index, Index: proven.Index, Leaf: proven.Leaf, Checkpoint: []byte(proven.Checkpoint),
		Path: []audit.Hash{},
	}
	for _, h := range proven.Path {
		p.Path = append(p.Path, audit.Hash(h))
	}
	for _, h := range continued.Path {
		p.Consistency = append(p.Consistency, audit.Hash(h))
	}
	return p, nil
}

// backupParts returns the files of a backup, the ledger first, and the manifest without the files.
func (a *Appliance) backupParts(
	ctx context.Context, c ledger.Copy, log audit.Log, made time.Time,
) (m backup.Manifest, parts []backup.Part, err error) {
	b := &a.backups
	logKey, err := a.Keys.LogKey()
	if err != nil {
		return m, nil, err
	}
	root, err := c.Tree.Root()
	if err != nil {
		return m, nil, err
	}
	m = backup.Manifest{
		Version: b.Version, LogKey: hex.EncodeToString(logKey.Info().PublicKey), MadeMS: made.UnixMilli(),
		Epoch: c.Epoch, First: c.First, Size: c.Tree.Size, Root: root.String(), Lists: c.Lists,
		Left: slices.Concat([]backup.Left{}, b.Left), Keys: []backup.Key{},
	}
	if b.Ship != nil {
		m.ListsKey = hex.EncodeToString(b.Ship.PublicKey())
	}
	for _, k := range a.Keys.All() {
		info := k.Info()
		m.Keys = append(m.Keys, backup.Key{
			Ref: info.Ref, Algorithm: info.Algorithm, Custody: info.Custody, Token: k.Token, State: string(k.State),
			PublicKey: hex.EncodeToString(info.PublicKey), Recovery: k.Recovery, Envelope: envelopeOf(k),
		})
	}
	parts = []backup.Part{{
		File: backup.File{Kind: backup.Ledger, Mode: 0o600}, Size: c.Size(),
		Copy: func(w io.Writer) error { _, err := c.WriteTo(w); return err },
	}}
	for _, f := range b.Files {
		if f.Kind == backup.Ledger {
			parts[0].File.Path = f.Path
			continue
		}
		content, err := os.ReadFile(f.Path)
		if err != nil {
			return m, nil, err
		}
		info, err := os.Stat(f.Path)
		if err != nil {
			return m, nil, err
		}
		f.Mode = uint32(info.Mode().Perm())
		parts = append(parts, backup.Bytes(f, content))
	}
	for _, token := range slices.Sorted(maps.Keys(b.States)) {
		records, err := a.records(ctx, token)
		if err != nil {
			return m, nil, fmt.Errorf("token %s: %w", token, err)
		}
		has := func(k backup.Key) bool { return k.Token == token }
		if len(records) == 0 && slices.ContainsFunc(m.Keys, has) {
			return m, nil, fmt.Errorf("token %s: %s has no record of its keys", token, b.States[token])
		}
		for _, name := range slices.Sorted(maps.Keys(records)) {
			path := filepath.Join(b.States[token], name)
			f := backup.File{Kind: backup.TokenFile, Path: path, Token: token, Mode: 0o600}
			parts = append(parts, backup.Bytes(f, records[name]))
		}
	}
	return m, parts, nil
}

// envelopeOf returns SHA-256 of the envelope of a recoverable version, hexadecimal, or "".
func envelopeOf(k *keyring.Key) string {
	if len(k.Envelope) == 0 {
		return ""
	}
	return escrow.Digest(k.Envelope)
}

// records returns all files of a token's keys.
func (a *Appliance) records(ctx context.Context, token string) (map[string][]byte, error) {
	store, ok := a.tokens[token].(keystore.Recorder)
	if !ok {
		return nil, nil
	}
	all := map[string][]byte{}
	for last := ""; ; {
		some, err := store.Records(ctx, last)
		if err != nil || len(some) == 0 {
			return all, err
		}
		maps.Copy(all, some)
		last = slices.Max(slices.Collect(maps.Keys(some)))
	}
}

// Backups lists the backups of this appliance in the folder, the newest first.
func (a *Appliance) Backups() (all []BackupInfo, err error) {
	log, _, err := a.Log()
	if err != nil || a.backups.Folder == "" {
		return nil, err
	}
	entries, err := os.ReadDir(a.backups.Folder)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		made, ok := backup.Whole.Begun(e.Name(), log.ID())
		if !ok {
			continue
		}
		info, err := e.Info()
		if err != nil { // removed meanwhile
			continue
		}
		found := BackupInfo{Name: e.Name(), Size: info.Size(), Made: made}
		if m := a.backups.Mirror; m != nil {
			found.Mirrored = m.Has(e.Name())
		}
		all = append(all, found)
	}
	slices.SortFunc(all, func(x, y BackupInfo) int { return y.Made.Compare(x.Made) })
	return all, nil
}

// OpenBackup opens a backup in the folder. The caller closes the file.
func (a *Appliance) OpenBackup(name string) (*os.File, error) {
	all, err := a.Backups()
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(all, func(b BackupInfo) bool { return b.Name == name }) {
		return nil, fmt.Errorf("backup %q: %w: countersign admin backup list", ijson.Clip(name), manage.ErrNotFound)
	}
	return os.Open(filepath.Join(a.backups.Folder, name))
}

// spare returns the backups that are not to be kept. all has the newest first. The newest two are
// kept, and base: with a clock that was set back, base need not be among the newest.
func (k BackupKeep) spare(all []BackupInfo, base string) (spare []BackupInfo) {
	kept := map[string]bool{base: true}
	for _, rule := range []struct {
		most   int
		period func(time.Time) string
	}{
		{k.Daily, func(t time.Time) string { return t.Format("2006-01-02") }},
		{k.Weekly, func(t time.Time) string { y, w := t.ISOWeek(); return fmt.Sprint(y, " ", w) }},
		{k.Monthly, func(t time.Time) string { return t.Format("2006-01") }},
	} {
		seen := map[string]bool{}
		for _, b := range all {
			if p := rule.period(b.Made); !seen[p] && len(seen) < rule.most {
				seen[p], kept[b.Name] = true, true
			}
		}
	}
	for i, b := range all {
		if i > 1 && !kept[b.Name] {
			spare = append(spare, b)
		}
	}
	return spare
}

// PruneBackups removes the backups that are not to be kept, or with dry only names them.
func (a *Appliance) PruneBackups(ctx context.Context, who audit.Actor, dry bool) (removed []BackupInfo, err error) {
	all, err := a.Backups()
	if err != nil {
		return nil, err
	}
	base := ""
	if name := a.backups.base.Load(); name != nil {
		base = *name
	}
	removed = a.backups.Keep.spare(all, base)
	if dry || len(removed) == 0 {
		return removed, nil
	}
	names := make([]string, len(removed))
	for i, b := range removed {
		names[i] = b.Name
	}
	if err := a.record(ctx, audit.NewBackupsPruned(who, names)); err != nil {
		return nil, err
	}
	for _, name := range names {
		if err := os.Remove(filepath.Join(a.backups.Folder, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return removed, err
		}
	}
	return removed, durable.Sync(a.backups.Folder)
}

// Times of the backups that the daemon makes by itself.
const (
	backupFirst = 30 * time.Second // after one that failed; then twice as long, and so on
	backupRetry = 10 * time.Minute // the longest of these times
	baseEvery   = 15 * time.Second // between two for the lists of writes
	baseStart   = 2 * time.Minute  // the same at a start: a daemon may end again and again
)

// unless calls do, and returns without it when ctx ends: the folder can be on a disk that hangs.
func unless[T any](ctx context.Context, do func() (T, error)) (result T, err error) {
	type done struct {
		result T
		err    error
	}
	ended := make(chan done, 1)
	go func() {
		result, err := do()
		ended <- done{result, err}
	}()
	select {
	case d := <-ended:
		return d.result, d.err
	case <-ctx.Done():
		return result, ctx.Err()
	}
}

// keepBackups makes the backups of the schedule until ctx ends, and those that the lists of writes
// need: each start begins a chain of lists. A backup that was missed while the daemon was down is
// made at once.
func (a *Appliance) keepBackups(ctx context.Context) {
	b := &a.backups
	if b.Folder == "" || b.Schedule == "" && b.Ship == nil {
		return
	}
	var needed <-chan struct{}
	if b.Ship != nil {
		needed = b.Ship.Needed()
	}
	for retry := backupFirst; ; {
		due, err := unless(ctx, func() (time.Time, error) { return a.nextBackup(time.Now()) })
		if err == nil && due.After(time.Now()) {
			sleepUntil(ctx, due, needed)
			if ctx.Err() != nil {
				return
			}
			continue // another backup may have been made meanwhile
		}
		if err == nil {
			_, err = unless(ctx, func() (BackupMade, error) { return a.Backup(ctx, audit.Daemon()) })
		}
		if err == nil {
			_, err = unless(ctx, func() ([]BackupInfo, error) { return a.PruneBackups(ctx, audit.Daemon(), false) })
		}
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			retry = backupFirst
			continue
		} else if errors.Is(err, manage.ErrConflict) { // an operator's backup
			sleepUntil(ctx, time.Now().Add(baseEvery), nil)
			continue
		}
		a.log.Error("a backup was not made; a retry follows", "err", err, "in", retry)
		sleepUntil(ctx, time.Now().Add(retry), nil)
		retry = min(2*retry, backupRetry)
	}
}

// never is a time that no daemon waits for.
const never = 100 * 365 * 24 * time.Hour

// nextBackup returns the time of the next backup: now, if none was made since the last tick.
func (a *Appliance) nextBackup(now time.Time) (time.Time, error) {
	if b := &a.backups; b.Ship != nil && b.Ship.NeedsBase() {
		return a.nextBase(now)
	} else if b.Schedule == "" {
		return now.Add(never), nil
	}
	all, err := a.Backups()
	if err != nil {
		return now, err
	}
	all = past(all, now)
	last, err := schedule.Last(a.backups.Schedule, now)
	if err != nil {
		return now, err
	}
	if len(all) == 0 || all[0].Made.Before(last) {
		return now, nil
	}
	return schedule.Next(a.backups.Schedule, now)
}

// sleepUntil waits for a time by the system's clock, in steps that follow a clock that is set, or
// until wake has a value. sleepUntil reports whether the time has come.
func sleepUntil(ctx context.Context, at time.Time, wake <-chan struct{}) bool {
	for {
		left := time.Until(at.Round(0))
		if left <= 0 {
			return ctx.Err() == nil
		}
		select {
		case <-time.After(min(left, time.Minute)):
		case <-wake:
			return false
		case <-ctx.Done():
			return false
		}
	}
}

// lookEvery is the time between two looks at the folder of backups.
const lookEvery = 10 * time.Second

// watchBackups looks at the folder until ctx ends. The folder can be on a disk of the network that
// hangs, so neither the state nor a scrape looks by itself.
func (a *Appliance) watchBackups(ctx context.Context) {
	if a.backups.Folder == "" {
		return
	}
	for ctx.Err() == nil {
		unless(ctx, func() (struct{}, error) { a.lookAtBackups(); return struct{}{}, nil })
		sleepUntil(ctx, time.Now().Add(lookEvery), nil)
	}
}

func (a *Appliance) lookAtBackups() {
	b := &a.backups
	base := b.base.Load()
	all, err := a.Backups()
	if err != nil {
		err = fmt.Errorf("the folder of backups: %w", err)
		b.away.Store(&err)
		return
	}
	b.away.Store(nil)
	named := func(i BackupInfo) bool { return i.Name == *base }
	if base != nil && !slices.ContainsFunc(all, named) && b.base.CompareAndSwap(base, nil) {
		b.Ship.Lost()
	}
	if all = past(all, time.Now()); len(all) > 0 {
		b.newest.Store(all[0].Made.Unix())
	} else {
		b.newest.Store(0)
	}
}

// past returns the backups without those of a clock that was ahead. all has the newest first.
func past(all []BackupInfo, now time.Time) []BackupInfo {
	for len(all) > 0 && all[0].Made.After(now) {
		all = all[1:]
	}
	return all
}

// nextBase returns the time of the next backup for the lists of writes: baseEvery after the last
// attempt, or baseStart after one of a daemon that has ended.
func (a *Appliance) nextBase(now time.Time) (time.Time, error) {
	if tried := a.backups.tried.Load(); tried != nil {
		return now.Add(max(0, baseEvery-now.Sub(*tried))), nil // of the monotonic clock
	}
	log, _, err := a.Log()
	if err != nil {
		return now, err
	}
	entries, err := os.ReadDir(a.backups.Folder)
	if err != nil {
		return now, err
	}
	next := now
	for _, e := range entries {
		_, whole := backup.Whole.Begun(e.Name(), log.ID())
		_, part := (backup.Whole + backup.PartSuffix).Begun(e.Name(), log.ID())
		info, err := e.Info()
		if !whole && !part || err != nil {
			continue
		}
		if since := now.Sub(info.ModTime()); since >= 0 && since < baseStart {
			next = now.Add(max(next.Sub(now), baseStart-since))
		}
	}
	return next, nil
}

// shipLists begins to write the lists of writes beside the backups. Their end is the end of the
// ledger.
func (a *Appliance) shipLists() {
	ship := a.backups.Ship
	if ship == nil {
		return
	}
	log, _, err := a.Log()
	if err != nil { // Behind says so later
		a.log.Error("no lists of writes are shipped", "err", err)
		return
	}
	ship.Begin(log.ID())
}

// mirrorBackups begins to carry the backups and lists to the server. The server keeps by the rule
// of the folder. The caller that closes the Shipper closes the Mirror afterwards.
func (a *Appliance) mirrorBackups() {
	b := &a.backups
	if b.Mirror == nil {
		return
	}
	log, _, err := a.Log()
	if err != nil { // shipLists and Backup say so
		return
	}
	rule := mirror.Rule{ID: log.ID(), Spare: func(names []string) (spare []string) {
		var all []BackupInfo
		for _, name := range names {
			if made, ok := backup.Whole.Begun(name, log.ID()); ok {
				all = append(all, BackupInfo{Name: name, Made: made})
			}
		}
		slices.SortFunc(all, func(x, y BackupInfo) int { return y.Made.Compare(x.Made) })
		base := ""
		if name := b.base.Load(); name != nil {
			base = *name
		}
		for _, info := range b.Keep.spare(all, base) {
			spare = append(spare, info.Name)
		}
		return spare
	}}
	if b.Ship != nil {
		rule.Shipped = b.Ship.Shipped
	}
	b.Mirror.Begin(rule)
}

// mirrorLate is the time after which a server that lacks something is a cause of the state.
// Replaceable for tests.
var mirrorLate = 3 * time.Minute

const (
	mirrorSending = time.Hour // the same while the server takes a backup
	mirrorEvents  = time.Hour // between two events of a failure
)

// mirrorServer is the server among the resources. No token has a blank in its name.
var mirrorServer = resource.Resource{
	Name: "backup server", Failed: audit.DeviceUnavailable, Recovered: audit.DeviceRecovered,
}

// mirrorFailure says what the server lacks, and why, or returns nil.
func (a *Appliance) mirrorFailure() error {
	m := a.backups.Mirror
	if m == nil {
		return nil
	}
	age, moving, err := m.Behind()
	if age <= mirrorLate || moving && age <= mirrorSending {
		return nil
	}
	switch {
	case err == nil && moving:
		err = errors.New("a backup is still being sent")
	case err == nil:
		err = errors.New("the server or the folder of backups does not answer")
	}
	return fmt.Errorf("%s lacks the last %v: %s", m.Server(), age.Round(time.Second), cause.Line(err.Error()))
}

// watchMirror writes the events of the server until ctx ends.
func (a *Appliance) watchMirror(ctx context.Context) {
	if a.backups.Mirror == nil {
		return
	}
	for failed := (time.Time{}); ctx.Err() == nil; {
		failed = a.noteMirror(ctx, failed)
		sleepUntil(ctx, time.Now().Add(lookEvery), nil)
	}
}

// noteMirror has one event for the begin of a failure of the server and one for its end. A server
// that comes and goes does not fill the log: within mirrorEvents, one failure is an event. failed
// is the time of the last such event, and the result the new one.
func (a *Appliance) noteMirror(ctx context.Context, failed time.Time) time.Time {
	err := a.mirrorFailure()
	if err == nil {
		a.monitor.Report(ctx, mirrorServer, true, nil)
	} else if failed.IsZero() || time.Since(failed) >= mirrorEvents {
		a.monitor.Report(ctx, mirrorServer, false, err)
		return time.Now()
	}
	return failed
}

// listsLate is the age of a write without a restore that makes a cause: a daemon that starts again
// soon after a backup waits for baseStart.
const listsLate = 3 * time.Minute

// backupCauses is the failure of the last backup, or a folder that is away, writes that no restore
// would have, and a server that lacks something.
func (a *Appliance) backupCauses() (causes []cause.Cause) {
	b := &a.backups
	for _, err := range []*error{b.away.Load(), b.failure.Load()} {
		if err != nil {
			causes = append(causes, cause.Backup.Of("", "%v", *err))
			break
		}
	}
	causes = append(causes, slices.Concat(a.drillCauses(time.Now()), a.holderCauses(time.Now()))...)
	causes = append(causes, cause.Mirror.Err("", a.mirrorFailure())...)
	if b.Ship == nil {
		return causes
	}
	if age, err := b.Ship.Behind(); age > listsLate {
		why := "the folder of backups does not answer"
		switch {
		case err != nil:
			why = err.Error()
		case b.Ship.NeedsBase():
			why = "no backup of this start of the daemon has what was written since then"
		}
		causes = append(causes, cause.Lists.Of("", "a restore would lose the last %v: %s", age.Round(time.Second), why))
	}
	return causes
}
