package limit

import (
	"math"
	"time"
)

// Quota bounds the bytes that a caller makes the appliance keep: PerDay bytes at once, and again
// PerDay bytes within a day, refilled evenly. So the first day has at most twice PerDay, and each
// later day PerDay. A Quota is not safe for concurrent use.
type Quota struct {
	PerDay int64

	used float64   // bytes at the time at; less after
	at   time.Time // zero for an unused quota
}

// Take takes bytes, or returns false and takes none.
func (q *Quota) Take(n int64, now time.Time) bool {
	if q.refill(now); q.used+float64(n) > float64(q.PerDay) {
		return false
	}
	q.used += float64(n)
	return true
}

// Give gives bytes back that were taken and not used.
func (q *Quota) Give(n int64) { q.used = max(0, q.used-float64(n)) }

// Used returns the bytes that are taken at a time and not refilled, rounded up.
func (q *Quota) Used(now time.Time) int64 {
	q.refill(now)
	return int64(math.Ceil(q.used))
}

// Restore sets the quota to what Used returned at an earlier time.
func (q *Quota) Restore(used int64, at time.Time) { q.used, q.at = float64(max(0, used)), at }

// refill moves the quota to a time. A time before the last one refills nothing.
func (q *Quota) refill(now time.Time) {
	if passed := now.Sub(q.at); !q.at.IsZero() && passed > 0 {
		q.used = max(0, q.used-float64(q.PerDay)*passed.Hours()/24)
	}
	if q.at.Before(now) {
		q.at = now
	}
}
