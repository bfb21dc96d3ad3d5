package transcript

import "encoding/hex"

// maxEndpoint bounds the endpoint of a payment request, in bytes.
const maxEndpoint = 65536

const paymentRequestDomain = "countersign-payment-request-v1"

var paymentRequestType = Type{
	"payment-request-v1",
	"a payment that the payer agrees to, and the payee if the document names one",
	[]Field{
		{"payer", true, formKey + "; a signer"},
		{"payee", false, formKey + "; differs from payer; a signer"},
		{"amount", true, formAmount},
		{"currency", true, "1 to 16 of A-Z a-z 0-9 . _ -"},
		{"method", true, "1 to 64 of A-Z a-z 0-9 _ -"},
		{"endpoint", true, "text of 1 to 65536 bytes"},
		{"description", false, formDescription},
	},
	paymentRequest,
	readJSON(paymentRequestDomain),
}

// paymentRequest builds a payment-request-v1: see bindJSON for the bytes.
func paymentRequest(d *Document) error {
	var p struct {
		Payer       publicKey  `json:"payer"`
		Payee       *publicKey `json:"payee"`
		Amount      string     `json:"amount"`
		Currency    string     `json:"currency"`
		Method      string     `json:"method"`
		Endpoint    string     `json:"endpoint"`
		Description *string    `json:"description"`
	}
	if err := d.decode(&p); err != nil {
		return err
	}
	if err := p.Payer.check("payload.payer"); err != nil {
		return err
	}
	d.Signers = [][]byte{p.Payer[:]}
	d.Fields = map[string]any{
		"currency": p.Currency,
		"method":   p.Method,
		"payer":    hex.EncodeToString(p.Payer[:]),
		"endpoint": p.Endpoint,
	}
	if p.Payee != nil {
		if err := p.Payee.check("payload.payee"); err != nil {
			return err
		}
		if *p.Payee == p.Payer {
			return malformed("payload.payee", "must differ from payload.payer")
		}
		d.Signers = append(d.Signers, p.Payee[:])
		d.Fields["payee"] = hex.EncodeToString(p.Payee[:])
	}
	if err := checkAmount("payload.amount", p.Amount); err != nil {
		return err
	}
	if err := checkToken("payload.currency", p.Currency, maxCurrency, "._-"); err != nil {
		return err
	}
	if err := checkToken("payload.method", p.Method, maxMethodID, "_-"); err != nil {
		return err
	}
	if err := checkText("payload.endpoint", p.Endpoint, maxEndpoint); err != nil {
		return err
	}
	if p.Description != nil {
		if err := checkDescription("payload.description", *p.Description); err != nil {
			return err
		}
	}
	d.Payment = &Payment{Amount: p.Amount, Currency: p.Currency, Method: p.Method}
	return d.bindJSON(paymentRequestDomain)
}
