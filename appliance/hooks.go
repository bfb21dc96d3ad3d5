package appliance

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"countersign/audit"
	"countersign/internal/cause"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/meter"
	"countersign/internal/webhook"
)

const hookRetry = 10 * time.Second // after a failure of the ledger

// hookKeys is the prefix of the records of delivered messages: webhook/target/subject -> id. The
// subject of a rotation is the key, since a newer rotation takes the place of an older one, and the
// subject of a compromise is key/version. After a restart, the messages that were not delivered are
// sent again.
const hookKeys = "webhook/"

// hookBody is the payload of a message (Standard Webhooks).
type hookBody struct {
	Type      string          `json:"type"`
	Timestamp time.Time       `json:"timestamp"`
	Data      json.RawMessage `json:"data"` // the event that peers get
}

// hook is a message to all webhooks.
type hook struct {
	id      string
	subject string // see hookKeys
	key     keystore.Ref
	kind    string // hookBody.Type
	event   string
}

// hooksOf returns the messages about all present news. An id names the appliance by the log's key:
// the keys of a new appliance may repeat names and versions of a lost one, and a receiver drops an
// id that it has seen.
func (a *Appliance) hooksOf() (all []hook, err error) {
	log, _, err := a.Log()
	if err != nil {
		return nil, err
	}
	compromises, rotations := a.Keys.News()
	for _, n := range compromises {
		all = append(all, hook{
			fmt.Sprintf("compromise_%s_%s_%d", log.ID(), n.Name, n.Version),
			n.Ref.String(), n.Ref, webhook.Compromises, n.Event,
		})
	}
	for _, n := range rotations {
		message := fmt.Sprintf("rotation_%s_%s_%d", log.ID(), n.Name, n.Version)
		if n.Change > 0 { // moved or called off: a message of its own
			message += fmt.Sprintf("_change%d", n.Change)
		}
		all = append(all, hook{message, n.Name, n.Ref, webhook.Rotations, n.Event})
	}
	return all, nil
}

// keepHooks sends messages about rotations and compromises to the webhooks until ctx ends.
func (a *Appliance) keepHooks(ctx context.Context) {
	if len(a.webhooks) == 0 {
		return
	}
	sender, err := webhook.New(webhook.Config{
		Targets: a.webhooks, Log: a.log, Sign: a.signHook,
		Delivered: func(target string, m webhook.Message) {
			if err := a.writeHook(ctx, target, m.Subject, m.ID); err != nil {
				a.log.Error("the delivery to a webhook is not written; after a restart the message is sent again",
					"target", target, "id", m.ID, "err", err)
			}
		},
		GaveUp: func(target, id string, err error) {
			a.log.Error("a webhook is not told", "target", target, "id", id, "err", err)
			a.meter.Add(meter.MessagesDropped, meter.AboutKeys)
		},
	})
	if err != nil { // the configuration has been checked before
		a.log.Error("there are no webhooks", "err", err)
		return
	}
	a.hooks.Store(sender)
	news := make(chan struct{}, 1)
	a.Keys.Watch(func() {
		select {
		case news <- struct{}{}:
		default: // the last signal has not been read yet
		}
	})
	done := make(chan struct{})
	go func() { defer close(done); sender.Run(ctx) }()
	defer func() { <-done }()
	queued := map[[2]string]bool{}
	again := time.NewTimer(0)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-again.C:
		case <-news:
		}
		if err := a.queueHooks(ctx, sender, queued); err != nil && ctx.Err() == nil {
			a.log.Error("webhooks are not told; a retry follows", "err", err)
			again.Reset(hookRetry)
		}
	}
}

// hookCauses returns the webhooks that were not told at the last attempt. An attempt follows for
// each message that waits, and for each new message.
func (a *Appliance) hookCauses() (all []cause.Cause) {
	sender := a.hooks.Load()
	if sender == nil {
		return nil
	}
	for target, err := range sender.Failures() {
		all = append(all, cause.Webhook.Err(target, err)...)
	}
	return all
}

// writeHook writes the id of a delivered message, also while the daemon stops.
func (a *Appliance) writeHook(ctx context.Context, target, subject, id string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.limits.RequestTimeout)
	defer cancel()
	return a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		return tx.Put(ledger.Meta, hookKeys+target+"/"+subject, []byte(id))
	})
}

// queueHooks queues the messages that have not been delivered. The event of a message is on disk
// before. queued has the messages in the queue.
func (a *Appliance) queueHooks(ctx context.Context, sender *webhook.Sender, queued map[[2]string]bool) error {
	told := map[string]string{}
	if err := a.ledger.All(ledger.Meta, func(name string, value []byte) error {
		if strings.HasPrefix(name, hookKeys) {
			told[name] = string(value)
		}
		return nil
	}); err != nil {
		return err
	}
	all, err := a.hooksOf()
	if err != nil {
		return err
	}
	for _, h := range all {
		var to []string
		for _, t := range a.webhooks {
			if t.Takes(h.kind) && told[hookKeys+t.Name+"/"+h.subject] != h.id && !queued[[2]string{t.Name, h.id}] {
				to = append(to, t.Name)
			}
		}
		if len(to) == 0 {
			continue
		}
		body, err := json.Marshal(hookBody{h.kind, time.Now().UTC().Truncate(time.Second), json.RawMessage(h.event)})
		if err != nil {
			return err
		}
		m := audit.Message{ID: h.id, Body: sha256.Sum256(body)}
		if err := a.record(ctx, audit.NewWebhookQueued(h.key.String(), m)); err != nil {
			return err
		}
		for _, name := range to {
			if err := sender.Queue(name, webhook.Message{ID: h.id, Subject: h.subject, Body: body}); err != nil {
				return err
			}
			queued[[2]string{name, h.id}] = true
		}
	}
	return nil
}
