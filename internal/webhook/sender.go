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
	firstPause = 5 * time.Second
	lastPause  = time.Hour
	tryFor     = 3 * 24 * time.Hour
	maxQueue   = 256 // messages of a target
)

// Why a message is given up.
var (
	ErrFull = errors.New("too many newer messages wait for the target")
	ErrLate = errors.New("the target has not taken the message for three days")
)

// Config is what a Sender needs. The callbacks come from Queue and Run, several at a time, and hold up their target only.
type Config struct {
	Targets   []Target
	Sign      Signer
	Log       *slog.Logger
	Delivered func(target, id string)            // the message was taken
	GaveUp    func(target, id string, err error) // it never will be: ErrFull, ErrLate, ErrGone
}

// Sender delivers messages to its targets. A target that does not answer holds up nobody else; nor does a message that it does
// not take hold up the others of that target, so their order may change. What is not delivered is in memory only: the owner
// keeps it until Delivered or GaveUp, and hands it in again at the next start. It is for concurrent use.
type Sender struct {
	c       Config
	targets map[string]*queue
}

// Message is what a target is told.
type Message struct {
	ID   string    // the same however often it is sent
	Body []byte    // JSON; nobody may change it any more
	Born time.Time // when it was first handed in; zero: now. It is tried for three days from then on
}

// queue is a target and what waits for it.
type queue struct {
	Target
	client http.Client
	gone   atomic.Bool
	more   chan struct{} // has one when something came

	mu      sync.Mutex
	waiting []*waiting // the oldest first
}

type waiting struct {
	Message
	tries int
	next  time.Time // of the next try
}

// New checks the targets. Nothing is sent before Run.
func New(c Config) (*Sender, error) {
	s := &Sender{c: c, targets: map[string]*queue{}}
	for _, t := range c.Targets {
		if s.targets[t.Name] != nil || t.Name == "" {
			return nil, fmt.Errorf("webhook target %q: each needs a name of its own", t.Name)
		}
		transport, err := t.client()
		if err != nil {
			return nil, fmt.Errorf("webhook target %q: %w", t.Name, err)
		}
		s.targets[t.Name] = &queue{Target: t, more: make(chan struct{}, 1), client: http.Client{
			Transport:     transport,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}}
	}
	return s, nil
}

// Queue hands in a message for a target. It does not wait; where too many wait already, the oldest is given up.
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
	s.giveUp(q, q.add(&waiting{Message: m, next: now}), ErrFull)
	return nil
}

// add puts w in its place by age, and takes out what is too much.
func (q *queue) add(w *waiting) (dropped []*waiting) {
	q.mu.Lock()
	defer q.mu.Unlock()
	at, _ := slices.BinarySearchFunc(q.waiting, w, func(x, y *waiting) int {
		if x.Born.After(y.Born) {
			return 1
		}
		return -1 // what is equal keeps the order in which it came
	})
	q.waiting = slices.Insert(q.waiting, at, w)
	if over := len(q.waiting) - maxQueue; over > 0 {
		dropped = slices.Clone(q.waiting[:over])
		q.waiting = slices.Delete(q.waiting, 0, over)
	}
	select {
	case q.more <- struct{}{}:
	default:
	}
	return dropped
}

// Run delivers until ctx ends, and returns when no try is under way. It is called once.
func (s *Sender) Run(ctx context.Context) {
	var all sync.WaitGroup
	for _, q := range s.targets {
		all.Go(func() {
			for ctx.Err() == nil {
				if w := q.take(ctx); w != nil {
					s.try(ctx, q, w)
				}
			}
		})
	}
	all.Wait()
}

// take waits for the message whose turn is next, and takes it out; nil means to look again.
func (q *queue) take(ctx context.Context) *waiting {
	q.mu.Lock()
	pause := lastPause
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
	case <-q.more:
	case <-timer.C:
	}
	return nil
}

// try sends a message once, and says or queues what comes of it.
func (s *Sender) try(ctx context.Context, q *queue, w *waiting) {
	err := s.send(ctx, q, w.ID, w.Body)
	switch {
	case err == nil:
		s.c.Delivered(q.Name, w.ID)
		return
	case errors.Is(err, ErrGone):
		s.giveUp(q, []*waiting{w}, ErrGone)
		return
	case ctx.Err() != nil:
		return // stopping: the owner has it
	}
	w.tries++
	pause := pauseAfter(w.tries)
	w.next = time.Now().Add(pause)
	if time.Since(w.Born)+pause > tryFor {
		s.giveUp(q, []*waiting{w}, fmt.Errorf("%w: %w", ErrLate, err))
		return
	}
	s.c.Log.Warn("webhook: not delivered", "target", q.Name, "id", w.ID, "tries", w.tries, "again in", pause.Round(time.Second), "err", err)
	s.giveUp(q, q.add(w), ErrFull)
}

// pauseAfter doubles from firstPause up to lastPause. A random part keeps many from coming back all at once.
func pauseAfter(tries int) time.Duration {
	base := min(firstPause<<min(tries-1, 16), lastPause/2)
	return base + rand.N(base)
}

func (s *Sender) giveUp(q *queue, all []*waiting, err error) {
	for _, w := range all {
		s.c.Log.Error("webhook: given up", "target", q.Name, "id", w.ID, "tries", w.tries, "err", err)
		s.c.GaveUp(q.Name, w.ID, err)
	}
}
