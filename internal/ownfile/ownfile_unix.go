//go:build unix

package ownfile

import (
	"fmt"
	"os"
	"syscall"
)

// Create makes a new file that no other user can open, and opens the file for writing. A path that
// exists is refused (fs.ErrExist).
func Create(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
}

// CheckSecret refuses the file of a private key if the mode gives access to group or others.
func CheckSecret(path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if st.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s: mode %v gives others access to the private key: chmod 600 %s",
			path, st.Mode().Perm(), path)
	}
	return nil
}

// CheckOwn refuses a file or a folder that users other than root and the caller can change: by the
// mode, or as its owner.
func CheckOwn(path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	owner := st.Sys().(*syscall.Stat_t).Uid
	if st.Mode().Perm()&0o022 != 0 || owner != 0 && int(owner) != os.Geteuid() {
		return fmt.Errorf("%s: another user can change it (owner %d, mode %04o): look at its content, "+
			"then: chown %d %s; chmod go-w %s", path, owner, st.Mode().Perm(), os.Geteuid(), path, path)
	}
	return nil
}
