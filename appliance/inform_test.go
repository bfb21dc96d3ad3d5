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
	"countersign/internal/scantest"
	"countersign/noise"
	"countersign/wire"
)

// hearsEvent returns the next event on a connection.
func hearsEvent(t *testing.T, conn *noise.Conn) any {
	t.Helper()
	for {
		conn.SetReadDeadline(time.Now().Add(patience))
		b, err := conn.ReadMessage()
		if err != nil {
			t.Fatalf("no event: %v", err)
		}
		scantest.SawPeer("an event to a peer", string(b))
		if _, event, err := wire.DecodeMessage(b); err != nil {
			t.Fatal(err)
		} else if event != nil {
			return event
		}
	}
}

// hears returns the next event on a connection, which must be a rotation.
func hears(t *testing.T, conn *noise.Conn) *wire.Rotation {
	t.Helper()
	event := hearsEvent(t, conn)
	r, is := event.(*wire.Rotation)
	if !is {
		t.Fatalf("no rotation: %+v", event)
	}
	return r
}

// connects opens a connection until the end of the test. The first messages are the news for the
// peer, and the answer to a ping, which completes the handshake.
func (e *edge) connects(id *noise.Identity) *noise.Conn {
	e.t.Helper()
	conn, err := e.shake("127.0.0.1", id)
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { conn.Close() })
	if err := conn.WriteMessage([]byte(ping)); err != nil {
		e.t.Fatal(err)
	}
	return conn
}

// hearsCompromise expects a compromise as the next event on a connection.
func hearsCompromise(t *testing.T, conn *noise.Conn, key string, version uint32) {
	t.Helper()
	event := hearsEvent(t, conn)
	if c, is := event.(*wire.Compromise); !is || c.Key != key || c.Version != version {
		t.Fatalf("the next event is %+v", event)
	}
}

// asks sends a request, and returns the answer and the events before the answer.
func asks(t *testing.T, conn *noise.Conn, document string) (answer wire.Answer, before []any) {
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
		scantest.SawPeer("an answer", string(b))
		a, event, err := wire.DecodeMessage(b)
		if err != nil {
			t.Fatal(err)
		}
		if event == nil {
			return a, before
		}
		before = append(before, event)
	}
}

// TestPeersHearOfRotations: a connected peer gets a rotation at once, another peer at its next
// connection. Each peer gets the rotation on every connection until its acknowledgement.
func TestPeersHearOfRotations(t *testing.T) {
	e := newEdge(t, nil)
	shop := e.session("127.0.0.1", e.shop)
	at := time.Now().Add(time.Hour)
	if _, err := e.Keys.Rotate(t.Context(), operator, "payments", at); err != nil {
		t.Fatal(err)
	}
	r := hears(t, shop)
	if r.Key != "payments" || r.Version != 2 || r.ActivatesAt != at.Unix() || r.RetiresAt <= r.ActivatesAt ||
		r.Succession == nil {
		t.Errorf("the shop hears %+v", r)
	}
	ack := `{"id":"a","op":"rotation.ack","key":"payments","version":%d}`
	if a, _ := asks(t, shop, fmt.Sprintf(ack, 3)); codeOf(a.Error) != wire.CodeUnknownKey {
		t.Errorf("an acknowledgement without a rotation: %+v", a)
	}
	if a, _ := asks(t, shop, fmt.Sprintf(ack, 2)); a.Error != nil {
		t.Errorf("%+v", a)
	}
	if got := e.Peers.Unacknowledged("payments", 2); !slices.Equal(got, []string{"cafe"}) {
		t.Errorf("not acknowledged by %v", got)
	}
	for range 2 { // the café connects later, and again after a restart
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
	// A peer with an acknowledgement gets no rotation. The rotation would come before the second
	// answer.
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
		a, _ := asks(t, shop, fmt.Sprintf(`{"id":"l","op":"line","key":%q,"from":1}`, bad))
		if codeOf(a.Error) != wire.CodeUnknownKey {
			t.Errorf("the line of %s: %+v", bad, a)
		}
	}
	a, _ = asks(t, shop, `{"id":"k","op":"keys"}`)
	var list wire.KeyList
	if err := a.Into(&list); err != nil || len(list.Keys) != 2 || list.Keys[0].Next == nil ||
		list.Keys[1].State != "pending" || strings.Contains(string(a.Result), `"version":3`) {
		t.Errorf("the keys: %s, %v", a.Result, err)
	}
}

// TestBothNoiseKeysAnswer: the old and the new Noise key answer from the announcement on, until the
// old key is archived.
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
			eventually(t, "the new key is active", func() bool {
				k, err := e.Keys.Noise()
				return err == nil && k.Version == next.Version
			})
		}
		for _, server := range [][32]byte{old, [32]byte(r.PublicKey)} {
			e.server = server
			e.session("127.0.0.1", e.shop)
		}
		e.server = newIdentity(t).Public()
		e.staysOut("127.0.0.1", e.shop)
	}
	if err := e.Keys.Archive(t.Context(), approved, keyring.NoiseName, 1); err != nil {
		t.Fatal(err)
	}
	e.server = old
	e.staysOut("127.0.0.1", e.shop)
	e.server = [32]byte(r.PublicKey)
	e.session("127.0.0.1", e.shop)
	if a, _ := asks(t, connected, ping); a.Error != nil {
		t.Errorf("a session from before: %+v", a)
	}
}

// TestCompromiseIsToldToAll: a connected peer hears of a compromise at once, wherever the version
// is in its line, and each peer hears of it on every connection, before all rotations, until its
// own acknowledgement.
func TestCompromiseIsToldToAll(t *testing.T) {
	e := newEdge(t, nil)
	shop := e.session("127.0.0.1", e.shop)
	const ack = `{"id":"a","op":"%s","key":"payments","version":%d}`
	for version := uint32(2); version <= 3; version++ {
		if _, err := e.Keys.Rotate(t.Context(), operator, "payments", time.Now()); err != nil {
			t.Fatal(err)
		}
		for hears(t, shop).Version != version {
		}
		if a, _ := asks(t, shop, fmt.Sprintf(ack, wire.OpAck, version)); a.Error != nil {
			t.Fatalf("%+v", a)
		}
	}
	if err := e.Keys.Compromise(t.Context(), approved, "payments", 1, "stolen"); err != nil {
		t.Fatal(err)
	}
	hearsCompromise(t, shop, "payments", 1)
	if a, _ := asks(t, shop, fmt.Sprintf(ack, wire.OpCompromiseAck, 2)); codeOf(a.Error) != wire.CodeUnknownKey {
		t.Errorf("an acknowledgement without a compromise: %+v", a)
	}
	if _, err := e.Keys.Rotate(t.Context(), operator, "payments", time.Now()); err != nil {
		t.Fatal(err)
	}
	e.restart()
	for _, id := range []*noise.Identity{e.shop, e.cafe} {
		conn := e.connects(id)
		hearsCompromise(t, conn, "payments", 1)
		if r := hears(t, conn); r.Version != 4 {
			t.Errorf("after the compromise comes %+v", r)
		}
	}
	if got := e.Peers.Unwarned("payments", 1); !slices.Equal(got, []string{"cafe", "shop"}) {
		t.Errorf("not acknowledged by %v", got)
	}
	shop = e.session("127.0.0.1", e.shop)
	if a, _ := asks(t, shop, fmt.Sprintf(ack, wire.OpCompromiseAck, 1)); a.Error != nil {
		t.Errorf("%+v", a)
	}
	if got := e.Peers.Unwarned("payments", 1); !slices.Equal(got, []string{"cafe"}) {
		t.Errorf("not acknowledged by %v", got)
	}
	if r := hears(t, e.connects(e.shop)); r.Version != 4 {
		t.Errorf("a peer that knows of the compromise hears %+v", r)
	}
	hearsCompromise(t, e.connects(e.cafe), "payments", 1)
}

// pipes is a listener for connections without buffers: a write waits for the read.
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

// TestPeerThatDoesNotRead: a peer that does not read delays no rotation and is disconnected. Serve
// can end.
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
			t.Fatal("the peer is still connected")
		}
		e.ledger.Alive(t.Context())
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// isDue changes the activation time of an announced version to now, in the ledger.
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

// TestNoiseKeyIsCompromisedInAHandshake: a secret that the device returns after the compromise is
// not used.
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
	peer := newIdentity(t).Public()
	go func() {
		_, err := k.Exchange(context.Background(), keyring.Own, peer)
		done <- err
	}()
	<-inDevice
	if err := r.Keys.Compromise(t.Context(), approved, keyring.NoiseName, 1, "stolen"); err != nil {
		t.Fatal(err)
	}
	close(release)
	if err := <-done; !errors.Is(err, keyring.ErrNotActive) {
		t.Errorf("%v", err)
	}
	// The second exchange does not reach the device, where BeforeExchange would panic.
	if _, err := k.Exchange(t.Context(), keyring.Own, peer); !errors.Is(err, keyring.ErrNotActive) {
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

// TestToldOnce: a rotation is sent once on a connection, also when other rotations follow.
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

// TestPeersHearOfTheEnd: peers hear of a rotation that was moved or called off, whether connected
// or away, and also after an acknowledgement of the announcement. They hear the news on every
// connection until they acknowledge the news.
func TestPeersHearOfTheEnd(t *testing.T) {
	e := newEdge(t, nil)
	shop := e.session("127.0.0.1", e.shop)
	at := time.Now().Add(time.Hour)
	rotate := func() {
		t.Helper()
		if _, err := e.Keys.Rotate(t.Context(), operator, "payments", at); err != nil {
			t.Fatal(err)
		}
	}
	ack := func(conn *noise.Conn, r *wire.Rotation) {
		t.Helper()
		request := wire.Ack{ID: "a", Op: wire.OpAck, Key: r.Key, Version: r.Version, Change: r.Change}
		a, _ := asks(t, conn, string(manage.Encode(request)))
		for a.ID != request.ID { // the answer to an earlier request
			a, _ = asks(t, conn, ping)
		}
		if a.Error != nil {
			t.Errorf("%+v", a)
		}
	}
	// cafe connects, and hears what the shop has heard.
	cafe := func(want *wire.Rotation) {
		t.Helper()
		conn := e.connects(e.cafe)
		defer conn.Close()
		if r := hears(t, conn); string(wire.EncodeRotation(*r)) != string(wire.EncodeRotation(*want)) {
			t.Errorf("the café hears %+v, want %+v", r, want)
		}
	}
	rotate()
	r := hears(t, shop)
	ack(shop, r)
	at = at.Add(time.Hour)
	rotate()
	moved := hears(t, shop)
	if moved.Version != 2 || moved.Change != 1 || moved.ActivatesAt != at.Unix() || moved.Succession == nil {
		t.Errorf("the shop hears %+v", moved)
	}
	cafe(moved)
	const late = `{"id":"a","op":"rotation.ack","key":"payments","version":2}`
	if a, _ := asks(t, shop, late); codeOf(a.Error) != wire.CodeUnknownKey {
		t.Errorf("an acknowledgement of what is no longer true: %+v", a)
	}
	ack(shop, moved)
	if err := e.Keys.Cancel(t.Context(), operator, "payments"); err != nil {
		t.Fatal(err)
	}
	off := hears(t, shop)
	if off.Version != 1 || off.Change != 2 || off.Cancelled != 2 || off.PublicKey == moved.PublicKey {
		t.Errorf("the shop hears %+v", off)
	}
	for range 2 {
		cafe(off)
		e.restart()
	}
	shop = e.connects(e.shop)
	ack(shop, hears(t, shop))
	shop = e.session("127.0.0.1", e.shop)
	if _, before := asks(t, shop, ping); len(before) > 0 {
		t.Errorf("the shop hears again: %+v", before)
	}
	rotate()
	if r := hears(t, shop); r.Version != 2 || r.Change != 2 || r.Cancelled != 0 || r.PublicKey != moved.PublicKey {
		t.Errorf("the shop hears %+v", r)
	}
}

// TestCalledOffNoiseKeyAnswers: a peer that was away tries the announced Noise key only, once the
// old one must have retired. The peer gets in, and hears that the rotation was called off.
func TestCalledOffNoiseKeyAnswers(t *testing.T) {
	e := newEdge(t, nil)
	next, err := e.Keys.Rotate(t.Context(), operator, keyring.NoiseName, time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Keys.Cancel(t.Context(), operator, keyring.NoiseName); err != nil {
		t.Fatal(err)
	}
	active := wire.Bytes32(e.server)
	e.restart()
	e.server = [32]byte(next.Info().PublicKey)
	if r := hears(t, e.connects(e.shop)); r.Key != wire.NoiseKey || r.Cancelled != 2 || r.PublicKey != active {
		t.Errorf("the shop hears %+v", r)
	}
}
