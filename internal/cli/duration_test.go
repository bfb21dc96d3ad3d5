package cli

import (
	"testing"
	"time"
)

// TestFormatDuration writes durations in the shortest form, which ParseDuration reads back.
func TestFormatDuration(t *testing.T) {
	for want, d := range map[string]time.Duration{
		"0s": 0, "90ms": 90 * time.Millisecond, "30s": 30 * time.Second, "1m30s": 90 * time.Second,
		"10m": 10 * time.Minute, "20h": 20 * time.Hour, "1h30m": 90 * time.Minute, "1h0m5s": time.Hour + 5*time.Second,
		"1d": 24 * time.Hour, "25h": 25 * time.Hour, "90d": 90 * 24 * time.Hour,
	} {
		got := FormatDuration(d)
		back, err := ParseDuration(got)
		if got != want || back != d || err != nil {
			t.Errorf("%d: %q, want %q; read back as %v, %v", d, got, want, back, err)
		}
	}
}
