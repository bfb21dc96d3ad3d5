package softhsmtests

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"countersign/approval"
	"countersign/internal/durable"
	"countersign/internal/ledger/disktest"
	"countersign/internal/scantest"
	"countersign/tpm/tpmtest"

	"github.com/miekg/pkcs11"
	"golang.org/x/sys/unix"
)

// resetting is the command line of a factory reset without approvals. The free space of the disk of
// the tests is left alone.
func (s *system) resetting(text string, more ...string) []string {
	return append([]string{"factory-reset", "--proposer", "root", "--text", text, "--record", s.record(),
		"--free-space=false"}, more...)
}

// record is the file outside.
func (s *system) record() string { return filepath.Join(filepath.Dir(s.dir), "record") }

// askReset has a text written, of which nothing is destroyed.
func (s *system) askReset(more ...string) (text, asked string) {
	s.t.Helper()
	text = filepath.Join(s.t.TempDir(), "reset.txt")
	asked, code := s.daemon(s.resetting(text, more...)...)
	if code != 0 || !strings.Contains(asked, "Nothing has been destroyed yet") {
		s.t.Fatalf("factory-reset: %d\n%s", code, asked)
	}
	return text, asked
}

// reset destroys the appliance with the approval of the first administrator.
func (s *system) reset(more ...string) string {
	s.t.Helper()
	text, _ := s.askReset(more...)
	out, code := s.daemon(s.resetting(text, append(more, "--approval", s.signText(s.root, text))...)...)
	if code != 0 {
		s.t.Fatalf("factory-reset, approved: %d\n%s", code, out)
	}
	return out
}

// steps reads the record.
func (s *system) steps() (all []map[string]any) {
	s.t.Helper()
	for line := range bytes.Lines(must(os.ReadFile(s.record()))(s.t)) {
		var step map[string]any
		if err := json.Unmarshal(line, &step); err != nil {
			s.t.Fatalf("the record: %v: %s", err, line)
		}
		all = append(all, step)
	}
	return all
}

// typed runs a factory reset at a terminal, which script(1) has.
func (s *system) typed(answer string, more ...string) (out string, code int) {
	s.t.Helper()
	line := fmt.Sprintf("%s factory-reset --typed --free-space=false --record %s --config %s %s",
		filepath.Join(bin, "countersignd"), s.record(), s.path("countersign.toml"), strings.Join(more, " "))
	cmd := exec.CommandContext(s.t.Context(), "script", "-qec", line, "/dev/null")
	cmd.Stdin = strings.NewReader(answer + "\n")
	b, _ := cmd.CombinedOutput()
	s.checkOutput("countersignd", string(b))
	return string(b), cmd.ProcessState.ExitCode()
}

// appliancesFiles lists the files of the appliance that a reset destroys.
func (s *system) appliancesFiles() (all []string) {
	for _, pattern := range []string{
		"ledger.db*", "ledger.db.*/*", "policy.cedar", "countersign.toml*", "pin", "factory-reset*", ".new-*",
		".factory-reset*",
	} {
		all = append(all, must(filepath.Glob(s.path(pattern)))(s.t)...)
	}
	return all
}

// TestFactoryReset destroys an appliance under the approval of two operators. Another program's
// objects on the token, the backups and the record stay. The same folder and token have another
// appliance afterwards.
func TestFactoryReset(t *testing.T) {
	s := newSystem(t)
	s.backedUp()
	s.useToken(func(m *pkcs11.Ctx, h pkcs11.SessionHandle) { generate(t, m, h, "of another program") })
	p := s.serve()
	s.enrol()
	ann := s.newOperator("ann")
	s.proposeAndApprove(approval.ActOperatorAdd, "", approval.Parameter{Name: "name", Value: "ann"},
		approval.Parameter{Name: "roles", Value: "approver"},
		approval.Parameter{Name: "credential", Value: string(must(json.Marshal(ann.credential))(t))})
	s.proposeAndApprove(approval.ActApprovalsNeeded, "", approval.Parameter{Name: "needed", Value: "2"})
	backup := s.newBackup()
	if err := os.WriteFile(s.path("ledger.db.replaced-20260101T000000.000000Z"), []byte("older"), 0o600); err != nil {
		t.Fatal(err)
	}
	unused := filepath.Join(t.TempDir(), "unused.txt")
	if out, code := s.daemon(s.resetting(unused)...); code != 1 ||
		!strings.Contains(out, "stop the other countersignd") {
		t.Errorf("while the daemon runs: %d\n%s", code, out)
	}
	p.stop()
	before := s.labels()

	text, asked := s.askReset()
	for _, want := range []string{
		"4 keys of the token main: audit-log/1", s.path("ledger.db") + " (the ledger)", "ledger.db.replaced-2026",
		s.path("pin") + " (PIN of the token main)", "2 of them must", "1 file of backups in " + s.path("backups"),
		"free blocks", "keys: main: 4\n", "recoverable: none\n",
		"stays        " + s.path("softhsm2.conf") + " (SOFTHSM2_CONF of the token main)",
	} {
		if !strings.Contains(asked, want) {
			t.Errorf("factory-reset does not say %q:\n%s", want, asked)
		}
	}
	old := []string{"--approval", s.signText(s.root, text), "--approval", s.signText(ann, text)}
	s.serve().stop() // two events more
	again, _ := s.askReset()
	signed := []string{"--approval", s.signText(s.root, again), "--approval", s.signText(ann, again)}
	away := s.path("tokens.away")
	for what, c := range map[string]struct {
		args   []string
		before func() (after func())
		says   string
	}{
		"too few":      {args: s.resetting(again, signed[:2]...), says: "1 of 2 approvals are missing"},
		"one twice":    {args: s.resetting(again, append(signed[:2:2], signed[:2]...)...), says: "approved already"},
		"another text": {args: s.resetting(text, old...), says: "something else than what would be done now"},
		"with more":    {args: s.resetting(again, append(signed, "--backups")...), says: "something else"},
		"a record in the ledger's folder": {args: append(s.resetting(again, signed...), "--record", s.path("r")),
			says: "is the appliance's"},
		"an unknown token":  {args: s.resetting(unused, "--without-token", "other"), says: "there are main"},
		"not at a terminal": {args: []string{"factory-reset", "--typed"}, says: "at a terminal only"},
		"a token that is away": {args: s.resetting(again, signed...), says: "--without-token main",
			before: func() func() {
				s.ok(os.Rename(s.path("tokens"), away))
				return func() { s.ok(os.Rename(away, s.path("tokens"))) }
			}},
		"a link as the record": {args: append(s.resetting(again, signed...), "--record", unused+".link"),
			says: "--record",
			before: func() func() {
				s.ok(os.Symlink(s.record(), unused+".link"))
				return func() {}
			}},
	} {
		after := func() {}
		if c.before != nil {
			after = c.before()
		}
		out, code := s.daemon(c.args...)
		after()
		if code == 0 || !strings.Contains(out, c.says) {
			t.Errorf("%s: %d\n%s", what, code, out)
		}
	}
	if exists(s.path("factory-reset.json")) || exists(s.record()) || !slices.Equal(s.labels(), before) {
		t.Fatal("a reset that was refused has begun")
	}

	out, code := s.daemon(s.resetting(again, signed...)...)
	if code != 0 || !strings.Contains(out, "approved by  ann") || !strings.Contains(out, "ended") {
		t.Fatalf("factory-reset: %d\n%s", code, out)
	}
	if left := s.labels(); !slices.Equal(left, []string{"of another program", "of another program"}) {
		t.Errorf("the token has %q", left)
	}
	if left := s.appliancesFiles(); len(left) > 0 || !exists(backup) {
		t.Errorf("there are %v; the backup: %v", left, exists(backup))
	}
	s.checkRecord(2)
	if out, code := s.daemon(s.resetting(again, signed...)...); code != 2 || !strings.Contains(out, "no such file") {
		t.Errorf("a reset after a reset: %d\n%s", code, out)
	}

	s.ok(os.Remove(s.path("tap.sock"))) // of a helper of the tests
	other := &system{t: t, dir: s.dir, listen: s.listen, root: s.root}
	other.api = other.client(other.root)
	other.write("pin", userPIN+"\n")
	other.configure(fmt.Sprintf("uri = \"pkcs11:token=system%%20test\"\nmodule = %q\npin_file = \"pin\"\n"+
		"environment = { SOFTHSM2_CONF = %q }", softHSM, s.path("softhsm2.conf")))
	if out, code := other.daemon("init"); code != 0 || !strings.Contains(out, "created the ledger") {
		t.Fatalf("init: %d\n%s", code, out)
	}
	os.RemoveAll(s.path("root.config")) // which has pinned the appliance of before
	other.serve()
	s.ok(os.Remove(s.path("demo.key")))
	other.enrol()
	must(other.dial().Sign(t.Context(), "payments", message("AAAA")))(t)
}

// checkRecord checks that the record is whole, and that others can verify its approvals by
// ssh-keygen alone.
func (s *system) checkRecord(approvals int) {
	s.t.Helper()
	steps := s.steps()
	if first, last := steps[0]["step"], steps[len(steps)-1]["step"]; first != "begins" || last != "ended" {
		s.t.Errorf("the record begins with %v and ends with %v", first, last)
	}
	begun := steps[0]["reset"].(map[string]any)
	all, _ := begun["approvals"].([]any)
	if len(all) != approvals || begun["by"] != fmt.Sprintf("uid:%d", os.Getuid()) {
		s.t.Errorf("the record: %v", begun)
	}
	for _, each := range all {
		a := each.(map[string]any)
		name := a["operator"].(string)
		for file, content := range map[string]string{
			"allowed": name + " " + a["public_key"].(string) + "\n", "signature": a["signature"].(string),
		} {
			s.ok(os.WriteFile(filepath.Join(filepath.Dir(s.dir), file), []byte(content), 0o600))
		}
		cmd := exec.Command("ssh-keygen", "-Y", "verify", "-n", "countersign-proposal-v1", "-f", "allowed", "-I", name,
			"-s", "signature")
		cmd.Dir, cmd.Stdin = filepath.Dir(s.dir), strings.NewReader(begun["text"].(string))
		if out, err := cmd.CombinedOutput(); err != nil {
			s.t.Errorf("the approval of %s: %v\n%s", name, err, out)
		}
	}
}

// TestFactoryResetWithoutToken leaves a token that is away. Its keys stay there, and the text says
// so. The appliance's backups go, and another's stay.
func TestFactoryResetWithoutToken(t *testing.T) {
	s := newSystem(t)
	s.backedUp()
	p := s.serve()
	backup := s.newBackup()
	p.stop()
	others := "backups/countersign-0011223344556677-20260101T000000Z.backup"
	s.write(others, "of another appliance")
	before := s.labels()
	s.ok(os.Rename(s.path("tokens"), s.path("away")))
	more := []string{"--without-token", "main", "--backups"}
	text, asked := s.askReset(more...)
	if !strings.Contains(asked, "left_tokens: main\n") ||
		!strings.Contains(asked, "the token main with 2 keys: whoever") {
		t.Error(asked)
	}
	out, code := s.daemon(s.resetting(text, append(more, "--approval", s.signText(s.root, text))...)...)
	if code != 0 {
		t.Fatalf("%d\n%s", code, out)
	}
	s.ok(os.Rename(s.path("away"), s.path("tokens")))
	if left := s.appliancesFiles(); !slices.Equal(left, []string{s.path("pin")}) || !slices.Equal(s.labels(), before) {
		t.Errorf("there are %v, and %v on the token", left, s.labels())
	}
	if exists(backup) || !exists(s.path(others)) {
		t.Errorf("the backup: %v, that of another appliance: %v", exists(backup), exists(s.path(others)))
	}
}

// TestFactoryResetCutOff kills a reset again and again, each time a few operations of the disk
// later. Before the marker, nothing is destroyed. From the marker on, nothing else starts, and the
// reset goes on without an approval to its end.
func TestFactoryResetCutOff(t *testing.T) {
	s := newSystem(t)
	disk := disktest.New(t)
	state := filepath.Join(disk.Dir(), "state")
	for _, name := range []string{state, filepath.Join(disk.Dir(), "log"), filepath.Join(disk.Dir(), "etc")} {
		mkdir(t, name)
	}
	for from, to := range map[string]string{"ledger.db": "state", "policy.cedar": "etc"} {
		s.ok(os.WriteFile(filepath.Join(disk.Dir(), to, from), s.read(from), 0o600))
		s.ok(os.Remove(s.path(from)))
	}
	s.ok(os.RemoveAll(s.path("ledger.db.journal")))
	s.ok(os.Remove(s.path("ledger.db.reserve")))
	s.edit("countersign.toml", `"ledger.db"`, fmt.Sprintf("%q", filepath.Join(state, "ledger.db")))
	s.edit("countersign.toml", `"policy.cedar"`, fmt.Sprintf("%q", filepath.Join(disk.Dir(), "etc/policy.cedar")))
	s.serve().stop()
	before := s.labels()
	record := []string{"--record", filepath.Join(disk.Dir(), "log/record")}
	text, _ := s.askReset(record...)
	args := append(s.resetting(text, record...), "--approval", s.signText(s.root, text))
	marker := filepath.Join(state, "factory-reset.json")

	begun, told, kills, refused := false, false, 0, 0
	for {
		if kills > 200 {
			t.Fatal("the reset does not end")
		}
		cmd := exec.Command(filepath.Join(bin, "countersignd"), append(args, "--config", s.path("countersign.toml"))...)
		var out scantest.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		left := 10 + kills/2 // operations until the kill
		var workers []int
		started := make(chan struct{})
		disk.Fail(func(op disktest.Op) syscall.Errno {
			if left--; left < 0 {
				<-started
				if left == -1 {
					workers = descendants(cmd.Process.Pid)
				}
				cmd.Process.Kill()
				return syscall.EIO
			}
			return 0
		})
		s.ok(cmd.Start())
		close(started)
		err := cmd.Wait()
		disk.Fail(nil)
		awaitEnds(t, workers)
		s.checkOutput("countersignd", out.String())
		if err == nil {
			break
		}
		if left >= 0 {
			t.Fatalf("after %d kills: %v\n%s", kills, err, &out)
		}
		kills++
		if begun = begun || exists(marker); !begun {
			if got := s.labels(); !slices.Equal(got, before) || !exists(filepath.Join(state, "ledger.db")) {
				t.Fatalf("without a marker, the token has %v", got)
			}
			continue
		}
		args = []string{"factory-reset"} // no text, no approval, no record
		if b, err := os.ReadFile(filepath.Join(state, "ledger.db")); err == nil && !told && kills%3 == 0 {
			s.write("ledger.db", string(b))
			told = slices.Contains(s.lastEvents(), "FactoryResetBegun")
			s.ok(os.Remove(s.path("ledger.db")))
			s.ok(os.Remove(s.path("ledger.db.reserve")))
		}
		for _, other := range [][]string{{"serve"}, {"init"}, {"check"}} {
			if !exists(marker) || !exists(s.path("countersign.toml")) || kills%4 != 0 {
				continue
			}
			if out, code := s.daemon(other...); code == 0 {
				t.Errorf("%v in a reset that was cut off: %s", other, out)
			} else if strings.Contains(out, "run countersignd factory-reset again") {
				refused++
			}
		}
	}
	t.Logf("%d kills, %d refusals", kills, refused)
	if kills < 10 || refused < 3 || !told {
		t.Errorf("%d kills, %d refusals of other commands, an event: %v", kills, refused, told)
	}
	if got := s.labels(); len(got) > 0 {
		t.Errorf("the token has %v", got)
	}
	var left []string
	s.ok(filepath.Walk(disk.Dir(), func(path string, info os.FileInfo, err error) error {
		if err == nil && !info.IsDir() && !strings.HasSuffix(path, "log/record") {
			left = append(left, path)
		}
		return err
	}))
	if left = append(left, s.appliancesFiles()...); len(left) > 0 {
		t.Errorf("there are %v", left)
	}
	steps := string(must(os.ReadFile(filepath.Join(disk.Dir(), "log/record")))(t))
	if !strings.Contains(steps, `"ended"`) {
		t.Errorf("the record has no end: %s", steps)
	}
}

// TestFactoryResetTyped has root type the name, where nobody can approve: with a ledger, with a
// damaged one, whose appliance is known by its key on the token, and without anything.
func TestFactoryResetTyped(t *testing.T) {
	needRoot(t, "a reset by root")
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	key := strings.Split(s.must("admin", "audit", "key"), "/")
	name := key[0] + "/" + key[1]
	p.stop()
	for _, wrong := range []string{"yes", name + "0"} {
		if out, code := s.typed(wrong); code != 2 || !strings.Contains(out, "not the name: nothing has been") {
			t.Errorf("%q: %d\n%s", wrong, code, out)
		}
	}
	s.ok(os.Chmod(bin, 0o755))
	if out, err := tries(&syscall.Credential{Uid: 65534, Gid: 65534}, "%s factory-reset --typed",
		filepath.Join(bin, "countersignd")); err == nil || !strings.Contains(out, "only root") {
		t.Errorf("another user: %v %s", err, out)
	}
	if out, code := s.typed(name, "--proposer", "root"); code != 2 || !strings.Contains(out, "leave those out") {
		t.Errorf("typed and approved: %d %s", code, out)
	}
	good := s.read("ledger.db")
	s.write("ledger.db", string(good[:5000]))
	if out, code := s.daemon(s.resetting(s.path("text"))...); code == 0 || !strings.Contains(out, "--typed") {
		t.Errorf("a damaged ledger that should approve: %d\n%s", code, out)
	}
	if out, _ := s.typed("no"); !strings.Contains(out, "type its name, "+name+":") ||
		!strings.Contains(out, "the key payments/1 of the token main, which the ledger does NOT have") {
		t.Errorf("a damaged ledger: %s", out)
	}
	out, code := s.typed(name)
	if left := s.appliancesFiles(); code != 0 || len(left) > 0 || len(s.labels()) > 0 {
		t.Errorf("there are %v, and %v on the token: %d\n%s", left, s.labels(), code, out)
	}
	if begun := s.steps()[0]["reset"].(map[string]any); begun["typed"] != true || begun["approvals"] != nil ||
		begun["appliance"] != name {
		t.Errorf("the record: %v", begun)
	}
	s.checkRecord(0)

	none := newSoftHSM(t, softHSM) // no token, no ledger
	if out, code := none.typed(must(os.Hostname())(t), "--without-token", "main"); code != 0 ||
		!strings.Contains(out, "not known; the machine is") {
		t.Errorf("nothing is there: %d\n%s", code, out)
	}
}

// TestFactoryResetTPM gives the TPM back what the appliance has had of it. The storage root key
// stays, unless it is asked for.
func TestFactoryResetTPM(t *testing.T) {
	e := tpmtest.New(t)
	clean := e.Lasting(t)
	for _, roots := range []bool{false, true} {
		s := newTPMSystem(t, e, "pin_file = \"pin\"")
		p := s.serve()
		s.enrol()
		s.must("admin", "key", "create", "tls", "--algorithm", "p256")
		p.stop()
		with := e.Lasting(t)
		var more []string
		want := slices.DeleteFunc(slices.Clone(with), func(h string) bool { return h == "0x1800C51" })
		if roots {
			more, want = []string{"--storage-roots", "--keep-pins"}, clean
		}
		if len(want) == len(with) {
			t.Fatalf("there is no counter: %v", with)
		}
		if _, asked := s.askReset("--without-token", "main"); !strings.Contains(asked, "stays        the counter of") {
			t.Errorf("a counter whose token is left: %s", asked)
		}
		out := s.reset(more...)
		if got := e.Lasting(t); !slices.Equal(got, want) {
			t.Errorf("the TPM has %v, want %v\n%s", got, want, out)
		}
		if n := e.Handles(t); n != 0 {
			t.Errorf("%d handles are left in the TPM", n)
		}
		left := append(s.appliancesFiles(), must(filepath.Glob(s.path("keys/*")))(t)...)
		if roots {
			left = slices.DeleteFunc(left, func(path string) bool { return path == s.path("pin") })
		}
		if len(left) > 0 || exists(s.path("pin")) != roots {
			t.Errorf("there are %v, and the PIN: %v", left, exists(s.path("pin")))
		}
		for _, says := range []string{"the key payments/1 of the token main", "the counter of the token main"} {
			if !strings.Contains(out, says) {
				t.Errorf("the reset does not say %q:\n%s", says, out)
			}
		}
		s.checkRecord(1)
	}
}

// TestFactoryResetOfTwoUsers has root destroy the files of the daemon's user and of the user of the
// key workers. A marker that the daemon's user has written is no approval.
func TestFactoryResetOfTwoUsers(t *testing.T) {
	s, u := newTwoUsers(t)
	s.serve().stop()
	marker := s.path("state/factory-reset.json")
	s.ok(os.WriteFile(marker, []byte(`{"format":1,"record":"/dev/null"}`), 0o600))
	s.ok(os.Chown(marker, int(u.daemon.Uid), int(u.daemon.Gid)))
	text := filepath.Join(t.TempDir(), "reset.txt")
	if out, code := s.daemon(s.resetting(text)...); code == 0 ||
		!strings.Contains(out, "no reset of user 0 has made it") {
		t.Errorf("a marker of the daemon's user: %d\n%s", code, out)
	}
	s.ok(os.Remove(marker))
	s.ok(os.Mkdir(s.path("foreign"), 0o700))
	foreign := s.path("foreign/main.0.journal")
	s.ok(os.WriteFile(foreign, []byte("foreign"), 0o600))
	s.ok(os.Rename(s.path("keys/journal"), s.path("keys/away")))
	s.ok(os.Symlink(s.path("foreign"), s.path("keys/journal")))
	s.ok(os.Lchown(s.path("keys/journal"), int(u.keys.Uid), int(u.keys.Gid)))
	if out, code := s.daemon(s.resetting(text)...); code == 0 || !strings.Contains(out, "is a link of user") {
		t.Errorf("a link in place of a folder: %d\n%s", code, out)
	}
	s.ok(os.Remove(s.path("keys/journal")))
	s.ok(os.Rename(s.path("keys/away"), s.path("keys/journal")))
	s.ok(os.Link(foreign, s.path("keys/journal/main.9.journal")))
	// Links in folders of the other users lead nowhere else.
	s.write("precious", "Precious: yes\n") // in the form of a file of headers, for all who read the configuration
	s.ok(os.Chown(s.path("precious"), int(u.keys.Uid), int(u.keys.Gid)))
	s.ok(os.Symlink(s.path("precious"), s.path("state/ledger.db.replaced-link")))
	s.ok(os.Symlink(s.path("precious"), s.path("keys/password")))
	s.ok(os.Lchown(s.path("keys/password"), int(u.keys.Uid), int(u.keys.Gid)))
	s.edit("countersign.toml", "\n[tokens.main]", "\n[traces]\nendpoint = \"http://127.0.0.1:1/v1/traces\"\n"+
		"headers_file = \"keys/password\"\n\n[tokens.main]")
	if out := s.reset(); !strings.Contains(out, "another name, which keeps the content") ||
		string(must(os.ReadFile(foreign))(t)) != "foreign" {
		t.Errorf("a file with a name elsewhere: %s", out)
	}
	left := must(filepath.Glob(s.path("state/*")))(t)
	left = append(left, must(filepath.Glob(s.path("keys/journal/*")))(t)...)
	left = append(left, must(filepath.Glob(s.path("keys/p*")))(t)...)
	if left = append(left, s.appliancesFiles()...); len(left) > 0 {
		t.Errorf("there are %v", left)
	}
	if string(s.read("precious")) != "Precious: yes\n" {
		t.Error("a file behind a link was overwritten")
	}
}

// markerOf is a marker of this user, as a reset has written it that was cut off.
func (s *system) markerOf(name string, phases ...string) map[string]any {
	return map[string]any{"format": 1, "begun": "2026-01-01T00:00:00Z", "appliance": name, "typed": true,
		"extent": map[string]any{"free_space": false}, "record": s.record(), "folders": []string{s.dir}, "done": phases,
		"at": []string{s.path("countersign.toml"), s.path("ledger.db")}}
}

// TestFactoryResetOfAnother refuses a marker that is of the reset of another appliance, and a stub
// that is of another configuration. Nothing is destroyed.
func TestFactoryResetOfAnother(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	key := strings.Split(s.must("admin", "audit", "key"), "/")
	name := key[0] + "/" + key[1]
	p.stop()
	before := s.labels()
	marker := s.path("factory-reset.json")
	all := []string{"keys", "counter", "storage roots"}
	unapproved, elsewhere := s.markerOf(name), s.markerOf(name)
	unapproved["typed"] = false
	elsewhere["at"] = []string{s.path("countersign.toml"), s.path("other.db")}
	const other = "countersign/0011223344556677"
	for what, c := range map[string]struct {
		marker map[string]any
		says   string
	}{
		"another appliance":               {s.markerOf(other), "appliance is " + other},
		"another appliance, without keys": {s.markerOf(other, all...), "appliance is"},
		"another ledger of the folder":    {elsewhere, "configuration and ledger are"},
		"no approvals":                    {unapproved, "approvals are none here"},
	} {
		s.ok(os.WriteFile(marker, must(json.Marshal(c.marker))(t), 0o600))
		if out, code := s.daemon("factory-reset"); code == 0 || !strings.Contains(out, c.says) {
			t.Errorf("%s: %d\n%s", what, code, out)
		}
	}
	s.ok(os.Remove(marker))
	if !slices.Equal(s.labels(), before) || !exists(s.path("ledger.db")) {
		t.Fatal("a marker of another reset has destroyed something")
	}

	config := s.read("countersign.toml")
	s.write("countersign.toml.factory-reset", string(must(json.Marshal(map[string]any{
		"marker": marker, "record": s.record(), "appliance": name,
		"files": []map[string]string{{"path": s.path("countersign.toml"), "sha256": "00", "what": "the configuration"},
			{"path": marker, "sha256": "00", "what": "the marker"}},
	}))(t)))
	if out, code := s.daemon("check"); code != 2 || !strings.Contains(out, "run countersignd factory-reset again") {
		t.Errorf("check beside a stub: %d\n%s", code, out)
	}
	out, code := s.daemon("factory-reset")
	if code != 0 || !strings.Contains(out, "another file than the reset's") ||
		!slices.Equal(s.read("countersign.toml"), config) || exists(s.path("countersign.toml.factory-reset")) {
		t.Errorf("a stub of another configuration: %d\n%s", code, out)
	}
	s.serve().stop()
}

// TestFactoryResetCredential leaves a PIN alone that is a credential of systemd, and says how a
// command of root gets it.
func TestFactoryResetCredential(t *testing.T) {
	s := newSystem(t)
	s.serve().stop()
	folder := t.TempDir()
	s.ok(os.Rename(s.path("pin"), filepath.Join(folder, "pin")))
	s.edit("countersign.toml", `"pin"`, `"$CREDENTIALS_DIRECTORY/pin"`)
	out, code := s.daemon(s.resetting(filepath.Join(t.TempDir(), "text"))...)
	if code == 0 || !strings.Contains(out, "CREDENTIALS_DIRECTORY names a folder") {
		t.Errorf("without the credential: %d\n%s", code, out)
	}
	t.Setenv("CREDENTIALS_DIRECTORY", folder)
	out = s.reset()
	if kept := filepath.Join(folder, "pin"); !exists(kept) ||
		!strings.Contains(out, "stays        "+kept+" (PIN of the token main)") {
		t.Errorf("the credential is there: %v\n%s", exists(kept), out)
	}
}

// forms are the forms in which a marker is searched for on a disk.
func forms(marker string) [][]byte {
	all := [][]byte{[]byte(marker), []byte(hex.EncodeToString([]byte(marker))), []byte(strings.ToUpper(
		hex.EncodeToString([]byte(marker))))}
	for shift := range 3 { // the inner characters of the three alignments
		text := base64.StdEncoding.EncodeToString(append(make([]byte, shift), marker...))
		all = append(all, []byte(text[4:len(text)-4]))
	}
	return all
}

// TestFactoryResetLeavesNothing writes markers through the product onto a disk, an image with ext4:
// names of an operator, of a peer and of a key, a policy and a configuration with those that they
// have replaced, a PIN, a URL. The whole image is searched for them before a reset, which finds
// each, and afterwards. No free block has then what was there before. The file system is that of
// fuse2fs, and the kernel's with its journal where there are loop devices.
func TestFactoryResetLeavesNothing(t *testing.T) {
	needTool(t, "fuse2fs", "fuse2fs")
	needRoot(t, "a disk image")
	needSoftHSM(t)
	// Of the blocks that are reserved for root, fuse2fs gives root none; it takes a tenth for zero.
	t.Run("fuse2fs", func(t *testing.T) { leavesNothing(t, "0.002", "fuse2fs", "-o", "rw") })
	t.Run("kernel", func(t *testing.T) {
		image := filepath.Join(t.TempDir(), "probe")
		if out, err := exec.Command("sh", "-c", `truncate -s 4M "$0" && mkfs.ext4 -q "$0" && mkdir "$0.at" && `+
			`mount -o loop "$0" "$0.at" && umount "$0.at"`, image).CombinedOutput(); err != nil {
			t.Skipf("no loop device: %v\n%s", err, out)
		}
		leavesNothing(t, "5", "mount", "-o", "loop")
	})
}

// killedInFill kills a reset while it fills the disk. No file of the fill stays. reserve reads the
// number of blocks that the file system keeps for itself, and before is this number.
func (s *system) killedInFill(at string, args ...string) (reserve func() string, before string) {
	s.t.Helper()
	dev := must(os.Stat(at))(s.t).Sys().(*syscall.Stat_t).Dev
	device := must(os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(dev), unix.Minor(dev))))(s.t)
	file := filepath.Join("/sys/fs/ext4", filepath.Base(device), "reserved_clusters")
	reserve = func() string { return strings.TrimSpace(string(must(os.ReadFile(file))(s.t))) }
	before = reserve()
	cmd := exec.Command(filepath.Join(bin, "countersignd"), append(args, "--config", s.path("countersign.toml"))...)
	s.ok(cmd.Start())
	ended := make(chan struct{})
	go func() { cmd.Wait(); close(ended) }()
	for reserve() != "0" {
		select {
		case <-ended:
			s.t.Fatal("the reset has not taken the reserve")
		default:
		}
	}
	cmd.Process.Kill()
	<-ended
	if reserve() != "0" || before == "0" {
		s.t.Fatalf("the reserve is %s, and was %s: the kill was too late", reserve(), before)
	}
	eventually(s.t, "there is room", func() bool {
		var st unix.Statfs_t
		return unix.Statfs(at, &st) == nil && st.Bavail*uint64(st.Bsize) > 20<<20
	})
	return reserve, before
}

// leavesNothing is the test on an image that a program mounts. Some percent of the blocks are
// reserved for root.
func leavesNothing(t *testing.T, reserved, mounter string, options ...string) {
	s := newFolder(t)
	image, at := filepath.Join(t.TempDir(), "image"), filepath.Join(t.TempDir(), "disk")
	mkdir(t, at)
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %v: %v\n%s", name, args, err, out)
		}
	}
	const unwritten, size = "before the file system was made, ", 64 << 20
	s.ok(os.WriteFile(image, bytes.Repeat([]byte(unwritten), size/len(unwritten)+1)[:size], 0o600))
	run("/usr/sbin/mkfs.ext4", "-q", "-F", "-b", "1024", "-m", reserved, "-E", "nodiscard", image)
	mounted := false
	mount := func() {
		t.Helper()
		run(mounter, append([]string{image, at}, options...)...)
		mounted = true
	}
	// The process of fuse2fs writes the rest when the disk is unmounted, and then ends.
	unmount := func() {
		t.Helper()
		run("umount", at)
		mounted = false
		eventually(t, "the image is written", func() bool {
			return exec.Command("/usr/sbin/e2fsck", "-n", "-f", image).Run() == nil
		})
	}
	mount()
	t.Cleanup(func() {
		if mounted {
			exec.Command("umount", "-l", at).Run()
		}
	})
	on := func(name string) string { return filepath.Join(at, name) }

	for _, name := range []string{"tokens", "state", "etc", "secrets"} {
		mkdir(t, on(name))
	}
	write := func(path, content string) { s.ok(durable.Replace(path, []byte(content), 0o600)) }
	write(on("etc/softhsm2.conf"), fmt.Sprintf("directories.tokendir = %s\nlog.level = ERROR\n", on("tokens")))
	s.write("softhsm2.conf", string(must(os.ReadFile(on("etc/softhsm2.conf")))(t)))
	s.write("so-pin", "so-"+userPIN+"\n")
	write(on("secrets/pin"), userPIN+"\n")
	const old, new = "// marker-of-the-old-policy\n", "// marker-of-the-new-policy\n"
	policy := `permit (principal, action == Action::"sign", resource);`
	write(on("etc/policy.cedar"), old+policy)
	configuration := fmt.Sprintf(`
listen = %q
admin_socket = %q
ledger = %q
policy = %q
import_folder = %q
[[webhooks]]
name = "ops"
url = "https://127.0.0.1:1/marker-of-a-webhook"
[tokens.main]
uri = "pkcs11:token=system%%20test"
module = %q
pin_file = %q
environment = { SOFTHSM2_CONF = %q }
`, s.listen, s.path("admin.sock"), on("state/ledger.db"), on("etc/policy.cedar"), s.dir, softHSM, on("secrets/pin"),
		on("etc/softhsm2.conf"))
	write(on("etc/countersign.toml"), configuration)
	s.ok(os.Symlink(on("etc/countersign.toml"), s.path("countersign.toml")))
	if out, code := s.daemon("init", "--new-token", "--so-pin-file", s.path("so-pin")); code != 0 {
		t.Fatalf("init: %d\n%s", code, out)
	}
	p := s.serve()
	s.must("admin", "peer", "add", "marker-of-a-peer", strings.TrimSpace(s.must("keygen", s.path("demo.key"))))
	s.must("admin", "key", "create", "marker-of-a-key")
	marked := s.newOperator("marker-of-an-operator")
	s.proposeAndApprove(approval.ActOperatorAdd, "", approval.Parameter{Name: "name", Value: marked.name},
		approval.Parameter{Name: "roles", Value: "approver"},
		approval.Parameter{Name: "credential", Value: string(must(json.Marshal(marked.credential))(t))})
	seed := "marker of an imported seed 32 b."
	s.write("seed", seed)
	s.must("admin", "key", "import", "imported", s.path("seed"))
	must(s.dial().Sign(t.Context(), "marker-of-a-key", message("AAAA")))(t)
	write(on("etc/policy.cedar"), new+policy)
	s.must("admin", "policy", "reload")
	p.stop()
	// Nothing but free blocks has this. They are more than the reserve of the ledger takes (8 MiB).
	write(on("etc/countersign.toml"), strings.Repeat("# marker-of-the-old-configuration\n", 400_000))
	write(on("etc/countersign.toml"), configuration)

	found := func() (all []string) {
		disk := must(os.ReadFile(image))(t)
		for _, marker := range []string{
			"marker-of-the-old-configuration", "marker-of-the-old-policy", "marker-of-the-new-policy",
			"marker-of-a-webhook", "marker-of-a-peer",
			"marker-of-a-key", "marker-of-an-operator", userPIN, seed,
		} {
			if slices.ContainsFunc(forms(marker), func(form []byte) bool { return bytes.Contains(disk, form) }) {
				all = append(all, marker)
			}
		}
		return all
	}
	unmount()
	if all := found(); len(all) != 8 { // the seed is on no disk but the test's
		t.Fatalf("before the reset, the disk has %q", all)
	}
	mount()
	write(on("state/.factory-reset-fill-0"), "left by a reset that was killed")
	text := filepath.Join(t.TempDir(), "reset.txt")
	args := []string{"factory-reset", "--proposer", "root", "--text", text, "--record", s.record()}
	if out, code := s.daemon(args...); code != 0 || strings.Count(out, "\noverwrites ") != 1 ||
		!strings.Contains(out, "overwrites   the free space of the disk of "+at) {
		t.Fatalf("factory-reset, which must not fill another disk: %d\n%s", code, out)
	}
	args = append(args, "--approval", s.signText(s.root, text))
	reserve, before := func() string { return "" }, ""
	if mounter == "mount" {
		reserve, before = s.killedInFill(at, args...)
		args = []string{"factory-reset"}
	}
	out, code := s.daemon(args...)
	if reserve() != before {
		t.Errorf("the file system keeps %s blocks for itself, and has kept %s", reserve(), before)
	}
	if code != 0 || !strings.Contains(out, "\noverwritten ") {
		t.Fatalf("factory-reset: %d\n%s", code, out)
	}
	for _, e := range must(os.ReadDir(on("state")))(t) {
		if !strings.HasPrefix(e.Name(), ".fuse_hidden") { // libfuse's name of a file that is not released yet
			t.Errorf("the folder of the ledger has %s", e.Name())
		}
	}
	unmount()
	if all := found(); len(all) > 0 {
		t.Errorf("after the reset, the disk has %q", all)
	}
	missed, disk := 0, must(os.ReadFile(image))(t)
	free := must(exec.Command("/usr/sbin/dumpe2fs", image).Output())(t)
	for _, m := range regexp.MustCompile(`(?m)^  Free blocks: (.*)$`).FindAllSubmatch(free, -1) {
		for blocks := range strings.SplitSeq(string(m[1]), ", ") {
			var from, to int
			if n, _ := fmt.Sscanf(blocks, "%d-%d", &from, &to); n == 1 {
				to = from
			}
			for ; from <= to && from > 0; from++ {
				if bytes.Contains(disk[from<<10:(from+1)<<10], []byte(unwritten)) {
					missed++
				}
			}
		}
	}
	if missed > 0 {
		t.Errorf("%d free blocks were never written", missed)
	}
}

// TestPowerCutDuringFactoryReset cuts the power after each disk operation of a reset. The disk then
// has all of the appliance, or a marker by which the reset goes on, or nothing of the appliance.
func TestPowerCutDuringFactoryReset(t *testing.T) {
	s := newSystem(t)
	s.serve().stop()
	disk := disktest.New(t)
	for name, content := range map[string]string{
		"ledger.db": string(s.read("ledger.db")), "policy.cedar": string(s.read("policy.cedar")),
		"countersign.toml": strings.ReplaceAll(string(s.read("countersign.toml")), `"pin"`, `"`+s.path("pin")+`"`),
	} {
		s.ok(durable.Replace(filepath.Join(disk.Dir(), name), []byte(content), 0o600))
		s.ok(os.Remove(s.path(name)))
	}
	on := &system{t: t, dir: disk.Dir(), root: s.root}
	text := filepath.Join(t.TempDir(), "reset.txt")
	record := filepath.Join(t.TempDir(), "record")
	args := []string{"factory-reset", "--proposer", "root", "--text", text, "--record", record, "--free-space=false"}
	if out, code := on.daemon(args...); code != 0 {
		t.Fatalf("%d\n%s", code, out)
	}
	begun := disk.Mark()
	if out, code := on.daemon(append(args, "--approval", s.signText(s.root, text))...); code != 0 {
		t.Fatalf("%d\n%s", code, out)
	}
	done := disk.Mark()
	disk.Unmount()
	var mu sync.Mutex
	seen := map[string]int{}
	judge := func(dir string, at int) error {
		if at < begun {
			return nil
		}
		valid := func(name string) bool {
			b, err := os.ReadFile(filepath.Join(dir, name))
			return err == nil && json.Valid(b)
		}
		left := 0
		for _, name := range []string{"ledger.db", "policy.cedar", "countersign.toml"} {
			if b, err := os.ReadFile(filepath.Join(dir, name)); err == nil && len(bytes.Trim(b, "\x00")) > 0 {
				left++
			}
		}
		kind := "in between"
		switch {
		case valid("factory-reset.json"), valid("countersign.toml.factory-reset"):
			kind = "goes on"
		case left == 3:
			kind = "before"
		case left == 0:
			kind = "nothing"
		}
		mu.Lock()
		seen[kind]++
		mu.Unlock()
		if kind == "in between" || at >= done && kind != "nothing" {
			return fmt.Errorf("the disk has %s: %d files of 3", kind, left)
		}
		return nil
	}
	result := disktest.Explore(t, disk.Record(), disktest.Options{Total: 600}, judge)
	t.Logf("%d cuts, %d disks: %v", result.Cuts, result.States, seen)
	if seen["before"] == 0 || seen["goes on"] == 0 || seen["nothing"] == 0 {
		t.Errorf("not all kinds of disks were seen: %v", seen)
	}
}
