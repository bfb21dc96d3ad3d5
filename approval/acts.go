package approval

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"slices"
	"strconv"
	"strings"

	"countersign/audit"
)

// The acts that need approval, by the names that proposals use: acts that destroy, that make valid
// documents invalid, that widen a permission, or that accept a loss. Each act is in gates.
const (
	ActPeerAdd          = "peer add"
	ActPeerKeyAdd       = "peer key add"
	ActPolicyActivate   = "policy activate"
	ActGroupSet         = "group set"
	ActGroupRemove      = "group remove"
	ActRollbackAccept   = "rollback accept"
	ActHoldRelease      = "hold release"
	ActClockAccept      = "clock accept"
	ActKeyDestroy       = "key destroy"
	ActKeyCompromise    = "key compromise"
	ActKeyArchive       = "key archive"
	ActKeySafeguard     = "key safeguard"
	ActKeyRecover       = "key recover"
	ActKeySet           = "key set"
	ActHoldersSet       = "holders set"
	ActRetentionShorten = "retention shorten"
	ActOperatorAdd      = "operator add"
	ActOperatorRoles    = "operator roles"
	ActOperatorRemove   = "operator remove"
	ActCredentialAdd    = "credential add"
	ActCredentialRemove = "credential remove"
	ActApprovalsNeeded  = "approvals needed"
	ActHardwareKeys     = "approvals hardware"
	ActScraperAdd       = "scraper add"
	ActBackupRestore    = "backup restore"
	ActFactoryReset     = "factory reset"
	ActMachineUpdate    = "machine update"
	ActMachineReset     = "machine reset"
	ActMachineConfigure = "machine configure"
)

// gate connects an act with its proposers, and with the event that records the act in the log.
type gate struct {
	act       string
	proposers []Role // one of these roles may propose the act
	event     audit.Type
	// matches reports that an event of the type records the act. A nil function matches each event.
	matches func(e audit.Event) bool
	// parameters returns the parameters that the proposal must have, with the values of the event.
	// A nil function asks for no parameter.
	parameters func(resource string, m map[string]string) []Parameter
}

// is matches events whose metadata entry has a value.
func is(name, value string) func(audit.Event) bool {
	return func(e audit.Event) bool { return e.Metadata[name] == value }
}

// archivedByHand matches the archiving of a version by an operator. The daemon archives without
// approval: at the end of the grace time, or after the last acknowledgement.
func archivedByHand(e audit.Event) bool {
	return e.Metadata["to"] == "archived" && e.Actor.Kind == "operator"
}

// commitsToRecovery matches the commitment of a line to a recovery successor.
func commitsToRecovery(e audit.Event) bool { return e.Metadata["recovery"] != "" }

// weakened matches a change of a key's settings that needs approval. The event names the weaker
// settings.
func weakened(e audit.Event) bool { return e.Metadata["weaker"] != "" }

func versionOf(resource string, _ map[string]string) []Parameter {
	key, version, _ := strings.Cut(resource, "/")
	return []Parameter{{"key", key}, {"version", version}}
}

// keyOf returns the name of the key of a version.
func keyOf(version string) string {
	key, _, _ := strings.Cut(version, "/")
	return key
}

func peerKeyOf(resource string, m map[string]string) []Parameter {
	return []Parameter{{"name", resource}, {"public_key", m["public_key"]}}
}

func nameOf(resource string, _ map[string]string) []Parameter {
	return []Parameter{{"name", resource}}
}

// membersDigest returns the SHA-256 that a proposal and the next change of the group name.
func membersDigest(members string) string {
	sum := sha256.Sum256([]byte(members))
	return hex.EncodeToString(sum[:])
}

// weakerSettings has the key and each weaker setting with its new value, from the record of the
// settings in the event.
func weakerSettings(resource string, m map[string]string) []Parameter {
	var s struct {
		Grace, Presence int64 // seconds
		Acknowledge     []string
	}
	if json.Unmarshal([]byte(m["settings"]), &s) != nil {
		return []Parameter{{"settings", ""}} // in no proposal
	}
	values := map[string]string{
		"grace": strconv.FormatInt(s.Grace, 10), "presence": strconv.FormatInt(s.Presence, 10),
		"acknowledge": strings.Join(s.Acknowledge, ","),
	}
	p := []Parameter{{"key", resource}}
	for name := range strings.SplitSeq(m["weaker"], ",") {
		p = append(p, Parameter{name, values[name]})
	}
	return p
}

var (
	administrators = []Role{Administrator}
	managers       = []Role{Administrator, OperatorRole}
)

// gates is the table of all acts that need approval. The replay of a log uses the table, and tests
// hold package operators, package admin and the transitions of keys against the table.
var gates = []gate{
	{ActPeerAdd, []Role{OperatorRole}, audit.PeerAdded, nil, peerKeyOf},
	{ActPeerKeyAdd, []Role{OperatorRole}, audit.PeerKeyAdded, nil, peerKeyOf},
	{ActPolicyActivate, administrators, audit.PolicyChanged, nil, func(_ string, m map[string]string) []Parameter {
		return []Parameter{{"sha256", m["sha256"]}}
	}},
	{ActGroupSet, administrators, audit.GroupChanged, nil, func(resource string, m map[string]string) []Parameter {
		return []Parameter{
			{"name", resource}, {"of", m["of"]}, {"sha256", membersDigest(m["members"])}, {"replaces", m["replaces"]},
		}
	}},
	{ActGroupRemove, administrators, audit.GroupRemoved, nil, func(resource string, m map[string]string) []Parameter {
		return []Parameter{{"name", resource}, {"replaces", m["replaces"]}}
	}},
	{ActRollbackAccept, administrators, audit.RollbackAccepted, nil,
		func(_ string, m map[string]string) []Parameter { return []Parameter{{"reason", m["reason"]}} }},
	{ActHoldRelease, administrators, audit.LegalHoldReleased, nil,
		func(resource string, m map[string]string) []Parameter {
			epoch := strings.TrimPrefix(resource, "epoch/")
			return []Parameter{{"epoch", epoch}, {"name", m["hold"]}, {"reason", m["reason"]}}
		}},
	{ActClockAccept, administrators, audit.ClockAccepted, nil, nil},
	{ActKeyArchive, managers, audit.KeyStateChanged, archivedByHand, versionOf},
	{ActKeyDestroy, managers, audit.KeyStateChanged, is("to", "destroyed"), versionOf},
	{ActKeyCompromise, managers, audit.KeyStateChanged, is("to", "compromised"), versionOf},
	{ActKeySafeguard, managers, audit.KeyCommitted, commitsToRecovery,
		func(resource string, m map[string]string) []Parameter {
			return []Parameter{{"key", keyOf(resource)}, {"token", m["token"]}}
		}},
	{ActKeyRecover, managers, audit.KeyRecovered, nil, func(resource string, m map[string]string) []Parameter {
		return []Parameter{{"key", keyOf(resource)}, {"reason", m["reason"]}}
	}},
	{ActKeySet, managers, audit.LineChanged, weakened, weakerSettings},
	{ActHoldersSet, administrators, audit.HoldersChanged, nil, func(_ string, m map[string]string) []Parameter {
		p := []Parameter{{"number", m["number"]}, {"needed", m["needed"]}, {"of", m["of"]}}
		of, _ := strconv.ParseUint(m["of"], 10, 8) // of another form, it is in no proposal
		for i := range min(of, MaxHolders) {
			name := "holder_" + strconv.FormatUint(i+1, 10)
			p = append(p, Parameter{name, m[name]})
		}
		return p
	}},
	{ActRetentionShorten, administrators, audit.RetentionChanged, is("shortened", "yes"), nil},
	{ActOperatorAdd, administrators, audit.OperatorChanged, is("change", ChangeAdded), nameOf},
	{ActOperatorRoles, administrators, audit.OperatorChanged, is("change", ChangeRoles), nameOf},
	{ActOperatorRemove, administrators, audit.OperatorChanged, is("change", ChangeRemoved), nameOf},
	{ActCredentialAdd, administrators, audit.OperatorChanged, is("change", ChangeCredentialAdded), nameOf},
	{ActCredentialRemove, administrators, audit.OperatorChanged, is("change", ChangeCredentialRemoved), nameOf},
	{ActApprovalsNeeded, administrators, audit.ApprovalsChanged, nil, func(_ string, m map[string]string) []Parameter {
		return []Parameter{{"needed", m["needed"]}}
	}},
	{ActHardwareKeys, administrators, audit.ApproverKeysChanged, nil, func(_ string, m map[string]string) []Parameter {
		return []Parameter{{"required", m["required"]}}
	}},
	{ActBackupRestore, administrators, audit.BackupRestored, nil,
		func(_ string, m map[string]string) []Parameter {
			return []Parameter{{"sha256", m["sha256"]}, {"replaces", m["replaces"]}}
		}},
	{ActFactoryReset, administrators, audit.FactoryResetBegun, nil,
		func(_ string, m map[string]string) []Parameter {
			return []Parameter{{"machine", m["machine"]}, {"ledger", m["ledger"]}, {"keys", m["keys"]}}
		}},
	{ActMachineUpdate, administrators, audit.MachineUpdateBegun, nil,
		func(resource string, m map[string]string) []Parameter {
			return []Parameter{{"version", resource}, {"from", m["from"]}, {"sha256", m["sha256"]}}
		}},
	{ActMachineReset, administrators, audit.MachineResetBegun, nil,
		func(resource string, _ map[string]string) []Parameter { return []Parameter{{"name", resource}} }},
	{ActMachineConfigure, administrators, audit.MachineConfigurationBegun, nil,
		func(resource string, m map[string]string) []Parameter {
			return []Parameter{{"from", m["from"]}, {"sha256", resource}}
		}},
	{ActScraperAdd, administrators, audit.ScraperAdded, nil, func(resource string, m map[string]string) []Parameter {
		return []Parameter{{"name", resource}, {"token_sha256", m["token_sha256"]}, {"expires", m["expires"]}}
	}},
}

// MaxHolders is the most recovery holders that an act can name.
const MaxHolders = 9

// The changes of an operator that an event OperatorChanged can name.
const (
	ChangeAdded             = "added"
	ChangeRoles             = "roles"
	ChangeRemoved           = "removed"
	ChangeCredentialAdded   = "credential added"
	ChangeCredentialRemoved = "credential removed"
)

// Acts lists all acts that need approval, in alphabetical order.
func Acts() (all []string) {
	for _, g := range gates {
		all = append(all, g.act)
	}
	slices.Sort(all)
	return all
}

// Proposers returns the roles of which a proposer of the act has one; nil: there is no such act.
func Proposers(act string) []Role {
	for _, g := range gates {
		if g.act == act {
			return g.proposers
		}
	}
	return nil
}

// NeedsApproval returns the act that an event records, or "" if the event needs no approval.
func NeedsApproval(e audit.Event) (act string) {
	g, _ := gateOf(e)
	return g.act
}

// gateOf finds the gate of an event. An unknown change of an operator has a gate without an act,
// and no proposal fits that gate.
func gateOf(e audit.Event) (g gate, gated bool) {
	for _, g := range gates {
		if g.event == e.Type && (g.matches == nil || g.matches(e)) {
			return g, true
		}
	}
	return gate{}, e.Type == audit.OperatorChanged
}
