package policy_test

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"

	"countersign/internal/ijson"
	"countersign/policy"
)

// texts lists the fields of the schema's context that are text.
var texts = []string{
	"transcript", "weekday", "identity", "currency", "method", "counterparty", "subscriber", "provider", "frequency",
	"payer", "payee", "endpoint", "status", "http_method", "http_path", "owner", "noise_public_key", "message_context",
}

// longest returns the largest record of a policy for a request with one text in each given field.
func longest(t *testing.T, p *policy.Policy, text string, fields ...string) []byte {
	t.Helper()
	name := strings.Repeat("n", 64)
	request := map[string]any{
		"lifetime": int64(math.MaxInt64), "size": int64(math.MaxInt64), "hour": int64(23),
		"amount": int64(math.MaxInt64), "amount_e8": int64(math.MaxInt64),
		"starts_at": int64(math.MinInt64), "ends_at": int64(math.MinInt64), "generation": int64(math.MinInt64),
	}
	for _, field := range texts {
		request[field] = strings.Repeat("f", 64)
	}
	for _, field := range fields {
		request[field] = text
	}
	r, err := policy.NewRequest(name, policy.Sign, name, request)
	if err != nil {
		t.Fatal(err)
	}
	r.PeerKey = strings.Repeat("f", 64)
	for n := range policy.MaxGroupsOf {
		group := fmt.Sprintf("%d%s", n, strings.Repeat("g", policy.MaxGroupName-1))
		r.PeerGroups, r.KeyGroups = append(r.PeerGroups, group), append(r.KeyGroups, group)
	}
	for i := range r.Used {
		for w := range r.Used[i] {
			r.Used[i][w] = policy.Window{Signatures: math.MaxInt64, Amount: math.MaxInt64, AmountE8: math.MaxInt64}
		}
	}
	_, b := p.Decided(math.MaxUint64, math.MinInt64, r, [16]byte{})
	return b
}

// TestRecordIsBounded makes the largest records: for texts of the largest document with each kind
// of character, in each field, and for a policy with many deciding rules and a long fault.
func TestRecordIsBounded(t *testing.T) {
	var rules strings.Builder
	for i := range 500 {
		id := fmt.Sprintf("%03d%s", i, strings.Repeat(`\"`, 61))
		fmt.Fprintf(&rules, "@id(\"%s\") forbid (principal, action, resource);\n", id)
	}
	broken := `@id("broken") forbid (principal, action, resource) when { ` +
		strings.Repeat(`context.size + 9223372036854775807 > 0 || `, 200) + `false };`
	most := 0
	for name, rules := range map[string]string{"no rule": "", "many rules": rules.String() + broken} {
		p := parse(t, rules)
		for _, text := range []string{
			"<", ">", "&", "\"", "\\", "\u2028", "\u00e9", "\U0001f600", "\x7f", "x", "\n", "\x01",
		} {
			for _, length := range []int{1, policy.MaxText, policy.MaxText + 1, 65_000} {
				full := strings.Repeat(text, length/len(text)+1)
				for _, fields := range [][]string{{"endpoint", "http_path"}, {"message_context", "method"}} {
					b := longest(t, p, full, fields...)
					most = max(most, len(b))
					if len(b) > policy.MaxRecord {
						t.Errorf("%s, %d times %q in %s: a record of %d bytes", name, length, text, fields, len(b))
					}
					rec, err := policy.ParseRecord(b)
					if err != nil {
						t.Fatalf("%s: %v", b, err)
					}
					if err := p.Replay(rec); err != nil {
						t.Errorf("%s, %d times %q: %v", name, length, text, err)
					}
				}
			}
		}
	}
	t.Logf("the largest record has %d bytes, of at most %d", most, policy.MaxRecord)
}

// TestTextIsNotEscaped sees that a text of MaxText bytes is recorded as it is, and that no
// character but quote, backslash and control characters is escaped.
func TestTextIsNotEscaped(t *testing.T) {
	text := strings.Repeat("<>&\u2028\u2029\u00e9", policy.MaxText/11)
	b := longest(t, parse(t, ""), text, "message_context")
	if !strings.Contains(string(b), `"message_context":"`+text+`"`) {
		t.Errorf("%s", b)
	}
}

// TestWithheldText sees that a record with a long text is replayed as far as no rule reads the
// text, that a rule that reads the text needs it, and that only the recorded text is taken.
func TestWithheldText(t *testing.T) {
	const long = "https://pay.example/"
	endpoint := long + strings.Repeat("<", 60_000)
	reads := `permit (principal, action, resource)
when { context has endpoint && context.endpoint like "` + long + `*" };`
	for name, c := range map[string]struct {
		rules         string
		needs, allows bool
	}{
		"not read":       {`permit (principal, action, resource) when { context.size == 100 };`, false, true},
		"read":           {reads, true, true},
		"read, denied":   {strings.Replace(reads, "https", "http", 1), true, false},
		"by an escape":   {`permit (principal, action, resource) when { context has "end\u{70}oint" };`, true, true},
		"nothing at all": {``, false, false},
	} {
		p := parse(t, c.rules)
		d, b := p.Decided(1, 2, ask(t, "shop", "sign", "payments", map[string]any{"endpoint": endpoint}), [16]byte{})
		if d.Allowed != c.allows {
			t.Errorf("%s: %+v", name, d)
		}
		rec, err := policy.ParseRecord(b)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Replay(rec); errors.Is(err, policy.ErrWithheld) != c.needs || !c.needs && err != nil {
			t.Errorf("%s: replayed without the text: %v", name, err)
		}
		for _, other := range []string{"", long, endpoint[1:], endpoint + "<", strings.Replace(endpoint, "p", "q", 1)} {
			if _, err := rec.WithText("endpoint", other); err == nil {
				t.Errorf("%s: a text of %d bytes is taken", name, len(other))
			}
		}
		if _, err := rec.WithText("transcript", "message-v1"); err == nil {
			t.Errorf("%s: a text is taken that the record has", name)
		}
		full, err := rec.WithText("endpoint", endpoint)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Replay(full); err != nil {
			t.Errorf("%s: replayed with the text: %v", name, err)
		}
		if full.Allowed = !full.Allowed; !errors.Is(p.Replay(full), policy.ErrReplay) {
			t.Errorf("%s: another decision is not noticed", name)
		}
		if string(ijson.Encode(rec)) != string(b) {
			t.Errorf("%s: WithText has changed the record", name)
		}
	}
}
