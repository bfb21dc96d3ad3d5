package softhsmtests

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"countersign/admin/api"
	"countersign/approval"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

// operator is an operator of a system with an SSH agent of its own: at a socket for the CLI, and in this process.
type operator struct {
	name       string
	agent      agent.Agent
	socket     string
	line       string // the public key, as ssh-add -L prints it
	credential approval.Credential
}

// newOperator starts an agent with a new key.
func (s *system) newOperator(name string) *operator {
	s.t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		s.t.Fatal(err)
	}
	p := &operator{name: name, agent: agent.NewKeyring(), socket: s.path(name + ".agent"), line: strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))}
	if err := p.agent.Add(agent.AddedKey{PrivateKey: private, Comment: name}); err != nil {
		s.t.Fatal(err)
	}
	if p.credential, err = approval.NewSSH(p.line); err != nil {
		s.t.Fatal(err)
	}
	l, err := net.Listen("unix", p.socket)
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
			go agent.ServeAgent(p.agent, conn)
		}
	}()
	return p
}

// client returns a client that signs the person in whenever that is needed, such as after a restart.
func (s *system) client(p *operator) *api.Client {
	c := api.NewClient(s.path("admin.sock"))
	c.OnSignedOut(func(ctx context.Context) (string, error) { return s.signIn(ctx, p) })
	return c
}

func (s *system) signIn(ctx context.Context, p *operator) (token string, err error) {
	c := api.NewClient(s.path("admin.sock"))
	ch, err := c.Challenge(ctx, api.NewChallenge{Purpose: "sign-in", Operator: p.name})
	if err != nil {
		return "", err
	}
	proof, err := approval.SignSSH(p.agent, p.credential, approval.ForSignIn, ch.Text)
	if err != nil {
		return "", err
	}
	signedIn, err := c.SignIn(ctx, api.Proven{Challenge: ch.ID, Proof: proof})
	return signedIn.Token, err
}

// enrolRoot enrols the first administrator, once. The tests run as root.
func (s *system) enrolRoot() {
	s.t.Helper()
	if s.rootEnrolled {
		return
	}
	var out []byte
	var err error
	if os.Geteuid() == 0 {
		_, err = api.NewClient(s.path("admin.sock")).EnrolFirst(s.t.Context(), api.NewOperator{Name: s.root.name, Credential: s.root.credential})
	} else {
		out, err = exec.Command("sudo", "-n", filepath.Join(bin, "countersign"), "admin", "--socket", s.path("admin.sock"), "operator", "first", s.root.name, "--ssh-key", s.root.line).CombinedOutput()
	}
	if err != nil {
		s.t.Fatalf("enrol the first administrator: %v %s", err, out)
	}
	s.rootEnrolled = true
}

// TestTwoPeople: one enrols the other, both are needed from then on, and each act has what shows it years later.
func TestTwoPeople(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	if _, errOut, code := s.cliAs(&operator{name: ""}, "", "admin", "key", "list"); code != 1 || !strings.HasPrefix(errOut, "countersign: signed_out: ") {
		t.Errorf("signed out: %d %s", code, errOut)
	}
	second, stranger := s.newOperator("second"), s.newOperator("stranger")
	if out := s.must("admin", "login", "root"); !strings.Contains(out, "administrator,operator,auditor,approver") {
		t.Errorf("login: %s", out)
	}
	if _, errOut, code := s.cliAs(stranger, "", "admin", "login", "root"); code != 1 || !strings.HasPrefix(errOut, "countersign: not_proven: ") {
		t.Errorf("a stranger signs in as root: %d %s", code, errOut)
	}
	s.write("second.pub", second.line+"\n")
	out, errOut, code := s.cli("", "admin", "operator", "add", "second", "--roles", "approver,operator", "--ssh-key", "second.pub")
	if code != 0 || out != "proposal 1: done\n" || !strings.HasPrefix(errOut, "countersign-proposal-v1\n") || !strings.Contains(errOut, "\n  roles: operator,approver\n") {
		t.Fatalf("operator add: %d %s %s", code, out, errOut)
	}
	s.must("admin", "approvals", "needed", "2")
	public := strings.TrimSpace(s.must("keygen", s.path("demo.key")))
	if out := s.must("admin", "peer", "add", "demo", public); !strings.HasPrefix(out, "proposal 3: open, 1 of 2 approvals; ") {
		t.Errorf("with one approval: %s", out)
	}
	if out := s.must("admin", "peer", "list"); strings.Contains(out, "demo") {
		t.Errorf("one person has enrolled a peer: %s", out)
	}
	if _, errOut, code := s.cli("", "admin", "proposal", "approve", "3"); code != 1 || !strings.Contains(errOut, "countersign: conflict: ") && !strings.Contains(errOut, "countersign: exists: ") {
		t.Errorf("the same person again: %d %s", code, errOut)
	}
	out, errOut, code = s.cliAs(second, "", "admin", "proposal", "approve", "3", "--json")
	var done api.Proposal
	if err := json.Unmarshal([]byte(out), &done); err != nil || code != 0 || done.State != "done" || len(done.Approvals) != 2 || !strings.Contains(errOut, public) {
		t.Errorf("approve: %d %s %s", code, out, errOut)
	}
	if out := s.must("admin", "peer", "list"); !strings.Contains(out, "demo  "+public) {
		t.Errorf("peers: %s", out)
	}
	// Nobody is left who could undo it.
	if _, errOut, code := s.cli("", "admin", "operator", "remove", "second"); code != 1 {
		t.Errorf("fewer approvers than are needed: %s", errOut)
	}
	if out, _, code := s.cliAs(second, "", "admin", "peer", "add", "other", strings.Repeat("0a", 32), "--propose-only", "--json"); code != 0 || !strings.Contains(out, `"state": "open"`) {
		t.Errorf("propose-only: %d %s", code, out)
	}
	s.must("admin", "proposal", "withdraw", "4")
	if out := s.must("admin", "proposal", "list"); !strings.Contains(out, "withdrawn") || !regexp.MustCompile(`peer add +root +\S+ +2 +done`).MatchString(out) {
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
		if out := s.must(append([]string{"audit", "approvals", "--key", vkey}, from...)...); !strings.Contains(out, "second") || !strings.Contains(out, "peer add") {
			t.Errorf("audit approvals: %s", out)
		}
	}
	s.must("admin", "whoami")
	s.must("admin", "state")
	s.must("admin", "approvals", "show")
	p.stop()
	p = s.serve() // which signs everybody out, and the agent in again
	s.must("admin", "whoami")
	s.must("admin", "logout")
	if _, errOut, code := s.cliAs(&operator{name: "", socket: ""}, "", "admin", "whoami"); code != 1 || !strings.HasPrefix(errOut, "countersign: signed_out: ") {
		t.Errorf("after logout: %d %s", code, errOut)
	}
	p.stop()
}

// proposeAndApprove proposes an act as the first administrator and approves it; the act must not fail.
func (s *system) proposeAndApprove(act, content string, parameters ...approval.Parameter) api.Proposal {
	s.t.Helper()
	p, err := s.admin().Propose(s.t.Context(), api.NewProposal{Act: act, Content: content, Parameters: parameters})
	if err != nil {
		s.t.Fatal(err)
	}
	proof, err := approval.SignSSH(s.root.agent, s.root.credential, approval.ForProposal, p.Text)
	if err == nil {
		p, err = s.admin().Approve(s.t.Context(), p.ID, proof)
	}
	if err != nil || p.State != "done" {
		s.t.Fatalf("%s: %+v, %v", act, p, err)
	}
	return p
}
