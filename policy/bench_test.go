package policy

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// BenchmarkGroups compares a decision for a peer in a group of 1,600 under one rule with a decision
// for the only peer of a policy, and with one where each of 1,600 peers has a rule. A line is NAME
// PARAMETERS ratio X, with the two rates of the ratio.
func BenchmarkGroups(b *testing.B) {
	const when = ` when { context.lifetime <= 86400 && context has amount && context.amount <= 1000 };`
	one := `permit (principal == Peer::"p0", action == Action::"sign", resource == Key::"payments")` + when
	var each strings.Builder
	var members []string
	for i := range 1600 {
		members = append(members, fmt.Sprintf("p%d", i))
		fmt.Fprintf(&each, "permit (principal == Peer::%q, action, resource == Key::\"payments\");\n", members[i])
	}
	group, err := NewGroup("shops", OfPeers, members)
	if err != nil {
		b.Fatal(err)
	}
	decide := func(text string, groups ...Group) func() {
		p, err := Offer("p", []byte(text))
		if err != nil {
			b.Fatal(err)
		}
		fields := map[string]any{"transcript": "payment-request-v1", "lifetime": int64(60), "amount": int64(100)}
		r, err := NewRequest("p0", Sign, "payments", fields)
		if err != nil {
			b.Fatal(err)
		}
		r = r.InGroups(groups)
		return func() {
			if !p.Decide(r).Allowed {
				b.Fatal("denied")
			}
		}
	}
	floor := decide(one)
	for name, side := range map[string]func(){
		"one-rule":   decide(strings.Replace(one, `== Peer::"p0"`, `in Group::"shops"`, 1), group),
		"1600-rules": decide(each.String()),
	} {
		var ratios, sides, floors []float64
		for range 41 {
			f, s := perSecond(floor), perSecond(side)
			ratios, sides, floors = append(ratios, s/f), append(sides, s), append(floors, f)
		}
		for _, all := range [][]float64{ratios, sides, floors} {
			slices.Sort(all)
		}
		fmt.Fprintf(os.Stdout, "decide peers=1600 %s ratio %.2f (%.0f/s, floor %.0f/s)\n",
			name, ratios[20], sides[20], floors[20])
	}
}

// perSecond returns the number of calls in a second, in a round of 10 ms.
func perSecond(call func()) float64 {
	n, begin := 0, time.Now()
	for ; time.Since(begin) < 10*time.Millisecond; n++ {
		call()
	}
	return float64(n) / time.Since(begin).Seconds()
}
