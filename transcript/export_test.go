package transcript

// CanonicalSubscription encodes a subscription without judging it, for vectors of documents that Parse refuses.
func CanonicalSubscription(r Request) ([]byte, error) {
	d := Document{Request: r}
	var s subscription
	if err := d.decode(&s); err != nil {
		return nil, err
	}
	return s.canonical(r), nil
}

// ZBase32 is the text form that Pubky names a key by.
func ZBase32(key []byte) string { return zBase32.EncodeToString(key) }
