package softhsmtests

import (
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestCLI runs the commands of the CLI in the order in which a new user types them.
func TestCLI(t *testing.T) {
	s := newSystem(t)
	p := s.serve()

	public := strings.TrimSpace(s.must("keygen", "demo.key"))
	if !regexp.MustCompile(`^[0-9a-f]{64}$`).MatchString(public) {
		t.Fatalf("keygen printed %q", public)
	}
	noiseKey := strings.TrimSpace(s.must("admin", "noise-key"))
	server := []string{"--server", s.listen, "--server-key", noiseKey, "--identity", "demo.key"}
	with := func(args ...string) []string { return append(args, server...) }
	refused := func(code string, status int, stdin string, args ...string) {
		t.Helper()
		stdout, stderr, got := s.cli(stdin, args...)
		if got != status || !strings.HasPrefix(stderr, "countersign: error: "+code+": ") {
			t.Errorf("%s: status %d, %q; want %d, %s", strings.Join(args, " "), got, stderr, status, code)
		}
		_, _, gotJSON := s.cli(stdin, append(args, "--json")...)
		stdoutJSON, _, _ := s.cli(stdin, append(args, "--json")...)
		var doc struct {
			Error struct{ Code, Message string }
		}
		if err := json.Unmarshal([]byte(stdoutJSON), &doc); err != nil || doc.Error.Code != code || gotJSON != status {
			t.Errorf("%s --json: %v, %q", strings.Join(args, " "), err, stdoutJSON)
		}
		if stdout != "" {
			t.Errorf("%s: stdout %q", strings.Join(args, " "), stdout)
		}
	}
	refused("handshake_refused", 1, "", with("ping")...)
	s.must("admin", "peer", "add", "demo", public)
	s.must(with("ping")...)
	s.must("admin", "key", "create", "payments")
	if out := s.must("admin", "key", "show", "payments"); !strings.Contains(out, "hsm-resident") ||
		!strings.Contains(out, "generated: made inside the device, never readable, never extractable") {
		t.Errorf("key show: %s", out)
	}
	var keys []struct {
		Name, State, Custody string
		PublicKey            string `json:"public_key"`
	}
	err := json.Unmarshal([]byte(s.must(with("keys", "--json")...)), &keys)
	if err != nil || len(keys) != 1 || keys[0].Name != "payments" {
		t.Fatalf("keys: %v, %v", err, keys)
	}

	example, err := os.ReadFile("../examples/subscription.json")
	if err != nil {
		t.Fatal(err)
	}
	s.write("subscription.json", string(example))
	sign := with("sign", "--key", "payments", "--type", "paykit-subscription-v2", "--expires", "10m")
	refused("wrong_signer", 1, "", append(sign, "subscription.json")...)
	signed := s.must(append(sign, "--json", "--as", "subscriber", "subscription.json")...)
	s.write("signed.json", signed)
	out := s.must("transcript", "encode", "paykit-subscription-v2", "signed.json")
	if !strings.Contains(out, keys[0].PublicKey) {
		t.Errorf("encode: %s", out)
	}
	s.must(with("verify", "--key", "payments", "signed.json")...)
	refused("replay", 1, "", with("verify", "signed.json")...)
	refused("invalid_signature", 1, strings.Replace(signed, `"1000"`, `"9000"`, 1), with("verify", "-")...)
	refused("malformed", 1, "{}", with("verify")...)
	refused("malformed", 1, "", with("verify", "subscription.json")...)
	out, errOut, code := s.cli("any bytes \x00\xff", with("sign", "--key", "payments", "--context", "release", "-")...)
	if code != 0 || !strings.Contains(out, "payments, version 1") {
		t.Errorf("sign --context: %d, %s%s", code, out, errOut)
	}
	refused("malformed", 1, "any bytes \x00\xff", with("sign", "--key", "payments", "--type", "message-v1", "-")...)
	refused("denied", 1, `{"message":"AA"}`, with("sign", "--key", "payments", "--type", "raw")...)
	refused("unsupported", 1, `{}`, with("sign", "--key", "payments", "--type", "nonsense")...)
	refused("unknown_key", 1, `{}`, with("sign", "--key", "nothing", "--type", "message-v1")...)
	refused("lifetime_too_long", 1, `{"context":"c","message":"AA"}`,
		with("sign", "--key", "payments", "--type", "message-v1", "--expires", "200h")...)
	refused("usage", 2, "", "sign", "--key", "payments", "--type", "raw")
	refused("usage", 2, "", with("sign", "--key", "payments")...)
	refused("usage", 2, "", with("sign", "--kye", "payments")...)
	refused("usage", 2, "", "sing")
	refused("usage", 2, "", "admin")
	refused("usage", 2, "", "admin", "kye", "list")
	refused("usage", 2, "", "admin", "key", "creat", "invoices")
	refused("usage", 2, "", "transcript", "show")
	refused("usage", 2, "", "ping", "--server", s.listen, "--server-key", "abc", "--identity", "demo.key")
	refused("failed", 1, "", "ping", "--server", s.listen, "--server-key", noiseKey, "--identity", "none.key")
	refused("failed", 1, "", "keygen", "demo.key")
	refused("exists", 1, "", "admin", "key", "create", "payments")
	refused("invalid", 1, "", "admin", "key", "create", "No Good")
	refused("not_found", 1, "", "admin", "key", "show", "nothing")
	refused("exists", 1, "", "admin", "peer", "add", "again", public)
	refused("invalid", 1, "", "admin", "peer", "add", "short", "abcd")
	refused("not_found", 1, "", "admin", "peer", "remove", "nobody")
	refused("unreachable", 3, "", "admin", "--socket", "none.sock", "key", "list")
	if out := s.must("admin", "peer", "list"); !strings.Contains(out, "demo  "+public) {
		t.Errorf("peer list: %s", out)
	}
	out = s.must("admin", "key", "list", "--json")
	if !strings.Contains(out, `"noise"`) || !strings.Contains(out, keys[0].PublicKey) {
		t.Errorf("key list: %s", out)
	}
	// The daemon holds the lock on the ledger: check examines everything else.
	if out, code := s.daemon("check"); code != 0 || !strings.Contains(out, "in use") {
		t.Errorf("check beside the daemon: %d, %s", code, out)
	}
	s.must("admin", "peer", "remove", "demo")
	refused("handshake_refused", 1, "", with("ping")...)
	p.stop()
	refused("unreachable", 3, "", with("ping")...)
	if out, code := s.daemon("check"); code != 0 || !strings.Contains(out, "noise/1 x25519") ||
		!strings.Contains(out, "payments/1 ed25519 active hsm-resident") {
		t.Errorf("check: %d, %s", code, out)
	}
	if out, code := s.daemon("init"); code != 0 || !strings.Contains(out, "nothing was changed") ||
		!strings.Contains(out, noiseKey) {
		t.Errorf("init again: %d, %s", code, out)
	}
}
