package admin

import (
	"context"
	"errors"
	"math"
	"strings"
	"time"

	"countersign/admin/api"
	"countersign/internal/history"
)

// hasHistory returns an error without a history.
func (s *server) hasHistory() error {
	if s.History == nil {
		return notFound.errorf("the appliance keeps no history: see history in the configuration")
	}
	return nil
}

func (s *server) historySeries(context.Context, caller, *none) ([]api.Series, error) {
	return docs(history.All, seriesDoc), s.hasHistory()
}

func seriesDoc(s *history.Series) api.Series {
	return api.Series{Name: s.Name, Unit: s.Unit, Fold: string(s.Fold), Help: s.Help, Main: s.Main}
}

type historyInput struct {
	Series string `query:"series" maxLength:"2000" doc:"names with commas in between; none: the main ones"`
	Since  int64  `query:"since" minimum:"0" doc:"Unix seconds; 0: two hours ago"`
	Until  int64  `query:"until" minimum:"0" doc:"Unix seconds, not included; 0: now"`
	Step   int64  `query:"step" minimum:"0" maximum:"900" doc:"10, 60 or 900 s; 0: the shortest that reaches back"`
}

func (s *server) history(_ context.Context, _ caller, in *historyInput) (doc api.History, err error) {
	if err := s.hasHistory(); err != nil {
		return doc, err
	}
	now := time.Now()
	q := history.Query{Since: in.Since, Until: in.Until, Step: in.Step}
	if in.Series != "" {
		q.Series = strings.Split(in.Series, ",")
	}
	if q.Until == 0 {
		q.Until = max(now.Unix(), q.Since)
	}
	if q.Since == 0 {
		q.Since = max(0, q.Until-7200)
	}
	a, err := s.History.Read(now, q)
	if errors.Is(err, history.ErrInvalid) {
		return doc, invalid.errorf("%v", err)
	} else if err != nil {
		return doc, err
	}
	doc = api.History{Since: a.Since, Until: a.Until, Step: a.Step, Measured: a.Measured}
	if failing := s.History.Failing(); failing != nil {
		doc.Failing = failing.Error()
	}
	doc.Series = docs(a.Series, func(v history.Values) api.HistorySeries {
		return api.HistorySeries{Series: seriesDoc(v.Series), Values: docs(v.Values, valueDoc)}
	})
	return doc, nil
}

// valueDoc returns a value, or nil for an unknown one, which JSON shows as null.
func valueDoc(v float32) *float32 {
	if math.IsNaN(float64(v)) || math.IsInf(float64(v), 0) {
		return nil
	}
	return &v
}
