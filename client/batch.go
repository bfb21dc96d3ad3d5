package client

import (
	"context"
	"errors"
	"fmt"

	"countersign/wire"
)

// Item is one operation of a batch: to sign Document with Key or, where Verify is set, to verify a
// signed document.
type Item struct {
	Key      string // Verify: may be empty, as in Client.Verify
	Document Document
	Verify   *Signed
}

// Outcome is the result of an item: Err, or Signed, or the event of a verification.
type Outcome struct {
	Signed *Signed
	Event  uint64
	Err    error
}

// Batch sends several operations in one request. The appliance admits all of them with one write to
// its disk. Batch returns an outcome for each item, in the order of the items. Two items with one
// nonce have no order: either of them may be the first.
//
// The error concerns the batch as a whole, and the outcome of every item is unknown then. The sign
// items may be sent again unchanged, with the documents as Fill has completed them.
func (c *Client) Batch(ctx context.Context, items []Item) ([]Outcome, error) {
	type signItem struct {
		Op  string `json:"op"`
		Key string `json:"key"`
		wire.Document
	}
	type verifyItem struct {
		Op        string       `json:"op"`
		Key       *string      `json:"key,omitempty"`
		PublicKey wire.Bytes32 `json:"public_key"`
		Signature wire.Bytes   `json:"signature"`
		wire.Document
	}
	documents, requests, idempotent := make([]Document, len(items)), make([]any, len(items)), true
	for i, item := range items {
		if s := item.Verify; s != nil {
			v := verifyItem{Op: wire.OpVerify, PublicKey: s.PublicKey, Signature: s.Signature, Document: s.wire()}
			if item.Key != "" {
				v.Key = &item.Key
			}
			requests[i], idempotent = v, false
			continue
		}
		documents[i] = item.Document.Fill(c.config.Lifetime)
		requests[i] = signItem{wire.OpSign, item.Key, documents[i].wire()}
	}
	answer, err := c.ask(ctx, idempotent, func(id string) any {
		return struct {
			ID    string `json:"id"`
			Op    string `json:"op"`
			Items []any  `json:"items"`
		}{id, wire.OpBatch, requests}
	})
	if err != nil {
		return nil, err
	}
	var answers wire.Answers
	if err := decode(answer, &answers); err != nil {
		return nil, err
	}
	if len(answers.Answers) != len(items) {
		return nil, fmt.Errorf("%w: %d answers to %d items", ErrWrongAnswer, len(answers.Answers), len(items))
	}
	outcomes := make([]Outcome, len(items))
	for i, a := range answers.Answers {
		each := wire.Answer{Request: fmt.Sprintf("%s.%d", answer.Request, i), Result: a.Result, Error: a.Error}
		outcomes[i] = c.outcome(ctx, items[i], documents[i], each)
	}
	return outcomes, nil
}

func (c *Client) outcome(ctx context.Context, item Item, d Document, answer wire.Answer) (o Outcome) {
	if item.Verify == nil {
		var s wire.Signed
		if o.Err = decode(answer, &s); o.Err == nil {
			o.Signed, o.Err = c.checkSigned(ctx, item.Key, d, s)
		}
		if o.Signed != nil {
			o.Event = o.Signed.Event
		}
		return o
	}
	var v wire.Verified
	if o.Err = decode(answer, &v); o.Err == nil {
		o.Event, o.Err = v.Event, c.checkVerified(ctx, item.Verify, v)
	} else if errors.Is(o.Err, ErrUnavailable) {
		o.Err = fmt.Errorf("%w: %w", ErrUnknownOutcome, o.Err)
	}
	return o
}
