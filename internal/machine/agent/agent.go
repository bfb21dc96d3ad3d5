package agent

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"countersign/internal/machine"
	"countersign/internal/manage"
	"countersign/internal/secret"
	"countersign/internal/update"
	"countersign/tpm"

	"golang.org/x/mod/semver"
	"golang.org/x/sys/unix"
)

// Agent is the machine's side of what the daemon and the consoles ask for: root's rights, for a
// dozen of acts. The daemon reaches the network, so the agent checks itself what can be checked: an
// update has its signatures, and the daemon can name no path and no program.
type Agent struct {
	Log *slog.Logger
	// FirstLink makes a link for the passkey of the first administrator, and EnrolFirst enrols the
	// first administrator by an SSH key.
	FirstLink  func(ctx context.Context, name string) (url string, err error)
	EnrolFirst func(ctx context.Context, name, sshKey string) error

	image   machine.Image
	facts   diskFacts
	keys    update.Keys
	daemon  int // user ids
	console int

	acting   sync.Mutex // held during an act
	expected int64      // bytes of the file that is being uploaded, at most; guarded by acting
	mu       sync.Mutex
	report   *machine.Report // guarded by mu

	proven chan struct{} // closed when a new image has proven itself
}

// proofTime is the time that a new image has to prove itself: 10 minutes, or the seconds of
// countersign.proof on the command line, which is signed with the image.
func proofTime() time.Duration {
	b, _ := os.ReadFile("/proc/cmdline")
	for word := range strings.FieldsSeq(string(b)) {
		if value, is := strings.CutPrefix(word, "countersign.proof="); is {
			if n, err := strconv.ParseUint(value, 10, 16); err == nil {
				return time.Duration(n) * time.Second
			}
		}
	}
	return 10 * time.Minute
}

// releaseKeys has the keys of releases, in the measured root.
const releaseKeys = "/usr/share/countersign/release.keys"

// Run serves the agent until ctx ends.
func (a *Agent) Run(ctx context.Context) (err error) {
	if a.image, err = ReadImage(); err != nil {
		return err
	}
	if err := readJSON(runFolder+"/disk.json", &a.facts); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	text, err := os.ReadFile(releaseKeys)
	if err != nil {
		return err
	}
	if a.keys, err = update.ParseKeys(string(text)); err != nil {
		return err
	}
	for name, id := range map[string]*int{"countersign": &a.daemon, "countersign-console": &a.console} {
		u, err := user.Lookup(name)
		if err != nil {
			return err
		}
		*id, _ = strconv.Atoi(u.Uid)
	}
	a.proven = make(chan struct{})
	os.Remove(newUpload) // of before the restart
	pending, err := settleBoot(a.image)
	if err != nil {
		a.Log.Error("the record of the pending update", "err", err)
	}
	if toProve(pending, a.image) {
		go a.rollBack(ctx)
	}
	a.resumeConfiguration()
	if a.facts.Partition != "" {
		go a.enrol(ctx)
	}
	os.Remove(machine.Socket)
	l, err := net.Listen("unix", machine.Socket)
	if err != nil {
		return err
	}
	if err := os.Chmod(machine.Socket, 0o666); err != nil { // each caller's user is asked for
		return err
	}
	server := &http.Server{Handler: a.routes(), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 30 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, callerKey{}, callerOf(c))
		}}
	context.AfterFunc(ctx, func() { server.Close() })
	known := &callers{Listener: l, may: []int{0, a.daemon, a.console}}
	if err := server.Serve(known); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// callers is a listener for some users. Each has a few connections at a time.
type callers struct {
	net.Listener
	may []int

	mu   sync.Mutex
	open map[int]int // by user
}

// maxCalls is the number of connections of a user. The daemon and the consoles use one or two.
const maxCalls = 16

func (c *callers) Accept() (net.Conn, error) {
	for {
		conn, err := c.Listener.Accept()
		if err != nil {
			return nil, err
		}
		id := callerOf(conn)
		c.mu.Lock()
		if c.open == nil {
			c.open = map[int]int{}
		}
		if !slices.Contains(c.may, id) || c.open[id] >= maxCalls {
			c.mu.Unlock()
			conn.Close()
			continue
		}
		c.open[id]++
		c.mu.Unlock()
		return &call{Conn: conn, end: sync.OnceFunc(func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.open[id]--
		})}, nil
	}
}

// call is a connection that counts until it is closed.
type call struct {
	net.Conn
	end func()
}

func (c *call) Close() error {
	c.end()
	return c.Conn.Close()
}

type callerKey struct{}

// callerOf returns the user of a connection; -1 is unknown.
func callerOf(c net.Conn) int {
	id := -1
	if counted, is := c.(*call); is {
		c = counted.Conn
	}
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return id
	}
	raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			id = int(cred.Uid)
		}
	})
	return id
}

// toProve reports that the image that runs has to prove itself. A proven image never has to again,
// whatever restarts.
func toProve(p *machine.Pending, image machine.Image) bool {
	return p != nil && p.Phase == machine.PhaseInstalled && p.Manifest.Version == image.Version
}

// rollBack goes back to the image of before when the new one does not prove itself in time.
func (a *Agent) rollBack(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-a.proven:
		return
	case <-time.After(proofTime()):
	}
	a.acting.Lock() // after an act, which may be the proof
	defer a.acting.Unlock()
	p, err := readPending()
	if err != nil || p == nil || p.Phase != machine.PhaseInstalled {
		return
	}
	p.Why = "the appliance was not ready within " + proofTime().String()
	a.mu.Lock()
	if a.report != nil && len(a.report.Causes) > 0 {
		p.Why += ": " + a.report.Causes[0]
	}
	a.mu.Unlock()
	a.Log.Error("the new image goes", "why", p.Why)
	if err := writePending(*p); err != nil {
		a.Log.Error("the record of the pending update", "err", err)
	}
	if err := a.leave(ctx); err != nil {
		a.Log.Error("mark the image as a bad one", "err", err)
	}
	a.systemctl("reboot")
}

// leave has the loader start the image of before. An image whose name has no tries any more is
// marked by hand, since systemd-bless-boot would not find it.
func (a *Agent) leave(ctx context.Context) error {
	if counted() {
		return bless(ctx, "bad")
	}
	return withESP(func() error {
		name := filepath.Join(ESPFolder, imagesFolder, "countersign_"+a.image.Version)
		return os.Rename(name+".efi", name+"+0-1.efi")
	})
}

// enrol enrols the first administrator of the settings, once the daemon is there.
func (a *Agent) enrol(ctx context.Context) {
	s, err := LoadSettings()
	if err != nil || s.Setup.SSHKey == "" {
		return
	}
	name := s.Setup.Operator
	if name == "" {
		name = "admin"
	}
	for ctx.Err() == nil {
		err := a.EnrolFirst(ctx, name, s.Setup.SSHKey)
		if err == nil || errors.Is(err, manage.ErrConflict) {
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(2 * time.Second):
		}
	}
}

// errBusy is the error of an act during another one.
var errBusy = fmt.Errorf("%w: the machine is busy with another act", manage.ErrConflict)

// maxBody is the maximum length of an act's document, in bytes: a configuration, escaped.
const maxBody = 6*maxConfiguration + 4096

// routes has each act with the users that may ask.
func (a *Agent) routes() http.Handler {
	mux := http.NewServeMux()
	everybody, daemon, console := []int{0, a.daemon, a.console}, []int{0, a.daemon}, []int{0, a.console}
	refuse := func(w http.ResponseWriter, pattern string, err error) {
		a.Log.Error("refused", "act", pattern, "err", err)
		conflict := errors.Is(err, manage.ErrConflict)
		answer(w, http.StatusBadRequest, machine.Refusal{Error: err.Error(), Conflict: conflict})
	}
	handle := func(pattern string, who []int, do func(r *http.Request) (any, error)) {
		mux.HandleFunc(pattern, from(who, func(w http.ResponseWriter, r *http.Request) {
			if out, err := do(r); err != nil {
				refuse(w, pattern, err)
			} else {
				answer(w, http.StatusOK, out)
			}
		}))
	}
	act := func(pattern string, who []int, do func(ctx context.Context, name string) (any, error)) {
		handle(pattern, who, func(r *http.Request) (any, error) {
			var in machine.Named
			if err := json.NewDecoder(io.LimitReader(r.Body, maxBody)).Decode(&in); err != nil {
				return nil, err
			}
			if !a.acting.TryLock() {
				return nil, errBusy
			}
			defer a.acting.Unlock()
			return do(context.WithoutCancel(r.Context()), in.Name)
		})
	}
	handle("GET /status", everybody, func(*http.Request) (any, error) { return a.status(), nil })
	handle("POST /report", daemon, a.take)
	handle("PUT /update", daemon, a.upload)
	act("POST /update/end", daemon, a.endUpload)
	act("POST /install", daemon, a.install)
	act("POST /prove", daemon, a.prove)
	act("POST /settle", daemon, a.settle)
	// A machine can be stopped at any time: each act stands a power cut.
	handle("POST /reboot", everybody, func(*http.Request) (any, error) { return nil, a.systemctl("reboot") })
	handle("POST /poweroff", everybody, func(*http.Request) (any, error) { return nil, a.systemctl("poweroff") })
	act("POST /reset", everybody, func(ctx context.Context, name string) (any, error) {
		return nil, a.destroy(ctx, name, false)
	})
	handle("GET /configuration", daemon, func(*http.Request) (any, error) { return a.configuration() })
	act("POST /configuration/check", daemon, func(ctx context.Context, text string) (any, error) {
		_, err := a.checkConfiguration(ctx, text)
		return nil, err
	})
	act("POST /configuration", daemon, a.configure)
	act("POST /configuration/settle", daemon, a.settleConfiguration)
	handle("PUT /files", daemon, a.putFile)
	act("POST /files/remove", daemon, a.removeFile)
	handle("GET /settings", everybody, func(*http.Request) (any, error) { return a.settings() })
	handle("PUT /settings", console, a.change)
	handle("PUT /pin", console, a.pin)
	act("POST /await-backup", console, func(ctx context.Context, name string) (any, error) {
		return nil, a.destroy(ctx, name, true)
	})
	mux.HandleFunc("POST /command", from(console, func(w http.ResponseWriter, r *http.Request) {
		if err := a.command(w, r); err != nil {
			refuse(w, "POST /command", err)
		}
	}))
	act("POST /link", console, func(ctx context.Context, name string) (any, error) {
		url, err := a.FirstLink(ctx, name)
		return machine.Named{Name: url}, err
	})
	return mux
}

// from lets some users ask.
func from(who []int, serve http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if id, _ := r.Context().Value(callerKey{}).(int); !slices.Contains(who, id) {
			answer(w, http.StatusForbidden, machine.Refusal{Error: "this user may not ask for that"})
			return
		}
		serve(w, r)
	}
}

func answer(w http.ResponseWriter, status int, out any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(out)
}

// systemctl stops the machine in order, after the answer to the caller.
func (a *Agent) systemctl(verb string) error {
	return run(context.Background(), nil, "systemctl", "--no-block", verb)
}

func (a *Agent) status() machine.Status {
	s := machine.Status{Image: a.image, Try: a.facts.Try, Failures: map[string]string{}}
	for _, step := range []string{"disk", "network", "setup"} {
		if why := Failed(step); why != "" {
			s.Failures[step] = why
		}
	}
	var err error
	if s.Slots, err = slots(ESPFolder, runningFile()); err != nil && a.facts.ESP != "" {
		s.Failures["slots"] = err.Error()
	}
	if s.Pending, err = readPending(); err != nil {
		s.Failures["pending"] = err.Error()
	}
	if s.Configuration, err = readConfigurationRecord(); err != nil {
		s.Failures["configuration"] = err.Error()
	}
	if s.Files, err = a.files(); err != nil {
		s.Failures["files"] = err.Error()
	}
	if f, err := a.uploaded(); err == nil {
		s.Uploaded = &f.Manifest
	}
	if doc, err := a.settings(); err == nil && a.facts.Partition != "" {
		s.Changed = doc.Offered != "" && doc.Offered != doc.Text
	}
	if s.Waiting = waiting(); s.Waiting {
		delete(s.Failures, "setup")
	}
	s.Addrs = addresses()
	a.mu.Lock()
	defer a.mu.Unlock()
	s.Report = a.report
	return s
}

// addresses are those of the network interfaces.
func addresses() (all []string) {
	found, _ := net.InterfaceAddrs()
	for _, each := range found {
		if n, is := each.(*net.IPNet); is && !n.IP.IsLoopback() && !n.IP.IsLinkLocalUnicast() {
			all = append(all, n.String())
		}
	}
	return all
}

// take takes the daemon's report. The texts end up on a console.
func (a *Agent) take(r *http.Request) (any, error) {
	var in machine.Report
	if err := json.NewDecoder(io.LimitReader(r.Body, 64<<10)).Decode(&in); err != nil {
		return nil, err
	}
	if b, err := hex.DecodeString(in.Noise); in.Noise != "" && (err != nil || len(b) != 32) {
		return nil, errors.New("the Noise key is no public key")
	}
	if b, err := hex.DecodeString(in.CA); in.CA != "" && (err != nil || len(b) != 32) {
		return nil, errors.New("the fingerprint is no SHA-256")
	}
	in.At = time.Now().Unix()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.report = &in
	return nil, nil
}

// uploaded opens the uploaded update, and verifies its signatures again.
func (a *Agent) uploaded() (*openUpdate, error) {
	f, err := os.Open(uploadFile)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	u, err := update.Open(f, a.keys)
	if err != nil {
		return nil, err
	}
	return &openUpdate{Manifest: u.Manifest}, nil
}

type openUpdate struct{ update.Manifest }

// fits returns an error for an update that this machine can't have.
func (a *Agent) fits(m update.Manifest) error {
	conflict := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s", manage.ErrConflict, fmt.Sprintf(format, args...))
	}
	switch {
	case a.facts.ESP == "":
		return conflict("this machine has no disk for updates")
	case m.Variant != a.image.Variant:
		return conflict("the update is for the variant %s, and this machine has %s", m.Variant, a.image.Variant)
	case semver.Compare("v"+m.Version, "v"+a.image.Version) <= 0:
		return conflict("the update has version %s, and %s runs: only a newer one can be installed", m.Version,
			a.image.Version)
	case m.Rollback < a.image.Rollback:
		return conflict("the update has the rollback version %d, and the image that runs has %d", m.Rollback,
			a.image.Rollback)
	}
	return nil
}

// maxAround bounds what the file of an update has beside the image.
const maxAround = 1 << 20

// room returns an error unless a folder's disk has room for a file, and for the appliance.
func room(folder string, size int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(folder, &st); err != nil {
		return err
	}
	if free := int64(st.Bavail) * st.Bsize; free < size+minFree {
		return fmt.Errorf("the disk has %d MiB left, and the update needs %d beside the %d that the appliance keeps",
			free>>20, size>>20, minFree>>20)
	}
	return nil
}

// minFree is what an update leaves to the appliance, in bytes.
const minFree = 64 << 20

// newUpload is the file of an update that is being uploaded.
const newUpload = uploadFile + ".new"

// upload takes a part of the file of an update. The first part says already whose the update is:
// what those who release have not signed costs no disk.
func (a *Agent) upload(r *http.Request) (any, error) {
	if !a.acting.TryLock() {
		return nil, errBusy
	}
	defer a.acting.Unlock()
	offset, err := strconv.ParseInt(r.URL.Query().Get("offset"), 10, 64)
	if err != nil {
		return nil, err
	}
	part, err := io.ReadAll(io.LimitReader(r.Body, machine.MaxPart+1))
	if err != nil {
		return nil, err
	}
	if len(part) > machine.MaxPart {
		return nil, errors.New("the part is too large")
	}
	if offset == 0 {
		u, err := update.Open(bytes.NewReader(part), a.keys)
		if err == nil {
			err = a.fits(u.Manifest)
		}
		if err == nil {
			a.expected = u.Manifest.Size + maxAround // of the parts that follow, which need this one
			err = room(filepath.Dir(updatesFolder), a.expected)
		}
		if err == nil {
			err = os.MkdirAll(updatesFolder, 0o700)
		}
		if err == nil {
			err = os.RemoveAll(newUpload)
		}
		if err != nil {
			return nil, err
		}
	}
	if offset < 0 || offset > a.expected-int64(len(part)) {
		return nil, fmt.Errorf("%w: the file is longer than its manifest says: begin the upload again",
			manage.ErrConflict)
	}
	f, err := os.OpenFile(newUpload, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || info.Size() != offset {
		return nil, fmt.Errorf("%w: another part was expected: begin the upload again", manage.ErrConflict)
	}
	_, err = f.WriteAt(part, offset)
	return nil, err
}

// endUpload keeps the uploaded file, if it is whole.
func (a *Agent) endUpload(context.Context, string) (any, error) {
	f, err := os.Open(newUpload)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	u, err := update.Open(f, a.keys)
	if err == nil {
		err = a.fits(u.Manifest)
	}
	if err == nil {
		err = u.CopyImage(io.Discard)
	}
	if err == nil {
		err = errors.Join(syncAll(updatesFolder), os.Rename(newUpload, uploadFile), syncAll(updatesFolder))
	}
	if err != nil {
		return nil, errors.Join(err, os.Remove(newUpload))
	}
	a.Log.Info("an update was uploaded", "version", u.Manifest.Version)
	return u.Manifest, nil
}

// install writes the uploaded image beside the one that runs.
func (a *Agent) install(_ context.Context, digest string) (any, error) {
	f, err := os.Open(uploadFile)
	if err != nil {
		return nil, fmt.Errorf("%w: no update was uploaded: %w", manage.ErrConflict, err)
	}
	defer f.Close()
	u, err := update.Open(f, a.keys)
	if err != nil {
		return nil, err
	}
	if u.Manifest.Digest() != digest {
		return nil, fmt.Errorf("%w: another update was uploaded since: version %s", manage.ErrConflict,
			u.Manifest.Version)
	}
	if err := a.fits(u.Manifest); err != nil {
		return nil, err
	}
	if p, err := readPending(); err != nil || p != nil {
		return nil, fmt.Errorf("%w: the update before is not settled yet: %w", manage.ErrConflict, err)
	}
	image, written := io.Pipe()
	go func() { written.CloseWithError(u.CopyImage(written)) }()
	// The record comes first: an image that was started without a record would never be settled.
	p := machine.Pending{Phase: machine.PhaseInstalled, From: a.image.Version, Manifest: u.Manifest}
	if err := writePending(p); err != nil {
		return nil, err
	}
	err = withESP(func() error { return install(ESPFolder, runningFile(), u.Manifest.Version, image) })
	image.CloseWithError(errors.New("not wanted any more"))
	if err != nil {
		return nil, errors.Join(err, os.Remove(pendingFile))
	}
	a.Log.Info("an image was installed", "version", u.Manifest.Version)
	return nil, nil
}

// prove has the machine keep the image that runs, and no older one open the disk. The record of the
// proof is on the encrypted disk first: a name on the ESP proves nothing.
func (a *Agent) prove(ctx context.Context, version string) (any, error) {
	if version != a.image.Version {
		return nil, fmt.Errorf("%w: version %s runs", manage.ErrConflict, a.image.Version)
	}
	p, err := readPending()
	if err != nil || p == nil || p.Manifest.Version != version {
		return nil, err
	}
	p.Phase = machine.PhaseProven
	if err := writePending(*p); err != nil {
		return nil, err
	}
	select {
	case <-a.proven:
	default:
		close(a.proven)
	}
	all, err := slots(ESPFolder, runningFile())
	if err != nil {
		return nil, err
	}
	if slices.ContainsFunc(all, func(s machine.Slot) bool { return s.Running && s.Left >= 0 }) {
		if err := bless(ctx, "good"); err != nil {
			return nil, err
		}
	}
	return nil, a.raise(ctx)
}

// raise puts the seal for the rollback version of the image that runs in force.
func (a *Agent) raise(ctx context.Context) error {
	if a.facts.Try || a.facts.Partition == "" {
		return nil
	}
	d := Disk{partition: a.facts.Partition}
	tokens, err := d.tokens(ctx)
	if err != nil {
		return err
	}
	var present, next string
	for number, t := range tokens {
		if t.Type != sealToken || t.Seal == nil {
			continue
		}
		if present == "" || t.Seal.Counter < tokens[present].Seal.Counter {
			present = number
		}
		if next == "" || t.Seal.Counter > tokens[next].Seal.Counter {
			next = number
		}
	}
	if present == next {
		return nil
	}
	v := tpm.Volumes{Config: tpm.Config{Device: tpmDevice, Deadline: 2 * time.Minute}}
	if err := v.Raise(ctx, tokens[present].Seal.Counter); err != nil {
		return err
	}
	a.Log.Info("the minimal rollback version was raised", "to", tokens[next].Seal.Minimum)
	return run(ctx, nil, "cryptsetup", "token", "remove", "--token-id="+present, a.facts.Partition)
}

// settle forgets an update that has ended.
func (a *Agent) settle(_ context.Context, version string) (any, error) {
	p, err := readPending()
	if err != nil || p == nil || p.Manifest.Version != version || p.Phase == machine.PhaseInstalled {
		return nil, err
	}
	return nil, errors.Join(os.RemoveAll(updatesFolder), os.Remove(pendingFile), syncAll(filepath.Dir(pendingFile)))
}

// destroy destroys the key of the disk. name must be the appliance's, or countersign while it has
// none. The next boot makes a new state by the settings of the ESP: with restore, these become the
// ones in force, and say that the machine waits for a backup.
func (a *Agent) destroy(ctx context.Context, name string, restore bool) error {
	want := "countersign"
	a.mu.Lock()
	if a.report != nil && a.report.Appliance != "" {
		want = a.report.Appliance
	}
	a.mu.Unlock()
	if name != want {
		return fmt.Errorf("the name is not %s: nothing was destroyed", want)
	}
	a.Log.Warn("the machine is reset", "restore", restore)
	if err := a.offer(restore); err != nil {
		return err
	}
	if err := resetDisk(ctx, a.facts); err != nil {
		return err
	}
	return a.systemctl("reboot")
}

// offer writes the settings of the next first boot to the ESP, where they differ: those in force,
// or without an open state those of the ESP.
func (a *Agent) offer(restore bool) error {
	s, err := (&Disk{}).offered()
	if restore && a.facts.Partition != "" {
		s, err = LoadSettings()
	}
	switch {
	case err != nil && restore:
		return fmt.Errorf("countersign.toml on the ESP: %w", err)
	case err != nil || s.Setup.Restore == restore: // the next boot names the error
		return nil
	}
	s.Setup.Restore = restore
	return withESP(func() error {
		path := filepath.Join(ESPFolder, "countersign.toml")
		if err := os.WriteFile(path+".new", []byte(s.Text()), 0o600); err != nil {
			return err
		}
		return errors.Join(syncAll(ESPFolder), os.Rename(path+".new", path))
	})
}

// settings returns the settings in force, and those of the ESP.
func (a *Agent) settings() (doc machine.SettingsDoc, err error) {
	s, err := LoadSettings()
	if err != nil {
		return doc, err
	}
	doc.Text = s.Text()
	if offered, err := (&Disk{}).offered(); err == nil {
		doc.Offered = offered.Text()
	}
	return doc, nil
}

// pinFile is the PIN of the key workers: countersignd setup takes a file that is there.
const pinFile = "/var/lib/countersign-keys/pin"

// maxPIN is the maximum length of a PIN in bytes.
const maxPIN = 255

// pin keeps the PIN of the HSM's user, and goes on with the set-up. An appliance that has a PIN
// keeps that one.
func (a *Agent) pin(r *http.Request) (any, error) {
	b, err := io.ReadAll(io.LimitReader(r.Body, maxPIN+1))
	pin := secret.New(b)
	defer pin.Wipe()
	s, err2 := LoadSettings()
	switch {
	case errors.Join(err, err2) != nil:
		return nil, errors.Join(err, err2)
	case s.token() != "pkcs11" || a.facts.Partition == "":
		return nil, errors.New("there is no HSM in the settings: a TPM needs no PIN")
	case len(b) == 0 || len(b) > maxPIN || bytes.ContainsAny(b, "\r\n\x00"):
		return nil, fmt.Errorf("a PIN has 1 to %d bytes on one line", maxPIN)
	}
	owner, err := keysOwner()
	if err != nil {
		return nil, err
	}
	if isSetUp() { // until then, a wrong PIN can be typed again
		return nil, errors.New("the appliance has a PIN already")
	}
	if err := replaceAs(pinFile, pin.Expose(), 0o600, owner, owner); err != nil {
		return nil, err
	}
	return nil, startUnits(context.WithoutCancel(r.Context()))
}

// keysOwner is the user of the key workers, who has a group with the same number.
func keysOwner() (int, error) {
	keys, err := user.Lookup("countersign-keys")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(keys.Uid)
}

// change puts the network settings of a text in force. The set-up stays: it was for the first boot.
func (a *Agent) change(r *http.Request) (any, error) {
	b, err := io.ReadAll(io.LimitReader(r.Body, maxSettings+1))
	if err != nil {
		return nil, err
	}
	next, err := ParseSettings(b)
	if err != nil {
		return nil, err
	}
	now, err := LoadSettings()
	if err != nil {
		return nil, err
	}
	if next.PeerPort() != now.PeerPort() || next.PubkyPort() != now.PubkyPort() || next.HTTPSPort() != now.HTTPSPort() {
		return nil, errors.New("the ports are those of the first boot: only a factory reset changes them")
	}
	if !slices.Equal(next.HSM, now.HSM) {
		return nil, errors.New("hsm is that of the first boot: only a factory reset changes it")
	}
	next.Setup = now.Setup
	if a.facts.Partition == "" {
		return nil, errors.New("the state is not open, so nothing can be kept")
	}
	ctx := context.WithoutCancel(r.Context())
	if err := CheckNetwork(ctx, next); err != nil {
		return nil, err
	}
	if err := next.write(settingsFile); err != nil {
		return nil, err
	}
	if err := ApplyNetwork(ctx, next); err != nil {
		return nil, err
	}
	for _, unit := range []string{"systemd-networkd.service", "chronyd.service"} {
		if err := run(ctx, nil, "systemctl", "--no-block", "restart", unit); err != nil {
			return nil, err
		}
	}
	a.Log.Info("the settings of the machine were changed", "by", "console")
	return nil, nil
}
