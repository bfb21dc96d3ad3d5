package meter

import (
	"sync/atomic"
	"time"

	"countersign/wire"
)

// Stage is a part of the time of a request. Each moment of a request belongs to one stage, so the
// stages of a request add up to its time.
type Stage int

const (
	Decode Stage = iota // the turn at the processor, and the reading of JSON and of the document
	Policy              // the preparation of the decision, and the decision
	Ledger              // the wait for the writer and for the disk
	Turn                // the wait for the token
	Device              // the key worker and the device
	Verify              // the check of a signature, the device's or a peer's
	Answer              // the outcome, encoding, encryption and writing
)

// Walk is the clock of one request. The methods of a nil Walk do nothing. One goroutine at a time
// may use a Walk; only Decided may be called beside.
type Walk struct {
	meter   *Meter
	began   time.Time
	entered time.Time // of the present stage
	stage   Stage
	took    [Answer + 1]time.Duration
	decided atomic.Int64 // nanoseconds of the ledger's stage that belong to the policy
	traced  *traced      // nil: not traced
}

// Begin starts the clock of a request, in the stage Decode.
func (m *Meter) Begin() *Walk {
	if m == nil {
		return nil
	}
	now := time.Now()
	return &Walk{meter: m, began: now, entered: now}
}

// Item returns the clock of an item of a batch, with the id of the item. The item has the time of
// the batch so far.
func (w *Walk) Item(request string) *Walk {
	if w == nil {
		return nil
	}
	item := &Walk{meter: w.meter, began: w.began, entered: w.entered, stage: w.stage, took: w.took}
	item.traced = w.traced.item(request)
	return item
}

// Enter ends the present stage and begins another one.
func (w *Walk) Enter(s Stage) {
	if w == nil {
		return
	}
	now := time.Now()
	w.took[w.stage] += now.Sub(w.entered)
	w.traced.leave(w.stage, w.entered, now)
	w.stage, w.entered = s, now
}

// Decided moves the time of a decision from the ledger's stage to the policy's. The ledger's writer
// calls Decided while the request waits, or after the request has given up.
func (w *Walk) Decided(began time.Time) {
	if w != nil {
		w.decided.Add(int64(time.Since(began)))
		w.traced.decide()
	}
}

// End counts the request. code is the code of its refusal, or empty.
func (w *Walk) End(op, code string) {
	if w == nil {
		return
	}
	w.Enter(Answer)
	decided := min(time.Duration(w.decided.Load()), w.took[Ledger])
	w.took[Ledger] -= decided
	w.took[Policy] += decided
	w.traced.end(w, op, code)
	for stage, took := range w.took {
		if took > 0 {
			w.meter.Observe(StageSeconds, took.Seconds(), stages[stage])
		}
	}
	w.meter.Observe(RequestSeconds, w.entered.Sub(w.began).Seconds(), op)
	w.meter.Add(Requests, op, resultOf(code))
	if code != "" {
		w.meter.Add(Refusals, code)
	}
	if code == wire.CodeReplay {
		w.meter.Add(Replays, op)
	}
}

func resultOf(code string) string {
	switch code {
	case "":
		return "ok"
	case wire.CodeUnavailable, wire.CodeBusy, wire.CodeRateLimited:
		return "unavailable"
	}
	return "refused"
}
