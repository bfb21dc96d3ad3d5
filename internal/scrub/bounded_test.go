package scrub

import (
	"errors"
	"log/slog"
	"strings"
	"testing"
)

// TestLineIsBounded writes values of every kind with many bytes, and sees that a line has at
// most maxText bytes of each, and that shorter values stay as they are.
func TestLineIsBounded(t *testing.T) {
	var out strings.Builder
	log := slog.New(new(Scrubber).Handler(slog.NewTextHandler(&out, nil)))
	long := strings.Repeat("x", 100_000)
	log.Info(long, "err", errors.New(long), "key", long, "any", struct{ Text string }{long}, "bytes", []string{long})
	if n := out.Len(); n > 6*maxText || strings.Count(out.String(), "…") != 5 {
		t.Errorf("a line of %d bytes: %.200s", n, out.String())
	}
	out.Reset()
	log.Info("refused", "err", errors.New("why"), "n", 5, "key", strings.Repeat("x", maxText))
	if want := `msg=refused err=why n=5 key=` + long[:maxText] + "\n"; !strings.HasSuffix(out.String(), want) {
		t.Errorf("%s", out.String())
	}
}
