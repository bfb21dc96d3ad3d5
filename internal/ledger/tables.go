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

// The numbers of the buckets in the root, as encoded lists of writes name them. Numbers in keys are
// big-endian.
const (
	bucketMeta      byte = iota // format, time, and the records of the table Meta
	bucketEvents                // a bucket for each segment, u64; in it u64 event -> its bytes
	bucketHashes                // u32 epoch || u64 chunk -> up to 64 hashes, in the order in which Tree.Append makes them
	bucketEpochs                // u32 epoch -> Epoch in JSON
	bucketNonces                // a bucket for each u32 hour of expiry || u64 segment; in it u64 event -> spent
	bucketOutcomes              // the same buckets; in them u64 event of the admission -> signature
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
)

// buckets are those of the root by number. A file of this format has exactly these; a new one goes to
// the end. The fill is how full bbolt leaves a page when it splits one: keys that only rise leave
// full pages.
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
}

const fullPages = 0.95

// rootPlaces are the places of the buckets in the root.
var rootPlaces = func() (all [len(buckets)]place) {
	for i := range all {
		all[i].top = byte(i)
	}
	return all
}()

// root returns a bucket of the root for reading.
func root(tx *bolt.Tx, number byte) *bolt.Bucket { return tx.Bucket(buckets[number].name) }

// The ledger's own records in the bucket of the table Meta.
var (
	keyFormat = []byte("format") // u32
	keyTime   = []byte("time")   // i64 Unix nanoseconds
)

// Table is a named set of records that the management of the appliance needs. The bytes of a record
// belong to the package that writes it.
type Table string

const (
	Keys      Table = "keys"  // versions of keys
	Lines     Table = "lines" // settings of keys
	Peers     Table = "peers"
	Policies  Table = "policies"
	Operators Table = "operators"
	Proposals Table = "proposals"
	Meta      Table = "meta" // records of the appliance as a whole
)

var tables = map[Table]byte{
	Keys: bucketKeys, Lines: bucketLines, Peers: bucketPeers, Policies: bucketPolicies,
	Operators: bucketOperators, Proposals: bucketProposals, Meta: bucketMeta,
}

// reserved reports that a record of Meta is the ledger's own.
func reserved(table Table, key string) bool {
	return table == Meta && (key == string(keyFormat) || key == string(keyTime))
}

// View reads records at one moment. It is valid until the function that got it returns.
type View struct{ tx *bolt.Tx }

// Get returns a record, or nil.
func (v View) Get(table Table, key string) []byte {
	number, known := tables[table]
	if !known || reserved(table, key) {
		return nil
	}
	return bytes.Clone(root(v.tx, number).Get([]byte(key)))
}

// All calls visit for each record of a table in the order of their keys.
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

// View calls read with the records as of now. read must not wait for the ledger.
func (l *Ledger) View(read func(View) error) error {
	return l.view(func(tx *bolt.Tx) error { return read(View{tx}) })
}

// Get returns a record as of now, or nil.
func (l *Ledger) Get(table Table, key string) (value []byte, err error) {
	err = l.View(func(v View) error { value = v.Get(table, key); return nil })
	return value, err
}

// All calls visit for each record of a table as of now, in the order of their keys.
func (l *Ledger) All(table Table, visit func(key string, value []byte) error) error {
	return l.View(func(v View) error { return v.All(table, visit) })
}

// Append writes an event down and returns its number when it is on disk.
func (l *Ledger) Append(ctx context.Context, e Event) (uint64, error) {
	var index uint64
	err := l.submit(ctx, &request{done: make(chan error, 1), apply: func(t *txn) (err error) {
		index, err = t.append(e)
		return err
	}})
	if err != nil {
		return 0, err // the writer may still be at work: index is not ours to read
	}
	return index, nil
}

// Update changes records in a transaction of its own. When Update returns nil, the change is on disk,
// and every follower of a changed table has seen it. Any error of change undoes all of it.
func (l *Ledger) Update(ctx context.Context, change func(*Tx) error) error {
	return l.submit(ctx, &request{alone: true, done: make(chan error, 1), apply: func(t *txn) error {
		return change(&Tx{View{t.tx}, t})
	}})
}

// Tx is an Update under way. Its View shows the records with the changes so far.
type Tx struct {
	View
	t *txn
}

// Put writes a record. A key is not empty, and not one of the ledger's own in Meta.
func (t *Tx) Put(table Table, key string, value []byte) error {
	b, err := t.t.table(table, key)
	if err != nil {
		return err
	}
	return b.put([]byte(key), slices.Clip(value))
}

// Delete removes a record. A record that is not there is no error.
func (t *Tx) Delete(table Table, key string) error {
	b, err := t.t.table(table, key)
	if err != nil {
		return err
	}
	return b.delete([]byte(key))
}

// Append writes an event together with the change.
func (t *Tx) Append(e Event) error {
	_, err := t.t.append(e)
	return err
}

// OnCommit has the writer call done when the change is on disk.
func (t *Tx) OnCommit(done func()) { t.t.tx.OnCommit(done) }

var errReserved = errors.New("ledger: the record is the ledger's own")

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

// Record takes one record of a table into memory: its bytes, or nil where it was deleted. The same
// function runs at the start, while the ledger runs, and on a replica that takes over.
type Record func(key string, value []byte) error

// Followed is a table with the function that takes its records.
type Followed struct {
	Table Table
	Take  Record
}

// follower is memory that follows tables.
type follower struct {
	lock sync.Locker
	take [len(buckets)]Record // by bucket
}

// Follow lets memory follow tables. It calls Take for each record that is there, and from then on for
// each record that a transaction has changed, in the order of its list: after the commit, and before
// the writer decides or answers anything else. So what memory says is always what the disk says.
//
// lock is held around the records of one transaction, so that memory never shows a part of one; it
// must not be held by anybody who waits for the ledger. An error of Take at the start is returned.
// Later it means that memory can't follow the disk, and ends the ledger as a failed commit does.
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

// follow shows the records of a list to one follower.
func (f *follower) follow(w *Writes) (err error) {
	locked := false
	for _, each := range w.list {
		take := f.take[each.place.top]
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
			return fmt.Errorf("record %s of %s: %w", each.key, buckets[each.place.top].name, err)
		}
	}
	return nil
}

func reservedWrite(w write) bool {
	return w.place.top == bucketMeta && (bytes.Equal(w.key, keyTime) || bytes.Equal(w.key, keyFormat))
}
