package client

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"

	"countersign/audit"
	"countersign/transcript"
	"countersign/wire"
)

// Proof gets the proof that an event of this peer is in the appliance's audit log. It is not checked here: audit.Log.Check does
// that, and Config.LogKey makes Sign and Verify do it.
func (c *Client) Proof(ctx context.Context, event uint64) (audit.Proof, error) {
	var p wire.Proven
	err := c.call(ctx, true, func(id string) any { return wire.Proof{ID: id, Op: wire.OpProof, Event: event} }, &p)
	if err != nil {
		return audit.Proof{}, err
	}
	proof := audit.Proof{Event: p.Event, Index: p.Index, Leaf: p.Leaf, Checkpoint: []byte(p.Checkpoint)}
	for _, h := range p.Path {
		proof.Path = append(proof.Path, audit.Hash(h))
	}
	if p.Event != event {
		return audit.Proof{}, fmt.Errorf("%w: it proves another event", ErrWrongAnswer)
	}
	return proof, nil
}

// demand checks that an event is in the log, is this peer's, and says what it must.
func (c *Client) demand(ctx context.Context, event uint64, kind audit.Kind, says func(audit.Event) bool) error {
	p, err := c.Proof(ctx, event)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnproven, err)
	}
	e, _, err := c.log.Check(p)
	if err == nil && (e.Type.Kind() != kind || e.Actor.PublicKey != audit.Peer("", c.config.Identity.Public()).PublicKey || !says(e)) {
		err = errors.New("the event is about something else")
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnproven, err)
	}
	return nil
}

// about says that an event is about a document.
func about(e audit.Event, doc *transcript.Document) bool {
	digest := doc.Digest()
	return e.Metadata["nonce"] == hex.EncodeToString(doc.Nonce[:]) && e.Metadata["digest"] == hex.EncodeToString(digest[:])
}
