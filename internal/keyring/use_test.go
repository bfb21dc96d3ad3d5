package keyring_test

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"countersign/appliance"
	"countersign/audit"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
)

// TestOutOfUse: whatever a request has begun with, nothing is signed by a version that is out of
// use when the device comes to the request, or goes out of use meanwhile. An earlier signature is
// given out again as long as the version is believed.
func TestOutOfUse(t *testing.T) {
	for _, c := range []struct {
		name  string
		end   func(*testing.T, *rig)
		stays bool // earlier signatures can be had
	}{
		{"archived", func(t *testing.T, r *rig) {
			r.rotate(t, "payments", time.Now())
			r.archive(t, "payments", 1)
		}, true},
		{"compromised", func(t *testing.T, r *rig) { r.compromise(t, "payments", 1) }, false},
		{"destroyed", func(t *testing.T, r *rig) {
			r.rotate(t, "payments", time.Now())
			r.archive(t, "payments", 1)
			r.destroy(t, "payments", 1)
		}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t)
			signed := message(1, "signed")
			first := r.sign(t, r.shop, signed)
			cutOff := message(2, "admitted, and then the device failed")
			r.store.BeforeSign = func(keystore.Ref, []byte) error { return keystore.ErrUnavailable }
			_, err := r.Sign(t.Context(), r.shop, cutOff)
			refused(t, keystore.ErrUnavailable, err)
			inDevice, release := make(chan struct{}), make(chan struct{})
			r.store.BeforeSign = func(ref keystore.Ref, m []byte) error {
				if ref.Version == 1 && strings.HasPrefix(string(m), "countersign-message") {
					close(inDevice)
					<-release
				}
				return nil
			}
			done := make(chan error)
			go func() {
				_, err := r.Sign(context.Background(), r.shop, message(3, "in the device"))
				done <- err
			}()
			<-inDevice
			c.end(t, r)
			close(release)
			refused(t, keyring.ErrNotActive, <-done)
			used := false
			r.store.BeforeSign = func(ref keystore.Ref, _ []byte) error { used = used || ref.Version == 1; return nil }
			for range 2 {
				_, err := r.Sign(t.Context(), r.shop, cutOff)
				refused(t, keyring.ErrNotActive, err)
				if again, err := r.Sign(t.Context(), r.shop, signed); !c.stays {
					refused(t, keyring.ErrNotActive, err)
				} else if err != nil || string(again.Signature) != string(first.Signature) || !again.Repeated {
					t.Errorf("the earlier signature: %+v, %v", again, err)
				}
				r.reopen(t)
			}
			if used {
				t.Error("the device was asked to sign with it")
			}
		})
	}
}

// TestLockedMeanwhile: the appliance is locked while the device makes a key, or the successor of a
// version. When Lock has returned, no version comes into use. After the unlocking the same act
// works.
func TestLockedMeanwhile(t *testing.T) {
	for name, act := range map[string]func(*rig) error{
		"creation": func(r *rig) error {
			_, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: "other"})
			return err
		},
		"rotation": func(r *rig) error {
			_, err := r.Keys.Rotate(t.Context(), operator, "payments", time.Now())
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			var lock sync.Once
			r.store.BeforeGenerate = func(keystore.Ref) error {
				lock.Do(func() {
					if err := r.Lock(t.Context(), operator, "incident"); err != nil {
						t.Error(err)
					}
				})
				return nil
			}
			refused(t, appliance.ErrLocked, act(r))
			r.wantStates(t, "payments", "active pending")
			if _, err := r.Keys.Versions("other"); err == nil {
				t.Error("a key came into use")
			}
			if err := r.Unlock(t.Context(), operator); err != nil {
				t.Fatal(err)
			}
			if err := act(r); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestOwnDocumentsOfACompromisedVersion: a compromised version signs the step to its successor, and
// nothing else of the appliance's own: the identity that is compromised while an authorization of
// the Noise key waits for the device does not sign the authorization.
func TestOwnDocumentsOfACompromisedVersion(t *testing.T) {
	r := newRig(t)
	r.createOwn(t, keyring.NoiseName)
	r.Keys.Identity = "payments"
	inDevice, release := make(chan struct{}), make(chan struct{})
	var held sync.Once
	r.store.BeforeSign = func(ref keystore.Ref, m []byte) error {
		if ref.Version == 1 && strings.HasPrefix(string(m), "paykit.noise_key_authorization") {
			held.Do(func() { close(inDevice); <-release })
		}
		return nil
	}
	done := make(chan error)
	go func() { done <- r.Keys.AuthorizeNoise(context.Background(), operator) }()
	<-inDevice
	ref := keystore.Ref{Name: "payments", Version: 1}
	event := audit.NewKeyStateChanged(approved, ref.String(), "active", "compromised", "stolen")
	if err := r.Keys.Change(t.Context(), approved, ref, keyring.Compromised, event); err != nil {
		t.Error(err)
	}
	close(release)
	refused(t, keyring.ErrNotActive, <-done)
}

// TestProofOfABusyPeer: a peer that asks for a proof while its own requests wait for the device
// does not hold up the checkpoint, which all other peers wait for.
func TestProofOfABusyPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(r *rig) { r.limits.Calls = map[string]int{"memory": 1} })
		r.createOwn(t, keyring.LogName)
		event := r.sign(t, r.shop, message(0, "m")).Event
		var order []string
		next := make(chan struct{})
		r.store.BeforeSign = func(ref keystore.Ref, _ []byte) error {
			<-next
			order = append(order, ref.Name)
			return nil
		}
		for n := range byte(10) {
			go r.Sign(t.Context(), r.shop, message(n+1, "m"))
		}
		synctest.Wait()
		proven := make(chan error, 1)
		go func() { _, err := r.Proof(t.Context(), r.shop, event); proven <- err }()
		synctest.Wait()
		for range 11 {
			next <- struct{}{}
			synctest.Wait()
		}
		if err := <-proven; err != nil {
			t.Error(err)
		}
		// The checkpoint comes after the signature in the device and one turn of the peer.
		if at := slices.Index(order, keyring.LogName); at < 0 || at > 2 {
			t.Errorf("the checkpoint was signed as number %d: %s", at, order)
		}
	})
}
