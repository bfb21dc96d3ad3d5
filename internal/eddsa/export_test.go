package eddsa

// MakeTable gives the key a table now.
func (k *PublicKey) MakeTable() {
	made := newTable(&k.minus)
	tables.Lock()
	defer tables.Unlock()
	k.keep(made)
}
