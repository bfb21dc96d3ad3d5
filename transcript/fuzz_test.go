package transcript_test

import (
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"countersign/transcript"

	"github.com/go-json-experiment/json/jsontext"
)

// fuzz checks two properties of a type for any payload. A refusal has a class, and a printable text
// of at most 500 bytes. The bytes of an accepted payload depend on its values and not on its
// spelling: the RFC 8785 form of the payload has the same bytes.
func fuzz(f *testing.F, typ string, seeds ...string) {
	for _, v := range vectors(f, typ) {
		seeds = append(seeds, string(v.Payload))
	}
	for _, seed := range seeds {
		f.Add([]byte(seed))
	}
	start := domain(typ, unhex(f, vectors(f, typ)[0].Message))
	f.Fuzz(func(t *testing.T, payload []byte) {
		sent := slices.Clone(payload)
		doc, err := transcript.Parse(transcript.Request{Type: typ, Payload: payload, Timestamp: 1, ExpiresAt: 2})
		if !slices.Equal(payload, sent) {
			t.Fatal("Parse writes to the payload")
		}
		if err != nil {
			if !errors.Is(err, transcript.ErrMalformed) && !errors.Is(err, transcript.ErrUnsupported) {
				t.Fatalf("%v has no class", err)
			}
			unprintable := func(r rune) bool { return !unicode.IsPrint(r) }
			text := err.Error()
			if len(text) > 500 || !utf8.ValidString(text) || strings.ContainsFunc(text, unprintable) {
				t.Fatalf("an error of %d bytes: %.600q", len(text), text)
			}
			return
		}
		if !strings.HasPrefix(string(doc.Message), start) {
			t.Fatalf("%x does not begin with %q", doc.Message, start)
		}
		form := jsontext.Value(sent)
		// RFC 8785 would round integers above 2^53.
		if err := form.Canonicalize(jsontext.CanonicalizeRawInts(false)); err != nil {
			t.Fatal(err)
		}
		again, err := transcript.Parse(transcript.Request{Type: typ, Payload: form, Timestamp: 1, ExpiresAt: 2})
		if err != nil {
			t.Fatalf("%s is taken, its RFC 8785 form is not: %v", payload, err)
		}
		doc.Payload, again.Payload = nil, nil
		if !reflect.DeepEqual(doc, again) {
			t.Fatalf("%s and its RFC 8785 form differ:\n%+v\n%+v", payload, doc, again)
		}
	})
}

func FuzzKeySuccession(f *testing.F)       { fuzz(f, "key-succession-v1") }
func FuzzMessage(f *testing.F)             { fuzz(f, "message-v1") }
func FuzzPaykitHTTPSignature(f *testing.F) { fuzz(f, "paykit-http-signature-v1") }
func FuzzPaykitNoiseKeyAuthorization(f *testing.F) {
	fuzz(f, "paykit-noise-key-authorization-v1")
}
func FuzzPaykitSubscription(f *testing.F) {
	var seeds []string
	for _, c := range loadVectors(f).Cases {
		seeds = append(seeds, string(c.Subscription))
	}
	fuzz(f, "paykit-subscription-v2", seeds...)
}
func FuzzPaymentRequest(f *testing.F) { fuzz(f, "payment-request-v1") }
func FuzzRaw(f *testing.F)            { fuzz(f, "raw") }
func FuzzReceipt(f *testing.F)        { fuzz(f, "receipt-v1") }
