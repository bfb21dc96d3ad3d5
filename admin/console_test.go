package admin

import (
	"encoding/hex"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"countersign/admin/api"
	"countersign/admin/console"
	"countersign/audit"
	"countersign/wire"
)

// TestConsoleAddresses: pages have the strict headers, and the API's addresses are as before. A
// daemon without the assets says so.
func TestConsoleAddresses(t *testing.T) {
	r := newRig(t)
	get := func(path, accept string) (*http.Response, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, r.url+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Accept", accept)
		resp, err := r.httpsHTTP().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b := make([]byte, 4096)
		n, _ := resp.Body.Read(b)
		return resp, string(b[:n])
	}
	for _, path := range []string{
		"/", "/keys", "/peers/shop", "/enrol", "/v2",
		"/assets/none.js", "/assets/../console.go", "/assets/index.html.br",
	} {
		resp, text := get(path, "text/html,application/xhtml+xml")
		for name, want := range map[string]string{
			"Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; " +
				"img-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'; " +
				"require-trusted-types-for 'script'; trusted-types 'none'",
			"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
			"Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store",
		} {
			if got := resp.Header.Get(name); got != want {
				t.Errorf("%s: %s: %q, want %q", path, name, got, want)
			}
		}
		switch asset := strings.HasPrefix(path, "/assets/"); {
		case asset && resp.StatusCode != http.StatusNotFound:
			t.Errorf("%s: %s", path, resp.Status)
		case !asset && console.Built() && (resp.StatusCode != http.StatusOK || !strings.Contains(text, "/assets/app-")):
			t.Errorf("%s: %s %s", path, resp.Status, text)
		case asset || console.Built():
		case resp.StatusCode != http.StatusNotImplemented || !strings.Contains(text, "make build"):
			t.Errorf("%s: %s %s", path, resp.Status, text)
		}
	}
	// Programs, and addresses of the API, get the API's answers.
	for path, accept := range map[string]string{
		"/v1/none": "text/html", "/v1/me": "text/html", "/checkpoint": "text/html", "/nothing": "*/*",
	} {
		if resp, text := get(path, accept); resp.Header.Get("Content-Type") != "application/problem+json" {
			t.Errorf("%s: %s %s", path, resp.Status, text)
		}
	}
}

// TestEventProof checks proofs of events as an auditor's program does, with the consistency from an
// earlier checkpoint.
func TestEventProof(t *testing.T) {
	r := newRig(t)
	root := r.root()
	log := must(audit.ParseVerifierKey(must(root.Log(t.Context()))(t).VerifierKey))(t)
	check := func(event, seen uint64) (audit.Checkpoint, []audit.Hash) {
		t.Helper()
		p := must(root.EventProof(t.Context(), event, seen))(t)
		hashes := func(texts []string) (all []audit.Hash) {
			for _, text := range texts {
				var h wire.Bytes32
				if n, err := hex.Decode(h[:], []byte(text)); n != 32 || err != nil {
					t.Fatalf("%q is no hash", text)
				}
				all = append(all, audit.Hash(h))
			}
			return all
		}
		_, head, err := log.Check(audit.Proof{
			Event: p.Event, Index: p.Index, Leaf: []byte(p.Leaf), Path: hashes(p.Path),
			Checkpoint: []byte(p.Checkpoint),
		})
		if err != nil {
			t.Fatalf("event %d: %v", event, err)
		}
		return head, hashes(p.Consistency)
	}
	before, _ := check(1, 0)
	for range 9 {
		if _, err := root.Propose(t.Context(), api.NewProposal{Act: "clock accept"}); err != nil {
			t.Fatal(err)
		}
	}
	after, path := check(before.Size+3, before.Size)
	if after.Size <= before.Size {
		t.Fatalf("the log has %d events, and had %d", after.Size, before.Size)
	}
	if err := after.Continues(before, path); err != nil {
		t.Error(err)
	}
	_, err := root.EventProof(t.Context(), 1, after.Size+100)
	wants(t, "more events than the log has", "conflict", err)
	_, err = root.EventProof(t.Context(), 1<<40, 0)
	wants(t, "an event that is not there", "not_found", err)
}

// TestFindAndLimit: a listing of names has pages of any length, and only the names asked for.
func TestFindAndLimit(t *testing.T) {
	r := newRig(t)
	token := r.token(r.unix(), func() string { r.root(); return "root" }())
	for i := range 5 {
		key := [32]byte{9: byte(i), 31: 1}
		if _, err := r.app.Peers.Add(t.Context(), audit.Daemon(), "shop-"+strconv.Itoa(i), key[:]); err != nil {
			t.Fatal(err)
		}
	}
	var names int
	for next := ""; ; {
		docs, after := r.pageOf(token, "/v1/peers?limit=2&find=op-&after="+next)
		if names += len(docs); len(docs) > 2 {
			t.Errorf("a page of %d", len(docs))
		}
		if next = after; next == "" {
			break
		}
	}
	if names != 5 {
		t.Errorf("%d peers were found, want 5", names)
	}
	if docs, _ := r.pageOf(token, "/v1/peers?find=kiosk"); len(docs) != 0 {
		t.Errorf("%s", docs)
	}
	ok, _ := r.pageOf(token, "/v1/events?outcome=ok&limit=1000")
	bad, _ := r.pageOf(token, "/v1/events?outcome=!ok&limit=1000")
	all, _ := r.pageOf(token, "/v1/events?limit=1000")
	if len(ok) == 0 || len(ok)+len(bad) != len(all) {
		t.Errorf("%d ok and %d others of %d events", len(ok), len(bad), len(all))
	}
}

// TestTryPolicy tries texts as the policy, which stays what it is.
func TestTryPolicy(t *testing.T) {
	r := newRig(t)
	root := r.root()
	const unbalanced = "// nobody\npermit (principal == Peer::\"shop\", action, resource;"
	broken := must(root.TryPolicy(t.Context(), api.TryPolicy{Text: unbalanced}))(t)
	if broken.Error == nil || broken.Error.Line != 2 {
		t.Errorf("%+v", broken)
	}
	const text = `@id("nobody") forbid (principal, action == Action::"sign", resource) when { context.lifetime > 5 };`
	const cases = "name,expect,peer,key\nthe shop,allow,shop,payments\nothers,deny,x,payments\n"
	tried := must(root.TryPolicy(t.Context(), api.TryPolicy{Text: text, Cases: cases, Since: 1}))(t)
	if tried.Error != nil || len(tried.Cases) != 2 || tried.Cases[0].Got != "deny" || tried.Cases[1].Got != "deny" {
		t.Errorf("%+v", tried)
	}
	if c := tried.Changed; c == nil || len(c.Added) != 1 || c.Added[0].Permits || !c.Added[0].Conditional ||
		len(c.Removed) != 1 || !c.Removed[0].Permits {
		t.Errorf("%+v", c)
	}
	if tried.Replay == nil {
		t.Error("nothing was replayed")
	}
	if bad := must(root.TryPolicy(t.Context(), api.TryPolicy{Text: text, Cases: "name\nx\n"}))(t); bad.Trouble == nil {
		t.Errorf("%+v", bad)
	}
	if all := must(root.Policies(t.Context()))(t); len(all) != 1 {
		t.Errorf("a trial has changed the policy: %+v", all)
	}
	if _, err := r.app.Peers.Add(t.Context(), audit.Daemon(), "shop", append(make([]byte, 31), 1)); err != nil {
		t.Fatal(err)
	}
	must(root.CreateKey(t.Context(), api.NewKey{Name: "payments"}))(t)
	must(root.CreateKey(t.Context(), api.NewKey{Name: "invoices"}))(t)
	rights := must(root.Rights(t.Context(), "shop"))(t)
	if len(rights) != 1 || rights[0].Key != "payments" || rights[0].Action != "sign" || len(rights[0].Rules) != 1 ||
		!rights[0].Rules[0].Permits || rights[0].Rules[0].Conditional {
		t.Errorf("%+v", rights)
	}
	_, err := root.Rights(t.Context(), "nobody")
	wants(t, "the rights of a stranger", "not_found", err)
	auditor := r.enrol(root, r.unix())["approver"]
	if seen := must(auditor.TryPolicy(t.Context(), api.TryPolicy{Text: text, Since: 1}))(t); seen.Replay != nil {
		t.Error("an approver sees decisions")
	}
}
