package client

import (
	"context"
	"encoding/hex"
	"fmt"

	"countersign/audit"
	"countersign/transcript"
	"countersign/wire"
)

// Proof gets the proof that an event of this peer is in the appliance's audit log. Proof does not
// check the proof; audit.Log.Check does. With Config.LogKey, Sign and Verify check their own.
func (c *Client) Proof(ctx context.Context, event uint64) (audit.Proof, error) {
	var p wire.Proven
	err := c.call(ctx, true, func(id string) any {
		return wire.Proof{ID: id, Op: wire.OpProof, Event: event}
	}, &p)
	if err != nil {
		return audit.Proof{}, err
	}
	proof := audit.Proof{Event: p.Event, Index: p.Index, Leaf: p.Leaf, Checkpoint: []byte(p.Checkpoint)}
	for _, h := range p.Path {
		proof.Path = append(proof.Path, audit.Hash(h))
	}
	if p.Event != event {
		return audit.Proof{}, fmt.Errorf("%w: it proves event %d, not event %d", ErrWrongAnswer, p.Event, event)
	}
	return proof, nil
}

// checkProof gets and checks the proof of an event. The event must be in the log, be of this peer
// and of the kind, and satisfy says.
func (c *Client) checkProof(ctx context.Context, event uint64, kind audit.Kind, says func(audit.Event) bool) error {
	p, err := c.Proof(ctx, event)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnproven, err)
	}
	e, _, err := c.log.Check(p)
	own := audit.Peer("", c.config.Identity.Public()).PublicKey
	if err == nil && (e.Type.Kind() != kind || e.Actor.PublicKey != own || !says(e)) {
		err = fmt.Errorf("event %d is about something else", event)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnproven, err)
	}
	return nil
}

// isAbout says whether an event is about a document.
func isAbout(e audit.Event, doc *transcript.Document) bool {
	nonce, digest := hex.EncodeToString(doc.Nonce[:]), doc.Digest()
	return e.Metadata["nonce"] == nonce && e.Metadata["digest"] == hex.EncodeToString(digest[:])
}
