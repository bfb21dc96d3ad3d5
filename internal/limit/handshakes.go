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

// Reasons of a refusal. Each comes in a *Limited.
var (
	ErrLimited = errors.New("too many handshakes")
	ErrSource  = fmt.Errorf("%w from this address", ErrLimited)
	ErrGlobal  = fmt.Errorf("%w from everywhere", ErrLimited)
	ErrFull    = fmt.Errorf("%w from different addresses", ErrLimited)
)

// Limited is a refusal of Handshakes.
type Limited struct {
	Reason     error         // ErrSource, ErrGlobal or ErrFull
	RetryAfter time.Duration // wait before a retry: an earlier one is useless, a later one may succeed
}

func (l *Limited) Error() string { return l.Reason.Error() }
func (l *Limited) Unwrap() error { return l.Reason }

// retrySoon is the RetryAfter of a refusal whose end depends on attempts still in progress.
const retrySoon = time.Second

// Config has the limits of Handshakes. All fields but Waiting and Now must be set.
type Config struct {
	PerSource int           // attempts of one source in any Window
	Global    int           // attempts of all sources in any Window
	Kept      int           // the part of Global reserved for good sources
	Window    time.Duration // a failed attempt counts for this long after its Begin
	GoodFor   time.Duration // a source is good for this long after a good session
	Sources   int           // size of the source table; must exceed Global, or a flood evicts every good source
	Waiting   int           // queue length of one source; 64 if zero

	// Now is time.Now if nil. Handshakes uses only differences between its results, by Time.Sub and
	// so by the monotonic clock: steps of the system's clock have no effect. Without a monotonic
	// clock, a step backwards stops the time of Handshakes until the clock has caught up. Attempts
	// then count longer, never shorter.
	Now func() time.Time
}

// Handshakes is a rate limiter in front of the handshakes, since each handshake costs the HSM two
// key exchanges. The limiter is a sliding window per source and a global one. Handshakes is safe
// for concurrent use.
//
// A source is an IPv4 address or an IPv6 /64. A session is good once its peer is proven
// (Attempt.Good). A source is good for GoodFor after a good session, and a stranger otherwise. The
// owner of an IPv6 /48 has 65,536 sources: the global limit is the protection against such an
// owner.
//
// Invariants, after every call:
//
//   - An attempt counts from its Begin, for its source and globally. Good and Forget end the
//     counting at once. A failed attempt counts until its End, and at least for Window.
//   - At most PerSource attempts of one source count, and at most Global attempts in all. Of these,
//     at most Global-Kept were begun by strangers. So one source uses at most PerSource of the
//     global budget, whatever the source sends, and a flood from many addresses leaves Kept
//     attempts for good sources.
//   - A refused attempt does not count, so retries do not prolong a refusal.
//   - Good forgets the failed attempts of its source and makes the source good. Another client
//     behind a peer's address (NAT) therefore has more attempts: PerSource for each good session.
//   - An attempt waits only while PerSource attempts of its source count and one of these is in
//     progress. The queue is first in, first out, with at most Waiting attempts per source, and so
//     at most Waiting*Global/PerSource in all.
//   - The table has at most Sources sources: active ones with counting attempts, at most Global,
//     and idle good ones. A new source evicts the good source idle for the longest time. Only a
//     good session makes a source good, so a flood can evict at most Global good sources in all.
//
// There is no timer: time advances in calls only. Room freed by time goes to a waiter at the next
// call from any source, at the latest when an attempt of the waiter's source ends. So every attempt
// must end, by a deadline if need be.
//
// A call takes time for at most PerSource attempts and Waiting waiters, and for the expired
// attempts.
type Handshakes struct {
	config Config
	start  time.Time

	mu        sync.Mutex
	now       time.Duration // since start; never decreases
	counted   int           // counting attempts of all sources
	strangers int           // counting attempts begun by strangers
	recent    list.List     // of *Attempt: counting attempts begun within Window, oldest first
	active    map[netip.Addr]*source

	// idle has the good sources without a counting attempt, with their goodUntil. The source idle
	// for the longest time comes first, and another may expire earlier. expire removes sources
	// from the front only, so an expired source stays for at most GoodFor. simplelru is just a map
	// and a list: the other packages of its module bring locks, or a clock and a goroutine.
	idle *simplelru.LRU[netip.Addr, time.Duration]
}

// source is an active source: at least one of its attempts counts.
type source struct {
	addr       netip.Addr
	attempts   []*Attempt // counting, oldest first
	inProgress int        // attempts without an end
	queue      []*waiter
	goodUntil  time.Duration // since Handshakes.start
}

// waiter is a Begin in the queue of its source.
type waiter struct {
	source  *source
	ready   chan struct{} // closed when attempt or err is set
	attempt *Attempt
	err     error
}

// Attempt is an admitted handshake. The handshake's owner must call End.
type Attempt struct {
	limiter  *Handshakes
	source   *source
	begun    time.Duration // since Handshakes.start
	stranger bool          // the source was a stranger at Begin
	ended    bool
	recent   *list.Element // in Handshakes.recent; nil once Window has passed since Begin
}

// NewHandshakes makes a limiter. NewHandshakes panics if a limit is below 1 (Kept and Waiting:
// below 0) or Kept is above Global.
func NewHandshakes(c Config) *Handshakes {
	if c.PerSource < 1 || c.Global < 1 || c.Kept < 0 || c.Kept > c.Global || c.Window <= 0 ||
		c.Sources < 1 || c.Waiting < 0 {
		panic(fmt.Sprintf("limit: %+v", c))
	}
	c.Waiting = cmp.Or(c.Waiting, 64)
	if c.Now == nil {
		c.Now = time.Now
	}
	idle, _ := simplelru.NewLRU[netip.Addr, time.Duration](c.Sources, nil)
	return &Handshakes{config: c, start: c.Now(), active: map[netip.Addr]*source{}, idle: idle}
}

// Begin admits an attempt from an address, or refuses with a *Limited. If the source is at its
// limit and one of its attempts is in progress, Begin waits in a queue until ctx ends. So a client
// may open many connections at once: PerSource handshakes run at a time, and the others wait.
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

// Good ends the attempt and marks its source as good. The caller must have decrypted the first
// transport message of the peer: without one, message 1 may be a replay of a recorded handshake.
func (a *Attempt) Good() { a.limiter.end(a, good) }

// Forget ends an attempt that failed for a reason of the appliance's own. The attempt no longer
// counts.
func (a *Attempt) Forget() { a.limiter.end(a, forgotten) }

// End ends a failed attempt. End after Good, Forget or End has no effect, so callers may defer End.
func (a *Attempt) End() { a.limiter.end(a, failed) }

// outcome is the way in which an attempt ends.
type outcome int

const (
	failed outcome = iota
	forgotten
	good
)

// Remember marks a source as good for a session before a restart, ago before now. A full table is
// left alone: Remember evicts no source.
func (h *Handshakes) Remember(from netip.Addr, ago time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.expire()
	addr := sourceOf(from)
	known, _ := h.idle.Peek(addr)
	until := max(known, h.now+h.config.GoodFor-max(0, ago))
	if until > h.now && h.active[addr] == nil && len(h.active)+h.idle.Len() < h.config.Sources {
		h.idle.Add(addr, until)
	}
}

// IsGood reports a source with a good session within GoodFor.
func (h *Handshakes) IsGood(from netip.Addr) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.expire()
	addr := sourceOf(from)
	if s := h.active[addr]; s != nil {
		return s.goodUntil > h.now
	}
	until, _ := h.idle.Peek(addr)
	return until > h.now
}

// begin returns one of three: an attempt, a waiter or a refusal.
func (h *Handshakes) begin(addr netip.Addr) (*Attempt, *waiter, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.expire()
	s := h.active[addr]
	if s == nil {
		goodUntil, _ := h.idle.Peek(addr)
		s = &source{addr: addr, goodUntil: goodUntil} // not in the table before admit
	}
	switch {
	case len(s.attempts) < h.config.PerSource: // then the queue is empty
		a, err := h.admit(s)
		return a, nil, err
	case s.inProgress == 0:
		return nil, nil, h.sourceRefusal(s)
	case len(s.queue) == h.config.Waiting:
		return nil, nil, &Limited{ErrSource, retrySoon}
	}
	w := &waiter{source: s, ready: make(chan struct{})}
	s.queue = append(s.queue, w)
	return nil, w, nil
}

// admit counts an attempt of s, or refuses by the global limits. The caller has checked the limit
// of s.
func (h *Handshakes) admit(s *source) (*Attempt, error) {
	stranger := s.goodUntil <= h.now
	if h.counted == h.config.Global || stranger && h.strangers == h.config.Global-h.config.Kept {
		return nil, h.refusal(ErrGlobal)
	}
	if h.active[s.addr] == nil {
		if !h.idle.Remove(s.addr) && len(h.active)+h.idle.Len() == h.config.Sources {
			if _, _, ok := h.idle.RemoveOldest(); !ok {
				return nil, h.refusal(ErrFull)
			}
		}
		h.active[s.addr] = s
	}
	a := &Attempt{limiter: h, source: s, begun: h.now, stranger: stranger}
	a.recent = h.recent.PushBack(a)
	s.attempts = append(s.attempts, a)
	s.inProgress++
	h.counted++
	if stranger {
		h.strangers++
	}
	return a, nil
}

// sourceRefusal is the refusal of a source at its limit, until its oldest attempt has left the
// window.
func (h *Handshakes) sourceRefusal(s *source) error {
	return &Limited{ErrSource, s.attempts[0].begun + h.config.Window - h.now}
}

// refusal is a global refusal, until the oldest attempt of all has left the window.
func (h *Handshakes) refusal(reason error) error {
	if e := h.recent.Front(); e != nil {
		return &Limited{reason, e.Value.(*Attempt).begun + h.config.Window - h.now}
	}
	return &Limited{reason, retrySoon}
}

// end ends an attempt, once.
func (h *Handshakes) end(a *Attempt, how outcome) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if a.ended {
		return
	}
	h.expire()
	s := a.source
	a.ended = true
	s.inProgress--
	switch how {
	case good:
		s.goodUntil = h.now + h.config.GoodFor
		h.uncount(s, func(a *Attempt) bool { return a.ended })
	case forgotten:
		h.uncount(s, func(other *Attempt) bool { return other == a })
	default:
		h.uncount(s, expired)
	}
	h.sourceChanged(s)
}

// abandon withdraws a waiter whose context has ended. An attempt admitted at that moment does not
// count, and its room goes to the next waiter.
func (h *Handshakes) abandon(w *waiter) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.expire()
	s := w.source
	select {
	case <-w.ready:
		if w.attempt != nil {
			w.attempt.ended = true
			s.inProgress--
			h.uncount(s, func(a *Attempt) bool { return a == w.attempt })
			h.sourceChanged(s)
		}
	default:
		i := slices.Index(s.queue, w)
		s.queue = slices.Delete(s.queue, i, i+1)
	}
}

// expire advances the time, uncounts the attempts expired since, and answers their waiters.
func (h *Handshakes) expire() {
	h.now = max(h.now, h.config.Now().Sub(h.start))
	var changed []*source
	for e := h.recent.Front(); e != nil; e = h.recent.Front() {
		a := e.Value.(*Attempt)
		if h.now-a.begun < h.config.Window {
			break
		}
		h.recent.Remove(e)
		a.recent = nil
		if a.ended {
			h.uncount(a.source, expired)
			changed = append(changed, a.source)
		}
	}
	for _, s := range changed { // after all have been uncounted, or a waiter could be refused for an expired attempt
		h.sourceChanged(s)
	}
	for {
		_, until, ok := h.idle.GetOldest()
		if !ok || until > h.now {
			return
		}
		h.idle.RemoveOldest()
	}
}

// expired reports a failed attempt whose window has passed.
func expired(a *Attempt) bool { return a.ended && a.recent == nil }

// uncount stops counting the matching attempts of s.
func (h *Handshakes) uncount(s *source, matches func(*Attempt) bool) {
	s.attempts = slices.DeleteFunc(s.attempts, func(a *Attempt) bool {
		if !matches(a) {
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

// sourceChanged follows every change of a source's attempts. The queue of s is answered as far as
// possible: admitted, or refused if no attempt is in progress. A source without a counting attempt
// becomes idle if good, or is forgotten.
func (h *Handshakes) sourceChanged(s *source) {
	for len(s.queue) > 0 {
		w := s.queue[0]
		if len(s.attempts) < h.config.PerSource {
			w.attempt, w.err = h.admit(s)
		} else if s.inProgress == 0 {
			w.err = h.sourceRefusal(s)
		} else {
			return
		}
		s.queue = slices.Delete(s.queue, 0, 1)
		close(w.ready)
	}
	if len(s.attempts) == 0 && h.active[s.addr] == s {
		delete(h.active, s.addr)
		if s.goodUntil > h.now {
			h.idle.Add(s.addr, s.goodUntil)
		}
	}
}
