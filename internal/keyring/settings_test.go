package keyring_test

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"countersign/audit"
	"countersign/internal/keyring"
	"countersign/internal/ledger"
	"countersign/internal/ledger/disktest"
	"countersign/internal/manage"
)

// TestSettings: settings are refused with their reason, and memory and disk both have the others.
func TestSettings(t *testing.T) {
	r := newRig(t)
	many := make([]string, 100)
	for i := range many {
		many[i] = fmt.Sprintf("peer-%d-%s", i, strings.Repeat("x", 20))
	}
	set := func(name string, change func(*keyring.Settings)) error {
		_, err := r.Keys.Set(t.Context(), operator, name, func(s *keyring.Settings) error { change(s); return nil })
		return err
	}
	for name, change := range map[string]func(*keyring.Settings){
		"half a second of presence":     func(s *keyring.Settings) { s.Presence = time.Second / 2 },
		"half a second of announcement": func(s *keyring.Settings) { s.Announce = time.Second / 2 },
		"half a second of grace":        func(s *keyring.Settings) { s.Grace = time.Second / 2 },
		"half a second of age":          func(s *keyring.Settings) { s.Plan.Every = time.Hour + time.Second/2 },
		"a peer that there is not":      func(s *keyring.Settings) { s.Acknowledge = []string{"shpo"} },
		"no name":                       func(s *keyring.Settings) { s.Acknowledge = []string{"Shop"} },
		"too many for the event":        func(s *keyring.Settings) { s.Acknowledge = many },
		"more than 100":                 func(s *keyring.Settings) { s.Acknowledge = make([]string, 101) },
		"long announcement":             func(s *keyring.Settings) { s.Announce = 31 * 24 * time.Hour },
		"negative announcement":         func(s *keyring.Settings) { s.Announce = -time.Second },
		"long grace":                    func(s *keyring.Settings) { s.Grace = 11 * 366 * 24 * time.Hour },
		"negative grace":                func(s *keyring.Settings) { s.Grace = -time.Second },
		"long presence":                 func(s *keyring.Settings) { s.Presence = 25 * time.Hour },
		"negative presence":             func(s *keyring.Settings) { s.Presence = -time.Second },
		"a plan that is none":           func(s *keyring.Settings) { s.Plan.Every = time.Minute },
	} {
		if err := set("payments", change); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	no := func(*keyring.Settings) error { return errors.New("no") }
	_, err := r.Keys.Set(t.Context(), operator, "payments", no)
	refused(t, manage.ErrInvalid, err)
	_, err = r.Keys.Set(t.Context(), operator, "nothing", nil)
	refused(t, manage.ErrNotFound, err)
	r.createOwn(t, keyring.NoiseName, keyring.LogName)
	refused(t, manage.ErrInvalid, set(keyring.NoiseName, func(s *keyring.Settings) { s.Presence = time.Minute }))
	refused(t, manage.ErrInvalid, set(keyring.LogName, func(s *keyring.Settings) { s.Plan.Uses = 5 }))
	r.set(t, keyring.NoiseName, func(s *keyring.Settings) { s.Plan.Uses = 5 })
	r.set(t, "payments", func(s *keyring.Settings) {
		s.Plan.Every, s.Plan.Window, s.Plan.Uses = 48*time.Hour, "0 3 * * *", 9
		s.Announce, s.Grace, s.Presence = time.Hour, 2*time.Hour, time.Minute
		s.Acknowledge = []string{"shop", keyring.AllPeers}
	})
	want, err := r.Keys.Settings("payments")
	if err != nil {
		t.Fatal(err)
	}
	r.set(t, "payments", func(s *keyring.Settings) { s.Acknowledge[0] = "cafe" }) // of a copy
	if want.Acknowledge[0] != "shop" {
		t.Error("a change reaches into the settings before")
	}
	r.set(t, "payments", func(s *keyring.Settings) { s.Acknowledge[0] = "shop" })
	r.reopen(t)
	if got, _ := r.Keys.Settings("payments"); fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
		t.Errorf("after a restart %+v, want %+v", got, want)
	}
	if err := r.Peers.Remove(t.Context(), operator, "shop"); err != nil {
		t.Fatal(err)
	}
	r.set(t, "payments", func(s *keyring.Settings) { s.Grace = time.Hour }) // though one of its names is gone
	var settings string
	for _, e := range r.log(t, 1) {
		if e.Type == audit.LineChanged {
			settings = e.Metadata["settings"]
		}
	}
	if now, err := r.Keys.Settings("payments"); err != nil || settings != string(now.Encoded()) {
		t.Errorf("the event says %s, %v", settings, err)
	}
}

// TestPresence: without a confirmation nothing is signed. A confirmation ends by itself, and when
// credentials change.
func TestPresence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		n := byte(0)
		signs := func(reason error) {
			t.Helper()
			n++
			if _, err := r.Sign(t.Context(), r.shop, message(n, "m")); !errors.Is(err, reason) {
				t.Errorf("%v, want %v", err, reason)
			}
		}
		presence := func(who audit.Actor, d time.Duration) error {
			set := func(s *keyring.Settings) error { s.Presence = d; return nil }
			_, err := r.Keys.Set(t.Context(), who, "payments", set)
			return err
		}
		_, err := r.Keys.Confirm(t.Context(), operator, "payments")
		refused(t, manage.ErrConflict, err) // the key needs none
		if err := presence(operator, 300*time.Second); err != nil {
			t.Fatal(err)
		}
		signs(keyring.ErrNotConfirmed)
		confirm := func() {
			if _, err := r.Keys.Confirm(t.Context(), operator, "payments"); err != nil {
				t.Fatal(err)
			}
		}
		confirm()
		signs(nil)
		time.Sleep(300*time.Second - time.Nanosecond)
		signs(nil)
		time.Sleep(time.Nanosecond)
		signs(keyring.ErrNotConfirmed)
		confirm()
		signs(nil)
		r.Keys.CredentialsChanged()
		signs(keyring.ErrNotConfirmed)
		confirm()
		r.reopen(t)
		signs(keyring.ErrNotConfirmed)
		for _, weak := range []time.Duration{0, time.Hour} {
			refused(t, manage.ErrNotApproved, presence(operator, weak))
		}
		if err := presence(approved, 0); err != nil {
			t.Fatal(err)
		}
		signs(nil)
	})
}

// TestPresenceIsNotKept: a confirmation is for the time of presence, the credentials and the
// process of its moment.
func TestPresenceIsNotKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		confirm := func() error { _, err := r.Keys.Confirm(t.Context(), operator, "payments"); return err }
		refused(t, manage.ErrConflict, confirm())
		_, err := r.Keys.Confirm(t.Context(), operator, "nothing")
		refused(t, manage.ErrNotFound, err)
		r.set(t, "payments", func(s *keyring.Settings) { s.Presence = time.Hour })
		if err := confirm(); err != nil {
			t.Fatal(err)
		}
		if until := r.Keys.Confirmed("payments"); !until.Equal(time.Now().Add(time.Hour)) {
			t.Errorf("until %v", until)
		}
		r.set(t, "payments", func(s *keyring.Settings) { s.Grace = time.Hour })
		r.sign(t, r.shop, message(1, "m")) // another setting takes nothing back
		r.set(t, "payments", func(s *keyring.Settings) { s.Presence = time.Minute })
		_, err = r.Sign(t.Context(), r.shop, message(2, "m"))
		refused(t, keyring.ErrNotConfirmed, err)

		// Credentials change while a confirmation waits for the ledger's writer.
		release := r.occupy(t)
		done := make(chan error)
		go func() { done <- confirm() }()
		synctest.Wait()
		r.Keys.CredentialsChanged()
		release()
		refused(t, manage.ErrConflict, <-done)
		_, err = r.Sign(t.Context(), r.shop, message(3, "m"))
		refused(t, keyring.ErrNotConfirmed, err)
		if n := r.count(t, audit.PresenceConfirmed); n != 1 {
			t.Errorf("%d confirmations are in the log", n)
		}
	})
}

// occupy keeps the ledger's writer busy until release is called.
func (r *rig) occupy(t *testing.T) (release func()) {
	hold, held := make(chan struct{}), make(chan struct{})
	go r.ledger.Update(t.Context(), func(*ledger.Tx) error { close(held); <-hold; return nil })
	<-held
	return func() { close(hold) }
}

// TestCredentialsChangeInTheCommit: a confirmation that is on its way to the disk then does not
// count.
func TestCredentialsChangeInTheCommit(t *testing.T) {
	disk := disktest.New(t)
	r := newRigAt(t, filepath.Join(disk.Dir(), "ledger.db"))
	r.set(t, "payments", func(s *keyring.Settings) { s.Presence = time.Hour })
	disk.Fail(func(op disktest.Op) syscall.Errno {
		if op.Kind == disktest.Datasync {
			r.Keys.CredentialsChanged()
		}
		return 0
	})
	_, err := r.Keys.Confirm(t.Context(), operator, "payments")
	disk.Fail(nil)
	if !errors.Is(err, manage.ErrConflict) || !r.Keys.Confirmed("payments").IsZero() {
		t.Errorf("%v, confirmed until %v", err, r.Keys.Confirmed("payments"))
	}
}

// TestWeakerSettingsNeedApproval: settings that shorten the time for which a version before is
// accepted, or let the key sign on fewer confirmations, need an approved proposal.
func TestWeakerSettingsNeedApproval(t *testing.T) {
	type settings = keyring.Settings
	second := time.Second
	for name, c := range map[string]struct {
		before, now func(r *rig, s *settings)
		weaker      string // "": no approval is needed
	}{
		"a shorter grace": {
			func(_ *rig, s *settings) { s.Grace = time.Hour }, func(_ *rig, s *settings) { s.Grace = second }, "grace",
		},
		"less than documents live": {
			func(*rig, *settings) {}, func(r *rig, s *settings) { s.Grace = r.limits.MaxLifetime - second }, "grace",
		},
		"the default in place of more": {
			func(r *rig, s *settings) { s.Grace = 2 * r.limits.MaxLifetime }, func(_ *rig, s *settings) { s.Grace = 0 },
			"grace",
		},
		"as long as documents live": {
			func(*rig, *settings) {}, func(r *rig, s *settings) { s.Grace = r.limits.MaxLifetime }, "",
		},
		"a longer grace": {
			func(_ *rig, s *settings) { s.Grace = second }, func(_ *rig, s *settings) { s.Grace = time.Hour }, "",
		},
		"acknowledgements archive": {
			func(*rig, *settings) {},
			func(_ *rig, s *settings) { s.Acknowledge = []string{keyring.AllPeers} }, "acknowledge",
		},
		"one peer in place of all": {
			func(_ *rig, s *settings) { s.Acknowledge = []string{keyring.AllPeers} },
			func(_ *rig, s *settings) { s.Acknowledge = []string{"shop"} }, "acknowledge",
		},
		"all in place of one": {
			func(_ *rig, s *settings) { s.Acknowledge = []string{"shop"} },
			func(_ *rig, s *settings) { s.Acknowledge = []string{keyring.AllPeers} }, "",
		},
		"acknowledgements archive no more": {
			func(_ *rig, s *settings) { s.Acknowledge = []string{"shop"} },
			func(_ *rig, s *settings) { s.Acknowledge = nil }, "",
		},
		"all of them": {
			func(_ *rig, s *settings) { s.Presence = time.Minute },
			func(_ *rig, s *settings) { s.Grace, s.Acknowledge, s.Presence = second, []string{"shop"}, time.Hour },
			"grace,acknowledge,presence",
		},
		"another setting": {
			func(_ *rig, s *settings) { s.Grace, s.Presence = second, time.Minute },
			func(_ *rig, s *settings) { s.Announce = time.Hour }, "",
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			set := func(who audit.Actor, change func(*rig, *settings)) error {
				_, err := r.Keys.Set(t.Context(), who, "payments", func(s *settings) error { change(r, s); return nil })
				return err
			}
			if err := set(approved, c.before); err != nil {
				t.Fatal(err)
			}
			err := set(operator, c.now)
			if c.weaker == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			refused(t, manage.ErrNotApproved, err)
			if err := set(approved, c.now); err != nil {
				t.Error(err)
			}
			events := r.log(t, 0)
			if e := events[len(events)-1]; e.Type != audit.LineChanged || e.Metadata["weaker"] != c.weaker {
				t.Errorf("the event is %+v, want weaker %q", e, c.weaker)
			}
		})
	}
}
