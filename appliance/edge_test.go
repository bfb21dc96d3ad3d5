package appliance

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/form"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/keystore/keystoretest"
	"countersign/internal/ledger"
	"countersign/internal/ledger/ledgertest"
	"countersign/internal/meter"
	"countersign/internal/peers"
	"countersign/internal/scantest"
	"countersign/noise"
	"countersign/wire"
)

// edge is an appliance with listeners for both profiles on loopback addresses, and with the peers
// "shop" and "cafe" with real keys.
type edge struct {
	*Appliance
	t         *testing.T
	limits    Limits
	rules     string
	store     *keystoretest.Memory
	path      string
	log       *scantest.Buffer
	shop      *noise.Identity
	cafe      *noise.Identity
	server    [32]byte
	public    []byte // public key of "payments"
	at        map[noise.Profile]string
	exchanges atomic.Int64
	stop      func()

	signing, exchanging atomic.Pointer[hold]
}

// hold blocks operations of the device until its release.
type hold struct {
	entered  atomic.Int64
	released chan struct{}
}

func (h *hold) wait() {
	if h != nil {
		h.entered.Add(1)
		<-h.released
	}
}

// held installs a hold until release or the end of the test.
func held(t *testing.T, by *atomic.Pointer[hold]) (entered *atomic.Int64, release func()) {
	h := &hold{released: make(chan struct{})}
	by.Store(h)
	release = sync.OnceFunc(func() { by.Store(nil); close(h.released) })
	t.Cleanup(release)
	return &h.entered, release
}

// heldDevice holds every signature with the key "payments" until release. entered counts them.
func (e *edge) heldDevice() (entered *atomic.Int64, release func()) { return held(e.t, &e.signing) }

// heldExchanges holds every exchange of a handshake until release. entered counts them.
func (e *edge) heldExchanges() (entered *atomic.Int64, release func()) {
	return held(e.t, &e.exchanging)
}

var operator = audit.Operator("test")

// newEdge makes an edge with the default limits, after change.
func newEdge(t *testing.T, change func(*Limits)) *edge {
	t.Helper()
	e := &edge{
		t: t, limits: DefaultLimits(), rules: allowShop, store: keystoretest.NewMemory(),
		path: filepath.Join(t.TempDir(), "ledger.db"), log: new(scantest.Buffer),
	}
	e.limits.Calls = map[string]int{"memory": 4}
	if change != nil {
		change(&e.limits)
	}
	e.store.BeforeExchange = func(keystore.Ref) {
		e.exchanges.Add(1)
		e.exchanging.Load().wait()
	}
	e.store.BeforeSign = func(ref keystore.Ref, _ []byte) error {
		if ref.Name == "payments" {
			e.signing.Load().wait()
		}
		return nil
	}
	if err := ledger.Create(e.path, ledger.Options{}); err != nil {
		t.Fatal(err)
	}
	e.open()
	t.Cleanup(func() { e.close() })
	k, err := e.Keys.Create(t.Context(), operator, keyring.NewKey{Name: "payments"})
	if err != nil {
		t.Fatal(err)
	}
	e.public = k.Info().PublicKey
	if k, err = e.Keys.CreateOwn(t.Context(), operator, keyring.NoiseName, "memory"); err != nil {
		t.Fatal(err)
	}
	e.server = [32]byte(k.Info().PublicKey)
	if _, err = e.Keys.CreateOwn(t.Context(), operator, keyring.LogName, "memory"); err != nil {
		t.Fatal(err)
	}
	e.shop, e.cafe = e.enrol("shop"), e.enrol("cafe")
	e.serve()
	return e
}

func (e *edge) open() {
	e.t.Helper()
	l, err := ledgertest.Open(e.t, e.path, ledger.Options{})
	if err != nil {
		e.t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(scantest.Tee("the log", e.log), &slog.HandlerOptions{Level: slog.LevelDebug}))
	c := Config{Limits: e.limits, Retention: kept, Meter: meter.New("test")}
	tokens := map[string]keystore.Store{"memory": form.Guard(e.store, nil)}
	if e.Appliance, err = New(e.t.Context(), c, l, tokens, parsed(e.t, e.rules), log); err != nil {
		l.Close()
		e.t.Fatal(err)
	}
}

func (e *edge) serve() {
	e.t.Helper()
	if err := e.Start(e.t.Context()); err != nil {
		e.t.Fatal(err)
	}
	e.at = map[noise.Profile]string{}
	var listeners []Listener
	for _, profile := range []noise.Profile{noise.CountersignV1, noise.PubkyV1} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			e.t.Fatal(err)
		}
		e.at[profile] = l.Addr().String()
		listeners = append(listeners, Listener{l, profile})
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- e.Serve(ctx, listeners...) }()
	e.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil {
			e.t.Errorf("Serve: %v", err)
		}
		if err := e.Stop(); err != nil {
			e.t.Errorf("Stop: %v", err)
		}
	})
}

func (e *edge) close() {
	if e.stop != nil {
		e.stop()
	}
	e.ledger.Close()
}

// restart stops the appliance and starts another one on the same ledger.
func (e *edge) restart() {
	e.t.Helper()
	e.close()
	e.open()
	e.serve()
}

func newIdentity(t *testing.T) *noise.Identity {
	t.Helper()
	id, err := noise.NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	scantest.Secret("an identity", id.Private())
	return id
}

// enrol enrols a peer with a new key.
func (e *edge) enrol(name string) *noise.Identity {
	e.t.Helper()
	id := newIdentity(e.t)
	public := id.Public()
	if _, err := e.Peers.Add(e.t.Context(), operator, name, public[:]); err != nil {
		e.t.Fatal(err)
	}
	return id
}

// patience is the timeout for conditions that must come true. A test takes so long only if it
// fails.
const patience = 30 * time.Second

// dial connects from a local address.
func (e *edge) dial(from string, profile noise.Profile) (*net.TCPConn, error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: patience}
	conn, err := d.DialContext(e.t.Context(), "tcp", e.at[profile])
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), nil
}

// raw returns a TCP connection without a handshake, open until the end of the test.
func (e *edge) raw(from string, profile noise.Profile) *net.TCPConn {
	e.t.Helper()
	conn, err := e.dial(from, profile)
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { conn.Close() })
	return conn
}

// shake performs the handshake and sends no message.
func (e *edge) shake(from string, id *noise.Identity) (*noise.Conn, error) {
	raw, err := e.dial(from, noise.CountersignV1)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(e.t.Context(), patience)
	defer cancel()
	conn, err := noise.Connect(ctx, raw, id, noise.CountersignV1, e.server, nil)
	if err != nil {
		raw.Close()
		return nil, err
	}
	return conn, nil
}

const ping = `{"id":"p","op":"ping"}`

// getsIn opens a session: a handshake and an answered ping.
func (e *edge) getsIn(from string, id *noise.Identity) (*noise.Conn, error) {
	conn, err := e.shake(from, id)
	if err != nil {
		return nil, err
	}
	if a, err := exchange(conn, ping); err != nil || a.Error != nil {
		conn.Close()
		return nil, fmt.Errorf("ping: %v, %v", a.Error, err)
	}
	return conn, nil
}

// session opens a session until the end of the test.
func (e *edge) session(from string, id *noise.Identity) *noise.Conn {
	e.t.Helper()
	conn, err := e.getsIn(from, id)
	if err != nil {
		e.t.Fatalf("from %s: %v", from, err)
	}
	e.t.Cleanup(func() { conn.Close() })
	return conn
}

// staysOut expects that no session can be opened.
func (e *edge) staysOut(from string, id *noise.Identity) {
	e.t.Helper()
	if conn, err := e.getsIn(from, id); err == nil {
		conn.Close()
		e.t.Errorf("from %s: a session was opened", from)
	}
}

// exchange sends a request and returns the answer.
func exchange(conn *noise.Conn, document string) (wire.Answer, error) {
	if err := conn.WriteMessage([]byte(document)); err != nil {
		return wire.Answer{}, err
	}
	return receive(conn)
}

// receive returns the next answer. Events before the answer are skipped.
func receive(conn *noise.Conn) (wire.Answer, error) {
	for {
		conn.SetReadDeadline(time.Now().Add(patience))
		b, err := conn.ReadMessage()
		if err != nil {
			return wire.Answer{}, err
		}
		scantest.SawPeer("an answer", string(b))
		if answer, event, err := wire.DecodeMessage(b); err != nil || event == nil {
			return answer, err
		}
	}
}

// answers expects an answer with a code. The code "" is a result.
func answers(t *testing.T, conn *noise.Conn, document, code string) {
	t.Helper()
	a, err := exchange(conn, document)
	if err != nil {
		t.Fatalf("%.60s: no answer: %v", document, err)
	}
	if got := codeOf(a.Error); got != code {
		t.Fatalf("%.60s: %q, want %q (%v)", document, got, code, a.Error)
	}
}

// codeOf returns the code of a refusal, or "" for a result.
func codeOf(refusal *wire.Error) string {
	if refusal == nil {
		return ""
	}
	return refusal.Code
}

// closes expects that the appliance closes a connection without sending a byte.
func closes(t *testing.T, conn net.Conn) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	if b, err := io.ReadAll(conn); err != nil || len(b) > 0 {
		t.Errorf("read %d bytes and %v, want the end only", len(b), err)
	}
}

// ends expects that a connection ends: by a close, or by a reset if the appliance has not read all
// bytes.
func ends(t *testing.T, conn *noise.Conn) {
	t.Helper()
	for {
		conn.SetReadDeadline(time.Now().Add(patience))
		if _, err := conn.ReadMessage(); err != nil {
			if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
				t.Error("the connection stays open")
			}
			return
		}
	}
}

// eventually waits for a condition, at most for patience.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after %v still not: %s", patience, what)
		}
	}
}

// frame prefixes a message with the four bytes of its length.
func frame(b []byte) []byte { return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...) }

// nonsense has the length of a message 1 of countersign-v1.
var nonsense = frame(bytes.Repeat([]byte{9}, 96))

// request returns a sign request in JSON. n makes the id and the nonce.
func request(n int, content string) string { return encoded(numbered(n, content)) }

// numbered returns a sign request. n makes the id and the nonce.
func numbered(n int, content string) *wire.Sign {
	s := message(0, content)
	s.ID = fmt.Sprint(n)
	binary.BigEndian.PutUint64(s.Nonce[:], uint64(n)+1)
	return s
}

func encoded(v any) string {
	b, err := wire.Encode(v)
	if err != nil {
		panic(err)
	}
	return string(b)
}

// batchOf returns a batch of requests in JSON, without their ids.
func batchOf(items ...any) string {
	var all []string
	for _, item := range items {
		if s, ok := item.(string); ok {
			all = append(all, s)
			continue
		}
		var fields map[string]json.RawMessage
		json.Unmarshal([]byte(encoded(item)), &fields)
		delete(fields, "id")
		b, _ := json.Marshal(fields)
		all = append(all, string(b))
	}
	return `{"id":"b","op":"batch","items":[` + strings.Join(all, ",") + `]}`
}

// status returns the status of a peer.
func (e *edge) status(name string) peers.Status {
	e.t.Helper()
	all := e.Peers.All()
	i := slices.IndexFunc(all, func(p peers.Status) bool { return p.Name == name })
	if i < 0 {
		e.t.Fatalf("no peer %q", name)
	}
	return all[i]
}

// logOf returns the events of the audit log, beginning at an index.
func logOf(t *testing.T, a *Appliance, from uint64) (all []audit.Event) {
	t.Helper()
	if err := a.ledger.Alive(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := a.Events(from, func(_ uint64, e audit.Event) bool {
		all = append(all, e)
		return true
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

// countOf returns the number of events of a type.
func countOf(events []audit.Event, of audit.Type) (n int) {
	for _, e := range events {
		if e.Type == of {
			n++
		}
	}
	return n
}

// TestRefusedBeforeTheDevice: a malformed first message, and a handshake beyond the limit, cost no
// exchange of the device.
func TestRefusedBeforeTheDevice(t *testing.T) {
	e := newEdge(t, nil)
	for name, b := range map[string][]byte{
		"nothing":             {},
		"half a header":       {0, 0},
		"a frame of 4 GiB":    binary.BigEndian.AppendUint32(nil, 1<<32-1),
		"an empty frame":      make([]byte, 4),
		"a short message 1":   frame(make([]byte, 95)),
		"one with a payload":  frame(make([]byte, 97)),
		"half a message 1":    nonsense[:50],
		"an HTTP request":     []byte("GET / HTTP/1.1\r\nHost: countersign\r\n\r\n"),
		"the longest message": binary.BigEndian.AppendUint32(nil, 65535),
	} {
		for range 7 { // more than the attempts of a source: a malformed message is no attempt
			conn := e.raw("127.0.0.9", noise.CountersignV1)
			conn.Write(b)
			conn.CloseWrite()
			conn.SetReadDeadline(time.Now().Add(patience))
			if got, err := io.ReadAll(conn); len(got) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: answered %d bytes, %v", name, len(got), err)
			}
		}
	}
	if n := e.exchanges.Load(); n != 0 {
		t.Errorf("malformed messages have cost %d exchanges", n)
	}
	e.session("127.0.0.9", e.shop)

	before := e.exchanges.Load()
	for i := range 5 {
		conn := e.raw("127.0.0.2", noise.CountersignV1)
		conn.Write(nonsense)
		closes(t, conn)
		if n := e.exchanges.Load() - before; n != int64(i+1) {
			t.Fatalf("%d handshakes that fail have cost %d exchanges", i+1, n)
		}
	}
	for range 20 {
		conn := e.raw("127.0.0.2", noise.CountersignV1)
		conn.Write(nonsense)
		closes(t, conn)
	}
	e.staysOut("127.0.0.2", e.shop)
	if n := e.exchanges.Load() - before; n != 5 {
		t.Errorf("beyond the limit a source has cost %d exchanges, want 5", n)
	}
	e.session("127.0.0.3", e.shop) // another source has its own limit
}

// movedClock is a clock that a test can move forward.
type movedClock struct{ ahead atomic.Int64 }

func (c *movedClock) now() time.Time          { return time.Now().Add(time.Duration(c.ahead.Load())) }
func (c *movedClock) advance(d time.Duration) { c.ahead.Add(int64(d)) }

// recording is a connection that records the sent bytes.
type recording struct {
	net.Conn
	sent []byte
}

func (r *recording) Write(p []byte) (int, error) {
	r.sent = append(r.sent, p...)
	return r.Conn.Write(p)
}

// message1 records a valid message 1.
func (e *edge) message1(from string, id *noise.Identity) []byte {
	e.t.Helper()
	r := &recording{Conn: e.raw(from, noise.CountersignV1)}
	if _, err := noise.Connect(e.t.Context(), r, id, noise.CountersignV1, e.server, nil); err != nil {
		e.t.Fatal(err)
	}
	r.Close()
	return r.sent
}

// TestReplayedMessage1ResetsNothing: a replayed message 1 gets a message 2, counts as a failed
// handshake, and does not make its source good.
func TestReplayedMessage1ResetsNothing(t *testing.T) {
	clock := new(movedClock)
	e := newEdge(t, func(l *Limits) { l.Handshakes.Now = clock.now })
	recorded := e.message1("127.0.0.5", e.shop)
	for range 5 {
		conn := e.raw("127.0.0.6", noise.CountersignV1)
		conn.Write(recorded)
		if _, err := io.ReadFull(conn, make([]byte, 4+48)); err != nil {
			t.Fatalf("no message 2: %v", err)
		}
		conn.Close()
	}
	before := e.exchanges.Load()
	e.staysOut("127.0.0.6", e.shop)
	if n := e.exchanges.Load() - before; n != 0 {
		t.Errorf("the refused handshake has cost %d exchanges", n)
	}
	clock.advance(e.limits.Handshakes.Window)
	e.session("127.0.0.6", e.shop)
}

// TestOnlyATransportMessageResets: a complete handshake changes nothing. The first transport
// message resets the failures of its source.
func TestOnlyATransportMessageResets(t *testing.T) {
	e := newEdge(t, nil)
	const from = "127.0.0.7"
	fails := func() {
		conn := e.raw(from, noise.CountersignV1)
		conn.Write(nonsense)
		closes(t, conn)
	}
	for range 4 {
		fails()
	}
	good, err := e.shake(from, e.shop)
	if err != nil {
		t.Fatal(err)
	}
	defer good.Close()
	before := e.exchanges.Load()
	sixth := e.raw(from, noise.CountersignV1)
	sixth.Write(nonsense)
	other := e.session("127.0.0.8", e.cafe) // comes later and is answered, while the sixth waits
	if n := e.exchanges.Load() - before; n != 2 {
		t.Errorf("the sixth has not waited: %d exchanges, want the 2 of the other source", n)
	}
	answers(t, good, ping, "")
	closes(t, sixth) // has had an exchange
	for range 4 {
		fails()
	}
	if n := e.exchanges.Load() - before; n != 2+5 {
		t.Errorf("%d exchanges, want 7: the failures before are reset", n)
	}
	fails()
	if n := e.exchanges.Load() - before; n != 2+5 {
		t.Errorf("the sixth after that has cost an exchange")
	}
	answers(t, other, ping, "")
}

// TestManyConnectionsAtOnce: a good client's pool opens 64 connections at once, more than the
// attempts of a source.
func TestManyConnectionsAtOnce(t *testing.T) {
	e := newEdge(t, nil)
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			conn, err := e.getsIn("127.0.0.1", e.shop)
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() { conn.Close() })
		})
	}
	wg.Wait()
	if s := e.status("shop"); s.Connections != 64 || time.Since(s.Seen) > patience {
		t.Errorf("%d connections, seen %v", s.Connections, s.Seen)
	}
}

// TestStrangersFlood: strangers send 10,000 handshakes from 10,000 addresses. A peer with a good
// session before gets in meanwhile and is answered. The flood costs the device at most the
// exchanges of its limit.
func TestStrangersFlood(t *testing.T) {
	e := newEdge(t, nil)
	e.session("127.0.0.1", e.shop).Close()
	before := e.exchanges.Load()
	var next, sent atomic.Int64
	flooding, over := make(chan struct{}), make(chan struct{})
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			for n := next.Add(1); n <= 10_000; n = next.Add(1) {
				conn, err := e.dial(fmt.Sprintf("127.1.%d.%d", n>>8, n&255), noise.CountersignV1)
				if err != nil {
					t.Error(err)
					return
				}
				conn.Write(nonsense)
				conn.SetReadDeadline(time.Now().Add(patience))
				if b, err := io.ReadAll(conn); len(b) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("a stranger reads %d bytes, %v", len(b), err)
				}
				conn.Close()
				if sent.Add(1) == 500 {
					close(flooding)
				}
			}
		})
	}
	go func() { wg.Wait(); close(over) }()
	<-flooding
	n := 0
	for flood := true; flood; n++ {
		select {
		case <-over:
			flood = false
		default:
		}
		conn, err := e.getsIn("127.0.0.1", e.shop)
		if err != nil {
			t.Fatalf("session %d: %v", n, err)
		}
		answers(t, conn, request(n, "m"), "")
		conn.Close()
	}
	t.Logf("%d sessions meanwhile", n)
	// Each of the 75 handshakes for strangers costs one exchange, each of the shop's costs two.
	if got, most := e.exchanges.Load()-before, int64(75+2*n); got > most {
		t.Errorf("%d exchanges, want at most %d", got, most)
	}
	e.stop()
	counted := 0
	for _, ev := range logOf(t, e.Appliance, 1) {
		if ev.Type == audit.RateLimitTriggered && ev.Action == "handshake" || ev.Type == audit.HandshakeRefused {
			var n int
			fmt.Sscan(ev.Metadata["count"], &n)
			counted += n
		}
	}
	if counted != 10_000 {
		t.Errorf("the log counts %d of 10000 refusals", counted)
	}
	if all := logOf(t, e.Appliance, 1); len(all) > 100+2*n {
		t.Errorf("the flood has filled the log: %d events", len(all))
	}
}

// TestStrangersTakeAllPlaces: silent connections occupy all places for strangers. A peer with a
// good session before has other places.
func TestStrangersTakeAllPlaces(t *testing.T) {
	e := newEdge(t, func(l *Limits) { l.Strangers, l.Connections, l.HandshakeTimeout = 8, 12, time.Hour })
	e.session("127.0.0.1", e.shop).Close()
	for n := range 8 {
		e.raw(fmt.Sprintf("127.1.0.%d", n+1), noise.CountersignV1)
	}
	closes(t, e.raw("127.1.1.1", noise.CountersignV1))
	conn := e.session("127.0.0.1", e.shop)
	answers(t, conn, request(1, "m"), "")
	e.staysOut("127.1.1.2", e.cafe)
}

// TestStrangersLearnNothing: every refused handshake ends in the same way: a close without a byte,
// at a tick.
func TestStrangersLearnNothing(t *testing.T) {
	e := newEdge(t, func(l *Limits) {
		l.Handshakes.PerSource, l.Handshakes.Global, l.Strangers = 500, 1000, 800
	})
	suspended := e.enrol("suspended")
	if err := e.Peers.Suspend(t.Context(), operator, "suspended"); err != nil {
		t.Fatal(err)
	}
	_, ed, _ := ed25519.GenerateKey(nil)
	stranger, wrong := newIdentity(t), newIdentity(t).Public()
	// first returns the message 1 of an identity.
	first := func(id *noise.Identity, profile noise.Profile, server [32]byte, payload []byte) []byte {
		here, there := net.Pipe()
		r := &recording{Conn: here}
		go func() {
			header := make([]byte, 4)
			io.ReadFull(there, header)
			io.CopyN(io.Discard, there, int64(binary.BigEndian.Uint32(header)))
			there.Close()
		}()
		noise.Connect(t.Context(), r, id, profile, server, payload)
		return r.sent
	}
	payload := func(id *noise.Identity, server [32]byte, expires time.Time) []byte {
		p, err := noise.PubkyIdentity(ed, id.Public(), server, "", expires)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	good := payload(e.shop, e.server, time.Time{})
	strangers := payload(stranger, e.server, time.Time{})
	forged := bytes.Replace(good, []byte(`"sig":[`), []byte(`"sig":[1`), 1)
	forServer := bytes.Replace(good, []byte("Client"), []byte("Server"), 1)
	type attempt struct {
		name    string
		profile noise.Profile
		message []byte
	}
	plain, pubky := noise.CountersignV1, noise.PubkyV1
	all := []attempt{
		{"a stranger", plain, first(stranger, plain, e.server, nil)},
		{"a suspended peer", plain, first(suspended, plain, e.server, nil)},
		{"another server's key", plain, first(e.shop, plain, wrong, nil)},
		{"no handshake", plain, nonsense},
		{"the other profile", pubky, first(e.shop, plain, e.server, nil)},
		{"a stranger with an identity", pubky, first(stranger, pubky, e.server, strangers)},
		{"a stranger with a peer's identity", pubky, first(stranger, pubky, e.server, good)},
		{"a peer with a stranger's identity", pubky, first(e.shop, pubky, e.server, strangers)},
		{"an identity for another server", pubky, first(e.shop, pubky, e.server, payload(e.shop, wrong, time.Time{}))},
		{"an identity without JSON", pubky, first(e.shop, pubky, e.server, []byte("{\x00"))},
		{"an identity for the role of a server", pubky, first(e.shop, pubky, e.server, forServer)},
		{"an identity with a forged signature", pubky, first(e.shop, pubky, e.server, forged)},
	}
	for i, message := range [][]byte{first(e.shop, plain, e.server, nil), first(e.shop, pubky, e.server, good)} {
		profile := []noise.Profile{plain, pubky}[i]
		for at := 4; at < len(message); at += 1 + i*9 {
			flipped := bytes.Clone(message)
			flipped[at] ^= 0x40
			all = append(all, attempt{fmt.Sprintf("byte %d flipped", at), profile, flipped})
		}
	}
	var wg sync.WaitGroup
	for _, a := range all {
		wg.Go(func() {
			conn, err := e.dial("127.0.0.1", a.profile)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			begun := time.Now()
			conn.Write(a.message)
			conn.SetReadDeadline(begun.Add(patience))
			b, err := io.ReadAll(conn)
			if len(b) > 0 || err != nil {
				t.Errorf("%s: read %d bytes, %v; want an end", a.name, len(b), err)
			}
			if took := time.Since(begun); took < refusalTime {
				t.Errorf("%s: closed after %v, before the tick", a.name, took)
			}
		})
	}
	wg.Wait()
	e.session("127.0.0.1", e.shop)
}
