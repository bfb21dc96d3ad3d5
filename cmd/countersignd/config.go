package main

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"countersign/appliance"
	"countersign/hsm"
	"countersign/internal/anchor"
	"countersign/internal/cli"
	"countersign/internal/journal"
	"countersign/internal/keystore"
	"countersign/internal/launcher"
	"countersign/internal/ledger"
	"countersign/internal/logline"
	"countersign/internal/secret"
	"countersign/internal/webhook"
	"countersign/tpm"
)

// configFormat counts the configurations that an older version's daemon can't start with, or whose
// fields mean something else. NEWS.md names the format of each version.
const configFormat = 1

// Config is the daemon's configuration, a TOML file in UTF-8 without a byte order mark. An unknown
// field is an error with its line, and so is a name in another case. Relative paths of all fields
// are relative to the directory of the file. A duration is a text with a unit: "10s", "5m", "7d".
type Config struct {
	// User is the name or number of the user that the daemon becomes when root starts it. Another
	// user than root and this one can't start the daemon then. Default: none, and the daemon stays
	// the user who starts it.
	User string `toml:"user"`

	// KeysUser is the user of the key workers, who alone needs access to PINs, tokens, the folders
	// of TPMs and the journal. When root starts the daemon, the key workers become this user.
	// Required with user. Default: the daemon's user. Danger: with one user for both, the daemon is
	// kept from PINs and tokens by Landlock alone, and only if they are outside its folders.
	KeysUser string `toml:"keys_user"`

	// KeysSocket is the path of the Unix socket where the service manager starts key workers as
	// keys_user, for a daemon that is not started by root. Default: none.
	KeysSocket string `toml:"keys_socket"`

	// Listen is the TCP address, host:port, of the listener for peers with the profile
	// countersign-v1. Listen or listen_pubky is required. Each client on the network can make the
	// token do two key exchanges for a handshake, at the rate of limits.handshakes. Bind the
	// listener to the network of the payment servers only. A start waits for an address that the
	// machine does not have yet.
	Listen string `toml:"listen"`

	// ListenPubky is the same for peers with the profile pubky-noise-v1, the profile of
	// pubky-noise's clients. Default: no listener.
	ListenPubky string `toml:"listen_pubky"`

	// AdminSocket is the path of the Unix socket of the admin API. Required. The socket has mode
	// 0600, so only its owner can open it. Close its directory to other users, too. A user who can
	// open the socket can try to sign in, and root can enrol the first administrator.
	AdminSocket string `toml:"admin_socket"`

	// AdminGroup is the name of a group with access to the socket (mode 0660). The group must
	// exist. Default: access for root and the daemon's user only.
	AdminGroup string `toml:"admin_group"`

	// AdminHTTPS is the address, such as 127.0.0.1:7780, of the admin API over HTTPS, for browsers:
	// a loopback address, unless admin_https_from names networks. Default: no HTTPS. countersignd
	// init makes the HTTPS keys in log_token, which must support P-256 keys.
	AdminHTTPS string `toml:"admin_https"`

	// AdminHTTPSFrom has the networks of operators, such as 10.1.9.0/24, for an admin_https that is
	// no loopback address. Connections from elsewhere are closed at once. Default: loopback only.
	AdminHTTPSFrom []string `toml:"admin_https_from"`

	// AdminName is the host name of the admin API in browsers. Default: localhost. Danger: passkeys
	// are bound to the name, and stop working with another name.
	AdminName string `toml:"admin_name"`

	// MachineSocket is the path of the Unix socket of the machine's agent, on a machine that was
	// booted from the image. Default: none; the appliance is a program on a host.
	MachineSocket string `toml:"machine_socket"`

	// MetricsListen is a loopback address, such as 127.0.0.1:7790, that serves the metrics at
	// /metrics for Prometheus, over plain HTTP and without a sign-in. Default: no such listener.
	// Each user of the machine can read the metrics there; they have no names of peers.
	MetricsListen string `toml:"metrics_listen"`

	// History is the file with figures of the last 90 days, some 3 MB. Default: LEDGER.history,
	// beside the ledger. The value none turns the history off. The file needs no backup: a lost,
	// damaged or full file costs the figures, and nothing else.
	History string `toml:"history"`

	// Ledger is the file with spent nonces, events, keys and peers. Required. The disk must be
	// local. countersignd init creates the file. Danger: an older copy of the file lacks nonces,
	// and requests with these nonces can be signed again.
	Ledger string `toml:"ledger"`

	// Policy is the file with the Cedar policies for signatures: the permitted peers, keys and
	// documents. Required. An empty file denies every request. The daemon reads the file at start,
	// and for countersign admin policy reload.
	Policy string `toml:"policy"`

	// LogLevel is debug, info, warn or error. Default: info, with a line for each connection and
	// refusal.
	LogLevel string `toml:"log_level"`

	// LogFormat is auto, text, json or journal. Default: auto, which sends each line with its
	// fields to journald where stderr leads to journald, and otherwise writes text to stderr. In
	// the journal, each attribute of a line is a field: journalctl COUNTERSIGN_REQUEST=ID.
	LogFormat logline.Format `toml:"log_format"`

	// Tokens has the PKCS#11 tokens and TPMs with the keys, each as a table [tokens.NAME]. At least
	// one is required. The ledger records the name with each key, so the name must stay. A token
	// that does not answer makes its own keys unavailable, and no others. Without the listener's
	// Noise key no peer can connect: a start waits for the token.
	Tokens map[string]*Token `toml:"tokens"`

	// NoiseToken is the name of the token for the listener's Noise key. countersignd init makes the
	// key. Default: the only token besides rollback_token, or the only token.
	NoiseToken string `toml:"noise_token"`

	// LogToken is the name of the token for the audit log's key and the HTTPS keys, which
	// countersignd init makes. Default: noise_token. With another token, an HSM without X25519 has
	// the log's key and the signing keys, and a TPM has the Noise key. A key that exists stays on
	// its token.
	LogToken string `toml:"log_token"`

	// RollbackToken is the name of a token with a TPM. The ledger is bound to the TPM's monotonic
	// counter, so that the daemon detects an older copy of the ledger at start. Default: the only
	// token with a TPM. The value none turns the detection off. Danger: without a counter, no older
	// copy is detected.
	RollbackToken string `toml:"rollback_token"`

	// RollbackInterval is the time between increments of the counter, if there are admissions.
	// Default: 1h, at most 8,760 increments a year; the memory of a TPM endures at least some
	// 100,000. Danger: an older copy of the ledger can hide the admissions between the copy and the
	// next increment.
	RollbackInterval Duration `toml:"rollback_interval"`

	// RollbackAdmissions is the number of admissions for an earlier increment. Two increments are
	// at least 5 minutes apart. Default: 10000.
	RollbackAdmissions int `toml:"rollback_admissions"`

	// UnattendedStart allows the appliance to sign as soon as the daemon has started. Default:
	// true. With false, each start is locked until an operator's unlock (countersign admin unlock).
	// Then a start of the daemon alone does not make the appliance sign.
	UnattendedStart bool `toml:"unattended_start"`

	// ImportFolder is the folder with the seed files that an operator may have imported
	// (countersign admin key import). Default: the folder of this file. Files elsewhere are
	// refused, because the process that starts the key workers can't read them.
	ImportFolder string `toml:"import_folder"`

	// NoiseIdentity is the name of a signing key that authorizes the Noise key
	// (paykit-noise-key-authorization-v1). A peer that knows the signing key can find the Noise key
	// again after a rotation. Default: none.
	NoiseIdentity string `toml:"noise_identity"`

	// Webhooks has the receivers of messages about rotations and alerts, each as a table
	// [[webhooks]].
	Webhooks []Webhook `toml:"webhooks"`

	// Mail has the mail server and the recipients of alerts.
	Mail Mail `toml:"mail"`

	// Alerts has the thresholds and times of alerts. countersign admin alert list shows what fires.
	Alerts Alerts `toml:"alerts"`

	// Sinks has the receivers of the audit log's events, each as a table [[sinks]]. Events leave as
	// they happen, and no request waits for a sink. countersign admin audit sinks shows the
	// positions.
	Sinks []Sink `toml:"sinks"`

	// Traces has the collector of OpenTelemetry that gets the time of requests. Default: no traces.
	Traces Traces `toml:"traces"`

	// Journal has the journal of the key workers.
	Journal Journal `toml:"journal"`

	// Backup has the backups of all but the keys' private halves. countersign admin backup list
	// shows them.
	Backup Backup `toml:"backup"`

	// Retention has the retention times of records. A longer time in the ledger prevails, because a
	// shorter time needs approval (countersign admin retention shorten).
	Retention Retention `toml:"retention"`

	// Limits has the limits for peers and strangers.
	Limits Limits `toml:"limits"`

	// The fields below are no settings.

	path       string             // of the file
	digest     string             // SHA-256 of the file, hexadecimal
	launcher   *launcher.Launcher // starts the key workers; nil in the launcher itself
	daemonUser *account           // of user; nil without it
	keysUser   *account           // of keys_user; nil without it
	startedBy  int                // the user who has started this process
}

// Webhook is a receiver of messages about rotations and alerts. A message is a POST with a body
// signed by the audit log's key (Standard Webhooks).
type Webhook struct {
	// Name identifies the receiver in logs. Required.
	Name string `toml:"name"`
	// URL is the receiver's address: https, or http on this machine. Required. The daemon never
	// shows the URL, which may contain a secret.
	URL string `toml:"url"`
	// CAFile is a PEM file with the trusted certificate authorities. Default: those of the system.
	CAFile string `toml:"ca_file"`
	// Types are the types of messages: key.rotation, key.compromise, alert. Default: all. Danger:
	// an alert names tokens, keys and peers of the appliance, so a receiver of another party should
	// not get alerts.
	Types []string `toml:"types"`
}

// Mail is the mail server for alerts (SMTP). Without recipients, no mail is sent.
type Mail struct {
	// Server is the address, host:port, of the mail server, such as mail.example.com:587. The
	// server's certificate must be valid for the host. Required with recipients.
	Server string `toml:"server"`
	// TLS is starttls, implicit (TLS from the first byte), or none (only for a server of this
	// machine, and without a user). Default: implicit for port 465, and otherwise starttls. A
	// server without STARTTLS gets nothing.
	TLS string `toml:"tls"`
	// From is the address of the sender. Required with recipients.
	From string `toml:"from"`
	// To are the addresses of the recipients, at most 10. Each gets mails of its own. Default: no
	// mail.
	To []string `toml:"to"`
	// User is the name for a sign-in at the server (AUTH PLAIN or LOGIN). Default: no sign-in.
	User string `toml:"user"`
	// PasswordFile is the file with the user's password on one line, with mode 0600, or a
	// credential of systemd (LoadCredential). The file is read at each mail.
	PasswordFile string `toml:"password_file"`
	// CAFile is a PEM file with the trusted certificate authorities. Default: those of the system.
	CAFile string `toml:"ca_file"`
}

// Alerts has the thresholds and times of alerts. An alert fires when a number is above its
// threshold, and falls when the number has been at most half of the threshold for the time quiet.
// The numbers begin at zero with the daemon.
type Alerts struct {
	// SignatureFailuresWarning and SignatureFailuresCritical are numbers of sign requests that were
	// refused or not served within signature_failures_window. Defaults: 10, 50, 1m.
	SignatureFailuresWarning  int      `toml:"signature_failures_warning"`
	SignatureFailuresCritical int      `toml:"signature_failures_critical"`
	SignatureFailuresWindow   Duration `toml:"signature_failures_window"`
	// RateLimitsWarning and RateLimitsCritical are numbers of times that a limit was reached within
	// rate_limits_window. Defaults: 100, 500, 1m.
	RateLimitsWarning  int      `toml:"rate_limits_warning"`
	RateLimitsCritical int      `toml:"rate_limits_critical"`
	RateLimitsWindow   Duration `toml:"rate_limits_window"`
	// ReplaysWarning and ReplaysCritical are numbers of refused replays within replays_window.
	// Defaults: 1, 10, 1h.
	ReplaysWarning  int      `toml:"replays_warning"`
	ReplaysCritical int      `toml:"replays_critical"`
	ReplaysWindow   Duration `toml:"replays_window"`
	// HandshakeTimeoutsWarning and HandshakeTimeoutsCritical are percentages: of the handshakes
	// that ended within handshake_timeouts_window, those with a silent client. Fewer handshakes
	// than handshakes_least give no percentage. Defaults: 5, 20, 10m, 20.
	HandshakeTimeoutsWarning  int      `toml:"handshake_timeouts_warning"`
	HandshakeTimeoutsCritical int      `toml:"handshake_timeouts_critical"`
	HandshakeTimeoutsWindow   Duration `toml:"handshake_timeouts_window"`
	HandshakesLeast           int      `toml:"handshakes_least"`
	// DiskMiB is the free space in MiB of the ledger's disk, below which the alert disk-filling
	// fires. Default: 256. The value 0 turns the alert off. The daemon itself keeps a reserve of 8
	// MiB.
	DiskMiB int `toml:"disk_mib"`
	// After is the time for which a cause of the state lasts before its alert fires, if the cause
	// can end by itself. Default: 30s.
	After Duration `toml:"after"`
	// Quiet is the time for which the reason of an alert is gone before the alert resolves.
	// Default: 5m.
	Quiet Duration `toml:"quiet"`
	// Repeat is the time between two messages about an alert that fires and that nobody has
	// acknowledged. Default: 4h.
	Repeat Duration `toml:"repeat"`
}

// Sink is a receiver of events of the audit log. A sink has one of syslog, file and url. A sink
// that was away goes on where it stopped, also after a restart, and can get events twice: each has
// its number.
type Sink struct {
	// Name identifies the sink for operators. Required. The file of the sink's position, in the
	// folder LEDGER.sinks beside the ledger, has the name.
	Name string `toml:"name"`
	// Syslog is the address, host:port, of a syslog server with TLS (RFC 5424 over RFC 5425; the
	// usual port is 6514). The daemon authenticates the server by its certificate.
	Syslog string `toml:"syslog"`
	// File is the path of a file of JSON lines, in the form of a report (countersign admin audit
	// report). The daemon leaves 256 MiB of the file's disk free.
	File string `toml:"file"`
	// URL is the address of a webhook, as in webhooks. A message has up to 1000 events.
	URL string `toml:"url"`
	// CAFile is a PEM file with the trusted certificate authorities of a syslog or url. Default:
	// those of the system.
	CAFile string `toml:"ca_file"`
	// FileMiB is the size in MiB from which a file is renamed to FILE.NUMBER, with the number of
	// its last event. Default: 100.
	FileMiB int `toml:"file_mib"`
	// Files is the number of renamed files to keep. Default: 10.
	Files int `toml:"files"`
	// Types are the types of events to send, for example ["KeyCreated", "Locked"]. Default: all.
	Types []string `toml:"types"`
	// Except are types of events that are not sent. Types and Except exclude each other. Default:
	// none.
	Except []string `toml:"except"`
	// MaxAge is the age from which events are not sent any more, after the receiver was away. The
	// receiver is told the numbers of these events. A new sink begins with events of this age.
	// Default: 7d.
	MaxAge Duration `toml:"max_age"`
}

// Traces is a collector of OpenTelemetry (OTLP over HTTP). A trace has a span for a request and one
// for each of its stages. No request waits for a trace: what can't be sent is dropped and counted.
type Traces struct {
	// Endpoint is the address of the collector for traces, for example
	// https://collector.example:4318/v1/traces: https, or http on this machine. Default: no traces.
	// The daemon never shows the address, which may contain a secret.
	Endpoint string `toml:"endpoint"`
	// HeadersFile is a file with headers for the collector, such as Authorization: Bearer TOKEN,
	// one on each line. The file must have mode 0600, as a PIN file. The daemon reads the file for
	// each message.
	HeadersFile string `toml:"headers_file"`
	// CAFile is a PEM file with the trusted certificate authorities. Default: those of the system.
	CAFile string `toml:"ca_file"`
	// OneIn is the number of requests of which one is traced, by chance. Default: 1, each request.
	// A request whose traceparent says that the peer does not record the trace is not traced.
	OneIn int `toml:"one_in"`
	// RequestsPerSecond is the number of requests that are traced in a second. An item of a batch
	// counts as one. Default: 100. A trace has up to 8 spans, some 3 KB.
	RequestsPerSecond int `toml:"requests_per_second"`
}

// Journal is the place and the size of the journals of the key workers, one for each token: a line
// for each signature. countersign audit reconcile compares a journal with the audit log.
type Journal struct {
	// Folder is the folder of the journals. Default: LEDGER.journal, beside the ledger; required
	// with keys_user, who writes the journal. Without room in it, nothing is signed.
	Folder string `toml:"folder"`
	// FileMiB is the size in MiB from which a file is followed by another. Default: 64, some
	// 300,000 signatures.
	FileMiB int `toml:"file_mib"`
	// Files is the number of files to keep for each token. Default: 16. Danger: signatures in
	// removed files can't be compared with the audit log any more.
	Files int `toml:"files"`
}

// Retention has the retention times of records. The daemon drops older records by itself.
// countersign admin retention preview shows the next drops.
type Retention struct {
	// Epoch is the period of the audit log's epochs: month, day or hour, by the calendar in UTC.
	// Each epoch has a tree of its own and is dropped as a whole. Default: month.
	Epoch string `toml:"epoch"`
	// AuditDays is the retention time of an epoch of the audit log, from the epoch's end. Default:
	// 2557, seven years. Danger: dropped events can't be shown any more. The final checkpoint
	// stays.
	AuditDays int `toml:"audit_days"`
	// ReceiptDays is the retention time of receipts. Default: 2557, seven years.
	ReceiptDays int `toml:"receipt_days"`
	// DecisionDays is the retention time of the policy's decisions with their inputs, which include
	// amounts and parties. countersign policy explain and diff read the decisions. Default: 35.
	DecisionDays int `toml:"decision_days"`
	// Nonces is the retention time of a spent nonce, from the expiry of its document. Default: 24h.
	// No nonce is dropped before its document has expired.
	Nonces Duration `toml:"nonces"`
}

// Token is the configuration of a PKCS#11 token or a TPM.
type Token struct {
	// URI is the RFC 7512 URI of a PKCS#11 token: pkcs11:token=LABEL. The attributes serial,
	// manufacturer, model, slot-id, slot-description and slot-manufacturer tell tokens with the
	// same label apart. module-path and pin-source are supported, pin-value is refused. A token has
	// either a URI or a TPM.
	URI string `toml:"uri"`

	// TPM is the path of a TPM 2.0: /dev/tpmrm0, or a Unix socket of swtpm for tests. The TPM seals
	// Ed25519 and X25519 keys to the state of this machine. These keys are in the memory of the key
	// workers while in use. P-256 keys never leave the TPM.
	TPM string `toml:"tpm"`

	// State is the directory with the TPM's keys, encrypted by the TPM. Required with a TPM.
	// Danger: the keys are lost if either the directory or the TPM is lost.
	State string `toml:"state"`

	// StorageRoot is the handle of the TPM's storage root key, an ECC P-256 key by the TCG
	// template. countersignd init makes the key at a free handle. Default: 0x81000001. Another
	// handle is for a machine with another kind of key there, such as the RSA key of Windows.
	StorageRoot uint32 `toml:"storage_root"`

	// CounterIndex is the NV index of the TPM's monotonic counter (rollback_token). Default:
	// 0x01800c51. Each appliance on one TPM needs an index of its own.
	CounterIndex uint32 `toml:"counter_index"`

	// PCRBank is the bank of the TPM's PCRs for new keys: sha256, sha384 or sha512. Default:
	// sha256.
	PCRBank string `toml:"pcr_bank"`

	// ZeroPCRs are those of PCRs that may be without a measurement (all bits are alike). Default:
	// none, and a key is not sealed to such a register. Danger: on a machine that measures nothing,
	// the keys can be used after a boot of any system.
	ZeroPCRs []uint `toml:"zero_pcrs"`

	// PCRs are the registers of the TPM's bank that a new key is sealed to, with their values at
	// that time. Default: [7], the Secure Boot state. Danger: more registers lock the
	// keys after more kinds of updates. Without a register, the keys can be used after a boot of
	// any system on this machine.
	PCRs []uint `toml:"pcrs"`

	// PolicyKey is the file with the public key (ECDSA on P-256, PEM) of the approver of this
	// machine's states. New keys are then sealed to approved states in place of the present state.
	// An approval is a file NAME.approval.json in State, made by countersignd approve-state.
	// Danger: the holder of the private key can have the keys unsealed in any state.
	PolicyKey string `toml:"policy_key"`

	// IdleLock is the time without a use after which a TPM's key is sealed again. Default: 0, the
	// key stays unsealed until the daemon stops.
	IdleLock Duration `toml:"idle_lock"`

	// Module is the path of the PKCS#11 module, unless the URI has module-path. Danger: the module
	// is code of its vendor, has the PIN, and runs in a confined process.
	Module string `toml:"module"`

	// Parameters is a text for the module, in the field pReserved of CK_C_INITIALIZE_ARGS: for NSS
	// configdir='sql:/var/lib/countersign/nss' and more, for a YubiHSM connector=URL. Default:
	// none. The text is no place for a secret.
	Parameters string `toml:"parameters"`

	// PINFile is the file with the user's PIN on one line, unless the URI has pin-source. The file
	// must have mode 0600, or an ACL for the user of the key workers alone, as a credential of
	// systemd (LoadCredential) has: such a file has the path $CREDENTIALS_DIRECTORY/NAME. A refused
	// PIN is not tried again until an operator's retry (countersign admin token retry). With a TPM
	// the field is optional: new keys then need the PIN, and the TPM counts wrong PINs.
	PINFile string `toml:"pin_file"`

	// Environment has variables for the key workers, which load the module. Many modules are
	// configured by variables, such as SOFTHSM2_CONF. Default: no variables. Paths must be
	// absolute.
	Environment map[string]string `toml:"environment"`

	// Files are files and folders that the module reads and writes, beside what each key worker may
	// read: the system's programs and libraries, the module's folder, the PIN file, the files and
	// folders that environment names, and the folder of SoftHSM's tokens. Default: none. Danger:
	// the module can change all of it. A folder with the ledger or another token's PIN does not
	// belong here.
	Files []string `toml:"files"`

	// Network has the addresses, host:port, of a network HSM. Default: none, and the module has no
	// network. Danger: the module can connect to the port of any host. With an older kernel the
	// module can also connect to any Unix socket, and send by UDP: see countersignd check.
	Network []string `toml:"network"`

	// Workers is the number of key workers: processes that use the token. Default: 2, where the
	// second is a hot standby. Danger: with 1, requests fail during the replacement of a worker
	// that hung or crashed.
	Workers int `toml:"workers"`

	// Spread distributes calls over all workers. Default: true. With false, one worker serves and
	// the others stand by: for a module that works well with one process at a time only.
	Spread bool `toml:"spread"`

	// Sessions is the number of concurrent operations of one worker in the token. Default: 4. For a
	// software token 1 is best, because concurrent sessions in one process block each other. A
	// network HSM may need many more. The limit of the token itself, shared by the workers,
	// prevails.
	Sessions int `toml:"sessions"`

	// Deadline is the timeout for one use of a key by the device. Default: 5s. A worker is killed
	// and replaced after the timeout, and another worker gets the call. Generating, importing and
	// listing keys, and the start of a worker, have four times the timeout.
	Deadline Duration `toml:"deadline"`

	// MemoryMiB is the memory of a key worker in MiB after which the worker is renewed, without the
	// loss of a call. Default: 256. A new worker needs some 10 MiB. Modules leak: SoftHSM 2.6.1
	// loses 64 bytes a signature, and 312 bytes a handshake's exchange.
	MemoryMiB int `toml:"memory_mib"`

	// Quirks replaces the known quirks of the token: see Quirks in package hsm. Default: the
	// quirks printed by countersignd check.
	Quirks hsm.Quirks `toml:"quirks"`

	// The fields below are no settings.

	journal journal.Config // without the token's name

	memo  string // path of the file that remembers a refused PIN, beside the ledger
	retry bool   // an operator has the PIN tried again: countersignd check --retry-pin
}

// Limits has the limits for peers and strangers. No value means "unlimited".
type Limits struct {
	// Connections is the number of open connections, handshakes included. Further connections are
	// closed at once. Default: 1024.
	Connections int `toml:"connections"`
	// Strangers is the number of open connections of strangers: no message has been decrypted yet,
	// and no peer has had a session from the address within a day. Default: half of connections.
	Strangers int `toml:"strangers"`
	// ConnectionsPerSource is the number of open connections of one address. An IPv6 /64 is one
	// address. Default: 256.
	ConnectionsPerSource int `toml:"connections_per_source"`
	// ConnectionsPerPeer is the number of open connections of one peer. Default: 128.
	ConnectionsPerPeer int `toml:"connections_per_peer"`
	// HandshakesPerSource and Handshakes are the numbers of handshakes, of one address and of all,
	// that are under way or have failed within a minute. A handshake with a decrypted first message
	// does not count any more. Defaults: 5, 100. A quarter of Handshakes is reserved for addresses
	// of peers with a session within a day.
	HandshakesPerSource int `toml:"handshakes_per_source"`
	Handshakes          int `toml:"handshakes"`
	// Sources is the number of remembered addresses, some 150 bytes each. Default: 100000.
	Sources int `toml:"sources"`
	// InFlight is the number of requests of one connection being served. Further requests wait
	// unread. Default: 64.
	InFlight int `toml:"in_flight"`
	// Requests is the number of requests of all peers being served. An item of a batch counts as
	// one. Further requests are refused (busy), except one of a peer without requests under way.
	// Default: 1024.
	Requests int `toml:"requests"`
	// RequestsPerPeer is the number of requests of one peer being served. Default: 256.
	RequestsPerPeer int `toml:"requests_per_peer"`
	// RequestsPerSecond is the number of requests of one peer in a second. Further requests are
	// refused (rate_limited), up to as many again. Beyond that, messages wait unread. Default:
	// 10000.
	RequestsPerSecond int `toml:"requests_per_second"`
	// BytesPerSecond is the number of bytes of one peer's messages in a second. Further messages
	// wait unread. A batch of 100 items has up to 65,519 bytes. Default: 8000000.
	BytesPerSecond int `toml:"bytes_per_second"`
	// RefusalsPerMinute is the number of refusals of one peer with an event each in a minute.
	// Further refusals are counted in one event a minute. Default: 600.
	RefusalsPerMinute int `toml:"refusals_per_minute"`
	// BytesPerDay is the number of bytes that served requests of one peer make the ledger keep in a
	// day. Further requests of this peer are refused (busy) until some bytes are refilled, evenly
	// over a day. Default: 10737418240 (10 GiB), some 4 million payments: docs/OPERATIONS.md has a
	// table. Danger: the ledger grows by so much a day, for each peer that uses it up.
	BytesPerDay int `toml:"bytes_per_day"`
	// RefusalBytesPerDay is the same for the records of refusals of one peer. Further refusals have
	// the same answers, and are counted in one event a minute. Default: 16777216 (16 MiB).
	RefusalBytesPerDay int `toml:"refusal_bytes_per_day"`
	// BatchItems is the number of items of a batch. Default: 100, whose answers fit into a message.
	BatchItems int `toml:"batch_items"`
	// HandshakeTimeout is the timeout for the handshake, and again for the first request. Until the
	// first request is decrypted, the client has not proven to be the peer. Default: 10s.
	HandshakeTimeout Duration `toml:"handshake_timeout"`
	// ReadTimeout is the timeout for a request, from the first byte to the last. Default: 30s.
	ReadTimeout Duration `toml:"read_timeout"`
	// IdleTimeout is the time without a request after which a connection is closed. Default: 5m.
	IdleTimeout Duration `toml:"idle_timeout"`
	// WriteTimeout is the timeout for one answer. A peer that does not read is disconnected.
	// Default: 10s.
	WriteTimeout Duration `toml:"write_timeout"`
	// RequestTimeout is the timeout for one request, the device's time included. The answer is then
	// "unavailable". The outcome of an admission has the same time again to reach the disk.
	// Default: 15s. The value must be more than twice each token's deadline, so that a second
	// worker can do the call of a worker that hung.
	RequestTimeout Duration `toml:"request_timeout"`
	// ClockSkew is the largest distance of a document's timestamp in the future. Default: 30s.
	ClockSkew Duration `toml:"clock_skew"`
	// MaxLifetime is the longest lifetime of a document, expires_at - timestamp. Default: 168h, 7
	// days, as Paykit's signers use. Danger: the ledger keeps a nonce until its document has
	// expired, so a longer lifetime makes a larger ledger.
	MaxLifetime Duration `toml:"max_lifetime"`
	// Nonces is the number of live nonces, at least 3. Further requests are refused (busy).
	// Default: 20000000. A nonce takes some 40 bytes of the daemon's memory.
	Nonces int `toml:"nonces"`
	// NoncesPerPeer is the number of live nonces of one peer for its signatures, and again for its
	// verifications. Further requests of this peer are refused (busy), and of no other peer.
	// Default: a quarter of nonces.
	NoncesPerPeer *int `toml:"nonces_per_peer"`
	// NoncesVerify is the number of live nonces of all peers for verifications. The other nonces
	// are left for signatures, whatever is verified. Default: half of nonces.
	NoncesVerify *int `toml:"nonces_verify"`
	// NoncesOwn is the number of nonces that are reserved for the appliance's own signatures, such
	// as the steps of rotations: each takes a nonce for a day. Default: a hundredth of nonces.
	NoncesOwn *int `toml:"nonces_own"`
	// ClockTolerance is the largest lag of the system's clock behind the ledger's time. With a
	// larger lag, the ledger admits nothing. Default: 2m.
	ClockTolerance Duration `toml:"clock_tolerance"`
}

// Duration is a time.Duration with the text form "10s" or "30d".
type Duration time.Duration

// std returns the time.Duration.
func (d Duration) std() time.Duration { return time.Duration(d) }

func (d Duration) String() string { return cli.FormatDuration(d.std()) }

func (d *Duration) UnmarshalText(text []byte) error {
	v, err := cli.ParseDuration(string(text))
	*d = Duration(v)
	return err
}

// defaultToken returns the configuration of an empty table [tokens.NAME].
func defaultToken() *Token {
	return &Token{
		PCRs: []uint{7}, Workers: 2, Spread: true, Sessions: 4, MemoryMiB: 256, Deadline: Duration(5 * time.Second),
	}
}

// defaults returns the configuration of an empty file.
func defaults() Config {
	l := appliance.DefaultLimits()
	return Config{
		Mail: Mail{To: []string{}}, Alerts: defaultAlerts(),
		LogLevel: "info", LogFormat: logline.Auto, AdminName: "localhost", UnattendedStart: true,
		AdminHTTPSFrom:   []string{},
		RollbackInterval: Duration(time.Hour), RollbackAdmissions: 10_000,
		Tokens: map[string]*Token{}, Traces: Traces{OneIn: 1, RequestsPerSecond: 100},
		Journal: Journal{FileMiB: 64, Files: 16}, Backup: defaultBackup(),
		Retention: Retention{
			Epoch: string(appliance.Month), AuditDays: 2557, ReceiptDays: 2557, DecisionDays: 35,
			Nonces: Duration(24 * time.Hour),
		},
		Limits: Limits{
			Connections: l.Connections, ConnectionsPerSource: l.ConnectionsPerSource,
			ConnectionsPerPeer:  l.ConnectionsPerPeer,
			HandshakesPerSource: l.Handshakes.PerSource, Handshakes: l.Handshakes.Global, Sources: l.Handshakes.Sources,
			InFlight: l.InFlight, Requests: l.Requests, RequestsPerPeer: l.RequestsPerPeer,
			RequestsPerSecond: l.RequestsPerSecond, BytesPerSecond: l.BytesPerSecond,
			RefusalsPerMinute: l.RefusalsPerMinute, BatchItems: l.BatchItems,
			BytesPerDay: int(l.BytesPerDay), RefusalBytesPerDay: int(l.RefusalBytesPerDay),
			HandshakeTimeout: Duration(l.HandshakeTimeout), ReadTimeout: Duration(l.ReadTimeout),
			IdleTimeout: Duration(l.IdleTimeout), WriteTimeout: Duration(l.WriteTimeout),
			RequestTimeout: Duration(l.RequestTimeout), ClockSkew: Duration(l.ClockSkew),
			MaxLifetime: Duration(l.MaxLifetime),
			Nonces:      20_000_000, ClockTolerance: Duration(2 * time.Minute),
		},
	}
}

// loadConfig reads and checks a configuration file. An error is one line. An error of the TOML
// names the line of the file.
func loadConfig(path string) (Config, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("config: %w", err)
	}
	c, err := parseConfig(path, b)
	if err != nil {
		return Config{}, err
	}
	if _, err := c.adminGroup(); err != nil {
		return Config{}, fmt.Errorf("config: %s: %w", path, err)
	}
	if err := c.lookUpUsers(); err != nil {
		return Config{}, fmt.Errorf("config: %s: %w", path, err)
	}
	c.startedBy = os.Getuid()
	return c, nil
}

// parseConfig parses and checks the bytes of the file path.
func parseConfig(path string, b []byte) (Config, error) {
	c := defaults()
	if err := decodeTOML(path, b, &c); err != nil {
		return Config{}, err
	}
	c.resolve(filepath.Dir(path))
	c.path, c.digest = path, fmt.Sprintf("%x", sha256.Sum256(b))
	if c.Limits.Strangers == 0 {
		c.Limits.Strangers = (c.Limits.Connections + 1) / 2
	}
	bounds := ledger.DefaultBounds(c.Limits.Nonces)
	c.Limits.NoncesPerPeer = cmp.Or(c.Limits.NoncesPerPeer, &bounds.Peer)
	c.Limits.NoncesVerify = cmp.Or(c.Limits.NoncesVerify, &bounds.Verifying)
	c.Limits.NoncesOwn = cmp.Or(c.Limits.NoncesOwn, &bounds.Own)
	if err := c.check(); err != nil {
		return Config{}, fmt.Errorf("config: %s: %w", path, err)
	}
	return c, nil
}

// resolve makes the paths of all fields relative to the directory of the file.
func (c *Config) resolve(dir string) {
	c.ImportFolder = cmp.Or(c.ImportFolder, ".")
	if c.KeysUser == "" {
		c.Journal.Folder = cmp.Or(c.Journal.Folder, c.Ledger+".journal")
	}
	paths := []*string{
		&c.AdminSocket, &c.KeysSocket, &c.MachineSocket, &c.Ledger, &c.Policy, &c.ImportFolder, &c.Journal.Folder,
		&c.Traces.HeadersFile,
		&c.Traces.CAFile, &c.Backup.Folder, &c.Backup.SFTPKeyFile,
	}
	switch {
	case c.History == "none":
		c.History = ""
	case c.History == "" && c.Ledger != "":
		c.History = c.Ledger + ".history"
	}
	paths = append(paths, &c.History)
	for name, t := range c.Tokens {
		t.memo = c.Ledger + "." + name + ".refused-pin"
		paths = append(paths, &t.memo, &t.Module, &t.PINFile, &t.TPM, &t.State, &t.PolicyKey)
		for i := range t.Files {
			paths = append(paths, &t.Files[i])
		}
	}
	for i := range c.Webhooks {
		paths = append(paths, &c.Webhooks[i].CAFile)
	}
	paths = append(paths, &c.Mail.PasswordFile, &c.Mail.CAFile)
	for i := range c.Sinks {
		paths = append(paths, &c.Sinks[i].CAFile, &c.Sinks[i].File)
	}
	for _, p := range paths {
		if *p != "" && !filepath.IsAbs(*p) && !strings.HasPrefix(*p, credentials) {
			*p = filepath.Join(dir, *p)
		}
	}
	c.Backup.SFTPKeyFile = credential(c.Backup.SFTPKeyFile)
	for _, t := range c.Tokens {
		t.PINFile = credential(t.PINFile)
		t.journal = journal.Config{
			Folder: c.Journal.Folder, Size: int64(c.Journal.FileMiB) << 20, Files: c.Journal.Files,
		}
	}
}

// credentials is the beginning of the path of a credential of systemd, in the configuration.
const credentials = "$CREDENTIALS_DIRECTORY/"

// credential returns a path with the folder of the credentials that this process has. The process
// of another unit, which has none, can't have the file.
func credential(path string) string {
	if name, is := strings.CutPrefix(path, credentials); is && os.Getenv("CREDENTIALS_DIRECTORY") != "" {
		return filepath.Join(os.Getenv("CREDENTIALS_DIRECTORY"), name)
	}
	return path
}

// check checks the fields, and sets the names of default tokens.
func (c *Config) check() error {
	for _, required := range []struct{ field, value string }{
		{"listen", c.Listen + c.ListenPubky}, {"admin_socket", c.AdminSocket},
		{"ledger", c.Ledger}, {"policy", c.Policy},
	} {
		if required.value == "" {
			return fmt.Errorf("%s is missing", required.field)
		}
	}
	if err := c.checkAddresses(); err != nil {
		return err
	}
	if err := c.checkUsers(); err != nil {
		return err
	}
	if err := c.Backup.check(); err != nil {
		return fmt.Errorf("backup.%w", err)
	}
	if _, err := c.logLevel(); err != nil {
		return fmt.Errorf("log_level: %q is none of debug, info, warn, error", c.LogLevel)
	}
	if err := c.LogFormat.Check(); err != nil {
		return fmt.Errorf("log_format: %w", err)
	}
	if c.Limits.Nonces < 3 { // one each for signing, verification, and the appliance
		return fmt.Errorf("limits.nonces must be at least 3, and is %d", c.Limits.Nonces)
	}
	for _, n := range []struct {
		field       string
		value, most int
	}{
		{"journal.file_mib", c.Journal.FileMiB, 65536}, {"journal.files", c.Journal.Files, 1_000_000},
		{"limits.connections", c.Limits.Connections, 100_000},
		{"limits.strangers", c.Limits.Strangers, c.Limits.Connections},
		{"limits.connections_per_source", c.Limits.ConnectionsPerSource, 100_000},
		{"limits.connections_per_peer", c.Limits.ConnectionsPerPeer, 100_000},
		{"limits.handshakes_per_source", c.Limits.HandshakesPerSource, 1_000_000},
		{"limits.handshakes", c.Limits.Handshakes, 1_000_000},
		{"limits.sources", c.Limits.Sources, 10_000_000},
		{"limits.in_flight", c.Limits.InFlight, 10_000},
		{"limits.requests", c.Limits.Requests, 100_000},
		{"limits.requests_per_peer", c.Limits.RequestsPerPeer, 100_000},
		{"limits.requests_per_second", c.Limits.RequestsPerSecond, 10_000_000},
		{"limits.bytes_per_second", c.Limits.BytesPerSecond, 1_000_000_000},
		{"limits.refusals_per_minute", c.Limits.RefusalsPerMinute, 10_000_000},
		{"limits.batch_items", c.Limits.BatchItems, 100},
		{"limits.bytes_per_day", c.Limits.BytesPerDay, 1 << 50},
		{"limits.refusal_bytes_per_day", c.Limits.RefusalBytesPerDay, 1 << 50},
		{"rollback_admissions", c.RollbackAdmissions, 1_000_000_000},
		{"limits.nonces", c.Limits.Nonces, 1_000_000_000},
		{"limits.nonces_own", *c.Limits.NoncesOwn, c.Limits.Nonces - 2},
		{"limits.nonces_per_peer", *c.Limits.NoncesPerPeer, c.Limits.Nonces - *c.Limits.NoncesOwn},
		{"limits.nonces_verify", *c.Limits.NoncesVerify, c.Limits.Nonces - *c.Limits.NoncesOwn - 1},
		{"retention.audit_days", c.Retention.AuditDays, 36_525},
		{"retention.receipt_days", c.Retention.ReceiptDays, 36_525},
		{"retention.decision_days", c.Retention.DecisionDays, 36_525},
	} {
		if n.value < 1 || n.value > n.most {
			return fmt.Errorf("%s must be 1 to %d, and is %d", n.field, n.most, n.value)
		}
	}
	if least := 1 << 20; c.Limits.BytesPerDay < least || c.Limits.RefusalBytesPerDay < least {
		return fmt.Errorf("limits.bytes_per_day and limits.refusal_bytes_per_day must be at least %d: "+
			"a request reserves up to 9216 bytes until it has ended", least)
	}
	if most := min(c.Limits.Requests, c.Limits.RequestsPerPeer); c.Limits.BatchItems > most {
		return fmt.Errorf("limits.batch_items must be at most limits.requests and limits.requests_per_peer, %d: "+
			"a larger batch would always be busy", most)
	}
	for _, d := range []struct {
		field       string
		value       Duration
		least, most time.Duration
	}{
		{"rollback_interval", c.RollbackInterval, time.Second, 31 * 24 * time.Hour},
		{"limits.handshake_timeout", c.Limits.HandshakeTimeout, 100 * time.Millisecond, 5 * time.Minute},
		{"limits.read_timeout", c.Limits.ReadTimeout, 100 * time.Millisecond, 5 * time.Minute},
		{"limits.idle_timeout", c.Limits.IdleTimeout, time.Second, 24 * time.Hour},
		{"limits.write_timeout", c.Limits.WriteTimeout, 100 * time.Millisecond, 5 * time.Minute},
		{"limits.request_timeout", c.Limits.RequestTimeout, 100 * time.Millisecond, 5 * time.Minute},
		{"limits.clock_skew", c.Limits.ClockSkew, 0, time.Hour},
		{"limits.max_lifetime", c.Limits.MaxLifetime, time.Second, 366 * 24 * time.Hour},
		{"limits.clock_tolerance", c.Limits.ClockTolerance, time.Second, 30 * time.Minute},
		{"retention.nonces", c.Retention.Nonces, time.Hour, 366 * 24 * time.Hour},
	} {
		if v := time.Duration(d.value); v < d.least || v > d.most {
			return fmt.Errorf("%s must be %v to %v, and is %v", d.field, Duration(d.least), Duration(d.most), d.value)
		}
	}
	if p := appliance.Period(c.Retention.Epoch); p != appliance.Month && p != appliance.Day && p != appliance.Hour {
		return fmt.Errorf("retention.epoch: %q is none of month, day, hour", c.Retention.Epoch)
	}
	if c.NoiseIdentity != "" {
		if err := keystore.CheckName(c.NoiseIdentity); err != nil {
			return fmt.Errorf("noise_identity: %w", err)
		}
	}
	if _, err := webhook.New(webhook.Config{Targets: c.webhooks()}); err != nil {
		return err
	}
	if err := c.checkAlerts(); err != nil {
		return err
	}
	if err := c.checkSinks(); err != nil {
		return err
	}
	if err := c.Traces.check(); err != nil {
		return fmt.Errorf("traces.%w", err)
	}
	return c.checkTokens()
}

// checkAddresses is the part of check for the listeners.
func (c *Config) checkAddresses() error {
	fields := map[string]string{} // by address
	for _, l := range []struct{ field, address string }{
		{"listen", c.Listen}, {"listen_pubky", c.ListenPubky}, {"admin_https", c.AdminHTTPS},
		{"metrics_listen", c.MetricsListen},
	} {
		if l.address == "" {
			continue
		}
		host, port, err := net.SplitHostPort(l.address)
		if err != nil {
			return fmt.Errorf("%s: %q is not host:port", l.field, l.address)
		}
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return fmt.Errorf("%s: %q has the port %q; a port is a number from 1 to 65535", l.field, l.address, port)
		}
		loopback := l.field == "admin_https" && len(c.AdminHTTPSFrom) == 0 || l.field == "metrics_listen"
		if ip, err := netip.ParseAddr(host); loopback && (err != nil || !ip.IsLoopback()) {
			hint := ""
			if l.field == "admin_https" {
				hint = "; for others, name their networks in admin_https_from"
			}
			return fmt.Errorf("%s: %q is not a loopback address with a port, such as 127.0.0.1:7780%s",
				l.field, l.address, hint)
		}
		if other := fields[l.address]; other != "" {
			return fmt.Errorf("%s and %s are both %q: each needs an address of its own", other, l.field, l.address)
		}
		fields[l.address] = l.field
	}
	for _, network := range c.AdminHTTPSFrom {
		if p, err := netip.ParsePrefix(network); err != nil || p != p.Masked() {
			return fmt.Errorf("admin_https_from: %q is no network, such as 10.1.9.0/24", network)
		}
	}
	if len(c.AdminHTTPSFrom) > 0 && c.AdminHTTPS == "" {
		return errors.New("admin_https_from: there is no admin_https that the networks could reach")
	}
	if n := len(c.AdminSocket); n > maxSocketPath {
		return fmt.Errorf("admin_socket: the path %s has %d bytes; at most %d are possible",
			c.AdminSocket, n, maxSocketPath)
	}
	return nil
}

// maxSocketPath is the longest path of a Unix socket in bytes (unix(7): sun_path has 108 bytes,
// with the terminating zero).
const maxSocketPath = 107

// checkTokens is the part of check for tokens.
func (c *Config) checkTokens() error {
	if len(c.Tokens) == 0 {
		return errors.New("there is no token: write a table [tokens.NAME]")
	}
	var tpms []string
	for name, t := range c.Tokens {
		if t.TPM != "" {
			tpms = append(tpms, name)
		}
	}
	switch {
	case c.RollbackToken == "none":
		c.RollbackToken = ""
	case c.RollbackToken == "" && len(tpms) == 1:
		c.RollbackToken = tpms[0]
	case c.RollbackToken != "" && !slices.Contains(tpms, c.RollbackToken):
		return fmt.Errorf("rollback_token: %q is none of the tokens with a TPM", c.RollbackToken)
	}
	names := strings.Join(slices.Sorted(maps.Keys(c.Tokens)), ", ")
	if c.NoiseToken == "" {
		if c.NoiseToken = c.onlyKeyToken(); c.NoiseToken == "" {
			return fmt.Errorf("noise_token is missing: write the token of the listener's Noise key, one of %s", names)
		}
	} else if c.Tokens[c.NoiseToken] == nil {
		return fmt.Errorf("noise_token: %q is none of the tokens: write one of %s", c.NoiseToken, names)
	}
	if c.LogToken == "" {
		c.LogToken = c.NoiseToken
	} else if c.Tokens[c.LogToken] == nil {
		return fmt.Errorf("log_token: %q is none of the tokens: write one of %s", c.LogToken, names)
	}
	for name, t := range c.Tokens {
		in := "tokens." + name + "."
		if err := keystore.CheckName(name); err != nil {
			return fmt.Errorf("tokens.%q: %w", name, err)
		}
		for _, n := range []struct {
			field       string
			value       int
			least, most int
		}{{"workers", t.Workers, 1, 16}, {"sessions", t.Sessions, 1, 1024}, {"memory_mib", t.MemoryMiB, 32, 65536}} {
			if n.value < n.least || n.value > n.most {
				return fmt.Errorf("%s%s must be %d to %d, and is %d", in, n.field, n.least, n.most, n.value)
			}
		}
		if d := time.Duration(t.Deadline); d < 10*time.Millisecond || d > time.Minute {
			return fmt.Errorf("%sdeadline must be 10ms to 1m, and is %v", in, t.Deadline)
		} else if time.Duration(c.Limits.RequestTimeout) <= 2*d {
			return fmt.Errorf("limits.request_timeout must be more than twice %sdeadline, more than %v",
				in, 2*t.Deadline)
		}
		if err := t.checkBackend(); err != nil {
			return fmt.Errorf("%s%w", in, err)
		}
		if err := t.Quirks.Check(); err != nil {
			return fmt.Errorf("%s%w", in, err)
		}
	}
	return nil
}

// onlyKeyToken returns the token for keys whose token is not named: the only token, or the only one
// besides the token of the counter. So a counter that is added changes nothing for the keys. With
// more tokens the result is "".
func (c *Config) onlyKeyToken() string {
	names := slices.Sorted(maps.Keys(c.Tokens))
	if len(names) > 1 {
		names = slices.DeleteFunc(names, func(name string) bool { return name == c.RollbackToken })
	}
	if len(names) != 1 {
		return ""
	}
	return names[0]
}

// checkBackend checks that a token has the fields of one kind of device only.
func (t *Token) checkBackend() error {
	switch {
	case t.URI == "" && t.TPM == "":
		return errors.New("uri is missing, or tpm")
	case t.URI != "" && t.TPM != "":
		return errors.New("uri and tpm exclude each other: a token is in one device")
	case t.URI != "" && (t.State != "" || t.IdleLock != 0 || t.PolicyKey != "" || t.StorageRoot != 0 ||
		t.CounterIndex != 0 || t.PCRBank != "" || t.ZeroPCRs != nil):
		return errors.New("state, storage_root, counter_index, pcr_bank, zero_pcrs, policy_key and idle_lock " +
			"are for a TPM")
	case t.TPM != "" && t.State == "":
		return errors.New("state is missing: the folder for the TPM's keys")
	case t.TPM != "" && (t.Files != nil || t.Network != nil):
		return errors.New("files and network are for a PKCS#11 token")
	case t.TPM != "" && (t.Module != "" || t.Parameters != "" || t.Quirks != hsm.Quirks{}):
		return errors.New("module and quirks are for a PKCS#11 token")
	case t.IdleLock != 0 && (t.IdleLock.std() < time.Second || t.IdleLock.std() > 31*24*time.Hour):
		return fmt.Errorf("idle_lock must be 0s (never), or 1s to 31d, and is %v", t.IdleLock)
	}
	for _, path := range t.Files {
		if path == "" || filepath.Clean(path) == "/" {
			return fmt.Errorf("files: %q is no file or folder below /", path)
		}
	}
	if _, err := ports(t.Network); err != nil {
		return err
	}
	for _, c := range []struct {
		field string
		err   error
	}{
		{"pcrs", tpm.CheckPCRs(t.PCRs)}, {"zero_pcrs", tpm.CheckPCRs(t.ZeroPCRs)},
		{"pcr_bank", tpm.Bank(t.PCRBank).Check()}, {"storage_root", tpm.CheckStorageRoot(t.StorageRoot)},
		{"counter_index", tpm.CheckCounterIndex(t.CounterIndex)},
	} {
		if c.err != nil {
			return fmt.Errorf("%s: %w", c.field, c.err)
		}
	}
	return nil
}

func (c *Config) logLevel() (level slog.Level, err error) {
	return level, level.UnmarshalText([]byte(c.LogLevel))
}

func (t *Token) hsm() hsm.Config {
	return hsm.Config{
		URI: t.URI, Module: t.Module, PINFile: t.PINFile, Sessions: t.Sessions, Share: t.Workers, Quirks: t.Quirks,
		Parameters: t.Parameters,
	}
}

// device names the token's device: a URI, or the path of a TPM.
func (t *Token) device() string { return t.URI + t.TPM }

// pinPath is the path of the PIN file, or "".
func (t *Token) pinPath() string {
	if t.TPM != "" {
		return t.PINFile
	}
	return t.hsm().PINPath()
}

func (t *Token) tpm() tpm.Config {
	return tpm.Config{
		Device: t.TPM, State: t.State, StorageRoot: t.StorageRoot, CounterIndex: t.CounterIndex,
		PCRBank: tpm.Bank(t.PCRBank), PCRs: t.PCRs, ZeroPCRs: t.ZeroPCRs, PolicyKey: t.PolicyKey, PINFile: t.PINFile,
		Deadline: t.Deadline.std(), IdleLock: t.IdleLock.std(),
	}
}

func (c *Config) webhooks() (targets []webhook.Target) {
	for _, w := range c.Webhooks {
		targets = append(targets, webhook.Target{Name: w.Name, URL: secret.Of(w.URL), CAFile: w.CAFile, Types: w.Types})
	}
	return targets
}

func (c *Config) appliance() appliance.Config {
	return appliance.Config{
		Limits: c.limits(), Anchor: c.anchor(), Retention: c.retention(), Attended: !c.UnattendedStart,
		SigningToken: c.onlyKeyToken(), Identity: c.NoiseIdentity, Webhooks: c.webhooks(),
		Backup: c.backup(), Sinks: c.sinks(), SinkState: c.Ledger + ".sinks",
		Alerts: c.alerts(), Mail: c.mail(), DiskLeast: uint64(c.Alerts.DiskMiB) << 20,
	}
}

func (c *Config) anchor() anchor.Config {
	return anchor.Config{
		Token: c.RollbackToken, Interval: c.RollbackInterval.std(), Admissions: uint64(c.RollbackAdmissions),
	}
}

func (c *Config) retention() appliance.Retention {
	r := c.Retention
	days := func(n int) time.Duration { return time.Duration(n) * 24 * time.Hour }
	return appliance.Retention{
		Epoch: appliance.Period(r.Epoch), Audit: days(r.AuditDays), Receipts: days(r.ReceiptDays),
		Decisions: days(r.DecisionDays), Nonces: r.Nonces.std(),
	}
}

func (c *Config) ledger() ledger.Options {
	return ledger.Options{
		Margin: c.Retention.Nonces.std(), MaxLifetime: c.Limits.MaxLifetime.std(), MaxNonces: c.Limits.Nonces,
		ClockTolerance: c.Limits.ClockTolerance.std(),
		Bounds: ledger.Bounds{
			Peer: *c.Limits.NoncesPerPeer, Verifying: *c.Limits.NoncesVerify, Own: *c.Limits.NoncesOwn,
		},
	}
}

func (c *Config) limits() appliance.Limits {
	l := c.Limits
	limits := appliance.DefaultLimits()
	limits.Connections, limits.Strangers = l.Connections, l.Strangers
	limits.ConnectionsPerSource, limits.ConnectionsPerPeer = l.ConnectionsPerSource, l.ConnectionsPerPeer
	limits.Handshakes.PerSource, limits.Handshakes.Global = l.HandshakesPerSource, l.Handshakes
	limits.Handshakes.Kept = l.Handshakes / 4
	limits.Handshakes.Sources, limits.Handshakes.Waiting = max(l.Sources, l.Handshakes+1), l.ConnectionsPerSource
	limits.InFlight, limits.Requests = l.InFlight, l.Requests
	limits.RequestsPerPeer, limits.BatchItems = l.RequestsPerPeer, l.BatchItems
	limits.RequestsPerSecond, limits.BytesPerSecond = l.RequestsPerSecond, l.BytesPerSecond
	limits.RefusalsPerMinute = l.RefusalsPerMinute
	limits.BytesPerDay, limits.RefusalBytesPerDay = int64(l.BytesPerDay), int64(l.RefusalBytesPerDay)
	limits.HandshakeTimeout, limits.ReadTimeout = l.HandshakeTimeout.std(), l.ReadTimeout.std()
	limits.IdleTimeout, limits.WriteTimeout = l.IdleTimeout.std(), l.WriteTimeout.std()
	limits.RequestTimeout = l.RequestTimeout.std()
	limits.ClockSkew, limits.MaxLifetime = l.ClockSkew.std(), l.MaxLifetime.std()
	limits.Calls = map[string]int{}
	for name, t := range c.Tokens {
		limits.Calls[name] = callsAhead * t.Workers * t.Sessions
	}
	return limits
}

// callsAhead is the number of calls in flight for each session of a token: one in the device, and
// one on its way, so that the device is never idle.
const callsAhead = 2
