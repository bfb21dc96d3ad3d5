package softhsmtests

import (
	"fmt"
	"log/slog"
	"math"
	"strings"
	"testing"
	"time"

	"countersign/admin/api"
	"countersign/approval"
	"countersign/client"
	"countersign/internal/history"

	"github.com/chromedp/cdproto/input"
	"github.com/chromedp/chromedp"
)

// tourPolicy is the policy of the seeded appliance.
const tourPolicy = `// Shops have payments signed, at most 500 EUR each.
@id("shops-pay")
permit (principal in Group::"shops", action == Action::"sign", resource == Key::"payments");

@id("payroll")
permit (principal == Peer::"payroll", action == Action::"sign", resource == Key::"salaries")
when { context.lifetime <= 3600 };

// Nobody signs refunds in the name of another peer.
@id("refunds")
permit (principal == Peer::"refunds-desk", action == Action::"sign", resource == Key::"refunds");

@id("no-long-documents")
forbid (principal, action == Action::"sign", resource)
when { context.lifetime > 86400 };
`

// seed gives an appliance a believable life: peers, keys, groups, a policy, signatures, refusals, a
// replay, a rotation, an open proposal.
func (s *system) seed() {
	s.t.Helper()
	ctx := s.t.Context()
	demo := s.dial()
	for range 3 { // payments, with receipts
		if _, err := demo.Sign(ctx, "payments", s.subscription()); err != nil {
			s.t.Fatal(err)
		}
	}
	demo.Close()
	peers := []string{"shop-berlin", "shop-lyon", "shop-oslo", "payroll", "refunds-desk", "kiosk-12"}
	for _, name := range peers {
		public := strings.TrimSpace(s.must("keygen", s.path(name+".key")))
		s.must("admin", "peer", "add", name, public)
	}
	for _, name := range []string{"salaries", "refunds"} {
		s.must("admin", "key", "create", name)
	}
	s.proposeAndApprove("group set", "shop-berlin,shop-lyon,shop-oslo",
		approval.Parameter{Name: "name", Value: "shops"}, approval.Parameter{Name: "of", Value: "peers"})
	s.proposeAndApprove("policy activate", tourPolicy)
	config := s.clientConfig()
	for i, name := range []string{"shop-berlin", "shop-lyon", "shop-berlin", "payroll", "shop-oslo", "refunds-desk"} {
		id, err := client.ReadIdentity(s.path(name + ".key"))
		if err != nil {
			s.t.Fatal(err)
		}
		config.Identity = id
		c, err := client.Dial(ctx, config)
		if err != nil {
			s.t.Fatal(err)
		}
		s.t.Cleanup(func() { c.Close() })
		key := map[string]string{"payroll": "salaries", "refunds-desk": "refunds"}[name]
		if key == "" {
			key = "payments"
		}
		for n := range 3 + i {
			signed, err := c.Sign(ctx, key, message(fmt.Sprintf("AAA%d", n%10)))
			if err != nil {
				s.t.Fatal(err)
			}
			if n < 2 { // the second time it is a replay
				c.Verify(ctx, key, signed)
				c.Verify(ctx, key, signed)
			}
		}
		c.Sign(ctx, "salaries", message("BBBB")) // denied to most
	}
	s.must("admin", "key", "rotate", "refunds", "--now")
	s.must("admin", "key", "rotate", "payments", "--in", "2d")
	if _, err := s.admin().Propose(ctx, api.NewProposal{Act: "peer add", Parameters: []approval.Parameter{
		{Name: "name", Value: "shop-porto"}, {Name: "public_key", Value: strings.Repeat("2b", 32)},
	}}); err != nil {
		s.t.Fatal(err)
	}
}

// pastDay gives the history a day with a peak at noon, a token that was away, and a disk that
// fills.
func (s *system) pastDay() {
	h := history.Open(s.path("ledger.db.history"), slog.New(slog.DiscardHandler))
	defer h.Close()
	now := time.Now().Unix() / 10 * 10
	whole := func(v float32) float32 { return float32(int(v)) }
	for at := now - 24*3600; at < now-30; at += 10 {
		day := math.Sin(float64(at%86400)/86400*math.Pi) + 0.1*math.Sin(float64(at%7200)/7200*2*math.Pi) +
			0.05*math.Sin(float64(at%610)/610*2*math.Pi)
		busy := float32(max(0.05, day))
		values := map[string]float32{
			"signatures": 40 * busy, "verifications": 25 * busy, "refused": 0.4 * busy, "denied": 0.3 * busy,
			"replays": 0, "rate_limited": 0.05 * busy, "expired": 0.1 * busy, "unavailable": 0,
			"sign_p50": 0.002 + 0.002*busy, "sign_p99": 0.006 + 0.02*busy*busy, "verify_p50": 0.0012,
			"verify_p99": 0.004, "decode_p99": 0.0003, "policy_p99": 0.0004 * (1 + busy),
			"ledger_p99": 0.003 + 0.004*busy, "turn_p99": 0.0001, "device_p99": 0.003 + 0.012*busy*busy,
			"answer_p99": 0.0005, "handshakes": 0.5 * busy,
			"handshakes_failed": 0.02, "handshakes_timeout": 0, "waiting": whole(6 * busy), "serving": whole(4 * busy),
			"ledger_waiting": whole(3 * busy), "backlog": 0, "connections": whole(20 + 60*busy),
			"connections_unproven": 0, "disk_free": 60e9 - float32(at-now+86400)*4e4,
			"ledger_size": 1e9 + float32(at-now+86400)*2e3,
		}
		if at > now-2400 && at < now-2100 { // an outage of the token
			values["unavailable"], values["signatures"], values["waiting"] = 6, 0, 12
		}
		h.Put(time.Unix(at, 0), values)
	}
}

// tour are the pages of the console by their names.
var tour = []struct{ name, path, shows string }{
	{"overview", "/", "Each second; the lines show"},
	{"alerts", "/alerts", "All kinds"},
	{"alert", "/alerts/token-pin-refused", "tries are counted by many"},
	{"figures", "/figures", "Signatures and verifications"},
	{"keys", "/keys", "salaries"},
	{"key", "/keys/payments", "Line of succession"},
	{"peers", "/peers", "shop-berlin"},
	{"peer", "/peers/shop-berlin", "What policy lets it do"},
	{"policy", "/policy", "shops-pay"},
	{"policy-edit", "/policy/edit", "What changes"},
	{"approvals", "/approvals", "peer add"},
	{"approval", "/approvals/1", "What was signed"},
	{"operators", "/operators", "Sessions"},
	{"audit", "/audit", "Take it along"},
	{"event", "/audit/40", "Proven"},
	{"retention", "/retention", "Epochs of the log"},
	{"receipts", "/receipts", "Receipts"},
	{"nowhere", "/nowhere", "There is no such page"},
}

// TestConsolePages visits every page of a seeded appliance, light, dark and narrow: axe-core finds
// nothing serious, the Content-Security-Policy is not violated, no page is wider than its window.
func TestConsolePages(t *testing.T) {
	s, origin, p := consoleSystem(t)
	p.stop()
	s.pastDay()
	p = s.serve()
	s.seed()
	c := newConsole(t, origin, s.serverCertificate(origin))
	c.person(s, "ann", "administrator,operator,auditor,approver")
	c.goTo("/")
	c.signIn("ann")
	for _, form := range []struct {
		name          string
		width, height int64
		dark          bool
	}{
		{"light", 1280, 800, false}, {"dark", 1280, 800, true},
		{"narrow", 390, 844, false}, {"tablet", 768, 1024, true},
	} {
		c.size(form.width, form.height)
		c.dark(form.dark)
		for _, each := range tour {
			c.visit(each.path)
			c.sees(each.shows)
			c.until(`!document.querySelector(".waiting")`)
			c.shot(each.name + "-" + form.name)
			if form.name != "tablet" {
				c.checkPage(each.name + ", " + form.name)
			} else {
				c.checkWidth(each.name + ", " + form.name)
			}
		}
	}

	// By keyboard alone: search, and a page by its name.
	c.size(1280, 800)
	c.visit("/")
	c.key("/")
	c.until(`document.querySelector("dialog[open] input") === document.activeElement`)
	if _, err := chromedp.Call(c.ctx, input.InsertText, input.InsertTextParams{Text: "salar"}); err != nil {
		t.Fatal(err)
	}
	c.until(`hands.find("[role=option]", "salaries")`)
	c.shot("search")
	c.checkPage("search")
	c.key("Enter")
	c.until(`location.pathname === "/keys/salaries" && !document.querySelector("dialog")`)
	c.close()
	p.stop()
}

// TestConsolePolicy changes the policy: a text with an error, a case that fails, what would have
// changed in the past, the proposal, the policy in force.
func TestConsolePolicy(t *testing.T) {
	s, origin, p := consoleSystem(t)
	c := newConsole(t, origin, s.serverCertificate(origin))
	c.person(s, "ann", "administrator,operator,auditor,approver")
	cl := s.dial()
	for range 4 {
		if _, err := cl.Sign(t.Context(), "payments", message("AAAA")); err != nil {
			t.Fatal(err)
		}
	}
	c.goTo("/policy")
	c.signIn("ann")
	c.press("Change it")
	write := func(text string) {
		t.Helper()
		c.until(`document.querySelector(".editor")?.shadowRoot?.querySelector(".cm-content")`)
		mustRun[any](c.browser, `(e => { e.focus(); getSelection().selectAllChildren(e); return true; })(
			document.querySelector(".editor").shadowRoot.querySelector(".cm-content"))`)
		if _, err := chromedp.Call(c.ctx, input.DispatchKeyEvent, input.DispatchKeyEventParams{
			Type: input.DispatchKeyEventTypeKeyDown, Key: "a", Modifiers: 2, WindowsVirtualKeyCode: 65,
			Commands: []string{"selectAll"},
		}); err != nil {
			t.Fatal(err)
		}
		if _, err := chromedp.Call(c.ctx, input.InsertText, input.InsertTextParams{Text: text}); err != nil {
			t.Fatal(err)
		}
	}
	write("// nobody\npermit (principal == Peer::\"demo\", action == Action::\"sing\", resource);")
	c.sees("Line 2")
	c.until(`document.querySelector(".editor").shadowRoot.querySelector(".cm-line.cm-bad")`)
	c.shot("policy-error")
	c.checkPage("a policy with an error")

	write(`forbid (principal == Peer::"demo", action == Action::"sign", resource == Key::"payments");`)
	c.fill("Table (CSV)", "name,expect,peer,key\ndemo signs,allow,demo,payments\nnobody else,deny,shop,payments\n")
	c.sees("WRONG")
	c.sees("It adds 1 rule (1 forbid) and removes 1 rule (1 permit); 0 stay")
	c.fill("Replay the decisions of", "7")
	c.sees("Of 4 past decisions, 4 would be another one: 4 allowed ones denied")
	c.shot("policy-diff")
	c.checkPage("a policy with a diff")
	c.press("Propose…")
	c.until(`document.querySelector("dialog[open]")`)
	c.press("Propose")
	c.sees("What is signed")
	c.press("Sign with passkey")
	c.until(`location.pathname === "/policy"`)
	c.sees("forbid (principal")
	c.sees("in force")
	if _, err := cl.Sign(t.Context(), "payments", message("AAAA")); err == nil {
		t.Error("the new policy does not decide")
	}
	for _, each := range mustRun[[]string](c.browser, `self.violations`) {
		t.Error(each)
	}
	c.close()
	p.stop()
}
