package admin

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"countersign/admin/api"
	"countersign/admin/certs"
	"countersign/internal/operators"
	"countersign/internal/requestid"
	"countersign/internal/secret"

	"github.com/danielgtaylor/huma/v2"
	"golang.org/x/net/netutil"
)

// connection is a connection with the facts that the kernel or TLS gives about the caller.
type connection struct {
	operators.Channel
	refused bool // no request of this connection is served
}

// name returns the name of a signed-out caller for events.
func (c connection) name() string {
	if c.Kind == operators.Unix {
		return fmt.Sprintf("uid:%d", c.UID)
	}
	return "https"
}

type connectionKey struct{}

// withConnection puts the connection into the context. net/http has no other place for data of a
// connection.
func (s *server) withConnection(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, connectionKey{}, s.connectionOf(conn))
}

func (s *server) connectionOf(conn net.Conn) connection {
	switch conn := conn.(type) {
	case *net.UnixConn:
		uid, err := peerUID(conn)
		return connection{operators.Channel{Kind: operators.Unix, UID: uid}, err != nil || !s.mayConnect(uid)}
	case *tls.Conn:
		return connection{operators.Channel{Kind: operators.HTTPS, Source: conn.RemoteAddr().String()}, false}
	}
	return connection{refused: true}
}

// mayConnect admits root, the daemon's user, and the members of the group in the configuration. The
// modes of the socket and its folder have the same effect. mayConnect protects against a wrong
// mode.
func (s *server) mayConnect(uid uint32) bool {
	if uid == 0 || int(uid) == os.Geteuid() {
		return true
	}
	if s.Group == "" {
		return false
	}
	u, err := user.LookupId(strconv.Itoa(int(uid)))
	if err != nil {
		return false
	}
	groups, err := u.GroupIds()
	return err == nil && slices.Contains(groups, s.Group)
}

// peerUID returns the user of the process at the other end, from the kernel (SO_PEERCRED).
func peerUID(conn *net.UnixConn) (uid uint32, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var bad error
	err = raw.Control(func(fd uintptr) {
		var cred *syscall.Ucred
		if cred, bad = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED); bad == nil {
			uid = cred.Uid
		}
	})
	return uid, errors.Join(err, bad)
}

// headKey is the context key of a request that was a HEAD.
type headKey struct{}

// answerHead answers HEAD as GET: the same header without the body, which net/http leaves out
// (RFC 9110 section 9.3.2).
func answerHead(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodHead {
			get := *r.WithContext(context.WithValue(r.Context(), headKey{}, true))
			get.Method = http.MethodGet
			r = &get
		}
		next.ServeHTTP(w, r)
	})
}

// guard gives each request an id, and refuses connections of other users, and over HTTPS requests
// for another host. The check of the host stops DNS rebinding: a stranger's domain name that
// resolves to this address.
func (s *server) guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, _ := r.Context().Value(connectionKey{}).(connection)
		conn.Request = requestid.New()
		r = r.WithContext(context.WithValue(r.Context(), connectionKey{}, conn))
		h := w.Header()
		h.Set(api.RequestHeader, conn.Request)
		h.Set("Cache-Control", "no-store")
		h.Set("X-Content-Type-Options", "nosniff")
		// Other programs of this machine serve plain HTTP at localhost, so HSTS for localhost would
		// block them.
		if conn.Kind == operators.HTTPS && s.RPID != "localhost" {
			h.Set("Strict-Transport-Security", "max-age=31536000")
		}
		switch {
		case conn.refused || conn.Kind == "":
			writeProblem(w, notAllowed.document(
				"this user may not talk to the appliance: see admin_group in the configuration"))
		case conn.Kind == operators.HTTPS && !slices.Contains(s.Hosts, r.Host):
			writeProblem(w, notAllowed.document("the appliance is not called by that name: it is "+s.Origin))
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// sameOrigin reports whether, by the browser's headers, a page of the appliance has sent the
// request.
func (s *server) sameOrigin(c huma.Context) bool {
	return c.Header("Sec-Fetch-Site") == "same-origin" || c.Header("Origin") == s.Origin
}

// crossOrigin reports whether, by the browser's headers, another page has sent the request.
func (s *server) crossOrigin(c huma.Context) bool {
	site, origin := c.Header("Sec-Fetch-Site"), c.Header("Origin")
	return site != "" && site != "same-origin" && site != "none" || origin != "" && origin != s.Origin
}

// Listen creates the Unix socket with mode 0600, or with mode 0660 for a group (its number). Listen
// replaces a socket without a listener.
func Listen(path, group string) (net.Listener, error) {
	if st, err := os.Lstat(path); err == nil {
		if st.Mode().Type() != os.ModeSocket {
			return nil, fmt.Errorf("admin socket %s: there is a file of another kind", path)
		}
		if conn, err := net.Dial("unix", path); err == nil {
			conn.Close()
			return nil, fmt.Errorf("admin socket %s: another process or a socket unit listens on it: stop it first",
				path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("admin socket: %w", err)
		}
	}
	old := syscall.Umask(0o177) // closes the socket to others from the first moment
	l, err := net.Listen("unix", path)
	syscall.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	if group == "" {
		return l, nil
	}
	gid, err := strconv.Atoi(group)
	if err == nil {
		if err = os.Chown(path, -1, gid); err == nil {
			err = os.Chmod(path, 0o660)
		}
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("admin socket: give it to the group %s: %w", group, err)
	}
	return l, nil
}

// CheckSocket checks the mode of a Unix socket that the service manager has made: as Listen would
// have made it, or stricter. Its owner may be another user than the daemon's.
func CheckSocket(path, group string) error {
	st, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("admin socket: %w", err)
	}
	gid, mode := "", st.Mode().Perm()
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		gid = strconv.Itoa(int(sys.Gid))
	}
	switch {
	case mode&0o007 != 0:
		return fmt.Errorf("admin socket %s: its mode is %04o; give its socket unit SocketMode=0660, or 0600 "+
			"without admin_group", path, mode)
	case mode&0o070 != 0 && gid != group:
		return fmt.Errorf("admin socket %s: its mode is %04o and its group %s; give its socket unit the SocketGroup= "+
			"that admin_group names", path, mode, gid)
	}
	return nil
}

// maxConnections is the maximum number of HTTPS connections at a time. Further connections wait.
// The Unix socket has no maximum, because its mode keeps strangers out.
const maxConnections = 256

// ListenTLS listens with TLS 1.3, and refuses older versions. Without networks, ListenTLS refuses
// all but a loopback address. With networks, the listener closes each connection from elsewhere
// before a byte is read; loopback is one of them always.
func ListenTLS(address string, networks []netip.Prefix, c *certs.Manager) (net.Listener, error) {
	l, err := listenFrom("admin HTTPS", address, networks, maxConnections)
	if err != nil {
		return nil, err
	}
	config := c.Config()
	config.NextProtos = []string{"http/1.1"} // net/http supports no other protocol on a TLS listener
	return tls.NewListener(l, config), nil
}

// listenFrom listens for a number of connections at a time, on loopback or for some networks.
func listenFrom(what, address string, networks []netip.Prefix, connections int) (net.Listener, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	if ip, err := netip.ParseAddr(host); err != nil || !ip.IsLoopback() && len(networks) == 0 {
		return nil, fmt.Errorf("%s: %q is not a loopback address such as 127.0.0.1 or ::1: "+
			"put a tunnel in front of it for others", what, host)
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // a sandbox's rules on TCP ports do not cover Multipath TCP
	l, err := lc.Listen(context.Background(), "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return netutil.LimitListener(&fromNetworks{l, networks}, connections), nil
}

// fromNetworks is a listener for loopback and some networks.
type fromNetworks struct {
	net.Listener
	networks []netip.Prefix
}

// Accept closes the connections of others.
func (l *fromNetworks) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from, err := netip.ParseAddrPort(conn.RemoteAddr().String())
		at := from.Addr().Unmap()
		in := func(p netip.Prefix) bool { return p.Contains(at.WithZone("")) }
		if err == nil && (at.IsLoopback() || slices.ContainsFunc(l.networks, in)) {
			return conn, nil
		}
		conn.Close()
	}
}

// A browser gets a token in two halves: one in a cookie, one for the page, which sends its half in
// a header. One half alone is worthless. Scripts can't read the cookie. A cookie with the whole
// token would not be safe: a browser sends a cookie to the listeners on all ports of a host.
const (
	cookieName = "__Host-countersign"
	pageHeader = "Countersign-Page"
)

// splitToken splits a token into two random halves. The token is their XOR.
func splitToken(token secret.Bytes) (cookie, page string) {
	b, err := base64.RawURLEncoding.AppendDecode(nil, token.Expose())
	if err != nil {
		panic("admin: a token is base64url: " + err.Error())
	}
	one, other := make([]byte, len(b)), make([]byte, len(b))
	rand.Read(one)
	subtle.XORBytes(other, b, one)
	return base64.RawURLEncoding.EncodeToString(one), base64.RawURLEncoding.EncodeToString(other)
}

// joinToken returns the token of two halves, or none.
func joinToken(cookie, page string) (none secret.Bytes) {
	one, err1 := base64.RawURLEncoding.DecodeString(cookie)
	other, err2 := base64.RawURLEncoding.DecodeString(page)
	if err1 != nil || err2 != nil || len(one) != len(other) {
		return none
	}
	subtle.XORBytes(one, one, other)
	return secret.New(base64.RawURLEncoding.AppendEncode(nil, one))
}

// token returns the token of a request, and reports whether half of the token came in a cookie,
// which browsers add to every request.
func token(c huma.Context) (none secret.Bytes, byCookie bool) {
	if scheme, token, ok := strings.Cut(c.Header("Authorization"), " "); ok && strings.EqualFold(scheme, "Bearer") {
		return secret.Of(token), false
	}
	if c.TLS() == nil {
		return none, false
	}
	cookies, err := http.ParseCookie(c.Header("Cookie"))
	if err != nil {
		return none, false
	}
	for _, each := range cookies {
		if each.Name == cookieName {
			return joinToken(each.Value, c.Header(pageHeader)), true
		}
	}
	return none, false
}

// safe reports whether a method is safe (RFC 9110 section 9.2.1): the request changes nothing.
func safe(method string) bool { return method == http.MethodGet || method == http.MethodHead }
