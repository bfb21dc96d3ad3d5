package limit

import (
	"testing"
	"time"
)

// TestQuotaIsExact takes a quota to its last byte, and no byte more, and follows the refill, a
// clock that is set back, and a restart.
func TestQuotaIsExact(t *testing.T) {
	const day = 24 * time.Hour
	now := time.Unix(1_800_000_000, 0)
	q := Quota{PerDay: 86_400_000}
	take := func(what string, n int64, want bool) {
		t.Helper()
		before := q.Used(now)
		got := q.Take(n, now)
		if used := q.Used(now); got != want || !got && used != before || got && used != before+n {
			t.Errorf("%s: %v, used %d, before %d", what, got, used, before)
		}
	}
	take("more than all", 86_400_001, false)
	take("all", 86_400_000, true)
	take("one more", 1, false)
	q.Give(5)
	take("one more than was given back", 6, false)
	take("what was given back", 5, true)
	now = now.Add(time.Second)
	take("one more than a second's", 1001, false)
	take("a second's", 1000, true)
	now = now.Add(-time.Hour)
	take("with the clock set back", 1, false)
	now = now.Add(time.Hour)
	take("with the clock put right", 1, false)
	now = now.Add(2 * day)
	take("more than all after two days", 86_400_001, false)
	take("all after two days", 86_400_000, true)

	restarted := Quota{PerDay: q.PerDay}
	restarted.Restore(q.Used(now), now)
	q = restarted
	take("after a restart", 1, false)
	now = now.Add(day / 4)
	if q.Used(now) != 64_800_000 {
		t.Errorf("used %d after a quarter of a day", q.Used(now))
	}
	q.Give(1 << 60)
	take("all", 86_400_000, true)
	take("one more", 1, false)
}
