package appliance

import (
	"context"
	"strconv"
	"sync"
	"time"

	"countersign/audit"
)

// tallyEvery is how long what strangers and greedy peers do is counted before it becomes an event.
const tallyEvery = time.Minute

// tally counts what a flood must not fill the log with. The first of a kind is an event at the next flush, and then there is
// one for each tallyEvery.
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

// take gives what is to be written down.
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
		events = append(events, audit.Event{Type: key.event, Actor: audit.Daemon(), Action: key.action, Resource: key.resource, Outcome: key.outcome,
			Metadata: map[string]string{"count": strconv.FormatUint(s.n, 10), "since": strconv.FormatInt(s.since.UnixMilli(), 10), "until": strconv.FormatInt(s.until.UnixMilli(), 10)}})
		s.n, s.flushed = 0, time.Now()
	}
	return events
}

func (t *tally) flushDue(ctx context.Context, a *Appliance) { t.write(ctx, a, false) }

func (t *tally) flush(ctx context.Context, a *Appliance) { t.write(ctx, a, true) }

// write has a time of its own: what was taken would be lost with a daemon that stops meanwhile.
func (t *tally) write(ctx context.Context, a *Appliance, all bool) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.limits.RequestTimeout)
	defer cancel()
	for _, e := range t.take(all) {
		if err := a.record(ctx, e); err != nil {
			a.log.Error("a count is not written down", "event", e.Type, "count", e.Metadata["count"], "err", err)
		}
	}
}
