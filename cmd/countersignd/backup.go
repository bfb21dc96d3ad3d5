package main

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"countersign/appliance"
	"countersign/internal/backup"
	"countersign/internal/cli"
	"countersign/internal/mirror"
	"countersign/internal/recipient"
	"countersign/internal/schedule"
)

// Backup has the backups of the appliance: the folder, who can read them, when they are made, and
// how many are kept.
type Backup struct {
	// Folder is the folder of the backups. The folder must exist. Default: none, and no backups are
	// made. A folder on the disk of the ledger is lost with this disk: mount another disk there, or
	// have the files, which are encrypted, carried away.
	Folder string `toml:"folder"`
	// Recipients are the public keys of those who can read the backups: age1... (age-keygen), or
	// SSH public keys of the types ssh-ed25519 and ssh-rsa. Required with folder. Danger: without
	// one of the private keys, nobody can restore. Keep two or more, apart from this machine.
	Recipients []string `toml:"recipients"`
	// Schedule says when a backup is made: a cron expression of five fields, in UTC. Default: 17 2
	// * * *. The value none makes backups when an operator asks, and for lists. A missed backup is
	// made when the daemon starts.
	Schedule string `toml:"schedule"`
	// Lists says whether each change of the ledger is written beside the backups within seconds,
	// encrypted to the same recipients, so that a restore reaches the last seconds and not the last
	// night. Each start of the daemon then makes a backup that the changes follow. Default: true.
	// 256 MiB of the disk of folder stay free.
	Lists bool `toml:"lists"`
	// SFTP is the address of a folder on an SFTP server, to which all files of folder are carried:
	// sftp://user@host:22/path. The path is absolute, and must exist. Default: none.
	SFTP string `toml:"sftp"`
	// SFTPKeyFile is the file with the SSH private key of the user at the server, without a
	// passphrase, with mode 0600, or a credential of systemd (LoadCredential). The file is read at
	// each connection. Required with sftp. Danger: the key can delete what is at the server.
	SFTPKeyFile string `toml:"sftp_key_file"`
	// SFTPHostKeys are the public keys of the server, such as ssh-ed25519 AAAA... Another server
	// gets nothing. Required with sftp.
	SFTPHostKeys []string `toml:"sftp_host_keys"`
	// Daily, Weekly and Monthly are numbers of days, weeks and months, of each of which the newest
	// backup is kept. The newest two are always kept. Defaults: 7, 5, 12. Older ones are removed
	// after a backup of the schedule.
	Daily   int `toml:"daily"`
	Weekly  int `toml:"weekly"`
	Monthly int `toml:"monthly"`
	// ProvenWithin is the longest time between two drills (countersignd drill) that prove a backup.
	// Beyond that the state has a cause, and an alert goes out. Default: 7d. 0s wants no drills.
	ProvenWithin Duration `toml:"proven_within"`
	// HoldersWithin is the same for drills with holders (countersignd drill --holders), where keys
	// are recoverable. Default: 100d. 0s wants none.
	HoldersWithin Duration `toml:"holders_proven_within"`
}

func defaultBackup() Backup {
	return Backup{Recipients: []string{}, Schedule: "17 2 * * *", Lists: true, SFTPHostKeys: []string{},
		Daily: 7, Weekly: 5, Monthly: 12, ProvenWithin: Duration(7 * 24 * time.Hour),
		HoldersWithin: Duration(100 * 24 * time.Hour)}
}

// check checks the fields.
func (b *Backup) check() error {
	switch {
	case b.Folder == "" && len(b.Recipients) > 0:
		return errors.New("recipients are for a folder: set folder")
	case b.Folder != "" && len(b.Recipients) == 0:
		return errors.New("recipients are missing: nobody could read the backups (age-keygen makes a key)")
	}
	switch {
	case b.SFTP == "" && (b.SFTPKeyFile != "" || len(b.SFTPHostKeys) > 0):
		return errors.New("sftp is missing: sftp_key_file and sftp_host_keys are for a server, such as " +
			"sftp://user@host:22/path")
	case b.SFTP != "" && b.Folder == "":
		return errors.New("folder is missing: what is in the folder is carried to sftp")
	case b.SFTP != "":
		if _, err := b.server(); err != nil {
			return err
		}
	}
	if b.Schedule != "none" {
		if err := schedule.CheckWindow(b.Schedule); err != nil {
			return fmt.Errorf("schedule: %w; or the value is none", err)
		}
	}
	for _, text := range b.Recipients {
		if _, err := recipient.Parse(text); err != nil {
			return fmt.Errorf("recipients: %w", err)
		}
	}
	for _, n := range []struct {
		field string
		value int
	}{{"daily", b.Daily}, {"weekly", b.Weekly}, {"monthly", b.Monthly}} {
		if n.value < 0 || n.value > 10_000 {
			return fmt.Errorf("%s must be 0 to 10000, and is %d", n.field, n.value)
		}
	}
	return nil
}

// server is the SFTP server.
func (b *Backup) server() (mirror.Server, error) {
	return mirror.Parse(b.SFTP, b.SFTPKeyFile, b.SFTPHostKeys)
}

// backup returns what is backed up: the file of this configuration and the files it names, apart
// from secrets.
func (c *Config) backup() appliance.BackupConfig {
	b := appliance.BackupConfig{
		Folder: c.Backup.Folder, Schedule: c.Backup.Schedule, Version: cli.Version(),
		Keep:         appliance.BackupKeep{Daily: c.Backup.Daily, Weekly: c.Backup.Weekly, Monthly: c.Backup.Monthly},
		ProvenWithin: c.Backup.ProvenWithin.std(), HoldersWithin: c.Backup.HoldersWithin.std(),
		States: map[string]string{}, Files: []backup.File{{Kind: backup.Ledger, Path: absolutePath(c.Ledger)}},
	}
	b.To, _ = recipient.ParseAll(c.Backup.Recipients) // checked with the configuration
	if b.Schedule == "none" {
		b.Schedule = ""
	}
	add := func(kind, path string) {
		f := backup.File{Kind: kind, Path: absolutePath(path)}
		if path != "" && !slices.Contains(b.Files, f) {
			b.Files = append(b.Files, f)
		}
	}
	left := func(what, path string) {
		at := either(strings.HasPrefix(path, credentials), path, absolutePath(path))
		if l := (backup.Left{Path: at, What: what}); path != "" && !slices.Contains(b.Left, l) {
			b.Left = append(b.Left, l)
		}
	}
	add(backup.Configuration, c.path)
	add(backup.Policy, c.Policy)
	for _, w := range c.Webhooks {
		add(backup.Authority, w.CAFile)
	}
	for _, s := range c.Sinks {
		add(backup.Authority, s.CAFile)
	}
	add(backup.Authority, c.Mail.CAFile)
	add(backup.Authority, c.Traces.CAFile)
	left("password of the mail server", c.Mail.PasswordFile)
	left("headers for the collector of traces", c.Traces.HeadersFile)
	left("SSH key for the SFTP server", c.Backup.SFTPKeyFile)
	for _, name := range slices.Sorted(maps.Keys(c.Tokens)) {
		t := c.Tokens[name]
		left("PIN of the token "+name, cmp.Or(t.pinPath(), t.PINFile))
		left("public key of the approver of states, of the token "+name, t.PolicyKey)
		for _, path := range t.Files {
			left("file of the module of the token "+name, path)
		}
		for _, variable := range slices.Sorted(maps.Keys(t.Environment)) {
			if path := t.Environment[variable]; filepath.IsAbs(path) {
				left(variable+" of the token "+name, path)
			}
		}
		if t.TPM != "" {
			b.States[name] = absolutePath(t.State)
		} else {
			left("PKCS#11 module of the token "+name, t.hsm().ModulePath())
		}
	}
	return b
}

// absolutePath is absolute for one path, which may be empty.
func absolutePath(path string) string { return strings.Join(absolute(path), "") }

// backupLine is the line of the checklist about backups.
func (c *Config) backupLine() verdict {
	const keys = "a token's keys have the vendor's means only"
	switch {
	case c.Backup.Folder == "":
		return verdict{"off", "no folder and recipients in [backup]: a lost disk is a lost ledger; " + keys}
	case c.Backup.Schedule == "none":
		return verdict{"partly", "a backup is made when an operator asks; " + keys}
	}
	drills := "no drill is wanted (proven_within)"
	if within := c.Backup.ProvenWithin.std(); within > 0 {
		drills = "a drill must prove one within " + cli.FormatDuration(within) + " (countersign admin backup drill)"
	}
	also := ""
	if s, err := c.Backup.server(); c.Backup.SFTP != "" && err == nil {
		also = " also to " + s.String() + ","
	}
	return verdict{"partly", fmt.Sprintf("by %q,%s for %s; %s; %s", c.Backup.Schedule, also,
		cli.Count(len(c.Backup.Recipients), "recipient"), drills, keys)}
}
