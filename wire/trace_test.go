package wire_test

import (
	"strings"
	"testing"

	"countersign/wire"
)

const traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

// TestTraceparent reads the trace context of each operation, and refuses every other form, in the
// order of W3C Trace Context, section 3.2: version, trace, span, flags.
func TestTraceparent(t *testing.T) {
	for _, op := range []string{
		`"op":"ping"`, `"op":"keys"`, `"op":"proof","event":1`, `"op":"epoch","epoch":1`,
		`"op":"consistency","epoch":1,"from":1,"to":1`, `"op":"line","key":"k","from":1`,
		`"op":"rotation.ack","key":"k","version":1`, `"op":"compromise.ack","key":"k","version":1`,
		`"op":"batch","items":[{"op":"sign"}]`, strings.TrimSuffix(strings.TrimPrefix(sign(), "{"), "}"),
	} {
		document := "{" + op + "}"
		if !strings.Contains(op, `"id"`) {
			document = `{"id":"1",` + op + "}"
		}
		of := func(value string) (wire.Trace, error) {
			_, r, err := wire.Parse([]byte(document[:len(document)-1]+`,"traceparent":`+value+"}"), 100)
			return wire.ContextOf(r), err
		}
		trace, err := of(`"` + traceparent + `"`)
		text, _ := trace.MarshalText()
		if err != nil || string(text) != traceparent || !trace.Sampled {
			t.Errorf("%s: %s, %v", document, text, err)
		}
		if again := wire.WithTrace([]byte(document), trace); !strings.Contains(string(again), traceparent) {
			t.Errorf("%s", again)
		} else if _, r, err := wire.Parse(again, 100); err != nil || wire.ContextOf(r) != trace {
			t.Errorf("%s: %v", again, err)
		}
		if none, err := of("null"); err != nil || none != (wire.Trace{}) {
			t.Errorf("%s: null is %v, %v", document, none, err)
		}
		for _, bad := range []string{
			`""`, `7`, `{}`, `["` + traceparent + `"]`, `"` + traceparent + ` "`, `" ` + traceparent + `"`,
			`"` + strings.Replace(traceparent, "00-", "ff-", 1) + `"`,
			`"` + strings.Replace(traceparent, "00-", "01-", 1) + `"`,
			`"` + strings.ToUpper(traceparent) + `"`, `"` + strings.Replace(traceparent, "0af7", "0ag7", 1) + `"`,
			`"00-00000000000000000000000000000000-b7ad6b7169203331-01"`,
			`"00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01"`,
			`"` + strings.TrimSuffix(traceparent, "1") + `"`, `"` + traceparent + `-00"`,
			`"` + strings.Repeat("0", 60000) + `"`, `"` + strings.ReplaceAll(traceparent, "-", "_") + `"`,
		} {
			if trace, err := of(bad); err == nil {
				t.Errorf("%.80s: %v is a trace context", bad, trace)
			}
		}
	}
	item := `{"id":"1","op":"batch","items":[{"op":"sign","traceparent":"` + traceparent + `"}]}`
	_, r, err := wire.Parse([]byte(item), 100)
	if err != nil {
		t.Fatal(err)
	}
	if refusal, is := r.(*wire.Batch).Items[0].(*wire.Error); !is || !strings.Contains(refusal.Message, "traceparent") {
		t.Errorf("%+v", r.(*wire.Batch).Items[0])
	}
	flags := wire.Trace{ID: [16]byte{1}, Parent: [8]byte{2}}
	text, _ := flags.MarshalText()
	if err := flags.UnmarshalText([]byte(strings.TrimSuffix(string(text), "00") + "fe")); err != nil || flags.Sampled {
		t.Errorf("other flags: %+v, %v", flags, err)
	}
}
