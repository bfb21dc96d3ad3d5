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
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"countersign/admin/api"
	"countersign/approval"
	"countersign/internal/scantest"

	"github.com/chromedp/cdproto/webauthn"
	"github.com/chromedp/chromedp"
)

// browser is a Chromium with one page and a virtual WebAuthn authenticator.
type browser struct {
	t             testing.TB
	ctx           context.Context
	close         func()
	authenticator webauthn.AuthenticatorID
}

// library is the JavaScript that a page of the appliance will have: calls of the admin API, and
// assertions by the browser's passkeys.
const library = `
const ask = async (method, path, body) => {
	const headers = {"Content-Type": "application/json", "Countersign-Page": sessionStorage.page ?? ""};
	const r = await fetch(path, {method, headers, body: body && JSON.stringify(body)});
	const text = await r.text(), answer = text ? JSON.parse(text) : null;
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
	const publicKey = PublicKeyCredential.parseCreationOptionsFromJSON(o.public_key);
	const c = await navigator.credentials.create({publicKey});
	return {challenge: o.challenge, credential: c.toJSON()};
};
const prove = async (options, change) => {
	change?.(options);
	const publicKey = PublicKeyCredential.parseRequestOptionsFromJSON(options);
	const {id, response} = (await navigator.credentials.get({publicKey})).toJSON();
	const {authenticatorData, clientDataJSON, signature} = response;
	const assertion = {authenticator_data: authenticatorData, client_data_json: clientDataJSON, signature};
	return {credential: id, assertion};
};
const challenge = async (wanted, change) => {
	const c = await must("POST", "/v1/challenges", wanted);
	return {challenge: c.id, proof: await prove(c.public_key, change)};
};
const signIn = async (operator, change) =>
	ask("POST", "/v1/sessions", await challenge({purpose: "sign-in", operator}, change));
const approve = async (id) => {
	const p = await must("GET", "/v1/proposals/" + id);
	const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(p.text)));
	const challenge = digest.toBase64({alphabet: "base64url", omitPadding: true});
	const options = {challenge, rpId: location.hostname, userVerification: "required"};
	return ask("POST", "/v1/proposals/" + id + "/approvals", {proof: await prove(options)});
};
const discouraged = o => Object.assign(
	o.authenticatorSelection ?? o, {userVerification: "discouraged", residentKey: "discouraged"});
`

// newBrowser starts a Chromium that accepts TLS certificates with the public keys of the given
// certificates, although no CA of the browser has signed them.
func newBrowser(t testing.TB, keys ...*x509.Certificate) *browser {
	return newBrowserWith(t, nil, keys...)
}

// newBrowserWith is newBrowser with further options of Chromium.
func newBrowserWith(
	t testing.TB, more []chromedp.ExecAllocatorOption, keys ...*x509.Certificate,
) *browser {
	t.Helper()
	path := needTool(t, "chromium", "chromium")
	var pins []string
	for _, c := range keys {
		pin := sha256.Sum256(c.RawSubjectPublicKeyInfo)
		pins = append(pins, base64.StdEncoding.EncodeToString(pin[:]))
	}
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(path),
		chromedp.UserDataDir(t.TempDir()),
		chromedp.Flag("ignore-certificate-errors-spki-list", strings.Join(pins, ",")))
	if os.Geteuid() == 0 {
		options = append(options, chromedp.NoSandbox)
	}
	options = append(options, more...)
	// The test's context ends before the cleanup, and the browser must not.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 8*time.Minute)
	ctx, end := chromedp.NewExecAllocator(ctx, options...)
	ctx, closeTab := chromedp.NewContext(ctx)
	b := &browser{t: t, ctx: ctx, close: func() { closeTab(); end(); cancel() }}
	t.Cleanup(b.close)
	if _, err := chromedp.Call(ctx, webauthn.Enable, webauthn.EnableParams{}); err != nil {
		t.Fatalf("start Chromium: %v", err)
	}
	authenticator := webauthn.AddVirtualAuthenticatorParams{Options: &webauthn.VirtualAuthenticatorOptions{
		Protocol: webauthn.AuthenticatorProtocolCtap2, Transport: webauthn.AuthenticatorTransportInternal,
		HasResidentKey: true, HasUserVerification: true, IsUserVerified: true, AutomaticPresenceSimulation: true,
	}}
	made, err := chromedp.Call(ctx, webauthn.AddVirtualAuthenticator, authenticator)
	if err != nil {
		t.Fatal(err)
	}
	b.authenticator = made.AuthenticatorID
	return b
}

// setUserVerified sets whether the authenticator's verification of the user succeeds.
func (b *browser) setUserVerified(yes bool) {
	b.t.Helper()
	params := webauthn.SetUserVerifiedParams{AuthenticatorID: b.authenticator, IsUserVerified: yes}
	if _, err := chromedp.Call(b.ctx, webauthn.SetUserVerified, params); err != nil {
		b.t.Fatal(err)
	}
}

// setReportsVerified sets whether the authenticator sets the flag UV (user verified) in its
// responses. With false, the flag is absent though the verification succeeds.
func (b *browser) setReportsVerified(yes bool) {
	b.t.Helper()
	no := !yes
	params := webauthn.SetResponseOverrideBitsParams{AuthenticatorID: b.authenticator, IsBadUV: &no}
	if _, err := chromedp.Call(b.ctx, webauthn.SetResponseOverrideBits, params); err != nil {
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

// answer is an HTTP response of the admin API to a page.
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

// run evaluates JavaScript in the page and awaits its promise, whose value is decoded into T. Each
// %v in the script stands for an argument in JSON.
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

// ofLocalhost returns an address to which the name localhost leads, with a port that is free now.
func ofLocalhost(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// configureHTTPS configures the HTTPS listener beside the admin socket, has countersignd init
// create the listener's keys, and returns the listener's origin, such as https://localhost:7780.
func (s *system) configureHTTPS() (origin string) {
	s.t.Helper()
	address := ofLocalhost(s.t)
	_, port, _ := net.SplitHostPort(address)
	s.edit("countersign.toml", `admin_socket = "admin.sock"`,
		"admin_socket = \"admin.sock\"\nadmin_https = \""+address+`"`)
	if out, code := s.daemon("init"); code != 0 {
		s.t.Fatalf("init: %d\n%s", code, out)
	}
	return "https://localhost:" + port
}

// dialTLS connects to the HTTPS listener. Only a certificate of the appliance's own CA is accepted.
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

// serverCertificate fetches the certificate of the HTTPS listener.
func (s *system) serverCertificate(origin string) *x509.Certificate {
	s.t.Helper()
	conn := s.dialTLS(origin)
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0]
}

// caCertificate fetches the certificate of the appliance's own CA, in PEM.
func (s *system) caCertificate() []byte {
	s.t.Helper()
	st, err := s.admin().TLS(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	return []byte(st.CA)
}

// TestPasskey has a browser create a passkey, sign in, approve a proposal and confirm presence with
// the passkey. A page of another origin can do nothing of this.
func TestPasskey(t *testing.T) {
	s := newSystem(t)
	origin := s.configureHTTPS()
	p := s.serve()
	s.enrol()
	var shown atomic.Value // the Cookie header that the browser sends to another origin of the same host
	foreign := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		shown.Store(r.Header.Get("Cookie"))
		w.Write([]byte("<p>elsewhere"))
	}))
	t.Cleanup(foreign.Close)
	b := newBrowser(t, s.serverCertificate(origin), foreign.Certificate())
	_, port, _ := net.SplitHostPort(foreign.Listener.Addr().String())
	elsewhere := "https://localhost:" + port // the same relying party, since an RP ID has no port

	b.open(origin + "/v1/health/alive")

	// The browser creates a passkey, and an administrator enrols an operator with the passkey.
	b.setReportsVerified(false)
	a := mustRun[answer](b, `make("alice", discouraged).then(r => ask("POST", "/v1/passkeys", r))`)
	if a.Status != 401 || a.code() != "not_proven" {
		t.Errorf("a passkey whose user was not verified: %v", a)
	}
	b.setReportsVerified(true)
	b.setUserVerified(false)
	if _, err := run[answer](b, `make("alice")`); err == nil || !strings.Contains(err.Error(), "NotAllowedError") {
		t.Errorf("the options allow an authenticator to leave out the verification: %v", err)
	}
	b.setUserVerified(true)
	made := mustRun[json.RawMessage](b, `make("alice")`)
	var credential approval.Credential
	a = mustRun[answer](b, `ask("POST", "/v1/passkeys", %v)`, made)
	if a.Status != 200 || json.Unmarshal(a.Body, &credential) != nil || credential.Check() != nil {
		t.Fatalf("%v", a)
	}
	if a := mustRun[answer](b, `signIn("alice")`); a.code() != "not_proven" {
		t.Errorf("a sign-in by a passkey that no operator has: %v", a)
	}
	text, err := json.Marshal(credential)
	if err != nil {
		t.Fatal(err)
	}
	s.proposeAndApprove("operator add", "",
		approval.Parameter{Name: "name", Value: "alice"},
		approval.Parameter{Name: "roles", Value: "operator,approver"},
		approval.Parameter{Name: "credential", Value: string(text)})

	// Alice signs in. The session is in a cookie, and the page never sees the token.
	b.setUserVerified(false)
	if a := mustRun[answer](b, `signIn("alice", discouraged)`); a.code() != "not_proven" {
		t.Errorf("a sign-in without verification: %v", a)
	}
	b.setUserVerified(true)
	a = mustRun[answer](b, `ask("GET", "/v1/me")`)
	if a.code() != "signed_out" || a.Type != "application/problem+json" {
		t.Errorf("signed out: %v", a)
	}
	a = mustRun[answer](b, `signIn("alice")`)
	var in api.SignedIn
	if json.Unmarshal(a.Body, &in); a.Status != 201 || in.Operator != "alice" || in.Credential != credential.ID {
		t.Fatalf("sign in: %v", a)
	}
	scantest.Secret(scantest.SessionToken, []byte(in.Page))
	if in.Token != "" {
		t.Error("the answer to a page has the token")
	}
	if cookies := mustRun[string](b, `document.cookie`); cookies != "" {
		t.Errorf("a page can read the cookie: %q", cookies)
	}
	a = mustRun[answer](b, `ask("GET", "/v1/me")`)
	if a.Status != 200 || !strings.Contains(string(a.Body), `"name":"alice"`) {
		t.Errorf("me: %v", a)
	}

	// Alice approves.
	proposal, err := s.admin().Propose(t.Context(), api.NewProposal{Act: "peer add", Parameters: []approval.Parameter{
		{Name: "name", Value: "shop"}, {Name: "public_key", Value: strings.Repeat("2b", 32)},
	}})
	if err != nil {
		t.Fatal(err)
	}
	a = mustRun[answer](b, `approve(%v)`, proposal.ID)
	if a.Status != 200 || !strings.Contains(string(a.Body), `"state":"done"`) {
		t.Errorf("approve: %v", a)
	}
	if a := mustRun[answer](b, `approve(%v)`, proposal.ID); a.code() != "conflict" {
		t.Errorf("approve once more: %v", a)
	}

	// Alice confirms her presence, without which the key may not sign.
	if a := mustRun[answer](b, `ask("PATCH", "/v1/keys/payments/line", {presence: 300})`); a.Status != 200 {
		t.Fatalf("%v", a)
	}
	const confirm = `challenge({purpose: "presence", key: "payments"})
		.then(c => ask("POST", "/v1/keys/payments/confirm", c))`
	if a := mustRun[answer](b, confirm); a.Status != 200 || !strings.Contains(string(a.Body), `"until":`) {
		t.Errorf("confirm: %v", a)
	}
	if line, err := s.admin().Line(t.Context(), "payments"); err != nil || line.Confirmed <= time.Now().Unix() {
		t.Errorf("%+v, %v", line, err)
	}

	// A page of another origin can neither read the API nor use the passkey. The browser does give
	// an assertion to the page, since the relying party is the same; the server refuses the
	// assertion.
	challenge := mustRun[api.Challenge](b, `must("POST", "/v1/challenges", {purpose: "sign-in", operator: "alice"})`)
	b.open(elsewhere)
	if _, err := run[answer](b, `fetch(%v)`, origin+"/v1/me"); err == nil {
		t.Error("another origin can read the API")
	}
	cookie, _ := shown.Load().(string)
	name, half, _ := strings.Cut(cookie, "=")
	scantest.Secret(scantest.SessionToken, []byte(half))
	if name != "__Host-countersign" {
		t.Errorf("the browser sends the cookie %q: the test proves nothing", cookie)
	}
	stolen, err := api.NewHTTPSClient(origin, s.caCertificate())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stolen.WithToken(half).Me(t.Context()); err == nil {
		t.Error("the cookie, which the browser sends to any port of the host, is a token")
	}
	const lock = `fetch(%v, {
		method: "POST", mode: "no-cors", credentials: "include",
		headers: {"Content-Type": "text/plain"}, body: '{"reason":"mine"}',
	}).then(r => r.type)`
	if _, err := run[string](b, lock, origin+"/v1/lock"); err != nil {
		t.Error(err) // the request was not sent; the check of its effect is below
	}
	proof := mustRun[approval.Proof](b, `prove(%v)`, challenge.PublicKey)
	b.open(origin + "/v1/health/alive")
	if h, err := s.admin().Health(t.Context()); err != nil || h.Locked {
		t.Errorf("another origin locks the appliance: %+v, %v", h, err)
	}
	a = mustRun[answer](b, `ask("POST", "/v1/sessions", %v)`, api.Proven{Challenge: challenge.ID, Proof: proof})
	if a.code() != "not_proven" {
		t.Errorf("a sign-in by an assertion for another origin: %v", a)
	}

	// Alice signs out.
	if a := mustRun[answer](b, `ask("DELETE", "/v1/sessions/current")`); a.Status != 204 {
		t.Errorf("sign out: %v", a)
	}
	if a := mustRun[answer](b, `ask("GET", "/v1/me")`); a.code() != "signed_out" {
		t.Errorf("signed out: %v", a)
	}

	// An auditor finds the passkey's approval in the exported log.
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
		found = found || each.ID == proposal.ID && len(each.Approvals) == 1 &&
			each.Approvals[0].Operator == "alice" && each.Approvals[0].Credential == credential.ID
	}
	if !found {
		t.Errorf("the log has no approval of proposal %d by alice's passkey: %s", proposal.ID, out)
	}
	b.close() // a browser opens spare connections, for which a stop of the daemon would wait 5 s
	p.stop()
}

// TestPasskeysOnOneAuthenticator makes three passkeys of an operator on two appliances by one
// authenticator, which has room for three. The appliances are one relying party, localhost. No
// passkey replaces another, the browser can tell them apart, and an operator who is signed in gets
// no further one.
func TestPasskeysOnOneAuthenticator(t *testing.T) {
	type place struct {
		*system
		origin, name string // the name of the appliance
		wanted       int    // passkeys
		passkeys     []approval.Credential
	}
	var places []*place
	var certificates []*x509.Certificate
	for wanted := 1; wanted <= 2; wanted++ {
		at := &place{system: newSystem(t), wanted: wanted}
		at.origin = at.configureHTTPS()
		p := at.serve()
		t.Cleanup(p.stop)
		at.name, _, _ = strings.Cut(at.must("admin", "audit", "key"), "/0+")
		places, certificates = append(places, at), append(certificates, at.serverCertificate(at.origin))
	}
	b := newBrowser(t, certificates...)
	for _, at := range places {
		b.open(at.origin + "/v1/health/alive")
		act, parameter := "operator add", []approval.Parameter{{Name: "roles", Value: "operator,approver"}}
		for range at.wanted {
			c := mustRun[approval.Credential](b, `make("alice").then(r => must("POST", "/v1/passkeys", r))`)
			text, err := json.Marshal(c)
			if err != nil {
				t.Fatal(err)
			}
			at.proposeAndApprove(act, "", slices.Concat([]approval.Parameter{{Name: "name", Value: "alice"}}, parameter,
				[]approval.Parameter{{Name: "credential", Value: string(text)}})...)
			act, parameter = "credential add", nil
			at.passkeys = append(at.passkeys, c)
		}
	}
	for _, at := range places {
		b.open(at.origin + "/v1/health/alive")
		for i, c := range at.passkeys {
			a, err := run[answer](b, `signIn("alice", o => { o.allowCredentials = [{type: "public-key", id: %v}] })`,
				c.CredentialID)
			var in api.SignedIn
			if json.Unmarshal(a.Body, &in); err != nil || in.Credential != c.ID {
				t.Errorf("a sign-in at %s with passkey %d: %v, %v", at.name, i, a, err)
			}
		}
		_, err := run[answer](b, `make("alice")`)
		if err == nil || !strings.Contains(err.Error(), "InvalidStateError") {
			t.Errorf("one more passkey for an operator who is signed in: %v", err)
		}
	}
	kept, err := chromedp.Call(b.ctx, webauthn.GetCredentials,
		webauthn.GetCredentialsParams{AuthenticatorID: b.authenticator})
	if err != nil {
		t.Fatal(err)
	}
	shown := map[string]int{}
	for _, c := range kept.Credentials {
		shown[c.UserName]++
	}
	for _, at := range places {
		if name := "alice@" + at.name; shown[name] != at.wanted {
			t.Errorf("the authenticator shows %v, want %d times %s", shown, at.wanted, name)
		}
	}
}
