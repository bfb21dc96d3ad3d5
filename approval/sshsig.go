package approval

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

// sshTypes are the types of SSH keys that can be a credential. RSA's are too long for an event, and DSA is broken.
var sshTypes = []string{ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521, ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256}

// maxSSHKey is more than a key of these types has, but for a FIDO key with a long application.
const maxSSHKey = 400

// NewSSH makes the credential of an SSH public key: a line of authorized_keys, or of a file that ends in .pub. The error wraps
// ErrInvalid.
func NewSSH(line string) (Credential, error) {
	line = strings.TrimSpace(line)
	if strings.ContainsAny(line, "\r\n") {
		return Credential{}, fmt.Errorf("SSH key: %w: give one public key, on one line", ErrInvalid)
	}
	key, _, options, _, err := ssh.ParseAuthorizedKey([]byte(line))
	if err != nil {
		return Credential{}, fmt.Errorf("SSH key: %w: this is not a public key: give the line of a file like id_ed25519.pub", ErrInvalid)
	}
	if len(options) > 0 {
		return Credential{}, fmt.Errorf("SSH key: %w: options before a key mean nothing here: leave them out", ErrInvalid)
	}
	c, err := ofSSH(key)
	if err != nil {
		return Credential{}, fmt.Errorf("SSH key: %w: %w", ErrInvalid, err)
	}
	return c, nil
}

func ofSSH(key ssh.PublicKey) (Credential, error) {
	text := key.Type() + " " + base64.StdEncoding.EncodeToString(key.Marshal())
	if _, err := sshKey(text); err != nil {
		return Credential{}, err
	}
	return Credential{ID: NewID(text), Kind: SSH, PublicKey: text}, nil
}

// sshKey reads the one form of a public key.
func sshKey(text string) (ssh.PublicKey, error) {
	name, encoded, _ := strings.Cut(text, " ")
	if !slices.Contains(sshTypes, name) {
		return nil, errors.New("its type can't be used: use ed25519, ecdsa, or a FIDO key (ssh-keygen -t ed25519-sk); no RSA, no certificates")
	}
	if len(text) > maxSSHKey {
		return nil, fmt.Errorf("it has more than %d bytes", maxSSHKey)
	}
	b, err := base64.StdEncoding.Strict().DecodeString(encoded)
	if err != nil {
		return nil, errors.New("it is not base64")
	}
	key, err := ssh.ParsePublicKey(b)
	if err != nil || key.Type() != name || name+" "+base64.StdEncoding.EncodeToString(key.Marshal()) != text {
		return nil, errors.New("it is not a public key of the type that it names")
	}
	return key, nil
}

// sshsigBlob is what is in an armored signature (OpenSSH, PROTOCOL.sshsig), and sshsigSigned what the signature is over.
type sshsigBlob struct {
	Magic     [6]byte
	Version   uint32
	PublicKey string
	Namespace string
	Reserved  string
	Hash      string
	Signature string
}

type sshsigSigned struct {
	Magic     [6]byte
	Namespace string
	Reserved  string
	Hash      string
	Digest    []byte
}

var sshsigMagic = [6]byte{'S', 'S', 'H', 'S', 'I', 'G'}

const (
	sshsigBegin = "-----BEGIN SSH SIGNATURE-----\n"
	sshsigEnd   = "\n-----END SSH SIGNATURE-----"
)

// parseSSHSIG takes an armored signature apart. What it accepts is all used: nothing can be changed in it that is not looked at.
func parseSSHSIG(armored string) (blob sshsigBlob, signature ssh.Signature, err error) {
	text := strings.TrimSpace(strings.ReplaceAll(armored, "\r\n", "\n"))
	text, begins := strings.CutPrefix(text, sshsigBegin)
	text, ends := strings.CutSuffix(text, sshsigEnd)
	b, err := base64.StdEncoding.Strict().DecodeString(text)
	switch {
	case !begins || !ends || err != nil:
		return blob, signature, errors.New("this is not an armored SSH signature")
	case ssh.Unmarshal(b, &blob) != nil || ssh.Unmarshal([]byte(blob.Signature), &signature) != nil:
		return blob, signature, errors.New("the SSH signature is cut off, or something follows it")
	case blob.Magic != sshsigMagic || blob.Version != 1 || blob.Reserved != "":
		return blob, signature, errors.New("the SSH signature is of another version than 1")
	}
	return blob, signature, nil
}

// verifySSH checks an SSHSIG over a text.
func (c Credential) verifySSH(namespace, text, armored string) (signCount uint32, err error) {
	key, err := sshKey(c.PublicKey)
	if err != nil {
		return 0, err
	}
	blob, signature, err := parseSSHSIG(armored)
	if err != nil {
		return 0, err
	}
	switch {
	case blob.PublicKey != string(key.Marshal()):
		return 0, errors.New("the SSH signature is of another key")
	case blob.Namespace != namespace:
		return 0, fmt.Errorf("the SSH signature is for %q", blob.Namespace)
	}
	signed := sshsigSigned{sshsigMagic, namespace, "", blob.Hash, nil}
	switch blob.Hash {
	case "sha256":
		sum := sha256.Sum256([]byte(text))
		signed.Digest = sum[:]
	case "sha512":
		sum := sha512.Sum512([]byte(text))
		signed.Digest = sum[:]
	default:
		return 0, errors.New("the SSH signature has another hash algorithm than sha256 and sha512")
	}
	if strings.HasPrefix(key.Type(), "sk-") {
		var device struct {
			Flags byte
			Count uint32
		}
		if ssh.Unmarshal(signature.Rest, &device) != nil {
			return 0, errors.New("the SSH signature is not of a FIDO key")
		}
		if device.Flags&1 == 0 { // ssh.PublicKey looks too; it must not depend on how the key was read
			return 0, errors.New("nobody touched the FIDO key: make it without no-touch-required")
		}
		signCount = device.Count
	} else if len(signature.Rest) > 0 {
		return 0, errors.New("something follows the SSH signature")
	}
	if err := key.Verify(ssh.Marshal(signed), &signature); err != nil {
		return 0, errors.New("the SSH signature is not good: it is of another text, or was changed")
	}
	return signCount, nil
}

// SignSSH has an agent sign a text, whose first line is the namespace, and checks what it has made. The agent may be waiting
// for a touch meanwhile.
func SignSSH(a agent.Agent, c Credential, namespace, text string) (Proof, error) {
	if c.Kind != SSH {
		return Proof{}, errors.New("an agent can't sign with a passkey")
	}
	key, err := sshKey(c.PublicKey)
	if err != nil {
		return Proof{}, err
	}
	sum := sha256.Sum256([]byte(text))
	signature, err := a.Sign(key, ssh.Marshal(sshsigSigned{sshsigMagic, namespace, "", "sha256", sum[:]}))
	if err != nil {
		return Proof{}, fmt.Errorf("the SSH agent does not sign with this key: %w", err)
	}
	blob := ssh.Marshal(sshsigBlob{sshsigMagic, 1, string(key.Marshal()), namespace, "", "sha256", string(ssh.Marshal(signature))})
	var lines strings.Builder
	lines.WriteString(sshsigBegin)
	for chunk := range slices.Chunk([]byte(base64.StdEncoding.EncodeToString(blob)), 70) { // as ssh-keygen breaks them
		lines.Write(chunk)
		lines.WriteByte('\n')
	}
	p := Proof{Credential: c.ID, SSHSIG: strings.TrimSuffix(lines.String(), "\n") + sshsigEnd + "\n"}
	if _, err := c.Verify(namespace, text, p); err != nil {
		return Proof{}, fmt.Errorf("what the SSH agent has made: %w", err)
	}
	return p, nil
}

// InAgent returns those of the credentials of which an agent has the key, in the agent's order. Where known is nil it returns all
// keys of the agent that can be credentials.
func InAgent(a agent.Agent, known []Credential) ([]Credential, error) {
	keys, err := a.List()
	if err != nil {
		return nil, fmt.Errorf("the SSH agent does not say which keys it has: %w", err)
	}
	var found []Credential
	for _, k := range keys {
		key, err := ssh.ParsePublicKey(k.Blob)
		if err != nil {
			continue // of a type that is unknown here
		}
		c, err := ofSSH(key)
		if err != nil {
			continue
		}
		i := slices.IndexFunc(known, func(other Credential) bool { return other.ID == c.ID && other.Kind == SSH })
		if i >= 0 {
			c = known[i]
		}
		if i >= 0 || known == nil {
			found = append(found, c)
		}
	}
	return found, nil
}
