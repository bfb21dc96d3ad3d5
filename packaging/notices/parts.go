package main

import (
	"bytes"
	"debug/buildinfo"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/mod/module"
)

// part is a Go module, the standard library of Go, or an npm package.
type part struct {
	name, version string
	ref           string // in the SBOM
	place         string // its folder in the source tree, as the copyright file names it
	source        string // how anyone gets its source: a command, or an address
	root          string
	files         map[string]bool // licences, and code that may have a licence in a comment
	sum           []byte          // SHA-512, of an npm package only
	needs         []string        // refs, of an npm package only

	// The method read finds these.
	rights   []string // lines of copyright
	licences []licence
	notices  string
}

// licence is a text as the first file with it has it.
type licence struct {
	*text
	file, body string
}

// addLicences adds the files of a folder that have licences.
func (p *part) addLicences(folder string) error {
	entries, err := os.ReadDir(folder)
	for _, e := range entries {
		if isLicence(e.Name()) && !e.IsDir() {
			p.files[filepath.Join(folder, e.Name())] = true
		}
	}
	return err
}

// experiments follow the version of Go, and lists of vulnerabilities have the version without.
var experiments = regexp.MustCompile(`-X:[a-z0-9,]+`)

// goParts lists the modules of the binaries and the standard library, each with the code that is
// compiled.
func goParts(binaries []string) ([]*part, error) {
	type goModule struct {
		Path, Version, Dir string
		Main               bool
	}
	type goPackage struct {
		Dir                                       string
		Standard                                  bool
		Module                                    *goModule
		GoFiles, CgoFiles, CFiles, HFiles, SFiles []string
	}
	all := map[goModule]*part{}
	for _, binary := range binaries {
		info, err := buildinfo.ReadFile(binary)
		if err != nil {
			return nil, err
		}
		env := os.Environ()
		for _, s := range info.Settings {
			if strings.HasPrefix(s.Key, "GO") || s.Key == "CGO_ENABLED" {
				env = append(env, s.Key+"="+s.Value)
			}
		}
		toolchain, err := goCommand(env, "env", "GOVERSION", "GOROOT")
		if err != nil {
			return nil, err
		}
		version := experiments.ReplaceAllString(info.GoVersion, "")
		goroot, same := strings.CutPrefix(strings.TrimSpace(string(toolchain)), version+"\n")
		if !same {
			return nil, fmt.Errorf("%s was built by %s, and this is another: %s", binary, version, toolchain)
		}
		packages, err := goCommand(env, "list", "-deps",
			"-json=Dir,Standard,Module,GoFiles,CgoFiles,CFiles,HFiles,SFiles", info.Path)
		if err != nil {
			return nil, err
		}
		for d := json.NewDecoder(bytes.NewReader(packages)); d.More(); {
			var p goPackage
			if err := d.Decode(&p); err != nil {
				return nil, err
			}
			folder := p.Dir
			if p.Standard {
				// Other folders repeat the root's licence, or have one of code that is absent.
				p.Module, folder = &goModule{Path: "std", Version: version, Dir: goroot}, goroot
			} else if p.Module.Main {
				continue
			}
			if all[*p.Module] == nil {
				if all[*p.Module], err = goPart(p.Module.Path, p.Module.Version, p.Module.Dir); err != nil {
					return nil, err
				}
			}
			for _, name := range slices.Concat(p.GoFiles, p.CgoFiles, p.CFiles, p.HFiles, p.SFiles) {
				all[*p.Module].files[filepath.Join(p.Dir, name)] = true
			}
			for ; len(folder) >= len(p.Module.Dir); folder = filepath.Dir(folder) {
				if err := all[*p.Module].addLicences(folder); err != nil {
					return nil, err
				}
			}
		}
	}
	return slices.Collect(maps.Values(all)), nil
}

// goCommand returns the output of a go command.
func goCommand(env []string, args ...string) ([]byte, error) {
	cmd := exec.Command("go", args...)
	cmd.Env, cmd.Stderr = env, os.Stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("go %s: %w", strings.Join(args, " "), err)
	}
	return out, err
}

func goPart(name, version, root string) (*part, error) {
	p := &part{
		name: name, version: version, ref: "pkg:golang/" + name + "@" + version + "?type=module",
		place: "vendor/" + name, root: root, files: map[string]bool{},
	}
	if name == "std" {
		p.place, p.source = "go", "https://go.dev/dl/"+version+".src.tar.gz"
		return p, nil
	}
	p.source = "go mod download " + name + "@" + version
	return p, module.Check(name, version)
}

// npmParts lists the packages that the console needs, and the refs of those it names itself. The
// command "npm sbom" would want a version of the console, and Debian's npm has no such command.
func npmParts() (all []*part, direct []string, err error) {
	b, err := os.ReadFile(console + "/package-lock.json")
	if err != nil {
		return nil, nil, err
	}
	var lock struct {
		Packages map[string]struct {
			Version, Integrity                                   string
			Dependencies, OptionalDependencies, PeerDependencies map[string]string
		}
	}
	if err := json.Unmarshal(b, &lock); err != nil {
		return nil, nil, err
	}
	parts := map[string]*part{"": {}}
	for next := []string{""}; len(next) > 0; next = next[1:] {
		user := lock.Packages[next[0]]
		for _, needs := range []map[string]string{user.Dependencies, user.OptionalDependencies, user.PeerDependencies} {
			for name := range needs {
				// Like Node, look in the package's own folder first, and then in each above.
				above := next[0]
				at := path.Join(above, "node_modules", name)
				for lock.Packages[at].Version == "" && above != "" {
					above = above[:max(0, strings.LastIndex(above, "/node_modules/"))]
					at = path.Join(above, "node_modules", name)
				}
				found := lock.Packages[at]
				if found.Version == "" {
					continue // an optional one
				}
				if parts[at] == nil {
					if parts[at], err = npmPart(at, name, found.Version, found.Integrity); err != nil {
						return nil, nil, err
					}
					next = append(next, at)
				}
				parts[next[0]].needs = append(parts[next[0]].needs, parts[at].ref)
			}
		}
	}
	direct = parts[""].needs
	delete(parts, "")
	return slices.Collect(maps.Values(parts)), direct, nil
}

func npmPart(at, name, version, integrity string) (*part, error) {
	p := &part{
		name: name, version: version, ref: "pkg:npm/" + strings.Replace(name, "@", "%40", 1) + "@" + version,
		place: console + "/" + at, root: filepath.Join(console, at), files: map[string]bool{},
		source: "npm pack " + name + "@" + version,
	}
	var err error
	if p.sum, err = base64.StdEncoding.DecodeString(strings.TrimPrefix(integrity, "sha512-")); err != nil {
		return nil, fmt.Errorf("package-lock.json has no SHA-512 of %s: %w", at, err)
	}
	return p, filepath.WalkDir(p.root, func(file string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && d.Name() == "node_modules": // other packages
			return fs.SkipDir
		case d.IsDir():
			return p.addLicences(file)
		case codeFile.MatchString(file):
			p.files[file] = true
		}
		return nil
	})
}
