package appliance

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"countersign/internal/cause"
	"countersign/internal/keyring"
	"countersign/internal/ledger"
	"countersign/internal/webhook"
	"countersign/wire"
)

// hookKeys is the prefix of the records of delivered messages: webhook/target/key -> id of the last
// message about the key. After a restart, the messages that were not delivered are sent again.
const hookKeys = "webhook/"

// hookBody is the payload of a message (Standard Webhooks).
type hookBody struct {
	Type      string        `json:"type"`
	Timestamp time.Time     `json:"timestamp"`
	Data      wire.Rotation `json:"data"`
}

// hookID returns the id of the message about a rotation. A later compromise of the version before
// has another id, so a message of its own.
func hookID(r wire.Rotation) string {
	id := fmt.Sprintf("rotation_%s_%d", r.Key, r.Version)
	if r.Compromised {
		id += "_compromised"
	}
	return id
}

// keepHooks sends messages about rotations to the webhooks until ctx ends.
func (a *Appliance) keepHooks(ctx context.Context) {
	if len(a.webhooks) == 0 {
		return
	}
	sender, err := webhook.New(webhook.Config{
		Targets: a.webhooks, Log: a.log,
		Sign: func(ctx context.Context, message []byte) ([]byte, error) {
			k, err := a.Keys.LogKey()
			if err != nil {
				return nil, err
			}
			verifies := func(signature []byte) bool { return k.Verify(message, signature) == nil }
			return k.Sign(ctx, keyring.Own, message, verifies)
		},
		Delivered: func(target, id string) {
			if err := a.writeHook(ctx, target, id); err != nil {
				a.log.Error("the delivery to a webhook is not written; after a restart the message is sent again",
					"target", target, "id", id, "err", err)
			}
		},
		GaveUp: func(target, id string, err error) {
			a.log.Error("a webhook is not told of a rotation", "target", target, "id", id, "err", err)
		},
	})
	if err != nil { // the configuration has been checked before
		a.log.Error("there are no webhooks", "err", err)
		return
	}
	a.hooks.Store(sender)
	news := make(chan struct{}, 1)
	news <- struct{}{}
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
	for {
		select {
		case <-ctx.Done():
			return
		case <-news:
			if err := a.queueHooks(sender, queued); err != nil {
				a.log.Error("webhooks are not told", "err", err)
			}
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
func (a *Appliance) writeHook(ctx context.Context, target, id string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.limits.RequestTimeout)
	defer cancel()
	line := strings.TrimSuffix(strings.TrimPrefix(id, "rotation_"), "_compromised")
	line = line[:strings.LastIndexByte(line, '_')]
	return a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		return tx.Put(ledger.Meta, hookKeys+target+"/"+line, []byte(id))
	})
}

// queueHooks queues the messages that have not been delivered. queued has the messages in the
// queue.
func (a *Appliance) queueHooks(sender *webhook.Sender, queued map[[2]string]bool) error {
	told := map[string]string{}
	if err := a.ledger.All(ledger.Meta, func(name string, value []byte) error {
		if strings.HasPrefix(name, hookKeys) {
			told[name] = string(value)
		}
		return nil
	}); err != nil {
		return err
	}
	for _, n := range a.Keys.Announcements() {
		name := n.Name
		r := a.Keys.Rotation(name)
		if r == nil {
			continue
		}
		id := hookID(*r)
		body, err := json.Marshal(hookBody{"key.rotation", time.Now().UTC().Truncate(time.Second), *r})
		if err != nil {
			return err
		}
		for _, t := range a.webhooks {
			mark := [2]string{t.Name, id}
			if told[hookKeys+t.Name+"/"+name] != id && !queued[mark] {
				if err := sender.Queue(t.Name, webhook.Message{ID: id, Body: body}); err != nil {
					return err
				}
				queued[mark] = true
			}
		}
	}
	return nil
}
