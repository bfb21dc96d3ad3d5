package admin

import (
	"context"
	"fmt"
	"sync"
	"time"

	"countersign/admin/api"
	"countersign/appliance"
	"countersign/audit"
	"countersign/keystore"
)

// The states of an appliance. The first one that holds is the one that it is in.
const (
	stateUninitialised = "uninitialised" // it has no operators
	stateRolledBack    = "rolled-back"   // its ledger is older than its counter
	stateLocked        = "locked"        // no key is used
	stateDegraded      = "degraded"      // something that it needs does not answer
	stateOperational   = "operational"
)

// Condition is what an appliance says of itself. Where several things are wrong, it says all of them.
type Condition struct {
	RolledBack bool
	Locked     bool
	Causes     []string  // what does not answer
	Since      time.Time // when it became like that
	Unattended bool      // it starts unlocked
}

// Life is how an appliance is, and what locks it.
type Life interface {
	Condition() Condition
	// Canary makes a signature with each key that signs, and throws it away; nil when all were made before ctx ended.
	Canary(ctx context.Context) error
	Lock(ctx context.Context, who audit.Actor, reason string) error
	Unlock(ctx context.Context, who audit.Actor) error
}

// Plain is the life of an appliance that can't be locked.
type Plain struct{ *appliance.Appliance }

func (p Plain) Condition() (c Condition) {
	c.Unattended = true
	rolled, err := p.Rollback()
	switch {
	case err != nil:
		c.Causes = append(c.Causes, err.Error())
	case rolled != nil:
		c.RolledBack, c.Since, c.Causes = true, rolled.At, append(c.Causes, rolled.Reason)
	}
	for name, status := range p.Tokens() {
		if !status.Up {
			c.Causes = append(c.Causes, fmt.Sprintf("token %s: %s", name, status.Cause))
		}
	}
	return c
}

func (p Plain) Canary(ctx context.Context) error { return p.Alive(ctx) }

func (p Plain) Lock(context.Context, audit.Actor, string) error {
	return fmt.Errorf("lock: %w: it can't be locked yet", keystore.ErrUnavailable)
}

func (p Plain) Unlock(context.Context, audit.Actor) error { return nil }

// canaryTime bounds a canary, and canaryEvery how often one flies, for all callers together: they are not signed in.
const (
	canaryTime  = 5 * time.Second
	canaryEvery = time.Second
)

// canaries remembers the last one.
type canaries struct {
	mu  sync.Mutex
	at  time.Time
	err error
}

func (c *canaries) fly(canary func(context.Context) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.at) >= canaryEvery {
		ctx, cancel := context.WithTimeout(context.Background(), canaryTime) // of no caller's: the result is for all
		defer cancel()
		c.err = canary(ctx)
		c.at = time.Now()
	}
	return c.err
}

// well answers who is not signed in: what is wrong is for operators.
type well struct {
	OK bool `json:"ok"`
}

func (s *server) alive(ctx context.Context, _ caller, _ *none) (well, error) {
	ctx, cancel := context.WithTimeout(ctx, canaryTime)
	defer cancel()
	if s.Appliance.Alive(ctx) != nil {
		return well{}, unavailable.errorf("the ledger's writer does not come round")
	}
	return well{true}, nil
}

func (s *server) ready(_ context.Context, _ caller, _ *none) (well, error) {
	if s.canaries.fly(s.Life.Canary) != nil {
		return well{}, unavailable.errorf("it can't sign now: countersign admin state says more to operators")
	}
	return well{true}, nil
}

func (s *server) health(_ context.Context, _ caller, _ *none) (api.Health, error) {
	c := s.Life.Condition()
	h := api.Health{State: stateOperational, Causes: append([]string{}, c.Causes...), Since: unix(c.Since), Locked: c.Locked, Unattended: c.Unattended}
	switch {
	case c.RolledBack:
		h.State = stateRolledBack
	case c.Locked:
		h.State = stateLocked
	case len(c.Causes) > 0:
		h.State = stateDegraded
	}
	return h, nil
}

type lockInput = body[api.Lock]

func (s *server) lock(ctx context.Context, who caller, in *lockInput) error {
	return s.Life.Lock(ctx, who.actor(), in.Body.Reason)
}

func (s *server) unlock(ctx context.Context, who caller, _ *none) error {
	return s.Life.Unlock(ctx, who.actor())
}
