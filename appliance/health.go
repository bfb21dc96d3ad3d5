package appliance

import (
	"fmt"
	"slices"
	"sync"

	"countersign/internal/cause"
	"countersign/internal/gate"
	"countersign/internal/keystore"
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
	Causes    []cause.Cause // the gravest first
	Lock      *Lock         // nil for an unlocked appliance
	Attended  bool          // each start waits for an operator's unlock
}

// conditions has the conditions of causes that have one of their own.
var conditions = map[*cause.Kind]Condition{
	cause.RolledBack: RolledBack, cause.AnchorLost: RolledBack, cause.Locked: LockedUp,
}

// Health returns the state without a call to a device. Each cause is read from the present state
// of its component, so a cause is gone as soon as its reason is.
func (a *Appliance) Health() Health {
	h := Health{Condition: Operational, Lock: a.locked.Load(), Attended: a.attended}
	for _, causes := range a.causes {
		h.Causes = append(h.Causes, causes()...)
	}
	cause.Sort(h.Causes)
	h.Causes = slices.CompactFunc(h.Causes, func(a, b cause.Cause) bool { // a key missed at the start and in use
		return a.Kind == cause.KeyMissing && a.Kind == b.Kind && a.Subject == b.Subject
	})
	if len(h.Causes) > 0 {
		h.Condition = Degraded
	}
	for _, c := range slices.Backward(h.Causes) { // the gravest cause that has a condition counts
		if own, ok := conditions[c.Kind]; ok {
			h.Condition = own
		}
	}
	return h
}

// faults has the cause of each kind of a token's fault.
var faults = map[keystore.FaultKind]*cause.Kind{
	keystore.FaultUnavailable: cause.TokenUnavailable, keystore.FaultPINRefused: cause.TokenPIN,
	keystore.FaultLocked: cause.TokenLocked, keystore.FaultReplaced: cause.TokenReplaced,
	keystore.FaultRedundancy: cause.TokenRedundancy, keystore.FaultRestarts: cause.TokenRestarts,
	keystore.FaultKeyMissing: cause.KeyMissing, keystore.FaultSealed: cause.TokenSealed,
	keystore.FaultJournal: cause.TokenJournal,
}

// Report adds a source of causes. Report must not be called after Serve has begun.
func (a *Appliance) Report(causes func() []cause.Cause) { a.causes = append(a.causes, causes) }

// ownCauses returns the causes of the appliance's own parts.
func (a *Appliance) ownCauses() (all []cause.Cause) {
	all = cause.Locked.Err("", a.gate.Cause(gate.Operator))
	for name, status := range a.Tokens() {
		if !status.Up && len(status.Faults) == 0 { // a store without workers
			all = append(all, cause.TokenUnavailable.Of(name, "%s", status.Cause))
		}
		for _, f := range status.Faults {
			subject, text := name, f.Text
			if f.Key != (keystore.Ref{}) {
				subject, text = f.Key.String(), fmt.Sprintf("token %s: %s", name, f.Text)
			}
			all = append(all, faults[f.Kind].Of(subject, "%s", text))
		}
	}
	all = append(all, cause.Disk.Err("", a.ledger.Trouble())...)
	if load, err := a.ledger.Load(); err == nil && load.DiskFree < a.diskLeast {
		all = append(all, cause.DiskFilling.Of("", "%d MiB are free; %d MiB should be",
			load.DiskFree>>20, a.diskLeast>>20))
	}
	_, _, behind := a.ledger.Clock()
	all = append(all, cause.Clock.Err("", behind)...)
	all = append(all, cause.Traces.Err("", a.traces.Failure())...)
	if a.retentionWaits() {
		all = append(all, cause.RetentionWaits.Of("", "a time of the configuration is shorter"))
	}
	return slices.Concat(all, a.Keys.Causes(), a.policies.causes(), a.upkeep.causes(), a.hookCauses(), a.sinkCauses(),
		a.quotaCauses())
}

// checkpointFailure is the failure of the periodic work with a cause of its own.
const checkpointFailure = "the audit log's checkpoint is not signed; a retry follows"

// upkeep has the failures of the periodic work, each until the work is done again.
type upkeep struct {
	mu     sync.Mutex
	failed map[string]error // by the text of the failure
}

func (u *upkeep) set(failure string, err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.failed == nil {
		u.failed = map[string]error{}
	}
	if u.failed[failure] = err; err == nil {
		delete(u.failed, failure)
	}
}

func (u *upkeep) causes() (all []cause.Cause) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for failure, err := range u.failed {
		if failure == checkpointFailure {
			all = append(all, cause.Checkpoint.Err("", err)...)
		} else {
			all = append(all, cause.Upkeep.Of("", "%s: %v", failure, err))
		}
	}
	return all
}
