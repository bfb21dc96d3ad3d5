package transcript

import (
	"math/big"
	"strings"
)

// AmountScale is the number of decimal places that Exact counts in.
const AmountScale = maxAmountScale

// Exact is the amount as a whole number of units of 10^-AmountScale.
func (p *Payment) Exact() *big.Int {
	whole, fraction, _ := strings.Cut(p.Amount, ".")
	n, ok := new(big.Int).SetString(whole+fraction+strings.Repeat("0", AmountScale-len(fraction)), 10)
	if !ok {
		panic("transcript: an amount that was not checked")
	}
	return n
}
