// Package admin is the server of the local admin API, for operators and their tools. The server
// listens on a Unix socket, where the kernel identifies the caller, and on a loopback address over
// HTTPS. Each operation declares the roles that may call it, and the states of the appliance in
// which it is refused. An act that destroys or widens needs an approved proposal: see Acts. Begin
// reading at New, then at routes and authorise.
package admin

//go:generate go test -run TestOpenAPI -args -write

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log"
	"log/slog"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"countersign/admin/api"
	"countersign/admin/certs"
	"countersign/admin/console"
	"countersign/appliance"
	"countersign/audit"
	"countersign/internal/history"
	"countersign/internal/ijson"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/logline"
	"countersign/internal/machine"
	"countersign/internal/manage"
	"countersign/internal/meter"
	"countersign/internal/operators"
	"countersign/internal/peers"
	"countersign/internal/secret"
	"countersign/policy"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humaecho"
	"github.com/labstack/echo/v4"
)

// Limits of requests and answers.
const (
	maxBody        = 64 << 10         // bytes of a body, except of a proposal
	maxProposal    = 1<<20 + maxBody  // bytes of a proposal's body, which may contain a policy
	requestTimeout = 30 * time.Second // for the device and the disk
	// writeTimeout ends a connection that does not read, from the end of the request's header on.
	// The time covers the body, the request and the answer.
	writeTimeout = 2 * time.Minute
)

// KeyWorkers says how far the key workers are apart from the daemon.
type KeyWorkers = api.KeyWorkers

// Config is the configuration of the server.
type Config struct {
	Appliance  *appliance.Appliance
	Operators  *operators.Registry
	Meter      *meter.Meter
	History    *history.History               // nil: there is none
	LoadPolicy func() (*policy.Policy, error) // reads the policy file again
	Level      *logline.Level                 // of the daemon's log
	Log        *slog.Logger                   // the daemon's log
	ErrorLog   *log.Logger                    // of net/http: failed TLS handshakes, and panics of handlers
	// Group is the number of the group whose members may use the Unix socket. Without a group, only
	// root and the daemon's user may use the socket.
	Group string

	KeyWorkers KeyWorkers      // part of the state
	Machine    *machine.Client // nil: the appliance was not booted from the image
	// Certificates, and the fields below, are for HTTPS. Without Certificates there is no HTTPS.
	Certificates *certs.Manager
	Hosts        []string // accepted Host headers, for example localhost:7780
	Origin       string   // of the console: https://localhost:7780
	RPID         string   // relying party of passkeys: localhost
}

type server struct {
	Config
	api      huma.API
	document []byte      // openapi.json
	canary   canaryCache // for Ready
	leveling sync.Mutex  // held while the level of the log is set
	streams  *streams
	links    links
	trying   sync.Mutex   // held while a policy is tried
	macKey   secret.Bytes // of registrations' ids; new after each start
}

// New returns the server of the admin API, for the listeners of Listen and ListenTLS.
func New(c Config) *http.Server {
	_, server := newHTTP(c)
	return server
}

func newHTTP(c Config) (*server, *http.Server) {
	s, handler := newServer(c)
	server := &http.Server{
		Handler:           http.MaxBytesHandler(s.guard(withConsole(answerHead(handler))), maxProposal),
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ConnContext:       s.withConnection,
		ErrorLog:          c.ErrorLog,
	}
	server.RegisterOnShutdown(s.streams.shut)
	return s, server
}

// withConsole serves the console beside the API.
func withConsole(operations http.Handler) http.Handler {
	pages := console.Handler()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if console.Is(r) {
			pages.ServeHTTP(w, r)
			return
		}
		operations.ServeHTTP(w, r)
	})
}

func newServer(c Config) (*server, *echo.Echo) {
	configureHuma()
	e := echo.New()
	e.HTTPErrorHandler = writeError
	config := huma.DefaultConfig("Countersign admin API", "1")
	config.Info.Description = "What operators do with a running appliance. x-roles says of which roles one is needed " +
		"(*: any; none: nobody needs to be signed in), x-refused-in in which states of the appliance an operation is " +
		"refused, and with which code."
	config.Servers = []*huma.Server{
		{URL: "https://localhost:7780", Description: "by default; the Unix socket serves the same"},
	}
	config.OpenAPIPath, config.DocsPath, config.SchemasPath = "", "", "" // the console shows the documentation
	config.CreateHooks = nil
	strict := huma.Format{
		Marshal:   marshal,
		Unmarshal: func(b []byte, v any) error { return ijson.Decode(b, v) },
	}
	config.Formats = map[string]huma.Format{"application/json": strict, "json": strict}
	config.Components.SecuritySchemes = map[string]*huma.SecurityScheme{
		"session": {Type: "http", Scheme: "bearer", Description: "the token of a session"},
		"scraper": {Type: "http", Scheme: "bearer", Description: "over HTTPS, the token of the act scraper add"},
		"cookie": {
			Type: "apiKey", In: "cookie", Name: cookieName, Description: "over HTTPS, a browser's half of the token",
		},
		"page": {Type: "apiKey", In: "header", Name: pageHeader, Description: "the half that the page keeps"},
	}
	s := &server{Config: c, api: humaecho.New(e, config)}
	s.streams = newStreams(s)
	key := make([]byte, 32)
	rand.Read(key)
	s.macKey = secret.New(key)
	s.routes()
	s.document = s.openAPI()
	return s, e
}

func (s *server) createKey(ctx context.Context, who caller, in *body[api.NewKey]) (api.Key, error) {
	n := in.Body
	k, err := s.Appliance.Keys.Create(ctx, who.actor(), keyring.NewKey{
		Name: n.Name, Algorithm: keystore.Algorithm(n.Algorithm), Token: n.Token, Seed: n.SeedFile,
		Recoverable: n.Recoverable,
	})
	if err != nil {
		return api.Key{}, err
	}
	return s.keyDoc(k), nil
}

// keyOrder is the order of listings of keys: by name and version. No name has a space.
func keyOrder(k *keyring.Key) string { return fmt.Sprintf("%s %010d", k.Name, k.Version) }

func (s *server) keys(_ context.Context, _ caller, in *findInput) (*listed[api.Key], error) {
	all := slices.DeleteFunc(s.Appliance.Keys.All(), func(k *keyring.Key) bool { return !in.finds(k.Name) })
	return paged(in.page(), all, keyOrder, s.keyDoc), nil
}

func (s *server) key(_ context.Context, _ caller, in *struct {
	Name  string `path:"name" maxLength:"200"`
	After string `query:"after" maxLength:"200" doc:"the header Countersign-Next of the page before"`
}) (*listed[api.Key], error) {
	versions, err := s.Appliance.Keys.Versions(in.Name)
	return paged(&pageInput{in.After, maxEntries}, versions, keyOrder, s.keyDoc), err
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
		all = append(all, tokenDoc(name, status))
	}
	slices.SortFunc(all, func(x, y api.Token) int { return strings.Compare(x.Name, y.Name) })
	return all, nil
}

func tokenDoc(name string, status keystore.Status) api.Token {
	return api.Token{
		Name: name, Up: status.Up, Cause: status.Cause,
		Workers: docs(status.Workers, func(w keystore.Worker) api.Worker {
			return api.Worker{PID: w.PID, Served: w.Served, Restarts: w.Restarts}
		}),
	}
}

// inspectTime is the time for a device to say what it is.
const inspectTime = 3 * time.Second

func (s *server) token(ctx context.Context, _ caller, in *named) (api.TokenDetails, error) {
	status, there := s.Appliance.Tokens()[in.Name]
	doc := api.TokenDetails{Token: tokenDoc(in.Name, status)}
	ctx, cancel := context.WithTimeout(ctx, inspectTime)
	defer cancel()
	found, err := s.Appliance.InspectToken(ctx, in.Name)
	if there && !status.Up {
		err = nil // the cause says it; a TPM whose keys are sealed answers all the same
	}
	doc.Findings = docs(found, func(f keystore.Finding) api.Finding {
		return api.Finding{What: f.What, For: string(f.For), OK: f.OK, Text: f.Text}
	})
	return doc, err
}

func (s *server) retryToken(ctx context.Context, who caller, in *named) error {
	return s.Appliance.RetryToken(ctx, who.actor(), in.Name)
}

func (s *server) rollback(context.Context, caller, *none) (api.Rollback, error) {
	anchor := s.Appliance.Anchor
	token, err := anchor.Bound()
	if err != nil {
		return api.Rollback{}, err
	}
	doc := api.Rollback{Token: token}
	if unread := anchor.Unread(); unread != nil {
		doc.Unread = unread.Error()
	}
	if r, err := anchor.Rollback(); err != nil {
		return api.Rollback{}, err
	} else if r != nil {
		doc.Detected, doc.Reason, doc.Ledger, doc.Counter, doc.At = true, r.Reason, r.Ledger, r.Counter, r.At.Unix()
	}
	return doc, nil
}

func (s *server) peers(_ context.Context, _ caller, in *findInput) (*listed[api.Peer], error) {
	name := func(p peers.Status) string { return p.Name }
	all := slices.DeleteFunc(s.Appliance.Peers.All(), func(p peers.Status) bool { return !in.finds(p.Name) })
	return paged(in.page(), all, name, peerDoc), nil
}

func (s *server) peer(_ context.Context, _ caller, in *named) (api.Peer, error) {
	p, err := s.Appliance.Peers.Status(in.Name)
	return peerDoc(p), err
}

func (s *server) peerActivity(_ context.Context, _ caller, in *named) (api.PeerActivity, error) {
	a, err := s.Appliance.Peers.Activity(in.Name, time.Now())
	return activityDoc(a), err
}

func (s *server) activity(_ context.Context, _ caller, in *struct {
	Limit int `query:"limit" minimum:"1" maximum:"100" default:"20" doc:"the number of peers"`
}) ([]api.PeerActivity, error) {
	return docs(s.Appliance.Peers.Busiest(in.Limit, time.Now()), activityDoc), nil
}

func activityDoc(a peers.Activity) api.PeerActivity {
	doc := api.PeerActivity{Name: a.Name, Since: unix(a.Since)}
	for _, n := range a.Minutes {
		doc.Signatures = append(doc.Signatures, n.Signatures)
		doc.Verifications = append(doc.Verifications, n.Verifications)
		doc.Refused, doc.Others = append(doc.Refused, n.Refused), append(doc.Others, n.Others)
	}
	return doc
}

func peerDoc(p peers.Status) api.Peer {
	return api.Peer{
		Name: p.Name, Added: p.Added.Unix(),
		Keys: docs(p.Keys, func(k peers.Key) api.PeerKey {
			return api.PeerKey{
				PublicKey: hex.EncodeToString(k.PublicKey[:]), Added: k.Added.Unix(), LastSeen: unix(k.Seen),
				Connections: k.Connections,
			}
		}),
		Suspended: p.Suspended, LastSeen: unix(p.Seen), Connections: p.Connections,
		UsedBytes: p.Used.Kept, UsedRefusalBytes: p.Used.Refused,
	}
}

func (s *server) removePeerKey(ctx context.Context, who caller, in *struct {
	Name string `path:"name" maxLength:"64"`
	Key  string `path:"key" minLength:"64" maxLength:"64" pattern:"^[0-9a-f]{64}$" doc:"the public key in hex"`
}) error {
	key, err := hex.DecodeString(in.Key)
	if err != nil || len(key) != 32 {
		return invalid.errorf("%q is not a public key of 64 hex digits", in.Key)
	}
	return s.Appliance.Peers.RemoveKey(ctx, who.actor(), in.Name, [32]byte(key))
}

func groupDoc(g appliance.Group) api.Group {
	return api.Group{
		Name: g.Name, Of: g.Of, Size: len(g.Members), SHA256: g.Digest(), Changed: g.Changed.Unix(), Members: g.Members,
	}
}

func (s *server) groups(_ context.Context, _ caller, in *pageInput) (*listed[api.Group], error) {
	name := func(g appliance.Group) string { return g.Name }
	return paged(in, s.Appliance.Groups(), name, func(g appliance.Group) api.Group {
		doc := groupDoc(g)
		doc.Members = nil
		return doc
	}), nil
}

func (s *server) group(_ context.Context, _ caller, in *named) (api.Group, error) {
	g, err := s.Appliance.Group(in.Name)
	return groupDoc(g), err
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
	From      uint64 `query:"from" doc:"the number of the first event"`
	Before    uint64 `query:"before" doc:"the number after the last event; 0: no end"`
	Order     string `query:"order" enum:"oldest,newest" default:"oldest" doc:"which event comes first"`
	Type      string `query:"type" maxLength:"64"`
	Actor     string `query:"actor" maxLength:"200" doc:"the name of a peer or operator"`
	Resource  string `query:"resource" maxLength:"500" doc:"payments/2, or payments for all of its versions"`
	Outcome   string `query:"outcome" maxLength:"64" doc:"such as ok or denied; !ok: each but ok"`
	Nonce     string `query:"nonce" maxLength:"64" doc:"hex"`
	Digest    string `query:"digest" maxLength:"64" doc:"hex"`
	Admission string `query:"admission" maxLength:"20" doc:"the number of an admission: finds its outcome"`
	Request   string `query:"request" maxLength:"30" doc:"the id of a request, from its answer"`
	Since     int64  `query:"since" minimum:"0" doc:"Unix milliseconds of the event"`
	Until     int64  `query:"until" minimum:"0" doc:"Unix milliseconds, not included; 0: no end"`
	After     string `query:"after" maxLength:"200" doc:"the header Countersign-Next of the page before"`
	Limit     int    `query:"limit" minimum:"1" maximum:"1000" default:"1000"`
}

func (s *server) events(_ context.Context, _ caller, in *eventsInput) (*listed[api.Event], error) {
	q := ledger.Query{
		Type: audit.Type(in.Type), Actor: in.Actor, Resource: in.Resource, Nonce: in.Nonce, Digest: in.Digest,
		Admission: in.Admission, Request: in.Request, Since: in.Since, Until: in.Until,
	}
	if in.Type != "" && !q.Type.Known() {
		return nil, invalid.errorf("type: %q is not a type of events: docs/SPEC.md has the list", ijson.Clip(in.Type))
	}
	span := ledger.Span{From: in.From, Before: in.Before, Down: in.Order == "newest"}
	out := newListed[api.Event](in.Limit)
	if in.After != "" {
		last, err := numberAfter(in.After)
		switch {
		case err != nil:
			return nil, err
		case span.Down && last == 0:
			return out, nil
		case span.Down:
			span.Before = last
		default:
			span.From = max(span.From, last+1)
		}
	}
	err := s.Appliance.Find(q, span, func(index uint64, e audit.Event) bool {
		if not, is := strings.CutPrefix(in.Outcome, "!"); in.Outcome != "" && (e.Outcome == not) == is {
			return true
		}
		return out.add(api.Event{Index: index, Event: e}, strconv.FormatUint(index, 10))
	})
	if err == nil && out.last == "" && in.After == "" && in.Actor != "" {
		err = s.checkActor(in.Actor)
	}
	return out, err
}

// checkActor returns ErrNotFound unless a peer, an operator or an event has the name.
func (s *server) checkActor(name string) error {
	if _, err := s.Operators.Operator(name); err == nil || s.Appliance.Peers.Enrolled(name) {
		return nil
	}
	known := false
	err := s.Appliance.Find(ledger.Query{Actor: name}, ledger.Span{}, func(uint64, audit.Event) bool {
		known = true
		return false
	})
	if err == nil && !known {
		err = fmt.Errorf("actor %q: %w: no peer, no operator and no event has this name",
			ijson.Clip(name), manage.ErrNotFound)
	}
	return err
}

// numberAfter parses the cursor of a listing that is in the order of numbers.
func numberAfter(after string) (uint64, error) {
	n, err := strconv.ParseUint(after, 10, 64)
	if err != nil || strconv.FormatUint(n, 10) != after || n == math.MaxUint64 {
		return 0, invalid.errorf("after: %q is not the cursor that a page before has given", ijson.Clip(after))
	}
	return n, nil
}

func (s *server) keyDoc(k *keyring.Key) api.Key {
	info := k.Info()
	doc := api.Key{
		Name: k.Name, Version: k.Version, Algorithm: string(info.Algorithm), State: string(k.State),
		Compromised: k.Compromised, Custody: string(info.Custody), Token: k.Token,
		PublicKey: hex.EncodeToString(info.PublicKey),
		Origin:    info.Provenance.String(), Provenance: api.Provenance(info.Provenance),
		Created: k.Created.Unix(), Activates: unix(k.Activates), Retires: unix(k.Retires),
		Uses: k.Uses(), Own: k.Own(), Recovery: k.Recovery, Authorization: k.Authorization,
	}
	if next, ok := s.Appliance.Keys.Next(k); ok {
		doc.Next = hex.EncodeToString(next[:])
	}
	return doc
}

// docs converts a list to documents. The result is never nil: JSON has an empty list, not null.
func docs[T, D any](all []T, doc func(T) D) []D {
	list := make([]D, 0, len(all))
	for _, each := range all {
		list = append(list, doc(each))
	}
	return list
}

// unix returns a time in Unix seconds, or 0 for the zero time.
func unix(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.Unix()
}
