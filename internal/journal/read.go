package journal

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Report is what Read has found of a journal besides its lines.
type Report struct {
	Token string    `json:"token"`
	First uint64    `json:"first"` // number of the first line that is there; those before are dropped
	Lines uint64    `json:"lines"`
	From  time.Time `json:"from,omitzero"` // time of the first line
	To    time.Time `json:"to,omitzero"`   // time of the last line
	// Faults are breaks of the chain, and files that are missing or damaged: the journal was
	// changed, or a crash has cut off lines that were on no disk yet.
	Faults []string `json:"faults,omitempty"`
	// Head is the CHAIN of the last line. A later journal that contains the line continues this
	// one.
	Head string `json:"head"`
}

// Tokens lists the tokens with a journal in a folder.
func Tokens(folder string) (all []string, err error) {
	files, err := os.ReadDir(folder)
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		name, ok := strings.CutSuffix(f.Name(), ".journal")
		if i := strings.LastIndexByte(name, '.'); ok && i > 0 && !slices.Contains(all, name[:i]) {
			all = append(all, name[:i])
		}
	}
	return all, nil
}

// Read reads the journal of a token, and gives each line to each, in order. Damage is a fault of
// the report, and the lines behind it are read. A last line without an end is of a write that goes
// on, and is left out.
func Read(folder, token string, each func(Entry) error) (r Report, err error) {
	c := Config{Folder: folder, Token: token}
	numbers, err := files(c)
	if err != nil {
		return r, err
	}
	r.Token = token
	fault := func(format string, args ...any) { r.Faults = append(r.Faults, fmt.Sprintf(format, args...)) }
	var chain [32]byte
	var next uint64
	last := ""
	for i, number := range numbers {
		name := c.name(number)
		b, err := os.ReadFile(filepath.Join(folder, name))
		if errors.Is(err, fs.ErrNotExist) && i == 0 {
			continue // dropped meanwhile
		} else if err != nil {
			return r, err
		}
		switch {
		case r.Lines == 0:
			r.First, next = number, number
		case number != next || last != End:
			fault("%s: it does not follow line %d, the last one before: a file or its end is missing", name, next-1)
			next, chain = number, [32]byte{}
		}
		for offset := 0; offset < len(b); {
			n := bytes.IndexByte(b[offset:], '\n')
			if n < 0 {
				if i < len(numbers)-1 {
					fault("%s: the last line has no end", name)
				}
				break
			}
			line := b[offset : offset+n]
			first := offset == 0
			offset += n + 1
			e, err := parse(line)
			if err != nil {
				fault("%s: line %d is damaged", name, next)
				next++
				continue
			}
			if first && (r.Lines == 0 || chain == [32]byte{}) {
				chain = e.Digest // nothing of before is there
			}
			switch {
			case first != (e.Kind == Begin), first && e.Digest != chain:
				fault("%s: line %d does not begin the file after the one before", name, next)
			case e.Number != next:
				fault("%s: line %d is in the place of line %d", name, e.Number, next)
			case link(chain, line[:len(line)-64]) != e.chain:
				fault("%s: line %d does not fit the line before: one of the two was changed", name, e.Number)
			case e.Kind == Cut:
				fault("%s: line %d: %s bytes in its place were no lines, after a crash or damage; they are in %s.cut",
					name, e.Number, e.Detail, name)
			}
			next, chain, last = e.Number+1, e.chain, e.Kind
			if r.Lines == 0 {
				r.From = e.Time
			}
			r.Lines++
			r.To, r.Head = e.Time, fmt.Sprintf("%x", e.chain)
			if err := each(e); err != nil {
				return r, err
			}
		}
	}
	if last == End {
		fault("the file after line %d is missing", next-1)
	}
	return r, nil
}
