package main

import (
	"errors"
	"log/slog"
	"strings"
	"testing"
)

// TestLogLineIsBounded writes values of every kind with many bytes, and sees that a line has at
// most maxLogText bytes of each, and that shorter values stay as they are.
func TestLogLineIsBounded(t *testing.T) {
	var out strings.Builder
	log := slog.New(slog.NewTextHandler(&out, logOptions(slog.LevelInfo)))
	long := strings.Repeat("x", 100_000)
	log.Info(long, "err", errors.New(long), "key", long, "any", struct{ Text string }{long}, "bytes", []string{long})
	if n := out.Len(); n > 6*maxLogText || strings.Count(out.String(), "…") != 5 {
		t.Errorf("a line of %d bytes: %.200s", n, out.String())
	}
	out.Reset()
	log.Info("refused", "err", errors.New("why"), "n", 5, "key", strings.Repeat("x", maxLogText))
	if want := `msg=refused err=why n=5 key=` + long[:maxLogText] + "\n"; !strings.HasSuffix(out.String(), want) {
		t.Errorf("%s", out.String())
	}
}
