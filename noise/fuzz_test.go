package noise

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"io"
	"testing"
	"time"
)

// FuzzFrame checks that a frame is read as written, that every refusal has an error class, and that
// memory for an announced length is bounded.
func FuzzFrame(f *testing.F) {
	f.Add([]byte{}, uint16(minMessage1), uint16(minMessage1))
	f.Add(framed(make([]byte, minMessage1)), uint16(minMessage1), uint16(minMessage1))
	f.Add(framed(make([]byte, minMessage1+maxIdentity+1)), uint16(minMessage1), uint16(minMessage1+maxIdentity))
	f.Add(framed(make([]byte, tagSize), make([]byte, 300), nil), uint16(tagSize), uint16(MaxMessage))
	f.Add([]byte{0, 0, 255, 255, 1}, uint16(tagSize), uint16(MaxMessage))
	f.Add([]byte{0, 1, 0, 0}, uint16(tagSize), uint16(MaxMessage))
	f.Add([]byte{255, 255, 255, 255}, uint16(0), uint16(MaxMessage))
	f.Add([]byte{0, 0, 0}, uint16(0), uint16(0))
	f.Fuzz(func(t *testing.T, said []byte, least, most uint16) {
		c := newConn(&scriptedConn{input: bytes.NewReader(said)})
		for rest := said; ; {
			frame, err := c.readFrame(int(least), int(most))
			if cap(c.frame) > int(most) {
				t.Fatalf("memory for %d bytes where %d is the most", cap(c.frame), most)
			}
			if err != nil {
				n := uint32(0)
				if len(rest) >= 4 {
					n = binary.BigEndian.Uint32(rest)
				}
				possible := n >= uint32(least) && n <= uint32(most)
				switch {
				case err == io.EOF && len(rest) == 0:
				case err == io.ErrUnexpectedEOF && len(rest) > 0 && len(rest) < 4:
				case err == io.ErrUnexpectedEOF && possible && len(rest)-4 < int(n):
				case errors.Is(err, ErrFrame) && len(rest) >= 4 && !possible:
				default:
					t.Fatalf("%v, at %x", err, rest)
				}
				return
			}
			inRange := len(frame) >= int(least) && len(frame) <= int(most)
			if !inRange || !bytes.HasPrefix(rest, framed(frame)) {
				t.Fatalf("%x is read as a frame of %x", rest, frame)
			}
			rest = rest[4+len(frame):]
		}
	})
}

// FuzzHandshake checks that only messages 1 made with the right keys get a response, and only in
// their own profile.
func FuzzHandshake(f *testing.F) {
	type valid struct {
		profile Profile
		message string
	}
	made := map[valid]bool{}
	var server *Identity
	for _, x := range exchanges(f) {
		v := x.vector(f)
		server = private(f, v.respStatic)
		made[valid{PubkyV1, string(v.ciphertexts[0])}] = true
		remote := server.Public()
		initiator, ephemeral := private(f, v.initStatic), bytes.NewReader(v.initEph)
		hs, err := newHandshake(f.Context(), initiator, CountersignV1, remote[:], ephemeral)
		if err != nil {
			f.Fatal(err)
		}
		m, _, _, err := hs.WriteMessage(nil, nil)
		if err != nil {
			f.Fatal(err)
		}
		made[valid{CountersignV1, string(m)}] = true
	}
	for m := range made {
		for _, at := range []int{-1, 0, 31, 32, 63, 64, 79, 80, 95, len(m.message) - 1} {
			b := []byte(m.message)
			if at >= 0 {
				b[at] ^= 0x80
			}
			f.Add(m.profile == PubkyV1, b)
			f.Add(m.profile != PubkyV1, b)
		}
	}
	f.Fuzz(func(t *testing.T, pubky bool, message []byte) {
		profile := CountersignV1
		if pubky {
			profile = PubkyV1
		}
		admitted := 0
		static := &countingKey{Identity: server}
		admit := func(context.Context) error { admitted++; return nil }
		k := acceptBytes(static, profile, framed(message), admit, true)
		possible := len(message) >= minMessage1 && len(message) <= minMessage1+profile.maxPayload()
		switch {
		case made[valid{profile, string(message)}]:
			if k.err != nil || len(k.sent) != 4+minMessage2 || k.asked != 1 {
				t.Fatalf("a sound message: %v, %d bytes sent, asked %d times", k.err, len(k.sent), k.asked)
			}
		case k.err == nil || len(k.sent) != 0 || k.asked != 0 || k.conn != nil:
			t.Fatalf("%x: %v, %d bytes sent, asked %d times", message, k.err, len(k.sent), k.asked)
		case possible && !errors.Is(k.err, ErrHandshake), !possible && !errors.Is(k.err, ErrFrame),
			!possible && static.uses != 0:
			t.Fatalf("a message of %d bytes: %v, key used %d times", len(message), k.err, static.uses)
		}
		if possible != (admitted == 1) || static.uses > 2 {
			t.Fatalf("a message of %d bytes: admit asked %d times, key used %d times",
				len(message), admitted, static.uses)
		}
	})
}

// FuzzIdentity checks that encoding a parsed payload and parsing the result gives the same payload,
// and that checkIdentity accepts only the signatures made here, for the signed payloads.
func FuzzIdentity(f *testing.F) {
	var local, remote [32]byte
	key := testKey(1) // the key of the test vectors
	public := string(key.Public().(ed25519.PublicKey))
	for _, x := range exchanges(f) {
		v := x.vector(f)
		local, remote = private(f, v.initStatic).Public(), private(f, v.respStatic).Public()
		f.Add([]byte(x.Payload))
	}
	full := newPayload(key, local)
	full.Hint, full.HintExpires = ref("shop \u2602 \\\""), ref[int64](lastSecond)
	plain := newPayload(key, local)
	signed := []identityPayload{plain, plain.legacyForm(local), full.legacyForm(local)}
	f.Add(full.signed(f, key, local, remote))
	f.Add(signed[2].signed(f, key, local, remote))
	expired := newPayload(key, local)
	expired.HintExpires = new(int64)
	f.Add(expired.signed(f, key, local, remote))
	f.Add(expired.legacyForm(local).signed(f, key, local, remote))
	f.Add(full.signed(f, key, remote, local))
	f.Add([]byte(`{"ed25519_pub":[],"epoch":0,"noise_x25519_pub":[null],"role":"Client",` +
		`"server_hint":"\u0000","sig":[256]}`))
	now := time.Unix(1_800_000_000, 0)
	f.Fuzz(func(t *testing.T, payload []byte) {
		id, err := checkIdentity(payload, local, remote, now)
		if (err == nil) != (id != nil) || err != nil && !errors.Is(err, ErrIdentity) {
			t.Fatalf("%s: %x, %v", payload, id, err)
		}
		p, malformed := parseIdentity(payload)
		if malformed != nil {
			if err == nil {
				t.Fatalf("%s is taken and can't be read: %v", payload, malformed)
			}
			return
		}
		again := p.encode(t)
		q, errAgain := parseIdentity(again)
		if errAgain != nil || p.binding(local, remote) != q.binding(local, remote) ||
			!bytes.Equal(q.encode(t), again) {
			t.Fatalf("%s is written as %s: %v", payload, again, errAgain)
		}
		if _, errSecond := checkIdentity(again, local, remote, now); (errSecond == nil) != (err == nil) {
			t.Fatalf("%s: %v, and written again: %v", payload, err, errSecond)
		}
		if err != nil {
			return
		}
		message := p.binding(local, remote)
		if string(id[:]) != public || !ed25519.Verify(id[:], message[:], p.Signature) {
			t.Fatalf("%s is taken for %x", payload, id)
		}
		// The fuzzer can't sign, so the message must be one of the signed ones. The message covers
		// a whole legacy payload. The message of v25 does not cover the hint and the hint's expiry.
		for _, p := range signed {
			if p.binding(local, remote) == message {
				return
			}
		}
		t.Fatalf("%s is taken and was never signed", payload)
	})
}
