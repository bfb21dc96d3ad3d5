package client

import (
	"context"
	"errors"
	"fmt"

	"countersign/wire"
)

// Item is one thing that a batch asks for: a signature of Document with Key, or, where Verify is set, that this is judged.
type Item struct {
	Key      string // Verify: may be empty, as in Client.Verify
	Document Document
	Verify   *Signed
}

// Outcome is what became of an item: Err, or Signed, or for what was judged Event.
type Outcome struct {
	Signed *Signed
	Event  uint64
	Err    error
}

// Batch asks for several things at once; the appliance admits them with one write to its disk. There is an outcome for each item, in
// their order. The error is of the batch as a whole: then nothing is known of any item but that what was to be signed may be asked
// for again, as it was, with the documents that Fill has completed.
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
	documents, asked, repeatable := make([]Document, len(items)), make([]any, len(items)), true
	for i, item := range items {
		if item.Verify != nil {
			v := verifyItem{Op: wire.OpVerify, PublicKey: item.Verify.PublicKey, Signature: item.Verify.Signature, Document: item.Verify.wire()}
			if item.Key != "" {
				v.Key = &item.Key
			}
			asked[i], repeatable = v, false
			continue
		}
		documents[i] = item.Document.Fill(c.config.Lifetime)
		asked[i] = signItem{wire.OpSign, item.Key, documents[i].wire()}
	}
	var answers wire.Answers
	err := c.call(ctx, repeatable, func(id string) any {
		return struct {
			ID    string `json:"id"`
			Op    string `json:"op"`
			Items []any  `json:"items"`
		}{id, wire.OpBatch, asked}
	}, &answers)
	if err != nil {
		return nil, err
	}
	if len(answers.Answers) != len(items) {
		return nil, fmt.Errorf("%w: %d answers to %d items", ErrWrongAnswer, len(answers.Answers), len(items))
	}
	outcomes := make([]Outcome, len(items))
	for i, a := range answers.Answers {
		outcomes[i] = c.outcome(ctx, items[i], documents[i], wire.Answer{Result: a.Result, Error: a.Error})
	}
	return outcomes, nil
}

func (c *Client) outcome(ctx context.Context, item Item, d Document, answer wire.Answer) (o Outcome) {
	if item.Verify == nil {
		var s wire.Signed
		if o.Err = decode(answer, &s); o.Err == nil {
			o.Signed, o.Err = c.checked(ctx, item.Key, d, s)
		}
		if o.Signed != nil {
			o.Event = o.Signed.Event
		}
		return o
	}
	var v wire.Verified
	if o.Err = decode(answer, &v); o.Err == nil {
		o.Event, o.Err = v.Event, c.confirmed(ctx, item.Verify, v)
	} else if refusal, is := errors.AsType[*Error](o.Err); is && refusal.Code == wire.CodeUnavailable {
		o.Err = fmt.Errorf("%w: %w", ErrUnknownOutcome, o.Err)
	}
	return o
}
