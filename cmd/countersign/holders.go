package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"countersign/admin/api"
	"countersign/internal/cli"
	"countersign/internal/durable"
	"countersign/internal/escrow"
	"countersign/internal/recipient"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// holders are the operators' commands about recovery holders.
func (t *tool) holders(act maker) *cobra.Command {
	show := act("show", "Show the recovery holders, and the keys that they can bring back", cobra.NoArgs,
		func(ctx context.Context, c *api.Client, _ []string) error {
			h, err := c.Holders(ctx)
			if err != nil {
				return err
			}
			return t.print(h, func(w io.Writer) {
				if h.Number == 0 {
					fmt.Fprintln(w, "holders\tnone yet: countersign admin holders set")
					return
				}
				fmt.Fprintf(w, "holders\tset %d: %d of %d bring a key back\n", h.Number, h.Needed, len(h.Holders))
				for _, each := range h.Holders {
					fmt.Fprintf(w, "holder\t%s %s\n", each.Name, each.Fingerprint)
				}
				fmt.Fprintf(w, "last proven\t%s\n", either(h.Proven == 0, "never", date(h.Proven)))
				for _, key := range h.Keys {
					fmt.Fprintf(w, "recoverable\t%s\n", key)
				}
			})
		})
	show.Example = "  countersign admin holders show"
	set := act("set NEEDED HOLDER...", "Name the recovery holders of keys that are made from now on, under approval",
		cobra.MinimumNArgs(2), func(ctx context.Context, c *api.Client, args []string) error {
			if _, err := strconv.Atoi(args[0]); err != nil {
				return usageError{fmt.Errorf("NEEDED: %q is not a number of holders", args[0])}
			}
			if n := len(args) - 1; n > escrow.MaxHolders {
				return usageError{fmt.Errorf("%d holders are more than %d", n, escrow.MaxHolders)}
			}
			before, err := c.Holders(ctx)
			if err != nil {
				return err
			}
			pairs := []string{"number", strconv.FormatUint(uint64(before.Number)+1, 10), "needed", args[0],
				"of", strconv.Itoa(len(args) - 1)}
			for i, text := range args[1:] {
				h, err := escrow.ReadHolder(text)
				if errors.Is(err, escrow.ErrSet) {
					return usageError{err}
				} else if err != nil {
					return err
				}
				pairs = append(pairs, "holder_"+strconv.Itoa(i+1), h.String())
			}
			return t.propose(ctx, c, "holders set", "", pairs...)
		})
	details(set, "HOLDER is NAME=KEY, or NAME=FILE with the key: age1... of age-keygen, or an SSH public key\n"+
		"(ssh-ed25519, ssh-rsa). NEEDED of the holders together can bring back a recoverable key (admin key\n"+
		"create --recoverable); fewer can't. Keys that were made before stay with their holders.")
	set.Example = "  countersign admin holders set 2 alice=age1qqq bob=bob.pub carol=age1zzz"
	return group("holders", "Show the recovery holders, and name others", show, set)
}

// holder are the commands of a recovery holder, on a machine of the holder's own.
func (t *tool) holder() *cobra.Command {
	show := command("show REQUEST", "Show who asks for a holder's shares, and for which keys", cobra.ExactArgs(1),
		func(_ *cobra.Command, args []string) error {
			b, r, err := readRequest(args[0])
			if err != nil {
				return err
			}
			return t.showRequest(b, r)
		})
	show.Example = "  countersign holder show drill.request"
	return group("holder", "Give a holder's shares of recoverable keys to a drill or a recovery", show, t.giveShares())
}

func (t *tool) giveShares() *cobra.Command {
	var identity, code, to string
	give := command("give REQUEST", "Open the shares that are for a private key, and encrypt them to the request",
		cobra.ExactArgs(1), func(cmd *cobra.Command, args []string) error {
			b, r, err := readRequest(args[0])
			if err != nil {
				return err
			}
			keys, err := recipient.ReadIdentities(identity, cli.Passphrase(cmd.Context(), identity))
			if err != nil {
				return fmt.Errorf("--identity: %w", err)
			}
			if code == "" {
				if err := t.showRequestTo(t.stderr, b, r, false); err != nil {
					return err
				}
				if code, err = t.askCode(); err != nil {
					return err
				}
			}
			answer, given, err := escrow.Give(b, code, keys)
			if err != nil {
				return err
			}
			if to == "" {
				to = strings.TrimSuffix(args[0], filepath.Ext(args[0])) + "-" + given.Holders[0] + ".answer"
			}
			if err := durable.Write(to, answer, 0o644); err != nil {
				return err
			}
			doc := struct {
				File   string   `json:"file"`
				Holder string   `json:"holder"`
				Keys   []string `json:"keys"`

				Damaged []string `json:"damaged,omitempty"`
			}{File: to, Holder: strings.Join(given.Holders, ", ")}
			for _, k := range given.Damaged {
				doc.Damaged = append(doc.Damaged, k.String())
			}
			for _, k := range given.Keys {
				doc.Keys = append(doc.Keys, k.String())
			}
			return t.print(doc, func(w io.Writer) {
				fmt.Fprintf(w, "answer\t%s\nholder\t%s\nkeys\t%s\n", doc.File, doc.Holder, strings.Join(doc.Keys, ", "))
				for _, key := range doc.Damaged {
					fmt.Fprintf(w, "damaged\tthe share of %s\n", key)
				}
			})
		})
	details(give, "The people of the drill or the recovery send the request, and read its code out by a call: the\n"+
		"code shows that the request is theirs. Without --code, the request is shown and the code asked for.\n"+
		"The answer is of use in that drill or recovery only. The private key stays with the holder.")
	give.Example = "  countersign holder give drill.request --identity alice.key"
	give.Flags().StringVar(&identity, "identity", "",
		"the holder's private key, a `file` of age-keygen or an SSH key (required)")
	give.Flags().StringVar(&code, "code", "", "the `code` of the request (default: asked for)")
	give.Flags().StringVar(&to, "answer", "", "the `file` to write (default: beside the request)")
	give.MarkFlagRequired("identity")
	return give
}

// askCode asks for the code of a request.
func (t *tool) askCode() (string, error) {
	if in, ok := t.stdin.(*os.File); !ok || !term.IsTerminal(int(in.Fd())) {
		return "", usageError{errors.New("--code: give the code that the people of the ceremony read out")}
	}
	fmt.Fprint(t.stderr, "Code, as the people of the ceremony read it out: ")
	line, err := bufio.NewReader(t.stdin).ReadString('\n')
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(line), nil
}

func readRequest(path string) ([]byte, escrow.Request, error) {
	b, err := readSmall(path, escrow.MaxFile)
	if err != nil {
		return nil, escrow.Request{}, err
	}
	r, err := escrow.ParseRequest(b)
	return b, r, err
}

// readSmall reads a file of at most most bytes.
func readSmall(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(b)) > most {
		err = fmt.Errorf("%s has more than %d bytes", path, most)
	}
	return b, err
}

func (t *tool) showRequest(b []byte, r escrow.Request) error {
	return t.showRequestTo(t.stdout, b, r, t.json)
}

// showRequestTo shows a request without its code: the code comes from the people who ask.
func (t *tool) showRequestTo(w io.Writer, b []byte, r escrow.Request, asJSON bool) error {
	type key struct {
		Key       string   `json:"key"`
		PublicKey string   `json:"public_key"`
		Needed    int      `json:"needed"`
		Holders   []string `json:"holders"`
	}
	doc := struct {
		Purpose   string `json:"purpose"`
		Appliance string `json:"appliance"`
		Machine   string `json:"machine"`
		Made      string `json:"made"`
		SHA256    string `json:"sha256"`
		Keys      []key  `json:"keys"`
	}{r.Purpose, r.Appliance, r.Machine, r.Made().Format(time.RFC3339), escrow.Digest(b), nil}
	for _, e := range r.Keys {
		k := key{Key: e.Key.String(), PublicKey: e.PublicKey, Needed: e.Needed}
		for _, s := range e.Shares {
			k.Holders = append(k.Holders, s.Name)
		}
		doc.Keys = append(doc.Keys, k)
	}
	if asJSON {
		return t.print(doc, nil)
	}
	what := map[string]string{
		escrow.ForDrill:    "a drill: the keys come back in a scratch appliance, sign once, and are destroyed",
		escrow.ForRecovery: "a RECOVERY: the keys come back on tokens and go on signing",
	}
	fmt.Fprintf(w, "purpose     %s\nappliance   %s\nmachine     %s\nmade        %s\n", what[r.Purpose], r.Appliance,
		r.Machine, doc.Made)
	for _, k := range doc.Keys {
		fmt.Fprintf(w, "key         %s %s, by %d of %s\n", k.Key, k.PublicKey, k.Needed, strings.Join(k.Holders, ", "))
	}
	return nil
}
