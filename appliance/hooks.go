package appliance

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"countersign/internal/keyring"
	"countersign/internal/ledger"
	"countersign/internal/webhook"
	"countersign/wire"
)

// Webhooks tell of rotations those who are not peers. The ledger has what each target was told last of
// each key, so that a restart tells again what was not delivered.

const hookKeys = "webhook/" // then target/key -> the id of the message

// hookBody is what is posted: the payload of Standard Webhooks.
type hookBody struct {
	Type      string        `json:"type"`
	Timestamp time.Time     `json:"timestamp"`
	Data      wire.Rotation `json:"data"`
}

// hookID names a rotation, and whether the version before was compromised.
func hookID(r wire.Rotation) string {
	id := fmt.Sprintf("rotation_%s_%d", r.Key, r.Version)
	if r.Compromised {
		id += "_compromised"
	}
	return id
}

// keepHooks tells the webhooks until ctx ends.
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
			return k.Sign(ctx, keyring.Own, message, func(signature []byte) bool { return k.Verify(message, signature) == nil })
		},
		Delivered: func(target, id string) {
			if err := a.writeHook(ctx, target, id); err != nil {
				a.log.Error("that a webhook was told is not written down; after a restart it is told again",
					"target", target, "id", id, "err", err)
			}
		},
		GaveUp: func(target, id string, err error) {
			a.log.Error("a webhook is not told of a rotation", "target", target, "id", id, "err", err)
		},
	})
	if err != nil { // the configuration was checked before
		a.log.Error("there are no webhooks", "err", err)
		return
	}
	news := make(chan struct{}, 1)
	news <- struct{}{}
	a.Keys.Watch(func() {
		select {
		case news <- struct{}{}:
		default: // it will look anyway
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

// writeHook writes down what a target was told last of a key, even if the daemon is being stopped.
func (a *Appliance) writeHook(ctx context.Context, target, id string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.limits.RequestTimeout)
	defer cancel()
	line := strings.TrimSuffix(strings.TrimPrefix(id, "rotation_"), "_compromised")
	line = line[:strings.LastIndexByte(line, '_')]
	return a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		return tx.Put(ledger.Meta, hookKeys+target+"/"+line, []byte(id))
	})
}

// queueHooks hands to the sender what a target has not been told.
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
