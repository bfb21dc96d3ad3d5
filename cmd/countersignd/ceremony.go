package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"countersign/internal/cause"
	"countersign/internal/cli"
	"countersign/internal/escrow"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// ceremony has the options of a ceremony with recovery holders: in a drill, and to return keys.
type ceremony struct {
	request string // the file to write
	answers string // the folder of the holders' answers
	wait    string // a duration

	most time.Duration // wait
	file *os.File      // request, opened before the sandbox
}

// answerSuffix ends the names of answers.
const answerSuffix = ".answer"

// lookForAnswers is the time between two looks at the folder.
const lookForAnswers = time.Second

// errNoHolders ends a ceremony without enough shares. Such an end says nothing of a backup.
var errNoHolders = errors.New("too few holders have answered")

func (c *ceremony) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&c.request, "request", "", "the `file` to write for the holders")
	f.StringVar(&c.answers, "answers", "", "the `folder` into which the holders' answers (*.answer) are put")
	f.StringVar(&c.wait, "wait", "1d", "wait so long for the answers: a `duration`, such as 2h or 3d")
}

// openRequest makes the file of the request, as a new one.
func (c *ceremony) openRequest() (err error) {
	if c.request == "" || c.answers == "" {
		return configError{errors.New("--request and --answers are needed: the file for the holders, and the folder " +
			"for what they answer")}
	}
	if c.most, err = cli.ParseDuration(c.wait); err != nil {
		return configError{fmt.Errorf("--wait: %w", err)}
	}
	if info, err := os.Stat(c.answers); err != nil {
		return configError{fmt.Errorf("--answers: %w", err)}
	} else if !info.IsDir() {
		return configError{fmt.Errorf("--answers: %s is no folder", c.answers)}
	}
	how := os.O_CREATE | os.O_WRONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK
	if c.file, err = os.OpenFile(c.request, how, 0o600); err != nil {
		return configError{fmt.Errorf("--request: %w", err)}
	}
	// An empty one is of a command that had nothing to ask.
	if info, err := c.file.Stat(); err != nil || !info.Mode().IsRegular() || info.Size() > 0 {
		return configError{errors.Join(fmt.Errorf("--request: %s exists: each drill and each return has a request of "+
			"its own", c.request), err, c.file.Close())}
	}
	return nil
}

// discardRequest removes the file of a request that was not written, where this process may.
func (c *ceremony) discardRequest() {
	if info, err := os.Stat(c.request); err == nil && info.Size() == 0 {
		os.Remove(c.request)
	}
}

// hold writes the request, and waits for enough answers. The answers that can't be used are named
// once, and left alone. The error wraps errNoHolders where a key lacks shares at the end.
func (c *ceremony) hold(ctx context.Context, e *escrow.Ceremony, stdout io.Writer) error {
	if _, err := os.ReadDir(c.answers); err != nil {
		return configError{fmt.Errorf("--answers: %w; the folder must be open to the user of the daemon", err)}
	}
	_, err := c.file.Write(e.Request())
	if err = errors.Join(err, c.file.Sync(), c.file.Close()); err != nil {
		return fmt.Errorf("--request: %w", err)
	}
	line := func(name, format string, args ...any) {
		fmt.Fprintf(stdout, "%-12s %s\n", name, fmt.Sprintf(format, args...))
	}
	more := func() string {
		n, keys := e.Wanting()
		return fmt.Sprintf("%s more for %s", cli.Count(n, "holder"), cli.Count(len(keys), "key"))
	}
	line("request", "%s: send it to the holders", c.request)
	line("code", "%s: read it out to each holder, by a call", escrow.Code(e.Request()))
	line("waiting", "for answers in %s, for %s: %s", c.answers, c.wait, more())
	end := time.NewTimer(c.most)
	defer end.Stop()
	seen := map[string]fileState{}
	for {
		files, err := newAnswers(c.answers, seen)
		if err != nil {
			return fmt.Errorf("--answers: %w", err)
		}
		for _, name := range files {
			given, err := takeAnswer(e, filepath.Join(c.answers, name))
			if err != nil {
				line("ignored", "%s: %s", cause.Line(name), cause.Line(err.Error()))
				continue
			}
			who := strings.Join(given.Holders, ", ")
			if n, _ := e.Wanting(); n > 0 {
				line("answer", "of %s, for %s; %s", who, cli.Count(len(given.Keys), "key"), more())
			} else {
				line("answer", "of %s, for %s", who, cli.Count(len(given.Keys), "key"))
			}
		}
		if n, _ := e.Wanting(); n == 0 {
			return nil
		}
		select {
		case <-time.After(lookForAnswers):
		case <-end.C:
			return fmt.Errorf("%w: %s", errNoHolders, more())
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// fileState tells a file that was replaced, has grown or has other rights from the same one.
type fileState struct {
	size    int64
	changed syscall.Timespec
}

// newAnswers lists the files of answers that are new or have changed, and notes them in seen.
func newAnswers(folder string, seen map[string]fileState) (names []string, err error) {
	entries, err := os.ReadDir(folder)
	if err != nil {
		return nil, err
	}
	for _, entry := range entries {
		info, err := entry.Info()
		if err != nil || !info.Mode().IsRegular() || !strings.HasSuffix(entry.Name(), answerSuffix) {
			continue
		}
		stat := info.Sys().(*syscall.Stat_t)
		if now := (fileState{info.Size(), stat.Ctim}); seen[entry.Name()] != now {
			seen[entry.Name()], names = now, append(names, entry.Name())
		}
	}
	return names, nil
}

func takeAnswer(e *escrow.Ceremony, path string) (escrow.Given, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return escrow.Given{}, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return escrow.Given{}, errors.Join(fmt.Errorf("%w: it is no regular file", escrow.ErrAnswer), err)
	}
	b, err := io.ReadAll(io.LimitReader(f, escrow.MaxFile+1))
	if err == nil && len(b) > escrow.MaxFile {
		err = fmt.Errorf("%w: it is too long", escrow.ErrAnswer)
	}
	if err != nil {
		return escrow.Given{}, err
	}
	return e.Take(b)
}
