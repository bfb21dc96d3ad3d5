package softhsmtests

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// newSeparated makes a system whose keys are outside the folders of the daemon: the PIN, the tokens
// and SoftHSM's configuration.
func newSeparated(t *testing.T) (s *system, keys string) {
	t.Helper()
	s, keys = newSoftHSM(t, softHSM), t.TempDir()
	for _, name := range []string{"pin", "softhsm2.conf", "tokens"} {
		if err := os.Rename(s.path(name), filepath.Join(keys, name)); err != nil {
			t.Fatal(err)
		}
	}
	conf := fmt.Sprintf("directories.tokendir = %s\nlog.level = ERROR\n", filepath.Join(keys, "tokens"))
	if err := os.WriteFile(filepath.Join(keys, "softhsm2.conf"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	s.edit("countersign.toml", `pin_file = "pin"`, fmt.Sprintf("pin_file = %q", filepath.Join(keys, "pin")))
	s.edit("countersign.toml", s.path("softhsm2.conf"), filepath.Join(keys, "softhsm2.conf"))
	if out, code := s.daemon("init", "--new-token", "--so-pin-file", s.path("so-pin")); code != 0 {
		t.Fatalf("init: %d\n%s", code, out)
	}
	return s, keys
}

// foreignThings makes what no sandbox has a right to: a folder with a file, a TCP port and a Unix
// socket with a server, and a process.
func foreignThings(t *testing.T) (folder, socket string, port, pid int) {
	t.Helper()
	folder = t.TempDir()
	if err := os.WriteFile(filepath.Join(folder, "file"), []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(folder, "socket")
	unix, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tcp.Close(); unix.Close() })
	return folder, socket, tcp.Addr().(*net.TCPAddr).Port, os.Getpid()
}

// The kernel's answers to forbidden acts, in the sandboxes of the daemon, the launcher and a key
// worker. EACCES is Landlock's for files and ports, SIGSYS the end by the filter of system calls.
// EPERM is the filter's, and Landlock's for a signal.
var forbidden = map[string][3]string{
	"read a file":                    {"EACCES", "EACCES", "EACCES"},
	"list a folder":                  {"EACCES", "EACCES", "EACCES"},
	"write a file":                   {"EACCES", "EACCES", "EACCES"},
	"truncate a file":                {"EACCES", "EACCES", "EACCES"},
	"make a file":                    {"EACCES", "EACCES", "EACCES"},
	"execute a program":              {"SIGSYS", "EACCES", "EPERM"},
	"fork":                           {"SIGSYS", "done", "EPERM"},
	"fork into a user namespace":     {"SIGSYS", "SIGSYS", "EPERM"},
	"make a user namespace":          {"SIGSYS", "SIGSYS", "SIGSYS"},
	"connect to a TCP port":          {"EACCES", "EPERM", "EPERM"},
	"listen on a TCP port":           {"EACCES", "EPERM", "EPERM"},
	"send by UDP":                    {"EPERM", "EPERM", "EPERM"},
	"use Multipath TCP":              {"EPERM", "EPERM", "EPERM"},
	"connect to a Unix socket":       {"EPERM", "EPERM", "EPERM"},
	"signal a process":               {"SIGSYS", "EPERM", "EPERM"},
	"open the memory of a process":   {"EACCES", "EACCES", "EACCES"},
	"load a filter":                  {"SIGSYS", "EINVAL", "SIGSYS"}, // the launcher's key workers confine themselves
	"trace a process":                {"SIGSYS", "SIGSYS", "SIGSYS"},
	"read the memory of a process":   {"SIGSYS", "SIGSYS", "SIGSYS"},
	"take a descriptor of a process": {"SIGSYS", "SIGSYS", "SIGSYS"},
	"mount":                          {"SIGSYS", "SIGSYS", "SIGSYS"},
	"load a module":                  {"SIGSYS", "SIGSYS", "SIGSYS"},
	"load a program into the kernel": {"SIGSYS", "SIGSYS", "SIGSYS"},
	"change the root":                {"SIGSYS", "SIGSYS", "SIGSYS"},
	"use keys of the kernel":         {"SIGSYS", "SIGSYS", "SIGSYS"},
	"handle page faults":             {"SIGSYS", "SIGSYS", "SIGSYS"},
	"use io_uring":                   {"SIGSYS", "SIGSYS", "SIGSYS"},
	"count events":                   {"SIGSYS", "SIGSYS", "SIGSYS"},
	"open by handle":                 {"SIGSYS", "SIGSYS", "SIGSYS"},
	"a call of the future":           {"SIGSYS", "SIGSYS", "SIGSYS"},
}

// TestForbiddenFromInside tries each forbidden act from inside each sandbox. The kernel refuses
// each by the right mechanism. Without a sandbox the acts on files, sockets and processes succeed.
func TestForbiddenFromInside(t *testing.T) {
	s, _ := newSeparated(t)
	folder, socket, port, pid := foreignThings(t)
	cmd := exec.Command(filepath.Join(bin, "countersignd"), "prove-sandbox", "--config", s.path("countersign.toml"))
	cmd.Env = append(os.Environ(), "PROVE_FOLDER="+folder, "PROVE_SOCKET="+socket,
		fmt.Sprint("PROVE_PORT=", port), fmt.Sprint("PROVE_PID=", pid))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	seen := 0
	for line := range strings.Lines(string(out)) {
		f := strings.Split(strings.TrimSpace(line), "\t")
		if len(f) != 3 {
			t.Fatalf("%q", line)
		}
		want, known := forbidden[f[1]]
		if !known {
			t.Errorf("the test expects nothing of %q", f[1])
		}
		if f[0] == "free" {
			mechanism := want[0] == "EACCES" || want[2] == "EPERM"
			if mechanism && f[2] != "done" && !strings.Contains(f[1], "namespace") {
				t.Errorf("%s succeeds nowhere: %s", f[1], f[2])
			}
			continue
		}
		seen++
		if i := slices.Index([]string{"daemon", "launcher", "main"}, f[0]); i < 0 || f[2] != want[i] {
			t.Errorf("%s, %s: %s, want %s", f[0], f[1], f[2], want)
		}
	}
	if want := 3 * len(forbidden); seen != want {
		t.Errorf("%d acts were tried, want %d", seen, want)
	}
}

// brokenInto is a daemon that makes system calls for the test.
type brokenInto struct {
	t    *testing.T
	s    *system
	p    *process
	conn net.Conn
	read *bufio.Reader
}

// breakIn starts a daemon of the build with the op that makes system calls.
func (s *system) breakIn(t *testing.T, program string) *brokenInto {
	t.Helper()
	dir := t.TempDir() // where the daemon's user may make the socket
	s.ok(os.Chmod(dir, 0o777))
	at := filepath.Join(dir, "breakin")
	b := &brokenInto{t: t, s: s, p: s.start(s.serving(program, "BREAKIN_SOCKET="+at))}
	var err error
	if b.conn, err = net.Dial("unix", at); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.conn.Close() })
	b.conn.SetDeadline(time.Now().Add(time.Minute))
	b.read = bufio.NewReader(b.conn)
	return b
}

// do has the daemon do something, and returns what came of it: the name of an error, or the signal
// that ended the daemon.
func (b *brokenInto) do(fields ...any) string {
	b.t.Helper()
	text := make([]string, len(fields))
	for i, f := range fields {
		text[i] = fmt.Sprint(f)
	}
	fmt.Fprintln(b.conn, strings.Join(text, "\t"))
	line, err := b.read.ReadString('\n')
	if err == nil {
		return strings.TrimSpace(line)
	}
	<-b.p.ended
	b.p.ended <- nil
	if status := b.p.cmd.ProcessState.Sys().(syscall.WaitStatus); status.Signal() == syscall.SIGSYS {
		return "SIGSYS"
	}
	return b.p.cmd.ProcessState.String()
}

// TestBrokenIntoDaemon runs system calls in a serving daemon, as an attacker's code would. The
// attacker reads neither the PIN nor the tokens, starts no program, and reaches no other port, no
// other socket and no other process. The launcher starts what it knows only.
func TestBrokenIntoDaemon(t *testing.T) {
	program := filepath.Join(t.TempDir(), "countersignd")
	build := exec.Command("go", "build", "-tags", "breakin,"+tags, "-o", program, "../cmd/countersignd")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Run("one user", func(t *testing.T) {
		s, keys := newSeparated(t)
		breakInto(t, s, program, keys)
	})
	t.Run("two users", func(t *testing.T) {
		s, _ := newTwoUsers(t)
		breakInto(t, s, program, s.path("keys"))
		b := s.breakIn(t, program)
		if got := b.do("make a file", s.path("keys/journal"), "none", 1, 1); got != "EACCES" {
			t.Errorf("a file in the folder of the journal: %s, want EACCES", got)
		}
	})
}

// breakInto runs system calls in a serving daemon of a system whose PIN and tokens are in the
// folder keys.
func breakInto(t *testing.T, s *system, program, keys string) {
	folder, socket, port, _ := foreignThings(t)
	tokens := filepath.Join(keys, "tokens")
	if err := os.Link(filepath.Join(keys, "pin"), filepath.Join(keys, "file")); err != nil { // the name in the acts
		t.Fatal(err)
	}
	b := s.breakIn(t, program)
	launcher := b.p.launcher()
	worker := children(t, launcher)[0]
	for _, c := range []struct {
		what string
		of   []any
		want string
	}{
		{"the PIN", []any{"read a file", keys, socket, port, worker}, "EACCES"},
		{"the folder of the tokens", []any{"list a folder", tokens, socket, port, worker}, "EACCES"},
		{"a file of another", []any{"read a file", folder, socket, port, worker}, "EACCES"},
		{"a new file", []any{"make a file", keys, socket, port, worker}, "EACCES"},
		{"another port", []any{"connect to a TCP port", folder, socket, port, worker}, "EACCES"},
		{"a port to listen on", []any{"listen on a TCP port", folder, socket, port, worker}, "EACCES"},
		{"a datagram", []any{"send by UDP", folder, socket, port, worker}, "EPERM"},
		{"a socket of another program", []any{"connect to a Unix socket", folder, socket, port, worker}, "EPERM"},
		{"a key worker's memory", []any{"open the memory of a process", folder, socket, port, worker}, "EACCES"},
		{"the launcher's memory", []any{"open the memory of a process", folder, socket, port, launcher}, "EACCES"},
		{"a token of no configuration", []any{"start", "other", "", ""}, "no token"},
		{"a seed that is the PIN", []any{"start", "main", filepath.Join(keys, "pin"), ""}, "import_folder"},
		{"a new token", []any{"start", "main", "", "make"}, "launcher: "},
		{"a file as a worker's socket", []any{"start", "main", "", ""}, "socket is none"},
	} {
		if got := b.do(c.of...); !strings.Contains(got, c.want) {
			t.Errorf("%s: %s, want %s", c.what, got, c.want)
		}
	}
	for i, act := range []string{
		"execute a program", "fork", "trace a process", "read the memory of a process", "signal a process",
		"load a filter",
	} {
		if i > 0 {
			b = s.breakIn(t, program)
			worker = children(t, b.p.launcher())[0]
		}
		left := descendants(b.p.cmd.Process.Pid)
		if got := b.do(act, folder, socket, port, worker); got != "SIGSYS" {
			t.Errorf("%s: %s, want SIGSYS", act, got)
		}
		awaitEnds(t, left)
	}
}

// TestFilesReplaced replaces the PIN file, the policy and the configuration by other files of the
// same names, as editors do. The sandboxes let the new files be read.
func TestFilesReplaced(t *testing.T) {
	s, keys := newSeparated(t)
	p := s.serve()
	s.enrol()
	for _, path := range []string{filepath.Join(keys, "pin"), s.path("policy.cedar"), s.path("countersign.toml")} {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path+".new", b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	s.edit("policy.cedar", "permit (", "permit (\n")
	s.must("admin", "policy", "reload")
	p.cmd.Process.Signal(syscall.SIGHUP)
	c := s.dial() // a handshake needs a key worker, too
	for _, pid := range p.workers() {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	eventually(t, "a new key worker signs", func() bool {
		_, err := c.Sign(t.Context(), "payments", message("replaced"))
		return err == nil
	})
	p.stop()
	log := p.stderr.String()
	if !strings.Contains(log, "reload: the configuration was read") || strings.Contains(log, "reload: nothing") {
		t.Errorf("the log:\n%s", tail(log, 2000))
	}
}

// TestLauncherEnds kills the launcher. The daemon says so and ends, for the service manager to
// start it again, and no key worker is left.
func TestLauncherEnds(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	workers := p.workers()
	syscall.Kill(p.launcher(), syscall.SIGKILL)
	select {
	case err := <-p.ended:
		p.ended <- err
		if p.cmd.ProcessState.ExitCode() != 1 {
			t.Errorf("the daemon's end: %v", err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the daemon goes on without a launcher")
	}
	for _, want := range []string{"without the launcher, no key worker can be started", "signal: killed"} {
		if !strings.Contains(p.stderr.String(), want) {
			t.Errorf("the log has no %q:\n%s", want, tail(p.stderr.String(), 2000))
		}
	}
	for _, pid := range workers {
		eventually(t, "the key workers have ended", func() bool { return syscall.Kill(pid, 0) != nil })
	}
	p = s.serve()
	if _, err := s.dial().Sign(t.Context(), "payments", message("againrun")); err != nil {
		t.Error(err)
	}
	p.stop()
}

// TestDaemonEnds kills the daemon, while its launcher runs and while the launcher is stopped. No
// process of the daemon goes on.
func TestDaemonEnds(t *testing.T) {
	s := newSystem(t)
	for _, stopped := range []bool{false, true} {
		p := s.serve()
		launcher := p.launcher()
		eventually(t, "two key workers", func() bool { return len(p.workers()) == 2 })
		if stopped {
			syscall.Kill(launcher, syscall.SIGSTOP)
		}
		p.kill()
	}
}
