package softhsmtests

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"countersign/admin/api"
	"countersign/approval"
	"countersign/audit"
	"countersign/client"
	"countersign/internal/ledger"
	"countersign/internal/sshagent"
	"countersign/transcript"
	"countersign/wire"

	"go.etcd.io/bbolt"
)

// The size of the soak. The environment variable SOAK gives another time, such as 30m.
const (
	soakTime    = 2 * time.Minute
	soakPeers   = 50
	soakAskers  = 2                      // goroutines of a peer
	soakThink   = 400 * time.Millisecond // longest pause of an asker between two requests
	soakOutage  = 90 * time.Second       // without the device; an outage needs a soak of soakOutages
	soakOutages = 6 * time.Minute
)

// TestSoak uses a daemon in all ways at once: 50 peers, operators, rotations, retention, changes of
// the policy, faults of the device, killed key workers, and Prometheus. Begin reading here.
// Afterwards:
//
//   - each answered signature is valid, and its admission is in the log once, as is each event;
//   - no nonce is signed twice, and a spent nonce is refused;
//   - each payment has one receipt;
//   - the metrics have counted what the peers have seen;
//   - a sink has each event of the log, and a client verifies the log and each checkpoint;
//   - descriptors, threads, goroutines and memory are those of the first quarter (footprint);
//   - each alert that the soak provokes has fired, and no alert without a reason.
//
// SOAK_SEED repeats the choices of an earlier soak. Their interleaving differs.
func TestSoak(t *testing.T) {
	needPrometheus(t)
	k := newSoak(t)
	k.begin()
	k.during(k.lasts / 4)
	early := k.rest(nil)
	k.during(k.lasts - k.lasts/4)
	late := k.rest(&early)
	t.Logf("after a quarter: %v; at the end: %v", early, late)
	k.end()

	k.checkMetrics()
	k.checkLog()
	k.checkAlerts()
	k.checkSpentNonces()
	k.checkReceipts()
	k.checkSink()
	k.checkByClient()
	k.p.stop()
	if out, code := k.daemon("check", "--deep"); code != 0 {
		t.Errorf("check --deep: %d, %s", code, out)
	}
	if log := k.p.stderr.String(); strings.Contains(log, "panic") {
		t.Errorf("the daemon's log has a panic")
	}
}

// soak is a system under load.
type soak struct {
	*system
	p         *process
	seed      uint64
	lasts     time.Duration
	address   string // of the metrics
	db        *prometheus
	peers     []*soakPeer
	log       audit.Log
	first     uint64 // event from which the peers ask
	ctx       context.Context
	stop      context.CancelFunc
	actors    sync.WaitGroup
	acts      sync.RWMutex // each act holds acts for reading, and rest for writing
	epochs    int          // with an old end, for retention
	faulty    []fault
	rotations int
	stranger  *operator

	mu          sync.Mutex
	asked       map[[32]byte]*soakRequest // sign requests by their nonces
	verified    map[[32]byte]*soakRequest // verifications by their nonces
	answers     map[string]int            // of peers, by "op code"; the code of a result is ok
	surprises   int
	causes      map[string]bool // seen in the state
	checkpoints *monitor
}

// soakPeer is an enrolled program. Its askers share a client, as in a real program.
type soakPeer struct {
	name   string
	config client.Config

	using  sync.RWMutex // held for writing while the client is replaced
	client *client.Client

	mu        sync.Mutex
	serverKey [32]byte
}

// soakRequest is what a peer knows of its sign request, or of its verification.
type soakRequest struct {
	peer     string
	key      string
	payment  bool
	answered bool
	event    uint64
	logged   bool // the event is in the log
	receipt  string
	open     bool // the admission has no outcome yet
	made     int  // outcomes with a signature
}

// newSoak sets up the daemon, with a chain of ended epochs whose retention ends during the soak.
func newSoak(t *testing.T) *soak {
	k := &soak{
		system: newChaos(t), lasts: soakTime, seed: uint64(time.Now().UnixNano()),
		asked: map[[32]byte]*soakRequest{}, verified: map[[32]byte]*soakRequest{}, answers: map[string]int{},
		causes: map[string]bool{}, faulty: allFaults(),
	}
	for name, parse := range map[string]func(string) error{
		"SOAK":      func(v string) (err error) { k.lasts, err = time.ParseDuration(v); return err },
		"SOAK_SEED": func(v string) (err error) { k.seed, err = strconv.ParseUint(v, 10, 64); return err },
	} {
		if v := os.Getenv(name); v != "" {
			if err := parse(v); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
	}
	t.Logf("SOAK=%v SOAK_SEED=%d", k.lasts, k.seed)
	k.stranger = k.newOperator("stranger")
	k.address = newFolder(t).listen
	k.edit("countersign.toml", "admin_socket", "metrics_listen = \""+k.address+"\"\nadmin_socket")
	k.edit("countersign.toml", "[limits]", "[[sinks]]\nname = \"soak\"\nfile = \"events.jsonl\"\n\n"+
		"[retention]\naudit_days = 1\n\n[limits]\nrequests_per_second = 200")
	k.write("policy.cedar", soakPolicy(0))
	k.p = k.serve()
	k.must("admin", "key", "create", "treasury")
	k.must("admin", "key", "create", "closed")
	k.proposeAndApprove(approval.ActPolicyActivate, "")
	k.proposeAndApprove(approval.ActRetentionShorten, "", approval.Parameter{Name: "audit", Value: "24h"})
	for n := range soakPeers {
		name := fmt.Sprintf("peer-%d", n)
		k.must("admin", "peer", "add", name, strings.TrimSpace(k.must("keygen", k.path(name+".key"))))
		id := must(client.ReadIdentity(k.path(name + ".key")))(t)
		k.peers = append(k.peers, &soakPeer{name: name, config: client.Config{Identity: id, Address: k.listen}})
	}
	presence := int64(8)
	must(k.admin().SetLine(t.Context(), "treasury", api.Change{Presence: &presence}))(t)
	k.epochs = int(k.lasts/time.Minute) + 1
	for range k.epochs {
		must(k.admin().EndEpoch(t.Context()))(t)
	}
	k.p.stop()
	k.backdate()
	k.p = k.serve()
	return k
}

// soakPolicy is a policy of many that decide alike.
func soakPolicy(n int) string {
	return fmt.Sprintf(`permit (principal, action == Action::"sign", resource == Key::"payments")
when { context.used.peer.day.signatures <= %d };
permit (principal, action == Action::"sign", resource == Key::"treasury");
`, 1_000_000_000+n)
}

// backdate sets the end of the ended epochs to about a day ago: retention drops some at once, and
// others during the soak.
func (k *soak) backdate() {
	db := must(bbolt.Open(k.path("ledger.db"), 0o600, nil))(k.t)
	err := db.Update(func(tx *bbolt.Tx) error {
		bucket := tx.Bucket([]byte("epochs"))
		for n := range k.epochs {
			var e ledger.Epoch
			number := binary.BigEndian.AppendUint32(nil, uint32(n))
			if err := json.Unmarshal(bucket.Get(number), &e); err != nil {
				return err
			}
			e.Ended = time.Now().Add(time.Duration(n)*time.Minute - 24*time.Hour).UnixMilli()
			b, err := json.Marshal(e)
			if err == nil {
				err = bucket.Put(number, b)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err := errors.Join(err, db.Close()); err != nil {
		k.t.Fatal(err)
	}
}

// begin connects the peers and starts all actors.
func (k *soak) begin() {
	t := k.t
	k.ctx, k.stop = context.WithCancel(t.Context())
	t.Cleanup(func() {
		k.stop()
		k.actors.Wait()
	})
	noise := must(k.admin().NoiseKey(t.Context()))(t)
	serverKey := must(client.ParseKey(noise.PublicKey))(t)
	logged := must(k.admin().Log(t.Context()))(t)
	k.log = must(audit.ParseVerifierKey(logged.VerifierKey))(t)
	k.checkpoints = k.monitor()
	for n, p := range k.peers {
		p.serverKey = serverKey
		p.config.OnServerKey = func(key [32]byte, _ uint64) {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.serverKey = key
		}
		p.config.OnRotation = func(r client.Rotation) {
			if r.Err != nil {
				k.surprise("a rotation of %s: %v", r.Key, r.Err)
			}
		}
		if n%10 == 0 { // proofs cost a checkpoint each
			p.config.LogKey = logged.VerifierKey
		}
		p.config.ServerKey = serverKey
		p.client = must(client.New(p.config))(t)
		if n == 0 {
			first := must(p.client.Key(t.Context(), "payments"))(t)
			k.peers[0].config.Lines = []client.KeyLine{{
				Key: "payments", Version: first.Version, PublicKey: first.PublicKey, Next: *first.Next,
			}}
		}
		p.client.Close()
		p.config.Lines = k.peers[0].config.Lines
		p.client = must(client.New(p.config))(t)
		must(p.client.Ping(t.Context()))(t)
	}
	k.db = k.scrapedBy(newFolder(t).listen, k.address)
	eventually(t, "a first scrape", func() bool { return len(k.db.query(`up == 1`)) == 1 })
	k.first = k.next()
	for n, p := range k.peers[:soakPeers-1] { // the last one floods
		for i := range soakAskers {
			k.actors.Go(func() { k.ask(p, rand.New(rand.NewPCG(k.seed, uint64(100+n*soakAskers+i)))) })
		}
	}
	minute := min(time.Minute, k.lasts/6)
	k.actor(1, minute, k.rotate)
	k.actor(2, minute/6, k.changePolicy)
	k.actor(3, minute/5, k.confirm)
	k.actor(4, k.lasts/8, k.operate)
	k.actor(5, minute/10, k.break_)
	k.actor(6, minute/4, k.killWorker)
	k.actor(7, 500*time.Millisecond, k.watch)
	k.actor(8, time.Second, k.flood)
	k.actor(9, time.Second, k.failToSignIn)
	if k.lasts >= soakOutages {
		k.actor(10, k.lasts*6/10, k.outage)
	}
}

// next returns the number of the next event of the log.
func (k *soak) next() uint64 {
	k.t.Helper()
	all := must(k.admin().Retention(k.t.Context()))(k.t).Epochs
	last := all[len(all)-1]
	return last.First + last.Size
}

// during lets the actors act for a time.
func (k *soak) during(d time.Duration) {
	select {
	case <-time.After(d):
	case <-k.ctx.Done():
	}
}

// end ends the actors, and takes the last answers.
func (k *soak) end() {
	k.stop()
	k.actors.Wait()
	sum := 0
	for _, name := range slices.Sorted(maps.Keys(k.answers)) {
		k.t.Logf("%8d %s", k.answers[name], name)
		sum += k.answers[name]
	}
	k.t.Logf("%d answers, %d sign requests, %d verifications, %d rotations, %d checkpoints; the state has had %v",
		sum, len(k.asked), len(k.verified), k.rotations, len(k.checkpoints.checkpoints),
		slices.Sorted(maps.Keys(k.causes)))
	if k.answers["sign ok"] < 20*int(k.lasts.Seconds()) {
		k.t.Errorf("only %d signatures: too few for the soak to prove anything", k.answers["sign ok"])
	}
}

// surprise fails the test with at most 20 texts.
func (k *soak) surprise(format string, args ...any) {
	k.mu.Lock()
	k.surprises++
	n := k.surprises
	k.mu.Unlock()
	if n <= 20 {
		k.t.Errorf(format, args...)
	}
}

// actor acts at each tick until the load ends. An error is a surprise.
func (k *soak) actor(stream uint64, every time.Duration, act func(n int, random *rand.Rand) error) {
	random := rand.New(rand.NewPCG(k.seed, stream))
	k.actors.Go(func() {
		ticker := time.NewTicker(every)
		defer ticker.Stop()
		for n := 0; ; n++ {
			select {
			case <-k.ctx.Done():
				return
			case <-ticker.C:
			}
			k.acts.RLock()
			err := act(n, random)
			k.acts.RUnlock()
			if err != nil && k.ctx.Err() == nil {
				k.surprise("actor %d: %v", stream, err)
			}
		}
	})
}

// rotate rotates the signing key each time, and the listener's key each third time. A fault may
// defer a rotation, which the daemon then tries again.
func (k *soak) rotate(n int, _ *rand.Rand) error {
	how := api.Rotate{Now: true}
	if n%2 == 1 {
		how = api.Rotate{In: 2}
	}
	for _, name := range []string{"payments", "noise"} {
		if name == "noise" && n%3 != 2 {
			continue
		}
		_, err := k.admin().RotateKey(context.Background(), name, how)
		var problem *api.Error
		switch {
		case err == nil:
			k.rotations++
		case errors.As(err, &problem) && problem.Status == 503: // the device
		case strings.Contains(err.Error(), "answer handshakes"):
		default:
			return fmt.Errorf("rotate %s: %w", name, err)
		}
	}
	return nil
}

// changePolicy has another policy approved.
func (k *soak) changePolicy(n int, _ *rand.Rand) error {
	if err := os.WriteFile(k.path("policy.cedar"), []byte(soakPolicy(n+1)), 0o600); err != nil {
		return err
	}
	p, err := k.propose(approval.ActPolicyActivate, "")
	if err == nil && p.State != "done" {
		err = fmt.Errorf("the proposal is %s: %s", p.State, p.Cause)
	}
	return err
}

// confirm confirms the presence that the key treasury needs.
func (k *soak) confirm(int, *rand.Rand) error {
	ctx := context.Background()
	ch, err := k.admin().Challenge(ctx, api.NewChallenge{Purpose: "presence", Key: "treasury"})
	if err != nil {
		return err
	}
	proof, err := sshagent.Sign(k.root.agent, k.root.credential, approval.ForPresence, ch.Text)
	if err == nil {
		_, err = k.admin().ConfirmKey(ctx, "treasury", api.Proven{Challenge: ch.ID, Proof: proof})
	}
	return err
}

// operate does an operator's rare acts.
func (k *soak) operate(n int, _ *rand.Rand) error {
	ctx := context.Background()
	a := k.admin()
	if _, err := a.EndEpoch(ctx); err != nil {
		return err
	}
	if err := a.SuspendPeer(ctx, "demo"); err != nil {
		return err
	}
	if err := a.ResumePeer(ctx, "demo"); err != nil {
		return err
	}
	if _, err := a.Metrics(ctx); err != nil {
		return err
	}
	if n%4 == 1 {
		if _, err := a.Compact(ctx); err != nil {
			return err
		}
	}
	_, _, err := a.Statement(ctx, time.Now().Add(-time.Minute).UnixMilli(), 0)
	return err
}

// break_ has the shim inject a fault, mostly into one of the two key workers.
func (k *soak) break_(n int, random *rand.Rand) error {
	if err := k.waitForWorkers(k.ctx); err != nil {
		return err
	}
	f := k.faulty[random.IntN(len(k.faulty))]
	process := n % 2
	if random.IntN(4) == 0 {
		process = -1
	}
	k.script(time.Now().Add(10*time.Millisecond), []fault{f}, f.lasts, func(int) int { return process })
	return nil
}

// killWorker kills a key worker.
func (k *soak) killWorker(_ int, random *rand.Rand) error {
	tokens, err := k.admin().Tokens(context.Background())
	if err != nil {
		return err
	}
	w := tokens[0].Workers[random.IntN(len(tokens[0].Workers))]
	if w.PID != 0 {
		syscall.Kill(w.PID, syscall.SIGKILL)
	}
	return nil
}

// outage removes the device, once, for soakOutage. A rotation fails meanwhile.
func (k *soak) outage(n int, _ *rand.Rand) error {
	if n > 0 {
		return nil
	}
	f := fault{function: -1, kind: "gone", lasts: soakOutage}
	end := k.script(time.Now(), []fault{f}, f.lasts, func(int) int { return -1 })
	k.admin().RotateKey(context.Background(), "payments", api.Rotate{Now: true})
	k.during(time.Until(end))
	return nil
}

// watch collects the newest checkpoint, and the causes of the state.
func (k *soak) watch(int, *rand.Rand) error {
	b, err := k.admin().ReadFile(context.Background(), "checkpoint")
	if err == nil {
		k.checkpoints.checkpoints = append(k.checkpoints.checkpoints, b)
	}
	h, err := k.admin().Health(context.Background())
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, c := range h.Causes {
		k.causes[c.Code] = true
	}
	return err
}

// flood has a peer ask far beyond its limit, 90 times.
func (k *soak) flood(n int, _ *rand.Rand) error {
	if n >= 90 {
		return nil
	}
	p := k.peers[soakPeers-1]
	p.using.RLock()
	defer p.using.RUnlock()
	var all sync.WaitGroup
	for range 400 {
		all.Go(func() {
			_, err := p.client.Ping(context.Background())
			k.count("ping", err, wire.CodeRateLimited)
		})
	}
	all.Wait()
	return nil
}

// failToSignIn tries to sign in as the administrator with another key, eight times.
func (k *soak) failToSignIn(n int, _ *rand.Rand) error {
	if n >= 8 {
		return nil
	}
	c := api.NewClient(k.path("admin.sock"))
	ch, err := c.Challenge(context.Background(), api.NewChallenge{Purpose: "sign-in", Operator: "root"})
	if err != nil {
		return err
	}
	proof, err := sshagent.Sign(k.stranger.agent, k.stranger.credential, approval.ForSignIn, ch.Text)
	if err != nil {
		return err
	}
	if _, err := c.SignIn(context.Background(), api.Proven{Challenge: ch.ID, Proof: proof}); err == nil {
		return errors.New("a stranger is signed in as root")
	}
	return nil
}

// count counts an answer. A code that is neither unavailable nor expected is a surprise.
func (k *soak) count(op string, err error, expected ...string) {
	is := "ok"
	if err != nil {
		is = cmp.Or(code(err), "none")
	}
	if errors.Is(err, client.ErrUnproven) {
		is = "unproven" // the operation was done, and the checkpoint for its proof could not be signed
	}
	k.mu.Lock()
	k.answers[op+" "+is]++
	k.mu.Unlock()
	handshake := errors.Is(err, client.ErrHandshake) || errors.Is(err, client.ErrUnreachable)
	if is != "ok" && is != wire.CodeUnavailable && is != "unproven" && !handshake && !slices.Contains(expected, is) {
		k.surprise("%s: %v", op, err)
	}
}

// ask has an asker of a peer make requests until the load ends.
func (k *soak) ask(p *soakPeer, random *rand.Rand) {
	a := &asker{soak: k, peer: p, random: random}
	for {
		pause := time.Duration(random.Int64N(int64(soakThink)))
		select {
		case <-k.ctx.Done():
			return
		case <-time.After(pause):
		}
		k.acts.RLock()
		a.act()
		k.acts.RUnlock()
	}
}

// asker makes the requests of a goroutine of a peer.
type asker struct {
	*soak
	peer   *soakPeer
	random *rand.Rand
	last   *client.Signed // not verified yet
	spent  *client.Signed // verified
}

// repeatable is the last signed document, if the appliance's answer to the same request is for the
// pinned line. A client that was pinned since to a later version trusts no signature of an earlier
// one.
func (a *asker) repeatable() *client.Signed {
	if a.last != nil && a.last.Version >= a.peer.config.Lines[0].Version {
		return a.last
	}
	return nil
}

// act makes one request.
func (a *asker) act() {
	ctx := context.Background()
	if a.random.IntN(100) == 0 {
		a.reconnect(a.peer)
		return
	}
	a.peer.using.RLock()
	defer a.peer.using.RUnlock()
	c := a.peer.client
	switch n := a.random.IntN(100); {
	case n < 40:
		a.sign("payments", a.message(), nil)
	case n < 48:
		a.pay()
	case n < 60:
		a.verify()
	case n < 64 && a.spent != nil: // a replay of a verification
		_, err := c.Verify(ctx, "payments", a.spent)
		a.mustFail("verify", err, wire.CodeReplay)
	case n < 68 && a.last != nil: // a spent nonce with other content
		d := a.last.Document
		d.Type, d.Payload = "message-v1", []byte(`{"context":"test","message":"BBBB"}`)
		_, err := c.Sign(ctx, "payments", d)
		a.mustFail("sign", err, wire.CodeReplay)
	case n < 72 && a.repeatable() != nil:
		again, err := c.Sign(ctx, "payments", a.last.Document)
		a.count("sign", err)
		if err == nil && (!again.Repeated || !bytes.Equal(again.Signature, a.last.Signature)) {
			a.surprise("the same request again: event %d and %d, repeated %v",
				a.last.Event, again.Event, again.Repeated)
		}
	case n < 78:
		a.batch()
	case n < 81:
		_, err := c.Keys(ctx)
		a.count("keys", err)
	case n < 84:
		_, err := c.Ping(ctx)
		a.count("ping", err)
	case n < 87:
		_, err := c.Line(ctx, "payments", 1)
		a.count("line", err)
	case n < 89:
		a.refused("closed", a.message(), wire.CodeDenied)
	case n < 91:
		d := a.message()
		d.Timestamp, d.ExpiresAt = d.Timestamp-7200, d.ExpiresAt-7200
		a.refused("payments", d, wire.CodeExpired)
	case n < 92:
		a.refused("unknown", a.message(), wire.CodeUnknownKey)
	case n < 94 && a.last != nil:
		forged := *a.last
		forged.Signature = bytes.Clone(forged.Signature)
		forged.Signature[7] ^= 1
		_, err := c.Verify(ctx, "payments", &forged)
		a.mustFail("verify", err, wire.CodeInvalidSignature)
	default:
		a.sign("treasury", a.message(), nil, wire.CodeNotConfirmed)
	}
}

// message is a document that is filled: a lost answer must not lose its nonce.
func (a *asker) message() client.Document {
	return message(fmt.Sprintf("%08d", a.random.IntN(100_000_000))).Fill(time.Hour)
}

// mustFail counts a refusal. Success is a surprise.
func (a *asker) mustFail(op string, err error, expected string) {
	a.count(op, err, expected)
	if err == nil {
		a.surprise("%s, which has to be refused with %s, has a result", op, expected)
	}
}

func (a *asker) refused(key string, d client.Document, expected string) {
	_, err := a.peer.client.Sign(context.Background(), key, d)
	a.mustFail("sign", err, expected)
}

// note remembers a sign request before the request is sent.
func (a *asker) note(key string, d client.Document) *soakRequest {
	a.mu.Lock()
	defer a.mu.Unlock()
	q := &soakRequest{peer: a.peer.name, key: key, payment: d.Type != "message-v1"}
	a.asked[d.Nonce] = q
	return q
}

// answer remembers the answer to a sign request, and checks the signature by the standard library.
func (a *asker) answer(q *soakRequest, signed *client.Signed) {
	doc, err := transcript.Parse(transcript.Request{
		Type: signed.Type, Payload: signed.Payload, Nonce: signed.Nonce,
		Timestamp: signed.Timestamp, ExpiresAt: signed.ExpiresAt,
	})
	if err != nil || !ed25519.Verify(signed.PublicKey[:], doc.Message, signed.Signature) {
		a.surprise("the signature of event %d is invalid: %v", signed.Event, err)
	}
	if q.payment != (signed.Receipt != nil) {
		a.surprise("event %d: payment %v, receipt %v", signed.Event, q.payment, signed.Receipt != nil)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	q.answered, q.event = true, signed.Event
	if signed.Receipt != nil {
		q.receipt = hex.EncodeToString(signed.Receipt.ID)
	}
}

func (a *asker) sign(key string, d client.Document, q *soakRequest, expected ...string) {
	if q == nil {
		q = a.note(key, d)
	}
	signed, err := a.peer.client.Sign(context.Background(), key, d)
	a.count("sign", err, expected...)
	if err != nil {
		return
	}
	a.answer(q, signed)
	if key == "payments" {
		a.last = signed
	}
}

// pay signs a subscription, which names the signing version. A rotation may come between.
func (a *asker) pay() {
	example, err := os.ReadFile("../examples/subscription.json")
	if err != nil {
		a.surprise("%v", err)
		return
	}
	d := client.Document{Type: "paykit-subscription-v2", Payload: example}.Fill(time.Hour)
	d, err = a.peer.client.FillAs(context.Background(), "payments", "subscriber", d)
	if err != nil {
		a.count("keys", err)
		return
	}
	a.count("keys", nil)
	a.sign("payments", d, a.note("payments", d), wire.CodeWrongSigner)
}

// verify has the last signature verified, which spends its nonce for verifications.
func (a *asker) verify() {
	s := a.last
	if s == nil {
		return
	}
	q := &soakRequest{peer: a.peer.name}
	a.mu.Lock()
	a.verified[s.Nonce] = q
	a.mu.Unlock()
	event, err := a.peer.client.Verify(context.Background(), "payments", s)
	a.count("verify", err)
	a.last = nil
	if err == nil {
		a.mu.Lock()
		q.answered, q.event = true, event
		a.mu.Unlock()
		a.spent = s
	}
}

func (a *asker) batch() {
	var items []client.Item
	var noted []*soakRequest
	for range 2 + a.random.IntN(7) {
		d := a.message()
		items = append(items, client.Item{Key: "payments", Document: d})
		noted = append(noted, a.note("payments", d))
	}
	if a.spent != nil {
		items = append(items, client.Item{Verify: a.spent})
	}
	all, err := a.peer.client.Batch(context.Background(), items)
	if err != nil {
		a.count("batch", err)
		return
	}
	for i, o := range all {
		if i == len(noted) {
			a.mustFail("verify", o.Err, wire.CodeReplay)
			continue
		}
		a.count("sign", o.Err)
		if o.Err == nil {
			a.answer(noted[i], o.Signed)
		}
	}
}

// reconnect replaces the client of a peer, as a restart of its program would.
func (k *soak) reconnect(p *soakPeer) {
	p.using.Lock()
	defer p.using.Unlock()
	config := p.config
	if l, ok := p.client.Pinned("payments"); ok {
		config.Lines = []client.KeyLine{l}
	}
	p.mu.Lock()
	config.ServerKey = p.serverKey
	p.mu.Unlock()
	config.FormerServerKey = p.config.ServerKey
	c, err := client.New(config)
	if err != nil {
		k.surprise("%v", err)
		return
	}
	p.client.Close()
	p.config, p.client = config, c
	_, err = c.Ping(context.Background())
	k.count("ping", err)
}

// footprint is what the daemon takes while nothing is asked: with 50 idle connections, two key
// workers, and Prometheus.
type footprint struct {
	descriptors, threads, goroutines int
	live                             int64 // bytes of the heap that the last collection has found in use
	anonymous                        int64 // bytes of resident memory without the pages of files
	nonces                           int64
}

func (f footprint) String() string {
	return fmt.Sprintf("%d descriptors, %d threads, %d goroutines, %d KiB of live heap, %d KiB resident, %d nonces",
		f.descriptors, f.threads, f.goroutines, f.live>>10, f.anonymous>>10, f.nonces)
}

// The bounds of growth from one rest to the next. Go keeps the threads that blocking system calls
// have once needed. A live nonce is some 40 bytes of the heap, and the heap may double between two
// collections of a small one.
const (
	growDescriptors = 4
	growThreads     = 16
	growGoroutines  = 8
	growLive        = 8 << 20 // bytes beside the nonces
	bytesOfNonce    = 150
	growAnonymous   = 64 << 20 // bytes beside five times the growth of the live heap (GOGC=400)
)

// flat reports whether a later footprint is within the bounds, and if not, says why.
func (f footprint) flat(later footprint) error {
	live := growLive + bytesOfNonce*(later.nonces-f.nonces)
	for _, b := range []struct {
		what      string
		was, is   int64
		mayGrowBy int64
	}{
		{"descriptors", int64(f.descriptors), int64(later.descriptors), growDescriptors},
		{"threads", int64(f.threads), int64(later.threads), growThreads},
		{"goroutines", int64(f.goroutines), int64(later.goroutines), growGoroutines},
		{"bytes of live heap", f.live, later.live, live},
		{"bytes of resident memory", f.anonymous, later.anonymous, growAnonymous + 5*live},
	} {
		if b.is > b.was+b.mayGrowBy && (os.Getenv("RACE") != "1" || !strings.HasPrefix(b.what, "bytes")) {
			return fmt.Errorf("%s: %d, and %d before; at most %d more", b.what, b.is, b.was, b.mayGrowBy)
		}
	}
	return nil
}

// rest stops all actors until nothing is under way, and returns the footprint of the daemon once the
// footprint is steady and, with one before, within its bounds.
func (k *soak) rest(before *footprint) (f footprint) {
	t := k.t
	t.Helper()
	k.acts.Lock()
	defer k.acts.Unlock()
	k.script(time.Now(), nil, 0, nil)
	if err := k.waitForWorkers(t.Context()); err != nil {
		t.Fatal(err)
	}
	// A connection keeps as many goroutines as it has served requests at once.
	for _, p := range k.peers {
		k.reconnect(p)
		eventually(t, p.name+" connects", func() bool {
			_, err := p.client.Ping(t.Context())
			k.count("ping", err)
			return err == nil
		})
	}
	f = k.footprint()
	// Go collects each 2 minutes without another reason. Five equal footprints are steady.
	for steady, began := 0, time.Now(); ; time.Sleep(300 * time.Millisecond) {
		last := f
		f = k.footprint()
		var why error
		if before != nil {
			why = before.flat(f)
		}
		if steady++; f.goroutines != last.goroutines || f.descriptors != last.descriptors {
			steady = 0
		}
		if steady >= 5 && why == nil {
			return f
		}
		if time.Since(began) > 150*time.Second {
			k.p.cmd.Process.Signal(syscall.SIGQUIT) // the stacks of all goroutines, as the daemon's last words
			<-k.p.ended
			k.p.ended <- errors.New("ended by SIGQUIT")
			os.WriteFile(filepath.Join(os.TempDir(), "soak-daemon.log"), k.p.stderr.Bytes(), 0o600)
			t.Fatalf("the daemon's footprint is %v (%v); its stacks are in %s/soak-daemon.log", f, why, os.TempDir())
		}
	}
}

// footprint reads the present footprint.
func (k *soak) footprint() (f footprint) {
	t, pid := k.t, k.p.cmd.Process.Pid
	t.Helper()
	f.descriptors = len(must(os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid)))(t))
	for line := range strings.Lines(string(must(os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)))(t))) {
		name, value, _ := strings.Cut(line, ":")
		n, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		switch name {
		case "Threads":
			f.threads = int(n)
		case "RssAnon":
			f.anonymous = n << 10
		}
	}
	m := k.metrics()
	f.goroutines = int(m["go_goroutines"])
	f.live = int64(m["go_memstats_next_gc_bytes"]) / 5
	f.nonces = int64(m[`countersign_ledger_nonces{use="sign"}`] + m[`countersign_ledger_nonces{use="verify"}`])
	return f
}

// metrics scrapes the daemon by its admin socket.
func (k *soak) metrics() map[string]float64 {
	k.t.Helper()
	all := map[string]float64{}
	for line := range strings.Lines(string(must(k.admin().Metrics(k.t.Context()))(k.t))) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok && name != "#" {
			all[name], _ = strconv.ParseFloat(value, 64)
		}
	}
	return all
}

// checkMetrics compares the metrics with the answers that the peers have seen.
func (k *soak) checkMetrics() {
	m := k.metrics()
	for series, answers := range map[string][]string{
		`requests_total{op="sign",result="ok"}`:    {"sign ok", "sign unproven"},
		`requests_total{op="verify",result="ok"}`:  {"verify ok", "verify unproven"},
		`replays_total{op="sign"}`:                 {"sign replay"},
		`replays_total{op="verify"}`:               {"verify replay"},
		`refusals_total{code="denied"}`:            {"sign denied"},
		`refusals_total{code="expired"}`:           {"sign expired"},
		`refusals_total{code="not_confirmed"}`:     {"sign not_confirmed"},
		`refusals_total{code="invalid_signature"}`: {"verify invalid_signature"},
		`refusals_total{code="wrong_signer"}`:      {"sign wrong_signer"},
		`requests_total{op="sign",result="refused"}`: {
			"sign replay", "sign denied", "sign expired", "sign not_confirmed", "sign wrong_signer", "sign unknown_key",
		},
	} {
		want := 0
		for _, a := range answers {
			want += k.answers[a]
		}
		if got := int(m["countersign_"+series]); got != want {
			k.t.Errorf("%s is %d, the peers have seen %d", series, got, want)
		}
	}
	// The SDK of the peer that floods acknowledges rotations, too, and its requests are refused as well.
	limited := int(m[`countersign_refusals_total{code="rate_limited"}`])
	if seen := k.answers["ping rate_limited"]; limited < seen || seen == 0 {
		k.t.Errorf("%d requests were rate limited, the peer has seen %d", limited, seen)
	}
	eventually(k.t, "no request is served", func() bool { return k.metrics()["countersign_requests_serving"] == 0 })
}

// walk reads the events of the log from one on, page by page.
func (k *soak) walk(from uint64, each func(api.Event)) {
	k.t.Helper()
	for {
		some := must(k.admin().Events(k.t.Context(), from, 1000))(k.t)
		for _, e := range some {
			if e.Index != from {
				k.t.Fatalf("event %d stands at %d", e.Index, from)
			}
			each(e)
			from++
		}
		if len(some) < 1000 {
			return
		}
	}
}

// checkLog holds the log against the requests: each admission and each verification is one that a
// peer has asked for, each admission has one outcome with its signature, and the refusals are those
// that the peers have seen.
func (k *soak) checkLog() {
	t := k.t
	t.Helper()
	open := func() (n int) {
		for _, q := range k.asked {
			if q.open {
				n++
			}
		}
		return n
	}
	admissions := map[string]*soakRequest{} // by the number of the event
	types, refused := map[audit.Type]int{}, map[string]int{}
	from := k.first
	eventually(t, "each admission has an outcome", func() bool {
		k.walk(from, func(e api.Event) {
			from = e.Index + 1
			types[e.Type]++
			if e.Type == audit.ReplayRefused || e.Type == audit.SignatureRejected {
				n, err := strconv.Atoi(cmp.Or(e.Metadata["count"], "1"))
				if err != nil {
					t.Fatalf("event %d: %v", e.Index, err)
				}
				refused[e.Action+" "+e.Outcome] += n
			}
			var nonce [32]byte
			hex.Decode(nonce[:], []byte(e.Metadata["nonce"]))
			switch {
			case e.Type.Kind() == audit.Admission:
				q := k.asked[nonce]
				if q == nil && e.Actor.Kind != "peer" { // the step of a rotation, with a nonce of the appliance
					q = &soakRequest{peer: e.Actor.Name}
					k.asked[nonce] = q
				}
				if q == nil || q.logged || q.answered && q.event != e.Index || e.Actor.Name != q.peer ||
					!strings.HasPrefix(e.Resource, q.key) {
					t.Fatalf("event %d of %x is not the one of its request: %+v, %+v", e.Index, nonce, e, q)
				}
				q.logged, q.open, q.event = true, true, e.Index
				admissions[strconv.FormatUint(e.Index, 10)] = q
			case e.Type == audit.SignatureVerified:
				q := k.verified[nonce]
				if q == nil || q.logged || q.answered && q.event != e.Index || e.Actor.Name != q.peer {
					t.Fatalf("event %d of %x is not the one of its verification: %+v", e.Index, nonce, q)
				}
				q.logged = true
			case e.Type.Kind() == audit.Outcome:
				q := admissions[e.Metadata["admission"]]
				if q == nil {
					t.Fatalf("event %d is the outcome of no admission: %+v", e.Index, e)
				}
				q.open = false
				if e.Outcome == "ok" {
					q.made++
				}
			}
		})
		return open() == 0
	})
	for nonce, q := range k.asked {
		if q.answered && (!q.logged || q.made == 0) {
			t.Errorf("a signature for %x was released as event %d; the log has %d outcomes", nonce, q.event, q.made)
		}
		if q.made > 1 {
			t.Errorf("event %d has %d outcomes with a signature", q.event, q.made)
		}
	}
	for nonce, q := range k.verified {
		if q.answered && !q.logged {
			t.Errorf("the verification of %x as event %d is not in the log", nonce, q.event)
		}
	}
	for _, each := range []string{
		"sign replay", "verify replay", "sign denied", "sign expired", "sign not_confirmed",
		"verify invalid_signature", "sign wrong_signer",
	} {
		if got := refused[each]; got != k.answers[each] {
			t.Errorf("the log has %d refusals %s, the peers have seen %d", got, each, k.answers[each])
		}
	}
	if got := int(k.metrics()["countersign_audit_events_total"]); got < int(from) {
		t.Errorf("the metrics have %d events, the log has %d", got, from)
	}
	if types[audit.RetentionApplied] == 0 {
		t.Errorf("retention has dropped nothing")
	}
	for n := range types {
		switch n {
		case audit.Started, audit.Stopped, audit.ClockRefused, audit.RollbackDetected, audit.KeyCreationFailed,
			audit.HandshakeRefused, audit.ProposalExpired, audit.Locked:
			t.Errorf("the log has %d events %s without a reason", types[n], n)
		}
	}
	t.Logf("events: %v", types)
}

// checkSpentNonces asks again for some of the admitted signatures with other content.
func (k *soak) checkSpentNonces() {
	left := 500
	for nonce, q := range k.asked {
		if !q.logged || q.key != "payments" {
			continue
		}
		if left--; left == 0 {
			break
		}
		d := message("CCCC")
		d.Nonce = nonce
		for _, p := range k.peers {
			if p.name == q.peer {
				if _, err := p.client.Sign(k.t.Context(), "payments", d); code(err) != wire.CodeReplay {
					k.t.Fatalf("the spent nonce of event %d: %v", q.event, err)
				}
			}
		}
	}
}

// checkReceipts compares the receipts with the payments: each signed payment has one.
func (k *soak) checkReceipts() {
	t := k.t
	t.Helper()
	want, got := map[string]uint64{}, map[string]uint64{}
	payments := 0
	for _, q := range k.asked {
		if q.payment && q.made == 1 {
			payments++
			if q.receipt != "" {
				want[q.receipt] = q.event
			}
		}
	}
	for after := ""; ; {
		some, next, err := k.admin().Receipts(t.Context(), 0, 0, after, 1000)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range some {
			if _, twice := got[r.ID]; twice {
				t.Errorf("receipt %s is there twice", r.ID)
			}
			got[r.ID] = r.Event
		}
		if after = next; after == "" {
			break
		}
	}
	for id, event := range want {
		if got[id] != event {
			t.Errorf("the receipt of event %d is there for event %d", event, got[id])
		}
	}
	if len(got) != payments {
		t.Errorf("%d receipts of %d signed payments", len(got), payments)
	}
}

// checkSink compares the file of the sink with the log.
func (k *soak) checkSink() {
	t := k.t
	t.Helper()
	eventually(t, "the sink has all events", func() bool {
		all := must(k.admin().Sinks(t.Context()))(t)
		return len(all) == 1 && all[0].Behind == 0
	})
	files := must(filepath.Glob(k.path("events.jsonl*")))(t)
	slices.Sort(files)
	files = append(files[1:], files[0]) // the renamed files by their numbers, then the present one
	types := map[uint64]audit.Type{}
	for _, name := range files {
		for line := range bytes.Lines(must(os.ReadFile(name))(t)) {
			var e struct {
				Index *uint64
				Type  audit.Type
			}
			if err := json.Unmarshal(line, &e); err != nil || e.Index == nil {
				t.Fatalf("the sink has %s (%v)", line, err)
			}
			if _, twice := types[*e.Index]; twice {
				t.Fatalf("the sink has event %d twice", *e.Index)
			}
			types[*e.Index] = e.Type
		}
	}
	missing := 0
	k.walk(k.first, func(e api.Event) {
		if types[e.Index] != e.Type {
			missing++
		}
	})
	if missing > 1 { // the last sign-in of this test may still be on its way
		t.Errorf("%d events are not in the sink", missing)
	}
}

// checkByClient verifies the exported log, and each checkpoint that was published.
func (k *soak) checkByClient() {
	k.must("admin", "audit", "export", "export")
	k.must("audit", "verify", "export", "--key", k.log.VerifierKey(0))
	k.checkpoints.checkConsistent(audit.Folder(k.path("export")))
}

// checkAlerts compares the alerts of Prometheus that have fired with what the soak has provoked.
func (k *soak) checkAlerts() {
	t := k.t
	t.Helper()
	fired := map[string]bool{}
	for _, s := range k.db.query(`count by (alertname) (count_over_time(ALERTS{alertstate="firing"}[2h]))`) {
		fired[s.Metric["alertname"]] = true
	}
	must := []string{
		"CountersignReplaysHigh", "CountersignSignatureFailuresHigh", "CountersignRateLimitedHigh",
		"CountersignProofsRefused",
	}
	// Rates pass the lower thresholds on their way, for a time that may be short.
	may := []string{"CountersignReplays", "CountersignSignatureFailures", "CountersignRateLimited", "CountersignSlow"}
	if k.lasts >= soakOutages {
		must = append(must, "CountersignTokenDown", "CountersignRotationFailing")
		may = append(may, "CountersignCheckpointLate", "CountersignDegraded")
	}
	if k.causes["rotation-failing"] {
		may = append(may, "CountersignRotationFailing")
	}
	if free := k.metrics()["countersign_ledger_disk_free_bytes"]; free < 1e9 {
		may = append(may, "CountersignDiskSpace", "CountersignDiskSpaceLow")
	}
	for _, name := range must {
		if !fired[name] {
			t.Errorf("%s has not fired", name)
		}
	}
	for name := range fired {
		if !slices.Contains(must, name) && !slices.Contains(may, name) {
			t.Errorf("%s has fired without a reason", name)
		}
	}
	t.Logf("alerts: %v", slices.Sorted(maps.Keys(fired)))
}
