package softhsmtests

import (
	"fmt"
	"io"
	"math/rand/v2"
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

	"countersign/tpm/tpmtest"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestOperations runs every command of docs/OPERATIONS.md, docs/PEERS.md and README.md. A script in
// testdata/operations sets up the state that a section presupposes, runs the section's commands
// verbatim (the script command doc) and checks the results.
func TestOperations(t *testing.T) {
	needSoftHSM(t)
	o := operations{
		documents: []*document{
			readDocument(t, "docs/OPERATIONS.md"), readDocument(t, "docs/PEERS.md"), readDocument(t, "README.md"),
		},
		typed: map[string]bool{},
	}
	commands := map[string]func(*testscript.TestScript, bool, []string){
		"appliance": o.appliance, "approve": o.approve, "as": o.as, "configure": o.configure, "demo": o.demo,
		"doc": o.doc, "file": o.file, "halt": o.halt, "operators": o.operators, "peer": o.peer,
		"receive": o.receive, "run": o.run, "serve": o.serve, "tpm": o.tpm, "until": o.until,
	}
	t.Run("scripts", func(t *testing.T) {
		testscript.Run(t, testscript.Params{
			Dir: "testdata/operations", Setup: o.setup, RequireExplicitExec: true, Cmds: commands,
		})
	})
	t.Run("every command was typed", func(t *testing.T) {
		for _, d := range o.documents {
			for _, s := range d.sections {
				for _, b := range s.commands {
					for _, c := range b {
						// Makefile targets are left out: make test would run this test again.
						if !o.typed[c.place] && !(d.path == "README.md" && strings.HasPrefix(c.text, "make ")) {
							t.Errorf("%s: no script types this: %s", c.place, c.text)
						}
					}
				}
			}
		}
	})
}

// TestDocumentsLinks checks that each link within a document names one of the document's sections.
func TestDocumentsLinks(t *testing.T) {
	for _, path := range []string{"docs/OPERATIONS.md", "docs/PEERS.md", "README.md"} {
		d, anchors := readDocument(t, path), map[string]bool{}
		for _, s := range d.sections {
			anchors[regexp.MustCompile(`[^a-z0-9 -]`).ReplaceAllString(strings.ToLower(s.title), "")] = true
		}
		for _, link := range regexp.MustCompile(`\]\(#([^)]*)\)`).FindAllStringSubmatch(d.text, -1) {
			if !anchors[strings.ReplaceAll(link[1], "-", " ")] {
				t.Errorf("%s: #%s leads nowhere", path, link[1])
			}
		}
	}
}

// document is a Markdown file with commands. An indented block has commands, one a line. A fenced
// block has anything else, such as a configuration, and names its language.
type document struct {
	path     string
	text     string
	sections []*section
}

type section struct {
	title    string
	commands [][]command // by indented block
	fences   []string    // contents of the fenced blocks
}

type command struct {
	place string // such as docs/OPERATIONS.md:120
	text  string
}

func readDocument(t *testing.T, path string) *document {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", path))
	if err != nil {
		t.Fatal(err)
	}
	d := &document{path: path, text: string(b)}
	s := &section{}
	var block []command
	fence, blank := false, true
	var inFence strings.Builder
	for i, line := range append(strings.Split(string(b), "\n"), "") {
		place := fmt.Sprintf("%s:%d", path, i+1)
		text := strings.TrimSpace(line)
		if code := strings.HasPrefix(line, "    ") && text != "" && !fence && (blank || block != nil); code {
			if strings.Contains(text, "<<") || strings.HasSuffix(text, "\\") {
				t.Errorf("%s: a command is on one line", place)
			}
			block = append(block, command{place, text})
			blank = false
			continue
		}
		if block != nil {
			s.commands, block = append(s.commands, block), nil
		}
		blank = text == ""
		switch {
		case strings.HasPrefix(text, "```") && fence:
			s.fences, fence = append(s.fences, inFence.String()), false
			inFence.Reset()
		case strings.HasPrefix(text, "```"):
			if fence = true; text == "```" {
				t.Errorf("%s: say what is in the fence; commands are indented", place)
			}
		case fence:
			inFence.WriteString(line + "\n")
		case strings.HasPrefix(line, "#"):
			s = &section{title: strings.TrimLeft(line, "# ")}
			d.sections = append(d.sections, s)
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
	address := fmt.Sprintf("127.%d.%d.%d", 2+rand.IntN(250), rand.IntN(256), 1+rand.IntN(254))
	w := &scriptState{system: s, address: address}
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
	s.write(".curlrc", fmt.Sprintf("connect-to = localhost:7780:%s:7780\nsilent\nshow-error\nfail\n", w.address))
	s.write("softhsm2.conf", fmt.Sprintf("directories.tokendir = %s\nlog.level = ERROR\n", s.path("tokens")))
	group, err := user.LookupGroupId(strconv.Itoa(os.Getgid()))
	if err != nil {
		return err
	}
	w.paths = strings.NewReplacer("countersign-admin", group.Name,
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

// doc implements "doc 'TITLE' [N...]", which runs the commands of a section, or those of its blocks
// N, counted from 1. The folder of the script stands for /run/countersign. The command countersignd
// serve starts a daemon and waits until the daemon is ready.
func (o *operations) doc(ts *testscript.TestScript, neg bool, args []string) {
	w := stateOf(ts, neg)
	s := o.section(ts, args[0])
	if len(s.commands) == 0 {
		ts.Fatalf("section %q has no commands", s.title)
	}
	for i, block := range s.commands {
		if len(args) > 1 && !slices.Contains(args[1:], strconv.Itoa(i+1)) {
			continue
		}
		script := ""
		run := func() {
			if script == "" {
				return
			}
			trap := "trap 'echo \"$place: this command has failed\" >&2' ERR\n"
			save := fmt.Sprintf("unset place; { umask -p; export -p; } >%[1]q.new; mv %[1]q.new %[1]q\n",
				w.environmentFile(w.user))
			ts.Check(ts.Exec("bash", "-c", w.shell(ts)+trap+script+save))
			script = ""
		}
		for _, c := range block {
			if strings.HasPrefix(c.text, "countersignd serve ") {
				run()
				w.start(ts, c.text)
			} else {
				text := strings.ReplaceAll(c.text, "/run/countersign/", w.dir+"/")
				script += fmt.Sprintf("place=%q\n%s\n", c.place, text)
			}
		}
		run()
		o.mu.Lock()
		for _, c := range block {
			o.typed[c.place] = true
		}
		o.mu.Unlock()
	}
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

// appliance implements "appliance softhsm|tpm [OLD NEW]...", which sets up an appliance with a
// policy for the peer shop and starts the daemon. The configuration is the one of the documents,
// with each OLD replaced by NEW.
func (o *operations) appliance(ts *testscript.TestScript, neg bool, args []string) {
	w := stateOf(ts, neg)
	w.write("pin", userPIN+"\n")
	w.write("so-pin", "so-"+userPIN+"\n")
	w.write("policy.cedar",
		"permit (principal == Peer::\"shop\", action == Action::\"sign\", resource == Key::\"payments\");\n")
	text, init := o.section(ts, "First start").fences[0], []string{"init", "--config", "countersign.toml"}
	if args[0] == "tpm" {
		text = text[:strings.Index(text, "[tokens.")] + o.section(ts, "A TPM in the token's place").fences[0]
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

// configure implements "configure TITLE N", which adds the N-th fenced block of a section to the
// configuration, with the paths of this script.
func (o *operations) configure(ts *testscript.TestScript, neg bool, args []string) {
	w := stateOf(ts, neg)
	n := orPanic(strconv.Atoi(args[1]))
	text := w.localPaths(o.section(ts, args[0]).fences[n-1])
	b, _ := os.ReadFile(w.path("countersign.toml"))
	if before := string(b); strings.HasPrefix(text, "[") { // TOML tables follow the top-level keys
		text = before + "\n" + text
	} else {
		text += "\n" + before
	}
	w.write("countersign.toml", text)
}

// file implements "file TITLE N PATH", which writes the N-th fenced block of a section to a file.
func (o *operations) file(ts *testscript.TestScript, neg bool, args []string) {
	stateOf(ts, neg).write(args[2], o.section(ts, args[0]).fences[orPanic(strconv.Atoi(args[1]))-1])
}

// operators implements "operators NAME...", which enrols the first name as the first administrator
// and the others as operators with the role approver. With two names or more, proposals need two
// approvals afterwards.
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
		if i == 0 {
			line = fmt.Sprintf("countersign admin operator first %[1]s", name)
		}
		line += fmt.Sprintf(" --ssh-key %s.key.pub", name)
		ts.Check(ts.Exec("bash", "-c", w.shell(ts)+line+" 2>&1"))
	}
	if len(names) > 1 {
		ts.Check(ts.Exec("bash", "-c", w.shell(ts)+"countersign admin approvals needed 2 2>&1"))
	}
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
}

// until implements "until COMMAND", which repeats a command until its exit status is 0, for at most
// one minute.
func (o *operations) until(ts *testscript.TestScript, neg bool, args []string) {
	w := stateOf(ts, neg)
	var out []byte
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		cmd := exec.Command("bash", "-c", w.shell(ts)+strings.Join(args, " "))
		for _, name := range []string{"PATH", "HOME", "COUNTERSIGN_SOCKET", "COUNTERSIGN_SERVER"} {
			cmd.Env = append(cmd.Env, name+"="+ts.Getenv(name))
		}
		var err error
		if out, err = cmd.CombinedOutput(); err == nil {
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

// receive implements "receive FOLDER", which serves HTTP on port 9000 as a receiver of webhooks
// does, and writes the newest request's headers and body to files.
func (o *operations) receive(ts *testscript.TestScript, neg bool, args []string) {
	w := stateOf(ts, neg)
	l, err := net.Listen("tcp", w.address+":9000")
	ts.Check(err)
	ts.Defer(func() { l.Close() })
	go http.Serve(l, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
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
