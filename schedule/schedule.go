// Package schedule is a stand-in.
package schedule

import "time"

type Plan struct {
	Every  time.Duration
	Window string
	Uses   uint64
}

func (p Plan) Check() error   { return nil }
func (p Plan) String() string { return "" }
func (p Plan) Due(activated time.Time, uses uint64, last, now time.Time) (bool, time.Time, string) {
	if p.Every > 0 && now.Sub(activated) >= p.Every || p.Uses > 0 && uses >= p.Uses {
		return true, now, ""
	}
	return false, time.Time{}, ""
}
