package trace

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"countersign/internal/keystore"

	"golang.org/x/net/http/httpguts"
)

// The types of a message: ExportTraceServiceRequest of opentelemetry-proto 1 in the JSON of OTLP
// 1.5, with ids in hex and 64-bit numbers as text.
type (
	message struct {
		ResourceSpans []resourceSpans `json:"resourceSpans"`
	}
	resourceSpans struct {
		Resource   resource     `json:"resource"`
		ScopeSpans []scopeSpans `json:"scopeSpans"`
	}
	resource struct {
		Attributes []attribute `json:"attributes"`
	}
	scopeSpans struct {
		Scope scope  `json:"scope"`
		Spans []span `json:"spans"`
	}
	scope struct {
		Name    string `json:"name"`
		Version string `json:"version"`
	}
	span struct {
		TraceID      string      `json:"traceId"`
		SpanID       string      `json:"spanId"`
		ParentSpanID string      `json:"parentSpanId,omitempty"`
		Flags        int         `json:"flags"`
		Name         string      `json:"name"`
		Kind         int         `json:"kind"`
		Start        string      `json:"startTimeUnixNano"`
		End          string      `json:"endTimeUnixNano"`
		Attributes   []attribute `json:"attributes,omitempty"`
		Status       *status     `json:"status,omitempty"`
	}
	status struct {
		Code int `json:"code"`
	}
	attribute struct {
		Key   string `json:"key"`
		Value value  `json:"value"`
	}
	value struct {
		String string `json:"stringValue,omitempty"`
		Int    string `json:"intValue,omitempty"` // decimal
	}
)

// Values of enumerations, and the flags: sampled, and the bit that says that the next one is known.
// The parent of the request's span is in another process (remote), that of a stage's is not.
const (
	kindInternal = 1
	kindServer   = 2
	statusError  = 2
	flags        = 0x101
	remote       = 0x200
)

func text(key, is string) attribute { return attribute{key, value{String: is}} }

// encode returns the message with the traces of requests, and the number of its spans.
func (t *Tracer) encode(batch []*Request) (body []byte, spans int) {
	var all []span
	for _, r := range batch {
		all = r.append(all)
	}
	body, err := json.Marshal(message{[]resourceSpans{{
		Resource:   resource{[]attribute{text("service.name", "countersignd"), text("service.version", t.c.Version)}},
		ScopeSpans: []scopeSpans{{scope{"countersign", t.c.Version}, all}},
	}}})
	if err != nil {
		panic("trace: a message that is not JSON: " + err.Error()) // texts and numbers always marshal
	}
	return body, len(all)
}

// append appends the spans of a request.
func (r *Request) append(all []span) []span {
	trace, id := hex.EncodeToString(r.trace[:]), hex.EncodeToString(r.span[:])
	whole := span{
		TraceID: trace, SpanID: id, Flags: flags, Name: r.op, Kind: kindServer,
		Start: nanos(r.began), End: nanos(r.ended),
		Attributes: []attribute{text("countersign.request", r.request)},
	}
	if r.parent != [8]byte{} {
		whole.ParentSpanID, whole.Flags = hex.EncodeToString(r.parent[:]), flags|remote
	}
	if r.code != "" {
		whole.Attributes = append(whole.Attributes, text("error.type", r.code))
		whole.Status = &status{statusError}
	}
	all = append(all, whole)
	for _, s := range r.stages {
		stage := newSpan()
		all = append(all, span{
			TraceID: trace, SpanID: hex.EncodeToString(stage[:]), ParentSpanID: id, Flags: flags, Name: s.Name,
			Kind: kindInternal, Start: nanos(s.From), End: nanos(s.To),
			Attributes: []attribute{{"countersign.took_ns", value{Int: strconv.FormatInt(s.Took.Nanoseconds(), 10)}}},
		})
	}
	return all
}

func nanos(at time.Time) string { return strconv.FormatInt(at.UnixNano(), 10) }

// maxHeaders is the number of headers of a file.
const maxHeaders = 16

// headers reads the file with the headers of each message: a line NAME: VALUE for each header. An
// error has no value, which is a secret.
func (c Config) headers() (http.Header, error) {
	all := http.Header{}
	if c.Headers == "" {
		return all, nil
	}
	b, err := keystore.ReadSecret(c.Headers, "file of headers")
	if err != nil {
		return nil, err
	}
	defer b.Wipe()
	for n, line := range strings.Split(strings.TrimRight(string(b.Expose()), "\r\n"), "\n") {
		name, value, found := strings.Cut(strings.TrimSuffix(line, "\r"), ":")
		value = strings.Trim(value, " \t")
		if !found || !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidHeaderFieldValue(value) || n >= maxHeaders {
			return nil, fmt.Errorf("file of headers %s: line %d is no header NAME: VALUE, or one of more than %d",
				c.Headers, n+1, maxHeaders)
		}
		all.Add(name, value)
	}
	return all, nil
}

const (
	attempt     = 10 * time.Second
	maxResponse = 64 << 10 // bytes
)

// send posts a message once. rejected is the number of spans that the collector has refused for
// good. again says that the collector may take the message later.
func (t *Tracer) send(ctx context.Context, body []byte) (rejected int, again bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, attempt)
	defer cancel()
	headers, err := t.c.headers()
	if err != nil {
		return 0, true, err
	}
	transport, err := t.c.Target.Transport() // with the authorities that the file has now
	if err != nil {
		return 0, true, err
	}
	to := string(t.c.Target.URL.Expose())
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, to, bytes.NewReader(body))
	if err != nil {
		return 0, false, errors.New("the URL can't be used") // err would show the URL
	}
	request.Header = headers
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("User-Agent", "countersign")
	response, err := transport.RoundTrip(request) // follows no redirect, which would take the headers away
	if err != nil {
		return 0, true, fmt.Errorf("post: %w", err)
	}
	defer response.Body.Close()
	answer, _ := io.ReadAll(io.LimitReader(response.Body, maxResponse))
	switch response.StatusCode {
	case http.StatusOK:
		return partial(answer), false, nil
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		again = true
	}
	return 0, again, fmt.Errorf("it answered %d", response.StatusCode)
}

// partial returns the number of refused spans in the answer of a collector that has taken a
// message. An answer that can't be read has none.
func partial(answer []byte) int {
	var is struct {
		PartialSuccess struct {
			RejectedSpans json.Number `json:"rejectedSpans"` // a number or its text
		} `json:"partialSuccess"`
	}
	if json.Unmarshal(answer, &is) != nil {
		return 0
	}
	n, _ := strconv.Atoi(is.PartialSuccess.RejectedSpans.String())
	return max(n, 0)
}
