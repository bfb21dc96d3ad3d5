package meter_test

import (
	"math"
	"testing"

	"countersign/internal/meter"
)

// TestReading reads sums by their labels, and quantiles between two readings.
func TestReading(t *testing.T) {
	m := meter.New("test")
	m.Source(func(s *meter.Sample) { s.Set(meter.TokenUp, 1, "a"); s.Set(meter.TokenUp, 1, "b") })
	before, err := m.Read(0)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		m.Add(meter.Requests, "sign", "ok")
		size := .0004 // in the bucket from .00025 to .0005
		if i >= 90 {
			size = 100 // above all bounds
		}
		m.Observe(meter.RequestSeconds, size, "sign")
	}
	m.Add(meter.Requests, "verify", "refused")
	r, err := m.Read(0)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		labels []string
		want   float64
		ok     bool
	}{
		{nil, 101, true}, {[]string{"op", "sign"}, 100, true}, {[]string{"result", "refused"}, 1, true},
		{[]string{"op", "sign", "result", "refused"}, 0, true}, {[]string{"op", "nothing"}, 0, false},
	} {
		if got, ok := r.Sum(meter.Requests.Name, c.labels...); got != c.want || ok != c.ok {
			t.Errorf("%q: %v, %v", c.labels, got, ok)
		}
	}
	if up, ok := r.Sum(meter.TokenUp.Name); up != 2 || !ok {
		t.Errorf("%v, %v", up, ok)
	}
	if _, ok := r.Sum("nothing"); ok {
		t.Error("there is a family nothing")
	}
	d, _ := r.Distribution(meter.RequestSeconds.Name, "op", "sign")
	old, _ := before.Distribution(meter.RequestSeconds.Name, "op", "sign")
	since, ok := d.Since(old)
	if !ok {
		t.Fatal("the two do not fit")
	}
	for _, c := range []struct{ q, low, high float64 }{{.5, .00025, .0005}, {.89, .00025, .0005}, {.99, 15, 15}} {
		if got := since.Quantile(c.q); got < c.low || got > c.high {
			t.Errorf("p%v is %v", 100*c.q, got)
		}
	}
	if _, ok := old.Since(d); ok {
		t.Error("a distribution has shrunk")
	}
	if nothing, ok := d.Since(d); !ok || !math.IsNaN(nothing.Quantile(.5)) {
		t.Error("there is a quantile of nothing")
	}
}
