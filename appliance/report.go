package appliance

import (
	"context"
	"encoding/hex"
	"fmt"
	"math"
	"strconv"
	"time"

	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/manage"
)

// logFiles is the log in its static form, an audit.Source.
type logFiles struct{ *Appliance }

func (l logFiles) ReadFile(ctx context.Context, name string) ([]byte, error) {
	return l.LogFile(ctx, name)
}

// Statement returns the statement of completeness about the events with times since <= time <
// until, in Unix milliseconds. An until of 0 is the present time. The log is signed up to its end
// first.
func (a *Appliance) Statement(ctx context.Context, since, until int64) (audit.Statement, error) {
	now := time.Now().UnixMilli()
	if until == 0 || until > now {
		until = now // the time of an event that does not exist yet can't be stated
	}
	if since >= until {
		return audit.Statement{}, fmt.Errorf("%w: since %d must be before until %d and before now",
			manage.ErrInvalid, since, until)
	}
	log, _, err := a.Log()
	if err != nil {
		return audit.Statement{}, err
	}
	if present, _, _ := a.ledger.Head(); present > 0 { // the sizes of ended epochs number the events
		if err := a.signEnded(ctx, present); err != nil {
			return audit.Statement{}, err
		}
	}
	s, err := log.State(ctx, logFiles{a}, since, until, func(total uint64) (first, end uint64, err error) {
		first, found, err := a.one(ledger.Query{Since: since, Until: until}, ledger.Span{Before: total})
		if err != nil {
			return 0, 0, err
		}
		if !found { // the event after the period has the number of both ends
			if first, found, err = a.one(ledger.Query{Since: until}, ledger.Span{Before: total}); err == nil && !found {
				first = total
			}
			return first, first, err
		}
		last, _, err := a.one(ledger.Query{Since: since, Until: until}, ledger.Span{Before: total, Down: true})
		return first, last + 1, err
	})
	if err != nil {
		return s, err
	}
	_, before, err := a.Preview()
	s.ReceiptsBeforeMS = max(0, before.UnixMilli())
	return s, err
}

// one returns the number of the first event of a search.
func (a *Appliance) one(q ledger.Query, s ledger.Span) (index uint64, found bool, err error) {
	err = a.ledger.Find(q, s, func(i uint64, _ []byte) bool { index, found = i, true; return false })
	return index, found, err
}

// EventBytes calls visit for the events with the numbers from <= number < before, as the bytes of
// the log, until visit returns false.
func (a *Appliance) EventBytes(from, before uint64, visit func(index uint64, entry []byte) bool) error {
	return a.ledger.Events(from, func(index uint64, b []byte) bool { return index < before && visit(index, b) })
}

// ReportedReceipts returns a page of the receipts that belong to a statement: of the payments whose
// signature is one of the events from <= number < before. The page is a part of the receipts with
// times since <= time < until; after is the id of the last receipt of the page before, or "". next
// is the last receipt that was looked at; nil is the end.
//
// A receipt and its event have times a moment apart. Within audit.ReceiptSlack of the ends of the
// period, the event decides.
func (a *Appliance) ReportedReceipts(
	s audit.Statement, since int64, after string, limit int,
) (found []audit.Receipt, next *ledger.Receipt, err error) {
	slack := audit.ReceiptSlack.Milliseconds()
	since = max(since, s.SinceMS-slack)
	all, err := a.Receipts(since, s.UntilMS+slack, after, limit+1)
	if err != nil {
		return nil, nil, err
	}
	if len(all) > limit {
		all = all[:limit]
		next = &all[limit-1]
	}
	inside := func(r ledger.Receipt) bool { return r.TimeMS >= s.SinceMS+slack && r.TimeMS < s.UntilMS-slack }
	earliest, latest := int64(math.MaxInt64), int64(0)
	for _, r := range all {
		if !inside(r) {
			earliest, latest = min(earliest, r.TimeMS), max(latest, r.TimeMS)
		}
	}
	signed := map[uint64]bool{} // admissions of the payments near the ends
	if latest > 0 && s.First < s.End {
		q := ledger.Query{Since: max(0, earliest-slack), Until: latest + slack}
		if err := a.Find(q, ledger.Span{From: s.First, Before: s.End}, func(_ uint64, e audit.Event) bool {
			if n, err := strconv.ParseUint(e.Metadata["admission"], 10, 64); err == nil && e.Type.HasReceipt() {
				signed[n] = true
			}
			return true
		}); err != nil {
			return nil, nil, err
		}
	}
	for _, r := range all {
		if inside(r) || signed[r.Event] {
			found = append(found, audit.Receipt{
				ID: hex.EncodeToString(r.ID[:]), TimeMS: r.TimeMS, Commitment: hex.EncodeToString(r.Commitment),
				Method: r.Method, Status: r.Status, Event: r.Event,
			})
		}
	}
	return found, next, nil
}
