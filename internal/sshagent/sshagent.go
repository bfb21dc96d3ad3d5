// Package sshagent finds the credentials of operators in an SSH agent, and signs with them. The
// package is apart from package approval, so that the API of approval names no type of
// golang.org/x/crypto.
package sshagent

import (
	"errors"
	"fmt"
	"slices"

	"countersign/approval"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

// Sign has an agent sign a text with the key of a credential. The first line of the text is the
// namespace. The agent may wait for a touch meanwhile. The proof is verified: see approval.SignSSH.
func Sign(a agent.Agent, c approval.Credential, namespace, text string) (approval.Proof, error) {
	return approval.SignSSH(c, namespace, text, func(message []byte) ([]byte, error) {
		key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(c.PublicKey))
		if err != nil {
			return nil, err
		}
		signature, err := a.Sign(key, message)
		if err != nil {
			return nil, fmt.Errorf("the SSH agent does not sign with this key: %w", err)
		}
		return ssh.Marshal(signature), nil
	})
}

// SignWithAny has an agent sign a text with the first of some credentials whose key the agent lets
// sign. An agent refuses a key, for example, whose FIDO token is not plugged in, or that a person
// has to confirm. The error has all refusals.
func SignWithAny(a agent.Agent, some []approval.Credential, namespace, text string) (approval.Proof, error) {
	var refused []error
	for _, c := range some {
		p, err := Sign(a, c, namespace, text)
		if err == nil {
			return p, nil
		}
		refused = append(refused, fmt.Errorf("key %s: %w", c.ID, err))
	}
	if len(refused) == 0 {
		return approval.Proof{}, errors.New("no key was given")
	}
	return approval.Proof{}, errors.Join(refused...)
}

// Credentials returns the keys of an agent that can be credentials, in the agent's order: those
// whose ids are among the known credentials, or all if known is nil. The ids alone count, because
// the appliance names the known credentials: a key of the agent under another key's id must not
// sign.
func Credentials(a agent.Agent, known []approval.Credential) ([]approval.Credential, error) {
	keys, err := a.List()
	if err != nil {
		return nil, fmt.Errorf("the SSH agent does not say which keys it has: %w", err)
	}
	var found []approval.Credential
	for _, k := range keys {
		key, err := ssh.ParsePublicKey(k.Blob)
		if err != nil {
			continue // an unknown type
		}
		c, err := approval.NewSSH(string(ssh.MarshalAuthorizedKey(key)))
		if err != nil {
			continue // for example RSA
		}
		same := func(other approval.Credential) bool { return other.ID == c.ID }
		if known == nil || slices.ContainsFunc(known, same) {
			found = append(found, c)
		}
	}
	return found, nil
}
