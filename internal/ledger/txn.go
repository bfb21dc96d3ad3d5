package ledger

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"countersign/audit"

	bolt "go.etcd.io/bbolt"
)

// txn is a transaction under way, with what it will change in the writer's memory once it is on disk.
type txn struct {
	l        *Ledger // nil while the file is being made
	tx       *bolt.Tx
	now      time.Time // the ledger's time
	closed   error     // why nothing is admitted: the clock, or a full disk
	wrote    bool
	swept    bool // nothing of an expired hour is left
	accepted bool // now is what the ledger's time is to be
	log      logState
	fresh    map[fingerprint]uint64 // spent in this transaction: event of the admission
	hours    map[fingerprint]uint32 // and the hour of its expiry
	seg      openSegment            // where events go
}

// openSegment is a bucket that is written to again and again.
type openSegment struct {
	number uint64
	bucket *bolt.Bucket
}

// commit carries out a batch and tells each request how it ended. What could not be written before goes first.
func (l *Ledger) commit(batch []*request) {
	for len(l.backlog) > 0 {
		some := l.backlog[:min(maxBatch, len(l.backlog))]
		if err := l.try(some); errors.Is(err, ErrDisk) {
			break // and what follows is tried all the same: it may need less
		}
		l.backlog = slices.Clone(l.backlog[len(some):])
	}
	err := l.try(batch)
	if errors.Is(err, ErrDisk) {
		for _, r := range batch {
			if r.done == nil && len(l.backlog) < maxBacklog { // nobody would hand it in again
				l.backlog = append(l.backlog, r)
			}
		}
	}
	answer(batch, err)
}

// try carries out a batch, without the reserve and then with it. Without room, nothing is admitted, and the rest lives on what the
// reserve has given up.
func (l *Ledger) try(batch []*request) error {
	var full error
	if l.trouble.Load() != nil && !l.reserve.taken && l.reserve.takeAgain() != nil {
		full = l.Trouble()
	}
	err := l.transact(batch, full)
	if noRoom(err) && l.reserve.give() {
		err = l.transact(batch, err) // where it is written, the trouble stays until there is room for the reserve
	}
	return err
}

func answer(batch []*request, err error) {
	for _, r := range batch {
		if r.done != nil {
			r.done <- err
		}
	}
}

// transact carries out a batch in one transaction; while closed is set, without admissions. Its error is that of a request that is alone, or ErrDisk when nothing
// was written, or ErrUnknownState.
func (l *Ledger) transact(batch []*request, closed error) error {
	select {
	case <-l.failed:
		return ErrUnknownState
	default:
	}
	if len(batch) == 0 {
		return nil
	}
	tx, err := l.db.Begin(true)
	if err != nil {
		return l.fail(err)
	}
	defer tx.Rollback() // does nothing after a commit
	id := tx.ID()
	t := &txn{l: l, tx: tx, log: l.log.copy(), fresh: map[fingerprint]uint64{}, hours: map[fingerprint]uint32{}}
	if t.now, t.closed = l.clock.tick(); closed != nil {
		t.closed = closed
	}
	l.nonces.expire(t.now)
	for _, r := range batch {
		t.wrote = t.wrote || r.alone
		if err := r.apply(t); err != nil && r.alone {
			return err
		} else if err != nil {
			return l.fail(err) // nothing that shares a transaction may fail but for damage
		}
	}
	if !t.wrote {
		return nil
	}
	if err := errors.Join(t.sweep(), t.finish()); err != nil {
		return l.fail(err)
	}
	if err := tx.Commit(); err != nil {
		return l.notCommitted(id, err)
	}
	// From here on all of it is on disk.
	l.log = t.log
	l.shown.Store(new(l.log))
	l.nonces.add(t)
	if t.swept {
		l.nonces.expired = false
	}
	if t.accepted {
		l.clock.accept(t.now)
	}
	if l.reserve.taken {
		l.troubled(nil)
	}
	return nil
}

// notCommitted tells a transaction of which nothing counts from one whose state is unknown. bbolt writes the data, syncs,
// writes the page that makes it count, and syncs again. While that page does not have the transaction's number, what was
// written lies in pages that nothing points to.
func (l *Ledger) notCommitted(id int, err error) error {
	var counts int
	if l.db.View(func(tx *bolt.Tx) error { counts = tx.ID(); return nil }) != nil || counts >= id {
		return l.fail(err)
	}
	l.troubled(err)
	return l.Trouble()
}

// fail ends the ledger's life. Only the writer calls it, once.
func (l *Ledger) fail(err error) error {
	close(l.failed)
	return fmt.Errorf("%w: %w", ErrUnknownState, err)
}

// finish writes what belongs to every transaction.
func (t *txn) finish() error {
	meta := t.tx.Bucket(bucketMeta)
	if err := meta.Put(keyTime, binary.BigEndian.AppendUint64(nil, uint64(t.now.UnixNano()))); err != nil {
		return err
	}
	return t.putChunk()
}

// append gives an event the next number and writes it down with the hashes that it adds to the tree.
func (t *txn) append(e Event) (uint64, error) {
	t.wrote = true
	index := t.log.next
	if n := index / segment; t.seg.bucket == nil || t.seg.number != n {
		b, err := t.tx.Bucket(bucketEvents).CreateBucketIfNotExists(u64(n))
		if err != nil {
			return 0, err
		}
		b.FillPercent = 0.95 // the keys only rise
		t.seg = openSegment{n, b}
	}
	if err := t.seg.bucket.Put(u64(index), e.bytes); err != nil {
		return 0, err
	}
	t.log.next++
	var broken error
	t.log.tree.Append(e.hash, func(h audit.Hash) {
		t.log.chunk = append(t.log.chunk, h[:]...)
		if len(t.log.chunk) == chunkHashes*len(h) {
			broken = errors.Join(broken, t.putChunk())
			t.log.chunks, t.log.chunk = t.log.chunks+1, nil
		}
	})
	return index, broken
}

// putChunk writes the hashes that are not in a full chunk.
func (t *txn) putChunk() error {
	if len(t.log.chunk) == 0 {
		return nil
	}
	b := t.tx.Bucket(bucketHashes)
	b.FillPercent = 0.95
	return b.Put(chunkKey(t.log.epoch, t.log.chunks), t.log.chunk)
}

func u64(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }
