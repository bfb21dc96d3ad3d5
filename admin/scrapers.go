package admin

import (
	"context"
	"encoding/hex"

	"countersign/admin/api"
	"countersign/internal/operators"
)

func (s *server) scrapers(_ context.Context, _ caller, in *pageInput) (*listed[api.Scraper], error) {
	name := func(x operators.Scraper) string { return x.Name }
	return paged(in, s.Operators.Scrapers(), name, func(x operators.Scraper) api.Scraper {
		return api.Scraper{
			Name: x.Name, SHA256: hex.EncodeToString(x.SHA256[:]), Added: x.Added.Unix(), Expires: x.Expires.Unix(),
		}
	}), nil
}

func (s *server) removeScraper(ctx context.Context, who caller, in *named) error {
	return s.Operators.RemoveScraper(ctx, who.actor(), in.Name)
}
