package client_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"countersign/appliance"
	"countersign/audit"
	"countersign/client"
	"countersign/internal/form"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/keystore/keystoretest"
	"countersign/internal/ledger"
	"countersign/internal/scantest"
	"countersign/noise"
	"countersign/policy"
)

var operator = audit.Operator("test")

const rules = `
permit (principal == Peer::"shop", action == Action::"sign", resource == Key::"payments");
permit (principal == Peer::"shop", action == Action::"sign_raw", resource == Key::"raw-certificates");
`

func TestMain(m *testing.M) { os.Exit(scantest.Run(m)) }

// newIdentity makes a peer's identity, and has all outputs searched for it.
func newIdentity() (*noise.Identity, error) {
	id, err := noise.NewIdentity()
	if err == nil {
		scantest.Secret("an identity", id.Private())
	}
	return id, err
}

// testAppliance is a real appliance in this process, with keys in memory, on a loopback port.
type testAppliance struct {
	app     *appliance.Appliance
	ledger  *ledger.Ledger
	store   *keystoretest.Memory
	address string
	key     [32]byte
	shop    *noise.Identity
	dir     string

	stopServing context.CancelFunc
	served      chan error
}

func startAppliance() (a *testAppliance, err error) {
	a = &testAppliance{store: keystoretest.NewMemory(), address: "127.0.0.1:0"}
	if a.dir, err = os.MkdirTemp("", "countersign"); err != nil {
		return nil, err
	}
	path := filepath.Join(a.dir, "ledger.db")
	if err := ledger.Create(path, ledger.Options{}); err != nil {
		return nil, err
	}
	if err := a.open(); err != nil {
		return nil, err
	}
	ctx := context.Background()
	if _, err := a.app.Keys.CreateOwn(ctx, operator, keyring.LogName, "memory"); err != nil {
		return nil, err
	}
	k, err := a.app.Keys.CreateOwn(ctx, operator, keyring.NoiseName, "memory")
	if err != nil {
		return nil, err
	}
	a.key = [32]byte(k.Info().PublicKey)
	for _, name := range []string{"payments", "raw-certificates"} {
		if _, err := a.app.Keys.Create(ctx, operator, keyring.NewKey{Name: name}); err != nil {
			return nil, err
		}
	}
	if a.shop, err = newIdentity(); err != nil {
		return nil, err
	}
	public := a.shop.Public()
	if _, err := a.app.Peers.Add(ctx, operator, "shop", public[:]); err != nil {
		return nil, err
	}
	return a, a.serve()
}

// open opens the ledger, and makes an appliance with it.
func (a *testAppliance) open() (err error) {
	path := filepath.Join(a.dir, "ledger.db")
	a.ledger, err = ledger.Open(path, ledger.Options{}) // without a replica: examples have no testing.T
	if err != nil {
		return err
	}
	p, err := policy.Parse("policy.cedar", []byte(rules))
	if err != nil {
		return err
	}
	limits := appliance.DefaultLimits()
	limits.Handshakes.PerSource = 100
	config := appliance.Config{
		Limits:    limits,
		Retention: appliance.Retention{Epoch: appliance.Month, Audit: time.Hour, Receipts: time.Hour},
	}
	stores := map[string]keystore.Store{"memory": form.Guard(a.store, nil)}
	a.app, err = appliance.New(context.Background(), config, a.ledger, stores, p, scantest.Log())
	return err
}

// serve listens, after a stop at the same address again.
func (a *testAppliance) serve() error {
	l, err := net.Listen("tcp", a.address)
	if err != nil {
		return err
	}
	a.address = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	a.stopServing, a.served = cancel, make(chan error, 1)
	go func() { a.served <- a.app.Serve(ctx, appliance.Listener{Listener: l, Profile: noise.CountersignV1}) }()
	return nil
}

func (a *testAppliance) stop() error {
	a.stopServing()
	return <-a.served
}

func (a *testAppliance) close() {
	a.stop()
	a.ledger.Close()
	scantest.SawLedger(filepath.Join(a.dir, "ledger.db"))
	os.RemoveAll(a.dir)
}

func (a *testAppliance) config() client.Config {
	return client.Config{Address: a.address, ServerKey: a.key, Identity: a.shop}
}

// startExample starts an appliance for an example, which has no testing.T.
func startExample() *testAppliance { return must(startAppliance()) }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// pin makes a file as `countersign line pin` does.
func (a *testAppliance) pin(name string) (file string) {
	c := must(client.New(a.config()))
	defer c.Close()
	k := must(c.Key(context.Background(), name))
	file = filepath.Join(a.dir, name+".line")
	l := client.LineOf(k)
	must(0, client.WriteKeyLine(file, l))
	return file
}

// kept returns the folder with the files that the peer keeps.
func (a *testAppliance) kept() (folder string) {
	if _, err := os.Stat(filepath.Join(a.dir, "shop.key")); err == nil {
		return a.dir
	}
	text := fmt.Appendf(nil, "%x\n", a.shop.Private())
	must(0, os.WriteFile(filepath.Join(a.dir, "shop.key"), text, 0o600))
	must(0, client.WriteKey(filepath.Join(a.dir, "noise.pub"), a.key))
	must(0, os.WriteFile(filepath.Join(a.dir, "log.vkey"), []byte(a.logKey()+"\n"), 0o600))
	a.pin("payments")
	return a.dir
}

// rotate announces a rotation, and waits until the new version is active if its time has come.
func (a *testAppliance) rotate(name string, at time.Time) {
	k := must(a.app.Keys.Rotate(context.Background(), operator, name, at))
	for !time.Now().Before(at) && must(a.app.Keys.Active(name)).Version < k.Version {
		runtime.Gosched()
	}
}

func (a *testAppliance) compromise(name string, version uint32) {
	approved := operator
	approved.Proposal = 1
	must(0, a.app.Keys.Compromise(context.Background(), approved, name, version, "stolen"))
}

func (a *testAppliance) logKey() string {
	log, epoch, err := a.app.Log()
	must(0, err)
	return log.VerifierKey(epoch)
}

// receipt returns the commitment in the record of a payment. The appliance writes the record after
// its answer.
func (a *testAppliance) receipt(id []byte) [32]byte {
	for {
		r, err := a.ledger.Receipt(ledger.ReceiptID(id))
		if !errors.Is(err, ledger.ErrNotFound) {
			return [32]byte(must(r, err).Commitment)
		}
		runtime.Gosched()
	}
}
