package ledger

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"math/big"
	"time"

	bolt "go.etcd.io/bbolt"
)

// Windows are the rolling windows that admissions are counted in. A window holds what was admitted
// after now less its length, by the ledger's time: no clock can make that run ahead, so a window
// never ends early.
var Windows = [...]time.Duration{time.Minute, time.Hour, 24 * time.Hour, 7 * 24 * time.Hour, longestWindow}

const longestWindow = 30 * 24 * time.Hour

// Count is what an admission adds to a series: 1 where signatures are counted, an amount where
// amounts are.
type Count struct {
	Series string
	Add    *big.Int // not negative
}

// Used is the sum of a series in each of the Windows, with what the admission would add.
type Used [len(Windows)]*big.Int

// A series is kept as running totals, one for each time at which it grew. The sum of a window is one
// exact subtraction: the last total less the total at the beginning of the window. Of the totals
// older than the longest window, the last one is kept. The key is a hash of the series' name (16)
// and the time (8, Unix nanoseconds), the value is the total (big-endian).

func seriesOf(name string) []byte {
	sum := sha256.Sum256([]byte(name))
	return sum[:16]
}

func totalKey(series []byte, at int64) []byte {
	return binary.BigEndian.AppendUint64(append(make([]byte, 0, 24), series...), uint64(at))
}

// totalAt returns the newest total of a series at a time or before it; nil where there is none.
func totalAt(c *bolt.Cursor, series []byte, at int64) (when int64, total *big.Int) {
	after := totalKey(series, at+1)
	before := c.Prev
	if k, _ := c.Seek(after); k == nil {
		before = c.Last
	}
	k, v := before()
	if !bytes.HasPrefix(k, series) {
		return 0, nil
	}
	return int64(binary.BigEndian.Uint64(k[len(series):])), new(big.Int).SetBytes(v)
}

// counting is what an admission would change.
type counting struct {
	keys, totals [][]byte
	used         []Used
}

// count computes the sums of the series with an admission of now. It changes nothing.
func (t *txn) count(counts []Count) (n counting) {
	c := root(t.tx, bucketCounters).Cursor()
	for _, count := range counts {
		series, now := seriesOf(count.Series), t.now.UnixNano()
		last, total := totalAt(c, series, 1<<63-2)
		if total == nil {
			total = new(big.Int)
		}
		now = max(now, last) // the totals of a series stand in the order of their times, whatever the ledger's time does
		total.Add(total, count.Add)
		var used Used
		for i, length := range Windows {
			used[i] = new(big.Int).Set(total)
			if _, before := totalAt(c, series, now-int64(length)); before != nil {
				used[i].Sub(total, before)
			}
		}
		n.keys, n.totals = append(n.keys, totalKey(series, now)), append(n.totals, total.Bytes())
		n.used = append(n.used, used)
	}
	return n
}

// keep writes the totals and the monotonic number of an admission down. For each total that is
// written, at most two that are in no window any more are removed: so the cleaning costs no request
// much, and the totals do not grow in number.
func (t *txn) keep(n counting, m *Monotonic) error {
	if m != nil {
		if err := t.bucket(bucketMonotonic).put(seriesOf(m.Series), u64(m.Value)); err != nil {
			return err
		}
	}
	b := t.bucket(bucketCounters)
	for i, key := range n.keys {
		if err := b.put(key, n.totals[i]); err != nil {
			return err
		}
		series, old := key[:16], int64(binary.BigEndian.Uint64(key[16:]))-int64(longestWindow)
		for range 2 {
			c := b.cursor()
			first, _ := c.Seek(series)
			next, _ := c.Next()
			if !bytes.HasPrefix(next, series) || int64(binary.BigEndian.Uint64(next[16:])) > old {
				break
			}
			if err := b.delete(bytes.Clone(first)); err != nil {
				return err
			}
		}
	}
	return nil
}

// idle finds the first series from a key on that is in no window any more. It looks at some series
// only: next is where to go on, nil at the end.
func idle(tx *bolt.Tx, from []byte, now time.Time) (series, next []byte) {
	c := root(tx, bucketCounters).Cursor()
	k, _ := c.Seek(from)
	for range stepsAtOnce {
		if k == nil {
			return nil, nil
		}
		series, next = bytes.Clone(k[:16]), totalKey(k[:16], -1)
		if last, _ := totalAt(c, series, 1<<63-2); last <= now.Add(-longestWindow).UnixNano() {
			return series, series
		}
		k, _ = c.Seek(next)
	}
	return nil, next
}

// removeSeries removes some totals of an idle series.
func (t *txn) removeSeries(series []byte) error {
	b := t.bucket(bucketCounters)
	if last, _ := totalAt(b.cursor(), series, 1<<63-2); last > t.now.Add(-longestWindow).UnixNano() {
		return nil // the series has grown since
	}
	for range stepsAtOnce {
		k, _ := b.cursor().Seek(series)
		if !bytes.HasPrefix(k, series) {
			return nil
		}
		if err := b.delete(bytes.Clone(k)); err != nil {
			return err
		}
	}
	return nil
}
