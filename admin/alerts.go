package admin

import (
	"context"
	"time"

	"countersign/admin/api"
	"countersign/internal/alert"
	"countersign/internal/cause"
)

// defaultAckTime is the time of an acknowledgement without a time.
const defaultAckTime = 24 * time.Hour

func (s *server) alerts(context.Context, caller, *none) (api.Alerts, error) {
	engine := s.Appliance.Alerts
	return api.Alerts{
		Firing: docs(engine.Firing(), alertDoc),
		Kinds: docs(alert.Kinds, func(k *alert.Kind) api.AlertKind {
			fires := k.Threshold(engine.Config())
			doc := api.AlertKind{Code: k.Code, Fires: fires, Means: k.Means, Do: k.Do, See: k.Link()}
			if m, ok := engine.Measured(k); ok {
				doc.Measured = &api.Measured{
					Number: m.Number, Warning: m.Warning, Critical: m.Critical, Percent: m.Share,
					Window: int64(m.Window / time.Second), Series: k.Series,
				}
			}
			return doc
		}),
	}, nil
}

func alertDoc(a alert.Alert) api.Alert {
	k := a.Kind()
	doc := api.Alert{
		Code: a.Code, Subject: a.Subject, Level: string(a.Level), Text: a.Text, Since: a.Since / 1000,
		Do: k.Do, See: k.Link(),
	}
	if a.Ack != nil {
		doc.Acknowledged = &api.Acknowledged{By: a.Ack.By, Until: a.Ack.Until / 1000, Reason: a.Ack.Reason}
	}
	return doc
}

func (s *server) ackAlert(ctx context.Context, who caller, in *body[api.AckAlert]) error {
	lasts := defaultAckTime
	if in.Body.Seconds > 0 {
		lasts = time.Duration(in.Body.Seconds) * time.Second
	}
	return s.Appliance.Alerts.Acknowledge(ctx, who.actor(), in.Body.Code, in.Body.Subject, lasts, in.Body.Reason)
}

func (s *server) testAlerts(ctx context.Context, who caller, _ *none) ([]api.AlertTest, error) {
	all, err := s.Appliance.Alerts.SendTest(ctx, who.actor())
	return docs(all, func(t alert.Tested) api.AlertTest {
		doc := api.AlertTest{Receiver: t.Receiver, Answer: t.Answer}
		if t.Err != nil {
			doc.Error = cause.Line(t.Err.Error())
		}
		return doc
	}), err
}
