package mirror

import (
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// fill makes a folder a small disk of its own, or gives this disk another size. Only root can.
func fill(t *testing.T, folder string, size int) error {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can mount a small disk")
	}
	flags, options := uintptr(0), fmt.Sprintf("size=%d", size)
	var st unix.Statfs_t
	if err := unix.Statfs(folder, &st); err != nil {
		return err
	}
	if mounted := st.Type == unix.TMPFS_MAGIC && int64(st.Blocks)*st.Bsize <= 1<<20; mounted {
		flags = unix.MS_REMOUNT
	} else {
		t.Cleanup(func() { unix.Unmount(folder, unix.MNT_DETACH) })
	}
	return unix.Mount("disk", folder, "tmpfs", flags, options)
}
