package client_test

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"countersign/audit"
	"countersign/client"
	"countersign/internal/keyring"
)

// TestCalledOffByAnAppliance: a client of a real appliance hears of a rotation, of its other time,
// and of its end, and acknowledges each of them. The version that was called off comes later.
func TestCalledOffByAnAppliance(t *testing.T) {
	a := start(t)
	ctx := within(t)
	k, err := a.app.Keys.Active("payments")
	if err != nil {
		t.Fatal(err)
	}
	heard := make(told, 10)
	config := a.config()
	config.Lines = []client.KeyLine{{Key: "payments", Version: 1, PublicKey: [32]byte(k.Info().PublicKey)}}
	config.OnRotation = func(r client.Rotation) { heard <- r }
	kept := make(chan [32]byte, 10)
	config.OnServerKey = func(key [32]byte, _ uint64) { kept <- key }
	c := dial(t, config)
	if _, err := c.Ping(ctx); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"payments", keyring.NoiseName} {
		for in := time.Hour; in <= 2*time.Hour; in += time.Hour {
			at := time.Now().Add(in)
			if _, err := a.app.Keys.Rotate(ctx, operator, name, at); err != nil {
				t.Fatal(err)
			}
			if r := heard.next(t); r.Err != nil || r.New.Version != 2 || r.ActivatesAt.Unix() != at.Unix() {
				t.Fatalf("%+v", r)
			}
		}
		if err := a.app.Keys.Cancel(ctx, operator, name); err != nil {
			t.Fatal(err)
		}
		if r := heard.next(t); r.Err != nil || r.Cancelled != 2 || r.New.Version != 1 {
			t.Errorf("%+v", r)
		}
		for len(a.app.Peers.Unacknowledged(name, 1)) > 0 {
			if _, err := c.Ping(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	for range 2 {
		if key := <-kept; key == a.key {
			t.Error("the announced key of the listener is not the next one")
		}
	}
	if key := <-kept; key != a.key {
		t.Error("the application keeps another key of the listener than the active one")
	}
	if s, err := c.Sign(ctx, "payments", message("AAAA")); err != nil || s.Version != 1 {
		t.Errorf("%v", err)
	}
	if _, err := a.app.Keys.Rotate(ctx, operator, "payments", time.Now()); err != nil {
		t.Fatal(err)
	}
	if r := heard.next(t); r.Err != nil || r.New.Version != 2 || r.Cancelled != 0 {
		t.Errorf("%+v", r)
	}
	if s, err := c.Sign(ctx, "payments", message("BBBB")); err != nil || s.Version != 2 {
		t.Errorf("%v", err)
	}
}

// TestRotationOfAnAppliance rotates the keys of a real appliance. A connected peer follows the
// line, a peer without a connection catches up later, and both change over to the new Noise key.
func TestRotationOfAnAppliance(t *testing.T) {
	a := start(t)
	ctx := within(t)
	var pin client.KeyLine
	keys, err := dial(t, a.config()).Keys(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range keys {
		if k.Name == "payments" && k.Next != nil {
			pin = client.LineOf(k)
		}
	}
	heard := make(told, 10)
	kept := make(chan [32]byte, 10)
	config := a.config()
	config.Lines = []client.KeyLine{pin}
	config.OnRotation = func(r client.Rotation) { heard <- r }
	config.OnServerKey = func(key [32]byte, _ uint64) { kept <- key }
	c := dial(t, config)

	if s, err := c.Sign(ctx, "payments", message("AAAA")); err != nil || s.Version != 1 {
		t.Fatal(err)
	}
	// next skips a repetition of the last event. The appliance sends an event again with new times
	// when the version becomes active in a later second than announced.
	var last client.Rotation
	next := func() client.Rotation {
		t.Helper()
		for {
			if r := heard.next(t); r.Key != last.Key || r.New.Version != last.New.Version {
				last = r
				return r
			}
		}
	}
	// acknowledged waits for the acknowledgement, which the client sends after OnRotation.
	acknowledged := func(name string, version uint32) {
		t.Helper()
		for len(a.app.Peers.Unacknowledged(name, version)) > 0 {
			if _, err := c.Ping(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	for version := uint32(2); version <= 3; version++ {
		k, err := a.app.Keys.Rotate(ctx, operator, "payments", time.Now())
		if err != nil {
			t.Fatal(err)
		}
		r := next()
		sameKey := string(r.New.PublicKey[:]) == string(k.Info().PublicKey)
		if r.Err != nil || r.New.Version != version || !sameKey || r.New.Next == [32]byte{} {
			t.Fatalf("%+v", r)
		}
		acknowledged("payments", version)
		for { // the new version may not be active yet
			s, err := c.Sign(ctx, "payments", message("AAAA"))
			var refusal *client.Error
			early := errors.As(err, &refusal) && refusal.Code == "key_not_active"
			if early || err == nil && s.Version == version-1 {
				continue
			}
			if err != nil || s.Version != version {
				t.Fatal(err)
			}
			break
		}
	}
	late := config
	late.OnRotation = nil
	if s, err := dial(t, late).Sign(ctx, "payments", message("AAAA")); err != nil || s.Version != 3 {
		t.Errorf("a peer that pinned the first version: %v", err)
	}
	steps, err := c.Line(ctx, "payments", 1)
	if err != nil {
		t.Fatal(err)
	}
	if l, err := client.VerifyKeyLine(pin, steps.Steps); err != nil || l.Version != 3 {
		t.Errorf("%+v, %v", l, err)
	}

	k, err := a.app.Keys.Rotate(ctx, operator, keyring.NoiseName, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if r := next(); r.Key != client.NoiseKey || r.Err != nil || <-kept != [32]byte(k.Info().PublicKey) {
		t.Fatalf("%+v", r)
	}
	acknowledged(keyring.NoiseName, 2)
	if err := a.stop(); err != nil {
		t.Fatal(err)
	}
	if err := a.serve(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Ping(ctx); err != nil {
		t.Errorf("the running client: %v", err)
	}
	young := a.config()
	young.ServerKey = [32]byte(k.Info().PublicKey)
	for _, config := range []client.Config{young, a.config()} {
		if _, err := dial(t, config).Ping(ctx); err != nil {
			t.Errorf("a new client: %v", err)
		}
	}
}

// TestAnotherKeyOfThePeer: after a change of the peer's key, a request that the former key has made
// is repeated with the present one. Its event names the former key: the proof is accepted only with
// FormerKeys.
func TestAnotherKeyOfThePeer(t *testing.T) {
	a := start(t)
	ctx := within(t)
	k, err := a.app.Keys.LogKey()
	if err != nil {
		t.Fatal(err)
	}
	log, err := audit.NewLog(k.Info().PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	former := a.shop.Public()
	config := a.config()
	config.LogKey = log.VerifierKey(0)
	first, err := dial(t, config).Sign(ctx, "payments", message("AAAA"))
	if err != nil {
		t.Fatal(err)
	}
	if config.Identity, err = newIdentity(); err != nil {
		t.Fatal(err)
	}
	key := config.Identity.Public()
	if err := a.app.Peers.AddKey(ctx, operator, "shop", key[:]); err != nil {
		t.Fatal(err)
	}
	if err := a.app.Peers.RemoveKey(ctx, operator, "shop", former); err != nil {
		t.Fatal(err)
	}
	if _, err := dial(t, config).Sign(ctx, "payments", first.Document); !errors.Is(err, client.ErrUnproven) {
		t.Errorf("without the former key: %v, want %v", err, client.ErrUnproven)
	}
	config.FormerKeys = [][32]byte{former}
	again, err := dial(t, config).Sign(ctx, "payments", first.Document)
	if err != nil || !again.Repeated || !bytes.Equal(again.Signature, first.Signature) {
		t.Errorf("%+v, %v", again, err)
	}
}
