//go:build !breakin

package main

// breakIn does nothing. breakin.go has the other one, of a build for tests.
func breakIn(Config) {}
