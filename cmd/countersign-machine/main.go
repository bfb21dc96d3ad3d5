// Command countersign-machine is the machine's side of an appliance that was booted from the image:
// each command is started by a unit of image/root.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"countersign/admin/api"
	"countersign/approval"
	"countersign/internal/cli"
	"countersign/internal/machine/agent"
	"countersign/internal/manage"

	"github.com/spf13/cobra"
)

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := &cobra.Command{
		Use: "countersign-machine", Short: "The machine of an appliance", SilenceErrors: true, SilenceUsage: true,
		Version: cli.Version(),
	}
	command := func(use, short string, do func(ctx context.Context) error) {
		root.AddCommand(&cobra.Command{Use: use, Short: short, Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error { return do(cmd.Context()) }})
	}
	command("disk", "Unlock and mount the state", func(ctx context.Context) error {
		err := agent.Record("disk", (&agent.Disk{Log: stdout}).Open(ctx))
		if err != nil {
			agent.GiveUp(ctx)
		}
		return err
	})
	command("agent", "Do what the daemon and the consoles ask the machine for", func(ctx context.Context) error {
		log := slog.New(slog.NewTextHandler(stderr, nil))
		return (&agent.Agent{Log: log, FirstLink: firstLink, EnrolFirst: enrolFirst}).Run(ctx)
	})
	command("console", "Show the state of the machine, and a menu", func(ctx context.Context) error {
		return (&agent.Console{In: os.Stdin, Out: stdout}).Run(ctx)
	})
	command("network", "Write the configuration of network, firewall and clock", func(ctx context.Context) error {
		s, err := agent.LoadSettings()
		if err == nil {
			err = agent.ApplyNetwork(ctx, s)
		}
		return agent.Record("network", err)
	})
	command("resolv", "Write the name servers of DHCP", func(context.Context) error {
		s, err := agent.LoadSettings()
		if err == nil {
			err = agent.WriteResolv(s)
		}
		return err
	})
	command("setup", "Make the appliance at the first boot", func(ctx context.Context) error {
		return agent.Record("setup", agent.SetUp(ctx, stdout))
	})
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintf(stderr, "countersign-machine: %v\n", err)
		return 1
	}
	return 0
}

// adminSocket is the daemon's, where root may enrol the first administrator.
const adminSocket = "/run/countersign/admin.sock"

func firstLink(ctx context.Context, name string) (string, error) {
	l, err := api.NewClient(adminSocket).FirstLink(ctx, name)
	return l.URL, err
}

func enrolFirst(ctx context.Context, name, sshKey string) error {
	key, err := approval.NewSSH(sshKey)
	if err != nil {
		return err
	}
	_, err = api.NewClient(adminSocket).EnrolFirst(ctx, api.NewOperator{Name: name, Credential: key})
	if problem := new(api.Error); errors.As(err, &problem) && problem.Code == "conflict" {
		return fmt.Errorf("%w: %w", manage.ErrConflict, err)
	}
	return err
}
