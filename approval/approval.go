// Package approval is what operators prove: who they are, and that they approve of an act. It has their roles and credentials,
// the canonical text of a proposal, what a signature over such a text is worth, and the check of all that from the audit log
// alone, without trusting the appliance. It keeps nothing: package operators does. Begin reading at Proposal, then at
// Credential.Verify.
package approval

import (
	"errors"
	"slices"
	"strings"
)

// Role is what an operator may do.
type Role string

const (
	Administrator Role = "administrator" // operators, tokens, locks, what binds the appliance to its device
	OperatorRole  Role = "operator"      // daily work: keys, rotations, peers
	Auditor       Role = "auditor"       // reads everything
	Backup        Role = "backup"        // makes and restores backups
	Metrics       Role = "metrics"       // reads how the appliance is
	Approver      Role = "approver"      // approves proposals
)

// Roles lists all roles.
func Roles() []Role {
	return []Role{Administrator, OperatorRole, Auditor, Backup, Metrics, Approver}
}

// Known says whether there is such a role.
func (r Role) Known() bool { return slices.Contains(Roles(), r) }

// The kinds of credentials.
const (
	SSH     = "ssh"     // an SSH key, used through an agent; a FIDO key where its type begins with sk-
	Passkey = "passkey" // a WebAuthn credential with user verification
)

// Credential is what an operator signs with. Its public half is all that is known of it.
type Credential struct {
	ID        string `json:"id"`   // first 32 hex digits of SHA-256 of PublicKey: see NewID
	Kind      string `json:"kind"` // SSH or Passkey
	PublicKey string `json:"public_key"`
	// CredentialID and RPID are there for a passkey: its id, base64url, and the relying party that it is for.
	CredentialID string `json:"credential_id,omitempty"`
	RPID         string `json:"rp_id,omitempty"`
	Added        int64  `json:"added,omitempty"` // Unix seconds
}

// Operator is a person.
type Operator struct {
	Name        string       `json:"name"`
	Roles       []Role       `json:"roles"`
	Credentials []Credential `json:"credentials"`
	Added       int64        `json:"added"` // Unix seconds
}

// Has says whether the operator has one of the roles.
func (o *Operator) Has(roles ...Role) bool {
	return slices.ContainsFunc(roles, func(r Role) bool { return slices.Contains(o.Roles, r) })
}

// Credential returns that of an id.
func (o *Operator) Credential(id string) (Credential, bool) {
	i := slices.IndexFunc(o.Credentials, func(c Credential) bool { return c.ID == id })
	if i < 0 {
		return Credential{}, false
	}
	return o.Credentials[i], true
}

// Proof is a signature by a credential over a text: an SSHSIG, or a WebAuthn assertion.
type Proof struct {
	Credential string     `json:"credential"`       // its id
	SSHSIG     string     `json:"sshsig,omitempty"` // armored
	Assertion  *Assertion `json:"assertion,omitempty"`
}

// Assertion is what a passkey answers (WebAuthn section 5.2.2), each base64url without padding.
type Assertion struct {
	AuthenticatorData string `json:"authenticator_data"`
	ClientDataJSON    string `json:"client_data_json"`
	Signature         string `json:"signature"`
}

// What is signed for. Each is the namespace of an SSHSIG, and the first line of the text.
const (
	ForSignIn   = "countersign-sign-in-v1"
	ForPresence = "countersign-presence-v1"
	ForProposal = "countersign-proposal-v1"
)

// ErrNotProven is what a proof that does not hold is refused with.
var ErrNotProven = errors.New("the signature does not prove it")

// ErrInvalid is what is not well-formed.
var ErrInvalid = errors.New("not valid")

// checkValue refuses what can't be a value on a line of a text: empty, over 500 bytes, with control characters, or not UTF-8.
func checkValue(s string) error {
	if s == "" || len(s) > 500 || strings.ToValidUTF8(s, "") != s || strings.ContainsFunc(s, func(r rune) bool { return r < 0x20 || r >= 0x7f && r < 0xa0 || r == '\u2028' || r == '\u2029' }) {
		return errors.New("must have 1 to 500 bytes of text on one line")
	}
	return nil
}
