package appliance

import (
	"context"

	"countersign/audit"
)

// Start clears away what was cut off, says whether serving can begin, and writes down that it does. Stop writes down that
// it has ended, after everything that was admitted has been settled.
func (a *Appliance) Start(ctx context.Context) error {
	if err := a.Recover(ctx); err != nil {
		return err
	}
	if err := a.Ready(); err != nil {
		return err
	}
	if err := a.loadLock(); err != nil {
		return err
	}
	var err error
	if a.anchored, err = a.startAnchor(ctx); err != nil {
		return err
	}
	if err := a.startPolicy(ctx); err != nil {
		return err
	}
	if err := a.startRetention(ctx); err != nil {
		return err
	}
	return a.recordDaemon(audit.Started)
}

func (a *Appliance) Stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), a.limits.RequestTimeout)
	defer cancel()
	for _, l := range []lock{a.creating, a.locking, a.enrolling, a.activating} { // no act of management begins any more
		if err := l.acquire(ctx); err != nil {
			a.log.Error("stopping during an act of management; the next start clears away what is left of it", "err", err)
		}
	}
	a.refusals.flush(ctx, a)
	if err := a.writeSeen(ctx); err != nil {
		a.log.Error("when peers were last seen is not written down", "err", err)
	}
	if err := a.writeUses(ctx); err != nil {
		a.log.Error("how often keys were used is not written down; the next start counts it", "err", err)
	}
	if err := a.recordDaemon(audit.Stopped); err != nil {
		return err
	}
	a.lastCheckpoint(ctx)
	if rolled, err := a.Rollback(); err != nil || rolled != nil || a.anchor.Token == "" || !a.anchored {
		return err
	}
	if err := a.advance(ctx); err != nil { // what the start finds is sound all the same
		a.log.Error("the ledger's counter has not risen at the end", "err", err)
	}
	return nil
}

// recordDaemon writes down a step of the daemon's own life, even if it is being stopped.
func (a *Appliance) recordDaemon(t audit.Type) error {
	ctx, cancel := context.WithTimeout(context.Background(), a.limits.RequestTimeout)
	defer cancel()
	return a.record(ctx, audit.Event{Type: t, Actor: audit.Daemon(), Action: "serve", Outcome: "ok"})
}
