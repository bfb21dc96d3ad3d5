package appliance

import (
	"fmt"
	"slices"

	"countersign/internal/gate"
)

// Condition is the state of the appliance in one word, for operators.
type Condition string

const (
	Operational Condition = "operational"
	Degraded    Condition = "degraded" // serves at least in part, and an operator should look
	LockedUp    Condition = "locked"
	RolledBack  Condition = "rolled-back"
)

// Health is the state of the appliance with its causes.
type Health struct {
	Condition Condition
	Causes    []string
	Lock      *Lock // nil for an unlocked appliance
	Attended  bool  // each start waits for an operator's unlock
}

// Health returns the state without a call to a device.
func (a *Appliance) Health() Health {
	h := Health{Condition: Operational, Lock: a.locked.Load(), Attended: a.attended}
	add := func(format string, args ...any) { h.Causes = append(h.Causes, fmt.Sprintf(format, args...)) }
	for name, status := range a.Tokens() {
		if !status.Up {
			add("token %s does not serve: %s", name, status.Cause)
		}
	}
	if err := a.ledger.Trouble(); err != nil {
		add("%v", err)
	}
	if _, _, behind := a.ledger.Clock(); behind != nil {
		add("%v", behind)
	}
	h.Causes = append(h.Causes, a.Keys.Problems()...)
	h.Causes = append(h.Causes, a.policies.problems()...)
	a.mu.RLock()
	if a.shorter {
		add("the retention of the configuration is shorter than what is in force, which stays: " +
			"have it approved (countersign admin retention shorten), or correct it")
	}
	a.mu.RUnlock()
	slices.Sort(h.Causes)
	if len(h.Causes) > 0 {
		h.Condition = Degraded
	}
	if why, err := a.gate.Gravest(); err != nil {
		h.Condition = map[gate.Reason]Condition{
			gate.Rollback: RolledBack, gate.Counter: Degraded, gate.Operator: LockedUp,
		}[why]
		h.Causes = slices.Insert(h.Causes, 0, err.Error())
	}
	return h
}
