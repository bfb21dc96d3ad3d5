package appliance

import (
	"context"

	"countersign/internal/keystore"
	"countersign/internal/limit"
)

// Whoever uses a key waits for the device in a lane: each peer in its own, all handshakes in one, and the appliance itself in one. The
// lanes take turns, so that nobody waits for more than one operation of each other lane and those that are under way.

const (
	handshakeLane = "handshakes" // peers' lanes have 32 bytes
	ownLane       = ""
)

type laneKey struct{}

// inLane says for whom a device is used under a context. It is read again where a key is used, with nothing but the keystore's
// contract in between.
func inLane(ctx context.Context, lane string) context.Context {
	return context.WithValue(ctx, laneKey{}, lane)
}

// turn waits for the device.
func (k *Key) turn(ctx context.Context) (release func(), err error) {
	lane, _ := ctx.Value(laneKey{}).(string)
	return k.turns.Acquire(ctx, lane)
}

// Sign waits for its turn and signs. A version that has gone out of use meanwhile signs nothing.
func (k *Key) Sign(ctx context.Context, message []byte, judge keystore.Judge) ([]byte, error) {
	signature, err := k.sign(ctx, message, judge, k.inUse)
	if err == nil {
		k.life.uses.Add(1)
	}
	return signature, err
}

func (k *Key) sign(ctx context.Context, message []byte, judge keystore.Judge, may func() error) ([]byte, error) {
	release, err := k.turn(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	if err := may(); err != nil {
		return nil, err
	}
	signature, err := k.Key.Sign(ctx, message, judge)
	if refused := may(); refused != nil {
		return nil, refused
	}
	return signature, err
}

// Exchange waits for its turn and makes the shared secret.
func (k *Key) Exchange(ctx context.Context, peer [32]byte) (shared [32]byte, err error) {
	release, err := k.turn(ctx)
	if err != nil {
		return shared, err
	}
	defer release()
	if err := k.inUse(); err != nil {
		return shared, err
	}
	shared, err = k.Key.Exchange(ctx, peer)
	if refused := k.inUse(); refused != nil {
		return [32]byte{}, refused
	}
	return shared, err
}

// newTurns makes the queues of the tokens. How many may wait is bounded by what is let in before: see begin and Handshakes.
func newTurns(calls map[string]int, tokens map[string]keystore.Store) map[string]*limit.Fair {
	turns := map[string]*limit.Fair{}
	for name := range tokens {
		turns[name] = limit.NewFair(max(1, calls[name]))
	}
	return turns
}
