package keyring_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"countersign/audit"
	"countersign/client"
	"countersign/internal/form"
	"countersign/internal/gate"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/keystore/keystoretest"
	"countersign/internal/manage"
	"countersign/wire"
)

// withTokens gives a rig further tokens.
func withTokens(names ...string) func(*rig) {
	return func(r *rig) {
		r.more = map[string]keystore.Store{}
		for _, name := range names {
			r.more[name] = form.Guard(keystoretest.NewMemory(), nil)
		}
	}
}

// lose removes versions of payments from their token.
func (r *rig) lose(versions ...uint32) {
	for _, version := range versions {
		ref := keystore.Ref{Name: "payments", Version: version}
		r.store.Remove(ref)
		r.lost = append(r.lost, ref)
	}
}

func (r *rig) makeRecovery(t *testing.T, token string) {
	t.Helper()
	if err := r.Keys.MakeRecovery(t.Context(), approved, "payments", token); err != nil {
		t.Fatal(err)
	}
}

func (r *rig) recover(t *testing.T) {
	t.Helper()
	if err := r.Keys.RecoverLine(t.Context(), approved, "payments", "it burnt"); err != nil {
		t.Fatal(err)
	}
}

// pinned is the line that a peer pins at a version, with the commitments that the appliance shows.
func (r *rig) pinned(t *testing.T, version uint32) client.KeyLine {
	t.Helper()
	k := r.Keys.Version("payments", version)
	l := client.KeyLine{Key: k.Name, Version: k.Version, PublicKey: [32]byte(k.Info().PublicKey)}
	l.Next, _ = r.Keys.Next(k)
	l.Recovery, _ = r.Keys.RecoveryCommitment("payments")
	return l
}

// follows has a peer follow the line as far as the appliance shows steps.
func (r *rig) follows(t *testing.T, at client.KeyLine) (client.KeyLine, error) {
	t.Helper()
	steps, err := r.Keys.Steps(&wire.Line{Key: at.Key, From: at.Version})
	if err != nil {
		t.Fatal(err)
	}
	return at.Advance(*steps)
}

const recovered = 1_000_000

// TestRecovery loses the token of a line. The line goes on with its recovery successor on another
// token, peers who know of the commitment follow, and others do not.
func TestRecovery(t *testing.T) {
	r := newRig(t, withTokens("safe"))
	plain := r.pinned(t, 1) // before there was a recovery successor
	refused(t, manage.ErrNotApproved, r.Keys.MakeRecovery(t.Context(), operator, "payments", "safe"))
	refused(t, manage.ErrInvalid, r.Keys.MakeRecovery(t.Context(), approved, "payments", "memory"))
	refused(t, manage.ErrNotFound, r.Keys.MakeRecovery(t.Context(), approved, "payments", "nowhere"))
	refused(t, manage.ErrConflict, r.Keys.RecoverLine(t.Context(), approved, "payments", "it burnt"))
	r.wantStates(t, "payments", "active pending")
	r.makeRecovery(t, "safe")
	r.wantStates(t, "payments", "active pending pending pending")
	knows := r.pinned(t, 1)
	r.reopen(t)
	refused(t, manage.ErrConflict, r.Keys.CheckState("payments", recovered, keyring.Archived))
	refused(t, manage.ErrConflict, r.Keys.RecoverLine(t.Context(), approved, "payments", "its token answers"))
	r.wantStates(t, "payments", "active pending pending pending")

	// A peer who has pinned the line before takes the commitment from two steps in a row.
	r.rotate(t, "payments", time.Now())
	once, err := r.follows(t, plain)
	if err != nil || once.Recovery != [32]byte{} || once.NewRecovery != knows.Recovery {
		t.Errorf("after a step: %+v, %v", once, err)
	}
	r.rotate(t, "payments", time.Now())
	twice, err := r.follows(t, once)
	if err != nil || twice.Recovery != knows.Recovery || twice.NewRecovery != [32]byte{} {
		t.Errorf("after two steps: %+v, %v", twice, err)
	}
	announced := r.rotate(t, "payments", time.Now().Add(time.Hour)) // never becomes active
	r.checkKey(t, "payments")
	r.lose(1, 2, 3, 4, 5)
	refused(t, manage.ErrNotApproved, r.Keys.RecoverLine(t.Context(), operator, "payments", "it burnt"))
	refused(t, manage.ErrInvalid, r.Keys.RecoverLine(t.Context(), approved, "payments", ""))
	if err := r.Keys.CheckRecover("payments"); err != nil {
		t.Error(err)
	}
	r.recover(t)
	r.wantStates(t, "payments", "verify-only verify-only verify-only archived archived active pending")
	for name, from := range map[string]client.KeyLine{"version 1": knows, "version 2": twice} {
		at, err := r.follows(t, from)
		if err != nil || at.Version != recovered || at.Recovery != [32]byte{} || at.Next == [32]byte{} {
			t.Errorf("from %s: %+v, %v", name, at, err)
		}
	}
	if at, err := r.follows(t, plain); err != nil || at.Version != recovered {
		t.Errorf("a peer that was away the whole time: %+v, %v", at, err)
	}
	if at, err := r.follows(t, once); err != nil || at.Version != recovered {
		t.Errorf("a peer that was away since version 2: %+v, %v", at, err)
	}
	if s := r.sign(t, r.shop, message(1, "m")); s.Version != recovered {
		t.Errorf("version %d signs", s.Version)
	}
	_, news := r.Keys.News()
	if len(news) != 1 || news[0].Version != recovered || news[0].Change < announced.Change {
		t.Errorf("the news are %+v", news)
	}
	if err := r.ack(t, r.shop, "payments", recovered); err != nil {
		t.Error(err)
	}
	r.reopen(t)
	r.rotate(t, "payments", time.Now())
	if s := r.sign(t, r.shop, message(2, "m")); s.Version != recovered+1 {
		t.Errorf("version %d signs", s.Version)
	}
	if at, err := r.follows(t, knows); err != nil || at.Version != recovered+1 {
		t.Errorf("%+v, %v", at, err)
	}
	r.checkKey(t, "payments")
	if r.count(t, audit.KeyRecovered) != 1 {
		t.Error("the log does not have the recovery once")
	}
}

// TestRecoveryIsUnknown: a peer whose line knows of no recovery successor follows no step to one.
func TestRecoveryIsUnknown(t *testing.T) {
	r := newRig(t, withTokens("safe"))
	plain := r.pinned(t, 1)
	r.makeRecovery(t, "safe")
	r.lose(1, 2)
	r.recover(t)
	if at, err := r.follows(t, plain); !errors.Is(err, client.ErrBrokenLine) || at != (client.KeyLine{}) ||
		!strings.Contains(err.Error(), "this line knows of none") {
		t.Errorf("%+v, %v", at, err)
	}
}

// TestRecoveryInASafe: an appliance starts without the token of a recovery successor, and names the
// token when it is needed.
func TestRecoveryInASafe(t *testing.T) {
	r := newRig(t, withTokens("safe"))
	r.makeRecovery(t, "safe")
	safe := r.more
	r.more = nil
	r.reopen(t)
	r.condition(t, "operational", "")
	r.rotate(t, "payments", time.Now())
	r.lose(1, 2, 3)
	err := r.Keys.CheckRecover("payments")
	if !errors.Is(err, manage.ErrNotFound) || !strings.Contains(err.Error(), "put the token into the configuration") {
		t.Error(err)
	}
	refused(t, manage.ErrNotFound, r.Keys.RecoverLine(t.Context(), approved, "payments", "it burnt"))
	r.more = safe
	r.reopen(t)
	r.recover(t)
	r.wantStates(t, "payments", "verify-only verify-only archived active pending")
	r.sign(t, r.shop, message(1, "m"))
}

// TestRecoveryAfterACompromise: the token of a compromised version is lost with its successor. The
// recovery successor takes their place.
func TestRecoveryAfterACompromise(t *testing.T) {
	r := newRig(t, withTokens("safe"))
	r.makeRecovery(t, "safe")
	pin := r.pinned(t, 1)
	r.lose(1, 2)
	r.compromise(t, "payments", 1)
	r.wantStates(t, "payments", "compromised pending pending pending")
	r.recover(t)
	r.wantStates(t, "payments", "compromised archived active pending")
	r.keep(t, "payments")
	r.wantStates(t, "payments", "compromised archived active pending")
	if at, err := r.follows(t, pin); err != nil || at.Version != recovered {
		t.Errorf("%+v, %v", at, err)
	}
	event := r.Keys.Rotation("payments")
	if event.RetiresAt != event.ActivatesAt {
		t.Errorf("peers are told that a compromised version is accepted until %d", event.RetiresAt)
	}
}

// TestRecoveryIsReplaced: another recovery successor takes the place of the first one, which never
// gets into the way of the line.
func TestRecoveryIsReplaced(t *testing.T) {
	r := newRig(t, withTokens("safe", "bank"))
	r.makeRecovery(t, "safe")
	old := r.pinned(t, 1)
	r.makeRecovery(t, "bank")
	r.wantStates(t, "payments", "active pending archived archived pending pending")
	if l := r.pinned(t, 1); l.Recovery == old.Recovery {
		t.Error("the commitment is that of before")
	}
	r.compromise(t, "payments", 1) // whose own successor is there
	r.wantStates(t, "payments", "compromised active pending archived archived pending pending")
	at, err := r.follows(t, old)
	if err != nil || at.Version != 2 || at.Recovery != old.Recovery || at.NewRecovery == old.Recovery {
		t.Errorf("%+v, %v", at, err)
	}
	r.rotate(t, "payments", time.Now())
	if at, err = r.follows(t, at); err != nil {
		t.Fatal(err)
	}
	r.lose(2, 3, 4)
	r.recover(t)
	if at, err = r.follows(t, at); err != nil || at.Version != 2*recovered {
		t.Errorf("%+v, %v", at, err)
	}
	r.destroyed(t, recovered)
}

// destroyed destroys a recovery successor that was never used.
func (r *rig) destroyed(t *testing.T, version uint32) {
	t.Helper()
	r.destroy(t, "payments", version)
	if k := r.Keys.Version("payments", version); k.State != keyring.Destroyed || k.Announced() {
		t.Errorf("%s, announced %v", k.State, k.Announced())
	}
}

// TestRecoveryByItself: nothing but an act of operators uses a recovery successor.
func TestRecoveryByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, withTokens("safe"))
		r.makeRecovery(t, "safe")
		r.set(t, "payments", func(s *keyring.Settings) { s.Plan.Every = time.Hour })
		for range 5 {
			time.Sleep(time.Hour)
			r.keep(t, "payments")
		}
		r.lose(6, 7)
		for range 5 {
			time.Sleep(time.Hour)
			r.keep(t, "payments")
		}
		k, err := r.Keys.Active("payments")
		if err != nil || k.Version != 6 {
			t.Errorf("%v, %v", k, err)
		}
		if k := r.Keys.Recovery("payments"); k == nil || k.Announced() || k.Uses() != 0 {
			t.Errorf("the recovery successor: %+v", k)
		}
		r.checkKey(t, "payments")
	})
}

// TestRecoveryAfterATheft: the HSM was stolen. The operators recover the line, then mark the
// version that was to follow: peers get past it, and are told the right times.
func TestRecoveryAfterATheft(t *testing.T) {
	r := newRig(t, withTokens("safe"))
	r.makeRecovery(t, "safe")
	pin := r.pinned(t, 1)
	r.lose(1, 2)
	r.recover(t)
	if at, err := r.follows(t, pin); err != nil || at.Version != recovered {
		t.Fatalf("before: %+v, %v", at, err)
	}
	retires := r.Keys.Rotation("payments").RetiresAt
	r.compromise(t, "payments", 2) // archived, on the stolen HSM
	if at, err := r.follows(t, pin); err != nil || at.Version != recovered {
		t.Errorf("a peer that comes later is stuck at version %d, %v", at.Version, err)
	}
	if now := r.Keys.Rotation("payments").RetiresAt; now != retires {
		t.Errorf("peers are told that version 1 ends at %d, and it ends at %d", now, retires)
	}
}

// TestStolenRecoverySuccessor: the device in the safe was stolen. The recovery successor is
// replaced, then marked, and the line goes on.
func TestStolenRecoverySuccessor(t *testing.T) {
	r := newRig(t, withTokens("safe", "bank"))
	r.makeRecovery(t, "safe")
	r.makeRecovery(t, "bank")
	r.compromise(t, "payments", recovered)
	pin := r.pinned(t, 1)
	r.rotate(t, "payments", time.Now())
	if _, news := r.Keys.News(); len(news) == 0 {
		t.Error("peers are not told of the rotation")
	}
	if r.Keys.Rotation("payments") == nil {
		t.Error("there is no rotation to show")
	}
	r.lose(2, 3)
	r.recover(t)
	if at, err := r.follows(t, pin); err != nil || at.Version != 2*recovered {
		t.Errorf("a peer is stuck at version %d, %v", at.Version, err)
	}
}

// TestStolenSuccessorIsNoSuccessor: as before, and the active version is compromised while its
// token does not answer for a moment.
func TestStolenSuccessorIsNoSuccessor(t *testing.T) {
	r := newRig(t, withTokens("safe", "bank"))
	r.makeRecovery(t, "safe")
	r.makeRecovery(t, "bank")
	r.compromise(t, "payments", recovered)
	r.store.BeforeSign = func(keystore.Ref, []byte) error { return keystore.ErrUnavailable }
	r.compromise(t, "payments", 1)
	r.store.BeforeSign = nil // the token answers again
	r.Keys.RetryNow()
	r.keep(t, "payments")
	if k, err := r.Keys.Active("payments"); err != nil || k.Version != 2 {
		t.Errorf("%v, %s; causes %v", err, r.states(t, "payments"), r.Keys.Causes())
	}
}

// TestLostAnnouncementIsVoid: a peer acknowledges the announcement of before the loss, after the
// recovery.
func TestLostAnnouncementIsVoid(t *testing.T) {
	r := newRig(t, withTokens("safe"))
	r.set(t, "payments", func(s *keyring.Settings) { s.Acknowledge = []string{"shop"} })
	r.makeRecovery(t, "safe")
	r.rotate(t, "payments", time.Now().Add(time.Hour))
	r.lose(1, 2, 3)
	r.recover(t)
	if err := r.ack(t, r.shop, "payments", 2); err == nil {
		t.Error("the acknowledgement of a version that will never be active counts")
	}
	r.keep(t, "payments")
	r.wantStates(t, "payments", "verify-only archived archived active pending")
}

// TestRecoveryOfWhatGoesOn: the token of a compromised version answers, and so does its successor.
func TestRecoveryOfWhatGoesOn(t *testing.T) {
	r := newRig(t, withTokens("safe"))
	r.makeRecovery(t, "safe")
	r.store.BeforeSign = func(keystore.Ref, []byte) error { return keystore.ErrUnavailable }
	r.compromise(t, "payments", 1)
	r.store.BeforeSign = nil
	refused(t, manage.ErrConflict, r.Keys.RecoverLine(t.Context(), approved, "payments", "its token answers"))
	r.wantStates(t, "payments", "compromised pending pending pending")
}

// TestCausesAfterARecovery: the lost versions are no cause any more.
func TestCausesAfterARecovery(t *testing.T) {
	r := newRig(t, withTokens("safe"))
	r.makeRecovery(t, "safe")
	r.lose(1, 2)
	r.reopen(t)
	r.recover(t)
	r.keep(t, "payments")
	for _, c := range r.Keys.Causes() {
		t.Errorf("%s %s: %s", c.Kind.Code, c.Subject, c.Text)
	}
}

// TestReplacedSuccessorIsNone: a replaced recovery successor is not marked as one.
func TestReplacedSuccessorIsNone(t *testing.T) {
	r := newRig(t, withTokens("safe", "bank"))
	r.makeRecovery(t, "safe")
	r.makeRecovery(t, "bank")
	r.destroy(t, "payments", recovered)
	for _, version := range []uint32{recovered, recovered + 1} {
		if k := r.Keys.Version("payments", version); k.Recovery {
			t.Errorf("version %d is %s, and marked as recovery successor", version, k.State)
		}
	}
}

// dying is a token that breaks at its second key.
type dying struct {
	keystore.Store
	dead bool
	n    int
}

func (d *dying) Generate(
	ctx context.Context, ref keystore.Ref, a keystore.Algorithm, tag keystore.Tag,
) (keystore.Key, error) {
	if d.n++; d.n > 1 {
		d.dead = true
	}
	if d.dead {
		return nil, keystore.ErrUnavailable
	}
	return d.Store.Generate(ctx, ref, a, tag)
}

func (d *dying) Destroy(ctx context.Context, ref keystore.Ref, tag keystore.Tag) error {
	if d.dead {
		return keystore.ErrUnavailable
	}
	return d.Store.Destroy(ctx, ref, tag)
}

// TestSafeguardAfterAFailure: the second HSM breaks while it makes the recovery successor. Another
// one takes its place.
func TestSafeguardAfterAFailure(t *testing.T) {
	r := newRig(t, withTokens("safe", "bank"), func(r *rig) { r.more["safe"] = &dying{Store: r.more["safe"]} })
	if err := r.Keys.MakeRecovery(t.Context(), approved, "payments", "safe"); err == nil {
		t.Fatal("made")
	}
	if err := r.Keys.MakeRecovery(t.Context(), approved, "payments", "bank"); err != nil {
		t.Error(err)
	}
	delete(r.more, "safe")
	r.reopen(t)
	if err := r.Keys.MakeRecovery(t.Context(), approved, "payments", "bank"); err != nil {
		t.Error("without the token in the configuration: ", err)
	}
}

// TestSafeguardAtAGate: nothing is made on a token while the gate is blocked.
func TestSafeguardAtAGate(t *testing.T) {
	r := newRig(t, withTokens("safe"))
	r.Keys.Gate.Block(gate.Rollback, errors.New("rolled back"))
	err := r.Keys.MakeRecovery(t.Context(), approved, "payments", "safe")
	keys, _ := r.more["safe"].(interface {
		Keys(context.Context) ([]keystore.Ref, error)
	}).Keys(t.Context())
	if err == nil || len(keys) > 0 {
		t.Errorf("%v; the token has %v", err, keys)
	}
}
