package operators

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"countersign/approval"
	"countersign/audit"
	"countersign/internal/secret"
)

// TestScrapers: a token is good over HTTPS until its expiry, and over a restart. There are at most
// maxScrapers.
func TestScrapers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, 1)
		add := func(name, token string, lasts time.Duration) error {
			sum := sha256.Sum256([]byte(token))
			s, err := r.newScraper([]approval.Parameter{
				{Name: "name", Value: name}, {Name: "token_sha256", Value: hex.EncodeToString(sum[:])},
				{Name: "expires", Value: time.Now().Add(lasts).UTC().Format(time.RFC3339)},
			})
			if err != nil {
				return err
			}
			return r.addScraper(t.Context(), audit.Operator("o0"), s)
		}
		if err := add("prometheus", "secret", time.Hour); err != nil {
			t.Fatal(err)
		}
		want(t, add("prometheus", "other", time.Hour), ErrExists)
		want(t, add("other", "secret", time.Hour), ErrExists)
		want(t, add("other", "other", MaxScraperLife+time.Minute), ErrInvalid)
		want(t, add("other", "other", -time.Minute), ErrInvalid)
		for _, when := range []string{"at once", "after a restart"} {
			right, wrong := secret.Of("secret"), secret.Of("other")
			if !r.Scrapes(right, https) || r.Scrapes(wrong, https) || r.Scrapes(right, user) {
				t.Errorf("%s: %+v", when, r.Scrapers())
			}
			r.reopen(t)
		}
		time.Sleep(time.Hour)
		if r.Scrapes(secret.Of("secret"), https) || len(r.Scrapers()) != 1 {
			t.Errorf("after the expiry: %+v", r.Scrapers())
		}
		for i := range maxScrapers - 1 {
			if err := add(fmt.Sprintf("p%d", i), fmt.Sprint(i), time.Hour); err != nil {
				t.Fatal(err)
			}
		}
		want(t, add("more", "more", time.Hour), ErrConflict)
		if err := r.RemoveScraper(t.Context(), audit.Operator("o0"), "prometheus"); err != nil {
			t.Fatal(err)
		}
		want(t, r.RemoveScraper(t.Context(), audit.Operator("o0"), "prometheus"), ErrNotFound)
		if err := add("more", "more", time.Hour); err != nil {
			t.Error(err)
		}
	})
}
