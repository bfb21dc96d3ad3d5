package appliance

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"maps"
	"math"
	"math/big"
	"strings"
	"time"

	"countersign/audit"
	"countersign/internal/form"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/meter"
	"countersign/policy"
	"countersign/transcript"
	"countersign/wire"
)

// decision is the decision about one request to sign or to verify. The ledger calls decide inside
// the admission, because the budgets need exact counts of earlier admissions. Then the ledger calls
// event.
type decision struct {
	policies   *policies
	groups     *groups
	who        Caller
	doc        *transcript.Document
	action     string
	key        string       // name; "" for another signer than the appliance
	publicKey  []byte       // of the key or the signer
	mayUse     func() error // the error of a version that may not sign the document at this moment
	at         time.Time
	generation *ledger.Monotonic // nil for a document without a generation
	admission  audit.Event

	// The results of prepare.
	prepared bool
	request  policy.Request
	payment  bool // the amounts are counted
	salt     [16]byte
	series   []ledger.Count

	// The results of decide.
	rules   *rules
	refused error // of the key's state or the policy's text, before the policy was evaluated
	allowed bool
	record  []byte
}

// decisionOf prepares a decision about a signature outside the ledger, by the requested version of
// the key; 0 is any version. The error refuses documents reserved for the appliance itself, and
// amounts beyond the range of Cedar's integers.
func (a *Appliance) decisionOf(
	who Caller, key *keyring.Key, version uint32, doc *transcript.Document,
) (*decision, error) {
	who.walk.Enter(meter.Policy)
	if doc.Reserved {
		return nil, fmt.Errorf("%w: %s is made by the appliance only", errNotYours, doc.Type)
	}
	if err := form.CheckDocument(key.Name, doc.Type); err != nil {
		return nil, err
	}
	mayUse := func() error {
		if err := cmp.Or(checkRequested(key, version), a.Keys.MayUse(key)); err != nil {
			return err
		}
		return doc.CheckSigner(key.Info().PublicKey) // a fresh nonce is for this version only
	}
	d := &decision{
		policies: &a.policies, groups: &a.groups, who: who, doc: doc, action: policy.Sign, key: key.Name,
		publicKey: key.Info().PublicKey, mayUse: mayUse, at: time.Now(),
		admission: audit.NewAdmission(who.actor(), key.Ref().String(), keyring.DocumentOf(doc)),
	}
	if doc.Type == "raw" {
		d.action = policy.SignRaw
	}
	if doc.Generation != nil {
		d.generation = &ledger.Monotonic{Series: keyring.GenerationSeries(doc.Type, key.Name), Value: *doc.Generation}
	}
	return d, d.prepare()
}

// checkRequested refuses a signature by another version than the requested one; 0 is any version.
func checkRequested(key *keyring.Key, version uint32) error {
	if version != 0 && version != key.Version {
		return fmt.Errorf("%w: version %d of %q was asked for, and version %d signs",
			keyring.ErrRotated, version, key.Name, key.Version)
	}
	return nil
}

// admittedVersion returns the version of an admission: key, or the version of the first admission
// of a repeated request. The repetition may ask for a version which the first request did not name.
func (a *Appliance) admittedVersion(r *wire.Sign, key *keyring.Key, admitted uint32) (*keyring.Key, error) {
	if admitted != key.Version {
		var err error
		if key, err = a.Keys.Admitted(r.Key, admitted); err != nil {
			return nil, err
		}
	}
	return key, checkRequested(key, r.Version)
}

// verificationOf prepares a decision about a verification, if the policy has a rule about
// verifications.
func (a *Appliance) verificationOf(who Caller, r *wire.Verify, doc *transcript.Document) (*decision, error) {
	who.walk.Enter(meter.Policy)
	d := &decision{
		policies: &a.policies, groups: &a.groups, who: who, doc: doc, action: policy.Verify,
		key: a.Keys.NameOf(r.Key, r.PublicKey), publicKey: r.PublicKey[:], at: time.Now(),
		admission: audit.NewVerification(who.actor(), r.KeyName(), keyring.DocumentOf(doc), r.PublicKey),
	}
	if d.undecided() {
		return d, nil
	}
	return d, d.prepare()
}

// undecided reports that the policy in force has no rule about the action, which is then allowed.
func (d *decision) undecided() bool {
	if d.action != policy.Verify {
		return false
	}
	rules, err := d.policies.inForce()
	return err == nil && !rules.Verifies
}

// prepare makes the request for the policy, and the series in which an admission is counted.
func (d *decision) prepare() (err error) {
	if d.prepared {
		return nil
	}
	doc := d.doc
	rand.Read(d.salt[:])
	fields := maps.Clone(doc.Fields)
	if fields == nil {
		fields = map[string]any{}
	}
	fields["transcript"] = doc.Type
	fields["lifetime"] = doc.ExpiresAt - doc.Timestamp
	fields["size"] = int64(len(doc.Canonical))
	policy.SetTime(fields, d.at)
	if d.who.Identity != "" {
		fields["identity"] = d.who.Identity
	}
	counterparty := hex.EncodeToString(doc.Counterparty(d.publicKey))
	if counterparty != "" {
		fields["counterparty"] = counterparty
	}
	// A currency is one currency, and has one sum, in each spelling: SAT and sat.
	currency := ""
	var exact *big.Int
	if doc.Payment != nil {
		currency = strings.ToUpper(doc.Payment.Currency) // ASCII, see package transcript
		exact = doc.Payment.Exact()
		amount, amountE8 := policy.Amounts(exact)
		if amount == math.MaxInt64 {
			return fmt.Errorf("%w: the amount is larger than any rule can judge", policy.ErrDenied)
		}
		fields["currency"], fields["amount"], fields["amount_e8"] = currency, amount, amountE8
	}
	if d.request, err = policy.NewRequest(d.who.Name, d.action, d.key, fields); err != nil {
		return err
	}
	d.request.PeerKey = hex.EncodeToString(d.who.PublicKey[:])
	d.prepared = true
	one := big.NewInt(1)
	if d.action == policy.Verify {
		if d.key == "" {
			d.request.Signer = hex.EncodeToString(d.publicKey)
		}
		d.series = []ledger.Count{{Series: "verifications\x00" + policy.Counted[0] + "\x00" + d.who.Name, Add: one}}
		return nil
	}
	d.payment = doc.Payment != nil
	for i, subject := range []string{d.who.Name, d.key, d.key + "\x00" + counterparty} {
		if i == counterpartyIndex && counterparty == "" && !d.payment {
			break // payments that name no counterparty share one window of the key
		}
		series := policy.Counted[i] + "\x00" + subject
		d.series = append(d.series, ledger.Count{Series: "signatures\x00" + series, Add: one})
		if d.payment {
			amounts := "amount\x00" + series + "\x00" + currency
			d.series = append(d.series, ledger.Count{Series: amounts, Add: exact})
		}
	}
	return nil
}

// counts returns the series of the admission. The ledger may call counts twice, each time before
// decide.
func (d *decision) counts() []ledger.Count {
	if d.undecided() {
		return nil
	}
	d.refused = d.prepare() // the policy may have changed since verificationOf
	return d.series
}

// counterpartyIndex is the index of the counterparty in policy.Counted.
const counterpartyIndex = 2

// decide evaluates the policy with the sums of d.counts. Policy and groups are those of this
// moment, however long the request has waited: no policy decides after its successor is in force.
// The ledger may call decide twice.
func (d *decision) decide(used []ledger.Used) ([]byte, error) {
	if d.record = nil; d.undecided() {
		return nil, nil
	}
	defer d.who.walk.Decided(time.Now())
	if d.refused == nil && d.mayUse != nil {
		d.refused = d.mayUse()
	}
	if d.refused != nil {
		return nil, d.refused
	}
	var err error
	if d.rules, err = d.policies.inForce(); err != nil {
		d.refused = fmt.Errorf("%w: %w", keystore.ErrUnavailable, err)
		return nil, d.refused
	}
	d.request.Used = policy.Usage{}
	for i := range policy.Counted {
		if len(used) == 0 {
			break
		}
		for w := range policy.Windows {
			d.request.Used[i][w].Signatures = used[0][w].Int64()
		}
		if used = used[1:]; d.payment {
			for w := range policy.Windows {
				window := &d.request.Used[i][w]
				window.Amount, window.AmountE8 = policy.Amounts(used[0][w])
			}
			used = used[1:]
		}
	}
	d.request.PeerGroups = d.groups.in(policy.OfPeers, d.who.Name)
	d.request.KeyGroups = d.groups.in(policy.OfKeys, d.key) // of no key, there is no group
	var decided policy.Decision
	decided, d.record = d.rules.Decided(d.rules.version, d.at.UnixMilli(), d.request, d.salt)
	d.allowed = decided.Allowed
	return d.record, decided.Err()
}

// event returns the encoded event for a verdict.
func (d *decision) event(v ledger.Verdict) []byte {
	e := d.admission
	switch {
	case v == ledger.Denied && d.refused != nil:
		_, answer := refuse(d.refused)
		e = e.AsRejected(answer.Code)
	case v == ledger.Denied:
		e = e.Decided(d.rules.Hash, policy.Digest(d.record)).AsRejected(wire.CodeDenied)
		if d.allowed {
			e = e.RefusedByGeneration() // the ledger refused, and the policy allowed
		}
	case v != ledger.Replay && d.record != nil:
		e = e.Decided(d.rules.Hash, policy.Digest(d.record))
	}
	return verdictEvent(e, v)
}

// admit asks the ledger to admit a peer's request that d decides about. The error of a replay or a
// denial is that of refusal. The bytes that the ledger keeps are on the request's bill.
func (a *Appliance) admit(ctx context.Context, who Caller, d *decision, r ledger.Admission) (ledger.Admitted, error) {
	r.Peer, r.Quiet, r.Member = who.Name, who.quiet, who.member
	r.Counts, r.Decide = d.counts, d.decide
	who.walk.Enter(meter.Ledger)
	defer who.walk.Enter(meter.Answer)
	admitted, err := a.ledger.Admit(ctx, r, d.event)
	if err != nil {
		who.bill.unknown(err)
		return admitted, err
	}
	who.bill.admitted(admitted)
	return admitted, refusal(admitted)
}

// recorded is a refusal with an event in the ledger.
type recorded struct{ error }

func (r recorded) Unwrap() error { return r.error }

// refusal returns the error of a verdict Denied or Replay. For a nonce that the peer's own request
// has spent, the error names the event of that request.
func refusal(a ledger.Admitted) error {
	switch {
	case a.Verdict == ledger.Denied:
		return recorded{a.Denial}
	case a.Verdict == ledger.Replay && a.Own:
		return recorded{fmt.Errorf("%w: your own request for this document spent it, as event %d", errReplay, a.First)}
	case a.Verdict == ledger.Replay:
		return recorded{errReplay}
	}
	return nil
}
