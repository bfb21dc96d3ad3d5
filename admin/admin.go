// Package admin is the local admin API: what operators and their tools do with a running appliance. It is served on a Unix socket,
// where the kernel says who calls, and on a loopback address over HTTPS. Each operation declares who may call it, and in which states of
// the appliance it is refused: begin reading at New, then at authorise. What destroys or widens is asked for as a proposal: see Acts.
package admin

//go:generate go test -run TestOpenAPI -args -write

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"log"
	"net/http"
	"slices"
	"strings"
	"time"

	"countersign/admin/api"
	"countersign/admin/certs"
	"countersign/appliance"
	"countersign/audit"
	"countersign/internal/ijson"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/operators"
	"countersign/internal/peers"
	"countersign/policy"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humaecho"
	"github.com/labstack/echo/v4"
)

// maxBody bounds a request's body, but that of a proposal, which may bring a policy; maxEvents the events in one answer; actTime how long
// a request waits for the device and the disk.
const (
	maxBody     = 64 << 10
	maxProposal = 1<<20 + maxBody
	maxEvents   = 1000
	actTime     = 30 * time.Second
)

// Config is what the API is the edge of.
type Config struct {
	Appliance  *appliance.Appliance
	Operators  *operators.Registry
	LoadPolicy func() (*policy.Policy, error) // reads the policy file again
	ErrorLog   *log.Logger                    // of net/http: handshakes that fail, and handlers that panic
	Group      string                         // the number of the group whose members may talk on the Unix socket; "": nobody but root and the daemon's user

	// What follows is for HTTPS. Without Certificates there is none.
	Certificates *certs.Manager
	Hosts        []string // what the Host header may be, such as localhost:7780
	Origin       string   // of the console: https://localhost:7780
	RPID         string   // the relying party of passkeys: localhost
}

type server struct {
	Config
	api      huma.API
	document []byte
	canaries canaries
	secret   [32]byte // of the ids of passkeys' registrations: a restart forgets it
}

// New returns the server of the admin API, for the listeners of Listen and ListenTLS.
func New(c Config) *http.Server {
	s, handler := newServer(c)
	return &http.Server{
		Handler:           http.MaxBytesHandler(s.door(handler), maxProposal),
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ConnContext:       s.withConnection,
		ErrorLog:          c.ErrorLog,
	}
}

func newServer(c Config) (*server, *echo.Echo) {
	configureHuma()
	e := echo.New()
	e.HTTPErrorHandler = fail
	config := huma.DefaultConfig("Countersign admin API", "1")
	config.Info.Description = "What operators do with a running appliance. x-roles says of which roles one is needed (*: any; none: nobody needs to be " +
		"signed in), x-refused-in in which states of the appliance an operation is refused, and with which code."
	config.Servers = []*huma.Server{{URL: "https://localhost:7780", Description: "by default; the Unix socket serves the same"}}
	config.OpenAPIPath, config.DocsPath, config.SchemasPath = "", "", "" // what shows it to people is the console's
	config.CreateHooks = nil
	strict := huma.Format{Marshal: huma.DefaultJSONFormat.Marshal, Unmarshal: func(b []byte, v any) error { return ijson.Decode(b, v) }}
	config.Formats = map[string]huma.Format{"application/json": strict, "json": strict}
	config.Components.SecuritySchemes = map[string]*huma.SecurityScheme{
		"session": {Type: "http", Scheme: "bearer", Description: "the token of a session"},
		"cookie":  {Type: "apiKey", In: "cookie", Name: cookieName, Description: "over HTTPS, a browser's half of the token"},
		"page":    {Type: "apiKey", In: "header", Name: pageHeader, Description: "the half that the page keeps"},
	}
	s := &server{Config: c, api: humaecho.New(e, config)}
	rand.Read(s.secret[:])
	s.routes()
	s.document = s.openAPI()
	return s, e
}

func (s *server) routes() {
	raw(s, operation{route: "GET /v1/openapi.json", id: "openapi", summary: "This document", roles: anyone, refused: never}, s.openapi)
	for _, at := range []struct{ path, id string }{{"/v1/health/", ""}, {"/health/", "-short"}} {
		route(s, operation{route: "GET " + at.path + "alive", id: "alive" + at.id, summary: "Say whether the daemon comes round", roles: anyone, refused: never}, s.alive)
		route(s, operation{route: "GET " + at.path + "ready", id: "ready" + at.id, summary: "Say whether it signs: by a signature, made once a second at the most", roles: anyone, refused: never}, s.ready)
		route(s, operation{route: "GET " + at.path + "state", id: "state" + at.id, summary: "Say in which state the appliance is, and to who is signed in why", roles: anyone, refused: never}, s.health)
	}
	act(s, operation{route: "POST /v1/lock", id: "lock", summary: "Lock the appliance: no key is used until it is unlocked", roles: of(administrator, operator), refused: always}, s.lock)
	act(s, operation{route: "POST /v1/unlock", id: "unlock", summary: "Unlock the appliance", roles: of(administrator), refused: always}, s.unlock)

	route(s, operation{route: "GET /v1/me", id: "me", summary: "Say who is signed in", roles: everyone, refused: always}, s.me)
	route(s, operation{route: "POST /v1/challenges", id: "challenge", summary: "Get a text to be signed, to sign in or to confirm presence", roles: anyone, refused: always, status: http.StatusCreated}, s.challenge)
	raw(s, operation{route: "POST /v1/sessions", id: "sign-in", summary: "Sign in with a signed challenge", roles: anyone, refused: always, status: http.StatusCreated}, s.signIn)
	route(s, operation{route: "GET /v1/sessions", id: "sessions", summary: "List one's own sessions; administrators see all", roles: everyone, refused: always}, s.sessions)
	raw(s, operation{route: "DELETE /v1/sessions/{id}", id: "end-session", summary: "End a session: one's own (current is this one), as an administrator any", roles: everyone, refused: always}, s.endSession)
	route(s, operation{route: "POST /v1/passkeys/options", id: "passkey-options", summary: "Begin to make a passkey", roles: anyone, refused: always, status: http.StatusCreated}, s.passkeyOptions)
	route(s, operation{route: "POST /v1/passkeys", id: "passkey", summary: "Check a new passkey; a proposal gives it to an operator", roles: anyone, refused: always}, s.passkey)
	route(s, operation{route: "POST /v1/operators/first", id: "first-operator", summary: "Enrol the first administrator: for root on the Unix socket, once", roles: anyone, refused: never, status: http.StatusCreated}, s.enrolFirst)
	route(s, operation{route: "GET /v1/operators", id: "operators", summary: "List operators", roles: of(administrator, auditor, approver), refused: always}, s.operators)
	route(s, operation{route: "GET /v1/operators/{name}", id: "operator", summary: "Show an operator", roles: of(administrator, auditor, approver), refused: always}, s.operator)
	route(s, operation{route: "GET /v1/approvals", id: "approvals", summary: "Say how many approvals an act needs, and who gives them", roles: of(administrator, operator, auditor, approver), refused: always}, s.approvals)
	route(s, operation{route: "GET /v1/proposals", id: "proposals", summary: "List proposals, the newest first", roles: of(administrator, operator, auditor, approver), refused: always}, s.proposals)
	route(s, operation{route: "POST /v1/proposals", id: "propose", summary: "Propose an act that needs approval", roles: of(administrator, operator), refused: always, status: http.StatusCreated, body: maxProposal}, s.propose)
	route(s, operation{route: "GET /v1/proposals/{id}", id: "proposal", summary: "Show a proposal", roles: of(administrator, operator, auditor, approver), refused: always}, s.proposal)
	route(s, operation{route: "POST /v1/proposals/{id}/approvals", id: "approve", summary: "Approve a proposal by a signature over its text", roles: of(approver), refused: always}, s.approve)
	act(s, operation{route: "POST /v1/proposals/{id}/withdraw", id: "withdraw", summary: "Withdraw a proposal", roles: of(administrator, operator), refused: always}, s.withdraw)

	route(s, operation{route: "POST /v1/keys", id: "create-key", summary: "Create or import a signing key", roles: of(operator), refused: making, status: http.StatusCreated}, s.createKey)
	route(s, operation{route: "GET /v1/keys", id: "keys", summary: "List all versions of all keys", roles: everyone, refused: always}, s.keys)
	route(s, operation{route: "GET /v1/keys/{name}", id: "key", summary: "Show all versions of a key", roles: everyone, refused: always}, s.key)
	s.keyRoutes()
	route(s, operation{route: "GET /v1/noise-key", id: "noise-key", summary: "Show the key that the listener answers handshakes with", roles: everyone, refused: always}, s.noiseKey)
	route(s, operation{route: "GET /v1/tokens", id: "tokens", summary: "Say how the tokens and their key workers are", roles: of(administrator, operator, auditor, metrics), refused: always}, s.tokens)
	act(s, operation{route: "POST /v1/tokens/{name}/retry", id: "retry-token", summary: "Log in to a token again after its PIN was refused", roles: of(administrator), refused: always}, s.retryToken)
	route(s, operation{route: "GET /v1/rollback", id: "rollback", summary: "Say whether the ledger is older than its counter", roles: of(administrator, operator, auditor, approver), refused: always}, s.rollback)
	route(s, operation{route: "GET /v1/peers", id: "peers", summary: "List the enrolled peers", roles: everyone, refused: always}, s.peers)
	act(s, operation{route: "DELETE /v1/peers/{name}", id: "remove-peer", summary: "Take a peer's enrolment back and close its connections", roles: of(operator), refused: always}, s.removePeer)
	act(s, operation{route: "POST /v1/peers/{name}/suspend", id: "suspend-peer", summary: "Keep a peer out until it is resumed", roles: of(operator), refused: always}, s.suspendPeer)
	act(s, operation{route: "POST /v1/peers/{name}/resume", id: "resume-peer", summary: "Let a suspended peer in again", roles: of(operator), refused: always}, s.resumePeer)

	route(s, operation{route: "GET /v1/policies", id: "policies", summary: "List the versions of the policy without their texts; the last one is in force", roles: of(administrator, operator, auditor, approver), refused: always}, s.policies)
	route(s, operation{route: "GET /v1/policies/{version}", id: "policy", summary: "Show a version of the policy with its text", roles: of(administrator, operator, auditor, approver), refused: always}, s.policy)
	route(s, operation{route: "GET /v1/decisions", id: "decisions", summary: "List what policy decided", roles: of(administrator, auditor), refused: always}, s.decisions)
	route(s, operation{route: "GET /v1/decisions/{event}", id: "decision", summary: "Show what policy decided in an event", roles: of(administrator, auditor), refused: always}, s.decision)

	route(s, operation{route: "GET /v1/events", id: "events", summary: "List events of the audit log", roles: of(administrator, operator, auditor), refused: always}, s.events)
	route(s, operation{route: "GET /v1/log", id: "log", summary: "Name the audit log", roles: of(administrator, operator, auditor, backup), refused: always}, s.log)
	route(s, operation{route: "POST /v1/log/epochs", id: "end-epoch", summary: "End the present epoch of the audit log", roles: of(operator), refused: always}, s.endEpoch)
	act(s, operation{route: "POST /v1/log/epochs/{epoch}/hold", id: "hold", summary: "Keep an epoch from being dropped (legal hold)", roles: of(administrator), refused: always}, s.hold)
	s.logFiles()
	route(s, operation{route: "GET /v1/retention", id: "retention", summary: "Say what retention has dropped and will drop", roles: of(administrator, auditor, backup), refused: always}, s.retention)
	route(s, operation{route: "GET /v1/receipts", id: "receipts", summary: "List receipts by time", roles: of(operator, auditor), refused: always}, s.receipts)
	route(s, operation{route: "GET /v1/receipts/{id}", id: "receipt", summary: "Show a receipt", roles: of(operator, auditor), refused: always}, s.receipt)
	route(s, operation{route: "GET /v1/ledger", id: "ledger", summary: "Say how large the ledger is and how its clock is", roles: of(administrator, operator, auditor, backup, metrics), refused: always}, s.ledger)
	route(s, operation{route: "POST /v1/ledger/compact", id: "compact", summary: "Give the free space of the ledger's file back", roles: of(operator), refused: always}, s.compact)

	route(s, operation{route: "GET /v1/tls", id: "tls", summary: "Show the certificate of the HTTPS listener and whom to trust for it", roles: everyone, refused: always}, s.tls)
	route(s, operation{route: "POST /v1/tls/csr", id: "csr", summary: "Ask for a request for a certificate", roles: of(administrator), refused: always}, s.csr)
	route(s, operation{route: "PUT /v1/tls/certificate", id: "install-certificate", summary: "Put a certificate into use", roles: of(administrator), refused: always}, s.installCertificate)
	route(s, operation{route: "DELETE /v1/tls/certificate", id: "uninstall-certificate", summary: "Go back to a certificate of the appliance's own CA", roles: of(administrator), refused: always}, s.uninstallCertificate)
}

func (s *server) createKey(ctx context.Context, who caller, in *body[api.NewKey]) (api.Key, error) {
	n := in.Body
	k, err := s.Appliance.Keys.Create(ctx, who.actor(), keyring.NewKey{Name: n.Name, Algorithm: keystore.Algorithm(n.Algorithm), Token: n.Token, Seed: n.SeedFile})
	if err != nil {
		return api.Key{}, err
	}
	return s.keyDoc(k), nil
}

func (s *server) keys(context.Context, caller, *none) ([]api.Key, error) {
	return docs(s.Appliance.Keys.All(), s.keyDoc), nil
}

func (s *server) key(_ context.Context, _ caller, in *named) ([]api.Key, error) {
	versions, err := s.Appliance.Keys.Versions(in.Name)
	return docs(versions, s.keyDoc), err
}

func (s *server) noiseKey(context.Context, caller, *none) (api.Key, error) {
	k, err := s.Appliance.Keys.Noise()
	if err != nil {
		return api.Key{}, err
	}
	return s.keyDoc(k), nil
}

func (s *server) tokens(context.Context, caller, *none) ([]api.Token, error) {
	all := []api.Token{}
	for name, status := range s.Appliance.Tokens() {
		token := api.Token{Name: name, Up: status.Up, Cause: status.Cause}
		for _, w := range status.Workers {
			token.Workers = append(token.Workers, api.Worker{PID: w.PID, Served: w.Served, Restarts: w.Restarts})
		}
		all = append(all, token)
	}
	slices.SortFunc(all, func(x, y api.Token) int { return strings.Compare(x.Name, y.Name) })
	return all, nil
}

func (s *server) retryToken(ctx context.Context, who caller, in *named) error {
	return s.Appliance.RetryToken(ctx, who.actor(), in.Name)
}

func (s *server) rollback(context.Context, caller, *none) (api.Rollback, error) {
	r, err := s.Appliance.Anchor.Rollback()
	if err != nil || r == nil {
		return api.Rollback{}, err
	}
	return api.Rollback{Detected: true, Reason: r.Reason, Ledger: r.Ledger, Counter: r.Counter, At: r.At.Unix()}, nil
}

func (s *server) peers(context.Context, caller, *none) ([]api.Peer, error) {
	return docs(s.Appliance.Peers.All(), func(p peers.Status) api.Peer {
		return api.Peer{Name: p.Name, PublicKey: hex.EncodeToString(p.PublicKey[:]), Added: p.Added.Unix(), Suspended: p.Suspended, LastSeen: unix(p.Seen), Connections: p.Connections}
	}), nil
}

func (s *server) removePeer(ctx context.Context, who caller, in *named) error {
	return s.Appliance.Peers.Remove(ctx, who.actor(), in.Name)
}

func (s *server) suspendPeer(ctx context.Context, who caller, in *named) error {
	return s.Appliance.Peers.Suspend(ctx, who.actor(), in.Name)
}

func (s *server) resumePeer(ctx context.Context, who caller, in *named) error {
	return s.Appliance.Peers.Resume(ctx, who.actor(), in.Name)
}

type eventsInput struct {
	From  uint64 `query:"from" doc:"the index of the first one"`
	Limit int    `query:"limit" minimum:"1" maximum:"1000" default:"1000"`
}

func (s *server) events(_ context.Context, _ caller, in *eventsInput) ([]api.Event, error) {
	all := []api.Event{}
	err := s.Appliance.Events(in.From, func(index uint64, e audit.Event) bool {
		all = append(all, api.Event{Index: index, Event: e})
		return len(all) < in.Limit
	})
	return all, err
}

func (s *server) keyDoc(k *keyring.Key) api.Key {
	info := k.Info()
	doc := api.Key{
		Name: k.Name, Version: k.Version, Algorithm: string(info.Algorithm), State: string(k.State), Custody: string(info.Custody),
		Token:     k.Token,
		PublicKey: hex.EncodeToString(info.PublicKey), Origin: info.Provenance.String(), Provenance: api.Provenance(info.Provenance), Created: k.Created.Unix(),
		Activates: unix(k.Activates), Retires: unix(k.Retires), Uses: k.Uses(), Authorization: k.Authorization,
	}
	if next, ok := s.Appliance.Keys.Next(k); ok {
		doc.Next = hex.EncodeToString(next[:])
	}
	return doc
}

// docs makes a list of documents; an empty one where there is nothing.
func docs[T, D any](all []T, doc func(T) D) []D {
	list := make([]D, 0, len(all))
	for _, each := range all {
		list = append(list, doc(each))
	}
	return list
}

func unix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}
