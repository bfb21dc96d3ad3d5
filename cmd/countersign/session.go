package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"countersign/admin/api"
	"countersign/approval"
	"countersign/internal/sshagent"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/crypto/ssh/agent"
)

func (t *tool) operatorFlag(flags *pflag.FlagSet) {
	flags.StringVar(&t.operator, "operator", os.Getenv("COUNTERSIGN_OPERATOR"),
		"the `name` of the operator who signs in (or COUNTERSIGN_OPERATOR; default: the operator of the last session)")
}

// signedIn is the record of a session in a file with mode 0600.
type signedIn struct {
	Operator   string `json:"operator"`
	Credential string `json:"credential"`
	Token      string `json:"token"`
}

// sessionFile is the path of the file with the session for a socket.
func sessionFile(socket string) (string, error) {
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("there is no folder for the session: set XDG_RUNTIME_DIR: %w", err)
		}
		dir = filepath.Join(home, ".local", "state")
	}
	path, err := filepath.Abs(socket)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256([]byte(path))
	name := fmt.Sprintf("session-%s-%d.json", hex.EncodeToString(sum[:8]), os.Getuid())
	return filepath.Join(dir, "countersign", name), nil
}

func readSession(socket string) (s signedIn) {
	path, err := sessionFile(socket)
	if err != nil {
		return s
	}
	b, err := os.ReadFile(path)
	if err != nil || json.Unmarshal(b, &s) != nil {
		return signedIn{} // no usable session: the next command that needs one signs in
	}
	return s
}

func (s signedIn) write(socket string) error {
	path, err := sessionFile(socket)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), "session") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // a no-op after the renaming
	_, err = f.Write(b)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// dialAdmin returns a client with the stored session of the socket. When the session has ended, the
// client signs in again by itself, if the operator is known and there is an SSH agent.
func (t *tool) dialAdmin(socket string) (*api.Client, error) {
	if _, err := os.Stat(socket); err != nil {
		return nil, socketError{fmt.Errorf("no appliance runs at this socket: %w; "+
			"start countersignd, or correct --socket (COUNTERSIGN_SOCKET)", err)}
	}
	c, kept := api.NewClient(socket), readSession(socket)
	if t.operator == "" || t.operator == kept.Operator {
		c.SetToken(kept.Token)
	} else {
		kept = signedIn{Operator: t.operator}
	}
	if kept.Operator != "" && os.Getenv("SSH_AUTH_SOCK") != "" {
		c.OnSignedOut(func(ctx context.Context) (string, error) {
			s, err := t.signIn(ctx, c.WithToken(""), socket, kept)
			if err != nil {
				fmt.Fprintf(t.stderr, "countersign: can't sign in %s again: %s\n", kept.Operator, message(err))
			}
			return s.Token, err
		})
	}
	return c, nil
}

var errNoAgent = errors.New("there is no SSH agent at SSH_AUTH_SOCK: start one (eval \"$(ssh-agent)\"), " +
	"and add your key (ssh-add)")

// sshAgent connects to the user's SSH agent. The caller closes the connection.
func sshAgent() (agent.ExtendedAgent, io.Closer, error) {
	path := os.Getenv("SSH_AUTH_SOCK")
	if path == "" {
		return nil, nil, errNoAgent
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", errNoAgent, err)
	}
	return agent.NewClient(conn), conn, nil
}

// maxTries is the maximum number of an agent's keys that a sign-in tries. The appliance accepts
// five failures.
const maxTries = 4

// signIn begins a session with a key of the agent, and stores the session. The appliance does not
// tell strangers which keys an operator has, so signIn tries the keys of the agent. The key of the
// last session comes first.
func (t *tool) signIn(ctx context.Context, c *api.Client, socket string, who signedIn) (api.SignedIn, error) {
	a, closer, err := sshAgent()
	if err != nil {
		return api.SignedIn{}, err
	}
	defer closer.Close()
	keys, err := sshagent.Credentials(a, nil)
	if err != nil {
		return api.SignedIn{}, err
	}
	for i, k := range keys {
		if k.ID == who.Credential {
			keys[0], keys[i] = keys[i], keys[0]
		}
	}
	err = errors.New("the SSH agent has no key that can sign in (ed25519, ecdsa or an sk- key): ssh-add it")
	for _, k := range keys[:min(len(keys), maxTries)] {
		ch, err := c.Challenge(ctx, api.NewChallenge{Purpose: "sign-in", Operator: who.Operator})
		if err != nil {
			return api.SignedIn{}, err
		}
		proof, err := sshagent.Sign(a, k, approval.ForSignIn, ch.Text)
		if err != nil {
			return api.SignedIn{}, err
		}
		s, err := c.SignIn(ctx, api.Proven{Challenge: ch.ID, Proof: proof})
		if err == nil {
			return s, signedIn{who.Operator, k.ID, s.Token}.write(socket)
		}
		if refusal, is := errors.AsType[*api.Error](err); !is || refusal.Code != "not_proven" {
			return api.SignedIn{}, err
		}
	}
	if len(keys) > 0 {
		detail := fmt.Sprintf("none of the first %d keys of the SSH agent is a key of operator %s: "+
			"use an agent with only your key (ssh-add)", min(len(keys), maxTries), who.Operator)
		err = &api.Error{Code: "not_proven", Detail: detail}
	}
	return api.SignedIn{}, err
}

// signText signs a text with the caller's key in the agent.
func (t *tool) signText(me api.Me, namespace, text string) (approval.Proof, error) {
	a, closer, err := sshAgent()
	if err != nil {
		return approval.Proof{}, err
	}
	defer closer.Close()
	keys, err := sshagent.Credentials(a, me.Operator.Credentials)
	if err != nil {
		return approval.Proof{}, err
	}
	if len(keys) == 0 {
		return approval.Proof{}, fmt.Errorf("the SSH agent has no key of operator %s: ssh-add one", me.Operator.Name)
	}
	return sshagent.Sign(a, keys[0], namespace, text)
}

// propose proposes an act that needs approval, with parameters as alternating names and values.
// Without --propose-only, an approver with an SSH agent approves the proposal too.
func (t *tool) propose(ctx context.Context, c *api.Client, act, content string, parameters ...string) error {
	n := api.NewProposal{Act: act, Content: content}
	for pair := range slices.Chunk(parameters, 2) {
		n.Parameters = append(n.Parameters, approval.Parameter{Name: pair[0], Value: pair[1]})
	}
	p, err := c.Propose(ctx, n)
	if err != nil {
		return err
	}
	me, err := c.Me(ctx)
	if err != nil {
		return err
	}
	if t.proposeOnly || !me.Operator.Has(approval.Approver) || os.Getenv("SSH_AUTH_SOCK") == "" {
		t.warn(p.Warnings)
		return t.outcome(p)
	}
	r, err := readReview(ctx, c, p.ID)
	if err == nil { // a signature counts for ever: a text that an appliance has changed must not get one
		err = asks(r.proposal, n, me.Operator.Name)
	}
	if err != nil {
		return fmt.Errorf("proposal %d is not approved yet: %w: read the proposal, then approve it by its number",
			p.ID, err)
	}
	return t.approve(ctx, c, me, r)
}

// asks checks that a text asks for the proposed act in the proposer's name, with the proposed
// parameters and no others. The appliance may add one parameter, the SHA-256 of a content:
// readReview has compared that digest with the content on the screen.
func asks(p *approval.Proposal, n api.NewProposal, proposer string) error {
	for _, each := range n.Parameters {
		if got := p.Parameter(each.Name); got != each.Value {
			return fmt.Errorf("its text says %s: %q, but %q was proposed", each.Name, got, each.Value)
		}
	}
	for _, each := range p.Parameters {
		proposed := slices.ContainsFunc(n.Parameters, func(q approval.Parameter) bool { return q.Name == each.Name })
		if !proposed && each.Name != digestParameter {
			return fmt.Errorf("its text says %s: %q, which was not proposed", each.Name, each.Value)
		}
	}
	if p.Act != n.Act {
		return fmt.Errorf("its text is for the act %q, but %q was proposed", p.Act, n.Act)
	}
	if p.Proposer != proposer {
		return fmt.Errorf("its text names the proposer %q, but %q has proposed", p.Proposer, proposer)
	}
	return nil
}

// approve shows a proposal, asks a person at a terminal, signs the text that was shown, and prints
// the outcome.
func (t *tool) approve(ctx context.Context, c *api.Client, me api.Me, r *review) error {
	if err := t.showReview(ctx, c, r, t.stderr); err != nil {
		return err
	}
	t.warn(r.doc.Warnings)
	if t.interactive() {
		fmt.Fprintf(t.stderr, "approve? [y/N] ")
		var answer string
		fmt.Fscanln(t.stdin, &answer) // an empty line is no
		if answer = strings.ToLower(answer); answer != "y" && answer != "yes" {
			return t.outcome(r.doc)
		}
	}
	// A person may read for longer than a request may take.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	proof, err := t.signText(me, approval.ForProposal, r.proposal.Text())
	if err != nil {
		return err
	}
	p, err := c.Approve(ctx, r.proposal.ID, proof)
	if err != nil {
		return err
	}
	return t.outcome(p)
}

// interactive says whether stdin is a terminal.
func (t *tool) interactive() bool {
	f, ok := t.stdin.(*os.File)
	if !ok {
		return false
	}
	st, err := f.Stat()
	if err != nil || st.Mode()&os.ModeCharDevice == 0 {
		return false
	}
	null, err := os.Stat(os.DevNull)
	return err != nil || !os.SameFile(st, null)
}

// outcome prints the state of a proposal. A failed proposal is an error.
func (t *tool) outcome(p api.Proposal) error {
	switch p.State {
	case "failed", "interrupted", "expired", "withdrawn":
		return fmt.Errorf("proposal %d: %s: %s", p.ID, p.State, p.Cause)
	}
	return t.print(p, func(w io.Writer) {
		switch p.State {
		case "open":
			fmt.Fprintf(w, "proposal %d: open, %d of %d approvals; ", p.ID, p.Counting(), p.Required)
			fmt.Fprintf(w, "others type: countersign admin proposal approve %d\n", p.ID)
		default:
			fmt.Fprintf(w, "proposal %d: %s\n", p.ID, p.State)
		}
	})
}

// login does not use a maker: the command has no session yet.
func (t *tool) login(socket *string) *cobra.Command {
	do := func(cmd *cobra.Command, args []string) error {
		kept := readSession(*socket)
		if kept.Operator != args[0] {
			kept = signedIn{Operator: args[0]}
		}
		t.operator = args[0]
		c, err := t.dialAdmin(*socket)
		if err != nil {
			return err
		}
		s, err := t.signIn(cmd.Context(), c.WithToken(""), *socket, kept)
		if err != nil {
			return err
		}
		return t.print(s.Session, func(w io.Writer) {
			fmt.Fprintf(w, "signed in\t%s, until %s at the latest\n", s.Operator, date(s.Expires))
			fmt.Fprintf(w, "roles\t%s\n", roleText(s.Roles))
		})
	}
	c := command("login NAME", "Sign in as an operator with an SSH key of your agent", cobra.ExactArgs(1), do)
	details(c, "An ed25519, ecdsa or FIDO (sk-) key of the agent at SSH_AUTH_SOCK signs a challenge. The session\n"+
		"is stored for this socket, in $XDG_RUNTIME_DIR/countersign or ~/.local/state/countersign. When\n"+
		"the session has ended, the next command signs in again by itself, as long as the agent has the\n"+
		"key.")
	c.Example = "  countersign admin login ann"
	return c
}

// roleOrder sorts a list of roles into the order of a proposal's text.
func roleOrder(list string) string {
	given := strings.Split(list, ",")
	slices.SortStableFunc(given, func(x, y string) int {
		return slices.Index(approval.Roles(), approval.Role(x)) - slices.Index(approval.Roles(), approval.Role(y))
	})
	return strings.Join(given, ",")
}

func roleText(roles []approval.Role) string {
	var names []string
	for _, r := range roles {
		names = append(names, string(r))
	}
	return strings.Join(names, ",")
}
