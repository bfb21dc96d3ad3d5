package packaging_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// need fails without a program. make test installs the Debian packages of the programs.
func need(t testing.TB, programs ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "root")
	}
	for _, program := range programs {
		if _, err := exec.LookPath(program); err != nil {
			missing(t, err.Error())
		}
	}
}

// missing fails the test under make test, and skips the test otherwise.
func missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("REQUIRE_DEVICES") == "1" {
		t.Fatal("missing: " + what)
	}
	t.Skip("missing: " + what)
}

// output runs a program of this machine.
func output(t testing.TB, env []string, program string, args ...string) string {
	t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", program, args, err, out)
	}
	return string(out)
}

// machine is a fresh Debian with systemd as the first process, in a container on a disk of its own.
type machine struct {
	t      testing.TB
	root   string // its /, from outside
	leader int    // the container's first process, from outside
	alone  bool   // with a network of its own
	nspawn *exec.Cmd
	ended  chan struct{}
	log    bytes.Buffer
}

// rootPackages are the Debian packages of a host before the package comes. openssh-client is
// for the operator of the tests.
const rootPackages = "systemd,systemd-sysv,dbus,procps,softhsm2,openssh-client"

// newMachine makes a machine with a disk of some megabytes, and boots the machine: alone, or in the
// network of this one. PACKAGE_ROOT names a tar
// file to keep the root in for the next run.
func newMachine(t testing.TB, megabytes int, alone bool) *machine {
	t.Helper()
	need(t, "mmdebstrap", "systemd-nspawn", "nsenter")
	tar := os.Getenv("PACKAGE_ROOT")
	if tar == "" {
		tar = filepath.Join(t.TempDir(), "root.tar")
	}
	if _, err := os.Stat(tar); err != nil {
		output(t, nil, "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--include="+rootPackages,
			"bookworm", tar)
	}
	m := &machine{t: t, root: t.TempDir(), alone: alone}
	must(0, unix.Mount("tmpfs", m.root, "tmpfs", 0, fmt.Sprintf("size=%dm,mode=0755", megabytes)))(t)
	t.Cleanup(func() { must(0, unix.Unmount(m.root, unix.MNT_DETACH))(t) })
	output(t, nil, "tar", "-C", m.root, "-xf", tar)
	m.boot()
	t.Cleanup(m.stop)
	return m
}

// boot starts the container, and waits until systemd has started all. A container must be given the
// system calls for the confinement of daemon and key workers.
func (m *machine) boot() {
	m.t.Helper()
	m.nspawn, m.ended = exec.Command("systemd-nspawn", "--quiet", "--directory="+m.root, "--boot", "--register=no",
		"--keep-unit", "--console=pipe", "--resolv-conf=off", "--timezone=off",
		"--machine=countersign-test-"+strconv.Itoa(os.Getpid()),
		"--system-call-filter=landlock_create_ruleset landlock_add_rule landlock_restrict_self memfd_secret"),
		make(chan struct{})
	if m.alone {
		m.nspawn.Args = append(m.nspawn.Args, "--private-network")
	}
	m.log.Reset()
	pipe := must(m.nspawn.StdinPipe())(m.t)
	m.nspawn.Stdout, m.nspawn.Stderr = &m.log, &m.log
	must(0, m.nspawn.Start())(m.t)
	go func() { m.nspawn.Wait(); pipe.Close(); close(m.ended) }()
	m.eventually("the container has a first process", func() bool {
		children, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", m.nspawn.Process.Pid))
		for _, path := range children {
			b, _ := os.ReadFile(path)
			for pid := range strings.FieldsSeq(string(b)) {
				name, _ := os.ReadFile("/proc/" + pid + "/comm")
				if strings.TrimSpace(string(name)) == "systemd" {
					m.leader, _ = strconv.Atoi(pid)
				}
			}
		}
		return m.leader != 0
	})
	m.eventually("systemd has started all", func() bool {
		out, _ := m.run("systemctl", "is-system-running")
		return out == "running\n" || out == "degraded\n"
	})
}

// stop powers the machine off.
func (m *machine) stop() {
	m.t.Helper()
	select {
	case <-m.ended:
		return
	default:
	}
	m.run("systemctl", "poweroff")
	select {
	case <-m.ended:
	case <-time.After(time.Minute):
		m.nspawn.Process.Kill()
		<-m.ended
		m.t.Errorf("the container did not end:\n%s", m.log.String())
	}
	m.leader = 0
}

// eventually polls a condition, for at most a minute.
func (m *machine) eventually(what string, holds func() bool) {
	m.t.Helper()
	for begun := time.Now(); !holds(); time.Sleep(50 * time.Millisecond) {
		select {
		case <-m.ended:
			m.t.Fatalf("the container has ended before %s:\n%s", what, m.log.String())
		default:
		}
		if time.Since(begun) > time.Minute {
			m.t.Fatalf("timeout: %s\n%s", what, m.log.String())
		}
	}
}

// command is a program in the machine, as root.
func (m *machine) command(args ...string) *exec.Cmd {
	cmd := exec.Command("nsenter", append([]string{"--target", strconv.Itoa(m.leader), "--mount", "--uts", "--ipc",
		"--pid", "--net", "--root", "--wd"}, args...)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8", "TERM=dumb"}
	return cmd
}

// run runs a program in the machine. The result has the output, on stdout and stderr, and the
// exit status.
func (m *machine) run(args ...string) (string, int) {
	m.t.Helper()
	return m.runIn(nil, args...)
}

// runIn is run with a standard input.
func (m *machine) runIn(stdin io.Reader, args ...string) (string, int) {
	m.t.Helper()
	cmd := m.command(args...)
	cmd.Stdin = stdin
	out, err := cmd.CombinedOutput()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
		m.t.Fatalf("%v: %v", args, err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// must is run, and fails the test unless the program succeeds.
func (m *machine) must(args ...string) string {
	m.t.Helper()
	out, code := m.run(args...)
	if code != 0 {
		m.t.Fatalf("%v: status %d\n%s", args, code, out)
	}
	return out
}

// refused is run, and fails the test unless the program fails with a text in the output.
func (m *machine) refused(text string, args ...string) {
	m.t.Helper()
	if out, code := m.run(args...); code == 0 || !strings.Contains(out, text) {
		m.t.Errorf("%v: status %d, want an error with %q\n%s", args, code, text, out)
	}
}

// script runs lines of bash as the operator ann, with the key in an SSH agent.
func (m *machine) script(lines string) string {
	m.t.Helper()
	return m.must("bash", "-euc", `export COUNTERSIGN_OPERATOR=ann
eval "$(ssh-agent)" >/dev/null
trap 'kill $SSH_AGENT_PID' EXIT
ssh-add -q /root/ann.key
`+lines)
}

// read reads a file of the machine, and write makes one.
func (m *machine) read(path string) string {
	m.t.Helper()
	return string(must(os.ReadFile(filepath.Join(m.root, path)))(m.t))
}

func (m *machine) write(path, content string) {
	m.t.Helper()
	must(0, os.WriteFile(filepath.Join(m.root, path), []byte(content), 0o644))(m.t)
}

func (m *machine) has(path string) bool {
	_, err := os.Lstat(filepath.Join(m.root, path))
	return err == nil
}

// bring copies a package into the machine.
func (m *machine) bring(deb string) (path string) {
	m.t.Helper()
	path = "/root/" + filepath.Base(deb)
	m.write(path, string(must(os.ReadFile(deb))(m.t)))
	return path
}

// fill fills the disk of the machine. The result frees the disk.
func (m *machine) fill() (empty func()) {
	m.t.Helper()
	path := filepath.Join(m.root, "root/filler")
	f := must(os.Create(path))(m.t)
	defer f.Close()
	block := make([]byte, 64<<10)
	for {
		if _, err := f.Write(block); errors.Is(err, syscall.ENOSPC) {
			return func() { os.Remove(path) }
		} else if err != nil {
			m.t.Fatal(err)
		}
	}
}

// address is a free port of a loopback address of this test process.
func address(t testing.TB) string {
	t.Helper()
	pid := os.Getpid()
	l := must(net.Listen("tcp", fmt.Sprintf("127.77.%d.%d:0", pid>>8&255, pid&255)))(t)
	defer l.Close()
	return l.Addr().String()
}
