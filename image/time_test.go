package image_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"countersign/internal/machine/agent"
)

// TestFirewall loads the rules of a machine with the image's nft, in a network of its own: those of
// before the settings, and those of settings with all that can be named.
func TestFirewall(t *testing.T) {
	need(t, "unshare")
	needRoot(t)
	m := must(theMaker())(t)
	root := filepath.Join(m.image(t, nil).options.Work, "root")
	all := agent.Settings{
		Address: []string{"10.1.0.5/24", "2001:db8::5/64"}, Time: []string{"time.example.com"},
		Peers: []string{"10.0.0.0/8", "10.1.0.0/16", "2001:db8::/32"}, Operators: []string{"0.0.0.0/0", "::/0"},
		Reach: []string{"192.0.2.1/32"}, HSM: []string{"10.1.7.9:1792", "[2001:db8::9]:1792"},
	}
	must(0, all.Check())(t)
	for name, rules := range map[string]string{
		"closed": string(must(os.ReadFile(filepath.Join(root, "usr/share/countersign/closed.nft")))(t)),
		"empty":  (&agent.Settings{}).Nftables(), "all": all.Nftables(),
	} {
		cmd := exec.Command("unshare", "--net", "chroot", root, "/usr/sbin/nft", "--file", "-")
		cmd.Stdin = strings.NewReader(rules)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v %s", name, err, out)
		}
	}
}

// TestTime has the chronyd of the image ask a server with NTS, by the configuration that a machine
// makes of its settings, in a network of its own. A server of another authority is not believed.
func TestTime(t *testing.T) {
	need(t, "unshare", "ip", "openssl")
	needRoot(t)
	m := must(theMaker())(t)
	root := filepath.Join(m.image(t, nil).options.Work, "root")
	dir := t.TempDir()
	put := func(name, text string) { must(0, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))(t) }
	for _, name := range []string{"server", "foreign"} {
		output(t, "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj",
			"/CN=time.example.com", "-addext", "subjectAltName=DNS:time.example.com", "-days", "2",
			"-keyout", filepath.Join(dir, name+".key"), "-out", filepath.Join(dir, name+".pem"))
	}
	put("hosts", "127.0.0.1 time.example.com\n")
	put("server.conf", "local stratum 1\nallow\ncmdport 0\nbindcmdaddress /\nntsserverkey /tmp/server.key\n"+
		"ntsservercert /tmp/server.pem\npidfile /tmp/server.pid\n")
	// The first process of the namespaces takes the server along when it ends.
	put("script", `set -e
ip link set lo up
mount --bind "$1" "$1"
mount -t tmpfs none "$1/tmp"
mount -t tmpfs none "$1/run"
mount --rbind /dev "$1/dev"
mkdir -p "$1/run/chrony" "$1/run/countersign-machine"
cp "$0"/*.pem "$0"/*.key "$0"/*.conf "$1/tmp/"
cp "$0/authority.pem" "$1/run/countersign-machine/time-ca.pem"
mount --bind "$0/hosts" "$1/etc/hosts"
chroot "$1" /usr/sbin/chronyd -x -d -u root -f /tmp/server.conf 2>"$0/server.log" &
until grep -q 'NTS\|Frequency\|local' "$0/server.log"; do kill -0 $!; done
chroot "$1" /usr/sbin/chronyd -Q -t 20 -u root -f /tmp/client.conf
`)
	for authority, want := range map[string]string{
		"server": "System clock wrong by", "foreign": "No suitable source for synchronisation",
	} {
		ca := string(must(os.ReadFile(filepath.Join(dir, authority+".pem")))(t))
		s := agent.Settings{Time: []string{"time.example.com"}, TimeCA: ca}
		must(0, s.Check())(t)
		put("client.conf", s.Chrony())
		put("authority.pem", ca)
		out, err := exec.Command("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c",
			fmt.Sprintf(". %q", filepath.Join(dir, "script")), dir, root).CombinedOutput()
		if !strings.Contains(string(out), want) {
			t.Errorf("authority %s: %v %s, want %q; the server: %s", authority, err, out, want,
				must(os.ReadFile(filepath.Join(dir, "server.log")))(t))
		}
	}
}
