package softhsmtests

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/backup"
	"countersign/internal/scantest"

	"filippo.io/age"
)

// drilled runs a drill, whose scratch folder must be empty afterwards.
func (s *system) drilled(args ...string) (out string, exit int) {
	s.t.Helper()
	scratch := s.path("scratch")
	if err := os.MkdirAll(scratch, 0o700); err != nil {
		s.t.Fatal(err)
	}
	line := []string{"drill", "--identity", s.path("recovery.key"), "--scratch", scratch}
	out, exit = s.daemon(append(line, args...)...)
	left, err := os.ReadDir(filepath.Join(scratch, "countersign-drill"))
	if err != nil && !os.IsNotExist(err) || len(left) > 0 {
		s.t.Errorf("the drill has left %v, %v", left, err)
	}
	return out, exit
}

// TestDrill restores the newest backup beside a running appliance, with its lists of writes, and
// tells the appliance.
func TestDrill(t *testing.T) {
	s := newSystem(t)
	s.backedUp()
	s.edit("countersign.toml", "lists = false", "lists = true")
	p := s.serve()
	s.enrol()
	c := s.dial()
	if _, err := c.Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Fatal(err)
	}
	if out := s.must("admin", "backup", "drill"); !strings.Contains(out, "none yet") {
		t.Errorf("before a drill: %s", out)
	}
	s.newBackup()
	if _, err := c.Sign(t.Context(), "payments", message("BBBB")); err != nil {
		t.Fatal(err)
	}
	s.shipped()
	before := s.tokenFiles()
	out, exit := s.drilled()
	if exit != 0 {
		t.Fatalf("drill: %d\n%s", exit, out)
	}
	for _, want := range []string{
		"the proof by the audit log", "of writes after the backup",
		"has the policy, 1 peer and all public keys", "it refuses a document of before", "it makes a key, which signs",
		"the log of today names the backup, and continues its log", "the private keys of 4 versions",
		"its configuration is one of this version",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("the drill does not say %q:\n%s", want, out)
		}
	}
	if after := s.tokenFiles(); before != after {
		t.Errorf("the drill has touched the token: %s, before %s", after, before)
	}
	out = s.must("admin", "backup", "drill")
	if !strings.Contains(out, "good") || strings.Contains(out, "never") || !strings.Contains(out, "it makes a key") {
		t.Errorf("admin backup drill: %s", out)
	}
	found := 0
	for _, e := range s.events() {
		if e.Type == audit.BackupProven && strings.Contains(e.Metadata["proven"], "and continues its log") {
			found++
		}
	}
	if found != 1 {
		t.Errorf("%d events BackupProven", found)
	}
	p.stop()
	if out, exit := s.drilled(); exit == 0 || !strings.Contains(out, "the daemon was not told") {
		t.Errorf("without a daemon: %d\n%s", exit, out)
	}
	out, exit = s.drilled("--silent", "--module", "/nowhere.so")
	if exit != 1 || !strings.Contains(out, "--files-only") {
		t.Errorf("without a module: %d\n%s", exit, out)
	}
	if out, exit := s.daemon("drill"); exit != 2 || !strings.Contains(out, `"identity"`) {
		t.Errorf("without an identity: %d\n%s", exit, out)
	}
	if out, exit := s.drilled("--silent", "--files-only"); exit != 0 ||
		!strings.Contains(out, "not proven   an appliance on scratch tokens") {
		t.Errorf("without an appliance: %d\n%s", exit, out)
	}
}

// tokenFiles describes the files of the token.
func (s *system) tokenFiles() (all string) {
	s.t.Helper()
	if err := filepath.Walk(s.path("tokens"), func(path string, info os.FileInfo, err error) error {
		if err == nil && !info.IsDir() {
			all += fmt.Sprintln(path, info.Size(), info.ModTime().UnixNano())
		}
		return err
	}); err != nil {
		s.t.Fatal(err)
	}
	return all
}

// TestDrillByRoot makes a drill of an appliance with two users, as the unit does: as root with one
// capability, and with the unit's system calls. The daemon's user can't read the private key of the
// recipient.
func TestDrillByRoot(t *testing.T) {
	s, u := newTwoUsers(t)
	s.backedUp()
	s.ok(os.Chown(s.path("backups"), int(u.daemon.Uid), int(u.daemon.Gid)))
	s.serve()
	s.enrol()
	s.newBackup()
	if out, err := tries(u.daemon, "cat %s", s.path("recovery.key")); err == nil {
		t.Errorf("the daemon's user reads the key: %s", out)
	}
	if out, exit := s.drilled(); exit != 0 {
		t.Errorf("drill, as root with all rights: %d\n%s", exit, out)
	}
	s.ok(os.Chown(s.path("run/admin.sock"), 0, 0)) // as the socket unit makes it
	unit := directives(t, filepath.Join(unitFolder, "countersignd-drill.service"), "Service")
	calls := must(json.Marshal(systemCalls(t, unit["SystemCallFilter"])))(t)
	s.before = append(slices.Clone(s.before), "setpriv", "--bounding-set", "-all,+dac_read_search",
		"--inh-caps", "-all", "--no-new-privs", "env", filterEnv+"="+string(calls), must(os.Executable())(t))
	out, exit := s.drilled()
	if exit != 0 || !strings.Contains(out, "it makes a key, which signs") {
		t.Errorf("drill: %d\n%s", exit, out)
	}
}

// TestDrillFindsFaults: a drill of a backup that is not good says so at once, in the log, in the
// state and to operators. A good one ends that. Others than root can't report anything.
func TestDrillFindsFaults(t *testing.T) {
	s := newSystem(t)
	s.backedUp()
	s.serve()
	s.enrol()
	good := string(s.read("countersign.toml"))
	all := map[string]struct {
		ready func()
		args  []string
		says  string
	}{
		"no backup": {func() {}, nil, "has no backup"},
		"a damaged backup": {func() {
			b := s.read(filepath.Join("backups", filepath.Base(s.newBackup())))
			b[len(b)/2] ^= 1
			for _, name := range s.backups() {
				s.write("backups/"+name, string(b))
			}
		}, nil, "damaged"},
		"a key of nobody": {func() {
			s.newBackup()
			s.write("recovery.key", s.identity()+"\n")
		}, nil, "encrypted to other recipients"},
		"no key": {func() { s.ok(os.Remove(s.path("recovery.key"))) }, nil, "--identity"},
		"an old backup under a new name": {func() {
			old := s.newBackup()
			id := strings.Split(filepath.Base(old), "-")[1]
			s.ok(os.Rename(old, s.path("backups/"+backup.Whole.Name(id, time.Now().Add(-time.Hour)))))
		}, nil, "under another name"},
		"a broken configuration": {func() {
			s.write("countersign.toml", strings.Replace(good, "admin_socket", "admin_sockt", 1))
			s.newBackup()
			s.write("countersign.toml", good)
		}, nil, "unknown field"},
		"a pipe": {func() {
			name := filepath.Base(s.newBackup())
			s.ok(os.Rename(s.path("backups/"+name), s.path("backups/other")))
			s.ok(syscall.Mkfifo(s.path("pipe.backup"), 0o600))
		}, []string{"--backup", s.path("pipe.backup")}, "is no regular file"},
		"no module": {func() { s.newBackup() }, []string{"--module", "/nowhere.so"}, "--files-only"},
	}
	for what, c := range all {
		kept := s.read("recovery.key")
		c.ready()
		out, exit := s.drilled(c.args...)
		if exit != 1 || !strings.Contains(out, c.says) {
			t.Errorf("%s: %d\n%s", what, exit, out)
		}
		state, _, _ := s.cli("", "admin", "state")
		if !strings.Contains(state, "backup-unproven") || !strings.Contains(state, c.says) {
			t.Errorf("%s: %s", what, state)
		}
		out = s.must("admin", "backup", "drill")
		if !strings.Contains(out, "FAILED") || !strings.Contains(out, c.says) {
			t.Errorf("%s: %s", what, out)
		}
		s.write("recovery.key", string(kept))
		for _, name := range s.backups() {
			s.ok(os.Remove(s.path("backups/" + name)))
		}
	}
	failed := 0
	for _, e := range s.events() {
		if e.Type == audit.DrillFailed {
			failed++
		}
	}
	if failed != len(all) {
		t.Errorf("%d events DrillFailed, want %d", failed, len(all))
	}
	s.newBackup()
	if out, exit := s.drilled(); exit != 0 {
		t.Errorf("a good backup: %d\n%s", exit, out)
	}
	if state := s.must("admin", "state"); strings.Contains(state, "backup-unproven") {
		t.Errorf("after a good drill: %s", state)
	}
}

// backups are the names of the files in the folder of backups.
func (s *system) backups() (names []string) {
	s.t.Helper()
	all, err := os.ReadDir(s.path("backups"))
	s.ok(err)
	for _, e := range all {
		names = append(names, e.Name())
	}
	return names
}

// identity is a new identity of age.
func (s *system) identity() string {
	s.t.Helper()
	id, err := age.GenerateX25519Identity()
	s.ok(err)
	scantest.Secret("the identity of a recipient of backups", []byte(id.String()))
	return id.String()
}

// TestDrillsOfOddAppliances: a locked appliance, a token with a long name, a folder with files of
// another appliance, a copy of the backup elsewhere, and torn lists of writes are no false alarms.
func TestDrillsOfOddAppliances(t *testing.T) {
	s := newSystem(t)
	s.backedUp()
	s.edit("countersign.toml", "lists = false", "lists = true")
	p := s.serve()
	s.enrol()
	s.must("admin", "lock", "--reason", "night")
	made := s.newBackup()
	name := string(s.read("appliance"))
	s.must("admin", "unlock")
	if _, err := s.dial().Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Fatal(err)
	}
	s.shipped()
	config := string(s.read("countersign.toml"))
	s.write("countersign.toml", "noise_token = \"main\"\n"+strings.Replace(config, "[tokens.main]",
		"[tokens.the-network-hsm-of-the-second-site]\nuri = \"pkcs11:token=x\"\nmodule = \"/nowhere.so\"\n"+
			"pin_file = \"pin\"\n\n[tokens.main]", 1))
	good := func(what string, args ...string) (out string) {
		t.Helper()
		out, exit := s.drilled(args...)
		if exit != 0 || !strings.Contains(out, "it makes a key, which signs") {
			t.Errorf("%s: %d\n%s", what, exit, out)
		}
		return out
	}
	good("locked, with a long name")
	s.write("countersign.toml", config)
	s.write("backups/countersign-0000000000000000-20260101T000000Z.backup", "")
	if out, exit := s.drilled(); exit != 1 || !strings.Contains(out, "--appliance") {
		t.Errorf("a folder of two appliances: %d\n%s", exit, out)
	}
	good("a folder of two appliances", "--appliance", name)
	s.ok(os.Mkdir(s.path("off-site"), 0o700))
	copied := s.path("off-site/" + filepath.Base(made))
	s.ok(os.WriteFile(copied, s.read("backups/"+filepath.Base(made)), 0o600))
	good("elsewhere", "--backup", copied)
	p.stop()
	for _, name := range s.backups() {
		if strings.HasSuffix(name, ".lists") {
			s.ok(os.Truncate(s.path("backups/"+name), int64(len(s.read("backups/"+name))-9)))
		}
	}
	out := good("torn lists", "--silent", "--backup", made)
	if !strings.Contains(out, "not proven   lists of writes: ") {
		t.Errorf("the torn record is not named:\n%s", out)
	}
}
