package ledger_test

import (
	"os"
	"path/filepath"
	"testing"

	"countersign/ledger"

	"countersign/ledger/disktest"
)

func TestMain(m *testing.M) {
	disktest.Serve()
	os.Exit(m.Run())
}

// createOn makes a ledger on a disk that the test can break.
func createOn(t *testing.T, disk *disktest.Disk) (*ledger.Ledger, string) {
	t.Helper()
	dir, err := os.MkdirTemp(disk.Dir(), "")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "ledger.db")
	if err := ledger.Create(path, ledger.Options{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { disk.Fail(nil); checkFile(t, path) })
	return open(t, path), path
}
