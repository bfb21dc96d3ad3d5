package anchor

import (
	"testing"
	"time"
)

// TestCounterIsDue: an increment is due after the interval if there was an admission, and sooner
// after many admissions, but not within leastInterval.
func TestCounterIsDue(t *testing.T) {
	a := Config{Interval: time.Hour, Admissions: 100}
	for _, c := range []struct {
		admitted uint64
		since    time.Duration
		due      bool
	}{
		{0, 48 * time.Hour, false},
		{1, time.Hour - 1, false},
		{1, time.Hour, true},
		{99, leastInterval, false},
		{100, leastInterval, true},
		{1_000_000, leastInterval - 1, false},
	} {
		if got := a.due(c.admitted, c.since); got != c.due {
			t.Errorf("%d admissions, %v: %v", c.admitted, c.since, got)
		}
	}
}
