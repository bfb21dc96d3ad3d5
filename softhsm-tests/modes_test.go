package softhsmtests

import (
	"encoding/pem"
	"errors"
	"io/fs"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"countersign/client"
	"countersign/tpm/tpmtest"
)

// created are all files, folders and sockets that the programs create, with their modes whatever
// the umask is. Paths are relative to the folder of the appliance; a folder ends with a slash.
var created = []struct {
	path string
	mode fs.FileMode
}{
	// countersignd
	{`ledger\.db`, 0o600},
	{`ledger\.db\.reserve`, 0o600},
	{`ledger\.db\.history`, 0o600},
	{`ledger\.db\.journal/`, 0o700},
	{`ledger\.db\.journal/[^/]+`, 0o600},
	{`ledger\.db\.main\.refused-pin`, 0o644}, // a digest; the folder is private
	{`ledger\.db\.sinks/`, 0o700},
	{`ledger\.db\.sinks/collector`, 0o600},
	{`events\.jsonl`, 0o640}, // for a collector in the daemon's group
	{`admin\.sock`, 0o600},
	{`keys/`, 0o700}, // of a TPM
	{`keys/[^/]+`, 0o600},
	// a module, here SoftHSM
	{`tokens/[^/]+/`, 0o700},
	{`tokens/[^/]+/[^/]+`, 0o600},
	// countersign
	{`demo\.key`, 0o600},
	{`checkpoint`, 0o600},
	{`root\.(run|config)/`, 0o700},
	{`root\.(run|config)/(.+)/`, 0o700},
	{`root\.(run|config)/(.+)`, 0o600},
	{`report/`, 0o700},
	{`report/(events|receipts)\.(csv|jsonl)`, 0o600},
	{`report/statement\.json`, 0o600},
	{`export/(.+/)?`, 0o755}, // the log is for everybody who gets it
	{`export/.*[^/]`, 0o644},
}

// TestModes has the programs create all that they can create, with umasks that leave everything
// open and with the usual one, and compares the modes of all files.
func TestModes(t *testing.T) {
	for _, umask := range []int{0, 0o022} {
		old := syscall.Umask(umask)
		defer syscall.Umask(old)
		e := tpmtest.New(t)
		s := newSoftHSM(t, softHSM)
		b := must(os.ReadFile(s.path("countersign.toml")))(t)
		s.write("countersign.toml", string(b)+"\n[tokens.tpm]\ntpm = \""+e.Socket+"\"\nstate = \"keys\"\n"+
			"pcrs = [7, 11]\n\n[[sinks]]\nname = \"collector\"\nfile = \"events.jsonl\"\n")
		before := map[string]bool{}
		walk := func(visit func(name string, mode fs.FileMode)) {
			t.Helper()
			if err := filepath.WalkDir(s.dir, func(path string, d fs.DirEntry, err error) error {
				name, _ := filepath.Rel(s.dir, path)
				if err != nil || name == "." {
					return err
				}
				st, err := d.Info()
				if err == nil && st.IsDir() {
					name += "/"
				}
				if err == nil && st.Mode().Type() != fs.ModeSymlink {
					visit(name, st.Mode().Perm())
				}
				return err
			}); err != nil {
				t.Fatal(err)
			}
		}
		walk(func(name string, _ fs.FileMode) { before[name] = true })
		if out, code := s.daemon("init", "--new-token", "--so-pin-file", s.path("so-pin")); code != 0 {
			t.Fatalf("init: %d\n%s", code, out)
		}
		p := s.serve()
		s.enrol()
		s.must("admin", "key", "create", "sealed", "--token", "tpm")
		c := s.clientConfig()
		c.LogCheckpoint = s.path("checkpoint")
		c.LogKey = strings.TrimSpace(s.must("admin", "audit", "key"))
		conn := must(client.Dial(t.Context(), c))(t)
		must(conn.Sign(t.Context(), "payments", message("modesmod")))(t)
		conn.Close()
		s.must("admin", "login", "root")
		s.must("admin", "context", "add", "here", "--socket", s.path("admin.sock"))
		s.must("admin", "audit", "report", s.path("report"))
		s.must("admin", "audit", "export", s.path("export"))
		s.must("admin", "ledger", "compact")
		made := map[string]fs.FileMode{}
		for made["events.jsonl"] == 0 && t.Context().Err() == nil {
			walk(func(name string, mode fs.FileMode) { made[name] = mode })
		}
		walk(func(name string, mode fs.FileMode) { made[name] = mode }) // while the sockets are there
		p.stop()
		s.write("pin", "wrong")
		if out, code := s.daemon("check"); code != 3 {
			t.Errorf("check with a wrong PIN: %d\n%s", code, out)
		}
		walk(func(name string, mode fs.FileMode) { made[name] = mode })
		seen := make([]bool, len(created))
		for name, mode := range made {
			if before[name] {
				continue
			}
			known := false
			for i, c := range created {
				if regexp.MustCompile("^" + c.path + "$").MatchString(name) {
					known, seen[i] = true, true
					if mode != c.mode {
						t.Errorf("umask %03o: %s has mode %04o, want %04o", umask, name, mode, c.mode)
					}
					break
				}
			}
			if !known {
				t.Errorf("umask %03o: %s has mode %04o, and is in no list", umask, name, mode)
			}
		}
		for i, c := range created {
			if !seen[i] {
				t.Errorf("umask %03o: nothing has created %s", umask, c.path)
			}
		}
	}
}

// TestOpenToOthers opens to other users, one by one, what the daemon keeps from them and what the
// daemon obeys. serve, check and init refuse with exit status 2, the path and a command that helps;
// after that command the daemon serves.
func TestOpenToOthers(t *testing.T) {
	s := newSystem(t)
	for dir := s.dir; dir != os.TempDir(); dir = filepath.Dir(dir) { // as /etc/countersign is
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"state", "lib", "run"} {
		if err := os.Mkdir(s.path(name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Rename(s.path("ledger.db"), s.path("state/ledger.db")); err != nil {
		t.Fatal(err)
	}
	module := must(os.ReadFile(softHSM))(t)
	if err := os.WriteFile(s.path("lib/module.so"), module, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("lib/module.so", s.path("module.so")); err != nil {
		t.Fatal(err)
	}
	os.Chmod(s.path("lib"), 0o755) // a private folder would be enough
	s.edit("countersign.toml", `"ledger.db"`, `"state/ledger.db"`)
	s.edit("countersign.toml", `"admin.sock"`, `"run/admin.sock"`)
	s.edit("countersign.toml", softHSM, s.path("module.so"))
	s.write("password", "of-the-mail-server\n")
	server := httptest.NewTLSServer(nil)
	s.write("ca.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})))
	server.Close()
	s.edit("countersign.toml", "[tokens.main]", `[mail]
server = "127.0.0.1:9"
from = "countersign@example.org"
to = ["ann@example.org"]
user = "countersign"
password_file = "password"
ca_file = "ca.pem"

[tokens.main]`)
	if out, code := s.daemon("check"); code != 0 {
		t.Fatalf("check: %d\n%s", code, out)
	}
	for _, c := range []struct {
		path string
		mode fs.FileMode
		want string
	}{
		{"password", 0o640, "it must be a file that only its owner can read"},
		{"ca.pem", 0o606, "other users can change it"},
		{"countersign.toml", 0o604, "other users can read it"},
		{"countersign.toml", 0o602, "other users can"},
		{"pin", 0o644, "it must be a file that only its owner can read"},
		{"state", 0o755, "other users can read it"},
		{"state", 0o701, "other users can read it"},
		{"tokens", 0o755, "other users can read it"},
		{"lib", 0o777, "other users can change it"},
		{"lib/module.so", 0o722, "other users can change it"},
		{"policy.cedar", 0o622, "other users can change it"},
		{"softhsm2.conf", 0o620, "other users can change it"},
		{"run", 0o770, "other users can change it"},
		{".", 0o777, "other users can change it"},
	} {
		path := filepath.Join(s.dir, c.path)
		was := must(os.Stat(path))(t).Mode().Perm()
		if err := os.Chmod(path, c.mode); err != nil {
			t.Fatal(err)
		}
		for _, command := range []string{"serve", "check", "init"} {
			out, code := s.daemon(command)
			// The scrubber may take a path of this length in the log for a secret.
			if code != 2 || !strings.Contains(out, c.want) || command == "check" && !strings.Contains(out, path) ||
				!strings.Contains(out, ": chmod go") && !strings.Contains(out, "; chmod 600") {
				t.Errorf("%s with %s %04o: %d\n%s", command, c.path, c.mode, code, out)
			}
		}
		if err := os.Chmod(path, was); err != nil {
			t.Fatal(err)
		}
	}
	if os.Geteuid() == 0 { // only root can give files away
		p := s.path("countersign.toml")
		for _, group := range []int{os.Getegid(), 4711} { // our own group may read what root owns
			if err := errors.Join(os.Chown(p, 0, group), os.Chmod(p, 0o640)); err != nil {
				t.Fatal(err)
			}
			if out, code := s.daemon("check"); (code == 2) != (group == 4711) {
				t.Errorf("check with the configuration of group %d: %d\n%s", group, code, out)
			}
		}
		if err := os.Chmod(p, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"countersign.toml", "lib/module.so", "state"} {
			if err := os.Chown(s.path(name), 4711, 4711); err != nil {
				t.Fatal(err)
			}
			if out, code := s.daemon("check"); code != 2 || !strings.Contains(out, "user 4711") {
				t.Errorf("check with another owner of %s: %d\n%s", name, code, out)
			}
			if err := os.Chown(s.path(name), 0, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	p := s.start(exec.Command(filepath.Join(bin, "countersignd"), "serve", "--config", s.path("countersign.toml")))
	if err := os.Chmod(s.path("countersign.toml"), 0o646); err != nil {
		t.Fatal(err)
	}
	p.cmd.Process.Signal(syscall.SIGHUP)
	p.stop()
	if !strings.Contains(p.stderr.String(), "nothing was reloaded") {
		t.Errorf("SIGHUP with a configuration that others can change:\n%s", p.stderr)
	}
}
