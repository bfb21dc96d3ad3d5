package client

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Signer is a key of the appliance as a crypto.Signer, for libraries with a message format of their
// own. A Signer signs the transcript raw. Policy must permit the action sign_raw, and must name
// both this peer and this key.
type Signer struct {
	client *Client
	ctx    context.Context
	key    string
	public ed25519.PublicKey
}

// Signer makes a Signer of the key's active version. The context also bounds all later calls of
// Signer.Sign, because crypto.Signer passes no context.
func (c *Client) Signer(ctx context.Context, key string) (*Signer, error) {
	keys, err := c.Keys(ctx)
	if err != nil {
		return nil, err
	}
	for _, k := range keys {
		if k.Name == key && k.State == "active" {
			return &Signer{client: c, ctx: ctx, key: key, public: k.PublicKey[:]}, nil
		}
	}
	return nil, fmt.Errorf("client: the appliance has no active key %q", key)
}

// Public returns an ed25519.PublicKey.
func (s *Signer) Public() crypto.PublicKey { return s.public }

// Sign signs the message itself, as Ed25519 does, and needs opts.HashFunc() == 0. The random source
// is not used.
func (s *Signer) Sign(_ io.Reader, message []byte, opts crypto.SignerOpts) ([]byte, error) {
	if o, ok := opts.(*ed25519.Options); opts == nil || opts.HashFunc() != 0 || ok && o.Context != "" {
		return nil, errors.New("client: a Signer makes pure Ed25519 signatures, not of a hash and not with a context:" +
			" pass crypto.Hash(0)")
	}
	payload, err := json.Marshal(map[string]string{"message": base64.RawURLEncoding.EncodeToString(message)})
	if err != nil {
		return nil, err
	}
	signed, err := s.client.Sign(s.ctx, s.key, Document{Type: "raw", Payload: payload})
	if err != nil {
		return nil, err
	}
	if string(signed.PublicKey[:]) != string(s.public) {
		return nil, fmt.Errorf("client: key %q has been rotated: make a new Signer", s.key)
	}
	return signed.Signature, nil
}
