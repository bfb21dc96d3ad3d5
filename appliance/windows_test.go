package appliance

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"countersign/audit"
	"countersign/internal/keyring"
	"countersign/internal/keystore"
	"countersign/internal/ledger"
	"countersign/policy"
	"countersign/wire"
)

const dailyBudget = `permit (principal == Peer::"shop", action == Action::"sign", resource) when {
  context has amount && context has currency && context.currency == "SAT" &&
  context.amount <= 500000 && context.used.peer.day.amount <= 10000000 };
permit (principal == Peer::"cafe", action == Action::"sign", resource) when {
  context has amount && context.used.counterparty.day.amount <= 1000 && context.used.key.hour.signatures <= 100 };
permit (principal, action == Action::"sign", resource) when {
  context.transcript == "message-v1" && context.used.peer.minute.signatures <= 3 };`

// payment returns a sign request for a payment. payee is the last byte of a seed of the payee's
// key.
func payment(n int, payer []byte, payee byte, amount, currency string) *wire.Sign {
	s := numbered(n, "")
	s.Type = "payment-request-v1"
	s.Payload = fmt.Appendf(nil,
		`{"payer":"%x","payee":"%x","amount":"%s","currency":"%s","method":"m","endpoint":"e"}`,
		payer, ed25519.NewKeyFromSeed(append(make([]byte, 31), payee)).Public(), amount, currency)
	return s
}

// TestBudgetIsExact: 193 concurrent requests for 250,000 SAT meet a budget of 10,000,000 SAT. The
// admitted sum is the budget exactly.
func TestBudgetIsExact(t *testing.T) {
	r := newRig(t)
	r.permits(t, dailyBudget)
	var admitted, denied atomic.Int64
	first := payment(0, r.public, 2, "250000", "SAT")
	r.sign(t, r.shop, first)
	admitted.Add(250_000)
	var wg sync.WaitGroup
	for g := range 64 {
		wg.Go(func() {
			for i := range 3 {
				n := 1 + 3*g + i
				_, err := r.Sign(t.Context(), r.shop, payment(n, r.public, byte(g), "250000", "SAT"))
				switch {
				case err == nil:
					admitted.Add(250_000)
				case errors.Is(err, policy.ErrDenied):
					denied.Add(1)
				default:
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if got := admitted.Load(); got != 10_000_000 || denied.Load() != 1+64*3-40 {
		t.Errorf("%d SAT were admitted, %d requests denied", got, denied.Load())
	}
	// An admitted request still gets its answer. A denied request has spent neither nonce nor
	// budget.
	again := func() {
		t.Helper()
		if s := r.sign(t, r.shop, first); !s.Repeated {
			t.Errorf("%+v", s)
		}
		for _, amount := range []string{"1", "0.00000001", "250000"} {
			_, err := r.Sign(t.Context(), r.shop, payment(1000, r.public, 2, amount, "SAT"))
			r.refuses(t, "denied", err)
		}
	}
	again()
	events := logOf(t, r.Appliance, 1)
	if n := countOf(events, audit.PaymentInitiated); n != 40 {
		t.Errorf("%d admissions in the log", n)
	}
	r.ledger.Close()
	r.open(t)
	r.permits(t, dailyBudget)
	again()
	r.permits(t, `permit (principal, action == Action::"sign", resource);`)
	if s := r.sign(t, r.shop, payment(1000, r.public, 2, "1", "SAT")); s.Repeated {
		t.Error("a denial has spent the nonce")
	}
}

// TestBudgetInBatches: the budget is exact also in batches, where admissions share a transaction.
func TestBudgetInBatches(t *testing.T) {
	r := newRig(t)
	r.permits(t, dailyBudget)
	var admitted atomic.Int64
	var wg sync.WaitGroup
	shop := r.handler(t, "shop")
	for g := range 2 {
		var items []any
		for i := range 60 {
			items = append(items, payment(100*g+i, r.public, 2, "100000", "SAT"))
		}
		wg.Go(func() {
			for _, a := range batched(t, r.Appliance, shop, items...) {
				if a.Error == nil {
					admitted.Add(100_000)
				} else if a.Error.Code != wire.CodeDenied {
					t.Error(a.Error)
				}
			}
		})
	}
	wg.Wait()
	if got := admitted.Load(); got != 10_000_000 {
		t.Errorf("%d SAT were admitted", got)
	}
}

// TestCounts: each peer, key, counterparty and currency has its own count, for the time of the
// window.
func TestCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		defer r.ledger.Close()
		r.permits(t, dailyBudget)
		other, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: "orders"})
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		asks := func(who Caller, key string, public []byte, payee byte, amount, currency, code string) {
			t.Helper()
			n++
			s := payment(n, public, payee, amount, currency)
			s.Key = key
			_, err := r.Sign(t.Context(), who, s)
			if err == nil && code == "" {
				return
			}
			r.refuses(t, code, err)
		}
		const payments, orders = "payments", "orders"
		theirs := other.Info().PublicKey
		// The count of a counterparty belongs to one key and one currency.
		asks(r.cafe, payments, r.public, 2, "1000", "SAT", "")
		asks(r.cafe, payments, r.public, 2, "0.5", "SAT", "denied")
		asks(r.cafe, payments, r.public, 3, "1000", "SAT", "")
		asks(r.cafe, payments, r.public, 2, "1000", "EUR", "")
		asks(r.cafe, orders, theirs, 2, "1000", "SAT", "")
		asks(r.cafe, orders, theirs, 2, "1", "SAT", "denied")
		// The count of a peer belongs to all keys and counterparties.
		for range 10 {
			asks(r.shop, payments, r.public, 4, "500000", "SAT", "")
			asks(r.shop, orders, theirs, 5, "500000", "SAT", "")
		}
		asks(r.shop, orders, theirs, 6, "0.00000001", "SAT", "denied")
		asks(r.shop, orders, theirs, 6, "500000.1", "SAT", "denied")
		asks(r.shop, orders, theirs, 6, "1", "EUR", "denied")
		time.Sleep(24*time.Hour - time.Second)
		asks(r.cafe, payments, r.public, 2, "1", "SAT", "denied")
		time.Sleep(time.Second)
		asks(r.cafe, payments, r.public, 2, "1000", "SAT", "")
		asks(r.shop, orders, theirs, 6, "1", "SAT", "")
		// A peer may have three signatures in a minute. The payment above is the first.
		for i, code := range []string{"", "", "denied", "denied"} {
			n++
			if _, err := r.Sign(t.Context(), r.shop, numbered(n, "m")); code != "" {
				r.refuses(t, code, err)
			} else if err != nil {
				t.Errorf("%d: %v", i, err)
			}
		}
	})
}

// authorization returns a sign request for an authorization of a Noise key.
func authorization(n int, owner []byte, generation string) *wire.Sign {
	s := numbered(n, "")
	s.Type = "paykit-noise-key-authorization-v1"
	s.Payload = fmt.Appendf(nil, `{"owner":"%x","noise_public_key":"%x","key_generation":%s}`, owner, owner, generation)
	return s
}

// TestGenerationOnlyRises: each generation of a key must be higher than the one before, also for
// concurrent requests and after a restart. A repeated request gets its answer. Each key has its own
// generations.
func TestGenerationOnlyRises(t *testing.T) {
	r := newRig(t)
	const all = `permit (principal, action == Action::"sign", resource);`
	r.permits(t, all)
	asks := func(n int, generation, code string) {
		t.Helper()
		_, err := r.Sign(t.Context(), r.shop, authorization(n, r.public, generation))
		if code == "" {
			if err != nil {
				t.Errorf("generation %s: %v", generation, err)
			}
			return
		}
		r.refuses(t, code, err)
	}
	asks(1, "0", "")
	asks(2, "0", "denied")
	seven := authorization(3, r.public, "7")
	r.sign(t, r.shop, seven)
	asks(4, "7", "denied")
	asks(5, "6", "denied")
	if s := r.sign(t, r.shop, seven); !s.Repeated {
		t.Errorf("%+v", s)
	}
	asks(5, "8", "") // the denial has spent no nonce
	var wg sync.WaitGroup
	var admitted atomic.Int64
	for n := range 32 {
		wg.Go(func() {
			if _, err := r.Sign(t.Context(), r.cafe, authorization(100+n, r.public, "9")); err == nil {
				admitted.Add(1)
			}
		})
	}
	wg.Wait()
	if admitted.Load() != 1 {
		t.Errorf("%d authorizations of one generation", admitted.Load())
	}
	// The policy decides first. A denied generation does not count.
	r.permits(t, `permit (principal, action == Action::"sign", resource)
when { context has generation && context.generation < 50 };`)
	asks(6, "60", "denied")
	r.ledger.Close()
	r.open(t)
	r.permits(t, all)
	asks(7, "9", "denied")
	asks(8, "10", "")
	asks(9, "9223372036854775807", "")
	asks(10, "9223372036854775808", "malformed")
	asks(10, "-1", "malformed")
	asks(10, "9223372036854775807", "denied")
	k, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	other := authorization(11, k.Info().PublicKey, "1")
	other.Key = "orders"
	r.sign(t, r.shop, other)
}

// TestSuccessionIsNotForPeers: no policy allows peers to have a key succession signed.
func TestSuccessionIsNotForPeers(t *testing.T) {
	r := newRig(t)
	r.permits(t, `permit (principal, action, resource);`)
	k, err := r.Keys.Create(t.Context(), operator, keyring.NewKey{Name: "orders"})
	if err != nil {
		t.Fatal(err)
	}
	r.store.BeforeSign = func(keystore.Ref, []byte) error { t.Error("the key was used"); return nil }
	s := numbered(1, "")
	s.Type = "key-succession-v1"
	s.Payload = fmt.Appendf(nil,
		`{"key":"payments","version":2,"old_public_key":"%x","new_public_key":"%x","time":1}`,
		r.public, k.Info().PublicKey)
	_, err = r.Sign(t.Context(), r.shop, s)
	r.refuses(t, "denied", err)
	if a := batched(t, r.Appliance, r.handler(t, "shop"), s); codeOf(a[0].Error) != "denied" {
		t.Errorf("%+v", a)
	}
	if _, err := r.ledger.Spent(t.Context(), ledger.KeyScope("payments"), s.Nonce); err == nil {
		t.Error("the refusal has spent a nonce")
	}
}
