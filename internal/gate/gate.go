// Package gate says whether anything is admitted. A gate is blocked by reasons, each of which comes
// and goes by itself; while there is one, the ledger admits nothing.
package gate

import (
	"errors"
	"sync"

	"countersign/internal/ledger"
)

// Reason is a reason for which nothing is admitted.
type Reason int

// The reasons, the gravest first.
const (
	Rollback Reason = iota // the ledger is older than the counter that it is bound to
	Counter                // the ledger has not been held against its counter yet
	Operator               // an operator has locked the appliance
	reasons
)

// Gate is safe for concurrent use.
type Gate struct {
	ledger *ledger.Ledger

	mu      sync.RWMutex
	blocked [reasons]error // nil: not by this reason
}

// New returns a gate that lets admissions pass.
func New(l *ledger.Ledger) *Gate { return &Gate{ledger: l} }

// Block stops all admissions for a reason, until it is unblocked. err is what a caller is told.
// Block does not wait for the ledger: admissions that wait there are refused.
func (g *Gate) Block(why Reason, err error) { g.set(why, err) }

// Unblock takes a reason away. Other reasons keep the gate blocked.
func (g *Gate) Unblock(why Reason) { g.set(why, nil) }

func (g *Gate) set(why Reason, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.blocked[why] = err
	for _, err := range g.blocked {
		if err != nil {
			g.ledger.Suspend(err)
			return
		}
	}
	g.ledger.Suspend(nil)
}

// Blocked reports whether a reason blocks the gate.
func (g *Gate) Blocked(why Reason) bool {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.blocked[why] != nil
}

// Err joins the errors of all reasons; nil: admissions pass.
func (g *Gate) Err() error {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return errors.Join(g.blocked[:]...)
}

// Gravest returns the gravest reason with its error; nil: admissions pass.
func (g *Gate) Gravest() (Reason, error) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	for why, err := range g.blocked {
		if err != nil {
			return Reason(why), err
		}
	}
	return 0, nil
}
