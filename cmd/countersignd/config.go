package main

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"countersign/appliance"
	"countersign/hsm"

	"github.com/pelletier/go-toml/v2"
)

// Config is the daemon's configuration, a TOML file. A field that is not described here is refused with its line. Paths
// that are not absolute are relative to the folder of the file. Durations are written like "10s", "5m" or "168h".
type Config struct {
	// Listen is the TCP address, host:port, at which peers connect over Noise. Required. Whoever can reach it can make
	// the token work for two key exchanges per handshake: bind it to the network of the payment servers only.
	Listen string `toml:"listen"`

	// AdminSocket is the path of the Unix socket of the admin API. Required. Whoever may open it may enrol peers and
	// create keys: it is made for its owner only (mode 0600), in a folder that should be closed to others too.
	AdminSocket string `toml:"admin_socket"`

	// Ledger is the file that holds spent nonces, events, keys and peers. Required; countersignd init creates it. It
	// must be on a local disk. Danger: an older copy put back in its place forgets nonces, and what was signed under
	// them can be signed again.
	Ledger string `toml:"ledger"`

	// Policy is the file with the Cedar policies that say who may sign what with which key. Required. An empty file
	// denies everything. It is read at start.
	Policy string `toml:"policy"`

	// LogLevel is debug, info, warn or error. Default: info. At info each connection and each refusal is a line.
	LogLevel string `toml:"log_level"`

	// Token is the PKCS#11 token that holds the keys.
	Token Token `toml:"token"`

	// Limits bounds what peers can cost.
	Limits Limits `toml:"limits"`
}

// Token names the PKCS#11 token.
type Token struct {
	// URI says which token, as RFC 7512 has it: pkcs11:token=LABEL, and serial, manufacturer, model or slot-id where
	// the label is not enough. Required. module-path and pin-source are understood, pin-value is refused.
	URI string `toml:"uri"`

	// Module is the path of the PKCS#11 module, unless the URI has module-path. Danger: it is code of its vendor that
	// runs with the daemon's rights.
	Module string `toml:"module"`

	// PINFile has the user's PIN on one line, unless the URI has pin-source. Only its owner may be able to read it
	// (mode 0600). A PIN that the token refuses is not tried again until the daemon is started again.
	PINFile string `toml:"pin_file"`

	// Environment is set before the module is loaded: many modules are configured by variables, such as
	// SOFTHSM2_CONF. Default: nothing. Paths in it must be absolute.
	Environment map[string]string `toml:"environment"`

	// Sessions is how many operations may be in the token at once. Default: 8. A software token gains nothing beyond a
	// few for each core; a network HSM may want more, up to what it allows.
	Sessions int `toml:"sessions"`
}

// Limits bounds what peers can cost. There is no value for "unlimited".
type Limits struct {
	// Connections open at once, handshakes included; more are closed at once. Default: 1024.
	Connections int `toml:"connections"`
	// InFlight is how many requests of one connection are served at once; further ones wait unread. Default: 64.
	InFlight int `toml:"in_flight"`
	// HandshakeTimeout is for the handshake, and again for the first request after it: until that decrypts, nobody has
	// proven to be the peer. Default: 10s.
	HandshakeTimeout Duration `toml:"handshake_timeout"`
	// IdleTimeout closes a connection on which no request came. Default: 5m.
	IdleTimeout Duration `toml:"idle_timeout"`
	// WriteTimeout cuts off a peer that does not read its answers. Default: 10s.
	WriteTimeout Duration `toml:"write_timeout"`
	// RequestTimeout is for one request, the device's time included; then the answer is "unavailable". The ending of an
	// admission has the same time once more to be written down. Default: 5s.
	RequestTimeout Duration `toml:"request_timeout"`
	// ClockSkew is how far a document's timestamp may lie in the future. Default: 30s.
	ClockSkew Duration `toml:"clock_skew"`
	// MaxLifetime of a document, expires_at - timestamp. Default: 168h (7 days, what Paykit's signers use). Danger: a
	// nonce is kept until its document has expired, so this bounds how much the ledger has to keep.
	MaxLifetime Duration `toml:"max_lifetime"`
}

// Duration is a time.Duration that TOML writes like "10s".
type Duration time.Duration

func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	*d = Duration(v)
	return err
}

func defaults() Config {
	return Config{
		LogLevel: "info",
		Token:    Token{Sessions: 8},
		Limits: Limits{
			Connections: 1024, InFlight: 64,
			HandshakeTimeout: Duration(10 * time.Second), IdleTimeout: Duration(5 * time.Minute), WriteTimeout: Duration(10 * time.Second),
			RequestTimeout: Duration(5 * time.Second), ClockSkew: Duration(30 * time.Second), MaxLifetime: Duration(7 * 24 * time.Hour),
		},
	}
}

// loadConfig reads and checks a configuration file. Errors are one line and name the line of the file where they can.
func loadConfig(path string) (Config, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("config: %w", err)
	}
	c := defaults()
	if err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(&c); err != nil {
		return Config{}, fmt.Errorf("config: %s", explainTOML(path, err))
	}
	if err := c.check(); err != nil {
		return Config{}, fmt.Errorf("config: %s: %w", path, err)
	}
	dir := filepath.Dir(path)
	for _, p := range []*string{&c.AdminSocket, &c.Ledger, &c.Policy, &c.Token.Module, &c.Token.PINFile} {
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
		{"listen", c.Listen}, {"admin_socket", c.AdminSocket}, {"ledger", c.Ledger}, {"policy", c.Policy}, {"token.uri", c.Token.URI},
	} {
		if required.value == "" {
			return fmt.Errorf("%s is missing", required.field)
		}
	}
	if _, _, err := net.SplitHostPort(c.Listen); err != nil {
		return fmt.Errorf("listen: %q is not host:port", c.Listen)
	}
	if _, err := c.logLevel(); err != nil {
		return fmt.Errorf("log_level: %q is none of debug, info, warn, error", c.LogLevel)
	}
	for _, n := range []struct {
		field       string
		value, most int
	}{
		{"token.sessions", c.Token.Sessions, 1024},
		{"limits.connections", c.Limits.Connections, 100_000},
		{"limits.in_flight", c.Limits.InFlight, 10_000},
	} {
		if n.value < 1 || n.value > n.most {
			return fmt.Errorf("%s must be 1 to %d", n.field, n.most)
		}
	}
	for _, d := range []struct {
		field       string
		value       Duration
		least, most time.Duration
	}{
		{"limits.handshake_timeout", c.Limits.HandshakeTimeout, 100 * time.Millisecond, 5 * time.Minute},
		{"limits.idle_timeout", c.Limits.IdleTimeout, time.Second, 24 * time.Hour},
		{"limits.write_timeout", c.Limits.WriteTimeout, 100 * time.Millisecond, 5 * time.Minute},
		{"limits.request_timeout", c.Limits.RequestTimeout, 100 * time.Millisecond, 5 * time.Minute},
		{"limits.clock_skew", c.Limits.ClockSkew, 0, time.Hour},
		{"limits.max_lifetime", c.Limits.MaxLifetime, time.Second, 366 * 24 * time.Hour},
	} {
		if v := time.Duration(d.value); v < d.least || v > d.most {
			return fmt.Errorf("%s must be %v to %v", d.field, d.least, d.most)
		}
	}
	return nil
}

func (c *Config) logLevel() (level slog.Level, err error) {
	return level, level.UnmarshalText([]byte(c.LogLevel))
}

func (c *Config) hsm() hsm.Config {
	return hsm.Config{URI: c.Token.URI, Module: c.Token.Module, PINFile: c.Token.PINFile, Environment: c.Token.Environment, Sessions: c.Token.Sessions}
}

func (c *Config) limits() appliance.Limits {
	l := c.Limits
	return appliance.Limits{
		Connections: l.Connections, InFlight: l.InFlight,
		HandshakeTimeout: time.Duration(l.HandshakeTimeout), IdleTimeout: time.Duration(l.IdleTimeout), WriteTimeout: time.Duration(l.WriteTimeout),
		RequestTimeout: time.Duration(l.RequestTimeout), ClockSkew: time.Duration(l.ClockSkew), MaxLifetime: time.Duration(l.MaxLifetime),
	}
}
