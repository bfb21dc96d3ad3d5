package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
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

// open makes the file of the request, as a new one.
func (c *ceremony) open() (err error) {
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
	c.file, err = os.OpenFile(c.request, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, fs.ErrExist) {
		err = configError{fmt.Errorf("--request: %s exists: each drill and each return has a request of its own",
			c.request)}
	}
	return err
}

// hold writes the request, and waits for enough answers. The answers that can't be used are named
// once, and left alone.
func (c *ceremony) hold(ctx context.Context, e *escrow.Ceremony, stdout io.Writer) (holders []string, err error) {
	_, err = c.file.Write(e.Request())
	if err = errors.Join(err, c.file.Sync(), c.file.Close()); err != nil {
		return nil, fmt.Errorf("--request: %w", err)
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
	ctx, cancel := context.WithTimeout(ctx, c.most)
	defer cancel()
	seen := map[string]fileState{}
	for {
		files, err := newAnswers(c.answers, seen)
		if err != nil {
			return nil, fmt.Errorf("--answers: %w", err)
		}
		for _, name := range files {
			given, err := takeAnswer(e, filepath.Join(c.answers, name))
			if err != nil {
				line("ignored", "%s: %s", cause.Line(name), cause.Line(err.Error()))
				continue
			}
			for _, holder := range given.Holders {
				if !slices.Contains(holders, holder) {
					holders = append(holders, holder)
				}
			}
			who := strings.Join(given.Holders, ", ")
			if n, _ := e.Wanting(); n > 0 {
				line("answer", "of %s, for %s; %s", who, cli.Count(len(given.Keys), "key"), more())
			} else {
				line("answer", "of %s, for %s", who, cli.Count(len(given.Keys), "key"))
			}
		}
		if n, _ := e.Wanting(); n == 0 {
			return holders, nil
		}
		select {
		case <-time.After(lookForAnswers):
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %s", errNoHolders, more())
		}
	}
}

// fileState tells a file that was replaced, or that has grown, from the same one.
type fileState struct {
	size     int64
	modified time.Time
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
		if now := (fileState{info.Size(), info.ModTime()}); seen[entry.Name()] != now {
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
	b, err := io.ReadAll(io.LimitReader(f, escrow.MaxFile+1))
	if err == nil && len(b) > escrow.MaxFile {
		err = fmt.Errorf("%w: it is too long", escrow.ErrAnswer)
	}
	if err != nil {
		return escrow.Given{}, err
	}
	return e.Take(b)
}
