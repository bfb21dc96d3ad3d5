package transcript

import (
	"encoding/binary"
	"encoding/hex"

	"countersign/internal/pubkey"
)

const paykitNoiseKeyAuthorizationDomain = "paykit.noise_key_authorization/v1\x00"

var paykitNoiseKeyAuthorizationType = Type{
	"paykit-noise-key-authorization-v1",
	"the owner of an identity authorizes a Noise key to speak for the identity",
	[]Field{
		{"owner", true, formKey + "; the signer"},
		{"noise_public_key", true, formKey},
		{"noise_static_public_key", false, formKey + "; X25519, canonical and not of low order"},
		{"key_generation", true, "an integer from 0 to 9223372036854775807; each signature needs a greater one"},
	},
	paykitNoiseKeyAuthorization,
	readPaykitNoiseKeyAuthorization,
}

// paykitNoiseKeyAuthorization builds a paykit-noise-key-authorization-v1.
//
//	canonical = "paykit.noise_key_authorization/v1" 00 || owner (32) || noise_public_key (32)
//	            || noise_static_public_key (32), or nothing || key_generation (u64, big-endian)
//	signed    = canonical
//
// An older form of upstream has no X25519 key; the two forms differ in length. The bytes are not
// bound to nonce or time. In their place the generation, which only increases, says which of two
// authorizations counts: the one with the greater generation.
func paykitNoiseKeyAuthorization(d *Document) error {
	var p authorization
	if err := d.decode(&p); err != nil {
		return err
	}
	if err := p.check(); err != nil {
		return err
	}
	b := append([]byte(paykitNoiseKeyAuthorizationDomain), p.Owner[:]...)
	b = append(b, p.NoisePublicKey[:]...)
	if p.NoiseStaticPublicKey != nil {
		b = append(b, p.NoiseStaticPublicKey[:]...)
	}
	generation := uint64(p.KeyGeneration)
	d.Canonical = binary.BigEndian.AppendUint64(b, generation)
	d.Message = d.Canonical
	d.Signers = [][]byte{p.Owner[:]}
	d.Unbound = true
	d.Generation = &generation
	d.NoiseStatic = (*[32]byte)(p.NoiseStaticPublicKey)
	d.Fields = map[string]any{
		"owner":            hex.EncodeToString(p.Owner[:]),
		"noise_public_key": hex.EncodeToString(p.NoisePublicKey[:]),
		"generation":       p.KeyGeneration,
	}
	return nil
}

// authorization is the payload.
type authorization struct {
	Owner                publicKey  `json:"owner"`
	NoisePublicKey       publicKey  `json:"noise_public_key"`
	NoiseStaticPublicKey *publicKey `json:"noise_static_public_key"`
	KeyGeneration        int64      `json:"key_generation"`
}

func (p *authorization) check() error {
	if err := p.Owner.check("payload.owner"); err != nil {
		return err
	}
	if err := p.NoisePublicKey.check("payload.noise_public_key"); err != nil {
		return err
	}
	if p.NoiseStaticPublicKey != nil {
		if err := pubkey.CheckX25519(p.NoiseStaticPublicKey[:]); err != nil {
			return malformed("payload.noise_static_public_key", "is not usable: %v", err)
		}
	}
	if p.KeyGeneration < 0 {
		return malformed("payload.key_generation", "must not be negative")
	}
	return nil
}
