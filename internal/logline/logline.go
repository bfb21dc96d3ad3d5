// Package logline has the forms of a line of the daemon's log: text, JSON, or fields of journald.
// Level is the level of the log, which an operator can change for a time.
package logline

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"syscall"
)

// Format is the form of a line.
type Format string

// The formats of the configuration. Auto is Journal where stderr leads to journald, and otherwise
// Text.
const (
	Auto    Format = "auto"
	Text    Format = "text"
	JSON    Format = "json"
	Journal Format = "journal"
)

// Check refuses a format that does not exist.
func (f Format) Check() error {
	switch f {
	case Auto, Text, JSON, Journal:
		return nil
	}
	return fmt.Errorf("%q is none of auto, text, json, journal", string(f))
}

// Chosen returns the format with Auto replaced by what stderr leads to. systemd names the file of
// its journal in JOURNAL_STREAM, which a program with another stderr inherits too: so the file of
// stderr must be the same.
func (f Format) Chosen() Format {
	if f != Auto {
		return f
	}
	var st syscall.Stat_t
	err := syscall.Fstat(2, &st)
	if err == nil && os.Getenv("JOURNAL_STREAM") == fmt.Sprintf("%d:%d", st.Dev, st.Ino) {
		return Journal
	}
	return Text
}

// Handler returns a handler that writes each line to a writer, in one call of Write.
func (f Format) Handler(to io.Writer, level slog.Leveler) slog.Handler {
	options := &slog.HandlerOptions{Level: level}
	switch f {
	case JSON:
		return slog.NewJSONHandler(to, options)
	case Journal:
		return &fields{to: to, level: level}
	}
	return slog.NewTextHandler(to, options)
}
