package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"countersign/admin/api"

	"github.com/spf13/cobra"
)

// socketError marks a failure to reach the admin socket.
type socketError struct{ error }

func (s socketError) Unwrap() error { return s.error }

func (t *tool) admin() *cobra.Command {
	var socket string
	c := group("admin", "Manage an appliance over its admin socket")
	path := os.Getenv("COUNTERSIGN_SOCKET")
	if path == "" {
		path = "/run/countersign/admin.sock"
	}
	c.PersistentFlags().StringVar(&socket, "socket", path, "the admin socket (or COUNTERSIGN_SOCKET)")

	// act makes a command that calls the API.
	act := func(use, short string, args cobra.PositionalArgs, do func(ctx context.Context, c *api.Client, args []string) error) *cobra.Command {
		return command(use, short, args, func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), time.Minute)
			defer cancel()
			if _, err := os.Stat(socket); err != nil {
				return socketError{fmt.Errorf("no appliance is running there: %w", err)}
			}
			return do(ctx, api.NewClient(socket), args)
		})
	}

	key := group("key", "Create and show keys",
		act("create NAME", "Create a signing key in the token", cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
			k, err := c.CreateKey(ctx, args[0])
			if err != nil {
				return err
			}
			return t.print(k, func(w io.Writer) { showKey(w, k) })
		}),
		act("list", "List all keys", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
			keys, err := c.Keys(ctx)
			if err != nil {
				return err
			}
			return t.print(keys, func(w io.Writer) {
				fmt.Fprintln(w, "NAME\tVERSION\tALGORITHM\tSTATE\tCUSTODY\tPUBLIC KEY")
				for _, k := range keys {
					fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\n", k.Name, k.Version, k.Algorithm, k.State, k.Custody, k.PublicKey)
				}
			})
		}),
		act("show NAME", "Show a key and where it came from", cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
			versions, err := c.Key(ctx, args[0])
			if err != nil {
				return err
			}
			return t.print(versions, func(w io.Writer) {
				for _, k := range versions {
					showKey(w, k)
				}
			})
		}),
	)

	peer := group("peer", "Enrol and remove peers",
		act("add NAME PUBLIC_KEY", "Enrol a peer by the public key that keygen printed", cobra.ExactArgs(2), func(ctx context.Context, c *api.Client, args []string) error {
			p, err := c.AddPeer(ctx, args[0], args[1])
			if err != nil {
				return err
			}
			return t.print(p, func(w io.Writer) { fmt.Fprintf(w, "enrolled\t%s\t%s\n", p.Name, p.PublicKey) })
		}),
		act("list", "List the enrolled peers", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
			peers, err := c.Peers(ctx)
			if err != nil {
				return err
			}
			return t.print(peers, func(w io.Writer) {
				fmt.Fprintln(w, "NAME\tPUBLIC KEY\tADDED")
				for _, p := range peers {
					fmt.Fprintf(w, "%s\t%s\t%s\n", p.Name, p.PublicKey, date(p.Added))
				}
			})
		}),
		act("remove NAME", "Take a peer's enrolment back and close its connections", cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
			if err := c.RemovePeer(ctx, args[0]); err != nil {
				return err
			}
			return t.print(map[string]string{"removed": args[0]}, func(w io.Writer) { fmt.Fprintf(w, "removed\t%s\n", args[0]) })
		}),
	)

	var from uint64
	var limit int
	list := act("list", "List events", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
		events, err := c.Events(ctx, from, limit)
		if err != nil {
			return err
		}
		return t.print(events, func(w io.Writer) {
			fmt.Fprintln(w, "INDEX\tTIME\tTYPE\tACTOR\tACTION\tRESOURCE\tOUTCOME")
			for _, e := range events {
				fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\t%s\n", e.Index, time.UnixMilli(e.TimeMS).UTC().Format("2006-01-02T15:04:05.000Z"),
					e.Type, e.Actor.Kind+" "+e.Actor.Name, e.Action, e.Resource, e.Outcome)
			}
		})
	})
	list.Flags().Uint64Var(&from, "from", 0, "the first index")
	list.Flags().IntVar(&limit, "limit", 100, "how many at the most, up to 1000")
	audit := group("audit", "Read the audit log", list)

	noiseKey := act("noise-key", "Print the listener's public key", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
		k, err := c.NoiseKey(ctx)
		if err != nil {
			return err
		}
		return t.print(k, func(w io.Writer) { fmt.Fprintln(w, k.PublicKey) })
	})
	c.AddCommand(key, peer, audit, noiseKey)
	return c
}

func showKey(w io.Writer, k api.Key) {
	origin := "imported"
	if k.Generated {
		origin = "made inside the device"
	}
	if k.NeverLeft {
		origin += ", never readable or extractable"
	}
	fmt.Fprintf(w, "key\t%s, version %d\nalgorithm\t%s\nstate\t%s\ncustody\t%s\norigin\t%s\ncreated\t%s\npublic key\t%s\n",
		k.Name, k.Version, k.Algorithm, k.State, k.Custody, origin, date(k.Created), k.PublicKey)
}

func date(unix int64) string { return time.Unix(unix, 0).UTC().Format(time.RFC3339) }
