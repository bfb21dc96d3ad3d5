package softhsmtests

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign/internal/mirror/mirrortest"
)

// mirrored gives the configuration an SFTP server.
func (s *system) mirrored() *mirrortest.Server {
	s.t.Helper()
	server := mirrortest.New(s.t)
	s.edit("countersign.toml", "[backup]\n", fmt.Sprintf("[backup]\nsftp = %q\nsftp_key_file = %q\n"+
		"sftp_host_keys = [%q]\n", server.URL(), server.KeyFile, server.HostKey))
	return server
}

// same returns how the files of the server differ from those of the folder, or "".
func (s *system) same(server *mirrortest.Server) string {
	s.t.Helper()
	content := func(folder string) (names []string, all map[string][]byte) {
		all = map[string][]byte{}
		for _, path := range must(filepath.Glob(filepath.Join(folder, "*")))(s.t) {
			b, err := os.ReadFile(path)
			if err != nil { // renamed meanwhile
				continue
			}
			names, all[filepath.Base(path)] = append(names, filepath.Base(path)), b
		}
		return names, all
	}
	here, local := content(s.path("backups"))
	there, remote := content(server.Folder)
	if !slices.Equal(here, there) {
		return fmt.Sprintf("the folder has %v, and the server %v", here, there)
	}
	for name, b := range local {
		if !bytes.Equal(b, remote[name]) {
			return fmt.Sprintf("%s has %d bytes, and %d at the server", name, len(b), len(remote[name]))
		}
	}
	return ""
}

// TestSFTP has a confined daemon carry its backups and lists to OpenSSH's server. The machine is
// lost with the folder, and an appliance that is restored from the server's files alone knows what
// was signed last. A daemon that stops in order leaves the server with all.
func TestSFTP(t *testing.T) {
	s := newSystem(t)
	s.backedUp()
	s.edit("countersign.toml", "lists = false", "lists = true")
	server := s.mirrored()
	p := s.serve()
	s.enrol()
	s.newBackup()
	c := s.dial()
	last := message("AAAA").Fill(time.Hour)
	signed := must(c.Sign(t.Context(), "payments", last))(t)
	s.shipped()
	eventually(t, "the server has the folder", func() bool { return s.same(server) == "" })
	eventually(t, "the tool says so", func() bool {
		lines := strings.Split(strings.TrimSpace(s.must("admin", "backup", "list")), "\n")
		return len(lines) > 1 && strings.HasSuffix(lines[0], "SFTP") &&
			!slices.ContainsFunc(lines[1:], func(line string) bool { return !strings.HasSuffix(line, "yes") })
	})
	if n := s.metrics()["countersign_backup_mirror_behind_seconds"]; n < 0 || n > 180 {
		t.Errorf("the server has lacked something for %v s", n)
	}
	if out, exit := s.drilled(); exit != 0 { // of an appliance that may carry nothing
		t.Errorf("drill: %d\n%s", exit, out)
	}
	must(c.Sign(t.Context(), "payments", message("BBBB")))(t)
	p.stop()
	if differ := s.same(server); differ != "" {
		t.Errorf("after the end: %s", differ)
	}
	files := must(filepath.Glob(filepath.Join(server.Folder, "*.backup")))(t)
	newest, old := files[len(files)-1], map[string][]byte{}
	for _, path := range files {
		old[path] = must(os.ReadFile(path))(t)
	}
	if err := os.RemoveAll(s.path("backups")); err != nil {
		t.Fatal(err)
	}
	// As docs/OPERATIONS.md says, apart from the port and the key.
	host, port, _ := net.SplitHostPort(server.Address)
	s.write("known_hosts", fmt.Sprintf("[%s]:%s %s\n", host, port, server.HostKey))
	fetch := exec.Command("sftp", "-r", "-P", port, "-i", server.KeyFile,
		"-o", "UserKnownHostsFile="+s.path("known_hosts"),
		server.User+"@"+host+":"+server.Folder+"/.", s.path("backups"))
	mkdir(t, s.path("backups"))
	if out, err := fetch.CombinedOutput(); err != nil {
		t.Fatalf("sftp: %v\n%s", err, out)
	}
	if differ := s.same(server); differ != "" {
		t.Fatalf("what was fetched: %s", differ)
	}
	newest = s.path("backups/" + filepath.Base(newest))
	verify, code := s.daemon("backup", "verify", newest, "--identity", s.path("recovery.key"))
	if code != 0 || !strings.Contains(verify, "of writes (") ||
		!strings.Contains(verify, "(SSH key for the SFTP server)") {
		t.Errorf("backup verify: %d\n%s", code, verify)
	}
	other := s.elsewhere()
	restored := other.restore(newest, "--map", s.dir+"="+other.dir)
	if err := os.MkdirAll(other.path("backups"), 0o700); err != nil {
		t.Fatal(err)
	}
	p = other.serve()
	remembering := other.dial()
	again, err := remembering.Sign(t.Context(), "payments", last)
	if err != nil || !again.Repeated || string(again.Signature) != string(signed.Signature) {
		t.Errorf("what the lists at the server know: %+v, %v\n%s", again, err, restored)
	}
	// Both appliances have one id, and may have made a backup in one second: no file is lost.
	eventually(t, "the restored appliance's backup is at the server, beside the old ones", func() bool {
		mine := must(filepath.Glob(other.path("backups/*.backup")))(t)
		for _, path := range mine {
			there, err := os.ReadFile(filepath.Join(server.Folder, filepath.Base(path)))
			if err != nil || !bytes.Equal(there, must(os.ReadFile(path))(t)) {
				return false
			}
		}
		return len(mine) > 0
	})
	for path, before := range old {
		now, beside := must(os.ReadFile(path))(t), []byte(nil)
		if b, err := os.ReadFile(path + ".other"); err == nil {
			beside = b
		}
		if !bytes.Equal(now, before) && !bytes.Equal(beside, before) {
			t.Errorf("the server has lost %s", path)
		}
	}
	p.stop()
}
