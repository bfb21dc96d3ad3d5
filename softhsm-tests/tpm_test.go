package softhsmtests

import (
	"bytes"
	"crypto/sha512"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"countersign/client"
	"countersign/tpm/tpmtest"
)

// newTPMSystem sets up a system whose only token is a TPM.
func newTPMSystem(t testing.TB, e *tpmtest.Emulator, settings string) *system {
	t.Helper()
	s := newFolder(t)
	s.write("pin", userPIN+"\n")
	s.configure(fmt.Sprintf("tpm = %q\nstate = \"keys\"\npcrs = [7, 11]\n%s", e.Socket, settings))
	if out, code := s.daemon("init"); code != 0 {
		t.Fatalf("init: %d\n%s", code, out)
	}
	return s
}

// TestTPM signs with keys in a TPM, before and after a restart of the daemon.
func TestTPM(t *testing.T) {
	e := tpmtest.New(t)
	s := newTPMSystem(t, e, "")
	out, code := s.daemon("init") // the second init
	if code != 0 || !strings.Contains(out, "nothing was changed") {
		t.Errorf("init again: %d %s", code, out)
	}
	p := s.serve()
	s.enrol()
	first, err := s.dial().Sign(t.Context(), "payments", message("AAAA"))
	if err != nil {
		t.Fatal(err)
	}
	out = s.must("admin", "key", "show", "payments")
	if !strings.Contains(out, "tpm-sealed") || strings.Contains(out, "inside the device") {
		t.Errorf("custody: %s", out)
	}
	s.must("admin", "key", "create", "tls", "--algorithm", "p256")
	if out := s.must("admin", "key", "show", "tls"); !strings.Contains(out, "tpm-resident") {
		t.Errorf("custody: %s", out)
	}
	p.stop()
	if out, code := s.daemon("check"); code != 0 || !strings.Contains(out, "PCR 11 (the unified kernel image") ||
		!strings.Contains(out, "manufacturer") || !strings.Contains(out, "NV counters") {
		t.Errorf("check: %d\n%s", code, out)
	}
	p = s.serve()
	again, err := s.dial().Sign(t.Context(), "payments", message("AAAA"))
	if err != nil || again.PublicKey != first.PublicKey {
		t.Errorf("after a restart: %v, %v", again, err)
	}
	p.stop()
	if n := e.Handles(t); n != 0 {
		t.Errorf("%d handles are left in the TPM", n)
	}
}

// TestTPMSecretsStayInTheVault searches the memory of the daemon and of its key workers, between
// uses of a key, for the key's seed, the scalar and the prefix that Ed25519 derives from the seed,
// and the PIN. /proc shows all memory except the protected mapping of a kernel with
// memfd_secret(2).
func TestTPMSecretsStayInTheVault(t *testing.T) {
	e := tpmtest.New(t)
	// The limit on memory is high: a renewed worker would be a process without the traces of the
	// old.
	s := newTPMSystem(t, e, "pin_file = \"pin\"\nmemory_mib = 4096")
	p := s.serve()
	s.enrol()
	seed := sha512.Sum512([]byte("a seed that is looked for"))
	s.write("seed", string(seed[:32]))
	s.proposeAndApprove("policy activate", `permit (principal == Peer::"demo", action == Action::"sign", resource);`)
	s.must("admin", "key", "import", "old", s.path("seed"))
	p.stop()
	p = s.serve() // both workers unseal the key
	c := s.dial()
	for i := range 200 {
		if _, err := c.Sign(t.Context(), "old", message(fmt.Sprintf("AA%02d", i%100))); err != nil {
			t.Fatal(err)
		}
	}
	s.dial() // a handshake uses the sealed X25519 key
	expanded := sha512.Sum512(seed[:32])
	var workers []int
	eventually(t, "two workers", func() bool { workers = p.workers(); return len(workers) == 2 })
	secrets := map[string][]byte{
		"the seed":           seed[:32],
		"a part of the seed": seed[8:24],
		"the scalar":         expanded[1:31], // clamping changes the bytes 0 and 31
		"the prefix":         expanded[32:64],
		"the PIN":            []byte(userPIN),
	}
	for what, secret := range secrets {
		for i, pid := range append([]int{p.cmd.Process.Pid}, workers...) {
			if memoryContains(t, pid, string(secret)) {
				t.Errorf("%s is in the memory of %s", what, []string{"the daemon", "worker 1", "worker 2"}[i])
			}
		}
	}
	for _, pid := range workers {
		maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", pid))
		locked := regexp.MustCompile(`VmFlags:.* lo .*\bdd\b`)
		if err != nil || !bytes.Contains(maps, []byte("secretmem")) && !locked.Match(maps) {
			t.Errorf("worker %d has no protected mapping: %v", pid, err)
		}
	}
	p.stop()
}

// TestTPMStateChanged changes a PCR to which the keys are sealed. The daemon stays up, answers
// "unavailable" and writes one event that names the PCR. When the PCR has the former value again,
// the daemon serves without a restart.
func TestTPMStateChanged(t *testing.T) {
	e := tpmtest.New(t)
	s := newTPMSystem(t, e, "")
	p := s.serve()
	s.enrol()
	p.stop()
	e.Extend(t, 11)
	p = s.serve()
	config := s.clientConfig()
	if _, err := client.Dial(t.Context(), config); err == nil {
		t.Error("a handshake with a key that is sealed to another state")
	}
	unavailable := func() (n int) {
		for _, ev := range s.events() {
			if ev.Type == "DeviceUnavailable" {
				n++
				if !strings.Contains(ev.Metadata["cause"], "PCR 11") {
					t.Errorf("the event does not explain itself: %v", ev.Metadata)
				}
			}
		}
		return n
	}
	eventually(t, "an event", func() bool { return unavailable() == 1 })
	out := s.must("admin", "token", "list")
	if !strings.Contains(out, "PCR 11, which measures the unified kernel image") {
		t.Errorf("token list: %s", out)
	}
	for range 20 {
		client.Dial(t.Context(), config)
	}
	e.Stop()
	e.Start() // a power cycle resets the PCRs
	config.RetryFor = 20 * time.Second
	c, err := client.Dial(t.Context(), config)
	if err != nil {
		eventually(t, "a connection", func() bool { c, err = client.Dial(t.Context(), config); return err == nil })
	}
	defer c.Close()
	if _, err := c.Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Errorf("with the former PCR: %v", err)
	}
	if n := unavailable(); n != 1 {
		t.Errorf("%d events DeviceUnavailable, want 1", n)
	}
	p.stop()
	if n := strings.Count(p.stderr.String(), "a key worker is given up"); n != 0 {
		t.Errorf("%d key workers were given up, though another worker has the same PCRs", n)
	}
}

// TestTPMUpdate seals keys to a policy that a signing key of the updates authorises. After an
// approved update, with other PCRs, the daemon unseals the keys; after an unapproved one it does
// not. The signing key is made by OpenSSL, and the approval by countersignd approve-state.
func TestTPMUpdate(t *testing.T) {
	e := tpmtest.New(t)
	s := newFolder(t)
	s.configure(fmt.Sprintf("tpm = %q\nstate = \"keys\"\npcrs = [7, 11]\npolicy_key = \"update.pub\"", e.Socket))
	openssl := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("openssl", args...).CombinedOutput(); err != nil {
			t.Fatalf("openssl %v: %v\n%s", args, err, out)
		}
	}
	openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", s.path("update.key"))
	openssl("pkey", "-in", s.path("update.key"), "-pubout", "-out", s.path("update.pub"))
	os.Chmod(s.path("update.key"), 0o600)
	os.Mkdir(s.path("keys"), 0o700)
	approve := func(name string) {
		t.Helper()
		out, exit := s.daemon("approve-state", "--key", s.path("update.key"),
			"--pcr", fmt.Sprintf("7=%x", e.PCR(t, 7)), "--pcr", fmt.Sprintf("11=%x", e.PCR(t, 11)))
		if exit != 0 {
			t.Fatalf("approve-state: %d %s", exit, out)
		}
		s.write("keys/"+name+".approval.json", out)
	}
	if out, exit := s.daemon("init"); exit == 0 || !strings.Contains(out, "approve-state") {
		t.Errorf("init in a state without an approval: %d %s", exit, out)
	}
	approve("first")
	if out, exit := s.daemon("init"); exit != 0 {
		t.Fatalf("init: %d %s", exit, out)
	}
	p := s.serve()
	s.enrol()
	p.stop()
	e.Extend(t, 11)
	approve("second")
	p = s.serve()
	if _, err := s.dial().Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Errorf("after an update that was approved: %v", err)
	}
	p.stop()
	e.Extend(t, 7)
	p = s.serve()
	if _, err := client.Dial(t.Context(), s.clientConfig()); err == nil {
		t.Error("a handshake in a state without an approval")
	}
	p.stop()
	for _, args := range [][]string{
		{},
		{"--key", "update.key"},
		{"--key", s.path("update.pub"), "--pcr", "7=00"},
		{"--key", s.path("update.key"), "--pcr", "7=00"},
		{"--key", s.path("update.key"), "--pcr", "99=00"},
	} {
		if out, exit := s.daemon(append([]string{"approve-state"}, args...)...); exit == 0 {
			t.Errorf("approve-state %v: %s", args, out)
		}
	}
}

// TestTPMSick stops and freezes the TPM of a running daemon. Sealed keys are unsealed in the
// workers already and keep signing. Operations that need the TPM fail within a deadline and succeed
// again when the TPM is back, without a restart.
func TestTPMSick(t *testing.T) {
	e := tpmtest.New(t)
	s := newTPMSystem(t, e, "deadline = \"2s\"")
	p := s.serve()
	s.enrol()
	c := s.dial()
	sign := func() {
		t.Helper()
		if _, err := c.Sign(t.Context(), "payments", message("AAAA")); err != nil {
			t.Error(err)
		}
	}
	for range 20 { // so that both workers unseal the key
		sign()
	}
	said := ""
	create := func(name string) bool {
		out, stderr, code := s.cli("", "admin", "key", "create", name, "--algorithm", "p256")
		said = out + stderr
		return code == 0
	}
	if !create("one") {
		t.Errorf("a key can't be made: %s", said)
	}
	e.Stop()
	if create("two") {
		t.Error("a key was made without the TPM")
	}
	e.Start()
	signs := func() bool { _, err := c.Sign(t.Context(), "payments", message("AAAA")); return err == nil }
	eventually(t, "a key can be made", func() bool { return create("three") })
	eventually(t, "a signature", signs)
	e.Freeze()
	if create("four") {
		t.Error("a key was made by a frozen TPM")
	}
	e.Thaw()
	eventually(t, "a key can be made", func() bool { return create("five") })
	eventually(t, "a signature", signs)
	p.stop()
	p = s.serve() // a killed worker leaves handles, which the next worker flushes at its start
	eventually(t, "a signature after a restart", func() bool {
		_, err := s.dial().Sign(t.Context(), "payments", message("AAAA"))
		return err == nil
	})
	p.stop()
	if n := e.Handles(t); n > 0 {
		t.Errorf("%d handles are left in the TPM", n)
	}
}

// besideHSM sets up a system with a TPM as the token other beside an HSM, and a key in each:
// payments in the HSM, invoices in the TPM.
func besideHSM(t *testing.T, e *tpmtest.Emulator, top, token string) (*system, *process) {
	t.Helper()
	s := newSystem(t)
	s.write("policy.cedar", `permit (principal == Peer::"demo", action == Action::"sign", resource);`)
	s.write("other-pin", userPIN+"\n")
	s.edit("countersign.toml", "[tokens.main]", fmt.Sprintf(`noise_token = "main"
%s

[tokens.other]
tpm = %q
state = "other"
deadline = "500ms"
%s

[tokens.main]`, top, e.Socket, token))
	for _, args := range [][]string{{"init"}, {"init", "--token", "other"}} {
		if out, exit := s.daemon(args...); exit != 0 {
			t.Fatalf("%v: %d\n%s", args, exit, out)
		}
	}
	p := s.serve()
	public := strings.TrimSpace(s.must("keygen", s.path("demo.key")))
	s.must("admin", "peer", "add", "demo", public)
	s.must("admin", "key", "create", "payments", "--token", "main")
	s.must("admin", "key", "create", "invoices", "--token", "other")
	return s, p
}

// signs checks the code of the answer to a request for a signature; "" for a signature.
func (s *system) signs(key, want string) {
	s.t.Helper()
	if _, err := s.dial().Sign(s.t.Context(), key, message("AAAA")); code(err) != want || want == "" && err != nil {
		s.t.Errorf("a signature with %s: %v, want %q", key, err, want)
	}
}

// TestClearedTPM clears a TPM beside an HSM while the daemon serves. Only the TPM's keys are lost,
// also after a restart, and the state names the token. When the right TPM is back, so are its keys.
func TestClearedTPM(t *testing.T) {
	e := tpmtest.New(t)
	s, p := besideHSM(t, e, `rollback_token = "none"`, "")
	s.signs("payments", "")
	s.signs("invoices", "")
	right := e.State(t)
	e.Clear(t)
	tokens, err := s.admin().Tokens(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, token := range tokens {
		for _, w := range token.Workers {
			if token.Name == "other" && w.PID > 0 { // unsealed keys serve on until a worker unseals them again
				syscall.Kill(w.PID, syscall.SIGKILL)
			}
		}
	}
	lost := func() bool {
		out := s.must("admin", "state")
		return strings.Count(out, "\ncause ") == 1 && strings.Contains(out, "token-replaced other: ") &&
			strings.Contains(out, "or to this one before it was cleared")
	}
	eventually(t, "the cause of a cleared TPM, and no other", lost)
	s.signs("payments", "")
	s.signs("invoices", "unavailable")
	p.stop()
	p = s.serve()
	eventually(t, "the cause after a restart, and no other", lost)
	s.signs("payments", "")
	s.signs("invoices", "unavailable")
	if out, exit := s.daemon("check"); exit != 1 || !strings.Contains(out, "token    ok: main") ||
		!strings.Contains(out, "this folder belongs to another TPM") {
		t.Errorf("check: %d\n%s", exit, out)
	}
	e.Stop()
	e.SetState(t, right)
	e.Start()
	eventually(t, "an operational state", func() bool {
		return strings.Contains(s.must("admin", "state"), "operational")
	})
	s.signs("invoices", "")
	p.stop()
}

// TestWrongPINOfTPM has a wrong PIN of a TPM with the counter and a key of its own, beside an HSM.
// The PIN is tried once in five starts, and costs that key only: the counter needs no PIN.
func TestWrongPINOfTPM(t *testing.T) {
	e := tpmtest.New(t)
	s, p := besideHSM(t, e, "", `pin_file = "other-pin"`)
	s.signs("invoices", "")
	p.stop()
	s.write("other-pin", "wrong\n")
	for range 5 {
		p = s.serve()
		s.signs("invoices", "unavailable")
		s.signs("payments", "")
		eventually(t, "the cause of a refused PIN", func() bool {
			return strings.Contains(s.must("admin", "state"), "token-pin-refused other: ")
		})
		p.stop()
	}
	if n := e.FailedTries(t); n != 1 {
		t.Errorf("the TPM has counted %d wrong PINs, want 1", n)
	}
	s.write("other-pin", userPIN+"\n")
	p = s.serve()
	s.signs("invoices", "")
	p.stop()
}

// TestLockoutOfTPM has a TPM in its dictionary attack lockout, with the right PIN again. The state
// names the lockout, the keys of an HSM are served, and all is well by itself after the lockout.
func TestLockoutOfTPM(t *testing.T) {
	e := tpmtest.New(t)
	s, p := besideHSM(t, e, "", `pin_file = "other-pin"`)
	p.stop()
	s.write("other-pin", "wrong\n")
	p = s.serve()
	for e.FailedTries(t) < 3 { // the emulator's limit
		s.must("admin", "token", "retry", "other")
		s.signs("invoices", "unavailable")
	}
	s.write("other-pin", userPIN+"\n")
	eventually(t, "the cause of a lockout", func() bool {
		return strings.Contains(s.must("admin", "state"), "token-locked ")
	})
	s.signs("invoices", "unavailable")
	s.signs("payments", "")
	e.Unlock(t)
	eventually(t, "an operational state", func() bool {
		return strings.Contains(s.must("admin", "state"), "operational")
	})
	s.signs("invoices", "")
	p.stop()
}
