// Package form knows which bytes each key may sign. A key worker asks before each signature, and
// decides by itself: a daemon in other hands gets no signature of another form from a key. Begin
// reading at Recognise; Guard puts the question in front of a device.
//
// The form follows from the key's name, which the token has in the key's label, or the TPM in its
// seal: the device compares the name with the label at the first use of a key, and the label can't
// be changed. So the daemon's word decides nothing.
//
//	audit-log   checkpoints of its own log (C2SP tlog-checkpoint), webhooks (Standard Webhooks)
//	admin-tls   TLS 1.3 handshakes of a server (RFC 8446 section 4.4.3), and requests of
//	            certificates for its own public key (RFC 2986)
//	admin-ca    X.509 certificates: its own, and those of servers for at most 90 days (RFC 5280)
//	raw-...     documents of the type raw, and the steps to the successor (key-succession-v1)
//	all others  documents of every type but raw, if the key is for Ed25519
//
// Each signing key also signs canaries: a key has to prove itself before it comes into use.
package form

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"countersign/audit"
	"countersign/internal/keystore"
	"countersign/internal/webhook"
	"countersign/transcript"
)

// Kinds of forms beside the types of documents.
const (
	Canary      = "canary"
	Checkpoint  = "checkpoint"
	Webhook     = "webhook"
	Handshake   = "tls-handshake"
	Request     = "certificate-request"
	Certificate = "certificate"
)

// Use is what a signature is for.
type Use struct {
	Kind    string   // a type of document, or one of the kinds above
	Detail  string   // checkpoint: EPOCH/SIZE; webhook: its id; otherwise ""
	Digest  [32]byte // document: Document.Digest; webhook: SHA-256 of the body; otherwise of the message
	Message []byte   // the bytes to sign
}

// RawPrefix begins the names of keys that sign documents of the type raw.
const RawPrefix = "raw-"

// CheckDocument refuses a type of document that keys of this name do not sign. The error wraps
// keystore.ErrForm.
func CheckDocument(name, kind string) error {
	raw := strings.HasPrefix(name, RawPrefix)
	switch {
	case isOwn(name):
		return fmt.Errorf("%w: the appliance's own key %s signs no documents", keystore.ErrForm, name)
	case raw && kind != "raw" && kind != "key-succession-v1":
		return fmt.Errorf("%w: key %s signs documents of the type raw only, as all keys whose names begin with %s",
			keystore.ErrForm, name, RawPrefix)
	case !raw && kind == "raw":
		return fmt.Errorf("%w: documents of the type raw are signed by keys whose names begin with %s only; "+
			"the name of this key is %s", keystore.ErrForm, RawPrefix, name)
	}
	return nil
}

func isOwn(name string) bool {
	return slices.Contains([]string{keystore.NoiseName, keystore.LogName, keystore.AdminName, keystore.CAName}, name)
}

// Recognise reads the input of a key, and refuses all that a key of this name and public key does
// not sign. The error wraps keystore.ErrForm and has no part of the input.
func Recognise(key keystore.Info, input []byte) (Use, error) {
	u, err := recognise(key, input)
	if err != nil {
		return Use{}, fmt.Errorf("%v: %w: %w", key.Ref, keystore.ErrForm, err)
	}
	return u, nil
}

func recognise(key keystore.Info, input []byte) (Use, error) {
	if rest, ok := bytes.CutPrefix(input, []byte(canaryDomain)); ok {
		if len(rest) != canarySize {
			return Use{}, fmt.Errorf("a canary has %d bytes behind its domain, not %d", canarySize, len(rest))
		}
		return of(Canary, "", input), nil
	}
	switch name := key.Ref.Name; {
	case name == keystore.LogName && key.Algorithm == keystore.Ed25519:
		return ofLog(key.PublicKey, input)
	case name == keystore.AdminName && key.Algorithm == keystore.P256:
		return ofServer(key.PublicKey, input)
	case name == keystore.CAName && key.Algorithm == keystore.P256:
		return ofAuthority(key.PublicKey, input)
	case !isOwn(name) && key.Algorithm == keystore.Ed25519:
		return ofDocument(name, key.PublicKey, input)
	}
	return Use{}, fmt.Errorf("a key for %s under this name signs canaries only", key.Algorithm)
}

// of is a use whose message is the input.
func of(kind, detail string, input []byte) Use {
	return Use{Kind: kind, Detail: detail, Digest: sha256.Sum256(input), Message: input}
}

// canaryDomain separates canaries from all others: no other form begins with these bytes.
const (
	canaryDomain = "countersign-canary-v1\x00"
	canarySize   = 32
)

// NewCanary returns a random message for the proof of a key.
func NewCanary() []byte {
	message := append([]byte(canaryDomain), make([]byte, canarySize)...)
	rand.Read(message[len(canaryDomain):])
	return message
}

func ofDocument(name string, public, input []byte) (Use, error) {
	if !transcript.IsInput(input) {
		return Use{}, errors.New("it signs documents and canaries only")
	}
	d, err := transcript.ParseInput(input, public)
	if err != nil {
		return Use{}, err
	}
	if err := CheckDocument(name, d.Type); err != nil {
		return Use{}, err
	}
	return Use{Kind: d.Type, Digest: d.Digest(), Message: d.Message}, nil
}

// ofLog recognises checkpoints and webhooks. The two can't be mistaken for each other: the origin
// of a checkpoint has a slash, which no id of a webhook has.
func ofLog(public, input []byte) (Use, error) {
	log, err := audit.NewLog(public)
	if err != nil {
		return Use{}, err
	}
	if c, err := log.ParseBody(input); err == nil {
		return of(Checkpoint, fmt.Sprintf("%d/%d", c.Epoch, c.Size), input), nil
	}
	if id, body, err := webhook.ParseMessage(input); err == nil {
		// Each attempt has another timestamp. The body is what the audit log has.
		return Use{Kind: Webhook, Detail: id, Digest: sha256.Sum256(body), Message: input}, nil
	}
	return Use{}, errors.New("it signs checkpoints of its log, webhooks and canaries only")
}

// handshakeContext begins the content of a server's CertificateVerify (RFC 8446 section 4.4.3). The
// hash of the handshake follows: SHA-256 or SHA-384, by the cipher suite.
var handshakeContext = append(bytes.Repeat([]byte{' '}, 64), "TLS 1.3, server CertificateVerify\x00"...)

// bitString is an empty signature, for parsers that want one.
var bitString = asn1.BitString{Bytes: []byte{0}, BitLength: 8}

// algorithm is ecdsa-with-SHA256 (RFC 5758 section 3.2).
var algorithm = pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}}

// signed wraps DER to be signed as its signed form, with an empty signature.
func signed(input []byte) ([]byte, error) {
	return asn1.Marshal(struct {
		Content   asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}{asn1.RawValue{FullBytes: input}, algorithm, bitString})
}

func ofServer(public, input []byte) (Use, error) {
	if hash, ok := bytes.CutPrefix(input, handshakeContext); ok && (len(hash) == 32 || len(hash) == 48) {
		return of(Handshake, "", input), nil
	}
	der, err := signed(input)
	if err != nil {
		return Use{}, errServer
	}
	r, err := x509.ParseCertificateRequest(der)
	if err != nil || !bytes.Equal(r.RawTBSCertificateRequest, input) || !isKey(r.PublicKey, public) {
		return Use{}, errServer
	}
	return of(Request, "", input), nil
}

var errServer = errors.New("it signs TLS 1.3 handshakes, requests of certificates for itself and canaries only")

// isKey reports a P-256 public key in the form of keystore.Info.
func isKey(key any, public []byte) bool {
	k, ok := key.(*ecdsa.PublicKey)
	if !ok {
		return false
	}
	b, err := k.Bytes()
	return err == nil && bytes.Equal(b, public)
}

// maxServerLife bounds the life of a server's certificate: 90 days, and an hour for slow clocks.
const maxServerLife = 90*24*time.Hour + time.Hour

func ofAuthority(public, input []byte) (Use, error) {
	der, err := signed(input)
	if err != nil {
		return Use{}, errAuthority
	}
	c, err := x509.ParseCertificate(der)
	if err != nil || !bytes.Equal(c.RawTBSCertificate, input) || c.SignatureAlgorithm != x509.ECDSAWithSHA256 ||
		!c.BasicConstraintsValid || len(c.UnknownExtKeyUsage) != 0 || len(c.UnhandledCriticalExtensions) != 0 ||
		!slices.Equal(c.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}) {
		return Use{}, errAuthority
	}
	own := isKey(c.PublicKey, public)
	switch {
	case own && c.IsCA && c.MaxPathLenZero && c.KeyUsage == x509.KeyUsageCertSign && c.PermittedDNSDomainsCritical:
	case !own && !c.IsCA && c.KeyUsage == x509.KeyUsageDigitalSignature && c.NotAfter.Sub(c.NotBefore) <= maxServerLife:
	default:
		return Use{}, errAuthority
	}
	return of(Certificate, "", input), nil
}

var errAuthority = errors.New("it signs its own certificate, certificates of servers for 90 days and canaries only")
