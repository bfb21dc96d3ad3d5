package tpm

// LimitKeys sets the number of keys in use at once, and returns a function that sets the former
// number.
func LimitKeys(n int) (restore func()) {
	former := maxKeys
	maxKeys = n
	return func() { maxKeys = former }
}
