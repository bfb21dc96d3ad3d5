package worker

import (
	"bytes"
	"strings"
)

// Of a worker's stderr, including the module's, at most maxLines lines go to the log, each cut at
// maxLine bytes.
const maxLines, maxLine = 20, 4096

// lineLogger is an io.Writer that logs line by line and drops the lines above its limit. The lines
// of a PEM block are one line, PEM: the log's scrubber sees no block where each line comes alone.
type lineLogger struct {
	log       func(text string)
	remaining int // lines
	line      []byte
	inPEM     bool // a block has begun and not ended
}

func (l *lineLogger) Write(b []byte) (int, error) {
	for part := range bytes.Lines(b) {
		text, ended := bytes.CutSuffix(part, []byte("\n"))
		l.line = append(l.line, text[:min(len(text), maxLine-len(l.line))]...)
		if ended {
			l.flush()
		}
	}
	return len(b), nil
}

// flush logs the current line, also without a newline at its end.
func (l *lineLogger) flush() {
	text := string(l.line)
	l.line = l.line[:0]
	if l.inPEM {
		l.inPEM = !strings.Contains(text, "-----END ")
		return
	}
	if before, block, begins := strings.Cut(text, "-----BEGIN "); begins {
		text, l.inPEM = before+"[PEM]", !strings.Contains(block, "-----END ")
	}
	if text != "" && l.remaining > 0 {
		l.remaining--
		l.log(text)
	}
}
