package policy

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go"
)

// TestGroups: a group needs a name, a kind, and members in bounds. The text of the members has one
// form.
func TestGroups(t *testing.T) {
	long := strings.Repeat("m", 64)
	var most []string
	for i := 0; len(strings.Join(most, ",")) <= MaxMembersBytes; i++ {
		most = append(most, fmt.Sprintf("%s%04d", long[:60], i))
	}
	for _, c := range []struct {
		name, of string
		members  []string
		want     string
	}{
		{"shops", OfPeers, []string{"b", "a"}, ""},
		{strings.Repeat("g", MaxGroupName), OfKeys, []string{long}, ""},
		{"shops", OfPeers, most[1:], ""},
		{"shops", OfPeers, most, "divide it"},
		{strings.Repeat("g", MaxGroupName+1), OfKeys, []string{"a"}, "the name of a group"},
		{"", OfPeers, []string{"a"}, "the name of a group"},
		{"Shops", OfPeers, []string{"a"}, "the name of a group"},
		{"shops", "people", []string{"a"}, "a group has peers or keys"},
		{"shops", OfPeers, nil, "no member"},
		{"shops", OfPeers, []string{"a", "b", "a"}, `"a" is there twice`},
		{"shops", OfPeers, []string{"a", ""}, `"" is not the name`},
		{"shops", OfPeers, []string{"a,b"}, "is not the name"},
		{"shops", OfPeers, []string{long + "m"}, "is not the name"},
	} {
		g, err := NewGroup(c.name, c.of, c.members)
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%.20q of %d: %v, want %q", c.name, len(c.members), err, c.want)
		}
		if err != nil {
			continue
		}
		again, err := ParseGroup(c.name, c.of, g.Text())
		if err != nil || again.Text() != g.Text() || again.Digest() != g.Digest() {
			t.Errorf("%s: %v", g.Text(), err)
		}
	}
	for _, text := range []string{"", "b,a", "a,b,", ",a", "a, b", "a,a", "a\n", "A"} {
		if g, err := ParseGroup("shops", OfPeers, text); err == nil {
			t.Errorf("%q is %v", text, g.Members)
		}
	}
	groups := []Group{
		{"shops", OfPeers, []string{"a", "b"}}, {"all", OfPeers, []string{"a"}}, {"keys", OfKeys, []string{"a", "k"}},
	}
	r := Request{Peer: "a", Key: "k"}.InGroups(groups)
	if !slices.Equal(r.PeerGroups, []string{"all", "shops"}) || !slices.Equal(r.KeyGroups, []string{"keys"}) {
		t.Errorf("%q and %q", r.PeerGroups, r.KeyGroups)
	}
	if r := (Request{Peer: "c", Signer: "ab"}).InGroups(groups); r.PeerGroups != nil || r.KeyGroups != nil {
		t.Errorf("%q and %q", r.PeerGroups, r.KeyGroups)
	}
}

// TestGroupsDecide: a rule about a group holds for the members, in the head and in a condition. The
// record has the groups, and gives the decision again. raw needs a peer and not a group.
func TestGroupsDecide(t *testing.T) {
	p, err := Offer("p", []byte(`
@id("shops") permit (principal in Group::"shops", action, resource in KeyGroup::"invoices");
@id("vip") permit (principal is Peer in Group::"vip", action == Action::"sign", resource)
unless { principal in Group::"late" };
@id("blocked") forbid (principal, action, resource)
when { principal in [Group::"blocked", Group::"x"] || principal == Peer::"eve" || resource in KeyGroup::"closed" };`))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		peer, key, action string
		peers, keys       []string
		by                string
		allowed           bool
	}{
		{"a", "k", Sign, []string{"shops"}, []string{"invoices"}, "shops", true},
		{"a", "k", Sign, []string{"shops"}, nil, "", false},
		{"a", "k", Sign, nil, []string{"invoices"}, "", false},
		{"a", "k", Sign, []string{"invoices"}, []string{"shops"}, "", false},
		{"a", "k", Sign, []string{"vip"}, nil, "vip", true},
		{"a", "k", Sign, []string{"late", "vip"}, nil, "", false},
		{"a", "k", Sign, []string{"shops", "vip"}, []string{"invoices"}, "shops vip", true},
		{"a", "k", Sign, []string{"blocked", "vip"}, nil, "blocked", false},
		{"a", "k", Sign, []string{"vip"}, []string{"closed"}, "blocked", false},
		{"eve", "k", Sign, []string{"vip"}, nil, "blocked", false},
		{"a", "k", SignRaw, []string{"shops"}, []string{"invoices"}, "", false},
	} {
		r, err := NewRequest(c.peer, c.action, c.key, map[string]any{"transcript": "message-v1"})
		if err != nil {
			t.Fatal(err)
		}
		r.PeerGroups, r.KeyGroups, r.PeerKey = c.peers, c.keys, strings.Repeat("ab", 32)
		d, b := p.Decided(1, 2, r, [16]byte{})
		if d.Allowed != c.allowed || strings.Join(d.Rules, " ") != c.by {
			t.Errorf("%s in %q with a key in %q: %+v", c.peer, c.peers, c.keys, d)
		}
		rec, err := ParseRecord(b)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Replay(rec); err != nil {
			t.Error(err)
		}
		if !slices.Equal(rec.PeerGroups, c.peers) || !slices.Equal(rec.KeyGroups, c.keys) || rec.PeerKey != r.PeerKey {
			t.Errorf("%s", b)
		}
		if rec.PeerGroups, rec.KeyGroups = nil, nil; c.allowed && !errors.Is(p.Replay(rec), ErrReplay) {
			t.Errorf("%s: without its groups, the decision comes out again", b)
		}
	}
}

// TestGroupsOfOthers: no rule can ask for the groups of another peer or key than the request's own,
// and no type is taken for another one.
func TestGroupsOfOthers(t *testing.T) {
	for _, text := range []string{
		`permit (...) when { Peer::"a" in Group::"g" };`,
		`permit (...) when { [Peer::"a"].contains(principal) && Peer::"a" in [Group::"g"] };`,
		`permit (...) when { (if context.hour < 3 then principal else Peer::"a") in Group::"g" };`,
		`permit (...) when { Peer::"a" is Peer in Group::"g" };`,
		`permit (...) when { principal in KeyGroup::"g" };`,
		`permit (...) when { resource in Group::"g" };`,
		`permit (principal in KeyGroup::"g", action, resource);`,
		`permit (principal == Group::"g", action, resource);`,
		`permit (...) when { principal == Group::"g" };`,
		`permit (...) when { action in Group::"g" };`,
		`permit (principal in Group::"g", action, resource in Group::"g");`,
	} {
		if _, err := Offer("p", anyone(text)); err == nil {
			t.Errorf("%s is taken", text)
		}
	}
	for _, text := range []string{
		`permit (principal in Group::"g", action, resource);`,
		`permit (...) when { principal in Group::"g" && !(principal in Group::"h") };`,
		`permit (...) unless { resource in [KeyGroup::"g", KeyGroup::"h"] };`,
	} {
		if _, err := Offer("p", anyone(text)); err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// FuzzHeads sees that Decide, which leaves out the rules about others, decides as Cedar does with
// all rules.
func FuzzHeads(f *testing.F) {
	for seed := range uint64(300) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		g := generator{rand.New(rand.NewPCG(seed, 16))}
		var text strings.Builder
		for range 1 + g.IntN(20) {
			fmt.Fprintf(&text, "%s (%s, %s, %s)", g.of("permit", "permit", "forbid"),
				g.of("principal", `principal == Peer::"a"`, `principal == Peer::"b"`, `principal in Peer::"a"`,
					"principal is Peer", `principal in Group::"a"`, `principal is Peer in Group::"b"`),
				g.of("action", `action == Action::"sign"`, `action in [Action::"sign_raw", Action::"sign"]`),
				g.of("resource", `resource == Key::"k"`, `resource in KeyGroup::"a"`, `resource in Key::"a"`,
					`resource is Key in KeyGroup::"b"`, "resource is Key"))
			if g.IntN(2) == 0 {
				fmt.Fprintf(&text, " when { %s }", g.condition(1))
			}
			text.WriteString(";\n")
		}
		p, err := Parse("p", []byte(text.String()))
		if err != nil {
			return
		}
		for range 50 {
			r := g.request(t)
			q := r.cedar(true)
			entities, _ := p.entities(r, q)
			decision, why := cedar.Authorize(p.rules, entities, q)
			var all []string
			for _, reason := range why.Reasons {
				all = append(all, string(reason.PolicyID))
			}
			slices.Sort(all)
			d := p.Decide(r)
			if (d.Fault == "") != (len(why.Errors) == 0) && r.Action != SignRaw {
				t.Fatalf("%s\nfor %+v: %+v, and Cedar has the errors %v", &text, r, d, why.Errors)
			}
			if d.Fault == "" && (!slices.Equal(d.Rules, all) || d.Allowed != (decision == cedar.Allow)) {
				t.Fatalf("%s\nfor %+v: %+v, and Cedar says %v by %q", &text, r, d, decision, all)
			}
		}
	})
}

// TestCosts counts the rules that a decision evaluates: those about a peer or a group cost the
// decisions of others nothing. A rule about nobody costs all.
func TestCosts(t *testing.T) {
	var text strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&text, "permit (principal == Peer::\"p%d\", action, resource == Key::\"k%d\");\n", i, i%10)
	}
	text.WriteString(`permit (principal == Peer::"busy", action, resource);` + "\n")
	text.WriteString(`permit (principal == Peer::"busy", action, resource == Key::"k1");` + "\n")
	text.WriteString(`permit (principal in Group::"shops", action, resource);` + "\n")
	text.WriteString(`permit (principal in Group::"vip", action, resource in KeyGroup::"open");` + "\n")
	text.WriteString(`@id("all") forbid (principal, action, resource) when { context.hour == 3 };` + "\n")
	text.WriteString(`@id("here") forbid (principal, action, resource) when { principal == Peer::"p1" };` + "\n")
	p, err := Offer("p", []byte(text.String()))
	if err != nil {
		t.Fatal(err)
	}
	c := p.Costs()
	if got := c.Typical; got.Rules != 3 || got.Time <= 0 {
		t.Errorf("typical: %+v, want the two rules for all and one", got)
	}
	if got := c.Worst; got.Peer != "busy" || got.Key != "k1" || got.Groups != 3 || got.Rules != 6 || got.Time <= 0 {
		t.Errorf("worst: %+v", got)
	}
	if !slices.Equal(c.Headless, []string{"all", "here"}) {
		t.Errorf("%q name nobody", c.Headless)
	}
	empty, err := Offer("p", nil)
	if err != nil {
		t.Fatal(err)
	}
	if c := empty.Costs(); c.Worst.Rules != 0 || c.Worst.Time <= 0 || len(c.Headless) != 0 {
		t.Errorf("without a rule: %+v", c)
	}
}

// TestRulesThatNameAGroup: they are found in heads and in conditions, by kind and name.
func TestRulesThatNameAGroup(t *testing.T) {
	p, err := Parse("p", []byte(`permit (principal in Group::"shops", action == Action::"sign", resource);
permit (principal in Group::"money", action == Action::"sign", resource);
permit (principal, action == Action::"sign", resource) when { resource in KeyGroup::"money" || resource == Key::"k" };
forbid (principal, action == Action::"sign", resource) when { context.size > 3 && principal in Group::"shops" };
forbid (principal is Peer in Group::"shops", action, resource is Key);
permit (principal == Peer::"shops", action == Action::"sign", resource);
`))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		of, name string
		want     []int
	}{
		{OfPeers, "shops", []int{1, 4, 5}}, {OfKeys, "money", []int{3}}, {OfPeers, "money", []int{2}},
		{OfKeys, "shops", nil}, {OfPeers, "shop", nil},
	} {
		var got []int
		for _, rule := range p.Naming(c.of, c.name) {
			got = append(got, rule.Line)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s %s: lines %v, want %v", c.of, c.name, got, c.want)
		}
	}
}
