package history

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"countersign/internal/ledger/disktest"
	"countersign/internal/meter"
	"countersign/internal/spectest"
)

func TestMain(m *testing.M) {
	disktest.Serve()
	os.Exit(m.Run())
}

// tiny is a layout whose file can be tried exhaustively.
var tiny = newLayout([]Ring{{10, 12}, {60, 10}, {900, 4}}, []column{{"rate", Mean}, {"most", Max}})

var silent = slog.New(slog.DiscardHandler)

func tempFile(t testing.TB) string { return filepath.Join(t.TempDir(), "history") }

func step(begin int64, values ...float32) point {
	return point{begin: begin, measured: 10, values: values}
}

// all returns every step of every ring of a history that the file has.
func all(t testing.TB, h *History) map[string]point {
	t.Helper()
	found := map[string]point{}
	b := make([]byte, h.layout.slotSize())
	for ring, r := range h.layout.rings {
		for slot := range r.Slots {
			if _, err := h.f.ReadAt(b, h.layout.offset(ring, slot)); err != nil && err != io.EOF {
				t.Fatal(err)
			}
			if p, ok := h.layout.decode(ring, slot, b); ok {
				found[fmt.Sprintf("%d/%d", r.Step, p.begin)] = p
			}
		}
	}
	return found
}

// TestDamageCostsOneSlot changes each byte of a full file. No change costs more than one step, and
// none changes a value.
func TestDamageCostsOneSlot(t *testing.T) {
	path := tempFile(t)
	h := open(path, tiny, silent)
	for i := range int64(400) { // several laps of the finest ring
		h.write(step(1_000_000_000+10*i, float32(i), float32(i*i)))
	}
	before := all(t, h)
	h.Close()
	if want := 12 + 10 + 4; len(before) != want {
		t.Fatalf("%d steps, want %d", len(before), want)
	}
	whole, err := os.ReadFile(path)
	if err != nil || int64(len(whole)) != tiny.size() {
		t.Fatalf("%d bytes, want %d: %v", len(whole), tiny.size(), err)
	}
	damaged := bytes.Clone(whole)
	for i := range whole {
		if headerSize > i && i > len(magic)+200 && i < headerSize-4 && i%97 != 0 {
			continue // of the zeros in the header, some stand for all
		}
		damaged[i] ^= byte(1 + i%255)
		if err := os.WriteFile(path, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		damaged[i] = whole[i]
		h := open(path, tiny, silent)
		if err := h.Failing(); err != nil {
			t.Fatalf("byte %d: %v", i, err)
		}
		after := all(t, h)
		h.Close()
		lost := len(before) - len(after)
		if i < headerSize && lost != 0 || lost > 1 {
			t.Errorf("byte %d: %d steps are lost", i, lost)
		}
		for at, p := range after {
			if !reflect.DeepEqual(p, before[at]) {
				t.Errorf("byte %d: %s is %v, was %v", i, at, p, before[at])
			}
		}
	}
	for _, size := range []int{0, 1, headerSize - 1, headerSize, headerSize + 30, len(whole) - 1} { // cut
		if err := os.WriteFile(path, whole[:size], 0o600); err != nil {
			t.Fatal(err)
		}
		h := open(path, tiny, silent)
		for at, p := range all(t, h) {
			if !reflect.DeepEqual(p, before[at]) {
				t.Errorf("cut to %d bytes: %s is %v", size, at, p)
			}
		}
		h.write(step(2_000_000_000, 1, 2))
		if h.Failing() != nil || len(all(t, h)) < 3 {
			t.Errorf("cut to %d bytes: %v, %v", size, h.Failing(), all(t, h))
		}
		h.Close()
	}
}

// FuzzForeignFile opens any file. No content stops the history, and a file that is none keeps its
// bytes under another name.
func FuzzForeignFile(f *testing.F) {
	f.Add([]byte("somebody's notes"))
	f.Add(tiny.header())
	f.Add(newLayout([]Ring{{60, 3}, {7, 1}}, []column{{"most", Max}, {"rate", Max}}).header())
	f.Add(bytes.Repeat([]byte{0}, 2*headerSize))
	f.Fuzz(func(t *testing.T, content []byte) {
		path := tempFile(t)
		if err := os.WriteFile(path, content, 0o644); err != nil {
			t.Fatal(err)
		}
		h := open(path, tiny, silent)
		defer h.Close()
		h.write(step(1_000_000_000, 1, 2))
		p, ok := all(t, h)["10/1000000000"]
		if err := h.Failing(); err != nil || !ok || !slices.Equal(p.values, []float32{1, 2}) {
			t.Fatalf("%v, %v", err, p)
		}
		st, err := os.Stat(path)
		if err != nil || st.Mode().Perm() != 0o600 || st.Size() != tiny.size() {
			t.Errorf("%v, %v", st, err)
		}
		if len(content) > 0 && len(bytes.Trim(content[:min(len(content), headerSize)], "\x00")) > 0 &&
			!bytes.HasPrefix(content, []byte(magic)) {
			names, _ := filepath.Glob(path + ".aside-*")
			if len(names) != 1 {
				t.Fatalf("renamed: %q", names)
			}
			if kept, err := os.ReadFile(names[0]); err != nil || !bytes.Equal(kept, content) {
				t.Errorf("%v, %d bytes of %d are left", err, len(kept), len(content))
			}
		}
	})
}

// TestPaths puts each kind of thing at the path. Anything but a file of the daemon's own is left
// alone, and the history begins by itself when the path is free.
func TestPaths(t *testing.T) {
	for name, make := range map[string]func(t *testing.T, path string) error{
		"symbolic link": func(t *testing.T, path string) error {
			to := filepath.Join(filepath.Dir(path), "target")
			if err := os.WriteFile(to, []byte("precious"), 0o600); err != nil {
				return err
			}
			return os.Symlink(to, path)
		},
		"link to nothing": func(_ *testing.T, path string) error { return os.Symlink(path+".target", path) },
		"folder":          func(_ *testing.T, path string) error { return os.Mkdir(path, 0o700) },
		"pipe":            func(_ *testing.T, path string) error { return syscall.Mkfifo(path, 0o600) },
		"hard link": func(_ *testing.T, path string) error {
			to := filepath.Join(filepath.Dir(path), "target")
			if err := os.WriteFile(to, []byte("precious"), 0o600); err != nil {
				return err
			}
			return os.Link(to, path)
		},
		"file in use": func(t *testing.T, path string) error {
			f, err := os.Create(path)
			if err != nil {
				return err
			}
			t.Cleanup(func() { f.Close() })
			if _, err := f.WriteString("precious"); err != nil {
				return err
			}
			return syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := tempFile(t)
			if err := make(t, path); err != nil {
				t.Fatal(err)
			}
			var lines bytes.Buffer
			h := open(path, tiny, slog.New(slog.NewTextHandler(&lines, nil)))
			defer h.Close()
			for i := range int64(20) {
				h.write(step(10*i, 1, 2))
			}
			if h.Failing() == nil || strings.Count(lines.String(), "\n") != 1 {
				t.Errorf("%v, in the log:\n%s", h.Failing(), &lines)
			}
			target := filepath.Join(filepath.Dir(path), "target")
			if b, err := os.ReadFile(target); err == nil && string(b) != "precious" {
				t.Errorf("the target has %q", b)
			}
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			h.write(step(200, 1, 2))
			if st, err := os.Lstat(path); h.Failing() != nil || err != nil || !st.Mode().IsRegular() {
				t.Errorf("afterwards: %v, %v, %v", h.Failing(), st, err)
			}
		})
	}
	t.Run("removed under way", func(t *testing.T) {
		path := tempFile(t)
		h := open(path, tiny, silent)
		defer h.Close()
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		h.write(step(200, 1, 2))
		if _, err := os.Lstat(path); err != nil {
			t.Error(err)
		}
	})
}

// measured returns the metrics of a history.
func measured(t *testing.T, h *History) string {
	m := meter.New("test")
	m.Source(h.Measure)
	_, body, err := m.Expose("")
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// TestFullDisk has the disk refuse each kind of write, from the making of the file on. The history
// goes on when the disk does, with one line of the log for each failure, and makes no further file.
func TestFullDisk(t *testing.T) {
	for _, errno := range []syscall.Errno{syscall.ENOSPC, syscall.EIO} {
		for allowed := range 8 {
			disk := disktest.New(t)
			path := filepath.Join(disk.Dir(), "history")
			left := allowed
			disk.Fail(func(op disktest.Op) syscall.Errno {
				if left--; op.Kind != disktest.Write || left >= 0 {
					return 0
				}
				return errno
			})
			h := open(path, tiny, silent)
			for i := range int64(5) {
				h.write(step(1000+10*i, 1, 2))
			}
			if h.Failing() == nil || !strings.Contains(measured(t, h), "countersign_history_failing 1\n") {
				t.Errorf("%v after %d operations: nothing failed", errno, allowed)
			}
			disk.Fail(nil)
			h.write(step(1050, 3, 4))
			p := all(t, h)["10/1050"]
			if err := h.Failing(); err != nil || !slices.Equal(p.values, []float32{3, 4}) ||
				!strings.Contains(measured(t, h), "countersign_history_failing 0\n") {
				t.Errorf("%v after %d operations: %v, %v", errno, allowed, err, p)
			}
			h.Close()
			if names, err := os.ReadDir(disk.Dir()); err != nil || len(names) != 1 {
				t.Errorf("%v after %d operations: %v, %v", errno, allowed, names, err)
			}
			disk.Unmount()
		}
	}
}

// TestClockJumps writes at times that go forward, back and far away. The file has for a step what
// was last measured in the step, or nothing.
func TestClockJumps(t *testing.T) {
	path := tempFile(t)
	rng := rand.New(rand.NewPCG(1, 2))
	h := open(path, tiny, silent)
	defer func() { h.Close() }()
	last := map[int64]point{}
	now := int64(1_000_000_000)
	for i := range 3000 {
		switch rng.IntN(20) {
		case 0:
			now -= 10 * rng.Int64N(200)
		case 1:
			now += 10 * rng.Int64N(2000)
		case 2:
			now = 10 * rng.Int64N(400_000_000)
		case 3:
			h.Close()
			h = open(path, tiny, silent)
		}
		now += 10
		p := step(now, float32(i), float32(i))
		p.measured = uint32(1 + rng.IntN(10))
		last[now] = p
		h.write(p)
		got := all(t, h)
		if !reflect.DeepEqual(got[fmt.Sprintf("10/%d", now)], p) {
			t.Fatalf("step %d is %v, want %v", now, got[fmt.Sprintf("10/%d", now)], p)
		}
		for at, p := range got {
			if strings.HasPrefix(at, "10/") && !reflect.DeepEqual(p, last[p.begin]) {
				t.Fatalf("step %s is %v, last measured was %v", at, p, last[p.begin])
			}
		}
		// The step of a minute has nothing that was measured after the newest step.
		minute := now / 60 * 60
		sum, most := uint32(0), float32(0)
		for at := minute; at <= now; at += 10 {
			if p, ok := got[fmt.Sprintf("10/%d", at)]; ok {
				sum, most = sum+p.measured, max(most, p.values[1])
			}
		}
		if p := got[fmt.Sprintf("60/%d", minute)]; p.measured != sum || p.values[1] != most {
			t.Fatalf("the minute %d is %v, want %d seconds and %v", minute, p, sum, most)
		}
	}
}

// TestFold folds steps with unknown values, and steps that were measured in part.
func TestFold(t *testing.T) {
	nan := float32(math.NaN())
	l := newLayout(tiny.rings, []column{{"mean", Mean}, {"max", Max}, {"min", Min}, {"last", Last}, {"none", Max}})
	p := l.fold(60, []point{
		{60, 10, []float32{1, 1, 1, 1, nan}}, {70, 10, []float32{nan, nan, nan, nan, nan}},
		{80, 5, []float32{4, -4, -4, 7, nan}}, {100, 10, []float32{nan, 3, 2, nan, nan}},
	})
	if p.measured != 35 || !slices.Equal(p.values[:4], []float32{2, 3, -4, 7}) || p.values[4] == p.values[4] {
		t.Errorf("%+v", p)
	}
	if p := l.fold(60, nil); p.measured != 0 || p.values[0] == p.values[0] {
		t.Errorf("of nothing: %+v", p)
	}
}

// TestOtherVersion opens a file of a version with other series and rings. The common series stay.
func TestOtherVersion(t *testing.T) {
	path := tempFile(t)
	older := newLayout([]Ring{{10, 30}, {60, 5}, {7200, 2}},
		[]column{{"gone", Max}, {"most", Max}, {"rate", Last}})
	h := open(path, older, silent)
	for i := range int64(30) {
		h.write(step(6000+10*i, 1, float32(i), 2))
	}
	h.Close()
	h = open(path, tiny, silent)
	defer h.Close()
	got := all(t, h)
	for i := range int64(12) { // the finest ring is shorter now
		p := got[fmt.Sprintf("10/%d", 6000+10*(18+i))]
		if len(p.values) != 2 || p.values[0] == p.values[0] || p.values[1] != float32(18+i) || p.measured != 10 {
			t.Errorf("step %d is %+v", 18+i, p)
		}
	}
	if p := got["60/6240"]; p.measured != 60 || p.values[1] != 29 || len(got) != 12+5 {
		t.Errorf("%d steps, %+v", len(got), p)
	}
	if names, _ := os.ReadDir(filepath.Dir(path)); len(names) != 1 {
		t.Errorf("%v", names)
	}
}

// TestLaps writes more than a lap of the finest ring: the file keeps its size, and has the newest
// steps.
func TestLaps(t *testing.T) {
	path := tempFile(t)
	h := open(path, present(), silent)
	defer h.Close()
	const began = int64(1_700_000_400)
	values := make([]float32, len(All))
	n := Rings[0].Slots + 500
	for i := range n {
		values[0] = float32(i)
		h.write(step(began+10*i, values...))
	}
	if st, err := os.Stat(path); err != nil || st.Size() != h.layout.size() {
		t.Errorf("%v, %v", st, err)
	}
	now := time.Unix(began+10*n, 0)
	a, err := h.Read(now, Query{Series: []string{All[0].Name}, Since: 0, Until: now.Unix(), Step: 10})
	if err != nil || a.Since != now.Unix()-7200 || a.Until != now.Unix() || len(a.Measured) != 720 {
		t.Fatalf("%d to %d, %d steps, %v", a.Since, a.Until, len(a.Measured), err)
	}
	for i, v := range a.Series[0].Values {
		if v != float32(500+i) || a.Measured[i] != 10 {
			t.Errorf("step %d is %v, measured %d", i, v, a.Measured[i])
		}
	}
	// Nothing is told of the time before the first step and behind the newest.
	a, err = h.Read(now, Query{Since: began - 6000, Until: now.Unix() + 1e6, Step: 60})
	if err != nil || a.Measured[0] != 0 || a.Series[0].Values[0] == a.Series[0].Values[0] ||
		a.Until > now.Unix()+60 || len(a.Series) == 0 {
		t.Errorf("%+v, %v", a, err)
	}
}

// TestQuery asks for what is not there, and for one value too many.
func TestQuery(t *testing.T) {
	h := open(tempFile(t), present(), silent)
	defer h.Close()
	now := time.Unix(1_800_000_000, 0)
	var names []string
	for _, s := range All {
		names = append(names, s.Name)
	}
	most := MaxValues / int64(len(names)) // steps
	for _, q := range []Query{
		{Since: -1, Until: 5}, {Since: 10, Until: 5}, {Until: 5, Step: 30}, {Until: 5, Series: []string{"nothing"}},
		{Series: names, Since: now.Unix() - 900*(most+1), Until: now.Unix(), Step: 900},
	} {
		if _, err := h.Read(now, q); err == nil || !strings.HasPrefix(err.Error(), ErrInvalid.Error()) {
			t.Errorf("%+.50v: %v", q, err)
		}
	}
	for _, q := range []Query{
		{}, {Since: math.MaxInt64, Until: math.MaxInt64}, {Until: math.MaxInt64},
		{Series: names, Since: now.Unix() - 900*most, Until: now.Unix(), Step: 900},
	} {
		if _, err := h.Read(now, q); err != nil {
			t.Errorf("%+.50v: %v", q, err)
		}
	}
	for _, c := range []struct{ age, step int64 }{{7209, 10}, {7210, 60}, {172859, 60}, {172860, 900}, {1e8, 900}} {
		a, err := h.Read(now, Query{Since: now.Unix() - c.age, Until: now.Unix()})
		if err != nil || a.Step != c.step {
			t.Errorf("%d s ago: steps of %d s, %v, want %d", c.age, a.Step, err, c.step)
		}
	}
	for _, at := range []time.Time{time.Unix(-5000, 0), {}, time.Unix(1<<40, 0)} { // a clock that is far off
		if _, err := h.Read(at, Query{Since: 0, Until: 100}); err != nil {
			t.Errorf("at %v: %v", at, err)
		}
	}
}

// TestRun has a meter count for half an hour, with two restarts, and reads the steps.
func TestRun(t *testing.T) {
	path := tempFile(t)
	synctest.Test(t, func(t *testing.T) {
		m := meter.New("test")
		var peers atomic.Int64
		m.Source(func(s *meter.Sample) { s.Set(meter.Peers, float64(peers.Load()), "enrolled") })
		began := time.Now()
		for _, runs := range []time.Duration{10 * time.Minute, 7*time.Minute + 3*time.Second, 13 * time.Minute} {
			h := Open(path, silent)
			ctx, cancel := context.WithTimeout(t.Context(), runs)
			done := make(chan struct{})
			go func() { h.Run(ctx, m); close(done) }()
			for ctx.Err() == nil {
				time.Sleep(time.Second)
				peers.Add(1)
				for range 5 {
					m.Add(meter.Requests, "sign", "ok")
					m.Observe(meter.RequestSeconds, .003, "sign")
				}
				m.Add(meter.Replays, "verify")
			}
			<-done
			cancel()
			h.Close()
		}
		h := Open(path, silent)
		defer h.Close()
		now := time.Now()
		for _, step := range []int64{10, 60, 900} {
			a, err := h.Read(now, Query{
				Series: []string{"signatures", "sign_p99", "peers", "replays", "denied", "verify_p99"},
				Since:  began.Unix(), Until: now.Unix(), Step: step,
			})
			if err != nil {
				t.Fatal(err)
			}
			value := map[string][]float32{}
			for _, s := range a.Series {
				value[s.Name] = s.Values
			}
			measured, gaps := int64(0), 0
			for i, n := range a.Measured {
				measured += n
				if n == 0 {
					gaps++
					continue
				}
				// A restart in between counts the acts of a second for the wrong side.
				for name, want := range map[string]float32{"signatures": 5, "replays": 1, "denied": 0} {
					if got := value[name][i]; math.Abs(float64(got-want)) > .2*float64(want) {
						t.Errorf("steps of %d s: %s is %v in step %d, want %v", step, name, got, i, want)
					}
				}
				if p := value["sign_p99"][i]; p < .0025 || p > .005 {
					t.Errorf("steps of %d s: sign_p99 is %v in step %d", step, p, i)
				}
				if v := value["verify_p99"][i]; v == v {
					t.Errorf("steps of %d s: verify_p99 is %v without a verification", step, v)
				}
			}
			if step == 10 && (gaps > 3 || measured < 1780) || step > 10 && measured < 1780 {
				t.Errorf("steps of %d s: %d gaps, %d s measured", step, gaps, measured)
			}
			if got := slices.Max(value["peers"][:len(value["peers"])-1]); step < 900 && got < 1700 {
				t.Errorf("steps of %d s: %v peers", step, got)
			}
		}
	})
}

// TestStartBeforeTheEndOfAStep counts acts in the moment between a start and the end of a step.
func TestStartBeforeTheEndOfAStep(t *testing.T) {
	for _, before := range []time.Duration{time.Millisecond, 500 * time.Millisecond, time.Second} {
		synctest.Test(t, func(t *testing.T) {
			time.Sleep(10*time.Second - before)
			m := meter.New("test")
			h := Open(tempFile(t), silent)
			defer h.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
			defer cancel()
			done := make(chan struct{})
			go func() { h.Run(ctx, m); close(done) }()
			synctest.Wait()
			m.Add(meter.Requests, "sign", "ok")
			<-done
			a, err := h.Read(time.Now(), Query{Series: []string{"signatures"}, Since: time.Now().Unix() - 60,
				Until: time.Now().Unix(), Step: 10})
			if err != nil {
				t.Fatal(err)
			}
			signed := 0.0
			for i, v := range a.Series[0].Values {
				if v == v {
					signed += float64(v) * float64(a.Measured[i])
				}
			}
			if math.Abs(signed-1) > .1 {
				t.Errorf("started %v before the end of a step: %v signatures, want 1", before, signed)
			}
		})
	}
}

// TestRatesNeedTwoReadings: a first reading, a reading after a long time and a counter that begins
// anew give no rate.
func TestRatesNeedTwoReadings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := meter.New("test")
		calls := 100.0
		m.Source(func(s *meter.Sample) { s.Set(meter.WorkerCalls, calls, "main", "1") })
		at := slices.IndexFunc(All, func(s *Series) bool { return s.Name == "worker_calls" })
		var d Deriver
		for i, c := range []struct {
			after time.Duration
			calls float64
			want  float32 // negative: unknown
		}{
			{0, 100, -1}, {10 * time.Second, 200, 10}, {time.Minute, 260, 1}, {time.Minute + 1, 300, -1},
			{10 * time.Second, 400, 10}, {10 * time.Second, 5, -1}, {10 * time.Second, 15, 1},
		} {
			time.Sleep(c.after)
			calls = c.calls
			r, err := m.Read(0)
			if err != nil {
				t.Fatal(err)
			}
			values, _ := d.Next(r)
			if v := values[at]; c.want < 0 && v == v || c.want >= 0 && math.Abs(float64(v-c.want)) > .001 {
				t.Errorf("reading %d: %v, want %v", i, v, c.want)
			}
		}
	})
}

// TestSeries writes the table of the series into docs/OPERATIONS.md, and checks that each series is
// read in one way, from a family that exists.
func TestSeries(t *testing.T) {
	rows := ""
	names := map[string]bool{}
	for _, s := range All {
		ways := 0
		for _, is := range []bool{s.counter != nil, s.gauge != nil, s.timing != nil} {
			if is {
				ways++
			}
		}
		if ways != 1 || names[s.Name] || s.Name == "" || s.Help == "" || !strings.HasSuffix(s.Help, ".") {
			t.Errorf("%+v", s)
		}
		names[s.Name] = true
		kind := "state"
		switch {
		case s.counter != nil:
			kind = "rate"
		case s.timing != nil:
			kind = fmt.Sprintf("p%.0f", 100*s.q)
		}
		rows += fmt.Sprintf("| `%s` | %s | %s | %s | %s |\n", s.Name, kind, s.Unit, s.Fold,
			strings.TrimSuffix(s.Help, "."))
	}
	if n := len(All); n < 45 || n > 70 {
		t.Errorf("%d series", n)
	}
	spectest.Table(t, "../../docs/OPERATIONS.md",
		"| series | kind | unit | longer steps | meaning |\n| --- | --- | --- | --- | --- |\n", rows)
	if got := slices.Sorted(maps.Keys(names)); len(got) != len(All) {
		t.Errorf("%v", got)
	}
}

// BenchmarkStep measures what a step costs: the collection, the derivation and the writes.
func BenchmarkStep(b *testing.B) {
	m := meter.New("bench")
	h := Open(tempFile(b), silent)
	defer h.Close()
	var d Deriver
	begin := int64(1_800_000_000)
	for b.Loop() {
		r, err := m.Read(0)
		if err != nil {
			b.Fatal(err)
		}
		values, _ := d.Next(r)
		begin += 10
		h.write(step(begin, values...))
	}
	b.ReportMetric(float64(h.layout.size()), "file-bytes")
}
