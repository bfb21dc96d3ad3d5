package agent

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"countersign/internal/machine"

	"golang.org/x/sys/unix"
)

// Commands with a drive bring an appliance back, as root does on a host. A machine has nobody to
// log in, so its console takes those commands of countersignd that give nobody any power: a restore
// needs the approvals of the backup's operators, and keys return by the shares of their holders.
// Their files are on a drive with a FAT file system of the name driveLabel.
//
// The drive is mounted while a command runs, and can be pulled at any other time.
const (
	driveLabel  = "COUNTERSIGN"
	driveDevice = "/dev/disk/by-label/" + driveLabel
	driveFolder = runFolder + "/drive"

	// workFolder is that of a command that waits for drives to come and go.
	workFolder = runFolder + "/work"
	// scratchFolder is for decrypted files, on the encrypted disk.
	scratchFolder = stateFolder + "/machine/scratch"
)

// operand is the kind of a flag's value.
type operand int

const (
	noValue    operand = iota
	textValue          // a name or a number
	fileValue          // on the drive
	filesValue         // files on the drive, separated by commas
)

// command is a command of countersignd that the console may run.
type command struct {
	flags map[string]operand
	file  bool // has one argument, a file on the drive
	stops bool // the daemon must not run meanwhile
	waits bool // runs while drives come and go

	drive bool // the line names a file on the drive
}

var commands = map[string]command{
	"check": {flags: map[string]operand{"deep": noValue, "write": noValue, "retry-pin": textValue}},
	"backup verify": {file: true, flags: map[string]operand{
		"identity": filesValue, "lists": fileValue, "until-list": textValue,
	}},
	"restore": {file: true, stops: true, flags: map[string]operand{
		"appliance": textValue, "identity": filesValue, "proposer": textValue, "text": fileValue,
		"approval": filesValue, "lists": fileValue, "until-list": textValue,
	}},
	"init": {stops: true, flags: map[string]operand{
		"token": textValue, "new-token": noValue, "so-pin-file": fileValue,
	}},
	"return-keys": {stops: true, waits: true, flags: map[string]operand{"key": textValue, "wait": textValue}},
}

// parseCommand parses a line such as
//
//	countersignd restore NAME.backup --appliance NAME --identity FILE --proposer NAME --text FILE
//
// into arguments of countersignd.
func parseCommand(line string) (c command, args []string, err error) {
	words := strings.Fields(line)
	if len(words) > 0 && words[0] == "countersignd" {
		words = words[1:]
	}
	name, n := strings.Join(words[:min(1, len(words))], " "), 1
	if name == "backup" && len(words) > 1 {
		name, n = "backup "+words[1], 2
	}
	c, known := commands[name]
	if !known {
		var all []string
		for each := range commands {
			all = append(all, each)
		}
		slices.Sort(all)
		return c, nil, fmt.Errorf("%q is none of the commands: %s", name, strings.Join(all, ", "))
	}
	args, words = words[:n:n], words[n:]
	files := 0
	for len(words) > 0 {
		word := words[0]
		words = words[1:]
		flag, is := strings.CutPrefix(word, "--")
		if !is {
			if err := onDrive(word); err != nil {
				return c, nil, err
			}
			files, c.drive = files+1, true
			args = append(args, word)
			continue
		}
		flag, value, given := strings.Cut(flag, "=")
		kind, known := c.flags[flag]
		switch {
		case !known:
			return c, nil, fmt.Errorf("%s has no --%s on a machine", name, flag)
		case kind == noValue && given:
			return c, nil, fmt.Errorf("--%s has no value", flag)
		case kind == noValue:
			args = append(args, "--"+flag)
			continue
		case !given && len(words) == 0:
			return c, nil, fmt.Errorf("--%s needs a value", flag)
		case !given:
			value, words = words[0], words[1:]
		}
		if kind == fileValue && flag == "lists" && value == "none" {
			kind = textValue
		}
		if kind == fileValue || kind == filesValue {
			for each := range strings.SplitSeq(value, ",") {
				if err := onDrive(each); err != nil {
					return c, nil, err
				}
			}
			c.drive = true
		}
		args = append(args, "--"+flag+"="+value)
	}
	if name == "init" && !slices.ContainsFunc(args, func(a string) bool { return strings.HasPrefix(a, "--token=") }) {
		return c, nil, errors.New("init needs --token: the appliance itself is made by the first boot")
	}
	if c.file && files != 1 || !c.file && files != 0 {
		return c, nil, fmt.Errorf("%s: %d files are named", name, files)
	}
	if c.waits {
		args = append(args, "--request=return.request", "--answers=answers")
	}
	return c, args, nil
}

// onDrive refuses a name that leaves the drive.
func onDrive(name string) error {
	if name == "" || strings.HasPrefix(name, "-") || !filepath.IsLocal(name) {
		return fmt.Errorf("%q is no file of the drive: name it as it is there, without a leading slash", name)
	}
	return nil
}

// withDrive runs do while the drive is mounted.
func withDrive(do func() error) (err error) {
	if _, err := os.Stat(driveDevice); err != nil {
		return fmt.Errorf("there is no drive with a FAT file system of the name %s: attach it first", driveLabel)
	}
	if err := os.MkdirAll(driveFolder, 0o700); err != nil {
		return err
	}
	const flags = mountFlags | unix.MS_NOSYMFOLLOW
	if err := unix.Mount(driveDevice, driveFolder, "vfat", flags, "umask=0077,errors=remount-ro"); err != nil {
		return fmt.Errorf("the drive: %w", err)
	}
	defer func() { err = errors.Join(err, syncAll(driveFolder), unmountDrive()) }()
	return do()
}

// unmountDrive waits a little for processes of a command that was ended. All is on the drive
// already.
func unmountDrive() error {
	for range 50 {
		if err := unix.Unmount(driveFolder, 0); !errors.Is(err, unix.EBUSY) {
			return err
		}
		time.Sleep(100 * time.Millisecond)
	}
	return unix.Unmount(driveFolder, unix.MNT_DETACH)
}

// command runs a command, whose terminal is the connection.
func (a *Agent) command(w http.ResponseWriter, r *http.Request) error {
	var in machine.Named
	if err := json.NewDecoder(io.LimitReader(r.Body, maxBody)).Decode(&in); err != nil {
		return err
	}
	c, args, err := parseCommand(in.Name)
	if err != nil {
		return err
	}
	if a.facts.Partition == "" {
		return errors.New("the state of this machine is not open: see the reason above")
	}
	if !a.acting.TryLock() {
		return errors.New("the machine is busy with another act")
	}
	defer a.acting.Unlock()
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return err
	}
	defer conn.Close()
	fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: terminal\r\n\r\n")
	a.Log.Warn("a command at the console", "command", args[0])
	if err := a.runCommand(c, args, conn, buffered.Reader); err != nil {
		fmt.Fprintf(conn, "not done: %v\n", err)
	}
	return nil
}

func (a *Agent) runCommand(c command, args []string, conn net.Conn, in *bufio.Reader) (err error) {
	ctx, end := context.WithCancel(context.Background())
	defer end()
	if c.stops {
		fmt.Fprintf(conn, "the appliance stops\n")
		if err := stopAppliance(ctx); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, a.startAppliance(conn)) }()
	}
	if err := errors.Join(os.RemoveAll(scratchFolder), os.MkdirAll(scratchFolder, 0o700)); err != nil {
		return err
	}
	defer os.RemoveAll(scratchFolder)
	run := func(folder string) error { return onTerminal(ctx, end, folder, args, conn, in) }
	switch {
	case c.drive:
		return withDrive(func() error {
			forget, err := lendSOPIN(args)
			if err != nil {
				return err
			}
			defer forget()
			return run(driveFolder)
		})
	case !c.waits:
		return run("/")
	}
	// As on a host, the command can read the folder when it has become the daemon's user.
	answers := filepath.Join(workFolder, "answers")
	if err := errors.Join(os.RemoveAll(workFolder), os.MkdirAll(answers, 0o755), os.Chmod(workFolder, 0o755),
		os.Chmod(answers, 0o755)); err != nil {
		return err
	}
	defer os.RemoveAll(workFolder)
	exchanged := make(chan struct{})
	go func() { defer close(exchanged); exchange(ctx, conn) }()
	err = run(workFolder)
	end()
	<-exchanged
	return err
}

// soPINFile is the security officer's PIN for the key worker that makes a token, while a command
// runs.
const soPINFile = "/var/lib/countersign-keys/so-pin-of-drive"

// lendSOPIN copies the file of the security officer's PIN to where the user of the key workers can
// read it, and changes the argument. forget removes the copy.
func lendSOPIN(args []string) (forget func(), err error) {
	forget = func() {}
	for i, arg := range args {
		name, is := strings.CutPrefix(arg, soPINFlag)
		if !is {
			continue
		}
		b, err := readBounded(filepath.Join(driveFolder, name), maxPIN+2)
		defer clear(b)
		if err != nil {
			return forget, err
		}
		owner, err := keysOwner()
		if err != nil {
			return forget, err
		}
		args[i] = soPINFlag + soPINFile
		if err := replaceAs(soPINFile, b, 0o600, owner, owner); err != nil {
			return forget, err
		}
		return func() {
			os.WriteFile(soPINFile, make([]byte, len(b)), 0o600)
			os.Remove(soPINFile)
		}, nil
	}
	return forget, nil
}

const soPINFlag = "--so-pin-file="

// applianceUnits are the units of the appliance.
var applianceUnits = []string{"countersignd.service", "countersignd-keys.socket", "countersignd-admin.socket"}

// stopAppliance stops the units. A daemon that is about to start again by itself must not cancel
// that.
func stopAppliance(ctx context.Context) (err error) {
	args := append([]string{"stop", "--job-mode=replace-irreversibly"}, applianceUnits...)
	for range 3 {
		if err = run(ctx, nil, "systemctl", args...); err == nil {
			return nil
		}
	}
	return err
}

// startAppliance starts the units again, unless there is nothing to start yet.
func (a *Agent) startAppliance(conn net.Conn) error {
	if waiting() {
		return nil
	}
	ctx := context.Background()
	if err := addSocket(); err != nil {
		return err
	}
	fmt.Fprintf(conn, "the appliance starts\n")
	if err := run(ctx, nil, "systemctl", "restart", "countersign-setup.service"); err != nil {
		return errors.New(cmp.Or(Failed("setup"), err.Error()))
	}
	// Keys of the HTTPS listener that were lost with a TPM come anew: without them, no operator
	// could reach the appliance. The rest is there.
	if err := countersignd(ctx, "init"); err != nil {
		fmt.Fprintf(conn, "countersignd init: %v\n", err)
	}
	return startUnits(ctx)
}

func startUnits(ctx context.Context) error {
	return run(ctx, nil, "systemctl", append([]string{"--no-block", "start"}, applianceUnits...)...)
}

// addSocket names the agent's socket in a configuration that came from a host.
func addSocket() error {
	b, err := os.ReadFile(configFile)
	if err != nil || strings.Contains("\n"+string(b), "\nmachine_socket") {
		return err
	}
	return putConfig(configFile, append(fmt.Appendf(nil, "machine_socket = %q\n", machine.Socket), b...))
}

// onTerminal runs countersignd in a folder, with a terminal of its own. The end of the connection
// ends the command.
func onTerminal(ctx context.Context, end func(), folder string, args []string, conn net.Conn, in *bufio.Reader) error {
	terminal, slave, err := openPTY()
	if err != nil {
		return err
	}
	defer terminal.Close()
	cmd := exec.CommandContext(ctx, "/usr/bin/countersignd", args...)
	cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr = folder, slave, slave, slave
	cmd.Env = []string{"PATH=/usr/bin:/bin:/usr/sbin:/sbin", "HOME=/", "TMPDIR=" + scratchFolder}
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Setctty: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	err = cmd.Start()
	slave.Close()
	if err != nil {
		return err
	}
	go func() {
		io.Copy(terminal, in)
		end()
	}()
	io.Copy(conn, terminal) // until the last process has closed the terminal
	return cmd.Wait()
}

// openPTY opens a pseudo-terminal (pty(7)).
func openPTY() (terminal, slave *os.File, err error) {
	terminal, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, err
	}
	n, err := unix.IoctlGetInt(int(terminal.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(terminal.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		terminal.Close()
	}
	return terminal, slave, err
}

// exchange carries the request of a command to each drive that is attached, and the holders'
// answers from there, until ctx ends.
func exchange(ctx context.Context, conn net.Conn) {
	var said string
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(3 * time.Second):
		}
		request, err := os.ReadFile(filepath.Join(workFolder, "return.request"))
		if err != nil || len(request) == 0 {
			continue // not written yet
		}
		if _, err := os.Stat(driveDevice); err != nil {
			said = ""
			continue
		}
		var taken int
		err = withDrive(func() (err error) {
			taken, err = exchangeFiles(request)
			return err
		})
		text := fmt.Sprintf("drive        it has return.request, and its answers were taken: %d; pull it", taken)
		if err != nil {
			text = "drive        " + err.Error()
		}
		if text != said {
			said = text
			fmt.Fprintf(conn, "%s\n", text)
		}
	}
}

const (
	maxAnswer  = 256 << 10 // bytes
	maxAnswers = 32
)

// exchangeFiles writes the request to the drive, and takes the answers, which are in its root.
func exchangeFiles(request []byte) (taken int, err error) {
	path := filepath.Join(driveFolder, "return.request")
	if there, err := readBounded(path, maxAnswer); err != nil || string(there) != string(request) {
		if err := os.WriteFile(path, request, 0o600); err != nil {
			return 0, err
		}
	}
	found, err := filepath.Glob(filepath.Join(driveFolder, "*.answer"))
	if err != nil {
		return 0, err
	}
	for _, from := range found[:min(len(found), maxAnswers)] {
		b, err := readBounded(from, maxAnswer)
		if err != nil {
			return taken, err
		}
		to := filepath.Join(workFolder, "answers", digest(b)+".answer")
		if _, err := os.Stat(to); errors.Is(err, fs.ErrNotExist) {
			if err := os.WriteFile(to+".new", b, 0o644); err != nil {
				return taken, err
			}
			if err := errors.Join(os.Chmod(to+".new", 0o644), os.Rename(to+".new", to)); err != nil {
				return taken, err
			}
		}
		taken++
	}
	return taken, nil
}
