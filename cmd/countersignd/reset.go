package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"countersign/approval"
	"countersign/audit"
	"countersign/internal/anchor"
	"countersign/internal/backup"
	"countersign/internal/cause"
	"countersign/internal/cli"
	"countersign/internal/durable"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/logline"
	"countersign/internal/operators"
	"countersign/internal/scrub"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// A factory reset destroys an appliance, after which the machine and the tokens can have another
// one. The reset can be cut off at any moment, and the same command goes on. Invariants:
//
//   - Nothing is destroyed before the marker is on the disk, and the record, outside of what is
//     destroyed, has the begin. From the marker on, no daemon starts here.
//   - What names a thing is destroyed after the thing: the ledger names the keys and the counter,
//     the configuration names the files, and the marker is the last. A phase begins when the phase
//     before is done.
//   - A step that is done twice does the same.

// resetting has the options of countersignd factory-reset.
type resetting struct {
	textApproval
	extent
	typed  bool   // root types the name in place of approvals
	record string // the file outside
}

// extent is what a reset destroys beside the keys and the ledger.
type extent struct {
	LeftTokens   []string `json:"left_tokens,omitempty"` // tokens that are not touched
	Backups      bool     `json:"backups"`               // the appliance's backups, too
	KeepPINs     bool     `json:"keep_pins"`             // the PIN files stay
	StorageRoots bool     `json:"storage_roots"`         // the TPMs' storage root keys, too
	FreeSpace    bool     `json:"free_space"`            // older versions of files, in free blocks
}

func (e extent) String() string {
	return strings.Join([]string{
		either(e.Backups, "backups are destroyed", "backups stay"),
		either(e.KeepPINs, "PIN files stay", "PIN files are destroyed"),
		either(e.StorageRoots, "storage root keys are given back", "storage root keys stay"),
		either(e.FreeSpace, "free space is overwritten", "free space is not overwritten"),
	}, "; ")
}

// defaultRecord is the record of a reset by root.
const defaultRecord = "/var/log/countersign-factory-reset.log"

// resetMarker is the file in the ledger's folder from the begin of a reset to its end. The marker
// has the authority of the reset, so that a reset that was cut off goes on without approvals.
type resetMarker struct {
	Format    int             `json:"format"`
	Begun     time.Time       `json:"begun"`
	Appliance string          `json:"appliance"`
	Machine   string          `json:"machine"`
	By        string          `json:"by"` // the user, such as uid:0
	Typed     bool            `json:"typed,omitempty"`
	Text      string          `json:"text,omitempty"` // signed by the approvers
	Approvals []resetApproval `json:"approvals,omitempty"`
	Extent    extent          `json:"extent"`
	Record    string          `json:"record"`
	Ledger    string          `json:"ledger"`
	At        []string        `json:"at"`      // paths of the configuration and of the ledger
	Folders   []string        `json:"folders"` // one of each disk with files to destroy
	Done      []string        `json:"done"`    // phases

	Reserved map[string]string `json:"reserved,omitempty"` // contents of files of /sys that are changed for a while
}

// resetApproval is a signature of the text, which anybody can verify: ssh-keygen -Y verify -n
// countersign-proposal-v1.
type resetApproval struct {
	Operator  string `json:"operator"`
	PublicKey string `json:"public_key"`
	Signature string `json:"signature"`
}

// The phases of a reset that the marker has, in their order. Files and free space follow.
const (
	phaseKeys    = "keys"
	phaseCounter = "counter"
	phaseRoots   = "storage roots"
)

// resetMarkerName is the name of the marker. resetStub is the suffix of the file beside the
// configuration that leads to the marker while the configuration itself is destroyed.
const (
	resetMarkerName = "factory-reset.json"
	resetStub       = ".factory-reset"
)

func (c *Config) resetMarker() string { return filepath.Join(filepath.Dir(c.Ledger), resetMarkerName) }

// refuseReset returns an error where a reset was begun and has not ended.
func (c *Config) refuseReset() error {
	for _, path := range []string{c.resetMarker(), c.path + resetStub} {
		if _, err := os.Lstat(path); err == nil { // another error comes again with the ledger
			return configError{fmt.Errorf("a factory reset was begun here (%s): run countersignd factory-reset again "+
				"to finish it", path)}
		}
	}
	return nil
}

// readMarker reads the marker; nil: no reset was begun. The daemon's user can write to the folder,
// so a marker of another user than this one is no authority.
func (c *Config) readMarker() (*resetMarker, error) {
	var m resetMarker
	if is, err := readOwn(c.resetMarker(), &m); !is || err != nil {
		return nil, err
	}
	if m.Format != 1 || m.Record == "" {
		return nil, fmt.Errorf("%s is damaged or of another version: remove it, and begin the reset anew",
			c.resetMarker())
	}
	return &m, nil
}

// readOwn reads a JSON file that only this user can have written.
func readOwn(path string, to any) (is bool, err error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return false, err
	}
	if owner := int(info.Sys().(*syscall.Stat_t).Uid); !info.Mode().IsRegular() || owner != os.Geteuid() ||
		info.Mode().Perm()&0o022 != 0 {
		return false, fmt.Errorf("%s belongs to user %d or can be changed by others, so no reset of user %d has made "+
			"it: find out who has, and remove it", path, owner, os.Geteuid())
	}
	if err := json.NewDecoder(f).Decode(to); err != nil {
		return false, fmt.Errorf("%s is damaged: remove it, and begin the reset anew: %w", path, err)
	}
	return true, nil
}

// done reports that a phase was done.
func (m *resetMarker) done(phase string) bool { return slices.Contains(m.Done, phase) }

// reset is a factory reset under way.
type reset struct {
	resetting
	c              Config
	path           string // of the configuration, absolute
	stdout, stderr io.Writer

	marker *resetMarker // nil before the begin
	record *os.File

	log    *slog.Logger
	tokens map[string]keystore.Store
	ledger *ledger.Ledger // nil: it can't be read, or nothing of it is needed any more
	found  resetFacts
}

// resetFacts are what there is to destroy.
type resetFacts struct {
	name     string // of the appliance, or of the machine if the appliance's is not known
	known    bool   // the name is that of the appliance
	id       string // of the audit log; "": not known
	ledger   string // its events, epoch and root, or its fault
	why      string // why the ledger was not read; "": it was
	recorded map[string][]keyring.Recorded
	unlisted map[string][]keystore.Ref // on a token, and not in the ledger
	owner    keystore.Owner
	bound    string // the token with the counter; "": none
	people   operators.Offline
	files    []resetFile
	disks    []disk
	stays    []string
}

// factoryReset is countersignd factory-reset. Without approvals, factoryReset says what would be
// destroyed and writes the text to approve.
func factoryReset(ctx context.Context, path string, r resetting, stdout, stderr io.Writer) (err error) {
	if path, err = filepath.Abs(path); err != nil {
		return err
	}
	if r.typed {
		if err := r.mayType(); err != nil {
			return err
		}
	}
	x := &reset{resetting: r, path: path, stdout: stdout, stderr: stderr, tokens: map[string]keystore.Store{}}
	x.log = slog.New(new(scrub.Scrubber).Handler(logline.Text.Handler(stderr, slog.LevelError)))
	if ended, err := x.endLast(); ended || err != nil {
		return err
	}
	return withConfig(path, func(c Config) error {
		x.c = c
		return x.run(ctx)
	})
}

// mayType refuses all but root at a terminal: a script can't type.
func (r resetting) mayType() error {
	switch {
	case os.Geteuid() != 0:
		return configError{errors.New("--typed: only root can destroy an appliance without its approvers")}
	case !term.IsTerminal(int(os.Stdin.Fd())):
		return configError{errors.New("--typed: the appliance's name is asked for at a terminal only")}
	case r.text != "" || r.proposer != "" || len(r.approvals) > 0:
		return configError{errors.New("--typed is in place of --proposer, --text and --approval: leave those out")}
	}
	return nil
}

func (x *reset) run(ctx context.Context) (err error) {
	if x.c.keysUser != nil && os.Geteuid() != 0 {
		return configError{errors.New("only root can destroy the files of two users (keys_user): start as root")}
	}
	// The writer of the configuration chooses the files. Other modes are no reason to keep keys.
	if err := unchanged("the configuration", x.path); err != nil {
		return configError{err}
	}
	launcher, err := x.c.startLauncher(x.path, "") // and stay root, who can remove the files of all users
	if err != nil {
		return err
	}
	defer launcher.Close()
	x.c.launcher = launcher
	unlock, err := holdFolder(filepath.Dir(x.c.Ledger))
	if err != nil {
		return fmt.Errorf("the folder of the ledger: %w", err)
	}
	defer unlock()
	if x.marker, err = x.c.readMarker(); err != nil {
		return err
	}
	if x.marker != nil {
		if err := x.resume(); err != nil {
			return err
		}
	}
	defer func() {
		closeTokens(x.tokens, x.log)
		if x.ledger != nil {
			err = errors.Join(err, x.ledger.Close())
		}
		if x.record != nil {
			err = errors.Join(err, x.record.Close())
		}
	}()
	if err := x.look(ctx); err != nil {
		return err
	}
	var act *approval.Proposal
	var approvals []operators.Signed
	if x.marker == nil {
		x.describe()
		var begin bool
		if begin, act, approvals, err = x.authorise(ctx); err != nil || !begin {
			return err
		}
	}
	if err := x.begin(act, approvals); err != nil {
		return err
	}
	if err := x.destroy(ctx, act, approvals); err != nil {
		x.note("failed", cause.Line(err.Error()))
		return fmt.Errorf("%w. The reset has not ended: run countersignd factory-reset again, which goes on", err)
	}
	return nil
}

// at has the paths of the configuration and of the ledger.
func (x *reset) at() []string { return []string{x.path, absolutePath(x.c.Ledger)} }

// resume takes what the reset was begun with. A token that has gone away since may be left by root:
// the appliance is destroyed already.
func (x *reset) resume() error {
	if !slices.Equal(x.marker.At, x.at()) {
		return x.foreign("configuration and ledger are %s, and here %s", strings.Join(x.marker.At, " and "),
			strings.Join(x.at(), " and "))
	}
	more := x.LeftTokens
	x.extent = x.marker.Extent
	for _, name := range more {
		if !slices.Contains(x.LeftTokens, name) {
			x.LeftTokens = append(x.LeftTokens, name)
		}
	}
	x.resetting.record = x.marker.Record
	return nil
}

// foreign is the error for a marker that is of the reset of another appliance: the daemon's user
// can move the file of root, and two ledgers can have one folder.
func (x *reset) foreign(format string, args ...any) error {
	return fmt.Errorf("%s is of another reset, whose %s: nothing has been destroyed now; remove the file, if that "+
		"reset has ended", x.c.resetMarker(), fmt.Sprintf(format, args...))
}

// checkMarker returns an error if what can be read still says that the marker is of another reset.
func (x *reset) checkMarker() error {
	m, f := x.marker, x.found
	switch {
	case f.name != m.Appliance && (f.known || f.why == ""): // by the ledger, or by a key on a token
		return x.foreign("appliance is %s, and here %s", m.Appliance, f.name)
	case f.why != "" && !m.done(phaseRoots) && f.ledger != m.Ledger:
		return x.foreign("ledger had %s, and here it is %s", m.Ledger, f.ledger)
	case f.why != "" || m.Typed:
		return nil
	}
	p, err := approval.ParseText(m.Text)
	if err == nil && (p.Appliance != f.name || p.Act != approval.ActFactoryReset) {
		err = fmt.Errorf("the text is to %s %s", p.Act, p.Appliance)
	}
	var signatures []string
	for _, a := range m.Approvals {
		signatures = append(signatures, a.Signature)
	}
	if err == nil {
		_, err = f.people.Approve(p, signatures)
	}
	if err != nil {
		return x.foreign("approvals are none here: %v", err)
	}
	return nil
}

// holdFolder keeps a restore, and the creation of a ledger, out of a folder.
func holdFolder(folder string) (release func() error, err error) {
	dir, err := os.Open(folder)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", folder, ledger.ErrInUse), dir.Close())
	}
	return dir.Close, nil
}

// look finds out what there is to destroy, and changes nothing.
func (x *reset) look(ctx context.Context) error {
	f := &x.found
	f.recorded, f.unlisted = map[string][]keyring.Recorded{}, map[string][]keystore.Ref{}
	log, err := x.lookAtLedger()
	if err = x.destroyed(err); err != nil {
		return err
	}
	if x.marker == nil || !x.marker.done(phaseRoots) {
		if err := x.openTokens(ctx); err != nil {
			return err
		}
		if err := x.lookAtTokens(ctx, &log); err != nil {
			return err
		}
	}
	if log != nil {
		if l, err := audit.NewLog(log); err == nil {
			f.name, f.id, f.known = l.Name(), l.ID(), true
		}
	}
	if f.name == "" {
		f.name, _ = os.Hostname()
	}
	if f.name == "" && x.marker == nil {
		return errors.New("neither the appliance nor the machine has a name that could be typed or approved: " +
			"give the machine a host name")
	}
	if f.known && f.why == "" {
		err := x.ledger.View(func(v ledger.View) (err error) {
			f.people, err = operators.ReadOffline(v, f.name)
			return err
		})
		if err = x.destroyed(err); err != nil {
			return err
		}
	}
	if x.marker != nil {
		if err := x.checkMarker(); err != nil {
			return err
		}
		f.name = x.marker.Appliance
		if id, is := strings.CutPrefix(f.name, "countersign/"); is {
			f.id = id
		}
	}
	if f.files, f.stays, err = x.listFiles(); err != nil {
		return err
	}
	f.disks, err = x.disks()
	return err
}

// destroyed takes an error of a ledger that may be half destroyed.
func (x *reset) destroyed(err error) error {
	if err == nil || x.marker == nil || !x.marker.done(phaseRoots) || errors.Is(err, ledger.ErrInUse) {
		return err
	}
	x.found.ledger, x.found.why, x.found.known = "damaged", "it is damaged", false
	if x.ledger == nil {
		return nil
	}
	err = x.ledger.Close()
	x.ledger = nil
	return err
}

// lookAtLedger opens the ledger, and reads the keys and the counter. log is the audit log's key.
func (x *reset) lookAtLedger() (log []byte, err error) {
	f, o := &x.found, x.c.ledger()
	o.AsIs = true
	switch x.ledger, err = ledger.Open(x.c.Ledger, o); {
	case errors.Is(err, ledger.ErrMissing):
		f.ledger, f.why = "missing", "it is missing"
		return nil, nil
	case errors.Is(err, ledger.ErrCorrupt):
		f.ledger, f.why = "damaged", "it is damaged"
	case errors.Is(err, ledger.ErrFormat), errors.Is(err, ledger.ErrOlder):
		f.ledger, f.why = "of another format", "it is of another version of the program, whose reset can read it"
	case err != nil: // in use, or it can't be opened now
		return nil, fmt.Errorf("%s: %w", x.c.Ledger, err)
	default:
		epoch, _, tree := x.ledger.Head()
		root, _ := tree.Root()
		f.ledger = fmt.Sprintf("%s, epoch %d with root %v", cli.Count(x.ledger.End(), "event"), epoch, root)
		var is bool
		return log, x.ledger.View(func(v ledger.View) error {
			all, key, err := keyring.ReadRecorded(v)
			if err != nil {
				return err
			}
			log = key
			for _, k := range all {
				f.recorded[k.Token] = append(f.recorded[k.Token], k)
			}
			if f.owner, f.bound, is, err = anchor.ReadOwner(v); is && f.bound == "" {
				f.bound = x.c.anchor().Token
			}
			return err
		})
	}
	x.ledger = nil
	release, err := lockFile(x.c.Ledger) // no daemon has it, though no daemon could read it
	if err == nil {
		err = release()
	}
	return nil, err
}

// openTokens opens the tokens of the configuration and of the ledger, apart from those that are
// left. All must answer.
func (x *reset) openTokens(ctx context.Context) error {
	known := slices.Sorted(maps.Keys(x.c.Tokens))
	for name := range x.found.recorded {
		if !slices.Contains(known, name) {
			known = append(known, name)
		}
	}
	for _, name := range x.LeftTokens {
		if !slices.Contains(known, name) {
			return configError{fmt.Errorf("--without-token %s: there is no such token; there are %s", name,
				strings.Join(known, ", "))}
		}
	}
	for _, name := range known {
		if slices.Contains(x.LeftTokens, name) || x.marker != nil && x.marker.done(rootOf(name)) {
			continue
		}
		err := fmt.Errorf("token %s: the configuration does not have it", name)
		if t := x.c.Tokens[name]; t != nil {
			one, only := *t, x.c
			one.Workers = 1
			only.Tokens = map[string]*Token{name: &one}
			opening, cancel := context.WithTimeout(ctx, startTime)
			x.tokens[name], err = openToken(opening, only, name, false, false, x.log, nil)
			cancel()
		}
		if err != nil {
			delete(x.tokens, name)
			late := x.StorageRoots && x.marker != nil && x.marker.done(phaseCounter)
			if late && errors.Is(err, keystore.ErrReplaced) {
				continue // the key was given back, and the marker does not have it yet
			}
			pin := ""
			if t := x.c.Tokens[name]; t != nil && isCredential(t.PINFile) {
				pin = ". Its PIN is a credential of systemd, which this command has only where CREDENTIALS_DIRECTORY " +
					"names a folder with the file, for the user of the key workers"
			}
			return fmt.Errorf("%w%s. Its keys can't be destroyed so, and nothing has been destroyed now. Put the "+
				"token back, or leave its keys as they are: --without-token %s", err, pin, name)
		}
	}
	return nil
}

// rootOf is the part of the phase of storage roots for one token.
func rootOf(token string) string { return phaseRoots + " of " + token }

// lookAtTokens lists the keys on the tokens. Without a ledger, the newest key of an audit log there
// tells the appliance's name.
func (x *reset) lookAtTokens(ctx context.Context, log *[]byte) error {
	var newest uint32
	for _, name := range slices.Sorted(maps.Keys(x.tokens)) {
		refs, err := x.tokens[name].Keys(ctx)
		if err != nil {
			return fmt.Errorf("token %s: its keys can't be listed: %w", name, err)
		}
		slices.SortFunc(refs, func(a, b keystore.Ref) int { return strings.Compare(a.String(), b.String()) })
		for _, ref := range refs {
			if !slices.ContainsFunc(x.found.recorded[name], func(k keyring.Recorded) bool { return k.Ref == ref }) {
				x.found.unlisted[name] = append(x.found.unlisted[name], ref)
			}
			if x.found.why == "" || ref.Name != keyring.LogName || ref.Version <= newest {
				continue
			}
			if k, err := x.tokens[name].Key(ctx, ref); err == nil {
				newest, *log = ref.Version, k.Info().PublicKey
			}
		}
	}
	return nil
}

// describe prints what would be destroyed, what would stay, and what follows.
func (x *reset) describe() {
	line := func(name, format string, args ...any) {
		fmt.Fprintf(x.stdout, "%-12s %s\n", name, cause.Line(fmt.Sprintf(format, args...)))
	}
	f := x.found
	line("appliance", "%s", either(f.known, f.name, "not known; the machine is "+f.name))
	line("ledger", "%s", f.ledger)
	if f.why != "" {
		line("not known", "the ledger was not read, since %s: keys are found by listing the tokens, so half-made keys "+
			"stay, and so does a TPM's counter", f.why)
	}
	for _, name := range slices.Sorted(maps.Keys(x.tokens)) {
		var refs []string
		for _, k := range f.recorded[name] {
			refs = append(refs, k.Ref.String())
		}
		line("destroys", "%s of the token %s: %s", cli.Count(len(refs), "key"), name, listed(sorted(refs)))
		for _, ref := range f.unlisted[name] {
			line("destroys", "the key %v of the token %s, which the ledger does NOT have", ref, name)
		}
		if f.bound == name {
			line("gives back", "the counter in the TPM of the token %s", name)
		}
		if t := x.c.Tokens[name]; t.TPM != "" {
			line(either(x.StorageRoots, "gives back", "stays"), "the storage root key %#x of the TPM of the token %s%s",
				cmp.Or(t.StorageRoot, 0x81000001), name, either(x.StorageRoots, ", which other programs may use", ""))
		}
	}
	for _, file := range f.files {
		line("destroys", "%s (%s)", file.path(), file.what)
	}
	if x.FreeSpace {
		for _, disk := range f.disks {
			if disk.inPlace() {
				line("overwrites", "the free space of the disk of %s, %s", disk.folder, mebibytes(disk.free))
			} else {
				line("doubtful", "%s", disk.doubt())
			}
		}
	} else {
		line("stays", "what older versions of these files have left in free blocks: it can be found on the disk")
	}
	for _, name := range x.LeftTokens {
		line("stays", "the token %s with %s: whoever has it and its PIN can use them", name,
			cli.Count(len(f.recorded[name]), "key"))
	}
	if f.bound != "" && x.tokens[f.bound] == nil {
		line("stays", "the counter of the token %s", f.bound)
	}
	for _, text := range f.stays {
		line("stays", "%s", text)
	}
	line("follows", "each line of keys ends: nothing can be signed by it any more, and no successor")
	line("follows", "peers that have pinned its keys refuse another appliance, until they are told")
	if keys := x.recoverable(); keys == "none" {
		line("follows", "a backup brings back the ledger, and none of these keys")
	} else {
		line("follows", "a backup that stays anywhere brings back the ledger, and recovery holders with it %s", keys)
	}
}

// recoverable is the number of keys that recovery holders can bring back with a backup.
func (x *reset) recoverable() string {
	sealed := 0
	for _, keys := range x.found.recorded {
		for _, k := range keys {
			if len(k.Envelope) > 0 {
				sealed++
			}
		}
	}
	return either(sealed > 0, cli.Count(sealed, "key"), "none")
}

// listed joins the names of keys, or counts many.
func listed(refs []string) string {
	if text := strings.Join(refs, ", "); len(text) <= 800 {
		return either(text != "", text, "none")
	}
	return cli.Count(len(refs), "key")
}

// parameters of the act, which the approvers sign.
func (x *reset) parameters() []approval.Parameter {
	var keys, unlisted []string
	for _, name := range slices.Sorted(maps.Keys(x.tokens)) {
		keys = append(keys, fmt.Sprintf("%s: %d", name, len(x.found.recorded[name])))
		for _, ref := range x.found.unlisted[name] {
			unlisted = append(unlisted, fmt.Sprintf("%v of %s", ref, name))
		}
	}
	left := sorted(x.LeftTokens)
	return []approval.Parameter{
		{Name: "machine", Value: hostName()},
		{Name: "ledger", Value: x.found.ledger},
		{Name: "keys", Value: either(len(keys) > 0, strings.Join(keys, ", "), "none")},
		{Name: "unlisted_keys", Value: listed(sorted(unlisted))},
		{Name: "recoverable", Value: x.recoverable()},
		{Name: "left_tokens", Value: either(len(left) > 0, strings.Join(left, ", "), "none")},
		{Name: "extent", Value: x.extent.String()},
	}
}

func sorted(names []string) []string { return slices.Sorted(slices.Values(names)) }

func hostName() string {
	host, _ := os.Hostname()
	return either(host != "", host, "unnamed")
}

// authorise finds out whether the reset may begin: by the approvals of a text, or by root who types
// the name. Without approvals, authorise writes the text.
func (x *reset) authorise(ctx context.Context) (
	begin bool, p *approval.Proposal, approvals []operators.Signed, err error,
) {
	const console = "; root can destroy the appliance at a terminal: --typed"
	switch {
	case x.typed:
		return true, nil, nil, x.typeName(ctx)
	case x.found.why != "":
		return false, nil, nil, fmt.Errorf("the ledger does not say who approves, since %s%s", x.found.why, console)
	case !x.found.known:
		return false, nil, nil, errors.New("the ledger has no audit log yet, so the appliance has no name" + console)
	case !x.found.people.Initialised():
		return false, nil, nil, errors.New("the appliance has no operators who could approve" + console)
	}
	if err := x.openText(); err != nil {
		return false, nil, nil, err
	}
	defer x.discardText()
	p, approvals, err = x.textApproval.authorise(x.found.people, approval.ActFactoryReset, x.parameters(),
		"Nothing has been destroyed yet", x.stdout)
	return err == nil && p != nil, p, approvals, err
}

// typeName has root type the name.
func (x *reset) typeName(ctx context.Context) error {
	fmt.Fprintf(x.stderr, "No approver is asked. This can't be undone. To destroy the appliance, type its name, %s: ",
		cause.Line(x.found.name))
	read := make(chan string, 1)
	go func() {
		text, _ := bufio.NewReader(io.LimitReader(os.Stdin, 1000)).ReadString('\n')
		read <- text
	}()
	select {
	case text := <-read:
		if strings.TrimSuffix(text, "\n") != x.found.name {
			return configError{errors.New("that is not the name: nothing has been destroyed")}
		}
		return nil
	case <-ctx.Done():
		return errors.New("nothing has been destroyed")
	}
}

// begin opens the record, and writes the marker: from here on the appliance is no more.
func (x *reset) begin(p *approval.Proposal, approvals []operators.Signed) (err error) {
	if err := x.giveReserves(); err != nil {
		return err
	}
	for _, disk := range x.found.disks { // which may be full, without room for the record
		if err := disk.removeFills(); err != nil {
			return err
		}
	}
	if x.record, err = x.openRecord(); err != nil {
		return err
	}
	if x.marker != nil {
		fmt.Fprintf(x.stderr, "the factory reset of %s that was begun at %s goes on (%s)\n", x.marker.Appliance,
			x.marker.Begun.Format(time.RFC3339), x.extent)
		return x.write(map[string]any{"step": "goes on", "appliance": x.marker.Appliance, "by": x.startedBy(),
			"left_tokens": x.LeftTokens})
	}
	m := &resetMarker{
		Format: 1, Begun: time.Now().UTC().Truncate(time.Second), Appliance: x.found.name, Machine: hostName(),
		By: x.startedBy(), Typed: p == nil, Extent: x.extent, Record: x.resetting.record, Ledger: x.found.ledger,
		At: x.at(), Done: []string{}, Reserved: map[string]string{},
	}
	for _, disk := range x.found.disks {
		m.Folders = append(m.Folders, disk.folder)
	}
	if p != nil {
		m.Text = p.Text()
	}
	for i, a := range approvals {
		m.Approvals = append(m.Approvals, resetApproval{a.Operator, a.PublicKey, x.signatures[i]})
		fmt.Fprintf(x.stdout, "%-12s %s\n", "approved by", a.Operator)
	}
	if err := x.write(map[string]any{"step": "begins", "reset": m}); err != nil {
		return err
	}
	x.marker = m
	if err := x.writeMarker(); err != nil {
		return err
	}
	fmt.Fprintf(x.stderr, "the factory reset of %s begins; the record is %s\n", cause.Line(m.Appliance), m.Record)
	return nil
}

func (x *reset) startedBy() string { return fmt.Sprintf("uid:%d", x.c.startedBy) }

func (x *reset) writeMarker() error {
	b, err := json.MarshalIndent(x.marker, "", "  ")
	if err != nil {
		return err
	}
	return durable.Replace(x.c.resetMarker(), append(b, '\n'), 0o600)
}

// openRecord opens the record, which must not be among what is destroyed.
func (x *reset) openRecord() (*os.File, error) {
	path, err := filepath.Abs(x.resetting.record)
	if err != nil {
		return nil, err
	}
	x.resetting.record = path
	real := path
	if folder, err := filepath.EvalSymlinks(filepath.Dir(path)); err == nil {
		real = filepath.Join(folder, filepath.Base(path))
	}
	for _, folder := range x.ownFolders() {
		if real == folder || below(real, folder) {
			return nil, configError{fmt.Errorf("--record %s: the folder %s is the appliance's: name a file outside",
				path, folder)}
		}
	}
	for _, file := range x.found.files {
		if real == file.path() {
			return nil, configError{fmt.Errorf("--record %s: this file will be destroyed: name another one", path)}
		}
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, fmt.Errorf("--record: %w", err)
	}
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, configError{errors.Join(fmt.Errorf("--record %s: it is no regular file", path), err, f.Close())}
	}
	return f, durable.Sync(filepath.Dir(path))
}

// write appends a line to the record, which is on the disk afterwards.
func (x *reset) write(line map[string]any) error {
	line["time"] = time.Now().UTC().Format(time.RFC3339)
	b, err := json.Marshal(line)
	if err == nil {
		_, err = x.record.Write(append(b, '\n'))
	}
	if err == nil {
		err = x.record.Sync()
	}
	if err != nil {
		return fmt.Errorf("--record: %w", err)
	}
	return nil
}

// note says and records a step.
func (x *reset) note(step, what string) error {
	fmt.Fprintf(x.stderr, "%-12s %s\n", step, cause.Line(what))
	return x.write(map[string]any{"step": step, "what": what})
}

// phase runs a phase, unless it was done, and then writes that it is done.
func (x *reset) phase(name string, do func() error) error {
	if x.marker.done(name) {
		return nil
	}
	if err := do(); err != nil {
		return err
	}
	x.marker.Done = append(x.marker.Done, name)
	return x.writeMarker()
}

// destroy runs all phases.
func (x *reset) destroy(ctx context.Context, p *approval.Proposal, approvals []operators.Signed) error {
	if x.ledger != nil && len(x.marker.Done) == 0 && x.found.ledger == x.marker.Ledger {
		if err := x.tellLedger(ctx, p, approvals); err != nil { // which goes anyway
			x.note("not written", "the event of the reset: "+err.Error())
		}
	}
	if err := x.phase(phaseKeys, func() error { return x.destroyKeys(ctx) }); err != nil {
		return err
	}
	if err := x.phase(phaseCounter, func() error { return x.giveCounterBack(ctx) }); err != nil {
		return err
	}
	if err := x.phase(phaseRoots, func() error { return x.giveRootsBack(ctx) }); err != nil {
		return err
	}
	closeTokens(x.tokens, x.log)
	clear(x.tokens)
	if x.ledger != nil {
		err := x.ledger.Close()
		if x.ledger = nil; err != nil {
			return err
		}
	}
	// The phases below are not written down: a second time they find nothing, and the marker of
	// before would be in a free block.
	if err := x.destroyFiles(ctx); err != nil {
		return err
	}
	if err := x.overwriteSpace(ctx); err != nil {
		return err
	}
	return x.destroyLast()
}

// tellLedger writes the reset into the ledger: a copy of the ledger that somebody takes now says
// what happened.
func (x *reset) tellLedger(ctx context.Context, p *approval.Proposal, approvals []operators.Signed) error {
	keys := (&approval.Proposal{Parameters: x.parameters()}).Parameter("keys")
	return x.ledger.Update(ctx, func(tx *ledger.Tx) error {
		record := func(who audit.Actor) error {
			return tx.Append(ledger.EventOf(audit.NewFactoryResetBegun(who, x.marker.Machine, x.marker.Ledger, keys)))
		}
		if p == nil {
			return record(audit.Operator(x.startedBy()))
		}
		return x.found.people.Write(tx, p, approvals, record)
	})
}

// destroyKeys destroys all keys on all tokens.
func (x *reset) destroyKeys(ctx context.Context) (all error) {
	for _, name := range slices.Sorted(maps.Keys(x.tokens)) {
		destroy := x.destroyOnToken
		if x.c.Tokens[name].TPM != "" {
			destroy = x.destroySealed
		}
		if err := destroy(ctx, name); err != nil {
			all = errors.Join(all, fmt.Errorf("token %s: %w; a token that can't destroy its keys can be left "+
				"(--without-token %[1]s)", name, err))
		}
	}
	return all
}

// destroyOnToken destroys the keys in a PKCS#11 token: those of the ledger, half-made ones too, and
// then those that the token lists still.
func (x *reset) destroyOnToken(ctx context.Context, name string) (all error) {
	store := x.tokens[name]
	destroy := func(ref keystore.Ref, tag keystore.Tag) error {
		if err := store.Destroy(ctx, ref, tag); err != nil {
			return err
		}
		return x.note("destroyed", fmt.Sprintf("the key %v of the token %s", ref, name))
	}
	for _, k := range x.found.recorded[name] {
		all = errors.Join(all, destroy(k.Ref, k.Tag))
	}
	left, err := store.Keys(ctx)
	if err != nil {
		return errors.Join(all, err)
	}
	for _, ref := range left {
		k, err := store.Key(ctx, ref)
		if err == nil {
			err = destroy(ref, k.Info().Tag)
		}
		all = errors.Join(all, err)
	}
	left, err = store.Keys(ctx)
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("it has the keys %v still", left)
	}
	return errors.Join(all, err)
}

// destroySealed destroys the keys of a TPM, which are in files that only the TPM can open.
func (x *reset) destroySealed(_ context.Context, name string) (all error) {
	root, err := openFolder(absolutePath(x.c.Tokens[name].State))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	defer root.Close()
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return err
	}
	for _, e := range entries {
		ref, is := strings.CutSuffix(e.Name(), ".key.json")
		if !is {
			continue
		}
		file := resetFile{absolutePath(x.c.Tokens[name].State), e.Name(),
			fmt.Sprintf("the key %s of the token %s", strings.ReplaceAll(ref, ".", "/"), name)}
		all = errors.Join(all, x.destroyFile(file, file.what))
	}
	return all
}

// giveCounterBack gives the TPM's counter back.
func (x *reset) giveCounterBack(ctx context.Context) error {
	if x.found.bound == "" {
		return nil
	}
	store, ok := x.tokens[x.found.bound].(keystore.Counter)
	if !ok {
		return x.note("stays", fmt.Sprintf("the counter of the token %s, which is not open", x.found.bound))
	}
	switch err := store.UndefineCounter(ctx, x.found.owner); {
	case errors.Is(err, keystore.ErrUnfit):
		return x.note("stays", fmt.Sprintf("the counter of the token %s: %v", x.found.bound, err))
	case err != nil:
		return fmt.Errorf("token %s: %w", x.found.bound, err)
	}
	return x.note("given back", "the counter of the token "+x.found.bound)
}

// giveRootsBack gives the storage root keys of the TPMs back.
func (x *reset) giveRootsBack(ctx context.Context) error {
	for _, name := range slices.Sorted(maps.Keys(x.c.Tokens)) {
		store, open := x.tokens[name].(keystore.Rooted)
		if !x.StorageRoots || x.c.Tokens[name].TPM == "" || slices.Contains(x.LeftTokens, name) {
			continue
		}
		err := x.phase(rootOf(name), func() error {
			if open {
				if err := store.EvictStorageRoot(ctx); err != nil {
					return fmt.Errorf("token %s: %w", name, err)
				}
			}
			return x.note("given back", "the storage root key of the token "+name)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// backupsOf lists the files of the appliance in its folder of backups.
func (x *reset) backupsOf() (names []string) {
	entries, _ := os.ReadDir(x.c.Backup.Folder)
	for _, e := range entries {
		for _, s := range []backup.Suffix{
			backup.Whole, backup.Lists, backup.Whole + backup.PartSuffix, backup.Lists + backup.PartSuffix,
		} {
			if _, is := s.Begun(e.Name(), x.found.id); is && x.found.id != "" {
				names = append(names, e.Name())
			}
		}
	}
	return names
}
