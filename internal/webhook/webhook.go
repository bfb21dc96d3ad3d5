// Package webhook tells those who are not connected what has happened: a signed message is posted to a URL, and again until it
// has been taken. The format is Standard Webhooks 1.0.0 with Ed25519 signatures (v1a). Begin with Sender; a receiver needs
// ParseKey and Verify.
package webhook

import (
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Tolerance is how far apart the clocks of a sender and a receiver may be.
const Tolerance = 5 * time.Minute

// The headers of a message.
const (
	headerID        = "Webhook-Id"
	headerTimestamp = "Webhook-Timestamp"
	headerSignature = "Webhook-Signature"
)

const (
	keyPrefix       = "whpk_"
	signaturePrefix = "v1a,"
	maxSignatures   = 8 // of a message: a receiver's work is bounded
)

// What is wrong with a message that somebody received.
var (
	ErrMalformed = errors.New("the webhook's headers are not those of the Standard Webhooks specification")
	ErrTime      = errors.New("the webhook's timestamp is too far from this clock")
	ErrSignature = errors.New("the webhook has no signature of this key")
)

// Signer makes an Ed25519 signature of 64 bytes. The message has no domain of its own: it begins with an id, a dot and digits, and whatever else
// the key signs must not.
type Signer func(ctx context.Context, message []byte) ([]byte, error)

// FormatKey gives a public key as receivers are told it: whpk_ and base64.
func FormatKey(key ed25519.PublicKey) string {
	return keyPrefix + base64.StdEncoding.EncodeToString(key)
}

// ParseKey reads what FormatKey wrote.
func ParseKey(s string) (ed25519.PublicKey, error) {
	text, ok := strings.CutPrefix(s, keyPrefix)
	key, err := base64.StdEncoding.Strict().DecodeString(text)
	if !ok || err != nil || len(key) != ed25519.PublicKeySize || FormatKey(key) != s {
		return nil, errors.New("a webhook's public key is whpk_ and the base64 of 32 bytes")
	}
	return key, nil
}

// Verify judges a message that was received: it has a signature of key, and was sent within tolerance of now. The body is as
// received, byte for byte. The same message may come again; its Webhook-Id stays the same, and to remember that for twice
// the tolerance keeps replays out.
func Verify(key ed25519.PublicKey, header http.Header, body []byte, now time.Time, tolerance time.Duration) error {
	if len(key) != ed25519.PublicKeySize {
		return errors.New("a webhook's public key has 32 bytes")
	}
	id, at, signatures, err := parseHeader(header)
	if err != nil {
		return err
	}
	if apart := now.Sub(time.Unix(at, 0)); apart > tolerance || apart < -tolerance {
		return ErrTime
	}
	signed := message(id, at, body)
	for _, s := range signatures {
		text, ok := strings.CutPrefix(s, signaturePrefix)
		if !ok {
			continue // of another scheme
		}
		if signature, err := base64.StdEncoding.Strict().DecodeString(text); err == nil && ed25519.Verify(key, signed, signature) {
			return nil
		}
	}
	return ErrSignature
}

// parseHeader takes what can be read in one way only, so that what is signed is what the receiver sees.
func parseHeader(header http.Header) (id string, at int64, signatures []string, err error) {
	for _, name := range []string{headerID, headerTimestamp, headerSignature} {
		if len(header[name]) != 1 {
			return "", 0, nil, fmt.Errorf("%w: %s must be there once", ErrMalformed, name)
		}
	}
	id = header.Get(headerID)
	if err := checkID(id); err != nil {
		return "", 0, nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	text := header.Get(headerTimestamp)
	if at, err = strconv.ParseInt(text, 10, 64); err != nil || strconv.FormatInt(at, 10) != text {
		return "", 0, nil, fmt.Errorf("%w: %s must be Unix seconds", ErrMalformed, headerTimestamp)
	}
	if signatures = strings.Split(header.Get(headerSignature), " "); len(signatures) > maxSignatures {
		return "", 0, nil, fmt.Errorf("%w: more than %d signatures", ErrMalformed, maxSignatures)
	}
	return id, at, signatures, nil
}

// checkID refuses a dot above all: it would move the border between ID and timestamp in what is signed.
func checkID(id string) error {
	ok := id != "" && len(id) <= 128
	for i := range len(id) {
		c := id[i]
		ok = ok && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_')
	}
	if !ok {
		return errors.New("a webhook's ID has 1 to 128 letters, digits, hyphens and underscores")
	}
	return nil
}

// message is what gets signed.
func message(id string, at int64, body []byte) []byte {
	return append(fmt.Appendf(nil, "%s.%d.", id, at), body...)
}
