package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sort"
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

// sessionFile is the path of the file with the session of a context.
func sessionFile(context string) (string, error) {
	dir := os.Getenv("XDG_RUNTIME_DIR")
	if dir == "" {
		var err error
		if dir, err = stateFolder(); err != nil {
			return "", fmt.Errorf("there is no folder for the session: set XDG_RUNTIME_DIR: %w", err)
		}
	}
	name := "session-" + context
	if uid := os.Getuid(); uid >= 0 { // Windows has no such numbers
		name += fmt.Sprintf("-%d", uid)
	}
	return filepath.Join(dir, "countersign", name+".json"), nil
}

func readSession(context string) (s signedIn) {
	path, err := sessionFile(context)
	if err != nil {
		return s
	}
	b, err := os.ReadFile(path)
	if err != nil || json.Unmarshal(b, &s) != nil {
		return signedIn{} // no usable session: the next command that needs one signs in
	}
	return s
}

func (s signedIn) write(context string) error {
	path, err := sessionFile(context)
	if err != nil {
		return err
	}
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return keep(path, b)
}

// dialAdmin returns a client of the appliance that the flags name, with the stored session. When
// the session has ended, the client signs in again by itself, if the operator is known and there is
// an SSH agent.
func (t *tool) dialAdmin() (*api.Client, error) {
	var err error
	if t.to, err = t.findAppliance(); err != nil {
		return nil, err
	}
	c, err := t.to.client()
	if err != nil {
		return nil, err
	}
	kept := readSession(t.to.name)
	if t.operator == "" {
		t.operator = t.to.Operator
	}
	if t.operator == "" || t.operator == kept.Operator {
		c.SetToken(kept.Token)
	} else {
		kept = signedIn{Operator: t.operator}
	}
	if kept.Operator != "" && agentAddress() != "" {
		c.OnSignedOut(func(ctx context.Context) (string, error) {
			s, err := t.signIn(ctx, c.WithToken(""), kept)
			if err != nil {
				fmt.Fprintf(t.stderr, "countersign: can't sign in %s again: %s\n", kept.Operator, message(err))
			}
			return s.Token, err
		})
	}
	return c, nil
}

var errNoAgent = errors.New("there is no SSH agent at SSH_AUTH_SOCK: " + noAgentHint)

// sshAgent connects to the user's SSH agent. The caller closes the connection.
func sshAgent() (agent.ExtendedAgent, io.Closer, error) {
	address := agentAddress()
	if address == "" {
		return nil, nil, errNoAgent
	}
	conn, err := dialAgent(address)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", errNoAgent, err)
	}
	return agent.NewClient(conn), conn, nil
}

// agentKeys returns the keys of an agent that may sign: of the known credentials (nil: of all that
// can be a credential) and, with --identity, that one.
func (t *tool) agentKeys(a agent.Agent, known []approval.Credential) ([]approval.Credential, error) {
	keys, err := sshagent.Credentials(a, known)
	if err != nil || t.identity == "" {
		return keys, err
	}
	b, err := os.ReadFile(t.identity)
	if err != nil {
		return nil, fmt.Errorf("--identity: %w", err)
	}
	only, err := approval.NewSSH(string(b))
	if err != nil {
		return nil, fmt.Errorf("--identity %s: %w", t.identity, err)
	}
	return slices.DeleteFunc(keys, func(c approval.Credential) bool { return c.ID != only.ID }), nil
}

// maxOffered is the maximum number of keys about which a sign-in asks the appliance.
const maxOffered = 256

// signIn begins a session with a key of the agent, and stores the session. As an SSH client does,
// signIn first asks which of the agent's keys the appliance accepts, and has the agent sign with
// these only. The key of the last session comes first. A key that the agent refuses, such as a FIDO
// key that is not plugged in, leaves the turn to the next one.
func (t *tool) signIn(ctx context.Context, c *api.Client, who signedIn) (api.SignedIn, error) {
	a, closer, err := sshAgent()
	if err != nil {
		return api.SignedIn{}, err
	}
	defer closer.Close()
	keys, err := t.agentKeys(a, nil)
	if err != nil {
		return api.SignedIn{}, err
	}
	first(keys, func(k approval.Credential) bool { return k.ID == who.Credential })
	keys = keys[:min(len(keys), maxOffered)]
	ask := api.NewChallenge{Purpose: "sign-in", Operator: who.Operator}
	for _, k := range keys {
		ask.Credentials = append(ask.Credentials, k.ID)
	}
	ch, err := c.Challenge(ctx, ask)
	if err != nil {
		return api.SignedIn{}, err
	}
	if err := t.checkChallenge(ch.Text, approval.ForSignIn, who.Operator, ""); err != nil {
		return api.SignedIn{}, err
	}
	offered := len(keys)
	keys = slices.DeleteFunc(keys, func(k approval.Credential) bool { return !slices.Contains(ch.Credentials, k.ID) })
	if len(keys) == 0 {
		detail := fmt.Sprintf("none of the %d keys that the SSH agent offers (ed25519, ecdsa or sk-) is a key of "+
			"operator %s: ssh-add it, or correct --identity and --operator", offered, who.Operator)
		if offered == 0 && t.identity != "" {
			detail = fmt.Sprintf("the SSH agent does not have the key of --identity %s: ssh-add it", t.identity)
		}
		return api.SignedIn{}, &api.Error{Code: "not_proven", Detail: detail}
	}
	proof, err := sshagent.SignWithAny(a, keys, approval.ForSignIn, ch.Text)
	if err != nil {
		return api.SignedIn{}, err
	}
	s, err := c.SignIn(ctx, api.Proven{Challenge: ch.ID, Proof: proof})
	if err != nil {
		return api.SignedIn{}, err
	}
	return s, signedIn{who.Operator, proof.Credential, s.Token}.write(t.to.name)
}

// first moves the credentials with a property to the front, and keeps the order otherwise.
func first(all []approval.Credential, has func(approval.Credential) bool) {
	sort.SliceStable(all, func(i, j int) bool { return has(all[i]) && !has(all[j]) })
}

// signText signs a text with one of the caller's keys in the agent: a proposal of the context's
// appliance, or a challenge that has passed checkChallenge. Hardware keys come first: an approval
// may have to be by one.
func (t *tool) signText(me api.Me, namespace, text string) (approval.Proof, error) {
	if namespace == approval.ForProposal {
		if err := t.checkProposal(text); err != nil {
			return approval.Proof{}, err
		}
	}
	a, closer, err := sshAgent()
	if err != nil {
		return approval.Proof{}, err
	}
	defer closer.Close()
	keys, err := t.agentKeys(a, me.Operator.Credentials)
	if err != nil {
		return approval.Proof{}, err
	}
	if len(keys) == 0 {
		return approval.Proof{}, fmt.Errorf("the SSH agent has no key of operator %s: "+
			"ssh-add one, or correct --identity", me.Operator.Name)
	}
	first(keys, approval.Credential.Hardware)
	return sshagent.SignWithAny(a, keys, namespace, text)
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
	if t.proposeOnly || !me.Operator.Has(approval.Approver) || agentAddress() == "" {
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
// the outcome. A proposal that is not open, by the word of the appliance, gets no signature: its
// content was not shown, and an approval of it is worth nothing to an honest appliance.
func (t *tool) approve(ctx context.Context, c *api.Client, me api.Me, r *review) error {
	if err := t.showReview(ctx, c, r, t.stderr); err != nil {
		return err
	}
	t.warn(r.doc.Warnings)
	if err := r.open(); err != nil {
		return err
	}
	p := r.proposal
	if t.interactive() && !t.confirms(fmt.Sprintf("approve as %s proposal %d of %s, %s (%s), proposed by %s?",
		oneLine(me.Operator.Name), p.ID, p.Appliance, p.Act, object(p.Parameters), p.Proposer)) {
		return t.outcome(r.doc)
	}
	// A person may read for longer than a request may take.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	proof, err := t.signText(me, approval.ForProposal, p.Text())
	if err != nil {
		return err
	}
	after, err := c.Approve(ctx, p.ID, proof)
	if err != nil {
		return err
	}
	return t.outcome(after)
}

// approveSigned approves a proposal by a signature that was made elsewhere, for example by
// ssh-keygen on a machine without a network.
func (t *tool) approveSigned(ctx context.Context, c *api.Client, me api.Me, r *review, file string) error {
	if err := r.open(); err != nil {
		return err
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	proof, err := approval.NewSSHProof(string(b))
	if err != nil {
		return fmt.Errorf("--signature %s: %w", file, err)
	}
	by, has := me.Operator.Credential(proof.Credential)
	if !has {
		return fmt.Errorf("--signature %s: it is by the key %s, which is no credential of operator %s",
			file, proof.Credential, me.Operator.Name)
	}
	text := r.proposal.Text()
	if err := t.checkProposal(text); err != nil {
		return err
	}
	if _, err := by.Verify(approval.ForProposal, text, proof); err != nil {
		return fmt.Errorf("--signature %s: sign the text of proposal text %d with the namespace %s: %w",
			file, r.proposal.ID, approval.ForProposal, err)
	}
	p, err := c.Approve(ctx, r.proposal.ID, proof)
	if err != nil {
		return err
	}
	return t.outcome(p)
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
func (t *tool) login() *cobra.Command {
	do := func(cmd *cobra.Command, args []string) error {
		t.operator = args[0]
		c, err := t.dialAdmin()
		if err != nil {
			return err
		}
		kept := readSession(t.to.name)
		if kept.Operator != args[0] {
			kept = signedIn{Operator: args[0]}
		}
		s, err := t.signIn(cmd.Context(), c.WithToken(""), kept)
		if err != nil {
			return err
		}
		return t.print(s.Session, func(w io.Writer) {
			fmt.Fprintf(w, "signed in\t%s, until %s at the latest\n", s.Operator, date(s.Expires))
			fmt.Fprintf(w, "roles\t%s\n", roleText(s.Roles))
		})
	}
	c := command("login NAME", "Sign in as an operator with an SSH key of your agent", cobra.ExactArgs(1), do)
	details(c, "An ed25519, ecdsa or FIDO (sk-) key of the agent at SSH_AUTH_SOCK signs a challenge, which must be\n"+
		"of the context's appliance. The session is stored for the context, in $XDG_RUNTIME_DIR/countersign\n"+
		"or ~/.local/state/countersign. When the session has ended, the next command signs in again by\n"+
		"itself, as long as the agent has the key. On Windows, the agent is the service ssh-agent unless\n"+
		"SSH_AUTH_SOCK is set, and the session is in %LocalAppData%\\countersign.")
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
