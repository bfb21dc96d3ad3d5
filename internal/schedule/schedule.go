// Package schedule says when a key is due for rotation. It knows neither keys nor clocks: see Plan.Due.
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

	// WindowLength is how long a window is open from each of its ticks.
	WindowLength = time.Hour
)

// Plan says when a version of a key is due for rotation. The zero Plan is: never.
type Plan struct {
	Every  time.Duration // after its activation, 1 hour to 10 years; 0: whatever its age
	Window string        // cron, five fields, UTC: rotate only within WindowLength of a tick; alone: at each tick
	Uses   uint64        // signatures; 0: however many
}

// Reason is why a key is due.
type Reason string

const (
	ByAge    Reason = "age"
	ByUses   Reason = "uses"
	ByWindow Reason = "window"
)

// Check refuses what can't be a plan.
func (p Plan) Check() error {
	if p.Every != 0 && (p.Every < minEvery || p.Every > maxEvery) {
		return errors.New("a key may be rotated every 1 hour to 10 years")
	}
	if p.Window == "" {
		return nil
	}
	return checkWindow(p.Window)
}

// Due reports whether a version that was activated then, and has been used so often, is due at now; why; and from when on it is
// or will be, as far as a clock can tell: zero is never, or with enough uses.
//
// begun is when a rotation away from this version began, and zero while none has. A version is not due twice: after a rotation
// has begun it takes another version, or a zero begun after a failure, whatever the clock does. What holds else:
//
//   - By age it is due when Every has passed since the activation, by uses as soon as there are enough.
//   - With a Window it is due only within WindowLength of a tick that came after the activation. A window that was missed is
//     gone: the next one counts.
//   - With a Window alone it is due in each window.
//   - A clock that is set back makes it due later, never again.
//
// A plan that Check refuses is never due.
func (p Plan) Due(activated time.Time, uses uint64, begun, now time.Time) (due bool, from time.Time, why Reason) {
	activated, now = activated.Round(0).UTC(), now.Round(0).UTC() // by the wall clock: what is on disk has no other
	switch {
	case p.Check() != nil || !begun.IsZero():
		return false, time.Time{}, ""
	case p.Uses > 0 && uses >= p.Uses:
		from, why = now, ByUses
	case p.Every > 0:
		from, why = activated.Add(p.Every), ByAge
	case p.Window != "" && p.Uses == 0:
		from, why = activated, ByWindow
	default:
		return false, time.Time{}, ""
	}
	if p.Window != "" {
		from = opens(p.Window, activated, later(from, now))
	}
	return !from.IsZero() && !from.After(now), from, why
}

// opens gives the first moment from at on that is in a window whose tick came after activated.
func opens(window string, activated, at time.Time) time.Time {
	// A window is open at some moment when its tick is at most WindowLength before it, and that is exclusive.
	tick, err := gronx.NextTickAfter(window, later(activated, at.Add(-WindowLength)), false)
	if err != nil {
		return time.Time{}
	}
	return later(tick, at)
}

func later(x, y time.Time) time.Time {
	if x.After(y) {
		return x
	}
	return y
}

// item is one part of a cron field: * or a number or a range, perhaps with a step.
var item = regexp.MustCompile(`^(?:\*|([0-9]{1,2})(?:-([0-9]{1,2}))?)(?:/([0-9]{1,2}))?$`)

type field struct {
	name      string
	low, high int
}

// fields are those of a cron expression.
var fields = [5]field{{"minute", 0, 59}, {"hour", 0, 23}, {"day of the month", 1, 31}, {"month", 1, 12}, {"day of the week", 0, 7}}

func (f field) takes(one string) bool {
	m := item.FindStringSubmatch(one)
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

// checkWindow takes what every cron understands, and in one way. gronx takes a lot more, of which it overlooks some: a number
// that is out of bounds may go unnoticed until its time comes.
func checkWindow(window string) error {
	parts := strings.Split(window, " ")
	if len(parts) != len(fields) {
		return errors.New("a window has five fields with one space between them: minute, hour, day of the month, month, day of the week")
	}
	for i, f := range fields {
		for one := range strings.SplitSeq(parts[i], ",") {
			if !f.takes(one) {
				return fmt.Errorf("a window's %s is *, */N, or a list of numbers and ranges from %d to %d", f.name, f.low, f.high)
			}
		}
	}
	if d, w := parts[2], parts[4]; d != "*" && w != "*" && strings.Contains(d+w, "*") {
		return errors.New("a window with both days has */N for one of them, which not every cron understands alike: write its days")
	}
	begin := time.Date(2001, 1, 1, 0, 0, 0, 0, time.UTC) // a plan is good or bad whatever the time
	if tick, err := gronx.NextTickAfter(window, begin, true); err != nil || tick.After(begin.AddDate(5, 0, 0)) {
		return errors.New("a window must open within five years")
	}
	return nil
}

// ParseEvery reads a time between rotations: days or weeks, such as 90d and 2w, or a duration of Go, such as 24h and 36h30m.
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
