package approval

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"countersign/internal/eddsa"
	"countersign/internal/pubkey"

	strict "github.com/go-json-experiment/json"
	"github.com/go-webauthn/webauthn/protocol/webauthncbor"
	"github.com/go-webauthn/webauthn/protocol/webauthncose"
)

// maxCredentialID is the maximum length of a passkey's id, in bytes. WebAuthn allows 1023 bytes,
// but the text of a proposal must have room for a credential.
const maxCredentialID = 255

// decode decodes base64url without padding, in its canonical form only.
func decode(s string) ([]byte, error) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil || base64.RawURLEncoding.EncodeToString(b) != s { // the decoder skips line breaks
		return nil, errors.New("it is not base64url without padding")
	}
	return b, nil
}

// checkRPID refuses a relying party that is not the name of a host.
func checkRPID(s string) error {
	if s == "" || len(s) > 253 || strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '.'
	}) {
		return errors.New("the relying party is not the name of a host, in small letters")
	}
	return nil
}

// coseKey parses the canonical form of a public key: base64url of a COSE_Key in the canonical CBOR
// of CTAP2, without further fields.
func coseKey(text string) (any, error) {
	b, err := decode(text)
	if err != nil {
		return nil, err
	}
	key, canonical, err := parseCOSE(b)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(canonical, b) {
		return nil, errors.New("it is not in the one form of a COSE key")
	}
	return key, nil
}

// parseCOSE parses a COSE_Key of ES256 or EdDSA, and returns its canonical encoding, too.
func parseCOSE(b []byte) (key any, canonical []byte, err error) {
	key, err = webauthncose.ParsePublicKey(b)
	if err != nil {
		return nil, nil, errors.New("it is not a COSE key")
	}
	known := false
	switch k := key.(type) {
	case webauthncose.EC2PublicKeyData:
		known = webauthncose.COSEAlgorithmIdentifier(k.Algorithm) == webauthncose.AlgES256 &&
			webauthncose.COSEEllipticCurve(k.Curve) == webauthncose.P256
		err = pubkey.CheckP256(slices.Concat([]byte{4}, k.XCoord, k.YCoord))
	case webauthncose.OKPPublicKeyData:
		known = webauthncose.COSEAlgorithmIdentifier(k.Algorithm) == webauthncose.AlgEdDSA &&
			webauthncose.COSEEllipticCurve(k.Curve) == webauthncose.Ed25519
		err = eddsa.CheckPublicKey(k.XCoord)
	}
	if !known {
		return nil, nil, errors.New("its algorithm is neither ES256 nor EdDSA")
	}
	if err != nil { // the module's own check looks at lengths only, of Ed25519
		return nil, nil, err
	}
	canonical, err = webauthncbor.Marshal(key)
	return key, canonical, err
}

// The types of client data.
const (
	createCeremony = "webauthn.create"
	getCeremony    = "webauthn.get"
)

// checkClient verifies the client data (WebAuthn section 5.8.1): the browser's statement of the
// ceremony, the challenge, and the page that has asked. checkClient returns the origin of the page.
func checkClient(clientDataJSON []byte, ceremony string, challenge []byte, rpID string) (origin string, err error) {
	var said struct {
		Type        string `json:"type"`
		Challenge   string `json:"challenge"`
		Origin      string `json:"origin"`
		CrossOrigin bool   `json:"crossOrigin"`
		TopOrigin   string `json:"topOrigin"`
	}
	// Duplicate names are refused. The browser may add fields.
	if err := strict.Unmarshal(clientDataJSON, &said); err != nil {
		return "", errors.New("the client data are not JSON")
	}
	rest, https := strings.CutPrefix(said.Origin, "https://"+rpID)
	port, hasPort := strings.CutPrefix(rest, ":")
	n, err := strconv.ParseUint(port, 10, 16)
	switch {
	case said.Type != ceremony:
		return "", fmt.Errorf("the client data are of type %q", said.Type)
	case said.Challenge != base64.RawURLEncoding.EncodeToString(challenge):
		return "", errors.New("the challenge is another one")
	case !https || rest != "" && (!hasPort || err != nil || n == 0 || strconv.FormatUint(n, 10) != port):
		return "", fmt.Errorf("the origin is %q, and not https at %s", said.Origin, rpID)
	case said.CrossOrigin || said.TopOrigin != "":
		return "", errors.New("it was made in a frame of another site")
	}
	return said.Origin, nil
}

// The flags of an authenticator's data.
const (
	flagPresent    = 1 << 0
	flagVerified   = 1 << 2
	flagEligible   = 1 << 3 // the credential may be backed up (BE)
	flagBackedUp   = 1 << 4 // the credential is backed up (BS)
	flagAttested   = 1 << 6 // attested credential data follow
	flagExtensions = 1 << 7
)

// authenticatorData is an authenticator's signed statement (WebAuthn section 6.1).
type authenticatorData struct {
	count        uint32 // signature counter
	credentialID []byte // of a new credential
	key          []byte // of a new credential: a COSE_Key
}

// checkAuthenticator parses an authenticator's data, and verifies the relying party, the user's
// presence and the user's verification.
func checkAuthenticator(b []byte, rpID string) (a authenticatorData, err error) {
	bad := errors.New("the authenticator's data are not well-formed")
	const fixed, attested = 32 + 1 + 4, 16 + 2 // hash, flags, counter; AAGUID, length of the id
	if len(b) < fixed {
		return a, bad
	}
	want, flags, rest := sha256.Sum256([]byte(rpID)), b[32], b[fixed:]
	a.count = binary.BigEndian.Uint32(b[33:])
	if flags&flagAttested != 0 {
		if len(rest) < attested {
			return a, bad
		}
		n := int(binary.BigEndian.Uint16(rest[16:]))
		if rest = rest[attested:]; len(rest) < n {
			return a, bad
		}
		a.credentialID, rest = rest[:n], rest[n:]
		var key webauthncbor.RawMessage
		if n, err = webauthncbor.UnmarshalFirst(rest, &key); err != nil {
			return a, bad
		}
		a.key, rest = rest[:n], rest[n:]
	}
	if flags&flagExtensions != 0 {
		var outputs map[string]webauthncbor.RawMessage // ignored: the appliance asks for no extension
		n, err := webauthncbor.UnmarshalFirst(rest, &outputs)
		if err != nil {
			return a, bad
		}
		rest = rest[n:]
	}
	switch {
	case len(rest) > 0:
		return a, bad
	case !bytes.Equal(b[:32], want[:]):
		return a, errors.New("it is for another relying party")
	case flags&flagPresent == 0:
		return a, errors.New("the user was not there")
	case flags&flagVerified == 0:
		return a, errors.New("the authenticator has not verified the user: it needs a PIN, a finger or a face")
	case flags&flagBackedUp != 0 && flags&flagEligible == 0: // WebAuthn section 6.1.3
		return a, errors.New("the authenticator says that the credential is backed up, and that it can't be")
	}
	return a, nil
}

// verifyPasskey verifies an assertion (WebAuthn section 7.2) whose challenge is SHA-256 of a text.
func (c Credential) verifyPasskey(text string, a *Assertion) (v Verified, err error) {
	key, err := coseKey(c.PublicKey)
	if err != nil {
		return v, err
	}
	said, err1 := decode(a.AuthenticatorData)
	clientDataJSON, err2 := decode(a.ClientDataJSON)
	signature, err3 := decode(a.Signature)
	if err := errors.Join(err1, err2, err3); err != nil {
		return v, errors.New("the assertion is not base64url without padding")
	}
	challenge := sha256.Sum256([]byte(text))
	origin, err := checkClient(clientDataJSON, getCeremony, challenge[:], c.RPID)
	if err != nil {
		return v, err
	}
	data, err := checkAuthenticator(said, c.RPID)
	if err != nil {
		return v, err
	}
	client := sha256.Sum256(clientDataJSON)
	signed := append(bytes.Clone(said), client[:]...)
	if good, err := webauthncose.VerifySignature(key, signed, signature); err != nil || !good {
		return v, errors.New("the signature is not good")
	}
	// checkAuthenticator demands a verified user.
	return Verified{SignCount: data.count, Origin: origin, Hardware: true}, nil
}

// NewPasskey makes a credential from the answer of navigator.credentials.create(): the JSON of
// PublicKeyCredential.toJSON(). NewPasskey ignores the attestation, the authenticator's statement
// of its make and model: the operators who approve the credential vouch for the authenticator.
// Errors wrap ErrNotProven.
func NewPasskey(challenge []byte, rpID, origin string, creationResponseJSON []byte) (Credential, error) {
	c, err := newPasskey(challenge, rpID, origin, creationResponseJSON)
	if err != nil {
		return Credential{}, fmt.Errorf("passkey: %w: %w", ErrNotProven, err)
	}
	return c, nil
}

func newPasskey(challenge []byte, rpID, origin string, answer []byte) (Credential, error) {
	if err := checkRPID(rpID); err != nil {
		return Credential{}, err
	}
	var made struct {
		ID       string `json:"id"`
		RawID    string `json:"rawId"`
		Type     string `json:"type"`
		Response struct {
			ClientDataJSON    string `json:"clientDataJSON"`
			AttestationObject string `json:"attestationObject"`
		} `json:"response"`
	}
	var object struct {
		AuthData  []byte                  `cbor:"authData"`
		Format    string                  `cbor:"fmt"`
		Statement webauthncbor.RawMessage `cbor:"attStmt"`
	}
	notMade := errors.New("this is not what a browser answers with when a passkey was made")
	if err := strict.Unmarshal(answer, &made); err != nil || made.Type != "public-key" || made.ID != made.RawID {
		return Credential{}, notMade
	}
	id, err1 := decode(made.RawID)
	clientDataJSON, err2 := decode(made.Response.ClientDataJSON)
	attestation, err3 := decode(made.Response.AttestationObject)
	if errors.Join(err1, err2, err3) != nil || webauthncbor.Unmarshal(attestation, &object) != nil {
		return Credential{}, notMade
	}
	from, err := checkClient(clientDataJSON, createCeremony, challenge, rpID)
	if err != nil {
		return Credential{}, err
	}
	if from != origin {
		return Credential{}, fmt.Errorf("the origin is %q, and not %q", from, origin)
	}
	data, err := checkAuthenticator(object.AuthData, rpID)
	if err != nil {
		return Credential{}, err
	}
	if !bytes.Equal(id, data.credentialID) {
		return Credential{}, errors.New("the browser names another credential than the authenticator")
	}
	if len(id) > maxCredentialID {
		return Credential{}, fmt.Errorf("the authenticator's credential id has more than %d bytes: "+
			"use another authenticator", maxCredentialID)
	}
	_, canonical, err := parseCOSE(data.key)
	if err != nil {
		return Credential{}, err
	}
	public := base64.RawURLEncoding.EncodeToString(canonical)
	c := Credential{
		ID: NewID(public), Kind: Passkey, PublicKey: public,
		CredentialID: base64.RawURLEncoding.EncodeToString(id), RPID: rpID,
	}
	return c, c.Check()
}

// passkeyTimeout is the user's time for an answer in the browser, in milliseconds: the lifetime of
// a challenge.
const passkeyTimeout = 120_000

// PasskeyOptions returns the argument of navigator.credentials.create(), in the form that
// PublicKeyCredential.parseCreationOptionsFromJSON() takes: a passkey for an operator of an
// appliance, by an authenticator without any of the credentials in exclude.
//
// An authenticator keeps one discoverable passkey for each relying party and user handle
// (user.id), and a new one replaces the old one at once, before anybody has approved the new one.
// All appliances that are reached as localhost are one relying party. So each registration has a
// user handle of its own, at random. The browser shows the account as operator@appliance.
func PasskeyOptions(challenge []byte, rpID, appliance, operator string, exclude []Credential) json.RawMessage {
	type algorithm struct {
		Type string `json:"type"`
		Alg  int    `json:"alg"`
	}
	var o struct {
		RP struct {
			ID   string `json:"id"`
			Name string `json:"name"`
		} `json:"rp"`
		User struct {
			ID          string `json:"id"`
			Name        string `json:"name"`
			DisplayName string `json:"displayName"`
		} `json:"user"`
		Challenge              string       `json:"challenge"`
		PubKeyCredParams       []algorithm  `json:"pubKeyCredParams"`
		Timeout                int          `json:"timeout"`
		ExcludeCredentials     []descriptor `json:"excludeCredentials"`
		AuthenticatorSelection struct {
			ResidentKey      string `json:"residentKey"`
			UserVerification string `json:"userVerification"`
		} `json:"authenticatorSelection"`
		Attestation string `json:"attestation"`
	}
	var user [32]byte
	rand.Read(user[:])
	o.RP.ID, o.RP.Name = rpID, appliance
	o.User.ID = base64.RawURLEncoding.EncodeToString(user[:])
	o.User.Name = operator + "@" + appliance
	o.User.DisplayName = o.User.Name
	o.Challenge, o.Timeout = base64.RawURLEncoding.EncodeToString(challenge), passkeyTimeout
	o.PubKeyCredParams = []algorithm{
		{"public-key", int(webauthncose.AlgES256)}, {"public-key", int(webauthncose.AlgEdDSA)},
	}
	o.ExcludeCredentials = descriptors(rpID, exclude)
	// The passkey must be discoverable: a sign-in does not list the passkeys of an operator to
	// strangers.
	o.AuthenticatorSelection.ResidentKey, o.AuthenticatorSelection.UserVerification = "required", "required"
	o.Attestation = "none"
	return options(o)
}

// PasskeyRequest returns the argument of navigator.credentials.get(), in the form that
// PublicKeyCredential.parseRequestOptionsFromJSON() takes. The challenge is SHA-256 of the text to
// be signed. If allow has no passkey of the relying party, the browser offers discoverable
// passkeys.
func PasskeyRequest(challenge []byte, rpID string, allow []Credential) json.RawMessage {
	return options(struct {
		Challenge        string       `json:"challenge"`
		Timeout          int          `json:"timeout"`
		RPID             string       `json:"rpId"`
		AllowCredentials []descriptor `json:"allowCredentials"`
		UserVerification string       `json:"userVerification"`
	}{base64.RawURLEncoding.EncodeToString(challenge), passkeyTimeout, rpID, descriptors(rpID, allow), "required"})
}

type descriptor struct {
	Type string `json:"type"`
	ID   string `json:"id"`
}

func descriptors(rpID string, all []Credential) []descriptor {
	list := []descriptor{}
	for _, c := range all {
		if c.Kind == Passkey && c.RPID == rpID {
			list = append(list, descriptor{"public-key", c.CredentialID})
		}
	}
	return list
}

func options(v any) json.RawMessage {
	b, err := json.Marshal(v)
	if err != nil {
		panic("approval: encode options: " + err.Error()) // unreachable: text, numbers and bytes have an encoding
	}
	return b
}
