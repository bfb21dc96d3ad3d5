//go:build goexperiment.runtimesecret

package tpm

import (
	"runtime"
	"runtime/secret"
)

// secretDo runs f and erases all copies of secrets made by f. Package runtime/secret erases
// registers and stack at the end of f, and the heap at the garbage collection after f.
func secretDo(f func()) {
	secret.Do(f)
	runtime.GC()
}

// secretDoNoHeap is secretDo for an f without secrets on the heap.
func secretDoNoHeap(f func()) { secret.Do(f) }
