package webhook

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	minBackoff = 5 * time.Second
	maxBackoff = time.Hour
	maxAge     = 3 * 24 * time.Hour // older messages are given up
	maxQueue   = 256                // messages of a target
)

// Errors of a message that is given up.
var (
	ErrFull = errors.New("too many newer messages wait for the target")
	ErrLate = errors.New("the target has not taken the message for three days")
)

// Config is the configuration of a Sender. The callbacks are called from Queue and Run, possibly
// concurrently. A slow callback delays only its own target.
type Config struct {
	Targets   []Target
	Sign      Signer
	Log       *slog.Logger
	Delivered func(target string, m Message)     // the target has accepted the message
	GaveUp    func(target, id string, err error) // the message is dropped: ErrFull, ErrLate, ErrGone
}

// Sender delivers messages to targets. Each target has a retry queue of its own, so an unresponsive
// target does not delay the others. A refused message does not delay the target's other messages,
// so messages may arrive in another order. The queues are in memory only: the caller must store
// each message until Delivered or GaveUp, and queue the message again at the next start. A Sender
// is safe for concurrent use.
type Sender struct {
	c       Config
	targets map[string]*queue
}

// Message is a message for a target.
type Message struct {
	ID      string    // the same for all attempts and after a restart
	Subject string    // for the caller of Queue; the target does not get it
	Body    []byte    // JSON; must not be changed after Queue
	Born    time.Time // time of the first Queue, or zero for now; the retries end three days later
}

// queue is the retry queue of a target.
type queue struct {
	Target
	client http.Client
	gone   atomic.Bool   // the target has responded with 410 Gone
	wake   chan struct{} // of capacity 1; wakes next after an add

	mu      sync.Mutex
	waiting []*pending // guarded by mu; the oldest first
	failure error      // guarded by mu: of the last attempt; nil after a success
}

// pending is a message in a retry queue.
type pending struct {
	Message
	tries int
	next  time.Time // of the next attempt
}

// New checks the targets. The Sender sends nothing before Run.
func New(c Config) (*Sender, error) {
	s := &Sender{c: c, targets: map[string]*queue{}}
	for _, t := range c.Targets {
		if s.targets[t.Name] != nil || t.Name == "" {
			return nil, fmt.Errorf("webhook target %q: each needs a name of its own", t.Name)
		}
		transport, err := t.Transport()
		if err != nil {
			return nil, fmt.Errorf("webhook target %q: %w", t.Name, err)
		}
		s.targets[t.Name] = &queue{Target: t, wake: make(chan struct{}, 1), client: http.Client{
			Transport:     transport,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}}
	}
	return s, nil
}

// Failures returns the error of each target whose last attempt has failed. A target that has
// responded with 410 Gone keeps ErrGone until the next start.
func (s *Sender) Failures() map[string]error {
	all := map[string]error{}
	for name, q := range s.targets {
		q.mu.Lock()
		if q.failure != nil {
			all[name] = q.failure
		}
		q.mu.Unlock()
	}
	return all
}

// Waiting returns the number of messages that wait for their targets.
func (s *Sender) Waiting() (n int) {
	for _, q := range s.targets {
		q.mu.Lock()
		n += len(q.waiting)
		q.mu.Unlock()
	}
	return n
}

// Queue adds a message to a target's queue without waiting. A full queue of 256 messages (maxQueue)
// drops its oldest message: see Config.GaveUp.
func (s *Sender) Queue(target string, m Message) error {
	q := s.targets[target]
	if q == nil {
		return fmt.Errorf("%w: %q", ErrUnknown, target)
	}
	if err := checkID(m.ID); err != nil {
		return err
	}
	now := time.Now()
	if m.Born.IsZero() || m.Born.After(now) { // the clock was set back
		m.Born = now
	}
	s.giveUp(q, q.add(&pending{Message: m, next: now}), ErrFull)
	return nil
}

// add inserts w by age, and returns the messages removed from a full queue.
func (q *queue) add(w *pending) (dropped []*pending) {
	q.mu.Lock()
	defer q.mu.Unlock()
	at, _ := slices.BinarySearchFunc(q.waiting, w, func(x, y *pending) int {
		if x.Born.After(y.Born) {
			return 1
		}
		return -1 // messages of the same age keep the order of add
	})
	q.waiting = slices.Insert(q.waiting, at, w)
	if over := len(q.waiting) - maxQueue; over > 0 {
		dropped = slices.Clone(q.waiting[:over])
		q.waiting = slices.Delete(q.waiting, 0, over)
	}
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return dropped
}

// Run delivers messages until ctx ends, and returns after the last attempt in flight. Run must be
// called once.
func (s *Sender) Run(ctx context.Context) {
	var all sync.WaitGroup
	for _, q := range s.targets {
		all.Go(func() {
			for ctx.Err() == nil {
				if w := q.next(ctx); w != nil {
					s.attempt(ctx, q, w)
				}
			}
		})
	}
	all.Wait()
}

// next removes and returns the next message that is due, or waits and returns nil. After nil the
// caller calls next again.
func (q *queue) next(ctx context.Context) *pending {
	q.mu.Lock()
	pause := maxBackoff
	if len(q.waiting) > 0 {
		first := 0
		for i, w := range q.waiting {
			if w.next.Before(q.waiting[first].next) {
				first = i
			}
		}
		w := q.waiting[first]
		if pause = time.Until(w.next); pause <= 0 || q.gone.Load() {
			q.waiting = slices.Delete(q.waiting, first, first+1)
			q.mu.Unlock()
			return w
		}
	}
	q.mu.Unlock()
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-q.wake:
	case <-timer.C:
	}
	return nil
}

// attempt sends a message once. The message is then delivered, given up or queued again.
func (s *Sender) attempt(ctx context.Context, q *queue, w *pending) {
	err := s.send(ctx, q, w.ID, w.Body)
	if ctx.Err() == nil || err == nil {
		q.mu.Lock()
		q.failure = err
		q.mu.Unlock()
	}
	switch {
	case err == nil:
		s.c.Delivered(q.Name, w.Message)
		return
	case errors.Is(err, ErrGone):
		s.giveUp(q, []*pending{w}, ErrGone)
		return
	case ctx.Err() != nil:
		return // Run is stopping; the caller queues the message again at the next start
	}
	w.tries++
	pause := backoff(w.tries)
	w.next = time.Now().Add(pause)
	if time.Since(w.Born)+pause > maxAge {
		s.giveUp(q, []*pending{w}, fmt.Errorf("%w: %w", ErrLate, err))
		return
	}
	s.c.Log.Warn("webhook: not delivered", "target", q.Name, "id", w.ID, "tries", w.tries,
		"again in", pause.Round(time.Second), "err", err)
	s.giveUp(q, q.add(w), ErrFull)
}

// backoff returns the time to the next attempt: exponential, from 5 s to 1 h. The random part, up
// to one half, spreads the retries of many senders.
func backoff(tries int) time.Duration {
	base := min(minBackoff<<min(tries-1, 16), maxBackoff/2)
	return base + rand.N(base)
}

// giveUp reports dropped messages.
func (s *Sender) giveUp(q *queue, all []*pending, err error) {
	for _, w := range all {
		s.c.Log.Error("webhook: given up", "target", q.Name, "id", w.ID, "tries", w.tries, "err", err)
		s.c.GaveUp(q.Name, w.ID, err)
	}
}
