package main

import (
	"bytes"
	"debug/buildinfo"
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const mit = `Copyright (c) 2026 Somebody

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in
all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN
THE SOFTWARE.
`

// fake is a module with files.
func fake(t *testing.T, files map[string]string) *part {
	t.Helper()
	p, err := goPart("example.org/fake", "v1.0.0", t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range files {
		file := filepath.Join(p.root, name)
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if codeFile.MatchString(name) {
			p.files[file] = true
		}
	}
	if err := p.addLicences(p.root); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestLicences(t *testing.T) {
	const gplText = "Copyright 2026 Somebody\n" + gpl + "\n Everyone is permitted to copy verbatim copies\n"
	texts[digest(gplText)] = &text{id: "GPL-2.0-only"}
	defer delete(texts, digest(gplText))
	wrapped := strings.ReplaceAll(strings.Replace(mit, "2026 Somebody", "1999 Another", 1), "\n", "\r\n ")
	other := strings.Replace(mit, "sell", "sell no", 1)
	head := "// " + strings.ReplaceAll(mit, "\n", "\n// ") + "\n\npackage fake\n"
	for name, c := range map[string]struct {
		files map[string]string
		want  string // the licence, or a part of the error
	}{
		"MIT":                   {map[string]string{"LICENSE": mit}, "MIT"},
		"wrapped, another year": {map[string]string{"COPYING.md": wrapped}, "MIT"},
		"also in the code":      {map[string]string{"LICENSE": mit, "a.go": head, "b.c": "/* " + mit + " */"}, "MIT"},
		"none":                  {map[string]string{"README.md": mit, "a.go": "package fake\n"}, "has no licence file"},
		"only in the code":      {map[string]string{"a.go": head}, "has no licence file"},
		"licence.go":            {map[string]string{"licence.go": head}, "has no licence file"},
		"a word differs":        {map[string]string{"LICENSE": other}, "nobody has read"},
		"GPL, unread":           {map[string]string{"LICENSE": gplText + "\nmore\n"}, "nobody has read"},
		"GPL, read":             {map[string]string{"LICENSE": gplText}, "GPL-2.0-only, which is not allowed"},
		"a second licence":      {map[string]string{"LICENSE": mit, "LICENSE.2": other}, "nobody has read"},
		"GPL in a comment": {map[string]string{"LICENSE": mit,
			"a.s": "// Copyright 2026 Somebody\n// Under the GNU General Public License\n"},
			"a.s has a licence that nobody has read"},
		"no owner": {map[string]string{"LICENSE": strings.TrimPrefix(mit, "Copyright (c) 2026 Somebody")},
			"no line of copyright"},
	} {
		t.Run(name, func(t *testing.T) {
			p := fake(t, c.files)
			err := p.read()
			if c.want == "MIT" {
				if err != nil || p.expression() != "MIT" || len(p.licences) != 1 {
					t.Errorf("%q, %v: %v", p.expression(), p.licences, err)
				}
			} else if err == nil || !strings.Contains(err.Error(), c.want) ||
				!strings.HasPrefix(err.Error(), "example.org/fake v1.0.0") {
				t.Errorf("%v, want: %s", err, c.want)
			}
		})
	}
}

// TestCopyright reads a licence, a NOTICE file, and a line of copyright in code.
func TestCopyright(t *testing.T) {
	p := fake(t, map[string]string{"LICENSE": mit, "NOTICE": "Copyright 2020 Others\n\n\tThanks.\n",
		"a.go": "// Copyright 2021 One.\n// All rights reserved.\n\npackage fake\n"})
	if err := p.read(); err != nil {
		t.Fatal(err)
	}
	got := string(copyright([]*part{p}))
	_, body := split(mit)
	for _, want := range []string{
		"\nFiles: *\nCopyright: the owner of Countersign\nLicense: to-be-chosen\n The licence of Countersign is",
		"\nFiles: vendor/example.org/fake/*\nCopyright:\n Copyright (c) 2026 Somebody\n Copyright 2020 Others\n" +
			" Copyright 2021 One. All rights reserved.\nLicense: MIT~3\nComment:\n example.org/fake v1.0.0, MIT\n" +
			" Source: go mod download example.org/fake@v1.0.0\n LICENSE has MIT~3.\n" +
			" .\n NOTICE:\n .\n Copyright 2020 Others\n .\n \tThanks.\n",
		"\n\nLicense: MIT~3\n " + strings.ReplaceAll(strings.ReplaceAll(body, "\n\n", "\n.\n"), "\n", "\n ") + "\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	p.licences[0].text = &text{id: "MIT OR GPL-2.0-only"}
	if got := p.expression(); got != "(MIT OR GPL-2.0-only)" {
		t.Error(got)
	}
}

// atRoot goes to the source tree's root, which has the packages of the console.
func atRoot(t *testing.T) {
	t.Helper()
	t.Chdir("../..")
	if _, err := os.Stat(console + "/node_modules"); err != nil {
		if os.Getenv("REQUIRE_DEVICES") == "1" {
			t.Fatal(err)
		}
		t.Skip("scripts/console.sh has not run: ", err)
	}
}

// TestNpm compares the packages with those that npm has marked, and with those in the bundle.
func TestNpm(t *testing.T) {
	atRoot(t)
	parts, direct, err := npmParts()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]bool{}
	for _, p := range parts {
		got[p.place[len(console)+1:]] = true
	}
	if len(direct) == 0 || len(direct) >= len(parts) {
		t.Errorf("%d of %d packages are direct", len(direct), len(parts))
	}
	var lock struct {
		Packages map[string]struct{ Dev, DevOptional bool }
	}
	read(t, console+"/package-lock.json", &lock)
	want := map[string]bool{}
	for at, p := range lock.Packages {
		if at != "" && !p.Dev && !p.DevOptional {
			want[at] = true
		}
	}
	if !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	meta := filepath.Join(t.TempDir(), "meta.json")
	cmd := exec.Command("node_modules/.bin/esbuild", "src/main.tsx", "src/style.css", "--bundle", "--splitting",
		"--format=esm", "--jsx=automatic", "--jsx-import-source=preact", "--outdir="+t.TempDir(), "--metafile="+meta,
		"--log-level=error")
	cmd.Dir = console
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var bundle struct{ Inputs map[string]any }
	read(t, meta, &bundle)
	seen := map[string]bool{}
	for file := range bundle.Inputs {
		if at := strings.LastIndex(file, "node_modules/"); at >= 0 {
			name := strings.Split(file[at+len("node_modules/"):], "/")
			if name[0][0] == '@' {
				name[0] += "/" + name[1]
			}
			seen[file[:at]+"node_modules/"+name[0]] = true
		}
	}
	for at := range seen {
		if !got[at] {
			t.Errorf("%s is in the bundle", at)
		}
	}
	if !seen["node_modules/preact"] || !seen["node_modules/crelt"] {
		t.Errorf("the bundle has %v", slices.Sorted(maps.Keys(seen)))
	}
}

func read(t *testing.T, file string, v any) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b, v); err != nil {
		t.Fatal(err)
	}
}

// TestRun makes the files of the CLI in two folders, and looks for each part in them.
func TestRun(t *testing.T) {
	atRoot(t)
	first, second := t.TempDir(), t.TempDir()
	binary := filepath.Join(first, "countersign")
	build := exec.Command("go", "build", "-o", binary, "./cmd/countersign")
	build.Env = append(build.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := run(first, "1.2.3", []string{binary}); err != nil {
		t.Fatal(err)
	}
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	packages, _, err := npmParts()
	if err != nil {
		t.Fatal(err)
	}

	var doc document
	read(t, filepath.Join(first, "sbom.cdx.json"), &doc)
	listed := map[string]object{}
	for _, c := range doc.Components {
		listed[c["name"].(string)+" "+c["version"].(string)] = c
	}
	names := []string{"std " + experiments.ReplaceAllString(info.GoVersion, "")}
	for _, dep := range info.Deps {
		names = append(names, dep.Path+" "+dep.Version)
	}
	for _, p := range packages {
		names = append(names, p.name+" "+p.version)
	}
	text, err := os.ReadFile(filepath.Join(first, "copyright"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		c := listed[name]
		hashed := c["hashes"] != nil || strings.HasPrefix(name, "std ")
		if c["licenses"] == nil || c["purl"] == nil || !hashed {
			t.Errorf("sbom.cdx.json has %v for %s", c, name)
		}
		if !bytes.Contains(text, []byte("\nComment:\n "+name+", ")) {
			t.Errorf("copyright lacks %s", name)
		}
	}
	if len(listed) != len(names)+1 || listed["countersign 1.2.3"] == nil {
		t.Errorf("sbom.cdx.json has %d parts, want %d and the binary", len(listed), len(names))
	}

	// The same binary, in another folder with links to the same sources, and for another user.
	tree := t.TempDir()
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		at, err := filepath.Abs(e.Name())
		if err == nil {
			err = os.Symlink(at, filepath.Join(tree, e.Name()))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(tree)
	t.Setenv("TZ", "Asia/Tokyo")
	t.Setenv("LC_ALL", "tr_TR.UTF-8")
	t.Setenv("USER", "another")
	if err := os.Rename(binary, filepath.Join(second, "countersign")); err != nil {
		t.Fatal(err)
	}
	if err := run(second, "1.2.3", []string{filepath.Join(second, "countersign")}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"copyright", "sbom.cdx.json"} {
		a, err := os.ReadFile(filepath.Join(first, name))
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(second, name))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(a, b) {
			t.Errorf("%s depends on the folder", name)
		}
		for _, leak := range []string{first, "timestamp", "serialNumber", info.GoVersion} {
			if bytes.Contains(a, []byte(leak)) {
				t.Errorf("%s has %q", name, leak)
			}
		}
	}
}
