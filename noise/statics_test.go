package noise

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"
)

var errDevice = errors.New("the device is away")

// failingKey is a key on a device that fails from exchange number fails on, counted from 1.
type failingKey struct {
	countingKey
	fails int
}

func (f *failingKey) Exchange(ctx context.Context, peer [32]byte) ([32]byte, error) {
	if err := ctx.Err(); err != nil {
		return [32]byte{}, err
	}
	if f.uses+1 >= f.fails {
		f.uses++
		return [32]byte{}, errDevice
	}
	return f.countingKey.Exchange(ctx, peer)
}

// acceptBytesWith is acceptBytes with several static keys and without admit.
func acceptBytesWith(ctx context.Context, statics []Static, profile Profile, input []byte, enrolled bool) (
	k acceptResult) {
	s := &scriptedConn{input: bytes.NewReader(input)}
	k.conn, k.err = Accept(ctx, s, statics, profile, nil, func([32]byte) bool { k.asked++; return enrolled })
	k.sent = s.sent
	return k
}

// TestSeveralStatics accepts with three static keys. Each key responds to its own messages. A
// message for another key is refused after one exchange with each of the three.
func TestSeveralStatics(t *testing.T) {
	me := identity(t)
	keys := []*Identity{identity(t), identity(t), identity(t)}
	for _, profile := range []Profile{CountersignV1, PubkyV1} {
		m1 := func(server, bound [32]byte) []byte {
			t.Helper()
			if profile == CountersignV1 {
				return message1(t, me, profile, server, nil)
			}
			payload, err := PubkyIdentity(testKey(7), me.Public(), bound, "", time.Time{})
			if err != nil {
				t.Fatal(err)
			}
			return message1(t, me, profile, server, payload)
		}
		try := func(what string, message []byte, enrolled bool, uses ...int) acceptResult {
			t.Helper()
			var counts []*countingKey
			var statics []Static
			for _, key := range keys {
				c := &countingKey{Identity: key}
				counts, statics = append(counts, c), append(statics, c)
			}
			k := acceptBytesWith(t.Context(), statics, profile, framed(message), enrolled)
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
			if k := try("a stranger", m1(public, public), false, uses...); k.err != ErrNotEnrolled || k.asked != 1 {
				t.Errorf("%s, key %d: %v", profile, i+1, k.err)
			}
			spoilt := m1(public, public)
			spoilt[len(spoilt)-1] ^= 1 // the key is right and the payload wrong: no other key is tried
			if k := try("a spoilt payload", spoilt, true, uses...); !errors.Is(k.err, ErrHandshake) || k.asked != 0 {
				t.Errorf("%s, key %d: %v", profile, i+1, k.err)
			}
		}
		other := identity(t).Public()
		if k := try("another key", m1(other, other), true, 1, 1, 1); !errors.Is(k.err, ErrHandshake) || k.asked != 0 {
			t.Errorf("%s: %v", profile, k.err)
		}
		// The exchange with a point of low order fails with every key, so one key is tried.
		zeros := make([]byte, len(m1(other, other)))
		if k := try("nothing but zeros", zeros, true, 1, 0, 0); !errors.Is(k.err, ErrHandshake) {
			t.Errorf("%s: %v", profile, k.err)
		}
		if profile == PubkyV1 { // an identity payload is valid towards one static key only
			m := m1(keys[1].Public(), keys[0].Public())
			if k := try("bound to the other key", m, true, 1, 2, 0); !errors.Is(k.err, ErrIdentity) {
				t.Error(k.err)
			}
		}
	}
	k := acceptBytesWith(t.Context(), nil, CountersignV1, nil, true)
	if k.err == nil || errors.Is(k.err, ErrHandshake) {
		t.Errorf("no key at all: %v", k.err)
	}
}

// TestDeviceErrorEndsTheHandshake checks that an error of a device is returned as such, without a
// try of the next key.
func TestDeviceErrorEndsTheHandshake(t *testing.T) {
	me, first, second := identity(t), identity(t), identity(t)
	for _, c := range []struct {
		name                string
		to                  *Identity
		failFirst, failNext int // number of the first failing exchange of each key
		uses, usesNext      int
	}{
		{"the first key's, for the second", second, 1, 9, 1, 0},
		{"the first key's, for itself", first, 1, 9, 1, 0},
		{"the first key's second exchange", first, 2, 9, 2, 0},
		{"the second key's", second, 9, 1, 1, 1},
		{"the second key's second exchange", second, 9, 2, 1, 2},
	} {
		a := &failingKey{countingKey{Identity: first}, c.failFirst}
		b := &failingKey{countingKey{Identity: second}, c.failNext}
		m := framed(message1(t, me, CountersignV1, c.to.Public(), nil))
		k := acceptBytesWith(t.Context(), []Static{a, b}, CountersignV1, m, true)
		if !errors.Is(k.err, errDevice) || len(k.sent) != 0 || k.asked != 0 ||
			a.uses != c.uses || b.uses != c.usesNext {
			t.Errorf("%s: %v, used %d and %d times", c.name, k.err, a.uses, b.uses)
		}
	}
	// The end of the context during an exchange ends the handshake too, even for a key that ignores
	// the context.
	ctx, cancel := context.WithCancel(t.Context())
	next := &countingKey{Identity: second}
	m := framed(message1(t, me, CountersignV1, second.Public(), nil))
	k := acceptBytesWith(ctx, []Static{&cancellingKey{first, cancel}, next}, CountersignV1, m, true)
	if !errors.Is(k.err, context.Canceled) || next.uses != 0 {
		t.Errorf("%v, used %d times", k.err, next.uses)
	}
}

// cancellingKey is a key with an exchange longer than the context's life.
type cancellingKey struct {
	*Identity
	end func()
}

func (e *cancellingKey) Exchange(ctx context.Context, peer [32]byte) ([32]byte, error) {
	e.end()
	return e.Identity.Exchange(ctx, peer)
}

// TestTwoStaticsOverTheWire serves clients of an old and of a new static key at one listener.
func TestTwoStaticsOverTheWire(t *testing.T) {
	old, young, me := identity(t), identity(t), identity(t)
	for _, server := range []*Identity{old, young} {
		c, s := pair(t)
		done := make(chan accepted, 1)
		go func() {
			enrolled := func(p [32]byte) bool { return p == me.Public() }
			conn, err := Accept(t.Context(), s, []Static{old, young}, CountersignV1, nil, enrolled)
			done <- accepted{conn, err}
		}()
		client, err := Connect(t.Context(), c, me, CountersignV1, server.Public(), nil)
		if err != nil {
			t.Fatal(err)
		}
		a := <-done
		if a.err != nil || a.conn.Static() != server.Public() || client.Static() != me.Public() ||
			client.Peer() != server.Public() {
			t.Fatalf("%v", a.err)
		}
		go client.WriteMessage([]byte("hello"))
		if m, err := a.conn.ReadMessage(); err != nil || string(m) != "hello" {
			t.Errorf("%q, %v", m, err)
		}
	}
}

// TestTheOtherProfileIsTold: a message 1 of the other profile is told apart from a message for
// another key, without a further use of a device.
func TestTheOtherProfileIsTold(t *testing.T) {
	me, server := identity(t), identity(t)
	payload, err := PubkyIdentity(testKey(7), me.Public(), server.Public(), "", time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		of, here Profile
		payload  []byte
		length   bool // the length tells, before a use
	}{
		{CountersignV1, PubkyV1, nil, false},
		{PubkyV1, CountersignV1, nil, false},
		{PubkyV1, CountersignV1, payload, true},
	} {
		keys := []*countingKey{{Identity: identity(t)}, {Identity: server}}
		k := acceptBytesWith(t.Context(), []Static{keys[0], keys[1]}, c.here,
			framed(message1(t, me, c.of, server.Public(), c.payload)), true)
		var wrong *ProfileError
		if !errors.As(k.err, &wrong) || wrong.Profile != c.here || k.asked != 0 || len(k.sent) > 0 {
			t.Fatalf("%s at %s: %v, asked %d times", c.of, c.here, k.err, k.asked)
		}
		claimed, uses := me.Public(), 1
		if c.length {
			claimed, uses = [32]byte{}, 0
		}
		if wrong.Claimed != claimed || keys[0].uses != uses || keys[1].uses != uses ||
			errors.Is(k.err, ErrFrame) != c.length || errors.Is(k.err, ErrHandshake) == c.length {
			t.Errorf("%s at %s: %v claims %x, %d and %d uses", c.of, c.here, k.err, wrong.Claimed,
				keys[0].uses, keys[1].uses)
		}
	}
	k := acceptBytesWith(t.Context(), []Static{&countingKey{Identity: server}}, CountersignV1,
		framed(message1(t, me, CountersignV1, me.Public(), nil)), true)
	if !errors.Is(k.err, ErrServerKey) || errors.As(k.err, new(*ProfileError)) {
		t.Errorf("another key: %v", k.err)
	}
}
