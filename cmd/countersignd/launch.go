package main

import (
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"countersign/internal/cause"
	"countersign/internal/keystore/worker"
	"countersign/internal/launcher"
	"countersign/internal/sandbox"
)

// launcherCommand is the hidden command of the launcher process.
const launcherCommand = "launcher"

// withLauncher calls do with a configuration that has a launcher. The launcher reads the file path
// itself, and must find the same configuration. soPINFile is the security officer's PIN for a token
// to be made, or "".
func withLauncher(path, soPINFile string, c Config, do func(Config) error) error {
	if err := c.refuseReset(); err != nil {
		return err
	}
	l, err := c.startLauncher(path, soPINFile)
	if err != nil {
		return err
	}
	defer l.Close()
	if err := c.become(); err != nil {
		return err
	}
	c.launcher = l
	return do(c)
}

// startLauncher starts the launcher as the user of the key workers: as a child process, if root
// starts the daemon or if there is one user for both, and else at the socket of the service
// manager.
func (c *Config) startLauncher(path, soPINFile string) (*launcher.Launcher, error) {
	is, root := os.Geteuid(), os.Geteuid() == 0
	switch {
	case c.keysUser == nil || root:
	case is != c.daemonUser.uid:
		return nil, configError{fmt.Errorf("user %d can't start the daemon of the user %s (%d): start it as root or "+
			"as that user", is, c.User, c.daemonUser.uid)}
	case c.KeysSocket == "":
		return nil, configError{fmt.Errorf("only root can start key workers as the user %s (keys_user): "+
			"start as root, or set keys_socket", c.KeysUser)}
	case soPINFile != "":
		return nil, configError{errors.New("--new-token: only root can have a token made: start init as root")}
	default:
		return launcher.Dial(c.KeysSocket, c.digest)
	}
	liftMemoryLimit() // which root may do, and which the key workers inherit
	cmd := exec.Command("/proc/self/exe", launcherCommand, "--config", path, "--so-pin-file", soPINFile)
	cmd.Args[0] = "countersignd"
	cmd.Env, cmd.Stderr = withoutManager(os.Environ()), os.Stderr
	if c.keysUser != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: c.keysUser.credential()}
		cmd.Env = append(cmd.Env, "HOME="+c.keysUser.home)
	}
	return launcher.New(cmd, c.digest)
}

// withoutLauncher returns a cause after the launcher's end.
func withoutLauncher(l *launcher.Launcher) []cause.Cause {
	select {
	case <-l.Ended():
		return cause.Launcher.Err("", l.Why())
	default:
		return nil
	}
}

// withoutManager returns variables without those of the service manager for the daemon.
func withoutManager(variables []string) []string {
	return slices.DeleteFunc(variables, func(v string) bool {
		return strings.HasPrefix(v, "NOTIFY_SOCKET=") || strings.HasPrefix(v, "WATCHDOG_") ||
			strings.HasPrefix(v, "LISTEN_")
	})
}

// launch is the main function of the launcher, started by withLauncher or by the service manager.
func launch(path, soPINFile string) error {
	if err := noCoreFiles(); err != nil {
		return err
	}
	ignoreSignals()
	socket, err := socketOf(3)
	if err != nil {
		return err
	}
	if soPINFile != "" {
		if soPINFile, err = filepath.Abs(soPINFile); err != nil {
			return err
		}
	}
	c, err := loadConfig(path)
	if err == nil {
		err = c.refuseCaller(socket)
	}
	if err != nil {
		return errors.Join(err, launcher.Refuse(socket, err))
	}
	return launcher.Serve(socket, launcher.Config{
		Digest: c.digest, Faults: oneLineEach(c.launcherAccess(path)),
		PIN: func(token string) string {
			if t := c.Tokens[token]; t != nil {
				return worker.IdentifyPIN(token, t.device(), t.pinPath())
			}
			return ""
		},
		Most: func(token string) int {
			if c.Tokens[token] == nil {
				return 0
			}
			return 2*c.Tokens[token].Workers + moreWorkers
		},
		Command: func(s launcher.Start) (*exec.Cmd, []byte, error) { return c.workerCommand(s, soPINFile) },
		Enter:   c.launcherRights(soPINFile).Enter,
	})
}

// moreWorkers is the number of key workers of a token beside two for each slot: of imports, and of
// workers that the kernel can't kill.
const moreWorkers = 4

// ignoreSignals leaves the end of this process to the daemon, which closes the socket.
func ignoreSignals() { signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP) }

// socketOf returns a socket that this process was started with.
func socketOf(descriptor uintptr) (*os.File, error) {
	file := os.NewFile(descriptor, "socket")
	if st, err := file.Stat(); err != nil || st.Mode().Type() != os.ModeSocket {
		return nil, errors.New("the command is for countersignd itself")
	}
	return file, nil
}

// workerCommand makes the command and the configuration of a key worker.
func (c *Config) workerCommand(s launcher.Start, soPINFile string) (*exec.Cmd, []byte, error) {
	t := c.Tokens[s.Token]
	if t == nil {
		return nil, nil, fmt.Errorf("launcher: the configuration has no token %q", s.Token)
	}
	written := t.journal
	written.Token = s.Token
	d := device{Journal: &written, Make: s.Make, Replace: s.Replace}
	// An error comes again when a key worker writes, and is told then.
	os.MkdirAll(written.Folder, 0o700)
	if s.Make && t.TPM != "" {
		os.MkdirAll(t.State, 0o700) // the key worker has rights for what exists
	}
	if t.TPM != "" {
		d.TPM = new(t.tpm())
	} else {
		d.HSM = new(t.hsm())
	}
	var secrets []string
	if s.Make && t.TPM == "" {
		if soPINFile == "" {
			return nil, nil, fmt.Errorf("launcher: the token %q is not to be made", s.Token)
		}
		d.SOPINFile = soPINFile
		secrets = append(secrets, soPINFile)
	}
	if s.Seed != "" {
		seed, err := c.seedFile(s.Seed)
		if err != nil {
			return nil, nil, err
		}
		secrets = append(secrets, seed)
	}
	d.Rights = t.rights(secrets...)
	config, err := json.Marshal(d)
	if err != nil {
		return nil, nil, err
	}
	// The running binary, also after an update of the file.
	cmd := exec.Command("/proc/self/exe", workerCommand, s.Token)
	cmd.Args[0] = "countersignd"
	cmd.Env = os.Environ()
	for name, value := range t.Environment {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	cmd.Env = append(cmd.Env, "GOTRACEBACK=none") // registers and stacks in a log could show secrets
	return cmd, config, nil
}

// seedFile returns the path of a seed file without symbolic links. The file must be in the folder
// for imports, or a key worker could be told to read any file.
func (c *Config) seedFile(path string) (string, error) {
	folder, err := filepath.EvalSymlinks(c.ImportFolder)
	if err == nil {
		folder, err = filepath.Abs(folder)
	}
	if err != nil {
		return "", fmt.Errorf("import_folder: %w", err)
	}
	seed, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", fmt.Errorf("seed file: %w", err)
	}
	if !filepath.IsAbs(path) || !strings.HasPrefix(seed, filepath.Clean(folder)+"/") {
		return "", fmt.Errorf("seed file %s: a seed is imported from the folder %s (import_folder): put the file there",
			path, c.ImportFolder)
	}
	return seed, nil
}

// launcherRights returns what the launcher may do: the rights of all its key workers, and to start
// the binary. A file can be replaced, and a device can come later, so the launcher has the rights
// for their folders.
func (c *Config) launcherRights(soPINFile string) sandbox.Rights {
	r := sandbox.Rights{
		Kind: sandbox.Launcher,
		Read: append(slices.Clone(systemFiles), "/proc", folderOf(c.ImportFolder+"/seed")),
		// The kernel starts the binary by its interpreter.
		Execute: absolute("/proc/self/exe", interpreter()),
	}
	if soPINFile != "" {
		r.Read = append(r.Read, folderOf(soPINFile))
	}
	for _, name := range slices.Sorted(maps.Keys(c.Tokens)) {
		of := c.Tokens[name].rights()
		for _, each := range []struct {
			to   *[]string
			from []string
		}{{&r.Read, of.Read}, {&r.Write, of.Write}, {&r.Devices, of.Devices}, {&r.Sockets, of.Sockets}} {
			for _, path := range each.from {
				if filepath.Clean(path) == "/" {
					continue // the key worker of this token refuses it, and no other
				}
				if !slices.Contains(systemFiles, path) && path != "/dev/null" {
					path = folderOf(path)
				}
				*each.to = append(*each.to, path)
			}
		}
		r.Connect = append(r.Connect, of.Connect...)
	}
	for _, all := range []*[]string{&r.Read, &r.Write, &r.Devices, &r.Sockets} {
		slices.Sort(*all)
		*all = slices.Compact(*all)
	}
	return r
}

// folderOf returns the nearest folder above a path that exists, or the path itself directly
// below /.
func folderOf(path string) string {
	path, err := filepath.Abs(path)
	if err != nil {
		return path
	}
	for at := filepath.Dir(path); at != "/"; at = filepath.Dir(at) {
		if st, err := os.Stat(at); err == nil && st.IsDir() {
			return at
		}
	}
	return path
}

// interpreter returns the path of the running binary's interpreter (PT_INTERP), or "" for a binary
// without one.
func interpreter() string {
	file, err := elf.Open("/proc/self/exe")
	if err != nil {
		return ""
	}
	defer file.Close()
	for _, p := range file.Progs {
		if p.Type == elf.PT_INTERP {
			path := make([]byte, min(p.Filesz, syscall.PathMax))
			if _, err := p.ReadAt(path, 0); err != nil {
				return ""
			}
			return strings.TrimRight(string(path), "\x00")
		}
	}
	return ""
}
