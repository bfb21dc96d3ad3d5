package approval

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Proposal is an act that needs approval. What approvers sign is its Text.
type Proposal struct {
	ID         uint64
	Appliance  string // the name of its audit log, so that an approval is good at one appliance only
	Act        string // such as "key destroy"
	Parameters []Parameter
	Proposer   string
	Proposed   time.Time // whole seconds
	Expires    time.Time // whole seconds; not carried out after that
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

// MaxText bounds a proposal's text, so that an event has room for all of it.
const MaxText = 2000

// Text is the one form of a proposal: lines of a name, a colon, a space and a value, each ended by a line feed. The parameters come
// in their order, indented by two spaces.
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

// Digest is SHA-256 of the text: the challenge of a WebAuthn assertion, and the hash inside of an SSHSIG that is made with the hash
// algorithm sha256.
func (p *Proposal) Digest() [32]byte { return sha256.Sum256([]byte(p.Text())) }

// ParseText reads what Text has written, and nothing else. The error wraps ErrInvalid.
func ParseText(text string) (*Proposal, error) {
	bad := func(what string) (*Proposal, error) {
		return nil, fmt.Errorf("proposal: %w: %s", ErrInvalid, what)
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
			return bad("a number or a time is none")
		}
	}
	if nonce, err := hex.DecodeString(p.Nonce); err != nil || len(nonce) != 16 {
		return bad("it has no nonce")
	}
	if p.Text() != text { // the order, and each form that has another one
		return bad("it is not in the one form that it has")
	}
	return p, nil
}
