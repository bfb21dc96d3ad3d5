package softhsmtests

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"countersign/admin/api"
)

// p11KitProxy returns the path of p11-kit's module, which passes calls on to other modules.
func p11KitProxy(t *testing.T) string {
	t.Helper()
	found, err := filepath.Glob("/usr/lib/*/p11-kit-proxy.so")
	if err != nil || len(found) == 0 {
		missing(t, "p11-kit-proxy.so: apt-get install p11-kit-modules")
	}
	return found[0]
}

// withP11Kit returns a command of countersignd for which p11-kit has SoftHSM as its only module,
// whatever the machine's configuration. For root, p11-kit reads the machine's configuration only,
// so the command sees another one in its place.
func (s *system) withP11Kit(args ...string) *exec.Cmd {
	s.t.Helper()
	modules := s.path("pkcs11/modules")
	if err := os.MkdirAll(modules, 0o700); err != nil {
		s.t.Fatal(err)
	}
	s.write("pkcs11/pkcs11.conf", "user-config: only\n")
	s.write("pkcs11/modules/softhsm.module", "module: "+softHSM+"\n")
	args = append([]string{filepath.Join(bin, "countersignd")}, args...)
	args = append(args, "--config", s.path("countersign.toml"))
	if os.Geteuid() == 0 {
		const hide = `[ ! -d /etc/pkcs11 ] || mount --bind "$1" /etc/pkcs11
mount --bind "$2" /usr/share/p11-kit/modules && shift 2 && exec "$@"`
		empty := s.path("empty")
		if err := os.MkdirAll(empty, 0o700); err != nil {
			s.t.Fatal(err)
		}
		args = append([]string{"unshare", "--mount", "sh", "-c", hide, "sh", empty, modules}, args...)
	}
	cmd := exec.CommandContext(s.t.Context(), args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "XDG_CONFIG_HOME="+s.dir)
	return cmd
}

// TestP11Kit runs an appliance on SoftHSM behind p11-kit's proxy, from init on: a key signs, is
// rotated, signs again, and signs after a restart. check proves each algorithm. The quirks are
// those of SoftHSM's tokens, although the module is p11-kit's.
func TestP11Kit(t *testing.T) {
	s := newSoftHSM(t, p11KitProxy(t))
	run := func(args ...string) string {
		t.Helper()
		out, err := s.withP11Kit(args...).CombinedOutput()
		s.checkOutput("countersignd", string(out))
		if err != nil {
			t.Fatalf("countersignd %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	run("init", "--new-token", "--so-pin-file", s.path("so-pin"))
	start := func() *process {
		p := s.start(s.withP11Kit("serve"))
		s.enrolRoot()
		return p
	}
	p := start()
	s.enrol()
	signed := func(version uint32) {
		t.Helper()
		c := s.dial()
		defer c.Close()
		got, err := c.Sign(t.Context(), "payments", message("AAAA").Fill(time.Hour))
		if err != nil || got.Version != version {
			t.Fatalf("%+v, %v; want version %d", got, err, version)
		}
	}
	signed(1)
	if _, err := s.admin().RotateKey(t.Context(), "payments", api.Rotate{Now: true}); err != nil {
		t.Fatal(err)
	}
	signed(2)
	p.stop()
	out := run("check", "--write")
	for _, want := range []string{"PKCS#11 Kit", "(SoftHSM 2.6.1, tested)", "noise/1", "payments/3",
		"proof     ed25519 ok", "proof     x25519  ok", "proof     p256    ok", "summary  ok"} {
		if !strings.Contains(out, want) {
			t.Errorf("check has no %q:\n%s", want, out)
		}
	}
	p = start()
	signed(2)
	p.stop()
}

// TestUnreported has a module that never sets CKA_LOCAL, as NSS. The provenance of a new key is
// unreported for operators, for peers, in the audit log and in check; neither generated nor
// imported.
func TestUnreported(t *testing.T) {
	s := newSystem(t)
	s.edit("countersign.toml", softHSM, compile(t, "shim.c", "-shared", "-fPIC"))
	s.edit("countersign.toml", "environment = {", `environment = { SHIM_DIALECT = "no-local",`)
	p := s.serve()
	defer p.stop()
	s.enrol()
	if out := s.must("admin", "key", "show", "payments"); !strings.Contains(out, "unreported: made by the device") {
		t.Error(out)
	}
	c := s.dial()
	defer c.Close()
	keys, err := c.Keys(t.Context())
	if err != nil || len(keys) != 1 || keys[0].Provenance != "unreported" {
		t.Errorf("%+v, %v", keys, err)
	}
	created := false
	for _, e := range s.events() {
		if e.Type == "KeyCreated" && e.Resource == "payments/1" {
			created = e.Metadata["provenance"] == "unreported"
		}
	}
	if !created {
		t.Error("the audit log has another provenance")
	}
	if out, _ := s.daemon("check", "--write"); !strings.Contains(out, "provenance unreported") {
		t.Error(out)
	}
}
