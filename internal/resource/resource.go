// Package resource monitors the resources of the appliance: the tokens with their key workers, the
// ledger's disk, the clock, the monotonic counter. A resource fails and recovers. Each of these
// transitions is one line of the daemon's log and, for resources with event types, one event of the
// audit log.
package resource

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"countersign/audit"
)

// Resource is a dependency of the appliance that can fail for a time.
type Resource struct {
	Name              string     // in events: "clock", "ledger", the name of a token
	Failed, Recovered audit.Type // event types; "" for no events
	// FailedText and RecoveredText are lines of the daemon's log; "" for no line.
	FailedText, RecoveredText string
}

// Monitor is safe for concurrent use. A Monitor keeps the transitions before Start until then.
type Monitor struct {
	log     *slog.Logger
	timeout time.Duration

	writing sync.Mutex // held during Flush, so that events keep the order of the transitions

	mu        sync.Mutex
	record    func(context.Context, audit.Event) error // nil before Start
	recovered func()
	failed    map[string]bool // by name
	pending   []*transition
}

// transition is a failure or a recovery whose event is not on disk yet.
type transition struct {
	resource Resource
	failed   bool
	cause    error
}

// NewMonitor returns a monitor of resources that have not failed. The timeout applies to the write
// of one event.
func NewMonitor(log *slog.Logger, timeout time.Duration) *Monitor {
	return &Monitor{log: log, timeout: timeout, failed: map[string]bool{}}
}

// Start sets the function that writes events, and writes the events of the transitions so far. The
// monitor calls recovered, if set, at each recovery of a resource with events, so that the caller
// can retry operations that failed without the resource.
func (m *Monitor) Start(ctx context.Context, record func(context.Context, audit.Event) error, recovered func()) {
	m.mu.Lock()
	m.record, m.recovered = record, recovered
	m.mu.Unlock()
	m.Flush(ctx)
}

// Check reports a resource as failed for a non-nil error, and as up for a nil error.
func (m *Monitor) Check(ctx context.Context, r Resource, err error) {
	m.Report(ctx, r, err == nil, err)
}

// Report reports whether a resource is up. The cause of a failure may be nil. A report of the known
// state changes nothing.
func (m *Monitor) Report(ctx context.Context, r Resource, up bool, cause error) {
	if !m.note(r, !up, cause) {
		return
	}
	m.mu.Lock()
	recovered := m.recovered
	m.mu.Unlock()
	if up && recovered != nil {
		recovered()
	}
	m.Flush(ctx)
}

// note logs a transition and queues its event. The result is false for the known state and for a
// resource without events.
func (m *Monitor) note(r Resource, failed bool, cause error) (queued bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.failed[r.Name] == failed {
		return false
	}
	m.failed[r.Name] = failed
	if failed && r.FailedText != "" {
		m.log.Error(r.FailedText, "resource", r.Name, "err", cause)
	} else if !failed && r.RecoveredText != "" {
		m.log.Info(r.RecoveredText, "resource", r.Name)
	}
	if r.Failed == "" {
		return false
	}
	// At most two transitions of a resource are pending while the disk takes no writes. A third one
	// cancels the second.
	var pending []*transition
	for _, t := range m.pending {
		if t.resource.Name == r.Name {
			pending = append(pending, t)
		}
	}
	if len(pending) < 2 {
		m.pending = append(m.pending, &transition{r, failed, cause})
	} else {
		m.remove(pending[len(pending)-1])
	}
	return true
}

// Flush writes the events of pending transitions in order, until the disk refuses one.
func (m *Monitor) Flush(ctx context.Context) {
	m.writing.Lock()
	defer m.writing.Unlock()
	for {
		record, next := m.next()
		if next == nil {
			return
		}
		e := audit.NewBack(next.resource.Recovered, next.resource.Name)
		if next.failed {
			e = audit.NewAway(next.resource.Failed, next.resource.Name, next.cause)
		}
		within, cancel := context.WithTimeout(context.WithoutCancel(ctx), m.timeout)
		err := record(within, e)
		cancel()
		if err != nil {
			m.log.Error("the event of a resource's transition is not written yet",
				"resource", next.resource.Name, "failed", next.failed, "err", err)
			return
		}
		m.mu.Lock()
		m.remove(next)
		m.mu.Unlock()
	}
}

// remove removes a transition from pending. The caller holds mu.
func (m *Monitor) remove(t *transition) {
	m.pending = slices.DeleteFunc(m.pending, func(other *transition) bool { return other == t })
}

// next returns the first pending transition, or nil.
func (m *Monitor) next() (record func(context.Context, audit.Event) error, t *transition) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.record == nil || len(m.pending) == 0 {
		return nil, nil
	}
	return m.record, m.pending[0]
}
