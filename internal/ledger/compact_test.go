package ledger_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/big"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/ledger/disktest"

	bolt "go.etcd.io/bbolt"
)

// content returns all records of a ledger's file by their paths.
func content(t *testing.T, path string) map[string]string {
	t.Helper()
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	all := map[string]string{}
	var walk func(prefix string, b *bolt.Bucket) error
	walk = func(prefix string, b *bolt.Bucket) error {
		return b.ForEach(func(k, v []byte) error {
			name := fmt.Sprintf("%s/%x", prefix, k)
			if v == nil {
				return walk(name, b.Bucket(k))
			}
			all[name] = string(v)
			return nil
		})
	}
	if err := db.View(func(tx *bolt.Tx) error {
		return tx.ForEach(func(name []byte, b *bolt.Bucket) error { return walk(string(name), b) })
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

// furnish fills a ledger with records of each kind, and makes free pages.
func furnish(t *testing.T, l *ledger.Ledger) {
	t.Helper()
	for n := range byte(20) {
		a := admission("k", n, n, 1)
		a.Counts = countIn(ledger.Count{Series: "n", Add: big.NewInt(1)})
		a.Monotonic = &ledger.Monotonic{Series: "r", Value: uint64(n) + 1}
		a.Decide = upTo(100)
		got := mustAdmit(t, l, a, ledger.Fresh)
		receipt := &ledger.Receipt{ID: ledger.ReceiptID{n + 1}, TimeMS: int64(n)}
		if err := l.Settle(t.Context(), got, []byte{n}, note("signed"), receipt); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.EndEpoch(t.Context(), audit.Daemon()); err != nil {
		t.Fatal(err)
	}
	many := func(tx *ledger.Tx) error {
		for n := range 5000 {
			if err := tx.Append(note(fmt.Sprint("event ", n))); err != nil {
				return err
			}
			if err := tx.Put(ledger.Keys, fmt.Sprint("key ", n), bytes.Repeat([]byte("x"), 200)); err != nil {
				return err
			}
		}
		return nil
	}
	few := func(tx *ledger.Tx) error {
		for n := range 4990 {
			if err := tx.Delete(ledger.Keys, fmt.Sprint("key ", n)); err != nil {
				return err
			}
		}
		return nil
	}
	if err := errors.Join(l.Update(t.Context(), many), l.Update(t.Context(), few)); err != nil {
		t.Fatal(err)
	}
}

// TestCompactKeepsAll checks that compaction makes the file smaller and changes only the event, its
// hash and the time. The temporary file of an earlier compaction is removed.
func TestCompactKeepsAll(t *testing.T) {
	l, path := create(t)
	furnish(t, l)
	l.Close()
	before := content(t, path)
	if err := os.WriteFile(path+".compact", []byte("left over"), 0o600); err != nil {
		t.Fatal(err)
	}
	l = open(t, path)
	if _, err := os.Stat(path + ".compact"); err == nil {
		t.Error("the temporary file of a crashed compaction still exists")
	}
	if err := os.WriteFile(path+".compact", []byte("left over"), 0o600); err != nil {
		t.Fatal(err)
	}
	was, is, took, err := l.Compact(t.Context(), note("compacted"))
	if err != nil || is >= was || took <= 0 {
		t.Fatalf("%d bytes before, %d after, %v, %v", was, is, took, err)
	}
	if st, err := os.Stat(path); err != nil || st.Size() != is || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Repeated)
	l.Close()
	after := content(t, path)
	changed := 0
	for name, v := range after {
		if before[name] != v {
			changed++
		}
	}
	// The time, the number of the list, the event, and the chunk with its hash.
	if changed != 4 || len(after) < len(before)+1 || len(after) > len(before)+2 {
		t.Errorf("%d records differ, %d records before, %d after", changed, len(before), len(after))
	}
	l = open(t, path)
	mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Repeated)
	mustAdmit(t, l, admission("k", 1, 2, 1), ledger.Replay)
	mustAdmit(t, l, admission("k", 99, 1, 1), ledger.Fresh)
	if all := events(t, l); all[len(all)-3] != "compacted" {
		t.Errorf("%q", all[len(all)-3:])
	}
}

// TestCompactBesideOthers compacts while other goroutines admit and read. Admissions wait, reads go
// on, and all results are correct.
func TestCompactBesideOthers(t *testing.T) {
	l, path := create(t)
	furnish(t, l)
	nonce := func(n uint32) [32]byte { return [32]byte{byte(n), byte(n >> 8), byte(n >> 16)} }
	var over atomic.Bool
	var admitted atomic.Uint32
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for !over.Load() {
				n := admitted.Add(1)
				a := admission("beside", 0, 1, 1)
				a.Nonce = nonce(n)
				if r, err := l.Admit(t.Context(), a, event); err != nil || r.Verdict != ledger.Fresh {
					t.Errorf("verdict %d, %v", r.Verdict, err)
				}
				spent := admission("k", byte(n%20), byte(n%20), 1)
				if r, err := l.Admit(t.Context(), spent, event); err != nil || r.Verdict != ledger.Repeated {
					t.Errorf("a spent nonce: verdict %d, %v", r.Verdict, err)
				}
			}
		})
		wg.Go(func() {
			for !over.Load() {
				next := uint64(40)
				visit := func(index uint64, _ []byte) bool { next++; return index == next-1 && next < 3000 }
				if err := l.Events(next, visit); err != nil || next != 3000 {
					t.Errorf("events up to %d: %v", next, err)
				}
				if _, err := l.Receipt(ledger.ReceiptID{3}); err != nil {
					t.Error(err)
				}
				prove := func(r audit.Reader) error { _, err := audit.Prove(5001, 77, r); return err }
				if err := l.Hashes(1, prove); err != nil {
					t.Error(err)
				}
				if _, err := l.Stats(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 5 {
		if _, _, _, err := l.Compact(t.Context(), note("compacted")); err != nil {
			t.Error(err)
		}
	}
	over.Store(true)
	wg.Wait()
	if s, err := l.Stats(); err != nil || s.Nonces != 20+int(admitted.Load()) {
		t.Errorf("%d nonces, want %d; %v", s.Nonces, 20+admitted.Load(), err)
	}
	l.Close()
	l = open(t, path)
	for n := range admitted.Load() {
		if _, err := l.Spent(t.Context(), "beside", nonce(n+1)); err != nil {
			t.Errorf("nonce %d: %v", n+1, err)
		}
	}
}

// TestCompactThatFails checks failures before the copy has replaced the file: the disk is full, or
// the copy can't be created, synced or renamed. The ledger goes on with the old file, and the copy
// is removed.
func TestCompactThatFails(t *testing.T) {
	disk := disktest.New(t)
	onCopy := func(kind disktest.Kind) func(disktest.Op) bool {
		return func(op disktest.Op) bool { return op.Kind == kind && strings.HasSuffix(op.Path, ".compact") }
	}
	for name, breaks := range map[string]func(disktest.Op) bool{
		"no room":  onCopy(disktest.Write),
		"no sync":  onCopy(disktest.Sync),
		"no name":  func(op disktest.Op) bool { return op.Kind == disktest.Rename },
		"no entry": func(op disktest.Op) bool { return op.Kind == disktest.Create },
	} {
		t.Run(name, func(t *testing.T) {
			l, path := createOn(t, disk)
			mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Fresh)
			disk.Fail(failing(syscall.ENOSPC, breaks))
			_, _, _, err := l.Compact(t.Context(), note("compacted"))
			if err == nil || !strings.Contains(err.Error(), syscall.ENOSPC.Error()) {
				t.Errorf("%v", err)
			}
			disk.Fail(nil)
			if _, err := os.Stat(path + ".compact"); err == nil {
				t.Error("the copy is still there")
			}
			mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Repeated)
			mustAdmit(t, l, admission("k", 2, 1, 1), ledger.Fresh)
			l.Close()
			l = open(t, path)
			mustAdmit(t, l, admission("k", 2, 1, 1), ledger.Repeated)
			if _, _, _, err := l.Compact(t.Context(), note("compacted")); err != nil {
				t.Error(err)
			}
			mustAdmit(t, l, admission("k", 2, 1, 1), ledger.Repeated)
		})
	}
}

// TestCompactWithoutItsFolder checks a failed sync of the folder after the rename. The ledger ends
// with ErrUnknownState, because later writes to either file could be lost in a crash.
func TestCompactWithoutItsFolder(t *testing.T) {
	disk := disktest.New(t)
	l, path := createOn(t, disk)
	mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Fresh)
	disk.Fail(failing(syscall.EIO, func(op disktest.Op) bool { return op.Kind == disktest.SyncDir }))
	if _, _, _, err := l.Compact(t.Context(), note("compacted")); !errors.Is(err, ledger.ErrUnknownState) {
		t.Errorf("%v", err)
	}
	disk.Fail(nil)
	select {
	case <-l.Failed():
	default:
		t.Error("Failed is not closed")
	}
	if r, err := l.Admit(t.Context(), admission("k", 2, 1, 1), event); !errors.Is(err, ledger.ErrUnknownState) {
		t.Errorf("verdict %d, %v", r.Verdict, err)
	}
	l.Close()
	l = open(t, path)
	mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Repeated)
	mustAdmit(t, l, admission("k", 2, 1, 1), ledger.Fresh)
}
