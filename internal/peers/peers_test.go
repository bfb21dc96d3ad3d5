package peers

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"countersign/audit"
	"countersign/internal/gate"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/ledger/disktest"
	"countersign/internal/ledger/ledgertest"
	"countersign/internal/manage"
	"countersign/internal/scantest"
)

func TestMain(m *testing.M) {
	disktest.Serve() // in the process of a test's disk
	os.Exit(scantest.Run(m))
}

var operator = audit.Operator("test")

// rig is a registry on a real ledger, with the peers "shop" and "cafe".
type rig struct {
	*Registry
	path string
}

// The public keys of the two peers.
var shop, cafe = publicKey(7), publicKey(8)

func publicKey(b byte) [32]byte { return [32]byte(bytes.Repeat([]byte{b}, 32)) }

var limits = Limits{
	Connections: 2, Requests: 10, RequestsOfPeer: 5, RequestsPerSecond: 100, BytesPerSecond: 1_000_000,
	RefusalsPerMinute: 60, BatchItems: 10,
}

func newRig(t *testing.T) *rig {
	t.Helper()
	return newRigIn(t, t.TempDir(), limits)
}

// newRigIn makes a rig with its ledger in a directory. At the end of the test the memory must agree
// with the ledger.
func newRigIn(t *testing.T, dir string, limits Limits) *rig {
	t.Helper()
	r := &rig{path: filepath.Join(dir, "ledger.db")}
	if err := ledger.Create(r.path, ledger.Options{}); err != nil {
		t.Fatal(err)
	}
	r.open(t, limits)
	t.Cleanup(func() {
		r.agrees(t)
		r.ledger.Close()
	})
	for name, key := range map[string][32]byte{"shop": shop, "cafe": cafe} {
		r.add(t, name, key)
	}
	return r
}

func (r *rig) open(t *testing.T, limits Limits) {
	t.Helper()
	l, err := ledgertest.Open(t, r.path, ledger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if r.Registry, err = Open(t.Context(), l, gate.New(l), limits, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
}

func (r *rig) restart(t *testing.T) {
	t.Helper()
	r.ledger.Close()
	r.open(t, r.limits)
}

func (r *rig) add(t *testing.T, name string, key [32]byte) {
	t.Helper()
	if _, err := r.Add(t.Context(), operator, name, key[:]); err != nil {
		t.Fatal(err)
	}
}

func announced(*ledger.Tx) error { return nil }

// knownOf returns the last version of a key that a member has acknowledged with any of its keys.
func (r *Registry) knownOf(m *Member, key string) uint32 {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return m.known[key]
}

// acknowledge has a peer acknowledge a version of the key "payments".
func (r *rig) acknowledge(t *testing.T, name string, key [32]byte, version uint32) {
	t.Helper()
	p := Peer{Name: name, PublicKey: key}
	if err := r.Acknowledge(t.Context(), p, audit.Peer(name, key), "payments", version, announced); err != nil {
		t.Fatal(err)
	}
}

// change changes records of peers as a replica does: in the ledger, without a call of the registry.
func (r *rig) change(t *testing.T, change func(*ledger.Tx) error) {
	t.Helper()
	if err := r.ledger.Update(t.Context(), change); err != nil {
		t.Fatal(err)
	}
}

// rewrite changes one record as a replica does.
func (r *rig) rewrite(t *testing.T, name string, change func(*record)) {
	t.Helper()
	r.change(t, func(tx *ledger.Tx) error {
		rec, err := decode(name, tx.Get(ledger.Peers, name))
		if err != nil {
			return err
		}
		change(&rec)
		return tx.Put(ledger.Peers, name, manage.Encode(rec))
	})
}

// agrees compares the memory with the memory of a second registry, which reads the same ledger
// anew.
func (r *rig) agrees(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
	defer cancel()
	if err := r.enrolling.Acquire(ctx); err != nil { // no act is under way
		t.Fatal(err)
	}
	defer r.enrolling.Release()
	if err := r.WriteSeen(ctx); err != nil {
		t.Fatal(err)
	}
	second, err := Open(ctx, r.ledger, r.gate, r.limits, r.log)
	if err != nil {
		t.Fatal(err)
	}
	if memory, read := r.dump(), second.dump(); memory != read {
		t.Errorf("the memory has\n%swhile the ledger has\n%s", memory, read)
	}
}

// dump prints the memory that follows the ledger, one line for each peer.
func (r *Registry) dump() string {
	r.mu.RLock()
	defer r.mu.RUnlock()
	var lines []string
	for key, m := range r.members {
		k := m.keys[key]
		lines = append(lines, fmt.Sprintf("%s %x %v of %d added %d, %d seen %d, %d written %d suspended %v "+
			"removed %v, %v known %v\n", m.Name, key, r.names[m.Name] == m, len(m.keys), m.Added.Unix(),
			k.Added.Unix(), m.seen.Unix(), k.Seen.Unix(), m.written.Unix(), m.suspended, m.removed, k.removed, m.known))
	}
	slices.Sort(lines)
	return strings.Join(lines, "")
}

// events returns the number of events in the audit log.
func (r *rig) events() uint64 {
	_, first, tree := r.ledger.Head()
	return first + tree.Size
}

// conn is a connection that can be closed.
type conn struct{ closed atomic.Bool }

func (c *conn) Close() error { c.closed.Store(true); return nil }

func (r *rig) enter(t *testing.T, key [32]byte) (*Session, *conn) {
	t.Helper()
	c := new(conn)
	s, err := r.Enter(key, c, netip.MustParseAddr("192.0.2.1"))
	if err != nil {
		t.Fatal(err)
	}
	return s, c
}

// TestMemoryFollowsActs compares memory and ledger after each kind of act.
func TestMemoryFollowsActs(t *testing.T) {
	r := newRig(t)
	ctx := t.Context()
	other := publicKey(9)
	both := map[[32]byte]bool{shop: true, cafe: true}
	acknowledge := func() error { r.acknowledge(t, "shop", shop, 2); return nil }
	forget := func() error {
		return r.ledger.Update(ctx, func(tx *ledger.Tx) error { return Forget(tx, "payments", 2) })
	}
	for _, step := range []struct {
		act  string
		do   func() error
		want map[[32]byte]bool // the active peers
	}{
		{"suspend", func() error { return r.Suspend(ctx, operator, "shop") }, map[[32]byte]bool{cafe: true}},
		{"suspend again", func() error { return r.Suspend(ctx, operator, "shop") }, map[[32]byte]bool{cafe: true}},
		{"resume", func() error { return r.Resume(ctx, operator, "shop") }, both},
		{"resume again", func() error { return r.Resume(ctx, operator, "shop") }, both},
		{"acknowledge", acknowledge, both},
		{"forget", forget, both},
		{"remove", func() error { return r.Remove(ctx, operator, "shop") }, map[[32]byte]bool{cafe: true}},
		{"add the name with another key", func() error { r.add(t, "shop", other); return nil },
			map[[32]byte]bool{other: true, cafe: true}},
		{"add the key with another name", func() error { r.add(t, "shop2", shop); return nil },
			map[[32]byte]bool{other: true, shop: true, cafe: true}},
	} {
		if err := step.do(); err != nil {
			t.Errorf("%s: %v", step.act, err)
		}
		for _, key := range [][32]byte{shop, cafe, other} {
			if r.In(key) != step.want[key] {
				t.Errorf("%s: the key %x is active: %v", step.act, key[:1], r.In(key))
			}
		}
		r.agrees(t)
	}
	for name, want := range map[string]bool{"shop": true, "shop2": true, "cafe": true, "nobody": false} {
		if r.Enrolled(name) != want {
			t.Errorf("%s is enrolled: %v", name, !want)
		}
	}
}

// TestMemoryFollowsTheLedger changes records without a call of the registry, as a replica does.
func TestMemoryFollowsTheLedger(t *testing.T) {
	r := newRig(t)
	session, _ := r.enter(t, shop)
	r.rewrite(t, "shop", func(rec *record) { rec.Suspended = true })
	if err := r.Begin(session, 1); !errors.Is(err, ErrGone) || r.In(shop) {
		t.Errorf("suspended in the ledger: %v", err)
	}
	r.rewrite(t, "shop", func(rec *record) { rec.Suspended = false })
	if err := r.Begin(session, 1); err != nil || !r.In(shop) {
		t.Errorf("resumed in the ledger: %v", err)
	}
	r.rewrite(t, "shop", func(rec *record) { rec.Known = map[string]uint32{"payments": 3} })
	if got := r.knownOf(session.Member, "payments"); got != 3 {
		t.Errorf("acknowledged in the ledger: version %d, want 3", got)
	}
	other := publicKey(9)
	r.rewrite(t, "shop", func(rec *record) { rec.Keys[0].PublicKey = other })
	if err := r.Begin(session, 1); !errors.Is(err, ErrGone) || r.In(shop) || !r.In(other) {
		t.Errorf("another key in the ledger: %v", err)
	}
	r.agrees(t)
	r.change(t, func(tx *ledger.Tx) error { // one transaction moves the key to another name
		value := tx.Get(ledger.Peers, "shop")
		return errors.Join(tx.Delete(ledger.Peers, "shop"), tx.Put(ledger.Peers, "shop2", value))
	})
	if !r.In(other) || r.Enrolled("shop") || !r.Enrolled("shop2") {
		t.Errorf("%+v", r.All())
	}
	r.change(t, func(tx *ledger.Tx) error { return tx.Delete(ledger.Peers, "shop2") })
	if r.In(other) || len(r.All()) != 1 {
		t.Errorf("removed in the ledger: %+v", r.All())
	}
	r.End(session.Member, 1)
	r.Leave(session)
}

// TestDamagedRecords: Open names the record that it can't use.
func TestDamagedRecords(t *testing.T) {
	good := manage.Encode(record{Keys: []keyRecord{{PublicKey: shop}}})
	for want, damage := range map[string][]byte{
		`peers "cafe" and "shop" in the ledger have the same public key`: good,
		`peer "cafe" in the ledger has no public key`:                    []byte(`{"keys":[]}`),
		`peer "cafe" in the ledger: "00" is no public key`:               []byte(`{"keys":[{"public_key":"00"}]}`),
		`peer "cafe" in the ledger: unexpected end`:                      []byte(`{`),
	} {
		path := filepath.Join(t.TempDir(), "ledger.db")
		if err := ledger.Create(path, ledger.Options{}); err != nil {
			t.Fatal(err)
		}
		l, err := ledgertest.Open(t, path, ledger.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Update(t.Context(), func(tx *ledger.Tx) error {
			return errors.Join(tx.Put(ledger.Peers, "cafe", damage), tx.Put(ledger.Peers, "shop", good))
		}); err != nil {
			t.Fatal(err)
		}
		_, err = Open(t.Context(), l, gate.New(l), limits, slog.New(slog.DiscardHandler))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
		l.Close()
	}
}

// TestCallerLeavesAManagementAct: memory and ledger agree, whether the caller waits or not.
func TestCallerLeavesAManagementAct(t *testing.T) {
	r := newRig(t)
	gone, leave := context.WithCancel(t.Context())
	leave()
	for n := range byte(20) {
		name, key := fmt.Sprintf("p%d", n), publicKey(100+n)
		r.Add(gone, operator, name, key[:])
		r.agrees(t)
		if _, err := r.Add(t.Context(), operator, name, key[:]); err != nil && !errors.Is(err, manage.ErrExists) {
			t.Fatal(err)
		}
		r.Remove(gone, operator, name)
		if r.In(key) {
			t.Fatal("the peer is still active")
		}
		if err := r.Remove(t.Context(), operator, name); err != nil && !errors.Is(err, manage.ErrNotFound) {
			t.Fatal(err)
		}
		r.agrees(t)
	}
	if len(r.All()) != 2 {
		t.Errorf("%d peers are left", len(r.All()))
	}
}

// TestRemovedPeerStaysRemoved: the caller of a removal leaves during a request of the peer. Then
// the same key is enrolled under another name, and removed, too. After a restart no peer has the
// key.
func TestRemovedPeerStaysRemoved(t *testing.T) {
	r := newRig(t)
	gone, leave := context.WithCancel(t.Context())
	leave()
	r.Remove(gone, operator, "shop")
	if r.In(shop) {
		t.Error("the peer is not refused at once")
	}
	if _, err := r.Add(t.Context(), operator, "shop2", shop[:]); err != nil && !errors.Is(err, manage.ErrExists) {
		t.Fatal(err)
	}
	for _, name := range []string{"shop", "shop2"} {
		if err := r.Remove(t.Context(), operator, name); err != nil && !errors.Is(err, manage.ErrNotFound) {
			t.Fatal(err)
		}
	}
	r.restart(t)
	if r.In(shop) {
		t.Error("the peer is active after a restart")
	}
}

// TestExclusionWaitsForNoOtherAct: another act hangs. The peer is refused all the same, and its
// connection is closed.
func TestExclusionWaitsForNoOtherAct(t *testing.T) {
	for name, act := range map[string]func(*rig, context.Context) error{
		"remove":  func(r *rig, ctx context.Context) error { return r.Remove(ctx, operator, "shop") },
		"suspend": func(r *rig, ctx context.Context) error { return r.Suspend(ctx, operator, "shop") },
	} {
		r := newRig(t)
		session, c := r.enter(t, shop)
		if err := r.enrolling.Acquire(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := act(r, ctx); !errors.Is(err, keystore.ErrUnavailable) {
			t.Errorf("%s: %v, want %v", name, err, keystore.ErrUnavailable)
		}
		if r.In(shop) || !c.closed.Load() {
			t.Errorf("%s: the peer is still active", name)
		}
		r.Leave(session)
		r.enrolling.Release()
		if err := act(r, t.Context()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestExclusionWaitsForNoRequest: the act is on disk while a request of the peer is under way. The
// peer stays refused, although its record is written for another reason: the time of its last
// session. The request can't acknowledge a rotation any more.
func TestExclusionWaitsForNoRequest(t *testing.T) {
	for name, c := range map[string]struct {
		act     func(*rig) error
		written audit.Type
	}{
		"remove":  {func(r *rig) error { return r.Remove(t.Context(), operator, "shop") }, audit.PeerRemoved},
		"suspend": {func(r *rig) error { return r.Suspend(t.Context(), operator, "shop") }, audit.PeerSuspended},
	} {
		r := newRig(t)
		session, conn := r.enter(t, shop)
		if err := r.Begin(session, 1); err != nil {
			t.Fatal(err)
		}
		p := session.Peer
		if err := r.Serves(p); err != nil {
			t.Errorf("%s: before the act: %v", name, err)
		}
		before := r.events()
		if err := c.act(r); err != nil || !conn.closed.Load() {
			t.Errorf("%s: %v, the connection is closed: %v", name, err, conn.closed.Load())
		}
		err := r.Acknowledge(t.Context(), p, audit.Peer(p.Name, shop), "payments", 2, announced)
		if serves := r.Serves(p); !errors.Is(err, ErrGone) || !errors.Is(serves, ErrGone) {
			t.Errorf("%s: an acknowledgement: %v, a use: %v, want %v", name, err, serves, ErrGone)
		}
		if err := r.WriteSeen(t.Context()); err != nil {
			t.Fatal(err)
		}
		if r.In(shop) {
			t.Errorf("%s: the peer is active again", name)
		}
		if _, err := r.Enter(shop, conn, netip.Addr{}); !errors.Is(err, ErrGone) {
			t.Errorf("%s: a new session: %v, want %v", name, err, ErrGone)
		}
		if err := r.Begin(session, 1); !errors.Is(err, ErrGone) {
			t.Errorf("%s: a new request: %v, want %v", name, err, ErrGone)
		}
		r.End(session.Member, 1)
		r.Leave(session)
		if got := r.events(); got != before+1 {
			t.Errorf("%s: %d events, want that of the act", name, got-before)
		}
		var last audit.Type
		if err := r.ledger.Events(before, func(_ uint64, b []byte) bool {
			e, err := audit.Decode(b)
			if err != nil {
				t.Error(err)
			}
			last = e.Type
			return true
		}); err != nil {
			t.Fatal(err)
		}
		if last != c.written {
			t.Errorf("%s: the last event is %s, want %s", name, last, c.written)
		}
	}
}

// TestSuspensionWithoutADisk: the peer is refused from the call on, also when the disk takes writes
// again and the peer's record is written for other reasons. Resume and a second Suspend work.
func TestSuspensionWithoutADisk(t *testing.T) {
	disk := disktest.New(t)
	r := newRigIn(t, disk.Dir(), limits)
	session, _ := r.enter(t, shop)
	r.Leave(session)
	fail := func() {
		t.Helper()
		disk.Fail(func(op disktest.Op) syscall.Errno {
			if op.Kind == disktest.Datasync || op.Kind == disktest.Sync {
				return 0
			}
			return syscall.EROFS
		})
		if err := r.Suspend(t.Context(), operator, "shop"); !errors.Is(err, ledger.ErrDisk) {
			t.Errorf("%v, want %v", err, ledger.ErrDisk)
		}
		disk.Fail(nil)
		if err := r.WriteSeen(t.Context()); err != nil {
			t.Fatal(err)
		}
		r.acknowledge(t, "cafe", cafe, 1)
		if r.In(shop) || !r.All()[1].Suspended {
			t.Errorf("the peer is active again: %+v", r.All())
		}
	}
	fail()
	if err := r.Resume(t.Context(), operator, "shop"); err != nil || !r.In(shop) {
		t.Errorf("resume: %v, active: %v", err, r.In(shop))
	}
	r.agrees(t)
	fail()
	if err := r.Suspend(t.Context(), operator, "shop"); err != nil || r.In(shop) {
		t.Errorf("suspend: %v, active: %v", err, r.In(shop))
	}
	r.rewrite(t, "shop", func(rec *record) { rec.Suspended = false }) // the memory follows the ledger again
	if !r.In(shop) {
		t.Error("resumed in the ledger, and refused in memory")
	}
}

// TestAcknowledge: an acknowledgement is one event, an older or repeated one is none. Only the
// enrolled peer can acknowledge.
func TestAcknowledge(t *testing.T) {
	r := newRig(t)
	before := r.events()
	for _, version := range []uint32{2, 2, 1, 0} {
		r.acknowledge(t, "shop", shop, version)
	}
	if n := r.events() - before; n != 1 {
		t.Errorf("%d events, want 1", n)
	}
	r.acknowledge(t, "shop", shop, 3)
	if n := r.events() - before; n != 2 {
		t.Errorf("%d events, want 2", n)
	}
	r.agrees(t)
	for _, stranger := range []Peer{{Name: "shop", PublicKey: publicKey(9)}, {Name: "cafe", PublicKey: shop}} {
		err := r.Acknowledge(t.Context(), stranger, audit.Peer("x", stranger.PublicKey), "payments", 4, announced)
		if !errors.Is(err, ErrGone) {
			t.Errorf("%+v: %v, want %v", stranger, err, ErrGone)
		}
	}
	if n := r.events() - before; n != 2 {
		t.Errorf("%d events, want 2", n)
	}
}

// TestForget: the acknowledgements of one version of one key are removed, others stay.
func TestForget(t *testing.T) {
	r := newRig(t)
	third := publicKey(9)
	r.add(t, "third", third)
	r.acknowledge(t, "shop", shop, 3)
	r.acknowledge(t, "cafe", cafe, 2)
	orders := Peer{Name: "shop", PublicKey: shop}
	if err := r.Acknowledge(t.Context(), orders, audit.Peer("shop", shop), "orders", 3, announced); err != nil {
		t.Fatal(err)
	}
	r.change(t, func(tx *ledger.Tx) error { return Forget(tx, "payments", 3) })
	known := func() string {
		var all []string
		for _, key := range [][32]byte{shop, cafe, third} {
			m := r.members[key]
			all = append(all, fmt.Sprintf("%s %d %d", m.Name, r.knownOf(m, "payments"), r.knownOf(m, "orders")))
		}
		return strings.Join(all, ", ")
	}
	if got, want := known(), "shop 2 3, cafe 2 0, third 0 0"; got != want {
		t.Errorf("after Forget: %s, want %s", got, want)
	}
	if got := r.Unacknowledged("payments", 3); !slices.Equal(got, []string{"cafe", "shop", "third"}) {
		t.Errorf("version 3 is not acknowledged by %v", got)
	}
	r.change(t, func(tx *ledger.Tx) error { return Forget(tx, "payments", 3) }) // changes nothing
	r.acknowledge(t, "shop", shop, 3)
	if got, want := known(), "shop 3 3, cafe 2 0, third 0 0"; got != want {
		t.Errorf("acknowledged again: %s, want %s", got, want)
	}
}

// TestAcknowledged: only active peers count, and at least one peer of the list must be active.
func TestAcknowledged(t *testing.T) {
	r := newRig(t)
	r.acknowledge(t, "shop", shop, 2)
	check := func(what string, version uint32, list []string, all, want bool) {
		t.Helper()
		if got := r.Acknowledged("payments", version, list, all); got != want {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
	check("the list has the peer that has", 2, []string{"shop"}, false, true)
	check("an older version", 1, []string{"shop"}, false, true)
	check("a newer version", 3, []string{"shop"}, false, false)
	check("the list has another peer, too", 2, []string{"shop", "cafe"}, false, false)
	check("every peer", 2, nil, true, false)
	check("an empty list", 2, nil, false, false)
	check("a list without an enrolled peer", 2, []string{"nobody"}, false, false)
	if err := r.Suspend(t.Context(), operator, "cafe"); err != nil {
		t.Fatal(err)
	}
	check("the other peer is suspended", 2, []string{"shop", "cafe"}, false, true)
	check("every active peer", 2, nil, true, true)
	if got := r.Unacknowledged("payments", 2); len(got) > 0 {
		t.Errorf("not acknowledged by %v", got)
	}
	if err := r.Remove(t.Context(), operator, "shop"); err != nil {
		t.Fatal(err)
	}
	check("no peer is active", 2, nil, true, false)
}

// TestSeen: the ledger gets the time and the address of the last session in whole seconds, and a
// restarted registry has both. Peers that are not active are not remembered.
func TestSeen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		remembered := func() string {
			var all []string
			r.Remember(func(from netip.Addr, ago time.Duration) { all = append(all, fmt.Sprint(from, " ", ago)) })
			return strings.Join(all, ", ")
		}
		if got := remembered(); got != "" {
			t.Errorf("no peer has connected, and %s is remembered", got)
		}
		session, _ := r.enter(t, shop)
		time.Sleep(time.Minute)
		r.Leave(session)
		left := time.Now()
		time.Sleep(time.Minute)
		before := r.events()
		for range 2 { // the second time nothing has changed
			if err := r.WriteSeen(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if r.events() != before {
			t.Error("the time of a session is an event")
		}
		r.restart(t)
		if all := r.All(); !all[0].Seen.IsZero() || all[1].Seen.Unix() != left.Unix() || all[1].Connections != 0 {
			t.Errorf("after a restart: %+v, want shop at %v", all, left)
		}
		if got := remembered(); got != "192.0.2.1 1m0s" {
			t.Errorf("%q is remembered", got)
		}
		if err := r.Suspend(t.Context(), operator, "shop"); err != nil {
			t.Fatal(err)
		}
		if got := remembered(); got != "" {
			t.Errorf("the peer is suspended, and %s is remembered", got)
		}
	})
}

// TestStop: no act begins after Stop.
func TestStop(t *testing.T) {
	r := newRig(t)
	if err := r.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.Resume(ctx, operator, "shop"); !errors.Is(err, manage.ErrUnavailable) {
		t.Errorf("%v, want %v", err, manage.ErrUnavailable)
	}
	r.enrolling.Release()
}

// TestPeerKeyHasOneEncoding enrols a peer's key with its top bit set, which X25519 ignores, and
// keys that are no keys.
func TestPeerKeyHasOneEncoding(t *testing.T) {
	r := newRig(t)
	second := shop
	second[31] |= 0x80
	p := [32]byte{0xed, 31: 0x7f}
	for i := 1; i < 31; i++ {
		p[i] = 0xff
	}
	for what, key := range map[string][]byte{
		"a second encoding": second[:], "p, in place of 0": p[:], "low order": make([]byte, 32),
		"low order, encoded twice": append(make([]byte, 31), 0x80), "31 bytes": shop[:31], "nothing": nil,
	} {
		if _, err := r.Add(t.Context(), operator, "other", key); !errors.Is(err, manage.ErrInvalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if r.Enrolled("other") {
		t.Error("other is enrolled")
	}
}
