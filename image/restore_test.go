package image_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"countersign/image"
)

// newDrive makes a drive with the file system that the console looks for.
func newDrive(t *testing.T) string {
	path := filepath.Join(t.TempDir(), "drive")
	must(0, os.WriteFile(path, nil, 0o600))(t)
	must(0, os.Truncate(path, 64<<20))(t)
	output(t, "mformat", "-i", path, "-F", "-v", "COUNTERSIGN", "::")
	return path
}

// give copies files to a drive, and take one from there.
func give(t *testing.T, drive string, files ...string) {
	t.Helper()
	output(t, "mcopy", append(append([]string{"-o", "-i", drive}, files...), "::/")...)
}

func take(t *testing.T, drive, name string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), name)
	output(t, "mcopy", "-n", "-i", drive, "::/"+name, to)
	return to
}

// command types a command at the menu, and waits for a text behind it.
func (v *vm) command(line, want string) {
	v.t.Helper()
	from := len(v.log.String())
	v.typeLine(line)
	v.eventually(bootTime, line+": the console shows "+want, func() bool {
		text := v.log.String()[from:]
		ended := strings.HasSuffix(text, "countersignd: ") // the prompt
		return ended && strings.Contains(strings.Join(strings.Fields(text), " "), want)
	})
}

// withBackups has an appliance make backups for the recipient recovery.
func (v *vm) withBackups(ann *operator) {
	v.t.Helper()
	v.configure(ann, fmt.Sprintf("\n[backup]\nfolder = \"/var/lib/countersign/backups\"\nrecipients = [%q]\n",
		v.maker.public(v.t, "recovery")))
}

// configure appends to the configuration, and waits until the daemon has come up with it.
func (v *vm) configure(ann *operator, more string) {
	v.t.Helper()
	next := filepath.Join(v.t.TempDir(), "next.toml")
	must(0, os.WriteFile(next, []byte(ann.tool("admin", "machine", "configuration")+more), 0o600))(v.t)
	ann.tool("admin", "machine", "configure", next)
	v.configured(ann)
}

// configured waits until no change of the configuration is under way.
func (v *vm) configured(ann *operator) {
	v.t.Helper()
	v.eventually(2*bootTime, "the configuration is settled", func() bool {
		out, err := ann.try("admin", "machine", "show")
		return err == nil && strings.Contains(out, "slot") && !strings.Contains(out, "configuration")
	})
}

// holders are the settings of three holders, of whom two bring keys back.
func (m *maker) holders(t testing.TB) string {
	var all []string
	for _, name := range []string{"alice", "carol", "erin"} {
		all = append(all, fmt.Sprintf("%q", name+"="+m.public(t, name)))
	}
	return "holders = [" + strings.Join(all, ", ") + "]\nneeded = 2\n"
}

// TestRestore loses a machine with its TPM, and brings the appliance back on another one: from a
// backup with the approval of its operator, and its keys by the shares of their holders.
func TestRestore(t *testing.T) {
	long(t)
	m := must(theMaker())(t)
	b := m.image(t, nil)
	v := newVM(t, b, m.settings(t)+m.holders(t))
	v.start()
	v.ready()
	ann := v.operator()
	v.withBackups(ann)
	ann.tool("admin", "key", "create", "payments", "--recoverable")
	shop := ann.shopOf("payments")
	signs(t, shop, ann)
	key := ann.tool("admin", "key", "show", "payments")
	public := regexp.MustCompile(`public key +([0-9a-f]{64})`).FindStringSubmatch(key)[1]
	log := strings.Fields(ann.tool("admin", "audit", "key"))[0]
	appliance := log[:strings.LastIndex(log[:strings.Index(log, "+")], "/")]
	ann.tool("admin", "backup", "create")
	names := regexp.MustCompile(`countersign-\S+\.backup`).FindAllString(ann.tool("admin", "backup", "list"), -1)
	backup := filepath.Join(t.TempDir(), "newest.backup")
	ann.tool("admin", "backup", "get", names[len(names)-1], backup)
	v.off()

	drive := newDrive(t)
	give(t, drive, backup, m.path("recovery"))
	other := newVM(t, b, "")
	// The restored configuration has the ports of the lost machine.
	other.peers, other.https, other.drive = v.peers, v.https, drive
	other.put("countersign.toml", fmt.Appendf(nil, "listen = %d\nhttps = %d\n%s", v.peers, v.https, m.settings(t)))
	other.start()
	other.ready()
	other.see("appliance countersign/")
	fresh := regexp.MustCompile(`appliance +(countersign/[0-9a-f]+)`).FindStringSubmatch(other.log.String())[1]
	other.typeLine("b")
	other.see("Type " + fresh + " to destroy it")
	other.typeLine(fresh)
	other.see("WAITING this machine has no appliance")
	other.typeLine("c")
	other.see("An empty line ends")
	const how = " --identity recovery --proposer ann --text restore.txt"
	restore := "restore newest.backup --appliance " + appliance + how
	other.command("restore newest.backup --appliance countersign/0011223344556677"+how,
		"name the appliance by the log's key")
	other.command("countersignd "+restore, "make an empty one in its place")
	other.command("init --token main --new-token", "the token main is ready")
	other.command(restore, "1 of them must")
	text := take(t, drive, "restore.txt")
	output(t, "ssh-keygen", "-q", "-Y", "sign", "-n", "countersign-proposal-v1", "-f", m.path("ann"), text)
	give(t, drive, text+".sig")
	other.command(restore+" --approval restore.txt.sig", "approved by ann")
	other.typeLine("return-keys")
	other.eventually(time.Minute, "the drive has the request", func() bool {
		return strings.Contains(other.log.String(), "it has return.request")
	})
	request := take(t, drive, "return.request")
	code := regexp.MustCompile(`code +(\S.*): read it out`).FindStringSubmatch(other.log.String())[1]
	for _, holder := range []string{"alice", "carol"} {
		answer := filepath.Join(t.TempDir(), holder+".answer")
		output(t, m.path("bin/countersign"), "holder", "give", request, "--identity", m.path(holder), "--code", code,
			"--answer", answer)
		give(t, drive, answer)
	}
	other.eventually(bootTime, "the keys have returned, and the prompt is there", func() bool {
		text := other.log.String()
		return strings.Contains(text, "start the daemon") && strings.HasSuffix(text, "countersignd: ")
	})
	other.typeLine("")
	other.ready()
	ann = other.operator()
	if key := ann.tool("admin", "key", "show", "payments"); !strings.Contains(key, public) {
		t.Errorf("another key: %s, want %s", key, public)
	}
	other.eventually(2*time.Minute, "documents of after the restore are signed", func() bool {
		args := []string{"sign", "--json", "--context", "test", "image_test.go"}
		_, err := ann.try(append(args, shop...)...)
		return err == nil
	})
	other.off()
	other.start()
	other.ready()
}

// TestConfigure changes the configuration of an appliance under approval. One that the
// daemon can't come up with is refused, or taken back.
func TestConfigure(t *testing.T) {
	long(t)
	v := install(t)
	v.vm.start()
	v.ready()
	ann := v.operator()
	now := ann.tool("admin", "machine", "configuration")
	next := filepath.Join(t.TempDir(), "next.toml")
	for text, want := range map[string]string{
		now + "bogus = 1\n":        "unknown field",
		now:                        "is in force already",
		strings.Repeat("#", 1<<17): "a file here has 1 to 65536 bytes",
		strings.Replace(now, fmt.Sprint(v.peers), "1", 1):       "listen belongs to the machine",
		strings.Replace(now, "pcrs = [7]", "pcrs = [7, 14]", 1): "tokens belongs to the machine",
	} {
		must(0, os.WriteFile(next, []byte(text), 0o600))(t)
		if out, err := ann.try("admin", "machine", "configure", next); err == nil || !strings.Contains(out, want) {
			t.Errorf("%v %s, want %q", err, out, want)
		}
	}

	password := filepath.Join(t.TempDir(), "password")
	must(0, os.WriteFile(password, []byte("not-a-real-one\n"), 0o600))(t)
	kept := regexp.MustCompile(`/etc/countersign/files/(mail\.[0-9a-f]{16}), 15 bytes, not used`)
	path := kept.FindStringSubmatch(ann.tool("admin", "machine", "file", "put", "mail", password))
	other := kept.FindStringSubmatch(ann.tool("admin", "machine", "file", "put", "mail", password))
	if path == nil || other == nil || path[1] == other[1] {
		t.Fatalf("the files are %v and %v", path, other)
	}
	ann.tool("admin", "machine", "file", "remove", other[1])
	if out, err := ann.try("admin", "machine", "file", "put", "Mail", password); err == nil ||
		!strings.Contains(out, "a file's name has 1 to 40 small letters") {
		t.Error(err, out)
	}
	for _, args := range [][]string{{"put", "a.b", password}, {"remove", other[1]}} {
		if out, err := ann.try(append([]string{"admin", "machine", "file"}, args...)...); err == nil {
			t.Errorf("%v: %s", args, out)
		}
	}
	v.withBackups(ann)
	v.configure(ann, "\n[mail]\nserver = \"192.0.2.1:465\"\nfrom = \"a@example.com\"\nto = [\"b@example.com\"]\n"+
		"user = \"a\"\npassword_file = \"/etc/countersign/files/"+path[1]+"\"\n")
	out := ann.tool("admin", "machine", "show")
	if !strings.Contains(out, path[1]+", 15 bytes\n") {
		t.Error(out)
	}
	if out, err := ann.try("admin", "machine", "file", "remove", path[1]); err == nil ||
		!strings.Contains(out, "the configuration names the file") {
		t.Error(err, out)
	}
	ann.tool("admin", "backup", "create")
	if events := ann.events("MachineConfigured"); strings.Count(events, "MachineConfigured") != 2 {
		t.Error(events)
	}
	signs(t, v.shop, ann)

	// A password that others can read: the text is right, and the daemon does not come up.
	good := ann.tool("admin", "machine", "configuration")
	bad := strings.Replace(good, "/etc/countersign/files/"+path[1], "/etc/passwd", 1)
	must(0, os.WriteFile(next, []byte(bad), 0o600))(t)
	ann.tool("admin", "machine", "configure", next)
	v.configured(ann)
	if events := ann.events("MachineConfigurationFailed"); !strings.Contains(events, "MachineConfigurationFailed") ||
		!strings.Contains(ann.tool("--json", "admin", "audit", "list", "--type", "MachineConfigurationFailed"),
			"/etc/passwd") {
		t.Error(events)
	}
	if now := ann.tool("admin", "machine", "configuration"); now != good {
		t.Errorf("after a failure: %s", now)
	}
	signs(t, v.shop, ann)
	v.kill() // the power goes, and the configuration stays
	v.vm.start()
	v.ready()
	ann = v.operator()
	if now := ann.tool("admin", "machine", "configuration"); now != good {
		t.Errorf("after a power cut: %s", now)
	}
	v.off()
}

// TestHSM boots an image with the module of a vendor, which is SoftHSM in another place. The PIN is
// typed at the menu, the token is made by a command with a drive, and the appliance signs.
func TestHSM(t *testing.T) {
	long(t)
	m := must(theMaker())(t)
	dir := t.TempDir()
	conf := filepath.Join(dir, "vendor.conf")
	must(0, os.WriteFile(conf, []byte("directories.tokendir = /var/lib/countersign-keys\nobjectstore.backend = file\n"),
		0o600))(t)
	module := filepath.Join(dir, "libvendor.so")
	output(t, "cp", "/usr/lib/softhsm/libsofthsm2.so", module)
	b := m.image(t, func(o *image.Options) { o.Modules = []string{module, conf} })
	const folder = "/usr/lib/countersign-modules/"
	v := newVM(t, b, "hsm = [\"10.0.2.9:1792\"]\n"+m.settings(t)+fmt.Sprintf(
		"token = \"pkcs11\"\nmodule = %q\nuri = \"pkcs11:token=vendor\"\n[setup.environment]\nSOFTHSM2_CONF = %q\n",
		folder+"libvendor.so", folder+"vendor.conf"))
	v.drive = newDrive(t)
	soPIN := filepath.Join(dir, "so-pin")
	must(0, os.WriteFile(soPIN, []byte("12345678\n"), 0o600))(t)
	give(t, v.drive, soPIN)
	v.start()
	v.see("the PIN of the HSM's user is missing")
	for i, pin := range []string{"1357", "87654321"} { // the first one is a mistake
		v.typeLine("h")
		v.eventually(bootTime, "the PIN is asked for", func() bool {
			return strings.Count(v.log.String(), "which is not shown") == i+1
		})
		v.typeLine(pin)
		v.see("no token matches")
	}
	v.typeLine("c")
	v.see("An empty line ends")
	v.command("init --token main --new-token --so-pin-file so-pin", "the token main is ready")
	v.typeLine("")
	v.ready()
	if strings.Contains(v.log.String(), "87654321") || strings.Contains(v.log.String(), "1357") {
		t.Error("the console has shown the PIN")
	}
	ann := v.operator()
	signs(t, ann.shop(), ann)
	if key := ann.tool("admin", "key", "show", "payments"); !strings.Contains(key, "hsm-resident") {
		t.Error(key)
	}
	v.off()
	v.start()
	v.ready()
	v.off()
}
