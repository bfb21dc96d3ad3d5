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
	"strconv"
	"syscall"
	"time"
)

const (
	tryTime   = 10 * time.Second // for one try, the signature included
	maxAnswer = 64 << 10         // bytes that are read of an answer, its header and its body each
)

// How a message is not delivered.
var (
	ErrUnknown = errors.New("there is no such webhook target")
	ErrGone    = errors.New("the target answered 410 Gone: it gets nothing more until the next start")
	ErrRefused = errors.New("the target did not take the message")
)

// Target is somebody to tell.
type Target struct {
	Name   string // for people, logs and callbacks
	URL    string // https, or http to this machine; it may hold a secret, and is never shown
	CAFile string // PEM: the authorities to trust in place of the system's
}

// client gives what posts to t, and to nobody else.
func (t Target) client() (*http.Transport, error) {
	u, err := url.Parse(t.URL)
	if err != nil {
		return nil, errors.New("the URL can't be read") // the error would show it
	}
	at, err := netip.ParseAddr(u.Hostname())
	local := u.Hostname() == "localhost" || err == nil && at.IsLoopback()
	switch {
	case u.Scheme != "https" && (u.Scheme != "http" || !local):
		return nil, errors.New("the URL must begin with https:// (http:// only for localhost, 127.0.0.1 and ::1)")
	case u.Hostname() == "" || u.User != nil || u.Fragment != "":
		return nil, errors.New("the URL must have a host, no user, no password and no fragment")
	}
	trust := &tls.Config{MinVersion: tls.VersionTLS12}
	if t.CAFile != "" {
		pem, err := os.ReadFile(t.CAFile)
		if err != nil {
			return nil, err
		}
		trust.RootCAs = x509.NewCertPool()
		if !trust.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s has no certificate in PEM", t.CAFile)
		}
	}
	dialer := net.Dialer{}
	if u.Scheme == "http" {
		dialer.Control = func(_, address string, _ syscall.RawConn) error { // whatever localhost resolves to
			if at, err := netip.ParseAddrPort(address); err != nil || !at.Addr().IsLoopback() {
				return errors.New("without TLS only to this machine")
			}
			return nil
		}
	}
	return &http.Transport{
		DialContext: dialer.DialContext, TLSClientConfig: trust, MaxResponseHeaderBytes: maxAnswer,
		DisableKeepAlives: true, // messages are rare
	}, nil
}

// Send tries once to post body, which is JSON, to a target. nil means that it was taken (2xx).
func (s *Sender) Send(ctx context.Context, target, id string, body []byte) error {
	t := s.targets[target]
	if t == nil {
		return ErrUnknown
	}
	return s.send(ctx, t, id, body)
}

func (s *Sender) send(ctx context.Context, t *queue, id string, body []byte) error {
	if t.gone.Load() {
		return ErrGone
	}
	ctx, cancel := context.WithTimeout(ctx, tryTime)
	defer cancel()
	request, err := s.request(ctx, t.URL, id, body)
	if err != nil {
		return err
	}
	answer, err := t.client.Do(request)
	if err != nil {
		var outer *url.Error // it shows the URL
		if errors.As(err, &outer) {
			err = outer.Err
		}
		return fmt.Errorf("post: %w", err)
	}
	defer answer.Body.Close()
	io.CopyN(io.Discard, answer.Body, maxAnswer) // the status says it all; the rest is to end politely
	switch {
	case answer.StatusCode >= 200 && answer.StatusCode < 300:
		return nil
	case answer.StatusCode == http.StatusGone:
		t.gone.Store(true)
		return ErrGone
	}
	return fmt.Errorf("%w: it answered %d", ErrRefused, answer.StatusCode)
}

// request signs a try at the time of the try.
func (s *Sender) request(ctx context.Context, to, id string, body []byte) (*http.Request, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	at := time.Now().Unix()
	signature, err := s.c.Sign(ctx, message(id, at, body))
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	if len(signature) != ed25519.SignatureSize {
		return nil, errors.New("sign: it is not an Ed25519 signature")
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, to, bytes.NewReader(body))
	if err != nil {
		return nil, errors.New("the URL can't be used") // the error would show it
	}
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("User-Agent", "countersign")
	request.Header.Set(headerID, id)
	request.Header.Set(headerTimestamp, strconv.FormatInt(at, 10))
	request.Header.Set(headerSignature, signaturePrefix+base64.StdEncoding.EncodeToString(signature))
	return request, nil
}
