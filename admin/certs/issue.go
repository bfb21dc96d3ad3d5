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
	authorityLife   = 20 * 365 * day
	certificateLife = 90 * day
	backdate        = time.Hour        // for clocks that are behind
	signTime        = 10 * time.Second // for one signature of the keystore
)

// loopback is what the listener is called on this machine, whatever else it is called.
var loopback = []string{"localhost", "127.0.0.1", "::1"}

// checkName takes a name in its only form, so that names can be compared.
func checkName(name string) error {
	if at, err := netip.ParseAddr(name); err == nil {
		if at.Zone() != "" || at.Is4In6() || at.String() != name {
			return fmt.Errorf("name of the admin API: write the address %q without a zone, and in its short form", name)
		}
		return nil
	}
	ok := len(name) <= 253 && strings.Trim(name, "0123456789.") != ""
	for label := range strings.SplitSeq(name, ".") {
		ok = ok && label != "" && len(label) <= 63 && label[0] != '-' && label[len(label)-1] != '-' &&
			strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
	}
	if !ok {
		return fmt.Errorf("name of the admin API: %q is not a host name in lower case, nor an IP address", name)
	}
	return nil
}

// ownNames are the names of a certificate of our own, sorted.
func ownNames(names []string) []string {
	return sorted(slices.Concat(names, loopback))
}

func sorted(names []string) []string {
	slices.Sort(names)
	return slices.Compact(names)
}

// namesOf are the names that a certificate is for, sorted.
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

// speaksFor reports that an authority of ours was made for all of names.
func speaksFor(authority *x509.Certificate, names []string) bool {
	may := slices.Clone(authority.PermittedDNSDomains)
	for _, n := range authority.PermittedIPRanges {
		may = append(may, n.IP.String())
	}
	return !slices.ContainsFunc(names, func(name string) bool { return !slices.Contains(may, name) })
}

// newAuthority makes a certificate that can vouch for servers of these names, and for nothing else: whoever gets hold of its
// key can't be another server to the clients that trust it.
func newAuthority(key signer, names []string) (*x509.Certificate, error) {
	encoded, err := key.public.Bytes()
	if err != nil {
		return nil, err
	}
	id := sha256.Sum256(encoded)
	now := time.Now()
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: fmt.Sprintf("Countersign authority %x", id[:4])}, // one for each key
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(authorityLife),
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
		template.PermittedIPRanges = append(template.PermittedIPRanges, &net.IPNet{IP: ip, Mask: net.CIDRMask(8*len(ip), 8*len(ip))})
	}
	return create(template, template, key.public, key)
}

// newCertificate makes a server's certificate.
func newCertificate(authority *x509.Certificate, key signer, public *ecdsa.PublicKey, names []string) (*x509.Certificate, error) {
	now := time.Now()
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "Countersign"},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(certificateLife),
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

// wanted is what a CSR asks for, so that a CA that copies extensions makes a certificate that can be installed (RFC 5280, sections 4.2.1.3
// and 4.2.1.12).
var wanted = []pkix.Extension{
	{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Critical: true, Value: []byte{0x03, 0x02, 0x07, 0x80}},                                 // key usage: digitalSignature
	{Id: asn1.ObjectIdentifier{2, 5, 29, 37}, Value: []byte{0x30, 0x0a, 0x06, 0x08, 0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, 0x01}}, // extended: serverAuth
}

func newRequest(key signer, names []string) ([]byte, error) {
	template := &x509.CertificateRequest{SignatureAlgorithm: x509.ECDSAWithSHA256, ExtraExtensions: wanted}
	if len(names[0]) <= 64 { // what a common name may have
		template.Subject.CommonName = names[0]
	}
	template.DNSNames, template.IPAddresses = split(names)
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		return nil, fmt.Errorf("certificate signing request: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}

// signer is a key of the keystore as crypto/tls and crypto/x509 use it: a crypto.MessageSigner, since the keystore hashes for
// itself.
type signer struct {
	ctx    context.Context // of the handshake or call that it is for; nil until then
	key    keystore.Key
	public *ecdsa.PublicKey
	turn   chan struct{} // held while the keystore signs: one at a time, so that who opens many connections keeps no peer from the device
}

func newSigner(key keystore.Key) (signer, error) {
	info := key.Info()
	public, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), info.PublicKey)
	if info.Algorithm != keystore.P256 || err != nil {
		return signer{}, fmt.Errorf("key %v is not a P-256 key, which TLS needs", info.Ref)
	}
	return signer{key: key, public: public, turn: make(chan struct{}, 1)}, nil
}

func (s signer) in(ctx context.Context) signer { s.ctx = ctx; return s }

func (s signer) Public() crypto.PublicKey { return s.public }

func (s signer) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("the keystore signs messages, and no digests")
}

func (s signer) SignMessage(_ io.Reader, message []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts.HashFunc() != crypto.SHA256 {
		return nil, fmt.Errorf("the keystore signs with SHA-256, and not with %v", opts.HashFunc())
	}
	ctx, cancel := context.WithTimeout(s.ctx, signTime)
	defer cancel()
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	info := s.key.Info()
	return s.key.Sign(ctx, message, func(signature []byte) bool { return info.Verify(message, signature) })
}
