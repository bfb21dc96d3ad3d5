package alert

import (
	"fmt"
	"slices"
	"time"

	"countersign/internal/cause"
	"countersign/internal/meter"
)

// Level is the gravity of an alert.
type Level string

const (
	Warning  Level = "warning"
	Critical Level = "critical"
)

// rank orders levels. The empty level, of an alert that does not fire, is the lowest.
func (l Level) rank() int { return slices.Index([]Level{"", Warning, Critical}, l) }

// Rate has the thresholds of a number that is counted within a window. An alert fires above a
// threshold, and not at the threshold.
type Rate struct {
	Warning, Critical int
	Window            time.Duration
}

// wants returns the level for a number, for an alert with the level now. Between a threshold and
// its half, an alert keeps a level but does not reach the level (hysteresis).
func (r Rate) wants(n float64, now Level) Level {
	above := func(l Level, threshold int) bool {
		return n > float64(threshold) || now.rank() >= l.rank() && n > float64(threshold)/2
	}
	switch {
	case above(Critical, r.Critical):
		return Critical
	case above(Warning, r.Warning):
		return Warning
	}
	return ""
}

// Kind is a kind of alert. A kind is measured by counters, or has the kind of a cause of the state
// with the same code. One kind is about the last run: see run.go.
type Kind struct {
	Code  string // stable: a section of docs/OPERATIONS.md has the code as its title
	Means string // one clause without a full stop
	Do    string // the operator's next step
	// Series is the series of the history with the past of a measured kind.
	Series string

	level  Level // of an alert without counters
	atOnce bool  // the cause does not end by itself, so the alert does not wait

	rate  func(Config) Rate // nil: an alert with a cause
	count func(*meter.Meter) (n, of float64)
	text  string // format of n and the window, or of n percent, of and the window
	share bool   // the number is n percent of of
}

// Levels returns the levels that an alert of the kind can have.
func (k *Kind) Levels() []Level {
	if k.rate != nil {
		return []Level{Warning, Critical}
	}
	return []Level{k.level}
}

// Link is the section about the kind, in the documents of the appliance.
func (k *Kind) Link() string { return "docs/OPERATIONS.md#" + k.Code }

// Kinds has all kinds: first the measured ones, then the one about the last run, then those with a
// cause in the order of cause.Kinds.
var Kinds = slices.Concat(measured, []*Kind{ended}, caused())

var measured = []*Kind{
	{
		Code: "signature-failures", Series: "refused", Means: "many sign requests are refused or not served",
		Do:   "countersign admin metrics refusals shows the codes, and the audit log the peers",
		rate: func(c Config) Rate { return c.SignatureFailures }, text: "%.0f sign requests failed within %s",
		count: func(m *meter.Meter) (n, of float64) {
			return m.Count(meter.Requests, "sign", "refused") + m.Count(meter.Requests, "sign", "unavailable"), 0
		},
	},
	{
		Code: "rate-limits", Series: "rate_limited", Means: "peers or strangers reach limits again and again",
		Do:   "countersign admin metrics rate_limited shows the limit; suspend the peer if need be",
		rate: func(c Config) Rate { return c.RateLimits }, text: "limits were reached %.0f times within %s",
		count: func(m *meter.Meter) (n, of float64) { return m.Count(meter.RateLimited), 0 },
	},
	{
		Code: "replays", Series: "replays", Means: "requests come with nonces that are spent",
		Do:   "find the peer: countersign admin audit list --type ReplayRefused; then see docs/INCIDENTS.md",
		rate: func(c Config) Rate { return c.Replays }, text: "%.0f replays were refused within %s",
		count: func(m *meter.Meter) (n, of float64) { return m.Count(meter.Replays), 0 },
	},
	{
		Code: "handshake-timeouts", Series: "handshakes_timeout",
		Means: "many handshakes end because the client is silent",
		Do:    "see the network, and countersign admin peer refused",
		rate:  func(c Config) Rate { return c.HandshakeTimeouts }, share: true,
		text: "%.1f %% of %.0f handshakes timed out within %s",
		count: func(m *meter.Meter) (n, of float64) {
			return m.Count(meter.Handshakes, meter.HandshakeTimeout), m.Count(meter.Handshakes)
		},
	},
}

// levels has the causes of the state with an alert. atOnce marks a cause that stays until an
// operator acts. silent has the causes without an alert: an operator is at work already.
var (
	levels = map[*cause.Kind]Level{
		cause.RolledBack: Critical, cause.AnchorLost: Critical, cause.Counter: Critical, cause.AddressAway: Critical,
		cause.Disk: Critical, cause.Clock: Critical, cause.NoncesFull: Critical,
		cause.TokenUnavailable: Critical, cause.TokenPIN: Critical, cause.TokenLocked: Critical,
		cause.TokenReplaced: Critical, cause.TokenSealed: Critical, cause.KeyMissing: Critical,
		cause.Rotation: Critical, cause.RotationGivenUp: Critical, cause.Quorum: Critical,
		cause.TokenJournal: Critical, cause.Launcher: Critical,

		cause.RotationOverdue: Warning, cause.Locked: Warning, cause.Backup: Warning,
		cause.Lists: Warning, cause.Mirror: Warning, cause.Unproven: Warning, cause.HoldersUnproven: Warning,
		cause.TokenRedundancy: Warning, cause.TokenRestarts: Warning,
		cause.KeyTwice: Warning, cause.CounterFailing: Warning, cause.BytesFull: Warning,
		cause.NoncesShare: Warning, cause.NoncesFilling: Warning, cause.DiskFilling: Warning,
		cause.PolicyBroken: Warning, cause.Checkpoint: Warning, cause.Upkeep: Warning, cause.Webhook: Warning,
		cause.Mail: Warning, cause.Sink: Warning, cause.Certificate: Warning, cause.LogUnread: Warning,
		cause.NotifyUnread: Warning, cause.Traces: Warning, cause.Sandbox: Warning,
	}
	atOnce = []*cause.Kind{
		cause.RolledBack, cause.AnchorLost, cause.TokenPIN, cause.TokenLocked, cause.TokenReplaced,
		cause.TokenSealed, cause.KeyMissing, cause.Rotation, cause.RotationGivenUp, cause.Quorum, cause.Locked,
		cause.KeyTwice, cause.Sandbox, cause.Backup,
	}
	silent = []*cause.Kind{
		cause.Starting, cause.PolicyWaits, cause.PolicyPointless, cause.RetentionWaits,
	}
)

func caused() (all []*Kind) {
	for _, c := range cause.Kinds {
		if level, ok := levels[c]; ok {
			all = append(all, &Kind{
				Code: c.Code, Means: c.Means, Do: c.Do, level: level, atOnce: slices.Contains(atOnce, c),
			})
		}
	}
	return all
}

// kindOf returns the kind with a code, or nil.
func kindOf(code string) *Kind {
	if i := slices.IndexFunc(Kinds, func(k *Kind) bool { return k.Code == code }); i >= 0 {
		return Kinds[i]
	}
	return nil
}

// known returns the kind with a code. An alert of another version of the program can have a code
// that this version does not know.
func known(code string) *Kind {
	if k := kindOf(code); k != nil {
		return k
	}
	return &Kind{Code: code, Means: "this version of the program does not know the alert", Do: "see NEWS.md"}
}

// Config has the thresholds and times of alerts.
type Config struct {
	SignatureFailures Rate // sign requests that were refused or not served
	RateLimits        Rate // times that a limit was reached
	Replays           Rate
	HandshakeTimeouts Rate // in percent of all ended handshakes
	HandshakesLeast   int  // handshakes in a window below which no share is computed

	After  time.Duration // a cause that can end by itself lasts so long before its alert fires
	Quiet  time.Duration // the reason is gone for so long before an alert resolves or its level falls
	Repeat time.Duration // between two messages about an alert that nobody has acknowledged
}

// Defaults returns the default thresholds.
func Defaults() Config {
	return Config{
		SignatureFailures: Rate{10, 50, time.Minute},
		RateLimits:        Rate{100, 500, time.Minute},
		Replays:           Rate{1, 10, time.Hour},
		HandshakeTimeouts: Rate{5, 20, 10 * time.Minute},
		HandshakesLeast:   20,
		After:             30 * time.Second,
		Quiet:             5 * time.Minute,
		Repeat:            4 * time.Hour,
	}
}

// Threshold says when an alert of the kind fires, for people.
func (k *Kind) Threshold(c Config) string {
	switch {
	case k.rate == nil && k.atOnce:
		return string(k.level) + " at once"
	case k.rate == nil:
		return fmt.Sprintf("%s after %s", k.level, short(c.After))
	}
	r, unit := k.rate(c), ""
	if k.share {
		unit = " %"
	}
	return fmt.Sprintf("warning above %d%s, critical above %d%s, within %s",
		r.Warning, unit, r.Critical, unit, short(r.Window))
}
