package tpm_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"countersign/tpm"
)

// emulator is a running swtpm.
type emulator struct {
	t      testing.TB
	dir    string
	socket string
	cmd    *exec.Cmd
}

// newEmulator starts swtpm in a folder of its own.
func newEmulator(t testing.TB) *emulator {
	t.Helper()
	if _, err := exec.LookPath("swtpm"); err != nil {
		if os.Getenv("REQUIRE_DEVICES") == "1" {
			t.Fatalf("swtpm is required and missing: %v", err)
		}
		t.Skipf("swtpm is not installed (apt-get install swtpm): %v", err)
	}
	dir, err := os.MkdirTemp("", "swtpm") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	e := &emulator{t: t, dir: dir, socket: filepath.Join(dir, "sock")}
	e.start()
	t.Cleanup(func() {
		e.stop()
		os.RemoveAll(dir)
	})
	return e
}

func (e *emulator) start() {
	e.t.Helper()
	e.cmd = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+e.dir, "--server", "type=unixio,path="+e.socket,
		"--ctrl", "type=unixio,path="+e.socket+".ctrl", "--flags", "not-need-init,startup-clear")
	e.cmd.Stderr = os.Stderr
	if err := e.cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		conn, err := net.Dial("unix", e.socket)
		if err == nil {
			conn.Close()
			return
		}
		if time.Now().After(deadline) {
			e.t.Fatalf("swtpm does not listen: %v", err)
		}
	}
}

// stop ends swtpm as a power cut would.
func (e *emulator) stop() {
	if e.cmd != nil {
		e.cmd.Process.Kill()
		e.cmd.Wait()
		e.cmd = nil
	}
	os.Remove(e.socket)
	os.Remove(e.socket + ".ctrl")
}

func (e *emulator) config(t testing.TB) tpm.Config {
	return tpm.Config{Device: e.socket, State: filepath.Join(t.TempDir(), "keys"), PCRs: []uint{7, 11}, Deadline: 5 * time.Second}
}

// open provisions and opens.
func open(t testing.TB, c tpm.Config) *tpm.Store {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := tpm.Provision(ctx, c); err != nil {
		t.Fatal(err)
	}
	s, err := tpm.Open(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// tap is a socket that passes everything on to another one, and keeps a copy.
type tap struct {
	path string
	mu   sync.Mutex
	seen []byte
}

func newTap(t testing.TB, to string) *tap {
	t.Helper()
	p := &tap{path: to + ".tap"}
	l, err := net.Listen("unix", p.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	pump := func(from, to net.Conn) {
		defer from.Close()
		defer to.Close()
		buf := make([]byte, 4096)
		for {
			n, err := from.Read(buf)
			p.mu.Lock()
			p.seen = append(p.seen, buf[:n]...)
			p.mu.Unlock()
			if _, failed := to.Write(buf[:n]); err != nil || failed != nil {
				return
			}
		}
	}
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("unix", to)
			if err != nil {
				in.Close()
				continue
			}
			go pump(in, out)
			go pump(out, in)
		}
	}()
	return p
}

func (p *tap) bytes() []byte {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]byte(nil), p.seen...)
}

// extend changes a register.
func (e *emulator) extend(t testing.TB, pcr int) {
	t.Helper()
	out, err := exec.Command("tpm2_pcrextend", "--tcti", "swtpm:path="+e.socket, fmt.Sprintf("%d:sha256=%064d", pcr, 1)).CombinedOutput()
	if err != nil {
		t.Fatalf("tpm2_pcrextend: %v\n%s", err, out)
	}
}

func (e *emulator) freeze() { e.cmd.Process.Signal(syscall.SIGSTOP) }
func (e *emulator) thaw()   { e.cmd.Process.Signal(syscall.SIGCONT) }

// handles counts the transient objects and the sessions in the TPM.
func (e *emulator) handles(t testing.TB) (n int) {
	t.Helper()
	for _, kind := range []string{"handles-transient", "handles-loaded-session", "handles-saved-session"} {
		out, err := exec.Command("tpm2_getcap", "--tcti", "swtpm:path="+e.socket, kind).CombinedOutput()
		if err != nil {
			t.Fatalf("tpm2_getcap: %v\n%s", err, out)
		}
		n += strings.Count(string(out), "0x")
	}
	return n
}
