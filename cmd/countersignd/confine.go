package main

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"countersign/internal/cause"
	"countersign/internal/logline"
	"countersign/internal/sandbox"

	"golang.org/x/sys/unix"
)

// systemFiles are what libraries of modules read on each system. No file of these is a secret of
// another program, since each user can read them.
var systemFiles = []string{
	"/usr", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d",
	"/etc/ssl/openssl.cnf", "/etc/ssl/certs", "/etc/ssl/cert.pem", "/etc/ssl/ca-bundle.pem",
	"/etc/pki/tls/openssl.cnf", "/etc/pki/tls/certs", "/etc/pki/tls/cert.pem", "/etc/pki/ca-trust/extracted",
	"/etc/crypto-policies",
	"/etc/pkcs11", "/etc/softhsm", "/etc/softhsm2.conf", "/etc/localtime", "/etc/passwd", "/etc/group",
	"/etc/nsswitch.conf", "/etc/resolv.conf", "/etc/hosts", "/etc/host.conf", "/etc/gai.conf", "/etc/services",
	"/dev/urandom", "/dev/random", "/dev/zero", "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/sys/crypto",
	"/sys/devices/system/cpu",
}

// rights returns what the key workers of a token may do, and which secrets they may read beside the
// PIN. An empty path is none. A file that a module could write gives
// rights to no other file: a hostile module must not widen its rights at the next start.
func (t *Token) rights(secrets ...string) sandbox.Rights {
	r := sandbox.Rights{
		Read:  slices.Concat(systemFiles, absolute(append(secrets, t.pinPath())...)),
		Write: slices.Concat([]string{"/dev/null"}, absolute(append(slices.Clone(t.Files), t.journal.Folder)...)),
	}
	if t.TPM != "" {
		r.Write = append(r.Write, absolute(t.State)...)
		r.Read = append(r.Read, absolute(t.PolicyKey)...)
		if strings.HasPrefix(t.TPM, "/dev/") {
			r.Devices = absolute(t.TPM)
		} else {
			r.Sockets = absolute(filepath.Dir(t.TPM)) // swtpm makes the socket again at each start
		}
		return r
	}
	r.Connect, _ = ports(t.Network) // checked by checkBackend
	if len(r.Connect) > 0 {
		r.Read = append(r.Read, resolver()...)
	}
	if module := t.hsm().ModulePath(); filepath.IsAbs(module) {
		beside := filepath.Dir(module) // a module's libraries and files
		if beside == "/" {
			beside = module
		}
		r.Read = append(r.Read, beside)
	}
	for _, name := range slices.Sorted(maps.Keys(t.Environment)) {
		path := t.Environment[name]
		info, err := os.Stat(path)
		switch {
		case !filepath.IsAbs(path) || filepath.Clean(path) == "/" || err != nil:
		case info.IsDir():
			r.Write = append(r.Write, path)
		default:
			r.Read = append(r.Read, path)
		}
	}
	if dir := softHSMTokens(t.softHSMConf()); dir != "" {
		r.Write = append(r.Write, dir)
	}
	if conf := os.Getenv("SOFTHSM2_CONF"); t.Environment["SOFTHSM2_CONF"] == "" && filepath.IsAbs(conf) {
		r.Read = append(r.Read, conf)
	}
	if config, err := os.UserConfigDir(); err == nil { // of p11-kit, for users other than root
		r.Read = append(r.Read, filepath.Join(config, "pkcs11"))
	}
	return r
}

// softHSMConf is the path of the configuration that SoftHSM reads in a key worker.
func (t *Token) softHSMConf() string {
	return cmp.Or(t.Environment["SOFTHSM2_CONF"], os.Getenv("SOFTHSM2_CONF"), "/etc/softhsm/softhsm2.conf")
}

// absolute returns the paths that are not empty, as absolute ones. The paths of a configuration are
// relative if that of its file is.
func absolute(paths ...string) (all []string) {
	for _, path := range paths {
		if path == "" {
			continue
		}
		if whole, err := filepath.Abs(path); err == nil {
			path = whole
		}
		all = append(all, path)
	}
	return all
}

// softHSMTokens returns the folder of tokens of a SoftHSM configuration, or "".
func softHSMTokens(conf string) string {
	f, err := os.Open(conf)
	if err != nil {
		return ""
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), "=")
		if dir := strings.TrimSpace(value); strings.TrimSpace(name) == "directories.tokendir" &&
			filepath.IsAbs(dir) && filepath.Clean(dir) != "/" {
			return dir
		}
	}
	return ""
}

// ports returns the TCP and UDP ports of addresses host:port, and the port of DNS if a host is a
// name.
func ports(addresses []string) (all []uint16, err error) {
	for _, address := range addresses {
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			return nil, fmt.Errorf("network: %q is not host:port", address)
		}
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return nil, fmt.Errorf("network: %q has the port %q; a port is a number from 1 to 65535", address, port)
		}
		all = append(all, uint16(n))
		if _, err := netip.ParseAddr(host); err != nil {
			all = append(all, 53)
		}
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// capabilities returns the capabilities of the serving daemon: none, unless the daemon opens a
// listener with a port below 1024, perhaps only when the machine gets the address.
func (c *Config) capabilities(given sockets) []uint {
	for _, address := range []string{c.Listen, c.ListenPubky} {
		_, port, _ := net.SplitHostPort(address) // checked by Config.check
		if n, err := strconv.Atoi(port); err == nil && n < 1024 && given[address] == nil {
			return []uint{unix.CAP_NET_BIND_SERVICE}
		}
	}
	return nil
}

// rights returns what the serving daemon may do, with its listeners for peers as they are now.
// Files that others replace by a rename have their folder: the configuration and the policy, the
// certificate authorities, the ledger, and the files of sinks.
func (c *Config) rights(path string, doors []*door, given sockets) sandbox.Rights {
	r := sandbox.Rights{
		Kind: sandbox.Daemon,
		Read: slices.Concat(systemFiles, absolute(os.Getenv("SSL_CERT_FILE")), []string{
			folderOf(path), folderOf(c.Policy),
		}),
		Write: append(absolute(filepath.Dir(c.Ledger)), "/dev/null"),
		// For messages to the service manager and to journald, which make their sockets again.
		// So does the machine's agent.
		Sockets: absolute(folderOrNone(os.Getenv("NOTIFY_SOCKET")), folderOrNone(logline.JournalSocket),
			folderOrNone(c.MachineSocket)),
		Streams: c.MachineSocket != "",
		Remove:  absolute(filepath.Dir(c.AdminSocket)),
		Keep:    c.capabilities(given),
	}
	for _, dir := range filepath.SplitList(os.Getenv("SSL_CERT_DIR")) {
		if filepath.IsAbs(dir) {
			r.Read = append(r.Read, dir)
		}
	}
	connect := func(address string) { // checked with the configuration
		host, port, _ := net.SplitHostPort(address)
		if n, err := strconv.ParseUint(port, 10, 16); err == nil && n > 0 {
			r.Connect = append(r.Connect, uint16(n))
		}
		if _, err := netip.ParseAddr(host); err != nil && host != "localhost" && host != "" {
			r.Names = true
		}
	}
	for _, d := range doors {
		connect(d.address) // the watchdog's probe
		_, port, _ := net.SplitHostPort(d.address)
		if n, err := strconv.ParseUint(port, 10, 16); err == nil { // an address that comes later
			r.Bind = append(r.Bind, uint16(n))
		}
	}
	receiver := func(address, caFile string) {
		if u, err := url.Parse(address); err == nil && u.Host != "" {
			address = net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), map[string]string{"http": "80"}[u.Scheme], "443"))
		}
		connect(address)
		r.Read = append(r.Read, folders(caFile)...)
	}
	for _, w := range c.Webhooks {
		receiver(w.URL, w.CAFile)
	}
	if c.Traces.Endpoint != "" {
		receiver(c.Traces.Endpoint, c.Traces.CAFile)
		r.Read = append(r.Read, folders(c.Traces.HeadersFile)...)
	}
	if c.Mail.Server != "" {
		receiver(c.Mail.Server, c.Mail.CAFile)
		r.Read = append(r.Read, folders(c.Mail.PasswordFile)...)
	}
	if c.History != "" {
		r.Write = append(r.Write, folders(c.History)...)
	}
	r.Write = append(r.Write, absolute(c.Backup.Folder)...)
	if s, err := c.Backup.server(); c.Backup.SFTP != "" && err == nil {
		connect(s.Address)
		r.Read = append(r.Read, folders(s.KeyFile)...)
	}
	for _, s := range c.Sinks {
		switch {
		case s.File != "":
			r.Write = append(r.Write, folderOf(s.File))
		default:
			receiver(s.Syslog+s.URL, s.CAFile)
		}
	}
	if r.Names {
		r.Read = append(r.Read, resolver()...)
	}
	return r
}

// resolver returns the folder of the file that /etc/resolv.conf is a link to. The system puts a new
// file there when the network has changed. A right for /etc would be one for passwords, so a file
// in /etc itself can be read only as long as the file is not replaced.
func resolver() []string {
	const path = "/etc/resolv.conf"
	target, err := os.Readlink(path)
	if err != nil {
		return nil
	}
	if !filepath.IsAbs(target) {
		target = filepath.Join(filepath.Dir(path), target)
	}
	if folder := filepath.Dir(target); folder != "/" && folder != filepath.Dir(path) {
		return []string{folder}
	}
	return nil
}

// exposed returns what of the tokens the daemon could read or change, as one line each: secrets,
// and the journal, below its folders. The rights of a folder hold for all that is below, apart from
// what is closed to the daemon's user.
func (c *Config) exposed(daemon sandbox.Rights) (all []string) {
	for _, name := range slices.Sorted(maps.Keys(c.Tokens)) {
		t := c.Tokens[name]
		secrets := []string{t.pinPath(), t.State}
		if t.TPM == "" {
			secrets = append(secrets, softHSMTokens(t.softHSMConf()))
		}
		all = append(all, reached("of the token "+name, unix.R_OK, slices.Concat(daemon.Write, daemon.Read),
			secrets...)...)
	}
	return append(all, reached("with the journal of the key workers", unix.W_OK, daemon.Write, c.Journal.Folder)...)
}

// reached returns the paths below folders to which this process's user has access, as one line
// each. A path that does not exist yet may come.
func reached(whose string, access uint32, folders []string, paths ...string) (all []string) {
	for _, path := range absolute(paths...) {
		if errors.Is(unix.Access(path, access), unix.EACCES) {
			continue
		}
		for _, folder := range folders {
			if below(path, folder) && !slices.Contains(systemFiles, folder) {
				all = append(all, fmt.Sprintf("%s %s is below %s, a folder of the daemon", path, whose, folder))
				break
			}
		}
	}
	return all
}

// folders returns the folder of a path, and none for an empty path.
func folders(path string) []string {
	if path == "" {
		return nil
	}
	return []string{folderOf(path)}
}

// folderOrNone returns the folder of an absolute path, or "".
func folderOrNone(path string) string {
	if !filepath.IsAbs(path) {
		return ""
	}
	return folderOf(path)
}

// lacks returns what this kernel does not forbid the key workers of tokens and the daemon, by the
// name of the token, and "the daemon". A simulator of a TPM is for tests, and check alone says what
// its socket opens.
func (c *Config) lacks(daemon sandbox.Rights) map[string][]string {
	all := map[string][]string{theDaemon: daemon.Missing()}
	for name, t := range c.Tokens {
		if r := t.rights(); len(r.Sockets) == 0 {
			all[name] = r.Missing()
		}
	}
	return all
}

// theDaemon is the daemon among the names of tokens, which have no blank.
const theDaemon = "the daemon"

// unconfined returns a cause for each process that this kernel confines in part only.
func unconfined(lacks map[string][]string) (all []cause.Cause) {
	for _, name := range slices.Sorted(maps.Keys(lacks)) {
		if missing := lacks[name]; len(missing) > 0 {
			all = append(all, cause.Sandbox.Of(name, "%s", strings.Join(missing, "; ")))
		}
	}
	return all
}
