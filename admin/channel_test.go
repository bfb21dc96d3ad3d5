package admin

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"countersign/admin/api"
)

// TestBrowserRules checks the rules for HTTPS: a request names the appliance's host, and a request
// with a cookie comes from a page of the appliance.
func TestBrowserRules(t *testing.T) {
	r := newRig(t)
	root := r.root()
	web := r.httpsHTTP()
	ch := must(r.https().Challenge(t.Context(), api.NewChallenge{Purpose: "sign-in", Operator: "root"}))(t)
	proof := r.proof("root", ch.Text)
	body := fmt.Sprintf(`{"challenge":%q,"proof":{"credential":%q,"sshsig":%q}}`, ch.ID, proof.Credential, proof.SSHSIG)
	crossSite := map[string]string{"Sec-Fetch-Site": "cross-site"}
	if _, refusal, text := call(t, web, "POST", r.url+"/v1/sessions", body, crossSite); refusal.Code != "not_allowed" {
		t.Errorf("another page signs somebody in: %s", text)
	}
	resp, _, text := call(t, web, "POST", r.url+"/v1/sessions", body, map[string]string{"Origin": r.url})
	cookies := resp.Cookies()
	if len(cookies) != 1 || cookies[0].Name != "__Host-countersign" || !cookies[0].Secure || !cookies[0].HttpOnly ||
		cookies[0].SameSite != http.SameSiteStrictMode || cookies[0].Path != "/" ||
		cookies[0].Domain != "" || cookies[0].MaxAge < 3000 {
		t.Fatalf("%v %s", resp.Header, text)
	}
	token := r.token(r.https(), "root") // of a program; see TestBrowserSession for a browser
	bearer := "Bearer " + token
	for _, c := range []struct {
		what, method, path string
		headers            map[string]string
		want               string
	}{
		{"without it nobody does", "GET", "/v1/me", nil, "signed_out"},
		{"a cookie that is none", "GET", "/v1/me", map[string]string{"Cookie": `="` + token}, "signed_out"},
		{"the token writes", "DELETE", "/v1/peers/none", map[string]string{"Authorization": bearer}, "not_found"},
		{"but not for another page", "DELETE", "/v1/peers/none",
			map[string]string{"Authorization": bearer, "Origin": "https://evil.example"}, "not_allowed"},
		{"a name that leads here", "GET", "/v1/health/alive", map[string]string{"Host": "evil.example"}, "not_allowed"},
		{"the address", "GET", "/v1/me",
			map[string]string{"Host": "127.0.0.1:1", "Authorization": bearer}, "not_allowed"},
	} {
		if resp, refusal, text := call(t, web, c.method, r.url+c.path, "", c.headers); refusal.Code != c.want {
			t.Errorf("%s: %d %s, want %q", c.what, resp.StatusCode, text, c.want)
		}
	}
	// A session is valid only on the channel of its sign-in.
	_, err := r.unix().WithToken(token).Me(t.Context())
	wants(t, "a token of HTTPS on the socket", "signed_out", err)
	unix := r.token(root, "root")
	_, err = r.https().WithToken(unix).Me(t.Context())
	wants(t, "a token of the socket over HTTPS", "signed_out", err)
	cookie := map[string]string{"Cookie": cookieName + "=" + unix}
	_, refusal, _ := call(t, r.unixHTTP(), "GET", "http://countersign/v1/me", "", cookie)
	if refusal.Code != "signed_out" {
		t.Errorf("a cookie on the socket: %+v", refusal)
	}
}

func TestOnlyTLS13OnLoopback(t *testing.T) {
	r := newRig(t)
	address := strings.Replace(r.url, "https://localhost", "127.0.0.1", 1)
	for version, want := range map[uint16]bool{tls.VersionTLS12: false, tls.VersionTLS13: true} {
		config := &tls.Config{InsecureSkipVerify: true, MinVersion: version, MaxVersion: version}
		conn, err := tls.Dial("tcp", address, config)
		if err == nil {
			conn.Close()
		}
		if (err == nil) != want {
			t.Errorf("%s: %v", tls.VersionName(version), err)
		}
	}
	if resp, err := http.Get(strings.Replace(r.url, "https", "http", 1)); err == nil && resp.StatusCode != 400 {
		t.Errorf("without TLS: %s", resp.Status)
	}
	for _, address := range []string{"0.0.0.0:0", "[::]:0", ":0", "192.0.2.1:0", "localhost:0", "127.0.0.1"} {
		if l, err := ListenTLS(address, nil, newCertificates(t)); err == nil {
			l.Close()
			t.Errorf("it listens on %s", address)
		}
	}
}

// TestNetworksOfOperators has callers from addresses inside and outside of the networks of
// operators.
func TestNetworksOfOperators(t *testing.T) {
	networks := []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("2001:db8::/32")}
	for from, want := range map[string]bool{
		"192.0.2.0:1": true, "192.0.2.255:1": true, "192.0.1.255:1": false, "192.0.3.0:1": false,
		"[::ffff:192.0.2.7]:1": true, "[::ffff:192.0.3.7]:1": false, "[2001:db8::1]:1": true, "[2001:db9::1]:1": false,
		"127.0.0.1:1": true, "[::1]:1": true, "[fe80::1%eth0]:1": false,
	} {
		address := must(netip.ParseAddrPort(from))(t)
		in, out := net.Pipe()
		defer out.Close()
		l := &fromNetworks{&oneConnection{conn: remote{in, net.TCPAddrFromAddrPort(address)}}, networks}
		conn, err := l.Accept()
		if is := err == nil; is != want {
			t.Errorf("%s: %v", from, err)
		}
		if err != nil { // closed without a byte
			if _, err := out.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("%s: %v", from, err)
			}
			continue
		}
		conn.Close()
	}
	l, err := ListenTLS("0.0.0.0:0", networks, newCertificates(t))
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

// oneConnection is a listener with one connection.
type oneConnection struct {
	net.Listener
	conn net.Conn
}

func (l *oneConnection) Accept() (net.Conn, error) {
	if l.conn == nil {
		return nil, net.ErrClosed
	}
	conn := l.conn
	l.conn = nil
	return conn, nil
}

type remote struct {
	net.Conn
	address net.Addr
}

func (r remote) RemoteAddr() net.Addr { return r.address }

// TestStrangersOnTheSocket checks that strangers are refused even if the modes of the socket and
// its folder are wrong.
func TestStrangersOnTheSocket(t *testing.T) {
	r := newRig(t)
	if st, err := os.Stat(r.socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	if os.Geteuid() != 0 { // only root can call as another user
		cmd := exec.Command("sudo", "-n", os.Args[0], "-test.run=^TestStrangersOnTheSocket$")
		if out, err := cmd.CombinedOutput(); err != nil && os.Getenv("REQUIRE_DEVICES") == "1" {
			t.Fatalf("as root: %v %s", err, out)
		} else if err != nil {
			t.Skipf("it needs root: %v", err)
		}
		return
	}
	for _, open := range []string{r.socket, filepath.Dir(r.socket), filepath.Dir(filepath.Dir(r.socket))} {
		if err := os.Chmod(open, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	const nobody = 65534
	status := make(chan string)
	go func() {
		runtime.LockOSThread() // without an unlock, so that the thread with the other user ends
		if _, _, e := syscall.RawSyscall(syscall.SYS_SETRESUID, ^uintptr(0), nobody, ^uintptr(0)); e != 0 {
			status <- e.Error()
			return
		}
		conn, err := net.Dial("unix", r.socket)
		if err != nil {
			status <- err.Error()
			return
		}
		defer conn.Close()
		io.WriteString(conn, "GET /v1/health/alive HTTP/1.1\r\nHost: x\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			status <- err.Error()
			return
		}
		status <- strconv.Itoa(resp.StatusCode)
	}()
	if got := <-status; got != "403" {
		t.Errorf("a stranger gets %s", got)
	}
	if r.server.mayConnect(nobody) || !r.server.mayConnect(0) || !r.server.mayConnect(uint32(os.Geteuid())) {
		t.Error("who may talk is wrong")
	}
	r.server.Group = "65534" // of Debian's nobody
	if !r.server.mayConnect(nobody) || r.server.mayConnect(12345) {
		t.Error("who may talk by a group is wrong")
	}
}

func TestListenGivesTheSocketToAGroup(t *testing.T) {
	path := t.TempDir() + "/sock"
	l, err := Listen(path, strconv.Itoa(os.Getegid()))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o660 {
		t.Errorf("%v, %v", st, err)
	}
}
