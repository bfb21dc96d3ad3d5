package softhsmtests

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"countersign/admin/api"
	"countersign/approval"
	"countersign/internal/scantest"
	"countersign/internal/sshagent"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

// operator is a person with an SSH agent. The CLI reaches the agent at a Unix socket, and the tests
// use the agent in this process.
type operator struct {
	name       string
	agent      agent.Agent
	socket     string
	line       string // the public key, as ssh-add -L prints it
	credential approval.Credential
}

// newOperator starts an SSH agent with a new Ed25519 key. The operator is not enrolled.
func (s *system) newOperator(name string) *operator {
	s.t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	scantest.Secret("the SSH key of "+name, private.Seed())
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		s.t.Fatal(err)
	}
	p := &operator{
		name: name, agent: &countingAgent{Agent: agent.NewKeyring()}, socket: s.path(name + ".agent"),
		line: strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key))),
	}
	if err := p.agent.Add(agent.AddedKey{PrivateKey: private, Comment: name}); err != nil {
		s.t.Fatal(err)
	}
	if p.credential, err = approval.NewSSH(p.line); err != nil {
		s.t.Fatal(err)
	}
	s.serveAgent(p.socket, p.agent)
	return p
}

// serveAgent serves an SSH agent at a Unix socket.
func (s *system) serveAgent(socket string, a agent.Agent) {
	s.t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go agent.ServeAgent(a, conn)
		}
	}()
}

// client returns a client of the admin API. The client signs the operator in when there is no
// session, such as after a restart.
func (s *system) client(p *operator) *api.Client {
	c := api.NewClient(s.tap())
	c.OnSignedOut(func(ctx context.Context) (string, error) { return s.signIn(ctx, p) })
	return c
}

func (s *system) signIn(ctx context.Context, p *operator) (token string, err error) {
	c := api.NewClient(s.path("admin.sock"))
	ch, err := c.Challenge(ctx, api.NewChallenge{Purpose: "sign-in", Operator: p.name})
	if err != nil {
		return "", err
	}
	proof, err := sshagent.Sign(p.agent, p.credential, approval.ForSignIn, ch.Text)
	if err != nil {
		return "", err
	}
	signedIn, err := c.SignIn(ctx, api.Proven{Challenge: ch.ID, Proof: proof})
	scantest.Secret(scantest.SessionToken, []byte(signedIn.Token))
	return signedIn.Token, err
}

// enrolRoot enrols the first administrator, once per system. Enrolment demands a caller with user
// ID 0: tests that don't run as root call the CLI by sudo.
func (s *system) enrolRoot() {
	s.t.Helper()
	if s.rootEnrolled {
		return
	}
	var out []byte
	var err error
	if os.Geteuid() == 0 {
		first := api.NewOperator{Name: s.root.name, Credential: s.root.credential}
		_, err = api.NewClient(s.path("admin.sock")).EnrolFirst(s.t.Context(), first)
	} else {
		sudo := exec.Command("sudo", "-n", filepath.Join(bin, "countersign"), "admin",
			"--socket", s.path("admin.sock"), "operator", "first", s.root.name, "--ssh-key", s.root.line)
		out, err = sudo.CombinedOutput()
	}
	if err != nil {
		s.t.Fatalf("enrol the first administrator: %v %s", err, out)
	}
	s.rootEnrolled = true
}

// TestTwoPeople has the first administrator enrol a second approver and raise the quorum to two.
// From then on a proposal needs both approvals, and the audit log alone shows the approvals of each
// act.
func TestTwoPeople(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	_, errOut, code := s.cliAs(&operator{name: ""}, "", "admin", "key", "list")
	if code != 1 || !strings.HasPrefix(errOut, "countersign: error: signed_out: ") {
		t.Errorf("signed out: %d %s", code, errOut)
	}
	second, stranger := s.newOperator("second"), s.newOperator("stranger")
	if out := s.must("admin", "login", "root"); !strings.Contains(out, "administrator,operator,auditor,approver") {
		t.Errorf("login: %s", out)
	}
	_, errOut, code = s.cliAs(stranger, "", "admin", "login", "root")
	if code != 1 || !strings.Contains(errOut, "countersign: error: not_proven: none of the 1 keys") {
		t.Errorf("a stranger signs in as root: %d %s", code, errOut)
	}
	s.write("second.pub", second.line+"\n")
	out, errOut, code := s.cli("",
		"admin", "operator", "add", "second", "--roles", "approver,operator", "--ssh-key", "second.pub")
	if code != 0 || out != "proposal 1: done\n" || !strings.HasPrefix(errOut, "countersign-proposal-v1\n") ||
		!strings.Contains(errOut, "\n  roles: operator,approver\n") {
		t.Fatalf("operator add: %d %s %s", code, out, errOut)
	}
	s.must("admin", "approvals", "needed", "2")
	public := strings.TrimSpace(s.must("keygen", s.path("demo.key")))
	out = s.must("admin", "peer", "add", "demo", public)
	if !strings.HasPrefix(out, "proposal 3: open, 1 of 2 approvals; ") {
		t.Errorf("with one approval: %s", out)
	}
	if out := s.must("admin", "peer", "list"); strings.Contains(out, "demo") {
		t.Errorf("one person has enrolled a peer: %s", out)
	}
	_, errOut, code = s.cli("", "admin", "proposal", "approve", "3")
	if code != 1 || !strings.Contains(errOut, "countersign: error: conflict: ") &&
		!strings.Contains(errOut, "countersign: error: exists: ") {
		t.Errorf("the same person again: %d %s", code, errOut)
	}
	out, errOut, code = s.cliAs(second, "", "admin", "proposal", "approve", "3", "--json")
	var done api.Proposal
	err := json.Unmarshal([]byte(out), &done)
	if err != nil || code != 0 || done.State != "done" || len(done.Approvals) != 2 ||
		!strings.Contains(errOut, public) {
		t.Errorf("approve: %d %s %s", code, out, errOut)
	}
	if out := s.must("admin", "peer", "list"); !strings.Contains(out, "demo  "+public) {
		t.Errorf("peers: %s", out)
	}
	// The quorum is two: with one approver left, no proposal could be approved, not even one that
	// enrols another approver.
	if _, errOut, code := s.cli("", "admin", "operator", "remove", "second"); code != 1 {
		t.Errorf("fewer approvers than are needed: %s", errOut)
	}
	out, _, code = s.cliAs(second, "",
		"admin", "peer", "add", "other", strings.Repeat("0a", 32), "--propose-only", "--json")
	if code != 0 || !strings.Contains(out, `"state": "open"`) {
		t.Errorf("propose-only: %d %s", code, out)
	}
	s.must("admin", "proposal", "withdraw", "4")
	out = s.must("admin", "proposal", "list")
	enrolled := regexp.MustCompile(`peer add +demo, public_key \S+ +root +\S+ +2 +done`)
	if !strings.Contains(out, "withdrawn") || !enrolled.MatchString(out) {
		t.Errorf("proposals: %s", out)
	}
	if out := s.must("admin", "operator", "show", "second"); !strings.Contains(out, second.line) {
		t.Errorf("operator: %s", out)
	}
	if out := s.must("admin", "sessions", "list"); strings.Count(out, "unix") < 2 {
		t.Errorf("sessions: %s", out)
	}
	if st, err := os.Stat(s.path("root.run/countersign")); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("the folder of the session: %v, %v", st, err)
	}
	files, err := filepath.Glob(s.path("root.run/countersign/*"))
	if st, bad := os.Stat(files[0]); err != nil || bad != nil || len(files) != 1 || st.Mode().Perm() != 0o600 {
		t.Errorf("the session is in %v, %v, %v", files, err, bad)
	}
	vkey := strings.TrimSpace(s.must("admin", "audit", "key"))
	for _, from := range [][]string{{"export"}, {"--socket", "admin.sock"}} {
		s.must("admin", "audit", "export", "export")
		out := s.must(append([]string{"audit", "approvals", "--key", vkey}, from...)...)
		if !strings.Contains(out, "second") || !strings.Contains(out, "peer add") {
			t.Errorf("audit approvals: %s", out)
		}
	}
	s.must("admin", "whoami")
	s.must("admin", "state")
	s.must("admin", "approvals", "show")
	p.stop()
	p = s.serve() // a restart ends all sessions: the CLI signs in again by the agent
	s.must("admin", "whoami")
	s.must("admin", "logout")
	_, errOut, code = s.cliAs(&operator{name: "", socket: ""}, "", "admin", "whoami")
	if code != 1 || !strings.HasPrefix(errOut, "countersign: error: signed_out: ") {
		t.Errorf("after logout: %d %s", code, errOut)
	}
	p.stop()
}

// TestApprovalByKeygenAlone types the commands of docs/SPEC.md by which ssh-keygen checks a logged
// approval. The first proof came with its base64 in one long line, as other tools write it. An
// armor that ssh-keygen can't read is refused, and costs the proposal nothing.
func TestApprovalByKeygenAlone(t *testing.T) {
	needTool(t, "jq", "jq")
	s := newSystem(t)
	p := s.serve()
	proposal, err := s.admin().Propose(t.Context(), api.NewProposal{Act: "peer add", Parameters: []approval.Parameter{
		{Name: "name", Value: "shop"}, {Name: "public_key", Value: strings.Repeat("0a", 32)},
	}})
	if err != nil {
		t.Fatal(err)
	}
	proof, err := sshagent.Sign(s.root.agent, s.root.credential, approval.ForProposal, proposal.Text)
	if err != nil {
		t.Fatal(err)
	}
	armored := proof.SSHSIG
	for what, unreadable := range map[string]string{
		"CRLF": strings.ReplaceAll(armored, "\n", "\r\n"), "a leading blank": " " + armored,
		"a leading line": "\n" + armored, "text after it": armored + "x",
	} {
		proof.SSHSIG = unreadable
		var refused *api.Error
		_, err := s.admin().Approve(t.Context(), proposal.ID, proof)
		if !errors.As(err, &refused) || refused.Code != "not_proven" {
			t.Errorf("%s: %v", what, err)
		}
	}
	lines := strings.Split(strings.TrimSpace(armored), "\n")
	last := len(lines) - 1
	proof.SSHSIG = lines[0] + "\n" + strings.Join(lines[1:last], "") + "\n" + lines[last]
	if proposal, err = s.admin().Approve(t.Context(), proposal.ID, proof); err != nil || proposal.State != "done" {
		t.Fatalf("%+v, %v", proposal, err)
	}
	s.must("admin", "audit", "export", "log")
	s.write("log.vkey", s.must("admin", "audit", "key"))
	p.stop()

	spec, err := os.ReadFile("../docs/SPEC.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(spec), "### One approval, with ssh-keygen alone\n")
	section, _, _ = strings.Cut(section, "\n#")
	typed := ""
	for line := range strings.Lines(section) {
		if command, is := strings.CutPrefix(line, "    "); is {
			typed += strings.ReplaceAll(command, "anna", s.root.name)
		}
	}
	shell := exec.Command("sh", "-eux", "-c", typed)
	shell.Dir, shell.Env = s.dir, append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
	out, err := shell.CombinedOutput()
	want := fmt.Sprintf("Good %q signature for %s", approval.ForProposal, s.root.name)
	if err != nil || !strings.Contains(string(out), want) {
		t.Errorf("%v, want %s:\n%s", err, want, out)
	}
}

// proposeAndApprove proposes an act and approves the proposal, both as the first administrator. The
// test ends if the act fails or needs more approvals.
func (s *system) proposeAndApprove(act, content string, parameters ...approval.Parameter) api.Proposal {
	s.t.Helper()
	p, err := s.propose(act, content, parameters...)
	if err != nil || p.State != "done" {
		s.t.Fatalf("%s: %+v, %v", act, p, err)
	}
	return p
}

// propose is proposeAndApprove for goroutines beside the test's.
func (s *system) propose(act, content string, parameters ...approval.Parameter) (api.Proposal, error) {
	ctx := context.Background()
	p, err := s.admin().Propose(ctx, api.NewProposal{Act: act, Content: content, Parameters: parameters})
	if err != nil {
		return p, err
	}
	proof, err := sshagent.Sign(s.root.agent, s.root.credential, approval.ForProposal, p.Text)
	if err != nil {
		return p, err
	}
	return s.admin().Approve(ctx, p.ID, proof)
}
