package api

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"

	"countersign/audit"
)

// Error is a refusal: a document of RFC 9457, with a code for programs.
type Error struct {
	Type       string `json:"type" format:"uri" doc:"urn:countersign:error: and the code"`
	Title      string `json:"title" doc:"says what the code means"`
	Status     int    `json:"status" doc:"of HTTP"`
	Detail     string `json:"detail" doc:"what it is here, for people"`
	Code       string `json:"code" enum:"invalid,exists,not_found,unavailable,signed_out,not_allowed,uninitialised,locked,rolled_back,conflict,needs_approval,rate_limited,not_proven"`
	RetryAfter int    `json:"retry_after,omitempty" doc:"seconds; with rate_limited"`
}

func (e *Error) Error() string { return e.Code + ": " + e.Detail }

// GetStatus, ContentType and GetHeaders say to the server how the document is sent.
func (e *Error) GetStatus() int { return e.Status }

func (e *Error) ContentType(string) string { return "application/problem+json" }

func (e *Error) GetHeaders() http.Header {
	h := http.Header{}
	if e.RetryAfter > 0 {
		h.Set("Retry-After", fmt.Sprint(e.RetryAfter))
	}
	if e.Status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", "Bearer")
	}
	return h
}

// Client talks to an appliance. It is safe for concurrent use.
type Client struct {
	http  *http.Client
	base  string
	token atomic.Pointer[string]

	signingIn sync.Mutex
	signIn    func(context.Context) (token string, err error)
}

// NewClient returns a client for the socket at path.
func NewClient(path string) *Client {
	return &Client{base: "http://countersign", http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}}}
}

// NewHTTPSClient returns a client for the loopback listener at an address like https://localhost:7780. It trusts the certificates in
// caPEM and no others.
func NewHTTPSClient(url string, caPEM []byte) (*Client, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(caPEM) {
		return nil, errors.New("there is no certificate in the PEM of the CA")
	}
	return &Client{base: strings.TrimSuffix(url, "/"), http: &http.Client{
		Transport:     &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13}},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }, // which would take the token along
	}}, nil
}

// SetToken has the client show a session's token from now on; "" signs it out on its side.
func (c *Client) SetToken(token string) { c.token.Store(&token) }

// WithToken returns a client of the same connections with a token of its own.
func (c *Client) WithToken(token string) *Client {
	other := &Client{http: c.http, base: c.base}
	other.SetToken(token)
	return other
}

// OnSignedOut has signIn called when an answer is signed_out; then what was asked is asked once more with its token. Where it fails, the
// answer counts. Call it before the client is used.
func (c *Client) OnSignedOut(signIn func(context.Context) (token string, err error)) {
	c.signIn = signIn
}

// ReadFile gets a file of the audit log's static form: it makes the client an audit.Source.
func (c *Client) ReadFile(ctx context.Context, name string) ([]byte, error) {
	resp, err := c.send(ctx, http.MethodGet, "/"+name, nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := audit.ReadAll(name, resp.Body)
	switch {
	case err != nil:
		return nil, err
	case resp.StatusCode == http.StatusNotFound:
		return nil, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
	case resp.StatusCode != http.StatusOK:
		return nil, refusal(resp, b)
	}
	return b, nil
}

// send asks, and once more where that was signed out and somebody can be signed in.
func (c *Client) send(ctx context.Context, method, path string, body []byte) (*http.Response, error) {
	token := ""
	if t := c.token.Load(); t != nil {
		token = *t
	}
	resp, err := c.sendAs(ctx, token, method, path, body)
	if err != nil || resp.StatusCode != http.StatusUnauthorized || c.signIn == nil {
		return resp, err
	}
	b, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil {
		return nil, err
	}
	resp.Body = io.NopCloser(bytes.NewReader(b))
	if e, is := errors.AsType[*Error](refusal(resp, b)); !is || e.Code != "signed_out" {
		return resp, nil
	}
	c.signingIn.Lock()
	defer c.signingIn.Unlock()
	if now := c.token.Load(); now == nil || *now == token { // else another call has signed in meanwhile
		fresh, err := c.signIn(ctx)
		if err != nil {
			return resp, nil
		}
		c.SetToken(fresh)
	}
	return c.sendAs(ctx, *c.token.Load(), method, path, body)
}

func (c *Client) sendAs(ctx context.Context, token, method, path string, body []byte) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	return c.http.Do(req)
}

func refusal(resp *http.Response, b []byte) error {
	e := new(Error)
	if json.Unmarshal(b, e) != nil || e.Code == "" {
		return fmt.Errorf("the admin API answers %s", resp.Status)
	}
	return e
}

func (c *Client) do(ctx context.Context, method, path string, body, result any) error {
	var b []byte
	if body != nil {
		var err error
		if b, err = json.Marshal(body); err != nil {
			return err
		}
	}
	resp, err := c.send(ctx, method, path, b)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if b, err = io.ReadAll(resp.Body); err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		return refusal(resp, b)
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(b, result)
}
