package main

import (
	"net"
	"path/filepath"
	"strings"
	"testing"
)

// TestGivenSockets gives sockets at the addresses of the configuration, in each way to write them,
// and at others. A socket without a use is an error.
func TestGivenSockets(t *testing.T) {
	listen := func(network, address string) net.Listener {
		t.Helper()
		l, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	loopback, all := listen("tcp", "127.0.0.1:0"), listen("tcp", ":0")
	path := filepath.Join(t.TempDir(), "admin.sock")
	unix, other := listen("unix", path), listen("unix", path+"2")
	_, port, _ := net.SplitHostPort(loopback.Addr().String())
	_, anyPort, _ := net.SplitHostPort(all.Addr().String())
	for name, test := range map[string]struct {
		listen, pubky string
		given         []net.Listener
		want          int // sockets in use; 0: an error
	}{
		"all three":             {"127.0.0.1:" + port, "[::]:" + anyPort, []net.Listener{all, unix, loopback}, 3},
		"a name":                {"localhost:" + port, "", []net.Listener{loopback}, 1},
		"all addresses of IPv4": {"0.0.0.0:" + anyPort, "", []net.Listener{all}, 1},
		"no host":               {":" + anyPort, "", []net.Listener{all}, 1},
		"one address of many":   {"127.0.0.1:" + anyPort, "", []net.Listener{all}, 0},
		"another port":          {"127.0.0.1:1", "", []net.Listener{loopback}, 0},
		"another path":          {"127.0.0.1:1", "", []net.Listener{other}, 0},
		"twice":                 {"127.0.0.1:" + port, "", []net.Listener{loopback, loopback}, 0},
	} {
		c := Config{Listen: test.listen, ListenPubky: test.pubky, AdminSocket: path}
		given, err := c.assign(test.given)
		if (err == nil) != (test.want > 0) || len(given) != test.want {
			t.Errorf("%s: %d sockets, %v", name, len(given), err)
		}
		if err != nil && !strings.Contains(err.Error(), "give the socket unit and the configuration one address") {
			t.Errorf("%s: %v", name, err)
		}
	}
	low := Config{Listen: "127.0.0.1:80", ListenPubky: "127.0.0.1:7701"}
	if low.capabilities(nil) == nil || low.capabilities(sockets{"127.0.0.1:80": loopback}) != nil {
		t.Error("a daemon keeps the capability for a port below 1024 exactly if it opens the port")
	}
}
