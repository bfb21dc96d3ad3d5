package softhsmtests

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"countersign/admin/api"
	"countersign/client"
	"countersign/internal/scantest"
)

// collected are the spans that a collector in the test's process has got.
type collected struct {
	t   testing.TB
	mu  sync.Mutex
	all []collectedSpan
}

type collectedSpan struct {
	TraceID, SpanID, ParentSpanID, Name string
	Start                               json.Number `json:"startTimeUnixNano"`
	End                                 json.Number `json:"endTimeUnixNano"`
	Attributes                          []struct {
		Key   string
		Value struct{ StringValue string }
	}
}

func (s *collectedSpan) attribute(key string) string {
	for _, a := range s.Attributes {
		if a.Key == key {
			return a.Value.StringValue
		}
	}
	return ""
}

func (c *collected) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b, _ := io.ReadAll(r.Body)
	var m struct {
		ResourceSpans []struct {
			ScopeSpans []struct{ Spans []collectedSpan }
		}
	}
	if err := json.Unmarshal(b, &m); err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	scantest.Saw("the collector of traces", string(b))
	for _, each := range m.ResourceSpans {
		for _, of := range each.ScopeSpans {
			c.all = append(c.all, of.Spans...)
		}
	}
}

// find returns the spans for which is is true.
func (c *collected) find(is func(*collectedSpan) bool) (found []collectedSpan) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.all {
		if is(&s) {
			found = append(found, s)
		}
	}
	return found
}

// TestTraces has a peer with a trace of its own use a daemon: the collector gets a span for each
// request, in the peer's trace, and one for each stage. The ids of the requests lead to the audit
// log. Without a configuration, and for a peer that does not record its trace, there are no spans.
func TestTraces(t *testing.T) {
	s := newSystem(t)
	got := &collected{t: t}
	collector := httptest.NewServer(got)
	defer collector.Close()
	p := s.serve()
	s.enrol()
	const trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
	sign := func(key, text, flags string) error {
		config := s.clientConfig()
		config.Traceparent = func(context.Context) string { return "00-" + trace + "-" + parent + "-" + flags }
		c := must(client.Dial(t.Context(), config))(t)
		defer c.Close()
		_, err := c.Sign(t.Context(), key, message(text))
		return err
	}
	if err := sign("payments", "aaaa", "01"); err != nil { // traces are off
		t.Fatal(err)
	}
	p.stop()
	s.edit("countersign.toml", "[tokens.main]", "[traces]\nendpoint = \""+collector.URL+"/v1/traces\"\n[tokens.main]")
	p = s.serve()
	if err := sign("payments", "bbbb", "00"); err != nil {
		t.Fatal(err)
	}
	if err := sign("payments", "cccc", "01"); err != nil {
		t.Fatal(err)
	}
	if sign("nothing", "dddd", "01") == nil {
		t.Fatal("there is a key nothing")
	}
	server := func(code string) (found collectedSpan) {
		eventually(t, "the span of a request with the code "+code, func() bool {
			all := got.find(func(s *collectedSpan) bool {
				return s.Name == "sign" && s.attribute("error.type") == code
			})
			if len(all) > 1 {
				t.Fatalf("%d spans", len(all))
			}
			if len(all) == 1 {
				found = all[0]
			}
			return len(all) == 1
		})
		if found.TraceID != trace || found.ParentSpanID != parent {
			t.Errorf("%+v is not in the peer's trace", found)
		}
		return found
	}
	for code, want := range map[string][]string{
		"":            {"decode", "policy", "ledger", "turn", "device", "verify", "answer"},
		"unknown_key": {"decode", "answer"},
	} {
		span := server(code)
		var stages []string
		for _, stage := range got.find(func(s *collectedSpan) bool { return s.ParentSpanID == span.SpanID }) {
			stages = append(stages, stage.Name)
			if stage.TraceID != trace || stage.Start.String() < span.Start.String() ||
				stage.End.String() > span.End.String() || stage.Start.String() > stage.End.String() {
				t.Errorf("the stage %+v is not inside %+v", stage, span)
			}
		}
		if !slices.Equal(stages, want) {
			t.Errorf("the stages are %v, want %v", stages, want)
		}
		request := span.attribute("countersign.request")
		found, _, err := s.api.FindEvents(t.Context(), api.EventQuery{Request: request})
		if err != nil || len(found) == 0 {
			t.Errorf("the request %q has no event, %v", request, err)
		}
		if !strings.Contains(p.stderr.String(), "request="+request+" ") {
			t.Errorf("the request %q has no line", request)
		}
	}
	p.stop()
	if n := len(got.find(func(s *collectedSpan) bool { return s.Name == "sign" })); n != 2 {
		t.Errorf("%d requests are traced, want 2", n)
	}
}
