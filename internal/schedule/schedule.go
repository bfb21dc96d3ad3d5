// Package schedule computes when a key is due for rotation: see Plan.Due. The package has no access
// to keys and clocks; the caller passes the state of the key and the time.
package schedule

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/adhocore/gronx"
)

const (
	day = 24 * time.Hour

	minEvery = time.Hour
	maxEvery = 3650 * day // ten years

	// WindowLength is the time from a tick of a window to the end of the window.
	WindowLength = time.Hour
)

// Plan determines when a version of a key is due for rotation. With the zero Plan a version is
// never due.
type Plan struct {
	Every  time.Duration // age since the activation, 1 hour to 10 years; 0: no limit of age
	Window string        // cron expression of five fields, UTC; see Due
	Uses   uint64        // number of signatures; 0: no limit of uses
}

// Reason is the reason of a rotation.
type Reason string

const (
	ByAge    Reason = "age"
	ByUses   Reason = "uses"
	ByWindow Reason = "window"
)

// Check returns an error for an invalid plan.
func (p Plan) Check() error {
	if p.Every != 0 && (p.Every < minEvery || p.Every > maxEvery) {
		return errors.New("a key may be rotated every 1 hour to 10 years")
	}
	if p.Window == "" {
		return nil
	}
	return CheckWindow(p.Window)
}

// Due reports whether a version is due for rotation at now, and the reason. activated is the time
// of the version's activation, uses the number of its signatures. from is the time at which the
// version is or becomes due. A zero from means never, or a time that depends on further uses.
//
// started is the start of a rotation away from the version, and zero without a rotation. A version
// with a started rotation is never due, whatever the clock says. After a failed rotation the caller
// passes a zero started again.
//
// The rules are:
//
//   - With Every, a version is due from the age of Every on. With Uses, a version is due from the
//     given number of signatures on.
//   - With a Window in addition, a version is due only within WindowLength of a tick after the
//     activation. A missed window has no effect: the next window counts.
//   - With a Window alone, a version is due in each window, but not before the least age of Every:
//     an expression may tick each minute.
//   - A clock set back delays a rotation, and never causes a second one.
//
// A plan refused by Check is never due.
func (p Plan) Due(activated time.Time, uses uint64, started, now time.Time) (due bool, from time.Time, why Reason) {
	// Compare by the wall clock: times read from disk have no monotonic clock reading.
	activated, now = activated.Round(0).UTC(), now.Round(0).UTC()
	switch {
	case p.Check() != nil || !started.IsZero():
		return false, time.Time{}, ""
	case p.Uses > 0 && uses >= p.Uses:
		from, why = now, ByUses
	case p.Every > 0:
		from, why = activated.Add(p.Every), ByAge
	case p.Window != "" && p.Uses == 0:
		from, why = activated.Add(minEvery), ByWindow
	default:
		return false, time.Time{}, ""
	}
	if p.Window != "" {
		from = nextOpen(p.Window, activated, latest(from, now))
	}
	return !from.IsZero() && !from.After(now), from, why
}

// nextOpen returns the first time from at on within a window with a tick after activated.
func nextOpen(window string, activated, at time.Time) time.Time {
	// A window is open from its tick to WindowLength later, without the end. NextTickAfter returns
	// a tick after the given time, so the first relevant tick is the one after at - WindowLength.
	tick, err := gronx.NextTickAfter(window, latest(activated, at.Add(-WindowLength)), false)
	if err != nil {
		return time.Time{}
	}
	return latest(tick, at)
}

func latest(x, y time.Time) time.Time {
	if x.After(y) {
		return x
	}
	return y
}

// cronItem matches one item of a cron field: *, a number or a range, with an optional step.
var cronItem = regexp.MustCompile(`^(?:\*|([0-9]{1,2})(?:-([0-9]{1,2}))?)(?:/([0-9]{1,2}))?$`)

type field struct {
	name      string
	low, high int
}

// fields are the fields of a cron expression, with the range of their numbers.
var fields = [5]field{
	{"minute", 0, 59}, {"hour", 0, 23}, {"day of the month", 1, 31}, {"month", 1, 12}, {"day of the week", 0, 7},
}

// allows reports whether part is a valid item of the field.
func (f field) allows(part string) bool {
	m := cronItem.FindStringSubmatch(part)
	if m == nil {
		return false
	}
	number := func(text string, otherwise int) int {
		if n, err := strconv.Atoi(text); err == nil {
			return n
		}
		return otherwise
	}
	low := number(m[1], f.low)
	high := number(m[2], low)
	step := number(m[3], 1)
	ranged := m[1] == "" || m[2] != ""
	return low >= f.low && high <= f.high && low <= high && step >= 1 && step <= f.high && (ranged || m[3] == "")
}

// CheckWindow checks a cron expression of five fields. CheckWindow accepts the syntax common to all
// cron programs, where all of them agree on the meaning. gronx accepts more, and does not check
// every number: gronx may notice a number out of range only at the time of its tick.
func CheckWindow(window string) error {
	parts := strings.Split(window, " ")
	if len(parts) != len(fields) {
		return errors.New("a window has five fields with one space between them: " +
			"minute, hour, day of the month, month, day of the week")
	}
	for i, f := range fields {
		for part := range strings.SplitSeq(parts[i], ",") {
			if !f.allows(part) {
				return fmt.Errorf("a window's %s is *, */N, or a list of numbers and ranges from %d to %d",
					f.name, f.low, f.high)
			}
		}
	}
	if d, w := parts[2], parts[4]; d != "*" && w != "*" && strings.Contains(d+w, "*") {
		return errors.New("a window with both days has */N for one of them, which not every cron understands alike: " +
			"write its days")
	}
	begin := time.Date(2001, 1, 1, 0, 0, 0, 0, time.UTC) // a fixed time: the validity of a plan must not depend on now
	if tick, err := gronx.NextTickAfter(window, begin, true); err != nil || tick.After(begin.AddDate(5, 0, 0)) {
		return errors.New("a window must open within five years")
	}
	return nil
}

// Last returns the last tick of a valid window until now, and Next the first one after now.
func Last(window string, now time.Time) (time.Time, error) {
	return gronx.PrevTickBefore(window, now.UTC(), true)
}

func Next(window string, now time.Time) (time.Time, error) {
	return gronx.NextTickAfter(window, now.UTC(), false)
}

// ParseEvery parses a time between rotations: days or weeks, such as 90d and 2w, or a Go duration,
// such as 24h and 36h30m.
func ParseEvery(s string) (time.Duration, error) {
	every, err := time.ParseDuration(s)
	if whole := days.FindStringSubmatch(s); whole != nil {
		n, _ := strconv.Atoi(whole[1])
		every, err = time.Duration(n)*day, nil
		if whole[2] == "w" {
			every *= 7
		}
	}
	if err != nil || every < minEvery || every > maxEvery {
		return 0, errors.New("the time between rotations must be 1 hour to 10 years, such as 24h, 90d, 2w")
	}
	return every, nil
}

var days = regexp.MustCompile(`^([1-9][0-9]{0,3})([dw])$`)
