// Package durable replaces files so that a crash leaves the old content or the new one, whole. On
// Windows a mode says only whether the file can be written: the folder's access list says who can
// open the file.
package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// Write replaces the content of the file at a path. Readers and a crash see the content before or
// the new one. The new content is on the disk before it gets the name; the name itself is durable
// after Sync of the folder: see Replace. After a crash, a file with a name that begins with .new-
// may remain.
func Write(path string, content []byte, mode fs.FileMode) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*") // two writers at once have two files
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = f.Write(content)
	if err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	return rename(f.Name(), path)
}

// Replace is Write and Sync: a crash after Replace leaves the new content.
func Replace(path string, content []byte, mode fs.FileMode) error {
	if err := Write(path, content, mode); err != nil {
		return err
	}
	return Sync(filepath.Dir(path))
}
