package logline

import (
	"log/slog"
	"sync"
	"time"
)

// Level is the level of the log: that of the configuration, or for a time another one. Nobody
// forgets a log at debug, because the level goes back by itself. A restart begins with the level of
// the configuration. A Level is safe for concurrent use.
type Level struct {
	inForce slog.LevelVar

	mu         sync.Mutex
	configured slog.Level  // guarded by mu
	until      time.Time   // guarded by mu; zero: the level of the configuration is in force
	back       *time.Timer // guarded by mu: ends the other level; nil: none
}

// NewLevel returns a level that begins with that of the configuration.
func NewLevel(configured slog.Level) *Level {
	l := &Level{configured: configured}
	l.inForce.Set(configured)
	return l
}

// Level returns the level in force, for slog.
func (l *Level) Level() slog.Level { return l.inForce.Level() }

// State is a level with its reason.
type State struct {
	InForce, Configured slog.Level
	Until               time.Time // when Configured is in force again; zero: now
}

// State returns the level in force, and until when.
func (l *Level) State() State {
	l.mu.Lock()
	defer l.mu.Unlock()
	return State{l.inForce.Level(), l.configured, l.until}
}

// Configure sets the level of the configuration. Another level stays in force until its end.
func (l *Level) Configure(configured slog.Level) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.configured = configured
	if l.until.IsZero() {
		l.inForce.Set(configured)
	}
}

// Set puts another level in force for a time, in place of an earlier one. Then the level of the
// configuration is in force again, and Set calls ended.
func (l *Level) Set(level slog.Level, lasts time.Duration, ended func(State)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.end()
	l.inForce.Set(level)
	l.until = time.Now().Add(lasts)
	var back *time.Timer
	back = time.AfterFunc(lasts, func() {
		l.mu.Lock()
		if l.back != back { // Set or Reset was called meanwhile
			l.mu.Unlock()
			return
		}
		l.end()
		now := State{l.inForce.Level(), l.configured, l.until}
		l.mu.Unlock()
		ended(now)
	})
	l.back = back
}

// Reset puts the level of the configuration in force.
func (l *Level) Reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.end()
}

// end ends another level. The caller holds mu.
func (l *Level) end() {
	if l.back != nil {
		l.back.Stop()
	}
	l.back, l.until = nil, time.Time{}
	l.inForce.Set(l.configured)
}
