package softhsmtests

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/sys/unix"
)

// unitFolder has the units of systemd, with their drop-ins.
const unitFolder = "../packaging/systemd"

func needSystemd(t testing.TB) {
	t.Helper()
	needTool(t, "systemd-analyze", "systemd")
}

// installUnits copies the units into the folder of a root, with the built daemon as ExecStart, and
// the drop-ins that are named.
func installUnits(t *testing.T, dropIns ...string) (folder string) {
	t.Helper()
	folder = filepath.Join(t.TempDir(), "etc/systemd/system")
	must(0, os.MkdirAll(folder, 0o755))(t)
	files := append(must(filepath.Glob(unitFolder+"/*.[st]*"))(t), dropIns...)
	for _, file := range files {
		if st := must(os.Stat(file))(t); st.IsDir() {
			must(0, os.MkdirAll(filepath.Join(folder, filepath.Base(file)), 0o755))(t)
			continue
		}
		text := strings.ReplaceAll(string(must(os.ReadFile(file))(t)), "/usr/bin/countersignd",
			filepath.Join(bin, "countersignd"))
		to := filepath.Join(folder, must(filepath.Rel(unitFolder, file))(t))
		if err := os.WriteFile(to, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return folder
}

// TestUnitsExposure holds the exposure of the units, by systemd's own measure, with and without
// their drop-ins.
func TestUnitsExposure(t *testing.T) {
	needSystemd(t)
	const most = 1.5
	dropIns := must(filepath.Glob(unitFolder + "/*.service.d/*.conf"))(t)
	for n := range len(dropIns) + 1 {
		folder := installUnits(t, dropIns[:n]...)
		for _, name := range []string{
			"countersignd.service", "countersignd-keys@1.service", "countersignd-drill.service",
		} {
			exposure(t, filepath.Join(folder, name), most)
		}
	}
}

// exposure checks the exposure of a unit.
func exposure(t *testing.T, unit string, most float64) {
	t.Helper()
	out, err := exec.Command("systemd-analyze", "security", "--offline=true", "--no-pager", unit).CombinedOutput()
	m := regexp.MustCompile(`Overall exposure level for ` + regexp.QuoteMeta(filepath.Base(unit)) + `: ([0-9.]+)`).
		FindSubmatch(out)
	if err != nil || m == nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if level := must(strconv.ParseFloat(string(m[1]), 64))(t); level > most {
		t.Errorf("the exposure level is %v, at most %v is allowed\n%s", level, most, out)
	}
}

// TestUnitsVerify has systemd read all units, the users and the folders.
func TestUnitsVerify(t *testing.T) {
	needSystemd(t)
	folder := installUnits(t, must(filepath.Glob(unitFolder+"/*.service.d/*.conf"))(t)...)
	units := must(filepath.Glob(folder + "/countersign*.s*t"))(t)
	units = append(units, folder+"/countersignd.service", folder+"/countersignd-keys@1.service",
		folder+"/countersignd-drill.service", folder+"/countersignd-drill.timer")
	out, err := exec.Command("systemd-analyze", append([]string{"verify", "--man=no"}, units...)...).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	needRoot(t, "users and folders of a package")
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"systemd-sysusers", "--root=" + root, must(filepath.Abs(unitFolder + "/countersign.sysusers"))(t)},
		{"systemd-tmpfiles", "--create", "--root=" + root, must(filepath.Abs(unitFolder + "/countersign.tmpfiles"))(t)},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", args[0], err, out)
		}
	}
	users := map[string]uint32{"root": 0}
	for line := range strings.Lines(string(must(os.ReadFile(filepath.Join(root, "etc/passwd")))(t))) {
		field := strings.Split(line, ":")
		users[field[0]] = uint32(must(strconv.Atoi(field[2]))(t))
	}
	for path, want := range map[string]struct {
		mode os.FileMode
		user string
	}{
		"etc/countersign": {0o750 | os.ModeSetgid, "root"}, "var/lib/countersign": {0o700, "countersign"},
		"var/lib/countersign-keys": {0o700, "countersign-keys"}, "run/countersign": {0o755, "countersign"},
	} {
		st := must(os.Stat(filepath.Join(root, path)))(t)
		if owner := st.Sys().(*syscall.Stat_t).Uid; st.Mode()&^os.ModeDir != want.mode || owner != users[want.user] {
			t.Errorf("%s has mode %04o and owner %d, want %04o and %s",
				path, st.Mode().Perm(), owner, want.mode, want.user)
		}
	}
}

// directives returns the settings of a section of a unit, in their order.
func directives(t *testing.T, file, section string) map[string][]string {
	t.Helper()
	all, in := map[string][]string{}, ""
	for line := range strings.Lines(string(must(os.ReadFile(file))(t))) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			in = strings.Trim(line, "[]")
		} else if name, value, is := strings.Cut(line, "="); is && !strings.HasPrefix(line, "#") && in == section {
			all[name] = append(all[name], value)
		}
	}
	return all
}

// systemCalls returns the list that SystemCallFilter= gives, by systemd's own sets.
func systemCalls(t *testing.T, lines []string) []string {
	t.Helper()
	allowed := map[string]bool{}
	var set func(name string, is bool)
	set = func(name string, is bool) {
		if !strings.HasPrefix(name, "@") {
			allowed[name] = is
			return
		}
		out := must(exec.Command("systemd-analyze", "--no-pager", "syscall-filter", name).Output())(t)
		for line := range strings.Lines(string(out)) {
			if each := strings.TrimSpace(line); strings.HasPrefix(line, " ") && !strings.HasPrefix(each, "#") {
				set(each, is)
			}
		}
	}
	set("@default", true)
	for _, line := range lines {
		line, not := strings.CutPrefix(line, "~")
		for _, name := range strings.Fields(line) {
			set(name, !not)
		}
	}
	maps.DeleteFunc(allowed, func(_ string, is bool) bool { return !is })
	return slices.Sorted(maps.Keys(allowed))
}

// likeUnit is the script that takes from a process what the unit takes, and then executes a command
// as a user, $4. $1 is a folder that stays, with a folder $5 that can be written and a folder $6
// that can't be opened; $2 and $3 are folders that can be read.
const likeUnit = `
set -eu
keep=$1 bin=$2 self=$3 user=$4 state=$5 hidden=$6; shift 6
cd /
mkdir -p /run/units-test.$$ && at=/run/units-test.$$
mount -t tmpfs tmpfs $at
mkdir $at/keep $at/bin $at/self $at/dev $at/notify
mount --bind "$keep" $at/keep; mount --bind "$bin" $at/bin; mount --bind "$self" $at/self
notify=$(dirname "${NOTIFY_SOCKET:-$bin/none}"); mount --bind "$notify" $at/notify
[ -z "${NOTIFY_SOCKET:-}" ] || chmod 0777 "$NOTIFY_SOCKET"
mount -t tmpfs -o mode=1777 tmpfs /tmp             # PrivateTmp
mount -t tmpfs -o mode=1777 tmpfs /var/tmp
for home in /home /root; do mount -t tmpfs -o mode=0,ro tmpfs $home; done      # ProtectHome
mkdir -p "$keep" "$bin" "$self" "$notify"
mount --bind $at/notify "$notify"; mount --bind $at/keep "$keep"
mount --bind $at/bin "$bin"; mount --bind $at/self "$self"
for device in null zero full random urandom; do touch $at/dev/$device; mount --bind /dev/$device $at/dev/$device; done
mount --rbind $at/dev /dev                          # PrivateDevices
findmnt -rn -o TARGET | while read -r target; do    # ProtectSystem, ProtectControlGroups, ProtectKernelTunables
  case $target in /proc* | /dev* | /tmp | /var/tmp | $at*) continue ;; esac
  mount -o remount,bind,ro "$target" 2>/dev/null || true
done
mount --bind "$at/keep/$state" "$keep/$state"       # StateDirectory
mount -o remount,bind,rw "$keep/$state"
mount -t tmpfs -o mode=0,ro tmpfs "$keep/$hidden"   # InaccessiblePaths
umount -l $at
mount -t proc -o hidepid=invisible,subset=pid proc /proc # ProtectProc, ProcSubset
umask 0077
! touch "$keep/config" /usr/touched 2>/dev/null
! ls /proc/sys /proc/1/status /root 2>/dev/null >/dev/null
exec prlimit --core=0 setpriv --reuid "$user" --regid "$user" --init-groups \
  --bounding-set=-all --inh-caps=-all --ambient-caps=-all --no-new-privs "$@"
`

// filterEnv has the system calls for enterUnit, as JSON.
const filterEnv = "COUNTERSIGN_TEST_SYSTEM_CALLS"

// networkEnv is set for the unit with a network.
const networkEnv = "COUNTERSIGN_TEST_NETWORK"

// enterUnit puts the filters of the unit in force and executes the command line, in a process that
// likeUnit has started. Otherwise enterUnit returns at once.
func enterUnit() {
	text, is := os.LookupEnv(filterEnv)
	if !is {
		return
	}
	os.Unsetenv(filterEnv)
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, "enter the unit:", err)
			os.Exit(1)
		}
	}
	var allowed []string
	fail(json.Unmarshal([]byte(text), &allowed))
	families := []uint64{unix.AF_UNIX}
	if os.Getenv(networkEnv) != "" {
		families = append(families, unix.AF_INET, unix.AF_INET6)
	}
	info := orPanic(arch.GetInfo(""))
	known := slices.DeleteFunc(allowed, func(name string) bool { _, has := info.SyscallNames[name]; return !has })
	fail(unix.Prctl(unix.PR_SET_MDWE, unix.PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0)) // MemoryDenyWriteExecute
	action := func(errno unix.Errno) seccomp.Action { return seccomp.ActionErrno | seccomp.Action(errno) }
	load := func(otherwise seccomp.Action, groups ...seccomp.SyscallGroup) {
		fail(seccomp.LoadFilter(seccomp.Filter{
			Flag: seccomp.FilterFlagTSync, Policy: seccomp.Policy{DefaultAction: otherwise, Syscalls: groups},
		}))
	}
	refuse := func(name string, errno unix.Errno, argument uint32, is seccomp.Operation, values ...uint64) {
		var all seccomp.ArgumentConditions
		for _, value := range values {
			all = append(all, seccomp.Condition{Argument: argument, Operation: is, Value: value})
		}
		load(seccomp.ActionAllow, seccomp.SyscallGroup{Action: action(errno),
			NamesWithCondtions: []seccomp.NameWithConditions{{Name: name, Conditions: all}}})
	}
	refuse("socket", unix.EAFNOSUPPORT, 0, seccomp.NotEqual, families...) // RestrictAddressFamilies
	const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER |
		unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWCGROUP
	refuse("clone", unix.EPERM, 0, seccomp.BitsSet, namespaces) // RestrictNamespaces
	refuse("personality", unix.EPERM, 0, seccomp.NotEqual, 0)   // LockPersonality
	for _, policy := range []uint64{unix.SCHED_FIFO, unix.SCHED_RR, unix.SCHED_DEADLINE} {
		refuse("sched_setscheduler", unix.EPERM, 1, seccomp.Equal, policy) // RestrictRealtime
	}
	for name, argument := range map[string]uint32{"chmod": 1, "fchmod": 1, "fchmodat": 2, "mkdir": 1, "mkdirat": 2} {
		refuse(name, unix.EPERM, argument, seccomp.BitsSet, unix.S_ISUID|unix.S_ISGID) // RestrictSUIDSGID
	}
	load(seccomp.ActionAllow, // RestrictNamespaces
		seccomp.SyscallGroup{Action: action(unix.ENOSYS), Names: []string{"clone3"}},
		seccomp.SyscallGroup{Action: action(unix.EPERM), Names: []string{"unshare", "setns"}})
	load(seccomp.ActionErrno, seccomp.SyscallGroup{Action: seccomp.ActionAllow, Names: known})
	os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
	fail(unix.Exec(os.Args[1], os.Args[1:], os.Environ()))
}

// tried are the directives that TestUnitServes puts in force by hand.
var tried = strings.Fields(`User Group UMask LimitCORE ProtectSystem StateDirectory InaccessiblePaths PrivateNetwork
	StateDirectoryMode ProtectHome PrivateTmp PrivateMounts ProtectProc ProcSubset PrivateDevices ProtectControlGroups
	ProtectKernelTunables ProtectHostname NoNewPrivileges CapabilityBoundingSet AmbientCapabilities LockPersonality
	MemoryDenyWriteExecute RestrictNamespaces RestrictRealtime RestrictSUIDSGID SystemCallErrorNumber SystemCallFilter
	RestrictAddressFamilies ExecStart Type`)

// untried are the other directives of the unit: of the service manager itself, those that take
// nothing else than what a directive above takes, and those that need a running systemd.
var untried = strings.Fields(`NotifyAccess ExecReload WatchdogSec Restart RestartPreventExitStatus RestartSec
	LimitNOFILE LimitMEMLOCK TasksMax OOMPolicy DevicePolicy ProtectClock ProtectKernelLogs ProtectKernelModules
	KeyringMode RemoveIPC
	SystemCallArchitectures IPAddressDeny IPAddressAllow`)

// TestUnitServes puts the restrictions of the units in force by hand, since there is no running
// systemd: mounts, users, capabilities, limits, filters of system calls. The daemon makes keys,
// signs, reloads and stops. The configuration is read-only, and all sockets are the service
// manager's.
func TestUnitServes(t *testing.T) {
	needSystemd(t)
	services := map[string]map[string][]string{}
	for _, name := range []string{"countersignd", "countersignd-keys@"} {
		services[name] = directives(t, filepath.Join(unitFolder, name+".service"), "Service")
		for directive := range services[name] {
			if !slices.Contains(slices.Concat(tried, untried), directive) {
				t.Errorf("%s= of %s is neither tried nor known", directive, name)
			}
		}
	}
	for _, directive := range slices.Concat(tried, untried) {
		if services["countersignd"][directive] == nil && services["countersignd-keys@"][directive] == nil {
			t.Errorf("no unit has %s=", directive)
		}
	}
	s, u := newTwoUsers(t)
	s.edit("countersign.toml", "listen =", "keys_socket = \"keys.sock\"\nlisten =")
	group := must(net.Listen("unix", s.path("run/admin.sock")))(t).(*net.UnixListener)
	defer group.Close()
	s.ok(os.Chmod(s.path("run/admin.sock"), 0o660))
	group.SetUnlinkOnClose(false)
	s.edit("countersign.toml", "log_level", "admin_group = \"root\"\nlog_level")
	peers := must(net.Listen("tcp", s.listen))(t).(*net.TCPListener)
	defer peers.Close()
	self := must(os.Executable())(t)
	unit := func(name, user, state, hidden string, more []string, args ...string) (line, environment []string) {
		line = append(slices.Clone(s.before), "unshare", "--mount", "--uts", "--propagation", "private")
		line = append(append(line, more...), "bash", "-c", likeUnit, "unit", s.dir, bin, filepath.Dir(self),
			user, state, hidden,
			self, filepath.Join(bin, "countersignd"))
		calls := must(json.Marshal(systemCalls(t, services[name]["SystemCallFilter"])))(t)
		line = append(append(line, args...), "--config", s.path("countersign.toml"))
		return line, []string{filterEnv + "=" + string(calls)}
	}
	line, environment := unit("countersignd-keys@", "countersign-keys", "keys", "state", []string{"--net"}, "launcher")
	activate := []string{"--accept", "--seqpacket", "--listen=" + s.path("keys.sock"), "--setenv=PATH"}
	for _, variable := range environment {
		activate = append(activate, "--setenv="+variable)
	}
	manager := exec.Command("systemd-socket-activate", append(activate, line...)...)
	var log strings.Builder
	manager.Stderr = &log
	s.ok(manager.Start())
	defer func() {
		manager.Process.Kill()
		manager.Wait()
		s.checkOutput("the launchers' log", log.String())
		if t.Failed() {
			t.Log(tail(log.String(), 3000))
		}
	}()
	eventually(t, "the socket for key workers", func() bool {
		return os.Chown(s.path("keys.sock"), int(u.daemon.Uid), int(u.daemon.Gid)) == nil
	})
	daemon := func(args ...string) *exec.Cmd {
		line, environment := unit("countersignd", "countersign", "state", "keys", nil, args...)
		cmd := exec.Command(line[0], line[1:]...)
		cmd.Env = append(append(os.Environ(), environment...), networkEnv+"=1")
		return cmd
	}
	cmd := daemon("serve")
	cmd.Env = append(cmd.Env, "LISTEN_FDS=2")
	cmd.ExtraFiles = []*os.File{must(group.File())(t), must(peers.File())(t)}
	p := s.start(cmd)
	s.enrolRoot()
	s.enrol()
	s.signs("payments", "")
	s.must("admin", "key", "rotate", "payments")
	launchers := children(t, manager.Process.Pid)
	for pid, user := range map[int]uint32{p.cmd.Process.Pid: u.daemon.Uid, launchers[0]: u.keys.Uid} {
		status := string(must(os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)))(t))
		for _, line := range []string{
			fmt.Sprintf("Uid:\t%[1]d\t%[1]d\t%[1]d\t%[1]d\n", user), "CapBnd:\t0000000000000000\n", "Seccomp:\t2\n",
		} {
			if !strings.Contains(status, line) {
				t.Errorf("process %d does not run as its unit has it: no %q in\n%s", pid, line, status)
			}
		}
	}
	p.cmd.Process.Signal(syscall.SIGHUP)
	eventually(t, "the reload", func() bool {
		return strings.Contains(p.stderr.String(), "reload: the configuration was read")
	})
	p.stop()
	if out, err := daemon("check", "--write").CombinedOutput(); err == nil ||
		strings.Count(string(out), "FAULT") != 1 || !strings.Contains(string(out), "a socket unit listens") {
		t.Errorf("check: %v\n%s", err, out)
	}
}

// TestSocketActivation starts the daemon as systemd does for the first connection, with sockets at
// the right addresses, at another one, and with a mode that lets everybody in.
func TestSocketActivation(t *testing.T) {
	needSystemd(t)
	s := newSystem(t)
	// activate starts the service manager's tool, and connects when there are its sockets.
	activate := func(admin string, mode os.FileMode) *process {
		args := []string{"--listen=" + s.listen, "--listen=" + s.path(admin)}
		for _, name := range []string{"NOTIFY_SOCKET", "HOME", "PATH"} {
			args = append(args, "--setenv="+name)
		}
		args = append(args, filepath.Join(bin, "countersignd"), "serve", "--config", s.path("countersign.toml"))
		cmd := exec.Command("systemd-socket-activate", args...)
		cmd.Env = os.Environ()
		p := s.begin(cmd)
		for os.Chmod(s.path(admin), mode) != nil && t.Context().Err() == nil {
		}
		for t.Context().Err() == nil {
			if conn, err := net.Dial("tcp", s.listen); err == nil {
				t.Cleanup(func() { conn.Close() })
				break
			}
		}
		return p
	}
	for _, wrong := range []struct {
		admin string
		mode  os.FileMode
		want  string
	}{
		{"other.sock", 0o600, "give the socket unit and the configuration one address"},
		{"admin.sock", 0o666, "its mode is 0666; give its socket unit SocketMode=0660"},
		{"admin.sock", 0o660, "that admin_group names"},
	} {
		p := activate(wrong.admin, wrong.mode)
		err := <-p.ended
		p.ended <- err
		if p.cmd.ProcessState.ExitCode() != 2 || !strings.Contains(p.stderr.String(), wrong.want) {
			t.Errorf("%+v: %v\n%s", wrong, err, p.stderr)
		}
		if err := os.Remove(s.path(wrong.admin)); err != nil {
			t.Fatal(err)
		}
	}
	p := activate("admin.sock", 0o600)
	if got := p.notified(); got != "READY=1" {
		t.Fatalf("notified %q\n%s", got, p.stderr)
	}
	s.enrolRoot()
	s.enrol()
	if _, err := s.dial().Sign(t.Context(), "payments", message("activate")); err != nil {
		t.Error(err)
	}
	p.stop()
	if _, err := os.Stat(s.path("admin.sock")); err != nil {
		t.Errorf("the daemon has removed the service manager's socket: %v", err)
	}
}
