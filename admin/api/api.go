// Package api is the language of the local admin API: the documents that it takes and gives, and a client that speaks
// it over the Unix socket or over HTTPS. It is all that an operator's tool needs; the server is in package admin, and the whole API
// in admin/openapi.json. Begin reading at Client.
package api

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"

	"countersign/audit"
	"countersign/internal/keystore"
	"countersign/wire"
)

// Key is one version of a key. PublicKey is hex.
type Key struct {
	Name      string `json:"name"`
	Version   uint32 `json:"version"`
	Algorithm string `json:"algorithm"`
	State     string `json:"state"`
	Custody   string `json:"custody"`
	Token     string `json:"token"`
	PublicKey string `json:"public_key"`
	// Origin is generated or imported; Provenance is what the device said of the key when it was made.
	Origin     string              `json:"origin"`
	Provenance keystore.Provenance `json:"provenance"`
	Created    int64               `json:"created"` // Unix seconds, as the two below; 0 where there is none
	Activates  int64               `json:"activates" doc:"when it becomes active, or has"`
	Retires    int64               `json:"retires" doc:"verify-only: when it is archived at the latest"`
	Uses       uint64              `json:"uses" doc:"signatures that it has made"`
	// Next is SHA-256 of the public key of the next version, hex: what the line is committed to.
	Next string `json:"next,omitempty"`
	// Authorization is what the identity has signed for a Noise key.
	Authorization *wire.Authorization `json:"authorization,omitempty"`
}

// Token is how a token of the appliance is.
type Token struct {
	Name string `json:"name"`
	keystore.Status
}

// Peer is an enrolled client. PublicKey is hex.
type Peer struct {
	Name        string `json:"name"`
	PublicKey   string `json:"public_key"`
	Added       int64  `json:"added"` // Unix seconds
	Suspended   bool   `json:"suspended"`
	LastSeen    int64  `json:"last_seen"`   // Unix seconds; 0: never
	Connections int    `json:"connections"` // open now
}

// Policy is a version of the policy that was or is in force. Text is there where one version was asked for.
type Policy struct {
	Version   uint64 `json:"version"`
	SHA256    string `json:"sha256"`
	Activated int64  `json:"activated"` // Unix seconds
	Text      string `json:"text,omitempty"`
}

// Decision is what policy decided in an event: the record (policy.Record in JSON) byte for byte, whose SHA-256 is in the event.
type Decision struct {
	Event  uint64 `json:"event"`
	Record string `json:"record"`
}

// Event is an entry of the audit log with its index.
type Event struct {
	Index uint64 `json:"index"`
	audit.Event
}

// NewKey is what creating a key takes.
type NewKey struct {
	Name      string `json:"name" maxLength:"64" doc:"of the line of keys: lower-case letters, digits and -"`
	Algorithm string `json:"algorithm,omitempty" enum:"ed25519,p256" doc:"ed25519 where it is left out"`
	Token     string `json:"token,omitempty" maxLength:"64" doc:"may be left out where there is only one"`
	SeedFile  string `json:"seed_file,omitempty" maxLength:"4096" doc:"import: an absolute path on the appliance"`
}

// Rollback says whether the ledger is older than the counter that it is bound to.
type Rollback struct {
	Detected bool   `json:"detected"`
	Reason   string `json:"reason,omitempty"`
	Ledger   uint64 `json:"ledger"`  // the counter's value by the ledger
	Counter  uint64 `json:"counter"` // and by its device
	At       int64  `json:"at"`      // when it was detected, Unix seconds
}

// Log names the audit log.
type Log struct {
	Epoch       uint32 `json:"epoch"`
	VerifierKey string `json:"verifier_key"` // of that epoch, in the form of C2SP signed-note
	WebhookKey  string `json:"webhook_key"`  // the same key, in the form of Standard Webhooks
}

// Epoch is a part of the audit log with a tree of its own. Times are Unix seconds, 0 where there is none.
type Epoch struct {
	Epoch      uint32 `json:"epoch"`
	First      uint64 `json:"first"` // number of its first event
	Size       uint64 `json:"size"`  // events
	Begun      int64  `json:"begun"`
	Ended      int64  `json:"ended"`
	Due        int64  `json:"due"`     // when retention may drop it
	Dropped    int64  `json:"dropped"` // when it did
	Hold       string `json:"hold,omitempty"`
	Checkpoint uint64 `json:"checkpoint"` // events that the newest signed checkpoint covers
}

// Retention says what retention has done and will do.
type Retention struct {
	Epochs         []Epoch `json:"epochs"`
	ReceiptsBefore int64   `json:"receipts_before"` // receipts of before are dropped
}

// Hold sets a legal hold.
type Hold struct {
	Reason string `json:"reason" maxLength:"500" doc:"it goes into the audit log"`
}

// Receipt is the minimal record of a signed payment.
type Receipt struct {
	ID         string `json:"id"`
	TimeMS     int64  `json:"time_ms"`
	Commitment string `json:"commitment"` // hex
	Method     string `json:"method"`
	Status     string `json:"status"`
	Event      uint64 `json:"event"`
}

// Ledger says how large the ledger is, in bytes where nothing else is said.
type Ledger struct {
	FileSize    int64  `json:"file_size"`
	FreeBytes   int64  `json:"free_bytes"`
	Events      uint64 `json:"events"`
	FirstEvent  uint64 `json:"first_event"`
	Epochs      int    `json:"epochs"`
	Nonces      int    `json:"nonces"`
	MaxNonces   int    `json:"max_nonces"`
	Time        int64  `json:"time"`         // of the ledger, Unix seconds
	BehindClock int64  `json:"behind_clock"` // seconds that it is behind the system's clock
	Trouble     string `json:"trouble,omitempty"`
}

// Compacted says what a compaction has done.
type Compacted struct {
	Before int64 `json:"before"`
	After  int64 `json:"after"`
	TookMS int64 `json:"took_ms"` // for which nothing was admitted
}

func (c *Client) CreateKey(ctx context.Context, n NewKey) (k Key, err error) {
	return k, c.do(ctx, http.MethodPost, "/v1/keys", n, &k)
}

func (c *Client) Tokens(ctx context.Context) (tokens []Token, err error) {
	return tokens, c.do(ctx, http.MethodGet, "/v1/tokens", nil, &tokens)
}

// RetryToken lets a token be asked for a login again after its PIN was refused.
func (c *Client) RetryToken(ctx context.Context, name string) error {
	return c.do(ctx, http.MethodPost, "/v1/tokens/"+url.PathEscape(name)+"/retry", nil, nil)
}

func (c *Client) Keys(ctx context.Context) (keys []Key, err error) {
	return keys, c.do(ctx, http.MethodGet, "/v1/keys", nil, &keys)
}

// Key returns all versions of a key.
func (c *Client) Key(ctx context.Context, name string) (versions []Key, err error) {
	return versions, c.do(ctx, http.MethodGet, "/v1/keys/"+url.PathEscape(name), nil, &versions)
}

// NoiseKey returns the key that the listener answers handshakes with.
func (c *Client) NoiseKey(ctx context.Context) (k Key, err error) {
	return k, c.do(ctx, http.MethodGet, "/v1/noise-key", nil, &k)
}

func (c *Client) Rollback(ctx context.Context) (r Rollback, err error) {
	return r, c.do(ctx, http.MethodGet, "/v1/rollback", nil, &r)
}

func (c *Client) Peers(ctx context.Context) (peers []Peer, err error) {
	return peers, c.do(ctx, http.MethodGet, "/v1/peers", nil, &peers)
}

func (c *Client) RemovePeer(ctx context.Context, name string) error {
	return c.do(ctx, http.MethodDelete, "/v1/peers/"+url.PathEscape(name), nil, nil)
}

// SuspendPeer keeps a peer out until ResumePeer.
func (c *Client) SuspendPeer(ctx context.Context, name string) error {
	return c.do(ctx, http.MethodPost, "/v1/peers/"+url.PathEscape(name)+"/suspend", nil, nil)
}

func (c *Client) ResumePeer(ctx context.Context, name string) error {
	return c.do(ctx, http.MethodPost, "/v1/peers/"+url.PathEscape(name)+"/resume", nil, nil)
}

// Policies lists the versions without their texts, the oldest first; the last one is in force.
func (c *Client) Policies(ctx context.Context) (all []Policy, err error) {
	return all, c.do(ctx, http.MethodGet, "/v1/policies", nil, &all)
}

// Policy returns a version with its text.
func (c *Client) Policy(ctx context.Context, version uint64) (p Policy, err error) {
	return p, c.do(ctx, http.MethodGet, "/v1/policies/"+strconv.FormatUint(version, 10), nil, &p)
}

// Decision returns what policy decided in an event.
func (c *Client) Decision(ctx context.Context, event uint64) (d Decision, err error) {
	return d, c.do(ctx, http.MethodGet, "/v1/decisions/"+strconv.FormatUint(event, 10), nil, &d)
}

// Decisions returns decisions from an event and a time (Unix milliseconds) on, as many as fit into an answer; none: there are no more.
func (c *Client) Decisions(ctx context.Context, from uint64, sinceMS int64) (found []Decision, err error) {
	q := url.Values{"from": {strconv.FormatUint(from, 10)}, "since": {strconv.FormatInt(sinceMS, 10)}}
	return found, c.do(ctx, http.MethodGet, "/v1/decisions?"+q.Encode(), nil, &found)
}

// Events returns at most limit events from index from on, as far as they are on disk.
func (c *Client) Events(ctx context.Context, from uint64, limit int) (events []Event, err error) {
	q := url.Values{"from": {strconv.FormatUint(from, 10)}, "limit": {strconv.Itoa(limit)}}
	return events, c.do(ctx, http.MethodGet, "/v1/events?"+q.Encode(), nil, &events)
}

// Log names the audit log.
func (c *Client) Log(ctx context.Context) (l Log, err error) {
	return l, c.do(ctx, http.MethodGet, "/v1/log", nil, &l)
}

// EndEpoch ends the present epoch of the audit log; it returns the next one.
func (c *Client) EndEpoch(ctx context.Context) (l Log, err error) {
	return l, c.do(ctx, http.MethodPost, "/v1/log/epochs", nil, &l)
}

func (c *Client) Retention(ctx context.Context) (r Retention, err error) {
	return r, c.do(ctx, http.MethodGet, "/v1/retention", nil, &r)
}

// Hold keeps an epoch from being dropped.
func (c *Client) Hold(ctx context.Context, epoch uint32, reason string) error {
	return c.do(ctx, http.MethodPost, fmt.Sprintf("/v1/log/epochs/%d/hold", epoch), Hold{reason}, nil)
}

func (c *Client) Receipt(ctx context.Context, id string) (r Receipt, err error) {
	return r, c.do(ctx, http.MethodGet, "/v1/receipts/"+url.PathEscape(id), nil, &r)
}

// Receipts returns at most limit receipts from a time up to before another (0: no end), both in Unix milliseconds. Where there
// were more, the next ones come from the last one's time on, after its id.
func (c *Client) Receipts(ctx context.Context, from, to int64, after string, limit int) (found []Receipt, err error) {
	q := url.Values{"from": {strconv.FormatInt(from, 10)}, "to": {strconv.FormatInt(to, 10)}, "after": {after}, "limit": {strconv.Itoa(limit)}}
	return found, c.do(ctx, http.MethodGet, "/v1/receipts?"+q.Encode(), nil, &found)
}

func (c *Client) Ledger(ctx context.Context) (l Ledger, err error) {
	return l, c.do(ctx, http.MethodGet, "/v1/ledger", nil, &l)
}

// Compact gives the ledger's free space back. Nothing is admitted meanwhile.
func (c *Client) Compact(ctx context.Context) (done Compacted, err error) {
	return done, c.do(ctx, http.MethodPost, "/v1/ledger/compact", nil, &done)
}
