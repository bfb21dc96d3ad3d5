package appliance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"countersign/audit"
	"countersign/internal/keyring"
	"countersign/internal/limit"
	"countersign/noise"
	"countersign/wire"
)

// paced is an appliance that serves connections in memory, for a test with a virtual clock. The
// appliance has one slot at the processor.
type paced struct {
	*rig
	at         pipes
	server     [32]byte
	shop, cafe *noise.Identity
	stop       func()
}

// withPaced runs a test with a virtual clock. At the end, a stop must not take any time.
func withPaced(t *testing.T, change func(*Limits), test func(t *testing.T, p *paced)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		limits := limits
		change(&limits)
		p := &paced{
			rig: newRigOf(t, limits, filepath.Join(t.TempDir(), "ledger.db")),
			at:  pipes{conns: make(chan net.Conn)},
		}
		defer p.ledger.Close()
		p.processor = limit.NewWeighted(1, turnBytes)
		for _, own := range []string{keyring.NoiseName, keyring.LogName} {
			k, err := p.Keys.CreateOwn(t.Context(), operator, own, "memory")
			if err != nil {
				t.Fatal(err)
			}
			if own == keyring.NoiseName {
				p.server = [32]byte(k.Info().PublicKey)
			}
		}
		for name, id := range map[string]**noise.Identity{"market": &p.shop, "kiosk": &p.cafe} {
			*id = newIdentity(t)
			public := (*id).Public()
			if _, err := p.Peers.Add(t.Context(), operator, name, public[:]); err != nil {
				t.Fatal(err)
			}
		}
		if err := p.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		served := make(chan error, 1)
		go func() { served <- p.Serve(ctx, Listener{p.at, noise.CountersignV1}) }()
		stopped := false
		p.stop = func() {
			if stopped {
				return
			}
			stopped = true
			began := time.Now()
			cancel()
			if err := <-served; err != nil {
				t.Errorf("Serve: %v", err)
			}
			if took := time.Since(began); took > busyTime { // the delay of refused answers
				t.Errorf("Serve has ended %v after its context", took)
			}
		}
		defer p.stop()
		test(t, p)
	})
}

// connect opens a session. The ping that proves the session is one message of the peer.
func (p *paced) connect(t *testing.T, id *noise.Identity) *noise.Conn {
	t.Helper()
	ours, theirs := net.Pipe()
	t.Cleanup(func() { ours.Close() })
	p.at.conns <- theirs
	conn, err := noise.Connect(t.Context(), ours, id, noise.CountersignV1, p.server, nil)
	if err != nil {
		t.Fatal(err)
	}
	answers(t, conn, ping, "")
	return conn
}

// flood sends a document again and again until the connection ends. The results count the documents
// that have been read from the connection, and the answers by code.
func flood(conn *noise.Conn, document []byte) (read *atomic.Int64, answered map[string]*atomic.Int64) {
	read = new(atomic.Int64)
	answered = map[string]*atomic.Int64{
		wire.CodeMalformed: new(atomic.Int64), wire.CodeRateLimited: new(atomic.Int64), "": new(atomic.Int64),
	}
	go func() {
		for conn.WriteMessage(document) == nil {
			read.Add(1)
		}
	}()
	go func() {
		for {
			b, err := conn.ReadMessage()
			if err != nil {
				return
			}
			if a, err := wire.DecodeAnswer(b); err == nil {
				answered[codeOf(a.Error)].Add(1)
			}
		}
	}()
	return read, answered
}

// malformed returns a document of a length with many names, which is no request.
func malformed(length int) []byte {
	var b strings.Builder
	b.WriteString(`{"id":"1","op":"sign","payload":[`)
	for b.Len() < length-500 {
		b.WriteString("{")
		for i := range 40 {
			fmt.Fprintf(&b, `"%x":1,`, i)
		}
		b.WriteString(`"":0},`)
	}
	return append([]byte(b.String()+`0]}`), bytes.Repeat([]byte(" "), length-b.Len()-3)...)
}

// TestPaceHoldsMessagesBack: beyond its pace in messages, a peer's messages are not read, on all of
// its connections together. Another peer is served at once.
func TestPaceHoldsMessagesBack(t *testing.T) {
	withPaced(t, func(l *Limits) { l.RequestsPerSecond, l.BatchItems = 5, 5 }, func(t *testing.T, p *paced) {
		var reads []*atomic.Int64
		var refused, malformedAnswers []*atomic.Int64
		var conns []*noise.Conn
		for range 3 {
			conns = append(conns, p.connect(t, p.shop))
		}
		for _, conn := range conns {
			read, answered := flood(conn, malformed(10_000)) // longer than the buffer of a connection
			reads = append(reads, read)
			refused = append(refused, answered[wire.CodeRateLimited])
			malformedAnswers = append(malformedAnswers, answered[wire.CodeMalformed])
		}
		sum := func(all []*atomic.Int64) (n int64) {
			for _, one := range all {
				n += one.Load()
			}
			return n
		}
		other := p.connect(t, p.cafe)
		const seconds, before = 20, 3 // the pings have been read before
		for range seconds {
			time.Sleep(time.Second)
			began := time.Now()
			answers(t, other, request(int(time.Now().Unix()), "m"), wire.CodeDenied)
			if took := time.Since(began); took != 0 {
				t.Errorf("another peer has waited for %v", took)
			}
		}
		time.Sleep(busyTime) // the delay of the last answers
		synctest.Wait()
		// The burst is a second's worth. In 0.1 s one message more is read.
		want := int64(2*5*(seconds+1)) + 1 - before
		if n := sum(reads); n != want {
			t.Errorf("%d messages were read, want %d", n, want)
		}
		served, limited := sum(malformedAnswers), sum(refused)
		if want := int64(5*(seconds+1)) - before; served < want || served > want+1 {
			t.Errorf("%d messages were answered as what they are, want %d", served, want)
		}
		if n := served + limited; n > want || n < want-3 { // the last ones are delayed
			t.Errorf("%d messages were answered, want %d", n, want)
		}
		p.stop()
		p.refusals.flush(t.Context(), p.Appliance)
		if !slices.ContainsFunc(logOf(t, p.Appliance, 1), func(e audit.Event) bool {
			return e.Type == audit.RateLimitTriggered && e.Action == "read" && e.Resource == "market"
		}) {
			t.Error("no event says that messages were held back")
		}
	})
}

// TestPaceInBytes: long messages are held back as many short ones are. No more than the buffer of
// the connection is read of a message that waits.
func TestPaceInBytes(t *testing.T) {
	const length = 1 << 15
	withPaced(t, func(l *Limits) { l.BytesPerSecond = 4 * length }, func(t *testing.T, p *paced) {
		read, _ := flood(p.connect(t, p.shop), malformed(length))
		other := p.connect(t, p.cafe)
		for second := range int64(10) {
			synctest.Wait()
			if n, most := read.Load(), 4+4*second; n > most || n < most-1 {
				t.Errorf("after %d s, %d messages were read, want %d", second, n, most)
			}
			began := time.Now()
			answers(t, other, ping, "")
			if took := time.Since(began); took != 0 {
				t.Errorf("another peer has waited for %v", took)
			}
			time.Sleep(time.Second)
		}
	})
}

// TestTurnAtTheProcessor: while the processor reads one document, long documents of one peer wait,
// and then short documents of another peer, and then a third one. Each gets its turn: the short
// documents have all been read, and no long one, when the third peer has the slot.
func TestTurnAtTheProcessor(t *testing.T) {
	withPaced(t, func(l *Limits) {}, func(t *testing.T, p *paced) {
		first, err := p.processor.Acquire(t.Context(), "first")
		if err != nil {
			t.Fatal(err)
		}
		long, short := p.session(t, "market"), p.session(t, "kiosk")
		var read [2]atomic.Int32
		take := func(i int, s *session, document []byte) {
			go func() {
				r, err := p.take(t.Context(), s, document)
				if err != nil || r.places != 1 {
					t.Errorf("%v, %d places", err, r.places)
				}
				p.Peers.End(s.Member, r.places)
				read[i].Add(1)
			}()
			synctest.Wait()
		}
		for range 5 {
			take(0, long, malformed(60_000))
		}
		for range 5 {
			take(1, short, []byte(ping))
		}
		third := make(chan func())
		go func() {
			release, err := p.processor.Acquire(t.Context(), "third")
			if err != nil {
				t.Error(err)
			}
			third <- release
		}()
		synctest.Wait()
		if read[0].Load() != 0 || read[1].Load() != 0 {
			t.Errorf("%d long and %d short documents have been read without a slot", read[0].Load(), read[1].Load())
		}
		first()
		release := <-third
		synctest.Wait()
		if read[0].Load() != 0 || read[1].Load() != 5 {
			t.Errorf("before the third peer, %d long and %d short documents have been read; want 0 and 5",
				read[0].Load(), read[1].Load())
		}
		release()
		synctest.Wait()
		if of, all := p.Peers.Serving(long.Member); read[0].Load() != 5 || of != 0 || all != 0 {
			t.Errorf("in the end %d long documents have been read, and %d places of %d are held",
				read[0].Load(), of, all)
		}
	})
}

// TestDocumentsWaitForTheTurn: the payload of a request, and a signature to verify, wait for the
// peer's turn too.
func TestDocumentsWaitForTheTurn(t *testing.T) {
	withPaced(t, func(l *Limits) {}, func(t *testing.T, p *paced) {
		sign := numbered(1, "m")
		signed, err := p.Sign(t.Context(), p.rig.shop, sign)
		if err != nil {
			t.Fatal(err)
		}
		verify := &wire.Verify{Document: sign.Document, PublicKey: signed.PublicKey, Signature: signed.Signature}
		doc, err := p.parse(t.Context(), p.rig.shop, sign.Document)
		if err != nil {
			t.Fatal(err)
		}
		for what, act := range map[string]func(ctx context.Context) error{
			"sign":   func(ctx context.Context) error { _, err := p.Sign(ctx, p.rig.shop, sign); return err },
			"verify": func(ctx context.Context) error { _, err := p.Verify(ctx, p.rig.shop, verify); return err },
			"check":  func(ctx context.Context) error { return p.check(ctx, p.rig.shop, doc, verify) },
		} {
			release, err := p.processor.Acquire(t.Context(), "another")
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			began := time.Now()
			err = act(ctx)
			if code := codeOfError(err); code != wire.CodeUnavailable || time.Since(began) != time.Second {
				t.Errorf("%s without a turn: %v after %v", what, err, time.Since(began))
			}
			cancel()
			release()
			if err := act(t.Context()); err != nil {
				t.Errorf("%s: %v", what, err)
			}
		}
	})
}

// codeOfError returns the code of an error for the peer.
func codeOfError(err error) string {
	_, answer := refuse(err)
	return answer.Code
}

// session returns a session of a peer without a connection, for take and handle.
func (p *paced) session(t *testing.T, name string) *session { return p.handler(t, name) }

// TestLetGoWhileWaiting: a peer is removed, or the appliance stops, while messages wait: for the
// pace, for the turn, and for a place in the connection. Neither has to wait for the messages.
func TestLetGoWhileWaiting(t *testing.T) {
	waits := map[string]struct {
		change func(*Limits)
		begin  func(t *testing.T, p *paced) (end func())
	}{
		"for the pace": {
			func(l *Limits) { l.BytesPerSecond = 1 },
			func(t *testing.T, p *paced) func() {
				for _, conn := range []*noise.Conn{p.connect(t, p.shop), p.connect(t, p.shop)} {
					flood(conn, malformed(50_000))
				}
				return func() {}
			},
		},
		"for the turn": {
			func(l *Limits) {},
			func(t *testing.T, p *paced) func() {
				conns := []*noise.Conn{p.connect(t, p.shop), p.connect(t, p.shop)}
				release, err := p.processor.Acquire(t.Context(), "another")
				if err != nil {
					t.Fatal(err)
				}
				for _, conn := range conns {
					flood(conn, malformed(50_000))
				}
				return release
			},
		},
		"for a place in the connection": {
			func(l *Limits) { l.InFlight, l.RequestsPerSecond, l.BatchItems = 1, 1, 1 },
			func(t *testing.T, p *paced) func() {
				flood(p.connect(t, p.shop), malformed(100))
				return func() {}
			},
		},
	}
	ends := map[string]func(t *testing.T, p *paced){
		"removed": func(t *testing.T, p *paced) {
			if err := p.Peers.Remove(t.Context(), operator, "market"); err != nil {
				t.Error(err)
			}
		},
		"suspended": func(t *testing.T, p *paced) {
			if err := p.Peers.Suspend(t.Context(), operator, "market"); err != nil {
				t.Error(err)
			}
		},
		"stopped": func(t *testing.T, p *paced) { p.stop() },
	}
	for wait, w := range waits {
		for how, end := range ends {
			t.Run(how+", "+wait, func(t *testing.T) {
				withPaced(t, w.change, func(t *testing.T, p *paced) {
					release := w.begin(t, p)
					synctest.Wait()
					began := time.Now()
					end(t, p)
					if took := time.Since(began); took > busyTime {
						t.Errorf("it took %v", took)
					}
					time.Sleep(busyTime) // of the request that is being refused
					synctest.Wait()
					for _, s := range p.Peers.All() {
						if s.Name == "market" && s.Connections != 0 {
							t.Errorf("%d connections are open", s.Connections)
						}
					}
					release()
				})
			})
		}
	}
}

// TestPlacesOfABatch: a batch has one place while it is read, and one for each item afterwards. The
// largest batch within the limit is served, and a larger one is busy and holds no place.
func TestPlacesOfABatch(t *testing.T) {
	for name, change := range map[string]func(*Limits){
		"of a peer": func(l *Limits) { l.RequestsPerPeer = 4 },
		"in all":    func(l *Limits) { l.Requests = 4 },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRigWith(t, change)
			shop := r.handler(t, "shop")
			batch := func(n int) []byte {
				return []byte(batchOf(slices.Repeat([]any{`{"op":"x"}`}, n)...))
			}
			waiting, err := r.take(t.Context(), shop, []byte(ping))
			if err != nil {
				t.Fatal(err)
			}
			within, err := r.take(t.Context(), shop, batch(3))
			if err != nil || within.places != 3 {
				t.Fatalf("3 items beside one request: %v, %d places", err, within.places)
			}
			r.Peers.End(shop.Member, within.places)
			beyond, err := r.take(t.Context(), shop, batch(4))
			if _, is := beyond.body.(limited); err != nil || !is || beyond.places != 0 || beyond.id == "" {
				t.Fatalf("4 items beside one request: %v, %+v", err, beyond)
			}
			r.Peers.End(shop.Member, waiting.places)
			if of, all := r.Peers.Serving(shop.Member); of != 0 || all != 0 {
				t.Errorf("%d places of %d are held", of, all)
			}
		})
	}
}

// TestRateOfABatch: the items of a batch count as requests of the second. A batch beyond the rest
// of the second is rate_limited.
func TestRateOfABatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRigWith(t, func(l *Limits) { l.RequestsPerSecond, l.BatchItems = 10, 10 })
		defer r.ledger.Close()
		shop := r.handler(t, "shop")
		items := func(n int) string {
			a := handled(t, r.Appliance, shop, batchOf(slices.Repeat([]any{`{"op":"x"}`}, n)...))
			return codeOf(a.Error)
		}
		if got := []string{items(6), items(4), items(1)}; !slices.Equal(got, []string{"", "", wire.CodeRateLimited}) {
			t.Errorf("6, 4 and 1 items: %q", got)
		}
		time.Sleep(time.Second)
		if got := []string{items(6), items(5)}; !slices.Equal(got, []string{"", wire.CodeRateLimited}) {
			t.Errorf("6 and 5 items: %q", got)
		}
	})
}

// TestMemoryOfMalformedDocuments: four connections send malformed documents of 50 KB as fast as the
// appliance reads them. The heap grows by a few documents, and not by all that are sent.
func TestMemoryOfMalformedDocuments(t *testing.T) {
	e := newEdge(t, func(l *Limits) { l.BytesPerSecond = 1_000_000_000 })
	heap := func() int64 {
		sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
		metrics.Read(sample)
		return int64(sample[0].Value.Uint64())
	}
	defer debug.SetGCPercent(debug.SetGCPercent(10)) // the heap is what is in use, also on a busy machine
	document := malformed(50_000)
	before, most := heap(), int64(0)
	var conns []*noise.Conn
	for range 4 {
		conns = append(conns, e.session("127.0.0.1", e.shop))
	}
	const each = 250
	answered := make(chan error)
	for _, conn := range conns {
		go func() {
			for range each {
				if conn.WriteMessage(document) != nil {
					return
				}
			}
		}()
		go func() {
			for range each {
				a, err := receive(conn)
				if err == nil && codeOf(a.Error) != wire.CodeMalformed {
					err = errors.New(codeOf(a.Error))
				}
				answered <- err
			}
		}()
	}
	for range each * len(conns) {
		if err := <-answered; err != nil {
			t.Fatal(err)
		}
		most = max(most, heap())
	}
	if grown := most - before; grown > 16<<20 {
		t.Errorf("the heap has grown by %d MiB", grown>>20)
	}
}
