package keyring_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"countersign/audit"
	"countersign/internal/cause"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/manage"
	"countersign/wire"
)

// ackChange acknowledges a change of an announcement.
func (r *rig) ackChange(t *testing.T, key string, version, change uint32) error {
	ack := &wire.Ack{ID: "1", Op: wire.OpAck, Key: key, Version: version, Change: change}
	_, err := r.Acknowledge(t.Context(), r.shop, ack)
	return err
}

// told expects the newest news of a key: a version, its change, and the version called off.
func (r *rig) told(t *testing.T, key string, version, change, cancelled uint32) *wire.Rotation {
	t.Helper()
	d := r.Keys.Rotation(key)
	if d == nil || d.Version != version || d.Change != change || d.Cancelled != cancelled {
		t.Fatalf("peers are told of %s %+v, want version %d, change %d, cancelled %d",
			key, d, version, change, cancelled)
	}
	return d
}

// last returns the last event of a type.
func (r *rig) last(t *testing.T, of audit.Type) (last audit.Event) {
	t.Helper()
	for _, e := range r.log(t, 0) {
		if e.Type == of {
			last = e
		}
	}
	return last
}

// lineKeys are the kinds of keys that rotate: with steps, the listener's, and without both.
func lineKeys(t *testing.T, r *rig) []string {
	t.Helper()
	r.createOwn(t, keyring.NoiseName)
	r.Keys.Identity = "payments"
	tls := keyring.NewKey{Name: "tls", Algorithm: keystore.P256}
	if _, err := r.Keys.Create(t.Context(), operator, tls); err != nil {
		t.Fatal(err)
	}
	return []string{"payments", keyring.NoiseName, "tls"}
}

// TestAnnouncementIsMoved: a second rotation replaces the time of the first. The versions stay, the
// earlier time passes without effect, and all peers must acknowledge the later one.
func TestAnnouncementIsMoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		for _, name := range lineKeys(t, r) {
			k := r.rotate(t, name, time.Now().Add(time.Hour))
			states, public := r.states(t, name), string(k.Info().PublicKey)
			if k.Public() {
				if err := r.ack(t, r.shop, name, 2); err != nil {
					t.Fatal(err)
				}
			}
			later := time.Now().Add(2 * time.Hour)
			if k = r.rotate(t, name, later); string(k.Info().PublicKey) != public || r.states(t, name) != states {
				t.Errorf("%s: another version, or %q", name, r.states(t, name))
			}
			if e := r.last(t, audit.RotationAnnounced); e.Metadata["instead_of"] == "" || e.Actor != operator {
				t.Errorf("%s: the event is %+v", name, e)
			}
			if k.Public() {
				r.waitsFor(t, name, 2, "cafe", "shop")
				if d := r.told(t, name, 2, 1, 0); d.ActivatesAt != later.Unix() {
					t.Errorf("%s: peers are told %+v", name, d)
				}
				refused(t, keyring.ErrUnknown, r.ackChange(t, name, 2, 0)) // of what is no longer true
				if err := r.ackChange(t, name, 2, 1); err != nil {
					t.Error(err)
				}
				r.waitsFor(t, name, 2, "cafe")
			}
			r.reopen(t)
			time.Sleep(time.Hour)
			r.keep(t, name)
			if got := r.states(t, name); got != states {
				t.Errorf("%s at the first time: %q", name, got)
			}
			if name == "payments" {
				r.checkKey(t, name)
			}
			if k = r.rotate(t, name, time.Now()); k.State != keyring.Active || string(k.Info().PublicKey) != public {
				t.Errorf("%s, hastened: version %d is %s", name, k.Version, k.State)
			}
		}
	})
}

// TestCallOff: a rotation that is called off does not happen. The next version stays the committed
// successor, and a later rotation leads to it. All peers are told, also those that have not
// acknowledged the announcement.
func TestCallOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		for _, name := range lineKeys(t, r) {
			refused(t, manage.ErrConflict, r.Keys.Cancel(t.Context(), operator, name))
			k := r.rotate(t, name, time.Now().Add(time.Hour))
			states, public := r.states(t, name), string(k.Info().PublicKey)
			step := k.Succession
			if k.Public() {
				if err := r.ack(t, r.shop, name, 2); err != nil {
					t.Fatal(err)
				}
			}
			if err := r.Keys.Cancel(t.Context(), operator, name); err != nil {
				t.Fatal(err)
			}
			if e := r.last(t, audit.RotationCancelled); e.Actor != operator || e.Metadata["version"] != "2" {
				t.Errorf("%s: the event is %+v", name, e)
			}
			refused(t, manage.ErrConflict, r.Keys.Cancel(t.Context(), operator, name))
			r.reopen(t)
			r.Keys.Identity = "payments"
			if k.Public() {
				r.told(t, name, 1, 1, 2)
				r.waitsFor(t, name, 1, "cafe", "shop")
				refused(t, keyring.ErrUnknown, r.ackChange(t, name, 2, 0))
				if err := r.ackChange(t, name, 1, 1); err != nil {
					t.Error(err)
				}
				r.waitsFor(t, name, 1, "cafe")
			}
			time.Sleep(2 * time.Hour)
			r.keep(t, name)
			if got := r.states(t, name); got != states {
				t.Errorf("%s after the announced time: %q", name, got)
			}
			if name == "payments" {
				r.checkKey(t, name)
				steps, err := r.Keys.Steps(&wire.Line{Key: name, From: 1})
				if err != nil || len(steps.Steps) != 0 {
					t.Errorf("the steps are %+v, %v", steps, err)
				}
			}
			if k = r.rotate(t, name, time.Now()); string(k.Info().PublicKey) != public || k.State != keyring.Active {
				t.Errorf("%s, announced again: version %d is %s", name, k.Version, k.State)
			}
			if name == "payments" {
				r.checkKey(t, name)
				// The step that was given out before leads to the same version and successor.
				before := *k
				before.Succession = step
				r.checkStep(t, r.Keys.Version(name, 1), &before)
			}
			if k.Public() {
				r.told(t, name, 2, 1, 0)
				r.waitsFor(t, name, 2, "cafe", "shop")
			}
		}
	})
}

// TestCallOffIsRefused: the successor of a compromised version must come.
func TestCallOffIsRefused(t *testing.T) {
	r := newRig(t)
	r.rotate(t, "payments", time.Now().Add(time.Hour))
	r.store.BeforeSign = func(keystore.Ref, []byte) error { return keystore.ErrUnavailable }
	r.compromise(t, "payments", 1)
	r.wantStates(t, "payments", "compromised pending pending")
	refused(t, manage.ErrConflict, r.Keys.Cancel(t.Context(), operator, "payments"))
	refused(t, manage.ErrNotFound, r.Keys.Cancel(t.Context(), operator, "nothing"))
}

// TestCallOffASchedule: the schedule counts from the time when its rotation was called off.
func TestCallOffASchedule(t *testing.T) {
	const day = 24 * time.Hour
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.set(t, "payments", func(s *keyring.Settings) { s.Plan.Every, s.Plan.Uses, s.Announce = 10*day, 3, day })
		for n := range byte(3) {
			r.sign(t, r.shop, message(n+1, "m"))
		}
		cancel := func() {
			t.Helper()
			r.keep(t, "payments")
			r.wantStates(t, "payments", "active pending pending")
			if err := r.Keys.Cancel(t.Context(), operator, "payments"); err != nil {
				t.Fatal(err)
			}
			r.reopen(t)
			r.keep(t, "payments")
			if k := r.Keys.Version("payments", 2); k.Announced() {
				t.Fatal("the schedule has announced it again at once")
			}
		}
		r.keep(t, "payments") // because of the uses
		cancel()
		time.Sleep(10 * day) // because of the age
		cancel()
		if at, why := r.Keys.NextRotation("payments"); why != "age" || time.Until(at).Round(time.Minute) != 10*day {
			t.Errorf("the next rotation is at %v because of %q", at, why)
		}
		time.Sleep(10 * day)
		r.keep(t, "payments")
		if _, why := r.Keys.NextRotation("payments"); why != "announced" {
			t.Error("the schedule has ended")
		}
	})
}

// TestLateAcknowledgement: an acknowledgement on its way when its announcement is moved, hastened
// by a compromise or called off does not count, whichever the ledger writes first.
func TestLateAcknowledgement(t *testing.T) {
	for name, change := range map[string]func(*testing.T, *rig) error{
		"moved": func(t *testing.T, r *rig) error {
			r.rotate(t, "payments", time.Now().Add(2*time.Hour))
			return nil
		},
		"called off": func(t *testing.T, r *rig) error { return r.Keys.Cancel(t.Context(), operator, "payments") },
		"compromised": func(t *testing.T, r *rig) error {
			r.compromise(t, "payments", 1)
			return nil
		},
		"grace changed": func(t *testing.T, r *rig) error {
			r.set(t, "payments", func(s *keyring.Settings) { s.Grace = time.Hour })
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				r.rotate(t, "payments", time.Now().Add(time.Hour))
				release := r.occupy(t)
				changed, acked := make(chan error, 1), make(chan error, 1)
				go func() { changed <- change(t, r) }()
				synctest.Wait()
				go func() { acked <- r.ackChange(t, "payments", 2, 0) }()
				synctest.Wait()
				release()
				if err := <-changed; err != nil {
					t.Fatal(err)
				}
				<-acked // before the change or refused, in any case for nothing
				d := r.Keys.Rotation("payments")
				r.waitsFor(t, "payments", d.Version, "cafe", "shop")
				if d.Change != 1 {
					t.Errorf("peers are told %+v", d)
				}
			})
		})
	}
}

// away takes the token away, until the result is called.
func (r *rig) away() (back func()) {
	r.store.BeforeSign = func(keystore.Ref, []byte) error { return keystore.ErrUnavailable }
	return func() { r.store.BeforeSign = nil }
}

// TestRequestIsKept: what was asked outlives failures and a restart. The try that succeeds does
// what was asked, at its time, and in the name of the operator.
func TestRequestIsKept(t *testing.T) {
	for name, c := range map[string]struct{ in, away, active time.Duration }{
		"in an hour": {time.Hour, time.Minute, time.Hour},
		"at once":    {0, time.Minute, time.Minute}, // although the settings say a day
		"too late":   {time.Minute, 2 * time.Minute, 2 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				r.set(t, "payments", func(s *keyring.Settings) { s.Announce = 24 * time.Hour })
				begin, back := time.Now(), r.away()
				_, err := r.Keys.Rotate(t.Context(), operator, "payments", begin.Add(c.in))
				if err == nil || !strings.Contains(err.Error(), "tried again until") {
					t.Fatal(err)
				}
				if e := r.last(t, audit.RotationRequested); e.Actor != operator {
					t.Errorf("the request is %+v", e)
				}
				r.reopen(t)
				r.keep(t, "payments")
				r.wantStates(t, "payments", "active pending")
				q, ok := r.Keys.Requested("payments")
				if !ok || q.By != operator || q.Activates.Unix() != begin.Add(c.in).Unix() {
					t.Errorf("the request is %+v", q)
				}
				time.Sleep(c.away)
				back()
				r.keep(t, "payments")
				if k := r.Keys.Version("payments", 2); k.Activates.Unix() != begin.Add(c.active).Unix() {
					t.Errorf("version 2 activates at %v after the request, want %v", k.Activates.Sub(begin), c.active)
				}
				time.Sleep(time.Until(begin.Add(c.active)))
				r.keep(t, "payments")
				r.wantStates(t, "payments", "verify-only active pending")
				for _, of := range []audit.Type{audit.RotationAnnounced, audit.KeyRotated, audit.KeyRotationFailed} {
					if e := r.last(t, of); e.Actor != operator {
						t.Errorf("%s is of %v", of, e.Actor)
					}
				}
				if _, ok := r.Keys.Requested("payments"); ok {
					t.Error("the request is still there")
				}
				r.checkKey(t, "payments")
			})
		})
	}
}

// TestRequestIsGivenUp: after the time for which a request makes sense, nothing is done. An event
// and a cause say so, and the cause stays until an operator asks again or calls the request off.
func TestRequestIsGivenUp(t *testing.T) {
	for name, end := range map[string]func(*testing.T, *rig){
		"asked again": func(t *testing.T, r *rig) {
			r.rotate(t, "payments", time.Now())
			r.wantStates(t, "payments", "verify-only active pending")
		},
		"called off": func(t *testing.T, r *rig) {
			if err := r.Keys.Cancel(t.Context(), operator, "payments"); err != nil {
				t.Fatal(err)
			}
			r.wantStates(t, "payments", "active pending")
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				back := r.away()
				at := time.Now().Add(time.Hour)
				_, err := r.Keys.RotateWithin(t.Context(), operator, "payments", at, 10*time.Minute)
				refused(t, keystore.ErrUnavailable, err)
				r.hasCause(t, cause.Rotation, "payments", "")
				for range 70 * 60 / 10 {
					time.Sleep(10 * time.Second)
					r.keep(t, "payments")
				}
				back()
				if e := r.last(t, audit.KeyRotationFailed); e.Outcome != "given_up" || e.Actor != operator ||
					!strings.Contains(e.Metadata["cause"], "does not answer") {
					t.Errorf("the event is %+v", e)
				}
				r.reopen(t)
				time.Sleep(time.Hour)
				r.keep(t, "payments")
				r.wantStates(t, "payments", "active pending")
				r.hasCause(t, cause.RotationGivenUp, "payments", "test has asked")
				if causes := r.Keys.Causes(); len(causes) != 1 {
					t.Errorf("the causes are %v", causes)
				}
				if end(t, r); len(r.Keys.Causes()) > 0 {
					t.Errorf("the causes are %v", r.Keys.Causes())
				}
			})
		})
	}
}

// TestRequestComesFirst: while a request to move an announcement is open, the earlier time passes
// without effect.
func TestRequestComesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.rotate(t, "payments", time.Now().Add(time.Minute))
		back := r.away()
		later := time.Now().Add(time.Hour)
		_, err := r.Keys.Rotate(t.Context(), operator, "payments", later)
		refused(t, keystore.ErrUnavailable, err)
		time.Sleep(2 * time.Minute)
		back()
		r.keep(t, "payments")
		r.wantStates(t, "payments", "active pending pending")
		if d := r.told(t, "payments", 2, 1, 0); d.ActivatesAt != later.Unix() {
			t.Errorf("peers are told %+v", d)
		}
	})
}

// TestCompromiseEndsARequest: the successor of a compromised version becomes active at once,
// whatever was asked before, and the log says so.
func TestCompromiseEndsARequest(t *testing.T) {
	r := newRig(t)
	back := r.away()
	_, err := r.Keys.Rotate(t.Context(), operator, "payments", time.Now().Add(time.Hour))
	refused(t, keystore.ErrUnavailable, err)
	back()
	r.compromise(t, "payments", 1)
	r.wantStates(t, "payments", "compromised active pending")
	if _, ok := r.Keys.Requested("payments"); ok {
		t.Error("the request is still open")
	}
	if e := r.last(t, audit.KeyRotationFailed); e.Outcome != "given_up" {
		t.Errorf("the event is %+v", e)
	}
}

// TestGivenUpBesideAnAnnouncement: after a request to hasten an announcement was given up, the
// announced time counts. A failure then is tried again with a backoff, and the rotation ends all
// causes.
func TestGivenUpBesideAnAnnouncement(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.rotate(t, "payments", time.Now().Add(time.Hour))
		back := r.away()
		_, err := r.Keys.RotateWithin(t.Context(), operator, "payments", time.Now(), time.Minute)
		refused(t, keystore.ErrUnavailable, err)
		time.Sleep(time.Minute)
		r.keep(t, "payments")
		r.hasCause(t, cause.RotationGivenUp, "payments", "test has asked")
		time.Sleep(time.Hour)
		r.keep(t, "payments")
		r.hasCause(t, cause.Rotation, "payments", "")
		back()
		r.keep(t, "payments") // not at once again
		r.wantStates(t, "payments", "active pending pending")
		time.Sleep(time.Minute)
		r.keep(t, "payments")
		r.wantStates(t, "payments", "verify-only active pending")
		if causes := r.Keys.Causes(); len(causes) > 0 {
			t.Errorf("the causes are %v", causes)
		}
	})
}

// TestNoRotationToACompromisedVersion: peers are led to no compromised version, and hear of its
// successor when the device has made the next step.
func TestNoRotationToACompromisedVersion(t *testing.T) {
	for name, c := range map[string]struct {
		before  func(*testing.T, *rig)
		version uint32
		change  uint32
	}{
		"a newer version": {func(t *testing.T, r *rig) { r.rotate(t, "payments", time.Now()) }, 2, 0},
		"called off": {func(t *testing.T, r *rig) {
			r.rotate(t, "payments", time.Now().Add(time.Hour))
			if err := r.Keys.Cancel(t.Context(), operator, "payments"); err != nil {
				t.Fatal(err)
			}
		}, 1, 1},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			c.before(t, r)
			back := r.away()
			r.compromise(t, "payments", c.version)
			for range 2 {
				if d := r.Keys.Rotation("payments"); d != nil || len(r.Keys.Announcements()) > 0 {
					t.Errorf("peers are told %+v, %v", d, r.Keys.Announcements())
				}
				r.isNews(t, "payments", c.version)
				r.reopen(t)
			}
			back()
			r.keep(t, "payments")
			r.told(t, "payments", c.version+1, c.change, 0)
		})
	}
}

// TestRequestThatMakesNoSense is refused before anything is written.
func TestRequestThatMakesNoSense(t *testing.T) {
	r := newRig(t)
	for _, within := range []time.Duration{-1, 0, 31 * 24 * time.Hour} {
		_, err := r.Keys.RotateWithin(t.Context(), operator, "payments", time.Now(), within)
		refused(t, manage.ErrInvalid, err)
	}
	if n := r.count(t, audit.RotationRequested); n > 0 {
		t.Errorf("%d requests are written", n)
	}
}

// TestCalledOffNoiseKey: a Noise key whose announcement was called off still answers handshakes.
// The identity authorizes the active key anew, so that peers can believe the news; where the token
// is away, later.
func TestCalledOffNoiseKey(t *testing.T) {
	for _, isAway := range []bool{false, true} {
		r := newRig(t)
		lineKeys(t, r)
		r.keep(t, keyring.NoiseName) // authorizes version 1
		r.rotate(t, keyring.NoiseName, time.Now().Add(time.Hour))
		announced := r.told(t, keyring.NoiseName, 2, 0, 0).Authorization
		back := func() {}
		if isAway {
			back = r.away()
		}
		if err := r.Keys.Cancel(t.Context(), operator, keyring.NoiseName); err != nil {
			t.Fatal(err)
		}
		back()
		r.keep(t, keyring.NoiseName)
		d := r.told(t, keyring.NoiseName, 1, 1, 2)
		if keyring.Generation(d.Authorization) <= keyring.Generation(announced) {
			t.Errorf("token away %v: the authorization of the active key is older", isAway)
		}
		var answer []uint32
		for _, k := range r.Keys.Answering() {
			answer = append(answer, k.Version)
		}
		if !slices.Equal(answer, []uint32{1, 2}) {
			t.Errorf("the versions %v answer", answer)
		}
		before := r.count(t, audit.NoiseKeyAuthorized)
		r.keep(t, keyring.NoiseName)
		if n := r.count(t, audit.NoiseKeyAuthorized); n != before {
			t.Error("it is authorized again and again")
		}
	}
}

// TestRemovedPeerLeavesAcknowledge: the settings do not name a removed peer, from the removal on. A
// later peer of the same name is not waited for, unless an operator says so.
func TestRemovedPeerLeavesAcknowledge(t *testing.T) {
	r := newRig(t)
	r.set(t, "payments", func(s *keyring.Settings) { s.Acknowledge = []string{"shop", "cafe", keyring.AllPeers} })
	if err := r.Peers.Suspend(t.Context(), operator, "cafe"); err != nil {
		t.Fatal(err)
	}
	if err := r.Peers.Remove(t.Context(), operator, "shop"); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Peers.Add(t.Context(), approved, "shop", r.shop.PublicKey[:]); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		r.reopen(t)
		r.keep(t, "payments")
		if s, err := r.Keys.Settings("payments"); !slices.Equal(s.Acknowledge, []string{"cafe", keyring.AllPeers}) {
			t.Errorf("acknowledge is %v, %v", s.Acknowledge, err)
		}
	}
	if e := r.last(t, audit.LineChanged); e.Actor != operator || r.count(t, audit.LineChanged) != 2 {
		t.Errorf("the event is %+v", e)
	}
}

// TestRemovalBesideSet: a change of other settings that waits for the disk behind the removal of a
// peer, does not put the peer's name back.
func TestRemovalBesideSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.set(t, "payments", func(s *keyring.Settings) { s.Acknowledge = []string{"shop", "cafe"} })
		release := r.occupy(t)
		removed, set := make(chan error, 1), make(chan error, 1)
		go func() { removed <- r.Peers.Remove(t.Context(), operator, "shop") }()
		synctest.Wait()
		go func() {
			later := func(s *keyring.Settings) error { s.Announce = time.Hour; return nil }
			_, err := r.Keys.Set(t.Context(), operator, "payments", later)
			set <- err
		}()
		synctest.Wait()
		release()
		if err := errors.Join(<-removed, <-set); err != nil {
			t.Fatal(err)
		}
		s, err := r.Keys.Settings("payments")
		if err != nil || !slices.Equal(s.Acknowledge, []string{"cafe"}) || s.Announce != time.Hour {
			t.Errorf("the settings are %+v, %v", s, err)
		}
	})
}
