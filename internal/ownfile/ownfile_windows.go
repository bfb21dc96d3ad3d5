package ownfile

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/windows"
)

// Rights in an access list.
const (
	anyRight        = ^windows.ACCESS_MASK(0)
	fileDeleteChild = 0x40 // FILE_DELETE_CHILD: to delete the files of a folder

	toChange = windows.FILE_WRITE_DATA | windows.FILE_APPEND_DATA | fileDeleteChild | windows.DELETE |
		windows.WRITE_DAC | windows.WRITE_OWNER | windows.GENERIC_WRITE | windows.GENERIC_ALL
)

// Create makes a new file that no other user can open, and opens the file for writing. The file
// inherits no entry of the folder's access list. A path that exists is refused (fs.ErrExist).
func Create(path string) (*os.File, error) {
	us, err := user()
	if err != nil {
		return nil, err
	}
	list, err := windows.SecurityDescriptorFromString("D:P(A;;FA;;;SY)(A;;FA;;;BA)(A;;FA;;;" + us.String() + ")")
	if err != nil {
		return nil, err
	}
	name, err := windows.UTF16PtrFromString(path)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	with := &windows.SecurityAttributes{SecurityDescriptor: list}
	with.Length = uint32(unsafe.Sizeof(*with))
	file, err := windows.CreateFile(name, windows.GENERIC_WRITE, windows.FILE_SHARE_READ|windows.FILE_SHARE_WRITE,
		with, windows.CREATE_NEW, windows.FILE_ATTRIBUTE_NORMAL, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(file), path), nil
}

// CheckSecret refuses the file of a private key if another user owns the file, or if the access
// list has any right for another user.
func CheckSecret(path string) error {
	us, other, err := others(path, anyRight)
	if err == nil && other != "" {
		err = fmt.Errorf("%s: %s, so others have access to the private key: icacls \"%s\" /reset, "+
			"then icacls \"%s\" /inheritance:r /grant *%s:F", path, other, path, path, us)
	}
	return err
}

// CheckOwn refuses a file or a folder that another user owns, or can change by the access list.
func CheckOwn(path string) error {
	_, other, err := others(path, toChange)
	if err == nil && other != "" {
		err = fmt.Errorf("%s: another user can change it (%s): look at its content, then: takeown /f \"%s\", "+
			"then icacls \"%s\" /reset", path, other, path, path)
	}
	return err
}

func user() (*windows.SID, error) {
	u, err := windows.GetCurrentProcessToken().GetTokenUser()
	if err != nil {
		return nil, fmt.Errorf("who is the user of this process? %w", err)
	}
	return u.User.Sid, nil
}

// others names an account beside us that owns a file or has one of the rights, or "".
func others(path string, rights windows.ACCESS_MASK) (us *windows.SID, other string, err error) {
	if us, err = user(); err != nil {
		return us, "", err
	}
	d, err := windows.GetNamedSecurityInfo(path, windows.SE_FILE_OBJECT,
		windows.OWNER_SECURITY_INFORMATION|windows.DACL_SECURITY_INFORMATION)
	if err != nil {
		return us, "", &os.PathError{Op: "read the access list of", Path: path, Err: err}
	}
	if other, err = stranger(d, us, rights); err != nil {
		err = fmt.Errorf("%s: its access list is unreadable: %w", path, err)
	}
	return us, other, err
}

// stranger names an account beside us, SYSTEM and Administrators that owns an object or has one of
// the rights, or "". An owner can change the access list.
func stranger(d *windows.SECURITY_DESCRIPTOR, us *windows.SID, rights windows.ACCESS_MASK) (string, error) {
	trusted := func(sid *windows.SID) bool {
		return sid.Equals(us) || sid.IsWellKnown(windows.WinLocalSystemSid) ||
			sid.IsWellKnown(windows.WinBuiltinAdministratorsSid)
	}
	owner, _, err := d.Owner()
	if err != nil {
		return "", err
	}
	if owner == nil || !trusted(owner) {
		return "its owner is " + account(owner), nil
	}
	list, _, err := d.DACL()
	if errors.Is(err, windows.ERROR_OBJECT_NOT_FOUND) || err == nil && list == nil {
		return "it has no access list", nil
	} else if err != nil {
		return "", err
	}
	for i := range uint32(list.AceCount) {
		var entry *windows.ACCESS_ALLOWED_ACE
		if err := windows.GetAce(list, i, &entry); err != nil {
			return "", err
		}
		of := (*windows.SID)(unsafe.Pointer(&entry.SidStart))
		switch {
		case entry.Header.AceFlags&windows.INHERIT_ONLY_ACE != 0: // for files that are made later
		case entry.Header.AceType == windows.ACCESS_DENIED_ACE_TYPE:
		case entry.Header.AceType != windows.ACCESS_ALLOWED_ACE_TYPE: // for example one with a condition
			return fmt.Sprintf("its access list has an entry of type %d", entry.Header.AceType), nil
		case entry.Mask&rights != 0 && !trusted(of) && !of.IsWellKnown(windows.WinCreatorOwnerRightsSid):
			return "its access list has " + account(of), nil
		}
	}
	return "", nil
}

// account is the name of an account, for people.
func account(sid *windows.SID) string {
	name, domain, _, err := sid.LookupAccount("")
	switch {
	case err != nil:
		return sid.String()
	case domain == "":
		return name
	}
	return domain + `\` + name
}
