package admin

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"slices"
	"strings"
	"time"

	"countersign/admin/api"
	"countersign/appliance"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/webhook"

	"github.com/danielgtaylor/huma/v2"
)

func (s *server) log(context.Context, caller, *none) (api.Log, error) {
	log, epoch, err := s.Appliance.Log()
	if err != nil {
		return api.Log{}, err
	}
	key, err := s.Appliance.Keys.LogKey()
	if err != nil {
		return api.Log{}, err
	}
	return api.Log{
		Epoch: epoch, VerifierKey: log.VerifierKey(epoch), WebhookKey: webhook.FormatKey(key.Info().PublicKey),
	}, nil
}

func (s *server) endEpoch(ctx context.Context, who caller, _ *none) (api.Log, error) {
	if _, err := s.Appliance.EndEpoch(ctx, who.actor()); err != nil {
		return api.Log{}, err
	}
	return s.log(ctx, who, nil)
}

type file struct {
	ContentType  string `header:"Content-Type"`
	CacheControl string `header:"Cache-Control"`
	Body         []byte
}

// logFiles registers the files of the audit log in the form of C2SP tlog-tiles, with the names of
// an export. OpenAPI has no parameters with slashes, so that a served path and the documented path
// can differ.
func (s *server) logFiles() {
	binary := &huma.Schema{Type: huma.TypeString, Format: "binary"}
	for _, at := range []struct{ path, id, shown string }{
		{"/checkpoint", "log-checkpoint", ""},
		{"/tile/*", "log-tile", "/tile/{path}"},
		{"/epochs/*", "log-epoch", "/epochs/{path}"},
	} {
		o := operation{
			route: "GET " + at.path, id: at.id, summary: "Get a file of the audit log",
			roles: of(auditor, backup), refused: whileUninitialised, hidden: at.shown != "",
		}
		routeRaw(s, func(ctx context.Context, _ caller, in *path) (*file, error) { return s.logFile(ctx, in.path) }, o)
		if o.hidden {
			s.api.OpenAPI().AddOperation(&huma.Operation{
				Method: http.MethodGet, Path: at.shown, OperationID: o.id, Summary: o.summary,
				Extensions: o.extensions(), Security: o.security(),
				Parameters: []*huma.Param{{
					Name: "path", In: "path", Required: true, Description: "may have slashes in it",
					Schema: &huma.Schema{Type: huma.TypeString},
				}},
				Responses: s.responses("200", "application/octet-stream", binary),
			})
		}
	}
}

// path is the path of a request without the first slash.
type path struct{ path string }

func (p *path) Resolve(c huma.Context) []error {
	u := c.URL()
	p.path = strings.TrimPrefix(u.Path, "/")
	return nil
}

// logFile returns a file of the audit log. Only the checkpoint of the present epoch changes.
func (s *server) logFile(ctx context.Context, path string) (*file, error) {
	b, err := s.Appliance.LogFile(ctx, path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w", path, manage.ErrNotFound)
	} else if err != nil {
		return nil, err
	}
	if strings.HasSuffix(path, "checkpoint") {
		return &file{"text/plain; charset=utf-8", "no-cache", b}, nil
	}
	return &file{"application/octet-stream", "private, max-age=31536000, immutable", b}, nil
}

func (s *server) retention(_ context.Context, _ caller, in *struct {
	From uint32 `query:"from" maximum:"4294967295" doc:"the first epoch; an empty list of epochs is the end"`
}) (api.Retention, error) {
	epochs, before, err := s.Appliance.Preview()
	epochs = slices.DeleteFunc(epochs, func(e appliance.EpochStatus) bool { return e.Number < in.From })
	epochs = epochs[:min(len(epochs), maxEntries)]
	return api.Retention{ReceiptsBefore: before.Unix(), Epochs: docs(epochs, func(e appliance.EpochStatus) api.Epoch {
		return api.Epoch{
			Epoch: e.Number, First: e.First, Size: e.Size, Begun: e.Begun / 1000, Ended: e.Ended / 1000,
			Due: unix(e.Due), Dropped: e.Dropping / 1000, Hold: e.Hold, Checkpoint: e.Signed,
		}
	})}, err
}

type holdInput struct {
	Epoch uint32 `path:"epoch" maximum:"4294967295"`
	Body  api.Hold
}

func (s *server) hold(ctx context.Context, who caller, in *holdInput) error {
	return s.Appliance.Hold(ctx, who.actor(), in.Epoch, in.Body.Reason)
}

func receiptDoc(r ledger.Receipt) api.Receipt {
	return api.Receipt{
		ID: hex.EncodeToString(r.ID[:]), TimeMS: r.TimeMS, Commitment: hex.EncodeToString(r.Commitment),
		Method: r.Method, Status: r.Status, Event: r.Event,
	}
}

func (s *server) receipt(_ context.Context, _ caller, in *struct {
	ID string `path:"id" maxLength:"64"`
}) (api.Receipt, error) {
	r, err := s.Appliance.Receipt(in.ID)
	if err != nil {
		return api.Receipt{}, err
	}
	return receiptDoc(r), nil
}

type receiptsInput struct {
	From  int64  `query:"from" minimum:"0" doc:"Unix milliseconds"`
	To    int64  `query:"to" minimum:"0" doc:"Unix milliseconds, not included; 0: no end"`
	After string `query:"after" maxLength:"64"` // see afterDescription
	Limit int    `query:"limit" minimum:"1" maximum:"1000" default:"1000"`
}

func (s *server) receipts(_ context.Context, _ caller, in *receiptsInput) (*page[api.Receipt], error) {
	found, err := s.Appliance.Receipts(in.From, in.To, in.After, in.Limit)
	p := new(page[api.Receipt])
	for _, r := range found {
		if !p.add(receiptDoc(r)) {
			break
		}
	}
	return p, err
}

func (s *server) ledger(ctx context.Context, _ caller, _ *none) (api.Ledger, error) {
	st, err := s.Appliance.LedgerStats()
	return api.Ledger{
		FileSize: st.FileSize, FreeBytes: st.FreeBytes, Events: st.Events, FirstEvent: st.FirstEvent,
		Epochs: st.Epochs, Nonces: st.Nonces, MaxNonces: st.MaxNonces,
		Time: st.Time.Unix(), BehindClock: st.BehindClock, Trouble: st.Trouble,
	}, err
}

func (s *server) compact(ctx context.Context, who caller, _ *none) (api.Compacted, error) {
	// A compaction can take longer than requestTimeout. The caller waits for the result.
	before, after, took, err := s.Appliance.Compact(context.WithoutCancel(ctx), who.actor())
	return api.Compacted{Before: before, After: after, TookMS: took.Milliseconds()}, err
}

func policyDoc(v appliance.PolicyVersion) api.Policy {
	return api.Policy{Version: v.Version, SHA256: v.Hash, Activated: v.Activated.Unix(), Text: v.Text}
}

func (s *server) policies(_ context.Context, _ caller, in *pageInput) (*listed[api.Policy], error) {
	all, err := s.Appliance.Policies()
	version := func(v appliance.PolicyVersion) string { return fmt.Sprintf("%020d", v.Version) }
	return paged(in, all, version, policyDoc), err
}

func (s *server) policy(_ context.Context, _ caller, in *struct {
	Version uint64 `path:"version"`
}) (api.Policy, error) {
	v, err := s.Appliance.Policy(in.Version)
	return policyDoc(v), err
}

func decisionDoc(d appliance.Decision) api.Decision {
	return api.Decision{Event: d.Event, Record: string(d.Record)}
}

func (s *server) decision(_ context.Context, _ caller, in *struct {
	Event uint64 `path:"event"`
}) (api.Decision, error) {
	d, err := s.Appliance.Decision(in.Event)
	return decisionDoc(d), err
}

func (s *server) decisions(_ context.Context, _ caller, in *struct {
	From  uint64 `query:"from" doc:"the number of an event"`
	Since int64  `query:"since" minimum:"0" doc:"Unix milliseconds"`
}) (*page[api.Decision], error) {
	p := new(page[api.Decision])
	return p, s.Appliance.Decisions(in.From, time.UnixMilli(in.Since), func(d appliance.Decision) bool {
		return p.add(decisionDoc(d)) && !p.full()
	})
}
