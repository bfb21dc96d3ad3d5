package main

import (
	"context"
	"encoding/hex"
	"log/slog"
	"os"
	"reflect"

	"countersign/appliance"
	"countersign/internal/logline"
	"countersign/policy"
)

// reloadAll reads the configuration file again at each signal, until ctx ends. Whatever the file
// says, the daemon goes on.
func reloadAll(
	ctx context.Context, path string, c Config, level *logline.Level, app *appliance.Appliance,
	signals <-chan os.Signal, log *slog.Logger,
) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-signals:
			reload(path, c, level, app, log)
		}
	}
}

// reload takes the log level of the configuration file, and logs what else is new. A level that an
// operator has set for a time stays until its end. The policy file is only offered, because
// operators put policies in force. Each delivery to a webhook reads ca_file, and the certificates
// of HTTPS are in the ledger, so neither needs a reload. The argument started is the configuration
// at the start.
func reload(path string, started Config, level *logline.Level, app *appliance.Appliance, log *slog.Logger) {
	c, err := loadConfig(path)
	if err == nil {
		err = refuseAccess(path, c)
	}
	if err != nil {
		log.Error("reload: nothing was reloaded; correct the configuration", "err", err)
		return
	}
	now, err := c.logLevel()
	if err != nil {
		log.Error("reload: nothing was reloaded; correct log_level", "err", err)
		return
	}
	was := level.State().Configured
	level.Configure(now)
	offerPolicy(started.Policy, app, log)
	started.LogLevel = c.LogLevel
	c.launcher, c.digest, c.startedBy = started.launcher, started.digest, started.startedBy // which are no settings
	log.Warn("reload: the configuration was read", "log_level", now.String(), "log_level_changed", now != was,
		"other_changes_need_a_restart", !reflect.DeepEqual(started, c))
}

// offerPolicy logs whether the policy file is the policy in force.
func offerPolicy(path string, app *appliance.Appliance, log *slog.Logger) {
	file, err := policy.Load(path)
	if err != nil {
		log.Error("reload: the policy file can't be used; the policy in force stays", "err", err)
		return
	}
	all, err := app.Policies()
	if err != nil {
		log.Error("reload: the policy in force can't be read", "err", err)
		return
	}
	if len(all) == 0 || all[len(all)-1].Hash != hex.EncodeToString(file.Hash[:]) {
		log.Warn("reload: the policy file is another than the policy in force; "+
			"to put the file in force: countersign admin policy reload", "file", path)
	}
}
