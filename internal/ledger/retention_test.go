package ledger_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/ledger"
)

// endEpoch ends the present epoch and stores its final checkpoint.
func endEpoch(t *testing.T, l *ledger.Ledger) {
	t.Helper()
	epoch, _, tree := l.Head()
	if _, err := l.EndEpoch(t.Context(), audit.Daemon()); err != nil {
		t.Fatal(err)
	}
	if err := l.SetCheckpoint(t.Context(), epoch, tree.Size, checkpointText(tree)); err != nil {
		t.Fatal(err)
	}
}

// TestDropRefuses checks that Drop refuses an epoch that is held, has not ended, has no final
// checkpoint, or follows an epoch that is not dropped. A refused Drop writes nothing.
func TestDropRefuses(t *testing.T) {
	m := newMachine(t, ledger.Options{})
	l := m.open(t)
	refuses := func(epoch uint32, why string) {
		t.Helper()
		before := l.Commits()
		err := l.Drop(t.Context(), epoch, note("dropped"))
		if err == nil || !strings.Contains(err.Error(), why) || l.Commits() != before {
			t.Errorf("epoch %d: %v; want %q", epoch, err, why)
		}
	}
	refuses(0, "final checkpoint")
	refuses(5, "no such entry")
	endEpoch(t, l)
	endEpoch(t, l)
	if _, err := l.EndEpoch(t.Context(), audit.Daemon()); err != nil {
		t.Fatal(err)
	}
	refuses(1, "epoch 0 is older")
	// Each of two holds keeps the epoch until its own release.
	for _, name := range []string{"court", "tax"} {
		if err := l.Hold(t.Context(), 0, name, "a case", note("held")); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Hold(t.Context(), 0, "court", "another case", note("held")); !errors.Is(err, ledger.ErrHeld) {
		t.Errorf("a hold was replaced: %v", err)
	}
	for _, name := range []string{"tax", "court"} {
		refuses(0, "legal hold")
		if err := l.Release(t.Context(), 0, name, note("released")); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Release(t.Context(), 0, "tax", note("released")); !errors.Is(err, ledger.ErrNotFound) {
		t.Errorf("a hold was released twice: %v", err)
	}
	for n := range uint32(2) {
		if err := l.Drop(t.Context(), n, note("dropped")); err != nil {
			t.Error(err)
		}
	}
	refuses(2, "final checkpoint")
	if err := l.Hold(t.Context(), 0, "late", "too late", note("held")); !errors.Is(err, ledger.ErrDropped) {
		t.Errorf("%v", err)
	}
	var all []string
	l.Events(0, func(_ uint64, b []byte) bool { all = append(all, string(b)); return true })
	// The first two events that are left are EpochBegun.
	if len(all) != 8 || fmt.Sprint(all[2:]) != "[held held released released dropped dropped]" {
		t.Errorf("%q", all)
	}
}

// TestDropAndSweep checks that readers no longer see a dropped epoch, and that its final checkpoint
// stays. Sweep removes the records of the epoch, and no others, in steps. The ledger is closed and
// opened between the steps.
func TestDropAndSweep(t *testing.T) {
	m := newMachine(t, ledger.Options{})
	l := m.open(t)
	grow(t, l, 9999)
	endEpoch(t, l)
	grow(t, l, 2999) // the epoch shares segments with the epochs before and after
	endEpoch(t, l)
	grow(t, l, 100)
	first := map[uint32]uint64{0: 0, 1: 10000, 2: 13000}
	for epoch := range uint32(2) {
		if err := l.Drop(t.Context(), epoch, note("dropped")); err != nil {
			t.Fatal(err)
		}
		steps := 0
		for more := true; more; steps++ {
			from := first[epoch+1]
			begins := uint64(1 << 63)
			err := l.Events(0, func(index uint64, _ []byte) bool { begins = index; return false })
			if err != nil || begins != from {
				t.Fatalf("step %d: the log begins at %d, want %d; %v", steps, begins, from, err)
			}
			if err := l.Hashes(epoch, func(audit.Reader) error { return nil }); !errors.Is(err, ledger.ErrDropped) {
				t.Fatal(err)
			}
			e, err := l.EpochOf(from - 1)
			if err != nil || e.Number != epoch || !strings.HasPrefix(e.Checkpoint, "origin\n") || !e.Final() {
				t.Fatalf("%+v, %v", e, err)
			}
			sameTree(t, l)
			l.Close()
			checkFile(t, m.path)
			l = m.open(t)
			before := l.Commits()
			if more, err = l.Sweep(t.Context(), 0, 0); err != nil || l.Commits() > before+1 {
				t.Fatal(err)
			}
		}
		if e, err := l.Epoch(epoch); err != nil || e.Dropped == 0 || steps < 4 {
			t.Errorf("%+v after %d steps, %v", e, steps, err)
		}
		for name := range content(t, closed(m, l)) {
			if strings.HasPrefix(name, fmt.Sprintf("hashes/%08x", epoch)) {
				t.Errorf("%s is still there", name)
			}
			var segment, index uint64
			if n, _ := fmt.Sscanf(name, "events/%16x/%16x", &segment, &index); n == 2 && index < first[epoch+1] {
				t.Errorf("event %d is still there", index)
			}
		}
		l = m.open(t)
	}
	if more, err := l.Sweep(t.Context(), 0, 0); more || err != nil {
		t.Errorf("%v, %v", more, err)
	}
}

// TestReceiptsByIDAndTime checks that pages of receipts have no gaps and no overlaps, even within
// one millisecond, and that Sweep removes a receipt from both indexes.
func TestReceiptsByIDAndTime(t *testing.T) {
	m := newMachine(t, ledger.Options{})
	l := m.open(t)
	const n = 50
	for i := range byte(n) {
		r := ledger.Receipt{ID: ledger.ReceiptID{i + 1}, TimeMS: int64(i / 7), Method: "m", Status: "completed"}
		if err := l.Settle(t.Context(), ledger.Admitted{}, nil, note("settled"), &r); err != nil {
			t.Fatal(err)
		}
	}
	l.Alive(t.Context())
	var all []byte
	var from int64
	var after ledger.ReceiptID
	for {
		page, err := l.Receipts(from, 0, after, 4)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range page {
			all = append(all, r.ID[0])
			from, after = r.TimeMS, r.ID
		}
		if len(page) < 4 {
			break
		}
	}
	for i, id := range all {
		if int(id) != i+1 {
			t.Fatalf("%d", all)
		}
	}
	some, err := l.Receipts(2, 4, ledger.ReceiptID{}, 100)
	if len(all) != n || err != nil || len(some) != 14 || some[0].TimeMS != 2 || some[13].TimeMS != 3 {
		t.Errorf("%d, %v, %v", len(all), some, err)
	}
	for more := true; more; {
		var err error
		if more, err = l.Sweep(t.Context(), 3, 0); err != nil {
			t.Fatal(err)
		}
	}
	for i := range byte(n) {
		r, err := l.Receipt(ledger.ReceiptID{i + 1})
		removed := i/7 < 3
		if removed != errors.Is(err, ledger.ErrNotFound) || !removed && (err != nil || r.TimeMS != int64(i/7)) {
			t.Errorf("receipt %d: %+v, %v", i+1, r, err)
		}
	}
	if left, err := l.Receipts(0, 0, ledger.ReceiptID{}, 100); err != nil || len(left) != n-21 {
		t.Errorf("%d receipts, %v", len(left), err)
	}
}

// TestExpiry checks that the nonces of an hour are forgotten together after the margin, and that
// later transactions remove their records.
func TestExpiry(t *testing.T) {
	m := newMachine(t, ledger.Options{})
	l := m.open(t)
	for n := range byte(40) { // each expires in an hour of its own
		got := mustAdmit(t, l, m.admission(n, time.Duration(n)*time.Hour), ledger.Fresh)
		if err := l.Settle(t.Context(), got, []byte("s"), note("settled"), nil); err != nil {
			t.Fatal(err)
		}
	}
	m.pass(30 * time.Hour)
	alive := 40 - 6 // those of the hours 12 to 17 have expired, and the margin of 24 h is over
	if s, err := l.Stats(); err != nil || s.Nonces != alive {
		t.Errorf("%d nonces, want %d; %v", s.Nonces, alive, err)
	}
	for range 2 {
		if _, err := l.Append(t.Context(), note("later")); err != nil {
			t.Fatal(err)
		}
	}
	records := map[string]int{}
	for name := range content(t, closed(m, l)) {
		bucket, _, _ := strings.Cut(name, "/")
		records[bucket]++
	}
	if records["nonces"] != alive || records["outcomes"] != alive {
		t.Errorf("%v on disk, want %d", records, alive)
	}
	l = m.open(t)
	if s, err := l.Stats(); err != nil || s.Nonces != alive {
		t.Errorf("%d nonces, want %d; %v", s.Nonces, alive, err)
	}
}
