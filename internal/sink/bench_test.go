package sink

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"countersign/audit"
	"countersign/internal/ledger"
	"countersign/internal/ledger/ledgertest"
)

// BenchmarkSink measures what an event costs each kind of receiver: processor time of this process,
// which for syslog is also the server's, and bytes on the disk or the network.
func BenchmarkSink(b *testing.B) {
	const events = 20_000
	for _, kind := range []string{"none", "file", "syslog"} {
		b.Run(kind, func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "ledger")
			if err := ledger.Create(path, ledger.Options{}); err != nil {
				b.Fatal(err)
			}
			l, err := ledgertest.Open(b, path, ledger.Options{})
			if err != nil {
				b.Fatal(err)
			}
			defer l.Close()
			actor := audit.Peer("shop", [32]byte{})
			for range events / 1000 {
				if err := l.Update(b.Context(), func(tx *ledger.Tx) error {
					for range 1000 {
						e := audit.NewOutcome(actor, "payments/1", "paykit-subscription-v2", 7, "")
						if err := tx.Append(ledger.NewEvent(e.Encode(time.Now()))); err != nil {
							return err
						}
					}
					return nil
				}); err != nil {
					b.Fatal(err)
				}
			}
			var to Receiver = &away{back: true}
			switch kind {
			case "file":
				to = &File{Path: filepath.Join(b.TempDir(), "events.jsonl"), Size: 100 << 20, Files: 3}
			case "syslog":
				certificate, ca := authority(b)
				config := &tls.Config{Certificates: []tls.Certificate{certificate}}
				server, err := tls.Listen("tcp", "127.0.0.1:0", config)
				if err != nil {
					b.Fatal(err)
				}
				defer server.Close()
				go func() {
					for {
						conn, err := server.Accept()
						if err != nil {
							return
						}
						r := bufio.NewReader(conn)
						for {
							if _, err := readFrame(r); err != nil {
								break
							}
						}
					}
				}()
				to = &Syslog{Address: server.Addr().String(), CAFile: ca}
			}
			var before, after syscall.Rusage
			syscall.Getrusage(syscall.RUSAGE_SELF, &before)
			for b.Loop() {
				c := config(b)
				s := New(c, l, to)
				for more := true; more; {
					if more, err = s.step(b.Context()); err != nil {
						b.Fatal(err)
					}
				}
				if f, is := to.(*File); is { // the next round writes anew
					f.Close()
					f.Path = filepath.Join(b.TempDir(), fmt.Sprint(b.N, time.Now().UnixNano()))
				}
			}
			syscall.Getrusage(syscall.RUSAGE_SELF, &after)
			cpu := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
			b.ReportMetric(float64(cpu.Nanoseconds())/float64(b.N)/events, "cpu-ns/event")
			b.ReportMetric(0, "ns/op")
		})
	}
}
