package ledger

import (
	"errors"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
)

// reserveSize is the size of the reserve: 8 MiB hold some ten thousand events. reserveEvery is the
// interval between attempts to acquire the reserve again. Tests set smaller values.
var (
	reserveSize  int64 = 8 << 20
	reserveEvery       = 200 * time.Millisecond
)

// reserve is a file that reserves disk space. When the disk is full, the ledger releases the
// reserve: outcomes of admissions and events can still be written. The file has no content and
// needs no fsync, because Open acquires the reserve anew.
type reserve struct {
	path  string
	held  bool
	tried time.Time
}

// acquire creates the file and allocates its space. While that fails, the ledger refuses
// admissions.
func (r *reserve) acquire() error {
	f, err := os.OpenFile(r.path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	err = syscall.Fallocate(int(f.Fd()), 0, 0, reserveSize)
	if errors.Is(err, syscall.EOPNOTSUPP) {
		err = nil // the file system has no preallocation
	}
	if err != nil {
		f.Truncate(0)
		return err
	}
	r.held = true
	return nil
}

// retry calls acquire, at most once in reserveEvery.
func (r *reserve) retry() error {
	if since := time.Since(r.tried); since < reserveEvery {
		return syscall.ENOSPC
	}
	r.tried = time.Now()
	return r.acquire()
}

// release frees the space, and reports whether space was freed.
func (r *reserve) release() bool {
	if !r.held {
		return false
	}
	r.held, r.tried = false, time.Now()
	return os.Truncate(r.path, 0) == nil
}

// isDiskFull reports whether an error means a full disk or an exhausted quota. bbolt does not wrap
// the error of a failed growth of its file, so the text is searched, too.
func isDiskFull(err error) bool {
	return err != nil && slices.ContainsFunc([]error{syscall.ENOSPC, syscall.EDQUOT}, func(full error) bool {
		return errors.Is(err, full) || strings.Contains(err.Error(), full.Error())
	})
}
