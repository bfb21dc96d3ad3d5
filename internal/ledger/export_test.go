package ledger

import (
	"context"
	"encoding/binary"
	"os"

	bolt "go.etcd.io/bbolt"
)

// CaptureFile makes the next Open hand its file to the test, which may then break it.
func CaptureFile() (file func() *os.File, restore func()) {
	var last *os.File
	openFile = func(name string, flag int, perm os.FileMode) (*os.File, error) {
		f, err := os.OpenFile(name, flag, perm)
		last = f
		return f, err
	}
	return func() *os.File { return last }, func() { openFile = os.OpenFile }
}

// Occupy keeps the writer busy until release is called, so that requests pile up behind it.
func (l *Ledger) Occupy() (release func()) {
	held, ch := make(chan struct{}), make(chan struct{})
	l.requests <- &request{alone: true, apply: func(*txn) error { close(held); <-ch; return nil }}
	<-held
	return func() { close(ch) }
}

// Waiting returns how many requests wait for the writer.
func (l *Ledger) Waiting() int { return len(l.requests) }

// Commits returns the number of the last transaction on disk.
func (l *Ledger) Commits() (n int) {
	l.db.View(func(tx *bolt.Tx) error { n = tx.ID(); return nil })
	return n
}

// Synced reports whether each commit and each growth of the file is followed by a sync.
func (l *Ledger) Synced() bool { return !l.db.NoSync && !l.db.NoGrowSync }

// Fill spends n nonces that expire at the given time, with an event each, and without waiting for the disk more often than it
// must.
func (l *Ledger) Fill(ctx context.Context, n int, expiresAt int64) error {
	event := NewEvent([]byte("filled"))
	for done := 0; done < n; {
		some := min(n-done, 20_000)
		if err := l.submit(ctx, &request{alone: true, done: make(chan error, 1), apply: func(t *txn) error {
			for i := range some {
				var nonce [32]byte
				binary.BigEndian.PutUint64(nonce[:], uint64(done+i))
				number, err := t.append(event)
				if err != nil {
					return err
				}
				if err := t.spend(spent{event: number, hour: hourOf(expiresAt), print: fingerprintOf("filled", nonce)}); err != nil {
					return err
				}
			}
			return nil
		}}); err != nil {
			return err
		}
		done += some
	}
	return nil
}

// SkipSync leaves out the fsyncs of one kind: commit, file, folder or meta.
func SkipSync(kind string) (restore func()) {
	before := noSync
	noSync = func(what string) bool { return what == kind }
	return func() { noSync = before }
}

// SmallReserve makes the reserve small, to be had again at once.
func SmallReserve() (restore func()) {
	size, every := reserveSize, reserveEvery
	reserveSize, reserveEvery = 64<<10, 0
	return func() { reserveSize, reserveEvery = size, every }
}

// Totals returns how many totals all series have.
func (l *Ledger) Totals() (n int) {
	l.db.View(func(tx *bolt.Tx) error { n = root(tx, bucketCounters).Stats().KeyN; return nil })
	return n
}
