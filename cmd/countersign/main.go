// Command countersign is the tool of peers and operators: it makes identities, signs and verifies over Noise, shows what
// a document signs, and manages an appliance over its admin socket.
//
// What it prints on stdout is for programs, what it prints on stderr is for people. Exit status: 0 done; 1 refused or
// failed; 2 called wrongly; 3 the appliance could not be reached or could not answer: the same may be tried again.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"unicode"

	"countersign/admin/api"
	"countersign/audit"
	"countersign/client"
	"countersign/policy"
	"countersign/transcript"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// tool is one call of the command.
type tool struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	json           bool
	operator       string // who signs in to an appliance
	proposeOnly    bool
}

// failed marks an error of a command that was called rightly.
type failed struct{ error }

func (f failed) Unwrap() error { return f.error }

func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	t := &tool{stdin: stdin, stdout: stdout, stderr: stderr}
	root := &cobra.Command{
		Use:           "countersign",
		Short:         "Sign and verify with a Countersign appliance, and manage it",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.PersistentFlags().BoolVar(&t.json, "json", false, "print JSON on stdout")
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.AddCommand(t.keygen(), t.ping(), t.keys(), t.sign(), t.verify(), t.proof(), t.line(), t.watch(), t.transcript(), t.policy(), t.audit(), t.admin())

	called, err := root.ExecuteContextC(ctx)
	if err == nil {
		return 0
	}
	code, status := classify(err)
	if t.json || slices.Contains(args, "--json") { // wrong flags may have kept it from being read
		t.json = true
		doc := map[string]any{"code": code, "message": message(err)}
		if wrong, is := errors.AsType[*audit.Wrong](err); is {
			doc["event"] = wrong.Event
		}
		t.print(map[string]any{"error": doc}, nil)
	}
	fmt.Fprintf(stderr, "countersign: %s: %s\n", code, message(err))
	if status == 2 {
		fmt.Fprintf(stderr, "countersign: see: %s --help\n", called.CommandPath())
	}
	return status
}

// classify gives an error the code that programs read and the exit status.
func classify(err error) (code string, status int) {
	var refusal *client.Error
	var adminRefusal *api.Error
	switch {
	case !errors.As(err, new(failed)):
		return "usage", 2
	case errors.Is(err, client.ErrUnknownOutcome): // before the refusal that it may wrap: it must not be tried again
		return "unknown_outcome", 1
	case errors.As(err, new(*audit.Wrong)):
		return "wrong_event", 1
	case errors.Is(err, client.ErrUnproven):
		return "unproven", 1
	case errors.Is(err, client.ErrBrokenLine): // before the refusal that it may wrap
		return "broken_line", 1
	case errors.As(err, &refusal):
		if refusal.Code == "unavailable" || refusal.Code == "busy" || refusal.Code == "rate_limited" {
			return refusal.Code, 3
		}
		return refusal.Code, 1
	case errors.As(err, &adminRefusal):
		if adminRefusal.Code == "unavailable" || adminRefusal.Code == "rate_limited" {
			return adminRefusal.Code, 3
		}
		return adminRefusal.Code, 1
	case errors.Is(err, client.ErrHandshake):
		return "handshake_refused", 1
	case errors.Is(err, client.ErrUnreachable), errors.Is(err, context.DeadlineExceeded), errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ENOENT) && errors.As(err, new(socketError)):
		return "unreachable", 3
	case errors.Is(err, transcript.ErrUnsupported):
		return "unsupported", 1
	case errors.Is(err, transcript.ErrMalformed):
		return "malformed", 1
	case errors.Is(err, policy.ErrDenied):
		return "denied", 1
	}
	return "failed", 1
}

// message is the error's text on one line, without the code that is printed before it.
func message(err error) string {
	text := strings.Join(strings.Fields(err.Error()), " ")
	var refusal *client.Error
	if errors.As(err, &refusal) && !errors.Is(err, client.ErrUnproven) && !errors.Is(err, client.ErrBrokenLine) {
		text = refusal.Message
	}
	var adminRefusal *api.Error
	if errors.As(err, &adminRefusal) {
		text = adminRefusal.Detail
	}
	return text
}

// print writes v as JSON, or calls human with a writer that aligns columns at tabs.
func (t *tool) print(v any, human func(w io.Writer)) error {
	if t.json {
		e := json.NewEncoder(t.stdout)
		e.SetIndent("", "  ")
		return e.Encode(v)
	}
	w := tabwriter.NewWriter(visible{t.stdout}, 0, 0, 2, ' ', 0)
	human(w)
	return w.Flush()
}

// visible writes text for people. Some of it was chosen by others, such as the reason of a lock: what would move a terminal's cursor, or
// can't be seen, comes out as a sign for that.
type visible struct{ to io.Writer }

func (v visible) Write(b []byte) (int, error) {
	_, err := v.to.Write(bytes.Map(func(r rune) rune {
		if r != '\n' && unicode.In(r, unicode.Cc, unicode.Cf) {
			return unicode.ReplacementChar
		}
		return r
	}, b))
	return len(b), err
}

// command makes a cobra command whose errors are told apart from wrong calls.
func command(use, short string, args cobra.PositionalArgs, do func(cmd *cobra.Command, args []string) error) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, Args: args, RunE: func(cmd *cobra.Command, args []string) error {
		if err := do(cmd, args); err != nil {
			var usage usageError
			if errors.As(err, &usage) {
				return err
			}
			return failed{err}
		}
		return nil
	}}
}

// group makes a command that only holds others. Without one of them it is a wrong call: cobra would print the help and
// end as if all were well.
func group(use, short string, commands ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{Use: use, Short: short, Args: cobra.ArbitraryArgs, RunE: func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return fmt.Errorf("unknown command %q for %q", args[0], cmd.CommandPath())
		}
		return fmt.Errorf("%q needs a command", cmd.CommandPath())
	}}
	c.AddCommand(commands...)
	return c
}

// usageError is a wrong call that only the command itself can see.
type usageError struct{ error }

// readInput reads a named file, or stdin for "-" and for no name.
func (t *tool) readInput(args []string) ([]byte, error) {
	if len(args) == 0 || args[0] == "-" {
		return io.ReadAll(t.stdin)
	}
	return os.ReadFile(args[0])
}
