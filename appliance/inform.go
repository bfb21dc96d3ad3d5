package appliance

import (
	"context"
	"errors"
	"fmt"

	"countersign/internal/keyring"
	"countersign/internal/peers"
	"countersign/wire"
)

// rotations lists what a peer has not acknowledged, except what it was told on this connection (heard,
// by key), and notes there what it lists.
func (a *Appliance) rotations(m *peers.Member, heard map[string]string) (all []string) {
	for _, n := range a.Keys.Announcements() {
		if a.Peers.Known(m, n.Name) < n.Version && heard[n.Name] != n.Event {
			heard[n.Name] = n.Event
			all = append(all, n.Event)
		}
	}
	return all
}

// inform tells a peer of rotations until ctx ends: when they are announced, and at each connection,
// until the peer has acknowledged them.
func (a *Appliance) inform(ctx context.Context, s *session) {
	heard := map[string]string{}
	for {
		for _, event := range a.rotations(s.Member, heard) {
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

// Acknowledge notes that a peer has taken notice of a rotation.
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

// static is the listener's key as package noise wants it: its uses wait in the lane of handshakes.
type static struct{ key *keyring.Key }

func (s static) Public() [32]byte { return [32]byte(s.key.Info().PublicKey) }

func (s static) Exchange(ctx context.Context, peer [32]byte) ([32]byte, error) {
	return s.key.Exchange(ctx, keyring.Handshakes, peer)
}
