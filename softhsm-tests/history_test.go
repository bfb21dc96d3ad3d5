package softhsmtests

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"countersign/admin/api"
)

// tool begins a command of the first administrator, whose stdout goes to a file. The result ends
// the command, and returns stdout and stderr.
func (s *system) tool(args ...string) (stdout string, end func() (out, errOut string)) {
	s.t.Helper()
	stdout = s.path("stdout")
	out := must(os.Create(stdout))(s.t)
	defer out.Close()
	var errOut strings.Builder
	cmd := exec.Command(filepath.Join(bin, "countersign"), args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, out, &errOut
	cmd.Env = append(os.Environ(), "COUNTERSIGN_SOCKET="+s.path("admin.sock"), "SSH_AUTH_SOCK="+s.root.socket,
		"COUNTERSIGN_OPERATOR="+s.root.name, "XDG_RUNTIME_DIR="+s.path(s.root.name+".run"),
		"XDG_CONFIG_HOME="+s.path(s.root.name+".config"))
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	ended := false
	end = func() (string, string) {
		if !ended {
			ended = true
			cmd.Process.Signal(os.Interrupt)
			cmd.Wait()
		}
		b := must(os.ReadFile(stdout))(s.t)
		s.checkOutput("countersign "+strings.Join(args, " "), string(b)+errOut.String())
		return string(b), errOut.String()
	}
	s.t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return stdout, end
}

// TestStreamAcrossKills has the tool follow the stream of a daemon that is killed and stopped while
// keys are made. The tool signs in again and goes on: each event comes once.
func TestStreamAcrossKills(t *testing.T) {
	s := newSystem(t)
	p := s.serve()
	s.enrol()
	stdout, end := s.tool("admin", "stream", "--json", "--topics", "state,rotation,tick")
	has := func(text string) func() bool {
		return func() bool { return strings.Contains(string(must(os.ReadFile(stdout))(t)), text) }
	}
	eventually(t, "the state", has(`"topic":"state"`))
	eventually(t, "a tick", has(`"topic":"tick"`))
	begun := s.events()
	next := begun[len(begun)-1].Index + 1
	for round, stop := range []func(){p.kill, func() { p.stop() }, func() { p.kill() }} {
		s.must("admin", "key", "create", fmt.Sprintf("a%d", round))
		if round > 0 { // the first kill may come before the tool has the event
			eventually(t, "the key", has(fmt.Sprintf("a%d/1", round)))
		}
		stop()
		p = s.serve()
		s.must("admin", "key", "create", fmt.Sprintf("b%d", round))
		eventually(t, "the key after the restart", has(fmt.Sprintf("b%d/1", round)))
	}
	out, errOut := end()
	var got, want []uint64
	for line := range strings.Lines(out) {
		var e api.Streamed
		var event api.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if e.Topic == api.TopicGap {
			t.Errorf("a gap: %s", e.Data)
		}
		if e.Topic != api.TopicRotation {
			continue
		}
		if err := json.Unmarshal(e.Data, &event); err != nil || fmt.Sprint(event.Index) != e.ID {
			t.Errorf("%s: %v", line, err)
		}
		got = append(got, event.Index)
	}
	for _, e := range s.events() {
		if e.Index >= next && strings.HasPrefix(string(e.Type), "Key") {
			want = append(want, e.Index)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("events %v, want %v\n%s", got, want, errOut)
	}
	p.stop()
}

// TestHistoryFile has a daemon write its history. The history survives a kill; a daemon starts and
// signs with a history that is damaged, foreign, a link, or off.
func TestHistoryFile(t *testing.T) {
	s := newSystem(t)
	path := s.path("ledger.db.history")
	p := s.serve()
	s.enrol()
	sign := func() {
		t.Helper()
		c := s.dial()
		defer c.Close()
		must(c.Sign(t.Context(), "payments", message("aaaa")))(t)
	}
	seen := func() (measured int64, signed float64) {
		h := must(s.admin().History(t.Context(), api.HistoryQuery{Series: []string{"signatures"}, Step: 10}))(t)
		for i, v := range h.Series[0].Values {
			measured += h.Measured[i]
			if v != nil {
				signed += float64(*v) * float64(h.Measured[i])
			}
		}
		return measured, signed
	}
	sign()
	eventually(t, "a step with the signature", func() bool { _, n := seen(); return n > .5 && n < 1.5 })
	st := must(os.Lstat(path))(t)
	if st.Mode() != 0o600 || st.Size() > 4<<20 {
		t.Errorf("%v, %d bytes", st.Mode(), st.Size())
	}
	p.kill()
	p = s.serve()
	if n, signed := seen(); n == 0 || signed < .5 {
		t.Errorf("after a kill, %d s were measured, with %v signatures", n, signed)
	}
	for _, has := range []string{"SERIES", "signatures", "tokens_up", "█"} {
		if out := s.must("admin", "history"); !strings.Contains(out, has) {
			t.Errorf("admin history has no %s:\n%s", has, out)
		}
	}
	out := s.must("admin", "history", "signatures", "sign_p99", "--csv")
	if lines := strings.Split(strings.TrimSpace(out), "\n"); lines[0] != "time,measured,signatures,sign_p99" ||
		len(lines) < 720 {
		t.Errorf("%.300s", out)
	}
	var h api.History
	out = s.must("admin", "history", "--json", "--step", "1m")
	if err := json.Unmarshal([]byte(out), &h); err != nil || h.Step != 60 {
		t.Errorf("%v, %+v", err, h)
	}
	_, errOut, code := s.cli("", "admin", "history", "nothing")
	if code != 1 || !strings.Contains(errOut, "invalid") || !strings.Contains(errOut, "signatures") {
		t.Errorf("%d %s", code, errOut)
	}
	p.stop()

	for name, make := range map[string]func() error{
		"noise": func() error { return os.WriteFile(path, []byte(strings.Repeat("noise", 1<<16)), 0o644) },
		"link": func() error {
			s.write("target", "precious")
			return os.Symlink(s.path("target"), path)
		},
		"folder": func() error { return os.Mkdir(path, 0o700) },
	} {
		if err := errors.Join(os.RemoveAll(path), make()); err != nil {
			t.Fatal(err)
		}
		p := s.serve()
		sign()
		seen()
		p.stop()
		if b, err := os.ReadFile(s.path("target")); err == nil && string(b) != "precious" {
			t.Errorf("%s: the target has %q", name, b)
		}
	}
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	s.edit("countersign.toml", "admin_socket", "history = \"none\"\nadmin_socket")
	p = s.serve()
	sign()
	_, errOut, code = s.cli("", "admin", "history")
	if code != 1 || !strings.Contains(errOut, "not_found") {
		t.Errorf("without a history: %d %s", code, errOut)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("there is a history: %v", err)
	}
	p.stop()
}
