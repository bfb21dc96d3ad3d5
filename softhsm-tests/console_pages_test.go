package softhsmtests

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"countersign/admin/api"
	"countersign/approval"
	"countersign/client"

	"github.com/chromedp/chromedp"
)

// consoleSystem starts an appliance with the peer demo, the key payments and a console, with root
// as the first administrator.
func consoleSystem(t testing.TB) (s *system, origin string, p *process) {
	t.Helper()
	s = newSystem(t)
	origin = s.configureHTTPS()
	p = s.serve()
	s.enrol()
	return s, origin, p
}

// person gives a new operator a passkey of the browser.
func (c *tab) person(s *system, name, roles string) {
	c.t.Helper()
	c.open(c.origin + "/v1/health/alive") // a page without the console's Content-Security-Policy
	made := mustRun[approval.Credential](c.browser, `make(%v).then(r => must("POST", "/v1/passkeys", r))`, name)
	text, err := json.Marshal(made)
	if err != nil {
		c.t.Fatal(err)
	}
	s.proposeAndApprove("operator add", "", approval.Parameter{Name: "name", Value: name},
		approval.Parameter{Name: "roles", Value: roles}, approval.Parameter{Name: "credential", Value: string(text)})
}

// signIn signs an operator in at the page that asks for it.
func (c *tab) signIn(name string) {
	c.t.Helper()
	c.fill("Operator", name)
	c.press("Sign in with a passkey")
	c.until(`document.querySelector(".frame h1")`)
}

// TestConsoleSessions: a new tab of a browser is signed in by the other one, the end of a session
// reaches all tabs, and a cookie without the page's half is worth nothing.
func TestConsoleSessions(t *testing.T) {
	s, origin, p := consoleSystem(t)
	c := newConsole(t, origin, s.serverCertificate(origin))
	c.person(s, "ann", "administrator,operator,auditor,approver")
	c.goTo("/keys")
	c.sees("Sign in")
	c.checkPage("sign in")
	c.shot("sign-in")
	c.signIn("ann")
	c.sees("payments") // the page that was asked for

	second := c.another()
	second.goTo("/peers")
	second.sees("demo")
	third := c.another()
	third.goTo("/")
	third.sees("agrees with the ledger")
	third.until(`!hands.text().includes("The figures come with the next second")`) // from the tab that reads the stream

	stolen := mustRun[int](c.browser, `fetch("/v1/me").then(r => r.status)`) // the cookie without the half
	if stolen != http.StatusUnauthorized {
		t.Errorf("the cookie alone is a session: %d", stolen)
	}

	second.press("Sign out")
	for _, each := range []*tab{c, second, third} {
		each.sees("You have signed out, in all tabs")
	}
	if n := mustRun[int](c.browser, `sessionStorage.length`); n != 0 {
		t.Error("the page keeps its half after the sign-out")
	}

	// A revocation by somebody else reaches the tabs as well.
	c.signIn("ann")
	second.sees("Enrolled")
	sessions, err := s.admin().Sessions(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, each := range sessions {
		if each.Operator == "ann" {
			if err := s.admin().EndSession(t.Context(), each.ID); err != nil {
				t.Fatal(err)
			}
		}
	}
	c.sees("The session is over")
	second.sees("The session is over")
	c.close()
	p.stop()
}

// TestConsoleRoles: each role sees its own pages and acts, and nothing that would be refused. A
// change of roles reaches the open page.
func TestConsoleRoles(t *testing.T) {
	s, origin, p := consoleSystem(t)
	c := newConsole(t, origin, s.serverCertificate(origin))
	c.person(s, "ann", "auditor")
	all := []string{"Overview", "Alerts", "Figures", "Keys", "Peers", "Policy", "Approvals", "Operators", "Audit log",
		"Retention", "Receipts"}
	without := func(name string) []string {
		return slices.DeleteFunc(slices.Clone(all), func(p string) bool { return p == name })
	}
	c.goTo("/")
	for i, each := range []struct {
		roles string
		pages []string
		// acts are buttons by page: present, or with an exclamation mark absent.
		acts map[string][]string
	}{
		{"auditor", all, map[string][]string{
			"/": {"!Lock"}, "/keys": {"!Create a key"}, "/keys/payments": {"!Rotate", "!Mark compromised"},
			"/peers": {"!Enrol a peer"}, "/peers/demo": {"!Remove", "!Suspend"},
		}},
		{"operator", without("Retention"), map[string][]string{
			"/": {"Lock"}, "/keys": {"Create a key"}, "/keys/payments": {"Rotate", "Mark compromised", "Schedule"},
			"/peers": {"Enrol a peer"}, "/peers/demo": {"Remove", "Suspend"}, "/operators": {"!Link for a passkey"},
		}},
		{"approver", []string{"Overview", "Alerts", "Keys", "Peers", "Policy", "Approvals", "Operators", "Audit log"},
			map[string][]string{"/keys/payments": {"!Rotate"}, "/operators": {"!Link for a passkey"}}},
		{"metrics", []string{"Overview", "Alerts", "Figures", "Keys", "Peers", "Operators"}, nil},
		{"administrator", without("Receipts"), map[string][]string{
			"/operators": {"Link for a passkey", "Approvals needed"}, "/keys": {"!Create a key"},
			"/peers/demo": {"!Remove"}, "/policy": {"Change it"},
		}},
	} {
		if i > 0 {
			s.proposeAndApprove("operator roles", "", approval.Parameter{Name: "name", Value: "ann"},
				approval.Parameter{Name: "roles", Value: each.roles})
			c.sees("The session is over")
		}
		c.signIn("ann")
		got := mustRun[[]string](c.browser, `[...document.querySelectorAll("nav a")].map(a => a.firstChild.data)`)
		if !slices.Equal(got, each.pages) {
			t.Errorf("%s sees the pages %v, want %v", each.roles, got, each.pages)
		}
		for path, acts := range each.acts {
			c.visit(path)
			for _, act := range acts {
				name, absent := strings.CutPrefix(act, "!")
				if !absent {
					c.until(`hands.find("button, a.button", ` + quoted(name) + `)`)
				}
				if found := mustRun[bool](c.browser, `!!hands.find("button, a.button", %v)`, name); found == absent {
					t.Errorf("%s on %s: the act %s is there: %t", each.roles, path, name, found)
				}
			}
		}
		// No page of the role has an error: nothing that is shown is refused.
		const links = `[...document.querySelectorAll("nav a")].map(a => a.getAttribute("href"))`
		for _, path := range mustRun[[]string](c.browser, links) {
			c.visit(path)
			problem := mustRun[string](c.browser, `document.querySelector(".problem")?.innerText ?? ""`)
			if problem != "" || c.shows("may not") {
				t.Errorf("%s on %s: %s", each.roles, path, problem)
			}
		}
	}
	c.visit("/receipts")
	c.sees("Your roles do not include this page")
	c.close()
	p.stop()
}

// TestConsoleRotation: a rotation with a connected peer, whose acknowledgement appears without a
// reload; one at once, after which the version before is archived. Then a key worker is killed: the
// page shows the loss of it, and its recovery.
func TestConsoleRotation(t *testing.T) {
	s, origin, p := consoleSystem(t)
	c := newConsole(t, origin, s.serverCertificate(origin))
	c.person(s, "ann", "administrator,operator,auditor,approver")
	heard, release := make(chan client.Rotation, 1), make(chan struct{})
	config := s.clientConfig()
	config.OnRotation = func(r client.Rotation) { // the client acknowledges when the function returns
		heard <- r
		<-release
	}
	cl, err := client.Dial(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer cl.Close()
	if _, err := cl.Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Fatal(err)
	}
	c.goTo("/keys/payments")
	c.signIn("ann")
	c.sees("No rotation is announced")
	c.press("Rotate")
	c.fill("At a time", true)
	c.fill("Time", time.Now().Add(48*time.Hour).Format("2006-01-02T15:04"))
	c.shot("rotate")
	c.checkPage("rotate")
	c.press("Announce the rotation")
	c.sees("1 peer has not")
	c.shot("rotation")
	c.checkPage("rotation")
	mustRun[any](c.browser, `(self.notReloaded = true)`)
	select {
	case <-heard:
	case <-time.After(30 * time.Second):
		t.Fatal("the peer was not told")
	}
	close(release)
	c.sees("All peers have acknowledged it")
	if !mustRun[bool](c.browser, `self.notReloaded === true`) {
		t.Error("the page was loaded again")
	}
	c.press("Call off")
	c.press("Call it off")
	c.sees("No rotation is announced")
	c.press("Rotate")
	c.fill("Now", true)
	c.press("Announce the rotation")
	c.until(`!document.querySelector("dialog[open]")`)
	<-heard
	c.sees("Version 2")
	c.press("Archive…")
	c.fill("Type payments to go on", "payments")
	c.press("Propose")
	c.sees("What is signed")
	c.press("Sign with passkey")
	c.sees("was carried out")
	c.press("Close")
	var states []string
	eventually(t, "version 1 is archived and version 2 signs", func() bool {
		keys, err := s.admin().Key(t.Context(), "payments")
		if err != nil {
			t.Fatal(err)
		}
		states = nil
		for _, k := range keys {
			states = append(states, k.State)
		}
		return slices.Contains(states, "archived") && slices.Contains(states, "active")
	})

	c.visit("/")
	c.sees("2 of 2")
	tokens, err := s.admin().Tokens(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(tokens[0].Workers[0].PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	c.until(`document.querySelector("[aria-label=Tokens] td:last-child").innerText.trim() === "1"`) // replaced
	c.sees("2 of 2")
	c.close()
	p.stop()
}

// TestConsoleApproval: three people, two of whom must sign. The page shows the exact text.
func TestConsoleApproval(t *testing.T) {
	s, origin, p := consoleSystem(t)
	people := map[string]*tab{} // each has a browser
	for name, roles := range map[string]string{
		"ann": "operator,approver", "bob": "operator,approver", "cat": "administrator,operator,auditor",
	} {
		people[name] = newConsole(t, origin, s.serverCertificate(origin))
		people[name].person(s, name, roles)
	}
	s.proposeAndApprove("approvals needed", "", approval.Parameter{Name: "needed", Value: "2"})
	public := strings.TrimSpace(s.must("keygen", s.path("shop.key")))

	c := people["cat"]
	c.goTo("/peers")
	c.signIn("cat") // proposes, and may not approve
	c.press("Enrol a peer")
	c.fill("Name", "shop")
	c.fill("Public key", public)
	c.press("Propose")
	c.sees("Approvers sign it: 0 of 2 have")
	c.press("Proposal ")
	c.until(`location.pathname.startsWith("/approvals/")`)
	path := mustRun[string](c.browser, `location.pathname`)
	if mustRun[bool](c.browser, `!!hands.find("button", "Sign with passkey")`) {
		t.Error("somebody who is no approver can sign")
	}
	for i, name := range []string{"ann", "bob"} {
		c = people[name]
		c.goTo("/approvals")
		c.signIn(name)
		if i == 0 {
			c.sees("peer add")
			c.shot("approvals")
			c.checkPage("approvals")
		}
		c.visit(path)
		c.sees("What is signed")
		shown := mustRun[string](c.browser, `document.querySelector("pre.text").textContent`)
		proposals, err := s.admin().Proposals(t.Context())
		if err != nil || shown != proposals[0].Text {
			t.Errorf("the page shows %q, and what is signed is %q (%v)", shown, proposals[0].Text, err)
		}
		c.checkPage("a proposal")
		c.press("Sign with passkey")
		if i == 0 {
			c.sees("You have signed. 1 more signature is needed")
		}
	}
	c.sees("was carried out")
	c.shot("approved")
	c.checkPage("an approved proposal")
	people["cat"].sees("was carried out") // without a reload
	if _, err := s.admin().Peer(t.Context(), "shop"); err != nil {
		t.Error(err)
	}
	for _, each := range people {
		each.close()
	}
	p.stop()
}

// meddler is a proxy between a browser and the appliance, with a certificate that the browser
// accepts. change changes the answers.
type meddler struct {
	address     string
	certificate *x509.Certificate
	change      atomic.Pointer[func(path string, body []byte) []byte]
}

func newMeddler(t testing.TB, origin string) *meddler {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	m := new(meddler)
	if m.certificate, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	at, err := url.Parse(origin)
	if err != nil {
		t.Fatal(err)
	}
	proxy := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(at)
		r.Out.Host = at.Host
		r.Out.Header.Del("Accept-Encoding")
	}}
	proxy.FlushInterval = -1
	proxy.Transport = &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableCompression: true}
	proxy.ModifyResponse = func(r *http.Response) error {
		change := m.change.Load()
		if change == nil || !strings.Contains(r.Header.Get("Content-Type"), "json") {
			return nil
		}
		b, err := io.ReadAll(r.Body)
		if err != nil {
			return err
		}
		b = (*change)(r.Request.URL.Path, b)
		r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(b)), int64(len(b))
		r.Header.Del("Content-Length")
		return nil
	}
	inside := &http.Server{Handler: proxy}
	accepted := &handed{conns: make(chan net.Conn), done: make(chan struct{})}
	go inside.Serve(accepted)
	config := &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
		NextProtos:   []string{"http/1.1"},
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	outside := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect || r.Host != at.Host {
			http.Error(w, "only the appliance", http.StatusForbidden)
			return
		}
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n")
		select {
		case accepted.conns <- tls.Server(conn, config):
		case <-accepted.done:
			conn.Close()
		}
	})}
	go outside.Serve(l)
	t.Cleanup(func() { outside.Close(); inside.Close() })
	m.address = l.Addr().String()
	return m
}

// handed is a listener of connections that somebody else has accepted.
type handed struct {
	conns chan net.Conn
	done  chan struct{}
}

func (h *handed) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

func (h *handed) Close() error {
	select {
	case <-h.done:
	default:
		close(h.done)
	}
	return nil
}

func (h *handed) Addr() net.Addr { return &net.TCPAddr{} }

// through has a browser use the meddler.
func (m *meddler) through() []chromedp.ExecAllocatorOption {
	return []chromedp.ExecAllocatorOption{
		chromedp.ProxyServer("http://" + m.address), chromedp.Flag("proxy-bypass-list", "<-loopback>"),
	}
}

// TestConsoleProof searches the audit log, and checks the proof of an event in the browser. A proof
// that was tampered with on the way, another event than the log has, and a log that was rewritten
// under the browser are shouted about.
func TestConsoleProof(t *testing.T) {
	s, origin, p := consoleSystem(t)
	m := newMeddler(t, origin)
	c := newConsole(t, origin, m.certificate, m.through()...)
	c.person(s, "ann", "auditor")
	cl := s.dial()
	for range 5 {
		if _, err := cl.Sign(t.Context(), "payments", message("AAAA")); err != nil {
			t.Fatal(err)
		}
	}
	c.goTo("/audit?type=SignatureAdmitted&actor=demo")
	c.signIn("ann")
	c.until(`document.querySelectorAll("[aria-label=Events] tbody tr").length === 5`)
	c.shot("audit")
	c.checkPage("audit")
	c.fill("Resource", "invoices")
	mustRun[any](c.browser, `(hands.field("Resource").form.requestSubmit(), true)`) // as by Enter
	c.sees("No event fits")
	c.visit("/audit?type=SignatureAdmitted")
	event := mustRun[string](c.browser, `document.querySelector("[aria-label=Events] tbody a").getAttribute("href")`)
	c.visit(event)
	c.until(`document.querySelector("[data-proof=holds]")`)
	c.shot("proof")
	c.checkPage("proof")

	// Later, the log has grown, and continues.
	if _, err := cl.Sign(t.Context(), "payments", message("BBBB")); err != nil {
		t.Fatal(err)
	}
	c.press("Check again")
	c.until(`document.querySelector("[data-proof=holds]") && /from \d+ to \d+ events/.test(hands.text())`)

	tampered := func(name string, change func(doc map[string]any), want string) {
		t.Helper()
		do := func(path string, b []byte) []byte {
			if !strings.HasSuffix(path, "/proof") {
				return b
			}
			var doc map[string]any
			if err := json.Unmarshal(b, &doc); err != nil {
				t.Errorf("%s: %v", name, err)
				return b
			}
			change(doc)
			b, _ = json.Marshal(doc)
			return b
		}
		m.change.Store(&do)
		c.press("Check again")
		c.until(`document.querySelector("[data-proof=` + want + `]")`)
		if c.shows("Proven: this event") {
			t.Errorf("%s: the page says that the event is proven", name)
		}
		c.shot("tampered-" + strings.ReplaceAll(name, " ", "-"))
		m.change.Store(nil)
		c.press("Check again")
		c.until(`document.querySelector("[data-proof=holds]")`)
	}
	flip := func(text any) string {
		b := []byte(text.(string))
		b[len(b)/2] ^= 1
		if b[len(b)/2] == 'g' || b[len(b)/2] == '`' || b[len(b)/2] == ':' || b[len(b)/2] == '/' {
			b[len(b)/2] = '0'
		}
		return string(b)
	}
	tampered("the leaf", func(d map[string]any) {
		d["leaf"] = strings.Replace(d["leaf"].(string), "payments", "invoices", 1)
	}, "fails")
	tampered("the path", func(d map[string]any) { d["path"].([]any)[0] = strings.Repeat("ab", 32) }, "fails")
	tampered("the checkpoint", func(d map[string]any) {
		lines := strings.Split(d["checkpoint"].(string), "\n")
		lines[1] = "4711"
		d["checkpoint"] = strings.Join(lines, "\n")
	}, "fails")
	tampered("the signature", func(d map[string]any) { d["checkpoint"] = flip(d["checkpoint"]) }, "fails")
	tampered("the consistency", func(d map[string]any) {
		d["consistency"] = []any{strings.Repeat("ab", 32)}
	}, "rewritten")

	// The list shows another event than the log has.
	lie := func(path string, b []byte) []byte {
		if path == "/v1/events" {
			return bytes.ReplaceAll(b, []byte(`payments`), []byte(`invoices`))
		}
		return b
	}
	m.change.Store(&lie)
	c.goTo(event)
	c.until(`document.querySelector("[data-proof=fails]")`)
	c.sees("another event than the log has")
	m.change.Store(nil)

	// The event of a later epoch is proven through the ends of the epochs before.
	for range 2 {
		s.must("admin", "audit", "end-epoch")
	}
	if _, err := cl.Sign(t.Context(), "payments", message("CCCC")); err != nil {
		t.Fatal(err)
	}
	all := s.events()
	c.goTo("/audit/" + strconv.FormatUint(all[len(all)-1].Index, 10))
	c.until(`document.querySelector("[data-proof=holds]")`)
	c.sees("epoch 2 follows epoch 0, of which this browser saw")
	// Another tree of the past, with a later epoch in front of it.
	pinned := mustRun[string](c.browser, `localStorage["countersign-log"]`)
	mustRun[any](c.browser, `(() => {
		const p = JSON.parse(localStorage["countersign-log"]);
		delete p.epochs[2];
		p.epochs[0].root = "00".repeat(32);
		localStorage["countersign-log"] = JSON.stringify(p);
		return true;
	})()`)
	c.press("Check again")
	c.until(`document.querySelector("[data-proof=rewritten]")`)
	mustRun[any](c.browser, `(localStorage["countersign-log"] = %v, true)`, pinned)

	// An older ledger is put back: the log has fewer events than the browser has seen.
	mustRun[any](c.browser, `(() => {
		const p = JSON.parse(localStorage["countersign-log"]);
		p.epochs[0].size += 1000;
		localStorage["countersign-log"] = JSON.stringify(p);
		return true;
	})()`)
	c.goTo(event)
	c.until(`document.querySelector("[data-proof=rewritten]")`)
	c.sees("The log is not the one that this browser saw before")
	c.shot("rewritten")
	c.checkPage("a rewritten log")
	c.close()
	p.stop()
}

// TestConsoleHostileText has every text of every answer be markup: the pages show it as text.
func TestConsoleHostileText(t *testing.T) {
	s, origin, p := consoleSystem(t)
	m := newMeddler(t, origin)
	c := newConsole(t, origin, m.certificate, m.through()...)
	c.person(s, "ann", "administrator,operator,auditor,approver")
	cl := s.dial()
	if _, err := cl.Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.admin().Propose(t.Context(), api.NewProposal{Act: "peer add", Parameters: []approval.Parameter{
		{Name: "name", Value: "shop"}, {Name: "public_key", Value: strings.Repeat("2b", 32)},
	}}); err != nil {
		t.Fatal(err)
	}
	c.goTo("/")
	c.signIn("ann")
	const markup = `<img src=x onerror="self.owned=1"><script>self.owned=1</script>"'&{{7*7}}` + "\u202egnp.\u200b"
	hostile := func(path string, b []byte) []byte {
		if path == "/v1/me" || path == "/v1/openapi.json" {
			return b // the roles decide what is shown at all
		}
		var doc any
		if json.Unmarshal(b, &doc) != nil {
			return b
		}
		b, _ = json.Marshal(poisoned(doc, markup))
		return b
	}
	m.change.Store(&hostile)
	for _, path := range []string{
		"/", "/alerts", "/figures", "/keys", "/keys/payments", "/peers", "/peers/demo", "/policy", "/policy/edit",
		"/approvals", "/approvals/1", "/operators", "/audit", "/audit/3", "/retention", "/receipts",
	} {
		c.visit(path)
		c.until(`!document.querySelector(".waiting")`)
		if mustRun[bool](c.browser, `!!self.owned || !!document.querySelector("main img, main script")`) {
			t.Errorf("%s: markup of the appliance's answer became elements", path)
		}
		if path == "/audit" || path == "/peers" {
			c.sees(`<img src=x onerror="self.owned=1">`)
			c.sees("U+202E") // the character that turns the text around
			c.shot("hostile" + strings.ReplaceAll(path, "/", "-"))
		}
		for _, each := range mustRun[[]string](c.browser, `self.violations.splice(0)`) {
			t.Errorf("%s: %s", path, each)
		}
	}
	c.close()
	p.stop()
}

// poisoned appends markup to every text of a JSON document that is no id of a page.
func poisoned(v any, markup string) any {
	switch v := v.(type) {
	case string:
		return v + markup
	case []any:
		for i := range v {
			v[i] = poisoned(v[i], markup)
		}
	case map[string]any:
		for name := range v {
			v[name] = poisoned(v[name], markup)
		}
	}
	return v
}

// TestConsoleLink: an administrator makes a link, a person makes a passkey by it in another
// browser, and the proposal names the id that the person's page shows.
func TestConsoleLink(t *testing.T) {
	s, origin, p := consoleSystem(t)
	c := newConsole(t, origin, s.serverCertificate(origin))
	c.person(s, "ann", "administrator,operator,auditor,approver")
	c.goTo("/operators")
	c.signIn("ann")
	c.press("Link for a passkey")
	c.fill("Name", "bob")
	c.fill("auditor", true)
	c.shot("link")
	c.checkPage("a link")
	c.press("Make the link")
	c.until(`document.querySelector("dialog pre")?.textContent.includes("/enrol#")`)
	link := mustRun[string](c.browser, `document.querySelector("dialog pre").textContent`)
	c.press("Close")

	bob := newConsole(t, origin, s.serverCertificate(origin))
	bob.goTo(strings.TrimPrefix(link, origin))
	bob.press("Make the passkey")
	bob.sees("Your passkey is made")
	bob.shot("link-used")
	bob.checkPage("a used link")
	id := mustRun[string](bob.browser, `document.querySelector(".id code").textContent`)
	bob.goTo(strings.TrimPrefix(link, origin)) // a second time
	bob.sees("the link is unknown, used or too old")

	c.press("Look again")
	c.sees("passkey made")
	c.press("Propose")
	c.until(`document.querySelector("dialog[open]").innerText.includes(` + quoted(id) + `)`)
	c.press("Propose")
	c.press("Sign with passkey")
	c.sees("was carried out")
	bob.goTo("/")
	bob.signIn("bob")
	bob.sees("What is watched")
	for _, each := range []*tab{c, bob} {
		each.close()
	}
	p.stop()
}
