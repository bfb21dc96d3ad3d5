package backup

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

// Recipient is a public key that a backup is encrypted to, Identity the private key.
type (
	Recipient = age.Recipient
	Identity  = age.Identity
)

// ParseRecipient reads a recipient: age1..., or an SSH public key (ssh-ed25519 or ssh-rsa) on one
// line as in authorized_keys.
func ParseRecipient(text string) (Recipient, error) {
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

// ParseRecipients reads all recipients. At least one is required.
func ParseRecipients(texts []string) (all []Recipient, err error) {
	for _, text := range texts {
		r, err := ParseRecipient(text)
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
// damaged backup.
type usable struct{ Identity }

func (u usable) Unwrap(stanzas []*age.Stanza) ([]byte, error) {
	key, err := u.Identity.Unwrap(stanzas)
	if err != nil && !errors.Is(err, age.ErrIncorrectIdentity) {
		err = fmt.Errorf("%w: %w", ErrIdentity, err)
	}
	return key, err
}
