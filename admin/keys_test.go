package admin

import (
	"testing"
	"time"

	"countersign/admin/api"
	"countersign/internal/keyring"
)

// TestAskedTime: one of at, in and now says when a version is to be active, by the appliance's
// clock. A time in the past is refused.
func TestAskedTime(t *testing.T) {
	now := time.Unix(1_700_000_000, 5)
	for _, c := range []struct {
		ask    api.Rotate
		in     time.Duration
		within time.Duration
		bad    bool
	}{
		{ask: api.Rotate{}, in: 24 * time.Hour, within: keyring.DefaultWithin},
		{ask: api.Rotate{Now: true}, within: keyring.DefaultWithin},
		{ask: api.Rotate{In: 60, Within: 5}, in: time.Minute, within: 5 * time.Second},
		{ask: api.Rotate{At: now.Unix()}, in: -5, within: keyring.DefaultWithin},
		{ask: api.Rotate{At: now.Unix() - 1}, bad: true},
		{ask: api.Rotate{At: now.Unix() + 1, Now: true}, bad: true},
		{ask: api.Rotate{At: now.Unix() + 1, In: 1}, bad: true},
		{ask: api.Rotate{In: 1, Now: true}, bad: true},
	} {
		at, within, err := askedTime(c.ask, now, 24*time.Hour)
		if (err != nil) != c.bad || err == nil && (at.Sub(now) != c.in || within != c.within) {
			t.Errorf("%+v: in %v within %v, %v", c.ask, at.Sub(now), within, err)
		}
	}
}
