package worker

import (
	"errors"
	"slices"

	"countersign/internal/keystore"
)

// The circuit breaker is open (down) while no slot has a worker and no healthy slot is starting
// one. Calls then fail at once. Each start of a worker, with its login and health check, is the
// probe that can close the breaker. An outage is reported once, and so is its end. An outage is an
// open breaker, or a key that the device refuses to unseal.

// change is a report of an outage's start or end, or of a key's loss or return.
type change struct {
	resource string // Config.Name, or the key's reference
	up       bool
	cause    error
}

// slotsChanged updates the breaker and the queue after a worker has come or gone, under mu.
func (p *Pool) slotsChanged() {
	p.down = true
	for _, s := range p.slots {
		p.down = p.down && s.process == nil && !s.starting
	}
	if p.down && p.opened {
		p.reportOutage(p.outage())
	}
	p.dispatch()
}

// reportOutage reports an outage, unless the one before has not ended. The caller holds mu.
func (p *Pool) reportOutage(cause error) {
	if !p.outageReported.Swap(true) {
		p.enqueueChange(change{p.config.Name, false, cause})
	}
}

// reportRecovery reports the end of an outage. A late answer of a worker that is gone by now is no
// recovery: the breaker must be closed, and no key sealed.
func (p *Pool) reportRecovery() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.outageReported.Load() && !p.down && len(p.sealed) == 0 {
		p.outageReported.Store(false)
		p.enqueueChange(change{resource: p.config.Name, up: true})
	}
}

// trackSealed keeps the set of keys that the device refuses to unseal: in the machine's present
// state (keystore.ErrSealed), or by the PIN where only some keys need the PIN. err is the result of
// a use of the key. The first such key begins an outage, and the last key's return ends the outage.
func (p *Pool) trackSealed(ref keystore.Ref, err error) {
	sealed := errors.Is(err, keystore.ErrSealed) || p.config.PINPerKey && errors.Is(err, keystore.ErrAuth)
	if !sealed && (err != nil || p.sealedCount.Load() == 0) {
		return // the usual case, without a lock
	}
	p.mu.Lock()
	if sealed {
		p.sealed[ref] = err
	} else {
		delete(p.sealed, ref)
	}
	p.sealedCount.Store(int64(len(p.sealed)))
	if sealed {
		p.reportOutage(err)
	}
	p.mu.Unlock()
	if !sealed {
		p.reportRecovery()
	}
}

// maxChanges is the largest number of changes queued for a slow OnChange.
const maxChanges = 64

// enqueueChange queues a change for deliverChanges without blocking. The caller holds mu. With a
// full queue, the end of an outage cancels the outage's start, so the changes of each resource
// still alternate.
func (p *Pool) enqueueChange(c change) {
	if c.up && len(p.changes) >= maxChanges {
		for i, before := range slices.Backward(p.changes) {
			if before.resource == c.resource {
				p.changes = slices.Delete(p.changes, i, i+1)
				return
			}
		}
	}
	p.changes = append(p.changes, c)
	select {
	case p.changed <- struct{}{}:
	default:
	}
}

// deliverChanges logs the queued changes and passes them to OnChange, in order, until Close.
func (p *Pool) deliverChanges() {
	for {
		select {
		case <-p.changed:
		case <-p.closed:
			return
		}
		p.mu.Lock()
		changes := p.changes
		p.changes = nil
		p.mu.Unlock()
		for _, c := range changes {
			if p.isClosed() {
				return
			}
			switch {
			case c.resource != p.config.Name && c.up:
				p.config.Log.Info("a key is on its token again", "key", c.resource, "token", p.config.Name)
			case c.resource != p.config.Name:
				p.config.Log.Error("a key is not on its token: restore the token, or rotate the key",
					"key", c.resource, "token", p.config.Name, "err", c.cause)
			case c.up:
				p.config.Log.Info("the token serves again", "token", p.config.Name)
			default:
				p.config.Log.Error("the token does not serve: its keys are unavailable until it is back",
					"token", p.config.Name, "err", c.cause)
			}
			if p.config.OnChange != nil {
				p.config.OnChange(c.resource, c.up, c.cause)
			}
		}
	}
}
