package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
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
	"syscall"
	"time"

	"countersign/admin/api"
	"countersign/audit"
	"countersign/internal/anchor"
	"countersign/internal/backup"
	"countersign/internal/cause"
	"countersign/internal/cli"
	"countersign/internal/escrow"
	"countersign/internal/gate"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/resource"
	"countersign/internal/sandbox"
	"countersign/internal/scrub"

	"golang.org/x/sys/unix"
)

// A drill restores the newest backup into a scratch folder, and starts an appliance there, with
// scratch tokens and without a listener. The drill is a program of its own: it has the private key
// of a recipient, which the daemon must not have. In its sandbox it can read the backups, write the
// scratch folder and reach the daemon's socket, and nothing else.

// drilling has the options of countersignd drill.
type drilling struct {
	identities []string // files
	file       string   // the backup; "": the newest one in the folder of the configuration
	appliance  string   // its name; "": the folder has backups of one appliance only
	scratch    string   // the folder for the scratch folder
	module     string   // PKCS#11 module of the scratch tokens
	filesOnly  bool     // no appliance is started
	silent     bool     // the daemon is not told

	withHolders bool // holders bring the recoverable keys back
	ceremony

	keys   []backup.Identity
	folder string // the scratch folder, scratchFolder in scratch
	// tokens is the folder of the scratch tokens and their PINs: folder, or with holders one in
	// memory, since a disk may keep what is overwritten.
	tokens string
}

const (
	tellingTime   = 10 * time.Second
	spareNonces   = 1000      // for what the scratch appliance does itself
	spareRoom     = 256 << 20 // bytes that stay free on the disk of the scratch folder
	scratchFolder = "countersign-drill"
)

// drill is countersignd drill.
func drill(ctx context.Context, path string, c Config, d drilling, stdout io.Writer) (err error) {
	if c.Backup.Folder == "" {
		return configError{errors.New("the configuration has no backups: set folder and recipients of [backup]")}
	}
	if err := noCoreFiles(); err != nil {
		return err
	}
	began, report := time.Now(), api.Drill{Began: time.Now().Unix(), Proven: []string{}, Unproven: []string{}}
	failed := d.make(ctx, path, c, &report, stdout)
	if errors.Is(failed, errNoHolders) { // which says nothing of the backup
		return failed
	}
	if failed != nil && ctx.Err() != nil {
		failed = errors.New("it was interrupted")
	}
	if failed != nil {
		report.Failure = oneText(failed.Error())
	}
	return d.tell(ctx, c, report, time.Since(began), stdout)
}

// make makes the drill. The scratch folder is empty afterwards.
func (d drilling) make(ctx context.Context, path string, c Config, r *api.Drill, stdout io.Writer) (err error) {
	if d.keys, err = readIdentities(ctx, d.identities); err != nil { // before the sandbox closes them
		return err
	}
	if d.withHolders { // before the sandbox, too
		if d.filesOnly {
			return configError{errors.New("--holders: an appliance on scratch tokens is needed, and --files-only " +
				"starts none")}
		}
		if err := d.openRequest(); err != nil {
			return err
		}
		defer d.discardRequest()
		if d.answers, err = filepath.Abs(d.answers); err != nil {
			return err
		}
	}
	folder, done, err := makeScratch(d.scratch, scratchFolder)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	if d.folder, d.tokens = folder, folder; d.withHolders {
		if err := isMemory(memoryFolder); err != nil {
			return err
		}
		own := sha256.Sum256([]byte(folder)) // drills of two appliances do not meet
		memory, done, err := makeScratch(memoryFolder, fmt.Sprintf("%s-%x", scratchFolder, own[:6]))
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, done()) }()
		d.tokens = memory
	}
	run := func(s Config) error {
		if err := d.rights(path, c).Enter(); err != nil {
			return err
		}
		return d.run(ctx, c, s, r, stdout)
	}
	if d.filesOnly {
		return run(c)
	}
	scratch := filepath.Join(d.folder, "countersign.toml")
	if err := d.writeScratch(c, scratch); err != nil {
		return err
	}
	return withConfig(scratch, func(s Config) error {
		return withLauncher(scratch, filepath.Join(d.tokens, "so-pin"), s, run)
	})
}

// memoryFolder is a folder whose files are in memory.
const memoryFolder = "/dev/shm"

// isMemory refuses a folder on a disk.
func isMemory(folder string) error {
	var s unix.Statfs_t
	if err := unix.Statfs(folder, &s); err != nil {
		return fmt.Errorf("--holders: %s: %w; the keys must be in memory only", folder, err)
	}
	if kind := int64(s.Type); kind != unix.TMPFS_MAGIC && kind != unix.RAMFS_MAGIC {
		return fmt.Errorf("--holders: %s is no tmpfs, and the keys must be in memory only: mount one there", folder)
	}
	return nil
}

// makeScratch makes the scratch folder, or takes that of a drill that was killed. The folder itself
// stays, empty: the sandbox has no right to remove it. above is its place, or "".
func makeScratch(above, name string) (folder string, done func() error, err error) {
	if above == "" {
		above = os.TempDir()
	}
	if above, err = filepath.Abs(above); err != nil {
		return "", nil, err
	}
	folder = filepath.Join(above, name)
	if err := os.Mkdir(folder, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", nil, fmt.Errorf("--scratch: %w", err)
	}
	dir, err := os.OpenFile(folder, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_DIRECTORY, 0)
	if err != nil {
		return "", nil, fmt.Errorf("--scratch: %w", err)
	}
	if info, err := dir.Stat(); err != nil || info.Mode().Perm() != 0o700 ||
		int(info.Sys().(*syscall.Stat_t).Uid) != os.Geteuid() {
		return "", nil, errors.Join(fmt.Errorf("--scratch: %s must have the mode 0700 and belong to this user: "+
			"remove it", folder), err, dir.Close())
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return "", nil, errors.Join(fmt.Errorf("%s: another drill is running", folder), dir.Close())
	}
	if err := wipe(folder); err != nil {
		return "", nil, errors.Join(err, dir.Close())
	}
	return folder, func() error { return errors.Join(wipe(folder), dir.Close()) }, nil
}

// wipe overwrites the files in a scratch folder once, and removes them: what a drill has decrypted
// is not to be found on a disk that writes in place.
func wipe(folder string) error {
	var all error // one file must not save the others
	err := filepath.WalkDir(folder, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			err = overwrite(path)
		}
		all = errors.Join(all, err)
		return nil
	})
	entries, listed := os.ReadDir(folder)
	err = errors.Join(all, err, listed)
	for _, e := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(folder, e.Name())))
	}
	return err
}

// overwrite writes zeros over a file.
func overwrite(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return zero(f)
}

// writeScratch writes the configuration of the scratch appliance: the tokens of the configuration,
// each a new one of the module, and its limits.
func (d drilling) writeScratch(c Config, path string) error {
	if _, err := os.Stat(d.module); err != nil {
		return fmt.Errorf("there is no PKCS#11 module for scratch tokens: %w; install SoftHSM, name another one "+
			"(--module), or start no appliance (--files-only)", err)
	}
	at := func(name string) string { return filepath.Join(d.folder, name) }
	in := func(name string) string { return filepath.Join(d.tokens, name) }
	secret := func() []byte { return append(randomPIN().Expose(), '\n') }
	var text strings.Builder
	fmt.Fprintf(&text, "listen = \"127.0.0.1:1\"\nadmin_socket = %q\nledger = %q\npolicy = %q\nhistory = \"none\"\n"+
		"noise_token = %q\nlog_token = %q\nrollback_token = \"none\"\nunattended_start = true\n",
		at("admin.sock"), at("ledger.db"), at("policy.cedar"), c.NoiseToken, c.LogToken)
	fmt.Fprintf(&text, "[limits]\nnonces = %d\nmax_lifetime = %q\nclock_skew = %q\n[retention]\nnonces = %q\n",
		c.Limits.Nonces+spareNonces, c.Limits.MaxLifetime.std(), c.Limits.ClockSkew.std(), c.Retention.Nonces.std())
	for i, name := range slices.Sorted(maps.Keys(c.Tokens)) {
		fmt.Fprintf(&text, "[tokens.%s]\nuri = \"pkcs11:token=drill-%d\"\nmodule = %q\npin_file = %q\nworkers = 1\n"+
			"environment = { SOFTHSM2_CONF = %q }\n", name, i, d.module, in("pin"), in("softhsm2.conf"))
	}
	err := os.Mkdir(in("tokens"), 0o700)
	for path, content := range map[string][]byte{
		at("countersign.toml"): []byte(text.String()), in("pin"): secret(), in("so-pin"): secret(),
		in("softhsm2.conf"): []byte(softHSMConfig(in("tokens"))),
	} {
		err = errors.Join(err, os.WriteFile(path, content, 0o600))
	}
	return err
}

// rights are those of the drill. Only root can read the backups of the daemon's user, and reach its
// socket, by two capabilities that Landlock confines to these. With a socket of the service
// manager, which is root's, the first one is enough.
func (d drilling) rights(path string, c Config) sandbox.Rights {
	r := sandbox.Rights{
		Kind:    sandbox.Drill,
		Read:    append(slices.Clone(systemFiles), absolute(c.Backup.Folder, path)...),
		Write:   append(absolute(d.folder, d.tokens), "/dev/null"),
		Sockets: absolute(filepath.Dir(c.AdminSocket)),
	}
	if d.file != "" {
		r.Read = append(r.Read, absolute(filepath.Dir(d.file))...) // with its lists of writes
	}
	if d.withHolders {
		r.Read = append(r.Read, d.answers)
	}
	if os.Geteuid() == 0 {
		r.Keep = []uint{unix.CAP_DAC_READ_SEARCH, unix.CAP_DAC_OVERRIDE}
	}
	return r
}

// tell prints the report of a drill, and tells the daemon.
func (d drilling) tell(
	ctx context.Context, c Config, r api.Drill, took time.Duration, stdout io.Writer,
) (told error) {
	if !d.silent {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tellingTime)
		defer cancel()
		var result api.Drill
		if result, told = api.NewClient(c.AdminSocket).Drilled(ctx, r); told == nil {
			r = result
		}
	}
	line := func(name, text string) { fmt.Fprintf(stdout, "%-12s %s\n", name, text) }
	if r.Backup != "" {
		line("backup", r.Backup)
	}
	if r.Reached != 0 {
		line("reaches", time.Unix(r.Reached, 0).UTC().Format(time.RFC3339))
	}
	for _, text := range r.Proven {
		line("proven", text)
	}
	for _, text := range r.Unproven {
		line("not proven", text)
	}
	line("time", took.Round(time.Millisecond).String())
	switch {
	case told != nil:
		told = fmt.Errorf("the daemon was not told: %w", told)
	case !d.silent:
		line("told", "the daemon, which has an event of it")
	}
	switch {
	case r.Failure != "" && told != nil:
		return fmt.Errorf("the drill has failed: %s; %w", r.Failure, told)
	case r.Failure != "":
		return fmt.Errorf("the drill has failed: %s", r.Failure)
	}
	return told
}

// oneText is a text that the audit log takes: one line of at most 500 bytes.
func oneText(text string) string {
	text = cause.Line(new(scrub.Scrubber).Text(text))
	if len(text) > 500 {
		text = strings.ToValidUTF8(text[:497], "") + "…"
	}
	return text
}

var backupName = regexp.MustCompile(`^countersign-([0-9a-z]+)-.*\.backup$`)

// newest returns the newest backup in the folder, apart from those of a clock that was ahead.
func (d drilling) newest(folder string) (path string, err error) {
	if d.file != "" {
		return filepath.Abs(d.file)
	}
	entries, err := os.ReadDir(folder)
	if err != nil {
		return "", err
	}
	var last time.Time
	ids := map[string]bool{}
	for _, e := range entries {
		m := backupName.FindStringSubmatch(e.Name())
		if m == nil || !e.Type().IsRegular() || d.appliance != "" && d.appliance != "countersign/"+m[1] {
			continue
		}
		made, ok := backup.Whole.Begun(e.Name(), m[1])
		if !ok || made.After(time.Now()) {
			continue
		}
		if ids[m[1]] = true; !made.Before(last) {
			last, path = made, filepath.Join(folder, e.Name())
		}
	}
	switch {
	case path == "":
		return "", fmt.Errorf("%s has no backup", folder)
	case len(ids) > 1:
		return "", fmt.Errorf("%s has backups of several appliances: name yours with --appliance", folder)
	}
	return path, nil
}

// run does all that is to be proven.
func (d drilling) run(ctx context.Context, c, s Config, r *api.Drill, stdout io.Writer) error {
	path, err := d.newest(c.Backup.Folder)
	if err != nil {
		return err
	}
	r.Backup = filepath.Base(path)
	if err := d.checkRoom(path); err != nil {
		return err
	}
	b, err := openBackup(ctx, opening{file: path, keys: d.keys, scratch: d.folder, until: lastList, keep: true})
	if err != nil {
		return err
	}
	if d.appliance != "" && d.appliance != b.log.Name() {
		return fmt.Errorf("it is a backup of %s, not of %s", b.log.Name(), d.appliance)
	}
	r.SHA256, r.Event, r.Epoch, r.Size, r.Root = b.Digest, b.Event, b.Epoch, b.Size, b.Root
	r.End, r.Reached = b.end, b.reaches.Unix()
	r.Proven = append(r.Proven, fmt.Sprintf("the encryption, %s, and the proof by the audit log",
		cli.Count(len(b.Manifest.Files), "file")))
	r.Proven = append(r.Proven, fmt.Sprintf("each page, event and checkpoint of the ledger, with %s of writes "+
		"after the backup", cli.Count(b.shipped.Last-b.Lists, "list")))
	for _, note := range b.shipped.Notes {
		r.Unproven = append(r.Unproven, oneText("lists of writes: "+note))
	}
	allowed, _, err := new(restoring).files(b)
	if err != nil {
		return fmt.Errorf("its configuration: %w", err)
	}
	for _, f := range b.Manifest.Files {
		if f.Kind != backup.Ledger && f.Kind != backup.Configuration && !allowed(f.Kind, f.Path) {
			return fmt.Errorf("its configuration does not name its file %s", f.Path)
		}
	}
	r.Proven = append(r.Proven, "its configuration is one of this version, and names its files")
	if len(b.Left) > 0 {
		r.Unproven = append(r.Unproven, cli.Count(len(b.Left), "file")+" that no backup has: "+
			"countersignd backup verify lists them")
	}
	resident := 0
	for _, k := range b.Keys {
		if k.Envelope == "" && k.State != string(keyring.Destroyed) {
			resident++
		}
	}
	if resident > 0 {
		r.Unproven = append(r.Unproven, fmt.Sprintf("the private keys of %s, which are in their tokens only",
			cli.Count(resident, "version")))
	}
	if d.filesOnly {
		r.Unproven = append(r.Unproven, "an appliance on scratch tokens: none was started (--files-only)")
		return nil
	}
	// The scratch appliance logs that its tokens lack all keys. An error says what else is wrong.
	return d.start(ctx, b, s, slog.New(slog.DiscardHandler), r, stdout)
}

// checkRoom refuses a scratch folder on a disk that the drill could fill: it may be the ledger's.
func (d drilling) checkRoom(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	var disk unix.Statfs_t
	if err := unix.Statfs(d.folder, &disk); err != nil {
		return fmt.Errorf("--scratch: %w", err)
	}
	free, needed := disk.Bavail*uint64(disk.Bsize), 3*uint64(info.Size())+spareRoom
	if free < needed {
		return fmt.Errorf("--scratch: %s has %d MiB free, and the drill needs %d MiB", d.folder, free>>20, needed>>20)
	}
	return nil
}

// start starts an appliance with the restored ledger on scratch tokens, and has it do what an
// appliance is for.
func (d drilling) start(
	ctx context.Context, b openedBackup, s Config, log *slog.Logger, r *api.Drill, stdout io.Writer,
) error {
	proven := func(text string) { r.Proven = append(r.Proven, oneText(text)) }
	s.Ledger = b.ledger() // where it is: a copy would have to be overwritten, too
	for i, f := range b.Manifest.Files {
		if f.Kind == backup.Policy {
			s.Policy = b.Contents.Files[i]
		}
	}
	options := initOptions{newToken: true, soPINFile: filepath.Join(d.tokens, "so-pin")}
	for _, name := range slices.Sorted(maps.Keys(s.Tokens)) {
		if err := makeToken(ctx, s, name, options, log, io.Discard); err != nil {
			return fmt.Errorf("a scratch token: %w", err)
		}
	}
	who := audit.Operator("drill")
	after, err := restoreScratch(ctx, s, who, log)
	if err != nil {
		return err
	}
	p, err := open(ctx, s, log)
	if err != nil {
		return fmt.Errorf("the restored appliance: %w", err)
	}
	defer p.close(log)
	if err := compareKeys(b.Keys, p.app.Keys.All()); err != nil {
		return err
	}
	sealed := keyring.Recoverable(p.app.Keys.All())
	if err := compareHolders(p.ledger, sealed); err != nil {
		return err
	}
	proven(fmt.Sprintf("an appliance on scratch tokens has the policy, %s and all public keys of the manifest",
		cli.Count(len(p.app.Peers.All()), "peer")))
	if len(sealed) > 0 {
		proven(fmt.Sprintf("the envelopes of %s are for the holders that the audit log names",
			cli.Count(len(sealed), "recoverable key")))
	}
	if p.app.Health().Lock != nil {
		if err := p.app.Unlock(ctx, who); err != nil {
			return err
		}
	}
	if err := refusesOld(ctx, p.ledger, after); err != nil {
		return err
	}
	proven("it refuses a document of before, and admits a later one once")
	name := make([]byte, 5)
	rand.Read(name)
	k, err := p.app.Keys.Create(ctx, who, keyring.NewKey{Name: "drill-" + hex.EncodeToString(name), Token: s.LogToken})
	if err == nil {
		err = p.app.Keys.Prove(ctx, k)
	}
	if err != nil {
		return fmt.Errorf("a new key in the restored appliance: %w", err)
	}
	proven("it makes a key, which signs")
	if !d.withHolders {
		if len(sealed) > 0 {
			r.Unproven = append(r.Unproven, "that holders bring the recoverable keys back: countersignd drill "+
				"--holders")
		}
		return nil
	}
	return d.returnKeys(ctx, b, sealed, p.tokens, s.LogToken, r, stdout)
}

// compareKeys compares the keys of a manifest with those of the restored appliance. A key that was
// destroyed after the backup has no envelope.
func compareKeys(manifest []backup.Key, restored []*keyring.Key) error {
	keys := map[keystore.Ref]*keyring.Key{}
	for _, k := range restored {
		keys[k.Ref()] = k
	}
	for _, m := range manifest {
		k := keys[m.Ref]
		if k == nil || hex.EncodeToString(k.Info().PublicKey) != m.PublicKey {
			return fmt.Errorf("the manifest has key %v with the public key %s, and the restored appliance has not",
				m.Ref, m.PublicKey)
		}
		if m.Envelope == "" || k.State == keyring.Destroyed {
			continue
		}
		if escrow.Digest(k.Envelope) != m.Envelope {
			return fmt.Errorf("the envelope of key %v is not that of the manifest", m.Ref)
		}
	}
	for _, k := range keyring.Recoverable(restored) {
		if _, err := escrow.Of(k.Envelope, k.Ref(), k.Info().PublicKey); err != nil {
			return fmt.Errorf("the envelope of key %v: %w", k.Ref(), err)
		}
	}
	return nil
}

// compareHolders compares the envelopes of keys with the audit log: an event names each envelope,
// and the holders are those of its set. Whoever breaks into a daemon could have keys sealed for
// himself. Dropped epochs are left out.
func compareHolders(l *ledger.Ledger, keys []*keyring.Key) error {
	first := uint64(math.MaxUint64)
	sets, named := map[string]audit.Event{}, map[string]bool{}
	var broken error
	if err := l.Events(0, func(index uint64, b []byte) bool {
		first = min(first, index)
		e, err := audit.Decode(b)
		if broken = err; err != nil {
			return false
		}
		if e.Type == audit.HoldersChanged {
			sets[e.Metadata["number"]] = e
		} else if digest := e.Metadata["envelope"]; digest != "" {
			named[digest] = true
		}
		return true
	}); err != nil || broken != nil {
		return errors.Join(err, broken)
	}
	for _, k := range keys {
		e, err := escrow.ParseEnvelope(k.Envelope)
		if err != nil {
			return err
		}
		if first == 0 && !named[escrow.Digest(k.Envelope)] {
			return fmt.Errorf("no event names the envelope of key %v", k.Ref())
		}
		set, known := sets[fmt.Sprint(e.Set)]
		if !known && first > 0 {
			continue
		}
		sealed := audit.NewHoldersChanged(audit.Daemon(), e.Set, e.Needed, e.Holders().Texts())
		if !known || !maps.Equal(set.Metadata, sealed.Metadata) {
			return fmt.Errorf("key %v is sealed for other holders than those of set %d in the audit log", k.Ref(),
				e.Set)
		}
	}
	return nil
}

// returnKeys has holders bring the recoverable keys back onto scratch tokens, where each is used
// once.
func (d drilling) returnKeys(
	ctx context.Context, b openedBackup, sealed []*keyring.Key, tokens map[string]keystore.Store, other string,
	r *api.Drill, stdout io.Writer,
) error {
	if len(sealed) == 0 {
		return errors.New("--holders: the backup has no recoverable key")
	}
	var envelopes [][]byte
	for _, k := range sealed {
		envelopes = append(envelopes, k.Envelope)
	}
	e, err := escrow.Begin(escrow.ForDrill, b.log.Name(), hostName(), envelopes)
	if err != nil {
		return err
	}
	if err := d.hold(ctx, e, stdout); err != nil {
		return err
	}
	for _, k := range sealed {
		store := tokens[k.Token]
		if store == nil { // the token of a recovery successor lies in a safe
			store = tokens[other]
		}
		able, ok := store.(escrow.Store)
		if !ok {
			return fmt.Errorf("key %v: %w: the scratch token takes no seed", k.Ref(), keystore.ErrRefused)
		}
		shares, holders, _ := e.Shares(k.Envelope)
		for _, name := range holders {
			if !slices.Contains(r.Holders, name) {
				r.Holders = append(r.Holders, name)
			}
		}
		back, err := able.Open(ctx, k.Info().Tag, k.Envelope, shares)
		if err == nil && !bytes.Equal(back.Info().PublicKey, k.Info().PublicKey) {
			err = fmt.Errorf("%w: it has another public key", keystore.ErrWrong)
		}
		if err == nil {
			err = keyring.ProveUse(ctx, back)
		}
		if err != nil {
			return fmt.Errorf("key %v, by the holders %s: %w", k.Ref(), strings.Join(holders, ", "), err)
		}
		r.Keys = append(r.Keys, k.Ref().String())
	}
	r.Proven = append(r.Proven, oneText(fmt.Sprintf("the holders %s have brought back %s, each of which was used once",
		strings.Join(r.Holders, ", "), cli.Count(len(sealed), "recoverable key"))))
	return nil
}

// restoreScratch marks the scratch ledger as restored, without an approval: nobody can reach it.
func restoreScratch(ctx context.Context, s Config, who audit.Actor, log *slog.Logger) (after int64, err error) {
	l, err := ledger.Open(s.Ledger, s.ledger())
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	monitor := resource.NewMonitor(log, s.Limits.RequestTimeout.std())
	rebind, _, err := anchor.New(s.anchor(), l, nil, gate.New(l), monitor, log).Rebind(ctx)
	if err != nil {
		return 0, err
	}
	after = ledger.RestoredAfter(time.Now(), s.Limits.ClockSkew.std())
	return after, l.Restore(ctx, after, who, rebind)
}

// refusesOld shows that a restored ledger admits no document that may be of before, and a later one
// once.
func refusesOld(ctx context.Context, l *ledger.Ledger, after int64) error {
	admit := func(nonce [32]byte, timestamp int64) (ledger.Verdict, error) {
		got, err := l.Admit(ctx, ledger.Admission{
			Scope: ledger.KeyScope("drill"), Nonce: nonce, Digest: nonce, Peer: "drill", Timestamp: timestamp,
			ExpiresAt: timestamp + 60, Once: true,
		}, func(ledger.Verdict) []byte {
			e := audit.NewAdmission(audit.Operator("drill"), "drill/1", audit.Document{Nonce: nonce})
			return e.Encode(time.Now())
		})
		return got.Verdict, err
	}
	var old, later [32]byte
	rand.Read(old[:])
	rand.Read(later[:])
	if _, err := admit(old, after); !errors.Is(err, ledger.ErrRestored) {
		return fmt.Errorf("the restored ledger does not refuse a document of before: %w", err)
	}
	for _, want := range []ledger.Verdict{ledger.Fresh, ledger.Replay} {
		if got, err := admit(later, after+1); err != nil || got != want {
			return fmt.Errorf("the restored ledger admits a later document as %v, not %v: %w", got, want, err)
		}
	}
	return nil
}
