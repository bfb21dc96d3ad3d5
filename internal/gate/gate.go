// Package gate decides whether the ledger admits requests. Several independent reasons can block
// the gate: a rollback, a counter not read yet, an operator's lock. The ledger admits nothing while
// at least one reason blocks.
//
// The gate also knows the uses of private keys and the releases of answers that are under way, see
// Use. An act that takes a right away (a lock, a suspension, a removal, a compromise, a rollback)
// changes the state that the uses ask, and then calls Enforce.
package gate

import (
	"errors"
	"sync"

	"countersign/internal/ledger"
)

// Reason is a reason to refuse all admissions.
type Reason int

// The reasons, the gravest first.
const (
	Rollback Reason = iota // the ledger is older than its monotonic counter
	Counter                // the ledger has not been compared with its monotonic counter yet
	Operator               // an operator has locked the appliance
	reasons
)

// Gate is safe for concurrent use.
type Gate struct {
	ledger *ledger.Ledger

	mu      sync.RWMutex
	blocked [reasons]error // nil: the reason does not block

	using sync.Mutex // guards uses; its holder calls nothing
	uses  map[*Use]struct{}
}

// New returns an open gate.
func New(l *ledger.Ledger) *Gate { return &Gate{ledger: l, uses: map[*Use]struct{}{}} }

// Block makes the ledger refuse all admissions until Unblock is called with the same reason. The
// caller of Admit gets the error of the gravest reason. Block does not wait for the ledger: the
// ledger also refuses the admissions in its queue.
func (g *Gate) Block(why Reason, err error) { g.set(why, err) }

// Unblock ends the block by one reason. Other reasons keep blocking.
func (g *Gate) Unblock(why Reason) { g.set(why, nil) }

func (g *Gate) set(why Reason, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.blocked[why] = err
	g.ledger.Suspend(g.gravest())
}

// gravest returns the error of the gravest blocking reason. The caller holds mu.
func (g *Gate) gravest() error {
	for _, err := range g.blocked {
		if err != nil {
			return err
		}
	}
	return nil
}

// Blocked reports whether a reason blocks.
func (g *Gate) Blocked(why Reason) bool {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.blocked[why] != nil
}

// Err joins the errors of all blocking reasons. A nil error means that the gate is open.
func (g *Gate) Err() error {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return errors.Join(g.blocked[:]...)
}

// Cause returns the error of a reason, or nil for a reason that does not block.
func (g *Gate) Cause(why Reason) error {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.blocked[why]
}
