package gate

import (
	"context"
	"maps"
	"slices"
	"sync/atomic"
)

// The invariant of Use and Enforce: when Enforce has returned, no key is given to a device, and no
// signature or confirmation is released, that the state does not allow since before Enforce. A call
// that the device has begun may end, and its signature is withheld.
//
//   - A use begins before its first check, so Enforce finds the use, or the check finds the new
//     state.
//   - Enforce cuts a use of a device off: the wait ends at once, in a queue or for a device that
//     hangs, and the use stays cut off, whatever the state is later.
//   - Enforce waits for a release: the answer is being written to its connection. So a release must
//     have a timeout.

// Use is a use of a private key by a device, or the release of an answer, that is under way.
type Use struct {
	gate   *Gate
	may    func() error
	taken  atomic.Pointer[error] // set by Enforce
	cancel context.CancelFunc    // of a use of a device
	ended  chan struct{}         // of a release; closed by End
}

// Use begins a use of a device, until End. The function may returns the error of a use that the
// present state does not allow. may must not wait, and must not begin a use. The returned context
// ends when Enforce cuts the use off.
func (g *Gate) Use(ctx context.Context, may func() error) (context.Context, *Use) {
	ctx, cancel := context.WithCancel(ctx)
	return ctx, g.begin(&Use{gate: g, may: may, cancel: cancel})
}

// Release begins the release of an answer, until End. may is as for Use.
func (g *Gate) Release(may func() error) *Use {
	return g.begin(&Use{gate: g, may: may, ended: make(chan struct{})})
}

func (g *Gate) begin(u *Use) *Use {
	g.using.Lock()
	defer g.using.Unlock()
	g.uses[u] = struct{}{}
	return u
}

// Err returns the error of a use that was cut off, or that the present state does not allow.
func (u *Use) Err() error {
	if err := u.taken.Load(); err != nil {
		return *err
	}
	return u.may()
}

// End ends the use.
func (u *Use) End() {
	u.gate.using.Lock()
	delete(u.gate.uses, u)
	u.gate.using.Unlock()
	if u.cancel != nil {
		u.cancel()
	} else {
		close(u.ended)
	}
}

// Enforce makes a change of the state exact: uses of devices that the state does not allow any more
// are cut off, and such releases have ended when Enforce returns. The caller has changed the state,
// and must not hold a lock that a function may takes.
func (g *Gate) Enforce() {
	g.using.Lock()
	uses := slices.Collect(maps.Keys(g.uses))
	g.using.Unlock()
	var releases []*Use
	for _, u := range uses {
		err := u.may()
		switch {
		case err == nil:
		case u.cancel == nil:
			releases = append(releases, u)
		case u.taken.CompareAndSwap(nil, &err):
			u.cancel()
		}
	}
	for _, u := range releases {
		<-u.ended
	}
}
