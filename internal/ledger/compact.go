package ledger

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"countersign/audit"

	bolt "go.etcd.io/bbolt"
)

// Stats are the sizes of a ledger.
type Stats struct {
	FileSize    int64     `json:"file_size"`   // bytes
	FreeBytes   int64     `json:"free_bytes"`  // of the file; writes use them again
	Events      uint64    `json:"events"`      // all events ever written, the dropped ones too
	FirstEvent  uint64    `json:"first_event"` // number of the first event that is not dropped
	Epochs      int       `json:"epochs"`
	Nonces      int       `json:"nonces"` // not expired
	MaxNonces   int       `json:"max_nonces"`
	Time        time.Time `json:"time"`              // the ledger's time
	BehindClock int64     `json:"behind_clock"`      // seconds, system's clock less ledger's time
	Trouble     string    `json:"trouble,omitempty"` // see Ledger.Trouble
}

func (l *Ledger) stats() bolt.Stats {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.db.Stats()
}

// Stats returns the sizes, without waiting for the writer.
func (l *Ledger) Stats() (s Stats, err error) {
	now, wall, _ := l.Clock()
	alive := l.nonces.heldAt(now)
	s = Stats{
		Events: l.published.Load().next, Nonces: alive.all(), MaxNonces: l.options.MaxNonces,
		Time: now.UTC(), BehindClock: int64(wall.Sub(now) / time.Second),
	}
	if err := l.Trouble(); err != nil {
		s.Trouble = err.Error()
	}
	free := l.stats()
	err = l.view(func(tx *bolt.Tx) error {
		s.FileSize = tx.Size()
		s.FreeBytes = int64(free.FreePageN+free.PendingPageN) * int64(tx.DB().Info().PageSize)
		s.FirstEvent = firstKept(tx)
		s.Epochs = root(tx, bucketEpochs).Stats().KeyN
		return nil
	})
	return s, err
}

// Load is what waits for the writer, and the free space of the disk.
type Load struct {
	Waiting  int    // requests in the queue
	Backlog  int    // outcomes that wait because the disk takes no writes
	DiskFree uint64 // bytes of the file system that the process may use
}

// Load returns the load, without waiting for the writer.
func (l *Ledger) Load() (Load, error) {
	load := Load{Waiting: len(l.requests), Backlog: int(l.waiting.Load())}
	var fs syscall.Statfs_t
	if err := syscall.Statfs(filepath.Dir(l.path), &fs); err != nil {
		return load, fmt.Errorf("ledger: free space of the disk: %w", err)
	}
	load.DiskFree = fs.Bavail * uint64(fs.Bsize)
	return load, nil
}

// Copy is a ledger at one moment, and can be written as a file while admissions go on.
type Copy struct {
	View
	Epoch uint32     // the present one
	First uint64     // number of the first event of the epoch
	Tree  audit.Tree // of the epoch
	Lists uint64     // Writes.Number of the last list in the copy
}

// Size returns the number of bytes of the file.
func (c Copy) Size() int64 { return c.tx.Size() }

// WriteTo writes the file. Open accepts the file as a ledger.
func (c Copy) WriteTo(w io.Writer) (int64, error) { return c.tx.WriteTo(w) }

// Snapshot writes a consistent copy of the ledger's file to w.
func (l *Ledger) Snapshot(w io.Writer) error {
	return l.Copy(func(c Copy) error { _, err := c.WriteTo(w); return err })
}

// Copy calls take with the ledger as it is now. The copy is valid until take returns. Meanwhile the
// ledger goes on, and its file grows by what is written. Compact refuses until then, and Close
// waits.
func (l *Ledger) Copy(take func(Copy) error) (err error) {
	defer wrap(&err, "snapshot")
	l.copying.RLock()
	defer l.copying.RUnlock()
	l.mu.RLock()
	tx, err := l.db.Begin(false)
	l.mu.RUnlock()
	if err != nil {
		return ErrClosed
	}
	defer tx.Rollback()
	s, err := loadLog(tx)
	if err != nil {
		return err
	}
	lists, err := lastList(tx)
	if err != nil {
		return err
	}
	return take(Copy{View: View{tx}, Epoch: s.epoch, First: s.first, Tree: s.tree, Lists: lists})
}

// Compact copies the ledger into a new file without free pages and replaces the old file. All
// writes wait during the copy. After a crash, either the old file or the new file is there,
// complete, and both have the same content. During a snapshot Compact returns ErrBusy. The results
// are the sizes of the file in bytes before and after, and the time that writes waited.
func (l *Ledger) Compact(ctx context.Context, event Event) (before, after int64, took time.Duration, err error) {
	if !l.copying.TryLock() {
		return 0, 0, 0, fmt.Errorf("compact: %w: try again after it", ErrBusy)
	}
	if _, err := l.Append(ctx, event); err != nil {
		l.copying.Unlock()
		return 0, 0, 0, err
	}
	var failure error
	compacting := &request{alone: true, done: make(chan error, 1), apply: func(t *txn) error {
		begin := time.Now()
		if failure = t.tx.Rollback(); failure == nil { // the file of the transaction is replaced
			before, after, failure = l.compact()
		}
		took = time.Since(begin)
		return errDone
	}}
	ended := make(chan error, 1)
	go func() { // holds the lock to the end, even without a caller: a snapshot must not begin before
		defer l.copying.Unlock()
		ended <- l.submit(context.WithoutCancel(ctx), compacting)
	}()
	select {
	case err = <-ended:
	case <-ctx.Done():
		return 0, 0, 0, fmt.Errorf("compact: the copy goes on: %w", ctx.Err())
	}
	if errors.Is(err, errDone) {
		err = failure
	}
	if err != nil {
		return 0, 0, 0, err
	}
	return before, after, took, nil
}

// errDone is the error of a request that has ended its transaction by itself.
var errDone = errors.New("done")

// compactSuffix is the suffix of the temporary file that replaces the ledger.
const compactSuffix = ".compact"

func (l *Ledger) compact() (before, after int64, err error) {
	defer wrap(&err, "compact")
	temp := l.path + compactSuffix
	if err := os.Remove(temp); err != nil && !os.IsNotExist(err) {
		return 0, 0, err
	}
	defer os.Remove(temp) // for a failure: after the rename, the name does not exist
	if before, err = size(l.path); err != nil {
		return 0, 0, err
	}
	to, err := bolt.Open(temp, 0o600, &bolt.Options{NoSync: true, FreelistType: bolt.FreelistMapType})
	if err != nil {
		return 0, 0, err
	}
	to.AllocSize = growBy
	err = bolt.Compact(to, l.db, 1<<20)
	if closed := to.Close(); err == nil {
		err = closed
	}
	if err != nil {
		return 0, 0, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := syncAndRename(temp, l.path); err != nil {
		return 0, 0, err
	}
	old := l.db
	// The name belongs to the new file now. Later writes to the old file would be lost at a
	// restart, so an error from here on is fatal.
	if err := syncPath(filepath.Dir(l.path), "folder"); err != nil {
		return 0, 0, l.fail(err)
	}
	if l.db, err = openBolt(l.path); err != nil {
		l.db = old
		return 0, 0, l.fail(err)
	}
	old.Close()
	after, err = size(l.path)
	return before, after, err
}

func size(path string) (int64, error) {
	st, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}
