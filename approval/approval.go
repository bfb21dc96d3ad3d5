// Package approval is what operators prove: who they are, and that they approve of an act. It has their roles and credentials,
// the canonical text of a proposal, what a signature over such a text is worth, and the check of all that from the audit log
// alone, without trusting the appliance. It keeps nothing: package operators does. Begin reading at Proposal, then at
// Credential.Verify.
package approval

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
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
	Credential string     `json:"credential" doc:"its id; of a passkey also the id that the browser says (rawId)"`
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

// maxValue has room for the JSON of a credential.
const maxValue = 1000

// checkValue refuses what can't be a value on a line of a text, or would not be seen in one: empty, too long, not UTF-8, with spaces
// at an end, with control characters, or with those that have no form of their own (such as what turns the direction of writing, or a letter that is blank).
func checkValue(s string) error {
	hidden := func(r rune) bool {
		return unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp, unicode.Other_Default_Ignorable_Code_Point, unicode.Variation_Selector) || r == '\u2800' // the blank of Braille
	}
	if s == "" || len(s) > maxValue || !utf8.ValidString(s) || strings.TrimSpace(s) != s || strings.ContainsFunc(s, hidden) {
		return fmt.Errorf("must have 1 to %d bytes of text on one line, without hidden characters, and no space at its ends", maxValue)
	}
	return nil
}

// MaxProof bounds the JSON of a proof, so that an event has room for all of it.
const MaxProof = 2000

// NewID is the id of a credential with this public key.
func NewID(publicKey string) string {
	sum := sha256.Sum256([]byte(publicKey))
	return hex.EncodeToString(sum[:16])
}

// Check says whether a credential is one that NewSSH or NewPasskey could have made. The error wraps ErrInvalid.
func (c Credential) Check() error {
	var err error
	switch c.Kind {
	case SSH:
		if _, err = sshKey(c.PublicKey); err == nil && (c.CredentialID != "" || c.RPID != "") {
			err = errors.New("an SSH key has no credential id and no relying party")
		}
	case Passkey:
		_, err = coseKey(c.PublicKey)
		if id, bad := decode(c.CredentialID); err == nil && (bad != nil || len(id) == 0 || len(id) > maxCredentialID) {
			err = fmt.Errorf("a passkey has a credential id of 1 to %d bytes", maxCredentialID)
		}
		if err == nil {
			err = checkRPID(c.RPID)
		}
	default:
		err = fmt.Errorf("a credential is of kind %s or %s", SSH, Passkey)
	}
	if err == nil && c.ID != NewID(c.PublicKey) {
		err = errors.New("its id is not that of its public key")
	}
	if err != nil {
		return fmt.Errorf("credential: %w: %w", ErrInvalid, err)
	}
	return nil
}

// Verify checks a proof over a text, whose first line is the namespace. It returns the authenticator's count of its signatures, 0
// where it has none: one that falls back tells of a copy. Errors wrap ErrNotProven.
//
// It knows nothing of time and of use: that a text is one of ours, not expired and not used before is for the caller to say.
func (c Credential) Verify(namespace, text string, p Proof) (signCount uint32, err error) {
	b, err := json.Marshal(p)
	switch {
	case err != nil || len(b) > MaxProof:
		err = fmt.Errorf("it has more than %d bytes", MaxProof)
	case !strings.HasPrefix(text, namespace+"\n"):
		err = errors.New("the text is for something else")
	case p.Credential != c.ID:
		err = errors.New("it is of another credential")
	case (p.SSHSIG == "") == (p.Assertion == nil):
		err = errors.New("it must have an SSHSIG or an assertion")
	case p.SSHSIG != "" && c.Kind == SSH:
		signCount, err = c.verifySSH(namespace, text, p.SSHSIG)
	case p.Assertion != nil && c.Kind == Passkey:
		signCount, err = c.verifyPasskey(text, p.Assertion)
	default:
		err = fmt.Errorf("the credential is of kind %q", c.Kind)
	}
	if err != nil {
		return 0, fmt.Errorf("%w: %w", ErrNotProven, err)
	}
	return signCount, nil
}
