package image

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"debug/elf"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"countersign/internal/durable"
	"countersign/internal/machine"
	"countersign/tpm"
)

// Options say what image is made.
type Options struct {
	Source   string // the project
	Variant  string // vm or rack
	Keys     string // the folder of keys.sh
	Programs string // a folder with countersignd and countersign-machine
	Cache    string // of Debian packages
	Work     string // an empty folder
	Mirrors  Mirrors
	Version  string
	Rollback uint64   // 0: that of image/rollback
	Cmdline  string   // more for the kernel's command line
	Level    int      // of zstd, 1 to 19
	Modules  []string // paths of vendors' PKCS#11 modules
	Epoch    int64    // Unix seconds: the time of all files
	Log      io.Writer
}

// Built is an image.
type Built struct {
	UKI      string // path of the signed unified kernel image
	Kernel   string
	Initrd   string
	PCR11    []byte
	Rollback uint64
}

// oldest is how many rollback versions back the disks may be sealed that an image opens.
const oldest = 64

// Build makes a signed unified kernel image.
func Build(ctx context.Context, o Options) (b Built, err error) {
	b.Rollback = o.Rollback
	if b.Rollback == 0 {
		text, err := os.ReadFile(filepath.Join(o.Source, "image/rollback"))
		if err != nil {
			return b, err
		}
		if b.Rollback, err = strconv.ParseUint(strings.TrimSpace(string(text)), 10, 32); err != nil {
			return b, fmt.Errorf("image/rollback: %w", err)
		}
	}
	unpacked := filepath.Join(o.Work, "packages")
	kernel, err := o.unpack(ctx, unpacked)
	if err != nil {
		return b, err
	}
	root := filepath.Join(o.Work, "root")
	if err := o.root(ctx, unpacked, root, kernel, b.Rollback); err != nil {
		return b, err
	}
	b.Initrd, b.UKI = filepath.Join(o.Work, "initrd.zst"), filepath.Join(o.Work, "image.efi")
	if err := o.pack(ctx, root, b.Initrd); err != nil {
		return b, err
	}
	b.Kernel = filepath.Join(unpacked, "boot/vmlinuz-"+kernel)
	return b, o.uki(ctx, unpacked, root, &b)
}

// unpack fetches and unpacks the packages of the variant, and returns the release of the kernel.
func (o Options) unpack(ctx context.Context, to string) (kernel string, err error) {
	lock, err := ReadLock(filepath.Join(o.Source, "image/packages.lock"))
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(to, 0o755); err != nil {
		return "", err
	}
	for _, list := range []string{"packages", "packages." + o.Variant} {
		names, err := readList(filepath.Join(o.Source, "image", list))
		if err != nil {
			return "", err
		}
		for _, name := range names {
			p, err := lock.Find(name)
			if err != nil {
				return "", err
			}
			path, err := lock.Fetch(ctx, o.Mirrors, o.Cache, p)
			if err != nil {
				return "", err
			}
			if err := tool(ctx, "dpkg-deb", "--extract", path, to); err != nil {
				return "", err
			}
		}
	}
	found, err := filepath.Glob(filepath.Join(to, "boot/vmlinuz-*"))
	if err != nil || len(found) != 1 {
		return "", fmt.Errorf("the packages have %d kernels, want 1: %w", len(found), err)
	}
	return strings.TrimPrefix(filepath.Base(found[0]), "vmlinuz-"), nil
}

// readList reads a list with an entry in each line, and comments.
func readList(path string) (all []string, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		line, _, _ = strings.Cut(line, "#")
		if line = strings.TrimSpace(line); line != "" {
			all = append(all, line)
		}
	}
	return all, nil
}

// tool runs a program of this machine.
func tool(ctx context.Context, program string, args ...string) error {
	out, err := exec.CommandContext(ctx, program, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", program, strings.Join(args, " "), err, out)
	}
	return nil
}

// root makes the folder of the initramfs.
func (o Options) root(ctx context.Context, unpacked, root, kernel string, rollback uint64) error {
	t, err := newTree(unpacked, root)
	if err != nil {
		return err
	}
	for _, list := range []string{"files", "files." + o.Variant} {
		if err := t.addList(filepath.Join(o.Source, "image", list)); err != nil {
			return err
		}
	}
	if err := o.certificates(root); err != nil {
		return err
	}
	if err := o.modules(ctx, t, unpacked, root, kernel); err != nil {
		return err
	}
	if err := os.CopyFS(root, os.DirFS(filepath.Join(o.Source, "image/root"))); err != nil {
		return err
	}
	if err := o.programs(t, root); err != nil {
		return err
	}
	for _, folder := range []string{"dev", "proc", "sys", "run", "tmp", "efi", "state", "root", "var/lib", "var/tmp",
		"var/log", "usr/share/countersign", "etc/countersign"} {
		if err := os.MkdirAll(filepath.Join(root, folder), 0o755); err != nil {
			return err
		}
	}
	_, err = os.Stat(filepath.Join(o.Keys, "TEST"))
	image := machine.Image{Version: o.Version, Variant: o.Variant, Rollback: rollback, Test: err == nil}
	says, err2 := json.Marshal(image)
	released, err3 := os.ReadFile(filepath.Join(o.Keys, "release.keys"))
	return errors.Join(err2, err3,
		os.Symlink("usr/lib/systemd/systemd", filepath.Join(root, "init")),
		os.WriteFile(filepath.Join(root, "usr/share/countersign/image.json"), says, 0o644),
		os.WriteFile(filepath.Join(root, "usr/share/countersign/release.keys"), released, 0o644),
		os.WriteFile(filepath.Join(root, "etc/os-release"), []byte(o.release()), 0o644),
		os.Chmod(filepath.Join(root, "tmp"), 0o777|fs.ModeSticky),
		os.Chmod(filepath.Join(root, "var/tmp"), 0o777|fs.ModeSticky))
}

// release is os-release(5). systemd-boot sorts by IMAGE_VERSION.
func (o Options) release() string {
	return fmt.Sprintf("ID=countersign\nNAME=\"Countersign appliance\"\nPRETTY_NAME=\"Countersign %s\"\n"+
		"VERSION_ID=%s\nIMAGE_ID=countersign-%s\nIMAGE_VERSION=%s\n", o.Version, o.Version, o.Variant, o.Version)
}

// certificates makes one file of the certificates of ca-certificates.
func (o Options) certificates(root string) error {
	folder := filepath.Join(root, "usr/share/ca-certificates")
	files, err := filepath.Glob(filepath.Join(folder, "mozilla/*.crt"))
	if err != nil || len(files) < 100 {
		return fmt.Errorf("ca-certificates has %d certificates: %w", len(files), err)
	}
	slices.Sort(files)
	var all []byte
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return err
		}
		all = append(all, b...)
	}
	to := filepath.Join(root, "etc/ssl/certs")
	return errors.Join(os.MkdirAll(to, 0o755), os.WriteFile(filepath.Join(to, "ca-certificates.crt"), all, 0o644),
		os.RemoveAll(folder))
}

// modules copies the kernel's modules of the variant, those that they need, and their firmware.
func (o Options) modules(ctx context.Context, t *tree, unpacked, root, kernel string) error {
	names, err := readList(filepath.Join(o.Source, "image/modules."+o.Variant))
	if err != nil {
		return err
	}
	if err := tool(ctx, "depmod", "--basedir", unpacked, kernel); err != nil {
		return err
	}
	from := filepath.Join(unpacked, "lib/modules", kernel)
	var paths []string
	for _, name := range names {
		if strings.HasSuffix(name, "/") {
			collect := func(path string, e fs.DirEntry, err error) error {
				if base, is := strings.CutSuffix(filepath.Base(path), ".ko"); err == nil && is {
					paths = append(paths, base)
				}
				return err
			}
			if err := filepath.WalkDir(filepath.Join(from, "kernel", name), collect); err != nil {
				return err
			}
			continue
		}
		paths = append(paths, name)
	}
	builtin, err := os.ReadFile(filepath.Join(from, "modules.builtin"))
	if err != nil {
		return err
	}
	for _, name := range paths {
		out, err := exec.CommandContext(ctx, "modprobe", "--dirname", unpacked, "--set-version", kernel,
			"--show-depends", name).CombinedOutput()
		if err != nil {
			if file := "/" + strings.ReplaceAll(name, "-", "_") + ".ko"; bytes.Contains(
				bytes.ReplaceAll(builtin, []byte("-"), []byte("_")), []byte(file)) {
				continue
			}
			return fmt.Errorf("modprobe %s: %w: %s", name, err, out)
		}
		for line := range strings.Lines(string(out)) {
			path, is := strings.CutPrefix(strings.TrimSpace(line), "insmod ")
			if !is {
				continue
			}
			path, _, _ = strings.Cut(path, " ")
			within, _ := filepath.Rel(unpacked, path)
			if err := t.add(within); err != nil {
				return err
			}
			if err := o.firmware(ctx, t, unpacked, path); err != nil {
				return err
			}
		}
	}
	for _, file := range []string{"modules.builtin", "modules.builtin.modinfo", "modules.order"} {
		if err := t.add(filepath.Join("lib/modules", kernel, file)); err != nil {
			return err
		}
	}
	return tool(ctx, "depmod", "--basedir", root, kernel)
}

// firmware copies the firmware that a module names and that a package has.
func (o Options) firmware(ctx context.Context, t *tree, unpacked, module string) error {
	out, err := exec.CommandContext(ctx, "modinfo", "--field", "firmware", module).Output()
	if err != nil {
		return fmt.Errorf("modinfo %s: %w", module, err)
	}
	for name := range strings.FieldsSeq(string(out)) {
		found, _ := filepath.Glob(filepath.Join(unpacked, "lib/firmware", name))
		for _, path := range found {
			within, _ := filepath.Rel(unpacked, path)
			if err := t.add(within); err != nil {
				return err
			}
		}
	}
	return nil
}

// programs installs the programs with their units.
func (o Options) programs(t *tree, root string) error {
	for _, name := range []string{"countersignd", "countersign-machine"} {
		b, err := os.ReadFile(filepath.Join(o.Programs, name))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(root, "usr/bin", name), b, 0o755); err != nil {
			return err
		}
		if err := t.addLibraries(name, filepath.Join(o.Programs, name)); err != nil {
			return err
		}
	}
	units := filepath.Join(o.Source, "packaging/systemd")
	for _, name := range []string{"countersignd.service", "countersignd-keys@.service", "countersignd-admin.socket",
		"countersignd-keys.socket"} {
		b, err := os.ReadFile(filepath.Join(units, name))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(root, "usr/lib/systemd/system", name), b, 0o644); err != nil {
			return err
		}
	}
	b, err := os.ReadFile(filepath.Join(units, "countersign.tmpfiles"))
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(root, "usr/lib/tmpfiles.d/countersign.conf"), b, 0o644)
}

// pack makes the initramfs.
func (o Options) pack(ctx context.Context, root, to string) error {
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() && filepath.Base(path) != "tmp" {
			err = os.Chmod(path, 0o755)
		} else if err == nil && e.Type().IsRegular() {
			var info fs.FileInfo
			if info, err = e.Info(); err == nil {
				err = os.Chmod(path, 0o644|info.Mode().Perm()&0o111)
			}
		}
		return err
	})
	if err != nil {
		return err
	}
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	defer f.Close()
	zstd := exec.CommandContext(ctx, "zstd", "-q", "-T1", "-"+strconv.Itoa(cmp.Or(o.Level, 19)))
	zstd.Stdout = f
	var complaints bytes.Buffer
	zstd.Stderr = &complaints
	in, err := zstd.StdinPipe()
	if err == nil {
		err = zstd.Start()
	}
	if err != nil {
		return err
	}
	err = writeCPIO(in, root, o.Epoch)
	if err == nil && len(o.Modules) > 0 {
		err = o.packModules(root, in)
	}
	if err := errors.Join(err, in.Close(), zstd.Wait()); err != nil {
		return fmt.Errorf("zstd: %w: %s", err, complaints.String())
	}
	return nil
}

// modulesFolder has vendors' modules, with the libraries that the image does not have.
const modulesFolder = "usr/lib/countersign-modules"

// packModules makes an initrd of their own of vendors' modules and their configuration files. The
// kernel unpacks it over the one before.
func (o Options) packModules(root string, to io.Writer) error {
	own := filepath.Join(o.Work, "modules")
	libraries := map[string]bool{} // those of modules that other modules need: the loader must find them
	names := map[string]bool{}
	for _, path := range o.Modules {
		if name := filepath.Base(path); names[name] {
			return fmt.Errorf("module %s: another one has the name %s, too", path, name)
		}
		names[filepath.Base(path)] = true
		f, err := elf.Open(path)
		if format := new(elf.FormatError); errors.As(err, &format) {
			continue // a configuration file
		} else if err != nil {
			return fmt.Errorf("module %s: %w", path, err)
		}
		needed, err := f.ImportedLibraries()
		f.Close()
		if err != nil {
			return fmt.Errorf("module %s: %w", path, err)
		}
		for _, library := range needed {
			if _, err := os.Stat(filepath.Join(root, "usr/lib/x86_64-linux-gnu", library)); err == nil {
				continue
			}
			if _, err := os.Stat(filepath.Join(root, "usr/lib64", library)); err == nil {
				continue
			}
			libraries[library] = true
			if !slices.ContainsFunc(o.Modules, func(m string) bool { return filepath.Base(m) == library }) {
				return fmt.Errorf("module %s needs the library %s, which the image does not have: name it as a "+
					"module, too", path, library)
			}
		}
	}
	for _, path := range o.Modules {
		name, folder := filepath.Base(path), filepath.Join(own, modulesFolder)
		if libraries[name] {
			folder = filepath.Join(own, "usr/lib/x86_64-linux-gnu")
		}
		b, err := os.ReadFile(path)
		if err == nil {
			err = os.MkdirAll(folder, 0o755)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(folder, name), b, 0o755)
		}
		if err != nil {
			return err
		}
	}
	return writeCPIO(to, own, o.Epoch)
}

// uki makes and signs the unified kernel image.
func (o Options) uki(ctx context.Context, unpacked, root string, b *Built) error {
	read := func(path string) (content []byte) {
		content, err := os.ReadFile(path)
		if err != nil && b.UKI != "" {
			content = nil
		}
		return content
	}
	stub := read(filepath.Join(unpacked, "usr/lib/systemd/boot/efi/linuxx64.efi.stub"))
	kernel, initrd := read(b.Kernel), read(b.Initrd)
	if stub == nil || kernel == nil || initrd == nil {
		return errors.New("the stub, the kernel or the initramfs can't be read")
	}
	text, err := os.ReadFile(filepath.Join(o.Source, "image/cmdline"))
	if err != nil {
		return err
	}
	cmdline := strings.Join(append(strings.Fields(string(text)), strings.Fields(o.Cmdline)...), " ")
	signer, public, err := readPCRKey(filepath.Join(o.Keys, "pcr.key"))
	if err != nil {
		return err
	}
	sections := []Section{
		{".osrel", []byte(o.release())}, {".cmdline", []byte(cmdline)}, {".pcrpkey", public},
		{".initrd", initrd}, {".linux", kernel},
	}
	b.PCR11 = PCR11(sections)
	var minima []uint64
	for m := b.Rollback; m >= 1 && b.Rollback-m < oldest; m-- {
		minima = append(minima, m)
	}
	signed, err := tpm.SignImage(signer, b.PCR11, PCR12(cmdline), minima...)
	if err != nil {
		return err
	}
	states, err := json.Marshal(signed)
	if err != nil {
		return err
	}
	made, err := UKI(stub, slices.Insert(sections, 3, Section{".pcrsig", states}))
	if err != nil {
		return err
	}
	return o.sign(ctx, made, b.UKI)
}

// readPCRKey reads the key that signs measurements, and returns its public half in PEM.
func readPCRKey(path string) (*ecdsa.PrivateKey, []byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, nil, fmt.Errorf("%s is not PEM", path)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	signer, is := key.(*ecdsa.PrivateKey)
	if err != nil || !is {
		return nil, nil, fmt.Errorf("%s is no ECDSA key in PKCS #8", path)
	}
	der, err := x509.MarshalPKIXPublicKey(signer.Public())
	return signer, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), err
}

// sign signs a program for Secure Boot, with the time of the image.
func (o Options) sign(ctx context.Context, program []byte, to string) error {
	unsigned := to + ".unsigned"
	if err := os.WriteFile(unsigned, program, 0o644); err != nil {
		return err
	}
	at := time.Unix(o.Epoch, 0).UTC().Format("2006-01-02 15:04:05")
	cmd := exec.CommandContext(ctx, "faketime", "-f", at, "sbsign", "--key", filepath.Join(o.Keys, "db.key"),
		"--cert", filepath.Join(o.Keys, "db.crt"), "--output", to, unsigned)
	cmd.Env = append(os.Environ(), "TZ=UTC")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("sbsign: %w: %s", err, out)
	}
	return os.Remove(unsigned)
}

// loaderConf is the configuration of systemd-boot. A firmware in setup mode gets the keys of the
// image's maker, after a countdown on the screen.
const loaderConf = `timeout 0
editor no
auto-firmware no
secure-boot-enroll force
`

const (
	espStart = 1 << 20 // bytes
	mib      = 1 << 20
)

// Disk makes a disk with an ESP of some megabytes; a machine makes the partition of its state at
// its first boot. settings is a file for the ESP, or "". entries are further files of the ESP by
// path.
func (o Options) Disk(ctx context.Context, b Built, to, settings string, entries map[string]string) error {
	info, err := os.Stat(b.UKI)
	if err != nil {
		return err
	}
	megabytes := max(256, (4*info.Size()/mib+63)/64*64)
	esp := filepath.Join(o.Work, "esp.fat")
	defer os.Remove(esp)
	boot := filepath.Join(o.Work, "BOOTX64.EFI")
	loader, err := os.ReadFile(filepath.Join(o.Work, "packages/usr/lib/systemd/boot/efi/systemd-bootx64.efi"))
	if err != nil {
		return err
	}
	if err := o.sign(ctx, loader, boot); err != nil {
		return err
	}
	conf := filepath.Join(o.Work, "loader.conf")
	if err := os.WriteFile(conf, []byte(loaderConf), 0o644); err != nil {
		return err
	}
	files := map[string]string{
		"EFI/BOOT/BOOTX64.EFI": boot, "EFI/Linux/" + SlotName(o.Version): b.UKI, "loader/loader.conf": conf,
	}
	for _, key := range []string{"PK", "KEK", "db"} {
		files["loader/keys/auto/"+key+".auth"] = filepath.Join(o.Keys, key+".auth")
	}
	if settings != "" {
		files["countersign.toml"] = settings
	}
	for at, from := range entries {
		files[at] = from
	}
	if err := o.fat(ctx, esp, int64(megabytes), files); err != nil {
		return err
	}
	return o.gpt(ctx, esp, to, int64(megabytes))
}

// SlotName is the name of an image's file in EFI/Linux.
func SlotName(version string) string { return "countersign_" + version + ".efi" }

// fat makes a FAT file system with files.
func (o Options) fat(ctx context.Context, path string, megabytes int64, files map[string]string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(megabytes*mib), f.Close()); err != nil {
		return err
	}
	if err := tool(ctx, "mkfs.fat", "-F", "32", "-n", "CSIGN-ESP", "-i", "c0517e51", "--invariant", path); err != nil {
		return err
	}
	folders := map[string]bool{}
	var names []string
	for at := range files {
		names = append(names, at)
		for folder := filepath.Dir(at); folder != "."; folder = filepath.Dir(folder) {
			folders[folder] = true
		}
	}
	slices.Sort(names)
	var all []string
	for folder := range folders {
		all = append(all, folder)
	}
	slices.Sort(all)
	mtools := func(args ...string) error {
		at := time.Unix(o.Epoch, 0).UTC().Format("2006-01-02 15:04:05")
		cmd := exec.CommandContext(ctx, "faketime", append([]string{"-f", at}, args...)...)
		cmd.Env = append(os.Environ(), "MTOOLS_SKIP_CHECK=1", "TZ=UTC")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
		}
		return nil
	}
	for _, folder := range all {
		if err := mtools("mmd", "-i", path, "::"+folder); err != nil {
			return err
		}
	}
	for _, at := range names {
		if err := mtools("mcopy", "-i", path, files[at], "::"+at); err != nil {
			return err
		}
	}
	return nil
}

// Ids of the partition table: the same in each image, and new in no machine.
const (
	diskID = "3C5C1A52-7C0E-4E1B-9E57-0C05170E51A1"
	espID  = "3C5C1A52-7C0E-4E1B-9E57-0C05170E51A2"
	espGPT = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
)

// gpt makes a disk with the ESP.
func (o Options) gpt(ctx context.Context, esp, to string, megabytes int64) error {
	os.Remove(to)
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(espStart + (megabytes+1)*mib); err != nil {
		return err
	}
	table := fmt.Sprintf("label: gpt\nlabel-id: %s\nfirst-lba: 2048\n"+
		"start=2048, size=%d, type=%s, uuid=%s, name=countersign-esp\n", diskID, megabytes*mib/512, espGPT, espID)
	cmd := exec.CommandContext(ctx, "sfdisk", "--quiet", to)
	cmd.Stdin = strings.NewReader(table)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("sfdisk: %w: %s", err, out)
	}
	content, err := os.Open(esp)
	if err != nil {
		return err
	}
	defer content.Close()
	if err := copySparse(f, content, espStart); err != nil {
		return err
	}
	return errors.Join(f.Sync(), durable.Sync(filepath.Dir(to)))
}

// copySparse copies a file to an offset, and leaves out zeros.
func copySparse(to *os.File, from io.Reader, at int64) error {
	buffer, zero := make([]byte, mib), make([]byte, mib)
	for {
		n, err := io.ReadFull(from, buffer)
		if n > 0 && !bytes.Equal(buffer[:n], zero[:n]) {
			if _, err := to.WriteAt(buffer[:n], at); err != nil {
				return err
			}
		}
		at += int64(n)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// QCOW2 makes a disk in QEMU's format of a raw one.
func QCOW2(ctx context.Context, raw, to string) error {
	return tool(ctx, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", raw, to)
}
