package softhsmtests

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"countersign/admin/api"
	"countersign/client"

	"github.com/miekg/pkcs11"
	bolt "go.etcd.io/bbolt"
)

// TestRefusesToStart breaks the configuration, the policy, the ledger, the PIN file or the token.
// countersignd serve then ends with the exit status of the cause's class, and a line that names the
// cause and the remedy. countersignd check refuses all that serve refuses, with the same cause.
func TestRefusesToStart(t *testing.T) {
	type breakage func(t *testing.T, s *system)
	edit := func(old, new string) breakage {
		return func(_ *testing.T, s *system) { s.edit("countersign.toml", old, new) }
	}
	limits := func(setting string) breakage {
		return edit("[tokens.main]", "[limits]\n"+setting+"\n[tokens.main]")
	}
	write := func(name, content string) breakage {
		return func(_ *testing.T, s *system) { s.write(name, content) }
	}
	remove := func(name string) breakage {
		return func(_ *testing.T, s *system) { os.Remove(s.path(name)) }
	}
	for _, c := range []struct {
		name     string
		breakage breakage
		want     []string
	}{
		{"a typo in the configuration", edit("admin_socket", "admin_sokcet"),
			[]string{"countersign.toml:3", "admin_sokcet"}},
		{"a typo in a table", edit("pin_file", "pinfile"), []string{"countersign.toml:11", "tokens.main.pinfile"}},
		{"broken TOML", edit(`"admin.sock"`, `"admin.sock`), []string{"countersign.toml:3"}},
		{"a wrong type", edit(`"ledger.db"`, `7`), []string{"countersign.toml:4"}},
		{"a limit out of range", limits("connections = 0"), []string{"limits.connections", "1 to"}},
		{"batches that are always busy", limits("requests_per_peer = 99"), []string{"limits.batch_items", "99"}},
		{"a bad duration", limits(`idle_timeout = "5 minutes"`), []string{"countersign.toml:9"}},
		{"no listen address", edit("listen = ", "#"), []string{"listen is missing"}},
		{"a bad listen address", func(_ *testing.T, s *system) { s.edit("countersign.toml", s.listen, "nowhere") },
			[]string{"host:port"}},
		{"no configuration", remove("countersign.toml"), []string{"countersign.toml"}},
		{"no policy", remove("policy.cedar"), []string{"policy.cedar"}},
		{"a broken policy", write("policy.cedar", "\npermit (principal, action, resource) when { context.nothing };"),
			[]string{"policy.cedar:2"}},
		{"no ledger", remove("ledger.db"), []string{"no ledger", "countersignd init"}},
		{"a damaged ledger", write("ledger.db", "not a ledger"), []string{"damaged", "backup"}},
		{"a newer ledger", func(_ *testing.T, s *system) {
			s.changeLedger(func(tx *bolt.Tx) error {
				return tx.Bucket([]byte("meta")).Put([]byte("format"), []byte{0, 0, 0, 99})
			})
		}, []string{"newer version", "99"}},
		{"no PIN file", remove("pin"), []string{"PIN file"}},
		{"a PIN file for all", func(_ *testing.T, s *system) { os.Chmod(s.path("pin"), 0o644) },
			[]string{"chmod 600 /"}},
		{"a wrong PIN", write("pin", "another-pin"), []string{"refuses the PIN", "will not be tried again"}},
		{"no module", edit(softHSM, "/nowhere.so"), []string{"/nowhere.so"}},
		{"the token is another", func(t *testing.T, s *system) {
			s.useToken(func(m *pkcs11.Ctx, h pkcs11.SessionHandle) { deleteAll(t, m, h, "") })
		}, []string{"noise/1", "right token"}},
		{"a second object with a key's label", func(t *testing.T, s *system) {
			s.useToken(func(m *pkcs11.Ctx, h pkcs11.SessionHandle) { generate(t, m, h, "countersign/noise/1") })
		}, []string{"noise/1", "more than one object", "pkcs11-tool"}},
		{"a second object with a key's label and CKA_ID", func(t *testing.T, s *system) {
			tag := pkcs11.NewAttribute(pkcs11.CKA_ID, s.tagOf("noise/1"))
			s.useToken(func(m *pkcs11.Ctx, h pkcs11.SessionHandle) { generate(t, m, h, "countersign/noise/1", tag) })
		}, []string{"noise/1", "more than one object", "pkcs11-tool"}},
		{"half a key", func(t *testing.T, s *system) {
			s.useToken(func(m *pkcs11.Ctx, h pkcs11.SessionHandle) { deleteAll(t, m, h, "private") })
		}, []string{"noise/1", "is not on token main"}},
		{"a file where the socket should be", write("admin.sock", ""), []string{"admin.sock", "another kind"}},
		{"a port that is none", func(_ *testing.T, s *system) {
			s.edit("countersign.toml", s.listen, "127.0.0.1:70000")
		}, []string{"listen", "70000"}},
		{"a port in use", func(t *testing.T, s *system) {
			l, err := net.Listen("tcp", s.listen)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
		}, []string{"listen", "another program"}},
		{"a long path of the socket", edit("admin.sock", strings.Repeat("a", 150)), []string{"admin_socket", "107"}},
		{"no folder for the socket", edit("admin.sock", "missing/admin.sock"), []string{"missing/admin.sock"}},
		{"no folder for the ledger", edit("ledger.db", "missing/ledger.db"), []string{"missing/ledger.db"}},
		{"a group that is not there", edit("ledger =", "admin_group = \"no-such-group\"\nledger ="),
			[]string{"admin_group", "no-such-group"}},
		{"HTTPS without keys", edit("ledger =", "admin_https = \"127.0.0.1:1\"\nledger ="),
			[]string{"HTTPS", "countersignd init"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSystem(t)
			c.breakage(t, s)
			out, code := s.daemon("serve")
			last := strings.TrimSpace(out)
			want := map[string]int{
				"a wrong PIN": 3, "no ledger": 4, "a damaged ledger": 4, "a newer ledger": 4,
				"no folder for the ledger": 4, "a PIN file for all": 2,
			}[c.name]
			if want == 0 && strings.HasPrefix(out, "countersignd: error: config:") {
				want = 2
			}
			want = max(want, 1)
			if code != want || strings.Count(last, "\n") > 1 {
				t.Errorf("exit status %d, want %d, %d lines:\n%s", code, want, strings.Count(last, "\n")+1, out)
			}
			for _, want := range c.want {
				if !strings.Contains(out, want) {
					t.Errorf("the output has no %q:\n%s", want, out)
				}
			}
			out, code = s.daemon("check")
			if code != want {
				t.Errorf("check: exit status %d, want %d\n%s", code, want, out)
			}
			for _, want := range c.want {
				if !strings.Contains(out, want) {
					t.Errorf("check: the output has no %q:\n%s", want, out)
				}
			}
		})
	}
}

// TestPINIsRefusedOnce starts the daemon with a wrong PIN again and again, as a service manager
// does. The token sees one login, and each start says why it ends, in status 3. The right PIN needs
// no more than its file.
func TestPINIsRefusedOnce(t *testing.T) {
	const login = 18 // the index of C_Login in CK_FUNCTION_LIST
	s := newSystem(t)
	s.edit("countersign.toml", softHSM, compile(t, "shim.c", "-shared", "-fPIC"))
	s.edit("countersign.toml", "environment = { ",
		fmt.Sprintf("files = [\".\"]\nenvironment = { SHIM_LOG = %q, ", s.path("calls")))
	s.write("pin", "another-pin\n")
	logins := func() (n int) {
		b, _ := os.ReadFile(s.path("calls"))
		for line := range strings.Lines(string(b)) {
			if strings.HasPrefix(line, fmt.Sprint(login, " ")) {
				n++
			}
		}
		return n
	}
	for range 5 {
		if out, code := s.daemon("serve"); code != 3 || !strings.Contains(out, "CKR_PIN_INCORRECT") {
			t.Errorf("exit status %d: %s", code, out)
		}
	}
	if out, code := s.daemon("check"); code != 3 || !strings.Contains(out, "CKR_PIN_INCORRECT") {
		t.Errorf("check: exit status %d: %s", code, out)
	}
	if n := logins(); n != 1 {
		t.Errorf("five starts and a check have tried a wrong PIN %d times", n)
	}
	if out, code := s.daemon("check", "--retry-pin", "main"); code != 3 || logins() != 2 {
		t.Errorf("an operator's word: exit status %d, %d logins: %s", code, logins(), out)
	}
	s.write("pin", userPIN+"\n")
	p := s.serve()
	s.enrol()
	if _, err := s.dial().Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Error(err)
	}
	p.stop()
}

// TestSecondDaemon starts a second daemon on the ledger of a running one. The second daemon refuses
// to start, and the first one still serves.
func TestSecondDaemon(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	for _, args := range [][]string{{"serve"}, {"init"}} {
		if out, code := s.daemon(args...); code != 1 || !strings.Contains(out, "another process uses this ledger") {
			t.Errorf("%v: %d, %s", args, code, out)
		}
	}
	if _, err := s.dial().Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Error(err)
	}
	p.stop()
}

// TestServeCreatesNothing runs countersignd serve in a folder without ledger, token, PIN and
// policy. Only countersignd init may create files.
func TestServeCreatesNothing(t *testing.T) {
	s := newSystem(t)
	for _, name := range []string{"ledger.db", "tokens", "pin", "policy.cedar"} {
		os.Rename(s.path(name), s.path(name)+".away")
	}
	before, _ := os.ReadDir(s.dir)
	if _, code := s.daemon("serve"); code != 4 {
		t.Errorf("exit status %d", code)
	}
	if after, _ := os.ReadDir(s.dir); len(after) != len(before) {
		t.Errorf("%v, before %v", after, before)
	}
}

// TestObjectsOfOthers has another program, without the PIN, make public objects under the labels
// and CKA_IDs of the Noise key and of the audit log's key, and under the label of a key's next
// version; and destroy the public halves of all keys. The appliance starts, listens, signs, writes
// checkpoints, and rotates the key. check finds no fault.
func TestObjectsOfOthers(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	p.stop()
	s.useToken(func(m *pkcs11.Ctx, h pkcs11.SessionHandle) {
		if err := m.Logout(h); err != nil {
			t.Fatal(err)
		}
		deleteAll(t, m, h, "")
		for label, id := range map[string][]byte{
			"noise/1": s.tagOf("noise/1"), "audit-log/1": s.tagOf("audit-log/1"), "payments/3": []byte("anything"),
		} {
			for range 2 {
				object := []*pkcs11.Attribute{
					pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY),
					pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false),
					pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, 0x40),
					pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, []byte{6, 3, 0x2b, 0x65, 0x70}),
					pkcs11.NewAttribute(pkcs11.CKA_EC_POINT, append([]byte{4, 32}, make([]byte, 32)...)),
					pkcs11.NewAttribute(pkcs11.CKA_LABEL, "countersign/"+label), pkcs11.NewAttribute(pkcs11.CKA_ID, id),
				}
				if _, err := m.CreateObject(h, object); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
	if out, code := s.daemon("check"); code != 0 {
		t.Errorf("check: %d\n%s", code, out)
	}
	p = s.serve()
	defer p.stop()
	if _, err := s.admin().RotateKey(t.Context(), "payments", api.Rotate{Now: true}); err != nil {
		t.Error(err)
	}
	c := s.dial()
	defer c.Close()
	got, err := c.Sign(t.Context(), "payments", message("AAAA").Fill(time.Hour))
	if err != nil || got.Version != 2 {
		t.Errorf("%+v, %v", got, err)
	}
	s.must("admin", "audit", "export", s.path("log")) // with a checkpoint of now
	key := strings.TrimSpace(s.must("admin", "audit", "key"))
	if out := s.must("audit", "verify", s.path("log"), "--key", key); !strings.Contains(out, "checkpoint") {
		t.Error(out)
	}
	if state := s.must("admin", "state"); !strings.Contains(state, "operational") {
		t.Error(state)
	}
}

// TestInterruptedInit runs countersignd init after an interrupted one. The second run completes
// what the first run has begun.
func TestInterruptedInit(t *testing.T) {
	s := newSystem(t)
	// The state after an interruption during the creation of the Noise key: the ledger has the
	// intent, and the token has one half of the key pair.
	tag := s.tagOf("noise/1")
	intent := fmt.Appendf(nil, `{"token":"main","algorithm":"x25519","state":"making","created":1,"tag":"%x"}`, tag)
	s.changeLedger(func(tx *bolt.Tx) error {
		return tx.Bucket([]byte("keys")).Put([]byte("noise/1"), intent)
	})
	s.useToken(func(m *pkcs11.Ctx, h pkcs11.SessionHandle) { deleteAll(t, m, h, "public") })
	if out, code := s.daemon("serve"); code != 1 || !strings.Contains(out, "run countersignd init") {
		t.Errorf("serve: %d, %s", code, out)
	}
	if out, code := s.daemon("init"); code != 0 || !strings.Contains(out, "created the listener's Noise key") {
		t.Errorf("init: %d, %s", code, out)
	}
	s.serve().stop()
}

// tagOf reads a key's creation tag, its CKA_ID on the token, from the ledger.
func (s *system) tagOf(name string) []byte {
	s.t.Helper()
	var tag []byte
	s.changeLedger(func(tx *bolt.Tx) error {
		var r struct{ Tag string }
		if err := json.Unmarshal(tx.Bucket([]byte("keys")).Get([]byte(name)), &r); err != nil {
			return err
		}
		var err error
		tag, err = hex.DecodeString(r.Tag)
		return err
	})
	return tag
}

// changeLedger edits the ledger's file, as a daemon of another version might.
func (s *system) changeLedger(change func(*bolt.Tx) error) {
	s.t.Helper()
	db, err := bolt.Open(s.path("ledger.db"), 0o600, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	defer db.Close()
	if err := db.Update(change); err != nil {
		s.t.Fatal(err)
	}
}

// useToken opens a session on the token and logs in, as another program that has the PIN would.
func (s *system) useToken(use func(*pkcs11.Ctx, pkcs11.SessionHandle)) {
	s.t.Helper()
	t := s.t
	t.Setenv("SOFTHSM2_CONF", s.path("softhsm2.conf"))
	m := pkcs11.New(softHSM)
	defer m.Destroy()
	if err := m.Initialize(); err != nil {
		t.Fatal(err)
	}
	defer m.Finalize()
	slots, err := m.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	h, err := m.OpenSession(slots[0], pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Login(h, pkcs11.CKU_USER, userPIN); err != nil {
		t.Fatal(err)
	}
	use(m, h)
}

// deleteAll destroys all objects on the token, or only the half of the Noise key that half names:
// public or private.
func deleteAll(t *testing.T, m *pkcs11.Ctx, h pkcs11.SessionHandle, half string) {
	t.Helper()
	var template []*pkcs11.Attribute
	if class, ok := map[string]uint{"public": pkcs11.CKO_PUBLIC_KEY, "private": pkcs11.CKO_PRIVATE_KEY}[half]; ok {
		template = append(template, pkcs11.NewAttribute(pkcs11.CKA_CLASS, class),
			pkcs11.NewAttribute(pkcs11.CKA_LABEL, "countersign/noise/1"))
	}
	if err := m.FindObjectsInit(h, template); err != nil {
		t.Fatal(err)
	}
	found, _, err := m.FindObjects(h, 100)
	if err != nil || len(found) == 0 {
		t.Fatalf("%d objects, %v", len(found), err)
	}
	m.FindObjectsFinal(h)
	for _, o := range found {
		if err := m.DestroyObject(h, o); err != nil {
			t.Fatal(err)
		}
	}
}

// generate creates an Ed25519 key pair with a label and further attributes (CKK_EC_EDWARDS is 0x40,
// CKM_EC_EDWARDS_KEY_PAIR_GEN is 0x1055).
func generate(t testing.TB, m *pkcs11.Ctx, h pkcs11.SessionHandle, label string, more ...*pkcs11.Attribute) {
	t.Helper()
	private := append([]*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, 0x40),
	}, more...)
	curve := pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, []byte{6, 3, 0x2b, 0x65, 0x70})
	public := append([]*pkcs11.Attribute{curve}, private...)
	mechanism := []*pkcs11.Mechanism{pkcs11.NewMechanism(0x1055, nil)}
	if _, _, err := m.GenerateKeyPair(h, mechanism, public, private); err != nil {
		t.Fatal(err)
	}
}

// TestDeviceComesLate starts the daemon before its token is there, and before its address is there
// (in a network namespace without addresses). The daemon tells the service manager what is
// missing, is alive and not ready, and serves when the missing part comes.
func TestDeviceComesLate(t *testing.T) {
	waits := func(t *testing.T, s *system, p *process, what string) {
		t.Helper()
		got := p.notified()
		if !strings.Contains(got, "STATUS=waits for "+what) || !strings.Contains(got, "\nEXTEND_TIMEOUT_USEC=") {
			t.Fatalf("notified %q, want that it waits for %s", got, what)
		}
		if err := s.admin().Alive(t.Context()); err != nil {
			t.Errorf("it waits and is not alive: %v", err)
		}
		if err := s.admin().Ready(t.Context()); err == nil {
			t.Error("it waits and is ready")
		}
		s.enrolRoot()
		if out := s.must("admin", "state"); !strings.Contains(out, "degraded") || !strings.Contains(out, "waits for") {
			t.Errorf("%s", out)
		}
	}
	serves := func(t *testing.T, s *system, p *process) {
		t.Helper()
		for got := ""; got != "READY=1"; got = p.notified() {
			if got != "" && !strings.HasPrefix(got, "STATUS=") {
				t.Fatalf("notified %q", got)
			}
		}
		eventually(t, "readiness", func() bool { return s.admin().Ready(t.Context()) == nil })
		eventually(t, "no cause is left", func() bool {
			return strings.Contains(s.must("admin", "state"), "operational")
		})
	}
	command := func(s *system, before ...string) *exec.Cmd {
		args := append(before, filepath.Join(bin, "countersignd"), "serve", "--config", s.path("countersign.toml"))
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Env = os.Environ()
		return cmd
	}
	t.Run("the token", func(t *testing.T) {
		s := newSystem(t)
		if err := os.Rename(s.path("tokens"), s.path("away")); err != nil {
			t.Fatal(err)
		}
		p := s.begin(command(s))
		waits(t, s, p, "the Noise key")
		if err := os.Rename(s.path("away"), s.path("tokens")); err != nil {
			t.Fatal(err)
		}
		serves(t, s, p)
		s.enrol()
		if _, err := s.dial().Sign(t.Context(), "payments", message("AAAA")); err != nil {
			t.Error(err)
		}
		p.stop()
	})
	t.Run("a token without its PIN", func(t *testing.T) {
		s := newSystem(t)
		if err := os.Rename(s.path("tokens"), s.path("away")); err != nil {
			t.Fatal(err)
		}
		s.write("pin", "another-pin")
		p := s.begin(command(s))
		waits(t, s, p, "the Noise key")
		if err := os.Rename(s.path("away"), s.path("tokens")); err != nil {
			t.Fatal(err)
		}
		if err := <-p.ended; err == nil || !strings.Contains(p.stderr.String(), "refuses the PIN") {
			t.Errorf("%v", err)
		} else {
			p.ended <- err
		}
	})
	t.Run("the address", func(t *testing.T) {
		needRoot(t, "a network namespace")
		s := newSystem(t)
		s.edit("countersign.toml", s.listen, "[2001:db8::7]:7700") // RFC 3849
		p := s.begin(command(s, "unshare", "--net"))
		waits(t, s, p, "the address [2001:db8::7]:7700")
		add := exec.Command("nsenter", "--net", "--target", fmt.Sprint(p.cmd.Process.Pid),
			"ip", "-6", "address", "add", "2001:db8::7/128", "dev", "lo")
		if out, err := add.CombinedOutput(); err != nil {
			t.Fatalf("%v %s", err, out)
		}
		serves(t, s, p)
		p.stop()
	})
}

// TestAttendedStart sets unattended_start = false: each start waits for an operator's unlock. With
// the default, a start is unlocked, unless an operator has locked the appliance before.
func TestAttendedStart(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	signs := func(want string) {
		t.Helper()
		c, err := client.Dial(t.Context(), s.clientConfig())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_, err = c.Sign(t.Context(), "payments", message("AAAA"))
		refusal, _ := errors.AsType[*client.Error](err)
		if want == "" && err != nil || want != "" && (refusal == nil || refusal.Code != want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	signs("")
	s.must("admin", "lock", "--reason", "night")
	signs("unavailable")
	p.stop()
	p = s.serve()
	signs("unavailable")
	s.must("admin", "unlock")
	signs("")
	p.stop()
	s.edit("countersign.toml", "ledger = ", "unattended_start = false\nledger = ")
	for range 2 {
		p = s.serve()
		out := s.must("admin", "state")
		if !regexp.MustCompile(`(?m)^state +locked\nstarts +locked`).MatchString(out) {
			t.Errorf("%s", out)
		}
		if err := s.admin().Ready(t.Context()); err == nil {
			t.Error("a locked appliance is ready")
		}
		signs("unavailable")
		s.must("admin", "unlock")
		signs("")
		if err := s.admin().Ready(t.Context()); err != nil {
			eventually(t, "readiness", func() bool { return s.admin().Ready(t.Context()) == nil })
		}
		p.stop()
	}
}

// TestBrokenPolicyFile breaks the policy file before a start. The policy that operators have
// approved is in the ledger and stays active; the state is degraded until the file is repaired.
func TestBrokenPolicyFile(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	p.stop()
	s.write("policy.cedar", "permitt (principal, action, resource);")
	p = s.serve()
	if _, err := s.dial().Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Error(err)
	}
	if out := s.must("admin", "state"); !strings.Contains(out, "degraded") || !strings.Contains(out, "permitt") {
		t.Errorf("%s", out)
	}
	text := s.must("admin", "policy", "show", "1")
	s.write("policy.cedar", text+"\n// approved\n")
	s.must("admin", "policy", "reload")
	if out := s.must("admin", "state"); !strings.Contains(out, "operational") {
		t.Errorf("%s", out)
	}
	p.stop()
}
