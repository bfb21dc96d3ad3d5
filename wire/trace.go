package wire

import (
	"encoding/hex"
	"errors"
	"fmt"
)

// Trace is the trace context of a request (W3C Trace Context, traceparent of version 00): the trace
// that the peer's own work belongs to. The zero Trace is none. A Trace says nothing about the
// document, and is no part of what is signed: a request that is sent again may have another one.
type Trace struct {
	ID      [16]byte // of the trace; not zero
	Parent  [8]byte  // id of the peer's span; not zero
	Sampled bool     // the peer records the trace
}

// Traced is the field traceparent, which each request may have.
type Traced struct {
	Trace Trace `json:"traceparent,omitzero"`
}

// Context returns the trace context of a request.
func (t Traced) Context() Trace { return t.Trace }

// ContextOf returns the trace context of a result of Parse, or none.
func ContextOf(request any) Trace {
	if r, is := request.(interface{ Context() Trace }); is {
		return r.Context()
	}
	return Trace{}
}

// traceparentSize is the length of the only form: 00-, 32 hex digits, -, 16 hex digits, -, 2 hex
// digits.
const traceparentSize = 55

func (t Trace) MarshalText() ([]byte, error) {
	flags := 0
	if t.Sampled {
		flags = 1
	}
	return fmt.Appendf(nil, "00-%x-%x-%02x", t.ID, t.Parent, flags), nil
}

// UnmarshalText reads the form of version 00 exactly. Of the flags, only sampled has a meaning, and
// the others are lost.
func (t *Trace) UnmarshalText(text []byte) error {
	bad := errors.New("traceparent must be 00-, 32 digits of the trace, -, 16 digits of the span, - and 2 digits " +
		"of flags, in lower-case hex; neither id is zero")
	if len(text) != traceparentSize || string(text[:3]) != "00-" || text[35] != '-' || text[52] != '-' {
		return bad
	}
	for _, c := range text {
		if c >= 'A' && c <= 'F' {
			return bad
		}
	}
	var read Trace
	var flags [1]byte
	for _, part := range []struct{ to, from []byte }{
		{read.ID[:], text[3:35]}, {read.Parent[:], text[36:52]}, {flags[:], text[53:]},
	} {
		if _, err := hex.Decode(part.to, part.from); err != nil {
			return bad
		}
	}
	if read.ID == [16]byte{} || read.Parent == [8]byte{} {
		return bad
	}
	read.Sampled = flags[0]&1 == 1
	*t = read
	return nil
}

// WithTrace returns an encoded request with a trace context. The request is an object with at least
// one field and without a traceparent.
func WithTrace(request []byte, t Trace) []byte {
	if t == (Trace{}) {
		return request
	}
	text, _ := t.MarshalText()
	return fmt.Appendf(request[:len(request)-1], `,"traceparent":"%s"}`, text)
}
