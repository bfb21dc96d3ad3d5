package ledger

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	bolt "go.etcd.io/bbolt"
)

// The numbers of the buckets in the root. Encoded lists of writes have these numbers, the lists
// beside old backups too: no number is ever given to another bucket. An arrow leads from key to
// value; integers in keys are big-endian.
const (
	bucketMeta      byte = iota // format, time, and the records of the table Meta
	bucketEvents                // a bucket for each u64 segment, with u64 event -> encoded event
	bucketHashes                // u32 epoch || u64 chunk -> up to 64 hashes in the order of Tree.Append
	bucketEpochs                // u32 epoch -> Epoch in JSON
	bucketNonces                // a bucket for each u32 hour of expiry || u64 segment, with u64 event -> spent
	bucketOutcomes              // buckets of the same names, with u64 event of the admission -> signature
	bucketReceipts              // i64 time in ms || id (16) -> Receipt in JSON
	bucketIDs                   // receipt id (16) -> i64 time in ms
	bucketCounters              // running totals: see windows.go
	bucketMonotonic             // hash of a series (16) -> u64, the last number
	bucketDecisions             // u64 event -> i64 time in ms || record
	bucketKeys
	bucketLines
	bucketPeers
	bucketPolicies
	bucketOperators
	bucketProposals
	bucketIndex // u64 segment -> index of its events: see find.go
	bucketGroups
)

// buckets are the buckets of the root by number. A file of this format has exactly these buckets; a
// new bucket is added at the end. The fill is the share of a page that bbolt fills when a page is
// split. For increasing keys almost full pages are best, because no key is inserted into an old
// page.
var buckets = [...]struct {
	name []byte
	fill float64
}{
	bucketMeta:      {[]byte("meta"), bolt.DefaultFillPercent},
	bucketEvents:    {[]byte("events"), fullPages},
	bucketHashes:    {[]byte("hashes"), fullPages},
	bucketEpochs:    {[]byte("epochs"), bolt.DefaultFillPercent},
	bucketNonces:    {[]byte("nonces"), fullPages},
	bucketOutcomes:  {[]byte("outcomes"), fullPages},
	bucketReceipts:  {[]byte("receipts"), fullPages},
	bucketIDs:       {[]byte("receipt_ids"), bolt.DefaultFillPercent},
	bucketCounters:  {[]byte("counters"), bolt.DefaultFillPercent},
	bucketMonotonic: {[]byte("risen"), bolt.DefaultFillPercent},
	bucketDecisions: {[]byte("decisions"), fullPages},
	bucketKeys:      {[]byte(Keys), bolt.DefaultFillPercent},
	bucketLines:     {[]byte(Lines), bolt.DefaultFillPercent},
	bucketPeers:     {[]byte(Peers), bolt.DefaultFillPercent},
	bucketPolicies:  {[]byte(Policies), bolt.DefaultFillPercent},
	bucketOperators: {[]byte(Operators), bolt.DefaultFillPercent},
	bucketProposals: {[]byte(Proposals), bolt.DefaultFillPercent},
	bucketIndex:     {[]byte("index"), fullPages},
	bucketGroups:    {[]byte(Groups), bolt.DefaultFillPercent},
}

const fullPages = 0.95

// rootPaths are the paths of the buckets in the root.
var rootPaths = func() (all [len(buckets)]bucketPath) {
	for i := range all {
		all[i].top = byte(i)
	}
	return all
}()

// root returns a bucket of the root, for reading.
func root(tx *bolt.Tx, number byte) *bolt.Bucket { return tx.Bucket(buckets[number].name) }

// The ledger's own records in the bucket of the table Meta.
var (
	keyFormat = []byte("format") // u32
	keyTime   = []byte("time")   // i64 Unix nanoseconds

	keyRestored = []byte("restored") // i64 Unix seconds: see Ledger.Restore
	keyLists    = []byte("lists")    // u64, Writes.Number of the last list; absent: 0
)

// own reports whether a key of Meta is one of the ledger's own records.
func own(key []byte) bool {
	return slices.ContainsFunc([][]byte{keyTime, keyFormat, keyRestored, keyLists}, func(k []byte) bool {
		return bytes.Equal(k, key)
	})
}

// Table is a named set of records for the management of the appliance. The package that writes a
// record defines the bytes.
type Table string

const (
	Keys      Table = "keys"  // versions of keys
	Lines     Table = "lines" // settings of keys
	Peers     Table = "peers"
	Policies  Table = "policies"
	Operators Table = "operators"
	Proposals Table = "proposals"
	Groups    Table = "groups" // of peers and of keys, for policies
	Meta      Table = "meta"   // records of the appliance as a whole
)

var tables = map[Table]byte{
	Keys: bucketKeys, Lines: bucketLines, Peers: bucketPeers, Policies: bucketPolicies,
	Operators: bucketOperators, Proposals: bucketProposals, Groups: bucketGroups, Meta: bucketMeta,
}

// reserved reports whether a record of Meta belongs to the ledger itself.
func reserved(table Table, key string) bool {
	return table == Meta && own([]byte(key))
}

// View is a consistent snapshot of all records. A View is valid until the function with the View as
// its argument returns.
type View struct{ tx *bolt.Tx }

// Get returns a copy of a record, or nil if there is none.
func (v View) Get(table Table, key string) []byte {
	number, known := tables[table]
	if !known || reserved(table, key) {
		return nil
	}
	return bytes.Clone(root(v.tx, number).Get([]byte(key)))
}

// All calls visit for each record of a table in the order of the keys.
func (v View) All(table Table, visit func(key string, value []byte) error) error {
	number, known := tables[table]
	if !known {
		return fmt.Errorf("ledger: there is no table %q", table)
	}
	return root(v.tx, number).ForEach(func(k, value []byte) error {
		if reserved(table, string(k)) {
			return nil
		}
		return visit(string(k), bytes.Clone(value))
	})
}

// View calls read with the last transaction on disk. read must not wait for a request of the
// ledger.
func (l *Ledger) View(read func(View) error) error {
	return l.view(func(tx *bolt.Tx) error { return read(View{tx}) })
}

// Get returns a record of the last transaction on disk, or nil if there is none.
func (l *Ledger) Get(table Table, key string) (value []byte, err error) {
	err = l.View(func(v View) error { value = v.Get(table, key); return nil })
	return value, err
}

// All calls visit for each record of a table in the last transaction on disk, in the order of the
// keys.
func (l *Ledger) All(table Table, visit func(key string, value []byte) error) error {
	return l.View(func(v View) error { return v.All(table, visit) })
}

// Append writes an event, and returns its number when the event is on disk.
func (l *Ledger) Append(ctx context.Context, e Event) (uint64, error) {
	var index uint64
	err := l.submit(ctx, &request{done: make(chan error, 1), apply: func(t *txn) (err error) {
		index, err = t.append(e)
		return err
	}})
	if err != nil {
		return 0, err // the writer may still write index
	}
	return index, nil
}

// Update changes records in a transaction of its own. When Update returns nil, the change is on
// disk, and every follower of a changed table has the change. An error of change rolls the
// transaction back.
func (l *Ledger) Update(ctx context.Context, change func(*Tx) error) error {
	return l.submit(ctx, &request{alone: true, done: make(chan error, 1), apply: func(t *txn) error {
		return change(&Tx{View{t.tx}, t})
	}})
}

// Tx is the transaction of an Update. The View includes the changes so far.
type Tx struct {
	View
	t *txn
}

// Put writes a record. The key must not be empty, and must not be a key of the ledger itself in
// Meta.
func (t *Tx) Put(table Table, key string, value []byte) error {
	b, err := t.t.table(table, key)
	if err != nil {
		return err
	}
	return b.put([]byte(key), slices.Clip(value))
}

// Delete removes a record. A missing record is no error.
func (t *Tx) Delete(table Table, key string) error {
	b, err := t.t.table(table, key)
	if err != nil {
		return err
	}
	return b.delete([]byte(key))
}

// Append writes an event in the transaction.
func (t *Tx) Append(e Event) error {
	_, err := t.t.append(e)
	return err
}

var errReserved = errors.New("ledger: the record is the ledger's own")

// table returns the bucket of a table for a change of the record key.
func (t *txn) table(table Table, key string) (bucket, error) {
	number, known := tables[table]
	switch {
	case !known:
		return bucket{}, fmt.Errorf("ledger: there is no table %q", table)
	case reserved(table, key):
		return bucket{}, fmt.Errorf("%w: %s", errReserved, key)
	}
	return t.bucket(number), nil
}

// Record is a function that updates the memory for one record of a table. The value is nil for a
// deleted record. The same function is called at the start, for each later transaction, and on a
// replica that takes over.
type Record func(key string, value []byte) error

// Followed is a table with the function for its records.
type Followed struct {
	Table Table
	Take  Record
}

// follower is a set of tables with the functions that update the memory.
type follower struct {
	lock sync.Locker
	take [len(buckets)]Record // by bucket
}

// Follow keeps memory equal to tables on disk. Follow calls Take for each existing record. From
// then on the writer calls Take for each record that a transaction has changed, in order. The calls
// happen after the commit, and before the writer answers the requests or executes others. The
// memory therefore always has the state on disk.
//
// The writer holds lock for all records of one transaction, so that readers of the memory never see
// a part of a transaction. A goroutine that waits for the ledger must not hold lock. Follow returns
// an error of Take at the start. A later error of Take means that the memory differs from the disk.
// The ledger then ends as after a failed commit.
func (l *Ledger) Follow(ctx context.Context, lock sync.Locker, tables ...Followed) error {
	f := &follower{lock: lock}
	for _, each := range tables {
		f.take[tableNumber(each.Table)] = each.Take
	}
	var failure error
	err := l.submit(ctx, &request{done: make(chan error, 1), apply: func(t *txn) error {
		lock.Lock()
		defer lock.Unlock()
		for _, each := range tables {
			if failure = (View{t.tx}).All(each.Table, each.Take); failure != nil {
				return nil
			}
		}
		if !slices.Contains(l.followers, f) { // the transaction may run again
			l.followers = append(l.followers, f)
		}
		return nil
	}})
	if err != nil {
		return err // the writer may still be at work
	}
	return failure
}

func tableNumber(table Table) byte {
	number, known := tables[table]
	if !known {
		panic("ledger: there is no table " + string(table))
	}
	return number
}

// follow calls the functions of a follower for the records of a list.
func (f *follower) follow(w *Writes) (err error) {
	locked := false
	for _, each := range w.list {
		take := f.take[each.path.top]
		if take == nil || reservedWrite(each) {
			continue
		}
		if !locked {
			f.lock.Lock()
			defer f.lock.Unlock()
			locked = true
		}
		value := each.value
		if each.op == opDelete {
			value = nil
		} else if value == nil {
			value = []byte{}
		}
		if err = take(string(each.key), value); err != nil {
			return fmt.Errorf("record %s of %s: %w", each.key, buckets[each.path.top].name, err)
		}
	}
	return nil
}

// reservedWrite reports whether a write concerns a record that belongs to the ledger itself.
func reservedWrite(w write) bool {
	return w.path.top == bucketMeta && own(w.key)
}
