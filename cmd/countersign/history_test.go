package main

import (
	"strings"
	"testing"

	"countersign/admin/api"
)

// TestSparkline draws values, gaps and peaks.
func TestSparkline(t *testing.T) {
	of := func(values ...float32) (all []*float32) {
		for _, v := range values {
			if v < -100 {
				all = append(all, nil)
				continue
			}
			all = append(all, &v)
		}
		return all
	}
	const gap = -1000
	peak := make([]float32, 10*sparkWidth)
	peak[55] = 1
	for _, c := range []struct {
		values []*float32
		line   string
	}{
		{nil, ""}, {of(0, 0), "▁▁"}, {of(gap, gap), "··"}, {of(0, 1, 2, 4, gap, 8), "▁▂▃▅·█"}, {of(-1, -2), "▁▁"},
		{of(peak...), "▁▁▁▁▁█" + strings.Repeat("▁", sparkWidth-6)},
	} {
		if got := sparkline(c.values); got != c.line {
			t.Errorf("%d values: %s, want %s", len(c.values), got, c.line)
		}
	}
}

// TestHistoryCSV writes a gap as an empty field.
func TestHistoryCSV(t *testing.T) {
	half := float32(.5)
	h := api.History{Since: 1_800_000_000, Step: 60, Measured: []int64{60, 0}, Series: []api.HistorySeries{
		{Series: api.Series{Name: "a"}, Values: []*float32{&half, nil}},
	}}
	var out strings.Builder
	want := "time,measured,a\n2027-01-15T08:00:00Z,60,0.5\n2027-01-15T08:01:00Z,0,\n"
	if err := writeCSV(&out, h); err != nil || out.String() != want {
		t.Errorf("%v, %s", err, &out)
	}
}

// TestStreamedLine: nothing that the appliance sends makes the tool panic, and a document that is
// none is an error.
func TestStreamedLine(t *testing.T) {
	for _, topic := range append([]string{api.TopicGap, api.TopicEnd, "another", ""}, api.Topics...) {
		for data, ok := range map[string]bool{"{}": true, "null": true, "[]": false, "": false, `{"index":-1}`: false} {
			_, err := streamedLine(api.Streamed{Topic: topic, Data: []byte(data)})
			if err == nil && !ok && data != `{"index":-1}` {
				t.Errorf("%s %q was taken", topic, data)
			}
		}
	}
}
