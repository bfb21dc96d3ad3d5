package softhsmtests

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"countersign/client"
	"countersign/internal/mail/mailtest"
	"countersign/internal/scantest"
	"countersign/wire"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"
)

// domain has the names of the servers that a daemon of the tests reaches (RFC 6761).
const domain = "example.test"

// nameServer is a DNS server at a loopback address of its own: each name of domain is 127.0.0.1.
type nameServer struct {
	address   string // without a port: resolv.conf has none
	overTCP   bool   // an answer by UDP is truncated
	udp, tcp  atomic.Int64
	listeners []io.Closer
}

func newNameServer(t testing.TB, overTCP bool) *nameServer {
	t.Helper()
	needRoot(t, "port 53 and a mount namespace")
	n := &nameServer{overTCP: overTCP}
	for i := 1; ; i++ { // other tests on this machine may have a server, too
		n.address = fmt.Sprintf("127.53.%d.%d", os.Getpid()%250, i)
		packets, err := net.ListenPacket("udp", n.address+":53")
		if err != nil && i < 250 {
			continue
		} else if err != nil {
			t.Fatal(err)
		}
		streams, err := net.Listen("tcp", n.address+":53")
		if err != nil {
			t.Fatal(err)
		}
		n.listeners = []io.Closer{packets, streams}
		go n.servePackets(packets)
		go n.serveStreams(streams)
		break
	}
	t.Cleanup(n.close)
	return n
}

func (n *nameServer) close() {
	for _, l := range n.listeners {
		l.Close()
	}
}

func (n *nameServer) servePackets(conn net.PacketConn) {
	b := make([]byte, 1500)
	for {
		size, from, err := conn.ReadFrom(b)
		if err != nil {
			return
		}
		n.udp.Add(1)
		conn.WriteTo(n.answer(b[:size], n.overTCP), from)
	}
}

func (n *nameServer) serveStreams(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			for {
				var size [2]byte
				if _, err := io.ReadFull(conn, size[:]); err != nil {
					return
				}
				b := make([]byte, int(size[0])<<8|int(size[1]))
				if _, err := io.ReadFull(conn, b); err != nil {
					return
				}
				n.tcp.Add(1)
				answer := n.answer(b, false)
				conn.Write(append([]byte{byte(len(answer) >> 8), byte(len(answer))}, answer...))
			}
		}()
	}
}

// answer answers a question (RFC 1035). A truncated answer has no record.
func (n *nameServer) answer(question []byte, truncated bool) []byte {
	var p dnsmessage.Parser
	header, err := p.Start(question)
	if err != nil {
		return nil
	}
	asked, err := p.Question()
	if err != nil {
		return nil
	}
	known := strings.HasSuffix(asked.Name.String(), domain+".")
	reply := dnsmessage.Message{
		Header: dnsmessage.Header{
			ID: header.ID, Response: true, Authoritative: true, RecursionDesired: header.RecursionDesired,
			RecursionAvailable: true, Truncated: truncated,
		},
		Questions: []dnsmessage.Question{asked},
	}
	switch {
	case truncated:
	case !known:
		reply.RCode = dnsmessage.RCodeNameError
	case asked.Type == dnsmessage.TypeA:
		reply.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: asked.Name, Type: asked.Type, Class: asked.Class},
			Body:   &dnsmessage.AResource{A: [4]byte{127, 0, 0, 1}},
		}}
	}
	b, err := reply.Pack()
	if err != nil {
		panic(err)
	}
	return b
}

// resolving runs a command of the daemon with a folder in the place of /etc: with some files of
// this machine, the line hosts of nsswitch.conf, a file hosts, and resolv.conf as systemd-resolved
// has it, a link to a file that is replaced by a rename.
func (s *system) resolving(line, hosts string, n *nameServer, args ...string) *exec.Cmd {
	s.t.Helper()
	needRoot(s.t, "a mount namespace")
	etc := s.path("etc")
	if _, err := os.Stat(etc); err != nil {
		mkdir(s.t, etc)
		mkdir(s.t, s.resolve())
		for name := range strings.FieldsSeq("passwd group ld.so.cache host.conf services protocols ssl localtime") {
			if out, err := exec.Command("cp", "-a", "/etc/"+name, etc).CombinedOutput(); err != nil {
				s.t.Logf("cp: %s", out) // not each machine has each file
			}
		}
		if err := os.Symlink(filepath.Join(s.resolve(), "resolv.conf"), filepath.Join(etc, "resolv.conf")); err != nil {
			s.t.Fatal(err)
		}
	}
	s.write("etc/nsswitch.conf", "hosts: "+line+"\n")
	s.write("etc/hosts", "127.0.0.1 localhost\n"+hosts)
	s.nameServer(n)
	const bind = `mount --bind "$1" /etc && shift && exec "$@"`
	args = append([]string{"--mount", "sh", "-c", bind, "sh", etc, filepath.Join(bin, "countersignd")}, args...)
	cmd := exec.Command("unshare", append(args, "--config", s.path("countersign.toml"))...)
	cmd.Env = os.Environ()
	return cmd
}

// nameServer replaces resolv.conf. Without a server nobody answers.
func (s *system) nameServer(n *nameServer) {
	s.t.Helper()
	address := "127.53.255.255"
	if n != nil {
		address = n.address
	}
	replace(s.t, filepath.Join(s.resolve(), "resolv.conf"), "nameserver "+address+"\n")
}

// resolve is the folder of resolv.conf, beside that of the system.
func (s *system) resolve() string { return s.dir + "-resolve" }

// replace puts another file in the place of a file, as editors and programs do.
func replace(t testing.TB, path, content string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// receivers are servers in the test's process for all that a daemon sends: mail, events by syslog
// and by webhook, alerts, and traces. All have one certificate, which is replaced while they run.
type receivers struct {
	t           testing.TB
	s           *system
	certificate atomic.Pointer[tls.Certificate]
	mail        *mailtest.Server
	ports       map[string]string // by the name of the server

	mu      sync.Mutex
	conns   []net.Conn
	events  map[string]map[uint64]bool // by the sink: numbers of events
	alerts  int
	spans   int
	headers string // Authorization at the collector
}

func newReceivers(t testing.TB, s *system, implicit bool) *receivers {
	t.Helper()
	r := &receivers{
		t: t, s: s, ports: map[string]string{}, events: map[string]map[uint64]bool{"syslog": {}, "siem": {}},
	}
	trust := &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
		return &tls.Config{Certificates: []tls.Certificate{*r.certificate.Load()}}, nil
	}}
	r.mail = mailtest.New(t, func(m *mailtest.Server) { m.TLS, m.Implicit = trust, implicit })
	_, r.ports["mail"], _ = net.SplitHostPort(r.mail.Address())
	r.listen("logs", trust, r.readSyslog)
	for name, handler := range map[string]func(*http.Request, []byte){
		"siem": r.takeEvents, "pager": r.takeAlert, "collector": r.takeSpans,
	} {
		r.listen(name, trust, func(conn net.Conn) {
			in := bufio.NewReader(conn)
			for {
				request, err := http.ReadRequest(in)
				if err != nil {
					return
				}
				body, err := io.ReadAll(request.Body)
				if err != nil {
					return
				}
				scantest.Saw("a message to "+name, string(body))
				handler(request, body)
				io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			}
		})
	}
	return r
}

// listen serves connections by TLS until the end of the test.
func (r *receivers) listen(name string, trust *tls.Config, serve func(net.Conn)) {
	r.t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", trust)
	if err != nil {
		r.t.Fatal(err)
	}
	_, r.ports[name], _ = net.SplitHostPort(l.Addr().String())
	var open sync.WaitGroup
	r.t.Cleanup(func() { l.Close(); r.hangUp(); open.Wait() })
	open.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			r.mu.Lock()
			r.conns = append(r.conns, conn)
			r.mu.Unlock()
			open.Go(func() { defer conn.Close(); serve(conn) })
		}
	})
}

// hangUp ends all connections.
func (r *receivers) hangUp() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, conn := range r.conns {
		conn.Close()
	}
	r.conns = nil
}

func (r *receivers) readSyslog(conn net.Conn) {
	in := bufio.NewReader(conn)
	for { // octet counting (RFC 5425)
		text, err := in.ReadString(' ')
		if err != nil {
			return
		}
		n, err := strconv.Atoi(strings.TrimSpace(text))
		if err != nil {
			r.t.Errorf("syslog: a message begins with %q", text)
			return
		}
		b := make([]byte, n)
		if _, err := io.ReadFull(in, b); err != nil {
			return
		}
		scantest.Saw("a message to syslog", string(b))
		_, line, _ := strings.Cut(string(b), " - ")
		var e struct{ Index *uint64 }
		if err := json.Unmarshal([]byte(line), &e); err != nil || !strings.HasPrefix(string(b), "<1") {
			r.t.Errorf("syslog: %q: %v", b, err)
		} else if e.Index != nil {
			r.took("syslog", *e.Index)
		}
	}
}

func (r *receivers) takeEvents(_ *http.Request, body []byte) {
	var m struct {
		Data struct{ Events []struct{ Index uint64 } }
	}
	if err := json.Unmarshal(body, &m); err != nil {
		r.t.Errorf("siem: %v", err)
	}
	for _, e := range m.Data.Events {
		r.took("siem", e.Index)
	}
}

func (r *receivers) took(sink string, event uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events[sink][event] = true
}

func (r *receivers) takeAlert(*http.Request, []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.alerts++
}

func (r *receivers) takeSpans(request *http.Request, _ []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.spans++
	r.headers = request.Header.Get("Authorization")
}

// authority gives the servers a certificate of another authority, and replaces the file with the
// authorities that the daemon trusts.
func (r *receivers) authority() {
	r.t.Helper()
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(r.t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotAfter: time.Now().Add(time.Hour), IsCA: true,
		BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"*." + domain},
	}
	der := must(x509.CreateCertificate(rand.Reader, template, template, key.Public(), key))(r.t)
	r.certificate.Store(&tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key})
	replace(r.t, r.s.path("outward/ca.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
}

// secrets gives the servers another password and another token, and replaces their files.
func (r *receivers) secrets(round string) {
	r.t.Helper()
	password, token := "password-of-the-mail-"+round, "token-of-the-collector-"+round
	scantest.Secret("the password of the mail server", []byte(password))
	scantest.Secret("the token for a collector", []byte(token))
	r.mail.Change(func(m *mailtest.Server) { m.Password = password })
	replace(r.t, r.s.path("outward/mail-password"), password+"\n")
	replace(r.t, r.s.path("outward/headers"), "Authorization: Bearer "+token+"\n")
}

// asCredential gives a file the permissions of systemd's LoadCredential: none for anybody, and an
// ACL with read for this user.
func asCredential(t testing.TB, path string) {
	t.Helper()
	acl := binary.LittleEndian.AppendUint32(nil, 2) // the version
	for _, e := range []struct {
		tag, permissions uint16
		id               uint32
	}{{1, 4, ^uint32(0)}, {2, 4, uint32(os.Geteuid())}, {4, 0, ^uint32(0)}, {16, 4, ^uint32(0)}, {32, 0, ^uint32(0)}} {
		acl = binary.LittleEndian.AppendUint16(acl, e.tag)
		acl = binary.LittleEndian.AppendUint16(acl, e.permissions)
		acl = binary.LittleEndian.AppendUint32(acl, e.id)
	}
	if err := errors.Join(os.Chmod(path, 0o400), unix.Setxattr(path, "system.posix_acl_access", acl, 0)); err != nil {
		t.Fatal(err)
	}
	if st := must(os.Stat(path))(t); st.Mode().Perm() != 0o440 {
		t.Fatalf("%s has the mode %v", path, st.Mode())
	}
}

// settings are the settings for a daemon that reaches the receivers by name or at 127.0.0.1.
func (r *receivers) settings(byName bool) string {
	at := func(name string) string {
		if byName {
			return name + "." + domain + ":" + r.ports[name]
		}
		return "127.0.0.1:" + r.ports[name]
	}
	mode := "starttls"
	if r.mail.Implicit {
		mode = "implicit"
	}
	return fmt.Sprintf(`
[[webhooks]]
name = "pager"
url = "https://%s/alerts?token=secret-of-the-pager"
ca_file = "outward/ca.pem"
types = ["alert"]

[mail]
server = %q
tls = %q
from = "alerts@example.com"
to = ["ops@example.com"]
user = "countersign"
password_file = "outward/mail-password"
ca_file = "outward/ca.pem"

[[sinks]]
name = "syslog"
syslog = %q
ca_file = "outward/ca.pem"

[[sinks]]
name = "siem"
url = "https://%s/events?token=secret-of-the-siem"
ca_file = "outward/ca.pem"

[traces]
endpoint = "https://%s/v1/traces"
headers_file = "outward/headers"
ca_file = "outward/ca.pem"
`, at("pager"), at("mail"), mode, at("logs"), at("siem"), at("collector"))
}

// reached has the daemon send something to each receiver, and waits for all of it.
func (r *receivers) reached(round string) {
	r.t.Helper()
	r.mu.Lock()
	alerts, spans, mails := r.alerts, r.spans, len(r.mail.Got())
	r.mu.Unlock()
	eventually(r.t, round+": alerts are sent", func() bool { // Go's resolver looks at resolv.conf each 5 s
		_, _, code := r.s.cli("", "admin", "alert", "test")
		return code == 0
	})
	r.mu.Lock()
	if r.alerts == alerts || len(r.mail.Got()) == mails {
		r.t.Errorf("%s: %d alerts and %d mails have come before, and none now", round, alerts, mails)
	}
	r.mu.Unlock()
	config := r.s.clientConfig()
	config.Traceparent = func(context.Context) string {
		return "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	}
	c := must(client.Dial(r.t.Context(), config))(r.t)
	defer c.Close()
	must(c.Sign(r.t.Context(), "payments", message("aaaa")))(r.t)
	all := r.s.events()
	last := all[len(all)-1].Index
	eventually(r.t, round+": the spans and the last event at each sink", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.spans > spans && r.events["syslog"][last] && r.events["siem"][last]
	})
}

// outwardHosts is a file hosts with the names of the receivers.
const outwardHosts = "127.0.0.1 mail.example.test logs.example.test siem.example.test pager.example.test " +
	"collector.example.test\n"

// TestConfinedReachesOut has a confined daemon reach a server for each thing that it sends, by
// address and by name: mail, syslog, webhooks and traces. Go's resolver asks a file and a name
// server, by UDP and by TCP, also where nsswitch.conf names a source that only the C library knows.
// Then the files of authorities, of the password and of the token, and resolv.conf are replaced,
// and all is reached again. A password that others can read is refused.
func TestConfinedReachesOut(t *testing.T) {
	s := newSystem(t)
	mkdir(t, s.path("outward"))
	base := string(must(os.ReadFile(s.path("countersign.toml")))(t))
	p := s.serve()
	s.enrol()
	p.stop()
	defer func() { s.t = t }()
	for _, c := range []struct {
		name     string
		implicit bool
		line     string // of nsswitch.conf; "": by address
		hosts    string
		overTCP  bool
	}{
		{"address, STARTTLS", false, "", "", false},
		{"address, implicit TLS", true, "", "", false},
		{"hosts", false, "files dns", outwardHosts, false},
		{"hosts, systemd-resolved", true, "files resolve [!UNAVAIL=return] dns", outwardHosts, false},
		{"UDP, systemd-resolved", false, "files resolve [!UNAVAIL=return] dns", "", false},
		{"TCP", true, "files dns", "", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			s.t = t // errors belong to this test
			r := newReceivers(t, s, c.implicit)
			r.authority()
			r.secrets("first")
			s.write("countersign.toml", base)
			s.edit("countersign.toml", "[tokens.main]", r.settings(c.line != "")+"\n[tokens.main]")
			cmd := exec.Command(filepath.Join(bin, "countersignd"), "serve", "--config", s.path("countersign.toml"))
			cmd.Env = os.Environ()
			var first, second *nameServer
			if c.line != "" {
				if c.hosts == "" {
					first, second = newNameServer(t, c.overTCP), newNameServer(t, c.overTCP)
				}
				cmd = s.resolving(c.line, c.hosts, first, "serve")
				cmd.Env = append(cmd.Env, "GODEBUG=netdns=2")
			}
			p := s.start(cmd)
			r.reached("first")
			r.authority()
			r.secrets("second")
			asCredential(t, s.path("outward/mail-password"))
			asCredential(t, s.path("outward/headers"))
			if second != nil {
				first.close()
				s.nameServer(second)
			}
			r.hangUp()
			r.reached("after the files were replaced")
			if err := os.Chmod(s.path("outward/mail-password"), 0o444); err != nil {
				t.Fatal(err)
			}
			out, errOut, code := s.cli("", "admin", "alert", "test")
			if code == 0 || !strings.Contains(out+errOut, "mode") {
				t.Errorf("with a password that everybody can read: %d %s%s", code, out, errOut)
			}
			p.stop()
			r.mu.Lock()
			if r.headers != "Bearer token-of-the-collector-second" {
				t.Errorf("the collector's token is not that of the file")
			}
			r.mu.Unlock()
			if r.mail.Plain() {
				t.Error("a password came without TLS")
			}
			for _, n := range []*nameServer{first, second} {
				if n == nil {
					continue
				}
				if udp, tcp := n.udp.Load(), n.tcp.Load(); udp == 0 || c.overTCP != (tcp > 0) {
					t.Errorf("the name server was asked %d times by UDP and %d times by TCP", udp, tcp)
				}
			}
			const library = ") = cgo"
			log := p.stderr.String()
			if strings.Contains(log, library) || c.line != "" && !strings.Contains(log, ") = ") {
				t.Errorf("the C library resolves, or nobody:\n%s", log)
			}
		})
	}
}

// TestSystemAuthorities has a confined daemon without ca_file trust the authorities of the system,
// which the daemon reads at the first connection.
func TestSystemAuthorities(t *testing.T) {
	s := newSystem(t)
	mkdir(t, s.path("outward"))
	r := newReceivers(t, s, false)
	r.authority()
	r.secrets("only")
	s.edit("countersign.toml", "[tokens.main]",
		strings.ReplaceAll(r.settings(true), `ca_file = "outward/ca.pem"`, "")+"\n[tokens.main]")
	cmd := s.resolving("files", outwardHosts, nil, "serve")
	ca := must(os.ReadFile(s.path("outward/ca.pem")))(t)
	s.write("etc/ssl/certs/ca-certificates.crt", string(ca))
	p := s.start(cmd)
	s.enrolRoot()
	s.enrol()
	r.reached("with the authorities of the system")
	p.stop()
}

// TestNetworkModule has the key workers of a token with network reach their HSM by name, with the
// name server asked by UDP and by TCP, and again by new key workers after resolv.conf was replaced.
// Another port is refused.
func TestNetworkModule(t *testing.T) {
	s := newSystem(t)
	hsm, foreign := echo(t), echo(t)
	s.edit("countersign.toml", softHSM, compile(t, "network.c", "-shared", "-fPIC"))
	s.edit("countersign.toml", "environment = {", fmt.Sprintf(
		"network = [\"hsm.%s:%s\"]\nenvironment = { NETWORK_HSM = \"hsm.%s:%s\", NETWORK_FOREIGN = \"hsm.%s:%s\",",
		domain, hsm, domain, hsm, domain, foreign))
	first, second := newNameServer(t, false), newNameServer(t, true)
	p := s.start(s.resolving("files dns", "", first, "serve"))
	s.enrolRoot()
	s.enrol()
	c := s.dial() // a handshake needs a key worker, too
	first.close()
	s.nameServer(second)
	for _, pid := range p.workers() {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	eventually(t, "a new key worker asks the other name server", func() bool { return second.tcp.Load() > 0 })
	eventually(t, "a new key worker signs", func() bool {
		_, err := c.Sign(t.Context(), "payments", message("AAAA"))
		return err == nil
	})
	p.stop()
	if first.udp.Load() == 0 || first.tcp.Load() > 0 || second.udp.Load() == 0 {
		t.Error("the name servers were not asked by UDP first, and by TCP after a truncated answer only")
	}
	log := p.stderr.String()
	for _, want := range []string{"the HSM: answered", "a foreign port: connect: EACCES"} {
		if strings.Count(log, want) < 2 { // of a key worker before and of one after; others may still begin
			t.Errorf("the log does not say %q for the key workers", want)
		}
	}
	if strings.Contains(log, "the HSM: resolve") || strings.Contains(log, "the HSM: connect") {
		t.Error("a key worker has not reached its HSM")
	}
}

// echo serves a TCP port that answers a line with the same line.
func echo(t testing.TB) (port string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(conn, conn); conn.Close() }()
		}
	}()
	_, port, _ = net.SplitHostPort(l.Addr().String())
	return port
}

// TestConfinedUpkeep has a confined daemon do what no request needs: rotate and remove the files of
// a sink, make a lost history again, compact the ledger, read the configuration and the policy
// again, make, renew and install certificates, and print times of another zone.
func TestConfinedUpkeep(t *testing.T) {
	s := newSystem(t)
	address := newFolder(t).listen
	mkdir(t, s.path("sink"))
	mkdir(t, s.path("past"))
	s.edit("countersign.toml", "admin_socket",
		fmt.Sprintf("admin_https = %q\nhistory = \"past/history\"\nadmin_socket", address))
	s.edit("countersign.toml", "[tokens.main]",
		"[[sinks]]\nname = \"file\"\nfile = \"sink/events.jsonl\"\nfile_mib = 1\nfiles = 1\n\n[tokens.main]")
	if out, code := s.daemon("init"); code != 0 {
		t.Fatalf("init: %d %s", code, out)
	}
	// The file is full up to the event 2, so the next event rotates the file.
	full := []byte(`{"index":2}` + "\n")
	s.write("sink/events.jsonl", strings.Repeat(string(full), 1<<20/len(full)))
	asCredential(t, s.path("pin"))
	old := "sink/events.jsonl.00000000000000000001"
	s.write(old, `{"index":1}`+"\n")
	p := s.serve("TZ=Pacific/Kiritimati") // UTC+14
	s.enrol()
	eventually(t, "the rotated files", func() bool {
		_, err := os.Stat(s.path(old))
		files := must(filepath.Glob(s.path("sink/*")))(t)
		b, _ := os.ReadFile(s.path("sink/events.jsonl"))
		return os.IsNotExist(err) && len(files) == 2 && strings.Contains(string(b), "KeyCreated")
	})
	if err := os.Remove(s.path("past/history")); err != nil {
		t.Fatal(err)
	}
	s.must("admin", "ledger", "compact")
	s.edit("policy.cedar", "permit (", "permit (\n")
	s.must("admin", "policy", "reload")
	s.must("admin", "log", "level", "info", "--for", "1m")
	p.cmd.Process.Signal(syscall.SIGHUP)

	s.write("ca.pem", must(s.admin().TLS(t.Context()))(t).CA)
	s.otherCA("other.key", "other.pem")
	connects := func(ca string) error {
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(must(os.ReadFile(s.path(ca)))(t))
		conn, err := tls.Dial("tcp", address, &tls.Config{RootCAs: pool, ServerName: "localhost"})
		if err == nil {
			conn.Close()
		}
		return err
	}
	if err := connects("ca.pem"); err != nil { // the first connection makes the certificate
		t.Error(err)
	}
	s.write("csr.pem", s.must("admin", "tls", "csr"))
	for _, days := range []string{"60", "90"} {
		out, err := exec.Command("openssl", "x509", "-req", "-in", s.path("csr.pem"), "-CA", s.path("other.pem"),
			"-CAkey", s.path("other.key"), "-CAcreateserial", "-copy_extensions", "copy", "-days", days).Output()
		if err != nil {
			t.Fatalf("openssl: %v", err)
		}
		if _, errOut, code := s.cli(string(out), "admin", "tls", "install"); code != 0 {
			t.Fatalf("install: %s", errOut)
		}
		if err := connects("other.pem"); err != nil {
			t.Error(err)
		}
	}
	s.must("admin", "tls", "uninstall")
	if err := connects("ca.pem"); err != nil {
		t.Error(err)
	}
	eventually(t, "a new history", func() bool { _, err := os.Stat(s.path("past/history")); return err == nil })
	if _, err := s.dial().Sign(t.Context(), "payments", message("AAAA")); err != nil {
		t.Error(err)
	}
	p.stop()
	for _, want := range []string{"+14:00 ", "reload: the configuration was read"} {
		if !strings.Contains(p.stderr.String(), want) {
			t.Errorf("the log has no %q", want)
		}
	}
}

// TestConfinedOnAFullDisk fills the file system of the ledger, the history and the journals of a
// confined daemon to its last byte. Meanwhile sign requests are unavailable, and afterwards they
// are served, without a restart.
func TestConfinedOnAFullDisk(t *testing.T) {
	needRoot(t, "a mount namespace")
	s := newSoftHSM(t, softHSM)
	mkdir(t, s.path("disk"))
	s.edit("countersign.toml", `"ledger.db"`, `"disk/ledger.db"`)
	const script = `mount -t tmpfs -o size=64m,mode=700 tmpfs "$1" &&
"$2" init --new-token --so-pin-file "$3" --config "$4" >"$3.log" 2>&1 && exec "$2" serve --config "$4"`
	cmd := exec.Command("unshare", "--mount", "sh", "-c", script, "sh", s.path("disk"),
		filepath.Join(bin, "countersignd"), s.path("so-pin"), s.path("countersign.toml"))
	cmd.Env = os.Environ()
	p := s.start(cmd)
	s.enrolRoot()
	s.enrol()
	c := s.dial()
	must(c.Sign(t.Context(), "payments", message("AAAA")))(t)
	fill := filepath.Join(fmt.Sprintf("/proc/%d/root", cmd.Process.Pid), s.path("disk/fill"))
	f := must(os.Create(fill))(t)
	defer f.Close()
	full := func() {
		t.Helper()
		for size := 1 << 20; size > 0; size /= 2 {
			for _, err := f.Write(make([]byte, size)); err == nil; _, err = f.Write(make([]byte, size)) {
			}
		}
	}
	refused := message("BBBB").Fill(time.Hour)
	eventually(t, "a sign request is unavailable", func() bool {
		full()
		_, err := c.Sign(t.Context(), "payments", message("CCCC"))
		return code(err) == wire.CodeUnavailable
	})
	full()
	if _, err := c.Sign(t.Context(), "payments", refused); code(err) != wire.CodeUnavailable {
		t.Errorf("with a full disk: %v", err)
	}
	f.Close()
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	eventually(t, "requests are served again", func() bool {
		_, err := c.Sign(t.Context(), "payments", refused)
		return err == nil
	})
	p.stop()
}

// TestAbstractNotifications starts a daemon with a service manager whose socket has an abstract
// name. The confined daemon notifies the manager, although Landlock lets it connect to no such
// socket. A name that nobody listens to, and a socket of another kind, are refused at the start.
func TestAbstractNotifications(t *testing.T) {
	s := newSystem(t)
	name := fmt.Sprintf("@countersign-test-%d", os.Getpid())
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	command := func(socket string) *exec.Cmd {
		cmd := exec.Command("env", "NOTIFY_SOCKET="+socket, filepath.Join(bin, "countersignd"), "serve",
			"--config", s.path("countersign.toml"))
		cmd.Env = append(os.Environ(), "WATCHDOG_USEC=600000")
		return cmd
	}
	p := s.begin(command(name))
	notified := func() string {
		t.Helper()
		b := make([]byte, 4096)
		manager.SetReadDeadline(time.Now().Add(30 * time.Second))
		n, err := manager.Read(b)
		if err != nil {
			t.Fatalf("no message to the service manager: %v\n%s", err, p.stderr)
		}
		return string(b[:n])
	}
	seen := map[string]bool{}
	for !seen["READY=1"] || !seen["WATCHDOG=1"] {
		seen[notified()] = true
	}
	s.enrolRoot()
	if s.hasCause("notify-unread") {
		t.Error("the state has a cause for a manager that reads")
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	for notified() != "STOPPING=1" {
	}
	p.stop()
	manager.Close()
	for socket, want := range map[string]string{
		name: "can't be reached", "vsock:2:1234": "is a path, or @ and an abstract name", "run/notify": "is a path",
	} {
		out, err := command(socket).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "NOTIFY_SOCKET") || !strings.Contains(string(out), want) {
			t.Errorf("%s: %v, want %q\n%s", socket, err, want, out)
		}
	}
}
