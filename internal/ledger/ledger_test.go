package ledger_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"countersign/internal/ledger"
	"countersign/internal/ledger/ledgertest"

	bolt "go.etcd.io/bbolt"
)

// create creates and opens a ledger. At the end of the test, the whole file is checked.
func create(t *testing.T) (*ledger.Ledger, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ledger.db")
	if err := ledger.Create(path, ledger.Options{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { checkFile(t, path) })
	return open(t, path), path
}

func open(t *testing.T, path string) *ledger.Ledger {
	t.Helper()
	l, err := ledgertest.Open(t, path, ledger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// checkFile checks the whole file: pages, events, hashes, nonces.
func checkFile(t *testing.T, path string) {
	t.Helper()
	if err := ledger.Check(path, ledger.Options{}, nil); err != nil {
		t.Error(err)
	}
}

// peerName returns the name of a peer by number; peer 0 is the appliance itself.
func peerName(peer byte) string {
	if peer == 0 {
		return ""
	}
	return fmt.Sprintf("peer-%d", peer)
}

// admission returns an admission of key version 1 that expires in 1000 s.
func admission(scope ledger.Scope, nonce, digest, peer byte) ledger.Admission {
	return ledger.Admission{
		Scope: scope, Nonce: [32]byte{nonce}, Digest: [32]byte{digest}, Peer: peerName(peer),
		KeyVersion: 1, ExpiresAt: time.Now().Unix() + 1000,
	}
}

// event returns the event of an admission as a text, for example "verdict 1" for ledger.Fresh.
func event(v ledger.Verdict) []byte { return fmt.Appendf(nil, "verdict %d", v) }

func note(text string) ledger.Event { return ledger.NewEvent([]byte(text)) }

// mustAdmit admits, and fails the test for another verdict than want. A want of 0 accepts any
// verdict.
func mustAdmit(t *testing.T, l *ledger.Ledger, a ledger.Admission, want ledger.Verdict) ledger.Admitted {
	t.Helper()
	got, err := l.Admit(t.Context(), a, event)
	if err != nil {
		t.Fatal(err)
	}
	if want != 0 && got.Verdict != want {
		t.Fatalf("verdict %d, want %d", got.Verdict, want)
	}
	return got
}

// events returns all events after EpochBegun, which is event 0.
func events(t *testing.T, l *ledger.Ledger) (all []string) {
	t.Helper()
	if err := l.Events(1, func(_ uint64, e []byte) bool { all = append(all, string(e)); return true }); err != nil {
		t.Fatal(err)
	}
	return all
}

func TestNonceIsSingleUseInItsScope(t *testing.T) {
	l, path := create(t)
	signer := ledger.SignerScope(bytes.Repeat([]byte{7}, 32))
	first := mustAdmit(t, l, admission(ledger.KeyScope("a"), 1, 1, 1), ledger.Fresh)

	again := admission(ledger.KeyScope("a"), 1, 1, 1)
	again.KeyVersion = 2 // the key has been rotated since
	if r := mustAdmit(t, l, again, ledger.Repeated); r.Event != first.Event || r.KeyVersion != 1 || r.Signature != nil {
		t.Errorf("repeated: %+v", r)
	}
	mustAdmit(t, l, admission(ledger.KeyScope("a"), 1, 2, 1), ledger.Replay) // other content
	mustAdmit(t, l, admission(ledger.KeyScope("a"), 1, 1, 2), ledger.Replay) // another peer
	mustAdmit(t, l, admission(ledger.KeyScope("b"), 1, 1, 1), ledger.Fresh)  // another key
	mustAdmit(t, l, admission(signer, 1, 1, 1), ledger.Fresh)                // a signer as the scope
	mustAdmit(t, l, admission(ledger.KeyScope("a"), 2, 1, 1), ledger.Fresh)  // another nonce

	once := admission(ledger.SignerScope([]byte("x")), 1, 1, 1)
	once.Once = true
	confirmed := mustAdmit(t, l, once, ledger.Fresh)
	if r := mustAdmit(t, l, once, ledger.Replay); !r.Own || r.First != confirmed.Event || r.Event == r.First {
		t.Errorf("an admission with Once, by the same peer: %+v", r)
	}
	once.Peer = peerName(2)
	if r := mustAdmit(t, l, once, ledger.Replay); r.Own || r.First != confirmed.Event {
		t.Errorf("an admission with Once, by another peer: %+v", r)
	}

	signature := bytes.Repeat([]byte{9}, 64)
	if err := l.Settle(t.Context(), first, signature, note("signed"), nil); err != nil {
		t.Fatal(err)
	}
	if err := l.Settle(t.Context(), first, signature, note("signed twice"), nil); err != nil {
		t.Fatal(err)
	}
	if err := l.Settle(t.Context(), first, nil, note("the other one of two repetitions failed"), nil); err != nil {
		t.Fatal(err)
	}
	if r := mustAdmit(t, l, again, ledger.Repeated); !bytes.Equal(r.Signature, signature) {
		t.Errorf("after settling: %+v", r)
	}
	want := []string{
		"verdict 1", "verdict 3", "verdict 3", "verdict 1", "verdict 1", "verdict 1",
		"verdict 1", "verdict 3", "verdict 3", "signed",
	}
	for reopened := range 2 {
		if got := events(t, l); fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("events %q, want %q (reopened %d)", got, want, reopened)
		}
		if r := mustAdmit(t, l, again, ledger.Repeated); !bytes.Equal(r.Signature, signature) {
			t.Errorf("reopened %d: %+v", reopened, r)
		}
		if s, err := l.Spent(t.Context(), first.Scope, first.Nonce); err != nil || s.Event != first.Event {
			t.Errorf("Spent: %+v, %v", s, err)
		}
		l.Close()
		l = open(t, path)
	}
	if _, err := l.Spent(t.Context(), "k?", first.Nonce); !errors.Is(err, ledger.ErrNotFound) {
		t.Errorf("Spent of a fresh nonce: %v", err)
	}
}

// TestOneOfManyIsFresh sends 32 concurrent requests with one nonce. The nonce is fresh for exactly
// one.
func TestOneOfManyIsFresh(t *testing.T) {
	l, _ := create(t)
	for round := range byte(20) {
		var fresh, repeated, replay atomic.Int32
		var wg sync.WaitGroup
		release := l.Occupy()
		for i := range byte(32) {
			wg.Go(func() {
				r, err := l.Admit(t.Context(), admission("k", round, i%2, 1), event)
				if err != nil {
					t.Error(err)
				}
				switch r.Verdict {
				case ledger.Fresh:
					fresh.Add(1)
				case ledger.Repeated:
					repeated.Add(1)
				case ledger.Replay:
					replay.Add(1)
				}
			})
		}
		release()
		wg.Wait()
		if fresh.Load() != 1 || repeated.Load() != 15 || replay.Load() != 16 {
			t.Fatalf("%d fresh, %d repeated, %d replays; want 1, 15, 16", fresh.Load(), repeated.Load(), replay.Load())
		}
	}
}

// TestOnDiskWhenItReturns copies the file whenever Admit has returned, and opens the copy. The copy
// has all admissions so far. TestCommitsReachTheDisk and TestPowerCuts test the sync.
func TestOnDiskWhenItReturns(t *testing.T) {
	l, path := create(t)
	for n := range byte(50) {
		mustAdmit(t, l, admission("k", n, n, 1), ledger.Fresh)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		copied := filepath.Join(t.TempDir(), "copy.db")
		if err := os.WriteFile(copied, b, 0o600); err != nil {
			t.Fatal(err)
		}
		c := open(t, copied)
		if _, err := c.Spent(t.Context(), "k", [32]byte{n}); err != nil {
			t.Fatalf("nonce %d was answered and is not on disk: %v", n, err)
		}
		if got := len(events(t, c)); got != int(n)+1 {
			t.Fatalf("%d events after %d admissions", got, n+1)
		}
		c.Close()
	}
}

func TestAliveWritesNothing(t *testing.T) {
	l, _ := create(t)
	before := l.Commits()
	if err := l.Alive(t.Context()); err != nil || l.Commits() != before {
		t.Errorf("%d commits, %v", l.Commits()-before, err)
	}
}

func TestRequestsShareACommit(t *testing.T) {
	l, _ := create(t)
	before := l.Commits()
	release := l.Occupy()
	var wg sync.WaitGroup
	for n := range byte(100) {
		wg.Go(func() {
			if _, err := l.Admit(t.Context(), admission("k", n, 0, 0), event); err != nil {
				t.Error(err)
			}
		})
	}
	for l.Waiting() < 100 {
		runtime.Gosched()
	}
	release()
	wg.Wait()
	if n := l.Commits() - before; n != 2 { // one of Occupy, and one for all requests
		t.Errorf("%d commits for 100 requests that waited together", n)
	}
}

// TestNotWritten checks that a failed write leaves nothing behind, and that the ledger goes on.
func TestNotWritten(t *testing.T) {
	l, path := create(t)
	l.Close()
	file, restore := ledger.CaptureFile()
	defer restore()
	l = open(t, path)
	mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Fresh)
	file().Close() // every write fails from here on
	for range 2 {
		if _, err := l.Admit(t.Context(), admission("k", 2, 1, 1), event); !errors.Is(err, ledger.ErrDisk) {
			t.Fatalf("%v, want %v", err, ledger.ErrDisk)
		}
	}
	if err := l.Trouble(); !errors.Is(err, ledger.ErrDisk) {
		t.Errorf("%v", err)
	}
	select {
	case <-l.Failed():
		t.Error("Failed is closed")
	default:
	}
	mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Repeated) // a repetition writes nothing
	l.Close()
	restore()
	l = open(t, path)
	mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Repeated)
	mustAdmit(t, l, admission("k", 2, 1, 1), ledger.Fresh)
}

func TestUpdateIsAllOrNothing(t *testing.T) {
	l, _ := create(t)
	boom := errors.New("boom")
	err := l.Update(t.Context(), func(tx *ledger.Tx) error {
		tx.Put(ledger.Keys, "a/1", []byte("x"))
		tx.Append(note("created"))
		return boom
	})
	if !errors.Is(err, boom) {
		t.Fatal(err)
	}
	if n := len(events(t, l)); n != 0 {
		t.Errorf("%d events of an update that failed", n)
	}
	err = l.Update(t.Context(), func(tx *ledger.Tx) error {
		if v := tx.Get(ledger.Keys, "a/1"); len(v) != 0 {
			t.Errorf("found %q", v)
		}
		tx.Put(ledger.Keys, "b/1", []byte("y"))
		tx.Put(ledger.Keys, "a/1", []byte("x"))
		tx.Put(ledger.Peers, "p", []byte("z"))
		tx.Delete(ledger.Peers, "p")
		return tx.Append(note("created"))
	})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	l.All(ledger.Keys, func(k string, v []byte) error { got = append(got, k+"="+string(v)); return nil })
	l.All(ledger.Peers, func(k string, v []byte) error { got = append(got, k); return nil })
	if fmt.Sprint(got) != "[a/1=x b/1=y]" || len(events(t, l)) != 1 {
		t.Errorf("%q, %q", got, events(t, l))
	}
}

func TestACallerThatLeavesWaitsForNobody(t *testing.T) {
	l, _ := create(t)
	release := l.Occupy()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := l.Admit(ctx, admission("k", 1, 1, 1), event)
		done <- err
	}()
	for l.Waiting() == 0 {
		runtime.Gosched()
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	release()
	// The request was in the queue, so the writer has executed it: the nonce is spent.
	mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Repeated)
}

func TestClosedLedger(t *testing.T) {
	l, path := create(t)
	release := l.Occupy()
	if err := l.Settle(t.Context(), ledger.Admitted{}, nil, note("last words"), nil); err != nil {
		t.Fatal(err)
	}
	release()
	l.Close()
	if _, err := l.Append(t.Context(), note("")); !errors.Is(err, ledger.ErrClosed) {
		t.Errorf("%v", err)
	}
	if got := events(t, open(t, path)); len(got) != 1 {
		t.Errorf("an outcome in the queue before Close is lost: %q", got)
	}
}

func TestCreateAndOpenRefuse(t *testing.T) {
	l, path := create(t)
	if err := ledger.Create(path, ledger.Options{}); !errors.Is(err, ledger.ErrExists) {
		t.Errorf("create over a ledger: %v", err)
	}
	if _, err := ledgertest.Open(t, path, ledger.Options{}); !errors.Is(err, ledger.ErrInUse) {
		t.Errorf("second open: %v", err)
	}
	l.Close()
	dir := t.TempDir()
	if _, err := ledgertest.Open(t, filepath.Join(dir, "none"), ledger.Options{}); !errors.Is(err, ledger.ErrMissing) {
		t.Errorf("no file: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "none")); err == nil {
		t.Error("Open has made a file")
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	foreign := filepath.Join(dir, "foreign")
	db, err := bolt.Open(foreign, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	db.Close()
	foreignBytes, _ := os.ReadFile(foreign)
	for name, content := range map[string][]byte{
		"empty": {}, "text": []byte("not a database"), "zeros": make([]byte, 65536), "half": whole[:len(whole)/2],
		"one page": whole[:4096], "metas only": whole[:8192], "another bbolt file": foreignBytes,
	} {
		p := filepath.Join(dir, name) // a file for each case: bbolt keeps the lock after a failed open
		if err := os.WriteFile(p, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if l, err := ledgertest.Open(t, p, ledger.Options{}); !errors.Is(err, ledger.ErrCorrupt) {
			t.Errorf("%s: %v, want %v", name, err, ledger.ErrCorrupt)
			if err == nil {
				l.Close()
			}
		}
	}
	newer := filepath.Join(dir, "newer")
	if err := ledger.Create(newer, ledger.Options{}); err != nil {
		t.Fatal(err)
	}
	db, err = bolt.Open(newer, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	db.Update(func(tx *bolt.Tx) error {
		return tx.Bucket([]byte("meta")).Put([]byte("format"), []byte{0, 0, 0, 99})
	})
	db.Close()
	if _, err := ledgertest.Open(t, newer, ledger.Options{}); !errors.Is(err, ledger.ErrFormat) {
		t.Errorf("newer format: %v", err)
	}
	// The temporary file of an earlier Create that crashed does not disturb.
	fresh := filepath.Join(dir, "fresh")
	if err := os.WriteFile(fresh+".new", []byte("half a ledger"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := ledger.Create(fresh, ledger.Options{}); err != nil {
		t.Errorf("create after a crash: %v", err)
	}
	if st, err := os.Stat(fresh); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	if _, err := os.Stat(fresh + ".new"); err == nil {
		t.Error("the temporary file is still there")
	}
}

// TestCommitsReachTheDisk checks that bbolt's fdatasync is on. TestPowerCuts tests the effect.
func TestCommitsReachTheDisk(t *testing.T) {
	l, _ := create(t)
	if !l.Synced() {
		t.Error("commits are not synced to disk")
	}
}
