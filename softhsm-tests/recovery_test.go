package softhsmtests

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"countersign/approval"
	"countersign/client"
	"countersign/tpm/tpmtest"
)

// safeToken is the configuration of a second HSM, with a folder of its own.
func (s *system) safeToken() string {
	return fmt.Sprintf(`[tokens.safe]
uri = "pkcs11:token=in%%20a%%20safe"
module = %q
pin_file = "pin"
environment = { SOFTHSM2_CONF = %q }

`, softHSM, s.path("safe.conf"))
}

// newSafe sets up an HSM for signing keys, a TPM for the appliance's own keys, and a second HSM.
func newSafe(t *testing.T) *system {
	t.Helper()
	e := tpmtest.New(t)
	s := newSoftHSM(t, softHSM)
	if err := os.Mkdir(s.path("safe"), 0o700); err != nil {
		t.Fatal(err)
	}
	s.write("safe.conf", fmt.Sprintf("directories.tokendir = %s\nlog.level = ERROR\n", s.path("safe")))
	s.edit("countersign.toml", "[tokens.main]", fmt.Sprintf(`noise_token = "tpm"
rollback_token = "none"

[tokens.tpm]
tpm = %q
state = "tpm"

%s[tokens.main]`, e.Socket, s.safeToken()))
	for _, token := range []string{"main", "safe"} {
		out, exit := s.daemon("init", "--token", token, "--new-token", "--so-pin-file", s.path("so-pin"))
		if exit != 0 {
			t.Fatalf("init: %d\n%s", exit, out)
		}
	}
	if out, exit := s.daemon("init"); exit != 0 {
		t.Fatalf("init: %d\n%s", exit, out)
	}
	return s
}

// startSafe starts the appliance of newSafe, with the peer demo and the key payments in the HSM.
func (s *system) startSafe() *process {
	s.t.Helper()
	p := s.serve()
	s.must("admin", "peer", "add", "demo", strings.TrimSpace(s.must("keygen", s.path("demo.key"))))
	s.must("admin", "key", "create", "payments", "--token", "main")
	return p
}

// TestTokenIsDestroyed destroys the folder of a token while the appliance serves. The recovery
// successor, whose token was in a safe, takes the line over under approval, and a connected peer
// with a pinned line goes on by itself. Signatures of before stay good.
func TestTokenIsDestroyed(t *testing.T) {
	s := newSafe(t)
	p := s.startSafe()
	s.must("admin", "key", "safeguard", "payments", "--token", "safe")
	pin := s.path("payments.line")
	byPeer := func(args ...string) string {
		key := strings.TrimSpace(s.must("admin", "noise-key"))
		return s.must(append(args, "--server", s.listen, "--server-key", key, "--identity", s.path("demo.key"))...)
	}
	s.write("payments.line", byPeer("line", "pin", "payments"))
	if out := s.must("admin", "key", "show", "payments"); !strings.Contains(out, "on token safe\n") ||
		!strings.Contains(out, "after the loss of the token") {
		t.Errorf("key show: %s", out)
	}
	line, err := client.ReadKeyLine(pin)
	if err != nil || line.Recovery == [32]byte{} {
		t.Fatalf("%+v, %v", line, err)
	}

	// The second HSM goes into the safe.
	p.stop()
	s.edit("countersign.toml", s.safeToken(), "")
	if err := os.Rename(s.path("safe"), s.path("locked")); err != nil {
		t.Fatal(err)
	}
	p = s.serve()
	if out := s.must("admin", "state"); !strings.Contains(out, "operational") {
		t.Errorf("without the token in the safe: %s", out)
	}
	rotations := make(chan client.Rotation, 16)
	c := s.clientConfig()
	c.Lines = []client.KeyLine{line}
	c.RetryFor = time.Minute
	c.OnRotation = func(r client.Rotation) { rotations <- r }
	peer, err := client.Dial(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	s.must("admin", "key", "rotate", "payments", "--now")
	before, err := peer.Sign(t.Context(), "payments", message("AAAA"))
	if err != nil || before.Version != 2 {
		t.Fatalf("%+v, %v", before, err)
	}

	if err := os.RemoveAll(s.path("tokens")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the loss", func() bool {
		_, err := peer.Sign(t.Context(), "payments", message("BBBB"))
		return code(err) == "unavailable"
	})
	reason := approval.Parameter{Name: "reason", Value: "the HSM has burnt"}
	of := approval.Parameter{Name: "key", Value: "payments"}
	if _, err := s.propose(approval.ActKeyRecover, "", of, reason); err == nil ||
		!strings.Contains(err.Error(), "put the token into the configuration") {
		t.Errorf("without the token: %v", err)
	}
	p.stop()
	if err := os.Rename(s.path("locked"), s.path("safe")); err != nil {
		t.Fatal(err)
	}
	s.edit("countersign.toml", "[tokens.main]", s.safeToken()+"[tokens.main]")
	s.serve()
	s.proposeAndApprove(approval.ActKeyRecover, "", of, reason)

	const recovered = 1000000
	signed, err := peer.Sign(t.Context(), "payments", message("CCCC")) // the client reconnects
	if err != nil || signed.Version != recovered {
		t.Fatalf("%+v, %v", signed, err)
	}
	for version := uint32(0); version != recovered; {
		select {
		case r := <-rotations:
			if version = r.New.Version; r.Err != nil || version == recovered && r.Old.Version != 2 {
				t.Fatalf("%+v", r)
			}
		case <-time.After(time.Minute):
			t.Fatal("the peer hears of nothing within a minute")
		}
	}
	if _, err := peer.Verify(t.Context(), "payments", before); err != nil {
		t.Errorf("a signature of the lost version: %v", err)
	}
	if now, ok := peer.Pinned("payments"); !ok || now.Version != recovered {
		t.Errorf("pinned %+v", now)
	}
	out := byPeer("line", "follow", pin, "--write")
	if l, err := client.ReadKeyLine(pin); err != nil || l.Version != recovered {
		t.Errorf("%s: %+v, %v", out, l, err)
	}
	s.must("admin", "key", "rotate", "payments", "--now")
	if signed, err = peer.Sign(t.Context(), "payments", message("DDDD")); err != nil || signed.Version != recovered+1 {
		t.Errorf("%+v, %v", signed, err)
	}
	s.must("admin", "audit", "export", s.path("log"))
	key := strings.TrimSpace(s.must("admin", "audit", "key"))
	for _, check := range []string{"verify", "approvals"} {
		if out := s.must("audit", check, s.path("log"), "--key", key); check == "approvals" &&
			!strings.Contains(out, "key recover") {
			t.Errorf("audit %s: %s", check, out)
		}
	}
}

// TestConsoleRecovery makes a recovery successor in the console, and goes on with it after the loss
// of the token.
func TestConsoleRecovery(t *testing.T) {
	s := newSafe(t)
	origin := s.configureHTTPS()
	p := s.startSafe()
	c := newConsole(t, origin, s.serverCertificate(origin))
	c.person(s, "ann", "administrator,operator,auditor,approver")
	c.goTo("/keys/payments")
	c.signIn("ann")
	c.sees("The line ends with its token")
	sign := func() {
		t.Helper()
		c.press("Propose")
		c.sees("What is signed")
		c.press("Sign with passkey")
		c.sees("was carried out")
		c.press("Close")
		c.until(`!document.querySelector("dialog[open]")`)
	}
	c.press("Make one")
	c.fill("Token", "safe")
	sign()
	c.sees("it signs when the line has lost its token")
	c.shot("recovery")
	c.checkPage("a recovery successor")
	if err := os.RemoveAll(s.path("tokens")); err != nil {
		t.Fatal(err)
	}
	cl := s.dial()
	eventually(t, "the loss", func() bool {
		_, err := cl.Sign(t.Context(), "payments", message("AAAA"))
		return code(err) == "unavailable"
	})
	c.press("Go on with it")
	c.fill("Reason", "the HSM has burnt")
	c.fill("Type payments to go on", "payments")
	sign()
	c.sees("The line ends with its token")
	if signed, err := cl.Sign(t.Context(), "payments", message("BBBB")); err != nil || signed.Version != 1000000 {
		t.Errorf("%+v, %v", signed, err)
	}
	c.close()
	p.stop()
}

// TestRestoreAfterALoss restores a backup beside a new, empty HSM. The restore says that the line
// of the lost key can go on with the device from the safe, and it does.
func TestRestoreAfterALoss(t *testing.T) {
	s := newSafe(t)
	s.backedUp()
	p := s.startSafe()
	s.must("admin", "key", "safeguard", "payments", "--token", "safe")
	p.stop()
	s.edit("countersign.toml", s.safeToken(), "")
	p = s.serve()
	c := s.clientConfig()
	c.Lines = []client.KeyLine{s.pinnedLine("payments")}
	backup := s.newBackup()
	p.stop()
	if err := os.RemoveAll(s.path("tokens")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(s.path("tokens"), 0o700); err != nil {
		t.Fatal(err)
	}
	if out, exit := s.daemon("init", "--token", "main", "--new-token", "--so-pin-file", s.path("so-pin")); exit != 0 {
		t.Fatalf("init: %d\n%s", exit, out)
	}
	said, exit := s.daemon(s.restoring(backup, s.path("restore.txt"))...)
	for _, want := range []string{
		"payments/1 is NOT on its token: it signs nothing any more, and its line can go on " +
			"(countersign admin key recover)",
		"payments/1000000, for the recovery of the line, is on the token safe, which the configuration does not have",
	} {
		if exit != 0 || !strings.Contains(said, want) {
			t.Errorf("restore: %d\n%s\nwant %s", exit, said, want)
		}
	}
	s.restore(backup)
	s.edit("countersign.toml", "[tokens.main]", s.safeToken()+"[tokens.main]")
	s.serve()
	s.proposeAndApprove(approval.ActKeyRecover, "", approval.Parameter{Name: "key", Value: "payments"},
		approval.Parameter{Name: "reason", Value: "the HSM has burnt"})
	peer, err := client.Dial(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	eventually(t, "a signature", func() bool {
		signed, err := peer.Sign(t.Context(), "payments", message("AAAA"))
		if err != nil && code(err) != "restored" {
			t.Fatal(err)
		}
		return err == nil && signed.Version == 1000000
	})
}
