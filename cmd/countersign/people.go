package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"countersign/admin/api"
	"countersign/approval"

	"github.com/spf13/cobra"
)

// people are the commands about operators, their sessions and proposals, and about the appliance as a whole.
func (t *tool) people(act maker, socket *string) []*cobra.Command {
	logout := act("logout", "End the session", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
		path, err := sessionFile(*socket)
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
	whoami := act("whoami", "Say who is signed in", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
		me, err := c.Me(ctx)
		if err != nil {
			return err
		}
		return t.print(me, func(w io.Writer) {
			fmt.Fprintf(w, "operator\t%s\nroles\t%s\nsession\t%s, until %s at the latest\n", me.Operator.Name, roleText(me.Operator.Roles), me.Session.ID, date(me.Session.Expires))
		})
	})
	sessions := group("sessions", "Look after sessions",
		act("list", "List your sessions; an administrator sees all", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
			all, err := c.Sessions(ctx)
			if err != nil {
				return err
			}
			return t.print(all, func(w io.Writer) {
				fmt.Fprintln(w, "ID\tOPERATOR\tCHANNEL\tFROM\tBEGUN\tLAST USED\tENDS")
				for _, s := range all {
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", s.ID, s.Operator, s.Channel, s.Source, date(s.Begun), date(s.LastUsed), date(s.Expires))
				}
			})
		}),
		act("revoke ID", "End a session", cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
			if err := c.EndSession(ctx, args[0]); err != nil {
				return err
			}
			return t.said("revoked", args[0])
		}),
	)
	return []*cobra.Command{t.login(socket), logout, whoami, sessions, t.operators(act), t.credentials(act), t.quorum(act), t.proposals(act),
		t.lock(act), t.unlock(act), t.state(act), t.tls(act)}
}

// said reports an act that has no document.
func (t *tool) said(what, of string) error {
	return t.print(map[string]string{what: of}, func(w io.Writer) { fmt.Fprintln(w, strings.TrimSuffix(what+"\t"+of, "\t")) })
}

// credentialFlags are those that give a credential.
type credentialFlags struct{ ssh, document string }

func (f *credentialFlags) add(c *cobra.Command) *cobra.Command {
	c.Flags().StringVar(&f.ssh, "ssh-key", "", "an SSH public key: a file such as id_ed25519.pub, or its line")
	c.Flags().StringVar(&f.document, "credential", "", "a credential in JSON, as the registration of a passkey gives it; @FILE reads it from a file")
	return c
}

func (f *credentialFlags) read() (c approval.Credential, err error) {
	switch {
	case (f.ssh == "") == (f.document == ""):
		return c, usageError{fmt.Errorf("give --ssh-key or --credential")}
	case f.document != "":
		b := []byte(f.document)
		if path, is := strings.CutPrefix(f.document, "@"); is {
			if b, err = os.ReadFile(path); err != nil {
				return c, err
			}
		}
		if err := json.Unmarshal(b, &c); err != nil {
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

// text is the credential as a parameter.
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
		fmt.Fprintf(w, "credential\t%s\t%s\t%s\n", c.ID, c.Kind, c.PublicKey)
	}
}

func (t *tool) operators(act maker) *cobra.Command {
	var with credentialFlags
	var roles string
	first := act("first NAME", "Enrol the first administrator: as root, once", cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
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
	add := act("add NAME", "Enrol an operator, under approval", cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
		credential, err := with.text()
		if err != nil {
			return err
		}
		return t.propose(ctx, c, "operator add", "", "name", args[0], "roles", roleOrder(roles), "credential", credential)
	})
	add.Flags().StringVar(&roles, "roles", "", "such as operator,approver; of "+roleText(approval.Roles()))
	return group("operator", "Look after operators",
		with.add(first), with.add(add),
		act("list", "List operators", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
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
		}),
		act("show NAME", "Show an operator", cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
			o, err := c.Operator(ctx, args[0])
			if err != nil {
				return err
			}
			return t.print(o, func(w io.Writer) { showOperator(w, o) })
		}),
		act("roles NAME ROLES", "Change an operator's roles, under approval", cobra.ExactArgs(2), func(ctx context.Context, c *api.Client, args []string) error {
			return t.propose(ctx, c, "operator roles", "", "name", args[0], "roles", roleOrder(args[1]))
		}),
		act("remove NAME", "Remove an operator, under approval", cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
			return t.propose(ctx, c, "operator remove", "", "name", args[0])
		}),
	)
}

func (t *tool) credentials(act maker) *cobra.Command {
	var with credentialFlags
	return group("credential", "Look after what operators sign with",
		with.add(act("add NAME", "Give an operator one more credential, under approval", cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
			credential, err := with.text()
			if err != nil {
				return err
			}
			return t.propose(ctx, c, "credential add", "", "name", args[0], "credential", credential)
		})),
		act("remove NAME ID", "Take a credential from an operator, under approval", cobra.ExactArgs(2), func(ctx context.Context, c *api.Client, args []string) error {
			return t.propose(ctx, c, "credential remove", "", "name", args[0], "credential", args[1])
		}),
	)
}

func (t *tool) quorum(act maker) *cobra.Command {
	return group("approvals", "Look after how many approvals an act needs",
		act("show", "Say how many approvals an act needs, and who gives them", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
			a, err := c.Approvals(ctx)
			if err != nil {
				return err
			}
			return t.print(a, func(w io.Writer) {
				fmt.Fprintf(w, "needed\t%d of %d\napprovers\t%s\n", a.Needed, len(a.Approvers), strings.Join(a.Approvers, ", "))
			})
		}),
		act("needed N", "Change how many approvals an act needs, under approval", cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
			return t.propose(ctx, c, "approvals needed", "", "needed", args[0])
		}),
	)
}

func (t *tool) proposals(act maker) *cobra.Command {
	// one makes a command about one proposal.
	one := func(use, short string, do func(context.Context, *api.Client, uint64) error) *cobra.Command {
		return act(use, short, cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
			id, err := strconv.ParseUint(args[0], 10, 64)
			if err != nil {
				return usageError{fmt.Errorf("%q is not the number of a proposal", args[0])}
			}
			return do(ctx, c, id)
		})
	}
	return group("proposal", "Look after acts that need approval",
		act("list", "List proposals, the newest first", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
			all, err := c.Proposals(ctx)
			if err != nil {
				return err
			}
			return t.print(all, func(w io.Writer) {
				fmt.Fprintln(w, "ID\tACT\tBY\tEXPIRES\tAPPROVALS\tSTATE")
				for _, p := range all {
					approvals := fmt.Sprint(len(p.Approvals)) // what it took then is in its text; what counts now is of no account
					if p.State == "open" {
						approvals = fmt.Sprintf("%d of %d", p.Counting(), p.Required)
					}
					fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\n", p.ID, p.Act, p.Proposer, date(p.Expires), approvals, p.State)
				}
			})
		}),
		one("show ID", "Show a proposal: its text, and what came with it", func(ctx context.Context, c *api.Client, id uint64) error {
			p, err := c.Proposal(ctx, id)
			if err != nil {
				return err
			}
			return t.print(p, func(w io.Writer) {
				fmt.Fprintf(w, "%s\nstate\t%s\n", p.Text, strings.TrimSpace(p.State+" "+p.Cause))
				for _, a := range p.Approvals {
					fmt.Fprintf(w, "approved by\t%s, %s%s\n", a.Operator, date(a.At), either(a.Counts || p.State != "open", "", ", which does not count any more"))
				}
				if p.Content != "" {
					fmt.Fprintf(w, "\n%s", p.Content)
				}
			})
		}),
		one("approve ID", "Approve a proposal with your SSH key; the last approval that it needs has it carried out", func(ctx context.Context, c *api.Client, id uint64) error {
			p, err := c.Proposal(ctx, id)
			if err != nil {
				return err
			}
			me, err := c.Me(ctx)
			if err != nil {
				return err
			}
			return t.approve(ctx, c, me, p)
		}),
		one("withdraw ID", "Withdraw a proposal: its proposer or an administrator", func(ctx context.Context, c *api.Client, id uint64) error {
			if err := c.Withdraw(ctx, id); err != nil {
				return err
			}
			return t.said("withdrawn", strconv.FormatUint(id, 10))
		}),
	)
}

func (t *tool) lock(act maker) *cobra.Command {
	var reason string
	c := act("lock", "Lock the appliance: no key is used until it is unlocked", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
		if err := c.Lock(ctx, reason); err != nil {
			return err
		}
		return t.said("locked", reason)
	})
	c.Flags().StringVar(&reason, "reason", "", "why; it goes into the audit log")
	return c
}

func (t *tool) unlock(act maker) *cobra.Command {
	return act("unlock", "Unlock the appliance", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
		if err := c.Unlock(ctx); err != nil {
			return err
		}
		return t.said("unlocked", "")
	})
}

func (t *tool) state(act maker) *cobra.Command {
	return act("state", "Say how the appliance is, and why", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
		h, err := c.Health(ctx)
		if err != nil {
			return err
		}
		// Anybody gets an answer, but the causes are for who is signed in: where that has ended, asking for something else begins it again.
		untold := len(h.Causes) == 0 && h.State != "operational" && h.State != "uninitialised"
		if untold {
			if _, err := c.Me(ctx); err == nil {
				if h, err = c.Health(ctx); err != nil {
					return err
				}
				untold = false
			}
		}
		return t.print(h, func(w io.Writer) {
			fmt.Fprintf(w, "state\t%s\nstarts\t%s\n", h.State, either(h.Unattended, "unlocked", "locked, until an operator unlocks it"))
			for _, cause := range h.Causes {
				fmt.Fprintf(w, "cause\t%s\n", cause)
			}
			if untold {
				fmt.Fprintf(w, "cause\ttold to operators: countersign admin login NAME\n")
			}
			if h.Since != 0 {
				fmt.Fprintf(w, "since\t%s\n", date(h.Since))
			}
		})
	})
}

func (t *tool) tls(act maker) *cobra.Command {
	show := func(doc api.TLS) error {
		return t.print(doc, func(w io.Writer) {
			fmt.Fprintf(w, "certificate\t%s\nnames\t%s\n", either(doc.Installed, "of the CA of the operators", "of the appliance's own CA"), strings.Join(doc.Names, ", "))
			if doc.NotAfter != 0 {
				fmt.Fprintf(w, "issuer\t%s\nvalid\tfrom %s to %s\n", doc.Issuer, date(doc.NotBefore), date(doc.NotAfter))
			}
			if doc.Warning != "" {
				fmt.Fprintf(w, "warning\t%s\n", doc.Warning)
			}
			fmt.Fprintf(w, "%s", doc.CA)
		})
	}
	return group("tls", "Look after the certificate of the HTTPS listener",
		act("show", "Show the certificate, and the CA to trust", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
			doc, err := c.TLS(ctx)
			if err != nil {
				return err
			}
			return show(doc)
		}),
		act("csr", "Print a request for a certificate, for your own CA", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
			doc, err := c.CSR(ctx)
			if err != nil {
				return err
			}
			return t.print(doc, func(w io.Writer) { io.WriteString(w, doc.PEM) })
		}),
		act("install [FILE]", "Put the certificate that your CA has made into use, with its chain (PEM)", cobra.MaximumNArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
			b, err := t.readInput(args)
			if err != nil {
				return err
			}
			doc, err := c.InstallCertificate(ctx, string(b))
			if err != nil {
				return err
			}
			return show(doc)
		}),
		act("uninstall", "Go back to a certificate of the appliance's own CA", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
			doc, err := c.UninstallCertificate(ctx)
			if err != nil {
				return err
			}
			return show(doc)
		}),
	)
}
