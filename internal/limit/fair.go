package limit

import (
	"container/list"
	"context"
	"fmt"
	"sync"
	"sync/atomic"
)

// Fair shares a device between lanes: one for each peer, one for handshakes, one for the appliance's own work. What holds:
//
//   - At most slots are held at once, and nobody waits while one is free.
//   - The lanes in which somebody waits take turns, one slot a turn; within a lane the first to come is the first to go. So the
//     first of a lane waits until a slot is given back, and then for at most one turn of each other lane that waits, however
//     much the others ask for.
//   - A lane keeps its turn when one of its waiters gives up. If that one had just been given the slot, the next in its lane
//     has it. A lane in which nobody waits any more has no turn, and comes last when it is back.
//   - A lane in which nobody waits is not remembered. How many may wait is for those to bound who let them in.
//
// A lane may hold all the slots: they come back one by one, and each goes to the lane whose turn it is. A limit on them would
// leave a part of the device idle while the others are quiet, and save a newcomer less than the time of one operation.
// So operations must be bounded: with all slots hung, everybody waits.
//
// It is for concurrent use. Each call takes constant time, and nobody but the callers waits.
type Fair struct {
	slots int

	mu      sync.Mutex
	held    int
	waiting int
	lanes   map[string]*lane // those in which somebody waits
	turns   list.List        // of *lane: the same, the next first
}

type lane struct {
	name  string
	turn  *list.Element
	queue list.List // of *place
}

type place struct {
	lane    string
	in      *list.Element // of the lane's queue; nil when granted
	granted chan struct{}
}

// NewFair panics if there are no slots.
func NewFair(slots int) *Fair {
	if slots < 1 {
		panic(fmt.Sprintf("limit: %d slots", slots))
	}
	return &Fair{slots: slots, lanes: map[string]*lane{}}
}

// Acquire waits for a slot until ctx ends. The slot is held until release is called, for which further calls do nothing.
func (f *Fair) Acquire(ctx context.Context, lane string) (release func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if p := f.enter(lane); p != nil {
		select {
		case <-p.granted:
		case <-ctx.Done():
			f.leave(p)
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

// enter takes a slot, or else a place in the queue.
func (f *Fair) enter(name string) *place {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.held < f.slots { // and so nobody waits
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
	p := &place{lane: name, granted: make(chan struct{})}
	p.in = l.queue.PushBack(p)
	return p
}

// release gives a slot to the lane whose turn it is.
func (f *Fair) release() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pass()
}

func (f *Fair) pass() {
	f.held--
	if turn := f.turns.Front(); turn != nil {
		f.turns.MoveToBack(turn)
		f.grant(turn.Value.(*lane))
	}
}

// grant gives a free slot to the first of l.
func (f *Fair) grant(l *lane) {
	p := l.queue.Front().Value.(*place)
	f.remove(p)
	f.held++
	close(p.granted)
}

// leave is for one who waits no longer. If he has been given a slot at this moment, it goes to the next of his lane: the lane
// has had its turn for it.
func (f *Fair) leave(p *place) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if p.in != nil {
		f.remove(p)
	} else if l := f.lanes[p.lane]; l != nil {
		f.held--
		f.grant(l)
	} else {
		f.pass()
	}
}

func (f *Fair) remove(p *place) {
	l := f.lanes[p.lane]
	l.queue.Remove(p.in)
	p.in = nil
	f.waiting--
	if l.queue.Len() == 0 {
		f.turns.Remove(l.turn)
		delete(f.lanes, p.lane)
	}
}
