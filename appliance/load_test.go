package appliance

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"countersign/audit"
	"countersign/internal/keystore"
	"countersign/internal/scantest"
	"countersign/noise"
	"countersign/transcript"
	"countersign/wire"
)

// lasts expects that the appliance ends a connection, not before least has passed.
func lasts(t *testing.T, what string, conn net.Conn, begun time.Time, least time.Duration) {
	t.Helper()
	conn.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s: the connection stays open", what)
	}
	if took := time.Since(begun); took < least {
		t.Errorf("%s: ended after %v, before its %v", what, took, least)
	}
}

// trickle sends one byte each 10 ms until a write fails.
func trickle(conn net.Conn, b []byte) {
	ticker := time.NewTicker(10 * time.Millisecond)
	defer ticker.Stop()
	for _, one := range b {
		if _, err := conn.Write([]byte{one}); err != nil {
			return
		}
		<-ticker.C
	}
}

// TestTimeouts: each subtest has one short timeout. The other timeouts would keep the connection
// open.
func TestTimeouts(t *testing.T) {
	const short = 300 * time.Millisecond
	quiet := func(e *edge) (net.Conn, time.Time) {
		begun := time.Now() // before Accept
		return e.raw("127.0.0.2", noise.CountersignV1), begun
	}
	handshakeTrickles := func(e *edge) (net.Conn, time.Time) {
		conn, begun := quiet(e)
		go trickle(conn, append(binary.BigEndian.AppendUint32(nil, 96), make([]byte, 96)...))
		return conn, begun
	}
	notUsed := func(e *edge) (net.Conn, time.Time) {
		conn, begun := quiet(e)
		if _, err := noise.Connect(e.t.Context(), conn, e.shop, noise.CountersignV1, e.server, nil); err != nil {
			e.t.Fatal(err)
		}
		return conn, begun
	}
	used := func(e *edge) net.Conn {
		raw := e.raw("127.0.0.2", noise.CountersignV1)
		conn, err := noise.Connect(e.t.Context(), raw, e.shop, noise.CountersignV1, e.server, nil)
		if err != nil {
			e.t.Fatal(err)
		}
		answers(e.t, conn, ping, "")
		return raw
	}
	idle := func(e *edge) (net.Conn, time.Time) { begun := time.Now(); return used(e), begun }
	requestTrickles := func(e *edge) (net.Conn, time.Time) {
		conn := used(e)
		begun := time.Now()
		go trickle(conn, append(binary.BigEndian.AppendUint32(nil, 60000), make([]byte, 60000)...))
		return conn, begun
	}
	firstTrickles := func(e *edge) (net.Conn, time.Time) {
		conn, begun := notUsed(e)
		go trickle(conn, append(binary.BigEndian.AppendUint32(nil, 60000), make([]byte, 60000)...))
		return conn, begun
	}
	for name, c := range map[string]struct {
		change func(*Limits)
		begin  func(*edge) (net.Conn, time.Time)
	}{
		"a connection that says nothing":      {func(l *Limits) { l.HandshakeTimeout = short }, quiet},
		"a handshake that trickles":           {func(l *Limits) { l.HandshakeTimeout = short }, handshakeTrickles},
		"a handshake that is not used":        {func(l *Limits) { l.HandshakeTimeout = short }, notUsed},
		"a first request that trickles":       {func(l *Limits) { l.HandshakeTimeout = short }, firstTrickles},
		"one that trickles for a short while": {func(l *Limits) { l.ReadTimeout = short }, firstTrickles},
		"a connection that is idle":           {func(l *Limits) { l.IdleTimeout = short }, idle},
		"a request that trickles":             {func(l *Limits) { l.ReadTimeout = short }, requestTrickles},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := newEdge(t, func(l *Limits) {
				l.HandshakeTimeout, l.ReadTimeout = time.Hour, time.Hour
				l.IdleTimeout, l.WriteTimeout = time.Hour, time.Hour
				c.change(l)
			})
			conn, begun := c.begin(e)
			stop, stopped := make(chan struct{}), make(chan struct{})
			go func() { // another peer is served meanwhile
				defer close(stopped)
				other, err := e.getsIn("127.0.0.3", e.cafe)
				for err == nil {
					select {
					case <-stop:
						other.Close()
						return
					default:
						_, err = exchange(other, ping)
					}
				}
				t.Errorf("another peer: %v", err)
			}()
			lasts(t, name, conn, begun, short)
			close(stop)
			<-stopped
		})
	}
}

// TestReaderThatDoesNotRead: a client that does not read its answers is disconnected when the
// buffers are full. Other peers are answered meanwhile.
func TestReaderThatDoesNotRead(t *testing.T) {
	e := newEdge(t, func(l *Limits) {
		l.WriteTimeout, l.IdleTimeout, l.RequestsPerSecond = time.Second, time.Hour, 1_000_000
	})
	raw := e.raw("127.0.0.2", noise.CountersignV1)
	conn, err := noise.Connect(t.Context(), raw, e.shop, noise.CountersignV1, e.server, nil)
	if err != nil {
		t.Fatal(err)
	}
	answers(t, conn, ping, "")
	var items []any
	for range 100 {
		items = append(items, `{"op":"x"}`)
	}
	large := []byte(batchOf(items...))
	cut := make(chan struct{})
	go func() {
		defer close(cut)
		for conn.WriteMessage(large) == nil {
		}
	}()
	other := e.session("127.0.0.3", e.cafe)
	for open := true; open; {
		select {
		case <-cut:
			open = false
		default:
			answers(t, other, ping, "")
		}
	}
	eventually(t, "the connection is gone", func() bool { return e.status("shop").Connections == 0 })
	again := e.session("127.0.0.2", e.shop)
	answers(t, again, request(1, "m"), "")
}

// TestConnectionLimits: there are limits for all connections, for a source and for a peer. A closed
// connection makes room.
func TestConnectionLimits(t *testing.T) {
	for name, c := range map[string]struct {
		change  func(*Limits)
		from    func(i int) string
		others  func(e *edge) (string, *noise.Identity)
		othersN bool // the others get in
	}{
		"in all": {
			func(l *Limits) { l.Connections, l.Strangers = 4, 4 },
			func(i int) string { return fmt.Sprintf("127.0.1.%d", i+1) },
			func(e *edge) (string, *noise.Identity) { return "127.0.2.1", e.cafe },
			false,
		},
		"of a source": {
			func(l *Limits) { l.ConnectionsPerSource = 4 },
			func(int) string { return "127.0.1.1" },
			func(e *edge) (string, *noise.Identity) { return "127.0.2.1", e.shop },
			true,
		},
		"of a peer": {
			func(l *Limits) { l.ConnectionsPerPeer = 4 },
			func(i int) string { return fmt.Sprintf("127.0.1.%d", i+1) },
			func(e *edge) (string, *noise.Identity) { return "127.0.1.1", e.cafe },
			true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEdge(t, c.change)
			var open []*noise.Conn
			for i := range 4 {
				open = append(open, e.session(c.from(i), e.shop))
			}
			e.staysOut(c.from(4), e.shop)
			from, id := c.others(e)
			if c.othersN {
				answers(t, e.session(from, id), ping, "")
			} else {
				e.staysOut(from, id)
			}
			for _, conn := range open {
				answers(t, conn, ping, "")
			}
			open[0].Close()
			eventually(t, "a place is free", func() bool {
				conn, err := e.getsIn(c.from(4), e.shop)
				if err == nil {
					t.Cleanup(func() { conn.Close() })
				}
				return err == nil
			})
			e.stop()
			if log := logOf(t, e.Appliance, 1); countOf(log, audit.RateLimitTriggered) == 0 {
				t.Error("no event of the refusals")
			}
		})
	}
}

// TestBusy: beyond the requests of a peer, or of all peers, the answer is busy with a retry time. A
// peer without requests under way is served all the same.
func TestBusy(t *testing.T) {
	const three = 3
	for name, change := range map[string]func(*Limits){
		"of a peer": func(l *Limits) { l.RequestsPerPeer = three },
		"in all":    func(l *Limits) { l.Requests = three },
	} {
		t.Run(name, func(t *testing.T) {
			e := newEdge(t, func(l *Limits) { change(l); l.RequestTimeout = time.Hour })
			entered, release := e.heldDevice()
			conn, second := e.session("127.0.0.1", e.shop), e.session("127.0.0.1", e.shop)
			for n := range three {
				conn.WriteMessage([]byte(request(n, "m")))
			}
			eventually(t, "all are in the device", func() bool { return entered.Load() == three })
			for _, document := range []string{ping, request(9, "m"), batchOf(numbered(10, "m"))} {
				a, err := exchange(second, document)
				if err != nil || codeOf(a.Error) != wire.CodeBusy || a.Error.RetryAfter < 1 {
					t.Errorf("%.40s: %+v, %v", document, a, err)
				}
			}
			if other, err := e.shake("127.0.0.2", e.cafe); err != nil {
				t.Error(err)
			} else {
				defer other.Close()
				answers(t, other, ping, "")
			}
			release()
			for range three {
				if a, err := receive(conn); err != nil || a.Error != nil {
					t.Errorf("%+v, %v", a.Error, err)
				}
			}
			eventually(t, "the peer is served again", func() bool {
				a, err := exchange(second, request(9, "m"))
				return err == nil && a.Error == nil
			})
		})
	}
}

// handler returns a session without a connection, for calls of handle.
func (a *Appliance) handler(t *testing.T, name string) *session {
	t.Helper()
	for _, p := range a.Peers.All() {
		if p.Name == name {
			s, err := a.Peers.Enter(p.Keys[0].PublicKey, io.NopCloser(nil), netip.Addr{})
			if err != nil {
				t.Fatal(err)
			}
			return &session{Session: s, caller: Caller{Peer: s.Peer}}
		}
	}
	t.Fatalf("no peer %q", name)
	return nil
}

// answer returns the reply to a message, or nil for none.
func (a *Appliance) answer(s *session, message []byte) *reply {
	r, err := a.take(context.Background(), s, message)
	if err != nil {
		return nil
	}
	return a.handle(s, r)
}

// handled returns the answer to a document.
func handled(t *testing.T, a *Appliance, s *session, document string) wire.Answer {
	t.Helper()
	r := a.answer(s, []byte(document))
	if r == nil {
		t.Fatalf("%.60s: no answer", document)
	}
	var answer wire.Answer
	if err := a.release(s, r, func(b []byte) (err error) {
		scantest.SawPeer("an answer", string(b))
		answer, err = wire.DecodeAnswer(b)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return answer
}

// TestRefusalsAreLimited: refused requests have at most RefusalsPerMinute events, as single
// requests and in batches. Further refusals are counted, with the same answers. Good requests are
// served all the while.
func TestRefusalsAreLimited(t *testing.T) {
	for name, size := range map[string]int{"one by one": 1, "in batches": 100} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRigWith(t, func(l *Limits) { l.RefusalsPerMinute = 60 })
				defer r.ledger.Close()
				shop := r.handler(t, "shop")
				spent := numbered(1_000_000, "m")
				if _, err := r.Sign(t.Context(), r.shop, spent); err != nil {
					t.Fatal(err)
				}
				before := len(logOf(t, r.Appliance, 1))
				n := 0
				refusable := func(item *wire.Sign) string {
					if n++; n%2 == 0 { // a replay, refused by the ledger
						*item = *numbered(1_000_000, fmt.Sprint(n))
						return wire.CodeReplay
					}
					*item = *numbered(n, "m")
					item.Key = "nothing"
					return wire.CodeUnknownKey
				}
				const lasts = 2 * time.Minute
				for end := time.Now().Add(lasts); time.Now().Before(end); time.Sleep(time.Second) {
					items, want := make([]wire.Sign, size), make([]string, size)
					var all []any
					for i := range items {
						want[i] = refusable(&items[i])
						all = append(all, &items[i])
					}
					answer := handled(t, r.Appliance, shop, batchOf(all...))
					var got wire.Answers
					if err := answer.Into(&got); err != nil {
						t.Fatal(err)
					}
					for i, a := range got.Answers {
						if codeOf(a.Error) != want[i] {
							t.Fatalf("item %d: %v, want %s", i, a.Error, want[i])
						}
					}
				}
				for range 5 * 60 * min(size, 2) / 2 { // faster than the limit, also for single requests
					var item wire.Sign
					want := refusable(&item)
					if a := handled(t, r.Appliance, shop, batchOf(&item)); !strings.Contains(string(a.Result), want) {
						t.Fatalf("%s, want %s", a.Result, want)
					}
				}
				grown := len(logOf(t, r.Appliance, 1)) - before
				if most := 60 + 60*int(lasts/time.Minute) + size; grown > most || grown < 60 {
					t.Errorf("%d events of %d refusals, want at most %d", grown, n, most)
				}
				counted := 0
				for _, e := range r.refusals.take(true) {
					replay := e.Outcome == wire.CodeReplay
					if (e.Type == audit.ReplayRefused) != replay || e.Resource != "shop" || e.Action != "sign" {
						t.Errorf("%+v", e)
					}
					some, _ := strconv.Atoi(e.Metadata["count"])
					counted += some
				}
				if counted+grown != n {
					t.Errorf("%d of %d refusals are counted, and %d have an event", counted, n, grown)
				}
				if a := handled(t, r.Appliance, shop, request(2_000_000, "m")); a.Error != nil {
					t.Errorf("beyond the limit a good request: %v", a.Error)
				}
			})
		})
	}
}

// TestPace: beyond the requests per second of a peer, the answer is rate_limited and the request
// has no effect. Other peers are not affected.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRigWith(t, func(l *Limits) { l.RequestsPerSecond, l.BatchItems = 10, 10 })
		defer r.ledger.Close()
		shop, cafe := r.handler(t, "shop"), r.handler(t, "cafe")
		for range 10 {
			if a := handled(t, r.Appliance, shop, ping); a.Error != nil {
				t.Fatal(a.Error)
			}
		}
		a := handled(t, r.Appliance, shop, request(1, "m"))
		if codeOf(a.Error) != wire.CodeRateLimited || a.Error.RetryAfter < 1 {
			t.Errorf("%+v", a.Error)
		}
		if a := handled(t, r.Appliance, cafe, ping); a.Error != nil {
			t.Errorf("another peer: %v", a.Error)
		}
		time.Sleep(time.Second)
		a = handled(t, r.Appliance, shop, request(1, "m"))
		if a.Error != nil || strings.Contains(string(a.Result), `"repeated":true`) {
			t.Errorf("a second later: %s, %v", a.Result, a.Error)
		}
		events := r.refusals.take(true)
		if len(events) != 1 || events[0].Type != audit.RateLimitTriggered || events[0].Resource != "shop" {
			t.Errorf("%+v", events)
		}
	})
}

// TestUnreadable: a message that is no request counts as one, and has no more lines in the log than
// other refusals.
func TestUnreadable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRigWith(t, func(l *Limits) {
			l.RefusalsPerMinute, l.RequestsPerSecond, l.BatchItems = 60, 100, 100
		})
		defer r.ledger.Close()
		var log scantest.Buffer
		r.log = slog.New(slog.NewTextHandler(scantest.Tee("the log", &log), nil))
		shop := r.handler(t, "shop")
		before, limited := len(logOf(t, r.Appliance, 1)), 0
		for range 1000 {
			switch a := handled(t, r.Appliance, shop, `{"id":"1","op":"sign"}`); codeOf(a.Error) {
			case wire.CodeMalformed:
			case wire.CodeRateLimited:
				limited++
			default:
				t.Fatal(a.Error)
			}
		}
		if limited == 0 {
			t.Error("1,000 requests at once are served, and the limit is 100 a second")
		}
		if lines := strings.Count(log.String(), "\n"); lines < 60 || lines > 80 {
			t.Errorf("%d lines of the log", lines)
		}
		if events := r.refusals.take(true); len(events) != 2 || len(logOf(t, r.Appliance, 1)) != before {
			t.Errorf("%+v", events)
		}
	})
}

// TestDeviceThatHoldsHandshakes: a handshake that waits for the device until its timeout ends as
// every refused handshake does, but the log has no refusal of a peer. When the device works again,
// peers get in.
func TestDeviceThatHoldsHandshakes(t *testing.T) {
	e := newEdge(t, func(l *Limits) {
		l.Calls, l.HandshakeTimeout = map[string]int{"memory": 1}, 500*time.Millisecond
	})
	entered, release := e.heldExchanges()
	first, second := e.raw("127.0.0.2", noise.CountersignV1), e.raw("127.0.0.3", noise.CountersignV1)
	first.Write(nonsense)
	eventually(t, "one exchange is in the device", func() bool { return entered.Load() == 1 })
	second.Write(nonsense)
	closes(t, second)
	if n := entered.Load(); n != 1 {
		t.Errorf("%d exchanges are in the device", n)
	}
	text := e.log.String()
	if !strings.Contains(text, "handshakes fail") || strings.Contains(text, `msg="handshake refused"`) {
		t.Errorf("%s", text)
	}
	release()
	closes(t, first)
	answers(t, e.session("127.0.0.3", e.shop), ping, "")
}

// TestTurns: one peer has 200 requests in the queue for the device. The request of another peer
// comes after the calls under way and one request of each other lane.
func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		defer r.ledger.Close()
		r.permits(t, `permit (principal, action == Action::"sign", resource);`)
		var mu sync.Mutex
		var order []string
		gate := make(chan struct{})
		r.store.BeforeSign = func(_ keystore.Ref, message []byte) error {
			mu.Lock()
			order = append(order, string(message))
			mu.Unlock()
			<-gate
			return nil
		}
		shop, cafe := r.handler(t, "shop"), r.handler(t, "cafe")
		for n := range 200 {
			go r.answer(shop, []byte(request(n, "m")))
			synctest.Wait()
		}
		last := numbered(1000, "m")
		doc, err := transcript.Parse(documentOf(last.Document))
		if err != nil {
			t.Fatal(err)
		}
		go r.answer(cafe, []byte(encoded(last)))
		synctest.Wait()
		const others = 1
		before := limits.Calls["memory"] + others
		for range others + 1 {
			gate <- struct{}{}
			synctest.Wait()
		}
		mu.Lock()
		if at := slices.Index(order, string(doc.Message)); at < 0 || at > before {
			t.Errorf("%d of %d operations come before the request, want at most %d", at, len(order), before)
		}
		mu.Unlock()
		close(gate)
		synctest.Wait()
		if len(order) != 201 {
			t.Errorf("%d operations", len(order))
		}
	})
}
