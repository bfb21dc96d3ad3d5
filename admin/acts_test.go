package admin

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"

	"countersign/admin/api"
	"countersign/appliance"
	"countersign/approval"
	"countersign/audit"
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

// actCases has a case for each act that needs approval: a function that prepares the appliance, and
// returns the parameters of the proposal as names and values.
var actCases = map[string]func(r *rig, root *api.Client) []string{
	approval.ActPeerAdd: func(*rig, *api.Client) []string {
		return []string{"name", "shop", "public_key", strings.Repeat("0a", 32)}
	},
	approval.ActPolicyActivate: func(r *rig, _ *api.Client) []string {
		r.policy = strings.Replace(allowShop, "payments", "invoices", 1)
		return nil
	},
	approval.ActRollbackAccept: func(*rig, *api.Client) []string { return []string{"reason", "restored"} },
	approval.ActHoldRelease: func(r *rig, root *api.Client) []string {
		wants(r.t, "hold", "", root.Hold(r.t.Context(), 0, "case 17"))
		return []string{"epoch", "0", "reason", "settled"}
	},
	approval.ActClockAccept: func(*rig, *api.Client) []string { return nil },
	approval.ActKeyDestroy: func(r *rig, root *api.Client) []string {
		must(root.CreateKey(r.t.Context(), api.NewKey{Name: "payments"}))(r.t)
		must(root.RotateKey(r.t.Context(), "payments", api.Rotate{Now: true}))(r.t)
		wants(r.t, "archive", "", root.ArchiveKey(r.t.Context(), "payments", 1))
		return []string{"key", "payments", "version", "1"}
	},
	approval.ActKeyCompromise: func(r *rig, root *api.Client) []string {
		must(root.CreateKey(r.t.Context(), api.NewKey{Name: "payments"}))(r.t)
		return []string{"key", "payments", "version", "1", "reason", "stolen"}
	},
	approval.ActKeyPresence: func(r *rig, root *api.Client) []string {
		must(root.CreateKey(r.t.Context(), api.NewKey{Name: "payments"}))(r.t)
		seconds := int64(300)
		must(root.SetLine(r.t.Context(), "payments", api.Change{Presence: &seconds}))(r.t)
		return []string{"key", "payments", "seconds", "0"}
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
	approval.ActApprovalsNeeded: func(r *rig, root *api.Client) []string {
		r.anna(root, "approver")
		return []string{"needed", "2"}
	},
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
			prepare := actCases[act]
			if prepare == nil {
				t.Fatal("there is no case in actCases")
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
