package appliance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"countersign/audit"
	"countersign/internal/ijson"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/requestid"
)

// Period is the length of an epoch of the audit log, by the calendar in UTC.
type Period string

const (
	Hour  Period = "hour"
	Day   Period = "day"
	Month Period = "month"
)

// Retention has the retention times of records.
type Retention struct {
	Epoch     Period
	Audit     time.Duration // of an epoch, from the epoch's end
	Receipts  time.Duration // of a receipt, from the receipt's time
	Decisions time.Duration // of a decision with its inputs, from the decision's time
	Nonces    time.Duration // of a nonce, from the document's expiry; the ledger's Options.Margin
}

// retentionKey is the key of the record of the retention in force.
const retentionKey = "retention"

// retentionRecord is the ledger's record of a retention, with times in seconds.
type retentionRecord struct {
	Audit     int64 `json:"audit"`
	Receipts  int64 `json:"receipts"`
	Decisions int64 `json:"decisions"`
	Nonces    int64 `json:"nonces"`
	// Configured has the times of the configuration when the record was written. An unchanged
	// configuration asks for no change.
	Configured *retentionRecord `json:"configured,omitempty"`
}

// record returns the times as a record.
func (r Retention) record() retentionRecord {
	s := manage.Seconds
	return retentionRecord{s(r.Audit), s(r.Receipts), s(r.Decisions), s(r.Nonces), nil}
}

// with returns r with the times of a record.
func (r Retention) with(record retentionRecord) Retention {
	r.Audit, r.Receipts = manage.Duration(record.Audit), manage.Duration(record.Receipts)
	r.Decisions, r.Nonces = manage.Duration(record.Decisions), manage.Duration(record.Nonces)
	return r
}

// shortest returns r with the shorter of each two times.
func (r Retention) shortest(o Retention) Retention {
	r.Audit, r.Receipts = min(r.Audit, o.Audit), min(r.Receipts, o.Receipts)
	r.Decisions, r.Nonces = min(r.Decisions, o.Decisions), min(r.Nonces, o.Nonces)
	return r
}

// times returns the times of the record, in the order of the fields.
func (r *retentionRecord) times() [4]*int64 {
	return [4]*int64{&r.Audit, &r.Receipts, &r.Decisions, &r.Nonces}
}

// under returns the times in force under a configuration, if there are operators. A changed time of
// the configuration has an effect only if the time is longer than before: a shorter time destroys
// records and needs approval. ignored reports a time without effect. asked has the times of the
// configuration to write down: for a time without effect the one before, so that the time stays
// changed.
func (r retentionRecord) under(configured retentionRecord) (in, asked retentionRecord, ignored bool) {
	before := retentionRecord{}
	if r.Configured != nil {
		before = *r.Configured
	}
	in, asked = r, configured
	for i, now := range configured.times() {
		inForce, then := in.times()[i], before.times()[i]
		switch {
		case *now == *then: // no change
		case *now > *inForce:
			*inForce = *now
		case *now < *inForce:
			*asked.times()[i] = *then
			ignored = true
		}
	}
	return in, asked, ignored
}

// InForce returns the retention in force under a configuration with r: r itself before there are
// operators, see retentionRecord.under.
func (r Retention) InForce(v ledger.View) (Retention, error) {
	in, _, _, err := r.inForce(v)
	return in, err
}

// inForce returns the retention in force, the times to write down as asked for, and the record
// before, which is nil in a new ledger.
func (r Retention) inForce(v ledger.View) (
	in Retention, asked retentionRecord, before *retentionRecord, err error,
) {
	before, err = decodeRetention(v.Get(ledger.Meta, retentionKey))
	if err != nil || before == nil {
		return r, r.record(), before, err
	}
	if governed, err := isGoverned(v); err != nil || !governed {
		return r, r.record(), before, err
	}
	times, asked, _ := before.under(r.record())
	return r.with(times), asked, before, nil
}

// decodeRetention decodes the record, or returns nil if there is none.
func decodeRetention(value []byte) (*retentionRecord, error) {
	if value == nil {
		return nil, nil
	}
	r := new(retentionRecord)
	if err := json.Unmarshal(value, r); err != nil {
		return nil, fmt.Errorf("the retention in the ledger: %w", err)
	}
	return r, nil
}

// takeRetention updates memory from the record of the retention. The ledger's writer holds mu.
func (a *Appliance) takeRetention(value []byte) error {
	record, err := decodeRetention(value)
	if record != nil {
		a.retained, a.retention = *record, a.configured.with(*record)
	}
	return err
}

// retentionWaits reports whether a time of the configuration has no effect.
func (a *Appliance) retentionWaits() bool {
	a.mu.RLock()
	defer a.mu.RUnlock()
	_, _, ignored := a.retained.under(a.configured.record())
	return ignored
}

// startRetention writes the retention that is in force from now on.
func (a *Appliance) startRetention(ctx context.Context) error {
	var in Retention
	var asked retentionRecord
	var before *retentionRecord
	if err := a.ledger.View(func(v ledger.View) (err error) {
		in, asked, before, err = a.configured.inForce(v)
		return err
	}); err != nil {
		return err
	}
	if asked != a.configured.record() {
		a.log.Warn("the retention of the configuration is shorter than what is in force, which stays")
	}
	if before == nil {
		before = new(retentionRecord)
	} else if in == in.with(*before) {
		return nil
	}
	return a.writeRetention(ctx, audit.Daemon(), in.with(*before), in, asked, nil)
}

// retentionInForce returns the retention in memory.
func (a *Appliance) retentionInForce() Retention {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.retention
}

// CheckShorter returns manage.ErrInvalid unless a change makes at least one time shorter and none
// longer. The minimum is a day, and an hour for nonces.
func (a *Appliance) CheckShorter(change func(*Retention)) error {
	now := a.retentionInForce()
	wanted := now
	change(&wanted)
	day := 24 * time.Hour
	switch {
	case wanted.Audit < day || wanted.Receipts < day || wanted.Decisions < day || wanted.Nonces < time.Hour:
		return fmt.Errorf("retention: %w: at least a day, and for nonces an hour", manage.ErrInvalid)
	case wanted != now.shortest(wanted):
		return fmt.Errorf("retention: %w: that keeps something longer, which the configuration can say: "+
			"in force are audit %v, receipts %v, decisions %v, nonces %v",
			manage.ErrInvalid, now.Audit, now.Receipts, now.Decisions, now.Nonces)
	case wanted == now:
		return fmt.Errorf("retention: %w: that is in force already", manage.ErrInvalid)
	}
	return nil
}

// ShortenRetention puts shorter times in force, for an approved proposal. The time of nonces has an
// effect from the next start on. proposed has the parameters of the proposal, for the event.
func (a *Appliance) ShortenRetention(
	ctx context.Context, who audit.Actor, proposed map[string]string, change func(*Retention),
) error {
	if who.Proposal == 0 {
		return fmt.Errorf("retention: %w", manage.ErrNotApproved)
	}
	return a.retaining.Run(ctx, a.log.With(requestid.Attr(who.Request)), "retention", func(ctx context.Context) error {
		before := a.retentionInForce()
		wanted := before
		change(&wanted)
		if err := a.CheckShorter(change); err != nil {
			return err
		}
		return a.writeRetention(ctx, who, before, wanted, a.configured.record(), proposed)
	})
}

// writeRetention writes a retention with its event. asked has the times of the configuration that
// are taken into account.
func (a *Appliance) writeRetention(
	ctx context.Context, who audit.Actor, before, wanted Retention, asked retentionRecord,
	proposed map[string]string,
) error {
	return a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		record := wanted.record()
		e := audit.NewRetentionChanged(who, manage.Encode(before.record()), manage.Encode(record), proposed)
		record.Configured = &asked
		if err := tx.Put(ledger.Meta, retentionKey, manage.Encode(record)); err != nil {
			return err
		}
		return tx.Append(ledger.EventOf(e))
	})
}

// over reports whether the period of an epoch is over.
func (r Retention) over(begun, now time.Time) bool {
	begun, now = begun.UTC(), now.UTC()
	layout := map[Period]string{Hour: "2006-01-02 15", Day: "2006-01-02", Month: "2006-01"}[r.Epoch]
	return now.After(begun) && begun.Format(layout) != now.Format(layout)
}

// EpochStatus is an epoch with the time of its drop by retention.
type EpochStatus struct {
	ledger.Epoch
	Due time.Time // zero for the present epoch
}

// Preview returns the epochs, and the time before which receipts are dropped now. Preview changes
// nothing.
func (a *Appliance) Preview() (epochs []EpochStatus, receiptsBefore time.Time, err error) {
	retention := a.retentionInForce()
	all, err := a.ledger.Epochs()
	for _, e := range all {
		s := EpochStatus{Epoch: e}
		if number, _, tree := a.ledger.Head(); e.Ended == 0 && number == e.Number {
			s.Size = tree.Size
		}
		if e.Ended != 0 {
			s.Due = time.UnixMilli(e.Ended).Add(retention.Audit).UTC()
		}
		epochs = append(epochs, s)
	}
	return epochs, a.ledger.Time().Add(-retention.Receipts).UTC(), err
}

// receiptsKey is the key of the record with the last time of dropReceipts.
const receiptsKey = "receipts-before"

// sweepsAtOnce is the largest number of sweep transactions in one run of retention.
const sweepsAtOnce = 50

// retain drops due epochs, and deletes dropped records in at most sweepsAtOnce transactions. more
// reports that some records are left.
func (a *Appliance) retain(ctx context.Context) (more bool, err error) {
	epochs, before, err := a.Preview()
	if err != nil {
		return false, err
	}
	for _, e := range epochs {
		if e.Dropping != 0 {
			continue
		}
		if e.Due.IsZero() || len(e.Holds) > 0 || a.ledger.Time().Before(e.Due) || !e.Final() {
			break // epochs are dropped in order
		}
		dropped := audit.NewEpochDropped(e.Number, e.First, audit.EpochEnd{Size: e.Size, Root: audit.Hash(e.Root)})
		if err := a.ledger.Drop(ctx, e.Number, ledger.EventOf(dropped)); err != nil {
			return false, err
		}
		a.log.Info("an epoch of the audit log was dropped", "epoch", e.Number, "events", e.Size)
	}
	if err := a.dropReceipts(ctx, before); err != nil {
		return false, err
	}
	for range sweepsAtOnce {
		decisions := a.ledger.Time().Add(-a.retentionInForce().Decisions)
		if more, err = a.ledger.Sweep(ctx, before.UnixMilli(), decisions.UnixMilli()); err != nil || !more {
			return false, err
		}
	}
	return true, nil
}

// errSame cancels an Update without a change.
var errSame = errors.New("the same")

// dropReceipts writes the event of dropped receipts, at most once a day.
func (a *Appliance) dropReceipts(ctx context.Context, before time.Time) error {
	day := strconv.FormatInt(before.Truncate(24*time.Hour).UnixMilli(), 10)
	due, err := a.ledger.Receipts(0, before.UnixMilli(), ledger.ReceiptID{}, 1)
	if err != nil || len(due) == 0 {
		return err
	}
	err = a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		if string(tx.Get(ledger.Meta, receiptsKey)) == day {
			return errSame
		}
		if err := tx.Put(ledger.Meta, receiptsKey, []byte(day)); err != nil {
			return err
		}
		return tx.Append(ledger.EventOf(audit.NewReceiptsDropped(before)))
	})
	if errors.Is(err, errSame) {
		return nil
	}
	return err
}

// Hold protects an epoch from retention by a legal hold with a name, until Release. Each case has a
// hold of its own, so that the end of one case frees nothing that another one needs. The event has
// the name and the reason.
func (a *Appliance) Hold(ctx context.Context, who audit.Actor, epoch uint32, name, reason string) error {
	if err := keystore.CheckName(name); err != nil {
		return fmt.Errorf("hold %q: %w: %w", ijson.Clip(name), manage.ErrInvalid, err)
	}
	if err := manage.CheckReason(reason); err != nil {
		return fmt.Errorf("hold %q: %w", name, err)
	}
	e := ledger.EventOf(audit.NewLegalHoldSet(who, epoch, name, reason))
	return holdError(epoch, name, a.ledger.Hold(ctx, epoch, name, reason, e))
}

// Release ends a hold. The event has the name and the reason.
func (a *Appliance) Release(ctx context.Context, who audit.Actor, epoch uint32, name, reason string) error {
	if err := manage.CheckReason(reason); err != nil {
		return fmt.Errorf("hold %q: %w", ijson.Clip(name), err)
	}
	e := ledger.EventOf(audit.NewLegalHoldReleased(who, epoch, name, reason))
	return holdError(epoch, name, a.ledger.Release(ctx, epoch, name, e))
}

// holdError translates an error of the ledger.
func holdError(epoch uint32, name string, err error) error {
	var of error
	switch {
	case errors.Is(err, ledger.ErrNotFound):
		of = manage.ErrNotFound
	case errors.Is(err, ledger.ErrHeld):
		of = manage.ErrExists
	case errors.Is(err, ledger.ErrTooManyHolds):
		of = manage.ErrConflict
	case errors.Is(err, ledger.ErrDropped):
		return fmt.Errorf("epoch %d: %w: retention has dropped it", epoch, manage.ErrInvalid)
	default:
		return err
	}
	return fmt.Errorf("hold %q on epoch %d: %w", ijson.Clip(name), epoch, of)
}

// EndEpoch ends the present epoch of the audit log, and signs the epoch's final checkpoint.
func (a *Appliance) EndEpoch(ctx context.Context, who audit.Actor) (next uint32, err error) {
	if next, err = a.ledger.EndEpoch(ctx, who); err != nil {
		return 0, err
	}
	a.log.Info("an epoch of the audit log has ended", "epoch", next-1, requestid.Attr(who.Request))
	return next, a.signEnded(ctx, next)
}

// AcceptTime sets the ledger's time forward to the system's clock. An operator has checked the
// clock.
func (a *Appliance) AcceptTime(ctx context.Context, who audit.Actor) error {
	before, wall, _ := a.ledger.Clock()
	return a.ledger.AcceptTime(ctx, ledger.EventOf(audit.NewClockAccepted(who, before, wall)))
}

// Compact releases the free space of the ledger's file. All writes wait meanwhile.
func (a *Appliance) Compact(ctx context.Context, who audit.Actor) (before, after int64, took time.Duration, err error) {
	before, after, took, err = a.ledger.Compact(ctx, ledger.EventOf(audit.NewLedgerCompacted(who)))
	if errors.Is(err, ledger.ErrBusy) {
		err = fmt.Errorf("%w: %w", manage.ErrConflict, err)
	}
	return before, after, took, err
}

// LedgerStats returns the sizes of the ledger.
func (a *Appliance) LedgerStats() (ledger.Stats, error) { return a.ledger.Stats() }

// Receipt returns a receipt by its id.
func (a *Appliance) Receipt(id string) (ledger.Receipt, error) {
	var key ledger.ReceiptID
	if err := key.UnmarshalText([]byte(id)); err != nil {
		return ledger.Receipt{}, fmt.Errorf("receipt %q: %w: %w", ijson.Clip(id), manage.ErrInvalid, err)
	}
	r, err := a.ledger.Receipt(key)
	if errors.Is(err, ledger.ErrNotFound) {
		err = fmt.Errorf("receipt %q: %w", id, manage.ErrNotFound)
	}
	return r, err
}

// Receipts returns at most limit receipts with times from <= time < to, in Unix milliseconds: see
// ledger.Receipts. after is the id of the last receipt of the page before, or "".
func (a *Appliance) Receipts(from, to int64, after string, limit int) ([]ledger.Receipt, error) {
	var key ledger.ReceiptID
	if after != "" {
		if err := key.UnmarshalText([]byte(after)); err != nil {
			return nil, fmt.Errorf("after: %w: %w", manage.ErrInvalid, err)
		}
	}
	return a.ledger.Receipts(from, to, key, limit)
}
