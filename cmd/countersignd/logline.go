package main

import (
	"log/slog"
	"strings"
)

// maxLogText bounds one value in a line of the log, in bytes. A denied request can name thousands
// of rules, and a module's error can quote anything.
const maxLogText = 1024

// logOptions returns the options of the daemon's log: a line has at most maxLogText bytes of each
// value, before the quotes of slog.TextHandler.
func logOptions(level slog.Leveler) *slog.HandlerOptions {
	return &slog.HandlerOptions{Level: level, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Value.Kind() != slog.KindString && a.Value.Kind() != slog.KindAny {
			return a
		}
		text := a.Value.String()
		if err, is := a.Value.Any().(error); is {
			text = err.Error()
		}
		if len(text) > maxLogText {
			return slog.String(a.Key, strings.ToValidUTF8(text[:maxLogText], "")+"…")
		}
		return a
	}}
}
