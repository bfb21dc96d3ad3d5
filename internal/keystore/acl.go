//go:build unix

package keystore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// onlyForUs refuses a file that others than root, the file's owner and this process's user may
// open. A file with an ACL shows the ACL's mask as the permissions of its group: a credential of
// systemd (LoadCredential) has mode 0400, an ACL with read for the service's user, and shows as
// 0440.
func onlyForUs(f *os.File, st os.FileInfo) error {
	if !st.Mode().IsRegular() {
		return fmt.Errorf("its mode is %v; it must be a regular file", st.Mode())
	}
	if st.Mode().Perm()&0o077 == 0 {
		return nil
	}
	us := os.Geteuid()
	owner := us
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		owner = int(sys.Uid)
	}
	acl := make([]byte, 4+256*aclEntry)
	n, err := unix.Fgetxattr(int(f.Fd()), "system.posix_acl_access", acl)
	if err == nil {
		err = checkACL(acl[:n], us, owner)
	} else { // no ACL, or a file system without ACLs
		err = errors.New("it must be a file that only its owner can read")
	}
	if err == nil {
		return nil
	}
	remedy := fmt.Sprintf("setfacl -b %[1]s; chmod 600 %[1]s", f.Name())
	if owner != us {
		remedy += fmt.Sprintf("; chown %d %s; or pass the file by systemd's LoadCredential=", us, f.Name())
	}
	return fmt.Errorf("its mode is %v; %w: as its owner or root, %s", st.Mode(), err, remedy)
}

// The encoding of an ACL in an extended attribute (Linux, include/uapi/linux/posix_acl_xattr.h): a
// version, then entries with tag, permissions and id, all little-endian.
const (
	aclVersion = 2
	aclEntry   = 8 // bytes

	aclUserObj  = 0x01 // the owner
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10 // bounds the entries of users and groups
	aclOther    = 0x20
)

// checkACL refuses an ACL that gives a permission to a group, to others, or to a user apart from
// us, the owner and root. The owner must be us or root.
func checkACL(acl []byte, us, owner int) error {
	if len(acl) < 4 || len(acl)%aclEntry != 4 || binary.LittleEndian.Uint32(acl) != aclVersion {
		return errors.New("its ACL is unreadable")
	}
	if owner != us && owner != 0 {
		return fmt.Errorf("it has an ACL and belongs to user %d; its owner must be root or user %d", owner, us)
	}
	mask := uint16(7)
	for e := acl[4:]; len(e) > 0; e = e[aclEntry:] {
		if binary.LittleEndian.Uint16(e) == aclMask {
			mask = binary.LittleEndian.Uint16(e[2:])
		}
	}
	for e := acl[4:]; len(e) > 0; e = e[aclEntry:] {
		tag, permissions := binary.LittleEndian.Uint16(e), binary.LittleEndian.Uint16(e[2:])
		id := int(binary.LittleEndian.Uint32(e[4:]))
		switch {
		case tag == aclMask, tag == aclUserObj, tag == aclUser && (id == us || id == 0):
		case tag == aclOther && permissions != 0:
			return errors.New("its ACL gives access to everybody")
		case tag == aclUser && permissions&mask != 0:
			return fmt.Errorf("its ACL gives access to user %d; only user %d may have it", id, us)
		case (tag == aclGroup || tag == aclGroupObj) && permissions&mask != 0:
			return fmt.Errorf("its ACL gives access to a group; only user %d may have it", us)
		}
	}
	return nil
}
