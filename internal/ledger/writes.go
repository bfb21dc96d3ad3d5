package ledger

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	bolt "go.etcd.io/bbolt"
)

// Writes is the list of writes of a transaction, in order, with the ledger's time. All decisions
// are made before: nonces, policy, windows, expiry, free pages. To apply a list needs no decision.
// A replica that applies the same lists in the same order therefore has equal buckets, byte for
// byte.
type Writes struct {
	Time   time.Time // the ledger's time
	Number uint64    // of the list: one more than that of the list before
	list   []write
}

// write is one change of a bucket.
type write struct {
	op    op
	path  *bucketPath
	key   []byte // of opPut and opDelete
	value []byte // of opPut
}

// op is the operation of a write. The encoded form has these numbers.
type op byte

const (
	opPut        op = 1
	opDelete     op = 2
	opMakeBucket op = 3 // the bucket path.inner in path.top
	opDropBucket op = 4
)

// bucketPath is the path of a bucket: the number of a bucket in the root, and the name of a bucket
// inside.
type bucketPath struct {
	top   byte
	inner []byte // nil for the bucket in the root itself
}

// writesVersion is the first byte of an encoded list: the version of the encoding.
const writesVersion = 2

// listHead is the length of an encoded list before its writes.
const listHead = 1 + 8 + 8

// samePath marks an encoded write whose bucket is that of the write before.
const samePath = 0x80

// Encode encodes the list: u8 version || i64 Unix nanoseconds || u64 number || writes. A write is
//
//	u8 op, with 0x80 set if the bucket is that of the write before
//	u8 number of the bucket in the root || text inner     unless 0x80 is set
//	text key                                              of a put or a delete
//	text value                                            of a put
//
// A text is its length as a varint (encoding/binary) and its bytes. A text inner of length 0 means
// the bucket in the root itself, because the name of an inner bucket is never empty. Integers are
// big-endian.
func (w *Writes) Encode() []byte {
	b := make([]byte, 0, listHead+128*len(w.list))
	b = binary.BigEndian.AppendUint64(append(b, writesVersion), uint64(w.Time.UnixNano()))
	b = binary.BigEndian.AppendUint64(b, w.Number)
	text := func(t []byte) { b = append(binary.AppendUvarint(b, uint64(len(t))), t...) }
	var last *bucketPath
	for _, each := range w.list {
		if each.path == last {
			b = append(b, byte(each.op)|samePath)
		} else {
			b = append(b, byte(each.op), each.path.top)
			text(each.path.inner)
			last = each.path
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

// bytesOf returns the number of bytes of keys and values in a list of writes.
func bytesOf(list []write) (n int) {
	for _, each := range list {
		n += len(each.key) + len(each.value)
	}
	return n
}

var errNotWrites = errors.New("ledger: not an encoded list of writes")

// NumberOf returns the number of a list of Encode.
func NumberOf(list []byte) uint64 { return binary.BigEndian.Uint64(list[9:]) }

// DecodeWrites decodes a list of Encode. The list refers to b, so b must not change afterwards.
func DecodeWrites(b []byte) (*Writes, error) {
	if len(b) < listHead || b[0] != writesVersion {
		return nil, errNotWrites
	}
	w := &Writes{Time: time.Unix(0, int64(binary.BigEndian.Uint64(b[1:]))), Number: NumberOf(b)}
	b = b[listHead:]
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
	var last *bucketPath
	for len(b) > 0 && !broken {
		each := write{op: op(b[0] &^ samePath), path: last}
		if b[0]&samePath == 0 {
			if len(b) < 2 {
				return nil, errNotWrites
			}
			last = &bucketPath{top: b[1]}
			b = b[2:]
			if inner := text(); len(inner) > 0 {
				last.inner = inner
			}
			each.path = last
		} else {
			b = b[1:]
		}
		switch {
		case each.path == nil || int(each.path.top) >= len(buckets):
			return nil, errNotWrites
		case each.op == opPut:
			each.key, each.value = text(), text()
		case each.op == opDelete:
			each.key = text()
		case each.op != opMakeBucket && each.op != opDropBucket || each.path.inner == nil:
			return nil, errNotWrites
		}
		w.list = append(w.list, each)
	}
	if broken {
		return nil, errNotWrites
	}
	return w, nil
}

// apply performs the writes of the list in a transaction.
func (w *Writes) apply(tx *bolt.Tx) error {
	for _, each := range w.list {
		top := tx.Bucket(buckets[each.path.top].name)
		if top == nil {
			return fmt.Errorf("%w: its bucket %s is missing", ErrCorrupt, buckets[each.path.top].name)
		}
		b := top
		if inner := each.path.inner; inner != nil {
			var err error
			switch each.op {
			case opMakeBucket:
				_, err = top.CreateBucket(inner)
			case opDropBucket:
				err = top.DeleteBucket(inner)
			default:
				if b = top.Bucket(inner); b == nil {
					err = fmt.Errorf("%w: there is no bucket %x in %s", ErrCorrupt, inner, buckets[each.path.top].name)
				}
			}
			if err != nil {
				return err
			}
		}
		b.FillPercent = buckets[each.path.top].fill
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

// bucket is a bucket in a transaction of the writer. Each change is added to the transaction's
// list. Written keys and values must not change until the transaction has ended.
type bucket struct {
	b    *bolt.Bucket
	t    *txn
	path *bucketPath
}

func (b bucket) get(key []byte) []byte { return b.b.Get(key) }

// cursor returns a cursor for reading only.
func (b bucket) cursor() *bolt.Cursor { return b.b.Cursor() }

// peek returns an inner bucket for reading, or nil if there is none.
func (b bucket) peek(name []byte) *bolt.Bucket { return b.b.Bucket(name) }

// bucket returns a bucket in the root by its number.
func (t *txn) bucket(number byte) bucket {
	if t.roots[number].b == nil {
		b := t.tx.Bucket(buckets[number].name)
		b.FillPercent = buckets[number].fill
		t.roots[number] = bucket{b, t, &rootPaths[number]}
	}
	return t.roots[number]
}

// note adds a write to the transaction's list.
func (b bucket) note(w write) {
	w.path = b.path
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

// inner returns an inner bucket, which is created if there is none.
func (b bucket) inner(name []byte) (bucket, error) {
	last := &b.t.inners[b.path.top]
	if last.b != nil && bytes.Equal(last.path.inner, name) {
		return *last, nil
	}
	in := bucket{b.peek(name), b.t, &bucketPath{b.path.top, name}}
	if in.b == nil {
		var err error
		if in.b, err = b.b.CreateBucket(name); err != nil {
			return bucket{}, err
		}
		in.note(write{op: opMakeBucket})
	}
	in.b.FillPercent = buckets[b.path.top].fill
	*last = in
	return in, nil
}

// drop removes an inner bucket.
func (b bucket) drop(name []byte) error {
	if err := b.b.DeleteBucket(name); err != nil {
		return err
	}
	b.t.inners[b.path.top] = bucket{}
	b.t.writes.list = append(b.t.writes.list, write{op: opDropBucket, path: &bucketPath{b.path.top, name}})
	return nil
}
