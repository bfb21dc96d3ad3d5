package transcript

// CanonicalSubscription encodes a subscription without the checks of Parse: some test vectors are
// of documents that Parse refuses.
func CanonicalSubscription(r Request) ([]byte, error) {
	d := Document{Request: r}
	var s subscription
	if err := d.decode(&s); err != nil {
		return nil, err
	}
	return s.canonical(r), nil
}

// ZBase32 encodes a key in z-base-32, as Pubky writes keys.
func ZBase32(key []byte) string { return zBase32.EncodeToString(key) }
