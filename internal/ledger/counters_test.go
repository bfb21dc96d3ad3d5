package ledger_test

import (
	"errors"
	"math/big"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"countersign/internal/ledger"
	"countersign/internal/ledger/ledgertest"
)

var errSpent = errors.New("over budget")

// upTo returns a Decide that denies when the first series has more than a number in 24 hours.
// countIn returns series for Admission.Counts.
func countIn(all ...ledger.Count) func() []ledger.Count {
	return func() []ledger.Count { return all }
}

func upTo(most int64) func([]ledger.Used) ([]byte, error) {
	return func(used []ledger.Used) ([]byte, error) {
		if n := used[0][2].Int64(); n > most {
			return []byte("refused"), errSpent
		}
		return []byte("admitted"), nil
	}
}

// counted returns an admission that adds 1 to the series "n", with a limit.
func counted(nonce byte, most int64) ledger.Admission {
	a := admission("k", nonce, nonce, 1)
	a.Counts = countIn(ledger.Count{Series: "n", Add: big.NewInt(1)})
	a.Decide = upTo(most)
	return a
}

// counter returns the sum of a series in 24 hours, which a denied admission reads.
func counter(t *testing.T, l *ledger.Ledger, series string) (value string) {
	t.Helper()
	a := admission("other", 255, 1, 1)
	a.Counts = countIn(ledger.Count{Series: series, Add: new(big.Int)})
	a.Decide = func(used []ledger.Used) ([]byte, error) { value = used[0][2].String(); return nil, errSpent }
	mustAdmit(t, l, a, ledger.Denied)
	return value
}

// TestCountersAreOfTheAdmission checks that an admission changes the series durably, and that a
// repetition, a replay or a denial changes nothing.
func TestCountersAreOfTheAdmission(t *testing.T) {
	l, path := create(t)
	for n := range byte(3) {
		mustAdmit(t, l, counted(n, 3), ledger.Fresh)
	}
	for range 2 {
		mustAdmit(t, l, counted(1, 100), ledger.Repeated)
		other := counted(1, 100)
		other.Digest = [32]byte{99}
		mustAdmit(t, l, other, ledger.Replay)
		if r := mustAdmit(t, l, counted(4, 3), ledger.Denied); !errors.Is(r.Denial, errSpent) {
			t.Errorf("%+v", r)
		}
		if n := counter(t, l, "n"); n != "3" {
			t.Errorf("the counter is %s, want 3", n)
		}
		if _, err := l.Spent(t.Context(), "k", [32]byte{4}); !errors.Is(err, ledger.ErrNotFound) {
			t.Errorf("a denied request has spent its nonce: %v", err)
		}
		l.Close()
		l = open(t, path)
	}
	mustAdmit(t, l, counted(4, 4), ledger.Fresh) // the limit is higher, and the denied nonce is still fresh
	if n, none := counter(t, l, "n"), counter(t, l, "m"); n != "4" || none != "0" {
		t.Errorf("%s and %s, want 4 and 0", n, none)
	}
}

// TestRequestsThatShareACommitCountEachOther checks that concurrent requests in one transaction
// can't exceed a limit.
func TestRequestsThatShareACommitCountEachOther(t *testing.T) {
	l, _ := create(t)
	release := l.Occupy()
	var fresh, denied atomic.Int32
	var wg sync.WaitGroup
	for n := range byte(20) {
		wg.Go(func() {
			switch r, err := l.Admit(t.Context(), counted(n, 7), event); {
			case err != nil:
				t.Error(err)
			case r.Verdict == ledger.Fresh:
				fresh.Add(1)
			case r.Verdict == ledger.Denied:
				denied.Add(1)
			}
		})
	}
	for l.Waiting() < 20 {
		runtime.Gosched()
	}
	release()
	wg.Wait()
	if n := counter(t, l, "n"); fresh.Load() != 7 || denied.Load() != 13 || n != "7" {
		t.Errorf("%d fresh, %d denied, and the counter is %s; want 7, 13, 7", fresh.Load(), denied.Load(), n)
	}
}

// TestWhatIsNotKeptIsNotCounted checks that an admission with ErrTooMany or ErrClock changes no
// series, while another request of the same transaction is written.
func TestWhatIsNotKeptIsNotCounted(t *testing.T) {
	for want, change := range map[error]func(*ledger.Options, *ledger.Admission){
		ledger.ErrTooMany: func(o *ledger.Options, _ *ledger.Admission) { o.MaxNonces = 2 },
		ledger.ErrClock:   func(_ *ledger.Options, a *ledger.Admission) { a.ExpiresAt = 1 },
	} {
		_, path := create(t)
		path += "2"
		o, refused := ledger.Options{}, counted(2, 9)
		change(&o, &refused)
		if err := ledger.Create(path, o); err != nil {
			t.Fatal(err)
		}
		l, err := ledgertest.Open(t, path, o)
		if err != nil {
			t.Fatal(err)
		}
		mustAdmit(t, l, counted(1, 9), ledger.Fresh)
		release := l.Occupy()
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := l.Admit(t.Context(), refused, event); !errors.Is(err, want) {
				t.Errorf("%v, want %v", err, want)
			}
		})
		wg.Go(func() {
			if _, err := l.Append(t.Context(), note("written")); err != nil {
				t.Error(err)
			}
		})
		for l.Waiting() < 2 {
			runtime.Gosched()
		}
		release()
		wg.Wait()
		l.Close()
		l = open(t, path)
		if n := counter(t, l, "n"); n != "1" {
			t.Errorf("%v: the counter is %s, want 1", want, n)
		}
		l.Close()
	}
}

// TestDecideMayRunAgain checks that a transaction which was not written changes no series.
func TestDecideMayRunAgain(t *testing.T) {
	l, path := create(t)
	l.Close()
	file, restore := ledger.CaptureFile()
	defer restore()
	l = open(t, path)
	mustAdmit(t, l, counted(1, 9), ledger.Fresh)
	file().Close()
	for range 3 {
		if _, err := l.Admit(t.Context(), counted(2, 2), event); !errors.Is(err, ledger.ErrDisk) {
			t.Fatal(err)
		}
	}
	l.Close()
	restore()
	l = open(t, path)
	mustAdmit(t, l, counted(2, 2), ledger.Fresh)
	if n := counter(t, l, "n"); n != "2" {
		t.Errorf("the counter is %s, want 2", n)
	}
}

// TestTooMany checks that with MaxNonces nonces, fresh ones are refused until some have expired.
// Other requests are not refused.
func TestTooMany(t *testing.T) {
	m := newMachine(t, ledger.Options{MaxNonces: 3})
	l := m.open(t)
	first := m.admission(1, time.Minute)
	mustAdmit(t, l, first, ledger.Fresh)
	mustAdmit(t, l, m.admission(2, 5*time.Hour), ledger.Fresh)
	mustAdmit(t, l, m.admission(3, 5*time.Hour), ledger.Fresh)
	for range 2 {
		before := l.Commits()
		refused(t, l, m.admission(4, 5*time.Hour), ledger.ErrTooMany)
		if l.Commits() != before {
			t.Error("a refused admission was written")
		}
		mustAdmit(t, l, first, ledger.Repeated)
		if _, err := l.Append(t.Context(), note("more")); err != nil {
			t.Error(err)
		}
		l.Close()
		l = m.open(t)
	}
	m.pass(25 * time.Hour)
	mustAdmit(t, l, m.admission(4, 5*time.Hour), ledger.Fresh)
	refused(t, l, m.admission(5, 5*time.Hour), ledger.ErrTooMany)
}
