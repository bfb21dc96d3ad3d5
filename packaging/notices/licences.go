package main

import (
	"cmp"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// known has the texts of licences that a person has read, one a line: digest and SPDX id. A text
// that changes has another digest, and must be read again.
//
//go:embed read.txt
var known string

// allowed are the licences under which anyone may pass on a binary with its notices. SPDX has no id
// for those with LicenseRef.
var allowed = strings.Fields(`0BSD Apache-2.0 BSD-1-Clause BSD-2-Clause BSD-3-Clause BSL-1.0 CC0-1.0 ISC MIT MIT-0
	MPL-2.0 SunPro Unlicense Zlib LicenseRef-Cephes LicenseRef-Go-Patents LicenseRef-OASIS-IPR
	LicenseRef-public-domain`)

type text struct {
	id      string // SPDX expression
	name    string // in the copyright file
	instead string // stands there for the text
}

var texts = func() map[string]*text {
	all, count := map[string]*text{}, map[string]int{}
	for line := range strings.Lines(known) {
		digest, id, _ := strings.Cut(strings.TrimSpace(line), " ")
		t := &text{id: id, name: strings.ReplaceAll(id, " ", "-")}
		if count[id]++; id == "Apache-2.0" {
			t.instead = "On Debian systems, /usr/share/common-licenses/Apache-2.0 has the text of this licence."
		} else if count[id] > 1 {
			t.name += fmt.Sprintf("~%d", count[id])
		}
		all[digest] = t
	}
	return all
}()

// gpl begins a text that a copyright file must not repeat, in a licence that leaves the choice.
const gpl = "                    GNU GENERAL PUBLIC LICENSE\n                       Version 2, June 1991\n"

var (
	licenceFile = regexp.MustCompile(`(?i)^(un)?(licen[cs]es?|copying|copyright|notice|patents)([-_.].*)?$`)
	codeFile    = regexp.MustCompile(`\.(go|[chsS]|[cm]?[jt]sx?|css)$`)
	// right is a line of copyright, with or without the marks of a comment. One author uses spaces
	// that do not break.
	right = regexp.MustCompile(`^\W*?((?:(?:Portions |Revisions )?(?:\([cC]\) )?` +
		`Copyright,?[ \x{a0}]?(?:\([cC]\)|©|[0-9A-Z])|` +
		`(?:\([cC]\)|©) [0-9]{4}|All [Rr]ights [Rr]eserved).*?)[*/\s]*$`)
	comment = regexp.MustCompile(`(?m)(?:^[ \t]*//.*\n)+|/\*(?s:.*?)\*/`)
	marks   = regexp.MustCompile(`(?m)^[ \t]*(?://+|/\*+|\*+/|\*)? ?|[ \t]*\*+/[ \t]*$|[ \t]+$`)
	grants  = regexp.MustCompile(`Permission (?:is hereby|to use)|Redistribution and use|WARRANTY|WARRANTIES|` +
		`General Public License|\bGPL|used freely|public domain`)
)

func isLicence(name string) bool { return licenceFile.MatchString(name) && !codeFile.MatchString(name) }

// read finds the licences and the lines of copyright of a part.
func (p *part) read() error {
	var faults []error
	found, seen := false, map[string]bool{}
	add := func(file, content string) {
		_, body := split(content)
		digest := digest(content)
		t := texts[digest]
		switch {
		case seen[digest]:
			return
		case t == nil:
			faults = append(faults, fmt.Errorf("%s %s: %s has a licence that nobody has read. If anyone may pass on "+
				"binaries under it, add a line to packaging/notices/read.txt: %s and its SPDX id\n%.300s",
				p.name, p.version, file, digest, body))
		case !slices.ContainsFunc(strings.Split(t.id, " OR "), func(id string) bool {
			return slices.Contains(allowed, id)
		}):
			faults = append(faults, fmt.Errorf("%s %s: %s has the licence %s, which is not allowed", p.name, p.version,
				file, t.id))
		default:
			p.licences = append(p.licences, licence{t, file, cmp.Or(t.instead, body)})
		}
		seen[digest] = true
	}
	for _, file := range slices.Sorted(maps.Keys(p.files)) {
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(p.root, file)
		if err != nil {
			return err
		}
		content := strings.ToValidUTF8(strings.ReplaceAll(string(b), "\r", ""), "?")
		rights, _ := split(content)
		p.rights = append(p.rights, rights...)
		switch base := strings.ToLower(filepath.Base(file)); {
		case codeFile.MatchString(file):
			for _, c := range comment.FindAllString(content, -1) {
				if grants.MatchString(c) {
					add(name, granting(c))
				}
			}
		case strings.HasPrefix(base, "notice"):
			p.notices += fmt.Sprintf("\n\n%s:\n\n%s", name, content)
		default:
			found = true
			add(name, content)
		}
	}
	if !found {
		faults = append(faults, fmt.Errorf("%s %s has no licence file", p.name, p.version))
	}
	if len(p.rights) == 0 {
		faults = append(faults, fmt.Errorf("%s %s has no line of copyright", p.name, p.version))
	}
	slices.Sort(p.rights)
	p.rights = slices.Compact(p.rights)
	return errors.Join(faults...)
}

// granting cuts a comment down to its licence: from the paragraph with the first line of copyright
// to the last that grants or disclaims.
func granting(comment string) string {
	paragraphs := strings.Split(marks.ReplaceAllString(comment, ""), "\n\n")
	first := slices.IndexFunc(paragraphs, func(p string) bool {
		return grants.MatchString(p) || slices.ContainsFunc(strings.Split(p, "\n"), right.MatchString)
	})
	last := len(paragraphs) - 1
	for last > first && !grants.MatchString(paragraphs[last]) {
		last--
	}
	return strings.Join(paragraphs[first:last+1], "\n\n")
}

// split takes the lines of copyright out of a licence: many parts share the rest.
func split(content string) (rights []string, body string) {
	content, _, cut := strings.Cut(content, gpl)
	var b strings.Builder
	for line := range strings.Lines(content) {
		m := right.FindStringSubmatch(line)
		if m == nil {
			b.WriteString(line)
		} else if n := len(rights); n > 0 && m[1][0] == 'A' { // All rights reserved
			rights[n-1] += " " + m[1]
		} else {
			rights = append(rights, m[1])
		}
	}
	if cut {
		b.WriteString("On Debian systems, /usr/share/common-licenses/GPL-2 has the text that follows here.")
	}
	return rights, strings.Trim(b.String(), "\n")
}

// digest is the SHA-256 of a licence without lines of copyright, and with one space between words.
func digest(content string) string {
	_, body := split(content)
	_, after, _ := strings.Cut(content, gpl)
	sum := sha256.Sum256([]byte(strings.Join(strings.Fields(body+after), " ")))
	return hex.EncodeToString(sum[:])
}

// expression is the licence of a part in the language of SPDX. A grant of patents asks nothing of
// anyone.
func (p *part) expression() string {
	var ids []string
	for _, l := range p.licences {
		id := l.id
		if strings.Contains(id, " ") {
			id = "(" + id + ")"
		}
		if id != "LicenseRef-Go-Patents" && !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	return strings.Join(ids, " AND ")
}
