package admin

import (
	"context"
	"sync"
	"time"

	"countersign/admin/api"
	"countersign/appliance"
)

// The states of an appliance. The first one that holds is the one that it is in.
const (
	stateUninitialised = "uninitialised" // it has no operators
	stateRolledBack    = string(appliance.RolledBack)
	stateLocked        = string(appliance.LockedUp)
	stateDegraded      = string(appliance.Degraded)
)

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
	if s.canaries.fly(s.Appliance.Canary) != nil {
		return well{}, unavailable.errorf("it can't sign now: countersign admin state says more to operators")
	}
	return well{true}, nil
}

// health says to anybody in which state the appliance is, and why to operators only.
func (s *server) health(_ context.Context, who caller, _ *none) (api.Health, error) {
	h := s.Appliance.Health()
	doc := api.Health{State: string(h.Condition), Causes: []string{}, Locked: h.Lock != nil, Unattended: !h.Attended}
	if !s.Operators.Initialised() {
		doc.State = stateUninitialised
	}
	if h.Lock != nil {
		doc.Since = h.Lock.At.Unix()
	}
	if who.session != nil {
		doc.Causes = append(doc.Causes, h.Causes...)
	}
	return doc, nil
}

type lockInput = body[api.Lock]

func (s *server) lock(ctx context.Context, who caller, in *lockInput) error {
	return s.Appliance.Lock(ctx, who.actor(), in.Body.Reason)
}

func (s *server) unlock(ctx context.Context, who caller, _ *none) error {
	return s.Appliance.Unlock(ctx, who.actor())
}
