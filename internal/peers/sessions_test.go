package peers

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"countersign/audit"
)

// TestEnterLimit: a peer may have Limits.Connections sessions. One that ends makes room. Other
// peers are not affected.
func TestEnterLimit(t *testing.T) {
	r := newRig(t)
	var open []*Session
	for range limits.Connections {
		s, _ := r.enter(t, shop)
		open = append(open, s)
	}
	s, err := r.Enter(shop, new(conn), netip.Addr{})
	if !errors.Is(err, ErrTooMany) || !errors.Is(err, ErrBusy) || s.Member.Name != "shop" {
		t.Errorf("one session more: %+v, %v", s, err)
	}
	if n := r.All()[1].Connections; n != limits.Connections {
		t.Errorf("%d connections, want %d", n, limits.Connections)
	}
	other, _ := r.enter(t, cafe)
	r.Leave(open[0])
	open[0], _ = r.enter(t, shop)
	if _, err := r.Enter(shop, new(conn), netip.Addr{}); !errors.Is(err, ErrTooMany) {
		t.Errorf("one session more after a change: %v", err)
	}
	if _, err := r.Enter(publicKey(9), new(conn), netip.Addr{}); !errors.Is(err, ErrGone) {
		t.Errorf("a stranger: %v, want %v", err, ErrGone)
	}
	for _, s := range append(open, other) {
		r.Leave(s)
	}
	for _, p := range r.All() {
		if p.Connections != 0 {
			t.Errorf("%+v", p)
		}
	}
}

// TestBeginLimits: each limit holds exactly. A refused Begin counts nothing, and End makes room.
func TestBeginLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		shopAt, _ := r.enter(t, shop)
		cafeAt, _ := r.enter(t, cafe)
		begins := func(s *Session, n int, want error) {
			t.Helper()
			if err := r.Begin(s, n); !errors.Is(err, want) || (err == nil) != (want == nil) {
				t.Errorf("Begin %d of %s: %v, want %v", n, s.Member.Name, err, want)
			}
		}
		serving := func(wantShop, wantAll int) {
			t.Helper()
			if n, all := r.Serving(shopAt.Member); n != wantShop || all != wantAll {
				t.Errorf("%d of %d requests being served are the shop's, want %d of %d", n, all, wantShop, wantAll)
			}
		}
		of := limits.RequestsOfPeer // of 10 in all
		begins(shopAt, 0, nil)
		begins(shopAt, of+1, ErrBusy)
		serving(0, 0)
		begins(shopAt, of, nil)
		begins(shopAt, 0, nil)
		begins(shopAt, 1, ErrBusy)
		serving(of, of)
		begins(cafeAt, of, nil)
		begins(cafeAt, 1, ErrBusy)
		serving(of, 2*of)
		r.End(shopAt.Member, 1)
		begins(shopAt, 2, ErrBusy)
		begins(shopAt, 1, nil)
		serving(of, 2*of)
		r.End(shopAt.Member, of)
		r.End(cafeAt.Member, of)
		serving(0, 0)
		r.Leave(shopAt)
		r.Leave(cafeAt)
	})
}

// TestBeginLimitOfAll: the limit of all peers holds for a peer with requests under way. A peer
// without any gets in beyond the limit.
func TestBeginLimitOfAll(t *testing.T) {
	small := limits
	small.Requests, small.RequestsOfPeer = 4, 4
	r := newRigIn(t, t.TempDir(), small)
	shopAt, _ := r.enter(t, shop)
	cafeAt, _ := r.enter(t, cafe)
	for _, step := range []struct {
		s    *Session
		n    int
		want error
	}{
		{shopAt, 1, nil},
		{cafeAt, 3, nil}, // 4 in all
		{shopAt, 1, ErrBusy},
		{cafeAt, 1, ErrBusy},
	} {
		if err := r.Begin(step.s, step.n); !errors.Is(err, step.want) {
			t.Errorf("Begin %d of %s: %v, want %v", step.n, step.s.Member.Name, err, step.want)
		}
	}
	r.End(shopAt.Member, 1)
	if err := r.Begin(shopAt, 4); err != nil {
		t.Errorf("a peer without requests, at 3 of 4 in all: %v", err)
	}
	if _, all := r.Serving(shopAt.Member); all != 7 {
		t.Errorf("%d requests, want 7", all)
	}
	r.End(cafeAt.Member, 3)
	if err := r.Begin(cafeAt, 4); err != nil {
		t.Errorf("a peer without requests, at 4 of 4 in all: %v", err)
	}
	if err := r.Begin(cafeAt, 1); !errors.Is(err, ErrBusy) {
		t.Errorf("a peer with requests, at 8 of 4 in all: %v, want %v", err, ErrBusy)
	}
}

// TestBeginRate: the token bucket of a peer has room for the larger of a second's requests and one
// batch, and fills at the rate of the limit.
func TestBeginRate(t *testing.T) {
	for name, c := range map[string]struct{ perSecond, batch, burst int }{
		"a second is more than a batch": {20, 10, 20},
		"a batch is more than a second": {10, 20, 20},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				many := Limits{Connections: 2, Requests: 1000, RequestsOfPeer: 1000, RefusalsPerMinute: 60}
				many.RequestsPerSecond, many.BatchItems = c.perSecond, c.batch
				r := newRigIn(t, t.TempDir(), many)
				s, _ := r.enter(t, shop)
				other, _ := r.enter(t, cafe)
				begin := func(s *Session, n int) error {
					err := r.Begin(s, n)
					if err == nil {
						r.End(s.Member, n)
					}
					return err
				}
				if err := begin(s, c.burst+1); !errors.Is(err, ErrRate) {
					t.Errorf("%d at once: %v, want %v", c.burst+1, err, ErrRate)
				}
				if err := begin(s, c.burst); err != nil {
					t.Errorf("%d at once: %v", c.burst, err)
				}
				if err := begin(s, 0); err != nil {
					t.Errorf("none: %v", err)
				}
				if err := begin(s, 1); !errors.Is(err, ErrRate) {
					t.Errorf("one more: %v, want %v", err, ErrRate)
				}
				if err := begin(other, c.burst); err != nil {
					t.Errorf("another peer: %v", err)
				}
				time.Sleep(time.Second)
				for range c.perSecond {
					if err := begin(s, 1); err != nil {
						t.Fatalf("a second later: %v", err)
					}
				}
				if err := begin(s, 1); !errors.Is(err, ErrRate) {
					t.Errorf("one more a second later: %v, want %v", err, ErrRate)
				}
				if n, all := r.Serving(s.Member); n != 0 || all != 0 {
					t.Errorf("%d of %d requests are being served", n, all)
				}
			})
		})
	}
}

// TestWake: each open session gets one signal, however often Wake is called before the session
// reads it.
func TestWake(t *testing.T) {
	r := newRig(t)
	first, _ := r.enter(t, shop)
	second, _ := r.enter(t, cafe)
	gone, _ := r.enter(t, cafe)
	r.Leave(gone)
	for range 3 {
		r.Wake()
	}
	for s, want := range map[*Session]int{first: 1, second: 1, gone: 0} {
		if got := len(s.News); got != want {
			t.Errorf("%d signals, want %d", got, want)
		}
	}
}

// TestMore: the items of a batch count beside the place that the batch has already. The batch of a
// peer without other requests gets in beyond the limit of all peers, as its first place does.
func TestMore(t *testing.T) {
	small := limits
	small.Requests, small.RequestsOfPeer = 6, 5
	r := newRigIn(t, t.TempDir(), small)
	shopAt, _ := r.enter(t, shop)
	cafeAt, _ := r.enter(t, cafe)
	for _, step := range []struct {
		act  func(*Session, int) error
		s    *Session
		n    int
		want error
	}{
		{r.Begin, cafeAt, 4, nil},
		{r.Begin, shopAt, 1, nil},
		{r.More, shopAt, 5, ErrBusy}, // more than RequestsOfPeer
		{r.More, shopAt, 2, nil},     // 7 of 6 in all
		{r.Begin, shopAt, 1, ErrBusy},
		{r.More, cafeAt, 1, ErrBusy}, // the cafe has other requests
	} {
		if err := step.act(step.s, step.n); !errors.Is(err, step.want) || (err == nil) != (step.want == nil) {
			t.Errorf("%d of %s: %v, want %v", step.n, step.s.Member.Name, err, step.want)
		}
	}
	if of, all := r.Serving(shopAt.Member); of != 3 || all != 7 {
		t.Errorf("%d of %d, want 3 of 7", of, all)
	}
	r.End(shopAt.Member, 3)
	r.End(cafeAt.Member, 4)
	r.Leave(shopAt)
	r.Leave(cafeAt)
	if err := r.Remove(t.Context(), audit.Operator("test"), "shop"); err != nil {
		t.Fatal(err)
	}
	if err := r.More(shopAt, 1); !errors.Is(err, ErrGone) {
		t.Errorf("an item of a removed peer: %v", err)
	}
}

// TestPace: messages and bytes are paced exactly, for all callers of a member together and for no
// other member. A wait that is given up takes nothing of the pace.
func TestPace(t *testing.T) {
	for name, c := range map[string]struct {
		perSecond, bytes, length, burst int
		every                           time.Duration
	}{
		"in messages":                   {5, 1_000_000, 10, 10, 100 * time.Millisecond},
		"in bytes":                      {1000, 100_000, 50_000, 2, 500 * time.Millisecond},
		"in bytes, below the longest":   {1000, longest / 8, longest, 1, 8 * time.Second},
		"in bytes, of the longest":      {1000, longest, longest, 1, time.Second},
		"in bytes, longer than allowed": {1000, longest, 2 * longest, 1, time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				paced := limits
				paced.RequestsPerSecond, paced.BytesPerSecond = c.perSecond, c.bytes
				r := newRigIn(t, t.TempDir(), paced)
				s, _ := r.enter(t, shop)
				other, _ := r.enter(t, cafe)
				began := time.Now()
				done := make(chan time.Duration)
				for range c.burst + 4 {
					go func() {
						held, err := s.Member.Pace(t.Context(), c.length)
						if held != (time.Since(began) > 0) || err != nil {
							t.Errorf("held %v after %v, %v", held, time.Since(began), err)
						}
						done <- time.Since(began)
					}()
				}
				for n := range c.burst + 4 {
					want := time.Duration(max(0, n+1-c.burst)) * c.every
					if got := <-done; got.Round(time.Microsecond) != want {
						t.Errorf("message %d is read after %v, want %v", n, got, want)
					}
				}
				ctx, cancel := context.WithCancel(t.Context())
				go cancel()
				if held, err := s.Member.Pace(ctx, c.length); !held || !errors.Is(err, context.Canceled) {
					t.Errorf("a wait that is given up: held %v, %v", held, err)
				}
				now := time.Now()
				s.Member.Pace(t.Context(), c.length)
				if took := time.Since(now); took.Round(time.Microsecond) > c.every {
					t.Errorf("the message after a wait that is given up: %v", took)
				}
				if held, err := other.Member.Pace(t.Context(), c.length); held || err != nil {
					t.Errorf("another member: held %v, %v", held, err)
				}
				r.Leave(s)
				r.Leave(other)
			})
		})
	}
}
