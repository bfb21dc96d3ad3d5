package appliance

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"countersign/audit"
	"countersign/internal/eddsa"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/transcript"
	"countersign/wire"
)

var approved = audit.Actor{Kind: "operator", Name: "test", Proposal: 1}

func (r *rig) rotate(t *testing.T, name string, at time.Time) *Key {
	t.Helper()
	k, err := r.Rotate(t.Context(), audit.Operator("test"), name, at)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// states lists the versions of a line with their states.
func (r *rig) states(t *testing.T, name string) string {
	t.Helper()
	versions, err := r.Key(name)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, k := range versions {
		all = append(all, string(k.State))
	}
	return strings.Join(all, " ")
}

// reopen closes the ledger and opens the appliance anew, as after a crash.
func (r *rig) reopen(t *testing.T) {
	t.Helper()
	r.ledger.Close()
	r.open(t)
	if err := r.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// checkLine holds a line against what is promised of it, as the package says at Rotate.
func (r *rig) checkLine(t *testing.T, name string) {
	t.Helper()
	versions, err := r.Key(name)
	if err != nil {
		t.Fatal(err)
	}
	committed := map[string]string{} // by version, as the log has it
	r.ledger.Alive(t.Context())
	if err := r.Events(0, func(_ uint64, e audit.Event) bool {
		if e.Type == audit.KeyCommitted && strings.HasPrefix(e.Resource, name+"/") {
			if old := committed[e.Resource]; old != "" && old != e.Metadata["next"] {
				t.Errorf("%s has committed twice", e.Resource)
			}
			committed[e.Resource] = e.Metadata["next"]
		}
		return true
	}); err != nil {
		t.Fatal(err)
	}
	active := 0
	for i, k := range versions {
		if k.State == Active {
			active++
		}
		if int(k.Version) != i+1 {
			t.Errorf("version %d is missing", i+1)
		}
		if i == 0 {
			continue
		}
		if got := fmt.Sprintf("%x", k.digest()); committed[versions[i-1].Info().Ref.String()] != got {
			t.Errorf("%v is %s, the version before has committed to %s", k.Info().Ref, got, committed[versions[i-1].Info().Ref.String()])
		}
		if k.announced() {
			r.checkStep(t, versions[i-1], k)
		}
	}
	if active > 1 {
		t.Errorf("%d versions are active", active)
	}
}

// checkStep judges a step as a stranger would.
func (r *rig) checkStep(t *testing.T, old, k *Key) {
	t.Helper()
	s := k.Succession
	if s == nil {
		t.Errorf("%v has no step", k.Info().Ref)
		return
	}
	doc, err := transcript.Parse(transcript.Request{Type: "key-succession-v1", Payload: s.Payload, Nonce: s.Nonce, Timestamp: s.Timestamp, ExpiresAt: s.ExpiresAt})
	if err != nil {
		t.Fatal(err)
	}
	if err := eddsa.Verify(old.Info().PublicKey, doc.Message, s.Signature); err != nil {
		t.Errorf("%v: %v", k.Info().Ref, err)
	}
	var p struct {
		NewPublicKey, Next []byte
	}
	var raw map[string]any
	if err := json.Unmarshal(s.Payload, &raw); err != nil {
		t.Fatal(err)
	}
	p.NewPublicKey, _ = base64.RawURLEncoding.DecodeString(raw["new_public_key"].(string))
	p.Next, _ = base64.RawURLEncoding.DecodeString(raw["next"].(string))
	if string(p.NewPublicKey) != string(k.Info().PublicKey) {
		t.Errorf("%v: the step is to another key", k.Info().Ref)
	}
	if next, ok := r.Next(k); !ok || string(next[:]) != string(p.Next) {
		t.Errorf("%v: the step names another successor than there is", k.Info().Ref)
	}
}

// TestRotation: announced, active at its time, the version before verifies for its grace time, then it is archived, then destroyed.
func TestRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		defer r.ledger.Close()
		before := r.sign(t, r.shop, message(1, "before"))
		k := r.rotate(t, "payments", time.Now().Add(time.Minute))
		if got := r.states(t, "payments"); got != "active pending pending" || k.Version != 2 {
			t.Errorf("announced: %s", got)
		}
		r.checkLine(t, "payments")
		if s := r.sign(t, r.shop, message(2, "announced")); s.Version != 1 {
			t.Errorf("before its time version %d signs", s.Version)
		}
		if _, err := r.Rotate(t.Context(), audit.Operator("test"), "payments", time.Now()); !errors.Is(err, ErrConflict) {
			t.Errorf("a second one meanwhile: %v", err)
		}
		r.keepLine(t.Context(), "payments")
		if got := r.states(t, "payments"); got != "active pending pending" {
			t.Errorf("too early: %s", got)
		}
		r.reopen(t) // the power fails
		time.Sleep(time.Minute)
		r.keepLine(t.Context(), "payments")
		if got := r.states(t, "payments"); got != "verify-only active pending" {
			t.Errorf("at its time: %s", got)
		}
		r.checkLine(t, "payments")
		after := r.sign(t, r.shop, message(3, "after"))
		if after.Version != 2 || after.PublicKey == before.PublicKey {
			t.Errorf("after it: version %d", after.Version)
		}
		first := message(1, "before")
		first.Timestamp, first.ExpiresAt = before.Timestamp, before.ExpiresAt
		if again := r.sign(t, r.shop, first); string(again.Signature) != string(before.Signature) || again.Version != 1 {
			t.Errorf("a repetition of what version 1 has signed: version %d", again.Version)
		}
		payments := "payments"
		if err := r.checkSigner(&payments, before.PublicKey); err != nil {
			t.Errorf("within the grace time: %v", err)
		}
		for _, early := range []uint32{1, 2, 3} {
			if err := r.Destroy(t.Context(), approved, "payments", early); !errors.Is(err, ErrConflict) {
				t.Errorf("destroyed in use: version %d: %v", early, err)
			}
		}
		time.Sleep(limits.MaxLifetime - time.Second)
		r.keepLine(t.Context(), "payments")
		if got := r.states(t, "payments"); got != "verify-only active pending" {
			t.Errorf("before its grace time is over: %s", got)
		}
		time.Sleep(time.Second)
		r.keepLine(t.Context(), "payments")
		if got := r.states(t, "payments"); got != "archived active pending" {
			t.Errorf("after its grace time: %s", got)
		}
		r.refuses(t, "wrong_signer", r.checkSigner(&payments, before.PublicKey))
		if err := r.Destroy(t.Context(), audit.Operator("test"), "payments", 1); !errors.Is(err, ErrNotApproved) {
			t.Errorf("destroyed without approval: %v", err)
		}
		if err := r.Destroy(t.Context(), approved, "payments", 1); err != nil {
			t.Fatal(err)
		}
		if _, err := r.store.Key(t.Context(), keystore.Ref{Name: "payments", Version: 1}); !errors.Is(err, keystore.ErrNotFound) {
			t.Errorf("it is still on the token: %v", err)
		}
		r.reopen(t)
		if got := r.states(t, "payments"); got != "destroyed active pending" {
			t.Errorf("after a restart: %s", got)
		}
		r.checkLine(t, "payments")
	})
}

// TestFailedRotationChangesNothing: whatever of the device fails, the line is as it was, that is an event, and it can be done afterwards.
func TestFailedRotationChangesNothing(t *testing.T) {
	for name, breaks := range map[string]func(*rig){
		"no successor is made":   func(r *rig) { r.store.BeforeGenerate = func(keystore.Ref) error { return keystore.ErrUnavailable } },
		"the step is not signed": func(r *rig) { r.store.BeforeSign = func(keystore.Ref, []byte) error { return keystore.ErrUnavailable } },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			breaks(r)
			if _, err := r.Rotate(t.Context(), audit.Operator("test"), "payments", time.Now()); err == nil {
				t.Fatal("it was rotated")
			}
			r.store.BeforeGenerate, r.store.BeforeSign = nil, nil
			if got := r.states(t, "payments"); got != "active pending" {
				t.Errorf("%s", got)
			}
			if !slices.Contains(r.events(t), audit.KeyRotationFailed) {
				t.Errorf("events %v", r.events(t))
			}
			if s := r.sign(t, r.shop, message(1, "m")); s.Version != 1 {
				t.Errorf("version %d signs", s.Version)
			}
			if h := r.Health(); h.Condition != Degraded || !strings.Contains(strings.Join(h.Causes, ""), "payments") {
				t.Errorf("after a failure: %+v", h)
			}
			r.hasten()
			r.keepLine(t.Context(), "payments")
			if got := r.states(t, "payments"); got != "verify-only active pending" {
				t.Errorf("tried again: %s", got)
			}
			if h := r.Health(); h.Condition != Operational {
				t.Errorf("afterwards: %+v", h)
			}
			r.hasten()
			r.keepLine(t.Context(), "payments")
			if got := r.states(t, "payments"); got != "verify-only active pending" {
				t.Errorf("done, and once more: %s", got)
			}
			r.checkLine(t, "payments")
		})
	}
}

// TestRotationIsCutOff: the power fails while a rotation is in the device; afterwards nothing of it counts.
func TestRotationIsCutOff(t *testing.T) {
	for _, where := range []string{"generate", "sign"} {
		t.Run(where, func(t *testing.T) {
			r := newRig(t)
			inDevice, release := make(chan struct{}), make(chan struct{})
			hang := func() { close(inDevice); <-release }
			if where == "generate" {
				r.store.BeforeGenerate = func(keystore.Ref) error { hang(); return keystore.ErrUnavailable }
			} else {
				r.store.BeforeSign = func(keystore.Ref, []byte) error { hang(); return keystore.ErrUnavailable }
			}
			done := make(chan struct{})
			cut := r.Appliance
			go func() {
				defer close(done)
				cut.Rotate(context.Background(), audit.Operator("test"), "payments", time.Now())
			}()
			<-inDevice
			cut.ledger.Close() // as a crash does: nothing more is written
			close(release)
			<-done
			r.store.BeforeGenerate, r.store.BeforeSign = nil, nil
			r.open(t)
			if err := r.Recover(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got := r.states(t, "payments"); got != "active pending" {
				t.Errorf("%s", got)
			}
			r.rotate(t, "payments", time.Now())
			r.checkLine(t, "payments")
		})
	}
}

// TestScheduledRotation: by age and by use count, and again after a failure.
func TestScheduledRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		defer r.ledger.Close()
		set := func(change func(*Line)) {
			if _, err := r.SetLine(t.Context(), audit.Operator("test"), "payments", func(l *Line) error { change(l); return nil }); err != nil {
				t.Fatal(err)
			}
		}
		set(func(l *Line) { l.Plan.Every = 24 * time.Hour })
		time.Sleep(24*time.Hour - time.Second)
		r.keepLine(t.Context(), "payments")
		if got := r.states(t, "payments"); got != "active pending" {
			t.Fatalf("early: %s", got)
		}
		time.Sleep(time.Second)
		r.store.BeforeSign = func(keystore.Ref, []byte) error { return keystore.ErrUnavailable }
		r.keepLine(t.Context(), "payments")
		if h := r.Health(); h.Condition != Degraded || len(h.Causes) != 1 || !strings.Contains(h.Causes[0], "payments") {
			t.Errorf("after a failure: %+v", h)
		}
		r.store.BeforeSign = nil
		r.keepLine(t.Context(), "payments")
		if got := r.states(t, "payments"); got != "active pending" {
			t.Errorf("tried again at once: %s", got)
		}
		time.Sleep(firstRetry)
		r.keepLine(t.Context(), "payments")
		if got := r.states(t, "payments"); got != "verify-only active pending" {
			t.Errorf("tried again: %s", got)
		}
		if h := r.Health(); h.Condition != Operational {
			t.Errorf("afterwards: %+v", h)
		}
		set(func(l *Line) { l.Plan.Every, l.Plan.Uses = 0, 3 })
		for n := range byte(3) {
			if r.keepLine(t.Context(), "payments"); r.states(t, "payments") != "verify-only active pending" {
				t.Fatalf("after %d uses: %s", n, r.states(t, "payments"))
			}
			r.sign(t, r.shop, message(10+n, "m"))
			if n == 1 {
				r.reopen(t) // the count outlives a crash
			}
		}
		r.keepLine(t.Context(), "payments")
		if got := r.states(t, "payments"); got != "verify-only verify-only active pending" {
			t.Errorf("after 3 uses: %s", got)
		}
		r.checkLine(t, "payments")
	})
}

// TestCompromise: the version signs nothing and is believed nothing from that moment, and its successor follows, at once or when it can.
func TestCompromise(t *testing.T) {
	r := newRig(t)
	first := r.sign(t, r.shop, message(1, "m"))
	if err := r.Compromise(t.Context(), audit.Operator("test"), "payments", 1, "stolen"); !errors.Is(err, ErrNotApproved) {
		t.Fatalf("without approval: %v", err)
	}
	// A request that has chosen version 1 and is in front of its admission when that is written down.
	k, err := r.signingKey("payments")
	if err != nil {
		t.Fatal(err)
	}
	r.store.BeforeGenerate = func(keystore.Ref) error { return keystore.ErrUnavailable }
	if err := r.Compromise(t.Context(), approved, "payments", 1, "stolen"); err != nil {
		t.Fatal(err)
	}
	r.store.BeforeGenerate = nil
	r.refuses(t, "key_not_active", r.mayUse(k))
	if got := r.states(t, "payments"); got != "compromised pending" {
		t.Errorf("the device fails: %s", got)
	}
	_, err = r.Sign(t.Context(), r.shop, message(2, "m"))
	r.refuses(t, "key_not_active", err)
	_, err = r.Sign(t.Context(), r.shop, message(1, "m"))
	r.refuses(t, "key_not_active", err)
	_, err = r.Verify(t.Context(), r.shop, verifyOf(message(1, "m"), first))
	r.refuses(t, "wrong_signer", err)
	if h := r.Health(); h.Condition != Degraded {
		t.Errorf("%+v", h)
	}
	r.reopen(t)
	r.keepLine(t.Context(), "payments")
	if got := r.states(t, "payments"); got != "compromised active pending" {
		t.Errorf("the device is back: %s", got)
	}
	r.checkLine(t, "payments")
	if s := r.sign(t, r.shop, message(3, "m")); s.Version != 2 {
		t.Errorf("version %d signs", s.Version)
	}
	if told := r.Rotation("payments"); told == nil || !told.Compromised || told.Version != 2 {
		t.Errorf("peers are told %+v", told)
	}
}

// TestAcknowledge: what a peer has acknowledged outlives a restart, and lets the version before go where the line says so.
func TestAcknowledge(t *testing.T) {
	r := newRig(t)
	ack := func(who Peer, key string, version uint32) error {
		_, err := r.Acknowledge(t.Context(), who, &wire.Ack{ID: "1", Op: wire.OpAck, Key: key, Version: version})
		return err
	}
	for _, bad := range []uint32{0, 1, 2, 3} {
		r.refuses(t, "unknown_key", ack(r.shop, "payments", bad))
	}
	r.refuses(t, "unknown_key", ack(r.shop, "nothing", 2))
	if _, err := r.SetLine(t.Context(), audit.Operator("test"), "payments", func(l *Line) error { l.Acknowledge = []string{"shop"}; return nil }); err != nil {
		t.Fatal(err)
	}
	r.rotate(t, "payments", time.Now())
	if err := ack(r.cafe, "payments", 2); err != nil {
		t.Fatal(err)
	}
	r.refuses(t, "unknown_key", ack(r.shop, "payments", 3))
	r.keepLine(t.Context(), "payments")
	if got := r.states(t, "payments"); got != "verify-only active pending" {
		t.Errorf("who must has not acknowledged: %s", got)
	}
	r.reopen(t)
	if got := r.Unacknowledged("payments", 2); !slices.Equal(got, []string{"shop"}) {
		t.Errorf("not acknowledged by %v", got)
	}
	for range 2 {
		if err := ack(r.shop, "payments", 2); err != nil {
			t.Fatal(err)
		}
	}
	known := 0
	for _, e := range r.events(t) {
		if e == audit.RotationKnown {
			known++
		}
	}
	if known != 2 {
		t.Errorf("%d acknowledgements are written down, want 2", known)
	}
	r.keepLine(t.Context(), "payments")
	if got := r.states(t, "payments"); got != "archived active pending" {
		t.Errorf("acknowledged: %s", got)
	}
}

// TestPresence: without a confirmation nothing is signed; it ends by itself, and when credentials change.
func TestPresence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		defer r.ledger.Close()
		n := byte(0)
		signs := func(want string) {
			t.Helper()
			n++
			_, err := r.Sign(t.Context(), r.shop, message(n, "m"))
			if want != "" {
				r.refuses(t, want, err)
			} else if err != nil {
				t.Error(err)
			}
		}
		presence := func(who audit.Actor, d time.Duration) error {
			_, err := r.SetLine(t.Context(), who, "payments", func(l *Line) error { l.Presence = d; return nil })
			return err
		}
		if _, err := r.Confirm(t.Context(), audit.Operator("test"), "payments"); !errors.Is(err, ErrConflict) {
			t.Errorf("a key that needs none: %v", err)
		}
		if err := presence(audit.Operator("test"), 300*time.Second); err != nil {
			t.Fatal(err)
		}
		signs("not_confirmed")
		confirm := func() {
			if _, err := r.Confirm(t.Context(), audit.Operator("test"), "payments"); err != nil {
				t.Fatal(err)
			}
		}
		confirm()
		signs("")
		time.Sleep(300*time.Second - time.Nanosecond)
		signs("")
		time.Sleep(time.Nanosecond)
		signs("not_confirmed")
		confirm()
		signs("")
		r.CredentialsChanged()
		signs("not_confirmed")
		confirm()
		r.reopen(t)
		signs("not_confirmed")
		for _, weak := range []time.Duration{0, time.Hour} {
			if err := presence(audit.Operator("test"), weak); !errors.Is(err, ErrNotApproved) {
				t.Errorf("to %v without approval: %v", weak, err)
			}
		}
		if err := presence(approved, 0); err != nil {
			t.Fatal(err)
		}
		signs("")
	})
}

// TestLock: when it returns nothing is admitted any more, through restarts, until it is unlocked.
func TestLock(t *testing.T) {
	r := newRig(t)
	first := r.sign(t, r.shop, message(1, "m"))
	if err := r.Lock(t.Context(), audit.Operator("test"), "incident 7"); err != nil {
		t.Fatal(err)
	}
	closed := func() {
		t.Helper()
		_, err := r.Sign(t.Context(), r.shop, message(2, "m"))
		r.refuses(t, "unavailable", err)
		_, err = r.Verify(t.Context(), r.shop, verifyOf(message(1, "m"), first))
		r.refuses(t, "unavailable", err)
		if _, err := r.CreateKey(t.Context(), audit.Operator("test"), NewKey{Name: "other"}); !errors.Is(err, ErrLocked) {
			t.Errorf("a key is made: %v", err)
		}
		if _, err := r.Rotate(t.Context(), audit.Operator("test"), "payments", time.Now()); !errors.Is(err, ErrLocked) {
			t.Errorf("a key is rotated: %v", err)
		}
		if h := r.Health(); h.Condition != LockedUp || h.Lock == nil || h.Lock.Reason != "incident 7" {
			t.Errorf("%+v", h)
		}
	}
	closed()
	r.reopen(t)
	if err := r.loadLock(); err != nil {
		t.Fatal(err)
	}
	closed()
	r.close(byRollback, ErrRolledBack)
	if err := r.Unlock(t.Context(), audit.Operator("test")); err != nil {
		t.Fatal(err)
	}
	_, err := r.Sign(t.Context(), r.shop, message(2, "m"))
	r.refuses(t, "unavailable", err) // the other reason is there still
	r.close(byRollback, nil)
	r.sign(t, r.shop, message(2, "m"))
	if err := r.Unlock(t.Context(), audit.Operator("test")); !errors.Is(err, ErrConflict) {
		t.Errorf("unlocked twice: %v", err)
	}
}

// TestRetentionIsNotShortened: a configuration that keeps less does nothing once there are operators; a proposal does.
func TestRetentionIsNotShortened(t *testing.T) {
	r := newRig(t)
	if err := r.startRetention(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := r.ledger.Update(t.Context(), func(tx *ledger.Tx) error { return tx.Put(ledger.Operators, "alice", []byte("{}")) }); err != nil {
		t.Fatal(err)
	}
	less := kept
	less.Audit, less.Receipts = 24*time.Hour, kept.Receipts+time.Hour
	r.configured = less
	if err := r.startRetention(t.Context()); err != nil {
		t.Fatal(err)
	}
	if h := r.Health(); h.Condition != Degraded || !strings.Contains(strings.Join(h.Causes, ""), "retention") {
		t.Errorf("%+v", h)
	}
	if got := r.retentionInForce(); got.Audit != kept.Audit || got.Receipts != kept.Receipts+time.Hour {
		t.Errorf("%+v", got)
	}
	shorten := func(r *Retention) { r.Audit = 48 * time.Hour }
	if err := r.ShortenRetention(t.Context(), audit.Operator("test"), map[string]string{"audit": "48h"}, shorten); !errors.Is(err, ErrNotApproved) {
		t.Errorf("without approval: %v", err)
	}
	if err := r.ShortenRetention(t.Context(), approved, map[string]string{"audit": "48h"}, shorten); err != nil {
		t.Fatal(err)
	}
	for _, longer := range []func(*Retention){func(r *Retention) { r.Audit = 49 * time.Hour }, func(r *Retention) { r.Audit, r.Receipts = 47*time.Hour, 2*kept.Receipts }, func(*Retention) {}} {
		if err := r.ShortenRetention(t.Context(), approved, map[string]string{}, longer); !errors.Is(err, ErrInvalid) {
			t.Errorf("what shortens nothing, or not only: %v", err)
		}
	}
	// A restart with the same configuration changes nothing of that; one with a longer time in it does.
	for _, c := range []struct {
		configured, want time.Duration
		ignored          bool
	}{{less.Audit, 48 * time.Hour, false}, {47 * time.Hour, 48 * time.Hour, true}, {49 * time.Hour, 49 * time.Hour, false}} {
		now := less
		now.Audit = c.configured
		if got, ignored, err := now.InForce(r.ledger); err != nil || got.Audit != c.want || ignored != c.ignored {
			t.Errorf("configured %v: %v, ignored %t, %v", c.configured, got.Audit, ignored, err)
		}
	}
}

// TestPolicyFileIsNotBelieved: a policy file that was changed does nothing at a start, once there are operators.
func TestPolicyFileIsNotBelieved(t *testing.T) {
	r := newRig(t)
	start := func(text string) {
		t.Helper()
		r.rules.Store(&rules{Policy: parsed(t, text)})
		if err := r.startPolicy(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	inForce := func() string { return string(r.rules.Load().Text) }
	start(allowShop)
	const wide = `permit (principal, action, resource);`
	start(wide + "\n")
	if inForce() != wide+"\n" {
		t.Error("before there are operators, the file counts")
	}
	start(allowShop)
	if err := r.ledger.Update(t.Context(), func(tx *ledger.Tx) error { return tx.Put(ledger.Operators, "alice", []byte("{}")) }); err != nil {
		t.Fatal(err)
	}
	start(wide)
	if inForce() != allowShop {
		t.Error("a policy that nobody has approved is in force")
	}
	if h := r.Health(); h.Condition != Degraded || !strings.Contains(strings.Join(h.Causes, ""), "policy") {
		t.Errorf("%+v", h)
	}
	_, err := r.Sign(t.Context(), r.cafe, message(1, "m"))
	r.refuses(t, "denied", err)
	if _, _, err := r.Activate(t.Context(), approved, parsed(t, wide)); err != nil {
		t.Fatal(err)
	}
	r.sign(t, r.cafe, message(1, "m"))
	if h := r.Health(); h.Condition != Operational {
		t.Errorf("%+v", h)
	}
}

func TestNoiseRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		defer r.ledger.Close()
		if _, err := r.CreateOwnKey(t.Context(), audit.Operator("test"), NoiseName, "memory"); err != nil {
			t.Fatal(err)
		}
		owner := func() string {
			r.keepLine(t.Context(), NoiseName)
			k, err := r.NoiseKey()
			if err != nil || k.Authorization == nil {
				return ""
			}
			var said struct{ Owner string }
			if err := json.Unmarshal(k.Authorization.Payload, &said); err != nil {
				t.Fatal(err)
			}
			return said.Owner
		}
		if got := owner(); got != "" {
			t.Errorf("without an identity it is authorised by %s", got)
		}
		r.identity = "other" // which is not there yet
		if got := owner(); got != "" {
			t.Errorf("authorised by %s", got)
		}
		r.identity = "payments"
		if got := owner(); got != base64.RawURLEncoding.EncodeToString(r.public) {
			t.Errorf("authorised by %q", got)
		}
		answering := func() (all []uint32) {
			for _, k := range r.noiseKeys() {
				all = append(all, k.Version)
			}
			return all
		}
		r.rotate(t, NoiseName, time.Now().Add(time.Minute))
		if got := answering(); !slices.Equal(got, []uint32{1, 2}) {
			t.Errorf("announced: %v answer", got)
		}
		told := r.Rotation(NoiseName)
		if told == nil || told.Authorization == nil {
			t.Fatalf("peers are told %+v", told)
		}
		doc, err := transcript.Parse(transcript.Request{Type: "paykit-noise-key-authorization-v1", Payload: told.Authorization.Payload, ExpiresAt: 1})
		if err != nil {
			t.Fatal(err)
		}
		if err := eddsa.Verify(r.public, doc.Message, told.Authorization.Signature); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Minute)
		r.keepLine(t.Context(), NoiseName)
		if got := answering(); !slices.Equal(got, []uint32{2, 1}) {
			t.Errorf("in its grace time: %v answer", got)
		}
		time.Sleep(limits.MaxLifetime)
		r.keepLine(t.Context(), NoiseName)
		if got := answering(); !slices.Equal(got, []uint32{2}) {
			t.Errorf("afterwards: %v answer", got)
		}
		// The identity's own rotation: the Noise key speaks for the new one.
		if got := r.rotate(t, "payments", time.Now()); owner() != base64.RawURLEncoding.EncodeToString(got.Info().PublicKey) {
			t.Errorf("authorised by %q", owner())
		}
		for _, name := range []string{LogName, AdminName} {
			if _, err := r.Rotate(t.Context(), audit.Operator("test"), name, time.Now()); err == nil {
				t.Errorf("%s was rotated", name)
			}
		}
	})
}
