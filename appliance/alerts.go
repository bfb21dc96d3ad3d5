package appliance

import (
	"context"

	"countersign/internal/alert"
	"countersign/internal/cause"
	"countersign/internal/mail"
	"countersign/internal/webhook"
)

// MailConfig is a mail server with the recipients of alerts.
type MailConfig struct {
	mail.Server
	To []string // none: no mail
}

// openAlerts opens the alerts with their receivers.
func (a *Appliance) openAlerts(ctx context.Context, c Config) (err error) {
	id := func() string {
		log, _, err := a.Log()
		if err != nil {
			return ""
		}
		return log.ID()
	}
	var receivers []alert.Receiver
	for _, t := range c.Webhooks {
		if !t.Takes(webhook.Alerts) {
			continue
		}
		sender, err := webhook.New(webhook.Config{Targets: []webhook.Target{t}, Sign: a.signHook, Log: a.log})
		if err != nil {
			return err
		}
		receivers = append(receivers, &alert.Webhook{Target: t.Name, Sender: sender})
	}
	for _, to := range c.Mail.To {
		receivers = append(receivers, &alert.Mail{Server: c.Mail.Server, To: to})
	}
	if c.Alerts == (alert.Config{}) {
		c.Alerts = alert.Defaults()
	}
	causes := func() []cause.Cause { return a.Health().Causes }
	if a.Alerts, err = alert.Open(ctx, c.Alerts, a.ledger, c.Meter, causes, receivers, id, a.log); err != nil {
		return err
	}
	a.Report(a.Alerts.Causes)
	return nil
}
