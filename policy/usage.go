package policy

import (
	"encoding/json"
	"math"
	"math/big"
	"strconv"

	"github.com/cedar-policy/cedar-go"
)

// Counted are the things that are counted for, Windows the rolling windows, from the shortest on, as the schema names them.
var (
	Counted = [...]string{"peer", "key", "counterparty"}
	Windows = [...]string{"minute", "hour", "day", "week", "month"}
)

// Window is what one window has, with the document that is decided about. In JSON it is an array of the three.
type Window struct{ Signatures, Amount, AmountE8 int64 }

// Usage is what all windows of all that is counted have.
type Usage [len(Counted)][len(Windows)]Window

// Scale is the number of decimal places that an exact amount is counted in: an amount of 1 is 10^Scale.
const Scale = 28

var (
	whole = new(big.Int).Exp(big.NewInt(10), big.NewInt(Scale), nil)
	tiny  = new(big.Int).Exp(big.NewInt(10), big.NewInt(Scale-8), nil)
)

// Amounts are an exact amount, in units of 10^-Scale, as policies see it: in whole units and in units of 10^-8, each rounded up,
// so that it is over a limit if and only if the exact amount is. What does not fit is math.MaxInt64.
func Amounts(exact *big.Int) (amount, amountE8 int64) { return ceil(exact, whole), ceil(exact, tiny) }

func ceil(n, unit *big.Int) int64 {
	q, rest := new(big.Int).QuoRem(n, unit, new(big.Int))
	switch {
	case !q.IsInt64() || q.Int64() == math.MaxInt64:
		return math.MaxInt64
	case rest.Sign() > 0:
		return q.Int64() + 1
	}
	return q.Int64()
}

// MarshalJSON is written by hand: it runs while others wait for the ledger.
func (u Usage) MarshalJSON() ([]byte, error) {
	b := make([]byte, 0, 512)
	open := func() {
		if b[len(b)-1] == ']' {
			b = append(b, ',')
		}
		b = append(b, '[')
	}
	b = append(b, '[')
	for i := range u {
		open()
		for _, w := range u[i] {
			open()
			b = append(strconv.AppendInt(b, w.Signatures, 10), ',')
			b = append(strconv.AppendInt(b, w.Amount, 10), ',')
			b = append(strconv.AppendInt(b, w.AmountE8, 10), ']')
		}
		b = append(b, ']')
	}
	return append(b, ']'), nil
}

func (w *Window) UnmarshalJSON(b []byte) error {
	var n [3]int64
	err := json.Unmarshal(b, &n)
	*w = Window{n[0], n[1], n[2]}
	return err
}

// fields are the three by their names in the schema.
func (w *Window) fields() map[string]*int64 {
	return map[string]*int64{"signatures": &w.Signatures, "amount": &w.Amount, "amount_e8": &w.AmountE8}
}

func (u *Usage) record() cedar.Record {
	all := cedar.RecordMap{}
	for i, counted := range Counted {
		windows := cedar.RecordMap{}
		for j, name := range Windows {
			w := u[i][j]
			windows[cedar.String(name)] = cedar.NewRecord(cedar.RecordMap{
				"signatures": cedar.Long(w.Signatures), "amount": cedar.Long(w.Amount), "amount_e8": cedar.Long(w.AmountE8),
			})
		}
		all[cedar.String(counted)] = cedar.NewRecord(windows)
	}
	return cedar.NewRecord(all)
}
