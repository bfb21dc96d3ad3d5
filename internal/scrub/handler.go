package scrub

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
)

// maxText bounds a text in a line of the log, in bytes: the message and each value. A denied
// request can name thousands of rules, and a module's error can quote anything.
const maxText = 1024

// maxSearched bounds the text in which secrets are searched, so that a line has a bounded cost.
const maxSearched = 16 * maxText

// handler is the scrubber in front of another handler.
type handler struct {
	slog.Handler
	s *Scrubber
}

// Handler returns a handler that passes each line on without secrets: in the message, and in the
// names and values of the attributes, however deep. A value of any type becomes its text, so that
// no handler behind this one can write more of the value than the text.
func (s *Scrubber) Handler(to slog.Handler) slog.Handler { return handler{to, s} }

func (h handler) Handle(ctx context.Context, r slog.Record) error {
	clean := slog.NewRecord(r.Time, r.Level, h.s.Bounded(r.Message), r.PC)
	r.Attrs(func(a slog.Attr) bool {
		clean.AddAttrs(h.s.attr(a))
		return true
	})
	return h.Handler.Handle(ctx, clean)
}

func (h handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return handler{h.Handler.WithAttrs(h.s.attrs(attrs)), h.s}
}

func (h handler) WithGroup(name string) slog.Handler {
	return handler{h.Handler.WithGroup(h.s.Bounded(name)), h.s}
}

func (s *Scrubber) attrs(all []slog.Attr) []slog.Attr {
	clean := make([]slog.Attr, len(all))
	for i, a := range all {
		clean[i] = s.attr(a)
	}
	return clean
}

func (s *Scrubber) attr(a slog.Attr) slog.Attr {
	name, v := s.Bounded(a.Key), a.Value.Resolve()
	switch v.Kind() {
	case slog.KindGroup:
		return slog.Attr{Key: name, Value: slog.GroupValue(s.attrs(v.Group())...)}
	case slog.KindString:
		return slog.String(name, s.Bounded(v.String()))
	case slog.KindAny:
		if v.Any() == nil {
			return slog.Attr{Key: name, Value: v}
		}
		return slog.String(name, s.Bounded(textOf(v.Any())))
	}
	return slog.Attr{Key: name, Value: v}
}

// textOf returns the text of a value. The text of bytes is their number only.
func textOf(v any) (text string) {
	defer func() {
		if p := recover(); p != nil { // a nil pointer whose type has a method String or Error
			text = fmt.Sprintf("%T, which has no text: %v", v, p)
		}
	}()
	switch v := v.(type) {
	case []byte:
		return fmt.Sprintf("%d bytes", len(v))
	case error:
		return v.Error()
	}
	return fmt.Sprintf("%+v", v)
}

// Bounded returns at most maxText bytes of a text without secrets. The search comes first: a part
// of a secret has no form.
func (s *Scrubber) Bounded(text string) string {
	if len(text) > maxSearched {
		// A secret at the end may be cut, and its first part is no secret by its form.
		text = strings.TrimRightFunc(text[:maxSearched], func(r rune) bool { return r != ' ' }) + "…"
	}
	if text = s.Text(text); len(text) > maxText {
		text = strings.ToValidUTF8(text[:maxText], "") + "…"
	}
	return text
}
