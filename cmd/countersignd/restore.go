package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"countersign/approval"
	"countersign/audit"
	"countersign/internal/anchor"
	"countersign/internal/backup"
	"countersign/internal/cli"
	"countersign/internal/durable"
	"countersign/internal/gate"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/operators"
	"countersign/internal/recipient"
	"countersign/internal/resource"
	"countersign/tpm"

	"golang.org/x/sys/unix"
)

// opening says how a backup is opened.
type opening struct {
	file       string
	identities []string          // files
	scratch    string            // the folder for the temporary folder
	lists      string            // the folder of the lists of writes; "": that of the file; noLists
	until      uint64            // the last list to use
	keys       []backup.Identity // private keys that were read before
	keep       bool              // the folder stays after an error: the caller overwrites it
}

// lastList is the number of no list: all lists are used.
const lastList = math.MaxUint64

// noLists leaves the lists of writes out.
const noLists = "none"

// openedBackup is a backup in a scratch folder, with all that can be checked without its appliance.
// The ledger has the lists of writes.
type openedBackup struct {
	backup.Contents
	shipped backup.Shipped
	end     uint64    // events in the ledger
	reaches time.Time // time of the last event in the ledger
	log     audit.Log
	folder  string // of the extracted files
}

// openBackup extracts a backup into a new folder inside of scratch, applies the lists of writes
// that follow, and checks all: the encryption, the hashes, the proof by the log's key, the
// signatures of the lists, each page and event of the ledger, and each checkpoint in it. The caller
// removes the folder.
func openBackup(ctx context.Context, o opening) (b openedBackup, err error) {
	path := o.file
	keys := o.keys
	if keys == nil {
		if keys, err = readIdentities(ctx, o.identities); err != nil {
			return b, err
		}
	}
	f, err := openRegular(path)
	if err != nil {
		return b, err
	}
	defer f.Close()
	if b.folder, err = os.MkdirTemp(o.scratch, ".backup-"); err != nil {
		return b, err
	}
	defer func() {
		if err != nil {
			if !o.keep {
				os.RemoveAll(b.folder)
			}
			err = fmt.Errorf("%s: %w", path, err)
		}
	}()
	if b.Contents, err = backup.Extract(untilEnd{ctx, f}, keys, b.folder); err != nil {
		return b, err
	}
	if b.log, err = b.Manifest.Log(); err != nil {
		return b, err
	}
	if err := b.follow(ctx, o, keys); err != nil {
		return b, err
	}
	if err := ledger.Check(b.ledger(), ledger.Options{}, nil); errors.Is(err, ledger.ErrOlder) {
		// The migration of a copy reads it, and a second check reads all.
		err = b.withLedger(ledger.Options{}, func(*ledger.Ledger) error { return nil })
		if err == nil {
			err = ledger.Check(b.ledger(), ledger.Options{}, nil)
		}
		if err != nil {
			return b, err
		}
	} else if err != nil {
		return b, err
	}
	err = b.withLedger(ledger.Options{}, b.checkLog)
	return b, err
}

// readIdentities reads the private keys of recipients.
func readIdentities(ctx context.Context, files []string) (keys []backup.Identity, err error) {
	for _, file := range files {
		more, err := recipient.ReadIdentities(file, cli.Passphrase(ctx, file))
		if err != nil {
			return nil, fmt.Errorf("--identity: %w", err)
		}
		keys = append(keys, more...)
	}
	return keys, nil
}

// openRegular opens a file, and nothing that would make the caller wait, such as a FIFO.
func openRegular(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, errors.Join(fmt.Errorf("%s is no regular file", path), err, f.Close())
	}
	return f, nil
}

// follow applies the lists of writes to the ledger.
func (b *openedBackup) follow(ctx context.Context, o opening, keys []backup.Identity) (err error) {
	b.shipped.Last = b.Lists
	if o.lists == noLists {
		return nil
	}
	var replica *ledger.Replica
	defer func() {
		if replica != nil {
			err = errors.Join(err, replica.Close())
		}
	}()
	folder := cmp.Or(o.lists, filepath.Dir(o.file))
	b.shipped, err = backup.ReadLists(b.Manifest, folder, keys, o.until, func(lists [][]byte) (err error) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if replica == nil {
			if replica, err = ledger.OpenReplica(b.ledger()); err != nil {
				return err
			}
		}
		return replica.Apply(lists...)
	})
	if errors.Is(err, backup.ErrLists) {
		err = fmt.Errorf("%w. The lists to number %d are good: --until-list %[2]d goes to there, and --lists %s "+
			"leaves all lists out", err, b.shipped.Last, noLists)
	}
	return err
}

// untilEnd is a file that can't be read any more when ctx ends: a signal removes what was
// decrypted.
type untilEnd struct {
	ctx context.Context
	*os.File
}

func (u untilEnd) Read(b []byte) (int, error) {
	if err := u.ctx.Err(); err != nil {
		return 0, err
	}
	return u.File.Read(b)
}

// ledger is the path of the extracted ledger.
func (b openedBackup) ledger() string { return b.Contents.Files[0] }

func (b openedBackup) withLedger(o ledger.Options, do func(*ledger.Ledger) error) (err error) {
	l, err := ledger.Open(b.ledger(), o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	return do(l)
}

// checkLog compares the ledger with the manifest, whose tree the lists of writes continue, and
// verifies the checkpoints in it.
func (b *openedBackup) checkLog(l *ledger.Ledger) error {
	b.end = l.End()
	var last audit.Event
	var broken error
	if err := l.Events(b.end-1, func(_ uint64, event []byte) bool {
		last, broken = audit.Decode(event)
		return true
	}); err != nil || broken != nil {
		return fmt.Errorf("%w: its last event: %w", backup.ErrDamaged, errors.Join(err, broken))
	}
	b.reaches = time.UnixMilli(last.TimeMS)
	var root audit.Hash
	err := l.Hashes(b.Epoch, func(r audit.Reader) error {
		tree, err := audit.LoadTree(b.Size, r)
		if err == nil {
			root, err = tree.Root()
		}
		return err
	})
	epochs, all := l.Epochs()
	if err := errors.Join(err, all); err != nil && !errors.Is(err, ledger.ErrDropped) {
		return fmt.Errorf("%w: %w", backup.ErrDamaged, err)
	}
	epoch, first, tree := l.Head()
	unlike := b.shipped.Last == b.Lists && (epoch != b.Epoch || first != b.First || tree.Size != b.Size)
	if unlike || err == nil && root.String() != b.Root || b.end < b.First+b.Size {
		return fmt.Errorf("%w: its ledger has %d events of epoch %d, and the manifest says %d of epoch %d",
			backup.ErrDamaged, tree.Size, epoch, b.Size, b.Epoch)
	}
	for _, e := range epochs {
		if e.Checkpoint == "" {
			continue
		}
		c, err := b.log.Open([]byte(e.Checkpoint))
		if err == nil && (c.Epoch != e.Number || c.Size != e.Signed) {
			err = errors.New("it is of another tree")
		}
		if err != nil {
			return fmt.Errorf("%w: the checkpoint of epoch %d: %w", backup.ErrDamaged, e.Number, err)
		}
	}
	return nil
}

// describe prints what a backup is.
func (b openedBackup) describe(w io.Writer) {
	line := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%-12s %s\n", name, fmt.Sprintf(format, args...))
	}
	line("appliance", "%s", b.log.Name())
	line("made", "%s, %s ago, by version %s", b.Made().Format(time.RFC3339),
		cli.FormatDuration(time.Since(b.Made()).Round(time.Second)), b.Version)
	line("log", "%s, to epoch %d; event %d proves the backup", cli.Count(b.First+b.Size, "event"), b.Epoch, b.Event)
	for _, name := range b.shipped.Files {
		line("lists", "%s", name)
	}
	for _, note := range b.shipped.Notes {
		line("lists", "%s", note)
	}
	line("reaches", "%s", b.reach())
	line("manifest", "sha256 %s", b.Digest)
	for _, f := range b.Manifest.Files {
		line("file", "%s (%s, %s)", f.Path, f.Kind, cli.Count(f.Size, "byte"))
	}
	for _, l := range b.Left {
		line("not in it", "%s (%s)", l.Path, l.What)
	}
	for _, k := range b.Keys {
		line("key", "%v %s %s, on the token %s: %s", k.Ref, k.State, k.Custody, k.Token, k.PublicKey)
	}
}

// reach says to where the ledger goes with the lists of writes.
func (b openedBackup) reach() string {
	return fmt.Sprintf("%s, %s, list %d of writes (%s after the backup)", b.reaches.UTC().Format(time.RFC3339),
		cli.Count(b.end, "event"), b.shipped.Last, cli.Count(b.shipped.Last-b.Lists, "list"))
}

// verifyBackup is countersignd backup verify.
func verifyBackup(ctx context.Context, o opening, stdout io.Writer) error {
	b, err := openBackup(ctx, o)
	if err != nil {
		return err
	}
	defer os.RemoveAll(b.folder)
	b.describe(stdout)
	fmt.Fprintln(stdout, "ok: the encryption, each file, the proof of the log, the lists of writes, and each page, "+
		"event and checkpoint of the ledger")
	return nil
}

// restoring has the options of countersignd restore.
type restoring struct {
	opening
	appliance string            // the name that the operator knows
	moved     map[string]string // paths of the backup, and where they are now
	textApproval

	ledger *os.File // of the backup, opened before this process becomes the daemon's user
	made   []string // folders that restore has made
}

// place returns the path of a file on this machine.
func (r restoring) place(path string) string {
	best := ""
	for old := range r.moved {
		if (path == old || below(path, old)) && len(old) > len(best) {
			best = old
		}
	}
	if best == "" {
		return path
	}
	return filepath.Join(r.moved[best], strings.TrimPrefix(path, best))
}

// configuration returns the configuration of the backup with the paths of this machine. A path is a
// quoted text that is absolute.
func (r restoring) configuration(content []byte) []byte {
	return quoted.ReplaceAllFunc(content, func(text []byte) []byte {
		inside := string(text[1 : len(text)-1])
		return slices.Concat(text[:1], []byte(r.place(inside)), text[:1])
	})
}

var quoted = regexp.MustCompile(`"/[^"\\\n]*"|'/[^'\n]*'`)

// restore is countersignd restore. Without approvals, restore puts the files of the backup back
// that are missing here, says what comes back and what is lost, and writes the text to approve.
// With the approvals of that text, restore puts the ledger in place.
func restore(ctx context.Context, r restoring, stdout, stderr io.Writer) (err error) {
	moved := map[string]string{}
	for old, now := range r.moved {
		if !filepath.IsAbs(old) || !filepath.IsAbs(now) {
			return configError{fmt.Errorf("--map %s=%s: both must be absolute paths", old, now)}
		}
		moved[filepath.Clean(old)] = filepath.Clean(now)
	}
	r.moved = moved
	if err := r.openText(); err != nil {
		return err
	}
	defer r.discardText()
	b, err := openBackup(ctx, r.opening)
	if err != nil {
		return err
	}
	defer func() { os.RemoveAll(b.folder) }()
	b.describe(stdout)
	// Anybody can make a backup of an appliance of his own, and what follows writes files.
	if r.appliance != b.log.Name() {
		return configError{fmt.Errorf("--appliance %q: this is a backup of %s: name the appliance by the log's "+
			"key that you know", r.appliance, b.log.Name())}
	}
	at, err := r.putFiles(b, stdout)
	if err != nil {
		return err
	}
	if r.ledger, err = os.Open(b.ledger()); err != nil {
		return err
	}
	defer r.ledger.Close()
	if err := os.RemoveAll(b.folder); err != nil { // the daemon's user need not be able to do so
		return err
	}
	return withConfig(at, func(c Config) error {
		if err := r.giveFiles(b, c); err != nil {
			return err
		}
		return withLauncher(at, "", c, func(c Config) error {
			if err := refuseAccess(at, c); err != nil {
				return err
			}
			return r.restore(ctx, b, c, stdout, stderr)
		})
	})
}

// putFiles writes the files beside the ledger that are missing on this machine, and returns the
// path of the configuration. A file with another content stays.
func (r *restoring) putFiles(b openedBackup, stdout io.Writer) (configuration string, err error) {
	allowed, configuration, err := r.files(b)
	if err != nil {
		return "", err
	}
	foreign, err := r.foreign(b)
	if err != nil {
		return "", err
	}
	for i, f := range b.Manifest.Files {
		if f.Kind == backup.Ledger {
			continue
		}
		content, err := os.ReadFile(b.Contents.Files[i])
		if err != nil {
			return "", err
		}
		path := r.place(f.Path)
		if f.Kind == backup.TokenFile && foreign[filepath.Dir(path)] {
			fmt.Fprintf(stdout, "%-12s %s stays away: its folder belongs to another TPM than the backup's\n", "file",
				path)
			continue
		}
		if f.Kind == backup.Configuration {
			content = r.configuration(content)
		} else if !allowed(f.Kind, path) {
			return "", fmt.Errorf("%w: its configuration does not name %s", backup.ErrDamaged, path)
		}
		switch there, err := os.ReadFile(path); {
		case err == nil && bytes.Equal(there, content):
			fmt.Fprintf(stdout, "%-12s %s is as in the backup\n", "file", path)
		case err == nil:
			fmt.Fprintf(stdout, "%-12s %s DIFFERS from the backup, and stays as it is here\n", "file", path)
		case !errors.Is(err, fs.ErrNotExist):
			return "", err
		default:
			if err := r.makeFolder(filepath.Dir(path)); err != nil {
				return "", err
			}
			if err := durable.Replace(path, content, fs.FileMode(f.Mode)&0o664); err != nil {
				return "", err
			}
			fmt.Fprintf(stdout, "%-12s %s was put back\n", "file", path)
		}
	}
	return configuration, nil
}

// foreign returns the folders of this machine that belong to another TPM than they do in the
// backup: the records of keys there would be of no use.
func (r *restoring) foreign(b openedBackup) (map[string]bool, error) {
	all := map[string]bool{}
	for i, f := range b.Manifest.Files {
		path := r.place(f.Path)
		if f.Kind != backup.TokenFile || filepath.Base(path) != tpm.BindingFile {
			continue
		}
		there, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return nil, err
		}
		content, err := os.ReadFile(b.Contents.Files[i])
		if err != nil {
			return nil, err
		}
		all[filepath.Dir(path)] = !bytes.Equal(there, content)
	}
	return all, nil
}

// makeFolder makes a folder that is missing, and those above it.
func (r *restoring) makeFolder(path string) error {
	if _, err := os.Stat(path); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := r.makeFolder(filepath.Dir(path)); err != nil {
		return err
	}
	r.made = append(r.made, path)
	return os.Mkdir(path, 0o755)
}

// files returns which files the configuration of the backup names, and the path of the
// configuration: no other file of a backup is put anywhere.
func (r *restoring) files(b openedBackup) (allowed func(kind, path string) bool, at string, err error) {
	var c Config
	for i, f := range b.Manifest.Files {
		if f.Kind != backup.Configuration {
			continue
		}
		content, err := os.ReadFile(b.Contents.Files[i])
		if err != nil {
			return nil, "", err
		}
		if at != "" {
			return nil, "", fmt.Errorf("%w: it has two configurations", backup.ErrDamaged)
		}
		at = r.place(f.Path)
		if c, err = parseConfig(at, r.configuration(content)); err != nil {
			return nil, "", err
		}
	}
	if at == "" {
		return nil, "", fmt.Errorf("%w: it has no configuration", backup.ErrDamaged)
	}
	named := c.backup()
	return func(kind, path string) bool {
		if kind == backup.TokenFile {
			return slices.Contains(slices.Collect(maps.Values(named.States)), filepath.Dir(path))
		}
		return slices.ContainsFunc(named.Files, func(f backup.File) bool { return f.Kind == kind && f.Path == path })
	}, at, nil
}

// giveFiles gives the folders and files of the tokens to the user of the key workers, and the
// folder of the ledger to the daemon's user, where there are such users and root restores.
func (r *restoring) giveFiles(b openedBackup, c Config) error {
	if os.Geteuid() != 0 {
		return nil
	}
	give := func(path string, to *account) error {
		if to == nil {
			return nil
		}
		return os.Lchown(path, int(to.uid), int(to.gid))
	}
	for _, f := range b.Manifest.Files {
		if f.Kind != backup.TokenFile {
			continue
		}
		path := r.place(f.Path)
		if err := give(path, c.keysUser); err != nil && !errors.Is(err, fs.ErrNotExist) { // of another TPM
			return err
		}
		if folder := filepath.Dir(path); slices.Contains(r.made, folder) {
			if err := errors.Join(os.Chmod(folder, 0o700), give(folder, c.keysUser)); err != nil {
				return err
			}
		}
	}
	folder := filepath.Dir(c.Ledger)
	if err := r.makeFolder(folder); err != nil || !slices.Contains(r.made, folder) {
		return err
	}
	return errors.Join(os.Chmod(folder, 0o700), give(folder, c.daemonUser))
}

// scratchPrefix begins the names of temporary folders.
const scratchPrefix = ".restoring-"

// lockFolder keeps another restore, and the creation of a ledger, out of the folder of the ledger,
// and removes what a restore that was killed has left there.
func lockFolder(folder string) (unlock func() error, err error) {
	unlock, err = holdFolder(folder)
	if err != nil {
		return nil, err
	}
	left, err := filepath.Glob(filepath.Join(folder, scratchPrefix+"*"))
	for _, each := range left {
		err = errors.Join(err, os.RemoveAll(each))
	}
	if err != nil {
		return nil, errors.Join(err, unlock())
	}
	return unlock, nil
}

// facts are what a restore does, as of now.
type facts struct {
	replaces string // the ledger that is in the way, or "none"
	there    bool
	hold     func() error // ends the lock of the ledger that is there
	lost     string       // known of what is lost
	missing  []keystore.Ref
	kept     []string
	safe     []backup.Key          // recovery successors whose token the configuration does not have
	goesOn   map[string]bool       // the names of keys that have a recovery successor still
	spare    map[keystore.Ref]bool // of the missing ones, those of a recovery successor
	sealed   map[keystore.Ref]bool // those that holders can bring back
}

// restore continues with the configuration and the launcher of key workers.
func (r restoring) restore(ctx context.Context, b openedBackup, c Config, stdout, stderr io.Writer) error {
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	opening, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	tokens, err := openTokens(opening, c, log, func(string, bool, error) {})
	if err != nil {
		return fmt.Errorf("%w; put back what is not in the backup, then restore again", err)
	}
	defer closeTokens(tokens, log)
	unlock, err := lockFolder(filepath.Dir(c.Ledger))
	if err != nil {
		return err
	}
	defer unlock()
	found, err := r.look(ctx, b, c, tokens)
	if err != nil {
		return err
	}
	defer found.hold() // until the restored ledger has its place: no daemon can begin with the one before
	found.print(stdout)
	folder, err := os.MkdirTemp(filepath.Dir(c.Ledger), scratchPrefix) // of the file system of the ledger
	if err != nil {
		return err
	}
	defer os.RemoveAll(folder)
	path := filepath.Join(folder, "ledger.db")
	if err := copyFile(r.ledger, path); err != nil {
		return err
	}
	l, err := ledger.Open(path, c.ledger())
	if err != nil {
		return err
	}
	done, err := r.change(ctx, b, c, l, tokens, found, log, stdout)
	if err := errors.Join(err, l.Close()); err != nil || !done {
		return err
	}
	return putLedger(path, c.Ledger, found.there, stdout)
}

// look finds out what comes back and what is lost.
func (r restoring) look(
	ctx context.Context, b openedBackup, c Config, tokens map[string]keystore.Store,
) (f facts, err error) {
	f.replaces, f.lost = "none", "unknown: all since "+b.reaches.UTC().Format(time.RFC3339)
	f.hold, f.goesOn, f.spare = func() error { return nil }, map[string]bool{}, map[keystore.Ref]bool{}
	f.sealed = map[keystore.Ref]bool{}
	recovery := map[string]int{} // a recovery successor is two versions
	defer func() {
		if err != nil {
			f.hold()
		}
	}()
	o := c.ledger()
	o.AsIs = true
	switch there, err := ledger.Open(c.Ledger, o); {
	case errors.Is(err, ledger.ErrMissing):
	case errors.Is(err, ledger.ErrCorrupt):
		f.there, f.replaces = true, "a damaged ledger"
	case errors.Is(err, ledger.ErrOlder):
		f.there, f.replaces = true, "a ledger of an older format, which was not read"
	case errors.Is(err, ledger.ErrFormat):
		f.there, f.replaces = true, "a ledger of another version, which was not read"
	case err != nil: // in use, or it can't be opened now
		return f, fmt.Errorf("%s: %w", c.Ledger, err)
	default:
		f.hold = there.Close
		epoch, _, tree := there.Head()
		root, _ := tree.Root()
		end := there.End()
		f.there = true
		f.replaces = fmt.Sprintf("%d events, epoch %d with root %v", end, epoch, root)
		if end > b.end {
			f.lost = cli.Count(end-b.end, "event") + " of the ledger that is replaced"
		} else if end == b.end {
			f.lost = "nothing of the ledger that is replaced"
		}
	}
	if f.there && strings.HasPrefix(f.replaces, "a ") {
		if f.hold, err = lockFile(c.Ledger); err != nil {
			return f, err
		}
	}
	for _, k := range b.Keys {
		if k.State == "destroyed" {
			continue
		}
		f.sealed[k.Ref] = k.Envelope != ""
		store := tokens[k.Token]
		spare := k.Recovery && k.State == string(keyring.Pending)
		switch {
		case store == nil && spare:
			f.safe = append(f.safe, k)
			recovery[k.Ref.Name]++
			continue
		case store == nil:
			f.missing = append(f.missing, k.Ref)
			continue
		}
		key, err := store.Key(ctx, k.Ref)
		switch {
		case err == nil && hex.EncodeToString(key.Info().PublicKey) == k.PublicKey:
			f.kept = append(f.kept, k.Ref.String())
			if spare {
				recovery[k.Ref.Name]++
			}
		case err == nil || errors.Is(err, keystore.ErrNotFound) || errors.Is(err, keystore.ErrSealed):
			f.missing = append(f.missing, k.Ref)
			f.spare[k.Ref] = spare
		default:
			return f, fmt.Errorf("token %[1]s: %[2]v: %[3]w; connect the token, or if it is lost, make an empty one "+
				"in its place: countersignd init --token %[1]s --new-token", k.Token, k.Ref, err)
		}
	}
	for name, n := range recovery {
		f.goesOn[name] = n == 2
	}
	return f, nil
}

func (f facts) print(w io.Writer) {
	fmt.Fprintf(w, "%-12s %s\n", "replaces", f.replaces)
	fmt.Fprintf(w, "%-12s %s\n", "lost", f.lost)
	on := strings.Join(f.kept, ", ") + " are on their tokens"
	fmt.Fprintf(w, "%-12s %s\n", "keys", either(len(f.kept) > 0, on, "none is on a token"))
	for _, k := range f.missing {
		what := "it signs nothing any more, and its line " +
			either(f.goesOn[k.Name], "can go on (countersign admin key recover)", "ends")
		if f.sealed[k] {
			what = "recovery holders can bring it back (countersignd return-keys)"
		} else if f.spare[k] {
			what = "its line can't be recovered with it: make another one (countersign admin key safeguard)"
		}
		fmt.Fprintf(w, "%-12s %v is NOT on its token: %s\n", "key", k, what)
	}
	for _, k := range f.safe {
		fmt.Fprintf(w, "%-12s %v, for the recovery of the line, is on the token %s, "+
			"which the configuration does not have\n", "key", k.Ref, k.Token)
	}
}

func either[T any](is bool, yes, no T) T {
	if is {
		return yes
	}
	return no
}

// parameters of the act, which the approvers sign.
func (f facts) parameters(b openedBackup) []approval.Parameter {
	var refs []string
	for _, ref := range f.missing {
		refs = append(refs, ref.String())
	}
	return []approval.Parameter{
		{Name: "sha256", Value: b.Digest},
		{Name: "made", Value: b.Made().Format(time.RFC3339)},
		{Name: "reaches", Value: b.reach()},
		{Name: "machine", Value: hostName()},
		{Name: "replaces", Value: f.replaces},
		{Name: "lost", Value: f.lost},
		{Name: "missing_keys", Value: listed(refs)},
	}
}

// change writes the restore into the ledger, if it is approved. Otherwise change writes the text to
// approve.
func (r restoring) change(
	ctx context.Context, b openedBackup, c Config, l *ledger.Ledger, tokens map[string]keystore.Store, f facts,
	log *slog.Logger, stdout io.Writer,
) (done bool, err error) {
	var people operators.Offline
	if err := l.View(func(v ledger.View) (err error) {
		people, err = operators.ReadOffline(v, b.log.Name())
		return err
	}); err != nil {
		return false, err
	}
	var p *approval.Proposal
	var approvals []operators.Signed
	if people.Initialised() {
		p, approvals, err = r.authorise(people, approval.ActBackupRestore, f.parameters(b),
			"Nothing of the ledger has been restored yet", stdout)
		if err != nil || p == nil {
			return false, err
		}
	}
	monitor := resource.NewMonitor(log, c.Limits.RequestTimeout.std())
	rebind, _, err := anchor.New(c.anchor(), l, tokens, gate.New(l), monitor, log).Rebind(ctx)
	if err != nil {
		return false, err
	}
	now, skew := time.Now(), c.Limits.ClockSkew.std()
	ledgers, _, _ := l.Clock()
	if err := checkClock(now, skew, b.Made(), ledgers); err != nil {
		return false, err
	}
	after := ledger.RestoredAfter(now, skew)
	who := audit.Operator(fmt.Sprintf("uid:%d", c.startedBy))
	err = l.Restore(ctx, after, who, func(tx *ledger.Tx) error {
		if err := rebind(tx); err != nil {
			return err
		}
		record := func(who audit.Actor) error {
			return tx.Append(ledger.EventOf(audit.NewBackupRestored(who, b.Digest, b.Made(), f.replaces, after)))
		}
		if p == nil {
			return record(who)
		}
		return people.Write(tx, p, approvals, record)
	})
	if err != nil {
		return false, err
	}
	for _, a := range approvals {
		fmt.Fprintf(stdout, "%-12s %s\n", "approved by", a.Operator)
	}
	fmt.Fprintf(stdout, "%-12s documents with a timestamp of at most %s are refused (restored)\n", "until",
		time.Unix(after, 0).UTC().Format(time.RFC3339))
	return true, nil
}

// checkClock refuses a clock that is behind what the backup knows: from the wrong time on,
// documents of before would be taken for new ones.
func checkClock(now time.Time, skew time.Duration, made, ledgers time.Time) error {
	for _, known := range []time.Time{made, ledgers} {
		if now.Before(known.Add(-skew)) {
			return fmt.Errorf("the clock is wrong: it says %s, and the backup is of %s: set it, and restore again",
				now.UTC().Format(time.RFC3339), known.UTC().Format(time.RFC3339))
		}
	}
	return nil
}

func copyFile(source io.Reader, to string) error {
	f, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(f, source); err != nil {
		return err
	}
	return f.Sync()
}

// putLedger gives a ledger its place. The ledger in the way gets another name first, beside the one
// that it has. So after a crash the place has the one or the other, whole, and none is lost.
func putLedger(path, place string, there bool, stdout io.Writer) error {
	folder := filepath.Dir(place)
	kept := place + ".replaced-" + time.Now().UTC().Format("20060102T150405.000000Z")
	if there {
		if err := errors.Join(os.Link(place, kept), durable.Sync(folder)); err != nil {
			return err
		}
	}
	if err := errors.Join(os.Rename(path, place), durable.Sync(folder)); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "restored     %s\n", place)
	if there {
		fmt.Fprintf(stdout, "%-12s %s has the ledger of before: never put it back\n", "kept", kept)
	}
	return nil
}

// lockFile locks a file as an open ledger does.
func lockFile(path string) (unlock func() error, err error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, ledger.ErrInUse)
	}
	return f.Close, nil
}
