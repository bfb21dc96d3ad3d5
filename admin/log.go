package admin

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"countersign/admin/api"
	"countersign/appliance"
	"countersign/audit"
	"countersign/internal/ijson"
	"countersign/internal/ledger"
	"countersign/internal/manage"
	"countersign/internal/sink"
	"countersign/internal/webhook"
	"countersign/wire"

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

func (s *server) eventProof(ctx context.Context, _ caller, in *struct {
	Event uint64 `path:"event"`
	Seen  uint64 `query:"seen" doc:"leaves of the last checkpoint of the epoch that the caller has seen; 0: none"`
}) (api.EventProof, error) {
	p, c, err := s.Appliance.EventProof(ctx, in.Event, in.Seen)
	if err != nil {
		return api.EventProof{}, err
	}
	texts := func(path []wire.Bytes32) []string {
		return docs(path, func(h wire.Bytes32) string { return hex.EncodeToString(h[:]) })
	}
	return api.EventProof{
		Event: p.Event, Epoch: p.Epoch, Index: p.Index, Leaf: string(p.Leaf), Path: texts(p.Path),
		Checkpoint: p.Checkpoint, Consistency: texts(c.Path),
	}, nil
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

// retained is a page of the schedule of retention.
type retained struct {
	Next string `header:"Countersign-Next" doc:"the parameter after for the next page; absent on the last page"`
	Body api.Retention
}

func (s *server) retention(_ context.Context, _ caller, in *pageInput) (*retained, error) {
	epochs, before, err := s.Appliance.Preview()
	if err != nil {
		return nil, err
	}
	if in.After != "" {
		last, err := numberAfter(in.After)
		if err != nil {
			return nil, err
		}
		epochs = slices.DeleteFunc(epochs, func(e appliance.EpochStatus) bool { return uint64(e.Number) <= last })
	}
	out := new(retained)
	if len(epochs) > maxEntries {
		epochs = epochs[:maxEntries]
		out.Next = strconv.FormatUint(uint64(epochs[maxEntries-1].Number), 10)
	}
	out.Body.ReceiptsBefore = before.Unix()
	out.Body.Epochs = docs(epochs, func(e appliance.EpochStatus) api.Epoch {
		return api.Epoch{
			Epoch: e.Number, First: e.First, Size: e.Size, Begun: e.Begun / 1000, Ended: e.Ended / 1000,
			Due: unix(e.Due), Dropped: e.Dropping / 1000, Holds: holdDocs(e.Holds), Checkpoint: e.Signed,
		}
	})
	return out, nil
}

// holdDocs returns the legal holds of an epoch, in the order of their names.
func holdDocs(holds map[string]string) []api.Hold {
	return docs(slices.Sorted(maps.Keys(holds)), func(name string) api.Hold {
		return api.Hold{Name: name, Reason: holds[name]}
	})
}

type holdInput struct {
	Epoch uint32 `path:"epoch" maximum:"4294967295"`
	Body  api.Hold
}

func (s *server) hold(ctx context.Context, who caller, in *holdInput) error {
	return s.Appliance.Hold(ctx, who.actor(), in.Epoch, in.Body.Name, in.Body.Reason)
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
	After string `query:"after" maxLength:"200" doc:"the header Countersign-Next of the page before"`
	Limit int    `query:"limit" minimum:"1" maximum:"1000" default:"1000"`
}

// receipts lists receipts in the order of their times and ids.
func (s *server) receipts(_ context.Context, _ caller, in *receiptsInput) (*listed[api.Receipt], error) {
	from, id := in.From, ""
	if in.After != "" {
		at, last, err := receiptAfter(in.After)
		if err != nil {
			return nil, err
		}
		if at >= from {
			from, id = at, last
		}
	}
	found, err := s.Appliance.Receipts(from, in.To, id, in.Limit+1)
	out := newListed[api.Receipt](in.Limit)
	for _, r := range found {
		if !out.add(receiptDoc(r), receiptCursor(r)) {
			break
		}
	}
	return out, err
}

func (s *server) ledger(ctx context.Context, _ caller, _ *none) (api.Ledger, error) {
	st, err := s.Appliance.LedgerStats()
	return api.Ledger{
		FileSize: st.FileSize, FreeBytes: st.FreeBytes, Events: st.Events, FirstEvent: st.FirstEvent,
		Epochs: st.Epochs, Nonces: st.Nonces, MaxNonces: st.MaxNonces,
		Time: st.Time.Unix(), BehindClock: st.BehindClock, Trouble: st.Trouble,
		Checkpoint: s.Appliance.LastCheckpoint().Unix(),
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

type decisionsInput struct {
	Since int64  `query:"since" minimum:"0" doc:"Unix milliseconds of the ledger's time"`
	After string `query:"after" maxLength:"200" doc:"the header Countersign-Next of the page before"`
}

func (s *server) decisions(_ context.Context, _ caller, in *decisionsInput) (*listed[api.Decision], error) {
	var from uint64
	if in.After != "" {
		last, err := numberAfter(in.After)
		if err != nil {
			return nil, err
		}
		from = last + 1
	}
	out := newListed[api.Decision](maxEntries)
	return out, s.Appliance.Decisions(from, time.UnixMilli(in.Since), func(d appliance.Decision) bool {
		return out.add(decisionDoc(d), strconv.FormatUint(d.Event, 10))
	})
}

// sinks lists the sinks, of which a configuration has a few.
func (s *server) sinks(context.Context, caller, *none) ([]api.Sink, error) {
	return docs(s.Appliance.Sinks(), func(st sink.Status) api.Sink {
		doc := api.Sink{
			Name: st.Name, Kind: st.Kind, Next: st.Next, Behind: st.Behind, Sent: st.Sent, Dropped: st.Dropped,
			Gaps: docs(st.Gaps, func(g sink.Gap) api.Gap {
				return api.Gap{From: g.From, Before: g.Before, Why: g.Why}
			}),
		}
		if st.Failing != nil {
			doc.Failing = st.Failing.Error()
		}
		return doc
	}), nil
}

type periodInput struct {
	Since int64 `query:"since" minimum:"0" doc:"Unix milliseconds"`
	Until int64 `query:"until" minimum:"0" doc:"Unix milliseconds, not included; 0: now"`
}

// statement returns the statement of completeness about a period.
func (s *server) statement(ctx context.Context, _ caller, in *periodInput) (*file, error) {
	st, err := s.Appliance.Statement(ctx, in.Since, in.Until)
	if err != nil {
		return nil, err
	}
	return &file{"application/json", "no-store", st.Encode()}, nil
}

// rows is a page of the rows of a report.
type rows struct {
	Next         string `header:"Countersign-Next" doc:"the parameter after for the next page; absent on the last page"`
	ContentType  string `header:"Content-Type"`
	CacheControl string `header:"Cache-Control"`
	Body         []byte
}

func newRows(form audit.Form) *rows {
	if form == audit.CSV {
		return &rows{ContentType: "text/csv; charset=utf-8; header=present", CacheControl: "no-store"}
	}
	return &rows{ContentType: "application/jsonl; charset=utf-8", CacheControl: "no-store"}
}

type eventRowsInput struct {
	Form  string `query:"form" enum:"csv,jsonl" default:"jsonl" doc:"csv begins with the names of the columns"`
	First uint64 `query:"first" doc:"first of the statement"`
	End   uint64 `query:"end" doc:"end of the statement; without it there are no rows"`
	After string `query:"after" maxLength:"20" doc:"the header Countersign-Next of the page before"`
}

// eventRows lists the events of a statement. The pages one after the other are a file of the
// report.
func (s *server) eventRows(_ context.Context, _ caller, in *eventRowsInput) (*rows, error) {
	form, from := audit.Form(in.Form), in.First
	out := newRows(form)
	if in.After == "" {
		out.Body = form.EventHeading()
	} else if last, err := numberAfter(in.After); err != nil {
		return nil, err
	} else {
		from = max(from, last+1)
	}
	last, n := "", 0
	var broken error
	err := s.Appliance.EventBytes(from, in.End, func(index uint64, entry []byte) bool {
		var b []byte
		if b, broken = form.AppendEvent(out.Body, index, entry); broken != nil {
			return false
		}
		if n > 0 && (n == maxEntries || len(b) > maxPage) {
			out.Next = last
			return false
		}
		out.Body, last, n = b, strconv.FormatUint(index, 10), n+1
		return true
	})
	return out, errors.Join(err, broken)
}

type receiptRowsInput struct {
	Form  string `query:"form" enum:"csv,jsonl" default:"jsonl" doc:"csv begins with the names of the columns"`
	Since int64  `query:"since" minimum:"0" doc:"since_ms of the statement"`
	Until int64  `query:"until" minimum:"0" doc:"until_ms of the statement"`
	First uint64 `query:"first" doc:"first of the statement"`
	End   uint64 `query:"end" doc:"end of the statement; without it there are no rows"`
	After string `query:"after" maxLength:"200" doc:"the header Countersign-Next of the page before"`
}

// receiptRows lists the receipts of a statement. A page can be empty and have a next one.
func (s *server) receiptRows(_ context.Context, _ caller, in *receiptRowsInput) (*rows, error) {
	form := audit.Form(in.Form)
	out := newRows(form)
	since, id := int64(0), ""
	if in.After == "" {
		out.Body = form.ReceiptHeading()
	} else {
		var err error
		if since, id, err = receiptAfter(in.After); err != nil {
			return nil, err
		}
	}
	of := audit.Statement{SinceMS: in.Since, UntilMS: in.Until, First: in.First, End: in.End}
	found, next, err := s.Appliance.ReportedReceipts(of, since, id, maxEntries)
	for _, r := range found {
		out.Body = form.AppendReceipt(out.Body, r)
	}
	if next != nil {
		out.Next = receiptCursor(*next)
	}
	return out, err
}

// receiptCursor is the cursor behind a receipt. Several receipts can have one time, so the cursor
// has both time and id: MILLISECONDS-ID.
func receiptCursor(r ledger.Receipt) string { return fmt.Sprintf("%d-%x", r.TimeMS, r.ID) }

// receiptAfter parses the result of receiptCursor.
func receiptAfter(after string) (ms int64, id string, err error) {
	text, id, ok := strings.Cut(after, "-")
	at, err := numberAfter(text)
	if err != nil || !ok || at > math.MaxInt64 {
		return 0, "", invalid.errorf("after: %q is not the cursor that a page before has given", ijson.Clip(after))
	}
	return int64(at), id, nil
}
