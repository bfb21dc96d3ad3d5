package policy_test

import (
	"bytes"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign/policy"
)

const rules = `
// The shop signs subscriptions of at most a day, and releases.
permit (principal == Peer::"shop", action == Action::"sign", resource == Key::"payments")
when { context.transcript == "paykit-subscription-v2" && context.lifetime <= 86400 };

permit (principal == Peer::"shop", action == Action::"sign", resource == Key::"payments")
when { context has message_context && context.message_context == "release" };

forbid (principal, action, resource) when { context has currency && context.currency == "USD" };
`

func parse(t *testing.T, text string) *policy.Policy {
	t.Helper()
	p, err := policy.Parse("policy.cedar", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// ask makes a request with the fields of every document, and more fields.
func ask(t *testing.T, peer, action, key string, fields map[string]any) policy.Request {
	t.Helper()
	all := map[string]any{"transcript": "message-v1", "lifetime": int64(60), "size": int64(100)}
	policy.SetTime(all, time.Date(2026, 11, 22, 13, 59, 59, 0, time.UTC)) // a Sunday
	maps.Copy(all, fields)
	r, err := policy.NewRequest(peer, action, key, all)
	if err == nil {
		err = r.Check()
	}
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestDecide(t *testing.T) {
	p := parse(t, rules)
	sub := func(currency string, lifetime int64) map[string]any {
		return map[string]any{"transcript": "paykit-subscription-v2", "lifetime": lifetime, "currency": currency}
	}
	msg := func(context string) map[string]any { return map[string]any{"message_context": context} }
	for _, c := range []struct {
		name  string
		r     policy.Request
		allow bool
	}{
		{"as written", ask(t, "shop", "sign", "payments", sub("SAT", 86400)), true},
		{"too long", ask(t, "shop", "sign", "payments", sub("SAT", 86401)), false},
		{"forbidden", ask(t, "shop", "sign", "payments", sub("USD", 60)), false},
		{"other peer", ask(t, "cafe", "sign", "payments", sub("SAT", 60)), false},
		{"other key", ask(t, "shop", "sign", "releases", sub("SAT", 60)), false},
		{"other action", ask(t, "shop", "sign_raw", "payments", sub("SAT", 60)), false},
		{"a release", ask(t, "shop", "sign", "payments", msg("release")), true},
		{"another message", ask(t, "shop", "sign", "payments", msg("login")), false},
		{"a name that is a rule", ask(t, `shop" || "a" == "a`, "sign", "payments", sub("SAT", 60)), false},
	} {
		err := p.Decide(c.r).Err()
		if (err == nil) != c.allow || err != nil && !errors.Is(err, policy.ErrDenied) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	err := parse(t, "").Decide(ask(t, "shop", "sign", "payments", msg("release"))).Err()
	if !errors.Is(err, policy.ErrDenied) {
		t.Errorf("no rules at all: %v", err)
	}
}

// TestVerification: without a rule that names the action, every verification is allowed, whatever
// rules without an action say. With one, rules decide as for signatures.
func TestVerification(t *testing.T) {
	own := ask(t, "shop", policy.Verify, "payments", nil)
	other := ask(t, "shop", policy.Verify, "", nil)
	other.Signer = strings.Repeat("0a", 32)
	if err := other.Check(); err != nil {
		t.Error(err)
	}
	const all = `permit (principal, action, resource);`
	const about = `permit (principal, action == Action::"verify", resource`
	for text, want := range map[string]string{
		"":  "own other",
		all: "own other",
		all + `forbid (principal, action, resource);`:                                                  "own other",
		about + ` is Key);`:                                                                            "own",
		about + ` == Signer::"` + other.Signer + `");`:                                                 "other",
		about + `);forbid (principal, action, resource is Key);`:                                       "other",
		`permit (principal, action in [Action::"sign", Action::"verify"], resource is Signer);`:        "other",
		`permit (principal, action, resource) when { action == Action::"verify" && resource is Key };`: "own",
		`permit (principal, action, resource) unless { action == Action::"verify" };`:                  "",
		all + `forbid (principal, action in Action::"verify", resource is Key);`:                       "other",
		`permit (principal == Peer::"cafe", action == Action::"verify", resource);`:                    "",
	} {
		p, err := policy.Offer("policy.cedar", []byte(text))
		if err != nil {
			t.Error(err)
			continue
		}
		var got []string
		for _, r := range []policy.Request{own, other} {
			if p.Decide(r).Allowed {
				got = append(got, map[bool]string{true: "own", false: "other"}[r.Signer == ""])
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s\nallows %q, want %q", text, got, want)
		}
	}
}

// TestARuleThatFailsDenies sees that a forbid that can't be evaluated, because of an overflow, does
// not allow the requests that the rule forbids.
func TestARuleThatFailsDenies(t *testing.T) {
	p := parse(t, `permit (principal, action, resource);
forbid (principal, action, resource) when { context.lifetime * 9223372036854775807 > 0 };`)
	r := ask(t, "shop", "sign", "payments", nil)
	if err := p.Decide(r).Err(); !errors.Is(err, policy.ErrDenied) {
		t.Errorf("%v, want %v", err, policy.ErrDenied)
	}
}

// TestRawMustBeNamed sees that raw needs a permit that names the peer, the action and the key.
func TestRawMustBeNamed(t *testing.T) {
	r := ask(t, "ci", policy.SignRaw, "ssh", nil)
	const (
		broad  = `permit (principal, action, resource);`
		narrow = `permit (principal == Peer::"ci", action == Action::"sign_raw", resource == Key::"ssh");`
	)
	for rule, allow := range map[string]bool{
		broad:  false,
		narrow: true,
		`permit (principal == Peer::"ci", action, resource == Key::"ssh");`:                          false,
		`permit (principal == Peer::"ci", action == Action::"sign", resource == Key::"ssh");`:        false,
		`permit (principal, action == Action::"sign_raw", resource == Key::"ssh");`:                  false,
		`permit (principal == Peer::"ci", action == Action::"sign_raw", resource);`:                  false,
		`permit (principal == Peer::"other", action == Action::"sign_raw", resource == Key::"ssh");`: false,
		broad + "\n" + narrow: true,
	} {
		if err := parse(t, rule).Decide(r).Err(); (err == nil) != allow {
			t.Errorf("%s\n%v", rule, err)
		}
	}
}

func TestLoadRefusesWithTheLine(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"syntax": {"permit (principal, action, resource)\n\nwhen { oops oops };", "policy.cedar:3"},
		"unknown attribute": {
			"\n\npermit (principal, action, resource) when { context.amuont > 5 };", "policy.cedar:3",
		},
		"unknown action": {"permit (principal, action == Action::\"sing\", resource);", "policy.cedar:1"},
		"unknown entity": {"\npermit (principal == User::\"shop\", action, resource);", "policy.cedar:2"},
		"wrong type": {
			"permit (principal, action, resource) when { context.lifetime == \"long\" };", "policy.cedar:1",
		},
		"byte order mark": {"\ufeffpermit (principal, action, resource);", "policy.cedar:1"},
		"too deep": {
			"permit (principal, action, resource)\nwhen { " + strings.Repeat("(", 100_000), "policy.cedar:2",
		},
		"an id twice": {
			"@id(\"a\") permit (principal, action, resource);\n@id(\"a\") forbid (principal, action, resource);",
			"policy.cedar:2",
		},
		"an id of nothing": {"@id permit (principal, action, resource);", "policy.cedar:1"},
		"an id for eyes":   {"@id(\"a\\u{1b}[2J\") permit (principal, action, resource);", "policy.cedar:1"},
		"too long":         {strings.Repeat("// long\n", 100_000), "policy.cedar: it has more than"},
		"optional unasked": {
			"permit (principal, action, resource) when { context.currency == \"SAT\" };",
			"policy.cedar:1: currency may be absent: say \"context has currency &&\" before it",
		},
	} {
		path := filepath.Join(t.TempDir(), "policy.cedar")
		if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := policy.Load(path)
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v; want one line that names %s", name, err, c.want)
		}
	}
	if _, err := policy.Load(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
}

// TestRules sees that each rule has its own text, without the comments around the rule, its effect,
// and whether conditions follow its head.
func TestRules(t *testing.T) {
	const (
		one = `permit (principal == Peer::"a;\"b\\", action, resource);`
		two = "@id(\"two; too\")\nforbid (principal, action, resource) // first; second\n" +
			"when { context.transcript == \"/*;\" } /* ; \" */ ;"
		three = `forbid(principal,action,resource);`
	)
	p := parse(t, "// none; yet\n"+one+" // after; it \" \n/* ;\n // */ "+two+three+three+" // the end;")
	want := []policy.Rule{
		{"line 2", 2, one, true, false}, {"two; too", 4, two, false, true},
		{"line 6", 6, three, false, false}, {"line 6:83", 6, three, false, false},
	}
	if got := p.Rules(); !slices.Equal(got, want) {
		t.Errorf("%+v\nwant %+v", got, want)
	}
	d := p.Decide(ask(t, "shop", "sign", "payments", nil))
	if d.Allowed || !slices.Equal(d.Rules, []string{"line 6", "line 6:83"}) {
		t.Errorf("%+v", d)
	}
}

// TestUsedByAnotherName sees that the context has the field used for a rule that spells the name
// with an escape.
func TestUsedByAnotherName(t *testing.T) {
	p := parse(t, `permit (principal, action, resource) when { context["us\u{65}d"].peer.day.signatures <= 5 };`)
	if d := p.Decide(ask(t, "shop", "sign", "payments", nil)); !d.Allowed {
		t.Errorf("%+v", d)
	}
}

// FuzzParse sees that a policy is refused with one line, or that Rules returns all rules in the
// order of the text, each with a text that parses, and that a decision can be replayed.
func FuzzParse(f *testing.F) {
	files, err := filepath.Glob("../examples/policies/*.cedar")
	if err != nil || len(files) == 0 {
		f.Fatal(files, err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(rules))
	f.Add([]byte(`@id("a;")permit(principal,action,resource)` +
		`unless{context["\u{75}sed"]has peer||"\"//"=="/*"/*;*/};//;`))
	r, err := policy.NewRequest("shop", "sign", "payments", map[string]any{
		"transcript": "raw", "lifetime": int64(1), "size": int64(1), "hour": int64(0), "weekday": "Monday",
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := policy.Parse("p.cedar", b)
		if err != nil {
			if text := err.Error(); !strings.HasPrefix(text, "policy: ") || strings.Contains(text, "\n") {
				t.Fatalf("%q", text)
			}
			return
		}
		rest := b
		for _, rule := range p.Rules() {
			_, after, found := bytes.Cut(rest, []byte(rule.Text))
			if rest = after; !found || !strings.HasSuffix(rule.Text, ";") {
				t.Fatalf("%+v", rule)
			}
			if _, err := policy.Parse("p.cedar", []byte(rule.Text)); err != nil {
				t.Fatalf("%s by itself: %v", rule.Text, err)
			}
		}
		d, raw := p.Decided(1, 1, r, [16]byte{})
		rec, err := policy.ParseRecord(raw)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Replay(rec); err != nil || d.Allowed && len(d.Rules) == 0 {
			t.Fatalf("%+v: %v", d, err)
		}
	})
}

// TestReader changes a policy file under a Reader: each call has the policy or the error of the
// bytes that the file has then.
func TestReader(t *testing.T) {
	path := filepath.Join(t.TempDir(), "policy.cedar")
	read := policy.Reader(path)
	if _, err := read(); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("a missing file: %v", err)
	}
	var first *policy.Policy
	permit := "permit (principal, action, resource);"
	for i, text := range []string{permit, "", "permit (", permit} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		p, err := read()
		again, errAgain := read()
		if (err == nil) != (text != "permit (") || p != again || err != errAgain {
			t.Errorf("text %d: %v, then %v", i, err, errAgain)
		}
		if err == nil && string(p.Text) != text {
			t.Errorf("text %d: the policy is %q", i, p.Text)
		}
		if i == 0 {
			first = p
		} else if p == first {
			t.Errorf("text %d: the first policy came again", i)
		}
	}
}
