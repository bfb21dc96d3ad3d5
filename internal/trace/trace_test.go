package trace_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"countersign/internal/scantest"
	"countersign/internal/secret"
	"countersign/internal/trace"
	"countersign/internal/webhook"
	"countersign/wire"
)

func TestMain(m *testing.M) { os.Exit(scantest.Run(m)) }

// rig is a tracer with a collector in this process.
type rig struct {
	*trace.Tracer
	bodies        chan []byte // of the messages that the collector has taken
	status        atomic.Int32
	sent, dropped atomic.Int64
	log           strings.Builder
	headers       string // path of the file
}

func newRig(t *testing.T, change func(*trace.Config)) *rig {
	t.Helper()
	r := &rig{bodies: make(chan []byte, 100)}
	r.status.Store(http.StatusOK)
	collector := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		b, err := io.ReadAll(q.Body)
		if err != nil || q.Method != http.MethodPost || q.URL.Path != "/v1/traces" ||
			q.Header.Get("Content-Type") != "application/json" || q.Header.Get("Authorization") != "Bearer secret" {
			t.Errorf("%s %s %v, %v", q.Method, q.URL, q.Header, err)
		}
		scantest.Saw("the collector of traces", string(b))
		status := int(r.status.Load())
		w.Header().Set("Location", "http://192.0.2.1/")
		w.WriteHeader(status)
		if status == http.StatusOK {
			fmt.Fprint(w, `{"partialSuccess":{"rejectedSpans":"1"}}`)
			r.bodies <- b
		}
	}))
	t.Cleanup(collector.Close)
	r.headers = filepath.Join(t.TempDir(), "headers")
	if err := os.WriteFile(r.headers, []byte("Authorization: Bearer secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c := trace.Config{
		Target: webhook.Target{URL: secret.Of(collector.URL + "/v1/traces")}, Headers: r.headers, OneIn: 1,
		Most: 10_000, Version: "v1", Log: slog.New(slog.NewTextHandler(scantest.Tee("the log", &r.log), nil)),
		Count: func(sent bool, spans int) {
			if sent {
				r.sent.Add(int64(spans))
			} else {
				r.dropped.Add(int64(spans))
			}
		},
	}
	if change != nil {
		change(&c)
	}
	var err error
	if r.Tracer, err = trace.New(c); err != nil {
		t.Fatal(err)
	}
	return r
}

// nowhere is a collector that does not answer.
var nowhere = webhook.Target{URL: secret.Of("http://127.0.0.1:1/")}

var peer = wire.Trace{ID: [16]byte{0: 0xa, 15: 1}, Parent: [8]byte{0: 0xb, 7: 2}, Sampled: true}

// end ends a request with one stage.
func end(r *trace.Request, code string) {
	at := time.Unix(1_700_000_000, 5)
	r.End("sign", code, at, at.Add(9), []trace.Stage{{Name: "decode", From: at, To: at.Add(4), Took: 3}})
}

// TestMessage compares a message with the form of opentelemetry-proto's JSON, field by field.
func TestMessage(t *testing.T) {
	r := newRig(t, nil)
	end(r.Begin(peer, "abc"), "")
	end(r.Begin(wire.Trace{}, "def").Item("def.1"), "replay")
	ctx, stop := contextOf(t)
	stop() // the queue is sent at the end
	r.Run(ctx)
	var got struct {
		ResourceSpans []struct {
			Resource   map[string]any
			ScopeSpans []struct {
				Scope map[string]any
				Spans []map[string]any
			}
		}
	}
	if err := json.Unmarshal(<-r.bodies, &got); err != nil {
		t.Fatal(err)
	}
	of := got.ResourceSpans[0]
	if text := fmt.Sprint(of.Resource, of.ScopeSpans[0].Scope); text != "map[attributes:[map[key:service.name "+
		"value:map[stringValue:countersignd]] map[key:service.version value:map[stringValue:v1]]]] "+
		"map[name:countersign version:v1]" {
		t.Error(text)
	}
	spans := of.ScopeSpans[0].Spans
	if len(spans) != 4 {
		t.Fatalf("%d spans", len(spans))
	}
	ids := map[any]bool{}
	for _, s := range spans {
		if ids[s["spanId"]] {
			t.Errorf("the id %v comes twice", s["spanId"])
		}
		ids[s["spanId"]] = true
	}
	if spans[1]["parentSpanId"] != spans[0]["spanId"] || spans[3]["parentSpanId"] != spans[2]["spanId"] ||
		spans[3]["traceId"] != spans[2]["traceId"] || len(fmt.Sprint(spans[2]["traceId"])) != 32 {
		t.Errorf("the stages are not of their requests: %v", spans)
	}
	if _, has := spans[2]["parentSpanId"]; has {
		t.Error("a request without a trace of its peer has a parent")
	}
	for i, want := range []string{
		`map[attributes:[map[key:countersign.request value:map[stringValue:abc]]] ` +
			`endTimeUnixNano:1700000000000000014 flags:769 kind:2 name:sign ` +
			`parentSpanId:0b00000000000002 startTimeUnixNano:1700000000000000005 ` +
			`traceId:0a000000000000000000000000000001]`,
		`map[attributes:[map[key:countersign.took_ns value:map[intValue:3]]] endTimeUnixNano:1700000000000000009 ` +
			`flags:257 kind:1 name:decode startTimeUnixNano:1700000000000000005 ` +
			`traceId:0a000000000000000000000000000001]`,
		`map[attributes:[map[key:countersign.request value:map[stringValue:def.1]] ` +
			`map[key:error.type value:map[stringValue:replay]]] endTimeUnixNano:1700000000000000014 flags:257 kind:2 ` +
			`name:sign startTimeUnixNano:1700000000000000005 status:map[code:2]]`,
	} {
		delete(spans[i], "spanId")
		if i == 1 {
			delete(spans[i], "parentSpanId")
		}
		if i == 2 {
			delete(spans[i], "traceId")
		}
		if got := fmt.Sprint(spans[i]); got != want {
			t.Errorf("span %d is\n%s, want\n%s", i, got, want)
		}
	}
	if sent, dropped := r.sent.Load(), r.dropped.Load(); sent != 3 || dropped != 1 { // one is rejected
		t.Errorf("%d spans are counted as sent and %d as dropped", sent, dropped)
	}
}

// TestWhatIsTraced: the operator bounds the number of traces, whatever peers ask for, and a peer
// may ask for none.
func TestWhatIsTraced(t *testing.T) {
	none := peer
	none.Sampled = false
	var off *trace.Tracer
	if off.Begin(peer, "x") != nil || newRig(t, nil).Begin(none, "x") != nil {
		t.Error("a request is traced without a tracer, or against the will of its peer")
	}
	off.Run(t.Context())
	end(nil, "")
	synctest.Test(t, func(t *testing.T) {
		r := newUnsent(t, 10)
		traced := func() (n int) {
			for range 1000 {
				if each := r.Begin(peer, "x"); each != nil {
					n++
					if each.Item("x.0") != nil {
						n++
					}
				}
			}
			return n
		}
		if n := traced(); n != 10 {
			t.Errorf("%d traces at once, want 10", n)
		}
		time.Sleep(time.Second)
		if n := traced(); n != 10 {
			t.Errorf("%d traces in the next second, want 10", n)
		}
	})
}

// newUnsent returns a tracer without a collector, for tests with another clock.
func newUnsent(t *testing.T, most int) *trace.Tracer {
	tracer, err := trace.New(trace.Config{Target: nowhere, OneIn: 1, Most: most})
	if err != nil {
		t.Fatal(err)
	}
	return tracer
}

// TestSlowCollector never makes a request wait: beyond the queue, spans are dropped and counted.
func TestSlowCollector(t *testing.T) {
	const more = 10
	r := newRig(t, nil)
	for range trace.MaxQueue + more {
		end(r.Begin(peer, "x"), "")
	}
	ctx, stop := contextOf(t)
	stop()
	r.Run(ctx)
	if sent, dropped := r.sent.Load(), r.dropped.Load(); sent != 2*trace.MaxQueue-1 || dropped != 2*more+1 {
		t.Errorf("%d spans sent and %d dropped", sent, dropped)
	}
}

// TestFailingCollector drops what the collector does not take, tells once, and goes on. A redirect
// is no collector: the headers are a secret.
func TestFailingCollector(t *testing.T) {
	t.Parallel()
	for _, status := range []int{http.StatusBadRequest, http.StatusTemporaryRedirect, http.StatusUnauthorized} {
		r := newRig(t, nil)
		r.status.Store(int32(status))
		ctx, stop := contextOf(t)
		done := make(chan bool)
		go func() { defer close(done); r.Run(ctx) }()
		for range 2 {
			end(r.Begin(peer, "x"), "")
			waitFor(t, func() bool { return r.Failure() != nil && r.dropped.Load()%2 == 0 && r.dropped.Load() > 0 })
			r.dropped.Store(0)
		}
		r.status.Store(http.StatusOK)
		end(r.Begin(peer, "x"), "")
		// One of the two spans is rejected.
		waitFor(t, func() bool { return r.Failure() == nil && r.sent.Load() == 1 && r.dropped.Load() == 1 })
		stop()
		<-done
		if text := r.log.String(); strings.Count(text, "\n") != 1 || !strings.Contains(text, fmt.Sprint(status)) ||
			strings.Contains(text, "secret") {
			t.Errorf("%s", text)
		}
	}
}

// TestPatience retries while the collector says that it may take the message later.
func TestPatience(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	r.status.Store(http.StatusServiceUnavailable)
	ctx, stop := contextOf(t)
	done := make(chan bool)
	go func() { defer close(done); r.Run(ctx) }()
	end(r.Begin(peer, "x"), "")
	waitFor(t, func() bool { return r.Failure() != nil })
	r.status.Store(http.StatusOK)
	waitFor(t, func() bool { return r.Failure() == nil && r.sent.Load()+r.dropped.Load() == 2 })
	stop()
	<-done
}

// TestHeaders refuses files that are no headers, without their values.
func TestHeaders(t *testing.T) {
	path := filepath.Join(t.TempDir(), "headers")
	c := trace.Config{Target: webhook.Target{URL: secret.Of("https://localhost/")}, Headers: path}
	if _, err := trace.New(c); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	for _, bad := range []string{
		"secret", "a b: secret", ": secret", "A: secret\x01", "A: secret\n\nB: secret", "",
		strings.Repeat("A: secret\n", 17),
	} {
		if err := os.WriteFile(path, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := trace.New(c); err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if err := os.WriteFile(path, []byte("A: secret\r\nB:secret\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	os.Chmod(path, 0o644)
	if _, err := trace.New(c); err == nil {
		t.Error("a file for everybody is taken")
	}
	os.Chmod(path, 0o600)
	if _, err := trace.New(c); err != nil {
		t.Error(err)
	}
	if c.Target.URL = secret.Of("http://192.0.2.1/v1/traces"); true {
		if _, err := trace.New(c); err == nil {
			t.Error("headers go to another machine without TLS")
		}
	}
}

func contextOf(t *testing.T) (context.Context, context.CancelFunc) {
	ctx, stop := context.WithCancel(context.Background())
	t.Cleanup(stop)
	return ctx, stop
}

// waitFor waits for a condition, for at most a minute.
func waitFor(t *testing.T, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the condition does not come true")
		}
	}
}

// BenchmarkTrace is the cost of a trace with seven stages: for the request, and for its message.
func BenchmarkTrace(b *testing.B) {
	tracer, err := trace.New(trace.Config{Target: nowhere, OneIn: 1, Most: 1e9})
	if err != nil {
		b.Fatal(err)
	}
	at := time.Now()
	stages := make([]trace.Stage, 7)
	for i := range stages {
		stages[i] = trace.Stage{Name: "device", From: at, To: at, Took: time.Millisecond}
	}
	b.Run("request", func(b *testing.B) {
		for b.Loop() {
			tracer.Begin(peer, "k4wq2vz5n3xa7bcd").End("sign", "", at, at, stages)
		}
	})
	b.Run("message", func(b *testing.B) {
		r := tracer.Begin(peer, "k4wq2vz5n3xa7bcd")
		for b.Loop() {
			body, _ := tracer.Encode(r)
			b.ReportMetric(float64(len(body)), "bytes")
		}
	})
	b.Run("off", func(b *testing.B) {
		var off *trace.Tracer
		for b.Loop() {
			off.Begin(peer, "k4wq2vz5n3xa7bcd").End("sign", "", at, at, stages)
		}
	})
}
