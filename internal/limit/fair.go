package limit

import (
	"container/list"
	"context"
	"fmt"
	"sync"
	"sync/atomic"
)

// Fair shares the slots of a device between lanes by round robin. Each peer has a lane, handshakes
// have a lane, and the appliance's own work has one. Guarantees:
//
//   - At most slots are held at once. No caller waits while a slot is free.
//   - Waiting lanes take turns, one slot a turn. Within a lane the order is first in, first out.
//     So the first caller of a lane waits for the next free slot, and then for at most one turn of
//     each other waiting lane, however many calls the other lanes have.
//   - A lane keeps its turn when one of its callers gives up. A slot granted at that moment goes to
//     the next caller of the same lane. A lane without waiting callers loses its turn, and joins at
//     the end later.
//   - A lane without waiting callers uses no memory. Fair does not bound the number of waiting
//     callers: the users of Fair must.
//
// One lane may hold all the slots. The slots come back one by one, and each goes to the next lane.
// A limit per lane would leave a part of the device idle while the other lanes are quiet, and would
// save a newcomer less than the time of one operation. Operations must have a deadline: with all
// slots hanging, every caller waits.
//
// Fair is safe for concurrent use. Each method takes constant time, apart from the wait in Acquire.
type Fair struct {
	slots int

	mu      sync.Mutex
	held    int
	waiting int              // tickets in all queues
	lanes   map[string]*lane // the waiting lanes
	turns   list.List        // of *lane: the waiting lanes, the next one first
}

// lane is a lane with waiting callers.
type lane struct {
	name  string
	turn  *list.Element // in Fair.turns
	queue list.List     // of *ticket
}

// ticket is the place of one caller in its lane's queue.
type ticket struct {
	lane    string
	element *list.Element // in the lane's queue; nil once granted or canceled
	granted chan struct{} // closed when the caller has a slot
}

// NewFair makes a Fair with slots, at least 1. NewFair panics with fewer.
func NewFair(slots int) *Fair {
	if slots < 1 {
		panic(fmt.Sprintf("limit: %d slots", slots))
	}
	return &Fair{slots: slots, lanes: map[string]*lane{}}
}

// Acquire waits for a slot until ctx ends. The caller holds the slot until release is called.
// release is idempotent.
func (f *Fair) Acquire(ctx context.Context, lane string) (release func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if t := f.enqueue(lane); t != nil {
		select {
		case <-t.granted:
		case <-ctx.Done():
			f.cancel(t)
			return nil, ctx.Err()
		}
	}
	var released atomic.Bool
	return func() {
		if !released.Swap(true) {
			f.release()
		}
	}, nil
}

// enqueue takes a free slot and returns nil, or returns a ticket in the lane's queue.
func (f *Fair) enqueue(name string) *ticket {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.held < f.slots { // then no caller is waiting
		f.held++
		return nil
	}
	l := f.lanes[name]
	if l == nil {
		l = &lane{name: name}
		l.turn = f.turns.PushBack(l)
		f.lanes[name] = l
	}
	f.waiting++
	t := &ticket{lane: name, granted: make(chan struct{})}
	t.element = l.queue.PushBack(t)
	return t
}

// release frees a slot and grants the slot to the next lane.
func (f *Fair) release() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.passOn()
}

// passOn is release with mu held.
func (f *Fair) passOn() {
	f.held--
	if turn := f.turns.Front(); turn != nil {
		f.turns.MoveToBack(turn)
		f.grant(turn.Value.(*lane))
	}
}

// grant gives a free slot to the first ticket of l.
func (f *Fair) grant(l *lane) {
	t := l.queue.Front().Value.(*ticket)
	f.remove(t)
	f.held++
	close(t.granted)
}

// cancel withdraws the ticket of a caller that gives up. If the ticket was granted at that moment,
// the slot goes to the next ticket of the same lane, since the lane has spent its turn on the slot.
func (f *Fair) cancel(t *ticket) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if t.element != nil {
		f.remove(t)
	} else if l := f.lanes[t.lane]; l != nil {
		f.held--
		f.grant(l)
	} else {
		f.passOn()
	}
}

// remove takes a ticket out of its queue, and the lane out of the turns with its last ticket.
func (f *Fair) remove(t *ticket) {
	l := f.lanes[t.lane]
	l.queue.Remove(t.element)
	t.element = nil
	f.waiting--
	if l.queue.Len() == 0 {
		f.turns.Remove(l.turn)
		delete(f.lanes, t.lane)
	}
}
