package admin

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"countersign/admin/api"
	"countersign/internal/logline"
	"countersign/internal/requestid"
)

// defaultLevelTime is the time of a level without a time.
const defaultLevelTime = time.Hour

func (s *server) logLevel(context.Context, caller, *none) (api.LogLevel, error) {
	return levelDoc(s.Level.State()), nil
}

func levelDoc(is logline.State) api.LogLevel {
	return api.LogLevel{
		Level: levelName(is.InForce), Configured: levelName(is.Configured), Until: unix(is.Until),
	}
}

// levelName returns the name of a level as the configuration has it.
func levelName(l slog.Level) string { return strings.ToLower(l.String()) }

// setLogLevel sets the level of the log. The event is on disk before, because a level can hide
// lines of the log. The line in the log comes before a level that would hide the line, and after a
// level that would show the line.
func (s *server) setLogLevel(ctx context.Context, who caller, in *body[api.SetLogLevel]) (api.LogLevel, error) {
	s.leveling.Lock() // the last event is about the level in force
	defer s.leveling.Unlock()
	actor := who.actor()
	log := s.Log.With("operator", actor.Name, requestid.Attr(actor.Request))
	if in.Body.Level == api.LevelConfigured {
		if err := s.Appliance.RecordLogLevel(ctx, actor, in.Body.Level, time.Time{}); err != nil {
			return api.LogLevel{}, err
		}
		s.Level.Reset()
		log.Warn("the level of this log is that of the configuration again", "level", levelName(s.Level.Level()))
		return levelDoc(s.Level.State()), nil
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(in.Body.Level)); err != nil {
		return api.LogLevel{}, invalid.errorf("level: %v", err)
	}
	lasts := defaultLevelTime
	if in.Body.Seconds > 0 {
		lasts = time.Duration(in.Body.Seconds) * time.Second
	}
	until := time.Now().Add(lasts)
	if err := s.Appliance.RecordLogLevel(ctx, actor, in.Body.Level, until); err != nil {
		return api.LogLevel{}, err
	}
	tell := func() {
		log.Warn("the level of this log was set", "level", in.Body.Level, "until", until.UTC().Format(time.RFC3339))
	}
	if level > slog.LevelWarn {
		tell()
	}
	s.Level.Set(level, lasts, func(is logline.State) {
		s.Log.Warn("the level of this log is that of the configuration again", "level", levelName(is.InForce))
	})
	if level <= slog.LevelWarn {
		tell()
	}
	return levelDoc(s.Level.State()), nil
}
