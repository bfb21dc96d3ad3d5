//go:build !goexperiment.runtimesecret

package tpm

// secretDo and secretDoNoHeap only run f in a build without GOEXPERIMENT=runtimesecret. Copies of
// secrets may then stay on the stack and the heap until other data overwrites them. make sets the
// experiment.
func secretDo(f func())       { f() }
func secretDoNoHeap(f func()) { f() }
