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
	"countersign/internal/cause"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/requestid"
	"countersign/policy"
)

// rules is a policy in force.
type rules struct {
	*policy.Policy
	version uint64
}

// policies has the policy in force. The ledger has the texts of all versions. Memory follows the
// newest version.
type policies struct {
	ledger     *ledger.Ledger
	log        *slog.Logger
	activating manage.Lock    // held by activate
	file       *policy.Policy // the policy file as read at the start
	load       func() (*policy.Policy, error)

	// mu guards the policy in force. The ledger's writer locks mu during admissions, and while
	// memory follows the ledger. A holder of mu must not wait for the ledger.
	mu      sync.Mutex
	newest  PolicyVersion   // zero for a ledger without a version
	hashes  map[string]bool // of all versions, hex: a policy file with a former text waits for nobody
	current *rules          // newest, parsed; nil if not parsed yet
	offered *policy.Policy  // the argument of activate, which need not be parsed again
	onDisk  string          // SHA-256 of the policy file at the last look, hex; "" for an unusable file
	broken  error           // the error of an unusable policy file
	checked *policy.Policy  // the policy in force that dead is about
	dead    error           // the error of Offer for checked, which was approved before an update
}

// PolicyVersion is the policy in force, or one before it.
type PolicyVersion struct {
	Version   uint64
	Hash      string // SHA-256 of the text, hex
	Text      string
	Activated time.Time
}

// policyRecord is the ledger's record of a version.
type policyRecord struct {
	Hash      string `json:"sha256"`
	Text      string `json:"text"`
	Activated int64  `json:"activated"` // Unix seconds
}

// policyKey returns the key of a version's record. Keys sort in the order of versions.
func policyKey(version uint64) string { return fmt.Sprintf("%020d", version) }

func decodePolicy(key string, value []byte) (PolicyVersion, error) {
	version, bad := strconv.ParseUint(key, 10, 64)
	var r policyRecord
	if err := errors.Join(bad, json.Unmarshal(value, &r)); err != nil {
		return PolicyVersion{}, fmt.Errorf("policy %q in the ledger: %w", key, err)
	}
	return PolicyVersion{version, r.Hash, r.Text, time.Unix(r.Activated, 0).UTC()}, nil
}

// take updates memory from the record of a version. The ledger's writer holds mu. inForce parses
// the text later, because only the newest of many versions is needed.
func (p *policies) take(key string, value []byte) error {
	if value == nil {
		return nil // no version is ever removed
	}
	v, err := decodePolicy(key, value)
	if err != nil {
		return err
	}
	if p.hashes == nil {
		p.hashes = map[string]bool{}
	}
	p.hashes[v.Hash] = true
	if v.Version < p.newest.Version {
		return nil
	}
	p.newest, p.current = v, nil
	if p.offered != nil && hex.EncodeToString(p.offered.Hash[:]) == v.Hash {
		p.current = &rules{p.offered, v.Version}
	}
	return nil
}

// inForce returns the policy in force: before the first start, the policy file.
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

// Policies returns all versions without their texts, the oldest first. The last version is in
// force.
func (a *Appliance) Policies() (all []PolicyVersion, err error) {
	err = a.ledger.All(ledger.Policies, func(key string, value []byte) error {
		v, err := decodePolicy(key, value)
		v.Text = ""
		all = append(all, v)
		return err
	})
	return all, err
}

// Policy returns a version with its text, or manage.ErrNotFound.
func (a *Appliance) Policy(version uint64) (PolicyVersion, error) {
	key := policyKey(version)
	value, err := a.ledger.Get(ledger.Policies, key)
	if err == nil && value == nil {
		err = fmt.Errorf("policy version %d: %w", version, manage.ErrNotFound)
	}
	if err != nil {
		return PolicyVersion{}, err
	}
	return decodePolicy(key, value)
}

// Fitting returns the rules in force whose heads hold for a peer, an action and a key.
func (a *Appliance) Fitting(peer, action, key string) ([]policy.Rule, error) {
	rules, err := a.policies.inForce()
	if err != nil {
		return nil, err
	}
	return rules.Fitting(policy.Request{
		Peer: peer, Action: action, Key: key, PeerGroups: a.groups.in(policy.OfPeers, peer),
		KeyGroups: a.groups.in(policy.OfKeys, key),
	}), nil
}

// Comparison is the result of a replay of recorded decisions with another policy.
type Comparison struct {
	Decisions int      // replayed
	Withheld  int      // not replayed: a rule reads a text that no record has
	Changed   int      // decisions that the other policy would change
	Changes   []Change // the first of them
	Partial   bool     // the time or the number of decisions did not suffice for all
}

// Change is a decision that another policy would change.
type Change struct {
	Event   uint64
	Record  policy.Record
	Allowed bool     // by the other policy
	Rules   []string // ids of the rules of the other policy that decide
}

// Compare replays the decisions since a time with the policy next and the groups of now, at most a
// number of them, until ctx ends. At most the first shown changes are in the result.
func (a *Appliance) Compare(
	ctx context.Context, next *policy.Policy, since time.Time, most, shown int,
) (c Comparison, err error) {
	var failed error
	err = a.Decisions(0, since, func(d Decision) bool {
		if c.Decisions+c.Withheld >= most || ctx.Err() != nil {
			c.Partial = true
			return false
		}
		rec, err := policy.ParseRecord(d.Record)
		if err != nil {
			failed = fmt.Errorf("event %d: %w", d.Event, err)
			return false
		}
		q, err := rec.Request()
		if err != nil {
			failed = fmt.Errorf("event %d: %w", d.Event, err)
			return false
		}
		if next.Readable(q) != nil {
			c.Withheld++
			return true
		}
		c.Decisions++
		q.PeerGroups, q.KeyGroups = a.groups.in(policy.OfPeers, q.Peer), a.groups.in(policy.OfKeys, q.Key)
		if is := next.Decide(q); is.Allowed != rec.Allowed {
			if c.Changed++; len(c.Changes) < shown {
				c.Changes = append(c.Changes, Change{d.Event, rec, is.Allowed, is.Rules})
			}
		}
		return true
	})
	return c, errors.Join(err, failed)
}

// start activates the policy file, unless there are operators. Operators approve policies, and a
// restart must not activate a policy without their approval.
func (p *policies) start(ctx context.Context) error {
	defer p.look(p.log)
	governed := false
	if err := p.ledger.View(func(v ledger.View) (err error) { governed, err = isGoverned(v); return err }); err != nil {
		return err
	}
	if _, err := p.inForce(); err != nil {
		return err
	}
	p.mu.Lock()
	newest := p.newest
	p.mu.Unlock()
	if governed && newest.Version > 0 && newest.Hash != hex.EncodeToString(p.file.Hash[:]) {
		p.log.Warn("the policy file is not in force, since operators have not approved it",
			"in_force", newest.Hash[:16])
		return nil
	}
	_, _, err := p.activate(ctx, audit.Daemon(), p.file)
	return err
}

// ApprovedPolicy returns the policy in force of a ledger with operators, or nil for a ledger
// without operators.
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

// isGoverned reports whether there are operators, so that approvals are required.
func isGoverned(v ledger.View) (yes bool, err error) {
	err = v.All(ledger.Operators, func(string, []byte) error { yes = true; return nil })
	return yes, err
}

// KnowsName reports whether there is a peer, a key or a group of this name, for the warnings about
// a policy (see policy.Warnings). A name of another type counts as known.
func (a *Appliance) KnowsName(entity, name string) bool {
	switch entity {
	case "Peer":
		return a.Peers.Enrolled(name)
	case "Key":
		_, err := a.Keys.Versions(name)
		return err == nil
	case "Group", "KeyGroup":
		g, err := a.Group(name)
		return err == nil && (g.Of == policy.OfKeys) == (entity == "KeyGroup")
	}
	return true
}

// look reads the policy file again, for causes. log is that of the present request, if any.
func (p *policies) look(log *slog.Logger) {
	file, err := p.load()
	p.check()
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil && p.broken == nil {
		log.Error("the policy file can't be used; the policy in force stays", "err", err)
	}
	if p.onDisk, p.broken = "", err; err == nil {
		p.onDisk = hex.EncodeToString(file.Hash[:])
	}
}

// check looks for rules of the policy in force that would be refused today.
func (p *policies) check() {
	rules, err := p.inForce()
	if err != nil {
		return
	}
	p.mu.Lock()
	done := p.checked == rules.Policy
	p.mu.Unlock()
	if done {
		return
	}
	dead := rules.Check("the policy in force")
	p.mu.Lock()
	defer p.mu.Unlock()
	p.checked, p.dead = rules.Policy, dead
}

// causes returns the causes of the policy file at the last look.
func (p *policies) causes() (all []cause.Cause) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.onDisk != "" && p.newest.Version > 0 && !p.hashes[p.onDisk] {
		all = append(all, cause.PolicyWaits.Of("", "SHA-256 %s is in force, the file has %s", p.newest.Hash, p.onDisk))
	}
	all = append(all, cause.PolicyBroken.Err("", p.broken)...)
	return append(all, cause.PolicyPointless.Err("", p.dead)...)
}

// Activate puts a policy in force. When Activate returns, no other policy decides any more. The
// policy is a new version with an event, unless the same text is in force already.
func (a *Appliance) Activate(
	ctx context.Context, who audit.Actor, p *policy.Policy,
) (version uint64, changed bool, err error) {
	return a.policies.activate(ctx, who, p)
}

func (p *policies) activate(
	ctx context.Context, who audit.Actor, offered *policy.Policy,
) (version uint64, changed bool, err error) {
	log := p.log.With(requestid.Attr(who.Request))
	err = p.activating.Run(ctx, log, "activating a policy", func(ctx context.Context) error {
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
	p.look(log) // the state follows at once
	return version, changed, nil
}

// Decision is a decision of the policy about one request.
type Decision struct {
	Event  uint64 // number of the event with the decision
	Record []byte // policy.Record in JSON; the event has the digest of these bytes
}

// Decision returns the decision of an event, or manage.ErrNotFound.
func (a *Appliance) Decision(event uint64) (Decision, error) {
	d, err := a.ledger.Decision(event)
	if errors.Is(err, ledger.ErrNotFound) {
		err = fmt.Errorf("decision of event %d: %w", event, manage.ErrNotFound)
	}
	return Decision{d.Event, d.Record}, err
}

// Decisions calls visit for each decision since an event and a time, in order, until visit returns
// false.
func (a *Appliance) Decisions(from uint64, since time.Time, visit func(Decision) bool) error {
	return a.ledger.Decisions(from, since.UnixMilli(), func(d ledger.Decision) bool {
		return visit(Decision{d.Event, d.Record})
	})
}
