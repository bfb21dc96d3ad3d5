// Package tpmtest runs swtpm, a TPM 2.0 in software, for tests.
package tpmtest

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Emulator is a running swtpm.
type Emulator struct {
	t      testing.TB
	dir    string
	Socket string // its path
	cmd    *exec.Cmd
}

// New starts swtpm in a folder of its own.
func New(t testing.TB) *Emulator {
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
	e := &Emulator{t: t, dir: dir, Socket: filepath.Join(dir, "sock")}
	e.Start()
	t.Cleanup(func() {
		e.Stop()
		os.RemoveAll(dir)
	})
	return e
}

// Start starts it, as it is done when a machine is switched on: with its registers at zero.
func (e *Emulator) Start() {
	e.t.Helper()
	e.cmd = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+e.dir, "--server", "type=unixio,path="+e.Socket,
		"--ctrl", "type=unixio,path="+e.Socket+".ctrl", "--flags", "not-need-init,startup-clear")
	e.cmd.Stderr = os.Stderr
	if err := e.cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		conn, err := net.Dial("unix", e.Socket)
		if err == nil {
			conn.Close()
			return
		}
		if time.Now().After(deadline) {
			e.t.Fatalf("swtpm does not listen: %v", err)
		}
	}
}

// Stop ends swtpm as a power cut would.
func (e *Emulator) Stop() {
	if e.cmd != nil {
		e.cmd.Process.Kill()
		e.cmd.Wait()
		e.cmd = nil
	}
	os.Remove(e.Socket)
	os.Remove(e.Socket + ".ctrl")
}

// Extend changes a register.
func (e *Emulator) Extend(t testing.TB, pcr int) {
	t.Helper()
	e.tool(t, "tpm2_pcrextend", fmt.Sprintf("%d:sha256=%064d", pcr, 1))
}

// Freeze and Thaw stop it from answering, and let it.
func (e *Emulator) Freeze() { e.cmd.Process.Signal(syscall.SIGSTOP) }
func (e *Emulator) Thaw()   { e.cmd.Process.Signal(syscall.SIGCONT) }

// Handles counts the transient objects and the sessions in the TPM.
func (e *Emulator) Handles(t testing.TB) (n int) {
	t.Helper()
	for _, kind := range []string{"handles-transient", "handles-loaded-session", "handles-saved-session"} {
		n += strings.Count(string(e.tool(t, "tpm2_getcap", kind)), "0x")
	}
	return n
}

// counter is where package tpm has its counter.
const counter = "0x01800c51"

// Counter returns the value of the appliance's counter, as another program sees it.
func (e *Emulator) Counter(t testing.TB) uint64 {
	t.Helper()
	out := e.tool(t, "tpm2_nvread", counter)
	if len(out) != 8 {
		t.Fatalf("tpm2_nvread: %d bytes", len(out))
	}
	return binary.BigEndian.Uint64(out)
}

// UndefineCounter removes it, as whoever owns the TPM can.
func (e *Emulator) UndefineCounter(t testing.TB) { e.tool(t, "tpm2_nvundefine", counter) }

// tool runs a program of tpm2-tools.
func (e *Emulator) tool(t testing.TB, args ...string) []byte {
	t.Helper()
	cmd := exec.Command(args[0], append(args[1:], "--tcti", "swtpm:path="+e.Socket)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v\n%s", args, err, stderr.String())
	}
	return out
}

// stateFile is where swtpm keeps what outlives it.
const stateFile = "tpm2-00.permall"

// State and SetState are what a snapshot of a machine does with its TPM in software.
func (e *Emulator) State(t testing.TB) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(e.dir, stateFile))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (e *Emulator) SetState(t testing.TB, state []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(e.dir, stateFile), state, 0o600); err != nil {
		t.Fatal(err)
	}
}
