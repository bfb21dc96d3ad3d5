package worker

import (
	"bufio"
	"fmt"
	"os"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"
)

// GuardOutput puts a scrubber between the module and the daemon. Whatever this process writes to
// its standard output and error from now on goes through scrub, line by line, and to the former
// standard error. Only a key worker knows the PIN, so only a key worker can find the PIN in a line.
// scrub is called for each line, with the beginning of a line of more than maxLine bytes.
//
// The returned function ends this, and waits a short time for the last lines. A process that is
// killed, or ended by the module, can lose lines that were not read yet. A report of a crash by
// Go's runtime does not go through scrub, and is not lost.
func GuardOutput(scrub func(line string) string) (end func(), err error) {
	former, err := unix.FcntlInt(2, unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("key worker: stderr: %w", err)
	}
	to := os.NewFile(uintptr(former), "stderr")
	if err := debug.SetCrashOutput(to, debug.CrashOptions{}); err != nil {
		return nil, fmt.Errorf("key worker: stderr: %w", err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("key worker: stderr: %w", err)
	}
	point := func(fd int) error { // both outputs at a file
		for _, output := range []int{1, 2} {
			if err := unix.Dup3(fd, output, 0); err != nil {
				return err
			}
		}
		return nil
	}
	if err := point(int(w.Fd())); err != nil {
		return nil, fmt.Errorf("key worker: stderr: %w", err)
	}
	w.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		copyLines(to, r, scrub)
	}()
	return func() {
		point(former)
		select { // a child of the module may hold the pipe open
		case <-done:
		case <-time.After(exitTimeout):
		}
	}, nil
}

// copyLines copies lines, each in one write, until the end of from. Of a long line, maxLine bytes
// are copied, less the last cut bytes, which may begin a secret.
func copyLines(to *os.File, from *os.File, scrub func(line string) string) {
	const cut = 512
	in := bufio.NewReaderSize(from, maxLine)
	for long := false; ; {
		part, more, err := in.ReadLine()
		if err != nil {
			return
		}
		begins := !long
		long = more
		if !begins {
			continue
		}
		line := scrub(string(part))
		if more {
			line = line[:max(0, len(line)-cut)]
		}
		to.WriteString(line + "\n")
	}
}
