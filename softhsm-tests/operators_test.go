package softhsmtests

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"net"
	"strings"

	"countersign/admin/api"
	"countersign/approval"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

// person is an operator of a system with an SSH agent of its own: at a socket for the CLI, and in this process.
type person struct {
	name       string
	agent      agent.Agent
	socket     string
	line       string // the public key, as ssh-add -L prints it
	credential approval.Credential
}

// newPerson starts an agent with a new key.
func (s *system) newPerson(name string) *person {
	s.t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		s.t.Fatal(err)
	}
	p := &person{name: name, agent: agent.NewKeyring(), socket: s.path(name + ".agent"), line: strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))}
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
func (s *system) client(p *person) *api.Client {
	c := api.NewClient(s.path("admin.sock"))
	c.OnSignedOut(func(ctx context.Context) (string, error) { return s.signIn(ctx, p) })
	return c
}

func (s *system) signIn(ctx context.Context, p *person) (token string, err error) {
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

// begin enrols the first administrator, unless the ledger has him. The tests run as root.
func (s *system) begin() {
	s.t.Helper()
	_, err := api.NewClient(s.path("admin.sock")).EnrolFirst(s.t.Context(), api.NewOperator{Name: s.root.name, Credential: s.root.credential})
	refusal, _ := errors.AsType[*api.Error](err)
	if err != nil && (refusal == nil || refusal.Code != "conflict") && !s.begun {
		s.t.Fatalf("enrol the first administrator: %v", err)
	}
	s.begun = true
}

// carryOut proposes an act as the first administrator and approves it; the act must not fail.
func (s *system) carryOut(act, content string, parameters ...approval.Parameter) api.Proposal {
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
