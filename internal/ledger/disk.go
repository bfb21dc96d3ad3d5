package ledger

import (
	"errors"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
)

// reserveSize is room for some ten thousand events, reserveEvery how often it is tried to have it again. Tests have less.
var (
	reserveSize  int64 = 8 << 20
	reserveEvery       = 200 * time.Millisecond
)

// reserve is a file that takes room on the disk, to be given up when there is no other: then what was admitted can
// still be settled, and the log can say what happened. It has no content and needs no fsync: whether it is there is seen
// at the start.
type reserve struct {
	path  string
	taken bool
	tried time.Time
}

// take makes the file, unless it is there. While there is no room for it, nothing is admitted.
func (r *reserve) take() error {
	f, err := os.OpenFile(r.path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	err = syscall.Fallocate(int(f.Fd()), 0, 0, reserveSize)
	if errors.Is(err, syscall.EOPNOTSUPP) {
		err = nil // a file system that can't promise room
	}
	if err != nil {
		f.Truncate(0)
		return err
	}
	r.taken = true
	return nil
}

// takeAgain tries, but not all the time.
func (r *reserve) takeAgain() error {
	if since := time.Since(r.tried); since < reserveEvery {
		return syscall.ENOSPC
	}
	r.tried = time.Now()
	return r.take()
}

// give gives the room up, and says whether there was some.
func (r *reserve) give() bool {
	if !r.taken {
		return false
	}
	r.taken, r.tried = false, time.Now()
	return os.Truncate(r.path, 0) == nil
}

// noRoom says that more room would help. bbolt does not wrap what it gets when it makes its file grow.
func noRoom(err error) bool {
	return err != nil && slices.ContainsFunc([]error{syscall.ENOSPC, syscall.EDQUOT}, func(full error) bool {
		return errors.Is(err, full) || strings.Contains(err.Error(), full.Error())
	})
}
