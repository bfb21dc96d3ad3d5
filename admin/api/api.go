// Package api has the documents of the local admin API, and a client for the Unix socket and for
// HTTPS. Operators' tools need no other package. Package admin is the server, and
// admin/openapi.json describes the whole API. Begin reading at Client.
package api

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"

	"countersign/audit"
	"countersign/wire"
)

// Key is one version of a key. PublicKey is hex. Package wire has the values of State
// (wire.StateActive and so on) that peers see too.
type Key struct {
	Name      string `json:"name"`
	Version   uint32 `json:"version"`
	Algorithm string `json:"algorithm"`
	State     string `json:"state"`
	// Compromised stays set for ever, also when the version is destroyed.
	Compromised bool   `json:"compromised,omitempty"`
	Custody     string `json:"custody"`
	Token       string `json:"token"`
	PublicKey   string `json:"public_key"`
	// Origin is generated, imported or unreported. Provenance is the device's statement at the
	// creation of the key.
	Origin     string     `json:"origin"`
	Provenance Provenance `json:"provenance"`
	Created    int64      `json:"created"` // Unix seconds, like the next two; 0: none
	Activates  int64      `json:"activates" doc:"when it becomes active, or has"`
	Retires    int64      `json:"retires" doc:"verify-only: when it is archived at the latest; archived: when it was"`
	Uses       uint64     `json:"uses" doc:"signatures that it has made"`
	// Next is SHA-256 of the public key of the next version, hex. The line of keys is committed to
	// it.
	Next string `json:"next,omitempty"`
	// Own marks a key of the appliance, with which no peer can have anything signed.
	Own bool `json:"own" doc:"the appliance's: no peer can have anything signed with it"`
	// Recovery marks a recovery successor and the version after it, until the line is recovered.
	Recovery bool `json:"recovery,omitempty" doc:"of the recovery successor, which is for the loss of the token"`
	// Authorization is the identity key's signature for a Noise key.
	Authorization *wire.Authorization `json:"authorization,omitempty"`
}

// Provenance is a device's statement about the past of a key. A key is generated if the first three
// fields are true.
type Provenance struct {
	Local            bool `json:"local"`             // made inside the device (CKA_LOCAL)
	AlwaysSensitive  bool `json:"always_sensitive"`  // was never readable (CKA_ALWAYS_SENSITIVE)
	NeverExtractable bool `json:"never_extractable"` // was never extractable (CKA_NEVER_EXTRACTABLE)
	// Unreported marks a key that the device has made, and of which it does not say so.
	Unreported bool `json:"unreported,omitempty"`
}

// Token is the state of a token.
type Token struct {
	Name    string   `json:"name"`
	Up      bool     `json:"up"`
	Cause   string   `json:"cause,omitempty"` // of an outage
	Workers []Worker `json:"workers"`         // processes that use the token
}

// TokenDetails is a token with what its device says of itself at this moment.
type TokenDetails struct {
	Token
	Findings []Finding `json:"findings" doc:"empty while the device does not answer"`
}

// Finding is one line of what a device says of itself: its model, its mechanisms, and of a TPM the
// registers (PCRs) that keys are sealed to.
type Finding struct {
	What string `json:"what" doc:"measured: a register of a TPM, compared with its value at the time of sealing"`
	For  string `json:"for,omitempty" doc:"the algorithm concerned"`
	OK   bool   `json:"ok" doc:"false: missing, not working, or another value than sealed"`
	Text string `json:"text"`
}

// Worker is the state of a key worker: a process that uses a token.
type Worker struct {
	PID      int    `json:"pid"`      // 0: no process now
	Served   uint64 `json:"served"`   // calls answered by this process
	Restarts int    `json:"restarts"` // processes replaced so far
}

// Peer is an enrolled client of the listener.
type Peer struct {
	Name        string    `json:"name"`
	Keys        []PeerKey `json:"keys"`
	Added       int64     `json:"added"` // Unix seconds
	Suspended   bool      `json:"suspended"`
	LastSeen    int64     `json:"last_seen"`   // Unix seconds; 0: never
	Connections int       `json:"connections"` // open connections
	// UsedBytes and UsedRefusalBytes count against the limits bytes_per_day and
	// refusal_bytes_per_day of the peer.
	UsedBytes        int64 `json:"used_bytes" doc:"of its bytes_per_day: not refilled yet"`
	UsedRefusalBytes int64 `json:"used_refusal_bytes" doc:"of its refusal_bytes_per_day: not refilled yet"`
}

// PeerActivity has the answers to a peer in each of the last 60 minutes, since the daemon's start
// at the most. The present minute is the last one.
type PeerActivity struct {
	Name          string   `json:"name"`
	Since         int64    `json:"since" doc:"the begin of the first minute, Unix seconds"`
	Signatures    []uint32 `json:"signatures"`
	Verifications []uint32 `json:"verifications"`
	Refused       []uint32 `json:"refused"`
	Others        []uint32 `json:"others" doc:"answers to other operations"`
}

// PeerKey is a Noise static key of a peer.
type PeerKey struct {
	PublicKey   string `json:"public_key"`  // hex
	Added       int64  `json:"added"`       // Unix seconds
	LastSeen    int64  `json:"last_seen"`   // Unix seconds; 0: never
	Connections int    `json:"connections"` // open connections with this key
}

// Policy is a present or past version of the policy. A list of versions has no texts.
type Policy struct {
	Version   uint64 `json:"version"`
	SHA256    string `json:"sha256"`
	Activated int64  `json:"activated"` // Unix seconds
	Text      string `json:"text,omitempty"`
}

// Group is a group of peers or of keys. A list of groups has no members.
type Group struct {
	Name    string   `json:"name"`
	Of      string   `json:"of"`      // peers or keys
	Size    int      `json:"size"`    // number of members
	SHA256  string   `json:"sha256"`  // of the members in order, with commas in between
	Changed int64    `json:"changed"` // Unix seconds
	Members []string `json:"members,omitempty"`
}

// Decision is the decision of the policy in an event. Record is policy.Record in JSON, byte for
// byte: the event has its SHA-256.
type Decision struct {
	Event  uint64 `json:"event"`
	Record string `json:"record"`
}

// Event is an entry of the audit log with its index.
type Event struct {
	Index uint64 `json:"index"`
	audit.Event
}

// EventProof proves that an event is in the audit log. Hashes are hex.
type EventProof struct {
	Event uint64   `json:"event"`
	Epoch uint32   `json:"epoch" doc:"of the log; each epoch has a Merkle tree"`
	Index uint64   `json:"index" doc:"of the leaf in that tree"`
	Leaf  string   `json:"leaf" doc:"the event as the log has it, byte for byte"`
	Path  []string `json:"path" doc:"hashes from the leaf to the root"`
	// Checkpoint is the signed tree head (C2SP tlog-checkpoint).
	Checkpoint string `json:"checkpoint"`
	// Consistency proves that the tree continues the tree of the leaves that the caller has seen
	// (RFC 6962 section 2.1.2).
	Consistency []string `json:"consistency" doc:"hashes from the tree that the caller has seen; empty without one"`
}

// NewKey asks for a new key.
type NewKey struct {
	Name      string `json:"name" maxLength:"64" doc:"of the line of keys: lower-case letters, digits and -"`
	Algorithm string `json:"algorithm,omitempty" enum:"ed25519,p256" doc:"ed25519 where it is left out"`
	Token     string `json:"token,omitempty" maxLength:"64" doc:"may be left out where there is only one"`
	SeedFile  string `json:"seed_file,omitempty" maxLength:"4096" doc:"import: an absolute path on the appliance"`

	Recoverable bool `json:"recoverable,omitempty" doc:"seal a copy of all versions for the recovery holders"`
}

// Rollback reports whether the ledger is older than the monotonic counter of its device.
type Rollback struct {
	Detected bool   `json:"detected"`
	Token    string `json:"token,omitempty"`  // with the ledger's counter; "": nothing would detect a rollback
	Unread   string `json:"unread,omitempty"` // why the ledger has not been compared with its counter
	Reason   string `json:"reason,omitempty"`
	Ledger   uint64 `json:"ledger"`  // the counter's value in the ledger
	Counter  uint64 `json:"counter"` // the counter's value in the device
	At       int64  `json:"at"`      // time of the detection, Unix seconds
}

// Log has the names of the audit log and the keys that verify its signatures.
type Log struct {
	Epoch       uint32 `json:"epoch"`
	VerifierKey string `json:"verifier_key"` // of the epoch, in the form of C2SP signed-note
	WebhookKey  string `json:"webhook_key"`  // the same key, in the form of Standard Webhooks
}

// Epoch is a part of the audit log with a Merkle tree of its own. Times are Unix seconds; 0: none.
type Epoch struct {
	Epoch      uint32 `json:"epoch"`
	First      uint64 `json:"first"` // number of its first event
	Size       uint64 `json:"size"`  // events
	Begun      int64  `json:"begun"`
	Ended      int64  `json:"ended"`
	Due        int64  `json:"due"`        // end of retention: the epoch may be dropped
	Dropped    int64  `json:"dropped"`    // time of the drop
	Holds      []Hold `json:"holds"`      // legal holds, by name
	Checkpoint uint64 `json:"checkpoint"` // events that the newest signed checkpoint covers
}

// Retention is the schedule of retention.
type Retention struct {
	Epochs         []Epoch `json:"epochs"`
	ReceiptsBefore int64   `json:"receipts_before"` // Unix seconds; older receipts are dropped
}

// Hold is a legal hold on an epoch.
type Hold struct {
	Name   string `json:"name" maxLength:"64" doc:"lower-case letters, digits and hyphens, for example case-4711"`
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

// Sink is a receiver of the events of the audit log.
type Sink struct {
	Name    string `json:"name"`
	Kind    string `json:"kind" doc:"syslog, file or webhook"`
	Next    uint64 `json:"next" doc:"number of the next event; the receiver has those before, or there is a gap"`
	Behind  uint64 `json:"behind" doc:"events that wait"`
	Sent    uint64 `json:"sent"`
	Dropped uint64 `json:"dropped" doc:"events of all gaps"`
	Gaps    []Gap  `json:"gaps" doc:"the newest ones"`
	Failing string `json:"failing,omitempty" doc:"why the last attempt failed"`
}

// Gap is a range of events that a sink has not sent: from <= number < before. GET /v1/events has
// the events until retention drops them.
type Gap struct {
	From   uint64 `json:"from"`
	Before uint64 `json:"before"`
	Why    string `json:"why" doc:"too_old, or dropped by retention"`
}

// Ledger has the sizes and the clock of the ledger.
type Ledger struct {
	FileSize    int64  `json:"file_size"`  // bytes
	FreeBytes   int64  `json:"free_bytes"` // in the file
	Events      uint64 `json:"events"`
	FirstEvent  uint64 `json:"first_event"`
	Epochs      int    `json:"epochs"`
	Nonces      int    `json:"nonces"`
	MaxNonces   int    `json:"max_nonces"`
	Time        int64  `json:"time"`         // of the ledger, Unix seconds
	BehindClock int64  `json:"behind_clock"` // seconds from Time to the system's clock
	Trouble     string `json:"trouble,omitempty"`
	Checkpoint  int64  `json:"checkpoint" doc:"when the last checkpoint was signed, or the daemon was started"`
}

// Compacted is the result of a compaction.
type Compacted struct {
	Before int64 `json:"before"`  // bytes
	After  int64 `json:"after"`   // bytes
	TookMS int64 `json:"took_ms"` // the ledger admitted no request for this time
}

// Backup is a backup in the folder of the configuration.
type Backup struct {
	Name string `json:"name"`
	Size int64  `json:"size"` // bytes
	Made int64  `json:"made"` // Unix seconds

	// Total is the number of bytes to copy, of a backup that is being made. Size has those copied.
	// A backup that is whole has no Total.
	Total int64 `json:"total,omitempty"`

	// Mirrored says whether the SFTP server has the file: "yes", "no", "sending", or "unknown"
	// before the server was reached for the first time. Absent without a server.
	Mirrored string `json:"mirrored,omitempty" enum:"yes,no,sending,unknown"`
}

// MadeBackup is a backup that was just made.
type MadeBackup struct {
	Backup
	Epoch  uint32 `json:"epoch"`   // of the audit log
	Events uint64 `json:"events"`  // in the log of the backup, the dropped ones too
	Files  int    `json:"files"`   // inside, the ledger included
	Event  uint64 `json:"event"`   // number of the event BackupMade, which proves the backup
	TookMS int64  `json:"took_ms"` // from the reading of the ledger to the name of the file
}

// PruneBackups asks for the removal of the backups that the configuration does not keep.
type PruneBackups struct {
	Dry bool `json:"dry,omitempty" doc:"remove nothing"`
}

// CreateBackup makes a backup. The appliance serves meanwhile.
func (c *Client) CreateBackup(ctx context.Context) (made MadeBackup, err error) {
	return made, c.do(ctx, http.MethodPost, "/v1/backups", nil, &made)
}

// Backups lists the backups in the folder, the oldest first.
func (c *Client) Backups(ctx context.Context) ([]Backup, error) {
	return list[Backup](ctx, c, "/v1/backups")
}

// Drill is the report of a drill, which has restored a backup where nobody can reach the result.
type Drill struct {
	Backup   string   `json:"backup" maxLength:"200" doc:"the file; empty: none could be found"`
	SHA256   string   `json:"sha256" maxLength:"64" doc:"of the backup's manifest (hex)"`
	Event    uint64   `json:"event" doc:"the number of the event BackupMade, by the proof in the backup"`
	Epoch    uint32   `json:"epoch" doc:"of the tree that the drill has verified, as the manifest names it"`
	Size     uint64   `json:"size" doc:"of that tree"`
	Root     string   `json:"root" maxLength:"64" doc:"of that tree (base64)"`
	Began    int64    `json:"began" doc:"when the drill began, Unix seconds"`
	End      uint64   `json:"end" doc:"events in the ledger with the lists of writes, the dropped ones too"`
	Reached  int64    `json:"reached" doc:"what the ledger reaches with the lists of writes, Unix seconds"`
	Proven   []string `json:"proven" maxItems:"30" doc:"what the drill has shown"`
	Unproven []string `json:"unproven" maxItems:"30" doc:"what it could not show, and why"`
	Failure  string   `json:"failure,omitempty" maxLength:"500" doc:"why the backup is not good"`

	Holders []string `json:"holders,omitempty" maxItems:"100" doc:"with holders: those who gave their shares"`
	Keys    []string `json:"keys,omitempty" maxItems:"20000" doc:"with holders: the versions that came back and signed"`
}

// Drills is the last drill, with its time and that of the last good one. Times are Unix seconds; 0:
// none.
type Drills struct {
	Last   *Drill `json:"last,omitempty"`
	At     int64  `json:"at"`
	Proven int64  `json:"proven"`
}

// Holders are the recovery holders of keys that are made from now on. Number is 0 where there are
// none.
type Holders struct {
	Number  uint32   `json:"number" doc:"of the set; each change makes another one"`
	Needed  int      `json:"needed" doc:"holders who together can bring a key back"`
	Holders []Holder `json:"holders"`
	Keys    []string `json:"keys" doc:"the versions of keys that holders can bring back, of this set or an earlier one"`
	Proven  int64    `json:"proven" doc:"the last good drill with holders, Unix seconds; 0: none"`
}

// Holder is a person with shares of keys.
type Holder struct {
	Name        string `json:"name"`
	Recipient   string `json:"recipient" doc:"age1..., or an SSH public key"`
	Fingerprint string `json:"fingerprint" doc:"age1..., or the type and fingerprint of an SSH key"`
}

// Holders returns the present recovery holders.
func (c *Client) Holders(ctx context.Context) (h Holders, err error) {
	return h, c.do(ctx, http.MethodGet, "/v1/holders", nil, &h)
}

// LastDrill returns the last drill.
func (c *Client) LastDrill(ctx context.Context) (d Drills, err error) {
	return d, c.do(ctx, http.MethodGet, "/v1/drills", nil, &d)
}

// Drilled reports a drill: for root, or the daemon's user, on the Unix socket. The answer has a
// Failure where the log of today does not continue the log of the backup.
func (c *Client) Drilled(ctx context.Context, d Drill) (result Drill, err error) {
	return result, c.do(ctx, http.MethodPost, "/v1/drills", d, &result)
}

// GetBackup writes the file of a backup, which only its recipients can read. An error means that w
// has a part of the file.
func (c *Client) GetBackup(ctx context.Context, name string, w io.Writer) error {
	resp, err := c.send(ctx, http.MethodGet, "/v1/backups/"+url.PathEscape(name), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b, err := io.ReadAll(io.LimitReader(resp.Body, maxStreamed))
		if err != nil {
			return err
		}
		return refusal(resp, b)
	}
	n, err := io.Copy(w, resp.Body)
	if err == nil && n != resp.ContentLength {
		err = fmt.Errorf("the answer ended after %d of %d bytes", n, resp.ContentLength)
	}
	return err
}

// PruneBackups removes the backups that the configuration does not keep, and returns them.
func (c *Client) PruneBackups(ctx context.Context, p PruneBackups) (removed []Backup, err error) {
	return removed, c.do(ctx, http.MethodPost, "/v1/backups/prune", p, &removed)
}

// CreateKey creates or imports a key.
func (c *Client) CreateKey(ctx context.Context, n NewKey) (k Key, err error) {
	return k, c.do(ctx, http.MethodPost, "/v1/keys", n, &k)
}

// Tokens lists the tokens.
func (c *Client) Tokens(ctx context.Context) (tokens []Token, err error) {
	return tokens, c.do(ctx, http.MethodGet, "/v1/tokens", nil, &tokens)
}

// Token asks a token what it is.
func (c *Client) Token(ctx context.Context, name string) (t TokenDetails, err error) {
	return t, c.do(ctx, http.MethodGet, "/v1/tokens/"+url.PathEscape(name), nil, &t)
}

// RetryToken permits one more login to a token that has refused the PIN.
func (c *Client) RetryToken(ctx context.Context, name string) error {
	return c.do(ctx, http.MethodPost, "/v1/tokens/"+url.PathEscape(name)+"/retry", nil, nil)
}

// Keys lists all versions of all keys.
func (c *Client) Keys(ctx context.Context) ([]Key, error) {
	return list[Key](ctx, c, "/v1/keys")
}

// Key returns all versions of a key.
func (c *Client) Key(ctx context.Context, name string) ([]Key, error) {
	return list[Key](ctx, c, "/v1/keys/"+url.PathEscape(name))
}

// NoiseKey returns the listener's static key for handshakes.
func (c *Client) NoiseKey(ctx context.Context) (k Key, err error) {
	return k, c.do(ctx, http.MethodGet, "/v1/noise-key", nil, &k)
}

// Rollback reports whether the ledger was rolled back.
func (c *Client) Rollback(ctx context.Context) (r Rollback, err error) {
	return r, c.do(ctx, http.MethodGet, "/v1/rollback", nil, &r)
}

// Peers lists the enrolled peers.
func (c *Client) Peers(ctx context.Context) ([]Peer, error) {
	return list[Peer](ctx, c, "/v1/peers")
}

// Peer returns an enrolled peer.
func (c *Client) Peer(ctx context.Context, name string) (p Peer, err error) {
	return p, c.do(ctx, http.MethodGet, "/v1/peers/"+url.PathEscape(name), nil, &p)
}

// PeerActivity returns the answers to a peer in the last hour.
func (c *Client) PeerActivity(ctx context.Context, name string) (a PeerActivity, err error) {
	return a, c.do(ctx, http.MethodGet, "/v1/peers/"+url.PathEscape(name)+"/activity", nil, &a)
}

// Activity returns the peers with the most answers in the last hour, at most limit.
func (c *Client) Activity(ctx context.Context, limit int) (all []PeerActivity, err error) {
	return all, c.do(ctx, http.MethodGet, "/v1/activity?limit="+strconv.Itoa(limit), nil, &all)
}

// RemovePeerKey removes a key of a peer and closes the connections of the key. The last key ends
// with RemovePeer only.
func (c *Client) RemovePeerKey(ctx context.Context, name, publicKey string) error {
	return c.do(ctx, http.MethodDelete, "/v1/peers/"+url.PathEscape(name)+"/keys/"+url.PathEscape(publicKey), nil, nil)
}

// Groups lists the groups without their members.
func (c *Client) Groups(ctx context.Context) ([]Group, error) {
	return list[Group](ctx, c, "/v1/groups")
}

// Group returns a group with its members.
func (c *Client) Group(ctx context.Context, name string) (g Group, err error) {
	return g, c.do(ctx, http.MethodGet, "/v1/groups/"+url.PathEscape(name), nil, &g)
}

// RemovePeer removes a peer's enrolment and closes its connections.
func (c *Client) RemovePeer(ctx context.Context, name string) error {
	return c.do(ctx, http.MethodDelete, "/v1/peers/"+url.PathEscape(name), nil, nil)
}

// SuspendPeer refuses a peer until ResumePeer.
func (c *Client) SuspendPeer(ctx context.Context, name string) error {
	return c.do(ctx, http.MethodPost, "/v1/peers/"+url.PathEscape(name)+"/suspend", nil, nil)
}

// ResumePeer admits a suspended peer again.
func (c *Client) ResumePeer(ctx context.Context, name string) error {
	return c.do(ctx, http.MethodPost, "/v1/peers/"+url.PathEscape(name)+"/resume", nil, nil)
}

// EventProof proves that an event is in the audit log. seen is the number of leaves of the last
// checkpoint of the epoch that the caller has seen, or 0.
func (c *Client) EventProof(ctx context.Context, event, seen uint64) (p EventProof, err error) {
	return p, c.do(ctx, http.MethodGet, fmt.Sprintf("/v1/events/%d/proof?seen=%d", event, seen), nil, &p)
}

// Policies lists the versions of the policy without texts, the oldest first. The last one is in
// force.
func (c *Client) Policies(ctx context.Context) ([]Policy, error) {
	return list[Policy](ctx, c, "/v1/policies")
}

// Policy returns a version of the policy with its text.
func (c *Client) Policy(ctx context.Context, version uint64) (p Policy, err error) {
	return p, c.do(ctx, http.MethodGet, "/v1/policies/"+strconv.FormatUint(version, 10), nil, &p)
}

// Decision returns the decision of the policy in an event.
func (c *Client) Decision(ctx context.Context, event uint64) (d Decision, err error) {
	return d, c.do(ctx, http.MethodGet, "/v1/decisions/"+strconv.FormatUint(event, 10), nil, &d)
}

// Decisions returns a page of at most 1000 decisions and 1 MiB, from sinceMS on (Unix milliseconds
// of the ledger's time). after is the next of the page before, or ""; a next of "" is the end.
func (c *Client) Decisions(
	ctx context.Context, sinceMS int64, after string,
) (found []Decision, next string, err error) {
	q := url.Values{"since": {strconv.FormatInt(sinceMS, 10)}, "after": {after}}
	header, err := c.call(ctx, http.MethodGet, "/v1/decisions?"+q.Encode(), nil, &found)
	return found, header.Get(nextHeader), err
}

// EventQuery selects events of the audit log. An empty field selects all.
type EventQuery struct {
	From, Before uint64 // numbers of events: From <= number < Before; a Before of 0 is no end
	Newest       bool   // the newest event first
	Type         audit.Type
	Actor        string // name of a peer or operator
	Resource     string // for example payments/2, or payments for all of its versions
	Nonce        string // hex
	Digest       string // hex
	Admission    string // number of an admission: finds its outcome
	Request      string // id of a request; of a batch: finds the events of all items
	Since, Until int64  // Since <= time < Until, in Unix milliseconds; 0 is no bound
	Limit        int    // 1 to 1000; 0: 1000
	After        string // next of the page before
}

func (q EventQuery) values() url.Values {
	v := url.Values{}
	set := func(name, value string) {
		if value != "" && value != "0" {
			v.Set(name, value)
		}
	}
	set("from", strconv.FormatUint(q.From, 10))
	set("before", strconv.FormatUint(q.Before, 10))
	if q.Newest {
		set("order", "newest")
	}
	set("type", string(q.Type))
	set("actor", q.Actor)
	set("resource", q.Resource)
	set("nonce", q.Nonce)
	set("digest", q.Digest)
	set("admission", q.Admission)
	set("request", q.Request)
	set("since", strconv.FormatInt(q.Since, 10))
	set("until", strconv.FormatInt(q.Until, 10))
	set("limit", strconv.Itoa(q.Limit))
	if q.After != "" {
		v.Set("after", q.After) // 0 is a cursor
	}
	return v
}

// FindEvents returns a page of the events that a query selects, at most 1 MiB. A next of "" is the
// end.
func (c *Client) FindEvents(ctx context.Context, q EventQuery) (found []Event, next string, err error) {
	header, err := c.call(ctx, http.MethodGet, "/v1/events?"+q.values().Encode(), nil, &found)
	return found, header.Get(nextHeader), err
}

// Events returns at most limit events and 1 MiB, from the index from on. An empty list is the end.
func (c *Client) Events(ctx context.Context, from uint64, limit int) (events []Event, err error) {
	events, _, err = c.FindEvents(ctx, EventQuery{From: from, Limit: limit})
	return events, err
}

// Log returns the names and keys of the audit log.
func (c *Client) Log(ctx context.Context) (l Log, err error) {
	return l, c.do(ctx, http.MethodGet, "/v1/log", nil, &l)
}

// EndEpoch ends the present epoch of the audit log, and returns the log with the next epoch.
func (c *Client) EndEpoch(ctx context.Context) (l Log, err error) {
	return l, c.do(ctx, http.MethodPost, "/v1/log/epochs", nil, &l)
}

// Retention returns the epochs, and the times at which retention drops data.
func (c *Client) Retention(ctx context.Context) (r Retention, err error) {
	for after := ""; ; {
		var some Retention
		header, err := c.call(ctx, http.MethodGet, "/v1/retention?after="+url.QueryEscape(after), nil, &some)
		if err != nil {
			return r, err
		}
		r = Retention{append(r.Epochs, some.Epochs...), some.ReceiptsBefore}
		if after = header.Get(nextHeader); after == "" {
			return r, nil
		}
	}
}

// Hold sets a legal hold: retention does not drop the epoch.
func (c *Client) Hold(ctx context.Context, epoch uint32, name, reason string) error {
	return c.do(ctx, http.MethodPost, fmt.Sprintf("/v1/log/epochs/%d/holds", epoch), Hold{name, reason}, nil)
}

// Receipt returns a receipt.
func (c *Client) Receipt(ctx context.Context, id string) (r Receipt, err error) {
	return r, c.do(ctx, http.MethodGet, "/v1/receipts/"+url.PathEscape(id), nil, &r)
}

// Receipts returns a page of at most limit receipts with from <= time < to, in Unix milliseconds; a
// to of 0 is no limit. after is the next of the page before, or ""; a next of "" is the end.
func (c *Client) Receipts(
	ctx context.Context, from, to int64, after string, limit int,
) (found []Receipt, next string, err error) {
	q := url.Values{
		"from": {strconv.FormatInt(from, 10)}, "to": {strconv.FormatInt(to, 10)},
		"after": {after}, "limit": {strconv.Itoa(limit)},
	}
	header, err := c.call(ctx, http.MethodGet, "/v1/receipts?"+q.Encode(), nil, &found)
	return found, header.Get(nextHeader), err
}

// Sinks returns the sinks of the configuration.
func (c *Client) Sinks(ctx context.Context) (all []Sink, err error) {
	return all, c.do(ctx, http.MethodGet, "/v1/sinks", nil, &all)
}

// Statement returns the statement of completeness about the events with times since <= time <
// until, in Unix milliseconds, as JSON. An until of 0 is now.
func (c *Client) Statement(ctx context.Context, since, until int64) (b []byte, s audit.Statement, err error) {
	q := url.Values{"since": {strconv.FormatInt(since, 10)}, "until": {strconv.FormatInt(until, 10)}}
	if b, _, err = c.page(ctx, "v1/report/statement", q); err == nil {
		err = json.Unmarshal(b, &s)
	}
	return b, s, err
}

// EventRows writes the events of a statement as rows of a form.
func (c *Client) EventRows(ctx context.Context, s audit.Statement, form audit.Form, to io.Writer) error {
	return c.rows(ctx, "v1/report/events", url.Values{
		"form":  {string(form)},
		"first": {strconv.FormatUint(s.First, 10)}, "end": {strconv.FormatUint(s.End, 10)},
	}, to)
}

// ReceiptRows writes the receipts of a statement as rows of a form.
func (c *Client) ReceiptRows(ctx context.Context, s audit.Statement, form audit.Form, to io.Writer) error {
	return c.rows(ctx, "v1/report/receipts", url.Values{
		"form":  {string(form)},
		"since": {strconv.FormatInt(s.SinceMS, 10)}, "until": {strconv.FormatInt(s.UntilMS, 10)},
		"first": {strconv.FormatUint(s.First, 10)}, "end": {strconv.FormatUint(s.End, 10)},
	}, to)
}

// rows writes all pages of a listing of rows, one after the other.
func (c *Client) rows(ctx context.Context, name string, q url.Values, to io.Writer) error {
	for {
		b, next, err := c.page(ctx, name, q)
		if err != nil {
			return err
		}
		if _, err := to.Write(b); err != nil || next == "" {
			return err
		}
		q.Set("after", next)
	}
}

// Ledger returns the sizes and the clock of the ledger.
func (c *Client) Ledger(ctx context.Context) (l Ledger, err error) {
	return l, c.do(ctx, http.MethodGet, "/v1/ledger", nil, &l)
}

// Compact returns the free space of the ledger's file to the file system. The ledger admits no
// request meanwhile.
func (c *Client) Compact(ctx context.Context) (done Compacted, err error) {
	return done, c.do(ctx, http.MethodPost, "/v1/ledger/compact", nil, &done)
}
