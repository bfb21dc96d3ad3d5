//go:build goexperiment.runtimesecret

package secret

import (
	"runtime"
	"runtime/secret"
)

// Do runs f and erases all copies of secrets made by f. Package runtime/secret erases registers and
// stack at the end of f, and the heap at the garbage collection after f. On other platforms than
// linux/amd64 and linux/arm64, the package erases nothing, and Do is as without the experiment.
func Do(f func()) {
	secret.Do(f)
	runtime.GC()
}

// DoNoHeap is Do for an f without secrets on the heap.
func DoNoHeap(f func()) { secret.Do(f) }
