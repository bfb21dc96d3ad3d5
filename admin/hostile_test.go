package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"countersign/admin/api"
)

// TestOutOfRange checks that a number out of range is refused, and not truncated.
func TestOutOfRange(t *testing.T) {
	r := newRig(t)
	root := r.root()
	must(root.CreateKey(t.Context(), api.NewKey{Name: "payments"}))(t)
	token := r.token(r.unix(), "root")
	for _, c := range []struct{ method, path, body string }{
		{"POST", "/v1/log/epochs/4294967296/holds", `{"name":"test","reason":"test"}`},
		{"POST", "/v1/keys/payments/rotate", `{"at":9223372036854775807}`},
		{"POST", "/v1/keys/payments/rotate", `{"at":253402300799}`},
		{"POST", "/v1/keys/payments/rotate", `{"at":18446744073709551617}`},
		{"GET", "/v1/proposals/18446744073709551617", ""},
	} {
		bearer := map[string]string{"Authorization": "Bearer " + token}
		resp, refusal, _ := call(t, r.unixHTTP(), c.method, "http://countersign"+c.path, c.body, bearer)
		if resp.StatusCode != 400 || refusal.Code != "invalid" {
			t.Errorf("%s %s %s: %d %+v", c.method, c.path, c.body, resp.StatusCode, refusal)
		}
	}
	k := must(root.Key(t.Context(), "payments"))(t)
	if len(k) != 2 || k[0].State != "active" || k[1].State != "pending" {
		t.Errorf("%+v", k)
	}
	// Every number of 32 bits needs a maximum: huma parses 64 bits, and truncates.
	var doc struct {
		Paths map[string]map[string]struct {
			Parameters []struct {
				Name   string
				Schema struct {
					Format  string
					Maximum *float64
				}
			}
		}
	}
	if err := json.Unmarshal(r.server.document, &doc); err != nil {
		t.Fatal(err)
	}
	for path, methods := range doc.Paths {
		for method, o := range methods {
			for _, p := range o.Parameters {
				if p.Schema.Format == "int32" && p.Schema.Maximum == nil {
					t.Errorf("%s %s: the parameter %s has no maximum", method, path, p.Name)
				}
			}
		}
	}
}

// TestClearRefusals checks that requests for no operation get a problem document with advice.
func TestClearRefusals(t *testing.T) {
	r := newRig(t)
	r.root()
	for _, c := range []struct {
		method, path string
		headers      map[string]string
		status       int
		says         string
	}{
		{"GET", "/v1/nothing", nil, 404, "openapi.json"},
		{"GET", "/../etc/passwd", nil, 404, "openapi.json"},
		{"PUT", "/v1/keys", nil, 405, "Allow"},
		{"GET", "/v1/keys", map[string]string{"Host": "evil.example"}, 403, r.url},
	} {
		resp, refusal, body := call(t, r.httpsHTTP(), c.method, r.url+c.path, "", c.headers)
		if resp.StatusCode != c.status || resp.Header.Get("Content-Type") != "application/problem+json" ||
			!strings.Contains(refusal.Detail, c.says) || strings.Contains(body, "message=") {
			t.Errorf("%s %s: %d %s", c.method, c.path, resp.StatusCode, body)
		}
		if c.status == 405 && resp.Header.Get("Allow") == "" {
			t.Error("no Allow")
		}
	}
	token := r.token(r.https(), "root")
	for _, scheme := range []string{"Bearer", "bearer", "BEARER"} {
		header := map[string]string{"Authorization": scheme + " " + token}
		resp, _, body := call(t, r.httpsHTTP(), "GET", r.url+"/v1/me", "", header)
		if resp.StatusCode != 200 || resp.Header.Get("Strict-Transport-Security") != "" {
			t.Errorf("%s: %d %s", scheme, resp.StatusCode, body)
		}
	}
}

// TestRefusedSeed: a seed that no key can have is an invalid request. The code unavailable would
// ask the operator to wait and to try again.
func TestRefusedSeed(t *testing.T) {
	r := newRig(t)
	root := r.root()
	path := filepath.Join(t.TempDir(), "seed")
	if err := os.WriteFile(path, make([]byte, 32), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := root.CreateKey(t.Context(), api.NewKey{Name: "payments", SeedFile: path})
	wants(t, "a seed of zeros", "invalid", err)
}

// TestConnectionsAreBounded checks that a caller with all HTTPS connections makes others wait over
// HTTPS, and not on the Unix socket.
func TestConnectionsAreBounded(t *testing.T) {
	r := newRig(t)
	root := r.root()
	held := make([]net.Conn, maxConnections)
	for i := range held {
		held[i] = must(net.Dial("tcp", strings.TrimPrefix(r.url, "https://")))(t)
		defer held[i].Close()
	}
	c := r.https()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := c.Alive(ctx); err == nil {
		t.Errorf("there are more than %d connections", maxConnections)
	}
	if _, err := root.Me(t.Context()); err != nil {
		t.Error(err)
	}
	for _, conn := range held[:2] { // two, because the connection of the previous call waits, too
		conn.Close()
	}
	if err := c.Alive(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestRegistrations checks that thousands of registrations evict none, and that only the unchanged
// id of a registration is valid, before its expiry.
func TestRegistrations(t *testing.T) {
	r := newRig(t)
	r.root()
	c := r.https()
	var mine api.PasskeyOptions
	for i := range 2000 {
		o := must(c.PasskeyOptions(t.Context(), api.NewPasskey{Operator: "alice"}))(t)
		if i == 0 {
			mine = o
		}
	}
	id, challenge := r.server.newRegistration(time.Now().Add(time.Minute))
	if got, ok := r.server.parseRegistration(id); !ok || !bytes.Equal(got, challenge) {
		t.Errorf("%q is no registration", id)
	}
	for i := range id {
		b := []byte(id)
		b[i] ^= 1
		if _, ok := r.server.parseRegistration(string(b)); ok {
			t.Errorf("byte %d may be another one", i)
		}
	}
	for _, id := range []string{"", ".", "..", id + "0", id[1:], "x" + id} {
		if _, ok := r.server.parseRegistration(id); ok {
			t.Errorf("%q is a registration", id)
		}
	}
	expired, _ := r.server.newRegistration(time.Now().Add(-time.Second))
	if _, ok := r.server.parseRegistration(expired); ok {
		t.Error("one that is too old is good")
	}
	_, err := c.RegisterPasskey(t.Context(), api.Registration{Challenge: mine.Challenge, Credential: []byte("{}")})
	if code(err) != "not_proven" || strings.Contains(err.Error(), "challenge") {
		t.Errorf("the first of many was driven out: %v", err)
	}
	_, err = c.RegisterPasskey(t.Context(), api.Registration{Challenge: id, Credential: []byte("{}")})
	if code(err) != "not_proven" || !strings.Contains(err.Error(), "challenge") {
		t.Errorf("one of another server: %v", err)
	}
}

// TestBrowserSession checks that a browser's session needs the cookie and the header, both halves
// of the token.
func TestBrowserSession(t *testing.T) {
	r := newRig(t)
	r.root()
	ch := must(r.https().Challenge(t.Context(), api.NewChallenge{Purpose: "sign-in", Operator: "root"}))(t)
	proven := string(must(json.Marshal(api.Proven{Challenge: ch.ID, Proof: r.proof("root", ch.Text)}))(t))
	own := map[string]string{"Sec-Fetch-Site": "same-origin"}
	resp, refusal, body := call(t, r.httpsHTTP(), "POST", r.url+"/v1/sessions", proven, own)
	var in api.SignedIn
	if err := json.Unmarshal([]byte(body), &in); err != nil || resp.StatusCode != 201 || in.Token != "" ||
		in.Page == "" || len(resp.Cookies()) != 1 {
		t.Fatalf("%d %+v %s", resp.StatusCode, refusal, body)
	}
	c := resp.Cookies()[0]
	if !c.HttpOnly || !c.Secure || c.SameSite != http.SameSiteStrictMode || c.Path != "/" || c.Domain != "" {
		t.Errorf("%+v", c)
	}
	cookie, page := c.Name+"="+c.Value, in.Page
	otherPage := "A" + page[1:]
	if otherPage == page {
		otherPage = "B" + page[1:]
	}
	if token := r.token(r.https(), "root"); strings.Contains(body, token) || page == c.Value {
		t.Error("the halves are not halves")
	}
	// with has both halves, and further headers by name and value.
	with := func(more ...string) map[string]string {
		headers := map[string]string{"Cookie": cookie, "Countersign-Page": page}
		for i := 0; i < len(more); i += 2 {
			headers[more[i]] = more[i+1]
		}
		return headers
	}
	for name, a := range map[string]struct {
		method  string
		headers map[string]string
		code    string
	}{
		"both":                      {"GET", with(), ""},
		"the cookie":                {"GET", map[string]string{"Cookie": cookie}, "signed_out"},
		"the page":                  {"GET", map[string]string{"Countersign-Page": page}, "signed_out"},
		"the cookie twice":          {"GET", with("Countersign-Page", c.Value), "signed_out"},
		"the cookie as the token":   {"GET", map[string]string{"Authorization": "Bearer " + c.Value}, "signed_out"},
		"the page as the token":     {"GET", map[string]string{"Authorization": "Bearer " + page}, "signed_out"},
		"another page":              {"GET", with("Countersign-Page", otherPage), "signed_out"},
		"no base64":                 {"GET", with("Countersign-Page", "*"), "signed_out"},
		"an act":                    {"POST", with("Sec-Fetch-Site", "same-origin"), ""},
		"an act by the origin":      {"POST", with("Origin", r.url), ""},
		"an act of who knows where": {"POST", with(), "not_allowed"},
		"an act of the same site":   {"POST", with("Sec-Fetch-Site", "same-site"), "not_allowed"},
		"an act of another site":    {"POST", with("Sec-Fetch-Site", "cross-site"), "not_allowed"},
		"an act of another origin": {
			"POST", with("Sec-Fetch-Site", "same-origin", "Origin", "https://localhost:1"), "not_allowed",
		},
		"an act of a hidden origin": {"POST", with("Origin", "null"), "not_allowed"},
	} {
		path, body := "/v1/me", ""
		if a.method == "POST" {
			path, body = "/v1/lock", `{"reason":"test"}`
		}
		resp, refusal, text := call(t, r.httpsHTTP(), a.method, r.url+path, body, a.headers)
		if refusal.Code != a.code || a.code == "" && resp.StatusCode/100 != 2 {
			t.Errorf("%s: %d %s", name, resp.StatusCode, text)
		}
	}
	_, refusal, _ = call(t, r.unixHTTP(), "GET", "http://countersign/v1/me", "", with())
	if refusal.Code != "signed_out" {
		t.Errorf("on the socket: %+v", refusal)
	}
	resp, _, _ = call(t, r.httpsHTTP(), "DELETE", r.url+"/v1/sessions/current", "",
		with("Sec-Fetch-Site", "same-origin"))
	if resp.StatusCode != 204 || len(resp.Cookies()) != 1 || resp.Cookies()[0].MaxAge >= 0 {
		t.Errorf("sign out: %d %v", resp.StatusCode, resp.Cookies())
	}
}
