package ledger

import (
	"context"
	"encoding/binary"
	"os"

	bolt "go.etcd.io/bbolt"
)

// MapSize sets the size of the mapping of the next Open.
func MapSize(size int) (restore func()) {
	before := mapSize
	mapSize = size
	return func() { mapSize = before }
}

// CaptureFile captures the file of the next Open, so that the test can break the file.
func CaptureFile() (file func() *os.File, restore func()) {
	var last *os.File
	openFile = func(name string, flag int, perm os.FileMode) (*os.File, error) {
		f, err := os.OpenFile(name, flag, perm)
		last = f
		return f, err
	}
	return func() *os.File { return last }, func() { openFile = os.OpenFile }
}

// Occupy keeps the writer busy until release is called. Requests wait in the queue meanwhile.
func (l *Ledger) Occupy() (release func()) {
	held, ch := make(chan struct{}), make(chan struct{})
	l.requests <- &request{alone: true, apply: func(*txn) error { close(held); <-ch; return nil }}
	<-held
	return func() { close(ch) }
}

// Waiting returns the number of requests in the queue.
func (l *Ledger) Waiting() int { return len(l.requests) }

// Commits returns the number of the last transaction on disk.
func (l *Ledger) Commits() (n int) {
	l.db.View(func(tx *bolt.Tx) error { n = tx.ID(); return nil })
	return n
}

// Synced reports whether bbolt syncs after each commit and each growth of the file.
func (l *Ledger) Synced() bool { return !l.db.NoSync && !l.db.NoGrowSync }

// Fill spends n nonces with the same expiry, each with an event, in transactions of 20,000.
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
				fp := fingerprintOf("filled", nonce)
				if err := t.spend(spent{
					event: number, hour: hourOf(expiresAt), fingerprint: fp, share: share{use: Own},
				}); err != nil {
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

// SkipSync disables the fsyncs of one kind: commit, file, folder or meta.
func SkipSync(kind string) (restore func()) {
	before := noSync
	noSync = func(what string) bool { return what == kind }
	return func() { noSync = before }
}

// SmallReserve sets a reserve of 64 KiB that is acquired again at the next attempt.
func SmallReserve() (restore func()) {
	size, every := reserveSize, reserveEvery
	reserveSize, reserveEvery = 64<<10, 0
	return func() { reserveSize, reserveEvery = size, every }
}

// Totals returns the number of stored totals of all series.
func (l *Ledger) Totals() (n int) {
	l.db.View(func(tx *bolt.Tx) error { n = root(tx, bucketCounters).Stats().KeyN; return nil })
	return n
}

// Oldest is the first format that can be migrated.
const Oldest = oldest
