package meter

import (
	"countersign/internal/cause"
	"countersign/wire"
)

// Kind is the type of a series in Prometheus.
type Kind string

const (
	Counter   Kind = "counter"
	Gauge     Kind = "gauge"
	Histogram Kind = "histogram"
)

// Label is a label of a series. The values are fixed, or names of the configuration. A value beyond
// the bound is counted as Other, so no caller can make a series grow.
type Label struct {
	Name   string
	Values []string // all values; nil: names of the configuration
	Most   int      // names of the configuration, without Other
}

// Other is the value of a label for all values beyond the bound.
const Other = "other"

// Series is a family of time series.
type Series struct {
	Name   string
	Kind   Kind
	Help   string
	Labels []Label

	buckets []float64 // classic buckets of a histogram
}

// Bound is the largest number of time series of the family, with Other. A histogram counts as one.
func (s *Series) Bound() int {
	n := 1
	for _, l := range s.Labels {
		n *= max(len(l.Values), l.Most) + 1
	}
	return n
}

// All has all series, in the order of the documents.
var All []*Series

func define(kind Kind, name, help string, labels ...Label) *Series {
	s := &Series{Name: "countersign_" + name, Kind: kind, Help: help, Labels: labels}
	All = append(All, s)
	return s
}

func histogram(buckets []float64, name, help string, labels ...Label) *Series {
	s := define(Histogram, name, help, labels...)
	s.buckets = buckets
	return s
}

// NoOp is the operation of a message that is no request, or that is beyond a limit.
const NoOp = "none"

// The results of handshakes that are no reason of a refusal.
const (
	HandshakeDone    = "done"    // the client has proven its key, and is a peer
	HandshakeDevice  = "device"  // the device did not answer
	HandshakeTimeout = "timeout" // the client was silent
	HandshakeClosed  = "closed"  // the client left before message 1 was read
	HandshakeUnused  = "unused"  // the client has sent no request after the handshake
)

// HandshakeRefused is the result of HandshakeSeconds for all reasons of a refusal.
const HandshakeRefused = "refused"

// Values of the label about of messages.
const (
	AboutAlerts = "alerts" // to webhooks and by mail
	AboutKeys   = "keys"   // rotations and compromises, to webhooks
)

// Values of labels.
var (
	ops = []string{
		wire.OpSign, wire.OpVerify, wire.OpPing, wire.OpKeys, wire.OpProof, wire.OpEpoch, wire.OpConsistency,
		wire.OpLine, wire.OpAck, wire.OpCompromiseAck, NoOp,
	}
	codes = []string{
		wire.CodeMalformed, wire.CodeUnsupported, wire.CodeTooLarge, wire.CodeUnknownKey, wire.CodeKeyNotActive,
		wire.CodeKeyRotated, wire.CodeDenied, wire.CodeNotConfirmed, wire.CodeReplay, wire.CodeRestored,
		wire.CodeExpired, wire.CodeNotYetValid, wire.CodeLifetimeTooLong, wire.CodeInvalidSignature,
		wire.CodeWrongSigner, wire.CodeRateLimited, wire.CodeBusy, wire.CodeUnavailable,
	}
	stages     = []string{"decode", "policy", "ledger", "turn", "device", "verify", "answer"}
	results    = []string{"ok", "refused", "unavailable"}
	handshakes = []string{
		HandshakeDone, HandshakeDevice, HandshakeTimeout, HandshakeClosed, HandshakeUnused,
		"unknown", "suspended", "rate_limited", "wrong_profile", "wrong_server_key", "identity", "connections",
		"no_key", "message",
	}
	limits = []string{"connect", "handshake", "request", "quota", "read"}
	lanes  = []string{"own", "handshakes", "peers"}
)

func causes() (codes []string) {
	for _, k := range cause.Kinds {
		codes = append(codes, k.Code)
	}
	return codes
}

func label(name string, values ...string) Label { return Label{Name: name, Values: values} }

var (
	about  = label("about", AboutAlerts, AboutKeys)
	sink   = Label{Name: "sink", Most: 32}
	token  = Label{Name: "token", Most: 32}
	worker = Label{Name: "worker", Most: 32}
	queue  = Label{Name: "queue", Most: 33} // the processor, and the tokens
)

// Classic buckets in seconds. The first covers a fast disk, the last one the longest request.
var (
	seconds  = []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 15}
	requests = []float64{1, 2, 4, 8, 16, 32, 64, 128, 256, 512}
)

// The series of requests and connections.
var (
	Requests = define(Counter, "requests_total",
		"Requests and items of batches, by operation and result.",
		label("op", ops...), label("result", results...))
	Refusals = define(Counter, "refusals_total",
		"Answers that are no result, by their code.", label("code", codes...))
	Replays = define(Counter, "replays_total",
		"Requests that were refused because their nonce is spent.", label("op", wire.OpSign, wire.OpVerify))
	RateLimited = define(Counter, "rate_limited_total",
		"Times that a limit was reached, by the place of the limit.", label("at", limits...))
	RequestSeconds = histogram(seconds, "request_seconds",
		"Time from a message that has been read to its written answer.", label("op", ops...))
	StageSeconds = histogram(seconds, "stage_seconds",
		"The same time by the stage of the walk. Stages that a request does not reach are not counted.",
		label("stage", stages...))
	Serving = define(Gauge, "requests_serving", "Requests and items of batches that are being served.")
	Waiting = define(Gauge, "requests_waiting",
		"Callers that wait for a turn: at the processor, or at a token.", queue, label("lane", lanes...))
	PeersWaiting = define(Gauge, "peers_waiting", "Peers with callers that wait for a turn.", queue)

	Handshakes = define(Counter, "handshakes_total",
		"Ended handshakes, by result: done, why not, or the reason of the refusal.",
		label("result", handshakes...))
	HandshakeSeconds = histogram(seconds, "handshake_seconds",
		"Time from message 1, or else from the connection, to the peer's first message, a refusal or a timeout.",
		label("result", HandshakeDone, HandshakeRefused, HandshakeTimeout, HandshakeDevice))
	Connections = define(Gauge, "connections",
		"Open connections; unproven: without a decrypted message.", label("state", "proven", "unproven"))
	Peers = define(Gauge, "peers", "Enrolled peers.", label("state", "enrolled", "suspended"))
)

// The series of tokens, the ledger and the audit log.
var (
	TokenUp        = define(Gauge, "token_up", "1 while the token serves.", token)
	WorkerUp       = define(Gauge, "worker_up", "1 while the key worker runs.", token, worker)
	WorkerCalls    = define(Counter, "worker_calls_total", "Calls that the key worker has answered.", token, worker)
	WorkerErrors   = define(Counter, "worker_errors_total", "Calls that have failed at the key worker.", token, worker)
	WorkerRestarts = define(Counter, "worker_restarts_total", "Processes of the key worker that were replaced.",
		token, worker)
	WorkerSuccess = define(Gauge, "worker_last_success_timestamp_seconds",
		"Time of the last call or test that succeeded at the process.", token, worker)
	WorkerMemory = define(Gauge, "worker_memory_bytes", "Private memory of the process.", token, worker)
	JournalBytes = define(Gauge, "journal_bytes",
		"Size of the journal of the token's key workers, as they have told within the last seconds.", token)
	JournalFailures = define(Counter, "journal_failures_total",
		"Signatures that did not leave a key worker because the journal could not be written.", token)

	Commits = define(Counter, "ledger_commits_total",
		"Transactions; disk: nothing was written, unknown: the daemon stops.",
		label("result", "ok", "disk", "unknown"))
	BatchRequests = histogram(requests, "ledger_batch_requests", "Requests that shared a transaction.")
	CommitSeconds = histogram(seconds, "ledger_commit_seconds", "Time of a transaction, decisions included.")
	SyncSeconds   = histogram(seconds, "ledger_sync_seconds",
		"Time of a transaction for writing to the disk and for fsync.")
	LedgerBytes  = define(Gauge, "ledger_file_bytes", "Size of the ledger's file.")
	LedgerUnused = define(Gauge, "ledger_file_unused_bytes", "Bytes of the file that writes use again.")
	DiskFree     = define(Gauge, "ledger_disk_free_bytes", "Free space of the ledger's file system for the daemon.")
	Nonces       = define(Gauge, "ledger_nonces", "Live nonces, by use.", label("use", "sign", "verify", "own"))
	NoncesMax    = define(Gauge, "ledger_nonces_max", "The largest number of live nonces.")
	LedgerQueue  = define(Gauge, "ledger_waiting", "Requests that wait for the ledger's writer.")
	Backlog      = define(Gauge, "ledger_backlog", "Outcomes that wait because the disk takes no writes.")
	ClockOffset  = define(Gauge, "clock_offset_seconds",
		"The system's time less the ledger's time. Negative: the system's clock is behind.")

	Events        = define(Counter, "audit_events_total", "Events of the audit log, the dropped ones too.")
	Unsigned      = define(Gauge, "audit_unsigned_events", "Events that no checkpoint covers yet.")
	CheckpointAge = define(Gauge, "audit_checkpoint_age_seconds",
		"Time since the last checkpoint while events wait for the next one; 0 otherwise.")
	Epoch = define(Gauge, "audit_epoch", "Number of the present epoch.")
)

// The series of the appliance as a whole.
var (
	State = define(Gauge, "state", "1 for the present state.",
		label("state", "operational", "degraded", "locked", "rolled-back"))
	Causes = define(Gauge, "causes", "Present causes of the state, by code (docs/SPEC.md, section 10).",
		label("code", causes()...))
	Keys = define(Gauge, "key_versions", "Versions of keys, by state.",
		label("state", "making", "pending", "active", "verify-only", "archived", "compromised", "destroyed"))
	Rotations = define(Gauge, "rotations",
		"Rotations by state. due: by the plan; announced: with a time; overdue: the time has passed; failing: retried.",
		label("state", "due", "announced", "overdue", "failing"))
	RotationsFailed = define(Counter, "rotations_failed_total",
		"Attempts at rotations that have failed. Each is tried again.")
	Proposals     = define(Gauge, "proposals_waiting", "Proposals that wait for approvals.")
	Sessions      = define(Gauge, "operator_sessions", "Operators' sessions.")
	ProofsRefused = define(Counter, "proofs_refused_total",
		"Proofs of operators that were refused.", label("purpose", "sign-in", "approval", "confirmation"))

	Alerts = define(Gauge, "alerts_firing", "Firing alerts, by code (docs/OPERATIONS.md, Alerts) and level.",
		Label{Name: "code", Most: 64}, label("level", "warning", "critical"))
	MessagesWaiting = define(Gauge, "messages_waiting", "Messages that wait for a receiver.", about)
	MessagesDropped = define(Counter, "messages_dropped_total",
		"Messages that were given up: too many newer ones, three days, or the receiver wants no more.", about)
	SinkSent    = define(Counter, "sink_events_sent_total", "Events that the sink's receiver has taken.", sink)
	SinkDropped = define(Counter, "sink_events_dropped_total",
		"Events in the gaps of the sink: too old, or dropped by retention.", sink)
	SinkBehind = define(Gauge, "sink_events_behind", "Events of the audit log that the sink has not read yet.", sink)
	LogDropped = define(Counter, "log_lines_dropped_total",
		"Lines of the daemon's log: unread, because nobody read the log; pace, above the pace of their kind.",
		label("why", "unread", "pace"))
	BackupAge = define(Gauge, "backup_age_seconds",
		"Time since the newest backup in the folder. Absent without a backup.")
	BackupBehind = define(Gauge, "backup_behind_seconds",
		"Age of the oldest write that a restore would not have. Absent where no lists of writes are shipped.")
	MirrorBehind = define(Gauge, "backup_mirror_behind_seconds",
		"Time for which the SFTP server has lacked something of the folder of backups. Absent without a server.")
	BackupProven = define(Gauge, "backup_proven_age_seconds",
		"Time since the last drill that has proven a backup. Absent where none has.")
	HoldersProven = define(Gauge, "holders_proven_age_seconds",
		"Time since the last drill with holders that has brought all recoverable keys back. Absent where none has.")
	HistoryFailing = define(Gauge, "history_failing", "1 while the history can't be written. Absent without a history.")
	Spans          = define(Counter, "trace_spans_total",
		"Spans of traces that the collector has taken, or that were dropped.", label("result", "sent", "dropped"))
	Sandbox = define(Gauge, "sandbox_missing",
		"Parts of the confinement of the daemon, or of a token's key workers, that this kernel lacks.",
		Label{Name: "process", Most: 33})
	OneUser = define(Gauge, "key_workers_one_user",
		"1 if the key workers run as the daemon's user, who then can read PINs and tokens unless Landlock forbids it.")
	Exposed = define(Gauge, "key_workers_exposed",
		"PINs, folders of tokens and journals that a daemon in other hands could read or change.")
	Build = define(Gauge, "build_info", "1, with the version of the daemon and of Go.",
		Label{Name: "version", Most: 1}, Label{Name: "go", Most: 1})
)
