// Command notices writes two files of the Debian package. The file copyright has the licences of
// each Go module in the binaries and of each npm package in the console, and sbom.cdx.json lists
// the same parts for programs, as CycloneDX.
//
//	go run ./packaging/notices -o DIR -version 1.2.3 bin/countersign bin/countersignd
//
// A part without a licence, or with a text that nobody has read yet, is an error, and no file is
// written. Both files depend on the binaries and the sources of their parts only. Begin reading at
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
	version := flag.String("version", "", "version of the Debian package")
	flag.Parse()
	if flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(*out, *version, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(out, version string, binaries []string) error {
	parts, err := goParts(binaries)
	if err != nil {
		return err
	}
	packages, direct, err := npmParts()
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
	list, err := sbom(version, binaries, parts, direct)
	if err != nil {
		return err
	}
	return errors.Join(os.WriteFile(filepath.Join(out, "copyright"), copyright(parts), 0o644),
		os.WriteFile(filepath.Join(out, "sbom.cdx.json"), list, 0o644))
}
