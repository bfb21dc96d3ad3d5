package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"countersign/internal/durable"
	"countersign/internal/keystore"
	"countersign/internal/secret"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// The users and folders of the package: packaging/systemd/countersign.sysusers and .tmpfiles.
const (
	daemonUser = "countersign"
	keysUser   = "countersign-keys"
	stateDir   = "/var/lib/countersign"
	keysDir    = "/var/lib/countersign-keys"
	unitsDir   = "/etc/systemd/system"
)

// tpmDevice is the kernel's TPM.
const tpmDevice = "/dev/tpmrm0"

// setupOptions are the flags of countersignd setup.
type setupOptions struct {
	token            string // softhsm, tpm or pkcs11
	module, uri      string // of pkcs11
	pinFile          string
	tpm              string
	listen, pubky    string
	https, name      string
	allow            []string // networks of peers
	from             []string // networks of operators
	unmeasured       bool     // the TPM's register of Secure Boot may be empty
	machine          string   // the socket of the machine's agent
	environment      []string // NAME=VALUE, variables of the module
	hsm              []string // addresses of a network HSM
	counter          uint     // index of the TPM's counter; 0: the usual one
	holders          []string
	needed           int
	operator, sshKey string
	yes, noStart     bool
}

// settingUp is one run of countersignd setup. Each step leaves a part that is there as it is, so a
// run after one that was cut off goes on where that one ended. The configuration is written after
// all files that it names.
type settingUp struct {
	setupOptions
	path   string // of the configuration
	folder string
	keys   *account      // of the key workers
	group  int           // of the configuration's readers
	ask    *bufio.Reader // nil: no terminal
	out    io.Writer
}

// setupCommand is countersignd setup.
func setupCommand(configPath *string, stdout, stderr io.Writer) *cobra.Command {
	var o setupOptions
	c := &cobra.Command{
		Use:   "setup",
		Short: "Set up a new appliance: configuration, token, ledger, services, and a link for the first administrator",
		Long: "Sets up a new appliance on this machine, as root: writes the configuration and the PINs, makes\n" +
			"the token, the ledger and the appliance's own keys (countersignd init), starts the services, and\n" +
			"enrols the first administrator or prints a link for that.\n\n" +
			"On a terminal, setup asks what the flags don't say, and shows what will be done before anything\n" +
			"is changed. A part that is there stays as it is, so a set-up that was cut off goes on by the\n" +
			"same command.",
		Example: "  countersignd setup\n" +
			"  countersignd setup --token softhsm --operator ann --yes\n" +
			"  countersignd setup --token tpm --listen 0.0.0.0:7700 --allow 10.1.0.0/16 --ssh-key ann.pub\n" +
			"  countersignd setup --token pkcs11 --module /opt/vendor/libpkcs11.so --uri pkcs11:token=prod \\\n" +
			"    --pin-file pin",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s := &settingUp{setupOptions: o, path: *configPath, out: stdout}
			if term.IsTerminal(int(os.Stdin.Fd())) {
				s.ask = bufio.NewReader(os.Stdin)
			}
			return s.run(cmd.Context(), cmd.Flags().Changed, stderr)
		},
	}
	f := c.Flags()
	f.StringVar(&o.token, "token", "", "softhsm (a token in files, for trials), tpm, or pkcs11 (an HSM)")
	f.StringVar(&o.module, "module", "", "with --token pkcs11: the path of the vendor's PKCS#11 module")
	f.StringVar(&o.uri, "uri", "", "with --token pkcs11: the token, such as pkcs11:token=prod")
	f.StringVar(&o.pinFile, "pin-file", "", "with --token pkcs11: a file with the user's PIN, which is copied")
	f.StringVar(&o.tpm, "tpm", tpmDevice, "with --token tpm: the TPM's device or socket")
	f.StringVar(&o.listen, "listen", "127.0.0.1:7700", "the address for peers")
	f.StringVar(&o.pubky, "listen-pubky", "", "the address for peers with pubky-noise (default: none)")
	f.StringVar(&o.https, "https", "127.0.0.1:7780", "the address of the web console, or none")
	f.StringSliceVar(&o.from, "https-from", nil, "a `network` of operators, or any, with an --https that others reach")
	f.StringVar(&o.name, "name", "localhost", "the host name of the console, for ever: passkeys are bound to it")
	f.StringSliceVar(&o.allow, "allow", nil, "a `network` of peers, such as 10.1.0.0/16, or any; can be repeated")
	f.StringArrayVar(&o.holders, "holder", nil, "NAME=KEY or NAME=FILE, a recovery holder; can be repeated")
	f.IntVar(&o.needed, "needed", 0, "so many holders together bring a key back")
	f.StringVar(&o.operator, "operator", "", "the `name` of the first administrator")
	f.StringVar(&o.sshKey, "ssh-key", "", "the first administrator's SSH public key (default: a link makes a passkey)")
	f.BoolVar(&o.unmeasured, "unmeasured", false,
		"with --token tpm: seal although no Secure Boot was measured, for tries")
	f.StringVar(&o.machine, "machine-socket", "", "the `socket` of the machine's agent")
	f.UintVar(&o.counter, "counter-index", 0, "with --token tpm: the NV `index` of the ledger's counter")
	f.StringArrayVar(&o.environment, "environment", nil, "with --token pkcs11: `NAME=VALUE`, a variable of the module")
	f.StringSliceVar(&o.hsm, "hsm", nil, "with --token pkcs11: an `address` of a network HSM, with its port")
	// For the image, which sets up by itself.
	for _, flag := range []string{"machine-socket", "counter-index", "environment", "hsm"} {
		f.MarkHidden(flag)
	}
	f.BoolVar(&o.yes, "yes", false, "do not ask")
	f.BoolVar(&o.noStart, "no-start", false, "neither start the services nor enrol anybody")
	return c
}

// run sets up.
func (s *settingUp) run(ctx context.Context, given func(flag string) bool, stderr io.Writer) error {
	if err := s.look(); err != nil {
		return err
	}
	switch _, err := os.Lstat(s.path); {
	case err == nil:
		for _, flag := range []string{
			"token", "module", "uri", "pin-file", "tpm", "listen", "listen-pubky", "https", "https-from", "name",
			"allow", "unmeasured",
		} {
			if given(flag) {
				return configError{fmt.Errorf("--%s: %s is there already: change that file by hand, and leave the "+
					"flag out", flag, s.path)}
			}
		}
		s.say("kept", "the configuration %s", s.path)
	case errors.Is(err, fs.ErrNotExist):
		if err := s.choose(); err != nil {
			return err
		}
		if _, err := parseConfig(s.path, []byte(s.configuration())); err != nil {
			return configError{fmt.Errorf("these flags make no configuration: %w", err)}
		}
		if err := s.agree(); err != nil {
			return err
		}
		if err := s.write(); err != nil {
			return err
		}
	default:
		return err
	}
	return withConfig(s.path, func(c Config) error {
		if state, _, _ := serviceState(ctx); state == "active" {
			s.say("kept", "the appliance: countersignd.service serves")
		} else if err := s.initialise(ctx, c, stderr); err != nil {
			return err
		}
		if s.noStart {
			return nil
		}
		if err := s.start(ctx); err != nil {
			return err
		}
		return s.enrol(ctx, c, stderr)
	})
}

// look refuses a machine where setup can't work.
func (s *settingUp) look() (err error) {
	if os.Geteuid() != 0 {
		return configError{errors.New("setup makes files of several users: start it as root")}
	}
	if s.path, err = filepath.Abs(s.path); err != nil {
		return err
	}
	if s.path != defaultConfig && !s.noStart {
		return configError{fmt.Errorf("the services read %s: leave --config out, or set up with --no-start",
			defaultConfig)}
	}
	s.folder = filepath.Dir(s.path)
	if s.keys, err = lookUp(keysUser); err != nil {
		return configError{fmt.Errorf("user %s: %w", keysUser, err)}
	}
	daemon, err := lookUp(daemonUser)
	if err != nil {
		return configError{fmt.Errorf("user %s: %w", daemonUser, err)}
	}
	s.group = daemon.gid
	if err := (&initOptions{holders: s.holders, needed: s.needed}).readHolders(); err != nil {
		return err
	}
	if s.sshKey != "" {
		if _, err := os.Stat(s.sshKey); err != nil {
			return configError{fmt.Errorf("--ssh-key: %w", err)}
		}
	}
	for _, folder := range []string{s.folder, stateDir, keysDir} {
		if _, err := os.Stat(folder); err != nil {
			return configError{fmt.Errorf("%w: make the folders first (systemd-tmpfiles --create)", err)}
		}
	}
	return nil
}

// choose completes the flags, at a terminal by questions, and refuses what can't work.
func (s *settingUp) choose() error {
	if s.token == "" {
		if s.ask == nil {
			return configError{errors.New("--token is missing: softhsm, tpm or pkcs11")}
		}
		fmt.Fprint(s.out, "Where will the keys be?\n"+s.found()+"\n")
		s.token = s.question("softhsm, tpm or pkcs11", "")
	}
	for flag, value := range map[string]string{"module": s.module, "uri": s.uri, "pin-file": s.pinFile} {
		if s.token != "pkcs11" && value != "" {
			return configError{fmt.Errorf("--%s is for --token pkcs11", flag)}
		}
	}
	switch s.token {
	case "softhsm":
		s.module, s.uri = softHSMModule, "pkcs11:token=countersign"
		if _, err := os.Stat(s.module); err != nil {
			return configError{fmt.Errorf("%w: install SoftHSM first (apt-get install softhsm2)", err)}
		}
	case "tpm":
		if _, err := os.Stat(s.tpm); err != nil {
			return configError{fmt.Errorf("--tpm: %w: this machine has no TPM there; see its firmware's settings", err)}
		}
	case "pkcs11":
		s.module = cmp.Or(s.module, s.question("Path of the PKCS#11 module", ""))
		s.uri = cmp.Or(s.uri, s.question("URI of the token", "pkcs11:token=countersign"))
		if !filepath.IsAbs(s.module) || !exists(s.module) {
			return configError{fmt.Errorf("--module: there is no file %q: name the module by its whole path", s.module)}
		}
		if s.pinFile == "" && s.ask == nil && !exists(s.pinPath()) {
			return configError{errors.New("--pin-file is missing: a file that only root can read, with the user's PIN")}
		}
	default:
		return configError{fmt.Errorf("--token %q: name softhsm, tpm or pkcs11", s.token)}
	}
	if s.https == "none" {
		s.https = ""
	}
	if err := s.networks(); err != nil {
		return err
	}
	for flag, address := range map[string]string{"listen": s.listen, "listen-pubky": s.pubky, "https": s.https} {
		if err := free(address); err != nil {
			return configError{fmt.Errorf("--%s: %w", flag, err)}
		}
	}
	return nil
}

// found says which kinds of token this machine seems to have.
func (s *settingUp) found() string {
	say := func(path, is, isnt string) string {
		if exists(path) {
			return is
		}
		return isnt
	}
	return "  softhsm  a token in files, for trials: " +
		say(softHSMModule, "is installed", "not installed (apt-get install softhsm2)") + "\n" +
		"  tpm      the TPM of this machine: " + say(s.tpm, s.tpm, "none at "+s.tpm) + "\n" +
		"  pkcs11   an HSM, by its vendor's PKCS#11 module"
}

// networks checks --allow against the addresses for peers.
func (s *settingUp) networks() error {
	for flag, networks := range map[string][]string{"allow": s.allow, "https-from": s.from} {
		for i, network := range networks {
			if network == "any" {
				continue
			}
			p, err := netip.ParsePrefix(network)
			if err != nil {
				return configError{fmt.Errorf("--%s: %q is no network, such as 10.1.0.0/16, or any", flag, network)}
			}
			networks[i] = p.Masked().String()
		}
	}
	for flag, address := range map[string]string{"listen": s.listen, "listen-pubky": s.pubky} {
		host, err := netip.ParseAddrPort(address)
		if address != "" && (err != nil || !host.Addr().IsLoopback()) && len(s.allow) == 0 {
			return configError{fmt.Errorf("--%s %s: the service lets only this machine in: name the networks of peers "+
				"by --allow", flag, address)}
		}
	}
	return nil
}

// free reports that an address can be listened on. An address that this machine does not have may
// come up later.
func free(address string) error {
	if address == "" {
		return nil
	}
	l, err := net.Listen("tcp", address)
	switch {
	case err == nil:
		return l.Close()
	case errors.Is(err, syscall.EADDRINUSE):
		_, port, _ := net.SplitHostPort(address)
		return fmt.Errorf("%w: end that program (ss -ltnp sport = :%s), or name another address", err, port)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return nil
	}
	return err
}

// agree shows at a terminal what will be done, and asks.
func (s *settingUp) agree() error {
	if s.ask == nil || s.yes {
		return nil
	}
	device := s.uri
	if s.token == "tpm" {
		device = s.tpm
	}
	fmt.Fprintf(s.out, "\nThis will be set up:\n"+
		"  configuration  %s\n  keys in        %s, %s\n  state          %s and %s\n  peers          %s\n"+
		"  console        %s\n"+
		"  services       countersignd.service and its sockets, also at each boot\n",
		s.path, s.token, device, stateDir, keysDir, s.listen, cmp.Or(s.https, "none"))
	if len(s.holders) == 0 {
		fmt.Fprint(s.out, "Without --holder the appliance's own keys can't be recovered after the loss of the token.\n")
	}
	if !strings.EqualFold(s.question("Go on? y or n", "n"), "y") {
		return configError{errors.New("nothing was changed")}
	}
	return nil
}

// question asks at the terminal. Without one, or without an answer, the result is the default.
func (s *settingUp) question(text, otherwise string) string {
	if s.ask == nil {
		return otherwise
	}
	if otherwise != "" {
		text += " [" + otherwise + "]"
	}
	fmt.Fprint(s.out, text+": ")
	line, _ := s.ask.ReadString('\n')
	return cmp.Or(strings.TrimSpace(line), otherwise)
}

// say prints a step as a line of two columns.
func (s *settingUp) say(what, format string, args ...any) {
	fmt.Fprintf(s.out, "%-8s %s\n", what, fmt.Sprintf(format, args...))
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func (s *settingUp) pinPath() string { return filepath.Join(keysDir, "pin") }

// write makes the PINs, the policy, the drop-ins of the units and then the configuration.
func (s *settingUp) write() error {
	if s.token != "tpm" {
		if err := s.writePIN(s.pinPath(), s.readPIN); err != nil {
			return err
		}
	}
	if s.token == "softhsm" {
		tokens := filepath.Join(keysDir, "tokens")
		random := func() (secret.Bytes, error) { return randomPIN(), nil }
		if err := s.writePIN(filepath.Join(keysDir, "so-pin"), random); err != nil {
			return err
		}
		if err := s.keysFolder(tokens); err != nil {
			return err
		}
		if err := s.put(s.softHSMConf(), softHSMConfig(tokens)); err != nil {
			return err
		}
	}
	if err := s.put(filepath.Join(s.folder, "policy.cedar"), firstPolicy); err != nil {
		return err
	}
	if err := s.writeUnits(); err != nil {
		return err
	}
	return s.put(s.path, s.configuration())
}

// keysFolder makes a folder of the key workers, unless the folder is there.
func (s *settingUp) keysFolder(path string) error {
	if exists(path) {
		return nil
	}
	folder, err := os.MkdirTemp(keysDir, ".new-*") // the owner comes before the name
	if err != nil {
		return err
	}
	defer os.Remove(folder)
	return errors.Join(os.Lchown(folder, s.keys.uid, s.keys.gid), os.Rename(folder, path), durable.Sync(keysDir))
}

// writePIN makes a file with a secret of the key workers, unless the file is there.
func (s *settingUp) writePIN(path string, read func() (secret.Bytes, error)) error {
	switch info, err := os.Lstat(path); {
	case err == nil:
		owner := info.Sys().(*syscall.Stat_t).Uid
		if !info.Mode().IsRegular() || int(owner) != s.keys.uid || info.Mode().Perm()&0o077 != 0 {
			return configError{fmt.Errorf("%s belongs to user %d and has mode %04o: type: chown %s: %s && chmod 600 %s"+
				", or move it away", path, owner, info.Mode().Perm(), keysUser, path, path)}
		}
		s.say("kept", "%s", path)
		return nil
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	pin, err := read()
	if err != nil {
		return err
	}
	defer pin.Wipe()
	// The owner comes before the name: a set-up that is cut off leaves no file of root's.
	f, err := os.CreateTemp(keysDir, ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(pin.Expose())
	_, err2 := f.WriteString("\n")
	if err := errors.Join(err, err2, f.Chown(s.keys.uid, s.keys.gid), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := errors.Join(os.Link(f.Name(), path), durable.Sync(keysDir)); err != nil {
		return err
	}
	s.say("wrote", "%s", path)
	return nil
}

// readPIN gets the PIN: SoftHSM's is made, and an HSM's comes from a file or from the terminal.
func (s *settingUp) readPIN() (secret.Bytes, error) {
	if s.token == "softhsm" {
		return randomPIN(), nil
	}
	if s.pinFile != "" {
		pin, err := keystore.ReadSecret(s.pinFile, "--pin-file")
		if err == nil {
			pin = secret.New(bytes.TrimRight(pin.Expose(), "\r\n"))
		}
		if err == nil && pin.Empty() {
			err = fmt.Errorf("--pin-file %s: the file is empty", s.pinFile)
		}
		if err != nil {
			err = configError{err}
		}
		return pin, err
	}
	fmt.Fprint(s.out, "PIN of the token's user: ")
	b, err := term.ReadPassword(int(os.Stdin.Fd()))
	fmt.Fprintln(s.out)
	if err == nil && len(b) == 0 {
		err = errors.New("the PIN is empty")
	}
	return secret.New(b), err
}

// put writes a file that root owns and both users read, unless the file is there.
func (s *settingUp) put(path, content string) error {
	if exists(path) {
		s.say("kept", "%s", path)
		return nil
	}
	if err := durable.Replace(path, []byte(content), 0o640); err != nil {
		return err
	}
	if err := os.Lchown(path, 0, s.group); err != nil {
		return err
	}
	s.say("wrote", "%s", path)
	return nil
}

// firstPolicy denies all.
const firstPolicy = `// Who may sign what. Without a rule, everything is denied. An example:
//
// permit (principal == Peer::"shop", action == Action::"sign", resource == Key::"payments");
`

func (s *settingUp) softHSMConf() string { return filepath.Join(s.folder, "softhsm2.conf") }

// configuration is the text of the new configuration.
func (s *settingUp) configuration() string {
	var b strings.Builder
	b.WriteString("# Made by countersignd setup. countersignd config prints each field with its meaning.\n" +
		"user = \"" + daemonUser + "\"\nkeys_user = \"" + keysUser + "\"\n" +
		"keys_socket = \"/run/countersign-keys/launcher.sock\"\n")
	field := func(name, value string) {
		if value != "" {
			fmt.Fprintf(&b, "%s = %s\n", name, strconv.Quote(value))
		}
	}
	field("listen", s.listen)
	field("listen_pubky", s.pubky)
	field("admin_socket", "/run/countersign/admin.sock")
	field("machine_socket", s.machine)
	field("admin_group", "countersign-admin")
	field("admin_https", s.https)
	if s.https != "" {
		field("admin_name", s.name)
	}
	if len(s.from) > 0 {
		var quoted []string
		for _, network := range s.from {
			if network == "any" {
				quoted = append(quoted, `"0.0.0.0/0"`, `"::/0"`)
			} else {
				quoted = append(quoted, strconv.Quote(network))
			}
		}
		fmt.Fprintf(&b, "admin_https_from = [%s]\n", strings.Join(quoted, ", "))
	}
	field("ledger", filepath.Join(stateDir, "ledger.db"))
	field("policy", "policy.cedar")
	field("journal.folder", filepath.Join(keysDir, "journal"))
	b.WriteString("\n# The name main stays for ever: the ledger records it with each key.\n[tokens.main]\n")
	if s.token == "tpm" {
		field("tpm", s.tpm)
		field("state", filepath.Join(keysDir, "tpm"))
		b.WriteString("pcrs = [7]\n")
		if s.counter != 0 {
			fmt.Fprintf(&b, "counter_index = %#x\n", s.counter)
		}
		if s.unmeasured {
			b.WriteString("zero_pcrs = [7] # no Secure Boot was measured: the TPM protects nothing\n")
		}
		return b.String()
	}
	field("uri", s.uri)
	field("module", s.module)
	field("pin_file", s.pinPath())
	var quoted []string
	for _, address := range s.hsm {
		quoted = append(quoted, strconv.Quote(address))
	}
	if len(quoted) > 0 {
		fmt.Fprintf(&b, "network = [%s]\n", strings.Join(quoted, ", "))
	}
	if len(s.environment) > 0 {
		b.WriteString("\n[tokens.main.environment]\n")
		for _, each := range s.environment {
			name, value, _ := strings.Cut(each, "=")
			field(name, value)
		}
	}
	if s.token == "softhsm" {
		b.WriteString("sessions = 1 # SoftHSM is fastest with one session in each key worker\n")
		fmt.Fprintf(&b, "environment = { SOFTHSM2_CONF = %q }\n", s.softHSMConf())
	}
	return b.String()
}

// writeUnits widens the units by what this appliance needs: packaging/systemd has the same drop-ins
// with comments.
func (s *settingUp) writeUnits() error {
	for unit, lines := range map[string][]string{
		"countersignd.service": s.allowed(), "countersignd-keys@.service": s.device(),
	} {
		if len(lines) == 0 {
			continue
		}
		folder := filepath.Join(unitsDir, unit+".d")
		if err := os.MkdirAll(folder, 0o755); err != nil {
			return err
		}
		path := filepath.Join(folder, "setup.conf")
		if exists(path) {
			s.say("kept", "%s", path)
			continue
		}
		text := "# Made by countersignd setup.\n[Service]\n" + strings.Join(lines, "\n") + "\n"
		if err := durable.Replace(path, []byte(text), 0o644); err != nil {
			return err
		}
		s.say("wrote", "%s", path)
	}
	return nil
}

// allowed are the lines that let the networks of peers in.
func (s *settingUp) allowed() (lines []string) {
	for _, network := range slices.Compact(slices.Sorted(slices.Values(slices.Concat(s.allow, s.from)))) {
		lines = append(lines, "IPAddressAllow="+network)
	}
	return lines
}

// device are the lines that give a TPM to the key workers.
func (s *settingUp) device() []string {
	if s.token != "tpm" || !strings.HasPrefix(s.tpm, "/dev/") {
		return nil
	}
	return []string{"PrivateDevices=no", "DeviceAllow=" + s.tpm + " rw", "SupplementaryGroups=tss"}
}

// initialise runs countersignd init, whose output is shown.
func (s *settingUp) initialise(ctx context.Context, c Config, stderr io.Writer) error {
	args := []string{"init", "--config", s.path}
	// An HSM's token is made by its vendor's procedure.
	soPIN := filepath.Join(keysDir, "so-pin")
	if t := c.Tokens["main"]; t != nil && t.Module == softHSMModule && exists(soPIN) {
		args = append(args, "--new-token", "--so-pin-file", soPIN)
	}
	for _, h := range s.holders {
		args = append(args, "--holder", h)
	}
	if s.needed != 0 {
		args = append(args, "--needed", strconv.Itoa(s.needed))
	}
	key, err := s.command(ctx, stderr, "/proc/self/exe", args...)
	if err != nil {
		return fmt.Errorf("countersignd init: %w: remove the cause, then type countersignd setup again", err)
	}
	s.say("key", "%s: the public Noise key, which peers need", strings.TrimSpace(key))
	return nil
}

// command runs a program, and returns its output. Its errors are shown.
func (s *settingUp) command(ctx context.Context, stderr io.Writer, program string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stderr = stderr
	out, err := cmd.Output()
	return string(out), err
}

// startUnits are the units of an appliance.
var startUnits = []string{"countersignd-admin.socket", "countersignd-keys.socket", "countersignd.service"}

// systemctl runs systemctl.
func systemctl(ctx context.Context, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("systemctl %s: %w: %s", args[0], err, strings.TrimSpace(string(out)))
	}
	return string(out), err
}

// serviceState is the state of the daemon's unit, such as active, with the text that the daemon has
// given itself.
func serviceState(ctx context.Context) (state, status string, err error) {
	out, err := systemctl(ctx, "show", "--property=ActiveState,StatusText", "countersignd.service")
	for line := range strings.Lines(out) {
		switch name, value, _ := strings.Cut(strings.TrimSpace(line), "="); name {
		case "ActiveState":
			state = value
		case "StatusText":
			status = value
		}
	}
	return state, status, err
}

// start has systemd start the services, now and at each boot, and waits until the daemon is ready.
func (s *settingUp) start(ctx context.Context) error {
	if !exists("/run/systemd/system") {
		return errors.New("systemd does not run on this machine: start countersignd serve by your service manager, " +
			"or set up with --no-start")
	}
	for _, args := range [][]string{
		{"daemon-reload"}, append([]string{"enable", "--quiet"}, startUnits...),
		append([]string{"start", "--no-block"}, startUnits...),
	} {
		if _, err := systemctl(ctx, args...); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for told := ""; ; {
		state, status, err := serviceState(ctx)
		switch {
		case state == "active":
			s.say("serves", "%s", strings.Join(startUnits, ", "))
			return nil
		case state == "failed" || err != nil:
			return fmt.Errorf("countersignd.service is not ready (%s): systemctl status countersignd and journalctl "+
				"-u countersignd say why; remove the cause, then type countersignd setup again",
				cmp.Or(status, state, told))
		case status != told:
			told = status
			s.say("waits", "%s", status)
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// enrol enrols the first administrator, or prints the link that does.
func (s *settingUp) enrol(ctx context.Context, c Config, stderr io.Writer) error {
	program, err := os.Executable()
	if err != nil {
		return err
	}
	name := cmp.Or(s.operator, s.question("Name of the first administrator", "admin"))
	first := []string{"admin", "--socket", c.AdminSocket, "operator", "first", name}
	switch {
	case s.sshKey != "":
		first = append(first, "--ssh-key", s.sshKey)
	case c.AdminHTTPS == "":
		s.say("next", "countersign admin operator first %s --ssh-key FILE", name)
		return nil
	default:
		first = append(first, "--link")
	}
	var said strings.Builder
	out, err := s.command(ctx, &said, filepath.Join(filepath.Dir(program), "countersign"), first...)
	if strings.Contains(said.String(), "error: conflict: ") {
		s.say("kept", "the operators: there is a first administrator already")
		return nil
	}
	io.WriteString(stderr, said.String())
	switch {
	case err != nil:
		return fmt.Errorf("countersign admin operator first: %w", err)
	case s.sshKey != "":
		io.WriteString(s.out, out)
	default:
		_, port, _ := net.SplitHostPort(c.AdminHTTPS)
		s.say("link", "%s", strings.TrimSpace(out))
		s.say("", "makes the passkey of %s, once, within 30 minutes; from another machine, first type", name)
		s.say("", "ssh -L %s:%s THIS-MACHINE", port, c.AdminHTTPS)
	}
	s.say("next", "/usr/share/doc/countersign/OPERATIONS.md: Signing in, Peers, Keys, Backup")
	return nil
}
