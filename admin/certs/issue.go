package certs

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"countersign/internal/keystore"
)

const (
	authorityLifetime   = 20 * 365 * day
	certificateLifetime = 90 * day
	backdate            = time.Hour        // of NotBefore, for clients with slow clocks
	signTimeout         = 10 * time.Second // for one signature of the keystore
)

// loopback has the listener's names on its own machine. Every own certificate includes them.
var loopback = []string{"localhost", "127.0.0.1", "::1"}

// checkName accepts a DNS name or IP address in canonical form only, because names are compared as
// strings.
func checkName(name string) error {
	if at, err := netip.ParseAddr(name); err == nil {
		if at.Zone() != "" || at.Is4In6() || at.String() != name {
			return fmt.Errorf("name of the admin API: "+
				"write the address %q in its shortest form, without a zone", name)
		}
		return nil
	}
	ok := len(name) <= 253 && strings.Trim(name, "0123456789.") != ""
	for label := range strings.SplitSeq(name, ".") {
		ok = ok && label != "" && len(label) <= 63 && label[0] != '-' && label[len(label)-1] != '-' &&
			strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
	}
	if !ok {
		return fmt.Errorf("name of the admin API: %q must be a host name in lower case or an IP address", name)
	}
	return nil
}

// ownNames returns the sorted names of an own certificate: the configured ones and loopback.
func ownNames(names []string) []string {
	return sorted(slices.Concat(names, loopback))
}

func sorted(names []string) []string {
	slices.Sort(names)
	return slices.Compact(names)
}

// namesOf returns the sorted DNS names and IP addresses of a certificate.
func namesOf(c *x509.Certificate) []string {
	names := slices.Clone(c.DNSNames)
	for _, ip := range c.IPAddresses {
		names = append(names, ip.String())
	}
	return sorted(names)
}

func split(names []string) (dns []string, ips []net.IP) {
	for _, name := range names {
		if ip := net.ParseIP(name); ip != nil {
			ips = append(ips, ip)
		} else {
			dns = append(dns, name)
		}
	}
	return dns, ips
}

// covers reports whether the name constraints of an own authority permit all names.
func covers(authority *x509.Certificate, names []string) bool {
	permitted := slices.Clone(authority.PermittedDNSDomains)
	for _, n := range authority.PermittedIPRanges {
		permitted = append(permitted, n.IP.String())
	}
	return !slices.ContainsFunc(names, func(name string) bool { return !slices.Contains(permitted, name) })
}

// newAuthority issues a self-signed CA certificate. The name constraints limit the authority to
// servers of these names: a thief of the key can't impersonate other servers to clients that
// trust the authority.
func newAuthority(key signer, names []string) (*x509.Certificate, error) {
	encoded, err := key.public.Bytes()
	if err != nil {
		return nil, err
	}
	id := sha256.Sum256(encoded)
	now := time.Now()
	template := &x509.Certificate{
		// Each key has a common name of its own.
		Subject:               pkix.Name{CommonName: fmt.Sprintf("Countersign authority %x", id[:4])},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(authorityLifetime),
		BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true,
		KeyUsage:                    x509.KeyUsageCertSign,
		ExtKeyUsage:                 []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		PermittedDNSDomainsCritical: true,
	}
	dns, ips := split(names)
	template.PermittedDNSDomains = dns
	for _, ip := range ips {
		if ip4 := ip.To4(); ip4 != nil {
			ip = ip4
		}
		single := &net.IPNet{IP: ip, Mask: net.CIDRMask(8*len(ip), 8*len(ip))}
		template.PermittedIPRanges = append(template.PermittedIPRanges, single)
	}
	return create(template, template, key.public, key)
}

// newCertificate issues a server's certificate, signed by the authority's key.
func newCertificate(
	authority *x509.Certificate, key signer, public *ecdsa.PublicKey, names []string,
) (*x509.Certificate, error) {
	now := time.Now()
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "Countersign"},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(certificateLifetime),
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	template.DNSNames, template.IPAddresses = split(names)
	return create(template, authority, public, key)
}

func create(template, parent *x509.Certificate, public *ecdsa.PublicKey, key signer) (*x509.Certificate, error) {
	template.SignatureAlgorithm = x509.ECDSAWithSHA256
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// requestExtensions are the key usages in a CSR. A CA that copies extensions from the CSR then
// issues a certificate accepted by Install (RFC 5280, sections 4.2.1.3 and 4.2.1.12).
var requestExtensions = []pkix.Extension{
	{ // key usage: digitalSignature
		Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Critical: true,
		Value: []byte{0x03, 0x02, 0x07, 0x80},
	},
	{ // extended key usage: serverAuth
		Id:    asn1.ObjectIdentifier{2, 5, 29, 37},
		Value: []byte{0x30, 0x0a, 0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x01},
	},
}

func newRequest(key signer, names []string) ([]byte, error) {
	template := &x509.CertificateRequest{SignatureAlgorithm: x509.ECDSAWithSHA256, ExtraExtensions: requestExtensions}
	if len(names[0]) <= 64 { // the longest common name (RFC 5280, ub-common-name)
		template.Subject.CommonName = names[0]
	}
	template.DNSNames, template.IPAddresses = split(names)
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		return nil, fmt.Errorf("certificate signing request: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}

// signer adapts a key of the keystore to crypto/tls and crypto/x509. signer implements
// crypto.MessageSigner, because the keystore computes the hash.
type signer struct {
	ctx    context.Context // of one handshake or call; nil before withContext
	key    keystore.Key
	public *ecdsa.PublicKey
	// semaphore allows one signature at a time. A client with many connections then occupies at
	// most one operation of the device, and peers keep access.
	semaphore chan struct{}
	// record is called before a signature; nil for handshakes.
	record func(message []byte) error
}

func newSigner(key keystore.Key) (signer, error) {
	info := key.Info()
	public, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), info.PublicKey)
	if info.Algorithm != keystore.P256 || err != nil {
		return signer{}, fmt.Errorf("key %v is not a P-256 key: TLS needs P-256", info.Ref)
	}
	return signer{key: key, public: public, semaphore: make(chan struct{}, 1)}, nil
}

func (s signer) withContext(ctx context.Context) signer { s.ctx = ctx; return s }

// recorded is for signatures that are recorded before.
func (s signer) recorded(ctx context.Context, record Recorder, kind string) signer {
	s.ctx = ctx
	s.record = func(message []byte) error { return record(ctx, kind, s.key.Info().Ref, sha256.Sum256(message)) }
	return s
}

func (s signer) Public() crypto.PublicKey { return s.public }

func (s signer) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("the keystore signs messages, not digests")
}

func (s signer) SignMessage(_ io.Reader, message []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts.HashFunc() != crypto.SHA256 {
		return nil, fmt.Errorf("the keystore signs with SHA-256, not with %v", opts.HashFunc())
	}
	ctx, cancel := context.WithTimeout(s.ctx, signTimeout)
	defer cancel()
	select {
	case s.semaphore <- struct{}{}:
		defer func() { <-s.semaphore }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if s.record != nil {
		if err := s.record(message); err != nil {
			return nil, err
		}
	}
	info := s.key.Info()
	return s.key.Sign(ctx, message, func(signature []byte) bool { return info.Verify(message, signature) })
}
