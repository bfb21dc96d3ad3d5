package ledger_test

import (
	"errors"
	"fmt"
	"math/big"
	"math/rand/v2"
	"testing"
	"time"

	"countersign/internal/ledger"
)

// TestWindowsAreExact compares the windows of four series with a list of all admissions, through
// restarts and idle months. The steps of the time fall on the edges of the windows.
func TestWindowsAreExact(t *testing.T) {
	type entry struct {
		at  time.Time
		add *big.Int
	}
	m := newMachine(t, ledger.Options{MaxLifetime: 48 * time.Hour})
	l := m.open(t)
	all := map[string][]entry{}
	random := rand.New(rand.NewPCG(3, 4))
	steps := append([]time.Duration{0, 0, 0, time.Nanosecond, time.Second}, ledger.Windows[:]...)
	huge, _ := new(big.Int).SetString("79228162514264337593543950335000000000000000000000000000", 10)
	for n := range 1500 {
		step := steps[random.IntN(len(steps))]
		if random.IntN(4) == 0 {
			step -= time.Nanosecond
		}
		m.pass(max(0, step))
		now := m.options.Wall()
		series, add := fmt.Sprint("series ", random.IntN(4)), big.NewInt(int64(random.IntN(1000)))
		if random.IntN(3) == 0 {
			add = huge
		}
		refuse := random.IntN(5) == 0
		a := m.admission(0, time.Hour)
		a.Nonce = [32]byte{byte(n), byte(n >> 8)}
		a.Counts = countIn(ledger.Count{Series: series, Add: add})
		var got ledger.Used
		a.Decide = func(used []ledger.Used) ([]byte, error) {
			if got = used[0]; refuse {
				return nil, errSpent
			}
			return nil, nil
		}
		verdict := ledger.Fresh
		if refuse {
			verdict = ledger.Denied
		}
		mustAdmit(t, l, a, verdict)
		for i, length := range ledger.Windows {
			want := new(big.Int).Set(add)
			for _, e := range all[series] {
				if e.at.After(now.Add(-length)) {
					want.Add(want, e.add)
				}
			}
			if got[i].Cmp(want) != 0 {
				t.Fatalf("step %d: %v of %s has %v, want %v", n, length, series, got[i], want)
			}
		}
		if !refuse {
			all[series] = append(all[series], entry{now, add})
		}
		switch random.IntN(40) {
		case 0:
			if _, err := l.Sweep(t.Context(), 0, 0); err != nil {
				t.Fatal(err)
			}
		case 1:
			l.Close()
			l = m.open(t)
		}
	}
}

// TestIdleSeriesGo checks that totals before the longest window are removed: those of a growing
// series by its admissions, those of an idle series by Sweep. Other totals stay.
func TestIdleSeriesGo(t *testing.T) {
	m := newMachine(t, ledger.Options{MaxLifetime: 48 * time.Hour})
	l := m.open(t)
	n := 0
	admit := func(series string) {
		t.Helper()
		n++
		a := m.admission(0, time.Hour)
		a.Nonce = [32]byte{byte(n), byte(n >> 8)}
		a.Counts = countIn(ledger.Count{Series: series, Add: big.NewInt(1)})
		a.Decide = func([]ledger.Used) ([]byte, error) { return nil, nil }
		mustAdmit(t, l, a, ledger.Fresh)
		m.pass(time.Hour)
	}
	for range 1000 { // 41 days
		admit("busy")
	}
	if got := l.Totals(); got < 720 || got > 723 {
		t.Errorf("a series of 1,000 hours has %d totals, want those of 30 days", got)
	}
	for i := range 300 {
		admit(fmt.Sprint("idle ", i%3))
	}
	m.pass(29 * 24 * time.Hour)
	admit("young")
	m.pass(2 * 24 * time.Hour)
	for more, round := true, 0; more; round++ {
		var err error
		if more, err = l.Sweep(t.Context(), 0, 0); err != nil || round > 20 {
			t.Fatal(round, err)
		}
	}
	if got := l.Totals(); got != 1 {
		t.Errorf("%d totals are left, want that of the young series", got)
	}
	if got := counter(t, l, "young"); got != "0" { // the admission is more than 24 hours ago
		t.Errorf("the young series has %s, want 0", got)
	}
}

// TestMonotonic checks that a number which is not higher is denied, also after a restart and for
// another request. A repetition is not checked again, and a denied request does not raise the
// number.
func TestMonotonic(t *testing.T) {
	l, path := create(t)
	with := func(nonce byte, series string, to uint64) ledger.Admission {
		a := admission("k", nonce, nonce, 1)
		a.Monotonic = &ledger.Monotonic{Series: series, Value: to}
		a.Decide = func([]ledger.Used) ([]byte, error) { return nil, nil }
		return a
	}
	mustAdmit(t, l, with(1, "a", 0), ledger.Fresh)
	for n, to := range []uint64{0, 0, 5} {
		verdict := ledger.Denied
		if to > 0 {
			verdict = ledger.Fresh
		}
		got := mustAdmit(t, l, with(byte(10+n), "a", to), verdict)
		if verdict == ledger.Denied && !errors.Is(got.Denial, ledger.ErrNotHigher) {
			t.Error(got.Denial)
		}
	}
	l.Close()
	l = open(t, path)
	mustAdmit(t, l, with(1, "a", 0), ledger.Repeated)
	mustAdmit(t, l, with(20, "a", 5), ledger.Denied)
	mustAdmit(t, l, with(20, "b", 1), ledger.Fresh)
	refused := with(21, "a", 9)
	refused.Decide = func([]ledger.Used) ([]byte, error) { return nil, errSpent }
	mustAdmit(t, l, refused, ledger.Denied)
	mustAdmit(t, l, with(22, "a", 6), ledger.Fresh) // the denied request has not raised the number
}

// TestDecisions checks that the records of admissions and denials are stored with their events, and
// that Sweep removes them by their time.
func TestDecisions(t *testing.T) {
	m := newMachine(t, ledger.Options{MaxLifetime: 48 * time.Hour})
	l := m.open(t)
	var events []uint64
	for n := range 10 {
		a := m.admission(byte(n), time.Hour)
		verdict := ledger.Fresh
		a.Decide = func([]ledger.Used) ([]byte, error) {
			if n%2 == 1 {
				return fmt.Append(nil, n), errSpent
			}
			return fmt.Append(nil, n), nil
		}
		if n%2 == 1 {
			verdict = ledger.Denied
		}
		events = append(events, mustAdmit(t, l, a, verdict).Event)
		if _, err := l.Append(t.Context(), note("between")); err != nil {
			t.Fatal(err)
		}
		m.pass(time.Minute)
	}
	read := func(from uint64, since int64) (got string) {
		err := l.Decisions(from, since, func(d ledger.Decision) bool {
			got += string(d.Record)
			return len(got) < 8
		})
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	begin := m.options.Wall().Add(-10 * time.Minute).UnixMilli()
	for _, c := range []struct {
		from  uint64
		since int64
		want  string
	}{
		{0, 0, "01234567"}, {events[4], 0, "456789"}, {events[9] + 1, 0, ""},
		{0, begin + 180_000, "3456789"}, {0, begin + 180_001, "456789"}, {0, begin + 99*60_000, ""},
	} {
		if got := read(c.from, c.since); got != c.want {
			t.Errorf("from %d since %d: %s, want %s", c.from, c.since, got, c.want)
		}
	}
	d, err := l.Decision(events[3])
	if err != nil || string(d.Record) != "3" || d.Event != events[3] || d.TimeMS != begin+180_000 {
		t.Errorf("%+v, %v", d, err)
	}
	if _, err := l.Decision(events[3] + 1); !errors.Is(err, ledger.ErrNotFound) {
		t.Error(err)
	}
	if _, err := l.Sweep(t.Context(), 0, begin+240_000); err != nil {
		t.Fatal(err)
	}
	if got := read(0, 0); got != "456789" {
		t.Errorf("after retention: %s", got)
	}
}
