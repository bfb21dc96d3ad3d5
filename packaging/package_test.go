// Package packaging_test tests the Debian packages: content, build, and installation, set-up,
// upgrade and removal on a fresh machine with systemd.
package packaging_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign/client"
	"countersign/internal/cli"
	"countersign/noise"
)

// all has the packages of this tree, and next the daemon's of a later version, each made once.
var (
	all  = sync.OnceValues(func() (string, error) { return makePackages("..") })
	next = sync.OnceValues(func() (string, error) { return makePackages("..", "ONLY=daemon", "VERSION="+nextVersion) })
)

const nextVersion = cli.Release + "+test1"

// makePackages runs make package in a tree, with some variables.
func makePackages(tree string, env ...string) (folder string, err error) {
	folder, err = os.MkdirTemp("", "countersign-packages")
	if err != nil {
		return "", err
	}
	folders = append(folders, folder)
	cmd := exec.Command("make", "--silent", "package")
	cmd.Dir = tree
	cmd.Env = append(append(os.Environ(), "DIST="+folder), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("make package: %w\n%s", err, out)
	}
	return folder, nil
}

// folders are the results of makePackages.
var folders []string

func TestMain(m *testing.M) {
	code := m.Run()
	for _, folder := range folders {
		os.RemoveAll(folder)
	}
	os.Exit(code)
}

// deb is the path of the daemon's package.
func deb(folder, version string) string {
	return filepath.Join(folder, "countersign_"+version+"_amd64.deb")
}

// document is a document by number.
func document(n int) client.Document {
	return client.Document{Type: "message-v1", Payload: json.RawMessage(
		fmt.Sprintf(`{"context":"test","message":"AAA%c"}`, "AEIMQUYcgkosw048"[n%16])),
	}
}

// TestLintian: Debian's own check has no error and no warning.
func TestLintian(t *testing.T) {
	need(t, "lintian")
	for _, path := range must(filepath.Glob(must(all())(t) + "/*.deb"))(t) {
		cmd := exec.Command("lintian", "--allow-root", "--fail-on=error,warning", path)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", filepath.Base(path), err, out)
		}
	}
}

// TestSame builds the daemon's package again, from a clone in another folder, by another user with
// another umask, locale, time zone and home, and without a cache of builds. The bytes are the same.
func TestSame(t *testing.T) {
	need(t, "git", "setpriv")
	folder := must(os.MkdirTemp("", "elsewhere"))(t)
	t.Cleanup(func() { os.RemoveAll(folder) })
	tree := filepath.Join(folder, "a b", "tree")
	output(t, nil, "git", "clone", "-q", "--no-local", "..", tree)
	// Also changes without a commit.
	const copyChanged = `cd .. && git ls-files -moz --exclude-standard | xargs -0r cp -P --parents -t "$0"`
	output(t, nil, "sh", "-c", copyChanged, tree)
	output(t, nil, "cp", "-r", "../admin/console/node_modules", filepath.Join(tree, "admin/console"))
	for _, name := range []string{"dist", "home"} {
		must(0, os.Mkdir(filepath.Join(folder, name), 0o755))(t)
	}
	output(t, nil, "chown", "-R", "nobody", folder)
	// Another user can't read root's cache of modules, but links to the files. Their owner stays.
	modules := filepath.Join(strings.TrimSpace(output(t, nil, "go", "env", "GOMODCACHE")), "cache", "download")
	output(t, nil, "cp", "-rl", modules, filepath.Join(folder, "modules"))
	must(0, os.Chmod(folder, 0o755))(t)

	home := filepath.Join(folder, "home")
	build := exec.Command("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups",
		"sh", "-c", "umask 077; exec make --silent package")
	build.Dir = tree
	build.Env = []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + home, "TMPDIR=" + home, "LC_ALL=C.UTF-8", "TZ=Asia/Kathmandu",
		"GOPROXY=file://" + filepath.Join(folder, "modules"), "GOSUMDB=off", "GOTOOLCHAIN=local",
		"DIST=" + filepath.Join(folder, "dist"), "ONLY=daemon",
	}
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, name := range []string{filepath.Base(deb("", cli.Release)), "countersign_" + cli.Release + ".cdx.json"} {
		first := must(os.ReadFile(filepath.Join(must(all())(t), name)))(t)
		second := must(os.ReadFile(filepath.Join(folder, "dist", name)))(t)
		if !bytes.Equal(first, second) {
			t.Errorf("%s has %d bytes here and %d elsewhere: SHA-256 %x and %x", name, len(first), len(second),
				sha256.Sum256(first), sha256.Sum256(second))
		}
	}
}

// TestInstall installs the package on a fresh machine, sets up an appliance, and signs over Noise.
// Each mistake on the way is refused with advice, and loses nothing. Then come an upgrade under
// load, a downgrade, a removal and a purge.
func TestInstall(t *testing.T) {
	first, second := deb(must(all())(t), cli.Release), deb(must(next())(t), nextVersion)
	m := newMachine(t, 900, false)
	ctx := t.Context()
	listen := address(t)
	setup := []string{"countersignd", "setup", "--token", "softhsm", "--listen", listen, "--https", "none",
		"--operator", "ann", "--ssh-key", "/root/ann.key.pub"}

	begun := time.Now()
	m.must("apt-get", "install", "-y", "--no-install-recommends", m.bring(first))
	installed := time.Since(begun)
	m.must("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "ann", "-f", "/root/ann.key")

	// Mistakes.
	occupant := must(net.Listen("tcp", listen))(t)
	m.refused("address already in use", setup...)
	must(0, occupant.Close())(t)
	m.refused("--token is missing", "countersignd", "setup")
	m.refused("--listen 0.0.0.0:7700: the service lets only this machine in", "countersignd", "setup", "--token",
		"softhsm", "--listen", "0.0.0.0:7700", "--https", "none")
	m.refused(`"10.1.0.0/99" is no network`, append(setup, "--allow", "10.1.0.0/99")...)
	m.refused("admin_https", append(setup, "--https", "192.0.2.1:7780")...)
	m.refused("these flags make no configuration", append(setup, "--https", "127.0.0.1:0", "--name", "a\x1b[2J")...)
	m.refused("--ssh-key: stat /nowhere", append(setup, "--ssh-key", "/nowhere")...)
	m.refused("--needed is for --holder", append(setup, "--needed", "2")...)
	m.refused("leave --config out", append(setup, "--config", "/etc/countersign/other.toml")...)
	m.refused("name the module by its whole path", "countersignd", "setup", "--token", "pkcs11", "--module", "lib.so")
	m.refused("this machine has no TPM there", "countersignd", "setup", "--token", "tpm", "--tpm", "/dev/none")
	if m.has("etc/countersign/countersign.toml") || m.has("var/lib/countersign-keys/pin") {
		t.Fatal("a refused set-up has left files")
	}
	m.write("var/lib/countersign-keys/pin", "0000\n") // root's, and readable to all
	m.refused("chown countersign-keys: /var/lib/countersign-keys/pin", setup...)
	m.must("rm", "/var/lib/countersign-keys/pin")
	m.must("sh", "-c", "mkdir /var/lib/countersign-keys/tokens && chmod 0700 /var/lib/countersign-keys/tokens")
	m.refused("type countersignd setup again", setup...) // the tokens' folder is root's
	if !m.has("etc/countersign/countersign.toml") || m.has("var/lib/countersign/ledger.db") {
		t.Error("the set-up did not end at its init")
	}
	pin := m.read("var/lib/countersign-keys/pin")
	m.must("chown", "countersign-keys:", "/var/lib/countersign-keys/tokens")
	m.refused("is there already", setup...) // with flags for a configuration that is there

	// The set-up goes on, and again changes nothing.
	again := time.Now()
	out := m.must("countersignd", "setup", "--operator", "ann", "--ssh-key", "/root/ann.key.pub")
	for _, want := range []string{"kept     the configuration", "created the ledger", "serves   ", "SHA256:"} {
		if !strings.Contains(out, want) {
			t.Errorf("the set-up does not say %q:\n%s", want, out)
		}
	}
	took := installed + time.Since(again)
	if m.read("var/lib/countersign-keys/pin") != pin {
		t.Error("the PIN was made anew")
	}
	out = m.must("countersignd", "setup", "--operator", "eve", "--ssh-key", "/root/ann.key.pub")
	if strings.Count(out, "kept ") != 3 || strings.Contains(out, "created") {
		t.Errorf("a second set-up says:\n%s", out)
	}
	m.unitsAreWhole()

	// A peer signs.
	peer := must(noise.NewIdentity())(t)
	m.write("root/policy.cedar", `permit (principal == Peer::"shop", action, resource == Key::"payments");`+"\n")
	m.script(fmt.Sprintf(`countersign admin peer add shop %x
countersign admin key create payments
cp /root/policy.cedar /etc/countersign/policy.cedar
countersign admin policy reload`, peer.Public()))
	key := must(client.ParseKey(strings.TrimSpace(m.script("countersign admin noise-key"))))(t)
	dial := func(retry time.Duration) *client.Client {
		c := must(client.New(client.Config{Address: listen, ServerKey: key, Identity: peer, RetryFor: retry}))(t)
		t.Cleanup(func() { c.Close() })
		return c
	}
	begun = time.Now()
	signed := must(dial(0).Sign(ctx, "payments", document(0)))(t)
	took += time.Since(begun)
	t.Logf("from apt-get install to the first signature: %v, of which apt-get %v", took, installed)

	// A full disk during an upgrade.
	path := m.bring(second)
	empty := m.fill()
	m.refused("No space left on device", "dpkg", "-i", path)
	must(dial(0).Ping(ctx))(t)
	empty()
	if got := m.must("countersignd", "version"); !strings.HasPrefix(got, "countersignd "+cli.Release+" (") {
		t.Errorf("after an upgrade that failed: %s", got)
	}

	// An upgrade under load, over a unit that was edited by hand.
	unit := "lib/systemd/system/countersignd.service"
	m.write(unit, strings.Replace(m.read(unit), "Nice=0", "", 1)+"\n# by hand\n")
	load := startLoad(t, dial(time.Minute))
	out = m.must("dpkg", "-i", path)
	answers, longest, errs := load()
	t.Logf("an upgrade under load: %d signatures, the longest wait of a client %v", answers, longest)
	if answers == 0 || len(errs) > 0 {
		t.Errorf("%d answers, errors %v", answers, errs)
	}
	kept := "var/backups/countersign/countersignd.service." + cli.Release
	if !strings.Contains(out, "was edited by hand") || !m.has(kept) || !strings.Contains(m.read(kept), "# by hand") {
		t.Errorf("the edited unit is not kept:\n%s", out)
	}
	if got := m.must("countersignd", "version"); !strings.HasPrefix(got, "countersignd "+nextVersion+" (") {
		t.Errorf("after the upgrade: %s", got)
	}
	if got := m.must("sh", "-c", "readlink /proc/$(systemctl show --value --property=MainPID countersignd)/exe"); got !=
		"/usr/bin/countersignd\n" {
		t.Errorf("the daemon that runs is another: %s", got)
	}
	m.unitsAreWhole()
	if _, err := dial(0).Sign(ctx, "payments", document(0)); err != nil {
		t.Error(err)
	}
	if got := must(dial(0).Key(ctx, "payments"))(t); got.PublicKey != signed.PublicKey {
		t.Error("the key is another")
	}

	// The machine starts again, and the daemon with it.
	m.stop()
	m.boot()
	if _, err := dial(time.Minute).Sign(ctx, "payments", document(1)); err != nil {
		t.Error(err)
	}

	// A downgrade.
	m.refused("COUNTERSIGN_DOWNGRADE=yes", "dpkg", "-i", "/root/"+filepath.Base(first))
	if got := m.must("countersignd", "version"); !strings.HasPrefix(got, "countersignd "+nextVersion+" (") {
		t.Errorf("after a refused downgrade: %s", got)
	}
	m.must("sh", "-c", "COUNTERSIGN_DOWNGRADE=yes dpkg -i /root/"+filepath.Base(first))
	must(dial(time.Minute).Sign(ctx, "payments", document(1)))(t)

	// A removal keeps all, and a new installation goes on.
	m.must("apt-get", "remove", "-y", "countersign")
	if _, err := dial(0).Ping(ctx); err == nil || !m.has("var/lib/countersign/ledger.db") {
		t.Errorf("after the removal: %v", err)
	}
	m.must("dpkg", "-i", path)
	m.must("apt-get", "remove", "-y", "countersign")
	m.refused("COUNTERSIGN_DOWNGRADE=yes", "dpkg", "-i", "/root/"+filepath.Base(first))
	m.must("dpkg", "-i", path)
	m.must("countersignd", "setup", "--operator", "ann", "--ssh-key", "/root/ann.key.pub")
	must(dial(0).Sign(ctx, "payments", document(2)))(t)

	// A purge lists the keys and keeps them, unless somebody types delete.
	out = m.must("apt-get", "purge", "-y", "countersign")
	if !strings.Contains(out, "payments/1 ed25519") || !strings.Contains(out, "all of that is kept") ||
		m.read("var/lib/countersign-keys/pin") != pin || !m.has("var/lib/countersign/ledger.db") {
		t.Errorf("a purge says:\n%s", out)
	}
	m.must("dpkg", "-i", path)
	m.must("countersignd", "setup", "--operator", "ann", "--ssh-key", "/root/ann.key.pub")
	if got := must(dial(0).Sign(ctx, "payments", document(3)))(t); got.PublicKey != signed.PublicKey {
		t.Error("after a purge that kept the keys, the key is another")
	}
	for _, answer := range []string{"yes\n", "delete\n"} {
		out, code := m.runIn(strings.NewReader(answer), "script", "-qec", "dpkg --purge countersign", "/dev/null")
		if gone := !m.has("var/lib/countersign-keys"); code != 0 || gone != (answer == "delete\n") {
			t.Errorf("a purge, answered by %q: %d\n%s", answer, code, out)
		}
		m.must("dpkg", "-i", path)
	}
	if m.has("etc/countersign/countersign.toml") || m.has("var/lib/countersign/ledger.db") {
		t.Error("after a purge, files are left")
	}

	// The token of another appliance is left alone.
	m.must(append(setup, "--no-start")...)
	noise := m.must("sh", "-c", "countersignd check </dev/null | grep 'key .*noise/1'")
	m.must("mv", "/var/lib/countersign/ledger.db", "/root/ledger.db")
	m.refused("does the token belong to another appliance", "countersignd", "setup", "--no-start")
	m.must("sh", "-c", "rm -f /var/lib/countersign/ledger.db && mv /root/ledger.db /var/lib/countersign/")
	m.must("countersignd", "setup", "--no-start")
	if got := m.must("sh", "-c", "countersignd check </dev/null | grep 'key .*noise/1'"); got != noise {
		t.Errorf("the Noise key was %s and is %s", noise, got)
	}
}

// TestSetUpTPM sets up an appliance with a TPM, whose PCR 7 nothing was measured into: the set-up
// says so, and goes on when the configuration allows that.
func TestSetUpTPM(t *testing.T) {
	need(t, "swtpm")
	m := newMachine(t, 600, true)
	m.must("apt-get", "install", "-y", "--no-install-recommends", m.bring(deb(must(all())(t), cli.Release)))
	keys := filepath.Join(m.root, "var/lib/countersign-keys")
	tpm := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+t.TempDir(), "--server",
		"type=unixio,path=sock", "--ctrl", "type=unixio,path=ctrl", "--flags", "not-need-init,startup-clear")
	tpm.Dir = keys // a socket path has at most 107 bytes
	must(0, tpm.Start())(t)
	t.Cleanup(func() { tpm.Process.Kill(); tpm.Wait() })
	m.eventually("the TPM listens", func() bool { return m.has("var/lib/countersign-keys/sock") })
	m.must("chown", "countersign-keys:", "/var/lib/countersign-keys/sock")
	m.refused("zero_pcrs", "countersignd", "setup", "--token", "tpm", "--tpm", "/var/lib/countersign-keys/sock",
		"--operator", "ann")
	config := "etc/countersign/countersign.toml"
	m.write(config, m.read(config)+"zero_pcrs = [7]\n")
	out := m.must("countersignd", "setup", "--operator", "ann")
	for _, want := range []string{"kept     the configuration", "link     https://localhost:7780/enrol#", "serves "} {
		if !strings.Contains(out, want) {
			t.Errorf("the set-up does not say %q:\n%s", want, out)
		}
	}
	m.unitsAreWhole()
}

// TestSetUpHSM sets up an appliance with a token that was made before, and a PIN from a file.
func TestSetUpHSM(t *testing.T) {
	m := newMachine(t, 600, true)
	m.must("apt-get", "install", "-y", "--no-install-recommends", m.bring(deb(must(all())(t), cli.Release)))
	m.must("bash", "-euc", `cd /var/lib/countersign-keys
mkdir -m 0700 tokens
echo "directories.tokendir = $PWD/tokens" >/etc/softhsm/softhsm2.conf
chmod -R a+rX /etc/softhsm
softhsm2-util --init-token --free --label prod --pin 0123-test --so-pin 4567-test
chown -R countersign-keys: tokens
echo 0123-test >/root/pin`)
	setup := []string{"countersignd", "setup", "--token", "pkcs11", "--module", "/usr/lib/softhsm/libsofthsm2.so",
		"--uri", "pkcs11:token=prod", "--operator", "ann"}
	m.refused("--pin-file is missing", setup...)
	setup = append(setup, "--pin-file", "/root/pin")
	m.refused("chmod 600", setup...)
	m.must("chmod", "600", "/root/pin")
	if out := m.must(setup...); strings.Contains(out, "0123-test") || strings.Contains(out, "created the token") ||
		!strings.Contains(out, "link     https://") {
		t.Errorf("the set-up says:\n%s", out)
	}
	m.unitsAreWhole()
}

// TestDocuments types the commands of README.md and docs/OPERATIONS.md for a fresh machine, each
// document on a machine without an appliance. The output has what the document says.
func TestDocuments(t *testing.T) {
	m := newMachine(t, 600, true)
	m.bring(deb(must(all())(t), cli.Release))
	block := regexp.MustCompile("(?m)^    # host\n((?:    .+\n)+)(?:\n```text\n((?s:.*?))```\n)?")
	for _, path := range []string{"../README.md", "../docs/OPERATIONS.md"} {
		blocks := block.FindAllStringSubmatch(string(must(os.ReadFile(path))(t)), -1)
		if len(blocks) == 0 {
			t.Errorf("%s has no command for a fresh machine", path)
		}
		for _, b := range blocks {
			out := m.must("sh", "-euxc", "cd /root\n"+b[1])
			for line := range strings.Lines(b[2]) {
				for part := range strings.SplitSeq(strings.TrimSpace(line), "…") {
					if !strings.Contains(out, part) {
						t.Errorf("%s: no %q in the output of\n%s%s", path, part, b[1], out)
					}
				}
			}
		}
		m.must("sh", "-c", "COUNTERSIGN_PURGE=delete dpkg --purge countersign")
	}
}

// unitsAreWhole checks that systemd knows each directive of the units, and that daemon and key
// workers are confined.
func (m *machine) unitsAreWhole() {
	m.t.Helper()
	for _, unit := range []string{"countersignd.service", "countersignd-admin.socket", "countersignd-keys.socket"} {
		if got := m.must("systemctl", "show", "--value", "--property=ActiveState", unit); got != "active\n" {
			m.t.Errorf("%s is %s", unit, got)
		}
	}
	verify := []string{"systemd-analyze", "verify"}
	for _, unit := range []string{"countersignd", "countersignd-keys@1", "countersignd-drill"} {
		verify = append(verify, "/lib/systemd/system/"+unit+".service")
	}
	if out := m.must(verify...); out != "" {
		m.t.Errorf("%v: %s", verify, out)
	}
	journal := m.must("journalctl", "--no-pager", "-u", "countersignd.service", "-u", "countersignd-keys@*")
	if strings.Contains(journal, "not confined") {
		m.t.Errorf("not confined:\n%s", journal)
	}
}

// startLoad signs one document after the other in several goroutines. The result ends the load, and
// returns the number of signatures, the longest wait for one, and the errors.
func startLoad(t testing.TB, c *client.Client) func() (int, time.Duration, []error) {
	var (
		mu      sync.Mutex
		wg      sync.WaitGroup
		ended   bool
		answers int
		longest time.Duration
		errs    []error
	)
	for range 4 {
		wg.Go(func() {
			for n := 0; ; n++ {
				begun := time.Now()
				_, err := c.Sign(t.Context(), "payments", document(n))
				mu.Lock()
				if err != nil {
					errs = append(errs, err)
				} else {
					answers++
				}
				longest = max(longest, time.Since(begun))
				last := ended
				mu.Unlock()
				if last {
					return
				}
			}
		})
	}
	return func() (int, time.Duration, []error) {
		mu.Lock()
		ended = true
		mu.Unlock()
		wg.Wait()
		return answers, longest, errs
	}
}
