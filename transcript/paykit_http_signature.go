package transcript

import (
	"strings"

	"github.com/go-json-experiment/json/jsontext"
)

// Limits of a signed HTTP request.
const (
	maxHTTPMethod = 16
	maxHTTPPath   = 2048
	maxHTTPBody   = 16 << 10
)

var paykitHTTPSignatureType = Type{"paykit-http-signature-v1", "an HTTP request to a Paykit server", []Field{
	{"method", true, "1 to 16 of A-Z"},
	{"path", true, "/ and up to 2047 bytes of printable ASCII without space and #"},
	{"body", true, "empty, or JSON in its RFC 8785 form, in text of up to 16384 bytes"},
}, paykitHTTPSignature}

// paykitHTTPSignature is the transcript paykit-http-signature-v1: what Paykit's servers ask of a request.
//
//	canonical = "paykit-http-signature-v1" 00 || method || 00 || path || 00 || body
//	signed    = canonical
//
// Neither method nor path can hold a zero byte, so the bytes read back in one way. Nothing in them is bound to nonce or
// time: whoever sees the signature can send the request again, and what that does is the server's business.
func paykitHTTPSignature(d *Document) error {
	var p struct {
		Method string `json:"method"`
		Path   string `json:"path"`
		Body   string `json:"body"`
	}
	if err := d.decode(&p); err != nil {
		return err
	}
	if p.Method == "" || len(p.Method) > maxHTTPMethod || strings.Trim(p.Method, "ABCDEFGHIJKLMNOPQRSTUVWXYZ") != "" {
		return malformed("payload.method", "must have 1 to %d letters from A to Z", maxHTTPMethod)
	}
	if !strings.HasPrefix(p.Path, "/") || len(p.Path) > maxHTTPPath || strings.ContainsFunc(p.Path, notInPath) {
		return malformed("payload.path", "must begin with / and have at most %d bytes of printable ASCII without space and #", maxHTTPPath)
	}
	if len(p.Body) > maxHTTPBody {
		return malformed("payload.body", "must have at most %d bytes", maxHTTPBody)
	}
	// Canonicalize writes a number that no float64 holds as the nearest one: that is another text, and refused as such.
	form := jsontext.Value(p.Body)
	if p.Body != "" && (form.Canonicalize() != nil || string(form) != p.Body) {
		return malformed("payload.body", "must be empty, or JSON in its RFC 8785 form")
	}
	d.Canonical = []byte("paykit-http-signature-v1\x00" + p.Method + "\x00" + p.Path + "\x00" + p.Body)
	d.Message = d.Canonical
	d.Unbound = true
	d.Fields = map[string]any{"http_method": p.Method, "http_path": p.Path}
	return nil
}

func notInPath(r rune) bool { return r <= ' ' || r > '~' || r == '#' }
