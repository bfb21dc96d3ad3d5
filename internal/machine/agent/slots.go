package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"time"

	"countersign/internal/durable"
	"countersign/internal/machine"

	"golang.org/x/sys/unix"
)

// An ESP has one or two images in EFI/Linux: the one that runs, and another one. systemd-boot
// starts the newest one that has tries left (Automatic Boot Assessment: the name has +LEFT-DONE
// before .efi; a name without it is proven). Invariants:
//
//   - The image that runs, and the name that it has, are never written.
//   - A file gets a name that systemd-boot starts when all of its bytes are on the disk.
//   - An image that has not proven itself has tries left, or is never started again.
const imagesFolder = "EFI/Linux"

// tries of an image that is not proven yet.
const tries = 2

// slotForm is the form of an image's name: version, tries left, tries done.
var slotForm = regexp.MustCompile(`^countersign_([0-9a-z.-]+?)(?:\+([0-9]+)(?:-([0-9]+))?)?\.efi$`)

// slots lists the images of an ESP. running is the name of the one that runs, with or without its
// tries.
func slots(esp, running string) (all []machine.Slot, err error) {
	entries, err := os.ReadDir(filepath.Join(esp, imagesFolder))
	if err != nil {
		return nil, err
	}
	base := slotForm.FindStringSubmatch(running)
	for _, e := range entries {
		m := slotForm.FindStringSubmatch(e.Name())
		if m == nil {
			continue
		}
		s := machine.Slot{File: e.Name(), Version: m[1], Left: -1, Running: base != nil && base[1] == m[1]}
		if m[2] != "" {
			s.Left, _ = strconv.Atoi(m[2])
		}
		all = append(all, s)
	}
	return all, nil
}

// runningFile is the name of the image that runs, as systemd-boot says it.
func runningFile() string { return efiText("LoaderEntrySelected-" + loaderVendor) }

// counted reports that systemd-boot counts the tries of the image that runs.
func counted() bool { return efiText("LoaderBootCountPath-"+loaderVendor) != "" }

// GiveUp restarts the machine when an image that has not proven itself can't open the disk:
// systemd-boot then starts it once more, or the image of before.
func GiveUp(ctx context.Context) {
	if !counted() {
		return
	}
	select {
	case <-ctx.Done():
	case <-time.After(10 * time.Second): // for those who read the console
	}
	run(ctx, nil, "systemctl", "--no-block", "reboot")
}

// install writes the image of an update beside the one that runs. other images go first: the ESP
// has room for two.
func install(esp, running, version string, image io.Reader) error {
	all, err := slots(esp, running)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(all, func(s machine.Slot) bool { return s.Running }) {
		return fmt.Errorf("the ESP does not have the image that runs (%s): another disk was started", running)
	}
	folder := filepath.Join(esp, imagesFolder)
	leftovers, err := filepath.Glob(filepath.Join(folder, "*.new"))
	if err != nil {
		return err
	}
	for _, s := range all {
		if s.Version == version && s.Running {
			return fmt.Errorf("version %s runs already", version)
		}
		if !s.Running {
			leftovers = append(leftovers, filepath.Join(folder, s.File))
		}
	}
	for _, path := range leftovers {
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	if err := durable.Sync(folder); err != nil {
		return err
	}
	to := filepath.Join(folder, fmt.Sprintf("countersign_%s+%d.efi", version, tries))
	f, err := os.OpenFile(to+".new", os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer os.Remove(to + ".new")
	_, err = io.Copy(f, image)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write the image to the ESP: %w", err)
	}
	// The whole file system comes before the name: FAT has no journal.
	if err := syncAll(esp); err != nil {
		return err
	}
	if err := os.Rename(to+".new", to); err != nil {
		return err
	}
	return syncAll(esp)
}

// syncAll writes all of a file system to its disk.
func syncAll(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(f.Fd())), f.Close())
}

// withESP runs do while the ESP can be written.
func withESP(do func() error) error {
	remount := func(flags uintptr) error {
		return unix.Mount("", ESPFolder, "", unix.MS_REMOUNT|mountFlags|flags, "umask=0077,errors=remount-ro")
	}
	if err := remount(0); err != nil {
		return fmt.Errorf("write to the ESP: %w", err)
	}
	return errors.Join(do(), syncAll(ESPFolder), remount(unix.MS_RDONLY))
}

// bless takes the tries off the name of the image that runs, or marks the image as a bad one.
func bless(ctx context.Context, how string) error {
	return withESP(func() error {
		cmd := []string{"/usr/lib/systemd/systemd-bless-boot", "--path=" + ESPFolder, how}
		return run(ctx, nil, cmd[0], cmd[1:]...)
	})
}

// Files of updates, on the encrypted disk.
const (
	updatesFolder = stateFolder + "/machine/update"
	pendingFile   = stateFolder + "/machine/pending.json"
	uploadFile    = updatesFolder + "/update"
)

// readPending returns the pending update; nil is none.
func readPending() (*machine.Pending, error) {
	var p machine.Pending
	err := readJSON(pendingFile, &p)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return &p, err
}

func writePending(p machine.Pending) error { return writeJSON(pendingFile, p) }

// settleBoot finds out, at a boot, what has become of a pending update.
func settleBoot(image machine.Image) (*machine.Pending, error) {
	p, err := readPending()
	if p == nil || err != nil || p.Phase == machine.PhaseFailed || image.Version == p.Manifest.Version {
		return p, err // to be proven, or to be kept and settled
	}
	p.Phase = machine.PhaseFailed
	if p.Why == "" {
		p.Why = "the new image did not come up: it was started " + strconv.Itoa(tries) + " times at the most"
	}
	return p, writePending(*p)
}
