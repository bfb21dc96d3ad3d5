package launcher

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"countersign/internal/keystore/worker"

	"golang.org/x/sys/unix"
)

// bound is the timeout of every wait in these tests. Only a hanging test reaches the bound.
const bound = 30 * time.Second

// role is the environment variable with what this binary is: a launcher or a worker.
const role = "LAUNCHER_TEST_ROLE"

func TestMain(m *testing.M) {
	switch os.Getenv(role) {
	case "launcher":
		err := Serve(os.NewFile(3, "socket"), Config{
			Digest: "digest", Enter: func() error { return nil },
			Most: func(string) int { return 2 }, Faults: []string{"a fault"},
			PIN: func(token string) string {
				if token != "known" {
					return ""
				}
				return "state of a PIN file"
			},
			Command: func(s Start) (*exec.Cmd, []byte, error) {
				if s.Token != "known" {
					return nil, nil, errors.New("no such token")
				}
				cmd := exec.Command("/proc/self/exe")
				cmd.Env = append(os.Environ(), role+"=worker")
				return cmd, []byte("config of " + s.Token + s.Seed), nil
			},
		})
		if err != nil {
			os.Exit(3)
		}
	case "refused":
		Refuse(os.NewFile(3, "socket"), errors.New("the configuration is wrong"))
	case "worker": // answers with its configuration, then waits for the socket's end
		config, _ := io.ReadAll(os.NewFile(4, "config"))
		conn, err := net.FileConn(os.NewFile(3, "socket"))
		if err != nil {
			os.Exit(4)
		}
		os.Stderr.WriteString("a line\n")
		conn.Write(config)
		io.Copy(io.Discard, conn)
		os.Exit(7)
	default:
		os.Exit(m.Run())
	}
}

func start(t *testing.T, as string) *Launcher {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), role+"="+as)
	l, err := New(cmd, "digest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

// startWorker starts a worker, and returns its socket and what it has sent.
func startWorker(t *testing.T, l *Launcher, s Start) (p worker.Process, conn net.Conn, says string) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), ""), os.NewFile(uintptr(fds[1]), "")
	defer ours.Close()
	defer theirs.Close()
	if conn, err = net.FileConn(ours); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	stderr, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stderr.Close()
	p, err = l.Start(s, theirs, write)
	write.Close()
	if err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(bound))
	text := make([]byte, 100)
	n, err := conn.Read(text)
	if err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 100)
	stderr.SetDeadline(time.Now().Add(bound))
	if m, err := stderr.Read(line); string(line[:m]) != "a line\n" {
		t.Errorf("stderr: %q, %v", line[:m], err)
	}
	return p, conn, string(text[:n])
}

func alive(pid int) bool { return syscall.Kill(pid, 0) == nil }

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(bound); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("timeout: ", what)
		}
	}
}

// TestWorkers starts workers, ends one by its socket and one by a kill, and sees their exit
// statuses and their memory. The process of an ended worker is reaped.
func TestWorkers(t *testing.T) {
	l := start(t, "launcher")
	first, conn, says := startWorker(t, l, Start{Token: "known", Seed: "/seed"})
	if says != "config of known/seed" {
		t.Errorf("the worker's configuration: %q", says)
	}
	if first.Memory() <= 0 {
		t.Errorf("the memory of a worker: %d", first.Memory())
	}
	second, _, _ := startWorker(t, l, Start{Token: "known"})
	conn.Close()
	if err := first.Wait(); err == nil || err.Error() != "exit status 7" {
		t.Errorf("the end of the first worker: %v", err)
	}
	second.Kill()
	if err := second.Wait(); err == nil || err.Error() != "signal: killed" {
		t.Errorf("the end of the second worker: %v", err)
	}
	second.Kill() // of no process
	if alive(first.PID()) || alive(second.PID()) {
		t.Error("an ended worker is a zombie")
	}
}

// TestRefusals has the launcher refuse what a daemon in other hands could ask for. The launcher
// serves all the same.
func TestRefusals(t *testing.T) {
	l := start(t, "launcher")
	pipe, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer pipe.Close()
	defer write.Close()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	socket, other := os.NewFile(uintptr(fds[0]), ""), os.NewFile(uintptr(fds[1]), "")
	defer socket.Close()
	defer other.Close()
	for _, c := range []struct {
		token          string
		socket, stderr *os.File
		want           string
	}{
		{"unknown", socket, write, "no such token"},
		{"known", write, write, "socket is none"},
		{"known", socket, socket, "stderr is no pipe"},
	} {
		_, err := l.Start(Start{Token: c.token}, c.socket, c.stderr)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: %v", c, err)
		}
	}
	startWorker(t, l, Start{Token: "known"})
	startWorker(t, l, Start{Token: "known"})
	_, err = l.Start(Start{Token: "known"}, socket, write)
	if err == nil || !strings.Contains(err.Error(), "at most 2") {
		t.Errorf("a third worker: %v", err)
	}
}

// TestRubbish sends packets that are none of the protocol. Each ends the launcher and its workers.
func TestRubbish(t *testing.T) {
	for what, packet := range map[string]string{
		"no JSON": "start", "an unknown field": `{"id":9,"kill":true,"command":"sh"}`, "neither": `{"id":9}`,
		"a PIN of no token": `{"id":9,"pin":"other"}`, "a kill and a PIN": `{"id":9,"kill":true,"pin":"known"}`,
		"a start without descriptors": `{"id":9,"start":{"token":"known"}}`,
		"both":                        `{"id":9,"kill":true,"start":{"token":"known"}}`,
		"twice the same field":        `{"id":9,"kill":true,"kill":true}`,
		"a long packet":               strings.Repeat(" ", maxPacket+1),
	} {
		t.Run(what, func(t *testing.T) {
			l := start(t, "launcher")
			p, _, _ := startWorker(t, l, Start{Token: "known"})
			if _, err := l.conn.Write([]byte(packet)); err != nil {
				t.Fatal(err)
			}
			<-l.Ended()
			if err := p.Wait(); err == nil {
				t.Error("the worker's end is none")
			}
			if !strings.Contains(l.Why().Error(), "exit status 3") {
				t.Errorf("the launcher's end: %v", l.Why())
			}
			eventually(t, "the worker has ended", func() bool { return !alive(p.PID()) })
		})
	}
}

// TestNumberOfBefore starts a worker with a number that is not larger than each before.
func TestNumberOfBefore(t *testing.T) {
	l := start(t, "launcher")
	startWorker(t, l, Start{Token: "known"})
	l.lastID = 0
	_, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer write.Close()
	if _, err := l.Start(Start{Token: "known"}, write, write); !errors.Is(err, ErrEnded) && err == nil {
		t.Errorf("%v", err)
	}
	<-l.Ended()
}

// TestLauncherKilled kills the launcher. Its workers die with it, and each call fails at once.
func TestLauncherKilled(t *testing.T) {
	l := start(t, "launcher")
	p, _, _ := startWorker(t, l, Start{Token: "known"})
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.PID()))
	if err != nil {
		t.Fatal(err)
	}
	parent, err := strconv.Atoi(strings.Fields(string(stat))[3])
	if err != nil {
		t.Fatal(err)
	}
	syscall.Kill(parent, syscall.SIGKILL)
	<-l.Ended()
	if err := p.Wait(); !errors.Is(err, ErrEnded) || !strings.Contains(err.Error(), "signal: killed") {
		t.Errorf("the worker's end: %v", err)
	}
	eventually(t, "the worker has ended", func() bool { return !alive(p.PID()) })
	if _, err := l.Start(Start{Token: "known"}, os.Stdin, os.Stdin); !errors.Is(err, ErrEnded) {
		t.Errorf("a start without a launcher: %v", err)
	}
}

// TestManyStarts starts and kills workers from several callers at once. No descriptor is left, also
// before a collection of the garbage.
func TestManyStarts(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	l := start(t, "launcher")
	statms := func() (n int) {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range fds {
			if to, _ := os.Readlink("/proc/self/fd/" + fd.Name()); strings.HasSuffix(to, "/statm") {
				n++
			}
		}
		return n
	}
	before := statms()
	var all sync.WaitGroup
	for range 2 {
		all.Go(func() {
			for range 10 {
				p, _, _ := startWorker(t, l, Start{Token: "known"})
				p.Kill()
				p.Wait()
			}
		})
	}
	all.Wait()
	if n := statms() - before; n > 0 {
		t.Errorf("%d files of ended workers are open", n)
	}
}

// TestRefusedStart has New fail with the launcher's own reason, or with another configuration.
func TestRefusedStart(t *testing.T) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), role+"=refused")
	if _, err := New(cmd, "digest"); err == nil || err.Error() != "the configuration is wrong" {
		t.Errorf("%v", err)
	}
	cmd = exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), role+"=launcher")
	if _, err := New(cmd, "another"); err == nil || !strings.Contains(err.Error(), "has changed during the start") {
		t.Errorf("%v", err)
	}
}

// TestPIN asks for the state of a PIN file, before and after the launcher's end.
func TestPIN(t *testing.T) {
	l := start(t, "launcher")
	for range 3 {
		if got := l.PIN("known"); got != "state of a PIN file" {
			t.Errorf("the state is %q", got)
		}
	}
	startWorker(t, l, Start{Token: "known"})
	if got := l.PIN("other"); got != "" {
		t.Errorf("the state of no file is %q", got)
	}
	<-l.Ended()
	if got := l.PIN("known"); got != "" {
		t.Errorf("the state is %q after the launcher's end", got)
	}
}

// TestDial connects to a socket with a launcher for each connection, as the service manager has it.
func TestDial(t *testing.T) {
	at := filepath.Join(t.TempDir(), "socket")
	if _, err := Dial(at, "digest"); err == nil || !strings.Contains(err.Error(), "countersignd-keys.socket") {
		t.Errorf("without a socket: %v", err)
	}
	socket, err := net.ListenUnix("unixpacket", &net.UnixAddr{Net: "unixpacket", Name: at})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	ends := make(chan error, 2)
	go func() {
		for range cap(ends) {
			conn, err := socket.AcceptUnix()
			if err != nil {
				ends <- err
				return
			}
			file, err := conn.File()
			conn.Close()
			if err != nil {
				ends <- err
				return
			}
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), role+"=launcher")
			cmd.ExtraFiles = []*os.File{file}
			err = cmd.Start()
			file.Close()
			go func() { ends <- errors.Join(err, cmd.Wait()) }()
		}
	}()
	l, err := Dial(at, "digest")
	if err != nil {
		t.Fatal(err)
	}
	if l.User() != os.Geteuid() || len(l.Faults()) != 1 {
		t.Errorf("the user is %d, the faults %q", l.User(), l.Faults())
	}
	p, _, _ := startWorker(t, l, Start{Token: "known"})
	l.Close()
	if err := <-ends; err != nil {
		t.Errorf("the launcher's end: %v", err)
	}
	if p.Wait(); alive(p.PID()) {
		t.Error("the worker has outlived its launcher")
	}
	if _, err := Dial(at, "another"); err == nil || !strings.Contains(err.Error(), "has changed during the start") {
		t.Errorf("%v", err)
	}
	<-ends
}
