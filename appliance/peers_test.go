package appliance

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode"

	"countersign/audit"
	"countersign/internal/manage"
	"countersign/noise"
)

// TestKeepOut: the connections of a suspended or removed peer are closed at once, and the act is on
// disk, also while its requests are with a device that hangs. Nothing of the peer is admitted after
// the event of the act, and each admission from before has failed. Other peers are served all the
// while.
func TestKeepOut(t *testing.T) {
	for name, c := range map[string]struct {
		act  func(*edge) error
		says audit.Type
	}{
		"suspended": {
			func(e *edge) error { return e.Peers.Suspend(t.Context(), operator, "shop") },
			audit.PeerSuspended,
		},
		"removed": {
			func(e *edge) error { return e.Peers.Remove(t.Context(), operator, "shop") },
			audit.PeerRemoved,
		},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEdge(t, func(l *Limits) { l.Calls, l.RequestTimeout = map[string]int{"memory": 64}, time.Hour })
			entered, release := e.heldDevice()
			var sessions [3]*noise.Conn
			for i := range sessions {
				sessions[i] = e.session("127.0.0.1", e.shop)
			}
			idle, busy, batch := sessions[0], sessions[1], sessions[2]
			for n := range 5 {
				busy.WriteMessage([]byte(request(n, "m")))
			}
			var items []any
			for n := range 20 {
				items = append(items, numbered(100+n, "m"))
			}
			batch.WriteMessage([]byte(batchOf(items...)))
			eventually(t, "all are in the device", func() bool { return entered.Load() == 25 })
			unused, err := e.shake("127.0.0.1", e.shop)
			if err != nil {
				t.Fatal(err)
			}
			defer unused.Close()
			before := len(logOf(t, e.Appliance, 1))
			if err := c.act(e); err != nil {
				t.Fatal(err)
			}
			ends(t, idle)
			ends(t, busy)
			ends(t, batch)
			e.staysOut("127.0.0.1", e.shop)
			if _, err := exchange(unused, ping); err == nil {
				t.Error("a handshake from before the act is served")
			}
			cafe := e.session("127.0.0.2", e.cafe)
			answers(t, cafe, ping, "")
			release()
			e.restart()
			events := logOf(t, e.Appliance, 1)[before:]
			for of, want := range map[audit.Type]int{
				c.says: 1, audit.SignatureAdmitted: 0, audit.SignatureCreated: 0, audit.SignatureFailed: 25,
			} {
				if got := countOf(events, of); got != want {
					t.Errorf("%d events %s, want %d", got, of, want)
				}
			}
			e.staysOut("127.0.0.1", e.shop)
			if name == "removed" {
				return
			}
			if s := e.status("shop"); !s.Suspended || s.Connections != 0 || s.Seen.IsZero() {
				t.Errorf("%+v", s)
			}
			if err := e.Peers.Suspend(t.Context(), operator, "shop"); err != nil {
				t.Errorf("a second time: %v", err)
			}
			if err := e.Peers.Resume(t.Context(), operator, "shop"); err != nil {
				t.Fatal(err)
			}
			conn := e.session("127.0.0.1", e.shop)
			answers(t, conn, request(200, "m"), "")
			if s := e.status("shop"); s.Suspended || s.Connections != 1 {
				t.Errorf("%+v", s)
			}
			e.restart()
			e.session("127.0.0.1", e.shop)
			log := logOf(t, e.Appliance, 1)
			if countOf(log, audit.PeerSuspended) != 1 || countOf(log, audit.PeerResumed) != 1 {
				t.Error("an act without an effect is an event")
			}
		})
	}
}

// TestKeyOfAPeerIsRemoved: while requests by a key of a peer are with a device that hangs, the key
// is removed. Its connections end at once, and nothing is signed for them. The connection with
// another key of the same peer goes on. The identical request by the other key is a repetition, and
// gets its signature; the log says which key asked.
func TestKeyOfAPeerIsRemoved(t *testing.T) {
	e := newEdge(t, func(l *Limits) { l.Calls, l.RequestTimeout = map[string]int{"memory": 64}, time.Hour })
	second := newIdentity(t)
	key := second.Public()
	if err := e.Peers.AddKey(t.Context(), operator, "shop", key[:]); err != nil {
		t.Fatal(err)
	}
	entered, release := e.heldDevice()
	stolen, other := e.session("127.0.0.1", e.shop), e.session("127.0.0.1", second)
	for n := range 3 {
		stolen.WriteMessage([]byte(request(n, "m")))
	}
	eventually(t, "all are in the device", func() bool { return entered.Load() == 3 })
	if s := e.status("shop"); len(s.Keys) != 2 || s.Keys[0].Connections != 1 || s.Keys[1].Connections != 1 {
		t.Errorf("%+v", s)
	}
	if err := e.Peers.RemoveKey(t.Context(), operator, "shop", e.shop.Public()); err != nil {
		t.Fatal(err)
	}
	ends(t, stolen)
	e.staysOut("127.0.0.1", e.shop)
	release()
	for n := range 3 {
		answers(t, other, request(n, "m"), "")
	}
	eventually(t, "the log has the outcomes of the removed key's requests", func() bool {
		return countOf(logOf(t, e.Appliance, 1), audit.SignatureFailed) == 3
	})
	e.restart()
	events := logOf(t, e.Appliance, 1)
	for of, want := range map[audit.Type]int{
		audit.PeerKeyAdded: 1, audit.PeerKeyRemoved: 1,
		audit.SignatureAdmitted: 3, audit.SignatureFailed: 3, audit.SignatureCreated: 3,
	} {
		if got := countOf(events, of); got != want {
			t.Errorf("%d events %s, want %d", got, of, want)
		}
	}
	for _, event := range events {
		by := map[audit.Type][32]byte{audit.SignatureAdmitted: e.shop.Public(), audit.SignatureCreated: key}
		if public, judged := by[event.Type]; judged && event.Actor.In("") != audit.Peer("shop", public) {
			t.Errorf("%s by %+v", event.Type, event.Actor)
		}
	}
	e.staysOut("127.0.0.1", e.shop)
	e.session("127.0.0.1", second)
}

// TestKeepOutNobody: acts on an unknown name are refused.
func TestKeepOutNobody(t *testing.T) {
	e := newEdge(t, nil)
	for name, act := range map[string]func() error{
		"suspend": func() error { return e.Peers.Suspend(t.Context(), operator, "nobody") },
		"resume":  func() error { return e.Peers.Resume(t.Context(), operator, "nobody") },
		"remove":  func() error { return e.Peers.Remove(t.Context(), operator, "nobody") },
	} {
		if err := act(); !errors.Is(err, manage.ErrNotFound) {
			t.Errorf("%s nobody: %v, want %v", name, err, manage.ErrNotFound)
		}
	}
}

// TestEnrolledAgain: a removed peer that is enrolled again with the same key is served on new
// connections only.
func TestEnrolledAgain(t *testing.T) {
	e := newEdge(t, nil)
	old := e.session("127.0.0.1", e.shop)
	if err := e.Peers.Remove(t.Context(), operator, "shop"); err != nil {
		t.Fatal(err)
	}
	ends(t, old)
	public := e.shop.Public()
	if _, err := e.Peers.Add(t.Context(), operator, "shop", public[:]); err != nil {
		t.Fatal(err)
	}
	if _, err := exchange(old, ping); err == nil {
		t.Error("the old connection is served")
	}
	answers(t, e.session("127.0.0.1", e.shop), request(1, "m"), "")
}

// TestLastSeen: the time of a peer's last session outlives a restart.
func TestLastSeen(t *testing.T) {
	e := newEdge(t, nil)
	if s := e.status("shop"); !s.Seen.IsZero() || s.Connections != 0 {
		t.Errorf("never seen: %+v", s)
	}
	before := time.Now()
	a, b := e.session("127.0.0.1", e.shop), e.session("127.0.0.1", e.shop)
	if s := e.status("shop"); s.Seen.Before(before) || s.Connections != 2 {
		t.Errorf("%+v", s)
	}
	a.Close()
	eventually(t, "one session has ended", func() bool { return e.status("shop").Connections == 1 })
	b.Close()
	eventually(t, "all sessions have ended", func() bool { return e.status("shop").Connections == 0 })
	e.restart()
	if s := e.status("shop"); s.Seen.Unix() < before.Unix() || s.Connections != 0 {
		t.Errorf("after a restart: %+v", s)
	}
	if s := e.status("cafe"); !s.Seen.IsZero() {
		t.Errorf("another peer: %+v", s)
	}
}

// TestNothingUnescapedInTheLog: the logs have text of peers and strangers as printable text in
// quotes.
func TestNothingUnescapedInTheLog(t *testing.T) {
	e := newEdge(t, func(l *Limits) { l.Handshakes.PerSource = 100 })
	const marker = "marked"
	hostile := []string{
		marker + "\nlevel=ERROR msg=forged",
		marker + "\x1b[2J\x1b]0;x\a",
		marker + "\r\u2028\u202e\u200b\x00\x7f\u0085",
	}
	conn := e.session("127.0.0.1", e.shop)
	for _, h := range hostile {
		quoted := encoded(map[string]string{"": h})
		quoted = quoted[len(`{"":`) : len(quoted)-1]
		replaced := func(document, old, new string) string { return strings.Replace(document, old, new, 1) }
		item := replaced(replaced(request(7, "m"), `"id":"7",`, ""), `"payments"`, quoted)
		nonce := strings.Repeat("A", 43)
		for _, document := range []string{
			h,
			`{"id":` + quoted + `,"op":"ping"}`,
			`{"id":"1","op":` + quoted + `}`,
			`{"id":"1","op":"ping",` + quoted + `:1}`,
			`{"id":"1","op":"ping",` + quoted + `:1,` + quoted + `:2}`,
			replaced(request(1, "m"), `"payments"`, quoted),
			replaced(request(2, "m"), `"message-v1"`, quoted),
			replaced(request(3, "m"), `"test"`, quoted),
			replaced(request(4, "m"), `"context"`, quoted),
			replaced(request(5, "m"), `"nonce":"`, `"nonce":`+quoted+`,"x":"`),
			replaced(request(6, "m"), `"timestamp":`, `"timestamp":`+quoted+`,"x":`),
			batchOf(quoted, `{"op":`+quoted+`}`, `{"op":"sign",`+quoted+`:1}`, item),
			`{"id":"1","op":"verify","key":` + quoted + `,"type":"message-v1","payload":{"context":` + quoted +
				`,"message":"AA"},"nonce":"` + nonce + `","timestamp":1,"expires_at":2,"signature":"` +
				strings.Repeat("A", 86) + `","public_key":"` + nonce + `"}`,
		} {
			if _, err := exchange(conn, document); err != nil {
				t.Fatalf("%q: %v", document, err)
			}
		}
		// Strangers can send frames and identity payloads.
		raw := e.raw("127.0.0.2", noise.CountersignV1)
		raw.Write([]byte(h + h + h + h))
		raw.CloseWrite()
		for _, id := range []*noise.Identity{newIdentity(t), e.shop} {
			_, ed, _ := ed25519.GenerateKey(nil)
			good, err := noise.PubkyIdentity(ed, id.Public(), e.server, "hint", time.Time{})
			if err != nil {
				t.Fatal(err)
			}
			for _, payload := range []string{
				h, `{` + quoted + `:1}`, `{` + quoted + `:1,` + quoted + `:1}`, `{"role":` + quoted + `}`,
				replaced(string(good), `"Client"`, quoted), replaced(string(good), `"hint"`, quoted),
				replaced(string(good), `"role"`, quoted+`:1,"role"`),
			} {
				raw := e.raw("127.0.0.3", noise.PubkyV1)
				if _, err := noise.Connect(t.Context(), raw, id, noise.PubkyV1, e.server, []byte(payload)); err == nil {
					t.Errorf("%q is accepted", payload)
				}
			}
		}
	}
	if _, err := e.Peers.Add(t.Context(), operator, hostile[0], make([]byte, 32)); err == nil {
		t.Error("a peer of that name")
	}
	e.stop()
	text := e.log.String()
	if !strings.Contains(text, marker) {
		t.Fatal("the log has no text of the peer: the test has lost its point")
	}
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if !strings.HasPrefix(line, "time=") {
			t.Errorf("a line that the daemon did not begin: %q", line)
		}
		if i := strings.IndexFunc(line, func(r rune) bool { return !unicode.IsPrint(r) }); i >= 0 {
			t.Errorf("%q at %d of %q", line[i], i, line)
		}
	}
	for _, ev := range logOf(t, e.Appliance, 1) {
		b := string(ev.Encode(time.Now()))
		if strings.ContainsFunc(b, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("an event with unprintable text: %q", b)
		}
	}
}

// TestFloodAfterARestart: the addresses of peers outlive a restart. A flood of strangers after the
// restart can't keep the peers out.
func TestFloodAfterARestart(t *testing.T) {
	e := newEdge(t, func(l *Limits) {
		l.Handshakes.Global, l.Handshakes.Kept, l.Handshakes.PerSource = 8, 2, 2
	})
	conn := e.session("127.0.0.1", e.shop)
	conn.Close()
	e.restart()
	for n := range e.limits.Handshakes.Global {
		raw := e.raw(fmt.Sprintf("127.0.1.%d", n+1), "countersign-v1")
		raw.Write(nonsense)
		closes(t, raw)
	}
	e.staysOut("127.0.2.1", e.cafe)
	e.session("127.0.0.1", e.shop)
}
