// Package limit decides who may go on when more come than a device can serve: Handshakes says which connections may begin
// a handshake, Fair says whose turn it is. Neither starts a goroutine, and the memory of both is bounded.
package limit

import "net/netip"

// sourceOf says whose an address is. What is no address (a Unix socket's) is one source.
func sourceOf(a netip.Addr) netip.Addr {
	a = a.Unmap()
	if a.Is6() {
		p, _ := a.Prefix(64) // which has no zone
		return p.Addr()
	}
	return a
}
