package ledger

import (
	"context"
	"encoding/binary"

	bolt "go.etcd.io/bbolt"
)

// Append writes an event down and returns its index when it is on disk.
func (l *Ledger) Append(ctx context.Context, event []byte) (uint64, error) {
	var index uint64
	err := l.submit(ctx, &request{done: make(chan error, 1), apply: func(tx *bolt.Tx) (err error) {
		index, err = appendEvent(tx, event)
		return err
	}})
	if err != nil {
		return 0, err // the writer may still be at it: index is not ours to read
	}
	return index, nil
}

// Update changes records in a transaction of its own. When it returns nil, the change is on disk; any error of change
// undoes all of it.
func (l *Ledger) Update(ctx context.Context, change func(*Tx) error) error {
	return l.submit(ctx, &request{alone: true, done: make(chan error, 1), apply: func(tx *bolt.Tx) error { return change(&Tx{tx}) }})
}

// Tx is an Update under way.
type Tx struct{ tx *bolt.Tx }

// Get returns a record, or nil.
func (t *Tx) Get(table Table, key string) []byte {
	return append([]byte(nil), t.tx.Bucket([]byte(table)).Get([]byte(key))...)
}

// All calls visit for each record of a table in the order of their keys.
func (t *Tx) All(table Table, visit func(key string, value []byte) error) error {
	return each(t.tx, table, visit)
}

// Put writes a record.
func (t *Tx) Put(table Table, key string, value []byte) error {
	return t.tx.Bucket([]byte(table)).Put([]byte(key), value)
}

// Delete removes a record.
func (t *Tx) Delete(table Table, key string) error {
	return t.tx.Bucket([]byte(table)).Delete([]byte(key))
}

// Append writes an event together with the change.
func (t *Tx) Append(event []byte) error {
	_, err := appendEvent(t.tx, event)
	return err
}

// All calls visit for each record of a table as of now, in the order of their keys.
func (l *Ledger) All(table Table, visit func(key string, value []byte) error) error {
	return l.db.View(func(tx *bolt.Tx) error { return each(tx, table, visit) })
}

func each(tx *bolt.Tx, table Table, visit func(key string, value []byte) error) error {
	return tx.Bucket([]byte(table)).ForEach(func(k, v []byte) error {
		return visit(string(k), append([]byte(nil), v...))
	})
}

// Events calls visit for each event on disk from index from on, until visit returns false.
func (l *Ledger) Events(from uint64, visit func(index uint64, event []byte) bool) error {
	return l.db.View(func(tx *bolt.Tx) error {
		c := tx.Bucket(bucketEvents).Cursor()
		for k, v := c.Seek(eventKey(from)); k != nil; k, v = c.Next() {
			if !visit(binary.BigEndian.Uint64(k), append([]byte(nil), v...)) {
				break
			}
		}
		return nil
	})
}

// Spent returns the admission that spent a nonce as it is on disk, or ErrNotFound.
func (l *Ledger) Spent(scope Scope, nonce [32]byte) (a Admitted, err error) {
	err = l.db.View(func(tx *bolt.Tx) error {
		b := tx.Bucket(bucketNonces).Get(nonceKey(scope, nonce))
		if b == nil {
			return ErrNotFound
		}
		e, err := decodeEntry(b)
		a = Admitted{
			Admission: Admission{Scope: scope, Nonce: nonce, Digest: e.digest, Peer: e.peer, KeyVersion: e.keyVersion, ExpiresAt: e.expiresAt},
			Verdict:   Repeated, Event: e.event, Signature: e.signature,
		}
		return err
	})
	return a, err
}

// appendEvent gives an event the next index, from 0 on.
func appendEvent(tx *bolt.Tx, event []byte) (uint64, error) {
	b := tx.Bucket(bucketEvents)
	b.FillPercent = 0.95 // the keys only rise
	n, err := b.NextSequence()
	if err != nil {
		return 0, err
	}
	return n - 1, b.Put(eventKey(n-1), event)
}

func eventKey(index uint64) []byte { return binary.BigEndian.AppendUint64(nil, index) }
