package appliance

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/big"
	"os"
	"slices"
	"strings"
	"testing"

	"countersign/audit"
	"countersign/internal/cause"
	"countersign/internal/keyring"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/peers"
	"countersign/policy"
	"countersign/transcript"
	"countersign/wire"
)

// payloads has a payload of each type of document.
func payloads(t *testing.T) (all []struct {
	Type    string
	Payload json.RawMessage
}) {
	t.Helper()
	b, err := os.ReadFile("../transcript/testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, &all); err != nil {
		t.Fatal(err)
	}
	return all
}

// TestEveryContextFitsTheSchema: the context of every type of document fits the schema of policies,
// and the recorded decision can be replayed.
func TestEveryContextFitsTheSchema(t *testing.T) {
	r := newRig(t)
	vectors := payloads(t)
	key, err := r.Keys.Signing("payments")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Keys.Create(t.Context(), audit.Operator("test"), keyring.NewKey{Name: "raw-x"}); err != nil {
		t.Fatal(err)
	}
	raw, err := r.Keys.Signing("raw-x")
	if err != nil {
		t.Fatal(err)
	}
	vectors = append(vectors, vectors[0])
	largest := r.payment(1, "9223372036854775806", "SAT", payeeOne) // the largest amount, with this key as a party
	vectors[len(vectors)-1].Type = largest.Type
	vectors[len(vectors)-1].Payload = json.RawMessage(largest.Payload)
	seen := map[string]bool{}
	for _, v := range vectors {
		doc, err := transcript.Parse(transcript.Request{
			Type: v.Type, Payload: v.Payload, Timestamp: 1, ExpiresAt: transcript.MaxTime,
		})
		if err != nil {
			t.Fatalf("%s: %v", v.Type, err)
		}
		identified := Caller{
			Peer:     peers.Peer{Name: "x", PublicKey: r.shop.PublicKey},
			Identity: hex.EncodeToString(r.public),
		}
		for _, who := range []Caller{r.shop, identified} {
			key := key
			if v.Type == "raw" {
				_, err := r.decisionOf(who, key, 0, doc)
				r.refuses(t, wire.CodeDenied, err)
				key = raw
			}
			d, err := r.decisionOf(who, key, 0, doc)
			if doc.Reserved {
				r.refuses(t, wire.CodeDenied, err)
				seen[v.Type] = true
				continue
			}
			if err != nil {
				t.Errorf("%s: %v", v.Type, err)
				continue
			}
			d.mayUse = func() error { return nil } // the vectors name other keys as parties
			used := make([]ledger.Used, len(d.series))
			for i := range used {
				for w := range used[i] {
					if used[i][w] = new(big.Int).Lsh(big.NewInt(1), 200); i%2 == 0 || !d.payment {
						used[i][w] = big.NewInt(math.MaxInt64)
					}
				}
			}
			record, _ := d.decide(used)
			if err := d.request.Check(); err != nil {
				t.Errorf("%s: %v", v.Type, err)
			}
			rec, err := policy.ParseRecord(record)
			if err != nil {
				t.Fatal(err)
			}
			if err := d.rules.Replay(rec); err != nil {
				t.Errorf("%s: %v", v.Type, err)
			}
			possible(t, rec)
			want := policy.Sign
			if v.Type == "raw" {
				want = policy.SignRaw
			}
			if rec.Action != want {
				t.Errorf("%s is %s", v.Type, rec.Action)
			}
			party := slices.ContainsFunc(doc.Signers, func(k []byte) bool { return bytes.Equal(k, r.public) })
			both := len(doc.Signers) == 2 && party || doc.Payment != nil // payments without one share a window
			if (rec.Used[counterpartyIndex] != policy.Usage{}[0]) != both {
				t.Errorf("%s: counted for a counterparty: %v; there is one: %v",
					v.Type, rec.Used[counterpartyIndex], both)
			}
			seen[v.Type] = true
		}
	}
	for _, known := range transcript.Types() {
		if !seen[known.Name] {
			t.Errorf("there is no vector of %s", known.Name)
		}
	}
}

// possible sees that a rule may compare with each value of a recorded context: the annotations of
// the schema bound no value that a document can have.
func possible(t *testing.T, rec policy.Record) {
	t.Helper()
	var fields map[string]any
	d := json.NewDecoder(bytes.NewReader(rec.Context))
	d.UseNumber()
	if err := d.Decode(&fields); err != nil {
		t.Fatal(err)
	}
	for name, value := range fields {
		literal := fmt.Sprint(value)
		if text, is := value.(string); is {
			literal = `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(text) + `"`
		}
		rule := fmt.Sprintf("forbid (principal, action == Action::%q, resource) "+
			"when { context.transcript == %q && context has %s && context.%s == %s };",
			rec.Action, fields["transcript"], name, name, literal)
		if _, err := policy.Offer("p", []byte(rule)); err != nil {
			t.Errorf("%s: %v", rule, err)
		}
	}
}

// TestPaymentsEscapeNoWindow: payments that name no payee share one window of the key, and a
// currency has one sum in all spellings.
func TestPaymentsEscapeNoWindow(t *testing.T) {
	for name, payload := range map[string]string{
		"without a payee": `{"payer":"%x","amount":"3","currency":"SAT","method":"x","endpoint":"y"}`,
		"another spelling": `{"payer":"%x","payee":"` + payeeOne + `","amount":"3","currency":"sAt","method":"x",` +
			`"endpoint":"y"}`,
	} {
		r := newRig(t)
		p := parsed(t, `permit (principal, action == Action::"sign", resource)
when { context has amount && context.used.counterparty.day.amount <= 5 };`)
		if _, _, err := r.Activate(t.Context(), audit.Operator("test"), p); err != nil {
			t.Fatal(err)
		}
		first := r.payment(1, "3", "SAT", payeeOne)
		if name == "without a payee" {
			first.Payload = fmt.Appendf(nil, payload, r.public)
		}
		if _, err := r.Sign(t.Context(), r.shop, first); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		second := r.payment(2, "3", "SAT", payeeOne)
		second.Payload = fmt.Appendf(nil, payload, r.public)
		_, err := r.Sign(t.Context(), r.shop, second)
		r.refuses(t, wire.CodeDenied, err)
	}
}

// TestApprovedRuleThatNeverApplies: a policy that was approved before the checks of its rules stays
// in force, and the state tells operators of it.
func TestApprovedRuleThatNeverApplies(t *testing.T) {
	r := newRig(t)
	p := parsed(t, `forbid (principal, action, resource) when { context.weekday == "sunday" };`)
	if _, _, err := r.Activate(t.Context(), audit.Operator("test"), p); err != nil {
		t.Fatal(err)
	}
	told := func() bool {
		pointless := func(c cause.Cause) bool { return c.Kind == cause.PolicyPointless }
		return slices.ContainsFunc(r.Health().Causes, pointless)
	}
	if !told() {
		t.Error("the state does not tell of it")
	}
	if _, _, err := r.Activate(t.Context(), audit.Operator("test"), parsed(t, "")); err != nil || told() {
		t.Error("the state still tells of it", err)
	}
}

// The public keys of two payees.
const (
	payeeOne = "d04ab232742bb4ab3a1368bd4615e4e6d0224ab71a016baf8520a332c9778737"
	payeeTwo = "a09aa5f47a6759802ff955f8dc2d2a14a5c99d23be97f864127ff9383455a4f0"
)

// payment returns a sign request for a payment from the rig's key to a payee.
func (r *rig) payment(n byte, amount, currency, payee string) *wire.Sign {
	s := message(n, "")
	s.Type = "payment-request-v1"
	s.Payload = fmt.Appendf(nil, `{"payer":"%x","payee":%q,"amount":%q,"currency":%q,"method":"x","endpoint":"y"}`,
		r.public, payee, amount, currency)
	return s
}

// TestBudgets: an admitted amount is counted exactly and once, by currency and by counterparty. A
// denied amount is not counted.
func TestBudgets(t *testing.T) {
	r := newRig(t)
	p := parsed(t, `permit (principal, action == Action::"sign", resource)
when { context has amount && context.used.key.day.amount <= 10 }
unless { context.used.counterparty.day.amount > 6 };`)
	if _, changed, err := r.Activate(t.Context(), audit.Operator("test"), p); err != nil || !changed {
		t.Fatal(changed, err)
	}
	if _, changed, err := r.Activate(t.Context(), audit.Operator("test"), p); err != nil || changed {
		t.Fatal(changed, err)
	}
	const one, two = payeeOne, payeeTwo
	denies := func(s *wire.Sign) {
		t.Helper()
		_, err := r.Sign(t.Context(), r.shop, s)
		r.refuses(t, wire.CodeDenied, err)
	}
	r.sign(t, r.shop, r.payment(1, "5.5", "SAT", one))
	r.sign(t, r.shop, r.payment(1, "5.5", "SAT", one)) // a repetition
	denies(r.payment(2, "0.5000000000000000000000000001", "SAT", one))
	denies(r.payment(2, "1", "SAT", one))
	r.sign(t, r.shop, r.payment(2, "0.5", "SAT", one)) // 6; the denials have not spent the nonce
	r.sign(t, r.cafe, r.payment(3, "4", "SAT", two))   // 10 for the key
	denies(r.payment(4, "0.01", "SAT", two))
	r.sign(t, r.shop, r.payment(4, "6", "EUR", one))
	denies(r.payment(5, "9223372036854775807", "EUR", one))
	denies(message(5, ""))
}

// TestDecisionsAreDropped: a decision is dropped after its retention time. The event and the counts
// stay.
func TestDecisionsAreDropped(t *testing.T) {
	r := newRig(t)
	signed := r.sign(t, r.shop, message(1, ""))
	d, err := r.Decision(signed.Event)
	if err != nil {
		t.Fatal(err)
	}
	var logged audit.Event
	find := func() {
		if err := r.Events(signed.Event, func(_ uint64, e audit.Event) bool { logged = e; return false }); err != nil {
			t.Fatal(err)
		}
	}
	if find(); logged.Metadata["inputs"] != policy.Digest(d.Record) {
		t.Errorf("%+v", logged)
	}
	for _, kept := range []bool{true, false} {
		if !kept {
			r.retention.Decisions = -1 << 40 // -18 minutes: decisions of the next 18 minutes are due, too
		}
		if _, err := r.retain(t.Context()); err != nil {
			t.Fatal(err)
		}
		_, err := r.Decision(signed.Event)
		if (err == nil) != kept || err != nil && !errors.Is(err, manage.ErrNotFound) {
			t.Errorf("kept: %v, %v", kept, err)
		}
	}
	if find(); logged.Metadata["inputs"] != policy.Digest(d.Record) {
		t.Errorf("%+v", logged)
	}
	again := r.sign(t, r.shop, message(2, ""))
	if d, err = r.Decision(again.Event); err != nil || !bytes.Contains(d.Record, []byte(`"used":[[[2,0,0],`)) {
		t.Errorf("%s, %v", d.Record, err)
	}
}

// TestPolicyOfTheMoment: a request begins under one policy, and is decided under another. The
// policy in force at the decision decides, and is in the record.
func TestPolicyOfTheMoment(t *testing.T) {
	r := newEdge(t, nil)
	key, err := r.Keys.Signing("payments")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := transcript.Parse(documentOf(message(1, "m").Document))
	if err != nil {
		t.Fatal(err)
	}
	d, err := r.decisionOf(Caller{Peer: peers.Peer{Name: "shop", PublicKey: r.shop.Public()}}, key, 0, doc)
	if err != nil {
		t.Fatal(err)
	}
	none := parsed(t, "")
	version, _, err := r.Activate(t.Context(), operator, none)
	if err != nil {
		t.Fatal(err)
	}
	record, err := d.decide(nil)
	if !errors.Is(err, policy.ErrDenied) {
		t.Errorf("a policy that is not in force any more has decided: %v", err)
	}
	if _, err := r.Decision(1); !errors.Is(err, manage.ErrNotFound) {
		t.Errorf("an event without a decision: %v, want %v", err, manage.ErrNotFound)
	}
	if rec, err := policy.ParseRecord(record); err != nil || rec.Version != version || none.Replay(rec) != nil {
		t.Errorf("the record says version %d, %v; want %d", rec.Version, err, version)
	}
}
