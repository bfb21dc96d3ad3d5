// Package webhook posts signed messages to URLs, with retries, for peers without a connection. The
// format is Standard Webhooks 1.0.0 with Ed25519 signatures (v1a). Begin reading at Sender; a
// receiver needs ParseKey and Verify.
package webhook

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"countersign/internal/eddsa"

	"github.com/go-json-experiment/json/jsontext"
)

// Tolerance is the usual limit of the difference between the clocks of sender and receiver.
const Tolerance = 5 * time.Minute

// Headers of a message.
const (
	headerID        = "Webhook-Id"
	headerTimestamp = "Webhook-Timestamp"
	headerSignature = "Webhook-Signature"
)

const (
	keyPrefix       = "whpk_"
	signaturePrefix = "v1a,"
	maxSignatures   = 8 // limit of signatures in a message, to bound a receiver's work
)

// Errors of Verify.
var (
	ErrMalformed = errors.New("the webhook's headers are not those of the Standard Webhooks specification")
	ErrTime      = errors.New("the webhook's timestamp is too far from this clock")
	ErrSignature = errors.New("the webhook has no signature of this key")
)

// Signer makes an Ed25519 signature of 64 bytes. The message has no prefix for domain separation:
// it begins with an ID, a dot and digits, for example msg_1.1700000000. followed by the body. No
// other message signed by the same key may begin in this way.
type Signer func(ctx context.Context, message []byte) ([]byte, error)

// FormatKey returns a public key in the form for receivers: whpk_ and base64.
func FormatKey(key ed25519.PublicKey) string {
	return keyPrefix + base64.StdEncoding.EncodeToString(key)
}

// ParseKey parses the result of FormatKey.
func ParseKey(s string) (ed25519.PublicKey, error) {
	text, ok := strings.CutPrefix(s, keyPrefix)
	key, err := base64.StdEncoding.Strict().DecodeString(text)
	if !ok || err != nil || len(key) != ed25519.PublicKeySize || FormatKey(key) != s {
		return nil, errors.New("a webhook's public key is whpk_ and the base64 of 32 bytes")
	}
	if err := eddsa.CheckPublicKey(key); err != nil {
		return nil, fmt.Errorf("a webhook's public key: %w", err)
	}
	return key, nil
}

// Verify checks a received message: the message must have a signature of key and a timestamp within
// tolerance of now. The body must be unchanged, byte for byte. A sender may send the same message
// several times, with the same Webhook-Id. A receiver detects replays by storing each Webhook-Id
// for twice the tolerance.
func Verify(key ed25519.PublicKey, header http.Header, body []byte, now time.Time, tolerance time.Duration) error {
	public, err := eddsa.ParsePublicKey(key)
	if err != nil {
		return fmt.Errorf("a webhook's public key: %w", err)
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
			continue // a signature of another scheme
		}
		signature, err := base64.StdEncoding.Strict().DecodeString(text)
		if err == nil && public.Verify(signed, signature) == nil {
			return nil
		}
	}
	return ErrSignature
}

// parseHeader parses the headers strictly: every ID and timestamp has one encoding, so the signed
// text is the text seen by the receiver.
func parseHeader(header http.Header) (id string, at int64, signatures []string, err error) {
	for _, name := range []string{headerID, headerTimestamp, headerSignature} {
		if len(header[name]) != 1 {
			return "", 0, nil, fmt.Errorf("%w: %s must be present once, and is %d times",
				ErrMalformed, name, len(header[name]))
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
		return "", 0, nil, fmt.Errorf("%w: %d signatures, at most %d are allowed",
			ErrMalformed, len(signatures), maxSignatures)
	}
	return id, at, signatures, nil
}

// checkID returns an error for an invalid ID. The essential rule is the one against dots: with a
// dot in the ID the signed text would have two interpretations.
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

// ParseMessage reads a signed text strictly. The body must be a JSON object, in which no name is
// there twice.
func ParseMessage(text []byte) (id string, body []byte, err error) {
	parts := bytes.SplitN(text, []byte("."), 3)
	if len(parts) != 3 {
		return "", nil, errors.New("a webhook's message is ID.TIMESTAMP.BODY")
	}
	at, err := strconv.ParseInt(string(parts[1]), 10, 64)
	if err != nil || at < 0 || strconv.FormatInt(at, 10) != string(parts[1]) {
		return "", nil, errors.New("a webhook's message has Unix seconds behind its ID")
	}
	if !bytes.HasPrefix(parts[2], []byte("{")) || !jsontext.Value(parts[2]).IsValid() {
		return "", nil, errors.New("the body of a webhook's message is a JSON object")
	}
	return string(parts[0]), parts[2], checkID(string(parts[0]))
}

// message returns the signed text: ID, timestamp in Unix seconds and body, joined by dots.
func message(id string, at int64, body []byte) []byte {
	return append(fmt.Appendf(nil, "%s.%d.", id, at), body...)
}
