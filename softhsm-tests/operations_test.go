package softhsmtests

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"countersign/internal/mirror/mirrortest"
	"countersign/tpm/tpmtest"

	"github.com/rogpeppe/go-internal/testscript"
)

// documents have commands that TestOperations runs.
var documents = []string{"docs/INCIDENTS.md", "docs/OPERATIONS.md", "docs/PEERS.md", "README.md"}

// TestOperations runs every command of the documents. A script in testdata/operations sets up the
// state that a section presupposes, and has the persons of the section type its commands verbatim
// (the script command doc), which must print what the document says.
func TestOperations(t *testing.T) {
	needSoftHSM(t)
	o := operations{typed: map[string]bool{}}
	for _, path := range documents {
		o.documents = append(o.documents, readDocument(t, path))
	}
	commands := map[string]func(*testscript.TestScript, bool, []string){
		"appliance": o.appliance, "approve": o.approve, "as": o.as, "configure": o.configure, "demo": o.demo,
		"doc": o.doc, "file": o.file, "halt": o.halt, "operators": o.operators, "peer": o.peer,
		"receive": o.receive, "run": o.run, "serve": o.serve, "sftp": o.sftp, "tpm": o.tpm, "until": o.until,
	}
	ran := t.Run("scripts", func(t *testing.T) {
		testscript.Run(t, testscript.Params{
			Dir: "testdata/operations", Setup: o.setup, RequireExplicitExec: true, Cmds: commands,
		})
	})
	if !ran {
		return // a script that has failed has not typed the rest
	}
	t.Run("every command was typed", func(t *testing.T) {
		for _, d := range o.documents {
			for _, s := range d.sections {
				for _, b := range s.blocks {
					for _, c := range b.commands {
						// Makefile targets are left out: make test would run this test again.
						// The tests of packaging type the commands of host, and those of image the
						// ones of maker and ada.
						left := slices.Contains([]string{"host", "maker", "ada"}, b.by) ||
							d.path == "README.md" && strings.HasPrefix(c.text, "make ")
						if !o.typed[c.place] && !left {
							t.Errorf("%s: no script types this: %s", c.place, c.text)
						}
					}
				}
			}
		}
	})
}

// TestIncidents checks that each page of docs/INCIDENTS.md comes to its first command within ten
// lines, since its reader is in a hurry.
func TestIncidents(t *testing.T) {
	const most = 10
	d := readDocument(t, "docs/INCIDENTS.md")
	for _, s := range d.sections[1:] { // the first one has the contents
		if len(s.blocks) == 0 {
			t.Errorf("%s: %q has no command", d.path, s.title)
		} else if n := s.blocks[0].line - s.line - 1; n > most {
			t.Errorf("%s: %q has %d lines before its first command, at most %d", d.path, s.title, n, most)
		}
	}
}

// TestDocumentsLinks checks that each link to a file or to a section of a document leads there, and
// that the contents of the operator's documents have all sections.
func TestDocumentsLinks(t *testing.T) {
	paths := append(orPanic(filepath.Glob("../docs/*.md")), "../README.md", "../client/README.md")
	for _, path := range paths {
		text, own := headings(t, path)
		for _, link := range regexp.MustCompile(`\]\(([^):#]*)(?:#([^)]*))?\)`).FindAllStringSubmatch(text, -1) {
			to, anchors := filepath.Join(filepath.Dir(path), link[1]), own
			if link[1] != "" && !exists(to) {
				t.Errorf("%s: there is no %s", path, link[1])
				continue
			}
			if link[1] != "" && link[2] != "" {
				_, anchors = headings(t, to)
			}
			if _, is := anchors[link[2]]; link[2] != "" && !is {
				t.Errorf("%s: %s#%s leads nowhere", path, link[1], link[2])
			}
		}
		contents, _, _ := strings.Cut(text, "\n## ")
		for anchor, level := range own {
			operators := path == "../docs/INCIDENTS.md" || path == "../docs/OPERATIONS.md"
			if operators && level == 2 && !strings.Contains(contents, "(#"+anchor+")") {
				t.Errorf("%s: the contents do not have #%s", path, anchor)
			}
		}
	}
}

// headings returns a document without its fences, and the anchors of its sections with their
// levels.
func headings(t *testing.T, path string) (text string, anchors map[string]int) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text, anchors = regexp.MustCompile("(?ms)^ *```.*?^ *```$").ReplaceAllString(string(b), ""), map[string]int{}
	for _, m := range regexp.MustCompile(`(?m)^(#+) (.*)$`).FindAllStringSubmatch(text, -1) {
		anchor := regexp.MustCompile(`[^\p{L}\p{N} _-]`).ReplaceAllString(strings.ToLower(m[2]), "")
		anchors[strings.ReplaceAll(anchor, " ", "-")] = len(m[1])
	}
	return text, anchors
}

// document is a Markdown file with commands. An indented block has commands, one a line. A fenced
// block has anything else, such as a configuration, and names its language. The fence text directly
// after a block of commands is what the commands print.
type document struct {
	path     string
	text     string
	sections []*section
}

type section struct {
	title  string
	line   int
	blocks []*block
	files  []string // contents of the fences other than text
}

// block is an indented block of commands. Its first line says who types it, as "# ann". Only in
// README.md, one reader types all blocks.
type block struct {
	line     int
	by       string
	commands []command
	prints   string // of both outputs; "": the block prints nothing
	silent   bool   // the document does not say what the block prints; only in README.md
}

type command struct {
	place string // such as docs/OPERATIONS.md:120
	text  string
}

// typists are the persons of the documents. dave is an auditor, shop a peer, builds a receiver of
// webhooks, monitor a monitoring job, and signer signs updates. alice, carol and erin are recovery
// holders. host is root on a fresh machine.
var typists = []string{
	"host", "maker", "ada", "root", "ann", "bob", "dave", "shop", "builds", "monitor", "signer", "alice", "carol",
	"erin",
}

// typesDaemon are the persons who type commands of countersignd.
var typesDaemon = []string{"host", "root", "signer"}

// serves is the beginning of a command that ends when the daemon does.
const serves = "countersignd serve "

func readDocument(t *testing.T, path string) *document {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", path))
	if err != nil {
		t.Fatal(err)
	}
	d, s := &document{path: path, text: string(b)}, &section{}
	lines := strings.Split(d.text, "\n")
	text := func(i int) string { return strings.TrimSpace(lines[i]) }
	var last *block // the block that a fence may follow
	for i := 0; i < len(lines); i++ {
		place := func() string { return fmt.Sprintf("%s:%d", path, i+1) }
		language, fence := strings.CutPrefix(text(i), "```")
		switch {
		case text(i) == "":
			continue
		case fence:
			if language == "" {
				t.Errorf("%s: say what is in the fence; commands are indented", place())
			}
			indent, _, _ := strings.Cut(lines[i], "`")
			var inside strings.Builder
			for i++; text(i) != "```"; i++ {
				inside.WriteString(strings.TrimPrefix(lines[i], indent) + "\n")
			}
			if language != "text" {
				s.files = append(s.files, inside.String())
			} else if last != nil {
				last.prints, last.silent = inside.String(), false
			}
			last = nil
		case strings.HasPrefix(lines[i], "    ") && text(i-1) == "":
			last = &block{line: i + 1, by: "you", silent: path == "README.md"}
			s.blocks = append(s.blocks, last)
			if by, says := strings.CutPrefix(text(i), "# "); says {
				last.by = by
				i++
			}
			if !slices.Contains(typists, last.by) && path != "README.md" {
				t.Errorf("%s: a block begins with # and who types it, one of %q", place(), typists)
			}
			for ; text(i) != ""; i++ {
				c := command{place(), text(i)}
				last.commands = append(last.commands, c)
				switch {
				case strings.Contains(c.text, "<<") || strings.HasSuffix(c.text, "\\"):
					t.Errorf("%s: a command is on one line", c.place)
				case strings.HasPrefix(c.text, "#"):
					t.Errorf("%s: each person has a block", c.place)
				case strings.HasPrefix(c.text, "countersignd ") && !slices.Contains(typesDaemon, last.by):
					t.Errorf("%s: root types this, and not %s", c.place, last.by)
				case strings.Contains(c.text, " operator first ") && last.by != "root":
					t.Errorf("%s: root types this, and not %s", c.place, last.by)
				case strings.HasPrefix(c.text, serves) && text(i+1) != "":
					t.Errorf("%s: nobody can type a command after the daemon's", c.place)
				}
			}
		case strings.HasPrefix(lines[i], "#"):
			s, last = &section{title: strings.TrimLeft(lines[i], "# "), line: i + 1}, nil
			d.sections = append(d.sections, s)
		default:
			last = nil
		}
	}
	return d
}

type operations struct {
	documents []*document
	mu        sync.Mutex
	typed     map[string]bool // places of the commands that a script has run; guarded by mu
}

// section finds the only section with a title.
func (o *operations) section(ts *testscript.TestScript, title string) *section {
	var found []*section
	for _, d := range o.documents {
		for _, s := range d.sections {
			if s.title == title {
				found = append(found, s)
			}
		}
	}
	if len(found) != 1 {
		ts.Fatalf("%d sections have the title %q", len(found), title)
	}
	return found[0]
}

// scriptState is the state of one script.
type scriptState struct {
	*system
	address   string // a loopback address for this script only, on which the documents' ports are free
	process   *process
	tpm       *tpmtest.Emulator
	user      string   // the user whose shell runs the commands
	operators []string // in the order of their enrolment
	paths     *strings.Replacer
}

func (o *operations) setup(e *testscript.Env) error {
	t := e.T().(testing.TB)
	s := &system{t: t, dir: e.WorkDir}
	w := &scriptState{system: s, address: loopback()}
	s.listen = w.address + ":7700"
	e.Values["state"] = w
	repository, err := filepath.Abs("..")
	if err != nil {
		return err
	}
	for name, value := range map[string]string{
		"PATH": bin + ":" + os.Getenv("PATH"), "HOME": e.WorkDir, "BIN": bin, "REPOSITORY": repository,
		"ADDRESS": w.address, "COUNTERSIGN_SOCKET": s.path("admin.sock"), "COUNTERSIGN_SERVER": s.listen,
		"SOFTHSM2_CONF": s.path("softhsm2.conf"),
	} {
		e.Setenv(name, value)
	}
	s.write(".curlrc", fmt.Sprintf("connect-to = localhost:7780:%[1]s:7780\n"+
		"connect-to = localhost:7790:%[1]s:7790\nsilent\nshow-error\nfail\n", w.address))
	s.write("softhsm2.conf", fmt.Sprintf("directories.tokendir = %s\nlog.level = ERROR\n", s.path("tokens")))
	group, err := user.LookupGroupId(strconv.Itoa(os.Getgid()))
	if err != nil {
		return err
	}
	w.paths = strings.NewReplacer("countersign-admin", group.Name,
		// One user runs a script: see TestTwoUsers.
		"user = \"countersign\"\n", "", "keys_user = \"countersign-keys\"\n", "",
		"keys_socket = \"/run/countersign-keys/launcher.sock\"\n", "", "/var/lib/countersign-keys", e.WorkDir,
		"/run/countersign", e.WorkDir, "/etc/countersign", e.WorkDir, "/var/lib/countersign", e.WorkDir,
		"127.0.0.1:", w.address+":", "https://builds.example/", "http://"+w.address+":9000/")
	e.Defer(func() { // ends the ssh-agent that a document's command has started
		for _, env := range orPanic(filepath.Glob(s.path(".*.env"))) {
			b, _ := os.ReadFile(env)
			if m := regexp.MustCompile(`SSH_AGENT_PID="(\d+)"`).FindSubmatch(b); m != nil {
				if p, err := os.FindProcess(orPanic(strconv.Atoi(string(m[1])))); err == nil {
					p.Signal(syscall.SIGTERM)
				}
			}
		}
	})
	return os.Mkdir(s.path("tokens"), 0o700)
}

// orPanic returns v, and panics if there is an error.
func orPanic[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// stateOf returns the state of a script, for a command that can't be negated with "!".
func stateOf(ts *testscript.TestScript, neg bool) *scriptState {
	if neg {
		ts.Fatalf("this command can't be negated: leave out the !")
	}
	return ts.Value("state").(*scriptState)
}

// environmentFile is the path of the file that keeps the exported variables of a user's shell from
// one block of commands to the next.
func (w *scriptState) environmentFile(user string) string { return w.path("." + user + ".env") }

// shell returns the bash code that precedes each command: the user's folder and environment.
func (w *scriptState) shell(ts *testscript.TestScript) string {
	if w.user == "" {
		ts.Fatalf("no user is set: begin with the command as NAME")
	}
	return fmt.Sprintf("set -aeuo pipefail; cd %q; . %q; ", ts.MkAbs("."), w.environmentFile(w.user))
}

// as implements "as NAME": the following commands run in the shell of the user NAME.
func (o *operations) as(ts *testscript.TestScript, neg bool, args []string) {
	w := stateOf(ts, neg)
	if w.user = args[0]; exists(w.environmentFile(w.user)) {
		return
	}
	w.write(filepath.Base(w.environmentFile(w.user)),
		fmt.Sprintf("export XDG_RUNTIME_DIR=%q XDG_CONFIG_HOME=%q\n",
			w.path(w.user+".run"), w.path(w.user+".config")))
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// doc implements "doc 'TITLE' [N...]", which has the persons of a section type its blocks, or its
// blocks N, counted from 1. Each block must print what the document says. Both outputs are one, as
// on a terminal, and are the script's stdout. The folder of the script stands for /run/countersign.
// A daemon that a block starts is ready afterwards, and its log is no part of the output.
func (o *operations) doc(ts *testscript.TestScript, neg bool, args []string) {
	w := stateOf(ts, neg)
	s := o.section(ts, args[0])
	if len(s.blocks) == 0 {
		ts.Fatalf("section %q has no commands", s.title)
	}
	for i, b := range s.blocks {
		if len(args) > 1 && !slices.Contains(args[1:], strconv.Itoa(i+1)) {
			continue
		}
		o.as(ts, false, []string{b.by})
		var printed strings.Builder
		cmd := w.command(ts, b.script(w))
		cmd.Stdout = io.MultiWriter(ts.Stdout(), &printed)
		cmd.Stderr = cmd.Stdout
		ts.Check(cmd.Run())
		if last := b.commands[len(b.commands)-1].text; strings.HasPrefix(last, serves) {
			w.start(ts, last)
		}
		out := printed.String()
		w.checkOutput("the output of "+b.commands[0].place+": "+b.script(w), out)
		if !b.silent && !like(b.prints).MatchString(plain(out)) {
			w.t.Errorf("%s: the block prints\n%s\nand the document says\n%s", b.commands[0].place, out, b.prints)
		}
		o.mu.Lock()
		for _, c := range b.commands {
			o.typed[c.place] = true
		}
		o.mu.Unlock()
	}
}

// script is the bash code of a block: its commands, apart from the daemon's, and the code that
// keeps the shell's environment for the next block. A command that fails is named by its place.
func (b *block) script(w *scriptState) string {
	user := orPanic(user.Current()).Username // stands for all users of the documents
	script := "trap 'echo \"$place: this command has failed\" >&2' ERR\n"
	for _, c := range b.commands {
		if !strings.HasPrefix(c.text, serves) {
			folders := strings.NewReplacer("/run/countersign/", w.dir+"/", "/var/lib/countersign/", w.dir+"/",
				"/var/lib/countersign-keys/", w.dir+"/", " countersign-keys ", " "+user+" ")
			script += fmt.Sprintf("place=%q\n%s\n", c.place, folders.Replace(c.text))
		}
	}
	return script + fmt.Sprintf("unset place; { umask -p; export -p; } >%[1]q.new; mv %[1]q.new %[1]q\n",
		w.environmentFile(w.user))
}

// varying are the parts of an output that differ between runs, with what stands for them. Other
// numbers must be the document's.
var varying = []struct {
	*regexp.Regexp
	by string
}{
	{regexp.MustCompile(`\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?Z?`), "TIME"},
	{regexp.MustCompile(`\b[0-9a-f]{12,}\b|\+[0-9a-f]{8}\+`), "HEX"},
	{regexp.MustCompile(`[0-9A-Za-z+/]{30,}=*`), "BASE64"},
	{regexp.MustCompile(`(/[\w.-]+)+/`), "FOLDER/"},
	{regexp.MustCompile(`\b\d+ handshakes?\b`), "N handshakes"},
	{regexp.MustCompile(`\b(\d+\.){3}\d+\b`), "ADDRESS"},
	{regexp.MustCompile(`\b\d+(\.\d+)?(µs|ms)\b|\b\d+\.\d+s\b`), "DURATION"},
	{regexp.MustCompile(`\b\d+ KiB\b`), "SIZE"},
	{regexp.MustCompile(`\b\d+( events?\b)`), "N$1"},
	{regexp.MustCompile(`(\bevents?) +\d+\b`), "$1 N"},
	{regexp.MustCompile(`(?m)^(\| )?\d+( +TIME)`), "${1}N$2"}, // a row of a list of events
	{regexp.MustCompile(`[ \t]+`), " "},
	{regexp.MustCompile(`(?m) $|^ `), ""},
}

// plain returns a text without the parts that differ between runs.
func plain(text string) string {
	for _, each := range varying {
		text = each.ReplaceAllString(text, each.by)
	}
	return text
}

// like returns the pattern of the outputs for which a document's text stands. In a line … stands
// for the rest of a word or of the line, and alone in a line for any lines.
func like(text string) *regexp.Regexp {
	const word = "\x00" // the … of a shortened word, which is no line of its own
	text = regexp.MustCompile(`(\b[0-9a-f]{6,}|[0-9A-Za-z+/]{20,})…`).ReplaceAllString(text, word)
	pattern := regexp.QuoteMeta(plain(text))
	pattern = regexp.MustCompile(`(?m)^…\n`).ReplaceAllString(pattern, "(?:.*\n)*?")
	return regexp.MustCompile("^" + strings.NewReplacer("…", ".*", word, ".+").Replace(pattern) + "$")
}

// TestPrintsAreCompared sees that the comparison of outputs can fail.
func TestPrintsAreCompared(t *testing.T) {
	for _, c := range []struct {
		says, prints string
		same         bool
	}{
		{"", "", true},
		{"", "suspended  shop\n", false},
		{"suspended  shop\n", "", false},
		{"suspended  shop\n", "suspended  shop\nsuspended  shop\n", false},
		{"suspended  shop\n", "suspended  wines\n", false},
		{"proposal 3: open, 1 of 2\n", "proposal 3: open, 1 of 2\n", true},
		{"proposal 3: open, 1 of 2\n", "proposal 4: open, 1 of 2\n", false},
		{"proposal 3: open, 1 of 2\n", "proposal 3: open, 2 of 2\n", false},
		{"presence    1s after\n", "presence    2s after\n", false},
		{"pong in 1.67ms\n", "pong in 860µs\n", true},
		{"A  STATE\n1  up\n", "A   STATE  \n1   up  \n", true},
		{"A  STATE\n1  up\n", "A  STATE\n1  down\n", false},
		{"27  2026-11-29T00:58:41.397Z  Started\n", "5  2026-11-30T10:08:01.001Z  Started\n", true},
		{"27  2026-11-29T00:58:41.397Z  Started\n", "5  2026-11-30T10:08:01.001Z  Stopped\n", false},
		{"/home/ann/a.sock\n", "/tmp/1/b/a.sock\n", true},
		{"/home/ann/a.sock\n", "/tmp/1/b/b.sock\n", false},
		{"key 7f683b8636e0…, not enrolled\n", "key 0f9905584b24ec7dedb0a6a49f06984b, not enrolled\n", true},
		{"key 7f683b8636e0…, not enrolled\n", "key 0f9905584b24ec7dedb0a6a49f06984b, enrolled\n", false},
		{"one\n2e872488c6b34a78…\nlast\n", "one\n84797cbeb89c5f0021c67ec7\nlast\n", true},
		{"one\n2e872488c6b34a78…\nlast\n", "one\nlast\n", false},
		{"one\n…\nlast\n", "one\nlast\n", true},
		{"one\n…\nlast\n", "one\n\ntwo\nlast\n", true},
		{"one\n…\nlast\n", "one\nlast\nmore\n", false},
		{"…\nlast\n", "one\nat last\n", false},
	} {
		if like(c.says).MatchString(plain(c.prints)) != c.same {
			t.Errorf("%q for %q: the same: %t", c.says, c.prints, !c.same)
		}
	}
}

// command returns a command of the user's shell.
func (w *scriptState) command(ts *testscript.TestScript, line string) *exec.Cmd {
	cmd := exec.Command("bash", "-c", w.shell(ts)+line)
	cmd.Env = os.Environ()
	for _, name := range []string{
		"PATH", "HOME", "BIN", "REPOSITORY", "ADDRESS", "COUNTERSIGN_SOCKET", "COUNTERSIGN_SERVER", "SOFTHSM2_CONF",
		"TPM2TOOLS_TCTI", "WORK", "TMPDIR",
	} {
		if value := ts.Getenv(name); value != "" {
			cmd.Env = append(cmd.Env, name+"="+value)
		}
	}
	return cmd
}

// start runs the command line of a daemon and waits until the daemon is ready.
func (w *scriptState) start(ts *testscript.TestScript, line string) {
	if w.process != nil {
		ts.Fatalf("a daemon is running already")
	}
	cmd := exec.Command("bash", "-c", "exec "+line)
	cmd.Dir, cmd.Env = w.dir, append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
	w.process = w.system.start(cmd)
}

func (o *operations) serve(ts *testscript.TestScript, neg bool, _ []string) {
	stateOf(ts, neg).start(ts, "countersignd serve --config countersign.toml")
}

func (o *operations) halt(ts *testscript.TestScript, neg bool, _ []string) {
	w := stateOf(ts, neg)
	w.process.stop()
	w.process = nil
}

// appliance implements "appliance softhsm|tpm|files [OLD NEW]...", which sets up an appliance with
// a policy for the peer shop and starts the daemon. The configuration is the one of the documents,
// with each OLD replaced by NEW. With files, the appliance is one of SoftHSM, and init is still to
// come.
func (o *operations) appliance(ts *testscript.TestScript, neg bool, args []string) {
	w := stateOf(ts, neg)
	w.write("pin", userPIN+"\n")
	w.write("so-pin", "so-"+userPIN+"\n")
	w.write("policy.cedar",
		"permit (principal == Peer::\"shop\", action == Action::\"sign\", resource == Key::\"payments\");\n")
	text, init := o.section(ts, "First start").files[0], []string{"init", "--config", "countersign.toml"}
	if args[0] == "tpm" {
		text = text[:strings.Index(text, "[tokens.")] + o.section(ts, "A TPM in the token's place").files[0]
	} else {
		init = append(init, "--new-token", "--so-pin-file", "so-pin")
	}
	for pair := range slices.Chunk(args[1:], 2) {
		if !strings.Contains(text, pair[0]) {
			ts.Fatalf("the configuration has no %q", pair[0])
		}
		text = strings.Replace(text, pair[0], strings.ReplaceAll(pair[1], `\n`, "\n"), 1)
	}
	w.write("countersign.toml", w.localPaths(text))
	if args[0] == "files" {
		return
	}
	ts.Check(ts.Exec("countersignd", init...))
	o.serve(ts, neg, nil)
}

// localPaths replaces the documents' paths, addresses and TPM device by those of this script.
func (w *scriptState) localPaths(text string) string {
	if w.tpm != nil {
		text = strings.ReplaceAll(text, "/dev/tpmrm0", w.tpm.Socket)
	}
	return w.paths.Replace(text)
}

// peer implements "peer NAME": an operator enrols a peer, and creates the key payments unless the
// key exists. Afterwards the commands run in the peer's shell.
func (o *operations) peer(ts *testscript.TestScript, neg bool, args []string) {
	w := stateOf(ts, neg)
	name := args[0]
	o.as(ts, false, w.operators[:1])
	ts.Check(ts.Exec("bash", "-c", w.shell(ts)+fmt.Sprintf("countersign keygen %[1]s.key >%[1]s.pub; "+
		"countersign admin noise-key >noise.pub; "+
		"countersign admin peer add %[1]s $(cat %[1]s.pub) 2>&1; "+
		"countersign admin key show payments >/dev/null 2>&1 || countersign admin key create payments", name)))
	if len(w.operators) > 1 {
		o.approve(ts, false, w.operators[1:2])
	}
	o.as(ts, false, args)
	w.export("COUNTERSIGN_SERVER_KEY=\"$(cat noise.pub)\" COUNTERSIGN_IDENTITY=" + name + ".key")
}

// export adds variables to the environment of the current user.
func (w *scriptState) export(what string) {
	b, _ := os.ReadFile(w.environmentFile(w.user))
	w.write(filepath.Base(w.environmentFile(w.user)), string(b)+"export "+what+"\n")
}

// configure implements "configure TITLE N", which adds the N-th file of a section to the
// configuration, with the paths of this script.
func (o *operations) configure(ts *testscript.TestScript, neg bool, args []string) {
	w := stateOf(ts, neg)
	text := w.localPaths(o.content(ts, args))
	b, _ := os.ReadFile(w.path("countersign.toml"))
	if before := string(b); strings.HasPrefix(text, "[") { // TOML tables follow the top-level keys
		text = before + "\n" + text
	} else {
		text += "\n" + before
	}
	w.write("countersign.toml", text)
}

// file implements "file TITLE N PATH", which writes the N-th file of a section.
func (o *operations) file(ts *testscript.TestScript, neg bool, args []string) {
	stateOf(ts, neg).write(args[2], o.content(ts, args))
}

// content returns the file of a section that the arguments TITLE N name.
func (o *operations) content(ts *testscript.TestScript, args []string) string {
	files := o.section(ts, args[0]).files
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	if n < 1 || n > len(files) {
		ts.Fatalf("%q has %d files", args[0], len(files))
	}
	return files[n-1]
}

// operators implements "operators NAME...", which enrols the first name as the first administrator
// and the others as operators with the role approver, but dave as an auditor. With two names or
// more, proposals need two approvals afterwards.
func (o *operations) operators(ts *testscript.TestScript, neg bool, names []string) {
	w := stateOf(ts, neg)
	w.operators = names
	for i, name := range names {
		p := w.newOperator(name)
		w.write(name+".key.pub", p.line+"\n")
		o.as(ts, false, []string{name})
		w.export(fmt.Sprintf("COUNTERSIGN_OPERATOR=%s SSH_AUTH_SOCK=%q", name, p.socket))
		o.as(ts, false, names[:1])
		line := fmt.Sprintf("countersign admin operator add %[1]s --roles operator,approver", name)
		if name == "dave" {
			line = fmt.Sprintf("countersign admin operator add %[1]s --roles auditor", name)
		}
		if i == 0 {
			line = fmt.Sprintf("countersign admin operator first %[1]s", name)
		}
		line += fmt.Sprintf(" --ssh-key %s.key.pub", name)
		ts.Check(ts.Exec("bash", "-c", w.shell(ts)+line+" 2>&1"))
	}
	if len(names) > 1 {
		ts.Check(ts.Exec("bash", "-c", w.shell(ts)+"countersign admin approvals needed 2 2>&1"))
	}
	for _, name := range names { // each pins the appliance's name now, and not in a block
		o.as(ts, false, []string{name})
		ts.Check(ts.Exec("bash", "-c", w.shell(ts)+"countersign admin whoami 2>&1"))
	}
	o.as(ts, false, names[:1])
}

// approve implements "approve NAME": the operator NAME approves the oldest open proposal, whose
// state must be done afterwards.
func (o *operations) approve(ts *testscript.TestScript, neg bool, args []string) {
	w := stateOf(ts, neg)
	was := w.user
	o.as(ts, false, args)
	ts.Check(ts.Exec("bash", "-c", w.shell(ts)+
		`n=$(countersign admin proposal list | awk '$NF == "open" { n = $1 } END { print n }'); `+
		`countersign admin proposal approve "$n" | grep done`))
	w.user = was
}

// run implements "run COMMAND": the user runs a command that is in no document.
func (o *operations) run(ts *testscript.TestScript, neg bool, args []string) {
	w := ts.Value("state").(*scriptState)
	err := ts.Exec("bash", "-c", w.shell(ts)+strings.Join(args, " "))
	if (err != nil) != neg {
		ts.Fatalf("unexpected: %v", err)
	}
	w.checkOutput("the output of "+strings.Join(args, " "), ts.ReadFile("stdout")+ts.ReadFile("stderr"))
}

// until implements "until COMMAND", which repeats a command until its exit status is 0, for at most
// one minute.
func (o *operations) until(ts *testscript.TestScript, neg bool, args []string) {
	w := stateOf(ts, neg)
	var out []byte
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		var err error
		if out, err = w.command(ts, strings.Join(args, " ")).CombinedOutput(); err == nil {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("the command fails after one minute of retries: %v\n%s", err, out)
		}
	}
}

// tpm implements "tpm", which starts a software TPM (swtpm).
func (o *operations) tpm(ts *testscript.TestScript, neg bool, _ []string) {
	w := stateOf(ts, neg)
	w.tpm = tpmtest.New(w.t)
	ts.Setenv("TPM2TOOLS_TCTI", "swtpm:path="+w.tpm.Socket)
}

// sftp implements "sftp KEY.pub", which starts an SFTP server that lets in a key, in the place of
// the server of the configuration.
func (o *operations) sftp(ts *testscript.TestScript, neg bool, args []string) {
	w := stateOf(ts, neg)
	server := mirrortest.New(w.t)
	server.Authorize(strings.TrimSpace(string(w.read(args[0]))))
	text := string(w.read("countersign.toml"))
	const line = "sftp_host_keys = "
	at := strings.Index(text, line) + len(line)
	end := at + strings.Index(text[at:], "\n")
	text = text[:at] + fmt.Sprintf("[%q]", server.HostKey) + text[end:]
	w.write("countersign.toml", strings.Replace(text, "sftp://countersign@backup.example.com/pay1", server.URL(), 1))
}

// receive implements "receive FOLDER", which serves HTTP on port 9000 as a receiver of webhooks
// does, and writes the newest request's headers and body to files.
func (o *operations) receive(ts *testscript.TestScript, neg bool, args []string) {
	w := stateOf(ts, neg)
	l, err := net.Listen("tcp", w.address+":9000")
	ts.Check(err)
	ts.Defer(func() { l.Close() })
	go http.Serve(l, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.checkOutput("the body of a webhook", string(body))
		for name, text := range map[string]string{
			"webhook-id":        r.Header.Get("Webhook-Id"),
			"webhook-timestamp": r.Header.Get("Webhook-Timestamp"),
			"webhook-signature": r.Header.Get("Webhook-Signature"),
			"body":              string(body),
		} {
			path := filepath.Join(w.dir, args[0], name)
			os.WriteFile(path+".new", []byte(text), 0o600)
			os.Rename(path+".new", path)
		}
	}))
}

// demo implements "demo", which runs make run in a copy of the repository. At the end of the
// script, SIGINT stops make run, as Ctrl-C does.
func (o *operations) demo(ts *testscript.TestScript, neg bool, _ []string) {
	w := stateOf(ts, neg)
	for _, path := range []string{"Makefile", "README.md", "scripts", "examples"} {
		ts.Check(ts.Exec("cp", "-r", filepath.Join(ts.Getenv("REPOSITORY"), path), "."))
	}
	ts.Check(os.Symlink(bin, w.path("bin")))
	cmd := exec.Command("make", "-o", "build", "run") // the programs are built already
	cmd.Dir = w.dir
	cmd.Env = append(os.Environ(), "LISTEN="+w.listen, "LISTEN_PUBKY="+w.address+":7701", "BACKEND=softhsm")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	ts.Check(cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	ts.Defer(func() {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGINT)
		select {
		case <-ended:
			if !strings.HasSuffix(out.String(), "stopped\n") {
				w.t.Errorf("make run did not print stopped at its end:\n%s", out.String())
			}
		case <-time.After(time.Minute):
			syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			<-ended
			w.t.Errorf("make run did not end:\n%s", out.String())
		}
	})
	for deadline := time.Now().Add(time.Minute); !exists(w.path(".run/env")); time.Sleep(20 * time.Millisecond) {
		if len(ended) > 0 || time.Now().After(deadline) {
			syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
			ended <- <-ended
			ts.Fatalf("make run does not serve:\n%s", out.String())
		}
	}
}
