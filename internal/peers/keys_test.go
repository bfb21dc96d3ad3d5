package peers

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"

	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/ledger/disktest"
	"countersign/internal/manage"
)

// TestKeysOfPeers: a new key works beside the old one until the old one is removed. A public key
// belongs to one peer. The last key stays.
func TestKeysOfPeers(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	second, third := publicKey(9), publicKey(10)
	add := func(name string, key [32]byte) func() error {
		return func() error { return r.AddKey(ctx, operator, name, key[:]) }
	}
	remove := func(name string, key [32]byte) func() error {
		return func() error { return r.RemoveKey(ctx, operator, name, key) }
	}
	for _, step := range []struct {
		act  string
		do   func() error
		want error
		in   string // the active keys, of shop, cafe, second and third
	}{
		{"the last key", remove("shop", shop), manage.ErrConflict, "shop cafe"},
		{"a new key", add("shop", second), nil, "shop cafe second"},
		{"the key again", add("shop", second), manage.ErrExists, "shop cafe second"},
		{"the key for another peer", add("cafe", second), manage.ErrExists, "shop cafe second"},
		{"a new peer with the key", func() error {
			_, err := r.Add(ctx, operator, "other", second[:])
			return err
		}, manage.ErrExists, "shop cafe second"},
		{"a key for nobody", add("nobody", third), manage.ErrNotFound, "shop cafe second"},
		{"no key", add("shop", [32]byte{}), manage.ErrInvalid, "shop cafe second"},
		{"another peer's key", remove("shop", cafe), manage.ErrNotFound, "shop cafe second"},
		{"a stranger's key", remove("shop", third), manage.ErrNotFound, "shop cafe second"},
		{"a key of nobody", remove("nobody", shop), manage.ErrNotFound, "shop cafe second"},
		{"suspend", func() error { return r.Suspend(ctx, operator, "shop") }, nil, "cafe"},
		{"a key of a suspended peer", add("shop", third), nil, "cafe"},
		{"the old key", remove("shop", shop), nil, "cafe"},
		{"the old key again", remove("shop", shop), manage.ErrNotFound, "cafe"},
		{"resume", func() error { return r.Resume(ctx, operator, "shop") }, nil, "cafe second third"},
		{"the removed key for another peer", add("cafe", shop), nil, "shop cafe second third"},
		{"remove the peer", func() error { return r.Remove(ctx, operator, "shop") }, nil, "shop cafe"},
		{"a freed key", add("cafe", second), nil, "shop cafe second"},
	} {
		if err := step.do(); !errors.Is(err, step.want) || (err == nil) != (step.want == nil) {
			t.Errorf("%s: %v, want %v", step.act, err, step.want)
		}
		var in []string
		for i, key := range [][32]byte{shop, cafe, second, third} {
			if r.In(key) {
				in = append(in, []string{"shop", "cafe", "second", "third"}[i])
			}
		}
		if got := strings.Join(in, " "); got != step.in {
			t.Errorf("%s: %s are active, want %s", step.act, got, step.in)
		}
		r.agrees(t)
	}
	r.restart(t)
	if !r.In(second) || len(r.All()) != 1 {
		t.Errorf("after a restart: %+v", r.All())
	}
}

// TestMostKeys: a peer has at most MaxKeys keys.
func TestMostKeys(t *testing.T) {
	r := newRig(t)
	for n := range byte(MaxKeys) {
		key := publicKey(100 + n)
		err := r.AddKey(t.Context(), operator, "shop", key[:])
		if full := n == MaxKeys-1; errors.Is(err, manage.ErrConflict) != full || err != nil && !full {
			t.Errorf("key %d: %v", n+2, err)
		}
	}
	if s, err := r.Status("shop"); err != nil || len(s.Keys) != MaxKeys || s.Keys[0].PublicKey != shop {
		t.Errorf("%+v, %v", s, err)
	}
}

// TestRemovedKey: the sessions of a removed key are closed, refused and not served. The other
// sessions of the peer, its acknowledgements and its limits stay.
func TestRemovedKey(t *testing.T) {
	r := newRig(t)
	second := publicKey(9)
	if err := r.AddKey(t.Context(), operator, "shop", second[:]); err != nil {
		t.Fatal(err)
	}
	r.acknowledge(t, "shop", shop, 3)
	old, oldConn := r.enter(t, shop)
	young, youngConn := r.enter(t, second)
	if _, err := r.Enter(second, new(conn), netip.Addr{}); !errors.Is(err, ErrTooMany) {
		t.Errorf("a second key gives the peer more connections: %v", err)
	}
	if err := r.RemoveKey(t.Context(), operator, "shop", shop); err != nil {
		t.Fatal(err)
	}
	if !oldConn.closed.Load() || youngConn.closed.Load() {
		t.Errorf("closed: %v and %v", oldConn.closed.Load(), youngConn.closed.Load())
	}
	for s, want := range map[*Session]error{old: ErrGone, young: nil} {
		if begun, serves := r.Begin(s, 1), r.Serves(s.Peer); !errors.Is(begun, want) || !errors.Is(serves, want) {
			t.Errorf("%x: %v and %v, want %v", s.Peer.PublicKey[:1], begun, serves, want)
		}
	}
	r.End(young.Member, 1)
	r.Leave(old)
	r.Leave(young)
	if got := r.knownOf(young.Member, "payments"); got != 3 {
		t.Errorf("acknowledged by the old key: version %d, want 3", got)
	}
	r.acknowledge(t, "shop", second, 4)
	if s, err := r.Status("shop"); err != nil || len(s.Keys) != 1 || s.Keys[0].Seen.IsZero() || s.Connections != 0 {
		t.Errorf("%+v, %v", s, err)
	}
	if err := r.Acknowledge(t.Context(), old.Peer, operator, "payments", 5, announced); !errors.Is(err, ErrGone) {
		t.Errorf("an acknowledgement by the removed key: %v", err)
	}
}

// TestKeyRemovalWithoutADisk: the key is refused from the call on, also when the disk takes writes
// again. The other key can't be removed then, in memory the last one. A second RemoveKey works.
func TestKeyRemovalWithoutADisk(t *testing.T) {
	disk := disktest.New(t)
	r := newRigIn(t, disk.Dir(), limits)
	second := publicKey(9)
	if err := r.AddKey(t.Context(), operator, "shop", second[:]); err != nil {
		t.Fatal(err)
	}
	disk.Fail(func(op disktest.Op) syscall.Errno {
		if op.Kind == disktest.Datasync || op.Kind == disktest.Sync {
			return 0
		}
		return syscall.EROFS
	})
	if err := r.RemoveKey(t.Context(), operator, "shop", shop); !errors.Is(err, ledger.ErrDisk) {
		t.Errorf("%v, want %v", err, ledger.ErrDisk)
	}
	disk.Fail(nil)
	r.acknowledge(t, "shop", second, 1) // writes the record, which still has the key
	if err := r.WriteSeen(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r.In(shop) || !r.In(second) {
		t.Errorf("active: %v and %v", r.In(shop), r.In(second))
	}
	if err := r.RemoveKey(t.Context(), operator, "shop", second); !errors.Is(err, manage.ErrConflict) {
		t.Errorf("the other key: %v, want %v", err, manage.ErrConflict)
	}
	if err := r.RemoveKey(t.Context(), operator, "shop", shop); err != nil {
		t.Errorf("again: %v", err)
	}
	r.agrees(t)
}

// TestKeyActsAtRandom has acts on keys whose callers leave: memory and ledger agree, a key has one
// owner, and a peer has one to MaxKeys keys.
func TestKeyActsAtRandom(t *testing.T) {
	r := newRig(t)
	random := rand.New(rand.NewPCG(1, 2))
	gone, leave := context.WithCancel(t.Context())
	leave()
	for range 300 {
		ctx := t.Context()
		if random.IntN(3) == 0 {
			ctx = gone
		}
		name, key := fmt.Sprintf("p%d", random.IntN(3)), publicKey(byte(100+random.IntN(12)))
		switch random.IntN(6) {
		case 0:
			r.Add(ctx, operator, name, key[:])
		case 1:
			r.Remove(ctx, operator, name)
			r.Remove(t.Context(), operator, name) // an exclusion that was not written is repeated
		case 2:
			r.Suspend(t.Context(), operator, name)
			r.Resume(t.Context(), operator, name)
		case 3:
			r.AddKey(ctx, operator, name, key[:])
		default:
			r.RemoveKey(ctx, operator, name, key)
			r.RemoveKey(t.Context(), operator, name, key)
			if s, err := r.Status(name); err == nil && r.In(key) && len(s.Keys) > 1 {
				for _, k := range s.Keys {
					if k.PublicKey == key {
						t.Fatalf("the key is active after its removal: %+v", s)
					}
				}
			}
		}
		r.agrees(t)
		owners := map[[32]byte]string{}
		for _, s := range r.All() {
			if len(s.Keys) == 0 || len(s.Keys) > MaxKeys {
				t.Fatalf("%+v", s)
			}
			for _, k := range s.Keys {
				if owner := owners[k.PublicKey]; owner != "" {
					t.Fatalf("the key %x is of %s and of %s", k.PublicKey[:1], owner, s.Name)
				}
				owners[k.PublicKey] = s.Name
			}
		}
	}
}

// TestCompromiseIsForEachKey: a compromise that was acknowledged with one key is still news for the
// programs with the other keys, also after the removal of that key, and after a restart.
func TestCompromiseIsForEachKey(t *testing.T) {
	r := newRig(t)
	second := publicKey(9)
	if err := r.AddKey(t.Context(), operator, "shop", second[:]); err != nil {
		t.Fatal(err)
	}
	acknowledge := func(key [32]byte) {
		t.Helper()
		p := Peer{Name: "shop", PublicKey: key}
		if err := r.AcknowledgeCompromise(t.Context(), p, audit.Peer("shop", key), "payments", 1); err != nil {
			t.Fatal(err)
		}
	}
	warned := func(when string, want bool, unwarned ...string) {
		t.Helper()
		s, _ := r.enter(t, second)
		defer r.Leave(s)
		if got, late := r.Warned(s, "payments", 1), r.Unwarned("payments", 1); got != want ||
			!slices.Equal(late, unwarned) {
			t.Errorf("%s: the second key: %v, want %v; not acknowledged by %q, want %q",
				when, got, want, late, unwarned)
		}
	}
	acknowledge(shop)
	acknowledge(shop) // once more
	warned("acknowledged with the first key", false, "cafe", "shop")
	r.restart(t)
	warned("after a restart", false, "cafe", "shop")
	if err := r.RemoveKey(t.Context(), operator, "shop", shop); err != nil {
		t.Fatal(err)
	}
	warned("after the removal of the first key", false, "cafe", "shop")
	acknowledge(second)
	warned("acknowledged with the second key", true, "cafe")
	r.restart(t)
	warned("after another restart", true, "cafe")
}

// TestSpareKeyIsNotWaitedFor: no acknowledgement is missing from a key that was never used.
func TestSpareKeyIsNotWaitedFor(t *testing.T) {
	r := newRig(t)
	spare := publicKey(9)
	if err := r.AddKey(t.Context(), operator, "shop", spare[:]); err != nil {
		t.Fatal(err)
	}
	if got := r.Unwarned("payments", 1); !slices.Equal(got, []string{"cafe", "shop"}) {
		t.Errorf("peers that were never seen: %q", got)
	}
	p := Peer{Name: "shop", PublicKey: shop}
	if err := r.AcknowledgeCompromise(t.Context(), p, audit.Peer("shop", shop), "payments", 1); err != nil {
		t.Fatal(err)
	}
	if got := r.Unwarned("payments", 1); !slices.Equal(got, []string{"cafe"}) {
		t.Errorf("beside a spare key: %q", got)
	}
	s, _ := r.enter(t, spare)
	r.Leave(s)
	if got := r.Unwarned("payments", 1); !slices.Equal(got, []string{"cafe", "shop"}) {
		t.Errorf("after the first session with the spare key: %q", got)
	}
}

// TestRotationIsToldToEachKey: a rotation that was acknowledged with one key counts for the peer,
// and is still news for the program with another key. An announcement in its place is news for
// both.
func TestRotationIsToldToEachKey(t *testing.T) {
	r := newRig(t)
	second := publicKey(9)
	if err := r.AddKey(t.Context(), operator, "shop", second[:]); err != nil {
		t.Fatal(err)
	}
	knows := func(when string, peer, by, bySecond uint32) {
		t.Helper()
		s, _ := r.enter(t, shop)
		defer r.Leave(s)
		other, _ := r.enter(t, second)
		defer r.Leave(other)
		p, a, b := r.knownOf(s.Member, "payments"), r.Known(s, "payments"), r.Known(other, "payments")
		if p != peer || a != by || b != bySecond {
			t.Errorf("%s: %d, by its keys %d and %d; want %d, %d, %d", when, p, a, b, peer, by, bySecond)
		}
	}
	r.acknowledge(t, "shop", shop, 3)
	knows("acknowledged with one key", 3, 3, 0)
	r.acknowledge(t, "shop", second, 2)
	knows("an older version with the other key", 3, 3, 2)
	r.restart(t)
	knows("after a restart", 3, 3, 2)
	r.acknowledge(t, "shop", second, 3)
	r.change(t, func(tx *ledger.Tx) error { return Forget(tx, "payments", 3) })
	knows("replaced", 2, 2, 2)
}
