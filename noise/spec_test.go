package noise

import (
	"encoding/hex"
	"encoding/json"
	"os"
	"strings"
	"testing"
)

// TestSpecHandshake runs the exchange of docs/SPEC.md, section 1.
func TestSpecHandshake(t *testing.T) {
	b, err := os.ReadFile("../docs/SPEC.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, found := strings.Cut(string(b), "```json noise\n")
	text, _, _ = strings.Cut(text, "```")
	var f struct {
		Prologue      string
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
	}
	if err := json.Unmarshal([]byte(text), &f); !found || err != nil {
		t.Fatalf("no exchange in docs/SPEC.md: %v", err)
	}
	if f.Prologue != string(CountersignV1) {
		t.Errorf("prologue %q", f.Prologue)
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
	vector{
		prologue: f.Prologue, initStatic: unhex(t, f.PeerPrivate), initEph: unhex(t, f.PeerEph),
		respStatic: unhex(t, f.ServerPrivate), respEph: unhex(t, f.ServerEph), handshakeHash: unhex(t, f.Hash),
		payloads:    [][]byte{nil, nil, []byte(f.Request), []byte(f.Answer)},
		ciphertexts: [][]byte{frame(f.Frame1), frame(f.Frame2), frame(f.Frame3), frame(f.Frame4)},
		fromInit:    []bool{true, false, true, false},
	}.run(t)
}
