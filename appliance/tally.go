package appliance

import (
	"context"
	"sync"
	"time"

	"countersign/audit"
)

// tallyEvery is how long refusals of strangers and greedy peers are counted before they become an event.
const tallyEvery = time.Minute

// tally counts refusals that must not fill the log in a flood. The first of a kind is an event at the
// next flush; after that there is one event for each tallyEvery.
type tally struct {
	mu     sync.Mutex
	counts map[counted]*span
}

type counted struct {
	event                     audit.Type
	action, resource, outcome string
}

type span struct {
	n            uint64
	since, until time.Time
	flushed      time.Time
}

func (t *tally) count(event audit.Type, action, resource, outcome string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.counts == nil {
		t.counts = map[counted]*span{}
	}
	key := counted{event, action, resource, outcome}
	s := t.counts[key]
	if s == nil {
		s = new(span)
		t.counts[key] = s
	}
	if s.until = time.Now(); s.n == 0 {
		s.since = s.until
	}
	s.n++
}

// take returns the events that are to be written down.
func (t *tally) take(all bool) (events []audit.Event) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for key, s := range t.counts {
		quiet := time.Since(s.flushed) >= tallyEvery
		if s.n == 0 && quiet {
			delete(t.counts, key) // so that memory is bounded by what happens now
		}
		if s.n == 0 || !all && !quiet {
			continue
		}
		span := audit.Span{Count: s.n, Since: s.since, Until: s.until}
		events = append(events, audit.NewCount(key.event, key.action, key.resource, key.outcome, span))
		s.n, s.flushed = 0, time.Now()
	}
	return events
}

func (t *tally) flushDue(ctx context.Context, a *Appliance) { t.write(ctx, a, false) }

func (t *tally) flush(ctx context.Context, a *Appliance) { t.write(ctx, a, true) }

// write has a time of its own: counts that were taken would be lost with a daemon that stops meanwhile.
func (t *tally) write(ctx context.Context, a *Appliance, all bool) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.limits.RequestTimeout)
	defer cancel()
	for _, e := range t.take(all) {
		if err := a.record(ctx, e); err != nil {
			a.log.Error("a count is not written down", "event", e.Type, "count", e.Metadata["count"], "err", err)
		}
	}
}
