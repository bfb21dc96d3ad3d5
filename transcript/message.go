package transcript

import "crypto/sha256"

// messageDomain separates message-v1 from all other uses of a key.
const messageDomain = "countersign-message-v1\x00"

// MaxContext bounds the context string of message-v1, in bytes.
const MaxContext = 255

var messageType = Type{
	"message-v1",
	"any bytes, in a named context",
	[]Field{
		{"context", true, "text of 1 to 255 bytes"},
		{"message", false, "base64url; this or sha256"},
		{"sha256", false, "32 bytes, base64url: the SHA-256 of a message that need not travel"},
	},
	message,
	readMessage,
}

// message builds a message-v1: a signature over any bytes, in a named context.
//
//	canonical = "countersign-message-v1" 00 || u8 length of context || context || SHA-256(payload)
//	            || nonce (32) || timestamp (u64, big-endian) || expires_at (u64, big-endian)
//	signed    = canonical
//
// The payload of the request is {"context": "...", "message": "<base64url>"}. A large file need not
// travel: {"context": "...", "sha256": "<base64url of the 32-byte digest>"} signs the same bytes.
func message(d *Document) error {
	var p struct {
		Context string  `json:"context"`
		Message *string `json:"message"`
		SHA256  *string `json:"sha256"`
	}
	if err := d.decode(&p); err != nil {
		return err
	}
	if err := checkText("payload.context", p.Context, MaxContext); err != nil {
		return err
	}
	var digest []byte
	switch {
	case p.Message != nil && p.SHA256 != nil || p.Message == nil && p.SHA256 == nil:
		return malformed("payload", "must have one of message and sha256")
	case p.Message != nil:
		b, err := decodeBase64("payload.message", *p.Message)
		if err != nil {
			return err
		}
		sum := sha256.Sum256(b)
		digest = sum[:]
	default:
		b, err := decodeBytes("payload.sha256", *p.SHA256, sha256.Size)
		if err != nil {
			return err
		}
		digest = b
	}
	b := append([]byte(messageDomain), byte(len(p.Context)))
	b = append(b, p.Context...)
	b = append(b, digest...)
	d.Canonical = appendEnvelope(b, d.Request)
	d.Message = d.Canonical
	d.Fields = map[string]any{"message_context": p.Context}
	return nil
}
