package ledger_test

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"countersign/internal/ledger"
	"countersign/internal/ledger/ledgertest"
)

// machine has a ledger and two simulated clocks.
type machine struct {
	path    string
	options ledger.Options

	mu      sync.Mutex
	wall    time.Time     // the system's clock, which can be set
	elapsed time.Duration // the monotonic clock
}

// inMemory returns a folder in memory for a ledger with many commits, or a folder on disk if the
// machine has no /dev/shm.
func inMemory(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "ledger")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

const tolerance = 2 * time.Minute

func newMachine(t *testing.T, o ledger.Options) *machine {
	t.Helper()
	m := &machine{
		path: filepath.Join(inMemory(t), "ledger.db"), options: o,
		wall: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC),
	}
	m.options.Wall = func() time.Time { m.mu.Lock(); defer m.mu.Unlock(); return m.wall }
	m.options.Elapsed = func() time.Duration { m.mu.Lock(); defer m.mu.Unlock(); return m.elapsed }
	if err := ledger.Create(m.path, m.options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { checkFile(t, m.path) })
	return m
}

func (m *machine) open(t *testing.T) *ledger.Ledger {
	t.Helper()
	l, err := ledgertest.Open(t, m.path, m.options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// pass moves both clocks forward: time passes.
func (m *machine) pass(d time.Duration) {
	m.mu.Lock()
	m.wall, m.elapsed = m.wall.Add(d), m.elapsed+d
	m.mu.Unlock()
}

// step moves the system's clock only. NTP does so, and a suspended or paused machine has the same
// effect.
func (m *machine) step(d time.Duration) { m.mu.Lock(); m.wall = m.wall.Add(d); m.mu.Unlock() }

// admission returns an admission that expires after lifetime, by the system's clock.
func (m *machine) admission(nonce byte, lifetime time.Duration) ledger.Admission {
	return ledger.Admission{Scope: "k", Nonce: [32]byte{nonce}, ExpiresAt: m.options.Wall().Add(lifetime).Unix()}
}

// wantTime compares the ledger's time.
func wantTime(t *testing.T, l *ledger.Ledger, want time.Time) {
	t.Helper()
	if got := l.Time(); !got.Equal(want) {
		t.Errorf("the ledger's time is %v, want %v", got.UTC(), want)
	}
}

// refused checks that an admission fails with an error.
func refused(t *testing.T, l *ledger.Ledger, a ledger.Admission, want error) {
	t.Helper()
	if r, err := l.Admit(t.Context(), a, event); !errors.Is(err, want) {
		t.Errorf("verdict %d, %v; want %v", r.Verdict, err, want)
	}
}

// TestTheClockIsReadAsItIs checks that the ledger's times have no monotonic reading. Go compares
// two times with such a reading by the monotonic clock, and then a step of the system's clock has
// no effect.
func TestTheClockIsReadAsItIs(t *testing.T) {
	l, _ := create(t)
	for range 2 {
		mustAdmit(t, l, admission("k", 1, 1, 1), 0)
		now, wall, err := l.Clock()
		if now != now.Round(0) || wall != wall.Round(0) || err != nil {
			t.Fatalf("%v, %v, %v", now, wall, err)
		}
	}
}

// TestStepBack sets the system's clock back. Within the tolerance admissions go on, and the
// ledger's time stands still. Beyond the tolerance admissions fail and write nothing, also after a
// restart, and other requests go on. Admissions work again when the clock has caught up.
func TestStepBack(t *testing.T) {
	m := newMachine(t, ledger.Options{})
	l := m.open(t)
	mark := m.wall
	mustAdmit(t, l, m.admission(1, time.Hour), ledger.Fresh)
	m.step(-tolerance)
	mustAdmit(t, l, m.admission(2, time.Hour), ledger.Fresh)
	wantTime(t, l, mark)
	m.step(-time.Second)
	for range 2 {
		before := l.Commits()
		refused(t, l, m.admission(3, time.Hour), ledger.ErrClock)
		mustAdmit(t, l, m.admission(1, time.Hour), ledger.Repeated) // a repetition is no admission
		if _, _, err := l.Clock(); !errors.Is(err, ledger.ErrClock) || l.Commits() != before {
			t.Errorf("%v, %d commits", err, l.Commits()-before)
		}
		if _, err := l.Append(t.Context(), note("clock refused")); err != nil {
			t.Error(err)
		}
		if s, err := l.Stats(); err != nil || s.BehindClock != -121 || s.Nonces != 2 {
			t.Errorf("%+v, %v", s, err)
		}
		wantTime(t, l, mark)
		l.Close()
		l = m.open(t)
	}
	m.pass(time.Second)
	mustAdmit(t, l, m.admission(3, time.Hour), ledger.Fresh)
	wantTime(t, l, mark)
	m.pass(tolerance + time.Minute)
	wantTime(t, l, mark.Add(time.Minute))
}

// TestStepForward sets the system's clock ahead. The ledger's time follows at 9/8 of real time, so
// a nonce is known for longer than the lifetime of its document.
func TestStepForward(t *testing.T) {
	m := newMachine(t, ledger.Options{})
	l := m.open(t)
	begin := m.wall
	long := m.admission(1, 7*24*time.Hour)
	mustAdmit(t, l, long, ledger.Fresh)
	m.step(365 * 24 * time.Hour)
	wantTime(t, l, begin)
	m.pass(8 * time.Hour)
	wantTime(t, l, begin.Add(9*time.Hour))
	for range 20 { // requests do not change the rate
		m.pass(8 * time.Hour)
		mustAdmit(t, l, long, 0)
	}
	wantTime(t, l, begin.Add(21*9*time.Hour))
	if r := mustAdmit(t, l, long, 0); r.Verdict != ledger.Repeated {
		t.Errorf("verdict %d after 7 days", r.Verdict)
	}
	m.step(-365 * 24 * time.Hour) // the clock is corrected
	wantTime(t, l, begin.Add(21*9*time.Hour))
	refused(t, l, m.admission(2, time.Hour), ledger.ErrClock)
	m.pass(21*time.Hour - tolerance) // the ledger's time is ahead by 21 times one hour
	mustAdmit(t, l, m.admission(2, time.Hour), ledger.Fresh)
}

// TestSuspend suspends the machine: the monotonic clock stands still. Afterwards the ledger's time
// is behind and catches up. Admissions go on meanwhile.
func TestSuspend(t *testing.T) {
	m := newMachine(t, ledger.Options{})
	l := m.open(t)
	begin := m.wall
	a := m.admission(1, time.Hour)
	mustAdmit(t, l, a, ledger.Fresh)
	m.step(3 * 24 * time.Hour)
	mustAdmit(t, l, a, ledger.Repeated) // expired by the system's clock
	mustAdmit(t, l, m.admission(2, time.Hour), ledger.Fresh)
	m.pass(24 * time.Hour)
	wantTime(t, l, begin.Add(27*time.Hour))
	if s, err := l.Stats(); err != nil || s.BehindClock != int64((3*24-3)*3600) || s.Nonces != 1 {
		t.Errorf("%+v, %v", s, err)
	}
	m.pass(23*24*time.Hour - time.Hour)
	if now, wall, _ := l.Clock(); !now.Before(wall) {
		t.Error("the ledger's time has caught up too early")
	}
	m.pass(time.Hour)
	wantTime(t, l, m.wall)
	m.pass(time.Hour)
	wantTime(t, l, m.wall)
}

// TestDownForDays stops the daemon for five days. The ledger's time continues where it stopped.
// After AcceptTime the ledger's time is that of the clock, and expired nonces are forgotten. A
// forgotten nonce is refused, not fresh.
func TestDownForDays(t *testing.T) {
	m := newMachine(t, ledger.Options{})
	l := m.open(t)
	begin := m.wall
	a := m.admission(1, time.Hour)
	mustAdmit(t, l, a, ledger.Fresh)
	l.Close()
	m.step(5 * 24 * time.Hour)
	l = m.open(t)
	wantTime(t, l, begin)
	mustAdmit(t, l, a, ledger.Repeated)
	later := m.admission(2, time.Hour)
	mustAdmit(t, l, later, ledger.Fresh)
	if err := l.AcceptTime(t.Context(), note("accepted")); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		wantTime(t, l, m.wall)
		if s, err := l.Stats(); err != nil || s.Nonces != 1 {
			t.Errorf("%+v, %v", s, err)
		}
		refused(t, l, a, ledger.ErrClock)
		mustAdmit(t, l, later, ledger.Repeated)
		l.Close()
		l = m.open(t)
	}
	if got := events(t, l); fmt.Sprint(got) != "[verdict 1 verdict 1 accepted]" {
		t.Errorf("%q", got)
	}
	m.step(-time.Hour)
	if err := l.AcceptTime(t.Context(), note("behind")); err != nil {
		t.Error(err)
	}
	wantTime(t, l, begin.Add(5*24*time.Hour)) // the ledger's time never goes back
}

// TestAcceptTimeNotWritten checks that the ledger's time does not change if AcceptTime is not
// written.
func TestAcceptTimeNotWritten(t *testing.T) {
	m := newMachine(t, ledger.Options{})
	begin := m.wall
	file, restore := ledger.CaptureFile()
	defer restore()
	l := m.open(t)
	a := m.admission(1, time.Hour)
	mustAdmit(t, l, a, ledger.Fresh)
	file().Close()
	m.step(5 * 24 * time.Hour)
	if err := l.AcceptTime(t.Context(), note("accepted")); !errors.Is(err, ledger.ErrDisk) {
		t.Fatal(err)
	}
	wantTime(t, l, begin)
	mustAdmit(t, l, a, ledger.Repeated)
	l.Close()
	restore()
	l = m.open(t)
	wantTime(t, l, begin)
	mustAdmit(t, l, a, ledger.Repeated)
}

// TestTheToleranceIsWithinThePace admits a nonce with the longest lifetime while the ledger's time
// is ahead of the clock by the whole tolerance. Then the clock is set far ahead. The nonce is still
// known for the whole lifetime.
func TestTheToleranceIsWithinThePace(t *testing.T) {
	life := 30 * 24 * time.Hour
	m := newMachine(t, ledger.Options{MaxLifetime: life})
	l := m.open(t)
	if _, err := l.Append(t.Context(), note("at noon")); err != nil {
		t.Fatal(err)
	}
	m.step(-time.Second) // the nonce expires in the last second of an hour
	l.Time()
	m.pass(tolerance - time.Second)
	l.Time()
	m.step(-tolerance)
	a := m.admission(1, life)
	mustAdmit(t, l, a, ledger.Fresh)
	m.step(1000 * 24 * time.Hour)
	m.pass(life)
	mustAdmit(t, l, a, ledger.Repeated)
}

// TestAnyExpiry checks extreme expiries: a nonce that expired before the margin is refused, and a
// nonce that never expires is kept.
func TestAnyExpiry(t *testing.T) {
	m := newMachine(t, ledger.Options{})
	l := m.open(t)
	for n, expires := range []int64{math.MinInt64, -1, 0, m.wall.Add(-26 * time.Hour).Unix()} {
		refused(t, l, ledger.Admission{Scope: "k", Nonce: [32]byte{byte(n)}, ExpiresAt: expires}, ledger.ErrClock)
	}
	kept := []int64{math.MaxInt64, 1 << 45, m.wall.Add(-24 * time.Hour).Unix(), m.wall.Unix()}
	for n, expires := range kept {
		mustAdmit(t, l, ledger.Admission{Scope: "k", Nonce: [32]byte{byte(n)}, ExpiresAt: expires}, ledger.Fresh)
	}
	for range 2 {
		for n, expires := range kept {
			mustAdmit(t, l, ledger.Admission{Scope: "k", Nonce: [32]byte{byte(n)}, ExpiresAt: expires}, ledger.Repeated)
		}
		l.Close()
		l = m.open(t)
	}
}

// TestBeforeTheEpoch checks a system's clock before 1970, which was never set: nonces are single
// use, and are kept until they expire.
func TestBeforeTheEpoch(t *testing.T) {
	m := newMachine(t, ledger.Options{})
	m.path += "2"
	m.wall = time.Unix(-3600*24*365, 500)
	if err := ledger.Create(m.path, m.options); err != nil {
		t.Fatal(err)
	}
	l := m.open(t)
	a := m.admission(1, time.Hour)
	mustAdmit(t, l, a, ledger.Fresh)
	l.Close()
	l = m.open(t)
	wantTime(t, l, m.wall)
	mustAdmit(t, l, a, ledger.Repeated)
	m.step(50 * 365 * 24 * time.Hour)
	mustAdmit(t, l, a, ledger.Repeated)
	if err := l.AcceptTime(t.Context(), note("accepted")); err != nil {
		t.Fatal(err)
	}
	refused(t, l, a, ledger.ErrClock)
}

// TestNonceIsNeverForgottenEarly simulates weeks of a machine whose clock is set at random, and
// which is suspended, paused and restarted. The test checks that
//
//   - a request is fresh once;
//   - a nonce is known for the lifetime of its document in real time, independently of the system's
//     clock;
//   - a document that has not expired by the system's clock is a repetition or refused, never fresh
//     again;
//   - a nonce is forgotten after its expiry and the margin, by the ledger's time;
//   - the ledger's time never goes back, except at an opening to the last time on disk.
func TestNonceIsNeverForgottenEarly(t *testing.T) {
	day := 24 * time.Hour
	t.Run("defaults", func(t *testing.T) { simulate(t, ledger.Options{}, false) })
	t.Run("an operator accepts the clock", func(t *testing.T) { simulate(t, ledger.Options{}, true) })
	t.Run("short margin", func(t *testing.T) { simulate(t, ledger.Options{Margin: time.Hour}, true) })
	t.Run("long life", func(t *testing.T) { simulate(t, ledger.Options{MaxLifetime: 30 * day}, false) })
}

// past is an earlier admission of the simulation.
type past struct {
	ledger.Admission
	admitted time.Duration // monotonic time of the admission
	lifetime time.Duration // of the document
	accepts  int           // number of AcceptTime before the admission
}

// simulate runs 300 random steps. If accepts is set, the operator sometimes calls AcceptTime.
func simulate(t *testing.T, o ledger.Options, accepts bool) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 1))
	defer func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	}()
	m := newMachine(t, o)
	if o.MaxLifetime == 0 {
		o.MaxLifetime = 7 * 24 * time.Hour
	}
	if o.Margin == 0 {
		o.Margin = 24 * time.Hour
	}
	l := m.open(t)
	var all []past
	var accepted int
	latest, written := l.Time(), l.Time()
	random := func(d time.Duration) time.Duration { return time.Duration(r.Int64N(int64(d))) }
	check := func(p past) {
		now, wall, behind := l.Clock()
		got, err := l.Admit(t.Context(), p.Admission, event)
		switch {
		case errors.Is(err, ledger.ErrClock):
			gone := !now.Before(time.Unix(p.ExpiresAt, 0).Add(o.Margin))
			if behind == nil && !gone {
				t.Fatalf("refused at %v, and it expires at %v: %v", now, time.Unix(p.ExpiresAt, 0), err)
			}
			if gone && behind == nil && wall.Unix() <= p.ExpiresAt && o.Margin > tolerance {
				t.Fatalf("forgotten, and its document has not expired by the clock")
			}
		case err != nil:
			t.Fatal(err)
		case got.Verdict != ledger.Repeated:
			t.Fatalf("verdict %d for an earlier admission", got.Verdict)
		}
		_, err = l.Spent(t.Context(), p.Scope, p.Nonce)
		switch known := err == nil; {
		case !known && !errors.Is(err, ledger.ErrNotFound):
			t.Fatal(err)
		case !known && p.accepts == accepted && m.elapsed-p.admitted < p.lifetime:
			t.Fatalf("forgotten %v after it was admitted for %v", m.elapsed-p.admitted, p.lifetime)
		case known && !now.Before(time.Unix(p.ExpiresAt, 0).Add(o.Margin+time.Hour)):
			t.Fatalf("the nonce is known at %v and expired at %v", now, time.Unix(p.ExpiresAt, 0))
		}
	}
	for n := range 300 {
		switch r.IntN(12) {
		case 0:
			m.step(random(tolerance))
		case 1:
			m.step(-random(2 * tolerance))
		case 2:
			m.step(random(20 * 24 * time.Hour)) // a wrong clock, or a suspension
		case 3:
			m.step(-random(10 * 24 * time.Hour))
		case 4, 5:
			l.Close()
			m.pass(random(time.Hour)) // the daemon is down
			m.step(random(time.Hour))
			l = m.open(t)
			latest = written
		case 6:
			if now := l.Time(); m.options.Wall().Before(now) || r.IntN(4) == 0 {
				m.step(now.Sub(m.options.Wall())) // the clock is corrected to the ledger's time
			}
		case 7:
			if accepts && r.IntN(5) == 0 {
				if err := l.AcceptTime(t.Context(), note("accepted")); err != nil {
					t.Fatal(err)
				}
				accepted++
				written = l.Time()
			}
		}
		m.pass(random(3 * time.Hour))
		if now := l.Time(); now.Before(latest) {
			t.Fatalf("the ledger's time went from %v back to %v", latest, now)
		} else {
			latest = now
		}
		lifetime := 1 + random(o.MaxLifetime)
		a := m.admission(0, lifetime)
		a.Nonce = [32]byte{byte(n), byte(n >> 8)}
		p := past{a, m.elapsed, lifetime, accepted}
		got, err := l.Admit(t.Context(), p.Admission, event)
		_, _, behind := l.Clock()
		switch {
		case errors.Is(err, ledger.ErrClock) && behind != nil:
		case err != nil || got.Verdict != ledger.Fresh || behind != nil:
			t.Fatalf("verdict %d, %v, %v", got.Verdict, err, behind)
		default:
			all, written = append(all, p), l.Time()
		}
		for range min(2, len(all)) {
			check(all[r.IntN(len(all))])
		}
	}
	for _, p := range all {
		check(p)
	}
	if len(all) < 50 {
		t.Errorf("%d admissions", len(all))
	}
}
