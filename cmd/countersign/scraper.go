package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"countersign/admin/api"
	"countersign/approval"
	"countersign/internal/ownfile"

	"github.com/spf13/cobra"
)

// scrapers adds, lists and removes the programs that read the metrics over HTTPS.
func (t *tool) scrapers(act maker) *cobra.Command {
	days := 365
	add := act("add NAME FILE", "Let a program read the metrics over HTTPS by a token, under approval",
		cobra.ExactArgs(2), func(ctx context.Context, c *api.Client, args []string) error {
			if days < 1 || days > 400 {
				return usageError{fmt.Errorf("--days %d: a token lasts from 1 to 400 days", days)}
			}
			token, err := scrapeToken(args[1])
			if err != nil {
				return err
			}
			sum := sha256.Sum256([]byte(token))
			expires := time.Now().Add(time.Duration(days) * 24 * time.Hour).UTC().Format(time.RFC3339)
			return t.propose(ctx, c, approval.ActScraperAdd, "",
				"name", args[0], "token_sha256", hex.EncodeToString(sum[:]), "expires", expires)
		})
	details(add, "FILE gets the token, for credentials_file of Prometheus, and is used again if it is there. The\n"+
		"appliance gets the token's SHA-256 only, and can't show the token again. The token is good for\n"+
		"GET /v1/metrics over HTTPS, and for nothing else.")
	add.Example = "  countersign admin scraper add prometheus scrape.token --days 365"
	add.Flags().IntVar(&days, "days", days, "the `number` of days after which the token is refused, at most 400")
	return group("scraper", "Let programs read the metrics over HTTPS for months",
		add,
		act("list", "List the programs that may read the metrics over HTTPS", cobra.NoArgs,
			func(ctx context.Context, c *api.Client, _ []string) error {
				all, err := c.Scrapers(ctx)
				if err != nil {
					return err
				}
				return t.print(all, func(w io.Writer) {
					fmt.Fprintln(w, "NAME\tADDED\tEXPIRES\tSHA256 OF THE TOKEN")
					for _, s := range all {
						expired := either(time.Now().Unix() >= s.Expires, " (expired)", "")
						fmt.Fprintf(w, "%s\t%s\t%s%s\t%s\n", s.Name, date(s.Added), date(s.Expires), expired, s.SHA256)
					}
				})
			}),
		act("remove NAME", "Take the right of a program away, at once", cobra.ExactArgs(1),
			func(ctx context.Context, c *api.Client, args []string) error {
				if err := c.RemoveScraper(ctx, args[0]); err != nil {
					return err
				}
				return t.said("removed", args[0])
			}),
	)
}

// scrapeToken returns the token in a file: 32 random bytes, base64url. Without the file,
// scrapeToken makes the file for its owner only. A file that is there is used again, so that a
// command that failed can be typed again.
func scrapeToken(path string) (string, error) {
	f, err := ownfile.Create(path)
	if errors.Is(err, fs.ErrExist) {
		b, err := os.ReadFile(path)
		if err != nil {
			return "", err
		}
		token := string(bytes.TrimSuffix(b, []byte("\n")))
		if raw, err := base64.RawURLEncoding.Strict().DecodeString(token); err != nil || len(raw) != 32 {
			return "", fmt.Errorf("%s has no token: give the name of a file that does not exist yet", path)
		}
		return token, nil
	}
	if err != nil {
		return "", err
	}
	b := make([]byte, 32)
	rand.Read(b)
	token := base64.RawURLEncoding.EncodeToString(b)
	_, err = fmt.Fprintln(f, token)
	if err := errors.Join(err, f.Close()); err != nil {
		os.Remove(path)
		return "", err
	}
	return token, nil
}
