package admin

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"countersign/admin/api"
	"countersign/appliance"
	"countersign/approval"
	"countersign/audit"
	"countersign/internal/keystore"
)

// TestFirstAdministrator checks that only root on the Unix socket can enrol the first
// administrator, once.
func TestFirstAdministrator(t *testing.T) {
	r := newRig(t)
	first := api.NewOperator{Name: "alice", Credential: r.credential("alice")}
	_, err := r.https().EnrolFirst(t.Context(), first)
	wants(t, "over HTTPS", "not_allowed", err)
	o, err := r.unix().EnrolFirst(t.Context(), first)
	if os.Geteuid() != 0 {
		wants(t, "not as root", "not_allowed", err)
		return
	}
	if err != nil || o.Name != "alice" || len(o.Roles) != 4 || !o.Has(administrator) || !o.Has(approver) {
		t.Fatalf("%+v, %v", o, err)
	}
	_, err = r.unix().EnrolFirst(t.Context(), api.NewOperator{Name: "bob", Credential: r.credential("bob")})
	wants(t, "a second time", "conflict", err)
	c := r.signIn(r.unix(), "alice")
	me := must(c.Me(t.Context()))(t)
	if me.Operator.Name != "alice" || !me.Session.Current || me.Session.Channel != "unix" {
		t.Errorf("%+v", me)
	}
}

// TestSignInIsLimited checks that the sixth failure is limited, with the time to wait in the header
// and in the document.
func TestSignInIsLimited(t *testing.T) {
	r := newRig(t)
	r.root()
	for i := range 6 {
		ch := must(r.https().Challenge(t.Context(), api.NewChallenge{Purpose: "sign-in", Operator: "root"}))(t)
		body := fmt.Sprintf(`{"challenge":%q,"proof":{"credential":%q,"sshsig":"x"}}`, ch.ID, strings.Repeat("0", 32))
		resp, refusal, text := call(t, r.httpsHTTP(), "POST", r.url+"/v1/sessions", body, nil)
		if i < 5 && (resp.StatusCode != 401 || refusal.Code != "not_proven") {
			t.Fatalf("%d: %d %s", i, resp.StatusCode, text)
		}
		if i == 5 && (resp.StatusCode != 429 || refusal.Code != "rate_limited" ||
			refusal.RetryAfter < 1 || refusal.RetryAfter > 12 ||
			resp.Header.Get("Retry-After") != fmt.Sprint(refusal.RetryAfter)) {
			t.Errorf("%v %s", resp.Header, text)
		}
	}
	ch := must(r.unix().Challenge(t.Context(), api.NewChallenge{Purpose: "sign-in", Operator: "stranger"}))(t)
	if !strings.HasPrefix(ch.Text, approval.ForSignIn+"\n") || !strings.Contains(ch.Text, "\noperator: stranger\n") {
		t.Errorf("a stranger is told that he is one: %q", ch.Text)
	}
	_, err := r.unix().Challenge(t.Context(), api.NewChallenge{Purpose: "presence", Key: "payments"})
	wants(t, "presence of nobody", "signed_out", err)
}

func TestSessions(t *testing.T) {
	r := newRig(t)
	root := r.root()
	people := r.enrol(root, r.unix())
	metrics, auditor := people[approval.Metrics], people[approval.Auditor]
	own := must(metrics.Sessions(t.Context()))(t)
	if len(own) != 1 || own[0].Operator != "metrics" || !own[0].Current {
		t.Errorf("%+v", own)
	}
	if all := must(root.Sessions(t.Context()))(t); len(all) != 7 {
		t.Errorf("an administrator sees %d sessions", len(all))
	}
	err := auditor.EndSession(t.Context(), own[0].ID)
	if c := code(err); c != "not_allowed" && c != "not_found" {
		t.Errorf("an auditor ends a session of another one: %v", err)
	}
	wants(t, "an administrator ends it", "", root.EndSession(t.Context(), own[0].ID))
	_, err = metrics.Me(t.Context())
	wants(t, "after that", "signed_out", err)
	wants(t, "one's own", "", auditor.EndSession(t.Context(), "current"))
	_, err = auditor.Me(t.Context())
	wants(t, "after that", "signed_out", err)
}

// TestActs proposes acts with wrong and right parameters, approves proposals, and checks the
// effects. See TestEveryAct for all acts.
func TestActs(t *testing.T) {
	r := newRig(t)
	root := r.root()
	people := r.enrol(root, r.unix())
	key := strings.Repeat("0a", 32)
	lowOrder, encodedTwice := strings.Repeat("00", 32), key[2:]+"8a" // refused before anybody approves it
	propose := func(c *api.Client, act string, p ...string) (api.Proposal, error) {
		return c.Propose(t.Context(), api.NewProposal{Act: act, Parameters: pairs(p...)})
	}
	for _, c := range []struct {
		by   approval.Role
		act  string
		p    []string
		want string
	}{
		{operator, "nothing", nil, "invalid"},
		{administrator, "peer add", []string{"name", "shop", "public_key", key}, "not_allowed"},
		{auditor, "peer add", []string{"name", "shop", "public_key", key}, "not_allowed"},
		{operator, "peer add", nil, "invalid"},
		{operator, "peer add", []string{"name", "shop"}, "invalid"},
		{operator, "peer add", []string{"name", "shop", "public_key", "zz"}, "invalid"},
		{operator, "peer add", []string{"name", "shop", "public_key", key[2:]}, "invalid"},
		{operator, "peer add", []string{"name", "shop", "public_key", lowOrder}, "invalid"},
		{operator, "peer add", []string{"name", "shop", "public_key", encodedTwice}, "invalid"},
		{operator, "peer add", []string{"name", "No Good", "public_key", key}, "invalid"},
		{operator, "peer add", []string{"name", "shop", "public_key", key, "more", "1"}, "invalid"},
		{operator, "peer add", []string{"name", "shop", "name", "shop", "public_key", key}, "invalid"},
		{administrator, "policy activate", nil, "conflict"},
		{administrator, "policy activate", []string{"sha256", key}, "invalid"},
		{administrator, "rollback accept", []string{"reason", "r"}, "not_found"},
		{administrator, "rollback accept", nil, "invalid"},
		{administrator, "hold release", []string{"epoch", "0", "name", "x", "reason", "r"}, "not_found"},
		{administrator, "hold release", []string{"epoch", "-1", "name", "x", "reason", "r"}, "invalid"},
		{operator, "clock accept", nil, "not_allowed"},
		{administrator, "clock accept", []string{"reason", "leap"}, "invalid"},
	} {
		_, err := propose(people[c.by], c.act, c.p...)
		wants(t, fmt.Sprintf("%s proposes %s %v", c.by, c.act, c.p), c.want, err)
	}
	const all = "permit (principal, action, resource);"
	_, err := people[operator].Propose(t.Context(), api.NewProposal{Act: "policy activate", Content: all})
	wants(t, "an operator proposes a policy", "not_allowed", err)
	open := func(p api.Proposal) bool { return p.State == "open" }
	if all := must(root.Proposals(t.Context()))(t); slices.ContainsFunc(all, open) {
		t.Errorf("something that was refused is there: %+v", all)
	}

	// One operator proposes, another one approves.
	p := must(propose(people[operator], "peer add", "name", "shop", "public_key", strings.ToUpper(key)))(t)
	if p.State != "open" || p.Required != 1 || !strings.Contains(p.Text, "\n  public_key: "+key+"\n") ||
		len(must(root.Peers(t.Context()))(t)) != 0 {
		t.Fatalf("%+v", p)
	}
	_, err = people[operator].Approve(t.Context(), p.ID, r.proof("operator", p.Text))
	wants(t, "approved by who is no approver", "not_allowed", err)
	_, err = people[approver].Approve(t.Context(), p.ID, r.proof("operator", p.Text))
	wants(t, "approved with another one's proof", "not_proven", err)
	p = must(people[approver].Approve(t.Context(), p.ID, r.proof("approver", p.Text)))(t)
	if peers := must(root.Peers(t.Context()))(t); p.State != "done" || len(peers) != 1 ||
		peers[0].Keys[0].PublicKey != key {
		t.Errorf("%+v, %+v", p, peers)
	}
	_, err = people[approver].Approve(t.Context(), p.ID, r.proof("approver", p.Text))
	wants(t, "approved again", "conflict", err)
	_, err = propose(people[operator], "peer add", "name", "other", "public_key", key)
	wants(t, "the same key", "exists", err)

	// The text of the policy file at the time of the proposal counts, and a later change of the
	// file does not.
	r.policy = strings.Replace(allowShop, "payments", "invoices", 1)
	p = must(propose(people[administrator], "policy activate"))(t)
	if shown := must(root.Proposal(t.Context(), p.ID))(t); shown.Content != r.policy {
		t.Errorf("%+v", shown)
	}
	proposed := r.policy
	r.policy = all
	if p = must(people[approver].Approve(t.Context(), p.ID, r.proof("approver", p.Text)))(t); p.State != "done" {
		t.Errorf("%+v", p)
	}
	versions := must(root.Policies(t.Context()))(t)
	if in := must(root.Policy(t.Context(), versions[len(versions)-1].Version))(t); in.Text != proposed {
		t.Errorf("in force: %q", in.Text)
	}
	broken := "permit (" + strings.Repeat(" ", 100_000)
	_, err = root.Propose(t.Context(), api.NewProposal{Act: "policy activate", Content: broken})
	wants(t, "a broken policy, larger than other bodies", "invalid", err)

	// A hold frees only itself. A name is taken until its release.
	for _, name := range []string{"case-17", "case-18"} {
		wants(t, "hold", "", root.Hold(t.Context(), 0, name, "order"))
	}
	wants(t, "a second hold of a name", "exists", root.Hold(t.Context(), 0, "case-17", "another order"))
	wants(t, "a name with a space", "invalid", root.Hold(t.Context(), 0, "case 17", "order"))
	released := r.carryOut(root, "hold release", "epoch", "0", "name", "case-17", "reason", "settled")
	left := must(root.Retention(t.Context()))(t).Epochs[0].Holds
	if released.State != "done" || len(left) != 1 || left[0] != (api.Hold{Name: "case-18", Reason: "order"}) {
		t.Errorf("%+v, %+v", released, left)
	}
	if p := r.carryOut(root, "clock accept"); p.State != "done" {
		t.Errorf("%+v", p)
	}

	// The events have the proposer and the number of the proposal.
	by := map[audit.Type]audit.Actor{}
	for _, e := range must(root.Events(t.Context(), 0, 1000))(t) {
		by[e.Type] = e.Actor
	}
	for event, name := range map[audit.Type]string{
		audit.PeerAdded: "operator", audit.PolicyChanged: "administrator", audit.LegalHoldReleased: "root",
	} {
		if a := by[event]; a.Kind != "operator" || a.Name != name || a.Proposal == 0 {
			t.Errorf("%s: %+v", event, a)
		}
	}
	if a := by[audit.LegalHoldSet]; a.Name != "root" || a.Proposal != 0 {
		t.Errorf("%+v", a)
	}
}

func TestWithdraw(t *testing.T) {
	r := newRig(t)
	people := r.enrol(r.root(), r.unix())
	parameters := pairs("name", "shop", "public_key", strings.Repeat("0a", 32))
	p := must(people[operator].Propose(t.Context(),
		api.NewProposal{Act: "peer add", Parameters: parameters, Lifetime: 300}))(t)
	if p.Expires-p.Proposed != 300 {
		t.Errorf("%+v", p)
	}
	wants(t, "by an approver", "not_allowed", people[approver].Withdraw(t.Context(), p.ID))
	wants(t, "by its proposer", "", people[operator].Withdraw(t.Context(), p.ID))
	_, err := people[approver].Approve(t.Context(), p.ID, r.proof("approver", p.Text))
	wants(t, "approved after that", "conflict", err)
}

// TestPasskey registers a passkey, adds an operator with the passkey, signs in and approves, as a
// browser would.
func TestPasskey(t *testing.T) {
	r := newRig(t)
	root := r.root()
	web := r.https()
	pk := newPasskey(t, r.url)
	o := must(web.PasskeyOptions(t.Context(), api.NewPasskey{Operator: "carol"}))(t)
	registration := api.Registration{Challenge: o.Challenge, Credential: pk.create(t, o.PublicKey)}
	credential := must(web.RegisterPasskey(t.Context(), registration))(t)
	text := string(must(json.Marshal(credential))(t))
	added := r.carryOut(root, "operator add", "name", "carol", "roles", "administrator,approver", "credential", text)
	if added.State != "done" {
		t.Fatalf("%+v", added)
	}
	ch := must(web.Challenge(t.Context(), api.NewChallenge{Purpose: "sign-in", Operator: "carol"}))(t)
	evil := newPasskey(t, "https://localhost:1")
	evil.key, evil.id = pk.key, pk.id
	_, err := web.SignIn(t.Context(), api.Proven{Challenge: ch.ID, Proof: evil.get(t, credential.ID, ch.PublicKey)})
	wants(t, "asked by a page of another origin", "not_proven", err)
	ch = must(web.Challenge(t.Context(), api.NewChallenge{Purpose: "sign-in", Operator: "carol"}))(t)
	must(web.SignIn(t.Context(), api.Proven{Challenge: ch.ID, Proof: pk.get(t, credential.ID, ch.PublicKey)}))(t)
	p := must(web.Propose(t.Context(), api.NewProposal{Act: "clock accept"}))(t)
	digest := sha256.Sum256([]byte(p.Text))
	options := fmt.Appendf(nil, `{"challenge":%q}`, base64.RawURLEncoding.EncodeToString(digest[:]))
	if p = must(web.Approve(t.Context(), p.ID, pk.get(t, credential.ID, options)))(t); p.State != "done" {
		t.Errorf("%+v", p)
	}
}

// passkey is an authenticator with one key (ES256), and the origin of the page that uses it.
type passkey struct {
	origin string
	key    *ecdsa.PrivateKey
	id     []byte
	count  uint32
}

func newPasskey(t *testing.T, origin string) *passkey {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	p := &passkey{origin: origin, key: key, id: make([]byte, 16)}
	rand.Read(p.id)
	return p
}

// data returns authenticatorData, without attested credential data.
func (p *passkey) data(flags byte) []byte {
	p.count++
	rp := sha256.Sum256([]byte("localhost"))
	return binary.BigEndian.AppendUint32(append(rp[:], flags), p.count)
}

func (p *passkey) client(t *testing.T, kind string, options json.RawMessage) []byte {
	t.Helper()
	var o struct{ Challenge string }
	if err := json.Unmarshal(options, &o); err != nil || o.Challenge == "" {
		t.Fatalf("%s: %v", options, err)
	}
	return fmt.Appendf(nil, `{"type":"webauthn.%s","challenge":%q,"origin":%q,"crossOrigin":false}`,
		kind, o.Challenge, p.origin)
}

var base64url = base64.RawURLEncoding.EncodeToString

func (p *passkey) create(t *testing.T, options json.RawMessage) json.RawMessage {
	t.Helper()
	point := must(p.key.PublicKey.Bytes())(t)
	data := append(p.data(0x45), make([]byte, 16)...) // present, verified, attested; no AAGUID
	data = binary.BigEndian.AppendUint16(data, uint16(len(p.id)))
	data = append(data, p.id...)
	data = append(data, 0xa5, 1, 2, 3, 0x26, 0x20, 1, 0x21, 0x58, 32) // COSE: EC2, ES256, P-256, x
	data = append(data, point[1:33]...)
	data = append(data, 0x22, 0x58, 32) // y
	data = append(data, point[33:]...)
	attestation := append([]byte("\xa3\x63fmt\x64none\x67attStmt\xa0\x68authData\x58"), byte(len(data)))
	response := fmt.Sprintf(`{"clientDataJSON":%q,"attestationObject":%q}`,
		base64url(p.client(t, "create", options)), base64url(append(attestation, data...)))
	id := base64url(p.id)
	return fmt.Appendf(nil, `{"id":%q,"rawId":%q,"type":"public-key","response":%s}`, id, id, response)
}

func (p *passkey) get(t *testing.T, credential string, options json.RawMessage) approval.Proof {
	t.Helper()
	data, client := p.data(0x05), p.client(t, "get", options)
	hash := sha256.Sum256(client)
	signed := sha256.Sum256(append(slices.Clone(data), hash[:]...))
	signature := must(ecdsa.SignASN1(rand.Reader, p.key, signed[:]))(t)
	return approval.Proof{Credential: credential, Assertion: &approval.Assertion{
		AuthenticatorData: base64url(data), ClientDataJSON: base64url(client), Signature: base64url(signature),
	}}
}

// TestCanaries checks that all callers together get one test signature a second, and that a device
// that hangs costs five seconds.
func TestCanaries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c canaryCache
		signatures := 0
		sign := func(context.Context) error { signatures++; return nil }
		for range 100 {
			if err := c.result(sign); err != nil {
				t.Error(err)
			}
		}
		time.Sleep(canaryInterval)
		c.result(sign)
		if signatures != 2 {
			t.Errorf("there are %d signatures", signatures)
		}
		time.Sleep(canaryInterval)
		begun := time.Now()
		err := c.result(func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(begun) != canaryTimeout {
			t.Errorf("after %v: %v", time.Since(begun), err)
		}
	})
}

func TestHealth(t *testing.T) {
	r := newRig(t)
	wants(t, "alive", "", r.unix().Alive(t.Context()))
	wants(t, "ready", "", r.https().Ready(t.Context()))
	sick := newRig(t)
	sick.store.BeforeSign = func(keystore.Ref, []byte) error { return errors.New("a secret of the device") }
	err := sick.unix().Ready(t.Context())
	if wants(t, "not ready", "unavailable", err); strings.Contains(err.Error(), "secret") {
		t.Errorf("a stranger is told %v", err)
	}
	const operational = string(appliance.Operational)
	for _, want := range []string{operational, stateDegraded, stateRolledBack} {
		h := must(newRigIn(t, want).root().Health(t.Context()))(t)
		if h.State != want || (len(h.Causes) == 0) != (want == operational) {
			t.Errorf("%+v, want %s", h, want)
		}
	}
	root := r.root()
	wants(t, "lock", "", root.Lock(t.Context(), "night"))
	if h := must(root.Health(t.Context()))(t); h.State != stateLocked || !h.Locked || h.Since == 0 {
		t.Errorf("%+v", h)
	}
	_, err = root.CreateKey(t.Context(), api.NewKey{Name: "payments"})
	wants(t, "a key while locked", "locked", err)
	wants(t, "unlock", "", root.Unlock(t.Context()))
	_, err = root.CreateKey(t.Context(), api.NewKey{Name: "payments"})
	wants(t, "a key after that", "", err)
}
