package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"countersign/admin"
	"countersign/appliance"
	"countersign/internal/cause"
	"countersign/internal/history"
	"countersign/internal/ledger"
	"countersign/internal/logline"
	"countersign/internal/logqueue"
	"countersign/internal/meter"
	"countersign/internal/operators"
	"countersign/internal/scrub"
	"countersign/policy"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// stopWait is the timeout at the end for the requests of the admin API, and again for approved
// acts.
const stopWait = 5 * time.Second

// serve runs the daemon until ctx ends. After each signal of reload, the daemon reads the
// configuration file again.
func serve(
	ctx context.Context, path string, c Config, listeners []net.Listener, stderr *logqueue.Queue,
	reload <-chan os.Signal,
) error {
	given, err := c.assign(listeners)
	if err != nil {
		return configError{err}
	}
	defer given.close()
	if err := noCoreFiles(); err != nil {
		return err
	}
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400) // the heap is a few MiB: fewer collections save time at little memory
	}
	level, err := c.logLevel()
	if err != nil {
		return err
	}
	lines, err := openLog(c.LogFormat, stderr)
	if err != nil {
		return err
	}
	defer lines.close()
	inForce, secrets := logline.NewLevel(level), new(scrub.Scrubber)
	// A line that the pace leaves out costs no search for secrets.
	paced := logqueue.NewPace(secrets.Handler(lines.format.Handler(lines.to, inForce)))
	log := slog.New(paced)
	notifications, err := newNotifier(log)
	if err != nil {
		return configError{err}
	}
	p, err := open(ctx, c, log)
	if err != nil {
		return err
	}
	defer p.close(log)
	if err := p.ledger.Follow(ctx, new(sync.Mutex), ledger.Followed{Table: ledger.Peers, Take: secrets.Take},
		ledger.Followed{Table: ledger.Keys, Take: secrets.Take}); err != nil {
		return err
	}
	ready, err := prepare(ctx, c, p, given, log)
	defer ready.close()
	if err != nil {
		return err
	}
	rights := c.rights(path, ready.doors, given)
	lacks := c.lacks(rights) // nothing can ask the kernel afterwards
	exposed := c.exposed(rights)
	breakIn(c)
	if err := rights.Enter(); err != nil { // before a stranger's first byte
		return err
	}
	waiting := waits{doors: ready.doors}
	waiting.set(ready.missing)
	for _, what := range exposed {
		log.Warn("the daemon could read or change what is of the key workers alone: move one of them", "what", what)
	}
	workers := admin.KeyWorkers{User: c.launcher.User(), OwnUser: c.launcher.User() != os.Geteuid(),
		Exposed: append([]string{}, exposed...)}
	incomplete := unconfined(lacks)
	for _, u := range incomplete {
		log.Warn("a process is not confined as intended", "of", u.Subject, "missing", u.Text)
	}
	p.meter.Source(func(s *meter.Sample) {
		for name, lacks := range lacks {
			s.Set(meter.Sandbox, float64(len(lacks)), name)
		}
		s.Set(meter.OneUser, count(!workers.OwnUser))
		s.Set(meter.Exposed, float64(len(exposed)))
		s.Set(meter.LogDropped, float64(lines.to.Dropped()), "unread")
		s.Set(meter.LogDropped, float64(paced.LeftOut()), "pace")
	})
	p.app.Report(func() []cause.Cause {
		return slices.Concat(waiting.causes(), unreadLog(lines.to), notifications.causes(), warning(ready.certs),
			incomplete, withoutLauncher(c.launcher))
	})
	if err := p.app.Start(ctx); err != nil {
		return err
	}
	for _, w := range p.doubts {
		log.Warn("a rule of the policy may not do what was meant", "rule", w.Rule, "line", w.Line, "why", w.Text)
	}
	registry, err := openOperators(c, p, log)
	if err != nil {
		return err
	}

	p.meter.Source(registry.Measure)
	p.app.Report(registry.Causes)

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() { // a daemon that is confined can't start another launcher
		select {
		case <-ctx.Done():
		case <-c.launcher.Ended():
			log.Error("the daemon ends: without the launcher, no key worker can be started", "err", c.launcher.Why())
			cancel(c.launcher.Why())
		}
	}()
	past := openHistory(ctx, c, p.meter, log)
	if past != nil {
		defer past.Close()
	}
	host := net.JoinHostPort(c.AdminName, c.httpsPort())
	api := admin.New(admin.Config{
		Appliance: p.app, KeyWorkers: workers, Operators: registry, Meter: p.meter, History: past, Group: ready.group,
		Level: inForce, Log: log,
		Machine:      c.machine(),
		LoadPolicy:   func() (*policy.Policy, error) { return policy.Load(c.Policy) },
		ErrorLog:     stdlog.New(logqueue.Printer{Log: log, Message: "the admin API's HTTP server"}, "", 0),
		Certificates: ready.certs, Hosts: []string{host}, Origin: c.adminOrigin(), RPID: c.AdminName,
	})
	var alerting sync.WaitGroup
	watching, endWatch := context.WithCancel(ctx)
	defer endWatch()
	alerting.Go(func() { p.app.Alerts.Run(watching) }) // also while the start waits for a device
	scraped := admin.NewMetrics(p.meter, api.ErrorLog)
	var apiDone sync.WaitGroup
	serveHTTP := func(what string, server *http.Server, listeners ...net.Listener) {
		for _, l := range listeners {
			apiDone.Go(func() {
				if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
					cancel(fmt.Errorf("%s: %w", what, err))
				}
			})
		}
	}
	serveHTTP("admin API", api, ready.admin...)
	serveHTTP("metrics", scraped, ready.metrics...)
	go expire(ctx, registry, log)
	if m := c.machine(); m != nil {
		report := &machineReport{client: m, app: p.app, registry: registry, certs: ready.certs, config: c.digest,
			log: log}
		go report.run(ctx)
	}
	context.AfterFunc(ctx, func() { notifications.send(daemon.SdNotifyStopping) })
	go watchdog(ctx, prober{p.app, ready.socket, ready.doors}, notifications, log)
	go reloadAll(ctx, path, c, inForce, p.app, reload, log)
	go func() {
		if err := waitUntilReady(ctx, p.app, ready.doors, &waiting, notifications, log); err != nil {
			cancel(err)
			return
		}
		for _, d := range ready.doors {
			log.Info("serving", "listen", d.address, "profile", string(d.profile), "admin", c.AdminSocket)
		}
		// READY is worth a wait, since the service manager would end a daemon that is not ready.
		for !notifications.send(daemon.SdNotifyReady) && ctx.Err() == nil {
		}
	}()

	var peers []appliance.Listener
	for _, d := range ready.doors {
		peers = append(peers, appliance.Listener{Listener: d, Profile: d.profile})
	}
	err = p.app.Serve(ctx, peers...)
	log.Info("stopping", "err", err)
	endWatch()
	alerting.Wait()
	if cause := context.Cause(ctx); err == nil && cause != nil && !errors.Is(cause, context.Canceled) {
		err = cause
	}
	if err != nil { // now, because the service manager ends a daemon with a ledger that has failed
		p.app.Alerts.Ended(err)
	}
	wait, done := context.WithTimeout(context.Background(), stopWait)
	defer done()
	for _, server := range []*http.Server{api, scraped} {
		if server.Shutdown(wait) != nil {
			server.Close()
		}
	}
	apiDone.Wait()
	// A timeout of its own, because any client can use up the other one with a silent connection.
	finish, finished := context.WithTimeout(context.Background(), stopWait)
	defer finished()
	if err := registry.Close(finish); err != nil {
		log.Error("an approved act is cut off", "err", err)
	}
	if err != nil {
		return err
	}
	return p.app.Stop()
}

// openHistory opens the history and begins to write, until ctx ends. The result is nil without a
// history.
func openHistory(ctx context.Context, c Config, m *meter.Meter, log *slog.Logger) *history.History {
	if c.History == "" {
		return nil
	}
	h := history.Open(c.History, log)
	m.Source(h.Measure)
	go h.Run(ctx, m)
	return h
}

// logLines is the destination of the daemon's log.
type logLines struct {
	format logline.Format
	to     *logqueue.Queue
	close  func() // writes what is queued, where the queue is the log's own
}

// openLog returns stderr as the destination of the log, or journald for its format. Without
// journald the lines are text on stderr: the log must not be lost with its favourite reader.
func openLog(format logline.Format, stderr *logqueue.Queue) (logLines, error) {
	chosen := format.Chosen()
	if chosen == logline.Journal {
		socket, err := logline.DialJournal(logline.JournalSocket)
		if err == nil {
			queue := logqueue.New(socket)
			queue.Format(func(to io.Writer) slog.Handler { return chosen.Handler(to, slog.LevelInfo) })
			return logLines{chosen, queue, func() { queue.Close(lastLines); socket.Close() }}, nil
		}
		if format == logline.Journal {
			return logLines{}, fmt.Errorf("log_format: %w; set log_format to auto, text or json", err)
		}
		chosen = logline.Text
	}
	stderr.Format(func(to io.Writer) slog.Handler { return chosen.Handler(to, slog.LevelInfo) })
	return logLines{chosen, stderr, func() {}}, nil
}

// openOperators opens the registry of operators.
func openOperators(c Config, p parts, log *slog.Logger) (*operators.Registry, error) {
	name, _, err := p.app.Log()
	if err != nil {
		return nil, err
	}
	return operators.Open(p.ledger, operators.Config{
		Appliance: name.Name(), RPID: c.AdminName, Origin: c.adminOrigin(), Acts: admin.Acts(p.app, c.machine()),
		Changed: p.app.Keys.CredentialsChanged, Log: log,
	})
}

// expire ends expired proposals and writes the number of refused proofs, once a minute until ctx
// ends.
func expire(ctx context.Context, registry *operators.Registry, log *slog.Logger) {
	ticker := time.NewTicker(time.Minute)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if err := registry.Expire(ctx); err != nil && ctx.Err() == nil {
			log.Error("expired proposals can't be ended", "err", err)
		}
		if err := registry.RecordCount(ctx); err != nil && ctx.Err() == nil {
			log.Error("refused proofs", "err", err)
		}
	}
}

// noCoreFiles protects the memory of this process, which may contain the PIN: from core files, and
// from other processes of the same user.
func noCoreFiles() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("no core files: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("no core files: %w", err)
	}
	return nil
}

// count is 1 for true.
func count(is bool) float64 {
	if is {
		return 1
	}
	return 0
}
