package meter_test

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"countersign/internal/meter"
	"countersign/internal/spectest"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
)

// protobuf is the format with native histograms, as Prometheus asks for it.
const protobuf = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"

// families scrapes a meter, and returns the project's families by name.
func families(t *testing.T, m *meter.Meter) map[string]*dto.MetricFamily {
	t.Helper()
	contentType, body, err := m.Expose(protobuf)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]*dto.MetricFamily{}
	for d := expfmt.NewDecoder(bytes.NewReader(body), expfmt.Format(contentType)); ; {
		var f dto.MetricFamily
		if err := d.Decode(&f); err == io.EOF {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(f.GetName(), "countersign_") {
			all[f.GetName()] = &f
		}
	}
}

// TestTable writes the table of docs/OPERATIONS.md, and holds the table against All.
func TestTable(t *testing.T) {
	const header = "| series | type | labels | at most | meaning |\n| --- | --- | --- | --- | --- |\n"
	rows := ""
	for _, s := range meter.All {
		var labels []string
		for _, l := range s.Labels {
			text := "`" + l.Name + "`"
			switch {
			case l.Values == nil:
				text += fmt.Sprintf(" (at most %d)", l.Most)
			case len(l.Values) <= 10:
				text += ": " + strings.Join(l.Values, " ")
			default:
				text += fmt.Sprintf(" (%d values)", len(l.Values))
			}
			labels = append(labels, text)
		}
		rows += fmt.Sprintf("| `%s` | %s | %s | %d | %s |\n",
			s.Name, s.Kind, strings.Join(labels, "; "), s.Bound(), strings.TrimSuffix(s.Help, "."))
	}
	spectest.Table(t, "../../docs/OPERATIONS.md", header, rows)
}

// TestBounds counts and sets values of labels that a hostile caller might choose.
func TestBounds(t *testing.T) {
	m := meter.New("test")
	const hostile = 100_000
	m.Source(func(s *meter.Sample) {
		for n := range hostile {
			for _, each := range meter.All {
				s.Set(each, 1, labelsOf(each, n)...)
			}
		}
	})
	// A series is read from states or counted by acts. The acts of this test are the others.
	acts := meter.New("test")
	for n := range hostile {
		for _, each := range meter.All {
			acts.Try(each, labelsOf(each, n)...)
		}
	}
	for _, from := range []*meter.Meter{m.OnlyStates(), acts} {
		for name, f := range families(t, from) {
			i := slices.IndexFunc(meter.All, func(s *meter.Series) bool { return s.Name == name })
			if i < 0 {
				t.Errorf("%s is not in the table", name)
			} else if most := meter.All[i].Bound(); len(f.Metric) > most {
				t.Errorf("%s has %d time series, at most %d", name, len(f.Metric), most)
			}
		}
	}
}

func labelsOf(s *meter.Series, n int) (labels []string) {
	for i := range s.Labels {
		labels = append(labels, fmt.Sprintf("x%d-%d\"}\n", i, n))
	}
	return labels
}

// TestFormats reads the same counts in each format. The text is for people and old scrapers,
// OpenMetrics for new ones, and protobuf has native histograms.
func TestFormats(t *testing.T) {
	m := meter.New("v1.2.3")
	m.Observe(meter.CommitSeconds, .003)
	for _, test := range []struct{ accept, contentType, has string }{
		{"", "text/plain", "\ncountersign_ledger_commit_seconds_bucket{le=\"0.005\"} 1\n"},
		{"text/plain", "text/plain", "# TYPE countersign_requests_total counter\n"},
		{"application/openmetrics-text;version=1.0.0", "application/openmetrics-text",
			"# TYPE countersign_requests counter\n"},
		{"application/openmetrics-text;version=1.0.0", "application/openmetrics-text", "\n# EOF\n"},
		{"*/*", "text/plain", "countersign_build_info{go=\"go"},
		{"image/png", "text/plain", "countersign_build_info{go=\"go"},
	} {
		contentType, body, err := m.Expose(test.accept)
		if err != nil || !strings.HasPrefix(contentType, test.contentType) ||
			!strings.Contains(string(body), test.has) {
			t.Errorf("%q: %v %q\n%.500s", test.accept, err, contentType, body)
		}
	}
	h := families(t, m)[meter.CommitSeconds.Name].Metric[0].Histogram
	if h.Schema == nil || len(h.PositiveSpan) == 0 || len(h.Bucket) == 0 {
		t.Errorf("the histogram has no native or no classic buckets: %v", h)
	}
}

// TestHandler serves the listener without a sign-in to this machine by its address only.
func TestHandler(t *testing.T) {
	m := meter.New("test")
	for _, test := range []struct {
		method, path, host string
		status             int
	}{
		{"GET", "/metrics", "127.0.0.1:7790", 200},
		{"GET", "/metrics", "[::1]:7790", 200},
		{"GET", "/metrics", "localhost:7790", 200},
		{"GET", "/metrics", "rebound.example:7790", 403},
		{"GET", "/metrics", "10.0.0.1", 403},
		{"POST", "/metrics", "localhost", 405},
		{"GET", "/", "localhost", 404},
		{"GET", "/debug/pprof/", "localhost", 404},
	} {
		r := httptest.NewRequest(test.method, test.path, nil)
		r.Host = test.host
		w := httptest.NewRecorder()
		m.Handler().ServeHTTP(w, r)
		if w.Code != test.status {
			t.Errorf("%s %s of %s: %d", test.method, test.path, test.host, w.Code)
		}
		if has := strings.Contains(w.Body.String(), "countersign_build_info"); has != (w.Code == http.StatusOK) {
			t.Errorf("%s %s of %s: %.100s", test.method, test.path, test.host, w.Body)
		}
	}
}

// TestFloodOfScrapes: callers without a sign-in share one collection a second.
func TestFloodOfScrapes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := meter.New("test")
		collected := 0
		m.Source(func(*meter.Sample) { collected++ })
		handler := m.Handler()
		for n := range 3 {
			for range 10 {
				r := httptest.NewRequest("GET", "/metrics", nil)
				r.Host = "localhost"
				handler.ServeHTTP(httptest.NewRecorder(), r)
			}
			if collected != n+1 {
				t.Fatalf("%d collections in %d seconds", collected, n+1)
			}
			time.Sleep(time.Second)
		}
	})
}

// TestWalk: the stages of a request add up to its time, and the time of the decision moves from the
// ledger's stage to the policy's.
func TestWalk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := meter.New("test")
		w := m.Begin()
		time.Sleep(1 * time.Second)
		w.Enter(meter.Policy)
		time.Sleep(2 * time.Second)
		w.Enter(meter.Ledger)
		began := time.Now()
		time.Sleep(1 * time.Second)
		w.Decided(began)
		time.Sleep(3 * time.Second)
		w.Enter(meter.Turn)
		time.Sleep(5 * time.Second)
		item := w.Item("id")
		w.Enter(meter.Device)
		time.Sleep(6 * time.Second)
		w.Enter(meter.Verify)
		w.Enter(meter.Answer)
		time.Sleep(8 * time.Second)
		w.End("sign", "replay")
		item.End("a stranger's op", "a stranger's code")
		got := families(t, m)
		want := map[string]float64{"decode": 1, "policy": 3, "ledger": 3, "turn": 5, "device": 6, "answer": 8}
		for stage, seconds := range map[string]float64{"decode": 1, "policy": 2, "ledger": 4, "turn": 5 + 14} {
			want[stage] += seconds // of the item
		}
		for _, each := range got[meter.StageSeconds.Name].Metric {
			stage := each.Label[0].GetValue()
			if sum := each.Histogram.GetSampleSum(); math.Abs(sum-want[stage]) > 1e-9 {
				t.Errorf("%s: %v s, want %v", stage, sum, want[stage])
			}
		}
		for _, each := range got[meter.RequestSeconds.Name].Metric {
			wanted := map[string]float64{"sign": 26, meter.Other: 26}[each.Label[0].GetValue()]
			if sum := each.Histogram.GetSampleSum(); math.Abs(sum-wanted) > 1e-9 {
				t.Errorf("%s: %v s, want %v", each.Label[0].GetValue(), sum, wanted)
			}
		}
		for name, labels := range map[string]string{
			"requests_total": "sign refused", "refusals_total": "replay", "replays_total": "sign",
		} {
			if !has(got["countersign_"+name], labels, 1) {
				t.Errorf("%s %s: %v", name, labels, got["countersign_"+name])
			}
		}
	})
}

// has reports whether a counter has a value for labels, which are in the order of their names.
func has(f *dto.MetricFamily, labels string, value float64) bool {
	return slices.ContainsFunc(f.GetMetric(), func(m *dto.Metric) bool {
		var values []string
		for _, l := range m.Label {
			values = append(values, l.GetValue())
		}
		return strings.Join(values, " ") == labels && m.Counter.GetValue() == value
	})
}

// TestNothingIsCounted: a nil meter, for tests of other packages, accepts all calls.
func TestNothingIsCounted(t *testing.T) {
	var m *meter.Meter
	m.Add(meter.Requests, "sign", "ok")
	m.Observe(meter.HandshakeSeconds, 1, meter.HandshakeDone)
	m.Source(func(*meter.Sample) {})
	w := m.Begin()
	w.Enter(meter.Ledger)
	w.Decided(time.Now())
	w.Item("id").End("sign", "")
	if w != nil {
		t.Error("there is a clock")
	}
	if _, body, err := m.Expose(""); err != nil || len(body) != 0 {
		t.Errorf("%v %s", err, body)
	}
}

// TestValues compares the values of the labels op and code with the constants of package wire.
func TestValues(t *testing.T) {
	f, err := parser.ParseFile(token.NewFileSet(), "../../wire/wire.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string][]string{"Op": {meter.NoOp}, "Code": {}}
	ast.Inspect(f, func(n ast.Node) bool {
		v, ok := n.(*ast.ValueSpec)
		if !ok || len(v.Values) != 1 {
			return true
		}
		lit, ok := v.Values[0].(*ast.BasicLit)
		if !ok || lit.Kind != token.STRING {
			return true
		}
		text, err := strconv.Unquote(lit.Value)
		if err != nil {
			t.Fatal(err)
		}
		for prefix := range want {
			if strings.HasPrefix(v.Names[0].Name, prefix) && text != "batch" { // the items of a batch count
				want[prefix] = append(want[prefix], text)
			}
		}
		return true
	})
	for prefix, got := range map[string][]string{
		"Op": meter.Requests.Labels[0].Values, "Code": meter.Refusals.Labels[0].Values,
	} {
		all := want[prefix]
		if slices.Sort(all); !slices.Equal(all, slices.Sorted(slices.Values(got))) {
			t.Errorf("%s: %q, package wire has %q", prefix, got, all)
		}
	}
}

// BenchmarkWalk measures what counting costs for one signature.
func BenchmarkWalk(b *testing.B) {
	m := meter.New("test")
	for b.Loop() {
		w := m.Begin()
		for stage := meter.Decode; stage <= meter.Answer; stage++ {
			w.Enter(stage)
		}
		w.Decided(time.Now())
		w.End("sign", "")
	}
}

// BenchmarkScrape measures a scrape with the states of a typical appliance, of one with 32 tokens,
// and with as many time series as there may be.
func BenchmarkScrape(b *testing.B) {
	states := meter.New("").States()
	fill := func(tokens, workers int) func(*meter.Sample) {
		return func(s *meter.Sample) {
			for _, each := range states {
				for t := range tokens {
					for w := range workers {
						labels := make([]string, len(each.Labels))
						for i, l := range each.Labels {
							switch {
							case l.Values != nil:
								labels[i] = l.Values[(t+w)%len(l.Values)]
							case l.Name == "worker":
								labels[i] = strconv.Itoa(w + 1)
							default:
								labels[i] = fmt.Sprint("token-", t)
							}
						}
						s.Set(each, 1, labels...)
					}
				}
			}
		}
	}
	for name, fill := range map[string]func(*meter.Sample){
		"typical": fill(1, 2), "32 tokens": fill(32, 2), "all": fill(40, 40),
	} {
		m := meter.New("test")
		m.Source(fill)
		for format, accept := range map[string]string{
			"text": "", "openmetrics": "application/openmetrics-text;version=1.0.0", "protobuf": protobuf,
		} {
			b.Run(name+"/"+format, func(b *testing.B) {
				size := 0
				for b.Loop() {
					_, body, err := m.Expose(accept)
					if err != nil {
						b.Fatal(err)
					}
					size = len(body)
				}
				b.ReportMetric(float64(size), "bytes")
			})
		}
	}
}

// TestNoReading: a nil Meter, as of the benchmark of the counting's cost, has no reading.
func TestNoReading(t *testing.T) {
	if r, err := (*meter.Meter)(nil).Read(0); err == nil {
		t.Errorf("%+v", r)
	}
}
