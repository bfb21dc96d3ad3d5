package peers

import (
	"fmt"
	"testing"
	"time"
)

// TestActivity counts answers in minutes, forgets those of more than an hour ago, and adds those of
// a clock that goes back to the newest minute.
func TestActivity(t *testing.T) {
	var m Member
	begin := time.Unix(60*30_000_000, 0)
	check := func(at time.Time, want string) {
		t.Helper()
		a := m.activityAt(at)
		got := fmt.Sprint(a.Since.Unix()/60 - 30_000_000)
		for i, n := range a.Minutes {
			if n != (Answers{}) {
				got += fmt.Sprintf(" %d:%v", i, n)
			}
		}
		if got += fmt.Sprintf(" all %v", a.Hour); got != want {
			t.Errorf("%v after the begin: %s, want %s", at.Sub(begin), got, want)
		}
	}
	check(begin, "-59 all {0 0 0 0}")
	m.Answered("sign", false, begin)
	m.Answered("sign", true, begin.Add(59*time.Second))
	m.Answered("verify", false, begin.Add(time.Minute))
	m.Answered("ping", false, begin.Add(2*time.Minute))
	check(begin.Add(2*time.Minute), "-57 57:{1 0 1 0} 58:{0 1 0 0} 59:{0 0 0 1} all {1 1 1 1}")
	m.Answered("sign", false, begin) // the clock has gone back
	check(begin, "-57 57:{1 0 1 0} 58:{0 1 0 0} 59:{1 0 0 1} all {2 1 1 1}")
	check(begin.Add(59*time.Minute), "0 0:{1 0 1 0} 1:{0 1 0 0} 2:{1 0 0 1} all {2 1 1 1}")
	check(begin.Add(60*time.Minute), "1 0:{0 1 0 0} 1:{1 0 0 1} all {1 1 0 1}")
	check(begin.Add(121*time.Minute), "62 all {0 0 0 0}")
	m.Answered("verify", false, begin.Add(1000*time.Hour))
	check(begin.Add(1000*time.Hour), fmt.Sprint(60000-59)+" 59:{0 1 0 0} all {0 1 0 0}")
}
