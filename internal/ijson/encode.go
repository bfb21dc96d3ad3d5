package ijson

import (
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Encode returns the JSON of a value, without spaces. Text has the form of RFC 8785: quotes,
// backslashes and control characters are escaped, and no other character is. A text of N bytes
// without control characters therefore has at most 2N + 2 bytes. Fields are in the order of the
// struct, the names of a map in the order of RFC 8785. A nil slice is null, and invalid UTF-8
// becomes U+FFFD. Encode panics for a value without a JSON form, such as a channel.
func Encode(v any) []byte {
	b, err := json.Marshal(v,
		json.Deterministic(true), json.FormatNilSliceAsNull(true), jsontext.AllowInvalidUTF8(true))
	if err != nil {
		panic("ijson: a value without a JSON form: " + err.Error())
	}
	return b
}
