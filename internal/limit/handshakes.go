package limit

import (
	"cmp"
	"container/list"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// The reasons of a refusal. Each comes in a *Limited.
var (
	ErrLimited = errors.New("too many handshakes")
	ErrSource  = fmt.Errorf("%w from this address", ErrLimited)
	ErrGlobal  = fmt.Errorf("%w from everywhere", ErrLimited)
	ErrFull    = fmt.Errorf("%w from different addresses", ErrLimited)
)

// Limited is a refusal of Handshakes.
type Limited struct {
	Reason     error         // ErrSource, ErrGlobal or ErrFull
	RetryAfter time.Duration // to try again earlier is useless; later it may succeed
}

func (l *Limited) Error() string { return l.Reason.Error() }
func (l *Limited) Unwrap() error { return l.Reason }

// soon is when to try again if that depends on attempts that are still under way.
const soon = time.Second

// Config is what Handshakes allows. All fields but Waiting and Now must be set.
type Config struct {
	PerSource int           // attempts of one source in any Window
	Global    int           // attempts of all sources in any Window
	Kept      int           // how many of Global only good sources may use
	Window    time.Duration // how long after its beginning a failed attempt counts
	GoodFor   time.Duration // how long after a good session its source is good
	Sources   int           // sources that are remembered at once; above Global, or no source stays good under a flood
	Waiting   int           // attempts of one source that may wait for a place; 64 if zero

	// Now is time.Now if nil. Only differences of its results matter, taken with Sub, which uses the monotonic clock: a step
	// of the system's clock changes nothing. Where there is no monotonic clock, a step backwards stops time here until the
	// clock has caught up: attempts count longer, never shorter.
	Now func() time.Time
}

// Handshakes stands before the work that a handshake costs the HSM. What holds, after every call:
//
//   - An attempt is counted from its Begin, as its source's and as one of all. It is taken out of both counts when it proves
//     good, or when it failed for a reason of ours. Otherwise it leaves them when it has ended and Window has passed since its Begin.
//   - At most PerSource attempts of a source are counted, at most Global in all, and of these at most Global-Kept were begun
//     by sources that were not good then. So a source spends at most PerSource of the global budget, whatever it sends, and
//     a flood from everywhere leaves Kept for those who were good before.
//   - A refused attempt is counted nowhere, so a source that keeps trying is not locked out for longer.
//   - When an attempt proves good, the failed ones of its source are forgotten and the source is good for GoodFor. Whoever
//     shares an address with a peer gets more attempts by that, PerSource for each good session.
//   - Attempts wait only while their source has PerSource counted and one of them is under way. They get their places in the
//     order in which they came. At most Waiting of a source do, and so Waiting*Global/PerSource in all.
//   - At most Sources sources are remembered: those with something counted, of which there are at most Global, and good
//     ones. For a new source the good one that was quiet for the longest is forgotten. Only a good session makes a source
//     good, so a flood can cost no more than Global such marks in all.
//
// A source is an IPv4 address or an IPv6 /64. Who holds a /48 has 65,536 of those: against him stands the global count.
//
// Time is looked at when something is called: a place that time alone has freed goes to a waiter at the next call of anybody,
// and at the latest when an attempt of its source ends. So attempts must be ended, by a deadline if need be.
//
// It is for concurrent use. A call takes time for at most PerSource attempts and Waiting waiters, and for what has expired.
type Handshakes struct {
	config Config
	start  time.Time

	mu        sync.Mutex
	now       time.Duration // since start; never falls
	counted   int           // attempts in all
	strangers int           // those begun by sources that were not good
	recent    list.List     // of *Attempt: those counted that began less than Window ago, oldest first
	live      map[netip.Addr]*source

	// Until when the sources are good that have nothing counted. The one that has been so for the longest comes first, which
	// need not be the first to expire: its turn comes GoodFor later at the latest. simplelru is a map and a list and nothing
	// else; its siblings bring locks, or a clock and a goroutine of their own.
	idle *simplelru.LRU[netip.Addr, time.Duration]
}

// source has something counted.
type source struct {
	addr      netip.Addr
	attempts  []*Attempt // counted, oldest first
	underWay  int        // those of them that have not ended
	waiting   []*waiter
	goodUntil time.Duration
}

type waiter struct {
	source  *source
	ready   chan struct{} // closed when the fields below are set
	attempt *Attempt
	err     error
}

// Attempt is a handshake that may go on. End must be called on it.
type Attempt struct {
	limiter  *Handshakes
	source   *source
	begun    time.Duration
	stranger bool
	ended    bool
	recent   *list.Element // nil when Window has passed since it began
}

// NewHandshakes panics if the numbers make no sense.
func NewHandshakes(c Config) *Handshakes {
	if c.PerSource < 1 || c.Global < 1 || c.Kept < 0 || c.Kept > c.Global || c.Window <= 0 || c.Sources < 1 || c.Waiting < 0 {
		panic(fmt.Sprintf("limit: %+v", c))
	}
	c.Waiting = cmp.Or(c.Waiting, 64)
	if c.Now == nil {
		c.Now = time.Now
	}
	idle, _ := simplelru.NewLRU[netip.Addr, time.Duration](c.Sources, nil)
	return &Handshakes{config: c, start: c.Now(), live: map[netip.Addr]*source{}, idle: idle}
}

// Begin counts an attempt from an address, or refuses it with a *Limited. It waits, until ctx ends, if all that the source has
// too many of is attempts under way: a client that opens many connections at once gets them, PerSource at a time.
func (h *Handshakes) Begin(ctx context.Context, from netip.Addr) (*Attempt, error) {
	attempt, w, err := h.begin(sourceOf(from))
	if w == nil {
		return attempt, err
	}
	select {
	case <-w.ready:
		return w.attempt, w.err
	case <-ctx.Done():
		h.abandon(w)
		return nil, ctx.Err()
	}
}

// Good says that the other side has proved who it is: its first transport message has been decrypted. Before that, message 1
// may have been a recording.
func (a *Attempt) Good() { a.limiter.end(a, good) }

// Forget says that the attempt is over, and that it failed for a reason of ours: it counts no more.
func (a *Attempt) Forget() { a.limiter.end(a, forgotten) }

// End says that the attempt is over. After Good or Forget, or a second time, it does nothing.
func (a *Attempt) End() { a.limiter.end(a, failed) }

// How an attempt ends.
type ending int

const (
	failed ending = iota
	forgotten
	good
)

// Remember says that an address had a good session so long ago, which h has not seen: before a restart. It drives nobody else out.
func (h *Handshakes) Remember(from netip.Addr, ago time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.expire()
	addr := sourceOf(from)
	known, _ := h.idle.Peek(addr)
	until := max(known, h.now+h.config.GoodFor-max(0, ago))
	if until > h.now && h.live[addr] == nil && len(h.live)+h.idle.Len() < h.config.Sources {
		h.idle.Add(addr, until)
	}
}

// IsGood says that an address had a good session within GoodFor.
func (h *Handshakes) IsGood(from netip.Addr) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.expire()
	addr := sourceOf(from)
	if s := h.live[addr]; s != nil {
		return s.goodUntil > h.now
	}
	until, _ := h.idle.Peek(addr)
	return until > h.now
}

// begin gives an attempt, a waiter or a refusal.
func (h *Handshakes) begin(addr netip.Addr) (*Attempt, *waiter, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.expire()
	s := h.live[addr]
	if s == nil {
		goodUntil, _ := h.idle.Peek(addr)
		s = &source{addr: addr, goodUntil: goodUntil} // remembered if it gets a place
	}
	switch {
	case len(s.attempts) < h.config.PerSource: // and so none waits
		a, err := h.take(s)
		return a, nil, err
	case s.underWay == 0:
		return nil, nil, h.sourceRefused(s)
	case len(s.waiting) == h.config.Waiting:
		return nil, nil, &Limited{ErrSource, soon}
	}
	w := &waiter{source: s, ready: make(chan struct{})}
	s.waiting = append(s.waiting, w)
	return nil, w, nil
}

// take counts an attempt of s, which is below its own limit, unless there are too many in all.
func (h *Handshakes) take(s *source) (*Attempt, error) {
	stranger := s.goodUntil <= h.now
	if h.counted == h.config.Global || stranger && h.strangers == h.config.Global-h.config.Kept {
		return nil, h.refused(ErrGlobal)
	}
	if h.live[s.addr] == nil {
		if !h.idle.Remove(s.addr) && len(h.live)+h.idle.Len() == h.config.Sources {
			if _, _, ok := h.idle.RemoveOldest(); !ok {
				return nil, h.refused(ErrFull)
			}
		}
		h.live[s.addr] = s
	}
	a := &Attempt{limiter: h, source: s, begun: h.now, stranger: stranger}
	a.recent = h.recent.PushBack(a)
	s.attempts = append(s.attempts, a)
	s.underWay++
	h.counted++
	if stranger {
		h.strangers++
	}
	return a, nil
}

func (h *Handshakes) sourceRefused(s *source) error {
	return &Limited{ErrSource, s.attempts[0].begun + h.config.Window - h.now}
}

func (h *Handshakes) refused(reason error) error {
	if e := h.recent.Front(); e != nil {
		return &Limited{reason, e.Value.(*Attempt).begun + h.config.Window - h.now}
	}
	return &Limited{reason, soon}
}

func (h *Handshakes) end(a *Attempt, how ending) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if a.ended {
		return
	}
	h.expire()
	s := a.source
	a.ended = true
	s.underWay--
	switch how {
	case good:
		s.goodUntil = h.now + h.config.GoodFor
		h.uncount(s, func(a *Attempt) bool { return a.ended })
	case forgotten:
		h.uncount(s, func(other *Attempt) bool { return other == a })
	default:
		h.uncount(s, over)
	}
	h.settle(s)
}

// abandon is for a waiter that has gone. If it was given a place meanwhile, that has cost nothing and goes on to the next.
func (h *Handshakes) abandon(w *waiter) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.expire()
	s := w.source
	select {
	case <-w.ready:
		if w.attempt != nil {
			w.attempt.ended = true
			s.underWay--
			h.uncount(s, func(a *Attempt) bool { return a == w.attempt })
			h.settle(s)
		}
	default:
		i := slices.Index(s.waiting, w)
		s.waiting = slices.Delete(s.waiting, i, i+1)
	}
}

// expire moves time on.
func (h *Handshakes) expire() {
	h.now = max(h.now, h.config.Now().Sub(h.start))
	var less []*source
	for e := h.recent.Front(); e != nil; e = h.recent.Front() {
		a := e.Value.(*Attempt)
		if h.now-a.begun < h.config.Window {
			break
		}
		h.recent.Remove(e)
		a.recent = nil
		if a.ended {
			h.uncount(a.source, over)
			less = append(less, a.source)
		}
	}
	for _, s := range less { // when all that is over has been taken out: none is refused for what has expired
		h.settle(s)
	}
	for {
		_, until, ok := h.idle.GetOldest()
		if !ok || until > h.now {
			return
		}
		h.idle.RemoveOldest()
	}
}

func over(a *Attempt) bool { return a.ended && a.recent == nil }

func (h *Handshakes) uncount(s *source, which func(*Attempt) bool) {
	s.attempts = slices.DeleteFunc(s.attempts, func(a *Attempt) bool {
		if !which(a) {
			return false
		}
		if a.recent != nil {
			h.recent.Remove(a.recent)
			a.recent = nil
		}
		h.counted--
		if a.stranger {
			h.strangers--
		}
		return true
	})
}

// settle answers those who wait for s, as far as that can be done now, and forgets s if nothing of it is counted.
func (h *Handshakes) settle(s *source) {
	for len(s.waiting) > 0 {
		w := s.waiting[0]
		if len(s.attempts) < h.config.PerSource {
			w.attempt, w.err = h.take(s)
		} else if s.underWay == 0 {
			w.err = h.sourceRefused(s)
		} else {
			return
		}
		s.waiting = slices.Delete(s.waiting, 0, 1)
		close(w.ready)
	}
	if len(s.attempts) == 0 && h.live[s.addr] == s {
		delete(h.live, s.addr)
		if s.goodUntil > h.now {
			h.idle.Add(s.addr, s.goodUntil)
		}
	}
}
