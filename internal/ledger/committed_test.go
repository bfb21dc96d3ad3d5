package ledger_test

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"countersign/internal/ledger"
)

// TestCommittedIsTold: Committed is told of each transaction that has written, with the time for
// the disk as a part of its time.
func TestCommittedIsTold(t *testing.T) {
	var commits, requests atomic.Int64
	m := newMachine(t, ledger.Options{Committed: func(n int, took, disk time.Duration, err error) {
		commits.Add(1)
		requests.Add(int64(n))
		if n < 1 || disk <= 0 || took < disk || err != nil {
			t.Errorf("%d requests, %v, %v for the disk, %v", n, took, disk, err)
		}
	}})
	l := m.open(t)
	defer l.Close()
	before := commits.Load()
	for n := range 5 {
		if _, err := l.Append(t.Context(), note(fmt.Sprint(n))); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Alive(t.Context()); err != nil { // writes nothing
		t.Fatal(err)
	}
	if n := commits.Load() - before; n != 5 || requests.Load() < 5 {
		t.Errorf("%d commits with %d requests", n, requests.Load())
	}
	load, err := l.Load()
	if err != nil || load.Waiting != 0 || load.Backlog != 0 || load.DiskFree == 0 {
		t.Errorf("%+v, %v", load, err)
	}
}
