package transcript

var rawType = Type{
	"raw",
	"bytes of any meaning, signed unchanged; policy must allow sign_raw",
	[]Field{
		{"message", true, "base64url"},
	},
	raw,
	readRaw,
}

// raw builds a raw document, {"message": "<base64url>"}, whose bytes are signed unchanged. The
// type exists for callers with a format of their own: an SSH certificate, or a TLS library that
// wants a crypto.Signer.
//
// Raw signatures are dangerous: the bytes can be those of any other type, and are not bound to
// nonce or time. So policy must name both the key and the peer, and the appliance signs raw
// documents but does not verify them.
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
