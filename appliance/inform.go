package appliance

import (
	"context"
	"errors"
	"fmt"

	"countersign/internal/keyring"
	"countersign/internal/ledger"
	"countersign/internal/peers"
	"countersign/wire"
)

// news returns the compromises and rotations that a peer has not acknowledged, without the events
// sent on this connection. Compromises come first: a peer learns that a version is not to be
// believed before the peer learns of a version after it. sent has the last event of each subject;
// news adds the returned events.
func (a *Appliance) news(s *peers.Session, sent map[string]string) (all []string) {
	add := func(subject, event string) {
		if sent[subject] != event {
			sent[subject] = event
			all = append(all, event)
		}
	}
	compromises, rotations := a.Keys.News()
	for _, n := range compromises {
		if !a.Peers.Warned(s, n.Name, n.Version) {
			add(n.Ref.String(), n.Event)
		}
	}
	for _, n := range rotations {
		if a.Peers.Known(s, n.Name) < n.Version {
			add(n.Name, n.Event)
		}
	}
	return all
}

// inform sends news to a peer until ctx ends. A peer gets a piece of news at once, and on each new
// connection until the peer has acknowledged the news.
func (a *Appliance) inform(ctx context.Context, s *session) {
	sent := map[string]string{}
	for {
		for _, event := range a.news(s.Session, sent) {
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

// Acknowledge writes that a peer has acknowledged a rotation or a compromise.
func (a *Appliance) Acknowledge(ctx context.Context, who Caller, r *wire.Ack) (*wire.Acknowledged, error) {
	check := func() error { return a.Keys.CheckAnnounced(r.Key, r.Version, r.Change) }
	write := func() error {
		still := func(tx *ledger.Tx) error { return a.Keys.StillAnnounced(tx, r.Key, r.Version, r.Change) }
		return a.Peers.Acknowledge(ctx, who.Peer, who.actor(), r.Key, r.Version, still)
	}
	if r.Op == wire.OpCompromiseAck {
		check = func() error { return a.Keys.CheckCompromised(r.Key, r.Version) }
		write = func() error {
			return a.Peers.AcknowledgeCompromise(ctx, who.Peer, who.actor(), r.Key, r.Version)
		}
	}
	if err := check(); err != nil && a.Peers.In(who.PublicKey) {
		return nil, err
	}
	err := write()
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
