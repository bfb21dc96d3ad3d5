package policy

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/ast"
)

// anyone returns a text with the scope of all principals, actions and resources for "(...)".
func anyone(text string) []byte {
	return []byte(strings.ReplaceAll(text, "(...)", "(principal, action, resource)"))
}

// TestPointlessRulesAreRefused sees that a rule with a condition that can't hold is refused, with
// the condition, and so is a comparison that always holds.
func TestPointlessRulesAreRefused(t *testing.T) {
	for _, c := range []struct{ condition, want string }{
		{`context has mesage_context && context.mesage_context == "x"`, `context has mesage_context can never`},
		{`principal == Key::"x"`, `principal == Key::"x" can never`},
		{`principal in Key::"x"`, `can never`},
		{`principal != Key::"x"`, `always holds`},
		{`resource == Key::"Payments"`, `can never`},
		{`principal == Peer::"shop*"`, `can never`},
		{`principal is Key`, `can never`},
		{`principal has name`, `can never`},
		{`context.weekday == "sunday"`, `context.weekday == "sunday" can never`},
		{`context.weekday != "sunday"`, `always holds`},
		{`["Saturday", "sunday"].contains(context.weekday)`, `"sunday" == context.weekday can never`},
		{`context.weekday like "sun*"`, `can never`},
		{`context.transcript == "paykit-subscription-v1"`, `can never`},
		{`context.transcript like "paykit-*-v9"`, `can never`},
		{`context has frequency && context.frequency == "monthly"`, `can never`},
		{`context has status && context.status == "done"`, `can never`},
		{`context.hour >= 24`, `context.hour >= 24 can never`},
		{`context.hour < 24`, `always holds`},
		{`context.hour + 1 > 24`, `can never`},
		{`context.hour * 2 == 100`, `can never`},
		{`context.hour >= 18 && context.hour < 8`, `can never`},
		{`context.size > 5 || context.hour >= 18 && context.hour < 8`, `context.hour < 8 can never`},
		{`context.weekday != "Saturday" || context.weekday != "Sunday"`, `always holds`},
		{`context.weekday == "Saturday" && context.weekday == "Sunday"`, `can never`},
		{`context.lifetime <= 0`, `can never`},
		{`context.used.peer.day.signatures < 0`, `can never`},
		{`context has generation && context.generation < 0`, `can never`},
		{`context has amount && context.amount < 1`, `can never`},
		{`context has payee && context.payee == "AB"`, `can never`},
		{`context has currency && context.currency == "sat"`, `can never`},
		{`context has http_path && context.http_path == "locks"`, `can never`},
		{`context has http_method && context.http_method == "get"`, `can never`},
		{`context has payee && !(context has payee)`, `can never`},
		{`context.transcript == "message-v1" && context has amount`, `can never`},
		{`context has payee && context.payee like "0x*"`, `can never`},
		{`context has payee && context.payee like "*a*b"`, ``},
		{`context has currency && context.currency like "sat*"`, `can never`},
		{`context has currency && context.currency like "S*"`, ``},
		{`context has http_method && context.http_method like "get"`, `can never`},
		{`context has endpoint && context has frequency`, `can never`},
		{`context.transcript == "receipt-v1" && context has method`, ``},
		{`false`, `never applies`},
		{`context.hour >= 18 || context.hour < 8`, ``},
		{`context.transcript == "raw" || context has identity`, ``},
		{`principal == Peer::"a" || principal == Peer::"b"`, ``},
	} {
		for _, form := range []string{
			"permit (principal, action, resource) when { %s };", "forbid (principal, action, resource) when { %s };",
			"forbid (principal, action, resource) unless { context.size > 9 && (%s) };",
		} {
			text := fmt.Sprintf(form, c.condition)
			_, err := Offer("policy.cedar", []byte("// first\n"+text))
			if c.want == "" {
				if err != nil {
					t.Errorf("%s: %v", text, err)
				}
				continue
			}
			want := c.want
			if want == "never applies" && strings.Contains(text, "unless") {
				want = "can never"
			}
			if err == nil || !strings.HasPrefix(err.Error(), "policy: policy.cedar:2: ") ||
				!strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want %q", text, err, want)
			}
			if _, err := Parse("in force", []byte(text)); err != nil {
				t.Errorf("a text in force must be read: %v", err)
			}
		}
	}
	for _, c := range [][2]string{
		{`permit (...) when { context.hour < 8 } when { context.hour > 9 };`, "never applies"},
		{`permit (...) when { context.hour < 8 } unless { context.hour < 9 };`, "never applies"},
		{`permit (principal == Peer::"a", action, resource) when { principal == Peer::"b" };`, "can never"},
		{`permit (principal, action == Action::"sign", resource) when { context.transcript == "raw" };`, "can never"},
		{`forbid (...) /* x */ when { context.hour < 8 };`, "no /* */ comments"},
		{`permit (...) unless { context.hour < 8 || context.hour >= 18 };`, ""},
	} {
		text, want := c[0], c[1]
		_, err := Offer("policy.cedar", anyone(text))
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

// TestUnbalancedBracketsHaveASentence sees that an unclosed bracket or string is named with its
// line.
func TestUnbalancedBracketsHaveASentence(t *testing.T) {
	for _, c := range [][2]string{
		{"permit (...)\nwhen { (context.hour == 1 };", "policy.cedar:2: the bracket ( is not closed"},
		{"permit (...)\nwhen { context.hour == 1 ", "policy.cedar:2: the bracket { is not closed"},
		{"permit (...)\nwhen { context.hour == 1 }};", "policy.cedar:2: the bracket } closes nothing"},
		{"permit (...)\nwhen { [1.contains(1) };", "policy.cedar:2: the bracket [ is not closed"},
		{"permit (...)\nwhen { context.weekday == \"S };", "policy.cedar:2: the string is not closed"},
	} {
		text, want := c[0], c[1]
		if _, err := Parse("policy.cedar", anyone(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
}

// generator makes random conditions and requests from the same few values.
type generator struct{ *rand.Rand }

func (g generator) of(all ...string) string { return all[g.IntN(len(all))] }

func (g generator) number() string {
	return g.of("context.hour", "context.size", "context.lifetime", "context.used.peer.day.signatures",
		"0", "1", "8", "23", "24", "-1", "9223372036854775807", "(context.hour + 1)", "(context.hour - context.size)",
		"(context.size * -3)", "(-context.hour)", "(if context.hour < 8 then 3 else context.size)")
}

func (g generator) text() string {
	return g.of("context.weekday", "context.transcript", `"Sunday"`, `"Monday"`, `"sunday"`, `"raw"`, `"message-v1"`)
}

func (g generator) entity() string {
	return g.of("principal", "resource", `Peer::"a"`, `Peer::"b"`, `Peer::"B"`,
		`Key::"a"`, `Key::"k"`, "principal", "resource")
}

func (g generator) condition(depth int) string {
	if depth > 0 && g.IntN(5) < 4 {
		a, b := g.condition(depth-1), g.condition(depth-1)
		switch g.IntN(5) {
		case 0:
			return "!(" + a + ")"
		case 1:
			return "(if " + a + " then " + b + " else " + g.condition(depth-1) + ")"
		case 2:
			return "(" + a + " || " + b + ")"
		}
		return "(" + a + " && " + b + ")"
	}
	switch g.IntN(14) {
	case 12, 13:
		return g.of("principal", "resource", "principal is Peer") + " in " + g.of(`Group::"a"`, `Group::"b"`,
			`KeyGroup::"a"`, `[Group::"a", Group::"b"]`, `[KeyGroup::"b", KeyGroup::"a"]`)
	case 0, 1, 2:
		return g.number() + g.of(" < ", " <= ", " > ", " >= ", " == ", " != ") + g.number()
	case 3, 4:
		return g.text() + g.of(" == ", " != ") + g.text()
	case 5:
		return g.text() + " like " + g.of(`"*day"`, `"S*"`, `"raw"`, `"*-v1"`, `"x*"`, `"*"`)
	case 6:
		return "[" + g.text() + ", " + g.text() + "].contains(" + g.text() + ")"
	case 7:
		return g.entity() + g.of(" == ", " != ", " in ") + g.entity()
	case 8:
		return g.entity() + " in [" + g.entity() + ", " + g.entity() + "]"
	case 9:
		return g.entity() + " is " + g.of("Peer", "Key")
	case 10:
		currency := g.of(`"SAT"`, `"EUR"`, `"sat"`, "context.weekday")
		return "(context has currency && context.currency " + g.of("==", "!=") + " " + currency + ")"
	}
	return "context has " + g.of("currency", "hour", "nothing", "identity")
}

// request makes a request that the appliance could make.
func (g generator) request(t *testing.T) Request {
	action, transcript := Sign, g.of("message-v1", "payment-request-v1", "receipt-v1")
	if g.IntN(3) == 0 {
		action, transcript = SignRaw, "raw"
	}
	fields := map[string]any{
		"transcript": transcript, "weekday": g.of("Sunday", "Monday", "Saturday"),
		"hour":     []int64{0, 1, 7, 8, 9, 22, 23}[g.IntN(7)],
		"size":     []int64{0, 1, 7, 8, 9, 23, 24, 25, math.MaxInt64}[g.IntN(9)],
		"lifetime": []int64{1, 8, 23, 24, 3600}[g.IntN(5)],
	}
	if transcript == "payment-request-v1" {
		fields["currency"] = g.of("SAT", "EUR", "X")
	}
	if g.IntN(2) == 0 {
		fields["identity"] = strings.Repeat("ab", 32)
	}
	r, err := NewRequest(g.of("a", "b", "c"), action, g.of("a", "k", "l"), fields)
	if err != nil {
		t.Fatal(err)
	}
	r.Used[0][2].Signatures = []int64{1, 8, 24}[g.IntN(3)]
	r.PeerGroups = [][]string{nil, {"a"}, {"b"}, {"a", "b"}}[g.IntN(4)]
	r.KeyGroups = [][]string{nil, {"a"}, {"b"}, {"a", "b"}}[g.IntN(4)]
	return r
}

// FuzzPointless sees that nothing possible is refused: the condition that Offer refuses as one that
// never holds holds for no request, and one that always holds for each.
func FuzzPointless(f *testing.F) {
	for seed := range uint64(400) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		g := generator{rand.New(rand.NewPCG(seed, 15))}
		scope := g.of("principal", `principal == Peer::"a"`, `principal in Peer::"b"`,
			`principal in Group::"a"`, `principal is Peer in Group::"b"`) + ", " +
			g.of("action", `action == Action::"sign"`, `action in [Action::"sign_raw"]`) + ", " +
			g.of("resource", `resource == Key::"k"`, "resource is Key", `resource in KeyGroup::"a"`)
		clauses := g.of("when", "unless") + " { " + g.condition(3) + " }"
		if g.IntN(2) == 0 {
			clauses += " " + g.of("when", "unless") + " { " + g.condition(2) + " }"
		}
		text := "forbid (" + scope + ") " + clauses + ";"
		var bad *Pointless
		if _, err := Offer("p", []byte(text)); !errors.As(err, &bad) {
			return
		}
		claim := text
		if bad.Expr != "" {
			claim = "forbid (" + scope + ") when { " + bad.Expr + " };"
		}
		p, err := Parse("p", []byte(claim))
		if err != nil {
			return // the condition needs the has of another one
		}
		opposite := p
		if bad.Always {
			if opposite, err = Parse("p", []byte("forbid ("+scope+") unless { "+bad.Expr+" };")); err != nil {
				t.Fatal(err)
			}
		}
		for range 200 {
			r := g.request(t)
			if d := opposite.Decide(r); len(d.Rules) > 0 && d.Fault == "" {
				t.Fatalf("%s\nis refused: %v\nbut here it is not so: %s %s %s %v",
					text, bad, r.Peer, r.Action, r.Key, r.context)
			}
		}
	})
}

// TestWarnings sees what is said about rules that may be right: amounts without a currency, names
// that do not exist, and == with a *.
func TestWarnings(t *testing.T) {
	for _, c := range [][2]string{
		{`forbid (...) when { context has amount && context.amount > 5 };`, "it judges amount in whatever currency"},
		{`forbid (...) when { context.used.peer.day.amount_e8 > 5 };`, "it judges amount_e8 in whatever currency"},
		{`permit (principal, action, resource == Key::"payment");`, `there is no Key::"payment"`},
		{`permit (principal in Peer::"shap", action, resource);`, `there is no Peer::"shap"`},
		{`permit (...) unless { principal == Peer::"shap" };`, `there is no Peer::"shap"`},
		{`permit (...) when { context has http_path && context.http_path == "/a/*" };`, `say like`},
		{`permit (principal in Group::"shopps", action, resource);`, `there is no Group::"shopps"`},
		{`permit (principal, action, resource in KeyGroup::"shops");`, `there is no KeyGroup::"shops"`},
		{`permit (...) when { principal in [Group::"shops", Group::"x"] };`, `there is no Group::"x"`},
		{`permit (principal in Group::"shops", action, resource);`, ""},
		{`permit (principal == Peer::"shop", action, resource == Key::"payments");`, ""},
		{`forbid (...) when { context has currency && context.currency != "SAT" &&
 context.used.key.day.amount > 5 };`, ""},
	} {
		text, want := c[0], c[1]
		p, err := Offer("p", anyone(text))
		if err != nil {
			t.Fatal(err)
		}
		got := p.Warnings(func(entity, name string) bool {
			known := []string{"Peer shop", "Group shops", "Key payments"}
			return slices.Contains(known, entity+" "+name)
		})
		if (len(got) == 0) != (want == "") || len(got) > 0 && !strings.Contains(got[0].String(), want) {
			t.Errorf("%s: %v, want %q", text, got, want)
		}
	}
}

// FuzzLike sees that a pattern is never said to be impossible if a text of the form matches it.
func FuzzLike(f *testing.F) {
	f.Add(`S*`, "SAT")
	f.Add(`*A**`, "SAT")
	f.Add(`S\\*T`, "S*T")
	f.Fuzz(func(t *testing.T, pattern, text string) {
		p, err := Parse("p", []byte(`permit (principal, action, resource) when { "" like "`+pattern+`" };`))
		if err != nil {
			return
		}
		for _, rule := range p.rules.All() {
			like, is := (*ast.Policy)(rule.AST()).Conditions[0].Body.(ast.NodeTypeLike)
			if !is || !like.Value.Match(types.String(text)) {
				return
			}
			for _, form := range []string{"[A-Z0-9._-]{1,16}", "[0-9a-f]{64}", "a*(bc|d)?", "(?s).*"} {
				form := regexp.MustCompile("^(?:" + form + ")$")
				if form.MatchString(text) && !canMatch(form, like.Value) {
					t.Errorf("%q matches %q and %s", text, pattern, form)
				}
			}
		}
	})
}

// TestLongChains sees that a policy of the largest size is checked, with chains of thousands of
// conditions.
func TestLongChains(t *testing.T) {
	for name, c := range map[string][2]string{
		"and": {` && `, `principal != Peer::"p%d"`}, "or": {` || `, `principal == Peer::"p%d"`},
		"set":  {`, `, `Peer::"p%d"`},
		"like": {` || `, `context.transcript like "*%d"`},
	} {
		var all []string
		for i := range 6000 {
			all = append(all, strings.ReplaceAll(c[1], "%d", fmt.Sprint(i)))
		}
		condition := strings.Join(all, c[0])
		if name == "set" {
			condition = "principal in [" + condition + "]"
		}
		_, err := Offer("p", []byte("permit (principal, action, resource) when { "+condition+" };"))
		if (err == nil) != (name != "like") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
