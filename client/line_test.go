package client_test

import (
	"crypto/sha256"
	"errors"
	"strings"
	"testing"

	"countersign/client"
	"countersign/client/clienttest"
	"countersign/transcript"
	"countersign/wire"
)

// lineAt is a line as somebody pins it.
func lineAt(l *clienttest.Line, version uint32) client.Line {
	return client.Line{Key: l.Key, Version: version, PublicKey: l.Public(version), Next: l.Next(version)}
}

func TestFollow(t *testing.T) {
	l := clienttest.NewLine("payments", 4)
	steps := []wire.Succession{l.Step(2), l.Step(3), l.Step(4)}
	for from := range uint32(4) {
		got, err := lineAt(l, from+1).Follow(steps[from:]...)
		if err != nil || got != lineAt(l, 4) {
			t.Errorf("from version %d: %+v, %v", from+1, got, err)
		}
	}
	unknown := lineAt(l, 1)
	unknown.Next = [32]byte{}
	if got, err := unknown.Follow(steps...); err != nil || got != lineAt(l, 4) {
		t.Errorf("without a commitment: %+v, %v", got, err)
	}
	last := clienttest.Step(l.Private[0], l.Key, 2, l.Public(2), nil)
	if got, err := lineAt(l, 1).Follow(last); err != nil || got != (client.Line{Key: l.Key, Version: 2, PublicKey: l.Public(2)}) {
		t.Errorf("a step that commits to nothing: %+v, %v", got, err)
	}
	if got, err := client.VerifyLine(lineAt(l, 1), steps); err != nil || got != lineAt(l, 4) {
		t.Errorf("the whole line: %+v, %v", got, err)
	}
	if _, err := client.VerifyLine(lineAt(l, 2), steps[1:]); !errors.Is(err, client.ErrBrokenLine) {
		t.Errorf("a line that does not begin at its first version: %v", err)
	}
	if got, err := lineAt(l, 2).Follow(); err != nil || got != lineAt(l, 2) {
		t.Errorf("no steps: %+v, %v", got, err)
	}
}

func TestFollowRefuses(t *testing.T) {
	l, thief, other := clienttest.NewLine("payments", 5), clienttest.NewLine("thief", 5), clienttest.NewLine("receipts", 5)
	next := l.Next(2)
	edited := func(edit func(*wire.Succession)) wire.Succession { s := l.Step(2); edit(&s); return s }
	for name, c := range map[string]struct {
		steps []wire.Succession
		why   string
	}{
		"a thief's key, signed by the old key": {[]wire.Succession{clienttest.Step(l.Private[0], l.Key, 2, thief.Public(1), &next)}, "committed"},
		"signed by the new key":                {[]wire.Succession{clienttest.Sign(l.Private[1], l.Step(2))}, "signature"},
		"a spoilt signature":                   {[]wire.Succession{edited(func(s *wire.Succession) { s.Signature[5] ^= 1 })}, "signature"},
		"no signature":                         {[]wire.Succession{edited(func(s *wire.Succession) { s.Signature = nil })}, "signature"},
		"another nonce":                        {[]wire.Succession{edited(func(s *wire.Succession) { s.Nonce[0] ^= 1 })}, "signature"},
		"another time":                         {[]wire.Succession{edited(func(s *wire.Succession) { s.Timestamp++ })}, "signature"},
		"another line's step":                  {[]wire.Succession{other.Step(2)}, `"receipts"`},
		"a version left out":                   {[]wire.Succession{l.Step(3)}, "version 3"},
		"the same step twice":                  {[]wire.Succession{l.Step(2), l.Step(2)}, "version 2"},
		"the wrong order":                      {[]wire.Succession{l.Step(3), l.Step(2)}, "version 3"},
		"another version's number":             {[]wire.Succession{clienttest.Step(l.Private[0], l.Key, 3, l.Public(2), &next)}, "version 3"},
		"from another key":                     {[]wire.Succession{clienttest.Step(thief.Private[0], l.Key, 2, l.Public(2), &next)}, "another public key"},
		"no document":                          {[]wire.Succession{edited(func(s *wire.Succession) { s.Payload = nil })}, "payload"},
		"a field too many": {[]wire.Succession{edited(func(s *wire.Succession) {
			s.Payload = []byte(strings.Replace(string(s.Payload), "{", `{"x":1,`, 1))
		})}, "unknown"},
		"a good step, then a thief's":             {[]wire.Succession{l.Step(2), clienttest.Step(l.Private[1], l.Key, 3, thief.Public(1), nil)}, "version 2"},
		"a step whose commitment the next breaks": {[]wire.Succession{clienttest.Step(l.Private[0], l.Key, 2, l.Public(2), new(wire.Bytes32{9})), l.Step(3)}, "committed"},
	} {
		got, err := lineAt(l, 1).Follow(c.steps...)
		if !errors.Is(err, client.ErrBrokenLine) || got != (client.Line{}) || !strings.Contains(err.Error(), c.why) || !strings.Contains(err.Error(), `"payments": from version `) {
			t.Errorf("%s: %+v, %v, want %q", name, got, err, c.why)
		}
	}
	last := lineAt(l, 1)
	last.Version = 1<<32 - 1
	if _, err := last.Follow(l.Step(2)); !errors.Is(err, client.ErrBrokenLine) {
		t.Errorf("after the last version: %v", err)
	}
}

func TestLineForm(t *testing.T) {
	l := clienttest.NewLine("payments", 2)
	whole, bare := lineAt(l, 1), lineAt(l, 2)
	bare.Next = [32]byte{}
	for _, want := range []client.Line{whole, bare} {
		b, err := want.Encode()
		if err != nil || strings.Contains(string(b), "next") != (want.Next != [32]byte{}) {
			t.Fatalf("%s, %v", b, err)
		}
		if got, err := client.DecodeLine(b); err != nil || got != want {
			t.Errorf("%s: %+v, %v", b, got, err)
		}
		for _, bad := range []string{
			``, `{}`, `[]`, string(b) + "x", strings.Replace(string(b), `"payments"`, `""`, 1), strings.Replace(string(b), `"payments"`, `"noise"`, 1),
			strings.Replace(string(b), `"version":`, `"version":0,"x":`, 1), strings.Replace(string(b), `"version":`, `"version":-`, 1),
			strings.Replace(string(b), `"public_key":"`, `"public_key":"A`, 1), strings.Replace(string(b), `"key"`, `"Key"`, 1),
		} {
			if got, err := client.DecodeLine([]byte(bad)); err == nil {
				t.Errorf("%s is read as %+v", bad, got)
			}
		}
	}
	zero := whole
	zero.PublicKey = [32]byte{}
	b, err := zero.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.DecodeLine(b); err == nil {
		t.Error("a key of small order is pinned")
	}
}

// FuzzFollow: nobody without the private keys leads a line anywhere but to its own versions.
func FuzzFollow(f *testing.F) {
	l := clienttest.NewLine("payments", 3)
	for v := uint32(2); v <= 3; v++ {
		s := l.Step(v)
		f.Add([]byte(s.Payload), s.Nonce[:], s.Timestamp, s.ExpiresAt, []byte(s.Signature))
		s.Payload = []byte(strings.ReplaceAll(string(s.Payload), `,"`, ` , "`))
		f.Add([]byte(s.Payload), s.Nonce[:], s.Timestamp, s.ExpiresAt, []byte(s.Signature))
	}
	f.Fuzz(func(t *testing.T, payload, nonce []byte, timestamp, expiresAt int64, signature []byte) {
		s := wire.Succession{Payload: payload, Timestamp: timestamp, ExpiresAt: expiresAt, Signature: signature}
		copy(s.Nonce[:], nonce)
		for v := uint32(1); v <= 2; v++ {
			at := lineAt(l, v)
			got, err := at.Follow(s)
			if err != nil {
				if !errors.Is(err, client.ErrBrokenLine) || got != (client.Line{}) {
					t.Fatalf("%+v, %v", got, err)
				}
				continue
			}
			if got != lineAt(l, v+1) || sha256.Sum256(got.PublicKey[:]) != at.Next {
				t.Fatalf("%s leads to %+v", payload, got)
			}
			if doc, err := transcript.Parse(transcript.Request{Type: "key-succession-v1", Payload: payload, Nonce: s.Nonce, Timestamp: timestamp, ExpiresAt: expiresAt}); err != nil || doc.Succession.Version != v+1 {
				t.Fatal(err)
			}
		}
	})
}
