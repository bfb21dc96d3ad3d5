package noise

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	jsonv2 "github.com/go-json-experiment/json"
)

// exchange is an entry of testdata/pubky-noise.json: a handshake and transport messages.
type exchange struct {
	Generation, Prologue, Msg1, Msg2 string
	InitSeed                         string `json:"init_seed"`
	InitStatic                       string `json:"init_static"`
	InitEph                          string `json:"init_ephemeral"`
	RespStatic                       string `json:"resp_static"`
	RespEph                          string `json:"resp_ephemeral"`
	Binding                          string `json:"binding_message"`
	Payload                          string `json:"payload_json"`
	SessionID                        string `json:"session_id"`
	Transport                        []struct{ From, Plaintext, Ciphertext string }
}

func exchanges(t testing.TB) []exchange {
	t.Helper()
	b, err := os.ReadFile("testdata/pubky-noise.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct{ Handshakes []exchange }
	if err := json.Unmarshal(b, &file); err != nil {
		t.Fatal(err)
	}
	if len(file.Handshakes) == 0 {
		t.Fatal("no handshakes in the file")
	}
	return file.Handshakes
}

// vector returns the exchange as a vector.
func (x exchange) vector(t testing.TB) vector {
	v := vector{
		prologue:      x.Prologue,
		initStatic:    unhex(t, x.InitStatic),
		initEph:       unhex(t, x.InitEph),
		respStatic:    unhex(t, x.RespStatic),
		respEph:       unhex(t, x.RespEph),
		handshakeHash: unhex(t, x.SessionID),
		payloads:      [][]byte{[]byte(x.Payload), nil},
		ciphertexts:   [][]byte{unhex(t, x.Msg1), unhex(t, x.Msg2)},
		fromInit:      []bool{true, false},
	}
	for _, m := range x.Transport {
		v.payloads = append(v.payloads, []byte(m.Plaintext))
		v.ciphertexts = append(v.ciphertexts, unhex(t, m.Ciphertext))
		v.fromInit = append(v.fromInit, m.From == "init")
	}
	return v
}

// testKey returns the Ed25519 key with a seed of 32 equal bytes.
func testKey(b byte) ed25519.PrivateKey { return ed25519.NewKeyFromSeed(bytes.Repeat([]byte{b}, 32)) }

// private returns the static key pair of a private key.
func private(t testing.TB, key []byte) *Identity {
	t.Helper()
	id, err := IdentityFrom(key)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// framed returns messages as frames.
func framed(messages ...[]byte) (b []byte) {
	for _, m := range messages {
		b = append(binary.BigEndian.AppendUint32(b, uint32(len(m))), m...)
	}
	return b
}

// runThrough runs an exchange through Accept and Connect, compares every byte and returns the
// responder's end.
func (v vector) runThrough(t *testing.T, profile Profile) *Conn {
	t.Helper()
	v.run(t) // checks the handshake hash, which Accept and Connect don't return
	initID, respID := private(t, v.initStatic), private(t, v.respStatic)
	c, s := pair(t)
	var sent, answered bytes.Buffer
	client, server := newConn(&teeConn{c, &sent}), newConn(&teeConn{s, &answered})
	done := make(chan error, 1)
	go func() {
		enrolled := func(p [32]byte) bool { return p == initID.Public() }
		err := server.accept(t.Context(), []Static{respID}, profile, nil, enrolled, bytes.NewReader(v.respEph))
		if err != nil {
			s.Close()
		}
		done <- err
	}()
	ephemeral := bytes.NewReader(v.initEph)
	if err := client.connect(t.Context(), initID, profile, respID.Public(), v.payloads[0], ephemeral); err != nil {
		t.Fatal(err, <-done)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	var wantSent, wantAnswered []byte
	for i, m := range v.ciphertexts {
		from, to := server, client
		if v.fromInit[i] {
			from, to = client, server
			wantSent = append(wantSent, framed(m)...)
		} else {
			wantAnswered = append(wantAnswered, framed(m)...)
		}
		if i < 2 {
			continue
		}
		if err := from.WriteMessage(v.payloads[i]); err != nil {
			t.Fatal(err)
		}
		if got, err := to.ReadMessage(); err != nil || !bytes.Equal(got, v.payloads[i]) {
			t.Fatalf("message %d: %q, %v", i, got, err)
		}
	}
	if !bytes.Equal(sent.Bytes(), wantSent) {
		t.Errorf("initiator:\n got %x\nwant %x", sent.Bytes(), wantSent)
	}
	if !bytes.Equal(answered.Bytes(), wantAnswered) {
		t.Errorf("responder:\n got %x\nwant %x", answered.Bytes(), wantAnswered)
	}
	if _, ok := client.Identity(); ok {
		t.Error("the responder has an identity")
	}
	return server
}

// TestPubkyVectors runs the exchanges of testdata/pubky-noise.json, and makes their identity
// payloads.
func TestPubkyVectors(t *testing.T) {
	for _, x := range exchanges(t) {
		t.Run(x.Generation, func(t *testing.T) {
			v := x.vector(t)
			server := v.runThrough(t, PubkyV1)
			key := ed25519.NewKeyFromSeed(unhex(t, x.InitSeed))
			if id, ok := server.Identity(); !ok || string(id[:]) != string(key.Public().(ed25519.PublicKey)) {
				t.Errorf("identity %x, %t", id, ok)
			}
			p, err := parseIdentity([]byte(x.Payload))
			if err != nil {
				t.Fatal(err)
			}
			local, remote := private(t, v.initStatic).Public(), private(t, v.respStatic).Public()
			b := p.binding(local, remote)
			if !bytes.Equal(b[:], unhex(t, x.Binding)) || p.legacy() != (x.Generation == "legacy") {
				t.Errorf("binding %x, legacy %t", b, p.legacy())
			}
			made, err := PubkyIdentity(key, local, remote, "", time.Time{})
			if x.Generation == "legacy" {
				made = newPayload(key, local).legacyForm(local).signed(t, key, local, remote)
			}
			if err != nil || string(made) != x.Payload {
				t.Errorf("our own payload is %s, %v", made, err)
			}
		})
	}
}

// newPayload returns a v25 payload without a signature.
func newPayload(key ed25519.PrivateKey, local [32]byte) identityPayload {
	return identityPayload{PublicKey: octets(key.Public().(ed25519.PublicKey)), Role: "Client"}
}

// legacyForm returns a v25 payload as a legacy payload.
func (p identityPayload) legacyForm(local [32]byte) identityPayload {
	p.NoiseKey, p.Epoch, p.Expires, p.HintExpires = local[:], new(uint32), p.HintExpires, nil
	return p
}

// signed returns the JSON of a payload with a valid signature over the payload's binding, even for
// an invalid payload.
func (p identityPayload) signed(t testing.TB, key ed25519.PrivateKey, local, remote [32]byte) []byte {
	t.Helper()
	b := p.binding(local, remote)
	p.Signature = ed25519.Sign(key, b[:])
	return p.encode(t)
}

// encode returns the JSON of a payload.
func (p identityPayload) encode(t testing.TB) []byte {
	t.Helper()
	b, err := jsonv2.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// acceptResult is the result of Accept on given input.
type acceptResult struct {
	conn  *Conn
	err   error
	sent  []byte // the response
	asked int    // number of calls of enrolled
}

// scriptedConn is a connection with given input, which records the output. The peer has closed its
// half.
type scriptedConn struct {
	net.Conn
	input *bytes.Reader
	sent  []byte
}

func (s *scriptedConn) Read(p []byte) (int, error) { return s.input.Read(p) }
func (s *scriptedConn) Write(p []byte) (int, error) {
	s.sent = append(s.sent, p...)
	return len(p), nil
}
func (s *scriptedConn) SetDeadline(time.Time) error      { return nil }
func (s *scriptedConn) SetWriteDeadline(time.Time) error { return nil }

// acceptBytes runs Accept on given input.
func acceptBytes(static Static, profile Profile, input []byte, admit func(context.Context) error, enrolled bool) (
	k acceptResult) {
	s := &scriptedConn{input: bytes.NewReader(input)}
	isEnrolled := func([32]byte) bool { k.asked++; return enrolled }
	k.conn, k.err = Accept(context.Background(), s, []Static{static}, profile, admit, isEnrolled)
	k.sent = s.sent
	return k
}

// message1 returns a message 1 with any payload, including payloads refused by Connect.
func message1(t testing.TB, static *Identity, prologue Profile, server [32]byte, payload []byte) []byte {
	t.Helper()
	hs, err := newHandshake(context.Background(), static, prologue, server[:], nil)
	if err != nil {
		t.Fatal(err)
	}
	m, _, _, err := hs.WriteMessage(nil, payload)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func ref[T any](v T) *T { return &v }

// TestIdentityRefused makes one fault at a time in a valid payload.
func TestIdentityRefused(t *testing.T) {
	me, server := identity(t), identity(t)
	local, remote := me.Public(), server.Public()
	key := testKey(7)
	other := testKey(8)
	stranger := identity(t).Public()
	v25 := newPayload(key, local)
	legacy := v25.legacyForm(local)
	now := time.Now().Unix()
	far := ref(now + 3600)

	sign := func(p identityPayload) []byte { return p.signed(t, key, local, remote) }
	edited := func(p identityPayload, edit func(*identityPayload)) identityPayload { edit(&p); return p }
	with := func(p identityPayload, edit func(*identityPayload)) []byte { return sign(edited(p, edit)) }
	// after edits a payload after its signature.
	after := func(p identityPayload, edit func(*identityPayload)) []byte {
		b := p.binding(local, remote)
		p.Signature = ed25519.Sign(key, b[:])
		edit(&p)
		return p.encode(t)
	}
	text := func(p identityPayload, old, new string) []byte {
		s := string(sign(p))
		if strings.Count(s, old) != 1 {
			t.Fatalf("%q is not once in %s", old, s)
		}
		return []byte(strings.Replace(s, old, new, 1))
	}
	hint := func(s string) func(*identityPayload) { return func(p *identityPayload) { p.Hint = &s } }
	expires := func(at *int64) func(*identityPayload) { return func(p *identityPayload) { p.Expires = at } }
	small := append([]byte{1}, make([]byte, 31)...) // the neutral point

	type payloads map[string][]byte
	good := payloads{
		"v25": sign(v25), "legacy": sign(legacy),
		"v25, hint and expiry":    with(v25, func(p *identityPayload) { p.Hint, p.HintExpires = ref("shop ☂"), far }),
		"legacy, hint and expiry": with(legacy, func(p *identityPayload) { p.Hint, p.Expires = ref("shop ☂"), far }),
		"v25, the longest hint":   with(v25, hint(strings.Repeat("x", maxHint))),
		"v25, no hint at all":     text(v25, `"server_hint":null,`, ``),
		"v25, null expiry":        text(v25, `"server_hint":null`, `"hint_expires_at":null`),
		"legacy, null expiry":     text(legacy, `"server_hint":null`, `"expires_at":null`),
		"v25, the largest":        append(sign(v25), bytes.Repeat([]byte(" "), maxIdentity-len(sign(v25)))...),
		// The v25 signature does not cover the hint: the owner of the static key may change the
		// hint.
		"v25, another hint": after(v25, func(p *identityPayload) { p.Hint, p.HintExpires = ref("elsewhere"), far }),
	}
	bad := payloads{
		"empty": nil, "null": []byte("null"), "object": []byte("{}"), "array": []byte("[]"),
		"request": []byte(`{"id":"1","op":"ping"}`),

		"v25, bit of the signature":    after(v25, func(p *identityPayload) { p.Signature[3] ^= 1 }),
		"legacy, bit of the signature": after(legacy, func(p *identityPayload) { p.Signature[40] ^= 1 }),
		"v25, signed by another":       v25.signed(t, other, local, remote),
		"legacy, signed by another":    legacy.signed(t, other, local, remote),
		"v25, another identity": after(v25, func(p *identityPayload) {
			p.PublicKey = octets(other.Public().(ed25519.PublicKey))
		}),
		"v25, small order": with(v25, func(p *identityPayload) { p.PublicKey = small }),
		"v25, small order, by all": after(v25, func(p *identityPayload) {
			p.PublicKey, p.Signature = small, slices.Concat(small, make([]byte, 32))
		}),

		"v25, for another server":                  v25.signed(t, key, local, stranger),
		"v25, for another client":                  v25.signed(t, key, stranger, remote),
		"v25, the two changed round":               v25.signed(t, key, remote, local),
		"legacy, for another server":               legacy.signed(t, key, local, stranger),
		"legacy, for another client":               legacy.signed(t, key, stranger, remote),
		"legacy, another noise key":                with(legacy, func(p *identityPayload) { p.NoiseKey = stranger[:] }),
		"legacy, another noise key that is signed": v25.legacyForm(stranger).signed(t, key, stranger, remote),

		"v25, binding of legacy": after(legacy, func(p *identityPayload) { p.Epoch, p.NoiseKey = nil, nil }),
		"legacy, binding of v25": after(v25, func(p *identityPayload) { p.Epoch, p.NoiseKey = new(uint32), local[:] }),

		"v25, server":         with(v25, func(p *identityPayload) { p.Role = "Server" }),
		"legacy, server":      with(legacy, func(p *identityPayload) { p.Role = "Server" }),
		"v25, role in small":  with(v25, func(p *identityPayload) { p.Role = "client" }),
		"v25, no role":        text(v25, `"role":"Client",`, ``),
		"v25, expired":        with(v25, func(p *identityPayload) { p.HintExpires = ref(now - 1) }),
		"legacy, expired":     with(legacy, func(p *identityPayload) { p.Expires = ref(now - 1) }),
		"legacy, longer life": after(edited(legacy, expires(ref(now-1))), expires(far)),
		"legacy, no end":      after(edited(legacy, expires(far)), expires(nil)),
		"legacy, other hint":  after(edited(legacy, hint("a")), hint("b")),
		"v25, end of legacy":  with(v25, func(p *identityPayload) { p.Expires = far }),
		"legacy, end of v25":  with(legacy, func(p *identityPayload) { p.HintExpires = far }),
		"v25, null of legacy": text(v25, `"server_hint":null`, `"expires_at":null`),
		"v25, year 10000":     with(v25, func(p *identityPayload) { p.HintExpires = ref[int64](lastSecond + 1) }),
		"legacy, year 10000":  with(legacy, func(p *identityPayload) { p.Expires = ref[int64](lastSecond + 1) }),
		"v25, before 1970":    with(v25, func(p *identityPayload) { p.HintExpires = ref[int64](-1) }),
		"v25, half a second":  text(v25, `"server_hint":null`, `"hint_expires_at":4000000000.5`),
		"v25, beyond 64 bits": text(v25, `"server_hint":null`, `"hint_expires_at":18446744073709551616`),

		"v25, long hint":           with(v25, hint(strings.Repeat("x", maxHint+1))),
		"legacy, long hint":        with(legacy, hint(strings.Repeat("☂", maxHint/3+1))),
		"v25, hint of two lines":   with(v25, hint("a\nb")),
		"legacy, hint with a zero": with(legacy, hint("a\x00")),
		"v25, hint with C1":        with(v25, hint("a\u0085b")),
		"v25, hint is a number":    text(v25, `"server_hint":null`, `"server_hint":7`),

		"legacy, epoch 1":         with(legacy, func(p *identityPayload) { p.Epoch = ref[uint32](1) }),
		"legacy, null epoch":      text(legacy, `"epoch":0`, `"epoch":null`),
		"legacy, no epoch":        text(legacy, `"epoch":0,`, ``),
		"v25 with an epoch":       text(v25, `"role"`, `"epoch":0,"role"`),
		"v25 with a null epoch":   text(v25, `"role"`, `"epoch":null,"role"`),
		"v25 with a null key":     text(v25, `"role"`, `"noise_x25519_pub":null,"role"`),
		"legacy, short noise key": with(legacy, func(p *identityPayload) { p.NoiseKey = p.NoiseKey[:31] }),
		"legacy, no noise key":    with(legacy, func(p *identityPayload) { p.NoiseKey = nil }),

		"v25, unknown field":    text(v25, `"role"`, `"extra":1,"role"`),
		"v25, other case":       text(v25, `"role"`, `"Role"`),
		"v25, duplicate":        text(v25, `"role"`, `"role":"Server","role"`),
		"v25, equal duplicate":  text(v25, `"role"`, `"role":"Client","role"`),
		"legacy, unknown field": text(legacy, `"role"`, `"extra":null,"role"`),
		"legacy, duplicate":     text(legacy, `"epoch":0`, `"epoch":0,"epoch":0`),
		"v25, two documents":    append(sign(v25), "{}"...),
		"v25, byte order mark":  append([]byte("\ufeff"), sign(v25)...),
		"v25, cut off":          sign(v25)[:100],
		"v25, not UTF-8":        text(v25, `"server_hint":null`, "\"server_hint\":\"\xff\""),
		"v25, noncharacter":     text(v25, `"server_hint":null`, "\"server_hint\":\"\uffff\""),

		"v25, number 256":     text(v25, `"ed25519_pub":[`, `"ed25519_pub":[256,`),
		"v25, 33 numbers":     text(v25, `"ed25519_pub":[`, `"ed25519_pub":[0,`),
		"v25, 65 numbers":     text(v25, `"sig":[`, `"sig":[0,`),
		"v25, no numbers":     text(v25, `"ed25519_pub":[`, `"ed25519_pub":[],"x":[`),
		"v25, 31 numbers":     after(v25, func(p *identityPayload) { p.PublicKey = p.PublicKey[1:] }),
		"v25, 63 numbers":     after(v25, func(p *identityPayload) { p.Signature = p.Signature[1:] }),
		"v25, text for bytes": text(v25, `"sig":[`, `"sig":"AA","x":[`),
		"v25, null key":       after(v25, func(p *identityPayload) { p.PublicKey = nil }),
	}
	for name, payload := range good {
		k := acceptBytes(server, PubkyV1, framed(message1(t, me, PubkyV1, remote, payload)), nil, true)
		if k.err != nil || len(k.sent) != 4+minMessage2 {
			t.Errorf("%s: %v, %d bytes sent\n%s", name, k.err, len(k.sent), payload)
		} else if id, ok := k.conn.Identity(); !ok || string(id[:]) != string(key.Public().(ed25519.PublicKey)) {
			t.Errorf("%s: identity %x, %t", name, id, ok)
		}
	}
	for name, payload := range bad {
		m := framed(message1(t, me, PubkyV1, remote, payload))
		k := acceptBytes(server, PubkyV1, m, nil, true)
		if !errors.Is(k.err, ErrIdentity) || !errors.Is(k.err, ErrHandshake) || k.conn != nil ||
			len(k.sent) != 0 || k.asked != 1 {
			t.Errorf("%s: %v, %d bytes sent, asked %d times\n%s", name, k.err, len(k.sent), k.asked, payload)
		}
		if k := acceptBytes(server, PubkyV1, m, nil, false); k.err != ErrNotEnrolled || len(k.sent) != 0 {
			t.Errorf("%s, of a stranger: %v, %d bytes sent", name, k.err, len(k.sent))
		}
	}
	for name, payload := range good {
		m := framed(message1(t, me, PubkyV1, remote, payload))
		if k := acceptBytes(server, PubkyV1, m, nil, false); k.err != ErrNotEnrolled || len(k.sent) != 0 {
			t.Errorf("%s, of a stranger: %v, %d bytes sent", name, k.err, len(k.sent))
		}
	}
}

// TestExpiryIsTheLastSecond checks that a payload is valid during the second of its expiry.
func TestExpiryIsTheLastSecond(t *testing.T) {
	local, remote := identity(t).Public(), identity(t).Public()
	key := testKey(7)
	v25 := newPayload(key, local)
	v25.HintExpires = ref[int64](2_000_000_000)
	for _, p := range []identityPayload{v25, v25.legacyForm(local)} {
		b := p.signed(t, key, local, remote)
		if _, err := checkIdentity(b, local, remote, time.Unix(2_000_000_000, 999_999_999)); err != nil {
			t.Error(err)
		}
		id, err := checkIdentity(b, local, remote, time.Unix(2_000_000_001, 0))
		if !errors.Is(err, ErrIdentity) || id != nil {
			t.Errorf("%x, %v", id, err)
		}
	}
}

// TestOctets reads arrays of numbers, valid and invalid ones.
func TestOctets(t *testing.T) {
	var o octets
	if err := o.UnmarshalJSON([]byte("[0, 1,255]")); err != nil || !bytes.Equal(o, []byte{0, 1, 255}) {
		t.Errorf("%v, %v", o, err)
	}
	for _, text := range []string{
		"[null]", "[-0]", "[0.0]", "[0e0]", "[00]", `["0"]`, "[[0]]", "[256]", "[-1]", "[true]", "[0,]",
		`"AA"`, "{}", "0",
	} {
		if err := o.UnmarshalJSON([]byte(text)); err != errNumbers {
			t.Errorf("%s is read as %v, %v", text, o, err)
		}
	}
}

// TestPubkyIdentityRefuses makes payloads with invalid arguments, and with a signer that signs
// another message.
func TestPubkyIdentityRefuses(t *testing.T) {
	static, server := identity(t).Public(), identity(t).Public()
	key := testKey(7)
	for _, hint := range []string{strings.Repeat("x", maxHint+1), "a\tb", "\xff"} {
		if b, err := PubkyIdentity(key, static, server, hint, time.Time{}); err == nil {
			t.Errorf("hint %q: %s", hint, b)
		}
	}
	if b, err := PubkyIdentity(key, static, server, "", time.Now().Add(-time.Minute)); !errors.Is(err, ErrIdentity) {
		t.Errorf("expired: %s, %v", b, err)
	}
	if b, err := PubkyIdentity(wrongSigner{key}, static, server, "", time.Time{}); !errors.Is(err, ErrIdentity) {
		t.Errorf("a signer that signs something else: %s, %v", b, err)
	}
	b, err := PubkyIdentity(key, static, server, strings.Repeat("\\", maxHint), time.Now().Add(time.Hour))
	if err != nil || len(b) > maxIdentity {
		t.Errorf("the longest: %d bytes, %v", len(b), err)
	}
}

// wrongSigner signs another message than the given one.
type wrongSigner struct{ ed25519.PrivateKey }

func (l wrongSigner) Sign(random io.Reader, message []byte, o crypto.SignerOpts) ([]byte, error) {
	return l.PrivateKey.Sign(random, append([]byte("x"), message...), o)
}

// TestProfilesDoNotMix checks that each profile refuses the other profile's message 1.
func TestProfilesDoNotMix(t *testing.T) {
	me, server := identity(t), identity(t)
	remote := server.Public()
	payload, err := PubkyIdentity(testKey(7), me.Public(), remote, "", time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	oversize := append(bytes.Clone(payload), bytes.Repeat([]byte(" "), maxIdentity+1-len(payload))...)
	for _, c := range []struct {
		name     string
		listener Profile
		message1 []byte
		want     error
	}{
		{"a countersign client at a pubky listener", PubkyV1,
			message1(t, me, CountersignV1, remote, nil), ErrHandshake},
		{"a payload under the other prologue at a pubky listener", PubkyV1,
			message1(t, me, CountersignV1, remote, payload), ErrHandshake},
		{"a payload that is too large", PubkyV1, message1(t, me, PubkyV1, remote, oversize), ErrFrame},
		{"a pubky client at a countersign listener", CountersignV1,
			message1(t, me, PubkyV1, remote, payload), ErrFrame},
		{"the pubky prologue without a payload at a countersign listener", CountersignV1,
			message1(t, me, PubkyV1, remote, nil), ErrHandshake},
		{"a payload at a countersign listener", CountersignV1,
			message1(t, me, CountersignV1, remote, payload), ErrFrame},
		{"one byte at a countersign listener", CountersignV1,
			message1(t, me, CountersignV1, remote, []byte("x")), ErrFrame},
	} {
		k := acceptBytes(server, c.listener, framed(c.message1), nil, true)
		if !errors.Is(k.err, c.want) || errors.Is(k.err, ErrIdentity) || len(k.sent) != 0 || k.asked != 0 {
			t.Errorf("%s: %v, %d bytes sent, asked %d times", c.name, k.err, len(k.sent), k.asked)
		}
	}
	for _, c := range []struct {
		profile Profile
		payload []byte
	}{{CountersignV1, payload}, {PubkyV1, nil}, {PubkyV1, oversize}, {"", nil}, {"countersign-v2", nil}} {
		s := &scriptedConn{input: bytes.NewReader(nil)}
		_, err := Connect(t.Context(), s, me, c.profile, remote, c.payload)
		if err == nil || errors.Is(err, ErrHandshake) || len(s.sent) != 0 {
			t.Errorf("profile %q with %d bytes: %v, %d bytes sent", c.profile, len(c.payload), err, len(s.sent))
		}
	}
	m := framed(message1(t, me, "countersign-v2", remote, nil))
	if k := acceptBytes(server, "countersign-v2", m, nil, true); k.err == nil || len(k.sent) != 0 {
		t.Errorf("an unknown profile: %v", k.err)
	}
}

// TestEveryFlippedByteOfAVector changes each byte of both handshake messages in turn, the length
// included.
func TestEveryFlippedByteOfAVector(t *testing.T) {
	for _, x := range exchanges(t) {
		v := x.vector(t)
		me, server := private(t, v.initStatic), private(t, v.respStatic)
		flight1, flight2 := framed(v.ciphertexts[0]), framed(v.ciphertexts[1])
		if k := acceptBytes(server, PubkyV1, flight1, nil, true); k.err != nil {
			t.Fatal(k.err)
		}
		connect := func(answer []byte) error {
			c := newConn(&scriptedConn{input: bytes.NewReader(answer)})
			return c.connect(t.Context(), me, PubkyV1, server.Public(), v.payloads[0], bytes.NewReader(v.initEph))
		}
		if err := connect(flight2); err != nil {
			t.Fatal(err)
		}
		for _, mask := range []byte{1, 0x80, 0xff} {
			for at := range flight1 {
				b := bytes.Clone(flight1)
				b[at] ^= mask
				k := acceptBytes(server, PubkyV1, b, nil, true)
				if k.err == nil || len(k.sent) != 0 || k.asked != 0 || at >= 4 && !errors.Is(k.err, ErrHandshake) {
					t.Fatalf("%s: message 1, byte %d ^ %#x: %v, %d bytes sent, asked %d times",
						x.Generation, at, mask, k.err, len(k.sent), k.asked)
				}
			}
			for at := range flight2 {
				b := bytes.Clone(flight2)
				b[at] ^= mask
				if err := connect(b); !errors.Is(err, ErrHandshake) && !errors.Is(err, ErrFrame) {
					t.Fatalf("%s: message 2, byte %d ^ %#x: %v", x.Generation, at, mask, err)
				}
			}
		}
	}
}

// countingKey counts the uses of a private key.
type countingKey struct {
	*Identity
	uses int
}

func (c *countingKey) Exchange(ctx context.Context, peer [32]byte) ([32]byte, error) {
	c.uses++
	return c.Identity.Exchange(ctx, peer)
}

// TestAdmit checks that admit is called only for a whole message 1 of a valid length, and before
// the use of the static key.
func TestAdmit(t *testing.T) {
	me, server := identity(t), identity(t)
	remote := server.Public()
	payload, err := PubkyIdentity(testKey(7), me.Public(), remote, "", time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	full := errors.New("too many")
	for profile, payload := range map[Profile][]byte{CountersignV1: nil, PubkyV1: payload} {
		m := framed(message1(t, me, profile, remote, payload))
		static := &countingKey{Identity: server}
		asked := 0
		admit := func(answer error) func(context.Context) error {
			return func(context.Context) error {
				if asked++; static.uses != 0 {
					t.Errorf("%s: the key was used before", profile)
				}
				return answer
			}
		}
		k := acceptBytes(static, profile, m, admit(full), true)
		if !errors.Is(k.err, full) || errors.Is(k.err, ErrHandshake) || asked != 1 || static.uses != 0 ||
			k.asked != 0 || len(k.sent) != 0 {
			t.Errorf("%s: %v, admit asked %d times, key used %d times, %d bytes sent",
				profile, k.err, asked, static.uses, len(k.sent))
		}
		if k := acceptBytes(static, profile, m, admit(nil), true); k.err != nil || asked != 2 || static.uses != 2 {
			t.Errorf("%s: %v, admit asked %d times, key used %d times", profile, k.err, asked, static.uses)
		}
		asked, static.uses = 0, 0
		most := minMessage1 + profile.maxPayload()
		for _, n := range []int{0, 1, minMessage1 - 1, most + 1, MaxMessage} {
			k := acceptBytes(static, profile, framed(make([]byte, n)), admit(nil), true)
			if !errors.Is(k.err, ErrFrame) || len(k.sent) != 0 {
				t.Errorf("%s: a frame of %d bytes: %v", profile, n, k.err)
			}
		}
		for n := range m {
			k := acceptBytes(static, profile, m[:n], admit(nil), true)
			if !errors.Is(k.err, io.EOF) && !errors.Is(k.err, io.ErrUnexpectedEOF) || len(k.sent) != 0 {
				t.Errorf("%s: the first %d bytes: %v", profile, n, k.err)
			}
		}
		if asked != 0 || static.uses != 0 {
			t.Errorf("%s: admit asked %d times, key used %d times without a message 1", profile, asked, static.uses)
		}
	}
}
