package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"log/slog"
	"time"

	"countersign/admin/certs"
	"countersign/appliance"
	"countersign/audit"
	"countersign/internal/machine"
	"countersign/internal/operators"
)

// machine returns the client of the machine's agent; nil without machine_socket.
func (c *Config) machine() *machine.Client {
	if c.MachineSocket == "" {
		return nil
	}
	return &machine.Client{Path: c.MachineSocket}
}

// machineReport tells the machine how the appliance is, for its consoles, and ends updates of its
// image.
type machineReport struct {
	client   *machine.Client
	app      *appliance.Appliance
	registry *operators.Registry
	certs    *certs.Manager
	config   string // SHA-256 of the configuration that this daemon has read
	log      *slog.Logger

	begun  time.Time // of run
	failed string    // the last error, so that each is logged once
}

// reportInterval is the time between two reports.
const reportInterval = 5 * time.Second

// run reports until ctx ends.
func (m *machineReport) run(ctx context.Context) {
	m.begun = time.Now()
	for {
		err := errors.Join(m.report(ctx), m.endChanges(ctx))
		text := ""
		if err != nil {
			text = err.Error()
		}
		if text != m.failed && ctx.Err() == nil {
			if m.failed = text; err != nil {
				m.log.Error("the machine's agent", "err", err)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(reportInterval):
		}
	}
}

func (m *machineReport) report(ctx context.Context) error {
	h := m.app.Health()
	r := machine.Report{State: string(h.Condition), Causes: []string{}, Enrolled: m.registry.Initialised()}
	if log, _, err := m.app.Log(); err == nil {
		r.Appliance = log.Name()
	}
	for _, each := range h.Causes {
		r.Causes = append(r.Causes, each.String())
	}
	if k, err := m.app.Keys.Noise(); err == nil {
		r.Noise = hex.EncodeToString(k.Info().PublicKey)
	}
	if m.certs != nil {
		if ca, err := m.certs.Authority(ctx); err == nil {
			if block, _ := pem.Decode(ca); block != nil {
				sum := sha256.Sum256(block.Bytes)
				r.CA = hex.EncodeToString(sum[:])
			}
		}
	}
	return m.client.Report(ctx, r)
}

// endChanges writes the ends of changes of the machine into the audit log.
func (m *machineReport) endChanges(ctx context.Context) error {
	s, err := m.client.Status(ctx)
	if err != nil {
		return err
	}
	if c := s.Configuration; c != nil {
		err = m.endConfiguration(ctx, *c)
	}
	if s.Pending != nil {
		err = errors.Join(err, m.endUpdate(ctx, s, *s.Pending))
	}
	return err
}

// settling is the time that a daemon serves before it says that it has come up with a
// configuration.
const settling = 15 * time.Second

// endConfiguration writes the end of a change of the configuration into the audit log: this daemon
// has come up with the new one, has served a while and signs, or the machine went back.
func (m *machineReport) endConfiguration(ctx context.Context, c machine.PendingConfiguration) error {
	var e audit.Event
	switch {
	case c.Phase == machine.PhaseFailed:
		e = audit.NewMachineConfigurationFailed(c.SHA256, c.Why)
	case m.config == c.SHA256:
		if time.Since(m.begun) < settling {
			return nil
		}
		if err := m.app.Canary(ctx); err != nil {
			return err
		}
		e = audit.NewMachineConfigured(c.SHA256)
	default:
		return nil // the daemon is about to restart
	}
	if err := m.app.Record(ctx, e); err != nil {
		return err
	}
	return m.client.SettleConfiguration(ctx, c.SHA256)
}

// endUpdate writes the end of an update into the audit log. A new image has proven itself when the
// appliance is ready, when a key has signed, and when the event is on the disk; only then does the
// machine keep the image. A power cut in between repeats the event.
func (m *machineReport) endUpdate(ctx context.Context, s machine.Status, p machine.Pending) (err error) {
	to := p.Manifest.Version
	switch p.Phase {
	case machine.PhaseFailed:
		err = m.app.Record(ctx, audit.NewMachineUpdateFailed(to, p.From, p.Why))
	case machine.PhaseInstalled:
		if s.Image.Version != to {
			return nil // the machine restarts
		}
		if err := m.app.Canary(ctx); err != nil {
			return err
		}
		if err = m.app.Record(ctx, audit.NewMachineUpdated(to, p.From)); err == nil {
			err = m.client.Prove(ctx, to)
		}
	case machine.PhaseProven: // the power went before the machine has kept it
		err = m.client.Prove(ctx, to)
	}
	if err != nil {
		return err
	}
	return m.client.Settle(ctx, to)
}
