package api

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
	"strings"
)

// Series is a time series of the history.
type Series struct {
	Name string `json:"name"`
	Unit string `json:"unit" doc:"1/s, s, bytes, or nothing for a number"`
	Fold string `json:"fold" doc:"how a longer step follows from shorter ones: mean, max, min or last"`
	Help string `json:"help"`
	Main bool   `json:"main" doc:"among the few figures of a first look, and of the stream's ticks"`
}

// History has values of series, one for each step.
type History struct {
	Since    int64           `json:"since" doc:"begin of the first step, Unix seconds"`
	Until    int64           `json:"until" doc:"end of the last step, Unix seconds"`
	Step     int64           `json:"step" doc:"seconds"`
	Measured []int64         `json:"measured" doc:"seconds of each step that were measured; 0: a gap"`
	Series   []HistorySeries `json:"series"`
	Failing  string          `json:"failing,omitempty" doc:"why the history is not written now"`
}

// HistorySeries is a series with its values. A rate is for each second. Null is an unknown value.
type HistorySeries struct {
	Series
	Values []*float32 `json:"values"`
}

// HistoryQuery selects values of the history.
type HistoryQuery struct {
	Series []string // names; none: the main ones
	Since  int64    // Unix seconds; 0: two hours ago
	Until  int64    // Unix seconds, not included; 0: now
	Step   int64    // seconds; 0: the shortest that reaches back to Since
}

// HistorySeries lists the series of the history.
func (c *Client) HistorySeries(ctx context.Context) (all []Series, err error) {
	return all, c.do(ctx, http.MethodGet, "/v1/history/series", nil, &all)
}

// History returns values of the history.
func (c *Client) History(ctx context.Context, q HistoryQuery) (h History, err error) {
	v := url.Values{}
	for name, n := range map[string]int64{"since": q.Since, "until": q.Until, "step": q.Step} {
		if n != 0 {
			v.Set(name, strconv.FormatInt(n, 10))
		}
	}
	if len(q.Series) > 0 {
		v.Set("series", strings.Join(q.Series, ","))
	}
	return h, c.do(ctx, http.MethodGet, "/v1/history?"+v.Encode(), nil, &h)
}
