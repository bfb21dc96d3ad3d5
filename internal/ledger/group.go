package ledger

import (
	"context"
	"sync"
)

// Group makes the first request of each of its members one, so that they share a commit: those of a batch. A member that ends
// without a request must leave, or the others would wait for it until their contexts end. Their contexts end together.
type Group struct {
	l *Ledger

	mu       sync.Mutex
	expected int // that have neither come nor left
	requests []*request
}

// Group makes one of n members; n is at most maxBatch.
func (l *Ledger) Group(n int) *Group { return &Group{l: l, expected: n} }

type membership struct {
	group *Group
	used  sync.Once
}

type groupKey struct{}

// Join makes ctx a member's. leave must be called when the member has ended, whatever it did.
func (g *Group) Join(ctx context.Context) (member context.Context, leave func()) {
	m := &membership{group: g}
	return context.WithValue(ctx, groupKey{}, m), func() { m.used.Do(func() { g.come(ctx, nil) }) }
}

// joined hands a request to the group of ctx, if it is the member's first one.
func joined(ctx context.Context, r *request) (is bool) {
	m, _ := ctx.Value(groupKey{}).(*membership)
	if m == nil || r.alone || r.done == nil {
		return false
	}
	m.used.Do(func() { is = true; m.group.come(ctx, r) })
	return is
}

// come notes that a member has come with a request, or has left. The last one hands all of them to the writer.
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
				return err // nothing that shares a transaction may fail but for damage
			}
		}
		return nil
	}}
	go func() {
		select {
		case g.l.requests <- whole:
		case <-ctx.Done():
			return // the members see that by themselves
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
