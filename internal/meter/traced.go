package meter

import (
	"slices"
	"sync/atomic"
	"time"

	"countersign/internal/trace"
)

// traced has the moments of a request's stages, for its trace. The methods of a nil traced do
// nothing.
type traced struct {
	request *trace.Request
	stages  [Answer + 1]struct{ from, to time.Time }
	decided atomic.Int64 // the end of the decision, Unix nanoseconds; 0: none
}

// Trace has the stages of the request traced. r is nil for a request without a trace.
func (w *Walk) Trace(r *trace.Request) {
	if w != nil && r != nil {
		w.traced = &traced{request: r}
	}
}

// item returns the moments of an item of a batch so far. A batch has left no stage before its items
// begin.
func (t *traced) item(request string) *traced {
	if t == nil {
		return nil
	}
	if r := t.request.Item(request); r != nil {
		return &traced{request: r, stages: t.stages}
	}
	return nil
}

// leave notes a part of the time in a stage. A stage lasts from its first moment to its last. The
// stage Answer is also between the others, so only its last part counts.
func (t *traced) leave(s Stage, from, to time.Time) {
	if t == nil {
		return
	}
	at := &t.stages[s]
	if at.from.IsZero() || s == Answer {
		at.from = from
	}
	at.to = to
}

// decide notes the end of the decision, which lies inside the ledger's stage.
func (t *traced) decide() {
	if t != nil {
		t.decided.Store(time.Now().UnixNano())
	}
}

// end gives the trace its stages. The clock has ended.
func (t *traced) end(w *Walk, op, code string) {
	if t == nil {
		return
	}
	if n := t.decided.Load(); n > 0 {
		t.stages[Policy].to = time.Unix(0, n)
	}
	var all []trace.Stage
	for s, at := range t.stages {
		if !at.from.IsZero() {
			all = append(all, trace.Stage{Name: stages[s], From: at.from, To: at.to, Took: w.took[s]})
		}
	}
	slices.SortStableFunc(all, func(x, y trace.Stage) int { return x.From.Compare(y.From) })
	t.request.End(op, code, w.began, w.entered, all)
}
