// Package certs manages the TLS certificate of the admin API's HTTPS listener on loopback. The
// server's key and the key of the appliance's own certificate authority are P-256 keys in the
// keystore. Begin reading at Manager.
package certs

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"countersign/internal/keystore"
)

const (
	day           = 24 * time.Hour
	renewalWindow = 30 * day

	retryWithout = time.Second // backoff after a failed renewal, without a valid certificate
	retryWith    = time.Minute // backoff after a failed renewal, while the old certificate is valid
)

// Store keeps certificates, which are public. All methods are safe for concurrent use.
type Store interface {
	// Load returns the value saved last under a name, or nil.
	Load(name string) ([]byte, error)
	// Save returns when the value is on disk. An empty value deletes the name.
	Save(ctx context.Context, name string, value []byte) error
}

// Recorder writes what is about to be signed: kind is "certificate" or "certificate-request",
// digest SHA-256 of the signed part. Without the record on disk nothing is signed.
type Recorder func(ctx context.Context, kind string, key keystore.Ref, digest [32]byte) error

// Names in the Store. The values are certificates in PEM.
const (
	storedAuthority = "authority"
	storedOwn       = "own"
	storedInstalled = "installed"
)

// Manager supplies the listener's certificate. An operator's certificate is used if installed.
// Else the appliance's own authority issues a certificate at the first connection, and renews it
// 30 days before the end. All methods are safe for concurrent use.
type Manager struct {
	authorityKey signer
	store        Store
	record       Recorder
	names        []string
	log          *slog.Logger

	mu         sync.Mutex
	key        signer
	authority  *x509.Certificate   // nil until issued
	own        *x509.Certificate   // issued by authority; nil until issued
	installed  []*x509.Certificate // the operator's chain, leaf first; empty means own is used
	mismatched bool                // the store has an installed certificate for another key
	failedAt   time.Time           // time of the last failure to issue own
	lastErr    error               // error of that failure; nil after a success
}

// New loads the certificates in the store. The device with the keys may be unreachable. names are
// the DNS names and IP addresses of the listener; the default is localhost. A change of names
// causes a new certificate. A new authority is issued only if the old one has no permission for a
// name; clients must then trust the new authority.
func New(
	authority, server keystore.Key, store Store, record Recorder, names []string, log *slog.Logger,
) (*Manager, error) {
	if len(names) == 0 {
		names = loopback[:1]
	}
	for _, name := range names {
		if err := checkName(name); err != nil {
			return nil, err
		}
	}
	m := &Manager{store: store, record: record, names: slices.Clone(names), log: log}
	var err error
	if m.authorityKey, err = newSigner(authority); err != nil {
		return nil, err
	}
	return m, m.Use(server)
}

// Use sets the version of the server's key. A certificate is for one key. A new version therefore
// needs a new certificate of the own authority, and an installed certificate is no longer used.
func (m *Manager) Use(server keystore.Key) error {
	key, err := newSigner(server)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	var stored [3][]*x509.Certificate
	for i, name := range []string{storedAuthority, storedOwn, storedInstalled} {
		text, err := m.store.Load(name)
		if err == nil && len(text) > 0 {
			stored[i], err = parse(text)
		}
		if err != nil {
			return fmt.Errorf("certificate %q in the store: %w", name, err)
		}
	}
	m.key, m.authority, m.own, m.installed, m.lastErr = key, nil, nil, stored[2], nil
	names := ownNames(m.names)
	if c := stored[0]; len(c) == 1 && hasKey(c[0], m.authorityKey) && covers(c[0], names) {
		m.authority = c[0]
	}
	if c := stored[1]; len(c) == 1 && m.authority != nil && hasKey(c[0], key) &&
		slices.Equal(namesOf(c[0]), names) && c[0].CheckSignatureFrom(m.authority) == nil {
		m.own = c[0]
	}
	if m.mismatched = len(m.installed) > 0 && !hasKey(m.installed[0], key); m.mismatched {
		m.installed = nil
		m.log.Warn("certs: " + warnMismatched)
	}
	return nil
}

const warnMismatched = "the installed certificate is for another key and is not used: " +
	"install one for this key, or uninstall it"

// Config returns the TLS configuration of the admin API. Session tickets are off: every connection
// proves access to the private key.
func (m *Manager) Config() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		GetCertificate:         m.GetCertificate,
		NextProtos:             []string{"h2", "http/1.1"},
		SessionTicketsDisabled: true,
	}
}

// GetCertificate implements the callback of tls.Config. While the device is unreachable, handshakes
// fail; each new handshake tries again.
func (m *Manager) GetCertificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	chain := m.installed
	if len(chain) == 0 {
		own, err := m.currentOwn(hello.Context())
		if err != nil {
			return nil, err
		}
		chain = []*x509.Certificate{own} // the authority is in the clients' trust stores
	}
	c := &tls.Certificate{PrivateKey: m.key.withContext(hello.Context()), Leaf: chain[0]}
	for _, x := range chain {
		c.Certificate = append(c.Certificate, x.Raw)
	}
	return c, nil
}

// currentOwn returns the own certificate, and renews it first in the last 30 days. After a failed
// renewal the old certificate serves until its expiry.
func (m *Manager) currentOwn(ctx context.Context) (*x509.Certificate, error) {
	now := time.Now()
	if m.own != nil && validFor(m.own, now, renewalWindow) {
		return m.own, nil
	}
	valid, backoff := m.own != nil && validFor(m.own, now, 0), retryWithout
	if valid {
		backoff = retryWith
	}
	// The backoff keeps handshakes that wait for mu from calling a failing device one after the
	// other.
	if m.lastErr == nil || now.Sub(m.failedAt) >= backoff {
		if m.lastErr = m.issueOwn(context.WithoutCancel(ctx)); m.lastErr != nil {
			m.failedAt = time.Now()
			m.log.Warn("certs: no new certificate", "err", m.lastErr)
		}
	}
	if m.lastErr != nil && !valid {
		return nil, m.lastErr
	}
	return m.own, nil
}

func (m *Manager) issueOwn(ctx context.Context) error {
	if err := m.ensureAuthority(ctx); err != nil {
		return err
	}
	key := m.authorityKey.recorded(ctx, m.record, "certificate")
	own, err := newCertificate(m.authority, key, m.key.public, ownNames(m.names))
	if err != nil {
		return fmt.Errorf("certificate of the admin API: %w", err)
	}
	if err := m.store.Save(ctx, storedOwn, encode(own)); err != nil {
		return err
	}
	m.own = own
	m.log.Info("certs: made a certificate", "names", namesOf(own), "not_after", own.NotAfter)
	return nil
}

// ensureAuthority issues the authority's certificate unless the present one outlives a certificate
// issued now. A new authority is on disk before its first use.
func (m *Manager) ensureAuthority(ctx context.Context) error {
	if m.authority != nil && validFor(m.authority, time.Now(), certificateLifetime) {
		return nil
	}
	authority, err := newAuthority(m.authorityKey.recorded(ctx, m.record, "certificate"), ownNames(m.names))
	if err != nil {
		return fmt.Errorf("authority of the admin API: %w", err)
	}
	if err := m.store.Save(ctx, storedAuthority, encode(authority)); err != nil {
		return err
	}
	m.authority = authority
	m.log.Info("certs: made an authority: clients must trust this one",
		"issuer", authority.Subject.String(), "not_after", authority.NotAfter)
	return nil
}

// Authority returns the certificate of the own authority in PEM, for the trust stores of clients.
func (m *Manager) Authority(ctx context.Context) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.ensureAuthority(ctx); err != nil {
		return nil, err
	}
	return encode(m.authority), nil
}

// CSR returns a certificate signing request in PEM for the server's key and names.
func (m *Manager) CSR(ctx context.Context) ([]byte, error) {
	m.mu.Lock()
	key := m.key
	m.mu.Unlock()
	return newRequest(key.recorded(ctx, m.record, "certificate-request"), m.names)
}

// Install puts the operator's certificate in use. chain is PEM: the server's certificate, then the
// certificates of its authorities in order; the root may be missing. Install returns ErrUnfit for a
// chain that clients would reject.
func (m *Manager) Install(ctx context.Context, chain []byte) error {
	all, err := parse(chain)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnfit, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := check(all, m.key, m.names); err != nil {
		return fmt.Errorf("%w: %w", ErrUnfit, err)
	}
	if err := m.store.Save(ctx, storedInstalled, encode(all...)); err != nil {
		return err
	}
	m.installed, m.mismatched = all, false
	return nil
}

// Uninstall returns to a certificate of the own authority.
func (m *Manager) Uninstall(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.store.Save(ctx, storedInstalled, nil); err != nil {
		return err
	}
	m.installed, m.mismatched = nil, false
	return nil
}

// Status describes the certificate in use for operators.
type Status struct {
	Installed bool      `json:"installed"` // false: issued by the own authority
	Names     []string  `json:"names"`
	Issuer    string    `json:"issuer"`
	NotBefore time.Time `json:"not_before"` // zero: not issued before the first connection
	NotAfter  time.Time `json:"not_after"`
	Warning   string    `json:"warning,omitempty"`
}

// Status describes the certificate in use, without a call of the device.
func (m *Manager) Status() Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	s, now := Status{Installed: len(m.installed) > 0}, time.Now()
	c := m.own
	switch {
	case s.Installed:
		c = m.installed[0]
		s.Warning = m.warn(c, now)
	case m.mismatched:
		s.Warning = warnMismatched
	case m.lastErr != nil:
		s.Warning = "no new certificate could be made: " + m.lastErr.Error()
	}
	if c != nil {
		s.Names, s.Issuer, s.NotBefore, s.NotAfter = namesOf(c), c.Issuer.String(), c.NotBefore, c.NotAfter
	}
	return s
}

// warn returns the action that an installed certificate needs from an operator, or "". An expired
// certificate stays in use, because clients of its authority do not trust the own authority.
func (m *Manager) warn(c *x509.Certificate, now time.Time) string {
	for _, name := range m.names {
		if c.VerifyHostname(name) != nil {
			return fmt.Sprintf("the installed certificate is not for %s: install another, or uninstall it", name)
		}
	}
	switch soon := min(renewalWindow, c.NotAfter.Sub(c.NotBefore)/3); {
	case now.Before(c.NotBefore):
		return "the installed certificate is not valid yet: is the clock right?"
	case !validFor(c, now, 0):
		return "the installed certificate has expired: install another, or uninstall it"
	case !validFor(c, now, soon):
		return fmt.Sprintf("the installed certificate expires in %d days: install another", c.NotAfter.Sub(now)/day)
	}
	return ""
}

// ErrUnfit means that a chain was refused and not installed.
var ErrUnfit = errors.New("the certificate can't be installed")

const (
	maxChain    = 8        // certificates
	maxChainPEM = 64 << 10 // bytes
)

// parse decodes 1 to maxChain certificates in PEM and refuses other PEM blocks, such as private
// keys.
func parse(text []byte) (all []*x509.Certificate, err error) {
	if len(text) > maxChainPEM {
		return nil, fmt.Errorf("the chain is longer than %d KiB", maxChainPEM>>10)
	}
	begun := bytes.Count(text, []byte("-----BEGIN ")) // pem.Decode skips damaged blocks
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			return nil, errors.New("the chain has a PEM block other than CERTIFICATE: " +
				"send certificates only, never a private key")
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(all)+1, err)
		}
		all = append(all, c)
	}
	if len(all) == 0 || len(all) != begun || len(all) > maxChain {
		return nil, fmt.Errorf("the chain has %d complete certificates in PEM, of %d begun: send 1 to %d, all complete",
			len(all), begun, maxChain)
	}
	return all, nil
}

// check returns an error for a chain that clients of the listener would reject at present.
func check(chain []*x509.Certificate, key signer, names []string) error {
	leaf, last := chain[0], chain[len(chain)-1]
	switch {
	case !hasKey(leaf, key):
		return errors.New("the first certificate is not for the server's key: make a CSR, and have that signed")
	case leaf.IsCA || leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 ||
		!slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth):
		return errors.New("the first certificate must be a server's: no authority, " +
			"with key usage digitalSignature and extended key usage serverAuth")
	}
	for i, c := range chain[1:] {
		if err := chain[i].CheckSignatureFrom(c); err != nil {
			return fmt.Errorf("certificate %d did not sign certificate %d: "+
				"put the chain in order, the server's first: %w", i+2, i+1, err)
		}
	}
	o := x509.VerifyOptions{
		Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(),
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	o.Roots.AddCert(last)
	for _, c := range chain[:len(chain)-1] {
		o.Intermediates.AddCert(c)
	}
	for _, o.DNSName = range names {
		if _, err := leaf.Verify(o); err != nil {
			return err
		}
	}
	return nil
}

func hasKey(c *x509.Certificate, key signer) bool {
	public, ok := c.PublicKey.(*ecdsa.PublicKey)
	return ok && public.Equal(key.public)
}

// validFor reports whether c is valid now and still valid after left.
func validFor(c *x509.Certificate, now time.Time, left time.Duration) bool {
	return !now.Before(c.NotBefore) && now.Add(left).Before(c.NotAfter)
}

func encode(all ...*x509.Certificate) (text []byte) {
	for _, c := range all {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return text
}
