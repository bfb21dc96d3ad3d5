package noise

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
)

// Identity is a static key pair in memory: a peer's, not the appliance's.
type Identity struct{ key *ecdh.PrivateKey }

// NewIdentity makes a fresh key pair.
func NewIdentity() (*Identity, error) {
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	return &Identity{key}, nil
}

// IdentityFrom takes a 32-byte X25519 private key.
func IdentityFrom(private []byte) (*Identity, error) {
	key, err := ecdh.X25519().NewPrivateKey(private)
	if err != nil {
		return nil, err
	}
	return &Identity{key}, nil
}

// Private returns the private key, to be written to an identity file.
func (i *Identity) Private() []byte { return i.key.Bytes() }

// Public returns the public key that the identity is enrolled by.
func (i *Identity) Public() [32]byte { return [32]byte(i.key.PublicKey().Bytes()) }

// Exchange implements Static.
func (i *Identity) Exchange(_ context.Context, peer [32]byte) (shared [32]byte, err error) {
	p, err := ecdh.X25519().NewPublicKey(peer[:])
	if err != nil {
		return shared, err
	}
	s, err := i.key.ECDH(p) // refuses an all-zero result, RFC 7748 section 6.1
	copy(shared[:], s)
	return shared, err
}
