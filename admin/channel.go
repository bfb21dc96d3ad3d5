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

	"countersign/admin/certs"
	"countersign/internal/operators"

	"github.com/danielgtaylor/huma/v2"
	"golang.org/x/net/netutil"
)

// connection is what is known of the other end without any word of it.
type connection struct {
	operators.Channel
	stranger bool // it may not talk at all
}

// name says in events who it is that nobody has signed in as.
func (c connection) name() string {
	if c.Kind == operators.Unix {
		return fmt.Sprintf("uid:%d", c.UID)
	}
	return "https"
}

type connectionKey struct{}

// withConnection notes who is at the other end: net/http has no other place for what belongs to a connection.
func (s *server) withConnection(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, connectionKey{}, s.connectionOf(conn))
}

func (s *server) connectionOf(conn net.Conn) connection {
	switch conn := conn.(type) {
	case *net.UnixConn:
		uid, err := peerUID(conn)
		return connection{operators.Channel{Kind: operators.Unix, UID: uid}, err != nil || !s.mayTalk(uid)}
	case *tls.Conn:
		return connection{operators.Channel{Kind: operators.HTTPS, Source: conn.RemoteAddr().String()}, false}
	}
	return connection{stranger: true}
}

// mayTalk is for root, for who runs the daemon, and for the members of the group that the configuration names. The socket's folder and
// mode say the same; what they say depends on no mistake of an administrator's here.
func (s *server) mayTalk(uid uint32) bool {
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

// peerUID is what the kernel says of the process at the other end (SO_PEERCRED).
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

// door lets in who may talk, and over HTTPS only what is meant for this host: a name of somebody else's that leads here (DNS rebinding)
// is not.
func (s *server) door(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, _ := r.Context().Value(connectionKey{}).(connection)
		h := w.Header()
		h.Set("Cache-Control", "no-store")
		h.Set("X-Content-Type-Options", "nosniff")
		if conn.Kind == operators.HTTPS && s.RPID != "localhost" { // which other programs of the machine are called too, and not all over HTTPS
			h.Set("Strict-Transport-Security", "max-age=31536000")
		}
		switch {
		case conn.stranger || conn.Kind == "":
			writeProblem(w, notAllowed.document("this user may not talk to the appliance: see admin_group in the configuration"))
		case conn.Kind == operators.HTTPS && !slices.Contains(s.Hosts, r.Host):
			writeProblem(w, notAllowed.document("the appliance is not called by that name: it is "+s.Origin))
		default:
			next.ServeHTTP(w, r)
		}
	})
}

// sameOrigin says whether a browser says that a page of ours has asked.
func (s *server) sameOrigin(c huma.Context) bool {
	return c.Header("Sec-Fetch-Site") == "same-origin" || c.Header("Origin") == s.Origin
}

// foreign says whether a browser says that another page has asked.
func (s *server) foreign(c huma.Context) bool {
	site, origin := c.Header("Sec-Fetch-Site"), c.Header("Origin")
	return site != "" && site != "same-origin" && site != "none" || origin != "" && origin != s.Origin
}

// Listen makes the socket, for its owner, and where there is one for a group (its number). A socket that nobody listens on any more is
// replaced.
func Listen(path, group string) (net.Listener, error) {
	if st, err := os.Lstat(path); err == nil {
		if st.Mode().Type() != os.ModeSocket {
			return nil, fmt.Errorf("admin socket %s: there is a file of another kind", path)
		}
		if conn, err := net.Dial("unix", path); err == nil {
			conn.Close()
			return nil, fmt.Errorf("admin socket %s: another process listens on it", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("admin socket: %w", err)
		}
	}
	old := syscall.Umask(0o177) // the socket must not be open to others even for a moment
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

// maxConnections is how many there may be over HTTPS at a time; others wait. On the Unix socket the mode of the socket says who may open
// any.
const maxConnections = 256

// ListenTLS listens on a loopback address, and nowhere else, with TLS 1.3, and nothing older.
func ListenTLS(address string, c *certs.Manager) (net.Listener, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("admin HTTPS: %w", err)
	}
	if ip, err := netip.ParseAddr(host); err != nil || !ip.IsLoopback() {
		return nil, fmt.Errorf("admin HTTPS: %q is not a loopback address such as 127.0.0.1 or ::1: put a tunnel in front of it for others", host)
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // which the rules of a sandbox on TCP ports do not cover
	l, err := lc.Listen(context.Background(), "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("admin HTTPS: %w", err)
	}
	l = netutil.LimitListener(l, maxConnections)
	config := c.Config()
	config.NextProtos = []string{"http/1.1"} // net/http speaks no other on a listener that does TLS by itself
	return tls.NewListener(l, config), nil
}

// A browser gets its session's token in two halves, of which one alone is nothing: the cookie, which no script of a page can read, and
// what the page keeps and says in a header. For a browser shows a cookie to whoever listens on any port of its host.
const (
	cookieName = "__Host-countersign"
	pageHeader = "Countersign-Page"
)

// halves splits a token: both halves are random, and it is their XOR.
func halves(token string) (cookie, page string) {
	b, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil {
		panic("admin: a token is base64url: " + err.Error())
	}
	one, other := make([]byte, len(b)), make([]byte, len(b))
	rand.Read(one)
	subtle.XORBytes(other, b, one)
	return base64.RawURLEncoding.EncodeToString(one), base64.RawURLEncoding.EncodeToString(other)
}

// whole is the token of two halves, or "".
func whole(cookie, page string) string {
	one, err1 := base64.RawURLEncoding.DecodeString(cookie)
	other, err2 := base64.RawURLEncoding.DecodeString(page)
	if err1 != nil || err2 != nil || len(one) != len(other) {
		return ""
	}
	subtle.XORBytes(one, one, other)
	return base64.RawURLEncoding.EncodeToString(one)
}

// token is what a request shows for its session, and whether a browser has added it by itself.
func token(c huma.Context) (token string, byCookie bool) {
	if scheme, token, ok := strings.Cut(c.Header("Authorization"), " "); ok && strings.EqualFold(scheme, "Bearer") {
		return token, false
	}
	if c.TLS() == nil {
		return "", false
	}
	cookies, err := http.ParseCookie(c.Header("Cookie"))
	if err != nil {
		return "", false
	}
	for _, each := range cookies {
		if each.Name == cookieName {
			return whole(each.Value, c.Header(pageHeader)), true
		}
	}
	return "", false
}

func safe(method string) bool { return method == http.MethodGet || method == http.MethodHead }
