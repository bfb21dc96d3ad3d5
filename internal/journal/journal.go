// Package journal keeps the journal of a token's key workers: one line for each signature that
// leaves a key worker. A daemon in other hands can have documents signed, but can't write the
// journal, so the signatures don't stay unnoticed: see countersign audit reconcile. Begin reading
// at Writer.Append; Read is for auditors.
//
// Invariant: a signature leaves a key worker only after its line has been written, whole, behind
// all lines before. The lines of all key workers of a token, present and replaced, are one hash
// chain. Nobody waits for the disk: a power cut may lose the last lines, and a crash of a process
// loses none.
//
// A line has seven fields, separated by one space, and ends in a line feed:
//
//	NUMBER MS KEY KIND DETAIL DIGEST CHAIN
//
// NUMBER counts the lines from 0 on, MS is the time in Unix milliseconds by the key worker's clock,
// KEY is name/version, KIND and DETAIL say what was signed (package form), DIGEST and CHAIN have 64
// hex digits. An empty KEY or DETAIL is a hyphen. CHAIN is SHA-256 of the CHAIN before, as 32
// bytes, and of the line up to and without CHAIN. Before the first line, CHAIN is zero.
package journal

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"countersign/internal/keystore"
)

// Kinds of lines that are no signatures.
const (
	Begin = "begin" // the first line of a file; DIGEST is the CHAIN of the line before
	End   = "end"   // the last line of a file that is followed by another
	Cut   = "cut"   // DETAIL bytes with the SHA-256 DIGEST were no lines, and are in a file NAME.cut now
	Try   = "try"   // proves that the journal can be written again
)

// Entry is a line.
type Entry struct {
	Number uint64
	Time   time.Time
	Key    keystore.Ref // zero: none
	Kind   string
	Detail string
	Digest [32]byte
	chain  [32]byte
}

// Signature reports that the line is of a signature.
func (e Entry) Signature() bool { return e.Key != keystore.Ref{} }

// Chain returns the CHAIN of a line that was read.
func (e Entry) Chain() [32]byte { return e.chain }

// Config says where the journal of a token is. The files are FOLDER/TOKEN.NUMBER.journal with the
// number of the first line in 20 digits.
type Config struct {
	Folder string `json:"folder"`
	Token  string `json:"token"`
	Size   int64  `json:"size"`  // bytes of a file; a larger file is followed by another
	Files  int    `json:"files"` // files to keep; the oldest is removed
}

// append appends the line of an entry, and moves the chain on.
func (e Entry) append(b []byte, chain *[32]byte) []byte {
	key, detail := "-", e.Detail
	if e.Signature() {
		key = e.Key.String()
	}
	if detail == "" {
		detail = "-"
	}
	start := len(b)
	b = strconv.AppendUint(b, e.Number, 10)
	b = append(b, ' ')
	b = strconv.AppendInt(b, e.Time.UnixMilli(), 10)
	for _, field := range []string{key, e.Kind, detail} {
		b = append(b, ' ')
		b = append(b, field...)
	}
	b = append(b, ' ')
	b = hex.AppendEncode(b, e.Digest[:])
	b = append(b, ' ')
	*chain = link(*chain, b[start:])
	b = hex.AppendEncode(b, chain[:])
	return append(b, '\n')
}

// link is the next CHAIN.
func link(before [32]byte, line []byte) (chain [32]byte) {
	h := sha256.New()
	h.Write(before[:])
	h.Write(line)
	h.Sum(chain[:0])
	return chain
}

// parse reads a line without its line feed, strictly.
func parse(line []byte) (e Entry, err error) {
	bad := errors.New("it is no line of a journal")
	f := strings.Split(string(line), " ")
	if len(f) != 7 {
		return e, bad
	}
	number, err1 := strconv.ParseUint(f[0], 10, 64)
	ms, err2 := strconv.ParseInt(f[1], 10, 64)
	if err := errors.Join(err1, err2); err != nil {
		return e, bad
	}
	e = Entry{Number: number, Time: time.UnixMilli(ms), Kind: f[3], Detail: f[4]}
	if f[2] != "-" {
		if e.Key, err = keystore.ParseRef(f[2]); err != nil {
			return e, bad
		}
	}
	if e.Detail == "-" {
		e.Detail = ""
	}
	for i, to := range []*[32]byte{&e.Digest, &e.chain} {
		if len(f[5+i]) != 64 {
			return e, bad
		}
		if _, err := hex.Decode(to[:], []byte(f[5+i])); err != nil {
			return e, bad
		}
	}
	again := e.append(nil, new([32]byte)) // the canonical form of all but CHAIN
	if !bytes.Equal(again[:len(again)-65], line[:len(line)-64]) || hex.EncodeToString(e.chain[:]) != f[6] {
		return e, bad
	}
	return e, nil
}

// files lists the files of a journal, the oldest first.
func files(c Config) (numbers []uint64, err error) {
	all, err := os.ReadDir(c.Folder)
	if err != nil {
		return nil, err
	}
	for _, f := range all {
		text, ours := strings.CutPrefix(f.Name(), c.Token+".")
		text, journal := strings.CutSuffix(text, ".journal")
		if n, err := strconv.ParseUint(text, 10, 64); ours && journal && err == nil && c.name(n) == f.Name() {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	return numbers, nil
}

func (c Config) name(number uint64) string { return fmt.Sprintf("%s.%020d.journal", c.Token, number) }
