package ledger

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"countersign/audit"

	bolt "go.etcd.io/bbolt"
)

// maxBatch is the largest number of requests in one transaction. The bound limits the time of a
// commit.
const maxBatch = 512

// maxBacklog is the largest number of outcomes that wait while the disk refuses writes. The ledger
// refuses admissions meanwhile, so the expected number is at most that of the requests under way.
const maxBacklog = 64 * maxBatch

// request is work for the writer. apply runs in a transaction that other requests share. If alone
// is set, apply has a transaction of its own, and an error of apply rolls the transaction back.
// apply may run twice. done gets the result of the commit; done is nil if no caller waits.
type request struct {
	apply func(*txn) error
	alone bool
	done  chan error
}

// submit sends a request to the writer and waits for the commit, unless done is nil. If ctx ends
// first, the writer may still execute the request.
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

// await waits for the commit of a request in the queue.
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
	select { // the writer has ended: either the answer is in the channel, or there will be none
	case err := <-r.done:
		return err
	default:
		return ErrClosed
	}
}

// write is the goroutine of the writer. write ends when Close has been called and the queue is
// empty.
func (l *Ledger) write() {
	defer close(l.done)
	for {
		select {
		case first := <-l.requests:
			l.serve(first)
		case <-l.stopping:
			for { // the rest of the queue
				select {
				case first := <-l.requests:
					l.serve(first)
				default:
					if len(l.backlog) > 0 {
						l.execute(nil)
					}
					return
				}
			}
		}
	}
}

// serve executes a request together with waiting requests: at most maxBatch in one transaction. A
// request with alone ends the batch and has a transaction of its own.
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
			l.execute(batch[:last])
		}
		l.execute(batch[last:])
	} else {
		l.execute(batch)
	}
}

// execute executes a batch and answers its requests. The outcomes of the backlog go first.
func (l *Ledger) execute(batch []*request) {
	for len(l.backlog) > 0 {
		some := l.backlog[:min(maxBatch, len(l.backlog))]
		if err := l.attempt(some); errors.Is(err, ErrDisk) {
			break // the batch may need less space, so the batch is tried, too
		}
		l.backlog = slices.Clone(l.backlog[len(some):])
	}
	err := l.attempt(batch)
	if errors.Is(err, ErrDisk) {
		for _, r := range batch {
			if r.done == nil && len(l.backlog) < maxBacklog { // without a caller, the request would be lost
				l.backlog = append(l.backlog, r)
			}
		}
	}
	l.waiting.Store(int64(len(l.backlog)))
	answer(batch, err)
}

// attempt executes a batch. If the disk is full, attempt releases the reserve and executes the
// batch again. Until the reserve is acquired again, the ledger refuses admissions, and the other
// requests use the space of the reserve.
func (l *Ledger) attempt(batch []*request) error {
	var full error
	if l.trouble.Load() != nil && !l.reserve.held && l.reserve.retry() != nil {
		full = l.Trouble()
	}
	err := l.transact(batch, full)
	if isDiskFull(err) && l.reserve.release() {
		err = l.transact(batch, err) // Trouble stays set until the reserve is acquired
	}
	return err
}

// answer sends a result to the callers of a batch.
func answer(batch []*request, err error) {
	for _, r := range batch {
		if r.done != nil {
			r.done <- err
		}
	}
}

// txn is a transaction of the writer: the list of writes, and the changes of the writer's memory
// that take effect after the commit.
type txn struct {
	l        *Ledger // nil during Create
	tx       *bolt.Tx
	now      time.Time // the ledger's time
	closed   error     // why admissions are refused: the clock, or a full disk
	wrote    bool      // the transaction must be committed
	swept    bool      // no record of an expired hour is on disk
	accepted bool      // now becomes the ledger's time: see AcceptTime
	log      logState
	spent    map[fingerprint]spentAt // by this transaction
	held     held                    // the same nonces by share
	writes   Writes
	roots    [len(buckets)]bucket // cache of opened buckets
	inners   [len(buckets)]bucket // cache of the last opened inner bucket
}

// spentAt is the location of a nonce's record.
type spentAt struct {
	event uint64 // of the admission
	hour  uint32 // of expiry
}

// transact executes a batch in one transaction. Each request adds its part to the list of writes,
// and commit makes the list durable. A non-nil closed is the error of all admissions.
//
// The error is that of a request with alone, or ErrDisk if nothing was written, or ErrUnknownState.
func (l *Ledger) transact(batch []*request, closed error) error {
	select {
	case <-l.failed:
		return ErrUnknownState
	default:
	}
	if len(batch) == 0 {
		return nil
	}
	began := time.Now()
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
			return l.fail(err) // an error of a shared transaction is damage to the file
		}
	}
	if !t.wrote {
		return nil
	}
	if err := errors.Join(t.sweep(), t.finish()); err != nil {
		return l.fail(err)
	}
	err = l.commit(tx, &t.writes)
	if l.options.Committed != nil {
		stats := tx.Stats()
		l.options.Committed(len(batch), time.Since(began), stats.GetWriteTime(), err)
	}
	if err != nil {
		return err
	}
	// The list is on disk. The memory follows before the next transaction.
	l.log = t.log
	l.published.Store(new(l.log))
	if t.swept {
		l.nonces.expired = false
	}
	if t.accepted {
		l.clock.accept(t.now)
	}
	if l.reserve.held {
		l.setTrouble(nil)
	}
	return l.follow(&t.writes)
}

// commit makes a list durable. A nil error means that the list is on disk. ErrDisk means that
// nothing was written, ErrUnknownState that the result is unknown.
//
// bbolt writes the changed pages, syncs, writes the meta page that points to them, and syncs again.
// All code after commit uses the list alone. Another implementation could therefore replace this
// one: append the list to a log with one sync, or let a quorum agree on the list, and write the
// pages afterwards.
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

// notCommitted returns the error of a failed commit. While the newest meta page has a lower number
// than the transaction, no page points to the transaction's data: nothing was written (ErrDisk).
// Otherwise the state is unknown.
func (l *Ledger) notCommitted(id int, err error) error {
	var newest int
	if l.db.View(func(tx *bolt.Tx) error { newest = tx.ID(); return nil }) != nil || newest >= id {
		return l.fail(err)
	}
	l.setTrouble(err)
	return l.Trouble()
}

// fail makes the ledger unusable. Only the writer calls fail, once.
func (l *Ledger) fail(err error) error {
	close(l.failed)
	return fmt.Errorf("%w: %w", ErrUnknownState, err)
}

// follow updates the ledger's memory and all followers with a list that is on disk.
func (l *Ledger) follow(w *Writes) error {
	for _, each := range w.list {
		if each.path.top == bucketNonces && each.op == opPut {
			if err := l.nonces.follow(each.path.inner, each.key, each.value); err != nil {
				return l.fail(err)
			}
		}
		if each.path.top == bucketMeta && bytes.Equal(each.key, keyRestored) {
			var err error
			if l.restored, err = restoredAt(each.value); err != nil {
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

// finish writes the records of every transaction: the ledger's time, the number of the list, and
// the last chunk of hashes.
func (t *txn) finish() error {
	last, err := lastList(t.tx)
	if err != nil {
		return err
	}
	t.writes.Time, t.writes.Number = t.now, last+1
	meta := t.bucket(bucketMeta)
	if err := errors.Join(
		meta.put(keyTime, binary.BigEndian.AppendUint64(nil, uint64(t.now.UnixNano()))),
		meta.put(keyLists, u64(t.writes.Number)),
	); err != nil {
		return err
	}
	return t.putChunk()
}

// append writes an event with the next number, adds it to the tree, and returns the number.
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

// segment returns the bucket for the events of a segment. The first event of the segment creates
// the bucket.
func (t *txn) segment(number uint64) (bucket, error) {
	if b := t.inners[bucketEvents]; b.b != nil && binary.BigEndian.Uint64(b.path.inner) == number {
		return b, nil
	}
	return t.bucket(bucketEvents).inner(u64(number))
}

// putChunk writes the hashes after the full chunks.
func (t *txn) putChunk() error {
	if len(t.log.chunk) == 0 {
		return nil
	}
	return t.bucket(bucketHashes).put(chunkKey(t.log.epoch, t.log.chunks), t.log.chunk)
}

func u64(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }
