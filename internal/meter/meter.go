// Package meter has the metrics of the appliance. series.go is the table of all series with their
// bounds. Begin reading there, then at Walk for the time of a request.
//
// The appliance counts at the place of an act (Add, Observe, Walk). States are read when somebody
// asks (Source), so a state costs nothing between two scrapes.
//
// Two guarantees hold whatever peers do: a series has at most Series.Bound time series, and no
// label has a name, an address or a key of a peer or stranger.
package meter

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
)

// maxLabels is the largest number of labels of a series.
const maxLabels = 2

// values are the values of a series' labels.
type values [maxLabels]string

// Meter has the counts of one appliance. Meter is safe for concurrent use. The methods of a nil
// Meter do nothing, for tests and for the measurement of what counting costs.
type Meter struct {
	registry   *prometheus.Registry
	counters   map[*Series]family[prometheus.Counter]
	histograms map[*Series]family[prometheus.Observer]

	sources   []func(*Sample)
	gathering sync.Mutex // one collection at a time; guards the fields below
	gathered  []*dto.MetricFamily
	at        time.Time // of the last collection
}

// family has the counters of a series. All of them exist from the start, so that the map is never
// written, and a rate begins at zero. The vector makes the one for Other when an act needs it.
type family[T any] struct {
	known  map[values]T
	others interface{ WithLabelValues(...string) T }
}

// get returns the counter for the values of the labels.
func (f family[T]) get(s *Series, labels []string) T {
	v := s.at(labels)
	if c, ok := f.known[v]; ok {
		return c
	}
	return f.others.WithLabelValues(v[:len(s.Labels)]...)
}

// familyOf makes the counters of a series by its vector.
func familyOf[T any](s *Series, vector interface{ WithLabelValues(...string) T }) family[T] {
	f := family[T]{known: map[values]T{}, others: vector}
	for _, v := range s.combinations() {
		f.known[v] = vector.WithLabelValues(v[:len(s.Labels)]...)
	}
	return f
}

// counted are the counters of acts. The other counters are read from states.
var counted = []*Series{Requests, Refusals, Replays, RateLimited, Handshakes, Commits, Spans, MessagesDropped}

// New returns a Meter. version is the version of the program.
func New(version string) *Meter {
	m := &Meter{
		registry:   prometheus.NewRegistry(),
		counters:   map[*Series]family[prometheus.Counter]{},
		histograms: map[*Series]family[prometheus.Observer]{},
	}
	for _, s := range All {
		switch {
		case s.Kind == Histogram:
			vec := prometheus.NewHistogramVec(prometheus.HistogramOpts{
				Name: s.Name, Help: s.Help, Buckets: s.buckets,
				NativeHistogramBucketFactor:     1.1,
				NativeHistogramMaxBucketNumber:  100,
				NativeHistogramMinResetDuration: time.Hour,
			}, s.names())
			m.registry.MustRegister(vec)
			m.histograms[s] = familyOf[prometheus.Observer](s, vec)
		case slices.Contains(counted, s):
			vec := prometheus.NewCounterVec(prometheus.CounterOpts{Name: s.Name, Help: s.Help}, s.names())
			m.registry.MustRegister(vec)
			m.counters[s] = familyOf[prometheus.Counter](s, vec)
		}
	}
	m.registry.MustRegister(collector{m}, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	m.Source(func(s *Sample) { s.Set(Build, 1, version, runtime.Version()) })
	return m
}

// names returns the names of the labels.
func (s *Series) names() (names []string) {
	for _, l := range s.Labels {
		names = append(names, l.Name)
	}
	return names
}

// combinations returns all values of the labels of a series with fixed values, without Other.
func (s *Series) combinations() []values {
	all := []values{{}}
	for i, l := range s.Labels {
		var longer []values
		for _, v := range all {
			for _, value := range l.Values {
				v[i] = value
				longer = append(longer, v)
			}
		}
		all = longer
	}
	return all
}

// Add counts an act.
func (m *Meter) Add(s *Series, labels ...string) {
	if m != nil {
		m.counters[s].get(s, labels).Inc()
	}
}

// AddSome counts acts.
func (m *Meter) AddSome(s *Series, n int, labels ...string) {
	if m != nil {
		m.counters[s].get(s, labels).Add(float64(n))
	}
}

// Observe counts an act with its size, in the unit of the series.
func (m *Meter) Observe(s *Series, size float64, labels ...string) {
	if m != nil {
		m.histograms[s].get(s, labels).Observe(size)
	}
}

// Count returns the sum of the counters of a series. Labels that are given select counters, and an
// empty label selects all.
func (m *Meter) Count(s *Series, labels ...string) (sum float64) {
	if m == nil {
		return 0
	}
	all := make(chan prometheus.Metric)
	go func() {
		m.counters[s].others.(prometheus.Collector).Collect(all)
		close(all)
	}()
	for each := range all {
		var read dto.Metric
		if each.Write(&read) == nil && s.selects(labels, read.Label) {
			sum += read.Counter.GetValue()
		}
	}
	return sum
}

// selects reports whether the values of a counter's labels are those of labels.
func (s *Series) selects(labels []string, has []*dto.LabelPair) bool {
	for i, want := range labels {
		if want != "" && !slices.ContainsFunc(has, func(l *dto.LabelPair) bool {
			return l.GetName() == s.Labels[i].Name && l.GetValue() == want
		}) {
			return false
		}
	}
	return true
}

// at returns the values of labels, with Other for each value that the series does not have.
func (s *Series) at(labels []string) (v values) {
	for i, l := range s.Labels {
		if v[i] = labels[i]; l.Values != nil && !slices.Contains(l.Values, v[i]) {
			v[i] = Other
		}
	}
	return v
}

// Source adds a source of states. Source must not be called after the first scrape.
func (m *Meter) Source(read func(*Sample)) {
	if m != nil {
		m.sources = append(m.sources, read)
	}
}

// Sample collects states for one scrape.
type Sample struct {
	series map[*Series]map[values]float64
	names  map[*Series][maxLabels][]string // of the configuration
}

// Set sets the value of a state. A second value of the same labels is added, as for Other.
func (s *Sample) Set(of *Series, value float64, labels ...string) {
	at := of.at(labels)
	names := s.names[of]
	for i, l := range of.Labels {
		if l.Values != nil || slices.Contains(names[i], at[i]) {
			continue
		}
		if len(names[i]) >= l.Most {
			at[i] = Other
			continue
		}
		names[i] = append(names[i], at[i])
	}
	s.names[of] = names
	if s.series[of] == nil {
		s.series[of] = map[values]float64{}
	}
	s.series[of][at] += value
}

// SetAll sets one value for each fixed value of the only label. A missing count is zero.
func (s *Sample) SetAll(of *Series, counts map[string]int) {
	for _, value := range of.Labels[0].Values {
		s.Set(of, 0, value)
	}
	for value, n := range counts {
		s.Set(of, float64(n), value)
	}
}

// collector reads the sources for client_golang.
type collector struct{ *Meter }

// Describe sends nothing: the registry then checks each value by itself.
func (c collector) Describe(chan<- *prometheus.Desc) {}

// Collect sends the present states.
func (c collector) Collect(out chan<- prometheus.Metric) {
	sample := &Sample{series: map[*Series]map[values]float64{}, names: map[*Series][maxLabels][]string{}}
	for _, read := range c.sources {
		read(sample)
	}
	for s, all := range sample.series {
		kind := prometheus.GaugeValue
		if s.Kind == Counter {
			kind = prometheus.CounterValue
		}
		desc := prometheus.NewDesc(s.Name, s.Help, s.names(), nil)
		for v, value := range all {
			out <- prometheus.MustNewConstMetric(desc, kind, value, v[:len(s.Labels)]...)
		}
	}
}

// formats are the served formats. A client that accepts all of them gets the first.
var formats = func() []expfmt.Format {
	openMetrics := slices.DeleteFunc(expfmt.DefaultOpenMetricsAcceptedFormats(), func(f expfmt.Format) bool {
		return f.FormatType() != expfmt.TypeOpenMetrics
	})
	text, protobuf := expfmt.NewFormat(expfmt.TypeTextPlain), expfmt.NewFormat(expfmt.TypeProtoDelim)
	return append([]expfmt.Format{text, protobuf}, openMetrics...)
}()

// Expose returns all series in the format that a scraper asks for by the header Accept: Prometheus'
// text by default, OpenMetrics, or Prometheus' protobuf, the only format with native histograms.
func (m *Meter) Expose(accept string) (contentType string, body []byte, err error) {
	return m.expose(accept, 0)
}

// ExposeShared is Expose for callers without a session, who share one collection a second.
func (m *Meter) ExposeShared(accept string) (contentType string, body []byte, err error) {
	return m.expose(accept, collectEvery)
}

// expose is Expose with a collection that may have an age.
func (m *Meter) expose(accept string, age time.Duration) (contentType string, body []byte, err error) {
	if m == nil {
		return string(expfmt.NewFormat(expfmt.TypeTextPlain)), nil, nil
	}
	families, _, err := m.gather(age)
	if err != nil {
		return "", nil, fmt.Errorf("metrics: %w", err)
	}
	format := expfmt.NegotiateAccept(http.Header{"Accept": {accept}}, formats...)
	var out bytes.Buffer
	encoder := expfmt.NewEncoder(&out, format)
	for _, f := range families {
		if err := encoder.Encode(f); err != nil {
			return "", nil, fmt.Errorf("metrics: %s: %w", f.GetName(), err)
		}
	}
	if closer, ok := encoder.(expfmt.Closer); ok { // OpenMetrics ends with a line of its own
		if err := closer.Close(); err != nil {
			return "", nil, fmt.Errorf("metrics: %w", err)
		}
	}
	return string(format), out.Bytes(), nil
}

// gather collects all series, or returns a collection that is not older than age, with its time.
func (m *Meter) gather(age time.Duration) ([]*dto.MetricFamily, time.Time, error) {
	if m == nil {
		return nil, time.Time{}, errors.New("nothing is counted")
	}
	m.gathering.Lock()
	defer m.gathering.Unlock()
	if age > 0 && m.gathered != nil && time.Since(m.at) < age {
		return m.gathered, m.at, nil
	}
	at := time.Now()
	families, err := m.registry.Gather()
	if err != nil {
		return nil, at, err
	}
	m.gathered, m.at = families, at
	return families, at, nil
}

// collectEvery is the time between two collections for callers without a sign-in, who could
// otherwise take a processor with them.
const collectEvery = time.Second

// Handler serves GET /metrics without a session, for a loopback address. The name of the host must
// be an address or localhost: a page of a browser could otherwise read the metrics by DNS
// rebinding.
func (m *Meter) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, r *http.Request) {
		if !loopbackHost(r.Host) {
			http.Error(w, "this address serves metrics to this machine only", http.StatusForbidden)
			return
		}
		contentType, body, err := m.ExposeShared(strings.Join(r.Header.Values("Accept"), ","))
		if err != nil {
			http.Error(w, "the metrics can't be read now", http.StatusServiceUnavailable)
			return
		}
		w.Header().Set("Content-Type", contentType)
		w.Header().Set("Cache-Control", "no-store")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Write(body)
	})
	return mux
}
