package api

import (
	"context"
	"net/http"
	"net/url"
)

// Scraper is a program that reads the metrics over HTTPS by a token.
type Scraper struct {
	Name    string `json:"name"`
	SHA256  string `json:"sha256" doc:"of the token, in hex"`
	Added   int64  `json:"added" doc:"Unix seconds"`
	Expires int64  `json:"expires" doc:"Unix seconds; the token is refused from then on"`
}

// Scrapers lists the scrapers, the expired ones too. The act scraper add adds one.
func (c *Client) Scrapers(ctx context.Context) ([]Scraper, error) {
	return list[Scraper](ctx, c, "/v1/scrapers")
}

// RemoveScraper ends the right of a scraper.
func (c *Client) RemoveScraper(ctx context.Context, name string) error {
	return c.do(ctx, http.MethodDelete, "/v1/scrapers/"+url.PathEscape(name), nil, nil)
}
