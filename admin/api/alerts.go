package api

import (
	"context"
	"net/http"
)

// Alert is a firing alert.
type Alert struct {
	Code    string `json:"code" doc:"stable; docs/OPERATIONS.md has a section for each"`
	Subject string `json:"subject,omitempty" doc:"the token, key, peer or receiver concerned"`
	Level   string `json:"level" enum:"warning,critical"`
	Text    string `json:"text" doc:"the details at the last change"`
	Since   int64  `json:"since" doc:"Unix seconds"`
	Do      string `json:"do" doc:"what to do"`
	See     string `json:"see" doc:"section of the documents"`
	// Acknowledged is absent as soon as the acknowledgement has ended.
	Acknowledged *Acknowledged `json:"acknowledged,omitempty"`
}

// Acknowledged says that an operator has taken note of an alert.
type Acknowledged struct {
	By     string `json:"by"`
	Until  int64  `json:"until" doc:"Unix seconds"`
	Reason string `json:"reason,omitempty"`
}

// AlertKind is a kind of alert.
type AlertKind struct {
	Code  string `json:"code"`
	Fires string `json:"fires" doc:"when the alert fires, by the configuration"`
	Means string `json:"means"`
	Do    string `json:"do"`
	See   string `json:"see"`
	// Measured is absent for an alert with a cause of the state.
	Measured *Measured `json:"measured,omitempty"`
}

// Measured is a number of the last look with its thresholds.
type Measured struct {
	Number   float64 `json:"number"`
	Warning  int     `json:"warning" doc:"above it, the alert is a warning"`
	Critical int     `json:"critical" doc:"above it, the alert is critical"`
	Percent  bool    `json:"percent" doc:"the numbers are percentages"`
	Window   int64   `json:"window" doc:"seconds in which the number was counted"`
	Series   string  `json:"series" doc:"series of the history with the past of the number, as a rate"`
}

// Alerts are the firing alerts, the gravest first, and all kinds.
type Alerts struct {
	Firing []Alert     `json:"firing"`
	Kinds  []AlertKind `json:"kinds"`
}

// AckAlert acknowledges an alert.
type AckAlert struct {
	Code    string `json:"code" maxLength:"64"`
	Subject string `json:"subject,omitempty" maxLength:"200"`
	Seconds int    `json:"seconds,omitempty" minimum:"0" maximum:"604800" doc:"0: a day; from 60 on"`
	Reason  string `json:"reason,omitempty" maxLength:"500" doc:"it goes into the audit log"`
}

// AlertTest is the result of a test message to a receiver of alerts.
type AlertTest struct {
	Receiver string `json:"receiver" doc:"webhook/NAME or mail/ADDRESS"`
	Answer   string `json:"answer,omitempty" doc:"of the receiver that has taken the message"`
	Error    string `json:"error,omitempty" doc:"why the receiver has not taken the message"`
}

// Alerts returns the firing alerts, and all kinds.
func (c *Client) Alerts(ctx context.Context) (all Alerts, err error) {
	return all, c.do(ctx, http.MethodGet, "/v1/alerts", nil, &all)
}

// AckAlert acknowledges an alert for a time.
func (c *Client) AckAlert(ctx context.Context, a AckAlert) error {
	return c.do(ctx, http.MethodPost, "/v1/alerts/acknowledge", a, nil)
}

// TestAlerts sends a test message to each receiver of alerts.
func (c *Client) TestAlerts(ctx context.Context) (all []AlertTest, err error) {
	return all, c.do(ctx, http.MethodPost, "/v1/alerts/test", nil, &all)
}
