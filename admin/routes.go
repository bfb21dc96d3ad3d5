package admin

import (
	"net/http"

	"countersign/internal/machine"
)

// routes registers all operations. An operation of logFiles is registered in log.go.
func (s *server) routes() {
	routeRaw(s, s.openapi, operation{
		route: "GET /v1/openapi.json", id: "openapi", summary: "This document",
		roles: public, refused: inNoState})
	for _, at := range []struct{ path, id string }{{"/v1/health/", ""}, {"/health/", "-short"}} {
		route(s, s.alive, operation{
			route: "GET " + at.path + "alive", id: "alive" + at.id,
			summary: "Say whether the daemon comes round",
			roles:   public, refused: inNoState})
		route(s, s.ready, operation{
			route: "GET " + at.path + "ready", id: "ready" + at.id,
			summary: "Say whether it signs: by a signature, made once a second at the most",
			roles:   public, refused: inNoState})
		route(s, s.health, operation{
			route: "GET " + at.path + "state", id: "state" + at.id,
			summary: "Say in which state the appliance is, and to who is signed in why",
			roles:   public, refused: inNoState})
	}
	routeEmpty(s, s.lock, operation{
		route: "POST /v1/lock", id: "lock",
		summary: "Lock the appliance: no key is used until it is unlocked",
		roles:   of(administrator, operator), refused: whileUninitialised})
	routeEmpty(s, s.unlock, operation{
		route: "POST /v1/unlock", id: "unlock", summary: "Unlock the appliance",
		roles: of(administrator), refused: whileUninitialised})

	route(s, s.me, operation{
		route: "GET /v1/me", id: "me", summary: "Say who is signed in",
		roles: signedIn, refused: whileUninitialised})
	route(s, s.challenge, operation{
		route: "POST /v1/challenges", id: "challenge",
		summary: "Get a text to be signed, to sign in or to confirm presence",
		roles:   public, refused: whileUninitialised, status: http.StatusCreated})
	routeRaw(s, s.signIn, operation{
		route: "POST /v1/sessions", id: "sign-in", summary: "Sign in with a signed challenge",
		roles: public, refused: whileUninitialised, status: http.StatusCreated})
	routeRaw(s, s.sessions, operation{
		route: "GET /v1/sessions", id: "sessions", summary: "List one's own sessions; administrators see all",
		roles: signedIn, refused: whileUninitialised})
	routeRaw(s, s.endSession, operation{
		route: "DELETE /v1/sessions/{id}", id: "end-session",
		summary: "End a session: one's own (current is this one), as an administrator any",
		roles:   signedIn, refused: whileUninitialised})
	route(s, s.passkeyOptions, operation{
		route: "POST /v1/passkeys/options", id: "passkey-options", summary: "Begin to make a passkey",
		roles: public, refused: whileUninitialised, status: http.StatusCreated})
	route(s, s.passkey, operation{
		route: "POST /v1/passkeys", id: "passkey",
		summary: "Check a new passkey; a proposal gives it to an operator",
		roles:   public, refused: whileUninitialised})
	route(s, s.enrolFirst, operation{
		route: "POST /v1/operators/first", id: "first-operator",
		summary: "Enrol the first administrator: for root on the Unix socket, once",
		roles:   public, refused: inNoState, status: http.StatusCreated})
	route(s, s.firstLink, operation{
		route: "POST /v1/operators/first/link", id: "first-link",
		summary: "Make the link of the first administrator: for root on the Unix socket",
		roles:   public, refused: inNoState, status: http.StatusCreated})
	route(s, s.newLink, operation{
		route: "POST /v1/links", id: "make-link", summary: "Make a link by which a person makes a passkey, once",
		roles: of(administrator), refused: whileUninitialised, status: http.StatusCreated})
	route(s, s.listLinks, operation{
		route: "GET /v1/links", id: "links", summary: "List the links with the passkeys that were made by them",
		roles: of(administrator), refused: whileUninitialised})
	routeEmpty(s, s.removeLink, operation{
		route: "DELETE /v1/links/{id}", id: "remove-link", summary: "Make a link worthless",
		roles: of(administrator), refused: whileUninitialised})
	route(s, s.openLink, operation{
		route: "POST /v1/links/open", id: "open-link",
		summary: "Open a link by its secret, and begin to make its passkey",
		roles:   public, refused: inNoState})
	route(s, s.useLink, operation{
		route: "POST /v1/links/use", id: "use-link", summary: "Use a link with the passkey that was made",
		roles: public, refused: inNoState})
	routeRaw(s, s.operators, operation{
		route: "GET /v1/operators", id: "operators", summary: "List operators",
		roles: of(administrator, auditor, approver), refused: whileUninitialised})
	route(s, s.operator, operation{
		route: "GET /v1/operators/{name}", id: "operator", summary: "Show an operator",
		roles: of(administrator, auditor, approver), refused: whileUninitialised})
	route(s, s.approvals, operation{
		route: "GET /v1/approvals", id: "approvals",
		summary: "Say how many approvals an act needs, and who gives them",
		roles:   of(administrator, operator, auditor, approver), refused: whileUninitialised})
	routeRaw(s, s.proposals, operation{
		route: "GET /v1/proposals", id: "proposals", summary: "List proposals, the newest first",
		roles: of(administrator, operator, auditor, approver), refused: whileUninitialised})
	route(s, s.propose, operation{
		route: "POST /v1/proposals", id: "propose", summary: "Propose an act that needs approval",
		roles: of(administrator, operator), refused: whileUninitialised, status: http.StatusCreated, body: maxProposal})
	route(s, s.proposal, operation{
		route: "GET /v1/proposals/{id}", id: "proposal", summary: "Show a proposal",
		roles: of(administrator, operator, auditor, approver), refused: whileUninitialised})
	route(s, s.approve, operation{
		route: "POST /v1/proposals/{id}/approvals", id: "approve",
		summary: "Approve a proposal by a signature over its text",
		roles:   of(approver), refused: whileUninitialised})
	routeEmpty(s, s.withdraw, operation{
		route: "POST /v1/proposals/{id}/withdraw", id: "withdraw", summary: "Withdraw a proposal",
		roles: of(administrator, operator), refused: whileUninitialised})

	route(s, s.createKey, operation{
		route: "POST /v1/keys", id: "create-key", summary: "Create or import a signing key",
		roles: of(operator), refused: whileBlocked, status: http.StatusCreated})
	routeRaw(s, s.keys, operation{
		route: "GET /v1/keys", id: "keys", summary: "List all versions of all keys",
		roles: signedIn, refused: whileUninitialised})
	routeRaw(s, s.key, operation{
		route: "GET /v1/keys/{name}", id: "key", summary: "Show all versions of a key",
		roles: signedIn, refused: whileUninitialised})
	route(s, s.rotate, operation{
		route: "POST /v1/keys/{name}/rotate", id: "rotate-key", summary: "Announce the next version of a key",
		roles: of(operator), refused: whileBlocked})
	route(s, s.cancelRotation, operation{
		route: "POST /v1/keys/{name}/rotate/cancel", id: "cancel-rotation",
		summary: "Call off the announced or requested rotation of a key",
		roles:   of(operator), refused: whileUninitialised})
	route(s, s.line, operation{
		route: "GET /v1/keys/{name}/line", id: "line",
		summary: "Say how a key is rotated, and who has not acknowledged it",
		roles:   signedIn, refused: whileUninitialised})
	route(s, s.setLine, operation{
		route: "PATCH /v1/keys/{name}/line", id: "set-line",
		summary: "Say how a key is rotated; weaker settings are the act key set",
		roles:   of(operator), refused: whileUninitialised})
	route(s, s.confirm, operation{
		route: "POST /v1/keys/{name}/confirm", id: "confirm-key",
		summary: "Confirm by a signed challenge that a key may sign for a while",
		roles:   of(operator), refused: whileUninitialised})
	route(s, s.authorizeNoise, operation{
		route: "POST /v1/noise-key/authorize", id: "authorize-noise-key",
		summary: "Have the identity's key sign for the Noise key",
		roles:   of(operator), refused: whileBlocked, status: http.StatusCreated})
	route(s, s.noiseKey, operation{
		route: "GET /v1/noise-key", id: "noise-key",
		summary: "Show the key that the listener answers handshakes with",
		roles:   signedIn, refused: whileUninitialised})
	route(s, s.tokens, operation{
		route: "GET /v1/tokens", id: "tokens", summary: "Say how the tokens and their key workers are",
		roles: of(administrator, operator, auditor, metrics), refused: whileUninitialised})
	route(s, s.token, operation{
		route: "GET /v1/tokens/{name}", id: "token", summary: "Ask a token's device what it is, and how it is measured",
		roles: of(administrator, operator, auditor), refused: whileUninitialised})
	routeEmpty(s, s.retryToken, operation{
		route: "POST /v1/tokens/{name}/retry", id: "retry-token",
		summary: "Log in to a token again after its PIN was refused",
		roles:   of(administrator), refused: whileUninitialised})
	route(s, s.logLevel, operation{
		route: "GET /v1/log-level", id: "log-level", summary: "Say which level the daemon's log has, and until when",
		roles: of(administrator, operator, auditor), refused: inNoState})
	route(s, s.setLogLevel, operation{
		route: "POST /v1/log-level", id: "set-log-level",
		summary: "Set the level of the daemon's log for a time, or to that of the configuration",
		roles:   of(administrator, operator), refused: whileUninitialised})
	route(s, s.alerts, operation{
		route: "GET /v1/alerts", id: "alerts", summary: "List the firing alerts, the gravest first, and all kinds",
		roles: of(administrator, operator, auditor, approver, metrics), refused: whileUninitialised})
	routeEmpty(s, s.ackAlert, operation{
		route: "POST /v1/alerts/acknowledge", id: "acknowledge-alert",
		summary: "Take note of an alert: it is not sent again for a time",
		roles:   of(administrator, operator), refused: whileUninitialised})
	route(s, s.testAlerts, operation{
		route: "POST /v1/alerts/test", id: "test-alerts",
		summary: "Send a test message to each receiver of alerts, and say what each has answered",
		roles:   of(administrator, operator), refused: whileUninitialised})
	route(s, s.rollback, operation{
		route: "GET /v1/rollback", id: "rollback",
		summary: "Say whether the ledger is older than its counter",
		roles:   of(administrator, operator, auditor, approver), refused: whileUninitialised})
	routeRaw(s, s.peers, operation{
		route: "GET /v1/peers", id: "peers", summary: "List the enrolled peers",
		roles: signedIn, refused: whileUninitialised})
	route(s, s.refusedHandshakes, operation{
		route: "GET /v1/handshakes/refused", id: "refused-handshakes",
		summary: "List the handshakes that were refused since the start: which key, from where, and why",
		roles:   of(administrator, operator, auditor), refused: whileUninitialised})
	route(s, s.peer, operation{
		route: "GET /v1/peers/{name}", id: "peer", summary: "Show an enrolled peer with its keys",
		roles: signedIn, refused: whileUninitialised})
	route(s, s.peerActivity, operation{
		route: "GET /v1/peers/{name}/activity", id: "peer-activity",
		summary: "Count the answers to a peer in each of the last 60 minutes",
		roles:   meterReaders, refused: whileUninitialised})
	route(s, s.activity, operation{
		route: "GET /v1/activity", id: "activity",
		summary: "List the peers with the most answers in the last 60 minutes",
		roles:   meterReaders, refused: whileUninitialised})
	routeEmpty(s, s.removePeerKey, operation{
		route: "DELETE /v1/peers/{name}/keys/{key}", id: "remove-peer-key",
		summary: "Take a key of a peer back and close the connections of the key",
		roles:   of(operator), refused: whileUninitialised})
	routeEmpty(s, s.removePeer, operation{
		route: "DELETE /v1/peers/{name}", id: "remove-peer",
		summary: "Take a peer's enrolment back and close its connections",
		roles:   of(operator), refused: whileUninitialised})
	routeEmpty(s, s.suspendPeer, operation{
		route: "POST /v1/peers/{name}/suspend", id: "suspend-peer",
		summary: "Keep a peer out until it is resumed",
		roles:   of(operator), refused: whileUninitialised})
	routeEmpty(s, s.resumePeer, operation{
		route: "POST /v1/peers/{name}/resume", id: "resume-peer", summary: "Let a suspended peer in again",
		roles: of(operator), refused: whileUninitialised})

	routeRaw(s, s.policies, operation{
		route: "GET /v1/policies", id: "policies",
		summary: "List the versions of the policy without their texts; the last one is in force",
		roles:   of(administrator, operator, auditor, approver), refused: whileUninitialised})
	route(s, s.policy, operation{
		route: "GET /v1/policies/{version}", id: "policy",
		summary: "Show a version of the policy with its text",
		roles:   of(administrator, operator, auditor, approver), refused: whileUninitialised})
	route(s, s.tryPolicy, operation{
		route: "POST /v1/policies/try", id: "try-policy",
		summary: "Check a text of a policy, run a table of cases, and replay past decisions; nothing is put in force",
		roles:   of(administrator, operator, auditor, approver), refused: whileUninitialised, body: maxProposal})
	route(s, s.rights, operation{
		route: "GET /v1/peers/{name}/rights", id: "peer-rights",
		summary: "List the rules of the policy in force that fit a peer, for each key",
		roles:   of(administrator, operator, auditor, approver), refused: whileUninitialised})
	routeRaw(s, s.groups, operation{
		route: "GET /v1/groups", id: "groups", summary: "List the groups of peers and of keys without their members",
		roles: of(administrator, operator, auditor, approver), refused: whileUninitialised})
	route(s, s.group, operation{
		route: "GET /v1/groups/{name}", id: "group", summary: "Show a group with its members",
		roles: of(administrator, operator, auditor, approver), refused: whileUninitialised})
	routeRaw(s, s.decisions, operation{
		route: "GET /v1/decisions", id: "decisions", summary: "List what policy decided",
		roles: of(administrator, auditor, approver), refused: whileUninitialised})
	route(s, s.decision, operation{
		route: "GET /v1/decisions/{event}", id: "decision", summary: "Show what policy decided in an event",
		roles: of(administrator, auditor), refused: whileUninitialised})

	routeRaw(s, s.events, operation{
		route: "GET /v1/events", id: "events", summary: "List events of the audit log",
		roles: eventReaders, refused: whileUninitialised})
	route(s, s.eventProof, operation{
		route: "GET /v1/events/{event}/proof", id: "event-proof",
		summary: "Prove that an event is in the log, and that the log continues the tree that the caller has seen",
		roles:   eventReaders, refused: whileUninitialised})
	routeRaw(s, s.follow, operation{
		route: "GET /v1/stream", id: "stream",
		summary: "Follow state, figures and events as they happen, as server-sent events",
		roles:   signedIn, refused: whileUninitialised, stream: "text/event-stream"})
	route(s, s.log, operation{
		route: "GET /v1/log", id: "log", summary: "Name the audit log",
		roles: of(administrator, operator, auditor, approver, backup), refused: whileUninitialised})
	route(s, s.endEpoch, operation{
		route: "POST /v1/log/epochs", id: "end-epoch", summary: "End the present epoch of the audit log",
		roles: of(operator), refused: whileUninitialised})
	routeEmpty(s, s.hold, operation{
		route: "POST /v1/log/epochs/{epoch}/holds", id: "hold",
		summary: "Keep an epoch from being dropped, by a legal hold with a name",
		roles:   of(administrator), refused: whileUninitialised})
	s.logFiles()
	routeRaw(s, s.retention, operation{
		route: "GET /v1/retention", id: "retention", summary: "Say what retention has dropped and will drop",
		roles: of(administrator, auditor, backup), refused: whileUninitialised})
	routeRaw(s, s.receipts, operation{
		route: "GET /v1/receipts", id: "receipts", summary: "List receipts by time",
		roles: of(operator, auditor), refused: whileUninitialised})
	route(s, s.receipt, operation{
		route: "GET /v1/receipts/{id}", id: "receipt", summary: "Show a receipt",
		roles: of(operator, auditor), refused: whileUninitialised})
	route(s, s.sinks, operation{
		route: "GET /v1/sinks", id: "sinks", summary: "List the sinks of events with their positions and gaps",
		roles: of(administrator, operator, auditor, metrics), refused: whileUninitialised})
	routeRaw(s, s.statement, operation{
		route: "GET /v1/report/statement", id: "report-statement",
		summary: "State which events a period has, with the proof that none is missing",
		roles:   of(auditor), refused: whileUninitialised})
	routeRaw(s, s.eventRows, operation{
		route: "GET /v1/report/events", id: "report-events", summary: "List the events of a statement as rows",
		roles: of(auditor), refused: whileUninitialised})
	routeRaw(s, s.receiptRows, operation{
		route: "GET /v1/report/receipts", id: "report-receipts", summary: "List the receipts of a statement as rows",
		roles: of(auditor), refused: whileUninitialised})
	route(s, s.ledger, operation{
		route: "GET /v1/ledger", id: "ledger", summary: "Say how large the ledger is and how its clock is",
		roles: of(administrator, operator, auditor, approver, backup, metrics), refused: whileUninitialised})
	routeRaw(s, s.metrics, operation{
		route: "GET /v1/metrics", id: "metrics",
		summary: "Get the metrics in a format of Prometheus: text, OpenMetrics or protobuf",
		roles:   meterReaders, refused: whileUninitialised, scrapers: true})
	routeRaw(s, s.scrapers, operation{
		route: "GET /v1/scrapers", id: "scrapers",
		summary: "List the programs that read the metrics over HTTPS by a token",
		roles:   of(administrator, operator, auditor), refused: whileUninitialised})
	routeEmpty(s, s.removeScraper, operation{
		route: "DELETE /v1/scrapers/{name}", id: "remove-scraper",
		summary: "Take the right of a program to read the metrics away",
		roles:   of(administrator, operator), refused: whileUninitialised})
	route(s, s.history, operation{
		route: "GET /v1/history", id: "history",
		summary: "Get figures of the past: 10 s for 2 hours, 1 min for 2 days, 15 min for 90 days",
		roles:   meterReaders, refused: whileUninitialised})
	route(s, s.historySeries, operation{
		route: "GET /v1/history/series", id: "history-series", summary: "List the series of the history",
		roles: meterReaders, refused: whileUninitialised})
	route(s, s.compact, operation{
		route: "POST /v1/ledger/compact", id: "compact",
		summary: "Give the free space of the ledger's file back",
		roles:   of(operator), refused: whileUninitialised})

	route(s, s.createBackup, operation{
		route: "POST /v1/backups", id: "create-backup", summary: "Make a backup",
		roles: of(administrator, operator, backup), refused: whileUninitialised, status: http.StatusCreated})
	routeRaw(s, s.listBackups, operation{
		route: "GET /v1/backups", id: "backups", summary: "List the backups in the folder",
		roles: of(administrator, operator, auditor, backup), refused: whileUninitialised})
	routeRaw(s, s.getBackup, operation{
		route: "GET /v1/backups/{name}", id: "backup", summary: "Get the file of a backup, encrypted as it is",
		roles: of(administrator, operator, backup), refused: whileUninitialised, stream: "application/octet-stream"})
	route(s, s.pruneBackups, operation{
		route: "POST /v1/backups/prune", id: "prune-backups",
		summary: "Remove the backups that the configuration does not keep",
		roles:   of(administrator, operator, backup), refused: whileUninitialised})
	route(s, s.holders, operation{
		route: "GET /v1/holders", id: "holders",
		summary: "Show the recovery holders, and the keys that they can bring back",
		roles:   signedIn, refused: whileUninitialised})
	route(s, s.machine, operation{
		route: "GET /v1/machine", id: "machine",
		summary: "Show the machine of an appliance that was booted from the image",
		roles:   of(administrator, operator, auditor, approver), refused: whileUninitialised})
	routeEmpty(s, s.uploadUpdate, operation{
		route: "PUT /v1/machine/update", id: "upload-update", summary: "Give a part of an update's file to the machine",
		roles: of(administrator), refused: whileUninitialised, body: machine.MaxPart + 1})
	route(s, s.endUpload, operation{
		route: "POST /v1/machine/update", id: "end-upload", summary: "Have the machine verify the uploaded update",
		roles: of(administrator), refused: whileUninitialised})
	route(s, s.machineConfiguration, operation{
		route: "GET /v1/machine/configuration", id: "machine-configuration",
		summary: "Show the configuration of an appliance that was booted from the image",
		roles:   of(administrator, operator, auditor, approver), refused: whileUninitialised})
	route(s, s.putMachineFile, operation{
		route: "PUT /v1/machine/files/{name}", id: "put-machine-file",
		summary: "Keep a file on the machine, such as a password, for the configuration to name",
		roles:   of(administrator), refused: whileUninitialised, body: machine.MaxFile + 1})
	routeEmpty(s, s.removeMachineFile, operation{
		route: "DELETE /v1/machine/files/{name}", id: "remove-machine-file",
		summary: "Remove a file of the machine that the configuration does not name",
		roles:   of(administrator), refused: whileUninitialised})
	routeEmpty(s, s.restartMachine, operation{
		route: "POST /v1/machine/restart", id: "restart-machine", summary: "Restart the machine",
		roles: of(administrator), refused: whileUninitialised})
	route(s, s.lastDrill, operation{
		route: "GET /v1/drills", id: "drills", summary: "Show the last drill, which has restored a backup",
		roles: of(administrator, operator, auditor, backup), refused: whileUninitialised})
	route(s, s.drilled, operation{
		route: "POST /v1/drills", id: "drilled",
		summary: "Report a drill: for root, or the daemon's user, on the Unix socket",
		roles:   public, refused: inNoState, status: http.StatusCreated})

	route(s, s.tls, operation{
		route: "GET /v1/tls", id: "tls",
		summary: "Show the certificate of the HTTPS listener and whom to trust for it",
		roles:   signedIn, refused: whileUninitialised})
	route(s, s.csr, operation{
		route: "POST /v1/tls/csr", id: "csr", summary: "Ask for a request for a certificate",
		roles: of(administrator), refused: whileUninitialised})
	route(s, s.installCertificate, operation{
		route: "PUT /v1/tls/certificate", id: "install-certificate", summary: "Put a certificate into use",
		roles: of(administrator), refused: whileUninitialised})
	route(s, s.uninstallCertificate, operation{
		route: "DELETE /v1/tls/certificate", id: "uninstall-certificate",
		summary: "Go back to a certificate of the appliance's own CA",
		roles:   of(administrator), refused: whileUninitialised})
}
