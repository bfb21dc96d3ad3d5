package admin

import (
	"context"
	"sync"
	"time"

	"countersign/admin/api"
	"countersign/appliance"
)

// The states of an appliance. If several apply, the first one counts.
const (
	stateUninitialised = "uninitialised" // no operators
	stateRolledBack    = string(appliance.RolledBack)
	stateLocked        = string(appliance.LockedUp)
	stateDegraded      = string(appliance.Degraded)
)

// A canary is a test signature. Strangers can ask for one, so all callers together get one a
// second.
const (
	canaryTimeout  = 5 * time.Second
	canaryInterval = time.Second
)

// canaryCache has the result of the last canary.
type canaryCache struct {
	mu  sync.Mutex
	at  time.Time
	err error
}

// result returns the cached result, or the result of a new canary after canaryInterval.
func (c *canaryCache) result(canary func(context.Context) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.at) >= canaryInterval {
		// The result is for all callers, so the context is of none.
		ctx, cancel := context.WithTimeout(context.Background(), canaryTimeout)
		defer cancel()
		c.err = canary(ctx)
		c.at = time.Now()
	}
	return c.err
}

// well is the answer of alive and ready. The callers can be strangers, so the answer has no causes.
// The name of the type is in the OpenAPI document.
type well struct {
	OK bool `json:"ok"`
}

func (s *server) alive(ctx context.Context, _ caller, _ *none) (well, error) {
	ctx, cancel := context.WithTimeout(ctx, canaryTimeout)
	defer cancel()
	if s.Appliance.Alive(ctx) != nil {
		return well{}, unavailable.errorf("the ledger's writer does not come round")
	}
	return well{true}, nil
}

func (s *server) ready(_ context.Context, _ caller, _ *none) (well, error) {
	if s.canary.result(s.Appliance.Canary) != nil {
		return well{}, unavailable.errorf("it can't sign now: countersign admin state says more to operators")
	}
	return well{true}, nil
}

// health returns the state of the appliance. Only operators get the causes.
func (s *server) health(_ context.Context, who caller, _ *none) (api.Health, error) {
	return s.healthDoc(who.session != nil), nil
}

// healthDoc returns the state, with the causes or without.
func (s *server) healthDoc(causes bool) api.Health {
	h := s.Appliance.Health()
	doc := api.Health{State: string(h.Condition), Causes: []api.Cause{}, Locked: h.Lock != nil, Unattended: !h.Attended}
	if !s.Operators.Initialised() {
		doc.State = stateUninitialised
	}
	if h.Lock != nil {
		doc.Since = h.Lock.At.Unix()
	}
	if causes {
		doc.Nonces = noncesDoc(s.Appliance.Nonces())
		doc.KeyWorkers = &s.KeyWorkers
		doc.Alerts = docs(s.Appliance.Alerts.Firing(), alertDoc)
		for _, c := range h.Causes {
			doc.Causes = append(doc.Causes, api.Cause{
				Code: c.Code, Subject: c.Subject, Text: c.Text, Do: c.Do, Stops: c.Stops,
			})
		}
	}
	return doc
}

func noncesDoc(n appliance.Nonces) *api.Nonces {
	return &api.Nonces{
		Alive: n.Alive, Max: n.Max, Signing: n.Signing, Verifying: n.Verifying, VerifyingMax: n.Bounds.Verifying,
		Own: n.Own, OwnReserved: n.Bounds.Own, PeerMax: n.Bounds.Peer,
		Largest: docs(n.Largest, func(s appliance.NonceShare) api.NonceShare {
			return api.NonceShare{Peer: s.Peer, Use: s.Use.String(), Alive: s.Alive}
		}),
	}
}

type lockInput = body[api.Lock]

func (s *server) lock(ctx context.Context, who caller, in *lockInput) error {
	return s.Appliance.Lock(ctx, who.actor(), in.Body.Reason)
}

func (s *server) unlock(ctx context.Context, who caller, _ *none) error {
	return s.Appliance.Unlock(ctx, who.actor())
}
