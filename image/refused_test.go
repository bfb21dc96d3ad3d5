package image_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"countersign/image"
)

// slot is the file of the image that runs.
const slot = "EFI/Linux/countersign_0.2.0.efi"

// TestRefused changes one thing each of a machine that was switched off. The machine must not open
// its state, and says why. With the change taken back, the machine has its keys again.
func TestRefused(t *testing.T) {
	long(t)
	m := must(theMaker())(t)
	b := m.image(t, nil)
	uki := must(os.ReadFile(b.UKI))(t)
	patched := func(old, new string) []byte {
		if !bytes.Contains(uki, []byte(old)) || len(old) != len(new) {
			t.Fatalf("the image has no %q", old)
		}
		return bytes.Replace(uki, []byte(old), []byte(new), 1)
	}
	initrd := bytes.Clone(uki)
	initrd[len(initrd)/2] ^= 1
	unsigned := filepath.Join(t.TempDir(), "unsigned.efi")
	must(0, os.WriteFile(unsigned, uki, 0o600))(t)
	output(t, "sbattach", "--remove", unsigned)
	entry := func(options string) []byte {
		return []byte("title x\nversion 9\nefi /" + slot + "\noptions " + options + "\n")
	}
	for _, c := range []struct {
		name   string
		change func(v *installed)
		words  string // on the console
	}{
		{"command line in the image", func(v *installed) {
			v.put(slot, patched("lockdown=confidentiality", "lockdown=nonenonenonenon"))
		}, "Access Denied"},
		{"initrd in the image", func(v *installed) { v.put(slot, initrd) }, "Access Denied"},
		{"image without a signature", func(v *installed) {
			v.put(slot, must(os.ReadFile(unsigned))(t))
		}, "Access Denied"},
		{"image of a foreign signer", func(v *installed) {
			foreign := m.image(t, func(o *image.Options) { o.Keys = m.path("foreign") })
			v.put(slot, must(os.ReadFile(foreign.UKI))(t))
		}, "Access Denied"},
		{"boot loader", func(v *installed) {
			v.put("EFI/BOOT/BOOTX64.EFI", must(os.ReadFile(unsigned))(t))
		}, "Access Denied"},
		{"foreign key of measurements", func(v *installed) {
			mixed := filepath.Join(t.TempDir(), "mixed")
			output(t, "cp", "-r", m.path("keys"), mixed)
			output(t, "cp", m.path("foreign/pcr.key"), filepath.Join(mixed, "pcr.key"))
			foreign := m.image(t, func(o *image.Options) { o.Keys = mixed })
			v.put(slot, must(os.ReadFile(foreign.UKI))(t))
		}, "the image is not signed for this machine"},
		{"Secure Boot off, and no keys to enrol", func(v *installed) {
			output(t, "cp", "/usr/share/OVMF/OVMF_VARS_4M.fd", v.path(varsFile))
			v.mtools("mdeltree", "::/loader/keys")
		}, "the state stays locked: since Secure Boot is off"},
		{"Secure Boot with foreign keys", func(v *installed) {
			// The firmware enrols the keys of another maker, whose loader starts our signed image.
			output(t, "cp", "/usr/share/OVMF/OVMF_VARS_4M.fd", v.path(varsFile))
			for at, program := range map[string]string{
				slot: b.UKI, "EFI/BOOT/BOOTX64.EFI": filepath.Join(b.options.Work, "BOOTX64.EFI"),
			} {
				signed := filepath.Join(t.TempDir(), "signed.efi")
				output(t, "sbsign", "--key", m.path("foreign/db.key"), "--cert", m.path("foreign/db.crt"),
					"--output", signed, program)
				v.put(at, must(os.ReadFile(signed))(t))
			}
			for _, key := range []string{"PK", "KEK", "db"} {
				v.put("loader/keys/auto/"+key+".auth", must(os.ReadFile(m.path("foreign/"+key+".auth")))(t))
			}
		}, "PCR 7, which measures the Secure Boot state and its certificates"},
		{"command line by an entry of the loader", func(v *installed) {
			v.put("loader/entries/evil.conf", entry("init=/bin/sh systemd.unit=rescue.target"))
			v.put("loader/loader.conf", []byte("timeout 0\ndefault evil.conf\neditor yes\n"))
		}, "PCR 12, which measures the kernel's command line and other overrides"},
		{"credential beside the image", func(v *installed) {
			v.put(slot+".extra.d/passwd.hashed-password.root.cred", []byte("$6$x$y"))
		}, "PCR 12, which measures the kernel's command line and other overrides"},
		{"credential of the loader", func(v *installed) {
			v.put("loader/credentials/tmpfiles.extra.cred", []byte("f+ /etc/motd - - - - x"))
		}, "PCR 12, which measures the kernel's command line and other overrides"},
		{"extension beside the image", func(v *installed) {
			v.put(slot+".extra.d/evil.raw", bytes.Repeat([]byte("evil"), 4096))
		}, "PCR 13, which measures system extensions"},
		{"a second disk with an image", func(v *installed) {
			v.drive = filepath.Join(t.TempDir(), "second")
			output(t, "cp", "--sparse=always", b.raw, v.drive)
		}, "there are 2 disks with an image"},
		{"another machine's TPM", func(v *installed) {
			must(0, os.RemoveAll(v.path(tpmDir)))(t)
			must(0, os.Mkdir(v.path(tpmDir), 0o700))(t)
		}, "the disk belongs to another TPM"},
		{"header of the state", func(v *installed) { v.overwrite(t, 0, 32<<20) }, "is damaged, or of something else"},
		{"file system of the state", func(v *installed) { v.overwrite(t, 16<<20, 24<<20) }, "FAILED disk"},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := install(t)
			before := v.vm.copy(t)
			c.change(v)
			v.vm.t = t
			v.vm.start()
			v.never(c.words)
			v.kill()
			if t.Failed() || c.words == "Access Denied" { // nothing has come as far as the TPM
				return
			}
			// Not a lockout, and nothing was destroyed: the machine of before serves.
			if !strings.Contains(c.name, "another machine") {
				must(0, os.RemoveAll(before.path(tpmDir)))(t)
				output(t, "cp", "-r", v.path(tpmDir), before.path(tpmDir))
			}
			before.start()
			before.ready()
			signs(t, v.shop, before.operator())
		})
	}
}

// overwrite overwrites a part of the partition of the state, which begins behind the ESP.
func (v *installed) overwrite(t *testing.T, from, to int64) {
	t.Helper()
	start := int64(0)
	for line := range strings.Lines(output(t, "sfdisk", "--dump", v.path(diskFile))) {
		if strings.Contains(line, "countersign-state") {
			_, after, _ := strings.Cut(line, "start=")
			number, _, _ := strings.Cut(strings.TrimSpace(after), ",")
			for _, digit := range number {
				start = start*10 + int64(digit-'0')
			}
		}
	}
	if start == 0 {
		t.Fatal("the disk has no state")
	}
	f := must(os.OpenFile(v.path(diskFile), os.O_WRONLY, 0))(t)
	defer f.Close()
	must(f.WriteAt(bytes.Repeat([]byte{0xa5}, int(to-from)), start*512+from))(t)
}

// TestSettingsOnTheESP changes the settings on the ESP after the first boot: they count for nothing
// until somebody at the console takes them.
func TestSettingsOnTheESP(t *testing.T) {
	long(t)
	v := install(t)
	text := string(v.get("countersign.toml"))
	v.put("countersign.toml", []byte("peers = [\"192.0.2.0/24\"]\n"+text))
	v.vm.start()
	v.ready()
	v.see("countersign.toml on the ESP has other settings than those in force")
	ann := v.operator()
	signs(t, v.shop, ann) // from a network that the ESP's settings leave out
	v.typeLine("e")
	v.see("Type yes to put these settings in force")
	v.typeLine("yes")
	v.eventually(bootTime, "the firewall keeps the peer out", func() bool {
		args := []string{"sign", "--json", "--timeout", "2s", "--context", "test", "image_test.go"}
		_, err := ann.try(append(args, v.shop...)...)
		return err != nil
	})
	v.off()
}
