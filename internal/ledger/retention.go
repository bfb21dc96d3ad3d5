package ledger

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"

	bolt "go.etcd.io/bbolt"
)

// stepsAtOnce bounds the records that one transaction of retention removes, and with it how long
// other requests wait for that transaction.
const stepsAtOnce = 2048

// fewFree is how many free pages the file may have before retention waits until pages have been used
// again: see enoughFree.
const fewFree = 8192

// Hold keeps an epoch from being dropped; an empty reason releases it. Event says so in the log.
func (l *Ledger) Hold(ctx context.Context, epoch uint32, reason string, event Event) error {
	return l.submit(ctx, &request{alone: true, done: make(chan error, 1), apply: func(t *txn) error {
		e, err := getEpoch(t.tx, epoch)
		switch {
		case err != nil:
			return err
		case e.Dropping != 0:
			return fmt.Errorf("epoch %d: %w", epoch, ErrDropped)
		}
		e.Hold = reason
		if err := t.putEpoch(e); err != nil {
			return err
		}
		_, err = t.append(event)
		return err
	}})
}

// Drop makes an epoch gone for all readers, in the transaction of the event that says so. Its final
// checkpoint stays. Sweep removes its records. Drop refuses an epoch that is held, has not ended, has
// no final checkpoint, or follows one that is not dropped.
func (l *Ledger) Drop(ctx context.Context, epoch uint32, event Event) error {
	return l.submit(ctx, &request{alone: true, done: make(chan error, 1), apply: func(t *txn) error {
		e, err := getEpoch(t.tx, epoch)
		switch {
		case err != nil:
			return err
		case e.Dropping != 0:
			return nil
		case e.Hold != "":
			return fmt.Errorf("epoch %d is held: %s", epoch, e.Hold)
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

// Sweep removes some records of dropped epochs, some receipts and decisions from before a time (Unix
// milliseconds), and some series that are in no window any more. It says whether there may be more.
// While many pages are free, Sweep does nothing and says that there is more. Only one Sweep may run
// at a time.
func (l *Ledger) Sweep(ctx context.Context, receiptsBefore, decisionsBefore int64) (bool, error) {
	if l.stats().FreePageN > fewFree {
		return true, nil
	}
	var due bool // look first: a transaction costs an fsync
	var series []byte
	if err := l.view(func(tx *bolt.Tx) error {
		epoch, err := dropping(tx)
		receipt, _ := root(tx, bucketReceipts).Cursor().First()
		_, decision := root(tx, bucketDecisions).Cursor().First()
		series, l.swept = idle(tx, l.swept, l.clock.time())
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
		return true, err // the writer may still be at work
	}
	return more, nil
}

func (t *txn) sweepOld(receiptsBefore, decisionsBefore int64, series []byte) (more bool, err error) {
	if removed, err := t.removeReceipts(receiptsBefore); err != nil || removed == stepsAtOnce {
		return true, err
	}
	if removed, err := t.removeDecisions(decisionsBefore); err != nil || removed == stepsAtOnce {
		return true, err
	}
	if series != nil {
		return true, t.removeSeries(series)
	}
	e, err := dropping(t.tx)
	if err != nil || e == nil {
		return false, err
	}
	if done, err := t.removeEpoch(*e); err != nil || !done {
		return true, err
	}
	e.Dropped = t.now.UnixMilli()
	return true, t.putEpoch(*e)
}

// dropping returns the first epoch that was dropped and whose records are still there, or nil.
func dropping(tx *bolt.Tx) (*Epoch, error) {
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

// removeEpoch removes one segment of events, or the events of a segment that the next epoch shares,
// or some hashes.
func (t *txn) removeEpoch(e Epoch) (done bool, err error) {
	end := e.First + e.Size
	events := t.bucket(bucketEvents)
	if name, _ := events.cursor().First(); name != nil {
		if n := binary.BigEndian.Uint64(name); (n+1)*segment <= end {
			return false, events.drop(u64(n))
		} else if n*segment < end {
			b, err := events.inner(u64(n))
			if err != nil {
				return false, err
			}
			for i := range stepsAtOnce {
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
				if i == stepsAtOnce-1 {
					return false, nil
				}
			}
		}
	}
	hashes := t.bucket(bucketHashes)
	for range stepsAtOnce / chunkHashes {
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

func (t *txn) removeReceipts(before int64) (removed int, err error) {
	b, ids := t.bucket(bucketReceipts), t.bucket(bucketIDs)
	for ; removed < stepsAtOnce; removed++ {
		k, _ := b.cursor().First()
		if k == nil || int64(binary.BigEndian.Uint64(k)) >= before {
			break
		}
		k = bytes.Clone(k)
		if err := b.delete(k); err != nil {
			return removed, err
		}
		if id := k[8:]; bytes.Equal(ids.get(id), k[:8]) { // unless a later receipt has the same id
			if err := ids.delete(id); err != nil {
				return removed, err
			}
		}
	}
	return removed, nil
}
