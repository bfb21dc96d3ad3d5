//go:build unix

package keystore_test

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"countersign/internal/keystore"

	"golang.org/x/sys/unix"
)

// entry is an entry of an ACL: tag, permissions, id.
type entry struct {
	tag, permissions uint16
	id               uint32
}

const noID = ^uint32(0) // of entries without an id

// encodeACL gives the encoding of an ACL in an extended attribute.
func encodeACL(entries []entry) []byte {
	acl := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range entries {
		acl = binary.LittleEndian.AppendUint16(acl, e.tag)
		acl = binary.LittleEndian.AppendUint16(acl, e.permissions)
		acl = binary.LittleEndian.AppendUint32(acl, e.id)
	}
	return acl
}

// TestSecretForOneUser: a secret file is read if no ACL entry gives access to anybody but the
// process's user and root, as systemd's LoadCredential makes files (root:root 0400, an ACL for the
// user, shown as 0440). Every other file for more than its owner is refused, with a remedy.
func TestSecretForOneUser(t *testing.T) {
	us := uint32(os.Geteuid())
	credential := func(more ...entry) []entry {
		return append([]entry{{1, 4, noID}, {2, 4, us}, {4, 0, noID}, {16, 4, noID}, {32, 0, noID}}, more...)
	}
	for _, c := range []struct {
		name string
		mode os.FileMode
		acl  []entry // nil: none
		want string  // in the error; "": the file is read
	}{
		{"the owner's", 0o600, nil, ""},
		{"a credential of systemd", 0o400, credential(), ""},
		{"a group's", 0o640, nil, "chmod 600"},
		{"the world's", 0o604, nil, "chmod 600"},
		{"an ACL for another user", 0o400, []entry{
			{1, 4, noID}, {2, 4, us}, {2, 4, us + 1}, {4, 0, noID}, {16, 4, noID}, {32, 0, noID},
		}, "access to user"},
		{"an ACL for the owner's group", 0o400, []entry{
			{1, 4, noID}, {2, 4, us}, {4, 4, noID}, {16, 4, noID}, {32, 0, noID},
		}, "access to a group"},
		{"an ACL for another group", 0o400, []entry{
			{1, 4, noID}, {2, 4, us}, {4, 0, noID}, {8, 4, 50}, {16, 4, noID}, {32, 0, noID},
		}, "access to a group"},
		{"an ACL for everybody", 0o400, []entry{
			{1, 4, noID}, {2, 4, us}, {4, 0, noID}, {16, 4, noID}, {32, 4, noID},
		}, "access to everybody"},
		{"entries without effect", 0o400, []entry{
			{1, 4, noID}, {2, 4, us + 1}, {4, 4, noID}, {16, 0, noID}, {32, 0, noID},
		}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "pin")
			if err := os.WriteFile(path, []byte("secret"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, c.mode); err != nil {
				t.Fatal(err)
			}
			if c.acl != nil {
				if err := unix.Setxattr(path, "system.posix_acl_access", encodeACL(c.acl), 0); err != nil {
					t.Fatal(err)
				}
			}
			b, err := keystore.ReadSecret(path, "PIN file")
			switch {
			case c.want == "" && (err != nil || string(b.Expose()) != "secret"):
				t.Errorf("%q, %v", b.Expose(), err)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) ||
				!strings.Contains(err.Error(), "chmod 600 "+path) || strings.Contains(err.Error(), "secret")):
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
	if us != 0 {
		return // only root can give a file away
	}
	path := filepath.Join(t.TempDir(), "pin")
	if err := errors.Join(os.WriteFile(path, []byte("secret"), 0o400), os.Chown(path, 1, 1),
		unix.Setxattr(path, "system.posix_acl_access", encodeACL(credential()), 0)); err != nil {
		t.Fatal(err)
	}
	if _, err := keystore.ReadSecret(path, "PIN file"); err == nil || !strings.Contains(err.Error(), "its owner") {
		t.Errorf("a file of user 1: %v", err)
	}
}
