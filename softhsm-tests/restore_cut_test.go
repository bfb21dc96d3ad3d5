package softhsmtests

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"countersign/internal/durable"
	"countersign/internal/ledger/disktest"
)

// TestPowerCutDuringRestore cuts the power after each disk operation of a restore, onto an empty
// disk and over another ledger. The place of the ledger has the ledger of before or the restored
// one, whole. The ledger of before is not lost. A ledger that the command has called restored is.
func TestPowerCutDuringRestore(t *testing.T) {
	s := newSystem(t)
	s.backedUp()
	state := s.path("state")
	mkdir(t, state)
	if err := os.Rename(s.path("ledger.db"), filepath.Join(state, "ledger.db")); err != nil {
		t.Fatal(err)
	}
	s.edit("countersign.toml", `"ledger.db"`, `"`+filepath.Join(state, "ledger.db")+`"`)
	p := s.serve()
	s.enrol()
	backup := s.newBackup()
	must(s.dial().Sign(t.Context(), "payments", message("AAAA")))(t)
	p.stop()
	lost := must(os.ReadFile(filepath.Join(state, "ledger.db")))(t)
	for name, there := range map[string][]byte{"onto an empty disk": nil, "over another ledger": lost} {
		disk := disktest.New(t)
		place := filepath.Join(disk.Dir(), "ledger.db")
		begun := 0
		if there != nil {
			f := must(os.Create(place))(t)
			_, err := f.Write(there)
			if err := errors.Join(err, f.Sync(), f.Close(), durable.Sync(disk.Dir())); err != nil {
				t.Fatal(err)
			}
			begun = disk.Mark()
		}
		other := s.elsewhere()
		other.restore(backup, "--map", s.dir+"="+other.dir, "--map", state+"="+disk.Dir())
		done := disk.Mark()
		restored := must(os.ReadFile(place))(t)
		disk.Unmount()
		var mu sync.Mutex
		seen := map[string]int{}
		judge := func(dir string, at int) error {
			now, err := os.ReadFile(filepath.Join(dir, "ledger.db"))
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			kind := "before"
			if string(now) == string(restored) {
				kind = "restored"
			}
			mu.Lock()
			seen[kind]++
			mu.Unlock()
			if kind == "before" {
				switch {
				case at < begun: // the test has not written the ledger of before yet
				case string(now) != string(there):
					return fmt.Errorf("the ledger has %d bytes of neither", len(now))
				case at >= done:
					return errors.New("the ledger is not restored, and the command has said so")
				}
				return nil
			}
			kept, err := filepath.Glob(filepath.Join(dir, "ledger.db.replaced-*"))
			if err != nil || len(kept) == 0 && there != nil {
				return fmt.Errorf("the ledger of before is lost: %v", err)
			}
			for _, path := range kept {
				if b, err := os.ReadFile(path); err != nil || string(b) != string(there) {
					return fmt.Errorf("%s is not the ledger of before: %v", path, err)
				}
			}
			return nil
		}
		result := disktest.Explore(t, disk.Record(), disktest.Options{Total: 3000}, judge)
		t.Logf("%s: %d cuts, %d disks: %v", name, result.Cuts, result.States, seen)
		if seen["before"] == 0 || seen["restored"] == 0 {
			t.Errorf("%s: all disks were of one kind: %v", name, seen)
		}
	}
}
