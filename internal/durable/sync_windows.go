package durable

import (
	"errors"
	"os"

	"golang.org/x/sys/windows"
)

// rename replaces a file, and returns when the name is on the disk: Windows syncs no folder.
func rename(from, to string) error {
	old, err1 := windows.UTF16PtrFromString(from)
	name, err2 := windows.UTF16PtrFromString(to)
	err := errors.Join(err1, err2)
	if err == nil {
		err = windows.MoveFileEx(old, name, windows.MOVEFILE_REPLACE_EXISTING|windows.MOVEFILE_WRITE_THROUGH)
	}
	if err != nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	return nil
}

// Sync has nothing to do on Windows: see rename.
func Sync(string) error { return nil }
