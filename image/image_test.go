package image_test

import (
	"bytes"
	"crypto/sha256"
	"debug/pe"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"countersign/image"
)

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}

// long skips a test that boots a machine several times, unless make test-image asks for it.
func long(t *testing.T) {
	t.Helper()
	if os.Getenv("IMAGE") == "" {
		t.Skip("make test-image runs the long tests of the image")
	}
}

// TestMeasurements compares the prediction of register 11 with that of systemd-measure, and the
// signed image with what sbverify reads.
func TestMeasurements(t *testing.T) {
	need(t, "sbverify")
	m := must(theMaker())(t)
	b := m.image(t, nil)
	dir := t.TempDir()
	f := must(pe.Open(b.UKI))(t)
	defer f.Close()
	args := []string{"calculate", "--bank=sha256", "--phase="}
	for _, section := range []string{"linux", "osrel", "cmdline", "initrd", "pcrpkey"} {
		path := filepath.Join(dir, section)
		s := f.Section("." + section)
		must(0, os.WriteFile(path, must(s.Data())(t)[:s.VirtualSize], 0o600))(t)
		args = append(args, "--"+section+"="+path)
	}
	got := output(t, "/lib/systemd/systemd-measure", args...)
	if want := "11:sha256=" + hex.EncodeToString(b.PCR11); !strings.Contains(got, want) {
		t.Errorf("systemd-measure says %s, want %s", got, want)
	}
	output(t, "sbverify", "--cert", m.path("keys/db.crt"), b.UKI)
	if out, err := exec.Command("sbverify", "--cert", m.path("foreign/db.crt"), b.UKI).CombinedOutput(); err == nil {
		t.Errorf("the image is signed by a foreign key: %s", out)
	}
}

// TestReproducible makes an image twice, in other folders: the same bytes of image and disk.
func TestReproducible(t *testing.T) {
	m := must(theMaker())(t)
	var sums []string
	for range 2 {
		b := m.image(t, nil)
		o := b.options
		o.Work = t.TempDir()
		again := must(image.Build(t.Context(), o))(t)
		raw := filepath.Join(t.TempDir(), "disk.raw")
		must(0, o.Disk(t.Context(), again, raw, "", nil))(t)
		qcow2 := raw + ".qcow2"
		must(0, image.QCOW2(t.Context(), raw, qcow2))(t)
		for _, path := range []string{again.UKI, raw, qcow2} {
			sums = append(sums, sum(must(os.ReadFile(path))(t)))
		}
	}
	if !slices.Equal(sums[:3], sums[3:]) {
		t.Errorf("not the same: %v, %v", sums[:3], sums[3:])
	}
}

// TestNothingToLogInTo looks into the root of the image: no shell, no getty, no login, no
// interpreter, no package manager, no set-user-ID bit, and no secret of the maker.
func TestNothingToLogInTo(t *testing.T) {
	m := must(theMaker())(t)
	b := m.image(t, nil)
	root := filepath.Join(b.options.Work, "root")
	forbidden := regexp.MustCompile(`/(ba|da|z|fi|k|tc|c)?sh$|getty|/login$|/su$|sudo|sshd|busybox|perl|python|` +
		`dpkg|/apt|nc$|/wget$|/curl$|debug-shell|emergency\.(service|target)$|rescue|ask-password`)
	must(0, filepath.WalkDir(root, func(path string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path, root)
		info, err := e.Info()
		if forbidden.MatchString(name) || info.Mode()&(os.ModeSetuid|os.ModeSetgid) != 0 {
			t.Errorf("%s %v", name, info.Mode())
		}
		return err
	}))(t)
	for _, key := range []string{"db.key", "KEK.key", "PK.key", "pcr.key"} {
		secret := must(os.ReadFile(m.path("keys/" + key)))(t)
		body := bytes.Split(secret, []byte("\n"))[1]
		for _, path := range []string{b.UKI, b.raw} {
			if bytes.Contains(must(os.ReadFile(path))(t), body) {
				t.Errorf("%s has %s", path, key)
			}
		}
	}
}

// TestDirectBoot boots the kernel without a firmware, with a TPM: the appliance signs, and says
// that the machine is for tries.
func TestDirectBoot(t *testing.T) {
	m := must(theMaker())(t)
	b := m.image(t, nil)
	v := newVM(t, b, m.settings(t))
	v.direct = &b
	v.start()
	v.ready()
	ann := v.operator()
	signs(t, ann.shop(), ann)
	v.see("TRY the disk of this machine is not protected")
	v.see("TEST KEYS")
	if shown := ann.tool("admin", "machine", "show"); !strings.Contains(shown, "TRY") {
		t.Error(shown)
	}
	if custody := ann.tool("admin", "key", "show", "payments"); !strings.Contains(custody, "tpm-sealed") {
		t.Error(custody)
	}
	v.off()
}

// signs has a document signed.
func signs(t testing.TB, shop []string, o *operator) string {
	t.Helper()
	return o.tool(append([]string{"sign", "--json", "--context", "test", "image_test.go"}, shop...)...)
}

// installed is a machine with an appliance, a peer and a signature, that was powered off: made
// once, and copied by each test.
type installed struct {
	*vm
	shop  []string
	noise string
}

var theInstalled = map[string]*installed{}
var installing sync.Mutex

// install returns a copy of an installed machine.
func install(t *testing.T) *installed {
	t.Helper()
	installing.Lock()
	defer installing.Unlock()
	made := theInstalled[""]
	if made == nil {
		made = firstBoot(t)
		keep := must(theMaker())(t).path("installed")
		output(t, "cp", "-r", "--sparse=always", made.dir, keep)
		output(t, "cp", "-r", filepath.Dir(made.shop[3]), keep+"-shop")
		made.dir, made.shop[3] = keep, filepath.Join(keep+"-shop", filepath.Base(made.shop[3]))
		theInstalled[""] = made
	}
	c := *made
	c.vm = made.copy(t)
	return &c
}

// firstBoot switches a new machine on, with a firmware in setup mode.
func firstBoot(t *testing.T) *installed {
	t.Helper()
	m := must(theMaker())(t)
	v := newVM(t, m.image(t, nil), m.settings(t))
	v.start()
	v.ready()
	ann := v.operator()
	shop := ann.shop()
	signs(t, shop, ann)
	noise := strings.Fields(ann.tool("admin", "noise-key"))[0]
	v.see("Noise key " + noise)
	state, _ := ann.try("admin", "state")
	if f := strings.Fields(state); len(f) < 2 || f[1] != "operational" {
		t.Error(state)
	}
	v.off()
	return &installed{v, shop, noise}
}

// TestRack boots the image for servers.
func TestRack(t *testing.T) {
	long(t)
	m := must(theMaker())(t)
	b := m.image(t, func(o *image.Options) { o.Variant = "rack" })
	if _, err := os.Stat(filepath.Join(b.options.Work, "root/usr/lib/softhsm")); err == nil {
		t.Error("the image for servers has SoftHSM")
	}
	v := newVM(t, b, m.settings(t))
	v.start()
	v.ready()
	ann := v.operator()
	signs(t, ann.shop(), ann)
	v.see("image rack")
	v.off()
	v.start()
	v.ready()
	v.off()
}

// TestModules builds an image with a module of a vendor: signed and measured with the image. A
// module that needs a library of its own is refused without it.
func TestModules(t *testing.T) {
	m := must(theMaker())(t)
	const vendor = "/usr/lib/softhsm/libsofthsm2.so" // for the rack, which has no SoftHSM
	b := m.image(t, func(o *image.Options) { o.Modules = []string{vendor} })
	archive := output(t, "zstd", "-dcq", b.Initrd)
	if at := strings.LastIndex(archive, "usr/lib/countersign-modules/libsofthsm2.so"); at < 0 {
		t.Error("the initrd does not have the module")
	} else if !strings.Contains(archive[at:], string(must(os.ReadFile(vendor))(t))) {
		t.Error("the initrd has another module")
	}
	if bytes.Equal(b.PCR11, m.image(t, nil).PCR11) {
		t.Error("the module is not measured")
	}
	o := b.options
	o.Modules, o.Work = []string{must(exec.LookPath("qemu-system-x86_64"))(t)}, t.TempDir()
	if _, err := image.Build(t.Context(), o); err == nil || !strings.Contains(err.Error(), "name it as a module, too") {
		t.Errorf("a module without its libraries: %v", err)
	}
}

// TestFirstBoot switches a new machine on: the firmware gets the maker's keys, the state is made
// and sealed, and the appliance signs. After a restart and a power cut, it has the same keys.
func TestFirstBoot(t *testing.T) {
	v := install(t)
	v.vm.start()
	v.ready()
	ann := v.operator()
	if noise := strings.Fields(ann.tool("admin", "noise-key"))[0]; noise != v.noise {
		t.Errorf("another Noise key: %s, before %s", noise, v.noise)
	}
	signs(t, v.shop, ann)
	v.kill()
	v.vm.start()
	v.ready()
	ann = v.operator()
	signs(t, v.shop, ann)
	// The ledger's part of the disk is ciphertext.
	v.off()
	disk := must(os.ReadFile(v.path(diskFile)))(t)
	for _, plain := range []string{"payments", "countersign.toml\x00", "operator enrol"} {
		if i := bytes.Index(disk[300<<20:], []byte(plain)); i >= 0 {
			t.Errorf("the disk has %q at %d", plain, i)
		}
	}
}
