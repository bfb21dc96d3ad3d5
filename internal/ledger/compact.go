package ledger

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	bolt "go.etcd.io/bbolt"
)

// Stats are the sizes of a ledger.
type Stats struct {
	FileSize    int64     `json:"file_size"`   // bytes
	FreeBytes   int64     `json:"free_bytes"`  // of the file, to be used again
	Events      uint64    `json:"events"`      // that were ever written
	FirstEvent  uint64    `json:"first_event"` // the first that is still there
	Epochs      int       `json:"epochs"`
	Nonces      int       `json:"nonces"` // alive
	MaxNonces   int       `json:"max_nonces"`
	Time        time.Time `json:"time"`         // the ledger's
	BehindClock int64     `json:"behind_clock"` // seconds from the ledger's time to the system's clock; negative: ahead
	Trouble     string    `json:"trouble,omitempty"`
}

func (l *Ledger) stats() bolt.Stats {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.db.Stats()
}

// Stats collects the sizes. It does not wait for the writer.
func (l *Ledger) Stats() (s Stats, err error) {
	now, wall, _ := l.Clock()
	s = Stats{
		Events: l.shown.Load().next, Nonces: l.nonces.living(now), MaxNonces: l.options.MaxNonces,
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

// Snapshot writes a copy of the ledger's file to w, as of one moment, while admissions go on. The copy
// is a ledger that Open takes. Compaction waits for the end of a snapshot, and so does Close.
func (l *Ledger) Snapshot(w io.Writer) (err error) {
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
	_, err = tx.WriteTo(w)
	return err
}

// Compact copies the ledger into a new file without free pages and puts that in the place of the old
// one. Until Compact returns, everything that writes waits. After a crash the old file is there or the
// new one, whole, and both say the same. While a snapshot is being written, Compact refuses: ErrBusy.
func (l *Ledger) Compact(ctx context.Context, event Event) (before, after int64, took time.Duration, err error) {
	if !l.copying.TryLock() {
		return 0, 0, 0, fmt.Errorf("compact: %w: try again when it is done", ErrBusy)
	}
	if _, err := l.Append(ctx, event); err != nil {
		l.copying.Unlock()
		return 0, 0, 0, err
	}
	var failure error
	compacting := &request{alone: true, done: make(chan error, 1), apply: func(t *txn) error {
		begin := time.Now()
		if failure = t.tx.Rollback(); failure == nil { // the transaction writes nothing: the file is replaced
			before, after, failure = l.compact()
		}
		took = time.Since(begin)
		return errDone
	}}
	ended := make(chan error, 1)
	go func() { // to the end, whether the caller waits or not: a snapshot must not begin before
		defer l.copying.Unlock()
		ended <- l.submit(context.WithoutCancel(ctx), compacting)
	}()
	select {
	case err = <-ended:
	case <-ctx.Done():
		return 0, 0, 0, fmt.Errorf("compact: it goes on: %w", ctx.Err())
	}
	if errors.Is(err, errDone) {
		err = failure
	}
	if err != nil {
		return 0, 0, 0, err
	}
	return before, after, took, nil
}

// errDone ends a request that has no transaction.
var errDone = errors.New("done")

// compacted ends the name of the file that is to take the ledger's place.
const compacted = ".compact"

func (l *Ledger) compact() (before, after int64, err error) {
	defer wrap(&err, "compact")
	temp := l.path + compacted
	if err := os.Remove(temp); err != nil && !os.IsNotExist(err) {
		return 0, 0, err
	}
	defer os.Remove(temp) // left by a failure; after the rename there is none
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
	if err := moveInto(temp, l.path); err != nil {
		return 0, 0, err
	}
	old := l.db
	// The name is the new file's: writes to the old one from here on would be gone after a restart.
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
