package appliance

import (
	"log/slog"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/cause"
	"countersign/internal/mirror"
	"countersign/internal/mirror/mirrortest"
)

// TestMirror: a backup is at the SFTP server by itself. A server that is away is a cause, a metric
// and an event, each of which ends when the server is back. A server that comes and goes has one
// event of it within an hour.
func TestMirror(t *testing.T) {
	r := newRig(t)
	r.backedUp(t)
	server := mirrortest.New(t)
	to, err := mirror.Parse(server.URL(), server.KeyFile, []string{server.HostKey})
	if err != nil {
		t.Fatal(err)
	}
	r.backups.Mirror = mirror.New(r.backups.Folder, to, slog.New(slog.DiscardHandler))
	t.Cleanup(r.backups.Mirror.Close)
	before := mirrorLate
	mirrorLate = 100 * time.Millisecond
	t.Cleanup(func() { mirrorLate = before })
	mirrored := func() string {
		all, err := r.Backups()
		if err != nil || len(all) == 0 {
			t.Fatal(all, err)
		}
		return all[0].Mirrored
	}
	late := func() (text string) {
		for _, c := range r.backupCauses() {
			if c.Kind == cause.Mirror {
				text = c.Text
			}
		}
		return text
	}
	events := func() (away, back int) {
		for _, e := range r.events(t) {
			switch e {
			case audit.DeviceUnavailable:
				away++
			case audit.DeviceRecovered:
				back++
			}
		}
		return away, back
	}
	r.monitor.Start(t.Context(), r.record, nil)
	server.Away(true)
	if _, err := r.Backup(t.Context(), operator); err != nil {
		t.Fatal(err)
	}
	r.mirrorBackups()
	eventually(t, "the state says that the server lacks something, and why", func() bool {
		text := late()
		return strings.Contains(text, server.URL()+" lacks the last ") && !strings.Contains(text, "does not answer")
	})
	if got := mirrored(); got != mirror.Unknown {
		t.Errorf("before the first connection, the backup is at the server: %s", got)
	}
	_, body, err := r.meter.Expose("")
	behind := regexp.MustCompile(`(?m)^countersign_backup_mirror_behind_seconds .*[1-9]`)
	if err != nil || !behind.Match(body) {
		t.Errorf("no metric, %v", err)
	}
	failed := r.noteMirror(t.Context(), time.Time{})
	r.noteMirror(t.Context(), failed)
	if away, back := events(); away != 1 || back != 0 {
		t.Errorf("%d events of the failure, %d of its end", away, back)
	}
	server.Away(false)
	eventually(t, "the server has the backup", func() bool { return mirrored() == mirror.Yes && late() == "" })
	if again := r.noteMirror(t.Context(), failed); again != failed {
		t.Error("the end counts as a failure")
	}
	if away, back := events(); away != 1 || back != 1 {
		t.Errorf("%d events of the failure, %d of its end", away, back)
	}
	server.Away(true)
	made, err := r.Backup(t.Context(), operator)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the state says it again", func() bool { return late() != "" && mirrored() == mirror.No })
	r.noteMirror(t.Context(), failed)
	if away, _ := events(); away != 1 {
		t.Errorf("%d events of failures within an hour", away)
	}
	r.noteMirror(t.Context(), failed.Add(-2*mirrorEvents))
	if away, _ := events(); away != 2 {
		t.Errorf("%d events of failures, an hour later", away)
	}
	server.Away(false)
	eventually(t, "the server has it", func() bool { return mirrored() == mirror.Yes })
	all, err := r.Backups()
	if err != nil || !slices.ContainsFunc(all, func(b BackupInfo) bool { return b.Name == made.Name }) {
		t.Error(all, err)
	}
}
