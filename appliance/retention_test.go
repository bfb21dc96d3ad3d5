package appliance

import (
	"errors"
	"testing"
	"time"

	"countersign/internal/cause"
	"countersign/internal/ledger"
	"countersign/internal/manage"
)

// TestRetentionIsNotShortened: a configuration that keeps something for a shorter time does nothing
// once there are operators; a proposal does.
func TestRetentionIsNotShortened(t *testing.T) {
	r := newRig(t)
	if err := r.startRetention(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.governed(t)
	less := kept
	less.Audit, less.Receipts = 24*time.Hour, kept.Receipts+time.Hour
	r.configured = less
	if err := r.startRetention(t.Context()); err != nil {
		t.Fatal(err)
	}
	if h := r.Health(); h.Condition != Degraded || len(h.Causes) != 1 || h.Causes[0].Kind != cause.RetentionWaits {
		t.Errorf("%+v", h)
	}
	if got := r.retentionInForce(); got.Audit != kept.Audit || got.Receipts != kept.Receipts+time.Hour {
		t.Errorf("%+v", got)
	}
	if err := r.startRetention(t.Context()); err != nil {
		t.Fatal(err)
	}
	if h := r.Health(); h.Condition != Degraded {
		t.Errorf("the next start hides that a time has no effect: %+v", h)
	}
	shorten := func(r *Retention) { r.Audit = 48 * time.Hour }
	proposed := map[string]string{"audit": "48h"}
	if err := r.ShortenRetention(t.Context(), operator, proposed, shorten); !errors.Is(err, manage.ErrNotApproved) {
		t.Errorf("without approval: %v", err)
	}
	if err := r.ShortenRetention(t.Context(), approved, proposed, shorten); err != nil {
		t.Fatal(err)
	}
	if h := r.Health(); h.Condition != Operational {
		t.Errorf("degraded after the approval: %+v", h)
	}
	for _, longer := range []func(*Retention){
		func(r *Retention) { r.Audit = 49 * time.Hour },
		func(r *Retention) { r.Audit, r.Receipts = 47*time.Hour, 2*kept.Receipts },
		func(*Retention) {},
	} {
		err := r.ShortenRetention(t.Context(), approved, map[string]string{}, longer)
		if !errors.Is(err, manage.ErrInvalid) {
			t.Errorf("a change that shortens nothing, or not only: %v", err)
		}
	}
	// A restart with the same configuration changes nothing; a restart with a longer time in it
	// does.
	for _, c := range []struct {
		configured, want time.Duration
		ignored          bool
	}{
		{less.Audit, 48 * time.Hour, false},
		{47 * time.Hour, 48 * time.Hour, true},
		{49 * time.Hour, 49 * time.Hour, false},
	} {
		now := less
		now.Audit = c.configured
		if err := r.ledger.View(func(v ledger.View) error {
			got, asked, _, err := now.inForce(v)
			if ignored := asked != now.record(); got.Audit != c.want || ignored != c.ignored {
				t.Errorf("configured %v: %v, ignored %t", c.configured, got.Audit, ignored)
			}
			return err
		}); err != nil {
			t.Errorf("configured %v: %v", c.configured, err)
		}
	}
}

// governed writes an operator down: from then on operators approve of policy and retention.
func (r *rig) governed(t *testing.T) {
	t.Helper()
	if err := r.ledger.Update(t.Context(), func(tx *ledger.Tx) error {
		return tx.Put(ledger.Operators, "alice", []byte("{}"))
	}); err != nil {
		t.Fatal(err)
	}
}

func TestShortestRetention(t *testing.T) {
	r := newRig(t)
	for name, change := range map[string]func(*Retention){
		"audit":     func(r *Retention) { r.Audit = time.Hour },
		"receipts":  func(r *Retention) { r.Receipts = time.Hour },
		"decisions": func(r *Retention) { r.Decisions = time.Hour },
		"nonces":    func(r *Retention) { r.Nonces = time.Minute },
	} {
		err := r.ShortenRetention(t.Context(), approved, map[string]string{name: "1h"}, change)
		if !errors.Is(err, manage.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
