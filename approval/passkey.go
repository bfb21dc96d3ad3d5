package approval

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	strict "github.com/go-json-experiment/json"
	"github.com/go-webauthn/webauthn/protocol"
	"github.com/go-webauthn/webauthn/protocol/webauthncbor"
	"github.com/go-webauthn/webauthn/protocol/webauthncose"
)

// maxCredentialID is less than what WebAuthn allows, 1023 bytes: a credential must have room in the text of a proposal.
const maxCredentialID = 255

// decode reads base64url without padding, in its one form.
func decode(s string) ([]byte, error) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil || base64.RawURLEncoding.EncodeToString(b) != s { // the decoder skips line ends
		return nil, errors.New("it is not base64url without padding")
	}
	return b, nil
}

// checkRPID refuses what is not the name of a host.
func checkRPID(s string) error {
	if s == "" || len(s) > 253 || strings.ContainsFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '.'
	}) {
		return errors.New("the relying party is not the name of a host, in small letters")
	}
	return nil
}

// coseKey reads a public key in its one form: base64url of a COSE_Key in CTAP2's canonical CBOR, with nothing else in it.
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

func parseCOSE(b []byte) (key any, canonical []byte, err error) {
	key, err = webauthncose.ParsePublicKey(b)
	if err != nil {
		return nil, nil, errors.New("it is not a COSE key")
	}
	switch k := key.(type) {
	case webauthncose.EC2PublicKeyData:
		if webauthncose.COSEAlgorithmIdentifier(k.Algorithm) != webauthncose.AlgES256 || webauthncose.COSEEllipticCurve(k.Curve) != webauthncose.P256 {
			err = errors.New("its algorithm is neither ES256 nor EdDSA")
		}
	case webauthncose.OKPPublicKeyData:
		if webauthncose.COSEAlgorithmIdentifier(k.Algorithm) != webauthncose.AlgEdDSA || webauthncose.COSEEllipticCurve(k.Curve) != webauthncose.Ed25519 {
			err = errors.New("its algorithm is neither ES256 nor EdDSA")
		}
	default:
		err = errors.New("its algorithm is neither ES256 nor EdDSA")
	}
	if err != nil {
		return nil, nil, err
	}
	canonical, err = webauthncbor.Marshal(key)
	return key, canonical, err
}

// checkClient reads what the browser says that it was asked for, and where.
func checkClient(clientDataJSON []byte, ceremony protocol.CeremonyType, challenge []byte, rpID string) (origin string, err error) {
	var said protocol.CollectedClientData
	if err := strict.Unmarshal(clientDataJSON, &said); err != nil { // no name twice; the browser may add fields
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

// checkAuthenticator holds the authenticator's data against the relying party, and demands that the user was there and verified.
func checkAuthenticator(a protocol.AuthenticatorData, rpID string) error {
	want := sha256.Sum256([]byte(rpID))
	switch {
	case !bytes.Equal(a.RPIDHash, want[:]):
		return errors.New("it is for another relying party")
	case !a.Flags.HasUserPresent():
		return errors.New("the user was not there")
	case !a.Flags.HasUserVerified():
		return errors.New("the authenticator has not verified the user: it needs a PIN, a finger or a face")
	}
	return nil
}

// verifyPasskey checks an assertion (WebAuthn section 7.2) whose challenge is the digest of a text.
func (c Credential) verifyPasskey(text string, a *Assertion) (signCount uint32, err error) {
	key, err := coseKey(c.PublicKey)
	if err != nil {
		return 0, err
	}
	authenticatorData, err1 := decode(a.AuthenticatorData)
	clientDataJSON, err2 := decode(a.ClientDataJSON)
	signature, err3 := decode(a.Signature)
	if err := errors.Join(err1, err2, err3); err != nil {
		return 0, errors.New("the assertion is not base64url without padding")
	}
	challenge := sha256.Sum256([]byte(text))
	if _, err := checkClient(clientDataJSON, protocol.AssertCeremony, challenge[:], c.RPID); err != nil {
		return 0, err
	}
	var data protocol.AuthenticatorData
	if err := data.Unmarshal(authenticatorData); err != nil {
		return 0, errors.New("the authenticator's data are not well-formed")
	}
	if err := checkAuthenticator(data, c.RPID); err != nil {
		return 0, err
	}
	said := sha256.Sum256(clientDataJSON)
	if good, err := webauthncose.VerifySignature(key, append(bytes.Clone(authenticatorData), said[:]...), signature); err != nil || !good {
		return 0, errors.New("the signature is not good")
	}
	return data.Counter, nil
}

// NewPasskey makes the credential of what navigator.credentials.create() has answered: the JSON of PublicKeyCredential.toJSON().
// What the authenticator says of its make (its attestation) is not looked at: who enrols it vouches for it. Errors wrap ErrNotProven.
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
	made, err := protocol.ParseCredentialCreationResponseBytes(answer)
	if err != nil {
		return Credential{}, errors.New("this is not what a browser answers with when a passkey was made")
	}
	from, err := checkClient(made.Raw.AttestationResponse.ClientDataJSON, protocol.CreateCeremony, challenge, rpID)
	if err != nil {
		return Credential{}, err
	}
	if from != origin {
		return Credential{}, fmt.Errorf("the origin is %q, and not %q", from, origin)
	}
	data := made.Response.AttestationObject.AuthData
	if err := checkAuthenticator(data, rpID); err != nil {
		return Credential{}, err
	}
	id := data.AttData.CredentialID
	if !bytes.Equal(id, made.RawID) {
		return Credential{}, errors.New("the browser names another credential than the authenticator")
	}
	if len(id) > maxCredentialID {
		return Credential{}, fmt.Errorf("the authenticator's credential id has more than %d bytes: use another authenticator", maxCredentialID)
	}
	_, canonical, err := parseCOSE(data.AttData.CredentialPublicKey)
	if err != nil {
		return Credential{}, err
	}
	public := base64.RawURLEncoding.EncodeToString(canonical)
	c := Credential{ID: NewID(public), Kind: Passkey, PublicKey: public, CredentialID: base64.RawURLEncoding.EncodeToString(id), RPID: rpID}
	return c, c.Check()
}

// passkeyTimeout is how long a browser lets a user take, in milliseconds: as long as a challenge lives.
const passkeyTimeout = 120_000

// PasskeyOptions is what navigator.credentials.create() is asked with, in the form of PublicKeyCredential.parseCreationOptionsFromJSON():
// a passkey for an operator of this name, by an authenticator that has none of exclude.
func PasskeyOptions(challenge []byte, rpID, name string, exclude []Credential) json.RawMessage {
	user := sha256.Sum256([]byte("countersign operator " + name)) // a handle that says no name
	return options(protocol.PublicKeyCredentialCreationOptions{
		RelyingParty: protocol.RelyingPartyEntity{CredentialEntity: protocol.CredentialEntity{Name: "Countersign"}, ID: rpID},
		User:         protocol.UserEntity{CredentialEntity: protocol.CredentialEntity{Name: name}, DisplayName: name, ID: protocol.URLEncodedBase64(user[:])},
		Challenge:    challenge,
		Parameters: []protocol.CredentialParameter{
			{Type: protocol.PublicKeyCredentialType, Algorithm: webauthncose.AlgES256},
			{Type: protocol.PublicKeyCredentialType, Algorithm: webauthncose.AlgEdDSA},
		},
		Timeout:                passkeyTimeout,
		CredentialExcludeList:  descriptors(rpID, exclude),
		AuthenticatorSelection: protocol.AuthenticatorSelection{ResidentKey: protocol.ResidentKeyRequirementPreferred, UserVerification: protocol.VerificationRequired},
		Attestation:            protocol.PreferNoAttestation,
	})
}

// PasskeyRequest is what navigator.credentials.get() is asked with, in the form of PublicKeyCredential.parseRequestOptionsFromJSON().
// The challenge is SHA-256 of the text that is to be signed. With no passkey of the relying party in allow, the browser offers those
// that it finds itself.
func PasskeyRequest(challenge []byte, rpID string, allow []Credential) json.RawMessage {
	return options(protocol.PublicKeyCredentialRequestOptions{
		Challenge: challenge, Timeout: passkeyTimeout, RelyingPartyID: rpID,
		AllowedCredentials: descriptors(rpID, allow), UserVerification: protocol.VerificationRequired,
	})
}

func descriptors(rpID string, all []Credential) (list []protocol.CredentialDescriptor) {
	for _, c := range all {
		if id, err := decode(c.CredentialID); err == nil && c.Kind == Passkey && c.RPID == rpID {
			list = append(list, protocol.CredentialDescriptor{Type: protocol.PublicKeyCredentialType, CredentialID: id})
		}
	}
	return list
}

func options(v any) json.RawMessage {
	b, err := json.Marshal(v)
	if err != nil {
		panic("approval: options that are not JSON: " + err.Error()) // text, numbers and bytes always are
	}
	return b
}
