package worker

import "bytes"

// Of a worker's stderr, including the module's, at most maxLines lines go to the log, each cut at
// maxLine bytes.
const maxLines, maxLine = 20, 4096

// lineLogger is an io.Writer that logs line by line and drops the lines above its limit.
type lineLogger struct {
	log       func(text string)
	remaining int // lines
	line      []byte
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
	if len(l.line) > 0 && l.remaining > 0 {
		l.remaining--
		l.log(string(l.line))
	}
	l.line = l.line[:0]
}
