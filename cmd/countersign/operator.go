package main

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"countersign/admin/api"
	"countersign/internal/keystore"

	"github.com/spf13/cobra"
)

// socketError marks a failure to reach the admin socket.
type socketError struct{ error }

func (s socketError) Unwrap() error { return s.error }

// apiCall is the work of a command with the admin API. A maker makes such a command.
type (
	apiCall func(ctx context.Context, c *api.Client, args []string) error
	maker   func(use, short string, args cobra.PositionalArgs, do apiCall) *cobra.Command
)

// longTimeout is the timeout of slow commands, for example of a compaction or an export.
const longTimeout = 24 * time.Hour

func reasonFlag(c *cobra.Command, reason *string) {
	c.Flags().StringVar(reason, "reason", "", "the reason, a `text` of 1 to 500 bytes for the audit log (required)")
}

func (t *tool) admin() *cobra.Command {
	c := group("admin", "Manage an appliance, on its machine or from yours")
	t.addressFlags(c.PersistentFlags())
	c.PersistentFlags().BoolVar(&t.proposeOnly, "propose-only", false,
		"only propose an act that needs approval, without approving the proposal")

	// act makes a command that calls the API.
	act := func(use, short string, args cobra.PositionalArgs, do apiCall) *cobra.Command {
		return command(use, short, args, func(cmd *cobra.Command, args []string) error {
			timeout := time.Minute
			if cmd.Annotations["long"] != "" {
				timeout = longTimeout
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			api, err := t.dialAdmin()
			if err != nil {
				return err
			}
			return do(ctx, api, args)
		})
	}

	noiseKey := act("noise-key", "Print the listener's public key, for --server-key of the peers", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			k, err := c.NoiseKey(ctx)
			if err != nil {
				return err
			}
			return t.print(k, func(w io.Writer) { fmt.Fprintln(w, k.PublicKey) })
		})
	c.AddCommand(t.adminKeys(act), t.peers(act), t.groups(act), t.tokens(act), t.rollback(act), t.adminAudit(act),
		noiseKey, t.policyVersions(act), t.retention(act), t.receipts(act), t.ledger(act), t.backups(act),
		t.metrics(act), t.history(act), t.stream(act), t.alerts(act), t.holders(act))
	c.AddCommand(t.people(act)...)
	return c
}

func (t *tool) adminKeys(act maker) *cobra.Command {
	var algorithm, token string
	var recoverable bool
	create := act("create NAME", "Create a signing key in a token", cobra.ExactArgs(1),
		func(ctx context.Context, c *api.Client, args []string) error {
			k, err := c.CreateKey(ctx, api.NewKey{
				Name: args[0], Algorithm: algorithm, Token: token, Recoverable: recoverable,
			})
			if err != nil {
				return err
			}
			return t.print(k, func(w io.Writer) { showKey(w, k) })
		})
	details(create, "A key never leaves its token. With --recoverable, a key worker makes its private key, and seals\n"+
		"a copy for the recovery holders (countersign admin holders) before the token gets the key: any M\n"+
		"of the N holders together can bring the key back, on another token too. All later versions of the\n"+
		"key are made the same way. This is decided here, once, and shown for ever as the key's custody.")
	create.Example = "  countersign admin key create payments\n" +
		"  countersign admin key create invoices --recoverable\n" +
		"  countersign admin key create tls --algorithm p256"
	create.Flags().StringVar(&algorithm, "algorithm", "ed25519", "the `algorithm`: ed25519, or p256 for TLS")
	create.Flags().BoolVar(&recoverable, "recoverable", false, "seal a copy of each version for the recovery holders")

	importKey := act("import NAME SEED_FILE", "Import an Ed25519 seed from a file on the appliance", cobra.ExactArgs(2),
		func(ctx context.Context, c *api.Client, args []string) error {
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
	details(importKey, "The file holds 32 bytes, or 64 hex digits, or keypair-seed: and base64url. Only its owner\n"+
		"may have access. The key worker reads the file, once; this command does not. The key can't be taken\n"+
		"out of the token again, and is shown as imported for ever. Destroy the file afterwards: its seed\n"+
		"can sign without the appliance.")
	importKey.Example = "  countersign admin key import old seed"
	for _, c := range []*cobra.Command{create, importKey} {
		c.Flags().StringVar(&token, "token", "", "the `name` of the token (required with several tokens)")
	}

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
					fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\t%s\t%s\n",
						k.Name, k.Version, k.Algorithm, versionState(k.State, k.Compromised), k.Custody, k.Origin,
						k.Token, k.PublicKey)
				}
			})
		}),
		act("show NAME", "Show a key's versions, its rotation settings, and the peers that have not acknowledged",
			cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
				return t.showVersions(ctx, c, args[0])
			}),
	)
	key.AddCommand(t.keyLife(act)...)
	key.Aliases = []string{"keys"}
	return key
}

func (t *tool) tokens(act maker) *cobra.Command {
	return group("token", "Show tokens, and log in again",
		act("list", "List the tokens with the state of their key workers", cobra.NoArgs,
			func(ctx context.Context, c *api.Client, _ []string) error {
				tokens, err := c.Tokens(ctx)
				if err != nil {
					return err
				}
				return t.print(tokens, func(w io.Writer) {
					fmt.Fprintln(w, "TOKEN\tSTATE\tWORKER\tPID\tSERVED\tREPLACED\tCAUSE")
					for _, tk := range tokens {
						for i, worker := range tk.Workers {
							fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%d\t%d\t%s\n", tk.Name, either(tk.Up, "up", "down"),
								i+1, worker.PID, worker.Served, worker.Restarts, tk.Cause)
						}
					}
				})
			}),
		act("show NAME", "Ask a token's device what it is; of a TPM, compare its registers with the sealed state",
			cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
				tk, err := c.Token(ctx, args[0])
				if err != nil {
					return err
				}
				return t.print(tk, func(w io.Writer) {
					fmt.Fprintf(w, "token\t\t%s, %s\n", tk.Name, either(tk.Up, "up", "down: "+tk.Cause))
					for _, f := range tk.Findings {
						fmt.Fprintf(w, "%s\t%s\t%s%s\n", f.What, f.For, either(f.OK, "", "NOT GOOD: "), f.Text)
					}
				})
			}),
		act("retry NAME", "Log in to a token again, after its PIN was refused and the PIN file is corrected",
			cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
				if err := c.RetryToken(ctx, args[0]); err != nil {
					return err
				}
				return t.said("retried", args[0])
			}),
	)
}

func (t *tool) peers(act maker) *cobra.Command {
	// one makes a command about one peer that has no document to show.
	one := func(use, short, did string, call func(*api.Client, context.Context, string) error) *cobra.Command {
		return act(use, short, cobra.ExactArgs(1), func(ctx context.Context, c *api.Client, args []string) error {
			if err := call(c, ctx, args[0]); err != nil {
				return err
			}
			return t.said(did, args[0])
		})
	}
	add := act("add NAME PUBLIC_KEY", "Enrol a peer by its public key, under approval", cobra.ExactArgs(2),
		func(ctx context.Context, c *api.Client, args []string) error {
			return t.propose(ctx, c, "peer add", "", "name", args[0], "public_key", publicKeyText(args[1]))
		})
	details(add, "PUBLIC_KEY is the 64 hex digits that countersign keygen has printed for the peer.")
	add.Example = "  countersign admin peer add shop 2fe57da347cd62431528daac5fbb290730fff684afc4cfc2ed90995f58cb3b74"
	return group("peer", "Enrol, suspend and remove peers, and change their keys",
		add, t.peerKeys(act), t.refusedHandshakes(act),
		act("list", "List the enrolled peers, a line for each of their keys", cobra.NoArgs,
			func(ctx context.Context, c *api.Client, _ []string) error {
				peers, err := c.Peers(ctx)
				if err != nil {
					return err
				}
				return t.print(peers, func(w io.Writer) { showPeers(w, peers) })
			}),
		act("show NAME", "Show a peer with its keys", cobra.ExactArgs(1),
			func(ctx context.Context, c *api.Client, args []string) error {
				p, err := c.Peer(ctx, args[0])
				if err != nil {
					return err
				}
				return t.print(p, func(w io.Writer) { showPeers(w, []api.Peer{p}) })
			}),
		t.peerActivity(act),
		one("suspend NAME", "Close a peer's connections and refuse new ones until it is resumed", "suspended",
			(*api.Client).SuspendPeer),
		one("resume NAME", "Accept connections of a suspended peer again", "resumed", (*api.Client).ResumePeer),
		one("remove NAME", "Remove a peer's enrolment and close its connections", "removed", (*api.Client).RemovePeer),
	)
}

func (t *tool) peerActivity(act maker) *cobra.Command {
	limit := 20
	c := act("activity [NAME]", "Show what peers were answered in the last hour", cobra.MaximumNArgs(1),
		func(ctx context.Context, c *api.Client, args []string) (err error) {
			var all []api.PeerActivity
			if len(args) == 0 {
				all, err = c.Activity(ctx, limit)
			} else {
				all = make([]api.PeerActivity, 1)
				all[0], err = c.PeerActivity(ctx, args[0])
			}
			if err != nil {
				return err
			}
			return t.print(all, func(w io.Writer) {
				fmt.Fprintln(w, "PEER\tSIGNATURES\tVERIFICATIONS\tREFUSED\tOTHERS\tEACH MINUTE")
				for _, a := range all {
					each := make([]*float32, len(a.Signatures))
					for i := range each {
						n := float32(a.Signatures[i] + a.Verifications[i] + a.Refused[i] + a.Others[i])
						each[i] = &n
					}
					fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%s\n", a.Name, sum(a.Signatures), sum(a.Verifications),
						sum(a.Refused), sum(a.Others), sparkline(each))
				}
			})
		})
	details(c, "Without a name, the peers with the most answers are shown, the busiest first. The daemon counts from\n"+
		"its start on. What policy and limits do to a peer shows as refused; docs/OPERATIONS.md has the story\n"+
		"of a single request.")
	c.Flags().IntVar(&limit, "limit", limit, "show at most this `number` of peers, 1 to 100")
	return c
}

func sum(all []uint32) (n uint64) {
	for _, each := range all {
		n += uint64(each)
	}
	return n
}

func showPeers(w io.Writer, peers []api.Peer) {
	fmt.Fprintln(w, "NAME\tPUBLIC KEY\tADDED\tLAST SEEN\tCONNECTIONS\tSTATE")
	for _, p := range peers {
		state := either(p.Suspended, "suspended", "enrolled")
		for _, k := range p.Keys {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\n",
				p.Name, k.PublicKey, date(k.Added), lastSeen(k.LastSeen), k.Connections, state)
		}
	}
}

func lastSeen(at int64) string {
	if at == 0 {
		return "never"
	}
	return date(at)
}

func (t *tool) peerKeys(act maker) *cobra.Command {
	add := act("add NAME PUBLIC_KEY", "Enrol a further key of a peer, under approval", cobra.ExactArgs(2),
		func(ctx context.Context, c *api.Client, args []string) error {
			p, err := c.Peer(ctx, args[0])
			if err != nil {
				return err
			}
			return t.propose(ctx, c, "peer key add", "",
				"name", args[0], "enrolled", date(p.Added), "public_key", publicKeyText(args[1]))
		})
	details(add, "PUBLIC_KEY is the 64 hex digits that countersign keygen has printed for the peer. All keys of a\n"+
		"peer work until they are removed. Policy, groups, windows, quotas and nonces belong to the name\n"+
		"of the peer, so that a new key changes none of them.")
	add.Example = "  countersign admin peer key add shop " +
		"2fe57da347cd62431528daac5fbb290730fff684afc4cfc2ed90995f58cb3b74"
	remove := act("remove NAME PUBLIC_KEY", "Remove a key of a peer and close the connections of the key",
		cobra.ExactArgs(2), func(ctx context.Context, c *api.Client, args []string) error {
			key := publicKeyText(args[1])
			if err := c.RemovePeerKey(ctx, args[0], key); err != nil {
				return err
			}
			return t.said("removed", args[0]+" "+key)
		})
	details(remove, "Connections with the other keys of the peer go on. The last key of a peer can't be removed:\n"+
		"countersign admin peer remove ends the enrolment. After an error, type the command again.")
	remove.Example = "  countersign admin peer key remove shop " +
		"2fe57da347cd62431528daac5fbb290730fff684afc4cfc2ed90995f58cb3b74"
	return group("key", "Add and remove keys of a peer", add, remove)
}

func (t *tool) adminAudit(act maker) *cobra.Command {
	key := act("key", "Print the log's verifier key, for countersign audit verify and other tools", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			l, err := c.Log(ctx)
			if err != nil {
				return err
			}
			if _, err := t.pinLog(l.VerifierKey); err != nil {
				return err
			}
			return t.print(l, func(w io.Writer) { fmt.Fprintln(w, l.VerifierKey) })
		})
	endEpoch := act("end-epoch", "End the present epoch of the log, and begin the next one", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			l, err := c.EndEpoch(ctx)
			if err != nil {
				return err
			}
			return t.print(l, func(w io.Writer) {
				fmt.Fprintf(w, "epoch\t%d has begun\nverifier key\t%s\n", l.Epoch, l.VerifierKey)
			})
		})
	return group("audit", "List and export the audit log", t.events(act), t.story(act), key, t.export(), t.report(),
		t.sinks(act), endEpoch)
}

func (t *tool) rollback(act maker) *cobra.Command {
	var reason string
	accept := act("accept", "Accept a ledger that is older than its counter, and admit requests again, under approval",
		cobra.NoArgs, func(ctx context.Context, c *api.Client, _ []string) error {
			return t.propose(ctx, c, "rollback accept", "", "reason", reason)
		})
	details(accept, "An older copy of the ledger does not have the nonces that were spent after the copy was made.\n"+
		"Documents with these nonces can be signed again and verified again. First find out how the copy\n"+
		"came into the place of the newest ledger, and put the newest one back if you have it. See\n"+
		"docs/INCIDENTS.md, a rollback alert.")
	reasonFlag(accept, &reason)
	show := act("show", "Show whether the ledger is older than its counter", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			r, err := c.Rollback(ctx)
			if err != nil {
				return err
			}
			return t.print(r, func(w io.Writer) {
				switch {
				case r.Detected:
					fmt.Fprintf(w, "detected\t%s\nreason\t%s\nledger\t%d\ncounter\t%d\n",
						date(r.At), r.Reason, r.Ledger, r.Counter)
				case r.Token == "":
					fmt.Fprintln(w, "not known: the ledger has no counter (rollback_token), so no rollback is detected")
				case r.Unread != "":
					fmt.Fprintf(w, "not known yet: %s\n", r.Unread)
				default:
					fmt.Fprintf(w, "no rollback: the ledger is the newest by the counter of token %s\n", r.Token)
				}
			})
		})
	return group("rollback", "Show a rollback of the ledger, and accept it", accept, show)
}

func showKey(w io.Writer, k api.Key) {
	p := k.Provenance
	made := fmt.Sprintf("%s, %s, %s", either(p.Local, "made inside the device", "made elsewhere"),
		either(p.AlwaysSensitive, "never readable", "once readable"),
		either(p.NeverExtractable, "never extractable", "once extractable"))
	if keystore.Custody(k.Custody).Recoverable() {
		made = "made by a key worker, which has sealed a copy for the recovery holders"
	} else if k.Custody == string(keystore.TPMSealed) { // a sealed key is in this machine's memory while in use
		made = either(p.Local, "made by a key worker of random numbers of the TPM and the system", "made elsewhere") +
			", and sealed by the TPM"
	} else if p.Unreported {
		made = "made by the device when the appliance asked for it; the device does not report so"
	}
	fmt.Fprintf(w, "key\t%s, version %d\nalgorithm\t%s\nstate\t%s\n", k.Name, k.Version, k.Algorithm,
		versionState(k.State, k.Compromised))
	fmt.Fprintf(w, "custody\t%s, on token %s\norigin\t%s: %s\n", k.Custody, k.Token, k.Origin, made)
	fmt.Fprintf(w, "created\t%s\npublic key\t%s\n", date(k.Created), k.PublicKey)
	switch {
	case k.Recovery:
		fmt.Fprintf(w, "active\tafter the loss of the token, by admin key recover\n")
	case k.State == "pending" && k.Activates == 0:
		fmt.Fprintf(w, "active\twhen the key is rotated\n")
	case k.Activates != 0:
		fmt.Fprintf(w, "active\tfrom %s on\nuses\t%d\n", date(k.Activates), k.Uses)
	}
	if k.Retires != 0 && !k.Compromised {
		fmt.Fprintf(w, "accepted\tuntil %s\n", date(k.Retires))
	}
	if k.Next != "" {
		fmt.Fprintf(w, "next\tSHA-256 of its public key is %s\n", k.Next)
	}
}

// versionState is the state of a version for a person: a compromise does not end with the key.
func versionState(state string, compromised bool) string {
	return state + either(compromised && state != "compromised", ", compromised", "")
}

func either(is bool, yes, no string) string {
	if is {
		return yes
	}
	return no
}

func date(unix int64) string { return time.Unix(unix, 0).UTC().Format(time.RFC3339) }
