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
//   - With a quantum (NewWeighted), calls have a cost, and a turn is a quantum of cost: several
//     calls of a low cost, or a part of a call of a high cost, which then comes in a later turn. So
//     waiting lanes get equal shares by cost (deficit round robin).
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
// Fair is safe for concurrent use. Each method takes constant time, apart from the wait in Acquire;
// with a quantum, a release takes at most cost / quantum steps for each waiting lane.
type Fair struct {
	slots   int
	quantum int // cost of a turn

	mu      sync.Mutex
	held    int
	waiting int              // tickets in all queues
	lanes   map[string]*lane // the waiting lanes
	turns   list.List        // of *lane: the waiting lanes, the next one first
}

// lane is a lane with waiting callers.
type lane struct {
	name   string
	turn   *list.Element // in Fair.turns
	begun  bool          // the turn has begun: credit has the quantum of the turn
	credit int           // cost that the lane may still use
	queue  list.List     // of *ticket
}

// ticket is the place of one caller in its lane's queue.
type ticket struct {
	lane    string
	cost    int
	element *list.Element // in the lane's queue; nil once granted or canceled
	granted chan struct{} // closed when the caller has a slot
}

// NewFair makes a Fair with slots, at least 1. NewFair panics with fewer.
func NewFair(slots int) *Fair { return NewWeighted(slots, 1) }

// NewWeighted makes a Fair whose turns have a quantum of cost, at least 1.
func NewWeighted(slots, quantum int) *Fair {
	if slots < 1 || quantum < 1 {
		panic(fmt.Sprintf("limit: %d slots, quantum %d", slots, quantum))
	}
	return &Fair{slots: slots, quantum: quantum, lanes: map[string]*lane{}}
}

// Acquire waits for a slot until ctx ends. The caller holds the slot until release is called.
// release is idempotent.
func (f *Fair) Acquire(ctx context.Context, lane string) (release func(), err error) {
	return f.AcquireCost(ctx, lane, 1)
}

// AcquireCost is Acquire for a call with a cost.
func (f *Fair) AcquireCost(ctx context.Context, lane string, cost int) (release func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if t := f.enqueue(lane, cost); t != nil {
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

// Waiting returns the number of waiting callers of each lane that has some.
func (f *Fair) Waiting() map[string]int {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := make(map[string]int, len(f.lanes))
	for name, l := range f.lanes {
		all[name] = l.queue.Len()
	}
	return all
}

// enqueue takes a free slot and returns nil, or returns a ticket in the lane's queue.
func (f *Fair) enqueue(name string, cost int) *ticket {
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
	t := &ticket{lane: name, cost: cost, granted: make(chan struct{})}
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
	for turn := f.turns.Front(); turn != nil; turn = f.turns.Front() {
		l := turn.Value.(*lane)
		if !l.begun {
			l.begun = true
			l.credit += f.quantum
		}
		if cost := l.first().cost; cost <= l.credit {
			l.credit -= cost
			f.grant(l)
			if l.queue.Len() > 0 && l.first().cost > l.credit {
				f.endTurn(l)
			}
			return
		}
		f.endTurn(l)
	}
}

// endTurn moves a waiting lane to the end. The lane keeps its credit for its next turn.
func (f *Fair) endTurn(l *lane) {
	l.begun = false
	f.turns.MoveToBack(l.turn)
}

// first returns the first ticket of a waiting lane.
func (l *lane) first() *ticket { return l.queue.Front().Value.(*ticket) }

// grant gives a free slot to the first ticket of l.
func (f *Fair) grant(l *lane) {
	t := l.first()
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
