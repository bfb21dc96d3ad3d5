package appliance

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/policy"
	"countersign/wire"
)

// group makes a group or replaces its members.
func (r *rig) group(t *testing.T, name, of string, members ...string) {
	t.Helper()
	g, err := policy.NewGroup(name, of, members)
	if err != nil {
		t.Fatal(err)
	}
	before, _ := r.Group(name)
	if err := r.SetGroup(t.Context(), operator, g, before.Digest()); err != nil {
		t.Fatal(err)
	}
}

// TestGroupDecides: a decision sees the groups of the moment of its admission, also of a request
// that has waited. The record has the groups and the peer's key, and gives the decision again when
// the groups are others.
func TestGroupDecides(t *testing.T) {
	r := newRig(t)
	r.permits(t, `permit (principal in Group::"shops", action == Action::"sign", resource in KeyGroup::"money");`)
	sign := func(n int) error { _, err := r.Sign(t.Context(), r.shop, numbered(n, "m")); return err }
	denied := func(n int, what string) {
		t.Helper()
		if err := sign(n); !errors.Is(err, policy.ErrDenied) {
			t.Errorf("%s: %v, want %v", what, err, policy.ErrDenied)
		}
	}
	denied(1, "no group")
	r.group(t, "shops", policy.OfPeers, "cafe", "shop")
	denied(2, "no group of the key")
	r.group(t, "money", policy.OfKeys, "payments")
	if err := sign(3); err != nil {
		t.Error(err)
	}
	// The request was parsed before the change, and is admitted after it.
	key, err := r.Keys.Signing("payments")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := r.parse(t.Context(), r.shop, numbered(4, "m").Document)
	if err != nil {
		t.Fatal(err)
	}
	d, err := r.decisionOf(r.shop, key, 0, doc)
	if err != nil {
		t.Fatal(err)
	}
	r.group(t, "shops", policy.OfPeers, "cafe")
	if _, err := r.admit(t.Context(), r.shop, d, ledger.Admission{
		Scope: ledger.KeyScope("payments"), Nonce: doc.Nonce, Digest: doc.Digest(), KeyVersion: 1,
		ExpiresAt: doc.ExpiresAt,
	}); !errors.Is(err, policy.ErrDenied) {
		t.Errorf("a request that waited: %v, want %v", err, policy.ErrDenied)
	}
	denied(5, "no member any more")
	if _, err := r.Sign(t.Context(), r.cafe, numbered(6, "m")); err != nil {
		t.Error(err)
	}
	if _, err := r.Sign(t.Context(), r.shop, numbered(3, "m")); err != nil {
		t.Errorf("a repetition is not decided again: %v", err)
	}
	if err := r.RemoveGroup(t.Context(), operator, "money", groupDigest(t, r, "money")); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Sign(t.Context(), r.cafe, numbered(7, "m")); !errors.Is(err, policy.ErrDenied) {
		t.Errorf("a removed group: %v", err)
	}
	rules, err := r.policies.inForce()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	if err := r.Decisions(0, time.Time{}, func(d Decision) bool {
		rec, err := policy.ParseRecord(d.Record)
		if err == nil {
			err = rules.Replay(rec)
		}
		if err != nil {
			t.Errorf("event %d: %v", d.Event, err)
		}
		want := map[string]Caller{"shop": r.shop, "cafe": r.cafe}[rec.Peer]
		if rec.PeerKey != fmt.Sprintf("%x", want.PublicKey) {
			t.Errorf("event %d: by the key %s", d.Event, rec.PeerKey)
		}
		got = append(got, fmt.Sprint(rec.Peer, rec.PeerGroups, rec.KeyGroups, rec.Allowed))
		return true
	}); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"shop[] [] false", "shop[shops] [] false", "shop[shops] [money] true", "shop[] [money] false",
		"shop[] [money] false", "cafe[shops] [money] true", "cafe[shops] [] false",
	}
	if !slices.Equal(got, want) {
		t.Errorf("the decisions are\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func groupDigest(t *testing.T, r *rig, name string) string {
	t.Helper()
	g, err := r.Group(name)
	if err != nil {
		t.Fatal(err)
	}
	return g.Digest()
}

// TestGroupHasNames: a suspension, a removal and a new enrolment of a member change no group. A new
// member is enrolled or exists, and a member that was removed may stay.
func TestGroupHasNames(t *testing.T) {
	r := newRig(t)
	r.permits(t, `permit (principal in Group::"shops", action == Action::"sign", resource);`)
	r.group(t, "shops", policy.OfPeers, "shop")
	if err := r.Peers.Remove(t.Context(), operator, "shop"); err != nil {
		t.Fatal(err)
	}
	r.group(t, "shops", policy.OfPeers, "cafe", "shop")
	again := r.enrol(t, "shop", 9)
	if _, err := r.Sign(t.Context(), again, numbered(1, "m")); err != nil {
		t.Errorf("the next peer of the name: %v", err)
	}
	if got := r.GroupsOf(policy.OfPeers, "shop"); !slices.Equal(got, []string{"shops"}) {
		t.Errorf("shop is in %q", got)
	}
	if err := r.Peers.Remove(t.Context(), operator, "cafe"); err != nil {
		t.Fatal(err)
	}
	r.group(t, "shops", policy.OfPeers, "shop")
	g, err := policy.NewGroup("shops", policy.OfPeers, []string{"cafe", "shop"})
	if err != nil {
		t.Fatal(err)
	}
	err = r.SetGroup(t.Context(), operator, g, groupDigest(t, r, "shops"))
	if !errors.Is(err, manage.ErrInvalid) || !strings.Contains(err.Error(), `no Peer::"cafe"`) {
		t.Errorf("a peer that is enrolled no more: %v", err)
	}
}

// TestGroupChangesMeet: of two changes of the same members, one is carried out. Bounds hold for
// each peer and for all groups, and the kind of a group stays.
func TestGroupChangesMeet(t *testing.T) {
	r := newRig(t)
	set := func(name, of, replaces string, members ...string) error {
		g, err := policy.NewGroup(name, of, members)
		if err != nil {
			t.Fatal(err)
		}
		return r.SetGroup(t.Context(), operator, g, replaces)
	}
	r.group(t, "shops", policy.OfPeers, "shop")
	before := groupDigest(t, r, "shops")
	events := len(logOf(t, r.Appliance, 0))
	for what, err := range map[string]error{
		"made already":    set("shops", policy.OfPeers, policy.NoGroup, "cafe"),
		"another kind":    set("shops", policy.OfKeys, before, "payments"),
		"a removed group": set("others", policy.OfPeers, before, "shop"),
		"removed before":  r.RemoveGroup(t.Context(), operator, "shops", policy.NoGroup),
	} {
		if !errors.Is(err, manage.ErrConflict) {
			t.Errorf("%s: %v, want %v", what, err, manage.ErrConflict)
		}
	}
	if err := set("money", policy.OfKeys, policy.NoGroup, "shop"); !errors.Is(err, manage.ErrInvalid) {
		t.Errorf("a key that does not exist: %v", err)
	}
	if n := len(logOf(t, r.Appliance, 0)); n != events {
		t.Errorf("%d events of changes that were refused", n-events)
	}
	if err := set("shops", policy.OfPeers, before, "cafe"); err != nil {
		t.Error(err)
	}
	if err := set("shops", policy.OfPeers, before, "cafe", "shop"); !errors.Is(err, manage.ErrConflict) {
		t.Errorf("the second of two changes: %v", err)
	}
	for n := range policy.MaxGroupsOf {
		r.group(t, fmt.Sprintf("g%d", n), policy.OfPeers, "shop")
	}
	err := set("shops", policy.OfPeers, groupDigest(t, r, "shops"), "cafe", "shop")
	if !errors.Is(err, manage.ErrConflict) {
		t.Errorf("one group more for a peer: %v", err)
	}
	r.group(t, "g0", policy.OfPeers, "cafe", "shop") // has the peer already
	if err := r.ledger.Update(t.Context(), func(tx *ledger.Tx) error {
		for n := len(r.Groups()); n < policy.MaxGroups; n++ {
			rec := groupRecord{Of: policy.OfKeys, Members: "payments"}
			if err := tx.Put(ledger.Groups, fmt.Sprintf("many-%d", n), manage.Encode(rec)); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := set("more", policy.OfPeers, policy.NoGroup, "cafe"); !errors.Is(err, manage.ErrConflict) {
		t.Errorf("one group more: %v", err)
	}
}

// TestLargestGroup: a group with as many bytes of names as it may have is in one event of the log,
// and follows at a start.
func TestLargestGroup(t *testing.T) {
	r := newRig(t)
	var members []string
	for n := 0; len(strings.Join(members, ","))+65 <= policy.MaxMembersBytes; n++ {
		members = append(members, fmt.Sprintf("%s%04d", strings.Repeat("m", 60), n))
	}
	if err := r.ledger.Update(t.Context(), func(tx *ledger.Tx) error {
		for n, name := range members {
			record := fmt.Appendf(nil, `{"keys":[{"public_key":"%064x","added":1}],"added":1}`, n+1)
			if err := tx.Put(ledger.Peers, name, record); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	r.group(t, "all", policy.OfPeers, members...)
	log := logOf(t, r.Appliance, 0)
	if last := log[len(log)-1]; last.Metadata["members"] != strings.Join(members, ",") {
		t.Errorf("the event has %d bytes of members", len(last.Metadata["members"]))
	}
	for _, name := range []string{members[0], members[len(members)-1]} {
		if got := r.GroupsOf(policy.OfPeers, name); !slices.Equal(got, []string{"all"}) {
			t.Errorf("%s is in %q", name, got)
		}
	}
}

// TestGroupsFollowTheLedger changes groups at random, with callers that leave, and compares the
// memory with the log: the events alone give the members, and each peer's groups.
func TestGroupsFollowTheLedger(t *testing.T) {
	r := newRig(t)
	random := rand.New(rand.NewPCG(3, 4))
	gone, leave := context.WithCancel(t.Context())
	leave()
	names := []string{"shop", "cafe", "bar", "inn"}
	r.enrol(t, "bar", 9)
	r.enrol(t, "inn", 10)
	for range 200 {
		ctx := t.Context()
		if random.IntN(4) == 0 {
			ctx = gone
		}
		name := fmt.Sprintf("g%d", random.IntN(5))
		before, _ := r.Group(name)
		if random.IntN(4) == 0 {
			r.RemoveGroup(ctx, operator, name, before.Digest())
			continue
		}
		var members []string
		for _, each := range names {
			if random.IntN(2) == 0 {
				members = append(members, each)
			}
		}
		if g, err := policy.NewGroup(name, policy.OfPeers, members); err == nil {
			r.SetGroup(ctx, operator, g, before.Digest())
		}
	}
	if err := r.policies.activating.Acquire(t.Context()); err != nil { // no change is under way
		t.Fatal(err)
	}
	r.policies.activating.Release()
	logged := map[string]string{}
	for _, e := range logOf(t, r.Appliance, 0) {
		if before := logged[e.Resource]; e.Type == audit.GroupChanged || e.Type == audit.GroupRemoved {
			g, err := policy.ParseGroup(e.Resource, policy.OfPeers, before)
			if digest := g.Digest(); before == "" && e.Metadata["replaces"] != policy.NoGroup ||
				before != "" && (err != nil || e.Metadata["replaces"] != digest) {
				t.Fatalf("%+v replaces %q", e, before)
			}
			if logged[e.Resource] = e.Metadata["members"]; e.Type == audit.GroupRemoved {
				delete(logged, e.Resource)
			}
		}
	}
	memory, of := map[string]string{}, map[string][]string{}
	for _, g := range r.Groups() {
		memory[g.Name] = g.Text()
		for _, each := range g.Members {
			of[each] = append(of[each], g.Name)
		}
	}
	if !maps.Equal(memory, logged) {
		t.Errorf("the memory has %q, the log %q", memory, logged)
	}
	for _, each := range names {
		if got := r.GroupsOf(policy.OfPeers, each); !slices.Equal(got, of[each]) {
			t.Errorf("%s is in %q, want %q", each, got, of[each])
		}
	}
}

// TestVerificationsSeeGroups: a rule about verifications may name groups.
func TestVerificationsSeeGroups(t *testing.T) {
	r := newRig(t)
	r.permits(t, allowShop+`
permit (principal in Group::"verifiers", action == Action::"verify", resource in KeyGroup::"own");`)
	signed, err := r.Sign(t.Context(), r.shop, numbered(1, "m"))
	if err != nil {
		t.Fatal(err)
	}
	verify := &wire.Verify{
		Document: numbered(1, "m").Document, PublicKey: signed.PublicKey, Signature: signed.Signature,
	}
	if _, err := r.Verify(t.Context(), r.cafe, verify); !errors.Is(err, policy.ErrDenied) {
		t.Errorf("no member: %v", err)
	}
	r.group(t, "verifiers", policy.OfPeers, "cafe")
	r.group(t, "own", policy.OfKeys, "payments")
	if _, err := r.Verify(t.Context(), r.cafe, verify); err != nil {
		t.Error(err)
	}
}
