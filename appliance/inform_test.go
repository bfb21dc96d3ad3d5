package appliance

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign/noise"
	"countersign/wire"
)

// hears reads until a rotation comes.
func hears(t *testing.T, conn *noise.Conn) *wire.Rotation {
	t.Helper()
	for {
		conn.SetReadDeadline(time.Now().Add(patience))
		b, err := conn.ReadMessage()
		if err != nil {
			t.Fatalf("no rotation: %v", err)
		}
		if _, r, err := wire.DecodeMessage(b); err != nil {
			t.Fatal(err)
		} else if r != nil {
			return r
		}
	}
}

// asks sends a request and returns its answer, and the rotations that come before it.
func asks(t *testing.T, conn *noise.Conn, document string) (answer wire.Answer, before []*wire.Rotation) {
	t.Helper()
	if err := conn.WriteMessage([]byte(document)); err != nil {
		t.Fatal(err)
	}
	for {
		conn.SetReadDeadline(time.Now().Add(patience))
		b, err := conn.ReadMessage()
		if err != nil {
			t.Fatal(err)
		}
		a, r, err := wire.DecodeMessage(b)
		if err != nil {
			t.Fatal(err)
		}
		if r == nil {
			return a, before
		}
		before = append(before, r)
	}
}

// TestPeersHearOfRotations: those who are connected at once, others at their next connection, each until it has acknowledged it.
func TestPeersHearOfRotations(t *testing.T) {
	e := newEdge(t, nil)
	shop := e.session("127.0.0.1", e.shop)
	at := time.Now().Add(time.Hour)
	if _, err := e.Rotate(t.Context(), operator, "payments", at); err != nil {
		t.Fatal(err)
	}
	r := hears(t, shop)
	if r.Key != "payments" || r.Version != 2 || r.ActivatesAt != at.Unix() || r.RetiresAt <= r.ActivatesAt || r.Succession == nil || r.Compromised {
		t.Errorf("the shop hears %+v", r)
	}
	ack := `{"id":"a","op":"rotation.ack","key":"payments","version":%d}`
	if a, _ := asks(t, shop, fmt.Sprintf(ack, 3)); codeOf(a.Error) != wire.CodeUnknownKey {
		t.Errorf("a rotation that there is not: %+v", a)
	}
	if a, _ := asks(t, shop, fmt.Sprintf(ack, 2)); a.Error != nil {
		t.Errorf("%+v", a)
	}
	if got := e.Unacknowledged("payments", 2); !slices.Equal(got, []string{"cafe"}) {
		t.Errorf("not acknowledged by %v", got)
	}
	for range 2 { // the café comes later, and again after a restart
		cafe, err := e.shake("127.0.0.1", e.cafe)
		if err != nil {
			t.Fatal(err)
		}
		if err := cafe.WriteMessage([]byte(ping)); err != nil {
			t.Fatal(err)
		}
		if r := hears(t, cafe); r.Version != 2 {
			t.Errorf("the café hears %+v", r)
		}
		cafe.Close()
		e.restart()
	}
	// Who has acknowledged hears nothing; the answer to a second request is behind what it would have heard.
	shop = e.session("127.0.0.1", e.shop)
	if _, before := asks(t, shop, ping); len(before) > 0 {
		t.Errorf("the shop hears again: %+v", before)
	}
	a, _ := asks(t, shop, `{"id":"l","op":"line","key":"payments","from":1}`)
	var steps wire.Steps
	if err := a.Into(&steps); err != nil || len(steps.Steps) != 1 || steps.More {
		t.Errorf("the line: %+v, %v", steps, err)
	}
	for _, bad := range []string{"noise", "audit-log", "nothing"} {
		if a, _ := asks(t, shop, fmt.Sprintf(`{"id":"l","op":"line","key":%q,"from":1}`, bad)); codeOf(a.Error) != wire.CodeUnknownKey {
			t.Errorf("the line of %s: %+v", bad, a)
		}
	}
	a, _ = asks(t, shop, `{"id":"k","op":"keys"}`)
	var list wire.KeyList
	if err := a.Into(&list); err != nil || len(list.Keys) != 2 || list.Keys[0].Next == nil || list.Keys[1].State != "pending" || strings.Contains(string(a.Result), `"version":3`) {
		t.Errorf("the keys: %s, %v", a.Result, err)
	}
}

// TestBothNoiseKeysAnswer: the old and the new one from the announcement on, until the old one is out of use.
func TestBothNoiseKeysAnswer(t *testing.T) {
	e := newEdge(t, nil)
	old := e.server
	connected := e.session("127.0.0.1", e.shop)
	next, err := e.Rotate(t.Context(), operator, NoiseName, time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	r := hears(t, connected)
	if r.Key != wire.NoiseKey || r.PublicKey != wire.Bytes32(next.Info().PublicKey) {
		t.Errorf("the shop hears %+v", r)
	}
	for _, active := range []bool{false, true} {
		if active {
			if err := e.act(t.Context(), e.creating, "test", func(ctx context.Context) error { return e.activate(ctx, operator, next) }); err != nil {
				t.Fatal(err)
			}
		}
		for _, server := range [][32]byte{old, [32]byte(r.PublicKey)} {
			e.server = server
			e.session("127.0.0.1", e.shop)
		}
		e.server = newIdentity(t).Public()
		e.staysOut("127.0.0.1", e.shop)
	}
	if err := e.Archive(t.Context(), operator, NoiseName, 1); err != nil {
		t.Fatal(err)
	}
	e.server = old
	e.staysOut("127.0.0.1", e.shop)
	e.server = [32]byte(r.PublicKey)
	e.session("127.0.0.1", e.shop)
	if a, _ := asks(t, connected, ping); a.Error != nil {
		t.Errorf("who was connected: %+v", a)
	}
}
