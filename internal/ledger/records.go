package ledger

import (
	"context"

	bolt "go.etcd.io/bbolt"
)

// Append writes an event down and returns its number when it is on disk.
func (l *Ledger) Append(ctx context.Context, e Event) (uint64, error) {
	var index uint64
	err := l.submit(ctx, &request{done: make(chan error, 1), apply: func(t *txn) (err error) {
		index, err = t.append(e)
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
	return l.submit(ctx, &request{alone: true, done: make(chan error, 1), apply: func(t *txn) error { return change(&Tx{t}) }})
}

// Tx is an Update under way.
type Tx struct{ t *txn }

// Get returns a record, or nil.
func (t *Tx) Get(table Table, key string) []byte {
	return append([]byte(nil), t.t.tx.Bucket([]byte(table)).Get([]byte(key))...)
}

// All calls visit for each record of a table in the order of their keys.
func (t *Tx) All(table Table, visit func(key string, value []byte) error) error {
	return each(t.t.tx, table, visit)
}

// Put writes a record.
func (t *Tx) Put(table Table, key string, value []byte) error {
	return t.t.tx.Bucket([]byte(table)).Put([]byte(key), value)
}

// Delete removes a record.
func (t *Tx) Delete(table Table, key string) error {
	return t.t.tx.Bucket([]byte(table)).Delete([]byte(key))
}

// Append writes an event together with the change.
func (t *Tx) Append(e Event) error {
	_, err := t.t.append(e)
	return err
}

// OnCommit has the writer call done when the change is on disk, and before anything else is decided; never where it was not written.
// So memory that admissions are decided by says at each of them what the disk says. done must not wait for the ledger.
func (t *Tx) OnCommit(done func()) { t.t.tx.OnCommit(done) }

// All calls visit for each record of a table as of now, in the order of their keys.
func (l *Ledger) All(table Table, visit func(key string, value []byte) error) error {
	return l.view(func(tx *bolt.Tx) error { return each(tx, table, visit) })
}

func each(tx *bolt.Tx, table Table, visit func(key string, value []byte) error) error {
	return tx.Bucket([]byte(table)).ForEach(func(k, v []byte) error {
		return visit(string(k), append([]byte(nil), v...))
	})
}
