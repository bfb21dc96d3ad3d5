// Package recipient reads the public keys that a file is encrypted to with age
// (https://age-encryption.org/v1), and the private keys that open the file: those of age-keygen,
// and SSH keys. Begin reading at Parse.
package recipient

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"

	"filippo.io/age"
	"filippo.io/age/agessh"
	"golang.org/x/crypto/ssh"
)

// Recipient is a public key that a file is encrypted to, Identity the private key.
type (
	Recipient = age.Recipient
	Identity  = age.Identity
)

// ErrIdentity: an identity can't be used: a wrong passphrase, for instance.
var ErrIdentity = errors.New("the identity can't be used")

// Parse reads a recipient: age1..., or an SSH public key (ssh-ed25519 or ssh-rsa) on one
// line as in authorized_keys.
func Parse(text string) (Recipient, error) {
	text = strings.TrimSpace(text)
	if strings.HasPrefix(text, "ssh-") {
		r, err := agessh.ParseRecipient(text)
		if err != nil {
			return nil, fmt.Errorf("recipient %.40q: %w", text, err)
		}
		return r, nil
	}
	r, err := age.ParseX25519Recipient(text)
	if err != nil {
		if strings.HasPrefix(strings.ToUpper(text), "AGE-SECRET-KEY-") { // the text must not be shown
			return nil, errors.New("this is a private key: a recipient begins with age1")
		}
		return nil, fmt.Errorf("recipient %.40q: write age1..., or an SSH public key (ssh-ed25519, ssh-rsa)", text)
	}
	return r, nil
}

// ParseAll reads all recipients. At least one is required.
func ParseAll(texts []string) (all []Recipient, err error) {
	for _, text := range texts {
		r, err := Parse(text)
		if err != nil {
			return nil, err
		}
		all = append(all, r)
	}
	if len(all) == 0 {
		return nil, errors.New("there is no recipient")
	}
	return all, nil
}

// ReadIdentities reads the private keys of a file: lines of age-keygen, or one SSH private key.
// passphrase is asked for an encrypted SSH key.
func ReadIdentities(path string, passphrase func() ([]byte, error)) ([]Identity, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	if !bytes.Contains(b, []byte("-----BEGIN ")) {
		all, err := age.ParseIdentities(bufio.NewReader(bytes.NewReader(b)))
		if err != nil { // age's text may have a line of the file
			return nil, fmt.Errorf("%s is no file of age-keygen, and no SSH private key", path)
		}
		return all, nil
	}
	id, err := agessh.ParseIdentity(b)
	if missing := new(ssh.PassphraseMissingError); errors.As(err, &missing) {
		public := missing.PublicKey
		if public == nil {
			return nil, fmt.Errorf("%s is encrypted and does not name its public key: "+
				"write it anew with ssh-keygen -p, in OpenSSH's form", path)
		}
		id, err = agessh.NewEncryptedSSHIdentity(public, b, passphrase)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return []Identity{usable{id}}, nil
}

// usable keeps an identity that can't be used, for instance because of its passphrase, apart from a
// damaged file.
type usable struct{ Identity }

func (u usable) Unwrap(stanzas []*age.Stanza) ([]byte, error) {
	key, err := u.Identity.Unwrap(stanzas)
	if err != nil && !errors.Is(err, age.ErrIncorrectIdentity) {
		err = fmt.Errorf("%w: %w", ErrIdentity, err)
	}
	return key, err
}
