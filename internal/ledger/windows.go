package ledger

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"math/big"
	"time"

	bolt "go.etcd.io/bbolt"
)

// Windows are the lengths of the rolling windows in which admissions are counted. A window has the
// admissions after now minus its length, by the ledger's time. The ledger's time can't be set
// ahead, so no window ends early.
var Windows = [...]time.Duration{time.Minute, time.Hour, 24 * time.Hour, 7 * 24 * time.Hour, longestWindow}

const longestWindow = 30 * 24 * time.Hour

// Count is the addition of an admission to a series: 1 for a count of signatures, or an amount for
// a sum of amounts.
type Count struct {
	Series string
	Add    *big.Int // not negative
}

// Used is the sum of a series in each of the Windows, including the admission under decision.
type Used [len(Windows)]*big.Int

// A series is stored as running totals, one for each time at which the series grew. The sum of a
// window is an exact subtraction: the last total minus the total at the begin of the window. Of the
// totals before the longest window, only the last is kept. The key is the hash of the series (16
// bytes) and the time (8 bytes, Unix nanoseconds). The value is the total (big-endian, any length).

// seriesOf returns the hash of a series' name: the first 16 bytes of its SHA-256.
func seriesOf(name string) []byte {
	sum := sha256.Sum256([]byte(name))
	return sum[:16]
}

func totalKey(series []byte, at int64) []byte {
	return binary.BigEndian.AppendUint64(append(make([]byte, 0, 24), series...), uint64(at))
}

// totalAt returns the newest total of a series at or before a time, or nil.
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

// counting has the new totals of an admission, and the sums for the decision.
type counting struct {
	keys, totals [][]byte // of the totals to write
	used         []Used
}

// count computes the sums of the series including an admission at the present time, and changes
// nothing.
func (t *txn) count(counts []Count) (n counting) {
	c := root(t.tx, bucketCounters).Cursor()
	for _, count := range counts {
		series, now := seriesOf(count.Series), t.now.UnixNano()
		last, total := totalAt(c, series, 1<<63-2)
		if total == nil {
			total = new(big.Int)
		}
		now = max(now, last) // the times of a series never decrease, even if the ledger's time does
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

// writeCounts writes the totals and the monotonic number of an admission. For each written total,
// at most two totals before the longest window are removed. The number of totals therefore stays
// bounded, at a small cost for each request.
func (t *txn) writeCounts(n counting, m *Monotonic) error {
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

// nextIdleSeries returns the first series from a key on whose last total is before the longest
// window. At most maxRemovals series are read. The next search begins at the key next; nil means
// the end.
func nextIdleSeries(tx *bolt.Tx, from []byte, now time.Time) (series, next []byte) {
	c := root(tx, bucketCounters).Cursor()
	k, _ := c.Seek(from)
	for range maxRemovals {
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

// removeSeries removes at most maxRemovals totals of an idle series.
func (t *txn) removeSeries(series []byte) error {
	b := t.bucket(bucketCounters)
	if last, _ := totalAt(b.cursor(), series, 1<<63-2); last > t.now.Add(-longestWindow).UnixNano() {
		return nil // the series has grown since
	}
	for range maxRemovals {
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
