package image

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// writeCPIO writes a folder as an initramfs (the newc format of cpio: Linux,
// Documentation/driver-api/early-userspace/buffer-format.rst). All files are root's and have the
// time epoch.
func writeCPIO(w io.Writer, root string, epoch int64) error {
	var names []string
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err == nil && path != root {
			name, _ := filepath.Rel(root, path)
			names = append(names, name)
		}
		return err
	})
	if err != nil {
		return err
	}
	slices.Sort(names)
	c := cpio{w: w, epoch: epoch}
	for _, name := range names {
		info, err := os.Lstat(filepath.Join(root, name))
		if err != nil {
			return err
		}
		mode, data := uint32(info.Mode().Perm()), []byte(nil)
		switch {
		case info.IsDir():
			mode |= 0o040000
			if info.Mode()&fs.ModeSticky != 0 {
				mode |= 0o1000
			}
		case info.Mode().IsRegular():
			mode |= 0o100000
			data, err = os.ReadFile(filepath.Join(root, name))
		case info.Mode()&fs.ModeSymlink != 0:
			mode |= 0o120777
			var to string
			to, err = os.Readlink(filepath.Join(root, name))
			data = []byte(to)
		default:
			err = fmt.Errorf("%s is neither a file nor a folder", name)
		}
		if err != nil {
			return err
		}
		c.entry(name, mode, 0, 0, data)
	}
	c.entry("dev/console", 0o020600, 5, 1, nil)
	c.entry("TRAILER!!!", 0, 0, 0, nil)
	c.pad(512)
	return c.err
}

type cpio struct {
	w     io.Writer
	epoch int64
	inode int
	n     int64
	err   error
}

func (c *cpio) write(b []byte) {
	if c.err == nil {
		_, c.err = c.w.Write(b)
		c.n += int64(len(b))
	}
}

func (c *cpio) pad(to int64) { c.write(make([]byte, (to-c.n%to)%to)) }

func (c *cpio) entry(name string, mode uint32, major, minor int, data []byte) {
	c.inode++
	c.write(fmt.Appendf(nil, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		c.inode, mode, 0, 0, 1, c.epoch, len(data), 0, 0, major, minor, len(name)+1, 0, name))
	c.pad(4)
	c.write(data)
	c.pad(4)
}
