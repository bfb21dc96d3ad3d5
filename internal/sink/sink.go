// Package sink sends the events of the audit log to receivers outside, as the events happen: syslog
// over TLS, a file, a webhook. Begin reading at Sink.Run.
//
// The invariants:
//
//   - The log is the queue. A sink reads events that are on disk, in read transactions of a few
//     events each. A request never waits for a sink, and a sink that is away for days takes no
//     memory and no disk.
//   - A position is a promise: each event before Next was taken by the receiver, or is in a gap
//     that is counted, or is of a type that the filter leaves out. The position on disk is never
//     ahead of the one in memory. So a crash, a lost position and a disk that takes no writes
//     repeat events, and lose none. Each event has its number, by which a receiver finds
//     repetitions.
//   - A gap has the numbers of its events. The receiver gets the gap in front of the next events,
//     and the events can be fetched by their numbers from the audit log until retention drops them.
package sink

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"countersign/audit"
	"countersign/internal/durable"
	"countersign/internal/ledger"
)

const (
	look       = time.Second           // from one look for new events to the next
	breath     = 50 * time.Millisecond // after a full batch: the machine is for signatures
	keepEvery  = 10 * time.Second      // from one writing of the position to the next
	minBackoff = time.Second
	maxBackoff = time.Minute
	attempt    = 30 * time.Second // time limit of a delivery
	maxGaps    = 32               // remembered with their numbers
	maxEvents  = 1000             // of a batch
	maxBytes   = 1 << 20          // of the events of a batch, unless one event has more
)

// Config is the configuration of a Sink.
type Config struct {
	Name   string
	Kind   string        // of the receiver, for operators: syslog, file or webhook
	Types  []audit.Type  // only these; none: all
	Except []audit.Type  // all but these
	MaxAge time.Duration // older events are not sent
	State  string        // path of the file with the position
	Log    *slog.Logger
}

// Record is one event of a batch.
type Record = ledger.Entry

// Gap is a range of events that are not sent: From <= number < Before.
type Gap struct {
	From   uint64 `json:"from"`
	Before uint64 `json:"before"`
	Why    string `json:"why"`  // too_old, or dropped by retention
	Told   bool   `json:"told"` // the receiver has been told
}

// line returns the gap as a line of JSON, which takes the place of the lines of its events.
func (g Gap) line() []byte {
	return fmt.Appendf(nil, `{"gap":{"before":%d,"from":%d,"why":%q}}`+"\n", g.Before, g.From, g.Why)
}

// The reasons of a gap.
const (
	TooOld  = "too_old" // older than MaxAge: the receiver was away
	Dropped = "dropped" // by retention
)

// Batch is what a receiver takes at once: gaps first, then events in the order of their numbers.
type Batch struct {
	Gaps   []Gap
	Events []Record
}

// Receiver takes batches. An error of Deliver means that the batch is delivered again, and that the
// receiver may have a part of it already. Deliver returns nil only if the receiver has the whole
// batch. Calls are not concurrent.
type Receiver interface {
	Deliver(ctx context.Context, b Batch) error
	// Resume returns the number after the last event that the receiver is known to have, or 0.
	Resume() (uint64, error)
	Close() error
}

// position is the state of a sink on disk.
type position struct {
	Next    uint64 `json:"next"`    // number of the next event to read
	Sent    uint64 `json:"sent"`    // events that were taken
	Dropped uint64 `json:"dropped"` // events in all gaps
	Gaps    []Gap  `json:"gaps,omitempty"`
}

// Status is the state of a sink for operators.
type Status struct {
	Name    string
	Kind    string
	Next    uint64
	Behind  uint64 // events in the log from Next on
	Sent    uint64
	Dropped uint64
	Gaps    []Gap // the newest ones
	Failing error // of the last attempt
	Unkept  error // the position could not be written
}

// Sink is safe for concurrent use.
type Sink struct {
	c      Config
	ledger *ledger.Ledger
	to     Receiver

	mu      sync.Mutex
	at      position // guarded by mu; changed by Run only
	failing error    // guarded by mu
	unkept  error    // guarded by mu
	kept    []byte   // on disk; of Run
}

// New returns a sink with the position on disk. Without a readable position, a sink begins with the
// oldest event of MaxAge.
func New(c Config, l *ledger.Ledger, to Receiver) *Sink {
	s := &Sink{c: c, ledger: l, to: to}
	b, err := os.ReadFile(c.State)
	if err == nil {
		err = json.Unmarshal(b, &s.at)
	}
	if err != nil {
		s.at = position{}
		if !errors.Is(err, fs.ErrNotExist) {
			c.Log.Error("the position of a sink is lost, so events are sent again", "sink", c.Name, "err", err)
		}
	}
	if end := s.ledger.End(); s.at.Next > end { // the ledger is an older one
		c.Log.Error("the position of a sink is ahead of the log, so events are sent again",
			"sink", c.Name, "position", s.at.Next, "events", end)
		s.at = position{}
	}
	return s
}

// Status returns the state of the sink.
func (s *Sink) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	end := s.ledger.End()
	return Status{
		Name: s.c.Name, Kind: s.c.Kind, Next: s.at.Next, Behind: end - min(s.at.Next, end), Sent: s.at.Sent,
		Dropped: s.at.Dropped, Gaps: slices.Clone(s.at.Gaps), Failing: s.failing, Unkept: s.unkept,
	}
}

// Run sends events until ctx ends.
func (s *Sink) Run(ctx context.Context) {
	defer s.to.Close()
	defer s.keep()
	kept, tries, resumed := time.Now(), 0, false
	for ctx.Err() == nil {
		var more bool
		err := error(nil)
		if !resumed {
			err = s.resume()
			resumed = err == nil
		}
		if err == nil {
			more, err = s.step(ctx)
		}
		if ctx.Err() != nil {
			return
		}
		pause := look
		switch {
		case err != nil:
			tries++
			pause = backoff(tries)
			if tries == 1 {
				s.c.Log.Error("a sink does not take events; a retry follows", "sink", s.c.Name, "err", err)
			}
		case more:
			tries, pause = 0, breath
		default:
			tries = 0
		}
		s.mu.Lock()
		s.failing = err
		s.mu.Unlock()
		if time.Since(kept) >= keepEvery {
			s.keep()
			kept = time.Now()
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
		timer.Stop()
	}
}

func backoff(tries int) time.Duration {
	base := min(minBackoff<<min(tries-1, 16), maxBackoff)
	return base/2 + rand.N(base/2)
}

// resume takes over a position of the receiver that is ahead of the one on disk.
func (s *Sink) resume() error {
	at, err := s.to.Resume()
	if err == nil && at <= s.ledger.End() {
		s.mu.Lock()
		s.at.Next = max(s.at.Next, at)
		s.mu.Unlock()
	}
	return err
}

// step delivers one batch. more reports that other events wait already.
func (s *Sink) step(ctx context.Context) (more bool, err error) {
	next, end := s.at.Next, s.ledger.End()
	if next >= end {
		return false, nil
	}
	if next, err = s.skip(next, end); err != nil {
		return false, err
	}
	b, after, err := s.read(next, end)
	if err != nil {
		return false, err
	}
	for _, g := range s.at.Gaps {
		if !g.Told {
			b.Gaps = append(b.Gaps, g)
		}
	}
	if len(b.Events) > 0 || len(b.Gaps) > 0 {
		limited, cancel := context.WithTimeout(ctx, attempt)
		defer cancel()
		if err := s.to.Deliver(limited, b); err != nil {
			return false, err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at.Next, s.at.Sent = after, s.at.Sent+uint64(len(b.Events))
	for i := range s.at.Gaps {
		s.at.Gaps[i].Told = true
	}
	return after < end, nil
}

// skip makes gaps of the events that retention has dropped, and of those that are older than
// MaxAge, and returns the number after them.
func (s *Sink) skip(next, end uint64) (uint64, error) {
	since := time.Now().Add(-s.c.MaxAge).UnixMilli()
	kept, old := end, false
	if err := s.ledger.Events(next, func(index uint64, entry []byte) bool {
		e, err := audit.Decode(entry)
		kept, old = min(index, end), err == nil && e.TimeMS < since
		return false
	}); err != nil {
		return next, err
	}
	if kept > next { // retention was faster than the receiver
		s.gap(next, kept, Dropped)
		next = kept
	}
	if !old || next == end {
		return next, nil
	}
	first := end
	if err := s.ledger.Find(ledger.Query{Since: since}, ledger.Span{From: next, Before: end},
		func(index uint64, _ []byte) bool { first = index; return false }); err != nil {
		return next, err
	}
	s.gap(next, first, TooOld)
	return first, nil
}

// gap notes events that are not sent.
func (s *Sink) gap(from, before uint64, why string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	last := len(s.at.Gaps) - 1
	if last >= 0 && s.at.Gaps[last].Before == from && s.at.Gaps[last].Why == why && !s.at.Gaps[last].Told {
		s.at.Gaps[last].Before = before
	} else {
		s.at.Gaps = append(s.at.Gaps, Gap{From: from, Before: before, Why: why})
	}
	if len(s.at.Gaps) > maxGaps && s.at.Gaps[0].Told { // the others have yet to be told
		s.at.Gaps = slices.Delete(s.at.Gaps, 0, 1)
	}
	s.at.Dropped += before - from
	s.at.Next = before
	s.c.Log.Warn("events are not sent to a sink: fetch them by their numbers from the audit log",
		"sink", s.c.Name, "from", from, "before", before, "why", why)
}

// read reads a batch of events from next on. after is the number after the last event read.
func (s *Sink) read(next, end uint64) (b Batch, after uint64, err error) {
	found, err := s.ledger.Read(next, end, ledger.Part{
		Wants: s.wants, Events: maxEvents, Bytes: maxBytes, Look: 16 * maxEvents,
	})
	if found.Dropped > 0 { // retention was faster than the receiver
		s.gap(next, next+found.Dropped, Dropped)
	}
	b.Events = found.Events
	return b, found.After, err
}

func (s *Sink) wants(t audit.Type) bool {
	return (len(s.c.Types) == 0 || slices.Contains(s.c.Types, t)) && !slices.Contains(s.c.Except, t)
}

// keep writes the position. Without the position, a restart repeats events.
func (s *Sink) keep() {
	s.mu.Lock()
	b, err := json.Marshal(s.at)
	same := s.unkept == nil && bytes.Equal(b, s.kept)
	s.mu.Unlock()
	if same {
		return
	}
	if err == nil {
		if err = os.MkdirAll(filepath.Dir(s.c.State), 0o700); err == nil {
			err = durable.Write(s.c.State, b, 0o600)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil && s.unkept == nil {
		s.c.Log.Error("the position of a sink is not written; a restart sends events again",
			"sink", s.c.Name, "err", err)
	}
	if s.unkept = err; err == nil {
		s.kept = b
	}
}
