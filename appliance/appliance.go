// Package appliance is the daemon without its edges: the service for peers over Noise, the protocol
// of signing and verifying, and the audit log. Begin reading at Appliance.Sign in sign.go, which is
// the whole protocol on one screen. Package keyring has the keys, package peers the enrolled peers.
//
// Errors have three classes. A refused request is wrong or not allowed, and a stable code says why.
// Unavailable means that a device or the disk does not answer in time; the client may send the same
// request again. After a fatal error the ledger's state is unknown: the daemon stops, and a restart
// is the recovery. refuse.go translates errors into classes and codes, at one place.
package appliance

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"countersign/audit"
	"countersign/internal/alert"
	"countersign/internal/anchor"
	"countersign/internal/cause"
	"countersign/internal/gate"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/limit"
	"countersign/internal/manage"
	"countersign/internal/meter"
	"countersign/internal/peers"
	"countersign/internal/resource"
	"countersign/internal/sink"
	"countersign/internal/trace"
	"countersign/internal/webhook"
	"countersign/policy"

	"golang.org/x/time/rate"
)

// Limits are the limits for peers and strangers. Every field must be set. The configuration of
// cmd/countersignd documents the fields and their defaults.
type Limits struct {
	Connections          int // open connections, handshakes included
	Strangers            int // open connections without a decrypted message, from addresses without a good session
	ConnectionsPerSource int
	ConnectionsPerPeer   int
	InFlight             int   // requests of one connection being served
	Requests             int   // requests of all peers being served; an item of a batch counts as one
	RequestsPerPeer      int   // requests of one peer being served
	RequestsPerSecond    int   // of one peer
	BytesPerSecond       int   // of one peer's messages
	RefusalsPerMinute    int   // of one peer with an event each; further refusals are counted
	BytesPerDay          int64 // bytes that served requests of one peer make the ledger keep
	RefusalBytesPerDay   int64 // bytes of the records of one peer's refusals
	BatchItems           int
	Calls                map[string]int // calls to each token at once
	Handshakes           limit.Config

	HandshakeTimeout time.Duration // for the handshake, and again for the first request
	ReadTimeout      time.Duration // for a request, from the first byte to the last
	IdleTimeout      time.Duration // for a connection without a request
	WriteTimeout     time.Duration // for one answer
	RequestTimeout   time.Duration // for one request with the device's time, and again for the outcome's record
	ClockSkew        time.Duration // largest distance of a document's timestamp in the future
	MaxLifetime      time.Duration // largest expires_at - timestamp of a document
}

// DefaultLimits returns the default limits. Calls is not set, because Calls depends on the tokens.
func DefaultLimits() Limits {
	return Limits{
		Connections: 1024, Strangers: 512, ConnectionsPerSource: 256, ConnectionsPerPeer: 128,
		InFlight: 64, Requests: 1024, RequestsPerPeer: 256, RequestsPerSecond: 10_000,
		BytesPerSecond: 8_000_000, RefusalsPerMinute: 600, BatchItems: 100,
		BytesPerDay: 10 << 30, RefusalBytesPerDay: 16 << 20,
		Handshakes: limit.Config{
			PerSource: 5, Global: 100, Kept: 25, Window: time.Minute, GoodFor: 24 * time.Hour,
			Sources: 100_000, Waiting: 256,
		},
		HandshakeTimeout: 10 * time.Second, ReadTimeout: 30 * time.Second, IdleTimeout: 5 * time.Minute,
		WriteTimeout: 10 * time.Second, RequestTimeout: 15 * time.Second,
		ClockSkew: 30 * time.Second, MaxLifetime: 7 * 24 * time.Hour,
	}
}

// Config is the configuration of an appliance.
type Config struct {
	Limits       Limits
	Anchor       anchor.Config
	Retention    Retention
	Attended     bool   // each start waits for an operator's unlock
	SigningToken string // token of a new signing key without a token's name; "": the only token
	Identity     string // name of the signing key that authorizes the Noise key; "" for none
	Webhooks     []webhook.Target
	Backup       BackupConfig
	Sinks        []SinkConfig
	SinkState    string       // folder of the sinks' positions
	Alerts       alert.Config // the zero value is alert.Defaults
	Mail         MailConfig   // receives alerts
	DiskLeast    uint64       // bytes of the ledger's disk below which the state has a cause; 0: no cause
	// LoadPolicy reads the policy file, to see whether the file is still the policy in force. Nil
	// takes the policy of New for the file's.
	LoadPolicy func() (*policy.Policy, error)
	// Monitor, if set, may have failed tokens already.
	Monitor *resource.Monitor
	Meter   *meter.Meter  // nil counts nothing
	Traces  *trace.Tracer // nil traces nothing
}

// Appliance is safe for concurrent use.
type Appliance struct {
	Keys   *keyring.Ring
	Peers  *peers.Registry
	Anchor *anchor.Anchor
	// Alerts are run by the caller of Start beside Serve. A caller that ends without Stop calls
	// Alerts.Ended.
	Alerts *alert.Engine

	limits   Limits
	attended bool
	webhooks []webhook.Target

	sinkConfigs []SinkConfig
	sinkState   string
	diskLeast   uint64

	ledger  *ledger.Ledger
	tokens  manage.Tokens
	gate    *gate.Gate
	monitor *resource.Monitor
	causes  []func() []cause.Cause
	meter   *meter.Meter
	traces  *trace.Tracer
	signed  atomic.Int64 // time of the last checkpoint or of the start, Unix nanoseconds
	log     *slog.Logger

	backups    backups
	policies   policies
	groups     groups
	locked     atomic.Pointer[Lock] // nil for an unlocked appliance
	refusals   tally                // refusals beyond the limit of events
	upkeep     upkeep
	hooks      atomic.Pointer[webhook.Sender] // nil before Serve, and without webhooks
	sinks      atomic.Pointer[[]*sink.Sink]   // nil before Serve, and without sinks
	turnedAway turnedAway                     // refused handshakes, for operators
	failing    rate.Sometimes                 // lines of the log about handshakes that fail because of the device
	handshakes *limit.Handshakes
	places     *limit.Connections
	processor  *limit.Fair // for the reading of peers' documents, by bytes

	signing   manage.Lock // held while a checkpoint is signed
	locking   manage.Lock // held by Lock and Unlock
	retaining manage.Lock // held by ShortenRetention

	// mu guards the retention. The ledger's writer holds mu while memory follows the ledger.
	mu         sync.RWMutex
	retention  Retention       // in force
	configured Retention       // from the configuration
	retained   retentionRecord // the record of retention
}

// New returns an appliance with the keys and peers of the ledger. New compares each key with its
// token: see keyring.Open. New changes neither the ledger nor a token.
func New(
	ctx context.Context, c Config, l *ledger.Ledger, tokens map[string]keystore.Store, p *policy.Policy,
	log *slog.Logger,
) (a *Appliance, err error) {
	if c.LoadPolicy == nil {
		c.LoadPolicy = func() (*policy.Policy, error) { return p, nil }
	}
	limits := c.Limits
	a = &Appliance{
		limits: limits, attended: c.Attended, webhooks: c.Webhooks, ledger: l, tokens: tokens, gate: gate.New(l),
		sinkConfigs: c.Sinks, sinkState: c.SinkState, diskLeast: c.DiskLeast,
		monitor: c.Monitor, meter: c.Meter, traces: c.Traces, log: log, policies: policies{
			ledger: l, log: log, activating: manage.NewLock(), file: p, load: c.LoadPolicy,
		},
		backups:    backups{BackupConfig: c.Backup, making: manage.NewLock()},
		groups:     groups{all: map[string]Group{}, of: map[member][]string{}},
		handshakes: limit.NewHandshakes(limits.Handshakes),
		places:     limit.NewConnections(limits.Connections, limits.ConnectionsPerSource, limits.Strangers),
		processor:  limit.NewWeighted(max(1, runtime.GOMAXPROCS(0)-1), turnBytes),
		signing:    manage.NewLock(), locking: manage.NewLock(), retaining: manage.NewLock(),
		retention: c.Retention, configured: c.Retention,
	}
	a.failing.Interval = time.Second
	a.refusals.meter = c.Meter
	a.signed.Store(time.Now().UnixNano())
	if a.monitor == nil {
		a.monitor = resource.NewMonitor(log, limits.RequestTimeout)
	}
	if err := l.Follow(ctx, &a.mu, ledger.Followed{Table: ledger.Meta, Take: a.takeMeta}); err != nil {
		return nil, err
	}
	versions := ledger.Followed{Table: ledger.Policies, Take: a.policies.take}
	if err := l.Follow(ctx, &a.policies.mu, versions); err != nil {
		return nil, err
	}
	if err := l.Follow(ctx, &a.groups.mu, ledger.Followed{Table: ledger.Groups, Take: a.groups.take}); err != nil {
		return nil, err
	}
	if a.Peers, err = peers.Open(ctx, l, a.gate, peers.Limits{
		Connections: limits.ConnectionsPerPeer, Requests: limits.Requests, RequestsOfPeer: limits.RequestsPerPeer,
		RequestsPerSecond: limits.RequestsPerSecond, BytesPerSecond: limits.BytesPerSecond,
		RefusalsPerMinute: limits.RefusalsPerMinute, BatchItems: limits.BatchItems,
		BytesPerDay: limits.BytesPerDay, RefusalBytesPerDay: limits.RefusalBytesPerDay,
	}, log); err != nil {
		return nil, err
	}
	a.Peers.Remember(a.handshakes.Remember)
	if a.Keys, err = keyring.Open(ctx, keyring.Config{
		Ledger: l, Tokens: tokens, Calls: limits.Calls, Gate: a.gate, Peers: a.Peers, Log: log,
		SigningToken: c.SigningToken, Identity: c.Identity,
		MaxLifetime: limits.MaxLifetime, RequestTimeout: limits.RequestTimeout,
	}); err != nil {
		return nil, err
	}
	a.Keys.Watch(a.Peers.Wake)
	a.Peers.OnRemoval(a.Keys.Unlist)
	a.Report(a.ownCauses)
	a.Report(a.nonceCauses)
	a.Report(a.backupCauses)
	a.Anchor = anchor.New(c.Anchor, l, tokens, a.gate, a.monitor, log)
	a.Report(a.Anchor.Causes)
	a.meter.Source(a.measure)
	if err := a.openAlerts(ctx, c); err != nil {
		return nil, err
	}
	return a, nil
}

// Ready returns an error if a key that Serve needs is missing.
func (a *Appliance) Ready() error {
	// After a compromise no version may be active: Serve then activates the successor.
	if _, err := a.Keys.Versions(keyring.NoiseName); err != nil {
		return errors.New("the listener has no Noise key: run countersignd init")
	}
	if _, err := a.Keys.LogKey(); err != nil {
		return errors.New("the audit log has no key: run countersignd init")
	}
	return nil
}

// Start removes the remains of interrupted key creations, loads the state that Serve needs, and
// writes the event Started.
func (a *Appliance) Start(ctx context.Context) error {
	if err := a.Keys.Recover(ctx); err != nil {
		return err
	}
	if err := a.Ready(); err != nil {
		return err
	}
	if a.attended && a.locked.Load() == nil {
		a.setLock(&Lock{
			By:     "countersignd",
			Reason: "it was started, and an operator must unlock it (unattended_start = false)",
			At:     time.Now().UTC(),
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
	if err := a.startDrills(ctx); err != nil {
		return err
	}
	a.monitor.Start(ctx, a.record, a.Keys.RetryNow)
	return a.recordInTime(audit.NewStarted(), a.Alerts.Begin)
}

// Stop writes the event Stopped. Serve must have ended, so every admission has been settled.
func (a *Appliance) Stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), a.limits.RequestTimeout)
	defer cancel()
	a.backups.halted.Store(true)
	for _, stop := range []func(context.Context) error{ // later acts of management are refused
		a.Keys.Stop, a.locking.Acquire, a.Peers.Stop, a.retaining.Acquire, a.Anchor.StopAccepting,
		a.policies.activating.Acquire, a.stopBackups,
	} {
		if err := stop(ctx); err != nil {
			a.log.Error("stopping during an act of management; the next start removes its remains", "err", err)
		}
	}
	a.refusals.flush(ctx, a)
	if err := a.Peers.WriteSeen(ctx); err != nil {
		a.log.Error("the times of peers' last sessions are not written", "err", err)
	}
	if err := a.Keys.WriteUses(ctx); err != nil {
		a.log.Error("the number of uses of keys is not written; the next start counts again", "err", err)
	}
	if err := a.recordInTime(audit.NewStopped(), a.Alerts.End); err != nil {
		return err
	}
	if err := a.signLog(ctx); err != nil { // the next start signs a checkpoint
		a.log.Error("the last checkpoint is not signed", "err", err)
	}
	return a.Anchor.Stop(ctx)
}

// stopBackups waits for a backup that is being made, but not for a folder that hangs.
func (a *Appliance) stopBackups(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, backupWait)
	defer cancel()
	return a.backups.making.Acquire(ctx)
}

// Alive returns when the ledger's writer has executed an empty request, for a watchdog.
func (a *Appliance) Alive(ctx context.Context) error { return a.ledger.Alive(ctx) }

// Record writes an event of the machine around the appliance, and returns when the event is on
// disk.
func (a *Appliance) Record(ctx context.Context, e audit.Event) error { return a.record(ctx, e) }

// record writes an event, and returns when the event is on disk.
func (a *Appliance) record(ctx context.Context, e audit.Event) error {
	_, err := a.ledger.Append(ctx, ledger.EventOf(e))
	return err
}

// recordInTime writes an event together with a change, with a timeout of its own: also while the
// daemon stops.
func (a *Appliance) recordInTime(e audit.Event, change func(*ledger.Tx) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), a.limits.RequestTimeout)
	defer cancel()
	return a.ledger.Update(ctx, func(tx *ledger.Tx) error {
		if err := change(tx); err != nil {
			return err
		}
		return tx.Append(ledger.EventOf(e))
	})
}

// takeMeta updates memory from a record of the appliance as a whole. The ledger's writer holds mu.
func (a *Appliance) takeMeta(name string, value []byte) error {
	switch name {
	case lockKey:
		return a.takeLock(value)
	case retentionKey:
		return a.takeRetention(value)
	case drillKey:
		return a.takeDrill(value)
	}
	return nil
}

// Canary has the audit log's key sign a test message, to check the whole way to the device and
// back. The error is that of the gate if admissions are blocked, and names the cause if another
// cause stops admissions.
func (a *Appliance) Canary(ctx context.Context) error {
	if err := a.gate.Err(); err != nil {
		return err
	}
	for _, c := range a.Health().Causes {
		if c.Stops {
			return errors.New(c.String())
		}
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

// InspectToken asks the device of a token what it is.
func (a *Appliance) InspectToken(ctx context.Context, name string) ([]keystore.Finding, error) {
	store, err := a.tokens.Get(name)
	if err != nil {
		return nil, err
	}
	return store.Inspect(ctx, false)
}

// RetryToken allows another login at a token that has refused the PIN.
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

// RecordLogLevel writes that an operator is about to set the level of the daemon's log until a
// time; zero: to that of the configuration.
func (a *Appliance) RecordLogLevel(ctx context.Context, who audit.Actor, level string, until time.Time) error {
	return a.record(ctx, audit.NewLogLevelChanged(who, level, until))
}

// RecordCertificate writes that an operator is about to give the admin API another certificate. The
// event comes before the API's check of the certificate.
func (a *Appliance) RecordCertificate(ctx context.Context, who audit.Actor, action string, certificate []byte) error {
	return a.record(ctx, audit.NewCertificateChanged(who, action, keyring.AdminName, certificate))
}

// RecordCertificateSigned writes what a key of the admin API is about to sign.
func (a *Appliance) RecordCertificateSigned(
	ctx context.Context, kind string, key keystore.Ref, digest [32]byte,
) error {
	return a.record(ctx, audit.NewCertificateSigned(kind, key.String(), digest))
}

// TokenResource is a token as a resource of the monitor.
func TokenResource(name string) resource.Resource {
	return resource.Resource{Name: name, Failed: audit.DeviceUnavailable, Recovered: audit.DeviceRecovered}
}

// Events calls visit for each event of the audit log, beginning at the index from, until visit
// returns false.
func (a *Appliance) Events(from uint64, visit func(index uint64, e audit.Event) bool) error {
	return a.Find(ledger.Query{}, ledger.Span{From: from}, visit)
}

// EventsEnd returns the number of the event that comes next into the audit log.
func (a *Appliance) EventsEnd() uint64 { return a.ledger.End() }

// ReadEvents reads the next part of the audit log for a follower: see ledger.Read.
func (a *Appliance) ReadEvents(next uint64, p ledger.Part) (ledger.Found, error) {
	return a.ledger.Read(next, a.ledger.End(), p)
}

// Find calls visit for the events that a query selects, in the order of the span, until visit
// returns false.
func (a *Appliance) Find(q ledger.Query, s ledger.Span, visit func(index uint64, e audit.Event) bool) error {
	var broken error
	err := a.ledger.Find(q, s, func(index uint64, b []byte) bool {
		e, err := audit.Decode(b)
		if err != nil {
			broken = fmt.Errorf("event %d: %w", index, err)
			return false
		}
		return visit(index, e)
	})
	return errors.Join(err, broken)
}
