package admin

import (
	"context"

	"countersign/admin/api"
	"countersign/appliance"
)

func backupDoc(b appliance.BackupInfo) api.Backup {
	return api.Backup{Name: b.Name, Size: b.Size, Made: b.Made.Unix()}
}

func (s *server) createBackup(ctx context.Context, who caller, _ *none) (api.MadeBackup, error) {
	// A backup can take longer than requestTimeout. The caller waits for the result.
	made, err := s.Appliance.Backup(context.WithoutCancel(ctx), who.actor())
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
	return paged(in, all, func(b appliance.BackupInfo) string { return b.Name }, backupDoc), nil
}

func (s *server) pruneBackups(ctx context.Context, who caller, in *body[api.PruneBackups]) ([]api.Backup, error) {
	removed, err := s.Appliance.PruneBackups(ctx, who.actor(), in.Body.Dry)
	return docs(removed, backupDoc), err
}
