package admin

import (
	"cmp"
	"context"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"countersign/admin/api"
	"countersign/appliance"
	"countersign/policy"
)

// Limits of a trial of a policy: one at a time runs.
const (
	replayTime  = 5 * time.Second
	maxReplayed = 50000
	maxChanges  = 200
)

// tryPolicy checks a text as the policy. An error of the text is part of the result, since an
// editor asks after each change.
func (s *server) tryPolicy(ctx context.Context, who caller, in *body[api.TryPolicy]) (api.TriedPolicy, error) {
	s.trying.Lock()
	defer s.trying.Unlock()
	doc := api.TriedPolicy{SHA256: hexDigest([]byte(in.Body.Text)), Warnings: []api.PolicyDoubt{},
		Cases: []api.TriedCase{}}
	rules, err := policy.Offer("policy.cedar", []byte(in.Body.Text))
	if err != nil {
		doc.Error = placed(err, "policy.cedar")
		return doc, nil
	}
	doc.Rules, doc.Verifies = len(rules.Rules()), rules.Verifies
	for _, w := range rules.Warnings(s.Appliance.KnowsName) {
		doc.Warnings = append(doc.Warnings, api.PolicyDoubt{Line: w.Line, Text: w.Text})
	}
	if in.Body.Cases != "" {
		cases, err := policy.ParseCases("cases.csv", []byte(in.Body.Cases))
		if err != nil {
			doc.Trouble = placed(err, "cases.csv")
		}
		for _, c := range cases {
			d := rules.Decide(c.Request)
			doc.Cases = append(doc.Cases, api.TriedCase{
				Line: c.Line, Name: c.Name, Expect: verdict(c.Allow), Got: verdict(d.Allowed),
				Rules: append([]string{}, d.Rules...), Fault: d.Fault,
			})
		}
	}
	if doc.Changed, err = s.changedRules(rules); err != nil {
		return doc, err
	}
	if in.Body.Since > 0 && who.has(administrator, auditor) { // the roles of GET /v1/decisions/{event}
		ctx, cancel := context.WithTimeout(ctx, replayTime)
		defer cancel()
		c, err := s.Appliance.Compare(ctx, rules, time.UnixMilli(in.Body.Since), maxReplayed, maxChanges)
		if err != nil {
			return doc, err
		}
		doc.Replay = &api.PolicyReplay{
			Decisions: c.Decisions, Withheld: c.Withheld, Changed: c.Changed, Partial: c.Partial,
			Changes: docs(c.Changes, func(x appliance.Change) api.ChangedDecision {
				return api.ChangedDecision{
					Event: x.Event, TimeMS: x.Record.TimeMS, Peer: x.Record.Peer,
					Key: cmp.Or(x.Record.Key, x.Record.Signer), Action: x.Record.Action,
					Was: verdict(x.Record.Allowed), Is: verdict(x.Allowed),
					Rules: append([]string{}, x.Rules...),
				}
			}),
		}
	}
	return doc, nil
}

func verdict(allowed bool) string {
	if allowed {
		return "allow"
	}
	return "deny"
}

// placed returns an error with the line that its text begins with: file:line.
func placed(err error, file string) *api.PolicyError {
	text := err.Error()
	at := regexp.MustCompile(regexp.QuoteMeta(file) + `:(\d+)(:\d+)?:? *`).FindStringSubmatchIndex(text)
	if at == nil {
		return &api.PolicyError{Text: text}
	}
	line, _ := strconv.Atoi(text[at[2]:at[3]])
	return &api.PolicyError{Line: line, Text: strings.TrimPrefix(text[:at[0]], "policy: ") + text[at[1]:]}
}

// changedRules compares the rules of a policy with those in force, by their texts.
func (s *server) changedRules(next *policy.Policy) (*api.PolicyChanges, error) {
	doc := &api.PolicyChanges{Added: []api.PolicyRule{}, Removed: []api.PolicyRule{}}
	versions, err := s.Appliance.Policies()
	if err != nil {
		return nil, err
	}
	var before []policy.Rule
	if n := len(versions); n > 0 {
		v, err := s.Appliance.Policy(versions[n-1].Version)
		if err != nil {
			return nil, err
		}
		now, err := policy.Parse("the policy in force", []byte(v.Text))
		if err != nil {
			return nil, err
		}
		before = now.Rules()
	}
	text := func(r policy.Rule) string { return strings.Join(strings.Fields(r.Text), " ") }
	for _, r := range next.Rules() {
		same := func(b policy.Rule) bool { return text(b) == text(r) }
		if at := slices.IndexFunc(before, same); at >= 0 {
			before = slices.Delete(before, at, at+1)
			doc.Kept++
			continue
		}
		doc.Added = append(doc.Added, ruleDoc(r))
	}
	doc.Removed = docs(before, ruleDoc)
	return doc, nil
}

func ruleDoc(r policy.Rule) api.PolicyRule {
	return api.PolicyRule{
		ID: r.ID, Line: r.Line, Text: r.Text, Permits: r.Permits, Conditional: r.Conditional,
	}
}

func (s *server) rights(_ context.Context, _ caller, in *named) ([]api.Right, error) {
	if _, err := s.Appliance.Peers.Status(in.Name); err != nil {
		return nil, err
	}
	all, seen := []api.Right{}, map[string]bool{}
	for _, k := range s.Appliance.Keys.All() {
		if seen[k.Name] || k.Own() {
			continue
		}
		seen[k.Name] = true
		for _, action := range []string{policy.Sign, policy.SignRaw} {
			rules, err := s.Appliance.Fitting(in.Name, action, k.Name)
			if err != nil {
				return nil, err
			}
			if len(rules) == 0 || len(all) >= maxEntries {
				continue
			}
			all = append(all, api.Right{Key: k.Name, Action: action, Rules: docs(rules, ruleDoc)})
		}
	}
	return all, nil
}
