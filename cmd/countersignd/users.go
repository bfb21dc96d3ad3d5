package main

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// account is a user of the machine, as a process has the user.
type account struct {
	uid, gid int
	groups   []int
	home     string
}

// lookUp returns the account of a user's name. A number need not be that of a known user, and is
// then the number of the group, too.
func lookUp(name string) (*account, error) {
	number, err := strconv.ParseUint(name, 10, 31)
	isNumber := err == nil
	var u *user.User
	if isNumber {
		u, err = user.LookupId(name)
	} else {
		u, err = user.Lookup(name)
	}
	a := &account{home: "/"}
	switch {
	case err == nil:
		groups, err := u.GroupIds()
		if err != nil {
			return nil, err
		}
		for _, id := range append([]string{u.Uid, u.Gid}, groups...) {
			n, err := strconv.Atoi(id)
			if err != nil {
				return nil, err
			}
			a.groups = append(a.groups, n)
		}
		a.uid, a.gid, a.groups, a.home = a.groups[0], a.groups[1], a.groups[2:], u.HomeDir
	case isNumber && errors.As(err, new(user.UnknownUserIdError)):
		a.uid, a.gid = int(number), int(number)
	default:
		return nil, fmt.Errorf("%w: make the user first (systemd-sysusers)", err)
	}
	if a.uid == 0 {
		return nil, errors.New("root is no user to be confined to")
	}
	return a, nil
}

// lookUpUsers finds the users of the configuration.
func (c *Config) lookUpUsers() (err error) {
	if c.User == "" {
		return nil
	}
	if c.daemonUser, err = lookUp(c.User); err != nil {
		return fmt.Errorf("user: %w", err)
	}
	if c.keysUser, err = lookUp(c.KeysUser); err != nil {
		return fmt.Errorf("keys_user: %w", err)
	}
	if c.keysUser.uid == c.daemonUser.uid {
		return errors.New("user and keys_user are one user: name two, or leave both out")
	}
	return nil
}

// checkUsers checks the fields about users.
func (c *Config) checkUsers() error {
	switch {
	case (c.User == "") != (c.KeysUser == ""):
		return errors.New("user and keys_user go together: name both, or leave both out")
	case c.KeysSocket != "" && c.User == "":
		return errors.New("keys_socket needs user and keys_user, who may use the socket and who serves there")
	case c.KeysUser != "" && c.Journal.Folder == "":
		return errors.New("journal.folder is missing: name a folder that keys_user may write to")
	}
	return nil
}

// credential returns the account for a child process.
func (a *account) credential() *syscall.Credential {
	groups := make([]uint32, len(a.groups))
	for i, g := range a.groups {
		groups[i] = uint32(g)
	}
	return &syscall.Credential{Uid: uint32(a.uid), Gid: uint32(a.gid), Groups: groups}
}

// become makes this process, if it is root's, one of the daemon's user. No way leads back.
func (c *Config) become() error {
	a := c.daemonUser
	if a == nil || os.Geteuid() != 0 {
		return nil
	}
	// Package syscall does so on all threads, those of C included. The user comes last, as only
	// root may change the groups.
	err := syscall.Setgroups(a.groups)
	if err == nil {
		err = syscall.Setgid(a.gid)
	}
	if err == nil {
		err = syscall.Setuid(a.uid)
	}
	if err == nil {
		err = os.Setenv("HOME", a.home)
	}
	if err != nil {
		return fmt.Errorf("user %s: %w", c.User, err)
	}
	return nil
}

// refuseCaller returns an error if the launcher of a key worker's user has another user, or if a
// third user has connected to its socket.
func (c *Config) refuseCaller(socket *os.File) error {
	if c.keysUser == nil {
		return nil
	}
	if is := os.Geteuid(); is != c.keysUser.uid {
		return fmt.Errorf("the launcher of the key workers runs as user %d, and keys_user is %s (%d): correct its unit",
			is, c.KeysUser, c.keysUser.uid)
	}
	caller, err := unix.GetsockoptUcred(int(socket.Fd()), unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return fmt.Errorf("the launcher's socket: %w", err)
	}
	if !slices.Contains([]int{0, c.daemonUser.uid}, int(caller.Uid)) {
		return fmt.Errorf("user %d asks for key workers, and user is %s (%d)", caller.Uid, c.User, c.daemonUser.uid)
	}
	return nil
}
