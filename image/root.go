package image

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// tree copies chosen files of unpacked packages into the root of an image.
type tree struct {
	from, to string
	done     map[string]bool
}

// libraryFolders are searched for shared libraries, in this order.
var libraryFolders = []string{
	"lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib/systemd", "lib/x86_64-linux-gnu/systemd",
	"usr/lib/x86_64-linux-gnu/systemd", "lib64",
}

// merged returns the place of a path on a system whose /bin, /sbin and /lib are in /usr.
func merged(path string) string {
	for _, top := range []string{"bin", "sbin", "lib", "lib64"} {
		if path == top || strings.HasPrefix(path, top+"/") {
			return "usr/" + path
		}
	}
	return path
}

// newTree makes the root with the links of a merged /usr.
func newTree(from, to string) (*tree, error) {
	for _, top := range []string{"bin", "sbin", "lib", "lib64"} {
		if err := os.MkdirAll(filepath.Join(to, "usr", top), 0o755); err != nil {
			return nil, err
		}
		if err := os.Symlink("usr/"+top, filepath.Join(to, top)); err != nil {
			return nil, err
		}
	}
	return &tree{from, to, map[string]bool{}}, nil
}

// addList copies the files of a list: a pattern in each line (filepath.Match), below / or /usr.
func (t *tree) addList(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		line, _, _ = strings.Cut(line, "#")
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		found, err := filepath.Glob(filepath.Join(t.from, line))
		if err == nil && len(found) == 0 {
			found, err = filepath.Glob(filepath.Join(t.from, "usr", line))
		}
		if err == nil && len(found) == 0 {
			err = errors.New("no package of the lock file has it")
		}
		if err != nil {
			return fmt.Errorf("%s: %s: %w", path, line, err)
		}
		slices.Sort(found)
		for _, each := range found {
			name, _ := filepath.Rel(t.from, each)
			if err := t.add(name); err != nil {
				return err
			}
		}
	}
	return nil
}

// add copies a file, a folder with all it has, or a link with its target. A program brings its
// libraries along. No file keeps a set-user-ID bit.
func (t *tree) add(name string) error {
	if t.done[name] {
		return nil
	}
	t.done[name] = true
	from, to := filepath.Join(t.from, name), filepath.Join(t.to, merged(name))
	info, err := os.Lstat(from)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	switch {
	case info.IsDir():
		entries, err := os.ReadDir(from)
		if err == nil {
			err = os.MkdirAll(to, 0o755)
		}
		for _, e := range entries {
			err = errors.Join(err, t.add(filepath.Join(name, e.Name())))
		}
		return err
	case info.Mode()&fs.ModeSymlink != 0:
		return t.addLink(name, from, to)
	}
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if err := os.WriteFile(to, b, 0o644|info.Mode().Perm()&0o111); err != nil {
		return err
	}
	if !strings.HasPrefix(string(b), elf.ELFMAG) {
		return nil
	}
	return t.addLibraries(name, from)
}

func (t *tree) addLink(name, from, to string) error {
	target, err := os.Readlink(from)
	if err != nil {
		return err
	}
	if err := os.Symlink(target, to); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	at := filepath.Join(filepath.Dir(name), target)
	if filepath.IsAbs(target) {
		at = target[1:]
	}
	if _, err := os.Lstat(filepath.Join(t.from, at)); err != nil {
		return nil // made at run time, such as /run and /proc
	}
	return t.add(at)
}

// addLibraries copies the shared libraries that a program needs.
func (t *tree) addLibraries(name, path string) error {
	f, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	defer f.Close()
	if f.Type != elf.ET_EXEC && f.Type != elf.ET_DYN { // a kernel module
		return nil
	}
	needed, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for _, library := range needed {
		i := slices.IndexFunc(libraryFolders, func(folder string) bool {
			_, err := os.Lstat(filepath.Join(t.from, folder, library))
			return err == nil
		})
		if i < 0 {
			return fmt.Errorf("%s needs %s, which no package of the lock file has", name, library)
		}
		if err := t.add(filepath.Join(libraryFolders[i], library)); err != nil {
			return err
		}
	}
	return nil
}
