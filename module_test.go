package countersign_test

import (
	"bytes"
	"encoding/hex"
	"go/scanner"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"countersign/client"
	"countersign/client/clienttest"

	"golang.org/x/mod/modfile"
)

// newPath is the module path of the renamed copy.
const newPath = "example.org/keys/countersign"

// TestModulePath renames the module in a copy of the tree with scripts/module-path.sh. The copy
// must build and pass tests. Only imports and the lines that require the module may differ.
func TestModulePath(t *testing.T) {
	oldPath := modulePath(t)
	if oldPath == newPath {
		t.Skip("this tree is the renamed copy")
	}
	root, files := copyTree(t)
	script := filepath.Join(root, "scripts", "module-path.sh")

	for _, path := range []string{"", "countersign2", "example.org/a b", "example.org//a", "example.org/a/v1", "-x"} {
		if out, err := run(t.TempDir(), script, path).CombinedOutput(); err == nil {
			t.Errorf("the path %q is accepted: %s", path, out)
		}
	}
	notes := filepath.Join(root, "notes.txt")
	if err := os.WriteFile(notes, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := run(root, script, newPath).CombinedOutput(); err == nil || !bytes.Contains(out, []byte("--force")) {
		t.Errorf("a tree with changes is renamed: %v: %s", err, out)
	}
	if got := changes(t, root); got != "?? notes.txt\n" {
		t.Fatalf("a refusal has changed the tree:\n%s", got)
	}

	want := "module path: " + oldPath + " is now " + newPath + " in "
	out := must(t, run(t.TempDir(), script, "--force", newPath))
	if !strings.HasPrefix(out, want) || strings.Count(out, "\n") != 1 {
		t.Errorf("the script prints %q, want one line: %s…", out, want)
	}
	renamed := changes(t, root)
	out = must(t, run(root, script, newPath))
	if !strings.Contains(out, "nothing changed") || changes(t, root) != renamed {
		t.Errorf("a second run changes the tree, or prints %q", out)
	}
	if err := os.Remove(notes); err != nil {
		t.Fatal(err)
	}

	oldPackage := regexp.MustCompile(`(^|[^\w/.-])` + regexp.QuoteMeta(oldPath) +
		`/(` + strings.Join(packageFolders(files), "|") + `)($|[^\w/-])`)
	var code strings.Builder // without tests
	for _, file := range files {
		before, after := read(t, file), read(t, filepath.Join(root, file))
		if strings.HasSuffix(file, ".go") && !strings.HasSuffix(file, "_test.go") {
			code.WriteString(after)
		}
		if found := oldPackage.FindString(after); found != "" {
			t.Errorf("%s: the old path remains, and scripts/module-path.sh does not know this place: %q", file, found)
		}
		same := before == after
		switch {
		case strings.HasSuffix(file, ".go"):
			same = slices.Equal(tokens(file, before), tokens(file, after))
		case strings.HasSuffix(file, ".md"):
			same = before == strings.ReplaceAll(after, newPath, oldPath)
		case file == "go.mod":
			same = before == strings.Replace(after, "module "+newPath+"\n", "module "+oldPath+"\n", 1)
		}
		if !same {
			t.Errorf("%s: more has changed than the module path", file)
		}
	}

	// Names on the wire, on tokens and on the machine stay.
	for use, text := range map[string]string{
		"the prologue":         `"countersign-v1"`,
		"the origin of a log":  `"countersign/" + l.ID()`,
		"the label of a key":   `"countersign/"` + "\n",
		"the text of an act":   `"countersign-proposal-v1"`,
		"the admin API's path": `"/run/countersign/admin.sock"`,
	} {
		if !strings.Contains(code.String(), text) {
			t.Errorf("no Go file has %s any more, which is %s", text, use)
		}
	}

	if out := must(t, run(root, "gofmt", "-l", ".")); out != "" {
		t.Errorf("not formatted after the renaming:\n%s", out)
	}
	must(t, run(root, "go", "build", "./..."))
	must(t, run(root, "go", "vet", "./..."))
	must(t, run(root, "go", "test", "-skip", "TestWords", "."))
	out = must(t, run(root, "go", "test", "-run", "Verif|Parse|Nonce", "./wire", "./audit", "./internal/ledger"))
	if strings.Contains(out, "no tests to run") {
		t.Errorf("the renamed copy has run no test of a package:\n%s", out)
	}
}

// TestClientREADME types the commands of client/README.md beside this tree, and runs the program.
func TestClientREADME(t *testing.T) {
	readme := read(t, "client/README.md")
	program, lines, commands := fence(t, readme, "go"), fence(t, readme, "text"), fence(t, readme, "sh")
	root, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Symlink(root, filepath.Join(dir, "countersign")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "main.go"), []byte(program), 0o600); err != nil {
		t.Fatal(err)
	}
	// The checksums of this tree spare the test the network, as the README says.
	typed := strings.Replace(commands, "cd payments\n", "cd payments\ncp ../main.go ../countersign/go.sum .\n", 1)
	must(t, run(dir, "bash", "-euc", typed))

	mod := strings.Split(read(t, filepath.Join(dir, "payments", "go.mod")), "\n")
	for line := range strings.Lines(lines) {
		if !slices.Contains(mod, strings.TrimSpace(line)) {
			t.Errorf("the commands of client/README.md don't write the line %q to go.mod", line)
		}
	}
	if n := strings.Count(lines, "\n"); n != 2 {
		t.Errorf("client/README.md shows %d lines of go.mod, want 2", n)
	}

	appliance, err := clienttest.Start()
	if err != nil {
		t.Fatal(err)
	}
	defer appliance.Close()
	identity := filepath.Join(dir, "peer.key")
	peer, err := client.WriteIdentity(identity)
	if err != nil {
		t.Fatal(err)
	}
	appliance.Do(func(s *clienttest.Server) { s.Peer = peer })
	key := appliance.Statics[0].Public()
	cmd := run(dir, "payments/payments")
	cmd.Env = append(cmd.Env, "COUNTERSIGN_SERVER="+appliance.Address, "COUNTERSIGN_IDENTITY="+identity,
		"COUNTERSIGN_SERVER_KEY="+hex.EncodeToString(key[:]))
	signed, err := client.DecodeSigned([]byte(must(t, cmd)))
	if err != nil || signed.Key != "payments" || signed.Version != 1 || len(signed.Signature) != 64 {
		t.Errorf("the program prints %+v, %v", signed, err)
	}
}

// modulePath reads the module's path from go.mod.
func modulePath(t *testing.T) string {
	t.Helper()
	return modfile.ModulePath([]byte(read(t, "go.mod")))
}

// copyTree copies the tree's files into a repository of their own, with one commit.
//
// The copy is always in the same folder, because the build cache keys a package by its folder: a
// second run builds nothing again. A lock keeps two runs apart.
func copyTree(t *testing.T) (root string, files []string) {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	base := filepath.Join(cache, "countersign-test")
	if err := os.MkdirAll(base, 0o700); err != nil {
		t.Fatal(err)
	}
	lock, err := os.Create(filepath.Join(base, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	root = filepath.Join(base, "module")
	t.Cleanup(func() {
		os.RemoveAll(root)
		lock.Close()
	})
	if err := os.RemoveAll(root); err != nil {
		t.Fatal(err)
	}
	list := must(t, run(".", "git", "ls-files", "--cached", "--others", "--exclude-standard"))
	for _, file := range strings.Fields(list) {
		st, err := os.Stat(file)
		if err != nil { // removed, and not committed yet
			continue
		}
		path := filepath.Join(root, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(read(t, file)), st.Mode().Perm()); err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
	}
	must(t, run(root, "git", "init", "-q"))
	must(t, run(root, "git", "add", "-A"))
	must(t, run(root, "git", "-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false",
		"commit", "-q", "-m", "copy"))
	return root, files
}

// run is a command in a folder, without the variables that point git at another repository.
func run(dir, name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.Env = slices.DeleteFunc(cmd.Environ(), func(v string) bool { return strings.HasPrefix(v, "GIT_") })
	return cmd
}

// must runs a command, which has to end well, and returns its standard output.
func must(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %v\n%s%s", cmd.Args, err, &stdout, &stderr)
	}
	return stdout.String()
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// changes lists the files that differ from the commit, with a digest of their content.
func changes(t *testing.T, root string) string {
	t.Helper()
	return must(t, run(root, "git", "status", "--porcelain")) + must(t, run(root, "git", "diff"))
}

// fence returns the first fenced block of a language.
func fence(t *testing.T, document, language string) string {
	t.Helper()
	_, after, found := strings.Cut(document, "\n```"+language+"\n")
	text, _, closed := strings.Cut(after, "```\n")
	if !found || !closed {
		t.Fatalf("there is no block of %s", language)
	}
	return text
}

// packageFolders lists the folders below the root that have Go files.
func packageFolders(files []string) (folders []string) {
	for _, file := range files {
		if folder := filepath.Dir(file); strings.HasSuffix(file, ".go") && folder != "." {
			folders = append(folders, regexp.QuoteMeta(folder))
		}
	}
	slices.Sort(folders)
	return slices.Compact(folders)
}

// tokens are the tokens of a Go file without comments and imports.
func tokens(file, source string) (all []string) {
	var s scanner.Scanner
	s.Init(token.NewFileSet().AddFile(file, -1, len(source)), []byte(source), nil, 0)
	for {
		_, tok, literal := s.Scan()
		switch tok {
		case token.EOF:
			return all
		case token.IMPORT:
			// An import declaration ends with a semicolon, or with the parenthesis of a group.
			end := token.SEMICOLON
			for tok != end && tok != token.EOF {
				if _, tok, _ = s.Scan(); tok == token.LPAREN {
					end = token.RPAREN
				}
			}
		default:
			all = append(all, tok.String()+" "+literal)
		}
	}
}

// TestBuildNeedsNoBrowser lists what scripts/deps.sh installs: a browser and the tools of the tests
// are for the tests only, and make build and make demo install none of them.
func TestBuildNeedsNoBrowser(t *testing.T) {
	list := func(what string) []string {
		out, err := exec.Command("scripts/deps.sh", "list", what).Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.Fields(string(out))
	}
	build, test := list("build"), list("test")
	for _, each := range build {
		if !slices.Contains(test, each) {
			t.Errorf("the tests do not have %s, which a build needs", each)
		}
	}
	for _, each := range []string{"chromium", "libnss3-tools", "tpm2-tools", "jq"} {
		if slices.Contains(build, each) || each == "chromium" && !slices.Contains(test, each) {
			t.Errorf("%s: a build installs %v, the tests %v", each, build, test)
		}
	}
	if strings.Contains(read(t, "Makefile"), "build: deps") {
		t.Error("make build installs what only tests need")
	}
}
