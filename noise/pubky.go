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
	maxIdentity = 4096         // limit of an identity payload in bytes
	maxHint     = 256          // limit of a hint in bytes
	lastSecond  = 253402300799 // the last second of the year 9999, Unix time
)

// identityPayload is the payload of message 1 in PubkyV1, of both generations: v25 and legacy. Only
// the legacy generation has NoiseKey and Epoch.
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

// parseIdentity parses an initiator's payload strictly, without checking the signature.
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
		return nil, errors.New("epoch: must be 0") // the signature always covers a 0
	case p.Role != "Client":
		return nil, errors.New("role: an initiator must be a Client")
	case p.Hint != nil && (len(*p.Hint) > maxHint || strings.ContainsFunc(*p.Hint, unicode.IsControl)):
		return nil, errors.New("server_hint: must have at most 256 bytes and no control characters")
	}
	// A legacy signature covers hint and expiry one after the other, without lengths. The encoding
	// is unambiguous nevertheless: an expiry up to the year 9999 has zero bytes, and a hint never
	// has any.
	for _, t := range []*int64{p.HintExpires, p.Expires} {
		if t != nil && (*t < 0 || *t > lastSecond) {
			return nil, fmt.Errorf("the expiry %d must be in Unix seconds, of the year 9999 at the latest", *t)
		}
	}
	return p, nil
}

// binding returns the message for the identity's signature. The signature proves that the
// initiator's static key local belongs to the identity, towards the responder's static key remote.
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

// checkIdentity checks an initiator's payload and returns the proven Ed25519 key. local is the
// initiator's static key from the handshake, remote the responder's. Every error wraps ErrIdentity
// and has a reason for the log.
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
			return nil, fmt.Errorf("%w: the payload has expired: its last second was %d, now is %d",
				ErrIdentity, *t, now.Unix())
		}
	}
	return (*[32]byte)(p.PublicKey), nil
}

// PubkyIdentity makes the payload of Connect in PubkyV1, which proves that static belongs to the
// signer's Ed25519 key. The payload is valid for one static key and one server, and for any number
// of connections. hint is for the server's routing and may be empty. A zero expires stands for no
// expiry.
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
	// Check the payload as a server would: a fault of the arguments or of the signer's device is
	// reported here.
	if _, err := checkIdentity(b, static, server, time.Now()); err != nil {
		return nil, err
	}
	return b, nil
}

// octets are bytes encoded in JSON as an array of numbers from 0 to 255.
type octets []byte

func (o octets) MarshalJSON() ([]byte, error) {
	numbers := make([]uint16, len(o))
	for i, n := range o {
		numbers[i] = uint16(n)
	}
	return json.Marshal(numbers)
}

func (o *octets) UnmarshalJSON(b []byte) error {
	var numbers []*uint8 // pointers tell null from 0
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
