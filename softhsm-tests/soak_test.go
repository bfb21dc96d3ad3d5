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
	"net/http"
	"os"
	"os/exec"
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
	"countersign/noise"
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

// TestSoak uses a daemon in all ways at once: 50 peers and others that come and go, operators,
// rotations, keys that are made, imported, compromised and destroyed, locks, retention, changes of
// the policy, faults of the device, killed key workers, and Prometheus. Begin reading here.
// Afterwards:
//
//   - each answered signature is valid, and its admission is in the log once, as is each event;
//   - no nonce is signed twice, and a spent nonce is refused;
//   - each payment has one receipt;
//   - the metrics have counted what the peers have seen;
//   - a sink and ten readers of the stream have each event of the log that is for them;
//   - a client verifies the log and each checkpoint;
//   - descriptors, threads, goroutines and memory of the daemon, of the launcher and of each key
//     worker are those of the first quarter (footprint);
//   - each alert that the soak provokes has fired, and no other one; a receiver has been told of
//     each change once;
//   - each line of the key workers' journal has its event.
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
	k.checkOwnAlerts()
	k.checkSpentNonces()
	k.checkReceipts()
	k.checkSink()
	k.checkStream()
	k.checkByClient()
	k.checkJournal()
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
	deferred  int // rotations that the daemon tries again
	stranger  *operator
	receiver  *receiver // of the appliance's own alerts

	readers     []*streamReader
	stopReading func()

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
	k.receiver = k.system.receiver()
	k.edit("countersign.toml", "[limits]", fmt.Sprintf(`[[sinks]]
name = "soak"
file = "events.jsonl"

[[webhooks]]
name = "soak"
url = %q

[alerts]
replays_window = "1m"
quiet = "10s"

[journal]
file_mib = 1
files = 10000

[retention]
audit_days = 1

[limits]
requests_per_second = 200`, k.receiver.url))
	// Other work on the machine must not look like a fault of the device.
	k.edit("countersign.toml", chaosDeadline.String(), "1s")
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
	// Retention drops some epochs at once, and others during the soak.
	k.endedAt(k.epochs, func(n int) time.Time { return time.Now().Add(time.Duration(n)*time.Minute - 24*time.Hour) })
	k.p = k.serve()
	return k
}

// serve starts the daemon, which may wait for its token on a busy machine.
func (k *soak) serve() *process {
	k.t.Helper()
	cmd := exec.Command(filepath.Join(bin, "countersignd"), "serve", "--config", k.path("countersign.toml"))
	cmd.Env = os.Environ()
	p := k.system.begin(cmd)
	for p.notified() != "READY=1" {
	}
	k.enrolRoot()
	return p
}

// soakPolicy is a policy of many that decide alike.
func soakPolicy(n int) string {
	return fmt.Sprintf(`permit (principal, action == Action::"sign", resource == Key::"payments")
when { context.used.peer.day.signatures <= %d };
permit (principal, action == Action::"sign", resource == Key::"treasury");
`, 1_000_000_000+n)
}

// endedAt sets the ends of the first epochs of a log, without the daemon.
func (s *system) endedAt(epochs int, at func(n int) time.Time) {
	s.t.Helper()
	db := must(bbolt.Open(s.path("ledger.db"), 0o600, nil))(s.t)
	err := db.Update(func(tx *bbolt.Tx) error {
		bucket := tx.Bucket([]byte("epochs"))
		for n := range epochs {
			var e ledger.Epoch
			number := binary.BigEndian.AppendUint32(nil, uint32(n))
			if err := json.Unmarshal(bucket.Get(number), &e); err != nil {
				return err
			}
			e.Ended = at(n).UnixMilli()
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
		s.t.Fatal(err)
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
			// A rotation that met the peer's limit is delivered again; rest waits for all.
			if r.Err != nil && !strings.Contains(r.Err.Error(), wire.CodeRateLimited) {
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
	k.readStream()
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
	k.actor(11, minute/4, k.visit)
	k.actor(12, minute/2, k.makeKey)
	k.actor(13, k.lasts/4, k.lock)
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
	k.t.Logf("%d answers, %d sign requests, %d verifications, %d rotations (%d deferred), %d checkpoints; "+
		"the state has had %v",
		sum, len(k.asked), len(k.verified), k.rotations, k.deferred, len(k.checkpoints.checkpoints),
		slices.Sorted(maps.Keys(k.causes)))
	if k.answers["sign ok"] < 500 {
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

// actor acts at each tick until the load ends. An error is a surprise, unless the device is away or
// the appliance is locked.
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
			var problem *api.Error
			stopped := errors.As(err, &problem) &&
				(problem.Status == http.StatusServiceUnavailable || problem.Code == "locked")
			if err != nil && !stopped && k.ctx.Err() == nil {
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
		switch {
		case err == nil:
			k.rotations++
		case strings.Contains(err.Error(), "it is tried again until"): // also after a strange answer of SoftHSM
			k.deferred++
		case !strings.Contains(err.Error(), "answer handshakes"): // as many listener keys as may be
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

// visit has a peer that is added, signs, and is removed.
func (k *soak) visit(n int, random *rand.Rand) error {
	ctx := context.Background()
	id, err := noise.NewIdentity()
	if err != nil {
		return err
	}
	public := id.Public()
	name := fmt.Sprintf("guest-%d", n)
	p, err := k.propose(approval.ActPeerAdd, "", approval.Parameter{Name: "name", Value: name},
		approval.Parameter{Name: "public_key", Value: hex.EncodeToString(public[:])})
	if err != nil || p.State != "done" {
		return fmt.Errorf("add %s: %s %s: %w", name, p.State, p.Cause, err)
	}
	k.peers[0].mu.Lock()
	c, err := client.New(client.Config{Identity: id, Address: k.listen, ServerKey: k.peers[0].serverKey})
	k.peers[0].mu.Unlock()
	if err != nil {
		return err
	}
	guest := &soakPeer{name: name, client: c}
	a := &asker{soak: k, peer: guest, random: random}
	for range 3 {
		a.sign("payments", a.message(), nil)
	}
	c.Close()
	return k.admin().RemovePeer(ctx, name)
}

// makeKey makes a key, or imports one, and has the key compromised and destroyed.
func (k *soak) makeKey(n int, random *rand.Rand) error {
	ctx := context.Background()
	made := api.NewKey{Name: fmt.Sprintf("made-%d", n)}
	if n%2 == 1 {
		var seed [32]byte
		for i := range seed {
			seed[i] = byte(random.Uint32())
		}
		made.SeedFile = k.path(made.Name + ".key")
		if err := os.WriteFile(made.SeedFile, []byte(hex.EncodeToString(seed[:])+"\n"), 0o600); err != nil {
			return err
		}
	}
	if _, err := k.admin().CreateKey(ctx, made); err != nil {
		return fmt.Errorf("make %s: %w", made.Name, err)
	}
	of := []approval.Parameter{{Name: "key", Value: made.Name}, {Name: "version", Value: "1"}}
	why := []approval.Parameter{{Name: "reason", Value: "a soak"}}
	for _, act := range []string{approval.ActKeyCompromise, approval.ActKeyDestroy} {
		p, err := k.propose(act, "", append(slices.Clone(of), why...)...)
		why = nil // a destruction has no reason
		var problem *api.Error
		if errors.As(err, &problem) && problem.Code == "conflict" {
			return nil // a fault of the device has kept the successor from its activation
		}
		if err == nil && p.State == "failed" && strings.Contains(p.Cause, "the keystore does not answer") {
			return nil // a fault of the device has come in between
		}
		if err != nil || p.State != "done" {
			return fmt.Errorf("%s %s: %s %s: %v", act, made.Name, p.State, p.Cause, err)
		}
	}
	return nil
}

// lock locks the appliance for as long as the alert needs, and unlocks it.
func (k *soak) lock(int, *rand.Rand) error {
	ctx := context.Background()
	if err := k.admin().Lock(ctx, "a soak"); err != nil {
		return err
	}
	defer k.admin().Unlock(ctx)
	for began := time.Now(); time.Since(began) < 20*time.Second; time.Sleep(100 * time.Millisecond) {
		all, err := k.admin().Alerts(ctx)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(all.Firing, func(a api.Alert) bool { return a.Code == "locked" }) {
			return nil
		}
	}
	return errors.New("a lock has no alert within 20 s")
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
