package admin

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign/admin/api"
	"countersign/appliance"
	"countersign/approval"
	"countersign/audit"
	"countersign/internal/keystore"
	"countersign/internal/spectest"
)

// anna adds an operator anna with roles, and returns the credential.
func (r *rig) anna(root *api.Client, roles string) approval.Credential {
	r.t.Helper()
	c := r.credential("anna")
	r.done(root, approval.ActOperatorAdd, "name", "anna", "roles", roles, "credential", r.json(c))
	return c
}

func (r *rig) json(c approval.Credential) string {
	r.t.Helper()
	return string(must(json.Marshal(c))(r.t))
}

// done is carryOut for an act that must succeed.
func (r *rig) done(root *api.Client, act string, parameters ...string) api.Proposal {
	r.t.Helper()
	p := r.carryOut(root, act, parameters...)
	if p.State != "done" {
		r.t.Fatalf("%s: %+v", act, p)
	}
	return p
}

// enrolled is the time of a peer's enrolment.
func enrolled(r *rig, root *api.Client, name string) string {
	p := must(root.Peer(r.t.Context(), name))(r.t)
	return time.Unix(p.Added, 0).UTC().Format(time.RFC3339)
}

// inDays is a time in the form of an act's parameter.
func inDays(n int) string { return time.Now().AddDate(0, 0, n).UTC().Format(time.RFC3339) }

// actCases has a case for each act that needs approval: a function that prepares the appliance, and
// returns the parameters of the proposal as names and values.
var actCases = map[string]func(r *rig, root *api.Client) []string{
	approval.ActBackupRestore:    nil, // not on a running appliance
	approval.ActFactoryReset:     nil, // nor this
	approval.ActMachineUpdate:    nil, // for a machine that was booted from the image: package image tests these
	approval.ActMachineReset:     nil,
	approval.ActMachineConfigure: nil,
	approval.ActScraperAdd: func(*rig, *api.Client) []string {
		return []string{"name", "prometheus", "token_sha256", strings.Repeat("0a", 32), "expires", inDays(365)}
	},
	approval.ActPeerAdd: func(*rig, *api.Client) []string {
		return []string{"name", "shop", "public_key", strings.Repeat("0a", 32)}
	},
	approval.ActPeerKeyAdd: func(r *rig, root *api.Client) []string {
		r.done(root, approval.ActPeerAdd, "name", "shop", "public_key", strings.Repeat("0a", 32))
		return []string{"name", "shop", "enrolled", enrolled(r, root, "shop"), "public_key", strings.Repeat("0b", 32)}
	},
	approval.ActGroupSet: func(r *rig, root *api.Client) []string {
		r.done(root, approval.ActPeerAdd, "name", "shop", "public_key", strings.Repeat("0a", 32))
		return []string{"name", "shops", "of", "peers", "content", "shop"}
	},
	approval.ActGroupRemove: func(r *rig, root *api.Client) []string {
		must(root.CreateKey(r.t.Context(), api.NewKey{Name: "payments"}))(r.t)
		r.done(root, approval.ActGroupSet, "name", "money", "of", "keys", "content", "payments")
		return []string{"name", "money"}
	},
	approval.ActPolicyActivate: func(r *rig, _ *api.Client) []string {
		r.policy = strings.Replace(allowShop, "payments", "invoices", 1)
		return nil
	},
	approval.ActRollbackAccept: func(*rig, *api.Client) []string { return []string{"reason", "restored"} },
	approval.ActHoldRelease: func(r *rig, root *api.Client) []string {
		wants(r.t, "hold", "", root.Hold(r.t.Context(), 0, "case-17", "order"))
		return []string{"epoch", "0", "name", "case-17", "reason", "settled"}
	},
	approval.ActClockAccept: func(*rig, *api.Client) []string { return nil },
	approval.ActKeyDestroy: func(r *rig, root *api.Client) []string {
		must(root.CreateKey(r.t.Context(), api.NewKey{Name: "payments"}))(r.t)
		must(root.RotateKey(r.t.Context(), "payments", api.Rotate{Now: true}))(r.t)
		r.done(root, approval.ActKeyArchive, "key", "payments", "version", "1")
		return []string{"key", "payments", "version", "1"}
	},
	approval.ActKeyArchive: func(r *rig, root *api.Client) []string {
		must(root.CreateKey(r.t.Context(), api.NewKey{Name: "payments"}))(r.t)
		must(root.RotateKey(r.t.Context(), "payments", api.Rotate{Now: true}))(r.t)
		return []string{"key", "payments", "version", "1"}
	},
	approval.ActKeyCompromise: func(r *rig, root *api.Client) []string {
		must(root.CreateKey(r.t.Context(), api.NewKey{Name: "payments"}))(r.t)
		return []string{"key", "payments", "version", "1", "reason", "stolen"}
	},
	approval.ActKeySafeguard: func(r *rig, root *api.Client) []string {
		must(root.CreateKey(r.t.Context(), api.NewKey{Name: "payments"}))(r.t)
		return []string{"key", "payments", "token", "safe"}
	},
	approval.ActKeyRecover: func(r *rig, root *api.Client) []string {
		must(root.CreateKey(r.t.Context(), api.NewKey{Name: "payments"}))(r.t)
		r.done(root, approval.ActKeySafeguard, "key", "payments", "token", "safe")
		r.store.Remove(keystore.Ref{Name: "payments", Version: 1})
		return []string{"key", "payments", "reason", "it burnt"}
	},
	approval.ActKeySet: func(r *rig, root *api.Client) []string {
		must(root.CreateKey(r.t.Context(), api.NewKey{Name: "payments"}))(r.t)
		seconds := int64(300)
		must(root.SetLine(r.t.Context(), "payments", api.Change{Presence: &seconds}))(r.t)
		return []string{"key", "payments", "grace", "1", "presence", "0", "acknowledge", "all"}
	},
	approval.ActHoldersSet: func(*rig, *api.Client) []string {
		return []string{"needed", "2", "holder_1", "ann " + annsKey, "holder_2", "bob " + bobsKey}
	},
	approval.ActRetentionShorten: func(*rig, *api.Client) []string { return []string{"audit", "90d"} },
	approval.ActOperatorAdd: func(r *rig, _ *api.Client) []string {
		return []string{"name", "anna", "roles", "auditor", "credential", r.json(r.credential("anna"))}
	},
	approval.ActOperatorRoles: func(r *rig, root *api.Client) []string {
		r.anna(root, "auditor")
		return []string{"name", "anna", "roles", "approver"}
	},
	approval.ActOperatorRemove: func(r *rig, root *api.Client) []string {
		r.anna(root, "auditor")
		return []string{"name", "anna"}
	},
	approval.ActCredentialAdd: func(r *rig, root *api.Client) []string {
		r.anna(root, "auditor")
		return []string{"name", "anna", "credential", r.json(r.credential("anna"))}
	},
	approval.ActCredentialRemove: func(r *rig, root *api.Client) []string {
		first := r.anna(root, "auditor")
		r.done(root, approval.ActCredentialAdd, "name", "anna", "credential", r.json(r.credential("anna")))
		return []string{"name", "anna", "credential", first.ID}
	},
	approval.ActHardwareKeys: func(*rig, *api.Client) []string { return []string{"required", "no"} },
	approval.ActApprovalsNeeded: func(r *rig, root *api.Client) []string {
		r.anna(root, "approver")
		return []string{"needed", "2"}
	},
}

// annsKey and bobsKey are public keys of recovery holders, whose private keys nobody has kept.
const (
	annsKey = "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p"
	bobsKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOz+Ie/vpST4LL8TnxZFvYhpTrKn6v/QbVXbDUvTZrRg"
)

// TestHoldersThatAreNone: what is no set of recovery holders is refused before anybody approves it.
func TestHoldersThatAreNone(t *testing.T) {
	r := newRig(t)
	root := r.root()
	ann, bob := "ann "+annsKey, "bob "+bobsKey
	for name, c := range map[string]struct {
		parameters []string
		want       string
	}{
		"no number":      {[]string{"needed", "x", "holder_1", ann, "holder_2", bob}, "not a number"},
		"one is enough":  {[]string{"needed", "1", "holder_1", ann, "holder_2", bob}, "1 of 2 holders"},
		"one alone":      {[]string{"needed", "2", "holder_1", ann}, "2 of 1 holders"},
		"nobody":         {[]string{"needed", "2"}, "2 of 0 holders"},
		"a gap":          {[]string{"needed", "2", "holder_1", ann, "holder_3", bob}, "holder_2 is missing"},
		"the same twice": {[]string{"needed", "2", "holder_1", ann, "holder_2", "eve " + annsKey}, "twice"},
		"no key":         {[]string{"needed", "2", "holder_1", ann, "holder_2", "bob"}, "holder bob"},
		"a private key": {
			[]string{"needed", "2", "holder_1", ann, "holder_2", "bob AGE-SECRET-KEY-1QQQ"}, "a private key",
		},
		"a terminal":      {[]string{"needed", "2", "holder_1", ann, "holder_2", "b\x1b " + bobsKey}, ""},
		"another count":   {[]string{"needed", "2", "of", "3", "holder_1", ann, "holder_2", bob}, "2 are"},
		"an old number":   {[]string{"needed", "2", "number", "7", "holder_1", ann, "holder_2", bob}, "number 0"},
		"a tenth, at all": {[]string{"needed", "2", "holder_10", ann}, "holder_10"},
	} {
		n := api.NewProposal{Act: approval.ActHoldersSet, Parameters: pairs(c.parameters...)}
		if _, err := root.Propose(t.Context(), n); err == nil || !strings.Contains(err.Error(), c.want) ||
			strings.Contains(err.Error(), "1QQQ") {
			t.Errorf("%s: %v", name, err)
		}
	}
	r.done(root, approval.ActHoldersSet, "needed", "2", "holder_1", ann, "holder_2", bob+" bob@example.org")
	h := must(root.Holders(t.Context()))(t)
	if h.Number != 1 || h.Needed != 2 || len(h.Holders) != 2 || h.Holders[1].Recipient != bobsKey ||
		!strings.HasPrefix(h.Holders[1].Fingerprint, "ssh-ed25519 SHA256:") {
		t.Errorf("%+v", h)
	}
}

// TestActsAreComplete compares the acts that can be proposed, and the cases of TestEveryAct, with
// the acts that the verification of a log knows. An act that is missing in one of the lists fails
// the test.
func TestActsAreComplete(t *testing.T) {
	// The registry has the acts of this package, and the acts that operators.Open adds.
	for name, all := range map[string][]string{
		"proposable acts": slices.Sorted(maps.Keys(newRig(t).registry.Acts)),
		"cases":           slices.Sorted(maps.Keys(actCases)),
	} {
		if !slices.Equal(all, approval.Acts()) {
			t.Errorf("the %s are %q, want %q", name, all, approval.Acts())
		}
	}
}

// TestEveryAct carries out each act by an approved proposal. The log must then have one event that
// needs approval for that act, and must be valid for an auditor.
func TestEveryAct(t *testing.T) {
	for _, act := range approval.Acts() {
		t.Run(act, func(t *testing.T) {
			prepare, has := actCases[act]
			if !has {
				t.Fatal("there is no case in actCases")
			}
			if prepare == nil {
				_, err := newRig(t).root().Propose(t.Context(), api.NewProposal{Act: act})
				wants(t, act, "conflict", err)
				return
			}
			state := string(appliance.Operational)
			if act == approval.ActRollbackAccept {
				state = stateRolledBack
			}
			r := newRigIn(t, state)
			root := r.root()
			p := r.done(root, act, prepare(r, root)...)

			var found []audit.Event
			report, err := approval.Replay(func(yield func(uint64, audit.Event) bool) {
				if err := r.app.Events(0, func(index uint64, e audit.Event) bool {
					if e.Actor.Proposal == p.ID {
						found = append(found, e)
					}
					return yield(index, e)
				}); err != nil {
					t.Error(err)
				}
			}, approval.ReplayOptions{Appliance: "test"})
			if err != nil {
				t.Fatalf("an auditor says: %v", err)
			}
			var acts []string
			for _, e := range found {
				if needs := approval.NeedsApproval(e); needs != "" {
					acts = append(acts, needs)
				}
			}
			if !slices.Equal(acts, []string{act}) {
				t.Errorf("the events of proposal %d are for the acts %q, want %q: %+v", p.ID, acts, act, found)
			}
			history := report.Proposals[len(report.Proposals)-1]
			if history.ID != p.ID || history.State != "done" || len(history.Did) != 1 {
				t.Errorf("by the log, the last proposal is %+v", history)
			}
		})
	}
}

// TestImpossibleActIsNotProposed proposes acts that would fail: the proposal is refused with the
// error of the act itself.
func TestImpossibleActIsNotProposed(t *testing.T) {
	r := newRig(t)
	root := r.root()
	must(root.CreateKey(t.Context(), api.NewKey{Name: "payments"}))(t)
	must(root.CreateKey(t.Context(), api.NewKey{Name: "stopped"}))(t)
	// A compromised version without an active successor may have to sign the step to the successor.
	wants(t, "lock", "", root.Lock(t.Context(), "test"))
	r.done(root, approval.ActKeyCompromise, "key", "stopped", "version", "1", "reason", "stolen")
	wants(t, "unlock", "", root.Unlock(t.Context()))
	r.done(root, approval.ActPeerAdd, "name", "shop", "public_key", strings.Repeat("0a", 32))
	r.done(root, approval.ActGroupSet, "name", "shops", "of", "peers", "content", "shop")
	long, shop := strings.Repeat("x", 501), enrolled(r, root, "shop")
	digest := strings.Repeat("0a", 32)
	r.done(root, approval.ActScraperAdd, "name", "prometheus", "token_sha256", digest, "expires", inDays(9))
	other := strings.Repeat("0b", 32)
	before := len(must(root.Proposals(t.Context()))(t))
	for _, c := range []struct {
		act, code  string
		parameters []string
	}{
		{approval.ActKeyArchive, "conflict", []string{"key", "payments", "version", "1"}},
		{approval.ActKeyArchive, "not_found", []string{"key", "payments", "version", "9"}},
		{approval.ActKeyDestroy, "conflict", []string{"key", "payments", "version", "1"}},
		{approval.ActKeyDestroy, "conflict", []string{"key", "payments", "version", "2"}},
		{approval.ActKeyDestroy, "not_found", []string{"key", "nothing", "version", "1"}},
		{approval.ActKeyCompromise, "invalid", []string{"key", "audit-log", "version", "1", "reason", "stolen"}},
		{approval.ActKeyCompromise, "conflict", []string{"key", "payments", "version", "2", "reason", "stolen"}},
		{approval.ActKeyCompromise, "invalid", []string{"key", "payments", "version", "1", "reason", long}},
		{approval.ActKeySet, "invalid", []string{"key", "payments", "presence", "86401"}},
		{approval.ActKeySet, "invalid", []string{"key", "noise", "presence", "60"}},
		{approval.ActKeySet, "invalid", []string{"key", "payments", "acknowledge", "nobody"}},
		{approval.ActKeySet, "invalid", []string{"key", "payments"}},
		{approval.ActKeySet, "not_found", []string{"key", "nothing", "grace", "1"}},
		{approval.ActRollbackAccept, "not_found", []string{"reason", "restored"}},
		{approval.ActRollbackAccept, "invalid", []string{"reason", long}},
		{approval.ActHoldRelease, "not_found", []string{"epoch", "0", "name", "case-17", "reason", "settled"}},
		{approval.ActRetentionShorten, "invalid", []string{"audit", "1h"}},
		{approval.ActPeerAdd, "exists", []string{"name", "shop", "public_key", strings.Repeat("0c", 32)}},
		{approval.ActPeerAdd, "exists", []string{"name", "cafe", "public_key", strings.Repeat("0a", 32)}},
		{approval.ActPeerKeyAdd, "exists",
			[]string{"name", "shop", "enrolled", shop, "public_key", strings.Repeat("0a", 32)}},
		{approval.ActPeerKeyAdd, "not_found",
			[]string{"name", "cafe", "enrolled", shop, "public_key", strings.Repeat("0c", 32)}},
		{approval.ActPeerKeyAdd, "invalid",
			[]string{"name", "shop", "enrolled", shop, "public_key", strings.Repeat("00", 32)}},
		{approval.ActPeerKeyAdd, "conflict",
			[]string{"name", "shop", "enrolled", "2020-01-01T00:00:00Z", "public_key", strings.Repeat("0c", 32)}},
		{approval.ActGroupSet, "conflict", []string{"name", "shops", "of", "peers", "content", "shop"}},
		{approval.ActGroupSet, "invalid", []string{"name", "shops", "of", "peers", "content", "cafe,shop"}},
		{approval.ActGroupSet, "invalid", []string{"name", "x", "of", "peers", "content", "shop,shop"}},
		{approval.ActGroupSet, "invalid", []string{"name", "x", "of", "peers"}},
		{approval.ActGroupSet, "invalid", []string{"name", "x", "of", "people", "content", "shop"}},
		{approval.ActGroupSet, "conflict", []string{"name", "shops", "of", "keys", "content", "payments"}},
		{approval.ActGroupSet, "conflict", []string{"name", "x", "of", "peers", "replaces", "ab", "content", "shop"}},
		{approval.ActGroupRemove, "not_found", []string{"name", "x"}},
		{approval.ActGroupRemove, "conflict", []string{"name", "shops", "replaces", "none"}},
		{approval.ActApprovalsNeeded, "conflict", []string{"needed", "2"}},
		{approval.ActOperatorRemove, "conflict", []string{"name", "root"}},
		{approval.ActScraperAdd, "exists", []string{"name", "prometheus", "token_sha256", other, "expires", inDays(9)}},
		{approval.ActScraperAdd, "exists", []string{"name", "other", "token_sha256", digest, "expires", inDays(9)}},
		{approval.ActScraperAdd, "invalid", []string{"name", "Other", "token_sha256", other, "expires", inDays(9)}},
		{approval.ActScraperAdd, "invalid", []string{"name", "other", "token_sha256", "0B", "expires", inDays(9)}},
		{approval.ActScraperAdd, "invalid", []string{"name", "other", "token_sha256", other, "expires", inDays(-1)}},
		{approval.ActScraperAdd, "invalid", []string{"name", "other", "token_sha256", other, "expires", inDays(401)}},
		{approval.ActScraperAdd, "invalid", []string{"name", "other", "token_sha256", other, "expires", "tomorrow"}},
		{approval.ActScraperAdd, "invalid", []string{"name", "other", "expires", inDays(9)}},
	} {
		n := api.NewProposal{Act: c.act}
		if i := slices.Index(c.parameters, "content"); i >= 0 {
			n.Content, c.parameters = c.parameters[i+1], c.parameters[:i]
		}
		n.Parameters = pairs(c.parameters...)
		_, err := root.Propose(t.Context(), n)
		wants(t, c.act+" "+strings.Join(c.parameters, " "), c.code, err)
	}
	if n := len(must(root.Proposals(t.Context()))(t)); n != before {
		t.Errorf("%d proposals were made", n-before)
	}
}

// TestWhoMayAct holds the tables of SPEC.md and OPERATIONS.md against the code: all acts that need
// approval with their proposers, and all operations that change something at the word of one
// operator. The flag -write writes the tables: see spectest.
func TestWhoMayAct(t *testing.T) {
	var rows strings.Builder
	for _, act := range approval.Acts() {
		fmt.Fprintf(&rows, "| `%s` | %s | M |\n", act, join(approval.Proposers(act)))
	}
	server, _ := newServer(Config{})
	for _, o := range operationsOf(t, server.document) {
		if o.method == "GET" || len(*o.Roles) == 0 || (*o.Roles)[0] == signedIn[0] {
			continue
		}
		fmt.Fprintf(&rows, "| `%s`: %s | %s | |\n", o.OperationID, o.Summary, join(*o.Roles))
	}
	const header = "| act or operation | by an operator with one of the roles | approvals |\n| --- | --- | --- |\n"
	for _, document := range []string{"../docs/SPEC.md", "../docs/OPERATIONS.md"} {
		spectest.Table(t, document, header, rows.String())
	}
}

// TestRemovalOfANamedGroup: the proposer and the approvers read which rules lose their group.
func TestRemovalOfANamedGroup(t *testing.T) {
	r := newRig(t)
	root := r.root()
	r.done(root, approval.ActPeerAdd, "name", "shop", "public_key", strings.Repeat("0a", 32))
	for _, name := range []string{"shops", "other"} {
		r.done(root, approval.ActGroupSet, "name", name, "of", "peers", "content", "shop")
	}
	rules := "permit (principal, action == Action::\"sign\", resource);\n" +
		"forbid (principal in Group::\"shops\", action == Action::\"sign_raw\", resource);\n"
	r.done(root, approval.ActPolicyActivate, "content", rules)
	for name, want := range map[string]string{"shops": "line 2", "other": ""} {
		p := must(root.Propose(t.Context(), api.NewProposal{
			Act: approval.ActGroupRemove, Parameters: pairs("name", name)}))(t)
		if got := strings.Join(p.Warnings, " "); !strings.HasSuffix(got, want) || (got == "") != (want == "") {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
		if again := must(root.Proposal(t.Context(), p.ID))(t); !slices.Equal(again.Warnings, p.Warnings) {
			t.Errorf("%s: approvers read %q, the proposer %q", name, again.Warnings, p.Warnings)
		}
	}
}
