package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf8"

	"countersign/admin/api"
	"countersign/approval"
	"countersign/policy"

	"github.com/rogpeppe/go-internal/diff"
	"golang.org/x/crypto/ssh"
)

// A review is a proposal as an approver sees it before signing. The appliance is not trusted with
// what the approver signs:
//
//   - The signed text is made from the parsed proposal. All of its parameters are on the screen.
//   - The SHA-256 in the text is that of the content on the screen, computed here.
//   - The text has the number that the approver has named, and an act that this program knows.
//
// The other lines of a review, such as the settings in force and past decisions, come from the
// appliance, and no signature covers them. Each of them begins with a bar, so that none passes for
// a line of this program.
type review struct {
	proposal *approval.Proposal // parsed from doc.Text
	doc      api.Proposal
}

// withContent are the acts whose proposals have a content.
var withContent = []string{
	approval.ActPolicyActivate, approval.ActGroupSet, approval.ActMachineUpdate, approval.ActMachineConfigure,
}

// digestParameter is the parameter with the SHA-256 of a proposal's content.
const digestParameter = "sha256"

// readReview gets a proposal. An open proposal must be fit for a signature.
func readReview(ctx context.Context, c *api.Client, id uint64) (*review, error) {
	doc, err := c.Proposal(ctx, id)
	if err != nil {
		return nil, err
	}
	p, err := approval.ParseText(doc.Text)
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256([]byte(doc.Content))
	named := p.Parameter(digestParameter)
	switch {
	case p.ID != id:
		return nil, fmt.Errorf("the appliance gives the text of proposal %d as that of proposal %d: do not approve it",
			p.ID, id)
	case doc.Content != "" && named != hex.EncodeToString(digest[:]):
		return nil, fmt.Errorf("proposal %d: its text names SHA-256 %s, and the content that the appliance shows "+
			"has %x: do not approve it", id, cmp.Or(named, "none"), digest)
	case doc.State != "open":
		return &review{p, doc}, nil // to be read only: the appliance has dropped the content
	case named != "" && !slices.Contains(withContent, p.Act):
		return nil, fmt.Errorf("proposal %d: its text has the SHA-256 of a content, and %s has none: do not approve it",
			id, p.Act)
	case named != "" && doc.Content == "":
		return nil, fmt.Errorf("proposal %d: the appliance does not show the content with SHA-256 %s: "+
			"do not approve it", id, named)
	case !slices.Contains(approval.Acts(), p.Act):
		return nil, fmt.Errorf("proposal %d: this program does not know the act %q: "+
			"use the one of the appliance's version", id, p.Act)
	}
	return &review{p, doc}, nil
}

// open refuses a proposal that is not open.
func (r *review) open() error {
	if r.doc.State == "open" {
		return nil
	}
	return fmt.Errorf("proposal %d can't be approved: the appliance says that it is %s: nothing was signed",
		r.proposal.ID, strings.TrimSuffix(oneLine(r.doc.State+": "+r.doc.Cause), ":"))
}

// showReview prints a proposal: the text to be signed, then what a person needs to judge it.
func (t *tool) showReview(ctx context.Context, c *api.Client, r *review, to io.Writer) error {
	to = visible{to}
	if _, err := io.WriteString(to, r.proposal.Text()+"\n"); err != nil {
		return err
	}
	w := tabwriter.NewWriter(&quoted{to: to}, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "state\t%s\n", strings.TrimSpace(r.doc.State+" "+r.doc.Cause))
	for _, a := range r.doc.Approvals {
		lost := either(a.Counts || r.doc.State != "open", "", ", which does not count any more")
		fmt.Fprintf(w, "approved by\t%s, %s%s\n", a.Operator, date(a.At), lost)
	}
	showPerson(ctx, c, w, "proposed by", r.proposal.Proposer)
	switch p := r.proposal; {
	case r.doc.State != "open":
	case strings.HasPrefix(p.Act, "operator ") || strings.HasPrefix(p.Act, "credential "):
		if p.Act != approval.ActOperatorAdd {
			showPerson(ctx, c, w, "concerns", p.Parameter("name"))
		}
		if added, err := approval.ParseCredential(p.Parameter("credential")); err == nil {
			fmt.Fprintf(w, "new key\t%s\n", fingerprint(added))
		}
	case p.Act == approval.ActPeerAdd || p.Act == approval.ActPeerKeyAdd:
		showPeerKey(ctx, c, w, p)
	case p.Parameter("key") != "":
		showVersion(ctx, c, w, p.Parameter("key"), p.Parameter("version"))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	switch {
	case r.doc.State == "open" && strings.HasPrefix(r.proposal.Act, "group "):
		return showGroup(ctx, t, c, r, to)
	case r.doc.Content != "" && r.proposal.Act == approval.ActMachineUpdate:
		_, err := fmt.Fprintf(to, "the manifest, which those who release have signed:\n%s", r.doc.Content)
		return err
	case r.doc.Content != "" && r.proposal.Act == approval.ActMachineConfigure:
		return showConfiguration(ctx, c, r, to)
	case r.doc.Content != "":
		return showPolicy(ctx, t, c, r, to)
	}
	return nil
}

// showPeerKey prints the present keys of the peer of a proposed key, and who has the proposed key.
func showPeerKey(ctx context.Context, c *api.Client, w io.Writer, p *approval.Proposal) {
	peers, err := c.Peers(ctx)
	if err != nil {
		fmt.Fprintf(w, "peer\t%s (not looked up: %s)\n", p.Parameter("name"), message(err))
		return
	}
	has := "nobody"
	for _, each := range peers {
		for _, k := range each.Keys {
			if k.PublicKey == p.Parameter("public_key") {
				has = each.Name
			}
			if each.Name == p.Parameter("name") {
				fmt.Fprintf(w, "present key\t%s, added %s, last seen %s\n",
					k.PublicKey, date(k.Added), lastSeen(k.LastSeen))
			}
		}
	}
	fmt.Fprintf(w, "new key\t%s, which %s has\n", p.Parameter("public_key"), has)
}

// showPerson prints an operator with roles and fingerprints, or that there is none with the name.
func showPerson(ctx context.Context, c *api.Client, w io.Writer, label, name string) {
	o, err := c.Operator(ctx, name)
	refusal, refused := errors.AsType[*api.Error](err)
	switch {
	case refused && refusal.Code == "not_found":
		fmt.Fprintf(w, "%s\t%s, who is NO OPERATOR ANY MORE\n", label, name)
	case err != nil:
		fmt.Fprintf(w, "%s\t%s (not looked up: %s)\n", label, name, message(err))
	default:
		fmt.Fprintf(w, "%s\t%s, an operator with the roles %s\n", label, name, roleText(o.Roles))
		for _, each := range o.Credentials {
			fmt.Fprintf(w, "\t%s  %s\n", each.ID, fingerprint(each))
		}
	}
}

// showVersion prints the version of a key, or for an act without a version the settings in force.
func showVersion(ctx context.Context, c *api.Client, w io.Writer, name, version string) {
	if version == "" {
		if l, err := c.Line(ctx, name); err != nil {
			fmt.Fprintf(w, "key\t%s (not looked up: %s)\n", name, message(err))
		} else {
			fmt.Fprintf(w, "in force now\n")
			showRotation(w, l)
		}
		return
	}
	versions, err := c.Key(ctx, name)
	if err != nil {
		fmt.Fprintf(w, "key\t%s (not looked up: %s)\n", name, message(err))
	}
	for _, k := range versions {
		if fmt.Sprint(k.Version) == version {
			showKey(w, k)
		}
	}
}

// The bounds of the past decisions in a review.
const (
	pastDecisions = 7 * 24 * time.Hour
	pastTimeout   = 20 * time.Second
	pastChanges   = 20 // printed
)

// showPolicy prints a proposed policy with numbered lines, its difference to the policy in force,
// and the past decisions that it would change.
func showPolicy(ctx context.Context, t *tool, c *api.Client, r *review, to io.Writer) error {
	showContent(r, "policy", to)
	before, err := policyInForce(ctx, c)
	if err != nil {
		return err
	}
	to = &quoted{to: to}
	showChanges(r, fmt.Sprintf("version %d, in force", before.Version), before.Text, to)

	next, err := policy.Parse("policy.cedar", []byte(r.doc.Content))
	if err != nil {
		return err
	}
	groups, err := presentGroups(ctx, c)
	if err != nil {
		return err
	}
	return showDecisions(ctx, t, c, to, next, groups, "this policy")
}

// showContent prints the content that the proposal's text names.
func showContent(r *review, what string, to io.Writer) {
	fmt.Fprintf(to, "\nthe %s with SHA-256 %s:\n", what, r.proposal.Parameter(digestParameter))
	n := 0
	for line := range strings.Lines(shown(r.doc.Content)) {
		n++
		fmt.Fprintf(to, "%5d  %s\n", n, strings.TrimSuffix(line, "\n"))
	}
}

// showChanges prints what the content changes. The texts are compared before they are shown: a tab
// and four spaces are shown alike.
func showChanges(r *review, name, before string, to io.Writer) {
	changes := diff.Diff(name, []byte(before), fmt.Sprintf("proposal %d", r.proposal.ID), []byte(r.doc.Content))
	fmt.Fprintf(to, "\n%s\n", either(len(changes) == 0, "the same text is in force", shown(string(changes))))
}

// showConfiguration prints the proposed configuration of a machine, and what it changes.
func showConfiguration(ctx context.Context, c *api.Client, r *review, to io.Writer) error {
	showContent(r, "configuration", to)
	now, err := c.Configuration(ctx)
	if err != nil {
		return err
	}
	showChanges(r, "in force", now.Text, &quoted{to: to})
	return nil
}

// policyInForce returns the policy in force, or a zero policy before the first one.
func policyInForce(ctx context.Context, c *api.Client) (api.Policy, error) {
	all, err := c.Policies(ctx)
	if err != nil || len(all) == 0 {
		return api.Policy{}, err
	}
	return c.Policy(ctx, all[len(all)-1].Version)
}

// showDecisions prints the past decisions that a policy with some groups would change.
func showDecisions(
	ctx context.Context, t *tool, c *api.Client, to io.Writer, next *policy.Policy, groups []policy.Group, name string,
) error {
	past, cancel := context.WithTimeout(ctx, pastTimeout)
	defer cancel()
	from := records{tool: t, client: c, groups: groups, present: true}
	found, err := from.compare(past, pastDecisions, next)
	w := tabwriter.NewWriter(to, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "the decisions of the last %d days by %s:\n", pastDecisions/(24*time.Hour), name)
	found.show(w, pastChanges)
	if err != nil {
		fmt.Fprintf(w, "THE REPLAY IS NOT COMPLETE: %s; type: countersign policy diff\n", message(err))
	}
	return w.Flush()
}

// warn prints the warnings of a proposal on stderr.
func (t *tool) warn(warnings []string) {
	for _, w := range warnings {
		fmt.Fprintf(t.stderr, "countersign: warning: %s\n", oneLine(w))
	}
}

// quoted begins each line with a bar.
type quoted struct {
	to     io.Writer
	inLine bool // the last line has no end yet
}

func (q *quoted) Write(b []byte) (int, error) {
	var out bytes.Buffer
	for line := range bytes.Lines(b) {
		if !q.inLine {
			out.WriteString("| ")
		}
		out.Write(line)
		q.inLine = !bytes.HasSuffix(line, []byte("\n"))
	}
	_, err := q.to.Write(out.Bytes())
	return len(b), err
}

// object names what a proposal is about, on one line: the values of its parameters, except reasons,
// and of long ones the beginning.
func object(parameters []approval.Parameter) string {
	var values []string
	for _, each := range parameters {
		switch value := each.Value; {
		case each.Name == "reason":
		case each.Name == "version" && len(values) > 0:
			values[len(values)-1] += "/" + value
		case each.Name == "credential" && strings.HasPrefix(value, "{"):
			if c, err := approval.ParseCredential(value); err == nil {
				values = append(values, fingerprint(c))
			}
		case each.Name == "key" || each.Name == "name":
			values = append(values, value)
		default:
			if len(value) > 16 && each.Name != "roles" {
				value = value[:16] + "…"
			}
			values = append(values, each.Name+" "+value)
		}
	}
	return strings.Join(values, ", ")
}

// fingerprint returns the fingerprint of an SSH key as ssh-keygen -l prints it, and the id and the
// relying party of a passkey.
func fingerprint(c approval.Credential) string {
	if key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(c.PublicKey)); c.Kind == approval.SSH && err == nil {
		return ssh.FingerprintSHA256(key) + " (" + key.Type() + ")"
	}
	return fmt.Sprintf("passkey %s of %s", c.ID, c.RPID)
}

// shown is a text of others for a terminal. Characters that move the cursor, reverse the writing or
// have no form of their own come out as their numbers, such as \u{202e}; a tab is four spaces. Many
// spaces, which could move a part of a line out of sight, come out as their number.
func shown(text string) string {
	var b strings.Builder
	for len(text) > 0 {
		rest := strings.TrimLeft(text, " ")
		if spaces := len(text) - len(rest); spaces > maxSpaces {
			fmt.Fprintf(&b, `\u{20}×%d`, spaces)
			text = rest
			continue
		}
		r, size := utf8.DecodeRuneInString(text)
		switch {
		case r == '\t':
			b.WriteString("    ")
		case r == '\n' || unicode.IsGraphic(r) && !approval.Hidden(r) && r != unicode.ReplacementChar:
			b.WriteRune(r)
		default:
			fmt.Fprintf(&b, `\u{%x}`, r)
		}
		text = text[size:]
	}
	return b.String()
}

// maxSpaces is the number of spaces that shown leaves as they are: more than an indentation needs.
const maxSpaces = 60
