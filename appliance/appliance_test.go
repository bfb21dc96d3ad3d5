package appliance

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"countersign/audit"
	"countersign/internal/eddsa"
	"countersign/internal/form"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/keystore/keystoretest"
	"countersign/internal/ledger"
	"countersign/internal/ledger/ledgertest"
	"countersign/internal/manage"
	"countersign/internal/meter"
	"countersign/internal/scantest"
	"countersign/policy"
	"countersign/transcript"
	"countersign/wire"
)

const allowShop = `permit (principal == Peer::"shop", action == Action::"sign", resource == Key::"payments")
unless { context has message_context && context.message_context == "forbidden" };`

var limits = func() Limits {
	l := DefaultLimits()
	l.InFlight, l.Handshakes.PerSource, l.Calls = 4, 100, map[string]int{"memory": 4}
	l.HandshakeTimeout, l.RequestTimeout = 5*time.Second, 5*time.Second
	return l
}()

const day = 24 * time.Hour

var kept = Retention{
	Epoch: Month, Audit: 7 * 365 * day, Receipts: 7 * 365 * day, Decisions: 30 * day, Nonces: day,
}

// approved is an operator with an approved proposal.
var approved = audit.Actor{Kind: "operator", Name: "test", Proposal: 1}

// rig is an appliance on a real ledger and a keystore in memory, with the key "payments" and the
// peers "shop" and "cafe".
type rig struct {
	*Appliance
	store  *keystoretest.Memory
	limits Limits
	path   string
	shop   Caller
	cafe   Caller
	public []byte
}

func newRig(t *testing.T) *rig {
	t.Helper()
	return newRigAt(t, filepath.Join(t.TempDir(), "ledger.db"))
}

// newRigWith makes a rig with changed limits.
func newRigWith(t *testing.T, change func(*Limits)) *rig {
	t.Helper()
	limits := limits
	change(&limits)
	return newRigOf(t, limits, filepath.Join(t.TempDir(), "ledger.db"))
}

func newRigAt(t *testing.T, path string) *rig {
	t.Helper()
	return newRigOf(t, limits, path)
}

func newRigOf(t *testing.T, limits Limits, path string) *rig {
	t.Helper()
	r := &rig{store: keystoretest.NewMemory(), path: path, limits: limits}
	if err := ledger.Create(r.path, ledger.Options{}); err != nil {
		t.Fatal(err)
	}
	r.open(t)
	t.Cleanup(func() { r.ledger.Close() })
	operator := audit.Operator("test")
	k, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: "payments"})
	if err != nil {
		t.Fatal(err)
	}
	r.public = k.Info().PublicKey
	r.shop, r.cafe = r.enrol(t, "shop", 7), r.enrol(t, "cafe", 8)
	return r
}

// enrol enrols a peer with a public key of 32 equal bytes.
func (r *rig) enrol(t *testing.T, name string, key byte) Caller {
	t.Helper()
	p, err := r.Peers.Add(t.Context(), operator, name, bytes.Repeat([]byte{key}, 32))
	if err != nil {
		t.Fatal(err)
	}
	return Caller{Peer: p}
}

func (r *rig) open(t *testing.T) {
	t.Helper()
	l, err := ledgertest.Open(t, r.path, ledger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if r.Appliance, err = r.new(t, l, kept); err != nil {
		l.Close()
		t.Fatal(err)
	}
}

// new makes an appliance on a ledger, with a configured retention.
func (r *rig) new(t *testing.T, l *ledger.Ledger, retention Retention) (*Appliance, error) {
	c := Config{Limits: r.limits, Retention: retention, Meter: meter.New("test")}
	tokens := map[string]keystore.Store{"memory": keystoretest.Sealing{
		Store: form.Guard(r.store, nil), Memory: r.store,
	}}
	return New(t.Context(), c, l, tokens, parsed(t, allowShop), scantest.Log())
}

func parsed(t *testing.T, rules string) *policy.Policy {
	t.Helper()
	p, err := policy.Parse("policy.cedar", []byte(rules))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// started is the time of every document of a test run, in seconds since 1970.
var started = time.Now().Unix()

// message returns a valid sign request for a message. n is the first byte of the nonce. Two calls
// with equal arguments return equal documents, also when a second ends between the calls. A test
// with a fake clock, which begins in the year 2000, gets a document of the fake time.
func message(n byte, content string) *wire.Sign {
	now := min(started, time.Now().Unix())
	encoded := base64.RawURLEncoding.EncodeToString([]byte(content))
	return &wire.Sign{ID: "1", Op: "sign", Key: "payments", Document: wire.Document{
		Type: "message-v1", Payload: fmt.Appendf(nil, `{"context":"test","message":%q}`, encoded),
		Nonce: wire.Bytes32{n}, Timestamp: now, ExpiresAt: now + 3600,
	}}
}

// sign signs, and fails the test on an error.
func (r *rig) sign(t *testing.T, who Caller, req *wire.Sign) *wire.Signed {
	t.Helper()
	s, err := r.Sign(t.Context(), who, req)
	if err != nil {
		t.Fatal(err)
	}
	if s.Receipt != nil {
		scantest.Secret(scantest.ReceiptSalt, s.Receipt.Salt)
	}
	return s
}

// refuses expects an error with a code.
func (r *rig) refuses(t *testing.T, code string, err error) {
	t.Helper()
	if err == nil {
		t.Errorf("accepted, want %s", code)
		return
	}
	if _, refusal := refuse(err); refusal.Code != code {
		t.Errorf("%v, want %s", err, code)
	}
}

// events returns the types of all events but the first.
func (r *rig) events(t *testing.T) (types []audit.Type) {
	t.Helper()
	for _, e := range logOf(t, r.Appliance, 1) {
		types = append(types, e.Type)
	}
	return types
}

// verifyOf returns the request to verify a signature.
func verifyOf(s *wire.Sign, signed *wire.Signed) *wire.Verify {
	return &wire.Verify{
		ID: "2", Op: "verify", PublicKey: signed.PublicKey, Signature: signed.Signature, Document: s.Document,
	}
}

// TestAdmittedOnDiskBeforeTheKeyIsUsed reads the disk during the device's signature: promise 1.
func TestAdmittedOnDiskBeforeTheKeyIsUsed(t *testing.T) {
	r := newRig(t)
	used := 0
	r.store.BeforeSign = func(ref keystore.Ref, _ []byte) error {
		used++
		spent, err := r.ledger.Spent(t.Context(), ledger.KeyScope("payments"), [32]byte{byte(used)})
		if err != nil {
			t.Errorf("the key is used and the admission is not on disk: %v", err)
		}
		found := false
		r.Events(spent.Event, func(_ uint64, e audit.Event) bool {
			found = e.Type == audit.SignatureAdmitted
			return false
		})
		if !found {
			t.Error("the key is used and the event of the admission is not on disk")
		}
		return nil
	}
	for n := range byte(10) {
		r.sign(t, r.shop, message(n+1, "m"))
	}
	if used != 10 {
		t.Errorf("the key was used %d times", used)
	}
}

// TestSign: the same request again gets the same signature, also after a restart. Another request
// under the nonce is a replay.
func TestSign(t *testing.T) {
	r := newRig(t)
	req := message(1, "hello")
	s := r.sign(t, r.shop, req)
	doc, err := transcript.Parse(documentOf(req.Document))
	if err != nil {
		t.Fatal(err)
	}
	if err := eddsa.Verify(r.public, doc.Message, s.Signature); err != nil {
		t.Error(err)
	}
	if s.Repeated || s.Key != "payments" || s.Version != 1 || s.Nonce != req.Nonce ||
		!bytes.Equal(s.PublicKey[:], r.public) {
		t.Errorf("%+v", s)
	}
	repeat := func(when string) {
		t.Helper()
		again := r.sign(t, r.shop, req)
		if !again.Repeated || !bytes.Equal(again.Signature, s.Signature) || again.Event != s.Event {
			t.Errorf("the same request %s: %+v, first %+v", when, again, s)
		}
		_, err := r.Sign(t.Context(), r.shop, message(1, "other content"))
		r.refuses(t, "replay", err)
	}
	repeat("again")
	want := []audit.Type{
		audit.KeyCreated, audit.KeyCommitted, audit.PeerAdded, audit.PeerAdded,
		audit.SignatureAdmitted, audit.SignatureCreated, audit.ReplayRefused,
	}
	if got := r.events(t); !slices.Equal(got, want) {
		t.Errorf("events %v, want %v", got, want)
	}
	r.ledger.Close()
	r.open(t)
	repeat("after a restart")
}

// TestAnotherPeersNonce: the same request of another peer is a replay.
func TestAnotherPeersNonce(t *testing.T) {
	r := newRig(t)
	p, err := policy.Parse("policy.cedar", []byte(`permit (principal, action, resource);`))
	if err != nil {
		t.Fatal(err)
	}
	r.policies.file = p
	req := message(1, "m")
	r.sign(t, r.shop, req)
	_, err = r.Sign(t.Context(), r.cafe, req)
	r.refuses(t, "replay", err)
}

// TestRefusalsSpendNothing: a request that is refused before its admission leaves the nonce fresh.
func TestRefusalsSpendNothing(t *testing.T) {
	r := newRig(t)
	if _, err := r.Keys.CreateOwn(t.Context(), audit.Operator("test"), keyring.NoiseName, "memory"); err != nil {
		t.Fatal(err)
	}
	r.store.BeforeSign = func(keystore.Ref, []byte) error { t.Error("the key was used"); return nil }
	for _, c := range []struct {
		code   string
		who    Caller
		change func(*wire.Sign)
	}{
		{"unknown_key", r.shop, func(s *wire.Sign) { s.Key = "nothing" }},
		{"unknown_key", r.shop, func(s *wire.Sign) { s.Key = "noise" }},
		{"unsupported", r.shop, func(s *wire.Sign) { s.Type = "nonsense-v1" }},
		{"malformed", r.shop, func(s *wire.Sign) { s.Payload = []byte(`{"context":7}`) }},
		{"malformed", r.shop, func(s *wire.Sign) { s.ExpiresAt = s.Timestamp }},
		{"expired", r.shop, func(s *wire.Sign) { s.Timestamp -= 7200; s.ExpiresAt -= 7200 }},
		{"not_yet_valid", r.shop, func(s *wire.Sign) { s.Timestamp += 120 }},
		{"lifetime_too_long", r.shop, func(s *wire.Sign) { s.ExpiresAt = s.Timestamp + 8*86400 }},
		{"denied", r.cafe, func(*wire.Sign) {}},
		{"denied", r.shop, func(s *wire.Sign) { s.Payload = []byte(`{"context":"forbidden","message":""}`) }},
		{"denied", r.shop, func(s *wire.Sign) { s.Type, s.Payload = "raw", []byte(`{"message":"AA"}`) }},
		{"wrong_signer", r.shop, func(s *wire.Sign) {
			s.Type, s.Payload = "paykit-subscription-v2", subscription(nil)
		}},
	} {
		req := message(1, "m")
		c.change(req)
		_, err := r.Sign(t.Context(), c.who, req)
		r.refuses(t, c.code, err)
	}
	r.store.BeforeSign = nil
	if s := r.sign(t, r.shop, message(1, "m")); s.Repeated {
		t.Error("a refusal has spent the nonce")
	}
}

// subscription returns the payload of a subscription. A nil subscriber is a foreign key.
func subscription(subscriber []byte) []byte {
	if subscriber == nil {
		subscriber = ed25519.NewKeyFromSeed(bytes.Repeat([]byte{1}, 32)).Public().(ed25519.PublicKey)
	}
	provider := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{2}, 32)).Public().(ed25519.PublicKey)
	return fmt.Appendf(nil, `{"subscription_id":"s","subscriber":"%x","provider":"%x",
		"terms":{"amount":"1000","currency":"SAT","frequency":"Daily","method":"lightning",
		"max_amount_per_period":null,"description":""},
		"metadata":{},"created_at":1,"starts_at":1,"ends_at":null}`, subscriber, provider)
}

// TestSubscriptionBySubscriber: a party to a subscription can sign the subscription.
func TestSubscriptionBySubscriber(t *testing.T) {
	r := newRig(t)
	req := message(1, "")
	req.Type, req.Payload = "paykit-subscription-v2", subscription(r.public)
	s := r.sign(t, r.shop, req)
	if _, err := r.Verify(t.Context(), r.cafe, verifyOf(req, s)); err != nil {
		t.Error(err)
	}
}

// TestRepetitionAfterRotation: a document that names the signing version as a party gets the same
// answer again after a rotation. Another document for the old version is refused.
func TestRepetitionAfterRotation(t *testing.T) {
	r := newRig(t)
	req := message(1, "")
	req.Type, req.Payload = "paykit-subscription-v2", subscription(r.public)
	first := r.sign(t, r.shop, req)
	if _, err := r.Keys.Rotate(t.Context(), operator, "payments", time.Now()); err != nil {
		t.Fatal(err)
	}
	again := r.sign(t, r.shop, req)
	if !again.Repeated || !bytes.Equal(again.Signature, first.Signature) || again.Version != 1 {
		t.Errorf("after the rotation: %+v", again)
	}
	before := len(r.events(t))
	other := *req
	other.Nonce = wire.Bytes32{2}
	_, err := r.Sign(t.Context(), r.shop, &other)
	r.refuses(t, "wrong_signer", err)
	if after := len(r.events(t)); after != before {
		t.Errorf("%d events of a refusal before the admission", after-before)
	}
	_, err = r.Sign(t.Context(), r.cafe, req)
	r.refuses(t, "replay", err)
	replay := *req
	replay.ExpiresAt--
	_, err = r.Sign(t.Context(), r.shop, &replay)
	r.refuses(t, "replay", err)
}

// TestRequestedVersion: a request that names a version is signed by no other version. The refusal
// signs nothing and spends nothing, and a repetition still gets the signature of its admission.
func TestRequestedVersion(t *testing.T) {
	r := newRig(t)
	asked := func(n byte, version uint32) *wire.Sign {
		req := message(n, "m")
		req.Version = version
		return req
	}
	uses := func() (n uint64) {
		for _, k := range r.Keys.All() {
			n += k.Uses()
		}
		return n
	}
	refused := func(req *wire.Sign) {
		t.Helper()
		before := uses()
		_, err := r.Sign(t.Context(), r.shop, req)
		r.refuses(t, wire.CodeKeyRotated, err)
		if after := uses(); after != before {
			t.Errorf("%d signatures for a refused request", after-before)
		}
	}
	first := r.sign(t, r.shop, asked(1, 1))
	if first.Version != 1 {
		t.Errorf("version %d signs", first.Version)
	}
	refused(asked(2, 2)) // the version is not announced yet
	if _, err := r.Keys.Rotate(t.Context(), operator, "payments", time.Now()); err != nil {
		t.Fatal(err)
	}
	refused(asked(2, 1))
	if s := r.sign(t, r.shop, asked(2, 2)); s.Version != 2 || s.Repeated {
		t.Errorf("the nonce of the refused requests: %+v", s)
	}
	for _, version := range []uint32{0, 1} { // a lost answer
		if s := r.sign(t, r.shop, asked(1, version)); !s.Repeated || s.Version != 1 ||
			!bytes.Equal(s.Signature, first.Signature) {
			t.Errorf("a repetition for version %d: %+v", version, s)
		}
	}
	refused(asked(1, 2)) // repetitions of requests that others have signed
	refused(asked(2, 1))
	admitted := 0
	for _, e := range r.events(t) {
		if e == audit.SignatureAdmitted {
			admitted++
		}
	}
	if admitted != 3 { // one of them is that of the step to version 2
		t.Errorf("%d admissions, want 3", admitted)
	}
}

// TestDeviceThatLies: a signature that does not verify is never released. The same request can be
// sent again, and gets a signature of the repaired device.
func TestDeviceThatLies(t *testing.T) {
	for name, corrupt := range map[string]func([]byte) []byte{
		"a flipped bit": func(b []byte) []byte { b[5] ^= 1; return b },
		"too short":     func(b []byte) []byte { return b[:63] },
		"nothing":       func(b []byte) []byte { return []byte{} },
		"zeros":         func(b []byte) []byte { return make([]byte, 64) },
	} {
		r := newRig(t)
		r.store.Corrupt = corrupt
		req := message(1, "m")
		s, err := r.Sign(t.Context(), r.shop, req)
		r.refuses(t, "unavailable", err)
		if s != nil {
			t.Fatalf("%s: released", name)
		}
		if got := r.events(t); got[len(got)-1] != audit.SignatureFailed {
			t.Errorf("%s: events %v", name, got)
		}
		r.store.Corrupt = nil
		if s := r.sign(t, r.shop, req); !s.Repeated {
			t.Errorf("%s: asked again: %+v", name, s)
		}
	}
}

// unplugged is the BeforeSign of a device that does not answer.
func unplugged(keystore.Ref, []byte) error {
	return fmt.Errorf("unplugged: %w", keystore.ErrUnavailable)
}

// TestDeviceThatFails: the nonce is spent. The same request gets its signature when the device
// works again. Another request under the nonce is a replay.
func TestDeviceThatFails(t *testing.T) {
	r := newRig(t)
	r.store.BeforeSign = unplugged
	req := message(1, "m")
	_, err := r.Sign(t.Context(), r.shop, req)
	r.refuses(t, "unavailable", err)
	_, err = r.Sign(t.Context(), r.shop, message(1, "other"))
	r.refuses(t, "replay", err)
	r.store.BeforeSign = nil
	if s := r.sign(t, r.shop, req); !s.Repeated {
		t.Errorf("%+v", s)
	}
}

// TestWhileTheFirstIsStillWaiting: the device holds a request. A second request with the nonce and
// other content is refused at once. An identical one gets the same signature.
func TestWhileTheFirstIsStillWaiting(t *testing.T) {
	r := newRig(t)
	inDevice, release := make(chan struct{}, 2), make(chan struct{})
	r.store.BeforeSign = func(keystore.Ref, []byte) error { inDevice <- struct{}{}; <-release; return nil }
	req := message(1, "m")
	type result struct {
		s   *wire.Signed
		err error
	}
	results := make(chan result, 2)
	ask := func() {
		s, err := r.Sign(t.Context(), r.shop, req)
		results <- result{s, err}
	}
	go ask()
	<-inDevice
	_, err := r.Sign(t.Context(), r.shop, message(1, "other"))
	r.refuses(t, "replay", err)
	go ask()
	<-inDevice
	close(release)
	a, b := <-results, <-results
	if a.err != nil || b.err != nil || !bytes.Equal(a.s.Signature, b.s.Signature) ||
		a.s.Event != b.s.Event || a.s.Repeated == b.s.Repeated {
		t.Errorf("%+v, %+v", a, b)
	}
	if n := countOf(logOf(t, r.Appliance, 1), audit.SignatureCreated); n != 1 {
		t.Errorf("%d outcomes of one admission", n)
	}
}

// TestVerifyOrder: only a good signature by an allowed signer spends a nonce: promise 4.
func TestVerifyOrder(t *testing.T) {
	r := newRig(t)
	req := message(1, "")
	req.Type, req.Payload = "paykit-subscription-v2", subscription(r.public)
	good := verifyOf(req, r.sign(t, r.shop, req))

	foreign := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{9}, 32))
	doc, err := transcript.Parse(documentOf(req.Document))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		code   string
		change func(*wire.Verify)
	}{
		{"invalid_signature", func(v *wire.Verify) { v.Signature[0] ^= 1 }},
		{"invalid_signature", func(v *wire.Verify) { v.Signature = v.Signature[:63] }},
		{"invalid_signature", func(v *wire.Verify) { v.PublicKey = wire.Bytes32{1} }},
		{"invalid_signature", func(v *wire.Verify) { v.PublicKey = [32]byte(foreign.Public().(ed25519.PublicKey)) }},
		{"invalid_signature", func(v *wire.Verify) { v.ExpiresAt++ }},
		{"invalid_signature", func(v *wire.Verify) {
			v.Payload = bytes.Replace(v.Payload, []byte("1000"), []byte("9000"), 1)
		}},
		{"wrong_signer", func(v *wire.Verify) {
			v.PublicKey = [32]byte(foreign.Public().(ed25519.PublicKey))
			v.Signature = ed25519.Sign(foreign, doc.Message)
		}},
		{"unknown_key", func(v *wire.Verify) { v.Key = new("nothing") }},
		{"unknown_key", func(v *wire.Verify) { v.Key = new("") }},
		{"malformed", func(v *wire.Verify) { v.Payload = []byte(`{}`) }},
		{"unsupported", func(v *wire.Verify) { v.Type, v.Payload = "raw", []byte(`{"message":"AA"}`) }},
	} {
		v := *good
		v.Signature = slices.Clone(good.Signature)
		c.change(&v)
		_, err := r.Verify(t.Context(), r.cafe, &v)
		r.refuses(t, c.code, err)
	}
	named := *good
	named.Key = new("payments")
	if v, err := r.Verify(t.Context(), r.cafe, &named); err != nil || !v.Valid {
		t.Fatalf("after all refusals: %v", err)
	}
	_, err = r.Verify(t.Context(), r.cafe, good)
	r.refuses(t, "replay", err) // the same peer again
	_, err = r.Verify(t.Context(), r.shop, good)
	r.refuses(t, "replay", err) // another peer
}

// TestVerifyWithANamedKeyOfAnother: a request that names a key must have a signature by that key.
func TestVerifyWithANamedKeyOfAnother(t *testing.T) {
	r := newRig(t)
	if _, err := r.Keys.Create(t.Context(), audit.Operator("test"), keyring.NewKey{Name: "other"}); err != nil {
		t.Fatal(err)
	}
	req := message(1, "m")
	v := verifyOf(req, r.sign(t, r.shop, req))
	v.Key = new("other")
	_, err := r.Verify(t.Context(), r.shop, v)
	r.refuses(t, "wrong_signer", err)
}

// TestTimeGoesBy has a document expire on the clock of a synctest bubble.
func TestTimeGoesBy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		defer r.ledger.Close()
		req := message(1, "m")
		late := message(2, "m")
		v := verifyOf(req, r.sign(t, r.shop, req))
		v2 := verifyOf(late, r.sign(t, r.shop, late))
		time.Sleep(3600 * time.Second) // to expires_at, which is the last valid second
		if _, err := r.Verify(t.Context(), r.shop, v); err != nil {
			t.Errorf("in its last second: %v", err)
		}
		time.Sleep(time.Second)
		_, err := r.Verify(t.Context(), r.shop, v2)
		r.refuses(t, "expired", err)
		_, err = r.Sign(t.Context(), r.shop, message(1, "the nonce of an expired document"))
		r.refuses(t, "replay", err)
	})
}

// TestSlowDeviceIsBounded: with a device that does not answer, a request is "unavailable" after the
// request timeout. The outcome of the admission is recorded nevertheless.
func TestSlowDeviceIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		defer r.ledger.Close()
		for n := range byte(20) {
			ctx, cancel := context.WithTimeout(t.Context(), limits.RequestTimeout)
			r.store.BeforeSign = func(keystore.Ref, []byte) error {
				<-ctx.Done()
				return fmt.Errorf("hsm: %w: %w", keystore.ErrUnavailable, ctx.Err())
			}
			begin := time.Now()
			_, err := r.Sign(ctx, r.shop, message(n, "m"))
			cancel()
			r.refuses(t, "unavailable", err)
			if took := time.Since(begin); took != limits.RequestTimeout {
				t.Errorf("it took %v", took)
			}
			if got := r.events(t); got[len(got)-1] != audit.SignatureFailed {
				t.Fatalf("the outcome of the admission is lost with the request's timeout: %v", got)
			}
		}
	})
}

// TestKeysAreComparedWithTheToken: a key that is missing on its token, or another key under the
// name, is a cause in the state from the start on.
func TestKeysAreComparedWithTheToken(t *testing.T) {
	reopen := func(r *rig) error {
		t.Helper()
		r.ledger.Close()
		l, err := ledgertest.Open(t, r.path, ledger.Options{})
		if err != nil {
			return err
		}
		defer l.Close()
		a, err := r.new(t, l, kept)
		if err != nil {
			t.Fatal(err)
		}
		return errors.New(fmt.Sprint(a.Health().Causes))
	}
	ref := keystore.Ref{Name: "payments", Version: 1}
	r := newRig(t)
	r.store.Remove(ref)
	if err := reopen(r); !strings.Contains(err.Error(), "payments/1") ||
		!strings.Contains(err.Error(), keystore.ErrNotFound.Error()) {
		t.Errorf("a missing key: %v", err)
	}
	r.store.Generate(t.Context(), ref, keystore.Ed25519, keystore.Tag{1})
	if err := reopen(r); !strings.Contains(err.Error(), "payments/1") ||
		!strings.Contains(err.Error(), "right token") {
		t.Errorf("another key under the name: %v", err)
	}
}

// TestUnfinishedKeyIsDestroyed: a crash between the intent and the record of a key leaves a key on
// the token that was never used. Recover destroys such a key.
func TestUnfinishedKeyIsDestroyed(t *testing.T) {
	r := newRig(t)
	ref, tag := keystore.Ref{Name: "half", Version: 1}, keystore.Tag{9}
	r.pending(t, ref, tag)
	if _, err := r.store.Generate(t.Context(), ref, keystore.Ed25519, tag); err != nil {
		t.Fatal(err)
	}
	r.ledger.Close()
	r.open(t) // changes nothing
	if _, err := r.store.Key(t.Context(), ref); err != nil {
		t.Errorf("New has destroyed the key: %v", err)
	}
	if err := r.Keys.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := r.store.Key(t.Context(), ref); !errors.Is(err, keystore.ErrNotFound) {
		t.Errorf("the key is still on the token: %v", err)
	}
	if got := r.events(t); got[len(got)-1] != audit.KeyCreationFailed {
		t.Errorf("events %v", got)
	}
	if _, err := r.Keys.Create(t.Context(), audit.Operator("test"), keyring.NewKey{Name: "half"}); err != nil {
		t.Errorf("the name can't be used: %v", err)
	}
}

// pending writes the intent to make a key.
func (r *rig) pending(t *testing.T, ref keystore.Ref, tag keystore.Tag) {
	t.Helper()
	if err := r.ledger.Update(t.Context(), func(tx *ledger.Tx) error {
		return tx.Put(ledger.Keys, ref.String(), manage.Encode(map[string]any{
			"token": "memory", "algorithm": keystore.Ed25519, "state": "making", "tag": tag,
		}))
	}); err != nil {
		t.Fatal(err)
	}
}

// TestForeignKeyIsNotDestroyed: another token has a foreign key under the name of an intent.
func TestForeignKeyIsNotDestroyed(t *testing.T) {
	r := newRig(t)
	ref := keystore.Ref{Name: "orders", Version: 1}
	r.pending(t, ref, keystore.Tag{1})
	if _, err := r.store.Generate(t.Context(), ref, keystore.Ed25519, keystore.Tag{2}); err != nil {
		t.Fatal(err)
	}
	if err := r.Keys.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := r.store.Key(t.Context(), ref); err != nil {
		t.Errorf("the foreign key is gone: %v", err)
	}
}

// TestCallerLeavesACreation: the caller leaves while a slow device makes a key. The key is complete
// afterwards. Meanwhile a peer can be removed, and another creation gives up with its caller.
func TestCallerLeavesACreation(t *testing.T) {
	r := newRig(t)
	inDevice, release := make(chan struct{}), make(chan struct{})
	r.store.BeforeGenerate = func(ref keystore.Ref) error {
		if ref.Version == 1 {
			close(inDevice)
			<-release
		}
		return nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := r.Keys.Create(ctx, audit.Operator("test"), keyring.NewKey{Name: "slow"})
		done <- err
	}()
	<-inDevice
	cancel()
	if err := <-done; !errors.Is(err, keystore.ErrUnavailable) {
		t.Errorf("%v, want %v", err, keystore.ErrUnavailable)
	}
	if err := r.Peers.Remove(t.Context(), audit.Operator("test"), "cafe"); err != nil {
		t.Errorf("remove a peer beside it: %v", err)
	}
	again, giveUp := context.WithCancel(t.Context())
	giveUp()
	_, err := r.Keys.Create(again, audit.Operator("test"), keyring.NewKey{Name: "other"})
	if !errors.Is(err, keystore.ErrUnavailable) {
		t.Errorf("another key beside it: %v, want %v", err, keystore.ErrUnavailable)
	}
	r.store.BeforeGenerate = nil
	close(release)
	_, err = r.Keys.Create(t.Context(), audit.Operator("test"), keyring.NewKey{Name: "slow"})
	if !errors.Is(err, manage.ErrExists) {
		t.Errorf("the creation that went on: %v, want %v", err, manage.ErrExists)
	}
	r.ledger.Close()
	r.open(t)
	if _, err := r.Keys.Versions("slow"); err != nil {
		t.Error(err)
	}
}

// TestManageRefuses: a refused act has no event and no effect.
func TestManageRefuses(t *testing.T) {
	r := newRig(t)
	who := audit.Operator("test")
	before := len(r.events(t))
	if _, err := r.Keys.Create(t.Context(), who, keyring.NewKey{Name: "payments"}); !errors.Is(err, manage.ErrExists) {
		t.Errorf("an existing key: %v", err)
	}
	for _, name := range []string{"", "noise", "UPPER", "a/b", "-a", strings.Repeat("a", 65), "a\n"} {
		if _, err := r.Keys.Create(t.Context(), who, keyring.NewKey{Name: name}); !errors.Is(err, manage.ErrInvalid) {
			t.Errorf("key %q: %v", name, err)
		}
	}
	// The token has a foreign key under the name, which must be neither replaced nor destroyed.
	foreign := keystore.Ref{Name: "foreign", Version: 1}
	r.store.Generate(t.Context(), foreign, keystore.Ed25519, keystore.Tag{1})
	if _, err := r.Keys.Create(t.Context(), who, keyring.NewKey{Name: "foreign"}); !errors.Is(err, manage.ErrExists) {
		t.Errorf("a foreign key: %v", err)
	}
	if _, err := r.store.Key(t.Context(), foreign); err != nil {
		t.Errorf("the foreign key is gone: %v", err)
	}
	for what, c := range map[string]struct {
		name string
		key  []byte
		want error
	}{
		"a short key":         {"shop", bytes.Repeat([]byte{1}, 31), manage.ErrInvalid},
		"a key of low order":  {"zero", make([]byte, 32), manage.ErrInvalid},
		"a name twice":        {"shop", bytes.Repeat([]byte{3}, 32), manage.ErrExists},
		"a public key twice":  {"shop2", r.shop.PublicKey[:], manage.ErrExists},
		"a name with a slash": {"a/b", bytes.Repeat([]byte{3}, 32), manage.ErrInvalid},
	} {
		if _, err := r.Peers.Add(t.Context(), who, c.name, c.key); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", what, err, c.want)
		}
	}
	if err := r.Peers.Remove(t.Context(), who, "nobody"); !errors.Is(err, manage.ErrNotFound) {
		t.Errorf("remove nobody: %v", err)
	}
	if after := len(r.events(t)); after != before {
		t.Errorf("%d events of acts that were refused", after-before)
	}
	if len(r.Peers.All()) != 2 || len(r.Keys.All()) != 2 {
		t.Errorf("%v, %v", r.Peers.All(), r.Keys.All())
	}
}

// TestEveryErrorHasOneCode: an error without a row of the table is "unavailable". The peer gets no
// text of such an error, nor of an error of a device, the disk or the policy.
func TestEveryErrorHasOneCode(t *testing.T) {
	secret := errors.New("C_Login: pin 1234 in /etc/countersign")
	all := []error{secret}
	for _, known := range []error{
		keystore.ErrUnavailable, keystore.ErrAuth, ledger.ErrUnknownState, policy.ErrDenied,
	} {
		all = append(all, fmt.Errorf("%w: %w", known, secret))
	}
	for _, err := range all {
		c, refusal := refuse(err)
		if strings.Contains(refusal.Message, "1234") || strings.Contains(refusal.Message, "/etc") {
			t.Errorf("the peer is told %q", refusal.Message)
		}
		if (c == fatal) != errors.Is(err, ledger.ErrUnknownState) {
			t.Errorf("%v: class %d", err, c)
		}
	}
}
