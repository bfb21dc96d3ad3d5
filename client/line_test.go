package client_test

import (
	"bytes"
	"crypto"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"countersign/client"
	"countersign/client/clienttest"
	"countersign/transcript"
	"countersign/wire"
)

// lineAt is a line pinned at a version.
func lineAt(l *clienttest.KeyLine, version uint32) client.KeyLine {
	return client.KeyLine{Key: l.Key, Version: version, PublicKey: l.Public(version), Next: l.Next(version)}
}

func TestFollow(t *testing.T) {
	l := clienttest.NewKeyLine("payments", 4)
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
	uncommitted := client.KeyLine{Key: l.Key, Version: 2, PublicKey: l.Public(2)}
	if got, err := lineAt(l, 1).Follow(last); err != nil || got != uncommitted {
		t.Errorf("a step that commits to nothing: %+v, %v", got, err)
	}
	if got, err := client.VerifyKeyLine(lineAt(l, 1), steps); err != nil || got != lineAt(l, 4) {
		t.Errorf("the whole line: %+v, %v", got, err)
	}
	if _, err := client.VerifyKeyLine(lineAt(l, 2), steps[1:]); !errors.Is(err, client.ErrBrokenLine) {
		t.Errorf("a line that does not begin at its first version: %v", err)
	}
	if got, err := lineAt(l, 2).Follow(); err != nil || got != lineAt(l, 2) {
		t.Errorf("no steps: %+v, %v", got, err)
	}
}

func TestFollowRefuses(t *testing.T) {
	l := clienttest.NewKeyLine("payments", 5)
	thief, other := clienttest.NewKeyLine("thief", 5), clienttest.NewKeyLine("receipts", 5)
	next := l.Next(2)
	edited := func(edit func(*wire.Succession)) wire.Succession { s := l.Step(2); edit(&s); return s }
	toThief := clienttest.Step(l.Private[0], l.Key, 2, thief.Public(1), &next)
	otherNumber := clienttest.Step(l.Private[0], l.Key, 3, l.Public(2), &next)
	fromThief := clienttest.Step(thief.Private[0], l.Key, 2, l.Public(2), &next)
	toThiefLater := clienttest.Step(l.Private[1], l.Key, 3, thief.Public(1), nil)
	otherCommitment := clienttest.Step(l.Private[0], l.Key, 2, l.Public(2), new(wire.Bytes32{9}))
	spoilt := edited(func(s *wire.Succession) { s.Signature[5] ^= 1 })
	unsigned := edited(func(s *wire.Succession) { s.Signature = nil })
	otherNonce := edited(func(s *wire.Succession) { s.Nonce[0] ^= 1 })
	otherTime := edited(func(s *wire.Succession) { s.Timestamp++ })
	one := func(s wire.Succession) []wire.Succession { return []wire.Succession{s} }
	for name, c := range map[string]struct {
		steps []wire.Succession
		why   string
	}{
		"a thief's key, signed by the old key": {one(toThief), "committed"},
		"signed by the new key":                {one(clienttest.Sign(l.Private[1], l.Step(2))), "signature"},
		"a spoilt signature":                   {one(spoilt), "signature"},
		"no signature":                         {one(unsigned), "signature"},
		"another nonce":                        {one(otherNonce), "signature"},
		"another time":                         {one(otherTime), "signature"},
		"another line's step":                  {one(other.Step(2)), `"receipts"`},
		"a version left out":                   {one(l.Step(3)), "version 3"},
		"the same step twice":                  {[]wire.Succession{l.Step(2), l.Step(2)}, "version 2"},
		"the wrong order":                      {[]wire.Succession{l.Step(3), l.Step(2)}, "version 3"},
		"another version's number":             {one(otherNumber), "version 3"},
		"from another key":                     {one(fromThief), "another public key"},
		"no document":                          {one(edited(func(s *wire.Succession) { s.Payload = nil })), "payload"},
		"a field too many": {one(edited(func(s *wire.Succession) {
			s.Payload = json.RawMessage(strings.Replace(string(s.Payload), "{", `{"x":1,`, 1))
		})), "unknown"},
		"a good step, then a thief's":             {[]wire.Succession{l.Step(2), toThiefLater}, "version 2"},
		"a step whose commitment the next breaks": {[]wire.Succession{otherCommitment, l.Step(3)}, "committed"},
	} {
		got, err := lineAt(l, 1).Follow(c.steps...)
		if !errors.Is(err, client.ErrBrokenLine) || got != (client.KeyLine{}) {
			t.Errorf("%s: %+v, %v", name, got, err)
			continue
		}
		for _, want := range []string{c.why, `"payments": from version `} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want %q", name, err, want)
			}
		}
	}
	last := lineAt(l, 1)
	last.Version = 1<<32 - 1
	if _, err := last.Follow(l.Step(2)); !errors.Is(err, client.ErrBrokenLine) {
		t.Errorf("after the last version: %v", err)
	}
}

func TestLineForm(t *testing.T) {
	l := clienttest.NewKeyLine("payments", 2)
	whole, bare := lineAt(l, 1), lineAt(l, 2)
	bare.Next = [32]byte{}
	for _, want := range []client.KeyLine{whole, bare} {
		b, err := want.Encode()
		if err != nil || strings.Contains(string(b), "next") != (want.Next != [32]byte{}) {
			t.Fatalf("%s, %v", b, err)
		}
		if got, err := client.DecodeKeyLine(b); err != nil || got != want {
			t.Errorf("%s: %+v, %v", b, got, err)
		}
		changed := func(old, text string) string { return strings.Replace(string(b), old, text, 1) }
		for _, bad := range []string{
			``, `{}`, `[]`, string(b) + "x", changed(`"payments"`, `""`), changed(`"payments"`, `"noise"`),
			changed(`"version":`, `"version":0,"x":`), changed(`"version":`, `"version":-`),
			changed(`"public_key":"`, `"public_key":"A`), changed(`"key"`, `"Key"`),
		} {
			if got, err := client.DecodeKeyLine([]byte(bad)); err == nil {
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
	if _, err := client.DecodeKeyLine(b); err == nil {
		t.Error("a key of small order is pinned")
	}
}

// FuzzFollow checks that no input leads a line anywhere but to its own versions. The fuzzer does
// not have the private keys.
func FuzzFollow(f *testing.F) {
	l := clienttest.NewKeyLine("payments", 3)
	for v := uint32(2); v <= 3; v++ {
		s := l.Step(v)
		f.Add([]byte(s.Payload), s.Nonce[:], s.Timestamp, s.ExpiresAt, []byte(s.Signature))
		s.Payload = json.RawMessage(strings.ReplaceAll(string(s.Payload), `,"`, ` , "`))
		f.Add([]byte(s.Payload), s.Nonce[:], s.Timestamp, s.ExpiresAt, []byte(s.Signature))
	}
	f.Fuzz(func(t *testing.T, payload, nonce []byte, timestamp, expiresAt int64, signature []byte) {
		s := wire.Succession{Payload: payload, Timestamp: timestamp, ExpiresAt: expiresAt, Signature: signature}
		copy(s.Nonce[:], nonce)
		for v := uint32(1); v <= 2; v++ {
			at := lineAt(l, v)
			got, err := at.Follow(s)
			if err != nil {
				if !errors.Is(err, client.ErrBrokenLine) || got != (client.KeyLine{}) {
					t.Fatalf("%+v, %v", got, err)
				}
				continue
			}
			if got != lineAt(l, v+1) || sha256.Sum256(got.PublicKey[:]) != at.Next {
				t.Fatalf("%s leads to %+v", payload, got)
			}
			doc, err := transcript.Parse(transcript.Request{
				Type: "key-succession-v1", Payload: payload, Nonce: s.Nonce, Timestamp: timestamp, ExpiresAt: expiresAt,
			})
			if err != nil || doc.Succession.Version != v+1 {
				t.Fatal(err)
			}
		}
	})
}

// TestAnnouncedVersion: a line that was followed while a rotation is announced knows the active
// version and the announced one, as a file and in a client, and signatures of both are good. A file
// without an announced version reads on.
func TestAnnouncedVersion(t *testing.T) {
	s := serve(t)
	s.Do(func(s *clienttest.Server) { s.Active, s.Shown = 1, 2 })
	ctx := within(t)
	follower, heard := peer(t, s, 1, nil)
	shown, err := follower.Line(ctx, "payments", 1)
	if err != nil {
		t.Fatal(err)
	}
	both := lineAt(s.Line, 1)
	both.Announced = client.Successor{PublicKey: s.Line.Public(2), Next: s.Line.Next(2)}
	followed, err := lineAt(s.Line, 1).Advance(shown)
	if err != nil || followed != both || followed.Newest() != lineAt(s.Line, 2) {
		t.Fatalf("%+v, %v", followed, err)
	}
	if again, err := followed.Advance(shown); err != nil || again != both {
		t.Errorf("followed again: %+v, %v", again, err)
	}
	if kept, err := followed.Advance(wire.Steps{Active: 1}); err != nil || kept != both {
		t.Errorf("the announced version is not shown any more: %+v, %v", kept, err)
	}
	b, err := followed.Encode()
	if err != nil {
		t.Fatal(err)
	}
	read, err := client.DecodeKeyLine(b)
	if err != nil || read != both {
		t.Errorf("%s: %+v, %v", b, read, err)
	}
	event := s.Line.Rotation(2)
	event.ActivatesAt, event.RetiresAt = time.Now().Add(time.Hour).Unix(), time.Now().Add(2*time.Hour).Unix()
	s.Send(wire.EncodeRotation(event))
	heard.next(t)
	if l, _ := follower.Pinned("payments"); l != both {
		t.Errorf("a client that has heard of the rotation is at %+v", l)
	}
	c, _ := peer(t, s, 1, func(config *client.Config) { config.Lines[0] = read })
	for version := uint32(1); version <= 2; version++ {
		s.Do(func(s *clienttest.Server) { s.Active = version })
		for _, c := range []*client.Client{c, follower} {
			if got, err := c.Sign(ctx, "payments", message("AAAA")); err != nil || got.Version != version {
				t.Errorf("version %d signs: %v", version, err)
			}
			want := both
			if version == 2 {
				want = lineAt(s.Line, 2)
			}
			if l, _ := c.Pinned("payments"); l != want {
				t.Errorf("version %d signs, and the client is at %+v", version, l)
			}
		}
	}
	s.Do(func(s *clienttest.Server) { s.Active = 1 })
	if _, err := c.Sign(ctx, "payments", message("AAAB")); err != nil {
		t.Errorf("a late signature of the version before: %v", err)
	}
	thief := clienttest.NewKeyLine("thief", 2)
	for name, bad := range map[string]client.Successor{
		"another key than the committed one": {PublicKey: thief.Public(1)},
		"no key":                             {PublicKey: [32]byte{1}},
		"a commitment alone":                 {Next: [32]byte{1}},
	} {
		l := both
		l.Announced = bad
		b, err := l.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := client.DecodeKeyLine(b); err == nil {
			t.Errorf("%s: %s is read", name, b)
		}
	}
}

// TestSignerAfterARotation: a Signer asks for its version, and gets ErrKeyRotated in place of a
// signature that it would throw away.
func TestSignerAfterARotation(t *testing.T) {
	s := serve(t)
	c, _ := peer(t, s, 0, nil)
	signer, err := c.Signer(within(t), "payments")
	if err != nil {
		t.Fatal(err)
	}
	sign := func(signer *client.Signer) error {
		signature, err := signer.Sign(nil, []byte("hello"), crypto.Hash(0))
		if err == nil && !ed25519.Verify(signer.Public().(ed25519.PublicKey), []byte("hello"), signature) {
			t.Error("the signature does not verify")
		}
		return err
	}
	if err := sign(signer); err != nil {
		t.Error(err)
	}
	s.Do(func(s *clienttest.Server) { s.Active, s.Shown = 2, 2 })
	if err := sign(signer); !errors.Is(err, client.ErrKeyRotated) {
		t.Errorf("%v", err)
	}
	if signer, err = c.Signer(within(t), "payments"); err != nil {
		t.Fatal(err)
	}
	if err := sign(signer); err != nil {
		t.Errorf("a new Signer: %v", err)
	}
}

// recovered is the number of a recovery successor.
const recovered = 1_000_000

// recovery is a recovery successor with its own successor.
type recovery struct{ key, next ed25519.PrivateKey }

func newRecovery(name string) recovery {
	l := clienttest.NewKeyLine(name, 1)
	return recovery{l.Private[0], l.Private[1]}
}

func (r recovery) nextDigest() wire.Bytes32 {
	return sha256.Sum256(r.next.Public().(ed25519.PublicKey))
}

func (r recovery) public() wire.Bytes32 { return wire.Bytes32(r.key.Public().(ed25519.PublicKey)) }

func (r recovery) commitment() wire.Bytes32 {
	return transcript.RecoveryCommitment(recovered, r.public(), r.nextDigest())
}

// with adds members to the payload of a step, and signs the step anew.
func with(signer ed25519.PrivateKey, s wire.Succession, members string) wire.Succession {
	s.Payload = append(bytes.TrimSuffix(bytes.Clone(s.Payload), []byte("}")), ","+members+"}"...)
	return clienttest.Sign(signer, s)
}

// naming is the step of a line to a version, with a commitment to a recovery successor.
func naming(l *clienttest.KeyLine, version uint32, commitment wire.Bytes32) wire.Succession {
	text, _ := commitment.MarshalText()
	return with(l.Private[version-2], l.Step(version), fmt.Sprintf(`"recovery":%q`, text))
}

// to is the step of a line to the recovery successor, as a version.
func (r recovery) to(l *clienttest.KeyLine, version uint32) wire.Succession {
	next := r.nextDigest()
	return with(r.key, clienttest.Step(l.Private[0], l.Key, version, r.public(), &next), `"recovered":true`)
}

// TestRecoveredLine: a line goes on with the recovery successor that it has committed to, whatever
// the last version before was.
func TestRecoveredLine(t *testing.T) {
	l, safe := clienttest.NewKeyLine("payments", 4), newRecovery("safe")
	pin := lineAt(l, 1)
	pin.Recovery = safe.commitment()
	want := client.KeyLine{Key: "payments", Version: recovered, PublicKey: safe.public(), Next: safe.nextDigest()}
	for name, steps := range map[string][]wire.Succession{
		"at once":     {safe.to(l, recovered)},
		"after steps": {l.Step(2), naming(l, 3, safe.commitment()), safe.to(l, recovered)},
	} {
		if got, err := pin.Follow(steps...); err != nil || got != want {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
		shown := wire.Steps{Steps: steps, Active: recovered, Compromised: []uint32{1, 2, 3}}
		if got, err := pin.Advance(shown); err != nil || got != want {
			t.Errorf("%s, compromised: %+v, %v", name, got, err)
		}
	}
	pin.Next = [32]byte{}
	shown := wire.Steps{Steps: []wire.Succession{safe.to(l, recovered)}, Active: recovered, Compromised: []uint32{1}}
	if got, err := pin.Advance(shown); err != nil || got != want {
		t.Errorf("from a compromised version of which only the recovery successor is known: %+v, %v", got, err)
	}
	for _, l := range []client.KeyLine{pin, want, {
		Key: "payments", Version: 1, PublicKey: pin.PublicKey, NewRecovery: safe.commitment(),
		Announced: client.Successor{PublicKey: l.Public(2), NewRecovery: pin.PublicKey, Recovery: safe.commitment()},
	}} {
		b, err := l.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := client.DecodeKeyLine(b); err != nil || got != l {
			t.Errorf("%s is read as %+v, %v", b, got, err)
		}
	}
}

// TestStolenKeyNamesNoRecovery: a thief of the active version's private key names a recovery
// successor of the thief's own. No peer follows the thief, and the line goes on.
func TestStolenKeyNamesNoRecovery(t *testing.T) {
	l, safe, thief := clienttest.NewKeyLine("payments", 4), newRecovery("safe"), newRecovery("thief")
	pin := lineAt(l, 1)
	bare := pin
	pin.Recovery = safe.commitment()
	halfway := bare
	halfway.NewRecovery = safe.commitment()
	for name, from := range map[string]client.KeyLine{
		"with a recovery successor": pin, "without": bare, "named once": halfway,
	} {
		by := func(r recovery, version uint32) wire.Succession { return naming(l, version, r.commitment()) }
		away := thief.to(l, recovered)
		for what, steps := range map[string][]wire.Succession{
			"at once":                 {away},
			"after a step that names": {by(thief, 2), away},
			"after two that differ":   {by(thief, 2), by(safe, 3), away},
			"the other way round":     {by(safe, 2), by(thief, 3), away},
			"with a step between":     {by(thief, 2), l.Step(3), by(thief, 4), away},
		} {
			if got, err := from.Follow(steps...); !errors.Is(err, client.ErrBrokenLine) || got != (client.KeyLine{}) {
				t.Errorf("%s, %s: %+v, %v", name, what, got, err)
			}
		}
		got, err := from.Follow(by(thief, 2), by(safe, 3), by(safe, 4), safe.to(l, recovered))
		if err != nil || got.PublicKey != safe.public() {
			t.Errorf("%s: the line goes on to %+v, %v", name, got, err)
		}
	}
	if got, err := pin.Follow(l.Step(2), l.Step(3), l.Step(4)); err != nil || got.Recovery != pin.Recovery {
		t.Errorf("steps without a commitment have taken it away: %+v, %v", got, err)
	}
}

// TestForgedRecovery: a step to the right recovery successor that is not exactly its own.
func TestForgedRecovery(t *testing.T) {
	l, safe, thief := clienttest.NewKeyLine("payments", 2), newRecovery("safe"), newRecovery("thief")
	pin := lineAt(l, 1)
	pin.Recovery = safe.commitment()
	good := safe.to(l, recovered)
	other := recovery{safe.key, thief.key} // the recovery key alone is stolen
	broken := good
	broken.Signature = bytes.Clone(good.Signature)
	broken.Signature[3]++
	for name, bad := range map[string]wire.Succession{
		"signed by the old version": clienttest.Sign(l.Private[0], good),
		"another successor":         other.to(l, recovered),
		"a broken signature":        broken,
		"another key":               safe.to(clienttest.NewKeyLine("others", 1), recovered),
	} {
		if got, err := pin.Follow(bad); !errors.Is(err, client.ErrBrokenLine) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	if _, err := pin.Follow(good); err != nil {
		t.Error(err)
	}
	pin.Version = recovered
	if got, err := pin.Follow(good); !errors.Is(err, client.ErrBrokenLine) {
		t.Errorf("to the version where the line is: %+v, %v", got, err)
	}
}

// TestThiefOfARecoveredVersion: a thief of the recovered version's private key signs two steps in a
// row: the step to the version, and the step to its successor, whose public key is announced. A
// peer that comes late is led to no recovery successor of the thief's.
func TestThiefOfARecoveredVersion(t *testing.T) {
	l, safe, thief := clienttest.NewKeyLine("payments", 2), newRecovery("safe"), newRecovery("thief")
	pin := lineAt(l, 1)
	pin.Recovery = safe.commitment()
	public, next := wire.Bytes32(safe.next.Public().(ed25519.PublicKey)), l.Next(1)
	text, _ := thief.commitment().MarshalText()
	names := fmt.Sprintf(`"recovery":%q`, text)
	after := with(safe.key, clienttest.Step(safe.key, "payments", recovered+1, public, &next), names)
	got, err := pin.Follow(safe.to(l, recovered), after)
	if err != nil || got.Recovery != [32]byte{} {
		t.Fatalf("%+v, %v", got, err)
	}
	if got, err := got.Follow(thief.to(l, 2*recovered)); !errors.Is(err, client.ErrBrokenLine) {
		t.Errorf("%+v, %v", got, err)
	}
	both := safe.to(l, recovered)
	both.Payload = append(bytes.TrimSuffix(both.Payload, []byte("}")), ","+names+"}"...)
	if got, err := pin.Follow(both); !errors.Is(err, client.ErrBrokenLine) ||
		!strings.Contains(err.Error(), "payload.recovery") {
		t.Errorf("a recovered step names a recovery successor: %+v, %v", got, err)
	}
}

// TestRecoveredNumber: the commitment is to a number, too. A compromised recovery successor gets no
// other number, and an answer that calls an earlier version active gives it none.
func TestRecoveredNumber(t *testing.T) {
	l, safe := clienttest.NewKeyLine("payments", 2), newRecovery("safe")
	pin := lineAt(l, 1)
	pin.Recovery = safe.commitment()
	for _, version := range []uint32{2, recovered - 1, recovered + 1, recovered + 2, 1<<32 - 1} {
		if got, err := pin.Follow(safe.to(l, version)); !errors.Is(err, client.ErrBrokenLine) {
			t.Errorf("as version %d: %+v, %v", version, got, err)
		}
	}
	got, err := pin.Advance(wire.Steps{Steps: []wire.Succession{safe.to(l, recovered)}, Active: 1})
	if err != nil || got.Version != recovered || got.Announced != (client.Successor{}) {
		t.Errorf("%+v, %v", got, err)
	}
}
