package transcript_test

import (
	"bytes"
	"errors"
	"testing"

	"countersign/transcript"
)

// FuzzParse: whatever the payload, Parse refuses it with its class, or gives bytes that depend on nothing but the request.
func FuzzParse(f *testing.F) {
	for _, c := range loadVectors(f).Cases {
		f.Add("paykit-subscription-v2", []byte(c.Subscription))
	}
	f.Add("message-v1", []byte(`{"context":"c","message":"AA"}`))
	f.Add("message-v1", []byte(`{"context":"c","sha256":"LPJNul-wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ"}`))
	f.Add("raw", []byte(`{"message":"AA"}`))
	f.Fuzz(func(t *testing.T, typ string, payload []byte) {
		r := transcript.Request{Type: typ, Payload: payload, Timestamp: 1, ExpiresAt: 2}
		doc, err := transcript.Parse(r)
		if err != nil {
			if !errors.Is(err, transcript.ErrMalformed) && !errors.Is(err, transcript.ErrUnsupported) {
				t.Fatalf("%v has no class", err)
			}
			return
		}
		again, err := transcript.Parse(r)
		if err != nil || !bytes.Equal(again.Canonical, doc.Canonical) || !bytes.Equal(again.Message, doc.Message) {
			t.Fatalf("the second time: %v", err)
		}
	})
}
