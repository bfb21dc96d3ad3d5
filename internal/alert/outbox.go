package alert

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"countersign/audit"
	"countersign/internal/cause"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/meter"
)

// The types of messages.
const (
	Firing   = "alert.firing" // an alert fires, has another level, or fires for long
	Resolved = "alert.resolved"
	Test     = "alert.test"
)

const (
	maxMessages = 256                // waiting for a receiver; the oldest is dropped
	maxUrgent   = 64                 // waiting for a receiver without an event
	maxAge      = 3 * 24 * time.Hour // older messages are dropped
	sendWithin  = 20 * time.Second   // for one attempt
	minBackoff  = 5 * time.Second
	maxBackoff  = time.Hour
)

// Message is a message to a receiver, as the ledger has it.
type Message struct {
	ID      string `json:"id"` // the same for all attempts
	Type    string `json:"type"`
	At      int64  `json:"at"` // Unix milliseconds
	Code    string `json:"code"`
	Subject string `json:"subject,omitempty"`
	Level   Level  `json:"level"`
	Text    string `json:"text"`
	Since   int64  `json:"since"` // Unix milliseconds

	Appliance string `json:"appliance"` // the id of the audit log
	Repeated  bool   `json:"repeated,omitempty"`
	// Body is the body of a webhook. An update of the daemon changes the body of no message that
	// waits, since the event has the digest.
	Body string `json:"body"`
}

// newMessage returns the message about a change of an alert, or about no change (repeated), with a
// name.
func (e *Engine) newMessage(name, kind string, at time.Time, a *Alert, repeated bool) Message {
	m := Message{
		Type: kind, At: at.UnixMilli(), Code: a.Code, Subject: a.Subject, Level: a.Level,
		Text: a.Text, Since: a.Since, Appliance: e.appliance(), Repeated: repeated,
	}
	m.ID = "alert_" + m.Appliance + "_" + name
	k := m.kind()
	m.Body = string(manage.Encode(struct {
		Type      string    `json:"type"`
		Timestamp time.Time `json:"timestamp"`
		Data      any       `json:"data"`
	}{m.Type, at.UTC().Truncate(time.Second), struct {
		Appliance string `json:"appliance"`
		Code      string `json:"code"`
		Subject   string `json:"subject,omitempty"`
		Level     Level  `json:"level"`
		Text      string `json:"text"`
		Since     int64  `json:"since"` // Unix seconds
		Means     string `json:"means"`
		Do        string `json:"do"`
		See       string `json:"see"`
		Repeated  bool   `json:"repeated,omitempty"`
	}{m.Appliance, m.Code, m.Subject, m.Level, m.Text, m.Since / 1000, k.Means, k.Do, k.Link(), m.Repeated}}))
	return m
}

// event names the message in its event.
func (m Message) event() audit.Message {
	return audit.Message{ID: m.ID, Body: sha256.Sum256([]byte(m.Body))}
}

// kind returns the kind of the message's alert.
func (m Message) kind() *Kind {
	if m.Type == Test {
		return &Kind{Code: "alerts", Means: "a test of the receivers of alerts", Do: "nothing is to be done"}
	}
	return known(m.Code)
}

// Receiver is a place that alerts are sent to. Send makes one attempt, and returns the receiver's
// answer as one line. Send is not called concurrently, except for a test. Name is stable: the
// ledger has the name with each message that waits.
type Receiver interface {
	Name() string
	Send(ctx context.Context, m Message) (answer string, err error)
	Cause(err error) cause.Cause
}

// ErrGone ends the deliveries to a receiver until the next start.
var ErrGone = errors.New("the receiver has asked for no more messages until the next start")

// messageKeys is the prefix of the records of messages that wait: alert-message/RECEIVER/NUMBER.
const messageKeys = "alert-message/"

// outbox has the messages that wait for a receiver. Engine.mu guards the fields.
type outbox struct {
	waiting map[string]Message // by the record's key; follows the ledger
	done    map[string]bool    // sent, and the ledger has not taken the removal yet
	urgent  []*change          // without an event yet
	failure error              // of the last attempt
	wake    chan struct{}
}

func newOutbox() *outbox {
	return &outbox{waiting: map[string]Message{}, done: map[string]bool{}, wake: make(chan struct{}, 1)}
}

func (b *outbox) signal() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// takeMessage updates memory from the record of a message. The ledger's writer holds mu. Messages
// for a receiver that is not in the configuration have an outbox too, for their removal.
func (e *Engine) takeMessage(key string, value []byte) error {
	rest, ok := strings.CutPrefix(key, messageKeys)
	if !ok {
		return nil
	}
	name := rest[:max(0, strings.LastIndexByte(rest, '/'))]
	b := e.boxes[name]
	if b == nil {
		b = newOutbox()
		e.boxes[name] = b
	}
	if value == nil {
		delete(b.waiting, key)
		delete(b.done, key)
		return nil
	}
	var m Message
	if err := json.Unmarshal(value, &m); err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	b.waiting[key] = m
	b.signal()
	return nil
}

// oldest returns the keys of the messages that wait, the oldest first.
func (b *outbox) oldest() []string { return slices.Sorted(maps.Keys(b.waiting)) }

// post writes a message for each receiver, except those that have the message. Messages beyond
// maxMessages are dropped, the oldest first, and so are those for a receiver that is gone.
func (e *Engine) post(tx *ledger.Tx, m Message, except map[string]bool) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	for name, b := range e.boxes {
		known := slices.ContainsFunc(e.receivers, func(r Receiver) bool { return r.Name() == name })
		old := b.oldest()
		most := maxMessages - 1
		if !known {
			most = 0
		}
		for _, key := range old[:max(0, len(old)-most)] {
			if err := tx.Delete(ledger.Meta, key); err != nil {
				return err
			}
			if known {
				e.log.Error("a message about an alert is given up: too many newer ones wait", "to", name)
				e.meter.Add(meter.MessagesDropped, meter.AboutAlerts)
			}
		}
		if !known || except[name] {
			continue
		}
		key := fmt.Sprintf("%s%s/%015d-%s", messageKeys, name, m.At, m.ID)
		if err := tx.Put(ledger.Meta, key, manage.Encode(m)); err != nil {
			return err
		}
	}
	return nil
}

// hurry queues the message of a change that the ledger did not take.
func (e *Engine) hurry(ch *change) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, r := range e.receivers {
		if b := e.boxes[r.Name()]; len(b.urgent) < maxUrgent {
			b.urgent = append(b.urgent, ch)
			b.signal()
		}
	}
}

// unhurry removes the message of a change whose event is written: the ledger has the message now.
func (e *Engine) unhurry(ch *change) {
	if !ch.urgent {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, b := range e.boxes {
		b.urgent = slices.DeleteFunc(b.urgent, func(other *change) bool { return other == ch })
	}
}

// next returns the next message for a receiver: the oldest one that waits, then one without an
// event. The change is nil for the former.
func (b *outbox) next() (key string, ch *change, m Message, ok bool) {
	for _, key := range b.oldest() {
		if !b.done[key] {
			return key, nil, b.waiting[key], true
		}
	}
	if len(b.urgent) > 0 {
		return "", b.urgent[0], b.urgent[0].message, true
	}
	return "", nil, Message{}, false
}

// deliver sends the messages for a receiver in their order until ctx ends.
func (e *Engine) deliver(ctx context.Context, r Receiver) {
	e.mu.Lock()
	b := e.boxes[r.Name()]
	e.mu.Unlock()
	tries := 0
	for ctx.Err() == nil {
		e.mu.Lock()
		key, ch, m, ok := b.next()
		e.mu.Unlock()
		pause := maxBackoff
		if ok {
			err := e.attempt(ctx, r, m)
			if ctx.Err() != nil && err != nil {
				return // the message stays in the ledger for the next start
			}
			e.mu.Lock()
			b.failure = err
			e.mu.Unlock()
			late := err != nil && time.Since(time.UnixMilli(m.At)) > maxAge
			if err != nil && !late && !errors.Is(err, ErrGone) {
				tries++
				pause = backoff(tries)
				e.log.Warn("an alert is not delivered", "to", r.Name(), "id", m.ID, "tries", tries,
					"again in", pause.Round(time.Second), "err", err)
			} else {
				if err != nil {
					e.log.Error("a message about an alert is given up", "to", r.Name(), "id", m.ID, "err", err)
					e.meter.Add(meter.MessagesDropped, meter.AboutAlerts)
				}
				tries = 0
				e.settle(ctx, b, r.Name(), key, ch)
				continue
			}
		}
		e.wait(ctx, b, pause, tries > 0)
	}
}

// wait waits for a message or, after a failure, for the time of the next attempt.
func (e *Engine) wait(ctx context.Context, b *outbox, pause time.Duration, failed bool) {
	timer := time.NewTimer(pause)
	defer timer.Stop()
	wake := b.wake
	if failed {
		wake = nil // a newer message does not help a receiver that is away
	}
	select {
	case <-ctx.Done():
	case <-timer.C:
	case <-wake:
	}
}

func (e *Engine) attempt(ctx context.Context, r Receiver, m Message) error {
	ctx, cancel := context.WithTimeout(ctx, sendWithin)
	defer cancel()
	_, err := r.Send(ctx, m)
	return err
}

// settle removes a message that was delivered or given up. A removal that the ledger does not take
// is tried again with the next message, and a restart before repeats the message with its id.
func (e *Engine) settle(ctx context.Context, b *outbox, name, key string, ch *change) {
	e.mu.Lock()
	if ch != nil {
		ch.sent[name] = true
		b.urgent = slices.DeleteFunc(b.urgent, func(other *change) bool { return other == ch })
	} else {
		b.done[key] = true
	}
	gone := slices.Collect(maps.Keys(b.done))
	e.mu.Unlock()
	if len(gone) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), writeWithin)
	defer cancel()
	if err := e.ledger.Update(ctx, func(tx *ledger.Tx) error {
		for _, key := range gone {
			if err := tx.Delete(ledger.Meta, key); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		e.log.Error("the delivery of an alert is not written; after a restart the message is sent again",
			"to", name, "err", err)
	}
}

// backoff returns the time to the next attempt: exponential, from 5 s to 1 h, with a random part of
// up to one half.
func backoff(tries int) time.Duration {
	base := min(minBackoff<<min(tries-1, 16), maxBackoff/2)
	return base + rand.N(base)
}

// Causes returns the receivers whose last attempt has failed.
func (e *Engine) Causes() (all []cause.Cause) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, r := range e.receivers {
		if err := e.boxes[r.Name()].failure; err != nil {
			all = append(all, r.Cause(err))
		}
	}
	return all
}

// Measure is a source of metrics: the firing alerts, with zero for each kind that does not fire,
// and the messages that wait.
func (e *Engine) Measure(s *meter.Sample) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, k := range Kinds {
		for _, level := range k.Levels() {
			s.Set(meter.Alerts, 0, k.Code, string(level))
		}
	}
	for _, a := range e.firing {
		s.Set(meter.Alerts, 1, a.Code, string(a.Level))
	}
	waiting := 0
	for _, r := range e.receivers {
		b := e.boxes[r.Name()]
		waiting += len(b.waiting) - len(b.done) + len(b.urgent)
	}
	s.Set(meter.MessagesWaiting, float64(waiting), meter.AboutAlerts)
}

// Tested is the result of one attempt to send a message to a receiver.
type Tested struct {
	Receiver string
	Answer   string
	Err      error
}

// SendTest sends one test message to each receiver at once, and returns what each has answered. The
// event is on disk before.
func (e *Engine) SendTest(ctx context.Context, who audit.Actor) ([]Tested, error) {
	select {
	case e.testing <- struct{}{}:
		defer e.testing.Release()
	default:
		return nil, fmt.Errorf("%w: %w", manage.ErrConflict, errTesting)
	}
	ctx, cancel := context.WithTimeout(ctx, sendWithin)
	defer cancel()
	now := time.Now()
	m := e.newMessage(newName(), Test, now, &Alert{
		Code: "test", Level: Warning, Text: line(who.Name + " has asked for this test"), Since: now.UnixMilli(),
	}, false)
	if err := e.ledger.Update(ctx, func(tx *ledger.Tx) error {
		return tx.Append(ledger.EventOf(audit.NewAlertTested(who, m.event())))
	}); err != nil {
		return nil, err
	}
	return e.sendAll(ctx, m), nil
}

// sendAll makes one attempt to send a message to each receiver, to all at once.
func (e *Engine) sendAll(ctx context.Context, m Message) []Tested {
	all := make([]Tested, len(e.receivers))
	var sending sync.WaitGroup
	for i, r := range e.receivers {
		sending.Go(func() {
			answer, err := r.Send(ctx, m)
			all[i] = Tested{r.Name(), line(answer), err}
		})
	}
	sending.Wait()
	return all
}
