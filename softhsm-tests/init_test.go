package softhsmtests

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"countersign/tpm/tpmtest"

	"github.com/miekg/pkcs11"
)

// uninitialised makes a system with one SoftHSM token in its configuration, and without a token.
func uninitialised(t *testing.T) *system {
	t.Helper()
	s := newSystem(t)
	if err := os.Remove(s.path("ledger.db")); err != nil {
		t.Fatal(err)
	}
	s.emptyFolder("tokens")
	return s
}

// emptyFolder makes a folder anew.
func (s *system) emptyFolder(name string) {
	s.t.Helper()
	if err := os.RemoveAll(s.path(name)); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Mkdir(s.path(name), 0o700); err != nil {
		s.t.Fatal(err)
	}
}

// newTokens runs countersignd init --new-token, and returns stdout and stderr.
func (s *system) newTokens() (stdout, stderr string, code int) {
	s.t.Helper()
	cmd := exec.CommandContext(s.t.Context(), filepath.Join(bin, "countersignd"), "init", "--new-token",
		"--so-pin-file", s.path("so-pin"), "--config", s.path("countersign.toml"))
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); cmd.ProcessState == nil {
		s.t.Fatal(err)
	}
	s.checkOutput("countersignd", out.String()+errOut.String())
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}

// hasLedger reports whether the ledger's file is there.
func (s *system) hasLedger() bool {
	_, err := os.Stat(s.path("ledger.db"))
	return err == nil
}

// TestModulesStayInWorkers has countersignd init make tokens by a module that misbehaves in its
// process. Only a key worker loads the module: its output does not reach stdout, its exit(0) is a
// failure without a ledger, and a variable of one token is not in the environment of another.
func TestModulesStayInWorkers(t *testing.T) {
	loud := compile(t, "loud.c", "-shared", "-fPIC")
	t.Run("output", func(t *testing.T) {
		s := uninitialised(t)
		s.edit("countersign.toml", softHSM, loud)
		out, errOut, code := s.newTokens()
		if code != 0 || !regexp.MustCompile(`^[0-9a-f]{64}\n$`).MatchString(out) ||
			!strings.Contains(errOut, "created the token") {
			t.Errorf("%d, stdout %q, stderr %s", code, out, errOut)
		}
	})
	t.Run("exit", func(t *testing.T) {
		s := uninitialised(t)
		s.edit("countersign.toml", softHSM, loud)
		s.edit("countersign.toml", "environment = {", `environment = { LOUD_EXIT = "1",`)
		if out, errOut, code := s.newTokens(); code != 1 || out != "" || s.hasLedger() ||
			!strings.Contains(errOut, "token main") {
			t.Errorf("%d, stdout %q, a ledger: %v, stderr %s", code, out, s.hasLedger(), errOut)
		}
	})
	t.Run("environment", func(t *testing.T) {
		s := uninitialised(t)
		s.edit("countersign.toml", softHSM, loud)
		s.edit("countersign.toml", "environment = {", `environment = { LOUD_REFUSES = "FIRST",`)
		s.emptyFolder("tokens2")
		s.write("softhsm2b.conf", fmt.Sprintf("directories.tokendir = %s\n", s.path("tokens2")))
		s.edit("countersign.toml", "[tokens.main]", fmt.Sprintf("noise_token = \"main\"\n\n[tokens.first]\n"+
			"uri = \"pkcs11:token=first\"\nmodule = %q\npin_file = \"pin\"\n"+
			"environment = { FIRST = \"1\", SOFTHSM2_CONF = %q }\n\n[tokens.main]", loud, s.path("softhsm2b.conf")))
		if _, errOut, code := s.newTokens(); code != 0 || strings.Count(errOut, "created the token") != 2 {
			t.Errorf("%d %s", code, errOut)
		}
	})
}

// TestInitInspectsFirst runs countersignd init on a token that lacks a mechanism. init says which
// and makes no ledger; check says so too, with its summary, and gives no advice that fails.
func TestInitInspectsFirst(t *testing.T) {
	s := uninitialised(t)
	s.edit("countersign.toml", softHSM, compile(t, "shim.c", "-shared", "-fPIC"))
	s.edit("countersign.toml", "environment = {", `environment = { SHIM_DIALECT = "no-eddsa",`)
	if _, errOut, code := s.newTokens(); code != 1 || s.hasLedger() || !strings.Contains(errOut, "CKM_EDDSA") {
		t.Errorf("init: %d, a ledger: %v, %s", code, s.hasLedger(), errOut)
	}
	for _, args := range [][]string{{"check"}, {"check", "--write"}} {
		out, code := s.daemon(args...)
		if code != 1 || !strings.Contains(out, "CKM_EDDSA") || !strings.Contains(out, "\nsummary  ") ||
			strings.Contains(out, "run: countersignd init") {
			t.Errorf("%v: %d\n%s", args, code, out)
		}
	}
	s.useToken(func(m *pkcs11.Ctx, h pkcs11.SessionHandle) {
		if n := countObjects(t, m, h); n != 0 {
			t.Errorf("%d objects are left on the token", n)
		}
	})
}

// countObjects counts the objects on the token.
func countObjects(t *testing.T, m *pkcs11.Ctx, h pkcs11.SessionHandle) int {
	t.Helper()
	if err := m.FindObjectsInit(h, nil); err != nil {
		t.Fatal(err)
	}
	found, _, err := m.FindObjects(h, 100)
	if err != nil {
		t.Fatal(err)
	}
	m.FindObjectsFinal(h)
	return len(found)
}

// TestCheckProvesWithConsent runs countersignd check without a terminal: with --write each
// algorithm is proven by an object on the token, without it nothing is written, and the summary
// says so. The token has the same objects before and after.
func TestCheckProvesWithConsent(t *testing.T) {
	s := newSystem(t)
	out, code := s.daemon("check")
	if code != 0 || strings.Contains(out, "proof ") || !strings.Contains(out, "no token has proven a key") {
		t.Errorf("check: %d\n%s", code, out)
	}
	out, code = s.daemon("check", "--write")
	if code != 0 || strings.Count(out, "proof ") != 3 || !strings.HasSuffix(out, "summary  ok\n") {
		t.Errorf("check --write: %d\n%s", code, out)
	}
	s.useToken(func(m *pkcs11.Ctx, h pkcs11.SessionHandle) {
		if n := countObjects(t, m, h); n != 4 { // the key pairs noise and audit-log
			t.Errorf("%d objects are on the token, want 4", n)
		}
	})
}

// TestCheckAsksOnATerminal runs countersignd check on a terminal: only the answer y permits keys on
// the tokens.
func TestCheckAsksOnATerminal(t *testing.T) {
	s := newSystem(t)
	for answer, want := range map[string]int{"y\n": 3, "n\n": 0, "\n": 0} {
		line := fmt.Sprintf("%s check --config %s", filepath.Join(bin, "countersignd"), s.path("countersign.toml"))
		cmd := exec.CommandContext(t.Context(), "script", "-qec", line, "/dev/null") // script(1) has a terminal
		cmd.Stdin = strings.NewReader(answer)
		out, err := cmd.CombinedOutput()
		if err != nil || strings.Count(string(out), "proof ") != want || !strings.Contains(string(out), "[y/N]") {
			t.Errorf("%q: %v\n%s", answer, err, out)
		}
	}
}

// TestSigningKeysOnHSMNoiseOnTPM puts the Noise key on a TPM. The audit log's key, the HTTPS keys
// and the signing keys are on a PKCS#11 token that has no X25519.
func TestSigningKeysOnHSMNoiseOnTPM(t *testing.T) {
	s := uninitialised(t)
	s.edit("countersign.toml", softHSM, compile(t, "shim.c", "-shared", "-fPIC"))
	s.edit("countersign.toml", "environment = {", `environment = { SHIM_DIALECT = "no-x25519",`)
	if _, errOut, code := s.newTokens(); code != 1 || s.hasLedger() || !strings.Contains(errOut, "x25519") {
		t.Errorf("all on the HSM: %d, a ledger: %v, %s", code, s.hasLedger(), errOut)
	}
	e := tpmtest.New(t)
	s.edit("countersign.toml", "[tokens.main]", fmt.Sprintf("noise_token = \"tpm\"\nlog_token = \"main\"\n"+
		"admin_https = %q\n\n[tokens.tpm]\ntpm = %q\nstate = \"keys\"\npcrs = [7]\n\n[tokens.main]",
		newFolder(t).listen, e.Socket))
	if _, errOut, code := s.newTokens(); code != 0 {
		t.Fatalf("%d %s", code, errOut)
	}
	if out, code := s.daemon("check", "--write"); code != 0 {
		t.Errorf("check: %d\n%s", code, out)
	}
	p := s.serve()
	s.must("admin", "peer", "add", "demo", strings.TrimSpace(s.must("keygen", s.path("demo.key"))))
	s.must("admin", "key", "create", "payments", "--token", "main")
	if _, err := s.dial().Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Error(err)
	}
	for key, custody := range map[string]string{
		"noise": "tpm-sealed", "audit-log": "hsm-resident", "admin-tls": "hsm-resident", "admin-ca": "hsm-resident",
		"payments": "hsm-resident",
	} {
		if out := s.must("admin", "key", "show", key); !strings.Contains(out, custody) {
			t.Errorf("%s is not %s: %s", key, custody, out)
		}
	}
	p.stop()
}

// TestInitAddsOneToken removes the first token of an appliance, and adds a second one: init --token
// needs neither the first token nor the ledger, which a daemon may use.
func TestInitAddsOneToken(t *testing.T) {
	s := newSystem(t)
	s.emptyFolder("tokens2")
	s.write("softhsm2b.conf", fmt.Sprintf("directories.tokendir = %s\n", s.path("tokens2")))
	s.edit("countersign.toml", "[tokens.main]", fmt.Sprintf("noise_token = \"main\"\n\n[tokens.second]\n"+
		"uri = \"pkcs11:token=second\"\nmodule = %q\npin_file = \"pin\"\nenvironment = { SOFTHSM2_CONF = %q }\n\n"+
		"[tokens.main]", softHSM, s.path("softhsm2b.conf")))
	if out, code := s.daemon("init", "--token", "third"); code != 2 || !strings.Contains(out, "[tokens.third]") {
		t.Errorf("a token that is not configured: %d %s", code, out)
	}
	if err := os.Rename(s.path("tokens"), s.path("away")); err != nil {
		t.Fatal(err)
	}
	add := []string{"init", "--token", "second", "--new-token", "--so-pin-file", s.path("so-pin")}
	if out, code := s.daemon(add...); code != 0 || !strings.Contains(out, "created the token pkcs11:token=second") {
		t.Errorf("%d %s", code, out)
	}
	if out, code := s.daemon(add...); code != 0 || strings.Contains(out, "created") {
		t.Errorf("again: %d %s", code, out)
	}
	if err := os.Rename(s.path("away"), s.path("tokens")); err != nil {
		t.Fatal(err)
	}
	s.write("policy.cedar", `permit (principal == Peer::"demo", action == Action::"sign", resource);`)
	p := s.serve()
	s.must("admin", "peer", "add", "demo", strings.TrimSpace(s.must("keygen", s.path("demo.key"))))
	s.must("admin", "key", "create", "refunds", "--token", "second")
	c := s.dial()
	if _, err := c.Sign(t.Context(), "refunds", message("AAAA")); err != nil {
		t.Error(err)
	}
	p.stop()
}
