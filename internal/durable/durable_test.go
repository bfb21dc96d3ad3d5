package durable_test

import (
	"os"
	"path/filepath"
	"testing"

	"countersign/internal/durable"
)

// TestReplace replaces a file, and fails to replace a folder. Either way the folder has no other
// file afterwards.
func TestReplace(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	for _, content := range []string{"first", "", "second"} {
		if err := durable.Replace(path, []byte(content), 0o640); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		st, _ := os.Stat(path)
		if err != nil || string(b) != content || st.Mode().Perm() != 0o640 {
			t.Errorf("%q, %v, %v; want %q", b, st.Mode(), err, content)
		}
	}
	folder := filepath.Join(dir, "folder")
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := durable.Replace(folder, nil, 0o600); err == nil {
		t.Error("a folder was replaced by a file")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 2 {
		t.Errorf("%v, %v", left, err)
	}
}
