package main

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"countersign/client"
	"countersign/internal/ijson"
	"countersign/policy"
	"countersign/transcript"

	"github.com/spf13/cobra"
)

func (t *tool) transcript() *cobra.Command {
	list := command("list", "List the transcript types and the fields of their payloads", cobra.NoArgs, func(*cobra.Command, []string) error {
		return t.print(transcript.Types(), func(w io.Writer) {
			for _, typ := range transcript.Types() {
				fmt.Fprintf(w, "%s: %s\n", typ.Name, typ.About)
				for _, f := range typ.Fields {
					need := "optional"
					if f.Required {
						need = "required"
					}
					fmt.Fprintf(w, "  %s\t%s\t%s\n", f.Name, need, f.Form)
				}
				fmt.Fprintln(w)
			}
		})
	})
	encode := command("encode TYPE [FILE|-]", "Show what a document says, its canonical bytes, and what Ed25519 signs", cobra.RangeArgs(1, 2), func(cmd *cobra.Command, args []string) error {
		input, err := t.readInput(args[1:])
		if err != nil {
			return err
		}
		d, err := client.DecodeSigned(input)
		if err != nil {
			return fmt.Errorf("%w: %w", transcript.ErrMalformed, err)
		}
		if d.Type == "" {
			d.Type = args[0]
		}
		if d.Type != args[0] {
			return fmt.Errorf("%w: the document's type is %q", transcript.ErrMalformed, ijson.Clip(d.Type))
		}
		doc, err := transcript.Parse(transcript.Request(d.Document))
		if err != nil {
			return err
		}
		// What else sign refuses, whatever policy says.
		if len(doc.Payload) > client.MaxRequest {
			return fmt.Errorf("%w: a payload of %d bytes does not fit into a request", transcript.ErrMalformed, len(doc.Payload))
		}
		if doc.Payment != nil {
			if whole, _ := policy.Amounts(doc.Payment.Exact()); whole == math.MaxInt64 {
				return fmt.Errorf("%w: the amount is larger than any rule can judge", policy.ErrDenied)
			}
		}
		out := map[string]string{"type": doc.Type, "canonical": hex.EncodeToString(doc.Canonical), "message": hex.EncodeToString(doc.Message)}
		return t.print(out, func(w io.Writer) {
			fmt.Fprintf(w, "type\t%s\n", doc.Type)
			numbers := json.NewDecoder(bytes.NewReader(doc.Payload))
			numbers.UseNumber() // as they are written
			var payload any
			if err := numbers.Decode(&payload); err == nil { // Parse has read it
				printFields(w, "payload", payload)
			}
			fmt.Fprintf(w, "nonce\t%x\n", doc.Nonce)
			for _, at := range []struct {
				name string
				time int64
			}{{"timestamp", doc.Timestamp}, {"expires_at", doc.ExpiresAt}} {
				fmt.Fprintf(w, "%s\t%d, %s\n", at.name, at.time, time.Unix(at.time, 0).UTC().Format(time.RFC3339))
			}
			fmt.Fprintf(w, "canonical\t%s\nmessage\t%s\n", out["canonical"], out["message"])
		})
	})
	encode.Long = "Shows what a document says, one field a line, its canonical bytes, and what Ed25519 signs. FILE is a sign request, or what\n" +
		"sign --json prints. The document must obey the rules of its type; it may have expired."
	return group("transcript", "Show what a document signs, without an appliance", list, encode)
}

// printFields writes a line for each field. Text is quoted in Go's way: nothing that a terminal would obey, hide or turn
// round comes through, and no text looks like a number or like two lines.
func printFields(w io.Writer, name string, value any) {
	switch v := value.(type) {
	case map[string]any:
		for _, inner := range slices.Sorted(maps.Keys(v)) {
			// A name that does not look like one can't pass for two with a dot between them.
			shown := inner
			if inner == "" || strings.Trim(inner, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") != "" {
				shown = fmt.Sprintf("%q", inner)
			}
			printFields(w, name+"."+shown, v[inner])
		}
		if len(v) == 0 {
			fmt.Fprintf(w, "%s\t{}\n", name)
		}
	case string:
		fmt.Fprintf(w, "%s\t%q\n", name, v)
	default: // a number, null, or an array of numbers
		b, _ := json.Marshal(v)
		fmt.Fprintf(w, "%s\t%s\n", name, b)
	}
}
