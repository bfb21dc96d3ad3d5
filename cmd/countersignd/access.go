package main

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"countersign/internal/cause"
	"countersign/internal/keystore"
)

// access returns what other users of the machine can read or change and must not: an error for each
// file, as no restart heals it. Where the key workers have a user of their own, launcherAccess
// looks at the files of tokens.
//
//   - Nobody else reads the configuration (a URL may have a secret), the ledger's folder, PINs and
//     other passwords, and the folders with the state of tokens.
//   - Nobody else changes a file that the daemon or a key worker obeys: the configuration, modules
//     and what they are configured by, the policy, certificate authorities. Nobody else puts
//     another socket into the place of the socket for operators, whose users send sign-ins there.
func (c *Config) access(path string) (all []error) {
	check := collect(&all)
	check("the configuration", path, unread)
	check("the configuration", path, unchanged)
	check("the folder of the ledger", filepath.Dir(c.Ledger), unread)
	check("the folder of the ledger", filepath.Dir(c.Ledger), unchanged)
	check("the policy", c.Policy, unchanged)
	check("the folder of the admin socket", filepath.Dir(c.AdminSocket), unchanged)
	check("mail.password_file", c.Mail.PasswordFile, keystore.CheckSecret)
	check("backup.sftp_key_file", c.Backup.SFTPKeyFile, keystore.CheckSecret)
	check("mail.ca_file", c.Mail.CAFile, unchanged)
	check("traces.ca_file", c.Traces.CAFile, unchanged)
	for _, w := range c.Webhooks {
		check("webhooks."+w.Name+".ca_file", w.CAFile, unchanged)
	}
	for _, s := range c.Sinks {
		check("sinks."+s.Name+".ca_file", s.CAFile, unchanged)
	}
	if c.keysUser == nil {
		all = append(all, c.tokenAccess()...)
	}
	return all
}

// launcherAccess is access for the user of the key workers. The daemon's user must not change what
// key workers obey.
func (c *Config) launcherAccess(path string) (all []error) {
	if c.keysUser == nil {
		return nil
	}
	check := collect(&all)
	check("the configuration", path, unread)
	check("the configuration", path, unchanged)
	check("journal.folder", c.Journal.Folder, unchanged)
	return append(all, c.tokenAccess()...)
}

// collect returns a function that checks a path by a rule, and adds an error to all.
func collect(all *[]error) func(what, path string, rule func(what, path string) error) {
	return func(what, path string, rule func(what, path string) error) {
		if path == "" {
			return
		}
		absolute, err := filepath.Abs(path)
		if err == nil {
			err = rule(what, absolute)
		}
		if err != nil {
			*all = append(*all, err)
		}
	}
}

// tokenAccess is access for the files of the tokens.
func (c *Config) tokenAccess() (all []error) {
	check := collect(&all)
	for _, name := range slices.Sorted(maps.Keys(c.Tokens)) {
		t, in := c.Tokens[name], "tokens."+name+"."
		check(in+"pin_file", t.pinPath(), keystore.CheckSecret)
		check(in+"policy_key", t.PolicyKey, unchanged)
		check(in+"state", t.State, unread)
		check(in+"state", t.State, unchanged)
		if t.TPM != "" {
			continue
		}
		check(in+"module", t.hsm().ModulePath(), unchanged)
		for _, path := range t.Files {
			check(in+"files", path, unchanged)
		}
		for _, variable := range slices.Sorted(maps.Keys(t.Environment)) {
			if path := t.Environment[variable]; filepath.IsAbs(path) {
				check(in+"environment: "+variable, path, unchanged)
			}
		}
		check("the folder of the tokens of SoftHSM", softHSMTokens(t.softHSMConf()), unread)
		check("the folder of the tokens of SoftHSM", softHSMTokens(t.softHSMConf()), unchanged)
	}
	return all
}

// part is a file or a folder on the way to a path.
type part struct {
	path string
	os.FileInfo
	owner, group int
}

// private reports that the file, or all that is in the folder, is closed to other users.
func (p part) private() bool { return p.Mode().Perm()&0o077 == 0 && p.trusted() }

// unread reports that other users can neither read the file nor enter the folder. A group of this
// process may, if root alone decides who is in it and what is there.
func (p part) unread() bool {
	groups, _ := os.Getgroups() // of some systems with the effective one, of others without
	ours := p.owner == 0 && slices.Contains(append(groups, os.Getegid()), p.group) && p.Mode().Perm()&0o020 == 0
	return p.trusted() && p.Mode().Perm()&0o007 == 0 && (p.Mode().Perm()&0o070 == 0 || ours)
}

// trusted reports that the owner is root or this process's user.
func (p part) trusted() bool { return p.owner == 0 || p.owner == os.Geteuid() }

// way returns the folders on the way to a path, the targets of symbolic links included, and last
// what the path leads to. A path that can't be followed is no error: the result is nil.
func way(path string) (all []part) {
	todo, at := strings.Split(path, "/"), "/"
	for links := 0; len(todo) > 0; todo = todo[1:] {
		next := filepath.Join(at, todo[0])
		st, err := os.Lstat(next)
		if err != nil {
			return nil
		}
		if st.Mode().Type() != fs.ModeSymlink {
			sys := st.Sys().(*syscall.Stat_t)
			all, at = append(all, part{next, st, int(sys.Uid), int(sys.Gid)}), next
			continue
		}
		target, err := os.Readlink(next)
		if links++; err != nil || links > 40 {
			return nil
		}
		if filepath.IsAbs(target) {
			at = "/"
		}
		todo = append(append([]string{""}, strings.Split(target, "/")...), todo[1:]...)
	}
	return all
}

// unread returns an error if other users can read a file, or list a folder. A folder on the way
// that is closed to other users is enough. A group of this process may read a file of root.
func unread(what, path string) error {
	parts := way(path)
	if len(parts) == 0 || slices.ContainsFunc(parts, part.unread) {
		return nil
	}
	last := parts[len(parts)-1]
	if !last.trusted() {
		return fmt.Errorf("%s: %s belongs to user %d; its owner must be root or user %d: chown %[4]d %[2]s",
			what, path, last.owner, os.Geteuid())
	}
	return fmt.Errorf("%s: %s has mode %04o, so other users can read it: chmod go= %[2]s",
		what, path, last.Mode().Perm())
}

// unchanged returns an error if other users can write to a file or a folder, or put another one
// into its place. The parents of a folder that is closed to other users are not looked at: whoever
// moves the folder away can't make another one of the same owner.
func unchanged(what, path string) error {
	parts := way(path)
	var closed []string
	for _, p := range parts {
		if p.IsDir() && p.private() {
			closed = append(closed, p.path)
		}
	}
	for _, p := range slices.Backward(parts) {
		sticky := p.IsDir() && p.Mode()&fs.ModeSticky != 0
		switch {
		case slices.ContainsFunc(closed, func(c string) bool { return below(p.path, c) || below(c, p.path) }):
		case !p.trusted():
			return fmt.Errorf("%s: %s: user %d owns %s and can change it; its owner must be root or user %d: "+
				"chown %[5]d %[4]s", what, path, p.owner, p.path, os.Geteuid())
		case p.Mode().Perm()&0o022 != 0 && !sticky:
			return fmt.Errorf("%s: %s: %s has mode %04o, so other users can change it: chmod go-w %[3]s",
				what, path, p.path, p.Mode().Perm())
		}
	}
	return nil
}

// below reports whether a path is in a folder.
func below(path, folder string) bool {
	return path != folder && strings.HasPrefix(path, strings.TrimSuffix(folder, "/")+"/")
}

// accessOfAll returns the errors of access, and those of the launcher.
func (c *Config) accessOfAll(path string) []error {
	all := c.access(path)
	if c.launcher != nil {
		for _, fault := range c.launcher.Faults() {
			all = append(all, errors.New(fault))
		}
	}
	return all
}

// refuseAccess returns the errors of accessOfAll as one of the configuration.
func refuseAccess(path string, c Config) error {
	if all := c.accessOfAll(path); len(all) > 0 {
		return configError{errors.Join(all...)}
	}
	return nil
}

// oneLineEach returns the texts of errors.
func oneLineEach(all []error) (texts []string) {
	for _, err := range all {
		texts = append(texts, cause.Line(err.Error()))
	}
	return texts
}
