package ledger

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	bolt "go.etcd.io/bbolt"
)

// Stats says how large things are.
type Stats struct {
	FileSize    int64     `json:"file_size"`   // bytes
	FreeBytes   int64     `json:"free_bytes"`  // of the file, to be used again
	Events      uint64    `json:"events"`      // that were ever written
	FirstEvent  uint64    `json:"first_event"` // the first that is still there
	Epochs      int       `json:"epochs"`
	Nonces      int       `json:"nonces"` // alive
	MaxNonces   int       `json:"max_nonces"`
	Time        time.Time `json:"time"`         // the ledger's
	BehindClock int64     `json:"behind_clock"` // seconds that the ledger's time is behind the system's clock; negative: ahead
	Trouble     string    `json:"trouble,omitempty"`
}

func (l *Ledger) stats() bolt.Stats {
	l.mu.RLock()
	defer l.mu.RUnlock()
	return l.db.Stats()
}

// Stats collects them.
func (l *Ledger) Stats(ctx context.Context) (s Stats, err error) {
	now, wall, _ := l.Clock()
	s = Stats{Events: l.shown.Load().next, MaxNonces: l.options.MaxNonces, Time: now.UTC(), BehindClock: int64(wall.Sub(now) / time.Second)}
	if err := l.Trouble(); err != nil {
		s.Trouble = err.Error()
	}
	free := l.stats()
	err = l.view(func(tx *bolt.Tx) error {
		s.FileSize = tx.Size()
		s.FreeBytes = int64(free.FreePageN+free.PendingPageN) * int64(tx.DB().Info().PageSize)
		s.FirstEvent = firstKept(tx)
		s.Epochs = tx.Bucket(bucketEpochs).Stats().KeyN
		return nil
	})
	if err != nil {
		return s, err
	}
	var alive int
	if err := l.submit(ctx, &request{done: make(chan error, 1), apply: func(t *txn) error { alive = l.nonces.alive; return nil }}); err != nil {
		return s, err // the writer may still be at it
	}
	s.Nonces = alive
	return s, nil
}

// Compact copies the ledger into a new file without free pages and puts that in the place of the old one. Until it returns,
// everything that writes waits. After a crash the old file is there or the new one, whole, and they say the same.
func (l *Ledger) Compact(ctx context.Context, event Event) (before, after int64, took time.Duration, err error) {
	if _, err := l.Append(ctx, event); err != nil {
		return 0, 0, 0, err
	}
	var failure error
	err = l.submit(ctx, &request{alone: true, done: make(chan error, 1), apply: func(t *txn) error {
		begin := time.Now()
		if failure = t.tx.Rollback(); failure == nil { // nothing is written by the transaction: the file is
			before, after, failure = l.compact()
		}
		took = time.Since(begin)
		return errDone
	}})
	if errors.Is(err, errDone) {
		err = failure
	}
	if err != nil {
		return 0, 0, 0, err // the writer may still be at it
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
	defer os.Remove(temp) // what a failure leaves; after the rename there is none
	if before, err = size(l.path); err != nil {
		return 0, 0, err
	}
	to, err := bolt.Open(temp, 0o600, &bolt.Options{NoSync: true, NoFreelistSync: false, FreelistType: bolt.FreelistMapType})
	if err != nil {
		return 0, 0, err
	}
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
	// The name is the new file's: what would be written to the old one from here on would be gone after a restart.
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
