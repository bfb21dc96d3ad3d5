package transcript_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"countersign/internal/eddsa"
	"countersign/transcript"
)

// vector is a case of testdata/vectors.json, in the form of docs/SPEC.md. The vectors come from
// another program, written after the layouts in the specification. Vectors of upstream's types
// have upstream's constants.
type vector struct {
	Comment   string          `json:"comment"`
	Type      string          `json:"type"`
	Payload   json.RawMessage `json:"payload"`
	Nonce     string          `json:"nonce"`
	Timestamp int64           `json:"timestamp"`
	ExpiresAt int64           `json:"expires_at"`
	Canonical string          `json:"canonical"`
	Message   string          `json:"message"`
	PublicKey string          `json:"public_key"`
	Signature string          `json:"signature"`
}

func (v vector) request(t testing.TB, payload string) transcript.Request {
	return request(t, v.Type, payload, hex.EncodeToString(unbase64(t, v.Nonce)), v.Timestamp, v.ExpiresAt)
}

// vectors returns the vectors of a type, or all vectors for "".
func vectors(t testing.TB, typ string) []vector {
	t.Helper()
	b, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var all []vector
	if err := json.Unmarshal(b, &all); err != nil {
		t.Fatal(err)
	}
	all = slices.DeleteFunc(all, func(v vector) bool { return typ != "" && v.Type != typ })
	if len(all) == 0 {
		t.Fatalf("no vector of %q", typ)
	}
	return all
}

func unbase64(t testing.TB, s string) []byte {
	t.Helper()
	b, err := base64.RawURLEncoding.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func parse(t testing.TB, r transcript.Request) *transcript.Document {
	t.Helper()
	doc, err := transcript.Parse(r)
	if err != nil {
		t.Fatalf("%s %s: %v", r.Type, r.Payload, err)
	}
	return doc
}

func TestVectors(t *testing.T) {
	for _, v := range vectors(t, "") {
		doc := parse(t, v.request(t, string(v.Payload)))
		if hex.EncodeToString(doc.Canonical) != v.Canonical || hex.EncodeToString(doc.Message) != v.Message {
			t.Errorf("%s, %s:\ncanonical %x\nmessage   %x", v.Type, v.Comment, doc.Canonical, doc.Message)
		}
		key := unbase64(t, v.PublicKey)
		if err := eddsa.Verify(key, doc.Message, unbase64(t, v.Signature)); err != nil {
			t.Errorf("%s, %s: %v", v.Type, v.Comment, err)
		}
		if err := doc.CheckSigner(key); err != nil {
			t.Errorf("%s, %s: %v", v.Type, v.Comment, err)
		}
	}
	for _, typ := range transcript.Types() {
		vectors(t, typ.Name)
	}
}

const (
	keyA = "d04ab232742bb4ab3a1368bd4615e4e6d0224ab71a016baf8520a332c9778737"
	keyB = "a09aa5f47a6759802ff955f8dc2d2a14a5c99d23be97f864127ff9383455a4f0"
	b32  = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8" // 000102..1f
)

// TestOurBytes compares the bytes of payloads in other forms than RFC 8785 with bytes made from a
// form written by hand.
func TestOurBytes(t *testing.T) {
	for _, c := range []struct{ typ, payload, domain, form string }{
		{
			"payment-request-v1",
			` { "payer" : "` + keyA + `", "method":"lightning", "endpoint":"a\/b\u0022\u20AC\ud83d\ude00\u2028",` +
				`"currency":"SAT","amount":"1.50","description":"\u000a\u0009\u00e9" }`,
			"countersign-payment-request-v1\x00",
			`{"amount":"1.50","currency":"SAT","description":"\n\té","endpoint":"a/b\"€😀` + "\u2028" +
				`","method":"lightning","payer":"` + keyA + `"}`,
		},
		{
			"receipt-v1",
			`{"time":1704067200,"status":"failed","method":"sepa","id":"AAECAwQFBgcICQoLDA0ODw",` +
				`"amount_hash":"` + b32 + `"}`,
			"countersign-receipt-document-v1\x00",
			`{"amount_hash":"` + b32 + `","id":"AAECAwQFBgcICQoLDA0ODw",` +
				`"method":"sepa","status":"failed","time":1704067200}`,
		},
		{
			"key-succession-v1",
			`{"version":2,"time":-0,"key":"p\u0061y","old_public_key":"` + keyA +
				`","new_public_key":"` + keyB + `","next":null}`,
			"countersign-key-succession-v1\x00",
			`{"key":"pay","new_public_key":"` + keyB + `","next":null,"old_public_key":"` + keyA +
				`","time":0,"version":2}`,
		},
	} {
		nonce := strings.Repeat("2a", 32)
		doc := parse(t, request(t, c.typ, c.payload, nonce, 1704067200, 1704070800))
		sum := sha256.Sum256([]byte(c.form))
		want := append([]byte(c.domain), sum[:]...)
		want = append(want, unhex(t, nonce+"0000000065920080"+"0000000065920e90")...)
		if string(doc.Canonical) != string(want) || string(doc.Message) != string(want) {
			t.Errorf("%s:\n got %x\nwant %x", c.typ, doc.Canonical, want)
		}
	}
}

// TestRefusals changes one field at a time in a good document.
func TestRefusals(t *testing.T) {
	long := func(n int) string { return `"` + strings.Repeat("x", n) + `"` }
	// A field of 32 bytes takes none of sizes; a field with a point on the curve takes none of
	// points.
	sizes := []string{`7`, `""`, `{}`, `"` + keyA[2:] + `"`, `"` + keyA + `00"`, `[1,2]`, `"` + b32 + `="`}
	points := append([]string{
		`"` + strings.Repeat("0", 64) + `"`, `"01` + strings.Repeat("0", 62) + `"`,
		`"02` + strings.Repeat("0", 62) + `"`,
		`"f0` + strings.Repeat("f", 60) + `7f"`, `"01` + strings.Repeat("0", 60) + `80"`,
	}, sizes...)
	tokens := []string{`""`, `7`, `"a b"`, `"a\u0000"`, `"é"`, `"a.b"`, `"a/b"`, long(65)}
	numbers := []string{`-1`, `1.5`, `1.0`, `1e3`, `"1"`, `true`, `99999999999999999999`, `1e400`}
	times := append([]string{`253402300800`}, numbers...)
	hashes := []string{
		`7`, `""`, `"AA"`, `"` + b32 + `="`, `"` + b32[:42] + `9"`, `"` + b32[:42] + `\n8"`, `"` + keyA + `"`,
	}
	for typ, fields := range map[string]map[string][]string{
		"message-v1": {
			"context": {`""`, `7`, `"a\u0000"`, `"\u0085"`, long(256)}, "message": {`7`, `"A"`, `"AB"`, `"AA=="`},
			"sha256": {`"` + b32 + `"`},
		},
		"payment-request-v1": {
			"payer": append([]string{`"` + keyB + `"`}, points...),
			"payee": append([]string{`"` + keyA + `"`}, points...),
			"amount": {
				`1`, `""`, `"0"`, `"0.0"`, `"-1"`, `"+1"`, `"01"`, `"1."`, `".5"`, `"1e3"`, `" 1"`, `"1,5"`,
				`"79228162514264337593543950336"`, `"0.00000000000000000000000000001"`,
			},
			"currency": {`""`, `7`, `"S T"`, `"ABCDEFGHIJKLMNOPQ"`, `"€"`}, "method": tokens,
			"endpoint": {
				`""`, `7`, `"a\u0000b"`, `"a\nb"`, `"\u007f"`, `"\u0085"`, long(65537), `"\ud800"`, `"\uffff"`,
			},
			"description": {`7`, `"\u0007"`, `"\r\n"`, `"\u001b[31m"`, long(4097)},
		},
		"receipt-v1": {
			"id":          {`7`, `""`, `"AA"`, `"` + b32 + `"`, `"AAECAwQFBgcICQoLDA0OD="`, `"AAECAwQFBgcICQoLDA0ODx"`},
			"time":        times,
			"amount_hash": hashes, "method": tokens, "status": {`""`, `7`, `"Completed"`, `"paid"`, `"completed "`},
		},
		"key-succession-v1": {
			"key":            {`""`, `7`, `"-a"`, `"A"`, `"a.b"`, `"a/b"`, `"a\u0000"`, long(65)},
			"version":        append([]string{`0`, `1`, `4294967296`}, numbers...),
			"old_public_key": append([]string{`"` + keyB + `"`}, points...),
			"new_public_key": append([]string{`"` + keyA + `"`}, points...),
			"time":           times, "next": hashes,
		},
		"paykit-http-signature-v1": {
			"method": {`""`, `7`, `"get"`, `"GET "`, `"G\u0000T"`, `"ABCDEFGHIJKLMNOPQ"`, `"GÉT"`},
			"path": {
				`""`, `7`, `"a"`, `"/a b"`, `"/a#b"`, `"/a\u0000b"`, `"/a\u007f"`, `"/é"`, `"/a\n"`,
				`"/` + strings.Repeat("x", 2048) + `"`,
			},
			"body": {
				`7`, `"x"`, `"{"`, `" {}"`, `"{}\n"`, `"{ }"`, `"{\"b\":1,\"a\":2}"`, `"{\"a\":1,\"a\":1}"`,
				`"{\"a\":1}{}"`, `"1.0"`, `"-0"`, `"1E2"`, `"0x1"`,
				`"9007199254740993"`, `"{\"n\":12345678901234567890}"`, `"1e400"`, `"1e-400"`,
				`"0.1000000000000000055"`, `"\"\\u0041\""`, `"\"\\/\""`, `"\"\\ud800\""`, `"\"\\uffff\""`, `"\u0000"`,
				`"\ufeff{}"`, `"\"` + strings.Repeat("x", 16383) + `\""`,
			},
		},
		"paykit-noise-key-authorization-v1": {
			"owner": points, "noise_public_key": points,
			"noise_static_public_key": append([]string{
				`"` + strings.Repeat("0", 64) + `"`, `"01` + strings.Repeat("0", 62) + `"`,
				`"ec` + strings.Repeat("f", 60) + `7f"`, `"ed` + strings.Repeat("f", 60) + `7f"`,
				`"` + strings.Repeat("0", 62) + `80"`,
				`"e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"`,
			}, sizes...),
			"key_generation": append([]string{`9223372036854775808`}, numbers...),
		},
		"raw": {"message": {`7`, `"A"`, `"AB"`, `"AA=="`, `"A\nA"`}},
	} {
		v := vectors(t, typ)[0]
		for name, values := range fields {
			for _, value := range values {
				payload := replaceField(t, v.Payload, name, value)
				_, err := transcript.Parse(v.request(t, payload))
				if !errors.Is(err, transcript.ErrMalformed) || !strings.Contains(err.Error(), "payload") {
					t.Errorf("%s: %s = %.60s: %v, want malformed", typ, name, value, err)
				}
			}
		}
	}
	for _, good := range []struct{ typ, name, value string }{
		{"payment-request-v1", "endpoint", long(65536)}, {"payment-request-v1", "endpoint", `" "`},
		{"payment-request-v1", "description", `""`},
		{"payment-request-v1", "description", long(4096)}, {"payment-request-v1", "method", long(64)},
		{"payment-request-v1", "amount", `"79228162514264337593543950335"`},
		{"key-succession-v1", "key", `"` + strings.Repeat("k", 64) + `"`}, {"key-succession-v1", "key", `"0-"`},
		{"key-succession-v1", "version", `4294967295`},
		{"receipt-v1", "time", `253402300799`}, {"receipt-v1", "status", `"cancelled"`},
		{"paykit-http-signature-v1", "method", `"ABCDEFGHIJKLMNOP"`},
		{"paykit-http-signature-v1", "path", `"/` + strings.Repeat("~", 2047) + `"`},
		{"paykit-http-signature-v1", "body", `"\"` + strings.Repeat("x", 16382) + `\""`},
		{"paykit-http-signature-v1", "body", `"[0.1,9007199254740992,1e+21,\"€\\u0001\"]"`},
		{"paykit-noise-key-authorization-v1", "key_generation", `0`},
		{"paykit-noise-key-authorization-v1", "key_generation", `9223372036854775807`},
	} {
		v := vectors(t, good.typ)[0]
		parse(t, v.request(t, replaceField(t, v.Payload, good.name, good.value)))
	}
}

// TestFieldsAreWhatParseTakes compares Type.Fields with the behaviour of Parse. A required field
// must be present and not null, other fields may be absent or null, and a field outside the list
// is refused.
func TestFieldsAreWhatParseTakes(t *testing.T) {
	for _, typ := range transcript.Types() {
		listed := map[string]bool{}
		v := vectors(t, typ.Name)[0]
		for _, f := range typ.Fields {
			outer, inner, nested := strings.Cut(f.Name, ".")
			object := []byte(v.Payload)
			if listed[outer] = true; nested {
				object = field(t, v.Payload, outer)
				outer, inner = inner, outer
			}
			var members map[string]json.RawMessage
			if err := json.Unmarshal(object, &members); err != nil {
				t.Fatal(err)
			}
			for _, value := range []json.RawMessage{nil, json.RawMessage("null")} {
				changed := maps.Clone(members)
				if delete(changed, outer); value != nil {
					changed[outer] = value
				}
				b, _ := json.Marshal(changed)
				if nested {
					b = []byte(replaceField(t, v.Payload, inner, string(b)))
				}
				_, err := transcript.Parse(v.request(t, string(b)))
				if typ.Name == "message-v1" && f.Name == "message" { // this or sha256
					err = nil
				}
				if f.Required != errors.Is(err, transcript.ErrMalformed) || !f.Required && err != nil {
					t.Errorf("%s: with %s %s: %v", typ.Name, f.Name, value, err)
				}
			}
		}
		for _, v := range vectors(t, typ.Name) {
			var members map[string]json.RawMessage
			if err := json.Unmarshal(v.Payload, &members); err != nil {
				t.Fatal(err)
			}
			for name := range members {
				if !listed[name] {
					t.Errorf("%s: %s is not in the list", typ.Name, name)
				}
			}
		}
		for _, payload := range []string{
			replaceField(t, v.Payload, "extra", `1`), string(v.Payload[:len(v.Payload)-1]),
			`{}`, `null`, `[]`, string(v.Payload) + `{}`,
		} {
			if _, err := transcript.Parse(v.request(t, payload)); !errors.Is(err, transcript.ErrMalformed) {
				t.Errorf("%s: %.80s: %v, want malformed", typ.Name, payload, err)
			}
		}
	}
}

// domain returns the domain of a type's signed bytes, up to and including the first zero byte. Two
// types have none, for which the result is "": raw, and paykit-subscription-v2, which signs a hash.
func domain(typ string, message []byte) string {
	if typ == "raw" || typ == "paykit-subscription-v2" {
		return ""
	}
	text, _, _ := strings.Cut(string(message), "\x00")
	return text + "\x00"
}

// TestTypesAreSeparate sees that documents of different types never have the same signed bytes. The
// bytes of a type begin with a domain, which ends in a zero byte, so that no domain is the prefix
// of another. The exceptions are subscriptions and raw. A subscription signs a hash of 32 bytes.
// Messages of other types are longer, except for short HTTP requests: to collide with one, a
// SHA-256 would have to begin with 25 given bytes. The bytes of raw are the caller's.
func TestTypesAreSeparate(t *testing.T) {
	const http = "paykit-http-signature-v1\x00"
	owner := map[string]string{
		// Other domains that are hashed or signed: see appliance/document.go.
		"countersign-receipt-v1\x00": "commitment", "countersign-receipt-id-v1\x00": "id",
		"countersign-receipt-salt-v1\x00": "salt",
	}
	for _, v := range vectors(t, "") {
		message := unhex(t, v.Message)
		d := domain(v.Type, message)
		switch {
		case v.Type == "raw":
		case v.Type == "paykit-subscription-v2":
			if len(message) != sha256.Size {
				t.Errorf("%s signs %d bytes", v.Type, len(message))
			}
		case len(d) < 20 || len(message) <= sha256.Size && d != http:
			t.Errorf("%s: the domain is %q, of %d bytes", v.Type, d, len(message))
		case owner[d] != "" && owner[d] != v.Type:
			t.Errorf("%s and %s share %q", v.Type, owner[d], d)
		default:
			owner[d] = v.Type
		}
	}
	if len(owner) != 3+len(transcript.Types())-2 {
		t.Errorf("%d domains: %q", len(owner), owner)
	}
}

// TestLayoutsAreInjective compares the bytes of documents that differ little from each other.
func TestLayoutsAreInjective(t *testing.T) {
	const (
		authorization = "paykit-noise-key-authorization-v1"
		succession    = "key-succession-v1"
	)
	authorize := func(owner, key, rest string) string {
		return `{"owner":"` + owner + `","noise_public_key":"` + key + `",` + rest + `}`
	}
	succeed := func(oldKey, newKey, rest string) string {
		return `{"key":"k","version":2,"old_public_key":"` + oldKey +
			`","new_public_key":"` + newKey + `",` + rest + `}`
	}
	seen := map[string]string{}
	for _, c := range []struct{ typ, payload string }{
		{"paykit-http-signature-v1", `{"method":"GET","path":"/","body":""}`},
		{"paykit-http-signature-v1", `{"method":"GE","path":"/T","body":""}`},
		{"paykit-http-signature-v1", `{"method":"G","path":"/ET/","body":""}`},
		{"paykit-http-signature-v1", `{"method":"GET","path":"/0","body":""}`},
		{"paykit-http-signature-v1", `{"method":"GET","path":"/","body":"0"}`},
		{"paykit-http-signature-v1", `{"method":"GET","path":"/{}","body":""}`},
		{"paykit-http-signature-v1", `{"method":"GET","path":"/","body":"{}"}`},
		{authorization, authorize(keyA, keyB, `"key_generation":1`)},
		{authorization, authorize(keyB, keyA, `"key_generation":1`)},
		{authorization, authorize(keyA, keyB, `"noise_static_public_key":"`+keyA+`","key_generation":1`)},
		{authorization, authorize(keyA, keyB, `"key_generation":9007199254740992`)},
		{authorization, authorize(keyA, keyB, `"key_generation":9007199254740993`)},
		{"message-v1", `{"context":"ab","message":"AA"}`},
		{"message-v1", `{"context":"a","message":"AA"}`},
		{succession, succeed(keyA, keyB, `"time":0`)},
		{succession, succeed(keyB, keyA, `"time":0`)},
		{succession, succeed(keyA, keyB, `"time":0,"next":"`+b32+`"`)},
	} {
		doc := parse(t, request(t, c.typ, c.payload, "", 1, 2))
		if other, dup := seen[string(doc.Message)]; dup {
			t.Errorf("%s and %s have the same bytes", c.payload, other)
		}
		seen[string(doc.Message)] = c.payload
	}
}

// TestWhatATypeSays checks the fields of a Document other than its bytes.
func TestWhatATypeSays(t *testing.T) {
	a, b, stranger := unhex(t, keyA), unhex(t, keyB), make([]byte, 32)
	for _, v := range vectors(t, "") {
		doc := parse(t, v.request(t, string(v.Payload)))
		if doc.Reserved != (v.Type == "key-succession-v1") {
			t.Errorf("%s: reserved is %v", v.Type, doc.Reserved)
		}
		if doc.Unbound != !strings.Contains(v.Canonical, hex.EncodeToString(doc.Nonce[:])) {
			t.Errorf("%s: unbound is %v", v.Type, doc.Unbound)
		}
		if (doc.Payment != nil) != (v.Type == "payment-request-v1" || v.Type == "paykit-subscription-v2") {
			t.Errorf("%s: payment is %v", v.Type, doc.Payment)
		}
		if (doc.Succession != nil) != (v.Type == "key-succession-v1") ||
			doc.NoiseStatic != nil && doc.Generation == nil {
			t.Errorf("%s: succession %v, Noise key %v", v.Type, doc.Succession, doc.NoiseStatic)
		}
		if (doc.Generation != nil) != (v.Type == "paykit-noise-key-authorization-v1") ||
			doc.Generation != nil && doc.Fields["generation"] != int64(*doc.Generation) {
			t.Errorf("%s: generation is %v", v.Type, doc.Generation)
		}
		for name, value := range doc.Fields {
			switch value.(type) {
			case string, int64:
			default:
				t.Errorf("%s: %s is a %T: no rule can judge it", v.Type, name, value)
			}
		}
		if doc.Signers != nil && doc.CheckSigner(stranger) == nil {
			t.Errorf("%s: a stranger may sign", v.Type)
		}
		var ofA, ofB []byte
		if len(doc.Signers) == 2 { // the two parties are the same in all vectors
			ofA, ofB = b, a
		}
		gotA, gotB := doc.Counterparty(a), doc.Counterparty(b)
		if !bytes.Equal(gotA, ofA) || !bytes.Equal(gotB, ofB) || doc.Counterparty(stranger) != nil {
			t.Errorf("%s, %s: the counterparties are %x and %x", v.Type, v.Comment, gotA, gotB)
		}
	}
	v := vectors(t, "payment-request-v1")[0]
	doc := parse(t, v.request(t, string(v.Payload)))
	payment := transcript.Payment{Amount: "0.25", Currency: "EUR", Method: "sepa_instant"}
	fields := map[string]any{
		"currency": "EUR", "method": "sepa_instant", "payer": keyA, "payee": keyB,
		"endpoint": "https://shop.example/pay/17",
	}
	if *doc.Payment != payment || !maps.Equal(doc.Fields, fields) {
		t.Errorf("%v, %v", doc.Payment, doc.Fields)
	}
}
