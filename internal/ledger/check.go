package ledger

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/big"

	"countersign/audit"

	bolt "go.etcd.io/bbolt"
)

// Check reads the whole file: all pages, every event and its hash, the trees and their roots, every
// record of a nonce, and every receipt. The error names the first damage found, or wraps ErrOlder
// for an older format. The ledger must not be in use. progress, which may be nil, gets the number
// of checked events and the number of all events.
func Check(path string, o Options, progress func(done, all uint64)) (err error) {
	defer wrap(&err, "check")
	o.AsIs = true
	l, err := Open(path, o)
	if err != nil {
		return err
	}
	defer l.Close()
	return guard(func() error {
		return l.view(func(tx *bolt.Tx) error {
			for err := range tx.Check() {
				return fmt.Errorf("%w: %w", ErrCorrupt, err)
			}
			return checkAll(tx, l.log.next, progress)
		})
	})
}

// checkAll checks all records. next is the number of the next event.
func checkAll(tx *bolt.Tx, next uint64, progress func(done, all uint64)) error {
	var expect uint64 // the first event of the next epoch
	err := root(tx, bucketEpochs).ForEach(func(k, _ []byte) error {
		e, err := getEpoch(tx, binary.BigEndian.Uint32(k))
		if err != nil {
			return err
		}
		if e.First != expect {
			return fmt.Errorf("%w: epoch %d begins at event %d, want %d", ErrCorrupt, e.Number, e.First, expect)
		}
		if e.Ended == 0 {
			e.Size = next - e.First
		}
		expect = e.First + e.Size
		if e.Dropping != 0 {
			return nil
		}
		return checkEpoch(tx, e, next, progress)
	})
	if err != nil {
		return err
	}
	if expect != next {
		return fmt.Errorf("%w: the epochs end at event %d, the log at %d", ErrCorrupt, expect, next)
	}
	sound := func(hour uint32, k, v []byte) error {
		_, err := decodeSpent(hour, k, v)
		return err
	}
	if err := checkSpent(tx, bucketNonces, next, sound); err != nil {
		return err
	}
	if err := checkSpent(tx, bucketOutcomes, next, func(uint32, []byte, []byte) error { return nil }); err != nil {
		return err
	}
	if err := root(tx, bucketDecisions).ForEach(func(k, v []byte) error {
		d, err := decodeDecision(k, v)
		if err == nil && d.Event >= next {
			err = fmt.Errorf("%w: there is a decision of event %d, which does not exist", ErrCorrupt, d.Event)
		}
		return err
	}); err != nil {
		return err
	}
	if err := checkIndex(tx, next); err != nil {
		return err
	}
	if err := checkTotals(root(tx, bucketCounters)); err != nil {
		return err
	}
	return checkReceipts(tx)
}

// checkTotals checks that the totals of each series never fall.
func checkTotals(b *bolt.Bucket) error {
	var series, last []byte
	return b.ForEach(func(k, v []byte) error {
		if len(k) != 24 {
			return fmt.Errorf("%w: counter %x", ErrCorrupt, k)
		}
		if !bytes.Equal(series, k[:16]) {
			series, last = bytes.Clone(k[:16]), nil
		}
		if new(big.Int).SetBytes(v).Cmp(new(big.Int).SetBytes(last)) < 0 {
			return fmt.Errorf("%w: a total of series %x falls", ErrCorrupt, series)
		}
		last = bytes.Clone(v)
		return nil
	})
}

// checkSpent checks the records of spent nonces, or of their outcomes. Expired nonces are included.
func checkSpent(tx *bolt.Tx, number byte, next uint64, check func(hour uint32, k, v []byte) error) error {
	all, bucket := root(tx, number), buckets[number].name
	return all.ForEach(func(name, _ []byte) error {
		b := all.Bucket(name)
		if len(name) != 12 || b == nil {
			return fmt.Errorf("%w: there are %s in %x", ErrCorrupt, bucket, name)
		}
		return b.ForEach(func(k, v []byte) error {
			if len(k) != 8 || binary.BigEndian.Uint64(k) >= next ||
				binary.BigEndian.Uint64(k)/segment != binary.BigEndian.Uint64(name[4:]) {
				return fmt.Errorf("%w: one of the %s of event %x is in %x", ErrCorrupt, bucket, k, name)
			}
			return check(binary.BigEndian.Uint32(name), k, v)
		})
	})
}

// checkReceipts compares the receipts with the index of their ids.
func checkReceipts(tx *bolt.Tx) error {
	receipts, ids := root(tx, bucketReceipts), root(tx, bucketIDs)
	err := receipts.ForEach(func(k, v []byte) error {
		r, err := decodeReceipt(v)
		if err == nil && (!bytes.Equal(k, receiptKey(r.TimeMS, r.ID)) || ids.Get(r.ID[:]) == nil) {
			err = fmt.Errorf("%w: receipt %x is not where its time and its id say", ErrCorrupt, r.ID)
		}
		return err
	})
	if err != nil {
		return err
	}
	return ids.ForEach(func(id, at []byte) error {
		if receipts.Get(append(bytes.Clone(at), id...)) == nil {
			return fmt.Errorf("%w: receipt %x is in the index only", ErrCorrupt, id)
		}
		return nil
	})
}

// checkEpoch checks the events of an epoch and its tree.
func checkEpoch(tx *bolt.Tx, e Epoch, next uint64, progress func(done, all uint64)) error {
	stored := reader{tx, e.Number}
	var tree treeCheck
	for index := e.First; index < e.First+e.Size; index++ {
		events := root(tx, bucketEvents).Bucket(u64(index / segment))
		if events == nil {
			return fmt.Errorf("%w: event %d is missing", ErrCorrupt, index)
		}
		leaf, err := checkEvent(events, stored, index, e.First)
		if err != nil {
			return err
		}
		if err := tree.append(leaf, stored); err != nil {
			return fmt.Errorf("event %d: %w", index, err)
		}
		if progress != nil && index%1024 == 0 {
			progress(index, next)
		}
	}
	return tree.end(e, stored)
}

// treeCheck computes a tree again and compares it with the stored hashes.
type treeCheck struct {
	tree audit.Tree
	at   int64 // index of the next stored hash
}

func (c *treeCheck) append(leaf audit.Hash, stored reader) (err error) {
	c.tree.Append(leaf, func(h audit.Hash) {
		kept, failed := stored.ReadHashes([]int64{c.at})
		if err == nil {
			err = failed
		}
		if err == nil && kept[0] != h {
			err = fmt.Errorf("%w: hash %d of epoch %d is not that of its events", ErrCorrupt, c.at, stored.epoch)
		}
		c.at++
	})
	return err
}

// end compares the root with the root of the ended epoch and with the newest checkpoint.
func (c *treeCheck) end(e Epoch, stored reader) error {
	root, err := c.tree.Root()
	if err != nil {
		return err
	}
	if e.Ended != 0 && !bytes.Equal(root[:], e.Root) {
		return fmt.Errorf("%w: epoch %d ended with another root", ErrCorrupt, e.Number)
	}
	return checkRoot(e, c.tree, stored)
}
