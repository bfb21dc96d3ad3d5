package appliance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/manage"
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

// TestPeersHearOfRotations: those who are connected at once, others at their next connection, each
// until it has acknowledged it.
func TestPeersHearOfRotations(t *testing.T) {
	e := newEdge(t, nil)
	shop := e.session("127.0.0.1", e.shop)
	at := time.Now().Add(time.Hour)
	if _, err := e.Keys.Rotate(t.Context(), operator, "payments", at); err != nil {
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
	if got := e.Peers.Unacknowledged("payments", 2); !slices.Equal(got, []string{"cafe"}) {
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
	// Who has acknowledged hears nothing; the answer to a second request is behind what it would
	// have heard.
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

// TestBothNoiseKeysAnswer: the old and the new one from the announcement on, until the old one is
// out of use.
func TestBothNoiseKeysAnswer(t *testing.T) {
	e := newEdge(t, nil)
	old := e.server
	connected := e.session("127.0.0.1", e.shop)
	next, err := e.Keys.Rotate(t.Context(), operator, keyring.NoiseName, time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	r := hears(t, connected)
	if r.Key != wire.NoiseKey || r.PublicKey != wire.Bytes32(next.Info().PublicKey) {
		t.Errorf("the shop hears %+v", r)
	}
	for _, active := range []bool{false, true} {
		if active {
			e.isDue(next)
			eventually(t, "it is active", func() bool { k, err := e.Keys.Noise(); return err == nil && k.Version == next.Version })
		}
		for _, server := range [][32]byte{old, [32]byte(r.PublicKey)} {
			e.server = server
			e.session("127.0.0.1", e.shop)
		}
		e.server = newIdentity(t).Public()
		e.staysOut("127.0.0.1", e.shop)
	}
	if err := e.Keys.Archive(t.Context(), operator, keyring.NoiseName, 1); err != nil {
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

// TestCompromiseIsToldToAll: who has acknowledged a rotation hears of it once more when the version
// before turns out to be compromised, and it has to be acknowledged again.
func TestCompromiseIsToldToAll(t *testing.T) {
	e := newEdge(t, nil)
	shop := e.session("127.0.0.1", e.shop)
	if _, err := e.Keys.Rotate(t.Context(), operator, "payments", time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	hears(t, shop)
	const ack = `{"id":"a","op":"rotation.ack","key":"payments","version":2}`
	if a, _ := asks(t, shop, ack); a.Error != nil {
		t.Fatalf("%+v", a)
	}
	if err := e.Keys.Compromise(t.Context(), approved, "payments", 1, "stolen"); err != nil {
		t.Fatal(err)
	}
	var r *wire.Rotation
	for range 2 { // that it is compromised, and that the next one is active
		if r = hears(t, shop); r.Version != 2 || !r.Compromised {
			t.Errorf("the shop hears %+v", r)
		}
		if r.ActivatesAt <= time.Now().Unix() {
			break
		}
	}
	if r.ActivatesAt > time.Now().Unix() || r.RetiresAt != r.ActivatesAt {
		t.Errorf("the shop hears %+v", r)
	}
	e.restart()
	if got := e.Peers.Unacknowledged("payments", 2); !slices.Equal(got, []string{"cafe", "shop"}) {
		t.Errorf("not acknowledged by %v", got)
	}
	shop, err := e.shake("127.0.0.1", e.shop)
	if err != nil {
		t.Fatal(err)
	}
	a, before := asks(t, shop, ack)
	if len(before) == 0 {
		before = append(before, hears(t, shop))
	}
	if a.Error != nil || before[0].Version != 2 || !before[0].Compromised {
		t.Errorf("%+v, %+v", a, before)
	}
	if got := e.Peers.Unacknowledged("payments", 2); !slices.Equal(got, []string{"cafe"}) {
		t.Errorf("not acknowledged by %v", got)
	}
}

// pipes listens for connections that hold nothing: what is written waits for who reads it.
type pipes struct {
	net.Listener
	conns chan net.Conn
}

func (p pipes) Accept() (net.Conn, error) {
	c, ok := <-p.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}

func (p pipes) Close() error { close(p.conns); return nil }

// TestPeerThatDoesNotRead: it holds up no rotation, is cut off, and nothing of it is left when
// serving ends.
func TestPeerThatDoesNotRead(t *testing.T) {
	e := newEdge(t, func(l *Limits) { l.WriteTimeout = 100 * time.Millisecond })
	e.stop()
	e.close()
	e.open()
	l := pipes{conns: make(chan net.Conn, 1)}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- e.Serve(ctx, Listener{l, noise.CountersignV1}) }()
	client, server := net.Pipe()
	defer client.Close()
	l.conns <- server
	conn, err := noise.Connect(t.Context(), client, e.shop, noise.CountersignV1, e.server, nil)
	if err != nil {
		t.Fatal(err)
	}
	if a, _ := asks(t, conn, ping); a.Error != nil {
		t.Fatalf("%+v", a)
	}
	begin := time.Now()
	for n := range uint32(20) {
		if k, err := e.Keys.Rotate(t.Context(), operator, "payments", time.Now()); err != nil || k.Version != n+2 {
			t.Fatal(err)
		}
	}
	for e.status("shop").Connections > 0 {
		if time.Since(begin) > patience {
			t.Fatal("it is still connected")
		}
		e.ledger.Alive(t.Context())
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// isDue brings the time of an announced version forward to now, in the ledger.
func (e *edge) isDue(k *keyring.Key) {
	e.t.Helper()
	if err := e.ledger.Update(e.t.Context(), func(tx *ledger.Tx) error {
		var record map[string]any
		if err := json.Unmarshal(tx.Get(ledger.Keys, k.Ref().String()), &record); err != nil {
			return err
		}
		record["activates"] = time.Now().Unix()
		return tx.Put(ledger.Keys, k.Ref().String(), manage.Encode(record))
	}); err != nil {
		e.t.Fatal(err)
	}
}

// TestNoiseKeyIsCompromisedInAHandshake: what the device answers after that is used for nothing.
func TestNoiseKeyIsCompromisedInAHandshake(t *testing.T) {
	r := newRig(t)
	k, err := r.Keys.CreateOwn(t.Context(), operator, keyring.NoiseName, "memory")
	if err != nil {
		t.Fatal(err)
	}
	inDevice, release := make(chan struct{}), make(chan struct{})
	r.store.BeforeExchange = func(ref keystore.Ref) {
		if ref.Version == 1 {
			close(inDevice)
			<-release
		}
	}
	done := make(chan error)
	go func() { _, err := k.Exchange(context.Background(), keyring.Own, newIdentity(t).Public()); done <- err }()
	<-inDevice
	if err := r.Keys.Compromise(t.Context(), approved, keyring.NoiseName, 1, "stolen"); err != nil {
		t.Fatal(err)
	}
	close(release)
	if err := <-done; !errors.Is(err, keyring.ErrNotActive) {
		t.Errorf("%v", err)
	}
	if _, err := k.Exchange(t.Context(), keyring.Own, newIdentity(t).Public()); !errors.Is(err, keyring.ErrNotActive) { // the device is not even asked
		t.Errorf("%v", err)
	}
	var answering []uint32
	for _, k := range r.Keys.Answering() {
		answering = append(answering, k.Version)
	}
	if !slices.Equal(answering, []uint32{2}) {
		t.Errorf("%v answer", answering)
	}
}

// TestToldOnce: on one connection a rotation is told once, whatever else there is to tell.
func TestToldOnce(t *testing.T) {
	e := newEdge(t, nil)
	shop := e.session("127.0.0.1", e.shop)
	at := time.Now().Add(time.Hour)
	for _, name := range []string{"payments", keyring.NoiseName} {
		if _, err := e.Keys.Rotate(t.Context(), operator, name, at); err != nil {
			t.Fatal(err)
		}
		if r := hears(t, shop); r.Key != name {
			t.Errorf("the shop hears %+v of %s", r, name)
		}
	}
	e.Peers.Wake()
	if _, before := asks(t, shop, ping); len(before) > 0 {
		t.Errorf("the shop hears again: %+v", before[0])
	}
}
