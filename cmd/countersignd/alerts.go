package main

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"countersign/appliance"
	"countersign/internal/alert"
	"countersign/internal/mail"
	"countersign/internal/webhook"
)

// maxRecipients is the largest number of recipients of mail.
const maxRecipients = 10

func defaultAlerts() Alerts {
	d := alert.Defaults()
	return Alerts{
		SignatureFailuresWarning: d.SignatureFailures.Warning, SignatureFailuresCritical: d.SignatureFailures.Critical,
		SignatureFailuresWindow: Duration(d.SignatureFailures.Window),
		RateLimitsWarning:       d.RateLimits.Warning, RateLimitsCritical: d.RateLimits.Critical,
		RateLimitsWindow: Duration(d.RateLimits.Window),
		ReplaysWarning:   d.Replays.Warning, ReplaysCritical: d.Replays.Critical,
		ReplaysWindow:             Duration(d.Replays.Window),
		HandshakeTimeoutsWarning:  d.HandshakeTimeouts.Warning,
		HandshakeTimeoutsCritical: d.HandshakeTimeouts.Critical,
		HandshakeTimeoutsWindow:   Duration(d.HandshakeTimeouts.Window), HandshakesLeast: d.HandshakesLeast,
		DiskMiB: 256, After: Duration(d.After), Quiet: Duration(d.Quiet), Repeat: Duration(d.Repeat),
	}
}

func (c *Config) alerts() alert.Config {
	a := c.Alerts
	return alert.Config{
		SignatureFailures: alert.Rate{
			Warning: a.SignatureFailuresWarning, Critical: a.SignatureFailuresCritical,
			Window: a.SignatureFailuresWindow.std(),
		},
		RateLimits: alert.Rate{
			Warning: a.RateLimitsWarning, Critical: a.RateLimitsCritical, Window: a.RateLimitsWindow.std(),
		},
		Replays: alert.Rate{Warning: a.ReplaysWarning, Critical: a.ReplaysCritical, Window: a.ReplaysWindow.std()},
		HandshakeTimeouts: alert.Rate{
			Warning: a.HandshakeTimeoutsWarning, Critical: a.HandshakeTimeoutsCritical,
			Window: a.HandshakeTimeoutsWindow.std(),
		},
		HandshakesLeast: a.HandshakesLeast,
		After:           a.After.std(), Quiet: a.Quiet.std(), Repeat: a.Repeat.std(),
	}
}

func (c *Config) mail() appliance.MailConfig {
	m := c.Mail
	return appliance.MailConfig{To: m.To, Server: mail.Server{
		Address: m.Server, TLS: m.TLS, From: m.From, User: m.User, PasswordFile: m.PasswordFile, CAFile: m.CAFile,
	}}
}

// checkAlerts is the part of check for alerts and their receivers. checkAlerts sets the default of
// mail.tls.
func (c *Config) checkAlerts() error {
	const most = 1_000_000_000
	a := c.alerts()
	for _, r := range []struct {
		name string
		alert.Rate
		most int
	}{
		{"signature_failures", a.SignatureFailures, most}, {"rate_limits", a.RateLimits, most},
		{"replays", a.Replays, most}, {"handshake_timeouts", a.HandshakeTimeouts, 99},
	} {
		switch {
		case r.Warning < 0 || r.Warning > r.most:
			return fmt.Errorf("alerts.%s_warning must be 0 to %d, and is %d", r.name, r.most, r.Warning)
		case r.Critical < r.Warning || r.Critical > r.most:
			return fmt.Errorf("alerts.%s_critical must be %d to %d, and is %d: it is at least %[1]s_warning",
				r.name, r.Warning, r.most, r.Critical)
		case r.Window < time.Second || r.Window > 24*time.Hour:
			return fmt.Errorf("alerts.%s_window must be 1s to 1d, and is %v", r.name, Duration(r.Window))
		}
	}
	for _, d := range []struct {
		field       string
		value       Duration
		least, most time.Duration
	}{
		{"after", c.Alerts.After, 0, time.Hour}, {"quiet", c.Alerts.Quiet, time.Second, 24 * time.Hour},
		{"repeat", c.Alerts.Repeat, time.Minute, 7 * 24 * time.Hour},
	} {
		if v := d.value.std(); v < d.least || v > d.most {
			return fmt.Errorf("alerts.%s must be %v to %v, and is %v",
				d.field, Duration(d.least), Duration(d.most), d.value)
		}
	}
	for _, n := range []struct {
		field              string
		value, least, most int
	}{{"handshakes_least", a.HandshakesLeast, 1, most}, {"disk_mib", c.Alerts.DiskMiB, 0, 1 << 40}} {
		if n.value < n.least || n.value > n.most {
			return fmt.Errorf("alerts.%s must be %d to %d, and is %d", n.field, n.least, n.most, n.value)
		}
	}
	known := []string{webhook.Rotations, webhook.Compromises, webhook.Alerts}
	for _, w := range c.Webhooks {
		for _, t := range w.Types {
			if !slices.Contains(known, t) {
				return fmt.Errorf("webhooks.%s.types: %q is none of %s", w.Name, t, strings.Join(known, ", "))
			}
		}
	}
	return c.checkMail()
}

// checkMail is the part of check for mail.
func (c *Config) checkMail() error {
	m := &c.Mail
	if len(m.To) == 0 {
		if m.Server != "" || m.From != "" || m.User != "" || m.PasswordFile != "" || m.TLS != "" || m.CAFile != "" {
			return errors.New("mail.to is missing: a mail server without recipients sends nothing")
		}
		return nil
	}
	if len(m.To) > maxRecipients {
		return fmt.Errorf("mail.to has %d recipients; at most %d are possible: use a list of the mail server",
			len(m.To), maxRecipients)
	}
	if m.TLS == "" {
		m.TLS = mail.StartTLS
		if _, port, err := net.SplitHostPort(m.Server); err == nil && port == "465" {
			m.TLS = mail.Implicit
		}
	}
	for i, to := range m.To {
		if err := mail.CheckAddress(to); err != nil {
			return fmt.Errorf("mail.to: %w", err)
		}
		if slices.Contains(m.To[:i], to) {
			return fmt.Errorf("mail.to: %q is there twice", to)
		}
	}
	if err := c.mail().Check(); err != nil {
		return fmt.Errorf("mail.%w", err)
	}
	return nil
}
