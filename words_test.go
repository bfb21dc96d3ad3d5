package countersign_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// The limits of the project's text. A tab counts as four columns.
const (
	codeColumns  = 120
	proseColumns = 100
	// pronounShare is the largest share of pronouns among the words of a folder's comments. bbolt
	// and golang.org/x/mod/sumdb have 4 to 5 %.
	pronounShare = 0.06
)

// TestWords holds the comments and documents against the rules of prose: columns, the first word
// of a sentence, and the share of pronouns. A subtest is named after its folder, so that
// `go test -run TestWords/wire$ .` checks one.
func TestWords(t *testing.T) {
	for folder, files := range tracked(t, "*.go") {
		t.Run(folder, func(t *testing.T) {
			var words, pronouns int
			for _, file := range files {
				columns(t, file, codeColumns, func(string) bool { return true })
				for _, c := range comments(t, file) {
					for line := range strings.Lines(c.text) {
						if at := c.column + width(strings.TrimRight(line, "\n")); c.alone && at > proseColumns {
							t.Errorf("%s: a comment has %d columns: %s", c.at, at, line)
						}
					}
					sentences(t, c.at, c.prose())
					n, p := countPronouns(c.prose())
					words, pronouns = words+n, pronouns+p
				}
			}
			if share := float64(pronouns) / float64(max(words, 1)); words > 300 && share > pronounShare {
				t.Errorf("%.1f %% of the words in comments are pronouns, at most %.0f %% should be: name the thing",
					100*share, 100*pronounShare)
			}
		})
	}
	for _, files := range tracked(t, "*.md") {
		for _, file := range files {
			t.Run(file, func(t *testing.T) {
				for at, paragraph := range paragraphs(t, file) {
					sentences(t, at, paragraph)
				}
			})
		}
	}
}

// tracked lists the project's files of a pattern by their folder.
func tracked(t *testing.T, pattern string) map[string][]string {
	t.Helper()
	out, err := exec.Command("git", "ls-files", "--cached", "--others", "--exclude-standard", pattern).Output()
	if err != nil {
		t.Fatal(err)
	}
	folders := map[string][]string{}
	for file := range strings.Lines(string(out)) {
		file = strings.TrimSpace(file)
		if _, err := os.Stat(file); err == nil && !strings.Contains(file, "testdata/") {
			folders[filepath.Dir(file)] = append(folders[filepath.Dir(file)], file)
		}
	}
	if len(folders) == 0 {
		t.Fatalf("git lists no %s", pattern)
	}
	return folders
}

func width(line string) int { return utf8.RuneCountInString(strings.ReplaceAll(line, "\t", "    ")) }

// columns reports the lines of a file that pass a limit, of those that counts accepts.
func columns(t *testing.T, file string, limit int, counts func(line string) bool) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for i, line := range strings.Split(string(b), "\n") {
		if n := width(line); n > limit && counts(line) {
			t.Errorf("%s:%d: %d columns, at most %d: %s", file, i+1, n, limit, line)
		}
	}
}

// comment is a group of // lines as it stands in a file.
type comment struct {
	at     token.Position
	column int    // columns before it
	alone  bool   // no code stands before it on its first line
	text   string // its lines with their slashes
}

func comments(t *testing.T, file string) (all []comment) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	set := token.NewFileSet()
	f, err := parser.ParseFile(set, file, b, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(b), "\n")
	for _, group := range f.Comments {
		at := set.Position(group.Pos())
		before := lines[at.Line-1][:at.Column-1]
		c := comment{at: at, column: width(before), alone: strings.TrimSpace(before) == ""}
		for _, line := range group.List {
			if !isDirective(line) {
				c.text += line.Text + "\n"
			}
		}
		all = append(all, c)
	}
	return all
}

// isDirective says that a comment is for the compiler or a tool: //go:build, // Output:, //lint:…
func isDirective(c *ast.Comment) bool {
	return regexp.MustCompile(`^//[a-z]+:|^// (Unordered )?[oO]utput:`).MatchString(c.Text)
}

// prose is the text of a comment without slashes and without indented blocks, which hold code and
// tables.
func (c comment) prose() string {
	var b strings.Builder
	for line := range strings.Lines(c.text) {
		line = strings.TrimSuffix(strings.TrimPrefix(line, "//"), "\n")
		if strings.HasPrefix(line, "\t") || strings.HasPrefix(line, "   ") {
			line = "."
		}
		b.WriteString(strings.TrimSpace(line) + "\n")
	}
	return b.String()
}

// startsBadly finds a sentence whose first word is a pronoun without a noun before it.
var startsBadly = regexp.MustCompile(`(?:^|[.!?]\s+)((?:Who|What|That|It)\b[^.]*)`)

func sentences(t *testing.T, at any, text string) {
	t.Helper()
	text = strings.Join(strings.Fields(text), " ")
	for _, m := range startsBadly.FindAllStringSubmatch(text, -1) {
		t.Errorf("%v: a sentence begins with a pronoun: %.60s", at, m[1])
	}
	if first, _, _ := strings.Cut(text, " "); slices.Contains([]string{"who", "what", "that", "it"}, first) {
		t.Errorf("%v: a comment begins with a pronoun: %.60s", at, text)
	}
}

var (
	word     = regexp.MustCompile(`[A-Za-z]+`)
	pronouns = strings.Fields(`i you he she it we they me him her us them my your his its our their
		this that these those who whom whose which what nobody anybody somebody everybody
		nothing anything something everything`)
)

func countPronouns(text string) (words, found int) {
	for _, w := range word.FindAllString(text, -1) {
		words++
		if slices.Contains(pronouns, strings.ToLower(w)) {
			found++
		}
	}
	return words, found
}

// paragraphs yields the prose of a document by its place, and reports lines of prose that are too
// long. Code blocks, tables and link lists are no prose.
func paragraphs(t *testing.T, file string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	var text []string
	code := false
	flush := func() {
		if len(text) > 0 {
			all[file+": "+text[0]] = strings.Join(text, " ")
		}
		text = nil
	}
	for i, line := range strings.Split(string(b), "\n") {
		if strings.HasPrefix(strings.TrimSpace(line), "```") {
			code = !code
			flush()
			continue
		}
		trimmed := strings.TrimSpace(line)
		block := strings.HasPrefix(line, "    ") || strings.HasPrefix(trimmed, "|") || strings.HasPrefix(trimmed, "#")
		if code || trimmed == "" || block {
			flush()
			continue
		}
		if item := regexp.MustCompile(`^([-*]|\d+\.) `); item.MatchString(trimmed) {
			flush()
			trimmed = item.ReplaceAllString(trimmed, "")
		}
		breakable := strings.Contains(trimmed, " ") && !strings.Contains(line, "](")
		if n := width(line); n > proseColumns && breakable {
			t.Errorf("%s:%d: %d columns of prose, at most %d", file, i+1, n, proseColumns)
		}
		text = append(text, trimmed)
	}
	flush()
	return all
}

// TestWordsFindsFaults sees that the rules of TestWords can fail.
func TestWordsFindsFaults(t *testing.T) {
	for text, bad := range map[string]bool{
		"The ledger is a file. It has pages.":           true,
		"What is kept is small.":                        true,
		"The ledger keeps nonces. Each has an hour.":    false,
		"Whatever the disk says, the nonce is spent.":   false,
		"A nonce is spent once: it can't be had again.": false,
	} {
		if got := startsBadly.MatchString(text); got != bad {
			t.Errorf("%q: %v, want %v", text, got, bad)
		}
	}
	if words, found := countPronouns("It says what the ledger has"); words != 6 || found != 2 {
		t.Errorf("%d of %d words are pronouns", found, words)
	}
	if n := width("\ta — b"); n != 9 {
		t.Errorf("%d columns", n)
	}
	if len(slices.Collect(maps.Keys(tracked(t, "*.go")))) < 20 {
		t.Error("hardly any folder is checked")
	}
}
