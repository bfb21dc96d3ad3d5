package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"countersign/admin/api"
	"countersign/internal/keystore"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// socketError marks a failure to reach the admin socket.
type socketError struct{ error }

func (s socketError) Unwrap() error { return s.error }

// apiCall is what a command does with the admin API, and maker makes the command.
type (
	apiCall func(ctx context.Context, c *api.Client, args []string) error
	maker   func(use, short string, args cobra.PositionalArgs, do apiCall) *cobra.Command
)

// longTime bounds the acts that may take long: a compaction, an export.
const longTime = 24 * time.Hour

func (t *tool) socketFlag(flags *pflag.FlagSet, socket *string) {
	path := os.Getenv("COUNTERSIGN_SOCKET")
	if path == "" {
		path = "/run/countersign/admin.sock"
	}
	flags.StringVar(socket, "socket", path, "the admin socket (or COUNTERSIGN_SOCKET)")
	t.operatorFlag(flags)
}

func (t *tool) admin() *cobra.Command {
	var socket string
	c := group("admin", "Manage an appliance over its admin socket")
	t.socketFlag(c.PersistentFlags(), &socket)
	c.PersistentFlags().BoolVar(&t.proposeOnly, "propose-only", false, "where an act needs approval: do not approve it here")

	// act makes a command that calls the API.
	act := func(use, short string, args cobra.PositionalArgs, do apiCall) *cobra.Command {
		return command(use, short, args, func(cmd *cobra.Command, args []string) error {
			wait := time.Minute
			if cmd.Annotations["long"] != "" {
				wait = longTime
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), wait)
			defer cancel()
			api, err := t.dialAdmin(socket)
			if err != nil {
				return err
			}
			return do(ctx, api, args)
		})
	}

	var algorithm, token string
	create := act("create NAME", "Create a signing key in a token", cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
		k, err := c.CreateKey(ctx, api.NewKey{Name: args[0], Algorithm: algorithm, Token: token})
		if err != nil {
			return err
		}
		return t.print(k, func(w io.Writer) { showKey(w, k) })
	})
	create.Flags().StringVar(&algorithm, "algorithm", "ed25519", "ed25519, or p256 for TLS")
	importKey := act("import NAME SEED_FILE", "Import an Ed25519 seed from a file on the appliance", cobra.ExactArgs(2), func(ctx context.Context, c *api.Client, args []string) error {
		path, err := filepath.Abs(args[1])
		if err != nil {
			return err
		}
		k, err := c.CreateKey(ctx, api.NewKey{Name: args[0], Token: token, SeedFile: path})
		if err != nil {
			return err
		}
		return t.print(k, func(w io.Writer) { showKey(w, k) })
	})
	importKey.Long = "The file holds 32 bytes, or their 64 hex digits, or keypair-seed: and their base64url, and only its owner may be able to\n" +
		"read it. The key worker reads it, once; this command does not. The key can't be taken out of the token again and is\n" +
		"shown as imported for ever. Destroy the file afterwards: what is in it can sign without the appliance."
	for _, c := range []*cobra.Command{create, importKey} {
		c.Flags().StringVar(&token, "token", "", "the token, where there are several")
	}
	tokens := group("token", "Look after tokens",
		act("list", "Say how the tokens and their key workers are", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
			tokens, err := c.Tokens(ctx)
			if err != nil {
				return err
			}
			return t.print(tokens, func(w io.Writer) {
				fmt.Fprintln(w, "TOKEN\tSTATE\tWORKER\tPID\tSERVED\tREPLACED\tCAUSE")
				for _, tk := range tokens {
					state := "up"
					if !tk.Up {
						state = "down"
					}
					for i, worker := range tk.Workers {
						fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%d\t%d\t%s\n", tk.Name, state, i+1, worker.PID, worker.Served, worker.Restarts, tk.Cause)
					}
				}
			})
		}),
		act("retry NAME", "Log in again after the PIN was refused and the PIN file has been corrected", cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
			if err := c.RetryToken(ctx, args[0]); err != nil {
				return err
			}
			return t.print(map[string]string{"retried": args[0]}, func(w io.Writer) { fmt.Fprintf(w, "retried\t%s\n", args[0]) })
		}),
	)

	key := group("key", "Create, show, rotate and retire keys",
		create, importKey,
		act("list", "List all keys", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
			keys, err := c.Keys(ctx)
			if err != nil {
				return err
			}
			return t.print(keys, func(w io.Writer) {
				fmt.Fprintln(w, "NAME\tVERSION\tALGORITHM\tSTATE\tCUSTODY\tORIGIN\tTOKEN\tPUBLIC KEY")
				for _, k := range keys {
					fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\t%s\t%s\n", k.Name, k.Version, k.Algorithm, k.State, k.Custody, k.Origin, k.Token, k.PublicKey)
				}
			})
		}),
		act("show NAME", "Show a key's versions, where they came from, how it is rotated, and who has not acknowledged that", cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
			return t.showVersions(ctx, c, args[0])
		}),
	)
	key.AddCommand(t.keyLife(act)...)
	key.Aliases = []string{"keys"}

	peer := group("peer", "Enrol and remove peers",
		act("add NAME PUBLIC_KEY", "Enrol a peer by the public key that keygen printed, under approval", cobra.ExactArgs(2), func(ctx context.Context, c *api.Client, args []string) error {
			return t.propose(ctx, c, "peer add", "", "name", args[0], "public_key", strings.ToLower(args[1]))
		}),
		act("list", "List the enrolled peers", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
			peers, err := c.Peers(ctx)
			if err != nil {
				return err
			}
			return t.print(peers, func(w io.Writer) {
				fmt.Fprintln(w, "NAME\tPUBLIC KEY\tADDED\tLAST SEEN\tCONNECTIONS\tSTATE")
				for _, p := range peers {
					seen := "never"
					if p.LastSeen != 0 {
						seen = date(p.LastSeen)
					}
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\n", p.Name, p.PublicKey, date(p.Added), seen, p.Connections, either(p.Suspended, "suspended", "enrolled"))
				}
			})
		}),
		act("suspend NAME", "Close a peer's connections and keep it out until it is resumed", cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
			if err := c.SuspendPeer(ctx, args[0]); err != nil {
				return err
			}
			return t.print(map[string]string{"suspended": args[0]}, func(w io.Writer) { fmt.Fprintf(w, "suspended\t%s\n", args[0]) })
		}),
		act("resume NAME", "Let a suspended peer in again", cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
			if err := c.ResumePeer(ctx, args[0]); err != nil {
				return err
			}
			return t.print(map[string]string{"resumed": args[0]}, func(w io.Writer) { fmt.Fprintf(w, "resumed\t%s\n", args[0]) })
		}),
		act("remove NAME", "Take a peer's enrolment back and close its connections", cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
			if err := c.RemovePeer(ctx, args[0]); err != nil {
				return err
			}
			return t.print(map[string]string{"removed": args[0]}, func(w io.Writer) { fmt.Fprintf(w, "removed\t%s\n", args[0]) })
		}),
	)

	audit := group("audit", "Read the audit log, and give it to others", t.events(act),
		act("key", "Print the log's verifier key, for countersign audit verify and other tools", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
			l, err := c.Log(ctx)
			if err != nil {
				return err
			}
			return t.print(l, func(w io.Writer) { fmt.Fprintln(w, l.VerifierKey) })
		}),
		t.export(&socket),
		act("end-epoch", "End the present epoch of the log now, and begin the next one", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
			l, err := c.EndEpoch(ctx)
			if err != nil {
				return err
			}
			return t.print(l, func(w io.Writer) { fmt.Fprintf(w, "epoch\t%d has begun\nverifier key\t%s\n", l.Epoch, l.VerifierKey) })
		}),
	)

	var reason string
	accept := act("accept", "Let the ledger admit again as it is, although it is older than its counter, under approval", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
		return t.propose(ctx, c, "rollback accept", "", "reason", reason)
	})
	accept.Long = "An older copy of the ledger has forgotten nonces: what was signed under them since it was made can be signed again, and what\n" +
		"was verified can be verified again. Find out first how it came into the place of the newest one, and put that back if you\n" +
		"have it. See docs/OPERATIONS.md."
	accept.Flags().StringVar(&reason, "reason", "", "why that is right; it goes into the audit log")
	rollback := group("rollback", "Look after the ledger's binding to a counter", accept,
		act("show", "Say whether the ledger is older than its counter", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
			r, err := c.Rollback(ctx)
			if err != nil {
				return err
			}
			return t.print(r, func(w io.Writer) {
				if !r.Detected {
					fmt.Fprintln(w, "no rollback was detected")
					return
				}
				fmt.Fprintf(w, "detected\t%s\nreason\t%s\nledger\t%d\ncounter\t%d\n", date(r.At), r.Reason, r.Ledger, r.Counter)
			})
		}),
	)

	noiseKey := act("noise-key", "Print the listener's public key", cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
		k, err := c.NoiseKey(ctx)
		if err != nil {
			return err
		}
		return t.print(k, func(w io.Writer) { fmt.Fprintln(w, k.PublicKey) })
	})
	c.AddCommand(key, peer, tokens, rollback, audit, noiseKey, t.policyVersions(act), t.retention(act), t.receipts(act), t.ledger(act))
	c.AddCommand(t.people(act, &socket)...)
	return c
}

func showKey(w io.Writer, k api.Key) {
	p := k.Provenance
	made := fmt.Sprintf("%s, %s, %s", either(p.Local, "made inside the device", "made elsewhere"),
		either(p.AlwaysSensitive, "never readable", "once readable"), either(p.NeverExtractable, "never extractable", "once extractable"))
	if k.Custody == string(keystore.TPMSealed) { // such a key is in this machine's memory while it is in use
		made = either(p.Local, "made by a key worker of random numbers of the TPM and the system", "made elsewhere") + ", and sealed by the TPM"
	}
	fmt.Fprintf(w, "key\t%s, version %d\nalgorithm\t%s\nstate\t%s\ncustody\t%s, on token %s\norigin\t%s: %s\ncreated\t%s\npublic key\t%s\n",
		k.Name, k.Version, k.Algorithm, k.State, k.Custody, k.Token, k.Origin, made, date(k.Created), k.PublicKey)
	switch {
	case k.State == "pending" && k.Activates == 0:
		fmt.Fprintf(w, "active\twhen the key is rotated\n")
	case k.Activates != 0:
		fmt.Fprintf(w, "active\tfrom %s on\nuses\t%d\n", date(k.Activates), k.Uses)
	}
	if k.Retires != 0 {
		fmt.Fprintf(w, "accepted\tuntil %s\n", date(k.Retires))
	}
	if k.Next != "" {
		fmt.Fprintf(w, "next\tSHA-256 of its public key is %s\n", k.Next)
	}
}

func either(is bool, yes, no string) string {
	if is {
		return yes
	}
	return no
}

func date(unix int64) string { return time.Unix(unix, 0).UTC().Format(time.RFC3339) }
