package approval

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"

	"countersign/internal/eddsa"

	"golang.org/x/crypto/ssh"
)

// sshTypes are the types of SSH keys that can be a credential. RSA keys are too long for an event,
// and DSA is broken.
var sshTypes = []string{
	ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521,
	ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256,
}

// maxSSHKey is the maximum length of a public key's text, in bytes. Keys of sshTypes are shorter,
// except FIDO keys with a long application name.
const maxSSHKey = 400

// NewSSH makes a credential from an SSH public key: a line of authorized_keys, or of a file *.pub.
// The error wraps ErrInvalid.
func NewSSH(line string) (Credential, error) {
	line = strings.TrimSpace(line)
	if strings.ContainsAny(line, "\r\n") {
		return Credential{}, fmt.Errorf("SSH key: %w: give one public key, on one line", ErrInvalid)
	}
	key, _, options, _, err := ssh.ParseAuthorizedKey([]byte(line))
	if err != nil {
		return Credential{}, fmt.Errorf("SSH key: %w: this is not a public key: "+
			"give the line of a file like id_ed25519.pub", ErrInvalid)
	}
	if len(options) > 0 {
		return Credential{}, fmt.Errorf("SSH key: %w: options before a key mean nothing here: leave them out",
			ErrInvalid)
	}
	text := key.Type() + " " + base64.StdEncoding.EncodeToString(key.Marshal())
	if _, err := sshKey(text); err != nil {
		return Credential{}, fmt.Errorf("SSH key: %w: %w", ErrInvalid, err)
	}
	return Credential{ID: NewID(text), Kind: SSH, PublicKey: text}, nil
}

// sshKey parses the canonical form of a public key: type, space, base64, and no comment.
func sshKey(text string) (ssh.PublicKey, error) {
	name, encoded, _ := strings.Cut(text, " ")
	if !slices.Contains(sshTypes, name) {
		return nil, errors.New("its type can't be used: use ed25519, ecdsa, or a FIDO key " +
			"(ssh-keygen -t ed25519-sk); no RSA, no certificates")
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
	// Package ssh checks that an ECDSA key is a point on its curve, and nothing of an Ed25519 key.
	if public, ok := key.(ssh.CryptoPublicKey); ok {
		if point, ok := public.CryptoPublicKey().(ed25519.PublicKey); ok {
			if err := eddsa.CheckPublicKey(point); err != nil {
				return nil, err
			}
		}
	}
	return key, nil
}

// sshsigBlob is the content of an armored signature (OpenSSH, PROTOCOL.sshsig).
type sshsigBlob struct {
	Magic     [6]byte
	Version   uint32
	PublicKey string
	Namespace string
	Reserved  string
	Hash      string
	Signature string
}

// sshsigSigned is the message that the key signs (OpenSSH, PROTOCOL.sshsig).
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

// parseSSHSIG parses an armored signature. The caller verifies or compares every field of the
// result, so no byte of an accepted signature can change. ssh-keygen reads each accepted form: the
// text begins with the first line of the armor, lines end with a line feed only, and nothing but
// one line feed follows the last line. The length of the lines is free.
func parseSSHSIG(armored string) (blob sshsigBlob, signature ssh.Signature, err error) {
	text, begins := strings.CutPrefix(strings.TrimSuffix(armored, "\n"), sshsigBegin)
	text, ends := strings.CutSuffix(text, sshsigEnd)
	b, err := base64.StdEncoding.Strict().DecodeString(text) // skips \r and \n
	switch {
	case !begins || !ends || err != nil || strings.Contains(text, "\r"):
		return blob, signature, errors.New("this is not an armored SSH signature as ssh-keygen writes and reads it: " +
			"lines end with a line feed, and nothing is before the first or after the last")
	case ssh.Unmarshal(b, &blob) != nil || ssh.Unmarshal([]byte(blob.Signature), &signature) != nil:
		return blob, signature, errors.New("the SSH signature is cut off, or something follows it")
	case blob.Magic != sshsigMagic || blob.Version != 1 || blob.Reserved != "":
		return blob, signature, errors.New("the SSH signature is of another version than 1")
	}
	return blob, signature, nil
}

// armorSSHSIG encodes a blob in lines of 70 characters, as ssh-keygen does.
func armorSSHSIG(blob sshsigBlob) string {
	var b strings.Builder
	b.WriteString(sshsigBegin)
	encoded := base64.StdEncoding.EncodeToString(ssh.Marshal(blob))
	for line := range slices.Chunk([]byte(encoded), 70) {
		b.Write(line)
		b.WriteByte('\n')
	}
	return strings.TrimSuffix(b.String(), "\n") + sshsigEnd + "\n"
}

// verifySSH verifies an SSHSIG over a text.
func (c Credential) verifySSH(namespace, text, armored string) (v Verified, err error) {
	key, err := sshKey(c.PublicKey)
	if err != nil {
		return v, err
	}
	blob, signature, err := parseSSHSIG(armored)
	if err != nil {
		return v, err
	}
	switch {
	case blob.PublicKey != string(key.Marshal()):
		return Verified{}, errors.New("the SSH signature is of another key")
	case blob.Namespace != namespace:
		return Verified{}, fmt.Errorf("the SSH signature is for %q", blob.Namespace)
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
		return Verified{}, errors.New("the SSH signature has another hash algorithm than sha256 and sha512")
	}
	if strings.HasPrefix(key.Type(), "sk-") {
		var device struct {
			Flags byte
			Count uint32
		}
		if ssh.Unmarshal(signature.Rest, &device) != nil {
			return Verified{}, errors.New("the SSH signature is not of a FIDO key")
		}
		// key.Verify checks the user-presence flag too. The check must not depend on how the key
		// was parsed.
		if device.Flags&1 == 0 {
			return Verified{}, errors.New("nobody touched the FIDO key: make it without no-touch-required")
		}
		v.SignCount, v.Hardware = device.Count, device.Flags&flagVerified != 0
	} else if len(signature.Rest) > 0 {
		return Verified{}, errors.New("something follows the SSH signature")
	}
	// Package ssh reads the numbers of an ECDSA signature with any number of zeros in front.
	var numbers struct{ R, S *big.Int }
	if strings.Contains(key.Type(), "ecdsa") && (ssh.Unmarshal(signature.Blob, &numbers) != nil ||
		!bytes.Equal(ssh.Marshal(numbers), signature.Blob)) {
		return Verified{}, errors.New("the numbers of the SSH signature are not in their one form")
	}
	if err := key.Verify(ssh.Marshal(signed), &signature); err != nil {
		return Verified{}, errors.New("the SSH signature is not good: it is of another text, or was changed")
	}
	return v, nil
}

// NewSSHProof makes a proof of an armored signature, as ssh-keygen -Y sign writes it. The
// credential is that of the public key in the signature. The signature is not verified.
func NewSSHProof(armored string) (Proof, error) {
	blob, _, err := parseSSHSIG(armored)
	if err != nil {
		return Proof{}, err
	}
	key, err := ssh.ParsePublicKey([]byte(blob.PublicKey))
	if err != nil {
		return Proof{}, errors.New("the SSH signature has no public key of a known type")
	}
	c, err := NewSSH(string(ssh.MarshalAuthorizedKey(key)))
	return Proof{Credential: c.ID, SSHSIG: armored}, err
}

// SignSSH makes the SSHSIG of a text, whose first line is the namespace, with the SSH key of a
// credential. The function sign makes the signature proper: it gets a message of about 100 bytes,
// and returns the signature in SSH wire format (RFC 4253 section 6.6), as an SSH agent does. sign
// may wait for a touch. SignSSH verifies the proof before it returns; then the error wraps
// ErrNotProven.
func SignSSH(
	c Credential, namespace, text string, sign func(message []byte) (signature []byte, err error),
) (Proof, error) {
	if c.Kind != SSH {
		return Proof{}, errors.New("an SSH key is needed: a passkey makes no SSH signature")
	}
	key, err := sshKey(c.PublicKey)
	if err != nil {
		return Proof{}, err
	}
	sum := sha256.Sum256([]byte(text))
	signature, err := sign(ssh.Marshal(sshsigSigned{sshsigMagic, namespace, "", "sha256", sum[:]}))
	if err != nil {
		return Proof{}, err
	}
	blob := sshsigBlob{sshsigMagic, 1, string(key.Marshal()), namespace, "", "sha256", string(signature)}
	p := Proof{Credential: c.ID, SSHSIG: armorSSHSIG(blob)}
	if _, err := c.Verify(namespace, text, p); err != nil {
		return Proof{}, fmt.Errorf("the new SSH signature is wrong: %w", err)
	}
	return p, nil
}
