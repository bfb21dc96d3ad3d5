// Package certs keeps the certificate of the admin API's HTTPS listener on loopback. Its key, and the key of the appliance's
// own authority, are P-256 keys in the keystore. Begin with Manager.
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
	day         = 24 * time.Hour
	renewBefore = 30 * day

	againWithout = time.Second // after a failure, where there is no certificate to show
	againWith    = time.Minute // and where the old one is still good
)

// Store keeps certificates, which are public. It is safe for concurrent use.
type Store interface {
	// Load returns what was saved last under a name: nothing, if nothing was.
	Load(name string) ([]byte, error)
	// Save returns when the value is on disk. To save nothing is to forget.
	Save(ctx context.Context, name string, value []byte) error
}

// The names in the Store. The values are PEM.
const (
	storedAuthority = "authority"
	storedOwn       = "own"
	storedInstalled = "installed"
)

// Manager gives the listener its certificate: the operator's, where one is installed, and else one of the appliance's own
// authority, which is made when it is first needed, and again in time. It is for concurrent use.
type Manager struct {
	authorityKey signer
	store        Store
	names        []string
	log          *slog.Logger

	mu        sync.Mutex
	key       signer
	authority *x509.Certificate   // nil: to be made
	own       *x509.Certificate   // nil: to be made
	installed []*x509.Certificate // the server's first; none: the own one is used
	misfit    bool                // one is installed, for another key
	failed    time.Time           // when the own one could not be made
	cause     error               // why; nil when it could
}

// New loads what the store has; the keys may be out of reach. names are what the listener is called, DNS names and IP
// addresses, localhost if there are none. With other names another certificate is made. Another authority is made only for
// names that the old one may not speak for, and then clients must be told of it.
func New(authority, server keystore.Key, store Store, names []string, log *slog.Logger) (*Manager, error) {
	if len(names) == 0 {
		names = loopback[:1]
	}
	for _, name := range names {
		if err := checkName(name); err != nil {
			return nil, err
		}
	}
	m := &Manager{store: store, names: slices.Clone(names), log: log}
	var err error
	if m.authorityKey, err = newSigner(authority); err != nil {
		return nil, err
	}
	return m, m.Use(server)
}

// Use puts another version of the server's key in use. A certificate is for one key: the own one is made anew, and an
// installed one does not count any more.
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
	m.key, m.authority, m.own, m.installed, m.cause = key, nil, nil, stored[2], nil
	if c := stored[0]; len(c) == 1 && isFor(c[0], m.authorityKey) && speaksFor(c[0], ownNames(m.names)) {
		m.authority = c[0]
	}
	if c := stored[1]; len(c) == 1 && m.authority != nil && isFor(c[0], key) && slices.Equal(namesOf(c[0]), ownNames(m.names)) && c[0].CheckSignatureFrom(m.authority) == nil {
		m.own = c[0]
	}
	if m.misfit = len(m.installed) > 0 && !isFor(m.installed[0], key); m.misfit {
		m.installed = nil
		m.log.Warn("certs: " + saysMisfit)
	}
	return nil
}

const saysMisfit = "the installed certificate is for another key and is not used: install one for this key, or uninstall it"

// Config is TLS as the admin API speaks it. There are no session tickets: each connection proves that the key is there.
func (m *Manager) Config() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13, GetCertificate: m.GetCertificate, NextProtos: []string{"h2", "http/1.1"}, SessionTicketsDisabled: true,
	}
}

// GetCertificate is for a tls.Config. Where the key can't be reached the handshake fails, and the next one tries again.
func (m *Manager) GetCertificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	chain := m.installed
	if len(chain) == 0 {
		own, err := m.ownNow(hello.Context())
		if err != nil {
			return nil, err
		}
		chain = []*x509.Certificate{own} // clients that trust it have the authority
	}
	c := &tls.Certificate{PrivateKey: m.key.in(hello.Context()), Leaf: chain[0]}
	for _, x := range chain {
		c.Certificate = append(c.Certificate, x.Raw)
	}
	return c, nil
}

// ownNow gives the own certificate, and makes a new one when it is time. After a failure the old one is good until it expires.
func (m *Manager) ownNow(ctx context.Context) (*x509.Certificate, error) {
	now := time.Now()
	if m.own != nil && validFor(m.own, now, renewBefore) {
		return m.own, nil
	}
	good, again := m.own != nil && validFor(m.own, now, 0), againWithout
	if good {
		again = againWith
	}
	if m.cause == nil || now.Sub(m.failed) >= again { // else those who wait here would ask the device one after the other
		if m.cause = m.makeOwn(context.WithoutCancel(ctx)); m.cause != nil {
			m.failed = time.Now()
			m.log.Warn("certs: no new certificate", "err", m.cause)
		}
	}
	if m.cause != nil && !good {
		return nil, m.cause
	}
	return m.own, nil
}

func (m *Manager) makeOwn(ctx context.Context) error {
	if err := m.needAuthority(ctx); err != nil {
		return err
	}
	own, err := newCertificate(m.authority, m.authorityKey.in(ctx), m.key.public, ownNames(m.names))
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

// needAuthority makes the authority unless it can vouch for a whole certificate's life. It is on disk before it is used.
func (m *Manager) needAuthority(ctx context.Context) error {
	if m.authority != nil && validFor(m.authority, time.Now(), certificateLife) {
		return nil
	}
	authority, err := newAuthority(m.authorityKey.in(ctx), ownNames(m.names))
	if err != nil {
		return fmt.Errorf("authority of the admin API: %w", err)
	}
	if err := m.store.Save(ctx, storedAuthority, encode(authority)); err != nil {
		return err
	}
	m.authority = authority
	m.log.Info("certs: made an authority: clients must trust this one", "issuer", authority.Subject.String(), "not_after", authority.NotAfter)
	return nil
}

// Authority gives the certificate of the own authority in PEM, which clients trust.
func (m *Manager) Authority(ctx context.Context) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.needAuthority(ctx); err != nil {
		return nil, err
	}
	return encode(m.authority), nil
}

// CSR gives a certificate signing request in PEM, for the server's key and the names.
func (m *Manager) CSR(ctx context.Context) ([]byte, error) {
	m.mu.Lock()
	key := m.key
	m.mu.Unlock()
	return newRequest(key.in(ctx), m.names)
}

// Install puts the operator's certificate in use. chain is PEM: the server's certificate, then those of its authorities in
// order; the last may be missing. What does not fit is refused with ErrUnfit.
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
	m.installed, m.misfit = all, false
	m.log.Info("certs: installed a certificate", "issuer", all[0].Issuer.String(), "not_after", all[0].NotAfter)
	return nil
}

// Uninstall goes back to a certificate of the own authority.
func (m *Manager) Uninstall(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.store.Save(ctx, storedInstalled, nil); err != nil {
		return err
	}
	m.installed, m.misfit = nil, false
	m.log.Info("certs: the own certificate is in use")
	return nil
}

// Status is the certificate in use, as an operator sees it.
type Status struct {
	Installed bool      `json:"installed"` // it is the operator's, and not of the own authority
	Names     []string  `json:"names"`
	Issuer    string    `json:"issuer"`
	NotBefore time.Time `json:"not_before"` // zero: the own one is made at the first connection
	NotAfter  time.Time `json:"not_after"`
	Warning   string    `json:"warning,omitempty"`
}

// Status asks no device.
func (m *Manager) Status() Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	s, now := Status{Installed: len(m.installed) > 0}, time.Now()
	c := m.own
	switch {
	case s.Installed:
		c = m.installed[0]
		s.Warning = m.warn(c, now)
	case m.misfit:
		s.Warning = saysMisfit
	case m.cause != nil:
		s.Warning = "no new certificate could be made: " + m.cause.Error()
	}
	if c != nil {
		s.Names, s.Issuer, s.NotBefore, s.NotAfter = namesOf(c), c.Issuer.String(), c.NotBefore, c.NotAfter
	}
	return s
}

// warn says what an operator must do about the certificate that is installed. It stays in use: the clients that trust its
// authority do not trust ours.
func (m *Manager) warn(c *x509.Certificate, now time.Time) string {
	for _, name := range m.names {
		if c.VerifyHostname(name) != nil {
			return fmt.Sprintf("the installed certificate is not for %s: install another, or uninstall it", name)
		}
	}
	switch soon := min(renewBefore, c.NotAfter.Sub(c.NotBefore)/3); {
	case now.Before(c.NotBefore):
		return "the installed certificate is not valid yet: is the clock right?"
	case !validFor(c, now, 0):
		return "the installed certificate has expired: install another, or uninstall it"
	case !validFor(c, now, soon):
		return fmt.Sprintf("the installed certificate expires in %d days: install another", c.NotAfter.Sub(now)/day)
	}
	return ""
}

// ErrUnfit is a chain that can't be installed.
var ErrUnfit = errors.New("the certificate can't be installed")

const (
	maxChain    = 8
	maxChainPEM = 64 << 10 // bytes
)

// parse reads nothing but certificates.
func parse(text []byte) (all []*x509.Certificate, err error) {
	if len(text) > maxChainPEM {
		return nil, fmt.Errorf("more than %d KiB", maxChainPEM>>10)
	}
	begun := bytes.Count(text, []byte("-----BEGIN "))
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			return nil, errors.New("it must be certificates in PEM, and nothing else: no private key belongs here")
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(all)+1, err)
		}
		all = append(all, c)
	}
	if len(all) == 0 || len(all) != begun || len(all) > maxChain {
		return nil, fmt.Errorf("it must be 1 to %d certificates in PEM, each of them whole", maxChain)
	}
	return all, nil
}

// check says why a chain would not do for the listener now.
func check(chain []*x509.Certificate, key signer, names []string) error {
	leaf, last := chain[0], chain[len(chain)-1]
	switch {
	case !isFor(leaf, key):
		return errors.New("the first certificate is not for the server's key: make a CSR, and have that signed")
	case leaf.IsCA || !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth) || leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return errors.New("the first certificate must be a server's: no authority, with key usage digitalSignature and extended key usage serverAuth")
	}
	for i, c := range chain[1:] {
		if err := chain[i].CheckSignatureFrom(c); err != nil {
			return fmt.Errorf("certificate %d does not vouch for certificate %d: the chain must be in order, the server's first: %w", i+2, i+1, err)
		}
	}
	o := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
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

func isFor(c *x509.Certificate, key signer) bool {
	public, ok := c.PublicKey.(*ecdsa.PublicKey)
	return ok && public.Equal(key.public)
}

// validFor reports that c is valid now and for some time after.
func validFor(c *x509.Certificate, now time.Time, left time.Duration) bool {
	return !now.Before(c.NotBefore) && now.Add(left).Before(c.NotAfter)
}

func encode(all ...*x509.Certificate) (text []byte) {
	for _, c := range all {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return text
}
