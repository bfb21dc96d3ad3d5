package gate_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"countersign/internal/gate"
)

// TestEnforce: uses that the state does not allow are cut off for good, and such releases are
// waited for. Others go on. A use that begins later asks the state itself.
func TestEnforce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := gate.New(nil)
		gone := errors.New("the right is gone")
		var taken atomic.Bool
		may := func() error {
			if taken.Load() {
				return gone
			}
			return nil
		}
		always := func() error { return nil }
		ctx, cut := g.Use(t.Context(), may)
		other, goesOn := g.Use(t.Context(), always)
		written, unread := g.Release(may), g.Release(always)
		g.Enforce()
		if ctx.Err() != nil || cut.Err() != nil {
			t.Errorf("without a change: %v, %v", ctx.Err(), cut.Err())
		}
		taken.Store(true)
		enforced := make(chan struct{})
		go func() { g.Enforce(); close(enforced) }()
		synctest.Wait()
		select {
		case <-enforced:
			t.Error("it returns before the release has ended")
		default:
		}
		if !errors.Is(ctx.Err(), context.Canceled) || other.Err() != nil || goesOn.Err() != nil {
			t.Errorf("%v, %v, %v", ctx.Err(), other.Err(), goesOn.Err())
		}
		if _, late := g.Use(t.Context(), may); late.Err() != gone {
			t.Errorf("a later use: %v", late.Err())
		}
		taken.Store(false)
		if cut.Err() != gone {
			t.Errorf("the use that was cut off: %v, want %v", cut.Err(), gone)
		}
		written.End()
		<-enforced
		unread.End()
		cut.End()
		goesOn.End()
		taken.Store(true)
		g.Enforce() // nothing is under way
	})
}
