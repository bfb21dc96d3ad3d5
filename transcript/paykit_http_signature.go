package transcript

import (
	"strings"

	"github.com/go-json-experiment/json/jsontext"
)

// Limits of a signed HTTP request, in bytes.
const (
	maxHTTPMethod = 16
	maxHTTPPath   = 2048
	maxHTTPBody   = 16 << 10
)

var paykitHTTPSignatureType = Type{
	"paykit-http-signature-v1",
	"an HTTP request to a Paykit server",
	[]Field{
		{"method", true, "1 to 16 of A-Z"},
		{"path", true, "/ and up to 2047 bytes of printable ASCII without space and #"},
		{"body", true, "empty, or JSON in its RFC 8785 form, in text of up to 16384 bytes"},
	},
	paykitHTTPSignature,
	readPaykitHTTPSignature,
}

// paykitHTTPSignature builds a paykit-http-signature-v1: the signature that Paykit's servers
// require of a request.
//
//	canonical = "paykit-http-signature-v1" 00 || method || 00 || path || 00 || body
//	signed    = canonical
//
// Neither method nor path can have a zero byte, so the layout is injective. The bytes are not
// bound to nonce or time: anyone with the signature can send the request again, and the server
// must expect a replay.
func paykitHTTPSignature(d *Document) error {
	var p struct {
		Method string `json:"method"`
		Path   string `json:"path"`
		Body   string `json:"body"`
	}
	if err := d.decode(&p); err != nil {
		return err
	}
	if err := checkHTTP(p.Method, p.Path, p.Body); err != nil {
		return err
	}
	d.Canonical = []byte("paykit-http-signature-v1\x00" + p.Method + "\x00" + p.Path + "\x00" + p.Body)
	d.Message = d.Canonical
	d.Unbound = true
	d.Fields = map[string]any{"http_method": p.Method, "http_path": p.Path}
	return nil
}

// checkHTTP has the rules of the fields.
func checkHTTP(method, path, body string) error {
	if method == "" || len(method) > maxHTTPMethod || strings.Trim(method, "ABCDEFGHIJKLMNOPQRSTUVWXYZ") != "" {
		return malformed("payload.method", "must have 1 to %d letters from A to Z", maxHTTPMethod)
	}
	if !strings.HasPrefix(path, "/") || len(path) > maxHTTPPath || strings.ContainsFunc(path, notInPath) {
		return malformed("payload.path",
			"must begin with / and have at most %d bytes of printable ASCII without space and #", maxHTTPPath)
	}
	if len(body) > maxHTTPBody {
		return malformed("payload.body", "must have at most %d bytes", maxHTTPBody)
	}
	// Canonicalize rounds a number to float64. A rounded number changes the text, so that such a
	// body is refused.
	form := jsontext.Value(body)
	if body != "" && (form.Canonicalize() != nil || string(form) != body) {
		return malformed("payload.body", "must be empty, or JSON in its RFC 8785 form")
	}
	return nil
}

func notInPath(r rune) bool { return r <= ' ' || r > '~' || r == '#' }
