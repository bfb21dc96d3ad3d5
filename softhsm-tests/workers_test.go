package softhsmtests

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"countersign/client"
	"countersign/internal/form"
	"countersign/internal/keystore"

	"github.com/miekg/pkcs11"
)

// workers returns the process IDs of the daemon's key workers.
func (p *process) workers() (pids []int) {
	p.t.Helper()
	return children(p.t, p.launcher())
}

// launcher returns the process ID of the daemon's launcher, the daemon's only child.
func (p *process) launcher() int {
	p.t.Helper()
	pids := children(p.t, p.cmd.Process.Pid)
	if len(pids) != 1 {
		p.t.Fatalf("the daemon has the children %d, want the launcher only", pids)
	}
	return pids[0]
}

// children returns the process IDs of a process's children.
func children(t testing.TB, pid int) []int {
	t.Helper()
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err != nil {
		t.Fatalf("process %d: %v", pid, err)
	}
	return childrenOf(pid)
}

// childrenOf reads /proc/PID/task/TID/children. A process that has ended has no children.
func childrenOf(pid int) (pids []int) {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, path := range tasks {
		b, _ := os.ReadFile(path) // the thread may have ended
		for f := range strings.FieldsSeq(string(b)) {
			if n, err := strconv.Atoi(f); err == nil {
				pids = append(pids, n)
			}
		}
	}
	return pids
}

// descendants returns the process IDs of a process's children, and of theirs.
func descendants(pid int) (pids []int) {
	for _, child := range childrenOf(pid) {
		pids = append(append(pids, child), descendants(child)...)
	}
	return pids
}

// eventually polls a condition every 10 ms, for at most 30 s.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("timeout after 30 s: %s", what)
		}
	}
}

// TestDaemonHoldsNoSecrets searches the memory of the running daemon for the PIN and for the
// PKCS#11 module. The module is mapped in the key workers only. A worker leaves no core file, and
// the PIN is neither in its command line nor in its environment.
func TestDaemonHoldsNoSecrets(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	if _, err := s.dial().Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Fatal(err)
	}
	var workers []int
	eventually(t, "two workers", func() bool { workers = p.workers(); return len(workers) == 2 })
	module := func(pid int) bool {
		maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
		if errors.Is(err, os.ErrPermission) {
			missing(t, "the daemon does not let its own user look into it: run this test as root")
		} else if err != nil {
			t.Fatal(err)
		}
		return bytes.Contains(maps, []byte("libsofthsm2"))
	}
	if module(p.cmd.Process.Pid) {
		t.Error("the daemon has the module mapped")
	}
	if memoryContains(t, p.cmd.Process.Pid, userPIN) {
		t.Error("the PIN is in the daemon's memory")
	}
	for _, pid := range workers {
		eventually(t, "a worker has the module mapped", func() bool { return module(pid) })
		limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
		if err != nil || !strings.Contains(string(limits), "Max core file size        0 ") {
			t.Errorf("a worker may leave a core file: %v", err)
		}
		for _, file := range []string{"cmdline", "environ"} {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
			if err != nil || bytes.Contains(b, []byte(userPIN)) {
				t.Errorf("%s of a worker has the PIN: %v", file, err)
			}
		}
	}
	p.stop()
	for _, pid := range workers {
		if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("worker %d has outlived the daemon: %v", pid, err)
		}
	}
}

// memoryContains searches the writable memory of a process for a text. Mappings that are locked and
// left out of core files are skipped: on kernels without memfd_secret(2), key workers use the
// secrets of TPM-sealed keys there.
func memoryContains(t *testing.T, pid int, text string) bool {
	t.Helper()
	maps, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer maps.Close()
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	read := 0
	var from, to int64
	var mode string
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		var begin, end int64
		var permissions string
		if n, _ := fmt.Sscanf(lines.Text(), "%x-%x %s", &begin, &end, &permissions); n == 3 {
			from, to, mode = begin, end, permissions
		}
		flags, last := strings.CutPrefix(lines.Text(), "VmFlags:") // the last line of each mapping
		protected := strings.Contains(flags, " lo ") && strings.Contains(flags, " dd ")
		if !last || !strings.HasPrefix(mode, "rw") || protected {
			continue
		}
		const step = 1 << 20
		for at := from; at < to; at += step {
			buf := make([]byte, min(step+int64(len(text)), to-at)) // steps overlap by the length of the text
			n, _ := mem.ReadAt(buf, at)
			read += n
			if bytes.Contains(buf[:n], []byte(text)) {
				return true
			}
		}
	}
	if read < 1<<20 {
		t.Fatalf("only %d bytes of the memory could be read", read)
	}
	return false
}

// TestWorkersKilled kills and stops key workers while the daemon serves. No request fails: with one
// worker lost, the other one signs; with both lost, a request waits for a new worker.
func TestWorkersKilled(t *testing.T) {
	s := newSystem(t)
	s.edit("countersign.toml", "[tokens.main]", "[tokens.main]\ndeadline = \"500ms\"")
	p := s.serve()
	s.enrol()
	c := s.dial()
	sign := func() {
		t.Helper()
		if _, err := c.Sign(t.Context(), "payments", message("AAAA")); err != nil {
			t.Error(err)
		}
	}
	for range 5 {
		var workers []int
		eventually(t, "two workers", func() bool { workers = p.workers(); return len(workers) == 2 })
		for range 200 { // a worker that has served calls is replaced without a backoff
			sign()
		}
		syscall.Kill(workers[0], syscall.SIGKILL)
		sign()
		syscall.Kill(workers[1], syscall.SIGSTOP) // the worker hangs
		sign()
		eventually(t, "two new workers", func() bool {
			now := p.workers()
			return len(now) == 2 && now[0] != workers[1] && now[1] != workers[1]
		})
		sign()
	}
	p.stop()
}

// TestRefusedPIN puts a wrong PIN into the PIN file and kills the key workers. After the first
// refused login no worker logs in again, until an operator types admin token retry, or the PIN file
// has been another one for a while (TestCorrectedPINFile). A retry by itself could lock the token.
func TestRefusedPIN(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	c := s.dial()
	var workers []int
	eventually(t, "two workers", func() bool { workers = p.workers(); return len(workers) == 2 })
	s.write("pin", "another-pin\n")
	for _, pid := range workers {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	unavailable := func() bool {
		_, err := c.Sign(t.Context(), "payments", message("AAAA"))
		var refusal *client.Error
		return errors.As(err, &refusal) && refusal.Code == "unavailable"
	}
	eventually(t, "unavailable", unavailable)
	eventually(t, "the token is down", func() bool {
		out := s.must("admin", "token", "list")
		return strings.Contains(out, "down") && strings.Contains(out, "refuses the PIN")
	})
	s.write("pin", userPIN+"\n")
	s.must("admin", "token", "retry", "main")
	eventually(t, "a signature", func() bool {
		_, err := c.Sign(t.Context(), "payments", message("AAAA"))
		return err == nil
	})
	_, errOut, code := s.cli("", "admin", "token", "retry", "other")
	if code == 0 || !strings.Contains(errOut, "main") {
		t.Errorf("retry of a token that does not exist: %d %s", code, errOut)
	}
	p.stop()
	if n := strings.Count(p.stderr.String(), "has refused the PIN"); n != 1 {
		t.Errorf("the log says %d times that the token has refused the PIN", n)
	}
}

// TestLostKeysInTheState deletes two of three keys on the token. Requests for them cost no worker
// and no request for the third key, and each loss is one cause in the state and one event.
func TestLostKeysInTheState(t *testing.T) {
	s := newSystem(t)
	s.write("policy.cedar", `permit (principal == Peer::"demo", action == Action::"sign", resource);`)
	p := s.serve()
	s.enrol()
	for _, name := range []string{"invoices", "good"} {
		s.must("admin", "key", "create", name)
	}
	c := s.dial()
	var workers []int
	eventually(t, "two workers", func() bool { workers = p.workers(); return len(workers) == 2 })
	lost := []string{"invoices", "payments"}
	s.useToken(func(m *pkcs11.Ctx, h pkcs11.SessionHandle) {
		for _, name := range lost {
			label := []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, "countersign/"+name+"/1")}
			if err := m.FindObjectsInit(h, label); err != nil {
				t.Fatal(err)
			}
			objects, _, err := m.FindObjects(h, 10)
			if err != nil || len(objects) != 2 {
				t.Fatalf("%s: %d objects, %v", name, len(objects), err)
			}
			m.FindObjectsFinal(h)
			for _, o := range objects {
				if err := m.DestroyObject(h, o); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
	for n := range 10 {
		for _, name := range lost {
			if _, err := c.Sign(t.Context(), name, message(fmt.Sprintf("%s%02d", name[:2], n))); err == nil {
				t.Fatalf("%s signs without its key", name)
			}
		}
		if _, err := c.Sign(t.Context(), "good", message(fmt.Sprintf("go%02d", n))); err != nil {
			t.Errorf("a healthy key: %v", err)
		}
	}
	if now := p.workers(); !slices.Equal(now, workers) {
		t.Errorf("the workers are %v and were %v", now, workers)
	}
	state := s.must("admin", "state")
	for _, name := range lost {
		causes := regexp.MustCompile(`(?m)^cause +key-missing `).FindAllString(state, -1)
		if len(causes) != 2 || !strings.Contains(state, name+"/1") {
			t.Errorf("the state:\n%s", state)
		}
		eventually(t, "the event of "+name, func() bool {
			n := 0
			for _, e := range s.events() {
				if e.Type == "DeviceUnavailable" && e.Resource == name+"/1" {
					n++
				}
			}
			return n == 1
		})
	}
	p.stop()
}

// TestSeveralTokens removes one of two tokens, of a running daemon and before a start. Only the
// keys on the missing token are unavailable, and only until the token is back.
func TestSeveralTokens(t *testing.T) {
	s := newSystem(t)
	if err := os.Mkdir(s.path("tokens2"), 0o700); err != nil {
		t.Fatal(err)
	}
	s.write("softhsm2b.conf", fmt.Sprintf("directories.tokendir = %s\nlog.level = ERROR\n", s.path("tokens2")))
	s.edit("countersign.toml", "[tokens.main]", fmt.Sprintf(`noise_token = "main"

[tokens.other]
uri = "pkcs11:token=second"
module = %q
pin_file = "pin"
environment = { SOFTHSM2_CONF = %q }

[tokens.main]`, softHSM, s.path("softhsm2b.conf")))
	s.write("policy.cedar", `permit (principal == Peer::"demo", action == Action::"sign", resource);`)
	if out, code := s.daemon("init", "--new-token", "--so-pin-file", s.path("so-pin")); code != 0 {
		t.Fatalf("init: %d\n%s", code, out)
	}
	p := s.serve()
	public := strings.TrimSpace(s.must("keygen", s.path("demo.key")))
	s.must("admin", "peer", "add", "demo", public)
	_, errOut, code := s.cli("", "admin", "key", "create", "payments")
	if code == 0 || !strings.Contains(errOut, "main, other") {
		t.Errorf("a key without a named token: %d %s", code, errOut)
	}
	s.must("admin", "key", "create", "payments", "--token", "main")
	s.must("admin", "key", "create", "refunds", "--token", "other")
	signs := func(c *client.Client, key string) bool {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		_, err := c.Sign(ctx, key, message("AAAA"))
		var refusal *client.Error
		if err != nil && (!errors.As(err, &refusal) || refusal.Code != "unavailable") {
			t.Fatalf("%s: %v", key, err)
		}
		return err == nil
	}
	c := s.dial()
	if !signs(c, "payments") || !signs(c, "refunds") {
		t.Error("a key does not sign")
	}
	remove := func() { os.Rename(s.path("tokens2"), s.path("tokens2.away")) }
	putBack := func() { os.Rename(s.path("tokens2.away"), s.path("tokens2")) }
	remove()
	eventually(t, "refunds is unavailable", func() bool { return !signs(c, "refunds") })
	if !signs(c, "payments") {
		t.Error("the other token's key is unavailable too")
	}
	putBack()
	eventually(t, "refunds signs again", func() bool { return signs(c, "refunds") })
	p.stop()

	remove()
	p = s.serve()
	c = s.dial()
	if !signs(c, "payments") || signs(c, "refunds") {
		t.Error("started without the second token: payments must sign and refunds must not")
	}
	putBack()
	eventually(t, "refunds signs after a start without its token", func() bool { return signs(c, "refunds") })
	p.stop()

	// Whatever is wrong with the second token: a start costs its keys only.
	s.write("wrong-pin", "another-pin")
	second := "uri = \"pkcs11:token=second\"\nmodule = " + strconv.Quote(softHSM) + "\npin_file = \"pin\""
	for _, wrong := range []string{
		strings.Replace(second, `"pin"`, `"wrong-pin"`, 1), strings.Replace(second, softHSM, "/nowhere.so", 1),
		strings.Replace(second, "second", "third", 1), strings.Replace(second, `"pin"`, `"no-file"`, 1),
	} {
		s.edit("countersign.toml", second, wrong)
		p = s.serve()
		c = s.dial()
		if !signs(c, "payments") || signs(c, "refunds") {
			t.Errorf("%s: payments must sign and refunds must not", wrong)
		}
		code := "token-unavailable other"
		if strings.Contains(wrong, "wrong-pin") {
			code = "token-pin-refused other"
		}
		if out := s.must("admin", "state"); !strings.Contains(out, code) {
			t.Errorf("%s: %s", wrong, out)
		}
		p.stop()
		s.edit("countersign.toml", wrong, second)
	}
}

// TestImport imports a key from a seed file. The key is marked as imported for ever, and the seed
// is in no output, nor in the memory of the daemon or of a key worker.
func TestImport(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	seed := bytes.Repeat([]byte{7}, 32)
	text := base64.RawURLEncoding.EncodeToString(seed)
	s.write("seed", "keypair-seed:"+text+"\n")
	out := s.must("admin", "key", "import", "old", s.path("seed"))
	// The public key of this seed by OpenSSL 3.0: openssl pkey -pubout -outform DER.
	const public = "ea4a6c63e29c520abef5507b132ec5f9954776aebebe7b92421eea691446d22c"
	if !strings.Contains(out, public) || !strings.Contains(out, "imported") {
		t.Errorf("import: %s", out)
	}
	for _, args := range [][]string{
		{"admin", "key", "list"}, {"admin", "key", "show", "old"}, {"admin", "audit", "list"},
	} {
		if out := s.must(args...); strings.Contains(out, text) || !strings.Contains(strings.ToLower(out), "import") {
			t.Errorf("%v: %s", args, out)
		}
	}
	if memoryContains(t, p.cmd.Process.Pid, string(seed)) || memoryContains(t, p.cmd.Process.Pid, text) {
		t.Error("the seed is in the daemon's memory")
	}
	for _, pid := range p.workers() {
		if memoryContains(t, pid, string(seed)) {
			t.Error("the seed is in a key worker's memory")
		}
	}
	p.stop()
	p = s.serve()
	if out := s.must("admin", "key", "show", "old"); !strings.Contains(out, "imported: made elsewhere") {
		t.Errorf("after a restart: %s", out)
	}
	// One private key has one name. The token's objects of the second name are gone again, so
	// another key can have the name.
	_, errOut, code := s.cli("", "admin", "key", "import", "older", s.path("seed"))
	if code == 0 || !strings.Contains(errOut, "old/1") {
		t.Errorf("a seed that is there already: %d %s", code, errOut)
	}
	s.write("zeros", strings.Repeat("00", 32))
	_, errOut, code = s.cli("", "admin", "key", "import", "older", s.path("zeros"))
	if code == 0 || !strings.Contains(errOut, "all zero") {
		t.Errorf("a seed of zeros: %d %s", code, errOut)
	}
	os.Chmod(s.path("seed"), 0o644)
	_, errOut, code = s.cli("", "admin", "key", "import", "older", s.path("seed"))
	if code == 0 || !strings.Contains(errOut, "chmod 600") {
		t.Errorf("a seed that all can read: %d %s", code, errOut)
	}
	s.write("seed", "keypair-seed:"+text[:30])
	_, errOut, code = s.cli("", "admin", "key", "import", "older", s.path("seed"))
	if code == 0 || strings.Contains(errOut, text[:30]) {
		t.Errorf("half a seed: %d %s", code, errOut)
	}
	s.must("admin", "key", "create", "older")
	p.stop()
}

// TestNothingLeaks counts goroutines, file descriptors and PKCS#11 sessions of a pool and its key
// workers. After 100,000 operations there are no more of them than after 1,000. SoftHSM itself
// leaks memory in every operation, so a worker above the memory limit (8 MiB here) is replaced, and
// no operation fails meanwhile.
func TestNothingLeaks(t *testing.T) {
	memory, many := 8<<20, 100_000
	if os.Getenv("RACE") == "1" { // the race detector multiplies memory and time
		memory, many = 1<<30, 10_000
	}
	s := newSystem(t)
	t.Setenv("SOFTHSM2_CONF", s.path("softhsm2.conf"))
	pool := s.pool(t, s.hsmConfig(softHSM, 4), 2, memory)
	ctx := t.Context()
	key, err := pool.Generate(ctx, keystore.Ref{Name: "leak", Version: 1}, keystore.Ed25519, keystore.Tag{1})
	if err != nil {
		t.Fatal(err)
	}
	exchange, err := pool.Generate(ctx, keystore.Ref{Name: "leak-x", Version: 1}, keystore.X25519, keystore.Tag{2})
	if err != nil {
		t.Fatal(err)
	}
	operations := func(n int) {
		t.Helper()
		failed := make(chan error, 16)
		for range 16 {
			go func() {
				for i := range n / 16 {
					var err error
					if i%10 == 0 {
						_, err = exchange.Exchange(ctx, [32]byte{9})
					} else {
						_, err = key.Sign(ctx, form.NewCanary(), nil)
					}
					if err != nil {
						failed <- err
						return
					}
				}
				failed <- nil
			}()
		}
		for range 16 {
			if err := <-failed; err != nil {
				t.Fatal(err)
			}
		}
	}
	measure := func() (counts map[string]int, largest int) {
		t.Helper()
		counts = map[string]int{"goroutines": runtime.NumGoroutine(), "workers": len(pool.Status().Workers)}
		for i, w := range pool.Status().Workers {
			fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", w.PID))
			if err != nil {
				t.Fatal(err)
			}
			counts[fmt.Sprintf("fds of worker %d", i)] = len(fds)
			status, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", w.PID))
			if err != nil {
				t.Fatal(err)
			}
			statm := strings.Fields(string(status))
			largest = max(largest, (atoi(t, statm[1])-atoi(t, statm[2]))*os.Getpagesize())
		}
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		counts["fds"] = len(fds)
		found, err := pool.Inspect(ctx, false)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range found {
			if _, text, ok := strings.Cut(f.Text, "sessions, "); ok {
				counts["sessions"] = atoi(t, strings.Fields(text)[0])
			}
		}
		return counts, largest
	}
	operations(1000)
	before, memoryBefore := measure()
	operations(many)
	eventually(t, "the same resources as before", func() bool {
		if slices.ContainsFunc(pool.Status().Workers, func(w keystore.Worker) bool { return w.PID == 0 }) {
			return false // a worker is being replaced
		}
		after, largest := measure()
		same := largest <= memory+memory/8
		for what, n := range after {
			same = same && n <= before[what]
		}
		if !same {
			t.Logf("%v, %d KiB; before %v", after, largest>>10, before)
		}
		return same
	})
	renewed := 0
	for _, w := range pool.Status().Workers {
		renewed += w.Restarts
	}
	if renewed == 0 && memory < 1<<30 {
		t.Error("no worker was renewed: the memory limit is too high for the test to prove anything")
	}
	t.Logf("held: %v, %d KiB at first; %d workers were renewed", before, memoryBefore>>10, renewed)
}

func atoi(t *testing.T, s string) int {
	t.Helper()
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestLockWhileTheDeviceHangs locks the appliance while both key workers hang with admitted
// requests. The command does not wait for the workers, and the requests end with it. When the
// workers go on, no signature is released. After the unlocking the same requests get theirs.
func TestLockWhileTheDeviceHangs(t *testing.T) {
	s := newSystem(t)
	slow := "[limits]\nrequest_timeout = \"3m\"\n\n[tokens.main]\ndeadline = \"1m\""
	s.edit("countersign.toml", "[tokens.main]", slow)
	p := s.serve()
	s.enrol()
	c := s.dial()
	if _, err := c.Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Fatal(err)
	}
	count := func(of string) (n int) {
		for _, e := range s.events() {
			if string(e.Type) == of {
				n++
			}
		}
		return n
	}
	var workers []int
	eventually(t, "two workers", func() bool { workers = p.workers(); return len(workers) == 2 })
	signal := func(what syscall.Signal) {
		for _, pid := range workers {
			syscall.Kill(pid, what)
		}
	}
	signal(syscall.SIGSTOP)
	t.Cleanup(func() { signal(syscall.SIGCONT) })
	const requests = 12 // more than the workers take at once
	var documents [requests]client.Document
	results := make(chan error, requests)
	for i := range documents {
		documents[i] = message("AAAA").Fill(time.Hour)
		go func() { _, err := c.Sign(t.Context(), "payments", documents[i]); results <- err }()
	}
	eventually(t, "all are admitted", func() bool { return count("SignatureAdmitted") == 1+requests })
	s.must("admin", "lock", "--reason", "incident")
	for range requests {
		select {
		case err := <-results:
			if code(err) != "unavailable" {
				t.Errorf("%v, want unavailable", err)
			}
		case <-time.After(30 * time.Second): // half the deadline of a worker
			t.Fatal("the requests wait for the device after the lock")
		}
	}
	signal(syscall.SIGCONT)
	s.must("admin", "unlock")
	for _, d := range documents {
		if again, err := c.Sign(t.Context(), "payments", d); err != nil || !again.Repeated {
			t.Errorf("the same request after the unlocking: %+v, %v", again, err)
		}
	}
	eventually(t, "all signatures are in the log", func() bool { return count("SignatureCreated") == 1+requests })
	if failed := count("SignatureFailed"); failed != requests {
		t.Errorf("%d admissions have failed at the lock, want %d", failed, requests)
	}
	p.stop()
}
