package softhsmtests

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"countersign/admin/api"
	"countersign/audit"
	"countersign/client"
	"countersign/internal/ledger"
	"countersign/internal/ledger/disktest"
	"countersign/internal/scantest"
	"countersign/tpm/tpmtest"

	"filippo.io/age"
	"golang.org/x/sys/unix"
)

// backedUp gives a system a folder for backups and a recipient, whose key is in the file
// recovery.key. Backups are made when a test asks, and no lists of writes follow.
func (s *system) backedUp() {
	s.t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		s.t.Fatal(err)
	}
	scantest.Secret("the identity of a recipient of backups", []byte(id.String()))
	s.write("recovery.key", id.String()+"\n")
	if err := os.MkdirAll(s.path("backups"), 0o700); err != nil {
		s.t.Fatal(err)
	}
	s.edit("countersign.toml", "\n[tokens.main]", fmt.Sprintf(`
[limits]
clock_skew = "1s"
[backup]
folder = "backups"
schedule = "none"
lists = false
recipients = [%q]

[tokens.main]`, id.Recipient()))
}

// newBackup makes a backup, and returns its path.
func (s *system) newBackup() string {
	s.t.Helper()
	key := strings.Split(s.must("admin", "audit", "key"), "/")
	s.write("appliance", key[0]+"/"+key[1])
	for line := range strings.Lines(s.must("admin", "backup", "create")) {
		if name, is := strings.CutPrefix(line, "backup"); is {
			return s.path("backups/" + strings.TrimSpace(name))
		}
	}
	s.t.Fatal("no backup was made")
	return ""
}

func (s *system) read(name string) []byte {
	s.t.Helper()
	b, err := os.ReadFile(s.path(name))
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

// signText has an operator sign the text of a restore with ssh-keygen, and returns the signature's
// file.
func (s *system) signText(who *operator, text string) string {
	s.t.Helper()
	public := s.path(who.name + ".pub")
	if err := os.WriteFile(public, []byte(who.line+"\n"), 0o600); err != nil {
		s.t.Fatal(err)
	}
	b, err := os.ReadFile(text)
	if err != nil {
		s.t.Fatal(err)
	}
	copied := text + "." + who.name
	os.Remove(copied + ".sig") // of an earlier text; ssh-keygen would ask
	if err := os.WriteFile(copied, b, 0o600); err != nil {
		s.t.Fatal(err)
	}
	cmd := exec.Command("ssh-keygen", "-Y", "sign", "-n", "countersign-proposal-v1", "-f", public, copied)
	cmd.Env = append(os.Environ(), "SSH_AUTH_SOCK="+who.socket)
	if out, err := cmd.CombinedOutput(); err != nil {
		s.t.Fatalf("ssh-keygen: %v\n%s", err, out)
	}
	return copied + ".sig"
}

// restoring is the command line of a restore without approvals.
func (s *system) restoring(backup, text string) []string {
	return []string{
		"restore", backup, "--appliance", string(s.read("appliance")), "--identity", s.path("recovery.key"),
		"--proposer", "root", "--text", text,
	}
}

// restore restores a backup, with the approval of the first administrator.
func (s *system) restore(backup string, more ...string) string {
	s.t.Helper()
	text := filepath.Join(s.t.TempDir(), "restore.txt")
	args := append(s.restoring(backup, text), more...)
	asked, code := s.daemon(args...)
	if code != 0 || !strings.Contains(asked, "Nothing of the ledger has been restored yet") {
		s.t.Fatalf("restore: %d\n%s", code, asked)
	}
	out, code := s.daemon(append(args, "--approval", s.signText(s.root, text))...)
	if code != 0 {
		s.t.Fatalf("restore, approved: %d\n%s", code, out)
	}
	return out
}

// elsewhere is the same appliance in another folder, with the PIN and the configuration of SoftHSM,
// which no backup has.
func (s *system) elsewhere() *system {
	s.t.Helper()
	other := &system{t: s.t, dir: s.t.TempDir(), listen: s.listen, root: s.root, rootEnrolled: true}
	other.api = other.client(other.root)
	for _, name := range []string{"pin", "softhsm2.conf", "recovery.key", "demo.key", "appliance"} {
		b, err := os.ReadFile(s.path(name))
		if err != nil {
			s.t.Fatal(err)
		}
		other.write(name, string(b))
	}
	return other
}

// TestRestore loses a disk. The backup restores the appliance into another folder, with the token
// that is left. A request of before the backup is answered as ever, one of after the backup is
// refused, new documents are signed, and the log with its approvals is whole.
func TestRestore(t *testing.T) {
	s := newSystem(t)
	s.backedUp()
	p := s.serve()
	s.enrol()
	known, lost := message("AAAA").Fill(time.Hour), message("BBBB").Fill(time.Hour)
	first, err := s.dial().Sign(t.Context(), "payments", known)
	if err != nil {
		t.Fatal(err)
	}
	backup := s.newBackup()
	config := s.clientConfig()
	config.LogKey, config.LogCheckpoint = s.must("admin", "audit", "key"), s.path("log.checkpoint")
	remembers, err := client.Dial(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer remembers.Close()
	if out := s.must("admin", "backup", "list"); !strings.Contains(out, filepath.Base(backup)) {
		t.Errorf("backup list: %s", out)
	}
	s.must("admin", "backup", "get", filepath.Base(backup), s.path("copy"))
	if whole, err := os.ReadFile(backup); err != nil || string(whole) != string(s.read("copy")) {
		t.Errorf("backup get: another file (%v)", err)
	}
	if _, errOut, code := s.cli("", "admin", "backup", "get", "../countersign.toml", s.path("other")); code == 0 ||
		!strings.Contains(errOut, "not_found") {
		t.Errorf("backup get of something else: %d %s", code, errOut)
	}
	if _, err := remembers.Sign(t.Context(), "payments", lost); err != nil {
		t.Fatal(err)
	}
	p.stop()

	out, code := s.daemon("backup", "verify", backup, "--identity", s.path("recovery.key"))
	if code != 0 || !strings.Contains(out, "ok: ") || !strings.Contains(out, "payments/1 active") ||
		!strings.Contains(out, s.path("pin")+" (PIN of the token main)") {
		t.Errorf("backup verify: %d\n%s", code, out)
	}

	other := s.elsewhere()
	restored := other.restore(backup, "--map", s.dir+"="+other.dir)
	for _, want := range []string{
		other.path("countersign.toml") + " is as in the backup", "payments/1", "are on their tokens",
		"approved by  root", "replaces     none",
	} {
		if !strings.Contains(restored, want) {
			t.Errorf("restore does not say %q:\n%s", want, restored)
		}
	}
	p = other.serve()
	c := other.dial()
	again, err := c.Sign(t.Context(), "payments", known)
	if err != nil || !again.Repeated || string(again.Signature) != string(first.Signature) {
		t.Errorf("what the backup knows: %+v, %v", again, err)
	}
	_, err = c.Sign(t.Context(), "payments", lost)
	refusal := new(client.Error)
	if !errors.Is(err, client.ErrRestored) || !errors.As(err, &refusal) ||
		refusal.TimestampAfter < time.Now().Unix()-60 {
		t.Fatalf("what was admitted after the backup: %v", err)
	}
	eventually(t, "a new document is signed", func() bool {
		_, err := c.Sign(t.Context(), "payments", message("CCCC").Fill(time.Hour))
		if err != nil && !errors.Is(err, client.ErrRestored) {
			t.Fatal(err)
		}
		return err == nil
	})
	gone := new(client.LostEvents)
	_, err = remembers.Sign(t.Context(), "payments", message("DDDD"))
	if !errors.Is(err, client.ErrForkedLog) || !errors.As(err, &gone) || gone.Epoch != 0 || gone.From >= gone.To {
		t.Errorf("a peer that remembers the log of before: %v", err)
	}
	if _, err := c.Sign(t.Context(), "payments", lost); !errors.Is(err, client.ErrRestored) {
		t.Errorf("later, what was admitted after the backup: %v", err)
	}
	other.must("admin", "audit", "export", "log")
	key := strings.TrimSpace(other.must("admin", "audit", "key"))
	other.must("audit", "verify", other.path("log"), "--key", key)
	approvals := other.must("audit", "approvals", other.path("log"), "--key", key)
	if !strings.Contains(approvals, "backup restore") {
		t.Errorf("audit approvals: %s", approvals)
	}
	found := false
	for _, e := range other.events() {
		found = found || string(e.Type) == "BackupRestored" && e.Metadata["replaces"] == "none"
	}
	if !found {
		t.Error("the log does not say that it was restored")
	}
	p.stop()
}

// TestShippedLists kills a daemon whose writes are shipped, and restores the backup of its start
// with the lists: what was signed after the backup is known, and a peer that remembers the log goes
// on. Without the lists, the same is refused.
func TestShippedLists(t *testing.T) {
	s := newSystem(t)
	s.backedUp()
	s.edit("countersign.toml", "lists = false", "lists = true")
	p := s.serve()
	s.enrol()
	s.shipped()
	s.newBackup() // for the name of the appliance; the lists follow it from now on
	config := s.clientConfig()
	config.LogKey, config.LogCheckpoint = s.must("admin", "audit", "key"), s.path("log.checkpoint")
	remembers := must(client.Dial(t.Context(), config))(t)
	defer remembers.Close()
	late := message("AAAA").Fill(time.Hour)
	signed := must(remembers.Sign(t.Context(), "payments", late))(t)
	s.must("admin", "key", "create", "treasury")
	s.must("admin", "audit", "end-epoch")
	later := message("BBBB").Fill(time.Hour)
	must(remembers.Sign(t.Context(), "payments", later))(t)
	s.shipped()
	p.kill()

	backups, err := filepath.Glob(s.path("backups/*.backup"))
	if err != nil || len(backups) != 2 {
		t.Fatalf("%v, %v", backups, err)
	}
	var reaches []string
	for _, b := range backups {
		out, code := s.daemon("backup", "verify", b, "--identity", s.path("recovery.key"))
		_, reach, _ := strings.Cut(out, "\nreaches")
		reach, after, found := strings.Cut(strings.SplitN(reach, "\n", 2)[0], " of writes (")
		if reaches = append(reaches, reach); code != 0 || !found || strings.HasPrefix(after, "0 ") {
			t.Errorf("verify %s: %d\n%s", b, code, out)
		}
	}
	if reaches[0] != reaches[1] {
		t.Errorf("two backups with the same lists reach %q", reaches)
	}
	damaged := s.path("damaged")
	if err := os.CopyFS(damaged, os.DirFS(s.path("backups"))); err != nil {
		t.Fatal(err)
	}
	lists := must(filepath.Glob(filepath.Join(damaged, "*.lists")))(t)
	content := must(os.ReadFile(lists[len(lists)-1]))(t)
	content[len(content)-1] ^= 1
	if err := os.WriteFile(lists[len(lists)-1], content, 0o600); err != nil {
		t.Fatal(err)
	}
	verify := []string{"backup", "verify", backups[1], "--identity", s.path("recovery.key"), "--lists", damaged}
	out, code := s.daemon(verify...)
	_, last, found := strings.Cut(out, "--until-list ")
	last, _, _ = strings.Cut(last, " ")
	if code == 0 || !found || !strings.Contains(out, filepath.Base(lists[len(lists)-1])) {
		t.Errorf("verify with damaged lists: %d\n%s", code, out)
	}
	out, code = s.daemon(append(verify, "--until-list", last)...)
	if code != 0 || !strings.Contains(out, "list "+last+" of writes") {
		t.Errorf("verify until list %s: %d\n%s", last, code, out)
	}
	for name, c := range map[string]struct {
		backup string
		more   []string
		known  bool
	}{
		"the first backup": {backups[0], nil, true},
		"the second":       {backups[1], nil, true},
		"no lists":         {backups[1], []string{"--lists", "none"}, false},
	} {
		other := s.elsewhere()
		restored := other.restore(c.backup, append(c.more, "--map", s.dir+"="+other.dir)...)
		p := other.serve()
		other.write("log.checkpoint", string(s.read("log.checkpoint")))
		config.LogCheckpoint = other.path("log.checkpoint")
		remembering := must(client.Dial(t.Context(), config))(t)
		again, err := remembering.Sign(t.Context(), "payments", late)
		remembering.Close()
		if c.known && (err != nil || !again.Repeated || string(again.Signature) != string(signed.Signature)) {
			t.Errorf("%s: what the lists know: %+v, %v\n%s", name, again, err, restored)
		}
		if !c.known && !errors.Is(err, client.ErrForkedLog) && !errors.Is(err, client.ErrRestored) {
			t.Errorf("%s: %v", name, err)
		}
		if out := other.must("admin", "key", "list"); strings.Contains(out, "treasury") != c.known {
			t.Errorf("%s: keys:\n%s", name, out)
		}
		p.stop()
	}
}

// shipped waits until a restore would lose nothing.
func (s *system) shipped() {
	s.t.Helper()
	eventually(s.t, "all writes are shipped", func() bool {
		behind, ok := s.metrics()["countersign_backup_behind_seconds"]
		return ok && behind == 0
	})
}

// TestLostBackups empties the folder of backups under a daemon, which makes a backup by itself, and
// ships what follows. A folder that is away is a cause of the state until it is back.
func TestLostBackups(t *testing.T) {
	s := newSystem(t)
	s.backedUp()
	s.edit("countersign.toml", "lists = false", "lists = true")
	p := s.serve()
	s.enrol()
	s.shipped()
	before := must(filepath.Glob(s.path("backups/*")))(t)
	if len(before) != 2 { // the backup of the start, and its lists
		t.Fatalf("%v", before)
	}
	for _, path := range before {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	c := s.dial()
	must(c.Sign(t.Context(), "payments", message("AAAA").Fill(time.Hour)))(t)
	var backups []string
	eventually(t, "another backup", func() bool {
		backups = must(filepath.Glob(s.path("backups/*.backup")))(t)
		return len(backups) == 1
	})
	must(c.Sign(t.Context(), "payments", message("BBBB").Fill(time.Hour)))(t)
	s.shipped()
	out, code := s.daemon("backup", "verify", backups[0], "--identity", s.path("recovery.key"))
	if code != 0 || !strings.Contains(out, "of writes (") || strings.Contains(out, "(0 lists") {
		t.Errorf("verify: %d\n%s", code, out)
	}
	for _, move := range [][2]string{{"backups", "away"}, {"away", "backups"}} {
		if err := os.Rename(s.path(move[0]), s.path(move[1])); err != nil {
			t.Fatal(err)
		}
		must(c.Sign(t.Context(), "payments", message("CCCC")))(t)
		eventually(t, "the state with the folder of backups "+move[1], func() bool {
			causes := must(s.admin().Health(t.Context()))(t).Causes
			failing := func(c api.Cause) bool { return c.Code == "backup-failing" }
			return slices.ContainsFunc(causes, failing) == (move[1] == "away")
		})
	}
	s.shipped()
	p.stop()
}

// TestHungBackups: the folder of backups is on a disk that hangs, from the start of the daemon or
// while a backup is copied. Peers are served, and the daemon stops.
func TestHungBackups(t *testing.T) {
	for _, hangs := range []disktest.Kind{disktest.Create, disktest.Sync} {
		s := newSystem(t)
		disk := disktest.New(t)
		s.backedUp()
		s.edit("countersign.toml", "lists = false", "lists = true")
		s.edit("countersign.toml", `"backups"`, `"`+disk.Dir()+`"`)
		hung, released := make(chan struct{}), make(chan struct{})
		release := sync.OnceFunc(func() { close(released) })
		defer release()
		once := sync.OnceFunc(func() { close(hung) })
		disk.Fail(func(op disktest.Op) syscall.Errno {
			if op.Kind == hangs && strings.HasSuffix(op.Path, ".part") {
				once()
				<-released
			}
			return 0
		})
		p := s.serve()
		<-hung
		s.enrol()
		must(s.dial().Sign(t.Context(), "payments", message("AAAA")))(t)
		p.cmd.Process.Signal(syscall.SIGTERM)
		// The kernel ends no process in a call that hangs, so the rest is seen before its end.
		lock := must(os.Open(s.path("ledger.db")))(t)
		eventually(t, "the daemon has stopped, with "+hangs.String()+" hung", func() bool {
			free := unix.Flock(int(lock.Fd()), unix.LOCK_SH|unix.LOCK_NB) == nil
			return free || strings.Contains(p.stderr.String(), "the ledger is not closed")
		})
		lock.Close()
		release()
		p.stop()
		last := s.lastEvents()
		if !slices.Contains(last, "Stopped") {
			t.Errorf("with %v hung, the last events are %v", hangs, last)
		}
	}
}

// lastEvents returns the types of the last ten events, without a daemon.
func (s *system) lastEvents() (types []string) {
	s.t.Helper()
	l := must(ledger.Open(s.path("ledger.db"), ledger.Options{}))(s.t) // without a replica: nothing is written
	defer l.Close()
	if err := l.Events(max(10, l.End())-10, func(_ uint64, event []byte) bool {
		types = append(types, string(must(audit.Decode(event))(s.t).Type))
		return true
	}); err != nil {
		s.t.Fatal(err)
	}
	return types
}

// TestRestoreInPlace sets an appliance with a TPM back to a backup, after the loss of the folder
// with the TPM's keys. The restore puts the keys back, says how many events are lost, and keeps the
// ledger of before. The counter is bound anew under the same approval, so the daemon finds no
// rollback.
func TestRestoreInPlace(t *testing.T) {
	e := tpmtest.New(t)
	s := newTPMSystem(t, e, "")
	s.backedUp()
	p := s.serve()
	s.enrol()
	backup := s.newBackup()
	lost := message("AAAA").Fill(time.Hour)
	if _, err := s.dial().Sign(t.Context(), "payments", lost); err != nil {
		t.Fatal(err)
	}
	text := s.path("restore.txt")
	args := s.restoring(backup, text)
	if out, code := s.daemon(args...); code == 0 || !strings.Contains(out, "another process uses this ledger") {
		t.Errorf("a restore beside the daemon: %d %s", code, out)
	}
	p.stop()
	before := s.copyLedger()
	if err := os.RemoveAll(s.path("keys")); err != nil {
		t.Fatal(err)
	}
	out := s.restore(backup)
	if !strings.Contains(out, "events of the ledger that is replaced") {
		t.Errorf("%s", out)
	}
	kept, err := filepath.Glob(s.path("ledger.db.replaced-*"))
	if err != nil || len(kept) != 1 {
		t.Fatalf("the ledger of before: %v, %v", kept, err)
	}
	if b, err := os.ReadFile(kept[0]); err != nil || string(b) != string(before) {
		t.Errorf("the ledger of before was changed: %v", err)
	}
	p = s.serve()
	if out := s.must("admin", "rollback", "show"); !strings.Contains(out, "no rollback") {
		t.Errorf("rollback show: %s", out)
	}
	if _, err := s.dial().Sign(t.Context(), "payments", lost); !errors.Is(err, client.ErrRestored) {
		t.Errorf("what is lost: %v", err)
	}
	p.stop()
	// The ledger of before is an older copy now: the counter has risen.
	s.restoreLedger(before)
	p = s.serve()
	if out := s.must("admin", "rollback", "show"); !strings.Contains(out, "an older copy") {
		t.Errorf("the ledger of before, put back: %s", out)
	}
	p.stop()
}

// TestRestoreOnAnotherTPM restores an appliance whose TPM is lost. An empty folder for the new TPM
// has the records of the lost one aside, should that one come back, and the restore says that their
// keys are not there. With the right TPM, nothing is put aside.
func TestRestoreOnAnotherTPM(t *testing.T) {
	e := tpmtest.New(t)
	s := newTPMSystem(t, e, "")
	address := loopback() + ":7790"
	s.edit("countersign.toml", "admin_socket", fmt.Sprintf("admin_https = %q\nadmin_socket", address))
	if out, code := s.daemon("init"); code != 0 || !strings.Contains(out, "created the key admin-ca") {
		t.Fatalf("%d %s", code, out)
	}
	s.backedUp()
	p := s.serve()
	s.enrol()
	backup := s.newBackup()
	p.stop()
	aside := func() []string { return must(filepath.Glob(s.path("keys/*.replaced-*")))(t) }
	if out, code := s.daemon("init", "--token", "main", "--new-token"); code != 0 || len(aside()) != 0 {
		t.Errorf("with the right TPM: %d %s %v", code, out, aside())
	}
	files := must(filepath.Glob(s.path("keys/*")))(t)
	if err := os.Remove(s.path("ledger.db")); err != nil {
		t.Fatal(err)
	}
	e.Clear(t)
	out, code := s.daemon(s.restoring(backup, s.path("restore.txt"))...)
	if code == 0 || !strings.Contains(out, "this folder belongs to another TPM") ||
		!strings.Contains(out, "countersignd init --token main --new-token") {
		t.Errorf("%d %s", code, out)
	}
	if out, code := s.daemon("init", "--token", "main", "--new-token"); code != 0 ||
		!strings.Contains(out, "records of another TPM have the names") {
		t.Errorf("%d %s", code, out)
	}
	if len(aside()) != len(files) {
		t.Errorf("aside are %v, before there were %v", aside(), files)
	}
	out = s.restore(backup)
	if !strings.Contains(out, "its folder belongs to another TPM than the backup's") ||
		!strings.Contains(out, "payments/1 is NOT on its token") {
		t.Error(out)
	}
	if left := must(filepath.Glob(s.path("keys/*.json")))(t); len(left) != 1 {
		t.Errorf("the folder has %v", left)
	}
	// Nobody has the keys of HTTPS, so init makes new ones, once.
	out, code = s.daemon("init")
	for _, key := range []string{"admin-ca/2", "admin-tls/2"} {
		if !strings.Contains(out, "created the key "+key+" of the HTTPS listener in the place of a lost one") {
			t.Errorf("%d %s", code, out)
		}
	}
	if out, _ := s.daemon("init"); strings.Contains(out, "in the place of a lost one") {
		t.Error(out)
	}
}

// TestRestoreIsApproved: without the approvals of the backup's own operators, the right text, the
// right recipient and the whole file, nothing is restored, and what is there stays.
func TestRestoreIsApproved(t *testing.T) {
	s := newSystem(t)
	s.backedUp()
	p := s.serve()
	s.enrol()
	backup := s.newBackup()
	p.stop()
	ledger := s.copyLedger()
	text := s.path("restore.txt")
	args := s.restoring(backup, text)
	if out, code := s.daemon(args...); code != 0 {
		t.Fatalf("%d %s", code, out)
	}
	approved := s.signText(s.root, text)
	stranger := s.signText(s.newOperator("stranger"), text)
	with := func(args []string, more ...string) []string { return append(append([]string{}, args...), more...) }
	replaced := func(old, new string) []string {
		all := with(args, "--approval", approved)
		for i, arg := range all {
			if arg == old {
				all[i] = new
			}
		}
		return all
	}
	whole, err := os.ReadFile(backup)
	if err != nil {
		t.Fatal(err)
	}
	s.write("cut.backup", string(whole[:len(whole)-1]))
	other, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	s.write("other.key", other.String()+"\n")
	changed, err := os.ReadFile(text)
	if err != nil {
		t.Fatal(err)
	}
	s.write("changed.txt", strings.Replace(string(changed), "replaces: ", "replaces: 1", 1))
	another := replaced(string(s.read("appliance")), "countersign/0123456789abcdef")
	for name, c := range map[string]struct {
		args []string
		says string
	}{
		"a stranger's signature":  {with(args, "--approval", stranger), "no approver has the key"},
		"the same approver twice": {with(args, "--approval", approved, "--approval", approved), "has approved already"},
		"another text":            {replaced(text, s.path("changed.txt")), "says something else"},
		"no such proposer":        {replaced("root", "nobody"), "the operators are root"},
		"another recipient":       {replaced(s.path("recovery.key"), s.path("other.key")), "other recipients"},
		"a cut file":              {replaced(backup, s.path("cut.backup")), "damaged"},
		"no such file":            {replaced(backup, s.path("none.backup")), "no such file"},
		"no identity":             {[]string{"restore", backup, "--appliance", "x"}, "identity"},
		"no appliance":            {[]string{"restore", backup, "--identity", s.path("recovery.key")}, "appliance"},
		"another appliance":       {another, "this is a backup of"},
		"a text that is there":    {args, "has a text already"},
		"a relative map":          {with(args, "--map", "a=b"), "absolute"},
	} {
		out, code := s.daemon(c.args...)
		if code == 0 || !strings.Contains(out, c.says) {
			t.Errorf("%s: %d, want %q:\n%s", name, code, c.says, tail(out, 600))
		}
		if string(s.copyLedger()) != string(ledger) {
			t.Fatalf("%s: the ledger has changed", name)
		}
	}
	if left, err := filepath.Glob(s.path(".restoring-*")); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	if out, code := s.daemon(with(args, "--approval", approved)...); code != 0 {
		t.Errorf("the right restore: %d %s", code, out)
	}
}

// TestKilledRestore kills a restore at many moments. The place of the ledger has the ledger of
// before or the restored one, whole. A restore afterwards succeeds, and leaves nothing of the
// killed ones.
func TestKilledRestore(t *testing.T) {
	s := newSystem(t)
	s.backedUp()
	p := s.serve()
	s.enrol()
	backup := s.newBackup()
	p.stop()
	before := s.copyLedger()
	text := s.path("restore.txt")
	ask := func() (approved []string) {
		os.Remove(text)
		args := s.restoring(backup, text)
		if out, code := s.daemon(args...); code != 0 {
			t.Fatalf("%d %s", code, out)
		}
		return append(args, "--approval", s.signText(s.root, text))
	}
	approved := ask()
	// A login of SoftHSM writes its files anew, and a kill would leave half of one: each restore
	// has a copy of the tokens.
	copies := 0
	freshTokens := func() {
		copies++
		fresh := s.path(fmt.Sprint("tokens-", copies))
		if err := os.CopyFS(fresh, os.DirFS(s.path("tokens"))); err != nil {
			t.Fatal(err)
		}
		s.write("softhsm2.conf", fmt.Sprintf("directories.tokendir = %s\nlog.level = ERROR\n", fresh))
	}
	killed, done := 0, 0
	for after := time.Duration(0); done < 3 && after < 20*time.Second; after += after/8 + 10*time.Millisecond {
		freshTokens()
		cmd := exec.Command(filepath.Join(bin, "countersignd"), approved...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		kill := time.AfterFunc(after, func() { cmd.Process.Kill() })
		err := cmd.Wait()
		kill.Stop()
		now := s.copyLedger()
		if restored := string(now) != string(before); !restored && err == nil {
			t.Fatal("the restore has succeeded and changed nothing")
		} else if restored {
			done++
			if err := ledger.Check(s.path("ledger.db"), ledger.Options{}, nil); err != nil {
				t.Fatalf("killed after %v: %v", after, err)
			}
			s.restoreLedger(before) // and once more
		} else {
			killed++
		}
	}
	if killed < 3 || done == 0 {
		t.Errorf("%d restores were killed before the ledger had its place, %d had it", killed, done)
	}
	freshTokens()
	approved = ask()
	if out, err := exec.Command(filepath.Join(bin, "countersignd"), approved...).CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	if left, err := filepath.Glob(s.path(".restoring-*")); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	p = s.serve()
	p.stop()
}

// TestBackupOnAFullDisk fills the disk of the backups. No half file has a final name, nothing is
// left, signing goes on, and the state says so until there is room.
func TestBackupOnAFullDisk(t *testing.T) {
	needRoot(t, "a small disk")
	s := newSystem(t)
	s.backedUp()
	if err := unix.Mount("tmpfs", s.path("backups"), "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(s.path("backups"), unix.MNT_DETACH) })
	p := s.serve()
	s.enrol()
	_, errOut, code := s.cli("", "admin", "backup", "create")
	if code == 0 || !strings.Contains(errOut, "no space left") {
		t.Errorf("a backup on a full disk: %d %s", code, errOut)
	}
	if !s.hasCause("backup-failing") {
		t.Error("the state does not say so")
	}
	if entries, err := os.ReadDir(s.path("backups")); err != nil || len(entries) != 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	if _, err := s.dial().Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Error(err)
	}
	if err := unix.Mount("", s.path("backups"), "", unix.MS_REMOUNT, "size=4m"); err != nil {
		t.Fatal(err)
	}
	backup := s.newBackup()
	if s.hasCause("backup-failing") {
		t.Error("the state goes on to say so")
	}
	if out, code := s.daemon("backup", "verify", backup, "--identity", s.path("recovery.key")); code != 0 {
		t.Errorf("%d %s", code, out)
	}
	p.stop()
}
