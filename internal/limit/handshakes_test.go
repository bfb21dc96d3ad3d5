package limit

import (
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

type clock struct{ t time.Time }

func (c *clock) now() time.Time { return c.t }

func (c *clock) pass(d time.Duration) { c.t = c.t.Add(d) }

var usual = Config{PerSource: 5, Global: 100, Kept: 25, Window: time.Minute, GoodFor: 24 * time.Hour, Sources: 100_000}

func limiter(c Config) (*Handshakes, *clock) {
	at := &clock{time.Unix(1_800_000_000, 0)}
	c.Now = at.now
	return NewHandshakes(c), at
}

// ipv4 is the nth IPv4 address.
func ipv4(n int) netip.Addr {
	return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, uint32(n))))
}

func begin(t testing.TB, h *Handshakes, from netip.Addr) *Attempt {
	t.Helper()
	a, err := h.Begin(t.Context(), from)
	if err != nil {
		t.Fatalf("attempt from %s: %v", from, err)
	}
	return a
}

func fail(t testing.TB, h *Handshakes, from netip.Addr) {
	t.Helper()
	begin(t, h, from).End()
}

func refused(t testing.TB, h *Handshakes, from netip.Addr, reason error, retry time.Duration) {
	t.Helper()
	_, err := h.Begin(t.Context(), from)
	var l *Limited
	if !errors.Is(err, reason) || !errors.Is(err, ErrLimited) || !errors.As(err, &l) || l.RetryAfter != retry {
		t.Fatalf("attempt from %s: %#v; want %v in %s", from, err, reason, retry)
	}
}

func TestWindowSlidesExactly(t *testing.T) {
	h, at := limiter(usual)
	a := ipv4(1)
	for range 5 {
		fail(t, h, a)
		at.pass(10 * time.Second)
	}
	refused(t, h, a, ErrSource, 10*time.Second)
	at.pass(10*time.Second - 1)
	refused(t, h, a, ErrSource, 1)
	at.pass(1)
	fail(t, h, a)
	refused(t, h, a, ErrSource, 10*time.Second) // until the second of the five attempts expires
}

func TestRefusedAttemptsDoNotCount(t *testing.T) {
	h, at := limiter(usual)
	for range 5 {
		fail(t, h, ipv4(1))
	}
	for n := range 60 {
		refused(t, h, ipv4(1), ErrSource, time.Duration(60-n)*time.Second)
		at.pass(time.Second)
	}
	fail(t, h, ipv4(1))
}

func TestOneSourceLeavesTheGlobalBudget(t *testing.T) {
	h, _ := limiter(usual)
	for range 10_000 {
		if a, err := h.Begin(t.Context(), ipv4(1)); err == nil {
			a.End()
		}
	}
	if h.counted != 5 {
		t.Fatalf("one source spent %d of the global budget", h.counted)
	}
	for n := range 70 { // the budget of 75 for strangers is left, less the 5
		fail(t, h, ipv4(100+n))
	}
	refused(t, h, ipv4(200), ErrGlobal, time.Minute)
	refused(t, h, ipv4(1), ErrSource, time.Minute) // the source's own limit comes first
}

func TestGoodSourceGetsInUnderAFlood(t *testing.T) {
	h, _ := limiter(usual)
	peer := ipv4(1)
	begin(t, h, peer).Good()
	got := 0
	for n := range 100_000 {
		if a, err := h.Begin(t.Context(), ipv4(1000+n)); err == nil {
			a.End()
			got++
		}
		if n%1000 == 0 {
			begin(t, h, peer).Good()
		}
	}
	if got != 75 {
		t.Errorf("%d of a flood got in", got)
	}
	for range 5 {
		begin(t, h, peer) // in progress: these still count
	}
	if h.counted != 80 || h.strangers != 75 {
		t.Errorf("%d counted, %d of strangers", h.counted, h.strangers)
	}
}

func TestGood(t *testing.T) {
	h, at := limiter(usual)
	a := ipv4(1)
	for range 3 {
		fail(t, h, a)
	}
	inProgress, good := begin(t, h, a), begin(t, h, a)
	good.Good()
	good.End()
	good.Good()
	if h.counted != 1 || len(h.active[a].attempts) != 1 {
		t.Fatalf("%d counted; want the one under way", h.counted)
	}
	inProgress.End()
	inProgress.Good() // no effect after End
	if h.counted != 1 {
		t.Fatalf("%d counted; want the one that failed after the good one", h.counted)
	}
	at.pass(time.Minute)
	for range 4 {
		fail(t, h, ipv4(2))
	}
	if h.counted != 4 || len(h.active) != 1 || h.idle.Len() != 1 {
		t.Fatalf("%d counted, %d live, %d idle", h.counted, len(h.active), h.idle.Len())
	}
	at.pass(24*time.Hour - time.Minute - 1)
	begin(t, h, ipv4(3)).End()
	if !h.idle.Contains(a) {
		t.Fatal("the mark of a good source is gone too soon")
	}
	at.pass(1)
	begin(t, h, ipv4(3)).End()
	if h.idle.Len() != 0 {
		t.Fatal("the mark of a good source has not expired")
	}
}

// TestForget checks that a forgotten attempt does not count, does not make its source good, and
// leaves the other attempts of the source counting.
func TestForget(t *testing.T) {
	h, _ := limiter(usual)
	for range 3 {
		fail(t, h, ipv4(1))
	}
	for range 1000 {
		begin(t, h, ipv4(1)).Forget()
	}
	if h.IsGood(ipv4(1)) {
		t.Error("the source is good")
	}
	fail(t, h, ipv4(1))
	fail(t, h, ipv4(1))
	refused(t, h, ipv4(1), ErrSource, time.Minute)
	a := begin(t, h, ipv4(2))
	a.Forget()
	a.Good() // no effect after Forget
	if h.IsGood(ipv4(2)) || h.counted != 5 {
		t.Errorf("good %v, %d counted", h.IsGood(ipv4(2)), h.counted)
	}
	begin(t, h, ipv4(2)).Good()
	if !h.IsGood(ipv4(2)) {
		t.Error("the source is not good")
	}
}

// TestConnections checks the limits on all connections, on those of one source, and on unproven
// ones.
func TestConnections(t *testing.T) {
	c := NewConnections(6, 3, 4)
	open := func(n int, good bool) *Place {
		t.Helper()
		p, err := c.Open(ipv4(n), good)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	full := func(n int, good bool) {
		t.Helper()
		if _, err := c.Open(ipv4(n), good); !errors.Is(err, ErrConnections) {
			t.Fatalf("%v", err)
		}
	}
	first := []*Place{open(1, false), open(1, false), open(1, false)}
	full(1, true) // the limit of one source
	last := open(2, false)
	full(3, false) // the limit on unproven connections
	known := open(3, true)
	first[0].Proven()
	first[0].Proven()
	next := open(4, false)
	full(5, true) // the limit on all connections
	for range 2 {
		first[1].Close()
	}
	open(1, true)
	full(1, true)
	for _, p := range []*Place{first[0], first[2], last, known, next} {
		p.Close()
	}
	if c.open != 1 || c.unproven != 0 || len(c.bySource) != 1 {
		t.Errorf("%d open, %d of strangers, %d sources", c.open, c.unproven, len(c.bySource))
	}
}

func TestKeptIsForGoodSources(t *testing.T) {
	h, at := limiter(usual)
	for n := range 10 {
		begin(t, h, ipv4(n)).Good()
	}
	for n := range 20 { // good sources may use more than Kept
		for range 5 {
			if n < 10 || h.strangers < 50 {
				fail(t, h, ipv4(n))
			}
		}
	}
	if h.counted != 100 || h.strangers != 50 {
		t.Fatalf("%d counted, %d of strangers", h.counted, h.strangers)
	}
	refused(t, h, ipv4(99), ErrGlobal, time.Minute)
	at.pass(24 * time.Hour) // longer than GoodFor
	for n := range 75 {
		fail(t, h, ipv4(n))
	}
	refused(t, h, ipv4(99), ErrGlobal, time.Minute)
}

func TestUnderWayCountsUntilItEnds(t *testing.T) {
	h, at := limiter(usual)
	a := begin(t, h, ipv4(1))
	at.pass(time.Hour)
	fail(t, h, ipv4(2))
	if h.counted != 2 {
		t.Fatalf("%d counted", h.counted)
	}
	a.End()
	a.End()
	if h.counted != 1 || len(h.active) != 1 {
		t.Fatalf("%d counted of %d sources", h.counted, len(h.active))
	}
}

func TestSources(t *testing.T) {
	for _, same := range [][2]string{
		{"192.0.2.1", "::ffff:192.0.2.1"},
		{"2001:db8::1", "2001:db8::ffff:2:3:4"},
		{"fe80::1%eth0", "fe80::2%eth1"},
	} {
		if a, b := sourceOf(netip.MustParseAddr(same[0])), sourceOf(netip.MustParseAddr(same[1])); a != b {
			t.Errorf("%s and %s are %s and %s", same[0], same[1], a, b)
		}
	}
	for _, differ := range [][2]string{
		{"192.0.2.1", "192.0.2.2"}, {"2001:db8::1", "2001:db8:0:1::1"},
		{"0.0.0.0", "::"}, {"192.0.2.1", "::192.0.2.1"},
	} {
		if a, b := sourceOf(netip.MustParseAddr(differ[0])), sourceOf(netip.MustParseAddr(differ[1])); a == b {
			t.Errorf("%s and %s are both %s", differ[0], differ[1], a)
		}
	}
	h, _ := limiter(usual)
	for range 5 {
		fail(t, h, netip.Addr{})
	}
	refused(t, h, netip.Addr{}, ErrSource, time.Minute)
	fail(t, h, netip.IPv6Unspecified())
}

func TestMemoryIsBounded(t *testing.T) {
	c := usual
	c.Sources = 1000
	h, at := limiter(c)
	good := 0
	for n := range 1_000_000 {
		a, err := h.Begin(t.Context(), ipv4(n))
		if err == nil && n%3 == 0 {
			a.Good()
			good++
		} else if err == nil {
			a.End()
		}
		if n%10 == 0 {
			at.pass(time.Second)
		}
		if len(h.active)+h.idle.Len() > 1000 || len(h.active) > 100 || h.recent.Len() > 100 {
			t.Fatalf("after %d sources: %d live, %d idle, %d recent", n, len(h.active), h.idle.Len(), h.recent.Len())
		}
	}
	if h.idle.Len() < 900 || good < 10_000 {
		t.Fatalf("%d idle after %d good ones: the table was not full", h.idle.Len(), good)
	}
	at.pass(24 * time.Hour)
	fail(t, h, ipv4(0))
	if len(h.active)+h.idle.Len() != 1 {
		t.Fatalf("%d live, %d idle a day later", len(h.active), h.idle.Len())
	}
}

// TestAFloodForgetsFewGoodSources has a flood meet a full table. The flood evicts one good source
// for each of its counting attempts, 75 in all, and then reuses the room of its own expired
// sources.
func TestAFloodForgetsFewGoodSources(t *testing.T) {
	c := usual
	c.Sources = 1000
	h, at := limiter(c)
	for n := range 1000 {
		begin(t, h, ipv4(n)).Good()
	}
	for n := range 100_000 {
		if a, err := h.Begin(t.Context(), ipv4(10_000+n)); err == nil {
			a.End()
		}
		at.pass(100 * time.Millisecond)
	}
	if h.idle.Len() != 925 || h.idle.Contains(ipv4(74)) || !h.idle.Contains(ipv4(75)) {
		t.Fatalf("%d good sources are left of 1000, want the last 925", h.idle.Len())
	}
}

func TestFullFailsClosed(t *testing.T) {
	c := usual
	c.Sources = 3
	h, at := limiter(c)
	begin(t, h, ipv4(1)).Good()
	for n := range 3 {
		fail(t, h, ipv4(2+n)) // the third source evicts the good one
		at.pass(time.Second)
	}
	refused(t, h, ipv4(1), ErrFull, 57*time.Second)
	fail(t, h, ipv4(2)) // in the table
	at.pass(57 * time.Second)
	fail(t, h, ipv4(3))
	refused(t, h, ipv4(1), ErrFull, time.Second)
	at.pass(time.Second + 1)
	fail(t, h, ipv4(3))
}

func TestClockStepsBackwards(t *testing.T) {
	h, at := limiter(usual) // without a monotonic clock
	for range 5 {
		fail(t, h, ipv4(1))
	}
	at.pass(30 * time.Second)
	fail(t, h, ipv4(2))
	at.pass(-time.Hour)
	refused(t, h, ipv4(1), ErrSource, 30*time.Second)
	fail(t, h, ipv4(2))
	at.pass(time.Hour + 30*time.Second)
	fail(t, h, ipv4(1))

	if h := NewHandshakes(usual); !strings.Contains(h.start.String(), " m=+") {
		t.Error("times are taken without the monotonic clock")
	}
}

// TestManyGoodAtOnce has a client open 64 connections at once. All are admitted, five at a time,
// first in first out.
func TestManyGoodAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHandshakes(usual)
		var now, most, next atomic.Int32
		began := time.Now()
		for n := range int32(64) {
			go func() {
				a := begin(t, h, ipv4(1))
				defer a.End()
				if order := next.Add(1) - 1; order/5 != n/5 {
					t.Errorf("attempt %d came at place %d", n, order)
				}
				most.Store(max(most.Load(), now.Add(1)))
				time.Sleep(time.Second)
				now.Add(-1)
				a.Good()
			}()
			synctest.Wait()
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if next.Load() != 64 || most.Load() != 5 || h.counted != 0 || len(h.active) != 0 {
			t.Fatalf("%d got in, %d at a time; %d counted after %s",
				next.Load(), most.Load(), h.counted, time.Since(began))
		}
	})
}

func TestWaitersAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHandshakes(usual)
		ctx, cancel := context.WithCancel(t.Context())
		for range 5 {
			begin(t, h, ipv4(1))
		}
		for range 64 {
			go h.Begin(ctx, ipv4(1))
		}
		synctest.Wait()
		refused(t, h, ipv4(1), ErrSource, time.Second)
		if h.counted != 5 {
			t.Errorf("who waits is counted: %d", h.counted)
		}
		cancel()
		synctest.Wait()
		if n := len(h.active[ipv4(1)].queue); n != 0 {
			t.Errorf("%d wait after all have gone", n)
		}
	})
}

func TestWaitersAreRefusedWhenAttemptsFail(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHandshakes(usual)
		var under []*Attempt
		for range 5 {
			under = append(under, begin(t, h, ipv4(1)))
			time.Sleep(time.Second)
		}
		var answers atomic.Int32
		for range 10 {
			go func() {
				refused(t, h, ipv4(1), ErrSource, 55*time.Second)
				answers.Add(1)
			}()
		}
		for _, a := range under {
			synctest.Wait()
			if n := answers.Load(); n != 0 {
				t.Fatalf("%d were refused while one was still under way", n)
			}
			a.End()
		}
		synctest.Wait()
		if n := answers.Load(); n != 10 {
			t.Fatalf("%d of 10 were refused", n)
		}
	})
}

// TestAWaiterMayFindNothingLeft has a source become a stranger while its attempts wait, and other
// strangers use up their budget. The waiters are refused.
func TestAWaiterMayFindNothingLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := usual
		c.GoodFor = time.Second
		h := NewHandshakes(c)
		begin(t, h, ipv4(1)).Good()
		var under []*Attempt
		for range 5 {
			under = append(under, begin(t, h, ipv4(1)))
		}
		answers := make(chan error, 2)
		for range 2 {
			go func() { _, err := h.Begin(t.Context(), ipv4(1)); answers <- err }()
		}
		time.Sleep(time.Minute)
		for n := range 75 {
			fail(t, h, ipv4(100+n))
		}
		under[0].End() // more than Window after Begin: the attempt no longer counts
		for range 2 {
			if err := <-answers; !errors.Is(err, ErrGlobal) {
				t.Fatal(err)
			}
		}
		refused(t, h, ipv4(200), ErrGlobal, time.Minute)
		under[1].Good()
		begin(t, h, ipv4(1)) // the source is good again
	})
}

// TestCancelledWaiters has waiters give up at random moments, also while being admitted.
func TestCancelledWaiters(t *testing.T) {
	h, _ := limiter(usual)
	addr := ipv4(1)
	for range 200 {
		ctx, cancel := context.WithCancel(t.Context())
		var under []*Attempt
		for range 5 {
			under = append(under, begin(t, h, addr))
		}
		done := make(chan struct{})
		for range 10 {
			go func() {
				defer func() { done <- struct{}{} }()
				a, err := h.Begin(ctx, addr)
				if err == nil {
					a.Good()
				} else if !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			}()
		}
		go cancel()
		for _, a := range under {
			runtime.Gosched()
			a.Good()
		}
		for range 10 {
			<-done
		}
		if h.counted != 0 || h.strangers != 0 || len(h.active) != 0 || h.recent.Len() != 0 {
			t.Fatalf("%d counted, %d strangers, %d active, %d recent",
				h.counted, h.strangers, len(h.active), h.recent.Len())
		}
	}
}

// BenchmarkFlood measures one connection of a flood with a full table of good sources.
func BenchmarkFlood(b *testing.B) {
	h, at := limiter(usual)
	for n := range usual.Sources {
		begin(b, h, ipv4(n)).Good()
	}
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		if a, err := h.Begin(b.Context(), ipv4(1<<24+n)); err == nil {
			a.End()
		}
		at.pass(10 * time.Microsecond) // 100,000 a second
	}
}

// BenchmarkGood measures a peer's successful handshake.
func BenchmarkGood(b *testing.B) {
	h, at := limiter(usual)
	b.ReportAllocs()
	for b.Loop() {
		a, err := h.Begin(b.Context(), ipv4(1))
		if err != nil {
			b.Fatal(err)
		}
		a.Good()
		a.End()
		at.pass(time.Millisecond)
	}
}

func BenchmarkMemory(b *testing.B) {
	for b.Loop() {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		h, _ := limiter(usual)
		for n := range usual.Sources {
			begin(b, h, ipv4(n)).Good()
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/float64(usual.Sources), "B/source")
		runtime.KeepAlive(h)
	}
}
