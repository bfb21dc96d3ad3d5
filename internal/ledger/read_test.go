package ledger_test

import (
	"testing"

	"countersign/audit"
	"countersign/internal/ledger"
)

// TestRead reads the log in parts of each size. Each event is in one part, or of another type, and
// none is behind the end.
func TestRead(t *testing.T) {
	m := newMachine(t, ledger.Options{})
	l := m.open(t)
	add := func(n int, e audit.Event) {
		for range n {
			if _, err := l.Append(t.Context(), ledger.EventOf(e)); err != nil {
				t.Fatal(err)
			}
		}
	}
	add(40, audit.NewStarted())
	for range 5 {
		add(1, audit.NewStopped())
		add(3, audit.NewStarted())
	}
	end := l.End()
	var want []uint64
	if err := l.Events(0, func(index uint64, b []byte) bool {
		if e, err := audit.Decode(b); err != nil || audit.TypeOf(b) != e.Type {
			t.Errorf("%s: %q, %v", b, audit.TypeOf(b), err)
		} else if e.Type == audit.Stopped {
			want = append(want, index)
		}
		return true
	}); err != nil || len(want) != 5 {
		t.Fatalf("%v, %v", want, err)
	}
	stopped := func(t audit.Type) bool { return t == audit.Stopped }
	for _, p := range []ledger.Part{
		{Events: 1, Bytes: 1, Look: 1}, {Events: 1, Bytes: 1 << 20, Look: 100}, {Events: 2, Bytes: 1 << 20, Look: 7},
		{Events: 100, Bytes: 1, Look: 1000}, {Events: 100, Bytes: 1 << 20, Look: 1000},
	} {
		p.Wants = stopped
		var got []uint64
		next := uint64(0)
		for next < end {
			f, err := l.Read(next, end, p)
			if err != nil || f.After <= next || f.After > end || f.Dropped != 0 || len(f.Events) > p.Events {
				t.Fatalf("%+v: %+v, %v", p, f, err)
			}
			for _, e := range f.Events {
				if got = append(got, e.Index); e.Event.Type != audit.Stopped || e.Index < next || e.Index >= f.After {
					t.Errorf("%+v: event %+v", p, e)
				}
			}
			next = f.After
		}
		if len(got) != len(want) || got[4] != want[4] || got[0] != want[0] {
			t.Errorf("%+v: %v, want %v", p, got, want)
		}
		if f, err := l.Read(want[4], want[4], p); err != nil || f.After != want[4] || len(f.Events) != 0 {
			t.Errorf("an empty part: %+v, %v", f, err)
		}
	}
}
