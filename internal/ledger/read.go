package ledger

import (
	"errors"
	"fmt"

	"countersign/audit"
)

// End returns the number of the event that comes next into the log.
func (l *Ledger) End() uint64 { return l.published.Load().next }

// Entry is an event of the log with its number.
type Entry struct {
	Index uint64
	Event audit.Event
	Entry []byte // the bytes of the log
}

// Part is what a follower of the log takes at once.
type Part struct {
	Wants  func(audit.Type) bool // the types of its events
	Events int                   // at most so many
	Bytes  int                   // at most so many of the events, unless one event has more
	Look   int                   // at most so many events are looked at, so that others can work
}

// Found is a part of the log. A follower reads the next part from After on. The events from the
// asked number on, Dropped in number, are gone by retention; they come before Events.
type Found struct {
	Dropped uint64
	Events  []Entry
	After   uint64
}

// Read returns the events from number next on, and before number end, that a follower of the log
// wants. Each number from next on and before After is either dropped, or an event that was
// returned, or an event of a type that the follower does not want. After an error, the part is
// right as far as it goes.
func (l *Ledger) Read(next, end uint64, p Part) (f Found, err error) {
	f.After = next
	first, size, looked := true, 0, 0
	var broken error
	err = l.Events(next, func(index uint64, b []byte) bool {
		switch {
		case index >= end:
			return false
		case index > f.After && !first: // dropped while the part was read: of the next part
			return false
		case first:
			f.Dropped, f.After, first = index-next, index, false
		}
		t := audit.TypeOf(b)
		if t == "" {
			broken = fmt.Errorf("event %d is no event: %.80q", index, b)
			return false
		}
		if p.Wants(t) {
			if len(f.Events) == p.Events || len(f.Events) > 0 && size+len(b) > p.Bytes {
				return false
			}
			e, err := audit.Decode(b)
			if err != nil {
				broken = fmt.Errorf("event %d: %w", index, err)
				return false
			}
			f.Events = append(f.Events, Entry{index, e, b})
			size += len(b)
		}
		f.After = index + 1
		looked++
		return looked < p.Look
	})
	return f, errors.Join(err, broken)
}
