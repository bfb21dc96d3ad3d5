package alert

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"countersign/internal/cause"
	"countersign/internal/mail"
	"countersign/internal/webhook"
)

// Webhook is a receiver by signed HTTP messages (Standard Webhooks).
type Webhook struct {
	Target string // name of the target
	Sender *webhook.Sender
}

// Name returns the name for operators and records.
func (w *Webhook) Name() string { return "webhook/" + w.Target }

// Send posts a message.
func (w *Webhook) Send(ctx context.Context, m Message) (string, error) {
	if err := w.Sender.Send(ctx, w.Target, m.ID, []byte(m.Body)); errors.Is(err, webhook.ErrGone) {
		return "", fmt.Errorf("%w: %w", ErrGone, err)
	} else if err != nil {
		return "", err
	}
	return "accepted", nil
}

// Cause returns the cause of a failure.
func (w *Webhook) Cause(err error) cause.Cause {
	return cause.Webhook.Of(w.Target, "an alert: %v", err)
}

// Mail is a receiver by mail.
type Mail struct {
	Server mail.Server
	To     string
}

// Name returns the name for operators and records.
func (r *Mail) Name() string { return "mail/" + r.To }

// Send sends a message.
func (r *Mail) Send(ctx context.Context, m Message) (string, error) {
	k := m.kind()
	of := strings.TrimSpace(m.Code + " " + m.Subject)
	state := strings.TrimPrefix(m.Type, "alert.")
	var text strings.Builder
	for _, each := range [][2]string{
		{"alert", of}, {"state", state}, {"level", string(m.Level)}, {"since", date(m.Since)}, {"sent", date(m.At)},
		{"appliance", m.Appliance}, {"details", m.Text}, {"means", k.Means}, {"do", k.Do}, {"see", k.Link()},
	} {
		if each[1] != "" {
			fmt.Fprintf(&text, "%-10s %s\n", each[0], cause.Line(each[1]))
		}
	}
	return r.Server.Send(ctx, mail.Mail{
		ID: m.ID, To: r.To, At: time.UnixMilli(m.At), Text: text.String(),
		Subject: fmt.Sprintf("countersign: %s, %s: %s", of, state, m.Level),
	})
}

// Cause returns the cause of a failure.
func (r *Mail) Cause(err error) cause.Cause { return cause.Mail.Of(r.To, "%v", err) }

func date(ms int64) string { return time.UnixMilli(ms).UTC().Format(time.RFC3339) }
