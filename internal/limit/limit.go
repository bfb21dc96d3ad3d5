// Package limit shares a device, or the processors, between more callers than can be served.
// Handshakes limits the rate of handshakes, Connections limits the number of open connections, and
// Fair is a fair queue for the device. None of the three starts a goroutine. Memory is bounded by
// the configured limits, and in Fair by the number of waiting callers. Begin reading at Handshakes.
package limit

import "net/netip"

// SourceOf returns the source of an address, of which Handshakes and Connections have limits.
func SourceOf(a netip.Addr) netip.Addr { return sourceOf(a) }

// sourceOf returns the source of an address: the address itself for IPv4, the /64 prefix for IPv6.
// All connections without an address, for example on a Unix socket, are one source.
func sourceOf(a netip.Addr) netip.Addr {
	a = a.Unmap()
	if a.Is6() {
		p, _ := a.Prefix(64) // drops the zone
		return p.Addr()
	}
	return a
}
