package ledger

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"math"
	"slices"
	"sort"
	"strings"

	"countersign/audit"

	bolt "go.etcd.io/bbolt"
)

// Query selects events of the log. An event must satisfy every field that is not empty.
type Query struct {
	Type      audit.Type
	Actor     string // name
	Resource  string // the whole one, or the part before a slash: releases finds releases/1
	Nonce     string // hex, as in the metadata
	Digest    string // hex, as in the metadata
	Admission string // number of an admission: finds its outcome
	Request   string // id of a request, or of an item of a batch; the id of a batch finds all items

	Since, Until int64 // Since <= time of the event < Until, in Unix milliseconds; 0 is no bound
}

// Span is a range of events, from From on and before Before, in the order of a search.
type Span struct {
	From, Before uint64 // a Before of 0 is the end of the log
	Down         bool   // the newest event first
}

// The kinds of terms. The first byte of a term is its kind.
const (
	termType      = "t"
	termActor     = "a"
	termResource  = "r"
	termNonce     = "n"
	termDigest    = "d"
	termAdmission = "m"
	termRequest   = "q"
)

// terms returns the texts by which the index finds an event.
func terms(e audit.Event) []string {
	all := []string{termType + string(e.Type), termActor + e.Actor.Name}
	if e.Resource != "" {
		all = append(all, termResource+e.Resource)
	}
	for i := range len(e.Resource) {
		if e.Resource[i] == '/' && i > 0 {
			all = append(all, termResource+e.Resource[:i])
		}
	}
	if id := e.Actor.Request; id != "" {
		all = append(all, termRequest+id)
		if batch, _, isItem := strings.Cut(id, "."); isItem {
			all = append(all, termRequest+batch)
		}
	}
	for kind, name := range map[string]string{termNonce: "nonce", termDigest: "digest", termAdmission: "admission"} {
		if v := e.Metadata[name]; v != "" {
			all = append(all, kind+v)
		}
	}
	return all
}

// terms returns the terms that an event must have, the rarest kind first: most segments have no
// event with the first term, and are then left at once.
func (q Query) terms() (all []string) {
	for _, each := range []struct{ kind, value string }{
		{termRequest, q.Request}, {termNonce, q.Nonce}, {termDigest, q.Digest}, {termAdmission, q.Admission},
		{termActor, q.Actor}, {termResource, q.Resource}, {termType, string(q.Type)},
	} {
		if each.value != "" {
			all = append(all, each.kind+each.value)
		}
	}
	return all
}

// matches reports whether the query selects an event. The index only narrows the search: two terms
// can have one hash.
func (q Query) matches(wanted []string, event []byte) bool {
	if len(wanted) == 0 && q.Since == 0 && q.Until == 0 {
		return true
	}
	e, err := audit.Decode(event)
	if err != nil || e.TimeMS < q.Since || q.Until != 0 && e.TimeMS >= q.Until {
		return false
	}
	has := terms(e)
	return !slices.ContainsFunc(wanted, func(term string) bool { return !slices.Contains(has, term) })
}

// The record of the index for a full segment of events is
//
//	i64 earliest time || i64 latest time        Unix milliseconds
//	u32 hash of a term || u16 event             for each term of each event, in increasing order
//
// with the number of the event within the segment. The record follows from the events alone, and is
// written after the segment is full: a segment without a record is searched event by event. The
// writer of the log therefore does no work for the index but to put one value for 4096 events. A
// search reads a few pages of each record by bisection.
const (
	indexHead  = 16
	indexEntry = 6
)

func termHash(term string) uint32 {
	h := fnv.New32a()
	h.Write([]byte(term))
	return h.Sum32()
}

// indexOf returns the index of the events of a segment.
func indexOf(tx *bolt.Tx, n uint64) []byte {
	earliest, latest := int64(math.MaxInt64), int64(0)
	var entries []uint64 // hash and number of an event
	if events := root(tx, bucketEvents).Bucket(u64(n)); events != nil {
		c := events.Cursor()
		for k, b := c.First(); k != nil; k, b = c.Next() {
			e, err := audit.Decode(b)
			if err != nil { // found without the index only
				continue
			}
			earliest, latest = min(earliest, e.TimeMS), max(latest, e.TimeMS)
			for _, term := range terms(e) {
				entries = append(entries, uint64(termHash(term))<<16|binary.BigEndian.Uint64(k)%segment)
			}
		}
	}
	slices.Sort(entries)
	entries = slices.Compact(entries) // two terms of one event can have one hash
	b := make([]byte, 0, indexHead+indexEntry*len(entries))
	b = binary.BigEndian.AppendUint64(b, uint64(earliest))
	b = binary.BigEndian.AppendUint64(b, uint64(latest))
	for _, each := range entries {
		b = binary.BigEndian.AppendUint32(b, uint32(each>>16))
		b = binary.BigEndian.AppendUint16(b, uint16(each))
	}
	return b
}

// lookup returns the numbers of the events that have a term, in increasing order.
func lookup(index []byte, term string) (found []uint16) {
	h, entries := termHash(term), index[indexHead:]
	n := len(entries) / indexEntry
	hashAt := func(i int) uint32 { return binary.BigEndian.Uint32(entries[i*indexEntry:]) }
	for i := sort.Search(n, func(i int) bool { return hashAt(i) >= h }); i < n && hashAt(i) == h; i++ {
		found = append(found, binary.BigEndian.Uint16(entries[i*indexEntry+4:]))
	}
	return found
}

// candidates returns the numbers, within a segment, of all events that the query can select.
func (q Query) candidates(index []byte, wanted []string) (found []uint16) {
	if len(index) >= indexHead {
		earliest, latest := int64(binary.BigEndian.Uint64(index)), int64(binary.BigEndian.Uint64(index[8:]))
		if latest < q.Since || q.Until != 0 && earliest >= q.Until {
			return nil
		}
	}
	if len(index) < indexHead || len(wanted) == 0 {
		found = make([]uint16, segment)
		for i := range found {
			found[i] = uint16(i)
		}
		return found
	}
	for i, term := range wanted {
		with := lookup(index, term)
		if i > 0 {
			with = slices.DeleteFunc(with, func(n uint16) bool {
				_, both := slices.BinarySearch(found, n)
				return !both
			})
		}
		if found = with; len(found) == 0 {
			return nil
		}
	}
	return found
}

// segmentsPerView is the largest number of segments that one read transaction of Find searches. A
// long read transaction would keep pages from the writer.
const segmentsPerView = 256

// Find calls visit for the events that a query selects, in the order of the span, until visit
// returns false. Dropped events are skipped.
func (l *Ledger) Find(q Query, s Span, visit func(index uint64, event []byte) bool) error {
	if next := l.published.Load().next; s.Before == 0 || s.Before > next {
		s.Before = next
	}
	wanted := q.terms()
	for s.From < s.Before {
		var v view
		if err := l.view(func(tx *bolt.Tx) error { q.search(tx, wanted, &s, &v); return nil }); err != nil {
			return err
		}
		for _, each := range v.records {
			if !visit(each.index, each.bytes) {
				return nil
			}
		}
	}
	return nil
}

// search takes selected events in one read transaction. The span is what is left to search.
func (q Query) search(tx *bolt.Tx, wanted []string, s *Span, v *view) {
	s.From = max(s.From, firstKept(tx))
	for range segmentsPerView {
		if s.From >= s.Before {
			return
		}
		n := s.From / segment
		if s.Down {
			n = (s.Before - 1) / segment
		}
		found := q.candidates(root(tx, bucketIndex).Get(u64(n)), wanted)
		if s.Down {
			slices.Reverse(found)
		}
		events := root(tx, bucketEvents).Bucket(u64(n))
		for _, each := range found {
			k := n*segment + uint64(each)
			if events == nil || k < s.From || k >= s.Before {
				continue
			}
			b := events.Get(u64(k))
			if b == nil || !q.matches(wanted, b) {
				continue
			}
			if !v.take(u64(k), b) {
				return
			}
			if s.narrow(k); s.From >= s.Before {
				return
			}
		}
		if s.Down {
			s.Before = max(s.From, n*segment)
		} else {
			s.From = (n + 1) * segment
		}
	}
}

// narrow takes the events up to k out of the span.
func (s *Span) narrow(k uint64) {
	if s.Down {
		s.Before = k
	} else {
		s.From = k + 1
	}
}

// Index writes the index of the oldest full segment without one. more reports whether another full
// segment has none.
func (l *Ledger) Index(ctx context.Context) (more bool, err error) {
	next := l.published.Load().next
	var n uint64
	var index []byte
	if err := l.view(func(tx *bolt.Tx) error {
		n = firstKept(tx) / segment
		if last, _ := root(tx, bucketIndex).Cursor().Last(); last != nil {
			n = max(n, binary.BigEndian.Uint64(last)+1)
		}
		if (n+1)*segment <= next {
			index = indexOf(tx, n)
		}
		return nil
	}); err != nil || index == nil {
		return false, err
	}
	err = l.submit(ctx, &request{done: make(chan error, 1), apply: func(t *txn) error {
		if n < firstKept(t.tx)/segment { // dropped meanwhile
			return nil
		}
		t.wrote = true
		return t.bucket(bucketIndex).put(u64(n), index)
	}})
	return (n+2)*segment <= next, err
}

// removeIndex removes the index of segments before the event end, in part. done reports that none
// is left.
func (t *txn) removeIndex(end uint64) (done bool, err error) {
	b := t.bucket(bucketIndex)
	for range maxRemovals / 64 { // a record has some 40 pages
		k, _ := b.cursor().First()
		if k == nil || (binary.BigEndian.Uint64(k)+1)*segment > end {
			return true, nil
		}
		if err := b.delete(bytes.Clone(k)); err != nil {
			return false, err
		}
	}
	return false, nil
}

// checkIndex compares each record of the index with the events. Of a segment that is dropped in
// part, nothing can be compared.
func checkIndex(tx *bolt.Tx, next uint64) error {
	kept := firstKept(tx)
	return root(tx, bucketIndex).ForEach(func(k, v []byte) error {
		if len(k) != 8 || (binary.BigEndian.Uint64(k)+1)*segment > next {
			return fmt.Errorf("%w: there is an index of the events in segment %x", ErrCorrupt, k)
		}
		n := binary.BigEndian.Uint64(k)
		if n*segment >= kept && !bytes.Equal(v, indexOf(tx, n)) {
			return fmt.Errorf("%w: the index of segment %d is not that of its events", ErrCorrupt, n)
		}
		return nil
	})
}
