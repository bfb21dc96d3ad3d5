//go:build unix

package ownfile_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"countersign/internal/ownfile"
)

// TestModes holds the modes of a file and a folder against both checks.
func TestModes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	f, err := ownfile.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("secret"); errors.Join(err, f.Close()) != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	if _, err := ownfile.Create(path); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a file twice: %v", err)
	}
	folder := filepath.Join(t.TempDir(), "folder")
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	for mode, c := range map[fs.FileMode]struct{ opens, changes bool }{
		0o600: {}, 0o400: {}, 0o700: {}, 0o640: {true, false}, 0o604: {true, false}, 0o610: {true, false},
		0o620: {true, true}, 0o602: {true, true}, 0o666: {true, true},
	} {
		for _, at := range []string{path, folder} {
			if err := os.Chmod(at, mode); err != nil {
				t.Fatal(err)
			}
			if err := ownfile.CheckSecret(at); (err != nil) != c.opens {
				t.Errorf("%s with mode %o as a secret: %v", at, mode, err)
			}
			if err := ownfile.CheckOwn(at); (err != nil) != c.changes {
				t.Errorf("%s with mode %o as our own: %v", at, mode, err)
			}
		}
	}
	if err := ownfile.CheckSecret(path + ".none"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if err := ownfile.CheckOwn(path + ".none"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if os.Geteuid() != 0 {
		return // only root can give a file away
	}
	if err := errors.Join(os.Chmod(path, 0o600), os.Chown(path, 1, 1)); err != nil {
		t.Fatal(err)
	}
	if ownfile.CheckOwn(path) == nil {
		t.Error("a file of user 1 is ours")
	}
}
