package wire_test

import (
	"errors"
	"reflect"
	"strings"
	"testing"

	"countersign/wire"
)

func TestParseLineAndAck(t *testing.T) {
	_, r, err := wire.Parse([]byte(`{"id":"1","op":"line","key":"payments","from":1}`), 100)
	if line, is := r.(*wire.Line); err != nil || !is || line.Key != "payments" || line.From != 1 {
		t.Errorf("%#v, %v", r, err)
	}
	_, r, err = wire.Parse([]byte(`{"id":"1","op":"rotation.ack","key":"noise","version":4294967295,"change":7}`), 100)
	if ack, is := r.(*wire.Ack); err != nil || !is || ack.Key != wire.NoiseKey || ack.Version != 1<<32-1 ||
		ack.Change != 7 {
		t.Errorf("%#v, %v", r, err)
	}
	for _, bad := range []string{
		`"op":"line","key":"payments"`,
		`"op":"line","from":1`,
		`"op":"line","key":"payments","from":0`,
		`"op":"line","key":"payments","from":-1`,
		`"op":"line","key":"payments","from":4294967296`,
		`"op":"line","key":"payments","from":null`,
		`"op":"line","key":"payments","from":"1"`,
		`"op":"line","key":"payments","from":1.0`,
		`"op":"line","key":"payments","from":1,"version":1`,
		`"op":"rotation.ack","key":"payments"`,
		`"op":"rotation.ack","version":2`,
		`"op":"rotation.ack","key":"payments","version":0`,
		`"op":"rotation.ack","key":null,"version":2`,
		`"op":"rotation.ack","key":"payments","version":2,"from":1`,
		`"op":"rotation.ack","key":"payments","version":2,"change":-1`,
		`"op":"compromise.ack","key":"payments","version":2,"change":1`,
	} {
		id, r, err := wire.Parse([]byte(`{"id":"1",`+bad+`}`), 100)
		var refusal *wire.Error
		if !errors.As(err, &refusal) || refusal.Code != wire.CodeMalformed || id != "1" || r != nil {
			t.Errorf("%s: %#v, %v", bad, r, err)
		}
	}
}

// event returns a rotation with all fields set, and with pairs of changes: old text, new text.
func event(changes ...string) string {
	s := `{"event":"rotation","key":"payments","version":2,"public_key":"` + nonce + `",` +
		`"activates_at":1,"retires_at":2,"change":4294967295,"cancelled":3,` +
		`"succession":{"payload":{"key":"payments"},"nonce":"` + nonce + `",` +
		`"timestamp":3,"expires_at":4,"signature":"AA"},` +
		`"authorization":{"payload":{"owner":""},"signature":"AQ"}}`
	for i := 0; i < len(changes); i += 2 {
		s = strings.Replace(s, changes[i], changes[i+1], 1)
	}
	return s
}

func TestDecodeRotation(t *testing.T) {
	var key wire.Bytes32
	for i := range key {
		key[i] = 42
	}
	want := wire.Rotation{
		Event: wire.EventRotation, Key: "payments", Version: 2, PublicKey: key,
		ActivatesAt: 1, RetiresAt: 2, Change: 1<<32 - 1, Cancelled: 3,
		Succession: &wire.Succession{
			Payload: []byte(`{"key":"payments"}`), Nonce: key, Timestamp: 3, ExpiresAt: 4, Signature: wire.Bytes{0},
		},
		Authorization: &wire.Authorization{Payload: []byte(`{"owner":""}`), Signature: wire.Bytes{1}},
	}
	_, r, err := wire.DecodeMessage([]byte(event()))
	if err != nil || !reflect.DeepEqual(r, &want) {
		t.Errorf("%+v, %v", r, err)
	}
	if b := wire.EncodeRotation(want); string(b) != event() {
		t.Errorf("%s", b)
	}
	want.Change, want.Cancelled = 0, 0
	want.Succession, want.Authorization, want.Event = nil, nil, ""
	b := wire.EncodeRotation(want)
	short := `{"event":"rotation","key":"payments","version":2,"public_key":"` + nonce +
		`","activates_at":1,"retires_at":2}`
	if string(b) != short {
		t.Errorf("%s", b)
	}
	want.Event = wire.EventRotation
	if _, r, err := wire.DecodeMessage(b); err != nil || !reflect.DeepEqual(r, &want) {
		t.Errorf("%+v, %v", r, err)
	}
	a, r, err := wire.DecodeMessage([]byte(`{"id":"7","result":{"valid":true,"event":1}}`))
	if err != nil || r != nil || a.ID != "7" {
		t.Errorf("an answer: %+v, %+v, %v", a, r, err)
	}
}

// compromise returns a compromise, and with pairs of changes: old text, new text.
func compromise(changes ...string) string {
	s := `{"event":"compromise","key":"payments","version":2,"public_key":"` + nonce + `"}`
	return strings.NewReplacer(changes...).Replace(s)
}

func TestDecodeCompromise(t *testing.T) {
	want := wire.Compromise{Event: wire.EventCompromise, Key: "payments", Version: 2}
	for i := range want.PublicKey {
		want.PublicKey[i] = 42
	}
	_, event, err := wire.DecodeMessage([]byte(compromise()))
	if err != nil || !reflect.DeepEqual(event, &want) {
		t.Errorf("%+v, %v", event, err)
	}
	if b := wire.EncodeCompromise(want); string(b) != compromise() {
		t.Errorf("%s", b)
	}
	_, r, err := wire.Parse([]byte(`{"id":"1","op":"compromise.ack","key":"noise","version":2}`), 100)
	ack := wire.Ack{ID: "1", Op: "compromise.ack", Key: "noise", Version: 2}
	if got, is := r.(*wire.Ack); err != nil || !is || *got != ack {
		t.Errorf("%#v, %v", r, err)
	}
}

// TestDecodeMessageRefuses sees that a malformed rotation is refused as malformed and not ignored
// as an unknown event.
func TestDecodeMessageRefuses(t *testing.T) {
	for name, bad := range map[string]string{
		"empty":                                ``,
		"an array":                             `[]`,
		"neither":                              `{}`,
		"an answer and more":                   `{"id":"1","result":{},"more":1}`,
		"event null":                           event(`"rotation"`, `null`),
		"event a number":                       event(`"rotation"`, `1`),
		"event empty":                          event(`"rotation"`, `""`),
		"an event and an answer":               event(`"key"`, `"id":"1","key"`),
		"an unknown field":                     event(`"key"`, `"extra":1,"key"`),
		"a field twice":                        event(`"key"`, `"version":2,"key"`),
		"no key":                               event(`"key":"payments",`, ``),
		"key empty":                            event(`"payments"`, `""`),
		"key too long":                         event(`"payments"`, `"`+strings.Repeat("k", 65)+`"`),
		"no version":                           event(`"version":2,`, ``),
		"version 0":                            event(`"version":2`, `"version":0`),
		"version null":                         event(`"version":2`, `"version":null`),
		"no public key":                        event(`"public_key":"`+nonce+`",`, ``),
		"a short public key":                   event(nonce, nonce[1:]),
		"no activates_at":                      event(`"activates_at":1,`, ``),
		"a negative time":                      event(`"activates_at":1`, `"activates_at":-1`),
		"a time after the year 9999":           event(`"retires_at":2`, `"retires_at":253402300800`),
		"cancelled another version":            event(`"cancelled":3`, `"cancelled":2`),
		"a change that is too high":            event(`"change":4294967295`, `"change":4294967296`),
		"a succession without nonce":           event(`"nonce":"`+nonce+`",`, ``),
		"a succession with payload null":       event(`{"key":"payments"}`, `null`),
		"a succession with an unknown field":   event(`"timestamp":3`, `"timestamp":3,"x":1`),
		"an authorization without a signature": event(`,"signature":"AQ"`, ``),
		"an authorization without a payload":   event(`"payload":{"owner":""},`, ``),
		"a compromise without a key":           compromise(`"key":"payments",`, ``),
		"a compromise of an empty key":         compromise(`payments`, ``),
		"a compromise of version 0":            compromise(`:2,`, `:0,`),
		"a compromise without a public key":    compromise(`,"public_key":"`+nonce+`"`, ``),
		"a compromise with an unknown field":   compromise(`"key"`, `"x":1,"key"`),
	} {
		a, r, err := wire.DecodeMessage([]byte(bad))
		if err == nil || errors.Is(err, wire.ErrUnknownEvent) || r != nil || a.ID != "" {
			t.Errorf("%s: %+v, %+v, %v", name, a, r, err)
		}
	}
	for _, later := range []string{
		`{"event":"locked"}`, `{"event":"rotation-v2","key":7,"x":{"y":[]}}`, event(`"rotation"`, `"Rotation"`),
	} {
		if _, r, err := wire.DecodeMessage([]byte(later)); !errors.Is(err, wire.ErrUnknownEvent) || r != nil {
			t.Errorf("%s: %+v, %v", later, r, err)
		}
	}
	_, _, err := wire.DecodeMessage([]byte(`{"event":"locked","event":"locked"}`))
	if err == nil || errors.Is(err, wire.ErrUnknownEvent) {
		t.Errorf("an unknown event that is not I-JSON: %v", err)
	}
}

// FuzzDecodeMessage sees that a message is one of answer, event, unknown event and error, and that
// an event is the same after it is encoded and decoded again.
func FuzzDecodeMessage(f *testing.F) {
	f.Add([]byte(event()))
	f.Add([]byte(compromise()))
	f.Add([]byte(`{"event":"locked"}`))
	f.Add([]byte(`{"id":"1","result":{"key":"payments","steps":[],"more":false}}`))
	f.Add([]byte(`{"id":"1","error":{"code":"busy","message":"later","retry_after":1}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, event, err := wire.DecodeMessage(b)
		var again []byte
		switch e := event.(type) {
		case *wire.Rotation:
			if again = wire.EncodeRotation(*e); e.Version == 0 || e.Key == "" {
				t.Fatalf("%+v", e)
			}
		case *wire.Compromise:
			if again = wire.EncodeCompromise(*e); e.Version == 0 || e.Key == "" {
				t.Fatalf("%+v", e)
			}
		}
		switch {
		case err != nil && (event != nil || a.ID != "" || a.Error != nil || a.Result != nil):
			t.Fatalf("%+v, %+v and %v", a, event, err)
		case err != nil:
		case event == nil && (a.Error == nil) == (a.Result == nil):
			t.Fatalf("%+v", a)
		case event != nil:
			_, second, err := wire.DecodeMessage(again)
			if err != nil || !reflect.DeepEqual(event, second) {
				t.Fatalf("%+v, again %+v, %v", event, second, err)
			}
		}
	})
}
