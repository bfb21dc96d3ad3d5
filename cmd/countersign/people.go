package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"countersign/admin/api"
	"countersign/approval"

	"github.com/spf13/cobra"
)

// people are the commands about operators, their sessions and proposals, and about the appliance as
// a whole.
func (t *tool) people(act maker) []*cobra.Command {
	return []*cobra.Command{
		t.contexts(), t.login(), t.logout(act), t.whoami(act), t.sessions(act),
		t.operators(act), t.credentials(act), t.quorum(act), t.proposals(act),
		t.lock(act), t.unlock(act), t.state(act), t.tls(act), t.scrapers(act), t.machine(act), t.update(act),
		t.logLevel(act),
	}
}

func (t *tool) logout(act maker) *cobra.Command {
	return act("logout", "End your session", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
		path, err := sessionFile(t.to.name)
		if err != nil {
			return err
		}
		if err := c.EndSession(ctx, "current"); err != nil {
			return err
		}
		if err := os.Remove(path); err != nil {
			return err
		}
		return t.said("signed out", "")
	})
}

func (t *tool) whoami(act maker) *cobra.Command {
	return act("whoami", "Show the operator who is signed in, with roles and session", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			me, err := c.Me(ctx)
			if err != nil {
				return err
			}
			return t.print(me, func(w io.Writer) {
				fmt.Fprintf(w, "operator\t%s\nroles\t%s\n", me.Operator.Name, roleText(me.Operator.Roles))
				fmt.Fprintf(w, "session\t%s, until %s at the latest\n", me.Session.ID, date(me.Session.Expires))
			})
		})
}

func (t *tool) sessions(act maker) *cobra.Command {
	list := act("list", "List your sessions, or as an administrator all sessions", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			all, err := c.Sessions(ctx)
			if err != nil {
				return err
			}
			return t.print(all, func(w io.Writer) {
				fmt.Fprintln(w, "ID\tOPERATOR\tCHANNEL\tFROM\tBEGUN\tLAST USED\tENDS")
				for _, s := range all {
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n",
						s.ID, s.Operator, s.Channel, s.Source, date(s.Begun), date(s.LastUsed), date(s.Expires))
				}
			})
		})
	revoke := act("revoke ID", "End a session by its id, from sessions list", cobra.ExactArgs(1),
		func(ctx context.Context, c *api.Client, args []string) error {
			if err := c.EndSession(ctx, args[0]); err != nil {
				return err
			}
			return t.said("revoked", args[0])
		})
	return group("sessions", "List and end sessions", list, revoke)
}

// said prints the result of an act without a document, for example "archived payments/1".
func (t *tool) said(what, of string) error {
	return t.print(map[string]string{what: of}, func(w io.Writer) {
		fmt.Fprintln(w, strings.TrimSuffix(what+"\t"+of, "\t"))
	})
}

// credentialFlags are the flags with a credential.
type credentialFlags struct{ ssh, document string }

func (f *credentialFlags) add(c *cobra.Command) *cobra.Command {
	c.Flags().StringVar(&f.ssh, "ssh-key", "",
		"an SSH public `key`: a file, for example ann.key.pub, or the line itself")
	c.Flags().StringVar(&f.document, "credential", "",
		"in place of --ssh-key, a credential in `JSON`, from the registration of a passkey; or @FILE")
	return c
}

func (f *credentialFlags) read() (c approval.Credential, err error) {
	switch {
	case (f.ssh == "") == (f.document == ""):
		return c, usageError{errors.New("a credential is needed once: add --ssh-key or --credential")}
	case f.document != "":
		b := []byte(f.document)
		if path, is := strings.CutPrefix(f.document, "@"); is {
			if b, err = os.ReadFile(path); err != nil {
				return c, err
			}
		}
		if c, err = approval.ParseCredential(string(b)); err != nil {
			return c, fmt.Errorf("--credential: %w", err)
		}
		return c, nil
	case strings.Contains(f.ssh, " "):
		return approval.NewSSH(f.ssh)
	}
	b, err := os.ReadFile(f.ssh)
	if err != nil {
		return c, err
	}
	return approval.NewSSH(string(b))
}

// text is the credential as the parameter of a proposal.
func (f *credentialFlags) text() (string, error) {
	c, err := f.read()
	if err != nil {
		return "", err
	}
	b, err := json.Marshal(c)
	return string(b), err
}

func showOperator(w io.Writer, o approval.Operator) {
	fmt.Fprintf(w, "operator\t%s\nroles\t%s\nadded\t%s\n", o.Name, roleText(o.Roles), date(o.Added))
	for _, c := range o.Credentials {
		fmt.Fprintf(w, "credential\t%s\t%s\t%s\n\t%s\n", c.ID, c.Kind, c.PublicKey, fingerprint(c))
	}
}

// showLink prints a new link. The address alone goes to stdout.
func (t *tool) showLink(l api.MadeLink, err error) error {
	if err != nil {
		return nil
	}
	return t.print(l, func(w io.Writer) { fmt.Fprintln(w, l.URL) })
}

// linkPoll is the time between two looks at a link that a person is to use.
const linkPoll = time.Second

// operatorLink is the command that makes a link for a person, and with --wait proposes the passkey.
func (t *tool) operatorLink(act maker) *cobra.Command {
	var roles string
	var wait bool
	c := act("link NAME", "Make a link by which a person makes a passkey, once", cobra.ExactArgs(1),
		func(ctx context.Context, c *api.Client, args []string) error {
			n := api.NewLink{Operator: args[0]}
			for role := range strings.SplitSeq(roleOrder(roles), ",") {
				if role != "" {
					n.Roles = append(n.Roles, approval.Role(role))
				}
			}
			l, err := c.NewLink(ctx, n)
			if err := errors.Join(err, t.showLink(l, err)); err != nil || !wait {
				return err
			}
			credential, err := usedLink(ctx, c, l)
			if err != nil {
				return err
			}
			fmt.Fprintf(t.stderr, "%s has made the passkey %s: the page of the link shows the same id\n",
				l.Operator, credential.ID)
			text, err := json.Marshal(credential)
			if err != nil {
				return err
			}
			if len(l.Roles) == 0 {
				return t.propose(ctx, c, "credential add", "", "name", l.Operator, "credential", string(text))
			}
			return t.propose(ctx, c, "operator add", "",
				"name", l.Operator, "roles", roleOrder(roles), "credential", string(text))
		})
	details(c, "The link works once, for a day, and until the daemon stops. Send it by a way that nobody else reads.\n"+
		"The passkey is worth nothing until a proposal gives it to the operator: the page Operators of the\n"+
		"console proposes it, or --wait.")
	c.Example = "  countersign admin operator link bob --roles operator,approver"
	c.Flags().StringVar(&roles, "roles", "",
		"the `roles` of a new operator, separated by commas; an operator keeps the roles")
	c.Annotations = map[string]string{"long": "yes"} // a person takes time
	c.Flags().BoolVar(&wait, "wait", false, "wait until the person has made the passkey, and propose it")
	return c
}

// usedLink waits until a person has used a link.
func usedLink(ctx context.Context, c *api.Client, made api.MadeLink) (*approval.Credential, error) {
	for {
		all, err := c.Links(ctx)
		if err != nil {
			return nil, err
		}
		at := slices.IndexFunc(all, func(l api.Link) bool { return l.ID == made.ID })
		switch {
		case at < 0:
			return nil, errors.New("the link has ended, and nobody has used it: make a new one")
		case all[at].Credential != nil:
			return all[at].Credential, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(linkPoll):
		}
	}
}

func (t *tool) operators(act maker) *cobra.Command {
	var with credentialFlags
	var roles string
	var byLink bool
	first := act("first NAME", "Enrol the first administrator: once, as root", cobra.ExactArgs(1),
		func(ctx context.Context, c *api.Client, args []string) error {
			if byLink {
				l, err := c.FirstLink(ctx, args[0])
				return errors.Join(err, t.showLink(l, err))
			}
			credential, err := with.read()
			if err != nil {
				return err
			}
			o, err := c.EnrolFirst(ctx, api.NewOperator{Name: args[0], Credential: credential})
			if err != nil {
				return err
			}
			return t.print(o, func(w io.Writer) { showOperator(w, o) })
		})
	first.Example = "  countersign admin operator first ann --ssh-key ann.key.pub\n" +
		"  countersign admin operator first ann --link"
	first.Flags().BoolVar(&byLink, "link", false,
		"in place of a credential, print a link that makes a passkey in a browser, once, within 30 minutes")
	with.add(first)
	first.MarkFlagsMutuallyExclusive("link", "ssh-key", "credential")
	link := t.operatorLink(act)
	add := act("add NAME", "Enrol an operator, under approval", cobra.ExactArgs(1),
		func(ctx context.Context, c *api.Client, args []string) error {
			credential, err := with.text()
			if err != nil {
				return err
			}
			return t.propose(ctx, c, "operator add", "",
				"name", args[0], "roles", roleOrder(roles), "credential", credential)
		})
	add.Example = "  countersign admin operator add bob --roles operator,approver --ssh-key bob.key.pub"
	add.Flags().StringVar(&roles, "roles", "",
		"the `roles`, separated by commas, of: "+roleText(approval.Roles())+" (required)")
	list := act("list", "List operators", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
		all, err := c.Operators(ctx)
		if err != nil {
			return err
		}
		return t.print(all, func(w io.Writer) {
			fmt.Fprintln(w, "NAME\tROLES\tCREDENTIALS\tADDED")
			for _, o := range all {
				fmt.Fprintf(w, "%s\t%s\t%d\t%s\n", o.Name, roleText(o.Roles), len(o.Credentials), date(o.Added))
			}
		})
	})
	show := act("show NAME", "Show an operator with roles and credentials", cobra.ExactArgs(1),
		func(ctx context.Context, c *api.Client, args []string) error {
			o, err := c.Operator(ctx, args[0])
			if err != nil {
				return err
			}
			return t.print(o, func(w io.Writer) { showOperator(w, o) })
		})
	change := act("roles NAME ROLES", "Replace an operator's roles, under approval", cobra.ExactArgs(2),
		func(ctx context.Context, c *api.Client, args []string) error {
			return t.propose(ctx, c, "operator roles", "", "name", args[0], "roles", roleOrder(args[1]))
		})
	details(change, "ROLES are separated by commas, of: "+roleText(approval.Roles())+".")
	change.Example = "  countersign admin operator roles bob operator,approver"
	remove := act("remove NAME", "Remove an operator, under approval", cobra.ExactArgs(1),
		func(ctx context.Context, c *api.Client, args []string) error {
			return t.propose(ctx, c, "operator remove", "", "name", args[0])
		})
	return group("operator", "Enrol, show, change and remove operators",
		first, with.add(add), link, list, show, change, remove)
}

func (t *tool) credentials(act maker) *cobra.Command {
	var with credentialFlags
	add := act("add NAME", "Add a credential to an operator, under approval", cobra.ExactArgs(1),
		func(ctx context.Context, c *api.Client, args []string) error {
			credential, err := with.text()
			if err != nil {
				return err
			}
			return t.propose(ctx, c, "credential add", "", "name", args[0], "credential", credential)
		})
	add.Example = "  countersign admin credential add ann --ssh-key ann-2.key.pub"
	remove := act("remove NAME ID", "Remove a credential from an operator, under approval", cobra.ExactArgs(2),
		func(ctx context.Context, c *api.Client, args []string) error {
			return t.propose(ctx, c, "credential remove", "", "name", args[0], "credential", args[1])
		})
	details(remove, "ID is from countersign admin operator show NAME.")
	return group("credential", "Add and remove credentials of operators", with.add(add), remove)
}

func (t *tool) quorum(act maker) *cobra.Command {
	show := act("show", "Show how many approvals an act needs, by whom, and by which keys", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			a, err := c.Approvals(ctx)
			if err != nil {
				return err
			}
			return t.print(a, func(w io.Writer) {
				fmt.Fprintf(w, "needed\t%d of %d\n", a.Needed, len(a.Approvers))
				fmt.Fprintf(w, "approvers\t%s\n", strings.Join(a.Approvers, ", "))
				fmt.Fprintf(w, "by\t%s\n", either(a.Hardware, "hardware keys that verify their user", "any credential"))
				if a.Warning != "" {
					fmt.Fprintf(w, "warning\t%s\n", a.Warning)
				}
			})
		})
	needed := act("needed N", "Change the number of approvals that an act needs, under approval", cobra.ExactArgs(1),
		func(ctx context.Context, c *api.Client, args []string) error {
			return t.propose(ctx, c, "approvals needed", "", "needed", args[0])
		})
	needed.Example = "  countersign admin approvals needed 2"
	hardware := act("hardware yes|no", "Demand that approvals are by hardware keys, or not, under approval",
		cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
			return t.propose(ctx, c, "approvals hardware", "", "required", args[0])
		})
	details(hardware, "A hardware key is a FIDO key that asks for its PIN at each signature (ssh-keygen\n"+
		"-t ed25519-sk -O verify-required), or a passkey. Approvals by other keys do not count any more.")
	hardware.Example = "  countersign admin approvals hardware yes"
	return group("approvals", "Show and change what approvals an act needs", show, needed, hardware)
}

func (t *tool) proposals(act maker) *cobra.Command {
	// one makes a command about one proposal.
	one := func(use, short string, do func(context.Context, *api.Client, uint64) error) *cobra.Command {
		return act(use, short, cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
			id, err := strconv.ParseUint(args[0], 10, 64)
			if err != nil {
				return usageError{fmt.Errorf("%q is not the number of a proposal: "+
					"countersign admin proposal list shows them", args[0])}
			}
			return do(ctx, c, id)
		})
	}
	list := act("list", "List proposals, the newest first", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			all, err := c.Proposals(ctx)
			if err != nil {
				return err
			}
			return t.print(all, func(w io.Writer) {
				fmt.Fprintln(w, "ID\tACT\tOBJECT\tBY\tEXPIRES\tAPPROVALS\tSTATE")
				for _, p := range all {
					// Only an open proposal has a current number of required approvals.
					approvals := fmt.Sprint(len(p.Approvals))
					if p.State == "open" {
						approvals = fmt.Sprintf("%d of %d", p.Counting(), p.Required)
					}
					fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\t%s\n",
						p.ID, p.Act, object(p.Parameters), p.Proposer, date(p.Expires), approvals, p.State)
				}
			})
		})
	show := one("show ID", "Show a proposal: its text, what it would change, its content and its approvals",
		func(ctx context.Context, c *api.Client, id uint64) error {
			r, err := readReview(ctx, c, id)
			if err != nil {
				return err
			}
			if t.json {
				return t.print(r.doc, nil)
			}
			if err := t.showReview(ctx, c, r, t.stdout); err != nil {
				return err
			}
			return t.print(r.doc, func(w io.Writer) {
				for _, each := range r.doc.Warnings {
					fmt.Fprintf(w, "warning\t%s\n", oneLine(each))
				}
			})
		})
	text := one("text ID", "Print exactly the text that approvers sign, for ssh-keygen -Y sign",
		func(ctx context.Context, c *api.Client, id uint64) error {
			r, err := readReview(ctx, c, id)
			if err != nil {
				return err
			}
			text := r.proposal.Text()
			if err := t.checkProposal(text); err != nil {
				return err
			}
			return t.print(map[string]string{"text": text}, func(w io.Writer) { io.WriteString(w, text) })
		})
	text.Example = "  countersign admin proposal text 3 >3.txt\n" +
		"  ssh-keygen -Y sign -n countersign-proposal-v1 -f ann.key 3.txt\n" +
		"  countersign admin proposal approve 3 --signature 3.txt.sig"
	var signature string
	approve := one("approve ID", "Show a proposal, ask, and approve it with your SSH key",
		func(ctx context.Context, c *api.Client, id uint64) error {
			r, err := readReview(ctx, c, id)
			if err != nil {
				return err
			}
			me, err := c.Me(ctx)
			if err != nil {
				return err
			}
			if signature != "" {
				return t.approveSigned(ctx, c, me, r, signature)
			}
			return t.approve(ctx, c, me, r)
		})
	approve.Flags().StringVar(&signature, "signature", "",
		"a `file` with your signature of proposal text, made elsewhere (default: sign with a key of the SSH agent)")
	details(approve, "The last approval that the proposal needs carries the act out. The command shows what\n"+
		"countersign admin proposal show does, and signs only the text that it has shown: the SHA-256 of a\n"+
		"policy in the text must be that of the policy on the screen. At a terminal, it asks first.")
	withdraw := one("withdraw ID", "Withdraw a proposal, as its proposer or an administrator",
		func(ctx context.Context, c *api.Client, id uint64) error {
			if err := c.Withdraw(ctx, id); err != nil {
				return err
			}
			return t.said("withdrawn", strconv.FormatUint(id, 10))
		})
	return group("proposal", "List, show, approve and withdraw proposals", list, show, text, approve, withdraw)
}

func (t *tool) lock(act maker) *cobra.Command {
	var reason string
	c := act("lock", "Lock the appliance: stop all signing and verifying until unlock", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			if err := c.Lock(ctx, reason); err != nil {
				return err
			}
			return t.said("locked", reason)
		})
	c.Example = "  countersign admin lock --reason \"somebody is in the machine room\""
	reasonFlag(c, &reason)
	return c
}

func (t *tool) unlock(act maker) *cobra.Command {
	return act("unlock", "Unlock a locked appliance", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			if err := c.Unlock(ctx); err != nil {
				return err
			}
			return t.said("unlocked", "")
		})
}

// notOperational is the error of admin state about an appliance in another state.
type notOperational struct {
	state string
	quiet bool
}

func (n notOperational) Error() string { return "the state is " + n.state }

func (t *tool) state(act maker) *cobra.Command {
	quiet := false
	do := func(ctx context.Context, c *api.Client, _ []string) error {
		h, err := c.Health(ctx)
		if err != nil {
			return err
		}
		// Health answers anyone, but gives the causes to operators only. After the end of a
		// session, a request such as Me signs in again.
		untold := len(h.Causes) == 0 && h.State != "operational" && h.State != "uninitialised"
		if untold {
			if _, err := c.Me(ctx); err == nil {
				if h, err = c.Health(ctx); err != nil {
					return err
				}
				untold = false
			}
		}
		var down error
		if h.State != "operational" {
			down = notOperational{h.State, quiet}
		}
		if quiet {
			return down
		}
		if err := t.print(h, func(w io.Writer) {
			starts := either(h.Unattended, "unlocked", "locked, until an operator unlocks it")
			fmt.Fprintf(w, "state\t%s\nstarts\t%s\n", h.State, starts)
			for _, cause := range h.Causes {
				subject := strings.TrimSpace(cause.Code + " " + cause.Subject)
				fmt.Fprintf(w, "cause\t%s: %s\n\t%s\n", subject, cause.Text, cause.Do)
			}
			for _, a := range h.Alerts {
				showAlert(w, a)
			}
			if k := h.KeyWorkers; k != nil {
				fmt.Fprintf(w, "key workers\trun as user %d, %s\n", k.User,
					either(k.OwnUser, "who is not the daemon's", "as the daemon does: see keys_user"))
				for _, what := range k.Exposed {
					fmt.Fprintf(w, "\t%s: move one of them\n", what)
				}
			}
			if n := h.Nonces; n != nil {
				fmt.Fprintf(w, "nonces\t%d alive of %d: %d sign, %d verify (at most %d), %d own (%d reserved)\n",
					n.Alive, n.Max, n.Signing, n.Verifying, n.VerifyingMax, n.Own, n.OwnReserved)
				for _, s := range n.Largest {
					fmt.Fprintf(w, "\t%s: %d %s, at most %d\n", s.Peer, s.Alive, s.Use, n.PeerMax)
				}
			}
			if untold {
				fmt.Fprintf(w, "cause\ttold to operators: countersign admin login NAME\n")
			}
			if h.Since != 0 {
				fmt.Fprintf(w, "since\t%s\n", date(h.Since))
			}
		}); err != nil {
			return err
		}
		return down
	}
	c := act("state", "Show the state of the appliance, and its causes", cobra.NoArgs, do)
	details(c, "Exit status: 0 operational; 4 another state; 3 the appliance does not answer. No session is needed\n"+
		"for the state, and one is needed for the causes.")
	c.Example = "  countersign admin state\n  countersign admin state --quiet || echo \"look at the appliance\""
	c.Flags().BoolVar(&quiet, "quiet", false, "print nothing: the exit status has the answer, for monitors")
	return c
}

func (t *tool) tls(act maker) *cobra.Command {
	show := func(doc api.TLS) error {
		return t.print(doc, func(w io.Writer) {
			ca := either(doc.Installed, "of the CA of the operators", "of the appliance's own CA")
			fmt.Fprintf(w, "certificate\t%s\nnames\t%s\n", ca, strings.Join(doc.Names, ", "))
			if doc.NotAfter != 0 {
				fmt.Fprintf(w, "issuer\t%s\n", doc.Issuer)
				fmt.Fprintf(w, "valid\tfrom %s to %s\n", date(doc.NotBefore), date(doc.NotAfter))
			}
			if doc.Warning != "" {
				fmt.Fprintf(w, "warning\t%s\n", doc.Warning)
			}
			fmt.Fprintf(w, "%s", doc.CA)
		})
	}
	showTLS := act("show", "Show the certificate, and the CA to trust", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			doc, err := c.TLS(ctx)
			if err != nil {
				return err
			}
			return show(doc)
		})
	csr := act("csr", "Print a certificate signing request (PEM), for your own CA", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			doc, err := c.CSR(ctx)
			if err != nil {
				return err
			}
			return t.print(doc, func(w io.Writer) { io.WriteString(w, doc.PEM) })
		})
	csr.Example = "  countersign admin tls csr >appliance.csr"
	install := act("install [FILE|-]", "Install a certificate of your CA with its chain (PEM)", cobra.MaximumNArgs(1),
		func(ctx context.Context, c *api.Client, args []string) error {
			b, err := t.readInput(args)
			if err != nil {
				return err
			}
			doc, err := c.InstallCertificate(ctx, string(b))
			if err != nil {
				return err
			}
			return show(doc)
		})
	install.Example = "  countersign admin tls install appliance.pem"
	uninstall := act("uninstall", "Go back to a certificate of the appliance's own CA", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			doc, err := c.UninstallCertificate(ctx)
			if err != nil {
				return err
			}
			return show(doc)
		})
	return group("tls", "Show and replace the certificate of the HTTPS listener", showTLS, csr, install, uninstall)
}
