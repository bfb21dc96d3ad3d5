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

var disk = Resource{
	Name: "ledger", Failed: audit.DeviceUnavailable, Recovered: audit.DeviceRecovered,
	FailedText: "it is down", RecoveredText: "it is up",
}

// TestMonitor: each transition is one event and one line of the log, in order. The events of
// transitions before Start, and while the disk takes no writes, are written later. At most two
// events of a resource are pending.
func TestMonitor(t *testing.T) {
	var lines strings.Builder
	m := NewMonitor(slog.New(slog.NewTextHandler(&lines, nil)), time.Minute)
	token := Resource{Name: "main", Failed: audit.DeviceUnavailable, Recovered: audit.DeviceRecovered}
	ctx := t.Context()
	m.Report(ctx, token, false, errors.New("no worker"))
	m.Report(ctx, token, false, errors.New("still none"))
	m.Report(ctx, token, true, nil)
	var written []string
	var broken error
	recoveries := 0
	m.Start(ctx, func(_ context.Context, e audit.Event) error {
		if broken == nil {
			written = append(written, fmt.Sprint(e.Type, " ", e.Resource, " ", e.Outcome, " ", e.Metadata["cause"]))
		}
		return broken
	}, func() { recoveries++ })
	want := func(what string, events ...string) {
		t.Helper()
		if !slices.Equal(written, events) {
			t.Errorf("%s: %q, want %q", what, written, events)
		}
		written = nil
	}
	want("before the start", "DeviceUnavailable main unavailable no worker", "DeviceRecovered main ok ")
	m.Check(ctx, disk, nil)
	want("a resource that is up already")
	m.Check(ctx, disk, errors.New("full"))
	m.Check(ctx, disk, errors.New("full still"))
	want("a second report of the same failure", "DeviceUnavailable ledger unavailable full")
	broken = errors.New("no room")
	for n := range 5 { // up, down, up, down, up
		m.Check(ctx, disk, map[bool]error{false: errors.New("full again")}[n%2 == 0])
	}
	want("the disk takes no writes")
	broken = nil
	m.Flush(ctx)
	want("later", "DeviceRecovered ledger ok ")
	if recoveries != 3 {
		t.Errorf("%d recoveries are reported, want 3", recoveries)
	}
	counter := Resource{Name: "counter", FailedText: "no counter"}
	m.Check(ctx, counter, errors.New("gone"))
	m.Check(ctx, counter, errors.New("gone"))
	want("a resource without events")
	for text, n := range map[string]int{"it is down": 3, "it is up": 3, "no counter": 1} {
		if got := strings.Count(lines.String(), text); got != n {
			t.Errorf("the log says %q %d times, want %d", text, got, n)
		}
	}
}
