// Package agent is the machine around an appliance that was booted from the image: its disk, its
// network, its slots for updates and its consoles. The program countersign-machine is root's, and
// the daemon asks it through machine.Client. Begin reading at Disk.Open, which unlocks the disk.
package agent

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"countersign/approval"
	"countersign/internal/durable"
	"countersign/internal/machine"

	"github.com/pelletier/go-toml/v2"
)

// Settings are the settings of the machine. At the first boot they come from the file
// countersign.toml of the ESP, and afterwards from the encrypted disk: who can write to the ESP has
// no say any more.
type Settings struct {
	// Interface is the name or the MAC address of the network interface. Default: each Ethernet
	// interface.
	Interface string `toml:"interface,omitempty"`
	// Address has the addresses with their networks, such as 10.1.0.5/24. Default: by DHCP.
	Address []string `toml:"address,omitempty"`
	// Gateway has the address of the router, one for each family. Default: by DHCP, or none.
	Gateway []string `toml:"gateway,omitempty"`
	// DNS has the addresses of name servers. Default: by DHCP, or none.
	DNS []string `toml:"dns,omitempty"`
	// Time has the names of time servers with NTS (RFC 8915). Default: none; the clock of the
	// machine counts.
	Time []string `toml:"time,omitempty"`
	// TimeCA has the certificates, in PEM, of the authorities of the time servers. Default: the
	// public ones.
	TimeCA string `toml:"time_ca,multiline,omitempty"`

	// Listen, ListenPubky and HTTPS are the ports of peers, of peers with pubky-noise, and of
	// operators. 0 is none. Default: 7700, 0 and 7780.
	Listen      *int `toml:"listen,omitempty"`
	ListenPubky *int `toml:"listen_pubky,omitempty"`
	HTTPS       *int `toml:"https,omitempty"`
	// Peers and Operators have the networks that reach these ports. Default: all for peers, and
	// the networks of Address for operators; all with DHCP.
	Peers     []string `toml:"peers,omitempty"`
	Operators []string `toml:"operators,omitempty"`
	// Reach has the networks that the appliance may reach: receivers of webhooks, mail, sinks and
	// backups. Default: none.
	Reach []string `toml:"reach,omitempty"`
	// HSM has the addresses with ports of a network HSM, such as 10.1.0.9:1792. Default: none.
	HSM []string `toml:"hsm,omitempty"`

	// Setup is for the first boot only.
	Setup Setup `toml:"setup,omitempty"`
}

// Setup makes the appliance at the first boot: the flags of countersignd setup.
type Setup struct {
	Token  string `toml:"token,omitempty"` // tpm (default), softhsm for tries, or pkcs11
	Module string `toml:"module,omitempty"`
	URI    string `toml:"uri,omitempty"`
	// Environment has variables for the module, such as the path of its configuration.
	Environment map[string]string `toml:"environment,omitempty"`

	Name     string   `toml:"name,omitempty"`     // of the console; passkeys are bound to the name
	Operator string   `toml:"operator,omitempty"` // the first administrator
	SSHKey   string   `toml:"ssh_key,omitempty"`  // of the first administrator; default: a link
	Holders  []string `toml:"holders,omitempty"`  // NAME=KEY
	Needed   int      `toml:"needed,omitempty"`
	Restore  bool     `toml:"restore,omitempty"` // make no appliance, and wait for a backup
	Try      bool     `toml:"try,omitempty"`     // Secure Boot may be off, and the disk is not protected
}

const (
	maxSettings = 16 << 10 // bytes of the file
	maxEntries  = 16       // of a list
)

// hostForm is the form of a host name (RFC 1123, section 2.1).
var (
	hostForm      = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*$`)
	interfaceForm = regexp.MustCompile(`^[a-z][a-z0-9]{0,14}$`)
	macForm       = regexp.MustCompile(`^[0-9a-f]{2}(:[0-9a-f]{2}){5}$`)
	variableForm  = regexp.MustCompile(`^[A-Z_][A-Za-z0-9_]{0,63}$`)
	nameForm      = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`)
)

// ParseSettings parses the text of a file of settings. An unknown field is an error.
func ParseSettings(text []byte) (s Settings, err error) {
	if len(text) > maxSettings {
		return s, fmt.Errorf("the settings have %d bytes; at most %d are allowed", len(text), maxSettings)
	}
	d := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		var strict *toml.StrictMissingError
		if errors.As(err, &strict) && len(strict.Errors) > 0 {
			row, _ := strict.Errors[0].Position()
			return s, fmt.Errorf("line %d: %q is no setting", row, strings.Join(strict.Errors[0].Key(), "."))
		}
		var at *toml.DecodeError
		if errors.As(err, &at) {
			row, _ := at.Position()
			return s, fmt.Errorf("line %d: %s", row, strings.TrimPrefix(at.Error(), "toml: "))
		}
		return s, err
	}
	return s, s.Check()
}

// Check returns an error for a setting that can't be.
func (s *Settings) Check() error {
	if i := s.Interface; i != "" && !interfaceForm.MatchString(i) && !macForm.MatchString(i) {
		return fmt.Errorf("interface: %q is neither a name, such as eth0, nor a MAC address in small letters", i)
	}
	for _, list := range []struct {
		field  string
		values []string
		check  func(string) error
	}{
		{"address", s.Address, isAddress}, {"gateway", s.Gateway, isIP}, {"dns", s.DNS, isIP},
		{"time", s.Time, isHost}, {"peers", s.Peers, isNetwork}, {"operators", s.Operators, isNetwork},
		{"reach", s.Reach, isNetwork}, {"hsm", s.HSM, isAddrPort},
	} {
		if len(list.values) > maxEntries {
			return fmt.Errorf("%s: there are %d, and at most %d are possible", list.field, len(list.values), maxEntries)
		}
		for _, v := range list.values {
			if err := list.check(v); err != nil {
				return fmt.Errorf("%s: %w", list.field, err)
			}
		}
	}
	if err := onlyCertificates(s.TimeCA); err != nil {
		return fmt.Errorf("time_ca: %w", err)
	}
	if len(s.Gateway) > 0 && len(s.Address) == 0 {
		return errors.New("gateway: with DHCP the gateway is the server's: name addresses, too")
	}
	ports := map[int]string{}
	for field, port := range map[string]int{
		"listen": s.PeerPort(), "listen_pubky": s.PubkyPort(), "https": s.HTTPSPort(),
	} {
		if port < 0 || port > 65535 {
			return fmt.Errorf("%s: %d is no port", field, port)
		}
		if other := ports[port]; other != "" && port != 0 {
			return fmt.Errorf("%s and %s are both %d", min(field, other), max(field, other), port)
		}
		ports[port] = field
	}
	if s.PeerPort() == 0 {
		return errors.New("listen: 0 is no port for peers")
	}
	return s.Setup.check()
}

func (u Setup) check() error {
	oneLine := func(v string) bool {
		return len(v) <= 1000 && !strings.ContainsFunc(v, func(r rune) bool { return r < 32 })
	}
	for _, v := range append([]string{u.Module, u.URI, u.SSHKey}, u.Holders...) {
		if !oneLine(v) {
			return errors.New("setup: a text has more than one line, or more than 1000 bytes")
		}
	}
	for name, value := range u.Environment {
		if !variableForm.MatchString(name) || !oneLine(value) || len(u.Environment) > maxEntries {
			return fmt.Errorf("setup.environment: %q is no variable with a text of one line, or there are more than %d",
				name, maxEntries)
		}
	}
	switch {
	case !slices.Contains([]string{"", "tpm", "softhsm", "pkcs11"}, u.Token):
		return fmt.Errorf("setup.token: %q is none of tpm, softhsm, pkcs11", u.Token)
	case u.Token == "softhsm" && !u.Try:
		return errors.New("setup.token: softhsm is for tries: write try = true, too")
	case u.Name != "" && (!hostForm.MatchString(u.Name) || isIP(u.Name) == nil):
		return fmt.Errorf("setup.name: %q is no host name", u.Name)
	case u.SSHKey != "" && !isSSHKey(u.SSHKey):
		return errors.New("setup.ssh_key: it is no public key of OpenSSH that an operator can have")
	case u.Operator != "" && !nameForm.MatchString(u.Operator):
		return fmt.Errorf("setup.operator: %q is no name: 1 to 32 small letters, digits and hyphens", u.Operator)
	case len(u.Holders) > 9:
		return errors.New("setup.holders: there may be 9")
	}
	return nil
}

func isSSHKey(line string) bool {
	_, err := approval.NewSSH(line)
	return err == nil
}

// onlyCertificates refuses a text that has anything beside certificates in PEM.
func onlyCertificates(text string) error {
	rest := []byte(strings.TrimSpace(text))
	for len(rest) > 0 {
		block, after := pem.Decode(rest)
		if block == nil || block.Type != "CERTIFICATE" || len(block.Headers) > 0 ||
			!bytes.HasPrefix(rest, []byte("-----BEGIN CERTIFICATE-----")) {
			return errors.New("it has something else than certificates in PEM")
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return err
		}
		rest = bytes.TrimSpace(after)
	}
	return nil
}

func isAddress(v string) error {
	p, err := netip.ParsePrefix(v)
	if err == nil && (p.Addr().IsLoopback() || p.Addr().IsMulticast() || p.Addr().IsUnspecified()) {
		err = errors.New("is no address of a machine")
	}
	if err != nil {
		return fmt.Errorf("%q is no address with its network, such as 10.1.0.5/24", v)
	}
	return nil
}

func isIP(v string) error {
	if a, err := netip.ParseAddr(v); err != nil || a.Zone() != "" {
		return fmt.Errorf("%q is no IP address", v)
	}
	return nil
}

func isNetwork(v string) error {
	if _, err := netip.ParsePrefix(v); err != nil {
		return fmt.Errorf("%q is no network, such as 10.1.0.0/16", v)
	}
	return nil
}

func isAddrPort(v string) error {
	if a, err := netip.ParseAddrPort(v); err != nil || a.Addr().Zone() != "" || a.Port() == 0 {
		return fmt.Errorf("%q is no address with a port, such as 10.1.0.9:1792", v)
	}
	return nil
}

func isHost(v string) error {
	if !hostForm.MatchString(v) || isIP(v) == nil {
		return fmt.Errorf("%q is no host name: the certificate of NTS has a name", v)
	}
	return nil
}

func port(p *int, otherwise int) int {
	if p == nil {
		return otherwise
	}
	return *p
}

// PeerPort is the port of peers, PubkyPort that of peers with pubky-noise, and HTTPSPort that of
// operators; 0 is none.
func (s *Settings) PeerPort() int  { return port(s.Listen, 7700) }
func (s *Settings) PubkyPort() int { return port(s.ListenPubky, 0) }
func (s *Settings) HTTPSPort() int { return port(s.HTTPS, 7780) }

// anywhere are all networks.
var anywhere = []string{"0.0.0.0/0", "::/0"}

func (s *Settings) peers() []string {
	if len(s.Peers) == 0 {
		return anywhere
	}
	return s.Peers
}

// OperatorNetworks are the networks of operators.
func (s *Settings) OperatorNetworks() []string {
	switch {
	case len(s.Operators) > 0:
		return s.Operators
	case len(s.Address) == 0:
		return anywhere
	}
	var own []string
	for _, a := range s.Address {
		own = append(own, netip.MustParsePrefix(a).Masked().String())
	}
	return own
}

// Text is the file of the settings.
func (s *Settings) Text() string {
	b, err := toml.Marshal(s)
	if err != nil {
		panic(err) // strings and numbers
	}
	return string(b)
}

// readSettings reads the settings of the disk.
func readSettings(path string) (Settings, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return Settings{}, err
	}
	s, err := ParseSettings(b)
	if err != nil {
		err = fmt.Errorf("%s: %w", path, err)
	}
	return s, err
}

func (s *Settings) write(path string) error { return durable.Replace(path, []byte(s.Text()), 0o600) }

// Networkd is the configuration of systemd-networkd (systemd.network(5)).
func (s *Settings) Networkd() string {
	var b strings.Builder
	switch {
	case s.Interface == "":
		b.WriteString("[Match]\nType=ether\n")
	case macForm.MatchString(s.Interface):
		b.WriteString("[Match]\nMACAddress=" + s.Interface + "\n")
	default:
		b.WriteString("[Match]\nName=" + s.Interface + "\n")
	}
	b.WriteString("\n[Network]\nLLMNR=no\nMulticastDNS=no\nLLDP=no\n")
	if len(s.Address) == 0 {
		b.WriteString("DHCP=yes\n")
	} else {
		b.WriteString("DHCP=no\nIPv6AcceptRA=no\n")
		if !slices.ContainsFunc(s.Address, func(a string) bool { return netip.MustParsePrefix(a).Addr().Is6() }) {
			b.WriteString("LinkLocalAddressing=no\n")
		}
	}
	for _, l := range []struct {
		field  string
		values []string
	}{{"Address", s.Address}, {"Gateway", s.Gateway}, {"DNS", s.DNS}} {
		for _, v := range l.values {
			fmt.Fprintf(&b, "%s=%s\n", l.field, v)
		}
	}
	b.WriteString("\n[DHCPv4]\nUseNTP=no\nUseHostname=no\nSendHostname=no\nUseDomains=no\n" +
		"UseDNS=" + yes(len(s.DNS) == 0) + "\n\n[DHCPv6]\nUseNTP=no\nUseHostname=no\nUseDNS=" + yes(len(s.DNS) == 0) +
		"\n\n[IPv6AcceptRA]\nUseDNS=" + yes(len(s.DNS) == 0) + "\nUseDomains=no\n")
	return b.String()
}

func yes(is bool) string {
	if is {
		return "yes"
	}
	return "no"
}

// Nftables is the firewall: nothing comes in but to the listeners, and nothing goes out but what a
// setting names (nft(8)).
func (s *Settings) Nftables() string {
	var b strings.Builder
	b.WriteString(`flush ruleset
table inet countersign {
	chain input {
		type filter hook input priority filter; policy drop;
		iif lo accept
		ct state established,related accept
		ct state invalid drop
		icmp type { echo-request, destination-unreachable, time-exceeded } limit rate 10/second accept
		icmpv6 type { echo-request, destination-unreachable, packet-too-big, time-exceeded } limit rate 10/second accept
		icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-advert } ip6 hoplimit 255 accept
`)
	if len(s.Address) == 0 {
		b.WriteString("\t\tudp sport 67 udp dport 68 accept\n\t\tudp sport 547 udp dport 546 accept\n")
	}
	in := func(from []string, ports ...int) {
		for _, p := range ports {
			if p != 0 {
				s.rules(&b, "saddr", from, fmt.Sprintf("tcp dport %d accept", p))
			}
		}
	}
	in(s.peers(), s.PeerPort(), s.PubkyPort())
	in(s.OperatorNetworks(), s.HTTPSPort())
	b.WriteString(`	}
	chain forward {
		type filter hook forward priority filter; policy drop;
	}
	chain output {
		type filter hook output priority filter; policy drop;
		oif lo accept
		ct state established,related accept
		icmp type { echo-reply, destination-unreachable, time-exceeded } accept
		icmpv6 type { echo-reply, destination-unreachable, packet-too-big, time-exceeded } accept
		icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, mld2-listener-report } accept
`)
	if len(s.Address) == 0 {
		b.WriteString("\t\tmeta skuid systemd-network udp dport { 67, 547 } accept\n")
	}
	if len(s.Time) > 0 {
		b.WriteString("\t\tmeta skuid _chrony udp dport 123 accept\n\t\tmeta skuid _chrony tcp dport 4460 accept\n")
	}
	for _, user := range []struct {
		name  string
		needs bool
	}{{"_chrony", len(s.Time) > 0}, {"countersign", len(s.Reach) > 0}} {
		if user.needs {
			fmt.Fprintf(&b, "\t\tmeta skuid %s meta l4proto { tcp, udp } th dport 53 accept\n", user.name)
		}
	}
	s.rules(&b, "daddr", s.Reach, "meta skuid countersign accept")
	for _, each := range s.HSM {
		a := netip.MustParseAddrPort(each)
		network := netip.PrefixFrom(a.Addr().Unmap(), a.Addr().Unmap().BitLen()).String()
		rule := fmt.Sprintf("tcp dport %d meta skuid countersign-keys accept", a.Port())
		s.rules(&b, "daddr", []string{network}, rule)
	}
	b.WriteString("\t}\n}\n")
	return b.String()
}

// rules writes a rule for the networks of each family.
func (s *Settings) rules(b *strings.Builder, side string, networks []string, rule string) {
	for _, family := range []string{"ip", "ip6"} {
		var of []string
		for _, n := range networks {
			if p := netip.MustParsePrefix(n); p.Addr().Is4() == (family == "ip") {
				of = append(of, p.Masked().String())
			}
		}
		slices.Sort(of)
		if of = slices.Compact(of); len(of) > 0 {
			fmt.Fprintf(b, "\t\t%s %s { %s } %s\n", family, side, strings.Join(of, ", "), rule)
		}
	}
}

// KeysUnit widens the unit of the key workers by a network HSM; "" is none.
func (s *Settings) KeysUnit() string {
	if len(s.HSM) == 0 {
		return ""
	}
	var b strings.Builder
	b.WriteString("[Service]\nPrivateNetwork=no\nRestrictAddressFamilies=AF_INET AF_INET6\n")
	for _, each := range s.HSM {
		fmt.Fprintf(&b, "IPAddressAllow=%s\n", netip.MustParseAddrPort(each).Addr().Unmap())
	}
	return b.String()
}

// Chrony is the configuration of chronyd (chrony.conf(5)); "" is no time server. A clock that is
// far off must not keep the certificates from being checked for ever, so the first check is without
// their times.
func (s *Settings) Chrony() string {
	if len(s.Time) == 0 {
		return ""
	}
	var b strings.Builder
	for _, name := range s.Time {
		fmt.Fprintf(&b, "server %s iburst nts\n", name)
	}
	if s.TimeCA != "" {
		b.WriteString("ntstrustedcerts " + timeCAFile + "\n")
	}
	b.WriteString("nocerttimecheck 1\nmakestep 1 3\nrtcsync\nport 0\ncmdport 0\nuser _chrony\n" +
		"driftfile /run/chrony/drift\nntsdumpdir /run/chrony\npidfile /run/chrony/chronyd.pid\nbindcmdaddress /\n")
	return b.String()
}

// token is the kind of the token.
func (s *Settings) token() string { return cmp.Or(s.Setup.Token, "tpm") }

// again are the arguments of a set-up that was cut off, whose configuration is there. The holders
// are in the ledger only, and perhaps not yet.
func (s *Settings) again() []string {
	args := []string{"setup", "--yes", "--no-start"}
	for _, h := range s.Setup.Holders {
		args = append(args, "--holder", h)
	}
	if s.Setup.Needed != 0 {
		args = append(args, "--needed", strconv.Itoa(s.Setup.Needed))
	}
	return args
}

// arguments are the arguments of countersignd setup.
func (s *Settings) arguments(try bool) []string {
	u, token := s.Setup, s.token()
	args := append(s.again(), "--token", token, "--allow", "any",
		"--machine-socket", machine.Socket,
		"--listen", "0.0.0.0:"+strconv.Itoa(s.PeerPort()))
	if p := s.PubkyPort(); p != 0 {
		args = append(args, "--listen-pubky", "0.0.0.0:"+strconv.Itoa(p))
	}
	if p := s.HTTPSPort(); p != 0 {
		args = append(args, "--https", "0.0.0.0:"+strconv.Itoa(p), "--https-from", "any")
		if u.Name != "" {
			args = append(args, "--name", u.Name)
		}
	} else {
		args = append(args, "--https", "none")
	}
	if token == "pkcs11" {
		args = append(args, "--module", u.Module, "--uri", u.URI)
		for _, name := range slices.Sorted(maps.Keys(u.Environment)) {
			args = append(args, "--environment", name+"="+u.Environment[name])
		}
		for _, each := range s.HSM {
			args = append(args, "--hsm", each)
		}
	}
	if token == "tpm" && try {
		args = append(args, "--unmeasured")
	}
	return args
}
