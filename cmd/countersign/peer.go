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

	"countersign/client"
	"countersign/internal/ijson"
	"countersign/transcript"

	"github.com/spf13/cobra"
)

// server has the flags of every command with a connection to the listener. The default of a flag is
// in an environment variable.
type server struct {
	address, key, identity string
	logKey, logCheckpoint  string
	timeout                time.Duration
	command                *cobra.Command
	lines                  []client.KeyLine // to be pinned
}

func (s *server) flags(c *cobra.Command) {
	s.command = c
	f := c.Flags()
	f.StringVar(&s.address, "server", os.Getenv("COUNTERSIGN_SERVER"),
		"the appliance's listener, `HOST:PORT` (or COUNTERSIGN_SERVER)")
	f.StringVar(&s.key, "server-key", os.Getenv("COUNTERSIGN_SERVER_KEY"),
		"the listener's `public key`, 64 hex digits (or COUNTERSIGN_SERVER_KEY)")
	f.StringVar(&s.identity, "identity", os.Getenv("COUNTERSIGN_IDENTITY"),
		"this peer's identity `file`, from countersign keygen (or COUNTERSIGN_IDENTITY)")
	f.StringVar(&s.logKey, "log-key", os.Getenv("COUNTERSIGN_LOG_KEY"),
		"the audit log's `verifier key`: refuse an event without a proof that the log has it "+
			"(or COUNTERSIGN_LOG_KEY; default: no proof)")
	f.StringVar(&s.logCheckpoint, "log-checkpoint", os.Getenv("COUNTERSIGN_LOG_CHECKPOINT"),
		"remember the audit log in this `file`, and refuse a log that does not continue it; with --log-key "+
			"(or COUNTERSIGN_LOG_CHECKPOINT; default: no memory)")
	s.timeout = 15 * time.Second
	f.Var(duration{&s.timeout}, "timeout",
		"the timeout, a `duration` such as 15s, of connecting and answer together")
}

// config reads the flags.
func (s *server) config() (client.Config, error) {
	for _, f := range []struct{ name, env, value string }{
		{"server", "COUNTERSIGN_SERVER", s.address},
		{"server-key", "COUNTERSIGN_SERVER_KEY", s.key},
		{"identity", "COUNTERSIGN_IDENTITY", s.identity},
	} {
		if f.value == "" {
			return client.Config{}, usageError{fmt.Errorf("--%s is missing: add the flag, or set %s", f.name, f.env)}
		}
	}
	var key [32]byte
	text, err := hexOf(s.key)
	if err == nil {
		key, err = client.ParseKey(text)
	}
	if err != nil {
		return client.Config{}, usageError{fmt.Errorf("--server-key: %w", err)}
	}
	id, err := client.ReadIdentity(s.identity)
	return client.Config{
		Address: s.address, ServerKey: key, Identity: id, Lines: s.lines,
		LogKey: s.logKey, LogCheckpoint: s.logCheckpoint,
		Traceparent: func(context.Context) string { return os.Getenv("TRACEPARENT") },
	}, err
}

// with connects and calls use.
func (s *server) with(ctx context.Context, use func(context.Context, *client.Client) error) error {
	config, err := s.config()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	// A short-lived command can't store a new server key, so the command prints the key for people
	// and leaves the acknowledgement to countersign watch.
	var mu sync.Mutex
	var serverKey client.Rotation
	var stolen []client.Compromise
	config.Unacknowledged = true
	config.OnRotation = func(r client.Rotation) {
		mu.Lock()
		defer mu.Unlock()
		if r.Key == client.NoiseKey && r.Err == nil {
			serverKey = r
		}
	}
	if len(s.lines) == 0 { // with a pinned line, a compromise is an error
		config.OnCompromise = func(_ context.Context, v client.Compromise) {
			mu.Lock()
			defer mu.Unlock()
			stolen = append(stolen, v)
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
	for _, v := range stolen {
		fmt.Fprintf(s.command.ErrOrStderr(), "countersign: version %d of %q is COMPROMISED: believe none of its "+
			"signatures; countersign watch acknowledges, and so does line follow --write\n", v.Version, v.Key)
	}
	if serverKey.Key != "" {
		warnServerKey(s.command.ErrOrStderr(), serverKey)
	}
	return err
}

// warnServerKey tells people to configure the listener's new key.
func warnServerKey(w io.Writer, r client.Rotation) {
	if r.Cancelled != 0 {
		fmt.Fprintf(w, "countersign: the listener's key is not replaced, the announced rotation is called off: "+
			"use --server-key %x (or COUNTERSIGN_SERVER_KEY)\n", r.Event.PublicKey)
		return
	}
	fmt.Fprintf(w, "countersign: the listener's key is replaced: "+
		"from %s on use --server-key %x (or COUNTERSIGN_SERVER_KEY)", date(r.Event.ActivatesAt), r.New.PublicKey)
	fmt.Fprintf(w, "; the old one answers until %s at the most\n", date(r.Event.RetiresAt))
}

func (t *tool) keygen() *cobra.Command {
	var path string
	do := func(cmd *cobra.Command, args []string) error {
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
		public := fmt.Sprintf("%x", id.Public())
		out := map[string]string{"public_key": public, "file": path}
		return t.print(out, func(w io.Writer) { fmt.Fprintln(w, public) })
	}
	c := command("keygen [FILE]", "Make an identity file for a peer, and print its public key",
		cobra.MaximumNArgs(1), do)
	c.Example = "  countersign keygen shop.key >shop.pub"
	c.Flags().StringVar(&path, "identity", "", "the new `file`, in place of the argument")
	return c
}

func (t *tool) ping() *cobra.Command {
	var s server
	do := func(cmd *cobra.Command, _ []string) error {
		return s.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
			begin := time.Now()
			at, err := c.Ping(ctx)
			if err != nil {
				return err
			}
			took := time.Since(begin)
			out := map[string]any{"time": at.Unix(), "round_trip_us": took.Microseconds()}
			return t.print(out, func(w io.Writer) {
				fmt.Fprintf(w, "pong in %v, the appliance's clock says %s\n",
					took.Round(10*time.Microsecond), date(at.Unix()))
			})
		})
	}
	c := command("ping", "Check that the appliance answers, and print its clock", cobra.NoArgs, do)
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
				// Compromised stays set for ever, also when the version is destroyed.
				Compromised bool   `json:"compromised,omitempty"`
				Next        string `json:"next,omitempty"`
				Recovery    string `json:"recovery,omitempty"`
			}
			docs := []doc{}
			for _, k := range keys {
				d := doc{k.Name, k.Version, k.Algorithm, k.State, k.Custody, hex.EncodeToString(k.PublicKey[:]),
					k.Compromised, "", ""}
				if k.Next != nil {
					d.Next = hex.EncodeToString(k.Next[:])
				}
				if k.Recovery != nil {
					d.Recovery = hex.EncodeToString(k.Recovery[:])
				}
				docs = append(docs, d)
			}
			return t.print(docs, func(w io.Writer) {
				fmt.Fprintln(w, "NAME\tVERSION\tALGORITHM\tSTATE\tCUSTODY\tPUBLIC KEY")
				for _, d := range docs {
					fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%s\n",
						d.Name, d.Version, d.Algorithm, versionState(d.State, d.Compromised), d.Custody, d.PublicKey)
				}
			})
		})
	})
	s.flags(c)
	return c
}

// signFlags are the flags of countersign sign.
type signFlags struct {
	server
	keyName, typ, context, as, nonce, line string
	expires                                time.Duration
	timestamp                              int64
}

func (t *tool) sign() *cobra.Command {
	var of signFlags
	c := command("sign [FILE|-]", "Have a document signed by the active version of a key", cobra.MaximumNArgs(1),
		func(cmd *cobra.Command, args []string) error {
			d, err := of.envelope()
			if err != nil {
				return err
			}
			if _, err := of.config(); err != nil { // before anything is read from a terminal
				return err
			}
			if d.Payload, err = t.readPayload(args, of.context); err != nil {
				return err
			}
			return of.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
				return t.signWith(ctx, c, &of, d)
			})
		})
	details(c, "FILE is the JSON payload of the transcript type, by default from stdin. With --context, FILE is\n"+
		"a file of any kind, and its SHA-256 is signed as message-v1 in this context. With --json, the\n"+
		"output is the signed document, the input of countersign verify.")
	c.Example = "  countersign sign --key payments --type paykit-subscription-v2 --as subscriber --json " +
		"subscription.json >signed.json\n" +
		"  countersign sign --key payments --context release README.md"
	of.flags(c)
	f := c.Flags()
	f.StringVar(&of.keyName, "key", "", "the `name` of the signing key (required)")
	f.StringVar(&of.typ, "type", "",
		"the transcript `type`, one of countersign transcript list (required without --context)")
	of.expires = time.Hour
	f.Var(duration{&of.expires}, "expires",
		"the lifetime of the document, a `duration` of at least 1s, for example 90m or 7d")
	f.StringVar(&of.context, "context", "",
		"sign the SHA-256 of a file of any kind as message-v1 in this `context`, for example release (default: none)")
	f.StringVar(&of.as, "as", "", "put the signing key's public key into this `field` of the payload: "+
		strings.Join(parties, ", ")+" (default: none)")
	f.StringVar(&of.line, "line", "", "a `file` with a pinned version, from countersign line pin: "+
		"refuse a signature by a version that does not follow (default: none)")
	f.StringVar(&of.nonce, "nonce", "", "the `nonce`, 64 hex digits (default: random)")
	f.Int64Var(&of.timestamp, "timestamp", 0, "the begin of the validity in Unix `seconds` (default: now)")
	return c
}

// envelope checks the flags, and returns the document without its payload.
func (of *signFlags) envelope() (d client.Document, err error) {
	if of.context != "" && of.typ == "" {
		of.typ = "message-v1"
	}
	switch {
	case of.keyName == "":
		return d, usageError{errors.New("--key is missing: name a signing key (countersign keys)")}
	case of.typ == "":
		return d, usageError{errors.New("--type is missing: name a transcript type (countersign transcript list), " +
			"or add --context")}
	case of.context != "" && of.typ != "message-v1":
		return d, usageError{fmt.Errorf("--context does not go with --type %s: leave one of them out", of.typ)}
	case of.as != "" && !slices.Contains(parties, of.as):
		return d, usageError{fmt.Errorf("--as %q is not one of %s", of.as, strings.Join(parties, ", "))}
	case of.expires < time.Second:
		return d, usageError{fmt.Errorf("--expires %v is too short: write at least 1s", of.expires)}
	}
	if of.line != "" {
		pinned, err := readLine(of.line)
		if err != nil {
			return d, err
		}
		if pinned.Key != of.keyName {
			return d, usageError{fmt.Errorf(
				"--line %s is for key %q, not for key %q: countersign line pin makes a file",
				of.line, pinned.Key, of.keyName)}
		}
		of.lines = []client.KeyLine{pinned}
	}
	d = client.Document{Type: of.typ, Timestamp: of.timestamp}
	if of.nonce != "" {
		var err error
		if d.Nonce, err = parse32(of.nonce); err != nil {
			return d, usageError{fmt.Errorf("--nonce: %w", err)}
		}
	}
	if d.Timestamp == 0 {
		d.Timestamp = time.Now().Unix()
	}
	d.ExpiresAt = d.Timestamp + int64(of.expires/time.Second)
	return d, nil
}

// readPayload reads a JSON payload or, for a context, makes the payload of a file's SHA-256.
func (t *tool) readPayload(args []string, context string) ([]byte, error) {
	payload, err := t.readInput(args)
	if err != nil {
		return nil, err
	}
	if context != "" {
		sum := sha256.Sum256(payload)
		payload, err = json.Marshal(map[string]string{
			"context": context, "sha256": base64.RawURLEncoding.EncodeToString(sum[:]),
		})
		if err != nil {
			return nil, err
		}
	}
	if _, err := ijson.Parse(payload); err != nil {
		return nil, fmt.Errorf("%w: payload: %w; for a file of any kind use --context", transcript.ErrMalformed, err)
	}
	return payload, nil
}

// signWith has the document signed over a connection, and prints the result.
func (t *tool) signWith(ctx context.Context, c *client.Client, of *signFlags, d client.Document) (err error) {
	var signed *client.Signed
	if of.as != "" {
		signed, err = c.SignAs(ctx, of.keyName, of.as, d)
	} else {
		signed, err = c.Sign(ctx, of.keyName, d)
	}
	if errors.Is(err, client.ErrCompromised) {
		return fmt.Errorf("%w: countersign line follow %s --write", err, of.line)
	}
	if err != nil {
		return err
	}
	doc, err := signed.Encode()
	if err != nil {
		return err
	}
	if newest, ok := c.Pinned(of.keyName); ok && newest.Version != of.lines[0].Version {
		fmt.Fprintf(t.stderr, "countersign: %s is at version %d, its line goes on to version %d: "+
			"countersign line follow %s --write\n", of.line, of.lines[0].Version, newest.Version, of.line)
	}
	return t.print(json.RawMessage(doc), func(w io.Writer) {
		fmt.Fprintf(w, "signature\t%s\n", base64.RawURLEncoding.EncodeToString(signed.Signature))
		fmt.Fprintf(w, "public key\t%x\n", signed.PublicKey)
		fmt.Fprintf(w, "key\t%s, version %d\n", signed.Key, signed.Version)
		fmt.Fprintf(w, "nonce\t%x\n", signed.Nonce)
		fmt.Fprintf(w, "valid\t%s to %s\n", date(signed.Timestamp), date(signed.ExpiresAt))
		fmt.Fprintf(w, "event\t%d\n", signed.Event)
		if signed.Receipt != nil {
			fmt.Fprintf(w, "receipt\t%x, salt %x\n", signed.Receipt.ID, signed.Receipt.Salt)
		}
		if signed.Repeated {
			fmt.Fprintf(w, "repeated\tthis request had been admitted before\n")
		}
	})
}

// parties are the payload fields with the public key of a party, who may sign.
var parties = []string{"subscriber", "provider", "payer", "payee", "owner"}

func (t *tool) verify() *cobra.Command {
	var s server
	var key string
	do := func(cmd *cobra.Command, args []string) error {
		input, err := t.readInput(args)
		if err != nil {
			return err
		}
		signed, err := client.DecodeSigned(input)
		if err != nil {
			return fmt.Errorf("%w: %w", transcript.ErrMalformed, err)
		}
		if signed.Signature == nil {
			return fmt.Errorf("%w: it has no signature: give the output of countersign sign --json",
				transcript.ErrMalformed)
		}
		return s.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
			event, err := c.Verify(ctx, key, signed)
			if err != nil {
				return err
			}
			return t.print(map[string]any{"valid": true, "event": event}, func(w io.Writer) {
				fmt.Fprintf(w, "valid, recorded as event %d\n", event)
			})
		})
	}
	c := command("verify [FILE|-]", "Have a signed document verified, and its nonce spent", cobra.MaximumNArgs(1), do)
	details(c, "FILE is the output of countersign sign --json, by default from stdin. The appliance checks the\n"+
		"signature, the times, the signer, and that the nonce is fresh. A document is valid once: the\n"+
		"second time it is a replay.")
	c.Example = "  countersign verify signed.json"
	s.flags(c)
	c.Flags().StringVar(&key, "key", "",
		"accept only a signature by the appliance's key of this `name` (default: any key that the document allows)")
	return c
}

func (t *tool) proof() *cobra.Command {
	var s server
	do := func(cmd *cobra.Command, args []string) error {
		event, err := strconv.ParseUint(args[0], 10, 64)
		if err != nil {
			return usageError{fmt.Errorf("%q is not the number of an event: sign and verify print it", args[0])}
		}
		return s.with(cmd.Context(), func(ctx context.Context, c *client.Client) error {
			p, err := c.Proof(ctx, event)
			if err != nil {
				return err
			}
			checked := either(s.logKey != "", "yes", "no: add --log-key")
			out := map[string]any{
				"event": p.Event, "index": p.Index, "leaf": p.Leaf, "path": p.Path, "checkpoint": string(p.Checkpoint),
				"checked": s.logKey != "",
			}
			return t.print(out, func(w io.Writer) {
				fmt.Fprintf(w, "event\t%d, leaf %d of its epoch\nleaf\t%s\n", p.Event, p.Index, p.Leaf)
				for _, h := range p.Path {
					fmt.Fprintf(w, "path\t%s\n", h)
				}
				fmt.Fprintf(w, "checked\t%s\n\n%s", checked, p.Checkpoint)
			})
		})
	}
	c := command("proof EVENT", "Get the proof that an event of this peer is in the appliance's audit log",
		cobra.ExactArgs(1), do)
	details(c, "With --log-key, the proof is checked too, and with --log-checkpoint also that the log continues the\n"+
		"remembered one. EVENT is the number that sign and verify print.")
	c.Example = "  countersign proof 4711 --log-key \"$(cat log.vkey)\""
	s.flags(c)
	return c
}
