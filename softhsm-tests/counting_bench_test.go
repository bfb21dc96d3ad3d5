package softhsmtests

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"countersign/client"
)

// The rounds of BenchmarkCounting. A round has countedSigns signatures of each daemon.
const (
	countedRounds = 401
	countedSigns  = 48
	countedAtOnce = 8
)

// BenchmarkCounting compares the processor time of a signature with that in a build without
// metrics: the user's and the system's time of the daemon and its key workers. Both daemons run at
// the same time, and are asked in turn for a tenth of a second each, the one or the other first.
// The benchmark prints the median of the ratios, with the quartiles.
//
// The build without metrics has no meter. The compiler gets another file in the place of main.go,
// so what is shipped has no switch for this.
func BenchmarkCounting(b *testing.B) {
	const with, without = "meter.New(cli.Version())", "(*meter.Meter)(nil)"
	source := must(os.ReadFile("../cmd/countersignd/main.go"))(b)
	changed := strings.Replace(string(source), with, without, 1) + "\n\nvar _ = meter.New\n"
	if strings.Count(string(source), with) != 1 {
		b.Fatalf("main.go does not have %q once", with)
	}
	dir := b.TempDir()
	file, overlay := filepath.Join(dir, "main.go"), filepath.Join(dir, "overlay.json")
	path := must(filepath.Abs("../cmd/countersignd/main.go"))(b)
	replace := must(json.Marshal(map[string]map[string]string{"Replace": {path: file}}))(b)
	for name, content := range map[string][]byte{file: []byte(changed), overlay: replace} {
		if err := os.WriteFile(name, content, 0o600); err != nil {
			b.Fatal(err)
		}
	}
	build := exec.Command("go", "build", "-overlay", overlay, "-o", filepath.Join(dir, "countersignd"),
		"../cmd/countersignd")
	build.Env = append(os.Environ(), "CGO_ENABLED=1", "GOEXPERIMENT=runtimesecret")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("build: %v\n%s", err, out)
	}
	sides := []func() float64{processorTime(b, bin), processorTime(b, dir)}
	var ratios, times []float64
	for round := range countedRounds {
		var took [2]float64
		for i := range sides {
			side := (i + round) % 2
			took[side] = sides[side]()
		}
		ratios, times = append(ratios, took[0]/took[1]), append(times, took[0])
	}
	slices.Sort(ratios)
	slices.Sort(times)
	at := func(of []float64, quarters int) float64 { return of[quarters*(len(of)-1)/4] }
	fmt.Printf("counting sign softhsm %d ratio %.3f (quartiles %.3f and %.3f of %d rounds; %.0f us a signature)\n",
		countedAtOnce, at(ratios, 2), at(ratios, 1), at(ratios, 3), countedRounds, at(times, 2))
}

// processorTime starts a daemon of a folder of commands. The returned function has countedSigns
// documents signed, and returns the processor time of one in microseconds.
func processorTime(b *testing.B, folder string) func() float64 {
	s := newSystem(b)
	s.edit("countersign.toml", `"debug"`, `"info"`)
	p := s.start(exec.Command(filepath.Join(folder, "countersignd"), "serve", "--config", s.path("countersign.toml")))
	s.enrolRoot()
	s.enrol()
	c := s.dial()
	var workers []int
	eventually(b, "two workers", func() bool { workers = p.workers(); return len(workers) == 2 })
	processes := append(workers, p.cmd.Process.Pid)
	sign := func() float64 {
		before := processorOf(b, processes)
		var all sync.WaitGroup
		for range countedAtOnce {
			all.Go(func() {
				for range countedSigns / countedAtOnce {
					if _, err := c.Sign(context.Background(), "payments", client.Document{
						Type: "message-v1", Payload: message("AAAA").Payload,
					}); err != nil {
						b.Error(err)
					}
				}
			})
		}
		all.Wait()
		return (processorOf(b, processes) - before) / countedSigns
	}
	sign() // sessions open, key handles are found
	return sign
}

// processorOf returns the processor time of all threads of processes, in microseconds.
func processorOf(b *testing.B, processes []int) (sum float64) {
	b.Helper()
	for _, pid := range processes {
		threads := must(filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid)))(b)
		if len(threads) == 0 {
			b.Fatalf("process %d has no threads: it has ended", pid)
		}
		for _, name := range threads {
			text, err := os.ReadFile(name)
			if err != nil {
				continue // the thread has ended
			}
			ns, _, _ := strings.Cut(string(text), " ")
			sum += float64(must(strconv.ParseInt(ns, 10, 64))(b)) / 1000
		}
	}
	return sum
}
