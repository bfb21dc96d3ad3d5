package ledger

import (
	"context"
	"sync"
)

// Group combines the admissions of its members into one request, so that the items of a batch share
// a commit. The writer gets the request when each member has called Admit or Leave. The contexts of
// all members must end together.
type Group struct {
	l *Ledger

	mu       sync.Mutex
	expected int // members that have called neither Admit nor Leave
	requests []*request
}

// Group returns a group of n members. n is at most 512.
func (l *Ledger) Group(n int) *Group { return &Group{l: l, expected: n} }

// Member is a place in a Group for one Admit. An admission with a nil Member has a request of its
// own.
type Member struct {
	group *Group
	once  sync.Once
}

// Member returns a new member. The caller must create all n members.
func (g *Group) Member() *Member { return &Member{group: g} }

// Leave ends the membership. Leave does nothing after an Admit. A member that calls neither keeps
// the other members waiting until their contexts end.
func (m *Member) Leave(ctx context.Context) {
	if m != nil {
		m.once.Do(func() { m.group.arrive(ctx, nil) })
	}
}

// join adds a request to the group, and reports false if the member has joined or left before.
func (m *Member) join(ctx context.Context, r *request) (joined bool) {
	if m == nil {
		return false
	}
	m.once.Do(func() { joined = true; m.group.arrive(ctx, r) })
	return joined
}

// arrive counts a member as arrived, with its request, or with nil after Leave. The last arrival
// sends all requests to the writer.
func (g *Group) arrive(ctx context.Context, r *request) {
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
				return err // an error of a shared transaction is damage to the file
			}
		}
		return nil
	}}
	go func() {
		select {
		case g.l.requests <- whole:
		case <-ctx.Done():
			return // each member sees the end of its own context
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
