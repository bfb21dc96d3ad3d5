package appliance

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"math/big"
	"os"
	"slices"
	"testing"

	"countersign/ledger"
	"countersign/policy"
	"countersign/transcript"
	"countersign/wire"
)

// TestEveryContextFitsTheSchema: whatever the type of a document, a policy that fits the schema can judge it.
func TestEveryContextFitsTheSchema(t *testing.T) {
	r := newRig(t)
	b, err := os.ReadFile("../transcript/testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []struct {
		Type    string
		Payload json.RawMessage
	}
	if err := json.Unmarshal(b, &vectors); err != nil {
		t.Fatal(err)
	}
	key, err := r.signingKey("payments")
	if err != nil {
		t.Fatal(err)
	}
	vectors = append(vectors, vectors[0])
	vectors[len(vectors)-1].Type = "payment-request-v1" // an amount at the limit, and this key as a party
	vectors[len(vectors)-1].Payload = fmt.Appendf(nil, `{"payer":"%x","payee":"d04ab232742bb4ab3a1368bd4615e4e6d0224ab71a016baf8520a332c9778737","amount":"9223372036854775806","currency":"SAT","method":"x","endpoint":"y"}`, r.public)
	seen := map[string]bool{}
	for _, v := range vectors {
		doc, err := transcript.Parse(transcript.Request{Type: v.Type, Payload: v.Payload, Timestamp: 1, ExpiresAt: transcript.MaxTime})
		if err != nil {
			t.Fatalf("%s: %v", v.Type, err)
		}
		for _, who := range []Peer{r.shop, {Name: "x", PublicKey: r.shop.PublicKey, Identity: hex.EncodeToString(r.public)}} {
			d, err := r.decisionOf(who, key, doc)
			if doc.Reserved {
				r.refuses(t, wire.CodeDenied, err)
				seen[v.Type] = true
				continue
			}
			if err != nil {
				t.Errorf("%s: %v", v.Type, err)
				continue
			}
			used := make([]ledger.Used, len(d.counts))
			for i := range used {
				for w := range used[i] {
					if used[i][w] = new(big.Int).Lsh(big.NewInt(1), 200); i%2 == 0 || !d.payment {
						used[i][w] = big.NewInt(math.MaxInt64)
					}
				}
			}
			record, _ := d.decide(used)
			if err := d.request.Check(); err != nil {
				t.Errorf("%s: %v", v.Type, err)
			}
			rec, err := policy.ParseRecord(record)
			if err != nil {
				t.Fatal(err)
			}
			if err := d.rules.Replay(rec); err != nil {
				t.Errorf("%s: %v", v.Type, err)
			}
			if want := map[bool]string{true: policy.SignRaw, false: policy.Sign}[v.Type == "raw"]; rec.Action != want {
				t.Errorf("%s is %s", v.Type, rec.Action)
			}
			both := len(doc.Signers) == 2 && slices.ContainsFunc(doc.Signers, func(k []byte) bool { return bytes.Equal(k, r.public) })
			if (rec.Used[counterpartyIndex] != policy.Usage{}[0]) != both {
				t.Errorf("%s: counted for a counterparty: %v, which is there: %v", v.Type, rec.Used[counterpartyIndex], both)
			}
			seen[v.Type] = true
		}
	}
	for _, known := range transcript.Types() {
		if !seen[known.Name] {
			t.Errorf("there is no vector of %s", known.Name)
		}
	}
}
