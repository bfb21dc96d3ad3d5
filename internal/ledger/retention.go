package ledger

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"

	bolt "go.etcd.io/bbolt"
)

// maxRemovals is the largest number of records that one transaction of retention removes. The bound
// limits the time that other requests wait for the transaction.
const maxRemovals = 2048

// maxFreePages is the number of free pages from which on Sweep removes nothing, until writes have
// used pages again: see minFreePages.
const maxFreePages = 8192

// maxHolds is the largest number of legal holds on one epoch. The bound limits the size of the
// epoch's record.
const maxHolds = 100

// Hold protects an epoch from Drop by a legal hold with a name, and writes the event. Holds of
// other names stay as they are. The error for a name that the epoch has already wraps ErrHeld.
func (l *Ledger) Hold(ctx context.Context, epoch uint32, name, reason string, event Event) error {
	return l.changeHolds(ctx, epoch, event, func(holds map[string]string) error {
		if _, held := holds[name]; held {
			return fmt.Errorf("epoch %d, hold %q: %w", epoch, name, ErrHeld)
		}
		if len(holds) == maxHolds {
			return fmt.Errorf("epoch %d: %w: at most %d", epoch, ErrTooManyHolds, maxHolds)
		}
		holds[name] = reason
		return nil
	})
}

// Release ends the legal hold with a name, and writes the event. An epoch with other holds stays
// protected. The error for an unknown name wraps ErrNotFound.
func (l *Ledger) Release(ctx context.Context, epoch uint32, name string, event Event) error {
	return l.changeHolds(ctx, epoch, event, func(holds map[string]string) error {
		if _, held := holds[name]; !held {
			return fmt.Errorf("epoch %d, hold %q: %w", epoch, name, ErrNotFound)
		}
		delete(holds, name)
		return nil
	})
}

// changeHolds changes the legal holds of an epoch that is not dropped.
func (l *Ledger) changeHolds(
	ctx context.Context, epoch uint32, event Event, change func(holds map[string]string) error,
) error {
	return l.submit(ctx, &request{alone: true, done: make(chan error, 1), apply: func(t *txn) error {
		e, err := getEpoch(t.tx, epoch)
		switch {
		case err != nil:
			return err
		case e.Dropping != 0:
			return fmt.Errorf("epoch %d: %w", epoch, ErrDropped)
		}
		if e.Holds == nil {
			e.Holds = map[string]string{}
		}
		if err := change(e.Holds); err != nil {
			return err
		}
		if err := t.putEpoch(e); err != nil {
			return err
		}
		_, err = t.append(event)
		return err
	}})
}

// Drop hides an epoch from all readers, and writes the event in the same transaction. The final
// checkpoint stays. Sweep removes the records. Drop refuses an epoch that is held, has not ended,
// has no final checkpoint, or follows an epoch that is not dropped.
func (l *Ledger) Drop(ctx context.Context, epoch uint32, event Event) error {
	return l.submit(ctx, &request{alone: true, done: make(chan error, 1), apply: func(t *txn) error {
		e, err := getEpoch(t.tx, epoch)
		switch {
		case err != nil:
			return err
		case e.Dropping != 0:
			return nil
		case len(e.Holds) > 0:
			return fmt.Errorf("epoch %d has %d legal holds", epoch, len(e.Holds))
		case !e.Final():
			return fmt.Errorf("epoch %d has no final checkpoint", epoch)
		}
		if epoch > 0 {
			if before, err := getEpoch(t.tx, epoch-1); err != nil {
				return err
			} else if before.Dropping == 0 {
				return fmt.Errorf("epoch %d is older and not dropped", epoch-1)
			}
		}
		e.Dropping = t.now.UnixMilli()
		if err := t.putEpoch(e); err != nil {
			return err
		}
		_, err = t.append(event)
		return err
	}})
}

// Sweep removes a bounded number of records: of dropped epochs, of receipts and decisions before a
// time (Unix milliseconds), and of idle series. The result reports whether more records may be due.
// While more than 8192 pages are free, Sweep removes nothing and returns true. Only one Sweep may
// run at a time.
func (l *Ledger) Sweep(ctx context.Context, receiptsBefore, decisionsBefore int64) (bool, error) {
	if l.stats().FreePageN > maxFreePages {
		return true, nil
	}
	var due bool // found in a read transaction: a write transaction costs an fsync
	var series []byte
	if err := l.view(func(tx *bolt.Tx) error {
		epoch, err := pendingDrop(tx)
		receipt, _ := root(tx, bucketReceipts).Cursor().First()
		_, decision := root(tx, bucketDecisions).Cursor().First()
		series, l.swept = nextIdleSeries(tx, l.swept, l.clock.time())
		due = epoch != nil || series != nil ||
			receipt != nil && int64(binary.BigEndian.Uint64(receipt)) < receiptsBefore ||
			decision != nil && int64(binary.BigEndian.Uint64(decision)) < decisionsBefore
		return err
	}); err != nil || !due {
		return false, err
	}
	var more bool
	err := l.submit(ctx, &request{alone: true, done: make(chan error, 1), apply: func(t *txn) (err error) {
		more, err = t.sweepOld(receiptsBefore, decisionsBefore, series)
		return err
	}})
	if err != nil {
		return true, err // the writer may still use the variable
	}
	return more, nil
}

// sweepOld removes records of one kind. more reports whether another call may remove further
// records.
func (t *txn) sweepOld(receiptsBefore, decisionsBefore int64, series []byte) (more bool, err error) {
	if removed, err := t.removeReceipts(receiptsBefore); err != nil || removed == maxRemovals {
		return true, err
	}
	if removed, err := t.removeDecisions(decisionsBefore); err != nil || removed == maxRemovals {
		return true, err
	}
	if series != nil {
		return true, t.removeSeries(series)
	}
	e, err := pendingDrop(t.tx)
	if err != nil || e == nil {
		return false, err
	}
	if done, err := t.removeEpoch(*e); err != nil || !done {
		return true, err
	}
	e.Dropped = t.now.UnixMilli()
	return true, t.putEpoch(*e)
}

// pendingDrop returns the first dropped epoch with records on disk, or nil.
func pendingDrop(tx *bolt.Tx) (*Epoch, error) {
	c := root(tx, bucketEpochs).Cursor()
	for k, _ := c.First(); k != nil; k, _ = c.Next() {
		e, err := getEpoch(tx, binary.BigEndian.Uint32(k))
		if err != nil || e.Dropping == 0 {
			return nil, err
		}
		if e.Dropped == 0 {
			return &e, nil
		}
	}
	return nil, nil
}

// removeEpoch removes some records of the index, one segment of events, or at most maxRemovals
// events of a segment that the next epoch shares, or some chunks of hashes. done reports that the
// epoch has no records any more.
func (t *txn) removeEpoch(e Epoch) (done bool, err error) {
	end := e.First + e.Size
	if done, err := t.removeIndex(end); err != nil || !done {
		return false, err
	}
	events := t.bucket(bucketEvents)
	if name, _ := events.cursor().First(); name != nil {
		if n := binary.BigEndian.Uint64(name); (n+1)*segment <= end {
			return false, events.drop(u64(n))
		} else if n*segment < end {
			b, err := events.inner(u64(n))
			if err != nil {
				return false, err
			}
			for i := range maxRemovals {
				k, _ := b.cursor().First()
				if k == nil || binary.BigEndian.Uint64(k) >= end {
					if i > 0 {
						return false, nil
					}
					break
				}
				if err := b.delete(bytes.Clone(k)); err != nil {
					return false, err
				}
				if i == maxRemovals-1 {
					return false, nil
				}
			}
		}
	}
	hashes := t.bucket(bucketHashes)
	for range maxRemovals / chunkHashes {
		k, _ := hashes.cursor().First()
		if k == nil || binary.BigEndian.Uint32(k) > e.Number {
			return true, nil
		}
		if err := hashes.delete(bytes.Clone(k)); err != nil {
			return false, err
		}
	}
	return false, nil
}

// removeReceipts removes at most maxRemovals of the receipts before a time, the oldest first.
func (t *txn) removeReceipts(before int64) (removed int, err error) {
	b, ids := t.bucket(bucketReceipts), t.bucket(bucketIDs)
	for ; removed < maxRemovals; removed++ {
		k, _ := b.cursor().First()
		if k == nil || int64(binary.BigEndian.Uint64(k)) >= before {
			break
		}
		k = bytes.Clone(k)
		if err := b.delete(k); err != nil {
			return removed, err
		}
		if id := k[8:]; bytes.Equal(ids.get(id), k[:8]) { // false if a later receipt has the same id
			if err := ids.delete(id); err != nil {
				return removed, err
			}
		}
	}
	return removed, nil
}
