package softhsmtests

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
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

// TestOperations types every command of the documents: a script in testdata/operations sets up what a section presupposes, has its
// commands typed as they stand (doc), and looks at what came of them.
func TestOperations(t *testing.T) {
	needSoftHSM(t)
	o := operations{documents: []*document{readDocument(t, "docs/OPERATIONS.md"), readDocument(t, "README.md")}, typed: map[string]bool{}}
	t.Run("scripts", func(t *testing.T) {
		testscript.Run(t, testscript.Params{Dir: "testdata/operations", Setup: o.setup, RequireExplicitExec: true, Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"appliance": o.appliance, "as": o.as, "approve": o.approve, "configure": o.configure, "demo": o.demo, "doc": o.doc, "file": o.file, "operators": o.operators, "peer": o.peer, "receive": o.receive, "serve": o.serve, "halt": o.halt, "tpm": o.tpm,
			"until": o.until, "run": o.run,
		}})
	})
	t.Run("every command was typed", func(t *testing.T) {
		for _, d := range o.documents {
			for _, s := range d.sections {
				for _, b := range s.commands {
					for _, c := range b {
						// What the Makefile does is not tried here: make test is what runs this.
						if !o.typed[c.place] && !(d.path == "README.md" && strings.HasPrefix(c.text, "make ")) {
							t.Errorf("%s: no script types this: %s", c.place, c.text)
						}
					}
				}
			}
		}
	})
}

// TestDocumentsLinks: a link within a document leads to one of its sections.
func TestDocumentsLinks(t *testing.T) {
	for _, path := range []string{"docs/OPERATIONS.md", "README.md"} {
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

// document is Markdown with commands: blocks that are indented are commands, each on a line; what is in fences is something else, and says
// of which language.
type document struct {
	path     string
	text     string
	sections []*section
}

type section struct {
	title    string
	commands [][]command // by block
	fences   []string    // what is in fences
}

type command struct{ place, text string }

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
	typed     map[string]bool // places; under mu
}

// section finds one by its title.
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

// scriptState is what belongs to one script.
type scriptState struct {
	*system
	address   string // of the loopback network: each script has one, so that the documents' ports are free there
	process   *process
	tpm       *tpmtest.Emulator
	user      string   // who types
	operators []string // the operators
	paths     *strings.Replacer
}

func (o *operations) setup(e *testscript.Env) error {
	t := e.T().(testing.TB)
	s := &system{t: t, dir: e.WorkDir}
	w := &scriptState{system: s, address: fmt.Sprintf("127.%d.%d.%d", 2+rand.IntN(250), rand.IntN(256), 1+rand.IntN(254))}
	s.listen = w.address + ":7700"
	e.Values["walk"] = w
	repository, err := filepath.Abs("..")
	if err != nil {
		return err
	}
	for name, value := range map[string]string{
		"PATH": bin + ":" + os.Getenv("PATH"), "HOME": e.WorkDir, "BIN": bin, "REPOSITORY": repository, "ADDRESS": w.address,
		"COUNTERSIGN_SOCKET": s.path("admin.sock"), "COUNTERSIGN_SERVER": s.listen, "SOFTHSM2_CONF": s.path("softhsm2.conf"),
	} {
		e.Setenv(name, value)
	}
	s.write(".curlrc", fmt.Sprintf("connect-to = localhost:7780:%s:7780\nsilent\nshow-error\nfail\n", w.address))
	s.write("softhsm2.conf", fmt.Sprintf("directories.tokendir = %s\nlog.level = ERROR\n", s.path("tokens")))
	w.paths = strings.NewReplacer("/etc/countersign", e.WorkDir, "/var/lib/countersign", e.WorkDir, "127.0.0.1:", w.address+":", "https://builds.example/", "http://"+w.address+":9000/")
	e.Defer(func() { // an agent that a document has started
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

func orPanic[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func stateOf(ts *testscript.TestScript, neg bool) *scriptState {
	if neg {
		ts.Fatalf("it has no opposite")
	}
	return ts.Value("walk").(*scriptState)
}

// environmentFile is the file in which what a person's shell exports is kept from block to block.
func (w *scriptState) environmentFile(person string) string { return w.path("." + person + ".env") }

// shell is the beginning of what a person types.
func (w *scriptState) shell(ts *testscript.TestScript) string {
	if w.user == "" {
		ts.Fatalf("who types? say: as NAME")
	}
	return fmt.Sprintf("set -aeuo pipefail; cd %q; . %q; ", ts.MkAbs("."), w.environmentFile(w.user))
}

// as NAME: from now on this person types, in a shell of his own.
func (o *operations) as(ts *testscript.TestScript, neg bool, args []string) {
	w := stateOf(ts, neg)
	if w.user = args[0]; exists(w.environmentFile(w.user)) {
		return
	}
	w.write(filepath.Base(w.environmentFile(w.user)), fmt.Sprintf("export XDG_RUNTIME_DIR=%q\n", w.path(w.user+".run")))
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// doc 'TITLE' [N...]: types the commands of a section, or those of its blocks N. A daemon is started, and waited for.
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
			ts.Check(ts.Exec("bash", "-c", w.shell(ts)+"trap 'echo \"$place: this command has failed\" >&2' ERR\n"+script+
				fmt.Sprintf("unset place; { umask -p; export -p; } >%[1]q.new; mv %[1]q.new %[1]q\n", w.environmentFile(w.user))))
			script = ""
		}
		for _, c := range block {
			if strings.HasPrefix(c.text, "countersignd serve ") {
				run()
				w.start(ts, c.text)
			} else {
				script += fmt.Sprintf("place=%q\n%s\n", c.place, c.text)
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

// start has a daemon serve, and waits until it says that it is ready.
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

// appliance softhsm|tpm [OLD NEW]...: sets one up that has a policy for the peer shop, and starts it; what is OLD in the documents'
// configuration is NEW.
func (o *operations) appliance(ts *testscript.TestScript, neg bool, args []string) {
	w := stateOf(ts, neg)
	w.write("pin", userPIN+"\n")
	w.write("so-pin", "so-"+userPIN+"\n")
	w.write("policy.cedar", "permit (principal == Peer::\"shop\", action == Action::\"sign\", resource == Key::\"payments\");\n")
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

// localPaths puts what is in the documents into this script's places.
func (w *scriptState) localPaths(text string) string {
	if w.tpm != nil {
		text = strings.ReplaceAll(text, "/dev/tpmrm0", w.tpm.Socket)
	}
	return w.paths.Replace(text)
}

// peer NAME: enrols one, and makes the key payments unless it is there.
func (o *operations) peer(ts *testscript.TestScript, neg bool, args []string) {
	w := stateOf(ts, neg)
	name := args[0]
	o.as(ts, false, w.operators[:1])
	ts.Check(ts.Exec("bash", "-c", w.shell(ts)+fmt.Sprintf("countersign keygen %[1]s.key >%[1]s.pub; countersign admin noise-key >noise.pub; countersign admin peer add %[1]s $(cat %[1]s.pub) 2>&1; "+
		"countersign admin key show payments >/dev/null 2>&1 || countersign admin key create payments", name)))
	if len(w.operators) > 1 {
		o.approve(ts, false, w.operators[1:2])
	}
	o.as(ts, false, args)
	w.export("COUNTERSIGN_SERVER_KEY=\"$(cat noise.pub)\" COUNTERSIGN_IDENTITY=" + name + ".key")
}

// export adds to the environment of who types.
func (w *scriptState) export(what string) {
	b, _ := os.ReadFile(w.environmentFile(w.user))
	w.write(filepath.Base(w.environmentFile(w.user)), string(b)+"export "+what+"\n")
}

// configure TITLE N: adds the N-th fence of a section to what is there, in this script's places.
func (o *operations) configure(ts *testscript.TestScript, neg bool, args []string) {
	w := stateOf(ts, neg)
	n := orPanic(strconv.Atoi(args[1]))
	text := w.localPaths(o.section(ts, args[0]).fences[n-1])
	b, _ := os.ReadFile(w.path("countersign.toml"))
	if before := string(b); strings.HasPrefix(text, "[") { // a table goes to the end
		text = before + "\n" + text
	} else {
		text += "\n" + before
	}
	w.write("countersign.toml", text)
}

// file TITLE N PATH: writes the N-th fence of a section to a file.
func (o *operations) file(ts *testscript.TestScript, neg bool, args []string) {
	stateOf(ts, neg).write(args[2], o.section(ts, args[0]).fences[orPanic(strconv.Atoi(args[1]))-1])
}

// operators NAME...: starts the daemon, enrols the first administrator and other operators who approve too, and has two approve where there are two.
func (o *operations) operators(ts *testscript.TestScript, neg bool, names []string) {
	w := stateOf(ts, neg)
	w.operators = names
	for i, name := range names {
		p := w.newOperator(name)
		w.write(name+".key.pub", p.line+"\n")
		o.as(ts, false, []string{name})
		w.export(fmt.Sprintf("COUNTERSIGN_OPERATOR=%s SSH_AUTH_SOCK=%q", name, p.socket))
		o.as(ts, false, names[:1])
		line := fmt.Sprintf("countersign admin operator add %s --roles operator,approver --ssh-key %s.key.pub", name, name)
		if i == 0 {
			line = fmt.Sprintf("countersign admin operator first %s --ssh-key %s.key.pub", name, name)
		}
		ts.Check(ts.Exec("bash", "-c", w.shell(ts)+line+" 2>&1"))
	}
	if len(names) > 1 {
		ts.Check(ts.Exec("bash", "-c", w.shell(ts)+"countersign admin approvals needed 2 2>&1"))
	}
}

// approve NAME: somebody approves the oldest proposal that is open, which must be done then.
func (o *operations) approve(ts *testscript.TestScript, neg bool, args []string) {
	w := stateOf(ts, neg)
	was := w.user
	o.as(ts, false, args)
	ts.Check(ts.Exec("bash", "-c", w.shell(ts)+`countersign admin proposal approve "$(countersign admin proposal list | awk '$NF == "open" { n = $1 } END { print n }')" | grep done`))
	w.user = was
}

// run COMMAND: the person types something that is in no document.
func (o *operations) run(ts *testscript.TestScript, neg bool, args []string) {
	w := ts.Value("walk").(*scriptState)
	err := ts.Exec("bash", "-c", w.shell(ts)+strings.Join(args, " "))
	if (err != nil) != neg {
		ts.Fatalf("unexpected: %v", err)
	}
}

// until COMMAND: waits until it ends well.
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
			ts.Fatalf("it did not come to be: %v\n%s", err, out)
		}
	}
}

// tpm starts a TPM in software, or restarts it.
func (o *operations) tpm(ts *testscript.TestScript, neg bool, _ []string) {
	w := stateOf(ts, neg)
	w.tpm = tpmtest.New(w.t)
	ts.Setenv("TPM2TOOLS_TCTI", "swtpm:path="+w.tpm.Socket)
}

// receive FOLDER: takes what is posted to port 9000, as a receiver of webhooks does, and keeps it in files.
func (o *operations) receive(ts *testscript.TestScript, neg bool, args []string) {
	w := stateOf(ts, neg)
	l, err := net.Listen("tcp", w.address+":9000")
	ts.Check(err)
	ts.Defer(func() { l.Close() })
	go http.Serve(l, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		for name, text := range map[string]string{"webhook-id": r.Header.Get("Webhook-Id"), "webhook-timestamp": r.Header.Get("Webhook-Timestamp"),
			"webhook-signature": r.Header.Get("Webhook-Signature"), "body": string(body)} {
			os.WriteFile(filepath.Join(w.dir, args[0], name+".new"), []byte(text), 0o600)
			os.Rename(filepath.Join(w.dir, args[0], name+".new"), filepath.Join(w.dir, args[0], name))
		}
	}))
}

// demo: has make run serve in a copy of the repository, until the end of the script, which is by Ctrl-C.
func (o *operations) demo(ts *testscript.TestScript, neg bool, _ []string) {
	w := stateOf(ts, neg)
	for _, path := range []string{"Makefile", "README.md", "scripts", "examples"} {
		ts.Check(ts.Exec("cp", "-r", filepath.Join(ts.Getenv("REPOSITORY"), path), "."))
	}
	ts.Check(os.Symlink(bin, w.path("bin")))
	cmd := exec.Command("make", "-o", "build", "run") // what is built is there
	cmd.Dir, cmd.Env = w.dir, append(os.Environ(), "LISTEN="+w.listen, "LISTEN_PUBKY="+w.address+":7701", "BACKEND=softhsm")
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
				w.t.Errorf("make run has not ended well:\n%s", out.String())
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
