package ledger

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// clock is the ledger's time: what nonces expire by, and the mark that admissions must not run behind.
//
// It follows the system's clock and only moves forward, but never faster than time itself and an eighth more, measured by a
// clock that nobody can set. So when the system's clock jumps ahead, by a mistake of NTP or of an operator, nonces don't
// vanish: to reach the end of a nonce that lives for MaxLifetime and is kept for Margin after that, the ledger's time
// needs longer than MaxLifetime, however wrong the system's clock is and however long. (It is less than an eighth where
// MaxLifetime is more than eight times Margin without the tolerance.) Where the daemon was down, or the machine suspended or
// paused, the ledger's time is behind afterwards and catches up at that pace; meanwhile nonces are kept longer than they
// must, and that is all.
//
// When the system's clock is behind the ledger's time by more than the tolerance, nothing is admitted until it is not:
// documents would live again whose nonces may be gone.
type clock struct {
	wall      func() time.Time
	elapsed   func() time.Duration
	tolerance time.Duration
	slowness  time.Duration // the pace of catching up is one in so many

	mu   sync.Mutex
	now  time.Time     // the ledger's time
	last time.Duration // elapsed, when it was now
}

func (c *clock) start(o Options, now time.Time) {
	c.wall, c.elapsed, c.tolerance, c.now, c.last = o.Wall, o.Elapsed, o.ClockTolerance, now, o.Elapsed()
	c.slowness = max(8, o.MaxLifetime/max(time.Second, o.Margin-o.ClockTolerance)+1)
}

// tick moves the ledger's time forward and returns it, with ErrClock where the system's clock is too far behind it.
func (c *clock) tick() (now time.Time, behind error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	wall, elapsed := c.wall(), c.elapsed()
	passed := max(0, elapsed-c.last)
	c.last = elapsed
	if most := c.now.Add(passed + passed/c.slowness); wall.After(most) {
		c.now = most
	} else if wall.After(c.now) {
		c.now = wall
	}
	if by := c.now.Sub(wall); by > c.tolerance {
		behind = fmt.Errorf("%w by %v", ErrClock, by.Round(time.Second))
	}
	return c.now, behind
}

func (c *clock) time() time.Time { now, _ := c.tick(); return now }

// accept brings the ledger's time forward at once.
func (c *clock) accept(to time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if to.After(c.now) {
		c.now = to
	}
}

// Clock returns the ledger's time and the system's. The error wraps ErrClock where nothing is admitted because of them.
func (l *Ledger) Clock() (now, wall time.Time, err error) {
	now, err = l.clock.tick()
	return now, l.clock.wall(), err
}

// AcceptTime brings the ledger's time forward to the system's clock at once, with the event that says so. What expires by that
// is forgotten.
func (l *Ledger) AcceptTime(ctx context.Context, event Event) error {
	return l.submit(ctx, &request{alone: true, done: make(chan error, 1), apply: func(t *txn) error {
		if wall := l.clock.wall(); wall.After(t.now) {
			t.now, t.accepted = wall, true
		}
		_, err := t.append(event)
		return err
	}})
}
