package policy

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/cedar-policy/cedar-go"
)

// Record is a decision with its inputs. With the text of the policy that has the recorded hash,
// anyone can repeat the decision: see Replay.
type Record struct {
	Policy  string          `json:"policy"` // SHA-256 of the policy's text, hex
	Version uint64          `json:"version"`
	TimeMS  int64           `json:"time_ms"` // of the appliance's clock, Unix milliseconds
	Peer    string          `json:"peer"`
	Action  string          `json:"action"`
	Key     string          `json:"key"` // "" with a signer
	Signer  string          `json:"signer,omitempty"`
	Context json.RawMessage `json:"context"` // without the field used, in Cedar's JSON
	Used    Usage           `json:"used"`    // in the order of Counted and Windows: signatures, amount, amount_e8
	Allowed bool            `json:"allowed"`
	Rules   []string        `json:"rules"` // ids of the deciding rules
	Fault   string          `json:"fault,omitempty"`
	// Salt (16 bytes, hex) protects the amount. Without a salt, a reader of the audit log, which
	// has the record's hash, could guess amounts and compare hashes.
	Salt string `json:"salt"`
}

// Decided decides about a request and returns the bytes of the Record, too. The same arguments
// give the same bytes.
func (p *Policy) Decided(version uint64, timeMS int64, r Request, salt [16]byte) (Decision, []byte) {
	d := p.Decide(r)
	b, err := json.Marshal(Record{
		Policy: hex.EncodeToString(p.Hash[:]), Version: version, TimeMS: timeMS, Peer: r.Peer, Action: r.Action,
		Key: r.Key, Signer: r.Signer, Context: r.encoded, Used: r.Used,
		Allowed: d.Allowed, Rules: d.Rules, Fault: d.Fault, Salt: hex.EncodeToString(salt[:]),
	})
	if err != nil {
		panic("policy: a record that is not JSON: " + err.Error()) // strings, numbers and their records always marshal
	}
	return d, b
}

// ParseRecord reads a record of Decided. Bytes that Decided does not write for the record are
// refused.
func ParseRecord(b []byte) (r Record, err error) {
	if err := json.Unmarshal(b, &r); err != nil {
		return Record{}, fmt.Errorf("policy: record: %w", err)
	}
	if again, err := json.Marshal(r); err != nil || !bytes.Equal(again, b) {
		return Record{}, errors.New("policy: record: a field is missing, unknown, or not in the form of Decided")
	}
	return r, nil
}

// Digest returns the SHA-256 of a record's bytes, in hex. The event of a decision in the audit
// log has the digest in place of the record.
func Digest(record []byte) string {
	sum := sha256.Sum256(record)
	return hex.EncodeToString(sum[:])
}

// Request returns the input of the decision.
func (r Record) Request() (Request, error) {
	q := Request{Peer: r.Peer, Action: r.Action, Key: r.Key, Signer: r.Signer, Used: r.Used, encoded: r.Context}
	if err := json.Unmarshal(r.Context, &q.context); err != nil {
		return q, fmt.Errorf("policy: record: %w", err)
	}
	return q, nil
}

// ErrReplay reports a record with another decision than Decide makes of its request.
var ErrReplay = errors.New("policy: the decision does not come out again")

// Replay repeats a recorded decision. Result, deciding rules and fault must be the recorded ones,
// or the error wraps ErrReplay. The record of another policy is an error, too.
func (p *Policy) Replay(r Record) error {
	if hex.EncodeToString(p.Hash[:]) != r.Policy {
		return fmt.Errorf("policy: the decision was made by the policy with SHA-256 %s", r.Policy)
	}
	q, err := r.Request()
	if err != nil {
		return err
	}
	d := p.Decide(q)
	if r.Fault != "" && d.Rules == nil { // an older record lists the permits beside a fault
		r.Rules = slices.DeleteFunc(slices.Clone(r.Rules), p.permits)
	}
	if d.Allowed != r.Allowed || !slices.Equal(d.Rules, r.Rules) || d.Fault != r.Fault {
		return fmt.Errorf("%w: recorded %v by %q, now %v by %q", ErrReplay, r.Allowed, r.Rules, d.Allowed, d.Rules)
	}
	return nil
}

// permits reports whether an id is that of a permit.
func (p *Policy) permits(id string) bool {
	rule := p.rules.Get(cedar.PolicyID(id))
	return rule != nil && rule.Effect() == cedar.Permit
}
