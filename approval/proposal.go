package approval

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Proposal is an act that needs approval. Approvers sign the proposal's Text.
type Proposal struct {
	ID         uint64
	Appliance  string // the name of its audit log: an approval is valid at one appliance only
	Act        string // for example "key destroy"
	Parameters []Parameter
	Proposer   string
	Proposed   time.Time // whole seconds
	Expires    time.Time // whole seconds; not carried out later
	Needed     int       // approvals
	Nonce      string    // 32 hex digits
}

// Parameter is one detail of an act.
type Parameter struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// Parameter returns the value of a parameter, or "".
func (p *Proposal) Parameter(name string) string {
	for _, each := range p.Parameters {
		if each.Name == name {
			return each.Value
		}
	}
	return ""
}

// NeedsHardware reports whether approvals of the proposal count only by hardware keys that have
// verified their users: where that is the rule (see ActHardwareKeys), and for the proposal that
// makes it the rule. The type of a key does not say whether the key verifies its user. If the
// approvers had no such key, no act could be approved any more, not even the end of the rule.
func (p *Proposal) NeedsHardware(rule bool) bool {
	return rule || p.Act == ActHardwareKeys && p.Parameter("required") == Yes(true)
}

// MaxText is the maximum length of a proposal's text, in bytes. An event of the audit log has room
// for the whole text.
const MaxText = 2000

// Text returns the canonical form of a proposal: lines of a name, a colon, a space and a value,
// each ended by a line feed. The parameters come in their order, indented by two spaces.
func (p *Proposal) Text() string {
	var b strings.Builder
	line := func(name, value string) { fmt.Fprintf(&b, "%s: %s\n", name, value) }
	b.WriteString(ForProposal + "\n")
	line("appliance", p.Appliance)
	line("proposal", strconv.FormatUint(p.ID, 10))
	line("act", p.Act)
	for _, each := range p.Parameters {
		line("  "+each.Name, each.Value)
	}
	line("proposed by", p.Proposer)
	line("proposed at", p.Proposed.UTC().Format(time.RFC3339))
	line("expires at", p.Expires.UTC().Format(time.RFC3339))
	line("approvals needed", strconv.Itoa(p.Needed))
	line("nonce", p.Nonce)
	return b.String()
}

// Digest returns SHA-256 of the text. The digest is the challenge of a WebAuthn assertion, and the
// hash inside an SSHSIG with the hash algorithm sha256.
func (p *Proposal) Digest() [32]byte { return sha256.Sum256([]byte(p.Text())) }

// ParseText parses a text that Text has written, and refuses every other text. The error wraps
// ErrInvalid.
func ParseText(text string) (*Proposal, error) {
	bad := func(reason string) (*Proposal, error) {
		return nil, fmt.Errorf("proposal: %w: %s", ErrInvalid, reason)
	}
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if len(text) > MaxText || len(lines) < 9 || lines[0] != ForProposal {
		return bad("it is not a text of a proposal")
	}
	p := new(Proposal)
	values := map[string]string{}
	for _, l := range lines[1:] {
		name, value, ok := strings.Cut(l, ": ")
		if !ok || checkValue(value) != nil {
			return bad("a line has no value")
		}
		if parameter, ok := strings.CutPrefix(name, "  "); ok {
			p.Parameters = append(p.Parameters, Parameter{parameter, value})
		} else {
			values[name] = value
		}
	}
	var errs [4]error
	p.Appliance, p.Act, p.Proposer, p.Nonce = values["appliance"], values["act"], values["proposed by"], values["nonce"]
	p.ID, errs[0] = strconv.ParseUint(values["proposal"], 10, 64)
	p.Proposed, errs[1] = time.Parse(time.RFC3339, values["proposed at"])
	p.Expires, errs[2] = time.Parse(time.RFC3339, values["expires at"])
	p.Needed, errs[3] = strconv.Atoi(values["approvals needed"])
	for _, err := range errs {
		if err != nil {
			return bad("a number or a time has another form")
		}
	}
	if p.Text() != text { // another order of lines, or another form of a number or a time
		return bad("its text is not in the canonical form")
	}
	if err := p.Check(); err != nil {
		return nil, err
	}
	return p, nil
}

// MaxLife is the maximum time from a proposal to its expiry.
const MaxLife = 7 * 24 * time.Hour

var (
	actForm       = regexp.MustCompile(`^[a-z]+( [a-z]+)*$`)
	parameterForm = regexp.MustCompile(`^[a-z][a-z0-9_]*$`)
	nonceForm     = regexp.MustCompile(`^[0-9a-f]{32}$`)
)

// Check reports whether ParseText would parse the proposal's Text. The error wraps ErrInvalid.
func (p *Proposal) Check() error {
	err := p.checkFields()
	if err == nil {
		err = p.checkParameters()
	}
	if err == nil && len(p.Text()) > MaxText {
		err = fmt.Errorf("its text has more than %d bytes", MaxText)
	}
	if err != nil {
		return fmt.Errorf("proposal: %w: %w", ErrInvalid, err)
	}
	return nil
}

func (p *Proposal) checkFields() error {
	second := func(t time.Time) bool { return t.Nanosecond() == 0 && t.Year() >= 1970 && t.Year() <= 9999 }
	if err := checkValue(p.Appliance); err != nil {
		return fmt.Errorf("the appliance %w", err)
	}
	if err := checkValue(p.Proposer); err != nil {
		return fmt.Errorf("the proposer %w", err)
	}
	switch {
	case p.ID == 0:
		return errors.New("its number is 0")
	case len(p.Act) > 40 || !actForm.MatchString(p.Act):
		return errors.New("an act has words of small letters, 40 bytes at most")
	case p.Needed < 1:
		return errors.New("it needs no approval")
	case !nonceForm.MatchString(p.Nonce):
		return errors.New("it has no nonce of 32 hex digits")
	case !second(p.Proposed.UTC()) || !second(p.Expires.UTC()):
		return errors.New("its times are not in whole seconds")
	case !p.Expires.After(p.Proposed) || p.Expires.Sub(p.Proposed) > MaxLife:
		return fmt.Errorf("it must expire after it was proposed, and within %d days", MaxLife/(24*time.Hour))
	}
	return nil
}

func (p *Proposal) checkParameters() error {
	seen := map[string]bool{}
	for _, each := range p.Parameters {
		if len(each.Name) > 40 || !parameterForm.MatchString(each.Name) {
			return errors.New("the name of a parameter has small letters, digits and _, 40 bytes at most")
		}
		if seen[each.Name] {
			return fmt.Errorf("the parameter %s is there twice", each.Name)
		}
		if err := checkValue(each.Value); err != nil {
			return fmt.Errorf("the parameter %s %w", each.Name, err)
		}
		seen[each.Name] = true
	}
	return nil
}
