package admin

import (
	"context"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"time"

	"countersign/admin/api"
	"countersign/appliance"
	"countersign/internal/operators"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humaecho"
)

func backupDoc(b appliance.BackupInfo) api.Backup {
	return api.Backup{Name: b.Name, Size: b.Size, Made: b.Made.Unix(), Total: b.Total, Mirrored: b.Mirrored}
}

func (s *server) createBackup(ctx context.Context, who caller, _ *none) (api.MadeBackup, error) {
	made, err := s.Appliance.Backup(ctx, who.actor()) // also longer than requestTimeout
	if err != nil {
		return api.MadeBackup{}, err
	}
	m := made.Manifest
	return api.MadeBackup{
		Backup: backupDoc(made.BackupInfo), Epoch: m.Epoch, Events: m.First + m.Size, Files: len(m.Files),
		Event: made.Event, TookMS: made.Took.Milliseconds(),
	}, nil
}

// listBackups has no pages: retention bounds the number, and the folder has names only.
func (s *server) listBackups(_ context.Context, _ caller, in *pageInput) (*listed[api.Backup], error) {
	all, err := s.Appliance.Backups()
	if err != nil {
		return nil, err
	}
	if now, ok := s.Appliance.Copying(); ok {
		all = slices.Insert(all, 0, now)
	}
	return paged(in, all, func(b appliance.BackupInfo) string { return b.Name }, backupDoc), nil
}

func (s *server) pruneBackups(ctx context.Context, who caller, in *body[api.PruneBackups]) ([]api.Backup, error) {
	removed, err := s.Appliance.PruneBackups(ctx, who.actor(), in.Body.Dry)
	return docs(removed, backupDoc), err
}

func (s *server) lastDrill(context.Context, caller, *none) (api.Drills, error) {
	last, at, proven := s.Appliance.LastDrill()
	doc := api.Drills{At: unix(at), Proven: unix(proven)}
	if last != nil {
		doc.Last = new(api.Drill(*last))
	}
	return doc, nil
}

// drilled takes the report of a drill from this machine. A drill is no operator: it runs at night,
// and has the private key of a recipient, which this daemon must not have.
func (s *server) drilled(ctx context.Context, who caller, in *body[api.Drill]) (api.Drill, error) {
	if who.Kind != operators.Unix || who.UID != 0 && int(who.UID) != os.Geteuid() {
		return api.Drill{}, notAllowed.errorf("a drill is reported by root on the Unix socket: countersignd drill")
	}
	result, err := s.Appliance.Drilled(ctx, who.actor(), appliance.Drill(in.Body))
	return api.Drill(result), err
}

// getBackup answers with the file of a backup. A reader that takes none of it for streamWrite is
// given up.
func (s *server) getBackup(ctx context.Context, _ caller, in *named) (*huma.StreamResponse, error) {
	f, err := s.Appliance.OpenBackup(in.Name)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &huma.StreamResponse{Body: func(c huma.Context) {
		defer f.Close()
		c.SetHeader("Content-Type", "application/octet-stream")
		c.SetHeader("Content-Length", strconv.FormatInt(info.Size(), 10))
		c.SetStatus(http.StatusOK)
		if head, _ := ctx.Value(headKey{}).(bool); head {
			return
		}
		w := humaecho.Unwrap(c).Response()
		control := http.NewResponseController(w.Writer)
		for {
			control.SetWriteDeadline(time.Now().Add(streamWrite))
			if n, err := io.CopyN(w, f, 1<<20); n == 0 || err != nil {
				return // the reader compares the length
			}
		}
	}}, nil
}
