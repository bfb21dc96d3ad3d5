package noise

import (
	"crypto"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode"

	"countersign/internal/eddsa"
	"countersign/internal/ijson"

	"github.com/go-json-experiment/json"
	"golang.org/x/crypto/blake2s"
	"lukechampine.com/blake3"
)

const (
	maxIdentity = 4096         // bytes of an identity payload
	maxHint     = 256          // bytes of a hint
	lastSecond  = 253402300799 // of the year 9999
)

// identityPayload is the payload of message 1 in PubkyV1, in both of its generations. The legacy one has NoiseKey and Epoch.
type identityPayload struct {
	PublicKey   octets  `json:"ed25519_pub"`
	NoiseKey    octets  `json:"noise_x25519_pub,omitzero"` // legacy
	Epoch       *uint32 `json:"epoch,omitzero"`            // legacy
	Role        string  `json:"role"`
	Hint        *string `json:"server_hint"`
	HintExpires *int64  `json:"hint_expires_at,omitzero"` // v25; Unix seconds
	Expires     *int64  `json:"expires_at,omitzero"`      // legacy; Unix seconds
	Signature   octets  `json:"sig"`
}

func (p *identityPayload) legacy() bool { return p.Epoch != nil }

// parseIdentity reads a payload of an initiator strictly. Whom it is of is not looked at.
func parseIdentity(b []byte) (*identityPayload, error) {
	o, err := ijson.Parse(b)
	if err != nil {
		return nil, err
	}
	required, other := []string{"ed25519_pub", "role", "sig"}, "expires_at"
	if o.Members["epoch"] != nil || o.Members["noise_x25519_pub"] != nil {
		required, other = append(required, "epoch", "noise_x25519_pub"), "hint_expires_at"
	}
	if o.Members[other] != nil {
		return nil, fmt.Errorf("%s is a field of the other generation", other)
	}
	p := new(identityPayload)
	if err := o.Into(p, required...); err != nil {
		return nil, err
	}
	switch {
	case len(p.PublicKey) != ed25519.PublicKeySize:
		return nil, errors.New("ed25519_pub: must have 32 bytes")
	case len(p.Signature) != ed25519.SignatureSize:
		return nil, errors.New("sig: must have 64 bytes")
	case p.legacy() && len(p.NoiseKey) != 32:
		return nil, errors.New("noise_x25519_pub: must have 32 bytes")
	case p.legacy() && *p.Epoch != 0:
		return nil, errors.New("epoch: must be 0") // the signature covers a 0, whatever stands here
	case p.Role != "Client":
		return nil, errors.New("role: an initiator must be a Client")
	case p.Hint != nil && (len(*p.Hint) > maxHint || strings.ContainsFunc(*p.Hint, unicode.IsControl)):
		return nil, errors.New("server_hint: must have at most 256 bytes and no control characters")
	}
	// Legacy signs hint and expiry one after the other without lengths. An expiry up to the year 9999 has zero bytes, which no
	// hint has: what was signed reads back in one way only.
	for _, t := range []*int64{p.HintExpires, p.Expires} {
		if t != nil && (*t < 0 || *t > lastSecond) {
			return nil, errors.New("the expiry must be in Unix seconds, of the year 9999 at the latest")
		}
	}
	return p, nil
}

// binding returns what the identity signs: that local, the initiator's static key, is its own towards remote.
func (p *identityPayload) binding(local, remote [32]byte) [32]byte {
	if !p.legacy() {
		b := append([]byte("pubky-noise-binding/v1"), p.PublicKey...)
		b = append(b, local[:]...)
		b = append(b, 0) // role: client
		return blake3.Sum256(append(b, remote[:]...))
	}
	b := append([]byte("pubky-noise-bind:v1"+"IK"+PubkyV1), p.PublicKey...)
	b = append(b, local[:]...)
	b = append(b, remote[:]...)
	b = binary.LittleEndian.AppendUint32(b, 0) // epoch
	b = append(b, "client"...)
	if p.Hint != nil {
		b = append(b, *p.Hint...)
	}
	if p.Expires != nil {
		b = binary.LittleEndian.AppendUint64(append(b, "expires_at:"...), uint64(*p.Expires))
	}
	return blake2s.Sum256(b)
}

// checkIdentity judges the payload of an initiator with the static key local, which the handshake has proven, at the
// responder with remote, and returns the Ed25519 key that it proves. Its only error is ErrIdentity, with a reason for the log.
func checkIdentity(payload []byte, local, remote [32]byte, now time.Time) (*[32]byte, error) {
	p, err := parseIdentity(payload)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrIdentity, err)
	}
	message := p.binding(local, remote)
	if err := eddsa.Verify(p.PublicKey, message[:], p.Signature); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrIdentity, err)
	}
	if p.legacy() && string(p.NoiseKey) != string(local[:]) {
		return nil, fmt.Errorf("%w: noise_x25519_pub is not the key of the handshake", ErrIdentity)
	}
	for _, t := range []*int64{p.HintExpires, p.Expires} {
		if t != nil && now.Unix() > *t {
			return nil, fmt.Errorf("%w: it has expired", ErrIdentity)
		}
	}
	return (*[32]byte)(p.PublicKey), nil
}

// PubkyIdentity makes the payload with which Connect proves in PubkyV1 that static belongs to an Ed25519 key. It holds for
// this static and this server, for any number of connections. hint is for the server's routing and may be empty; a zero expires
// is none.
func PubkyIdentity(signer crypto.Signer, static, server [32]byte, hint string, expires time.Time) ([]byte, error) {
	public, ok := signer.Public().(ed25519.PublicKey)
	if !ok {
		return nil, errors.New("noise: the identity must be an Ed25519 key")
	}
	p := identityPayload{PublicKey: octets(public), Role: "Client"}
	if hint != "" {
		p.Hint = &hint
	}
	if !expires.IsZero() {
		t := expires.Unix()
		p.HintExpires = &t
	}
	message := p.binding(static, server)
	var err error
	if p.Signature, err = signer.Sign(nil, message[:], crypto.Hash(0)); err != nil {
		return nil, fmt.Errorf("noise: sign the identity: %w", err)
	}
	b, err := json.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("noise: encode the identity: %w", err)
	}
	// What a server would refuse is found here, and so is a device that signs wrongly.
	if _, err := checkIdentity(b, static, server, time.Now()); err != nil {
		return nil, err
	}
	return b, nil
}

// octets are bytes as JSON shows them in an identity payload: an array of numbers from 0 to 255.
type octets []byte

func (o octets) MarshalJSON() ([]byte, error) {
	numbers := make([]uint16, len(o))
	for i, n := range o {
		numbers[i] = uint16(n)
	}
	return json.Marshal(numbers)
}

func (o *octets) UnmarshalJSON(b []byte) error {
	var numbers []*uint8 // pointers: a null would be taken for 0
	if err := json.Unmarshal(b, &numbers); err != nil {
		return errNumbers
	}
	*o = make(octets, 0, len(numbers))
	for _, n := range numbers {
		if n == nil {
			return errNumbers
		}
		*o = append(*o, *n)
	}
	return nil
}

var errNumbers = errors.New("must be an array of numbers from 0 to 255")
