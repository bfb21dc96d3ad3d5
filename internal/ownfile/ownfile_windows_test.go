package ownfile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/windows"
)

// TestStranger holds access lists in the form of SDDL against both rights.
func TestStranger(t *testing.T) {
	us, err := user()
	if err != nil {
		t.Fatal(err)
	}
	const users, foreign = "BU", "S-1-5-21-1-2-3-1004"
	for _, c := range []struct {
		list           string // without the owner; US is the user
		opens, changes bool   // somebody else does
	}{
		{"D:P(A;;FA;;;SY)(A;;FA;;;BA)(A;;FA;;;US)", false, false},
		{"D:(A;;FA;;;SY)(A;;FA;;;BA)(A;;FA;;;US)", false, false},
		{"D:(A;;FA;;;US)(A;;FR;;;OW)", false, false},
		{"D:", false, false}, // an empty list: nobody
		{"D:(D;;FA;;;" + foreign + ")(A;;FA;;;US)", false, false},
		{"D:(A;OICIIO;FA;;;WD)(A;;FA;;;US)", false, false}, // of a folder, for its files
		{"D:(A;;FA;;;US)(A;;FR;;;WD)", true, false},
		{"D:(A;;FA;;;US)(A;;FR;;;AU)", true, false},
		{"D:(A;;FA;;;US)(A;;0x1200a9;;;" + users + ")", true, false}, // as C:\ gives to its files
		{"D:(A;;FA;;;US)(A;;FR;;;" + foreign + ")", true, false},
		{"D:(A;;FA;;;US)(A;;FW;;;" + foreign + ")", true, true},
		{"D:(A;;FA;;;US)(A;;0x2;;;" + foreign + ")", true, true},
		{"D:(A;;FA;;;US)(A;;SD;;;" + foreign + ")", true, true},
		{"D:(A;;FA;;;US)(A;;WD;;;" + foreign + ")", true, true}, // may change the list
		{"D:(A;;FA;;;US)(A;;WO;;;" + foreign + ")", true, true},
		{"D:(A;;FA;;;US)(A;;0x40;;;" + foreign + ")", true, true}, // may delete what is in the folder
		{"D:(A;;FA;;;US)(A;;GA;;;" + foreign + ")", true, true},
		{"", true, true},
	} {
		for owner, ours := range map[string]bool{us.String(): true, "SY": true, "BA": true, foreign: false} {
			text := "O:" + owner + strings.ReplaceAll(c.list, "US)", us.String()+")")
			d, err := windows.SecurityDescriptorFromString(text)
			if err != nil {
				t.Fatalf("%s: %v", text, err)
			}
			for rights, want := range map[windows.ACCESS_MASK]bool{anyRight: c.opens, toChange: c.changes} {
				if got, err := stranger(d, us, rights); err != nil || (got != "") != (want || !ours) {
					t.Errorf("%s, rights %x: %q, %v", text, rights, got, err)
				}
			}
		}
	}
}

// TestNoList: without a list, or with an unset one, everybody has every right.
func TestNoList(t *testing.T) {
	us, err := user()
	if err != nil {
		t.Fatal(err)
	}
	for _, set := range []bool{false, true} {
		d, err := windows.NewSecurityDescriptor()
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(d.SetOwner(us, false), d.SetDACL(nil, set, false)); err != nil {
			t.Fatal(err)
		}
		if other, err := stranger(d, us, toChange); other == "" || err != nil {
			t.Errorf("set %v: %q, %v", set, other, err)
		}
	}
}

// TestFiles makes a file for its owner only, beside one with an entry for everybody.
func TestFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key")
	f, err := Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("secret"); errors.Join(err, f.Close()) != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "secret" {
		t.Errorf("%q, %v", b, err)
	}
	if err := errors.Join(CheckSecret(path), CheckOwn(path)); err != nil {
		t.Error(err)
	}
	if _, err := Create(path); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a file twice: %v", err)
	}
	open, err := windows.SecurityDescriptorFromString("D:P(A;;FA;;;WD)")
	if err != nil {
		t.Fatal(err)
	}
	list, _, err := open.DACL()
	if err != nil {
		t.Fatal(err)
	}
	const set = windows.DACL_SECURITY_INFORMATION | windows.PROTECTED_DACL_SECURITY_INFORMATION
	if err := windows.SetNamedSecurityInfo(path, windows.SE_FILE_OBJECT, set, nil, nil, list, nil); err != nil {
		t.Fatal(err)
	}
	for name, check := range map[string]func(string) error{"secret": CheckSecret, "own": CheckOwn} {
		if err := check(path); err == nil || !strings.Contains(err.Error(), "icacls") {
			t.Errorf("%s: everybody has access: %v", name, err)
		}
		if err := check(path + ".none"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: no file: %v", name, err)
		}
	}
}
