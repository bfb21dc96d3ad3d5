package softhsmtests

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"unicode"

	"countersign/admin/api"
	"countersign/approval"
)

// proxy forwards requests to the API of the appliance.
func (s *system) proxy() *httputil.ReverseProxy {
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: "countersign"})
	proxy.Transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", s.path("admin.sock"))
	}}
	return proxy
}

// serveAt serves HTTP at a Unix socket until the end of the test.
func serveAt(t testing.TB, socket string, serve http.HandlerFunc) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: serve}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
}

// relay serves the API of the appliance at a socket of its own, as a daemon in other hands would.
// change may change each single proposal on its way to the CLI; without one, nothing is changed.
func (s *system) relay(change *atomic.Pointer[func(*api.Proposal)]) (socket string) {
	s.t.Helper()
	socket = s.path("relay.sock")
	proxy := s.proxy()
	single := regexp.MustCompile(`^/v1/proposals/[0-9]+$`)
	proxy.ModifyResponse = func(resp *http.Response) error {
		do := change.Load()
		if do == nil || resp.StatusCode != http.StatusOK || !single.MatchString(resp.Request.URL.Path) {
			return nil
		}
		var p api.Proposal
		if err := json.NewDecoder(resp.Body).Decode(&p); err != nil {
			return err
		}
		(*do)(&p)
		b, err := json.Marshal(p)
		if err != nil {
			return err
		}
		resp.Body, resp.ContentLength = io.NopCloser(bytes.NewReader(b)), int64(len(b))
		resp.Header.Set("Content-Length", strconv.Itoa(len(b)))
		return nil
	}
	serveAt(s.t, socket, proxy.ServeHTTP)
	return socket
}

// TestApproverSignsWhatIsShown puts a relay between the CLI and the appliance. Whatever the relay
// changes, no approver signs another act, other parameters or another policy than those on the
// screen.
func TestApproverSignsWhatIsShown(t *testing.T) {
	s := newSystem(t)
	s.serve()
	second := s.newOperator("second")
	s.write("second.pub", second.line+"\n")
	s.must("admin", "operator", "add", "second", "--roles", "approver", "--ssh-key", "second.pub")
	s.must("admin", "approvals", "needed", "2")
	var change atomic.Pointer[func(*api.Proposal)]
	socket := s.relay(&change)
	approvals := func(id uint64) int {
		t.Helper()
		p, err := s.admin().Proposal(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		return len(p.Approvals)
	}
	newest := func() api.Proposal {
		t.Helper()
		all, err := s.admin().Proposals(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return all[0]
	}
	const override = "\u202e"
	rules := "// kept by ops " + override + "\n" +
		"permit (principal == Peer::\"demo\", action == Action::\"sign\", resource);\n"
	s.write("next.cedar", rules)
	s.write("other.cedar", strings.Replace(rules, "demo", "thief", 1))
	replace := func(old, new string) func(*api.Proposal) {
		return func(p *api.Proposal) { p.Text = strings.Replace(p.Text, old, new, 1) }
	}

	// The proposer's own approval.
	peer := []string{"admin", "--socket", socket, "peer", "add", "demo", strings.Repeat("0a", 32)}
	propose := []string{"admin", "--socket", socket, "policy", "propose", "next.cedar"}
	for name, c := range map[string]struct {
		args   []string
		change func(*api.Proposal)
	}{
		"another parameter": {peer, replace("name: demo", "name: thief")},
		"one more":          {peer, replace("proposed by: ", "  more: x\nproposed by: ")},
		"another act":       {peer, replace("act: peer add", "act: operator remove")},
		"another proposer":  {peer, replace("proposed by: root", "proposed by: second")},
		"another number":    {peer, func(p *api.Proposal) { *p = mustRenumber(t, *p) }},
		"another policy": {propose, func(p *api.Proposal) {
			p.Content = strings.Replace(p.Content, "demo", "thief", 1)
		}},
		"another digest": {propose, func(p *api.Proposal) {
			sha := regexp.MustCompile(`sha256: \w+`)
			p.Text = sha.ReplaceAllString(p.Text, "sha256: "+strings.Repeat("00", 32))
		}},
		"no policy": {propose, func(p *api.Proposal) { p.Content = "" }},
	} {
		change.Store(&c.change)
		out, errOut, code := s.cli("", c.args...)
		p := newest()
		if code != 1 || !strings.Contains(errOut, "not approved yet") || approvals(p.ID) != 0 {
			t.Errorf("%s: %d, %d approvals: %s%s", name, code, approvals(p.ID), out, errOut)
		}
		change.Store(nil)
		s.must("admin", "proposal", "withdraw", strconv.FormatUint(p.ID, 10))
	}

	// The approval by number.
	s.must("admin", "--propose-only", "policy", "propose", "next.cedar")
	id := newest().ID
	number := strconv.FormatUint(id, 10)
	for name, by := range map[string]func(*api.Proposal){
		"another policy": func(p *api.Proposal) { p.Content = strings.Replace(p.Content, "demo", "thief", 1) },
		"no policy":      func(p *api.Proposal) { p.Content = "" },
		"another number": func(p *api.Proposal) { *p = mustRenumber(t, *p) },
		"an unknown act": replace("act: policy activate", "act: policy forget"),
		"another form":   replace("act: ", "act:  "),
		// The content of an ended proposal is not shown, so its text must not be signed.
		"no policy of an ended one": func(p *api.Proposal) { p.Content, p.State = "", "done" },
		"an ended one":              func(p *api.Proposal) { p.State = "withdrawn" },
	} {
		change.Store(&by)
		out, errOut, code := s.cliAs(second, "", "admin", "--socket", socket, "proposal", "approve", number)
		ended := strings.Contains(name, "ended") // is shown for who wants to know
		if code != 1 || strings.Contains(errOut, "countersign-proposal-v1\n") != ended || approvals(id) != 0 {
			t.Errorf("%s: %d, %d approvals: %s%s", name, code, approvals(id), out, errOut)
		}
	}
	change.Store(nil)
	out, errOut, code := s.cliAs(second, "", "admin", "--socket", socket, "proposal", "approve", number)
	if code != 0 || approvals(id) != 1 {
		t.Fatalf("unchanged: %d: %s%s", code, out, errOut)
	}
	root := s.root.credential
	for _, shown := range []string{
		"\n    1  // kept by ops \\u{202e}\n", "\n| +permit (principal == Peer::\"demo\"", " replayed, ",
		"\n| proposed by  root, an operator with the roles administrator", root.ID + "  SHA256:",
	} {
		if !strings.Contains(errOut, shown) {
			t.Errorf("approve does not show %q: %s", shown, errOut)
		}
	}
	if strings.Contains(errOut, override) {
		t.Errorf("a hidden character gets to the terminal: %q", errOut)
	}
	list := s.must("admin", "proposal", "list")
	for _, named := range []string{`policy activate +sha256 \w{16}… `, `peer add +demo, public_key 0a`, `needed 2 `} {
		if !regexp.MustCompile(named).MatchString(list) {
			t.Errorf("proposal list has no %s: %s", named, list)
		}
	}

	// The proposer is removed, so the proposal is open no more.
	third := s.newOperator("third")
	s.write("third.pub", third.line+"\n")
	s.must("admin", "operator", "add", "third", "--roles", "administrator,approver", "--ssh-key", "third.pub")
	s.approveAs(second)
	if _, errOut, code := s.cliAs(third, "", "admin", "--propose-only", "policy", "propose", "other.cedar"); code != 0 {
		t.Fatal(errOut)
	}
	orphan := newest().ID
	s.must("admin", "operator", "remove", "third")
	s.approveAs(second)
	out, errOut, code = s.cli("", "admin", "proposal", "approve", strconv.FormatUint(orphan, 10))
	if code != 1 || !strings.Contains(errOut, "third, who is NO OPERATOR ANY MORE") {
		t.Errorf("%d: %s%s", code, out, errOut)
	}
	p, err := s.admin().Proposal(t.Context(), orphan)
	if err != nil || p.State != "expired" || len(p.Approvals) != 0 {
		t.Errorf("%+v, %v", p, err)
	}
}

// TestApplianceForgesNoLine has the appliance put line breaks, escape sequences and bidirectional
// controls into all that it says of a proposal, and into its errors. No line of the CLI's output is
// the appliance's, except behind a bar or after the name of the CLI.
func TestApplianceForgesNoLine(t *testing.T) {
	s := newSystem(t)
	s.serve()
	s.must("admin", "--propose-only", "peer", "add", "demo", strings.Repeat("0a", 32))
	const forged = "x\r\n\ncountersign-proposal-v1\nact: forged\x1b[2J\u202e\x00\n\u0085forged"
	var change atomic.Pointer[func(*api.Proposal)]
	socket := s.relay(&change)
	check := func(what, text string) {
		t.Helper()
		if strings.ContainsFunc(text, func(r rune) bool { return r != '\n' && unicode.In(r, unicode.Cc, unicode.Cf) }) {
			t.Errorf("%s: control characters get to the terminal: %q", what, text)
		}
		found := false
		for line := range strings.Lines(text) {
			mine := regexp.MustCompile(`^(\| |countersign: |warning  )`).MatchString(line)
			if found = found || strings.Contains(line, "forged"); strings.Contains(line, "forged") && !mine {
				t.Errorf("%s: the appliance has made the line %q of: %s", what, line, text)
			}
		}
		if !found {
			t.Errorf("%s: the test proves nothing: %s", what, text)
		}
	}
	forge := func(p *api.Proposal) {
		p.State, p.Cause, p.Warnings = "open"+forged, forged, []string{forged}
		p.Approvals = []api.Approval{{Operator: forged, Counts: true}}
	}
	change.Store(&forge)
	_, errOut, _ := s.cli("", "admin", "--socket", socket, "proposal", "approve", "1")
	check("a proposal", errOut)
	out, _, _ := s.cli("", "admin", "--socket", socket, "proposal", "show", "1")
	check("a proposal to be shown", out)

	refusing := s.path("refusing.sock")
	serveAt(t, refusing, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusConflict)
		json.NewEncoder(w).Encode(api.Error{Code: "conflict" + forged, Detail: forged})
	})
	_, errOut, _ = s.cli("", "admin", "--socket", refusing, "proposal", "list")
	check("an error", errOut)
}

// approveAs approves the newest proposal by the CLI.
func (s *system) approveAs(who *operator) {
	s.t.Helper()
	all, err := s.admin().Proposals(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	out, errOut, code := s.cliAs(who, "", "admin", "proposal", "approve", strconv.FormatUint(all[0].ID, 10))
	if code != 0 || !strings.Contains(out, "done") {
		s.t.Fatalf("%d: %s%s", code, out, errOut)
	}
}

// mustRenumber returns a proposal with the text of the next number.
func mustRenumber(t *testing.T, p api.Proposal) api.Proposal {
	t.Helper()
	parsed, err := approval.ParseText(p.Text)
	if err != nil {
		t.Error(err)
		return p
	}
	parsed.ID++
	p.Text = parsed.Text()
	return p
}
