package appliance

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"countersign/internal/cause"
	"countersign/internal/keyring"
	"countersign/internal/sink"
	"countersign/internal/webhook"
)

// SinkConfig is the configuration of a sink for the events of the audit log. One of the receivers
// is set.
type SinkConfig struct {
	sink.Config // the state and the log are set by the appliance
	Syslog      *sink.Syslog
	File        *sink.File
	Webhook     *webhook.Target
}

// signHook signs a message of a webhook with the audit log's key.
func (a *Appliance) signHook(ctx context.Context, message []byte) ([]byte, error) {
	k, err := a.Keys.LogKey()
	if err != nil {
		return nil, err
	}
	verifies := func(signature []byte) bool { return k.Verify(message, signature) == nil }
	return k.Sign(ctx, keyring.Own, message, verifies)
}

// keepSinks sends the events of the log to the sinks until ctx ends.
func (a *Appliance) keepSinks(ctx context.Context) {
	if len(a.sinkConfigs) == 0 {
		return
	}
	log, _, err := a.Log()
	if err != nil { // the start has found the log's key
		a.log.Error("there are no sinks", "err", err)
		return
	}
	var all []*sink.Sink
	for _, c := range a.sinkConfigs {
		c.State, c.Log = filepath.Join(a.sinkState, c.Name), a.log
		to, err := a.receiver(c, log.Name())
		if err != nil { // the configuration has been checked before
			a.log.Error("a sink can't be used", "sink", c.Name, "err", err)
			continue
		}
		all = append(all, sink.New(c.Config, a.ledger, to))
	}
	a.sinks.Store(&all)
	var running sync.WaitGroup
	for _, s := range all {
		running.Go(func() { s.Run(ctx) })
	}
	running.Wait()
}

// receiver returns the receiver of a sink.
func (a *Appliance) receiver(c SinkConfig, logName string) (sink.Receiver, error) {
	_, id, _ := strings.Cut(logName, "/")
	switch {
	case c.File != nil:
		return &sink.File{Path: c.File.Path, Size: c.File.Size, Files: c.File.Files}, nil
	case c.Syslog != nil:
		host, err := os.Hostname()
		if err != nil {
			host = "" // a message may have none
		}
		return &sink.Syslog{Address: c.Syslog.Address, CAFile: c.Syslog.CAFile, Host: host, LogID: id}, nil
	}
	target := *c.Webhook
	target.Name = c.Name
	sender, err := webhook.New(webhook.Config{Targets: []webhook.Target{target}, Sign: a.signHook, Log: a.log})
	return &sink.Webhook{Name: c.Name, LogID: id, Sender: sender}, err
}

// Sinks returns the state of the sinks in the order of the configuration.
func (a *Appliance) Sinks() (all []sink.Status) {
	if sinks := a.sinks.Load(); sinks != nil {
		for _, s := range *sinks {
			all = append(all, s.Status())
		}
	}
	return all
}

// sinkCauses returns the sinks that do not take events, or whose position can't be written.
func (a *Appliance) sinkCauses() (all []cause.Cause) {
	for _, s := range a.Sinks() {
		if s.Failing != nil {
			all = append(all, cause.Sink.Of(s.Name, "%d events wait: %v", s.Behind, s.Failing))
		}
		if s.Unkept != nil {
			all = append(all, cause.Sink.Of(s.Name, "the position is not written: %v", s.Unkept))
		}
	}
	return all
}
