package softhsmtests

import (
	"encoding/json"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign/admin/api"
	"countersign/client"
	"countersign/noise"
)

// ofNoRequest has the lines of the log that are of no request: the daemon's own life, a connection
// before its first message and at its end, and work in the background.
var ofNoRequest = []string{
	"connected", "disconnected", "connection ended", "no handshake", "handshake refused", "handshake not used",
	"serving", "stopping", "alert", "lines were left out",
	"the policy file can't be used; the policy in force stays", // looked at from time to time
	"a key worker says", "a key is not on its token: restore the token, or rotate the key",
	"a rule of the policy may not do what was meant",
	"the daemon could read or change what is of the key workers alone: move one of them",
	"a process is not confined as intended",
	"certs: made a certificate", "certs: made an authority: clients must trust this one",
}

// TestEveryLineOfARequestHasItsID has peers and operators make requests of many kinds, good ones
// and refused ones, at the level debug. Each line of the daemon's log then has the id of a request,
// unless its message is one of ofNoRequest. Each id that a line has is an id by its form.
func TestEveryLineOfARequestHasItsID(t *testing.T) {
	s := newSystem(t)
	s.edit("countersign.toml", "log_level =", "log_format = \"json\"\nlog_level =")
	s.configureHTTPS()
	p := s.serve()
	s.enrol()

	// Requests of peers.
	c := s.dial()
	signed := must(c.Sign(t.Context(), "payments", message("AAAA")))(t)
	must(c.Verify(t.Context(), "payments", signed))(t)
	c.Verify(t.Context(), "payments", signed) // a replay
	c.Sign(t.Context(), "nothing", message("BBBB"))
	c.Sign(t.Context(), "payments", message("CCCC").Fill(-time.Hour))
	must(c.Ping(t.Context()))(t)
	must(c.Keys(t.Context()))(t)
	must(c.Batch(t.Context(), []client.Item{
		{Key: "payments", Document: message("DDDD")}, {Key: "nothing", Document: message("EEEE")},
	}))(t)
	raw := must(s.connectAs(s.listen, noise.CountersignV1, nil))(t)
	for _, text := range []string{"no JSON", `{"id":"1","op":"dance"}`, `{"id":"2","op":"sign","body":7}`} {
		if err := raw.WriteMessage([]byte(text)); err != nil {
			t.Fatal(err)
		}
		raw.ReadMessage()
	}
	raw.Close()

	// A proof that does not hold, by nobody.
	stranger := api.NewClient(s.path("admin.sock"))
	ch := must(stranger.Challenge(t.Context(), api.NewChallenge{Purpose: "sign-in", Operator: "root"}))(t)
	if _, err := stranger.SignIn(t.Context(), api.Proven{Challenge: ch.ID}); err == nil {
		t.Error("a sign-in without a proof")
	}

	// Requests of operators. A command that the appliance refuses is a request too.
	s.write("broken.cedar", "permit (")
	for _, line := range []string{
		"key create invoices", "key create invoices", "key rotate payments --now",
		"key rotate invoices --at 2099-01-01T00:00:00Z", "key rotate invoices --cancel", "key list",
		"key compromise invoices 1 --reason lost", "key archive payments 1",
		"peer add shop " + strings.Repeat("0a", 32), "peer suspend shop", "peer resume shop", "peer remove shop",
		"peer remove shop", "group list", "lock --reason test", "unlock", "unlock", "state", "token list",
		"token retry main", "token retry nothing", "alert list", "alert test", "alert ack replays",
		"log level warn --for 1h", "log level debug --for 1h", "log level reset", "audit end-epoch",
		"audit list", "retention preview", "ledger compact", "ledger accept-time", "rollback accept --reason test",
		"sessions list", "proposal list", "policy reload", "metrics", "tls show", "tls csr", "tls uninstall",
		"scraper add prometheus " + s.path("scrape.token"), "scraper remove prometheus", "noise-key", "whoami",
		"operator remove root", "approvals needed 2",
	} {
		s.cli("", append([]string{"admin"}, strings.Fields(line)...)...)
	}
	s.edit("policy.cedar", "permit", "permit(") // a file that can't be used
	s.cli("", "admin", "policy", "reload")
	s.must("admin", "logout")
	p.stop()

	kinds, lines := map[string]int{}, 0
	for line := range strings.Lines(p.stderr.String()) {
		var l struct{ Msg, Request string }
		if err := json.Unmarshal([]byte(line), &l); err != nil {
			t.Errorf("no line of JSON: %s", line)
			continue
		}
		switch {
		case l.Request == "" && !slices.Contains(ofNoRequest, l.Msg):
			t.Errorf("a line without the id of its request: %s", line)
		case l.Request == "":
		case !regexp.MustCompile(`^[a-z2-7]{16}(\.[0-9]+)?$`).MatchString(l.Request):
			t.Errorf("an id of another form: %s", line)
		default:
			lines++
			kinds[l.Msg]++
		}
	}
	if lines < 20 || len(kinds) < 10 {
		t.Errorf("%d lines of %d kinds have an id: %v", lines, len(kinds), kinds)
	}
}
