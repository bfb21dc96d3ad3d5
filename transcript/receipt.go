package transcript

import "slices"

// receiptStates lists the final states of a payment.
var receiptStates = []string{"completed", "failed", "refunded", "cancelled"}

const receiptDomain = "countersign-receipt-document-v1"

var receiptType = Type{
	"receipt-v1",
	"the final state of a payment, without the parties and the amount",
	[]Field{
		{"id", true, "16 bytes, base64url"},
		{"time", true, formTime},
		{"amount_hash", true, "32 bytes, base64url: a salted commitment to the amount"},
		{"method", true, "1 to 64 of A-Z a-z 0-9 _ -"},
		{"status", true, "completed, failed, refunded or cancelled"},
	},
	receipt,
	readJSON(receiptDomain),
}

// receipt builds a receipt-v1: see bindJSON for the bytes. No field is free text, so that a
// receipt has no place for personal data. The domain is not "countersign-receipt-v1", because the
// commitment to the amount is a hash that begins with that text.
func receipt(d *Document) error {
	var p struct {
		ID         string `json:"id"`
		Time       int64  `json:"time"`
		AmountHash string `json:"amount_hash"`
		Method     string `json:"method"`
		Status     string `json:"status"`
	}
	if err := d.decode(&p); err != nil {
		return err
	}
	if _, err := decodeBytes("payload.id", p.ID, 16); err != nil {
		return err
	}
	if err := checkTime("payload.time", p.Time); err != nil {
		return err
	}
	if _, err := decodeBytes("payload.amount_hash", p.AmountHash, 32); err != nil {
		return err
	}
	if err := checkToken("payload.method", p.Method, maxMethodID, "_-"); err != nil {
		return err
	}
	if !slices.Contains(receiptStates, p.Status) {
		return malformed("payload.status", "must be one of %q", receiptStates)
	}
	d.Fields = map[string]any{"method": p.Method, "status": p.Status}
	return d.bindJSON(receiptDomain)
}
