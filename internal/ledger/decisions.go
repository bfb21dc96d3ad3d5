package ledger

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"sort"

	bolt "go.etcd.io/bbolt"
)

// ErrNotHigher is the refusal of an admission whose Monotonic is not higher than the last number of
// its series.
var ErrNotHigher = errors.New("the number is not higher than the last")

// mayIncrease holds a number against the last one of its series. It changes nothing.
func (t *txn) mayIncrease(m *Monotonic) error {
	if m == nil {
		return nil
	}
	last := lastOf(t.tx, m.Series)
	if last != nil && m.Value <= binary.BigEndian.Uint64(last) {
		return fmt.Errorf("%w: %d is not above %d, which was signed before", ErrNotHigher, m.Value, binary.BigEndian.Uint64(last))
	}
	return nil
}

// lastOf returns the last number of a series in its bytes, or nil.
func lastOf(tx *bolt.Tx, series string) []byte {
	return root(tx, bucketMonotonic).Get(seriesOf(series))
}

// LastNumber returns the last number of a series, or 0.
func (l *Ledger) LastNumber(series string) (last uint64, err error) {
	err = l.view(func(tx *bolt.Tx) error {
		if v := lastOf(tx, series); len(v) == 8 {
			last = binary.BigEndian.Uint64(v)
		}
		return nil
	})
	return last, err
}

// Decision is the record that Decide has returned, in the bytes of the caller, with the number of the
// event.
type Decision struct {
	Event  uint64
	TimeMS int64 // Unix milliseconds of the ledger's time
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

// Decision returns the decision of an event, or ErrNotFound.
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

// Decisions calls visit for each decision from an event and a time (Unix milliseconds) on, in their
// order, until visit returns false.
func (l *Ledger) Decisions(from uint64, sinceMS int64, visit func(Decision) bool) error {
	return l.view(func(tx *bolt.Tx) error {
		c := root(tx, bucketDecisions).Cursor()
		if k, _ := c.First(); k != nil {
			first := binary.BigEndian.Uint64(k)
			k, _ = c.Last()
			// Times stand in the order of the events.
			from = max(from, first+uint64(sort.Search(int(binary.BigEndian.Uint64(k)-first)+1, func(i int) bool {
				_, v := c.Seek(u64(first + uint64(i)))
				return len(v) >= 8 && int64(binary.BigEndian.Uint64(v)) >= sinceMS
			})))
		}
		for k, v := c.Seek(u64(from)); k != nil; k, v = c.Next() {
			d, err := decodeDecision(k, v)
			if err != nil {
				return err
			}
			if !visit(d) {
				return nil
			}
		}
		return nil
	})
}

// removeDecisions removes the oldest decisions, as far as they are from before a time.
func (t *txn) removeDecisions(before int64) (removed int, err error) {
	b := t.bucket(bucketDecisions)
	for ; removed < stepsAtOnce; removed++ {
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
