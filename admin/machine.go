package admin

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"maps"
	"slices"
	"strconv"

	"countersign/admin/api"
	"countersign/appliance"
	"countersign/approval"
	"countersign/audit"
	"countersign/internal/machine"
	"countersign/internal/update"
)

// noMachine is the error of an appliance that was not booted from the image.
func (s *server) noMachine() error {
	if s.Machine == nil {
		return notFound.errorf("the appliance is a program on a host: only one that was booted from the image has " +
			"a machine")
	}
	return nil
}

func (s *server) machine(ctx context.Context, _ caller, _ *none) (api.Machine, error) {
	if s.Machine == nil {
		return api.Machine{Slots: []api.MachineSlot{}, Files: []api.MachineFile{}, Failures: []string{}}, nil
	}
	st, err := s.Machine.Status(ctx)
	if err != nil {
		return api.Machine{}, unavailable.errorf("%v", err)
	}
	doc := api.Machine{
		Image:   true,
		Version: st.Image.Version, Variant: st.Image.Variant, Rollback: st.Image.Rollback, Test: st.Image.Test,
		Try: st.Try, Failures: []string{},
		Slots: docs(st.Slots, func(x machine.Slot) api.MachineSlot {
			return api.MachineSlot{Version: x.Version, Running: x.Running, Proven: x.Left < 0, Left: max(x.Left, 0)}
		}),
		Files: docs(st.Files, func(f machine.File) api.MachineFile { return api.MachineFile(f) }),
	}
	if p := st.Pending; p != nil {
		doc.Update = &api.MachineUpdate{From: p.From, To: p.Manifest.Version, Phase: p.Phase, Why: p.Why}
	}
	if st.Uploaded != nil {
		m := manifestDoc(*st.Uploaded)
		doc.Uploaded = &m
	}
	if c := st.Configuration; c != nil {
		doc.Configuration = &api.MachineConfiguration{SHA256: c.SHA256, Phase: c.Phase, Why: c.Why}
	}
	for _, step := range slices.Sorted(maps.Keys(st.Failures)) {
		doc.Failures = append(doc.Failures, step+": "+st.Failures[step])
	}
	return doc, nil
}

func manifestDoc(m update.Manifest) api.Manifest {
	return api.Manifest{Version: m.Version, Variant: m.Variant, Rollback: m.Rollback, Size: m.Size, SHA256: m.Digest(),
		Text: m.Text()}
}

func (s *server) uploadUpdate(ctx context.Context, _ caller, in *struct {
	Offset  int64  `query:"offset" minimum:"0" doc:"of the part in the file, in bytes"`
	RawBody []byte `contentType:"application/octet-stream"`
}) error {
	if err := s.noMachine(); err != nil {
		return err
	}
	if err := s.Machine.Upload(ctx, in.Offset, in.RawBody); err != nil {
		return conflict.errorf("%v", err)
	}
	return nil
}

func (s *server) endUpload(ctx context.Context, _ caller, _ *none) (api.Manifest, error) {
	if err := s.noMachine(); err != nil {
		return api.Manifest{}, err
	}
	m, err := s.Machine.EndUpload(ctx)
	if err != nil {
		return api.Manifest{}, conflict.errorf("%v", err)
	}
	return manifestDoc(m), nil
}

func (s *server) restartMachine(ctx context.Context, _ caller, _ *none) error {
	if err := s.noMachine(); err != nil {
		return err
	}
	return s.Machine.Restart(ctx)
}

// machineTime is the time for the machine to say how it is, while an act is checked.
const machineTime = requestTimeout / 2

// machineActs are the acts on the machine of an appliance that was booted from the image.
func machineActs(m *machine.Client) map[string]act {
	return map[string]act{
		approval.ActMachineUpdate: {func(a *appliance.Appliance, p parameters, content []byte) (parameters, do, error) {
			return updateMachine(a, m, p, content)
		}, warnUpdate},
		approval.ActMachineReset: {func(a *appliance.Appliance, p parameters, _ []byte) (parameters, do, error) {
			return resetMachine(a, m, p)
		}, nil},
		approval.ActMachineConfigure: {
			func(a *appliance.Appliance, p parameters, content []byte) (parameters, do, error) {
				return configureMachine(a, m, p, content)
			},
			func(*appliance.Appliance, parameters, []byte) []string {
				return []string{"the daemon starts anew at once, and serves nobody for some seconds"}
			},
		},
	}
}

// updateMachine installs the uploaded image whose manifest is the content of the proposal, and
// restarts the machine.
func updateMachine(
	a *appliance.Appliance, client *machine.Client, p parameters, content []byte,
) (parameters, do, error) {
	st, err := onMachine(client)
	if err != nil {
		return nil, nil, err
	}
	v, err := values(p, "version", "from", "rollback_version", "?sha256")
	if err != nil {
		return nil, nil, err
	}
	m, err := update.ParseManifest(string(content))
	switch {
	case err != nil:
		return nil, nil, invalid.errorf("%v", err)
	case v["sha256"] != "" && v["sha256"] != m.Digest():
		return nil, nil, invalid.errorf("update: the SHA-256 of its manifest is %s", m.Digest())
	case v["version"] != m.Version || v["rollback_version"] != strconv.FormatUint(m.Rollback, 10):
		return nil, nil, invalid.errorf("update: its manifest has version %s and rollback version %d", m.Version,
			m.Rollback)
	case v["from"] != st.Image.Version:
		return nil, nil, conflict.errorf("update: it is from version %s, and %s runs", v["from"], st.Image.Version)
	case st.Pending != nil:
		return nil, nil, conflict.errorf("update: the one to version %s has not ended yet", st.Pending.Manifest.Version)
	case st.Uploaded == nil || st.Uploaded.Digest() != m.Digest():
		return nil, nil, conflict.errorf("update: its file is not on the machine: " +
			"countersign admin update propose FILE")
	}
	p = list("version", m.Version, "from", v["from"], "rollback_version", v["rollback_version"], "sha256", m.Digest())
	return p, func(ctx context.Context, who audit.Actor) error {
		e := audit.NewMachineUpdateBegun(who, m.Version, v["from"], m.Digest(), m.Rollback)
		if err := a.Record(ctx, e); err != nil {
			return err
		}
		if err := client.Install(ctx, m.Digest()); err != nil {
			return errors.Join(err, a.Record(ctx, audit.NewMachineUpdateFailed(m.Version, v["from"], err.Error())))
		}
		return client.Restart(ctx)
	}, notRolledBack(a)
}

func warnUpdate(_ *appliance.Appliance, p parameters, _ []byte) []string {
	return []string{"the machine restarts at once, and serves nobody for a minute or two; with a rollback version " +
		"above that of now, it never opens its disk in an older image again"}
}

// onMachine returns the state of the machine.
func onMachine(client *machine.Client) (machine.Status, error) {
	if client == nil {
		return machine.Status{}, conflict.errorf("the appliance is a program on a host: update its package")
	}
	ctx, cancel := context.WithTimeout(context.Background(), machineTime)
	defer cancel()
	st, err := client.Status(ctx)
	if err != nil {
		err = unavailable.errorf("%v", err)
	}
	return st, err
}

// resetMachine destroys the disk of the machine.
func resetMachine(a *appliance.Appliance, client *machine.Client, p parameters) (parameters, do, error) {
	if client == nil {
		return nil, nil, conflict.errorf("the appliance is a program on a host: countersignd factory-reset")
	}
	v, err := values(p, "name")
	if err != nil {
		return nil, nil, err
	}
	log, _, err := a.Log()
	if err != nil {
		return nil, nil, err
	}
	if v["name"] != log.Name() {
		return nil, nil, invalid.errorf("machine reset: the name of this appliance is %s", log.Name())
	}
	return p, func(ctx context.Context, who audit.Actor) error {
		if err := a.Record(ctx, audit.NewMachineResetBegun(who, v["name"])); err != nil {
			return err
		}
		return client.Reset(ctx, v["name"])
	}, nil
}

// configureMachine puts the content of the proposal in force as the configuration.
func configureMachine(
	a *appliance.Appliance, client *machine.Client, p parameters, content []byte,
) (parameters, do, error) {
	if client == nil {
		return nil, nil, conflict.errorf("the appliance is a program on a host: root changes its configuration")
	}
	v, err := values(p, "from", "?sha256")
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), machineTime)
	defer cancel()
	now, err := client.Configuration(ctx)
	if err != nil {
		return nil, nil, unavailable.errorf("%v", err)
	}
	from, next := hexDigest([]byte(now)), hexDigest(content)
	switch {
	case v["from"] != from:
		return nil, nil, conflict.errorf("machine configure: the configuration with SHA-256 %s is in force no more, "+
			"but %s: make the change anew", v["from"], from)
	case v["sha256"] != "" && v["sha256"] != next:
		return nil, nil, invalid.errorf("machine configure: its content has the SHA-256 %s", next)
	}
	if err := client.CheckConfiguration(ctx, string(content)); err != nil {
		return nil, nil, invalid.errorf("machine configure: %v", err)
	}
	return list("from", from, "sha256", next), func(ctx context.Context, who audit.Actor) error {
		if err := a.Record(ctx, audit.NewMachineConfigurationBegun(who, next, from)); err != nil {
			return err
		}
		if err := client.Configure(ctx, string(content)); err != nil {
			return errors.Join(err, a.Record(ctx, audit.NewMachineConfigurationFailed(next, err.Error())))
		}
		return nil
	}, notRolledBack(a)
}

func hexDigest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func (s *server) machineConfiguration(ctx context.Context, _ caller, _ *none) (api.Configuration, error) {
	if s.Machine == nil {
		return api.Configuration{}, nil
	}
	text, err := s.Machine.Configuration(ctx)
	if err != nil {
		return api.Configuration{}, unavailable.errorf("%v", err)
	}
	return api.Configuration{Text: text, SHA256: hexDigest([]byte(text))}, nil
}

// putMachineFile keeps a file. Its name, which the event has, is known afterwards only: a file
// without an event is removed, and no approved configuration can name it.
func (s *server) putMachineFile(ctx context.Context, who caller, in *struct {
	Name    string `path:"name" doc:"1 to 40 small letters, digits, hyphens and underscores"`
	RawBody []byte `contentType:"application/octet-stream"`
}) (api.MachineFile, error) {
	if err := s.noMachine(); err != nil {
		return api.MachineFile{}, err
	}
	defer clear(in.RawBody)
	name, err := s.Machine.PutFile(ctx, in.Name, in.RawBody)
	if err != nil {
		return api.MachineFile{}, conflict.errorf("%v", err)
	}
	if err := s.Appliance.Record(ctx, audit.NewMachineFileKept(who.actor(), name, len(in.RawBody))); err != nil {
		return api.MachineFile{}, errors.Join(err, s.Machine.RemoveFile(context.WithoutCancel(ctx), name))
	}
	st, err := onMachine(s.Machine)
	if err != nil {
		return api.MachineFile{}, err
	}
	for _, f := range st.Files {
		if f.Name == name {
			return api.MachineFile(f), nil
		}
	}
	return api.MachineFile{}, conflict.errorf("the file %s was removed meanwhile", name)
}

func (s *server) removeMachineFile(ctx context.Context, who caller, in *named) error {
	if err := s.noMachine(); err != nil {
		return err
	}
	if err := s.Machine.RemoveFile(ctx, in.Name); err != nil {
		return conflict.errorf("%v", err)
	}
	return s.Appliance.Record(ctx, audit.NewMachineFileRemoved(who.actor(), in.Name))
}
