//go:build !goexperiment.runtimesecret

package secret

// Do and DoNoHeap only run f in a build without GOEXPERIMENT=runtimesecret. Copies of secrets may
// then stay on the stack and the heap until other data overwrites them. make sets the experiment.
func Do(f func())       { f() }
func DoNoHeap(f func()) { f() }
