package sink

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"countersign/internal/webhook"
)

// Webhook is a Receiver that posts a batch as one signed message of the type audit.events (Standard
// Webhooks). The id of a message names the log, the sink and the numbers of the first and the last
// event.
type Webhook struct {
	Name   string
	LogID  string          // the part of the log's name behind the slash
	Sender *webhook.Sender // has the target Name; its queue is not used
}

type webhookBody struct {
	Type      string      `json:"type"`
	Timestamp time.Time   `json:"timestamp"`
	Data      webhookData `json:"data"`
}

type webhookData struct {
	Gaps   []webhookGap      `json:"gaps,omitempty"`
	Events []json.RawMessage `json:"events"`
}

type webhookGap struct {
	From   uint64 `json:"from"`
	Before uint64 `json:"before"`
	Why    string `json:"why"`
}

// Resume returns 0: a receiver does not tell what it has.
func (*Webhook) Resume() (uint64, error) { return 0, nil }

// Deliver makes one attempt.
func (w *Webhook) Deliver(ctx context.Context, b Batch) error {
	body := webhookBody{Type: "audit.events", Timestamp: time.Now().UTC().Truncate(time.Second)}
	body.Data.Events = []json.RawMessage{}
	first, last := uint64(0), uint64(0)
	for i, g := range b.Gaps {
		if body.Data.Gaps = append(body.Data.Gaps, webhookGap{g.From, g.Before, g.Why}); i == 0 {
			first = g.From
		}
		last = g.Before - 1
	}
	for i, r := range b.Events {
		line := fmt.Appendf(nil, `{"index":%d,%s`, r.Index, r.Entry[1:])
		if body.Data.Events = append(body.Data.Events, line); i == 0 && len(b.Gaps) == 0 {
			first = r.Index
		}
		last = r.Index
	}
	id := fmt.Sprintf("events_%s_%s_%d_%d", w.LogID, w.Name, first, last)
	text, err := json.Marshal(body)
	if err != nil {
		return err
	}
	return w.Sender.Send(ctx, w.Name, id, text)
}

// Close does nothing: each attempt has a connection of its own.
func (*Webhook) Close() error { return nil }
