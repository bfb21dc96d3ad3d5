package operators

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"countersign/approval"
	"countersign/audit"
	"countersign/internal/ijson"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/secret"
)

// Scraper is a program that reads the metrics over HTTPS by a bearer token, for longer than a
// session lasts. A token gives one right: package admin takes it for one operation, over HTTPS
// only. The appliance never has the token, which the operator's tool makes: the proposal, the
// ledger and the log have SHA-256 of it. A token is good until its expiry or its removal.
type Scraper struct {
	Name    string
	SHA256  [sha256.Size]byte // of the token's text
	Added   time.Time
	Expires time.Time
}

// Limits of scrapers.
const (
	MaxScraperLife = 400 * 24 * time.Hour
	maxScrapers    = 16
)

// scraperKeys is the prefix of the records of scrapers in the table Meta: scraper/NAME.
const scraperKeys = "scraper/"

// scraperRecord is a scraper in the ledger.
type scraperRecord struct {
	SHA256  string `json:"sha256"`  // hex
	Added   int64  `json:"added"`   // Unix seconds
	Expires int64  `json:"expires"` // Unix seconds
}

// takeScraper updates the memory from a record. The caller holds mu.
func (r *Registry) takeScraper(name string, value []byte) error {
	delete(r.scrapers, name)
	if value == nil {
		return nil
	}
	var rec scraperRecord
	err := json.Unmarshal(value, &rec)
	sum, bad := hex.DecodeString(rec.SHA256)
	if err != nil || bad != nil || len(sum) != sha256.Size {
		return fmt.Errorf("scraper %q in the ledger: its record can't be read", name)
	}
	r.scrapers[name] = Scraper{
		name, [sha256.Size]byte(sum), time.Unix(rec.Added, 0).UTC(), time.Unix(rec.Expires, 0).UTC(),
	}
	return nil
}

// Scrapers lists the scrapers by name, the expired ones too.
func (r *Registry) Scrapers() (all []Scraper) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.scrapers {
		all = append(all, s)
	}
	slices.SortFunc(all, func(x, y Scraper) int { return cmp.Compare(x.Name, y.Name) })
	return all
}

// Scrapes reports whether a token is of a scraper, over HTTPS, before its expiry.
func (r *Registry) Scrapes(token secret.Bytes, ch Channel) bool {
	sum, now := sha256.Sum256(token.Expose()), time.Now()
	return ch.Kind == HTTPS && slices.ContainsFunc(r.Scrapers(), func(s Scraper) bool {
		return s.SHA256 == sum && now.Before(s.Expires)
	})
}

// scraperAct is the act that adds a scraper.
func (r *Registry) scraperAct() Act {
	return Act{
		Roles: approval.Proposers(approval.ActScraperAdd),
		Check: func(p []approval.Parameter, _ []byte) ([]approval.Parameter, error) {
			_, err := r.newScraper(p)
			return p, err
		},
		Run: func(ctx context.Context, who audit.Actor, p []approval.Parameter, _ []byte) error {
			s, err := r.newScraper(p)
			if err != nil {
				return err
			}
			return r.addScraper(ctx, who, s)
		},
	}
}

// newScraper parses the parameters of a scraper that could be added now.
func (r *Registry) newScraper(p []approval.Parameter) (s Scraper, err error) {
	own := operatorAct{parameters: []string{"name", "token_sha256", "expires"}}
	values, err := own.values(p)
	if err != nil {
		return s, fmt.Errorf("scraper: %w", err)
	}
	now := time.Now()
	s = Scraper{Name: values[0], Added: now}
	if !validName(s.Name) {
		return s, fmt.Errorf("scraper %q: %w: a name has 1 to %d lower-case letters, digits and hyphens, "+
			"and does not begin with a hyphen", ijson.Clip(s.Name), ErrInvalid, maxName)
	}
	sum, err := hex.DecodeString(values[1])
	if err != nil || len(sum) != sha256.Size || hex.EncodeToString(sum) != values[1] {
		return s, fmt.Errorf("scraper %q: %w: token_sha256 has 64 lower-case hex digits", s.Name, ErrInvalid)
	}
	s.SHA256 = [sha256.Size]byte(sum)
	s.Expires, err = time.Parse(time.RFC3339, values[2])
	switch {
	case err != nil || s.Expires.UTC().Format(time.RFC3339) != values[2]:
		return s, fmt.Errorf("scraper %q: %w: expires is a time such as 2027-06-01T00:00:00Z", s.Name, ErrInvalid)
	case !s.Expires.After(now), s.Expires.After(now.Add(MaxScraperLife)):
		return s, fmt.Errorf("scraper %q: %w: its token would expire at %s, and must within %d days",
			s.Name, ErrInvalid, values[2], MaxScraperLife/(24*time.Hour))
	}
	all := r.Scrapers()
	for _, other := range all {
		if other.Name == s.Name || other.SHA256 == s.SHA256 {
			return s, fmt.Errorf("scraper %q: %w as %q: remove that one first, or make another token",
				s.Name, ErrExists, other.Name)
		}
	}
	if len(all) >= maxScrapers {
		return s, fmt.Errorf("scraper %q: %w: there are %d already: remove one", s.Name, ErrConflict, len(all))
	}
	return s, nil
}

// addScraper writes a scraper. Two acts at once are one after the other, by the lock writing.
func (r *Registry) addScraper(ctx context.Context, who audit.Actor, s Scraper) error {
	sum := hex.EncodeToString(s.SHA256[:])
	return r.write(ctx, who.Request, "scraper add", func(ctx context.Context) error {
		for _, other := range r.Scrapers() {
			if other.Name == s.Name || other.SHA256 == s.SHA256 {
				return fmt.Errorf("scraper %q: %w", s.Name, ErrExists)
			}
		}
		return r.ledger.Update(ctx, func(tx *ledger.Tx) error {
			rec := scraperRecord{sum, s.Added.Unix(), s.Expires.Unix()}
			if err := tx.Put(ledger.Meta, scraperKeys+s.Name, manage.Encode(rec)); err != nil {
				return err
			}
			return tx.Append(ledger.EventOf(audit.NewScraperAdded(who, s.Name, sum, s.Expires)))
		})
	})
}

// RemoveScraper ends the right of a scraper at once. A removal takes a right away, so that one
// operator does it alone.
func (r *Registry) RemoveScraper(ctx context.Context, who audit.Actor, name string) error {
	return r.write(ctx, who.Request, "scraper remove", func(ctx context.Context) error {
		return r.ledger.Update(ctx, func(tx *ledger.Tx) error {
			if !validName(name) || tx.Get(ledger.Meta, scraperKeys+name) == nil {
				return fmt.Errorf("scraper %q: %w", ijson.Clip(name), ErrNotFound)
			}
			if err := tx.Delete(ledger.Meta, scraperKeys+name); err != nil {
				return err
			}
			return tx.Append(ledger.EventOf(audit.NewScraperRemoved(who, name)))
		})
	})
}

// scraperOf returns the name of the scraper of a key in the table Meta.
func scraperOf(key string) (name string, ok bool) { return strings.CutPrefix(key, scraperKeys) }
