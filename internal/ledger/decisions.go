package ledger

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"sort"

	bolt "go.etcd.io/bbolt"
)

// ErrNotRisen is the refusal of an admission whose Rise is not higher than the last.
var ErrNotRisen = errors.New("the number is not higher than the last")

// rise holds a number against its series and writes it down.
func (t *txn) rise(r *Rise) error {
	if r == nil {
		return nil
	}
	b, series := t.tx.Bucket(bucketRisen), seriesOf(r.Series)
	if v := b.Get(series); v != nil && r.To <= binary.BigEndian.Uint64(v) {
		return fmt.Errorf("%w: %d is not above %d, which was signed before", ErrNotRisen, r.To, binary.BigEndian.Uint64(v))
	}
	return b.Put(series, u64(r.To))
}

// Risen returns the last number of a series, or 0.
func (l *Ledger) Risen(series string) (to uint64, err error) {
	err = l.view(func(tx *bolt.Tx) error {
		if v := tx.Bucket(bucketRisen).Get(seriesOf(series)); len(v) == 8 {
			to = binary.BigEndian.Uint64(v)
		}
		return nil
	})
	return to, err
}

// Decision is what Decide was given and said, in the bytes of the caller, with the number of the event.
type Decision struct {
	Event  uint64
	TimeMS int64 // by the ledger's time
	Record []byte
}

func (t *txn) putDecision(event uint64, record []byte) error {
	b := t.tx.Bucket(bucketDecisions)
	b.FillPercent = 0.95 // the keys only rise
	return b.Put(u64(event), append(u64(uint64(t.now.UnixMilli())), record...))
}

func decodeDecision(k, v []byte) (Decision, error) {
	if len(k) != 8 || len(v) < 8 {
		return Decision{}, fmt.Errorf("%w: decision %x", ErrCorrupt, k)
	}
	return Decision{binary.BigEndian.Uint64(k), int64(binary.BigEndian.Uint64(v)), bytes.Clone(v[8:])}, nil
}

// Decision returns the one of an event, or ErrNotFound.
func (l *Ledger) Decision(event uint64) (d Decision, err error) {
	err = l.view(func(tx *bolt.Tx) error {
		v := tx.Bucket(bucketDecisions).Get(u64(event))
		if v == nil {
			return fmt.Errorf("decision of event %d: %w", event, ErrNotFound)
		}
		d, err = decodeDecision(u64(event), v)
		return err
	})
	return d, err
}

// Decisions calls visit for each decision from an event and a time (Unix milliseconds) on, in their order, until it returns false.
func (l *Ledger) Decisions(from uint64, sinceMS int64, visit func(Decision) bool) error {
	return l.view(func(tx *bolt.Tx) error {
		c := tx.Bucket(bucketDecisions).Cursor()
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

// removeDecisions takes the oldest away, as far as they are from before a time.
func (t *txn) removeDecisions(before int64) (removed int, err error) {
	b := t.tx.Bucket(bucketDecisions)
	for ; removed < stepsAtOnce; removed++ {
		k, v := b.Cursor().First()
		if k == nil || len(v) >= 8 && int64(binary.BigEndian.Uint64(v)) >= before {
			break
		}
		if err := b.Delete(bytes.Clone(k)); err != nil {
			return removed, err
		}
	}
	return removed, nil
}
