package history

import (
	"math"
	"time"

	"countersign/internal/meter"
	"countersign/wire"
)

// Fold says how the value of a longer step follows from the values of the shorter steps in it.
// Steps without a value do not count.
type Fold string

const (
	Mean Fold = "mean" // weighted by the measured seconds: the mean of a rate is its rate
	Max  Fold = "max"
	Min  Fold = "min"
	Last Fold = "last"
)

// Series is a time series of the history.
type Series struct {
	Name string
	Unit string // "1/s", "s", "bytes", or "" for a number
	Fold Fold
	Help string
	Main bool // among the few figures of a first look

	counter func(*meter.Reading) (float64, bool)            // told as a rate for each second
	gauge   func(*meter.Reading) (float64, bool)            // told as it is
	timing  func(*meter.Reading) (meter.Distribution, bool) // told as a quantile
	q       float64
}

// of returns the sum of a family of the meter, and named the one of the client library.
func of(s *meter.Series, labels ...string) func(*meter.Reading) (float64, bool) {
	return named(s.Name, labels...)
}

func named(family string, labels ...string) func(*meter.Reading) (float64, bool) {
	return func(r *meter.Reading) (float64, bool) { return r.Sum(family, labels...) }
}

// less returns a sum without a part of it.
func less(all, part func(*meter.Reading) (float64, bool)) func(*meter.Reading) (float64, bool) {
	return func(r *meter.Reading) (float64, bool) {
		a, ok := all(r)
		b, _ := part(r)
		return a - b, ok
	}
}

func rate(name, help string, counter func(*meter.Reading) (float64, bool)) *Series {
	return &Series{Name: name, Unit: "1/s", Fold: Mean, Help: help, counter: counter}
}

func gauge(name, unit string, fold Fold, help string, read func(*meter.Reading) (float64, bool)) *Series {
	return &Series{Name: name, Unit: unit, Fold: fold, Help: help, gauge: read}
}

// quantile is a series of the quantile q of the observations within 10 seconds. Quantiles of parts
// do not add up to the quantile of the whole, so a longer step has the worst one.
func quantile(name string, q float64, help string, s *meter.Series, labels ...string) *Series {
	return &Series{Name: name, Unit: "s", Fold: Max, Help: help, q: q,
		timing: func(r *meter.Reading) (meter.Distribution, bool) { return r.Distribution(s.Name, labels...) }}
}

// byCode is the series of refusals with a code.
func byCode(code, help string) *Series {
	return rate(code, help, of(meter.Refusals, "code", code))
}

func (s *Series) main() *Series {
	s.Main = true
	return s
}

// All has the series of the history, in the order of the documents.
var All = []*Series{
	rate("requests", "Requests and items of batches.", of(meter.Requests)).main(),
	rate("signatures", "Signatures that were answered.", of(meter.Requests, "op", "sign", "result", "ok")).main(),
	rate("verifications", "Verifications that were answered.",
		of(meter.Requests, "op", "verify", "result", "ok")).main(),
	rate("refused", "Requests that were refused.", of(meter.Requests, "result", "refused")).main(),
	rate("unavailable", "Requests that the appliance could not serve.",
		of(meter.Requests, "result", "unavailable")).main(),
	byCode(wire.CodeDenied, "Requests that policy has denied."),
	byCode(wire.CodeBusy, "Requests that a bound has refused."),
	byCode(wire.CodeMalformed, "Requests that do not have the specified form."),
	byCode(wire.CodeUnsupported, "Requests of an unknown operation or type."),
	byCode(wire.CodeTooLarge, "Requests that do not fit into a message, or whose answer does not."),
	byCode(wire.CodeUnknownKey, "Requests for a key that does not exist."),
	byCode(wire.CodeKeyNotActive, "Requests for a key that may not sign now."),
	byCode(wire.CodeKeyRotated, "Requests for another version than the one that signs."),
	byCode(wire.CodeNotConfirmed, "Requests for a key that an operator must confirm."),
	byCode(wire.CodeRestored, "Documents that may be of before the appliance was restored."),
	byCode(wire.CodeExpired, "Documents whose time was over."),
	byCode(wire.CodeNotYetValid, "Documents with a time in the future."),
	byCode(wire.CodeLifetimeTooLong, "Documents with too long a lifetime."),
	byCode(wire.CodeInvalidSignature, "Signatures that do not verify."),
	byCode(wire.CodeWrongSigner, "Documents that do not name the key as a signer."),
	rate("replays", "Requests whose nonce was spent.", of(meter.Replays)).main(),
	rate("rate_limited", "Times that a limit was reached.", of(meter.RateLimited)),
	quantile("sign_p50", .5, "Median time of a sign request.", meter.RequestSeconds, "op", "sign"),
	quantile("sign_p99", .99, "Time of a sign request.", meter.RequestSeconds, "op", "sign").main(),
	quantile("verify_p50", .5, "Median time of a verify request.", meter.RequestSeconds, "op", "verify"),
	quantile("verify_p99", .99, "Time of a verify request.", meter.RequestSeconds, "op", "verify"),
	quantile("decode_p99", .99, "Time of the stage decode.", meter.StageSeconds, "stage", "decode"),
	quantile("policy_p99", .99, "Time of the stage policy.", meter.StageSeconds, "stage", "policy"),
	quantile("ledger_p99", .99, "Time of the stage ledger.", meter.StageSeconds, "stage", "ledger"),
	quantile("turn_p99", .99, "Time of the stage turn.", meter.StageSeconds, "stage", "turn"),
	quantile("device_p99", .99, "Time of the stage device.", meter.StageSeconds, "stage", "device"),
	quantile("answer_p99", .99, "Time of the stage answer.", meter.StageSeconds, "stage", "answer"),
	gauge("serving", "", Max, "Requests that are being served.", of(meter.Serving)),
	gauge("waiting", "", Max, "Callers that wait for a turn.", of(meter.Waiting)).main(),

	rate("handshakes", "Handshakes that are done.", of(meter.Handshakes, "result", meter.HandshakeDone)),
	rate("handshakes_failed", "Handshakes that were not done.",
		less(of(meter.Handshakes), of(meter.Handshakes, "result", meter.HandshakeDone))).main(),
	rate("handshakes_timeout", "Handshakes that timed out.",
		of(meter.Handshakes, "result", meter.HandshakeTimeout)),
	quantile("handshake_p99", .99, "Time of a handshake that is done.", meter.HandshakeSeconds,
		"result", meter.HandshakeDone),
	gauge("connections", "", Max, "Open connections of peers.", of(meter.Connections, "state", "proven")).main(),
	gauge("connections_unproven", "", Max, "Open connections without a decrypted message.",
		of(meter.Connections, "state", "unproven")),
	gauge("peers", "", Last, "Enrolled peers.", of(meter.Peers, "state", "enrolled")),

	gauge("tokens_up", "", Min, "Tokens that serve.", of(meter.TokenUp)).main(),
	gauge("workers_up", "", Min, "Key workers that run.", of(meter.WorkerUp)).main(),
	rate("worker_calls", "Calls that key workers have answered.", of(meter.WorkerCalls)),
	rate("worker_errors", "Calls that have failed at key workers.", of(meter.WorkerErrors)),
	rate("worker_restarts", "Key workers that were replaced.", of(meter.WorkerRestarts)).main(),
	gauge("worker_memory", "bytes", Max, "Private memory of the key workers.", of(meter.WorkerMemory)),

	rate("commits", "Transactions of the ledger.", of(meter.Commits, "result", "ok")),
	rate("commits_failed", "Transactions that the disk has refused.",
		less(of(meter.Commits), of(meter.Commits, "result", "ok"))),
	quantile("commit_p99", .99, "Time of a transaction.", meter.CommitSeconds),
	quantile("sync_p99", .99, "Time of a transaction for the disk.", meter.SyncSeconds),
	gauge("ledger_size", "bytes", Last, "Size of the ledger's file.", of(meter.LedgerBytes)),
	gauge("disk_free", "bytes", Min, "Free space of the ledger's disk.", of(meter.DiskFree)).main(),
	gauge("nonces", "", Max, "Live nonces.", of(meter.Nonces)),
	gauge("ledger_waiting", "", Max, "Requests that wait for the ledger's writer.", of(meter.LedgerQueue)).main(),
	gauge("backlog", "", Max, "Outcomes that wait for the disk.", of(meter.Backlog)),
	gauge("clock_offset", "s", Last, "The system's time less the ledger's time.", of(meter.ClockOffset)),
	rate("events", "Events of the audit log.", of(meter.Events)),
	gauge("checkpoint_age", "s", Max, "Time since the last checkpoint while events wait.", of(meter.CheckpointAge)),

	gauge("operational", "", Min, "1 while the state is operational.", of(meter.State, "state", "operational")),
	gauge("causes", "", Max, "Causes of the state.", of(meter.Causes)).main(),
	gauge("rotations_overdue", "", Max, "Rotations whose time has passed.", of(meter.Rotations, "state", "overdue")),
	gauge("rotations_failing", "", Max, "Rotations that are retried.", of(meter.Rotations, "state", "failing")),
	gauge("proposals", "", Max, "Proposals that wait for approvals.", of(meter.Proposals)),
	gauge("sessions", "", Max, "Operators' sessions.", of(meter.Sessions)),
	rate("proofs_refused", "Proofs of operators that were refused.", of(meter.ProofsRefused)),

	rate("cpu", "Seconds of the processor that the daemon takes in a second.",
		named("process_cpu_seconds_total")),
	gauge("memory", "bytes", Max, "Resident memory of the daemon.", named("process_resident_memory_bytes")),
	gauge("descriptors", "", Max, "Open file descriptors of the daemon.", named("process_open_fds")),
	gauge("goroutines", "", Max, "Goroutines of the daemon.", named("go_goroutines")),
}

// maxElapsed is the longest time between two readings of which a rate is told. After a longer one,
// as of a machine that has slept, the rate of the last step is not known.
const maxElapsed = time.Minute

// Deriver derives values from a meter's readings. The zero Deriver is ready for use. A Deriver is
// not safe for concurrent use.
type Deriver struct {
	at      time.Time // of the reading before; zero: there is none
	counts  []float64
	timings []meter.Distribution
}

// Next returns the value of each series of All at a reading, and the time since the reading before.
// NaN is an unknown value: of a rate at the first reading, of a time that was not observed, of a
// state that can't be read.
func (d *Deriver) Next(r *meter.Reading) (values []float32, elapsed time.Duration) {
	values = make([]float32, len(All))
	counts, timings := make([]float64, len(All)), make([]meter.Distribution, len(All))
	known := !d.at.IsZero()
	if known {
		elapsed = r.At.Sub(d.at) // of the monotonic clock
		known = elapsed > 0 && elapsed <= maxElapsed
	}
	for i, s := range All {
		value, ok := math.NaN(), false
		switch {
		case s.gauge != nil:
			if v, read := s.gauge(r); read {
				value = v
			}
		case s.counter != nil:
			if counts[i], ok = s.counter(r); !ok {
				counts[i] = math.NaN() // no rate now, and none at the next reading
			} else if known {
				value = (counts[i] - d.counts[i]) / elapsed.Seconds()
			}
			if value < 0 { // the counter has begun anew
				value = math.NaN()
			}
		default:
			if timings[i], ok = s.timing(r); ok && known {
				if since, fits := timings[i].Since(d.timings[i]); fits {
					value = since.Quantile(s.q)
				}
			}
		}
		values[i] = float32(value)
	}
	d.at, d.counts, d.timings = r.At, counts, timings
	return values, elapsed
}
