package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"countersign/transcript"
)

// call runs the program and returns its exit status and output.
func call(t *testing.T, stdin string, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = run(t.Context(), args, strings.NewReader(stdin), &out, &errs)
	return status, out.String(), errs.String()
}

func TestTranscriptList(t *testing.T) {
	_, text, _ := call(t, "", "transcript", "list")
	_, asJSON, _ := call(t, "", "transcript", "list", "--json")
	var types []transcript.Type
	if err := json.Unmarshal([]byte(asJSON), &types); err != nil || len(types) != len(transcript.Types()) {
		t.Fatalf("%v\n%s", err, asJSON)
	}
	for _, typ := range types {
		if !strings.Contains(text, typ.Name+": "+typ.About+"\n") {
			t.Errorf("%s is not in\n%s", typ.Name, text)
		}
		for _, f := range typ.Fields {
			if !strings.Contains(text, "  "+f.Name+" ") || f.Form == "" || !strings.Contains(text, f.Form+"\n") {
				t.Errorf("%s: %s is not in\n%s", typ.Name, f.Name, text)
			}
		}
	}
	if !strings.Contains(text, "\n  payee        optional  32 bytes") {
		t.Errorf("the payee of a payment request is not in\n%s", text)
	}
}

const (
	subscriber = "d04ab232742bb4ab3a1368bd4615e4e6d0224ab71a016baf8520a332c9778737"
	provider   = "a09aa5f47a6759802ff955f8dc2d2a14a5c99d23be97f864127ff9383455a4f0"
)

const subscription = `{"subscription_id":"s\u202e1","subscriber":"` + subscriber + `","provider":"` + provider + `",
 "terms":{"amount":"1000","currency":"SAT","frequency":{"Monthly":{"day_of_month":1}},"method":"lightning",
  "description":"one\n\ttwo"},
 "metadata":{"a.b":"c","d":{"e\u2066":"1"},"payload":"x"},"created_at":0,"starts_at":1704067200,"ends_at":null}`

func TestTranscriptEncode(t *testing.T) {
	document := func(payload, more string) string {
		return fmt.Sprintf(`{"payload":%s,"nonce":"KioqKioqKioqKioqKioqKioqKioqKioqKioqKioqKio",`+
			`"timestamp":1704067200,"expires_at":1704070800%s}`, payload, more)
	}
	status, text, stderr := call(t, document(subscription, ""), "transcript", "encode", "paykit-subscription-v2")
	if status != 0 {
		t.Fatal(stderr)
	}
	got := strings.Split(text, "\n")
	for i, want := range []string{
		`type paykit-subscription-v2`,
		`payload.created_at 0`,
		`payload.ends_at null`,
		`payload.metadata."a.b" "c"`,
		`payload.metadata.d."e\u2066" "1"`,
		`payload.metadata.payload "x"`,
		`payload.provider "` + provider + `"`,
		`payload.starts_at 1704067200`,
		`payload.subscriber "` + subscriber + `"`,
		`payload.subscription_id "s\u202e1"`,
		`payload.terms.amount "1000"`,
		`payload.terms.currency "SAT"`,
		`payload.terms.description "one\n\ttwo"`,
		`payload.terms.frequency.Monthly.day_of_month 1`,
		`payload.terms.method "lightning"`,
		`nonce 2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a`,
		`timestamp 1704067200, 2024-01-01T00:00:00Z`,
		`expires_at 1704070800, 2024-01-01T01:00:00Z`,
		`canonical `,
		`message `,
	} {
		if i >= len(got) || !strings.HasPrefix(strings.Join(strings.Fields(got[i]), " "), want) {
			t.Errorf("line %d is not %s:\n%s", i, want, text)
		}
	}

	hello := `{"context":"release","message":"aGVsbG8"}`
	for _, more := range []string{
		``, `,"type":"message-v1"`, `,"id":"1","op":"sign","key":"payments","type":"message-v1"`,
		`,"type":"message-v1","key":"payments","version":1,` +
			`"public_key":"KioqKioqKioqKioqKioqKioqKioqKioqKioqKioqKio","signature":"AA","event":7,"repeated":false,` +
			`"receipt":{"id":"AA","salt":"AA"}`,
	} {
		status, text, stderr := call(t, document(hello, more), "transcript", "encode", "message-v1", "-", "--json")
		var out map[string]string
		if err := json.Unmarshal([]byte(text), &out); status != 0 || err != nil {
			t.Errorf("%s: %v, %s", more, err, stderr)
		}
		if len(out) != 3 || out["type"] != "message-v1" || out["message"] != out["canonical"] ||
			!strings.HasPrefix(out["canonical"], "636f756e7465727369676e") { // "countersign"
			t.Errorf("%s: %s", more, text)
		}
	}
	huge := strings.Replace(subscription, `"1000"`, `"9223372036854775807"`, 1)
	long := `{"payer":"` + subscriber + `","amount":"1","currency":"SAT","method":"m","endpoint":"` +
		strings.Repeat("x", 65536) + `"}`
	for _, c := range []struct{ code, typ, input string }{
		{"malformed", "message-v1", document(hello, `,"extra":1`)},
		{"malformed", "message-v1", document(hello, `,"type":"raw"`)},
		{"malformed", "message-v1", document(`{"context":"release","message":"aGVsbG8","extra":1}`, "")},
		{"malformed", "message-v1", hello},
		{"malformed", "message-v1", document(hello, `,"type":"`+strings.Repeat("x", 5000)+`"`)},
		{"malformed", "message-v1", ""},
		{"unsupported", "message-v9", document(hello, "")},
		{"denied", "paykit-subscription-v2", document(huge, "")},
		{"malformed", "payment-request-v1", document(long, "")},
	} {
		status, text, stderr := call(t, c.input, "transcript", "encode", c.typ)
		if status != 1 || text != "" || len(stderr) > 500 ||
			!strings.HasPrefix(stderr, "countersign: error: "+c.code+": ") {
			t.Errorf("%.100s: status %d, %s%.600s", c.input, status, text, stderr)
		}
	}
}
