package ledger

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"time"

	"countersign/audit"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/mod/sumdb/tlog"
)

const (
	segment     = 4096 // events of one bucket; they are dropped together
	chunkHashes = 64   // of the tree in one value
)

// Event is what gets written down, with its hash, so that the writer need not make it.
type Event struct {
	bytes []byte
	hash  audit.Hash
}

// NewEvent hashes an event, which must not be changed afterwards.
func NewEvent(b []byte) Event { return Event{b, audit.LeafHash(b)} }

// EventOf encodes and hashes an event of the audit log, with the time of now.
func EventOf(e audit.Event) Event { return NewEvent(e.Encode(time.Now())) }

// logState is where the log ends.
type logState struct {
	next   uint64 // number of the next event
	epoch  uint32
	first  uint64 // number of the epoch's first event
	tree   audit.Tree
	chunks uint64 // full ones
	chunk  []byte // the hashes after them
}

func (s logState) copy() logState {
	s.chunk = slices.Clone(s.chunk) // bbolt keeps what it was given until the transaction ends
	return s
}

// Epoch is a part of the log with a tree of its own.
type Epoch struct {
	Number     uint32 `json:"-"`
	First      uint64 `json:"first"`                // number of its first event
	Begun      int64  `json:"begun"`                // Unix milliseconds of the ledger's time
	Ended      int64  `json:"ended,omitempty"`      // 0: it is the present one
	Size       uint64 `json:"size,omitempty"`       // once it has ended
	Root       []byte `json:"root,omitempty"`       // once it has ended
	Checkpoint string `json:"checkpoint,omitempty"` // the newest one, signed; once it has ended, the final one
	Signed     uint64 `json:"signed,omitempty"`     // the size that it is of
	Hold       string `json:"hold,omitempty"`       // why it must not be dropped
	Dropping   int64  `json:"dropping,omitempty"`   // since when it is gone for readers
	Dropped    int64  `json:"dropped,omitempty"`    // when nothing of it was left
}

// Final says that the epoch has ended and its final checkpoint is signed.
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

// beginEpoch begins the first epoch, or the one after the present one. Its first event names where that ended.
func (t *txn) beginEpoch(n uint32, who audit.Actor, before *audit.EpochEnd) error {
	if err := t.putEpoch(Epoch{Number: n, First: t.log.next, Begun: t.now.UnixMilli()}); err != nil {
		return err
	}
	t.log = logState{next: t.log.next, epoch: n, first: t.log.next}
	e := audit.NewEpochBegun(who, n, t.log.next, before)
	_, err := t.append(NewEvent(e.Encode(t.now)))
	return err
}

// EndEpoch ends the present epoch and begins the next one, and returns the number of that. The final checkpoint is to be signed
// afterwards: what it will say is settled now.
func (l *Ledger) EndEpoch(ctx context.Context, who audit.Actor) (uint32, error) {
	var next uint32
	err := l.submit(ctx, &request{alone: true, done: make(chan error, 1), apply: func(t *txn) error {
		if err := t.putChunk(); err != nil {
			return err
		}
		e, err := getEpoch(t.tx, t.log.epoch)
		if err != nil {
			return err
		}
		root, err := t.log.tree.Root()
		if err != nil {
			return err
		}
		e.Ended, e.Size, e.Root = t.now.UnixMilli(), t.log.tree.Size, root[:]
		if err := t.putEpoch(e); err != nil {
			return err
		}
		next = e.Number + 1
		return t.beginEpoch(next, who, &audit.EpochEnd{Size: e.Size, Root: root})
	}})
	if err != nil {
		return 0, err // the writer may still be at it
	}
	return next, nil
}

// loadLog finds where the log ends, and holds the last segment of it against its hashes, and the tree against the newest checkpoint.
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
	if len(newest) != 8 || binary.BigEndian.Uint64(newest)/segment != binary.BigEndian.Uint64(name) || binary.BigEndian.Uint64(newest) < s.first {
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
		return s, fmt.Errorf("%w: a checkpoint was signed of %d events, and there are %d", ErrCorrupt, e.Signed, s.tree.Size)
	}
	return s, checkRoot(e, s.tree, stored)
}

// checkEvent holds an event against its hash, and returns that.
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

// checkRoot holds the hashes against the newest checkpoint. Its signature is checked by those who have the key.
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
	if !bytes.Contains([]byte(e.Checkpoint), []byte("\n"+strconv.FormatUint(e.Signed, 10)+"\n"+root.String()+"\n")) {
		return fmt.Errorf("%w: the tree of epoch %d is not that of its checkpoint", ErrCorrupt, e.Number)
	}
	return nil
}

// reader gives the stored hashes of an epoch.
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

// Hashes calls read with the stored hashes of an epoch.
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

// Head says where the log on disk ends: the present epoch, the number of its first event, and the tree.
func (l *Ledger) Head() (epoch uint32, first uint64, tree audit.Tree) {
	s := l.shown.Load()
	return s.epoch, s.first, s.tree
}

// Epochs lists all epochs, the dropped ones too.
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

// Epoch returns one of them.
func (l *Ledger) Epoch(n uint32) (e Epoch, err error) {
	err = l.view(func(tx *bolt.Tx) (err error) { e, err = getEpoch(tx, n); return err })
	return e, err
}

// EpochOf returns the epoch that an event is in.
func (l *Ledger) EpochOf(event uint64) (e Epoch, err error) {
	if event >= l.shown.Load().next {
		return e, fmt.Errorf("event %d: %w", event, ErrNotFound)
	}
	err = l.view(func(tx *bolt.Tx) error {
		c := root(tx, bucketEpochs).Cursor()
		for k, _ := c.Last(); k != nil; k, _ = c.Prev() { // most ask for new ones
			if e, err = getEpoch(tx, binary.BigEndian.Uint32(k)); err != nil || e.First <= event {
				return err
			}
		}
		return fmt.Errorf("event %d: %w", event, ErrNotFound)
	})
	return e, err
}

// SetCheckpoint keeps a signed checkpoint of an epoch; it may be shown when this returns. One that is not newer is not kept.
func (l *Ledger) SetCheckpoint(ctx context.Context, epoch uint32, size uint64, text []byte) error {
	if _, err := l.Epoch(epoch); err != nil { // an error of the request itself would be damage
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

// eventsAtOnce bounds how long a reader holds on to pages that the writer would use again.
const eventsAtOnce = 256

// Events calls visit for each event on disk from number from on, until visit returns false. What retention has dropped
// is passed over.
func (l *Ledger) Events(from uint64, visit func(index uint64, event []byte) bool) error {
	type numbered struct {
		index uint64
		bytes []byte
	}
	for {
		var some []numbered
		err := l.view(func(tx *bolt.Tx) error {
			from = max(from, firstKept(tx))
			segments := root(tx, bucketEvents).Cursor()
			for name, _ := segments.Seek(u64(from / segment)); name != nil && len(some) < eventsAtOnce; name, _ = segments.Next() {
				c := root(tx, bucketEvents).Bucket(name).Cursor()
				for k, v := c.Seek(u64(from)); k != nil && len(some) < eventsAtOnce; k, v = c.Next() {
					some = append(some, numbered{binary.BigEndian.Uint64(k), bytes.Clone(v)})
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, e := range some {
			if !visit(e.index, e.bytes) {
				return nil
			}
		}
		if len(some) < eventsAtOnce {
			return nil
		}
		from = some[len(some)-1].index + 1
	}
}

// firstKept is the number of the first event that retention has left.
func firstKept(tx *bolt.Tx) uint64 {
	c := root(tx, bucketEpochs).Cursor()
	for k, _ := c.First(); k != nil; k, _ = c.Next() {
		if e, err := getEpoch(tx, binary.BigEndian.Uint32(k)); err != nil || e.Dropping == 0 {
			return e.First
		}
	}
	return 0
}

// Time is the ledger's time.
func (l *Ledger) Time() time.Time { return l.clock.time() }
