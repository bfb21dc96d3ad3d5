package softhsmtests

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"countersign/internal/ledger/disktest"
	"countersign/internal/scantest"
	"countersign/wire"
)

// newSystemOnDisk sets up a system whose ledger is on a disk that can inject I/O errors.
func newSystemOnDisk(t *testing.T) (*system, *disktest.Disk) {
	s := newSystem(t)
	disk := disktest.New(t)
	s.edit("countersign.toml", `"ledger.db"`, `"`+filepath.Join(disk.Dir(), "ledger.db")+`"`)
	if out, code := s.daemon("init"); code != 1 || !strings.Contains(out, "belong to another appliance") {
		t.Fatalf("a new ledger with a token that has keys: %d, %s", code, out)
	}
	s.write("softhsm2.conf", "directories.tokendir = "+s.path("tokens2")+"\nlog.level = ERROR\n")
	mkdir(t, s.path("tokens2"))
	if out, code := s.daemon("init", "--new-token", "--so-pin-file", s.path("so-pin")); code != 0 {
		t.Fatalf("init: %d, %s", code, out)
	}
	return s, disk
}

// metaPagesEnd is the offset behind the two meta pages of a bbolt file. A commit ends with a write
// to one of them. These pages are allocated, so a full disk does not refuse them. An error there
// leaves the commit in doubt, which only TestUnknownState wants: the outcome of an earlier request
// may be in its last step when a test begins to inject errors.
const metaPagesEnd = 2 * 4096

// fullDisk is a disk without free space. Writes of the ledger succeed only after the ledger has
// released its reserve file, and the reserve can't be allocated again.
type fullDisk struct {
	enabled  atomic.Bool
	released atomic.Bool // the reserve file is truncated to 0 bytes
}

func (f *fullDisk) fail(op disktest.Op) syscall.Errno {
	reserve := strings.HasSuffix(op.Path, ".reserve")
	switch {
	case reserve && op.Kind == disktest.Truncate && op.Size == 0:
		f.released.Store(true)
	case !f.enabled.Load():
		if reserve && op.Kind == disktest.Allocate {
			f.released.Store(false)
		}
	case reserve && op.Kind == disktest.Allocate,
		!reserve && op.Kind == disktest.Write && op.Offset >= metaPagesEnd && !f.released.Load():
		return syscall.ENOSPC
	}
	return 0
}

// hasEvent reports that the audit log has an event of a type about a resource.
func (s *system) hasEvent(event, resource string) bool {
	for _, e := range s.events() {
		if string(e.Type) == event && e.Resource == resource {
			return true
		}
	}
	return false
}

// TestFullDisk fills the disk. Meanwhile sign requests are unavailable and leave nothing in the
// ledger. The event about the full disk is written into the space of the reserve file. When the
// disk has space again, the daemon serves the same requests without a restart.
func TestFullDisk(t *testing.T) {
	s, disk := newSystemOnDisk(t)
	var f fullDisk
	disk.Fail(f.fail)
	p := s.serve()
	s.enrol()
	c := s.dial()
	before, err := c.Sign(t.Context(), "payments", message("AAAA").Fill(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	f.enabled.Store(true)
	refused := message("BBBB").Fill(time.Hour)
	for range 3 {
		if _, err := c.Sign(t.Context(), "payments", refused); code(err) != wire.CodeUnavailable {
			t.Fatalf("with a full disk: %v", err)
		}
	}
	if again, err := c.Sign(t.Context(), "payments", before.Document); err != nil || !again.Repeated {
		t.Errorf("a repetition, which needs no disk space: %v", err)
	}
	eventually(t, "an event DeviceUnavailable", func() bool { return s.hasEvent("DeviceUnavailable", "ledger") })
	if out := s.must("admin", "ledger", "stats"); !strings.Contains(out, "no space left") {
		t.Errorf("stats: %s", out)
	}
	f.enabled.Store(false)
	eventually(t, "requests are served again", func() bool {
		signed, err := c.Sign(t.Context(), "payments", refused)
		return err == nil && !signed.Repeated
	})
	eventually(t, "an event DeviceRecovered", func() bool { return s.hasEvent("DeviceRecovered", "ledger") })
	p.stop()
	if out, code := s.daemon("check", "--deep"); code != 0 {
		t.Errorf("check: %d, %s", code, out)
	}
}

// TestDiskRefuses has the disk refuse writes with EROFS and EIO. Requests are unavailable
// meanwhile, and the daemon serves again when the disk accepts writes.
func TestDiskRefuses(t *testing.T) {
	s, disk := newSystemOnDisk(t)
	p := s.serve()
	s.enrol()
	c := s.dial()
	for _, errno := range []syscall.Errno{syscall.EROFS, syscall.EIO} {
		disk.Fail(func(op disktest.Op) syscall.Errno {
			if op.Kind == disktest.Write && op.Offset >= metaPagesEnd { // a commit at its last step succeeds
				return errno
			}
			return 0
		})
		d := message("AAAA").Fill(time.Hour)
		for range 3 {
			if _, err := c.Sign(t.Context(), "payments", d); code(err) != wire.CodeUnavailable {
				t.Fatalf("%v: %v", errno, err)
			}
		}
		disk.Fail(nil)
		if signed, err := c.Sign(t.Context(), "payments", d); err != nil || signed.Repeated {
			t.Errorf("after %v: %v", errno, err)
		}
	}
	p.stop()
}

// TestUnknownState lets the fsync of a meta page fail, so that a commit may or may not be on disk.
// The daemon then answers nothing more, tells its receivers of alerts, and ends. The next start
// reads the state from the disk, and writes and sends the alert that the ledger could not take.
func TestUnknownState(t *testing.T) {
	s, disk := newSystemOnDisk(t)
	receiver := newAlertReceiver(t)
	s.write("countersign.toml", string(must(os.ReadFile(s.path("countersign.toml")))(t))+
		"[[webhooks]]\nname = \"ops\"\nurl = \""+receiver.URL+"\"\ntypes = [\"alert\"]\n")
	p := s.serve()
	s.enrol()
	c := s.dial()
	signed, err := c.Sign(t.Context(), "payments", message("AAAA"))
	if err != nil {
		t.Fatal(err)
	}
	var meta atomic.Bool
	disk.Fail(func(op disktest.Op) syscall.Errno {
		if op.Kind == disktest.Write && op.Offset < metaPagesEnd { // a write to a meta page commits a transaction
			meta.Store(true)
		}
		if meta.Load() && op.Kind == disktest.Datasync {
			return syscall.EIO
		}
		return 0
	})
	d := message("BBBB").Fill(time.Hour)
	if _, err := c.Sign(t.Context(), "payments", d); err == nil || code(err) != "" {
		t.Errorf("an answer was given: %v", err)
	}
	select {
	case err := <-p.ended:
		p.ended <- err
		if err == nil || !strings.Contains(p.stderr.String(), "look at the disk, then start again") {
			t.Errorf("%v\n%s", err, tail(p.stderr.String(), 1000))
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the daemon goes on")
	}
	told := receiver.of("daemon-ended")
	if len(told) != 1 || !strings.Contains(told[0].text, "state on disk is unknown") {
		t.Errorf("the receiver was told %+v", told)
	}
	disk.Fail(nil)
	p = s.serve()
	eventually(t, "the alert of the next start", func() bool { return len(receiver.of("daemon-ended")) > 1 })
	if again := receiver.of("daemon-ended"); len(told) == 1 && again[1].id != told[0].id {
		t.Errorf("another id: %+v", again)
	}
	if !s.hasEvent("AlertFiring", "alert/daemon-ended") {
		t.Error("there is no event of the alert")
	}
	c = s.dial()
	if again, err := c.Sign(t.Context(), "payments", signed.Document); err != nil || !again.Repeated {
		t.Errorf("the request that was answered: %v", err)
	}
	if _, err := c.Sign(t.Context(), "payments", d); err != nil {
		t.Errorf("the request that was not answered: %v", err)
	}
	p.stop()
}

// alertReceiver is a receiver of webhooks about alerts.
type alertReceiver struct {
	*httptest.Server
	mu  sync.Mutex
	got []alertMessage
}

type alertMessage struct{ id, kind, code, text string }

func newAlertReceiver(t *testing.T) *alertReceiver {
	r := new(alertReceiver)
	r.Server = httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, q *http.Request) {
		b, err := io.ReadAll(q.Body)
		var m struct {
			Type string
			Data struct{ Code, Text string }
		}
		if err != nil || json.Unmarshal(b, &m) != nil {
			t.Errorf("a message that can't be read: %v, %s", err, b)
		}
		scantest.Saw("a webhook", string(b))
		r.mu.Lock()
		defer r.mu.Unlock()
		r.got = append(r.got, alertMessage{q.Header.Get("Webhook-Id"), m.Type, m.Data.Code, m.Data.Text})
	}))
	t.Cleanup(r.Close)
	return r
}

// of returns the messages about an alert, in their order.
func (r *alertReceiver) of(code string) (all []alertMessage) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range r.got {
		if m.code == code {
			all = append(all, m)
		}
	}
	return all
}

func mkdir(t testing.TB, path string) {
	t.Helper()
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
}
