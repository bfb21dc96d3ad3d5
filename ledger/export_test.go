package ledger

import (
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

// Hold keeps the writer busy until release is called, so that requests pile up behind it.
func (l *Ledger) Hold() (release func()) {
	held, ch := make(chan struct{}), make(chan struct{})
	l.requests <- &request{alone: true, apply: func(*bolt.Tx) error { close(held); <-ch; return nil }}
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
