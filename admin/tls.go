package admin

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"strings"

	"countersign/admin/api"
	"countersign/audit"
)

// Certificates looks after the certificate of the loopback listener, whose key is in the keystore.
type Certificates interface {
	GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error)
	CA() []byte // PEM: whom to trust for it
	Own() bool  // the CA is the appliance's own
	CSR(ctx context.Context) ([]byte, error)
	Install(ctx context.Context, who audit.Actor, pem []byte) error
}

var errNoTLS = notFound.errorf("the appliance has no HTTPS listener: see admin_https in the configuration")

func (s *server) tls(_ context.Context, _ caller, _ *none) (doc api.TLS, err error) {
	if s.Certificates == nil {
		return doc, errNoTLS
	}
	cert, err := s.Certificates.GetCertificate(&tls.ClientHelloInfo{SupportedVersions: []uint16{tls.VersionTLS13}, SignatureSchemes: []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256}})
	if err != nil {
		return doc, err
	}
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		return doc, fmt.Errorf("the listener's certificate: %w", err)
	}
	doc = api.TLS{Certificate: chain(cert), CA: string(s.Certificates.CA()), Names: append([]string{}, leaf.DNSNames...), NotAfter: leaf.NotAfter.Unix(), Own: s.Certificates.Own()}
	for _, ip := range leaf.IPAddresses {
		doc.Names = append(doc.Names, ip.String())
	}
	return doc, nil
}

func (s *server) csr(ctx context.Context, _ caller, _ *none) (api.PEM, error) {
	if s.Certificates == nil {
		return api.PEM{}, errNoTLS
	}
	b, err := s.Certificates.CSR(ctx)
	return api.PEM{PEM: string(b)}, err
}

func (s *server) installCertificate(ctx context.Context, who caller, in *body[api.PEM]) (api.TLS, error) {
	if s.Certificates == nil {
		return api.TLS{}, errNoTLS
	}
	if err := s.Certificates.Install(ctx, who.actor(), []byte(in.Body.PEM)); err != nil {
		return api.TLS{}, err
	}
	return s.tls(ctx, who, nil)
}

// chain is the certificate and those that lead to its CA.
func chain(c *tls.Certificate) string {
	var b strings.Builder
	for _, der := range c.Certificate {
		pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: der}) // a Builder does not fail
	}
	return b.String()
}
