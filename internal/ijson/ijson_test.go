package ijson

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// tokens is Parse without the scan: the decoder of package jsontext refuses duplicate names, and
// each token is looked at.
func tokens(b []byte) (members map[string]jsontext.Value, err error) {
	d := jsontext.NewDecoder(bytes.NewReader(b))
	if d.PeekKind() != '{' {
		return nil, errors.New("no object")
	}
	for first := true; first || d.StackDepth() > 0; first = false {
		token, err := d.ReadToken()
		if err != nil {
			return nil, err
		}
		if kind, n := d.StackIndex(d.StackDepth()); kind == '{' && n > 2*MaxFields {
			return nil, errors.New("too many fields")
		}
		if d.StackDepth() > MaxDepth {
			return nil, errors.New("too deep")
		}
		if token.Kind() == '"' && strings.ContainsFunc(token.String(), noncharacter) {
			return nil, errors.New("noncharacter")
		}
	}
	if _, err := d.ReadToken(); err != io.EOF {
		return nil, errors.New("more data")
	}
	if err := json.Unmarshal(b, &members); err != nil {
		return nil, err
	}
	return members, nil
}

// names returns the text of n fields.
func names(n int) string {
	var all []string
	for i := range n {
		all = append(all, fmt.Sprintf(`"%x":%d`, i, i))
	}
	return strings.Join(all, ",")
}

// documents are accepted, or refused with a text that begins as the value.
var documents = map[string]string{
	`{}`:                                 "",
	" {\"a\" :\t[ 1 , {\"a\":2} ]\r\n} ": "",
	`{"a":"}","b":"\"","c":"\\"}`:        "",
	`{"a":{"b":1},"b":{"b":1},"c":[{"b":1},{"b":1}]}`:                   "",
	`{"a":1,"A":2,"":3}`:                                                "",
	`{"a":"\ud83d\ude00","b":"\ufffd","c":"😀\uFFFD"}`:                   "",
	`{"a":[` + strings.Repeat("[", 14) + strings.Repeat("]", 14) + `]}`: "",
	`{"a":[` + strings.Repeat("[", 15) + strings.Repeat("]", 15) + `]}`: "arrays and objects nest deeper than 16",
	`{` + names(MaxFields) + `}`:                                        "",
	`{` + names(MaxFields+1) + `}`:                                      "an object has more than 64 fields",
	`{"a":[{` + names(MaxFields) + `},{` + names(MaxFields) + `}]}`:     "",
	`{"a":{` + names(MaxFields+1) + `}}`:                                "an object has more than 64 fields",
	`{"a":{` + names(40) + `,"7":0}}`:                                   `duplicate field "a.7"`,
	`{"a":1,"a":2}`:                                                     `duplicate field "a"`,
	`{"a":1,"\u0061":2}`:                                                `duplicate field "a"`,
	`{"a":[0,{"b":{"c":1, "d":2,"c" :3}}]}`:                             `duplicate field "a.1.b.c"`,
	`{"a":{"\ud83d\ude00":1,"😀":1}}`:                                    `duplicate field "a.😀"`,
	"{\"a\":\"\ufdd0\"}":                                                "text contains a Unicode noncharacter",
	"{\"a\uffff\":1}":                                                   "text contains a Unicode noncharacter",
	"{\"a\":\"\U0003fffe\"}":                                            "text contains a Unicode noncharacter",
	`{"a":["\uFDEF"]}`:                                                  "text contains a Unicode noncharacter",
	`{"a":"\ud83f\udfff"}`:                                              "text contains a Unicode noncharacter",
	`{"a":"\ud83f"}`:                                                    "broken JSON at byte",
	`{"a":"\ud83f\u0041"}`:                                              "broken JSON at byte",
	"{\"a\":\"\xff\"}":                                                  "broken JSON at byte",
	"{\"a\":\"\xef\xbf\"}":                                              "broken JSON at byte",
	`[]`:                                                                "not a JSON object",
	` `:                                                                 "not a JSON object",
	``:                                                                  "not a JSON object",
	`{`:                                                                 "broken JSON",
	`{"`:                                                                "broken JSON",
	`{"a`:                                                               "broken JSON",
	`{"a"`:                                                              "broken JSON",
	`{"a":`:                                                             "broken JSON",
	`{"a":1`:                                                            "broken JSON",
	`{"a":1,`:                                                           "broken JSON",
	`{"a":1}}`:                                                          "more data follows the JSON object",
	`{"a":1}{}`:                                                         "more data follows the JSON object",
	`{"a":1} x`:                                                         "more data follows the JSON object",
	`{"a":1]`:                                                           "broken JSON",
	`{"a":,}`:                                                           "broken JSON",
	`{"a":1,}`:                                                          "broken JSON",
	`{"a":1 "b":2}`:                                                     "broken JSON",
	`{"a":01}`:                                                          "broken JSON",
	`{"a":"\x"}`:                                                        "broken JSON",
	`{"a":"\u12"}`:                                                      "broken JSON",
	`{"a":"\`:                                                           "broken JSON",
	`{"a":"\u`:                                                          "broken JSON",
	`{"a":"\ud83f\u`:                                                    "broken JSON",
	`{,}`:                                                               "broken JSON",
	`{:}`:                                                               "broken JSON",
	`{"a":["b":1]}`:                                                     "broken JSON",
	"{\"a\":1}\x00":                                                     "more data follows the JSON object",
}

// TestParse checks the documents, and that the scan and package jsontext agree about each.
func TestParse(t *testing.T) {
	for text, want := range documents {
		same(t, []byte(text))
		_, err := Parse([]byte(text))
		if want == "" && err != nil || want != "" && (err == nil || !strings.HasPrefix(err.Error(), want)) {
			t.Errorf("%.80s: %v; want %q", text, err, want)
		}
	}
}

// same fails if Parse and tokens do not agree about a document and its members, or if Decode
// accepts another set of documents.
func same(t *testing.T, b []byte) {
	t.Helper()
	want, refused := tokens(b)
	got, err := Parse(b)
	if (err == nil) != (refused == nil) {
		t.Fatalf("%q: %v, and the decoder says %v", b, err, refused)
	}
	var decoded map[string]jsontext.Value
	if err := Decode(b, &decoded); (err == nil) != (refused == nil) {
		t.Fatalf("%q: Decode: %v, and the decoder says %v", b, err, refused)
	}
	if err != nil {
		return
	}
	inner, err := Inner(b)
	if err != nil {
		t.Fatalf("%q: Inner: %v", b, err)
	}
	for _, members := range []map[string]jsontext.Value{got.Members, inner.Members, decoded} {
		if len(members) != len(want) {
			t.Fatalf("%q: %v; want %v", b, members, want)
		}
		for name, value := range want {
			if !bytes.Equal(members[name], value) {
				t.Fatalf("%q: %q is %q; want %q", b, name, members[name], value)
			}
		}
	}
}

// FuzzParse compares the scan with package jsontext.
func FuzzParse(f *testing.F) {
	for text := range documents {
		f.Add([]byte(text))
	}
	f.Fuzz(same)
}

// TestRequired checks that Decode and Into refuse an absent field and null.
func TestRequired(t *testing.T) {
	for text, missing := range map[string]bool{
		`{"a":"x"}`: false, `{}`: true, `{"a":null}`: true, `{"a": null }`: true, `{"b":"a"}`: true,
	} {
		var v struct{ A, B *string }
		b := []byte(strings.ToUpper(text))
		b = bytes.ReplaceAll(b, []byte("NULL"), []byte("null"))
		o, err := Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		for how, err := range map[string]error{"Decode": Decode(b, &v, "A"), "Into": o.Into(&v, "A")} {
			if (err != nil) != missing || missing && err.Error() != "A is missing" {
				t.Errorf("%s: %s: %v", how, b, err)
			}
		}
	}
}

// TestElements compares the elements of arrays with those of package jsontext.
func TestElements(t *testing.T) {
	for _, array := range []string{
		`[]`, ` [ ] `, `[1]`, `[ "a,b" , {"c":[1,2]},[3,[4,5]], "]\"," ]`, `[{"a":"[{"},null]`, `[[],[[]],{}]`,
	} {
		var want []jsontext.Value
		if err := json.Unmarshal([]byte(array), &want); err != nil {
			t.Fatal(err)
		}
		got, err := Elements([]byte(array), len(want))
		if err != nil || len(got) != len(want) {
			t.Fatalf("%s: %q, %v", array, got, err)
		}
		for i := range want {
			if !bytes.Equal(got[i], want[i]) {
				t.Errorf("%s: element %d is %s, want %s", array, i, got[i], want[i])
			}
		}
		if _, err := Elements([]byte(array), len(want)-1); len(want) > 0 && err != ErrTooMany {
			t.Errorf("%s: one too many: %v", array, err)
		}
	}
	for _, other := range []string{`{}`, `"[]"`, `1`, ``} {
		if _, err := Elements([]byte(other), 9); err == nil {
			t.Errorf("%s is taken for an array", other)
		}
	}
}
