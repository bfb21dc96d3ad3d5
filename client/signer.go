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

// Signer is a key of the appliance as a crypto.Signer, for libraries that bring their own message format. It uses the
// transcript raw, which policy must allow for this peer and this key by name (action sign_raw).
type Signer struct {
	client *Client
	ctx    context.Context
	key    string
	public ed25519.PublicKey
}

// Signer looks the key's active version up. ctx bounds the signatures to come too: crypto.Signer has no place for one.
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

// Sign signs message itself, as Ed25519 wants it: opts.HashFunc() must be 0. The random source is not used.
func (s *Signer) Sign(_ io.Reader, message []byte, opts crypto.SignerOpts) ([]byte, error) {
	if o, ok := opts.(*ed25519.Options); opts == nil || opts.HashFunc() != 0 || ok && o.Context != "" {
		return nil, errors.New("client: pure Ed25519 signs the message, not a hash of it and without a context: use crypto.Hash(0)")
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
		return nil, errors.New("client: the key has been rotated: make a new Signer")
	}
	return signed.Signature, nil
}
