package noise

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"errors"
	"testing"
	"time"
)

var errDevice = errors.New("the device is away")

// flaky is a key whose device fails from a certain exchange on, counted from 1.
type flaky struct {
	counted
	fails int
}

func (f *flaky) Exchange(ctx context.Context, peer [32]byte) ([32]byte, error) {
	if err := ctx.Err(); err != nil {
		return [32]byte{}, err
	}
	if f.uses+1 >= f.fails {
		f.uses++
		return [32]byte{}, errDevice
	}
	return f.counted.Exchange(ctx, peer)
}

// knockAt is knock at a listener with several keys.
func knockAt(ctx context.Context, statics []Static, profile Profile, said []byte, enrolled bool) (k knocked) {
	s := &still{said: bytes.NewReader(said)}
	k.conn, k.err = Accept(ctx, s, statics, profile, nil, func([32]byte) bool { k.asked++; return enrolled })
	k.sent = s.sent
	return k
}

// TestSeveralStatics: each key answers what was made for it; what was made for none is refused after one exchange with each.
func TestSeveralStatics(t *testing.T) {
	me := identity(t)
	keys := []*Identity{identity(t), identity(t), identity(t)}
	for _, profile := range []Profile{CountersignV1, PubkyV1} {
		m1 := func(server, bound [32]byte) []byte {
			t.Helper()
			if profile == CountersignV1 {
				return message1(t, me, profile, server, nil)
			}
			payload, err := PubkyIdentity(ed25519.NewKeyFromSeed(bytes.Repeat([]byte{7}, 32)), me.Public(), bound, "", time.Time{})
			if err != nil {
				t.Fatal(err)
			}
			return message1(t, me, profile, server, payload)
		}
		try := func(what string, message []byte, enrolled bool, uses ...int) knocked {
			t.Helper()
			var counts []*counted
			var statics []Static
			for _, key := range keys {
				c := &counted{Identity: key}
				counts, statics = append(counts, c), append(statics, c)
			}
			k := knockAt(t.Context(), statics, profile, framed(message), enrolled)
			for i, c := range counts {
				if c.uses != uses[i] {
					t.Errorf("%s, %s: key %d was used %d times, want %d", profile, what, i+1, c.uses, uses[i])
				}
			}
			if (k.err == nil) != (len(k.sent) > 0) {
				t.Errorf("%s, %s: %v, %d bytes sent", profile, what, k.err, len(k.sent))
			}
			return k
		}
		for i, uses := range [][]int{{2, 0, 0}, {1, 2, 0}, {1, 1, 2}} {
			public := keys[i].Public()
			k := try("its own key", m1(public, public), true, uses...)
			if k.err != nil || k.conn.Static() != public || k.conn.Peer() != me.Public() || k.asked != 1 {
				t.Errorf("%s, key %d: %v, asked %d times", profile, i+1, k.err, k.asked)
			}
			if k := try("a stranger", m1(public, public), false, uses...); k.err != ErrStranger || k.asked != 1 {
				t.Errorf("%s, key %d: %v", profile, i+1, k.err)
			}
			spoilt := m1(public, public)
			spoilt[len(spoilt)-1] ^= 1 // the key is right, the payload is not: no other key is asked
			if k := try("a spoilt payload", spoilt, true, uses...); !errors.Is(k.err, ErrHandshake) || k.asked != 0 {
				t.Errorf("%s, key %d: %v", profile, i+1, k.err)
			}
		}
		other := identity(t).Public()
		if k := try("another key", m1(other, other), true, 1, 1, 1); !errors.Is(k.err, ErrHandshake) || k.asked != 0 {
			t.Errorf("%s: %v", profile, k.err)
		}
		// A point of low order has no result with any key.
		if k := try("nothing but zeros", make([]byte, len(m1(other, other))), true, 1, 0, 0); !errors.Is(k.err, ErrHandshake) {
			t.Errorf("%s: %v", profile, k.err)
		}
		if profile == PubkyV1 { // an identity that is bound to one of the keys is none towards the other
			if k := try("bound to the other key", m1(keys[1].Public(), keys[0].Public()), true, 1, 2, 0); !errors.Is(k.err, ErrIdentity) {
				t.Error(k.err)
			}
		}
	}
	if k := knockAt(t.Context(), nil, CountersignV1, nil, true); k.err == nil || errors.Is(k.err, ErrHandshake) {
		t.Errorf("no key at all: %v", k.err)
	}
}

// TestDeviceErrorEndsTheHandshake: what a device does not answer is not tried with the next key, and is told as what it is.
func TestDeviceErrorEndsTheHandshake(t *testing.T) {
	me, first, second := identity(t), identity(t), identity(t)
	for _, c := range []struct {
		name                string
		to                  *Identity
		failFirst, failNext int // from which exchange on
		uses, usesNext      int
	}{
		{"the first key's, for the second", second, 1, 9, 1, 0},
		{"the first key's, for itself", first, 1, 9, 1, 0},
		{"the first key's second exchange", first, 2, 9, 2, 0},
		{"the second key's", second, 9, 1, 1, 1},
		{"the second key's second exchange", second, 9, 2, 1, 2},
	} {
		a, b := &flaky{counted{Identity: first}, c.failFirst}, &flaky{counted{Identity: second}, c.failNext}
		k := knockAt(t.Context(), []Static{a, b}, CountersignV1, framed(message1(t, me, CountersignV1, c.to.Public(), nil)), true)
		if !errors.Is(k.err, errDevice) || len(k.sent) != 0 || k.asked != 0 || a.uses != c.uses || b.uses != c.usesNext {
			t.Errorf("%s: %v, used %d and %d times", c.name, k.err, a.uses, b.uses)
		}
	}
	// A context that ends under way ends the handshake too, whether the key looks at it or not.
	ctx, cancel := context.WithCancel(t.Context())
	next := &counted{Identity: second}
	k := knockAt(ctx, []Static{&ending{first, cancel}, next}, CountersignV1, framed(message1(t, me, CountersignV1, second.Public(), nil)), true)
	if !errors.Is(k.err, context.Canceled) || next.uses != 0 {
		t.Errorf("%v, used %d times", k.err, next.uses)
	}
}

// ending is a key whose exchange takes so long that the context ends.
type ending struct {
	*Identity
	end func()
}

func (e *ending) Exchange(ctx context.Context, peer [32]byte) ([32]byte, error) {
	e.end()
	return e.Identity.Exchange(ctx, peer)
}

// TestTwoStaticsOverTheWire: clients of the old and of the new key are served by one listener.
func TestTwoStaticsOverTheWire(t *testing.T) {
	old, young, me := identity(t), identity(t), identity(t)
	for _, server := range []*Identity{old, young} {
		c, s := pair(t)
		done := make(chan accepted, 1)
		go func() {
			conn, err := Accept(t.Context(), s, []Static{old, young}, CountersignV1, nil, func(p [32]byte) bool { return p == me.Public() })
			done <- accepted{conn, err}
		}()
		client, err := Connect(t.Context(), c, me, CountersignV1, server.Public(), nil)
		if err != nil {
			t.Fatal(err)
		}
		a := <-done
		if a.err != nil || a.conn.Static() != server.Public() || client.Static() != me.Public() || client.Peer() != server.Public() {
			t.Fatalf("%v", a.err)
		}
		go client.WriteMessage([]byte("hello"))
		if m, err := a.conn.ReadMessage(); err != nil || string(m) != "hello" {
			t.Errorf("%q, %v", m, err)
		}
	}
}
