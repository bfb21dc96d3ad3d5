package policy

import (
	"cmp"
	"slices"
	"time"

	"github.com/cedar-policy/cedar-go"
)

// Cost is what a decision costs for one peer and key. The time is measured on this machine. While a
// decision is made, the ledger admits no other request.
type Cost struct {
	Peer   string        `json:"peer"`   // a name in the policy; "" for any other
	Key    string        `json:"key"`    // likewise
	Groups int           `json:"groups"` // of the peer and of the key, named in the policy
	Rules  int           `json:"rules"`  // evaluated
	Time   time.Duration `json:"time_ns"`
}

// Costs are the costs of decisions by a policy.
type Costs struct {
	Typical Cost `json:"typical"` // the median of the heads of the rules
	Worst   Cost `json:"worst"`
	// Headless are the rules with neither peer, key nor group in the head. Each decision evaluates
	// them. They are in the order of the text.
	Headless []string `json:"headless"`
}

// Costs measures decisions about a payment. The worst peer is a member of those MaxGroupsOf groups
// with the most rules, and so is the worst key. Costs takes some 0.2 s.
func (p *Policy) Costs() Costs {
	c := Costs{Headless: []string{}}
	for _, each := range p.heads[cedar.EntityUID{}][cedar.EntityUID{}] { // added in the order of the text
		c.Headless = append(c.Headless, string(each.id))
	}
	c.Typical, c.Worst = p.measured(p.typical()), p.measured(p.worst())
	return c
}

// named returns the peers or keys that rules name in their heads, and the groups, those with the
// most rules first. A last peer or key "" is one without a name in the policy.
func (p *Policy) named(resources bool) (names, groups []string) {
	rules := map[cedar.EntityUID]int{}
	for principal, byResource := range p.heads {
		for resource, some := range byResource {
			if resources {
				rules[resource] += len(some)
			} else {
				rules[principal] += len(some)
			}
		}
	}
	for uid := range rules {
		switch uid.Type {
		case groupType, keyGroupType:
			groups = append(groups, string(uid.ID))
		case "Peer", "Key":
			names = append(names, string(uid.ID))
		}
	}
	of := map[bool]cedar.EntityType{false: groupType, true: keyGroupType}[resources]
	slices.SortFunc(groups, func(a, b string) int {
		count := func(name string) int { return rules[cedar.NewEntityUID(of, cedar.String(name))] }
		return cmp.Or(cmp.Compare(count(b), count(a)), cmp.Compare(a, b))
	})
	slices.Sort(names)
	return append(names, ""), groups
}

// evaluated counts the rules that a decision evaluates.
func (p *Policy) evaluated(r Request) (n int) {
	_, rules := p.entities(r, r.cedar(false))
	for range rules.All() {
		n++
	}
	return n
}

// worst returns the request with the most rules to evaluate.
func (p *Policy) worst() Request {
	peers, peerGroups := p.named(false)
	keys, keyGroups := p.named(true)
	r := Request{
		Action:     Sign,
		PeerGroups: peerGroups[:min(len(peerGroups), MaxGroupsOf)],
		KeyGroups:  keyGroups[:min(len(keyGroups), MaxGroupsOf)],
	}
	// A rule with a peer in its head and with any key counts for the peer whatever the key is. So
	// the keys that a peer's own rules do not name differ only by the other rules about them.
	with := func(peer, key string) (Request, int) {
		q := r
		q.Peer, q.Key = peer, key
		return q, p.evaluated(q)
	}
	best, most := with("", "")
	common := ""
	for _, key := range keys {
		if q, n := with("", key); n > most {
			best, most, common = q, n, key
		}
	}
	for _, peer := range peers {
		own := []string{common}
		for resource := range p.heads[cedar.NewEntityUID("Peer", cedar.String(peer))] {
			if resource.Type == "Key" {
				own = append(own, string(resource.ID))
			}
		}
		slices.Sort(own)
		for _, key := range own {
			if q, n := with(peer, key); n > most {
				best, most = q, n
			}
		}
	}
	return best
}

// typical returns the median, by the rules to evaluate, of the requests that the heads of the rules
// name: one for each rule.
func (p *Policy) typical() Request {
	type asked struct {
		request Request
		rules   int
	}
	all := []asked{}
	for principal, byResource := range p.heads {
		for resource, some := range byResource {
			r := Request{Action: Sign}
			switch principal.Type {
			case "Peer":
				r.Peer = string(principal.ID)
			case groupType:
				r.PeerGroups = []string{string(principal.ID)}
			}
			switch resource.Type {
			case "Key":
				r.Key = string(resource.ID)
			case keyGroupType:
				r.KeyGroups = []string{string(resource.ID)}
			}
			for range some {
				all = append(all, asked{r, p.evaluated(r)})
			}
		}
	}
	if len(all) == 0 {
		return Request{Action: Sign}
	}
	slices.SortFunc(all, func(a, b asked) int {
		return cmp.Or(cmp.Compare(a.rules, b.rules), cmp.Compare(a.request.Peer, b.request.Peer),
			cmp.Compare(a.request.Key, b.request.Key), slices.Compare(a.request.PeerGroups, b.request.PeerGroups),
			slices.Compare(a.request.KeyGroups, b.request.KeyGroups))
	})
	return all[len(all)/2].request
}

// measuring is the time of the measurement of one request.
const measuring = 100 * time.Millisecond

// measured measures decisions about a request, with the context of a payment. The result is the
// median.
func (p *Policy) measured(r Request) Cost {
	fields := map[string]any{
		"transcript": "payment-request-v1", "lifetime": int64(3600), "size": int64(512), "amount": int64(100),
		"amount_e8": int64(100e8), "currency": "SAT", "method": "bitcoin", "endpoint": "bc1q",
		"counterparty": aPublicKey, "payer": aPublicKey, "payee": aPublicKey,
	}
	SetTime(fields, time.Now())
	q, _ := NewRequest(r.Peer, r.Action, r.Key, fields) // of these types, there is no error
	q.PeerGroups, q.KeyGroups = r.PeerGroups, r.KeyGroups
	c := Cost{
		Peer: r.Peer, Key: r.Key, Groups: len(r.PeerGroups) + len(r.KeyGroups), Rules: p.evaluated(q),
	}
	var took []time.Duration
	for end := time.Now().Add(measuring); time.Now().Before(end) || len(took) < 3; {
		began := time.Now()
		p.Decide(q)
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	c.Time = took[len(took)/2]
	return c
}

const aPublicKey = "0000000000000000000000000000000000000000000000000000000000000001"
