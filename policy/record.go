package policy

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"countersign/internal/ijson"

	"github.com/cedar-policy/cedar-go"
)

// The limits of a record. A peer chooses the text in the context, and a rule of the policy can
// allow everything. Without limits, a peer could make the appliance keep 400 KB for a request.
const (
	MaxText   = 256  // bytes of a text of the context; a longer text is Withheld
	MaxRules  = 16   // deciding rules by their ids; further rules are counted
	MaxRecord = 6144 // bytes of a record, for any request and any policy
	maxFault  = 512  // bytes of a fault
)

// Withheld stands in a record for a text of more than MaxText bytes. No other value of a context is
// an object.
type Withheld struct {
	SHA256 string `json:"sha256"` // of the text, hex
	Bytes  int    `json:"bytes"`  // length of the text
}

func withhold(text string) Withheld {
	sum := sha256.Sum256([]byte(text))
	return Withheld{hex.EncodeToString(sum[:]), len(text)}
}

// recorded returns the context of a record for the fields of a request.
func recorded(fields map[string]any) []byte {
	short := make(map[string]any, len(fields))
	for name, value := range fields {
		if text, is := value.(string); is && len(text) > MaxText {
			value = withhold(text)
		}
		short[name] = value
	}
	return ijson.Encode(short)
}

// listed returns the rules for a record, and the number of further rules.
func listed(rules []string) ([]string, int) {
	n := min(len(rules), MaxRules)
	return rules[:n], len(rules) - n
}

// Record is a decision with its inputs. With the text of the policy that has the recorded hash,
// anyone can repeat the decision: see Replay.
type Record struct {
	Policy  string `json:"policy"` // SHA-256 of the policy's text, hex
	Version uint64 `json:"version"`
	TimeMS  int64  `json:"time_ms"` // of the appliance's clock, Unix milliseconds
	Peer    string `json:"peer"`
	PeerKey string `json:"peer_key,omitempty"` // the peer's key in the session, hex
	Action  string `json:"action"`
	Key     string `json:"key"` // "" with a signer
	Signer  string `json:"signer,omitempty"`
	// PeerGroups and KeyGroups are all groups of the peer and of the key at the decision, whether
	// the policy names them or not, by names in order.
	PeerGroups []string        `json:"peer_groups,omitempty"`
	KeyGroups  []string        `json:"key_groups,omitempty"`
	Context    json.RawMessage `json:"context"` // without the field used: text, integers, and Withheld for long text
	Used       Usage           `json:"used"`    // in the order of Counted and Windows: signatures, amount, amount_e8
	Allowed    bool            `json:"allowed"`
	Rules      []string        `json:"rules"`                   // ids of the deciding rules, at most MaxRules
	More       int             `json:"more,omitempty,omitzero"` // number of further deciding rules
	Fault      string          `json:"fault,omitempty"`
	// Salt (16 bytes, hex) protects the amount. Without a salt, a reader of the audit log, which
	// has the record's hash, could guess amounts and compare hashes.
	Salt string `json:"salt"`
}

// Decided decides about a request and returns the bytes of the Record, too. The same arguments
// give the same bytes.
func (p *Policy) Decided(version uint64, timeMS int64, r Request, salt [16]byte) (Decision, []byte) {
	d := p.Decide(r)
	rules, more := listed(d.Rules)
	return d, ijson.Encode(Record{
		Policy: hex.EncodeToString(p.Hash[:]), Version: version, TimeMS: timeMS, Peer: r.Peer,
		PeerKey: r.PeerKey, Action: r.Action, Key: r.Key, Signer: r.Signer,
		PeerGroups: r.PeerGroups, KeyGroups: r.KeyGroups, Context: r.encoded, Used: r.Used,
		Allowed: d.Allowed, Rules: rules, More: more, Fault: d.Fault, Salt: hex.EncodeToString(salt[:]),
	})
}

// ParseRecord reads a record of Decided. Bytes that Decided does not write for the record are
// refused, except for the form of older versions, which escaped more characters.
func ParseRecord(b []byte) (r Record, err error) {
	if err := json.Unmarshal(b, &r); err != nil {
		return Record{}, fmt.Errorf("policy: record: %w", err)
	}
	fields, err := r.fields()
	if err != nil {
		return Record{}, err
	}
	again := r
	again.Context = ijson.Encode(fields)
	if older, err := json.Marshal(again); err != nil || !bytes.Equal(ijson.Encode(again), b) && !bytes.Equal(older, b) {
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

// Request returns the input of the decision. Rules see a withheld text as empty; Readable reports
// whether that makes a difference.
func (r Record) Request() (Request, error) {
	q := Request{
		Peer: r.Peer, PeerKey: r.PeerKey, Action: r.Action, Key: r.Key, Signer: r.Signer, Used: r.Used,
		PeerGroups: r.PeerGroups, KeyGroups: r.KeyGroups, encoded: r.Context,
	}
	fields, err := r.fields()
	if err != nil {
		return q, err
	}
	context := cedar.RecordMap{}
	for name, value := range fields {
		switch v := value.(type) {
		case string:
			context[cedar.String(name)] = cedar.String(v)
		case int64:
			context[cedar.String(name)] = cedar.Long(v)
		case Withheld:
			context[cedar.String(name)] = cedar.String("")
			q.withheld = append(q.withheld, name)
		}
	}
	slices.Sort(q.withheld)
	q.context = cedar.NewRecord(context)
	return q, nil
}

// fields returns the context: strings, int64 and Withheld by name.
func (r Record) fields() (map[string]any, error) {
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(r.Context, &raw); err != nil {
		return nil, fmt.Errorf("policy: record: %w", err)
	}
	fields := map[string]any{}
	for name, value := range raw {
		var text string
		var number int64
		var long Withheld
		switch {
		case value[0] == '"' && json.Unmarshal(value, &text) == nil:
			fields[name] = text
		case value[0] == '{' && json.Unmarshal(value, &long) == nil:
			fields[name] = long
		case value[0] != 'n' && json.Unmarshal(value, &number) == nil:
			fields[name] = number
		default:
			return nil, fmt.Errorf("policy: record: the field %q of the context is %s: want text, an integer, "+
				"or sha256 and bytes of a long text", ijson.Clip(name), ijson.Clip(string(value)))
		}
	}
	return fields, nil
}

// WithText returns the record with a withheld text of the context in place. The text must have the
// recorded length and SHA-256. The result is for Replay; the bytes in the ledger stay as they are.
func (r Record) WithText(name, text string) (Record, error) {
	fields, err := r.fields()
	if err != nil {
		return r, err
	}
	want, is := fields[name].(Withheld)
	if !is {
		return r, fmt.Errorf("policy: record: the text of %q is not withheld", ijson.Clip(name))
	}
	if got := withhold(text); got != want {
		return r, fmt.Errorf("policy: record: %s has %d bytes with SHA-256 %s, recorded are %d bytes with %s: "+
			"take the text of the document that was decided", name, got.Bytes, got.SHA256, want.Bytes, want.SHA256)
	}
	fields[name] = text
	r.Context = ijson.Encode(fields)
	return r, nil
}

// ErrWithheld reports a decision that depends on a text of which the record has only the SHA-256.
var ErrWithheld = errors.New("policy: the record has only SHA-256 and length of a text that a rule may read")

// Readable returns nil if no rule reads a withheld text of a request, and otherwise an error that
// wraps ErrWithheld. Only the name of a field makes a rule read the field, so that a policy
// without the name decides the same for every text.
func (p *Policy) Readable(r Request) error {
	for _, name := range r.withheld {
		if p.mentions(name) {
			return fmt.Errorf("%w: %s: give the text (policy explain --text %s=FILE)", ErrWithheld, name, name)
		}
	}
	return nil
}

// mentions reports whether the policy's text may name a field. An escape such as "\u{75}sed" or
// "\x75sed" spells a name in another way.
func (p *Policy) mentions(name string) bool {
	return slices.ContainsFunc([]string{name, `\u`, `\x`}, func(part string) bool {
		return bytes.Contains(p.Text, []byte(part))
	})
}

// clipFault bounds the text of a fault, which may quote the policy.
func clipFault(text string) string {
	if len(text) <= maxFault {
		return text
	}
	return strings.ToValidUTF8(text[:maxFault-len("…")], "") + "…"
}

// ErrReplay reports a record with another decision than Decide makes of its request.
var ErrReplay = errors.New("policy: the decision does not come out again")

// Replay repeats a recorded decision. Result, deciding rules and fault must be the recorded ones,
// or the error wraps ErrReplay. The record of another policy is an error, too, and so is a decision
// that depends on a withheld text (ErrWithheld): WithText puts the text in place.
func (p *Policy) Replay(r Record) error {
	if hex.EncodeToString(p.Hash[:]) != r.Policy {
		return fmt.Errorf("policy: the decision was made by the policy with SHA-256 %s", r.Policy)
	}
	q, err := r.Request()
	if err != nil {
		return err
	}
	if err := p.Readable(q); err != nil {
		return err
	}
	d := p.Decide(q)
	if r.Fault != "" && d.Rules == nil { // an older record lists the permits beside a fault
		r.Rules = slices.DeleteFunc(slices.Clone(r.Rules), p.permits)
	}
	rules, more := listed(d.Rules)
	if len(r.Rules) > MaxRules { // an older record lists all rules
		rules, more = d.Rules, 0
	}
	if d.Allowed != r.Allowed || !slices.Equal(rules, r.Rules) || more != r.More || d.Fault != r.Fault {
		return fmt.Errorf("%w: recorded %v by %q, now %v by %q", ErrReplay, r.Allowed, r.Rules, d.Allowed, d.Rules)
	}
	return nil
}

// permits reports whether an id is that of a permit.
func (p *Policy) permits(id string) bool {
	rule := p.rules.Get(cedar.PolicyID(id))
	return rule != nil && rule.Effect() == cedar.Permit
}
