package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// sockets are listening sockets that the service manager has opened (socket activation), by the
// address of the configuration. The service manager keeps them over a restart of the daemon, so
// that peers wait meanwhile, and may open a port below 1024 for a daemon without capabilities.
type sockets map[string]net.Listener

// inherited returns the sockets that the service manager has passed (sd_listen_fds). No child
// process inherits them. The names of the sockets have no meaning.
func inherited() (all []net.Listener, err error) {
	for _, f := range activation.Files(true) {
		l, bad := listening(f)
		if bad != nil {
			err = errors.Join(err, fmt.Errorf("the service manager's socket %s: %w", f.Name(), bad))
		} else {
			all = append(all, l)
		}
		f.Close()
	}
	return all, err
}

func listening(f *os.File) (net.Listener, error) {
	accepts, err := unix.GetsockoptInt(int(f.Fd()), unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil {
		return nil, err
	}
	if accepts == 0 {
		return nil, errors.New("it does not listen: the socket unit needs ListenStream= and Accept=no")
	}
	return net.FileListener(f)
}

// assign returns sockets by the addresses of listen, listen_pubky and admin_socket. A socket with
// another address is an error: to serve on an address that the configuration does not have would
// surprise, and so would peers that wait for a socket without a server.
func (c *Config) assign(all []net.Listener) (sockets, error) {
	given := sockets{}
	for _, l := range all {
		var address string
		switch at := l.Addr().(type) {
		case *net.UnixAddr:
			if path, err := filepath.Abs(at.Name); err == nil && path == filepath.Clean(c.AdminSocket) {
				address = c.AdminSocket
			}
		case *net.TCPAddr:
			for _, each := range []string{c.Listen, c.ListenPubky} {
				if sameAddress(each, at) {
					address = each
				}
			}
		}
		if address == "" || given[address] != nil {
			return nil, fmt.Errorf("the service manager passes a socket for %s, which is none of listen, "+
				"listen_pubky and admin_socket or comes twice: give the socket unit and the configuration one address",
				l.Addr())
		}
		given[address] = l
	}
	return given, nil
}

// sameAddress reports whether a socket listens on an address of the configuration. All addresses of
// the machine can be written in several ways.
func sameAddress(address string, at *net.TCPAddr) bool {
	host, port, err := net.SplitHostPort(address)
	if err != nil || port != strconv.Itoa(at.Port) {
		return false
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		return ip.Unmap() == at.AddrPort().Addr().Unmap() || ip.IsUnspecified() && at.IP.IsUnspecified()
	}
	if host == "" {
		return at.IP.IsUnspecified()
	}
	resolved, err := net.ResolveIPAddr("ip", host)
	return err == nil && resolved.IP.Equal(at.IP)
}

// close closes the sockets of a start that has failed.
func (s sockets) close() {
	for _, l := range s {
		l.Close()
	}
}
