package main

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"countersign/appliance"
	"countersign/hsm"
	"countersign/internal/anchor"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/internal/webhook"
	"countersign/tpm"

	"github.com/pelletier/go-toml/v2"
)

// Config is the daemon's configuration, a TOML file. A field that is not described here is refused with its line. Paths
// that are not absolute are relative to the folder of the file. Durations are written like "10s", "5m" or "168h".
type Config struct {
	// Listen is the TCP address, host:port, at which peers connect over Noise with the profile countersign-v1. It or listen_pubky
	// is required. Whoever can reach it can make the token work for two key exchanges per handshake, as often as limits.handshakes
	// lets it: bind it to the network of the payment servers only.
	Listen string `toml:"listen"`

	// ListenPubky is the same for peers with the profile pubky-noise-v1, as pubky-noise's clients have it. Default: nowhere.
	ListenPubky string `toml:"listen_pubky"`

	// AdminSocket is the path of the Unix socket of the admin API. Required. It is made for its owner only (mode 0600), in a folder
	// that should be closed to others too: whoever may open it may try to sign in, and root may enrol the first administrator.
	AdminSocket string `toml:"admin_socket"`

	// AdminGroup is the name of a group whose members may use the socket too (mode 0660). Default: nobody but root and the daemon's
	// own user.
	AdminGroup string `toml:"admin_group"`

	// AdminHTTPS is the loopback address, such as 127.0.0.1:7780, at which the admin API is served over HTTPS too, for browsers.
	// Default: nowhere. countersignd init makes its keys in the token of the Noise key, which must be able to make P-256 keys.
	AdminHTTPS string `toml:"admin_https"`

	// AdminName is the name that browsers call it by. Passkeys are bound to it: with another name they do not work any more. Default:
	// localhost.
	AdminName string `toml:"admin_name"`

	// Ledger is the file that holds spent nonces, events, keys and peers. Required; countersignd init creates it. It
	// must be on a local disk. Danger: an older copy put back in its place forgets nonces, and what was signed under
	// them can be signed again.
	Ledger string `toml:"ledger"`

	// Policy is the file with the Cedar policies that say who may sign what with which key. Required. An empty file
	// denies everything. It is read at start, and by countersign admin policy reload.
	Policy string `toml:"policy"`

	// LogLevel is debug, info, warn or error. Default: info. At info each connection and each refusal is a line.
	LogLevel string `toml:"log_level"`

	// Tokens are the PKCS#11 tokens that hold the keys, each as a table [tokens.NAME]. At least one. The name is written
	// down with each key: it must stay. A token that does not answer costs its own keys only, unless the listener's
	// Noise key is on it: then nobody can connect.
	Tokens map[string]*Token `toml:"tokens"`

	// NoiseToken is the name of the token on which countersignd init makes the listener's Noise key. It may be left out
	// where there is only one token.
	NoiseToken string `toml:"noise_token"`

	// RollbackToken is the name of the token with a TPM to whose counter the ledger is bound, so that an older copy of the
	// ledger in its place is noticed at start. Default: the only one with a TPM; without one, nothing notices. none turns
	// it off.
	RollbackToken string `toml:"rollback_token"`

	// RollbackInterval is after how long the counter rises, if there were admissions. Default: 1h, 8,760 times a year at the
	// most; the memory of a TPM bears some 100,000 and more. Danger: the copy of a ledger can hide what was admitted between
	// the copy and the next rise.
	RollbackInterval Duration `toml:"rollback_interval"`

	// RollbackAdmissions makes it rise sooner, but not more often than each 5 minutes. Default: 10000.
	RollbackAdmissions int `toml:"rollback_admissions"`

	// UnattendedStart is whether the appliance serves as soon as it is started. Default: true. With false each start is locked until an
	// operator unlocks it (countersign admin unlock), so that nobody can make it sign by starting it.
	UnattendedStart bool `toml:"unattended_start"`

	// NoiseIdentity is the name of a signing key whose word lets the Noise key speak for it (paykit-noise-key-authorization-v1), so that
	// who knows it can find the Noise key again after that was rotated. Default: none.
	NoiseIdentity string `toml:"noise_identity"`

	// Webhooks are told of rotations, each as a table [[webhooks]].
	Webhooks []Webhook `toml:"webhooks"`

	// Retention says how long what is kept. What the ledger has goes before it where that is longer: to keep something for a shorter time
	// must be approved (countersign admin retention shorten).
	Retention Retention `toml:"retention"`

	// Limits bounds what peers can cost.
	Limits Limits `toml:"limits"`
}

// Webhook is somebody to tell of rotations: a POST with a body that is signed by the audit log's key, in the form of Standard Webhooks.
type Webhook struct {
	// Name is for people and logs. Required.
	Name string `toml:"name"`
	// URL is where to post to: https, or http on this machine. Required. It may hold a secret, and is never shown.
	URL string `toml:"url"`
	// CAFile has the authorities to trust in place of the system's (PEM).
	CAFile string `toml:"ca_file"`
}

// Retention says how long what is kept. What is over goes by itself; countersign admin retention preview says what and when.
type Retention struct {
	// Epoch is after how long the audit log begins a new tree: month, day or hour, by the calendar in UTC. Default: month. Whole
	// epochs are dropped.
	Epoch string `toml:"epoch"`
	// AuditDays is how long after its end an epoch of the audit log is kept. Default: 2557, seven years. Danger: what is
	// dropped can't be shown any more; its final checkpoint stays.
	AuditDays int `toml:"audit_days"`
	// ReceiptDays is how long receipts are kept. Default: 2557, seven years.
	ReceiptDays int `toml:"receipt_days"`
	// DecisionDays is how long what policy decided is kept with its inputs, amounts and parties among them, for countersign policy
	// explain and diff. Default: 35.
	DecisionDays int `toml:"decision_days"`
	// Nonces is how long a spent nonce is kept after its document has expired. Default: 24h. A nonce is never forgotten before
	// its document has expired.
	Nonces Duration `toml:"nonces"`
}

// Token names a PKCS#11 token and says how it is used.
type Token struct {
	// URI says which PKCS#11 token, as RFC 7512 has it: pkcs11:token=LABEL, and serial, manufacturer, model or slot-id
	// where the label is not enough. module-path and pin-source are understood, pin-value is refused. A token has a URI or
	// a TPM.
	URI string `toml:"uri"`

	// TPM is the path of a TPM 2.0: /dev/tpmrm0, or a Unix socket of swtpm for tests. Ed25519 and X25519 keys are sealed by
	// it to the state of this machine, and are in the memory of the key workers while they are in use; P-256 keys live in it.
	TPM string `toml:"tpm"`

	// State is the folder in which a TPM's keys rest, encrypted by it. Required with a TPM. Danger: without it and the TPM
	// together, the keys are lost.
	State string `toml:"state"`

	// PCRs are the registers of the TPM's SHA-256 bank that a new key is sealed to, as they are when it is made. Default: [7],
	// the Secure Boot state. Danger: each register more binds the keys to more of what an update may change; none leaves
	// them to whoever boots this machine.
	PCRs []uint `toml:"pcrs"`

	// PolicyKey is the file with the public key (ECDSA on P-256, PEM) of whoever approves states of this machine: new keys are
	// sealed to its word instead of to the present state. Approvals are files NAME.approval.json in State, made by countersignd
	// approve-state. Danger: who has the private key can have the keys unsealed in any state.
	PolicyKey string `toml:"policy_key"`

	// IdleLock is how long a TPM's key stays unsealed without being used. Default: 0, until the daemon stops.
	IdleLock Duration `toml:"idle_lock"`

	// Module is the path of the PKCS#11 module, unless the URI has module-path. Danger: it is code of its vendor that
	// runs with the daemon's rights.
	Module string `toml:"module"`

	// PINFile has the user's PIN on one line, unless the URI has pin-source. Only its owner may be able to read it
	// (mode 0600). A PIN that the token refuses is not tried again until an operator says so. With a TPM it may be left out;
	// where it is set, new keys need it, and the TPM counts wrong ones.
	PINFile string `toml:"pin_file"`

	// Environment is set for the key workers, which load the module: many modules are configured by variables, such as
	// SOFTHSM2_CONF. Default: nothing. Paths in it must be absolute.
	Environment map[string]string `toml:"environment"`

	// Workers is how many key workers use the token, each a process of its own. Default: 2, the second a hot standby.
	// Danger: with 1, requests fail while a worker that hung or crashed is replaced.
	Workers int `toml:"workers"`

	// Spread is whether all workers are used at the same time. Default: true. Set it to false for a module that serves
	// one process at a time well; then the others only stand by.
	Spread bool `toml:"spread"`

	// Sessions is how many operations one worker may have in the token at once. Default: 4. A software token is best
	// used with 1, since its sessions stand in each other's way inside one process; a network HSM may want many more.
	// What the token allows, shared by the workers, goes before this.
	Sessions int `toml:"sessions"`

	// Deadline is for one use of a key by the device. Default: 5s. A worker that misses it is killed and replaced, and
	// the call goes to another one. Generating, importing and listing keys and the start of a worker have four of them.
	Deadline Duration `toml:"deadline"`

	// MemoryMiB is how large a key worker may grow, in MiB, before it is renewed. Default: 256. Modules leak: SoftHSM 2.6.1
	// loses 64 bytes a signature and 312 a handshake's exchange. No call is lost by it. A worker needs some 10 to begin.
	MemoryMiB int `toml:"memory_mib"`

	// Quirks goes before what is known of the module: see Quirks in package hsm. Default: what countersignd check says.
	Quirks hsm.Quirks `toml:"quirks"`
}

// Limits bounds what peers can cost. There is no value for "unlimited".
type Limits struct {
	// Connections open at once, handshakes included; more are closed at once. Default: 1024.
	Connections int `toml:"connections"`
	// Strangers is how many of them may be connections that have proven nothing yet and come from an address from which nobody has
	// within a day. Default: half of connections.
	Strangers int `toml:"strangers"`
	// ConnectionsPerSource is how many one address may have open, an IPv6 /64 being one. Default: 256.
	ConnectionsPerSource int `toml:"connections_per_source"`
	// ConnectionsPerPeer is how many one peer may have open. Default: 128.
	ConnectionsPerPeer int `toml:"connections_per_peer"`
	// HandshakesPerSource and Handshakes are how many handshakes of one address, and of all, may be under way or have failed within a
	// minute. One that proves good does not count any more. Defaults: 5, 100. A quarter of Handshakes is kept for addresses from which
	// somebody has proven to be a peer within a day.
	HandshakesPerSource int `toml:"handshakes_per_source"`
	Handshakes          int `toml:"handshakes"`
	// Sources is how many addresses are remembered for that, some 150 bytes each. Default: 100000.
	Sources int `toml:"sources"`
	// InFlight is how many requests of one connection are served at once; further ones wait unread. Default: 64.
	InFlight int `toml:"in_flight"`
	// Requests is how many requests are served at once in all, the items of a batch one by one; more are refused as
	// busy, but for one of a peer that has none. Default: 1024.
	Requests int `toml:"requests"`
	// RequestsPerPeer is the same for one peer. Default: 256.
	RequestsPerPeer int `toml:"requests_per_peer"`
	// RequestsPerSecond is how many requests one peer may send a second; more are refused (rate_limited). Default: 10000.
	RequestsPerSecond int `toml:"requests_per_second"`
	// RefusalsPerMinute is how many refused requests of one peer are events of the audit log within a minute; further ones are
	// counted, in one event a minute. Default: 600.
	RefusalsPerMinute int `toml:"refusals_per_minute"`
	// BatchItems is how many items a batch may have. Default: 100, whose answers fit into a message.
	BatchItems int `toml:"batch_items"`
	// HandshakeTimeout is for the handshake, and again for the first request after it: until that decrypts, nobody has
	// proven to be the peer. Default: 10s.
	HandshakeTimeout Duration `toml:"handshake_timeout"`
	// ReadTimeout is for a request, from its first byte to its last. Default: 30s.
	ReadTimeout Duration `toml:"read_timeout"`
	// IdleTimeout closes a connection on which no request came. Default: 5m.
	IdleTimeout Duration `toml:"idle_timeout"`
	// WriteTimeout cuts off a peer that does not read its answers. Default: 10s.
	WriteTimeout Duration `toml:"write_timeout"`
	// RequestTimeout is for one request, the device's time included; then the answer is "unavailable". The ending of an
	// admission has the same time once more to be written down. Default: 15s. It must be more than two of each token's
	// deadline, so that a call that hung in one worker can be done by another.
	RequestTimeout Duration `toml:"request_timeout"`
	// ClockSkew is how far a document's timestamp may lie in the future. Default: 30s.
	ClockSkew Duration `toml:"clock_skew"`
	// MaxLifetime of a document, expires_at - timestamp. Default: 168h (7 days, what Paykit's signers use). Danger: a
	// nonce is kept until its document has expired, so this bounds how much the ledger has to keep.
	MaxLifetime Duration `toml:"max_lifetime"`
	// Nonces is how many spent nonces may be alive at once; beyond that requests are refused as busy. Default: 20000000. Each
	// takes some 40 bytes of the daemon's memory.
	Nonces int `toml:"nonces"`
	// ClockTolerance is how far the system's clock may be behind the ledger's time before nothing is admitted. Default: 2m.
	ClockTolerance Duration `toml:"clock_tolerance"`
}

// Duration is a time.Duration that TOML writes like "10s".
type Duration time.Duration

func (d Duration) std() time.Duration { return time.Duration(d) }

func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	*d = Duration(v)
	return err
}

func defaults() Config {
	l := appliance.DefaultLimits()
	return Config{
		LogLevel: "info", AdminName: "localhost", UnattendedStart: true, RollbackInterval: Duration(time.Hour), RollbackAdmissions: 10_000,
		Tokens:    map[string]*Token{},
		Retention: Retention{Epoch: string(appliance.Month), AuditDays: 2557, ReceiptDays: 2557, DecisionDays: 35, Nonces: Duration(24 * time.Hour)},
		Limits: Limits{
			Connections: l.Connections, ConnectionsPerSource: l.ConnectionsPerSource, ConnectionsPerPeer: l.ConnectionsPerPeer,
			HandshakesPerSource: l.Handshakes.PerSource, Handshakes: l.Handshakes.Global, Sources: l.Handshakes.Sources,
			InFlight: l.InFlight, Requests: l.Requests, RequestsPerPeer: l.RequestsPerPeer, RequestsPerSecond: l.RequestsPerSecond, RefusalsPerMinute: l.RefusalsPerMinute, BatchItems: l.BatchItems,
			HandshakeTimeout: Duration(l.HandshakeTimeout), ReadTimeout: Duration(l.ReadTimeout), IdleTimeout: Duration(l.IdleTimeout), WriteTimeout: Duration(l.WriteTimeout),
			RequestTimeout: Duration(l.RequestTimeout), ClockSkew: Duration(l.ClockSkew), MaxLifetime: Duration(l.MaxLifetime),
			Nonces: 20_000_000, ClockTolerance: Duration(2 * time.Minute),
		},
	}
}

// loadConfig reads and checks a configuration file. Errors are one line and name the line of the file where they can.
func loadConfig(path string) (Config, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("config: %w", err)
	}
	return parseConfig(path, b)
}

func parseConfig(path string, b []byte) (Config, error) {
	var names struct{ Tokens map[string]any }
	if err := toml.Unmarshal(b, &names); err != nil {
		return Config{}, fmt.Errorf("config: %s", explainTOML(path, err))
	}
	c := defaults()
	for name := range names.Tokens {
		c.Tokens[name] = &Token{PCRs: []uint{7}, Workers: 2, Spread: true, Sessions: 4, MemoryMiB: 256, Deadline: Duration(5 * time.Second)}
	}
	if err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(&c); err != nil {
		return Config{}, fmt.Errorf("config: %s", explainTOML(path, err))
	}
	if c.Limits.Strangers == 0 {
		c.Limits.Strangers = (c.Limits.Connections + 1) / 2
	}
	if err := c.check(); err != nil {
		return Config{}, fmt.Errorf("config: %s: %w", path, err)
	}
	dir := filepath.Dir(path)
	paths := []*string{&c.AdminSocket, &c.Ledger, &c.Policy}
	for _, t := range c.Tokens {
		paths = append(paths, &t.Module, &t.PINFile, &t.TPM, &t.State, &t.PolicyKey)
	}
	for _, p := range paths {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
	return c, nil
}

func explainTOML(path string, err error) string {
	var unknown *toml.StrictMissingError
	var broken *toml.DecodeError
	switch {
	case errors.As(err, &unknown):
		row, _ := unknown.Errors[0].Position()
		return fmt.Sprintf("%s:%d: unknown field %q", path, row, strings.Join(unknown.Errors[0].Key(), "."))
	case errors.As(err, &broken):
		row, _ := broken.Position()
		return fmt.Sprintf("%s:%d: %s", path, row, strings.TrimPrefix(broken.Error(), "toml: "))
	}
	return fmt.Sprintf("%s: %v", path, err)
}

func (c *Config) check() error {
	for _, required := range []struct{ field, value string }{
		{"listen", c.Listen + c.ListenPubky}, {"admin_socket", c.AdminSocket}, {"ledger", c.Ledger}, {"policy", c.Policy},
	} {
		if required.value == "" {
			return fmt.Errorf("%s is missing", required.field)
		}
	}
	for _, l := range []struct{ field, address string }{{"listen", c.Listen}, {"listen_pubky", c.ListenPubky}} {
		if _, _, err := net.SplitHostPort(l.address); err != nil && l.address != "" {
			return fmt.Errorf("%s: %q is not host:port", l.field, l.address)
		}
	}
	if host, _, err := net.SplitHostPort(c.AdminHTTPS); c.AdminHTTPS != "" {
		if ip, bad := netip.ParseAddr(host); err != nil || bad != nil || !ip.IsLoopback() {
			return fmt.Errorf("admin_https: %q is not a loopback address with a port, such as 127.0.0.1:7780", c.AdminHTTPS)
		}
	}
	if _, err := c.logLevel(); err != nil {
		return fmt.Errorf("log_level: %q is none of debug, info, warn, error", c.LogLevel)
	}
	for _, n := range []struct {
		field       string
		value, most int
	}{
		{"limits.connections", c.Limits.Connections, 100_000},
		{"limits.strangers", c.Limits.Strangers, c.Limits.Connections},
		{"limits.connections_per_source", c.Limits.ConnectionsPerSource, 100_000},
		{"limits.connections_per_peer", c.Limits.ConnectionsPerPeer, 100_000},
		{"limits.handshakes_per_source", c.Limits.HandshakesPerSource, 1_000_000},
		{"limits.handshakes", c.Limits.Handshakes, 1_000_000},
		{"limits.sources", c.Limits.Sources, 10_000_000},
		{"limits.in_flight", c.Limits.InFlight, 10_000},
		{"limits.requests", c.Limits.Requests, 100_000},
		{"limits.requests_per_peer", c.Limits.RequestsPerPeer, 100_000},
		{"limits.requests_per_second", c.Limits.RequestsPerSecond, 10_000_000},
		{"limits.refusals_per_minute", c.Limits.RefusalsPerMinute, 10_000_000},
		{"limits.batch_items", c.Limits.BatchItems, 100},
		{"rollback_admissions", c.RollbackAdmissions, 1_000_000_000},
		{"limits.nonces", c.Limits.Nonces, 1_000_000_000},
		{"retention.audit_days", c.Retention.AuditDays, 36_525},
		{"retention.receipt_days", c.Retention.ReceiptDays, 36_525},
		{"retention.decision_days", c.Retention.DecisionDays, 36_525},
	} {
		if n.value < 1 || n.value > n.most {
			return fmt.Errorf("%s must be 1 to %d", n.field, n.most)
		}
	}
	if most := min(c.Limits.Requests, c.Limits.RequestsPerPeer); c.Limits.BatchItems > most {
		return fmt.Errorf("limits.batch_items must be at most limits.requests and limits.requests_per_peer, %d: a larger batch would always be busy", most)
	}
	for _, d := range []struct {
		field       string
		value       Duration
		least, most time.Duration
	}{
		{"rollback_interval", c.RollbackInterval, time.Second, 31 * 24 * time.Hour},
		{"limits.handshake_timeout", c.Limits.HandshakeTimeout, 100 * time.Millisecond, 5 * time.Minute},
		{"limits.read_timeout", c.Limits.ReadTimeout, 100 * time.Millisecond, 5 * time.Minute},
		{"limits.idle_timeout", c.Limits.IdleTimeout, time.Second, 24 * time.Hour},
		{"limits.write_timeout", c.Limits.WriteTimeout, 100 * time.Millisecond, 5 * time.Minute},
		{"limits.request_timeout", c.Limits.RequestTimeout, 100 * time.Millisecond, 5 * time.Minute},
		{"limits.clock_skew", c.Limits.ClockSkew, 0, time.Hour},
		{"limits.max_lifetime", c.Limits.MaxLifetime, time.Second, 366 * 24 * time.Hour},
		{"limits.clock_tolerance", c.Limits.ClockTolerance, time.Second, 30 * time.Minute},
		{"retention.nonces", c.Retention.Nonces, time.Hour, 366 * 24 * time.Hour},
	} {
		if v := time.Duration(d.value); v < d.least || v > d.most {
			return fmt.Errorf("%s must be %v to %v", d.field, d.least, d.most)
		}
	}
	if p := appliance.Period(c.Retention.Epoch); p != appliance.Month && p != appliance.Day && p != appliance.Hour {
		return fmt.Errorf("retention.epoch: %q is none of month, day, hour", c.Retention.Epoch)
	}
	if c.NoiseIdentity != "" {
		if err := keystore.CheckName(c.NoiseIdentity); err != nil {
			return fmt.Errorf("noise_identity: %w", err)
		}
	}
	if _, err := webhook.New(webhook.Config{Targets: c.webhooks()}); err != nil {
		return err
	}
	return c.checkTokens()
}

func (c *Config) checkTokens() error {
	if len(c.Tokens) == 0 {
		return errors.New("there is no token: write a table [tokens.NAME]")
	}
	if c.NoiseToken == "" && len(c.Tokens) == 1 {
		for name := range c.Tokens {
			c.NoiseToken = name
		}
	}
	if c.Tokens[c.NoiseToken] == nil {
		return fmt.Errorf("noise_token: %q is none of the tokens", c.NoiseToken)
	}
	var tpms []string
	for name, t := range c.Tokens {
		if t.TPM != "" {
			tpms = append(tpms, name)
		}
	}
	switch {
	case c.RollbackToken == "none":
		c.RollbackToken = ""
	case c.RollbackToken == "" && len(tpms) == 1:
		c.RollbackToken = tpms[0]
	case c.RollbackToken != "" && !slices.Contains(tpms, c.RollbackToken):
		return fmt.Errorf("rollback_token: %q is none of the tokens with a TPM", c.RollbackToken)
	}
	for name, t := range c.Tokens {
		in := "tokens." + name + "."
		if err := keystore.CheckName(name); err != nil {
			return fmt.Errorf("tokens.%q: %w", name, err)
		}
		for _, n := range []struct {
			field       string
			value       int
			least, most int
		}{{"workers", t.Workers, 1, 16}, {"sessions", t.Sessions, 1, 1024}, {"memory_mib", t.MemoryMiB, 32, 65536}} {
			if n.value < n.least || n.value > n.most {
				return fmt.Errorf("%s%s must be %d to %d", in, n.field, n.least, n.most)
			}
		}
		if d := time.Duration(t.Deadline); d < 10*time.Millisecond || d > time.Minute {
			return fmt.Errorf("%sdeadline must be 10ms to 1m0s", in)
		} else if time.Duration(c.Limits.RequestTimeout) <= 2*d {
			return fmt.Errorf("limits.request_timeout must be more than two of %sdeadline, %v", in, 2*d)
		}
		if err := t.checkBackend(); err != nil {
			return fmt.Errorf("%s%w", in, err)
		}
		if err := t.Quirks.Check(); err != nil {
			return fmt.Errorf("%s%w", in, err)
		}
	}
	return nil
}

// checkBackend sees that what is set is about one device.
func (t *Token) checkBackend() error {
	switch {
	case t.URI == "" && t.TPM == "":
		return errors.New("uri is missing, or tpm")
	case t.URI != "" && t.TPM != "":
		return errors.New("uri and tpm exclude each other: a token is in one device")
	case t.URI != "" && (t.State != "" || t.IdleLock != 0 || t.PolicyKey != ""):
		return errors.New("state, policy_key and idle_lock are for a TPM")
	case t.TPM != "" && t.State == "":
		return errors.New("state is missing: the folder for the TPM's keys")
	case t.TPM != "" && (t.Module != "" || t.Quirks != hsm.Quirks{}):
		return errors.New("module and quirks are for a PKCS#11 token")
	case t.IdleLock < 0:
		return errors.New("idle_lock must not be negative")
	}
	for _, pcr := range t.PCRs {
		if pcr > 23 {
			return fmt.Errorf("pcrs: there is no PCR %d", pcr)
		}
	}
	return nil
}

func (c *Config) logLevel() (level slog.Level, err error) {
	return level, level.UnmarshalText([]byte(c.LogLevel))
}

func (t *Token) hsm() hsm.Config {
	return hsm.Config{URI: t.URI, Module: t.Module, PINFile: t.PINFile, Sessions: t.Sessions, Share: t.Workers, Quirks: t.Quirks}
}

func (t *Token) tpm() tpm.Config {
	return tpm.Config{Device: t.TPM, State: t.State, PCRs: t.PCRs, PolicyKey: t.PolicyKey, PINFile: t.PINFile, Deadline: t.Deadline.std(), IdleLock: t.IdleLock.std()}
}

func (c *Config) webhooks() (targets []webhook.Target) {
	for _, w := range c.Webhooks {
		targets = append(targets, webhook.Target{Name: w.Name, URL: w.URL, CAFile: w.CAFile})
	}
	return targets
}

func (c *Config) appliance() appliance.Config {
	return appliance.Config{Limits: c.limits(), Anchor: c.anchor(), Retention: c.retention(), Attended: !c.UnattendedStart, Identity: c.NoiseIdentity, Webhooks: c.webhooks()}
}

func (c *Config) anchor() anchor.Config {
	return anchor.Config{Token: c.RollbackToken, Interval: c.RollbackInterval.std(), Admissions: uint64(c.RollbackAdmissions)}
}

func (c *Config) retention() appliance.Retention {
	day := 24 * time.Hour
	return appliance.Retention{Epoch: appliance.Period(c.Retention.Epoch), Audit: time.Duration(c.Retention.AuditDays) * day, Receipts: time.Duration(c.Retention.ReceiptDays) * day,
		Decisions: time.Duration(c.Retention.DecisionDays) * day, Nonces: c.Retention.Nonces.std()}
}

func (c *Config) ledger() ledger.Options {
	return ledger.Options{Margin: c.Retention.Nonces.std(), MaxLifetime: c.Limits.MaxLifetime.std(), MaxNonces: c.Limits.Nonces, ClockTolerance: c.Limits.ClockTolerance.std()}
}

func (c *Config) limits() appliance.Limits {
	l := c.Limits
	limits := appliance.DefaultLimits()
	limits.Connections, limits.Strangers, limits.ConnectionsPerSource, limits.ConnectionsPerPeer = l.Connections, l.Strangers, l.ConnectionsPerSource, l.ConnectionsPerPeer
	limits.Handshakes.PerSource, limits.Handshakes.Global, limits.Handshakes.Kept = l.HandshakesPerSource, l.Handshakes, l.Handshakes/4
	limits.Handshakes.Sources, limits.Handshakes.Waiting = max(l.Sources, l.Handshakes+1), l.ConnectionsPerSource
	limits.InFlight, limits.Requests, limits.RequestsPerPeer, limits.BatchItems = l.InFlight, l.Requests, l.RequestsPerPeer, l.BatchItems
	limits.RequestsPerSecond, limits.RefusalsPerMinute = l.RequestsPerSecond, l.RefusalsPerMinute
	limits.HandshakeTimeout, limits.ReadTimeout, limits.IdleTimeout, limits.WriteTimeout = l.HandshakeTimeout.std(), l.ReadTimeout.std(), l.IdleTimeout.std(), l.WriteTimeout.std()
	limits.RequestTimeout, limits.ClockSkew, limits.MaxLifetime = l.RequestTimeout.std(), l.ClockSkew.std(), l.MaxLifetime.std()
	limits.Calls = map[string]int{}
	for name, t := range c.Tokens {
		limits.Calls[name] = callsAhead * t.Workers * t.Sessions
	}
	return limits
}

// callsAhead is how many calls a token gets for each session that it has: one is carried out while another one is on its way.
const callsAhead = 2
