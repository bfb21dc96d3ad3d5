package audit

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// link gives a file, or each file of a folder, a second name at a path: on Windows, only some users
// may make symbolic links. Each name is replaced atomically, the folder as a whole is not. Names of
// an earlier epoch may stay: the checkpoint says which ones count.
func link(to, at string) error {
	from := filepath.Join(filepath.Dir(at), filepath.FromSlash(to))
	return filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		name := at + strings.TrimPrefix(path, from)
		switch {
		case err != nil:
			return err
		case d.IsDir():
			return os.MkdirAll(name, 0o755)
		case strings.HasPrefix(d.Name(), ".new"): // of another copy at the same time
			return nil
		}
		st, err := os.Stat(path)
		if err != nil {
			return err
		}
		if now, err := os.Stat(name); err == nil && os.SameFile(st, now) {
			return nil
		}
		if err := linkAt(name, func(temp string) error { return os.Link(path, temp) }); err != nil {
			return fmt.Errorf("audit: the export needs a file system with hard links, such as NTFS: %w", err)
		}
		return nil
	})
}
