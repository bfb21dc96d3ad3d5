package main

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"countersign/audit"
	"countersign/client"
	"countersign/internal/ijson"
	"countersign/transcript"

	"github.com/spf13/cobra"
)

// server has the flags of every command that talks to the listener. Each has an environment variable for its default.
type server struct {
	address, key, identity, logKey string
	timeout                        time.Duration
	command                        *cobra.Command
	lines                          []client.KeyLine // to be pinned
}

func (s *server) flags(c *cobra.Command) {
	s.command = c
	f := c.Flags()
	f.StringVar(&s.address, "server", os.Getenv("COUNTERSIGN_SERVER"), "the appliance's listener, HOST:PORT (or COUNTERSIGN_SERVER)")
	f.StringVar(&s.key, "server-key", os.Getenv("COUNTERSIGN_SERVER_KEY"), "the listener's public key, 64 hex digits (or COUNTERSIGN_SERVER_KEY)")
	f.StringVar(&s.identity, "identity", os.Getenv("COUNTERSIGN_IDENTITY"), "this peer's identity file, from keygen (or COUNTERSIGN_IDENTITY)")
	f.StringVar(&s.logKey, "log-key", os.Getenv("COUNTERSIGN_LOG_KEY"), "the audit log's verifier key: refuse what is not proven to be in the log (or COUNTERSIGN_LOG_KEY)")
	f.DurationVar(&s.timeout, "timeout", 15*time.Second, "how long to wait in all")
}

// config reads the flags.
func (s *server) config() (client.Config, error) {
	for _, f := range []struct{ name, value string }{{"server", s.address}, {"server-key", s.key}, {"identity", s.identity}} {
		if f.value == "" {
			return client.Config{}, usageError{fmt.Errorf("--%s is missing", f.name)}
		}
	}
	key, err := client.ParseKey(s.key)
	if err != nil {
		return client.Config{}, usageError{fmt.Errorf("--server-key: %w", err)}
	}
	id, err := client.ReadIdentity(s.identity)
	return client.Config{Address: s.address, ServerKey: key, Identity: id, LogKey: s.logKey, Lines: s.lines}, err
}

// with connects and calls use.
func (s *server) with(ctx context.Context, use func(context.Context, *client.Client) error) error {
	config, err := s.config()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	// One command is no place to keep what it is told: people are, and countersign watch acknowledges.
	var mu sync.Mutex
	var serverKey client.Rotation
	config.Unacknowledged = true
	config.OnRotation = func(r client.Rotation) {
		mu.Lock()
		defer mu.Unlock()
		if r.Key == client.NoiseKey && r.Err == nil {
			serverKey = r
		}
	}
	c, err := client.Dial(ctx, config)
	if err != nil {
		return err
	}
	defer c.Close()
	err = use(ctx, c)
	mu.Lock()
	defer mu.Unlock()
	if serverKey.Key != "" {
		warnServerKey(s.command.ErrOrStderr(), serverKey)
	}
	return err
}

// warnServerKey tells people which key of the listener to configure.
func warnServerKey(w io.Writer, r client.Rotation) {
	at := func(t time.Time) string { return t.UTC().Format(time.RFC3339) }
	fmt.Fprintf(w, "countersign: the listener's key is replaced: from %s on use --server-key %x (or COUNTERSIGN_SERVER_KEY)", at(r.ActivatesAt), r.New.PublicKey)
	if r.Compromised {
		fmt.Fprint(w, "; the private key of the old one is in wrong hands\n")
		return
	}
	fmt.Fprintf(w, "; the old one answers until %s at the most\n", at(r.RetiresAt))
}

func (t *tool) keygen() *cobra.Command {
	var path string
	c := command("keygen [FILE]", "Make a peer's identity file and print its public key", cobra.MaximumNArgs(1), func(cmd *cobra.Command, args []string) error {
		if (len(args) == 1) == (path != "") {
			return usageError{errors.New("name the file once: keygen FILE, or keygen --identity FILE")}
		}
		if len(args) == 1 {
			path = args[0]
		}
		id, err := client.WriteIdentity(path)
		if err != nil {
			return err
		}
		public := hex.EncodeToString(func() []byte { p := id.Public(); return p[:] }())
		return t.print(map[string]string{"public_key": public, "file": path}, func(w io.Writer) { fmt.Fprintln(w, public) })
	})
	c.Flags().StringVar(&path, "identity", "", "the file to write")
	return c
}

func (t *tool) ping() *cobra.Command {
	var s server
	c := command("ping", "Ask the appliance for a sign of life", cobra.NoArgs, func(cmd *cobra.Command, _ []string) error {
		return s.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
			begin := time.Now()
			at, err := c.Ping(ctx)
			if err != nil {
				return err
			}
			took := time.Since(begin)
			return t.print(map[string]any{"time": at.Unix(), "round_trip_us": took.Microseconds()}, func(w io.Writer) {
				fmt.Fprintf(w, "pong in %v, the appliance's clock says %s\n", took.Round(10*time.Microsecond), at.UTC().Format(time.RFC3339))
			})
		})
	})
	s.flags(c)
	return c
}

func (t *tool) keys() *cobra.Command {
	var s server
	c := command("keys", "List the signing keys", cobra.NoArgs, func(cmd *cobra.Command, _ []string) error {
		return s.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
			keys, err := c.Keys(ctx)
			if err != nil {
				return err
			}
			type doc struct {
				Name      string `json:"name"`
				Version   uint32 `json:"version"`
				Algorithm string `json:"algorithm"`
				State     string `json:"state"`
				Custody   string `json:"custody"`
				PublicKey string `json:"public_key"`
				Next      string `json:"next,omitempty"`
			}
			docs := []doc{}
			for _, k := range keys {
				d := doc{k.Name, k.Version, k.Algorithm, k.State, k.Custody, hex.EncodeToString(k.PublicKey[:]), ""}
				if k.Next != nil {
					d.Next = hex.EncodeToString(k.Next[:])
				}
				docs = append(docs, d)
			}
			return t.print(docs, func(w io.Writer) {
				fmt.Fprintln(w, "NAME\tVERSION\tALGORITHM\tSTATE\tCUSTODY\tPUBLIC KEY")
				for _, d := range docs {
					fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\n", d.Name, d.Version, d.Algorithm, d.State, d.Custody, d.PublicKey)
				}
			})
		})
	})
	s.flags(c)
	return c
}

func (t *tool) sign() *cobra.Command {
	var s server
	var key, typ, msgContext, as, nonce, line string
	var expires time.Duration
	var timestamp int64
	c := command("sign [FILE|-]", "Have a document signed", cobra.MaximumNArgs(1), func(cmd *cobra.Command, args []string) error {
		if msgContext != "" && typ == "" {
			typ = "message-v1"
		}
		switch {
		case key == "" || typ == "":
			return usageError{errors.New("--key and --type are needed")}
		case msgContext != "" && typ != "message-v1":
			return usageError{errors.New("--context is for --type message-v1")}
		case as != "" && !slices.Contains(parties, as):
			return usageError{fmt.Errorf("--as is one of %s", strings.Join(parties, ", "))}
		case expires < time.Second:
			return usageError{errors.New("--expires must be at least 1s")}
		}
		if line != "" {
			pinned, err := readLine(line)
			if err != nil {
				return err
			}
			if pinned.Key != key {
				return usageError{fmt.Errorf("%s is the line of %q, not of %q", line, pinned.Key, key)}
			}
			s.lines = []client.KeyLine{pinned}
		}
		d := client.Document{Type: typ, Timestamp: timestamp}
		if nonce != "" {
			b, err := hex.DecodeString(nonce)
			if err != nil || len(b) != len(d.Nonce) {
				return usageError{errors.New("--nonce is 64 hex digits")}
			}
			d.Nonce = [32]byte(b)
		}
		if d.Timestamp == 0 {
			d.Timestamp = time.Now().Unix()
		}
		d.ExpiresAt = d.Timestamp + int64(expires/time.Second)
		if _, err := s.config(); err != nil { // before anything is read from a terminal
			return err
		}
		input, err := t.readInput(args)
		if err != nil {
			return err
		}
		d.Payload = input
		if msgContext != "" {
			sum := sha256.Sum256(input)
			if d.Payload, err = json.Marshal(map[string]string{"context": msgContext, "sha256": base64.RawURLEncoding.EncodeToString(sum[:])}); err != nil {
				return err
			}
		}
		if _, err := ijson.Parse(d.Payload); err != nil {
			return fmt.Errorf("%w: payload: %w; for a file of any kind use --context", transcript.ErrMalformed, err)
		}
		return s.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
			if as != "" {
				if d.Payload, err = setParty(ctx, c, d.Payload, as, key); err != nil {
					return err
				}
			}
			signed, err := c.Sign(ctx, key, d)
			if err != nil {
				return err
			}
			doc, err := signed.Encode()
			if err != nil {
				return err
			}
			if newest, ok := c.Pinned(key); ok && newest.Version != s.lines[0].Version {
				fmt.Fprintf(t.stderr, "countersign: %s is at version %d, its line goes on to version %d: countersign line follow %s --write\n", line, s.lines[0].Version, newest.Version, line)
			}
			return t.print(json.RawMessage(doc), func(w io.Writer) {
				b64 := base64.RawURLEncoding.EncodeToString
				fmt.Fprintf(w, "signature\t%s\n", b64(signed.Signature))
				fmt.Fprintf(w, "public key\t%x\n", signed.PublicKey)
				fmt.Fprintf(w, "key\t%s, version %d\n", signed.Key, signed.Version)
				fmt.Fprintf(w, "nonce\t%s\n", b64(signed.Nonce[:]))
				fmt.Fprintf(w, "valid\t%s to %s\n", time.Unix(signed.Timestamp, 0).UTC().Format(time.RFC3339), time.Unix(signed.ExpiresAt, 0).UTC().Format(time.RFC3339))
				fmt.Fprintf(w, "event\t%d\n", signed.Event)
				if signed.Receipt != nil {
					fmt.Fprintf(w, "receipt\t%x, salt %x\n", signed.Receipt.ID, signed.Receipt.Salt)
				}
				if signed.Repeated {
					fmt.Fprintf(w, "repeated\tthis request had been admitted before\n")
				}
			})
		})
	})
	c.Long = "Has a document signed with the active version of a key. FILE is the payload of the transcript type in JSON.\n" +
		"With --context it is a file of any kind, and its SHA-256 is signed as message-v1 in that context.\n" +
		"With --json the signed document is printed, which verify reads."
	s.flags(c)
	f := c.Flags()
	f.StringVar(&key, "key", "", "the name of the key")
	f.StringVar(&typ, "type", "", "the transcript type (list them with: countersign transcript list)")
	f.DurationVar(&expires, "expires", time.Hour, "how long the document is valid")
	f.StringVar(&msgContext, "context", "", "sign a file of any kind in this context (message-v1)")
	f.StringVar(&as, "as", "", "put the signing key's public key into this field of the payload: "+strings.Join(parties, ", "))
	f.StringVar(&line, "line", "", "the file of a pinned line (countersign line pin): refuse a signature by a version that does not follow from it")
	f.StringVar(&nonce, "nonce", "", "the nonce, 64 hex digits (default: random)")
	f.Int64Var(&timestamp, "timestamp", 0, "valid from, in Unix seconds (default: now)")
	return c
}

// parties are the fields of payloads that name who may sign.
var parties = []string{"subscriber", "provider", "payer", "payee", "owner"}

// setParty puts the active public key into a field of the payload.
func setParty(ctx context.Context, c *client.Client, payload []byte, field, key string) ([]byte, error) {
	keys, err := c.Keys(ctx)
	if err != nil {
		return nil, err
	}
	object, err := ijson.Parse(payload)
	if err != nil {
		return nil, fmt.Errorf("%w: payload: %w", transcript.ErrMalformed, err)
	}
	for _, k := range keys {
		if k.Name == key && k.State == "active" {
			object.Members[field] = fmt.Appendf(nil, `"%x"`, k.PublicKey)
			return json.Marshal(object.Members)
		}
	}
	return nil, &client.Error{Code: "unknown_key", Message: fmt.Sprintf("there is no signing key %q", key)}
}

func (t *tool) verify() *cobra.Command {
	var s server
	var key string
	c := command("verify [FILE|-]", "Have a signed document judged, and its nonce spent", cobra.MaximumNArgs(1), func(cmd *cobra.Command, args []string) error {
		input, err := t.readInput(args)
		if err != nil {
			return err
		}
		signed, err := client.DecodeSigned(input)
		if err != nil {
			return fmt.Errorf("%w: %w", transcript.ErrMalformed, err)
		}
		if signed.Signature == nil {
			return fmt.Errorf("%w: it has no signature", transcript.ErrMalformed)
		}
		return s.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
			event, err := c.Verify(ctx, key, signed)
			if err != nil {
				return err
			}
			return t.print(map[string]any{"valid": true, "event": event}, func(w io.Writer) { fmt.Fprintf(w, "valid, recorded as event %d\n", event) })
		})
	})
	c.Long = "Has a signed document judged: signature, times, signer, and that it was not seen before. FILE is what sign --json\n" +
		"prints. A document is good once; the second time it is a replay."
	s.flags(c)
	c.Flags().StringVar(&key, "key", "", "the signature must be by this key of the appliance (default: by any key that the document allows)")
	return c
}

func (t *tool) proof() *cobra.Command {
	var s server
	c := command("proof EVENT", "Get the proof that one of your events is in the appliance's audit log", cobra.ExactArgs(1), func(cmd *cobra.Command, args []string) error {
		event, err := strconv.ParseUint(args[0], 10, 64)
		if err != nil {
			return usageError{fmt.Errorf("%q is not the number of an event", args[0])}
		}
		return s.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
			p, err := c.Proof(ctx, event)
			if err != nil {
				return err
			}
			checked := "no: without --log-key it can't be"
			if s.logKey != "" {
				log, err := audit.ParseVerifierKey(s.logKey)
				if err != nil {
					return err
				}
				if _, _, err := log.Check(p); err != nil {
					return fmt.Errorf("%w: %w", client.ErrUnproven, err)
				}
				checked = "yes"
			}
			out := map[string]any{"event": p.Event, "index": p.Index, "leaf": p.Leaf, "path": p.Path, "checkpoint": string(p.Checkpoint), "checked": s.logKey != ""}
			return t.print(out, func(w io.Writer) {
				fmt.Fprintf(w, "event\t%d, leaf %d of its epoch\nleaf\t%s\n", p.Event, p.Index, p.Leaf)
				for _, h := range p.Path {
					fmt.Fprintf(w, "path\t%s\n", h)
				}
				fmt.Fprintf(w, "checked\t%s\n\n%s", checked, p.Checkpoint)
			})
		})
	})
	s.flags(c)
	return c
}
