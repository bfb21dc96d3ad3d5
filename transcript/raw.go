package transcript

var rawType = Type{"raw", "bytes as they are, whatever they mean; policy must allow sign_raw", []Field{
	{"message", true, "base64url"},
}, raw}

// raw signs the bytes as they are: {"message": "<base64url>"}. It exists for callers that bring their own format (an SSH
// certificate, a TLS library that wants a crypto.Signer). It is dangerous: the bytes may be those of any other
// transcript, and nothing in them is bound to nonce or time. Policy must name both the key and the peer, and the
// appliance signs raw documents but does not verify them.
func raw(d *Document) error {
	var p struct {
		Message string `json:"message"`
	}
	if err := d.decode(&p); err != nil {
		return err
	}
	b, err := decodeBase64("payload.message", p.Message)
	if err != nil {
		return err
	}
	d.Canonical, d.Message, d.Unbound = b, b, true
	return nil
}
