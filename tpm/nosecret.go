//go:build !goexperiment.runtimesecret

package tpm

// Without GOEXPERIMENT=runtimesecret, with which make builds, copies of a secret may stay on the stack and the heap until
// they are overwritten.
func secretly(f func()) { f() }
func quickly(f func())  { f() }
