package image_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign/image"
	"countersign/internal/update"

	"golang.org/x/sys/unix"
)

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// need fails without a program. make test and make test-image install the Debian packages of the
// programs.
func need(t testing.TB, programs ...string) {
	t.Helper()
	for _, program := range programs {
		if _, err := exec.LookPath(program); err != nil {
			missing(t, err.Error())
		}
	}
}

// needRoot fails for another user, who can't make a network namespace and change its root.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "root")
	}
}

// missing fails the test under make test and make test-image, and skips the test otherwise.
func missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("REQUIRE_DEVICES") == "1" {
		t.Fatal("missing: " + what)
	}
	t.Skip("missing: " + what)
}

// public is the public key of the maker with a name, as a line of OpenSSH without a comment.
func (m *maker) public(t testing.TB, name string) string {
	return strings.Join(strings.Fields(string(must(os.ReadFile(m.path(name + ".pub")))(t)))[:2], " ")
}

// output runs a program of this machine.
func output(t testing.TB, program string, args ...string) string {
	t.Helper()
	return outputIn(t, nil, program, args...)
}

func outputIn(t testing.TB, env []string, program string, args ...string) string {
	t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", program, args, err, out)
	}
	return string(out)
}

// maker has what the tests of a process share: keys, programs and images. All are made anew, in a
// folder of the process.
type maker struct {
	dir    string
	images sync.Map // built, by the text of the options
}

// theMaker makes the keys and the programs once.
var theMaker = sync.OnceValues(func() (*maker, error) {
	dir, err := os.MkdirTemp("", "countersign-image-test")
	if err != nil {
		return nil, err
	}
	m := &maker{dir: dir}
	run := func(env []string, program string, args ...string) error {
		cmd := exec.Command(program, args...)
		cmd.Dir, cmd.Env = "..", append(os.Environ(), env...)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s %v: %w: %s", program, args, err, out)
		}
		return nil
	}
	for _, key := range []string{"release-1", "release-2", "ann", "recovery", "alice", "carol", "erin"} {
		err = errors.Join(err, run(nil, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", m.path(key)))
	}
	test := []string{"TEST=1"}
	for _, keys := range []string{"keys", "foreign"} {
		err = errors.Join(err, run(test, "image/keys.sh", m.path(keys), "2", m.path("release-1.pub"),
			m.path("release-2.pub")))
	}
	return m, errors.Join(err, run([]string{"MACHINE=1"}, "scripts/build.sh", m.path("bin")))
})

func TestMain(m *testing.M) {
	code := m.Run()
	if made, err := theMaker(); err == nil {
		os.RemoveAll(made.dir)
	}
	os.Exit(code)
}

func (m *maker) path(name string) string { return filepath.Join(m.dir, name) }

// debs is the folder of Debian packages, which later runs use again: each has its hash in the lock
// file.
func debs() string {
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	return filepath.Join(cache, "countersign-image")
}

// built is an image with its files.
type built struct {
	image.Built
	options image.Options
	raw     string // a disk
}

// image makes an image, once for each set of options.
func (m *maker) image(t testing.TB, change func(*image.Options)) built {
	t.Helper()
	o := image.Options{
		Source: "..", Variant: "vm", Keys: m.path("keys"), Programs: m.path("bin"), Cache: debs(), Version: "0.2.0",
		Level: 3, Epoch: 1764460800, Mirrors: image.DefaultMirrors, Log: io.Discard,
	}
	if change != nil {
		change(&o)
	}
	name := fmt.Sprintf("%s-%s-%d-%s-%s-%d", o.Variant, o.Version, o.Rollback, filepath.Base(o.Keys),
		strings.ReplaceAll(o.Cmdline, " ", "_"), len(o.Modules))
	make := sync.OnceValues(func() (b built, err error) {
		o.Work = m.path("image-" + name)
		if err := os.MkdirAll(o.Work, 0o755); err != nil {
			return b, err
		}
		b.options, b.raw = o, filepath.Join(o.Work, "disk.raw")
		if b.Built, err = image.Build(context.Background(), o); err != nil {
			return b, err
		}
		return b, o.Disk(context.Background(), b.Built, b.raw, "", nil)
	})
	once, _ := m.images.LoadOrStore(name, make)
	return must(once.(func() (built, error))())(t)
}

// update makes the file of an update, signed by some keys.
func (m *maker) update(t testing.TB, b built, keys ...string) string {
	t.Helper()
	content := must(os.ReadFile(b.UKI))(t)
	man := must(image.Manifest(content))(t)
	if man.Version != b.options.Version || man.Rollback != b.Rollback || man.Variant != b.options.Variant {
		t.Fatalf("the manifest is %+v", man)
	}
	text := filepath.Join(t.TempDir(), "manifest")
	must(0, os.WriteFile(text, []byte(man.Text()), 0o600))(t)
	var signatures []string
	for _, key := range keys {
		os.Remove(text + ".sig")
		output(t, "ssh-keygen", "-q", "-Y", "sign", "-n", update.Namespace, "-f", m.path(key), text)
		signatures = append(signatures, string(must(os.ReadFile(text+".sig"))(t)))
	}
	path := filepath.Join(t.TempDir(), "update")
	f := must(os.Create(path))(t)
	must(0, update.Write(f, man, signatures, bytes.NewReader(content)))(t)
	must(0, f.Close())(t)
	return path
}

// vm is a virtual machine with a firmware, a TPM and a disk of its own. QEMU emulates the processor
// (TCG), so that the tests need nothing of the host.
type vm struct {
	t     testing.TB
	dir   string
	maker *maker
	peers int // ports on this host, which are the guest's, too
	https int

	direct *built   // boots this image without a firmware
	drive  string   // a second disk, with a FAT file system
	extra  []string // further arguments of QEMU

	qemu, swtpm *exec.Cmd
	serial      net.Conn
	ended       chan struct{}
	log         *console
}

// console is what a machine has printed.
type console struct {
	mu   sync.Mutex
	text []byte
}

func (c *console) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.text = append(c.text, bytes.ReplaceAll(b, []byte("\r"), nil)...)
	return len(b), nil
}

func (c *console) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(c.text)
}

// Files of a machine.
const (
	diskFile = "disk.raw"
	varsFile = "vars.fd"
	tpmDir   = "tpm"
)

// diskSize is the size of a machine's disk, which the image fills at its first boot.
const diskSize = 1 << 30

// newVM makes a machine that was never switched on, with a disk of an image. settings is the text
// of countersign.toml on the ESP, in which the ports are added.
func newVM(t testing.TB, b built, settings string) *vm {
	t.Helper()
	need(t, "qemu-system-x86_64", "swtpm", "mcopy")
	m := must(theMaker())(t)
	v := &vm{t: t, dir: t.TempDir(), maker: m, peers: freePort(t), https: freePort(t)}
	output(t, "cp", "--sparse=always", b.raw, v.path(diskFile))
	must(0, os.Truncate(v.path(diskFile), diskSize))(t)
	output(t, "cp", "/usr/share/OVMF/OVMF_VARS_4M.fd", v.path(varsFile))
	must(0, os.Mkdir(v.path(tpmDir), 0o700))(t)
	text := fmt.Sprintf("listen = %d\nhttps = %d\n%s", v.peers, v.https, settings)
	v.put("countersign.toml", []byte(text))
	t.Cleanup(v.kill)
	return v
}

// settings enrols ann by her SSH key.
func (m *maker) settings(t testing.TB) string {
	return fmt.Sprintf("[setup]\noperator = \"ann\"\nssh_key = %q\n",
		strings.TrimSpace(string(must(os.ReadFile(m.path("ann.pub")))(t))))
}

func freePort(t testing.TB) int {
	t.Helper()
	l := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func (v *vm) path(name string) string { return filepath.Join(v.dir, name) }

// copy makes a machine with the same disk, firmware and TPM. v must be switched off.
func (v *vm) copy(t testing.TB) *vm {
	t.Helper()
	c := &vm{t: t, dir: t.TempDir(), maker: v.maker, peers: v.peers, https: v.https}
	for _, name := range []string{diskFile, varsFile, tpmDir} {
		output(t, "cp", "-r", "--sparse=always", v.path(name), c.path(name))
	}
	t.Cleanup(c.kill)
	return c
}

// esp is the argument of mtools for the ESP of the disk.
func (v *vm) esp() string { return v.path(diskFile) + "@@1M" }

func (v *vm) mtools(program string, args ...string) string {
	v.t.Helper()
	return outputIn(v.t, []string{"MTOOLS_SKIP_CHECK=1"}, program, append([]string{"-i", v.esp()}, args...)...)
}

// put writes a file of the ESP, with its folders.
func (v *vm) put(path string, content []byte) {
	v.t.Helper()
	from := filepath.Join(v.t.TempDir(), "file")
	must(0, os.WriteFile(from, content, 0o600))(v.t)
	var folder string
	for _, part := range strings.Split(filepath.Dir(path), "/") {
		folder += "/" + part
		cmd := exec.Command("mmd", "-D", "s", "-i", v.esp(), "::"+folder)
		cmd.Env = append(os.Environ(), "MTOOLS_SKIP_CHECK=1")
		cmd.Run() // the folder may be there
	}
	v.mtools("mcopy", "-o", from, "::/"+path)
}

// get reads a file of the ESP.
func (v *vm) get(path string) []byte {
	v.t.Helper()
	to := filepath.Join(v.t.TempDir(), "file")
	v.mtools("mcopy", "-n", "::/"+path, to)
	return must(os.ReadFile(to))(v.t)
}

// start switches the machine on.
func (v *vm) start() {
	v.t.Helper()
	socket := filepath.Join(must(os.MkdirTemp("", "vm"))(v.t), "s") // a socket's path must be short
	v.t.Cleanup(func() { os.RemoveAll(filepath.Dir(socket)) })
	v.swtpm = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+v.path(tpmDir),
		"--ctrl", "type=unixio,path="+socket+".tpm", "--flags", "startup-clear", "--terminate")
	v.swtpm.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	complained := must(os.Create(v.path("swtpm.log")))(v.t)
	defer complained.Close()
	v.swtpm.Stdout, v.swtpm.Stderr = complained, complained
	must(0, v.swtpm.Start())(v.t)
	v.log = new(console)
	v.eventually(time.Minute, "swtpm listens", func() bool {
		if b, _ := os.ReadFile(v.path("swtpm.log")); len(b) > 0 {
			v.t.Logf("swtpm: %s", b)
		}
		return exists(socket + ".tpm")
	})
	const firmware = "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd"
	// cx16: QEMU 7.2 loses flags in the emulation of CMPXCHG16B, and Linux 6.12 relies on them.
	args := []string{"-accel", "tcg,thread=multi", "-cpu", "max,-cx16", "-smp", "2", "-m", "1024", "-nodefaults",
		"-no-user-config", "-display", "none", "-vga", "none",
		"-chardev", "socket,id=serial,path=" + socket + ".serial,server=on,wait=off", "-serial", "chardev:serial",
		"-qmp", "unix:" + socket + ".qmp,server=on,wait=off",
		"-chardev", "socket,id=tpm,path=" + socket + ".tpm", "-tpmdev", "emulator,id=tpm0,chardev=tpm",
		"-device", "tpm-crb,tpmdev=tpm0",
		"-netdev", fmt.Sprintf("user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:%d-:%d,hostfwd=tcp:127.0.0.1:%d-:%d",
			v.peers, v.peers, v.https, v.https),
		"-device", "virtio-net-pci,netdev=net,romfile=", "-device", "virtio-rng-pci", "-S"}
	if v.direct != nil {
		cmdline := string(must(os.ReadFile("cmdline"))(v.t))
		args = append(args, "-machine", "q35", "-kernel", v.direct.Kernel, "-initrd", v.direct.Initrd, "-append",
			strings.Join(strings.Fields(cmdline), " ")+" countersign.try")
	} else {
		args = append(args, "-machine", "q35,smm=on", "-global", "driver=cfi.pflash01,property=secure,value=on",
			"-drive", "if=pflash,format=raw,unit=0,readonly=on,file="+firmware,
			"-drive", "if=pflash,format=raw,unit=1,file="+v.path(varsFile))
	}
	if v.extra == nil {
		args = append(args, "-drive", "file="+v.path(diskFile)+",format=raw,if=none,id=disk,cache=unsafe",
			"-device", "virtio-blk-pci,drive=disk")
	}
	if v.drive != "" {
		args = append(args, "-drive", "file="+v.drive+",format=raw,if=none,id=drive,cache=writethrough",
			"-device", "virtio-blk-pci,drive=drive")
	}
	v.qemu = exec.Command("qemu-system-x86_64", append(args, v.extra...)...)
	v.qemu.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	var complaints bytes.Buffer
	v.qemu.Stderr = &complaints
	must(0, v.qemu.Start())(v.t)
	v.ended = make(chan struct{})
	go func(cmd *exec.Cmd, ended chan struct{}) { cmd.Wait(); close(ended) }(v.qemu, v.ended)
	v.eventually(time.Minute, "QEMU listens", func() bool {
		select {
		case <-v.ended:
			v.t.Fatalf("QEMU has ended: %s", complaints.String())
		default:
		}
		conn, err := net.Dial("unix", socket+".serial")
		v.serial = conn
		return err == nil
	})
	file := must(os.Create(v.path("console.log")))(v.t) // for who watches a test
	go func(serial net.Conn, log *console) { io.Copy(io.MultiWriter(log, file), serial); file.Close() }(v.serial, v.log)
	v.qmp(socket+".qmp", "cont")
}

// qmp gives QEMU a command.
func (v *vm) qmp(socket, command string) {
	v.t.Helper()
	v.eventually(10*time.Second, "QEMU takes commands", func() bool { return exists(socket) })
	conn := must(net.Dial("unix", socket))(v.t)
	defer conn.Close()
	d := json.NewDecoder(conn)
	for _, each := range []string{"", "qmp_capabilities", command} {
		if each != "" {
			fmt.Fprintf(conn, `{"execute":%q}`, each)
		}
		var answer map[string]any
		if err := d.Decode(&answer); err != nil || answer["error"] != nil {
			v.t.Fatalf("QMP %s: %v %v", each, err, answer)
		}
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// kill pulls the plug.
func (v *vm) kill() {
	for _, cmd := range []*exec.Cmd{v.qemu, v.swtpm} {
		if cmd != nil {
			cmd.Process.Kill()
		}
	}
	if v.qemu != nil {
		<-v.ended
		v.swtpm.Wait()
		v.serial.Close()
	}
	v.qemu, v.swtpm = nil, nil
}

// off has the machine power itself off, by its console.
func (v *vm) off() {
	v.t.Helper()
	v.typeLine("p")
	v.see("Type yes to power off")
	v.typeLine("yes")
	select {
	case <-v.ended:
	case <-time.After(bootTime):
		v.t.Fatalf("the machine does not power off:\n%s", v.log)
	}
	v.kill()
}

// typeLine types a line at the serial console.
func (v *vm) typeLine(line string) {
	v.t.Helper()
	must(io.WriteString(v.serial, line+"\r"))(v.t)
}

// bootTime bounds the wait for a boot. An emulated processor takes 30 s for one, and more on a busy
// host.
const bootTime = 5 * time.Minute

func (v *vm) eventually(most time.Duration, what string, is func() bool) {
	v.t.Helper()
	for deadline := time.Now().Add(most); !is(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			v.t.Fatalf("not within %v: %s\n%s", most, what, v.log)
		}
	}
}

// see waits until the console has shown a text. Lines are joined, since the console wraps them.
func (v *vm) see(text string) {
	v.t.Helper()
	v.eventually(bootTime, "the console shows "+text, func() bool {
		return strings.Contains(strings.Join(strings.Fields(v.log.String()), " "), text)
	})
}

// insecure trusts any certificate: the fingerprint is on the console.
func insecure() *http.Client {
	return &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
}

// url is an address of the admin API.
func (v *vm) url(path string) string { return fmt.Sprintf("https://localhost:%d%s", v.https, path) }

// ready waits until the appliance signs.
func (v *vm) ready() {
	v.t.Helper()
	begun := time.Now()
	v.eventually(bootTime, "the appliance is ready", v.isReady)
	v.t.Logf("ready after %v", time.Since(begun).Round(time.Second))
}

func (v *vm) isReady() bool {
	answer, err := insecure().Get(v.url("/health/ready"))
	if err != nil {
		return false
	}
	answer.Body.Close()
	return answer.StatusCode == http.StatusOK
}

// never waits until the console has shown a text, and fails if the appliance serves.
func (v *vm) never(text string) {
	v.t.Helper()
	v.see(text)
	if v.isReady() {
		v.t.Fatalf("the appliance serves:\n%s", v.log)
	}
	if conn, err := net.DialTimeout("tcp", "127.0.0.1:"+strconv.Itoa(v.peers), time.Second); err == nil {
		conn.SetDeadline(time.Now().Add(2 * time.Second))
		if n, _ := conn.Read(make([]byte, 1)); n > 0 {
			v.t.Fatal("the listener for peers answers")
		}
		conn.Close()
	}
}

// operator is ann with the tool and her SSH agent, on this host.
type operator struct {
	*vm
	env []string
}

// operator signs in as ann.
func (v *vm) operator() *operator {
	v.t.Helper()
	need(v.t, "ssh-agent", "ssh-add")
	home := v.t.TempDir()
	agent := filepath.Join(must(os.MkdirTemp("", "agent"))(v.t), "s")
	v.t.Cleanup(func() { os.RemoveAll(filepath.Dir(agent)) })
	cmd := exec.Command("ssh-agent", "-D", "-a", agent)
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	must(0, cmd.Start())(v.t)
	v.t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	v.eventually(10*time.Second, "the agent listens", func() bool {
		conn, err := net.Dial("unix", agent) // bind makes the file, and listen comes after that
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	o := &operator{v, []string{"HOME=" + home, "SSH_AUTH_SOCK=" + agent}}
	outputIn(v.t, o.env, "ssh-add", "-q", v.maker.path("ann"))
	ca := filepath.Join(home, "ca.pem")
	must(0, os.WriteFile(ca, v.authority(), 0o600))(v.t)
	o.tool("admin", "context", "add", "vm", "--url", v.url(""), "--ca", ca, "--operator", "ann")
	// The agent enrols ann a moment after the daemon is up.
	v.eventually(time.Minute, "ann is enrolled", func() bool { _, err := o.try("admin", "whoami"); return err == nil })
	return o
}

// authority is the certificate of the appliance's CA.
func (v *vm) authority() []byte {
	v.t.Helper()
	conn := must(tls.Dial("tcp", fmt.Sprintf("localhost:%d", v.https), &tls.Config{InsecureSkipVerify: true}))(v.t)
	defer conn.Close()
	chain := conn.ConnectionState().PeerCertificates
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: chain[len(chain)-1].Raw})
}

// tool runs the tool.
func (o *operator) tool(args ...string) string {
	o.t.Helper()
	out, err := o.try(args...)
	if err != nil {
		o.t.Fatalf("countersign %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func (o *operator) try(args ...string) (string, error) {
	cmd := exec.Command(o.maker.path("bin/countersign"), args...)
	cmd.Env = append(os.Environ(), o.env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// events returns the events of a type, as lines of the tool.
func (o *operator) events(kind string) string {
	o.t.Helper()
	return o.tool("admin", "audit", "list", "--type", kind)
}

// shop makes the key payments, and enrols a peer that may sign with the key. The result are the
// arguments of the tool for the peer.
func (o *operator) shop() []string {
	o.t.Helper()
	o.tool("admin", "key", "create", "payments")
	return o.shopOf("payments")
}

// shopOf enrols a peer that may sign with a key.
func (o *operator) shopOf(name string) []string {
	o.t.Helper()
	key := filepath.Join(o.t.TempDir(), "shop.key")
	made := o.tool("keygen", key)
	public := ""
	for line := range strings.Lines(string(must(os.ReadFile(key))(o.t)) + made) {
		if _, found, is := strings.Cut(line, "public key: "); is {
			public = strings.TrimSpace(found)
		}
	}
	o.tool("admin", "peer", "add", "shop", public)
	rules := filepath.Join(o.t.TempDir(), "policy.cedar")
	must(0, os.WriteFile(rules, fmt.Appendf(nil,
		`permit (principal == Peer::"shop", action == Action::"sign", resource == Key::%q);`, name), 0o600))(o.t)
	o.tool("admin", "policy", "propose", rules)
	return []string{"--server", "127.0.0.1:" + strconv.Itoa(o.peers), "--identity", key, "--key", name,
		"--server-key", strings.Fields(o.tool("admin", "noise-key"))[0]}
}
