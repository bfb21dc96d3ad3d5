// Package trace sends the time of requests to a collector of OpenTelemetry (OTLP over HTTP, in
// JSON): a span for the request, and one for each of its stages. Begin reading at Tracer.Begin, and
// at Run for the sending.
//
// The invariants:
//
//   - No request waits for a trace. A request that ends puts its trace into a bounded queue, or
//     drops the trace, which is counted.
//   - The operator decides what is traced: a share of the requests, and at most so many in a
//     second. A peer can only say less: with a traceparent that is not sampled, its request has no
//     trace.
//   - A span has no name of a peer or key, and nothing of a document. The attribute
//     countersign.request leads to the audit log, which has both.
package trace

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"countersign/internal/webhook"
	"countersign/wire"

	"golang.org/x/time/rate"
)

// maxQueue is the number of requests whose traces wait. A trace takes some 700 bytes.
const maxQueue = 2048

// Config is the configuration of a Tracer.
type Config struct {
	Target  webhook.Target // the collector; the URL is that of traces, such as https://host:4318/v1/traces
	Headers string         // path of the file with the headers of each message; or empty
	OneIn   int            // one of so many requests is traced, by chance; 1: each
	Most    int            // requests that are traced in a second
	Version string         // of the daemon
	Log     *slog.Logger
	// Count is called with the number of spans that the collector has taken, or that were dropped.
	Count func(sent bool, spans int)
}

// Tracer traces requests. The methods of a nil Tracer do nothing. A Tracer is safe for concurrent
// use.
type Tracer struct {
	c     Config
	most  *rate.Limiter
	queue chan *Request

	dropped atomic.Int64 // spans, since the last call of Count

	mu      sync.Mutex
	failure error // guarded by mu: of the last attempt; nil after a success
}

// New checks the configuration. The Tracer sends nothing before Run.
func New(c Config) (*Tracer, error) {
	if _, err := c.Target.Transport(); err != nil {
		return nil, fmt.Errorf("endpoint: %w", err)
	}
	if _, err := c.headers(); err != nil {
		return nil, fmt.Errorf("headers_file: %w", err)
	}
	return &Tracer{c: c, most: rate.NewLimiter(rate.Limit(c.Most), c.Most), queue: make(chan *Request, maxQueue)}, nil
}

// Failure returns the error of the last attempt to send, or nil.
func (t *Tracer) Failure() error {
	if t == nil {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.failure
}

// Request is the trace of one request. The methods of a nil Request, which is not traced, do
// nothing.
type Request struct {
	tracer  *Tracer
	trace   [16]byte
	parent  [8]byte // of the peer's span; zero: none
	span    [8]byte
	request string // id; see package requestid

	op, code     string
	began, ended time.Time
	stages       []Stage
}

// Stage is the time of a request in one stage.
type Stage struct {
	Name     string
	From, To time.Time
	// Took is the time that belongs to the stage. Another stage may lie within From and To.
	Took time.Duration
}

// Begin decides whether a request with an id is traced, and returns its trace or nil. The trace
// continues the one of the peer, if there is one.
func (t *Tracer) Begin(peer wire.Trace, request string) *Request {
	if t == nil || peer != (wire.Trace{}) && !peer.Sampled {
		return nil
	}
	// The peer chooses the trace's id, so the id can't decide.
	if mathrand.IntN(t.c.OneIn) != 0 || !t.most.Allow() {
		return nil
	}
	r := &Request{tracer: t, trace: peer.ID, parent: peer.Parent, request: request, span: newSpan()}
	if peer == (wire.Trace{}) {
		rand.Read(r.trace[:])
	}
	return r
}

// Item returns the trace of an item of a traced batch, or nil beyond the number of a second.
func (r *Request) Item(request string) *Request {
	if r == nil || !r.tracer.most.Allow() {
		return nil
	}
	return &Request{tracer: r.tracer, trace: r.trace, parent: r.parent, request: request, span: newSpan()}
}

// newSpan returns a new id of a span, which is not zero.
func newSpan() (id [8]byte) {
	binary.BigEndian.PutUint64(id[:], mathrand.Uint64()|1)
	return id
}

// End queues the trace of a request that has ended. The request's stages are in the order of their
// beginnings. code is the code of its refusal, or empty.
func (r *Request) End(op, code string, began, ended time.Time, stages []Stage) {
	if r == nil {
		return
	}
	r.op, r.code, r.began, r.ended, r.stages = op, code, began, ended, stages
	select {
	case r.tracer.queue <- r:
	default:
		r.tracer.dropped.Add(int64(r.spans()))
	}
}

// spans returns the number of spans of a request.
func (r *Request) spans() int { return 1 + len(r.stages) }

const (
	maxBatch   = 256         // requests in a message
	gather     = time.Second // from the first request of a message to the sending
	minBackoff = time.Second
	maxBackoff = 30 * time.Second
	maxTries   = 5
	lastTime   = 2 * time.Second // for the rest of the queue, at the end
)

// Run sends traces until ctx ends, and then the rest of the queue in one attempt.
func (t *Tracer) Run(ctx context.Context) {
	if t == nil {
		return
	}
	for {
		batch := t.next(ctx)
		if ctx.Err() != nil {
			t.last(batch)
			return
		}
		t.deliver(ctx, batch)
		t.countDropped()
	}
}

// next waits for a request, and returns what has come within the time gather after the request.
func (t *Tracer) next(ctx context.Context) (batch []*Request) {
	select {
	case <-ctx.Done():
		return nil
	case r := <-t.queue:
		batch = append(batch, r)
	}
	full := time.NewTimer(gather)
	defer full.Stop()
	for len(batch) < maxBatch {
		select {
		case <-ctx.Done():
			return batch
		case <-full.C:
			return batch
		case r := <-t.queue:
			batch = append(batch, r)
		}
	}
	return batch
}

// deliver sends a batch, with retries while the collector may take the batch later. Meanwhile the
// queue fills.
func (t *Tracer) deliver(ctx context.Context, batch []*Request) {
	body, spans := t.encode(batch)
	for try := 1; ; try++ {
		rejected, again, err := t.send(ctx, body)
		t.note(err)
		if err == nil || !again || try == maxTries || pause(ctx, try) != nil {
			t.count(spans, rejected, err)
			return
		}
	}
}

// last sends what is left, when the daemon stops.
func (t *Tracer) last(batch []*Request) {
	defer t.countDropped()
	ctx, cancel := context.WithTimeout(context.Background(), lastTime)
	defer cancel()
	for len(batch) < maxQueue {
		select {
		case r := <-t.queue:
			batch = append(batch, r)
			continue
		default:
		}
		break
	}
	if len(batch) == 0 {
		return
	}
	body, spans := t.encode(batch)
	rejected, _, err := t.send(ctx, body)
	t.count(spans, rejected, err)
}

// count counts the spans of a message after its last attempt.
func (t *Tracer) count(spans, rejected int, err error) {
	if err != nil {
		rejected = spans
	}
	rejected = min(rejected, spans)
	t.c.Count(true, spans-rejected)
	t.c.Count(false, rejected)
}

// note keeps the result of an attempt. Only the first failure in a row is logged.
func (t *Tracer) note(err error) {
	t.mu.Lock()
	first := err != nil && t.failure == nil
	t.failure = err
	t.mu.Unlock()
	if first {
		t.c.Log.Warn("the collector does not take traces", "err", err)
	}
}

// countDropped passes on the spans that the queue had no place for.
func (t *Tracer) countDropped() {
	if n := t.dropped.Swap(0); n > 0 {
		t.c.Count(false, int(n))
	}
}

// pause waits before the next try: longer each time, with half of the time at random. The error is
// that of ctx.
func pause(ctx context.Context, try int) error {
	d := min(minBackoff<<(try-1), maxBackoff)
	timer := time.NewTimer(d/2 + mathrand.N(d/2))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
