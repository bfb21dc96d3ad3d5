package meter

import (
	"math"
	"time"

	dto "github.com/prometheus/client_model/go"
)

// Reading has the values of all series at one time, for readers inside the daemon. A Reading does
// not change.
type Reading struct {
	At       time.Time // has the monotonic clock
	families map[string]*dto.MetricFamily
}

// Read collects all series, or returns a collection that is not older than age.
func (m *Meter) Read(age time.Duration) (*Reading, error) {
	families, at, err := m.gather(age)
	if err != nil {
		return nil, err
	}
	r := &Reading{At: at, families: make(map[string]*dto.MetricFamily, len(families))}
	for _, f := range families {
		r.families[f.GetName()] = f
	}
	return r, nil
}

// Sum returns the sum of the time series of a family, by its name in Prometheus, that have some
// labels: names and values in turn. ok is false if there is no such time series.
func (r *Reading) Sum(family string, labels ...string) (sum float64, ok bool) {
	for _, each := range r.families[family].GetMetric() {
		if !has(each, labels) {
			continue
		}
		ok = true
		switch { // at the most one is there
		case each.Counter != nil:
			sum += each.Counter.GetValue()
		case each.Gauge != nil:
			sum += each.Gauge.GetValue()
		}
	}
	return sum, ok
}

func has(m *dto.Metric, labels []string) bool {
	for i := 0; i+1 < len(labels); i += 2 {
		found := false
		for _, l := range m.GetLabel() {
			found = found || l.GetName() == labels[i] && l.GetValue() == labels[i+1]
		}
		if !found {
			return false
		}
	}
	return true
}

// Distribution is a histogram by its classic buckets.
type Distribution struct {
	Bounds []float64 // upper bounds of the buckets, increasing, without infinity
	Counts []float64 // observations up to each bound; the last one, behind the bounds, is all of them
}

// Distribution returns the sum of the histograms of a family that have some labels.
func (r *Reading) Distribution(family string, labels ...string) (d Distribution, ok bool) {
	for _, each := range r.families[family].GetMetric() {
		h := each.GetHistogram()
		if h == nil || !has(each, labels) {
			continue
		}
		if !ok {
			ok = true
			for _, b := range h.GetBucket() {
				if !math.IsInf(b.GetUpperBound(), 1) {
					d.Bounds = append(d.Bounds, b.GetUpperBound())
				}
			}
			d.Counts = make([]float64, len(d.Bounds)+1)
		}
		for i := range d.Bounds { // of one family, so of equal bounds
			d.Counts[i] += float64(h.GetBucket()[i].GetCumulativeCount())
		}
		d.Counts[len(d.Bounds)] += float64(h.GetSampleCount())
	}
	return d, ok
}

// Since returns the observations since an earlier distribution of the same family. ok is false if
// the two do not fit, as after a reset.
func (d Distribution) Since(before Distribution) (since Distribution, ok bool) {
	if len(before.Counts) != len(d.Counts) {
		return Distribution{}, false
	}
	since = Distribution{Bounds: d.Bounds, Counts: make([]float64, len(d.Counts))}
	for i := range d.Counts {
		if since.Counts[i] = d.Counts[i] - before.Counts[i]; since.Counts[i] < 0 {
			return Distribution{}, false
		}
	}
	return since, true
}

// Quantile returns the value below which the share q of the observations is, with a straight line
// inside a bucket. A value above the last bound is told as the last bound. Without observations the
// result is NaN.
func (d Distribution) Quantile(q float64) float64 {
	if len(d.Bounds) == 0 || d.Counts[len(d.Bounds)] == 0 {
		return math.NaN()
	}
	rank := q * d.Counts[len(d.Bounds)]
	low, below := 0.0, 0.0
	for i, bound := range d.Bounds {
		if d.Counts[i] >= rank && d.Counts[i] > below {
			return low + (bound-low)*(rank-below)/(d.Counts[i]-below)
		}
		low, below = bound, d.Counts[i]
	}
	return d.Bounds[len(d.Bounds)-1]
}
