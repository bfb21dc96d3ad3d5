package noise

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"errors"

	"countersign/internal/secret"
)

// Identity is a static key pair in memory, for a peer. An Identity prints no private key. The
// appliance's static key is on a device.
type Identity struct {
	private secret.Bytes
	public  [32]byte
}

// NewIdentity makes a new random key pair.
func NewIdentity() (*Identity, error) {
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	return identityOf(key), nil
}

// IdentityFrom returns the key pair of an X25519 private key of 32 bytes. A key of zeros is
// refused: it is an empty field or file, and everybody has it.
func IdentityFrom(private []byte) (*Identity, error) {
	if len(private) == 32 && [32]byte(private) == [32]byte{} {
		return nil, errors.New("noise: the private key is all zero: make one with NewIdentity")
	}
	key, err := ecdh.X25519().NewPrivateKey(private)
	if err != nil {
		return nil, err
	}
	return identityOf(key), nil
}

func identityOf(key *ecdh.PrivateKey) *Identity {
	return &Identity{secret.New(key.Bytes()), [32]byte(key.PublicKey().Bytes())}
}

// Private returns a copy of the private key of 32 bytes, for an identity file. These bytes print as
// any others do.
func (i *Identity) Private() []byte { return bytes.Clone(i.private.Expose()) }

// Public returns the public key, which the operator enrols at the appliance.
func (i *Identity) Public() [32]byte { return i.public }

// Exchange implements Static.
func (i *Identity) Exchange(_ context.Context, peer [32]byte) (shared [32]byte, err error) {
	own, err := ecdh.X25519().NewPrivateKey(i.private.Expose())
	if err != nil {
		return shared, err
	}
	p, err := ecdh.X25519().NewPublicKey(peer[:])
	if err != nil {
		return shared, err
	}
	s, err := own.ECDH(p) // refuses an all-zero result, RFC 7748 section 6.1
	copy(shared[:], s)
	return shared, err
}
