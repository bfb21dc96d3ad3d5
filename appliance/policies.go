package appliance

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/policy"
)

// rules is a policy in force.
type rules struct {
	*policy.Policy
	version uint64
}

// policies keeps the policy in force and the versions before it. The texts are in the ledger; memory
// follows the newest.
type policies struct {
	ledger     *ledger.Ledger
	log        *slog.Logger
	activating manage.Lock    // held while a policy is put in force
	file       *policy.Policy // of the start

	// mu guards the policy in force, which decides inside an admission. The ledger's writer takes it to
	// let memory follow.
	mu      sync.Mutex
	newest  PolicyVersion  // zero: the ledger has none yet
	current *rules         // the newest, parsed; nil: not yet
	offered *policy.Policy // about to be written, parsed already
	waits   bool           // the policy file is another than the policy in force
	broken  error          // why the policy file can't be used
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

func decodePolicy(key string, value []byte) (PolicyVersion, error) {
	version, bad := strconv.ParseUint(key, 10, 64)
	var r policyRecord
	if err := errors.Join(bad, json.Unmarshal(value, &r)); err != nil {
		return PolicyVersion{}, fmt.Errorf("policy %q in the ledger: %w", key, err)
	}
	return PolicyVersion{version, r.Hash, r.Text, time.Unix(r.Activated, 0).UTC()}, nil
}

// take lets memory follow the newest version. mu is held. The text is parsed when it is needed, since
// only the newest of many is.
func (p *policies) take(key string, value []byte) error {
	if value == nil {
		return nil // no version is ever removed
	}
	v, err := decodePolicy(key, value)
	if err != nil || v.Version < p.newest.Version {
		return err
	}
	p.newest, p.current = v, nil
	if p.offered != nil && hex.EncodeToString(p.offered.Hash[:]) == v.Hash {
		p.current = &rules{p.offered, v.Version}
	}
	return nil
}

// inForce returns the policy in force. Before the first start that is the file's.
func (p *policies) inForce() (*rules, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.newest.Version == 0 {
		return &rules{p.file, 0}, nil
	}
	if p.current == nil {
		parsed, err := policy.Parse("the policy in force", []byte(p.newest.Text))
		if err != nil {
			return nil, fmt.Errorf("policy version %d in the ledger: %w", p.newest.Version, err)
		}
		p.current = &rules{parsed, p.newest.Version}
	}
	return p.current, nil
}

// Policies lists all versions, the oldest first; the last one is in force.
func (a *Appliance) Policies() (all []PolicyVersion, err error) {
	err = a.ledger.All(ledger.Policies, func(key string, value []byte) error {
		v, err := decodePolicy(key, value)
		all = append(all, v)
		return err
	})
	return all, err
}

// start puts the file's policy in force, unless there are operators: they approve of a policy, and an
// appliance that is started anew must not take one that they have not seen.
func (p *policies) start(ctx context.Context) error {
	governed := false
	if err := p.ledger.View(func(v ledger.View) (err error) { governed, err = isGoverned(v); return err }); err != nil {
		return err
	}
	if _, err := p.inForce(); err != nil {
		return err
	}
	p.mu.Lock()
	newest := p.newest
	p.waits = governed && newest.Version > 0 && newest.Hash != hex.EncodeToString(p.file.Hash[:])
	waits := p.waits
	p.mu.Unlock()
	if waits {
		p.log.Warn("the policy file is not in force, since operators have not approved it", "in_force", newest.Hash)
		return nil
	}
	_, _, err := p.activate(ctx, audit.Daemon(), p.file)
	return err
}

// ApprovedPolicy returns the policy in force of a ledger that has operators; nil where it has none.
func ApprovedPolicy(l *ledger.Ledger) (p *policy.Policy, err error) {
	err = l.View(func(v ledger.View) error {
		if governed, err := isGoverned(v); err != nil || !governed {
			return err
		}
		var last *PolicyVersion
		if err := v.All(ledger.Policies, func(key string, value []byte) error {
			v, err := decodePolicy(key, value)
			last = &v
			return err
		}); err != nil || last == nil {
			return err
		}
		p, err = policy.Parse("the policy in force", []byte(last.Text))
		return err
	})
	return p, err
}

// isGoverned reports that there are operators, whose approval counts.
func isGoverned(v ledger.View) (yes bool, err error) {
	err = v.All(ledger.Operators, func(string, []byte) error { yes = true; return nil })
	return yes, err
}

// PolicyFileBroken notes that the policy file can't be used; the policy in force stays.
func (a *Appliance) PolicyFileBroken(why error) {
	a.log.Error("the policy file can't be used; the policy in force stays", "err", why)
	a.policies.mu.Lock()
	defer a.policies.mu.Unlock()
	a.policies.broken = why
}

// problems names what an operator should see to.
func (p *policies) problems() (all []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.waits {
		all = append(all, "the policy file is another than the policy in force: have it approved (countersign admin policy reload), "+
			"or put the old text back")
	}
	if p.broken != nil {
		all = append(all, fmt.Sprintf("the policy file can't be used, and the policy in force stays: correct it, "+
			"or put the old text back (countersign admin policy show): %v", p.broken))
	}
	return all
}

// Activate puts a policy in force: when it returns, no other one decides any more. The policy is a new
// version, with an event, unless its text is in force already.
func (a *Appliance) Activate(ctx context.Context, who audit.Actor, p *policy.Policy) (version uint64, changed bool, err error) {
	return a.policies.activate(ctx, who, p)
}

func (p *policies) activate(ctx context.Context, who audit.Actor, offered *policy.Policy) (version uint64, changed bool, err error) {
	err = p.activating.Run(ctx, p.log, "activating a policy", func(ctx context.Context) error {
		hash := hex.EncodeToString(offered.Hash[:])
		p.mu.Lock()
		last := p.newest
		p.offered = offered
		p.mu.Unlock()
		if version = last.Version; last.Version > 0 && last.Hash == hash {
			return nil
		}
		version++
		err := p.ledger.Update(ctx, func(tx *ledger.Tx) error {
			record := manage.Encode(policyRecord{hash, string(offered.Text), time.Now().Unix()})
			if err := tx.Put(ledger.Policies, policyKey(version), record); err != nil {
				return err
			}
			return tx.Append(ledger.EventOf(audit.NewPolicyChanged(who, hash, last.Hash, version)))
		})
		changed = err == nil
		return err
	})
	if err != nil {
		return 0, false, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.waits = false; who.Kind == "operator" {
		p.broken = nil
	}
	return version, changed, nil
}

// Decision is one that policy made, with the event that records it.
type Decision struct {
	Event  uint64
	Record []byte // policy.Record in JSON, the bytes whose digest is in the event
}

// Decision returns the decision of an event, or manage.ErrNotFound.
func (a *Appliance) Decision(event uint64) (Decision, error) {
	d, err := a.ledger.Decision(event)
	if errors.Is(err, ledger.ErrNotFound) {
		err = fmt.Errorf("decision of event %d: %w", event, manage.ErrNotFound)
	}
	return Decision{d.Event, d.Record}, err
}

// Decisions calls visit for each decision from an event and a time on, in their order, until visit
// returns false.
func (a *Appliance) Decisions(from uint64, since time.Time, visit func(Decision) bool) error {
	return a.ledger.Decisions(from, since.UnixMilli(), func(d ledger.Decision) bool { return visit(Decision{d.Event, d.Record}) })
}
