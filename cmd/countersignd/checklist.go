package main

import (
	"fmt"
	"io"
	"maps"
	"runtime/debug"
	"slices"
	"strings"
	"text/tabwriter"

	"countersign/internal/cli"
	"countersign/internal/webhook"
)

// line is a line of the production checklist: docs/CHECKLIST.md has where each is done, and the
// tests that fail without it.
type line struct {
	title string
	seen  string // command by which an operator sees the line in a running appliance
	of    func(Config) verdict
}

// verdict is what the configuration and the build say of a line: holds (in every build), on, off,
// partly, or unknown.
type verdict struct{ state, text string }

func holds(format string, args ...any) verdict { return verdict{"holds", fmt.Sprintf(format, args...)} }
func on(format string, args ...any) verdict    { return verdict{"on", fmt.Sprintf(format, args...)} }
func unknown(format string, args ...any) verdict {
	return verdict{"unknown", fmt.Sprintf(format, args...)}
}

func span(d Duration) string { return cli.FormatDuration(d.std()) }

// lines returns the checklist in the order of docs/CHECKLIST.md.
func lines() []line {
	return []line{
		{"Ed25519 verified on all payment requests", `countersign admin audit list --type SignatureRejected --since 1d`,
			func(c Config) verdict {
				return holds("no configuration turns verification off")
			}},
		{"Nonces checked for replay", `countersign admin audit list --type ReplayRefused --since 7d`,
			func(c Config) verdict {
				return c.nonceLine()
			}},
		{"Expired requests refused", `countersign admin state`,
			func(c Config) verdict {
				return holds("clock_skew %s, max_lifetime %s", span(c.Limits.ClockSkew), span(c.Limits.MaxLifetime))
			}},
		{"Noise_IK on every connection of a peer", `countersign admin peer list`,
			func(c Config) verdict {
				return holds("listeners: %s", c.listeners())
			}},
		{"Keys in platform secure storage", `countersign admin key list`,
			func(c Config) verdict {
				return c.storageLine()
			}},
		{"Rotation implemented and tested", `countersign admin key list`,
			func(c Config) verdict {
				return unknown("each key has its own settings, in the ledger")
			}},
		{"Backup and recovery documented", `countersign admin backup list`,
			func(c Config) verdict {
				return c.backupLine()
			}},
		{"No keys in logs or errors", `countersignd check --config countersign.toml`,
			func(c Config) verdict {
				return holds("the daemon has neither a key nor a PIN, and scrubs its log")
			}},
		{"Rate limiting configured", `countersign admin audit list --type RateLimitTriggered --since 1d`,
			func(c Config) verdict {
				return on("%d requests a second for a peer, %d handshakes a minute, %d of one address",
					c.Limits.RequestsPerSecond, c.Limits.Handshakes, c.Limits.HandshakesPerSource)
			}},
		{"TLS 1.3 enforced", `countersign admin tls show`,
			func(c Config) verdict {
				return c.tlsLine()
			}},
		{"Timeouts set", `countersignd config >reference.toml`,
			func(c Config) verdict {
				return on("handshake %s, read %s, write %s, idle %s, request %s", span(c.Limits.HandshakeTimeout),
					span(c.Limits.ReadTimeout), span(c.Limits.WriteTimeout), span(c.Limits.IdleTimeout),
					span(c.Limits.RequestTimeout))
			}},
		{"DoS protection", `countersign admin state`,
			func(c Config) verdict {
				return on("%d connections, %d for strangers; %d nonces, %d for a peer",
					c.Limits.Connections, c.Limits.Strangers,
					c.Limits.Nonces, *c.Limits.NoncesPerPeer)
			}},
		{"All inputs validated", `countersign admin audit list --type SignatureRejected --since 1d`,
			func(c Config) verdict {
				return holds("all parsers are strict")
			}},
		{"Sensitive data wiped", `countersignd check --config countersign.toml`,
			func(c Config) verdict {
				return c.wipeLine()
			}},
		{"Panic boundaries at foreign code", `countersign admin token list`,
			func(c Config) verdict {
				return c.workerLine()
			}},
		{"Error messages don't leak", `countersign admin state`,
			func(c Config) verdict {
				return holds("peers get codes and fixed texts")
			}},
		{"Structured logging", `countersign admin state`,
			func(c Config) verdict {
				return on("level %s, log_format %s, scrubbed of secrets", c.LogLevel, c.LogFormat)
			}},
		{"Audit trail on", `countersign audit verify log --key "$(cat log.vkey)"`,
			func(c Config) verdict {
				return holds("epochs by %s, kept for %d days", c.Retention.Epoch, c.Retention.AuditDays)
			}},
		{"Monitoring and alerts set up", `countersign admin state --quiet`,
			func(c Config) verdict {
				return c.monitorLine()
			}},
		{"Incident response documented", `countersign admin audit list --actor shop --since 30d`,
			func(c Config) verdict {
				return unknown("docs/INCIDENTS.md has the pages; whether they were rehearsed is yours to know")
			}},
		{"Retention implemented", `countersign admin retention preview`,
			func(c Config) verdict {
				return on("audit log %d days, receipts %d, decisions %d; longer times in the ledger prevail",
					c.Retention.AuditDays, c.Retention.ReceiptDays, c.Retention.DecisionDays)
			}},
		{"Privacy met", `countersign admin retention preview`,
			func(c Config) verdict {
				return unknown("decisions have amounts and parties for %d days; the law is yours to know",
					c.Retention.DecisionDays)
			}},
		{"Regulatory reporting ready", `countersign admin audit report report-2026-11`,
			func(c Config) verdict {
				return holds("the auditor's report of any period that retention has kept")
			}},
	}
}

// printChecklist prints the checklist for an appliance. Neither a token nor the ledger is opened,
// so that a daemon may run meanwhile.
func printChecklist(c Config, stdout io.Writer) error {
	w := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	count := map[string]int{}
	for _, l := range lines() {
		v := l.of(c)
		count[v.state]++
		fmt.Fprintf(w, "%s\t%s\t%s\n", v.state, l.title, v.text)
		fmt.Fprintf(w, "\t\tsee: %s\n", l.seen)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	var all []string
	for _, state := range slices.Sorted(maps.Keys(count)) {
		all = append(all, fmt.Sprintf("%d %s", count[state], state))
	}
	_, err := fmt.Fprintf(stdout, "\n%s; from the configuration alone: the state of a running appliance has more\n",
		strings.Join(all, ", "))
	return err
}

func (c *Config) nonceLine() verdict {
	if c.RollbackToken == "" {
		return verdict{"partly", "nonces are kept; without rollback_token, an older copy of the ledger is not noticed"}
	}
	return holds("nonces are kept for %s past expiry; rollback_token is %s", span(c.Retention.Nonces), c.RollbackToken)
}

func (c *Config) listeners() string {
	var all []string
	if c.Listen != "" {
		all = append(all, "countersign-v1 on "+c.Listen)
	}
	if c.ListenPubky != "" {
		all = append(all, "pubky-noise-v1 on "+c.ListenPubky)
	}
	return strings.Join(all, ", ")
}

// storageLine says what the configuration tells of the tokens. A URI does not tell hardware from
// software.
func (c *Config) storageLine() verdict {
	var all []string
	state := "on"
	for _, name := range slices.Sorted(maps.Keys(c.Tokens)) {
		t := c.Tokens[name]
		if t.TPM != "" {
			all = append(all, fmt.Sprintf("%s is a TPM, keys sealed to PCRs %v", name, t.PCRs))
			continue
		}
		state = "unknown"
		all = append(all, name+" is a PKCS#11 token: whether it is hardware, its vendor says")
	}
	if c.KeysUser == "" {
		all = append(all, "one user has the daemon and the key workers: set user and keys_user")
	} else {
		all = append(all, "the key workers have the user "+c.KeysUser)
	}
	return verdict{state, strings.Join(all, "; ")}
}

func (c *Config) tlsLine() verdict {
	if c.AdminHTTPS == "" {
		return verdict{"off", "no admin_https: operators come over the Unix socket"}
	}
	return on("admin_https on %s takes TLS 1.3 only", c.AdminHTTPS)
}

// wipeLine tells whether the build erases copies of secrets.
func (c *Config) wipeLine() verdict {
	erases := false
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			erases = erases || s.Key == "GOEXPERIMENT" && slices.Contains(strings.Split(s.Value, ","), "runtimesecret")
		}
	}
	if !erases {
		return verdict{"partly", "this build has no GOEXPERIMENT=runtimesecret: copies of a TPM's seeds stay"}
	}
	for _, t := range c.Tokens {
		if t.TPM == "" {
			return verdict{"partly", "a TPM's seeds are erased; the memory of a PKCS#11 module is its vendor's"}
		}
	}
	return on("a TPM's seeds are erased after use")
}

func (c *Config) workerLine() verdict {
	var all []string
	state := "holds"
	for _, name := range slices.Sorted(maps.Keys(c.Tokens)) {
		n := c.Tokens[name].Workers
		if all = append(all, fmt.Sprintf("%s has %s", name, cli.Count(n, "key worker"))); n < 2 {
			state = "partly"
		}
	}
	text := strings.Join(all, ", ")
	if state == "partly" {
		text += ": with one, requests fail while it is replaced"
	}
	return verdict{state, text}
}

func (c *Config) monitorLine() verdict {
	var all []string
	for _, w := range c.webhooks() {
		if w.Takes(webhook.Alerts) {
			all = append(all, "alerts to webhook "+w.Name)
		}
	}
	for _, to := range c.Mail.To {
		all = append(all, "alerts to "+to)
	}
	for _, s := range c.Sinks {
		all = append(all, "events to sink "+s.Name)
	}
	if len(all) == 0 && c.MetricsListen == "" {
		return verdict{"off", "no receivers of alerts and no sinks: a monitor must ask for the state"}
	}
	if len(all) == 0 {
		return verdict{"partly", "metrics on " + c.MetricsListen + ", but no receivers of alerts and no sinks"}
	}
	if c.MetricsListen != "" {
		all = append(all, "metrics on "+c.MetricsListen)
	}
	return unknown("%s; whether somebody reads them is yours to know", strings.Join(all, ", "))
}
