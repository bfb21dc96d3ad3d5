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

// ErrKeyRotated: the version of a Signer does not sign any more. The appliance has signed nothing:
// make a new Signer.
var ErrKeyRotated = errors.New("the key has been rotated")

// Signer is one version of a key of the appliance as a crypto.Signer, for libraries with a message
// format of their own. A Signer signs the transcript raw. Policy must permit the action sign_raw,
// and must name both this peer and this key.
type Signer struct {
	client  *Client
	ctx     context.Context
	key     string
	version uint32
	public  ed25519.PublicKey
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
			return &Signer{client: c, ctx: ctx, key: key, version: k.Version, public: k.PublicKey[:]}, nil
		}
	}
	return nil, fmt.Errorf("client: the appliance has no active key %q", key)
}

// Public returns an ed25519.PublicKey.
func (s *Signer) Public() crypto.PublicKey { return s.public }

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
	signed, err := s.client.sign(s.ctx, s.key, s.version, Document{Type: "raw", Payload: payload})
	if refusal, is := errors.AsType[*Error](err); is && refusal.Code == wire.CodeKeyRotated {
		err = fmt.Errorf("client: %w: make a new Signer of %q: %w", ErrKeyRotated, s.key, err)
	}
	if err != nil {
		return nil, err
	}
	if string(signed.PublicKey[:]) != string(s.public) {
		return nil, fmt.Errorf("client: %w: version %d of %q has another public key", ErrWrongAnswer, s.version, s.key)
	}
	return signed.Signature, nil
}
