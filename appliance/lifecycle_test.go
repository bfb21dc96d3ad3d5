package appliance

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"countersign/audit"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/ledger/ledgertest"
	"countersign/wire"
)

func (r *rig) set(t *testing.T, name string, change func(*Line)) {
	t.Helper()
	if _, err := r.SetLine(t.Context(), operator, name, func(l *Line) error { change(l); return nil }); err != nil {
		t.Fatal(err)
	}
}

func (r *rig) compromise(t *testing.T, name string, version uint32) {
	t.Helper()
	if err := r.Compromise(t.Context(), approved, name, version, "stolen"); err != nil {
		t.Fatal(err)
	}
}

func (r *rig) ack(t *testing.T, who Peer, key string, version uint32) error {
	_, err := r.Acknowledge(t.Context(), who, &wire.Ack{ID: "1", Op: wire.OpAck, Key: key, Version: version})
	return err
}

// TestOutOfUse: whatever a request has begun with, nothing is signed by a version that is out of use when the device comes to it, or while
// it is at it. What was signed before is given out again as long as the version is believed.
func TestOutOfUse(t *testing.T) {
	for _, c := range []struct {
		name  string
		end   func(*testing.T, *rig)
		stays bool // what it has signed can be had
	}{
		{"archived", func(t *testing.T, r *rig) {
			r.rotate(t, "payments", time.Now())
			if err := r.Archive(t.Context(), operator, "payments", 1); err != nil {
				t.Fatal(err)
			}
		}, true},
		{"compromised", func(t *testing.T, r *rig) { r.compromise(t, "payments", 1) }, false},
		{"destroyed", func(t *testing.T, r *rig) {
			r.rotate(t, "payments", time.Now())
			if err := r.Archive(t.Context(), operator, "payments", 1); err != nil {
				t.Fatal(err)
			}
			if err := r.Destroy(t.Context(), approved, "payments", 1); err != nil {
				t.Fatal(err)
			}
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t)
			signed := message(1, "signed")
			first := r.sign(t, r.shop, signed)
			cutOff := message(2, "admitted, and then the device failed")
			r.store.BeforeSign = func(keystore.Ref, []byte) error { return keystore.ErrUnavailable }
			_, err := r.Sign(t.Context(), r.shop, cutOff)
			r.refuses(t, "unavailable", err)
			inDevice, release := make(chan struct{}), make(chan struct{})
			r.store.BeforeSign = func(ref keystore.Ref, m []byte) error {
				if ref.Version == 1 && strings.HasPrefix(string(m), "countersign-message") {
					close(inDevice)
					<-release
				}
				return nil
			}
			done := make(chan error)
			go func() { _, err := r.Sign(context.Background(), r.shop, message(3, "in the device")); done <- err }()
			<-inDevice
			c.end(t, r)
			close(release)
			r.refuses(t, "key_not_active", <-done)
			used := false
			r.store.BeforeSign = func(ref keystore.Ref, _ []byte) error { used = used || ref.Version == 1; return nil }
			for range 2 {
				for _, m := range []*wire.Sign{cutOff} {
					_, err := r.Sign(t.Context(), r.shop, m)
					r.refuses(t, "key_not_active", err)
				}
				if again, err := r.Sign(t.Context(), r.shop, signed); !c.stays {
					r.refuses(t, "key_not_active", err)
				} else if err != nil || string(again.Signature) != string(first.Signature) || !again.Repeated {
					t.Errorf("what was signed before: %+v, %v", again, err)
				}
				r.reopen(t)
			}
			if used {
				t.Error("the device was asked to sign with it")
			}
		})
	}
}

// TestCompromisedForEver: to destroy a compromised version here destroys it nowhere else.
func TestCompromisedForEver(t *testing.T) {
	r := newRig(t)
	m := message(1, "m")
	first := r.sign(t, r.shop, m)
	r.compromise(t, "payments", 1)
	if err := r.Destroy(t.Context(), approved, "payments", 1); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		_, err := r.Verify(t.Context(), r.shop, verifyOf(m, first))
		r.refuses(t, "wrong_signer", err)
		if told := r.Rotation("payments"); !told.Compromised || told.RetiresAt != told.ActivatesAt {
			t.Errorf("others are told %+v", told)
		}
		r.reopen(t)
	}
}

// TestNoiseKeyIsCompromisedAndTheDeviceFails: the appliance starts without a Noise key that answers, and makes one when it can.
func TestNoiseKeyIsCompromisedAndTheDeviceFails(t *testing.T) {
	r := newRig(t)
	if err := r.Ready(); err == nil {
		t.Error("ready without a Noise key")
	}
	for _, name := range []string{NoiseName, LogName} {
		if _, err := r.CreateOwnKey(t.Context(), operator, name, "memory"); err != nil {
			t.Fatal(err)
		}
	}
	r.store.BeforeGenerate = func(keystore.Ref) error { return keystore.ErrUnavailable }
	r.compromise(t, NoiseName, 1)
	if !slices.Contains(r.events(t), audit.KeyRotationFailed) {
		t.Error("that it failed is no event")
	}
	r.store.BeforeGenerate = nil
	r.reopen(t)
	if err := r.Start(t.Context()); err != nil {
		t.Fatalf("it does not start: %v", err)
	}
	r.keepLine(t.Context(), NoiseName)
	if got := r.states(t, NoiseName); got != "compromised active" {
		t.Error(got)
	}
}

// TestEmergencyByHand: who does not want to wait for the next try rotates.
func TestEmergencyByHand(t *testing.T) {
	r := newRig(t)
	r.store.BeforeGenerate = func(keystore.Ref) error { return keystore.ErrUnavailable }
	r.compromise(t, "payments", 1)
	r.store.BeforeGenerate = nil
	r.keepLine(t.Context(), "payments")
	if got := r.states(t, "payments"); got != "compromised pending" {
		t.Errorf("at once again: %s", got)
	}
	if _, err := r.CreateOwnKey(t.Context(), operator, NoiseName, "memory"); err != nil {
		t.Fatal(err)
	}
	r.store.BeforeGenerate = func(keystore.Ref) error { return keystore.ErrUnavailable }
	r.compromise(t, NoiseName, 1)
	if k, err := r.Rotate(t.Context(), operator, NoiseName, time.Now()); err == nil || k != nil {
		t.Errorf("without the device: %v, %v", k, err)
	}
	r.store.BeforeGenerate = nil
	for _, name := range []string{"payments", NoiseName} {
		if k := r.rotate(t, name, time.Now().Add(time.Hour)); k.Version != 2 || k.State != Active {
			t.Errorf("%v is %s", k.Info().Ref, k.State)
		}
	}
	if got := r.states(t, "payments"); got != "compromised active pending" {
		t.Error(got)
	}
	if h := r.Health(); h.Condition != Operational {
		t.Errorf("%+v", h)
	}
	r.checkLine(t, "payments")
}

// TestTokenIsBack: what failed is tried at once when a token serves again, or an operator has seen to it.
func TestTokenIsBack(t *testing.T) {
	for _, how := range []string{"changed", "retried"} {
		r := newRig(t)
		r.store.BeforeGenerate = func(keystore.Ref) error { return keystore.ErrUnavailable }
		r.compromise(t, "payments", 1)
		r.store.BeforeGenerate = nil
		if how == "changed" {
			r.TokenChanged("memory", false, nil)
			r.keepLine(t.Context(), "payments")
			r.TokenChanged("memory", true, nil)
		} else if err := r.RetryToken(t.Context(), operator, "memory"); err != nil {
			t.Fatal(err)
		}
		r.keepLine(t.Context(), "payments")
		if got := r.states(t, "payments"); got != "compromised active pending" {
			t.Errorf("%s: %s", how, got)
		}
	}
}

// TestSuccessorIsMissing: the appliance starts, signs, says so, and does not rotate to what is not there.
func TestSuccessorIsMissing(t *testing.T) {
	r := newRig(t)
	second, third := keystore.Ref{Name: "payments", Version: 2}, keystore.Ref{Name: "payments", Version: 3}
	r.store.Remove(second)
	r.reopen(t)
	ill := func(what string) {
		t.Helper()
		if h := r.Health(); h.Condition != Degraded || !strings.Contains(strings.Join(h.Causes, ""), what) {
			t.Errorf("%+v", h)
		}
	}
	ill("payments/2")
	if s := r.sign(t, r.shop, message(1, "m")); s.Version != 1 {
		t.Errorf("version %d signs", s.Version)
	}
	if _, err := r.Rotate(t.Context(), operator, "payments", time.Now()); !errors.Is(err, keystore.ErrNotFound) {
		t.Errorf("rotated to nothing: %v", err)
	}
	if got := r.states(t, "payments"); got != "active pending" {
		t.Error(got)
	}

	r = newRig(t)
	r.rotate(t, "payments", time.Now())
	old := keystore.Ref{Name: "payments", Version: 1}
	r.store.Remove(old)
	r.reopen(t)
	ill("payments/1")
	next := r.rotate(t, "payments", time.Now().Add(time.Hour))
	r.store.Remove(third)
	r.reopen(t)
	ill("payments/3")
	if err := r.activate(t.Context(), operator, next); !errors.Is(err, keystore.ErrNotFound) {
		t.Errorf("what is not there is active: %v", err)
	}
	if s := r.sign(t, r.shop, message(1, "m")); s.Version != 2 {
		t.Errorf("version %d signs", s.Version)
	}
	r.store.Remove(second)
	r.ledger.Close()
	l, err := ledgertest.Open(t, r.path, ledger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := New(t.Context(), Config{Limits: limits, Retention: kept}, l, map[string]keystore.Store{"memory": r.store}, parsed(t, allowShop), r.log); !errors.Is(err, keystore.ErrNotFound) {
		t.Errorf("without its active key it starts: %v", err)
	}
}

// TestTokenIsGone: what is out of use does not need its token in the configuration, all else does.
func TestTokenIsGone(t *testing.T) {
	r := newRig(t)
	r.rotate(t, "payments", time.Now())
	move := func(version uint32) error {
		r.ledger.Close()
		r.open(t)
		name := keystore.Ref{Name: "payments", Version: version}.String()
		if err := r.ledger.Update(t.Context(), func(tx *ledger.Tx) error {
			_, k, err := decodeKey(name, tx.Get(ledger.Keys, name))
			k.Token = "old"
			return errors.Join(err, tx.Put(ledger.Keys, name, encode(k)))
		}); err != nil {
			t.Fatal(err)
		}
		r.ledger.Close()
		l, err := ledgertest.Open(t, r.path, ledger.Options{})
		if err != nil {
			t.Fatal(err)
		}
		a, err := New(t.Context(), Config{Limits: limits, Retention: kept}, l, map[string]keystore.Store{"memory": r.store}, parsed(t, allowShop), r.log)
		if err != nil {
			l.Close()
			return err
		}
		r.Appliance = a
		return nil
	}
	if err := r.Archive(t.Context(), operator, "payments", 1); err != nil {
		t.Fatal(err)
	}
	if err := move(1); err != nil {
		t.Errorf("an archived one: %v", err)
	}
	if _, err := r.version("payments", 1).Sign(t.Context(), nil, nil); err == nil {
		t.Error("it signs")
	}
	if err := r.Destroy(t.Context(), approved, "payments", 1); !errors.Is(err, ErrNotFound) {
		t.Errorf("destroyed: %v", err)
	}
	if err := move(3); !errors.Is(err, ErrNotFound) {
		t.Errorf("a successor: %v", err)
	}
}

// TestUnfinishedOnAnotherToken: what is left of a creation does not keep the appliance from starting.
func TestUnfinishedOnAnotherToken(t *testing.T) {
	r := newRig(t)
	left := keystore.Ref{Name: "other", Version: 1}.String()
	if err := r.ledger.Update(t.Context(), func(tx *ledger.Tx) error {
		return tx.Put(ledger.Keys, left, encode(keyRecord{Token: "old", State: making}))
	}); err != nil {
		t.Fatal(err)
	}
	r.reopen(t)
}

func TestTwoActive(t *testing.T) {
	r := newRig(t)
	r.rotate(t, "payments", time.Now())
	if err := r.ledger.Update(t.Context(), func(tx *ledger.Tx) error {
		_, k, err := decodeKey("payments/1", tx.Get(ledger.Keys, "payments/1"))
		k.State = Active
		return errors.Join(err, tx.Put(ledger.Keys, "payments/1", encode(k)))
	}); err != nil {
		t.Fatal(err)
	}
	r.Appliance.keys, r.Appliance.active = map[keystore.Ref]*Key{}, map[string]*Key{}
	if err := r.loadKeys(t.Context()); err == nil {
		t.Error("two versions are active")
	}
}

// TestGenerationRises: whatever the clock does, and whatever others have had signed.
func TestGenerationRises(t *testing.T) {
	r := newRig(t)
	r.identity = "payments"
	if _, err := r.CreateOwnKey(t.Context(), operator, NoiseName, "memory"); err != nil {
		t.Fatal(err)
	}
	series := generations("paykit-noise-key-authorization-v1", "payments")
	raise := func(to uint64) {
		t.Helper()
		if _, err := r.ledger.Admit(t.Context(), ledger.Admission{Scope: "x", Nonce: [32]byte{byte(to)}, ExpiresAt: time.Now().Unix() + 60, Monotonic: &ledger.Monotonic{Series: series, Value: to},
			Decide: func([]ledger.Used) ([]byte, error) { return nil, nil }}, func(ledger.Verdict) []byte { return []byte("{}") }); err != nil {
			t.Fatal(err)
		}
	}
	ahead := uint64(time.Now().Add(1000 * time.Hour).Unix())
	raise(ahead)
	for n := range uint64(3) {
		if err := r.AuthorizeNoise(t.Context(), operator); err != nil {
			t.Fatal(err)
		}
		if got, err := r.ledger.LastNumber(series); got != ahead+n+1 || err != nil {
			t.Errorf("%d, %v", got, err)
		}
	}
	raise(math.MaxInt64)
	if err := r.AuthorizeNoise(t.Context(), operator); !errors.Is(err, ledger.ErrNotHigher) {
		t.Errorf("%v", err)
	}
}

// TestSettings: what is refused, and what memory and disk both have.
func TestSettings(t *testing.T) {
	r := newRig(t)
	many := make([]string, 100)
	for i := range many {
		many[i] = fmt.Sprintf("peer-%d-%s", i, strings.Repeat("x", 20))
	}
	for name, change := range map[string]func(*Line){
		"half a second of presence":     func(l *Line) { l.Presence = time.Second / 2 },
		"half a second of announcement": func(l *Line) { l.Announce = time.Second / 2 },
		"half a second of grace":        func(l *Line) { l.Grace = time.Second / 2 },
		"half a second of age":          func(l *Line) { l.Plan.Every = time.Hour + time.Second/2 },
		"a peer that there is not":      func(l *Line) { l.Acknowledge = []string{"shpo"} },
		"no name":                       func(l *Line) { l.Acknowledge = []string{"Shop"} },
		"too many for the event":        func(l *Line) { l.Acknowledge = many },
		"more than 100":                 func(l *Line) { l.Acknowledge = make([]string, 101) },
		"long announcement":             func(l *Line) { l.Announce = 31 * 24 * time.Hour },
		"negative announcement":         func(l *Line) { l.Announce = -time.Second },
		"long grace":                    func(l *Line) { l.Grace = 11 * 366 * 24 * time.Hour },
		"negative grace":                func(l *Line) { l.Grace = -time.Second },
		"long presence":                 func(l *Line) { l.Presence = 25 * time.Hour },
		"negative presence":             func(l *Line) { l.Presence = -time.Second },
		"a plan that is none":           func(l *Line) { l.Plan.Every = time.Minute },
	} {
		if _, err := r.SetLine(t.Context(), operator, "payments", func(l *Line) error { change(l); return nil }); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
	if _, err := r.SetLine(t.Context(), operator, "payments", func(*Line) error { return errors.New("no") }); !errors.Is(err, ErrInvalid) {
		t.Errorf("%v", err)
	}
	if _, err := r.SetLine(t.Context(), operator, "nothing", nil); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v", err)
	}
	for _, name := range []string{NoiseName, LogName} {
		if _, err := r.CreateOwnKey(t.Context(), operator, name, "memory"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.SetLine(t.Context(), operator, NoiseName, func(l *Line) error { l.Presence = time.Minute; return nil }); !errors.Is(err, ErrInvalid) {
		t.Errorf("presence for the Noise key: %v", err)
	}
	if _, err := r.SetLine(t.Context(), operator, LogName, func(l *Line) error { l.Plan.Uses = 5; return nil }); !errors.Is(err, ErrInvalid) {
		t.Errorf("the log's key is rotated: %v", err)
	}
	r.set(t, NoiseName, func(l *Line) { l.Plan.Uses = 5 })
	r.set(t, "payments", func(l *Line) {
		l.Plan.Every, l.Plan.Window, l.Plan.Uses = 48*time.Hour, "0 3 * * *", 9
		l.Announce, l.Grace, l.Acknowledge, l.Presence = time.Hour, 2*time.Hour, []string{"shop", AllPeers}, time.Minute
	})
	want, err := r.Line("payments")
	if err != nil {
		t.Fatal(err)
	}
	r.set(t, "payments", func(l *Line) { l.Acknowledge[0] = "cafe" }) // not what memory has
	if want.Acknowledge[0] != "shop" {
		t.Error("a change reaches into what was before")
	}
	r.set(t, "payments", func(l *Line) { l.Acknowledge[0] = "shop" })
	r.reopen(t)
	if got, _ := r.Line("payments"); fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
		t.Errorf("after a restart %+v, want %+v", got, want)
	}
	if err := r.RemovePeer(t.Context(), operator, "shop"); err != nil {
		t.Fatal(err)
	}
	r.set(t, "payments", func(l *Line) { l.Grace = time.Hour }) // though one of its names is gone
	var settings string
	r.events(t)
	r.Events(1, func(_ uint64, e audit.Event) bool {
		if e.Type == audit.LineChanged {
			settings = e.Metadata["settings"]
		}
		return true
	})
	if settings != string(encode(r.line("payments").record())) {
		t.Errorf("the event says %s", settings)
	}
}

// TestPresenceIsNotKept: a confirmation is for the time, the credentials and the process that it was given for.
func TestPresenceIsNotKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		defer r.ledger.Close()
		confirm := func() error { _, err := r.Confirm(t.Context(), operator, "payments"); return err }
		if err := confirm(); !errors.Is(err, ErrConflict) {
			t.Errorf("%v", err)
		}
		if _, err := r.Confirm(t.Context(), operator, "nothing"); !errors.Is(err, ErrNotFound) {
			t.Errorf("%v", err)
		}
		r.set(t, "payments", func(l *Line) { l.Presence = time.Hour })
		if err := confirm(); err != nil {
			t.Fatal(err)
		}
		if until := r.Confirmed("payments"); !until.Equal(time.Now().Add(time.Hour)) {
			t.Errorf("until %v", until)
		}
		r.set(t, "payments", func(l *Line) { l.Grace = time.Hour })
		r.sign(t, r.shop, message(1, "m")) // another setting takes nothing back
		r.set(t, "payments", func(l *Line) { l.Presence = time.Minute })
		_, err := r.Sign(t.Context(), r.shop, message(2, "m"))
		r.refuses(t, "not_confirmed", err)

		// Credentials change while it is being written down.
		hold, held := make(chan struct{}), make(chan struct{})
		go r.ledger.Update(t.Context(), func(*ledger.Tx) error { close(held); <-hold; return nil })
		<-held
		done := make(chan error)
		go func() { done <- confirm() }()
		synctest.Wait()
		r.CredentialsChanged()
		close(hold)
		if err := <-done; !errors.Is(err, ErrConflict) {
			t.Errorf("%v", err)
		}
		_, err = r.Sign(t.Context(), r.shop, message(3, "m"))
		r.refuses(t, "not_confirmed", err)
		confirmed := 0
		for _, e := range r.events(t) {
			if e == audit.PresenceConfirmed {
				confirmed++
			}
		}
		if confirmed != 1 {
			t.Errorf("%d confirmations are in the log", confirmed)
		}
	})
}

// TestFailureIsForgotten: when nothing is left to do, whoever has done it, Health does not say that a rotation has failed.
func TestFailureIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.set(t, "payments", func(l *Line) { l.Plan.Every = time.Hour })
		time.Sleep(time.Hour)
		r.store.BeforeGenerate = func(keystore.Ref) error { return keystore.ErrUnavailable }
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); r.keepKeys(ctx) }()
		synctest.Wait()
		if h := r.Health(); h.Condition != Degraded {
			t.Errorf("%+v", h)
		}
		r.store.BeforeGenerate = nil
		r.rotate(t, "payments", time.Now())
		time.Sleep(2 * keepKeysEvery)
		synctest.Wait()
		if h := r.Health(); h.Condition != Operational {
			t.Errorf("%+v", h)
		}
		cancel()
		<-done
		r.ledger.Close()
	})
}

// TestRetries: a rotation that fails is tried again, less and less often, and never given up.
func TestRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		defer r.ledger.Close()
		r.set(t, "payments", func(l *Line) { l.Plan.Every = time.Hour })
		time.Sleep(time.Hour)
		tries := 0
		r.store.BeforeGenerate = func(keystore.Ref) error { tries++; return keystore.ErrUnavailable }
		begin := time.Now()
		var at []time.Duration
		for time.Since(begin) < 8*time.Hour {
			before := tries
			if r.keepLine(t.Context(), "payments"); tries > before {
				at = append(at, time.Since(begin))
			}
			time.Sleep(10 * time.Second)
		}
		if len(at) < 4 || at[1] != firstRetry || at[2]-at[1] != 2*firstRetry || at[len(at)-1]-at[len(at)-2] != lastRetry {
			t.Errorf("tried at %v", at)
		}
	})
}

// TestAcknowledgementsThatCount: those of peers that must and can acknowledge; where there is none, the grace time counts.
func TestAcknowledgementsThatCount(t *testing.T) {
	type rule struct {
		name        string
		acknowledge []string
		do          func(*testing.T, *rig)
		done        bool
	}
	ack := func(names ...string) func(*testing.T, *rig) {
		return func(t *testing.T, r *rig) {
			for _, name := range names {
				who := r.shop
				if name == "cafe" {
					who = r.cafe
				}
				if err := r.ack(t, who, "payments", 2); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	remove := func(names ...string) func(*testing.T, *rig) {
		return func(t *testing.T, r *rig) {
			for _, name := range names {
				if err := r.RemovePeer(t.Context(), operator, name); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	for _, c := range []rule{
		{"nobody must", nil, ack("shop", "cafe"), false},
		{"nobody has", []string{"shop"}, ack(), false},
		{"another has", []string{"shop"}, ack("cafe"), false},
		{"who must has", []string{"shop"}, ack("shop"), true},
		{"one of two", []string{"shop", "cafe"}, ack("shop"), false},
		{"one of all", []string{AllPeers}, ack("shop"), false},
		{"all", []string{AllPeers}, ack("shop", "cafe"), true},
		{"who must is gone", []string{"shop"}, remove("shop"), false},
		{"all are gone", []string{AllPeers}, remove("shop", "cafe"), false},
		{"one is gone and the other has", []string{"shop", "cafe"}, func(t *testing.T, r *rig) { ack("shop")(t, r); remove("cafe")(t, r) }, true},
		{"who must is suspended", []string{"shop"}, func(t *testing.T, r *rig) {
			if err := r.SuspendPeer(t.Context(), operator, "shop"); err != nil {
				t.Fatal(err)
			}
		}, false},
		{"one is suspended and the other has", []string{AllPeers}, func(t *testing.T, r *rig) {
			ack("cafe")(t, r)
			if err := r.SuspendPeer(t.Context(), operator, "shop"); err != nil {
				t.Fatal(err)
			}
		}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t)
			r.set(t, "payments", func(l *Line) { l.Acknowledge = c.acknowledge })
			r.rotate(t, "payments", time.Now())
			c.do(t, r)
			r.keepLine(t.Context(), "payments")
			want := "verify-only active pending"
			if c.done {
				want = "archived active pending"
			}
			if got := r.states(t, "payments"); got != want {
				t.Errorf("%s, want %s", got, want)
			}
		})
	}
}

// TestForgedAcknowledgement: nobody acknowledges for another, for another enrolment, or what was not announced to him.
func TestForgedAcknowledgement(t *testing.T) {
	r := newRig(t)
	for _, name := range []string{NoiseName, LogName} {
		if _, err := r.CreateOwnKey(t.Context(), operator, name, "memory"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.CreateKey(t.Context(), operator, NewKey{Name: "tls", Algorithm: keystore.P256}); err != nil {
		t.Fatal(err)
	}
	r.rotate(t, "payments", time.Now())
	r.rotate(t, NoiseName, time.Now())
	r.rotate(t, "tls", time.Now())
	old := r.shop
	if err := r.RemovePeer(t.Context(), operator, "shop"); err != nil {
		t.Fatal(err)
	}
	r.refuses(t, "denied", r.ack(t, old, "payments", 2)) // removed
	other := old.PublicKey
	other[0]++
	var err error
	if r.shop, err = r.AddPeer(t.Context(), operator, "shop", other[:]); err != nil {
		t.Fatal(err)
	}
	r.refuses(t, "denied", r.ack(t, old, "payments", 2)) // another enrolment of the name
	forged := r.cafe
	forged.Name = "shop"
	r.refuses(t, "denied", r.ack(t, forged, "payments", 2))
	if n := r.announcements(); len(n) != 2 || n[0].name != NoiseName || n[1].name != "payments" {
		t.Errorf("peers are told of %v", n)
	}
	r.refuses(t, "unknown_key", r.ack(t, r.shop, "payments", 1)) // which nobody had to be told
	for _, line := range []string{"tls", LogName} {
		r.refuses(t, "unknown_key", r.ack(t, r.shop, line, 2))
	}
	if got := r.Unacknowledged("payments", 2); !slices.Equal(got, []string{"cafe", "shop"}) {
		t.Errorf("%v", got)
	}
	if err := r.ack(t, r.shop, NoiseName, 2); err != nil {
		t.Error(err)
	}
	if got := r.Unacknowledged(NoiseName, 2); !slices.Equal(got, []string{"cafe"}) {
		t.Errorf("%v", got)
	}
	r.rotate(t, "payments", time.Now())
	for _, version := range []uint32{3, 2} { // a late one takes nothing back
		if err := r.ack(t, r.cafe, "payments", version); err != nil {
			t.Error(err)
		}
	}
	before := len(r.events(t))
	r.peers[r.cafe.PublicKey].known["payments"] = 0 // two at once both come to the disk
	if err := r.ack(t, r.cafe, "payments", 3); err != nil || len(r.events(t)) != before {
		t.Errorf("the second of two at once is an event, %v", err)
	}
	if err := r.SuspendPeer(t.Context(), operator, "shop"); err != nil {
		t.Fatal(err)
	}
	if got := r.Unacknowledged("payments", 3); len(got) != 0 {
		t.Errorf("of a suspended peer it is expected: %v", got)
	}
	if err := r.ResumePeer(t.Context(), operator, "shop"); err != nil {
		t.Fatal(err)
	}
	r.reopen(t)
	if got := r.Unacknowledged("payments", 3); !slices.Equal(got, []string{"shop"}) {
		t.Errorf("%v", got)
	}
	if got := r.Unacknowledged(NoiseName, 2); !slices.Equal(got, []string{"cafe"}) {
		t.Errorf("%v", got)
	}
}

// TestLockThatIsNotWritten: whoever gave up waiting for it, it is locked and can be unlocked.
func TestLockThatIsNotWritten(t *testing.T) {
	r := newRig(t)
	if err := r.locking.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Lock(ctx, operator, "incident"); err == nil {
		t.Error("it says that it is written down")
	}
	r.locking.release()
	if h := r.Health(); h.Condition != LockedUp || h.Lock == nil {
		t.Errorf("%+v", h)
	}
	_, err := r.Sign(t.Context(), r.shop, message(1, "m"))
	r.refuses(t, "unavailable", err)
	if err := r.Unlock(t.Context(), operator); err != nil {
		t.Fatal(err)
	}
	r.sign(t, r.shop, message(1, "m"))
}

// TestNothingMovesWhileClosed: not while the ledger may be an older copy; while it is locked, grace times end and nothing new begins.
func TestNothingMovesWhileClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		defer r.ledger.Close()
		r.set(t, "payments", func(l *Line) { l.Plan.Every = time.Hour })
		r.rotate(t, "payments", time.Now())
		keep := func() string { r.keepLine(t.Context(), "payments"); return r.states(t, "payments") }
		time.Sleep(limits.MaxLifetime)
		for _, why := range []int{byRollback, byCounter} {
			r.close(why, ErrRolledBack)
			if got := keep(); got != "verify-only active pending" {
				t.Error(got)
			}
			r.close(why, nil)
		}
		if err := r.Lock(t.Context(), operator, "incident"); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if got := keep(); got != "archived active pending" {
				t.Error(got)
			}
		}
		r.compromise(t, "payments", 2)
		if got := keep(); got != "archived compromised pending" {
			t.Error(got)
		}
		if err := r.Unlock(t.Context(), operator); err != nil {
			t.Fatal(err)
		}
		if got := keep(); got != "archived compromised active pending" {
			t.Error(got)
		}
		r.rotate(t, "payments", time.Now().Add(time.Minute))
		if err := r.Lock(t.Context(), operator, "incident"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if got := keep(); got != "archived compromised active pending pending" {
			t.Error(got)
		}
	})
}

// TestClockThatJumps: a clock that is set ahead ends no grace time.
func TestClockThatJumps(t *testing.T) {
	r := newRig(t)
	r.rotate(t, "payments", time.Now())
	k := r.version("payments", 1)
	r.ledger.Close()
	jump := time.Duration(0)
	l, err := ledgertest.Open(t, r.path, ledger.Options{Wall: func() time.Time { return time.Now().Add(jump) }})
	if err != nil {
		t.Fatal(err)
	}
	r.ledger = l
	r.Appliance.ledger = l
	jump = 30 * 24 * time.Hour
	early := *k
	early.Retires = time.Now().Add(-time.Hour) // as far as the system's clock can tell, it is long over
	if r.work([]*Key{&early, r.version("payments", 2)}) == nil {
		t.Error("at its time nothing is done")
	}
	early.Retires = time.Now().Add(time.Hour)
	if r.work([]*Key{&early, r.version("payments", 2)}) != nil {
		t.Error("the ledger's time is not asked")
	}
}

// TestLongLine: what peers ask for fits into its message, however often a key was rotated.
func TestLongLine(t *testing.T) {
	r := newRig(t)
	for range 120 {
		r.rotate(t, "payments", time.Now())
		for _, k := range r.Keys() {
			if k.State == VerifyOnly {
				if err := r.Archive(t.Context(), operator, "payments", k.Version); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	list := r.signingKeys()
	if len(list.Keys) != 1 || list.Keys[0].Version != 121 || list.Keys[0].State != "active" {
		t.Errorf("the keys are %d", len(list.Keys))
	}
	from, all := uint32(1), 0
	for more := true; more; {
		steps, err := r.Steps(&wire.Line{Key: "payments", From: from})
		if err != nil {
			t.Fatal(err)
		}
		if b := wire.EncodeAnswer("1", steps, nil); strings.Contains(string(b), wire.CodeTooLarge) {
			t.Fatal("they don't fit")
		}
		more = steps.More
		from += uint32(len(steps.Steps))
		all += len(steps.Steps)
	}
	if all != 120 {
		t.Errorf("%d steps", all)
	}
	r.checkLine(t, "payments")
}

// TestHiddenSuccessor: nobody is told the public key of a version that is not announced; its digest is what others hold it against.
func TestHiddenSuccessor(t *testing.T) {
	r := newRig(t)
	r.rotate(t, "payments", time.Now().Add(time.Hour))
	hidden := r.version("payments", 3)
	steps, err := r.Steps(&wire.Line{Key: "payments", From: 1})
	if err != nil || len(steps.Steps) != 1 {
		t.Fatalf("%+v, %v", steps, err)
	}
	told := string(wire.EncodeAnswer("1", r.signingKeys(), nil)) + string(wire.EncodeAnswer("1", steps, nil)) + r.announcements()[0].event
	key := func(b []byte) string { return strings.Trim(string(encode(wire.Bytes32(b))), `"`) }
	digest := hidden.digest()
	if strings.Contains(told, key(hidden.Info().PublicKey)) || !strings.Contains(told, key(digest[:])) || !strings.Contains(told, key(r.version("payments", 2).Info().PublicKey)) {
		t.Errorf("peers see %s", told)
	}
}

func TestTooFarAhead(t *testing.T) {
	r := newRig(t)
	if _, err := r.Rotate(t.Context(), operator, "payments", time.Now().Add(10*maxAhead)); !errors.Is(err, ErrInvalid) {
		t.Errorf("%v", err)
	}
	if _, err := r.Rotate(t.Context(), operator, "nothing", time.Now()); !errors.Is(err, ErrNotFound) {
		t.Errorf("%v", err)
	}
	for _, name := range []string{LogName, AdminName, CAName} {
		if _, err := r.CreateOwnKey(t.Context(), operator, name, "memory"); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Rotate(t.Context(), operator, name, time.Now()); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s is rotated: %v", name, err)
		}
	}
	k := r.rotate(t, "payments", time.Unix(1, 0)) // long ago is now
	if strings.Contains(string(k.Succession.Payload), `"time":1,`) {
		t.Errorf("the step says %s", k.Succession.Payload)
	}
	if d := time.Since(k.Activates); d < 0 || d > time.Minute || k.State != Active {
		t.Errorf("active since %v", k.Activates)
	}
}

// TestManyNoiseKeys: what a stranger's handshake costs is bounded, and a compromise is not held up by that.
func TestManyNoiseKeys(t *testing.T) {
	r := newRig(t)
	if _, err := r.CreateOwnKey(t.Context(), operator, NoiseName, "memory"); err != nil {
		t.Fatal(err)
	}
	for range maxAnswering - 1 {
		r.rotate(t, NoiseName, time.Now())
	}
	if _, err := r.Rotate(t.Context(), operator, NoiseName, time.Now()); !errors.Is(err, ErrConflict) {
		t.Errorf("%v", err)
	}
	r.compromise(t, NoiseName, maxAnswering)
	if got := r.states(t, NoiseName); got != "verify-only verify-only verify-only compromised active" {
		t.Error(got)
	}
}

// TestUses: how often a key was used is counted through stops, crashes and dropped epochs, and a start reads little.
func TestUses(t *testing.T) {
	r := newRig(t)
	n := byte(0)
	sign := func() { n++; r.sign(t, r.shop, message(n, "m")) }
	uses := func(want uint64) {
		t.Helper()
		if got := r.version("payments", 1).Uses(); got != want {
			t.Errorf("%d uses, want %d", got, want)
		}
	}
	for range 3 {
		sign()
	}
	r.sign(t, r.shop, message(1, "m")) // the same again is not another
	uses(3)
	r.reopen(t)
	uses(3)
	if err := r.writeUses(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, first, tree := r.ledger.Head()
	sign()
	if r.reopen(t); r.written.Next != first+tree.Size {
		t.Errorf("it is read from event %d on, of %d", r.written.Next, first+tree.Size)
	}
	uses(4)
	if err := r.writeUses(t.Context()); err != nil {
		t.Fatal(err)
	}
	written := r.written
	if err := r.writeUses(t.Context()); err != nil || r.written.Next != written.Next {
		t.Errorf("written again, and nothing was used: %v", err)
	}
	for range usesBehind / 64 {
		events := make([]audit.Event, 64)
		for i := range events {
			events[i] = audit.Event{Type: audit.SignatureVerified, Actor: audit.Daemon(), Action: "verify", Outcome: "ok"}
		}
		if err := r.ledger.Update(t.Context(), func(tx *ledger.Tx) error { return appendAll(tx, events...) }); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.writeUses(t.Context()); err != nil || r.written.Next < written.Next+usesBehind {
		t.Errorf("a start would read %d events and more, %v", usesBehind, err)
	}
	// The epoch in which it was counted last is dropped.
	sign()
	if err := r.writeUses(t.Context()); err != nil {
		t.Fatal(err)
	}
	sign() // and not written down
	if _, err := r.CreateOwnKey(t.Context(), operator, LogName, "memory"); err != nil {
		t.Fatal(err)
	}
	if _, err := r.EndEpoch(t.Context(), operator); err != nil {
		t.Fatal(err)
	}
	if err := r.ledger.Drop(t.Context(), 0, entry(audit.Event{Type: audit.RetentionApplied, Actor: audit.Daemon(), Action: "retention", Outcome: "ok"})); err != nil {
		t.Fatal(err)
	}
	sign()
	r.reopen(t)
	uses(6) // of 7, one of which nobody knows any more
}

// TestRotatedLogIsSound: an auditor, and a check of the ledger, accept a log with rotations, a compromise and all that goes with them.
func TestRotatedLogIsSound(t *testing.T) {
	r := newRig(t)
	for _, name := range []string{NoiseName, LogName} {
		if _, err := r.CreateOwnKey(t.Context(), operator, name, "memory"); err != nil {
			t.Fatal(err)
		}
	}
	r.identity = "payments"
	r.sign(t, r.shop, message(1, "m"))
	r.rotate(t, "payments", time.Now())
	r.rotate(t, NoiseName, time.Now())
	if err := r.ack(t, r.shop, "payments", 2); err != nil {
		t.Fatal(err)
	}
	r.store.BeforeSign = func(keystore.Ref, []byte) error { return keystore.ErrUnavailable }
	if _, err := r.Rotate(t.Context(), audit.Daemon(), "payments", time.Now()); err == nil {
		t.Fatal("rotated")
	}
	r.store.BeforeSign = nil
	r.compromise(t, "payments", 2)
	if err := r.Archive(t.Context(), operator, "payments", 1); err != nil {
		t.Fatal(err)
	}
	if err := r.Destroy(t.Context(), approved, "payments", 1); err != nil {
		t.Fatal(err)
	}
	if err := r.Lock(t.Context(), operator, "incident"); err != nil {
		t.Fatal(err)
	}
	if err := r.Unlock(t.Context(), operator); err != nil {
		t.Fatal(err)
	}
	r.events(t)
	log, _, err := r.Log()
	if err != nil {
		t.Fatal(err)
	}
	report, err := log.Verify(t.Context(), filesOf{r.Appliance}, audit.VerifyOptions{})
	if err != nil || report.Unsettled != 0 {
		t.Errorf("%+v, %v", report, err)
	}
	r.ledger.Close()
	if err := ledger.Check(r.path, ledger.Options{}, nil); err != nil {
		t.Error(err)
	}
}

type filesOf struct{ *Appliance }

func (l filesOf) ReadFile(ctx context.Context, name string) ([]byte, error) {
	return l.LogFile(ctx, name)
}

func TestCompromiseIsRefused(t *testing.T) {
	r := newRig(t)
	for _, name := range []string{LogName, AdminName, CAName} {
		if err := r.Compromise(t.Context(), approved, name, 1, "stolen"); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, reason := range []string{"", strings.Repeat("x", 501)} {
		if err := r.Compromise(t.Context(), approved, "payments", 1, reason); !errors.Is(err, ErrInvalid) {
			t.Errorf("%d bytes of a reason: %v", len(reason), err)
		}
	}
	for version, want := range map[uint32]error{2: ErrConflict, 3: ErrNotFound} { // the successor is settled; the other is not there
		if err := r.Compromise(t.Context(), approved, "payments", version, "stolen"); !errors.Is(err, want) {
			t.Errorf("version %d: %v", version, err)
		}
	}
	r.compromise(t, "payments", 1)
	if err := r.Compromise(t.Context(), approved, "payments", 1, "stolen"); !errors.Is(err, ErrConflict) {
		t.Errorf("twice: %v", err)
	}
	if got := r.states(t, "payments"); got != "compromised active pending" {
		t.Error(got)
	}
}

// TestAnnounced: a scheduled rotation is announced as long before as the line says, and what was said of the old version's end stays.
func TestAnnounced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		defer r.ledger.Close()
		r.set(t, "payments", func(l *Line) { l.Plan.Every, l.Announce, l.Grace = 24*time.Hour, time.Hour, 2*time.Hour })
		if next, why := r.NextRotation("payments"); why != "age" || time.Until(next).Round(time.Minute) != 24*time.Hour {
			t.Errorf("%v, %s", next, why)
		}
		time.Sleep(24 * time.Hour)
		r.keepLine(t.Context(), "payments")
		if next, why := r.NextRotation("payments"); why != "announced" || time.Until(next).Round(time.Minute) != time.Hour {
			t.Errorf("%v, %s", next, why)
		}
		if told := r.Rotation("payments"); told == nil || told.RetiresAt-told.ActivatesAt != 2*3600 {
			t.Errorf("%+v", told)
		}
		time.Sleep(time.Hour)
		r.keepLine(t.Context(), "payments")
		said := r.Rotation("payments")
		r.set(t, "payments", func(l *Line) { l.Grace = 20 * time.Hour })
		if told := r.Rotation("payments"); told.RetiresAt != said.RetiresAt || said.RetiresAt != r.version("payments", 1).Retires.Unix() {
			t.Errorf("%+v, before %+v", told, said)
		}
		if next, why := r.NextRotation("nothing"); why != "" || !next.IsZero() {
			t.Errorf("%v, %s", next, why)
		}
	})
}

// TestLockedAgain: a lock that was waiting for an unlocking counts, one that is written down outlives a start, and an attended start is one.
func TestLockedAgain(t *testing.T) {
	r := newRig(t)
	for _, name := range []string{NoiseName, LogName} {
		if _, err := r.CreateOwnKey(t.Context(), operator, name, "memory"); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.locking.acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- r.Lock(t.Context(), operator, "incident") }()
	for r.locked.Load() == nil {
		runtime.Gosched()
	}
	r.locked.Store(nil) // as an unlocking does at its end
	r.close(byOperator, nil)
	r.locking.release()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	locked := func(want bool) {
		t.Helper()
		_, err := r.Sign(t.Context(), r.shop, message(1, "m"))
		if h := r.Health(); (h.Lock != nil) != want || (err != nil) != want {
			t.Errorf("%+v, %v", h, err)
		}
	}
	start := func(attended bool) {
		t.Helper()
		r.reopen(t)
		r.attended = attended
		if err := r.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	locked(true)
	start(false)
	locked(true)
	if err := r.Unlock(t.Context(), operator); err != nil {
		t.Fatal(err)
	}
	locked(false)
	start(false)
	locked(false)
	start(true)
	locked(true)
	if err := r.Unlock(t.Context(), operator); err != nil {
		t.Fatal(err)
	}
	locked(false)
	if err := r.Lock(t.Context(), operator, ""); !errors.Is(err, ErrInvalid) {
		t.Errorf("without a reason: %v", err)
	}
}

// liar is a device that answers with zeros.
type liar struct{ keystore.Key }

func (liar) Exchange(context.Context, [32]byte) (shared [32]byte, err error) { return shared, nil }

// TestProve: what a device has shown to have is not missing, and zeros show nothing.
func TestProve(t *testing.T) {
	r := newRig(t)
	k, err := r.CreateOwnKey(t.Context(), operator, NoiseName, "memory")
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range []*Key{k, r.version("payments", 2)} {
		r.lost[k.Info().Ref] = "it is missing"
		if h := r.Health(); h.Condition != Degraded {
			t.Errorf("%+v", h)
		}
		if err := r.prove(t.Context(), k); err != nil {
			t.Error(err)
		}
		if h := r.Health(); h.Condition != Operational {
			t.Errorf("%+v", h)
		}
	}
	lies := *k
	lies.Key = liar{k.Key}
	if err := r.prove(t.Context(), &lies); !errors.Is(err, keystore.ErrWrong) {
		t.Errorf("%v", err)
	}
	r.store.Corrupt = func(b []byte) []byte { b[0]++; return b }
	if err := r.prove(t.Context(), r.version("payments", 2)); !errors.Is(err, keystore.ErrWrong) {
		t.Errorf("%v", err)
	}
	if uses := r.version("payments", 2).Uses(); uses != 0 {
		t.Errorf("proving counts as %d uses", uses)
	}
}

// TestStopCounts: a start after a stop reads a few events only.
func TestStopCounts(t *testing.T) {
	e := newEdge(t, nil)
	s := e.session("127.0.0.1", e.shop)
	if a, _ := asks(t, s, encoded(numbered(1, "m"))); a.Error != nil {
		t.Fatalf("%+v", a)
	}
	e.close()
	e.open()
	_, first, tree := e.ledger.Head()
	if unread := first + tree.Size - e.written.Next; unread > 2 || e.version("payments", 1).Uses() != 1 {
		t.Errorf("%d events were read, %d uses", unread, e.version("payments", 1).Uses())
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
		if err := r.ShortenRetention(t.Context(), approved, map[string]string{name: "1h"}, change); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestOneKeyTwoNames: a private key that is in two lines is compromised in both.
func TestOneKeyTwoNames(t *testing.T) {
	r := newRig(t)
	seed := filepath.Join(t.TempDir(), "seed")
	if err := os.WriteFile(seed, []byte(strings.Repeat("07", 32)), 0o600); err != nil {
		t.Fatal(err)
	}
	var public [32]byte
	for _, name := range []string{"one", "two"} {
		k, err := r.CreateKey(t.Context(), operator, NewKey{Name: name, Seed: seed})
		if err != nil {
			t.Fatal(err)
		}
		public = [32]byte(k.Info().PublicKey)
		if err := r.checkSigner(&name, public); err != nil {
			t.Error(err)
		}
	}
	r.compromise(t, "one", 1)
	two := "two"
	r.refuses(t, "wrong_signer", r.checkSigner(&two, public))
	r.refuses(t, "wrong_signer", r.checkSigner(nil, public))
	if err := r.checkSigner(nil, [32]byte{1}); err != nil {
		t.Errorf("a stranger's key: %v", err)
	}
}

// TestAcknowledgedIsNotTheNext: to have acknowledged a version says nothing of the one after it.
func TestAcknowledgedIsNotTheNext(t *testing.T) {
	r := newRig(t)
	r.set(t, "payments", func(l *Line) { l.Acknowledge = []string{AllPeers} })
	r.rotate(t, "payments", time.Now())
	for _, who := range []Peer{r.shop, r.cafe} {
		if err := r.ack(t, who, "payments", 2); err != nil {
			t.Fatal(err)
		}
	}
	r.keepLine(t.Context(), "payments")
	r.rotate(t, "payments", time.Now())
	r.keepLine(t.Context(), "payments")
	if got := r.states(t, "payments"); got != "archived verify-only active pending" {
		t.Error(got)
	}
}

func TestArchiveIsRefused(t *testing.T) {
	r := newRig(t)
	for version, want := range map[uint32]error{1: ErrConflict, 2: ErrConflict, 3: ErrNotFound} {
		if err := r.Archive(t.Context(), operator, "payments", version); !errors.Is(err, want) {
			t.Errorf("version %d: %v", version, err)
		}
	}
	r.sign(t, r.shop, message(1, "m"))
}
