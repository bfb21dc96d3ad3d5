package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign/internal/machine"
	"countersign/internal/update"
)

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// TestSettings refuses what can't be, each with the setting and the value.
func TestSettings(t *testing.T) {
	for text, want := range map[string]string{
		"colour = 1":                                     `line 1: "colour" is no setting`,
		"[setup]\nshell = true":                          `line 2: "setup.shell" is no setting`,
		"address = 1":                                    "line 1",
		"address = [\"10.1.0.5\"]":                       `address: "10.1.0.5" is no address with its network`,
		"address = [\"127.0.0.1/8\"]":                    "address",
		"address = [\"10.1.0.5/24\\nDHCP=yes\"]":         "address",
		"gateway = [\"10.1.0.1\"]":                       "with DHCP the gateway is the server's",
		"dns = [\"ns.example.com\"]":                     `dns: "ns.example.com" is no IP address`,
		"dns = [\"fe80::1%eth0\"]":                       "dns",
		"time = [\"192.0.2.1\"]":                         "time",
		"time = [\"a b\"]":                               "time",
		"time_ca = \"x\"":                                "time_ca: it has something else",
		"time = [\"x\\nallow 0/0\"]":                     "time",
		"peers = [\"10.0.0.0/33\"]":                      "peers",
		"reach = [\"any\"]":                              "reach",
		"hsm = [\"10.1.0.9\"]":                           "hsm: \"10.1.0.9\" is no address with a port",
		"hsm = [\"hsm.example.com:1792\"]":               "hsm",
		"[setup.environment]\n\"A B\" = \"x\"":           "setup.environment",
		"[setup.environment]\nA = \"x\\ny\"":             "setup.environment",
		"interface = \"eth0; rm\"":                       "interface",
		"listen = 0":                                     "listen: 0 is no port for peers",
		"listen = 65536":                                 "listen: 65536 is no port",
		"listen = -1":                                    "listen: -1 is no port",
		"listen = 7780":                                  "https and listen are both 7780",
		"[setup]\ntoken = \"softhsm\"":                   "softhsm is for tries",
		"[setup]\ntoken = \"x\"":                         "setup.token",
		"[setup]\nname = \"192.0.2.1\"":                  "setup.name",
		"[setup]\noperator = \"Ann\"":                    "setup.operator",
		"[setup]\nssh_key = \"ssh-ed25519 x\"":           "setup.ssh_key",
		"[setup]\nssh_key = \"a\\nb\"":                   "more than one line",
		strings.Repeat("#", maxSettings+1):               "at most 16384 are allowed",
		"dns = [" + strings.Repeat("\"::1\",", 17) + "]": "dns: there are 17, and at most 16",
	} {
		_, err := ParseSettings([]byte(text))
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%.60q: %v, want %q", text, err, want)
		}
	}
	s := must(ParseSettings([]byte(`
address = ["10.1.0.5/24", "2001:db8::5/64"]
gateway = ["10.1.0.1"]
time = ["time.example.com"]
listen = 1
peers = ["10.2.0.9/16", "10.2.0.0/16", "2001:db8::/32"]
reach = ["192.0.2.0/24"]
hsm = ["10.1.0.9:1792", "[2001:db8::9]:1792"]
[setup]
operator = "ann"`)))(t)
	again := must(ParseSettings([]byte(s.Text())))(t)
	if again.Text() != s.Text() {
		t.Error("the text of settings has other settings")
	}
	rules := s.Nftables()
	for _, want := range []string{
		"ip saddr { 10.2.0.0/16 } tcp dport 1 accept", "ip6 saddr { 2001:db8::/32 } tcp dport 1 accept",
		"ip saddr { 10.1.0.0/24 } tcp dport 7780 accept", "ip daddr { 192.0.2.0/24 } meta skuid countersign accept",
		"meta skuid _chrony tcp dport 4460 accept",
		"ip daddr { 10.1.0.9/32 } tcp dport 1792 meta skuid countersign-keys accept",
		"ip6 daddr { 2001:db8::9/128 } tcp dport 1792 meta skuid countersign-keys accept",
	} {
		if !strings.Contains(rules, want) {
			t.Errorf("the firewall lacks %q:\n%s", want, rules)
		}
	}
	if strings.Count(rules, "policy drop") != 3 || strings.Contains(rules, "dport 68") ||
		strings.Count(rules, "countersign-keys") != 2 {
		t.Errorf("the firewall is too wide:\n%s", rules)
	}
	s.Setup.Holders, s.Setup.Needed = []string{"alice=age1x", "carol=age1y"}, 2
	for _, args := range [][]string{s.arguments(false), s.again()} { // also after a set-up that was cut off
		if !strings.Contains(strings.Join(args, " "), "--holder alice=age1x --holder carol=age1y --needed 2") {
			t.Errorf("the set-up names no holders: %v", args)
		}
	}
	if n := s.Networkd(); !strings.Contains(n, "DHCP=no") || !strings.Contains(n, "Address=2001:db8::5/64") {
		t.Error(n)
	}
}

// TestCommands takes the commands of the documents, and refuses what leaves the drive or widens
// what a person at the console can do.
func TestCommands(t *testing.T) {
	for line, want := range map[string]string{
		"countersignd check":             "check",
		"check --deep --write":           "check --deep --write",
		"backup verify a.backup":         "backup verify a.backup",
		"return-keys":                    "return-keys --request=return.request --answers=answers",
		"init --token main --new-token":  "init --token=main --new-token",
		"restore backups/a.backup":       "restore backups/a.backup",
		"restore a.backup --lists none":  "restore a.backup --lists=none",
		"restore a --approval b.sig,c":   "restore a --approval=b.sig,c",
		"restore a --identity=recovery ": "restore a --identity=recovery",
	} {
		if _, args, err := parseCommand(line); err != nil || strings.Join(args, " ") != want {
			t.Errorf("%s: %v %v, want %s", line, args, err, want)
		}
	}
	for line, want := range map[string]string{
		"":                                  "none of the commands",
		"serve":                             "none of the commands",
		"setup":                             "none of the commands",
		"factory-reset --typed":             "none of the commands",
		"backup":                            "none of the commands",
		"drill --identity x":                "none of the commands",
		"check x":                           "1 files are named",
		"restore":                           "0 files are named",
		"restore a b":                       "2 files are named",
		"restore /etc/passwd":               "no file of the drive",
		"restore ../a":                      "no file of the drive",
		"restore -h":                        "no file of the drive",
		"restore a --map /x=/y":             "has no --map",
		"restore a --scratch /tmp":          "has no --scratch",
		"check --config x":                  "has no --config",
		"restore a --text /etc/x":           "no file of the drive",
		"restore a --text=":                 "no file of the drive",
		"restore a --identity b,../c":       "no file of the drive",
		"restore a --text":                  "needs a value",
		"check --deep=yes":                  "has no value",
		"return-keys --request x":           "has no --request",
		"init --new-token":                  "init needs --token",
		"init --holder eve=age1":            "has no --holder",
		"init --token a --so-pin-file=/a/b": "no file of the drive",
		"restore a --lists=../..":           "no file of the drive",
	} {
		if _, args, err := parseCommand(line); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v %v, want %q", line, args, err, want)
		}
	}
}

// TestSameMachine refuses a configuration that changes what belongs to the machine.
func TestSameMachine(t *testing.T) {
	const now = "listen = \"0.0.0.0:7700\"\n[tokens.main]\ntpm = \"/dev/tpmrm0\"\n"
	if err := sameMachine([]byte(now), []byte("# new\n"+now+"[backup]\nfolder = \"x\"\n")); err != nil {
		t.Error(err)
	}
	for _, next := range []string{
		"", "listen = \"0.0.0.0:7701\"\n[tokens.main]\ntpm = \"/dev/tpmrm0\"\n",
		now + "module = \"/var/lib/countersign/x.so\"\n", now + "[tokens.other]\ntpm = \"x\"\n",
		"machine_socket = \"/x\"\n" + now, "not toml",
	} {
		if err := sameMachine([]byte(now), []byte(next)); err == nil {
			t.Errorf("taken: %q", next)
		}
	}
}

// TestInstall writes images beside the one that runs, over leftovers and full slots.
func TestInstall(t *testing.T) {
	esp := t.TempDir()
	folder := filepath.Join(esp, imagesFolder)
	must(0, os.MkdirAll(folder, 0o755))(t)
	put := func(name string) { must(0, os.WriteFile(filepath.Join(folder, name), []byte(name), 0o600))(t) }
	put("countersign_0.2.0.efi")
	put("countersign_0.1.0+0-2.efi")
	put("countersign_0.3.0+2.efi.new")
	put("windows.efi")
	const running = "countersign_0.2.0.efi"
	if err := install(esp, "countersign_0.9.0.efi", "0.3.0", strings.NewReader("x")); err == nil {
		t.Error("installed beside an image that the ESP does not have")
	}
	if err := install(esp, running, "0.2.0", strings.NewReader("x")); err == nil {
		t.Error("the image that runs was replaced")
	}
	broken := io.MultiReader(strings.NewReader("half"), failing{})
	if err := install(esp, running, "0.3.0", broken); err == nil {
		t.Error("half an image was installed")
	}
	if names := list(t, folder); names != "countersign_0.2.0.efi windows.efi" {
		t.Errorf("after a failure: %s", names)
	}
	must(0, install(esp, running, "0.3.0", strings.NewReader("new")))(t)
	if names := list(t, folder); names != "countersign_0.2.0.efi countersign_0.3.0+2.efi windows.efi" {
		t.Error(names)
	}
	all := must(slots(esp, running))(t)
	if len(all) != 2 || !all[0].Running || all[0].Left != -1 || all[1].Running || all[1].Left != 2 {
		t.Errorf("%+v", all)
	}
	// The name of a counted image changes at each try.
	if all = must(slots(esp, "countersign_0.3.0+1-1.efi"))(t); !all[1].Running {
		t.Errorf("%+v", all)
	}
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, io.ErrUnexpectedEOF }

func list(t *testing.T, folder string) string {
	var names []string
	for _, e := range must(os.ReadDir(folder))(t) {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

// screen is what a console has shown.
type screen struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (s *screen) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(b)
}

func (s *screen) has(text string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Contains(strings.Join(strings.Fields(s.text.String()), " "), text)
}

// TestConsole shows a state with texts that would do something to a terminal, and resets only after
// the right name.
func TestConsole(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l := must(net.Listen("unix", socket))(t)
	asked := make(chan string, 10)
	status := machine.Status{
		Image: machine.Image{Version: "0.2.0", Variant: "vm", Rollback: 3},
		Report: &machine.Report{
			At: time.Now().Unix(), Appliance: "pay-1", State: "degraded", Enrolled: true,
			Causes: []string{"evil \x1b[2J\u202e\x07 text", "b", "c", "d"}, Noise: strings.Repeat("00", 32),
		},
		Failures: map[string]string{"disk": "locked"},
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet {
			b, _ := io.ReadAll(r.Body)
			asked <- r.URL.Path + " " + strings.TrimSpace(string(b))
			return
		}
		json.NewEncoder(w).Encode(status)
	})}
	go server.Serve(l)
	defer server.Close()
	in, typed := io.Pipe()
	out := new(screen)
	c := &Console{In: in, Out: out, Client: machine.Client{Path: socket}}
	done := make(chan error, 1)
	go func() { done <- c.Run(t.Context()) }()
	see := func(text string) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); !out.has(text); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("the console does not show %q:\n%s", text, out.text.String())
			}
		}
	}
	see("appliance pay-1: degraded")
	see("FAILED disk: locked")
	see("and 1 cause more")
	see(strings.TrimSpace(strings.Repeat("abandon ", 23)) + " art") // BIP-39, test vectors
	if text := out.text.String(); strings.ContainsAny(text, "\x1b\x07\u202e") {
		t.Errorf("the console shows control characters: %q", text)
	}
	for line := range strings.Lines(out.text.String()) {
		if len(line) > 80 {
			t.Errorf("the console has a line of %d columns: %s", len(line), line)
		}
	}
	for _, line := range []string{"f", "pay", strings.Repeat("x", 10000), "r", "no"} {
		io.WriteString(typed, line+"\n")
	}
	see("Type yes to reboot")
	io.WriteString(typed, "f\n")
	see("nothing was changed")
	io.WriteString(typed, "pay-1\n")
	if got := <-asked; got != `/reset {"name":"pay-1"}` {
		t.Errorf("the console asks for %s", got)
	}
	io.WriteString(typed, "h\n")
	see("PIN of the HSM's user, which is not shown")
	io.WriteString(typed, "2468\n")
	if got := <-asked; got != "/pin 2468" {
		t.Errorf("the console asks for %s", got)
	}
	if out.has("2468") {
		t.Error("the console shows the PIN")
	}
	typed.Close()
	if err := <-done; err != nil || len(asked) > 0 {
		t.Errorf("%v, %d", err, len(asked))
	}
}

// TestToProve has an image prove itself while its update is not proven, and never afterwards: an
// agent that restarts must not leave an image that the disk depends on.
func TestToProve(t *testing.T) {
	for phase, want := range map[string]bool{
		machine.PhaseInstalled: true, machine.PhaseProven: false, machine.PhaseFailed: false,
	} {
		p := &machine.Pending{Phase: phase, Manifest: update.Manifest{Version: "0.3.0"}}
		if got := toProve(p, machine.Image{Version: "0.3.0"}); got != want {
			t.Errorf("%s: %v", phase, got)
		}
		if toProve(p, machine.Image{Version: "0.2.0"}) {
			t.Errorf("%s: the image of before must prove itself", phase)
		}
	}
	if toProve(nil, machine.Image{Version: "0.3.0"}) {
		t.Error("without an update, an image must prove itself")
	}
}

// TestDevicesWith counts disks with the same UUID.
func TestDevicesWith(t *testing.T) {
	folder := t.TempDir()
	const entry = "ID_PART_ENTRY_UUID=c0517e51"
	for name, text := range map[string]string{
		"b8:1": "N:sda1\nE:" + entry + "\n", "b8:17": "N:sdb1\nE:" + entry + "\nG:x\n", "b8:2": "E:" + entry + "2\n",
		"c1:1": "E:" + entry + "\n",
	} {
		must(0, os.WriteFile(filepath.Join(folder, name), []byte(text), 0o600))(t)
	}
	if n := must(devicesWith(folder, entry))(t); n != 2 {
		t.Errorf("%d devices", n)
	}
}

// TestCallers refuses acts to users who have no need of them: the daemon reaches the network, and a
// person at the console is no operator.
func TestCallers(t *testing.T) {
	const daemon, console, stranger = 1001, 1002, 1003
	a := &Agent{Log: slog.New(slog.DiscardHandler), daemon: daemon, console: console}
	routes := a.routes()
	consoles := []string{"PUT /settings", "PUT /pin", "POST /link", "POST /command", "POST /await-backup"}
	daemons := []string{"POST /report", "PUT /update", "POST /update/end", "POST /install", "POST /prove",
		"POST /settle", "GET /configuration", "POST /configuration/check", "POST /configuration",
		"POST /configuration/settle",
		"PUT /files", "POST /files/remove"}
	both := []string{"GET /status", "POST /reboot", "POST /poweroff", "POST /reset", "GET /settings"}
	for caller, refused := range map[int][]string{
		daemon: consoles, console: daemons, stranger: slices.Concat(consoles, daemons, both), -1: both,
	} {
		for _, route := range refused {
			method, path, _ := strings.Cut(route, " ")
			r := httptest.NewRequest(method, path, strings.NewReader("{}"))
			w := httptest.NewRecorder()
			routes.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callerKey{}, caller)))
			if w.Code != http.StatusForbidden {
				t.Errorf("%d may ask for %s: %d", caller, route, w.Code)
			}
		}
	}
}

// TestCommandIsRefused has the console say why a command is not run.
func TestCommandIsRefused(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l := must(net.Listen("unix", socket))(t)
	a := &Agent{Log: slog.New(slog.DiscardHandler)}
	routes := a.routes()
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		routes.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callerKey{}, a.console)))
	})}
	go server.Serve(l)
	defer server.Close()
	for line, want := range map[string]string{
		"serve": "none of the commands", "check": "the state of this machine is not open",
	} {
		err := machine.Client{Path: socket}.Command(t.Context(), line, nil, io.Discard)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", line, err)
		}
	}
}
