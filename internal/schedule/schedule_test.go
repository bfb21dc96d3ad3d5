package schedule

import (
	"strings"
	"testing"
	"time"
)

// at parses a time in UTC; the zero time for an empty text.
func at(t *testing.T, s string) time.Time {
	t.Helper()
	if s == "" {
		return time.Time{}
	}
	for _, layout := range []string{"2006-01-02 15:04:05", "2006-01-02 15:04", "2006-01-02"} {
		if x, err := time.Parse(layout, s); err == nil {
			return x
		}
	}
	t.Fatalf("%q is no time", s)
	return time.Time{}
}

// TestDue has the rules of Due as a table.
func TestDue(t *testing.T) {
	const nightly = "0 3 * * *"
	for _, c := range []struct {
		name      string
		plan      Plan
		activated string
		uses      uint64
		started   string
		now       string
		due       bool
		from      string
		why       Reason
	}{
		{name: "no plan", activated: "2026-01-01", now: "2036-01-01"},

		{name: "young", plan: Plan{Every: 24 * time.Hour},
			activated: "2026-01-01 10:00", now: "2026-01-02 09:59:59", from: "2026-01-02 10:00", why: ByAge},
		{name: "of age", plan: Plan{Every: 24 * time.Hour},
			activated: "2026-01-01 10:00", now: "2026-01-02 10:00", due: true, from: "2026-01-02 10:00", why: ByAge},
		{name: "old", plan: Plan{Every: 24 * time.Hour},
			activated: "2026-01-01 10:00", now: "2027-01-02 10:00", due: true, from: "2026-01-02 10:00", why: ByAge},
		{name: "over a leap day", plan: Plan{Every: 2 * day},
			activated: "2028-02-28 10:00", now: "2028-02-29 12:00", from: "2028-03-01 10:00", why: ByAge},
		{name: "over no leap day", plan: Plan{Every: 2 * day},
			activated: "2027-02-28 10:00", now: "2027-02-28 12:00", from: "2027-03-02 10:00", why: ByAge},

		{name: "a window that ticks each minute", plan: Plan{Window: "* * * * *"},
			activated: "2026-01-01 10:00:30", now: "2026-01-01 10:59:59", from: "2026-01-01 11:00:30", why: ByWindow},
		{name: "a window that ticks each minute, an hour later", plan: Plan{Window: "* * * * *"},
			activated: "2026-01-01 10:00:30", now: "2026-01-01 11:00:30",
			due: true, from: "2026-01-01 11:00:30", why: ByWindow},

		{name: "little used", plan: Plan{Uses: 100}, activated: "2026-01-01", uses: 99, now: "2036-01-01"},
		{name: "used up", plan: Plan{Uses: 100},
			activated: "2026-01-01", uses: 100, now: "2026-01-01 00:01",
			due: true, from: "2026-01-01 00:01", why: ByUses},
		{name: "over-used", plan: Plan{Uses: 100},
			activated: "2026-01-01", uses: 1 << 63, now: "2026-01-01 00:01",
			due: true, from: "2026-01-01 00:01", why: ByUses},
		{name: "used up before its age", plan: Plan{Every: day, Uses: 100},
			activated: "2026-01-01", uses: 100, now: "2026-01-01 00:01",
			due: true, from: "2026-01-01 00:01", why: ByUses},
		{name: "of age before it is used up", plan: Plan{Every: day, Uses: 100},
			activated: "2026-01-01", uses: 99, now: "2026-01-02", due: true, from: "2026-01-02", why: ByAge},

		{name: "before the tick", plan: Plan{Window: nightly},
			activated: "2026-01-01 10:00", now: "2026-01-02 02:59:59", from: "2026-01-02 03:00", why: ByWindow},
		{name: "at the tick", plan: Plan{Window: nightly},
			activated: "2026-01-01 10:00", now: "2026-01-02 03:00", due: true, from: "2026-01-02 03:00", why: ByWindow},
		{name: "in the window", plan: Plan{Window: nightly},
			activated: "2026-01-01 10:00", now: "2026-01-02 03:59:59",
			due: true, from: "2026-01-02 03:59:59", why: ByWindow},
		{name: "the window is missed", plan: Plan{Window: nightly},
			activated: "2026-01-01 10:00", now: "2026-01-02 04:00", from: "2026-01-03 03:00", why: ByWindow},
		{name: "at the next tick", plan: Plan{Window: nightly},
			activated: "2026-01-01 10:00", now: "2026-01-09 03:10", due: true, from: "2026-01-09 03:10", why: ByWindow},
		{name: "activated in the window", plan: Plan{Window: nightly},
			activated: "2026-01-02 03:05", now: "2026-01-02 03:10", from: "2026-01-03 03:00", why: ByWindow},
		{name: "activated at the tick", plan: Plan{Window: nightly},
			activated: "2026-01-02 03:00", now: "2026-01-02 03:10", from: "2026-01-03 03:00", why: ByWindow},
		{name: "activated just before the tick", plan: Plan{Window: nightly},
			activated: "2026-01-02 02:59:59", now: "2026-01-02 03:00", from: "2026-01-02 03:59:59", why: ByWindow},
		{name: "windows that overlap", plan: Plan{Window: "*/30 * * * *"},
			activated: "2026-01-02 03:05", now: "2026-01-02 03:35", from: "2026-01-02 04:05", why: ByWindow},
		{name: "windows without a gap", plan: Plan{Window: "0 * * * *"},
			activated: "2026-01-02 03:05", now: "2026-01-02 05:00", due: true, from: "2026-01-02 05:00", why: ByWindow},
		{name: "leap day", plan: Plan{Window: "0 0 29 2 *"},
			activated: "2026-01-01", now: "2026-02-28 23:59", from: "2028-02-29", why: ByWindow},
		{name: "leap day again", plan: Plan{Window: "0 0 29 2 *"},
			activated: "2028-02-29", now: "2028-02-29 00:30", from: "2032-02-29", why: ByWindow},
		{name: "leap day in 2100", plan: Plan{Window: "0 0 29 2 *"},
			activated: "2099-01-01", now: "2099-01-01", from: "2104-02-29", why: ByWindow},
		{name: "the longest month", plan: Plan{Window: "0 0 31 * *"},
			activated: "2026-01-31", now: "2026-01-31 01:00", from: "2026-03-31", why: ByWindow},
		{name: "sunday", plan: Plan{Window: "30 4 * * 0"},
			activated: "2026-01-01", now: "2026-01-01", from: "2026-01-04 04:30", why: ByWindow},
		{name: "sunday too", plan: Plan{Window: "30 4 * * 7"},
			activated: "2026-01-01", now: "2026-01-01", from: "2026-01-04 04:30", why: ByWindow},
		{name: "either day", plan: Plan{Window: "0 0 13 * 5"},
			activated: "2026-01-09", now: "2026-01-10", from: "2026-01-13", why: ByWindow},
		{name: "in Europe's lost hour", plan: Plan{Window: "30 1 29 3 *"},
			activated: "2026-01-01", now: "2026-03-29 01:30", due: true, from: "2026-03-29 01:30", why: ByWindow},
		{name: "over the end of a year", plan: Plan{Window: "45 23 31 12 *"},
			activated: "2026-01-01", now: "2027-01-01 00:30", due: true, from: "2027-01-01 00:30", why: ByWindow},

		{name: "young, with a window", plan: Plan{Every: 7 * day, Window: nightly},
			activated: "2026-01-01 10:00", now: "2026-01-05 03:00", from: "2026-01-09 03:00", why: ByAge},
		{name: "of age, before the window", plan: Plan{Every: 7 * day, Window: nightly},
			activated: "2026-01-01 10:00", now: "2026-01-08 10:00", from: "2026-01-09 03:00", why: ByAge},
		{name: "of age, in the window", plan: Plan{Every: 7 * day, Window: nightly},
			activated: "2026-01-01 10:00", now: "2026-01-09 03:00", due: true, from: "2026-01-09 03:00", why: ByAge},
		{name: "of age within the window", plan: Plan{Every: 7 * day, Window: nightly},
			activated: "2026-01-01 03:20", now: "2026-01-08 03:10", from: "2026-01-08 03:20", why: ByAge},
		{name: "of age, and the window was missed", plan: Plan{Every: 7 * day, Window: nightly},
			activated: "2026-01-01 10:00", now: "2026-02-01 04:00", from: "2026-02-02 03:00", why: ByAge},
		{name: "used up, before the window", plan: Plan{Uses: 5, Window: nightly},
			activated: "2026-01-01 10:00", uses: 5, now: "2026-01-01 11:00", from: "2026-01-02 03:00", why: ByUses},
		{name: "used up, in the window", plan: Plan{Uses: 5, Window: nightly},
			activated: "2026-01-01 10:00", uses: 5, now: "2026-01-02 03:30",
			due: true, from: "2026-01-02 03:30", why: ByUses},
		{name: "used up in the window of its activation", plan: Plan{Uses: 5, Window: nightly},
			activated: "2026-01-02 03:01", uses: 5, now: "2026-01-02 03:30", from: "2026-01-03 03:00", why: ByUses},
		{name: "little used, in the window", plan: Plan{Uses: 5, Window: nightly},
			activated: "2026-01-01 10:00", uses: 4, now: "2026-01-02 03:30"},

		{name: "begun, of age", plan: Plan{Every: day},
			activated: "2026-01-01", started: "2026-01-02", now: "2026-01-05"},
		{name: "begun, used up", plan: Plan{Uses: 1},
			activated: "2026-01-01", uses: 9, started: "2026-01-02", now: "2026-01-05"},
		{name: "begun, in the window", plan: Plan{Window: nightly},
			activated: "2026-01-01", started: "2026-01-02 03:00", now: "2026-01-02 03:01"},
		{name: "begun, and the clock set back behind that", plan: Plan{Window: nightly},
			activated: "2026-01-01", started: "2026-01-05 03:00", now: "2026-01-02 03:01"},
		{name: "begun before the activation, by a clock that was set back", plan: Plan{Uses: 1},
			activated: "2026-01-05", uses: 9, started: "2026-01-02", now: "2026-01-02 01:00"},

		{name: "the clock set back before the activation", plan: Plan{Every: day},
			activated: "2026-01-05", now: "2026-01-01", from: "2026-01-06", why: ByAge},
		{name: "and a window", plan: Plan{Window: nightly},
			activated: "2026-01-05 03:05", now: "2026-01-04 03:10", from: "2026-01-06 03:00", why: ByWindow},
		{name: "the window of the activation comes again", plan: Plan{Window: nightly},
			activated: "2026-01-05 03:05", now: "2026-01-05 03:01", from: "2026-01-06 03:00", why: ByWindow},
		{name: "and age, and a window", plan: Plan{Every: day, Window: nightly},
			activated: "2026-01-05 03:05", now: "2026-01-01", from: "2026-01-06 03:05", why: ByAge},

		{name: "no plan at all", plan: Plan{Every: time.Minute}, activated: "2026-01-01", now: "2026-02-01"},
		{name: "a window that never opens", plan: Plan{Every: day, Window: "0 0 30 2 *"},
			activated: "2026-01-01", now: "2026-02-01"},
	} {
		t.Run(c.name, func(t *testing.T) {
			// The result must not depend on the time zone of the arguments.
			for _, zone := range []*time.Location{time.UTC, time.FixedZone("east", 5*3600+1800)} {
				activated, now := at(t, c.activated).In(zone), at(t, c.now).In(zone)
				due, from, why := c.plan.Due(activated, c.uses, at(t, c.started), now)
				if due != c.due || !from.Equal(at(t, c.from)) || why != c.why {
					t.Errorf("%v, from %v, %q", due, from, why)
				}
			}
		})
	}
}

// TestDueFromThen checks a time returned by Due: the version is due at the time, and not a second
// before.
func TestDueFromThen(t *testing.T) {
	for _, p := range []Plan{
		{Every: time.Hour},
		{Every: 90 * day},
		{Window: "0 3 * * 1-5"},
		{Window: "*/7 */5 1,15,31 * *"},
		{Every: 36 * time.Hour, Window: "30 2 * * 6"},
		{Every: 90 * day, Window: "0 0 1 1 *"},
	} {
		activated := at(t, "2026-01-01 12:34:56").Add(time.Millisecond)
		for range 50 {
			_, from, why := p.Due(activated, 0, time.Time{}, activated)
			if due, _, _ := p.Due(activated, 0, time.Time{}, from.Add(-time.Second)); due {
				t.Errorf("%+v: due a second before %v", p, from)
			}
			due, again, same := p.Due(activated, 0, time.Time{}, from)
			if !due || !again.Equal(from) || same != why || !from.After(activated) {
				t.Fatalf("%+v: at %v %v, from %v", p, from, due, again)
			}
			activated = from.Add(17*time.Second + time.Nanosecond)
		}
	}
}

// TestCheck checks valid and invalid plans. The error about a window must not repeat the window.
func TestCheck(t *testing.T) {
	for _, w := range []string{
		"* * * * *", "0 0 * * *", "*/5 * * * *", "59 23 31 12 7", "0,30 9-17 1-31/2 1,6-12 1-5", "00 03 * * 0",
		"0 0 29 2 *", "0 0 31 * *", "0 0 13 * 5", "*/59 */23 */31 */12 *",
		"0 0 30 2 1", // on Mondays in February
	} {
		if err := (Plan{Window: w}).Check(); err != nil {
			t.Errorf("%q: %v", w, err)
		}
	}
	begin := time.Now()
	for _, w := range []string{
		"0 0 30 2 *", "0 0 31 2 *", "0 0 31 2,4,6,9,11 *", "0 0 30,31 2 *", // dates that never come
		" ", "0", "0 0 * *", "0 0 * * * *", "0 0 0 * * * *", "0 0 * * * 2030", " 0 0 * * *", "0 0 * * * ",
		"0  0 * * *", "0\t0 * * *", "0 0 * * *\n", "TZ=UTC 0 0 * * *", "@daily", "@every 1h",
		"60 0 * * *", "0 24 * * *", "0 0 0 * *", "0 0 32 * *", "0 0 * 0 *", "0 0 * 13 *", "0 0 * * 8",
		"0,60 0 * * *", "60,0 0 * * *", "0-60 0 * * *", "5-1 0 * * *", "1-2-3 * * * *", "-5 0 * * *", "+5 0 * * *",
		"5- 0 * * *", "1/5 * * * *", "*/0 * * * *", "*/60 * * * *", "*/5/2 * * * *", "*/ * * * *", "/5 * * * *",
		"*5 * * * *", "** * * * *", ", 0 * * *", "0, 0 * * *", ",0 0 * * *", "0x1 0 * * *", "000 0 * * *",
		"0 0 L * *", "0 0 1W * *", "0 0 ? * *", "0 0 * * 5#2", "0 0 * * 5L", "0 0 * JAN *", "0 0 * * SUN", "0 0 * * ١",
		"0 0 1,0 * *", "0,5-1 0 * * *", "0,0-5/0 0 * * *", // gronx skips the second item if the first is a tick
		"0 0 */2 * 1", "0 0 1 * */2", "0 0 1,*/2 * 1",
	} {
		if err := (Plan{Window: w}).Check(); err == nil {
			t.Errorf("%q is a window", w)
		} else if len(w) > 3 && strings.Contains(err.Error(), w) {
			t.Errorf("%q is in the error: %v", w, err)
		}
	}
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("to refuse took %v", took)
	}
	for every, ok := range map[time.Duration]bool{
		0: true, time.Hour: true, maxEvery: true, time.Hour - 1: false, maxEvery + 1: false, -time.Hour: false,
	} {
		if err := (Plan{Every: every}).Check(); (err == nil) != ok {
			t.Errorf("every %v: %v", every, err)
		}
	}
}

// TestParseEvery parses times between rotations; 0 stands for an error.
func TestParseEvery(t *testing.T) {
	for s, want := range map[string]time.Duration{
		"1h": time.Hour, "24h": day, "90d": 90 * day, "2w": 14 * day, "36h30m": 36*time.Hour + 30*time.Minute,
		"60m": time.Hour, "3650d": maxEvery, "87600h": maxEvery, "521w": 3647 * day,
		"": 0, "0": 0, "0d": 0, "59m": 0, "-1d": 0, "-24h": 0, "+1d": 0, "1.5d": 0, "01d": 0, "1 d": 0, "1d ": 0,
		"d": 0, "90": 0, "1d12h": 0, "3651d": 0, "522w": 0, "9999w": 0, "99999w": 0, "87601h": 0, "1y": 0, "90D": 0,
		"1M": 0, "9223372036854775807h": 0,
	} {
		got, err := ParseEvery(s)
		if got != want || (err == nil) != (want != 0) {
			t.Errorf("%q: %v, %v", s, got, err)
		}
	}
}

func BenchmarkDue(b *testing.B) {
	p, now := Plan{Every: 90 * day, Window: "0 0 29 2 *"}, time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for b.Loop() {
		p.Due(now, 0, time.Time{}, now)
	}
}
