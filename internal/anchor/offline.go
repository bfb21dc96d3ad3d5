package anchor

import (
	"encoding/json"
	"fmt"

	"countersign/internal/keystore"
	"countersign/internal/ledger"
)

// ReadOwner reads the owner of the counter of a ledger that no daemon serves. is is false for a
// ledger that was never bound to a counter. token is empty where a crash came between the owner's
// identifier and the binding.
func ReadOwner(v ledger.View) (owner keystore.Owner, token string, is bool, err error) {
	var bound record
	for key, to := range map[string]any{anchorKey: &bound, ownerKey: &owner} {
		value := v.Get(ledger.Meta, key)
		if value == nil {
			continue
		}
		if err := json.Unmarshal(value, to); err != nil {
			return owner, "", false, fmt.Errorf("the record of the ledger's counter: %w", err)
		}
		is = true
	}
	return owner, bound.Token, is, nil
}
