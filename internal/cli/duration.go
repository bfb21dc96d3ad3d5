package cli

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// FormatDuration writes a duration in the form that ParseDuration reads: 30d, 12h, 1h30m or 90ms.
func FormatDuration(d time.Duration) string {
	const day = 24 * time.Hour
	if d >= day && d%day == 0 {
		return strconv.FormatInt(int64(d/day), 10) + "d"
	}
	s := d.String()
	if short, is := strings.CutSuffix(s, "m0s"); is {
		s = short + "m"
	}
	if short, is := strings.CutSuffix(s, "h0m"); is {
		s = short + "h"
	}
	return s
}

// ParseDuration reads a duration of at least 0: days or weeks, such as 30d and 2w, or a Go
// duration, such as 90s, 12h and 1h30m.
func ParseDuration(s string) (time.Duration, error) {
	for unit, of := range map[string]time.Duration{"d": 24 * time.Hour, "w": 7 * 24 * time.Hour} {
		if number, ok := strings.CutSuffix(s, unit); ok {
			if n, err := strconv.ParseUint(number, 10, 14); err == nil {
				return time.Duration(n) * of, nil
			}
		}
	}
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return d, nil
	}
	return 0, fmt.Errorf("%q is not a duration: write 30d, 2w, 12h or 90s, for example", s)
}
