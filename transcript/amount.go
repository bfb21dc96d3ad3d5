package transcript

import (
	"math/big"
	"strings"
)

// AmountScale is the number of decimal places of Exact: an amount of 1 is 10^AmountScale.
const AmountScale = maxAmountScale

// Exact returns the amount in units of 10^-AmountScale. Exact panics for an amount that Parse has
// not accepted.
func (p *Payment) Exact() *big.Int {
	whole, fraction, _ := strings.Cut(p.Amount, ".")
	n, ok := new(big.Int).SetString(whole+fraction+strings.Repeat("0", AmountScale-len(fraction)), 10)
	if !ok {
		panic("transcript: an amount that was not checked")
	}
	return n
}
