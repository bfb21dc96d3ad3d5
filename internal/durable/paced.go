package durable

import (
	"os"
	"time"
)

// paceBytes is the number of bytes after which a Paced file is synced.
const paceBytes = 1 << 20

// Paced writes a large file beside a process whose own fsyncs must not wait for it. Each MiB the
// file is synced, and the writer pauses for as long as that has taken: the disk never has more than
// one MiB of the file to write first, and has half of its time for others.
type Paced struct {
	File  *os.File
	since int // bytes since the last sync
}

func (p *Paced) Write(b []byte) (n int, err error) {
	for len(b) > 0 && err == nil {
		some := b[:min(len(b), paceBytes-p.since)]
		var wrote int
		wrote, err = p.File.Write(some)
		n, b = n+wrote, b[wrote:]
		if p.since += wrote; p.since == paceBytes && err == nil {
			begin := time.Now()
			err = p.File.Sync()
			time.Sleep(time.Since(begin))
			p.since = 0
		}
	}
	return n, err
}
