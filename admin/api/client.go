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
	"net/url"
	"strings"
	"sync"
	"sync/atomic"

	"countersign/audit"
)

// Error is a refusal: a problem document of RFC 9457, with a code for programs.
type Error struct {
	Type       string `json:"type" format:"uri" doc:"urn:countersign:error: and the code"`
	Title      string `json:"title" doc:"says what the code means"`
	Status     int    `json:"status" doc:"of HTTP"`
	Detail     string `json:"detail" doc:"what it is here, for people"`
	Code       string `json:"code"` // for example not_found; admin/openapi.json lists all codes
	RetryAfter int    `json:"retry_after,omitempty" doc:"seconds; with rate_limited"`

	Request string `json:"-"` // id of the refused request, from RequestHeader
}

// RequestHeader is the header of each answer with the id of the request, which is in the audit log
// and in the daemon's log too.
const RequestHeader = "Countersign-Request"

func (e *Error) Error() string {
	if e.Request == "" {
		return e.Code + ": " + e.Detail
	}
	return e.Code + ": " + e.Detail + " (request " + e.Request + ")"
}

// GetStatus returns the HTTP status. The server uses GetStatus, ContentType and GetHeaders.
func (e *Error) GetStatus() int { return e.Status }

// ContentType returns the content type of problem documents.
func (e *Error) ContentType(string) string { return "application/problem+json" }

// GetHeaders returns the HTTP headers of the refusal.
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

// Client is a client of the admin API of one appliance. A Client is safe for concurrent use.
type Client struct {
	http  *http.Client
	base  string
	token atomic.Pointer[string]

	signingIn sync.Mutex
	signIn    func(context.Context) (token string, err error)
}

// NewClient returns a client for the Unix socket at path.
func NewClient(path string) *Client {
	return &Client{base: "http://countersign", http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}}}
}

// NewHTTPSClient returns a client for the loopback listener at an address like
// https://localhost:7780. The client trusts only the CA certificates in caPEM.
func NewHTTPSClient(url string, caPEM []byte) (*Client, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(caPEM) {
		return nil, errors.New("there is no certificate in the PEM of the CA")
	}
	return &Client{base: strings.TrimSuffix(url, "/"), http: &http.Client{
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13}},
		// A redirect would send the token to another address.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// SetToken sets the session's token for the next requests. An empty token means signed out.
func (c *Client) SetToken(token string) { c.token.Store(&token) }

// WithToken returns a client with a token of its own, over the same connections.
func (c *Client) WithToken(token string) *Client {
	other := &Client{http: c.http, base: c.base}
	other.SetToken(token)
	return other
}

// OnSignedOut sets a function for an answer signed_out. The client calls signIn, and sends the
// request once more with the new token. If signIn fails, the caller gets the answer signed_out.
// OnSignedOut must be called before the first request.
func (c *Client) OnSignedOut(signIn func(context.Context) (token string, err error)) {
	c.signIn = signIn
}

// ReadFile returns a file of the audit log in the form of C2SP tlog-tiles. With ReadFile, the
// client is an audit.Source.
func (c *Client) ReadFile(ctx context.Context, name string) ([]byte, error) {
	b, _, err := c.page(ctx, name, nil)
	return b, err
}

// page returns the bytes of an answer and the cursor of the next page.
func (c *Client) page(ctx context.Context, name string, q url.Values) (b []byte, next string, err error) {
	path := "/" + name
	if len(q) > 0 {
		path += "?" + q.Encode()
	}
	resp, err := c.send(ctx, http.MethodGet, path, nil)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	b, err = audit.ReadAll(name, resp.Body)
	switch {
	case err != nil:
		return nil, "", err
	case resp.StatusCode == http.StatusNotFound:
		return nil, "", fmt.Errorf("%s: %w", name, fs.ErrNotExist)
	case resp.StatusCode != http.StatusOK:
		return nil, "", refusal(resp, b)
	}
	return b, resp.Header.Get(nextHeader), nil
}

// Metrics returns the metrics in the text format of Prometheus.
func (c *Client) Metrics(ctx context.Context) ([]byte, error) {
	resp, err := c.send(ctx, http.MethodGet, "/v1/metrics", nil)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = refusal(resp, b)
	}
	return b, err
}

// send sends a request with further headers, names and values in turn, and after an answer
// signed_out once more with the token of signIn.
func (c *Client) send(
	ctx context.Context, method, path string, body []byte, header ...string,
) (*http.Response, error) {
	token := ""
	if t := c.token.Load(); t != nil {
		token = *t
	}
	resp, err := c.sendAs(ctx, token, method, path, body, header)
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
	if now := c.token.Load(); now == nil || *now == token { // otherwise another call has signed in meanwhile
		fresh, err := c.signIn(ctx)
		if err != nil {
			return resp, nil
		}
		c.SetToken(fresh)
	}
	return c.sendAs(ctx, *c.token.Load(), method, path, body, header)
}

func (c *Client) sendAs(
	ctx context.Context, token, method, path string, body []byte, header []string,
) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	return c.http.Do(req)
}

func refusal(resp *http.Response, b []byte) error {
	e := new(Error)
	if json.Unmarshal(b, e) != nil || e.Code == "" {
		return fmt.Errorf("the admin API answers %s", resp.Status)
	}
	e.Request = resp.Header.Get(RequestHeader)
	return e
}

func (c *Client) do(ctx context.Context, method, path string, body, result any) error {
	_, err := c.call(ctx, method, path, body, result)
	return err
}

// call sends a request, reads the answer into result, and returns the headers of the answer.
func (c *Client) call(ctx context.Context, method, path string, body, result any) (http.Header, error) {
	var b []byte
	if body != nil {
		var err error
		if b, err = json.Marshal(body); err != nil {
			return nil, err
		}
	}
	resp, err := c.send(ctx, method, path, b)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if b, err = io.ReadAll(resp.Body); err != nil {
		return nil, err
	}
	if resp.StatusCode/100 != 2 {
		return nil, refusal(resp, b)
	}
	if result == nil {
		return resp.Header, nil
	}
	return resp.Header, json.Unmarshal(b, result)
}

// nextHeader has the cursor of the next page of a listing.
const nextHeader = "Countersign-Next"

// list returns the documents of all pages of a listing.
func list[D any](ctx context.Context, c *Client, path string) ([]D, error) {
	all := []D{}
	for after := ""; ; {
		var some []D
		header, err := c.call(ctx, http.MethodGet, path+"?after="+url.QueryEscape(after), nil, &some)
		if err != nil {
			return nil, err
		}
		all = append(all, some...)
		if after = header.Get(nextHeader); after == "" {
			return all, nil
		}
	}
}
