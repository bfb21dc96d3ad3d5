// Package logqueue keeps the daemon's log from harming the daemon. Queue is between the log and
// standard error: a reader that stops reading costs lines of the log, never a request. Pace limits
// the lines of each kind, so that no stranger fills the log. Begin reading at Queue.Write.
package logqueue

import (
	"bytes"
	"io"
	"log/slog"
	"sync"
	"time"
)

// size is the capacity of a Queue in bytes: some 5,000 lines.
const size = 1 << 20

// Queue is an io.Writer that never blocks and never fails. One goroutine writes the queued lines to
// the destination. Lines above the capacity are dropped and counted. A line with the count takes
// their place. A Queue is safe for concurrent use.
type Queue struct {
	to   io.Writer
	wake chan struct{} // of capacity 1; wakes run
	done chan struct{} // closed at the end of run

	mu      sync.Mutex
	format  func(io.Writer) slog.Handler // guarded by mu: of the lines with counts
	entries []entry                      // guarded by mu, the oldest first
	bytes   int                          // guarded by mu: sum of the lines
	full    bool                         // guarded by mu: lines are dropped until half of the capacity is free
	lost    int                          // guarded by mu: dropped lines whose count is not written yet
	dropped uint64                       // guarded by mu: all dropped lines
	since   time.Time
	closed  bool
}

// entry is a line, or the count of the lines dropped at this place, or a Flush that waits here.
type entry struct {
	line    []byte
	dropped int
	flushed chan struct{}
}

// New returns a queue in front of a destination such as os.Stderr. Lines with counts are text.
func New(to io.Writer) *Queue {
	text := func(to io.Writer) slog.Handler { return slog.NewTextHandler(to, nil) }
	q := &Queue{to: to, format: text, wake: make(chan struct{}, 1), done: make(chan struct{})}
	go q.run()
	return q
}

// Format sets the handler for the lines with counts: a reader of JSON gets JSON.
func (q *Queue) Format(handler func(io.Writer) slog.Handler) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.format = handler
}

// Write queues one line, or drops the line.
func (q *Queue) Write(line []byte) (int, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return len(line), nil
	}
	q.full = q.bytes+len(line) > size || q.full && q.bytes > size/2
	if q.full {
		q.drop(1, 1)
	} else {
		q.entries = append(q.entries, entry{line: bytes.Clone(line)})
		q.bytes += len(line)
	}
	q.signal()
	return len(line), nil
}

// drop counts n lost lines at the end of the queue, of which some were not counted before. The
// caller holds mu.
func (q *Queue) drop(n, fresh int) {
	if q.lost == 0 {
		q.since = time.Now()
	}
	q.lost += n
	q.dropped += uint64(fresh)
	if last := len(q.entries) - 1; last >= 0 && q.entries[last].dropped > 0 {
		q.entries[last].dropped += n
		return
	}
	q.entries = append(q.entries, entry{dropped: n})
}

func (q *Queue) signal() {
	select {
	case q.wake <- struct{}{}:
	default: // run has not seen the last signal yet
	}
}

// run writes the entries until Close. The lines of a failed write are lost. Their count waits in
// the queue for the next line, since a destination that fails once would fail again at once.
func (q *Queue) run() {
	defer close(q.done)
	for range q.wake {
		for {
			q.mu.Lock()
			if len(q.entries) == 0 {
				closed := q.closed
				q.mu.Unlock()
				if closed {
					return
				}
				break
			}
			next := q.entries[0]
			q.entries = q.entries[1:]
			q.bytes -= len(next.line)
			since, format := q.since, q.format
			q.mu.Unlock()
			if next.flushed != nil {
				close(next.flushed)
				continue
			}
			line := next.line
			if next.dropped > 0 {
				line = notice(format, next.dropped, since)
			}
			_, err := q.to.Write(line)
			q.mu.Lock()
			q.lost -= next.dropped
			if err != nil {
				fresh := 1
				if next.dropped > 0 {
					fresh = 0
				}
				q.drop(max(next.dropped, 1), fresh)
			}
			failing, closed := err != nil && len(q.entries) == 1, q.closed
			q.mu.Unlock()
			if failing && closed {
				return
			}
			if failing {
				break
			}
		}
	}
}

// notice returns the line with the count of dropped lines.
func notice(format func(io.Writer) slog.Handler, n int, since time.Time) []byte {
	var b bytes.Buffer
	slog.New(format(&b)).Warn("lines of this log were dropped, because nobody read it",
		"lines", n, "since", since.UTC().Format(time.RFC3339))
	return b.Bytes()
}

// Unread returns the number of dropped lines whose count is not written yet, and the time of the
// first one. The number is 0 again as soon as the log flows.
func (q *Queue) Unread() (lines int, since time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.lost, q.since
}

// Dropped returns the number of all dropped lines.
func (q *Queue) Dropped() uint64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.dropped
}

// Flush waits until the lines queued so far are written or lost, for at most the time wait.
func (q *Queue) Flush(wait time.Duration) {
	flushed := make(chan struct{})
	q.mu.Lock()
	if q.closed {
		q.mu.Unlock()
		return
	}
	q.entries = append(q.entries, entry{flushed: flushed})
	q.signal()
	q.mu.Unlock()
	select {
	case <-flushed:
	case <-time.After(wait):
	}
}

// Close writes the queued lines, for at most the time wait, and drops later ones. The result
// reports whether all was written.
func (q *Queue) Close(wait time.Duration) bool {
	q.mu.Lock()
	q.closed = true
	q.signal()
	q.mu.Unlock()
	select {
	case <-q.done:
	case <-time.After(wait):
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.entries) == 0 && q.lost == 0
}
