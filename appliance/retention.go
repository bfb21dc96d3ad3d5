package appliance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"time"

	"countersign/audit"
	"countersign/internal/ijson"
	"countersign/internal/ledger"
)

// Period is how long an epoch of the audit log lasts, by the calendar in UTC.
type Period string

const (
	Hour  Period = "hour"
	Day   Period = "day"
	Month Period = "month"
)

// Retention says how long what is kept. Nonces are kept by the ledger itself: see ledger.Options.
type Retention struct {
	Epoch     Period
	Audit     time.Duration // an epoch is dropped so long after it has ended
	Receipts  time.Duration // a receipt is dropped so long after its time
	Decisions time.Duration // and a decision of policy with its inputs
	Nonces    time.Duration // and a spent nonce, after its document has expired; the ledger's margin
}

// retentionKey is the record of the retention in force.
const retentionKey = "retention"

// retentionRecord has seconds.
type retentionRecord struct {
	Audit     int64 `json:"audit"`
	Receipts  int64 `json:"receipts"`
	Decisions int64 `json:"decisions"`
	Nonces    int64 `json:"nonces"`
	// Configured is what the configuration said when this was written: what it still says asks for nothing new.
	Configured *retentionRecord `json:"configured,omitempty"`
}

func (r Retention) record() retentionRecord {
	s := func(d time.Duration) int64 { return int64(d / time.Second) }
	return retentionRecord{s(r.Audit), s(r.Receipts), s(r.Decisions), s(r.Nonces), nil}
}

// with returns r with the times of a record.
func (r Retention) with(record retentionRecord) Retention {
	d := func(s int64) time.Duration { return time.Duration(s) * time.Second }
	r.Audit, r.Receipts, r.Decisions, r.Nonces = d(record.Audit), d(record.Receipts), d(record.Decisions), d(record.Nonces)
	return r
}

// shortest takes of each time the shorter one.
func (r Retention) shortest(o Retention) Retention {
	r.Audit, r.Receipts, r.Decisions, r.Nonces = min(r.Audit, o.Audit), min(r.Receipts, o.Receipts), min(r.Decisions, o.Decisions), min(r.Nonces, o.Nonces)
	return r
}

// InForce returns the retention that is in force under a configuration that says r. Once there are operators, what a configuration newly says is
// believed as far as it is longer than what was: to keep something for a shorter time destroys, and needs approval. ignored says that it was not
// believed in something.
func (r Retention) InForce(l *ledger.Ledger) (in Retention, ignored bool, err error) {
	in, _, ignored, err = r.inForce(l)
	return in, ignored, err
}

func (r Retention) inForce(l *ledger.Ledger) (in Retention, before *retentionRecord, ignored bool, err error) {
	err = l.All(ledger.Meta, func(name string, value []byte) error {
		if name != retentionKey {
			return nil
		}
		before = new(retentionRecord)
		return json.Unmarshal(value, before)
	})
	governed := false
	if err == nil {
		governed, err = isGoverned(l)
	}
	if err != nil || before == nil || !governed {
		return r, before, false, err
	}
	said, then := r.record(), before.Configured
	if then == nil {
		then = new(retentionRecord)
	}
	times := *before
	for _, t := range []struct {
		in             *int64
		said, saidThen int64
	}{{&times.Audit, said.Audit, then.Audit}, {&times.Receipts, said.Receipts, then.Receipts}, {&times.Decisions, said.Decisions, then.Decisions}, {&times.Nonces, said.Nonces, then.Nonces}} {
		switch {
		case t.said == t.saidThen: // nothing new
		case t.said > *t.in:
			*t.in = t.said
		case t.said < *t.in:
			ignored = true
		}
	}
	return r.with(times), before, ignored, nil
}

// startRetention writes down what is in force from now on.
func (a *Appliance) startRetention(ctx context.Context) error {
	in, before, ignored, err := a.configured.inForce(a.ledger)
	if err != nil {
		return err
	}
	if ignored {
		a.mu.Lock()
		a.retentionWaits = "the retention of the configuration is shorter than what is in force, which stays: have it approved (countersign admin retention shorten), or correct it"
		a.mu.Unlock()
		a.log.Warn("the retention of the configuration is shorter than what is in force, which stays")
	}
	if before != nil && in == in.with(*before) {
		a.setRetention(in)
		return nil
	}
	if before == nil {
		before = new(retentionRecord)
	}
	return a.writeRetention(ctx, audit.Daemon(), in.with(*before), in, nil)
}

func (a *Appliance) retentionInForce() Retention {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.retention
}

func (a *Appliance) setRetention(r Retention) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.retention = r
}

// Shorter refuses a change that does not keep something for a shorter time than now, or keeps something longer.
func (a *Appliance) Shorter(change func(*Retention)) error {
	now := a.retentionInForce()
	wanted := now
	change(&wanted)
	day := 24 * time.Hour
	switch {
	case wanted.Audit < day || wanted.Receipts < day || wanted.Decisions < day || wanted.Nonces < time.Hour:
		return fmt.Errorf("retention: %w: at least a day, and for nonces an hour", ErrInvalid)
	case wanted != now.shortest(wanted):
		return fmt.Errorf("retention: %w: that keeps something longer, which the configuration can say: in force are audit %v, receipts %v, decisions %v, nonces %v", ErrInvalid, now.Audit, now.Receipts, now.Decisions, now.Nonces)
	case wanted == now:
		return fmt.Errorf("retention: %w: that is in force already", ErrInvalid)
	}
	return nil
}

// ShortenRetention puts another retention in force. That of nonces counts from the next start on. said is what was proposed, in the words of the
// proposal: the event repeats it.
func (a *Appliance) ShortenRetention(ctx context.Context, who audit.Actor, said map[string]string, change func(*Retention)) error {
	if who.Proposal == 0 {
		return fmt.Errorf("retention: %w", ErrNotApproved)
	}
	return a.act(ctx, a.enrolling, "retention", func(ctx context.Context) error {
		before := a.retentionInForce()
		wanted := before
		change(&wanted)
		if err := a.Shorter(change); err != nil {
			return err
		}
		return a.writeRetention(ctx, who, before, wanted, said)
	})
}

func (a *Appliance) writeRetention(ctx context.Context, who audit.Actor, before, wanted Retention, said map[string]string) error {
	e := audit.Event{Type: audit.RetentionChanged, Actor: who, Action: "retention", Resource: "retention", Outcome: "ok",
		Metadata: map[string]string{"from": string(encode(before.record())), "to": string(encode(wanted.record()))}}
	if said != nil {
		e.Metadata["shortened"] = "yes"
		maps.Copy(e.Metadata, said)
	}
	if err := a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		record, said := wanted.record(), a.configured.record()
		record.Configured = &said
		if err := tx.Put(ledger.Meta, retentionKey, encode(record)); err != nil {
			return err
		}
		return tx.Append(entry(e))
	}); err != nil {
		return err
	}
	a.setRetention(wanted)
	return nil
}

// over says that an epoch that began then is to end.
func (r Retention) over(begun, now time.Time) bool {
	begun, now = begun.UTC(), now.UTC()
	layout := map[Period]string{Hour: "2006-01-02 15", Day: "2006-01-02", Month: "2006-01"}[r.Epoch]
	return now.After(begun) && begun.Format(layout) != now.Format(layout)
}

// Fate is what retention will do with an epoch.
type Fate struct {
	ledger.Epoch
	Due time.Time // when it may be dropped; zero: it has not ended
}

// Preview says what retention will do: each epoch with its time, and before when receipts are dropped now. It changes nothing.
func (a *Appliance) Preview() (epochs []Fate, receiptsBefore time.Time, err error) {
	retention := a.retentionInForce()
	all, err := a.ledger.Epochs()
	for _, e := range all {
		f := Fate{Epoch: e}
		if number, _, tree := a.ledger.Head(); e.Ended == 0 && number == e.Number {
			f.Size = tree.Size
		}
		if e.Ended != 0 {
			f.Due = time.UnixMilli(e.Ended).Add(retention.Audit).UTC()
		}
		epochs = append(epochs, f)
	}
	return epochs, a.ledger.Time().Add(-retention.Receipts).UTC(), err
}

// receiptsKey is the record of the time before which receipts were dropped last.
const receiptsKey = "receipts-before"

// retain drops what is due and takes some of what was dropped away. It does little at a time, and says whether there is more.
func (a *Appliance) retain(ctx context.Context) (more bool, err error) {
	epochs, before, err := a.Preview()
	if err != nil {
		return false, err
	}
	for _, e := range epochs {
		if e.Dropping != 0 {
			continue
		}
		if e.Due.IsZero() || e.Hold != "" || a.ledger.Time().Before(e.Due) || !e.Final() {
			break // epochs go in their order
		}
		root := audit.Hash(e.Root)
		event := audit.Event{Type: audit.RetentionApplied, Actor: audit.Daemon(), Action: "retention", Resource: "epoch/" + strconv.FormatUint(uint64(e.Number), 10), Outcome: "ok",
			Metadata: map[string]string{"first": strconv.FormatUint(e.First, 10), "size": strconv.FormatUint(e.Size, 10), "root": root.String()}}
		if err := a.ledger.Drop(ctx, e.Number, entry(event)); err != nil {
			return false, err
		}
		a.log.Info("an epoch of the audit log was dropped", "epoch", e.Number, "events", e.Size)
	}
	if err := a.dropReceipts(ctx, before); err != nil {
		return false, err
	}
	for range 50 { // and on at the next time
		if more, err = a.ledger.Sweep(ctx, before.UnixMilli(), a.ledger.Time().Add(-a.retentionInForce().Decisions).UnixMilli()); err != nil || !more {
			return false, err
		}
	}
	return true, nil
}

// dropReceipts writes down, once a day at the most, that receipts of before a time are dropped.
func (a *Appliance) dropReceipts(ctx context.Context, before time.Time) error {
	day := strconv.FormatInt(before.Truncate(24*time.Hour).UnixMilli(), 10)
	due, err := a.ledger.Receipts(0, before.UnixMilli(), ledger.ReceiptID{}, 1)
	if err != nil || len(due) == 0 {
		return err
	}
	said := errors.New("said already")
	err = a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		if string(tx.Get(ledger.Meta, receiptsKey)) == day {
			return said
		}
		if err := tx.Put(ledger.Meta, receiptsKey, []byte(day)); err != nil {
			return err
		}
		return tx.Append(entry(audit.Event{Type: audit.RetentionApplied, Actor: audit.Daemon(), Action: "retention", Resource: "receipts", Outcome: "ok",
			Metadata: map[string]string{"before": strconv.FormatInt(before.Unix(), 10)}}))
	})
	if errors.Is(err, said) {
		return nil
	}
	return err
}

// Hold keeps an epoch from being dropped, for a reason that is written down. Release lets it go its way again.
func (a *Appliance) Hold(ctx context.Context, who audit.Actor, epoch uint32, reason string) error {
	return a.hold(ctx, audit.LegalHoldSet, who, epoch, reason, reason)
}

func (a *Appliance) Release(ctx context.Context, who audit.Actor, epoch uint32, reason string) error {
	return a.hold(ctx, audit.LegalHoldReleased, who, epoch, "", reason)
}

func (a *Appliance) hold(ctx context.Context, t audit.Type, who audit.Actor, epoch uint32, set, reason string) error {
	if err := checkReason(reason); err != nil {
		return fmt.Errorf("epoch %d: %w", epoch, err)
	}
	err := a.ledger.Hold(ctx, epoch, set, entry(audit.Event{Type: t, Actor: who, Action: "retention", Resource: "epoch/" + strconv.FormatUint(uint64(epoch), 10), Outcome: "ok",
		Metadata: map[string]string{"reason": reason}}))
	if errors.Is(err, ledger.ErrNotFound) {
		return fmt.Errorf("epoch %d: %w", epoch, ErrNotFound)
	} else if errors.Is(err, ledger.ErrDropped) {
		return fmt.Errorf("epoch %d: %w: retention has dropped it", epoch, ErrInvalid)
	}
	return err
}

// EndEpoch ends the present epoch of the audit log now, and signs its final checkpoint.
func (a *Appliance) EndEpoch(ctx context.Context, who audit.Actor) (next uint32, err error) {
	if next, err = a.ledger.EndEpoch(ctx, who); err != nil {
		return 0, err
	}
	a.log.Info("an epoch of the audit log has ended", "epoch", next-1)
	return next, a.signEnded(ctx, next)
}

// AcceptTime brings the ledger's time forward to the system's clock, which an operator has seen to be right.
func (a *Appliance) AcceptTime(ctx context.Context, who audit.Actor) error {
	before, wall, _ := a.ledger.Clock()
	return a.ledger.AcceptTime(ctx, entry(audit.Event{Type: audit.ClockAccepted, Actor: who, Action: "ledger accept-time", Outcome: "ok",
		Metadata: map[string]string{"ledger": before.UTC().Format(time.RFC3339), "clock": wall.UTC().Format(time.RFC3339)}}))
}

// Compact gives the free space of the ledger's file back. Nothing is admitted meanwhile.
func (a *Appliance) Compact(ctx context.Context, who audit.Actor) (before, after int64, took time.Duration, err error) {
	return a.ledger.Compact(ctx, entry(audit.Event{Type: audit.LedgerCompacted, Actor: who, Action: "ledger compact", Outcome: "ok"}))
}

// LedgerStats says how large the ledger is.
func (a *Appliance) LedgerStats() (ledger.Stats, error) {
	return a.ledger.Stats()
}

// Receipt and Receipts look receipts up.
func (a *Appliance) Receipt(id string) (ledger.Receipt, error) {
	var key ledger.ReceiptID
	if err := key.UnmarshalText([]byte(id)); err != nil {
		return ledger.Receipt{}, fmt.Errorf("receipt %q: %w: %w", ijson.Clip(id), ErrInvalid, err)
	}
	r, err := a.ledger.Receipt(key)
	if errors.Is(err, ledger.ErrNotFound) {
		err = fmt.Errorf("receipt %q: %w", id, ErrNotFound)
	}
	return r, err
}

func (a *Appliance) Receipts(from, to int64, after string, limit int) ([]ledger.Receipt, error) {
	var key ledger.ReceiptID
	if after != "" {
		if err := key.UnmarshalText([]byte(after)); err != nil {
			return nil, fmt.Errorf("after: %w: %w", ErrInvalid, err)
		}
	}
	return a.ledger.Receipts(from, to, key, limit)
}
