package ledger

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	bolt "go.etcd.io/bbolt"
)

// A spent nonce is a record on disk, written at the end of the segment of its hour of expiry, so that the writer touches few
// pages however many there are, and an entry in memory, by which it is found. Nothing is searched on disk but for a
// nonce that was spent.
//
// Memory and disk agree at the start, by load, and after each transaction, by add. An hour whose nonces have expired is
// forgotten at once; its records on disk are pages that sweep gives back to the file when it needs some.

// fingerprint is a nonce in its scope: the first half of a SHA-256. Who makes two of one fingerprint has a nonce refused.
type fingerprint [16]byte

func fingerprintOf(scope Scope, nonce [32]byte) fingerprint {
	b := make([]byte, 0, 2+len(scope)+len(nonce))
	b = binary.BigEndian.AppendUint16(b, uint16(len(scope)))
	b = append(append(b, scope...), nonce[:]...)
	sum := sha256.Sum256(b)
	return fingerprint(sum[:16])
}

// ownerOf is who asked for what: only an equal one is a repetition.
func ownerOf(digest, peer [32]byte) [32]byte { return sha256.Sum256(append(digest[:], peer[:]...)) }

// hourOf is the hour in which a document expires; all that expire in it are forgotten together.
func hourOf(expiresAt int64) uint32 {
	return uint32(min(max(0, expiresAt/3600), 1<<32-1))
}

// spent is the record of a spent nonce. On disk, under u64 event:
//
//	fingerprint (16) || owner (32) || u32 key version || u32 CRC-32C of hour, event and all of that
type spent struct {
	event   uint64
	hour    uint32
	print   fingerprint
	owner   [32]byte
	version uint32
}

const spentSize = 16 + 32 + 4 + 4

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (s spent) encode() []byte {
	b := make([]byte, 0, spentSize)
	b = append(append(b, s.print[:]...), s.owner[:]...)
	b = binary.BigEndian.AppendUint32(b, s.version)
	return binary.BigEndian.AppendUint32(b, s.sum(b))
}

// sum makes a record that was changed on the disk no nonce, rather than another one: the right one would be fresh.
func (s spent) sum(b []byte) uint32 {
	var place [12]byte
	binary.BigEndian.PutUint32(place[:], s.hour)
	binary.BigEndian.PutUint64(place[4:], s.event)
	return crc32.Update(crc32.Checksum(place[:], castagnoli), castagnoli, b)
}

func decodeSpent(hour uint32, k, v []byte) (spent, error) {
	if len(k) != 8 || len(v) != spentSize {
		return spent{}, fmt.Errorf("%w: a nonce of hour %d has %d and %d bytes", ErrCorrupt, hour, len(k), len(v))
	}
	s := spent{binary.BigEndian.Uint64(k), hour, fingerprint(v), [32]byte(v[16:]), binary.BigEndian.Uint32(v[48:])}
	if s.sum(v[:spentSize-4]) != binary.BigEndian.Uint32(v[spentSize-4:]) {
		return spent{}, fmt.Errorf("%w: the nonce of event %d is not what was written", ErrCorrupt, s.event)
	}
	return s, nil
}

// segmentName is the bucket of a record: hour of expiry and segment of the log.
func (s spent) segmentName() []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(nil, s.hour), s.event/segment)
}

// nonces are the spent nonces that are alive, in memory, by the hour of their expiry. The writer owns
// them; mu is held where hours come and go, so that living can be asked by anybody.
type nonces struct {
	margin  time.Duration
	alive   int
	expired bool // records of expired hours may be on disk

	mu    sync.Mutex
	hours []*hour
}

type hour struct {
	number uint32
	spent  map[fingerprint]uint64 // the number of the admission
	count  atomic.Int64           // the length of spent, for readers
}

// gone says that the nonces of an hour need not be known any more.
func (n *nonces) gone(hour uint32, now time.Time) bool {
	return !now.Before(time.Unix((int64(hour)+1)*3600, 0).Add(n.margin))
}

// expire forgets the hours that are gone.
func (n *nonces) expire(now time.Time) {
	if !slices.ContainsFunc(n.hours, func(h *hour) bool { return n.gone(h.number, now) }) {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hours = slices.DeleteFunc(n.hours, func(h *hour) bool {
		gone := n.gone(h.number, now)
		if gone {
			n.alive -= len(h.spent)
			n.expired = true
		}
		return gone
	})
}

// living is how many nonces are alive at a time.
func (n *nonces) living(now time.Time) (count int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, h := range n.hours {
		if !n.gone(h.number, now) {
			count += int(h.count.Load())
		}
	}
	return count
}

// load reads the records of all hours that are alive, several hours at once: it is what a start takes longest for.
func (n *nonces) load(db *bolt.DB, now time.Time, next uint64) error {
	segments := map[uint32][][]byte{} // the names, by hour
	err := db.View(func(tx *bolt.Tx) error {
		c := root(tx, bucketNonces).Cursor()
		for name, _ := c.First(); name != nil; name, _ = c.Next() {
			if len(name) != 12 {
				return fmt.Errorf("%w: there are nonces in %x", ErrCorrupt, name)
			}
			number := binary.BigEndian.Uint32(name)
			if n.gone(number, now) {
				n.expired = true
				continue
			}
			segments[number] = append(segments[number], bytes.Clone(name))
		}
		return nil
	})
	if err != nil {
		return err
	}
	type result struct {
		*hour
		err error
	}
	results := make(chan result, len(segments))
	places := make(chan struct{}, runtime.GOMAXPROCS(0))
	for number, names := range segments {
		go func() {
			places <- struct{}{}
			defer func() { <-places }()
			r := result{hour: &hour{number: number}}
			r.err = guard(func() error {
				return db.View(func(tx *bolt.Tx) (err error) {
					r.spent, err = loadHour(root(tx, bucketNonces), number, names, next)
					return err
				})
			})
			results <- r
		}()
	}
	for range segments {
		r := <-results
		r.count.Store(int64(len(r.spent)))
		n.hours, n.alive = append(n.hours, r.hour), n.alive+len(r.spent)
		err = errors.Join(err, r.err)
	}
	return err
}

func loadHour(bucket *bolt.Bucket, number uint32, names [][]byte, next uint64) (map[fingerprint]uint64, error) {
	type record struct {
		print fingerprint
		event uint64
	}
	records := make([]record, 0, len(names)*segment/8) // first, so that the map has its size from the beginning
	for _, name := range names {
		b := bucket.Bucket(name)
		if b == nil {
			return nil, fmt.Errorf("%w: there are nonces in %x", ErrCorrupt, name)
		}
		c := b.Cursor()
		for k, v := c.First(); k != nil; k, v = c.Next() {
			s, err := decodeSpent(number, k, v)
			if err != nil {
				return nil, err
			}
			if s.event >= next || s.event/segment != binary.BigEndian.Uint64(name[4:]) {
				return nil, fmt.Errorf("%w: the nonce of event %d is in %x", ErrCorrupt, s.event, name)
			}
			records = append(records, record{s.print, s.event})
		}
	}
	m := make(map[fingerprint]uint64, len(records))
	for _, r := range records {
		m[r.print] = r.event
	}
	return m, nil
}

func (n *nonces) hour(number uint32) *hour {
	for _, h := range n.hours {
		if h.number == number {
			return h
		}
	}
	h := &hour{number: number, spent: map[fingerprint]uint64{}}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hours = append(n.hours, h)
	return h
}

// follow takes a record of the list of a transaction into memory.
func (n *nonces) follow(segmentName, k, v []byte) error {
	if len(segmentName) != 12 {
		return fmt.Errorf("%w: there are nonces in %x", ErrCorrupt, segmentName)
	}
	s, err := decodeSpent(binary.BigEndian.Uint32(segmentName), k, v)
	if err != nil {
		return err
	}
	h := n.hour(s.hour)
	h.spent[s.print] = s.event
	h.count.Add(1)
	n.alive++
	return nil
}

// find looks a nonce up.
func (t *txn) find(print fingerprint) (s spent, found bool, err error) {
	at, found := t.spent[print]
	for i := 0; !found && i < len(t.l.nonces.hours); i++ {
		at.hour = t.l.nonces.hours[i].number
		at.event, found = t.l.nonces.hours[i].spent[print]
	}
	if !found {
		return s, false, nil
	}
	s.event, s.hour = at.event, at.hour
	b := root(t.tx, bucketNonces).Bucket(s.segmentName())
	if b == nil {
		return s, false, fmt.Errorf("%w: the nonce of event %d is not there any more", ErrCorrupt, s.event)
	}
	k := u64(s.event)
	s, err = decodeSpent(s.hour, k, b.Get(k))
	if err == nil && s.print != print {
		err = fmt.Errorf("%w: the nonce of event %d is another", ErrCorrupt, at.event)
	}
	return s, true, err
}

// mayKeep refuses a nonce that can't be kept.
func (t *txn) mayKeep(hour uint32) error {
	if t.l.nonces.gone(hour, t.now) {
		return fmt.Errorf("%w: what expires then is forgotten already", ErrClock)
	}
	if t.l.nonces.alive+len(t.spent) >= t.l.options.MaxNonces {
		return fmt.Errorf("%w: %d", ErrTooMany, t.l.options.MaxNonces)
	}
	return nil
}

// spend writes a record down.
func (t *txn) spend(s spent) error {
	b, err := t.bucket(bucketNonces).inner(s.segmentName())
	if err != nil {
		return err
	}
	t.spent[s.print] = spentAt{s.event, s.hour}
	return b.put(u64(s.event), s.encode())
}

// outcome returns the signature that an admission ended with, or nil.
func (t *txn) outcome(s spent) []byte {
	b := root(t.tx, bucketOutcomes).Bucket(s.segmentName())
	if b == nil {
		return nil
	}
	return bytes.Clone(b.Get(u64(s.event)))
}

// settle writes an outcome down, unless its nonce is forgotten already.
func (t *txn) settle(s spent, signature []byte) error {
	if t.l.nonces.gone(s.hour, t.now) {
		return nil
	}
	b, err := t.bucket(bucketOutcomes).inner(s.segmentName())
	if err != nil {
		return err
	}
	return b.put(u64(s.event), signature)
}

// enoughFree is how many free pages the file has to have before more are made of what has expired. bbolt writes the list of
// free pages with each transaction, so there should not be too many; with enough, the file does not grow.
const enoughFree = 1024

// sweep gives the pages of what has expired back to the file, where it needs some: in one transaction as many segments as have the
// records of a full one together, since those whose nonces expire in many hours are small and many.
func (t *txn) sweep() error {
	if !t.l.nonces.expired || t.l.db.Stats().FreePageN >= enoughFree {
		return nil
	}
	for _, number := range []byte{bucketNonces, bucketOutcomes} {
		b := t.bucket(number)
		for records := 0; records < segment; {
			first, _ := b.cursor().First()
			if first == nil || !t.l.nonces.gone(binary.BigEndian.Uint32(first), t.now) {
				t.swept = t.swept || number == bucketNonces
				break
			}
			first = bytes.Clone(first)
			records += max(segment/256, b.peek(first).Stats().KeyN)
			if err := b.drop(first); err != nil {
				return err
			}
		}
	}
	return nil
}
