package softhsmtests

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	_ "embed"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"countersign/admin/api"
	"countersign/admin/console"
	"countersign/client"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/input"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/chromedp"
)

// hands has functions for tests: a person finds things by their names, and so do the tests.
//
//go:embed testdata/hands.js
var hands string

// tab is a tab of a browser with the console.
type tab struct {
	*browser
	origin string
}

// newConsole starts a Chromium with the console of an appliance.
func newConsole(t testing.TB, origin string, certificate *x509.Certificate, more ...chromedp.ExecAllocatorOption) *tab {
	t.Helper()
	if !console.Built() {
		t.Fatal("the console is not built: scripts/console.sh")
	}
	return (&tab{newBrowserWith(t, more, certificate), origin}).prepare()
}

func (c *tab) prepare() *tab {
	c.t.Helper()
	script := page.AddScriptToEvaluateOnNewDocumentParams{Source: hands}
	if _, err := chromedp.Call(c.ctx, page.AddScriptToEvaluateOnNewDocument, script); err != nil {
		c.t.Fatal(err)
	}
	c.size(1280, 900)
	return c
}

// another opens one more tab of the browser, with the same cookies.
func (c *tab) another() *tab {
	c.t.Helper()
	ctx, closeTab := chromedp.NewContext(c.ctx)
	c.t.Cleanup(closeTab)
	return (&tab{&browser{t: c.t, ctx: ctx, close: closeTab}, c.origin}).prepare()
}

func (c *tab) size(width, height int64) {
	c.t.Helper()
	_, err := chromedp.Call(c.ctx, emulation.SetDeviceMetricsOverride,
		emulation.SetDeviceMetricsOverrideParams{Width: width, Height: height, DeviceScaleFactor: 1})
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *tab) dark(yes bool) {
	c.t.Helper()
	scheme := "light"
	if yes {
		scheme = "dark"
	}
	_, err := chromedp.Call(c.ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
		Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}},
	})
	if err != nil {
		c.t.Fatal(err)
	}
}

// goTo loads an address of the console.
func (c *tab) goTo(path string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.ctx, 30*time.Second)
	defer cancel()
	if err := chromedp.Do(ctx, chromedp.Navigate(c.origin+path)); err != nil {
		c.t.Fatalf("open %s: %v", path, err)
	}
}

// visit goes to an address without a load of the page, as a link of the console does.
func (c *tab) visit(path string) {
	c.t.Helper()
	mustRun[any](c.browser, `hands.visit(%v)`, path)
	c.until(`document.querySelector("h1") && !document.querySelector(".waiting")`)
}

// until waits until a condition of JavaScript holds.
func (c *tab) until(condition string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.ctx, 40*time.Second)
	defer cancel()
	script := "hands.until(() => (" + condition + "), 30000).then(() => true)"
	if _, err := chromedp.Run(ctx, chromedp.Evaluate[bool](script, chromedp.EvalAwaitPromise)); err != nil {
		c.shot("failed")
		c.t.Fatalf("%s: %v", condition, err)
	}
}

func quoted(text string) string {
	b, _ := json.Marshal(text)
	return string(b)
}

// sees waits until the page shows a text.
func (c *tab) sees(text string) {
	c.t.Helper()
	c.until("hands.text().includes(" + quoted(text) + ")")
}

func (c *tab) shows(text string) bool {
	c.t.Helper()
	return mustRun[bool](c.browser, `hands.text().includes(%v)`, text)
}

// press presses the button, link or option whose name begins with a text, as soon as there is one.
func (c *tab) press(name string) {
	c.t.Helper()
	c.until(`hands.pressable(` + quoted(name) + `)`)
	if _, err := run[any](c.browser, `hands.press(%v)`, name); err != nil {
		c.t.Fatal(err)
	}
}

func (c *tab) fill(label string, value any) {
	c.t.Helper()
	c.until(`hands.field(` + quoted(label) + `)`)
	if _, err := run[any](c.browser, `hands.fill(%v, %v)`, label, value); err != nil {
		c.t.Fatal(err)
	}
}

// key types a key, such as / or Enter.
func (c *tab) key(key string) {
	c.t.Helper()
	text := key
	if len(key) > 1 {
		text = map[string]string{"Enter": "\r"}[key]
	}
	codes := map[string]int64{"Enter": 13, "Escape": 27, "Tab": 9, "ArrowDown": 40}
	down, up := input.DispatchKeyEventTypeKeyDown, input.DispatchKeyEventTypeKeyUp
	for _, kind := range []input.DispatchKeyEventType{down, up} {
		params := input.DispatchKeyEventParams{Type: kind, Key: key, WindowsVirtualKeyCode: codes[key]}
		if kind == down {
			params.Text = text
		}
		if _, err := chromedp.Call(c.ctx, input.DispatchKeyEvent, params); err != nil {
			c.t.Fatal(err)
		}
	}
}

// write types a text.
func (c *tab) write(text string) {
	c.t.Helper()
	if _, err := chromedp.Call(c.ctx, input.InsertText, input.InsertTextParams{Text: text}); err != nil {
		c.t.Fatal(err)
	}
}

// shot writes a screenshot into the folder SCREENSHOTS, if there is one.
func (c *tab) shot(name string) {
	c.t.Helper()
	folder := os.Getenv("SCREENSHOTS")
	if folder == "" {
		return
	}
	ctx, cancel := context.WithTimeout(c.ctx, 30*time.Second)
	defer cancel()
	whole := true
	made, err := chromedp.Call(ctx, page.CaptureScreenshot, page.CaptureScreenshotParams{CaptureBeyondViewport: &whole})
	if err != nil {
		c.t.Error(err)
		return
	}
	os.MkdirAll(folder, 0o755)
	if err := os.WriteFile(filepath.Join(folder, name+".png"), []byte(made.Data), 0o644); err != nil {
		c.t.Error(err)
	}
}

// checkPage fails the test for a violation of the Content-Security-Policy, an error of a script, or
// something serious that axe-core finds.
func (c *tab) checkPage(of string) {
	c.t.Helper()
	for _, each := range mustRun[[]string](c.browser, `[...self.violations, ...self.failures]`) {
		c.t.Errorf("%s: %s", of, each)
	}
	axe, err := os.ReadFile("../admin/console/node_modules/axe-core/axe.min.js")
	if err != nil {
		c.t.Fatalf("axe-core is missing: scripts/console.sh: %v", err)
	}
	ctx, cancel := context.WithTimeout(c.ctx, time.Minute)
	defer cancel()
	if _, err := chromedp.Run(ctx, chromedp.Evaluate[any](string(axe)+";0")); err != nil {
		c.t.Fatal(err)
	}
	found, err := chromedp.Run(ctx, chromedp.Evaluate[[]string](`hands.faults()`, chromedp.EvalAwaitPromise))
	if err != nil {
		c.t.Fatalf("%s: axe-core: %v", of, err)
	}
	for _, each := range found {
		c.t.Errorf("%s: axe-core: %s", of, each)
	}
	mustRun[any](c.browser, `(self.violations = [], self.failures = [], true)`) // axe-core has caused others
	c.checkWidth(of)
}

// checkWidth fails the test for a page that is wider than its window.
func (c *tab) checkWidth(of string) {
	c.t.Helper()
	if wide := mustRun[int](c.browser, `document.documentElement.scrollWidth - innerWidth`); wide > 0 {
		c.t.Errorf("%s: the page is %d pixels wider than the window", of, wide)
	}
}

// TestConsoleFirstStart goes from an appliance without operators to the first signature, which the
// page shows without a reload.
func TestConsoleFirstStart(t *testing.T) {
	needRoot(t, "the link of the first operator")
	s := newSystem(t)
	origin := s.configureHTTPS()
	p := s.start(exec.Command(filepath.Join(bin, "countersignd"), "serve", "--config", s.path("countersign.toml")))
	link := strings.TrimSpace(s.must("admin", "operator", "first", "ann", "--link"))
	if !strings.HasPrefix(link, origin+"/enrol#") {
		t.Fatalf("the link is %q", link)
	}
	c := newConsole(t, origin, s.plainCertificate(origin))
	c.goTo("/")
	c.sees("countersign admin operator first NAME --link")
	c.shot("first")
	c.checkPage("a new appliance")

	c.goTo(strings.TrimPrefix(link, origin))
	c.sees("Make your passkey")
	if at := mustRun[string](c.browser, `location.href`); strings.Contains(at, "#") {
		t.Errorf("the secret stays in the address: %s", at)
	}
	c.shot("enrol")
	c.checkPage("enrol")
	c.press("Make the passkey")
	c.sees("You are the first administrator")
	c.press("Sign in with the passkey")
	c.sees("First steps")
	c.shot("start")
	c.checkPage("overview of a new appliance")

	// The link works once.
	_, secret, _ := strings.Cut(link, "#")
	if r := postJSON(t, s, "/v1/links/open", api.OpenLink{Secret: secret}); r.StatusCode != http.StatusUnauthorized {
		t.Errorf("a used link: %s", r.Status)
	}

	c.press("Keys")
	c.press("Create a key")
	c.fill("Name", "payments")
	c.shot("create-key")
	c.checkPage("create a key")
	c.press("Create")
	c.sees("Line of succession")
	c.shot("key")
	c.checkPage("a key")

	public := strings.TrimSpace(s.must("keygen", s.path("demo.key")))
	c.press("Peers")
	c.press("Enrol a peer")
	c.fill("Name", "demo")
	c.fill("Public key", public)
	c.press("Propose")
	c.sees("What is signed")
	c.shot("sign")
	c.checkPage("sign")
	c.press("Sign with passkey")
	c.sees("Its client")
	c.shot("peer")
	c.checkPage("a peer")

	// The page has all that the payment server needs, to copy.
	c.sees("COUNTERSIGN_SERVER_KEY=")
	text := mustRun[string](c.browser, `hands.text()`)
	copied := regexp.MustCompile(`COUNTERSIGN_SERVER_KEY=(\w+)`).FindStringSubmatch(text)

	c.press("Overview")
	c.sees("See its first signature")
	id, err := client.ReadIdentity(s.path("demo.key"))
	if err != nil {
		t.Fatal(err)
	}
	server, err := client.ParseKey(copied[1])
	if err != nil {
		t.Fatal(err)
	}
	cl, err := client.Dial(t.Context(), client.Config{Address: s.listen, ServerKey: server, Identity: id})
	if err != nil {
		t.Fatal(err)
	}
	defer cl.Close()
	if _, err := cl.Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Fatal(err)
	}
	c.until(`!hands.text().includes("See its first signature")`)
	c.shot("overview")
	c.checkPage("overview")
	c.close()
	p.stop()
}

// plainCertificate fetches the listener's certificate without a check of it.
func (s *system) plainCertificate(origin string) *x509.Certificate {
	s.t.Helper()
	conn, err := tls.Dial("tcp", strings.TrimPrefix(origin, "https://"), &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0]
}

// postJSON sends a document to the Unix socket without a session.
func postJSON(t testing.TB, s *system, path string, doc any) *http.Response {
	t.Helper()
	b, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	c := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", s.path("admin.sock"))
	}}}
	r, err := c.Post("http://countersign"+path, "application/json", strings.NewReader(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	r.Body.Close()
	return r
}
