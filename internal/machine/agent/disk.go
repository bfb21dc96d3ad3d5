package agent

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"countersign/internal/durable"
	"countersign/internal/machine"
	"countersign/internal/secret"
	"countersign/tpm"

	"golang.org/x/sys/unix"
)

// The disk has an ESP, which anybody with the disk can change, and a partition with the state,
// which only this machine can read. Invariants:
//
//   - A partition of the name newState has nothing that matters, and is made anew at each boot. The
//     name becomes State when the partition is complete.
//   - A partition of the name State is never made anew, whatever it looks like.
//   - A partition of the name goingState is being destroyed: the next boot goes on with that.
//   - The TPM unseals the key of the disk before any byte of the state is read, and not afterwards.
//   - A seal for the next minimal version is in the header before the counter rises, and the one
//     before goes afterwards. A power cut leaves one that opens.
const (
	espLabel   = "countersign-esp"
	newState   = "countersign-new"
	State      = "countersign-state"
	goingState = "countersign-going"

	minState = 256 << 20 // bytes

	ESPFolder   = "/efi"
	stateFolder = "/state"
	runFolder   = "/run/countersign-machine"
)

const imageFile = "/usr/share/countersign/image.json"

// ReadImage reads the description of the running image.
func ReadImage() (i machine.Image, err error) {
	b, err := os.ReadFile(imageFile)
	if err == nil {
		err = json.Unmarshal(b, &i)
	}
	return i, err
}

// Files that systemd-stub brings along from the sections .pcrsig and .pcrpkey.
const (
	signatureFile = "/.extra/tpm2-pcr-signature.json"
	policyKeyFile = "/.extra/tpm2-pcr-public-key.pem"
)

// Disk is the disk of a machine, while it is opened at the boot.
type Disk struct {
	Log io.Writer

	volumes   tpm.Volumes
	image     machine.Image
	signed    []tpm.ImageState
	approver  []byte // nil: the image has no key of its signer
	disk      string // such as /dev/vda
	esp       string // such as /dev/vda1
	partition string
	try       bool
	ended     bool // the TPM unseals no disk any more
}

// tpmDevice is the kernel's TPM.
const tpmDevice = "/dev/tpmrm0"

// key of the LUKS volume: random, so that the key derivation has nothing to slow down.
const keySize = 64

// luksToken is the token of the LUKS2 header with the seal of the volume's key.
type luksToken struct {
	Type     string         `json:"type"`
	Keyslots []string       `json:"keyslots"`
	Seal     *tpm.VolumeKey `json:"seal,omitempty"`
	Try      []byte         `json:"try,omitempty"` // the key itself: a machine for tries protects nothing
}

const (
	sealToken = "countersign-tpm2"
	tryToken  = "countersign-try"
)

// Open finds the disk that the machine has booted from, makes the state at the first boot, unlocks
// and mounts it.
func (d *Disk) Open(ctx context.Context) (err error) {
	err = d.open(ctx)
	if !d.ended { // also without a disk: nothing that runs from here on may open one
		err = errors.Join(err, d.end(ctx))
	}
	return err
}

// end has the TPM unseal no disk in this boot any more.
func (d *Disk) end(ctx context.Context) error {
	d.ended = true
	if _, err := os.Stat(tpmDevice); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := d.volumes.End(ctx); err != nil && !d.try {
		return fmt.Errorf("the TPM would open the disk for others, too: %w", err)
	}
	return nil
}

func (d *Disk) open(ctx context.Context) (err error) {
	d.volumes.Config = tpm.Config{Device: tpmDevice, Deadline: 2 * time.Minute}
	// The consoles and the daemon have their socket there, whatever the umask.
	if err := errors.Join(os.MkdirAll(runFolder, 0o755), os.Chmod(runFolder, 0o755)); err != nil {
		return err
	}
	if d.image, err = ReadImage(); err != nil {
		return fmt.Errorf("the image: %w", err)
	}
	if err := d.readSignatures(); err != nil {
		return err
	}
	if err := d.find(ctx); err != nil {
		return err
	}
	if err := mountESP(d.esp, true); err != nil {
		return err
	}
	name, err := d.findState(ctx)
	if err != nil {
		return err
	}
	if name == State {
		if err := errors.Join(d.unlock(ctx), d.end(ctx)); err != nil {
			return err
		}
		if err := d.mount(ctx); err != nil {
			return err
		}
		if err := mkdirs(); err != nil {
			return err
		}
		return d.finish(ctx)
	}
	if name == goingState {
		if err := d.destroy(ctx); err != nil {
			return fmt.Errorf("the factory reset goes on: %w", err)
		}
	}
	offered, err := d.offered()
	if err != nil {
		return fmt.Errorf("countersign.toml on the ESP: %w", err)
	}
	d.try = offered.Setup.Try || cmdline("countersign.try")
	if err := errors.Join(d.make(ctx, name != ""), d.end(ctx)); err != nil {
		return fmt.Errorf("the first boot: %w", err)
	}
	if err := d.mount(ctx); err != nil {
		return err
	}
	if err := errors.Join(mkdirs(), offered.write(settingsFile)); err != nil {
		return err
	}
	// From here on the partition has a state.
	if err := d.name(ctx, State); err != nil {
		return err
	}
	return d.finish(ctx)
}

// finish records the kind of the machine for the other programs, and loads the drivers of drives:
// none can be loaded later.
func (d *Disk) finish(ctx context.Context) error {
	run(ctx, nil, "modprobe", "--quiet", "--all", "usb_storage", "uas", "sd_mod", "vfat", "nls_cp437", "nls_ascii",
		"nls_utf8") // of which the VM image has some
	return writeJSON(filepath.Join(runFolder, "disk.json"), diskFacts{Disk: d.disk, ESP: d.esp, Partition: d.partition,
		Try: d.try})
}

// diskFacts is the file of finish.
type diskFacts struct {
	Disk, ESP, Partition string
	Try                  bool
}

// settingsFile has the settings of the machine.
const settingsFile = stateFolder + "/machine/countersign.toml"

// offered are the settings of the ESP, which count at the first boot.
func (d *Disk) offered() (Settings, error) {
	b, err := readBounded(filepath.Join(ESPFolder, "countersign.toml"), maxSettings+1)
	if errors.Is(err, fs.ErrNotExist) {
		return Settings{}, nil
	} else if err != nil {
		return Settings{}, err
	}
	return ParseSettings(b)
}

// readBounded reads the begin of a file.
func readBounded(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, most))
}

func (d *Disk) readSignatures() error {
	b, err := os.ReadFile(signatureFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // an image that was not started by systemd-stub: for tries
	}
	if err == nil {
		err = json.Unmarshal(b, &d.signed)
	}
	if err == nil {
		d.approver, err = tpm.ReadPolicyKey(policyKeyFile)
	}
	if err != nil {
		return fmt.Errorf("the image's signature of its measurements: %w", err)
	}
	return nil
}

// cmdline reports a word of the kernel's command line, which is signed with the image.
func cmdline(word string) bool {
	b, _ := os.ReadFile("/proc/cmdline")
	return slices.Contains(strings.Fields(string(b)), word)
}

// find finds the ESP by what systemd-boot says, and the disk that has it.
func (d *Disk) find(ctx context.Context) error {
	by, entry := "/dev/disk/by-partlabel/"+espLabel, "ID_PART_ENTRY_NAME="+espLabel
	if uuid := strings.ToLower(efiText("LoaderDevicePartUUID-" + loaderVendor)); uuid != "" {
		by, entry = "/dev/disk/by-partuuid/"+uuid, "ID_PART_ENTRY_UUID="+uuid
	}
	if err := run(ctx, nil, "udevadm", "wait", "--timeout=180", by); err != nil {
		return fmt.Errorf("the disk that this machine has booted from (%s) does not come up: %w", by, err)
	}
	// All disks of an image have the same UUIDs, and the link would name any of them.
	if n, err := devicesWith(udevData, entry); err != nil {
		return err
	} else if n > 1 {
		return fmt.Errorf("there are %d disks with an image: unplug those that this machine does not boot from", n)
	}
	esp, err := filepath.EvalSymlinks(by)
	if err != nil {
		return err
	}
	at, err := filepath.EvalSymlinks("/sys/class/block/" + filepath.Base(esp))
	if err != nil {
		return err
	}
	d.esp, d.disk = esp, "/dev/"+filepath.Base(filepath.Dir(at))
	return nil
}

// udevData has a file for each device, with its properties.
const udevData = "/run/udev/data"

// devicesWith counts the block devices with a property.
func devicesWith(folder, property string) (n int, err error) {
	files, err := filepath.Glob(filepath.Join(folder, "b*"))
	if err != nil {
		return 0, err
	}
	for _, path := range files {
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return 0, err
		}
		if slices.Contains(strings.Split(string(b), "\n"), "E:"+property) {
			n++
		}
	}
	return n, nil
}

// partitionTable is the output of sfdisk --json.
type partitionTable struct {
	Table struct {
		Partitions []struct {
			Node, Name  string
			Start, Size int64 // in sectors
		}
		LastLBA    int64 `json:"lastlba"`
		SectorSize int64 `json:"sectorsize"`
	} `json:"partitiontable"`
}

// findState finds the partition of the state, and returns its name; "" is none.
func (d *Disk) findState(ctx context.Context) (name string, err error) {
	out, err := output(ctx, nil, "sfdisk", "--json", d.disk)
	if err != nil {
		return "", fmt.Errorf("the partition table of %s: %w", d.disk, err)
	}
	var t partitionTable
	if err := json.Unmarshal(out, &t); err != nil {
		return "", fmt.Errorf("the partition table of %s: %w", d.disk, err)
	}
	for _, p := range t.Table.Partitions {
		if p.Name == State || p.Name == newState || p.Name == goingState {
			if d.partition != "" {
				return "", fmt.Errorf("%s has two partitions for the state: %s and %s", d.disk, d.partition, p.Node)
			}
			d.partition, name = p.Node, p.Name
		}
	}
	return name, nil
}

// run runs a program with an input. Its output goes to stderr.
func run(ctx context.Context, stdin []byte, program string, args ...string) error {
	_, err := output(ctx, stdin, program, args...)
	return err
}

func output(ctx context.Context, stdin []byte, program string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stdin = bytes.NewReader(stdin)
	var out, complaints bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaints
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s: %w: %s", program, err, lastOf(complaints.String()))
	}
	return out.Bytes(), nil
}

// lastOf returns the end of a program's complaints.
func lastOf(text string) string {
	text = strings.TrimSpace(text)
	return text[max(0, len(text)-500):]
}

// secureBoot returns an error unless the firmware starts signed programs only.
func secureBoot() error {
	on, err := os.ReadFile(efivars + "SecureBoot-" + globalVendor)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return errors.New("this machine has not booted by UEFI, so that nobody has checked what was started: turn " +
			"UEFI and Secure Boot on, or try without protection: try = true in the table [setup] of countersign.toml")
	case err != nil:
		return err
	case len(on) == 5 && on[4] == 1:
		return nil
	}
	return errors.New("since Secure Boot is off, the firmware starts any program: in the firmware, go into the " +
		"setup mode of Secure Boot (delete its keys), and this image enrols its keys at the next boot; to try " +
		"without protection: try = true in the table [setup] of countersign.toml on the ESP")
}

// make makes the partition of the state, with an empty file system.
func (d *Disk) make(ctx context.Context, there bool) error {
	if !d.try {
		if err := secureBoot(); err != nil {
			return err
		}
		if d.approver == nil {
			return errors.New("the image has no signature of its measurements")
		}
	}
	if !there {
		if err := d.partitionState(ctx); err != nil {
			return err
		}
	}
	raw := make([]byte, keySize)
	rand.Read(raw)
	key := secret.New(raw)
	defer key.Wipe()
	fmt.Fprintf(d.Log, "the state is made on %s\n", d.partition)
	if err := run(ctx, nil, "wipefs", "--all", "--quiet", d.partition); err != nil {
		return err
	}
	if err := run(ctx, key.Expose(), "cryptsetup", "luksFormat", "--batch-mode", "--type=luks2", "--key-file=-",
		"--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000", "--label="+State, "--sector-size=4096",
		d.partition); err != nil {
		return err
	}
	token := luksToken{Type: tryToken, Keyslots: []string{"0"}, Try: key.Expose()}
	if !d.try {
		seal, err := d.volumes.Seal(ctx, key, d.approver, d.image.Rollback, false)
		if err != nil {
			return err
		}
		// The disk must open at the next boot, too.
		again, err := d.volumes.Unseal(ctx, seal, d.signed)
		if err != nil {
			return err
		}
		again.Wipe()
		token = luksToken{Type: sealToken, Keyslots: []string{"0"}, Seal: &seal}
	}
	if err := d.addToken(ctx, token); err != nil {
		return err
	}
	if err := d.decrypt(ctx, key); err != nil {
		return err
	}
	return run(ctx, nil, "mke2fs", "-q", "-t", "ext4", "-L", State, "-m", "1", mapped)
}

// mapped is the decrypted partition.
const mapped = "/dev/mapper/" + mappedName

const mappedName = "state"

// partitionState makes the partition, in the rest of the disk.
func (d *Disk) partitionState(ctx context.Context) error {
	size, err := os.ReadFile("/sys/class/block/" + filepath.Base(d.disk) + "/size")
	if err != nil {
		return err
	}
	sectors, _ := strconv.ParseInt(strings.TrimSpace(string(size)), 10, 64)
	espSize, err := os.ReadFile("/sys/class/block/" + filepath.Base(d.esp) + "/size")
	if err != nil {
		return err
	}
	used, _ := strconv.ParseInt(strings.TrimSpace(string(espSize)), 10, 64)
	if rest := (sectors - used) * 512; rest < minState+4<<20 {
		return fmt.Errorf("the disk %s has %d MiB beside the ESP, and the state needs %d: "+
			"give the machine a larger disk", d.disk, rest>>20, minState>>20)
	}
	if err := unmountESP(); err != nil {
		return err
	}
	// The image is smaller than the disk: the second partition table goes to the end first.
	if err := run(ctx, nil, "sfdisk", "--quiet", "--relocate", "gpt-bak-std", d.disk); err != nil {
		return err
	}
	line := "type=0FC63DAF-8483-4772-8E79-3D69D8477DE4, name=" + newState + "\n"
	if err := run(ctx, []byte(line), "sfdisk", "--quiet", "--append", d.disk); err != nil {
		return err
	}
	if err := run(ctx, nil, "udevadm", "settle", "--timeout=30"); err != nil {
		return err
	}
	if err := mountESP(d.esp, true); err != nil {
		return err
	}
	if name, err := d.findState(ctx); err != nil || name != newState {
		return fmt.Errorf("the new partition of %s is not there: %w", d.disk, err)
	}
	return run(ctx, nil, "udevadm", "wait", "--timeout=30", d.partition)
}

// name names the partition.
func (d *Disk) name(ctx context.Context, name string) error {
	number := strings.TrimLeft(strings.TrimPrefix(d.partition, d.disk), "p")
	if err := run(ctx, nil, "sfdisk", "--quiet", "--no-reread", "--force", "--part-label", d.disk, number,
		name); err != nil {
		return err
	}
	f, err := os.OpenFile(d.disk, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func (d *Disk) addToken(ctx context.Context, t luksToken) error {
	b, err := json.Marshal(t)
	if err != nil {
		return err
	}
	return run(ctx, b, "cryptsetup", "token", "import", "--json-file=-", d.partition)
}

// tokens returns the tokens of the LUKS2 header by number.
func (d *Disk) tokens(ctx context.Context) (map[string]luksToken, error) {
	out, err := output(ctx, nil, "cryptsetup", "luksDump", "--dump-json-metadata", d.partition)
	if err != nil {
		return nil, fmt.Errorf("the state on %s is damaged, or of something else: restore the appliance from a backup "+
			"on another disk, or reset this one: %w", d.partition, err)
	}
	var header struct {
		Tokens map[string]luksToken `json:"tokens"`
	}
	if err := json.Unmarshal(out, &header); err != nil {
		return nil, fmt.Errorf("the LUKS header of %s: %w", d.partition, err)
	}
	return header.Tokens, nil
}

// unlock decrypts the state.
func (d *Disk) unlock(ctx context.Context) error {
	tokens, err := d.tokens(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, number := range slices.Sorted(maps.Keys(tokens)) {
		t := tokens[number]
		var key secret.Bytes
		switch {
		case t.Type == tryToken && len(t.Try) == keySize:
			d.try, key = true, secret.New(t.Try)
		case t.Type == sealToken && t.Seal != nil && !bytes.Equal(t.Seal.Approver, d.approver):
			errs = append(errs, fmt.Errorf("%w: its disk was sealed for images of another signer", tpm.ErrForeignImage))
			continue
		case t.Type == sealToken && t.Seal != nil:
			if err := d.inSecureBoot(); err != nil {
				return err
			}
			if key, err = d.volumes.Unseal(ctx, *t.Seal, d.signed); err != nil {
				errs = append(errs, err)
				continue
			}
		default:
			continue
		}
		defer key.Wipe()
		if err := d.decrypt(ctx, key); err != nil {
			return err
		}
		if t.Seal == nil {
			return nil
		}
		return d.sealNext(ctx, tokens, number, key)
	}
	if len(errs) == 0 {
		return fmt.Errorf("the LUKS header of %s has no seal of this machine: restore the appliance from a backup, or "+
			"reset the machine", d.partition)
	}
	return mostTelling(errs)
}

// inSecureBoot refuses a boot in which nobody has checked what was started, with words that need no
// register.
func (d *Disk) inSecureBoot() error {
	if err := secureBoot(); err != nil {
		return fmt.Errorf("the state stays locked: %w", err)
	}
	return nil
}

// mostTelling returns the error that an operator needs: a seal for a version that never came into
// use says nothing.
func mostTelling(errs []error) error {
	i := slices.IndexFunc(errs, func(err error) bool { return !errors.Is(err, tpm.ErrStaleSeal) })
	return errs[max(i, 0)]
}

// sealNext keeps the header to the seal that opens and, in an image with a higher rollback version,
// to one for that version. Settle puts the second in force.
func (d *Disk) sealNext(ctx context.Context, tokens map[string]luksToken, number string, key secret.Bytes) error {
	for other, t := range tokens {
		if other != number && t.Type == sealToken {
			if err := run(ctx, nil, "cryptsetup", "token", "remove", "--token-id="+other, d.partition); err != nil {
				return err
			}
		}
	}
	if d.image.Rollback <= tokens[number].Seal.Minimum {
		return nil
	}
	seal, err := d.volumes.Seal(ctx, key, d.approver, d.image.Rollback, true)
	if err != nil {
		return err
	}
	return d.addToken(ctx, luksToken{Type: sealToken, Keyslots: []string{"0"}, Seal: &seal})
}

// decrypt decrypts the partition.
func (d *Disk) decrypt(ctx context.Context, key secret.Bytes) error {
	return run(ctx, key.Expose(), "cryptsetup", "open", "--type=luks2", "--key-file=-", d.partition, mappedName)
}

// mount checks and mounts the file system of the state.
func (d *Disk) mount(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, "e2fsck", "-p", mapped)
	if out, err := cmd.CombinedOutput(); err != nil && cmd.ProcessState.ExitCode() != 1 { // 1: corrected
		return fmt.Errorf("the file system of the state: e2fsck -p: %w: %s", err, bytes.TrimSpace(out))
	}
	if err := os.MkdirAll(stateFolder, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(mapped, stateFolder, "ext4", mountFlags|unix.MS_NOATIME, ""); err != nil {
		return fmt.Errorf("mount the state: %w", err)
	}
	return nil
}

const mountFlags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// places are the folders of the state, and where the appliance expects them.
var places = []struct{ of, at string }{
	{"etc", "/etc/countersign"}, {"countersign", "/var/lib/countersign"}, {"keys", "/var/lib/countersign-keys"},
	{"drill", "/var/lib/countersignd-drill"},
}

// mkdirs makes the folders of the state and mounts them in their places.
func mkdirs() error {
	if err := os.MkdirAll(stateFolder+"/machine", 0o700); err != nil {
		return err
	}
	for _, p := range places {
		from := filepath.Join(stateFolder, p.of)
		if err := errors.Join(os.MkdirAll(from, 0o700), os.MkdirAll(p.at, 0o700)); err != nil {
			return err
		}
		if err := unix.Mount(from, p.at, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("mount %s: %w", p.at, err)
		}
		if err := unix.Mount("", p.at, "", unix.MS_REMOUNT|unix.MS_BIND|mountFlags|unix.MS_NOATIME, ""); err != nil {
			return fmt.Errorf("mount %s: %w", p.at, err)
		}
	}
	return durable.Sync(stateFolder)
}

func mountESP(device string, readOnly bool) error {
	flags := uintptr(mountFlags)
	if readOnly {
		flags |= unix.MS_RDONLY
	}
	if err := os.MkdirAll(ESPFolder, 0o700); err != nil {
		return err
	}
	if err := unix.Mount(device, ESPFolder, "vfat", flags, "umask=0077,errors=remount-ro"); err != nil {
		return fmt.Errorf("mount the ESP: %w", err)
	}
	return nil
}

func unmountESP() error {
	if err := unix.Unmount(ESPFolder, 0); err != nil {
		return fmt.Errorf("unmount the ESP: %w", err)
	}
	return nil
}

func writeJSON(path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return durable.Replace(path, b, 0o644)
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

// resetDisk makes the state unreadable for ever. facts are those of the disk that was opened;
// without them, the disk is that of the boot.
func resetDisk(ctx context.Context, facts diskFacts) error {
	d := Disk{disk: facts.Disk, esp: facts.ESP}
	d.volumes.Config = tpm.Config{Device: tpmDevice, Deadline: 2 * time.Minute}
	if d.disk == "" {
		if err := d.find(ctx); err != nil {
			return err
		}
	}
	name, err := d.findState(ctx)
	switch {
	case err != nil:
		return err
	case name == "":
		return fmt.Errorf("%s has no partition with a state", d.disk)
	}
	if err := d.name(ctx, goingState); err != nil { // from here on there is no way back
		return err
	}
	return d.destroy(ctx)
}

// destroy destroys a partition of the name goingState: no copy of its seals opens any more, and the
// header with the seals is overwritten. The name says then that a new state can be made.
func (d *Disk) destroy(ctx context.Context) error {
	if _, err := os.Stat(tpmDevice); err == nil {
		if err := d.volumes.Forget(ctx); err != nil {
			return err
		}
	}
	f, err := os.OpenFile(d.partition, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(make([]byte, headerSize), 0)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return d.name(ctx, newState)
}

// headerSize is the size of a LUKS2 header with its key slots: 16 MiB.
const headerSize = 16 << 20
