package ledger

import (
	"context"
	"sync"
)

// Group makes one request of the admissions of its members, so that the items of a batch share a
// commit. The group is handed to the writer when each member has admitted something or has left.
// The contexts of all members end together.
type Group struct {
	l *Ledger

	mu       sync.Mutex
	expected int // members that have neither come nor left
	requests []*request
}

// Group returns a group of n members; n is at most 512.
func (l *Ledger) Group(n int) *Group { return &Group{l: l, expected: n} }

// Member is a place in a Group, for one Admit. A nil Member admits alone.
type Member struct {
	group *Group
	once  sync.Once
}

// Member returns one of the places. It must be called once for each of the n members.
func (g *Group) Member() *Member { return &Member{group: g} }

// Leave ends a membership, whether the member has admitted something or not. A member that does not
// leave keeps the others waiting until their contexts end.
func (m *Member) Leave(ctx context.Context) {
	if m != nil {
		m.once.Do(func() { m.group.come(ctx, nil) })
	}
}

// join hands a request to the group, if the member has not handed one in before.
func (m *Member) join(ctx context.Context, r *request) (joined bool) {
	if m == nil {
		return false
	}
	m.once.Do(func() { joined = true; m.group.come(ctx, r) })
	return joined
}

// come notes that a member has come with a request, or has left (nil). The last member hands all
// requests to the writer.
func (g *Group) come(ctx context.Context, r *request) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if r != nil {
		g.requests = append(g.requests, r)
	}
	if g.expected--; g.expected > 0 || len(g.requests) == 0 {
		return
	}
	all := g.requests
	done := make(chan error, 1)
	whole := &request{done: done, apply: func(t *txn) error {
		for _, r := range all {
			if err := r.apply(t); err != nil {
				return err // a request that shares a transaction fails only by damage
			}
		}
		return nil
	}}
	go func() {
		select {
		case g.l.requests <- whole:
		case <-ctx.Done():
			return // each member sees the end of its context by itself
		case <-g.l.done:
			return
		}
		select {
		case err := <-done:
			answer(all, err)
		case <-g.l.done:
			select {
			case err := <-done:
				answer(all, err)
			default:
			}
		}
	}()
}
