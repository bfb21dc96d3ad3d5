package softhsmtests

import (
	"context"
	"crypto/ed25519"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"countersign/noise"
	"countersign/wire"
)

// servePubky configures a second listener, for clients of pubky-noise.
func (s *system) servePubky() (address string) {
	s.t.Helper()
	address = newFolder(s.t).listen
	s.edit("countersign.toml", "admin_socket", fmt.Sprintf("listen_pubky = %q\nadmin_socket", address))
	return address
}

// connectAs makes the handshake of a client of a profile. A non-nil identity is proven in the
// payload of the handshake.
func (s *system) connectAs(address string, profile noise.Profile, identity ed25519.PrivateKey) (*noise.Conn, error) {
	s.t.Helper()
	c := s.clientConfig()
	var payload []byte
	if identity != nil {
		var err error
		if payload, err = noise.PubkyIdentity(identity, c.Identity.Public(), c.ServerKey, "", time.Time{}); err != nil {
			s.t.Fatal(err)
		}
	}
	raw, err := net.Dial("tcp", address)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { raw.Close() })
	ctx, cancel := context.WithTimeout(s.t.Context(), 20*time.Second)
	defer cancel()
	return noise.Connect(ctx, raw, c.Identity, profile, c.ServerKey, payload)
}

// TestBothProfiles has a client of pubky-noise sign, and a client of countersign-v1 at the same
// time. The log has the identity that the pubky client has proven. Each listener refuses a client
// of the other profile.
func TestBothProfiles(t *testing.T) {
	s := newSystem(t)
	pubky := s.servePubky()
	p := s.serve()
	s.enrol()
	_, identity, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := s.connectAs(pubky, noise.PubkyV1, identity)
	if err != nil {
		t.Fatal(err)
	}
	plain := s.connect()
	for range 3 {
		if _, code := roundTrip(t, conn, signDocument()); code != "ok" {
			t.Errorf("over pubky-noise-v1: %s", code)
		}
		if _, code := roundTrip(t, plain, signDocument()); code != "ok" {
			t.Errorf("over countersign-v1: %s", code)
		}
	}
	if _, err := s.connectAs(pubky, noise.CountersignV1, nil); !errors.Is(err, noise.ErrHandshake) {
		t.Errorf("countersign-v1 at the listener of pubky-noise-v1: %v", err)
	}
	if _, err := s.connectAs(s.listen, noise.PubkyV1, identity); !errors.Is(err, noise.ErrHandshake) {
		t.Errorf("pubky-noise-v1 at the listener of countersign-v1: %v", err)
	}
	want := hex.EncodeToString(identity.Public().(ed25519.PublicKey))
	seen := map[string]int{}
	for _, e := range s.events() {
		if e.Type == "SignatureAdmitted" {
			if e.Actor.Name != "demo" || e.Actor.Identity != "" && e.Actor.Identity != want {
				t.Errorf("the actor is %+v", e.Actor)
			}
			seen[e.Actor.Identity]++
		}
	}
	if seen[want] != 3 || seen[""] != 3 {
		t.Errorf("admissions by identity: %v", seen)
	}
	p.stop()
}

// TestBatchOverTheWire sends a batch of 100 items, half of which are invalid. The answers are in
// the order of the items, and a valid item succeeds beside invalid ones.
func TestBatchOverTheWire(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	conn := s.connect()
	item := func(changes ...string) string {
		return signDocument(append([]string{`"id":"1",`, ""}, changes...)...)
	}
	var items []string
	for i := range 100 {
		switch i % 4 {
		case 1:
			items = append(items, item(`"payments"`, `"nothing"`))
		case 2:
			items = append(items, `{"op":"ping"}`)
		default:
			items = append(items, item())
		}
	}
	batch := `{"id":"b","op":"batch","items":[` + strings.Join(items, ",") + `]}`
	if err := conn.WriteMessage([]byte(batch)); err != nil {
		t.Fatal(err)
	}
	conn.SetReadDeadline(time.Now().Add(30 * time.Second))
	b, err := conn.ReadMessage()
	if err != nil {
		t.Fatal(err)
	}
	answer, err := wire.DecodeAnswer(b)
	if err != nil {
		t.Fatal(err)
	}
	var all wire.Answers
	if err := answer.Into(&all); err != nil || len(all.Answers) != 100 {
		t.Fatalf("%d answers, %v", len(all.Answers), err)
	}
	for i, a := range all.Answers {
		code, want := "", []string{"", "unknown_key", "unsupported", ""}[i%4]
		if a.Error != nil {
			code = a.Error.Code
		}
		if code != want {
			t.Errorf("item %d: %q, want %q", i, code, want)
		}
		if want != "" {
			continue
		}
		var signed wire.Signed
		var asked struct{ Nonce wire.Bytes32 }
		if err := json.Unmarshal([]byte(items[i]), &asked); err != nil {
			t.Fatal(err)
		}
		if err := (wire.Answer{Result: a.Result}).Into(&signed); err != nil || signed.Nonce != asked.Nonce {
			t.Errorf("item %d has the answer of another item: %+v, %v", i, signed, err)
		}
	}
	tooMany := `{"id":"b","op":"batch","items":[` + strings.Repeat(`1,`, 100) + `1]}`
	if _, code := roundTrip(t, conn, tooMany); code != "too_large" {
		t.Errorf("101 items: %s", code)
	}
	p.stop()
}

// TestSuspendClosesConnections suspends a peer with an open connection. The daemon closes the
// connection and refuses handshakes of the peer until the peer is resumed.
func TestSuspendClosesConnections(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	conn := s.connect()
	roundTrip(t, conn, `{"id":"1","op":"ping"}`)
	if out := s.must("admin", "peer", "list"); !strings.Contains(out, "enrolled") {
		t.Errorf("%s", out)
	}
	s.must("admin", "peer", "suspend", "demo")
	conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	var timeout net.Error
	if _, err := conn.ReadMessage(); err == nil || errors.As(err, &timeout) && timeout.Timeout() {
		t.Errorf("the connection is open: %v", err)
	}
	if _, err := s.connectAs(s.listen, noise.CountersignV1, nil); !errors.Is(err, noise.ErrHandshake) {
		t.Errorf("a handshake of the suspended peer: %v", err)
	}
	if out := s.must("admin", "peer", "list"); !strings.Contains(out, "suspended") {
		t.Errorf("%s", out)
	}
	_, errOut, code := s.cli("", "admin", "peer", "resume", "nobody")
	if code == 0 || strings.Contains(errOut, "JSON") {
		t.Errorf("resume nobody: %d, %s", code, errOut)
	}
	s.must("admin", "peer", "resume", "demo")
	if _, code := roundTrip(t, s.connect(), signDocument()); code != "ok" {
		t.Errorf("after resume: %s", code)
	}
	p.stop()
}
