package ledger_test

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"countersign/internal/backup"
	"countersign/internal/durable"
	"countersign/internal/ledger"

	"filippo.io/age"
	bolt "go.etcd.io/bbolt"
)

// Every benchmark prints lines NAME PARAMETERS ratio X, with the two rates of the ratio. The
// figures are medians of short rounds. The two sides take turns, because other programs may use the
// machine.
const (
	callers  = 64
	rounds   = 41
	measured = 150 * time.Millisecond
)

// eventBytes has the typical length of the event of an admission.
var eventBytes = []byte(strings.Repeat("e", 480))

// rate returns the number of calls per second that all callers complete together.
func rate(b *testing.B, call func() error) float64 {
	var done atomic.Int64
	var over atomic.Bool
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for !over.Load() {
				if err := call(); err != nil {
					b.Error(err)
					return
				}
				done.Add(1)
			}
		})
	}
	time.Sleep(measured / 5)
	before, begin := done.Load(), time.Now()
	time.Sleep(measured)
	n, took := done.Load()-before, time.Since(begin)
	over.Store(true)
	wg.Wait()
	return float64(n) / took.Seconds()
}

// compare measures both sides in turns and prints the ratio.
func compare(b *testing.B, name string, side, floor func() error) {
	var ratios, sides, floors []float64
	for range rounds {
		f, s := rate(b, floor), rate(b, side)
		ratios, sides, floors = append(ratios, s/f), append(sides, s), append(floors, f)
	}
	fmt.Fprintf(os.Stdout, "%s ratio %.2f (%.0f/s, floor %.0f/s)\n",
		name, median(ratios), median(sides), median(floors))
}

func median(of []float64) float64 {
	slices.Sort(of)
	return of[len(of)/2]
}

// admitting returns a function that spends a random nonce.
func admitting(ctx context.Context, l *ledger.Ledger, expiresAt func() int64) func() error {
	return func() error {
		a := ledger.Admission{Scope: ledger.KeyScope("payments"), KeyVersion: 1, ExpiresAt: expiresAt()}
		rand.Read(a.Nonce[:])
		r, err := l.Admit(ctx, a, func(ledger.Verdict) []byte { return eventBytes })
		if err == nil && r.Verdict != ledger.Fresh {
			err = fmt.Errorf("verdict %d", r.Verdict)
		}
		return err
	}
}

func inAnHour() int64 { return time.Now().Unix() + 3600 }

// bare returns a function that writes with bbolt and a group commit, without a ledger. The written
// bytes are the same: the event, the record of the nonce, and two hashes of the tree, each at the
// end of a bucket.
func bare(b *testing.B, dir string) func() error {
	db, err := bolt.Open(filepath.Join(dir, "bare.db"), 0o600, &bolt.Options{FreelistType: bolt.FreelistMapType})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { db.Close() })
	names := [][]byte{[]byte("events"), []byte("nonces"), []byte("hashes")}
	if err := db.Update(func(tx *bolt.Tx) error {
		for _, name := range names {
			if _, err := tx.CreateBucket(name); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		b.Fatal(err)
	}
	requests := make(chan chan error, 4*callers)
	b.Cleanup(func() { close(requests) })
	values := [][]byte{eventBytes, make([]byte, 65), make([]byte, 64)}
	go func() {
		var n uint64
		for first := range requests {
			batch := []chan error{first}
		gather:
			for {
				select {
				case r := <-requests:
					batch = append(batch, r)
				default:
					break gather
				}
			}
			err := db.Update(func(tx *bolt.Tx) error {
				for range batch {
					n++
					for i, name := range names {
						bucket := tx.Bucket(name)
						bucket.FillPercent = 0.95
						if err := bucket.Put(binary.BigEndian.AppendUint64(nil, n), values[i]); err != nil {
							return err
						}
					}
				}
				return nil
			})
			for _, r := range batch {
				r <- err
			}
		}
	}()
	return func() error {
		done := make(chan error, 1)
		requests <- done
		return <-done
	}
}

func benchLedger(b *testing.B, o ledger.Options) (*ledger.Ledger, string) {
	b.Helper()
	path := filepath.Join(b.TempDir(), "ledger.db")
	if err := ledger.Create(path, o); err != nil {
		b.Fatal(err)
	}
	l, err := ledger.Open(path, o) // without a replica: a benchmark
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	return l, path
}

// BenchmarkAdmit compares durable admissions with a bare group commit of the same bytes.
func BenchmarkAdmit(b *testing.B) {
	l, path := benchLedger(b, ledger.Options{})
	side, floor := admitting(b.Context(), l, inAnHour), bare(b, filepath.Dir(path))
	compare(b, fmt.Sprintf("admit callers=%d", callers), side, floor)
}

// BenchmarkWindows compares admissions with six series and a decision record, as a payment has,
// with plain admissions.
func BenchmarkWindows(b *testing.B) {
	plain, _ := benchLedger(b, ledger.Options{})
	counted, _ := benchLedger(b, ledger.Options{})
	amount, _ := new(big.Int).SetString("10000000000000000000000000000000", 10) // 1,000 with 28 decimal places
	record := []byte(strings.Repeat("r", 900))
	one := big.NewInt(1)
	side := func() error {
		a := ledger.Admission{Scope: ledger.KeyScope("payments"), KeyVersion: 1, ExpiresAt: inAnHour()}
		rand.Read(a.Nonce[:])
		var counts []ledger.Count
		for i, subject := range []string{"peer", "key", fmt.Sprint("counterparty ", a.Nonce[0])} {
			counts = append(counts,
				ledger.Count{Series: subject, Add: one},
				ledger.Count{Series: fmt.Sprint(i, " amount ", subject), Add: amount})
		}
		a.Counts = countIn(counts...)
		a.Decide = func([]ledger.Used) ([]byte, error) { return record, nil }
		_, err := counted.Admit(b.Context(), a, func(ledger.Verdict) []byte { return eventBytes })
		return err
	}
	compare(b, fmt.Sprintf("admit+windows callers=%d", callers), side, admitting(b.Context(), plain, inAnHour))
}

// BenchmarkManyNonces compares a ledger of five million nonces with an empty one. The benchmark
// also prints the time of the start and the memory for each nonce.
func BenchmarkManyNonces(b *testing.B) {
	const n = 5_000_000
	empty, _ := benchLedger(b, ledger.Options{})
	full, path := benchLedger(b, ledger.Options{})
	for hour := range int64(25) { // distributed as after a day
		if err := full.Fill(b.Context(), n/25, time.Now().Unix()-hour*3600+3600); err != nil {
			b.Fatal(err)
		}
	}
	full.Close()
	before := heap()
	begin := time.Now()
	full, err := ledger.Open(path, ledger.Options{}) // without a replica: a benchmark
	if err != nil {
		b.Fatal(err)
	}
	took := time.Since(begin)
	b.Cleanup(func() { full.Close() })
	if s, err := full.Stats(); err != nil || s.Nonces != n {
		b.Fatal(s, err)
	}
	fmt.Fprintf(os.Stdout, "start nonces=%d %.2f s, %.0f bytes of memory a nonce\n",
		n, took.Seconds(), float64(heap()-before)/n)
	side, floor := admitting(b.Context(), full, inAnHour), admitting(b.Context(), empty, inAnHour)
	compare(b, fmt.Sprintf("admit callers=%d nonces=%d", callers, n), side, floor)
}

// heap returns the size of the heap in use, in bytes.
func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse)
}

// BenchmarkExpiry compares the latencies of admissions with and without an expiry of a million
// nonces.
func BenchmarkExpiry(b *testing.B) {
	const n = 1_000_000
	var ahead atomic.Int64
	o := ledger.Options{
		Wall:    func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) },
		Elapsed: func() time.Duration { return time.Duration(time.Now().UnixNano() + ahead.Load()) },
	}
	l, _ := benchLedger(b, o)
	admit := admitting(b.Context(), l, func() int64 { return o.Wall().Unix() + 3600 })
	var ratios, with, without []float64
	for range 7 {
		if err := l.Fill(b.Context(), n, o.Wall().Unix()); err != nil {
			b.Fatal(err)
		}
		calm := p99(b, 0, admit)
		ahead.Add(int64(26 * time.Hour)) // all nonces of Fill expire
		busy := p99(b, 0, admit)
		ratios, with, without = append(ratios, busy/calm), append(with, busy), append(without, calm)
	}
	fmt.Fprintf(os.Stdout, "expiry nonces=%d p99 ratio %.2f (%.2f ms, without %.2f ms)\n",
		n, median(ratios), median(with), median(without))
}

// p99 returns the 99th percentile of the latencies in one second, in milliseconds.
func p99(b *testing.B, pause time.Duration, call func() error) float64 {
	var mu sync.Mutex
	var took []float64
	var wg sync.WaitGroup
	end := time.Now().Add(time.Second)
	for range callers {
		wg.Go(func() {
			var mine []float64
			for time.Now().Before(end) {
				time.Sleep(pause)
				begin := time.Now()
				if err := call(); err != nil {
					b.Error(err)
					return
				}
				mine = append(mine, float64(time.Since(begin).Microseconds())/1000)
			}
			mu.Lock()
			took = append(took, mine...)
			mu.Unlock()
		})
	}
	wg.Wait()
	slices.Sort(took)
	return took[len(took)*99/100]
}

// BenchmarkCopy compares the latencies of admissions with and without copies of the ledger's file,
// one after the other, written at the pace of a backup to a file of the same disk. The rate of a
// copy without a pace is compared with that of a plain copy of the file.
func BenchmarkCopy(b *testing.B) {
	const n = 2_000_000
	l, path := benchLedger(b, ledger.Options{})
	if err := l.Fill(b.Context(), n, time.Now().Unix()+3600); err != nil {
		b.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil {
		b.Fatal(err)
	}
	admit := admitting(b.Context(), l, inAnHour)
	copied := func(write func(w io.Writer) error) time.Duration {
		f, err := os.Create(path + ".copy")
		if err != nil {
			b.Fatal(err)
		}
		begin := time.Now()
		if err := errors.Join(write(f), f.Sync(), f.Close()); err != nil {
			b.Fatal(err)
		}
		return time.Since(begin)
	}
	plain := func(w io.Writer) error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(w, f)
		return err
	}
	var ratios, with, without, rates []float64
	for range 7 {
		calm := p99(b, 0, admit)
		stop, done := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			for {
				select {
				case <-stop:
					return
				default:
					copied(func(w io.Writer) error { return l.Snapshot(&durable.Paced{File: w.(*os.File)}) })
				}
			}
		}()
		busy := p99(b, 0, admit)
		close(stop)
		<-done
		ratios, with, without = append(ratios, busy/calm), append(with, busy), append(without, calm)
		rates = append(rates, float64(copied(plain))/float64(copied(l.Snapshot)))
	}
	fmt.Fprintf(os.Stdout, "copy bytes=%d p99 ratio %.2f (%.2f ms, without %.2f ms); rate %.2f of a plain copy\n",
		info.Size(), median(ratios), median(with), median(without), median(rates))
}

// BenchmarkShip compares admissions whose lists of writes are shipped to a folder of the same disk
// with admissions whose lists are not. The rate is far beyond a token's: lists that the folder does
// not take in time are dropped, so the line says how many bytes were shipped.
func BenchmarkShip(b *testing.B) {
	folder := filepath.Join(b.TempDir(), "backups")
	if err := os.Mkdir(folder, 0o700); err != nil {
		b.Fatal(err)
	}
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		b.Fatal(err)
	}
	ship, err := backup.NewShipper(folder, []backup.Recipient{identity.Recipient()}, slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	ship.Begin("0123456789abcdef")
	defer ship.Close()
	ship.Expect()
	var bytes atomic.Int64
	shipped, _ := benchLedger(b, ledger.Options{Replicate: func(list []byte) {
		if list != nil {
			bytes.Add(int64(len(list)))
			ship.Take(ledger.NumberOf(list), list)
		}
	}})
	alone, _ := benchLedger(b, ledger.Options{})
	with, without := admitting(b.Context(), shipped, inAnHour), admitting(b.Context(), alone, inAnHour)
	compare(b, fmt.Sprintf("ship callers=%d", callers), with, without)
	for _, pause := range []time.Duration{0, 30 * time.Millisecond} {
		var tails, slow, fast []float64
		for range 7 {
			calm, busy := p99(b, pause, without), p99(b, pause, with)
			tails, slow, fast = append(tails, busy/calm), append(slow, busy), append(fast, calm)
		}
		fmt.Fprintf(os.Stdout, "ship pause=%v p99 ratio %.2f (%.2f ms, without %.2f ms)\n",
			pause, median(tails), median(slow), median(fast))
	}
	var size int64
	files, err := filepath.Glob(filepath.Join(folder, "*"))
	for _, f := range files {
		info, err := os.Stat(f)
		if err != nil {
			b.Fatal(err)
		}
		size += info.Size()
	}
	if err != nil || size == 0 {
		b.Fatalf("nothing was shipped (%v)", err)
	}
	fmt.Fprintf(os.Stdout, "ship %d bytes of lists an admission, %d MiB of %d MiB shipped\n",
		bytes.Load()/int64(shipped.Admitted()), size>>20, bytes.Load()>>20)
}
