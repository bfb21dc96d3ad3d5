package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
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

// openFolder opens a folder. A link on the way must be of root or of this user: another user could
// lead root to files that are not the appliance's.
func openFolder(path string) (*os.Root, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("%s is no absolute path", path)
	}
	fail := func(err error) (*os.Root, error) {
		return nil, &fs.PathError{Op: "open the folder", Path: path, Err: err}
	}
	const how = unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC
	at, err := unix.Open("/", how, 0)
	if err != nil {
		return fail(err)
	}
	defer func() { unix.Close(at) }()
	todo := strings.Split(path, "/")
	for links := 0; len(todo) > 0; todo = todo[1:] {
		if todo[0] == "" {
			continue
		}
		next, err := unix.Openat(at, todo[0], how, 0)
		if err != nil {
			return fail(err)
		}
		var st unix.Stat_t
		if err = unix.Fstat(next, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFLNK {
			unix.Close(at)
			at = next
			continue
		}
		target, n := make([]byte, unix.PathMax), 0
		if links++; err == nil && links > 40 {
			err = unix.ELOOP
		} else if err == nil && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
			err = fmt.Errorf("%s is a link of user %d, who could have changed where it leads: put the folder in its "+
				"place", todo[0], st.Uid)
		}
		if err == nil {
			n, err = unix.Readlinkat(next, "", target)
		}
		if err = errors.Join(err, unix.Close(next)); err != nil {
			return fail(err)
		}
		if target[0] == '/' {
			root, err := unix.Open("/", how, 0)
			if err != nil {
				return fail(err)
			}
			unix.Close(at)
			at = root
		}
		todo = append(append([]string{""}, strings.Split(string(target[:n]), "/")...), todo[1:]...)
	}
	root, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", at))
	if err != nil {
		return fail(err)
	}
	return root, nil
}

// erase writes zeros over a file, once and in place, and removes the name. A file that is not there
// is no error. A link and a socket have no content. A file with another name is kept for that name,
// which may be another program's.
func (f resetFile) erase() (kept bool, err error) {
	root, err := openFolder(f.root)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	defer root.Close()
	info, err := root.Lstat(f.name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	if info.Mode().IsRegular() {
		file, err := root.OpenFile(f.name, os.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			return false, err
		}
		open, err := file.Stat()
		if err == nil && open.Sys().(*syscall.Stat_t).Nlink > 1 {
			kept = true
		} else if err == nil {
			err = zero(file)
		}
		if err = errors.Join(err, file.Close()); err != nil {
			return false, err
		}
	}
	if err := root.Remove(f.name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	folder, err := root.Open(filepath.Dir(f.name))
	if err != nil {
		return false, err
	}
	return kept, errors.Join(folder.Sync(), folder.Close())
}

// destroyFile destroys a file, and says so.
func (x *reset) destroyFile(f resetFile, what string) error {
	kept, err := f.erase()
	if err == nil && kept {
		err = x.note("doubtful", what+": the file has another name, which keeps the content")
	}
	if err == nil {
		err = x.note("destroyed", what)
	}
	return err
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
		left := slices.Contains(x.LeftTokens, name) // whose files are said below to stay
		if t.TPM != "" && !left {
			l.each(absolutePath(t.State), ".", "of the TPM of the token "+name, func(file string) bool {
				return file == "tpm.json" || strings.HasPrefix(file, ".new-") ||
					strings.HasSuffix(file, ".key.json") || strings.HasSuffix(file, ".approval.json")
			})
		}
		if !x.KeepPINs && !left {
			l.named(cmp.Or(t.pinPath(), t.PINFile), "PIN of the token "+name)
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
	for _, f := range c.backup().Left {
		if _, err := os.Lstat(f.Path); (err == nil || isCredential(f.Path)) && !l.seen[f.Path] {
			keep("%s (%s)", f.Path, f.What)
		}
	}
	keep("the daemon's log where it goes, copies of files that others have made, and seed files in %s", c.ImportFolder)
	l.named(x.path, "the configuration")
	return l.files, stays, errors.Join(l.errs...)
}

// isCredential reports that a file is a credential of systemd, which has its source elsewhere.
func isCredential(path string) bool {
	folder := os.Getenv("CREDENTIALS_DIRECTORY")
	return strings.HasPrefix(path, credentials) || folder != "" && below(path, filepath.Clean(folder))
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
	if path == "" || isCredential(path) {
		return
	}
	path, linked := absolutePath(path), ""
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
	open, err := openFolder(root)
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
	open, err := openFolder(root)
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
			err = x.destroyFile(f, fmt.Sprintf("%s (%s)", f.path(), f.what))
		}
		all = errors.Join(all, err)
	}
	root, err := openFolder(filepath.Dir(absolutePath(x.c.Ledger)))
	if err != nil {
		return errors.Join(all, err)
	}
	defer root.Close()
	for _, pattern := range []string{filepath.Base(x.c.Ledger) + ".sinks", filepath.Base(x.c.Ledger) + ".journal",
		scratchPrefix + "*"} {
		folders, _ := fs.Glob(root.FS(), pattern)
		for _, folder := range folders {
			removeEmpty(root, folder)
		}
	}
	return all
}

// removeEmpty removes a folder below root and the folders in it, as far as they are empty.
func removeEmpty(root *os.Root, folder string) {
	if info, err := root.Lstat(folder); err != nil || !info.IsDir() {
		return
	}
	entries, _ := fs.ReadDir(root.FS(), filepath.ToSlash(folder))
	for _, e := range entries {
		removeEmpty(root, filepath.Join(folder, e.Name()))
	}
	root.Remove(folder)
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
	device uint64
	kind   string // such as ext4; "": not known
}

// inPlace reports that the file system writes a file where it was. The others keep what is
// overwritten, and filling them helps nobody.
func (d disk) inPlace() bool {
	return slices.Contains([]string{"ext2", "ext3", "ext4", "fuse.ext4", "xfs", "vfat"}, d.kind)
}

func (d disk) doubt() string {
	return fmt.Sprintf("the file system of %s (%s) may keep what was overwritten, and its free space is left alone: "+
		"discard the whole disk, or destroy its encryption key", d.folder, cmp.Or(d.kind, "of an unknown kind"))
}

// disks lists the file systems of the files, by a folder of each. Memory is no disk.
func (x *reset) disks() (all []disk, err error) {
	folders := append([]string{filepath.Dir(absolutePath(x.c.Ledger))}, x.ownFolders()...)
	for name, t := range x.c.Tokens {
		if conf := t.softHSMConf(); t.TPM == "" && !slices.Contains(x.LeftTokens, name) && softHSMTokens(conf) != "" {
			folders = append(folders, softHSMTokens(conf))
		}
	}
	for _, f := range x.found.files { // a link has no content, and backups are encrypted
		if info, err := os.Lstat(f.path()); err == nil && info.Mode().IsRegular() && f.root != x.c.Backup.Folder {
			folders = append(folders, filepath.Dir(f.path()))
		}
	}
	if x.marker != nil { // the files may be gone
		folders = x.marker.Folders
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for _, folder := range folders {
		d, err := diskOf(folder, string(mounts))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return nil, err
		}
		seen := slices.ContainsFunc(all, func(other disk) bool { return other.device == d.device })
		if !seen && d.kind != "tmpfs" && d.kind != "ramfs" {
			all = append(all, d)
		}
	}
	return all, nil
}

// diskOf finds out about the file system of a folder, with the table of mounts.
func diskOf(folder, mounts string) (d disk, err error) {
	root, err := openFolder(folder)
	if err != nil {
		return d, err
	}
	defer root.Close()
	open, err := root.Open(".")
	if err != nil {
		return d, err
	}
	defer open.Close()
	var s unix.Statfs_t
	var st unix.Stat_t
	if err := errors.Join(unix.Fstatfs(int(open.Fd()), &s), unix.Fstat(int(open.Fd()), &st)); err != nil {
		return d, fmt.Errorf("%s: %w", folder, err)
	}
	d = disk{folder, either(os.Geteuid() == 0, s.Bfree, s.Bavail) * uint64(s.Bsize), st.Dev, ""}
	for line := range strings.Lines(mounts) {
		of, kind, _ := strings.Cut(line, " - ")
		if fields := strings.Fields(of); len(fields) > 2 && fields[2] == d.number() {
			d.kind, _, _ = strings.Cut(kind, " ")
		}
	}
	return d, nil
}

// number is the number of the device, such as 8:1.
func (d disk) number() string {
	return fmt.Sprintf("%d:%d", unix.Major(d.device), unix.Minor(d.device))
}

const fillPrefix = ".factory-reset-fill-"

// overwriteSpace fills the free space of each disk with zeros, where older versions of files are.
// All versions that a rename has replaced are there, and so are the names of the files in folders
// that were removed.
func (x *reset) overwriteSpace(ctx context.Context) error {
	disks, err := x.disks()
	if err != nil {
		return err
	}
	reserved := map[string]string{}
	for _, disk := range disks { // before all fills, which overwrite the marker of before
		if x.FreeSpace && disk.reserve() != "" {
			before, err := os.ReadFile(disk.reserve())
			if err == nil { // another error is told below
				reserved[disk.reserve()] = string(before)
			}
		}
	}
	if x.marker.Reserved = reserved; len(reserved) > 0 {
		if err := x.writeMarker(); err != nil {
			return err
		}
	}
	for _, disk := range disks {
		if !disk.inPlace() {
			if err := x.note("doubtful", disk.doubt()); err != nil {
				return err
			}
			continue
		}
		if !x.FreeSpace {
			continue
		}
		began := time.Now()
		if path := disk.reserve(); path != "" {
			// Without this, some free blocks would never be written, by root neither.
			if err := os.WriteFile(path, []byte("0"), 0); err != nil {
				if err := x.note("doubtful", fmt.Sprintf("the file system of %s keeps some free blocks for itself, "+
					"which are not overwritten: %v", disk.folder, err)); err != nil {
					return err
				}
			}
		}
		n, err := fill(ctx, disk, x.stderr)
		if err = errors.Join(err, x.giveReserves()); err != nil {
			return fmt.Errorf("the free space of the disk of %s: %w", disk.folder, err)
		}
		if err := x.note("overwritten", fmt.Sprintf("the free space of the disk of %s, %s in %v", disk.folder,
			mebibytes(n), time.Since(began).Round(time.Millisecond))); err != nil {
			return err
		}
	}
	return nil
}

// reserve is the file with the number of blocks that ext4 keeps for its own needs, 2 % and at most
// 4096 blocks, or "" on another file system.
func (d disk) reserve() string {
	if !strings.HasPrefix(d.kind, "ext") {
		return ""
	}
	device, err := os.Readlink("/sys/dev/block/" + d.number())
	if err != nil {
		device = d.number() // which is not there, and is told so
	}
	return filepath.Join("/sys/fs/ext4", filepath.Base(device), "reserved_clusters")
}

// giveReserves gives the file systems the blocks back that they have kept for their own needs.
func (x *reset) giveReserves() (all error) {
	if x.marker == nil {
		return nil
	}
	for path, before := range x.marker.Reserved {
		if now, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(now)) == "0" {
			all = errors.Join(all, os.WriteFile(path, []byte(before), 0))
		}
	}
	return all
}

func mebibytes(n uint64) string { return fmt.Sprintf("%d MiB", n>>20) }

// tellEvery is the time between two lines about the progress.
const tellEvery = 5 * time.Second

// fill writes files of zeros until the disk has no room, and syncs. The files have no names, so
// that a kill leaves none.
func fill(ctx context.Context, d disk, tell io.Writer) (n uint64, err error) {
	root, err := openFolder(d.folder)
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
		for _, f := range files { // a full file system may not remove a file that has blocks
			err = errors.Join(err, f.Truncate(0), f.Close())
		}
	}()
	began, told, step := time.Now(), time.Now(), len(zeros)
	for {
		name := fmt.Sprint(fillPrefix, len(files))
		f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if full(err) && len(files) > 0 {
			return n, nil
		} else if err != nil {
			return n, err
		}
		files = append(files, f)
		if err := root.Remove(name); err != nil {
			return n, err
		}
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

// removeFills removes files of a fill that a power cut has left.
func (d disk) removeFills() error {
	root, err := openFolder(d.folder)
	if err != nil {
		return err
	}
	defer root.Close()
	entries, err := fs.ReadDir(root.FS(), ".")
	for _, e := range entries {
		if err != nil || !strings.HasPrefix(e.Name(), fillPrefix) || !e.Type().IsRegular() {
			continue
		}
		f, opened := root.OpenFile(e.Name(), os.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err = opened; err != nil {
			break
		}
		if info, failed := f.Stat(); failed == nil && info.Sys().(*syscall.Stat_t).Nlink == 1 {
			err = f.Truncate(0)
		}
		err = errors.Join(err, f.Close(), root.Remove(e.Name()))
	}
	return err
}

// full reports that a disk or a quota has no room.
func full(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// stub is the content of the file beside the configuration while the configuration and the marker
// are destroyed, which are overwritten in place and after the free space.
type stub struct {
	Files     []stubFile `json:"files"`
	Record    string     `json:"record"`
	Appliance string     `json:"appliance"`
}

// stubFile is a file and the hash of its content: the next appliance can have a file of this name.
type stubFile struct {
	Path   string `json:"path"`
	SHA256 string `json:"sha256"`
	What   string `json:"what"`
}

// digest returns the hash of the file, and reports whether the file has zeros, which no such file
// has before it is overwritten.
func (f stubFile) digest() (hash string, zeros bool, err error) {
	file, err := os.OpenFile(f.Path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", false, err
	}
	defer file.Close()
	b, err := io.ReadAll(file)
	return fmt.Sprintf("%x", sha256.Sum256(b)), bytes.IndexByte(b, 0) >= 0, err
}

// destroyLast destroys the configuration and the marker.
func (x *reset) destroyLast() error {
	s := stub{Record: x.resetting.record, Appliance: x.marker.Appliance}
	for _, f := range []stubFile{
		{x.configFiles()[0], "", "the configuration"}, {absolutePath(x.c.resetMarker()), "", "the marker"},
	} {
		var err error
		if f.SHA256, _, err = f.digest(); err != nil {
			return err
		}
		s.Files = append(s.Files, f)
	}
	text, err := json.Marshal(s)
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
	for _, f := range s.Files {
		hash, zeros, err := f.digest()
		switch {
		case errors.Is(err, fs.ErrNotExist):
			err = nil
		case err == nil && hash != f.SHA256 && !zeros:
			err = x.note("stays", f.Path+": another file than the reset's")
		case err == nil:
			err = x.destroyFile(resetFile{filepath.Dir(f.Path), filepath.Base(f.Path), f.What},
				fmt.Sprintf("%s (%s)", f.Path, f.What))
		}
		if err != nil {
			return false, err
		}
	}
	if _, err := os.Stat(x.path); errors.Is(err, fs.ErrNotExist) { // a link that leads nowhere now
		if _, err := (resetFile{filepath.Dir(x.path), filepath.Base(x.path), ""}).erase(); err != nil {
			return false, err
		}
	}
	err = x.note("ended", fmt.Sprintf("the factory reset of %s; the record is %s", s.Appliance, s.Record))
	if err == nil {
		_, err = resetFile{filepath.Dir(x.path), filepath.Base(x.path) + resetStub, ""}.erase()
	}
	return true, err
}
