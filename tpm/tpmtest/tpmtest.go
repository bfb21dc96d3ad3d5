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

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// Emulator is a running swtpm.
type Emulator struct {
	t      testing.TB
	dir    string
	Socket string // path of the command socket
	cmd    *exec.Cmd
}

// New starts swtpm in a directory of its own, and stops swtpm at the end of the test.
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

// measured are the registers that a boot has measured something into.
var measured = []tpm2.TPMHandle{7, 11}

// measure extends registers, as firmware and boot loader do.
func (e *Emulator) measure(conn net.Conn) {
	e.t.Helper()
	var digests tpm2.TPMLDigestValues
	banks := map[tpm2.TPMIAlgHash]int{tpm2.TPMAlgSHA256: 32, tpm2.TPMAlgSHA384: 48, tpm2.TPMAlgSHA512: 64}
	for hash, size := range banks {
		digests.Digests = append(digests.Digests, tpm2.TPMTHA{HashAlg: hash, Digest: make([]byte, size)})
	}
	for _, register := range measured {
		if _, err := (tpm2.PCRExtend{
			PCRHandle: tpm2.AuthHandle{Handle: register, Auth: tpm2.PasswordAuth(nil)}, Digests: digests,
		}).Execute(transport.FromReadWriter(conn)); err != nil {
			e.t.Fatal(err)
		}
	}
}

// Start starts swtpm as after switching on a machine, after the measurements of a boot.
func (e *Emulator) Start() {
	e.t.Helper()
	e.cmd = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+e.dir,
		"--server", "type=unixio,path="+e.Socket, "--ctrl", "type=unixio,path="+e.Socket+".ctrl",
		"--flags", "not-need-init,startup-clear")
	e.cmd.Stderr = os.Stderr
	if err := e.cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		conn, err := net.Dial("unix", e.Socket)
		if err == nil {
			e.measure(conn)
			conn.Close()
			return
		}
		if time.Now().After(deadline) {
			e.t.Fatalf("swtpm does not listen: %v", err)
		}
	}
}

// Stop kills swtpm: the effect of a power cut.
func (e *Emulator) Stop() {
	if e.cmd != nil {
		e.cmd.Process.Kill()
		e.cmd.Wait()
		e.cmd = nil
	}
	os.Remove(e.Socket)
	os.Remove(e.Socket + ".ctrl")
}

// Extend extends a register of the SHA-256 bank by a fixed value.
func (e *Emulator) Extend(t testing.TB, pcr int) {
	t.Helper()
	e.tool(t, "tpm2_pcrextend", fmt.Sprintf("%d:sha256=%064d", pcr, 1))
}

// Freeze suspends the process: commands get no response.
func (e *Emulator) Freeze() { e.cmd.Process.Signal(syscall.SIGSTOP) }

// Thaw resumes the process.
func (e *Emulator) Thaw() { e.cmd.Process.Signal(syscall.SIGCONT) }

// Handles returns the number of transient objects and sessions in the TPM.
func (e *Emulator) Handles(t testing.TB) (n int) {
	t.Helper()
	for _, kind := range []string{"handles-transient", "handles-loaded-session", "handles-saved-session"} {
		n += strings.Count(string(e.tool(t, "tpm2_getcap", kind)), "0x")
	}
	return n
}

// Lasting returns the handles of the persistent objects and of the NV indices, as another program
// lists them.
func (e *Emulator) Lasting(t testing.TB) (handles []string) {
	t.Helper()
	for _, kind := range []string{"handles-persistent", "handles-nv-index"} {
		for line := range strings.Lines(string(e.tool(t, "tpm2_getcap", kind))) {
			if _, handle, is := strings.Cut(strings.TrimSpace(line), "- "); is {
				handles = append(handles, handle)
			}
		}
	}
	return handles
}

// counter is the NV index of package tpm's monotonic counter.
const counter = "0x01800c51"

// Counter returns the value of the appliance's monotonic counter, read by another program.
func (e *Emulator) Counter(t testing.TB) uint64 {
	t.Helper()
	out := e.tool(t, "tpm2_nvread", counter)
	if len(out) != 8 {
		t.Fatalf("tpm2_nvread: %d bytes", len(out))
	}
	return binary.BigEndian.Uint64(out)
}

// StorageRoot makes a storage root key of an algorithm of tpm2-tools at 0x81000001, as Windows and
// tpm2-tss do with RSA keys.
func (e *Emulator) StorageRoot(t testing.TB, algorithm string) {
	t.Helper()
	context := filepath.Join(e.dir, "context")
	e.tool(t, "tpm2_createprimary", "-C", "o", "-G", algorithm, "-c", context, "-Q", "-a",
		"restricted|decrypt|fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda")
	e.tool(t, "tpm2_evictcontrol", "-C", "o", "-c", context, "0x81000001", "-Q")
	e.tool(t, "tpm2_flushcontext", "-t")
}

// OwnerPassword changes the owner's password from the old one; "" stands for none.
func (e *Emulator) OwnerPassword(t testing.TB, old, password string) {
	t.Helper()
	args := []string{"tpm2_changeauth", "-c", "owner"}
	if old != "" {
		args = append(args, "-p", old)
	}
	if password != "" {
		args = append(args, password)
	}
	e.tool(t, args...)
}

// TakeCounter defines the counter's index for another purpose: 32 bytes of data.
func (e *Emulator) TakeCounter(t testing.TB) {
	e.tool(t, "tpm2_nvdefine", counter, "-C", "o", "-s", "32")
}

// EnableOwner enables or disables the owner's hierarchy, as the platform can until the next start.
func (e *Emulator) EnableOwner(t testing.TB, enabled bool) {
	t.Helper()
	state := "clear"
	if enabled {
		state = "set"
	}
	e.tool(t, "tpm2_hierarchycontrol", "-C", "p", "shEnable", state)
}

// Allocate changes the active PCR banks, and starts the machine again.
func (e *Emulator) Allocate(t testing.TB, banks string) {
	t.Helper()
	e.tool(t, "tpm2_pcrallocate", banks, "-Q")
	e.Stop()
	e.Start()
}

// Clear removes all of the owner's objects, as the menu of a firmware does.
func (e *Emulator) Clear(t testing.TB) { e.tool(t, "tpm2_clear", "-c", "p") }

// UndefineCounter removes the monotonic counter with the owner's authorisation.
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

// stateFile is the name of swtpm's file with the persistent state.
const stateFile = "tpm2-00.permall"

// State returns the persistent state, as in a snapshot of a virtual machine.
func (e *Emulator) State(t testing.TB) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(e.dir, stateFile))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// SetState replaces the persistent state, as a restored snapshot does. The emulator must be
// stopped.
func (e *Emulator) SetState(t testing.TB, state []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(e.dir, stateFile), state, 0o600); err != nil {
		t.Fatal(err)
	}
}

// PCR returns the value of a register of the SHA-256 bank.
func (e *Emulator) PCR(t testing.TB, index int) []byte {
	t.Helper()
	path := filepath.Join(e.dir, "pcr")
	e.tool(t, "tpm2_pcrread", fmt.Sprintf("sha256:%d", index), "-o", path)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// LeakObject loads a transient object without flushing the object. The emulator has room for three
// objects.
func (e *Emulator) LeakObject(t testing.TB) {
	t.Helper()
	e.tool(t, "tpm2_createprimary", "-C", "n", "-c", filepath.Join(e.dir, "context"), "-Q")
}

// FailedTries returns the number of wrong authorisations that the TPM has counted.
func (e *Emulator) FailedTries(t testing.TB) (n int) {
	t.Helper()
	out := string(e.tool(t, "tpm2_getcap", "properties-variable"))
	_, value, _ := strings.Cut(out, "TPM2_PT_LOCKOUT_COUNTER: ")
	if _, err := fmt.Sscanf(value, "%v", &n); err != nil {
		t.Fatalf("tpm2_getcap: %v\n%s", err, out)
	}
	return n
}

// Unlock ends a lockout after wrong PINs.
func (e *Emulator) Unlock(t testing.TB) {
	t.Helper()
	e.tool(t, "tpm2_dictionarylockout", "--clear-lockout")
}

// FillNV defines NV indices until no more fit. The last indices are counters, because TPMs reserve
// some memory for counters.
func (e *Emulator) FillNV(t testing.TB) {
	t.Helper()
	for i, kind := range [][]string{
		{"-s", "2048"},
		{"-s", "64"},
		{"-s", "8"},
		{"-s", "8", "-a", "ownerread|ownerwrite|authread|authwrite|nt=counter"},
	} {
		for n := 0; ; n++ {
			index := fmt.Sprintf("0x%x", 0x01900000+i<<12+n)
			args := append([]string{index, "-C", "o", "--tcti", "swtpm:path=" + e.Socket}, kind...)
			if out, err := exec.Command("tpm2_nvdefine", args...).CombinedOutput(); err != nil {
				if !strings.Contains(string(out), "0x14B") { // TPM_RC_NV_SPACE
					t.Fatalf("tpm2_nvdefine: %v\n%s", err, out)
				}
				break
			}
			if n > 500 {
				t.Fatal("the emulator does not fill up")
			}
		}
	}
}

// Tool runs a program of tpm2-tools against the emulator, and returns the output.
func (e *Emulator) Tool(t testing.TB, args ...string) string {
	t.Helper()
	return string(e.tool(t, args...))
}
