package peers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"testing"

	"countersign/audit"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/ledger/ledgertest"
	"countersign/internal/manage"
)

// rig is a registry on a real ledger, with two peers.
type rig struct {
	*Registry
	path string
}

// shop is the public key of the peer "shop".
var shop = [32]byte(bytes.Repeat([]byte{7}, 32))

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{path: filepath.Join(t.TempDir(), "ledger.db")}
	if err := ledger.Create(r.path, ledger.Options{}); err != nil {
		t.Fatal(err)
	}
	r.open(t)
	t.Cleanup(func() { r.ledger.Close() })
	for name, key := range map[string]byte{"shop": 7, "cafe": 8} {
		if _, err := r.Add(t.Context(), audit.Operator("test"), name, bytes.Repeat([]byte{key}, 32)); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

func (r *rig) open(t *testing.T) {
	t.Helper()
	l, err := ledgertest.Open(t, r.path, ledger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	limits := Limits{Connections: 2, Requests: 10, RequestsOfPeer: 5, RequestsPerSecond: 100, RefusalsPerMinute: 60, BatchItems: 10}
	if r.Registry, err = Open(t.Context(), l, limits, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
}

// TestCallerLeavesAManagementAct: whether the caller waits or not, memory and ledger agree.
func TestCallerLeavesAManagementAct(t *testing.T) {
	r := newRig(t)
	who := audit.Operator("test")
	gone, leave := context.WithCancel(t.Context())
	leave()
	for n := range byte(20) {
		name, key := fmt.Sprintf("p%d", n), bytes.Repeat([]byte{100 + n}, 32)
		r.Add(gone, who, name, key)
		r.agrees(t)
		if _, err := r.Add(t.Context(), who, name, key); err != nil && !errors.Is(err, manage.ErrExists) {
			t.Fatal(err)
		}
		r.Remove(gone, who, name)
		if r.In([32]byte(key)) {
			t.Fatal("the peer is still let in")
		}
		if err := r.Remove(t.Context(), who, name); err != nil && !errors.Is(err, manage.ErrNotFound) {
			t.Fatal(err)
		}
		r.agrees(t)
	}
	if len(r.All()) != 2 {
		t.Errorf("%d peers are left", len(r.All()))
	}
}

// TestRemovedPeerStaysRemoved: a removal whose caller left while a request was with the device, the same key enrolled
// under another name, and that removed too. After a restart nobody is back.
func TestRemovedPeerStaysRemoved(t *testing.T) {
	r := newRig(t)
	who := audit.Operator("test")
	gone, leave := context.WithCancel(t.Context())
	leave()
	r.Remove(gone, who, "shop")
	if r.In(shop) {
		t.Error("it is not cut off at once")
	}
	if _, err := r.Add(t.Context(), who, "shop2", shop[:]); err != nil && !errors.Is(err, manage.ErrExists) {
		t.Fatal(err)
	}
	for _, name := range []string{"shop", "shop2"} {
		if err := r.Remove(t.Context(), who, name); err != nil && !errors.Is(err, manage.ErrNotFound) {
			t.Fatal(err)
		}
	}
	r.ledger.Close()
	r.open(t)
	if r.In(shop) {
		t.Error("it is back after a restart")
	}
}

// TestRemovingWaitsForNobody: another act hangs; the peer is cut off all the same.
func TestRemovingWaitsForNobody(t *testing.T) {
	r := newRig(t)
	if err := r.enrolling.Acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Remove(ctx, audit.Operator("test"), "shop"); !errors.Is(err, keystore.ErrUnavailable) {
		t.Errorf("%v, want %v", err, keystore.ErrUnavailable)
	}
	if r.In(shop) {
		t.Error("the peer is still let in")
	}
	r.enrolling.Release()
}

// agrees compares the peers in memory with those in the ledger, when no act is under way.
func (r *rig) agrees(t *testing.T) {
	t.Helper()
	if err := r.enrolling.Acquire(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer r.enrolling.Release()
	var onDisk, inMemory []string
	r.ledger.All(ledger.Peers, func(name string, _ []byte) error { onDisk = append(onDisk, name); return nil })
	for _, p := range r.All() {
		inMemory = append(inMemory, p.Name)
	}
	if !slices.Equal(onDisk, inMemory) {
		t.Fatalf("in the ledger %q, in memory %q", onDisk, inMemory)
	}
}
