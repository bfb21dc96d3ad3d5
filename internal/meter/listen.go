package meter

import (
	"net"
	"net/netip"
)

// loopbackHost reports whether the Host header of a request names this machine by its loopback
// address, or as localhost.
func loopbackHost(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback()
}
