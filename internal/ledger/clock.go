package ledger

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// clock is the ledger's time. Nonces expire by the ledger's time.
//
// The ledger's time follows the system's clock, and only moves forward. Its rate is at most 9/8 of
// real time, measured by the monotonic clock, which can't be set. A system clock that jumps ahead,
// by a fault of NTP or of an operator, therefore makes no nonce expire early: the ledger's time
// needs longer than MaxLifetime to cover MaxLifetime and Margin, however wrong the system's clock
// is. If MaxLifetime is more than eight times Margin less the tolerance, the rate is lower than
// 9/8.
//
// After a stop of the daemon, or a suspension of the machine, the ledger's time is behind and
// catches up at that rate. Until then nonces are kept longer than necessary, and epochs, decisions
// and grace times have the earlier time. Events have the system's time.
//
// If the system's clock is behind the ledger's time by more than the tolerance, the ledger refuses
// admissions. Otherwise expired documents would be valid again, and their nonces may be forgotten.
type clock struct {
	wall      func() time.Time
	elapsed   func() time.Duration
	tolerance time.Duration
	slowness  time.Duration // the rate is 1 + 1/slowness; 8 gives 9/8

	mu   sync.Mutex
	now  time.Time     // the ledger's time
	last time.Duration // result of elapsed at now
}

func (c *clock) start(o Options, now time.Time) {
	c.wall, c.elapsed, c.tolerance, c.now, c.last = o.Wall, o.Elapsed, o.ClockTolerance, now, o.Elapsed()
	c.slowness = max(8, o.MaxLifetime/max(time.Second, o.Margin-o.ClockTolerance)+1)
}

// tick moves the ledger's time forward and returns the new time. The error is ErrClock if the
// system's clock is behind by more than the tolerance.
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

// accept sets the ledger's time forward at once.
func (c *clock) accept(to time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if to.After(c.now) {
		c.now = to
	}
}

// Clock returns the ledger's time and the system's time. The error wraps ErrClock while the ledger
// refuses admissions because of the difference.
func (l *Ledger) Clock() (now, wall time.Time, err error) {
	now, err = l.clock.tick()
	return now, l.clock.wall(), err
}

// AcceptTime sets the ledger's time forward to the system's clock at once, and writes an event.
// Nonces that expire thereby are forgotten.
func (l *Ledger) AcceptTime(ctx context.Context, event Event) error {
	return l.submit(ctx, &request{alone: true, done: make(chan error, 1), apply: func(t *txn) error {
		if wall := l.clock.wall(); wall.After(t.now) {
			t.now, t.accepted = wall, true
		}
		_, err := t.append(event)
		return err
	}})
}
