// Command notices writes the file copyright of the Debian package, with the licences of each Go
// module in the binaries and of each npm package in the console.
//
//	go run ./packaging/notices -o DIR bin/countersign bin/countersignd
//
// A part without a licence, or with a text that nobody has read yet, is an error, and no file is
// written. The file depends on the binaries and the sources of their parts only. Begin reading at
// run.
package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
)

// console is the folder with package-lock.json and node_modules.
const console = "admin/console"

func main() {
	out := flag.String("o", ".", "folder of the files")
	flag.Parse()
	if flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(*out, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(out string, binaries []string) error {
	parts, err := goParts(binaries)
	if err != nil {
		return err
	}
	packages, _, err := npmParts()
	if err != nil {
		return err
	}
	parts = append(parts, packages...)
	slices.SortFunc(parts, func(a, b *part) int { return cmp.Compare(a.place, b.place) })
	var faults []error
	for _, p := range parts {
		faults = append(faults, p.read())
	}
	if err := errors.Join(faults...); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(out, "copyright"), copyright(parts), 0o644)
}
