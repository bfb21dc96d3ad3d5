package webhook

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"syscall"
	"time"

	"countersign/internal/secret"
)

const (
	attemptTimeout = 10 * time.Second // for one attempt, the signature included
	maxResponse    = 64 << 10         // limit of a response's header and of its body, in bytes
)

// Errors of a delivery.
var (
	ErrUnknown = errors.New("there is no such webhook target")
	ErrGone    = errors.New("the target answered 410 Gone: it gets nothing more until the next start")
	ErrRefused = errors.New("the target did not take the message")
)

// Target is a receiver of messages.
type Target struct {
	Name string       // for operators, logs and callbacks
	URL  secret.Bytes // https, or http to this machine; often has a secret
	// CAFile is the path of certificate authorities in PEM, in place of the system's, or empty. The
	// file is read at each attempt.
	CAFile string
	// Types are the types of messages for the target. The caller asks by Takes. Default: all.
	Types []string
}

// The types of messages. The messages about alerts are alert.firing, alert.resolved and alert.test.
const (
	Rotations   = "key.rotation"
	Compromises = "key.compromise"
	Alerts      = "alert"
)

// Takes reports whether the target gets messages of a type.
func (t Target) Takes(kind string) bool { return len(t.Types) == 0 || slices.Contains(t.Types, kind) }

// Transport returns an HTTP transport for the target, with the authorities that CAFile has now. For
// an http URL the transport connects to this machine only.
func (t Target) Transport() (*http.Transport, error) {
	u, err := url.Parse(string(t.URL.Expose()))
	if err != nil {
		return nil, errors.New("the URL can't be parsed") // err would show the URL
	}
	at, err := netip.ParseAddr(u.Hostname())
	local := u.Hostname() == "localhost" || err == nil && at.IsLoopback()
	switch {
	case u.Scheme != "https" && (u.Scheme != "http" || !local):
		return nil, errors.New("the URL must begin with https:// (http:// only for localhost, 127.0.0.1 and ::1)")
	case u.Hostname() == "" || u.User != nil || u.Fragment != "":
		return nil, errors.New("the URL must have a host, no user, no password and no fragment")
	}
	trust, err := t.trust()
	if err != nil {
		return nil, err
	}
	dialer := net.Dialer{}
	if u.Scheme == "http" {
		// Control sees the resolved address: localhost may resolve to another machine.
		dialer.Control = func(_, address string, _ syscall.RawConn) error {
			if at, err := netip.ParseAddrPort(address); err != nil || !at.Addr().IsLoopback() {
				return errors.New("without TLS only to this machine")
			}
			return nil
		}
	}
	return &http.Transport{
		DialContext: dialer.DialContext, TLSClientConfig: trust, MaxResponseHeaderBytes: maxResponse,
		DisableKeepAlives: true, // messages are too rare to keep connections
	}, nil
}

// trust reads the certificate authorities of the target.
func (t Target) trust() (*tls.Config, error) {
	trust := &tls.Config{MinVersion: tls.VersionTLS12}
	if t.CAFile == "" {
		return trust, nil
	}
	pem, err := os.ReadFile(t.CAFile)
	if err != nil {
		return nil, err
	}
	trust.RootCAs = x509.NewCertPool()
	if !trust.RootCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s has no certificate in PEM", t.CAFile)
	}
	return trust, nil
}

// current returns the client for one attempt, with the authorities that CAFile has now: a renewed
// authority needs no restart.
func (q *queue) current() (*http.Client, error) {
	if q.CAFile == "" {
		return &q.client, nil
	}
	trust, err := q.trust()
	if err != nil {
		return nil, fmt.Errorf("ca_file: %w", err)
	}
	transport := q.client.Transport.(*http.Transport).Clone()
	transport.TLSClientConfig = trust
	return &http.Client{Transport: transport, CheckRedirect: q.client.CheckRedirect}, nil
}

// Send posts body, a JSON document, to a target in one attempt. A nil error means a 2xx response.
func (s *Sender) Send(ctx context.Context, target, id string, body []byte) error {
	t := s.targets[target]
	if t == nil {
		return ErrUnknown
	}
	return s.send(ctx, t, id, body)
}

// send makes one attempt, and notes the response 410 Gone.
func (s *Sender) send(ctx context.Context, t *queue, id string, body []byte) error {
	if t.gone.Load() {
		return ErrGone
	}
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	request, err := s.request(ctx, t.URL, id, body)
	if err != nil {
		return err
	}
	client, err := t.current()
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		var outer *url.Error // the text of an *url.Error shows the URL
		if errors.As(err, &outer) {
			err = outer.Err
		}
		return fmt.Errorf("post: %w", err)
	}
	defer response.Body.Close()
	io.CopyN(io.Discard, response.Body, maxResponse) // read the body, so that the receiver sees no reset
	switch {
	case response.StatusCode >= 200 && response.StatusCode < 300:
		return nil
	case response.StatusCode == http.StatusGone:
		t.gone.Store(true)
		return ErrGone
	}
	return fmt.Errorf("%w: it answered %d", ErrRefused, response.StatusCode)
}

// request makes a signed request with the present time. Each attempt needs a new signature, because
// the signature covers the timestamp.
func (s *Sender) request(ctx context.Context, to secret.Bytes, id string, body []byte) (*http.Request, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	at := time.Now().Unix()
	signature, err := s.c.Sign(ctx, message(id, at, body))
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	if len(signature) != ed25519.SignatureSize {
		return nil, fmt.Errorf("sign: an Ed25519 signature has %d bytes, the signer has returned %d",
			ed25519.SignatureSize, len(signature))
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, string(to.Expose()), bytes.NewReader(body))
	if err != nil {
		return nil, errors.New("the URL can't be used") // err would show the URL
	}
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("User-Agent", "countersign")
	request.Header.Set(headerID, id)
	request.Header.Set(headerTimestamp, strconv.FormatInt(at, 10))
	request.Header.Set(headerSignature, signaturePrefix+base64.StdEncoding.EncodeToString(signature))
	return request, nil
}
