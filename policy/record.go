package policy

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
)

// Record is a decision with all that it was made from: with the text of the policy of that hash, anyone can make it again.
type Record struct {
	Policy  string          `json:"policy"` // SHA-256 of its text, hex
	Version uint64          `json:"version"`
	TimeMS  int64           `json:"time_ms"` // of the appliance's clock, Unix milliseconds
	Peer    string          `json:"peer"`
	Action  string          `json:"action"`
	Key     string          `json:"key"`
	Context json.RawMessage `json:"context"` // all of it but what is used, in the JSON of Cedar
	Used    Usage           `json:"used"`    // in the order of Counted and Windows: signatures, amount, amount_e8
	Allowed bool            `json:"allowed"`
	Rules   []string        `json:"rules"` // ids of those that decided
	Fault   string          `json:"fault,omitempty"`
	// Salt (16 bytes, hex) keeps the record's hash, which is in the audit log, from telling the amount to who can guess.
	Salt string `json:"salt"`
}

// Decided makes the record of a decision, and the bytes that are kept of it. They are the same for the same decision.
func (p *Policy) Decided(version uint64, timeMS int64, r Request, salt [16]byte) (Decision, []byte) {
	d := p.Decide(r)
	b, err := json.Marshal(Record{
		Policy: hex.EncodeToString(p.Hash[:]), Version: version, TimeMS: timeMS, Peer: r.Peer, Action: r.Action, Key: r.Key, Context: r.encoded, Used: r.Used,
		Allowed: d.Allowed, Rules: d.Rules, Fault: d.Fault, Salt: hex.EncodeToString(salt[:]),
	})
	if err != nil {
		panic("policy: a record that is not JSON: " + err.Error()) // strings, numbers and records of them always are
	}
	return d, b
}

// ParseRecord reads what Decided wrote, in these bytes only.
func ParseRecord(b []byte) (r Record, err error) {
	if err := json.Unmarshal(b, &r); err != nil {
		return Record{}, fmt.Errorf("policy: record: %w", err)
	}
	if again, err := json.Marshal(r); err != nil || !bytes.Equal(again, b) {
		return Record{}, errors.New("policy: record: it is not as it is written: fields are missing, unknown, or in another form")
	}
	return r, nil
}

// Digest is what the event of a decision has of its record: the SHA-256 of the bytes, in hex.
func Digest(record []byte) string {
	sum := sha256.Sum256(record)
	return hex.EncodeToString(sum[:])
}

// Request is what the decision was made from.
func (r Record) Request() (Request, error) {
	q := Request{Peer: r.Peer, Action: r.Action, Key: r.Key, Used: r.Used, encoded: r.Context}
	if err := json.Unmarshal(r.Context, &q.context); err != nil {
		return q, fmt.Errorf("policy: record: %w", err)
	}
	return q, nil
}

// ErrReplay says that a record does not come out again.
var ErrReplay = errors.New("policy: the decision does not come out again")

// Replay makes a decision again. It must come out as it was, by the same rules.
func (p *Policy) Replay(r Record) error {
	if hex.EncodeToString(p.Hash[:]) != r.Policy {
		return fmt.Errorf("policy: the decision was made by the policy with SHA-256 %s", r.Policy)
	}
	q, err := r.Request()
	if err != nil {
		return err
	}
	d := p.Decide(q)
	if d.Allowed != r.Allowed || !slices.Equal(d.Rules, r.Rules) || d.Fault != r.Fault {
		return fmt.Errorf("%w: recorded %v by %q, now %v by %q", ErrReplay, r.Allowed, r.Rules, d.Allowed, d.Rules)
	}
	return nil
}
