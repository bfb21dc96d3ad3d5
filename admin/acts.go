package admin

import (
	"cmp"
	"context"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"countersign/appliance"
	"countersign/approval"
	"countersign/audit"
	"countersign/internal/ijson"
	"countersign/internal/machine"
	"countersign/internal/manage"
	"countersign/internal/operators"
	"countersign/internal/peers"
	"countersign/policy"
)

type (
	parameters = []approval.Parameter
	do         = func(context.Context, audit.Actor) error // carries an act out
)

// prepare validates the parameters and the content of an act. prepare returns the parameters in the
// form to be approved, and the function that carries the act out.
type prepare func(a *appliance.Appliance, p parameters, content []byte) (parameters, do, error)

// warn returns the doubts about a proposed act that prepare has accepted.
type warn func(a *appliance.Appliance, p parameters, content []byte) []string

// act is an act that needs an approved proposal.
type act struct {
	prepare
	warn // nil: nothing to warn of
}

// acts are the acts that need an approved proposal, except the acts on operators, which package
// operators has. approval.Proposers has the roles of the proposers.
var acts = map[string]act{
	approval.ActPeerAdd:          {addPeer, warnAddPeer},
	approval.ActPeerKeyAdd:       {addPeerKey, nil},
	approval.ActPolicyActivate:   {activate, warnActivate},
	approval.ActGroupSet:         {setGroup, nil},
	approval.ActGroupRemove:      {removeGroup, warnRemoveGroup},
	approval.ActRollbackAccept:   {acceptRollback, nil},
	approval.ActHoldRelease:      {release, nil},
	approval.ActClockAccept:      {acceptTime, nil},
	approval.ActKeyArchive:       {archiveKey, nil},
	approval.ActKeyDestroy:       {destroyKey, nil},
	approval.ActKeyCompromise:    {compromiseKey, nil},
	approval.ActKeySafeguard:     {makeRecovery, nil},
	approval.ActKeyRecover:       {recoverLine, nil},
	approval.ActKeySet:           {setKey, nil},
	approval.ActHoldersSet:       {setHolders, warnSetHolders},
	approval.ActRetentionShorten: {shortenRetention, nil},
}

// Acts returns the acts for operators.Open. An act is validated at the proposal, so that operators
// do not approve an impossible act, and again before the execution.
//
// m is nil for an appliance that was not booted from the image.
func Acts(a *appliance.Appliance, m *machine.Client) map[string]operators.Act {
	all := map[string]operators.Act{}
	every := maps.Clone(acts)
	maps.Copy(every, machineActs(m))
	for name, act := range every {
		each := operators.Act{
			Roles: approval.Proposers(name),
			Check: func(p parameters, content []byte) (parameters, error) {
				p, _, err := act.prepare(a, p, content)
				return p, err
			},
			Run: func(ctx context.Context, who audit.Actor, p parameters, content []byte) error {
				_, do, err := act.prepare(a, p, content)
				if err != nil {
					return err
				}
				return do(ctx, who)
			},
		}
		if act.warn != nil {
			each.Warn = func(p parameters, content []byte) []string { return act.warn(a, p, content) }
		}
		all[name] = each
	}
	return all
}

func addPeer(a *appliance.Appliance, p parameters, _ []byte) (parameters, do, error) {
	v, err := values(p, "name", "public_key")
	if err != nil {
		return nil, nil, err
	}
	name := v["name"]
	key, err := newPeerKey(a, v)
	if err == nil && a.Peers.Enrolled(name) {
		err = fmt.Errorf("peer %q: %w: a further key of it is peer key add", name, manage.ErrExists)
	}
	if err != nil {
		return nil, nil, err
	}
	p = list("name", name, "public_key", hex.EncodeToString(key))
	return p, func(ctx context.Context, who audit.Actor) error {
		_, err := a.Peers.Add(ctx, who, name, key)
		return err
	}, notRolledBack(a)
}

func warnAddPeer(a *appliance.Appliance, p parameters, _ []byte) []string {
	v, err := values(p, "name", "public_key")
	if in := a.GroupsOf(policy.OfPeers, v["name"]); err == nil && len(in) > 0 {
		return []string{fmt.Sprintf("a peer of the name %s is a member of the groups %s, and gets their rights",
			v["name"], strings.Join(in, ", "))}
	}
	return nil
}

// addPeerKey adds a key to the peer that was enrolled under the name at the time enrolled. If the
// name has gone to another party since, what was approved before is refused.
func addPeerKey(a *appliance.Appliance, p parameters, _ []byte) (parameters, do, error) {
	v, err := values(p, "name", "enrolled", "public_key")
	if err != nil {
		return nil, nil, err
	}
	name := v["name"]
	key, err := newPeerKey(a, v)
	if err != nil {
		return nil, nil, err
	}
	s, err := a.Peers.Status(name)
	enrolled := s.Added.UTC().Format(time.RFC3339)
	switch {
	case err != nil:
	case v["enrolled"] != enrolled:
		err = conflict.errorf("peer %q: it was enrolled at %s, and the proposal is about the peer that was enrolled "+
			"at %s: propose again", name, enrolled, v["enrolled"])
	case len(s.Keys) >= peers.MaxKeys:
		err = conflict.errorf("peer %q: it has %d keys, the most that a peer may have: remove one", name, len(s.Keys))
	}
	if err != nil {
		return nil, nil, err
	}
	p = list("name", name, "enrolled", enrolled, "public_key", hex.EncodeToString(key))
	return p, func(ctx context.Context, who audit.Actor) error {
		return a.Peers.AddKey(ctx, who, name, key)
	}, notRolledBack(a)
}

// newPeerKey returns the public key of an act that enrols it. No peer may have the key.
func newPeerKey(a *appliance.Appliance, v map[string]string) ([]byte, error) {
	name := v["name"]
	key, err := hex.DecodeString(v["public_key"])
	if err != nil || len(key) != 32 {
		return nil, invalid.errorf("peer %q: its public key must be 64 hex digits", name)
	}
	if err := peers.Check(name, key); err != nil { // before anybody approves it
		return nil, err
	}
	for _, each := range a.Peers.All() {
		if slices.ContainsFunc(each.Keys, func(k peers.Key) bool { return k.PublicKey == [32]byte(key) }) {
			return nil, fmt.Errorf("peer %q: %w: the public key is enrolled as %q",
				name, manage.ErrExists, each.Name)
		}
	}
	return key, nil
}

// activate puts the approved policy in force. The text of the policy is the content of the
// proposal, and the parameter sha256 is its digest.
func activate(a *appliance.Appliance, p parameters, content []byte) (parameters, do, error) {
	v, err := values(p, "?sha256")
	if err != nil {
		return nil, nil, err
	}
	rules, err := policy.Offer("policy.cedar", content)
	if err != nil {
		return nil, nil, invalid.errorf("%v", err)
	}
	hash := hex.EncodeToString(rules.Hash[:])
	if v["sha256"] != "" && v["sha256"] != hash {
		return nil, nil, invalid.errorf("policy: the SHA-256 of its text is %s", hash)
	}
	all, err := a.Policies()
	if err != nil {
		return nil, nil, err
	}
	if n := len(all); n > 0 && all[n-1].Hash == hash {
		return nil, nil, conflict.errorf("policy: that text is in force already, as version %d", all[n-1].Version)
	}
	return list("sha256", hash), func(ctx context.Context, who audit.Actor) error {
		_, _, err := a.Activate(ctx, who, rules)
		return err
	}, notRolledBack(a)
}

func warnActivate(a *appliance.Appliance, _ parameters, content []byte) (doubts []string) {
	rules, err := policy.Parse("policy.cedar", content)
	if err != nil {
		return nil // activate has refused it
	}
	for _, w := range rules.Warnings(a.KnowsName) {
		doubts = append(doubts, w.String())
	}
	return doubts
}

// setGroup replaces the members of a group. Their text is the content of the proposal, and the
// parameter sha256 is its digest. The parameter replaces is the digest of the members before.
func setGroup(a *appliance.Appliance, p parameters, content []byte) (parameters, do, error) {
	v, err := values(p, "name", "of", "?sha256", "?replaces")
	if err != nil {
		return nil, nil, err
	}
	g, err := policy.ParseGroup(v["name"], v["of"], string(content))
	if err != nil {
		return nil, nil, invalid.errorf("%v", err)
	}
	if v["sha256"] != "" && v["sha256"] != g.Digest() {
		return nil, nil, invalid.errorf("group %q: the SHA-256 of its members is %s", g.Name, g.Digest())
	}
	before, _ := a.Group(g.Name) // no group has the digest policy.NoGroup
	replaces := cmp.Or(v["replaces"], before.Digest())
	if before.Of == g.Of && before.Digest() == g.Digest() {
		return nil, nil, conflict.errorf("group %q: it has these members already", g.Name)
	}
	if err := a.CheckGroup(g, replaces); err != nil {
		return nil, nil, err
	}
	p = list("name", g.Name, "of", g.Of, "sha256", g.Digest(), "replaces", replaces)
	return p, func(ctx context.Context, who audit.Actor) error {
		return a.SetGroup(ctx, who, g, replaces)
	}, notRolledBack(a)
}

func removeGroup(a *appliance.Appliance, p parameters, _ []byte) (parameters, do, error) {
	v, err := values(p, "name", "?replaces")
	if err != nil {
		return nil, nil, err
	}
	before, err := a.Group(v["name"])
	if err != nil {
		return nil, nil, err
	}
	replaces := cmp.Or(v["replaces"], before.Digest())
	if err := a.CheckGroupRemoval(before.Name, replaces); err != nil {
		return nil, nil, err
	}
	return list("name", before.Name, "replaces", replaces), func(ctx context.Context, who audit.Actor) error {
		return a.RemoveGroup(ctx, who, before.Name, replaces)
	}, notRolledBack(a)
}

// maxLines bounds the lines that a warning names.
const maxLines = 20

func warnRemoveGroup(a *appliance.Appliance, p parameters, _ []byte) []string {
	v, _ := values(p, "name", "replaces")
	g, err := a.Group(v["name"])
	if err != nil {
		return nil // removeGroup has refused it
	}
	rules, err := a.RulesAbout(g.Group)
	if err != nil || len(rules) == 0 {
		return nil
	}
	lines := docs(rules, func(r policy.Rule) string { return strconv.Itoa(r.Line) })
	more := ""
	if n := len(lines) - maxLines; n > 0 {
		lines, more = lines[:maxLines], fmt.Sprintf(" and %d more", n)
	}
	return []string{fmt.Sprintf("rules of the policy in force name the group, and hold for nobody without it, "+
		"also those that forbid: line %s%s", strings.Join(lines, ", "), more)}
}

func acceptRollback(a *appliance.Appliance, p parameters, _ []byte) (parameters, do, error) {
	v, err := values(p, "reason")
	if err != nil {
		return nil, nil, err
	}
	_, err = a.Anchor.Acceptable()
	return p, func(ctx context.Context, who audit.Actor) error { return a.Anchor.Accept(ctx, who, v["reason"]) }, err
}

func release(a *appliance.Appliance, p parameters, _ []byte) (parameters, do, error) {
	v, err := values(p, "epoch", "name", "reason")
	if err != nil {
		return nil, nil, err
	}
	n, err := strconv.ParseUint(v["epoch"], 10, 32)
	if err != nil {
		return nil, nil, invalid.errorf("epoch: %q is not the number of one", v["epoch"])
	}
	epochs, _, err := a.Preview()
	held := func(e appliance.EpochStatus) bool {
		_, held := e.Holds[v["name"]]
		return held && uint64(e.Number) == n
	}
	if err == nil && !slices.ContainsFunc(epochs, held) {
		err = fmt.Errorf("hold %q on epoch %d: %w", ijson.Clip(v["name"]), n, manage.ErrNotFound)
	}
	p = list("epoch", strconv.FormatUint(n, 10), "name", v["name"], "reason", v["reason"])
	return p, func(ctx context.Context, who audit.Actor) error {
		return a.Release(ctx, who, uint32(n), v["name"], v["reason"])
	}, err
}

func acceptTime(a *appliance.Appliance, p parameters, _ []byte) (parameters, do, error) {
	_, err := values(p)
	return nil, a.AcceptTime, err
}

// values returns the values of an act's parameters by name. Each parameter must be one of names,
// and must occur once. A name after a question mark is optional. A reason has the length that the
// audit log takes.
func values(p parameters, names ...string) (map[string]string, error) {
	v := map[string]string{}
	for _, each := range p {
		known := slices.Contains(names, each.Name) || slices.Contains(names, "?"+each.Name)
		if _, twice := v[each.Name]; twice || !known {
			return nil, invalid.errorf("parameter %q is not one of this act, or is there twice", each.Name)
		}
		v[each.Name] = each.Value
	}
	for _, name := range names {
		if v[name] == "" && !strings.HasPrefix(name, "?") {
			return nil, invalid.errorf("%s is missing", name)
		}
	}
	if reason, given := v["reason"]; given {
		return v, manage.CheckReason(reason)
	}
	return v, nil
}

// list returns parameters from alternating names and values.
func list(pairs ...string) (p parameters) {
	for pair := range slices.Chunk(pairs, 2) {
		p = append(p, approval.Parameter{Name: pair[0], Value: pair[1]})
	}
	return p
}

// notRolledBack refuses acts that widen a permission while the ledger is older than its monotonic
// counter.
func notRolledBack(a *appliance.Appliance) error {
	rolled, err := a.Anchor.Rollback()
	if err == nil && rolled != nil {
		err = rolledBack.errorf(rolledBackAdvice)
	}
	return err
}
