package admin

import (
	"encoding/json"
	"net/http"
	"strings"
	"sync"
	"testing"

	"countersign/admin/api"
	"countersign/approval"
	"countersign/internal/operators"
)

// secretOf returns the secret of a link, which is behind the #.
func secretOf(t *testing.T, l api.MadeLink) string {
	t.Helper()
	before, secret, ok := strings.Cut(l.URL, "#")
	if !ok || !strings.HasSuffix(before, "/enrol") || len(secret) < 50 {
		t.Fatalf("the address of a link is %q", l.URL)
	}
	return secret
}

// openLink opens a link as a page does.
func (r *rig) openLink(secret string) (doc api.OpenedLink, refusal api.Error) {
	r.t.Helper()
	_, refusal, text := call(r.t, r.httpsHTTP(), http.MethodPost, r.url+"/v1/links/open",
		string(encode(api.OpenLink{Secret: secret})), nil)
	if refusal.Code == "" {
		if err := json.Unmarshal([]byte(text), &doc); err != nil {
			r.t.Fatal(err)
		}
	}
	return doc, refusal
}

// useLink uses a link with a new passkey.
func (r *rig) useLink(secret string, opened api.OpenedLink, pk *passkey) (doc api.Link, refusal api.Error) {
	r.t.Helper()
	_, refusal, text := call(r.t, r.httpsHTTP(), http.MethodPost, r.url+"/v1/links/use", string(encode(api.UseLink{
		Secret: secret, Challenge: opened.Challenge, Credential: pk.create(r.t, opened.PublicKey),
	})), nil)
	if refusal.Code == "" {
		if err := json.Unmarshal([]byte(text), &doc); err != nil {
			r.t.Fatal(err)
		}
	}
	return doc, refusal
}

// TestFirstLink enrols the first administrator by a link, which root makes on the Unix socket. The
// newest link counts, works once, and after the enrolment there is none.
func TestFirstLink(t *testing.T) {
	r := newRig(t)
	at := func(kind string, uid uint32) caller {
		return caller{connection: connection{Channel: operators.Channel{Kind: kind, UID: uid}}}
	}
	in := &body[api.NewLink]{api.NewLink{Operator: "ann"}}
	for _, who := range []caller{at(operators.Unix, 1000), at(operators.HTTPS, 0)} {
		if _, err := r.live.firstLink(t.Context(), who, in); code(translate(err)) != "not_allowed" {
			t.Errorf("%v makes the first link: %v", who.Channel, err)
		}
	}
	root := at(operators.Unix, 0)
	old := must(r.live.firstLink(t.Context(), root, in))(t)
	l := must(r.live.firstLink(t.Context(), root, in))(t)
	if _, refusal := r.openLink(secretOf(t, old)); refusal.Code != "not_proven" {
		t.Errorf("an older first link opens: %v", refusal)
	}
	secret := secretOf(t, l)
	if _, refusal := r.openLink(secret[1:] + "A"); refusal.Code != "not_proven" {
		t.Errorf("a guess opens: %v", refusal)
	}
	// Two callers at a time: one makes the passkey.
	opened, _ := r.openLink(secret)
	var group sync.WaitGroup
	codes := make([]string, 4)
	for i := range codes {
		group.Go(func() {
			_, refusal := r.useLink(secret, opened, newPasskey(t, r.url))
			codes[i] = refusal.Code
		})
	}
	group.Wait()
	done := 0
	for _, c := range codes {
		if c == "" {
			done++
		} else if c != "not_proven" && c != "conflict" {
			t.Errorf("the link at a second time: %s", c)
		}
	}
	if done != 1 {
		t.Errorf("the link was used %d times: %v", done, codes)
	}
	o := must(r.registry.Operator("ann"))(t)
	if len(o.Credentials) != 1 || o.Credentials[0].Kind != approval.Passkey || len(o.Roles) != 4 {
		t.Errorf("%+v", o)
	}
	if _, refusal := r.openLink(secret); refusal.Code != "not_proven" {
		t.Errorf("a used link opens: %v", refusal)
	}
	if _, err := r.live.firstLink(t.Context(), root, in); code(translate(err)) != "conflict" {
		t.Errorf("a first link with operators: %v", err)
	}
}

// TestLinks: an administrator makes a link for a person, whose passkey gives no right before a
// proposal. A link is bound to no session, works once, and can be made worthless.
func TestLinks(t *testing.T) {
	r := newRig(t)
	root := r.root()
	for what, n := range map[string]api.NewLink{
		"a new person without roles":     {Operator: "bob"},
		"an operator with other roles":   {Operator: "root", Roles: []approval.Role{"auditor"}},
		"a role that does not exist":     {Operator: "bob", Roles: []approval.Role{"king"}},
		"a name that no operator can be": {Operator: "../bob", Roles: []approval.Role{"auditor"}},
	} {
		_, err := root.NewLink(t.Context(), n)
		wants(t, what, "invalid", err)
	}
	l := must(root.NewLink(t.Context(), api.NewLink{Operator: "bob", Roles: []approval.Role{"auditor", "approver"}}))(t)
	secret := secretOf(t, l)
	for _, each := range must(root.Links(t.Context()))(t) {
		if strings.Contains(string(encode(each)), secret) {
			t.Error("the list of links has the secret")
		}
	}
	opened, refusal := r.openLink(secret)
	if refusal.Code != "" || opened.Operator != "bob" || opened.By != "root" {
		t.Fatalf("%+v, %v", opened, refusal)
	}
	evil := newPasskey(t, "https://localhost:1")
	if _, refusal := r.useLink(secret, opened, evil); refusal.Code != "not_proven" {
		t.Errorf("a passkey of another origin: %v", refusal)
	}
	pk := newPasskey(t, r.url)
	used, refusal := r.useLink(secret, opened, pk) // a failure has not used the link up
	if refusal.Code != "" || used.Credential == nil || used.Used == 0 {
		t.Fatalf("%+v, %v", used, refusal)
	}
	if _, err := r.registry.Operator("bob"); err == nil {
		t.Error("a link has enrolled an operator without an approval")
	}
	listed := must(root.Links(t.Context()))(t)
	if len(listed) != 1 || listed[0].Credential == nil || listed[0].Credential.ID != used.Credential.ID {
		t.Fatalf("%+v", listed)
	}
	p := r.carryOut(root, "operator add", "name", "bob", "roles", "auditor,approver",
		"credential", string(encode(listed[0].Credential)))
	if p.State != "done" {
		t.Errorf("%+v", p)
	}
	other := must(root.NewLink(t.Context(), api.NewLink{Operator: "root"}))(t)
	if err := root.RemoveLink(t.Context(), other.ID); err != nil {
		t.Error(err)
	}
	if _, refusal := r.openLink(secretOf(t, other)); refusal.Code != "not_proven" {
		t.Errorf("a removed link opens: %v", refusal)
	}
	wants(t, "a link that is gone", "not_found", root.RemoveLink(t.Context(), other.ID))
	for range maxLinks - 1 {
		must(root.NewLink(t.Context(), api.NewLink{Operator: "root"}))(t)
	}
	_, err := root.NewLink(t.Context(), api.NewLink{Operator: "root"})
	wants(t, "one link more than there may be", "conflict", err)
}
