package ledger

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"countersign/audit"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/mod/sumdb/tlog"
)

const (
	segment     = 4096 // events in one bucket; retention drops the bucket as a whole
	chunkHashes = 64   // hashes of the tree in one value
)

// Event is an encoded event with its hash. The caller computes the hash, to spare the writer.
type Event struct {
	bytes []byte
	hash  audit.Hash
}

// NewEvent hashes an encoded event. The bytes must not change afterwards.
func NewEvent(b []byte) Event { return Event{b, audit.LeafHash(b)} }

// Size returns the number of bytes of the event and its key on disk.
func (e Event) Size() int { return 8 + len(e.bytes) }

// EventOf encodes and hashes an event of the audit log, with the time of now.
func EventOf(e audit.Event) Event { return NewEvent(e.Encode(time.Now())) }

// logState is the end of the log.
type logState struct {
	next   uint64 // number of the next event
	epoch  uint32 // number of the present epoch
	first  uint64 // number of the epoch's first event
	tree   audit.Tree
	chunks uint64 // number of full chunks of hashes in the epoch
	chunk  []byte // hashes after the full chunks
}

func (s logState) copy() logState {
	s.chunk = slices.Clone(s.chunk) // bbolt refers to the bytes until the transaction ends
	return s
}

// Epoch is a part of the log with a tree of its own.
type Epoch struct {
	Number     uint32 `json:"-"`
	First      uint64 `json:"first"`                // number of its first event
	Begun      int64  `json:"begun"`                // Unix milliseconds of the ledger's time
	Ended      int64  `json:"ended,omitempty"`      // Unix milliseconds; 0 for the present epoch
	Size       uint64 `json:"size,omitempty"`       // events of an ended epoch
	Root       []byte `json:"root,omitempty"`       // root hash of an ended epoch
	Checkpoint string `json:"checkpoint,omitempty"` // newest signed checkpoint; of an ended epoch, the final one
	Signed     uint64 `json:"signed,omitempty"`     // size in the checkpoint
	Dropping   int64  `json:"dropping,omitempty"`   // Unix milliseconds; readers no longer see the epoch
	Dropped    int64  `json:"dropped,omitempty"`    // Unix milliseconds; all records are removed

	Holds map[string]string `json:"holds,omitempty"` // reasons of the legal holds, by the names of the holds
}

// Final reports whether the epoch has ended and its final checkpoint is signed.
func (e Epoch) Final() bool { return e.Ended != 0 && e.Signed == e.Size }

func epochKey(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }

func chunkKey(epoch uint32, n uint64) []byte {
	return binary.BigEndian.AppendUint64(epochKey(epoch), n)
}

func getEpoch(tx *bolt.Tx, n uint32) (e Epoch, err error) {
	b := root(tx, bucketEpochs).Get(epochKey(n))
	if b == nil {
		return e, fmt.Errorf("epoch %d: %w", n, ErrNotFound)
	}
	e.Number = n
	if err := json.Unmarshal(b, &e); err != nil {
		return e, fmt.Errorf("%w: epoch %d: %w", ErrCorrupt, n, err)
	}
	return e, nil
}

func (t *txn) putEpoch(e Epoch) error {
	b, err := json.Marshal(e)
	if err != nil {
		return err
	}
	return t.bucket(bucketEpochs).put(epochKey(e.Number), b)
}

// beginEpoch begins epoch n. Its first event has the system's time, as all events have, and names
// the end of the epoch before; nil: there is none.
func (t *txn) beginEpoch(n uint32, who audit.Actor, before *audit.EpochEnd, system time.Time) error {
	if err := t.putEpoch(Epoch{Number: n, First: t.log.next, Begun: t.now.UnixMilli()}); err != nil {
		return err
	}
	t.log = logState{next: t.log.next, epoch: n, first: t.log.next}
	e := audit.NewEpochBegun(who, n, t.log.next, before)
	_, err := t.append(NewEvent(e.Encode(system)))
	return err
}

// EndEpoch ends the present epoch, begins the next one, and returns the number of the new epoch.
// The caller signs the final checkpoint of the ended epoch afterwards. Its content does not change
// any more.
func (l *Ledger) EndEpoch(ctx context.Context, who audit.Actor) (uint32, error) {
	var next uint32
	err := l.submit(ctx, &request{alone: true, done: make(chan error, 1), apply: func(t *txn) (err error) {
		next, err = t.endEpoch(who)
		return err
	}})
	if err != nil {
		return 0, err // the writer may still use the variable
	}
	return next, nil
}

func (t *txn) endEpoch(who audit.Actor) (next uint32, err error) {
	if err := t.putChunk(); err != nil {
		return 0, err
	}
	e, err := getEpoch(t.tx, t.log.epoch)
	if err != nil {
		return 0, err
	}
	root, err := t.log.tree.Root()
	if err != nil {
		return 0, err
	}
	e.Ended, e.Size, e.Root = t.now.UnixMilli(), t.log.tree.Size, root[:]
	if err := t.putEpoch(e); err != nil {
		return 0, err
	}
	end := &audit.EpochEnd{Size: e.Size, Root: root}
	return e.Number + 1, t.beginEpoch(e.Number+1, who, end, t.l.clock.wall())
}

// loadLog finds the end of the log. loadLog checks the last segment of events against its hashes,
// and the tree against the newest checkpoint.
func loadLog(tx *bolt.Tx) (s logState, err error) {
	last, _ := root(tx, bucketEpochs).Cursor().Last()
	if len(last) != 4 {
		return s, fmt.Errorf("%w: it has no epoch", ErrCorrupt)
	}
	s.epoch = binary.BigEndian.Uint32(last)
	e, err := getEpoch(tx, s.epoch)
	if err != nil {
		return s, err
	}
	s.first = e.First
	name, _ := root(tx, bucketEvents).Cursor().Last()
	if len(name) != 8 {
		return s, fmt.Errorf("%w: it has no events", ErrCorrupt)
	}
	events := root(tx, bucketEvents).Bucket(name)
	newest, _ := events.Cursor().Last()
	misplaced := func(event, number uint64) bool { return event/segment != number || event < s.first }
	if len(newest) != 8 || misplaced(binary.BigEndian.Uint64(newest), binary.BigEndian.Uint64(name)) {
		return s, fmt.Errorf("%w: the last event found is %x in segment %x", ErrCorrupt, newest, name)
	}
	s.next = binary.BigEndian.Uint64(newest) + 1
	stored := reader{tx, s.epoch}
	if s.tree, err = audit.LoadTree(s.next-s.first, stored); err != nil {
		return s, err
	}
	s.chunks = audit.StoredHashes(s.tree.Size) / chunkHashes
	s.chunk = bytes.Clone(root(tx, bucketHashes).Get(chunkKey(s.epoch, s.chunks)))
	if n := audit.StoredHashes(s.tree.Size) % chunkHashes; uint64(len(s.chunk)) != n*uint64(len(audit.Hash{})) {
		return s, fmt.Errorf("%w: the hashes of %d events are followed by others", ErrCorrupt, s.tree.Size)
	}
	for index := max(s.first, s.next-1-(s.next-1)%segment); index < s.next; index++ {
		if _, err := checkEvent(events, stored, index, s.first); err != nil {
			return s, err
		}
	}
	if e.Signed > s.tree.Size {
		return s, fmt.Errorf("%w: the checkpoint has %d events, the log has %d", ErrCorrupt, e.Signed, s.tree.Size)
	}
	return s, checkRoot(e, s.tree, stored)
}

// checkEvent compares an event with its stored hash, and returns the hash.
func checkEvent(events *bolt.Bucket, stored reader, index, first uint64) (audit.Hash, error) {
	b := events.Get(u64(index))
	h, err := stored.ReadHashes([]int64{tlog.StoredHashIndex(0, int64(index-first))})
	if err != nil {
		return audit.Hash{}, err
	}
	if b == nil || audit.LeafHash(b) != h[0] {
		return audit.Hash{}, fmt.Errorf("%w: event %d is not what was written", ErrCorrupt, index)
	}
	return h[0], nil
}

// checkRoot compares the stored hashes with the newest checkpoint of an epoch. The ledger has no
// key to verify the signature of the checkpoint.
func checkRoot(e Epoch, tree audit.Tree, stored reader) error {
	if e.Signed == 0 {
		return nil
	}
	signed, err := audit.LoadTree(e.Signed, stored)
	if err != nil {
		return err
	}
	root, err := signed.Root()
	if err != nil {
		return err
	}
	if body := fmt.Sprintf("\n%d\n%v\n", e.Signed, root); !strings.Contains(e.Checkpoint, body) {
		return fmt.Errorf("%w: the tree of epoch %d is not that of its checkpoint", ErrCorrupt, e.Number)
	}
	return nil
}

// reader reads the stored hashes of an epoch. reader is an audit.Reader.
type reader struct {
	tx    *bolt.Tx
	epoch uint32
}

func (r reader) ReadHashes(indexes []int64) ([]audit.Hash, error) {
	b := root(r.tx, bucketHashes)
	hashes := make([]audit.Hash, len(indexes))
	for i, index := range indexes {
		chunk := b.Get(chunkKey(r.epoch, uint64(index)/chunkHashes))
		at := index % chunkHashes * int64(len(hashes[i]))
		if at+int64(len(hashes[i])) > int64(len(chunk)) {
			return nil, fmt.Errorf("%w: hash %d of epoch %d is missing", ErrCorrupt, index, r.epoch)
		}
		copy(hashes[i][:], chunk[at:])
	}
	return hashes, nil
}

// Hashes calls read with a reader of the stored hashes of an epoch. The reader is valid until read
// returns. The error for a dropped epoch wraps ErrDropped.
func (l *Ledger) Hashes(epoch uint32, read func(audit.Reader) error) error {
	return l.view(func(tx *bolt.Tx) error {
		e, err := getEpoch(tx, epoch)
		if err != nil {
			return err
		}
		if e.Dropping != 0 {
			return fmt.Errorf("epoch %d: %w", epoch, ErrDropped)
		}
		return read(reader{tx, epoch})
	})
}

// Head returns the end of the log on disk: the present epoch, the number of its first event, and
// its tree.
func (l *Ledger) Head() (epoch uint32, first uint64, tree audit.Tree) {
	s := l.published.Load()
	return s.epoch, s.first, s.tree
}

// Epochs returns all epochs, including dropped ones.
func (l *Ledger) Epochs() (all []Epoch, err error) {
	err = l.view(func(tx *bolt.Tx) error {
		return root(tx, bucketEpochs).ForEach(func(k, _ []byte) error {
			e, err := getEpoch(tx, binary.BigEndian.Uint32(k))
			all = append(all, e)
			return err
		})
	})
	return all, err
}

// Epoch returns an epoch by its number, or an error that wraps ErrNotFound.
func (l *Ledger) Epoch(n uint32) (e Epoch, err error) {
	err = l.view(func(tx *bolt.Tx) (err error) { e, err = getEpoch(tx, n); return err })
	return e, err
}

// EpochOf returns the epoch of an event, or an error that wraps ErrNotFound.
func (l *Ledger) EpochOf(event uint64) (e Epoch, err error) {
	if event >= l.published.Load().next {
		return e, fmt.Errorf("event %d: %w", event, ErrNotFound)
	}
	err = l.view(func(tx *bolt.Tx) error {
		c := root(tx, bucketEpochs).Cursor()
		for k, _ := c.Last(); k != nil; k, _ = c.Prev() { // newest first: most requests are for new events
			if e, err = getEpoch(tx, binary.BigEndian.Uint32(k)); err != nil || e.First <= event {
				return err
			}
		}
		return fmt.Errorf("event %d: %w", event, ErrNotFound)
	})
	return e, err
}

// SetCheckpoint stores a signed checkpoint of an epoch, unless a checkpoint of the same or a larger
// size is stored. The checkpoint may be published when SetCheckpoint has returned.
func (l *Ledger) SetCheckpoint(ctx context.Context, epoch uint32, size uint64, text []byte) error {
	if _, err := l.Epoch(epoch); err != nil { // in the shared transaction below, the error would be fatal
		return err
	}
	return l.submit(ctx, &request{done: make(chan error, 1), apply: func(t *txn) error {
		e, err := getEpoch(t.tx, epoch)
		if err != nil || e.Signed >= size {
			return err
		}
		t.wrote = true
		e.Checkpoint, e.Signed = string(text), size
		return t.putEpoch(e)
	}})
}

// A read transaction reads at most maxEventsPerView events or decisions, and ends after
// maxBytesPerView bytes of them. A long read transaction would keep pages from the writer, and the
// records are in memory until the caller has seen them.
const (
	maxEventsPerView = 256
	maxBytesPerView  = 256 << 10
)

// numbered is a record with the number of its event.
type numbered struct {
	index uint64
	bytes []byte
}

// view is what one read transaction has read.
type view struct {
	records []numbered
	size    int // bytes of the records
}

// take adds a copy of a record, or returns false if the view has enough.
func (v *view) take(k, b []byte) bool {
	if len(v.records) >= maxEventsPerView || v.size >= maxBytesPerView {
		return false
	}
	v.records = append(v.records, numbered{binary.BigEndian.Uint64(k), bytes.Clone(b)})
	v.size += len(b)
	return true
}

// inViews calls visit for records in the order of their events, until visit returns an error. read
// reads the records from number from on, in one read transaction. The end is a view without a
// record.
func (l *Ledger) inViews(from uint64, read func(*bolt.Tx, uint64, *view), visit func(numbered) (bool, error)) error {
	for {
		var v view
		if err := l.view(func(tx *bolt.Tx) error { read(tx, from, &v); return nil }); err != nil {
			return err
		}
		for _, each := range v.records {
			if more, err := visit(each); err != nil || !more {
				return err
			}
			from = each.index + 1
		}
		if len(v.records) == 0 {
			return nil
		}
	}
}

// Events calls visit for each event on disk from number from on, until visit returns false. Dropped
// events are skipped.
func (l *Ledger) Events(from uint64, visit func(index uint64, event []byte) bool) error {
	return l.inViews(from, func(tx *bolt.Tx, from uint64, v *view) {
		from = max(from, firstKept(tx))
		segments := root(tx, bucketEvents).Cursor()
		for name, _ := segments.Seek(u64(from / segment)); name != nil; name, _ = segments.Next() {
			c := root(tx, bucketEvents).Bucket(name).Cursor()
			for k, b := c.Seek(u64(from)); k != nil; k, b = c.Next() {
				if !v.take(k, b) {
					return
				}
			}
		}
	}, func(e numbered) (bool, error) { return visit(e.index, e.bytes), nil })
}

// firstKept returns the number of the first event that is not dropped.
func firstKept(tx *bolt.Tx) uint64 {
	c := root(tx, bucketEpochs).Cursor()
	for k, _ := c.First(); k != nil; k, _ = c.Next() {
		if e, err := getEpoch(tx, binary.BigEndian.Uint32(k)); err != nil || e.Dropping == 0 {
			return e.First
		}
	}
	return 0
}

// Time returns the ledger's time.
func (l *Ledger) Time() time.Time { return l.clock.time() }
