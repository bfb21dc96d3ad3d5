// Package alert tells operators that the appliance is in trouble, without a system beside the
// appliance. Begin reading at Kinds for the table of alerts, then at Engine.look.
//
// The invariants:
//
//   - An alert fires or does not. Each change is one event of the audit log. The event, the record
//     of the alert and the messages to the receivers are one transaction, so a kill at any moment
//     loses no change and writes none twice.
//   - A message leaves after its event is on disk, and the event has the message's id and the
//     digest of the body. There are two exceptions: while the ledger's disk takes no writes,
//     messages about critical alerts leave without an event, which follows; and a daemon that ends
//     by itself says so without an event, which the next start writes.
//   - A run of the daemon that was not stopped is an alert: each receiver is told before the end,
//     as far as the daemon has the time, and by the next start in any case. See run.go.
//   - Memory follows the ledger, so an alert that fires still fires after a restart.
//   - Whatever peers do, the alerts are at most 17 for each kind, the messages that wait at most
//     256 for each receiver, and the changes of an alert at most 3 in Config.Quiet.
//   - No request waits for this package.
package alert

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"countersign/audit"
	"countersign/internal/cause"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/meter"
	"countersign/internal/scrub"
)

// lookEvery is the time between two looks at the state and the counters. Tests of days set more.
var lookEvery = time.Second

const (
	writeWithin = 5 * time.Second // for one transaction: a stuck disk must not hang the engine

	maxSubjects = 16  // alerts of one kind; further subjects share an alert
	maxText     = 500 // bytes of the details
	others      = "others"

	// MaxAcknowledged is the longest time of an acknowledgement.
	MaxAcknowledged = 7 * 24 * time.Hour
)

// alertKeys is the prefix of the records of firing alerts: alert/CODE/SUBJECT. A resolved alert has
// no record.
const alertKeys = "alert/"

// Alert is a firing alert, as the ledger has it.
type Alert struct {
	Code    string `json:"code"`
	Subject string `json:"subject,omitempty"` // the token, key or peer concerned; "" for the appliance
	Level   Level  `json:"level"`
	Text    string `json:"text"`   // the details at the last change
	Since   int64  `json:"since"`  // Unix milliseconds
	Change  string `json:"change"` // id of the last change, which is the id of its message
	Sent    int64  `json:"sent"`   // Unix milliseconds of the last message
	Ack     *Ack   `json:"ack,omitempty"`
}

// Ack is an acknowledgement by an operator. The alert is not repeated until its end. An
// acknowledgement ends with the alert, and when the level rises.
type Ack struct {
	By     string `json:"by"`
	At     int64  `json:"at"`    // Unix milliseconds
	Until  int64  `json:"until"` // Unix milliseconds
	Reason string `json:"reason,omitempty"`
}

// holds reports whether the acknowledgement has not ended. A clock that was set back does not make
// an acknowledgement longer than MaxAcknowledged.
func (a *Ack) holds(now time.Time) bool {
	return a != nil && now.UnixMilli() < a.Until && a.Until-now.UnixMilli() <= MaxAcknowledged.Milliseconds()
}

// id is the key of an alert in memory and, after alertKeys, in the ledger.
type id struct{ code, subject string }

func (i id) key() string { return alertKeys + i.code + "/" + i.subject }

// Kind returns the kind of the alert.
func (a *Alert) Kind() *Kind { return known(a.Code) }

func (a *Alert) id() id { return id{a.Code, a.Subject} }

// Engine has the alerts of one appliance. An Engine is safe for concurrent use.
type Engine struct {
	c         Config
	ledger    *ledger.Ledger
	meter     *meter.Meter
	causes    func() []cause.Cause
	receivers []Receiver
	appliance func() string // the id of the audit log
	log       *slog.Logger

	begun   time.Time // of the counting
	windows map[*Kind]*window
	watched map[id]*watch
	unsaved map[id]*change // the ledger did not take them

	run         run     // the present one
	interrupted reading // of the last run, at the first look

	testing manage.Lock

	// mu guards the fields below. The ledger's writer holds mu while memory follows the ledger.
	mu      sync.Mutex
	firing  map[id]*Alert
	numbers map[*Kind]float64  // of the measured kinds, at the last look
	boxes   map[string]*outbox // by the name of the receiver
}

// Open returns the Engine of a ledger. causes returns the present causes of the state, and
// appliance the id of the audit log.
func Open(
	ctx context.Context, c Config, l *ledger.Ledger, m *meter.Meter, causes func() []cause.Cause,
	receivers []Receiver, appliance func() string, log *slog.Logger,
) (*Engine, error) {
	e := &Engine{
		c: c, ledger: l, meter: m, causes: causes, receivers: receivers, appliance: appliance, log: log,
		windows: map[*Kind]*window{}, watched: map[id]*watch{}, unsaved: map[id]*change{}, testing: manage.NewLock(),
		firing: map[id]*Alert{}, numbers: map[*Kind]float64{}, boxes: map[string]*outbox{},
	}
	for _, r := range receivers {
		e.boxes[r.Name()] = newOutbox()
	}
	return e, l.Follow(ctx, &e.mu, ledger.Followed{Table: ledger.Meta, Take: e.take})
}

// take updates memory from a record. The ledger's writer holds mu.
func (e *Engine) take(key string, value []byte) error {
	if name, ok := strings.CutPrefix(key, alertKeys); ok {
		code, subject, _ := strings.Cut(name, "/")
		of := id{code, subject}
		if value == nil {
			delete(e.firing, of)
			return nil
		}
		a := new(Alert)
		if err := json.Unmarshal(value, a); err != nil {
			return fmt.Errorf("alert %s: %w", name, err)
		}
		e.firing[of] = a
	}
	return e.takeMessage(key, value)
}

// Run looks at the state, writes changes and sends messages until ctx ends. Run must be called
// once.
func (e *Engine) Run(ctx context.Context) {
	var sending sync.WaitGroup
	for _, r := range e.receivers {
		sending.Go(func() { e.deliver(ctx, r) })
	}
	defer sending.Wait()
	ticker := time.NewTicker(lookEvery)
	defer ticker.Stop()
	for {
		e.look(ctx, time.Now())
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// watch is the history of a reason in memory, for hysteresis and minimal times.
type watch struct {
	above time.Time // since when a higher level than the present one is wanted
	seen  time.Time // the last time of that
	held  time.Time // the last time that the present level or a higher one was wanted
}

// reading is what the present state says of an alert.
type reading struct {
	wants  Level
	text   string
	change string // name of the change, if receivers may have its message; "": a new one
}

// look compares the state and the counters with the firing alerts, and writes the changes.
func (e *Engine) look(ctx context.Context, now time.Time) {
	if e.begun.IsZero() {
		e.begun = now
	}
	e.mu.Lock()
	firing := maps.Clone(e.firing)
	e.mu.Unlock()
	readings := e.read(firing, now)
	if e.interrupted.wants != "" {
		readings[id{ended.Code, ""}], e.interrupted = e.interrupted, reading{}
	}
	for of := range firing {
		if _, ok := readings[of]; !ok {
			readings[of] = reading{} // the reason is gone
		}
	}
	for of := range e.watched {
		if _, ok := readings[of]; !ok && firing[of] == nil && e.unsaved[of] == nil &&
			now.Sub(e.watched[of].seen) > e.c.After {
			delete(e.watched, of)
		}
	}
	for of, r := range readings {
		if e.unsaved[of] == nil {
			if ch := e.decide(of, firing[of], r, now); ch != nil {
				e.unsaved[of] = ch
			}
		}
	}
	e.save(ctx)
	e.repeat(ctx, now)
}

// decide returns the change of an alert that is due, or nil.
func (e *Engine) decide(of id, is *Alert, r reading, now time.Time) *change {
	level := Level("")
	if is != nil {
		level = is.Level
	}
	w := e.watched[of]
	if w == nil {
		w = &watch{held: now}
		e.watched[of] = w
	}
	if r.wants.rank() >= level.rank() {
		w.held = now
	}
	k := kindOf(of.code)
	switch {
	case r.wants.rank() > level.rank():
		after := e.c.After
		if k == nil || k.rate != nil || k.atOnce {
			after = 0
		}
		if w.above.IsZero() || now.Sub(w.seen) > after {
			w.above = now
		}
		w.seen = now
		if now.Sub(w.above) < after {
			return nil
		}
	case r.wants.rank() == level.rank() || now.Sub(w.held) < e.c.Quiet:
		return nil
	}
	w.above, w.held = time.Time{}, now
	return e.newChange(of, is, r, now)
}

// read returns the readings of all alerts with a reason.
func (e *Engine) read(firing map[id]*Alert, now time.Time) map[id]reading {
	all := map[id]reading{}
	for _, k := range measured {
		of := id{k.Code, ""}
		level := Level("")
		if is := firing[of]; is != nil {
			level = is.Level
		}
		if r := e.measure(k, level, now); r.wants != "" {
			all[of] = r
		}
	}
	subjects := map[string]map[string][]string{} // texts by code and subject
	for _, c := range e.causes() {
		if levels[c.Kind] == "" {
			continue
		}
		if subjects[c.Code] == nil {
			subjects[c.Code] = map[string][]string{}
		}
		subject := clip(c.Subject, 200)
		subjects[c.Code][subject] = append(subjects[c.Code][subject], c.Text)
	}
	for code, of := range subjects {
		bound(code, of, firing)
		for subject, texts := range of {
			all[id{code, subject}] = reading{wants: kindOf(code).level, text: line(strings.Join(texts, "; "))}
		}
	}
	return all
}

// bound leaves at most maxSubjects subjects of a code, those of firing alerts first. The rest gets
// one alert.
func bound(code string, of map[string][]string, firing map[id]*Alert) {
	names := slices.Collect(maps.Keys(of))
	slices.SortFunc(names, func(x, y string) int {
		return cmp.Or(-compare(firing[id{code, x}] != nil, firing[id{code, y}] != nil), cmp.Compare(x, y))
	})
	if len(names) <= maxSubjects {
		return
	}
	for _, name := range names[maxSubjects:] {
		delete(of, name)
	}
	of[others] = []string{fmt.Sprintf("%d more, such as %s: countersign admin state",
		len(names)-maxSubjects, names[maxSubjects])}
}

// compare orders false before true.
func compare(x, y bool) int {
	switch {
	case x == y:
		return 0
	case x:
		return 1
	}
	return -1
}

// line is a text for events and messages: one line, bounded, without the forms of secrets.
func line(text string) string { return clip(new(scrub.Scrubber).Text(cause.Line(text)), maxText) }

func clip(text string, most int) string {
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most-len("…")], "") + "…"
	}
	return text
}

// short returns a duration without zero minutes and seconds at its end: 10m, and not 10m0s.
func short(d time.Duration) string {
	text := d.String()
	for _, zero := range []string{"0s", "0m"} {
		if rest := strings.TrimSuffix(text, zero); strings.HasSuffix(rest, "m") || strings.HasSuffix(rest, "h") {
			text = rest
		}
	}
	return text
}

// change is one change of an alert: to firing, to another level, or to resolved.
type change struct {
	id     id
	before *Alert
	after  *Alert // nil: resolved
	name   string // Alert.Change
	at     time.Time
	urgent bool            // messages have left before the event
	sent   map[string]bool // receivers that have such a message

	message Message
}

func (e *Engine) newChange(of id, is *Alert, r reading, now time.Time) *change {
	ch := &change{id: of, before: is, at: now, name: cmp.Or(r.change, newName())}
	if r.wants == "" {
		ch.message = e.newMessage(ch.name, Resolved, now, is, false)
		return ch
	}
	ch.after = &Alert{
		Code: of.code, Subject: of.subject, Level: r.wants, Text: r.text, Since: now.UnixMilli(),
		Change: ch.name, Sent: now.UnixMilli(),
	}
	if is != nil {
		ch.after.Since = is.Since
		if r.wants.rank() < is.Level.rank() {
			ch.after.Ack = is.Ack
		}
	}
	ch.message = e.newMessage(ch.name, Firing, now, ch.after, false)
	return ch
}

func newName() string {
	var b [8]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// event returns the event of a change.
func (ch *change) event() audit.Event {
	if ch.after == nil {
		since := time.UnixMilli(ch.before.Since)
		return audit.NewAlertResolved(ch.id.code, ch.id.subject, string(ch.before.Level), since, ch.message.event())
	}
	before := ""
	if ch.before != nil {
		before = string(ch.before.Level)
	}
	a := ch.after
	since := time.UnixMilli(a.Since)
	return audit.NewAlertFiring(a.Code, a.Subject, string(a.Level), before, since, a.Text, ch.message.event())
}

// save writes the changes, those of the gravest alerts first. After a failure of the ledger the
// changes stay for the next look.
func (e *Engine) save(ctx context.Context) {
	all := slices.Collect(maps.Values(e.unsaved))
	slices.SortFunc(all, func(x, y *change) int {
		rank := func(ch *change) int {
			if ch.after == nil {
				return 0
			}
			return -ch.after.Level.rank()
		}
		return cmp.Or(cmp.Compare(rank(x), rank(y)), x.at.Compare(y.at),
			cmp.Compare(x.id.code, y.id.code), cmp.Compare(x.id.subject, y.id.subject))
	})
	var failed error
	for _, ch := range all {
		if failed == nil {
			failed = e.write(ctx, ch)
		}
		switch {
		case failed == nil:
			delete(e.unsaved, ch.id)
			e.unhurry(ch)
			e.log.Warn("alert", "code", ch.id.code, "subject", ch.id.subject, "state", ch.message.Type)
		case ctx.Err() == nil && !ch.urgent && ch.after != nil && ch.after.Level == Critical:
			ch.urgent, ch.sent = true, map[string]bool{}
			e.log.Error("an alert is sent before its event: the ledger does not take the event",
				"code", ch.id.code, "subject", ch.id.subject, "err", failed)
			e.hurry(ch)
		}
	}
}

// write writes a change in one transaction: the record, the event, and the messages. A transaction
// that was too late for a look, and was written afterwards, is recognised by the name of the
// change.
func (e *Engine) write(ctx context.Context, ch *change) error {
	ctx, cancel := context.WithTimeout(ctx, writeWithin)
	defer cancel()
	return e.ledger.Update(ctx, func(tx *ledger.Tx) error {
		old, err := decode(tx.Get(ledger.Meta, ch.id.key()))
		if err != nil {
			return err
		}
		if ch.after == nil && old == nil || ch.after != nil && old != nil && old.Change == ch.name {
			return nil // written before
		}
		if ch.after == nil {
			err = tx.Delete(ledger.Meta, ch.id.key())
		} else {
			after := *ch.after
			if old != nil && after.Level.rank() < old.Level.rank() {
				after.Ack = old.Ack // an operator may have acknowledged meanwhile
			}
			err = tx.Put(ledger.Meta, ch.id.key(), manage.Encode(after))
		}
		if err == nil {
			err = tx.Append(ledger.EventOf(ch.event()))
		}
		if err != nil {
			return err
		}
		return e.post(tx, ch.message, ch.sent)
	})
}

func decode(b []byte) (*Alert, error) {
	if b == nil {
		return nil, nil
	}
	a := new(Alert)
	return a, json.Unmarshal(b, a)
}

// repeat queues messages about alerts that fire for long and that nobody has acknowledged.
func (e *Engine) repeat(ctx context.Context, now time.Time) {
	if len(e.receivers) == 0 {
		return
	}
	e.mu.Lock()
	var due []*Alert
	for _, a := range e.firing {
		sent := time.UnixMilli(a.Sent)
		if !a.Ack.holds(now) && (now.Sub(sent) >= e.c.Repeat || sent.Sub(now) > e.c.Repeat) { // the clock was set back
			due = append(due, a)
		}
	}
	e.mu.Unlock()
	for _, a := range due {
		name := newName()
		ctx, cancel := context.WithTimeout(ctx, writeWithin)
		err := e.ledger.Update(ctx, func(tx *ledger.Tx) error {
			is, err := decode(tx.Get(ledger.Meta, a.id().key()))
			if err != nil || is == nil || is.Change != a.Change || is.Sent != a.Sent || is.Ack.holds(now) {
				return err
			}
			is.Sent = now.UnixMilli()
			if err := tx.Put(ledger.Meta, is.id().key(), manage.Encode(is)); err != nil {
				return err
			}
			m := e.newMessage(name, Firing, now, is, true)
			since := time.UnixMilli(is.Since)
			repeated := audit.NewAlertRepeated(is.Code, is.Subject, string(is.Level), since, m.event())
			if err := tx.Append(ledger.EventOf(repeated)); err != nil {
				return err
			}
			return e.post(tx, m, nil)
		})
		cancel()
		if err != nil {
			return // the next look tries again
		}
	}
}

// Acknowledge records that an operator has taken note of an alert, for a time of at most
// MaxAcknowledged. The reason may be "".
func (e *Engine) Acknowledge(
	ctx context.Context, who audit.Actor, code, subject string, lasts time.Duration, reason string,
) error {
	if lasts < time.Minute || lasts > MaxAcknowledged {
		return fmt.Errorf("%w: an acknowledgement lasts from 1m to 7d, and %v was asked for", manage.ErrInvalid, lasts)
	}
	if reason != "" {
		if err := manage.CheckReason(reason); err != nil {
			return err
		}
	}
	now := time.Now()
	return e.ledger.Update(ctx, func(tx *ledger.Tx) error {
		key := id{code, subject}.key()
		a, err := decode(tx.Get(ledger.Meta, key))
		if err != nil {
			return err
		}
		if a == nil {
			return fmt.Errorf("alert %s: %w: it does not fire; countersign admin alert list shows those that do",
				clip(strings.TrimSpace(code+" "+subject), 200), manage.ErrNotFound)
		}
		until := now.Add(lasts)
		a.Ack = &Ack{By: who.Name, At: now.UnixMilli(), Until: until.UnixMilli(), Reason: reason}
		if err := tx.Put(ledger.Meta, key, manage.Encode(a)); err != nil {
			return err
		}
		return tx.Append(ledger.EventOf(audit.NewAlertAcknowledged(who, code, subject, until, reason)))
	})
}

// Firing returns the firing alerts, the gravest first. An acknowledgement that has ended is left
// out.
func (e *Engine) Firing() (all []Alert) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := time.Now()
	for _, a := range e.firing {
		is := *a
		if !is.Ack.holds(now) {
			is.Ack = nil
		}
		all = append(all, is)
	}
	slices.SortFunc(all, func(x, y Alert) int {
		return cmp.Or(-cmp.Compare(x.Level.rank(), y.Level.rank()), cmp.Compare(x.Since, y.Since),
			cmp.Compare(x.Code, y.Code), cmp.Compare(x.Subject, y.Subject))
	})
	return all
}

// Measure is a number with its thresholds.
type Measure struct {
	Rate
	Share  bool    // the number is a percentage
	Number float64 // at the last look
}

// Measured returns the number of a measured kind, or false for a kind with a cause, and before the
// first look.
func (e *Engine) Measured(k *Kind) (Measure, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	n, known := e.numbers[k]
	if !known {
		return Measure{}, false
	}
	return Measure{k.rate(e.c), k.share, n}, true
}

// Config returns the thresholds and times.
func (e *Engine) Config() Config { return e.c }

// errTesting refuses a second test beside a first one.
var errTesting = errors.New("a test of the receivers has not ended yet; try again in half a minute")
