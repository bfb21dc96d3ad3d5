package noise

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"encoding/json"
	"os"
	"strings"
	"testing"
)

// specExchange is a block of docs/SPEC.md, section 1.
type specExchange struct {
	Prologue      Profile
	PeerPrivate   string `json:"peer_private"`
	PeerPublic    string `json:"peer_public"`
	PeerEph       string `json:"peer_ephemeral"`
	ServerPrivate string `json:"server_private"`
	ServerPublic  string `json:"server_public"`
	ServerEph     string `json:"server_ephemeral"`
	Hash          string `json:"handshake_hash"`
	Request       string
	Answer        string
	Frame1        string `json:"frame_1"`
	Frame2        string `json:"frame_2"`
	Frame3        string `json:"frame_3"`
	Frame4        string `json:"frame_4"`

	// Fields of profile pubky-noise-v1.
	IdentitySeed   string `json:"identity_seed"`
	IdentityPublic string `json:"identity_public"`
	Binding        string
	Payload        string
	LegacyBinding  string `json:"legacy_binding"`
	LegacyPayload  string `json:"legacy_payload"`
}

// specRun runs the exchange of a block through Accept and Connect and returns the server's end.
func specRun(t *testing.T, block string) (f specExchange, server *Conn) {
	t.Helper()
	b, err := os.ReadFile("../docs/SPEC.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, found := strings.Cut(string(b), "```json "+block+"\n")
	text, _, _ = strings.Cut(text, "```")
	if err := json.Unmarshal([]byte(text), &f); !found || err != nil {
		t.Fatalf("no exchange in docs/SPEC.md: %v", err)
	}
	for private, public := range map[string]string{f.PeerPrivate: f.PeerPublic, f.ServerPrivate: f.ServerPublic} {
		id, err := IdentityFrom(unhex(t, private))
		if err != nil {
			t.Fatal(err)
		}
		if p := id.Public(); hex.EncodeToString(p[:]) != public {
			t.Errorf("public key %x, want %s", p, public)
		}
	}
	frame := func(s string) []byte {
		t.Helper()
		b := unhex(t, s)
		if n := len(b) - 4; n < 0 || hex.EncodeToString([]byte{0, 0, byte(n >> 8), byte(n)}) != s[:8] {
			t.Fatalf("a frame of %d bytes with the length %s", n, s[:8])
		}
		return b[4:]
	}
	var payload []byte
	if f.Payload != "" {
		payload = []byte(f.Payload)
	}
	server = vector{
		prologue: string(f.Prologue), initStatic: unhex(t, f.PeerPrivate), initEph: unhex(t, f.PeerEph),
		respStatic: unhex(t, f.ServerPrivate), respEph: unhex(t, f.ServerEph), handshakeHash: unhex(t, f.Hash),
		payloads:    [][]byte{payload, nil, []byte(f.Request), []byte(f.Answer)},
		ciphertexts: [][]byte{frame(f.Frame1), frame(f.Frame2), frame(f.Frame3), frame(f.Frame4)},
		fromInit:    []bool{true, false, true, false},
	}.runThrough(t, f.Prologue)
	return f, server
}

// TestSpecHandshake runs the exchange of profile countersign-v1 in docs/SPEC.md.
func TestSpecHandshake(t *testing.T) {
	f, server := specRun(t, "noise")
	if _, ok := server.Identity(); ok || f.Prologue != CountersignV1 {
		t.Errorf("prologue %q, identity %t", f.Prologue, ok)
	}
}

// TestSpecPubkyHandshake runs the exchange of profile pubky-noise-v1 in docs/SPEC.md, with both
// generations of the identity payload.
func TestSpecPubkyHandshake(t *testing.T) {
	f, server := specRun(t, "noise-pubky")
	key := ed25519.NewKeyFromSeed(unhex(t, f.IdentitySeed))
	public := key.Public().(ed25519.PublicKey)
	if id, ok := server.Identity(); !ok || string(id[:]) != string(public) ||
		hex.EncodeToString(public) != f.IdentityPublic || f.Prologue != PubkyV1 {
		t.Errorf("prologue %q, identity %x of key %x", f.Prologue, id, public)
	}
	peerKey, serverKey := private(t, unhex(t, f.PeerPrivate)), private(t, unhex(t, f.ServerPrivate))
	local, remote := [32]byte(unhex(t, f.PeerPublic)), [32]byte(unhex(t, f.ServerPublic))
	for payload, binding := range map[string]string{f.Payload: f.Binding, f.LegacyPayload: f.LegacyBinding} {
		p, err := parseIdentity([]byte(payload))
		if err != nil {
			t.Fatal(err)
		}
		b := p.binding(local, remote)
		if hex.EncodeToString(b[:]) != binding || p.legacy() != (payload == f.LegacyPayload) ||
			!bytes.Equal(p.signed(t, key, local, remote), []byte(payload)) {
			t.Errorf("%s\nbinds %x, legacy %t", payload, b, p.legacy())
		}
		m := framed(message1(t, peerKey, PubkyV1, remote, []byte(payload)))
		if k := acceptBytes(serverKey, PubkyV1, m, nil, true); k.err != nil {
			t.Error(k.err)
		}
	}
}
