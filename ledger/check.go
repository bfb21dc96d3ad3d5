package ledger

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"countersign/audit"

	bolt "go.etcd.io/bbolt"
)

// Check reads the whole file: all pages, every event against its hash, the trees against their roots, and every record of a
// nonce. It names what is damaged first. The ledger must not be in use. progress may be nil.
func Check(path string, o Options, progress func(done, all uint64)) (err error) {
	defer wrap(&err, "check")
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

func checkAll(tx *bolt.Tx, next uint64, progress func(done, all uint64)) error {
	var expect uint64 // the first event of the next epoch
	err := tx.Bucket(bucketEpochs).ForEach(func(k, _ []byte) error {
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
	return tx.Bucket(bucketNonces).ForEach(func(name, _ []byte) error {
		return tx.Bucket(bucketNonces).Bucket(name).ForEach(func(k, v []byte) error {
			_, err := decodeSpent(binary.BigEndian.Uint32(name), k, v)
			return err
		})
	})
}

func checkEpoch(tx *bolt.Tx, e Epoch, next uint64, progress func(done, all uint64)) error {
	stored := reader{tx, e.Number}
	var tree treeCheck
	for index := e.First; index < e.First+e.Size; index++ {
		events := tx.Bucket(bucketEvents).Bucket(u64(index / segment))
		if events == nil {
			return fmt.Errorf("%w: event %d is missing", ErrCorrupt, index)
		}
		if err := checkEvent(events, stored, index, e.First); err != nil {
			return err
		}
		if err := tree.append(events.Get(u64(index)), stored); err != nil {
			return fmt.Errorf("event %d: %w", index, err)
		}
		if progress != nil && index%1024 == 0 {
			progress(index, next)
		}
	}
	return tree.end(e, stored)
}

// treeCheck makes a tree anew and holds it against the hashes that were stored.
type treeCheck struct {
	tree audit.Tree
	at   int64 // position of the next stored hash
}

func (c *treeCheck) append(event []byte, stored reader) (err error) {
	c.tree.Append(audit.LeafHash(event), func(h audit.Hash) {
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
