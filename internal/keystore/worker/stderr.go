package worker

import "bytes"

// maxLines of what a worker, or the module in it, writes to stderr go to the log, each of maxLine bytes at the most.
const maxLines, maxLine = 20, 4096

// lines passes on what is written to it, line by line, and swallows what is too much.
type lines struct {
	say  func(text string)
	left int
	line []byte
}

func (l *lines) Write(b []byte) (int, error) {
	for part := range bytes.Lines(b) {
		text, ended := bytes.CutSuffix(part, []byte("\n"))
		l.line = append(l.line, text[:min(len(text), maxLine-len(l.line))]...)
		if ended {
			l.end()
		}
	}
	return len(b), nil
}

func (l *lines) end() {
	if len(l.line) > 0 && l.left > 0 {
		l.left--
		l.say(string(l.line))
	}
	l.line = l.line[:0]
}
