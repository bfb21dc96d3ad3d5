package admin

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign/admin/api"
	"countersign/admin/certs"
	"countersign/appliance"
	"countersign/approval"
	"countersign/audit"
	"countersign/internal/form"
	"countersign/internal/history"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/keystore/keystoretest"
	"countersign/internal/ledger"
	"countersign/internal/ledger/ledgertest"
	"countersign/internal/logline"
	"countersign/internal/meter"
	"countersign/internal/operators"
	"countersign/internal/scantest"
	"countersign/internal/sshagent"
	"countersign/policy"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

func TestMain(m *testing.M) { os.Exit(scantest.Run(m)) }

// rig is a test rig: the API on a Unix socket and on HTTPS, with an appliance, a ledger on disk,
// and a registry of operators.
type rig struct {
	t        *testing.T
	app      *appliance.Appliance
	ledger   *ledger.Ledger
	registry *operators.Registry
	store    *keystoretest.Memory
	server   *server      // answers nothing, and has the document
	live     *server      // answers
	http     *http.Server // of live
	socket   string
	url      string // of HTTPS
	ca       []byte
	agent    agent.Agent
	policy   string // content of the policy file
}

const allowShop = `permit (principal == Peer::"shop", action == Action::"sign", resource == Key::"payments");`

func newRig(t *testing.T) *rig {
	t.Helper()
	return newRigIn(t, string(appliance.Operational))
}

// down is a token in an outage.
type down struct{ keystore.Store }

func (down) Status() keystore.Status { return keystore.Status{Cause: "it was pulled out"} }

// newRigIn returns a rig with the appliance in a state.
func newRigIn(t *testing.T, state string) *rig {
	t.Helper()
	r := &rig{t: t, store: keystoretest.NewMemory(), agent: agent.NewKeyring(), policy: allowShop}
	var store keystore.Store = r.store
	if state == stateDegraded {
		store = down{store}
	}
	path := filepath.Join(t.TempDir(), "ledger.db")
	if err := ledger.Create(path, ledger.Options{}); err != nil {
		t.Fatal(err)
	}
	l, err := ledgertest.Open(t, path, ledger.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	r.ledger = l
	if state == stateRolledBack {
		const record = `{"ledger":1,"counter":2,"reason":"test","at":"2026-01-01T00:00:00Z"}`
		if err := l.Update(t.Context(), func(tx *ledger.Tx) error {
			return tx.Put(ledger.Meta, "rollback", []byte(record))
		}); err != nil {
			t.Fatal(err)
		}
	}
	limits := appliance.DefaultLimits()
	limits.Calls = map[string]int{"memory": 4}
	long := 7 * 365 * 24 * time.Hour
	log := scantest.Log()
	config := appliance.Config{Meter: meter.New("test"), Limits: limits, Retention: appliance.Retention{
		Epoch: appliance.Month, Audit: long, Receipts: long, Decisions: long, Nonces: 24 * time.Hour,
	}, SigningToken: "memory"}
	tokens := map[string]keystore.Store{
		"memory": form.Guard(store, nil), "safe": form.Guard(keystoretest.NewMemory(), nil),
	}
	if r.app, err = appliance.New(t.Context(), config, l, tokens, r.rules(), log); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{keyring.NoiseName, keyring.LogName} {
		if _, err := r.app.Keys.CreateOwn(t.Context(), audit.Daemon(), name, "memory"); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.app.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0") // a port that is free now
	if err != nil {
		t.Fatal(err)
	}
	address := tcp.Addr().String()
	_, port, _ := net.SplitHostPort(address)
	tcp.Close()
	r.url = "https://localhost:" + port
	if r.registry, err = operators.Open(l, operators.Config{
		Appliance: "test", RPID: "localhost", Origin: r.url, Acts: Acts(r.app, nil), Log: log,
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.registry.Close(context.Background()) })
	config.Meter.Source(r.registry.Measure)
	certs := newCertificates(t)
	r.ca = must(certs.Authority(t.Context()))(t)
	c := Config{
		Appliance: r.app, Operators: r.registry, Meter: config.Meter,
		History:    history.Open(filepath.Join(t.TempDir(), "history"), log),
		LoadPolicy: func() (*policy.Policy, error) { return policy.Parse("policy.cedar", []byte(r.policy)) },
		Level:      logline.NewLevel(slog.LevelInfo), Log: log,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelInfo), Certificates: certs,
		Hosts: []string{"localhost:" + port}, Origin: r.url, RPID: "localhost",
	}
	t.Cleanup(c.History.Close)
	r.server, _ = newServer(c)
	r.live, r.http = newHTTP(c)
	r.http.Handler = scantest.Answers(r.http.Handler)
	srv := r.http
	r.socket = filepath.Join(t.TempDir(), "admin.sock")
	unix, err := Listen(r.socket, "")
	if err != nil {
		t.Fatal(err)
	}
	https, err := ListenTLS(address, nil, certs)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range []net.Listener{unix, https} {
		go srv.Serve(l)
	}
	t.Cleanup(func() { srv.Close() })
	return r
}

func (r *rig) rules() *policy.Policy {
	p, err := policy.Parse("policy.cedar", []byte(r.policy))
	if err != nil {
		r.t.Fatal(err)
	}
	return p
}

// newCertificates returns certificates for keys in memory.
func newCertificates(t *testing.T) *certs.Manager {
	t.Helper()
	store := form.Guard(keystoretest.NewMemory(), nil)
	var keys [2]keystore.Key
	for i, name := range []string{keyring.CAName, keyring.AdminName} {
		ref := keystore.Ref{Name: name, Version: 1}
		keys[i] = must(store.Generate(t.Context(), ref, keystore.P256, keystore.Tag{byte(i)}))(t)
	}
	unrecorded := func(context.Context, string, keystore.Ref, [32]byte) error { return nil }
	return must(certs.New(keys[0], keys[1], new(saved), unrecorded, nil, scantest.Log()))(t)
}

// saved is a certs.Store in memory.
type saved struct{ sync.Map }

func (s *saved) Load(name string) ([]byte, error) {
	v, _ := s.Map.Load(name)
	b, _ := v.([]byte)
	return b, nil
}

func (s *saved) Save(_ context.Context, name string, value []byte) error {
	s.Store(name, value)
	return nil
}

// credential adds a new SSH key to the agent, and returns the credential.
func (r *rig) credential(name string) approval.Credential {
	r.t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		r.t.Fatal(err)
	}
	scantest.Secret("the SSH key of "+name, private.Seed())
	key, err := ssh.NewPublicKey(public)
	if err == nil {
		err = r.agent.Add(agent.AddedKey{PrivateKey: private, Comment: name})
	}
	if err != nil {
		r.t.Fatal(err)
	}
	return must(approval.NewSSH(string(ssh.MarshalAuthorizedKey(key))))(r.t)
}

func must[T any](v T, err error) func(t testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// proof signs a text with an operator's key.
func (r *rig) proof(name, text string) approval.Proof {
	r.t.Helper()
	o := must(r.registry.Operator(name))(r.t)
	namespace, _, _ := strings.Cut(text, "\n")
	return must(sshagent.Sign(r.agent, o.Credentials[0], namespace, text))(r.t)
}

func (r *rig) signIn(c *api.Client, name string) *api.Client {
	r.t.Helper()
	ch := must(c.Challenge(r.t.Context(), api.NewChallenge{Purpose: "sign-in", Operator: name}))(r.t)
	c = c.WithToken("")
	must(c.SignIn(r.t.Context(), api.Proven{Challenge: ch.ID, Proof: r.proof(name, ch.Text)}))(r.t)
	return c
}

func (r *rig) unix() *api.Client { return api.NewClient(r.socket) }

func (r *rig) https() *api.Client {
	r.t.Helper()
	return must(api.NewHTTPSClient(r.url, r.ca))(r.t)
}

// root enrols the first administrator, without the API, and signs in. The test need not run as
// root.
func (r *rig) root() *api.Client {
	r.t.Helper()
	channel := operators.Channel{Kind: operators.Unix}
	must(r.registry.EnrolFirst(r.t.Context(), channel, "root", r.credential("root")))(r.t)
	return r.signIn(r.unix(), "root")
}

func pairs(p ...string) []approval.Parameter { return list(p...) }

// carryOut proposes and approves as root.
func (r *rig) carryOut(c *api.Client, act string, parameters ...string) api.Proposal {
	r.t.Helper()
	n := api.NewProposal{Act: act}
	if i := slices.Index(parameters, "content"); i >= 0 { // no parameter, but goes with the proposal
		n.Content, parameters = parameters[i+1], slices.Concat(parameters[:i], parameters[i+2:])
	}
	n.Parameters = pairs(parameters...)
	p := must(c.Propose(r.t.Context(), n))(r.t)
	return must(c.Approve(r.t.Context(), p.ID, r.proof("root", p.Text)))(r.t)
}

// enrol adds an operator for each role, with the name of the role, and signs the operators in.
func (r *rig) enrol(root *api.Client, channel *api.Client) map[approval.Role]*api.Client {
	r.t.Helper()
	clients := map[approval.Role]*api.Client{}
	for _, role := range approval.Roles() {
		c := must(json.Marshal(r.credential(string(role))))(r.t)
		p := r.carryOut(root, "operator add", "name", string(role), "roles", string(role), "credential", string(c))
		if p.State != "done" {
			r.t.Fatalf("%+v", p)
		}
		clients[role] = r.signIn(channel, string(role))
	}
	return clients
}

// code returns the code of a refusal, or "".
func code(err error) string {
	if e, ok := err.(*api.Error); ok {
		return e.Code
	}
	if err != nil {
		return err.Error()
	}
	return ""
}

// call sends a request and reads the answer.
func call(
	t *testing.T, c *http.Client, method, url, body string, headers map[string]string,
) (*http.Response, api.Error, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	for name, value := range headers {
		if name == "Host" {
			req.Host = value
		}
		req.Header.Set(name, value)
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.Header.Get("Content-Type") == "text/event-stream" && method != http.MethodHead { // has no end
		first := make([]byte, 1)
		if _, err := resp.Body.Read(first); err != nil {
			t.Fatal(err)
		}
		return resp, api.Error{}, string(first)
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	var refusal api.Error
	if resp.StatusCode >= 400 {
		if err := json.Unmarshal(b, &refusal); err != nil {
			t.Errorf("%s %s: %d %s: %v", method, url, resp.StatusCode, b, err)
		}
	}
	return resp, refusal, string(b)
}

func (r *rig) unixHTTP() *http.Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", r.socket)
	}
	return &http.Client{Transport: &http.Transport{DialContext: dial}}
}

func (r *rig) httpsHTTP() *http.Client {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(r.ca)
	return &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}
}

// wants demands that a call was refused with a code, or for the code "" that the call was accepted.
func wants(t *testing.T, what, want string, err error) {
	t.Helper()
	if got := code(err); got != want {
		t.Errorf("%s: %q, want %q: %v", what, got, want, err)
	}
}

// token signs an operator in and returns the token.
func (r *rig) token(c *api.Client, name string) string {
	r.t.Helper()
	ch := must(c.Challenge(r.t.Context(), api.NewChallenge{Purpose: "sign-in", Operator: name}))(r.t)
	return must(c.SignIn(r.t.Context(), api.Proven{Challenge: ch.ID, Proof: r.proof(name, ch.Text)}))(r.t).Token
}
