package client

import (
	"context"
	"encoding/hex"
	"fmt"
	"slices"

	"countersign/audit"
	"countersign/transcript"
	"countersign/wire"
)

// Proof gets the proof that an event of this peer is in the appliance's audit log. With
// Config.LogKey, Proof checks the proof as Sign and Verify check theirs, and an invalid one is
// ErrUnproven. Without LogKey, audit.Log.Check checks the proof.
func (c *Client) Proof(ctx context.Context, event uint64) (audit.Proof, error) {
	p, err := c.eventProof(ctx, event)
	if err == nil && c.memory != nil {
		_, err = c.proven(ctx, p)
	}
	return p, err
}

// eventProof gets the proof of an event of this peer, unchecked.
func (c *Client) eventProof(ctx context.Context, event uint64) (audit.Proof, error) {
	p, err := c.proof(ctx, func(id string) any { return wire.Proof{ID: id, Op: wire.OpProof, Event: event} })
	if err == nil && p.Event != event {
		return audit.Proof{}, fmt.Errorf("%w: it proves event %d, not event %d", ErrWrongAnswer, p.Event, event)
	}
	return p, err
}

// proven returns the event of this peer that a proof is about. The log must continue the log that
// the client has seen before.
func (c *Client) proven(ctx context.Context, p audit.Proof) (audit.Event, error) {
	e, checkpoint, err := c.memory.log.Check(p)
	if err == nil && !c.isOwn(e.Actor) {
		err = fmt.Errorf("event %d is another peer's", p.Event)
	}
	if err == nil {
		err = c.remember(ctx, checkpoint, p.Checkpoint)
	}
	if err != nil {
		return e, fmt.Errorf("%w: %w", ErrUnproven, later{err})
	}
	return e, nil
}

// proof gets an inclusion proof.
func (c *Client) proof(ctx context.Context, request func(id string) any) (audit.Proof, error) {
	var p wire.Proven
	if err := c.call(ctx, true, request, &p); err != nil {
		return audit.Proof{}, err
	}
	return audit.Proof{
		Event: p.Event, Index: p.Index, Leaf: p.Leaf, Path: hashes(p.Path), Checkpoint: []byte(p.Checkpoint),
	}, nil
}

// checkProof gets and checks the proof of an event. The event must be in the log, be of this peer
// and of the kind, and satisfy says.
func (c *Client) checkProof(ctx context.Context, event uint64, kind audit.Kind, says func(audit.Event) bool) error {
	p, err := c.eventProof(ctx, event)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnproven, later{err})
	}
	e, err := c.proven(ctx, p)
	if err == nil && (e.Type.Kind() != kind || !says(e)) {
		err = fmt.Errorf("%w: event %d is about something else", ErrUnproven, event)
	}
	return err
}

// isOwn reports whether an actor is this peer, by its present key or a former one.
func (c *Client) isOwn(a audit.Actor) bool {
	return slices.ContainsFunc(append(slices.Clone(c.config.FormerKeys), c.config.Identity.Public()),
		func(key [32]byte) bool { return a.PublicKey == audit.Peer("", key).PublicKey })
}

// isAbout says whether an event is about a document.
func isAbout(e audit.Event, doc *transcript.Document) bool {
	nonce, digest := hex.EncodeToString(doc.Nonce[:]), doc.Digest()
	return e.Metadata["nonce"] == nonce && e.Metadata["digest"] == hex.EncodeToString(digest[:])
}
