package appliance

import (
	"context"
	"errors"
	"maps"
	"os"
	"slices"
	"strconv"
	"time"

	"countersign/internal/keyring"
	"countersign/internal/ledger"
	"countersign/internal/meter"
)

// measure is a source of metrics: the present state of the appliance. Nothing is asked of a device
// or of the ledger's writer.
func (a *Appliance) measure(s *meter.Sample) {
	a.measureState(s)
	a.measureTokens(s)
	a.measureLedger(s)
	a.measureMessages(s)
	a.measureBackups(s)
	a.Keys.Measure(s)
	keyring.MeasureLanes(s, "processor", a.processor.Waiting())
	open, unproven := a.places.Counts()
	s.Set(meter.Connections, float64(open-unproven), "proven")
	s.Set(meter.Connections, float64(unproven), "unproven")
	s.Set(meter.Serving, float64(a.Peers.Requests()))
}

func (a *Appliance) measureState(s *meter.Sample) {
	h := a.Health()
	s.SetAll(meter.State, map[string]int{string(h.Condition): 1})
	codes := map[string]int{}
	for _, c := range h.Causes {
		codes[c.Code]++
	}
	s.SetAll(meter.Causes, codes)
	peers := map[string]int{}
	for _, p := range a.Peers.All() {
		if p.Suspended {
			peers["suspended"]++
		} else {
			peers["enrolled"]++
		}
	}
	s.SetAll(meter.Peers, peers)
}

func (a *Appliance) measureTokens(s *meter.Sample) {
	tokens := a.Tokens()
	for _, name := range slices.Sorted(maps.Keys(tokens)) {
		status := tokens[name]
		s.Set(meter.TokenUp, one(status.Up), name)
		s.Set(meter.JournalBytes, float64(status.JournalBytes), name)
		s.Set(meter.JournalFailures, float64(status.JournalFailures), name)
		for i, w := range status.Workers {
			number := strconv.Itoa(i + 1)
			s.Set(meter.WorkerUp, one(w.PID != 0), name, number)
			s.Set(meter.WorkerCalls, float64(w.Calls), name, number)
			s.Set(meter.WorkerErrors, float64(w.Errors), name, number)
			s.Set(meter.WorkerRestarts, float64(w.Restarts), name, number)
			s.Set(meter.WorkerMemory, float64(w.Memory), name, number)
			if !w.Succeeded.IsZero() {
				s.Set(meter.WorkerSuccess, float64(w.Succeeded.UnixMilli())/1000, name, number)
			}
		}
	}
}

// measureMessages has the ways out: alerts, webhooks about keys, and sinks of events.
func (a *Appliance) measureMessages(s *meter.Sample) {
	a.Alerts.Measure(s)
	waiting := 0
	if sender := a.hooks.Load(); sender != nil {
		waiting = sender.Waiting()
	}
	s.Set(meter.MessagesWaiting, float64(waiting), meter.AboutKeys)
	for _, sink := range a.Sinks() {
		s.Set(meter.SinkSent, float64(sink.Sent), sink.Name)
		s.Set(meter.SinkDropped, float64(sink.Dropped), sink.Name)
		s.Set(meter.SinkBehind, float64(sink.Behind), sink.Name)
	}
}

// measureBackups leaves out what is not there.
func (a *Appliance) measureBackups(s *meter.Sample) {
	if newest := a.backups.newest.Load(); newest != 0 {
		s.Set(meter.BackupAge, time.Since(time.Unix(newest, 0)).Seconds())
	}
	if _, _, proven := a.LastDrill(); !proven.IsZero() {
		s.Set(meter.BackupProven, time.Since(proven).Seconds())
	}
	if proven := a.HoldersProven(); !proven.IsZero() {
		s.Set(meter.HoldersProven, time.Since(proven).Seconds())
	}
	if ship := a.backups.Ship; ship != nil {
		behind, _ := ship.Behind()
		s.Set(meter.BackupBehind, behind.Seconds())
	}
	if mirror := a.backups.Mirror; mirror != nil {
		behind, _, _ := mirror.Behind()
		s.Set(meter.MirrorBehind, behind.Seconds())
	}
}

// measureLedger leaves out what can't be read: an absent series is no zero.
func (a *Appliance) measureLedger(s *meter.Sample) {
	now, wall, _ := a.ledger.Clock()
	s.Set(meter.ClockOffset, wall.Sub(now).Seconds())
	n := a.ledger.Nonces()
	s.SetAll(meter.Nonces, map[string]int{"sign": n.Signing, "verify": n.Verifying, "own": n.Own})
	s.Set(meter.NoncesMax, float64(n.Max))
	load, err := a.ledger.Load()
	s.Set(meter.LedgerQueue, float64(load.Waiting))
	s.Set(meter.Backlog, float64(load.Backlog))
	if err == nil {
		s.Set(meter.DiskFree, float64(load.DiskFree))
	}
	epoch, first, tree := a.ledger.Head()
	s.Set(meter.Epoch, float64(epoch))
	s.Set(meter.Events, float64(first+tree.Size))
	if stats, err := a.ledger.Stats(); err == nil {
		s.Set(meter.LedgerBytes, float64(stats.FileSize))
		s.Set(meter.LedgerUnused, float64(stats.FreeBytes))
	}
	e, err := a.ledger.Epoch(epoch)
	if err != nil {
		return
	}
	unsigned := tree.Size - min(tree.Size, e.Signed)
	s.Set(meter.Unsigned, float64(unsigned))
	age := time.Duration(0)
	if unsigned > 0 {
		age = time.Since(time.Unix(0, a.signed.Load()))
	}
	s.Set(meter.CheckpointAge, age.Seconds())
}

func one(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}

// Committed counts the transactions of the ledger, for ledger.Options.
func Committed(m *meter.Meter) func(requests int, took, disk time.Duration, err error) {
	return func(requests int, took, disk time.Duration, err error) {
		result := "ok"
		switch {
		case errors.Is(err, ledger.ErrDisk):
			result = "disk"
		case err != nil:
			result = "unknown"
		}
		m.Add(meter.Commits, result)
		m.Observe(meter.BatchRequests, float64(requests))
		m.Observe(meter.CommitSeconds, took.Seconds())
		m.Observe(meter.SyncSeconds, disk.Seconds())
	}
}

// silent reports a handshake that ended because the client was silent.
func silent(err error) bool {
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded)
}

// ended counts the end of a handshake, with its time since begun. The zero time is not known.
func (a *Appliance) ended(result string, begun time.Time) {
	a.meter.Add(meter.Handshakes, result)
	switch result {
	case meter.HandshakeClosed, meter.HandshakeUnused:
		return // the time of a client that has left says nothing
	case meter.HandshakeDone, meter.HandshakeTimeout, meter.HandshakeDevice:
	default:
		result = meter.HandshakeRefused
	}
	if !begun.IsZero() {
		a.meter.Observe(meter.HandshakeSeconds, time.Since(begun).Seconds(), result)
	}
}

// silenceOr returns the result of a handshake with an error: timeout if the client was silent, or
// another one.
func silenceOr(result string, err error) string {
	if silent(err) {
		return meter.HandshakeTimeout
	}
	return result
}
