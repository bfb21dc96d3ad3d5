package softhsmtests

import (
	"net"
	"os/exec"
	"strings"
	"testing"

	"countersign/admin/api"
	"countersign/approval"
	"countersign/internal/scantest"
	"countersign/internal/sshagent"
)

// TestHTTPS uses the admin API over HTTPS on a loopback address, before and after a restart. The
// private key of the certificate is in the token.
func TestHTTPS(t *testing.T) {
	s := newSystem(t)
	address := ofLocalhost(t)
	s.edit("countersign.toml", "admin_socket", "admin_https = \""+address+"\"\nadmin_socket")
	if out, code := s.daemon("serve"); code != 1 || !strings.Contains(out, "run countersignd init") {
		t.Errorf("without keys: %d %s", code, out)
	}
	if out, code := s.daemon("init"); code != 0 || !strings.Contains(out, "admin-tls") {
		t.Fatalf("init: %d %s", code, out)
	}
	p := s.serve()
	shown := must(s.admin().TLS(t.Context()))(t)
	_, port, _ := net.SplitHostPort(address)
	dial := func() *api.Client {
		return must(api.NewHTTPSClient("https://localhost:"+port, []byte(shown.CA)))(t)
	}
	c := dial()
	if err := c.Ready(t.Context()); err != nil {
		t.Error(err)
	}
	signIn := func(c *api.Client) {
		ch := must(c.Challenge(t.Context(), api.NewChallenge{Purpose: "sign-in", Operator: "root"}))(t)
		proof := must(sshagent.Sign(s.root.agent, s.root.credential, approval.ForSignIn, ch.Text))(t)
		in := must(c.SignIn(t.Context(), api.Proven{Challenge: ch.ID, Proof: proof}))(t)
		scantest.Secret(scantest.SessionToken, []byte(in.Token))
	}
	signIn(c)
	me := must(c.Me(t.Context()))(t)
	if me.Session.Channel != "https" || !strings.HasPrefix(me.Session.Source, "127.0.0.1:") {
		t.Errorf("%+v", me)
	}
	if keys := must(c.Keys(t.Context()))(t); len(keys) != 4 {
		t.Errorf("%+v", keys)
	}
	if out := s.must("admin", "tls", "csr"); !strings.HasPrefix(out, "-----BEGIN CERTIFICATE REQUEST-----") {
		t.Errorf("csr: %s", out)
	}
	_, errOut, code := s.cli("no certificate", "admin", "tls", "install")
	if code != 1 || !strings.HasPrefix(errOut, "countersign: error: invalid: ") {
		t.Errorf("install: %d %s", code, errOut)
	}
	out := s.must("admin", "tls", "show")
	if !strings.Contains(out, "localhost") || !strings.Contains(out, "BEGIN CERTIFICATE") {
		t.Errorf("show: %s", out)
	}
	s.cliOverHTTPS("https://localhost:"+port, shown.CA)
	p.stop()
	p = s.serve()
	signIn(dial()) // the certificate of the same CA still verifies
	p.stop()
}

// cliOverHTTPS uses the CLI with --url: the first command pins the CA and the appliance, and the
// next ones need no CA. Another CA is refused.
func (s *system) cliOverHTTPS(url, ca string) {
	s.t.Helper()
	s.write("ca.pem", ca)
	s.otherCA("other.key", "other.pem")
	if _, errOut, code := s.cli("", "admin", "--url", url, "whoami"); code != 2 || !strings.Contains(errOut, "--ca") {
		s.t.Errorf("without a CA: %d %s", code, errOut)
	}
	_, errOut, code := s.cli("", "admin", "--url", url, "--ca", s.path("other.pem"), "whoami")
	if code == 0 || !strings.Contains(errOut, "certificate") {
		s.t.Errorf("with another CA: %d %s", code, errOut)
	}
	_, errOut, code = s.cli("", "admin", "--url", url, "--ca", s.path("ca.pem"), "whoami")
	if code != 0 || !strings.Contains(errOut, "from now on "+url) {
		s.t.Errorf("with the CA: %d %s", code, errOut)
	}
	if out := s.must("admin", "--url", url, "sessions", "list"); !strings.Contains(out, "https") {
		s.t.Errorf("with the pinned CA: %s", out)
	}
	_, errOut, code = s.cli("", "admin", "--url", url, "--ca", s.path("other.pem"), "whoami")
	if code != 1 || !strings.Contains(errOut, "another CA") {
		s.t.Errorf("with another CA afterwards: %d %s", code, errOut)
	}
}

// otherCA writes the key and the certificate of a CA that no appliance has.
func (s *system) otherCA(key, certificate string) {
	s.t.Helper()
	cmd := exec.Command("openssl", "req", "-x509", "-newkey", "ed25519", "-nodes", "-subj", "/CN=other",
		"-keyout", s.path(key), "-out", s.path(certificate))
	if out, err := cmd.CombinedOutput(); err != nil {
		s.t.Fatalf("openssl: %v %s", err, out)
	}
}
