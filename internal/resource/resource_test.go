package resource

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign/audit"
)

var disk = Resource{Name: "ledger", Away: audit.DeviceUnavailable, Back: audit.DeviceRecovered, Lost: "it is away", Found: "it is back"}

// TestMonitor: each change is one event and one line, in order; what comes before the start or while
// the disk takes nothing is written later, and never more than two events of a resource wait.
func TestMonitor(t *testing.T) {
	var lines strings.Builder
	m := NewMonitor(slog.New(slog.NewTextHandler(&lines, nil)), time.Minute)
	token := Resource{Name: "main", Away: audit.DeviceUnavailable, Back: audit.DeviceRecovered}
	ctx := t.Context()
	m.Report(ctx, token, false, errors.New("no worker"))
	m.Report(ctx, token, false, errors.New("still none"))
	m.Report(ctx, token, true, nil)
	var written []string
	var broken error
	backs := 0
	m.Start(ctx, func(_ context.Context, e audit.Event) error {
		if broken == nil {
			written = append(written, fmt.Sprint(e.Type, " ", e.Resource, " ", e.Outcome, " ", e.Metadata["cause"]))
		}
		return broken
	}, func() { backs++ })
	want := func(what string, events ...string) {
		t.Helper()
		if !slices.Equal(written, events) {
			t.Errorf("%s: %q, want %q", what, written, events)
		}
		written = nil
	}
	want("before the start", "DeviceUnavailable main unavailable no worker", "DeviceRecovered main ok ")
	m.Check(ctx, disk, nil)
	want("a resource that is there")
	m.Check(ctx, disk, errors.New("full"))
	m.Check(ctx, disk, errors.New("full still"))
	want("once", "DeviceUnavailable ledger unavailable full")
	broken = errors.New("no room")
	for n := range 5 { // back, away, back, away, back
		m.Check(ctx, disk, map[bool]error{false: errors.New("full again")}[n%2 == 0])
	}
	want("nothing is taken")
	broken = nil
	m.Flush(ctx)
	want("later", "DeviceRecovered ledger ok ")
	if backs != 3 {
		t.Errorf("%d times it is said that something is back", backs)
	}
	counter := Resource{Name: "counter", Lost: "no counter"}
	m.Check(ctx, counter, errors.New("gone"))
	m.Check(ctx, counter, errors.New("gone"))
	want("a resource without events")
	for text, n := range map[string]int{"it is away": 3, "it is back": 3, "no counter": 1} {
		if got := strings.Count(lines.String(), text); got != n {
			t.Errorf("the log says %q %d times, want %d", text, got, n)
		}
	}
}
