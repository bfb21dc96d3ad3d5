package appliance

import (
	"context"
	"sync"
	"time"

	"countersign/audit"
	"countersign/internal/meter"
)

// tallyEvery is the time between two events with the count of one kind of refusal.
const tallyEvery = time.Minute

// tally counts the refusals of strangers, and of peers beyond a limit. A flood of refusals must not
// fill the audit log. The first refusal of a kind is an event at the next flush. Later refusals of
// the kind share one event each tallyEvery.
type tally struct {
	meter  *meter.Meter
	mu     sync.Mutex
	counts map[counted]*span
}

// counted is a kind of refusal.
type counted struct {
	event                     audit.Type
	action, resource, outcome string
}

// span is the count of a kind since the last event.
type span struct {
	n            uint64
	since, until time.Time
	flushed      time.Time
}

// count adds one refusal.
func (t *tally) count(event audit.Type, action, resource, outcome string) {
	if event == audit.RateLimitTriggered {
		t.meter.Add(meter.RateLimited, action)
	}
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

// take returns the due events, or with all the events of all counts, and resets their counts.
func (t *tally) take(all bool) (events []audit.Event) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for key, s := range t.counts {
		quiet := time.Since(s.flushed) >= tallyEvery
		if s.n == 0 && quiet {
			delete(t.counts, key) // memory is bounded by the kinds of the last minute
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

// flushDue writes the due events.
func (t *tally) flushDue(ctx context.Context, a *Appliance) { t.write(ctx, a, false) }

// flush writes the events of all counts.
func (t *tally) flush(ctx context.Context, a *Appliance) { t.write(ctx, a, true) }

// write writes events with a timeout of its own, because take has reset the counts, and a stopping
// daemon would lose them.
func (t *tally) write(ctx context.Context, a *Appliance, all bool) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.limits.RequestTimeout)
	defer cancel()
	for _, e := range t.take(all) {
		if err := a.record(ctx, e); err != nil {
			a.log.Error("a count of refusals is not written", "event", e.Type, "count", e.Metadata["count"], "err", err)
		}
	}
}
