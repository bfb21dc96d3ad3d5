package ledger

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"
)

// Replica is a copy of a ledger that applies the ledger's lists of writes: see Options.Replicate. A
// replica makes no decisions and does not sync its file. For a takeover, Open opens the file as a
// ledger.
type Replica struct{ db *bolt.DB }

// OpenReplica opens a file of Snapshot or Create as a replica.
func OpenReplica(path string) (*Replica, error) {
	o := &bolt.Options{Timeout: time.Second, NoSync: true, FreelistType: bolt.FreelistMapType}
	var db *bolt.DB
	if err := guard(func() (err error) { db, err = bolt.Open(path, 0o600, o); return err }); err != nil {
		return nil, fmt.Errorf("replica: %w", err)
	}
	return &Replica{db}, nil
}

// Apply applies the next encoded lists, in one transaction. A list without the number that follows
// is refused.
func (r *Replica) Apply(lists ...[]byte) error {
	err := guard(func() error {
		return r.db.Update(func(tx *bolt.Tx) error {
			for _, list := range lists {
				w, err := DecodeWrites(list)
				if err != nil {
					return err
				}
				last, err := lastList(tx)
				if err != nil {
					return err
				}
				if w.Number != last+1 {
					return fmt.Errorf("list %d does not follow list %d", w.Number, last)
				}
				if err := w.apply(tx); err != nil {
					return err
				}
			}
			return nil
		})
	})
	if err != nil {
		return fmt.Errorf("replica: %w", err)
	}
	return nil
}

// lastList returns the number of the last list in a file.
func lastList(tx *bolt.Tx) (uint64, error) {
	switch v := root(tx, bucketMeta).Get(keyLists); len(v) {
	case 0:
		return 0, nil
	case 8:
		return binary.BigEndian.Uint64(v), nil
	default:
		return 0, fmt.Errorf("%w: the number of the last list has %d bytes", ErrCorrupt, len(v))
	}
}

// Close closes the file.
func (r *Replica) Close() error { return r.db.Close() }

// Digest returns a hash of the writer's memory: the end of the log, and the nonces that have not
// expired at the time at. A replica that is opened as a ledger has the digest of the original.
func (l *Ledger) Digest(ctx context.Context, at time.Time) (digest string, err error) {
	select {
	case <-l.done: // the writer has ended
		return l.digest(at), nil
	default:
	}
	err = l.submit(ctx, &request{done: make(chan error, 1), apply: func(*txn) error {
		digest = l.digest(at)
		return nil
	}})
	if err != nil {
		return "", err // the writer may still use the variable
	}
	return digest, nil
}

func (l *Ledger) digest(at time.Time) string {
	h := sha256.New()
	s := l.log
	root, err := s.tree.Root()
	fmt.Fprintln(h, l.restored, s.next, s.epoch, s.first, s.tree.Size, root, err, s.chunks, hex.EncodeToString(s.chunk))
	byNumber := func(x, y *hour) int { return cmp.Compare(x.number, y.number) }
	for _, hour := range slices.SortedFunc(slices.Values(l.nonces.hours), byNumber) {
		if l.nonces.expiredHour(hour.number, at) || len(hour.spent) == 0 {
			continue
		}
		fmt.Fprintln(h, hour.number, len(hour.spent))
		for _, s := range slices.SortedFunc(maps.Keys(hour.held.shares), share.compare) {
			fmt.Fprintln(h, s.use, hex.EncodeToString(s.peer[:]), hour.held.shares[s])
		}
		for _, fp := range slices.SortedFunc(maps.Keys(hour.spent), fingerprint.compare) {
			fmt.Fprintln(h, hex.EncodeToString(fp[:]), hour.spent[fp])
		}
	}
	return hex.EncodeToString(h.Sum(nil))
}

func (f fingerprint) compare(g fingerprint) int { return bytes.Compare(f[:], g[:]) }
