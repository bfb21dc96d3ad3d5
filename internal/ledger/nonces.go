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
	"time"

	bolt "go.etcd.io/bbolt"
)

// A spent nonce has a record on disk and an entry in memory. Lookups use the memory; the disk is
// read only for a nonce that was spent. Records are grouped by the hour of expiry and by the
// segment of the log, and appended at the end of the group. A commit therefore writes few pages,
// even with millions of nonces.
//
// Memory and disk agree after load at the start, and after follow for each transaction. When all
// nonces of an hour have expired, the memory forgets the hour at once. The records on disk stay
// until sweep frees their pages, when the file needs free pages.

// fingerprint identifies a nonce in its scope: the first 16 bytes of a SHA-256. A peer that finds a
// collision of two own nonces gets the second one refused, and no more.
type fingerprint [16]byte

func fingerprintOf(scope Scope, nonce [32]byte) fingerprint {
	b := make([]byte, 0, 2+len(scope)+len(nonce))
	b = binary.BigEndian.AppendUint16(b, uint16(len(scope)))
	b = append(append(b, scope...), nonce[:]...)
	sum := sha256.Sum256(b)
	return fingerprint(sum[:16])
}

// hashRequest returns the hash of a request's digest and peer. A repetition has the same hash,
// whichever of its keys the peer uses.
func hashRequest(digest [32]byte, peer string) [32]byte {
	return sha256.Sum256(append(digest[:], peer...))
}

// hourOf returns the hour of an expiry, in hours since 1970. All nonces of an hour are forgotten
// together.
func hourOf(expiresAt int64) uint32 {
	return uint32(min(max(0, expiresAt/3600), 1<<32-1))
}

// spent is the record of a spent nonce. The record on disk has the key u64 event and the value
//
//	fingerprint (16) || request hash (32) || u32 key version || u8 use || peer (8) || u32 checksum
//
// Use and peer are the share. The checksum is the CRC-32C of u32 hour, u64 event and the 61 bytes
// before the checksum.
type spent struct {
	event       uint64
	hour        uint32
	fingerprint fingerprint
	requestHash [32]byte
	version     uint32
	share       share
}

const spentSize = 16 + 32 + 4 + 1 + 8 + 4

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (s spent) encode() []byte {
	b := make([]byte, 0, spentSize)
	b = append(append(b, s.fingerprint[:]...), s.requestHash[:]...)
	b = append(binary.BigEndian.AppendUint32(b, s.version), byte(s.share.use))
	b = append(b, s.share.peer[:]...)
	return binary.BigEndian.AppendUint32(b, s.checksum(b))
}

// checksum returns the CRC-32C of a record. A changed record is therefore an error at opening.
// Without the checksum a changed fingerprint would make the real nonce fresh again.
func (s spent) checksum(b []byte) uint32 {
	var position [12]byte
	binary.BigEndian.PutUint32(position[:], s.hour)
	binary.BigEndian.PutUint64(position[4:], s.event)
	return crc32.Update(crc32.Checksum(position[:], castagnoli), castagnoli, b)
}

func decodeSpent(hour uint32, k, v []byte) (spent, error) {
	if len(k) != 8 || len(v) != spentSize {
		return spent{}, fmt.Errorf("%w: a nonce of hour %d has %d and %d bytes", ErrCorrupt, hour, len(k), len(v))
	}
	s := spent{
		binary.BigEndian.Uint64(k), hour, fingerprint(v), [32]byte(v[16:]), binary.BigEndian.Uint32(v[48:]),
		share{Use(v[52]), PeerID(v[53:])},
	}
	if s.checksum(v[:spentSize-4]) != binary.BigEndian.Uint32(v[spentSize-4:]) {
		return spent{}, fmt.Errorf("%w: the nonce of event %d is not what was written", ErrCorrupt, s.event)
	}
	if u := s.share.use; u < Signing || u > Own || (u == Own) != (s.share.peer == PeerID{}) {
		return spent{}, fmt.Errorf("%w: the nonce of event %d is of no known share", ErrCorrupt, s.event)
	}
	return s, nil
}

// segmentName returns the name of a record's bucket: hour of expiry and segment of the log.
func (s spent) segmentName() []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint32(nil, s.hour), s.event/segment)
}

// nonces are the spent nonces in memory that have not expired, by the hour of expiry. The writer
// owns the nonces. Other goroutines may call heldAt: the writer changes the list of hours and the
// numbers of nonces under mu.
type nonces struct {
	margin  time.Duration
	expired bool // records of expired hours may be on disk

	mu    sync.Mutex
	hours []*hour
	held  held // in all hours
}

type hour struct {
	number uint32
	spent  map[fingerprint]uint64 // the number of the admission
	held   held
}

// expiredHour reports whether all nonces of an hour have expired and the margin has passed.
func (n *nonces) expiredHour(hour uint32, now time.Time) bool {
	return !now.Before(time.Unix((int64(hour)+1)*3600, 0).Add(n.margin))
}

// expire forgets the expired hours.
func (n *nonces) expire(now time.Time) {
	if !slices.ContainsFunc(n.hours, func(h *hour) bool { return n.expiredHour(h.number, now) }) {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hours = slices.DeleteFunc(n.hours, func(h *hour) bool {
		gone := n.expiredHour(h.number, now)
		if gone {
			n.held.addAll(h.held, -1)
			n.expired = true
		}
		return gone
	})
}

// load reads the records of all hours that have not expired. Several hours are read in parallel,
// because load is the longest part of a start.
func (n *nonces) load(db *bolt.DB, now time.Time, next uint64) error {
	segments := map[uint32][][]byte{} // names of the buckets by hour
	err := db.View(func(tx *bolt.Tx) error {
		c := root(tx, bucketNonces).Cursor()
		for name, _ := c.First(); name != nil; name, _ = c.Next() {
			if len(name) != 12 {
				return fmt.Errorf("%w: there are nonces in %x", ErrCorrupt, name)
			}
			number := binary.BigEndian.Uint32(name)
			if n.expiredHour(number, now) {
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
	slots := make(chan struct{}, runtime.GOMAXPROCS(0))
	for number, names := range segments {
		go func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			r := result{hour: &hour{number: number}}
			r.err = guard(func() error {
				return db.View(func(tx *bolt.Tx) error { return r.load(root(tx, bucketNonces), names, next) })
			})
			results <- r
		}()
	}
	for range segments {
		r := <-results
		n.hours = append(n.hours, r.hour)
		n.held.addAll(r.held, 1)
		err = errors.Join(err, r.err)
	}
	return err
}

// load reads the records of an hour from the buckets of its segments.
func (h *hour) load(bucket *bolt.Bucket, names [][]byte, next uint64) error {
	type record struct {
		fingerprint fingerprint
		event       uint64
	}
	records := make([]record, 0, len(names)*segment/8) // read before the map is made, so that the map never grows
	var last share                                     // consecutive nonces of a share are counted together
	var consecutive int
	for _, name := range names {
		b := bucket.Bucket(name)
		if b == nil {
			return fmt.Errorf("%w: there are nonces in %x", ErrCorrupt, name)
		}
		c := b.Cursor()
		for k, v := c.First(); k != nil; k, v = c.Next() {
			s, err := decodeSpent(h.number, k, v)
			if err != nil {
				return err
			}
			if s.event >= next || s.event/segment != binary.BigEndian.Uint64(name[4:]) {
				return fmt.Errorf("%w: the nonce of event %d is in %x", ErrCorrupt, s.event, name)
			}
			records = append(records, record{s.fingerprint, s.event})
			if s.share != last {
				h.held.add(last, consecutive)
				last, consecutive = s.share, 0
			}
			consecutive++
		}
	}
	h.held.add(last, consecutive)
	h.spent = make(map[fingerprint]uint64, len(records))
	for _, r := range records {
		h.spent[r.fingerprint] = r.event
	}
	return nil
}

// hour returns the nonces of an hour, which is added if necessary.
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

// follow adds a record to the memory. The record is from the list of writes of a transaction.
func (n *nonces) follow(segmentName, k, v []byte) error {
	if len(segmentName) != 12 {
		return fmt.Errorf("%w: there are nonces in %x", ErrCorrupt, segmentName)
	}
	s, err := decodeSpent(binary.BigEndian.Uint32(segmentName), k, v)
	if err != nil {
		return err
	}
	h := n.hour(s.hour)
	h.spent[s.fingerprint] = s.event
	n.mu.Lock()
	defer n.mu.Unlock()
	h.held.add(s.share, 1)
	n.held.add(s.share, 1)
	return nil
}

// find returns the record of a spent nonce.
func (t *txn) find(fp fingerprint) (s spent, found bool, err error) {
	at, found := t.spent[fp]
	for i := 0; !found && i < len(t.l.nonces.hours); i++ {
		at.hour = t.l.nonces.hours[i].number
		at.event, found = t.l.nonces.hours[i].spent[fp]
	}
	if !found {
		return s, false, nil
	}
	s.event, s.hour = at.event, at.hour
	b := root(t.tx, bucketNonces).Bucket(s.segmentName())
	if b == nil {
		return s, false, fmt.Errorf("%w: the nonce of event %d is missing", ErrCorrupt, s.event)
	}
	k := u64(s.event)
	s, err = decodeSpent(s.hour, k, b.Get(k))
	if err == nil && s.fingerprint != fp {
		err = fmt.Errorf("%w: the nonce of event %d is another", ErrCorrupt, at.event)
	}
	return s, true, err
}

// spend writes the record of a nonce.
func (t *txn) spend(s spent) error {
	b, err := t.bucket(bucketNonces).inner(s.segmentName())
	if err != nil {
		return err
	}
	t.spent[s.fingerprint] = spentAt{s.event, s.hour}
	t.held.add(s.share, 1)
	return b.put(u64(s.event), s.encode())
}

// outcome returns the signature of an admission, or nil.
func (t *txn) outcome(s spent) []byte {
	b := root(t.tx, bucketOutcomes).Bucket(s.segmentName())
	if b == nil {
		return nil
	}
	return bytes.Clone(b.Get(u64(s.event)))
}

// settle writes the signature of an admission, unless the nonce has expired.
func (t *txn) settle(s spent, signature []byte) error {
	if t.l.nonces.expiredHour(s.hour, t.now) {
		return nil
	}
	b, err := t.bucket(bucketOutcomes).inner(s.segmentName())
	if err != nil {
		return err
	}
	return b.put(u64(s.event), signature)
}

// minFreePages is the number of free pages from which on sweep frees no more. With enough free
// pages the file does not grow. With too many, each transaction is slow, because bbolt writes the
// list of free pages each time.
const minFreePages = 1024

// sweep frees the pages of expired records, if the file has fewer than minFreePages free pages. One
// transaction frees the buckets of some 4096 records: a segment whose nonces expire in many hours
// has many small buckets.
func (t *txn) sweep() error {
	if !t.l.nonces.expired || t.l.db.Stats().FreePageN >= minFreePages {
		return nil
	}
	for _, number := range []byte{bucketNonces, bucketOutcomes} {
		b := t.bucket(number)
		for records := 0; records < segment; {
			first, _ := b.cursor().First()
			if first == nil || !t.l.nonces.expiredHour(binary.BigEndian.Uint32(first), t.now) {
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
