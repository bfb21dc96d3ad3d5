// Package resource notices that a resource of the appliance goes away and comes back: a token with
// its key workers, the ledger's disk, the clock, the monotonic counter. Each change is one line in
// the log of the daemon and, where the audit log has types for it, one event.
package resource

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"countersign/audit"
)

// Resource says what is told of a resource.
type Resource struct {
	Name       string     // in events: "clock", "ledger", the name of a token
	Away, Back audit.Type // the events; "": none
	// Lost and Found are the lines of the daemon's log; "": none.
	Lost, Found string
}

// Monitor is safe for concurrent use. Changes that come before Start are kept until then.
type Monitor struct {
	log     *slog.Logger
	timeout time.Duration

	writing sync.Mutex // held while events are written, so that they stand in the order of the changes

	mu      sync.Mutex
	record  func(context.Context, audit.Event) error // nil: before Start
	back    func()
	away    map[string]bool // by name
	pending []*change
}

// change is an event that is not written down yet.
type change struct {
	resource Resource
	away     bool
	cause    error
}

// NewMonitor returns a monitor to which all resources are there. timeout bounds the time for writing
// one event.
func NewMonitor(log *slog.Logger, timeout time.Duration) *Monitor {
	return &Monitor{log: log, timeout: timeout, away: map[string]bool{}}
}

// Start gives the monitor the function that writes events down, and writes down the changes so far.
// back is called when a resource with events has come back: what has failed for want of it may be tried
// again now.
func (m *Monitor) Start(ctx context.Context, record func(context.Context, audit.Event) error, back func()) {
	m.mu.Lock()
	m.record, m.back = record, back
	m.mu.Unlock()
	m.Flush(ctx)
}

// Check reports a resource as away for a reason, or with nil as there.
func (m *Monitor) Check(ctx context.Context, r Resource, err error) {
	m.Report(ctx, r, err == nil, err)
}

// Report says whether a resource is there, and if not, why; the cause may be nil. A report that says
// what is known changes nothing.
func (m *Monitor) Report(ctx context.Context, r Resource, there bool, cause error) {
	if !m.note(r, !there, cause) {
		return
	}
	m.mu.Lock()
	back := m.back
	m.mu.Unlock()
	if there && back != nil {
		back()
	}
	m.Flush(ctx)
}

func (m *Monitor) note(r Resource, away bool, cause error) (changed bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.away[r.Name] == away {
		return false
	}
	m.away[r.Name] = away
	if away && r.Lost != "" {
		m.log.Error(r.Lost, "resource", r.Name, "err", cause)
	} else if !away && r.Found != "" {
		m.log.Info(r.Found, "resource", r.Name)
	}
	if r.Away == "" {
		return false
	}
	// While the disk takes nothing, at most two changes are kept of a resource: a third one and the
	// second cancel each other out.
	var waiting []*change
	for _, c := range m.pending {
		if c.resource.Name == r.Name {
			waiting = append(waiting, c)
		}
	}
	if len(waiting) < 2 {
		m.pending = append(m.pending, &change{r, away, cause})
	} else {
		m.remove(waiting[len(waiting)-1])
	}
	return true
}

// Flush writes down the changes that the disk has not taken yet, in their order.
func (m *Monitor) Flush(ctx context.Context) {
	m.writing.Lock()
	defer m.writing.Unlock()
	for {
		record, next, more := m.next()
		if !more {
			return
		}
		e := audit.NewBack(next.resource.Back, next.resource.Name)
		if next.away {
			e = audit.NewAway(next.resource.Away, next.resource.Name, next.cause)
		}
		within, cancel := context.WithTimeout(context.WithoutCancel(ctx), m.timeout)
		err := record(within, e)
		cancel()
		if err != nil {
			m.log.Error("the event of a resource's change is not written down yet", "resource", next.resource.Name,
				"away", next.away, "err", err)
			return
		}
		m.mu.Lock()
		m.remove(next)
		m.mu.Unlock()
	}
}

// remove takes a change out of those that are pending. The caller holds mu.
func (m *Monitor) remove(c *change) {
	m.pending = slices.DeleteFunc(m.pending, func(other *change) bool { return other == c })
}

func (m *Monitor) next() (record func(context.Context, audit.Event) error, c *change, more bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.record == nil || len(m.pending) == 0 {
		return nil, nil, false
	}
	return m.record, m.pending[0], true
}
