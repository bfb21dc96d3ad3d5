package ledger

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"countersign/audit"

	bolt "go.etcd.io/bbolt"
)

// maxBatch bounds the requests in one transaction, and with it the time that a commit takes.
const maxBatch = 512

// maxBacklog bounds the outcomes that wait for a disk that takes writes again. Nothing is admitted
// meanwhile, so no more outcomes are expected than there are requests under way.
const maxBacklog = 64 * maxBatch

// request is work for the writer. apply runs inside a transaction that other requests share, or, where
// alone is set, in a transaction of its own that an error rolls back. apply may run again. done gets
// the result of the commit; nil: no caller waits.
type request struct {
	apply func(*txn) error
	alone bool
	done  chan error
}

// submit hands a request to the writer and waits for its commit, if a caller waits. Where ctx ends
// first, the request may still be carried out.
func (l *Ledger) submit(ctx context.Context, r *request) error {
	select {
	case <-l.failed:
		return ErrUnknownState
	case <-l.stopping:
		return ErrClosed
	default:
	}
	select {
	case l.requests <- r:
	case <-l.stopping:
		return ErrClosed
	case <-ctx.Done():
		return fmt.Errorf("ledger: queue: %w", ctx.Err())
	}
	return l.await(ctx, r)
}

// await waits for the commit of a request that was handed in.
func (l *Ledger) await(ctx context.Context, r *request) error {
	if r.done == nil {
		return nil
	}
	select {
	case err := <-r.done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("ledger: waiting for the disk: %w", ctx.Err())
	case <-l.done:
	}
	select { // the writer has ended: the answer is there by now, or never comes
	case err := <-r.done:
		return err
	default:
		return ErrClosed
	}
}

// write is the one writer.
func (l *Ledger) write() {
	defer close(l.done)
	for {
		select {
		case first := <-l.requests:
			l.serve(first)
		case <-l.stopping:
			for { // requests that were handed in before
				select {
				case first := <-l.requests:
					l.serve(first)
				default:
					if len(l.backlog) > 0 {
						l.carryOut(nil)
					}
					return
				}
			}
		}
	}
}

// serve carries out a request and all that wait behind it, as far as they fit into one transaction.
func (l *Ledger) serve(first *request) {
	batch := []*request{first}
gather:
	for len(batch) < maxBatch && !batch[len(batch)-1].alone {
		select {
		case r := <-l.requests:
			batch = append(batch, r)
		default:
			break gather
		}
	}
	if last := len(batch) - 1; batch[last].alone {
		if last > 0 {
			l.carryOut(batch[:last])
		}
		l.carryOut(batch[last:])
	} else {
		l.carryOut(batch)
	}
}

// carryOut runs a batch and tells each request how it ended. Outcomes of the backlog go first.
func (l *Ledger) carryOut(batch []*request) {
	for len(l.backlog) > 0 {
		some := l.backlog[:min(maxBatch, len(l.backlog))]
		if err := l.try(some); errors.Is(err, ErrDisk) {
			break // the batch is tried all the same: it may need less room
		}
		l.backlog = slices.Clone(l.backlog[len(some):])
	}
	err := l.try(batch)
	if errors.Is(err, ErrDisk) {
		for _, r := range batch {
			if r.done == nil && len(l.backlog) < maxBacklog { // no caller would hand it in again
				l.backlog = append(l.backlog, r)
			}
		}
	}
	answer(batch, err)
}

// try runs a batch without the reserve of disk space, and then with it. While there is no room,
// nothing is admitted, and everything else lives on what the reserve has given up.
func (l *Ledger) try(batch []*request) error {
	var full error
	if l.trouble.Load() != nil && !l.reserve.taken && l.reserve.takeAgain() != nil {
		full = l.Trouble()
	}
	err := l.transact(batch, full)
	if noRoom(err) && l.reserve.give() {
		err = l.transact(batch, err) // the trouble stays until there is room for the reserve
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

// txn is a transaction under way: its list of writes, and what it will change in the writer's memory
// once the list is on disk.
type txn struct {
	l        *Ledger // nil while the file is being made
	tx       *bolt.Tx
	now      time.Time // the ledger's time
	closed   error     // why nothing is admitted: the clock, or a full disk
	wrote    bool
	swept    bool // nothing of an expired hour is left
	accepted bool // now is to be the ledger's time, by the word of an operator
	log      logState
	spent    map[fingerprint]spentAt // in this transaction
	writes   Writes
	roots    [len(buckets)]bucket // opened so far
	inners   [len(buckets)]bucket // the one opened last in each root
}

// spentAt is where the record of a spent nonce is.
type spentAt struct {
	event uint64 // of the admission
	hour  uint32 // of expiry
}

// transact runs a batch in one transaction: each request makes its part of the list of writes, and
// commit makes the list durable. While closed is set, nothing is admitted.
//
// The error is that of a request that is alone, or ErrDisk when nothing was written, or
// ErrUnknownState.
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
	t := &txn{l: l, tx: tx, log: l.log.copy(), spent: map[fingerprint]spentAt{}}
	if t.now, t.closed = l.clock.tick(); closed != nil {
		t.closed = closed
	}
	l.nonces.expire(t.now)
	for _, r := range batch {
		t.wrote = t.wrote || r.alone
		if err := r.apply(t); err != nil && r.alone {
			return err
		} else if err != nil {
			return l.fail(err) // a request that shares a transaction fails only by damage
		}
	}
	if !t.wrote {
		return nil
	}
	if err := errors.Join(t.sweep(), t.finish()); err != nil {
		return l.fail(err)
	}
	if err := l.commit(tx, &t.writes); err != nil {
		return err
	}
	// From here on the list is on disk. Memory follows it before anything else is decided.
	l.log = t.log
	l.shown.Store(new(l.log))
	if t.swept {
		l.nonces.expired = false
	}
	if t.accepted {
		l.clock.accept(t.now)
	}
	if l.reserve.taken {
		l.troubled(nil)
	}
	return l.follow(&t.writes)
}

// commit makes a list durable: nil means that it is, ErrDisk that nothing of it was kept, and
// ErrUnknownState that nobody knows.
//
// Here bbolt writes the pages that the list has changed, syncs, writes the page that makes them
// count, and syncs again. Everything behind this line works on the list alone, so that the list may
// one day be made durable in another way: appended to a log with one sync, or agreed on by a quorum,
// with the pages written afterwards.
func (l *Ledger) commit(tx *bolt.Tx, w *Writes) error {
	id := tx.ID()
	if err := tx.Commit(); err != nil {
		return l.notCommitted(id, err)
	}
	if l.options.Replicate != nil {
		l.options.Replicate(w.Encode())
	}
	return nil
}

// notCommitted tells a transaction of which nothing counts from one whose state is unknown: while the
// page that makes it count does not have its number, its data lies in pages that nothing points to.
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

// follow shows a list that is on disk to the memory of the ledger and to all followers.
func (l *Ledger) follow(w *Writes) error {
	for _, each := range w.list {
		if each.place.top == bucketNonces && each.op == opPut {
			if err := l.nonces.follow(each.place.inner, each.key, each.value); err != nil {
				return l.fail(err)
			}
		}
	}
	for _, f := range l.followers {
		if err := f.follow(w); err != nil {
			return l.fail(err)
		}
	}
	return nil
}

// finish writes what belongs to every transaction.
func (t *txn) finish() error {
	t.writes.Time = t.now
	now := binary.BigEndian.AppendUint64(nil, uint64(t.now.UnixNano()))
	if err := t.bucket(bucketMeta).put(keyTime, now); err != nil {
		return err
	}
	return t.putChunk()
}

// append gives an event the next number and writes it down with the hashes that it adds to the tree.
func (t *txn) append(e Event) (uint64, error) {
	t.wrote = true
	index := t.log.next
	b, err := t.segment(index / segment)
	if err != nil {
		return 0, err
	}
	if err := b.put(u64(index), e.bytes); err != nil {
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

// segment returns the bucket of the events of a segment, which is made with the first of them.
func (t *txn) segment(number uint64) (bucket, error) {
	if b := t.inners[bucketEvents]; b.b != nil && binary.BigEndian.Uint64(b.place.inner) == number {
		return b, nil
	}
	return t.bucket(bucketEvents).inner(u64(number))
}

// putChunk writes the hashes that are not in a full chunk.
func (t *txn) putChunk() error {
	if len(t.log.chunk) == 0 {
		return nil
	}
	return t.bucket(bucketHashes).put(chunkKey(t.log.epoch, t.log.chunks), t.log.chunk)
}

func u64(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }
