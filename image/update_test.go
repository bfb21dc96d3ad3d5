package image_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"countersign/client"
	"countersign/image"
)

// newer makes the image of an update: version 0.3.0, rollback version 2.
func newer(t *testing.T) (built, string) {
	m := must(theMaker())(t)
	b := m.image(t, func(o *image.Options) { o.Version, o.Rollback = "0.3.0", 2 })
	return b, m.update(t, b, "release-1", "release-2")
}

// TestUpdate updates a machine, after several updates that no machine may take. Afterwards the old
// image does not open the state, neither on the disk of now nor on a copy of before the update.
func TestUpdate(t *testing.T) {
	long(t)
	m := must(theMaker())(t)
	v := install(t)
	before := v.vm.copy(t)
	b, file := newer(t)
	v.vm.start()
	v.ready()
	ann := v.operator()

	damaged := must(os.ReadFile(file))(t)
	damaged[len(damaged)/2] ^= 1
	broken := filepath.Join(t.TempDir(), "damaged")
	must(0, os.WriteFile(broken, damaged, 0o600))(t)
	for name, c := range map[string]struct{ file, words string }{
		"one signature":       {m.update(t, b, "release-1"), "1 of the keys of releases have signed, and 2 must"},
		"one signature twice": {m.update(t, b, "release-1", "release-1"), "1 of the keys of releases have signed"},
		"a foreign signature": {m.update(t, b, "release-1", "ann"), "by none of the 2 keys of releases"},
		"damage":              {broken, "its image is not the one of its manifest"},
		"the same version": {
			m.update(t, m.image(t, nil), "release-1", "release-2"), "only a newer one can be installed",
		},
		"rubbish": {"image_test.go", "not a valid update"},
	} {
		if out, err := ann.try("admin", "update", "propose", c.file); err == nil || !strings.Contains(out, c.words) {
			t.Errorf("%s: %v %s", name, err, out)
		}
	}
	if events := ann.events("MachineUpdateBegun"); strings.Contains(events, "0.3.0") {
		t.Error(events)
	}

	begun := time.Now()
	ann.tool("admin", "update", "propose", file)
	v.proven(ann, "0.3.0")
	t.Logf("the update took %v", time.Since(begun).Round(time.Second))
	if events := ann.events("MachineUpdated"); !strings.Contains(events, "0.3.0") {
		t.Error(events)
	}
	signs(t, v.shop, ann)
	v.off()

	old := must(os.ReadFile(m.image(t, nil).UKI))(t)
	onlyOld := v.vm.copy(t)
	onlyOld.mtools("mdel", "::/EFI/Linux/countersign_0.3.0.efi")
	onlyOld.put(slot, old)
	onlyOld.start()
	onlyOld.never("the image is older than this machine allows: it has the rollback version 1, and the minimum is 2")
	onlyOld.kill()

	must(0, os.RemoveAll(before.path(tpmDir)))(t)
	output(t, "cp", "-r", v.path(tpmDir), before.path(tpmDir))
	before.start()
	before.never("the seal of the disk is an old copy")
	before.kill()

	v.vm.start() // and none of that has cost anything
	v.ready()
	signs(t, v.shop, v.operator())
}

// proven waits until an image has proven itself.
func (v *installed) proven(ann *operator, version string) {
	v.t.Helper()
	v.eventually(2*bootTime, "version "+version+" is proven", func() bool {
		out, err := ann.try("admin", "machine", "show")
		return err == nil && strings.Contains(out, "slot") && strings.Contains(out, version+", proven, runs") &&
			!strings.Contains(out, "\nupdate ")
	})
}

// TestFailedUpdate installs images that can't work: in one the daemon is not ready in time, and the
// other one can't open the disk. The machine goes back by itself, and the log says so.
func TestFailedUpdate(t *testing.T) {
	long(t)
	m := must(theMaker())(t)
	v := install(t)
	v.vm.start()
	v.ready()
	ann := v.operator()
	mixed := filepath.Join(t.TempDir(), "unopened")
	output(t, "cp", "-r", m.path("keys"), mixed)
	output(t, "cp", m.path("foreign/pcr.key"), filepath.Join(mixed, "pcr.key"))
	for version, change := range map[string]func(*image.Options){
		"0.3.1": func(o *image.Options) { o.Cmdline = "countersign.proof=1" },
		"0.3.2": func(o *image.Options) { o.Keys = mixed },
	} {
		b := m.image(t, func(o *image.Options) {
			o.Version, o.Rollback = version, 2
			change(o)
		})
		ann.tool("admin", "update", "propose", m.update(t, b, "release-1", "release-2"))
		v.eventually(3*bootTime, "the log has the failure of "+version, func() bool {
			out, err := ann.try("admin", "audit", "list", "--type", "MachineUpdateFailed")
			return err == nil && strings.Contains(out, version)
		})
		v.proven(ann, "0.2.0")
		signs(t, v.shop, ann)
	}
	v.off()
}

// A log of writes in the format of Linux's dm-log-writes (Documentation/admin-guide/device-mapper).
const (
	logMagic   = 0x6a736677736872
	flagFlush  = 1
	logSector  = 512
	cutAtBytes = 1 << 20
)

// TestPowerCutDuringUpdate records all writes of an update, and cuts the power at each megabyte and
// at each flush: also with part of the writes since the flush before lost. On each disk, every
// image that systemd-boot may start is whole. Some disks are booted.
func TestPowerCutDuringUpdate(t *testing.T) {
	long(t)
	m := must(theMaker())(t)
	v := install(t)
	before := v.vm.copy(t)
	b, file := newer(t)
	writes := v.path("writes")
	must(0, os.WriteFile(writes, nil, 0o600))(t)
	v.extra = []string{"-blockdev", "driver=blklogwrites,node-name=disk,log-sector-size=512,file.driver=file," +
		"file.filename=" + v.path(diskFile) + ",log.driver=file,log.filename=" + writes,
		"-device", "virtio-blk-pci,drive=disk", "-no-reboot"}
	v.vm.start()
	v.ready()
	v.operator().tool("admin", "update", "propose", file)
	select { // -no-reboot: the restart is the end
	case <-v.ended:
	case <-time.After(bootTime):
		t.Fatalf("the machine does not restart:\n%s", v.log)
	}
	v.kill()

	images := map[string]string{
		sum(must(os.ReadFile(m.image(t, nil).UKI))(t)): "old", sum(must(os.ReadFile(b.UKI))(t)): "new",
	}
	disk := before.path(diskFile)
	d := must(os.OpenFile(disk, os.O_RDWR, 0))(t)
	defer d.Close()
	seen, checked := map[string]int{}, 0
	check := func(of *vm, what string) string {
		found := of.images(t, images, what)
		seen[found]++
		checked++
		return found
	}
	var lost []write // since the last flush
	var total, cut int64
	booted := map[string]*vm{}
	for i, w := range readWrites(t, writes) {
		if w.at < espEnd {
			w.before = make([]byte, len(w.data))
			must(d.ReadAt(w.before, w.at))(t)
		}
		for part := range w.parts(cutAtBytes / 4) {
			must(d.WriteAt(part.data, part.at))(t)
			if part.at+int64(len(part.data)) <= espEnd {
				total += int64(len(part.data))
			}
			if total-cut >= cutAtBytes {
				cut = total
				check(before, fmt.Sprintf("%d MiB", total>>20))
				if total>>20 == 20 {
					booted["old"] = before.copy(t)
				}
			}
		}
		if w.at < espEnd {
			lost = append(lost, w)
		}
		if w.flush && len(lost) > 0 {
			found := check(before, fmt.Sprintf("flush %d", i))
			if found == "new old" && booted["new"] == nil {
				booted["new"] = before.copy(t)
			}
			for skip := range 2 { // each second write since the flush before
				partly := before.copy(t)
				f := must(os.OpenFile(partly.path(diskFile), os.O_RDWR, 0))(t)
				for n, each := range lost {
					if n%2 == skip && each.before != nil {
						must(f.WriteAt(each.before, each.at))(t)
					}
				}
				f.Close()
				check(partly, fmt.Sprintf("flush %d, without writes %d, %d, ...", i, skip, skip+2))
				os.Remove(partly.path(diskFile))
			}
			lost = nil
		}
	}
	t.Logf("%d disks after %d MiB: %v", checked, total>>20, seen)
	if seen["old"] < 20 || seen["new old"] == 0 {
		t.Errorf("the cuts were not where the update was: %v", seen)
	}
	if booted["old"] == nil || booted["new"] == nil {
		t.Fatal("no disk to boot")
	}
	booted["old"].start()
	booted["old"].ready()
	ann := booted["old"].operator()
	booted["old"].eventually(bootTime, "the log has the failure", func() bool {
		return strings.Contains(ann.events("MachineUpdateFailed"), "0.3.0")
	})
	signs(t, v.shop, ann)
	booted["old"].kill()
	i := *v
	i.vm = booted["new"]
	i.vm.start()
	i.ready()
	i.proven(i.operator(), "0.3.0")
	signs(t, v.shop, i.operator())
}

// espEnd is the end of the ESP on the disk.
const espEnd = (1 + 256) << 20

// write is a write of a disk.
type write struct {
	at     int64
	data   []byte
	before []byte // the content of before
	flush  bool
}

// parts are the parts of a write, in their order, down to some bytes.
func (w write) parts(most int) func(func(write) bool) {
	return func(yield func(write) bool) {
		for at := 0; at < len(w.data); at += most {
			if !yield(write{at: w.at + int64(at), data: w.data[at:min(at+most, len(w.data))]}) {
				return
			}
		}
	}
}

// readWrites reads a log of writes.
func readWrites(t *testing.T, path string) (all []write) {
	t.Helper()
	f := must(os.Open(path))(t)
	defer f.Close()
	le, head := binary.LittleEndian, make([]byte, logSector)
	must(io.ReadFull(f, head))(t)
	if le.Uint64(head) != logMagic || le.Uint32(head[24:]) != logSector {
		t.Fatalf("%x is no log of writes", head[:32])
	}
	for range le.Uint64(head[16:]) {
		if _, err := io.ReadFull(f, head); errors.Is(err, io.EOF) {
			break
		}
		w := write{at: int64(le.Uint64(head)) * logSector, flush: le.Uint64(head[16:])&flagFlush != 0}
		if discard := le.Uint64(head[16:])&4 != 0; !discard {
			w.data = make([]byte, le.Uint64(head[8:])*logSector)
			must(io.ReadFull(f, w.data))(t)
		}
		all = append(all, w)
	}
	return all
}

// images says which whole images systemd-boot may start from a disk: old, new or both. Any other
// file there is an error.
func (v *vm) images(t *testing.T, known map[string]string, what string) string {
	t.Helper()
	cmd := exec.Command("mdir", "-b", "-i", v.esp(), "::/EFI/Linux")
	cmd.Env = append(os.Environ(), "MTOOLS_SKIP_CHECK=1")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: the ESP has no folder of images: %v", what, err)
	}
	found := map[string]bool{}
	for name := range strings.Lines(string(out)) {
		name = strings.TrimSpace(name)
		if !strings.HasSuffix(name, ".efi") {
			continue
		}
		copied := exec.Command("mtype", "-i", v.esp(), name)
		copied.Env = cmd.Env
		content, _ := copied.Output()
		if known[sum(content)] == "" {
			t.Errorf("%s: %s is no whole image", what, name)
		}
		found[known[sum(content)]] = true
	}
	if !found["old"] {
		t.Errorf("%s: the image that runs is gone: %s", what, out)
	}
	if found["new"] {
		return "new old"
	}
	return "old"
}

// TestPlugPulled pulls the plug 20 times while a peer signs. The machine comes back each time, the
// log is whole, each answered signature is in it, and no nonce was admitted twice.
func TestPlugPulled(t *testing.T) {
	long(t)
	v := install(t)
	identity := must(client.ReadIdentity(v.shop[3]))(t)
	server := must(client.ParseKey(v.noise))(t)
	var mu sync.Mutex
	answered := map[[32]byte]*client.Signed{}
	log := filepath.Join(t.TempDir(), "log")
	for round := range 20 {
		v.vm.start()
		v.ready()
		before := len(answered)
		var load sync.WaitGroup
		for range 4 {
			c := must(client.New(client.Config{Address: v.shop[1], ServerKey: server, Identity: identity}))(t)
			load.Go(func() {
				defer c.Close()
				for i := 0; ; i++ {
					signed, err := c.Sign(t.Context(), "payments", document(i))
					if err != nil {
						return // the plug
					}
					mu.Lock()
					answered[signed.Nonce] = signed
					mu.Unlock()
				}
			})
		}
		v.eventually(bootTime, "the load runs", func() bool {
			mu.Lock()
			defer mu.Unlock()
			return len(answered) > before+20*(round%3+1)
		})
		v.kill()
		load.Wait()
	}
	v.vm.start()
	v.ready()
	ann := v.operator()
	ann.tool("admin", "audit", "export", log)
	ann.tool("audit", "verify", log, "--key", strings.TrimSpace(ann.tool("admin", "audit", "key")))
	c := must(client.Dial(t.Context(), client.Config{Address: v.shop[1], ServerKey: server, Identity: identity}))(t)
	defer c.Close()
	tried := 0
	for nonce, signed := range answered {
		if tried++; tried > 200 {
			break
		}
		again, err := c.Sign(t.Context(), "payments", signed.Document)
		if err != nil || !again.Repeated || !bytes.Equal(again.Signature, signed.Signature) {
			t.Fatalf("nonce %s: %v", hex.EncodeToString(nonce[:]), err)
		}
		other := document(-1)
		other.Nonce, other.Timestamp, other.ExpiresAt = nonce, signed.Timestamp, signed.ExpiresAt
		if _, err := c.Sign(t.Context(), "payments", other); err == nil {
			t.Fatalf("nonce %s was accepted twice", hex.EncodeToString(nonce[:]))
		}
	}
	t.Logf("%d signatures", len(answered))
}

func document(i int) client.Document {
	digest := sha256.Sum256(fmt.Appendf(nil, "document %d", i))
	return client.Document{Type: "message-v1", Payload: fmt.Appendf(nil, `{"context":"test","sha256":%q}`,
		base64.RawURLEncoding.EncodeToString(digest[:]))}
}
