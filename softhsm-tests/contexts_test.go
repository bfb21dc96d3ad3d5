package softhsmtests

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"countersign/approval"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

// countingAgent counts the signatures of an SSH agent.
type countingAgent struct {
	agent.Agent
	signed atomic.Int32
}

func (c *countingAgent) Sign(key ssh.PublicKey, data []byte) (*ssh.Signature, error) {
	c.signed.Add(1)
	return c.Agent.Sign(key, data)
}

// relay serves the admin API of an appliance at a socket of its own, in front of an operator's CLI.
// While on is true, requests for texts to be signed, and sign-ins, go to another appliance, where
// the relay has a session already.
func relay(t *testing.T, socket string, mine, other *system, on *atomic.Bool) {
	t.Helper()
	token, err := other.signIn(t.Context(), other.root)
	if err != nil {
		t.Fatal(err)
	}
	own, others := mine.proxy(), other.proxy()
	serveAt(t, socket, func(w http.ResponseWriter, r *http.Request) {
		text := r.URL.Path == "/v1/challenges" || strings.HasPrefix(r.URL.Path, "/v1/proposals")
		proof := r.URL.Path == "/v1/sessions" && r.Method == http.MethodPost
		if on.Load() && (text || proof) {
			r.Header.Set("Authorization", "Bearer "+token)
			others.ServeHTTP(w, r)
		} else {
			own.ServeHTTP(w, r)
		}
	})
}

// TestRelayGetsNothingSigned runs two appliances whose first administrator has the same key, and a
// socket that leads to the first one and relays texts of the second one: challenges for a sign-in
// and for a presence, and proposals. The CLI knows the first appliance, by its first sign-in or by
// the operator's word, and has the agent sign nothing.
func TestRelayGetsNothingSigned(t *testing.T) {
	mine, other := newSystem(t), newSystem(t)
	other.root = mine.root
	other.api = other.client(other.root)
	p, q := mine.serve(), other.serve()
	var on atomic.Bool
	socket := mine.path("relay.sock")
	relay(t, socket, mine, other, &on)
	cli := func(args ...string) (stdout, stderr string, code int) {
		return mine.cli("", append([]string{"admin", "--socket", socket}, args...)...)
	}
	_, errOut, code := cli("whoami")
	pinned := regexp.MustCompile(`from now on .* is the appliance countersign/[0-9a-f]{16}`)
	if code != 0 || !pinned.MatchString(errOut) {
		t.Fatalf("the first sign-in: %d %s", code, errOut)
	}
	vkey := strings.TrimSpace(mine.must("admin", "audit", "key"))
	mine.must("admin", "context", "add", "named", "--socket", socket, "--log-key", vkey, "--operator", "root")
	for _, s := range []*system{mine, other} { // each has an open proposal 1
		s.must("admin", "key", "create", "payments")
		s.must("admin", "--propose-only", "peer", "add", "shop", strings.Repeat("0a", 32))
	}
	sessions := func() int {
		all, err := other.admin().Sessions(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	had, signed := sessions(), &mine.root.agent.(*countingAgent).signed
	before := signed.Load()
	on.Store(true)
	for name, args := range map[string][]string{
		"a sign-in":                      {"login", "root"},
		"a sign-in in a context by name": {"login", "root", "--context", "named", "--socket="},
		"a presence":                     {"key", "confirm", "payments"},
		"an approval":                    {"proposal", "approve", "1"},
		"the text of a proposal":         {"proposal", "text", "1"},
		"an own proposal":                {"peer", "add", "other", strings.Repeat("0b", 32)},
	} {
		out, errOut, code := cli(args...)
		if code != 1 || !strings.Contains(errOut, "countersign: error: not_signed: ") {
			t.Errorf("%s: %d %s%s", name, code, out, errOut)
		}
	}
	if n := signed.Load(); n != before {
		t.Errorf("the agent has signed %d texts of another appliance", n-before)
	}
	if n := sessions(); n != had {
		t.Errorf("there are %d sessions on the other appliance, and there were %d", n, had)
	}
	on.Store(false)
	if _, errOut, code := cli("login", "root"); code != 0 {
		t.Errorf("without the relay: %d %s", code, errOut)
	}
	mine.must("admin", "--context", "named", "login", "root")
	out := mine.must("admin", "context", "list", "--json")
	if !strings.Contains(out, vkey[:strings.Index(vkey, "/0+")]) || !strings.Contains(out, `"named"`) {
		t.Errorf("contexts: %s", out)
	}
	p.stop()
	q.stop()
}

// TestAgentsWithOtherKeys signs in and approves with ssh-agents of OpenSSH. One has twenty keys of
// others before the operator's. In one the operator's first key needs a confirmation that nobody
// gives, as a FIDO key that is not plugged in. --identity chooses one key.
func TestAgentsWithOtherKeys(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	keygen := func(name string) string {
		t.Helper()
		path := s.path(name)
		make := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path)
		if out, err := make.CombinedOutput(); err != nil {
			t.Fatalf("%v %s", err, out)
		}
		return path
	}
	startAgent := func() *operator {
		t.Helper()
		dir, err := os.MkdirTemp("", "agent") // the path of a Unix socket has at most 107 bytes
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		cmd := exec.Command("ssh-agent", "-D", "-a", filepath.Join(dir, "s"))
		cmd.Env = append(os.Environ(), "SSH_ASKPASS=/bin/false")
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		out.Read(make([]byte, 1)) // the agent prints its variables once it listens
		return &operator{name: "root", socket: filepath.Join(dir, "s")}
	}
	add := func(of *operator, args ...string) {
		t.Helper()
		cmd := exec.Command("ssh-add", append([]string{"-q"}, args...)...)
		cmd.Env = append(os.Environ(), "SSH_AUTH_SOCK="+of.socket)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("ssh-add: %v %s", err, out)
		}
	}
	refused, good := keygen("refused"), keygen("good")
	for _, key := range []string{refused, good} {
		s.must("admin", "credential", "add", "root", "--ssh-key", key+".pub")
	}
	crowd := startAgent()
	for i := range 20 {
		add(crowd, keygen("other"+string(rune('a'+i))))
	}
	login := func(of *operator, args ...string) (errOut string, code int) {
		_, errOut, code = s.cliAs(of, "", append([]string{"admin", "login", "root"}, args...)...)
		return errOut, code
	}
	for range 7 { // nothing is tried that could be limited
		if errOut, code := login(crowd); code != 1 || !strings.Contains(errOut, "not_proven: none of the 20 keys") {
			t.Fatalf("twenty keys of others: %d %s", code, errOut)
		}
	}
	add(crowd, good)
	if errOut, code := login(crowd); code != 0 {
		t.Errorf("twenty keys of others and a good one: %d %s", code, errOut)
	}
	shy := startAgent()
	add(shy, "-c", refused)
	if _, code := login(shy); code != 1 {
		t.Errorf("only a key that the agent refuses: %d", code)
	}
	add(shy, good)
	if errOut, code := login(shy); code != 0 {
		t.Errorf("a refused key, and a good one: %d %s", code, errOut)
	}
	out, errOut, code := s.cliAs(shy, "", "admin", "peer", "add", "shop", strings.Repeat("0a", 32))
	if code != 0 || !strings.Contains(out, "done") {
		t.Errorf("an approval: %d %s", code, errOut)
	}
	errOut, code = login(shy, "--identity", refused+".pub")
	if code != 1 || !strings.Contains(errOut, "does not sign") {
		t.Errorf("--identity with the refused key: %d %s", code, errOut)
	}
	if errOut, code := login(shy, "--identity", s.path("othera.pub")); code != 1 ||
		!strings.Contains(errOut, "does not have the key of --identity") {
		t.Errorf("--identity with a key that the agent does not have: %d %s", code, errOut)
	}
	p.stop()
}

// fidoAgent is an SSH agent with one FIDO key in software, beside the keys of another agent.
type fidoAgent struct {
	agent.Agent
	private ed25519.PrivateKey
	public  ssh.PublicKey
	flags   atomic.Uint32 // 1: touched, 4: user verified by a PIN
	count   atomic.Uint32
}

func newFidoAgent(t *testing.T, beside agent.Agent) *fidoAgent {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.ParsePublicKey(ssh.Marshal(struct {
		Type        string
		Key         []byte
		Application string
	}{ssh.KeyAlgoSKED25519, public, "ssh:"}))
	if err != nil {
		t.Fatal(err)
	}
	return &fidoAgent{Agent: beside, private: private, public: key}
}

func (f *fidoAgent) List() ([]*agent.Key, error) {
	all, err := f.Agent.List()
	return append(all, &agent.Key{Format: f.public.Type(), Blob: f.public.Marshal()}), err
}

func (f *fidoAgent) Sign(key ssh.PublicKey, data []byte) (*ssh.Signature, error) {
	if !bytes.Equal(key.Marshal(), f.public.Marshal()) {
		return f.Agent.Sign(key, data)
	}
	device := ssh.Marshal(struct {
		Flags byte
		Count uint32
	}{byte(f.flags.Load()), f.count.Add(1)})
	application, digest := sha256.Sum256([]byte("ssh:")), sha256.Sum256(data)
	signed := slices.Concat(application[:], device, digest[:])
	return &ssh.Signature{Format: f.public.Type(), Blob: ed25519.Sign(f.private, signed), Rest: device}, nil
}

// TestApprovalsByHardwareKeys demands hardware keys. The CLI then approves with the FIDO key of an
// agent that has another key first. A touch alone is not enough, nor is the key in a file. The log
// alone shows it.
func TestApprovalsByHardwareKeys(t *testing.T) {
	s := newSystem(t)
	fido := newFidoAgent(t, s.root.agent)
	fido.flags.Store(1)
	s.root.socket = s.path("fido.agent")
	s.serveAgent(s.root.socket, fido)
	p := s.serve()
	_, errOut, code := s.cli("", "admin", "approvals", "hardware", "yes")
	if code != 1 || !strings.Contains(errOut, "of 0 approvers with hardware keys, 1 would be needed") {
		t.Errorf("no approver has a hardware key: %d %s", code, errOut)
	}
	s.write("fido.pub", string(ssh.MarshalAuthorizedKey(fido.public)))
	s.must("admin", "credential", "add", "root", "--ssh-key", "fido.pub")
	// A key that does not verify its user can't make the rule: then nobody could approve any more.
	_, errOut, code = s.cli("", "admin", "approvals", "hardware", "yes")
	if code != 1 || !strings.Contains(errOut, "verify-required") {
		t.Errorf("a touch makes hardware keys the rule: %d %s", code, errOut)
	}
	fido.flags.Store(1 | 4)
	s.must("admin", "approvals", "hardware", "yes")
	fido.flags.Store(1)
	if out := s.must("admin", "approvals", "show"); !strings.Contains(out, "hardware keys") {
		t.Errorf("approvals show: %s", out)
	}
	s.write("file.pub", s.root.line)
	add := func(name string, args ...string) (out, errOut string, code int) {
		return s.cli("", append([]string{"admin", "peer", "add", name, strings.Repeat("0"+name, 32)}, args...)...)
	}
	for name, args := range map[string][]string{"a": nil, "b": {"--identity", s.path("file.pub")}} {
		if _, errOut, code := add(name, args...); code != 1 || !strings.Contains(errOut, "verify-required") {
			t.Errorf("without a verified user %q: %d %s", args, code, errOut)
		}
	}
	fido.flags.Store(1 | 4)
	if out, errOut, code := add("c"); code != 0 || !strings.Contains(out, "done") {
		t.Errorf("with a verified user: %d %s", code, errOut)
	}
	if _, errOut, code := s.cli("", "admin", "credential", "remove", "root",
		approvalID(string(ssh.MarshalAuthorizedKey(fido.public)))); code != 1 || !strings.Contains(errOut, "hardware") {
		t.Errorf("the last hardware key is removed: %d %s", code, errOut)
	}
	vkey := strings.TrimSpace(s.must("admin", "audit", "key"))
	s.must("admin", "audit", "export", "export")
	if out := s.must("audit", "approvals", "export", "--key", vkey); !strings.Contains(out, "by hardware keys") {
		t.Errorf("audit approvals: %s", out)
	}
	p.stop()
}

// approvalID is the id of the credential with a public key.
func approvalID(line string) string {
	c, err := approval.NewSSH(line)
	if err != nil {
		panic(err)
	}
	return c.ID
}

// TestCarelessContexts spoils the files of contexts, and runs the CLI without any word about the
// appliance but these files. The CLI goes to no other appliance than the one in use, believes no
// file that another user can change, and keeps no more of a CA's file than the certificates.
func TestCarelessContexts(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	home := s.path("careless")
	contexts := filepath.Join(home, "countersign", "contexts")
	environment := []string{
		"PATH=" + os.Getenv("PATH"), "SSH_AUTH_SOCK=" + s.root.socket, "XDG_CONFIG_HOME=" + home,
		"XDG_RUNTIME_DIR=" + s.path("careless.run"), "COUNTERSIGN_OPERATOR=root",
	}
	cli := func(args ...string) (output string, code int) {
		t.Helper()
		args = append([]string{"admin"}, args...)
		cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "countersign"), args...)
		cmd.Env = environment
		out, err := cmd.CombinedOutput()
		if _, exited := err.(*exec.ExitError); err != nil && !exited {
			t.Fatal(err)
		}
		return string(out), cmd.ProcessState.ExitCode()
	}
	signed := &s.root.agent.(*countingAgent).signed
	refused := func(what, want string, args ...string) {
		t.Helper()
		before := signed.Load()
		out, code := cli(args...)
		if code == 0 || !strings.Contains(out, want) || strings.Contains(out, "/run/countersign") {
			t.Errorf("%s: %d %s", what, code, out)
		}
		if signed.Load() != before {
			t.Errorf("%s: the agent has signed something", what)
		}
	}
	accepted := func(args ...string) string {
		t.Helper()
		out, code := cli(args...)
		if code != 0 {
			t.Fatalf("%q: %d %s", args, code, out)
		}
		return out
	}
	accepted("context", "add", "prod", "--socket", s.path("admin.sock"))
	accepted("login", "root")
	accepted("context", "add", "lab", "--socket", s.path("admin.sock"))
	out := accepted("login", "root", "--context", "lab")
	if !strings.Contains(out, "warning: the context prod (") {
		t.Errorf("a second context of one appliance, which may be a relay, is taken silently: %s", out)
	}

	for _, path := range []string{filepath.Join(contexts, "prod.json"), contexts, filepath.Join(home, "countersign"),
		filepath.Join(home, "countersign", "current")} {
		st, err := os.Stat(path)
		if err == nil {
			err = os.Chmod(path, st.Mode().Perm()|0o022)
		}
		if err != nil {
			t.Fatal(err)
		}
		refused(path+" that others can change", "another user can change it", "login", "root")
		if err := os.Chmod(path, st.Mode().Perm()); err != nil {
			t.Fatal(err)
		}
	}
	accepted("login", "root")
	current := filepath.Join(home, "countersign", "current")
	if err := os.Rename(current, current+".away"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(current, 0o700); err != nil {
		t.Fatal(err)
	}
	refused("a context in use that can't be read", "name one by --context", "whoami")
	accepted("--context", "prod", "whoami")
	if err := os.Remove(current); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(current+".away", current); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(contexts, "broken.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, code := cli("context", "list")
	if code != 1 || !strings.Contains(out, "broken.json is not") || !strings.Contains(out, "prod") {
		t.Errorf("a list with a broken context: %d %s", code, out)
	}
	accepted("context", "remove", "broken")

	s.otherCA("both.pem", "cert.pem")
	refused("a CA without a certificate", "no certificate", "context", "add", "web", "--url", "https://localhost:1",
		"--ca", s.path("both.pem"))
	key, err1 := os.ReadFile(s.path("both.pem"))
	certificate, err2 := os.ReadFile(s.path("cert.pem"))
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	s.write("both.pem", string(key)+"# a remark\n"+string(certificate))
	accepted("context", "add", "web", "--url", "https://localhost:1", "--ca", s.path("both.pem"))
	kept, err := os.ReadFile(filepath.Join(contexts, "web.json"))
	if err != nil || strings.Contains(string(kept), "PRIVATE") || !strings.Contains(string(kept), "CERTIFICATE") {
		t.Errorf("the context has %s, %v", kept, err)
	}

	environment = slices.DeleteFunc(environment, func(e string) bool { return strings.HasPrefix(e, "XDG_CONFIG") })
	refused("nowhere to keep a pin", "nothing was signed", "login", "root", "--socket", s.path("admin.sock"))
	p.stop()
}
