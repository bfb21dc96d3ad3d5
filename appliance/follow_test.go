package appliance

import (
	"encoding/hex"
	"errors"
	"testing"
	"time"

	"countersign/internal/gate"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/policy"
	"countersign/wire"
)

// put writes a record as a replica does: in the ledger, without a call of the appliance. A nil
// value deletes the record.
func (r *rig) put(t *testing.T, table ledger.Table, key string, value []byte) {
	t.Helper()
	if err := r.ledger.Update(t.Context(), func(tx *ledger.Tx) error {
		if value == nil {
			return tx.Delete(table, key)
		}
		return tx.Put(table, key, value)
	}); err != nil {
		t.Fatal(err)
	}
}

// both checks the memory that follows the ledger, and the memory after a restart.
func (r *rig) both(t *testing.T, check func(when string)) {
	t.Helper()
	check("at once")
	r.ledger.Close()
	r.open(t)
	check("after a restart")
}

// TestMemoryFollowsTheLock: a lock in the ledger locks the appliance, and its deletion unlocks the
// appliance.
func TestMemoryFollowsTheLock(t *testing.T) {
	r := newRig(t)
	if h := r.Health(); h.Condition != Operational || h.Lock != nil {
		t.Fatalf("%+v", h)
	}
	lock := Lock{By: "alice", Reason: "break-in", At: time.Now().UTC().Truncate(time.Second)}
	r.put(t, ledger.Meta, lockKey, manage.Encode(lock))
	r.both(t, func(when string) {
		h := r.Health()
		if h.Condition != LockedUp || h.Lock == nil || *h.Lock != lock || !r.gate.Blocked(gate.Operator) {
			t.Errorf("%s: %+v", when, h)
		}
		if _, err := r.Sign(t.Context(), r.shop, message(1, "m")); !errors.Is(err, ErrLocked) {
			t.Errorf("%s: a signature of a locked appliance: %v", when, err)
		}
	})
	lock.By, lock.Reason = "bob", "still"
	r.put(t, ledger.Meta, lockKey, manage.Encode(lock))
	const text = "the appliance is locked by bob: still"
	if h := r.Health(); h.Lock == nil || *h.Lock != lock || h.Causes[0].Text != text {
		t.Errorf("another lock: %+v", h)
	}
	r.put(t, ledger.Meta, lockKey, nil)
	r.both(t, func(when string) {
		if h := r.Health(); h.Condition != Operational || h.Lock != nil {
			t.Errorf("%s: %+v", when, h)
		}
		r.sign(t, r.shop, message(1, "m"))
	})
}

// TestMemoryFollowsThePolicies: the newest version in the ledger decides. A version that can't be
// parsed decides nothing, and refuses nothing for good: the same request is served by the next
// version.
func TestMemoryFollowsThePolicies(t *testing.T) {
	r := newRig(t)
	version := func(n uint64, text string) {
		t.Helper()
		hash := policy.Policy{}.Hash
		if p, err := policy.Parse("policy.cedar", []byte(text)); err == nil {
			hash = p.Hash
		}
		record := policyRecord{hex.EncodeToString(hash[:]), text, time.Now().Unix()}
		r.put(t, ledger.Policies, policyKey(n), manage.Encode(record))
	}
	var n byte
	answers := func(when string, want uint64, code string) {
		t.Helper()
		n++
		_, err := r.Sign(t.Context(), r.shop, message(n, "m"))
		if code != "" {
			r.refuses(t, code, err)
		} else if err != nil {
			t.Errorf("%s: %v", when, err)
		}
		if in, err := r.policies.inForce(); err == nil && in.version != want {
			t.Errorf("%s: version %d is in force, want %d", when, in.version, want)
		} else if (err != nil) != (code == wire.CodeUnavailable) {
			t.Errorf("%s: %v", when, err)
		}
	}
	answers("before the first version", 0, "")
	version(1, "")
	r.both(t, func(when string) { answers(when, 1, wire.CodeDenied) })
	version(2, allowShop)
	r.both(t, func(when string) { answers(when, 2, "") })
	version(3, "permit (")
	r.both(t, func(when string) { answers(when, 3, wire.CodeUnavailable) })
	version(4, allowShop)
	r.both(t, func(when string) { answers(when, 4, "") })
	version(2, "") // an old version is rewritten, and the newest stays in force
	r.both(t, func(when string) { answers(when, 4, "") })
	if got, changed, err := r.Activate(t.Context(), operator, parsed(t, allowShop)); err != nil || changed || got != 4 {
		t.Errorf("the text in force is activated: version %d, changed %v, %v", got, changed, err)
	}
	if got, changed, err := r.Activate(t.Context(), operator, parsed(t, "")); err != nil || !changed || got != 5 {
		t.Errorf("another text is activated: version %d, changed %v, %v", got, changed, err)
	}
	answers("after Activate", 5, wire.CodeDenied)
}

// TestMemoryFollowsTheRetention: the times in the ledger are in force, with the period of the
// configuration.
func TestMemoryFollowsTheRetention(t *testing.T) {
	r := newRig(t)
	if got := r.retentionInForce(); got != kept {
		t.Fatalf("%+v", got)
	}
	wanted := Retention{Epoch: kept.Epoch, Audit: 9 * day, Receipts: 8 * day, Decisions: 7 * day, Nonces: 6 * time.Hour}
	r.put(t, ledger.Meta, retentionKey, manage.Encode(wanted.record()))
	r.both(t, func(when string) {
		if got := r.retentionInForce(); got != wanted {
			t.Errorf("%s: %+v, want %+v", when, got, wanted)
		}
		_, before, err := r.Preview()
		if age := r.ledger.Time().Sub(before); err != nil || age < 8*day || age > 8*day+time.Minute {
			t.Errorf("%s: receipts are dropped after %v, want 8 days: %v", when, age, err)
		}
		if err := r.CheckShorter(func(in *Retention) { in.Audit = 9 * day }); !errors.Is(err, manage.ErrInvalid) {
			t.Errorf("%s: the same time is shorter: %v", when, err)
		}
		if err := r.CheckShorter(func(in *Retention) { in.Audit = 8 * day }); err != nil {
			t.Errorf("%s: %v", when, err)
		}
	})
}

// TestMemoryFollowsActs: memory and ledger agree after each act that changes a lock, the policy in
// force, or the retention.
func TestMemoryFollowsActs(t *testing.T) {
	r := newRig(t)
	state := func() (Health, uint64, Retention) {
		t.Helper()
		r.policies.look(r.policies.log) // as the periodic work does
		in, err := r.policies.inForce()
		if err != nil {
			t.Fatal(err)
		}
		return r.Health(), in.version, r.retentionInForce()
	}
	for name, act := range map[string]func() error{
		"lock":     func() error { return r.Lock(t.Context(), operator, "test") },
		"activate": func() error { _, _, err := r.Activate(t.Context(), operator, parsed(t, "")); return err },
		"shorten": func() error {
			return r.ShortenRetention(t.Context(), approved, nil, func(in *Retention) { in.Audit = day })
		},
	} {
		if err := act(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		health, version, retention := state()
		r.ledger.Close()
		r.open(t)
		again, sameVersion, sameRetention := state()
		if health.Condition != again.Condition || (health.Lock == nil) != (again.Lock == nil) ||
			health.Lock != nil && *health.Lock != *again.Lock {
			t.Errorf("%s: %+v, after a restart %+v", name, health, again)
		}
		if version != sameVersion || retention != sameRetention {
			t.Errorf("%s: version %d and %+v, after a restart %d and %+v",
				name, version, retention, sameVersion, sameRetention)
		}
	}
	if err := r.Unlock(t.Context(), operator); err != nil {
		t.Fatal(err)
	}
	r.both(t, func(when string) {
		if health, version, retention := state(); health.Lock != nil || version != 1 || retention.Audit != day {
			t.Errorf("%s: %+v, version %d, %+v", when, health, version, retention)
		}
	})
}

// TestDamagedRecord: memory can't follow a record that is no JSON. The ledger's state is then
// unknown, and the daemon stops.
func TestDamagedRecord(t *testing.T) {
	for table, key := range map[ledger.Table]string{ledger.Meta: lockKey, ledger.Policies: policyKey(1)} {
		r := newRig(t)
		err := r.ledger.Update(t.Context(), func(tx *ledger.Tx) error { return tx.Put(table, key, []byte("{")) })
		if !errors.Is(err, ledger.ErrUnknownState) {
			t.Errorf("%s of %s: %v, want %v", key, table, err, ledger.ErrUnknownState)
		}
		select {
		case <-r.ledger.Failed():
		default:
			t.Errorf("%s of %s: the ledger goes on", key, table)
		}
	}
}
