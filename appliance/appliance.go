// Package appliance is the daemon without its edges: it serves peers over Noise, signs and verifies for
// them, and keeps the log. Begin reading at Appliance.Sign in sign.go: it is the whole protocol on one
// screen. Keys live in package keyring, enrolled peers in package peers.
//
// Errors have three classes, decided where the error is made. Refused: the request is wrong or not
// allowed; a stable code says why. Unavailable: a device or the disk does not answer in time; the same
// request may be sent again. Fatal: the ledger's state is unknown; the daemon stops, and starting again
// is the recovery. refuse.go translates them, once.
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
	"countersign/internal/anchor"
	"countersign/internal/gate"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/limit"
	"countersign/internal/manage"
	"countersign/internal/peers"
	"countersign/internal/resource"
	"countersign/internal/webhook"
	"countersign/policy"

	"golang.org/x/time/rate"
)

// Limits bounds what peers and strangers can cost. Every field must be set; cmd/countersignd documents
// them and has the defaults.
type Limits struct {
	Connections          int // open at once, handshakes included
	Strangers            int // of them: unproven connections from addresses that no peer has connected from
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
	RequestTimeout   time.Duration // for one request, the device's time included; and for recording its outcome
	ClockSkew        time.Duration // how far a document's timestamp may lie in the future
	MaxLifetime      time.Duration // of a document: expires_at - timestamp
}

// DefaultLimits are the limits of an appliance without a configuration of its own. Calls is not set: it
// depends on the tokens.
func DefaultLimits() Limits {
	return Limits{
		Connections: 1024, Strangers: 512, ConnectionsPerSource: 256, ConnectionsPerPeer: 128,
		InFlight: 64, Requests: 1024, RequestsPerPeer: 256, RequestsPerSecond: 10_000, RefusalsPerMinute: 600, BatchItems: 100,
		Handshakes: limit.Config{
			PerSource: 5, Global: 100, Kept: 25, Window: time.Minute, GoodFor: 24 * time.Hour, Sources: 100_000, Waiting: 256,
		},
		HandshakeTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, IdleTimeout: 5 * time.Minute,
		WriteTimeout: 10 * time.Second, RequestTimeout: 15 * time.Second,
		ClockSkew: 30 * time.Second, MaxLifetime: 7 * 24 * time.Hour,
	}
}

// Config is the configuration of an appliance.
type Config struct {
	Limits    Limits
	Anchor    anchor.Config
	Retention Retention
	Attended  bool   // each start waits for an operator to unlock it
	Identity  string // the signing key that authorises the Noise key; "": none
	Webhooks  []webhook.Target
	// Monitor, if set, knows already of tokens that have gone away.
	Monitor *resource.Monitor
}

// Appliance is safe for concurrent use.
type Appliance struct {
	Keys   *keyring.Ring
	Peers  *peers.Registry
	Anchor *anchor.Anchor

	limits   Limits
	attended bool
	webhooks []webhook.Target
	ledger   *ledger.Ledger
	tokens   manage.Tokens
	gate     *gate.Gate
	monitor  *resource.Monitor
	log      *slog.Logger

	policies   policies
	locked     atomic.Pointer[Lock] // nil: it is not
	refusals   tally                // of what is too many to be written down one by one
	failing    rate.Sometimes       // lines in the log about handshakes that fail because of the device
	handshakes *limit.Handshakes
	places     *limit.Connections

	signing   manage.Lock // held while a checkpoint is signed
	locking   manage.Lock // held while the appliance is locked or unlocked
	retaining manage.Lock // held while the retention changes

	// mu guards the retention, which the ledger's writer changes when its record does.
	mu         sync.RWMutex
	retention  Retention // in force
	configured Retention // as the configuration says
	shorter    bool      // the configuration would keep something for a shorter time
}

// New puts an appliance together: it reads keys and peers from the ledger, and holds each key against
// its token, see keyring.Open. New changes nothing.
func New(
	ctx context.Context, c Config, l *ledger.Ledger, tokens map[string]keystore.Store, p *policy.Policy, log *slog.Logger,
) (a *Appliance, err error) {
	limits := c.Limits
	a = &Appliance{
		limits: limits, attended: c.Attended, webhooks: c.Webhooks, ledger: l, tokens: tokens, gate: gate.New(l),
		monitor: c.Monitor, log: log, policies: policies{ledger: l, log: log, activating: manage.NewLock(), file: p},
		handshakes: limit.NewHandshakes(limits.Handshakes),
		places:     limit.NewConnections(limits.Connections, limits.ConnectionsPerSource, limits.Strangers),
		signing:    manage.NewLock(), locking: manage.NewLock(), retaining: manage.NewLock(),
		retention: c.Retention, configured: c.Retention,
	}
	a.failing.Interval = time.Second
	if a.monitor == nil {
		a.monitor = resource.NewMonitor(log, limits.RequestTimeout)
	}
	if err := l.Follow(ctx, &a.mu, ledger.Followed{Table: ledger.Meta, Take: a.takeMeta}); err != nil {
		return nil, err
	}
	if err := l.Follow(ctx, &a.policies.mu, ledger.Followed{Table: ledger.Policies, Take: a.policies.take}); err != nil {
		return nil, err
	}
	if a.Peers, err = peers.Open(ctx, l, peers.Limits{
		Connections: limits.ConnectionsPerPeer, Requests: limits.Requests, RequestsOfPeer: limits.RequestsPerPeer,
		RequestsPerSecond: limits.RequestsPerSecond, RefusalsPerMinute: limits.RefusalsPerMinute, BatchItems: limits.BatchItems,
	}, log); err != nil {
		return nil, err
	}
	a.Peers.Remember(a.handshakes.Remember)
	if a.Keys, err = keyring.Open(ctx, keyring.Config{
		Ledger: l, Tokens: tokens, Calls: limits.Calls, Gate: a.gate, Peers: a.Peers, Log: log,
		Identity: c.Identity, MaxLifetime: limits.MaxLifetime, RequestTimeout: limits.RequestTimeout,
	}); err != nil {
		return nil, err
	}
	a.Keys.Watch(a.Peers.Wake)
	a.Anchor = anchor.New(c.Anchor, l, tokens, a.gate, a.monitor, log)
	return a, nil
}

// Ready holds an appliance against what serving needs.
func (a *Appliance) Ready() error {
	if _, err := a.Keys.Versions(keyring.NoiseName); err != nil { // after a compromise none may be active: serving mends that
		return errors.New("the listener has no Noise key: run countersignd init")
	}
	if _, err := a.Keys.LogKey(); err != nil {
		return errors.New("the audit log has no key: run countersignd init")
	}
	return nil
}

// Start clears away the remains of creations that were cut off, sees whether serving can begin, and
// writes down that it does.
func (a *Appliance) Start(ctx context.Context) error {
	if err := a.Keys.Recover(ctx); err != nil {
		return err
	}
	if err := a.Ready(); err != nil {
		return err
	}
	if a.attended && a.locked.Load() == nil {
		a.setLock(&Lock{
			By: "countersignd", Reason: "it was started, and an operator must unlock it (unattended_start = false)", At: time.Now().UTC(),
		})
	}
	if err := a.Anchor.Start(ctx); err != nil {
		return err
	}
	if err := a.policies.start(ctx); err != nil {
		return err
	}
	if err := a.startRetention(ctx); err != nil {
		return err
	}
	a.monitor.Start(ctx, a.record, a.Keys.RetryNow)
	return a.recordInTime(audit.NewStarted())
}

// Stop writes down that the daemon ends, after everything that was admitted has been settled.
func (a *Appliance) Stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), a.limits.RequestTimeout)
	defer cancel()
	for _, stop := range []func(context.Context) error{ // no act of management begins any more
		a.Keys.Stop, a.locking.Acquire, a.Peers.Stop, a.retaining.Acquire, a.Anchor.StopAccepting, a.policies.activating.Acquire,
	} {
		if err := stop(ctx); err != nil {
			a.log.Error("stopping during an act of management; the next start clears away what is left of it", "err", err)
		}
	}
	a.refusals.flush(ctx, a)
	if err := a.Peers.WriteSeen(ctx); err != nil {
		a.log.Error("when peers were last seen is not written down", "err", err)
	}
	if err := a.Keys.WriteUses(ctx); err != nil {
		a.log.Error("how often keys were used is not written down; the next start counts it", "err", err)
	}
	if err := a.recordInTime(audit.NewStopped()); err != nil {
		return err
	}
	if err := a.signLog(ctx); err != nil { // the next start signs what is there
		a.log.Error("the last checkpoint is not signed", "err", err)
	}
	return a.Anchor.Stop(ctx)
}

// Alive returns when the ledger's writer has come round, for a watchdog.
func (a *Appliance) Alive(ctx context.Context) error { return a.ledger.Alive(ctx) }

// record writes an event down and waits until it is on disk.
func (a *Appliance) record(ctx context.Context, e audit.Event) error {
	_, err := a.ledger.Append(ctx, ledger.EventOf(e))
	return err
}

// recordInTime writes an event down, even if the daemon is being stopped.
func (a *Appliance) recordInTime(e audit.Event) error {
	ctx, cancel := context.WithTimeout(context.Background(), a.limits.RequestTimeout)
	defer cancel()
	return a.record(ctx, e)
}

// takeMeta lets memory say what a record of the appliance as a whole says. mu is held.
func (a *Appliance) takeMeta(name string, value []byte) error {
	switch name {
	case lockKey:
		return a.takeLock(value)
	case retentionKey:
		return a.takeRetention(value)
	}
	return nil
}

// Canary has the log's key sign a message that means nothing: the whole way to the device and back.
func (a *Appliance) Canary(ctx context.Context) error {
	if err := a.gate.Err(); err != nil {
		return err
	}
	k, err := a.Keys.LogKey()
	if err != nil {
		return err
	}
	return a.Keys.Prove(ctx, k)
}

// Tokens returns the status of each token, by name.
func (a *Appliance) Tokens() map[string]keystore.Status {
	all := map[string]keystore.Status{}
	for name, store := range a.tokens {
		all[name] = store.Status()
	}
	return all
}

// RetryToken lets a token be asked for a login again after its PIN was refused.
func (a *Appliance) RetryToken(ctx context.Context, who audit.Actor, name string) error {
	store, err := a.tokens.Get(name)
	if err != nil {
		return err
	}
	if err := a.record(ctx, audit.NewTokenRetried(who, name)); err != nil {
		return err
	}
	store.Retry()
	a.Keys.RetryNow()
	return nil
}

// RecordCertificate writes down that an operator is about to give the admin API another certificate.
// Whether the API takes it depends on the certificate.
func (a *Appliance) RecordCertificate(ctx context.Context, who audit.Actor, action string, certificate []byte) error {
	return a.record(ctx, audit.NewCertificateChanged(who, action, keyring.AdminName, certificate))
}

// TokenResource is what the monitor tells of a token.
func TokenResource(name string) resource.Resource {
	return resource.Resource{Name: name, Failed: audit.DeviceUnavailable, Recovered: audit.DeviceRecovered}
}

// Events calls visit for each event of the audit log from index from on, until visit returns false.
func (a *Appliance) Events(from uint64, visit func(index uint64, e audit.Event) bool) error {
	var broken error
	err := a.ledger.Events(from, func(index uint64, b []byte) bool {
		e, err := audit.Decode(b)
		if err != nil {
			broken = fmt.Errorf("event %d: %w", index, err)
			return false
		}
		return visit(index, e)
	})
	return errors.Join(err, broken)
}
