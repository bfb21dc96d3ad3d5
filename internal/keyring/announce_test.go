package keyring_test

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"countersign/appliance"
	"countersign/audit"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/manage"
	"countersign/internal/peers"
	"countersign/wire"
)

// waitsFor expects the peers that have not acknowledged a version.
func (r *rig) waitsFor(t *testing.T, key string, version uint32, want ...string) {
	t.Helper()
	if got := r.Peers.Unacknowledged(key, version); !slices.Equal(got, want) {
		t.Errorf("version %d of %s is not acknowledged by %v, want %v", version, key, got, want)
	}
}

// TestAcknowledge: a peer's acknowledgement outlives a restart, and lets the version before go
// where the settings say so.
func TestAcknowledge(t *testing.T) {
	r := newRig(t)
	for _, bad := range []uint32{0, 1, 2, 3} {
		refused(t, keyring.ErrUnknown, r.ack(t, r.shop, "payments", bad))
	}
	refused(t, keyring.ErrUnknown, r.ack(t, r.shop, "nothing", 2))
	r.set(t, "payments", func(s *keyring.Settings) { s.Acknowledge = []string{"shop"} })
	r.rotate(t, "payments", time.Now())
	if err := r.ack(t, r.cafe, "payments", 2); err != nil {
		t.Fatal(err)
	}
	refused(t, keyring.ErrUnknown, r.ack(t, r.shop, "payments", 3))
	r.keep(t, "payments")
	r.wantStates(t, "payments", "verify-only active pending") // without the shop
	r.reopen(t)
	r.waitsFor(t, "payments", 2, "shop")
	for range 2 {
		if err := r.ack(t, r.shop, "payments", 2); err != nil {
			t.Fatal(err)
		}
	}
	if known := r.count(t, audit.RotationKnown); known != 2 {
		t.Errorf("%d acknowledgements are written down, want 2", known)
	}
	r.keep(t, "payments")
	r.wantStates(t, "payments", "archived active pending")
}

// TestAcknowledgedIsNotTheNext: an acknowledged version says nothing of the version after it.
func TestAcknowledgedIsNotTheNext(t *testing.T) {
	r := newRig(t)
	r.set(t, "payments", func(s *keyring.Settings) { s.Acknowledge = []string{keyring.AllPeers} })
	r.rotate(t, "payments", time.Now())
	for _, who := range []appliance.Caller{r.shop, r.cafe} {
		if err := r.ack(t, who, "payments", 2); err != nil {
			t.Fatal(err)
		}
	}
	r.keep(t, "payments")
	r.rotate(t, "payments", time.Now())
	r.keep(t, "payments")
	r.wantStates(t, "payments", "archived verify-only active pending")
}

// TestAcknowledgementsThatCount: the acknowledgements of the peers that must and can acknowledge
// count. Where no peer is left, the grace time counts.
func TestAcknowledgementsThatCount(t *testing.T) {
	ack := func(names ...string) func(*testing.T, *rig) {
		return func(t *testing.T, r *rig) {
			for _, name := range names {
				who := map[string]appliance.Caller{"shop": r.shop, "cafe": r.cafe}[name]
				if err := r.ack(t, who, "payments", 2); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	remove := func(names ...string) func(*testing.T, *rig) {
		return func(t *testing.T, r *rig) {
			for _, name := range names {
				if err := r.Peers.Remove(t.Context(), operator, name); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	suspend := func(t *testing.T, r *rig) {
		if err := r.Peers.Suspend(t.Context(), operator, "shop"); err != nil {
			t.Fatal(err)
		}
	}
	all := func(acts ...func(*testing.T, *rig)) func(*testing.T, *rig) {
		return func(t *testing.T, r *rig) {
			for _, act := range acts {
				act(t, r)
			}
		}
	}
	for _, c := range []struct {
		name        string
		acknowledge []string
		do          func(*testing.T, *rig)
		done        bool
	}{
		{"nobody must", nil, ack("shop", "cafe"), false},
		{"nobody has", []string{"shop"}, ack(), false},
		{"another has", []string{"shop"}, ack("cafe"), false},
		{"who must has", []string{"shop"}, ack("shop"), true},
		{"one of two", []string{"shop", "cafe"}, ack("shop"), false},
		{"one of all", []string{keyring.AllPeers}, ack("shop"), false},
		{"all", []string{keyring.AllPeers}, ack("shop", "cafe"), true},
		{"who must is gone", []string{"shop"}, remove("shop"), false},
		{"all are gone", []string{keyring.AllPeers}, remove("shop", "cafe"), false},
		{"one is gone and the other has", []string{"shop", "cafe"}, all(ack("shop"), remove("cafe")), true},
		{"who must is suspended", []string{"shop"}, suspend, false},
		{"one is suspended and the other has", []string{keyring.AllPeers}, all(ack("cafe"), suspend), true},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t)
			r.set(t, "payments", func(s *keyring.Settings) { s.Acknowledge = c.acknowledge })
			r.rotate(t, "payments", time.Now())
			c.do(t, r)
			r.keep(t, "payments")
			want := "verify-only active pending"
			if c.done {
				want = "archived active pending"
			}
			r.wantStates(t, "payments", want)
		})
	}
}

// TestForgedAcknowledgement: no peer acknowledges for another peer, for another enrolment of its
// name, or a version that was not announced to the peer.
func TestForgedAcknowledgement(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.createOwn(t, keyring.NoiseName, keyring.LogName)
		tls := keyring.NewKey{Name: "tls", Algorithm: keystore.P256}
		if _, err := r.Keys.Create(t.Context(), operator, tls); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"payments", keyring.NoiseName, "tls"} {
			r.rotate(t, name, time.Now())
		}
		old := r.shop
		if err := r.Peers.Remove(t.Context(), operator, "shop"); err != nil {
			t.Fatal(err)
		}
		refused(t, peers.ErrGone, r.ack(t, old, "payments", 2)) // removed
		other := old.PublicKey
		other[0]++
		var err error
		if r.shop.Peer, err = r.Peers.Add(t.Context(), operator, "shop", other[:]); err != nil {
			t.Fatal(err)
		}
		refused(t, peers.ErrGone, r.ack(t, old, "payments", 2)) // another enrolment of the name
		forged := r.cafe
		forged.Name = "shop"
		refused(t, peers.ErrGone, r.ack(t, forged, "payments", 2))
		told := r.Keys.Announcements()
		if len(told) != 2 || told[0].Name != keyring.NoiseName || told[1].Name != "payments" {
			t.Errorf("peers are told of %v", told)
		}
		refused(t, keyring.ErrUnknown, r.ack(t, r.shop, "payments", 1)) // a version that needs no announcement
		for _, name := range []string{"tls", keyring.LogName} {
			refused(t, keyring.ErrUnknown, r.ack(t, r.shop, name, 2))
		}
		r.waitsFor(t, "payments", 2, "cafe", "shop")
		if err := r.ack(t, r.shop, keyring.NoiseName, 2); err != nil {
			t.Error(err)
		}
		r.waitsFor(t, keyring.NoiseName, 2, "cafe")
		r.rotate(t, "payments", time.Now())
		// Two acknowledgements at once both come to the ledger, and the second one is no event.
		before := r.count(t, audit.RotationKnown)
		release := r.occupy(t)
		done := make(chan error, 2)
		for range 2 {
			go func() { done <- r.ack(t, r.cafe, "payments", 3) }()
		}
		synctest.Wait()
		release()
		for range 2 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		if err := r.ack(t, r.cafe, "payments", 2); err != nil { // a late one takes nothing back
			t.Error(err)
		}
		if n := r.count(t, audit.RotationKnown) - before; n != 1 {
			t.Errorf("%d events of two acknowledgements at once", n)
		}
		if err := r.Peers.Suspend(t.Context(), operator, "shop"); err != nil {
			t.Fatal(err)
		}
		r.waitsFor(t, "payments", 3) // nothing is expected of a suspended peer
		if err := r.Peers.Resume(t.Context(), operator, "shop"); err != nil {
			t.Fatal(err)
		}
		r.reopen(t)
		r.waitsFor(t, "payments", 3, "shop")
		r.waitsFor(t, keyring.NoiseName, 2, "cafe")
	})
}

// TestAnnouncementFollowsSettings: the end of the old version is announced by the settings of the
// moment, until the new version is active.
func TestAnnouncementFollowsSettings(t *testing.T) {
	r := newRig(t)
	r.rotate(t, "payments", time.Now().Add(time.Hour))
	told := func(want time.Duration) {
		t.Helper()
		_, event, err := wire.DecodeMessage([]byte(r.Keys.Announcements()[0].Event))
		d, is := event.(*wire.Rotation)
		if err != nil || !is || d.RetiresAt-d.ActivatesAt != int64(want/time.Second) {
			t.Errorf("peers are told %+v, %v, want an end after %v", d, err, want)
		}
	}
	told(r.limits.MaxLifetime)
	r.set(t, "payments", func(s *keyring.Settings) { s.Grace = 2 * time.Hour })
	told(2 * time.Hour)
}

// TestLongLine: the answer to a peer's request fits into its message, however often a key was
// rotated.
func TestLongLine(t *testing.T) {
	r := newRig(t)
	for range 120 {
		r.rotate(t, "payments", time.Now())
		for _, k := range r.Keys.All() {
			if k.State == keyring.VerifyOnly {
				r.archive(t, "payments", k.Version)
			}
		}
	}
	list := r.Keys.Listed()
	if len(list.Keys) != 1 || list.Keys[0].Version != 121 || list.Keys[0].State != "active" {
		t.Errorf("the keys are %d", len(list.Keys))
	}
	from, all := uint32(1), 0
	for more := true; more; {
		steps, err := r.Keys.Steps(&wire.Line{Key: "payments", From: from})
		if err != nil {
			t.Fatal(err)
		}
		if b := wire.EncodeAnswer("1", "", steps, nil); strings.Contains(string(b), wire.CodeTooLarge) {
			t.Fatal("they don't fit")
		}
		more = steps.More
		from += uint32(len(steps.Steps))
		all += len(steps.Steps)
	}
	if all != 120 {
		t.Errorf("%d steps", all)
	}
	r.checkKey(t, "payments")
}

// TestHiddenSuccessor: the public key of a version that is not announced is not told. Its digest
// is, and others hold the version against the digest later.
func TestHiddenSuccessor(t *testing.T) {
	r := newRig(t)
	r.rotate(t, "payments", time.Now().Add(time.Hour))
	hidden := r.Keys.Version("payments", 3)
	steps, err := r.Keys.Steps(&wire.Line{Key: "payments", From: 1})
	if err != nil || len(steps.Steps) != 1 {
		t.Fatalf("%+v, %v", steps, err)
	}
	told := string(wire.EncodeAnswer("1", "", r.Keys.Listed(), nil)) + string(wire.EncodeAnswer("1", "", steps, nil)) +
		r.Keys.Announcements()[0].Event
	key := func(b []byte) string { return strings.Trim(string(manage.Encode(wire.Bytes32(b))), `"`) }
	digest := hidden.Digest()
	if strings.Contains(told, key(hidden.Info().PublicKey)) || !strings.Contains(told, key(digest[:])) ||
		!strings.Contains(told, key(r.Keys.Version("payments", 2).Info().PublicKey)) {
		t.Errorf("peers see %s", told)
	}
}
