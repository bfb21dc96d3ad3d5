package softhsmtests

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"countersign/client"

	"github.com/miekg/pkcs11"
	bolt "go.etcd.io/bbolt"
)

// TestRefusesToStart: each thing that is wrong costs one line that says what, and what to do, and exit status 1.
func TestRefusesToStart(t *testing.T) {
	for _, c := range []struct {
		name  string
		spoil func(t *testing.T, s *system)
		want  []string
	}{
		{"a typo in the configuration", func(t *testing.T, s *system) { s.edit("countersign.toml", "admin_socket", "admin_sokcet") },
			[]string{"countersign.toml:3", "admin_sokcet"}},
		{"a typo in a table", func(t *testing.T, s *system) { s.edit("countersign.toml", "pin_file", "pinfile") }, []string{"countersign.toml:11", "tokens.main.pinfile"}},
		{"broken TOML", func(t *testing.T, s *system) { s.edit("countersign.toml", `"admin.sock"`, `"admin.sock`) }, []string{"countersign.toml:3"}},
		{"a wrong type", func(t *testing.T, s *system) { s.edit("countersign.toml", `"ledger.db"`, `7`) }, []string{"countersign.toml:4"}},
		{"a limit out of range", func(t *testing.T, s *system) {
			s.edit("countersign.toml", "[tokens.main]", "[limits]\nconnections = 0\n[tokens.main]")
		}, []string{"limits.connections", "1 to"}},
		{"batches that are always busy", func(t *testing.T, s *system) {
			s.edit("countersign.toml", "[tokens.main]", "[limits]\nrequests_per_peer = 99\n[tokens.main]")
		}, []string{"limits.batch_items", "99"}},
		{"a bad duration", func(t *testing.T, s *system) {
			s.edit("countersign.toml", "[tokens.main]", "[limits]\nidle_timeout = \"5 minutes\"\n[tokens.main]")
		}, []string{"countersign.toml:9"}},
		{"no listen address", func(t *testing.T, s *system) { s.edit("countersign.toml", "listen = ", "#") }, []string{"listen is missing"}},
		{"a bad listen address", func(t *testing.T, s *system) { s.edit("countersign.toml", s.listen, "nowhere") }, []string{"host:port"}},
		{"no configuration", func(t *testing.T, s *system) { os.Remove(s.path("countersign.toml")) }, []string{"countersign.toml"}},
		{"no policy", func(t *testing.T, s *system) { os.Remove(s.path("policy.cedar")) }, []string{"policy.cedar"}},
		{"a broken policy", func(t *testing.T, s *system) {
			s.write("policy.cedar", "\npermit (principal, action, resource) when { context.nothing };")
		}, []string{"policy.cedar:2"}},
		{"no ledger", func(t *testing.T, s *system) { os.Remove(s.path("ledger.db")) }, []string{"no ledger", "countersignd init"}},
		{"a damaged ledger", func(t *testing.T, s *system) { s.write("ledger.db", "not a ledger") }, []string{"damaged", "backup"}},
		{"a newer ledger", func(t *testing.T, s *system) {
			s.changeLedger(func(tx *bolt.Tx) error { return tx.Bucket([]byte("meta")).Put([]byte("format"), []byte{0, 0, 0, 99}) })
		}, []string{"newer version", "99"}},
		{"no PIN file", func(t *testing.T, s *system) { os.Remove(s.path("pin")) }, []string{"PIN file"}},
		{"a PIN file for all", func(t *testing.T, s *system) { os.Chmod(s.path("pin"), 0o644) }, []string{"chmod 600"}},
		{"a wrong PIN", func(t *testing.T, s *system) { s.write("pin", "another-pin") }, []string{"refuses the PIN", "will not be tried again"}},
		{"no token", func(t *testing.T, s *system) { s.edit("countersign.toml", "system%20test", "other") }, []string{"no token matches", "other"}},
		{"no module", func(t *testing.T, s *system) { s.edit("countersign.toml", softHSM, "/nowhere.so") }, []string{"/nowhere.so"}},
		{"the token is another", func(t *testing.T, s *system) {
			s.useToken(func(m *pkcs11.Ctx, h pkcs11.SessionHandle) { deleteAll(t, m, h, "") })
		}, []string{"audit-log/1", "right token"}},
		{"a second object with a key's label", func(t *testing.T, s *system) {
			s.useToken(func(m *pkcs11.Ctx, h pkcs11.SessionHandle) { generate(t, m, h, "countersign/noise/1") })
		}, []string{"noise/1", "more than one object", "pkcs11-tool"}},
		{"a second object with a key's label and CKA_ID", func(t *testing.T, s *system) {
			tag := pkcs11.NewAttribute(pkcs11.CKA_ID, s.tagOf("noise/1"))
			s.useToken(func(m *pkcs11.Ctx, h pkcs11.SessionHandle) { generate(t, m, h, "countersign/noise/1", tag) })
		}, []string{"noise/1", "more than one object", "pkcs11-tool"}},
		{"half a key", func(t *testing.T, s *system) {
			s.useToken(func(m *pkcs11.Ctx, h pkcs11.SessionHandle) { deleteAll(t, m, h, "public") })
		}, []string{"noise/1", "half"}},
		{"a file where the socket should be", func(t *testing.T, s *system) { s.write("admin.sock", "") }, []string{"admin.sock", "another kind"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSystem(t)
			c.spoil(t, s)
			out, code := s.daemon("serve")
			last := strings.TrimSpace(out)
			if code != 1 || strings.Count(last, "\n") > 1 {
				t.Errorf("exit status %d, %d lines:\n%s", code, strings.Count(last, "\n")+1, out)
			}
			for _, want := range c.want {
				if !strings.Contains(out, want) {
					t.Errorf("%q is not said:\n%s", want, out)
				}
			}
		})
	}
}

// TestSecondDaemon: the first one goes on as if nothing had happened.
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

func TestServeCreatesNothing(t *testing.T) {
	s := newSystem(t)
	for _, name := range []string{"ledger.db", "tokens", "pin", "policy.cedar"} {
		os.Rename(s.path(name), s.path(name)+".away")
	}
	before, _ := os.ReadDir(s.dir)
	if _, code := s.daemon("serve"); code != 1 {
		t.Errorf("exit status %d", code)
	}
	if after, _ := os.ReadDir(s.dir); len(after) != len(before) {
		t.Errorf("%v, before %v", after, before)
	}
}

// TestInterruptedInit: what an init that was cut off has left behind does not stop the next one.
func TestInterruptedInit(t *testing.T) {
	s := newSystem(t)
	// Cut off after the ledger was made and the Noise key begun: the intent is there, and half a key.
	tag := s.tagOf("noise/1")
	s.changeLedger(func(tx *bolt.Tx) error {
		return tx.Bucket([]byte("keys")).Put([]byte("noise/1"), fmt.Appendf(nil, `{"token":"main","algorithm":"x25519","state":"making","created":1,"tag":"%x"}`, tag))
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

// tagOf reads the tag of a key's creation from the ledger.
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

// changeLedger changes the ledger's file as a program of another version might.
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

// useToken uses the token as another program with the PIN would.
func (s *system) useToken(use func(*pkcs11.Ctx, pkcs11.SessionHandle)) {
	s.t.Helper()
	t, ok := s.t.(*testing.T)
	if !ok {
		s.t.Fatal("for tests only")
	}
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

// deleteAll destroys all objects, or the public half of the Noise key only.
func deleteAll(t *testing.T, m *pkcs11.Ctx, h pkcs11.SessionHandle, which string) {
	t.Helper()
	var template []*pkcs11.Attribute
	if which == "public" {
		template = append(template, pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), pkcs11.NewAttribute(pkcs11.CKA_LABEL, "countersign/noise/1"))
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

// generate makes an Ed25519 pair under a label, with more attributes.
func generate(t *testing.T, m *pkcs11.Ctx, h pkcs11.SessionHandle, label string, more ...*pkcs11.Attribute) {
	t.Helper()
	common := append([]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_LABEL, label), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, 0x40)}, more...)
	public := append([]*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_EC_PARAMS, []byte{6, 3, 0x2b, 0x65, 0x70})}, common...)
	if _, _, err := m.GenerateKeyPair(h, []*pkcs11.Mechanism{pkcs11.NewMechanism(0x1055, nil)}, public, common); err != nil {
		t.Fatal(err)
	}
}

// TestAttendedStart: each start waits for an operator, and a lock outlives a restart of one that does not.
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
		if refusal, _ := errors.AsType[*client.Error](err); want == "" && err != nil || want != "" && (refusal == nil || refusal.Code != want) {
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
		if out := s.must("admin", "state"); !strings.Contains(out, "state   locked") || !strings.Contains(out, "starts  locked") {
			t.Errorf("%s", out)
		}
		if err := s.admin().Ready(t.Context()); err == nil {
			t.Error("it is ready")
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

// TestBrokenPolicyFile: what operators have approved stays in force, whatever becomes of the file.
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
