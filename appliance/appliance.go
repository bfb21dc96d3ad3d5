// Package appliance is the daemon without its edges: it serves peers over Noise, signs and verifies for them, and is
// managed. Begin reading at Appliance.Sign in sign.go: it is the whole protocol on one screen.
//
// Errors have three classes, decided where they are born. Refused: the request is wrong or not allowed; a stable code
// says why. Unavailable: a device or the disk does not answer in time; the same request may be sent again. Fatal: the
// ledger's state is unknown; the daemon stops, and starting again is the recovery. refuse.go translates them, once.
package appliance

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"countersign/audit"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/limit"
	"countersign/internal/webhook"
	"countersign/policy"

	"golang.org/x/time/rate"
)

// Limits bounds what peers and strangers can cost. Every field must be set; cmd/countersignd documents them and has the defaults.
type Limits struct {
	Connections          int // open at once, handshakes included
	Strangers            int // of them, those that have proven nothing and come from where nobody has proven anything
	ConnectionsPerSource int
	ConnectionsPerPeer   int
	InFlight             int // requests of one connection that are being served at once
	Requests             int // being served at once in all, the items of a batch one by one
	RequestsPerPeer      int
	RequestsPerSecond    int // of one peer
	RefusalsPerMinute    int // of one peer that are written down one by one; the others are counted
	BatchItems           int
	Calls                map[string]int // of each token at once
	Handshakes           limit.Config

	HandshakeTimeout time.Duration // for the handshake, and again for the first request
	ReadTimeout      time.Duration // for a request, from its first byte to its last
	IdleTimeout      time.Duration // without a request on a connection
	WriteTimeout     time.Duration // for one answer
	RequestTimeout   time.Duration // for one request, the device's time included; and for writing down how it ended
	ClockSkew        time.Duration // how far a document's timestamp may lie in the future
	MaxLifetime      time.Duration // of a document: expires_at - timestamp
}

// DefaultLimits are the limits of an appliance that is configured for nothing else. Calls is not set: it depends on the tokens.
func DefaultLimits() Limits {
	return Limits{
		Connections: 1024, Strangers: 512, ConnectionsPerSource: 256, ConnectionsPerPeer: 128,
		InFlight: 64, Requests: 1024, RequestsPerPeer: 256, RequestsPerSecond: 10_000, RefusalsPerMinute: 600, BatchItems: 100,
		Handshakes:       limit.Config{PerSource: 5, Global: 100, Kept: 25, Window: time.Minute, GoodFor: 24 * time.Hour, Sources: 100_000, Waiting: 256},
		HandshakeTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, IdleTimeout: 5 * time.Minute, WriteTimeout: 10 * time.Second,
		RequestTimeout: 15 * time.Second, ClockSkew: 30 * time.Second, MaxLifetime: 7 * 24 * time.Hour,
	}
}

// Config says how an appliance is.
type Config struct {
	Limits    Limits
	Anchor    Anchor
	Retention Retention
	Attended  bool   // each start waits for an operator to unlock it
	Identity  string // the signing key that authorises the Noise key; "": none
	Webhooks  []webhook.Target
}

// Appliance is safe for concurrent use.
type Appliance struct {
	limits   Limits
	anchor   Anchor
	attended bool
	identity string
	ledger   *ledger.Ledger
	tokens   map[string]keystore.Store
	rules    atomic.Pointer[rules] // in force
	locked   atomic.Pointer[Lock]  // nil: it is not
	log      *slog.Logger

	anchored bool // the ledger has been held against its counter; of Start, then of Serve, then of Stop

	retention  Retention // under mu
	configured Retention // what the configuration says of it
	webhooks   []webhook.Target
	written    usesRecord     // as it is on disk; of New, then of keepLog, then of Stop
	signing    lock           // held while a checkpoint is signed
	refusals   tally          // of what is too many to be written down one by one
	failing    rate.Sometimes // handshakes, for a reason of ours: for the log
	handshakes *limit.Handshakes
	places     *limit.Connections
	turns      map[string]*limit.Fair // by token
	creating   lock                   // held while keys change, however long the device takes
	locking    lock                   // held while the appliance is locked or unlocked
	enrolling  lock                   // held while a peer is added or removed
	activating lock                   // held while a policy is put in force

	mu             sync.RWMutex
	keys           map[keystore.Ref]*Key       // under mu: all versions that exist on the keystore
	byPublic       map[[32]byte][]keystore.Ref // under mu: the Ed25519 keys, by public key
	active         map[string]*Key             // under mu: the version that signs, by name
	peers          map[[32]byte]*member        // under mu
	requests       int                         // under mu: being served
	sessions       map[*session]struct{}       // under mu
	closed         [closings]error             // under mu: why nothing is admitted
	lines          map[string]Line             // under mu: settings of keys
	confirmed      map[string]time.Time        // under mu: until when an operator's confirmation lets a key sign
	credentials    uint64                      // under mu: how often operators' credentials have changed
	retries        map[string]retry            // under mu: rotations that have failed
	lost           map[keystore.Ref]string     // under mu: what is to be used and is not on its token
	news           []announcement              // under mu: what peers are told; nil: to be made anew
	policyWaits    string                      // under mu: the policy file is another than what is in force
	policyBroken   string                      // under mu: the policy file can not be used
	retentionWaits string                      // under mu: the configuration would keep something for a shorter time
	hooks          []func()                    // called when there may be news for peers
}

// Peer is who asks: an enrolled client.
type Peer struct {
	Name      string
	PublicKey [32]byte       // its Noise static key
	Added     time.Time      // when it was enrolled
	quiet     bool           // its refusals are counted, not written down one by one, nor is that the same request has failed again
	member    *ledger.Member // of the batch that the request is an item of; nil: of none
	Identity  string         // hex of the Ed25519 key that it has proven to be bound to in this session; "" in countersign-v1
}

func (p Peer) actor() audit.Actor {
	actor := audit.Peer(p.Name, p.PublicKey)
	actor.Identity = p.Identity
	return actor
}

// lock is a mutex that a context can give up waiting for.
type lock chan struct{}

func (l lock) acquire(ctx context.Context) error {
	select {
	case l <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%w: another act of management is not done yet: %w", keystore.ErrUnavailable, ctx.Err())
	}
}

func (l lock) release() { <-l }

// act runs an act of management to its end, whether its caller waits or not: what was handed to the ledger or the device
// may be carried out, and memory has to say the same. l is held until then. When ctx ends first, the act goes on, and the
// caller is told so.
func (a *Appliance) act(ctx context.Context, l lock, what string, do func(context.Context) error) error {
	if err := l.acquire(ctx); err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		defer l.release()
		err := do(context.WithoutCancel(ctx))
		if err != nil && ctx.Err() != nil {
			a.log.Error("an act of management whose caller has left failed", "act", what, "err", err)
		}
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("%s: %w: it goes on; look later how it ended", what, keystore.ErrUnavailable)
	}
}

// New puts an appliance together. It reads keys and peers from the ledger and holds each key against its token: one that
// is missing, ambiguous or another is an error, since serving without it would be a silent loss. A token that does not
// answer costs its own keys only, for now, unless the listener's key is on it. New changes nothing.
func New(ctx context.Context, c Config, l *ledger.Ledger, tokens map[string]keystore.Store, p *policy.Policy, log *slog.Logger) (*Appliance, error) {
	limits := c.Limits
	a := &Appliance{
		limits: limits, anchor: c.Anchor, retention: c.Retention, configured: c.Retention, attended: c.Attended, identity: c.Identity, webhooks: c.Webhooks, ledger: l, tokens: tokens, log: log,
		signing: make(lock, 1), creating: make(lock, 1), locking: make(lock, 1), enrolling: make(lock, 1), activating: make(lock, 1),
		lines: map[string]Line{}, confirmed: map[string]time.Time{}, retries: map[string]retry{}, lost: map[keystore.Ref]string{},
		keys: map[keystore.Ref]*Key{}, byPublic: map[[32]byte][]keystore.Ref{}, active: map[string]*Key{}, peers: map[[32]byte]*member{}, sessions: map[*session]struct{}{},
	}
	a.failing.Interval = time.Second
	a.handshakes = limit.NewHandshakes(limits.Handshakes)
	a.places = limit.NewConnections(limits.Connections, limits.ConnectionsPerSource, limits.Strangers)
	a.turns = newTurns(limits.Calls, tokens)
	a.rules.Store(&rules{Policy: p}) // Start gives it its version
	if err := a.loadPeers(); err != nil {
		return nil, err
	}
	if err := a.loadLines(); err != nil {
		return nil, err
	}
	if err := a.loadKeys(ctx); err != nil {
		return nil, err
	}
	return a, nil
}

// Ready holds an appliance against what serving needs.
func (a *Appliance) Ready() error {
	if _, err := a.Key(NoiseName); err != nil { // that none is active now, after a compromise, is what serving puts right
		return errors.New("the listener has no Noise key: run countersignd init")
	}
	if _, err := a.LogKey(); err != nil {
		return errors.New("the audit log has no key: run countersignd init")
	}
	return nil
}

// Alive returns when the ledger's writer has come round: what a watchdog wants to know.
func (a *Appliance) Alive(ctx context.Context) error { return a.ledger.Alive(ctx) }

// record writes an event down and waits until it is on disk.
func (a *Appliance) record(ctx context.Context, e audit.Event) error {
	_, err := a.ledger.Append(ctx, entry(e))
	return err
}

// entry is an event of now, as the ledger takes it.
func entry(e audit.Event) ledger.Event { return ledger.NewEvent(e.Encode(time.Now())) }

// member returns an enrolled peer that is not kept out.
func (a *Appliance) member(publicKey [32]byte) (*member, bool) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	m := a.peers[publicKey]
	return m, m != nil && m.in()
}
