package ledger_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/ledger/disktest"
)

// createOn makes a ledger on a disk that the test can break.
func createOn(t *testing.T, disk *disktest.Disk) (*ledger.Ledger, string) {
	t.Helper()
	dir, err := os.MkdirTemp(disk.Dir(), "")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "ledger.db")
	if err := ledger.Create(path, ledger.Options{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { disk.Fail(nil); checkFile(t, path) })
	return open(t, path), path
}

// TestBrokenDisk breaks the disk in each way, and holds the ledger against what it says about that.
func TestBrokenDisk(t *testing.T) {
	disk := disktest.New(t)
	t.Run("full", func(t *testing.T) { fullDisk(t, disk) })
	t.Run("full at the start", func(t *testing.T) { fullAtTheStart(t, disk) })
	t.Run("many outcomes wait", func(t *testing.T) { manyOutcomesWait(t, disk) })

	onLedger := func(kind disktest.Kind, op disktest.Op) bool {
		return op.Kind == kind && strings.HasSuffix(op.Path, "ledger.db")
	}
	t.Run("read only", func(t *testing.T) {
		brokenForAWhile(t, disk, syscall.EROFS, func(op disktest.Op) bool { return op.Kind != disktest.Datasync && op.Kind != disktest.Sync })
	})
	t.Run("a page can't be written", func(t *testing.T) {
		brokenForAWhile(t, disk, syscall.EIO, func(op disktest.Op) bool { return onLedger(disktest.Write, op) && op.Offset >= 8192 })
	})
	t.Run("pages can't be synced", func(t *testing.T) {
		brokenForAWhile(t, disk, syscall.EIO, func(op disktest.Op) bool { return onLedger(disktest.Datasync, op) })
	})
	t.Run("the page that counts can't be synced", func(t *testing.T) { unknownState(t, disk) })
	t.Run("the file can't grow", func(t *testing.T) { cannotGrow(t, disk) })
}

func failing(errno syscall.Errno, breaks func(disktest.Op) bool) func(disktest.Op) syscall.Errno {
	return func(op disktest.Op) syscall.Errno {
		if breaks(op) {
			return errno
		}
		return 0
	}
}

// healed waits until something is admitted again: the ledger does not try the reserve all the time.
func healed(t *testing.T, l *ledger.Ledger, a ledger.Admission) ledger.Admitted {
	t.Helper()
	for range 1000 {
		switch got, err := l.Admit(t.Context(), a, event); {
		case err == nil:
			if err := l.Trouble(); err != nil {
				t.Errorf("it is well again, and says: %v", err)
			}
			return got
		case !errors.Is(err, ledger.ErrDisk):
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatal("it does not get well")
	return ledger.Admitted{}
}

// brokenForAWhile: nothing is admitted, nothing of what was asked for is kept, what needs no writing goes on, outcomes wait, and
// when the disk is well again, so is the ledger.
func brokenForAWhile(t *testing.T, disk *disktest.Disk, errno syscall.Errno, breaks func(disktest.Op) bool) {
	l, path := createOn(t, disk)
	first := mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Fresh)
	disk.Fail(failing(errno, breaks))
	if _, err := l.Append(t.Context(), note("not written")); !errors.Is(err, ledger.ErrDisk) {
		t.Error(err)
	}
	disk.Fail(nil)
	if err := errors.Join(l.Alive(t.Context()), l.Trouble()); err != nil {
		t.Errorf("the disk is well again, nothing waits, and Alive has not found out: %v", err)
	}
	disk.Fail(failing(errno, breaks))
	before := l.Commits()
	for range 2 {
		if r, err := l.Admit(t.Context(), admission("k", 2, 1, 1), event); !errors.Is(err, ledger.ErrDisk) || !errors.Is(err, errno) {
			t.Errorf("verdict %d, %v", r.Verdict, err)
		}
		if _, err := l.Append(t.Context(), note("not written")); !errors.Is(err, ledger.ErrDisk) {
			t.Error(err)
		}
	}
	if err := l.Settle(t.Context(), first, []byte("signature"), note("settled"), &ledger.Receipt{ID: ledger.ReceiptID{1}, TimeMS: 1}); err != nil {
		t.Error(err)
	}
	refusal := errors.New("refused")
	if err := l.Update(t.Context(), func(*ledger.Tx) error { return refusal }); !errors.Is(err, refusal) {
		t.Errorf("an update that fails by itself: %v", err)
	}
	mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Repeated)
	if err := l.Alive(t.Context()); err != nil {
		t.Errorf("the writer is alive: %v", err)
	}
	if err := l.Trouble(); !errors.Is(err, ledger.ErrDisk) {
		t.Errorf("trouble: %v", err)
	}
	if l.Commits() != before || len(events(t, l)) != 1 {
		t.Errorf("%d commits, events %q", l.Commits()-before, events(t, l))
	}
	disk.Fail(nil)
	if err := errors.Join(l.Alive(t.Context()), l.Trouble()); err != nil {
		t.Errorf("the disk is well again, and Alive has not found out: %v", err)
	}
	for range 2 {
		if r := mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Repeated); string(r.Signature) != "signature" {
			t.Errorf("the outcome is %q", r.Signature)
		}
		if _, err := l.Receipt(ledger.ReceiptID{1}); err != nil {
			t.Error(err)
		}
		if got := events(t, l); fmt.Sprint(got) != "[verdict 1 settled]" {
			t.Errorf("%q", got)
		}
		l.Close()
		l = open(t, path)
	}
	mustAdmit(t, l, admission("k", 2, 1, 1), ledger.Fresh)
	l.Close()
}

// fullDisk: the reserve has room for outcomes and events, nothing is admitted, and when the reserve is used up outcomes wait.
func fullDisk(t *testing.T, disk *disktest.Disk) {
	l, path := createOn(t, disk)
	first := mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Fresh)
	second := mustAdmit(t, l, admission("k", 2, 1, 1), ledger.Fresh)
	var given, used atomic.Bool
	disk.Fail(failing(syscall.ENOSPC, func(op disktest.Op) bool {
		if op.Kind == disktest.Truncate && strings.HasSuffix(op.Path, ".reserve") {
			given.Store(true)
		}
		return op.Kind == disktest.Allocate || op.Kind == disktest.Write && (!given.Load() || used.Load())
	}))
	admit := func() {
		t.Helper()
		if r, err := l.Admit(t.Context(), admission("k", 3, 1, 1), event); !errors.Is(err, ledger.ErrDisk) || !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("verdict %d, %v", r.Verdict, err)
		}
		if _, err := l.Spent(t.Context(), "k", [32]byte{3}); !errors.Is(err, ledger.ErrNotFound) {
			t.Errorf("the nonce of what was refused: %v", err)
		}
	}
	admit()
	if err := l.Settle(t.Context(), first, []byte("first"), note("first settled"), nil); err != nil {
		t.Error(err)
	}
	if _, err := l.Append(t.Context(), note("disk full")); err != nil {
		t.Errorf("the reserve is not used: %v", err)
	}
	admit() // the reserve is not for this
	if err := l.Trouble(); !errors.Is(err, ledger.ErrDisk) {
		t.Errorf("trouble: %v", err)
	}
	used.Store(true)
	if _, err := l.Append(t.Context(), note("not written")); !errors.Is(err, ledger.ErrDisk) {
		t.Error(err)
	}
	if err := l.Settle(t.Context(), second, []byte("second"), note("second settled"), nil); err != nil {
		t.Error(err)
	}
	admit()
	if got := events(t, l); fmt.Sprint(got) != "[verdict 1 verdict 1 first settled disk full]" {
		t.Errorf("%q", got)
	}
	disk.Fail(nil)
	if got := healed(t, l, admission("k", 3, 1, 1)); got.Verdict != ledger.Fresh {
		t.Errorf("verdict %d", got.Verdict)
	}
	for range 2 {
		if r := mustAdmit(t, l, admission("k", 2, 1, 1), ledger.Repeated); string(r.Signature) != "second" {
			t.Errorf("the outcome is %q", r.Signature)
		}
		if got := events(t, l); fmt.Sprint(got) != "[verdict 1 verdict 1 first settled disk full second settled verdict 1]" {
			t.Errorf("%q", got)
		}
		l.Close()
		l = open(t, path)
	}
	if st, err := os.Stat(path + ".reserve"); err != nil || st.Size() < 1<<20 {
		t.Errorf("the reserve was not taken again: %v, %v", st, err)
	}
	l.Close()
}

// fullAtTheStart: a ledger opens without room for its reserve, says so, and admits once there is room.
func fullAtTheStart(t *testing.T, disk *disktest.Disk) {
	l, path := createOn(t, disk)
	mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Fresh)
	l.Close()
	if err := os.Remove(path + ".reserve"); err != nil {
		t.Fatal(err)
	}
	disk.Fail(failing(syscall.ENOSPC, func(op disktest.Op) bool { return op.Kind == disktest.Allocate }))
	l = open(t, path)
	if err := l.Trouble(); !errors.Is(err, ledger.ErrDisk) {
		t.Errorf("trouble: %v", err)
	}
	if r, err := l.Admit(t.Context(), admission("k", 2, 1, 1), event); !errors.Is(err, ledger.ErrDisk) {
		t.Errorf("verdict %d, %v", r.Verdict, err)
	}
	if _, err := l.Append(t.Context(), note("started")); err != nil {
		t.Error(err)
	}
	if l.Trouble() == nil {
		t.Error("there is no reserve yet")
	}
	disk.Fail(nil)
	if got := healed(t, l, admission("k", 2, 1, 1)); got.Verdict != ledger.Fresh {
		t.Errorf("verdict %d", got.Verdict)
	}
	l.Close()
}

// manyOutcomesWait: all outcomes that come while the disk takes nothing are written when it does, in their order, though
// requests that fail by themselves come in between, and at Close at the latest.
func manyOutcomesWait(t *testing.T, disk *disktest.Disk) {
	const n = 3000
	l, path := createOn(t, disk)
	disk.Fail(failing(syscall.EIO, func(op disktest.Op) bool { return op.Kind == disktest.Write }))
	if _, err := l.Append(t.Context(), note("not written")); !errors.Is(err, ledger.ErrDisk) {
		t.Error(err)
	}
	for i := range n {
		if err := l.Settle(t.Context(), ledger.Admitted{}, nil, note(fmt.Sprint(i)), nil); err != nil {
			t.Fatal(err)
		}
		if i%1000 == 0 {
			if _, err := l.EndEpoch(t.Context(), audit.Daemon()); !errors.Is(err, ledger.ErrDisk) {
				t.Error(err)
			}
		}
	}
	if err := l.Alive(t.Context()); err != nil { // all of them were tried
		t.Error(err)
	}
	disk.Fail(nil)
	l.Close()
	l = open(t, path)
	if got := events(t, l); len(got) != n || got[0] != "0" || got[n-1] != fmt.Sprint(n-1) || !slices.IsSortedFunc(got, func(a, b string) int {
		return len(a) - len(b)
	}) {
		t.Errorf("%d events of %d", len(got), n)
	}
	l.Close()
}

// unknownState: where the page that counts was written and not synced, the ledger ends, and opening it again says which it was.
func unknownState(t *testing.T, disk *disktest.Disk) {
	l, path := createOn(t, disk)
	mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Fresh)
	var syncs atomic.Int32
	disk.Fail(failing(syscall.EIO, func(op disktest.Op) bool { return op.Kind == disktest.Datasync && syncs.Add(1) == 2 }))
	if r, err := l.Admit(t.Context(), admission("k", 2, 1, 1), event); !errors.Is(err, ledger.ErrUnknownState) || errors.Is(err, ledger.ErrDisk) {
		t.Errorf("verdict %d, %v", r.Verdict, err)
	}
	select {
	case <-l.Failed():
	default:
		t.Error("Failed is not closed")
	}
	disk.Fail(nil)
	for _, a := range []ledger.Admission{admission("k", 1, 1, 1), admission("k", 2, 1, 1), admission("k", 3, 1, 1)} {
		if r, err := l.Admit(t.Context(), a, event); !errors.Is(err, ledger.ErrUnknownState) {
			t.Errorf("verdict %d, %v", r.Verdict, err)
		}
	}
	if err := l.Alive(t.Context()); !errors.Is(err, ledger.ErrUnknownState) {
		t.Errorf("%v", err)
	}
	l.Close()
	l = open(t, path)
	mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Repeated)
	mustAdmit(t, l, admission("k", 2, 1, 1), ledger.Repeated) // this file system has kept it
	mustAdmit(t, l, admission("k", 3, 1, 1), ledger.Fresh)
	l.Close()
}

// cannotGrow: a transaction for which the file must grow is not written, and the ledger goes on.
func cannotGrow(t *testing.T, disk *disktest.Disk) {
	l, path := createOn(t, disk)
	large := func(tx *ledger.Tx) error {
		return errors.Join(tx.Put(ledger.Keys, "large", make([]byte, 1<<20)), tx.Append(note("large")))
	}
	for _, errno := range []syscall.Errno{syscall.EIO, syscall.ENOSPC} {
		disk.Fail(failing(errno, func(op disktest.Op) bool {
			return op.Kind == disktest.Truncate && strings.HasSuffix(op.Path, "ledger.db")
		}))
		if err := l.Update(t.Context(), large); !errors.Is(err, ledger.ErrDisk) {
			t.Error(err)
		}
		if errno == syscall.ENOSPC {
			if st, err := os.Stat(path + ".reserve"); err != nil || st.Size() != 0 {
				t.Errorf("the reserve was not given up: %v, %v", st, err)
			}
		}
	}
	disk.Fail(nil)
	healed(t, l, admission("k", 1, 1, 1))
	if err := l.Update(t.Context(), large); err != nil {
		t.Error(err)
	}
	if got := events(t, l); fmt.Sprint(got) != "[verdict 1 large]" {
		t.Errorf("%q", got)
	}
	l.Close()
}

// TestFullFileSystem fills a small file system for real. It runs again as root of a user namespace, who may mount one there.
func TestFullFileSystem(t *testing.T) {
	const inside = "LEDGER_TEST_NAMESPACE"
	if os.Getenv(inside) == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestFullFileSystem$")
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
			UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
		}
		out, err := cmd.CombinedOutput()
		if exit := new(exec.ExitError); errors.As(err, &exit) {
			t.Errorf("%v\n%s", err, out)
		} else if err != nil && os.Getenv("REQUIRE_DEVICES") == "1" {
			t.Fatalf("user namespaces are required: %v", err)
		} else if err != nil {
			t.Skipf("there are no user namespaces here: %v", err)
		}
		return
	}
	dir := t.TempDir()
	if err := syscall.Mount("ledger", dir, "tmpfs", 0, "size=32m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	path := filepath.Join(dir, "ledger.db")
	if err := ledger.Create(path, ledger.Options{}); err != nil {
		t.Fatal(err)
	}
	l := open(t, path)
	first := mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Fresh)
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 32<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	large := func(tx *ledger.Tx) error {
		return errors.Join(tx.Put(ledger.Keys, "large", make([]byte, 10<<20)), tx.Append(note("large")))
	}
	if err := l.Update(t.Context(), large); !errors.Is(err, ledger.ErrDisk) || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("%v", err)
	}
	if r, err := l.Admit(t.Context(), admission("k", 2, 1, 1), event); !errors.Is(err, ledger.ErrDisk) {
		t.Errorf("verdict %d, %v", r.Verdict, err)
	}
	if err := l.Settle(t.Context(), first, []byte("signature"), note("settled"), nil); err != nil {
		t.Error(err)
	}
	if _, err := l.Append(t.Context(), note("disk full")); err != nil {
		t.Error(err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	if got := healed(t, l, admission("k", 2, 1, 1)); got.Verdict != ledger.Fresh {
		t.Errorf("verdict %d", got.Verdict)
	}
	l.Close()
	l = open(t, path)
	if r := mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Repeated); string(r.Signature) != "signature" {
		t.Errorf("the outcome is %q", r.Signature)
	}
	if got := events(t, l); fmt.Sprint(got) != "[verdict 1 settled disk full verdict 1]" {
		t.Errorf("%q", got)
	}
	l.Close()
	checkFile(t, path)
}

// TestFollow holds memory against the disk: a follower sees each record once it is on disk, before
// anything that comes later is decided, and never a record that was not written.
func TestFollow(t *testing.T) {
	disk := disktest.New(t)
	l, path := createOn(t, disk)
	defer l.Close()
	put := func(key string, err error) error {
		return l.Update(t.Context(), func(tx *ledger.Tx) error {
			return errors.Join(err, tx.Put(ledger.Meta, key, []byte("v")), tx.Put(ledger.Peers, key, []byte{}))
		})
	}
	if err := put("before", nil); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var seen []string
	take := func(table string) ledger.Record {
		return func(key string, value []byte) error {
			if mu.TryLock() {
				t.Error("the lock is not held")
			}
			seen = append(seen, fmt.Sprintf("%s %s %v", table, key, value))
			return nil
		}
	}
	follow := func(l *ledger.Ledger) {
		t.Helper()
		err := l.Follow(t.Context(), &mu, ledger.Followed{Table: ledger.Peers, Take: take("peers")},
			ledger.Followed{Table: ledger.Meta, Take: take("meta")})
		if err != nil {
			t.Fatal(err)
		}
	}
	follow(l)
	want := func(what string, all ...string) {
		t.Helper()
		mu.Lock()
		defer mu.Unlock()
		if !slices.Equal(seen, all) {
			t.Errorf("%s: it has seen %q, want %q", what, seen, all)
		}
		seen = nil
	}
	want("the start", "peers before []", "meta before [118]")
	if err := put("refused", errSpent); !errors.Is(err, errSpent) {
		t.Error(err)
	}
	disk.Fail(failing(syscall.EIO, func(op disktest.Op) bool { return op.Kind == disktest.Write }))
	if err := put("lost", nil); !errors.Is(err, ledger.ErrDisk) {
		t.Error(err)
	}
	disk.Fail(nil)
	want("what was not written")
	release := l.Occupy()
	done := make(chan error, 2)
	go func() { done <- put("first", nil) }()
	for l.Waiting() < 1 {
		runtime.Gosched()
	}
	go func() {
		done <- l.Update(t.Context(), func(tx *ledger.Tx) error {
			want("the decision after it", "meta first [118]", "peers first []")
			return tx.Delete(ledger.Meta, "first")
		})
	}()
	for l.Waiting() < 2 {
		runtime.Gosched()
	}
	release()
	if err := errors.Join(<-done, <-done); err != nil {
		t.Error(err)
	}
	if seen[0] != "meta first []" || len(seen) != 1 {
		t.Errorf("after the deletion it has seen %q", seen)
	}
	seen = nil
	l.Close()
	again := open(t, path)
	follow(again)
	want("a new start", "peers before []", "peers first []", "meta before [118]")
}

// TestFollowFails: memory that can't take a record is an error at the start, and the end of a ledger
// that runs, since memory would say something else than the disk.
func TestFollowFails(t *testing.T) {
	l, path := create(t)
	put := func() error {
		return l.Update(t.Context(), func(tx *ledger.Tx) error { return tx.Put(ledger.Keys, "k", []byte("v")) })
	}
	broken := ledger.Followed{Table: ledger.Keys, Take: func(string, []byte) error { return errSpent }}
	if err := l.Follow(t.Context(), new(sync.Mutex), broken); err != nil {
		t.Fatal(err)
	}
	if err := put(); !errors.Is(err, ledger.ErrUnknownState) || !errors.Is(err, errSpent) {
		t.Error(err)
	}
	<-l.Failed()
	l.Close()
	l = open(t, path)
	if err := l.Follow(t.Context(), new(sync.Mutex), broken); !errors.Is(err, errSpent) {
		t.Errorf("at the start: %v", err)
	}
	if err := put(); err != nil {
		t.Errorf("a follower that was refused at the start follows all the same: %v", err)
	}
}

// TestOwnRecords: no Update can write the ledger's own records, or a bucket that is no table.
func TestOwnRecords(t *testing.T) {
	l, path := create(t)
	for _, at := range []struct {
		table ledger.Table
		key   string
	}{{ledger.Meta, "format"}, {ledger.Meta, "time"}, {"nonces", "k"}, {"epochs", "k"}, {"", "k"}, {ledger.Keys, ""}} {
		for what, change := range map[string]func(*ledger.Tx) error{
			"put":    func(tx *ledger.Tx) error { return tx.Put(at.table, at.key, []byte("x")) },
			"delete": func(tx *ledger.Tx) error { return tx.Delete(at.table, at.key) },
		} {
			if at.key == "" && what == "delete" {
				continue // nothing to delete
			}
			if err := l.Update(t.Context(), change); err == nil {
				t.Errorf("%s of %q in %q", what, at.key, at.table)
			}
		}
	}
	if v, err := l.Get(ledger.Meta, "format"); v != nil || err != nil {
		t.Errorf("the format is shown: %x, %v", v, err)
	}
	if err := l.All(ledger.Meta, func(key string, _ []byte) error { return errors.New(key) }); err != nil {
		t.Errorf("a record of its own is listed: %v", err)
	}
	l.Close()
	open(t, path)
}

// TestSuspended: what has come to the ledger before it was suspended, and is decided afterwards, is not admitted, nor is it a repetition.
func TestSuspended(t *testing.T) {
	l, _ := create(t)
	mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Fresh)
	release := l.Occupy()
	done := make(chan error, 2)
	for n := range byte(2) {
		go func() { _, err := l.Admit(t.Context(), admission("k", 1+n, 1, 1), event); done <- err }()
	}
	for l.Waiting() < 2 {
		runtime.Gosched()
	}
	l.Suspend(errSpent)
	release()
	for range 2 {
		if err := <-done; !errors.Is(err, errSpent) {
			t.Errorf("%v", err)
		}
	}
	l.Suspend(nil)
	mustAdmit(t, l, admission("k", 2, 1, 1), ledger.Fresh)
}

func TestLastNumber(t *testing.T) {
	l, _ := create(t)
	for _, to := range []uint64{0, 7, 9} {
		if to > 0 {
			a := admission("k", byte(to), 1, 1)
			a.Monotonic = &ledger.Monotonic{Series: "s", Value: to}
			a.Decide = func([]ledger.Used) ([]byte, error) { return nil, nil }
			mustAdmit(t, l, a, ledger.Fresh)
		}
		if got, err := l.LastNumber("s"); got != to || err != nil {
			t.Errorf("%d, %v; want %d", got, err, to)
		}
	}
}
