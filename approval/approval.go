// Package approval verifies the identity of operators and their approvals of acts. The package has
// the roles and credentials of operators, the canonical text of a proposal, the verification of a
// signature over such a text, and the verification of all approvals from the audit log alone,
// without trust in the appliance. Package internal/operators stores operators and proposals;
// package approval stores nothing. Begin reading at Proposal, then at Credential.Verify and Replay.
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

// Role is a set of permissions of an operator.
type Role string

const (
	Administrator Role = "administrator" // operators, tokens, locks, the binding of the appliance to its device
	OperatorRole  Role = "operator"      // daily work: keys, rotations, peers
	Auditor       Role = "auditor"       // reads everything
	Backup        Role = "backup"        // makes and restores backups
	Metrics       Role = "metrics"       // reads the appliance's health
	Approver      Role = "approver"      // approves proposals
)

// Roles lists all roles.
func Roles() []Role {
	return []Role{Administrator, OperatorRole, Auditor, Backup, Metrics, Approver}
}

// Known reports whether the role is one of Roles.
func (r Role) Known() bool { return slices.Contains(Roles(), r) }

// The kinds of credentials.
const (
	SSH     = "ssh"     // an SSH key, used through an agent; a FIDO key if its type begins with sk-
	Passkey = "passkey" // a WebAuthn credential with user verification
)

// Credential is the public half of a key with which an operator signs. The appliance never has the
// private half.
type Credential struct {
	ID        string `json:"id"`   // first 32 hex digits of SHA-256 of PublicKey: see NewID
	Kind      string `json:"kind"` // SSH or Passkey
	PublicKey string `json:"public_key"`
	// CredentialID and RPID belong to a passkey: the passkey's own id, base64url, and its relying
	// party.
	CredentialID string `json:"credential_id,omitempty"`
	RPID         string `json:"rp_id,omitempty"`
	Added        int64  `json:"added,omitempty"` // Unix seconds
}

// Hardware reports whether the private key is in a FIDO key (an SSH key whose type begins with sk-)
// or a passkey. Only such a credential can verify its user at each signature.
func (c Credential) Hardware() bool {
	return c.Kind == Passkey || strings.HasPrefix(c.PublicKey, "sk-")
}

// Operator is a person with roles and credentials.
type Operator struct {
	Name        string       `json:"name"`
	Roles       []Role       `json:"roles"`
	Credentials []Credential `json:"credentials"`
	Added       int64        `json:"added"` // Unix seconds
}

// Has reports whether the operator has at least one of the roles.
func (o *Operator) Has(roles ...Role) bool {
	return slices.ContainsFunc(roles, func(r Role) bool { return slices.Contains(o.Roles, r) })
}

// CanApprove reports whether the operator can approve: as an approver, and with a hardware key
// where approvals must be by hardware keys.
func (o *Operator) CanApprove(hardware bool) bool {
	return o.Has(Approver) && (!hardware || slices.ContainsFunc(o.Credentials, Credential.Hardware))
}

// Credential returns the operator's credential with an id.
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

// Canonical returns a valid proof in the one form that the audit log has: the lines of an SSHSIG
// are those of ssh-keygen. An assertion has one form only.
func (p Proof) Canonical() Proof {
	if blob, _, err := parseSSHSIG(p.SSHSIG); err == nil {
		p.SSHSIG = armorSSHSIG(blob)
	}
	return p
}

// Assertion is a passkey's answer (WebAuthn section 5.2.2). Each field is base64url without
// padding.
type Assertion struct {
	AuthenticatorData string `json:"authenticator_data"`
	ClientDataJSON    string `json:"client_data_json"`
	Signature         string `json:"signature"`
}

// The purposes of signatures. Each purpose is the namespace of an SSHSIG and the first line of the
// signed text, so that a signature for one purpose is worth nothing for another one.
const (
	ForSignIn   = "countersign-sign-in-v1"
	ForPresence = "countersign-presence-v1"
	ForProposal = "countersign-proposal-v1"
)

// ParseYes parses the value of a setting that is on (yes) or off (no). The error wraps ErrInvalid.
func ParseYes(text string) (bool, error) {
	if text != "yes" && text != "no" {
		return false, fmt.Errorf("%q: %w: it is yes or no", text, ErrInvalid)
	}
	return text == "yes", nil
}

// Yes is the inverse of ParseYes.
func Yes(on bool) string {
	if on {
		return "yes"
	}
	return "no"
}

// ErrNotProven is the error for a proof that does not hold.
var ErrNotProven = errors.New("the signature does not prove it")

// ErrInvalid is the error for malformed input.
var ErrInvalid = errors.New("not valid")

// maxValue is the maximum length of a value, in bytes. The JSON of a credential fits.
const maxValue = 1000

// checkValue refuses a value that a text can't hold on one line, or that a reader would not see: an
// empty value, more than maxValue bytes, invalid UTF-8, spaces at an end, control characters, and
// invisible characters (for example marks that reverse the direction of writing, and blank
// letters).
func checkValue(s string) error {
	if s == "" || len(s) > maxValue || !utf8.ValidString(s) || strings.TrimSpace(s) != s ||
		strings.ContainsFunc(s, Hidden) {
		return fmt.Errorf("must have 1 to %d bytes of text on one line, without hidden characters, "+
			"and no space at its ends", maxValue)
	}
	return nil
}

// Hidden reports that a reader does not see a character: a control character, a mark that reverses
// the direction of writing, a blank letter.
func Hidden(r rune) bool {
	return unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp,
		unicode.Other_Default_Ignorable_Code_Point, unicode.Variation_Selector) ||
		r == '\u2800' // the blank of Braille
}

// MaxProof is the maximum length of the JSON of a proof, in bytes. An event of the audit log has
// room for the whole proof.
const MaxProof = 2000

// NewID returns the id of the credential with a public key.
func NewID(publicKey string) string {
	sum := sha256.Sum256([]byte(publicKey))
	return hex.EncodeToString(sum[:16])
}

// ParseCredential reads the JSON of a credential: one object with the known names in their case,
// each once. The error wraps ErrInvalid.
func ParseCredential(text string) (c Credential, err error) {
	if err := decodeJSON(text, &c); err != nil {
		return Credential{}, fmt.Errorf("credential: %w: it is not the JSON of one: %w", ErrInvalid, err)
	}
	if err := c.Check(); err != nil {
		return Credential{}, err
	}
	return c, nil
}

// Check reports whether NewSSH or NewPasskey could have made the credential. The error wraps
// ErrInvalid.
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

// Verified is the content of a valid proof besides the text.
type Verified struct {
	// SignCount is the authenticator's signature counter, or 0 if the authenticator does not count.
	// A counter that goes back reveals a copy of the credential.
	SignCount uint32
	// Origin is the origin of the page that asked a passkey, as "https://host:port"; "" for SSH.
	Origin string
	// Hardware: a FIDO key or a passkey has made the signature, and has verified its user before,
	// by a PIN, a finger or a face.
	Hardware bool
}

// Verify verifies a proof over a text, whose first line is the namespace. Errors wrap ErrNotProven.
//
// Verify does not look at time or use: the caller must check that the appliance made the text, that
// the text has not expired, and that the text is used once.
func (c Credential) Verify(namespace, text string, p Proof) (v Verified, err error) {
	b, err := json.Marshal(p.Canonical()) // as in the log
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
		v, err = c.verifySSH(namespace, text, p.SSHSIG)
	case p.Assertion != nil && c.Kind == Passkey:
		v, err = c.verifyPasskey(text, p.Assertion)
	default:
		err = fmt.Errorf("the credential is of kind %q", c.Kind)
	}
	if err != nil {
		return Verified{}, fmt.Errorf("%w: %w", ErrNotProven, err)
	}
	return v, nil
}
