//go:build goexperiment.runtimesecret

package tpm

import (
	"runtime"
	"runtime/secret"
)

// secretly runs f, of which no copy of a secret stays: not in registers or on the stack, and not on the heap after the
// collection that follows (package runtime/secret).
func secretly(f func()) {
	secret.Do(f)
	runtime.GC()
}

// quickly is secretly for an f that puts nothing on the heap.
func quickly(f func()) { secret.Do(f) }
