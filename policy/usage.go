package policy

import (
	"encoding/json"
	"math"
	"math/big"
	"strconv"

	"github.com/cedar-policy/cedar-go"
)

var (
	// Counted lists the fields of the schema's record used. Each has windows of its own.
	Counted = [...]string{"peer", "key", "counterparty"}
	// Windows lists the rolling windows by their names in the schema, from the shortest to the
	// longest.
	Windows = [...]string{"minute", "hour", "day", "week", "month"}
)

// Window has the sums of one rolling window, including the document under decision. The JSON form
// is an array of the three numbers.
type Window struct{ Signatures, Amount, AmountE8 int64 }

// Usage has the windows of all that is counted, in the order of Counted and Windows.
type Usage [len(Counted)][len(Windows)]Window

// Scale is the number of decimal places of an exact amount: an amount of 1 is 10^Scale.
const Scale = 28

// The units of a rule's amounts, as exact amounts: one whole unit, and 10^-8 of one.
var (
	wholeUnit = new(big.Int).Exp(big.NewInt(10), big.NewInt(Scale), nil)
	e8Unit    = new(big.Int).Exp(big.NewInt(10), big.NewInt(Scale-8), nil)
)

// Amounts converts an exact amount, in units of 10^-Scale, for the rules: to whole units and to
// units of 10^-8. Both are rounded up, so that a rounded amount is over a limit if and only if
// the exact amount is. An amount that does not fit becomes math.MaxInt64.
func Amounts(exact *big.Int) (amount, amountE8 int64) {
	return ceil(exact, wholeUnit), ceil(exact, e8Unit)
}

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

// MarshalJSON writes the JSON by hand, for speed: a decision is recorded inside the ledger's
// transaction, and other admissions wait.
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

// fields returns the three numbers by their names in the schema.
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
				"signatures": cedar.Long(w.Signatures), "amount": cedar.Long(w.Amount),
				"amount_e8": cedar.Long(w.AmountE8),
			})
		}
		all[cedar.String(counted)] = cedar.NewRecord(windows)
	}
	return cedar.NewRecord(all)
}
