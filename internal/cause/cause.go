// Package cause has the reasons why an operator should look at the appliance. Each kind of cause
// has a stable code. A component reports its causes from its present state, on each request: a
// cause therefore ends by itself when its reason is over. Begin reading at Kinds.
package cause

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"unicode"
)

// Kind is a kind of cause. The kinds of this file are the only ones.
type Kind struct {
	Code  string // stable; docs/SPEC.md lists all codes
	Means string // the meaning, one clause without a full stop
	Do    string // the operator's next step
	Stops bool   // nothing is admitted, so the appliance is not ready
}

// Cause is one reason at one moment.
type Cause struct {
	*Kind
	Subject string // the token, key, webhook or file concerned; "" for the appliance as a whole
	Text    string // the details at this moment on one line, without a secret
}

// Of returns a cause of the kind with its details. Details can have text of strangers, such as the
// names in a certificate, which must not look like a second cause.
func (k *Kind) Of(subject, format string, args ...any) Cause {
	return Cause{Kind: k, Subject: subject, Text: Line(fmt.Sprintf(format, args...))}
}

// Line returns a text as one line: white space becomes a blank, and other control and format
// characters become U+FFFD.
func Line(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.In(r, unicode.Cc, unicode.Cf) {
			return unicode.ReplacementChar
		}
		return r
	}, strings.Join(strings.Fields(text), " "))
}

// Err returns a cause of the kind with an error as its details, or nothing for a nil error.
func (k *Kind) Err(subject string, err error) []Cause {
	if err == nil {
		return nil
	}
	return []Cause{k.Of(subject, "%v", err)}
}

// String returns the cause as one line, with the operator's next step.
func (c Cause) String() string {
	subject := ""
	if c.Subject != "" {
		subject = " (" + c.Subject + ")"
	}
	return fmt.Sprintf("%s%s: %s; %s", c.Code, subject, c.Text, c.Do)
}

// Sort orders causes by the order of Kinds, and then by subject and text.
func Sort(all []Cause) {
	slices.SortFunc(all, func(x, y Cause) int {
		return cmp.Or(cmp.Compare(slices.Index(Kinds, x.Kind), slices.Index(Kinds, y.Kind)),
			cmp.Compare(x.Subject, y.Subject), cmp.Compare(x.Text, y.Text))
	})
}

// Kinds has all kinds, the gravest first. The order is the order of causes in the state.
var Kinds []*Kind

// define adds a kind to Kinds. Stops is set by stops.
func define(code, means, do string) *Kind {
	k := &Kind{Code: code, Means: means, Do: do}
	Kinds = append(Kinds, k)
	return k
}

func stops(code, means, do string) *Kind {
	k := define(code, means, do)
	k.Stops = true
	return k
}

// The causes that stop all admissions.
var (
	RolledBack = stops("rolled-back", "the ledger is older than its monotonic counter",
		"restore the newest ledger, or have the loss approved: countersign admin rollback accept")
	AnchorLost = stops("anchor-lost", "the ledger's counter is gone, or another one is configured",
		"find out why, then have the ledger bound as configured now: countersign admin rollback accept")
	Counter = stops("counter-unread", "the ledger has not been compared with its monotonic counter yet",
		"put the device of the counter right, see the text; the ledger is then compared by itself")
	Locked = stops("locked", "an operator has locked the appliance, or the start waits for an operator",
		"countersign admin unlock")
	Starting = stops("starting", "the daemon waits for a device or an address, and serves no peer yet",
		"see the text for what is awaited")
	AddressAway = stops("address-away", "the machine has lost the address of a listener, so no peer can connect there",
		"give the machine the address again; the daemon then serves by itself")
	Disk = stops("disk", "the ledger's disk takes no writes",
		"make room on the disk, or mend the disk; the ledger tries again by itself")
	Clock = stops("clock", "the system's clock is behind the ledger's time, or too far ahead",
		"set the clock right")
	NoncesFull = stops("nonces-full", "as many nonces are alive as the peers may have together",
		"find the peer with the largest share (countersign admin state); wait for an expiry, or raise limits.nonces")
)

// The causes by which a part of the appliance does not work, or may soon not work.
var (
	TokenUnavailable = define("token-unavailable", "a token does not serve, so its keys can't be used",
		"see the text; countersign admin token list")
	TokenPIN = define("token-pin-refused", "a token has refused the PIN, which is not tried again by itself",
		"correct the PIN file, then: countersign admin token retry NAME")
	TokenLocked = define("token-locked", "a token is locked, in lockout, or one wrong PIN away from it",
		"unlock the token with its own tools, then: countersign admin token retry NAME")
	TokenReplaced = define("token-replaced", "a token was initialised again, cleared or exchanged",
		"put the right token back, or restore the token's keys")
	TokenSealed = define("token-sealed", "a key is sealed to another state of the machine than the present one",
		"find out what has changed (firmware, Secure Boot); boot the old state, or approve the new one")
	TokenRedundancy = define("token-redundancy", "a token has fewer key workers than configured",
		"see the text; a worker is started again by itself")
	TokenRestarts = define("token-restarts", "key workers of a token end again and again",
		"see the daemon's log; test the module with countersignd check")
	TokenJournal = define("journal-unwritable",
		"key workers of a token can't write their journal, so that nothing is signed with its keys",
		"see the text: make room on the disk, or give the key workers' user the folder; they try again by themselves")
	KeyMissing = define("key-missing", "a key of the ledger is not on its token",
		"restore the token, or rotate the key")
	KeyTwice = define("key-twice", "a key has the public key of another one, from a seed that was imported twice",
		"rotate all but one of them; if one is compromised, have the others marked: countersign admin key compromise")
	Rotation = define("rotation-failing", "a rotation that is due could not be done; a retry follows",
		"see the text")
	RotationOverdue = define("rotation-overdue", "the announced time of a rotation has passed, and nothing was tried",
		"see the other causes and the daemon's log: nothing rotates while the appliance is locked or rolled back")
	RotationGivenUp = define("rotation-given-up", "a rotation that an operator has asked for was not done in its time",
		"ask for it again, or dismiss it: countersign admin key rotate NAME --cancel")
	Backup = define("backup-failing", "the last backup was not made, or none can be made",
		"see the text; then: countersign admin backup create")
	Lists = define("lists-late", "what was written lately is not beside a backup: a restore would lose it",
		"see the text: the folder must take files, and countersign admin backup create must succeed")
	Mirror = define("mirror-late", "the SFTP server lacks what the folder of backups has",
		"see the text, and countersign admin backup list; what is lacking is sent by itself")
	Unproven = define("backup-unproven", "no backup has been proven by a drill lately, or the last drill has failed",
		"see the text, and countersign admin backup drill; then: countersignd drill")
	HoldersUnproven = define("holders-unproven",
		"no drill with holders has shown lately that the recoverable keys come back",
		"see the text; then: countersignd drill --holders")
	CounterFailing = define("counter-failing",
		"the monotonic counter can't be incremented, so that a copy of the ledger made meanwhile is not detected",
		"see the text, and the token of the counter: countersign admin token list")
	DiskFilling = define("disk-filling", "the ledger's disk is nearly full",
		"make room on the disk, or enlarge the disk; countersign admin ledger stats")
	Quorum = define("quorum-unreachable", "fewer operators can approve than an act needs, so no act can be approved",
		"see docs/INCIDENTS.md, too few approvers")
	BytesFull = define("bytes-used-up", "a peer has used up its bytes on disk, and is busy until some are refilled",
		"find out why; wait, or raise limits.bytes_per_day")
	NoncesShare = define("nonces-share-full",
		"a peer, or verification as a whole, has as many live nonces as it may, and is refused more as busy",
		"find out why; wait for nonces to expire, or raise limits.nonces_per_peer or limits.nonces_verify")
	NoncesFilling = define("nonces-filling", "more than 80 % of a bound of live nonces is used",
		"find out why before the bound is reached; raise it (limits.nonces and the bounds after it) if need be")
	PolicyWaits = define("policy-differs", "the policy file has a text that operators have not approved",
		"have it approved (countersign admin policy reload), or put an approved text back")
	PolicyBroken = define("policy-file-broken", "the policy file can't be used, and the policy in force stays",
		"correct it, or put the old text back (countersign admin policy show)")
	PolicyPointless = define("policy-rule-pointless", "a rule of the policy in force can never do what it says",
		"correct the policy file, and have it approved (countersign admin policy reload)")
	RetentionWaits = define("retention-differs",
		"the retention of the configuration is shorter than the retention in force, which stays",
		"have it approved (countersign admin retention shorten), or correct the configuration")
	Checkpoint = define("checkpoint-failing", "the audit log's checkpoint could not be signed; a retry follows",
		"see the token of the log's key: countersign admin token list")
	Upkeep = define("upkeep-failing", "a periodic work of the daemon has failed; a retry follows",
		"see the text")
	Webhook = define("webhook-failing", "the last message to a webhook's receiver was not accepted",
		"mend the receiver; waiting messages are sent again by themselves, given up ones after a restart")
	Mail = define("mail-failing", "the mail server has not taken the last message about an alert",
		"see the text; countersign admin alert test; waiting messages are sent again by themselves")
	Sink = define("sink-failing", "a sink does not take the events of the audit log, or its position can't be written",
		"see the text; countersign admin audit sinks; the sink goes on by itself where it stopped")
	Traces = define("traces-failing", "the last attempt to send traces to the collector has failed",
		"see the text; the daemon goes on, and drops what it can't send (countersign_trace_spans_total)")
	Certificate = define("certificate-expiring",
		"the certificate of the admin API ends soon, has ended, is for another key, or can't be renewed",
		"see the text; countersign admin tls")
	Sandbox = define("sandbox-incomplete",
		"this kernel can't confine the daemon, or the key workers of a token, as intended",
		"see the text; use a newer kernel with Landlock and seccomp")
	Launcher = define("launcher-ended", "the process that starts the key workers has ended, and the daemon ends",
		"see the daemon's log; the service manager starts the daemon again")
	LogUnread = define("log-unread", "the daemon's log is not read, so lines were dropped",
		"see what reads the daemon's standard error")
	NotifyUnread = define("notify-unread", "the service manager does not read the daemon's notifications",
		"see the service manager")
)
