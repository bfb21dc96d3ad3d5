package appliance

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/policy"
)

// rules is a policy in force.
type rules struct {
	*policy.Policy
	version uint64
}

// PolicyVersion is a policy that was or is in force.
type PolicyVersion struct {
	Version   uint64
	Hash      string // SHA-256 of the text, hex
	Text      string
	Activated time.Time
}

type policyRecord struct {
	Hash      string `json:"sha256"`
	Text      string `json:"text"`
	Activated int64  `json:"activated"` // Unix seconds
}

func policyKey(version uint64) string { return fmt.Sprintf("%020d", version) }

// Policies lists all versions, the oldest first; the last one is in force.
func (a *Appliance) Policies() (all []PolicyVersion, err error) {
	err = a.ledger.All(ledger.Policies, func(key string, value []byte) error {
		v, err := policyVersion(key, value)
		all = append(all, v)
		return err
	})
	return all, err
}

func policyVersion(key string, value []byte) (PolicyVersion, error) {
	version, bad := strconv.ParseUint(key, 10, 64)
	var r policyRecord
	if err := errors.Join(bad, json.Unmarshal(value, &r)); err != nil {
		return PolicyVersion{}, fmt.Errorf("policy %q in the ledger: %w", key, err)
	}
	return PolicyVersion{version, r.Hash, r.Text, time.Unix(r.Activated, 0).UTC()}, nil
}

// startPolicy puts the policy of before in force. What the file says is another matter, once there are operators: they approve of a policy, and
// an appliance that is started anew must not take one that they have not seen.
func (a *Appliance) startPolicy(ctx context.Context) error {
	file := a.rules.Load().Policy
	all, err := a.Policies()
	if err != nil {
		return err
	}
	governed, err := isGoverned(a.ledger)
	if err != nil {
		return err
	}
	if len(all) == 0 || !governed {
		_, _, err := a.Activate(ctx, audit.Daemon(), file)
		return err
	}
	last := all[len(all)-1]
	if last.Hash != hex.EncodeToString(file.Hash[:]) {
		p, err := policy.Parse("the policy in force", []byte(last.Text))
		if err != nil {
			return fmt.Errorf("policy version %d in the ledger: %w", last.Version, err)
		}
		if _, _, err := a.Activate(ctx, audit.Daemon(), p); err != nil {
			return err
		}
		a.log.Warn("the policy file is not in force, since operators have not approved it", "in_force", last.Hash)
		a.mu.Lock()
		defer a.mu.Unlock()
		a.policyWaits = "the policy file is another than the policy in force: have it approved (countersign admin policy reload), or put the old text back"
		return nil
	}
	_, _, err = a.Activate(ctx, audit.Daemon(), file)
	return err
}

// ApprovedPolicy returns the policy in force of a ledger that has operators; nil where it has none.
func ApprovedPolicy(l *ledger.Ledger) (*policy.Policy, error) {
	governed, err := isGoverned(l)
	if err != nil || !governed {
		return nil, err
	}
	var last *PolicyVersion
	if err := l.All(ledger.Policies, func(key string, value []byte) error {
		v, err := policyVersion(key, value)
		last = &v
		return err
	}); err != nil || last == nil {
		return nil, err
	}
	return policy.Parse("the policy in force", []byte(last.Text))
}

// PolicyFileBroken notes that the policy file can't be used; the policy in force stays.
func (a *Appliance) PolicyFileBroken(why error) {
	a.log.Error("the policy file can't be used; the policy in force stays", "err", why)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.policyBroken = fmt.Sprintf("the policy file can't be used, and the policy in force stays: correct it, or put the old text back (countersign admin policy show): %v", why)
}

// isGoverned says that there are operators, whose approval counts.
func isGoverned(l *ledger.Ledger) (yes bool, err error) {
	err = l.All(ledger.Operators, func(string, []byte) error { yes = true; return nil })
	return yes, err
}

// Activate puts a policy in force: when it returns, no other one decides any more. It is a new version, with an event, unless it is the
// text that is in force already.
func (a *Appliance) Activate(ctx context.Context, who audit.Actor, p *policy.Policy) (version uint64, changed bool, err error) {
	err = a.act(ctx, a.activating, "activating a policy", func(ctx context.Context) error {
		hash := hex.EncodeToString(p.Hash[:])
		same := errors.New("the same")
		err := a.ledger.Update(ctx, func(tx *ledger.Tx) error {
			var last PolicyVersion
			if err := tx.All(ledger.Policies, func(key string, value []byte) (err error) { last, err = policyVersion(key, value); return err }); err != nil {
				return err
			}
			if version = last.Version; last.Hash == hash {
				return same
			}
			version++
			if err := tx.Put(ledger.Policies, policyKey(version), encode(policyRecord{hash, string(p.Text), time.Now().Unix()})); err != nil {
				return err
			}
			tx.OnCommit(func() { a.rules.Store(&rules{p, version}) }) // so that the admission after the event is by these
			return tx.Append(entry(audit.Event{Type: audit.PolicyChanged, Actor: who, Action: "policy activate", Resource: "policy", Outcome: "ok",
				Metadata: map[string]string{"sha256": hash, "previous": last.Hash, "version": strconv.FormatUint(version, 10)}}))
		})
		switch changed = err == nil; {
		case errors.Is(err, same):
			a.rules.Store(&rules{p, version})
		case err != nil:
			return err
		}
		return nil
	})
	if err != nil {
		return 0, false, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.policyWaits = ""; who.Kind == "operator" {
		a.policyBroken = ""
	}
	return version, changed, nil
}

// Decision is one that policy made, with the event that records it.
type Decision struct {
	Event  uint64
	Record []byte // policy.Record in JSON, the bytes whose digest is in the event
}

// Decision returns that of an event, or ErrNotFound.
func (a *Appliance) Decision(event uint64) (Decision, error) {
	d, err := a.ledger.Decision(event)
	if errors.Is(err, ledger.ErrNotFound) {
		err = fmt.Errorf("decision of event %d: %w", event, ErrNotFound)
	}
	return Decision{d.Event, d.Record}, err
}

// Decisions calls visit for each decision from an event and a time on, in their order, until it returns false.
func (a *Appliance) Decisions(from uint64, since time.Time, visit func(Decision) bool) error {
	return a.ledger.Decisions(from, since.UnixMilli(), func(d ledger.Decision) bool { return visit(Decision{d.Event, d.Record}) })
}
