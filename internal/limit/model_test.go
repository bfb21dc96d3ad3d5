package limit

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// model is a slow reference implementation of Handshakes. The model keeps every attempt for ever
// and counts again for each question. Time has a granularity of seconds.
type model struct {
	Config
	started   time.Time
	now       time.Duration
	attempts  []*modelAttempt
	waiters   []*modelWaiter
	goodUntil map[netip.Addr]time.Duration
	idle      []netip.Addr // good sources without a counting attempt, idle for the longest first
}

type modelAttempt struct {
	addr                   netip.Addr
	begun                  time.Duration
	stranger, ended, spent bool
}

type modelWaiter struct {
	addr     netip.Addr
	answered bool
	attempt  *modelAttempt
	err      error
}

func (m *model) count(which func(*modelAttempt) bool) (n int) {
	for _, a := range m.attempts {
		if !a.spent && which(a) {
			n++
		}
	}
	return n
}

func (m *model) of(addr netip.Addr) int {
	return m.count(func(a *modelAttempt) bool { return a.addr == addr })
}

func (m *model) inProgress(addr netip.Addr) int {
	return m.count(func(a *modelAttempt) bool { return a.addr == addr && !a.ended })
}

func (m *model) all() int {
	return m.count(func(*modelAttempt) bool { return true })
}

func (m *model) strangers() int {
	return m.count(func(a *modelAttempt) bool { return a.stranger })
}

func (m *model) active() int {
	seen := map[netip.Addr]bool{}
	for _, a := range m.attempts {
		if !a.spent {
			seen[a.addr] = true
		}
	}
	return len(seen)
}

func (m *model) queue(addr netip.Addr) (q []*modelWaiter) {
	for _, w := range m.waiters {
		if w.addr == addr && !w.answered {
			q = append(q, w)
		}
	}
	return q
}

// expire advances the time and applies the consequences.
func (m *model) expire() {
	m.now = max(m.now, m.Now().Sub(m.started))
	var changed []netip.Addr
	for _, a := range m.attempts {
		if !a.spent && a.ended && m.now >= a.begun+m.Window {
			a.spent = true
			changed = append(changed, a.addr)
		}
	}
	for _, addr := range changed {
		m.sourceChanged(addr)
	}
	for len(m.idle) > 0 && m.goodUntil[m.idle[0]] <= m.now {
		m.idle = m.idle[1:]
	}
}

func (m *model) sourceChanged(addr netip.Addr) {
	for _, w := range m.queue(addr) {
		if m.of(addr) < m.PerSource {
			w.attempt, w.err = m.admit(addr)
		} else if m.inProgress(addr) == 0 {
			w.err = ErrSource
		} else {
			break
		}
		w.answered = true
	}
	if m.of(addr) == 0 && !slices.Contains(m.idle, addr) && m.goodUntil[addr] > m.now {
		m.idle = append(m.idle, addr)
	}
}

func (m *model) admit(addr netip.Addr) (*modelAttempt, error) {
	stranger := m.goodUntil[addr] <= m.now
	if m.all() == m.Global || stranger && m.strangers() == m.Global-m.Kept {
		return nil, ErrGlobal
	}
	if i := slices.Index(m.idle, addr); i >= 0 {
		m.idle = slices.Delete(m.idle, i, i+1)
	} else if m.of(addr) == 0 && m.active()+len(m.idle) == m.Sources {
		if len(m.idle) == 0 {
			return nil, ErrFull
		}
		delete(m.goodUntil, m.idle[0])
		m.idle = m.idle[1:]
	}
	a := &modelAttempt{addr: addr, begun: m.now, stranger: stranger}
	m.attempts = append(m.attempts, a)
	return a, nil
}

func (m *model) begin(addr netip.Addr) (*modelAttempt, *modelWaiter, error) {
	m.expire()
	switch {
	case m.of(addr) < m.PerSource:
		a, err := m.admit(addr)
		return a, nil, err
	case m.inProgress(addr) == 0 || len(m.queue(addr)) == m.Waiting:
		return nil, nil, ErrSource
	}
	w := &modelWaiter{addr: addr}
	m.waiters = append(m.waiters, w)
	return nil, w, nil
}

func (m *model) end(a *modelAttempt, good bool) {
	if a.ended {
		return
	}
	m.expire()
	a.ended = true
	if good {
		m.goodUntil[a.addr] = m.now + m.GoodFor
	}
	for _, other := range m.attempts {
		if other.addr == a.addr && other.ended && (good || m.now >= other.begun+m.Window) {
			other.spent = true
		}
	}
	m.sourceChanged(a.addr)
}

func (m *model) abandon(w *modelWaiter) {
	m.expire()
	if !w.answered {
		w.answered, w.err = true, errors.New("gone")
	} else if w.attempt != nil {
		w.attempt.ended, w.attempt.spent = true, true
		m.sourceChanged(w.addr)
	}
}

// same runs a sequence of operations on Handshakes and on the model, and compares the two. An
// operation is a byte: the low three bits are its kind, the others its argument.
func same(t *testing.T, ops []byte) {
	c := Config{PerSource: 3, Global: 7, Kept: 2, Sources: 4, Waiting: 2,
		Window: 10 * time.Second, GoodFor: 25 * time.Second}
	if len(ops) > 0 && ops[0]&1 != 0 { // a small table of sources hides the other limits
		c.Sources = 100
	}
	h, at := limiter(c)
	m := &model{Config: h.config, started: at.t, goodUntil: map[netip.Addr]time.Duration{}}
	type pair struct {
		a *Attempt
		m *modelAttempt
	}
	type waiting struct {
		w *waiter
		m *modelWaiter
	}
	var attempts []pair
	var waiters []waiting
	for i, op := range ops {
		arg := int(op >> 3)
		switch op & 7 {
		case 0, 1, 2:
			addr := ipv4(arg % 6)
			a, w, err := h.begin(addr)
			ma, mw, merr := m.begin(addr)
			if (a == nil) != (ma == nil) || (w == nil) != (mw == nil) || !errors.Is(err, merr) {
				t.Fatalf("operation %d, begin from %s: %v %v %v; the model says %v %v %v",
					i, addr, a, w, err, ma, mw, merr)
			}
			if a != nil {
				attempts = append(attempts, pair{a, ma})
			}
			if w != nil {
				waiters = append(waiters, waiting{w, mw})
			}
		case 3, 4, 5: // one of the last 32 attempts, possibly ended
			if len(attempts) > 0 {
				p := attempts[len(attempts)-1-arg%len(attempts)]
				if op&7 == 3 {
					p.a.Good()
				} else {
					p.a.End()
				}
				m.end(p.m, op&7 == 3)
			}
		case 6:
			if len(waiters) > 0 {
				n := arg % len(waiters)
				h.abandon(waiters[n].w)
				m.abandon(waiters[n].m)
				waiters = slices.Delete(waiters, n, n+1)
			}
		case 7:
			at.pass(time.Duration(arg-4) * time.Second) // -4 s to 27 s
		}
		waiters = slices.DeleteFunc(waiters, func(w waiting) bool {
			select {
			case <-w.w.ready:
			default:
				if w.m.answered {
					t.Fatalf("operation %d: a waiter has no answer; the model says %v %v", i, w.m.attempt, w.m.err)
				}
				return false
			}
			if !w.m.answered || (w.w.attempt == nil) != (w.m.attempt == nil) || !errors.Is(w.w.err, w.m.err) {
				t.Fatalf("operation %d: a waiter got %v %v; the model says %+v", i, w.w.attempt, w.w.err, w.m)
			}
			if i%3 == 0 { // the waiter gives up while being answered
				h.abandon(w.w)
				m.abandon(w.m)
			} else if w.w.attempt != nil {
				attempts = append(attempts, pair{w.w.attempt, w.m.attempt})
			}
			return true
		})
		if h.counted != m.all() || h.strangers != m.strangers() || len(h.active) != m.active() ||
			!slices.Equal(h.idle.Keys(), m.idle) {
			t.Fatalf("operation %d: %d counted, %d strangers, %d active, %v idle; the model says %d, %d, %d, %v", i,
				h.counted, h.strangers, len(h.active), h.idle.Keys(), m.all(), m.strangers(), m.active(), m.idle)
		}
		if h.counted > c.Global || h.strangers > c.Global-c.Kept || len(h.active)+h.idle.Len() > c.Sources {
			t.Fatalf("operation %d: %d counted, %d strangers, %d sources",
				i, h.counted, h.strangers, len(h.active)+h.idle.Len())
		}
		for addr, s := range h.active {
			mayWait := s.inProgress > 0 && len(s.attempts) == c.PerSource
			if len(s.attempts) > c.PerSource || len(s.queue) > c.Waiting || len(s.queue) > 0 && !mayWait {
				t.Fatalf("operation %d: %s has %d counted, %d in progress, %d waiting",
					i, addr, len(s.attempts), s.inProgress, len(s.queue))
			}
		}
	}
}

func FuzzHandshakes(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 0, 4, 4, 4, 7 | 10<<3})
	f.Fuzz(func(t *testing.T, ops []byte) { same(t, ops[:min(len(ops), 1000)]) })
}

func TestHandshakesLikeTheModel(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 3000 {
		ops := make([]byte, 200)
		sources := 1 + r.IntN(6)
		for i := range ops {
			if ops[i] = byte(r.Uint32()); ops[i]&7 < 3 {
				ops[i] = ops[i]&7 | byte(r.IntN(sources))<<3
			}
		}
		same(t, ops)
	}
}
