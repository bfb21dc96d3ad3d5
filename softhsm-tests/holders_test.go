package softhsmtests

import (
	"bufio"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"countersign/admin/api"
	"countersign/audit"
	"countersign/client"
	"countersign/internal/backup"
	"countersign/internal/escrow"
	"countersign/internal/escrow/escrowtest"
	"countersign/internal/keyring"
	"countersign/internal/ledger"
	"countersign/internal/ledger/disktest"
	"countersign/internal/ledger/ledgertest"
	"countersign/internal/recipient"
	"countersign/internal/scantest"

	"filippo.io/age"
	"github.com/miekg/pkcs11"
	"golang.org/x/crypto/ssh"
)

// holds makes recovery holders, of whom two bring a key back.
func (s *system) holds() {
	s.t.Helper()
	s.holderKeys()
	s.must("admin", "holders", "set", "2", "alice="+s.path("alice.pub"), "bob="+s.path("bob.pub"),
		"carol="+s.path("carol.pub"))
}

// holderKeys makes keys of age for the holders alice and carol, and an SSH key for bob.
func (s *system) holderKeys() {
	s.t.Helper()
	for _, name := range []string{"alice", "carol"} {
		id, err := age.GenerateX25519Identity()
		if err != nil {
			s.t.Fatal(err)
		}
		scantest.Secret("the private key of "+name, []byte(id.String()))
		s.write(name+".key", id.String()+"\n")
		s.write(name+".pub", id.Recipient().String()+"\n")
	}
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		s.t.Fatal(err)
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		s.t.Fatal(err)
	}
	s.write("bob.key", string(pem.EncodeToMemory(block)))
	s.write("bob.pub", string(ssh.MarshalAuthorizedKey(key)))
}

// ceremony is a countersignd that waits for holders.
type ceremony struct {
	s       *system
	cmd     *exec.Cmd
	request string
	answers string
	code    string
	lines   *bufio.Scanner
	out     scantest.Buffer // of both streams
}

// ceremony starts a countersignd, and waits until it waits for the holders.
func (s *system) ceremony(args ...string) *ceremony {
	s.t.Helper()
	folder, err := os.MkdirTemp(s.dir, "ceremony-")
	if err != nil {
		s.t.Fatal(err)
	}
	c := &ceremony{s: s, request: filepath.Join(folder, "the.request"), answers: filepath.Join(folder, "answers")}
	if err := errors.Join(os.Mkdir(c.answers, 0o755), os.Chmod(folder, 0o711)); err != nil { // for the daemon's user
		s.t.Fatal(err)
	}
	args = append(args, "--request", c.request, "--answers", c.answers, "--config", s.path("countersign.toml"))
	line := append(slices.Clone(s.before), append([]string{filepath.Join(bin, "countersignd")}, args...)...)
	c.cmd = exec.CommandContext(s.t.Context(), line[0], line[1:]...)
	c.cmd.Stderr = &c.out
	pipe, err := c.cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	c.lines = bufio.NewScanner(pipe)
	c.until("waiting")
	return c
}

// until reads the lines to one that begins with a word.
func (c *ceremony) until(word string) (line string) {
	c.s.t.Helper()
	for c.lines.Scan() {
		line := c.lines.Text()
		fmt.Fprintln(&c.out, line)
		if code, is := strings.CutPrefix(line, "code"); is {
			c.code, _, _ = strings.Cut(strings.TrimSpace(code), ":")
		}
		if strings.HasPrefix(line, word) {
			return line
		}
	}
	c.s.t.Fatalf("no line %q: %v\n%s", word, c.cmd.Wait(), c.out.String())
	return ""
}

// give has a holder answer.
func (c *ceremony) give(holder string) {
	c.s.t.Helper()
	out := c.s.must("holder", "give", c.request, "--identity", c.s.path(holder+".key"), "--code", c.code,
		"--answer", filepath.Join(c.answers, holder+".answer"))
	if !strings.Contains(out, holder) || !strings.Contains(out, "/1") {
		c.s.t.Errorf("%s gives: %s", holder, out)
	}
}

// end returns the output and the exit status.
func (c *ceremony) end() (string, int) {
	c.s.t.Helper()
	for c.lines.Scan() {
		fmt.Fprintln(&c.out, c.lines.Text())
	}
	err := c.cmd.Wait()
	if _, exited := err.(*exec.ExitError); err != nil && !exited {
		c.s.t.Fatal(err)
	}
	c.s.checkOutput("a ceremony", c.out.String())
	return c.out.String(), c.cmd.ProcessState.ExitCode()
}

// seeds opens the envelopes in a backup by the keys of alice and bob, and has the outputs of the
// tests searched for the seeds.
func (s *system) seeds(file string) (all [][]byte) {
	s.t.Helper()
	read := func(name string) []recipient.Identity {
		ids, err := recipient.ReadIdentities(s.path(name), nil)
		if err != nil {
			s.t.Fatal(err)
		}
		return ids
	}
	f, err := os.Open(file)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	b, err := backup.Extract(f, read("recovery.key"), s.t.TempDir())
	if err != nil {
		s.t.Fatal(err)
	}
	l, err := ledgertest.Open(s.t, b.Files[0], ledger.Options{})
	if err != nil {
		s.t.Fatal(err)
	}
	defer l.Close()
	var recorded []keyring.Recorded
	if err := l.View(func(v ledger.View) (err error) {
		recorded, _, err = keyring.ReadRecorded(v)
		return err
	}); err != nil {
		s.t.Fatal(err)
	}
	for _, k := range recorded {
		if !k.Returns() {
			continue
		}
		e, err := escrow.ParseEnvelope(k.Envelope)
		if err != nil {
			s.t.Fatal(err)
		}
		var lines []string
		for i, name := range []string{"alice.key", "bob.key"} {
			line := escrowtest.Share(s.t, e.Shares[i], read(name)...)
			scantest.Secret("a share of "+k.Ref.String(), []byte(strings.Fields(line)[4]))
			lines = append(lines, line)
		}
		seed, err := escrow.Open(k.Envelope, lines)
		if err != nil {
			s.t.Fatal(err)
		}
		if public := ed25519.NewKeyFromSeed(seed.Expose())[32:]; !slices.Equal(public, k.PublicKey) {
			s.t.Errorf("%v: the envelope has the seed of %x, not of %x", k.Ref, public, k.PublicKey)
		}
		scantest.Secret("the seed of "+k.Ref.String(), seed.Expose())
		all = append(all, seed.Expose())
	}
	return all
}

// TestHoldersReturnKeys makes a recoverable key, has holders bring it back in a drill, destroys the
// folder of its token, and has holders bring it back onto another one. The peer goes on with the
// same key. Neither the daemon nor a key worker has a seed in its memory.
func TestHoldersReturnKeys(t *testing.T) {
	s := newSafe(t)
	s.backedUp()
	p := s.serve()
	s.must("admin", "peer", "add", "demo", strings.TrimSpace(s.must("keygen", s.path("demo.key"))))
	create := []string{"admin", "key", "create", "payments", "--recoverable", "--token", "main"}
	if _, errOut, code := s.cli("", create...); code != 1 || !strings.Contains(errOut, "admin holders set") {
		t.Errorf("without holders: %d %s", code, errOut)
	}
	s.holds()
	if out := s.must(create...); !strings.Contains(out, "hsm-recoverable") ||
		!strings.Contains(out, "has sealed a copy for the recovery holders") {
		t.Errorf("key create: %s", out)
	}
	s.must("admin", "key", "rotate", "payments", "--now")
	signed, err := s.dial().Sign(t.Context(), "payments", message("AAAA"))
	if err != nil || signed.Version != 2 {
		t.Fatalf("%+v, %v", signed, err)
	}
	if out := s.must("admin", "holders", "show"); !strings.Contains(out, "set 1: 2 of 3") ||
		!strings.Contains(out, "never") || !strings.Contains(out, "payments/3") ||
		!strings.Contains(out, "ssh-ed25519 SHA256:") {
		t.Errorf("holders show: %s", out)
	}
	seeds := s.seeds(s.newBackup())
	if len(seeds) != 3 {
		t.Fatalf("%d seeds", len(seeds))
	}
	for _, seed := range seeds {
		for _, pid := range append(descendants(p.cmd.Process.Pid), p.cmd.Process.Pid) {
			for _, text := range []string{string(seed), hex.EncodeToString(seed)} {
				if memoryContains(t, pid, text) {
					t.Errorf("process %d has a seed", pid)
				}
			}
		}
	}

	scratch := t.TempDir()
	drill := []string{"drill", "--holders", "--identity", s.path("recovery.key"), "--scratch", scratch}
	c := s.ceremony(append(drill, "--wait", "1s")...) // nobody comes
	if out, code := c.end(); code != 1 || !strings.Contains(out, "too few holders have answered: 2 holders more") {
		t.Errorf("without holders: %d\n%s", code, out)
	}
	c = s.ceremony(drill...)
	if out := s.must("holder", "show", c.request); !strings.Contains(out, "a drill:") ||
		!strings.Contains(out, "by 2 of alice, bob, carol") {
		t.Errorf("holder show: %s", out)
	}
	_, errOut, code := s.cli("", "holder", "give", c.request, "--identity", s.path("alice.key"), "--code",
		"aaaa-aaaa-aaaa-aaaa")
	if code != 1 || !strings.Contains(errOut, "the code is that of another request") {
		t.Errorf("a wrong code: %d %s", code, errOut)
	}
	if err := os.WriteFile(filepath.Join(c.answers, "x.answer"), []byte("rubbish"), 0o600); err != nil {
		t.Fatal(err)
	}
	c.until("ignored")
	c.give("alice")
	if line := c.until("answer"); !strings.Contains(line, "of alice, for 3 keys; 1 holder more") {
		t.Errorf("%s", line)
	}
	c.give("bob")
	out, code := c.end()
	if code != 0 || !strings.Contains(out, "the holders alice, bob have brought back 3 recoverable keys") {
		t.Fatalf("drill: %d\n%s", code, out)
	}
	if out := s.must("admin", "holders", "show"); strings.Contains(out, "never") {
		t.Errorf("holders show: %s", out)
	}
	var proven []api.Event
	for _, e := range s.events() {
		switch e.Type {
		case audit.DrillFailed:
			t.Errorf("%+v", e)
		case audit.BackupProven:
			proven = append(proven, e)
		}
	}
	if len(proven) != 1 || proven[0].Metadata["holders"] != "alice, bob" {
		t.Errorf("%+v", proven)
	}

	// The HSM burns, and another one takes its place.
	if err := os.RemoveAll(s.path("tokens")); err != nil {
		t.Fatal(err)
	}
	p.stop()
	if err := os.Mkdir(s.path("tokens"), 0o700); err != nil {
		t.Fatal(err)
	}
	if out, code := s.daemon("init", "--token", "main", "--new-token", "--so-pin-file", s.path("so-pin")); code != 0 {
		t.Fatalf("init: %d\n%s", code, out)
	}
	none := []string{"return-keys", "--request", s.path("x"), "--answers", s.dir, "--key", "payments/9"}
	if out, code := s.daemon(none...); code != 2 ||
		!strings.Contains(out, "no recoverable version of this name") {
		t.Errorf("a key that is none: %d\n%s", code, out)
	}
	c = s.ceremony("return-keys")
	late := s.ceremony("return-keys") // by another person
	p = s.serve()                     // for the other keys, while the holders are asked
	if out := s.must("holder", "show", c.request); !strings.Contains(out, "a RECOVERY") {
		t.Errorf("holder show: %s", out)
	}
	c.give("carol")
	c.until("answer")
	c.give("bob")
	c.until("waiting") // for the daemon to end
	p.stop()
	if out, code := c.end(); code != 0 || strings.Count(out, "again") != 3 {
		t.Fatalf("return-keys: %d\n%s", code, out)
	}
	late.give("alice")
	late.give("bob")
	if out, code := late.end(); code != 0 || strings.Count(out, "is on the token main already") != 3 {
		t.Errorf("return-keys once more: %d\n%s", code, out)
	}
	if out, code := s.daemon("return-keys", "--request", s.path("y"), "--answers", s.dir); code != 0 ||
		!strings.Contains(out, "nothing to return") {
		t.Errorf("once more: %d\n%s", code, out)
	}
	if _, err := os.Stat(s.path("y")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a request for nothing: %v", err)
	}
	s.serve()
	if out := s.must("admin", "state"); !strings.Contains(out, "operational") || strings.Contains(out, "key-missing") {
		t.Errorf("state: %s", out)
	}
	again, err := s.dial().Sign(t.Context(), "payments", message("BBBB"))
	if err != nil || again.Version != 2 || again.PublicKey != signed.PublicKey {
		t.Errorf("%+v, %v", again, err)
	}
	s.must("admin", "key", "rotate", "payments", "--now") // to a successor that came back
	returned := 0
	for _, e := range s.events() {
		if e.Type == audit.KeyReturned {
			returned++
			if e.Metadata["holders"] != "bob, carol" || e.Outcome != "" && e.Outcome != "ok" {
				t.Errorf("%+v", e)
			}
		}
	}
	if returned != 3 {
		t.Errorf("%d events KeyReturned", returned)
	}
	var doc struct{ Keys []string }
	err = json.Unmarshal([]byte(s.must("admin", "holders", "show", "--json")), &doc)
	if err != nil || len(doc.Keys) != 4 {
		t.Errorf("%+v, %v", doc, err)
	}
}

// TestReturnKeysByRoot returns keys where the daemon and the key workers have users of their own:
// root types the command, which gives root's rights away before it opens the ledger.
func TestReturnKeysByRoot(t *testing.T) {
	s, u := newTwoUsers(t)
	p := s.serve()
	s.holds()
	s.must("admin", "key", "create", "payments", "--recoverable")
	p.stop()
	tokens := s.path("keys/tokens")
	s.ok(os.RemoveAll(tokens))
	s.ok(os.Mkdir(tokens, 0o700))
	s.ok(os.Chown(tokens, int(u.keys.Uid), int(u.keys.Gid)))
	init := []string{"init", "--token", "main", "--new-token", "--so-pin-file", s.path("keys/so-pin")}
	if out, code := s.daemon(init...); code != 0 {
		t.Fatalf("init: %d\n%s", code, out)
	}
	closed := s.path("closed")
	s.ok(os.Mkdir(closed, 0o700))
	out, code := s.daemon("return-keys", "--request", s.path("x.request"), "--answers", closed)
	if code != 2 || !strings.Contains(out, "must be open to the user of the daemon") {
		t.Errorf("a folder of root's: %d\n%s", code, out)
	}
	c := s.ceremony("return-keys")
	c.give("alice")
	c.give("carol")
	if out, code := c.end(); code != 0 || strings.Count(out, "again") != 2 {
		t.Fatalf("return-keys: %d\n%s", code, out)
	}
	if info, err := os.Stat(s.path("state/ledger.db")); err != nil || info.Sys().(*syscall.Stat_t).Uid != u.daemon.Uid {
		t.Errorf("the ledger is not the daemon's: %v, %v", info, err)
	}
}

// TestReturnKeysCutOff kills return-keys with its key workers, each time some operations of the
// token's disk later. The command can be typed again until the key is there: once, and the daemon
// signs with it. An object that SoftHSM has written by half has no label, and stays.
func TestReturnKeysCutOff(t *testing.T) {
	s := newSoftHSM(t, softHSM)
	disk := disktest.New(t)
	s.ok(os.Remove(s.path("tokens")))
	tokens := filepath.Join(disk.Dir(), "tokens")
	s.write("softhsm2.conf", fmt.Sprintf("directories.tokendir = %s\nlog.level = ERROR\n", tokens))
	mkdir(t, tokens)
	if out, code := s.daemon("init", "--new-token", "--so-pin-file", s.path("so-pin")); code != 0 {
		t.Fatalf("init: %d\n%s", code, out)
	}
	p := s.serve()
	s.must("admin", "peer", "add", "demo", strings.TrimSpace(s.must("keygen", s.path("demo.key"))))
	s.holds()
	s.must("admin", "key", "create", "payments", "--recoverable")
	key := must(s.dial().Key(t.Context(), "payments"))(t)
	p.stop()
	s.removeObjects("countersign/payments/1")

	kills := 0
	for done := false; !done; kills++ {
		c := s.ceremony("return-keys")
		c.give("alice")
		left, pid := 16*kills, c.cmd.Process.Pid
		disk.Fail(func(disktest.Op) syscall.Errno {
			left--
			if left >= 0 {
				return 0
			}
			if left == -1 {
				for _, pid := range append(descendants(pid), pid) {
					syscall.Kill(pid, syscall.SIGKILL)
				}
			}
			return syscall.EIO
		})
		c.give("bob")
		out, code := c.end()
		disk.Fail(nil)
		if done = code == 0; done == (left < 0) || kills > 50 {
			t.Fatalf("after %d kills: %d\n%s", kills, code, out)
		}
	}
	objects := 0
	for _, label := range s.labels() {
		if label == "countersign/payments/1" {
			objects++
		}
	}
	if kills < 8 || objects != 2 {
		t.Errorf("%d objects after %d kills: %q", objects, kills, s.labels())
	}
	s.serve()
	signed := must(s.dial().Sign(t.Context(), "payments", message("AAAA")))(t)
	if signed.PublicKey != key.PublicKey {
		t.Error("the key that has returned is another")
	}
}

// removeObjects removes the objects of a label from the token, as another program does.
func (s *system) removeObjects(label string) {
	s.t.Helper()
	s.useToken(func(m *pkcs11.Ctx, h pkcs11.SessionHandle) {
		s.ok(m.FindObjectsInit(h, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, label)}))
		objects, _, err := m.FindObjects(h, 10)
		m.FindObjectsFinal(h)
		if err != nil || len(objects) == 0 {
			s.t.Fatalf("%s: %d objects, %v", label, len(objects), err)
		}
		for _, o := range objects {
			s.ok(m.DestroyObject(h, o))
		}
	})
}

// TestEverythingBurns loses the machine with its only token. On another machine, with an empty
// token, a backup and two of three holders make the same appliance again: the peer's connection and
// its pinned line go on, and the log continues.
func TestEverythingBurns(t *testing.T) {
	s := newSoftHSM(t, softHSM)
	s.backedUp()
	s.edit("countersign.toml", "lists = false", "lists = true")
	s.edit("countersign.toml", "\n[limits]", fmt.Sprintf("\nadmin_https = %q\n[limits]", loopback()+":7790"))
	s.holderKeys()
	newToken := []string{"init", "--new-token", "--so-pin-file", s.path("so-pin")}
	for args, want := range map[string]string{
		"--holder alice=alice.pub": "1 holders",
		"--needed 2":               "--needed is for --holder",
		"--holder alice=alice.pub --holder bob=alice.pub --needed 2": "twice",
		"--holder alice=nowhere.pub --holder bob=bob.pub --needed 2": "no such file",
		"--holder alice=alice.key --holder bob=bob.pub --needed 2":   "holder alice",
		"--holder alice=alice.pub --needed 2 --token main":           "--token adds a token",
	} {
		line := strings.Fields(args)
		for i, word := range line {
			if name, file, is := strings.Cut(word, "="); is {
				line[i] = name + "=" + s.path(file)
			}
		}
		out, code := s.daemon(append(slices.Clone(newToken), line...)...)
		if code != 2 || !strings.Contains(out, want) {
			t.Errorf("%s: %d\n%s", args, code, out)
		}
	}
	init := append(slices.Clone(newToken), "--needed", "2", "--holder", "alice="+s.path("alice.pub"),
		"--holder", "bob="+s.path("bob.pub"), "--holder", "carol="+s.path("carol.pub"))
	if out, code := s.daemon(init...); code != 0 || !strings.Contains(out, "named the recovery holders: 2 of 3") {
		t.Fatalf("init: %d\n%s", code, out)
	}
	if out, code := s.daemon(init...); code != 0 || !strings.Contains(out, "nothing was changed") {
		t.Errorf("once more: %d\n%s", code, out)
	}
	other := append(slices.Clone(newToken), "--needed", "2", "--holder", "alice="+s.path("alice.pub"),
		"--holder", "bob="+s.path("bob.pub"))
	if out, code := s.daemon(other...); code == 0 || !strings.Contains(out, "countersign admin holders set") {
		t.Errorf("other holders: %d\n%s", code, out)
	}
	p := s.serve()
	s.must("admin", "peer", "add", "demo", strings.TrimSpace(s.must("keygen", s.path("demo.key"))))
	s.must("admin", "key", "create", "payments", "--recoverable")
	if out := s.must("admin", "key", "list"); strings.Count(out, "hsm-recoverable") != 6 {
		t.Errorf("key list: %s", out)
	}
	config := s.clientConfig()
	config.Lines = []client.KeyLine{s.pinnedLine("payments")}
	config.RetryFor = time.Minute
	peer, err := client.Dial(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	backup := s.newBackup()
	signed, err := peer.Sign(t.Context(), "payments", message("AAAA"))
	if err != nil {
		t.Fatal(err)
	}
	s.shipped()
	drill := s.ceremony("drill", "--holders", "--identity", s.path("recovery.key"), "--scratch", t.TempDir())
	drill.give("bob")
	drill.give("carol")
	if out, code := drill.end(); code != 0 || !strings.Contains(out, "have brought back 6 recoverable keys") {
		t.Fatalf("drill: %d\n%s", code, out)
	}
	appliance := strings.Split(s.must("admin", "audit", "key"), "/")[1]
	p.stop()

	n := s.elsewhere()
	for _, name := range []string{"so-pin", "alice.key", "bob.key", "carol.key"} {
		n.write(name, string(s.read(name)))
	}
	if err := os.CopyFS(n.path("backups"), os.DirFS(s.path("backups"))); err != nil {
		t.Fatal(err)
	}
	n.write("softhsm2.conf", fmt.Sprintf("directories.tokendir = %s\nlog.level = ERROR\n", n.path("tokens")))
	if err := os.Mkdir(n.path("tokens"), 0o700); err != nil {
		t.Fatal(err)
	}
	backup = n.path("backups/" + filepath.Base(backup))
	if err := os.RemoveAll(s.path("tokens")); err != nil {
		t.Fatal(err)
	}
	moved := []string{"--map", s.dir + "=" + n.dir}
	asked := append(n.restoring(backup, n.path("first.txt")), moved...)
	if out, code := n.daemon(asked...); code == 0 || !strings.Contains(out, "countersignd init --token") {
		t.Errorf("without a token: %d\n%s", code, out) // the configuration is there now
	}
	out, exit := n.daemon("init", "--token", "main", "--new-token", "--so-pin-file", n.path("so-pin"))
	if exit != 0 {
		t.Fatalf("init: %d\n%s", exit, out)
	}
	out, exit = n.daemon(asked...)
	if exit != 0 || !strings.Contains(out, "noise/1 is NOT on its token: recovery holders can bring it back") {
		t.Errorf("restore: %d\n%s", exit, out)
	}
	n.restore(backup, moved...)
	if out, _ := n.daemon("init"); strings.Contains(out, "in the place of a lost one") {
		t.Errorf("init replaces keys that holders can return: %s", out)
	}
	c := n.ceremony("return-keys")
	c.give("alice")
	c.until("answer")
	c.give("carol")
	if out, code := c.end(); code != 0 || strings.Count(out, "again") != 6 {
		t.Fatalf("return-keys: %d\n%s", code, out)
	}
	n.serve()
	if out := n.must("admin", "state"); !strings.Contains(out, "operational") {
		t.Errorf("state: %s", out)
	}
	again, err := peer.Sign(t.Context(), "payments", signed.Document)
	if err != nil || !slices.Equal(again.Signature, signed.Signature) { // the lists of writes have it
		t.Errorf("the same document again: %+v, %v", again, err)
	}
	eventually(t, "a new signature", func() bool {
		fresh, err := peer.Sign(t.Context(), "payments", message("BBBB"))
		if err != nil && code(err) != "restored" {
			t.Fatal(err)
		}
		return err == nil && fresh.PublicKey == signed.PublicKey
	})
	key := strings.TrimSpace(n.must("admin", "audit", "key"))
	if now := strings.Split(key, "/")[1]; now != appliance {
		t.Errorf("the appliance is %s, and was %s", now, appliance)
	}
	n.must("admin", "audit", "export", n.path("log"))
	n.must("audit", "verify", n.path("log"), "--key", key)
}
