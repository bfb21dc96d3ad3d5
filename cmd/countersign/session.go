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

	"countersign/admin/api"
	"countersign/approval"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/crypto/ssh/agent"
)

func (t *tool) operatorFlag(flags *pflag.FlagSet) {
	flags.StringVar(&t.operator, "operator", os.Getenv("COUNTERSIGN_OPERATOR"), "who signs in (or COUNTERSIGN_OPERATOR)")
}

// signedIn is what is kept of a session, in a file that only its owner can read.
type signedIn struct {
	Operator   string `json:"operator"`
	Credential string `json:"credential"`
	Token      string `json:"token"`
}

// sessionFile is the place of the session at a socket.
func sessionFile(socket string) (string, error) {
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("there is no place to keep a session: set XDG_RUNTIME_DIR: %w", err)
		}
		dir = filepath.Join(home, ".local", "state")
	}
	path, err := filepath.Abs(socket)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256([]byte(path))
	return filepath.Join(dir, "countersign", fmt.Sprintf("session-%s-%d.json", hex.EncodeToString(sum[:8]), os.Getuid())), nil
}

func readSession(socket string) (s signedIn) {
	path, err := sessionFile(socket)
	if err != nil {
		return s
	}
	b, err := os.ReadFile(path)
	if err != nil || json.Unmarshal(b, &s) != nil {
		return signedIn{} // there is none, or none that can be used: whoever needs one signs in
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
	defer os.Remove(f.Name()) // where it was not renamed
	_, err = f.Write(b)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// dialAdmin returns a client with the session that is kept for the socket. When that has ended, it begins another one by itself where it
// knows for whom.
func (t *tool) dialAdmin(socket string) (*api.Client, error) {
	if _, err := os.Stat(socket); err != nil {
		return nil, socketError{fmt.Errorf("no appliance is running there: %w", err)}
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
				fmt.Fprintf(t.stderr, "countersign: %s can't be signed in again: %s\n", kept.Operator, message(err))
			}
			return s.Token, err
		})
	}
	return c, nil
}

var errNoAgent = errors.New("there is no SSH agent: start one (eval $(ssh-agent)), give it your key (ssh-add), and see that SSH_AUTH_SOCK is set")

// sshAgent is the agent of the user, and what closes the connection.
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

// maxTries bounds with how many keys of an agent a sign-in is tried: the appliance takes five that fail.
const maxTries = 4

// signIn begins a session with a key of the agent, and keeps it. Which key it is nobody says to a stranger, so they are tried, the one
// of the last time first.
func (t *tool) signIn(ctx context.Context, c *api.Client, socket string, who signedIn) (api.SignedIn, error) {
	a, closer, err := sshAgent()
	if err != nil {
		return api.SignedIn{}, err
	}
	defer closer.Close()
	keys, err := approval.InAgent(a, nil)
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
		proof, err := approval.SignSSH(a, k, approval.ForSignIn, ch.Text)
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
		err = &api.Error{Code: "not_proven", Detail: fmt.Sprintf("none of the first %d keys of the SSH agent is one of the operator %s", min(len(keys), maxTries), who.Operator)}
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
	keys, err := approval.InAgent(a, me.Operator.Credentials)
	if err != nil {
		return approval.Proof{}, err
	}
	if len(keys) == 0 {
		return approval.Proof{}, fmt.Errorf("the SSH agent has no key of %s: ssh-add it", me.Operator.Name)
	}
	return approval.SignSSH(a, keys[0], namespace, text)
}

// propose asks for an act that needs approval, given the names and values of its parameters, and approves it where the caller can.
func (t *tool) propose(ctx context.Context, c *api.Client, act, content string, parameters ...string) error {
	n := api.NewProposal{Act: act, Content: content}
	for pair := range slices.Chunk(parameters, 2) {
		n.Parameters = append(n.Parameters, approval.Parameter{Name: pair[0], Value: pair[1]})
	}
	p, err := c.Propose(ctx, n)
	if err != nil {
		return err
	}
	if t.proposeOnly {
		return t.outcome(p)
	}
	me, err := c.Me(ctx)
	if err != nil {
		return err
	}
	if !me.Operator.Has(approval.Approver) || os.Getenv("SSH_AUTH_SOCK") == "" {
		return t.outcome(p)
	}
	if err := asks(p.Text, n); err != nil { // what is signed counts for ever, so no appliance may slip anything in
		return fmt.Errorf("proposal %d is not approved here: %w: read it, then approve it by its number", p.ID, err)
	}
	return t.approve(ctx, c, me, p)
}

// asks says whether a text asks for what was proposed. It may say more: what the appliance has filled in.
func asks(text string, n api.NewProposal) error {
	p, err := approval.ParseText(text)
	if err != nil {
		return err
	}
	for _, each := range n.Parameters {
		if got := p.Parameter(each.Name); got != each.Value {
			return fmt.Errorf("its text says %s: %s, where %s was asked for", each.Name, got, each.Value)
		}
	}
	if p.Act != n.Act {
		return fmt.Errorf("its text is about %s", p.Act)
	}
	return nil
}

// approve shows what is approved, signs it, and says what came of it.
func (t *tool) approve(ctx context.Context, c *api.Client, me api.Me, p api.Proposal) error {
	fmt.Fprintf(t.stderr, "%s", p.Text)
	if t.askedByHand() {
		fmt.Fprintf(t.stderr, "approve? [y/N] ")
		var answer string
		fmt.Fscanln(t.stdin, &answer) // nothing is no
		if answer = strings.ToLower(answer); answer != "y" && answer != "yes" {
			return t.outcome(p)
		}
	}
	proof, err := t.signText(me, approval.ForProposal, p.Text)
	if err == nil {
		p, err = c.Approve(ctx, p.ID, proof)
	}
	if err != nil {
		return err
	}
	return t.outcome(p)
}

// askedByHand says whether somebody sits at a terminal.
func (t *tool) askedByHand() bool {
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

// outcome says how far a proposal is. One that has failed is a failure of the command.
func (t *tool) outcome(p api.Proposal) error {
	switch p.State {
	case "failed", "interrupted", "expired", "withdrawn":
		return fmt.Errorf("proposal %d: %s: %s", p.ID, p.State, p.Cause)
	}
	return t.print(p, func(w io.Writer) {
		switch p.State {
		case "open":
			fmt.Fprintf(w, "proposal %d: open, %d of %d approvals; others type: countersign admin proposal approve %d\n", p.ID, p.Counting(), p.Required, p.ID)
		default:
			fmt.Fprintf(w, "proposal %d: %s\n", p.ID, p.State)
		}
	})
}

// login is a command of its own, since it is about the session, not in one.
func (t *tool) login(socket *string) *cobra.Command {
	c := command("login NAME", "Sign in with an SSH key of your agent", cobra.ExactArgs(1), func(cmd *cobra.Command, args []string) error {
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
			fmt.Fprintf(w, "signed in\t%s, until %s at the latest\nroles\t%s\n", s.Operator, date(s.Expires), roleText(s.Roles))
		})
	})
	c.Long = "Signs a challenge with an ed25519, ecdsa or FIDO (sk-) key of the agent at SSH_AUTH_SOCK. The session is kept in\n" +
		"$XDG_RUNTIME_DIR/countersign, or in ~/.local/state/countersign, for this socket. When it has ended, the next command signs in\n" +
		"again by itself, as long as the agent has the key."
	return c
}

// roleOrder brings a list of roles into the order that a proposal's text has.
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
