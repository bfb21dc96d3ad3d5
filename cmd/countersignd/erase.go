package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"countersign/internal/backup"
	"countersign/internal/cli"
	"countersign/internal/durable"

	"golang.org/x/sys/unix"
)

// resetFile is a file that a factory reset destroys. The way to the file from root, a folder that
// the configuration names, is not left: the daemon's user could have put a link there.
type resetFile struct {
	root string
	name string // below root
	what string
}

func (f resetFile) path() string { return filepath.Join(f.root, f.name) }

// erase writes zeros over a file, once and in place, and removes the name. A file that is not there
// is no error. A link and a socket have no content.
func (f resetFile) erase() error {
	root, err := os.OpenRoot(f.root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	defer root.Close()
	info, err := root.Lstat(f.name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	if info.Mode().IsRegular() {
		file, err := root.OpenFile(f.name, os.O_WRONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		if err := errors.Join(zero(file), file.Close()); err != nil {
			return err
		}
	}
	if err := root.Remove(f.name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return durable.Sync(filepath.Dir(f.path()))
}

// zero writes zeros over an open file, and syncs.
func zero(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s: it is no regular file any more", f.Name())
	}
	for left := info.Size(); left > 0; left -= int64(len(zeros)) {
		if _, err := f.Write(zeros[:min(left, int64(len(zeros)))]); err != nil {
			return err
		}
	}
	return f.Sync()
}

var zeros = make([]byte, 1<<20)

// ownFolders are folders that are the appliance's alone.
func (x *reset) ownFolders() (all []string) {
	all = append(all, filepath.Dir(x.c.Ledger), x.c.Journal.Folder)
	for _, t := range x.c.Tokens {
		if t.TPM != "" {
			all = append(all, absolutePath(t.State))
		}
	}
	for i, folder := range all {
		if real, err := filepath.EvalSymlinks(folder); err == nil {
			all[i] = real
		}
	}
	return slices.DeleteFunc(all, func(folder string) bool { return folder == "" })
}

// listFiles lists the files to destroy, apart from the configuration and the marker, which are the
// last, and what stays. Only files that the appliance knows by their names are listed.
func (x *reset) listFiles() (files []resetFile, stays []string, err error) {
	l := fileList{seen: map[string]bool{}}
	c, keep := x.c, func(format string, args ...any) { stays = append(stays, fmt.Sprintf(format, args...)) }

	base, folder := filepath.Base(c.Ledger), filepath.Dir(c.Ledger)
	l.each(folder, ".", "the ledger", func(name string) bool { return name == base })
	l.each(folder, ".", "beside the ledger", func(name string) bool { return strings.HasPrefix(name, base+".") })
	l.each(folder, ".", "left by a write that was cut off", func(name string) bool {
		return strings.HasPrefix(name, ".new-")
	})
	for _, name := range []string{base + ".sinks", base + ".journal"} {
		l.each(folder, name, "beside the ledger", nil)
	}
	l.each(folder, ".", "", func(name string) bool {
		if strings.HasPrefix(name, scratchPrefix) {
			l.tree(folder, name, "left by a restore")
		}
		return false
	})
	if c.History != "" {
		history := filepath.Base(c.History)
		l.each(filepath.Dir(c.History), ".", "the history", func(name string) bool {
			return name == history || strings.HasPrefix(name, history+".")
		})
	}
	for _, name := range slices.Sorted(maps.Keys(c.Tokens)) {
		t := c.Tokens[name]
		if c.Journal.Folder != "" {
			l.each(c.Journal.Folder, ".", "the journal of the token "+name, func(file string) bool {
				return file == name+".lock" || strings.HasPrefix(file, name+".") &&
					(strings.HasSuffix(file, ".journal") || strings.HasSuffix(file, ".cut"))
			})
		}
		left := slices.Contains(x.LeftTokens, name)
		if t.TPM != "" && !left {
			l.each(absolutePath(t.State), ".", "of the TPM of the token "+name, func(file string) bool {
				return file == "tpm.json" || strings.HasPrefix(file, ".new-") ||
					strings.HasSuffix(file, ".key.json") || strings.HasSuffix(file, ".approval.json")
			})
		}
		switch pin := absolutePath(cmp.Or(t.pinPath(), t.PINFile)); {
		case pin == "":
		case x.KeepPINs || left:
			keep("%s (PIN of the token %s)", pin, name)
		default:
			l.named(pin, "PIN of the token "+name)
		}
		if t.PolicyKey != "" {
			keep("%s (public key of the approver of states)", absolutePath(t.PolicyKey))
		}
		if t.TPM == "" {
			keep("the token of %s itself, with its label, its PINs and the objects of other programs", name)
		}
	}
	l.named(c.Policy, "the policy")
	l.named(c.Mail.PasswordFile, "password of the mail server")
	l.named(c.Traces.HeadersFile, "headers for the collector of traces")
	l.named(c.Backup.SFTPKeyFile, "SSH key for the SFTP server")
	if c.Backup.SFTP != "" {
		keep("what is at the SFTP server of the backups")
	}
	if c.Backup.Folder != "" {
		switch names := x.backupsOf(); {
		case x.Backups && x.found.id == "":
			return nil, nil, errors.New("--backups: without the audit log's key, the appliance's files are not " +
				"known: leave the option out, and remove the backups by hand")
		case x.Backups:
			for _, name := range names {
				l.named(filepath.Join(c.Backup.Folder, name), "a backup")
			}
		default:
			keep("%s of backups in %s, encrypted to their recipients", cli.Count(len(names), "file"), c.Backup.Folder)
		}
	}
	for _, s := range c.Sinks {
		if s.File != "" {
			keep("%s and its older files (events for others, of the sink %s)", s.File, s.Name)
		}
	}
	for _, f := range c.backup().Files {
		if f.Kind == backup.Authority {
			keep("%s (a certificate authority, which is public)", f.Path)
		}
	}
	keep("the daemon's log where it goes, copies of files that others have made, and seed files in %s", c.ImportFolder)
	l.named(x.path, "the configuration")
	return l.files, stays, errors.Join(l.errs...)
}

// fileList collects files, each once.
type fileList struct {
	files []resetFile
	seen  map[string]bool
	errs  []error
}

func (l *fileList) add(f resetFile) {
	if path := f.path(); !l.seen[path] {
		l.seen[path] = true
		l.files = append(l.files, f)
	}
}

// named adds a file that the configuration names. Of a link that nobody but root and this user can
// have made, the file that the link leads to goes, too.
func (l *fileList) named(path, what string) {
	if path == "" || strings.HasPrefix(path, credentials) {
		return
	}
	linked := ""
	if real, err := filepath.EvalSymlinks(path); err == nil && real != path {
		linked = ", a link"
		if unchanged(what, path) == nil {
			l.add(resetFile{filepath.Dir(real), filepath.Base(real), what})
		}
	}
	if _, err := os.Lstat(path); err == nil {
		l.add(resetFile{filepath.Dir(path), filepath.Base(path), what + linked})
	} else if !errors.Is(err, fs.ErrNotExist) {
		l.errs = append(l.errs, err)
	}
}

// each adds the files of a folder below root that a function takes; nil takes all.
func (l *fileList) each(root, folder, what string, takes func(name string) bool) {
	open, err := os.OpenRoot(root)
	if errors.Is(err, fs.ErrNotExist) {
		return
	} else if err != nil {
		l.errs = append(l.errs, err)
		return
	}
	defer open.Close()
	entries, err := fs.ReadDir(open.FS(), filepath.ToSlash(folder))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		l.errs = append(l.errs, err)
	}
	for _, e := range entries {
		if (takes == nil || takes(e.Name())) && !e.IsDir() {
			l.add(resetFile{root, filepath.Join(folder, e.Name()), what})
		}
	}
}

// tree adds all files of a folder below root, and of the folders in it.
func (l *fileList) tree(root, folder, what string) {
	open, err := os.OpenRoot(root)
	if err != nil {
		l.errs = append(l.errs, err)
		return
	}
	defer open.Close()
	err = fs.WalkDir(open.FS(), filepath.ToSlash(folder), func(path string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			l.add(resetFile{root, filepath.FromSlash(path), what})
		}
		return err
	})
	if err != nil {
		l.errs = append(l.errs, err)
	}
}

// destroyFiles destroys the files, but for the configuration, and removes folders of the appliance
// that are empty then.
func (x *reset) destroyFiles(ctx context.Context) (all error) {
	files, _, err := x.listFiles()
	if err != nil {
		return err
	}
	config := x.configFiles()
	for _, f := range files {
		if slices.Contains(config, f.path()) {
			continue
		}
		err := ctx.Err()
		if err == nil {
			err = f.erase()
		}
		if err == nil {
			err = x.note("destroyed", fmt.Sprintf("%s (%s)", f.path(), f.what))
		}
		all = errors.Join(all, err)
	}
	for _, pattern := range []string{x.c.Ledger + ".sinks", x.c.Ledger + ".journal",
		filepath.Join(filepath.Dir(x.c.Ledger), scratchPrefix+"*")} {
		folders, _ := filepath.Glob(pattern)
		for _, folder := range folders {
			removeEmpty(folder)
		}
	}
	return all
}

// removeEmpty removes a folder and the folders in it, as far as they are empty.
func removeEmpty(folder string) {
	entries, _ := os.ReadDir(folder)
	for _, e := range entries {
		if e.IsDir() {
			removeEmpty(filepath.Join(folder, e.Name()))
		}
	}
	unix.Rmdir(folder) // a link is none
}

// configFiles are the configuration, and what it leads to if it is a link.
func (x *reset) configFiles() []string {
	real, err := filepath.EvalSymlinks(x.path)
	if err != nil || real == x.path {
		return []string{x.path}
	}
	return []string{real, x.path}
}

// disk is a file system with files of the appliance.
type disk struct {
	folder string
	free   uint64 // bytes
	kind   int64
}

// disks lists the file systems of the files, by a folder of each. Memory is no disk.
func (x *reset) disks() (all []disk) {
	folders := append([]string{filepath.Dir(x.c.Ledger)}, x.ownFolders()...)
	for _, f := range x.found.files { // a link has no content, and backups are encrypted
		if info, err := os.Lstat(f.path()); err == nil && info.Mode().IsRegular() && f.root != x.c.Backup.Folder {
			folders = append(folders, filepath.Dir(f.path()))
		}
	}
	if x.marker != nil { // the files may be gone
		folders = x.marker.Folders
	}
	seen := map[uint64]bool{}
	for _, folder := range folders {
		info, err := os.Stat(folder)
		var s unix.Statfs_t
		if err != nil || unix.Statfs(folder, &s) != nil {
			continue
		}
		device, kind := info.Sys().(*syscall.Stat_t).Dev, int64(s.Type)
		if seen[device] || kind == unix.TMPFS_MAGIC || kind == unix.RAMFS_MAGIC {
			continue
		}
		seen[device] = true
		all = append(all, disk{folder, either(os.Geteuid() == 0, s.Bfree, s.Bavail) * uint64(s.Bsize), kind})
	}
	return all
}

// inPlace are kinds of file systems that write a file where it was.
var inPlace = []int64{unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.MSDOS_SUPER_MAGIC}

const fillPrefix = ".factory-reset-fill-"

// overwriteSpace fills the free space of each disk with zeros, where older versions of files are.
// All versions that a rename has replaced are there, and so are the names of the files in folders
// that were removed.
func (x *reset) overwriteSpace(ctx context.Context) error {
	for _, disk := range x.disks() {
		if !slices.Contains(inPlace, disk.kind) {
			err := x.note("doubtful", fmt.Sprintf("the file system of %s (kind %#x) may keep what was overwritten: "+
				"discard the whole disk, or destroy its encryption key", disk.folder, disk.kind))
			if err != nil {
				return err
			}
		}
		if !x.FreeSpace {
			continue
		}
		began := time.Now()
		restore, err := disk.takeReserve()
		if err != nil {
			if err := x.note("doubtful", fmt.Sprintf("the file system of %s keeps some free blocks for itself, which "+
				"are not overwritten: %v", disk.folder, err)); err != nil {
				return err
			}
		}
		n, err := fill(ctx, disk, x.stderr)
		if err = errors.Join(err, restore()); err != nil {
			return fmt.Errorf("the free space of the disk of %s: %w", disk.folder, err)
		}
		if err := x.note("overwritten", fmt.Sprintf("the free space of the disk of %s, %s in %v", disk.folder,
			mebibytes(n), time.Since(began).Round(time.Millisecond))); err != nil {
			return err
		}
	}
	return nil
}

// takeReserve lets files have the blocks that ext4 keeps for its own needs, 2 % and at most 4096
// blocks, until restore. Without this, some free blocks would never be written, by root neither.
func (d disk) takeReserve() (restore func() error, err error) {
	restore = func() error { return nil }
	var st unix.Stat_t
	if d.kind != unix.EXT4_SUPER_MAGIC {
		return restore, nil
	} else if err := unix.Stat(d.folder, &st); err != nil {
		return restore, err
	}
	device, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if err != nil {
		return restore, err
	}
	path := filepath.Join("/sys/fs/ext4", filepath.Base(device), "reserved_clusters")
	before, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, []byte("0"), 0)
	}
	if err != nil {
		return restore, err
	}
	return func() error { return os.WriteFile(path, before, 0) }, nil
}

func mebibytes(n uint64) string { return fmt.Sprintf("%d MiB", n>>20) }

// tellEvery is the time between two lines about the progress.
const tellEvery = 5 * time.Second

// fill writes files of zeros until the disk has no room, syncs, and removes the files.
func fill(ctx context.Context, d disk, tell io.Writer) (n uint64, err error) {
	root, err := os.OpenRoot(d.folder)
	if err != nil {
		return 0, err
	}
	defer root.Close()
	var files []*os.File
	defer func() {
		// Blocks with the extents of these files must be in their places before they are free.
		// Otherwise only the journal has them, and the places have what was there before.
		for _, f := range files[:min(1, len(files))] {
			err = errors.Join(err, unix.Syncfs(int(f.Fd())))
		}
		for i, f := range files { // a full file system may not remove a file that has blocks
			err = errors.Join(err, f.Truncate(0), f.Close(), root.Remove(fmt.Sprint(fillPrefix, i)))
		}
		err = errors.Join(err, durable.Sync(d.folder))
	}()
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return 0, err
	}
	for _, e := range entries { // of a reset that was killed
		if !strings.HasPrefix(e.Name(), fillPrefix) || !e.Type().IsRegular() {
			continue
		}
		f, err := root.OpenFile(e.Name(), os.O_WRONLY|os.O_TRUNC|unix.O_NONBLOCK, 0)
		if err == nil {
			err = errors.Join(f.Close(), root.Remove(e.Name()))
		}
		if err != nil {
			return 0, err
		}
	}
	began, told, step := time.Now(), time.Now(), len(zeros)
	for {
		f, err := root.OpenFile(fmt.Sprint(fillPrefix, len(files)), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if full(err) && len(files) > 0 {
			return n, nil
		} else if err != nil {
			return n, err
		}
		files = append(files, f)
		for size := uint64(0); ; {
			if err := ctx.Err(); err != nil {
				return n, err
			}
			wrote, err := f.Write(zeros[:step])
			n, size = n+uint64(wrote), size+uint64(wrote)
			if full(err) && step > 1 { // smaller and smaller, until not a block is left
				step /= 2
				continue
			}
			if n>>26 != (n-uint64(wrote))>>26 || err != nil { // each 64 MiB
				if failed := f.Sync(); failed != nil && !full(failed) {
					return n, failed
				}
			}
			switch {
			case errors.Is(err, unix.EFBIG) && size > 0: // the largest file of this file system
			case full(err):
				return n, nil
			case err != nil:
				return n, err
			}
			if err != nil {
				break
			}
			if time.Since(told) > tellEvery {
				told = time.Now()
				left := time.Duration(float64(d.free-min(n, d.free)) / float64(n) * float64(time.Since(began)))
				fmt.Fprintf(tell, "%-12s %s of %s of the disk of %s, some %v left\n", "overwriting", mebibytes(n),
					mebibytes(d.free), d.folder, left.Round(time.Second))
			}
		}
	}
}

// full reports that a disk or a quota has no room.
func full(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// stub is the content of the file beside the configuration while the configuration and the marker
// are destroyed, which are overwritten in place and after the free space.
type stub struct {
	Marker    string `json:"marker"`
	Record    string `json:"record"`
	Appliance string `json:"appliance"`
}

// destroyLast destroys the configuration and the marker.
func (x *reset) destroyLast() error {
	text, err := json.Marshal(stub{x.c.resetMarker(), x.resetting.record, x.marker.Appliance})
	if err == nil {
		err = durable.Replace(x.path+resetStub, append(text, '\n'), 0o600)
	}
	if err == nil {
		_, err = x.endLast()
	}
	return err
}

// endLast destroys the configuration and the marker, if there is the file that says so. ended is
// false where there is none.
func (x *reset) endLast() (ended bool, err error) {
	var s stub
	if is, err := readOwn(x.path+resetStub, &s); !is || err != nil {
		return false, err
	}
	if x.record == nil { // another run has begun this
		x.record, err = os.OpenFile(s.Record, os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return false, err
		}
		defer x.record.Close()
	}
	for _, path := range append(x.configFiles(), s.Marker) {
		if err := (resetFile{filepath.Dir(path), filepath.Base(path), ""}).erase(); err != nil {
			return false, err
		}
	}
	err = x.note("destroyed", fmt.Sprintf("%s (the configuration)", x.path))
	if err == nil {
		err = x.note("ended", fmt.Sprintf("the factory reset of %s; the record is %s", s.Appliance, s.Record))
	}
	if err == nil {
		err = resetFile{filepath.Dir(x.path), filepath.Base(x.path) + resetStub, ""}.erase()
	}
	return true, err
}
