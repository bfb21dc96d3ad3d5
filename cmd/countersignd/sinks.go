package main

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"countersign/appliance"
	"countersign/audit"
	"countersign/internal/cli"
	"countersign/internal/keystore"
	"countersign/internal/secret"
	"countersign/internal/sink"
	"countersign/internal/webhook"
)

// defaultSink returns the configuration of an empty table [[sinks]].
func defaultSink() Sink { return Sink{FileMiB: 100, Files: 10, MaxAge: Duration(7 * 24 * time.Hour)} }

// checkSinks is the part of check for sinks. checkSinks sets the defaults of a table [[sinks]].
func (c *Config) checkSinks() error {
	names, files := map[string]bool{}, map[string]string{c.Ledger: "the ledger", c.Policy: "the policy"}
	if c.History != "" && files[c.History] != "" {
		return fmt.Errorf("history: %s is the file of %s: the history needs a file of its own",
			c.History, files[c.History])
	}
	files[c.History] = "the history"
	for i := range c.Sinks {
		s := &c.Sinks[i]
		if err := keystore.CheckName(s.Name); err != nil {
			return fmt.Errorf("sinks: name: %w", err)
		}
		if names[s.Name] {
			return fmt.Errorf("sinks: two have the name %q: each needs a name of its own", s.Name)
		}
		if names[s.Name] = true; files[s.File] != "" {
			return fmt.Errorf("sinks.%s.file: %s is the file of %s: each needs a file of its own",
				s.Name, s.File, files[s.File])
		}
		if s.File != "" {
			files[s.File] = "the sink " + s.Name
		}
		d := defaultSink()
		s.FileMiB, s.Files = cmp.Or(s.FileMiB, d.FileMiB), cmp.Or(s.Files, d.Files)
		s.MaxAge = cmp.Or(s.MaxAge, d.MaxAge)
		if err := s.check(); err != nil {
			return fmt.Errorf("sinks.%s.%w", s.Name, err)
		}
	}
	return nil
}

// check checks the fields of a sink besides the name.
func (s *Sink) check() error {
	receivers := 0
	for _, each := range []string{s.Syslog, s.File, s.URL} {
		if each != "" {
			receivers++
		}
	}
	switch {
	case receivers != 1:
		return errors.New("syslog, file, url: a sink has one of them")
	case s.FileMiB < 1 || s.FileMiB > 1<<20:
		return fmt.Errorf("file_mib must be 1 to %d, and is %d", 1<<20, s.FileMiB)
	case s.Files < 1 || s.Files > 10_000:
		return fmt.Errorf("files must be 1 to 10000, and is %d", s.Files)
	case s.MaxAge.std() < time.Minute || s.MaxAge.std() > 3653*24*time.Hour:
		return fmt.Errorf("max_age must be 1m to 3653d, and is %s", cli.FormatDuration(s.MaxAge.std()))
	case len(s.Types) > 0 && len(s.Except) > 0:
		return errors.New("types and except exclude each other")
	case s.CAFile != "" && s.File != "":
		return errors.New("ca_file is for syslog and url")
	}
	for _, field := range []struct {
		name  string
		types []string
	}{{"types", s.Types}, {"except", s.Except}} {
		for _, t := range field.types {
			if !audit.Type(t).Known() {
				return fmt.Errorf("%s: %q is not a type of events, for example KeyCreated: docs/SPEC.md has the list",
					field.name, t)
			}
		}
	}
	if s.Syslog != "" {
		host, port, err := net.SplitHostPort(s.Syslog)
		n, notPort := strconv.ParseUint(port, 10, 16)
		if err != nil || notPort != nil || host == "" || n == 0 {
			return fmt.Errorf("syslog: %q is not host:port", s.Syslog)
		}
	}
	if s.URL != "" {
		target := webhook.Target{Name: s.Name, URL: secret.Of(s.URL), CAFile: s.CAFile}
		if _, err := webhook.New(webhook.Config{Targets: []webhook.Target{target}}); err != nil {
			return fmt.Errorf("url: %w", err)
		}
	}
	return nil
}

func (c *Config) sinks() (all []appliance.SinkConfig) {
	for _, s := range c.Sinks {
		of := appliance.SinkConfig{Config: sink.Config{
			Name: s.Name, Types: eventTypes(s.Types), Except: eventTypes(s.Except), MaxAge: s.MaxAge.std(),
		}}
		switch {
		case s.Syslog != "":
			of.Kind, of.Syslog = "syslog", &sink.Syslog{Address: s.Syslog, CAFile: s.CAFile}
		case s.File != "":
			of.Kind, of.File = "file", &sink.File{Path: s.File, Size: int64(s.FileMiB) << 20, Files: s.Files}
		default:
			of.Kind, of.Webhook = "webhook", &webhook.Target{URL: secret.Of(s.URL), CAFile: s.CAFile}
		}
		all = append(all, of)
	}
	return all
}

func eventTypes(names []string) (all []audit.Type) {
	for _, name := range names {
		all = append(all, audit.Type(name))
	}
	return all
}
