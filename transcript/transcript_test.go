package transcript_test

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"countersign/internal/eddsa"
	"countersign/transcript"
)

// subscriptionVectors is the form of the test vectors that paykit_subscriptions publishes.
type subscriptionVectors struct {
	SignerPublicKey string             `json:"signer_public_key"`
	Cases           []subscriptionCase `json:"cases"`
}

type subscriptionCase struct {
	Name         string          `json:"name"`
	Subscription json.RawMessage `json:"subscription"`
	Nonce        string          `json:"nonce"`
	Timestamp    int64           `json:"timestamp"`
	ExpiresAt    int64           `json:"expires_at"`
	Canonical    string          `json:"canonical"`
	SHA256       string          `json:"sha256"`
	Signature    string          `json:"signature"`
}

// parse parses another subscription in the envelope of the case.
func (c subscriptionCase) parse(t testing.TB, subscription string) (*transcript.Document, error) {
	t.Helper()
	r := request(t, "paykit-subscription-v2", subscription, c.Nonce, c.Timestamp, c.ExpiresAt)
	return transcript.Parse(r)
}

func loadVectors(t testing.TB) subscriptionVectors {
	t.Helper()
	b, err := os.ReadFile("testdata/paykit-subscription-signature.json")
	if err != nil {
		t.Fatal(err)
	}
	var v subscriptionVectors
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	if len(v.Cases) < 4 {
		t.Fatalf("only %d cases", len(v.Cases))
	}
	return v
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func request(t testing.TB, typ, payload, nonce string, ts, exp int64) transcript.Request {
	r := transcript.Request{Type: typ, Payload: []byte(payload), Timestamp: ts, ExpiresAt: exp}
	copy(r.Nonce[:], unhex(t, nonce))
	return r
}

// TestPaykitSubscriptionVectors compares the canonical bytes, hashes and signatures with every
// published case. Parse must refuse three of the cases, and name the field at fault: a careful
// signer does not sign them.
func TestPaykitSubscriptionVectors(t *testing.T) {
	v := loadVectors(t)
	refused := map[string]string{
		"daily-negative":   "payload.terms.amount",
		"collision-a-true": "payload.metadata",
		"collision-b-one":  "payload.metadata",
	}
	accepted := 0
	for _, c := range v.Cases {
		r := request(t, "paykit-subscription-v2", string(c.Subscription), c.Nonce, c.Timestamp, c.ExpiresAt)
		canonical, err := transcript.CanonicalSubscription(r)
		if err != nil {
			t.Fatalf("%s: %v", c.Name, err)
		}
		if got := hex.EncodeToString(canonical); got != c.Canonical {
			t.Errorf("%s: canonical\n got %s\nwant %s", c.Name, got, c.Canonical)
		}
		if sum := sha256.Sum256(canonical); hex.EncodeToString(sum[:]) != c.SHA256 {
			t.Errorf("%s: SHA-256 %x, want %s", c.Name, sum, c.SHA256)
		}
		if err := eddsa.Verify(unhex(t, v.SignerPublicKey), unhex(t, c.SHA256), unhex(t, c.Signature)); err != nil {
			t.Errorf("%s: signature: %v", c.Name, err)
		}

		doc, err := transcript.Parse(r)
		if field, bad := refused[c.Name]; bad {
			if !errors.Is(err, transcript.ErrMalformed) || !strings.Contains(err.Error(), field) {
				t.Errorf("%s: %v, want a refusal of %s", c.Name, err, field)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.Name, err)
			continue
		}
		accepted++
		if hex.EncodeToString(doc.Canonical) != c.Canonical || hex.EncodeToString(doc.Message) != c.SHA256 {
			t.Errorf("%s: Parse gives other bytes than the vectors", c.Name)
		}
		if err := doc.CheckSigner(unhex(t, v.SignerPublicKey)); err != nil {
			t.Errorf("%s: the subscriber may not sign: %v", c.Name, err)
		}
		if err := doc.CheckSigner(make([]byte, 32)); !errors.Is(err, transcript.ErrWrongSigner) {
			t.Errorf("%s: a stranger may sign: %v", c.Name, err)
		}
	}
	if accepted < 2 {
		t.Errorf("only %d cases accepted", accepted)
	}
}

func TestKeysInEveryTextForm(t *testing.T) {
	v := loadVectors(t)
	c := v.Cases[0]
	key := unhex(t, v.SignerPublicKey)
	numbers, _ := json.Marshal(strings.Split(strings.Trim(strings.ReplaceAll(fmt.Sprint(key), " ", ","), "[]"), ","))
	array := strings.ReplaceAll(string(numbers), `"`, "")
	forms := map[string]string{
		"array":     array,
		"hex":       `"` + hex.EncodeToString(key) + `"`,
		"HEX":       `"` + strings.ToUpper(hex.EncodeToString(key)) + `"`,
		"base64url": `"` + base64.RawURLEncoding.EncodeToString(key) + `"`,
		"z-base-32": `"` + transcript.ZBase32(key) + `"`,
	}
	for name, form := range forms {
		payload := replaceField(t, c.Subscription, "subscriber", form)
		doc, err := c.parse(t, payload)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if hex.EncodeToString(doc.Canonical) != c.Canonical {
			t.Errorf("%s: other canonical bytes", name)
		}
	}
	for name, form := range map[string]string{
		"31 numbers":                strings.Replace(array, ",", "", 1)[:len(array)-1],
		"a number over 255":         strings.Replace(array, "[208", "[256", 1),
		"null among the numbers":    strings.Replace(array, "[208", "[null", 1),
		"a fraction":                strings.Replace(array, "[208", "[208.5", 1),
		"hex with a bad digit":      `"` + strings.Repeat("g", 64) + `"`,
		"padded base64":             `"` + base64.URLEncoding.EncodeToString(key) + `"`,
		"z-base-32, spare bits set": `"` + transcript.ZBase32(key)[:51] + `9"`,
		"empty":                     `""`, "null": `null`, "a number": `7`, "an object": `{}`,
		"all zero":     `"` + strings.Repeat("0", 64) + `"`,
		"small order":  `"01` + strings.Repeat("0", 62) + `"`,
		"no point":     `"02` + strings.Repeat("0", 62) + `"`,
		"not reduced":  `"f0` + strings.Repeat("f", 60) + `7f"`,
		"the provider": string(field(t, c.Subscription, "provider")),
	} {
		payload := replaceField(t, c.Subscription, "subscriber", form)
		if _, err := c.parse(t, payload); !errors.Is(err, transcript.ErrMalformed) {
			t.Errorf("%s: %v, want malformed", name, err)
		}
	}
}

// TestSubscriptionRefusals changes one field at a time in a good document.
func TestSubscriptionRefusals(t *testing.T) {
	c := loadVectors(t).Cases[0]
	long := strings.Repeat("x", 5000)
	for _, bad := range []struct{ path, value string }{
		{"subscription_id", `""`}, {"subscription_id", `"a\u0000b"`}, {"subscription_id", `"` + long + `"`},
		{"subscription_id", `7`},
		{"terms.amount", `1000`}, {"terms.amount", `"0"`}, {"terms.amount", `"0.00"`}, {"terms.amount", `"-1"`},
		{"terms.amount", `"+1"`},
		{"terms.amount", `"01"`}, {"terms.amount", `"1."`}, {"terms.amount", `".5"`}, {"terms.amount", `"1e3"`},
		{"terms.amount", `" 1"`},
		{"terms.amount", `"79228162514264337593543950336"`}, // 2^96
		{"terms.amount", `"0.00000000000000000000000000001"`}, {"terms.amount", `"` + strings.Repeat("9", 4000) + `"`},
		{"terms.max_amount_per_period", `"0"`}, {"terms.max_amount_per_period", `""`},
		{"terms.currency", `""`}, {"terms.currency", `"S T"`}, {"terms.currency", `"ABCDEFGHIJKLMNOPQ"`},
		{"terms.method", `"../etc"`}, {"terms.method", `""`}, {"terms.method", `"` + strings.Repeat("m", 65) + `"`},
		{"terms.frequency", `"daily"`}, {"terms.frequency", `null`},
		{"terms.frequency", `{"Monthly":{"day_of_month":0}}`},
		{"terms.frequency", `{"Monthly":{"day_of_month":32}}`},
		{"terms.frequency", `{"Monthly":{"day_of_month":1,"x":1}}`},
		{"terms.frequency", `{"Yearly":{"month":2,"day":30}}`}, {"terms.frequency", `{"Yearly":{"month":13,"day":1}}`},
		{"terms.frequency", `{"Custom":{"interval_seconds":0}}`},
		{"terms.frequency", `{"Custom":{"interval_seconds":-1}}`},
		{"terms.frequency", `{"Monthly":{"day_of_month":1},"Yearly":{"month":1,"day":1}}`},
		{"terms.frequency", `{"Monthly":{"day_of_month":1},"Yearly":null}`},
		{"terms.frequency", `{"Monthly":null}`}, {"terms.frequency", `{"Custom":{"interval_seconds":253402300800}}`},
		{"metadata", `null`}, {"terms.frequency", `{}`},
		{"terms.description", `null`}, {"terms.description", `"` + long + `"`}, {"terms.description", `"\u0007"`},
		{"metadata", `{"k":true}`}, {"metadata", `{"k":1}`}, {"metadata", `{"k":null}`}, {"metadata", `{"k":["a"]}`},
		{"metadata", `{"k":1.5}`},
		{"metadata", `{"k":{}}`}, {"metadata", `{"k":{"a":{"b":"c"}}}`}, {"metadata", `{"k":"\u0001"}`},
		{"metadata", `{"":"x"}`},
		{"metadata", `{"k":{"` + strings.Repeat("i", 32) + `":"x"}}`}, {"metadata", `[]`},
		{"metadata", `{"k":"a","k":"b"}`},
		{"created_at", `-1`}, {"created_at", `null`}, {"created_at", `1.5`}, {"created_at", `1e400`},
		{"created_at", `"1"`},
		{"starts_at", `99999999999999999999`}, {"starts_at", `253402300800`}, {"ends_at", `1704067200`},
		{"ends_at", `-1`},
		{"extra", `1`}, {"terms.extra", `1`},
	} {
		var payload string
		if outer, inner, ok := strings.Cut(bad.path, "."); ok {
			object := replaceField(t, field(t, c.Subscription, outer), inner, bad.value)
			payload = replaceField(t, c.Subscription, outer, object)
		} else {
			payload = replaceField(t, c.Subscription, bad.path, bad.value)
		}
		_, err := c.parse(t, payload)
		if !errors.Is(err, transcript.ErrMalformed) {
			t.Errorf("%s = %.60s: %v, want malformed", bad.path, bad.value, err)
		} else if len(err.Error()) > 400 {
			t.Errorf("%s = %.60s: an error of %d bytes", bad.path, bad.value, len(err.Error()))
		}
	}
	for _, missing := range []string{
		"subscription_id", "subscriber", "provider", "terms", "metadata", "created_at", "starts_at",
	} {
		var m map[string]json.RawMessage
		if err := json.Unmarshal(c.Subscription, &m); err != nil {
			t.Fatal(err)
		}
		delete(m, missing)
		payload, _ := json.Marshal(m)
		if _, err := c.parse(t, string(payload)); !errors.Is(err, transcript.ErrMalformed) {
			t.Errorf("without %s: %v, want malformed", missing, err)
		}
	}
	for _, good := range []struct{ path, value string }{
		{"amount", `"79228162514264337593543950335"`}, {"amount", `"0.0000000000000000000000000001"`},
		{"description", `""`},
		{"frequency", `"Weekly"`}, {"frequency", `{"Custom":{"interval_seconds":3600}}`},
		{"frequency", `{"Yearly":{"month":2,"day":29}}`},
		{"max_amount_per_period", `null`},
	} {
		terms := replaceField(t, field(t, c.Subscription, "terms"), good.path, good.value)
		if _, err := c.parse(t, replaceField(t, c.Subscription, "terms", terms)); err != nil {
			t.Errorf("%s = %s: %v", good.path, good.value, err)
		}
	}
}

// TestMetadataIsInjective compares the bytes of documents that differ in their metadata only. The
// values are those for which the layout, which has no type tags, comes closest to confusing text
// with objects.
func TestMetadataIsInjective(t *testing.T) {
	c := loadVectors(t).Cases[0]
	seen := map[string]string{}
	for _, m := range []string{
		`{}`, `{"k":""}`, `{"k":"a"}`, `{"k":{"a":""}}`, `{"k":{"a":"b"}}`, `{"k":"ab"}`, `{"a":"","b":""}`,
		`{"a":{"b":""}}`,
		`{"a":{"b":"c"},"d":"e"}`, `{"a":"b","c":{"d":"e"}}`, `{"a":{"b":"c","d":"e"}}`, `{"k":{" ":" "}}`,
		`{"k":"  "}`,
		`{"k":{"` + strings.Repeat("i", 31) + `":"x"}}`, `{"` + strings.Repeat("k", 64) + `":"x"}`,
	} {
		doc, err := c.parse(t, replaceField(t, c.Subscription, "metadata", m))
		if err != nil {
			t.Errorf("%s: %v", m, err)
			continue
		}
		if other, dup := seen[string(doc.Canonical)]; dup {
			t.Errorf("%s and %s have the same bytes", m, other)
		}
		seen[string(doc.Canonical)] = m
	}
}

func TestMessage(t *testing.T) {
	nonce := strings.Repeat("2a", 32)
	msg := []byte("release 1.2.3")
	sum := sha256.Sum256(msg)
	want := append([]byte("countersign-message-v1\x00\x07release"), sum[:]...)
	want = append(want, unhex(t, nonce+"0000000065920080"+"0000000065920e90")...)
	b64 := base64.RawURLEncoding.EncodeToString
	for _, payload := range []string{
		`{"context":"release","message":"` + b64(msg) + `"}`,
		`{"context":"release","sha256":"` + b64(sum[:]) + `"}`,
	} {
		doc, err := transcript.Parse(request(t, "message-v1", payload, nonce, 1704067200, 1704070800))
		if err != nil {
			t.Fatal(err)
		}
		if string(doc.Canonical) != string(want) || string(doc.Message) != string(want) {
			t.Errorf("%s:\n got %x\nwant %x", payload, doc.Canonical, want)
		}
	}
	for _, payload := range []string{
		``, `7`, `null`, `[]`, `{}`, `{"context":"c"}`, `{"context":"","message":""}`, `{"message":"AA"}`,
		`{"context":"c","message":"AA","sha256":"` + b64(sum[:]) + `"}`, `{"context":"c","sha256":"AA"}`,
		`{"context":"c","message":"A"}`,
		`{"context":"c","message":"AB"}`, `{"context":"c","message":"A\nA"}`, `{"context":"c","message":"AA=="}`,
		`{"context":"c","message":"AA","x":1}`,
		`{"context":"c","context":"c","message":"AA"}`, `{"context":"c\n","message":"AA"}`,
		`{"context":"` + strings.Repeat("c", 256) + `","message":"AA"}`,
		"{\"context\":\"\xff\",\"message\":\"AA\"}", `{"context":"\ud800","message":"AA"}`,
		`{"Context":"c","message":"AA"}`,
	} {
		_, err := transcript.Parse(request(t, "message-v1", payload, nonce, 1, 2))
		if !errors.Is(err, transcript.ErrMalformed) {
			t.Errorf("%.70s: %v, want malformed", payload, err)
		}
	}
}

func TestEnvelope(t *testing.T) {
	nonce, payload := strings.Repeat("00", 32), `{"context":"c","message":"AA"}`
	const last = transcript.MaxTime
	for _, c := range []struct{ ts, exp int64 }{{-1, 5}, {5, 5}, {6, 5}, {1, last + 1}, {last + 1, last + 2}} {
		_, err := transcript.Parse(request(t, "message-v1", payload, nonce, c.ts, c.exp))
		if !errors.Is(err, transcript.ErrMalformed) {
			t.Errorf("%d to %d: %v, want malformed", c.ts, c.exp, err)
		}
	}
	_, err := transcript.Parse(request(t, "nonsense", payload, nonce, 1, 2))
	if !errors.Is(err, transcript.ErrUnsupported) {
		t.Errorf("unknown type: %v", err)
	}
	doc, err := transcript.Parse(request(t, "message-v1", payload, nonce, 1000, 2000))
	if err != nil {
		t.Fatal(err)
	}
	const skew, life = 30 * time.Second, 1000 * time.Second
	for _, c := range []struct {
		now  int64
		want error
	}{{969, transcript.ErrNotYetValid}, {970, nil}, {1000, nil}, {2000, nil}, {2001, transcript.ErrExpired}} {
		if err := doc.CheckTime(time.Unix(c.now, 999), skew, life); !errors.Is(err, c.want) {
			t.Errorf("at %d: %v, want %v", c.now, err, c.want)
		}
	}
	if err := doc.CheckTime(time.Unix(1500, 0), skew, 999*time.Second); !errors.Is(err, transcript.ErrLifetimeTooLong) {
		t.Errorf("lifetime: %v", err)
	}
}

// TestDigestSeparates sees that each change to a request, of type and envelope too, changes the
// digest.
func TestDigestSeparates(t *testing.T) {
	seen := map[[32]byte]int{}
	for i, r := range []transcript.Request{
		request(t, "message-v1", `{"context":"c","message":"AA"}`, strings.Repeat("00", 32), 1, 2),
		request(t, "message-v1", `{"context":"d","message":"AA"}`, strings.Repeat("00", 32), 1, 2),
		request(t, "message-v1", `{"context":"c","message":"AA"}`, strings.Repeat("01", 32), 1, 2),
		request(t, "message-v1", `{"context":"c","message":"AA"}`, strings.Repeat("00", 32), 0, 2),
		request(t, "message-v1", `{"context":"c","message":"AA"}`, strings.Repeat("00", 32), 1, 3),
		request(t, "raw", `{"message":"AA"}`, strings.Repeat("00", 32), 1, 2),
		request(t, "raw", `{"message":"AA"}`, strings.Repeat("00", 32), 1, 3),
	} {
		doc, err := transcript.Parse(r)
		if err != nil {
			t.Fatal(err)
		}
		if j, dup := seen[doc.Digest()]; dup {
			t.Errorf("requests %d and %d have one digest", i, j)
		}
		seen[doc.Digest()] = i
	}
}

func field(t testing.TB, object []byte, name string) json.RawMessage {
	t.Helper()
	var m map[string]json.RawMessage
	if err := json.Unmarshal(object, &m); err != nil {
		t.Fatal(err)
	}
	return m[name]
}

// replaceField sets a member of an object to any text, valid JSON or not.
func replaceField(t testing.TB, object []byte, name, value string) string {
	t.Helper()
	var m map[string]json.RawMessage
	if err := json.Unmarshal(object, &m); err != nil {
		t.Fatal(err)
	}
	m[name] = json.RawMessage(`"@@"`)
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Replace(string(b), `"@@"`, value, 1)
}
