package policy_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"math"
	"math/big"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"countersign/internal/ijson"
	"countersign/policy"
)

const recorded = `@id("shop") permit (principal == Peer::"shop", action, resource)
when { context.used.peer.day.signatures <= 5 };
@id("no-usd") forbid (principal, action, resource)
when { context has currency && context.currency == "USD" };
@id("broken") forbid (principal, action, resource)
when { context.size > 1000 && context.lifetime * 9223372036854775807 > 0 };`

// TestReplay sees that a record is written and read in the same bytes, that Replay makes the
// recorded decision again, and that a change of a record is noticed.
func TestReplay(t *testing.T) {
	p, other := parse(t, recorded), parse(t, recorded+" ")
	for name, c := range map[string]struct {
		fields map[string]any
		used   int64
		allow  bool
	}{
		"allowed": {map[string]any{"message_context": "<&>\u2028 \u00e9 \" \\"}, 5, true},
		"spent":   {nil, 6, false},
		"forbidden": {
			map[string]any{"currency": "USD", "amount": int64(1), "amount_e8": int64(math.MaxInt64)}, 1, false,
		},
		"can't be decided": {map[string]any{"size": int64(1001)}, 1, false},
	} {
		r := ask(t, "shop", "sign", "payments", c.fields)
		r.Used[0][2].Signatures, r.Used[1][4].AmountE8 = c.used, math.MaxInt64
		d, b := p.Decided(3, 1800000000123, r, [16]byte{1, 2})
		if _, again := p.Decided(3, 1800000000123, r, [16]byte{1, 2}); !bytes.Equal(b, again) {
			t.Errorf("%s: %s, and the second time %s", name, b, again)
		}
		rec, err := policy.ParseRecord(b)
		if err != nil {
			t.Fatalf("%s: %s: %v", name, b, err)
		}
		if again := ijson.Encode(rec); !bytes.Equal(b, again) {
			t.Errorf("%s: %s became %s", name, b, again)
		}
		older, err := json.Marshal(rec) // the form of older versions
		if err != nil {
			t.Fatal(err)
		}
		if rec, err := policy.ParseRecord(older); err != nil || p.Replay(rec) != nil {
			t.Errorf("%s: %s: %v, %v", name, older, err, p.Replay(rec))
		}
		q, err := rec.Request()
		if err != nil || q.Used != r.Used || q.Check() != nil {
			t.Errorf("%s: %v, %v", name, q, err)
		}
		if _, again := p.Decided(rec.Version, rec.TimeMS, q, [16]byte{1, 2}); !bytes.Equal(b, again) {
			t.Errorf("%s: %s, made again from the record %s", name, b, again)
		}
		if err := p.Replay(rec); err != nil || d.Allowed != c.allow || rec.Allowed != c.allow {
			t.Errorf("%s: %+v, %v", name, d, err)
		}
		if err := other.Replay(rec); err == nil || !strings.Contains(err.Error(), rec.Policy) {
			t.Errorf("%s: replayed by another policy: %v", name, err)
		}
		for what, change := range map[string]func(*policy.Record){
			"decision": func(r *policy.Record) { r.Allowed = !r.Allowed },
			"rules":    func(r *policy.Record) { r.Rules = append(slices.Clone(r.Rules), "z") },
			"fault":    func(r *policy.Record) { r.Fault += "z" },
			"condition": func(r *policy.Record) {
				r.Used[0][2].Signatures, r.Context = 11-c.used, []byte(`{"lifetime":1,"size":1}`)
			},
		} {
			changed := rec
			if change(&changed); what == "condition" && c.used == 1 {
				changed.Peer = "cafe"
			}
			if err := p.Replay(changed); !errors.Is(err, policy.ErrReplay) {
				t.Errorf("%s: another %s is not noticed: %v", name, what, err)
			}
		}
		for _, changed := range [][]byte{
			bytes.Replace(b, []byte(`"peer":"shop"`), []byte(`"peer":"cafe"`), 1),
			bytes.Replace(b, []byte(`"lifetime":60`), []byte(`"lifetime":61`), 1),
			bytes.Replace(b, []byte(`"salt":"01`), []byte(`"salt":"02`), 1),
			bytes.Replace(b, []byte(`123,`), []byte(`124,`), 1),
		} {
			if bytes.Equal(b, changed) || policy.Digest(b) == policy.Digest(changed) {
				t.Errorf("%s: the digest of %s does not notice %s", name, b, changed)
			}
		}
	}
}

// TestParseRecordIsStrict sees that ParseRecord accepts only the bytes that Decided writes.
func TestParseRecordIsStrict(t *testing.T) {
	_, b := parse(t, recorded).Decided(1, 2, ask(t, "shop", "sign", "payments", nil), [16]byte{})
	for _, c := range [][2]string{
		{`{"policy"`, ` {"policy"`}, {`{"policy"`, `{"extra":1,"policy"`}, {`{"policy"`, `{"policy":"","policy"`},
		{`"version":1`, `"version":1.0`},
		{`"version":1,`, ``}, {`"peer"`, `"PEER"`}, {`[0,0,0]`, `[0,0]`}, {`[0,0,0]`, `[0,0,0,0]`},
		{`[0,0,0]`, `[0,0,9223372036854775808]`},
		{`"lifetime":`, `"lifetime": `}, {`"allowed":`, `"fault":"","allowed":`}, {string(b), ``},
		{string(b), `null`}, {string(b), string(b) + "{}"},
		{`"lifetime":60`, `"lifetime":60,"lifetime":60`}, {`"lifetime":60`, `"lifetime":60.0`},
		{`"lifetime":60`, `"lifetime":[60]`}, {`"lifetime":60`, `"lifetime":null`}, {`"rules"`, `"more":0,"rules"`},
		{`"lifetime":60`, `"lifetime":{"sha256":"00"}`}, {`"lifetime":60`, `"lifetime":{"bytes":9,"sha256":"00"}`},
	} {
		changed := strings.Replace(string(b), c[0], c[1], 1)
		if _, err := policy.ParseRecord([]byte(changed)); err == nil || changed == string(b) {
			t.Errorf("%q in place of %q is taken", c[1], c[0])
		}
	}
}

// TestAmounts compares the rounding with big.Rat. An amount is rounded up, to at most
// math.MaxInt64.
func TestAmounts(t *testing.T) {
	one := new(big.Int).Exp(big.NewInt(10), big.NewInt(policy.Scale), nil)
	e8 := new(big.Int).Exp(big.NewInt(10), big.NewInt(policy.Scale-8), nil)
	up := func(exact, unit *big.Int) int64 {
		q := new(big.Rat).SetFrac(exact, unit)
		n := new(big.Int).Quo(q.Num(), q.Denom())
		if new(big.Rat).SetInt(n).Cmp(q) < 0 {
			n.Add(n, big.NewInt(1))
		}
		if !n.IsInt64() {
			return math.MaxInt64
		}
		return n.Int64()
	}
	r := rand.New(rand.NewPCG(1, 2))
	most := new(big.Int).Mul(big.NewInt(math.MaxInt64), one)
	for i := range 200_000 {
		n := new(big.Int).SetUint64(r.Uint64())
		n.Lsh(n, r.UintN(120)).Rsh(n, r.UintN(64))
		switch i % 4 {
		case 1: // a limit of a rule, or one more or less
			n = new(big.Int).Mul(big.NewInt(r.Int64()>>r.UintN(63)), one)
			n.Add(n, big.NewInt(r.Int64N(3)-1))
		case 2:
			n = new(big.Int).Mul(big.NewInt(r.Int64()>>r.UintN(63)), e8)
			n.Add(n, big.NewInt(r.Int64N(3)-1))
		case 3:
			n.Add(most, big.NewInt(r.Int64N(5)-2))
		}
		n.Abs(n)
		amount, amountE8 := policy.Amounts(n)
		if amount != up(n, one) || amountE8 != up(n, e8) {
			t.Fatalf("%v: %d, %d; want %d, %d", n, amount, amountE8, up(n, one), up(n, e8))
		}
		limit := r.Int64() >> r.UintN(63) // over a limit if and only if the exact amount is
		if (amount > limit) != (n.Cmp(new(big.Int).Mul(big.NewInt(limit), one)) > 0) {
			t.Fatalf("%v against %d: %d", n, limit, amount)
		}
	}
}

// FuzzRecord sees that an accepted record is written in the same bytes again, and that neither
// Replay nor Decide panics.
func FuzzRecord(f *testing.F) {
	p, err := policy.Parse("policy.cedar", []byte(recorded))
	if err != nil {
		f.Fatal(err)
	}
	for _, fields := range []map[string]any{
		{"lifetime": int64(1), "size": int64(1001)}, {"message_context": "<\u2028"}, {},
	} {
		r, err := policy.NewRequest("shop", "sign", "payments", fields)
		if err != nil {
			f.Fatal(err)
		}
		r.Used[1][3].Amount = -1
		_, b := p.Decided(1, 1, r, [16]byte{9})
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		rec, err := policy.ParseRecord(b)
		if err != nil {
			return
		}
		if older, err := json.Marshal(rec); err != nil || !bytes.Equal(b, ijson.Encode(rec)) && !bytes.Equal(b, older) {
			t.Fatalf("%s became %s, %v", b, ijson.Encode(rec), err)
		}
		p.Replay(rec)
		if q, err := rec.Request(); err == nil {
			q.Check()
			p.Decide(q)
		}
	})
}
