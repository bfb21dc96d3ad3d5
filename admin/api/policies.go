package api

import (
	"context"
	"net/http"
	"net/url"
)

// TryPolicy asks what a text would do as the policy.
type TryPolicy struct {
	Text  string `json:"text" maxLength:"1000000"`
	Cases string `json:"cases,omitempty" maxLength:"60000" doc:"a table of cases: see docs/SPEC.md"`
	Since int64  `json:"since,omitempty" minimum:"0" doc:"replay the decisions since then, Unix milliseconds; 0: none"`
}

// TriedPolicy says what a text would do as the policy.
type TriedPolicy struct {
	SHA256   string         `json:"sha256"`
	Error    *PolicyError   `json:"error,omitempty" doc:"why the text can't be a policy"`
	Rules    int            `json:"rules"`
	Verifies bool           `json:"verifies" doc:"rules decide about verifications"`
	Warnings []PolicyDoubt  `json:"warnings" doc:"rules that may not do what was meant"`
	Cases    []TriedCase    `json:"cases"`
	Trouble  *PolicyError   `json:"trouble,omitempty" doc:"why the table of cases can't be read"`
	Replay   *PolicyReplay  `json:"replay,omitempty"`
	Changed  *PolicyChanges `json:"changed,omitempty" doc:"the rules beside those in force"`
}

// PolicyError is an error of a text with its place.
type PolicyError struct {
	Line int    `json:"line" doc:"0: not known"`
	Text string `json:"text"`
}

// PolicyDoubt is a doubt about a rule.
type PolicyDoubt struct {
	Line int    `json:"line"`
	Text string `json:"text"`
}

// TriedCase is a case of the table with its result.
type TriedCase struct {
	Line   int      `json:"line"`
	Name   string   `json:"name"`
	Expect string   `json:"expect" enum:"allow,deny"`
	Got    string   `json:"got" enum:"allow,deny"`
	Rules  []string `json:"rules" doc:"that decide"`
	Fault  string   `json:"fault,omitempty"`
}

// PolicyReplay is the replay of past decisions.
type PolicyReplay struct {
	Decisions int               `json:"decisions" doc:"replayed"`
	Withheld  int               `json:"withheld" doc:"not replayed: a rule reads a text that no record has"`
	Changed   int               `json:"changed"`
	Changes   []ChangedDecision `json:"changes" doc:"the first of them"`
	Partial   bool              `json:"partial" doc:"there are more decisions than were replayed"`
}

// ChangedDecision is a decision that would be another one.
type ChangedDecision struct {
	Event  uint64   `json:"event"`
	TimeMS int64    `json:"time_ms"`
	Peer   string   `json:"peer"`
	Key    string   `json:"key" doc:"or the signer"`
	Action string   `json:"action"`
	Was    string   `json:"was" enum:"allow,deny"`
	Is     string   `json:"is" enum:"allow,deny"`
	Rules  []string `json:"rules" doc:"that would decide"`
}

// PolicyChanges are the rules that come and go against the policy in force.
type PolicyChanges struct {
	Added   []PolicyRule `json:"added"`
	Removed []PolicyRule `json:"removed"`
	Kept    int          `json:"kept"`
}

// PolicyRule is a rule of a policy.
type PolicyRule struct {
	ID          string `json:"id"`
	Line        int    `json:"line"`
	Text        string `json:"text"`
	Permits     bool   `json:"permits" doc:"otherwise, it forbids"`
	Conditional bool   `json:"conditional" doc:"it depends on the document, or on what was used"`
}

// Right has the rules that fit a peer with a key. Without a rule that permits, all is denied.
type Right struct {
	Key    string       `json:"key"`
	Action string       `json:"action" doc:"sign or sign_raw"`
	Rules  []PolicyRule `json:"rules"`
}

// TryPolicy says what a text would do as the policy. Nothing is put in force.
func (c *Client) TryPolicy(ctx context.Context, t TryPolicy) (tried TriedPolicy, err error) {
	return tried, c.do(ctx, http.MethodPost, "/v1/policies/try", t, &tried)
}

// Rights lists the rules of the policy in force that fit a peer.
func (c *Client) Rights(ctx context.Context, peer string) (all []Right, err error) {
	return all, c.do(ctx, http.MethodGet, "/v1/peers/"+url.PathEscape(peer)+"/rights", nil, &all)
}
