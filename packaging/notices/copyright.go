package main

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
)

const head = `Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: Countersign
Source: the owner of Countersign
Comment:
 The programs of this package have parts that others wrote. A paragraph for each part has its lines
 of copyright, its licences, and the place of its source. MIT~2 is the licence MIT in other words.
 "go mod vendor" writes the folder vendor and "npm ci" the folder node_modules; the folder go is the
 source of Go.

Files: *
Copyright: the owner of Countersign
License: to-be-chosen
 The licence of Countersign is the owner's to choose. Until then nobody but the owner may
 redistribute this package.
`

// copyright is the copyright file of the Debian package.
func copyright(parts []*part) []byte {
	b := bytes.NewBufferString(head)
	bodies := map[string]string{}
	for _, p := range parts {
		var names, files []string
		for _, l := range p.licences {
			if !slices.Contains(names, l.name) {
				bodies[l.name] = cmp.Or(bodies[l.name], l.body)
				names = append(names, l.name)
				files = append(files, l.file+" has "+l.name+".")
			}
		}
		about := fmt.Sprintf("%s %s, %s\nSource: %s\n%s%s", p.name, p.version, p.expression(), p.source,
			strings.Join(files, "\n"), p.notices)
		fmt.Fprintf(b, "\nFiles: %s/*\nCopyright:%s\nLicense: %s\nComment:%s\n", p.place,
			indent(strings.Join(p.rights, "\n")), strings.Join(names, " and "), indent(about))
	}
	for _, name := range slices.Sorted(maps.Keys(bodies)) {
		fmt.Fprintf(b, "\nLicense: %s%s\n", name, indent(bodies[name]))
	}
	return b.Bytes()
}

// indent puts each line on a line of its own that continues a field.
func indent(text string) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	for i, line := range lines {
		lines[i] = " " + cmp.Or(strings.TrimRight(line, " \t"), ".")
	}
	return "\n" + strings.Join(lines, "\n")
}
