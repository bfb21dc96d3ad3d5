package backup

// SetMost replaces shipMost until the result is called.
func SetMost(n int64) (restore func()) {
	before := shipMost
	shipMost = n
	return func() { shipMost = before }
}
