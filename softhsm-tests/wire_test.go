package softhsmtests

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"countersign/client"
	"countersign/noise"
)

// connect makes a Noise connection of the peer demo, over which a test sends JSON documents without
// the SDK.
func (s *system) connect() *noise.Conn {
	s.t.Helper()
	c := s.clientConfig()
	raw, err := net.Dial("tcp", s.listen)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { raw.Close() })
	ctx, cancel := context.WithTimeout(s.t.Context(), 10*time.Second)
	defer cancel()
	conn, err := noise.Connect(ctx, raw, c.Identity, noise.CountersignV1, c.ServerKey, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	return conn
}

// roundTrip sends one document and returns the answer's id and code.
func roundTrip(t *testing.T, conn *noise.Conn, document string) (id, code string) {
	t.Helper()
	if err := conn.WriteMessage([]byte(document)); err != nil {
		t.Fatal(err)
	}
	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	b, err := conn.ReadMessage()
	if err != nil {
		t.Fatalf("%.80s: no answer: %v", document, err)
	}
	var a struct {
		ID    string
		Error *struct{ Code, Message string }
	}
	if err := json.Unmarshal(b, &a); err != nil {
		t.Fatalf("%s: %v", b, err)
	}
	if a.Error == nil {
		return a.ID, "ok"
	}
	return a.ID, a.Error.Code
}

// signDocument returns a sign request in JSON with a random nonce. changes are pairs of an old and
// a new part of the text.
func signDocument(changes ...string) string {
	nonce := make([]byte, 32)
	rand.Read(nonce)
	now := time.Now().Unix()
	s := fmt.Sprintf(`{"id":"1","op":"sign","key":"payments","type":"message-v1",`+
		`"payload":{"context":"c","message":"AA"},"nonce":"%s","timestamp":%d,"expires_at":%d}`,
		base64.RawURLEncoding.EncodeToString(nonce), now, now+60)
	for i := 0; i < len(changes); i += 2 {
		if !strings.Contains(s, changes[i]) {
			panic("not in the document: " + changes[i])
		}
		s = strings.Replace(s, changes[i], changes[i+1], 1)
	}
	return s
}

// TestRubbish sends invalid documents and invalid frames. A document gets an error code, and the
// connection stays open. A frame closes the connection, without a byte as an answer. The daemon
// keeps serving.
func TestRubbish(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	conn := s.connect()
	zeros := func(n int) string { return base64.RawURLEncoding.EncodeToString(make([]byte, n)) }
	for _, c := range []struct{ doc, id, code string }{
		{`{"id":"a","op":"ping"}`, "a", "ok"},
		{`{"id":"a","op":"keys"}`, "a", "ok"},
		{signDocument(), "1", "ok"},
		{"", "", "malformed"},
		{"\x00\xff\xfe", "", "malformed"},
		{"{", "", "malformed"},
		{strings.Repeat("[", 60000), "", "malformed"},
		{strings.Repeat(`{"a":`, 10000), "", "malformed"},
		{signDocument(`"id":"1"`, `"id":"1","id":"2"`), "", "malformed"},
		{signDocument(`"op"`, `"extra":1,"op"`), "1", "malformed"},
		{signDocument(`"payments"`, `["payments"]`), "1", "malformed"},
		{signDocument(`"sign"`, `"destroy"`), "1", "unsupported"},
		{signDocument(`"payments"`, `"nothing"`), "1", "unknown_key"},
		{signDocument(`"payments"`, `"noise"`), "1", "unknown_key"},
		{signDocument(`"payments"`, `"`+strings.Repeat("k", 60000)+`"`), "1", "unknown_key"},
		{signDocument(`"message-v1"`, `"message-v9"`), "1", "unsupported"},
		{signDocument(`"c"`, `"\ud800"`), "", "malformed"},
		{signDocument(`"AA"`, `"A"`), "1", "malformed"},
		{signDocument(`"timestamp":`, `"timestamp":9999999999999999999999`), "1", "malformed"},
		{signDocument(`"nonce":"`, `"nonce":"AA`), "1", "malformed"},
		{`{"id":"1","op":"verify","type":"message-v1","payload":{"context":"c","message":"AA"},` +
			`"nonce":"` + zeros(32) + `","timestamp":1,"expires_at":2,` +
			`"signature":"` + zeros(64) + `","public_key":"` + zeros(32) + `"}`, "1", "invalid_signature"},
	} {
		if id, code := roundTrip(t, conn, c.doc); id != c.id || code != c.code {
			t.Errorf("%.80q: id %q, %s; want id %q, %s", c.doc, id, code, c.id, c.code)
		}
	}

	for name, sent := range map[string][]byte{
		"nothing":                  {},
		"half a header":            {0, 0},
		"an HTTP request":          []byte("GET / HTTP/1.1\r\nHost: countersign\r\n\r\n"),
		"a TLS hello":              {0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3},
		"the longest frame":        append(binary.BigEndian.AppendUint32(nil, 65535), make([]byte, 65535)...),
		"a frame of 4 GiB":         binary.BigEndian.AppendUint32(nil, 1<<32-1),
		"garbage in the handshake": append(binary.BigEndian.AppendUint32(nil, 96), make([]byte, 96)...),
	} {
		raw, err := net.Dial("tcp", s.listen)
		if err != nil {
			t.Fatal(err)
		}
		raw.Write(sent)
		raw.(*net.TCPConn).CloseWrite()
		raw.SetReadDeadline(time.Now().Add(20 * time.Second))
		answer, err := io.ReadAll(raw)
		if len(answer) > 0 || err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: answered %d bytes, %v", name, len(answer), err)
		}
		raw.Close()
	}
	if _, code := roundTrip(t, conn, signDocument()); code != "ok" {
		t.Errorf("a valid document after the invalid frames: %s", code)
	}
	p.stop()
}

// TestPipelining sends 200 requests without waiting for answers. Each request gets one answer, in
// any order.
func TestPipelining(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	conn := s.connect()
	const n = 200
	go func() {
		for i := range n {
			conn.WriteMessage([]byte(signDocument(`"id":"1"`, fmt.Sprintf(`"id":"r%d"`, i))))
		}
	}()
	seen := map[string]bool{}
	for range n {
		conn.SetReadDeadline(time.Now().Add(30 * time.Second))
		b, err := conn.ReadMessage()
		if err != nil {
			t.Fatal(err)
		}
		var a struct {
			ID     string
			Result *struct{ Signature string }
		}
		if err := json.Unmarshal(b, &a); err != nil || a.Result == nil || seen[a.ID] {
			t.Fatalf("%s: %v", b, err)
		}
		seen[a.ID] = true
	}
	p.stop()
}

// TestStopFinishesWhatWasAdmitted sends SIGTERM under load. Each admission has its outcome in the
// log afterwards, and the last event before the next start is Stopped.
func TestStopFinishesWhatWasAdmitted(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	answered := make(chan uint64, 100_000)
	for range 4 {
		c := s.dial()
		for range 8 {
			wg.Go(func() {
				for ctx.Err() == nil {
					signed, err := c.Sign(ctx, "payments", message("AAAA"))
					if err != nil {
						return
					}
					answered <- signed.Event
				}
			})
		}
	}
	for range 200 {
		<-answered
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	if got := p.notified(); got != "STOPPING=1" {
		t.Errorf("notified %q", got)
	}
	p.stop()
	cancel()
	wg.Wait()
	close(answered)

	p = s.serve()
	ended := map[string]bool{}
	admitted := map[uint64]bool{}
	events := s.events()
	for i, e := range events {
		switch e.Type {
		case "SignatureAdmitted":
			admitted[e.Index] = true
		case "SignatureCreated":
			ended[e.Metadata["admission"]] = true
		case "Stopped":
			if i+1 == len(events) || events[i+1].Type != "Started" { // the test's own sign-in comes later
				t.Errorf("Stopped is event %d of %d, and the next is not Started", i, len(events))
			}
		}
	}
	for index := range admitted {
		if !ended[fmt.Sprint(index)] {
			t.Errorf("admission %d has no outcome", index)
		}
	}
	for index := range answered {
		if !admitted[index] {
			t.Errorf("the answer with event %d has no admission", index)
		}
	}
	p.stop()
}

// TestWatchdog sets systemd's watchdog interval to 60 ms and waits for three keep-alive messages.
func TestWatchdog(t *testing.T) {
	s := newSystem(t)
	p := s.serve("WATCHDOG_USEC=60000")
	for range 3 {
		if got := p.notified(); got != "WATCHDOG=1" {
			t.Errorf("notified %q", got)
		}
	}
	p.stop()
}

// TestTokenPulledOut removes the token of a running daemon. Requests are unavailable within a
// bounded time, and succeed when the token is back, without a restart.
func TestTokenPulledOut(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	c := s.dial()
	d := message("AAAA")
	d.Nonce = [32]byte{1}
	if err := os.Rename(s.path("tokens"), s.path("tokens.away")); err != nil {
		t.Fatal(err)
	}
	d.Timestamp, d.ExpiresAt = time.Now().Unix(), time.Now().Unix()+600
	var refusal *client.Error
	_, err := c.Sign(t.Context(), "payments", d)
	if !errors.As(err, &refusal) || refusal.Code != "unavailable" || strings.Contains(refusal.Message, "C_") {
		t.Errorf("without the token: %v", err)
	}
	if _, err := c.Ping(t.Context()); err != nil {
		t.Errorf("ping without the token: %v", err)
	}
	if err := os.Rename(s.path("tokens.away"), s.path("tokens")); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(30 * time.Second); ; {
		signed, err := c.Sign(t.Context(), "payments", d)
		if err == nil {
			if !signed.Repeated {
				t.Error("the nonce was admitted by the failed request, but the answer is not marked as a repetition")
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("30 s after the token is back: %v", err)
		}
	}
	p.stop()
}

// recordingConn records the bytes that are written to a connection.
type recordingConn struct {
	net.Conn
	sent []byte
}

func (r *recordingConn) Write(p []byte) (int, error) {
	r.sent = append(r.sent, p...)
	return r.Conn.Write(p)
}

// TestReplayedHandshake replays a recorded handshake message 1 of a peer. An attacker can hold
// connections by a replay for the handshake timeout (500 ms here) and no longer, and the daemon
// never takes the attacker for the peer.
func TestReplayedHandshake(t *testing.T) {
	s := newSystem(t)
	s.edit("countersign.toml", "[tokens.main]", `[limits]
connections = 3
strangers = 3
handshakes_per_source = 20
handshake_timeout = "500ms"
[tokens.main]`)
	p := s.serve()
	s.enrol()
	c := s.clientConfig()
	raw, err := net.Dial("tcp", s.listen)
	if err != nil {
		t.Fatal(err)
	}
	recorded := &recordingConn{Conn: raw}
	if _, err := noise.Connect(t.Context(), recorded, c.Identity, noise.CountersignV1, c.ServerKey, nil); err != nil {
		t.Fatal(err)
	}
	raw.Close()
	for range 3 {
		replay, err := net.Dial("tcp", s.listen)
		if err != nil {
			t.Fatal(err)
		}
		defer replay.Close()
		replay.Write(recorded.sent)
	}
	c.RetryFor = 20 * time.Second
	peer, err := client.New(c)
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	if _, err := peer.Ping(t.Context()); err != nil {
		t.Errorf("the peer is shut out: %v", err)
	}
	p.stop()
	if n := strings.Count(p.stderr.String(), "msg=connected"); n != 1 {
		t.Errorf("%d connections of the peer in the log, want 1", n)
	}
}

// TestRemovedPeerIsNotServed removes a peer that is sending requests. After the event of the
// removal, no request of the peer is admitted.
func TestRemovedPeerIsNotServed(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	conn := s.connect()
	roundTrip(t, conn, `{"id":"1","op":"ping"}`)
	go func() {
		for conn.WriteMessage([]byte(signDocument())) == nil {
		}
	}()
	for len(s.events()) < 20 {
	}
	s.must("admin", "peer", "remove", "demo")
	p.stop()
	p = s.serve()
	removed := false
	for _, e := range s.events() {
		switch e.Type {
		case "PeerRemoved":
			removed = true
		case "SignatureAdmitted":
			if removed {
				t.Fatal("a request of the removed peer was admitted")
			}
		}
	}
	if !removed {
		t.Error("no event of the removal")
	}
	p.stop()
}
