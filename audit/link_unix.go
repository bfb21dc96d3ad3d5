//go:build unix

package audit

import (
	"fmt"
	"os"
)

// link makes or replaces a symbolic link at a path, atomically.
func link(to, at string) error {
	if st, err := os.Lstat(at); err == nil && st.Mode().Type() != os.ModeSymlink {
		return fmt.Errorf("audit: %s exists and is not a link, so the folder is no export: use another", at)
	}
	if now, err := os.Readlink(at); err == nil && now == to {
		return nil
	}
	return linkAt(at, func(temp string) error { return os.Symlink(to, temp) })
}
