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

// createOn creates a ledger on a disk whose operations the test can let fail.
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

// TestBrokenDisk lets the operations of the disk fail in different ways, and checks the errors of
// the ledger and its recovery.
func TestBrokenDisk(t *testing.T) {
	disk := disktest.New(t)
	t.Run("full", func(t *testing.T) { fullDisk(t, disk) })
	t.Run("full at the start", func(t *testing.T) { fullAtTheStart(t, disk) })
	t.Run("many outcomes wait", func(t *testing.T) { manyOutcomesWait(t, disk) })

	onLedger := func(kind disktest.Kind, op disktest.Op) bool {
		return op.Kind == kind && strings.HasSuffix(op.Path, "ledger.db")
	}
	t.Run("read only", func(t *testing.T) {
		brokenTemporarily(t, disk, syscall.EROFS, noSync)
	})
	t.Run("a page can't be written", func(t *testing.T) {
		dataPage := func(op disktest.Op) bool { return onLedger(disktest.Write, op) && op.Offset >= 8192 }
		brokenTemporarily(t, disk, syscall.EIO, dataPage)
	})
	t.Run("pages can't be synced", func(t *testing.T) {
		brokenTemporarily(t, disk, syscall.EIO, func(op disktest.Op) bool { return onLedger(disktest.Datasync, op) })
	})
	t.Run("the page that counts can't be synced", func(t *testing.T) { unknownState(t, disk) })
	t.Run("the file can't grow", func(t *testing.T) { cannotGrow(t, disk) })
}

// noSync reports whether an operation is no sync of a file.
func noSync(op disktest.Op) bool { return op.Kind != disktest.Datasync && op.Kind != disktest.Sync }

// failing returns a function for Disk.Fail. The operations that breaks selects fail with errno.
func failing(errno syscall.Errno, breaks func(disktest.Op) bool) func(disktest.Op) syscall.Errno {
	return func(op disktest.Op) syscall.Errno {
		if breaks(op) {
			return errno
		}
		return 0
	}
}

// admitWhenHealed repeats an admission until the ledger admits, for at most 20 s: the ledger tries
// to acquire the reserve at intervals.
func admitWhenHealed(t *testing.T, l *ledger.Ledger, a ledger.Admission) ledger.Admitted {
	t.Helper()
	for range 1000 {
		switch got, err := l.Admit(t.Context(), a, event); {
		case err == nil:
			if err := l.Trouble(); err != nil {
				t.Errorf("admissions work, and Trouble is %v", err)
			}
			return got
		case !errors.Is(err, ledger.ErrDisk):
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatal("admissions still fail")
	return ledger.Admitted{}
}

// brokenTemporarily checks a disk that fails for a while. Admissions and other writes fail and
// leave nothing behind, repetitions work, and outcomes wait. When the disk works again, so does the
// ledger.
func brokenTemporarily(t *testing.T, disk *disktest.Disk, errno syscall.Errno, breaks func(disktest.Op) bool) {
	l, path := createOn(t, disk)
	first := mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Fresh)
	disk.Fail(failing(errno, breaks))
	if _, err := l.Append(t.Context(), note("not written")); !errors.Is(err, ledger.ErrDisk) {
		t.Error(err)
	}
	disk.Fail(nil)
	if err := errors.Join(l.Alive(t.Context()), l.Trouble()); err != nil {
		t.Errorf("the disk works, no outcome waits, and Alive has not tried it: %v", err)
	}
	disk.Fail(failing(errno, breaks))
	before := l.Commits()
	for range 2 {
		r, err := l.Admit(t.Context(), admission("k", 2, 1, 1), event)
		if !errors.Is(err, ledger.ErrDisk) || !errors.Is(err, errno) {
			t.Errorf("verdict %d, %v", r.Verdict, err)
		}
		if _, err := l.Append(t.Context(), note("not written")); !errors.Is(err, ledger.ErrDisk) {
			t.Error(err)
		}
	}
	receipt := &ledger.Receipt{ID: ledger.ReceiptID{1}, TimeMS: 1}
	if err := l.Settle(t.Context(), first, []byte("signature"), note("settled"), receipt); err != nil {
		t.Error(err)
	}
	refusal := errors.New("refused")
	if err := l.Update(t.Context(), func(*ledger.Tx) error { return refusal }); !errors.Is(err, refusal) {
		t.Errorf("an update whose function fails: %v", err)
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
		t.Errorf("the disk works, and Alive has not tried it: %v", err)
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

// fullDisk checks a full disk. Outcomes and events use the space of the reserve, and admissions
// fail. When the reserve is used up, outcomes wait.
func fullDisk(t *testing.T, disk *disktest.Disk) {
	l, path := createOn(t, disk)
	first := mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Fresh)
	second := mustAdmit(t, l, admission("k", 2, 1, 1), ledger.Fresh)
	var released, used atomic.Bool // of the reserve
	disk.Fail(failing(syscall.ENOSPC, func(op disktest.Op) bool {
		if op.Kind == disktest.Truncate && strings.HasSuffix(op.Path, ".reserve") {
			released.Store(true)
		}
		hasSpace := released.Load() && !used.Load()
		return op.Kind == disktest.Allocate || op.Kind == disktest.Write && !hasSpace
	}))
	admit := func() {
		t.Helper()
		r, err := l.Admit(t.Context(), admission("k", 3, 1, 1), event)
		if !errors.Is(err, ledger.ErrDisk) || !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("verdict %d, %v", r.Verdict, err)
		}
		if _, err := l.Spent(t.Context(), "k", [32]byte{3}); !errors.Is(err, ledger.ErrNotFound) {
			t.Errorf("the nonce of a failed admission: %v", err)
		}
	}
	admit()
	if err := l.Settle(t.Context(), first, []byte("first"), note("first settled"), nil); err != nil {
		t.Error(err)
	}
	if _, err := l.Append(t.Context(), note("disk full")); err != nil {
		t.Errorf("the reserve is not used: %v", err)
	}
	admit() // admissions do not use the reserve
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
	if got := admitWhenHealed(t, l, admission("k", 3, 1, 1)); got.Verdict != ledger.Fresh {
		t.Errorf("verdict %d", got.Verdict)
	}
	for range 2 {
		if r := mustAdmit(t, l, admission("k", 2, 1, 1), ledger.Repeated); string(r.Signature) != "second" {
			t.Errorf("the outcome is %q", r.Signature)
		}
		want := "[verdict 1 verdict 1 first settled disk full second settled verdict 1]"
		if got := events(t, l); fmt.Sprint(got) != want {
			t.Errorf("%q, want %s", got, want)
		}
		l.Close()
		l = open(t, path)
	}
	if st, err := os.Stat(path + ".reserve"); err != nil || st.Size() < 1<<20 {
		t.Errorf("the reserve was not acquired again: %v, %v", st, err)
	}
	l.Close()
}

// fullAtTheStart checks that a ledger opens on a full disk without a reserve, reports Trouble, and
// admits when the disk has space.
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
		t.Error("Trouble is nil, and there is no reserve")
	}
	disk.Fail(nil)
	if got := admitWhenHealed(t, l, admission("k", 2, 1, 1)); got.Verdict != ledger.Fresh {
		t.Errorf("verdict %d", got.Verdict)
	}
	l.Close()
}

// manyOutcomesWait checks that 3,000 outcomes wait while the disk fails, and are written in order
// when the disk works, at Close at the latest. Other requests fail in between.
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
	if err := l.Alive(t.Context()); err != nil { // the writer has tried all outcomes
		t.Error(err)
	}
	disk.Fail(nil)
	l.Close()
	l = open(t, path)
	got := events(t, l)
	inOrder := slices.IsSortedFunc(got, func(a, b string) int { return len(a) - len(b) })
	if len(got) != n || got[0] != "0" || got[n-1] != fmt.Sprint(n-1) || !inOrder {
		t.Errorf("%d events, want %d in order", len(got), n)
	}
	l.Close()
}

// unknownState checks a meta page that is written and not synced. The ledger ends with
// ErrUnknownState, and a new opening finds out whether the transaction was written.
func unknownState(t *testing.T, disk *disktest.Disk) {
	l, path := createOn(t, disk)
	mustAdmit(t, l, admission("k", 1, 1, 1), ledger.Fresh)
	var syncs atomic.Int32
	disk.Fail(failing(syscall.EIO, func(op disktest.Op) bool {
		return op.Kind == disktest.Datasync && syncs.Add(1) == 2
	}))
	r, err := l.Admit(t.Context(), admission("k", 2, 1, 1), event)
	if !errors.Is(err, ledger.ErrUnknownState) || errors.Is(err, ledger.ErrDisk) {
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
	mustAdmit(t, l, admission("k", 2, 1, 1), ledger.Repeated) // this file system has kept the page
	mustAdmit(t, l, admission("k", 3, 1, 1), ledger.Fresh)
	l.Close()
}

// cannotGrow checks that a transaction is not written if the file can't grow, and that the ledger
// goes on.
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
				t.Errorf("the reserve was not released: %v, %v", st, err)
			}
		}
	}
	disk.Fail(nil)
	admitWhenHealed(t, l, admission("k", 1, 1, 1))
	if err := l.Update(t.Context(), large); err != nil {
		t.Error(err)
	}
	if got := events(t, l); fmt.Sprint(got) != "[verdict 1 large]" {
		t.Errorf("%q", got)
	}
	l.Close()
}

// TestFullFileSystem fills a real file system of 32 MiB. The test binary runs again as root of a
// user namespace, where root may mount a tmpfs.
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
	if got := admitWhenHealed(t, l, admission("k", 2, 1, 1)); got.Verdict != ledger.Fresh {
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

// TestFollow checks that a follower gets each record after the commit and before the next request,
// and never gets a record that was not written.
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
			t.Errorf("%s: the follower has seen %q, want %q", what, seen, all)
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
	want("after a failed write")
	release := l.Occupy()
	done := make(chan error, 2)
	go func() { done <- put("first", nil) }()
	for l.Waiting() < 1 {
		runtime.Gosched()
	}
	go func() {
		done <- l.Update(t.Context(), func(tx *ledger.Tx) error {
			want("the next request", "meta first [118]", "peers first []")
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
		t.Errorf("after the deletion the follower has seen %q", seen)
	}
	seen = nil
	l.Close()
	again := open(t, path)
	follow(again)
	want("a new start", "peers before []", "peers first []", "meta before [118]")
}

// TestFollowFails checks an error of Take. At the start, Follow returns the error. Later the ledger
// ends, because the memory would differ from the disk.
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
		t.Errorf("a follower with an error at the start gets records: %v", err)
	}
}

// TestOwnRecords checks that no Update can change the ledger's own records, or a bucket that is no
// table.
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
				continue // a delete of an empty key is no error
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
		t.Errorf("a record of the ledger itself is listed: %v", err)
	}
	l.Close()
	open(t, path)
}

// TestSuspended checks admissions in the queue when the ledger is suspended. All fail, even a
// repetition.
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
