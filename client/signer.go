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

	"countersign/wire"
)

// Signer is one version of a key of the appliance as a crypto.Signer, for libraries with a message
// format of their own. A Signer signs the transcript raw. Policy must permit the action sign_raw,
// and must name both this peer and this key.
type Signer struct {
	client *Client
	ctx    context.Context
	key    wire.Key
}

// Signer makes a Signer of the key's active version. The context also bounds all later calls of
// Signer.Sign, because crypto.Signer passes no context.
func (c *Client) Signer(ctx context.Context, key string) (*Signer, error) {
	k, err := c.Key(ctx, key)
	if err != nil {
		return nil, err
	}
	return &Signer{client: c, ctx: ctx, key: k}, nil
}

// Public returns an ed25519.PublicKey.
func (s *Signer) Public() crypto.PublicKey { return ed25519.PublicKey(s.key.PublicKey[:]) }

// Sign signs the message itself, as Ed25519 does, and needs opts.HashFunc() == 0. The random source
// is not used. After a rotation of the key, the error is ErrKeyRotated, and nothing is admitted.
func (s *Signer) Sign(_ io.Reader, message []byte, opts crypto.SignerOpts) ([]byte, error) {
	if o, ok := opts.(*ed25519.Options); opts == nil || opts.HashFunc() != 0 || ok && o.Context != "" {
		return nil, errors.New("client: a Signer makes pure Ed25519 signatures, not of a hash and not with a context:" +
			" pass crypto.Hash(0)")
	}
	payload, err := json.Marshal(map[string]string{"message": base64.RawURLEncoding.EncodeToString(message)})
	if err != nil {
		return nil, err
	}
	signed, err := s.client.signBy(s.ctx, s.key, Document{Type: "raw", Payload: payload})
	if errors.Is(err, ErrKeyRotated) {
		err = fmt.Errorf("client: make a new Signer of %q: %w", s.key.Name, err)
	}
	if err != nil {
		return nil, err
	}
	return signed.Signature, nil
}
