package softhsmtests

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"countersign/internal/launcher"
	"countersign/tpm/tpmtest"
)

// twoUsers are the users of packaging/systemd/countersign.sysusers on a machine of one test.
type twoUsers struct {
	daemon, keys *syscall.Credential
}

// asTwoUsers is the script that gives a machine the users of $1, and executes a command there.
const asTwoUsers = `
set -eu
mount --bind "$1/passwd" /etc/passwd; mount --bind "$1/group" /etc/group; shift
[ -z "${NOTIFY_SOCKET:-}" ] || chmod 0777 "$NOTIFY_SOCKET"
exec "$@"`

// separate changes a system without a ledger into one with two users, as docs/OPERATIONS.md has it:
// root owns the configuration, the daemon's user the ledger's folder, and the user of the key
// workers the folder keys, which gets the files named.
func (s *system) separate(files ...string) twoUsers {
	t := s.t
	t.Helper()
	needRoot(t, "a process of another user")
	needSystemd(t)
	root := t.TempDir()
	for _, name := range []string{"passwd", "group"} {
		s.ok(os.MkdirAll(filepath.Join(root, "etc"), 0o755))
		b, err := os.ReadFile(filepath.Join("/etc", name))
		s.ok(err)
		s.ok(os.WriteFile(filepath.Join(root, "etc", name), b, 0o644))
	}
	users, err := filepath.Abs(unitFolder + "/countersign.sysusers")
	s.ok(err)
	if out, err := exec.Command("systemd-sysusers", "--root="+root, users).CombinedOutput(); err != nil {
		t.Fatalf("systemd-sysusers: %v\n%s", err, out)
	}
	credential := func(name string, groups ...string) *syscall.Credential {
		number := func(file, name string) uint32 {
			b, err := os.ReadFile(filepath.Join(root, "etc", file))
			s.ok(err)
			for line := range strings.Lines(string(b)) {
				if f := strings.Split(line, ":"); f[0] == name {
					n, err := strconv.ParseUint(f[2], 10, 31)
					s.ok(err)
					return uint32(n)
				}
			}
			t.Fatalf("%s has no %s", file, name)
			return 0
		}
		c := &syscall.Credential{Uid: number("passwd", name), Gid: number("group", name)}
		for _, group := range groups {
			c.Groups = append(c.Groups, number("group", group))
		}
		return c
	}
	u := twoUsers{credential("countersign", "countersign-admin"), credential("countersign-keys", "countersign")}
	s.before = []string{"unshare", "--mount", "--propagation", "private", "bash", "-c", asTwoUsers, "-",
		filepath.Join(root, "etc")}
	s.ok(os.Chmod(filepath.Dir(s.dir), 0o755)) // of the tests' folders
	s.ok(os.Chmod(filepath.Dir(root), 0o755))
	s.ok(os.Chmod(bin, 0o755))
	s.ok(os.Chmod(s.dir, 0o750))
	s.ok(os.Chown(s.dir, 0, int(u.daemon.Gid)))
	for name, owner := range map[string]*syscall.Credential{"state": u.daemon, "run": u.daemon, "keys": u.keys} {
		s.ok(os.Mkdir(s.path(name), 0o700))
		s.ok(os.Chown(s.path(name), int(owner.Uid), int(owner.Gid)))
	}
	s.ok(os.Mkdir(s.path("imports"), 0o755))
	for _, name := range files {
		s.ok(os.Rename(s.path(name), s.path("keys/"+name)))
		s.ok(os.Chown(s.path("keys/"+name), int(u.keys.Uid), int(u.keys.Gid)))
	}
	for _, name := range []string{"countersign.toml", "policy.cedar", "softhsm2.conf"} {
		if exists(s.path(name)) {
			s.ok(os.Chmod(s.path(name), 0o640))
			s.ok(os.Chown(s.path(name), 0, int(u.daemon.Gid)))
		}
	}
	s.edit("countersign.toml", `admin_socket = "admin.sock"`, `admin_socket = "run/admin.sock"`)
	s.ok(os.Symlink("run/admin.sock", s.path("admin.sock")))
	s.edit("countersign.toml", `"ledger.db"`, `"state/ledger.db"`)
	s.edit("countersign.toml", "listen =", `user = "countersign"
keys_user = "countersign-keys"
journal.folder = "keys/journal"
import_folder = "imports"
listen =`)
	return u
}

// ok ends the test at an error.
func (s *system) ok(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// newTwoUsers makes a system of two users with a SoftHSM token.
func newTwoUsers(t *testing.T) (*system, twoUsers) {
	t.Helper()
	s := newSoftHSM(t, softHSM)
	u := s.separate("pin", "so-pin", "tokens")
	s.edit("countersign.toml", `pin_file = "pin"`, "pin_file = \"keys/pin\"\ndeadline = \"1s\"")
	s.edit("softhsm2.conf", s.path("tokens"), s.path("keys/tokens"))
	if out, code := s.daemon("init", "--new-token", "--so-pin-file", s.path("keys/so-pin")); code != 0 {
		t.Fatalf("init: %d\n%s", code, out)
	}
	return s, u
}

// tries runs a shell command as a user, outside any sandbox.
func tries(as *syscall.Credential, format string, args ...any) (output string, err error) {
	cmd := exec.Command("sh", "-c", fmt.Sprintf(format, args...))
	cmd.Dir, cmd.SysProcAttr = "/", &syscall.SysProcAttr{Credential: as}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// checkUsers checks the users of the daemon, the launcher and the key workers, and the owners of
// all that they have made.
func (s *system) checkUsers(p *process, u twoUsers) {
	s.t.Helper()
	for pid, want := range map[int]*syscall.Credential{p.cmd.Process.Pid: u.daemon, p.launcher(): u.keys} {
		s.checkUser(pid, want)
	}
	for _, pid := range p.workers() {
		s.checkUser(pid, u.keys)
	}
	for folder, want := range map[string]*syscall.Credential{"state": u.daemon, "keys": u.keys} {
		s.ok(filepath.Walk(s.path(folder), func(path string, st os.FileInfo, err error) error {
			if err == nil && st.Sys().(*syscall.Stat_t).Uid != want.Uid {
				s.t.Errorf("%s belongs to user %d, want %d", path, st.Sys().(*syscall.Stat_t).Uid, want.Uid)
			}
			return nil
		}))
	}
}

func (s *system) checkUser(pid int, want *syscall.Credential) {
	s.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	s.ok(err)
	line := fmt.Sprintf("Uid:\t%[1]d\t%[1]d\t%[1]d\t%[1]d\nGid:\t%[2]d\t%[2]d\t%[2]d\t%[2]d\n", want.Uid, want.Gid)
	for _, line := range []string{line, "CapPrm:\t0000000000000000\n", "NoNewPrivs:\t1\n"} {
		if !strings.Contains(string(status), line) {
			s.t.Errorf("process %d has no %q:\n%s", pid, line, status)
		}
	}
}

// TestTwoUsers has root start an appliance whose key workers have a user of their own. The kernel's
// users alone, without a sandbox, keep the daemon's user from PINs, tokens and the journal.
func TestTwoUsers(t *testing.T) {
	s, u := newTwoUsers(t)
	p := s.serve()
	s.enrol()
	s.signs("payments", "")
	s.checkUsers(p, u)
	const denied = "ermission denied" // in the words of each program
	for what, command := range map[string]string{
		"the PIN": "cat keys/pin", "the tokens": "ls keys/tokens", "the journal": "ls keys/journal",
		"a write to the journal": "echo >>keys/journal/main.00000000000000000000.journal",
		"a folder in its place":  "mv keys/journal keys/gone", "the configuration": "echo >>countersign.toml",
		"a new configuration": "mv countersign.toml gone.toml",
	} {
		if out, err := tries(u.daemon, "cd %q && %s", s.dir, command); err == nil || !strings.Contains(out, denied) {
			t.Errorf("the daemon's user has %s: %v\n%s", what, err, out)
		}
	}
	for _, command := range []string{"cat state/ledger.db", "ls state", "echo >>countersign.toml"} {
		if out, err := tries(u.keys, "cd %q && %s", s.dir, command); err == nil || !strings.Contains(out, denied) {
			t.Errorf("the key workers' user may %s: %v\n%s", command, err, out)
		}
	}
	h, err := s.admin().Health(t.Context())
	s.ok(err)
	if k := h.KeyWorkers; k == nil || !k.OwnUser || k.User != int(u.keys.Uid) || len(k.Exposed) != 0 {
		t.Errorf("the state says of the key workers: %+v", k)
	}
	metrics := s.must("admin", "metrics", "--raw")
	for _, series := range []string{"key_workers_one_user", "key_workers_exposed"} {
		if !strings.Contains(metrics, "countersign_"+series+" 0\n") {
			t.Errorf("countersign_%s is not 0", series)
		}
	}

	// A seed is imported from a folder of root.
	s.write("imports/seed", strings.Repeat("\x17", 31)+"\x18")
	s.ok(os.Chown(s.path("imports/seed"), int(u.keys.Uid), int(u.keys.Gid)))
	s.must("admin", "key", "import", "imported", s.path("imports/seed"))

	// A PIN that is wrong and then right needs no word of an operator, as with one user.
	s.write("keys/pin", "wrong\n")
	for _, pid := range p.workers() {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	eventually(t, "the PIN is refused", func() bool { return s.hasCause("token-pin-refused") })
	s.write("keys/pin", userPIN+"\n")
	eventually(t, "the token serves with the right PIN", func() bool { return !s.hasCause("token-pin-refused") })
	eventually(t, "a new key worker", func() bool { return !s.hasCause("token-unavailable") })
	s.signs("payments", "")
	s.checkUsers(p, u)

	p.cmd.Process.Signal(syscall.SIGHUP)
	if out, code := s.daemon("check"); code != 0 || !strings.Contains(out, "in use") {
		t.Errorf("check beside the daemon: %d\n%s", code, out)
	}
	p.stop()
	if !strings.Contains(p.stderr.String(), "reload: the configuration was read") {
		t.Errorf("SIGHUP did not reload:\n%s", tail(p.stderr.String(), 2000))
	}
	if out, code := s.daemon("check"); code != 0 ||
		!strings.Contains(out, fmt.Sprintf("key workers have a user of their own, %d\n", u.keys.Uid)) {
		t.Errorf("check: %d\n%s", code, out)
	}
}

// TestTwoUsersRefuse starts a daemon of two users in wrong ways. Each is refused with status 2 and
// what to do.
func TestTwoUsersRefuse(t *testing.T) {
	s, u := newTwoUsers(t)
	refused := func(what, want string) {
		t.Helper()
		for _, command := range []string{"serve", "check", "init"} {
			if out, code := s.daemon(command); code != 2 || !strings.Contains(out, want) {
				t.Errorf("%s, %s: status %d, want 2 and %q\n%s", what, command, code, want, out)
			}
		}
	}
	before := s.before
	s.before = append(slices.Clone(before), "setpriv", fmt.Sprint("--reuid=", u.daemon.Uid),
		fmt.Sprint("--regid=", u.daemon.Gid), "--init-groups")
	refused("the daemon's user", "start as root, or set keys_socket")
	s.before = append(slices.Clone(before), "setpriv", "--reuid=4711", fmt.Sprint("--regid=", u.daemon.Gid),
		"--clear-groups")
	refused("another user", "start it as root or as that user")
	s.before = before

	// No key worker obeys a file that the daemon's user could change.
	for _, name := range []string{"countersign.toml", "softhsm2.conf"} {
		s.ok(os.Chown(s.path(name), int(u.daemon.Uid), int(u.daemon.Gid)))
		refused(name+" of the daemon's user", "its owner must be root")
		s.ok(os.Chown(s.path(name), 0, int(u.daemon.Gid)))
	}
	s.ok(os.Chown(s.path("keys/pin"), int(u.daemon.Uid), int(u.daemon.Gid)))
	if out, code := s.daemon("check"); code == 0 {
		t.Errorf("a PIN file of another user: %d\n%s", code, out)
	}
	s.ok(os.Chown(s.path("keys/pin"), int(u.keys.Uid), int(u.keys.Gid)))

	s.edit("countersign.toml", `keys_user = "countersign-keys"`, `keys_user = "nobody-knows"`)
	refused("an unknown user", "make the user first")
	s.edit("countersign.toml", `keys_user = "nobody-knows"`, `keys_user = "countersign"`)
	refused("one user for both", "user and keys_user are one user")
	s.edit("countersign.toml", `keys_user = "countersign"`, `keys_user = "root"`)
	refused("root", "root is no user to be confined to")
	s.edit("countersign.toml", "keys_user = \"root\"\n", "")
	refused("one field without the other", "user and keys_user go together")
}

// dialEnv has the test's binary connect to a launcher, see callLauncher.
const dialEnv = "SOFTHSM_TESTS_DIAL"

// callLauncher connects to a launcher's socket and prints the error, in a process that
// TestKeysSocket has started. Otherwise callLauncher returns at once.
func callLauncher() {
	if path, is := os.LookupEnv(dialEnv); is {
		_, err := launcher.Dial(path, "")
		fmt.Println(err)
		os.Exit(0)
	}
}

// TestKeysSocket has a service manager's tool start launchers as the user of the key workers, for a
// daemon that another user than root has started.
func TestKeysSocket(t *testing.T) {
	s, u := newTwoUsers(t)
	s.edit("countersign.toml", "listen =", "keys_socket = \"keys.sock\"\nlisten =")
	s.edit("countersign.toml", `"keys/pin"`, `"$CREDENTIALS_DIRECTORY/pin"`)
	root := s.before
	as := func(c *syscall.Credential) []string {
		return append(slices.Clone(root), "setpriv", fmt.Sprint("--reuid=", c.Uid),
			fmt.Sprint("--regid=", c.Gid), "--init-groups")
	}
	s.before = as(u.daemon)
	out, code := s.daemon("check")
	if code != 1 || !strings.Contains(out, "systemctl start countersignd-keys.socket") {
		t.Errorf("without the socket: %d\n%s", code, out)
	}

	socket := filepath.Join(t.TempDir(), "keys.sock") // in a folder that anybody can write to here
	s.ok(os.Chmod(filepath.Dir(socket), 0o777))
	s.ok(os.Symlink(socket, s.path("keys.sock")))
	activate := append(as(u.keys), "systemd-socket-activate", "--accept", "--seqpacket",
		"--listen="+socket, "--setenv=CREDENTIALS_DIRECTORY="+s.path("keys"),
		filepath.Join(bin, "countersignd"), "launcher", "--config", s.path("countersign.toml"))
	manager := exec.Command(activate[0], activate[1:]...)
	var log strings.Builder
	manager.Stderr = &log
	s.ok(manager.Start())
	defer func() {
		manager.Process.Kill()
		manager.Wait()
		s.checkOutput("the launchers' log", log.String())
		if t.Failed() {
			t.Log(log.String())
		}
	}()
	eventually(t, "the socket", func() bool { return os.Chmod(socket, 0o777) == nil })

	p := s.serve()
	s.enrol()
	s.signs("payments", "")
	s.checkUser(p.cmd.Process.Pid, u.daemon)
	launchers := children(t, manager.Process.Pid)
	if len(launchers) != 1 {
		t.Fatalf("the launchers are %d, want one", launchers)
	}
	workers := children(t, launchers[0])
	for _, pid := range append(workers, launchers...) {
		s.checkUser(pid, u.keys)
	}
	if out, code := s.daemon("check"); code != 0 || !strings.Contains(out, "in use") {
		t.Errorf("check beside the daemon: %d\n%s", code, out)
	}
	if out, code := s.daemon("init", "--new-token", "--so-pin-file", s.path("keys/so-pin")); code != 2 ||
		!strings.Contains(out, "start init as root") {
		t.Errorf("a new token: %d\n%s", code, out)
	}
	stranger := exec.Command("/proc/self/exe")
	stranger.Env = append(os.Environ(), dialEnv+"="+socket)
	stranger.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 4711, Gid: 4711}}
	answer, err := stranger.CombinedOutput()
	if err != nil || !strings.Contains(string(answer), "user 4711 asks for key workers") {
		t.Errorf("a stranger at the socket: %v\n%s", err, answer)
	}
	p.stop()
	for _, pid := range append(workers, launchers...) {
		eventually(t, "the launcher and its key workers have ended", func() bool { return syscall.Kill(pid, 0) != nil })
	}
	s.before = root
	s.edit("countersign.toml", `"$CREDENTIALS_DIRECTORY/pin"`, `"keys/pin"`)
	p = s.serve() // by root, at no socket
	s.signs("payments", "")
	s.checkUsers(p, u)
	p.stop()
}

// TestTwoUsersTPM has a TPM as the only token of an appliance of two users.
func TestTwoUsersTPM(t *testing.T) {
	e := tpmtest.New(t)
	s := newFolder(t)
	s.write("pin", userPIN+"\n")
	s.configure(fmt.Sprintf("tpm = %q\nstate = \"keys/tpm\"\npin_file = \"keys/pin\"", e.Socket))
	u := s.separate("pin")
	s.ok(os.Chmod(filepath.Dir(filepath.Dir(e.Socket)), 0o755))
	s.ok(os.Chmod(filepath.Dir(e.Socket), 0o755))
	s.ok(os.Chown(e.Socket, int(u.keys.Uid), int(u.keys.Gid)))
	if out, code := s.daemon("init"); code != 0 || !strings.Contains(out, "prepared the TPM of the token main") {
		t.Fatalf("init: %d\n%s", code, out)
	}
	if out, code := s.daemon("init"); code != 0 || !strings.Contains(out, "nothing was changed") {
		t.Errorf("init again: %d\n%s", code, out)
	}
	p := s.serve()
	s.enrol()
	s.signs("payments", "")
	s.checkUsers(p, u)
	if out, err := tries(u.daemon, "ls %q", s.path("keys/tpm")); err == nil {
		t.Errorf("the daemon's user has the TPM's folder: %s", out)
	}
	p.stop()
}
