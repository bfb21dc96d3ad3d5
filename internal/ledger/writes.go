package ledger

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	bolt "go.etcd.io/bbolt"
)

// Writes is the result of a transaction as a value: all its writes in their order, with the
// ledger's time. The writer decides while it makes the list: nonces, policy, windows, expiry, free
// pages. Applying a list decides nothing, so that a replica which applies the same lists in the same
// order has the same buckets, byte for byte.
type Writes struct {
	Time time.Time // the ledger's
	list []write
}

// write is one change of a bucket.
type write struct {
	op    op
	place *place
	key   []byte // of opPut and opDelete
	value []byte // of opPut
}

// op is what a write does. Its numbers are those of the encoded form.
type op byte

const (
	opPut        op = 1
	opDelete     op = 2
	opMakeBucket op = 3 // the bucket inside place.top that place.inner names
	opDropBucket op = 4
)

// place is the path of a bucket: the number of one in the root, and the name of one inside that.
type place struct {
	top   byte
	inner []byte // nil: the bucket of the root itself
}

// writesForm is the first byte of an encoded list: the version of this form.
const writesForm = 1

// samePlace marks a write of an encoded list that goes to the bucket of the write before it.
const samePlace = 0x80

// Encode gives the list as bytes: u8 form || i64 Unix nanoseconds || writes. A write is
//
//	u8 op, with 0x80 set where the bucket is that of the write before
//	u8 number of the bucket in the root || text inner     unless 0x80 is set
//	text key                                              of a put or a delete
//	text value                                            of a put
//
// A text is its length as a varint (encoding/binary) and its bytes. An inner name is never empty;
// length 0 says that the write goes to the bucket of the root itself. Numbers are big-endian.
func (w *Writes) Encode() []byte {
	b := make([]byte, 0, 9+128*len(w.list))
	b = binary.BigEndian.AppendUint64(append(b, writesForm), uint64(w.Time.UnixNano()))
	text := func(t []byte) { b = append(binary.AppendUvarint(b, uint64(len(t))), t...) }
	var last *place
	for _, each := range w.list {
		if each.place == last {
			b = append(b, byte(each.op)|samePlace)
		} else {
			b = append(b, byte(each.op), each.place.top)
			text(each.place.inner)
			last = each.place
		}
		if each.op == opPut || each.op == opDelete {
			text(each.key)
		}
		if each.op == opPut {
			text(each.value)
		}
	}
	return b
}

var errNotWrites = errors.New("ledger: the bytes are no encoded list of writes")

// DecodeWrites reads what Encode wrote. The list refers to b, which must not change afterwards.
func DecodeWrites(b []byte) (*Writes, error) {
	if len(b) < 9 || b[0] != writesForm {
		return nil, errNotWrites
	}
	w := &Writes{Time: time.Unix(0, int64(binary.BigEndian.Uint64(b[1:])))}
	b = b[9:]
	broken := false
	text := func() []byte {
		n, size := binary.Uvarint(b)
		if size <= 0 || n > uint64(len(b)-size) {
			broken = true
			return nil
		}
		t := b[size : size+int(n) : size+int(n)]
		b = b[size+int(n):]
		return t
	}
	var last *place
	for len(b) > 0 && !broken {
		each := write{op: op(b[0] &^ samePlace), place: last}
		if b[0]&samePlace == 0 {
			if len(b) < 2 {
				return nil, errNotWrites
			}
			last = &place{top: b[1]}
			b = b[2:]
			if inner := text(); len(inner) > 0 {
				last.inner = inner
			}
			each.place = last
		} else {
			b = b[1:]
		}
		switch {
		case each.place == nil || int(each.place.top) >= len(buckets):
			return nil, errNotWrites
		case each.op == opPut:
			each.key, each.value = text(), text()
		case each.op == opDelete:
			each.key = text()
		case each.op != opMakeBucket && each.op != opDropBucket || each.place.inner == nil:
			return nil, errNotWrites
		}
		w.list = append(w.list, each)
	}
	if broken {
		return nil, errNotWrites
	}
	return w, nil
}

// apply repeats the list in a transaction.
func (w *Writes) apply(tx *bolt.Tx) error {
	for _, each := range w.list {
		top := tx.Bucket(buckets[each.place.top].name)
		if top == nil {
			return fmt.Errorf("%w: its bucket %s is missing", ErrCorrupt, buckets[each.place.top].name)
		}
		b := top
		if inner := each.place.inner; inner != nil {
			var err error
			switch each.op {
			case opMakeBucket:
				_, err = top.CreateBucket(inner)
			case opDropBucket:
				err = top.DeleteBucket(inner)
			default:
				if b = top.Bucket(inner); b == nil {
					err = fmt.Errorf("%w: there is no bucket %x in %s", ErrCorrupt, inner, buckets[each.place.top].name)
				}
			}
			if err != nil {
				return err
			}
		}
		b.FillPercent = buckets[each.place.top].fill
		var err error
		switch each.op {
		case opPut:
			err = b.Put(each.key, each.value)
		case opDelete:
			err = b.Delete(each.key)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// bucket is one of the transaction under way. Its changes are noted in the transaction's list; keys
// and values that are put must not change until the transaction has ended.
type bucket struct {
	b     *bolt.Bucket
	t     *txn
	place *place
}

func (b bucket) get(key []byte) []byte { return b.b.Get(key) }

// cursor is for reading only.
func (b bucket) cursor() *bolt.Cursor { return b.b.Cursor() }

// peek returns the bucket of a name inside b for reading, or nil.
func (b bucket) peek(name []byte) *bolt.Bucket { return b.b.Bucket(name) }

// bucket returns the one of the root with a number.
func (t *txn) bucket(number byte) bucket {
	if t.roots[number].b == nil {
		b := t.tx.Bucket(buckets[number].name)
		b.FillPercent = buckets[number].fill
		t.roots[number] = bucket{b, t, &rootPlaces[number]}
	}
	return t.roots[number]
}

func (b bucket) note(w write) {
	w.place = b.place
	b.t.writes.list = append(b.t.writes.list, w)
}

func (b bucket) put(key, value []byte) error {
	if err := b.b.Put(key, value); err != nil {
		return err
	}
	b.note(write{op: opPut, key: key, value: value})
	return nil
}

func (b bucket) delete(key []byte) error {
	if err := b.b.Delete(key); err != nil {
		return err
	}
	b.note(write{op: opDelete, key: key})
	return nil
}

// inner returns the bucket of a name inside b, which is made where there is none.
func (b bucket) inner(name []byte) (bucket, error) {
	last := &b.t.inners[b.place.top]
	if last.b != nil && bytes.Equal(last.place.inner, name) {
		return *last, nil
	}
	in := bucket{b.peek(name), b.t, &place{b.place.top, name}}
	if in.b == nil {
		var err error
		if in.b, err = b.b.CreateBucket(name); err != nil {
			return bucket{}, err
		}
		in.note(write{op: opMakeBucket})
	}
	in.b.FillPercent = buckets[b.place.top].fill
	*last = in
	return in, nil
}

// drop removes the bucket of a name inside b.
func (b bucket) drop(name []byte) error {
	if err := b.b.DeleteBucket(name); err != nil {
		return err
	}
	b.t.inners[b.place.top] = bucket{}
	b.t.writes.list = append(b.t.writes.list, write{op: opDropBucket, place: &place{b.place.top, name}})
	return nil
}
