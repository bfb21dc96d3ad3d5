// Command countersign is the tool of peers and operators. Peers make identities, and have documents
// signed and verified over Noise. Operators manage an appliance over its admin socket. Anyone can
// check an audit log, try a policy, and show the bytes that a document's signature covers.
//
// Results go to stdout, for programs. Diagnostics go to stderr, for people. The exit status is:
//
//	0  done
//	1  refused or failed
//	2  wrong usage
//	3  the appliance could not be reached or could not answer: try the same again
//	4  admin state: the appliance answers, and is not operational
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"countersign/admin/api"
	"countersign/audit"
	"countersign/client"
	"countersign/internal/cli"
	"countersign/policy"
	"countersign/transcript"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// tool is one run of the program.
type tool struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	json           bool
	at             address    // the appliance that a command names
	to             *appliance // the appliance that the command talks to
	ca             string     // file with the certificate of the CA of an appliance
	identity       string     // file with the public half of the only key to sign with
	operator       string     // name of the operator who signs in to an appliance
	proposeOnly    bool
}

// failed marks an error of a command whose usage was right.
type failed struct{ error }

func (f failed) Unwrap() error { return f.error }

func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	stderr = visible{stderr}
	t := &tool{stdin: stdin, stdout: stdout, stderr: stderr}
	root := t.root()
	root.SetArgs(args)
	called, err := root.ExecuteContextC(ctx)
	if err == nil {
		return 0
	}
	code, status := classify(err)
	code = oneLine(code)
	if state, is := errors.AsType[notOperational](err); is { // the document of the state is on stdout
		if !state.quiet {
			fmt.Fprintf(stderr, "countersign: error: %s: %s\n", code, message(err))
		}
		return status
	}
	if t.json || slices.Contains(args, "--json") { // a wrong flag may have stopped the parsing before --json
		t.json = true
		doc := map[string]any{"code": code, "message": message(err)}
		if wrong, is := errors.AsType[*audit.Wrong](err); is {
			doc["event"] = wrong.Event
		}
		if request := requestOf(err); request != "" {
			doc["request"] = request
		}
		if !errors.Is(err, errUnreconciled) { // the result is printed already
			t.print(map[string]any{"error": doc}, nil)
		}
	}
	fmt.Fprintf(stderr, "countersign: error: %s: %s\n", code, message(err))
	if request := requestOf(err); request != "" {
		fmt.Fprintf(stderr, "countersign: request: %s\n", request)
	}
	if status == 2 {
		fmt.Fprintf(stderr, "countersign: hint: %s --help\n", called.CommandPath())
	} else if next := hints[code]; next != "" {
		fmt.Fprintf(stderr, "countersign: hint: %s\n", next)
	}
	return status
}

// root returns the command of the program, with all commands below.
func (t *tool) root() *cobra.Command {
	root := &cobra.Command{
		Use:           "countersign",
		Short:         "Sign and verify with a Countersign appliance, and manage the appliance",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	details(root, "Exit status: 0 done; 1 refused or failed; 2 wrong usage; 3 the appliance could not be reached or\n"+
		"could not answer: try the same again; 4 admin state: the appliance is not operational. With --json,\n"+
		"an error is a document with a stable code. States have colours at a terminal, unless NO_COLOR is set.")
	root.PersistentFlags().BoolVar(&t.json, "json", false, "print JSON on stdout instead of text")
	root.SetIn(t.stdin)
	root.SetOut(t.stdout)
	root.SetErr(t.stderr)
	root.AddCommand(t.keygen(), t.ping(), t.keys(), t.sign(), t.verify(), t.proof(), t.line(), t.watch(),
		t.transcript(), t.policy(), t.audit(), t.holder(), t.admin())
	cli.Add(root, nil, func(err error) error { return failed{err} })
	addExamples(root)
	t.addCompletion(root)
	return root
}

// classify gives an error its code, for programs, and the exit status.
func classify(err error) (code string, status int) {
	refusal, refused := errors.AsType[*client.Error](err)
	adminRefusal, adminRefused := errors.AsType[*api.Error](err)
	switch {
	case !errors.As(err, new(failed)):
		return "usage", 2
	case errors.As(err, new(notOperational)):
		return "not_operational", 4
	case errors.Is(err, client.ErrUnknownOutcome): // before a refusal inside: a retry is not safe
		return "unknown_outcome", 1
	case errors.Is(err, errNotSigned):
		return "not_signed", 1
	case errors.As(err, new(*audit.Wrong)):
		return "wrong_event", 1
	case errors.Is(err, errUnreconciled):
		return "unreconciled", 1
	case errors.Is(err, client.ErrForkedLog): // also an ErrUnproven
		return "forked_log", 1
	case errors.Is(err, client.ErrUnproven):
		return "unproven", 1
	case errors.Is(err, client.ErrBrokenLine): // before a refusal inside
		return "broken_line", 1
	case errors.Is(err, client.ErrCompromised):
		return "compromised", 1
	case refused:
		return refusal.Code, retryStatus(refusal.Code)
	case adminRefused:
		return adminRefusal.Code, retryStatus(adminRefusal.Code)
	case errors.Is(err, client.ErrHandshake):
		return "handshake_refused", 1
	case errors.Is(err, client.ErrUnreachable), errors.Is(err, context.DeadlineExceeded),
		errors.Is(err, errConnRefused),
		errors.Is(err, fs.ErrNotExist) && errors.As(err, new(socketError)):
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

// hints has the next step after an error, by its code. An error whose message says so already has
// none.
var hints = map[string]string{
	"signed_out":        "load your key into the SSH agent (ssh-add), then: countersign admin login NAME",
	"not_allowed":       "countersign admin whoami shows your roles, and admin operator list whom to ask",
	"handshake_refused": "an operator sees which key came and why: countersign admin peer refused",
	"denied":            "an operator sees the rules that decided: countersign policy explain EVENT",
	"unknown_outcome":   "look before you try again: the appliance may have done it",
	"unavailable":       "an operator sees the cause: countersign admin state",
	"busy":              "wait, then type the same again",
	"rate_limited":      "wait, then type the same again",
}

// retryStatus is the exit status of a refusal: 3 where the same request may be tried again.
func retryStatus(code string) int {
	switch code {
	case "unavailable", "busy", "rate_limited":
		return 3
	}
	return 1
}

// message is the text of an error on one line, without the code that is printed before the text.
func message(err error) string {
	text := err.Error()
	refusal, refused := errors.AsType[*client.Error](err)
	if refused && !errors.Is(err, client.ErrUnproven) && !errors.Is(err, client.ErrBrokenLine) {
		text = refusal.Message
	}
	if adminRefusal, is := errors.AsType[*api.Error](err); is {
		text = adminRefusal.Detail
	}
	return oneLine(text)
}

// requestOf returns the id of the request that was refused, by which the appliance's operators find
// the request in their logs, or "".
func requestOf(err error) string {
	if refusal, is := errors.AsType[*client.Error](err); is {
		return oneLine(refusal.Request)
	}
	if refusal, is := errors.AsType[*api.Error](err); is {
		return oneLine(refusal.Request)
	}
	return ""
}

// oneLine returns a text without line breaks: the text of another program must not look like a line
// of this one.
func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }

// command makes a cobra command. Errors of do are marked as failed, except a usageError.
func command(
	use, short string, args cobra.PositionalArgs, do func(cmd *cobra.Command, args []string) error,
) *cobra.Command {
	run := func(cmd *cobra.Command, args []string) error {
		err := do(cmd, args)
		if err == nil || errors.As(err, new(usageError)) {
			return err
		}
		return failed{err}
	}
	return &cobra.Command{Use: use, Short: short, Args: args, RunE: run}
}

// details adds facts to the help of a command, after its one sentence.
func details(c *cobra.Command, text string) { c.Long = c.Short + ".\n\n" + text }

// group makes a command that only holds other commands. A group without a command is wrong usage:
// cobra itself would print the help with exit status 0.
func group(use, short string, commands ...*cobra.Command) *cobra.Command {
	run := func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return fmt.Errorf("unknown command %q for %q", args[0], cmd.CommandPath())
		}
		return fmt.Errorf("%q needs a command", cmd.CommandPath())
	}
	c := &cobra.Command{Use: use, Short: short, Args: cobra.ArbitraryArgs, RunE: run}
	c.AddCommand(commands...)
	return c
}

// usageError is wrong usage that cobra does not detect.
type usageError struct{ error }

// readInput reads the named file, or stdin for "-" or no name.
func (t *tool) readInput(args []string) ([]byte, error) {
	if len(args) == 0 || args[0] == "-" {
		return io.ReadAll(t.stdin)
	}
	return os.ReadFile(args[0])
}
