package ledger

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"sort"

	bolt "go.etcd.io/bbolt"
)

// ErrNotHigher is the denial of an admission whose Monotonic is not higher than the last number of
// the series.
var ErrNotHigher = errors.New("the number is not higher than the last")

// checkMonotonic compares a number with the last number of its series, and changes nothing.
func (t *txn) checkMonotonic(m *Monotonic) error {
	if m == nil {
		return nil
	}
	if last := lastNumber(t.tx, m.Series); last != nil && m.Value <= binary.BigEndian.Uint64(last) {
		return fmt.Errorf("%w: %d is not above %d, which was signed before",
			ErrNotHigher, m.Value, binary.BigEndian.Uint64(last))
	}
	return nil
}

// lastNumber returns the last number of a series as 8 bytes, or nil.
func lastNumber(tx *bolt.Tx, series string) []byte {
	return root(tx, bucketMonotonic).Get(seriesOf(series))
}

// LastNumber returns the last number of a series of Monotonic, or 0 for a new series.
func (l *Ledger) LastNumber(series string) (last uint64, err error) {
	err = l.view(func(tx *bolt.Tx) error {
		if v := lastNumber(tx, series); len(v) == 8 {
			last = binary.BigEndian.Uint64(v)
		}
		return nil
	})
	return last, err
}

// Decision is a record that Admission.Decide returned. The bytes belong to the caller of Admit.
type Decision struct {
	Event  uint64 // number of the event of the admission or denial
	TimeMS int64  // Unix milliseconds of the ledger's time
	Record []byte
}

func (t *txn) putDecision(event uint64, record []byte) error {
	return t.bucket(bucketDecisions).put(u64(event), append(u64(uint64(t.now.UnixMilli())), record...))
}

func decodeDecision(k, v []byte) (Decision, error) {
	if len(k) != 8 || len(v) < 8 {
		return Decision{}, fmt.Errorf("%w: decision %x", ErrCorrupt, k)
	}
	return Decision{binary.BigEndian.Uint64(k), int64(binary.BigEndian.Uint64(v)), bytes.Clone(v[8:])}, nil
}

// Decision returns the decision of an event, or an error that wraps ErrNotFound.
func (l *Ledger) Decision(event uint64) (d Decision, err error) {
	err = l.view(func(tx *bolt.Tx) error {
		v := root(tx, bucketDecisions).Get(u64(event))
		if v == nil {
			return fmt.Errorf("decision of event %d: %w", event, ErrNotFound)
		}
		d, err = decodeDecision(u64(event), v)
		return err
	})
	return d, err
}

// Decisions calls visit for each decision in the order of the events, until visit returns false.
// The first decision has at least the event number from and the time sinceMS (Unix milliseconds).
func (l *Ledger) Decisions(from uint64, sinceMS int64, visit func(Decision) bool) error {
	return l.inViews(from, func(tx *bolt.Tx, from uint64, v *view) {
		c := root(tx, bucketDecisions).Cursor()
		for k, b := c.Seek(u64(max(from, firstDecision(c, sinceMS)))); k != nil && v.take(k, b); k, b = c.Next() {
		}
	}, func(r numbered) (bool, error) {
		d, err := decodeDecision(u64(r.index), r.bytes)
		return err == nil && visit(d), err
	})
}

// firstDecision returns the number of an event from which on all decisions have at least a time.
// The times increase with the event numbers, so a binary search finds the number.
func firstDecision(c *bolt.Cursor, sinceMS int64) uint64 {
	k, _ := c.First()
	if k == nil {
		return 0
	}
	first := binary.BigEndian.Uint64(k)
	k, _ = c.Last()
	return first + uint64(sort.Search(int(binary.BigEndian.Uint64(k)-first)+1, func(i int) bool {
		_, v := c.Seek(u64(first + uint64(i)))
		return len(v) >= 8 && int64(binary.BigEndian.Uint64(v)) >= sinceMS
	}))
}

// removeDecisions removes at most maxRemovals of the decisions before a time, the oldest first.
func (t *txn) removeDecisions(before int64) (removed int, err error) {
	b := t.bucket(bucketDecisions)
	for ; removed < maxRemovals; removed++ {
		k, v := b.cursor().First()
		if k == nil || len(v) >= 8 && int64(binary.BigEndian.Uint64(v)) >= before {
			break
		}
		if err := b.delete(bytes.Clone(k)); err != nil {
			return removed, err
		}
	}
	return removed, nil
}
