package softhsmtests

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"countersign/admin/api"
	"countersign/approval"

	"github.com/chromedp/cdproto/webauthn"
	"github.com/chromedp/chromedp"
)

// browser is a Chromium with a virtual authenticator, on one page.
type browser struct {
	t             testing.TB
	ctx           context.Context
	close         func()
	authenticator webauthn.AuthenticatorID
}

// library is what a page of the appliance will do: it asks the API, and has the browser's passkeys answer.
const library = `
const ask = async (method, path, body) => {
	const headers = {"Content-Type": "application/json", "Countersign-Page": sessionStorage.page ?? ""};
	const r = await fetch(path, {method, headers, body: body && JSON.stringify(body)}), text = await r.text(), answer = text ? JSON.parse(text) : null;
	if (answer?.page) sessionStorage.page = answer.page;
	return {status: r.status, type: r.headers.get("Content-Type"), body: answer};
};
const must = async (...a) => {
	const r = await ask(...a);
	if (r.status >= 300) throw new Error(a[0] + " " + a[1] + ": " + JSON.stringify(r));
	return r.body;
};
const make = async (name, change) => {
	const o = await must("POST", "/v1/passkeys/options", {operator: name});
	change?.(o.public_key);
	const c = await navigator.credentials.create({publicKey: PublicKeyCredential.parseCreationOptionsFromJSON(o.public_key)});
	return {challenge: o.challenge, credential: c.toJSON()};
};
const prove = async (options, change) => {
	change?.(options);
	const a = (await navigator.credentials.get({publicKey: PublicKeyCredential.parseRequestOptionsFromJSON(options)})).toJSON();
	return {credential: a.id, assertion: {authenticator_data: a.response.authenticatorData, client_data_json: a.response.clientDataJSON, signature: a.response.signature}};
};
const challenge = async (wanted, change) => {
	const c = await must("POST", "/v1/challenges", wanted);
	return {challenge: c.id, proof: await prove(c.public_key, change)};
};
const signIn = async (operator, change) => ask("POST", "/v1/sessions", await challenge({purpose: "sign-in", operator}, change));
const approve = async (id) => {
	const p = await must("GET", "/v1/proposals/" + id);
	const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(p.text)));
	const options = {challenge: digest.toBase64({alphabet: "base64url", omitPadding: true}), rpId: location.hostname, userVerification: "required"};
	return ask("POST", "/v1/proposals/" + id + "/approvals", {proof: await prove(options)});
};
const discouraged = o => Object.assign(o.authenticatorSelection ?? o, {userVerification: "discouraged", residentKey: "discouraged"});
`

// newBrowser starts a Chromium that takes TLS certificates with these keys for good, and no others.
func newBrowser(t testing.TB, keys ...*x509.Certificate) *browser {
	t.Helper()
	path, err := exec.LookPath("chromium")
	if err != nil {
		if os.Getenv("REQUIRE_DEVICES") == "1" {
			t.Fatalf("Chromium is required and missing: %v", err)
		}
		t.Skipf("Chromium is not installed (apt-get install chromium): %v", err)
	}
	var pins []string
	for _, c := range keys {
		pin := sha256.Sum256(c.RawSubjectPublicKeyInfo)
		pins = append(pins, base64.StdEncoding.EncodeToString(pin[:]))
	}
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(path), chromedp.UserDataDir(t.TempDir()),
		chromedp.Flag("ignore-certificate-errors-spki-list", strings.Join(pins, ",")))
	if os.Geteuid() == 0 {
		options = append(options, chromedp.NoSandbox)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 3*time.Minute) // it lives until the test's cleanup
	ctx, end := chromedp.NewExecAllocator(ctx, options...)
	ctx, closeTab := chromedp.NewContext(ctx)
	b := &browser{t: t, ctx: ctx, close: func() { closeTab(); end(); cancel() }}
	t.Cleanup(b.close)
	if _, err := chromedp.Call(ctx, webauthn.Enable, webauthn.EnableParams{}); err != nil {
		t.Fatalf("start Chromium: %v", err)
	}
	made, err := chromedp.Call(ctx, webauthn.AddVirtualAuthenticator, webauthn.AddVirtualAuthenticatorParams{Options: &webauthn.VirtualAuthenticatorOptions{
		Protocol: webauthn.AuthenticatorProtocolCtap2, Transport: webauthn.AuthenticatorTransportInternal,
		HasResidentKey: true, HasUserVerification: true, IsUserVerified: true, AutomaticPresenceSimulation: true}})
	if err != nil {
		t.Fatal(err)
	}
	b.authenticator = made.AuthenticatorID
	return b
}

// setUserVerified says whether the authenticator finds its user to be who he should be; admits, whether it tells the server so.
func (b *browser) setUserVerified(yes bool) {
	b.t.Helper()
	if _, err := chromedp.Call(b.ctx, webauthn.SetUserVerified, webauthn.SetUserVerifiedParams{AuthenticatorID: b.authenticator, IsUserVerified: yes}); err != nil {
		b.t.Fatal(err)
	}
}

func (b *browser) setReportsVerified(yes bool) {
	b.t.Helper()
	no := !yes
	if _, err := chromedp.Call(b.ctx, webauthn.SetResponseOverrideBits, webauthn.SetResponseOverrideBitsParams{AuthenticatorID: b.authenticator, IsBadUV: &no}); err != nil {
		b.t.Fatal(err)
	}
}

func (b *browser) open(url string) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, 30*time.Second)
	defer cancel()
	if err := chromedp.Do(ctx, chromedp.Navigate(url)); err != nil {
		b.t.Fatalf("open %s: %v", url, err)
	}
	if _, err := chromedp.Run(ctx, chromedp.Evaluate[any](library+"; 0")); err != nil {
		b.t.Fatal(err)
	}
}

// answer is what a page was answered.
type answer struct {
	Status int
	Type   string
	Body   json.RawMessage
}

func (a answer) String() string { return fmt.Sprintf("%d %.300s", a.Status, a.Body) }

func (a answer) code() string {
	var e api.Error
	json.Unmarshal(a.Body, &e)
	return e.Code
}

// run evaluates what comes to be a value of T. In it, each %v is an argument as JSON.
func run[T any](b *browser, script string, args ...any) (T, error) {
	b.t.Helper()
	for i, each := range args {
		text, err := json.Marshal(each)
		if err != nil {
			b.t.Fatal(err)
		}
		args[i] = string(text)
	}
	ctx, cancel := context.WithTimeout(b.ctx, 30*time.Second)
	defer cancel()
	return chromedp.Run(ctx, chromedp.Evaluate[T](fmt.Sprintf(script, args...), chromedp.EvalAwaitPromise))
}

func mustRun[T any](b *browser, script string, args ...any) T {
	b.t.Helper()
	v, err := run[T](b, script, args...)
	if err != nil {
		b.t.Fatalf("%s: %v", script, err)
	}
	return v
}

// configureHTTPS configures the HTTPS listener, beside the socket, makes its keys, and returns its address.
func (s *system) configureHTTPS() (origin string) {
	s.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") // a port that is free now
	if err != nil {
		s.t.Fatal(err)
	}
	l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	s.edit("countersign.toml", `admin_socket = "admin.sock"`, "admin_socket = \"admin.sock\"\nadmin_https = \"127.0.0.1:"+port+`"`)
	if out, code := s.daemon("init"); code != 0 {
		s.t.Fatalf("init: %d\n%s", code, out)
	}
	return "https://localhost:" + port
}

// dialTLS is a connection to the HTTPS listener, whose certificate the appliance's own CA must have signed.
func (s *system) dialTLS(origin string) *tls.Conn {
	s.t.Helper()
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(s.caCertificate())
	conn, err := tls.Dial("tcp", strings.TrimPrefix(origin, "https://"), &tls.Config{RootCAs: pool})
	if err != nil {
		s.t.Fatal(err)
	}
	return conn
}

// serverCertificate is what the HTTPS listener shows.
func (s *system) serverCertificate(origin string) *x509.Certificate {
	s.t.Helper()
	conn := s.dialTLS(origin)
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0]
}

// caCertificate is the appliance's own CA.
func (s *system) caCertificate() []byte {
	s.t.Helper()
	st, err := s.admin().TLS(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	return []byte(st.CA)
}

// TestPasskey has a browser make a passkey, and do with it all that an operator does by hand: sign in, approve, confirm.
func TestPasskey(t *testing.T) {
	s := newSystem(t)
	origin := s.configureHTTPS()
	p := s.serve()
	s.enrol()
	var shown atomic.Value // what the browser shows to another origin of the same host
	foreign := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		shown.Store(r.Header.Get("Cookie"))
		w.Write([]byte("<p>elsewhere"))
	}))
	t.Cleanup(foreign.Close)
	b := newBrowser(t, s.serverCertificate(origin), foreign.Certificate())
	_, port, _ := net.SplitHostPort(foreign.Listener.Addr().String())
	elsewhere := "https://localhost:" + port // of the same relying party, since that knows no ports

	b.open(origin + "/v1/health/alive")

	// A passkey, which an administrator gives to a new operator.
	b.setReportsVerified(false)
	if a := mustRun[answer](b, `make("alice", discouraged).then(r => ask("POST", "/v1/passkeys", r))`); a.Status != 401 || a.code() != "not_proven" {
		t.Errorf("a passkey whose user was not verified: %v", a)
	}
	b.setReportsVerified(true)
	b.setUserVerified(false)
	if _, err := run[answer](b, `make("alice")`); err == nil || !strings.Contains(err.Error(), "NotAllowedError") {
		t.Errorf("the options let an authenticator do without verification: %v", err)
	}
	b.setUserVerified(true)
	made := mustRun[json.RawMessage](b, `make("alice")`)
	var credential approval.Credential
	if a := mustRun[answer](b, `ask("POST", "/v1/passkeys", %v)`, made); a.Status != 200 || json.Unmarshal(a.Body, &credential) != nil || credential.Check() != nil {
		t.Fatalf("%v", a)
	}
	if a := mustRun[answer](b, `signIn("alice")`); a.code() != "not_proven" {
		t.Errorf("a sign-in by a passkey that nobody has: %v", a)
	}
	text, err := json.Marshal(credential)
	if err != nil {
		t.Fatal(err)
	}
	s.proposeAndApprove("operator add", "", approval.Parameter{Name: "name", Value: "alice"}, approval.Parameter{Name: "roles", Value: "operator,approver"}, approval.Parameter{Name: "credential", Value: string(text)})

	// She signs in. The page never has the token.
	b.setUserVerified(false)
	if a := mustRun[answer](b, `signIn("alice", discouraged)`); a.code() != "not_proven" {
		t.Errorf("a sign-in without verification: %v", a)
	}
	b.setUserVerified(true)
	if a := mustRun[answer](b, `ask("GET", "/v1/me")`); a.code() != "signed_out" || a.Type != "application/problem+json" {
		t.Errorf("signed out: %v", a)
	}
	a := mustRun[answer](b, `signIn("alice")`)
	var in api.SignedIn
	if json.Unmarshal(a.Body, &in); a.Status != 201 || in.Operator != "alice" || in.Credential != credential.ID {
		t.Fatalf("sign in: %v", a)
	}
	if in.Token != "" {
		t.Error("a page is told the token")
	}
	if cookies := mustRun[string](b, `document.cookie`); cookies != "" {
		t.Errorf("a page can read the cookie: %q", cookies)
	}
	if a := mustRun[answer](b, `ask("GET", "/v1/me")`); a.Status != 200 || !strings.Contains(string(a.Body), `"name":"alice"`) {
		t.Errorf("me: %v", a)
	}

	// She approves.
	proposal, err := s.admin().Propose(t.Context(), api.NewProposal{Act: "peer add", Parameters: []approval.Parameter{{Name: "name", Value: "shop"}, {Name: "public_key", Value: strings.Repeat("ab", 32)}}})
	if err != nil {
		t.Fatal(err)
	}
	if a := mustRun[answer](b, `approve(%v)`, proposal.ID); a.Status != 200 || !strings.Contains(string(a.Body), `"state":"done"`) {
		t.Errorf("approve: %v", a)
	}
	if a := mustRun[answer](b, `approve(%v)`, proposal.ID); a.code() != "conflict" {
		t.Errorf("approve once more: %v", a)
	}

	// She confirms that a key may sign.
	if a := mustRun[answer](b, `ask("PATCH", "/v1/keys/payments/line", {presence: 300})`); a.Status != 200 {
		t.Fatalf("%v", a)
	}
	const confirm = `challenge({purpose: "presence", key: "payments"}).then(c => ask("POST", "/v1/keys/payments/confirm", c))`
	if a := mustRun[answer](b, confirm); a.Status != 200 || !strings.Contains(string(a.Body), `"until":`) {
		t.Errorf("confirm: %v", a)
	}
	if line, err := s.admin().Line(t.Context(), "payments"); err != nil || line.Confirmed <= time.Now().Unix() {
		t.Errorf("%+v, %v", line, err)
	}

	// A page of another origin: it can ask neither the API nor the passkey, though the browser lets it do the latter.
	challenge := mustRun[api.Challenge](b, `must("POST", "/v1/challenges", {purpose: "sign-in", operator: "alice"})`)
	b.open(elsewhere)
	if _, err := run[answer](b, `fetch(%v)`, origin+"/v1/me"); err == nil {
		t.Error("another origin can read the API")
	}
	cookie, _ := shown.Load().(string)
	name, half, _ := strings.Cut(cookie, "=")
	if name != "__Host-countersign" {
		t.Errorf("the browser shows %q: the test proves nothing", cookie)
	}
	stolen, err := api.NewHTTPSClient(origin, s.caCertificate())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stolen.WithToken(half).Me(t.Context()); err == nil {
		t.Error("the cookie, which the browser shows to any port of the host, is a token")
	}
	if _, err := run[string](b, `fetch(%v, {method: "POST", mode: "no-cors", credentials: "include", headers: {"Content-Type": "text/plain"}, body: '{"reason":"mine"}'}).then(r => r.type)`, origin+"/v1/lock"); err != nil {
		t.Error(err) // which says nothing of what came of it
	}
	proof := mustRun[approval.Proof](b, `prove(%v)`, challenge.PublicKey)
	b.open(origin + "/v1/health/alive")
	if h, err := s.admin().Health(t.Context()); err != nil || h.Locked {
		t.Errorf("another origin locks the appliance: %+v, %v", h, err)
	}
	if a := mustRun[answer](b, `ask("POST", "/v1/sessions", %v)`, api.Proven{Challenge: challenge.ID, Proof: proof}); a.code() != "not_proven" {
		t.Errorf("another origin asks the passkey: %v", a)
	}

	// She signs out.
	if a := mustRun[answer](b, `ask("DELETE", "/v1/sessions/current")`); a.Status != 204 {
		t.Errorf("sign out: %v", a)
	}
	if a := mustRun[answer](b, `ask("GET", "/v1/me")`); a.code() != "signed_out" {
		t.Errorf("signed out: %v", a)
	}

	// An auditor sees what the passkey has approved.
	s.must("admin", "audit", "export", "log")
	var report struct {
		Valid     bool
		Proposals []struct {
			ID        uint64
			Approvals []struct{ Operator, Credential string }
		}
	}
	out := s.must("audit", "approvals", "log", "--key", strings.TrimSpace(s.must("admin", "audit", "key")), "--json")
	if err := json.Unmarshal([]byte(out), &report); err != nil || !report.Valid {
		t.Fatalf("%v, %s", err, out)
	}
	found := false
	for _, each := range report.Proposals {
		found = found || each.ID == proposal.ID && len(each.Approvals) == 1 && each.Approvals[0].Operator == "alice" && each.Approvals[0].Credential == credential.ID
	}
	if !found {
		t.Errorf("it was not alice's passkey that approved of proposal %d: %s", proposal.ID, out)
	}
	b.close() // a browser opens connections ahead of need, for which the daemon would wait 5 s
	p.stop()
}
