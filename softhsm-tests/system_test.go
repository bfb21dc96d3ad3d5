// Package softhsmtests runs the built daemon and the built CLI on a SoftHSM token or a software
// TPM, as a user would. system in this file is an appliance in a folder of its own; begin to read
// there.
package softhsmtests

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"countersign/admin/api"
	"countersign/client"
	"countersign/internal/ledger/disktest"
	"countersign/internal/scantest"
)

const softHSM = "/usr/lib/softhsm/libsofthsm2.so"

// userPIN must be in no output of the daemon. Every test searches the outputs for this and all
// other secrets: see checkOutput.
const userPIN = "pin-that-must-not-be-seen"

var bin string // the folder of the built commands

func TestMain(m *testing.M) {
	enterUnit()
	callLauncher()
	disktest.Serve() // returns at once, except in a child process that serves a test's FUSE disk
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "countersign-bin")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		bin = dir
		for name, cgo := range map[string]string{"countersignd": "1", "countersign": "0"} {
			args := []string{"build", "-tags=" + tags, "-o", filepath.Join(dir, name)}
			if cgo == "1" && os.Getenv("RACE") == "1" {
				args = append(args, "-race")
			}
			build := exec.Command("go", append(args, "../cmd/"+name)...)
			build.Env = append(os.Environ(), "CGO_ENABLED="+cgo, "GOEXPERIMENT=runtimesecret")
			if out, err := build.CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "build %s: %v\n%s", name, err, out)
				return 1
			}
		}
		if err := traceCalls(filepath.Join(dir, "countersignd"), os.Getenv("CALLS")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return scantest.Run(m)
	}())
}

// tags are those of scripts/build.sh for the daemon.
const tags = "netgo,osusergo"

// traceCalls puts strace before a program, if there is a folder for what strace writes. See
// scripts/calls.sh.
func traceCalls(program, to string) error {
	if to == "" {
		return nil
	}
	if err := os.Rename(program, program+".traced"); err != nil {
		return err
	}
	// The calls of KNOWN, each with a comma behind it, are left alone.
	const line = "#!/bin/sh\nexec strace -D -f --seccomp-bpf -qq -e signal=none -e 'trace=!%s' -o %s/$$ " +
		"%s.traced \"$@\"\n"
	return os.WriteFile(program, fmt.Appendf(nil, line, os.Getenv("KNOWN")+"restart_syscall", to, program), 0o755)
}

// system is a configured appliance in a folder of its own.
type system struct {
	t            testing.TB
	dir          string
	listen       string    // host:port of the listener for peers
	root         *operator // the first administrator
	rootEnrolled bool
	tapped       sync.Once
	before       []string    // the command that starts the daemon: see newTwoUsers
	api          *api.Client // signs in as root
}

// process is a running daemon.
type process struct {
	t      testing.TB
	cmd    *exec.Cmd
	stderr *scantest.Buffer
	notify *net.UnixConn // systemd's notification socket
	ended  chan error    // a reader puts the error back for the next reader
}

// newSystem writes a configuration with a SoftHSM token and runs countersignd init.
func newSystem(t testing.TB) *system {
	t.Helper()
	s := newSoftHSM(t, softHSM)
	if out, code := s.daemon("init", "--new-token", "--so-pin-file", s.path("so-pin")); code != 0 {
		t.Fatalf("init: %d\n%s", code, out)
	}
	return s
}

// newSoftHSM writes the configurations of a daemon and of SoftHSM behind a module. There is no
// token yet.
func newSoftHSM(t testing.TB, module string) *system {
	t.Helper()
	needSoftHSM(t)
	s := newFolder(t)
	if err := os.Mkdir(s.path("tokens"), 0o700); err != nil {
		t.Fatal(err)
	}
	s.write("softhsm2.conf", fmt.Sprintf("directories.tokendir = %s\nlog.level = ERROR\n", s.path("tokens")))
	s.write("pin", userPIN+"\n")
	s.write("so-pin", "so-"+userPIN+"\n")
	s.configure(fmt.Sprintf(`uri = "pkcs11:token=system%%20test"
module = %q
pin_file = "pin"
environment = { SOFTHSM2_CONF = %q }`, module, s.path("softhsm2.conf")))
	return s
}

// missing skips a test for which this machine lacks something, or fails it with REQUIRE_DEVICES=1.
func missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("REQUIRE_DEVICES") == "1" {
		t.Fatal(what)
	}
	t.Skip(what)
}

// needTool returns the path of a program of a package of Debian.
func needTool(t testing.TB, program, pkg string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		missing(t, fmt.Sprintf("%v: apt-get install %s", err, pkg))
	}
	return path
}

func needRoot(t testing.TB, what string) {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, what+": run this test as root")
	}
}

func needSoftHSM(t testing.TB) {
	t.Helper()
	if _, err := os.Stat(softHSM); err != nil {
		missing(t, "SoftHSM: apt-get install softhsm2")
	}
}

// newFolder makes a system without a configuration.
func newFolder(t testing.TB) *system {
	t.Helper()
	l, err := net.Listen("tcp", loopback()+":0") // the kernel chooses a free port
	if err != nil {
		t.Fatal(err)
	}
	s := &system{t: t, dir: t.TempDir(), listen: l.Addr().String()}
	l.Close()
	t.Cleanup(s.searchOutputs)
	s.root = s.newOperator("root")
	s.api = s.client(s.root)
	return s
}

// loopback returns a loopback address for one test. No other process takes a port there meanwhile,
// since the connections of this machine come from 127.0.0.1.
func loopback() string {
	return fmt.Sprintf("127.%d.%d.%d", 2+rand.IntN(250), rand.IntN(256), 1+rand.IntN(254))
}

// configure writes a configuration with one token, whose TOML settings are given.
func (s *system) configure(token string) {
	s.t.Helper()
	s.write("policy.cedar",
		`permit (principal == Peer::"demo", action == Action::"sign", resource == Key::"payments");`)
	s.write("countersign.toml", fmt.Sprintf(`
listen = %q
admin_socket = "admin.sock"
ledger = "ledger.db"
policy = "policy.cedar"
log_level = "debug"

[tokens.main]
%s
`, s.listen, token))
}

func (s *system) path(name string) string { return filepath.Join(s.dir, name) }

func (s *system) write(name, content string) {
	s.t.Helper()
	if err := os.WriteFile(s.path(name), []byte(content), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// edit replaces the first occurrence of old in a file. The test ends if there is none.
func (s *system) edit(name, old, new string) {
	s.t.Helper()
	b, err := os.ReadFile(s.path(name))
	if err != nil || !bytes.Contains(b, []byte(old)) {
		s.t.Fatalf("%s has no %q (%v)", name, old, err)
	}
	s.write(name, strings.Replace(string(b), old, new, 1))
}

// daemon runs countersignd to its end, for at most a minute, and returns its stdout and stderr
// together and its exit status.
func (s *system) daemon(args ...string) (output string, code int) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	defer cancel()
	args = append(args, "--config", s.path("countersign.toml"))
	line := append(slices.Clone(s.before), append([]string{filepath.Join(bin, "countersignd")}, args...)...)
	cmd := exec.CommandContext(ctx, line[0], line[1:]...)
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		s.t.Fatalf("countersignd %v did not end\n%s", args, out)
	}
	if _, exited := err.(*exec.ExitError); err != nil && !exited {
		s.t.Fatal(err)
	}
	s.checkOutput("countersignd", string(out))
	return string(out), cmd.ProcessState.ExitCode()
}

// serve starts the daemon, waits until the daemon is ready, and enrols the first administrator at
// the first call.
func (s *system) serve(environment ...string) *process {
	s.t.Helper()
	p := s.start(s.serving(filepath.Join(bin, "countersignd"), environment...))
	s.enrolRoot()
	return p
}

// serving returns the command that has a program serve.
func (s *system) serving(program string, environment ...string) *exec.Cmd {
	line := append(slices.Clone(s.before), program, "serve", "--config", s.path("countersign.toml"))
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Env = append(os.Environ(), environment...)
	return cmd
}

// start starts a daemon and waits for READY=1 on the notification socket, as systemd does.
func (s *system) start(cmd *exec.Cmd) *process {
	s.t.Helper()
	p := s.begin(cmd)
	if got := p.notified(); got != "READY=1" {
		s.t.Fatalf("notified %q, want READY=1\n%s", got, p.stderr)
	}
	return p
}

// begin starts a daemon with a notification socket.
func (s *system) begin(cmd *exec.Cmd) *process {
	s.t.Helper()
	socket := filepath.Join(s.t.TempDir(), "notify")
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		s.t.Fatal(err)
	}
	p := &process{t: s.t, cmd: cmd, stderr: new(scantest.Buffer), notify: notify, ended: make(chan error, 1)}
	p.cmd.Env = append(p.cmd.Env, "NOTIFY_SOCKET="+socket)
	if p.cmd.Stderr == nil {
		p.cmd.Stderr = p.stderr
	}
	if err := p.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	go func() { p.ended <- p.cmd.Wait() }()
	s.t.Cleanup(func() {
		notify.Close()
		if p.cmd.ProcessState == nil {
			p.kill()
		}
		if strings.Contains(p.stderr.String(), "bad system call") {
			s.t.Error("the filter of system calls has ended a process")
		}
		s.checkOutput("the daemon's log", p.stderr.String())
		s.checkFiles()
		if strings.Contains(p.stderr.String(), "DATA RACE") {
			s.t.Error("the race detector has found a race in the daemon")
			s.t.Log(p.stderr)
		}
		if s.t.Failed() {
			s.t.Logf("the daemon's log:\n%s", tail(p.stderr.String(), 3000))
		}
	})
	return p
}

// notified returns the daemon's next message to the service manager, such as STOPPING=1.
func (p *process) notified() string {
	p.t.Helper()
	buf := make([]byte, 4096)
	p.notify.SetReadDeadline(time.Now().Add(30 * time.Second))
	n, err := p.notify.Read(buf)
	if err != nil {
		p.t.Fatalf("no message to the service manager: %v\n%s", err, p.stderr)
	}
	return string(buf[:n])
}

// stop sends SIGTERM and expects exit status 0 within 30 s.
func (p *process) stop() {
	p.t.Helper()
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-p.ended:
		p.ended <- err
		if err != nil {
			p.t.Fatalf("after SIGTERM: %v\n%s", err, tail(p.stderr.String(), 2000))
		}
	case <-time.After(30 * time.Second):
		p.t.Fatal("the daemon runs 30 s after SIGTERM")
	}
}

// kill sends SIGKILL, and waits for the end of the launcher and of the key workers, too, as a
// service manager does. A kill differs from a power cut in that writes in the page cache survive.
func (p *process) kill() {
	p.t.Helper()
	left := descendants(p.cmd.Process.Pid)
	p.cmd.Process.Kill()
	err := <-p.ended
	p.ended <- err
	awaitEnds(p.t, left)
}

// awaitEnds waits for the ends of a dead daemon's processes. A key worker that ends during a login
// makes the token missing for the next daemon, for a moment. A process that only its parent, the
// system's first process, has not noticed to be dead has ended.
func awaitEnds(t testing.TB, pids []int) {
	t.Helper()
	eventually(t, "the launcher and the key workers have ended", func() bool {
		return !slices.ContainsFunc(pids, func(pid int) bool {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			return err == nil && !bytes.Contains(stat, []byte(") Z "))
		})
	})
}

// tail returns the last n bytes of a text.
func tail(s string, n int) string {
	if len(s) > n {
		return "…" + s[len(s)-n:]
	}
	return s
}

// cli runs countersign as the first administrator.
func (s *system) cli(stdin string, args ...string) (stdout, stderr string, code int) {
	s.t.Helper()
	return s.cliAs(s.root, stdin, args...)
}

// cliAs runs countersign as an operator, with the operator's SSH agent and session.
func (s *system) cliAs(p *operator, stdin string, args ...string) (stdout, stderr string, code int) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 10*time.Minute) // for the log of a long soak
	defer cancel()
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "countersign"), args...)
	cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr = s.dir, strings.NewReader(stdin), &out, &errOut
	cmd.Env = append(os.Environ(), "COUNTERSIGN_SOCKET="+s.path("admin.sock"), "SSH_AUTH_SOCK="+p.socket,
		"COUNTERSIGN_OPERATOR="+p.name, "XDG_RUNTIME_DIR="+s.path(p.name+".run"),
		"XDG_CONFIG_HOME="+s.path(p.name+".config"))
	if err := cmd.Run(); err != nil {
		if _, exited := err.(*exec.ExitError); !exited {
			s.t.Fatal(err)
		}
	}
	s.checkOutput("countersign "+strings.Join(args, " "), out.String()+errOut.String())
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}

// must runs countersign as the first administrator, expects exit status 0 and returns stdout.
func (s *system) must(args ...string) string {
	s.t.Helper()
	out, errOut, code := s.cli("", args...)
	// The state is printed whatever it is.
	shown := code == 4 && strings.Contains(errOut, "countersign: error: not_operational: ")
	if code != 0 && !shown {
		s.t.Fatalf("countersign %s: %d\n%s", strings.Join(args, " "), code, errOut)
	}
	return out
}

// admin returns a client of the admin API that signs in as the first administrator.
func (s *system) admin() *api.Client { return s.api }

// enrol generates a peer identity, enrols the peer under the name demo, and creates the key
// payments.
func (s *system) enrol() {
	s.t.Helper()
	public := strings.TrimSpace(s.must("keygen", s.path("demo.key")))
	s.must("admin", "peer", "add", "demo", public)
	s.must("admin", "key", "create", "payments")
}

// clientConfig returns the SDK's configuration for the peer demo.
func (s *system) clientConfig() client.Config {
	s.t.Helper()
	k, err := s.admin().NoiseKey(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	key, err := client.ParseKey(k.PublicKey)
	if err != nil {
		s.t.Fatal(err)
	}
	id, err := client.ReadIdentity(s.path("demo.key"))
	if err != nil {
		s.t.Fatal(err)
	}
	return client.Config{Address: s.listen, ServerKey: key, Identity: id}
}

// dial connects the peer demo by the SDK.
func (s *system) dial() *client.Client {
	s.t.Helper()
	c, err := client.Dial(s.t.Context(), s.clientConfig())
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	return c
}

// message makes a message-v1 document. Its text must be valid base64url.
func message(text string) client.Document {
	payload, err := json.Marshal(map[string]string{"context": "test", "message": text})
	if err != nil {
		panic(err)
	}
	return client.Document{Type: "message-v1", Payload: payload}
}

// events reads the whole audit log.
func (s *system) events() (all []api.Event) {
	s.t.Helper()
	for {
		some, err := s.admin().Events(s.t.Context(), uint64(len(all)), 1000)
		if err != nil {
			s.t.Fatal(err)
		}
		all = append(all, some...)
		if len(some) < 1000 {
			text, err := json.Marshal(all)
			if err != nil {
				s.t.Fatal(err)
			}
			s.checkOutput("the audit log", string(text))
			return all
		}
	}
}
