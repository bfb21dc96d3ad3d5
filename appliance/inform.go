package appliance

import (
	"context"
	"errors"
	"fmt"

	"countersign/internal/keyring"
	"countersign/internal/peers"
	"countersign/wire"
)

// rotations returns the announced rotations that a peer has not acknowledged, without the events
// sent on this connection. sent has the last event of each key; rotations adds the returned events.
func (a *Appliance) rotations(m *peers.Member, sent map[string]string) (all []string) {
	for _, n := range a.Keys.Announcements() {
		if a.Peers.Known(m, n.Name) < n.Version && sent[n.Name] != n.Event {
			sent[n.Name] = n.Event
			all = append(all, n.Event)
		}
	}
	return all
}

// inform sends rotations to a peer until ctx ends. A peer gets a rotation at the announcement, and
// on each new connection until the peer has acknowledged the rotation.
func (a *Appliance) inform(ctx context.Context, s *session) {
	sent := map[string]string{}
	for {
		for _, event := range a.rotations(s.Member, sent) {
			if s.conn.WriteMessage([]byte(event)) != nil {
				s.conn.Close() // the peer does not read
				return
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-s.News:
		}
	}
}

// Acknowledge writes that a peer has acknowledged a rotation.
func (a *Appliance) Acknowledge(ctx context.Context, who Caller, r *wire.Ack) (*wire.Acknowledged, error) {
	if err := a.Keys.CheckAnnounced(r.Key, r.Version); err != nil && a.Peers.In(who.PublicKey) {
		return nil, err
	}
	err := a.Peers.Acknowledge(ctx, who.Peer, who.actor(), r.Key, r.Version)
	if errors.Is(err, peers.ErrGone) {
		err = fmt.Errorf("%w: %w", errNotYours, err)
	}
	if err != nil {
		return nil, err
	}
	return &wire.Acknowledged{Key: r.Key, Version: r.Version}, nil
}

// static is a Noise key of the listener as a noise.Static. Exchanges wait in the lane of
// handshakes.
type static struct{ key *keyring.Key }

func (s static) Public() [32]byte { return [32]byte(s.key.Info().PublicKey) }

func (s static) Exchange(ctx context.Context, peer [32]byte) ([32]byte, error) {
	return s.key.Exchange(ctx, keyring.Handshakes, peer)
}
